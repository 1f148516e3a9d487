"""Made the golden file, once. Run again only for a new version of the format, under a new name.

python -m tests.golden.make
"""

from pathlib import Path

import numpy as np

from bnncore.packed import execute, packfile
from bnncore.packed.program import KINDS, Program
from tests.graphs import Builder, random_images

HERE = Path(__file__).parent


def golden() -> Program:
    """Two members and every operator and kind, with channel counts of no multiple of 8."""
    rng = np.random.default_rng(2024)
    b = Builder(lambda low, high: int(rng.integers(low, high + 1)), rng)
    b.members = 2
    b.values = [("u8", (6, 5, 3))]
    t, node = b.tensor, b.node
    window = {"stride": 1, "pad": 1}
    x = node(
        "normalize", [0], "f32", (6, 5, 3),
        {"scale": t("float32", "input", (3,), 0.02), "shift": t("float32", "input", (3,))},
    )  # fmt: skip
    x = node(
        "conv", [x], "f32", (6, 5, 9),
        {"weight": t("int8", "weight", (9, 3, 3, 3), 100),
         "weight_scale": t("float16", "weight_scale", (9,), 0.05),
         "bias": t("float32", "bias", (9,))},
        window,
    )  # fmt: skip
    x = node("clip", [x], "f32", (6, 5, 9), {}, {"low": -3.5, "high": 4.25})
    side = x
    bits = node("sign", [x], "bits", (6, 5, 9))
    pooled = {"kernel": 3, "stride": 1, "pad": 1, "ceil": 1}
    x = node("maxpool", [x], "f32", (6, 5, 9), {}, pooled)
    more = node(
        "threshold", [x], "bits", (6, 5, 9),
        {"threshold": t("float16", "threshold", (9,)),
         "direction": t("binary", "direction", (9,))},
    )  # fmt: skip
    x = node("concat", [bits, more], "bits", (6, 5, 18))
    x = node(
        "bconv", [x], "i32", (6, 5, 17),
        {"weight": t("binary", "weight", (17, 3, 3, 18))}, {**window, "biases": 17},
    )  # fmt: skip
    x = node(
        "interval", [x], "bits", (6, 5, 17),
        {"low": t("int16", "threshold", (17,), 9), "high": t("int32", "threshold", (17,), 90),
         "inside": t("binary", "direction", (17,))},
    )  # fmt: skip
    x = node(
        "bconv", [x], "i32", (6, 5, 9),
        {"weight": t("binary", "weight", (9, 3, 3, 17))}, {**window, "biases": 0},
    )  # fmt: skip
    x = node(
        "affine", [x], "f32", (6, 5, 9),
        {"scale": t("float16", "scale", (9,), 0.1), "shift": t("float32", "shift", (9,))},
    )  # fmt: skip
    x = node("add", [x, side], "f32", (6, 5, 9))
    x = node("prelu", [x], "f32", (6, 5, 9), {"slope": t("float32", "slope", (9,))})
    averaged = {"kernel": 2, "stride": 2, "pad": 1, "ceil": 1, "include_pad": 0}
    x = node("avgpool", [x], "f32", (4, 3, 9), {}, averaged)
    features = node("flatten", [x], "f32", (108,))
    x = node("relu", [node("global_avg", [x], "f32", (9,))], "f32", (9,))
    x = node("concat", [features, x], "f32", (117,))
    node(
        "dense", [x], "f32", (4,),
        {"weight": t("float16", "weight", (4, 117), 0.1), "bias": t("float32", "bias", (4,))},
    )  # fmt: skip
    weight = t("float32", "combine", (2,))
    tensor = b.tensors[weight]
    b.tensors[weight] = type(tensor)(
        "float32", "combine", (2,), False, np.array([0.75, 0.5], KINDS["float32"])
    )
    return Program(
        tuple(b.nodes), b.tensors, 2, "soft_vote", (6, 5, 3), ("bé", "c", "d", "e"),
        {"weight": weight}, {"name": "golden", "test_top1": 12.5, "seed": 2024},
    )  # fmt: skip


if __name__ == "__main__":
    program = golden()
    images = random_images(program, 8)
    packfile.save(program, HERE / "version1.bnn")
    np.save(HERE / "images.npy", images)
    np.save(HERE / "scores.npy", execute.Model(program, "numpy").outputs(images))
