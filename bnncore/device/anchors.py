"""What a step begins with: the operators that give a pixel's numbers, or bits of many pixels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bnncore.device import sliced
from bnncore.device.arrays import one_copy, words
from bnncore.device.body import Body
from bnncore.device.steps import BITS
from bnncore.packed import borders
from bnncore.packed.program import Node, Tensor

FLOATS = {  # kind of weights -> kernel's ending, type in C
    "float32": ("f32", "float"),
    "int8": ("i8", "int8_t"),
    "float16": ("f16", "uint16_t"),
}
LANES = 32767 // 255  # taps of bytes whose sums 16 bits hold


def _bconv(body: Body, node: Node, value: int) -> None:
    filters, kh, kw, channels = body.program.tensors[node.tensors["weight"]].shape
    g = body.window(node, (kh, kw), node.inputs[0])
    if sliced.wins((filters, kh, kw, channels), int(node.attrs["pad"]), body.map(value)):
        _sliced(body, node, value, g)
        return
    n = -(-kh * kw * channels // 32)
    array = body.code.array(
        node.tensors["weight"], "rows", "uint32_t",
        lambda t, m: words(one_copy(t, m).reshape(filters, -1)),
    )  # fmt: skip
    row, mask = body.room("row", "bnn_u32", n), body.room("mask", "bnn_u32", n)
    body.say("bconv", g, f"V{node.inputs[0]}", *body.where, array, filters, n, row, mask,
             body.numbers(value, "i32"))  # fmt: skip


def _sliced(body: Body, node: Node, value: int, g: str) -> None:
    """32 pixels at a time; where all that follows is to bits, these are made at once."""
    weight = body.program.tensors[node.tensors["weight"]]
    filters, kh, kw, channels = weight.shape
    products = kh * kw * channels
    n, planes = sliced.padded(products), sliced.planes(products)
    _, width, _ = body.map(value)
    pixels = body.size[0] * body.size[1]
    array = body.code.array(
        node.tensors["weight"], "triples", "uint32_t",
        lambda t, m: sliced.triples(one_copy(t, m).reshape(filters, -1)),
    )  # fmt: skip
    room = body.room("room", "bnn_u32", 32)
    inputs = body.room("planes", "bnn_u32", 2 * n)
    table = body.room("table", "bnn_u32", 16 * n // 3)
    source = node.inputs[0]
    stride, pad = int(node.attrs["stride"]), int(node.attrs["pad"])
    if (stride, kh, kw) == (1, 2 * pad + 1, 2 * pad + 1):
        body.sliced = True
        flat = body.room("flat", "bnn_u32", -(-pixels // 32) * channels)
        slice_ = body.code.call("slice", f"V{source}", pixels, channels, room, flat)
        body.head.append(slice_)
        taps = body.code.call("planes_flat", g, flat, "q", n, inputs)
    else:
        taps = body.code.call("planes", g, f"V{source}", width, pixels, "q", n, inputs, room)
    body.group += [taps, body.code.call("triples", inputs, n, table)]
    limits = _limits(body, value, products)
    if limits is None:
        wide = planes > 8
        counts = body.room("counts", "bnn_u32", 16 if wide else 8)
        body.column.append(body.code.call(
            "bconv_counts", table, f"{array} + c * {n // 24}", n // 24, 16 if wide else 8,
            counts))  # fmt: skip
        body.row.append(f"const uint32_t low = {counts}[r];")
        count = "(low >> b & 255u)"
        if wide:
            body.row.append(f"const uint32_t high = {counts}[8 + r];")
            count = f"({count} | (high >> b & 255u) << 8)"
        body.take_column(f"{products} - 2 * (int32_t){count}", value, (count, products))
    else:
        body.done = True
        bits = body.step.last
        body.group.append(body.code.call(
            "bconv_bits", table, array, filters, n // 24, planes, limits, room,
            f"{pixels} - q", body.pixel(bits, "q")))  # fmt: skip


def _limits(body: Body, value: int, products: int) -> str | None:
    """The array of limits, if the step goes from sums to bits by integers alone."""
    links = body.step.links
    if len(links) != 1 or links[0][1].op not in BITS or value in body.step.stored:
        return None
    node = links[0][1]
    tensors = {slot: body.program.tensors[name] for slot, name in node.tensors.items()}
    if any(tensor.data.dtype.kind == "f" for tensor in tensors.values()):
        return None
    return body.code.group(
        list(node.tensors.values()), f"limits {products} {node.op} {body.channels(value)}",
        "int16_t",
        lambda copies: sliced.limits(
            dict(zip(tensors, copies, strict=True)), products, body.channels(value)
        ),
    )  # fmt: skip


def _conv(body: Body, node: Node, value: int) -> None:
    tensor = body.program.tensors[node.tensors["weight"]]
    filters, kh, kw, channels = tensor.shape
    image = body.step.image
    source = 0 if image is not None else node.inputs[0]
    plain = kh * kw == 1 and node.attrs["stride"] == 1 and not node.attrs["pad"]
    kind = body.kind(source) if source else "f32" if image is not None else "i16"
    if source and plain:
        inputs = body.pixel(source)
    else:
        g = body.window(node, (kh, kw), source)
        if _lanes(body, node, tensor):
            _bytes_by_bits(body, node, value, g)
            return
        inputs = body.room("window", f"bnn_{kind}", kh * kw * channels)
        if image is not None:
            norm = [body.floats(image, slot) for slot in ("scale", "shift")]
            body.say("window_image", g, "image", *body.where, *norm, inputs)
        elif source:
            body.say(f"window_{kind}", g, f"V{source}", *body.where, inputs)
        else:
            zero = body.whole(node.tensors["zero"])
            body.say("window_bytes", g, "image", *body.where, zero, inputs)
    kernel, array = _weights(body, node, tensor)
    to = body.numbers(value, "f32" if kind == "f32" else "i32")
    body.say(f"{kernel}_{kind}", to, inputs, array, kh * kw * channels, filters)
    _finish_sums(body, node, value)


def _lanes(body: Body, node: Node, weight: Tensor) -> bool:
    """Whether sums of the image's bytes by bits fit two into a word."""
    if node.inputs[0] or weight.kind != "binary":
        return False
    zero = body.program.tensors[node.tensors["zero"]].data
    return int(np.prod(weight.shape[1:])) <= LANES and zero.min() >= 0 and zero.max() <= 255


def _bytes_by_bits(body: Body, node: Node, value: int, g: str) -> None:
    name = node.tensors["weight"]
    filters, *window = body.program.tensors[name].shape
    taps = int(np.prod(window))
    array = body.code.array(
        name, "picks", "uint8_t", lambda t, m: sliced.picks(one_copy(t, m).reshape(filters, -1))
    )
    triples = -(-taps // 3)
    sizes = {
        "lanes": ("u32", 3 * triples),
        "table": ("u32", 8 * triples),
        "sums": ("i16", 32 * filters),
    }
    rooms = [body.room(room, f"bnn_{kind}", count) for room, (kind, count) in sizes.items()]
    zero, (h, w) = body.whole(node.tensors["zero"]), body.size
    call = body.code.call("bytes_bits", g, "image", zero, w, h * w, "q", array, filters, *rooms)
    body.group.append(call)
    body.take_column("sums[32 * c + b + r]", value)


def _weights(body: Body, node: Node, tensor: Tensor) -> tuple[str, str]:
    """(kernel, array): weights by taps, inputs, filters."""
    name = node.tensors["weight"]

    def by_taps(t: Tensor, m: int) -> np.ndarray:
        return np.ascontiguousarray(one_copy(t, m).transpose(1, 2, 3, 0))

    if tensor.kind == "binary":
        array = body.code.array(name, "taps", "uint32_t", lambda t, m: words(by_taps(t, m)))
        return "products_bits", array
    short, kind = FLOATS[tensor.kind]
    make = by_taps if short != "f16" else lambda t, m: by_taps(t, m).view("<u2")
    return f"products_{short}", body.code.array(name, "taps", kind, make)


def _finish_sums(body: Body, node: Node, value: int) -> None:
    """Scale and bias of float weights, a channel at a time."""
    before = len(body.each)
    if "weight_scale" in node.tensors:
        body.each.append(f"v *= {body.floats(node, 'weight_scale')}[c];")
    if "bias" in node.tensors:
        body.each.append(f"v += {body.floats(node, 'bias')}[c];")
    if len(body.each) > before:
        body.store(value)


def _dense(body: Body, node: Node, value: int) -> None:
    tensor = body.program.tensors[node.tensors["weight"]]
    outputs, features = tensor.shape
    short, kind = FLOATS[tensor.kind]
    view = "<u2" if short == "f16" else tensor.data.dtype
    array = body.code.array(
        node.tensors["weight"], "", kind, lambda t, m: one_copy(t, m).view(view)
    )
    kind_of = body.kind(node.inputs[0])
    to = body.numbers(value, "f32" if kind_of == "f32" else "i32")
    body.say(f"dense_{short}_{kind_of}", to, f"V{node.inputs[0]}", array, features, outputs)
    _finish_sums(body, node, value)


def _normalize(body: Body, node: Node, value: int) -> None:
    n = body.channels(value)
    body.take(f"(float)image[{f'p * {n} + c' if body.loops else 'c'}]", "f32")
    scale, shift = (body.floats(node, slot) for slot in ("scale", "shift"))
    body.change("affine", f"{scale}[c]", f"{shift}[c]")
    body.store(value)


def _pool(body: Body, node: Node, value: int, *extra: object) -> None:
    source = node.inputs[0]
    kernel = int(node.attrs["kernel"])
    g = body.window(node, (kernel, kernel), source)
    to = body.numbers(value, {"avgpool": "f32", "sumpool": "i32"}.get(node.op, body.kind(source)))
    body.say(f"{node.op}_{body.kind(source)}", g, f"V{source}", *body.where, *extra, to)


def _maxpool(body: Body, node: Node, value: int) -> None:
    source = node.inputs[0]
    if body.kind(source) != "bits":
        _pool(body, node, value)
        return
    kernel = int(node.attrs["kernel"])
    g, width = body.window(node, (kernel, kernel), source), body.width(value)
    turn = "0"
    if "direction" in node.tensors:
        turn = body.code.array(
            node.tensors["direction"], "falling", "uint32_t",
            lambda t, m: words(~one_copy(t, m)),
        )  # fmt: skip
    body.say("maxpool_bits", g, f"V{source}", *body.where, turn, width, body.pixel(value))


def _avgpool(body: Body, node: Node, value: int) -> None:
    _pool(body, node, value, int(node.attrs["include_pad"]))


def _sumpool(body: Body, node: Node, value: int) -> None:
    source = node.inputs[0]
    kernel, stride, pad, include = (
        int(node.attrs[name]) for name in ("kernel", "stride", "pad", "include_pad")
    )
    maps = body.map(source)[:2], body.map(value)[:2]
    multiple = borders.multiple(*maps, (kernel, kernel), stride, pad, pad * include)
    _pool(body, node, value, include, multiple)


def _global(body: Body, node: Node, value: int) -> None:
    source = node.inputs[0]
    h, w, c = body.map(source)
    to = body.numbers(value, "f32" if node.op == "global_avg" else "i32")
    body.say(f"{node.op}_{body.kind(source)}", f"V{source}", h * w, c, to)


def _flatten(body: Body, node: Node, value: int) -> None:
    source = node.inputs[0]
    h, w, c = body.map(source)
    kind = body.kind(source)
    body.say(f"flatten_{kind}", body.numbers(value, kind), f"V{source}", h * w, c)


def _concat(body: Body, node: Node, value: int) -> None:
    kind = body.kind(value)
    if kind == "bits":
        to = body.pixel(value)
        body.lines.append(f"memset({to}, 0, {4 * body.width(value)});")
    else:
        to = body.numbers(value, kind)
    at = 0
    for source in node.inputs:
        n = body.channels(source)
        if kind == "bits":
            body.say("concat_bits", to, at, body.pixel(source), n)
        elif body.kind(source) == kind:
            body.lines.append(f"memcpy({to} + {at}, {body.pixel(source)}, {n} * sizeof *({to}));")
        else:
            value_of = f"(bnn_{kind}){body.element(source)}"
            body.lines += [f"for (c = 0; c < {n}; c++)", f"    ({to})[{at} + c] = {value_of};"]
        at += n


ANCHORS: dict[str, Callable[[Body, Node, int], None]] = {
    "bconv": _bconv,
    "conv": _conv,
    "dense": _dense,
    "normalize": _normalize,
    "maxpool": _maxpool,
    "avgpool": _avgpool,
    "sumpool": _sumpool,
    "global_avg": _global,
    "global_sum": _global,
    "flatten": _flatten,
    "concat": _concat,
}
