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
from i2l_ext.requests import (
    BatchRequest,
    ConvertRequest,
    DownloadRequest,
    ExportRequest,
    Field,
    FieldInfo,
    MakeRequest,
    MergeRequest,
    RankRequest,
    RepairRequest,
    Request,
    TrustRequest,
)
from i2l_ext.service.batches import MAX_GROUPED
from i2l_ext.service.library import View
from i2l_ext.service.settings import AS_MADE
from i2l_ext.service.uploads import MAX_PICTURES

_NOT_OFFERED = frozenset({"blocks", "kinds"})
"""Fields of a MakeRequest that the interface does not have."""

_OF_ONE = frozenset({"name", "weights", "grey"})
"""Those that make no sense for several LoRAs at once."""


def _text(name: str, help: str) -> Field:
    return Field(name, str, False, False, MISSING, FieldInfo(help))


def _offered(request: type[Request]) -> dict[str, Field]:
    return {name: field for name, field in request.fields().items() if not field.info.local}


_LORA = _text("lora", "a LoRA, by its path inside the LoRA folder")
_LORAS = {"loras": Field("loras", str, True, False, MISSING, FieldInfo("LoRAs, by their paths inside the LoRA folder"))}

_FORM: Mapping[str, Field] = {
    **{name: field for name, field in _offered(MakeRequest).items() if name not in _NOT_OFFERED},
    "subfolder": _text("subfolder", "inside the LoRA folder"),
}

FORMS: Mapping[str, Mapping[str, Field]] = {
    "/loras": _FORM,
    "/batches": {
        **{name: field for name, field in _FORM.items() if name not in _OF_ONE},
        "names": BatchRequest.fields()["names"],
    },
}
"""Path of a POST with a form -> its fields beside ``pictures``."""

QUERY: Mapping[str, Field] = {
    **_offered(View),
    "previews": Field("previews", bool, False, False, False, FieldInfo("with a small picture of each, as a data URI")),
}
"""The query of GET /library."""

BODIES: Mapping[str, Mapping[str, Field]] = {
    "/inspect": {"lora": _LORA},
    "/convert": {"lora": _LORA, "to": ConvertRequest.fields()["key_format"]},
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
    "/library/convert": {**_LORAS, "to": ConvertRequest.fields()["key_format"]},
    "/library/repair": {**_LORAS, "consumer": RepairRequest.fields()["consumer"]},
    "/library/rank": _LORAS,
    "/library/merge": {
        **_LORAS, "weights": Field("weights", float, True, False, MISSING, FieldInfo("one for each of them")),
    },
    "/library/discard": _LORAS,
    "/library/anew": _LORAS,
}  # fmt: skip
"""Path of a POST with a JSON body -> its fields that are needed."""

OPTIONAL: Mapping[str, Mapping[str, Field]] = {
    "/download": {"packed": DownloadRequest.fields()["packed"]},
    "/export": {"caption": ExportRequest.fields()["caption"]},
    "/library/convert": {name: field for name, field in _offered(ConvertRequest).items() if name != "key_format"},
    "/library/rank": _offered(RankRequest),
    "/library/merge": _offered(MergeRequest),
}
"""The same -> those that may be left out."""


def parse_form(path: str, form: Mapping[str, str]) -> dict[str, Any]:
    """Python values of the fields of a form that are filled in. Raises UserError."""
    return _parse_texts(FORMS[path], form)


def parse_query(query: Mapping[str, str]) -> dict[str, Any]:
    """Python values of the query of GET /library. Raises UserError."""
    return _parse_texts(QUERY, query)


def _parse_texts(fields: Mapping[str, Field], texts: Mapping[str, str]) -> dict[str, Any]:
    if unknown := sorted(set(texts) - set(fields)):
        raise UserError(f"Unknown fields: {', '.join(unknown)[:200]}.")
    values = {name: _parse(name, fields[name], text) for name, text in texts.items()}
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
    """The values of a body that has all fields of a path that are needed, and no others than may be there. Raises
    UserError."""
    needed, fields = BODIES[path], {**BODIES[path], **OPTIONAL.get(path, {})}
    if not isinstance(body, dict) or not needed.keys() <= body.keys() <= fields.keys():
        more = f" and, if you like, {', '.join(OPTIONAL[path])}" if path in OPTIONAL else ""
        raise UserError(f"Send an object with the fields {', '.join(needed)}{more}.")
    for name in body:
        if body[name] is None or not fields[name].accepts(body[name]):
            raise _wrong_type(name, fields[name])
    return {name: fields[name].parse(body[name]) for name in fields if name in body}


def _wrong_type(name: str, field: Field) -> UserError:
    if field.type is str and not field.many:
        return UserError(f"{name} is not a text without control characters.")
    return UserError(f"{name} is not of type {'list' if field.many else field.type.__name__}.")


def schema(field: Field, *, text: bool = False) -> dict[str, Any]:
    """A field as JSON Schema has it. As ``text``, of a form, a list is a text with JSON in it."""
    kinds = {str: "string", int: "integer", float: "number", bool: "boolean"}
    info = field.info
    told: dict[str, Any] = {"type": kinds[field.type]}
    bounds = {"minimum": info.minimum, "maximum": info.maximum, "enum": list(info.choices) or None}
    told |= {key: bound for key, bound in bounds.items() if bound is not None}
    if field.many:
        told = {"type": "string"} if text else {"type": "array", "items": told}
    help = re.sub(r" \(default.*\)$|[,;] [^,;]* unless given$", "", info.help)
    return {**told, "description": f"{help}: a list, as JSON" if field.many and text else help}


def form_schema(path: str) -> dict[str, Any]:
    """The form of a path."""
    most = MAX_PICTURES if path == "/loras" else MAX_GROUPED
    pictures = {"type": "array", "maxItems": most, "items": {"type": "string", "format": "binary"}}
    fields = {name: schema(field, text=True) for name, field in FORMS[path].items()}
    required = ["pictures", *(name for name in ("name",) if name in fields)]
    return {"type": "object", "required": required, "properties": {"pictures": pictures, **fields}}


def body_schema(path: str) -> dict[str, Any]:
    """The JSON body of a path."""
    needed = BODIES[path]
    fields = {name: schema(field) for name, field in {**needed, **OPTIONAL.get(path, {})}.items()}
    return {"type": "object", "required": list(needed), "additionalProperties": False, "properties": fields}
