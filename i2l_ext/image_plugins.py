"""Formats of pictures that Pillow reads with a plugin only: HEIC and JPEG XL, where their packages are installed.

Whether they are is found without importing them: a WebUI's own process asks, and only the engine's reads pictures.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec


@dataclass(frozen=True)
class PluginFormat:
    """``title``: for people. ``pillow``: Pillow's name. ``module`` has ``register``, a function without arguments; ""
    where its import is enough. ``package``: what to install for it. ``types``: media types, as browsers name them."""

    title: str
    pillow: str
    module: str
    register: str
    package: str
    suffixes: tuple[str, ...]
    types: tuple[str, ...]


PLUGIN_FORMATS = (
    PluginFormat(
        "HEIC", "HEIF", "pillow_heif", "register_heif_opener", "pillow-heif", (".heic", ".heif", ".hif"),
        ("image/heic", "image/heif"),
    ),
    PluginFormat("JPEG XL", "JXL", "pillow_jxl", "", "pillow-jxl-plugin", (".jxl",), ("image/jxl",)),
)  # fmt: skip


def installed_formats() -> tuple[PluginFormat, ...]:
    """Those whose plugin is there. None of them is imported."""
    return tuple(one for one in PLUGIN_FORMATS if find_spec(one.module) is not None)


@cache
def registered_formats() -> tuple[PluginFormat, ...]:
    """Those that Pillow can read from now on: their plugins are imported. One that does not load counts as absent."""
    found = []
    for one in installed_formats():
        with suppress(Exception):  # a plugin for another Pillow may raise anything
            module = import_module(one.module)
            if one.register:
                getattr(module, one.register)()
            found.append(one)
    return tuple(found)


def accepted_types() -> tuple[str, ...]:
    """What a browser's file chooser is to offer: media types, and the suffixes that few systems have a type for."""
    return (*_TYPES, *(word for one in installed_formats() for word in (*one.types, *one.suffixes)))


_TYPES = ("image/png", "image/apng", "image/jpeg", "image/webp", "image/bmp", "image/gif", "image/avif")
"""Of the formats that Pillow itself reads."""


def jxl_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that a JPEG XL file states; None where it states none. Its plugin decodes all of a file before
    it tells how large the picture is."""
    codestream = _codestream(data)
    if codestream[:2] != b"\xff\x0a":
        return None
    bits, at = int.from_bytes(codestream[2:18].ljust(16, b"\0"), "little"), 0

    def take(count: int) -> int:
        nonlocal at
        at += count
        return bits >> (at - count) & ((1 << count) - 1)

    def side(small: int) -> int:
        return (take(5) + 1) * 8 if small else take(_SIDE_BITS[take(2)]) + 1

    small = take(1)
    height = side(small)
    ratio = take(3)
    if not ratio:
        return side(small), height
    over, under = _RATIOS[ratio]
    return height * over // under, height


_SIDE_BITS = (9, 13, 18, 30)
_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}


def _codestream(data: bytes) -> bytes:
    """Its first bytes: the file itself, or what the boxes ``jxlc`` or ``jxlp`` of a container hold."""
    if data[4:8] != b"JXL ":
        return data[:32]
    found, at = b"", 0
    while at + 8 <= len(data) and len(found) < 32:
        size, kind, head = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        end = at + size if size else len(data)
        if end < at + head:
            break
        skip = _BOXES.get(kind)
        if skip is not None:
            found += data[at + head + skip : min(end, at + head + skip + 32)]
        at = end
    return found


_BOXES = {b"jxlc": 0, b"jxlp": 4}
"""Boxes of the codestream -> bytes before it: of a part its number."""
