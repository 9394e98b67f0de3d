"""Whether the server is there. The page asks it before each of its own questions, twice a second while a job runs: the
page itself is no answer to ask for, since gradio draws it anew each time."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PATH = "/i2l/alive"


def add(app: Any) -> None:
    """Put the route before those of the host, some of which take every path. It tells nothing: 204 for everybody."""
    app.router.routes.insert(0, Route(PATH, _answer, methods=["GET"]))


async def _answer(_: Request) -> Response:
    return Response(status_code=204, headers={"Cache-Control": "no-store"})
