"""The HTTP interface as OpenAPI 3.1 describes it."""

from __future__ import annotations

from typing import Any

from i2l_ext import __version__
from i2l_ext.webui.client_fields import BODIES, FORMS, QUERY, body_schema, form_schema, schema
from i2l_ext.webui.statuses import REFUSALS

ROOT = "/i2l/v1"

_JOB = {
    "type": "object",
    "required": ["id", "kind", "state"],
    "properties": {
        "id": {"type": "string"},
        "kind": {"type": "string"},
        "title": {"type": "string"},
        "state": {"enum": ["waiting", "running", "stopping", "done", "failed", "cancelled"]},
        "share": {"type": "number"},
        "seconds": {"type": "number"},
        "error": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]},
    },
}


def description() -> dict[str, Any]:
    """The document."""
    job = {"$ref": "#/components/schemas/Job"}
    id = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    jobs = {"type": "array", "items": job}
    bodies = {
        path: {"post": _takes("application/json", body_schema(path))
               | _gives(202, jobs if path.startswith("/library/") else job)}
        for path in BODIES
    }  # fmt: skip
    forms = {path: {"post": _takes("multipart/form-data", form_schema(path)) | _gives(202, job)} for path in FORMS}
    query = [
        {"name": name, "in": "query", "description": told.pop("description"), "schema": told}
        for name, told in ((name, schema(field)) for name, field in QUERY.items())
    ]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Image to LoRA", "version": __version__},
        "servers": [{"url": ROOT}],
        "paths": {
            **forms,
            "/loras": {"get": _gives(200, jobs), **forms["/loras"]},
            "/library": {"get": {"parameters": query} | _gives(200, {"type": "object"})},
            "/loras/{id}": {"parameters": [id], "get": _gives(200, job), "delete": _gives(202, job)},
            "/models": {"get": _gives(200, {"type": "array", "items": {"type": "object"}})},
            **bodies,
        },
        "components": {"schemas": {"Job": _JOB}},
    }


def _takes(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


def _gives(status: int, schema: dict[str, Any]) -> dict[str, Any]:
    refused = {str(code): {"description": text} for code, text in REFUSALS.items()}
    good = {"description": "OK", "content": {"application/json": {"schema": schema}}}
    return {"responses": {str(status): good, **refused}}
