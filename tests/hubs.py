"""A hub on this machine that speaks as much of Hugging Face's and ModelScope's protocols as their clients ask for,
and misbehaves as told."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" * 6 + "abcd"


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address):
        pass  # clients that are told to stop go away in mid-sentence


class FakeHub:
    """``files`` by (repo, name). ``statuses``: answers to the next requests for a description or for bytes, 0 for a
    good one. ``cuts``: after how many bytes the next answers with bytes break off. ``seen``: what was asked for."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], bytes] = {}
        self.statuses: dict[str, list[int]] = {"look": [], "fetch": []}
        self.cuts: list[int] = []
        self.spoiled = False
        self.ranges = True
        self.checksums = True
        self.stall = threading.Event()
        self.stalling = False
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.servers = [Server(("127.0.0.1", 0), self._handler(where)) for where in ("hub", "store")]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.stall.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.servers[0].server_port}"

    @property
    def store(self) -> str:
        """Where the bytes are: another address, as with the real ones."""
        return f"http://127.0.0.1:{self.servers[1].server_port}"

    def add(self, repo: str, name: str, content: bytes) -> bytes:
        self.files[repo, name] = content
        return content

    def fetched(self) -> list[str]:
        """The ranges asked for, one for each answer with bytes."""
        return [
            headers.get("range", "") for method, path, headers in self.seen if method == "GET" and "/bytes/" in path
        ]

    def _handler(self, where: str) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.answer()

            def do_GET(self):
                self.answer()

            def answer(self):
                hub.seen.append((self.command, self.path, {key.lower(): value for key, value in self.headers.items()}))
                path = unquote(urlsplit(self.path).path)
                if where == "store":
                    return self.give(path)
                if path.startswith("/api/v1/models/"):
                    return self.modelscope(path.removeprefix("/api/v1/models/"))
                return self.hugging_face(path)

            def refused(self, kind: str) -> bool:
                status = hub.statuses[kind].pop(0) if hub.statuses[kind] else 0
                if status:
                    self.reply(status, b'{"error": "no"}', {"Retry-After": "0"})
                return bool(status)

            def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None):
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def hugging_face(self, path: str):
                if path.startswith("/api/models/"):
                    repo = "/".join(path.removeprefix("/api/models/").split("/")[:2])
                    files = [
                        {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                        for (owner, name), content in hub.files.items()
                        if owner == repo
                    ]
                    return self.reply(200, json.dumps(files).encode())
                if self.refused("look" if self.command == "HEAD" else "fetch"):
                    return None
                name, _, rest = path.strip("/").partition("/resolve/")
                content = hub.files.get((name, rest.partition("/")[2]))
                if content is None:
                    return self.reply(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                known = {"X-Repo-Commit": COMMIT}
                if rest.endswith(".json"):  # kept in git itself
                    sha = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
                    return self.reply(200, content, known | {"ETag": f'"{sha}"'})
                known |= {"Location": f"{hub.store}/bytes/{name}/{rest.partition('/')[2]}", "ETag": '"elsewhere"'}
                if hub.checksums:
                    sha = hashlib.sha256(content).hexdigest()
                    known |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(content))}
                return self.reply(302, headers=known)

            def modelscope(self, path: str):
                query = parse_qs(urlsplit(self.path).query)
                if path.endswith("/repo/files"):
                    if self.refused("look"):
                        return None
                    name = path.removesuffix("/repo/files")
                    found = [
                        {"Path": file, "Name": file.rpartition("/")[2], "Type": "blob", "Size": len(content)}
                        | ({"Sha256": hashlib.sha256(content).hexdigest()} if hub.checksums else {})
                        for (repo, file), content in hub.files.items()
                        if repo == name
                    ]
                    body = json.dumps({"Code": 200, "Success": True, "Data": {"Files": found}}).encode()
                    return self.reply(200, body, {"Content-Type": "application/json"})
                if path.endswith("/repo"):
                    if self.refused("fetch"):
                        return None
                    target = f"{hub.store}/bytes/{path.removesuffix('/repo')}/{query['FilePath'][0]}"
                    return self.reply(302, headers={"Location": target})
                return self.reply(404)

            def give(self, path: str):
                owner, name, file = path.removeprefix("/bytes/").split("/", 2)
                content = hub.files[f"{owner}/{name}", file]
                if hub.spoiled:
                    content = content[:-1] + bytes([content[-1] ^ 1])
                start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
                start = start if hub.ranges else 0
                headers = {"Content-Length": str(len(content) - start)}
                if start:
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.send_response(206 if start else 200)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.end_headers()
                cut = hub.cuts.pop(0) if hub.cuts else len(content)
                self.wfile.write(content[start : start + cut])
                if hub.stalling:
                    self.wfile.flush()
                    hub.stall.wait(30)
                self.close_connection = True
                return

        return Handler
