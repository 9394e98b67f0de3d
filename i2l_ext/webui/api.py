"""The HTTP interface, for programs: start jobs, watch and cancel them. Described in docs/http.md.

It is served only where the host serves its own (``--api``), behind its credentials. Pages of other sites in the same
browser are refused. No path is taken from a client.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from i2l_ext.converters.errors import UserError
from i2l_ext.engine.queue import BRIEF, Job
from i2l_ext.library.names import clean_name
from i2l_ext.service.batches import MAX_GROUPED, make_groups
from i2l_ext.service.disk_errors import explain_disk_errors
from i2l_ext.service.library import PER_PAGE, View
from i2l_ext.service.service import Service
from i2l_ext.service.uploads import MAX_PICTURES
from i2l_ext.webui.access import LOCAL_NAMES, AccessPolicy
from i2l_ext.webui.client_fields import parse_body, parse_form, parse_query
from i2l_ext.webui.openapi import ROOT, description
from i2l_ext.webui.statuses import status_of

MAX_FORM, MAX_JSON = 512 << 20, 64 << 10
"""Bytes of a body."""

PICTURE_FIELDS = frozenset({"picture", "drawn", "plot"})
"""Fields of results that are pictures for the page: a program has the files."""

ROW_FIELDS = (
    "file", "bytes", "modified", "arch", "model", "key_format", "rank", "modules", "loads", "repairs", "made", "error",
)  # fmt: skip
"""What is told of a LoRA of the library: not its folder."""

LIBRARY_SECONDS = 60.0
"""For which an answer waits until the LoRAs are listed."""

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
    files, values = await _pictures(service, "/loras", request, MAX_PICTURES)
    ids = [id for _, id in files]
    return 202, job_view(await run_in_threadpool(lambda: service.make(ids, **{"name": "", **values})))


async def _make_batch(service: Service, request: Request) -> tuple[int, Any]:
    """``names`` says for each picture which LoRA it is for; without it each makes its own, named like its file."""
    files, values = await _pictures(service, "/batches", request, MAX_GROUPED)
    named = values.pop("names", None)
    if named is not None and len(named) != len(files):
        raise UserError(f"{len(files)} pictures and {len(named)} names: give one name for each picture.")
    if named is None:
        groups = [(clean_name(PurePosixPath(file.replace("\\", "/")).stem), [id]) for file, id in files]
    else:
        by_name: dict[str, list[str]] = {}
        for name, (_, id) in zip(named, files, strict=True):
            by_name.setdefault(name, []).append(id)
        groups = list(by_name.items())
    return 202, job_view(await run_in_threadpool(lambda: make_groups(service, groups, **values)))


async def _pictures(
    service: Service, path: str, request: Request, most: int
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """What was uploaded, each by the name of its file and its id; and the other fields of the form."""
    form = await _read_form(request)
    files = [value for value in form.getlist("pictures") if isinstance(value, UploadFile)]
    if len(files) > most:
        raise UserError(f"At most {most} pictures.", "too_large")
    values = parse_form(path, {key: form[key] for key in form if key != "pictures"})
    ids = [await run_in_threadpool(service.uploads.take_stream, file.file) for file in files]
    if "model" not in values:
        await run_in_threadpool(_model_rows, service)
    return [(file.filename or "", id) for file, id in zip(files, ids, strict=True)], values


async def _library(service: Service, request: Request) -> tuple[int, Any]:
    values = parse_query(request.query_params)
    previews = values.pop("previews", False)
    view = View(**values)
    view.validate()

    def listed() -> dict[str, Any]:
        service.library.wait_for_rows(LIBRARY_SECONDS)
        rows, count, shown = service.library.find(view)
        pictures = service.library.thumbnails(rows) if previews else {}
        told = [{key: row[key] for key in ROW_FIELDS if key in row} | {"preview": bool(row["preview"])} for row in rows]
        if previews:
            told = [{**row, "picture": pictures.get(row["file"])} for row in told]
        return {"count": count, "page": shown.page, "pages": max(-(-count // PER_PAGE), 1), "loras": told}

    return 200, await run_in_threadpool(listed)


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


def _export(service: Service, lora: str, trainer: str, rank: int, caption: str | None = None) -> Job:
    return service.export(service.lora(lora), lora, trainer, rank, caption=caption)


def _download(service: Service, model: str, source: str, agree: bool, packed: bool = False) -> Job:
    _model_rows(service)
    return service.download(model, source, agreed=agree, packed=packed)


def _trust(service: Service, model: str, digest: str) -> Job:
    _model_rows(service)
    return service.consents.agree(model, digest) if digest else service.consents.look(model)


def _convert_each(service: Service, loras: list[str], to: str, **values: Any) -> list[Job]:
    return service.library.convert(loras, to, **values)


def _repair_each(service: Service, loras: list[str], consumer: str) -> list[Job]:
    return service.library.repair(loras, consumer)


def _resize_each(service: Service, loras: list[str], **values: Any) -> list[Job]:
    return service.library.resize(loras, **values)


def _merge(service: Service, loras: list[str], weights: Sequence[float], **values: Any) -> list[Job]:
    if len(loras) != len(weights):
        raise UserError("Give one weight for each LoRA, and each LoRA once.")
    return [service.library.merge(loras, dict(zip(loras, weights, strict=True)), **values)]


def _discard(service: Service, loras: list[str]) -> list[Job]:
    return [service.library.discard(loras)]


def _make_anew(service: Service, loras: list[str]) -> list[Job]:
    return service.library.make_anew(loras)


def _starts(path: str, start: Callable[..., Job]) -> Handler:
    """The handler of a JSON body whose fields are the arguments of ``start``."""

    async def handler(service: Service, request: Request) -> tuple[int, Any]:
        values = parse_body(path, await _read_json(request))
        return 202, job_view(await run_in_threadpool(lambda: start(service, **values)))

    return handler


def _starts_each(path: str, start: Callable[..., list[Job]]) -> Handler:
    """The same of a body with several LoRAs, each told once to ``start``."""

    async def handler(service: Service, request: Request) -> tuple[int, Any]:
        values = parse_body(path, await _read_json(request))
        loras = list(dict.fromkeys(values.pop("loras")))

        def run() -> list[Job]:
            service.library.wait_for_rows(LIBRARY_SECONDS)
            return start(service, loras, **values)

        return 202, [job_view(job) for job in await run_in_threadpool(run)]

    return handler


STARTS: Mapping[str, Callable[..., Job]] = {
    "/inspect": _inspect, "/convert": _convert, "/export": _export, "/download": _download, "/trust": _trust,
}  # fmt: skip
"""Path -> what starts its job."""

STARTS_EACH: Mapping[str, Callable[..., list[Job]]] = {
    "/library/convert": _convert_each, "/library/repair": _repair_each, "/library/rank": _resize_each,
    "/library/merge": _merge, "/library/discard": _discard, "/library/anew": _make_anew,
}  # fmt: skip
"""Path -> what starts its jobs."""

HANDLERS: Mapping[tuple[str, str], Handler] = {
    ("POST", "/loras"): _make, ("GET", "/loras"): _jobs, ("GET", "/loras/{id}"): _job,
    ("DELETE", "/loras/{id}"): _cancel, ("POST", "/batches"): _make_batch, ("GET", "/library"): _library,
    ("GET", "/models"): _models, ("GET", "/openapi.json"): _openapi,
    **{("POST", path): _starts(path, start) for path, start in STARTS.items()},
    **{("POST", path): _starts_each(path, start) for path, start in STARTS_EACH.items()},
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
    return {**view, "result": _without_pictures(view["result"])}


def _without_pictures(result: Any) -> Any:
    if isinstance(result, list):
        return [_without_pictures(one) for one in result]
    if not isinstance(result, dict):
        return result
    return {key: _without_pictures(value) for key, value in result.items() if key not in PICTURE_FIELDS}


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
