"""The short form of benchmarks/gpu.py, on the processor: so that it runs the day there is a card."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

gpu = pytest.importorskip("gpu", reason="the benchmarks are Linux's")


def test_it_measures_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "branch_cost", lambda device, small: "hooks")
    text = gpu.measure(tmp_path, "cpu", [1, 2], small=True, memory=10**9)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    encoders = rows[2 : next(at for at, row in enumerate(rows) if row[1] == "modules")]
    assert [row[:2] for row in encoders] == [
        [str(count), way] for way in ("ours, unbound", "ours, --memory 1GB") for count in (1, 2)
    ] + [[str(count), f"reference, {way}"] for count in (1, 2) for way in ("held on the device", "from the file")]
    assert all(float(row[5]) < 0.02 for row in encoders if row[5])  # bfloat16, one by one and together
    assert "hooks" in text and "Left out" not in text


def test_what_there_is_no_time_for_is_said(tmp_path):
    text = gpu.measure(tmp_path, "cpu", [1], small=True, memory=10**9, seconds=0)
    assert "Left out for want of time: ours, unbound, 1 pictures" in text and "the branch hooks" in text
