"""Names, sub-folders and paths as a person, a page or a program may give them."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from attacks.drawn import maker
from attacks.judge import Flaw
from i2l_ext import images, library
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import TensorFile
from i2l_ext.library import names
from i2l_ext.webui.hosts.standalone import StandaloneHost
from i2l_ext.webui.service import Service
from i2l_ext.webui.uploads import received

ALLOWED = set(string.ascii_letters + string.digits + "._-")

PIECES = st.sampled_from(
    (
        "..",
        ".",
        "",
        "/",
        "\\",
        "//",
        "~",
        "C:",
        "\\\\host\\share",
        "%2e%2e",
        "con",
        "NUL.txt",
        "com1",
        "aux",
        "link",
        "Lora",
        "secret",
        "none",
        "a" * 101,
        "a" * 300,
        "-rf",
        "a.safetensors",
        "style.preview",
        "\0",
        "\n",
        "\x1b]0;",
        "\u202e",
        "\u2024",
        "\uff0e\uff0e\uff0f",
        "\u2215",
        "ａ",
        "é",
        "e\u0301",
        "\ud800",
        " ",
        "a:b",
        "a|b",
        "*",
        "?",
        "$HOME",
        "`id`",
        "sub",
    )
)
WILD = st.one_of(
    st.lists(PIECES, max_size=6).map("".join),
    st.lists(PIECES, min_size=1, max_size=6).map("/".join),
    st.text(max_size=130),
    st.text(st.characters(codec=None), max_size=40),
    st.from_regex(r"(?i)(con|nul|com1|none)[.\w]*", fullmatch=True),
)


def start(folder: Path) -> tuple[Callable[[Random], Any], Callable[[Path, Any], None]]:
    """Every place where a name comes in."""
    service = Service(StandaloneHost(folder, lora_folder=folder / "Lora"), folder, ["true"])
    root = folder / "Lora"
    for inside in (root / "sub", folder / "secret"):
        inside.mkdir(parents=True)
    (root / "link").symlink_to(folder / "secret")
    (folder / "secret" / "key.safetensors").write_bytes(b"not yours")
    preview = Image.new("RGB", (8, 8))

    def feed(box: Path, given: tuple[str, str]) -> None:
        kind, text = given
        KINDS[kind](text, box, service, preview)

    return maker(st.tuples(st.sampled_from(sorted(KINDS)), WILD)), feed


def _others(name: str) -> set[str]:
    """The characters of a name that are no letters of a script, and are not among those that names have besides."""
    return {char for char in name if unicodedata.category(char)[0] not in "LM"} - ALLOWED


def _check(text: str, box: Path, service: Service, preview: Image.Image) -> None:
    better = names.clean_name(text)
    if names.check_name(better) != better or _others(better) or len(better) > names.LONGEST:
        raise Flaw(f"clean_name gives {better!a}")
    name = names.check_name(text)
    if _others(name):
        raise Flaw(f"check_name takes {name!a}")


def _folder(text: str, box: Path, service: Service, preview: Image.Image) -> None:
    root = service.host.lora_folder().resolve()
    if root not in (found := service.targets.folder(text).resolve(), *found.parents):
        raise Flaw(f"{text!a} leads to {found}")


def _lora(text: str, box: Path, service: Service, preview: Image.Image) -> None:
    found = service.lora(text)
    if found.parent != service.host.lora_folder():
        raise Flaw(f"{text!a} leads to {found}")


def _upload(text: str, box: Path, service: Service, preview: Image.Image) -> None:
    raise Flaw(f"{text!a} is {service.uploads.paths([text])}")


def _received(text: str, box: Path, service: Service, preview: Image.Image) -> None:
    ours = box / "in"
    ours.mkdir()
    for claimed in (text, str(ours) + "/" + text):
        for found in received([claimed], [ours]):
            raise Flaw(f"{text!a} is taken for {found}")


def _save(text: str, box: Path, service: Service, preview: Image.Image) -> None:
    folder = box / "out"
    saved = library.save_lora(folder, text, lambda path, stem: path.write_bytes(b"lora"), preview=preview, sidecar={})
    wanted = sorted(f"{text}{end}" for end in (".safetensors", ".preview.png", ".json"))
    if sorted(path.name for path in folder.iterdir()) != wanted or saved.name != text:
        raise Flaw(f"{text!a} gave {sorted(folder.iterdir())}")


def _picture(text: str, box: Path, service: Service, preview: Image.Image) -> None:
    images.collect([Path(text)]) if text else None
    images.open_image(box / text)


def _header(text: str, box: Path, service: Service, preview: Image.Image) -> None:
    with TensorFile(box / text):
        raise Flaw("nothing was read as something")


def _file(text: str, box: Path, service: Service, preview: Image.Image) -> None:
    """A damaged file of that name, where the disk takes it."""
    stem = text.replace("/", "").replace("\0", "")
    try:
        file = box / f"in{stem}"
        file.write_bytes(b"\x08\0\0\0\0\0\0\0{}      rest")
    except (OSError, UnicodeEncodeError):
        raise UserError("the disk does not take that name") from None
    if file not in box.iterdir():
        raise Flaw(f"{text!a} is called otherwise")
    images.open_image(file) if len(stem) % 2 else TensorFile(file).close()


KINDS: Mapping[str, Callable[[str, Path, Service, Image.Image], None]] = {
    "check": _check,
    "folder": _folder,
    "lora": _lora,
    "upload": _upload,
    "received": _received,
    "save": _save,
    "picture": _picture,
    "header": _header,
    "file": _file,
}
