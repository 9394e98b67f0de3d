"""The engine, with work that can be made to last: a LoRA whose name begins with ``slow`` takes a minute first."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from i2l_ext.operations import OPERATIONS, Step
from i2l_ext.operations.models import DownloadResult
from i2l_ext.worker import main

MAKE = OPERATIONS["make"]


def last(reporter, step, seconds):
    """Report progress on a step for so long."""
    reporter.begin(step)
    for number in range(600):
        time.sleep(seconds / 600)
        reporter.check()
        reporter.progress((number + 1) / 600)


def make(request, context):
    if request.name.startswith("slow"):
        slowly = Step("encode slowly", "encode slowly", 20_600_000_000, 40)
        context.reporter.plan([Step("start", "start"), slowly])
        last(context.reporter, slowly.id, 60)
    return MAKE(request, context)


def download(request, context):
    """The catalogue's model files are not for a test's network: the same events, at the speed of a good line."""
    context.reporter.plan([Step("download", "download", 19_000_000_000)])
    last(context.reporter, "download", 30)
    return DownloadResult(request.model, [])


if __name__ == "__main__":
    OPERATIONS.update(make=make, download=download)
    sys.exit(main.main())
