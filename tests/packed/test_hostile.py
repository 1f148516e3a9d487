"""Hostile packed files: each loads equal or raises one PackedFormatError, fast, in little memory.

Half of them are structure-aware: the graph or the tensors are damaged inside a file whose header,
offsets and checksum are right. The suite runs a few hundred, ``make soak`` 100,000.
"""

import copy
import hashlib
import json
import random
import struct
import time
import tracemalloc
import unicodedata
import zlib
from dataclasses import replace

import numpy as np
import pytest

from bnncore.packed import costs, execute, packfile, plan, rules
from bnncore.packed.program import PackedFormatError
from bnncore.packed.rules import MAX_NODES
from tests.graphs import random_images, random_program
from tests.packed.test_packfile import same

ODD = (
    *(0, 1, -1, 2, 3, 7, 8, 255, 256, 1023, 1024, 1025, 2**16, 2**24, 2**24 + 1, 2**31, 2**32),
    *(2**53, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e38, 1e39, 1e308, 1e-300),
    *(
        "",
        "x",
        "binary",
        "int8",
        "float32",
        "float16",
        "sign",
        "bconv",
        "conv",
        "dense",
        "\x1b[31m",
    ),
    *("\ud800", "9" * 600, "nan", "__class__", "weight", "../../etc/passwd"),
    *(None, True, False, [], {}, [[]], [1], [0, 0], [-1], {"weight": 0}, [1] * 70),
)
DTYPES = ("F32", "I32", "F16", "I16", "I8", "U8")


def take_apart(content):
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    parts = {
        kind: data[slice(*header[kind]["data_offsets"])]
        for kind in packfile._DTYPES
        if kind in header
    }
    return json.loads(zlib.decompress(parts.pop("graph"))), parts


def put_together(graph, parts, change_header=None):
    """A file whose header and checksum fit whatever is in it."""
    text = graph if isinstance(graph, bytes) else json.dumps(graph).encode("utf-8", "replace")
    parts = {**parts, "graph": zlib.compress(text, 1)}
    data = b"".join(parts.values())
    header = packfile._header(parts, data, packfile.VERSIONS[-1])
    if change_header:
        change_header(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def places(tree):
    """Every (container, key) of a JSON tree."""
    stack = [tree]
    while stack:
        node = stack.pop()
        for key in node.keys() if isinstance(node, dict) else range(len(node)):
            yield node, key
            if isinstance(node[key], dict | list):
                stack.append(node[key])


def damage_graph(rng, graph):
    """One to three changes anywhere in the graph."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        spots = list(places(graph))
        container, key = rng.choice(spots)
        action = rng.randrange(6)
        if action == 0:
            container[key] = copy.deepcopy(rng.choice(ODD))
        elif action == 1 and isinstance(container[key], int):
            container[key] += rng.choice((-2, -1, 1, 2, 7, 8, 64))
        elif action == 2:
            other, name = rng.choice(spots)
            container[key] = copy.deepcopy(other[name])
        elif action == 3:
            del container[key]
        elif action == 4 and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif isinstance(container, dict):
            container[rng.choice(("x", "weight", "bias", "stride", ""))] = rng.choice(ODD)


def damage_tensors(rng, parts):
    kind = rng.choice(list(parts))
    part = bytearray(parts[kind])
    action = rng.randrange(4)
    if action == 0 and kind.startswith("float"):
        bad = rng.choice((np.nan, np.inf, -np.inf))
        width = 4 if kind == "float32" else 2
        place = rng.randrange(len(part) // width) * width
        part[place : place + width] = np.array(bad, f"<f{width}").tobytes()
    elif action == 1:
        part = part[: rng.randrange(len(part))]
    elif action == 2:
        part += bytes(rng.randrange(1, 9))
    else:
        part[rng.randrange(len(part))] ^= 1 << rng.randrange(8)
    parts[kind] = bytes(part)


def damage_header(rng):
    def change(header):
        container, key = rng.choice(list(places(header)))
        if rng.random() < 0.5:
            container[key] = copy.deepcopy(rng.choice(ODD + DTYPES))
        elif isinstance(container[key], int):
            container[key] += rng.choice((-1, 1, 8, 2**40, -(2**40)))
        elif rng.random() < 0.5:
            del container[key]
        else:
            container["extra"] = rng.choice(ODD)

    return change


def damage_bytes(rng, content):
    """Flips, cuts, insertions and repeats, more of them in the header than elsewhere."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        if not damaged:
            break
        end = len(damaged) if rng.random() < 0.5 else min(len(damaged), 600)
        place = rng.randrange(end)
        action = rng.randrange(6)
        if action == 0:
            damaged[place] ^= 1 << rng.randrange(8)
        elif action == 1:
            damaged[place] = rng.randrange(256)
        elif action == 2:
            del damaged[place : place + rng.choice((1, 8, 1000))]
        elif action == 3:
            damaged[place:place] = rng.randbytes(rng.choice((1, 8, 100)))
        elif action == 4:
            damaged[place : place + 8] = struct.pack("<Q", rng.choice((0, 2**32, 2**63, 4096)))
        else:
            damaged += damaged[place : place + 100]
    return bytes(damaged)


def attempt(content, trace=True):
    """Load within the limits; the Program, or None where it was refused properly."""
    program, message = None, ""
    if trace:
        tracemalloc.start()
    # CPU time of this thread, which a busy machine does not stretch; tracing would.
    start = 0.0 if trace else time.thread_time()
    try:
        program = packfile.decode(content)
    except PackedFormatError as error:
        message = str(error)
    if not trace:
        assert time.thread_time() - start < 10
    else:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100e6
    assert program is not None or 0 < len(message) < 1000
    return program


def storm(count, seed):
    """Run `count` hostile files; how many of each sort were refused and loaded."""
    rng = random.Random(seed)
    results = {"bytes": [0, 0], "graph": [0, 0], "tensors": [0, 0], "header": [0, 0]}
    for number in range(count):
        if number % 50 == 0:
            original = random_program(rng.randrange(2**32))
            content = packfile.encode(original)
            graph, parts = take_apart(content)
        sort = ("bytes", "graph", "bytes", "graph", "bytes", "tensors", "bytes", "header")[
            number % 8
        ]
        changed, held = copy.deepcopy(graph), dict(parts)
        if sort == "bytes":
            hostile = damage_bytes(rng, content)
        elif sort == "graph":
            damage_graph(rng, changed)
            hostile = put_together(changed, held)
        elif sort == "tensors":
            damage_tensors(rng, held)
            hostile = put_together(changed, held)
        else:
            hostile = put_together(changed, held, damage_header(rng))
        program = attempt(hostile, trace=number % 3 == 0)
        results[sort][program is not None] += 1
        if program is None:
            continue
        if sort in ("bytes", "header"):
            assert same(program, original), "a damaged file that loads has to load equal"
        else:  # another valid file: what it says is what is read, and it runs
            again = packfile.decode(packfile.encode(program))
            assert same(program, again)
            if sum(costs.cost(program)) < 10**6 and costs.peak_memory(program)[1] < 10**6:
                images = random_images(program, 2)
                for ops in ("numpy", "compiled"):  # within bounds, whatever the weights became
                    scores = execute.Model(program, ops)(images)
                    assert scores.shape == (2, len(program.classes))
    return results


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflow in the arithmetic of damaged nets
def test_hostile_files():
    results = storm(200, seed=0)
    assert all(refused for refused, _ in results.values()), "no damage was noticed"
    assert results["tensors"][1], "flipped weights are another valid file"


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_hostile_files_soak():
    print(storm(100_000, seed=1))


def small():
    return take_apart(packfile.encode(random_program(3, sort="floats")))


def deep():
    return b"[" * 900_000, {}


def bomb():
    return b" " * 500_000_000, {}


def many_tensors():
    graph, parts = small()
    graph["tensors"] += [["t", "int8", "bias", [1], 0]] * 30_000
    return graph, parts


def many_names():
    graph, parts = small()
    graph["tensors"] += [[f"u{n}", "int8", "bias", [1], 0] for n in range(8000)]
    parts["int8"] = parts.get("int8", b"") + bytes(8000)
    ordered = {kind: parts[kind] for kind in packfile._DTYPES if kind in parts}
    return graph, ordered


def many_nodes():
    graph, parts = small()
    graph["nodes"] += [["relu", "", [1], {}, {}]] * (MAX_NODES - len(graph["nodes"]))
    return graph, parts


def many_inputs():
    graph, parts = small()
    node = ["concat", "", [1] * 64, {}, {}]
    graph["nodes"][1:1] = [["add", "", [1, 1], {}, {}]] + [node] * 4000
    return graph, parts


def many_adds():
    graph, parts = small()
    graph["nodes"][1:1] = [["add", "", [1, n % 60 + 1], {}, {}] for n in range(60, 4000)]
    return graph, parts


def huge_image():
    graph, parts = small()
    graph["image"] = [2**31, 2**31, 2**31]
    return graph, parts


def pooled(image, *pools):
    """Poolings (kernel, stride, pad) of a huge image's bytes, times 0."""
    graph, _ = small()
    tensors = [["s", "int16", "scale", [1], 0], ["h", "int32", "shift", [1], 0]]
    zero = {"right": 0, "low": 0, "high": 0}
    sizes = [dict(zip(("kernel", "stride", "pad"), pool, strict=True)) for pool in pools]
    nodes = [
        ["rescale", "", [1], {"scale": 0, "shift": 1}, zero],
        *(["sumpool", "", [1], {}, {**size, "ceil": 0, "include_pad": 1}] for size in sizes),
        ["global_sum", "", [1], {}, {}],
        ["fixed", "", [1], {}, {"fraction": 4}],
    ]
    graph |= {"image": image, "classes": ["a"], "tensors": tensors, "nodes": nodes}
    return graph, {"int32": bytes(4), "int16": bytes(2)}


def huge_area():
    return pooled([2**20, 2**20, 1])


def huge_values():
    return pooled([2**12, 2**12, 1], *[(1, 1, 0)] * 4000)


def long_pools():
    return pooled([2**20, 1, 1], *[(255, 1, 127)] * 200)


def huge_shape():
    graph, parts = small()
    graph["tensors"][0][3] = [2**31] * 4
    return graph, parts


def huge_members():
    graph, parts = small()
    graph["members"] = 10**4000
    return graph, parts


def cycle():
    graph, parts = small()
    graph["nodes"][0][2] = [-1]
    return graph, parts


def infinite_number():
    graph, parts = small()
    return json.dumps(graph).replace("12.5", "1e999").encode(), parts


def twice_a_key():
    graph, parts = small()
    return json.dumps(graph).replace('"members"', '"image": 1, "members"').encode(), parts


def lone_surrogate():
    graph, parts = small()
    graph["info"]["name"] = "\ud800"
    return graph, parts


REFUSED = (
    *(deep, bomb, many_tensors, many_names, many_inputs, huge_image, huge_shape, huge_members),
    *(cycle, infinite_number, twice_a_key, lone_surrogate, huge_area, huge_values),
)
VALID = (many_nodes, many_adds, long_pools)


@pytest.mark.slow
@pytest.mark.parametrize("make", REFUSED + VALID)
def test_extremes_keep_to_time_and_memory(make):
    content = put_together(*make())
    for trace in (False, True):  # tracing takes time, so time is looked at without
        assert (attempt(content, trace) is not None) == (make in VALID)


@pytest.mark.parametrize("digits", [19, 20, 21, 4299, 4300, 4301, 20_000])
def test_integers_of_any_length(digits):
    """At every place in the graph and the header; Python prints none of more than 4,300 digits."""
    graph, parts = small()
    (length,) = struct.unpack_from("<Q", content := packfile.encode(random_program(3)))
    header = json.loads(content[8 : 8 + length])
    mark, number = "here", "9" * digits
    for tree in (graph, header):
        for container, key in list(places(tree)):
            if type(held := container[key]) is int:
                container[key] = mark
                text = json.dumps(tree).replace(f'"{mark}"', number).encode()
                container[key] = held
                if tree is graph:
                    damaged = put_together(text, parts)
                elif len(text) <= packfile.MAX_HEADER:
                    damaged = struct.pack("<Q", len(text)) + text + content[8 + length :]
                assert attempt(damaged, trace=False) is None


def characters():
    """One of each category that a name may not hold, and some of what they do to a terminal."""
    every = {unicodedata.category(chr(k)): chr(k) for k in range(0x10FFFF, 0, -1)}
    return [every[category] for category in rules.UNSEEN if category != "Zs"] + list(
        "\x00\n\r\t\x1b\x7f\x9b\xa0\u200b\u200f\u202e\u2066\u2028\u3000\ufeff\ue000"
    )


@pytest.mark.parametrize("character", sorted(set(characters())), ids=ascii)
def test_no_file_speaks_to_the_terminal(character):
    """Each string of a file, as a value and as a key: refused, and in words that can be printed."""
    graph, parts = small()
    graph["info"]["name"] = "bidi"
    for container, key in list(places(graph)):
        if isinstance(container[key], str):
            held, container[key] = container[key], f"a{character}b"
            refused(put_together(graph, parts), character)
            container[key] = held
        if isinstance(container, dict):
            container[f"a{character}b"] = container.pop(key)
            refused(put_together(graph, parts), character)
            container[key] = container.pop(f"a{character}b")


def refused(content, character):
    with pytest.raises(PackedFormatError) as error:
        packfile.decode(content)
    assert character not in str(error.value)
    assert str(error.value).isprintable()


def test_names_of_the_world_are_welcome():
    program = random_program(3)
    names = ("Größe 3", "猫", "القط", "ไทย", "नमस्ते", "x́", "🐈", "a\u0301")
    for name in names:
        changed = replace(program, info={name: name})
        assert packfile.decode(packfile.encode(changed)).info == {name: name}


@pytest.mark.parametrize("make", VALID)
def test_what_inspect_asks_stays_fast(make):
    """Nothing that looks at a valid file is quadratic in its nodes, nor finding places."""
    program = packfile.decode(put_together(*make()))
    start = time.thread_time()
    for ask in (rules.validate, costs.operations, costs.cost, costs.peak_memory):
        ask(program)
    plan.place(plan.of_nodes(program))
    assert time.thread_time() - start < 10


def test_every_cut_is_refused():
    content = packfile.encode(random_program(7))
    for length in range(0, len(content), 1 if len(content) < 2000 else 7):
        with pytest.raises(PackedFormatError):
            packfile.decode(content[:length])


def test_checksum_names_itself():
    content = bytearray(packfile.encode(random_program(7)))
    content[-1] ^= 1
    with pytest.raises(PackedFormatError, match="sha256"):
        packfile.decode(bytes(content))
    digest = hashlib.sha256(b"").hexdigest()
    assert len(digest) == 64
