"""What a long measurement has found so far, on disk: a run that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from i2l_ext.converters.atomic import atomic_path


@dataclass(frozen=True)
class Records:
    """What was measured in this process, and in a folder, if there is one, a JSON file for each result."""

    folder: Path | None = None
    known: dict[str, Any] = field(default_factory=dict)

    def get(self, conditions: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """The result under these conditions, measured now unless it is there. Both are plain values for JSON.

        ``conditions`` must hold all that the result depends on. A result whose file cannot be read is measured again.
        """
        text = json.dumps(conditions, sort_keys=True)
        if text not in self.known:
            path = self.folder and self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
            self.known[text] = _kept_result(path, conditions, measure) if path else measure()
        return self.known[text]


def _kept_result(path: Path, conditions: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["result"]
    except (OSError, ValueError, KeyError, TypeError):
        result = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, overwrite=True) as part:
        part.write_text(json.dumps({"conditions": conditions, "result": result}) + "\n", encoding="utf-8")
    return result
