"""The engine, with work that can be made to last: a LoRA whose name begins with ``slow`` takes a minute first, a folder
of several styles too. One whose name begins with ``late`` ends some seconds after its files have their names."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from i2l_ext.operations import OPERATIONS, Step
from i2l_ext.operations.models import DownloadResult
from i2l_ext.worker import main, tasks

LATE = 5
"""Seconds."""

DRAWN = ("my_style", "dusk", "meadow")
"""Beginnings of the names of those with which the miniature draws: that takes longer than all the rest."""

DRAW = tasks.LATER["make"]
MAKE, BATCH = OPERATIONS["make"], OPERATIONS["batch"]


def last(reporter, step, seconds):
    """Report progress on a step for so long."""
    reporter.begin(step)
    for number in range(600):
        time.sleep(seconds / 600)
        reporter.check()
        reporter.progress((number + 1) / 600)


def slow(operation, source):
    """``operation``, a minute later where its source is called so."""

    def run(request, context):
        if source(request).startswith("slow"):
            slowly = Step("encode slowly", "encode slowly", 20_600_000_000, 40)
            context.reporter.plan([Step("start", "start"), slowly])
            last(context.reporter, slowly.id, 60)
        result = operation(request, context)
        if source(request).startswith("late"):
            time.sleep(LATE)
        return result

    return run


def download(request, context):
    """The catalogue's model files are not for a test's network: the same events, at the speed of a good line."""
    context.reporter.plan([Step("download", "download", 19_000_000_000)])
    last(context.reporter, "download", 30)
    return DownloadResult(request.model, [])


def draw(made, message):
    return DRAW(made, message) if made.name.startswith(DRAWN) else {}


if __name__ == "__main__":
    tasks.LATER = {"make": draw}
    make = slow(MAKE, lambda request: request.name)
    batch = slow(BATCH, lambda request: request.pictures[0].name)
    OPERATIONS.update(make=make, batch=batch, download=download)
    sys.exit(main.main())
