"""What the papers print: `figures.yaml` as rows of tables and curves of figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bnncore.errors import UserError
from bnncore.params import read_yaml

FIGURES = Path(__file__).with_name("figures.yaml")


class FiguresError(UserError, ValueError):
    """The file of published figures, or a results file, is missing or not as expected."""


@dataclass(frozen=True)
class Series:
    """Accuracies of one row of a table, or of one curve over the members.

    Attributes:
        place: ``TentacleNet, Table 1`` ...
        label: what a line is called; ``{m}`` in it is M.
        kind: (``fp32``,), (``bnn``,) or (scheme, sharing).
        values: M -> what is published.
        title: of the figure.
        delta: the values are points above the FP32 model, else % top-1.
        curve: other M belong to it too.
    """

    place: str
    label: str
    dataset: str
    backbone: str
    kind: tuple[str, ...]
    values: dict[int, float]
    title: str = ""
    delta: bool = False
    curve: bool = False

    @property
    def name(self) -> str:
        """The label without its members."""
        return self.label.rpartition(", ")[0] or self.label


@dataclass(frozen=True)
class Size:
    """A published size.

    Attributes:
        table: ``TentacleNet, Table 1`` ...
        kind: ``fp32``, ``bnn``, ``benn``, ``tentaclenet``; of the second paper the block.
        published: KiB in the first paper's tables, bits in the second's.
        saving: published, % of the smaller BENN.
    """

    table: str
    row: str
    backbone: str
    dataset: str
    kind: str
    members: int
    published: float
    saving: float | None = None


@dataclass(frozen=True)
class Published:
    """All that is compared; `operations` are those that the second paper quotes."""

    series: list[Series]
    sizes: list[Size]
    operations: dict[str, float]


def published(path: Path = FIGURES) -> Published:
    """The published figures.

    Raises:
        FiguresError: names the file.
    """
    try:
        raw = read_yaml(path)
        return Published(
            [
                Series(**{**about, **row, "kind": tuple(row["kind"]),
                          "values": {int(m): float(v) for m, v in row["values"].items()}})
                for about in raw["accuracies"]
                for row in about.pop("series")
            ],
            [
                Size(**{**row, "members": int(row["members"]),
                        "published": float(row["published"])})
                for row in raw["sizes"]
            ],
            {k: float(raw["operations"][k]) for k in ("resnet18", "resnet18_over_resnet20")},
        )  # fmt: skip
    except KeyError as error:
        text = f"no {error}"
    except (ValueError, TypeError, AttributeError) as error:
        text = " ".join(str(error).removeprefix(f"{path}: ").split())
    raise FiguresError(
        f"{path}: expected the papers' figures, got: {text}; name the file with --expected"
    )
