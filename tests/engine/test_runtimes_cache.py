"""The cache of compiled networks: whole, of its key, of its owner; anything else is made anew, which is said."""

from __future__ import annotations

import os
import tempfile
import threading
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scanside.engine.errors import ConfigError
from scanside.engine.runtimes.cache import CACHE_VARIABLE, ArtefactCache, CacheWarning, default_folder

KEY = {"function": "abc", "version": "1"}


def test_an_artefact_is_made_once(tmp_path: Path) -> None:
    cache, made = ArtefactCache(tmp_path / "new" / "folder"), []

    def make() -> bytes:
        made.append(1)
        return b"plan"

    first, second = (cache.get_or_make("plan", KEY, make) for _ in range(2))
    assert (first.content, first.found) == (b"plan", False)
    assert (second.content, second.found, len(made), cache.hits) == (b"plan", True, 1, 1)
    assert first.path == second.path
    assert cache.get_or_make("plan", KEY, lambda: b"other", anew=True).content == b"other"
    assert cache.get("plan", KEY) == b"other"


def test_other_keys_and_kinds_have_other_artefacts(tmp_path: Path) -> None:
    cache = ArtefactCache(tmp_path / "cache")
    cache.put("plan", KEY, b"1")
    assert cache.get("onnx", KEY) is None
    assert cache.get("plan", KEY | {"version": "2"}) is None
    assert cache.get("plan", dict(reversed(KEY.items()))) == b"1"


@given(content=st.binary(max_size=200), data=st.data())
def test_a_damaged_file_is_never_used(content: bytes, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = ArtefactCache(Path(folder) / "cache")
        path = cache.put("plan", KEY, content)
        assert path is not None
        whole = path.read_bytes()
        kind = data.draw(st.sampled_from(["flip", "cut", "append"]))
        place = data.draw(st.integers(0, len(whole) - 1))
        flipped = bytes([whole[place] ^ (1 << data.draw(st.integers(0, 7)))])
        changed = {
            "flip": whole[:place] + flipped + whole[place + 1 :],
            "cut": whole[:place],
            "append": whole + flipped,
        }
        path.write_bytes(changed[kind])
        with pytest.warns(CacheWarning, match="damaged; it will be made anew"):
            assert cache.get("plan", KEY) is None
        with warnings.catch_warnings():  # said once: the file is gone
            warnings.simplefilter("error")
            assert cache.get("plan", KEY) is None
        assert not path.exists()


def test_a_file_of_another_key_is_not_believed(tmp_path: Path) -> None:
    cache = ArtefactCache(tmp_path / "cache")
    other = cache.put("plan", KEY | {"version": "2"}, b"of version 2")
    assert other is not None
    other.rename(cache.path("plan", KEY))
    with pytest.warns(CacheWarning):
        assert cache.get("plan", KEY) is None


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path: Path) -> None:
    cache = ArtefactCache(tmp_path / "cache")
    contents = [bytes([i]) * 300_000 for i in range(8)]
    threads = [threading.Thread(target=cache.put, args=("plan", KEY, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.get("plan", KEY) in contents
    assert [path.suffix for path in cache.folder.iterdir()] == [".bin"]


def test_a_disk_that_takes_nothing_costs_the_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ArtefactCache(tmp_path / "cache")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(CacheWarning, match="No space left"):
        made = cache.get_or_make("plan", KEY, lambda: b"plan")
    assert (made.content, made.path) == (b"plan", None)
    assert list(cache.folder.iterdir()) == []


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="others may write to the cache"):
        ArtefactCache(tmp_path)
    assert (ArtefactCache(tmp_path / "own").folder.stat().st_mode & 0o777) == 0o700


def test_a_folder_that_cannot_be_made_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"cannot be made: .*{CACHE_VARIABLE}"):
        ArtefactCache(tmp_path / "file" / "cache")


def test_the_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "here"))
    assert default_folder() == tmp_path / "here"
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "scanside"
