"""The engine with the tests' small models in its catalogue, and a few jobs that misbehave. Run as a script."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]


def slow(request, tell):
    tell.plan([{"title": "start"}, {"title": "slow", "bytes": 1000, "layers": 10}])
    tell.step("slow")
    times = int(request.get("times", 1000))
    for number in range(times):
        time.sleep(0.02)
        tell.check()
        tell.progress((number + 1) / times)
    return {"slept": True}


def deaf(request, tell):
    tell.plan([{"title": "deaf"}])
    time.sleep(60)


def die(request, tell):
    os.kill(os.getpid(), 9)


def fail(request, tell):
    print("a line for nobody")
    raise MemoryError("not enough of it")


def refuse(request, tell):
    from i2l_ext.converters.errors import UserError

    raise UserError("weights are missing: i2l models download")


def babble(request, tell):
    tell._out.write(b'not json\n{"event": 7}\n[1, 2]\n{"event": "step", "step": "x"}\n\n' + b"[" * 100_000 + b"\n")
    return "fine"


def large(request, tell):
    return "x" * (5 << 20)


def late(request, tell):
    """What cannot be broken off any more when it is told to stop."""
    while not tell.cancelled.is_set():
        time.sleep(0.02)
    time.sleep(1.5)
    return "in time"


def parent(request, tell):
    """Something that it has started outlives it, and holds its stderr."""
    subprocess.Popen(["sleep", "8"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return "born"


def with_small(work):
    def run(request, tell):
        from i2l_ext.models import catalogue
        from small_models import SMALL

        small = replace(SMALL["small"], name=os.environ.get("I2L_TEST_NAME", "small"))
        catalogue.MODELS = {small.name: small, **SMALL, **catalogue.MODELS}
        return work(request, tell)

    return run


if __name__ == "__main__":
    from i2l_ext.worker import main, tasks

    own = (slow, deaf, die, fail, refuse, babble, large, late, parent)
    tasks.WORK.update({work.__name__: work for work in own})
    if os.environ.get("I2L_TEST_SMALL"):
        names = ("make", "models", "download", "verify")
        tasks.WORK.update({name: with_small(tasks.WORK[name]) for name in names})
    sys.exit(main.main())
