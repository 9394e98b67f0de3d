"""How nodes ask: ComfyUI's inputs, with defaults, ranges and tips of the requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from i2l_ext.comfyui.host import lora_names

if TYPE_CHECKING:
    from i2l_ext.requests import Field

AS_MADE = "as made"
NONE = "none"


class LoraName(str):
    """The type of an output that any loader's list of LoRAs takes. ComfyUI compares types by ``!=``: a list of names,
    which is the type of such an input, differs from none of them."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list) or str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


LORA_NAME = LoraName("COMBO")


def refusal(check: Callable[[], object]) -> str:
    """The line of the UserError that ``check`` raises; "" where it raises none."""
    from i2l_ext.converters.errors import UserError

    try:
        check()
    except UserError as error:
        return str(error)
    return ""


def number(field: Field, *, step: float = 1, default: Any = None, low: Any = None) -> tuple[str, dict[str, Any]]:
    """A number of a request. ``default`` and ``low`` are for one that a 0 leaves out."""
    info = field.info
    kind = "INT" if field.type is int else "FLOAT"
    bounds = {"min": info.minimum if low is None else low, "max": info.maximum}
    told = {key: field.type(bound) for key, bound in bounds.items() if bound is not None}
    if kind == "INT":
        told.setdefault("max", (1 << 53) - 1)
    return kind, {"default": field.default if default is None else default, "step": step, "tooltip": info.help, **told}


def text(tip: str, default: str = "", *, lines: bool = False) -> tuple[str, dict[str, Any]]:
    """A text."""
    return "STRING", {"default": default, "multiline": lines, "tooltip": tip}


def choice(choices: Sequence[str], tip: str, default: str | None = None) -> tuple[list[str], dict[str, Any]]:
    """One of some words; the first unless ``default`` names one."""
    return list(choices), {"tooltip": tip, **({"default": default} if default else {})}


def lora(tip: str, *, optional: bool = False) -> tuple[list[str], dict[str, Any]]:
    """A LoRA of ComfyUI's lists. ``optional``: or none."""
    return [*([NONE] if optional else []), *lora_names()], {"tooltip": tip}


def strength(tip: str = "how strongly it acts") -> tuple[str, dict[str, Any]]:
    """A LoRA's strength."""
    return "FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01, "tooltip": tip}
