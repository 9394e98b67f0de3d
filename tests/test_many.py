"""What benchmarks/many.py says of memory. That a killed share is made again is in test_batch.py."""

import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the processes are looked at by /proc", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import many


def test_the_slope_is_the_least_squares_one():
    looks = [(float(at), 0.0, 100 + at / 30) for at in range(600)]
    assert many.Share(None, looks).slope == pytest.approx(2)
