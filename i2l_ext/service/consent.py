"""The user's agreement to run the code of v2 models: what was shown to whom, and what was answered."""

from __future__ import annotations

import secrets
from threading import Lock
from typing import TYPE_CHECKING, Any

from i2l_ext.converters.errors import UserError
from i2l_ext.engine.job import Job
from i2l_ext.requests import SetupPlanRequest, SetupRequest, TrustRequest

if TYPE_CHECKING:
    from i2l_ext.service.service import Service

MOST_OFFERS = 64
"""Questions on pages that can still be answered: the last."""


class ConsentNeeded(UserError):
    """The model that was chosen brings code that the user has not agreed to."""

    def __init__(self, model: str) -> None:
        super().__init__(f"{model} brings code of its own, and you have not agreed to run it.", "untrusted")
        self.model = model


class Consents:
    """Nobody agrees to what he was not shown: a digest counts only after a job has shown it, and a page answers with
    the token of the very question that it asked. Agreeing is for those who sit at this machine."""

    def __init__(self, service: Service) -> None:
        self._service, self._lock = service, Lock()
        self._offers: dict[str, tuple[str, str]] = {}

    def is_needed(self, model: str) -> bool:
        """Whether the model's code is here and the user has agreed to no state of it. Another state than the one he
        agreed to is seen when it is to run: then the make fails with the code ``untrusted``."""
        for job in sorted(self._service.queue.jobs(), key=lambda job: job.ended or 0, reverse=True):
            if job.kind == "trust" and job.state == "done" and job.title == model:
                return not job.result["agreed"]
            if job.kind == "make" and job.code == "untrusted" and job.request.get("model") == model:
                return True
        row: Any = next((row for row in self._service.models.rows() or () if row["name"] == model), {})
        return bool(row.get("has_code") and row["ready"] and not row.get("agreed"))

    def look(self, model: str) -> Job:
        """See whose code a v2 model brings. Raises UserError, QueueFull."""
        self._service.models.find(model)
        return self._service.submit(model, TrustRequest(model))

    def agree(self, model: str, digest: str) -> Job:
        """Agree to run the code of exactly this digest. Raises UserError where the page is open to others, and where
        nobody was shown that digest."""
        self._must_be_local(model)
        done = (job for job in self._service.queue.jobs() if job.kind == "trust" and job.state == "done")
        if (model, digest) not in ((job.title, job.result["digest"]) for job in done):
            raise UserError(f"See first whose code {model} brings: its digest was not shown yet.", "untrusted")
        return self._service.submit(model, TrustRequest(model, digest))

    def withdraw(self, model: str) -> Job:
        """Agree no longer. Raises UserError where the page is open to others."""
        self._must_be_local(model)
        return self._service.submit(model, TrustRequest(model, withdraw=True))

    def offer(self, job: Job) -> str:
        """A token for the page that shows what ``job`` has found: its button brings it back, once."""
        token = secrets.token_urlsafe(24)
        with self._lock:
            self._offers[token] = job.title, job.result["digest"]
            for old in list(self._offers)[:-MOST_OFFERS]:
                del self._offers[old]
        return token

    def accept(self, token: str) -> Job:
        """Agree to what the page with this token has shown. Raises UserError as ``agree``, and for a token that is not,
        or no longer, known."""
        with self._lock:
            offered = self._offers.pop(token, None)
        if offered is None:
            raise UserError("That question is out of date. Look at the code again.", "untrusted")
        return self.agree(*offered)

    def plan_setup(self) -> Job:
        """What setting up DiffSynth-Studio, through which they run, would do."""
        return self._service.submit("DiffSynth-Studio", SetupPlanRequest())

    def set_up(self) -> Job:
        """Set it up. Raises UserError where the page is open to others."""
        if not self._service.host.is_local:  # set up
            raise UserError("Set that up at the machine itself: i2l models diffsynth", "forbidden")
        return self._service.submit("DiffSynth-Studio", SetupRequest(agreed=True))

    def _must_be_local(self, model: str) -> None:
        if not self._service.host.is_local:  # agree
            raise UserError(f"Agree to that at the machine itself: i2l models trust {model}", "forbidden")
