"""The models and which of their files are here, as the engine finds them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

from i2l_ext.converters.errors import UserError
from i2l_ext.engine.process import ROOT
from i2l_ext.engine.queue import ENDED, Job, Queue, QueueFull
from i2l_ext.requests import ModelsRequest
from i2l_ext.service.settings import HUB_TITLES

MINIATURE = "mini"

CHANGES_MODELS = frozenset({"download", "verify", "trust"})
"""Kinds of jobs after which other model files are here, or are known to be sound or agreed to."""

HUB_CLIENTS = {"modelscope": "modelscope_hub"}
"""``source`` of a DownloadRequest -> the package that it needs, where the set-up does not install it."""


class ModelList:
    """Asks the engine for the models once, and again when they may have changed. ``preferred()``: the user's default
    model; "" for none."""

    def __init__(self, queue: Queue, preferred: Callable[[], str]) -> None:
        self._queue, self._preferred, self._lock = queue, preferred, Lock()
        self._rows: list[dict[str, Any]] | None = None
        self._search: Job | None = None
        self._outdated = False
        self._ended: frozenset[str] = frozenset()
        self.failed: Job | None = None
        """The last search, if it failed."""

    def rows(self, *, refresh: bool = False) -> list[dict[str, Any]] | None:
        """The models as ``i2l models --json`` lists them; None until they are known. A search that failed is repeated
        only with ``refresh``."""
        with self._lock:
            before, self._ended = self._ended, self._queue.ended(CHANGES_MODELS)
            # also of a search that runs: it may have passed what has changed
            self._outdated |= refresh or not self._ended <= before
            if self._search and self._search.state in ENDED:
                done = self._search.state == "done"
                self._rows = self._search.result if done else self._rows
                self.failed, self._search = None if done else self._search, None
            if self._search is None and (self._outdated or (self._rows is None and self.failed is None)):
                with suppress(QueueFull):  # the next call tries again
                    message = {"request": ModelsRequest().json()}
                    self._search, self._outdated = self._queue.submit("models", "", message), False
            return self._rows

    def find(self, name: str) -> Mapping[str, Any]:
        """The row of a model. Raises UserError where there is no such model."""
        rows = self.rows() or ()
        if row := next((row for row in rows if row["name"] == name), None):
            return row
        known = f" There are: {', '.join(sorted(row['name'] for row in rows))}." if rows else ""
        raise UserError(f"There is no model {str(name)[:80]!r}.{known}", "unknown_choice")

    def choose(self, *wanted: object) -> str:
        """The model to begin with: the first of ``wanted`` that exists, else the user's default, else the first
        downloaded one, else the miniature."""
        rows = self.rows() or ()
        names = [row["name"] for row in rows]
        downloaded = [
            row["name"]
            for row in rows
            if row["ready"] and not row.get("has_code") and any(part["repo"] for part in row["parts"])
        ]
        return next((name for name in (*wanted, self._preferred(), *downloaded) if name in names), MINIATURE)


def with_disk(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row, with ``fetched_bytes``: what broken-off downloads have left of it, and ``free_bytes`` of the disk that
    downloads go to; None where that cannot be read."""
    folder = Path(row["download_folder"])
    fetched, free = 0, None
    with suppress(OSError):
        for repo in {part["repo"] for part in missing_parts(row)}:
            fetched += sum(path.stat().st_size for path in (folder / repo).rglob(".*.part"))
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    return {**row, "fetched_bytes": min(fetched, row["download_bytes"]), "free_bytes": free}


def available_hubs() -> list[str]:
    """The titles of the hubs whose client the engine has: in this Python, or among its own packages."""
    own = ROOT / ".private" / "site-packages"
    return [
        title for title, source in HUB_TITLES.items()
        if source not in HUB_CLIENTS or find_spec(HUB_CLIENTS[source]) or (own / HUB_CLIENTS[source]).is_dir()
    ]  # fmt: skip


def missing_parts(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The model files of a row that have to be downloaded."""
    return [part for part in row["parts"] if part["repo"] and not part["present"]]
