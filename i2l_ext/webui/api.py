"""The HTTP interface, for programs: start jobs, watch and cancel them. Described in docs/http.md.

It is served only where the host serves its own (``--api``), behind its credentials. Pages of other sites in the same
browser are refused. No path is taken from a client.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from i2l_ext.converters.errors import UserError
from i2l_ext.engine.queue import BRIEF, Job
from i2l_ext.service.disk_errors import explain_disk_errors
from i2l_ext.service.service import Service
from i2l_ext.service.uploads import MAX_PICTURES
from i2l_ext.webui.access import LOCAL_NAMES, AccessPolicy
from i2l_ext.webui.client_fields import parse_body, parse_form
from i2l_ext.webui.openapi import ROOT, description
from i2l_ext.webui.statuses import status_of

MAX_FORM, MAX_JSON = 512 << 20, 64 << 10
"""Bytes of a body."""

PICTURE_FIELDS = frozenset({"picture", "drawn", "plot"})
"""Fields of results that are pictures for the page: a program has the files."""

MODEL_FIELDS = ("name", "arch", "line", "ready", "download_bytes")
PART_FIELDS = ("id", "bytes", "repo", "licence", "present")

Handler = Callable[[Service, Request], Awaitable[tuple[int, Any]]]


def add_api(app: Any, service: Service, credentials: Sequence[tuple[str, str]] = ()) -> None:
    """Put the routes before those of the host, some of which match every path."""
    service.models.rows()
    policy = AccessPolicy(LOCAL_NAMES if service.host.is_local else None, credentials)
    app.router.routes[:0] = [
        Route(ROOT + path, _route(policy, service, handler), methods=[method])
        for (method, path), handler in HANDLERS.items()
    ]


async def _make(service: Service, request: Request) -> tuple[int, Any]:
    form = await _read_form(request)
    files = [value for value in form.getlist("pictures") if isinstance(value, UploadFile)]
    if len(files) > MAX_PICTURES:
        raise UserError(f"At most {MAX_PICTURES} pictures.", "too_large")
    values = {"name": "", **parse_form({key: form[key] for key in form if key != "pictures"})}
    ids = [await run_in_threadpool(service.uploads.take_stream, file.file) for file in files]
    if "model" not in values:
        await run_in_threadpool(_model_rows, service)
    return 202, job_view(await run_in_threadpool(lambda: service.make(ids, **values)))


async def _jobs(service: Service, request: Request) -> tuple[int, Any]:
    return 200, [job_view(job) for job in service.queue.jobs() if job.kind not in BRIEF]


async def _job(service: Service, request: Request) -> tuple[int, Any]:
    return 200, job_view(_find(service, request))


async def _cancel(service: Service, request: Request) -> tuple[int, Any]:
    job = _find(service, request)
    await run_in_threadpool(service.queue.cancel, job.id)
    return 202, job_view(job)


async def _models(service: Service, request: Request) -> tuple[int, Any]:
    rows = await run_in_threadpool(_model_rows, service)
    return 200, [
        {**_only(row, MODEL_FIELDS), "parts": [_only(part, PART_FIELDS) for part in row["parts"]]} for row in rows
    ]


async def _openapi(service: Service, request: Request) -> tuple[int, Any]:
    return 200, description()


def _inspect(service: Service, lora: str) -> Job:
    return service.inspect(service.lora(lora), lora)


def _convert(service: Service, lora: str, to: str) -> Job:
    return service.convert(service.lora(lora), lora, to)


def _export(service: Service, lora: str, trainer: str, rank: int) -> Job:
    return service.export(service.lora(lora), lora, trainer, rank)


def _download(service: Service, model: str, source: str, agree: bool) -> Job:
    _model_rows(service)
    return service.download(model, source, agreed=agree)


def _trust(service: Service, model: str, digest: str) -> Job:
    _model_rows(service)
    return service.consents.agree(model, digest) if digest else service.consents.look(model)


def _starts(path: str, start: Callable[..., Job]) -> Handler:
    """The handler of a JSON body whose fields are the arguments of ``start``."""

    async def handler(service: Service, request: Request) -> tuple[int, Any]:
        values = parse_body(path, await _read_json(request))
        return 202, job_view(await run_in_threadpool(lambda: start(service, **values)))

    return handler


STARTS: Mapping[str, Callable[..., Job]] = {
    "/inspect": _inspect, "/convert": _convert, "/export": _export, "/download": _download, "/trust": _trust,
}  # fmt: skip
"""Path -> what starts its job."""

HANDLERS: Mapping[tuple[str, str], Handler] = {
    ("POST", "/loras"): _make, ("GET", "/loras"): _jobs, ("GET", "/loras/{id}"): _job,
    ("DELETE", "/loras/{id}"): _cancel, ("GET", "/models"): _models, ("GET", "/openapi.json"): _openapi,
    **{("POST", path): _starts(path, start) for path, start in STARTS.items()},
}  # fmt: skip


def _route(policy: AccessPolicy, service: Service, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        try:
            policy.check(request.method, request.headers)
            with explain_disk_errors("The server could not do that"):
                status, body = await handler(service, request)
        except UserError as error:
            status, body = status_of(error), {"error": str(error)}
        except ClientDisconnect:
            status, body = 400, {"error": "The request broke off."}
        if status == 401:
            headers["WWW-Authenticate"] = 'Basic realm="i2l"'
        return JSONResponse(body, status, headers=headers)

    return answer


def job_view(job: Job) -> dict[str, Any]:
    """A job as the interface shows it."""
    view = job.view()
    if isinstance(view["result"], dict):
        view["result"] = {key: value for key, value in view["result"].items() if key not in PICTURE_FIELDS}
    return view


def _find(service: Service, request: Request) -> Job:
    job = service.queue.find(request.path_params["id"])
    if job is None:
        raise UserError("There is no such job.", "no_such_job")
    return job


def _model_rows(service: Service) -> list[dict[str, Any]]:
    rows = service.models.rows()
    if rows is None:
        raise UserError("The models are being looked for. Ask again in a few seconds.", "not_ready")
    return rows


def _only(row: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    return {field: row[field] for field in fields}


def _check_length(request: Request, most: int) -> None:
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        raise UserError("Say how long the body is (Content-Length).", "no_length")
    if int(length) > most:
        raise UserError(f"The body is larger than {most >> 10} KB.", "too_large")


async def _read_form(request: Request) -> FormData:
    _check_length(request, MAX_FORM)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise UserError("Send multipart/form-data, with the pictures in `pictures`.", "media_type")
    try:
        return await request.form()
    except (ClientDisconnect, OSError):
        raise
    except Exception as error:
        raise UserError("The form cannot be read.", "unreadable") from error


async def _read_json(request: Request) -> Any:
    _check_length(request, MAX_JSON)
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise UserError("Send application/json.", "media_type")
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise UserError("The body is not JSON.", "unreadable") from None
