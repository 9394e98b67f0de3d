"""Many clients at once on the stand-alone server, and what it has become of afterwards.

    python benchmarks/load.py [--clients 50] [--seconds 600] [--seed 0] [--record]

Each client asks for the status, for makes with the miniature, for cancels, and for what is wrong, as fast as it is
answered with a pause of up to a second. Every answer is to be one of the promised ones; and once it is quiet again the
server is to hold no more processes, files, threads or temporary files than before, and its memory is not to have grown
with the requests.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import httpx  # noqa: E402
from PIL import Image  # noqa: E402

from attacks.server import Server  # noqa: E402
from results import record_trust, table  # noqa: E402

PROMISED = {200, 202, 400, 404, 411, 413, 415, 422, 429, 503}
EVERY = 2.0
"""Seconds between two looks at the server."""

QUIET = 15.0
"""Seconds that the server is left alone before the last look."""


@dataclass
class Client:
    """One of them; ``ids``: the jobs it has asked for."""

    base: str
    random: Random
    pictures: Sequence[bytes]
    until: float
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def run(self) -> None:
        kinds: Sequence[tuple[Callable[[httpx.Client], httpx.Response], float]] = (
            (self._status, 0.35),
            (self._one, 0.25),
            (self._make, 0.15),
            (self._cancel, 0.1),
            (self._bad, 0.15),
        )
        with httpx.Client(base_url=self.base, timeout=60) as client:
            while time.monotonic() < self.until:
                [ask] = self.random.choices([kind for kind, _ in kinds], [share for _, share in kinds])
                start = time.monotonic()
                try:
                    answer = ask(client)
                except httpx.HTTPError as error:
                    self.wrong.append(f"{ask.__name__}: {type(error).__name__}: {error}")
                    continue
                self.seconds.append(time.monotonic() - start)
                self.answers[ask.__name__.strip("_"), answer.status_code] += 1
                if answer.status_code not in PROMISED:
                    self.wrong.append(f"{ask.__name__}: {answer.status_code} {answer.text[:200]}")
                time.sleep(self.random.uniform(0, 1))

    def _status(self, client: httpx.Client) -> httpx.Response:
        return client.get(self.random.choice(("/loras", "/models", "/openapi.json")))

    def _one(self, client: httpx.Client) -> httpx.Response:
        return client.get(f"/loras/{self.random.choice(self.ids) if self.ids else '0'}")

    def _make(self, client: httpx.Client) -> httpx.Response:
        files = [("pictures", ("a.png", data)) for data in self.random.sample(self.pictures, 2)]
        answer = client.post("/loras", files=files, data={"name": f"load-{self.random.randrange(4)}", "model": "mini"})
        if answer.status_code == 202:
            self.ids.append(answer.json()["id"])
        return answer

    def _cancel(self, client: httpx.Client) -> httpx.Response:
        return client.delete(f"/loras/{self.ids.pop() if self.ids else '0'}")

    def _bad(self, client: httpx.Client) -> httpx.Response:
        draw = self.random.randrange(5)
        if draw == 0:
            return client.post("/loras", content=b"x", headers={"content-type": "multipart/form-data; boundary=x"})
        if draw == 1:
            return client.post("/inspect", json={"lora": "../../etc/passwd"})
        if draw == 2:
            return client.post("/loras", files={"pictures": b"not a picture"}, data={"name": "../x"})
        if draw == 3:
            return client.post("/export", content=b"[" * 60_000, headers={"content-type": "application/json"})
        return client.post("/convert", json={"lora": "no.safetensors", "to": "x", "more": 1})


@dataclass(frozen=True)
class Look:
    """What the server holds: seconds since the start, resident MB, open files, threads, child processes, temporary
    files."""

    at: float
    megabytes: float
    handles: int
    threads: int
    children: int
    temporary: int


def look(server: Server, start: float) -> Look:
    proc = Path(f"/proc/{server.process.pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    temporary = [path for path in (server.folder / "tmp").rglob("*") if path.is_file()]
    temporary += list((server.folder / "Lora").rglob(".i2l-*")) + list((server.folder / "state").rglob("*.part"))
    return Look(
        time.monotonic() - start,
        int(status["VmRSS"].split()[0]) / 1024,
        len(list((proc / "fd").iterdir())),
        int(status["Threads"]),
        len(server.children()),
        len(temporary),
    )


def slope(looks: Sequence[Look]) -> float:
    """MB an hour, by least squares over the second half: before, caches and pools fill."""
    late = looks[len(looks) // 2 :]
    middle = sum(one.at for one in late) / len(late)
    spread = sum((one.at - middle) ** 2 for one in late)
    return 3600 * sum((one.at - middle) * one.megabytes for one in late) / spread if spread else 0.0


@dataclass(frozen=True)
class Outcome:
    """What came of a load."""

    clients: Sequence[Client]
    looks: Sequence[Look]
    before: Look
    after: Look
    unheard: int

    @property
    def wrong(self) -> list[str]:
        """One line for each thing that is not as promised."""
        found = [line for client in self.clients for line in client.wrong]
        for name, most in (("children", 0), ("temporary", self.before.temporary), ("handles", self.before.handles + 4)):
            if getattr(self.after, name) > most:
                found.append(f"{name}: {getattr(self.before, name)} before, {getattr(self.after, name)} after")
        return found + ([f"{self.unheard} jobs were not ended"] if self.unheard else [])


def load(clients: int, seconds: float, seed: int, folder: Path, quiet: float = QUIET) -> Outcome:
    """Let so many clients ask for so long."""
    random = Random(seed)
    pictures = []
    for number in range(6):
        path = folder / f"{number}.png"
        Image.effect_noise((120 + number, 90), 60).convert("RGB").save(path)
        pictures.append(path.read_bytes())
    with Server(folder) as server:
        start = time.monotonic()
        before = look(server, start)
        asking = [
            Client(str(server.client.base_url), Random(random.getrandbits(32)), pictures, start + seconds)
            for _ in range(clients)
        ]
        threads = [threading.Thread(target=client.run) for client in asking]
        for thread in threads:
            thread.start()
        looks = []
        while any(thread.is_alive() for thread in threads):
            looks.append(look(server, start))
            time.sleep(min(EVERY, seconds / 10))
        for job in server.get("/loras").json():
            if job["state"] in ("waiting", "running", "stopping"):
                server.client.delete(f"/loras/{job['id']}")
        end = time.monotonic() + 60
        unheard = 1
        while unheard and time.monotonic() < end:
            unheard = sum(job["state"] in ("waiting", "running", "stopping") for job in server.get("/loras").json())
            time.sleep(0.2)
        time.sleep(quiet)
        return Outcome(asking, looks, before, look(server, start), unheard)


def told(outcome: Outcome) -> str:
    """The tables."""
    answers: Counter[tuple[str, int]] = sum((client.answers for client in outcome.clients), Counter())
    seconds = sorted(second for client in outcome.clients for second in client.seconds)
    kinds = sorted({kind for kind, _ in answers})
    codes = sorted({code for _, code in answers})
    rows = [(kind, *(f"{answers[kind, code]:,}" for code in codes)) for kind in kinds]
    held = ("megabytes", "handles", "threads", "children", "temporary")
    states = [
        (title, *(f"{getattr(one, name):.0f}" for name in held))
        for title, one in (
            ("before", outcome.before),
            ("under load, the most", None),
            (f"{QUIET:.0f} s after", outcome.after),
        )
        for one in [one or Look(0, *(max(getattr(each, name) for each in outcome.looks) for name in held))]
    ]
    wrong, asked = outcome.wrong, sum(answers.values())
    return (
        f"{len(outcome.clients)} clients, {outcome.looks[-1].at:.0f} s, {asked:,} requests; wrong: {len(wrong)}"
        f"{' (' + '; '.join(wrong[:5]) + ')' if wrong else ''}. Answered within {seconds[len(seconds) // 2]:.3f} s "
        f"(median), {seconds[int(len(seconds) * 0.99)]:.2f} s (99 %), {seconds[-1]:.2f} s (all). Memory of the server "
        f"in the second half: {slope(outcome.looks):+.1f} MB an hour, by least squares.\n\n"
        + table(("request", *map(str, codes)), rows)
        + "\n\n"
        + table(("the server", "MB resident", "open files", "threads", "engines", "temporary files"), states)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write the tables into benchmarks/TRUST.md")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="i2l-load-"))
    try:
        outcome = load(args.clients, args.seconds, args.seed, folder)
    finally:
        said = folder / "server.said"
        if said.exists() and "Traceback" in (text := said.read_text(errors="replace")):
            print(text[-2000:])
        shutil.rmtree(folder, ignore_errors=True)
    text = told(outcome)
    record_trust("Load", text, script=__file__) if args.record else print(text)
    return int(bool(outcome.wrong))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
