"""The engine with the tests' small models in its catalogue, and jobs that misbehave. Run as a script."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from i2l_ext.converters.errors import UserError  # noqa: E402
from i2l_ext.operations import OPERATIONS, Step  # noqa: E402
from i2l_ext.requests import REQUESTS, Request  # noqa: E402
from i2l_ext.requests.fields import option  # noqa: E402


@dataclass(frozen=True)
class Trial(Request):
    """A job that misbehaves, by its kind."""

    times: int = option("steps of a slow one", 1000)
    text: str = option("any text", "")


@dataclass(frozen=True)
class Answer:
    value: Any

    def json(self):
        return self.value


def slow(request, reporter):
    reporter.plan([Step("start", "start"), Step("slow", "slow", 1000, 10)])
    reporter.begin("slow")
    for number in range(request.times):
        time.sleep(0.02)
        reporter.check()
        reporter.progress((number + 1) / request.times)
    return {"slept": True}


def deaf(request, reporter):
    reporter.plan([Step("deaf", "deaf")])
    time.sleep(60)


def die(request, reporter):
    os.kill(os.getpid(), 9)


def fail(request, reporter):
    print("a line for nobody")
    raise MemoryError("not enough of it")


def refuse(request, reporter):
    raise UserError("model files are missing: i2l models download", "weights_missing")


def note(request, reporter):
    reporter.note("two keys\nwere left out")
    return "noted"


def babble(request, reporter):
    reporter._out.write(b'not json\n{"event": 7}\n[1, 2]\n{"event": "step", "step": "x"}\n\n' + b"[" * 100_000 + b"\n")
    return "fine"


def large(request, reporter):
    return "x" * (5 << 20)


def late(request, reporter):
    """What cannot be interrupted any more when it is told to stop."""
    while not reporter.cancelled():
        time.sleep(0.02)
    time.sleep(1.5)
    return "in time"


def parent(request, reporter):
    """A process that it has started outlives it, and holds its stderr."""
    subprocess.Popen(["sleep", "8"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return "born"


TRIALS = (slow, deaf, die, fail, refuse, note, babble, large, late, parent)

if __name__ == "__main__":
    from i2l_ext.worker import main

    for trial in TRIALS:
        REQUESTS[trial.__name__] = type(trial.__name__, (Trial,), {"kind": trial.__name__})
        OPERATIONS[trial.__name__] = lambda request, context, trial=trial: Answer(trial(request, context.reporter))
    if os.environ.get("I2L_TEST_SMALL"):
        from i2l_ext.models import catalogue
        from small_models import SMALL

        small = replace(SMALL["small"], name=os.environ.get("I2L_TEST_NAME", "small"))
        catalogue.MODELS = {small.name: small, **SMALL, **catalogue.MODELS}
    sys.exit(main.main())
