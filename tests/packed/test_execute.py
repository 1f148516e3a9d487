"""The executor: members, votes, early exit, sharing at run time."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bnncore
from bnncore import metrics
from bnncore.packed import costs, execute, exits, numpy_kernels, packfile, votes
from bnncore.packed.arena import Arena
from bnncore.packed.program import Tensor, pack_bits
from bnncore.packed.rules import validate
from tests.graphs import naive_values, programs, random_images, random_program
from tests.packed.test_program import small

OPS = ["numpy", "compiled"]
every_ops = pytest.mark.parametrize("ops", OPS)


def with_combine(program, combine, **arrays):
    """The Program with another way to join its members."""
    tensors = {n: t for n, t in program.tensors.items() if t.role != "combine"}
    slots = {}
    for slot, array in arrays.items():
        array = np.asarray(array, np.float32)
        tensors[f"c.{slot}"] = Tensor("float32", "combine", array.shape, False, array)
        slots[slot] = f"c.{slot}"
    return replace(program, combine=combine, combine_tensors=slots, tensors=tensors)


def ensemble(members, combine="mean", seed=0, **arrays):
    """A small ensemble whose members differ."""
    rng = np.random.default_rng(seed)
    base = small()
    tensors = {}
    for name, tensor in base.tensors.items():
        data = tensor.data
        if tensor.own and tensor.kind == "binary":
            data = pack_bits(rng.random((members, *tensor.shape)) < 0.5, own=True)
        elif tensor.own:
            data = rng.normal(size=(members, *tensor.shape)).astype(np.float32) / 3
        tensors[name] = replace(tensor, data=data)
    scale, shift = np.full(3, 1 / 60, np.float32), np.full(3, -127.5 / 60, np.float32)
    tensors["in.scale"] = replace(tensors["in.scale"], data=scale)
    tensors["in.shift"] = replace(tensors["in.shift"], data=shift)
    program = replace(base, tensors=tensors, members=members)
    return with_combine(program, combine, **arrays)


@settings(max_examples=40, deadline=None)
@given(programs(), st.integers(0, 2**31))
def test_outputs_are_the_naive_ones(program, seed):
    """End to end; float rounding may flip a sign near its threshold, so most images, not all."""
    images = random_images(program, 4, seed)
    got = execute.Model(program, "numpy").outputs(images)
    assert got.shape == (program.members, 4, len(program.classes))
    assert got.dtype == np.float32
    close = []
    for member in range(program.members):
        for index, image in enumerate(images):
            expected = naive_values(program, image, member)[-1]
            bound = 1e-4 * (1 + np.abs(expected).max())
            close.append(np.abs(got[member, index] - expected).max() <= bound)
    assert np.mean(close) >= 0.75


@settings(max_examples=60, deadline=None)
@given(programs(), st.integers(0, 2**31))
def test_torch_agrees(program, seed):
    """End to end through torch's own operators; again rounding may flip a sign."""
    images = random_images(program, 4, seed)
    ours = execute.Model(program, "numpy").outputs(images)
    theirs = execute.Model(program, "torch").outputs(images)
    bound = 1e-4 * (1 + np.abs(theirs).max(2))
    assert np.mean(np.abs(ours - theirs).max(2) <= bound) >= 0.75


@every_ops
def test_a_prefix_of_members(ops):
    program = ensemble(5)
    images = random_images(program, 10)
    model = execute.Model(program, ops)
    outputs = model.outputs(images)
    for m in range(1, 6):
        assert np.array_equal(model.outputs(images, m), outputs[:m])
        assert np.allclose(model(images, m), outputs[:m].mean(0), atol=1e-6)
        assert np.array_equal(model.predict(images, m), outputs[:m].mean(0).argmax(1))
    for wrong in (0, 6):
        with pytest.raises(ValueError, match="members: expected 1 to 5"):
            model(images, members=wrong)


@every_ops
@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_chunks_and_threads_change_nothing(ops, batch, threads):
    program = ensemble(2)
    images = random_images(program, 11)
    expected = execute.Model(program, ops).outputs(images)
    got = execute.Model(program, ops, threads).outputs(images, batch=batch)
    assert np.allclose(got, expected, rtol=1e-6, atol=1e-6)


@every_ops
def test_no_images(ops):
    program = ensemble(2)
    model = execute.Model(program, ops)
    images = random_images(program, 0)
    assert model(images).shape == (0, 4)
    assert model.anytime(images)[0].shape == (0,)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 8, 6, 3), np.float32), "expected uint8 .* got float32"),
        (np.zeros((8, 6, 3), np.uint8), "expected uint8 of shape \\(B, 8, 6, 3\\)"),
        (np.zeros((1, 6, 8, 3), np.uint8), "got uint8 of \\(1, 6, 8, 3\\)"),
    ],
)
def test_other_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        execute.Model(small(), "numpy")(images)


def test_other_arguments_are_refused():
    with pytest.raises(ValueError, match="ops: expected one of"):
        execute.Model(small(), "cuda")
    with pytest.raises(ValueError, match="threads"):
        execute.Model(small(), "numpy", threads=0)
    with pytest.raises(ValueError, match="batch"):
        execute.Model(small(), "numpy")(random_images(small(), 1), batch=0)


def test_shared_steps_run_once(monkeypatch):
    ran = []
    steps = numpy_kernels.plan(small())

    def counted(step):
        def run(values, member, rooms):
            ran.extend(step.outputs)
            return step.run(values, member, rooms)

        return replace(step, run=run)

    monkeypatch.setattr(numpy_kernels, "plan", lambda program: [counted(step) for step in steps])
    model = execute.Model(small(), "numpy")
    model(random_images(small(), 5))
    own = [index for index, shape in enumerate(validate(small())) if shape.own]
    assert own == [4, 5, 6]
    assert ran == [1, 2, 3, 4, 5, 6, 4, 5, 6]


def test_values_are_dropped_after_their_last_use():
    program = random_program(11, steps=12)
    model = execute.Model(program, "numpy")
    values = model._run_shared(random_images(program, 1), Arena(model._layout))
    own = [step for step in model._steps if step.own]
    needed = {number for step in own for number in step.inputs} | {len(program.nodes)}
    assert values.keys() <= needed


Z = np.array(
    [  # three members, two images, three classes
        [[4.0, 0.0, 0.0], [2.0, 0.0, 0.0]],
        [[0.0, 1.0, 0.9], [0.0, 1.0, 0.0]],
        [[0.0, 1.0, 0.9], [0.0, 0.0, 1.0]],
    ],
    np.float32,
)


def combined(combine, z=Z, **arrays):
    program = replace(random_program(2, sort="floats"), members=3, classes=("a", "b", "c"))
    return votes.combine(with_combine(program, combine, **arrays), z)


def softmax(z):
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def test_mean_and_sum():
    scores, labels = combined("mean")
    assert np.allclose(scores, Z.sum(0) / 3)
    assert labels.tolist() == [0, 0]
    scores, labels = combined("mean", Z[1:])
    assert np.allclose(scores, Z[1:].mean(0))
    scores, labels = combined("sum", weight=[1, 2, 3], bias=[0, 0, 10])
    assert np.allclose(scores, Z[0] + 2 * Z[1] + 3 * Z[2] + [0, 0, 10])
    assert labels.tolist() == [2, 2]
    assert np.allclose(combined("sum", Z[:2], weight=[1, 2, 3])[0], Z[0] + 2 * Z[1])


def test_soft_votes():
    scores, labels = combined("soft_vote", weight=[3, 1, 1])
    expected = (3 * softmax(Z[0]) + softmax(Z[1]) + softmax(Z[2])) / 5
    assert np.allclose(scores, expected, atol=1e-6)
    assert labels.tolist() == expected.argmax(1).tolist()
    assert np.allclose(combined("soft_vote", Z[:1], weight=[3, 1, 1])[0], softmax(Z[0]), atol=1e-6)


def test_hard_votes_and_their_ties():
    scores, labels = combined("hard_vote")
    assert scores.tolist() == [[1, 2, 0], [1, 1, 1]]
    # Image 1: every class has a vote, and class 0 the largest summed probability.
    assert labels.tolist() == [1, 0]
    scores, labels = combined("hard_vote", weight=[2.5, 1, 1])
    assert scores.tolist() == [[2.5, 2, 0], [2.5, 1, 1]]
    assert labels.tolist() == [0, 0]
    # A tie of votes goes to the larger probability, even of a higher class; then to the lower.
    tie = np.array([[[1.0, 0, 0]], [[0, 0, 3.0]]], np.float32)
    assert combined("hard_vote", tie)[1].tolist() == [2]
    even = np.array([[[0, 2.0, 0]], [[0, 0, 2.0]]], np.float32)
    assert combined("hard_vote", even)[1].tolist() == [1]
    # A member's own tie votes for the lower class.
    assert combined("hard_vote", np.zeros((1, 1, 3), np.float32))[0].tolist() == [[1, 0, 0]]


def test_huge_logits_do_not_overflow():
    z = np.array([[[3e38, -3e38, 0]]], np.float32)
    for combine in ("soft_vote", "hard_vote", "mean", "sum"):
        scores, labels = combined(combine, z)
        assert np.isfinite(scores).all()
        assert labels.tolist() == [0]


def test_combine_refuses_other_shapes():
    for shape in ((4, 2, 3), (0, 2, 3), (1, 2, 4), (2, 3)):
        with pytest.raises(ValueError, match="outputs: expected shape"):
            combined("mean", np.zeros(shape, np.float32))


@every_ops
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_votes_exit_early_exactly(ops, data):
    members = data.draw(st.integers(1, 7))
    combine = data.draw(st.sampled_from(["hard_vote", "soft_vote"]))
    weights = data.draw(
        st.none() | st.lists(st.sampled_from([1.0, 0.5, 2.0, 3.7]), min_size=members,
                             max_size=members)
    )  # fmt: skip
    arrays = {} if weights is None else {"weight": weights}
    program = ensemble(members, combine, data.draw(st.integers(0, 1000)), **arrays)
    images = random_images(program, 30, data.draw(st.integers(0, 1000)))
    model = execute.Model(program, ops)
    count = data.draw(st.integers(1, members))
    labels, used = model.anytime(images, members=count)
    assert np.array_equal(labels, model.predict(images, count))
    assert used.min() >= 1
    assert used.max() <= count
    # Nobody leaves too late either: with one member fewer the winner could still have changed.
    outputs = model.outputs(images, count)
    weight = np.array(weights or [1.0] * members)[:count]
    for image, m in enumerate(used):
        if m > 1:
            shares = votes.combine(program, outputs[: m - 1, image : image + 1])[0][0]
            shares = shares * (weight[: m - 1].sum() if combine == "soft_vote" else 1)
            lead = np.sort(shares)[-1] - np.sort(shares)[-2]
            assert lead <= weight[m - 1 :].sum() + 1e-3


def test_a_clear_vote_needs_few_members():
    program = ensemble(5, "hard_vote")
    tensors = {
        name: replace(t, data=np.repeat(t.data[:1], 5, axis=0)) if t.own else t
        for name, t in program.tensors.items()
    }
    model = execute.Model(replace(program, tensors=tensors), "numpy")
    _, used = model.anytime(random_images(program, 20))
    assert (used == 3).all()  # five equal members: after three the other two cannot win


@pytest.mark.parametrize("ops", [*OPS, "torch"])
@pytest.mark.parametrize("combine", ["mean", "sum", "soft_vote", "hard_vote"])
def test_thresholds(ops, combine):
    program = ensemble(6, combine)
    model = execute.Model(program, ops)
    images = random_images(program, 60, 1)
    truth = model.predict(images)
    labels = np.where(np.arange(60) % 3 == 0, (truth + 1) % 4, truth)
    rows = exits.exit_curve(model, images, labels, [0.0, 0.2, 1e9, None])
    for row in rows:
        predicted, used = model.anytime(images, row["threshold"])
        assert row["accuracy"] == metrics.accuracy(predicted, labels)
        assert row["mean_members"] == used.mean()
    assert rows[0]["mean_members"] == 1  # every lead is at least 0
    assert rows[2] == {**rows[3], "threshold": 1e9}
    if combine in ("mean", "sum"):
        assert rows[3]["mean_members"] == 6
    threshold = exits.choose_threshold(model, images, labels)
    kept = exits.exit_curve(model, images, labels, [threshold])[0]
    assert kept["accuracy"] >= metrics.accuracy(truth, labels)
    loose = exits.choose_threshold(model, images, labels, loss=1.0)
    assert loose <= threshold
    assert exits.exit_curve(model, images, labels, [loose])[0]["mean_members"] == 1


def test_curve_and_cost():
    program = ensemble(3)
    model = execute.Model(program, "numpy")
    images = random_images(program, 50)
    labels = model.predict(images)
    rows = exits.curve(model, images, labels)
    assert [row["members"] for row in rows] == [1, 2, 3]
    assert rows[-1]["accuracy"] == 1
    assert rows[0]["accuracy"] == metrics.accuracy(model.predict(images, 1), labels)
    first = 8 * 6 * 5 * (3 * 3 * 3)  # shared: once
    body = 4 * 3 * 7 * (3 * 3 * 5)
    for m, row in enumerate(rows, 1):
        assert row["float_macs"] == first + m * 4 * 7
        assert row["binary_macs"] == m * body


def test_peak_memory_by_hand():
    packed, floats = costs.peak_memory(small())
    # The convolution: its input of 3 and its output of 5 channels, all float32.
    assert packed == 8 * 6 * (3 + 5) * 4
    assert floats == 8 * 6 * (5 + 5) * 4  # the sign: 5 channels in, 5 out


def test_probabilities():
    scores = np.array([[2.0, 1.0, 1.0]], np.float32)
    mean = votes.probabilities(with_combine(small(), "mean"), scores)
    assert np.allclose(mean, softmax(scores))
    shares = votes.probabilities(with_combine(small(), "hard_vote"), scores)
    assert shares.tolist() == [[0.5, 0.25, 0.25]]
    none = votes.probabilities(with_combine(small(), "soft_vote"), 0 * scores)
    assert none.tolist() == [[0, 0, 0]]


def test_load(tmp_path):
    program = ensemble(2)
    packfile.save(program, tmp_path / "net.bnn")
    model = bnncore.load(tmp_path / "net.bnn", ops="numpy")
    images = random_images(program, 3)
    assert np.array_equal(model(images), execute.Model(program, "numpy")(images))
