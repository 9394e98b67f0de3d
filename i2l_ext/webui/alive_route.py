"""A route that says whether the server is there. The page asks it before each poll, twice a second while a job runs:
the page itself would be the wrong thing to ask for, because gradio builds it anew for each request."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PATH = "/i2l/alive"


def add_alive_route(app: Any) -> None:
    """Put the route before those of the host, some of which match every path. It answers 204 to everybody."""
    app.router.routes.insert(0, Route(PATH, _answer, methods=["GET"]))


async def _answer(_: Request) -> Response:
    return Response(status_code=204, headers={"Cache-Control": "no-store"})
