"""Compose a preset of conf/preset into params.yaml: ``python -m pipeline.preset NAME``.

The same composition as ``dvc exp run -S preset=NAME``, for plain ``dvc repro``; what stands in
params.yaml is replaced. `--epochs-scale` and `--subset` set `scale`, any other value is overridden
as ``section.key=value`` (Hydra's grammar).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from bnncore import params

CONF = Path(__file__).parent.parent / "conf"
DEFAULT = "digits"


def presets() -> dict[str, str]:
    """Name -> the first line that describes it."""
    found = {}
    for path in sorted((CONF / "preset").glob("*.yaml")):
        lines = path.read_text().splitlines()
        found[path.stem] = lines[1].removeprefix("# ")
    return found


def compose(
    name: str = DEFAULT,
    epochs_scale: float = 1.0,
    subset: float = 1.0,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """The parameters of a preset, as plain data, checked.

    Args:
        epochs_scale, subset: `params.Scale`.
        overrides: in Hydra's grammar.

    Raises:
        ParamsError: an unknown preset (lists those there are), a value that cannot be used.
    """
    if any(override.startswith("preset=") for override in overrides):
        raise params.ParamsError(f"expected one preset, got {name} and {' '.join(overrides)}")
    if name not in presets():
        raise params.ParamsError(f"expected one of {', '.join(presets())}, got {name!r}")
    # DVC's own composition, so that `dvc exp run -S preset=` gives the same.
    from dvc.utils.hydra import compose_and_dump
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    shorter = [f"scale.epochs={epochs_scale}", f"scale.subset={subset}"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        try:
            compose_and_dump(
                path, str(CONF), None, "config", str(CONF),
                [f"preset={name}", *shorter, *overrides],
            )  # fmt: skip
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise params.ParamsError(f"{name}: {error}") from None
        values = params.read_yaml(path)
    params.parse(values)
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.preset", description="Compose a preset into params.yaml."
    )
    parser.add_argument("name", nargs="?", help="a preset; without one they are listed")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--epochs-scale", type=float, default=1.0, metavar="FACTOR",
                        help="factor on the epochs of every recipe")  # fmt: skip
    parser.add_argument("--subset", type=float, default=1.0, metavar="FRACTION",
                        help="of the training images")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("params.yaml"), metavar="FILE")
    options = parser.parse_intermixed_args(arguments)
    if options.name is None:
        wide = max(map(len, presets()))
        for name, text in presets().items():
            print(f"{name:<{wide}}  {text}")
        return 0
    try:
        values = compose(options.name, options.epochs_scale, options.subset, options.overrides)
        head = f"# Preset {options.name}, composed by `python -m pipeline.preset`; see conf/.\n"
        options.output.write_text(head + yaml.safe_dump(values, sort_keys=False, width=100))
    except (params.ParamsError, OSError) as error:
        print(f"preset: {error}", file=sys.stderr)
        return 1
    scale = values["scale"]
    print(f"{options.output}: preset {options.name}, epochs x {scale['epochs']:g}, "
          f"{scale['subset'] * values['data']['subset']:.3g} of the training images")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
