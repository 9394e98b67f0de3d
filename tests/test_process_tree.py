"""The end of a process with all that it started."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Timer

import pytest

from i2l_ext import process_tree

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the tree is seen on Linux only")

STARTS_ONE = (
    "import subprocess, sys, time; one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
    "start_new_session=True); print(one.pid, flush=True); time.sleep(60)"
)


def test_the_end_is_waited_for_where_the_killed_die_slowly(monkeypatch):
    kill = os.kill
    monkeypatch.setattr(process_tree.os, "kill", lambda pid, how: Timer(0.4, _killed, (kill, pid, how)).start())
    process = subprocess.Popen([sys.executable, "-c", STARTS_ONE], stdout=subprocess.PIPE, start_new_session=True)
    child = int(process.stdout.readline())
    tree = process_tree.Tree(process.pid)
    assert tree.measure().processes == 2

    process_tree.end_tree(process, tree)
    assert child not in process_tree._processes()
    process.stdout.close()


def test_a_number_that_is_used_again_is_none_of_the_tree():
    tree = process_tree.Tree(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        tree.measure()
        tree.root = 0
        tree.seen = {child.pid: "an earlier start"}
        assert tree.measure().processes == 0
        assert not tree.seen
    finally:
        child.kill()
        child.wait()


def _killed(kill, pid, how):
    with suppress(ProcessLookupError):
        kill(pid, how)
