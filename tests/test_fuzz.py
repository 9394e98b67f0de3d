"""A short run of the fuzzer, with a fixed and a fresh seed; and every input that it ever found, for good."""

import ctypes
import json
import os
import secrets
import struct
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("schemathesis")
if sys.platform != "linux":
    pytest.skip("the judge counts by /proc, and forks", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import fuzz  # noqa: E402
from attacks import headers, lines, pictures, words  # noqa: E402
from attacks.judge import LONGEST, unclear  # noqa: E402
from i2l_ext import runtime  # noqa: E402
from i2l_ext.commands import main  # noqa: E402
from i2l_ext.converters.errors import UserError, one_line  # noqa: E402
from i2l_ext.converters.files import TensorFile  # noqa: E402
from i2l_ext.engine import process, records  # noqa: E402
from i2l_ext.operations import OPERATIONS  # noqa: E402
from i2l_ext.requests import REQUESTS as REQUEST_TYPES  # noqa: E402
from i2l_ext.requests import ModelsRequest  # noqa: E402
from i2l_ext.worker import messages  # noqa: E402

FRESH = secrets.randbits(32)
COSTLY = {"pictures": 0.3, "orders": 0.5, "schema": 0.3}
"""Of what the others get: these take longest."""


@pytest.mark.parametrize("seed", [0, pytest.param(FRESH, id="fresh")])
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_short_run(name, seed, tmp_path):
    print(f"python benchmarks/fuzz.py --only {name} --seed {seed}")
    tally = fuzz.attack(fuzz.TARGETS[name], round(60 * COSTLY.get(name, 1)), seed, tmp_path / name)
    tired = [one for one in tally.findings if one.kind not in ("slow", "hang")]  # a busy machine is none of ours
    assert not tired, f"seed {seed}: {tired[:3]}"
    assert tally.sound + tally.refused + len(tally.findings) == tally.inputs


def test_the_judge_sees_what_it_is_to_see(tmp_path):
    """Each kind of finding, so that a run without any means something."""
    import time

    def feed(box, number):
        if number == 0:
            raise KeyError("x")
        if number == 1:
            (box / "stray").touch()
        if number == 2:
            raise UserError("x" * 10) from None
        if number == 3:
            os._exit(3)
        if number == 4:
            bytearray(600 << 20)[:: 1 << 12] = b"x" * ((600 << 20) >> 12)
        if number == 5:
            end = time.process_time() + 2.2
            while time.process_time() < end:
                pass
        if number == 6:
            error = UserError("x")
            error.args = ("two\nlines",)
            raise error

    runtime.set_malloc_options(runtime.KEEP_FREED)  # as a command in this process may have done
    room = bytearray(700 << 20)
    room[:: 1 << 12] = b"x" * len(range(0, len(room), 1 << 12))
    del room  # it is kept, and an input's own must be seen all the same
    target = fuzz.Target("judge", "", 1, lambda folder: (_index, feed))
    tally = fuzz.attack(target, 7, 0, tmp_path / "judge")
    with suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    assert [(one.index, one.kind) for one in tally.findings] == [
        (0, "traceback"),
        (1, "astray"),
        (3, "ended with 3"),
        (4, "hungry"),
        (5, "slow"),
        (6, "message"),
    ]
    assert tally.refused == 2


def _index(random):
    """The number of an input, from the first draw of its generator."""
    from random import Random

    draw = random.random()
    return next(number for number in range(7) if Random(f"0 judge {number}").random() == draw)


# --- what was found ---------------------------------------------------------------------------------------------

SOUND = headers.Draft([("a", {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})], bytes(4))


def draft(**changes):
    return headers.Draft([("a", {**SOUND.tensors[0][1], **changes})], bytes(4)).bytes()


def named(name, metadata=None):
    return headers.Draft([(name, SOUND.tensors[0][1])], bytes(4), metadata).bytes()


FILES = {
    "a dtype that is a list": draft(dtype=["F32"]),
    "a dtype that is an object": draft(dtype={"F32": 1}),
    "a name that is half a character": named("\ud800"),
    "metadata that are half a character": named("a", {"x": "\ud800"}),
    "a number of 400 digits": draft(shape=[10**400]),
}


@pytest.mark.parametrize("title", FILES)
def test_headers(title, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(FILES[title])
    with pytest.raises(UserError, match="not a usable safetensors file") as caught:
        TensorFile(path)
    assert not unclear(str(caught.value))


def test_a_name_as_long_as_a_book_and_one_that_moves_the_cursor(tmp_path):
    path = tmp_path / "a.safetensors"
    for name in ("x" * 50_000, "\x1b[2J", "two\nlines", "\u202e"):
        path.write_bytes(
            headers.Draft([(name, {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]})], bytes(4)).bytes()
        )
        with pytest.raises(UserError) as caught:
            TensorFile(path)
        assert not unclear(str(caught.value))


def test_what_a_file_says_cannot_move_the_cursor(tmp_path, capsys):
    [sound, *_] = headers.loras(tmp_path)
    path = tmp_path / "a.safetensors"
    told = headers._of(sound)
    told.tensors.append(("\x1b[31m\nred", {"dtype": "F32", "shape": [0], "data_offsets": [len(told.data)] * 2}))
    told.metadata = {"title": "\x1b]0;gone\x07"}
    path.write_bytes(told.bytes())
    for words_ in (
        ["inspect", str(path)],
        ["convert", str(path), "--to", "kohya", "-o", str(tmp_path / "b.safetensors")],
    ):
        assert main.main(words_) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err and "\x07" not in printed.out


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_paths_that_no_disk_has(name, tmp_path):
    with pytest.raises(UserError):
        TensorFile(tmp_path / name)


def test_messages():
    assert len(one_line("x" * 10_000)) <= LONGEST
    assert one_line(" a \n b\x1b ") == "a b?"


def test_a_picture_whose_palette_is_missing(tmp_path):
    head = struct.pack(">IIBBBBB", 8, 8, 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(72))), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(pictures._chunk(*chunk) for chunk in chunks)
    with pytest.raises(UserError, match="damaged"):
        pictures.feed(tmp_path, data)


EVENTS = {
    "a step without a title": [{"event": "plan", "steps": ["x"]}],
    "bytes that are no number": [{"event": "plan", "steps": [{"title": "a", "bytes": [1]}]}],
    "more bytes than can be": [{"event": "plan", "steps": [{"title": "a", "bytes": float("inf")}]}],
    "a share that is no number": [
        {"event": "plan", "steps": [{"title": "a"}]},
        {"event": "step", "step": 0, "share": float("nan")},
    ],
    "a result that is none": [{"event": "done", "result": {"norm": float("nan"), "x": [float("inf")]}}],
    "half a character": [{"event": "done", "result": {"\ud800": "\udfff"}}],
    "an error that is no text": [{"event": "failed", "error": {"a": 1}}],
}


@pytest.mark.parametrize("title", EVENTS)
def test_events(title, tmp_path):
    _, feed = lines.start_events(tmp_path / "home")
    feed(tmp_path, "".join(json.dumps(event) + "\n" for event in EVENTS[title]).encode())


RECORDS = {
    "created": "x",
    "state": {"a": 1},
    "id": "../../etc/passwd",
    "title": 7,
    "tail": "abc",
    "ended": [1],
    "error": {},
}


@pytest.mark.parametrize("name", RECORDS)
def test_records(name, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(lines.RECORD))
    assert records.read_job(path).state == "failed"
    path.write_text(json.dumps({**lines.RECORD, name: RECORDS[name]}))
    with pytest.raises(ValueError):
        records.read_job(path)


PREFIX = b'{"protocol": 2, '
REQUESTS = [
    b"", b"[]", b"7", b"{", b"[" * 100_000, b"{}", b'{"kind": 7}', b'{"kind": "models"}',
    b'{"protocol": 1, "kind": "models"}', PREFIX + b'"kind": "make", "request": {}}',
    PREFIX + b'"kind": "inspect", "request": {"file": "relative"}}',
    PREFIX + b'"kind": "inspect", "request": {"file": "/a\\u0000"}}',
    PREFIX + b'"kind": "look", "request": {"pictures": [7]}}', PREFIX + b'"kind": "models", "folder": ""}',
    PREFIX + b'"kind": "inspect", "request": []}', PREFIX + b'"kind": "models", "options": {"cache_bytes": "x"}}',
    PREFIX + b'"kind": "export", "request": {"file": "/a", "trainer": 7}}', PREFIX + b'"kind": "models", "new": 1}',
    PREFIX + b'"kind": "make", "request": {"pictures": ["/a"], "new": 1}}', PREFIX + b'"kind": "make", "draw": 1}',
]  # fmt: skip


@pytest.mark.parametrize("line", REQUESTS)
def test_messages_that_are_none(line):
    with pytest.raises(UserError, match="does not understand"):
        messages.read_message(line)


def test_a_kind_of_job_that_is_unknown():
    with pytest.raises(UserError, match="does not know this kind"):
        messages.read_message(PREFIX + b'"kind": "conjure"}')


def test_a_message_that_is_understood():
    read = messages.read_message(PREFIX + b'"kind": "models", "folder": "/a", "outcome": "/b"}\n')
    assert read.request == ModelsRequest() and read.outcome == Path("/b")


def test_there_is_an_operation_for_every_request():
    assert OPERATIONS.keys() == REQUEST_TYPES.keys()


def test_json_that_python_alone_reads():
    read = process.loads_finite_json(b'{"a": [NaN, 1e999, "\\ud800", "\\ud83d\\ude00"]}')
    assert read == {"a": [None, None, "?", "\U0001f600"]}


def test_names_are_drawn(tmp_path):
    from random import Random

    make = words.maker(words.WILD)
    assert len({make(Random(number)) for number in range(50)}) > 20
