"""The claims, recomputed on a smaller sample from the shipped weights: what is promised of them must still hold."""

import pytest

from i2l_ext.commands.main import main

pytest.importorskip("diffusers")


def test_no_bound_is_broken(capsys):
    assert main(["report", "--quick"]) == 0, capsys.readouterr().err
