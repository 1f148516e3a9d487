"""Larq Compute Engine, another packed engine, as a second oracle for binary layers and as a peer.

    python -m venv ELSEWHERE
    ELSEWHERE/bin/pip install tensorflow-cpu tf-keras larq larq-compute-engine
    python benchmarks/larq_oracle.py ELSEWHERE/bin/python [--markdown benchmarks/larq_oracle.md]

It needs another environment, for its TensorFlow does not go with bnncore's numpy. There this same
file answers over a pipe, so that both sides are timed in turns.

Oracle: every binary convolution of `BACKBONES`, at the papers' widths, on the bits that random
images make of its input: all sums have to be equal. Left out are resnet8 and the lean backbones,
leanresnet8, leanresnet20 and leanplain.

Peer: the layers of `packed.LAYERS`, numbers to numbers, one thread. No measure of what Larq can do:
`PEER` says why.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

BACKBONES = ("nin", "resnet9", "fernet", "resnet20", "resnet18", "birealnet18", "reactnet10")
IMAGES = 4
PEER = """\
The peer is no measure of what Larq Compute Engine can do: its fast kernels are for ARM, and on x86
it falls back on reference kernels, which nobody made fast. `Interpreter.predict` runs them image by
image, where ours take the batch at once, and its time has the pipe between the two processes in it.
"""


class Larq:
    """The other environment: hold layers, run them."""

    def __init__(self, python: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            [python, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, cwd=self.folder.name,
        )  # fmt: skip
        self.versions = self.ask("versions")

    def __enter__(self) -> Larq:
        return self

    def __exit__(self, *error) -> None:
        self.process.communicate("")
        self.folder.cleanup()

    def ask(self, *request: str) -> dict:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("the other environment ended: expected one with tensorflow-cpu, "
                             "tf-keras, larq and larq-compute-engine")  # fmt: skip
        return json.loads(answer)

    def load(self, name: str, x: np.ndarray, w: np.ndarray) -> None:
        """A layer of stride 1, padded by zeros to the same size; x (B,H,W,C), w (O,kh,kw,C)."""
        np.savez(Path(self.folder.name) / f"{name}.npz", x=x, w=w)
        self.ask("load", name)

    def run(self, name: str) -> None:
        self.ask("run", name)

    def result(self, name: str) -> np.ndarray:
        self.ask("save", name)
        return np.load(Path(self.folder.name) / f"{name}.npy")


def serve() -> None:
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_USE_LEGACY_KERAS": "1"}
    import larq
    import larq_compute_engine as engine
    import tensorflow as tf
    from larq_compute_engine.tflite.python.interpreter import Interpreter

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what TensorFlow prints is no answer
    layers = {}

    def versions() -> dict:
        from importlib.metadata import version

        return {name: version(name) for name in ("larq-compute-engine", "tensorflow-cpu")}

    def load(name: str) -> dict:
        with np.load(f"{name}.npz") as file:
            x, w = file["x"], file["w"]
        layer = larq.layers.QuantConv2D(
            len(w), w.shape[1], padding="same", pad_values=0.0, use_bias=False,
            input_quantizer="ste_sign", kernel_quantizer="ste_sign", input_shape=x.shape[1:],
        )  # fmt: skip
        network = tf.keras.Sequential([layer])
        layer.set_weights([np.moveaxis(w, 0, -1)])
        layers[name] = Interpreter(engine.convert_keras_model(network), num_threads=1), x
        return {}

    def run(name: str) -> dict:
        interpreter, x = layers[name]
        interpreter.predict(x)
        return {}

    def save(name: str) -> dict:
        interpreter, x = layers[name]
        np.save(f"{name}.npy", interpreter.predict(x))
        return {}

    commands = {"versions": versions, "load": load, "run": run, "save": save}
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        answers.write(json.dumps(commands[command](*arguments)) + "\n")
        answers.flush()


def signs(bits: np.ndarray) -> np.ndarray:
    return np.where(bits, np.float32(1), np.float32(-1))


def oracle(larq: Larq) -> list[str]:
    """A line a backbone; raises AssertionError where a sum differs."""
    from benchmarks import packed
    from bnncore.packed import execute, numpy_kernels
    from bnncore.packed.program import unpack_bits
    from bnncore.packed.rules import validate

    lines = ["| backbone | binary convolutions | sums compared | different |",
             "| --- | ---: | ---: | ---: |"]  # fmt: skip
    total = 0
    for backbone in BACKBONES:
        _, program = packed.network(backbone)
        shapes = validate(program)
        images = packed.random_images(IMAGES)
        values = execute.every_value(numpy_kernels.plan(program), images)
        count = compared = different = 0
        for index, node in enumerate(program.nodes):
            if node.op != "bconv":
                continue
            weight = program.tensors[node.tensors["weight"]]
            channels = shapes[node.inputs[0]].dims[2]
            packed_bits = values[node.inputs[0]]
            bits = np.unpackbits(packed_bits, axis=-1, count=channels, bitorder="little")
            taps = unpack_bits(weight)[0] if weight.own else unpack_bits(weight)
            pad, stride = int(node.attrs["pad"]), int(node.attrs["stride"])
            assert pad == taps.shape[1] // 2, "Larq pads to the same size only"
            name = f"{backbone}-{index}"
            larq.load(name, signs(bits), signs(taps))
            theirs = larq.result(name)[:, ::stride, ::stride]
            ours = values[index + 1]
            different += int((theirs != ours).sum())
            compared += ours.size
            count += 1
        lines.append(f"| {backbone} | {count} | {compared:,} | {different} |")
        print(lines[-1], flush=True)
        total += different
    assert total == 0, f"{total} sums differ"
    return lines


def peer(larq: Larq) -> list[str]:
    from benchmarks import packed
    from benchmarks.rows import Bench, table

    bench = Bench(time.perf_counter)
    for channels, filters, size, side in packed.LAYERS:
        random = np.random.default_rng(0)
        x = random.normal(size=(packed.BATCH, side, side, channels)).astype(np.float32)
        w = signs(random.random((filters, size, size, channels)) < 0.5)
        name = f"{channels}-{filters}-{size}-{side}"
        larq.load(name, x, w)
        numbers, *_ = packed.layer(channels, filters, size, side, packed.CHUNK)
        bench.compare(
            f"{channels}->{filters} {size}x{size}, {side}x{side}, numbers to numbers", 1,
            numbers, {"Larq Compute Engine": partial(larq.run, name)},
        )  # fmt: skip
    return table(bench.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", nargs="?", help="the Python of the environment that has Larq")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    if not args.python:
        parser.error("expected the Python of an environment that has Larq Compute Engine")
    os.environ["NUMBA_NUM_THREADS"] = "1"
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

    from benchmarks.rows import commit, processor

    cpu, flags = processor()
    with Larq(args.python) as larq:
        versions = ", ".join(f"{name} {number}" for name, number in larq.versions.items())
        head = [f"`python benchmarks/{Path(__file__).name}`, commit {commit()}: {versions}; {cpu}, "
                f"AVX2: {'yes' if 'avx2' in flags else 'no'}, "
                f"AVX-512: {'yes' if 'avx512f' in flags else 'no'}", ""]  # fmt: skip
        lines = [*head, *oracle(larq), "", *PEER.splitlines(), "", *peer(larq)]
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
