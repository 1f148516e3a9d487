"""A Program as C99: one header, one source, a self-test; read, add to a firmware project, done.

`export` writes ``NAME.h``, ``NAME.c`` and ``NAME_test.c`` into a folder whose last part is NAME.
The source holds the kernels it uses (`bnncore/device/kernels`, one function a file), the model as
`const` arrays, shared tensors once, a function a step (`steps`, `write`), and the votes. It
allocates nothing and keeps no state but one arena, laid out here by `packed.plan`.

Binary sums and thresholds on integers equal the evaluator's; sums of floats agree to rounding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnncore.device.arrays import Code, c_values
from bnncore.device.steps import Step, steps
from bnncore.device.write import Writer
from bnncore.errors import UserError
from bnncore.packed import execute, plan, votes
from bnncore.packed.program import Program, Shape, Tensor
from bnncore.packed.rules import validate

KERNELS = Path(__file__).with_name("kernels")
ALIGN = 4  # bytes, of every value in the arena
HEADERS = ("string.h", "stdint.h", "stddef.h")
TESTED = 4  # images of the self-test


class ExportError(UserError, ValueError):
    """What cannot be exported; says what and where."""


@dataclass(frozen=True)
class Exported:
    """What was generated.

    Attributes:
        name: of the model, a C identifier.
        header, source, test: C code.
        note: how to build it, in Markdown.
        arena: bytes of RAM for values.
        flash: bytes of the model's arrays.
        classes: how many scores.
        image: bytes of an image.
        alive: the largest sum of bytes alive at one time; no arena takes less.
    """

    name: str
    header: str
    source: str
    test: str
    note: str
    arena: int
    flash: int
    classes: int
    image: int
    alive: int

    @property
    def files(self) -> dict[str, str]:
        """Name -> content."""
        texts = {".h": self.header, ".c": self.source, "_test.c": self.test, ".md": self.note}
        return {f"{self.name}{ending}": text for ending, text in texts.items()}


def generate(program: Program, name: str) -> Exported:
    """C code of `program`.

    Raises:
        ExportError: `name` is no C identifier, or something has no kernel.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or f"{name}.h" in HEADERS:
        raise ExportError(
            f"name: expected a C identifier (letters, digits, _) that is no header of C's, "
            f"got {name!r}"
        )
    laid = lay_out(program, name)
    code = laid.code
    parts = [
        f"/* {name}: made by bnncore from a packed file; {name}.h says how to call it. */",
        f'#include "{name}.h"\n',
        (KERNELS / "base.h").read_text(),
        f"static uint32_t arena[{name.upper()}_ARENA / 4];\n",
        *kernels(code.used),
        "/* -- the model: shared tensors once, a member's own by member -- */\n",
        *code.arrays,
        "\n/* -- where values lie in the arena -- */\n",
        *(_place(number, offset, code) for number, offset in laid.places.items()),
        "\n/* -- the steps -- */\n",
        *laid.functions,
        laid.votes,
    ]
    source = "\n".join(parts)
    flash = code.shared + program.members * code.own
    facts = _facts(program, name, laid.arena, flash)
    return Exported(
        name, filled("header", facts), source, _test(program, facts), filled("note", facts),
        laid.arena, flash, len(program.classes), int(np.prod(program.image)), laid.alive,
    )  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A Program as code in parts.

    Attributes:
        code: its arrays, and the kernels that it calls.
        work, writers, functions: the steps, and what each has become.
        votes: the functions of the header.
        places: value -> its bytes' place in the arena; votes have numbers below 0.
        arena, alive: see `Exported`.
    """

    code: Code
    work: list[Step]
    writers: list[Writer]
    functions: list[str]
    votes: str
    places: dict[int, int]
    arena: int
    alive: int


def lay_out(program: Program, name: str, dry: bool = False) -> Layout:
    """What `generate` puts together.

    Args:
        dry: count the bytes of arrays, and write none.
    """
    shapes = validate(program)
    work = steps(program)
    code = Code(program, shapes, _kinds(program, shapes), dry=dry)
    writers = [Writer(code, step, f"{name}_step{k + 1}") for k, step in enumerate(work)]
    functions = [writer.write() for writer in writers]
    doubt = program.combine == "hard_vote"
    places, scratch, arena, alive = _places(code, work, writers, doubt)
    for k, writer in enumerate(writers):
        rooms = "".join(
            f"    {kind} *const {room} = ({kind} *)(arena + {scratch[k, room] // 4});\n"
            for room, (kind, _) in writer.scratch.items()
        )
        functions[k] = functions[k].replace("\n{\n", f"\n{{\n{rooms}", 1)
    asked = _votes(code, name, work, writers, doubt)
    return Layout(code, work, writers, functions, asked, places, arena, alive)


def export(program: Program, folder: Path) -> Exported:
    """Write `generate`'s files into `folder`, whose last part is the model's name."""
    made = generate(program, folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in made.files.items():
        (folder / file).write_text(text, encoding="utf-8")
    return made


def kernels(used: Iterable[str]) -> list[str]:
    """The sources of kernels and of what they need, each once, needed ones first."""
    found: dict[str, str] = {}

    def take(name: str) -> None:
        if name in found:
            return
        text = _text(name)
        first = text.split("\n", 1)[0]
        if first.startswith("/* needs "):
            for other in first.removeprefix("/* needs ").removesuffix(" */").split():
                take(other)
            text = text.split("\n", 1)[1]
        found[name] = text

    for name in sorted(used):
        take(name)
    return list(found.values())


# Kernels of one text for several types: what stands in it for these, by the ends of their names.
CTYPES = {"f32": "float", "f16": "uint16_t", "i8": "int8_t"}  # of weights
READ = {"f16": "bnn_half(", "i8f32": "(float)("}


def _text(name: str) -> str:
    stem, ends = name, list[str]()
    while not (KERNELS / f"{stem}.c").exists():
        stem, end = stem.rsplit("_", 1)
        ends.insert(0, end)
    text = (KERNELS / f"{stem}.c").read_text()
    if not ends:
        return text
    weight, kind = ends[0], ends[-1]
    words = {
        "TYPE": kind, "NUMBER": kind, "WEIGHT": weight,
        "SUM": "float" if kind == "f32" else "int32_t",
        "KEPT": CTYPES.get(weight, ""), "READ(": READ.get(weight, READ.get(weight + kind, "(")),
        "/* needs FIRST */\n": "/* needs half */\n" if weight == "f16" else "",
    }  # fmt: skip
    for word, meant in words.items():
        text = text.replace(word, meant)
    return text


WIDTHS = {"bits": 4, "f32": 4, "i32": 4, "i16": 2, "i8": 1}  # bytes of a number or a word


def _kinds(program: Program, shapes: list[Shape]) -> list[str]:
    """How each value lies in memory; integers in as few bits as hold what can come."""
    kinds: list[str] = []
    for number, shape in enumerate(shapes):
        node = program.nodes[number - 1] if number else None
        low, high = -shape.bound, shape.bound
        if node is not None and node.op == "rescale":
            low, high = int(node.attrs["low"]), int(node.attrs["high"])
        if shape.kind != "i32" or node is None:
            kinds.append(shape.kind)
        elif node.op in ("maxpool", "flatten", "concat"):
            kinds.append(max((kinds[source] for source in node.inputs), key=WIDTHS.__getitem__))
        else:
            bits = max(high, -low - 1).bit_length() + 1
            kinds.append("i8" if bits <= 8 else "i16" if bits <= 16 else "i32")
    return kinds


def _bytes(code: Code, number: int) -> int:
    *positions, channels = code.shapes[number].dims
    kind = code.kinds[number]
    width = -(-channels // 32) if kind == "bits" else channels
    return WIDTHS[kind] * int(np.prod(positions)) * width


VOTES = {-1: "SUMS", -2: "SCORES", -3: "DOUBT"}  # room of the votes


def _places(
    code: Code, work: list[Step], writers: list[Writer], doubt: bool
) -> tuple[dict[int, int], dict[tuple[int, str], int], int, int]:
    """Offsets of values and votes, and of what steps need for themselves; the arena's bytes."""
    program = code.program
    timed = [plan.Step(step.inputs, step.outputs, step.own) for step in work]
    lives = {
        life.value: life
        for life in plan.lifetimes(timed, len(program.nodes), lambda n: _bytes(code, n) if n else 0)
    }
    twins = _in_place(code, work, lives)
    size, end = 4 * len(program.classes), len(work) - 1
    alive = [plan.Lifetime(n, 0, 2 * end + 1, size)
             for n in VOTES if doubt or VOTES[n] != "DOUBT"]  # fmt: skip
    # A step is two points of time: one that reads its map of bits whole into words of 32 pixels has
    # done so before it writes.
    early = [writer.sliced for writer in writers]
    for number, life in lives.items():
        if number in twins or not number:
            continue
        first, last = 2 * life.first + early[life.first], 2 * life.last + 1
        reader = work[life.last]  # the last for good, if what it reads is made anew for each member
        if code.kinds[number] == "bits" and code.shapes[number].own == reader.own:
            last -= early[life.last] and number in reader.inputs
        alive.append(plan.Lifetime(number, first, last, life.bytes))
    own: dict[tuple[int, str], int] = {}
    for time, writer in enumerate(writers):
        for room, (kind, count) in writer.scratch.items():
            own[time, room] = min(VOTES) - 1 - len(own)
            size = WIDTHS.get(kind.removeprefix("bnn_"), 4) * count
            alive.append(plan.Lifetime(own[time, room], 2 * time, 2 * time + 1, size))
    offsets, total = plan.place(alive, ALIGN)
    for number in sorted(twins, reverse=True):
        offsets[number] = offsets[twins[number]]
    scratch = {key: offsets[number] for key, number in own.items()}
    values = {n: at for n, at in sorted(offsets.items()) if n >= min(VOTES)}
    return values, scratch, total, plan.peak(alive, ALIGN)


def _in_place(code: Code, work: list[Step], lives: dict[int, plan.Lifetime]) -> dict[int, int]:
    """Values that lie where a later one does: the last to read them, number by number, writes it.

    The lives of those later ones begin with theirs.
    """
    found: dict[int, int] = {}
    for time, step in enumerate(work):
        taken: set[int] = set()
        for at, (value, node) in enumerate(step.links):
            source = node.inputs[-1]
            if at == 0 and step.anchor is None and len(node.inputs) == 1:
                source = step.start
            elif len(node.inputs) < 2 or source in step.made:
                continue
            rest = step.links[at + 1 :]
            if any(source in later.inputs for _, later in rest):
                continue  # another number of this pixel would lie where it is read again
            after = [value, *(number for number, _ in rest)]
            stored = [number for number in after if number in step.stored and number not in taken]
            whole = (step.anchor is None or source not in step.anchor.inputs) and source > 0
            if not stored or not whole or lives[source].last != time or source in found:
                continue
            twin = stored[0]
            a, b = code.shapes[source], code.shapes[twin]
            same = code.kinds[source] == code.kinds[twin] and a.dims == b.dims and a.own == b.own
            if same:
                taken.add(twin)
                found[source] = twin
                lives[twin] = lives[twin]._replace(first=lives[source].first)
    return found


def _place(number: int, offset: int, code: Code) -> str:
    if number < 0:
        return f"#define {VOTES[number]} ((bnn_f32 *)(arena + {offset // 4}))"
    kind = code.kinds[number]
    word = "u32" if kind == "bits" else kind
    size = "x".join(map(str, code.shapes[number].dims))
    return f"#define V{number} ((bnn_{word} *)(arena + {offset // 4})) /* {size} {kind} */"


def _votes(code: Code, name: str, work: list[Step], writers: list[Writer], doubt: bool) -> str:
    """The functions of the header."""
    program = code.program
    n, last = len(program.classes), len(program.nodes)
    weight, bias, divisor = "1.0f", "0", "1.0f"
    if "bias" in program.combine_tensors:
        bias = code.array(program.combine_tensors["bias"], "", "float", _plain_float)
    if "weight" in program.combine_tensors:
        weights = code.array(program.combine_tensors["weight"], "", "float", _plain_float)
        weight = f"{weights}[m]"
    if program.combine == "mean" or (program.combine == "soft_vote" and weight == "1.0f"):
        divisor = "(float)(m + 1)"
    elif program.combine == "soft_vote":
        totals = np.cumsum(program.tensors[program.combine_tensors["weight"]].data, dtype="<f8")
        divisor = f"{code.table('voted', 'float', totals.astype('<f4'))}[m]"
    output = program.nodes[-1]

    def softmax(to: str, weight: str) -> str:
        if output.op != "fixed":
            return code.call("softmax", to, f"V{last}", weight, n)
        powers = code.table("powers", "uint16_t", votes.TABLE.astype("<u2"))
        return code.call("softmax_table", to, f"V{last}", weight, output.attrs["fraction"],
                         powers, n)  # fmt: skip

    if program.combine in ("mean", "sum"):
        count = [code.call("vote", "SUMS", f"V{last}", weight, n)]
    elif program.combine == "soft_vote":
        count = [softmax("SUMS", weight)]
    else:
        code.used.add("best")
        count = [f"SUMS[bnn_best(V{last}, {n})] += {weight};", softmax("DOUBT", "1.0f")]
    code.used |= {"winner", "margin", "score"}
    calls = {own: [f"{w.label}({w.arguments});" for w, step in zip(writers, work, strict=True)
                   if step.own == own] for own in (False, True)}  # fmt: skip
    clear = [f"memset({room}, 0, {4 * n});" for room in (["SUMS", "DOUBT"] if doubt else ["SUMS"])]
    each = [*calls[True], *count]

    def block(lines: list[str], *names: str) -> str:
        unused = [f"(void){word};" for word in names
                  if not any(re.search(rf"\b{word}\b", line) for line in lines)]  # fmt: skip
        return "\n".join(f"    {line}" for line in [*lines, *unused])

    values = {
        "NAME": name,
        "UPPER": name.upper(),
        "CLASSES": str(n),
        "DOUBT": "DOUBT" if doubt else "0",
        "BEGIN": block([*clear, *calls[False]], "image"),
        "NEXT": block(each, "image", "m"),
        "SCORE": block([code.call("score", "SCORES", "SUMS", divisor, bias, n)], "m"),
    }
    return filled("votes", values)


def _plain_float(tensor: Tensor, m: int) -> np.ndarray:
    return tensor.data.astype("<f4")


def filled(template: str, values: Mapping[str, object]) -> str:
    """A template's text with a value for each ``@NAME@``."""
    text = (KERNELS / f"{template}.template").read_text()
    return re.sub(r"@(\w+)@", lambda match: str(values[match.group(1)]), text)


def _facts(program: Program, name: str, arena: int, flash: int) -> dict[str, object]:
    h, w, c = program.image
    classes = ", ".join(f'"{_c_string(label)}"' for label in program.classes)
    return {
        "NAME": name, "UPPER": name.upper(), "HEIGHT": h, "WIDTH": w, "CHANNELS": c,
        "CLASSES": len(program.classes), "MEMBERS": program.members, "ARENA": arena,
        "FLASH": flash, "LABELS": classes, "COMBINE": program.combine,
    }  # fmt: skip


def _c_string(text: str) -> str:
    return "".join(
        char if (char.isalnum() and char.isascii()) or char in " _-.,()" else
        "".join(f"\\{byte:03o}" for byte in char.encode())
        for char in text
    )  # fmt: skip


def self_images(program: Program, count: int) -> np.ndarray:
    """The images of the self-test, (count, H, W, C) uint8: the high bytes of a congruential
    generator, as the C code makes them."""
    size = int(np.prod(program.image)) * count
    state, values = 1, np.empty(size, np.uint8)
    for k in range(size):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        values[k] = state >> 24
    return values.reshape(count, *program.image)


def _test(program: Program, facts: Mapping[str, object]) -> str:
    model = execute.Model(program, "numpy")
    images = self_images(program, TESTED)
    scores = model(images)
    labels = model.predict(images)
    scored, labelled = c_values(scores.astype("<f4"), "float"), c_values(labels, "int")
    values = {**facts, "COUNT": TESTED, "SCORES": scored, "LABELS": labelled}
    return filled("test", values)
