"""Files are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from scanside.kernels.files import write_whole


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / ("long" * 60)
    write_whole(path, b"first")
    with path.open("rb") as reader:
        write_whole(path, b"second, and longer")
        assert reader.read() == b"first"
    assert path.read_bytes() == b"second, and longer"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path / "folder", b"content")
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"]
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "file", b"content")


def test_only_the_owner_may_write_to_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_whole(tmp_path / "file", b"content")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
