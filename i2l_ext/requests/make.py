"""Requests around making a LoRA from pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from i2l_ext.converters.architectures import ARCHITECTURES, Architecture
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.key_formats import KEY_FORMATS
from i2l_ext.converters.rank import RANK_LIMIT
from i2l_ext.requests.crops import parse_crop
from i2l_ext.requests.fields import Request, bad_request, option

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""A user's word for a number format -> the name that safetensors has for it."""

LOSSY = "write it even if fp16 loses more than 1 % of the update"

_USUAL = Architecture.key_format
_OTHERS = {arch.title.split()[0]: arch.key_format for arch in ARCHITECTURES.values() if arch.key_format != _USUAL}
OWN_FORMATS = "; ".join([_USUAL, *(f"{key_format} for {model}" for model, key_format in _OTHERS.items())])
"""The key formats that are written unless another is asked for, in words."""

HOSTS = ("forge-neo", "sdnext", "forge", "a1111")


@dataclass(frozen=True)
class MakeRequest(Request):
    """A LoRA from one or several pictures.

    A picture may be named several times, with another square of ``crops`` each time. The pictures' updates are averaged
    by ``weights``; heads that see all pictures together count their tokens by them. ``strength`` scales the whole
    update. ``name`` None: after the first picture or folder. ``folder`` None: the WebUI's LoRA folder. ``model`` None:
    the first that is downloaded, else the miniature. ``key_format`` None: that of the
    model's architecture. ``dtype`` and ``rank`` None: as made.
    """

    kind: ClassVar[str] = "make"

    pictures: tuple[Path, ...] = option("a picture, or a folder of pictures", flags=(), metavar="PICTURE", local=True)
    name: str | None = option("the LoRA's name (default: after the picture or the folder)", None)
    folder: Path | None = option(
        "the folder it goes to (default: the WebUI's models/Lora)", None, flags=("--lora-dir",), local=True
    )
    model: str | None = option("see `i2l models` (default: the first that is downloaded, else mini)", None)
    heads: Path | None = option("heads of your own in place of the model's: a .safetensors file", None, local=True)
    weights: tuple[float, ...] | None = option("how much each picture counts", None, metavar="W")
    crops: tuple[str, ...] | None = option(
        "the square of each picture: LEFT,TOP,SIDE in pixels, or centre (default: centre)", None, metavar="SQUARE",
        syntax=parse_crop,
    )  # fmt: skip
    strength: float = option("scales the whole update (default: 1)", 1.0, minimum=-10, maximum=10, nonzero=True)
    key_format: str | None = option(
        f"key format (default: {OWN_FORMATS})", None, choices=tuple(KEY_FORMATS), flags=("--to", "--format")
    )
    dtype: str | None = option("of the file (default: as made)", None, choices=tuple(DTYPES))
    lossy: bool = option(LOSSY, False)
    rank: int | None = option(
        "reset to this rank, exactly (default: as made)", None, minimum=1, maximum=RANK_LIMIT, metavar="K"
    )
    blocks: str | None = option("keep or scale blocks: 0-19 or 0-19:0.5,late:1.2", None, metavar="LIST")
    kinds: str | None = option("keep or scale kinds of layers: attn or txt:0,mlp:0.5", None, metavar="LIST")
    grey: bool = option("also make NAME-grey, the LoRA of grey pictures, for the negative branch", False)
    overwrite: bool = option("replace a LoRA of that name", False, local=True)
    description: str = option("shown on the LoRA's card", "", prose=True)
    activation_text: str = option("put into the prompt with the LoRA", "", prose=True)
    like: Path | None = option(
        "a LoRA that i2l has made: what is not said is as there, and the same pictures weigh the same",
        None, metavar="LORA", local=True,
    )  # fmt: skip
    host: str | None = option("the WebUI whose model names the card has", None, choices=HOSTS, local=True)

    def validate(self) -> None:
        """Raises UserError where a value is out of its range."""
        super().validate()
        if self.weights is not None and not all(0 < weight < float("inf") for weight in self.weights):
            raise UserError(
                "A picture's weight must be greater than 0. Leave out a picture that is to have no part.",
                "out_of_range",
            )


@dataclass(frozen=True)
class BatchRequest(MakeRequest):
    """A LoRA for each picture and sub-folder; or, with ``names``, one for each name: of the pictures that have it, in
    their order."""

    kind: ClassVar[str] = "batch"

    names: tuple[str, ...] | None = option("for each picture the LoRA that it is for", None)

    def validate(self) -> None:
        """Raises UserError where a value is out of its range, or where there is not one name for each picture."""
        super().validate()
        if self.name is not None or self.weights is not None:
            raise UserError("--each names and weighs each LoRA by itself: leave out --name and --weights.")
        if self.names is not None and len(self.names) != len(self.pictures):
            raise bad_request("'names'")
        if self.crops is not None and (self.names is None or len(self.crops) != len(self.names)):
            raise UserError("--each takes the centre of each picture: leave out --crops.")


@dataclass(frozen=True)
class PreviewRequest(Request):
    """What the models see in pictures: a square of each; or, with ``whole``, all of each."""

    kind: ClassVar[str] = "look"

    pictures: tuple[Path, ...] = option("the pictures", flags=(), local=True)
    numbers: tuple[int, ...] | None = option("what messages call them; 1, 2, … unless told otherwise", None)
    crops: tuple[str, ...] | None = option("the square of each; its centre unless told otherwise", None,
                                           syntax=parse_crop)  # fmt: skip
    whole: bool = option("show the whole pictures", False)

    def validate(self) -> None:
        """Raises UserError where there is not one number and one square for each picture."""
        super().validate()
        for name in ("numbers", "crops"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.pictures):
                raise bad_request(repr(name))

    def of(self, chosen: Sequence[int]) -> PreviewRequest:
        """The same of some of its pictures only, by their index from 0."""
        lists = {name: getattr(self, name) or () for name in ("pictures", "numbers", "crops")}
        some: dict[str, Any] = {name: tuple(one[at] for at in chosen) for name, one in lists.items() if one}
        return replace(self, **some)
