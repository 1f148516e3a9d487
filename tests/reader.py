"""A second reader of packed files, written from docs/format.md alone: numpy and json, no bnncore.

It shares no code with bnncore and is slow on purpose: one image, one member at a time.
"""

import hashlib
import json
import struct
import zlib

import numpy as np

ENTRIES = {
    "float32": ("F32", "<f4"),
    "int32": ("I32", "<i4"),
    "float16": ("F16", "<f2"),
    "int16": ("I16", "<i2"),
    "int8": ("I8", "i1"),
    "binary": ("U8", "u1"),
    "graph": ("U8", "u1"),
}


def read(path):
    """The graph of a file, with each tensor an object ``{kind, own, data}``, bits as +-1."""
    with open(path, "rb") as file:
        content = file.read()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    about = header.pop("__metadata__")
    assert about["format"] == "bnncore", about
    assert about["version"] in ("1", "2"), about
    assert about["sha256"] == hashlib.sha256(data).hexdigest()
    entries, start = {}, 0
    for kind, (dtype, code) in ENTRIES.items():
        if kind in header:
            entry = header.pop(kind)
            assert entry["dtype"] == dtype
            assert entry["data_offsets"][0] == start
            start = entry["data_offsets"][1]
            entries[kind] = np.frombuffer(data[entry["data_offsets"][0] : start], code)
            assert entry["shape"] == [len(entries[kind])]
    assert not header
    assert start == len(data)
    graph = json.loads(zlib.decompress(entries.pop("graph").tobytes()))
    graph["tensors"] = read_tensors(graph["tensors"], graph["members"], entries)
    return graph


def read_tensors(rows, members, entries):
    tensors, taken = [], dict.fromkeys(entries, 0)
    for _, kind, _, shape, own in rows:
        copies, elements = (members if own else 1), int(np.prod(shape))
        each = -(-elements // 8) if kind == "binary" else elements
        data = entries[kind][taken[kind] : taken[kind] + copies * each].reshape(copies, each)
        taken[kind] += copies * each
        if kind == "binary":
            place = np.arange(elements)
            data = ((data[:, place // 8] >> (place % 8)) & 1) * 2.0 - 1
        if kind == "float16":
            data = data.astype(np.float32)
        tensors.append({"kind": kind, "own": own, "data": data.reshape(copies, *shape)})
    assert all(taken[kind] == len(entry) for kind, entry in entries.items())
    return tensors


def run(graph, image, member):
    """The output (classes,) of one member for one uint8 image (H, W, C)."""
    assert list(image.shape) == graph["image"]
    values = [image]
    for index, (op, _, back, slots, attrs) in enumerate(graph["nodes"]):
        inputs = [values[index + 1 - step] for step in back]
        tensors = {}
        for slot, number in slots.items():
            tensor = graph["tensors"][number]
            tensors[slot] = tensor["data"][member if tensor["own"] else 0]
        values.append(OPERATORS[op](*inputs, **tensors, **attrs))
    return values[-1]


def classify(graph, image, members=None):
    """(scores, predicted class) of the first so many members."""
    count = members or graph["members"]
    z = np.array([run(graph, image, member) for member in range(count)], np.float64)
    slots = {slot: graph["tensors"][n]["data"][0] for slot, n in graph["combine_tensors"].items()}
    weight = np.asarray(slots.get("weight", np.ones(graph["members"])), np.float64)[:count]
    op, _, _, _, attrs = graph["nodes"][-1]
    if op == "fixed":
        soft = np.array([table_softmax(row, attrs["fraction"]) for row in z])
    else:
        e = np.exp(z - z.max(1, keepdims=True))
        soft = e / e.sum(1, keepdims=True)
    if graph["combine"] == "mean":
        scores = z.sum(0) / count
    elif graph["combine"] == "sum":
        scores = weight @ z + slots.get("bias", 0)
    elif graph["combine"] == "soft_vote":
        scores = weight @ soft / weight.sum()
    else:
        assert graph["combine"] == "hard_vote"
        scores = weight @ np.eye(z.shape[1])[z.argmax(1)]
        tied = np.where(scores == scores.max(), soft.sum(0), -1)
        return scores, int(tied.argmax())
    return scores, int(scores.argmax())


def table_softmax(z, fraction):
    x = [round(value * 2.0**fraction) for value in z]
    steps = [((max(x) - value) * 5909) >> (fraction + 4) for value in x]
    e = [round(65535 * 2 ** (-(t % 256) / 256)) >> min(t // 256, 31) for t in steps]
    return [(value << 14) // sum(e) / 2**14 for value in e]


def affine(x, scale=None, shift=None):
    x = x.astype(np.float32)
    x = x if scale is None else x * scale
    return x if shift is None else x + shift


def conv(x, weight, stride, pad, weight_scale=None, bias=None, biases=0, zero=0):
    if weight_scale is not None:
        weight = weight.astype(np.float32) * weight_scale[:, None, None, None]
    filters, kh, kw, _ = weight.shape
    framed = np.ones((x.shape[0] + 2 * pad, x.shape[1] + 2 * pad, x.shape[2])) * zero
    framed[pad : pad + x.shape[0], pad : pad + x.shape[1]] = x
    rows = (framed.shape[0] - kh) // stride + 1
    columns = (framed.shape[1] - kw) // stride + 1
    out = np.zeros((rows, columns, filters))
    for r in range(rows):
        for s in range(columns):
            seen = framed[r * stride : r * stride + kh, s * stride : s * stride + kw]
            out[r, s] = np.tensordot(weight.astype(np.float64), seen, 3)
    return (out if bias is None else out + bias).astype(np.float32)


def dense(x, weight, weight_scale=None, bias=None):
    return conv(x[None, None], weight[:, None, None], 1, 0, weight_scale, bias)[0, 0]


def threshold(x, threshold, direction=None):
    up = np.ones(x.shape[-1]) if direction is None else direction
    return np.where(np.where(up > 0, x >= threshold, x <= threshold), 1.0, -1.0)


def interval(x, low, high, inside=1.0):
    return np.where((low <= x) & (x <= high), 1.0, -1.0) * inside


def rescale(x, second=0, *, scale, shift, slope=None, right, low, high):
    factor = np.where(x < 0, scale if slope is None else slope, scale).astype(np.int64)
    y = (x.astype(np.int64) * factor + shift) >> right
    return np.clip(y + second, low, high).astype(np.int64)


def sumpool(x, **attrs):
    return pool(x, **attrs, whole=True)


def pool(x, kernel, stride, pad, ceil, include_pad=None, whole=False, direction=None):
    if direction is not None:
        return pool(x * direction, kernel, stride, pad, ceil) * direction
    spans = []
    for size in x.shape[:2]:
        count = (size + 2 * pad - kernel + (stride - 1) * ceil) // stride + 1
        if ceil and (count - 1) * stride >= size + pad:
            count -= 1
        spans.append([(k * stride - pad, k * stride - pad + kernel) for k in range(count)])
    out = np.zeros((len(spans[0]), len(spans[1]), x.shape[2]))
    counts = np.ones(out.shape[:2], int)
    for r, (top, bottom) in enumerate(spans[0]):
        for s, (left, right) in enumerate(spans[1]):
            seen = x[max(top, 0) : bottom, max(left, 0) : right]
            if include_pad is None:
                out[r, s] = seen.max((0, 1))
            elif include_pad:
                height = min(bottom, x.shape[0] + pad) - top
                counts[r, s] = height * (min(right, x.shape[1] + pad) - left)
                out[r, s] = seen.sum((0, 1)) / counts[r, s]
            else:
                counts[r, s] = seen.shape[0] * seen.shape[1]
                out[r, s] = seen.mean((0, 1))
    return np.rint(out * np.lcm.reduce(counts.ravel())) if whole else out.astype(np.float32)


OPERATORS = {
    "normalize": affine,
    "conv": conv,
    "bconv": conv,
    "affine": affine,
    "prelu": lambda x, slope: np.where(x >= 0, x, x * slope).astype(np.float32),
    "relu": lambda x: np.maximum(x, 0),
    "clip": lambda x, low, high: np.clip(x, np.float32(low), np.float32(high)),
    "sign": lambda x: np.where(x >= 0, 1.0, -1.0),
    "threshold": threshold,
    "interval": interval,
    "add": lambda a, b: (a + b).astype(np.float32),
    "concat": lambda *parts: np.concatenate(parts, axis=-1),
    "maxpool": pool,
    "avgpool": pool,
    "sumpool": sumpool,
    "global_avg": lambda x: x.mean((0, 1)),
    "global_sum": lambda x: x.sum((0, 1)),
    "rescale": rescale,
    "fixed": lambda x, fraction: x / 2.0**fraction,
    "flatten": lambda x: x.transpose(2, 0, 1).reshape(-1),
    "dense": dense,
}
