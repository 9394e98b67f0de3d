"""What the engine's process does for a message: the operation, and what the page is shown of its result."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2l_ext.converters.errors import UserError
from i2l_ext.operations import Context, perform
from i2l_ext.operations.previews import data_uri
from i2l_ext.requests import CheckRequest, InspectRequest
from i2l_ext.worker.messages import Message

if TYPE_CHECKING:
    from i2l_ext.operations.doctor import DoctorResult
    from i2l_ext.operations.lora_files import ExportResult
    from i2l_ext.operations.lora_reports import InspectResult
    from i2l_ext.operations.make import BatchResult
    from i2l_ext.operations.models import VerifyResult
    from i2l_ext.pipeline import MakeResult

PROMPTS = ("a circle left", "a star", "a square right", "a circle")
"""What is drawn with a LoRA of the miniature."""

SHOWN, DRAWN = 384, 128
"""Pixels of a LoRA's preview, and of one image of the miniature, on the page."""


def run_task(message: Message, context: Context) -> Any:
    """Do what a message asks; the JSON of the result. Raises UserError, Cancelled: then nothing was saved, unless the
    reporter was told."""
    request = message.request
    if isinstance(request, InspectRequest) and message.folder:
        request = replace(request, plot=message.folder / "plot.png")
    result = perform(request, context)
    show = PAGES.get(request.kind)
    told = result.json() if show is None else show(result, message, context)
    context.reporter.end_saving(told)
    more = LATER.get(request.kind)
    return told if more is None or context.reporter.cancelled() else {**told, **more(result, message)}


def _make(made: MakeResult, message: Message, context: Context) -> dict[str, Any]:
    """The preview, and who loads it."""
    from PIL import Image

    with Image.open(made.preview) as preview:
        shown = data_uri(preview.convert("RGB").resize((SHOWN, SHOWN)))
    return {**made.json(), "picture": shown, "drawn": None, "check": _check(Path(made.file), context)}


def _drawn(made: MakeResult, message: Message) -> dict[str, Any]:
    """What the miniature draws with its LoRA."""
    drawn = None
    if made.arch == "mini" and message.draw:
        with suppress(ImportError):  # without a diffusers that knows the model it is not drawn with
            drawn = _draw(Path(made.file))
    return {"drawn": drawn}


def _draw(file: Path) -> str:
    """The miniature's images with the LoRA, above the same without it, as a data URI."""
    from PIL import Image

    from i2l_ext.converters.lora import Lora
    from i2l_ext.mini.sampler import Sampler

    sampler, seeds = Sampler(), range(len(PROMPTS))
    sheet = Image.new("RGB", (DRAWN * len(PROMPTS), 2 * DRAWN))
    for row, loras in enumerate(([(Lora.read(file), 1.0)], [])):
        for column, picture in enumerate(sampler.images(PROMPTS, list(seeds), loras, DRAWN)):
            sheet.paste(picture, (column * DRAWN, row * DRAWN))
    return data_uri(sheet)


def _inspect(found: InspectResult, message: Message, context: Context) -> dict[str, Any]:
    """The plot as a data URI, and who loads the file."""
    plot = {}
    if found.plot is not None:
        plot = {"plot": f"data:image/png;base64,{b64encode(found.plot.read_bytes()).decode()}"}
    file = message.request.file  # type: ignore[attr-defined]
    return {**found.json(), **plot, "check": _check(file, context)}


def _check(file: Path, context: Context) -> Any:
    return perform(CheckRequest(file), context).json()


def _export(written: ExportResult, message: Message, context: Context) -> dict[str, Any]:
    """What the script says from which the training starts."""
    export = written.written
    script = Path(export.folder) / export.run
    said = script.read_text(encoding="utf-8") if script.is_file() else export.run
    return {**written.json(), "said": said}


def _verify(found: VerifyResult, message: Message, context: Context) -> dict[str, Any]:
    if found.problems:
        raise UserError(" ".join(found.problems))
    return found.json()


def _doctor(found: DoctorResult, message: Message, context: Context) -> dict[str, Any]:
    return {"text": found.text}


def _batch(made: BatchResult, message: Message, context: Context) -> dict[str, Any]:
    """The previews of all that were made."""
    from PIL import Image

    told = made.json()
    for one in told["made"]:
        with Image.open(one["preview"]) as preview:
            one["picture"] = data_uri(preview.convert("RGB").resize((DRAWN, DRAWN)))
    return told


PAGES: Mapping[str, Callable[[Any, Message, Context], dict[str, Any]]] = {
    "make": _make, "batch": _batch, "inspect": _inspect, "export": _export, "verify": _verify, "doctor": _doctor,
}  # fmt: skip
"""Kind of request -> what the page is shown, where that is not the result alone."""

LATER: Mapping[str, Callable[[Any, Message], dict[str, Any]]] = {"make": _drawn}
"""Kind of request -> what else the page is shown, which takes its time. Nobody who cancels waits for it."""
