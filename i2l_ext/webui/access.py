"""Who may send requests: checked by the name in ``Host``, by the page that sends the request, and by credentials.

A browser sends requests to this machine on behalf of any page that its user opens. A page of another site is known by
``Origin`` and ``Sec-Fetch-Site``; one whose own name resolves to this machine (DNS rebinding), by ``Host``.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Collection, Mapping, Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.websockets import WebSocketClose

from i2l_ext.converters.errors import UserError
from i2l_ext.webui.statuses import status_of

LOCAL_NAMES = ("localhost",)
"""The names of a server that only this machine reaches."""


class AccessPolicy:
    """``names``: host names that are answered to, beside numeric addresses, which cannot be rebound; None: any.
    ``credentials``: pairs of user name and password; empty: no credentials are needed."""

    def __init__(self, names: Collection[str] | None, credentials: Sequence[tuple[str, str]] = ()) -> None:
        self._names = None if names is None else frozenset(name.lower() for name in names)
        self._known = [f"{user}:{password}".encode() for user, password in credentials]

    def check(self, method: str, headers: Mapping[str, str]) -> None:
        """Raises UserError with the code ``forbidden`` or ``credentials``."""
        host = headers.get("host", "")
        if self._names is not None and not self._is_ours(_split(f"//{host}").hostname or ""):
            raise UserError("This server answers to its own name only.", "forbidden")
        origin = headers.get("origin")
        if origin is not None and _split(origin).netloc != host:
            raise UserError("Pages of other sites are not answered.", "forbidden")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not _is_visit(method, headers):
            raise UserError("Pages of other sites are not answered.", "forbidden")
        if self._known and not self._is_known(headers.get("authorization", "")):
            raise UserError("User name and password are needed.", "credentials")

    def _is_ours(self, name: str) -> bool:
        try:
            return bool(ip_address(name))
        except ValueError:
            return name in (self._names or ())

    def _is_known(self, header: str) -> bool:
        kind, _, coded = header.partition(" ")
        try:
            given = base64.b64decode(coded, validate=True) if kind.lower() == "basic" else b""
        except (binascii.Error, ValueError):
            return False
        # a list: all are compared, so that the time tells nothing of which one fits
        return any([hmac.compare_digest(given, known) for known in self._known])  # noqa: C419


class AccessMiddleware:
    """An AccessPolicy before a whole ASGI application, its uploads and files included."""

    def __init__(self, app: Any, policy: AccessPolicy) -> None:
        self.app, self.policy = app, policy

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        answer = self.app
        if scope["type"] in ("http", "websocket"):
            try:
                self.policy.check(scope.get("method", "GET"), Headers(scope=scope))
            except UserError as error:
                refusal = JSONResponse({"error": str(error)}, status_of(error))
                answer = refusal if scope["type"] == "http" else WebSocketClose(1008, str(error))
        await answer(scope, receive, send)


def opened_locally(headers: Mapping[str, str]) -> bool:
    """Whether a page was opened under a name of this machine itself, not through a tunnel."""
    try:
        AccessPolicy(LOCAL_NAMES).check("POST", headers)
    except UserError:
        return False
    return True


def _is_visit(method: str, headers: Mapping[str, str]) -> bool:
    """Whether the user follows a link to us: the page opens in a tab, and the other site sees nothing of it."""
    how = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
    return method == "GET" and how == ("navigate", "document")


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
