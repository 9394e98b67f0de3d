"""The engine, with work that can be made to last: a LoRA whose name begins with ``slow`` takes a minute first."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from i2l_ext.worker import main, tasks

MAKE = tasks.WORK["make"]


def make(request, tell):
    if request["order"]["name"].startswith("slow"):
        tell.plan([{"title": "start"}, {"title": "encode slowly", "bytes": 20_600_000_000, "layers": 40}])
        tell.step("encode slowly")
        for number in range(600):
            time.sleep(0.1)
            tell.check()
            tell.progress((number + 1) / 600)
    return MAKE(request, tell)


def download(request, tell):
    """The catalogue's weights are not for a test's network: the same words, at the speed of a good line."""
    tell.plan([{"title": "download", "bytes": 19_000_000_000}])
    for number in range(600):
        time.sleep(0.05)
        tell.check()
        tell.progress((number + 1) / 600)
    return {"model": request["model"], "files": []}


if __name__ == "__main__":
    tasks.WORK.update(make=make, download=download)
    sys.exit(main.main())
