"""One thread for every test here, as an actor has: small layers gain nothing from a second one,
lose much beside other work, and their bits would depend on the number."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
