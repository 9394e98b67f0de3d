"""Requests: what they take from outside, what they refuse and how, and that every door says the same of them."""

import json
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from i2l_ext import requests
from i2l_ext.converters.errors import UserError
from i2l_ext.requests import REQUESTS, ConvertRequest, EngineOptions, MakeRequest, RankRequest

HERE = Path(__file__).resolve().parent
PICTURE = str(HERE / "picture.png")
EXAMPLES = {
    "run": {"folder": PICTURE, "trainer_folder": PICTURE},
    "make": {"pictures": [PICTURE], "weights": [2.0], "description": "two\nlines", "rank": 4},
    "look": {"pictures": [PICTURE]},
    "rank": {"file": PICTURE, "rank": 8},
    "merge": {"parts": ["a.safetensors:0.5"]},
    "export": {"file": PICTURE, "trainer": "musubi-tuner"},
    "repair": {"file": PICTURE, "consumer": "musubi", "output": PICTURE, "folder": PICTURE},
    "batch": {"pictures": [PICTURE]},
    "library": {"folders": [PICTURE]},
    "discard": {"files": [PICTURE]},
    "download": {"model": "mini"},
    "pack": {"model": "mini", "verify": [PICTURE]},
    "trust": {"model": "mini"},
    "draw": {"prompts": ["a circle"]},
}
"""By kind, a JSON object that is right; of those with a file alone, and of those with nothing, none is needed."""


def example(request):
    needed = {name for name, field in request.fields().items() if field.required}
    return EXAMPLES.get(request.kind, {"file": PICTURE} if "file" in needed else {})


@pytest.mark.parametrize("request_type", [*REQUESTS.values(), EngineOptions], ids=lambda one: one.kind)
def test_a_request_survives_json(request_type):
    asked = request_type.from_json(example(request_type))
    asked.validate()
    assert request_type.from_json(json.loads(json.dumps(asked.json()))) == asked
    assert is_dataclass(asked) and asked.__dataclass_params__.frozen


@pytest.mark.parametrize("request_type", REQUESTS.values(), ids=lambda one: one.kind)
def test_every_field_says_what_it_is(request_type):
    assert request_type.__doc__
    for field in request_type.fields().values():
        assert field.info.help, field.name
        if not field.required:
            field.check(field.default)
            assert field.accepts(field.default)
    assert list(request_type.fields()) == [one.name for one in fields(request_type)]


@pytest.mark.parametrize(
    "wrong",
    [
        None, [], "make", {}, {"pictures": PICTURE}, {"pictures": ["relative.png"]}, {"pictures": ["/a\0b"]},
        {"pictures": [PICTURE], "rank": True}, {"pictures": [PICTURE], "rank": 1.5},
        {"pictures": [PICTURE], "rank": "4"},
        {"pictures": [PICTURE], "strength": float("nan")}, {"pictures": [PICTURE], "strength": None},
        {"pictures": [PICTURE], "weights": [1, "2"]}, {"pictures": [PICTURE], "model": "a\nb"},
        {"pictures": [PICTURE], "overwrite": 1}, {"pictures": [PICTURE], "unheard": 1}, {"pictures": [PICTURE], 7: 1},
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_in_a_line(wrong):
    with pytest.raises(UserError, match="restart the WebUI") as error:
        MakeRequest.from_json(wrong)
    assert error.value.code == "bad_request"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": 0}, "rank must be from 1 to 4096, not 0"),
        ({"rank": 4097}, "rank must be from 1 to 4096"),
        ({"strength": 0.0}, "strength must be from -10 to 10 and not 0"),
        ({"strength": float("inf")}, "strength"),
        ({"dtype": "fp8"}, "There is no dtype 'fp8'. There are: fp32, bf16, fp16"),
        ({"key_format": "x" * 500}, "There is no key format"),
        ({"weights": (1.0, 0.0)}, "greater than 0"),
    ],
)
def test_what_is_out_of_range_is_refused_in_a_line(values, said):
    with pytest.raises(UserError) as error:
        MakeRequest((Path(PICTURE),), **values).validate()
    assert said in str(error.value) and error.value.code in ("out_of_range", "unknown_choice")


@pytest.mark.parametrize("values", [{}, {"rank": 4, "effect_kept": 0.9}, {"effect_kept": 0.0}, {"effect_kept": 1.5}])
def test_a_rank_is_given_in_one_way(values):
    with pytest.raises(UserError):
        RankRequest(Path(PICTURE), **values).validate()


def test_values_are_what_python_wants():
    asked = MakeRequest.from_json({"pictures": [PICTURE], "weights": [1], "strength": 2})
    assert asked.pictures == (Path(PICTURE),) and asked.weights == (1.0,) and isinstance(asked.strength, float)
    assert ConvertRequest.from_json({"file": PICTURE}).key_format is None


def test_requests_need_the_standard_library_alone():
    code = (
        "import sys, i2l_ext.requests; "
        "print(*[name for name in ('torch', 'numpy', 'PIL', 'safetensors', 'gradio') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE.parent)
    assert ended.stdout.strip() == ""


def test_the_protocol_has_a_number():
    assert isinstance(requests.PROTOCOL, int)


def test_the_help_of_every_command_can_be_printed():
    from i2l_ext.commands.main import parser

    texts, waiting = [], [parser()]
    while waiting:
        one = waiting.pop()
        texts.append(one.format_help())
        for action in one._actions:
            waiting += action.choices.values() if isinstance(action.choices, dict) else ()
    assert len(texts) > 15 and any("%" in text for text in texts)
