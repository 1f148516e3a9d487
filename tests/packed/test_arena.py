"""Memory by the plan: rooms that are alive together lie apart, workers have blocks of their own."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bnncore.packed import arena, compiled_kernels, execute, numpy_kernels, plan
from tests.graphs import random_images, random_program


def test_rooms_in_use_never_overlap_in_a_block_that_is_tight() -> None:
    """Inputs, outputs and what a step wants for itself, by where they really lie."""
    for seed in range(40):
        program = random_program(seed, steps=16)
        steps = plan.in_order(compiled_kernels.plan(program))
        layout = arena.Layout(steps, len(program.nodes))
        block = arena.Arena(layout)
        held: dict[int, np.ndarray] = {}
        most = 0
        for time, step in enumerate(steps):
            rooms = block.rooms(time, 3)
            assert [len(room) for room in rooms] == [3 * size for size in step.rooms]
            assert all(room.ctypes.data % arena.LINE == 0 for room in rooms)
            mine = dict(zip((*step.outputs, ~time), rooms, strict=False))
            every = [*held.values(), *rooms]
            for k, one in enumerate(every):
                assert not any(np.shares_memory(one, other) for other in every[:k])
            most = max(most, sum(-(-len(room) // 192) * 64 for room in every))
            held |= mine
            for number in [*layout.dead[time], ~time]:
                held.pop(number, None)
        assert most <= layout.total <= 1.1 * most


def test_kernels_with_memory_of_their_own_need_no_block() -> None:
    program = random_program(0)
    assert arena.Layout(numpy_kernels.plan(program), len(program.nodes)).total == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_what_memory_held_before_changes_nothing(threads: int) -> None:
    """Also results that were handed out: later calls leave them alone."""
    for seed in range(20):
        program = random_program(seed, steps=12)
        model = execute.Model(program, threads=threads)
        images = random_images(program, 13, seed)
        first = model.outputs(images, batch=5)
        kept = first.copy()
        for block in model._arenas:
            block.memory[:] = 255  # NaN as numbers
        model.outputs(random_images(program, 13, seed + 1), batch=13)
        np.testing.assert_array_equal(first, kept)
        np.testing.assert_array_equal(model.outputs(images, batch=5), kept)
        labels, _ = model.anytime(images, 0.01, batch=5)
        np.testing.assert_array_equal(labels, execute.Model(program).anytime(images, 0.01)[0])
        assert len(model._arenas) <= threads


def test_steps_are_bound_once_for_a_number_of_images() -> None:
    """And again where the block has grown, or where there were two other numbers since."""
    program = random_program(4, steps=12)
    model = execute.Model(program)
    bound: list[int] = []

    def counted(step: arena.Kernel) -> arena.Kernel:
        def bind(*arguments):
            bound.append(1)
            return step.bind(*arguments)

        return dataclasses.replace(step, bind=bind)

    model._steps = [counted(step) for step in model._steps]
    shared = sum(not step.own for step in model._steps)
    each = shared + program.members * (len(model._steps) - shared)
    for count, binds in ((3, 1), (3, 0), (2, 1), (3, 0), (5, 1), (5, 0), (2, 1), (5, 0), (3, 1)):
        bound.clear()
        images = random_images(program, count, len(bound))
        want = execute.Model(program).outputs(images)
        np.testing.assert_array_equal(model.outputs(images), want)
        assert len(bound) == binds * each, count


def test_one_model_serves_many_callers() -> None:
    program = random_program(4, steps=12)
    model = execute.Model(program)
    batches = [random_images(program, 1 + seed % 7, seed) for seed in range(40)]
    wanted = [execute.Model(program).outputs(images) for images in batches]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(model.outputs, batches), wanted, strict=True):
            np.testing.assert_array_equal(got, want)


def test_an_error_does_not_keep_the_next_call_from_working() -> None:
    program = random_program(4)
    model = execute.Model(program)
    images = random_images(program, 3)
    want = model.outputs(images)
    step = model._steps[-1]
    model._steps[-1] = arena.Kernel(step.inputs, step.outputs, step.own, broken, step.rooms)
    with pytest.raises(ZeroDivisionError):
        model.outputs(images)
    model._steps[-1] = step
    np.testing.assert_array_equal(model.outputs(images), want)


def broken(values, member, rooms):
    raise ZeroDivisionError
