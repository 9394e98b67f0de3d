"""HTTP statuses: one table from the code of an error."""

from __future__ import annotations

from collections.abc import Mapping

from i2l_ext.converters.errors import UserError

STATUSES: Mapping[str, int] = {
    "unreadable": 400,
    "credentials": 401,
    "forbidden": 403,
    "no_such_job": 404,
    "no_length": 411,
    "too_large": 413,
    "media_type": 415,
    "busy": 429,
    "disk_refused": 500,
    "not_ready": 503,
    "disk_full": 507,
}
"""Code of an error -> status. Every other code is 422: the request was understood and refused."""

REFUSALS: Mapping[int, str] = {
    400: "unreadable", 401: "credentials are needed", 403: "from another site", 404: "no such job",
    411: "no Content-Length", 413: "too large", 415: "not that type", 422: "refused, with the reason",
    429: "too many jobs wait", 500: "the server's disk refuses", 503: "not yet", 507: "the server's disk is full",
}  # fmt: skip
"""Status -> what it means here."""


def status_of(error: UserError) -> int:
    """The HTTP status of an error."""
    return STATUSES.get(error.code, 422)
