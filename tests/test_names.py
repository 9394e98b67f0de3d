"""What a LoRA may be called: a name is sound, or refused with a sound one."""

import re
import unicodedata
from pathlib import PureWindowsPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from i2l_ext.converters.errors import UserError
from i2l_ext.library.names import NameRefused, check_name, clean_name, suggest_name

wild = (
    st.text(max_size=120)
    | st.text("aB1._-/: ", max_size=120)
    | st.text("aяé水の한ा\u0301\u3099ำ-.", max_size=60)
    | st.from_regex(r"(?i)(con|nul|com1|none)[.\w]*")
)


def plain(char):
    """A mark of a script stands on a letter, and is no letter to ``re``."""
    return "x" if unicodedata.category(char) in ("Mn", "Mc") else char


@given(wild)
@example("con")
@example("none")
@example("a\n")
@example("x" * 101)
@example("con." + "x" * 200)
@example(".safetensors.png")
def test_a_name_is_sound_or_refused_with_a_sound_one(name):
    better = clean_name(name)
    assert check_name(better) == better
    try:
        assert check_name(name) == unicodedata.normalize("NFC", name)
    except UserError as error:
        assert f"for example {better}." in str(error) and "\n" not in str(error)
    else:
        name = check_name(name)
        assert re.fullmatch(r"[A-Za-z0-9_]|[^\W\d][\w.-]{0,99}|[A-Za-z0-9_][\w.-]{0,99}", "".join(map(plain, name)))
        assert len(f"{name}.preview.png".encode()) <= 255
        assert ".." not in name and not name.endswith(".") and name.lower() != "none"
        assert not PureWindowsPath(f"{name}.safetensors").is_reserved()


@pytest.mark.parametrize(
    "name",
    [
        "my_style",
        "a",
        "v1.5-final",
        "_x",
        "9",
        "None-of-it",
        "console",
        "COM10",
        "x" * 100,
        "水彩",
        "水彩v2",
        "стиль",
        "стиль-kohya",
        "Köln",
        "ガラス絵の",
        "수채화",
        "शैली",
        "น้ำ",
        "ציור",
        "رسم",
        "Việt",
        "水" * 60,
    ],
)
def test_good_names(name):
    assert check_name(name) == clean_name(f"{name}") == name or len(name) == 100


def test_a_name_is_kept_in_one_form():
    """macOS hands out names in pieces: a letter, then its marks."""
    assert check_name("Ko\u0308ln") == "K\u00f6ln" and check_name("か\u3099") == "が"


@pytest.mark.parametrize("name", ["水彩: 2", "стиль/1", "st\u0443le", "a b"])
def test_the_refusal_shows_the_very_character(name):
    with pytest.raises(NameRefused) as refused:
        check_name(name)
    told = refused.value
    assert name in str(told) and "\\u" not in str(told) and told.code == "name" and told.fault
    assert told.character and check_name(told.better) == told.better


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "is empty"),
        ("a/b", "'/'"),
        ("a\\b", r"'\'"),
        ("../up", "'/'"),
        ("a..b", "two dots"),
        ("..", "begins with"),
        (".hidden", "begins with"),
        ("-rf", "begins with"),
        ("end.", "ends with"),
        ("C:x", "':'"),
        ("a<b", "'<'"),
        ("a=b", "'='"),
        ("a,b", "','"),
        ("my style", "a space"),
        ("a\x00b", "U+0000"),
        ("a\nb", "U+000A"),
        ("stуle", "CYRILLIC SMALL LETTER U"),
        ("style\u200b", "ZERO WIDTH SPACE"),
        ("ｓｔｙｌｅ", "FULLWIDTH LATIN SMALL LETTER S"),
        ("NONE", "no LoRA"),
        ("CON", "Windows"),
        ("nul.v2", "Windows"),
        ("Com1", "Windows"),
        ("lpt9.x.y", "Windows"),
        ("x" * 101, "more than 100"),
        ("水" * 70, "200 bytes"),
        ("水\u3164", "FILLER"),
        ("а\u0301", "COMBINING ACUTE"),
        ("१", "DEVANAGARI DIGIT ONE"),
        ("ﾊﾝｶｸ", "HALFWIDTH"),
        ("αbc", "two scripts in one word: 'b'"),
        ("a.safetensors", "ends like"),
    ],
)
def test_bad_names(name, said):
    with pytest.raises(UserError, match=re.escape(said)):
        check_name(name)


def test_suggested_names(tmp_path):
    folder = tmp_path / "Meine Bilder"
    folder.mkdir()
    assert suggest_name([folder]) == "Meine-Bilder"
    assert suggest_name([tmp_path / "Über Köln (2).JPG", folder]) == "Über-Köln--2"
    assert suggest_name([tmp_path / "фото.png"]) == "фото"
    assert suggest_name([tmp_path / "水彩 🎨.png"]) == "水彩"
    assert suggest_name([tmp_path / "aux.png"]) == "lora-aux"
