"""Which taps of windows lie in a map, against all of them looked at."""

import itertools
import math

import numpy as np

from bnncore.packed import borders
from bnncore.packed.rules import window


def test_windows_of_all_sorts():
    tried = 0
    for size, kernel, stride in itertools.product(range(1, 14), range(1, 6), (1, 2, 5)):
        for pad, ceil, include in itertools.product(range(kernel), (0, 1), (0, 1)):
            out, reach = window(size, kernel, stride, pad, ceil), pad * include
            if out < 1 or (pad > kernel // 2 and (ceil or include)):  # of poolings alone
                continue
            taps = np.arange(out)[:, None] * stride - pad + np.arange(kernel)
            counts = ((taps >= -reach) & (taps < size + reach)).sum(1)
            axes = (size, size), (out, out), (kernel, kernel)
            divisors = borders.divisors(*axes, stride, pad, reach)
            assert (divisors == np.outer(counts, counts)).all()
            of_all = math.lcm(*map(int, divisors.flat))
            assert borders.multiple(*axes, stride, pad, reach) == of_all
            found = borders.Window.of((kernel, kernel), stride, pad, *axes[:2])
            assert (found.rows[found.row_of] == ((taps >= 0) & (taps < size))).all()
            assert len(np.unique(found.rows, axis=0)) == len(found.rows)
            tried += 1
    assert tried == 1716
