"""What the engine's process can do, by kind of job.

Each takes the request and a Teller, which it tells how far it is, and gives what the page is shown. Heavy imports
are made where they are needed: most jobs need none.
"""

from __future__ import annotations

import io
import json
import shlex
from argparse import ArgumentTypeError
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2l_ext.converters.errors import UserError

if TYPE_CHECKING:
    from i2l_ext.models.catalogue import Model
    from i2l_ext.weights.compute import ComputeOptions
    from i2l_ext.worker.main import Teller

Request = Mapping[str, Any]


def make(request: Request, tell: Teller) -> Any:
    """Pictures in, LoRA out: the fields of ``i2l make --json``, and who loads the file."""
    from i2l_ext.models import catalogue
    from i2l_ext.pipeline import Order
    from i2l_ext.pipeline import make as make_lora
    from i2l_ext.weights.compute import Callbacks

    order_facts = dict(request["order"])
    pictures = [Path(path) for path in order_facts.pop("pictures")]
    folder = Path(order_facts.pop("folder"))
    model = catalogue.find(order_facts["model"])
    tell.plan([{"title": "start"}, *steps(model)])
    callbacks = Callbacks(tell.step, tell.progress, tell.cancelled.is_set)
    order = Order(pictures=pictures, folder=folder, **order_facts)
    made = make_lora(order, _engine(request), callbacks, _cache(request))
    from PIL import Image

    with Image.open(made.preview) as preview:
        shown = _data_uri(preview.convert("RGB").resize((384, 384)))
    drawn = None
    if made.arch == "mini" and request.get("draw"):
        with suppress(ImportError):  # the LoRA is made; without a diffusers that knows the model it is not drawn with
            drawn = _draw(Path(made.file))
    return {**made.json(), "picture": shown, "drawn": drawn, "check": _run("check", made.file)}


PROMPTS = ("a circle left", "a star", "a square right", "a circle")


def _draw(file: Path) -> str | None:
    """The miniature's pictures with the LoRA, above the same without it, as a data URI."""
    from PIL import Image

    from i2l_ext.converters.lora import Lora
    from i2l_ext.mini.draw import Painter

    painter, seeds, side = Painter(), range(len(PROMPTS)), 128
    sheet = Image.new("RGB", (side * len(PROMPTS), 2 * side))
    for row, loras in enumerate(([(Lora.read(file), 1.0)], [])):
        for column, picture in enumerate(painter.paint_all(PROMPTS, list(seeds), loras, side)):
            sheet.paste(picture, (column * side, row * side))
    return _data_uri(sheet)


def steps(model: Model) -> list[dict[str, Any]]:
    """The steps of a make, as the pipeline titles them, with the bytes that each reads."""
    heads = [expert.heads for expert in model.experts] + ([model.bias] if model.bias else [])
    return [
        *(
            {"title": f"encode {part.id}", "bytes": part.nbytes, "layers": getattr(part.spec, "layers", None)}
            for part in model.encoders
        ),
        {"title": "decode", "bytes": sum(part.nbytes for part in heads), "layers": len(model.arch.made)},
    ]


def _engine(request: Request) -> ComputeOptions:
    from i2l_ext.commands import engine
    from i2l_ext.commands.make import memory
    from i2l_ext.weights.compute import ComputeOptions

    bound = request.get("memory")
    try:
        bytes_of_memory = memory(bound) if bound else None
    except (ArgumentTypeError, OverflowError):
        raise UserError(f"The memory bound {bound!r} is not a size such as 6GB. Change it in the settings.") from None
    return ComputeOptions(
        device=engine.device(request.get("device") or "auto"),
        dtype=engine.precision(request.get("precision") or "auto"),
        memory=bytes_of_memory,
    )


def _cache(request: Request) -> Any:
    from i2l_ext.encoders.cache import LIMIT, Cache

    limit = request.get("cache_bytes")
    cache = replace(Cache.default(), limit=LIMIT if limit is None else int(limit))
    return cache if cache.limit > 0 else None


def look(request: Request, tell: Teller) -> Any:
    """What the models see in pictures: for each ``{picture}``, its centre square as a data URI, or ``{error}``.
    ``numbers``: what messages call them; 1, 2, … unless told otherwise."""
    from i2l_ext import images

    pictures = request["pictures"]
    seen = []
    for number, path in zip(request.get("numbers") or range(1, len(pictures) + 1), pictures, strict=True):
        tell.check()
        try:
            square = images.open_image(Path(path), name=f"picture {number}", sizes=()).square
            seen.append({"picture": _data_uri(square.resize((192, 192)))})
        except UserError as error:
            seen.append({"error": str(error)})
    return seen


def _data_uri(image: Any) -> str:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{b64encode(stream.getvalue()).decode()}"


def inspect(request: Request, tell: Teller) -> Any:
    """What a LoRA is: the fields of ``i2l inspect --json``, the plot as a data URI, and who loads it."""
    tell.plan([{"title": "inspect"}])
    file, plot = request["file"], Path(request["folder"]) / "plot.png"
    found = _run("inspect", file, "--plot", plot)
    if plot.is_file():
        found["plot"] = f"data:image/png;base64,{b64encode(plot.read_bytes()).decode()}"
    tell.check()
    return {**found, "check": _run("check", file)}


def curve(request: Request, tell: Teller) -> Any:
    """The energy that each rank keeps: {kind, or "all" for the whole: [share at rank 1, at rank 2, …]}."""
    tell.plan([{"title": "curve"}])
    from i2l_ext.converters import Lora, rank

    lora = Lora.read(request["file"])
    values = rank.spectra(lora)
    most = max(map(len, values.values()))
    tell.check()
    at = [rank.kept(lora.arch, values, dict.fromkeys(values, number)) for number in range(1, most + 1)]
    return {"kept": {kind: [round(one[kind], 5) for one in at] for kind in at[0]}}


def mend(request: Request, tell: Teller) -> Any:
    """Do what ``i2l check`` advises for a program: the fields of that command's ``--json``."""
    tell.plan([{"title": "mend"}])
    found = _run("check", request["file"])["consumers"]
    advised = next((one["mend"] for one in found if one["consumer"] == request["consumer"]), None)
    if advised is None:
        raise UserError("There is nothing to mend: that program loads it as it is, or cannot run it at all.")
    words = shlex.split(advised)[1:]
    if "-o" in words:
        del words[words.index("-o") :]
    target = request["folder_of_export" if words[0] == "export" else "output"]
    told = _run(*words, "-o", target)
    return {**told, "command": words[0], "consumer": request["consumer"], "file": target}


def doctor(request: Request, tell: Teller) -> Any:
    """The lines of ``i2l doctor``, as the engine's own process finds them."""
    from i2l_ext.commands.doctor import examine

    found = examine(request.get("device") or "auto", request.get("precision") or "auto")
    facts = {"host": request["host"], **dict(found)}
    width = max(map(len, facts))
    return {"text": "\n".join(f"{name:{width}}  {value}" for name, value in facts.items())}


def command(request: Request, tell: Teller) -> Any:
    """What a command of ``i2l`` prints with ``--json``. Only those of COMMANDS, and only in the WebUI's own words:
    whoever fills in ``arguments`` has checked them."""
    words = [str(word) for word in request["arguments"]]
    tell.plan([{"title": words[0]}])
    result = _run(*words)
    tell.check()
    return result


def export(request: Request, tell: Teller) -> Any:
    """Write a trainer's folder; the fields of ``i2l export --json``, and what its starting script says."""
    found = command(request, tell)
    script = Path(found["folder"]) / found["run"]
    return {**found, "said": script.read_text(encoding="utf-8") if script.is_file() else found["run"]}


def models(request: Request, tell: Teller) -> Any:
    """Every model and what of it is here."""
    from i2l_ext.models.store import listing

    return [row.as_json() for row in listing()]


def download(request: Request, tell: Teller) -> Any:
    """Fetch what a model lacks, whose licences the user has agreed to; what is broken off goes on there next time.
    The paths of the files."""
    from i2l_ext.models import catalogue
    from i2l_ext.models.download import Job, missing
    from i2l_ext.models.download import download as fetch
    from i2l_ext.models.hubs import HUBS
    from i2l_ext.models.store import Folders, remember

    folders = Folders.default()
    parts = missing(catalogue.find(request["model"]), folders)
    if parts:
        remember(folders.own)
    total = sum(part.nbytes for part in parts)
    tell.plan([{"title": "download", "bytes": total}])
    hub = HUBS[request.get("source") or "huggingface"]()
    paths = fetch(parts, hub, folders.own, Job(_phases(tell), tell.cancelled.is_set)) if parts else []
    return {"model": request["model"], "files": [str(path) for path in paths]}


def verify(request: Request, tell: Teller) -> Any:
    """Read every byte of a model's files; what each part was held against."""
    from i2l_ext.models import catalogue
    from i2l_ext.models.download import Job
    from i2l_ext.models.download import verify as hold
    from i2l_ext.models.store import locate

    found = []
    for part in catalogue.find(request["model"]).parts:
        tell.plan([{"title": f"verify {part.id}", "bytes": part.nbytes}])
        paths = locate(part)
        found.append({"id": part.id, "found": hold(part, paths, Job(_phases(tell), tell.cancelled.is_set))
                      if paths else "not here"})  # fmt: skip
    return {"model": request["model"], "parts": found}


def _phases(tell: Teller) -> Callable[[str, int, int], None]:
    """Bytes of a phase, told as a step of their own."""
    now = ""

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal now
        if phase != now:
            now = phase
            tell.plan([{"title": phase, "bytes": total}])
        tell.progress(done / max(total, 1))

    return progress


def _run(*words: object) -> Any:
    """The JSON that ``i2l`` prints."""
    from i2l_ext.commands import main

    printed = io.StringIO()
    try:
        args = main.parser().parse_args([*map(str, words), "--json"])
    except SystemExit:  # argparse has told stderr why
        raise UserError("The engine does not understand this command. Restart the WebUI.") from None
    with redirect_stdout(printed):
        code = args.run(args)
    text = printed.getvalue()
    if code and not text:
        raise UserError(f"{words[0]} ended with code {code}.")
    return json.loads(text)


WORK: dict[str, Callable[[Request, Teller], Any]] = {
    "make": make,
    "look": look,
    "inspect": inspect,
    "curve": curve,
    "mend": mend,
    "doctor": doctor,
    "models": models,
    "download": download,
    "verify": verify,
    "convert": command,
    "export": export,
}
"""By kind of job."""
