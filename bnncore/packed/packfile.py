"""Packed files: a `Program` as one small, checked safetensors file.

`docs/format.md` defines every field. In short: the tensors of one kind lie end to end in one
safetensors entry (names, shapes and offsets of a hundred small tensors would outweigh them), and
the entry ``graph`` holds the rest as zlib-compressed JSON. Nothing in a file is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import struct
import zlib
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from bnncore.packed.program import (
    KINDS,
    Node,
    PackedFormatError,
    Program,
    Tensor,
    stored_shape,
)
from bnncore.packed.rules import MAX_MEMBERS, MAX_NODES, MAX_TENSORS, require, validate
from bnncore.packed.rules import version as needed

FORMAT = "bnncore"
VERSIONS = ("1", "2")  # that can be read; written is the first that can hold a Program
MAX_HEADER = 4096  # bytes of the safetensors header; the largest possible takes under 1 KiB
MAX_GRAPH = 1 << 20  # bytes of the graph's JSON

# safetensors' names for the kinds, in the order of the file: wide elements first keeps each aligned
_DTYPES = {
    "float32": "F32",
    "int32": "I32",
    "float16": "F16",
    "int16": "I16",
    "int8": "I8",
    "binary": "U8",
    "graph": "U8",
}


def save(program: Program, path: str | os.PathLike[str]) -> int:
    """Write a packed file, all of it or nothing, and return its size in bytes.

    Raises:
        PackedFormatError: the Program is not valid.
        OSError: it cannot be written; names `path`.
    """
    content = encode(program)
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # A full disk says so without a name, and nobody knows the temporary file's.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(content)


def load(path: str | os.PathLike[str]) -> Program:
    """Read a packed file and check all of it.

    Raises:
        PackedFormatError: the file is not a valid packed file; the message says which and why.
        OSError: the file cannot be read.
    """
    try:
        return decode(Path(path).read_bytes())
    except PackedFormatError as error:
        raise PackedFormatError(f"{path}: {error}") from None


def encode(program: Program) -> bytes:
    """The bytes of a packed file."""
    version = needed(program, validate(program))
    parts = {
        kind: b"".join(t.data.tobytes() for t in program.tensors.values() if t.kind == kind)
        for kind in _DTYPES
        if kind != "graph"
    }
    parts["graph"] = graph(program)
    data = b"".join(parts.values())
    return _head(parts, data, version) + data


def file_size(sizes: dict[str, int]) -> int:
    """The size of a file whose entries (kinds of tensors, and ``graph``) take these bytes."""
    # Of the parts the header tells the lengths only.
    parts = {kind: range(sizes[kind]) for kind in _DTYPES if kind in sizes}
    return len(_head(parts, b"", VERSIONS[0])) + sum(sizes.values())


def graph(program: Program) -> bytes:
    """The entry ``graph``: all of a Program but its tensors' values."""
    names = list(program.tensors)
    number = {name: index for index, name in enumerate(names)}
    content = {
        "image": [int(size) for size in program.image],
        "classes": list(program.classes),
        "members": int(program.members),
        "combine": program.combine,
        "combine_tensors": {slot: number[name] for slot, name in program.combine_tensors.items()},
        "info": {
            key: fact if isinstance(fact, str) else _number(fact)
            for key, fact in program.info.items()
        },
        "tensors": [
            [name, t.kind, t.role, [int(size) for size in t.shape], int(t.own)]
            for name, t in program.tensors.items()
        ],
        "nodes": [
            [
                node.op,
                node.name,
                # Counted backwards: nearly always [1], which compresses to nothing.
                [index + 1 - int(source) for source in node.inputs],
                {slot: number[name] for slot, name in node.tensors.items()},
                {key: _number(value) for key, value in node.attrs.items()},
            ]
            for index, node in enumerate(program.nodes)
        ],
    }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    require(len(text) <= MAX_GRAPH, "graph", f"at most {MAX_GRAPH} bytes of JSON", len(text))
    return zlib.compress(text, 9)


def _number(value: int | float) -> int | float:
    return float(value) if isinstance(value, float | np.floating) else int(value)


def _head(parts: dict[str, Any], data: Any, version: str) -> bytes:
    """What stands in front of the data: the header's length, and the header."""
    header = json.dumps(_header(parts, data, version), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def _header(parts: dict[str, Any], data: Any, version: str) -> dict[str, Any]:
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "version": version,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    }
    start = 0
    for kind, part in parts.items():
        if part:
            size = 1 if kind == "graph" else KINDS[kind].itemsize
            end = start + len(part)
            header[kind] = {
                "dtype": _DTYPES[kind],
                "shape": [len(part) // size],
                "data_offsets": [start, end],
            }
            start = end
    return header


def decode(content: bytes) -> Program:
    """The Program in the bytes of a packed file; its arrays are read-only views of them.

    Raises:
        PackedFormatError: the bytes are not a valid packed file.
    """
    length = int.from_bytes(content[:8], "little")
    if length > MAX_HEADER or content[8:9] != b"{":
        raise PackedFormatError("not a packed file")
    require(8 + length <= len(content), "file", f"at least {8 + length} bytes", len(content))
    header = _object(_json(content[8 : 8 + length], "header"), "header")
    metadata = _object(header.get("__metadata__"), "header __metadata__")
    require(metadata.get("format") == FORMAT, "format", FORMAT, metadata.get("format"))
    version = metadata.get("version")
    require(version in VERSIONS, "version", " or ".join(VERSIONS), version)
    data = memoryview(content)[8 + length :]
    parts: dict[str, Any] = {}
    start = 0
    for kind in _DTYPES:  # the offsets have to be those of the entries laid end to end
        if kind in header:
            entry = _object(header[kind], f"entry {kind}")
            offsets: Any = entry.get("data_offsets")
            end = offsets[1] if _integers(offsets) and len(offsets) == 2 else -1
            good = start <= end <= len(data)
            require(good, f"entry {kind} offsets", f"[{start}, <= {len(data)}]", offsets)
            parts[kind] = bytes(data[start:end]) if kind == "graph" else data[start:end]
            start = end
    require(start == len(data), "file", f"{start} bytes of data", len(data))
    # What the writer would have put there is known in full, down to the checksum.
    expected = _header(parts, data, version)
    true = expected["__metadata__"]["sha256"]
    require(metadata.get("sha256") == true, "data", "the sha256 in the header", f"sha256 {true}")
    for key in header.keys() | expected.keys():
        got = header.get(key)
        require(got == expected.get(key), f"header entry {key!r}", expected.get(key), got)
    require("graph" in parts, "file", "an entry graph", "none")
    return _program(_json(_inflate(parts["graph"]), "graph"), parts, version)


def _inflate(packed: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(packed, MAX_GRAPH)
    except zlib.error as error:
        raise PackedFormatError(f"graph: expected zlib data, got {error}") from None
    whole = stream.eof and not stream.unused_data
    require(whole, "graph", f"one zlib stream of at most {MAX_GRAPH} bytes", "another")
    return text


def _json(text: bytes, where: str) -> Any:
    def constant(name: str) -> NoReturn:
        raise ValueError(f"the constant {name}")

    def integer(digits: str) -> int:
        if len(digits) > 20:  # far beyond all limits, and with 4,300 Python refuses to print it
            raise ValueError(f"an integer of {len(digits)} digits")
        return int(digits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a repeated key")
        return found

    try:
        return json.loads(
            text.decode(), parse_constant=constant, parse_int=integer, object_pairs_hook=unique
        )
    except (ValueError, RecursionError) as error:
        raise PackedFormatError(f"{where}: expected strict JSON, got {str(error)[:200]}") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    require(isinstance(value, dict), where, "a JSON object", value)
    return value


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _rows(value: Any, where: str, types: tuple[type, ...]) -> list[list[Any]]:
    """A list of lists, each of items of these JSON types."""
    require(isinstance(value, list), where, "a list", value)
    names = ", ".join(kind.__name__ for kind in types)
    for index, row in enumerate(value):
        good = isinstance(row, list) and tuple(type(item) for item in row) == types
        require(good, f"{where} {index}", f"[{names}]", row)
    return value


_GRAPH_KEYS = {
    "image",
    "classes",
    "members",
    "combine",
    "combine_tensors",
    "info",
    "tensors",
    "nodes",
}


def _program(raw: Any, parts: dict[str, Any], version: str) -> Program:
    graph = _object(raw, "graph")
    require(graph.keys() == _GRAPH_KEYS, "graph", f"keys {sorted(_GRAPH_KEYS)}", sorted(graph))
    members = graph["members"]
    good = type(members) is int and 1 <= members <= MAX_MEMBERS
    require(good, "members", f"1 to {MAX_MEMBERS}", members)
    require(_integers(graph["image"]), "image", "[H, W, C]", graph["image"])
    require(isinstance(graph["combine"], str), "combine", "a name", graph["combine"])
    require(isinstance(graph["classes"], list), "classes", "a list", graph["classes"])
    for key, fact in _object(graph["info"], "info").items():
        good = type(fact) in (str, int, float)
        require(good, f"info {key!r}", "a string or a number", fact)
    tensors = _tensors(graph["tensors"], members, parts)
    names = list(tensors)
    nodes = []
    count = len(graph["nodes"]) if isinstance(graph["nodes"], list) else 0
    require(count <= MAX_NODES, "nodes", f"at most {MAX_NODES}", count)
    for index, row in enumerate(_rows(graph["nodes"], "node", (str, str, list, dict, dict))):
        op, name, back, slots, attrs = row
        where = f"node {index} ({op} {name!r})"
        require(_integers(back), f"{where} inputs", "a list of integers", back)
        good = all(1 <= step <= index + 1 for step in back)  # so that no graph has a cycle
        require(good, f"{where} inputs", f"steps back of 1 to {index + 1}", back)
        good = all(type(value) in (int, float) for value in attrs.values())
        require(good, f"{where} attributes", "numbers", attrs)
        inputs = tuple(index + 1 - step for step in back)
        nodes.append(Node(op, name, inputs, _named(slots, names, where), attrs))
    program = Program(
        nodes=tuple(nodes),
        tensors=tensors,
        members=members,
        combine=graph["combine"],
        image=tuple(graph["image"]),
        classes=tuple(graph["classes"]),
        combine_tensors=_named(
            _object(graph["combine_tensors"], "combine tensors"), names, "combine"
        ),
        info=graph["info"],
    )
    first = needed(program, validate(program))
    require(first <= version, "operators", f"those of version {version}", f"some of {first}")
    return program


def _named(slots: dict[str, Any], names: list[str], where: str) -> dict[str, str]:
    for slot, number in slots.items():
        good = type(number) is int and 0 <= number < len(names)
        require(good, f"{where} {slot}", f"a tensor number below {len(names)}", number)
    return {slot: names[number] for slot, number in slots.items()}


def _tensors(rows: Any, members: int, parts: dict[str, Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    count = len(rows) if isinstance(rows, list) else 0
    require(count <= MAX_TENSORS, "tensors", f"at most {MAX_TENSORS}", count)
    taken = dict.fromkeys(KINDS, 0)
    for name, kind, role, shape, own in _rows(rows, "tensor", (str, str, str, list, int)):
        where = f"tensor {name!r}"
        require(name not in tensors, where, "a name used once", "a second one")
        require(kind in KINDS, where, f"a kind of {', '.join(KINDS)}", kind)
        good = _integers(shape) and 1 <= len(shape) <= 4 and min(shape) > 0
        require(good, where, "a shape of 1 to 4 positive sizes", shape)
        require(own in (0, 1), where, "own of 0 or 1", own)
        blank = Tensor(kind, role, tuple(shape), bool(own), np.empty(0, KINDS[kind]))
        stored = stored_shape(blank, members)
        start = taken[kind]
        end = start + math.prod(stored) * KINDS[kind].itemsize
        part = parts.get(kind, b"")
        good = end <= len(part)
        require(good, where, f"bytes {start} to {end} of {kind}", f"{len(part)} in all")
        taken[kind] = end
        data = np.frombuffer(part[start:end], KINDS[kind]).reshape(stored)
        tensors[name] = Tensor(kind, role, tuple(shape), bool(own), data)
    for kind, end in taken.items():
        size = len(parts.get(kind, b""))
        require(size == end, f"entry {kind}", f"the {end} bytes that its tensors take", size)
    return tensors
