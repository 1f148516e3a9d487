"""The types of parameters: exact (no bool is a number, no text is one), finite and bounded."""

from __future__ import annotations

import unicodedata
from typing import Annotated, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, Strict

SECTION = ConfigDict(extra="forbid")
MANY = 1_000_000  # of anything that is counted, but for what says otherwise
EXACT = 2**53  # whole numbers up to here are exact in JSON, YAML and the packed file


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected printable characters")
    return text


def _no_control(text: str) -> str:
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise ValueError("expected no control characters")
    return text


def _gray_or_rgb(channels: int) -> int:
    if channels not in (1, 3):
        raise ValueError("expected 1 or 3")
    return channels


T = TypeVar("T")
Flag = Annotated[bool, Strict()]
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Count = Annotated[Whole, Field(ge=1, le=MANY)]
Batch = Annotated[Whole, Field(ge=1, le=65_536)]  # images at a time
Threads = Annotated[Whole, Field(ge=1, le=1024)]
Width = Annotated[Whole, Field(ge=2, le=2048)]  # half of it is not nothing; 10 times the papers'
Channels = Annotated[Whole, AfterValidator(_gray_or_rgb)]
Seed = Annotated[Whole, Field(ge=0, le=EXACT)]
Positive = Annotated[Number, Field(gt=0, le=1e9)]
NotNegative = Annotated[Number, Field(ge=0, le=1e9)]
Rate = Annotated[Number, Field(gt=0, le=100)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Between = Annotated[Number, Field(gt=0, lt=1)]
Share = Annotated[Number, Field(gt=0, le=1)]
Text = Annotated[str, Strict(), Field(min_length=1, max_length=200), AfterValidator(_printable)]
Place = Annotated[str, Strict(), Field(min_length=1, max_length=1000), AfterValidator(_no_control)]
Some = Annotated[tuple[T, ...], Field(min_length=1, max_length=100)]
