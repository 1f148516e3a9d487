"""Plain data into a section, and what is said where that fails: ``KEY: expected X, got Y``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from bnncore.errors import UserError

T = TypeVar("T")


class ParamsError(UserError, ValueError):
    """Parameters that cannot be used; names the key, the value and what is allowed."""


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def validated(cls: type[T], values: Any, where: str = "") -> T:
    """A dataclass of `bnncore.params` from plain data.

    Args:
        where: the key under which `values` stand.

    Raises:
        ParamsError: a line for each key that is wrong, with its value and what is allowed.
    """
    try:
        return _adapter(cls).validate_python(values)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ParamsError("\n".join(_line(cls, where, e) for e in error.errors())) from None


def _line(cls: type, where: str, error: Any) -> str:
    path = [part for part in error["loc"] if not str(part).startswith("<")]  # <...>: of a union
    key = ".".join(str(part) for part in (where, *path) if str(part))
    if error["type"] == "unexpected_keyword_argument":
        known = [field.name for field in dataclasses.fields(_owner(cls, path[:-1]))]
        return f"{key}: unknown key; expected one of {', '.join(known)}"
    if error["type"] == "missing":
        return f"{key}: expected a value, got none"
    if error["type"] == "dataclass_type":
        return f"{key}: expected a section, got {shown(error['input'])}"
    if error["type"] == "value_error" and ", got " in error["msg"]:  # a section's own rule
        return f"{key}.{error['ctx']['error']}".lstrip(".")
    expected = re.sub(r"^\w+ should (be )?", "expected ", error["msg"])
    expected = expected.replace("a valid tuple", "a list").removeprefix("Value error, ")
    return f"{key}: {expected}, got {shown(error['input'])}"


def _owner(cls: Any, path: Sequence[int | str]) -> Any:
    """The dataclass that a path of keys and list positions leads to, from that of `cls`."""
    for part in path:
        if isinstance(part, str):
            cls = get_type_hints(cls)[part]
        while not dataclasses.is_dataclass(cls):  # tuple[X, ...], X | None, str | X
            cls = next(a for a in get_args(cls) if a not in (str, type(None), Ellipsis))
    return cls


def shown(value: Any) -> str:
    """A value as a message shows it, in a line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
