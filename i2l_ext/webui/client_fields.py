"""What a client of the HTTP interface may fill in: fields of requests, by their names in the interface.

Type, range, choices and help of a field come from its request. Fields that are ``local`` are never among them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

from i2l_ext.converters.errors import UserError
from i2l_ext.requests import ConvertRequest, DownloadRequest, ExportRequest, Field, FieldInfo, MakeRequest, TrustRequest
from i2l_ext.service.settings import AS_MADE
from i2l_ext.service.uploads import MAX_PICTURES

_NOT_OFFERED = frozenset({"blocks", "kinds"})
"""Fields of a MakeRequest that the interface does not have."""


def _text(name: str, help: str) -> Field:
    return Field(name, str, False, False, MISSING, FieldInfo(help))


_LORA = _text("lora", "a LoRA, by its path inside the LoRA folder")

FORM: Mapping[str, Field] = {
    **{
        name: field for name, field in MakeRequest.fields().items() if not field.info.local and name not in _NOT_OFFERED
    },
    "subfolder": _text("subfolder", "inside the LoRA folder"),
}
"""The form fields of POST /loras beside ``pictures``."""

BODIES: Mapping[str, Mapping[str, Field]] = {
    "/inspect": {"lora": _LORA},
    "/convert": {"lora": _LORA, "to": ConvertRequest.fields()["dialect"]},
    "/export": {
        "lora": _LORA, "trainer": ExportRequest.fields()["trainer"], "rank": ExportRequest.fields()["rank"],
    },
    "/download": {
        "model": DownloadRequest.fields()["model"], "source": DownloadRequest.fields()["source"],
        "agree": DownloadRequest.fields()["agreed"],
    },
    "/trust": {
        "model": TrustRequest.fields()["model"],
        "digest": _text("digest", "agree to run the code of exactly this digest; empty: only see it"),
    },
}  # fmt: skip
"""Path of a POST with a JSON body -> its fields, all of which are needed."""


def parse_form(form: Mapping[str, str]) -> dict[str, Any]:
    """Python values of the form fields that are filled in. Raises UserError."""
    if unknown := sorted(set(form) - set(FORM)):
        raise UserError(f"Unknown fields: {', '.join(unknown)[:200]}.")
    values = {name: _parse(name, FORM[name], text) for name, text in form.items()}
    return {name: value for name, value in values.items() if value is not None}


def _parse(name: str, field: Field, text: str) -> Any:
    if field.info.choices and text in ("", AS_MADE):
        return None
    try:
        value = json.loads(text) if _is_json(field) else text if field.type is str else field.type(text)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise _wrong_type(name, field) from None
    if value is None or not field.accepts(value):
        raise _wrong_type(name, field)
    return field.parse(value)


def _is_json(field: Field) -> bool:
    """Whether a form has the field's JSON: of lists, and of true and false, which bool() would both take for true."""
    return field.many or field.type is bool


def parse_body(path: str, body: Any) -> dict[str, Any]:
    """The values of exactly the fields of a path. Raises UserError."""
    fields = BODIES[path]
    if not isinstance(body, dict) or set(body) != set(fields):
        raise UserError(f"Send an object with the fields {', '.join(fields)}.")
    for name, field in fields.items():
        if body[name] is None or not field.accepts(body[name]):
            raise _wrong_type(name, field)
    return {name: field.parse(body[name]) for name, field in fields.items()}


def _wrong_type(name: str, field: Field) -> UserError:
    if field.type is str and not field.many:
        return UserError(f"{name} is not a text without control characters.")
    return UserError(f"{name} is not of type {'list' if field.many else field.type.__name__}.")


def schema(field: Field) -> dict[str, Any]:
    """A field as JSON Schema has it. In a form, lists are texts with JSON in them."""
    kinds = {str: "string", int: "integer", float: "number", bool: "boolean"}
    info = field.info
    told: dict[str, Any] = {"type": "string" if field.many else kinds[field.type]}
    bounds = {"minimum": info.minimum, "maximum": info.maximum, "enum": list(info.choices) or None}
    told |= {key: bound for key, bound in bounds.items() if bound is not None}
    help = re.sub(r" \(default.*\)$|[,;] [^,;]* unless given$", "", info.help)
    return {**told, "description": f"{help}: a list, as JSON" if field.many else help}


def form_schema() -> dict[str, Any]:
    """The form of POST /loras."""
    pictures = {"type": "array", "maxItems": MAX_PICTURES, "items": {"type": "string", "format": "binary"}}
    fields = {name: schema(field) for name, field in FORM.items()}
    return {"type": "object", "required": ["pictures", "name"], "properties": {"pictures": pictures, **fields}}


def body_schema(path: str) -> dict[str, Any]:
    """The JSON body of a path."""
    fields = {name: schema(field) for name, field in BODIES[path].items()}
    return {"type": "object", "required": list(fields), "additionalProperties": False, "properties": fields}
