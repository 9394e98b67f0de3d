"""Freed memory stays with the process."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FAULTS = """
import resource, sys, threading
from i2l_ext import runtime
if sys.argv[1] == "configured":
    runtime.configure_process()
import torch

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def layer():
    for _ in range(30):
        rooms = [torch.empty(40 << 20, dtype=torch.uint8).fill_(1) for _ in range(2)]
        del rooms
        count.append(faults())

count = []
thread = threading.Thread(target=layer)
thread.start()
thread.join()
print(count[-1] - count[20])  # the heap has grown by then
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_stays_at_hand():
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}

    def again(how: str, **own: str) -> int:
        environment = {**alone, "PYTHONPATH": str(ROOT), **own}
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    plain = again("plain")
    assert again("configured") * 10 < plain
    assert again("configured", MALLOC_TOP_PAD_="0") * 2 > plain, "a user's own choice stands"
