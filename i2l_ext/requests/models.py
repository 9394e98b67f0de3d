"""Requests on models, their files, and the cache of embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from i2l_ext.requests.fields import Request, option

TORCH_KINDS = ("auto", "cpu")

PACK_FORMS = ("int9", "int8", "fp8")
"""How model files are packed; the first one unless another is asked for."""

HUBS = ("huggingface", "modelscope")


@dataclass(frozen=True)
class ModelsRequest(Request):
    """Every model, and which of its files are here. ``structures``: with the structure hashes."""

    kind: ClassVar[str] = "models"

    structures: bool = option("with structure hashes", False)


@dataclass(frozen=True)
class DownloadRequest(Request):
    """Fetch the files that a model lacks. ``agreed``: the user has seen the licences and agrees."""

    kind: ClassVar[str] = "download"

    model: str = option("a model, as `i2l models` lists them", flags=(), metavar="NAME")
    source: str = option("the hub", "huggingface", choices=HUBS, flags=("--from",))
    folder: Path | None = option(
        "a folder of your choice; name it in I2L_MODELS later", None, flags=("--to",), metavar="DIR", local=True
    )
    agreed: bool = option("agree to the licences without being asked", False, flags=("--yes",))
    packed: bool = option("pack the files while they arrive: little more than half the size on the disk", False)


@dataclass(frozen=True)
class PackRequest(Request):
    """Pack the model files of a model that are here to little more than half their size. ``verify``: pictures
    on which packed and unpacked files are compared."""

    kind: ClassVar[str] = "pack"

    model: str = option("a model, as `i2l models` lists them", flags=(), metavar="NAME")
    form: str = option(
        "int9 (default); int8, an eighth smaller and twice as coarse; or fp8, nine times as coarse", PACK_FORMS[0],
        choices=PACK_FORMS, flags=("--to",),
    )  # fmt: skip
    verify: tuple[Path, ...] = option(
        "then make the LoRA of these pictures in memory, with packed and with unpacked files, and say how far apart "
        "embeddings and LoRA are", (), flags=("--verify",), metavar="PICTURE", local=True,
    )  # fmt: skip


@dataclass(frozen=True)
class TrustRequest(Request):
    """See whose code a v2 model brings, and agree to run it. ``digest`` None: only see it."""

    kind: ClassVar[str] = "trust"

    model: str = option("a model, as `i2l models` lists them", flags=(), metavar="NAME")
    digest: str | None = option(
        "agree to run the code of exactly this digest", None, flags=("--agree",), metavar="SHA256"
    )
    withdraw: bool = option("agree no longer", False)


@dataclass(frozen=True)
class SetupPlanRequest(Request):
    """What setting up DiffSynth-Studio would do: where, from where, how large. ``torch``: cpu, or auto, the kind that
    runs here."""

    kind: ClassVar[str] = "setup_plan"

    torch: str = option("its build: cpu, or auto, as here (default)", "auto", choices=TORCH_KINDS)


@dataclass(frozen=True)
class SetupRequest(SetupPlanRequest):
    """Set up DiffSynth-Studio, through which the v2 models run, in a folder of its own. ``agreed``: the user has seen
    what it would do."""

    kind: ClassVar[str] = "setup"

    agreed: bool = option("do it without being asked", False, flags=("--yes",), local=True)


@dataclass(frozen=True)
class VerifyRequest(Request):
    """Read every byte of model files. ``model`` None: of all models."""

    kind: ClassVar[str] = "verify"

    model: str | None = option("one model; all without", None, flags=(), metavar="NAME")


@dataclass(frozen=True)
class CacheRequest(Request):
    """Show or clear the encoder cache."""

    kind: ClassVar[str] = "cache"

    clear: bool = option("delete what is cached", False)
