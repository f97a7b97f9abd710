"""Compiled networks on disk: found by what they were made of, written whole or not at all, never trusted unread.

An artefact is the outcome of a long computation (a TensorRT plan, an ONNX file, an OpenVINO blob) that depends on its key and
nothing else. Files carry the key and a digest of the content; one that does not match is thrown away, which is said once.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import platformdirs

from ...kernels.files import write_whole
from ..errors import ConfigError

__all__ = ["CACHE_VARIABLE", "Artefact", "ArtefactCache", "CacheWarning", "default_folder"]

CACHE_VARIABLE = "SCANSIDE_CACHE"
_MAGIC = b"scanside artefact 1\n"
_DIGEST = 32
_LENGTH = 4
_LONGEST_HEADER = 1 << 20


class CacheWarning(UserWarning):
    """A file of the cache was useless and has been made anew, or the cache cannot be used."""


class Artefact(msgspec.Struct, frozen=True):
    """The content of an artefact, where it is kept, and whether it was there already."""

    content: bytes
    path: Path | None
    found: bool


def default_folder() -> Path:
    """`$SCANSIDE_CACHE`, or the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else platformdirs.user_cache_path("scanside")


class ArtefactCache:
    """A folder of artefacts, of its owner alone: what is in it gets executed.

    Raises ConfigError when the folder cannot be made, or when others may write to it.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()
        self.hits = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = self.folder.stat()
        except OSError as error:
            raise ConfigError(
                f"the cache {self.folder} cannot be made: {error.strerror}; name another one in {CACHE_VARIABLE}"
            ) from None
        if found.st_uid not in (os.getuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError(
                f"others may write to the cache {self.folder}, whose content is executed; "
                f"`chmod go-w` it, or name another one in {CACHE_VARIABLE}"
            )

    def path(self, kind: str, key: Mapping[str, str]) -> Path:
        """Where an artefact with this key lies, or would."""
        text = msgspec.json.encode(dict(sorted(key.items())))
        return self.folder / f"{kind}-{hashlib.sha256(text).hexdigest()[:40]}.bin"

    def get(self, kind: str, key: Mapping[str, str]) -> bytes | None:
        """Content of an artefact; None when there is none, or a damaged one, which is removed and warned about."""
        path = self.path(kind, key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        content = _unpack(data, key)
        if content is None:
            warnings.warn(f"{path} is damaged; it will be made anew", CacheWarning, stacklevel=2)
            self.remove(kind, key)
            return None
        self.hits += 1
        return content

    def put(self, kind: str, key: Mapping[str, str], content: bytes) -> Path | None:
        """Keep an artefact; returns where, or None with a warning when the disk does not take it."""
        path = self.path(kind, key)
        try:
            write_whole(path, _pack(content, key))
        except OSError as error:
            warnings.warn(f"{path} cannot be written: {error.strerror}", CacheWarning, stacklevel=2)
            return None
        return path

    def remove(self, kind: str, key: Mapping[str, str]) -> None:
        """Forget an artefact; it need not be there."""
        self.path(kind, key).unlink(missing_ok=True)

    def get_or_make(
        self, kind: str, key: Mapping[str, str], make: Callable[[], bytes], *, anew: bool = False
    ) -> Artefact:
        """The artefact with this key: the one that is kept, or a new one; `anew` makes it in any case."""
        content = None if anew else self.get(kind, key)
        if content is not None:
            return Artefact(content, self.path(kind, key), found=True)
        content = make()
        return Artefact(content, self.put(kind, key, content), found=False)


def _pack(content: bytes, key: Mapping[str, str]) -> bytes:
    header = msgspec.json.encode(dict(sorted(key.items())))
    body = len(header).to_bytes(_LENGTH, "little") + header + content
    return _MAGIC + hashlib.sha256(body).digest() + body


def _unpack(data: bytes, key: Mapping[str, str]) -> bytes | None:
    """Content of a file, or None when it is not whole or belongs to another key."""
    start = len(_MAGIC) + _DIGEST
    body = memoryview(data)[start:]
    if not data.startswith(_MAGIC) or hashlib.sha256(body).digest() != data[len(_MAGIC) : start]:
        return None
    length = int.from_bytes(body[:_LENGTH], "little")
    header = bytes(body[_LENGTH : _LENGTH + min(length, _LONGEST_HEADER)])
    if header != msgspec.json.encode(dict(sorted(key.items()))):
        return None
    return bytes(body[_LENGTH + length :])
