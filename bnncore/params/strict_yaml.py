"""YAML as users write it, read strictly: what is ambiguous, hidden or unbounded is refused.

Refused with file and line: a key twice, a key that is neither text nor a whole number, merge keys,
tags, an alias inside what an anchor names (such nest without end), deep nesting, more than
`MAX_BYTES`, bytes that are not UTF-8.
Numbers are decimal and read as YAML 1.2 and Hydra do: ``1e-3`` is a number, ``010`` and ``1:30``
are text, and so are dates.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from bnncore.params.validation import ParamsError

MAX_BYTES = 1 << 18
MAX_DEPTH = 32
MAX_ALIASES = 64


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                raise ParamsError(f"line {line}: expected a key, got the merge key <<")
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:int"):
                got = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                raise ParamsError(
                    f"line {line}: expected text or a whole number as key, got {got or 'none'}"
                )
            if key.value in lines:
                raise ParamsError(
                    f"line {line}: expected each key once, got {key.value!r} again (first in line "
                    f"{lines[key.value]})"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)


# One list for each first character; of another set than YAML 1.1's for numbers, and no dates.
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]{0,999})$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|[0-9][0-9_]*(?=[eE])|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$"
        r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """The plain data of one YAML document.

    Raises:
        ParamsError: names the line, what was expected and what was found.
    """
    try:
        _scan(text)
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ParamsError(f"{line}expected YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:  # of characters, before there are lines
        raise ParamsError(f"expected YAML: {' '.join(str(error).split())}") from None


def _scan(text: str) -> None:
    """Look at the events one by one, before anything is built of them."""
    depth = aliases = 0
    anchored: int | None = None  # depth of the outermost collection that an anchor names
    for event in yaml.parse(text, _Loader):
        assert event.start_mark is not None
        where = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            aliases += 1
            if anchored is not None or aliases > MAX_ALIASES:
                raise ParamsError(
                    f"{where}: expected at most {MAX_ALIASES} aliases and none inside an anchor, "
                    f"got *{event.anchor}"
                )
            continue
        tag = getattr(event, "tag", None)
        if tag not in (None, "tag:yaml.org,2002:str"):
            raise ParamsError(f"{where}: expected a value without a tag, got {tag}")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ParamsError(f"{where}: expected at most {MAX_DEPTH} levels, got more")
            if event.anchor and anchored is None:
                anchored = depth
        elif isinstance(event, yaml.CollectionEndEvent):
            anchored = None if anchored == depth else anchored
            depth -= 1


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The plain data of a YAML file.

    Raises:
        ParamsError: the file is missing, unreadable, too large or not strict YAML; names it.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ParamsError(f"{path}: expected a YAML file, found none") from None
    except OSError as error:
        raise ParamsError(f"{path}: expected a readable file: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise ParamsError(f"{path}: expected at most {MAX_BYTES:,} bytes of YAML, got more")
    try:
        return parse_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ParamsError(
            f"{path}: line {line}: expected text in UTF-8, got byte 0x{content[error.start]:02x}"
        ) from None
    except ParamsError as error:
        raise ParamsError(f"{path}: {error}") from None
