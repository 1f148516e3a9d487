"""The page of all keys of params.yaml: ``python -m bnncore.reference > docs/params.md``."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from bnncore.networks.backbones import BACKBONES
from bnncore.networks.binarize import ACTIVATIONS, WEIGHTS
from bnncore.networks.sharing import GROUPS, SHARING
from bnncore.params import Params
from bnncore.search.space import FP32
from bnncore.training.schemes import SCHEMES

Schema = Mapping[str, Any]

HEAD = """\
# All keys of `params.yaml`

Made from the code by `python -m bnncore.reference > docs/params.md`. A key that is left out has its
default (the `params.yaml` that comes with the project says other values), but what `dvc.yaml`
names DVC wants written. Unknown keys, and values that are not allowed, are refused before any work.
"""
# Keys whose texts are names of these rows.
NAMES: dict[str, Mapping[str, Any]] = {
    "backbone": BACKBONES, "weight": WEIGHTS, "activation": ACTIVATIONS, "scheme": SCHEMES,
    "sharing": SHARING, "search.space.scheme": {**SCHEMES, FP32: None},
}  # fmt: skip
# What docstrings call by its name in the code.
LINKS = {"schemes.SCHEMES": "schemes", "sharing.SHARING": "sharings", "sharing.GROUPS": "sharings"}


def page() -> str:
    """The page, as Markdown."""
    schema = TypeAdapter(Params).json_schema()
    seen: dict[str, str] = {}
    lines = [HEAD, *_section("", schema, schema["$defs"], seen)]
    lines.append("## Schemes\n")
    rows = []
    for name, scheme in SCHEMES.items():
        about = inspect.getdoc(scheme.run) or ""
        options = ", ".join(f"{key}: {_code(value)}" for key, value in scheme.options.items())
        rows.append((f"`{name}`", scheme.combine, _prose(about.split("\n\n")[0]), options))
    lines += _table(("`scheme`", "outputs are joined by", "training", "its options"), rows)
    lines.append("## Sharings\n\nWhat is not a member's own is shared by all.\n")
    owners = []
    for row in SHARING.values():
        own = ", ".join(map(_code, row.own)) or "norms and activations only"
        owners.append((f"`{row.name}`", own, "frozen" if row.frozen else "trained"))
    lines += _table(("`sharing`", "each member owns", "what is shared is"), owners)
    lines += _table(("group", "layers"), [(f"`{name}`", text) for name, text in GROUPS.items()])
    text = "\n".join(lines).rstrip() + "\n"
    for name, key in (LINKS | seen).items():
        text = text.replace(f"`{name}`", f"[{key}](#{key.replace('.', '')})")
    return text.replace("`backbones.BACKBONES`", "[backbones](backbones.md)")


def _section(
    key: str, section: Schema, sections: Mapping[str, Schema], seen: dict[str, str]
) -> Iterator[str]:
    """The table of a section and those of the sections in it.

    Args:
        sections: all of them, by class.
        seen: class -> the key of the section that has its table.
    """
    intro, meaning = _described(section)
    if key:
        yield f"## `{key}`\n"
        yield f"{intro}\n"
    rows, inner = [], []
    for name, value in section["properties"].items():
        below = f"{key}.{name}".lstrip(".")
        for found in re.findall(r"#/\$defs/(\w+)", json.dumps(value)):
            if found not in seen:
                seen[found] = below
                inner.append((below, sections[found]))
            about = _described(sections[found])[0].split("\n\n")[0]
            value = json.loads(json.dumps(value).replace(f"#/$defs/{found}", f"section `{found}`"))
            meaning.setdefault(name, about)
        default = _code(value["default"]) if "default" in value else ""
        if name in section.get("required", ()):
            default = "required"
        allowed = _allowed(value, NAMES.get(below, NAMES.get(name)))
        rows.append((f"`{name}`", allowed, default, meaning[name]))
    yield from _table(("key", "value", "default", "meaning"), rows)
    for below, content in inner:
        yield from _section(below, content, sections, seen)


def _described(section: Schema) -> tuple[str, dict[str, str]]:
    """A section's docstring: what it says of the section, and of each key."""
    intro, _, attributes = section["description"].partition("\n\nAttributes:\n")
    items = re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    meaning = {name: _prose(text) for names, text in items for name in names.split(", ")}
    return _prose(intro), meaning


def _prose(text: str) -> str:
    """A docstring's text as Markdown; None is null there."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    return re.sub(r"\bNone\b", "`null`", "\n\n".join(paragraphs).replace("``", "`"))


def _allowed(value: Schema, names: Mapping[str, Any] | None) -> str:
    """What a key takes, from its JSON schema."""
    if choices := value.get("anyOf", value.get("oneOf")):
        return " or ".join(_allowed(choice, names) for choice in choices)
    if "$ref" in value:
        return value["$ref"]
    if "const" in value:
        return _code(value["const"])
    if "enum" in value:
        return ", ".join(map(_code, value["enum"]))
    kind = value["type"]
    if kind == "array":
        return f"list: {_allowed(value['items'], names)}" if "items" in value else "list of 2"
    if kind == "string" and names:
        return ", ".join(map(_code, names))
    known = {"boolean": "`true`, `false`", "null": "`null`", "string": "text", "object": "section",
             "integer": "whole number", "number": "number"}  # fmt: skip
    ends = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to",
            "exclusiveMaximum": "below"}  # fmt: skip
    bounds = [f"{word} {int(value[end]):,}" for end, word in ends.items() if end in value]
    return " ".join([known[kind], *bounds])


def _code(value: Any) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *rows]
    return [
        *("| " + " | ".join(" ".join(cell.split()) for cell in row) + " |" for row in lines),
        "",
    ]


if __name__ == "__main__":
    print(page(), end="")
