"""The HTTP interface, for programs: jobs asked for, watched and cancelled. Described in docs/http.md.

Served only where the host serves its own (``--api``), and behind its credentials. Other sites' pages in the same
browser are kept out by the Origin and the Host header. No path is ever taken from a client.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from i2l_ext import __version__
from i2l_ext.converters.errors import UserError
from i2l_ext.engine.queue import Busy, Job
from i2l_ext.webui import disk
from i2l_ext.webui.access import NEAR, Gate, Refused
from i2l_ext.webui.service import Desk, Wish
from i2l_ext.webui.uploads import MOST_PICTURES

ROOT = "/i2l/v1"
MOST_BODY, MOST_JSON = 512 << 20, 64 << 10

FIELDS: Mapping[str, tuple[type, str]] = {
    "name": (str, "the LoRA's name"),
    "model": (str, "see /models; the first that is downloaded, else mini, unless given"),
    "weights": (list, "a number for each picture, as JSON"),
    "strength": (float, "scales the whole effect"),
    "rank": (int, "as made unless given"),
    "dialect": (str, "key names"),
    "dtype": (str, "number format"),
    "subfolder": (str, "inside the LoRA folder"),
    "description": (str, "for the card"),
    "activation_text": (str, "for the card"),
}
"""The form fields of POST /loras beside ``pictures``."""


Handler = Callable[[Request], Awaitable[tuple[int, Any]]]


def add(app: Any, desk: Desk, credentials: Sequence[tuple[str, str]] = ()) -> None:
    """Put the routes before those of the host, some of which take every path."""
    desk.models()
    gate = Gate(NEAR if desk.host.local else None, credentials)
    app.router.routes[:0] = [
        Route(ROOT + path, _guarded(gate, handler), methods=[method])
        for (method, path), handler in _handlers(desk).items()
    ]


def _handlers(desk: Desk) -> dict[tuple[str, str], Handler]:
    async def looked_for() -> list[dict[str, Any]]:
        rows = await run_in_threadpool(desk.models)
        if rows is None:
            raise Refused(503, "The models are being looked for. Ask again in a few seconds.")
        return rows

    async def make(request: Request) -> tuple[int, Any]:
        form = await _form(request)
        files = [value for value in form.getlist("pictures") if isinstance(value, UploadFile)]
        if len(files) > MOST_PICTURES:
            raise Refused(413, f"At most {MOST_PICTURES} pictures.")
        values = {key: _field(key, form[key]) for key in form if key in FIELDS}
        if unknown := sorted(set(form) - set(FIELDS) - {"pictures"}):
            raise Refused(422, f"Unknown fields: {', '.join(unknown)[:200]}.")
        ids = [await run_in_threadpool(desk.uploads.take_stream, file.file) for file in files]
        if "model" not in values:
            await looked_for()
            values["model"] = await run_in_threadpool(desk.chosen)
        wish = Wish(pictures=ids, **{"name": "", **values})
        return 202, _shown(await run_in_threadpool(desk.make, wish))

    async def jobs(request: Request) -> tuple[int, Any]:
        return 200, [_shown(job) for job in desk.queue.jobs() if job.kind not in ("look", "models")]

    async def job(request: Request) -> tuple[int, Any]:
        return 200, _shown(_find(desk, request))

    async def cancel(request: Request) -> tuple[int, Any]:
        found = _find(desk, request)
        await run_in_threadpool(desk.queue.cancel, found.id)
        return 202, _shown(found)

    async def inspect(request: Request) -> tuple[int, Any]:
        [name] = await _json(request, lora=str)
        return 202, _shown(await run_in_threadpool(lambda: desk.inspect(desk.lora(name), name)))

    async def convert(request: Request) -> tuple[int, Any]:
        name, dialect = await _json(request, lora=str, to=str)
        return 202, _shown(await run_in_threadpool(lambda: desk.convert(desk.lora(name), name, dialect)))

    async def export(request: Request) -> tuple[int, Any]:
        name, trainer, rank = await _json(request, lora=str, trainer=str, rank=int)
        return 202, _shown(await run_in_threadpool(lambda: desk.export(desk.lora(name), name, trainer, rank)))

    async def models(request: Request) -> tuple[int, Any]:
        keys = ("name", "arch", "line", "ready", "download_bytes")
        parts = ("id", "bytes", "repo", "licence", "present")
        return 200, [
            {**{key: row[key] for key in keys}, "parts": [{key: part[key] for key in parts} for part in row["parts"]]}
            for row in await looked_for()
        ]

    async def download(request: Request) -> tuple[int, Any]:
        model, source, agree = await _json(request, model=str, source=str, agree=bool)
        await looked_for()
        return 202, _shown(await run_in_threadpool(lambda: desk.download(model, source, agreed=agree)))

    async def openapi(request: Request) -> tuple[int, Any]:
        return 200, description()

    return {
        ("POST", "/loras"): make, ("GET", "/loras"): jobs, ("GET", "/loras/{id}"): job,
        ("DELETE", "/loras/{id}"): cancel, ("POST", "/inspect"): inspect, ("POST", "/convert"): convert,
        ("POST", "/export"): export, ("GET", "/models"): models, ("POST", "/download"): download,
        ("GET", "/openapi.json"): openapi,
    }  # fmt: skip


def _guarded(gate: Gate, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        try:
            gate.check(request.method, request.headers)
            with disk.explained("The server could not do that"):
                status, body = await handler(request)
        except Refused as error:
            status, body = error.status, {"error": str(error)}
            headers |= {"WWW-Authenticate": 'Basic realm="i2l"'} if status == 401 else {}
        except Busy as error:
            status, body = 429, {"error": str(error)}
        except disk.DiskError as error:
            status, body = 507 if error.full else 500, {"error": str(error)}
        except UserError as error:
            status, body = 422, {"error": str(error)}
        except ClientDisconnect:
            status, body = 400, {"error": "The request broke off."}
        return JSONResponse(body, status, headers=headers)

    return answer


def _find(desk: Desk, request: Request) -> Job:
    job = desk.queue.find(request.path_params["id"])
    if job is None:
        raise Refused(404, "There is no such job.")
    return job


def _shown(job: Job) -> dict[str, Any]:
    """Without pictures: a program has the files."""
    view = job.view()
    if isinstance(view["result"], dict):
        view["result"] = {
            key: value for key, value in view["result"].items() if key not in ("picture", "drawn", "plot")
        }
    return view


def _length(request: Request, most: int) -> None:
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        raise Refused(411, "Say how long the body is (Content-Length).")
    if int(length) > most:
        raise Refused(413, f"The body is larger than {most >> 10} KB.")


async def _form(request: Request) -> Any:
    _length(request, MOST_BODY)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused(415, "Send multipart/form-data, with the pictures in `pictures`.")
    try:
        return await request.form()
    except (ClientDisconnect, OSError):
        raise
    except Exception as error:
        raise Refused(400, "The form cannot be read.") from error


async def _json(request: Request, **fields: type) -> list[Any]:
    """The values of exactly these fields."""
    _length(request, MOST_JSON)
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refused(415, "Send application/json.")
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Refused(400, "The body is not JSON.") from None
    if not isinstance(body, dict) or set(body) != set(fields):
        raise Refused(422, f"Send an object with the fields {', '.join(fields)}.")
    for name, kind in fields.items():
        if type(body[name]) is not kind:
            raise Refused(422, f"{name} is not of type {kind.__name__}.")
    return [body[name] for name in fields]


def _field(name: str, text: Any) -> Any:
    kind, _ = FIELDS[name]
    try:
        value = json.loads(text) if kind is list else kind(text)
        if kind is list and not (isinstance(value, list) and all(type(one) in (int, float) for one in value)):
            raise ValueError
        return value
    except (ValueError, TypeError, RecursionError):
        raise Refused(422, f"{name} is not of type {kind.__name__}.") from None


def description() -> dict[str, Any]:
    """The interface as OpenAPI 3.1 has it."""
    kinds = {str: {"type": "string"}, int: {"type": "integer"}, float: {"type": "number"}, list: {"type": "string"},
             bool: {"type": "boolean"}}  # fmt: skip
    job = {"$ref": "#/components/schemas/Job"}

    def answer(status: str, schema: Any) -> dict[str, Any]:
        refused = {code: {"description": text} for code, text in _REFUSALS.items()}
        return {status: {"description": "OK", "content": {"application/json": {"schema": schema}}}, **refused}

    def body(**fields: type) -> dict[str, Any]:
        shape = {"type": "object", "required": list(fields), "additionalProperties": False,
                 "properties": {name: kinds[kind] for name, kind in fields.items()}}  # fmt: skip
        return {"required": True, "content": {"application/json": {"schema": shape}}}

    pictures = {"type": "array", "maxItems": MOST_PICTURES, "items": {"type": "string", "format": "binary"}}
    form = {name: {**kinds[kind], "description": text} for name, (kind, text) in FIELDS.items()}
    make = {"type": "object", "required": ["pictures", "name"], "properties": {"pictures": pictures, **form}}
    one = {"parameters": [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]}
    jobs, objects = {"type": "array", "items": job}, {"type": "array", "items": {"type": "object"}}
    make_body = {"required": True, "content": {"multipart/form-data": {"schema": make}}}
    posts = {"/inspect": body(lora=str), "/convert": body(lora=str, to=str),
             "/export": body(lora=str, trainer=str, rank=int),
             "/download": body(model=str, source=str, agree=bool)}  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "Image to LoRA", "version": __version__},
        "servers": [{"url": ROOT}],
        "paths": {
            "/loras": {"get": {"responses": answer("200", jobs)},
                       "post": {"requestBody": make_body, "responses": answer("202", job)}},
            "/loras/{id}": {**one, "get": {"responses": answer("200", job)}, "delete": {"responses": answer("202", job)}},  # noqa: E501
            "/models": {"get": {"responses": answer("200", objects)}},
            **{path: {"post": {"requestBody": asked, "responses": answer("202", job)}} for path, asked in posts.items()},  # noqa: E501
        },
        "components": {"schemas": {"Job": {"type": "object", "required": ["id", "kind", "state"], "properties": {
            "id": {"type": "string"}, "kind": {"type": "string"}, "title": {"type": "string"},
            "state": {"enum": ["waiting", "running", "stopping", "done", "failed", "cancelled"]},
            "share": {"type": "number"}, "seconds": {"type": "number"}, "error": {"type": ["string", "null"]},
        }}}},
    }  # fmt: skip


_REFUSALS = {
    "400": "unreadable", "401": "credentials are needed", "403": "from another site", "404": "no such job",
    "411": "no Content-Length", "413": "too large", "415": "not that type", "422": "refused, with the reason",
    "429": "too many jobs wait", "500": "the server's disk refuses", "503": "not yet",
    "507": "the server's disk is full",
}  # fmt: skip
