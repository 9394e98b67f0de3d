"""The nodes in a real ComfyUI, through its API: what a user does, and what goes wrong.

    python benchmarks/comfyui.py COMFYUI_FOLDER [--address http://127.0.0.1:8188]

ComfyUI runs already, with this checkout in its custom_nodes. Only the miniature is used. LoRAs named i2l-trial… are
made in its first loras folder (models/loras), and removed at the end.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LINES = "a circle\na star left"


class Api:
    def __init__(self, address: str) -> None:
        self.address = address

    def __call__(self, path: str, body: Any = None) -> Any:
        """The JSON of an answer; of a refusal too."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as refusal:
            return json.loads(refusal.read())

    def queue(self, prompt: Mapping[str, Any]) -> str:
        return self("/prompt", {"prompt": prompt, "client_id": "i2l"})["prompt_id"]

    def wait(self, id: str) -> dict[str, Any]:
        while not (ended := self(f"/history/{id}")):
            time.sleep(0.05)
        return ended[id]

    def run(self, prompt: Mapping[str, Any]) -> dict[str, Any]:
        return self.wait(self.queue(prompt))


def make(name: str, **values: Any) -> dict[str, Any]:
    asked = {"images": ["1", 0], "name": name, "model": "mini", "strength": 1.0, "weights": "", "rank": 0, **values}
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
        "2": {"class_type": "I2LMake", "inputs": asked},
    }


def said(ended: Mapping[str, Any]) -> str:
    """How a prompt ended, and the line on a node."""
    for kind, told in ended["status"]["messages"]:
        if kind == "execution_error":
            return f"error on {told['node_type']}: {told['exception_message'].strip()}"
        if kind == "execution_interrupted":
            return "interrupted"
    return ended["status"]["status_str"]


def trials(api: Api, loras: Path) -> Iterator[tuple[str, str]]:
    """What was tried, and what came of it."""

    def files() -> list[str]:
        return sorted(path.name for path in loras.glob("i2l-trial*"))

    start = time.perf_counter()
    drawn = {"class_type": "I2LDraw", "inputs": {
        "lora_name": ["2", 0], "strength": 1.0, "prompt": LINES, "seed": 0, "size": 64}}  # fmt: skip
    ended = api.run({**make("i2l-trial"), "3": drawn})
    yield "a LoRA from a picture, drawn with", f"{said(ended)}, {time.perf_counter() - start:.1f} s, {files()}"
    start = time.perf_counter()
    yield "the same prompt again", f"{said(api.run(make('i2l-trial')))}, {time.perf_counter() - start:.2f} s, {files()}"
    api("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1)
    start = time.perf_counter()
    ended = api.run(make("i2l-trial"))
    yield "again, ComfyUI has forgotten it", f"{said(ended)}, {time.perf_counter() - start:.2f} s, {files()}"
    other = api.run(make("i2l-trial", strength=0.5))
    yield "another LoRA of that name", f"{said(other)}, {files()}"
    before = files()
    id = api.queue(make("i2l-trial-stopped"))
    time.sleep(1)
    start = time.perf_counter()
    api("/interrupt", {})
    ended = api.wait(id)
    took = time.perf_counter() - start
    time.sleep(2)
    yield "interrupt", f"{said(ended)} after {took:.2f} s, new files: {sorted(set(files()) - set(before))}"
    ids = [api.queue(make("i2l-trial-two", strength=strength)) for strength in (0.5, 0.7)]
    yield "two prompts at once", f"{[said(api.wait(id)) for id in ids]}, {[one for one in files() if 'two' in one]}"
    check = {"1": {"class_type": "I2LCheck", "inputs": {"lora_name": "i2l-trial.safetensors"}}}
    yield "check", api.run(check)["outputs"]["1"]["text"][0].splitlines()[3]
    yield "weights that are none", said(api.run(make("i2l-trial-w", weights="1 x")))
    yield "a model that is not downloaded", said(api.run(make("i2l-trial-q", model="qwen-image-style")))
    refused = api("/prompt", {"prompt": make("a/b")})
    yield "a name that is none", refused["node_errors"]["2"]["errors"][0]["details"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--address", default="http://127.0.0.1:8188")
    args = parser.parse_args()
    loras = args.comfyui / "models" / "loras"
    try:
        for what, came in trials(Api(args.address), loras):
            print(f"| {what} | {came} |", flush=True)
        print("half-written files:", [path.name for path in loras.rglob("*") if path.name.endswith((".part", ".tmp"))])
    finally:
        for path in loras.glob("i2l-trial*"):
            path.unlink()


if __name__ == "__main__":
    main()
