"""What a LoRA may be called: a name is sound, or refused with a sound one."""

import re
from pathlib import PureWindowsPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from i2l_ext.converters.errors import UserError
from i2l_ext.library.names import check_name, clean_name, suggest_name

wild = st.text(max_size=120) | st.text("aB1._-/: ", max_size=120) | st.from_regex(r"(?i)(con|nul|com1|none)[.\w]*")


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
        assert check_name(name) == name
    except UserError as error:
        assert f"for example {better}." in str(error) and "\n" not in str(error)
    else:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name)
        assert ".." not in name and not name.endswith(".") and name.lower() != "none"
        assert not PureWindowsPath(f"{name}.safetensors").is_reserved()


@pytest.mark.parametrize(
    "name", ["my_style", "a", "v1.5-final", "_x", "9", "None-of-it", "console", "COM10", "x" * 100]
)
def test_good_names(name):
    assert check_name(name) == clean_name(f"{name}") == name or len(name) == 100


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
    assert suggest_name([tmp_path / "Über Köln (2).JPG", folder]) == "Uber-Koln--2"
    assert suggest_name([tmp_path / "фото.png"]) == "lora"
    assert suggest_name([tmp_path / "aux.png"]) == "lora-aux"
