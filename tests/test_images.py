"""Pictures: what is taken, what is refused, and that the crops are the reference's."""

import hashlib
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from i2l_ext import images
from i2l_ext.converters.errors import UserError
from i2l_ext.library.collage import collage

SIGLIP = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
DINOV3 = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def noise(width=61, height=47, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def quarters(width=64, height=64):
    """Four flat colours, so that every orientation can be told from every other even after JPEG."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("lime", (width // 2, 0, width, height // 2))
    image.paste("blue", (0, height // 2, width // 2, height))
    return image


def encoded(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits, colour, rows, *extra):
    """A PNG by hand, for what Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body + chunk(b"IEND", b"")


def corner(data):
    """The colour of the upper left of what is read from these bytes."""
    return images.open_image(data).square.getpixel((5, 5))


def close(colour, expected, by=1):
    return all(abs(a - b) <= by for a, b in zip(colour, expected, strict=True))


# --- what is taken ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "AVIF"])
def test_formats(tmp_path, format):
    if format not in images._formats():
        pytest.skip(f"this Pillow has no {format}")
    path = tmp_path / "picture.of.nothing"
    path.write_bytes(encoded(quarters(), format))
    picture = images.open_image(path)
    assert picture.square.mode == "RGB" and picture.square.size == (1024, 1024)
    assert close(picture.square.getpixel((5, 5)), (255, 0, 0), 12)
    assert close(picture.square.getpixel((1018, 5)), (0, 255, 0), 12)
    assert picture.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert picture.name == "picture.of.nothing"


def test_all_of_this_pillow_is_used():
    assert ("AVIF" in images._formats()) == ("avif" in features.modules and features.check("avif"))


@pytest.mark.parametrize("turn", range(2, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_orientation(format, turn):
    if format not in images._formats():
        pytest.skip(f"this Pillow has no {format}")
    upright = quarters(64, 48)
    undo = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}.get(turn, images._TURNS[turn])
    exif = Image.Exif()
    exif[0x0112] = turn
    lying = upright.transpose(undo)
    view = images.open_image(encoded(lying, format, exif=exif)).square
    expected = images.cover(upright, 1024)
    for point in ((100, 100), (900, 100), (100, 900), (900, 900)):
        assert close(view.getpixel(point), expected.getpixel(point), 12)


def test_a_damaged_exif_does_not_matter():
    data = encoded(quarters(), "JPEG", exif=b"Exif\0\0nonsense, not a TIFF header")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert close(corner(data), (255, 0, 0), 12)


def test_alpha_on_white():
    clear, half, full = ((10, 20, 30, alpha) for alpha in (0, 128, 255))
    for format in ("PNG", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        assert corner(encoded(Image.new("RGBA", (8, 8), clear), format, **options)) == (255, 255, 255)
        assert close(corner(encoded(Image.new("RGBA", (8, 8), half), format, **options)), (132, 137, 142))
        assert corner(encoded(Image.new("RGBA", (8, 8), full), format, **options)) == (10, 20, 30)
    assert corner(encoded(Image.new("LA", (8, 8), (7, 0)), "PNG")) == (255, 255, 255)
    assert corner(encoded(Image.new("LA", (8, 8), (7, 255)), "PNG")) == (7, 7, 7)


def test_palettes():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 200, 100, 50])
    for format in ("PNG", "BMP", "GIF"):
        assert corner(encoded(palette, format)) == (200, 100, 50)
    for format in ("PNG", "GIF"):
        assert corner(encoded(palette, format, transparency=1)) == (255, 255, 255)
    assert close(corner(encoded(palette, "PNG", transparency=b"\xff\x80")), (227, 177, 152))
    assert images._on_white(Image.new("PA", (8, 8), (1, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["I;16", "I", "I;16B"])
def test_sixteen_bits_of_grey(mode):
    values = np.array([[0, 128, 129, 256, 32768, 65278, 65535]])
    levels = [round(value / 257) for value in values[0]]
    if mode == "I;16B":
        image = Image.frombytes("I;16B", (7, 1), values.astype(">u2").tobytes())
    else:
        image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
    assert image.mode == mode
    assert [images._on_white(image).getpixel((x, 0)) for x in range(7)] == [(v, v, v) for v in levels]


def test_sixteen_bits_from_files():
    grey = [struct.pack(">H", 40000) * 4] * 4
    assert corner(png(4, 4, 16, 0, grey)) == (156, 156, 156)
    assert corner(png(4, 4, 16, 0, grey, chunk(b"tRNS", struct.pack(">H", 40000)))) == (255, 255, 255)
    assert corner(png(4, 4, 16, 0, grey, chunk(b"tRNS", struct.pack(">H", 40001)))) == (156, 156, 156)
    assert close(corner(png(4, 4, 16, 2, [struct.pack(">3H", 65535, 32768, 0) * 4] * 4)), (255, 128, 0))
    assert corner(png(4, 4, 16, 6, [struct.pack(">4H", 1, 2, 3, 0) * 4] * 4)) == (255, 255, 255)


def test_cmyk_and_one_bit():
    assert close(corner(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")), (255, 0, 0), 3)
    for format in ("PNG", "BMP"):
        assert corner(encoded(Image.new("1", (8, 8), 1), format)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "MPO"])
def test_the_first_frame(format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert close(corner(data), (255, 0, 0), 8)


# --- what is refused --------------------------------------------------------------------------------------------


def refusal(data, name="holiday.png"):
    with pytest.raises(UserError) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        images.open_image(data, name=name)
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and "\n" not in message and message.endswith(".")
    return message


def test_not_a_picture():
    assert "not PNG, JPEG, WebP" in refusal(b"just a text with another name\n" * 9)
    assert "TIFF" in refusal(encoded(quarters(), "TIFF"))
    assert "HEIC" in refusal(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    assert "icon" in refusal(encoded(quarters(), "ICO"))
    assert "JPEG 2000" in refusal(b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99))
    assert "PPM" not in refusal(encoded(quarters(), "PPM"))
    assert "empty" in refusal(b"")


def test_bombs():
    line = bytes(20000 // 8)
    assert "100 megapixels" in refusal(png(20000, 10000, 1, 0, [line] * 10))
    assert "100 megapixels" in refusal(png(12000, 10000, 1, 0, [line] * 10))  # where Pillow would only warn
    assert "narrow" in refusal(png(1_000_000, 2, 1, 0, [bytes(125000)] * 2))
    assert "megapixels" in refusal(struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 58, 0, 0, 54, 40, 30000, 30000,
                                               1, 24, 0, 0, 0, 0, 0, 0))  # fmt: skip


def test_the_pixel_cap_does_not_hang_on_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some WebUIs set it
    assert "100 megapixels" in refusal(png(20000, 10000, 1, 0, []))


def test_too_many_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 1 << 20)
    path = tmp_path / "big.png"
    path.write_bytes(encoded(quarters(), "PNG") + bytes(1 << 20))
    with pytest.raises(UserError, match=r"big\.png: larger than 1 MB"):
        images.open_image(path)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "AVIF"])
def test_cut_short(format):
    if format not in images._formats():
        pytest.skip(f"this Pillow has no {format}")
    data = encoded(noise(200, 200), format)
    for keep in (len(data) // 3, len(data) // 2, len(data) * 9 // 10):
        assert "damaged or cut short" in refusal(data[:keep])


def test_zero_size():
    refusal(png(0, 0, 8, 2, []))
    refusal(png(5, 0, 8, 2, []))
    refusal(b"GIF89a" + bytes(7) + b";")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "AVIF", "MPO"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_noise_in_a_file_is_read_or_refused(format, data):
    if format != "MPO" and format not in images._formats():
        pytest.skip(f"this Pillow has no {format}")
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = bytearray(encoded(noise(24, 20), format, **({} if format in ("BMP", "GIF") else {"exif": exif})))
    spots = st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255))
    for spot, value in data.draw(st.lists(spots, min_size=1, max_size=8)):
        whole[spot] = value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            picture = images.open_image(bytes(whole), sizes=())
        assert picture.square.size == (1024, 1024)
    except UserError:
        pass


def test_paths_that_cannot_be_read(tmp_path):
    for name, match in (("none.png", "no such file"), ("", "is a folder"), ("x" * 300, "cannot be read")):
        with pytest.raises(UserError, match=match) as caught:
            images.open_image(tmp_path / name)
        assert str(tmp_path.parent) not in str(caught.value)
    with pytest.raises(UserError, match="not a file"):
        images.open_image(Path("/dev/zero") if Path("/dev/zero").exists() else tmp_path / "nul")


def test_names_are_safe_to_print():
    assert refusal(b"", "a\x1b[2Jb\udcff.png".replace("\x1b", "?").replace("\udcff", "?"))
    with pytest.raises(UserError) as caught:
        images.open_image(b"", name="a\x1b[2Jb\udcff.png")
    assert str(caught.value).startswith("a?[2Jb?.png: ")


# --- folders ----------------------------------------------------------------------------------------------------


def test_collect(tmp_path):
    folder = tmp_path / "art"
    (folder / "inner").mkdir(parents=True)
    for name in ("b10.png", "b2.PNG", "a.jpeg", "notes.txt", "._a.jpeg", "inner/deep.png", "c.webp", "b02.png"):
        (folder / name).touch()
    (folder / "folder.png").mkdir()
    single = folder / "notes.txt"
    found = images.collect([single, folder, single])
    assert [path.name for path in found] == [
        "notes.txt", "a.jpeg", "b02.png", "b2.PNG", "b10.png", "c.webp", "notes.txt"
    ]  # fmt: skip


def test_collect_refuses(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="No picture given"):
        images.collect([])
    with pytest.raises(UserError, match="empty: no pictures in this folder"):
        images.collect([tmp_path / "empty"])
    with pytest.raises(UserError, match=r"gone\.png: no such file"):
        images.collect([tmp_path / "gone.png"])


# --- crops and arrays -------------------------------------------------------------------------------------------


def reference_cover(image, size):
    """Written again from the description, with torchvision's centre crop: offsets by round((H - h) / 2.0)."""
    width, height = image.size
    scale = max(size / width, size / height)
    image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    top, left = round((image.height - size) / 2.0), round((image.width - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from((64, 224)))
def test_cover_covers(width, height, size):
    if max(width, height) > images.MAX_RATIO * min(width, height):
        return
    image = noise(width, height)
    result = images.cover(image, size)
    assert result.size == (size, size)
    assert np.array_equal(np.asarray(result), np.asarray(reference_cover(image, size)))


def test_the_small_view_comes_from_the_original():
    image = noise(1500, 1100)
    picture = images.open_image(encoded(image, "PNG"))
    assert np.array_equal(np.asarray(picture.view(224)), np.asarray(reference_cover(image, 224)))
    assert np.array_equal(np.asarray(picture.square), np.asarray(reference_cover(image, 1024)))
    assert not np.array_equal(np.asarray(picture.view(224)), np.asarray(picture.square.resize((224, 224), 2)))


@pytest.mark.parametrize(("size", "norm"), [(384, SIGLIP), (224, DINOV3)], ids=["siglip", "dinov3"])
def test_pixels_equal_the_pillow_processor(size, norm):
    try:
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil as Processor
    except ImportError:
        from transformers import SiglipImageProcessor as Processor  # transformers 4: Pillow is the only one
    square = noise(1024, 1024)
    processor = Processor(
        resample=2,
        size={"height": size, "width": size},
        image_mean=list(norm["mean"]),
        image_std=list(norm["std"]),
        rescale_factor=0.00392156862745098,
    )
    expected = np.asarray(processor(images=[square], return_tensors="np")["pixel_values"][0])
    values = images.pixels(square, size, **norm)
    assert values.dtype == np.float32 and values.shape == (3, size, size) and values.flags.c_contiguous
    assert np.array_equal(values, expected)


def test_pixels_in_floats_equal_torch():
    """DINOv3's processor: /255, then torch's antialiased bilinear on floats, then mean and std."""
    torch = pytest.importorskip("torch")
    square = noise(1024, 1024)
    planes = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)[None].float() / 255
    small = torch.nn.functional.interpolate(planes, size=(224, 224), mode="bilinear", antialias=True)[0]
    mean, std = (torch.tensor(DINOV3[key])[:, None, None] for key in ("mean", "std"))
    expected = ((small - mean) / std).numpy()
    in_floats = np.abs(images.pixels(square, 224, **DINOV3, rounded=False) - expected).max()
    in_levels = np.abs(images.pixels(square, 224, **DINOV3) - expected).max()
    assert in_floats < 1e-4 < in_levels


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9, 30])
def test_collage_shows_every_picture(count):
    colours = [(8 * index + 1, 255 - 8 * index, 100) for index in range(count)]
    sheet = collage([Image.new("RGB", (64, 64), colour) for colour in colours], 240)
    assert sheet.size == (240, 240) and sheet.mode == "RGB"
    assert {colour for _, colour in sheet.getcolors(240 * 240)} == set(colours)


def test_collage_of_one_is_itself():
    square = noise(512, 512)
    assert np.array_equal(np.asarray(collage([square])), np.asarray(square))
