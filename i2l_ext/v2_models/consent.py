"""Which code of others the user has agreed to run, by the hash of the whole repository. Another hash asks again."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from i2l_ext.converters import atomic
from i2l_ext.converters.errors import UserError
from i2l_ext.v2_models.repository import TemplateRepository


def record_path() -> Path:
    """Where the answers are kept: one file for each user of this machine."""
    from platformdirs import user_data_dir

    return Path(user_data_dir("i2l", appauthor=False)) / "trusted.json"


def agreed_digests() -> dict[str, Any]:
    """What was agreed to, by digest; nothing where the record is missing or damaged."""
    try:
        held = json.loads(record_path().read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    held = held if isinstance(held, dict) else {}
    return {digest: noted for digest, noted in held.items() if isinstance(noted, dict)}


def has_consent(repository: TemplateRepository) -> bool:
    """Whether the user has agreed to run exactly this."""
    return repository.digest in agreed_digests()


def agree(repository: TemplateRepository, digest: str) -> None:
    """Write down that the user agrees to run the code whose digest he was shown.

    Raises UserError where that is not what lies there now, and where it cannot be written down.
    """
    if digest.strip().lower() != repository.digest:
        raise UserError(f"{repository.repo}: its files have the digest {repository.digest}, not the one named.")
    noted = {"repo": repository.repo, "revision": repository.revision, "agreed": _now()}
    record = record_path()
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        atomic.replace_text(record, json.dumps(agreed_digests() | {repository.digest: noted}, indent=1))
    except OSError as error:
        raise UserError(f"{record}: cannot be written ({error.strerror}), so the answer is not kept.") from None


def withdraw(repository: TemplateRepository) -> bool:
    """Forget every agreement to this repository, whatever the digest; whether there was one."""
    held = agreed_digests()
    kept = {digest: noted for digest, noted in held.items() if noted.get("repo") != repository.repo}
    if kept == held:
        return False
    atomic.replace_text(record_path(), json.dumps(kept, indent=1))
    return True


def _now() -> str:
    return f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
