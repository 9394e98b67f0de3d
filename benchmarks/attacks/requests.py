"""Requests to the HTTP interface: schemathesis from our own OpenAPI, and raw bodies that no schema would give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from starlette.applications import Starlette
from starlette.testclient import TestClient

from attacks.bytes import damaged
from attacks.drawn import drawn
from attacks.judge import Flaw, unclear
from attacks.lines import ODD, twisted
from i2l_ext.converters.errors import UserError
from i2l_ext.service.service import Service
from i2l_ext.webui import api
from i2l_ext.webui.hosts.standalone import StandaloneHost
from i2l_ext.webui.openapi import description
from i2l_ext.webui.statuses import REFUSALS

KNOWN = {*REFUSALS, 200, 202}
_ENGINE = """read line
case "$line" in *'"kind": "library"'*) found='{"rows": [], "read": 0}' ;; *) found='[]' ;; esac
echo '{"event": "done", "result": '"$found"'}'"""
ENGINE = ["sh", "-c", _ENGINE]
"""Does nothing, and says that it is done: what is attacked is the interface, not the engine behind it."""


def service_of(folder: Path) -> tuple[Service, TestClient]:
    """The interface on a LoRA folder with one file, its records outside of what is watched for stray files."""
    state = folder.parent / "state"
    lora = folder / "Lora"
    lora.mkdir()
    (lora / "a.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    service = Service(StandaloneHost(state, lora_folder=lora, serves_api=True), state, ENGINE)
    app = Starlette()
    api.add_api(app, service)
    return service, TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=True)


def judge(service: Service, status: int, body: bytes) -> None:
    """Raises UserError for a proper refusal, Flaw for an answer that is none of the promised ones."""
    if status not in KNOWN:
        raise Flaw(f"answered {status}: {body[:200]!r}")
    said = json.loads(body)
    for job in service.queue.active():
        service.queue.cancel(job.id)
    if status not in (200, 202):
        if flaw := unclear(said["error"]):
            raise Flaw(flaw[1])
        raise UserError(said["error"])


def start_schema(folder: Path) -> tuple[Callable[[Random], Any], Callable[[Path, Any], None]]:
    """Schemathesis, both as the schema says and against it; its own checks judge the answers too."""
    import schemathesis

    service, _ = service_of(folder)
    app = Starlette()
    api.add_api(app, service)
    schema = schemathesis.openapi.from_dict(description())
    schema.app = app
    strategies = [
        operation.ok().as_strategy(generation_mode=mode)
        for operation in schema.get_all_operations()
        for mode in schemathesis.GenerationMode
    ]
    usable = [strategy for strategy in strategies if drawn(strategy, 0, 3)]
    waiting: list[Any] = []

    def make(random: Random) -> Any:
        while not waiting:
            for strategy in usable:
                waiting.extend(drawn(strategy, random.getrandbits(32), 20))
            random.shuffle(waiting)
        return waiting.pop()

    def feed(box: Path, case: Any) -> None:
        from schemathesis.checks import not_a_server_error
        from schemathesis.core.failures import FailureGroup
        from schemathesis.specs.openapi.checks import (
            content_type_conformance,
            response_schema_conformance,
            status_code_conformance,
        )

        response = case.call(base_url="http://127.0.0.1" + api.ROOT)
        try:
            case.validate_response(
                response,
                checks=[
                    not_a_server_error,
                    status_code_conformance,
                    content_type_conformance,
                    response_schema_conformance,
                ],
            )
        except FailureGroup as group:
            raise Flaw(f"{case.method} {case.path}: {group.exceptions[0]}") from None
        judge(service, response.status_code, response.content)

    return make, feed


def start_raw(folder: Path) -> tuple[Callable[[Random], Any], Callable[[Path, Any], None]]:
    """Bodies, lengths, types and paths that are wrong in themselves."""
    service, client = service_of(folder)

    def feed(box: Path, given: tuple[str, str, dict[str, str], bytes]) -> None:
        method, path, headers, body = given
        coded = [(name, value.encode()) for name, value in headers.items()]
        response = client.request(method, path, headers=coded, content=body)
        if response.status_code in (404, 405) and not response.headers.get("content-type", "").startswith(
            "application/json"
        ):
            raise UserError("no such place")  # the framework's own answer
        judge(service, response.status_code, response.content)

    return _raw, feed


BODIES = {
    "/inspect": {"lora": "a.safetensors"},
    "/convert": {"lora": "a.safetensors", "to": "kohya"},
    "/export": {"lora": "a.safetensors", "trainer": "diffusers", "rank": 8},
}
PATHS = (
    "/loras",
    "/loras/0",
    "/models",
    "/openapi.json",
    "/loras/..%2f..%2fetc",
    "/loras/%00",
    "/" + "x" * 5000,
    "/loras/",
    "//evil/loras",
    "/inspect?x=1",
    "/loras/\u00e9",
)
VALUES = {
    "name": "a",
    "model": "mini",
    "weights": "[1, 0.5]",
    "strength": "1",
    "rank": "4",
    "key_format": "webui",
    "dtype": "bf16",
    "subfolder": "b",
    "description": "c",
    "activation_text": "d",
}
TEXTS = (
    "",
    "nan",
    "inf",
    "-1",
    "1e400",
    "9" * 5000,
    "[1,",
    "[NaN]",
    "[" * 9000,
    "[1e400]",
    "../..",
    "C:\\x",
    "\0",
    "\x1b[2J",
    "\ud83d",
    "a" * 9000,
    "None",
    "true",
    "[[1]]",
    "[true]",
    "\u202e",
    "0x10",
    "1_0",
    "١",
)


def _raw(random: Random) -> tuple[str, str, dict[str, str], bytes]:
    if random.random() < 0.1:
        return (
            random.choice(("GET", "DELETE", "POST", "PUT", "PATCH", "OPTIONS")),
            api.ROOT + random.choice(PATHS),
            {},
            b"",
        )
    if random.random() < 0.5:
        path = random.choice(list(BODIES))
        value = twisted(random, BODIES[path]) if random.random() < 0.8 else BODIES[path]
        body = json.dumps(value).encode()
        body = damaged(random, body) if random.random() < 0.3 else body
        body = random.choice((b"[" * 60_000, b"1" * 60_000, b" " * 70_000, b"\xff")) if random.random() < 0.03 else body
        kind = "application/json"
    else:
        path, kind = "/loras", "multipart/form-data; boundary=XX"
        body = _form(random)
        body = damaged(random, body, random.choice((1, 3))) if random.random() < 0.5 else body
    headers = {"content-type": kind}
    draw = random.random()
    if draw < 0.1:
        name = random.choice(("content-type", "content-length", "host", "origin", "authorization", "sec-fetch-site"))
        headers[name] = random.choice(
            (
                "",
                "0",
                "-1",
                "9" * 30,
                "²",
                "text/plain",
                "null",
                "http://[",
                "Basic %%%",
                "[::1",
                "cross-site",
                "multipart/form-data",
                "multipart/form-data; boundary=" + "x" * 500,
            )
        )
    return "POST", api.ROOT + path, headers, body


def _form(random: Random) -> bytes:
    """A form as a browser would send it, some values odd."""
    parts = []
    for name, value in random.sample(list(VALUES.items()), random.randrange(len(VALUES))):
        text = random.choice((value, value, random.choice(TEXTS), str(random.choice(ODD))))
        parts.append((f'name="{name}"', text.encode("utf-8", "surrogatepass")))
    for _ in range(random.choice((0, 1, 1, 3, 70))):
        file = random.choice(("a.png", "../../a.png", "", "a" * 500, "a\x1b.png"))
        parts.append(
            (
                f'name="pictures"; filename="{file}"\r\nContent-Type: image/png',
                random.randbytes(random.choice((0, 9, 999))),
            )
        )
    if random.random() < 0.1:
        parts.append(('name="unknown"', b"1"))
    random.shuffle(parts)
    joined = b"".join(
        b"--XX\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + body + b"\r\n"
        for head, body in parts
    )
    return joined + b"--XX--\r\n"
