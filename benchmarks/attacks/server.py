"""The stand-alone WebUI as a process of its own, with its HTTP interface."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from i2l_ext.webui.api import ROOT

HERE = Path(__file__).resolve().parent.parent.parent


class Server:
    """`i2l ui --api` on a free port, its folders below ``folder``; answers once this block is entered."""

    def __init__(self, folder: Path, patience: float = 300) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for name in ("tmp", "state", "home"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "I2L_STATE": str(folder / "state"),
            "TMPDIR": str(folder / "tmp"),
            "HOME": str(folder / "home"),
            "I2L_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "GRADIO_ANALYTICS_ENABLED": "False",
            "PYTHONPATH": str(HERE),
        }
        words = ("ui", "--api", "--port", self.port, "--lora-dir", folder / "Lora")
        self.said = (folder / "server.said").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "i2l_ext", *map(str, words)],
            cwd=HERE,
            env=environment,
            stdout=self.said,
            stderr=self.said,
        )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}{ROOT}", timeout=60)
        self.patience = patience

    def __enter__(self) -> Server:
        end = time.monotonic() + self.patience
        while True:
            try:
                if self.get("/models").status_code == 200:
                    return self
            except httpx.TransportError:
                if self.process.poll() is not None:
                    raise RuntimeError((self.folder / "server.said").read_text()[-1000:]) from None
            if time.monotonic() > end:
                self.kill()
                raise RuntimeError(f"no answer in {self.patience:.0f} s")
            time.sleep(0.2)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
        self.said.close()

    def get(self, path: str) -> httpx.Response:
        return self.client.get(path)

    def make(self, picture: Path, name: str) -> dict[str, Any]:
        with picture.open("rb") as stream:
            answer = self.client.post("/loras", files={"pictures": stream}, data={"name": name, "model": "mini"})
        answer.raise_for_status()
        return answer.json()

    def children(self) -> list[int]:
        """The processes that it has started and not yet buried."""
        found = []
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            found += [int(pid) for pid in (task / "children").read_text().split()]
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
