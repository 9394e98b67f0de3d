"""Whose code a v2 model brings, and the user's agreement to run it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from i2l_ext import requests
from i2l_ext.converters.errors import UserError
from i2l_ext.models import catalogue, store
from i2l_ext.operations.context import Context
from i2l_ext.v2_models import consent
from i2l_ext.v2_models.cage import strongest_cage
from i2l_ext.v2_models.python import find_python
from i2l_ext.v2_models.repository import CODE, TemplateRepository


@dataclass(frozen=True)
class TrustResult:
    """What would run. ``digest``: what the user agrees to; ``code``: sha256 of model.py, and ``text`` what it says;
    ``files``: sha256 of every file; ``cage``: what this system ``stops`` and what it ``lets`` happen, in one line;
    ``agreed``: whether exactly this may run; ``diffsynth``: the version through which it runs, None where there is
    none."""

    model: str
    repo: str
    revision: str
    source: str
    licence: str
    folder: str
    digest: str
    code: str
    files: dict[str, str]
    cage: str
    agreed: bool
    text: str
    stops: tuple[str, ...]
    lets: tuple[str, ...]
    diffsynth: str | None

    def json(self) -> dict[str, Any]:
        return asdict(self)


def trust_model(request: requests.TrustRequest, context: Context) -> TrustResult:
    """What a model's code is; with a ``digest``, or ``withdraw``, the agreement to it is changed.

    Raises UserError for a model without code, or that is not here, and for a digest that is not its own.
    """
    model = catalogue.find(request.model)
    if model.template is None:
        raise UserError(f"{model.name} has no code of its own: there is nothing to agree to.")
    [[first, *_]] = store.require(model).values()
    repository = TemplateRepository(first.parent, model.template.repo or "", model.name, context.reporter.check)
    if request.withdraw:
        consent.withdraw(repository)
    elif request.digest is not None:
        consent.agree(repository, request.digest)
    cage = strongest_cage()
    return TrustResult(
        model.name, repository.repo, repository.revision, repository.source, model.template.licence,
        str(repository.folder), repository.digest, repository.hashes[CODE], repository.hashes, cage.line,
        consent.has_consent(repository), repository.text, cage.stops, cage.lets, _diffsynth(context),
    )  # fmt: skip


def _diffsynth(context: Context) -> str | None:
    try:
        return find_python(context.options.diffsynth).version
    except UserError:
        return None
