"""The best rates of a device, by clocks that tests set."""

import pytest
import torch

from mebp_triton.autotune.ceilings import measure_copy_gb_s, measure_matmul_tflop_s
from mebp_triton.autotune.timing import Limits

CPU = torch.device("cpu")


class ToldTimer:
    """Runs what it is given and returns set times, the first of which must not count."""

    def __init__(self):
        self.times = [1e6, 100.0, 90.0, 5000.0, 110.0, 80.0, 7000.0, 100.0]

    def __call__(self, run):
        run()
        return self.times.pop(0)


@pytest.mark.parametrize(
    ("limits", "size"),
    [
        (Limits(cache_bytes=1 << 10, memory_bytes=1 << 40), 1 << 20),
        (Limits(cache_bytes=1 << 17, memory_bytes=1 << 40), 1 << 21),
        (Limits(cache_bytes=1 << 40, memory_bytes=1 << 22), 1 << 21),
    ],
)
def test_copies_outgrow_the_cache_and_are_read_and_written(limits, size):
    assert measure_copy_gb_s(CPU, ToldTimer(), limits) == pytest.approx(2 * size / 100.0 / 1e3)


def test_a_product_fits_into_memory():
    for memory_bytes, size in ((1 << 30, 256), (4 * 128 * 128 * 4, 128)):
        limits = Limits(cache_bytes=1 << 10, memory_bytes=memory_bytes)
        found = measure_matmul_tflop_s(CPU, ToldTimer(), limits, torch.float32)
        assert found == pytest.approx(2 * size**3 / 100.0 / 1e6)
