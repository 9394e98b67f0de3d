"""The two hubs that have the model files, through their own client libraries: what a file is, and its bytes from any
position on. Errors of the libraries are explained in words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, BinaryIO, Protocol

from i2l_ext.converters.errors import UserError

CHUNK = 1 << 17
"""Bytes that a broken connection can lose at most."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub describes it. ``digest``: 64 hex digits are its sha256, 40 are git's sha1, which small
    text files have that the hub keeps in git itself."""

    repo: str
    file: str
    size: int
    digest: str
    revision: str


class Hub(Protocol):
    """All methods raise the errors of the client library; see ``explain``."""

    @property
    def name(self) -> str: ...

    def describe(self, repo: str, file: str) -> RemoteFile:
        """The hub's description of a file of the newest revision."""

    def names(self, repo: str) -> list[str]:
        """The names of all files of the newest revision."""

    def fetch(self, remote: RemoteFile, sink: BinaryIO, start: int) -> None:
        """Append the file's bytes from ``start`` on to ``sink``, which holds those before. Where the hub cannot start
        there, ``sink`` is emptied and gets the whole file."""


@dataclass(frozen=True)
class HuggingFace:
    """Through ``huggingface_hub``: token, proxies, ``HF_ENDPOINT`` and time-outs are as it reads them."""

    name: str = "huggingface"
    endpoint: str | None = None

    def describe(self, repo: str, file: str) -> RemoteFile:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(repo, file, endpoint=self.endpoint)
        found = get_hf_file_metadata(url, endpoint=self.endpoint)
        return _remote(self, repo, file, found.size, found.etag, found.commit_hash or "main")

    def names(self, repo: str) -> list[str]:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint).list_repo_files(repo)

    def fetch(self, remote: RemoteFile, sink: BinaryIO, start: int) -> None:
        # hf_hub_download of newer versions starts over after a cut: http_get is what it is built on
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers, disable_progress_bars

        disable_progress_bars("huggingface_hub.http_get")
        url = hf_hub_url(remote.repo, remote.file, revision=remote.revision, endpoint=self.endpoint)
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        http_get(url, sink, resume_size=start, headers=headers, expected_size=remote.size)


@dataclass(frozen=True)
class ModelScope:
    """Through ``modelscope_hub``, the client that the package ``modelscope`` is built on: token, session and
    ``MODELSCOPE_ENDPOINT`` are as it reads them."""

    name: str = "modelscope"
    endpoint: str | None = None

    @cached_property
    def _api(self) -> Any:
        return _modelscope_hub().HubApi(endpoint=self.endpoint)

    def _listed(self, repo: str) -> dict[str, Any]:
        if repo not in self._listings:
            self._listings[repo] = {found.path: found for found in self._api.list_repo_files(repo, "model")}
        return self._listings[repo]

    @cached_property
    def _listings(self) -> dict[str, dict[str, Any]]:
        return {}

    def names(self, repo: str) -> list[str]:
        return list(self._listed(repo))

    def describe(self, repo: str, file: str) -> RemoteFile:
        found = self._listed(repo).get(file)
        if found is None:
            raise UserError(f"{repo}: {self.name} does not have the file {file}.")
        return _remote(self, repo, file, found.size, found.sha256, "master")

    def fetch(self, remote: RemoteFile, sink: BinaryIO, start: int) -> None:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        client = self._api.legacy
        with client.download_stream(remote.repo, "model", remote.file, remote.revision, headers=headers) as response:
            if start and response.status_code != 206:
                sink.seek(0)
                sink.truncate()
            for chunk in response.iter_content(CHUNK):
                sink.write(chunk)


HUBS: dict[str, type[HuggingFace] | type[ModelScope]] = {"huggingface": HuggingFace, "modelscope": ModelScope}


def _modelscope_hub() -> ModuleType:
    # older versions and the full package call the endpoint a domain
    if "MODELSCOPE_DOMAIN" in os.environ:
        os.environ.setdefault("MODELSCOPE_ENDPOINT", f"https://{os.environ['MODELSCOPE_DOMAIN']}")
    try:
        import modelscope_hub
    except ImportError:
        raise UserError(
            "ModelScope's client is not installed. Install it with: pip install modelscope-hub; "
            "or download from Hugging Face (--from huggingface)."
        ) from None
    return modelscope_hub


def _remote(hub: Hub, repo: str, file: str, size: int | None, digest: str | None, revision: str) -> RemoteFile:
    digest = (digest or "").lower()
    if size is None or len(digest) not in (40, 64) or set(digest) - set("0123456789abcdef"):
        raise UserError(f"{repo}: {hub.name} names no size or checksum of {file}, so it could not be checked.")
    return RemoteFile(repo, file, size, digest, revision)


REASONS = {
    401: "it asks for a login, or has no such repository. Log in to the hub with its own tool, then try again",
    403: "it refuses. Accept the terms on the repository's page, log in with the hub's own tool, then try again",
    404: "it does not have this file",
    416: "it cannot resume where the last run stopped",
    429: "it received too many requests. Wait some minutes, then try again",
}
LATER = "it has an internal error. Try again later"
BROKEN = "the connection failed. Try again: what has arrived is kept"
BROKEN_PACKED = "the connection failed. Try again: files that have arrived whole are kept, this one begins anew"
"""Of a file that is packed while it arrives: its checksum can only be computed from the start."""


@dataclass(frozen=True)
class HubProblem:
    """Why a hub did not deliver. ``lasting``: trying again at once does not help."""

    text: str
    lasting: bool


def explain(error: BaseException) -> HubProblem | None:
    """What an error of a client library says about the hub or the network; None for an error of another kind."""
    for link in _chain(error):
        status = getattr(getattr(link, "response", None), "status_code", None) or getattr(link, "status_code", None)
        if isinstance(status, int) and status >= 400:
            return HubProblem(REASONS.get(status, LATER if status >= 500 else f"it answers {status}"), status < 500)
    if any(isinstance(link, OSError) or _is_network(link) for link in _chain(error)):
        return HubProblem(BROKEN, lasting=False)
    return None


def _is_network(error: BaseException) -> bool:
    """Told by the package of the error. Which one a client library uses depends on its version."""
    return type(error).__module__.partition(".")[0] in {"httpx", "httpx2", "httpcore", "httpcore2", "urllib3"}


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop(0)
        if link is not None and not any(link is known for known in seen):
            seen.append(link)
            yield link
            waiting += [link.__cause__, link.__context__]
