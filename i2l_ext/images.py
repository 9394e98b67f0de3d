"""Pictures: find, check, read, turn upright and crop them; and the arrays that the encoders take.

The format is found by the content, never by the name, and the size is checked before a pixel is decoded. Only a SHA-256
and the crops in use stay in memory: 3 MB a picture, however large its file.
"""

from __future__ import annotations

import hashlib
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from i2l_ext.converters.errors import UserError, printable
from i2l_ext.image_plugins import PLUGIN_FORMATS, PluginFormat, installed_formats, jxl_size, registered_formats
from i2l_ext.requests import Square

SIDE = 1024
"""Pixels. The side of the square that every encoder takes, except Qwen-VL for Coarse."""

COARSE_SIDE = 224
"""Pixels. The side of the square for Qwen-VL and Coarse, cropped from the original and not from the other square."""

MAX_BYTES = 128 << 20
MAX_PIXELS = 100_000_000
MAX_RATIO = 40
"""Of the long side to the short one. The scaled picture is SIDE x SIDE x this: 170 MB, of which the square is used."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "AVIF")

_SUFFIXES = frozenset({".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".avif"})

_SIGNATURES = (
    (0, b"\x89PNG", "PNG"), (0, b"\xff\xd8\xff", "JPEG"), (8, b"WEBP", "WEBP"), (0, b"BM", "BMP"),
    (0, b"GIF8", "GIF"), (4, b"ftypavi", "AVIF"),
    *((4, b"ftyp" + brand, "HEIC") for brand in (b"hei", b"hev", b"mif1", b"msf1")), (4, b"ftyp", "a film"),
    (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (0, b"8BPS", "a Photoshop file"), (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"), (0, b"\xff\x0a", "JPEG XL"), (4, b"JXL ", "JPEG XL"), (4, b"jP  ", "JPEG 2000"),
    (0, b"\0\0\1\0", "an icon"),
)  # fmt: skip
"""Position, bytes, format: for the error message. The first match counts."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation -> the transposition that undoes it."""

_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_ORIENTATION = 0x0112

_BROKEN = (
    OSError, SyntaxError, ValueError, RuntimeError, EOFError, IndexError, KeyError, TypeError, ArithmeticError,
    AssertionError, struct.error, zlib.error,
)  # fmt: skip
"""What Pillow raises for broken data. Only calls of Pillow are guarded by it."""

# 16 bits to 8, rounded to the nearest. (Pillow's own conversion clips at 255.)
_TO_EIGHT_BITS: np.ndarray = ((np.arange(65536, dtype=np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture, read and cropped. ``name``: the file's, for messages; ``sha256``: hex, of the file's bytes;
    ``crop``: which square of it, None for the centre."""

    name: str
    sha256: str
    views: Mapping[int, Image.Image] = field(repr=False)
    crop: Square | None = None

    @property
    def square(self) -> Image.Image:
        """The square, RGB 1024 x 1024."""
        return self.views[SIDE]

    def view(self, size: int) -> Image.Image:
        """The square of the original, RGB ``size`` x ``size``. KeyError for a size it was not opened with."""
        return self.views[size]


@dataclass(frozen=True, eq=False)
class WholePicture:
    """A picture before it is cropped: upright, RGB. ``name`` and ``sha256`` as of Picture."""

    name: str
    sha256: str
    image: Image.Image = field(repr=False)

    def check_inside(self, crop: Square) -> None:
        """Raises UserError for a square that is not inside."""
        width, height = self.image.size
        if crop.box[2] > width or crop.box[3] > height:
            raise UserError(
                f"{self.name}: the square {crop} does not lie inside the picture, which is {width} x {height}. Give "
                "LEFT,TOP,SIDE inside it.", "out_of_range",
            )  # fmt: skip

    def cropped(self, crop: Square | None = None, sizes: Iterable[int] = (SIDE, COARSE_SIDE)) -> Picture:
        """A square of it; None: the centre. Raises UserError for a square that is not inside."""
        if crop:
            self.check_inside(crop)
        image = self.image.crop(crop.box) if crop else self.image
        return Picture(self.name, self.sha256, {size: cover(image, size) for size in {SIDE, *sizes}}, crop)


def open_image(
    source: Path | str | bytes,
    *,
    name: str | None = None,
    sizes: Sequence[int] = (SIDE, COARSE_SIDE),
    crop: Square | None = None,
) -> Picture:
    """Read a picture from a file, or from a file's bytes (then ``name`` is its name in messages).

    ``sizes``: the sides in pixels of the squares to keep. ``crop``: which square; a crop gives what the picture would
    give if it were cropped and saved before. Memory peaks at 4 to 9 bytes a pixel of the original. Raises UserError
    for a picture that cannot be used.
    """
    whole = open_whole(source, name=name)
    with _room_for(whole.name):
        return whole.cropped(crop, sizes)


def open_whole(source: Path | str | bytes, *, name: str | None = None) -> WholePicture:
    """The same before it is cropped."""
    data = source if isinstance(source, bytes) else _read(Path(source))
    name = printable(name or ("the picture" if isinstance(source, bytes) else Path(source).name))
    if not data:
        raise UserError(f"{name}: the file is empty. Copy or download it again.")
    if len(data) > MAX_BYTES:
        raise UserError(f"{name}: larger than {MAX_BYTES >> 20} MB. Save it as JPEG, or make it smaller.")
    with _room_for(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of size and of odd files: both are checked here
        return WholePicture(name, hashlib.sha256(data).hexdigest(), _upright(_decode(data, name), name))


def plain_copy(path: Path, crop: Square | None = None) -> tuple[str, Callable[[Path], object]]:
    """How to copy a picture, or a square of it, for a program that turns and whitens nothing: the copy's suffix, and
    what writes it. A whole JPEG or PNG that is seen alike is copied as it is; any other becomes a PNG, upright, on
    white. Raises UserError for a picture that cannot be used."""
    name = printable(path.name)
    image = _decode(_read(path), name)
    turned, suffix = _upright(image, name), {"JPEG": ".jpg", "PNG": ".png"}.get(image.format or "")
    if crop:
        WholePicture(name, "", turned).check_inside(crop)
    elif suffix and turned is image and getattr(image, "n_frames", 1) == 1:
        return suffix, lambda target: target.write_bytes(_read(path))

    def write(target: Path) -> None:
        upright = _upright(_decode(_read(path), name), name)
        (upright.crop(crop.box) if crop else upright).save(target, "PNG")

    return ".png", write


def plain(colour: tuple[int, int, int], sizes: Iterable[int] = (COARSE_SIDE,)) -> Picture:
    """A picture of one colour; its ``sha256`` is that of its square's pixels."""
    views = {size: Image.new("RGB", (size, size), colour) for size in {SIDE, *sizes}}
    return Picture("plain", hashlib.sha256(views[SIDE].tobytes()).hexdigest(), views)


def collect(paths: Sequence[Path | str]) -> list[Path]:
    """Files as given; for a folder the pictures in it (not in sub-folders), 2 before 10.

    Raises UserError for a path that does not exist, a folder without pictures, and where nothing is given.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        try:
            inside = list(path.iterdir()) if path.is_dir() else None
            if inside is None and not path.exists():
                raise UserError(f"{printable(path.name)}: no such file or folder.")
        except OSError as error:
            raise UserError(f"{printable(path.name)}: cannot be opened ({error.strerror}).") from None
        if inside is None:
            found.append(path)
            continue
        pictures = [file for file in inside if _is_picture(file)]
        if not pictures:
            raise UserError(f"{printable(path.name) or path}: no pictures in this folder ({_readable()}).")
        found += sorted(pictures, key=_natural)
    if not found:
        raise UserError("No picture given. Name at least one picture, or a folder of pictures.")
    return found


def file_digest(path: Path) -> str:
    """SHA-256 of a picture's file, by which it is known. Raises UserError where it cannot be read."""
    return hashlib.sha256(_read(path)).hexdigest()


def cover(image: Image.Image, size: int) -> Image.Image:
    """Scale until ``size`` x ``size`` is covered (bilinear, antialiased), and crop the centre square.

    Both sides and the offsets are rounded as the authors do: to the nearest integer, halves to the even one.
    """
    width, height = image.size
    scale = max(size / width, size / height)
    width, height = round(width * scale), round(height * scale)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def pixels(
    square: Image.Image, size: int, mean: Sequence[float], std: Sequence[float], *, rounded: bool = True
) -> np.ndarray:
    """What an encoder takes: the RGB square at ``size``, /255, minus mean, divided by std; float32 [3, size, size].

    ``rounded``: resized in 8 bits, which gives the same bits as transformers' Pillow image processors (SigLIP's).
    Otherwise resized in floats, as DINOv3's processor does, which divides by 255 before it resizes.
    """
    if rounded:
        levels = np.asarray(square.resize((size, size), Image.Resampling.BILINEAR), np.float64)
    else:
        planes = [band.convert("F").resize((size, size), Image.Resampling.BILINEAR) for band in square.split()]
        levels = np.stack([np.asarray(plane, np.float64) for plane in planes], axis=-1)
    values = (levels * (1 / 255)).astype(np.float32)
    values = (values - np.array(mean, np.float32)) / np.array(std, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


@contextmanager
def _room_for(name: str) -> Iterator[None]:
    """Raises UserError where the memory is not enough for what is done inside."""
    try:
        yield
    except MemoryError:
        raise UserError(f"{name}: not enough memory to open it. Make the picture smaller.") from None


def _read(path: Path) -> bytes:
    """The file's bytes; of one that is too large, one byte more than allowed. Raises UserError."""
    name = printable(path.name)
    try:
        if path.is_file():
            with path.open("rb") as stream:
                return stream.read(MAX_BYTES + 1)
        reason = "is a folder" if path.is_dir() else "not a file" if path.exists() else "no such file"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    raise UserError(f"{name}: {reason}. Name a picture that can be opened.")


def _decode(data: bytes, name: str) -> Image.Image:
    """The first frame as it is in the file. Raises UserError."""
    kind = next((kind for at, mark, kind in _SIGNATURES if data[at:].startswith(mark)), None)
    plugin = next((one for one in PLUGIN_FORMATS if one.title == kind), None)
    try:
        if plugin is not None and plugin.pillow == "JXL" and plugin in registered_formats():
            stated = jxl_size(data)
            if stated is None:
                raise UserError(_damaged(name))
            _check_size(stated, name)
        image = Image.open(BytesIO(data), formats=_formats())
        _check_size(image.size, name)
        image.load()
        return image
    except Image.UnidentifiedImageError:
        if kind in _formats() or plugin in registered_formats():
            raise UserError(_damaged(name)) from None
        if plugin is not None:
            raise UserError(_needs_plugin(name, plugin)) from None
        known = f"this is {kind}, " if kind else ""
        raise UserError(f"{name}: {known}not {_readable()}. Save the picture as PNG or JPEG.") from None
    except Image.DecompressionBombError:
        raise UserError(_too_large(name)) from None
    except _BROKEN:
        raise UserError(_damaged(name)) from None


def _check_size(size: tuple[int, int], name: str) -> None:
    short, long = sorted(size)
    if short * long > MAX_PIXELS:
        raise UserError(_too_large(name))
    if long > MAX_RATIO * short:
        raise UserError(
            f"{name}: {size[0]} x {size[1]} is too narrow, and only its centre square would count. Crop it first."
        )


def _upright(image: Image.Image, name: str) -> Image.Image:
    """RGB, on white, turned as EXIF says. Raises UserError where the palette is damaged."""
    try:
        turn = None if _is_upright(image) else _TURNS.get(image.getexif().get(_ORIENTATION))
    except _BROKEN:
        turn = None  # the EXIF data is damaged, the picture is not
    try:
        image = _on_white(image)
    except _BROKEN:
        raise UserError(_damaged(name)) from None
    return image if turn is None else image.transpose(turn)


def _is_upright(image: Image.Image) -> bool:
    """Whether the decoder has turned it already: JPEG XL says itself how it stands, and its EXIF data do not count. A
    JPEG that lies in one as it was is not turned."""
    return image.format == "JXL" and not getattr(image, "jpeg", False)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if not _may_be_transparent(image):
        return _in_mode(image, "RGB")
    image = _in_mode(image, "RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def _may_be_transparent(image: Image.Image) -> bool:
    """Whether parts of it may be transparent. Pillow tells this from 10.1 on, but the WebUIs have 9.5."""
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return True
    if image.mode != "P":
        return False
    if image.palette is None:
        raise ValueError("a palette is missing")
    return image.palette.mode.endswith("A")


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """In ``mode``. Pillow would copy a picture that is in the mode already, up to 400 MB."""
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16 bits of grey, in any mode of Pillow's for them ("I", "I;16", "I;16B"), to L or LA."""
    values = np.asarray(image).clip(0, 65535).astype(np.uint16)
    grey = Image.fromarray(_TO_EIGHT_BITS[values])
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))


@cache
def _pillows_own() -> tuple[str, ...]:
    """The allowed formats that this Pillow has without plugins."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _formats() -> tuple[str, ...]:
    """The allowed formats that can be read here."""
    return (*_pillows_own(), *(one.pillow for one in registered_formats()))


def suffixes() -> frozenset[str]:
    """The files that are taken from a folder. A file that is named itself may have any suffix."""
    return _SUFFIXES.union(*(one.suffixes for one in installed_formats()))


def _readable() -> str:
    """The formats that can be read here, in words. No plugin is imported for it."""
    own = ("WebP" if name == "WEBP" else name for name in _pillows_own())
    *most, last = (*own, *(one.title for one in installed_formats()))
    return f"{', '.join(most)} or {last}"


def _needs_plugin(name: str, plugin: PluginFormat) -> str:
    return (
        f"{name}: this is {plugin.title}. Save the picture as PNG or JPEG, or install what reads it: "
        f"pip install {plugin.package}."
    )


def _damaged(name: str) -> str:
    return f"{name}: the picture is damaged or cut short. Copy or download it again, or save it anew as PNG."


def _too_large(name: str) -> str:
    return f"{name}: more than {MAX_PIXELS // 1_000_000} megapixels. Make the picture smaller."


def _is_picture(file: Path) -> bool:
    # macOS writes a file with a leading dot beside every file that it copies
    return file.suffix.lower() in suffixes() and not file.name.startswith(".") and file.is_file()


def _natural(file: Path) -> tuple[list[int | str], str]:
    parts = re.split(r"(\d+)", file.name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], file.name
