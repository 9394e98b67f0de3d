"""Pictures: every format that Pillow writes, damaged blindly, in its notes, in its sizes, and inflated."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from attacks.bytes import ODD, damaged, spliced
from attacks.judge import Flaw
from i2l_ext import images

SHOWN = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "AVIF", "MPO")
"""What most of the inputs are made of; the others are to be refused by their name."""

ROOMS: Mapping[str, Mapping[str, Any]] = {
    "exif": {"exif": True},
    "icc": {"icc_profile": b"\0\0\1\x0cnot a profile" + bytes(300)},
    "progressive": {"progressive": True},
    "lossless": {"lossless": True},
    "several": {"save_all": True},
    "plain": {},
}
"""Ways to save, where the format has them."""

LARGEST = 58_000_000
"""Pixels of what is inflated here. What the largest picture that is taken costs, is in docs/trust.md by itself."""


def seeds() -> dict[str, list[bytes]]:
    """Small sound pictures by format, in every mode and way that this Pillow can save."""
    Image.init()
    picture = Image.effect_mandelbrot((67, 41), (-2, -1, 1, 1), 20)
    colours = Image.merge("RGB", (picture, picture.rotate(180), Image.linear_gradient("L").resize(picture.size)))
    rgba = colours.copy()
    rgba.putalpha(picture)
    modes = {
        "RGB": colours,
        "L": picture,
        "RGBA": rgba,
        "P": colours.quantize(31),
        "1": picture.convert("1"),
        "CMYK": colours.convert("CMYK"),
        "LA": rgba.convert("LA"),
        "I;16": picture.convert("I;16"),
        "I": picture.convert("I"),
        "F": picture.convert("F"),
    }
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    found: dict[str, list[bytes]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for format in sorted(Image.SAVE):
            for image in modes.values():
                for how in ROOMS.values():
                    options = {**how, "exif": exif.tobytes()} if "exif" in how else dict(how)
                    if "save_all" in options:
                        options["append_images"] = [image.rotate(90)]
                    stream = BytesIO()
                    with suppress(Exception):
                        image.save(stream, format, **options)
                        found.setdefault(format, []).append(stream.getvalue())
    return {format: sorted(set(made)) for format, made in found.items()}


def _png_chunk(random: Random, data: bytes) -> bytes:
    """A chunk of a PNG damaged, moved or doubled, its checksum right again."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += size + 12
    if not chunks:
        return damaged(random, data)
    index = random.randrange(len(chunks))
    kind, body = chunks[index]
    if kind == b"IDAT" and random.random() < 0.5:
        with suppress(zlib.error):
            body = zlib.compress(damaged(random, zlib.decompress(body)))
    elif random.random() < 0.2:
        chunks.insert(random.randrange(len(chunks)), chunks[index])
    elif random.random() < 0.2:
        kind = random.choice((b"tRNS", b"PLTE", b"acTL", b"fcTL", b"fdAT", b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"CgBI"))
    else:
        body = damaged(random, body)
    chunks[index] = (kind, body)
    return data[:8] + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _exif(random: Random, data: bytes) -> bytes:
    """The notes of a JPEG damaged, of which the orientation is read."""
    at = data.find(b"Exif\0\0")
    if at < 0:
        return damaged(random, data)
    size = struct.unpack(">H", data[at - 2 : at])[0] - 8
    notes = damaged(random, data[at + 6 : at + 6 + size], 2)[:size].ljust(size, b"\0")
    return data[: at + 6] + notes + data[at + 6 + size :]


def _inflated(random: Random, data: bytes) -> bytes:
    """Few bytes, many pixels: what they claim may be there, or not."""
    width, height = (random.choice((1, 40, 4000, 7600, 30_000, 1 << 20, 1 << 31)) for _ in range(2))
    kind = random.randrange(4)
    if kind == 0:  # claimed only
        head = struct.pack(
            ">IIBBBBB", width % (1 << 31), height % (1 << 31), 8, random.choice((0, 2, 3, 4, 6)), 0, 0, 0
        )
        return (
            b"\x89PNG\r\n\x1a\n"
            + _chunk(b"IHDR", head)
            + _chunk(b"IDAT", zlib.compress(bytes(4000)))
            + _chunk(b"IEND", b"")
        )
    if kind == 1:
        screen = struct.pack("<HHBBB", width & 0xFFFF, height & 0xFFFF, 0x80, 0, 0)
        return b"GIF89a" + screen + bytes(6) + data[random.randrange(len(data)) :][:300] + b";"
    if kind == 2:
        size = (random.choice(ODD), random.choice(ODD))
        head = struct.pack(
            "<IiiHHIIiiII",
            40,
            *(n - (1 << 32) if n >> 31 else n for n in size),
            1,
            random.choice((1, 4, 8, 16, 24, 32)),
            random.choice((0, 1, 2, 3)),
            0,
            0,
            0,
            0,
            0,
        )
        return b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, 54) + head + data
    side = random.choice((1, 2)) * 3000
    stream = BytesIO()  # all of it there
    Image.new(random.choice(("RGB", "L", "P", "1")), (side, min(side, LARGEST // side))).save(
        stream, "PNG", compress_level=1
    )
    return stream.getvalue()


def start(folder: Path) -> tuple[Callable[[Random], bytes], Callable[[Path, bytes], None]]:
    """The picture reader: a file in, the views out."""
    made = seeds()
    shown = {format: made[format] for format in SHOWN if format in made}
    all_shown = [data for group in shown.values() for data in group]
    blind: list[Callable[[Random, bytes], bytes]] = [damaged, partial(damaged, times=2), partial(damaged, times=5)]

    def make(random: Random) -> bytes:
        draw = random.random()
        if draw < 0.003:
            return _inflated(random, random.choice(all_shown))
        if draw < 0.15:
            return _png_chunk(random, random.choice(made["PNG"]))
        if draw < 0.25:
            return _exif(random, random.choice(made["JPEG"]))
        if draw < 0.3:
            return spliced(random, random.choice(all_shown), random.choice(all_shown))
        formats = made if draw < 0.4 else shown
        return random.choice(blind)(random, random.choice(formats[random.choice(list(formats))]))

    return make, feed


def feed(box: Path, data: bytes) -> None:
    """Raises UserError, or Flaw where the picture that came out is none."""
    file = box / "in.png"
    file.write_bytes(data)
    opened = images.open_image(file)
    for size, view in opened.views.items():
        if view.mode != "RGB" or view.size != (size, size):
            raise Flaw(f"a view of {size} is {view.mode} {view.size}")
    if len(opened.sha256) != 64:
        raise Flaw("no checksum")
