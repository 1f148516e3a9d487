"""What becomes of a channel's number: norms, activations, additions, bits."""

from __future__ import annotations

import numpy as np

from bnncore.device.arrays import c_float, one_copy, words
from bnncore.device.body import Body
from bnncore.device.steps import BITS
from bnncore.packed.program import Node

SUM = 1 << 30  # larger than any sum


def link(body: Body, before: int, value: int, node: Node) -> None:
    """Go on from the number of value `before`."""
    if node.op in BITS:
        _to_bits(body, value, node)
        return
    if node.op == "rescale":
        _rescale(body, value, node)
        return
    body.to_float()
    if node.op == "fixed":
        body.each.append(f"v *= {c_float(2.0 ** -node.attrs['fraction'])};")
    elif node.op == "affine":
        scale, shift = (
            f"{body.floats(node, slot)}[c]" if slot in node.tensors else ""
            for slot in ("scale", "shift")
        )
        if scale and shift:
            body.change("affine", scale, shift)
        elif scale or shift:
            body.each.append(f"v *= {scale};" if scale else f"v += {shift};")
    elif node.op == "prelu":
        one = body.program.tensors[node.tensors["slope"]].shape[0] == 1
        body.change("prelu", f"{body.floats(node, 'slope')}[{'0' if one else 'c'}]")
    elif node.op == "relu":
        body.change("relu")
    elif node.op == "clip":
        body.change("clip", *(c_float(node.attrs[key]) for key in ("low", "high")))
    else:
        others = [source for source in node.inputs if source != before]
        other = others[0] if others else before
        cast = "(float)" if body.shapes[other].kind == "i32" else ""
        body.each.append(f"v += {cast}{body.element(other)};")
    body.store(value)


def _rescale(body: Body, value: int, node: Node) -> None:
    """In 32 bits, to which `rules` hold it."""
    names = node.tensors
    scale = body.whole(names["scale"])
    right, low, high = (int(node.attrs[key]) for key in ("right", "low", "high"))
    # Of numbers below 0 all compilers shift the sign in.
    if body.count is not None and "slope" not in names:
        count, products = body.count
        start = body.code.group(
            [names["scale"], names["shift"]], f"from {products}", "int32_t",
            lambda copies: copies[0] * np.int32(products) + copies[1],
        )  # fmt: skip
        # A product less an element than of the scale times the sum itself.
        body.column += [
            f"const uint32_t factor = 2u * (uint32_t){scale}[c];",
            f"const uint32_t from = (uint32_t){start}[c];",
        ]
        body.each[-1] = f"int32_t u = (int32_t)(from - {count} * factor) >> {right};"
    else:
        factor = f"{scale}[c]"
        if "slope" in names:
            factor = f"(u >= 0 ? {factor} : {body.whole(names['slope'])}[c])"
        body.each.append(f"u = (u * {factor} + {body.whole(names['shift'])}[c]) >> {right};")
    body.count = None
    if len(node.inputs) == 2:
        body.each.append(f"u += {body.element(node.inputs[1])};")
    body.each += [f"u = u > {high} ? {high} : u;", f"u = u < {low} ? {low} : u;"]
    body.store(value)


def _to_bits(body: Body, value: int, node: Node) -> None:
    """A bit a channel; where the comparison is the other way round, the word is negated."""
    turn = "direction" if node.op == "threshold" else "inside"
    flip = ""
    if turn in node.tensors:
        flip = body.code.array(
            node.tensors[turn], "flip", "uint32_t", lambda t, m: words(~one_copy(t, m))
        )
    if node.op == "sign":
        levels = ["0", ""]
    elif node.op == "threshold":
        levels = [_level(body, node, "threshold", "direction"), ""]
    else:
        levels = [_level(body, node, slot) for slot in ("low", "high")]
    low, high = levels
    x = body.number
    if not body.columns:
        test = f"{low} <= {x} && {x} <= {high}" if high else f"{x} >= {low}"
        body.each.append(f"word |= (uint32_t)({test}) << (c & 31);")
    elif x == "u":  # the sign of a difference
        sign = f"~(uint32_t)((u - {low}) | ({high} - u))" if high else f"(uint32_t)({low} - 1 - u)"
        body.each.append(f"word |= {sign} >> 31 << b;")
    else:
        test = f"{low} <= v && v <= {high}" if high else f"v >= {low}"
        body.each.append(f"word |= (uint32_t)({test}) << b;")
    body.word = body.pixel(value, "q" if body.columns else "p"), flip


def _level(body: Body, node: Node, slot: str, direction: str = "") -> str:
    """A level to compare with; those of direction 0, ``x <= level``, become the next larger
    number, for ``not x >= it``."""
    names = [node.tensors[name] for name in (slot, direction) if name in node.tensors]
    tensors = [body.program.tensors[name] for name in names]
    real = tensors[0].data.dtype.kind == "f"
    if real:
        body.to_float()
        if len(names) == 1:
            return f"{body.floats(node, slot)}[c]"
    least, most = tensors[0].data.min(initial=0), tensors[0].data.max(initial=0)
    wide = not real and (least < -(1 << 15) or most >= (1 << 15) - 1)
    kind = "float" if real else "int32_t" if wide else "int16_t"

    def make(copies: list[np.ndarray]) -> np.ndarray:
        turned = copies[1] == 0 if len(copies) == 2 else np.zeros(len(copies[0]), bool)
        if real:
            level = copies[0].astype("<f4")
            # Above the largest float nothing comes that is a number.
            after = np.nextafter(level, np.finfo(np.float32).max)
            return np.where(turned, after, level)
        level = (copies[0].astype(np.int64) + turned).clip(-SUM, SUM)
        return level.astype("<i4" if wide else "<i2")

    return body.code.group(names, f"levels {kind}", kind, make) + "[c]"
