"""Who may come in: by the name that a request calls us by, the page that sends it, and its credentials.

A browser sends requests to this machine for any page that its user looks at. A page of another site is known by its
``Origin`` and ``Sec-Fetch-Site``; one that has made its own name point at this machine (DNS rebinding), by ``Host``.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Collection, Mapping, Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.websockets import WebSocketClose

from i2l_ext.converters.errors import one_line

NEAR = ("localhost",)
"""The names of a server that only this machine reaches."""


class Refused(Exception):
    """An answer other than 200 and 202: status and text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(one_line(text))
        self.status = status


class Gate:
    """``names``: those that are answered to, beside addresses in digits, which cannot be made to point elsewhere;
    None: any. ``credentials``: pairs of user name and password; none: nobody is asked."""

    def __init__(self, names: Collection[str] | None, credentials: Sequence[tuple[str, str]] = ()) -> None:
        self._names = None if names is None else frozenset(name.lower() for name in names)
        self._known = [f"{user}:{password}".encode() for user, password in credentials]

    def check(self, method: str, headers: Mapping[str, str]) -> None:
        """Raises Refused."""
        host = headers.get("host", "")
        if self._names is not None and not self._is_ours(_split(f"//{host}").hostname or ""):
            raise Refused(403, "This server answers to its own name only.")
        origin = headers.get("origin")
        if origin is not None and _split(origin).netloc != host:
            raise Refused(403, "Pages of other sites are not answered.")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not _is_visit(method, headers):
            raise Refused(403, "Pages of other sites are not answered.")
        if self._known and not self._is_known(headers.get("authorization", "")):
            raise Refused(401, "User name and password are needed.")

    def _is_ours(self, name: str) -> bool:
        try:
            return bool(ip_address(name))
        except ValueError:
            return name in (self._names or ())

    def _is_known(self, header: str) -> bool:
        kind, _, coded = header.partition(" ")
        try:
            said = base64.b64decode(coded, validate=True) if kind.lower() == "basic" else b""
        except (binascii.Error, ValueError):
            return False
        return any([hmac.compare_digest(said, known) for known in self._known])  # noqa: C419 - all, whichever fits


class Door:
    """The gate before a whole application, its uploads and files as well (ASGI)."""

    def __init__(self, app: Any, gate: Gate) -> None:
        self.app, self.gate = app, gate

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        answer = self.app
        if scope["type"] in ("http", "websocket"):
            try:
                self.gate.check(scope.get("method", "GET"), Headers(scope=scope))
            except Refused as error:
                refusal = JSONResponse({"error": str(error)}, error.status)
                answer = refusal if scope["type"] == "http" else WebSocketClose(1008, str(error))
        await answer(scope, receive, send)


def _is_visit(method: str, headers: Mapping[str, str]) -> bool:
    """Whether the user follows a link to us: the page opens in a tab, and the other site sees nothing of it."""
    how = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
    return method == "GET" and how == ("navigate", "document")


def _split(url: str) -> Any:
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
