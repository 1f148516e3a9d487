"""The plan of values: lifetimes against a plain walk, places against their bound and each other."""

from __future__ import annotations

import numpy as np
import pytest

from bnncore.packed import plan
from bnncore.packed.plan import Lifetime
from bnncore.packed.rules import validate
from tests.graphs import random_program


def walk(program, size):
    """The bytes alive at each step of a run through all members, one after another."""
    shapes = validate(program)
    shared = [n for n in range(1, len(shapes)) if not shapes[n].own]
    own = [n for n in range(1, len(shapes)) if shapes[n].own]
    members = max(2, program.members)  # the plan holds what members read, though there be but one
    times = shared + own * members
    ends = [len(shared) + len(own) * member - 1 for member in range(1, members + 1)]
    alive_at = [set() for _ in times]
    for value in range(len(shapes)):
        start = 0  # when it was written
        for time, number in enumerate(times):
            read = value in program.nodes[number - 1].inputs
            taken = value == len(program.nodes) and time in ends  # by the caller
            if number == value:
                start = time
            if number == value or read or taken:
                for between in range(start, time + 1):
                    alive_at[between].add(value)
    return [sum(size(shapes[n]) for n in alive) for alive in alive_at]


@pytest.mark.parametrize("size", [plan.packed_bytes, plan.float_bytes])
def test_the_peak_is_that_of_a_walk_through_all_members(size):
    for seed in range(60):
        program = random_program(seed, steps=16)
        assert plan.peak(plan.of_nodes(program, size)) == max(walk(program, size)), seed


def overlap(a, b):
    return a.first <= b.last and b.first <= a.last


def check_places(values, align):
    places, total = plan.place(values, align)
    for value in values:
        assert places[value.value] % align == 0
        assert 0 <= places[value.value] <= total - value.bytes
    for k, a in enumerate(values):
        for b in values[:k]:
            if overlap(a, b) and a.bytes and b.bytes:
                low, high = sorted((a, b), key=lambda value: places[value.value])
                assert places[low.value] + low.bytes <= places[high.value], (a, b)
    return total


@pytest.mark.slow
def test_values_alive_together_never_overlap_and_the_block_is_tight():
    for seed in range(150):
        values = plan.of_nodes(random_program(seed, steps=30))
        for align in (1, 16, 64):
            assert check_places(values, align) <= 1.1 * plan.peak(values, align), seed
    rng = np.random.default_rng(0)
    for _ in range(100):  # lifetimes of no network: none overlaps, no bound is promised
        first = rng.integers(0, 40, 50)
        last = first + rng.integers(0, 12, 50)
        rows = zip(range(50), first, last, rng.integers(0, 2000, 50), strict=True)
        check_places([Lifetime(*map(int, row)) for row in rows], 8)


def test_scratch_has_a_place_of_its_own():
    values = [Lifetime(0, 0, 1, 100), Lifetime(1, 1, 2, 100), Lifetime(-2, 1, 1, 50)]
    assert check_places(values, 1) == plan.peak(values) == 250
