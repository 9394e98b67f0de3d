"""``i2l`` on a disk that gives at most so many megabytes a second; ``real_size.make`` starts it.

PYTHONPATH=.:tests python benchmarks/throttled.py 200 make …
"""

from __future__ import annotations

import os
import sys
from unittest import mock

from i2l_ext.commands.main import main
from slow_disks import SlowDisk


def run(megabytes: float, arguments: list[str]) -> int:
    """The command's exit code. On Linux files of weights are read with ``os.preadv`` alone."""
    disk = SlowDisk(rate=megabytes * 1e6)
    with mock.patch.object(os, "preadv", lambda number, areas, position: disk.read(number, areas[0], position)):
        return main(arguments)


if __name__ == "__main__":
    sys.exit(run(float(sys.argv[1]), sys.argv[2:]))
