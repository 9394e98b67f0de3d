"""The short form of benchmarks/load.py: some clients on the stand-alone server for a few seconds."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("gradio")
pytest.importorskip("httpx")
if sys.platform != "linux":
    pytest.skip("the server is looked at by /proc", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import load


def test_ten_clients(tmp_path):
    outcome = load.load(10, 5, 0, tmp_path, quiet=3)
    asked = sum(sum(client.answers.values()) for client in outcome.clients)
    assert asked > 20
    assert not outcome.wrong
    assert "Traceback" not in (tmp_path / "server.said").read_text(errors="replace")


def test_the_slope_is_the_least_squares_one():
    looks = [load.Look(at, 100 + at / 36 + (-1) ** at, 0, 0, 0, 0) for at in range(1000)]
    assert load.slope(looks) == pytest.approx(100, rel=0.05)
