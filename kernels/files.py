"""Files that are seen whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside `path` and rename it: a reader sees all of it or what was there before, after a power cut too.

    Only its owner may write to it. Raises OSError, leaving nothing behind, where the disk does not take it.
    """
    draft = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.part")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
