"""Packed model files: what they hold, who reads them, what is refused, and that they come whole or not at all."""

import hashlib
import io
import json
import os
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubs import FakeHub
from i2l_ext.commands.main import main
from i2l_ext.converters.errors import Cancelled, UserError
from i2l_ext.converters.files import TensorFile, load_file
from i2l_ext.models import catalogue, checked_files, pack
from i2l_ext.models.checked_files import DownloadCallbacks, verify
from i2l_ext.models.download import download, missing
from i2l_ext.models.hubs import HUBS
from i2l_ext.models.store import Folders, files_identity, known_sha256, locate
from i2l_ext.operations.packing import relative_difference, update_difference
from i2l_ext.weights import pack_writer, packed_numbers, packing, reads
from i2l_ext.weights.compute import ComputeOptions
from i2l_ext.weights.files import TensorFiles
from i2l_ext.weights.pack_writer import PackWriter
from i2l_ext.weights.packed_numbers import unpack
from i2l_ext.weights.packing import PACK_FORMATS, PackNote, packed_name
from i2l_ext.weights.stream import stream, stream_stored
from small_encoders import save, weights
from test_store import TINY

SHAPES = {"a.weight": (48, 128), "a.bias": (48,), "b": (32, 3, 8, 8), "odd.weight": (3, 5), "c.weight": (96, 320)}
NOTE = PackNote("tiny", "model.safetensors", "int9", "")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def packed_file(path, form="int9", chunk=1000, version=2):
    """The packed form of a file, beside it."""
    target = path.with_name(packed_name(path.name, form))
    with target.open("w+b") as out:
        writer = PackWriter(out, path.stat().st_size, path.name, replace(NOTE, form=form, version=version))
        data = path.read_bytes()
        for start in range(0, len(data), chunk):
            writer.write(data[start : start + chunk])
        writer.finish()
    return target


def loaded(paths, dtype="float32", groups=1):
    """Every tensor, by the two loaders, which agree."""
    with TensorFiles(paths) as files:
        keys = list(files.shapes)
        asked = [{key: key for key in keys[start::groups]} for start in range(groups)]
        options = ComputeOptions(dtype=dtype)
        with closing(stream_stored(files, asked)) as groups:
            held = {key: one.whole(options.torch_dtype).clone() for group in groups for key, one in group.items()}
        with closing(stream(files, asked, options)) as groups:
            found = {key: tensor.clone() for group in groups for key, tensor in group.items()}
    assert all(torch.equal(found[key].nan_to_num(), held[key].nan_to_num()) for key in keys)
    return found


def values(path):
    """The numbers of a packed file, by its own tensors and plain arithmetic."""
    held = load_file(path)
    with TensorFile(path) as file:
        form = PACK_FORMATS[json.loads(file.header.metadata["i2l.packed"])["form"]]
    out = {}
    for key, tensor in held.items():
        if f"{key}_scale" in held:
            scales, numbers = held[f"{key}_scale"], tensor.double().view(-1)
            if form.bits > 8:
                end = 2 * len(numbers) // form.group
                low = [byte >> bit & 1 for byte in scales[end:].tolist() for bit in range(8)]
                scales, numbers = scales[:end].view(torch.bfloat16), 2 * numbers + torch.tensor(low)
            out[key] = (numbers * scales.double().repeat_interleave(form.group)).view(tensor.shape)
        elif not key.endswith("_scale"):
            out[key] = tensor
    return out


@pytest.fixture
def plain(tmp_path):
    return save(tmp_path / "model.safetensors", weights(SHAPES), torch.bfloat16)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 200), first=st.integers(0, 150), group=st.integers(1, 70), seed=st.integers(0, 9),
    out=st.sampled_from(FLOATS), chunk=st.integers(1, 64), scale=st.sampled_from(FLOATS),
    dtype=st.sampled_from([torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]), low=st.booleans(),
)  # fmt: skip
def test_any_part_of_a_tensor_gets_its_values(count, first, group, seed, out, chunk, scale, dtype, low):
    random = torch.Generator().manual_seed(seed)
    low &= dtype == torch.int8
    group, scale = (8 * -(-group // 8), torch.bfloat16) if low else (group, scale)
    groups = -(-(first + count) // group)
    whole = torch.randint(-127, 128, (groups * group,), generator=random).to(dtype)
    held = scales = torch.rand(groups, generator=random).to(scale)
    numbers = whole.double()
    if low:
        lowest = torch.randint(0, 2, whole.shape, generator=random)
        numbers = 2 * numbers + lowest
        held = torch.cat([held.view(torch.uint8), (lowest.view(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8)])
    target, part = torch.empty(count, dtype=out), slice(first, first + count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_numbers, "CHUNK", chunk)
        unpack(whole[part], held, group, first, target)
    exact = (numbers * scales.double().repeat_interleave(group))[part]
    assert torch.equal(target, exact.float().to(out))


@pytest.mark.parametrize("out", FLOATS, ids=str)
@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_float_of_one_byte_is_what_torch_makes_of_it(fp8, out):
    """NaN and infinity among them, and without them, which takes another way."""
    every = torch.arange(256, dtype=torch.uint8).view(fp8)
    for numbers in (every, every[every.float().isfinite()]):
        found = torch.empty(len(numbers), dtype=out)
        unpack(numbers, None, 0, 3, found)
        assert torch.equal(found.nan_to_num(1e-3, 7, -7), numbers.to(out).nan_to_num(1e-3, 7, -7))


@pytest.mark.parametrize("form", PACK_FORMATS)
@pytest.mark.parametrize("chunk", [7, 1000, 1 << 20])
def test_packed_numbers_are_the_nearest_ones(plain, form, chunk, monkeypatch):
    group = PACK_FORMATS[form].group
    monkeypatch.setattr(pack_writer, "PIECE", 4 * group * 3)
    path = packed_file(plain, form, chunk)
    assert path.read_bytes() == packed_file(plain, form).read_bytes()
    before, after = load_file(plain), values(path)
    assert before.keys() == after.keys()
    for key in ("a.bias", "odd.weight"):  # vectors, and what fills no groups, stay as they are
        assert torch.equal(before[key], after[key])
    for key in ("a.weight", "b", "c.weight"):
        step = before[key].double().view(-1, group).abs().amax(1, keepdim=True) / PACK_FORMATS[form].largest
        apart = (after[key] - before[key].double()).view(-1, group).abs()
        assert (apart <= step * (16.5 if form == "fp8" else 0.51)).all()
    assert path.stat().st_size < 0.65 * plain.stat().st_size


def test_the_file_says_what_it_was_made_of(plain):
    with TensorFile(packed_file(plain)) as file:
        said = json.loads(file.header.metadata["i2l.packed"])
    assert said == {
        "checkpoint": "tiny", "file": "model.safetensors", "form": "int9", "version": 2,
        "origin": hashlib.sha256(plain.read_bytes()).hexdigest(),
    }  # fmt: skip


@pytest.mark.parametrize("form", PACK_FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [reads.READ_SIZE, 1024])
def test_the_loader_gives_the_values(plain, form, dtype, size, monkeypatch):
    """Also of a tensor that takes several reads."""
    monkeypatch.setattr(reads, "READ_SIZE", size)
    path = packed_file(plain, form)
    for groups in (1, 3):
        found = loaded([path], dtype, groups)
        for key, exact in values(path).items():
            assert torch.equal(found[key], exact.float().to(getattr(torch, dtype))), key


@pytest.mark.parametrize("form", PACK_FORMATS)
def test_rows_of_a_packed_matrix(plain, form):
    """Of 100 numbers: rows that end within a group."""
    save(plain, {**weights(SHAPES), "c.weight": torch.randn(96, 100)}, torch.bfloat16)
    path = packed_file(plain, form)
    with TensorFiles([path]) as files:
        assert torch.equal(files.rows("c.weight", [5, 0, 95]), values(path)["c.weight"].float()[[5, 0, 95]])


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_files_of_the_first_version_are_read(plain, form, monkeypatch):
    """A scale for sixteen numbers, in bfloat16."""
    monkeypatch.setitem(PACK_FORMATS, form, replace(PACK_FORMATS[form], group=16))
    path = packed_file(plain, form, version=1)
    exact = values(path)
    monkeypatch.undo()
    with TensorFile(path) as file:
        assert packing.group_size("x", "a.weight", file.header.tensors) == 16
        assert packing.pack_note(path, file.header).form == form
    found = loaded([path])
    assert all(torch.equal(found[key], exact[key].float()) for key in exact)


MADE = {  # the scales of other programs: name, shape
    "one": ("a.weight_scale", ()),
    "one, in a list": ("a.scale_weight", (1,)),
    "rows": ("a.weight_scale", (48,)),
    "rows, kept": ("a.scale_weight", (48, 1)),
    "parts of rows": ("a.weight_scale", (48, 4)),
    "parts of rows, kept": ("a.weight_scale", (48, 4, 1)),
}


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("case", MADE)
@pytest.mark.parametrize("size", [reads.READ_SIZE, 500])
def test_files_of_other_programs_are_read(tmp_path, case, behind, size, monkeypatch):
    monkeypatch.setattr(reads, "READ_SIZE", size)
    name, shape = MADE[case]
    torch.manual_seed(1)
    matrix, scales = torch.randn(48, 128).to(torch.float8_e4m3fn), torch.rand(shape) + 0.5
    order = [("a.weight", matrix), (name, scales)]
    marks = {"scaled_fp8": torch.empty(0), "a.input_scale": torch.ones(()), "b.weight": torch.ones(2, 2)}
    tensors = {"a.comfy_quant": torch.zeros(3, dtype=torch.uint8), **dict(order if behind else order[::-1]), **marks}
    path = tmp_path / "other.safetensors"
    with path.open("wb") as out:
        from i2l_ext.converters.files import WritePlan, write

        write(out, [WritePlan.of(key, tensor) for key, tensor in tensors.items()])
    with TensorFiles([path]) as files:
        assert files.shapes == {"a.weight": (48, 128), "b.weight": (2, 2)}
    per_row = scales.view(48, -1) if scales.numel() > 1 else scales.view(1, 1).expand(48, 1)
    exact = matrix.double() * per_row.double().repeat_interleave(128 // per_row.shape[1], 1)
    for dtype in FLOATS:
        found = loaded([path], str(dtype).removeprefix("torch."))
        assert torch.equal(found["a.weight"], exact.float().to(dtype))


def broken(path, change):
    tensors = load_file(path)
    change(tensors)
    with TensorFile(path) as file:
        metadata = file.header.metadata
    from i2l_ext.converters.files import WritePlan, write

    with path.open("wb") as out:
        write(out, [WritePlan.of(key, tensor) for key, tensor in tensors.items()], metadata)


OTHER_KIND = {torch.uint8: torch.ones(6144 // 32).bfloat16(), torch.bfloat16: torch.ones(6144 // 64 * 2).byte()}
"""Scales alone where low bits are needed, and bytes where there are none."""

UNFIT = {
    "missing": (lambda t: t.pop("a.weight_scale"), "'a.weight' holds I8, not floats, and its scales are missing"),
    "too few": (lambda t: t.update({"a.weight_scale": t["a.weight_scale"][:5]}), "do not fit"),
    "columns": (lambda t: t.update({"a.weight_scale": torch.ones(1, 128)}), "do not fit"),
    "blocks": (lambda t: t.update({"a.weight_scale": torch.ones(3, 4)}), "do not fit"),
    "whole numbers": (lambda t: t.update({"a.weight_scale": t["a.weight_scale"].int()}), "do not fit"),
    "none": (lambda t: t.update({"a.weight_scale": torch.ones(0)}), "do not fit"),
    "without the last": (lambda t: t.update({"a.weight_scale": t["a.weight_scale"][:-1]}), "do not fit"),
    "of the other kind": (lambda t: t.update({"a.weight_scale": OTHER_KIND[t["a.weight_scale"].dtype]}), "do not fit"),
}


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path / "own")


def part_of(files=("sub/model.safetensors",), **more):
    return replace(TINY, spec=SimpleNamespace(shapes=SHAPES), structure_md5=None, files=files, **more)


@pytest.fixture
def home(folders):
    """Where a hub's file of the checkpoint lies, which is there."""
    path = folders.own / "Some/Repo-1.0/sub/model.safetensors"
    path.parent.mkdir(parents=True)
    return save(path, weights(SHAPES), torch.bfloat16)


def packed(folders, form="int9", callbacks=None, part=None):
    part = part or part_of()
    plain = locate(part, folders, ("",))
    return pack.pack_files(part, plain, folders.own, form, callbacks or DownloadCallbacks())


@pytest.mark.parametrize("form", PACK_FORMATS)
@pytest.mark.parametrize("case", UNFIT)
def test_scales_that_do_not_fit_are_refused_in_one_line(home, folders, case, form):
    change, said = UNFIT[case]
    if (case, form) == ("missing", "fp8"):
        pytest.skip("e4m3 without scales is a file as others write it")
    [path] = packed(folders, form)
    home.unlink()
    broken(path, change)
    for refuse in (lambda: locate(part_of(), folders), lambda: loaded([path])):
        with pytest.raises(UserError, match=said) as caught:
            refuse()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", PACK_FORMATS)
def test_a_packed_file_is_used_listed_checked_and_deleted_like_others(home, folders, form):
    part = part_of()
    [path] = packed(folders, form)
    assert path == home.with_name(f"model.{form}.safetensors") and locate(part, folders) == [path]
    assert missing(SimpleNamespace(parts=[part]), folders) == []
    assert known_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert verify(part, [path]) == f"checksum and structure; packed ({form})"
    assert files_identity([path]) != files_identity([home])  # so embeddings of one are not taken for the other's
    before = path.stat().st_mtime_ns
    assert packed(folders, form) == [path] and path.stat().st_mtime_ns == before
    path.unlink()
    assert locate(part, folders) == [home]


@pytest.mark.parametrize("form", PACK_FORMATS)
def test_a_packed_file_is_known_under_another_name(home, folders, form, monkeypatch):
    from i2l_ext.weights.structure import structure_md5

    count = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    part = replace(part_of(), structure_md5=structure_md5(SHAPES), parameters=count)
    [path] = packed(folders, form)
    with TensorFile(path) as file:  # it is small: nearly all of it is its header
        monkeypatch.setattr("i2l_ext.models.store.HEADER_SLACK", file.header.data_start + 100)
    home.unlink()
    moved = path.rename(folders.own / "renamed.safetensors")
    assert locate(part, folders) == [moved] and locate(replace(part, id="other"), folders) is None


@pytest.mark.parametrize("case", ["another checkpoint", "another state", "another version", "no text"])
def test_an_origin_that_does_not_fit_is_refused(home, folders, case):
    part = part_of()
    [path] = packed(folders)
    if case == "another checkpoint":
        part, said = replace(part, id="other"), "was packed from tiny, not from other"
    elif case == "another state":
        save(home, weights(SHAPES, seed=5), torch.bfloat16)
        sha = hashlib.sha256(home.read_bytes()).hexdigest()
        checked_files.write_note(home, home, sha, {"repo": "Some/Repo-1.0"})
        said = r"another state of model\.safetensors"
        assert locate(part, folders) == [home]  # what lies beside it is good
        with pytest.raises(UserError, match=r"another state of model\.safetensors"):
            packed(folders)
        with pytest.raises(UserError, match=said):
            locate(part, folders, ("int9",))
        return
    else:
        version, note = (3, "{}") if case == "another version" else (1, "no")
        with TensorFile(path) as file:
            said = file.header.metadata["i2l.packed"]
        data = path.read_bytes()
        text = json.dumps(said)[1:-1].encode()
        new = text.replace(b'\\"version\\": 2', b'\\"version\\": %d' % version) if note == "{}" else b"n" * len(text)
        path.write_bytes(data.replace(text, new))
        said = "in a way that this version does not know"
    home.unlink()
    with pytest.raises(UserError, match=said) as caught:
        locate(part, folders)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_packed_says_why(home, folders):
    part = part_of()
    for spoil, said in (
        (lambda t: t["a.weight"].__setitem__((3, 4), float("nan")), "'a.weight' holds NaN or infinity"),
        (lambda t: t.update({"b": t["b"].to(torch.float8_e4m3fn)}), "one byte a number already"),
    ):
        tensors = {key: tensor.bfloat16() for key, tensor in weights(SHAPES).items()}
        spoil(tensors)
        broken(home, lambda held, tensors=tensors: held.update(tensors))
        with pytest.raises(UserError, match=said):
            packed(folders)
        assert locate(part, folders) == [home]
    home.write_bytes(home.read_bytes()[:-10])
    with pytest.raises(UserError, match="cut short"):
        pack.pack_files(part, [home], folders.own, "int9", DownloadCallbacks())
    assert sorted(path.name for path in home.parent.iterdir()) == [home.name]


def test_a_file_that_has_changed_since_its_download_is_not_packed(home, folders):
    checked_files.write_note(home, home, "0" * 64, {"repo": "Some/Repo-1.0"})
    with pytest.raises(UserError, match="not what its checksum says"):
        packed(folders)
    assert locate(part_of(), folders, ("int9",)) is None


def test_no_room_to_pack(home, folders, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"are to be packed, but only 0\.0 MB are free"):
        packed(folders)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be killed at an exact place")
@pytest.mark.parametrize("step", ["begin", "middle", "header", "checked", "noted"])
def test_a_kill_leaves_no_half_file(home, folders, step, monkeypatch):
    def die(*arguments, **named):
        os._exit(9)

    def half(self, chunk):
        plain_write(self, chunk[: len(chunk) // 2])
        self.stream.flush()
        os._exit(9)

    plain_write = PackWriter.write
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # the threads of its parent are not in the fork
            where = {"begin": (PackWriter, "restart", die), "middle": (PackWriter, "write", half),
                     "header": (PackWriter, "finish", die), "checked": (pack, "digest", die),
                     "noted": (pack, "write_note", die)}  # fmt: skip
            setattr(*where[step])
            packed(folders)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    part = part_of()
    assert locate(part, folders, ("int9",)) is None and locate(part, folders) == [home]
    [left] = home.parent.glob(".i2l-*.part")
    os.utime(left, (0, 0))
    monkeypatch.setattr("i2l_ext.converters.atomic.STALE_AFTER", -1)
    [path] = packed(folders)
    assert locate(part, folders) == [path] and not list(home.parent.glob(".*"))


def test_a_stop_leaves_nothing(home, folders):
    with pytest.raises(Cancelled):
        packed(folders, callbacks=DownloadCallbacks(cancelled=lambda: True))
    assert [path.name for path in home.parent.iterdir()] == [home.name]


def shards(folder):
    """A checkpoint in two shards, with its index."""
    folder.mkdir(parents=True)
    names = {key: f"model-0000{1 + (key > 'b')}-of-00002.safetensors" for key in SHAPES}
    for name in set(names.values()):
        own = {key: tensor for key, tensor in weights(SHAPES).items() if names[key] == name}
        save(folder / name, own, torch.bfloat16)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return part_of(("text/model.safetensors.index.json",))


def test_shards_are_packed_one_by_one(tmp_path, folders):
    """From a place where nothing is written; what was packed before a stop stays."""
    folders = replace(folders, others=(tmp_path / "other",))
    part = shards(tmp_path / "other/Some/Repo-1.0/text")
    told = []
    stop = DownloadCallbacks(lambda *word: told.append(word), lambda: any("00002-of" in word[0] for word in told))
    with pytest.raises(Cancelled):
        packed(folders, callbacks=stop, part=part)
    first = folders.own / "Some/Repo-1.0/text/model-00001-of-00002.int9.safetensors"
    stamp = first.stat().st_mtime_ns
    paths = packed(folders, part=part)
    assert locate(part, folders) == paths and paths[0] == first and first.stat().st_mtime_ns == stamp
    shutil.rmtree(tmp_path / "other")
    assert locate(part, folders) == paths and verify(part, paths).startswith("checksum and structure; packed")


REPO = "Some/Repo-1.0"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    from i2l_ext.models import download as downloading
    from i2l_ext.models import hubs as hubs_of_models

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 12)
    monkeypatch.setattr(hubs_of_models, "CHUNK", 1 << 12)
    monkeypatch.setattr(downloading, "RETRY_SECONDS", 0.01)
    for name in ("MODELSCOPE_HOME", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    made = FakeHub()
    yield made
    made.close()


@pytest.fixture(params=sorted(HUBS))
def client(request, hub):
    return HUBS[request.param](endpoint=hub.url)


def offered(hub, tmp_path):
    """The checkpoint on the hub; its file, and the packed form that this gives."""
    path = save(tmp_path / "model.safetensors", weights(SHAPES), torch.bfloat16)
    hub.add(REPO, "sub/model.safetensors", path.read_bytes())
    return part_of(), path


@pytest.mark.parametrize("cuts", [[], [5000], [100, 30_000, 40_000]], ids=len)
def test_a_file_is_packed_while_it_arrives(hub, client, tmp_path, folders, cuts, monkeypatch):
    """On a disk that has room for the packed file alone."""
    part, path = offered(hub, tmp_path)
    room = pack.RESERVE + int(0.6 * path.stat().st_size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=room))
    hub.cuts = list(cuts)
    largest = 0

    def progress(*word):
        nonlocal largest
        held = [one.stat().st_size for one in folders.own.rglob("*") if one.is_file()]
        largest = max(largest, sum(held))

    [found] = download([part], client, folders.own, DownloadCallbacks(progress), "int9")
    assert locate(part, folders) == [found] and [*loaded([found])] == [*loaded([path])]
    assert verify(part, [found]) == "checksum and structure; packed (int9)"
    assert largest < 0.75 * path.stat().st_size
    [same] = pack.pack_files(part, [path], tmp_path / "again", "int9", DownloadCallbacks())
    assert same.read_bytes() == found.read_bytes()
    asked = len(hub.fetched())
    assert download([part], client, folders.own, None, "int9") == [found] and len(hub.fetched()) == asked
    assert not [one for one in folders.own.rglob(".*") if one.suffix != ".lock"]


def test_a_hub_that_starts_again_unasked(hub, client, tmp_path, folders):
    part, path = offered(hub, tmp_path)
    hub.cuts, hub.ranges = [20_000], False
    [found] = download([part], client, folders.own, None, "int9")
    assert [*loaded([found])] == [*loaded([path])]


def test_wrong_bytes_are_not_packed(hub, client, tmp_path, folders):
    part, _ = offered(hub, tmp_path)
    hub.spoiled = True
    with pytest.raises(UserError):
        download([part], client, folders.own, None, "int9")
    assert locate(part, folders) is None and not list(folders.own.rglob("*.safetensors"))


def test_a_packed_file_of_another_state_than_the_hubs(hub, client, tmp_path, folders):
    part, _ = offered(hub, tmp_path)
    download([part], client, folders.own, None, "int9")
    save(tmp_path / "model.safetensors", weights(SHAPES, seed=3), torch.bfloat16)
    hub.add(REPO, "sub/model.safetensors", (tmp_path / "model.safetensors").read_bytes())
    anew = HUBS[client.name](endpoint=hub.url)
    with pytest.raises(UserError, match="was not packed from what"):
        download([part], anew, folders.own, None, "int9")


def test_shards_are_packed_while_they_arrive(hub, client, tmp_path, folders):
    part = shards(tmp_path / "there")
    for path in (tmp_path / "there").iterdir():
        hub.add(REPO, f"text/{path.name}", path.read_bytes())
    download([part], client, folders.own, None, "int9")
    found = locate(part, folders)
    assert [path.name[:11] for path in found] == ["model-00001", "model-00002"]
    assert loaded(found).keys() == SHAPES.keys()


def test_a_download_that_is_stopped_leaves_nothing(hub, client, tmp_path, folders):
    part, _ = offered(hub, tmp_path)
    hub.cuts, hub.stalling = [20_000] * 3, True
    told = []
    with pytest.raises(Cancelled):
        halfway = DownloadCallbacks(lambda *word: told.append(word), lambda: any(word[1] > 0 for word in told))
        download([part], client, folders.own, halfway, "int9")
    assert locate(part, folders) is None


@pytest.fixture
def copied(world, monkeypatch, tmp_path):
    """The small models in a folder that a test may write to."""
    shutil.copytree(world.models, tmp_path / "models")
    monkeypatch.setenv("I2L_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "user"))  # no folder of another test is remembered
    return replace(world, models=tmp_path / "models")


def run(capsys, *words):
    capsys.readouterr()
    code = main([*map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("model", ["small", "small-all"])
def test_a_packed_model_makes_what_its_numbers_make(copied, make, capsys, tmp_path, model):
    """From the command line: packed, then made; and made of unpacked files of the same numbers."""
    before = make("--name", "unpacked", model=model)
    code, out, _ = run(capsys, "models", "pack", model, "--verify", *copied.pictures[:2], "--precision", "fp32",
                       "--json")  # fmt: skip
    told = json.loads(out)
    assert code == 0 and told["moved"]["pictures"] == 2
    assert all(0 < share < 0.05 for share in (*told["moved"]["embeddings"].values(), told["moved"]["update"]))
    assert len(told["moved"]["embeddings"]) == (2 if model == "small" else 3)
    made = make("--name", "packed", model=model)  # with the cache of embeddings of before: they are not taken for these
    listed = json.loads(run(capsys, "models", "--json")[1])
    row = next(row for row in listed if row["name"] == model)
    assert row["ready"] and [part["packed"] for part in row["parts"]] == ["int9"] * (len(row["parts"]) - 1) + [
        None if model == "small-all" else "int9"
    ]
    assert "packed (int9): " in run(capsys, "models")[1]
    assert run(capsys, "models", "verify", model)[0] == 0
    for part in catalogue.find(model).parts:
        path = copied.file(part.id)
        small = path.with_name(packed_name(path.name, "int9"))
        if small.exists():
            save(path, {key: tensor.float() for key, tensor in values(small).items()})
            small.unlink()
    same = make("--name", "same", model=model)
    from i2l_ext.converters.lora import Lora

    loras = [Lora.read(one["file"]) for one in (before, made, same)]
    assert update_difference(loras[1:2], loras[2:]) < 0.01  # heads are computed in bf16 where they are packed
    assert 0.001 < update_difference(loras[:1], loras[1:2]) < 0.1


def test_packing_without_the_files(copied, capsys):
    run(capsys, "models", "pack", "small")
    code, out, err = run(capsys, "models", "pack", "small")  # once more: nothing is done
    assert code == 0 and "packed files are used" in out and "Delete them to have the room" in out
    copied.file("small-dinov3").unlink()
    assert run(capsys, "models", "pack", "small")[0] == 0
    code, _, err = run(capsys, "models", "pack", "small", "--verify", copied.pictures[0])
    assert code == 1 and err.count("\n") == 1 and "the unpacked files of small-dinov3 are needed" in err
    code, _, err = run(capsys, "models", "pack", "small", "--to", "fp8")
    assert code == 1 and "download small --packed" in err
    code, _, err = run(capsys, "models", "pack", "z-image-v2")
    assert code == 1 and "reads no packed files" in err


def test_the_miniature_packed(monkeypatch, tmp_path, capsys):
    """What we ship is packed into the models folder; its embeddings and LoRA move little."""
    from PIL import Image

    monkeypatch.setenv("I2L_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("I2L_CACHE", str(tmp_path / "cache"))
    picture = tmp_path / "picture.png"
    Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 20).convert("RGB").save(picture)
    code, out, _ = run(capsys, "models", "pack", "mini", "--verify", picture, "--precision", "fp32", "--json")
    moved = json.loads(out)["moved"]
    assert code == 0 and max(*moved["embeddings"].values(), moved["update"]) < 0.06
    shipped = json.loads(out)["parts"]
    assert not any(part["unpacked"] for part in shipped)  # those are not to be deleted
    assert all(path.startswith(str(tmp_path)) for part in shipped for path in part["files"])


def test_how_far_apart():
    one = torch.randn(3, 5)
    assert relative_difference(one, one) == 0 and relative_difference(one, one * 1.1) == pytest.approx(0.1)


def test_writing_in_pieces_needs_no_second_copy(plain):
    """A stream that is cut is no file: nothing of it is read."""
    out = io.BytesIO()
    writer = PackWriter(out, plain.stat().st_size, "x", NOTE)
    writer.write(plain.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut short"):
        writer.finish()
    assert out.getvalue()[:8] == bytes(8)


def test_a_connection_that_fails_for_good_promises_nothing(hub, client, tmp_path, folders):
    part, _ = offered(hub, tmp_path)
    hub.cuts, hub.statuses["fetch"] = [9000], [0, 503, 503, 503, 503, 503, 503, 503, 503, 503, 503]
    with pytest.raises(UserError) as caught:
        download([part], client, folders.own, None, "int9")
    assert "resumes" not in str(caught.value) and "\n" not in str(caught.value)


def test_random_files_are_packed_while_they_are_made(world, make, monkeypatch, tmp_path):
    """For a LoRA of packed files at full size, whose unpacked ones would need another 21 GB."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    real_size = pytest.importorskip("real_size", reason="the benchmarks are Linux's")
    model = catalogue.find("small")
    paths = real_size.weights(model, tmp_path / "packed", "int9")
    assert paths == [locate(part, Folders(tmp_path / "packed"))[0] for part in model.parts]
    assert sorted(path for path in (tmp_path / "packed").rglob("*") if path.is_file()) == sorted(paths)
    for path, packed in zip(real_size.weights(model, tmp_path / "plain"), paths, strict=True):
        assert packed.read_bytes()[-1000:] == packed_file(path).read_bytes()[-1000:]
    monkeypatch.setenv("I2L_MODELS", str(tmp_path / "packed"))
    assert make()["modules"] > 0
