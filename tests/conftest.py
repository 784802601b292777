import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_and_a_fixed_seed():
    """Small tensors gain nothing from threads, and sums over them stay the same from machine to machine."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
