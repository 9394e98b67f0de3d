"""HEIC and JPEG XL: read where a plugin of Pillow's is, and one line that says what to install where there is none."""

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, ImageFile

from i2l_ext import image_plugins, images
from i2l_ext.converters.errors import UserError
from i2l_ext.image_plugins import PLUGIN_FORMATS, accepted_types, jxl_size
from i2l_ext.webui import html
from i2l_ext.webui.languages import all_words

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
JXL = bytes.fromhex("ff0a3a1f") + bytes(20)
FILES = {"HEIC": HEIC, "JPEG XL": JXL}
IN_BOX = b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0\0\0\x14ftypjxl \0\0\0\0jxl "


@pytest.fixture(autouse=True)
def fresh():
    """Each test finds out anew what is there."""
    image_plugins.registered_formats.cache_clear()
    yield
    image_plugins.registered_formats.cache_clear()


@pytest.fixture
def absent(monkeypatch):
    for one in PLUGIN_FORMATS:
        monkeypatch.setitem(sys.modules, one.module, None)


def refusal(data):
    with pytest.raises(UserError) as caught:
        images.open_image(data, name="holiday")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("one", PLUGIN_FORMATS, ids=lambda one: one.title)
def test_without_the_plugin_one_line_says_what_to_install(absent, one, tmp_path):
    told = refusal(FILES[one.title])
    assert told.startswith(f"holiday: this is {one.title}. ") and told.endswith(f"pip install {one.package}.")
    assert not set(one.suffixes) & images.suffixes() and not set(one.types + one.suffixes) & set(accepted_types())
    (tmp_path / f"a{one.suffixes[0]}").write_bytes(FILES[one.title])
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    assert [path.name for path in images.collect([tmp_path])] == ["b.png"], "a folder's other pictures are still taken"
    for words in all_words().values():
        assert "{}: this is {}. Save the picture as PNG or JPEG, or install what reads it: pip install {}." in words


class Stub(ImageFile.ImageFile):
    """A plugin of one colour."""

    format, format_description = "HEIF", "a stand-in"

    def _open(self):
        self._size, self._mode = (30, 20), "RGB"
        self.tile = []

    def load(self):
        self.im = Image.new("RGB", self.size, "lime").im
        return Image.Image.load(self)


def test_a_plugin_is_used_and_only_then_is_its_format_offered(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))

    def register():
        calls.append(1)
        Image.register_open("HEIF", Stub, lambda head: head[4:12] == b"ftypheic")

    spec = SimpleNamespace(name="pillow_heif")
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register, __spec__=spec))
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    assert ".heic" in images.suffixes() and ".jxl" not in images.suffixes() and not calls
    assert {"image/heic", ".heic"} <= set(accepted_types()) and "image/jxl" not in accepted_types()
    with pytest.raises(UserError, match=r"(AVIF|GIF) or HEIC"):
        images.collect([tmp_path])
    assert not calls, "a WebUI's process asks this, and imports no plugin for it"
    assert images.open_image(HEIC).square.getpixel((5, 5)) == (0, 255, 0) and calls == [1]
    assert "damaged or cut short" in refusal(HEIC[:4] + b"ftypheix" + bytes(40)) and calls == [1]


def test_a_plugin_that_does_not_load_counts_as_absent(monkeypatch):
    def register():
        raise RuntimeError("made for another Pillow")

    spec = SimpleNamespace(name="pillow_heif")
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register, __spec__=spec))
    assert "pip install pillow-heif" in refusal(HEIC)


def test_the_webuis_process_imports_no_plugin():
    code = "import sys; from i2l_ext.webui import html, panes; from i2l_ext.image_plugins import *; accepted_types();"
    code += "sys.exit(any(name in sys.modules for name in ('pillow_heif', 'pillow_jxl')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
    assert 'accept="image/png' in html.drop_zone("files", "drop_pictures", accept=",".join(accepted_types()))


def stated(width, height, small=False):
    """The head of a JPEG XL codestream of this size."""
    bits, at = 0, 0

    def put(value, count):
        nonlocal bits, at
        bits |= value << at
        at += count

    def side(value):
        if small:
            return put(value // 8 - 1, 5)
        selector, count = next((n, count) for n, count in enumerate((9, 13, 18, 30)) if value <= 1 << count)
        put(selector, 2)
        return put(value - 1, count)

    put(small, 1)
    side(height)
    put(0, 3)
    side(width)
    return b"\xff\x0a" + bits.to_bytes(16, "little")


@pytest.mark.parametrize("size", [(1, 1), (512, 513), (8192, 8193), (262144, 4), (1 << 30, 1 << 30)])
def test_the_size_that_jpeg_xl_states(size):
    head = stated(*size)
    assert jxl_size(head) == size
    assert jxl_size(IN_BOX + (len(head) + 8).to_bytes(4, "big") + b"jxlc" + head) == size
    parts = [b"\0\0\0\x0ejxlp\0\0\0\0" + head[:2], (len(head) + 10).to_bytes(4, "big") + b"jxlp\x80\0\0\1"]
    assert jxl_size(IN_BOX + b"".join(parts) + head[2:]) == size
    assert jxl_size(IN_BOX + b"\0\0\0\1jxlc" + (len(head) + 16).to_bytes(8, "big") + head) == size
    assert jxl_size(stated(40, 256, small=True)) == (40, 256)
    for damaged in (b"", IN_BOX, IN_BOX + b"\0\0\0\0", IN_BOX + b"\0\0\0\2jxlc" + head, b"\0\0\0\x0cJXL " + bytes(40)):
        assert jxl_size(damaged) is None


@pytest.mark.parametrize(("size", "line"), [((20000, 10000), "megapixels"), ((100000, 10), "narrow")])
def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch, size, line):
    monkeypatch.setattr(image_plugins, "installed_formats", lambda: PLUGIN_FORMATS[1:])
    monkeypatch.setitem(sys.modules, "pillow_jxl", SimpleNamespace())
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
    assert line in refusal(stated(*size))
    assert "damaged" in refusal(IN_BOX)


# --- with the plugins themselves ------------------------------------------------------------------------------------


def plugin(one):
    pytest.importorskip(one.module, reason=f"{one.package} is not installed")
    assert one in image_plugins.registered_formats()


@pytest.mark.parametrize("one", PLUGIN_FORMATS, ids=lambda one: one.title)
def test_a_picture_through_the_plugin(one, tmp_path):
    plugin(one)
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (0, 0, 32, 16))
    for mode, options in (("RGB", {}), ("L", {}), ("RGBA", {})):
        stream = io.BytesIO()
        image.convert(mode).save(stream, one.pillow, quality=95, **options)
        picture = images.open_image(stream.getvalue())
        left = picture.square.getpixel((5, 5))
        assert left[2] > 200 > 60 > left[0] or mode == "L"
    data = stream.getvalue()
    for keep in (len(data) // 3, len(data) * 9 // 10):
        assert "damaged or cut short" in refusal(data[:keep])
    path = tmp_path / f"a{one.suffixes[0]}"
    path.write_bytes(data)
    assert images.collect([tmp_path]) == [path]


def test_turned_once(tmp_path):
    """HEIC and JPEG XL say themselves how they stand; a JPEG inside of JPEG XL stands as its EXIF data say."""
    plugin(PLUGIN_FORMATS[1])
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (0, 16, 32, 32))
    for path, options in ((tmp_path / "a.jxl", {}), (tmp_path / "b.heic", {})):
        if path.suffix == ".heic":
            plugin(PLUGIN_FORMATS[0])
        image.save(path, exif=exif.tobytes(), **options)
        whole = images.open_whole(path).image
        turned = path.suffix == ".heic"
        assert whole.size == ((32, 64) if turned else (64, 32)), path
    image.save(tmp_path / "c.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "c.jpg") as jpeg:
        jpeg.save(tmp_path / "c.jxl", lossless_jpeg=True)
    whole = images.open_whole(tmp_path / "c.jxl").image
    assert whole.size == (32, 64) and whole.getpixel((3, 3))[2] > 200


def test_the_size_that_is_stated_is_the_pictures():
    plugin(PLUGIN_FORMATS[1])
    for size in (
        (1, 1),
        (64, 32),
        (640, 480),
        (1920, 1080),
        (1000, 1000),
        (9000, 7),
        (600, 500),
        (300, 200),
        (77, 513),
    ):
        stream = io.BytesIO()
        Image.new("L", size).save(stream, "JXL")
        assert jxl_size(stream.getvalue()) == size
