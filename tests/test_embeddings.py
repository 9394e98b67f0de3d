"""The cache of embeddings: what goes in comes out, nothing damaged does, and it stays within its size."""

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i2l_ext.encoders.cache import STALE, EmbeddingCache

KEY = "ab" * 32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def key(number: int) -> str:
    return sha256(str(number).encode()).hexdigest()


def age(cache: EmbeddingCache, key: str, seconds: float) -> None:
    path = cache.folder / f"{key}.safetensors"
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(0, 5), max_size=3), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_what_goes_in_comes_out(tmp_path_factory, shape, dtype, seed):
    cache = EmbeddingCache(tmp_path_factory.mktemp("cache"))
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    cache.put(KEY, tensor)
    found = cache.get(KEY)
    assert found.dtype == dtype and found.shape == tensor.shape and torch.equal(found, tensor)


def test_views_and_gradients_are_kept_by_value(tmp_path):
    cache = EmbeddingCache(tmp_path)
    tensor = torch.arange(12.0, requires_grad=True).view(3, 4).T[1:]
    cache.put(KEY, tensor)
    assert torch.equal(cache.get(KEY), tensor)


def test_unknown_keys_and_an_absent_folder(tmp_path):
    cache = EmbeddingCache(tmp_path / "none")
    assert cache.get(KEY) is None and cache.size() == (0, 0) and cache.clear() == (0, 0)
    assert not cache.folder.exists()


@pytest.mark.parametrize("bad", ["", "../x", "a/b", "AB", "x.y"])
def test_a_key_is_a_digest(tmp_path, bad):
    with pytest.raises(ValueError, match="hex digest"):
        EmbeddingCache(tmp_path).get(bad)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "other"])
def test_a_damaged_entry_is_dropped(tmp_path, damage):
    cache = EmbeddingCache(tmp_path)
    cache.put(KEY, torch.ones(64))
    path = tmp_path / f"{KEY}.safetensors"
    content = path.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    other = content.replace(b'"embedding"', b'"embeddinG"')
    path.write_bytes({"cut": content[:-4], "flip": flipped, "empty": b"", "text": b"no", "other": other}[damage])
    assert cache.get(KEY) is None and not path.exists()
    cache.put(KEY, torch.zeros(64))
    assert torch.equal(cache.get(KEY), torch.zeros(64))


def test_the_least_recently_used_go_first(tmp_path):
    one = EmbeddingCache(tmp_path)
    one.put(key(0), torch.zeros(1000))
    entry = one.size()[1]
    cache = EmbeddingCache(tmp_path, limit=3 * entry)
    for number in (1, 2):
        cache.put(key(number), torch.zeros(1000))
    for number, seconds in ((0, 30), (1, 20), (2, 10)):
        age(cache, key(number), seconds)
    assert cache.get(key(0)) is not None  # used now: entry 1 is the oldest from here on
    cache.put(key(3), torch.zeros(1000))
    assert cache.size() == (3, 3 * entry)
    assert [cache.get(key(number)) is not None for number in range(4)] == [True, False, True, True]


WATCHED: list[str] = []
SEEN: list[str] = []


def listings(folder: Path) -> int:
    """How often the folder's names were read since it was first asked for."""
    if not WATCHED:
        sys.addaudithook(lambda event, args: event in ("os.listdir", "os.scandir") and SEEN.append(str(args[0])))
    WATCHED.append(str(folder))
    return SEEN.count(str(folder))


def test_the_folder_is_looked_through_once_a_share_of_the_limit(tmp_path):
    EmbeddingCache(tmp_path / "one").put(KEY, torch.zeros(1000))
    entry = EmbeddingCache(tmp_path / "one").size()[1]
    folder = tmp_path / "many"
    cache = EmbeddingCache(folder, limit=160 * entry)
    assert listings(folder) == 0
    cache.put(key(0), torch.zeros(1000))
    once = listings(folder)
    assert once
    for number in range(1, 11):
        cache.put(key(number), torch.zeros(1000))
    assert listings(folder) == once
    for number in range(11, 400):
        cache.put(key(number), torch.zeros(1000))
    assert listings(folder) <= 40 * once
    assert 160 * entry <= cache.size()[1] <= 170 * entry
    EmbeddingCache(folder, limit=160 * entry).put(key(0), torch.zeros(1000))
    assert cache.size()[1] <= 160 * entry, "the next run begins with a look"


def test_an_entry_larger_than_the_limit_is_not_kept(tmp_path):
    cache = EmbeddingCache(tmp_path, limit=100)
    cache.put(KEY, torch.zeros(1000))
    assert cache.get(KEY) is None and cache.size() == (0, 0)


def test_leftovers_of_dead_processes_go_and_foreign_files_stay(tmp_path):
    cache = EmbeddingCache(tmp_path, limit=0)
    fresh, old, foreign = (tmp_path / name for name in (".i2l-1.part", ".i2l-2.part", "notes.txt"))
    for path in (fresh, old, foreign):
        path.write_bytes(b"x" * 10)
    os.utime(old, (fresh.stat().st_mtime - 2 * STALE,) * 2)
    cache.put(KEY, torch.zeros(4))
    assert fresh.exists() and foreign.exists() and not old.exists()


def test_clear_counts(tmp_path):
    cache = EmbeddingCache(tmp_path)
    for number in range(3):
        cache.put(key(number), torch.zeros(10))
    count, size = cache.size()
    assert count == 3 and cache.clear() == (3, size) and cache.size() == (0, 0)


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = EmbeddingCache(tmp_path / "file" / "cache")
    cache.put(KEY, torch.zeros(4))
    assert cache.get(KEY) is None


def test_folder_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("I2L_CACHE", str(tmp_path))
    assert EmbeddingCache.default().folder == tmp_path / "embeddings"
    monkeypatch.delenv("I2L_CACHE")
    assert EmbeddingCache.default().folder.parent.name == "i2l"


WORKER = """
import sys
from hashlib import sha256
from pathlib import Path
import torch
from i2l_ext.encoders.cache import EmbeddingCache
torch.set_num_threads(1)
cache = EmbeddingCache(Path(sys.argv[1]), limit=int(sys.argv[2]))
for turn in range(40):
    number = turn * int(sys.argv[3]) % 12
    key = sha256(str(number).encode()).hexdigest()
    found = cache.get(key)
    assert found is None or torch.equal(found, torch.full((500,), float(number))), number
    cache.put(key, torch.full((500,), float(number)))
    if turn == 20:
        cache.clear()
"""


def test_several_processes_at_once(tmp_path):
    """They write, read, trim and clear the same twelve entries, in a folder with room for seven."""
    EmbeddingCache(tmp_path / "one").put(KEY, torch.zeros(500))
    limit = 7 * EmbeddingCache(tmp_path / "one").size()[1]
    folder, root = tmp_path / "shared", Path(__file__).parent.parent
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(limit), str(step)], cwd=root)
        for step in (1, 5, 7)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    cache = EmbeddingCache(folder, limit)
    assert 0 < cache.size()[1] <= limit + 3 * limit // 7
    assert all(path.suffix == ".safetensors" for path in folder.iterdir())
