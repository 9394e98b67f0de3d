"""One engine at a time on a machine, whichever programs ask: a WebUI and ComfyUI beside it share memory and card.

Whoever runs a long job holds a lock in the user's own temporary folder. Standard library only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from i2l_ext.converters.errors import UserError
from i2l_ext.engine.locks import Lock
from i2l_ext.engine.temp_folder import own_temp_folder

VARIABLE = "I2L_ENGINE_LOCK"
"""Names another file for the lock: programs with different ones run their engines beside each other."""

ASK_SECONDS = 0.2


def lock_path() -> Path:
    """The file of this user's programs. Raises UserError where the user has no temporary folder of his own."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else own_temp_folder() / "engine.lock"


@contextmanager
def machines_turn(wanted: Callable[[], bool]) -> Iterator[None]:
    """Held while a long job runs. Another process that holds it is waited for, as long as the job is ``wanted``. Where
    the disk has no locks, or the user no temporary folder of his own, nobody waits."""
    try:
        path = lock_path()
    except (OSError, UserError):
        yield
        return
    turn, probe = Lock(path), Lock(path.with_name(f"{path.name}.{os.getpid()}"))
    locks = probe.acquire()
    if locks:
        probe.release()
        with suppress(OSError):
            probe.path.unlink(missing_ok=True)
    while locks and not turn.acquire() and wanted():
        time.sleep(ASK_SECONDS)
    try:
        yield
    finally:
        turn.release()
