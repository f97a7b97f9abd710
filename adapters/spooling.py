"""Keeps what scanners send on disk while their sessions run, so that a lost worker, or a lost server, loses no scan.

The gateway hands views on its receive memory to a thread that writes them to one file per session (`files/spool`); another
thread makes them durable every few milliseconds. The gateway never waits for the disk: a session whose data cannot be
written in time, or at all, goes on without its file, and says so in `SpoolLog.lost`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec
import platformdirs
import structlog
from scanside.engine.errors import ConfigError

from .files.spool import SUFFIX, SpoolClosing, SpoolEncoder, SpoolFacts

__all__ = ["Spool", "SpoolLog", "SpoolOptions", "SpoolStatus", "default_folder", "in_use", "spool_files"]

_log = structlog.get_logger("spool")

GROUP_SECONDS = 0.005
"""What comes within this time is written together."""
COMMIT_SECONDS = 0.05
"""Pause between two commits to the disk."""
TIDY_SECONDS, QUIET_TIDY_SECONDS = 1.0, 10.0
"""Between two looks at sizes and free space: while there is something to write or trouble, and otherwise."""
QUEUE_BYTES = 128 << 20
"""Waiting to be written; a session for which there is no room left in this goes on without its file."""
MOST_FILES = 1000
"""Files of sessions that are over; the oldest go first."""
_VECTORS = 512
"""Buffers of one system call."""


class SpoolOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how much; sizes in bytes."""

    folder: Path
    limit: int = 20_000_000_000
    """All files together."""
    floor: int = 1_000_000_000
    """Space that stays free on the disk for others."""
    keep_raw: bool = False
    """Keep the files of sessions that ended well, too."""


class SpoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The spool at one moment; used, free: bytes. trouble: why no session is taken, empty when all is well; behind: what came
    last could not be written in time, so that a session goes on without its file."""

    used: int
    free: int
    trouble: str = ""
    behind: bool = False


class _Item(NamedTuple):
    """What the writer is to do next for a session: append a piece, or, with `last`, end its file."""

    log: SpoolLog
    view: memoryview = memoryview(b"")
    messages: int = 0
    received: int = 0
    last: SpoolClosing | None = None
    keep: bool = True


def default_folder() -> Path:
    """Where a server keeps its spool when nobody says otherwise."""
    return platformdirs.user_state_path("scanside") / "spool"


def spool_files(folder: Path) -> list[Path]:
    """All spool files of a folder, the oldest first; none where there is no such folder."""
    return sorted(folder.glob(f"*{SUFFIX}"))  # names begin with the time


def in_use(path: Path) -> bool:
    """Whether a server is writing the file now. Raises OSError when it cannot be opened."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


class SpoolLog:
    """The file of one session. `append` and `end` belong to the gateway's thread, the rest to the spool."""

    def __init__(self, spool: Spool, facts: SpoolFacts) -> None:
        begun = datetime.fromtimestamp(facts.started / 1e9, UTC)
        # no Path: each interns its parts, and the interpreter's table of interned strings grows with names that are used once
        self._file = f"{spool.options.folder}/{begun:%Y%m%dT%H%M%S%fZ}-{facts.session}{SUFFIX}"
        self.lost = ""
        """Why the file is not whole, in a fixed word: "behind" or "disk"; empty while it is."""
        self.written = 0
        """Pieces that are in the file."""
        self._spool, self._facts = spool, facts
        self._encoder = SpoolEncoder()
        self._fd = -1
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        """Where the file is, or will be once something is written."""
        return Path(self._file)

    def append(self, view: memoryview, messages: int, received: int) -> None:
        """Have a piece written; its memory must not change until then. Costs an entry in a queue and never waits."""
        if not self.lost:
            self._spool.take(_Item(self, view, messages, received))

    def end(self, closing: SpoolClosing, *, keep: bool) -> None:
        """The session is over: close its file, or with `keep` false remove it."""
        self._spool.take(_Item(self, last=closing, keep=keep))

    def give_up(self, reason: str) -> None:
        """Write no more."""
        self.lost = self.lost or reason

    def write(self, items: Sequence[_Item]) -> None:
        """Append pieces; in the writer's thread. Raises OSError."""
        buffers: list[bytes | memoryview] = [] if self._fd >= 0 else [self._create()]
        for item in items:
            buffers += (self._encoder.head(item.view, item.messages, item.received), item.view)
        self._write(buffers)
        self.written += len(items)

    def finish(self, last: SpoolClosing, *, keep: bool) -> None:
        """Close the file, or remove it; in the writer's thread. Raises OSError."""
        if self._fd < 0:
            return  # nothing was ever written
        try:
            if not keep:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._file)  # noqa: PTH108 - see above
            elif not self.lost:
                self._write([self._encoder.close(last)])
                os.fdatasync(self._fd)
        finally:
            self.close()

    def commit(self) -> None:
        """Make durable what was written. Raises OSError."""
        with self._lock:
            if self._fd >= 0:
                os.fdatasync(self._fd)

    def close(self) -> None:
        """Give the descriptor back; the file stays as it is."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1

    def _create(self) -> bytes:
        with self._lock:
            self._fd = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        return self._encoder.begin(self._facts)

    def _write(self, buffers: list[bytes | memoryview]) -> None:
        for first in range(0, len(buffers), _VECTORS):
            left = [memoryview(buffer) for buffer in buffers[first : first + _VECTORS]]
            while left:
                done = os.writev(self._fd, left)
                while left and done >= len(left[0]):
                    done -= len(left.pop(0))
                if left:
                    left[0] = left[0][done:]


class Spool:
    """All spool files of one server, and the two threads that write them.

    `on_lost` is called, in any thread, with the reason whenever a session goes on without its file.
    """

    def __init__(self, options: SpoolOptions, on_lost: Callable[[str], None] = lambda _reason: None) -> None:
        self.options = options
        self._on_lost = on_lost
        self._queue: deque[_Item] = deque()
        self._taken = self._done = 0  # bytes, each counted by one thread
        self._open: set[SpoolLog] = set()
        self._unsynced: set[SpoolLog] = set()
        self._wake, self._grown = threading.Event(), threading.Event()
        self._stopping = self._failing = self._behind = False
        self._status = SpoolStatus(used=0, free=0)
        self._threads = [
            threading.Thread(target=self._write_all, name="spool-writer", daemon=True),
            threading.Thread(target=self._commit_all, name="spool-commit", daemon=True),
        ]

    def start(self) -> None:
        """Make the folder and start the threads. Raises ConfigError when it cannot be written."""
        folder = self.options.folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._probe()
        except OSError as error:
            raise ConfigError(
                f"the spool cannot be written to {folder} ({error.strerror}); give another folder with --spool, "
                "or none with --no-spool"
            ) from None
        self._tidy()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Write what waits, close all files and end the threads."""
        self._stopping = True
        self._wake.set()
        self._grown.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def begin(self, facts: SpoolFacts) -> SpoolLog:
        """The file of a new session; made with its first piece."""
        return SpoolLog(self, facts)

    def status(self) -> SpoolStatus:
        """Sizes, and whether sessions can be taken; any thread may ask."""
        return msgspec.structs.replace(self._status, behind=self._behind)

    def __len__(self) -> int:
        """Pieces that wait to be written."""
        return len(self._queue)

    def take(self, item: _Item) -> None:
        """Queue what is to be done for a session; in the gateway's thread."""
        size = len(item.view)
        if size and self._taken - self._done + size > QUEUE_BYTES:
            self._behind = True
            self._lose(item.log, "behind")
            return
        self._taken += size
        self._queue.append(item)
        if len(self._queue) == 1:
            self._wake.set()

    def _lose(self, log: SpoolLog, reason: str) -> None:
        if not log.lost:
            log.give_up(reason)
            self._on_lost(reason)
            _log.error("a session goes on without its spool file", reason=reason)

    # The writer

    def _write_all(self) -> None:
        while not self._stopping or self._queue:
            if not self._queue:  # what came while the last of it was written woke nobody
                self._wake.wait(TIDY_SECONDS)
            self._wake.clear()
            if self._open and not self._stopping:
                time.sleep(GROUP_SECONDS)  # no waking up for each readout
            self._drain()
        for log in self._open:
            log.close()

    def _drain(self) -> None:
        """Write what waits, session by session, then the ends; returns with no view held."""
        waiting: dict[SpoolLog, list[_Item]] = {}
        for _ in range(len(self._queue)):
            item = self._queue.popleft()
            waiting.setdefault(item.log, []).append(item)
        for log, items in waiting.items():
            self._attempt(log, items)
            self._done += sum(len(item.view) for item in items)
        if not self._queue:
            self._behind = False

    def _attempt(self, log: SpoolLog, items: list[_Item]) -> None:
        pieces = [item for item in items if item.last is None]
        try:
            if pieces and not log.lost:
                self._open.add(log)
                log.write(pieces)
                self._unsynced.add(log)
                self._grown.set()
            for item in items:
                if item.last is not None:
                    self._open.discard(log)
                    log.finish(item.last, keep=item.keep or self.options.keep_raw)
        except OSError as error:
            self._fail(log, error)

    def _fail(self, log: SpoolLog, error: OSError) -> None:
        self._failing = True
        _log.error("the spool cannot be written", error=error.strerror)
        self._lose(log, "disk")

    # What makes durable, and tidies up

    def _commit_all(self) -> None:
        tidied = time.monotonic()
        while not self._stopping:
            if self._grown.wait(TIDY_SECONDS):
                time.sleep(COMMIT_SECONDS)
            self._grown.clear()
            while self._unsynced:
                log = self._unsynced.pop()
                try:
                    log.commit()
                except OSError as error:
                    self._fail(log, error)
            busy = bool(self._open or self._failing or self._status.trouble)
            if time.monotonic() - tidied > (TIDY_SECONDS if busy else QUIET_TIDY_SECONDS):
                tidied = time.monotonic()
                self._tidy()

    def _tidy(self) -> None:
        """Look at sizes, make room where old files allow it, and try again to write where that failed."""
        try:
            if self._failing:
                self._probe()
                self._failing = False
            self._status = self._make_room()
        except OSError as error:
            self._failing = True
            text = f"the spool cannot be written ({error.strerror})"
            self._status = msgspec.structs.replace(self._status, trouble=text)

    def _make_room(self) -> SpoolStatus:
        options = self.options
        files = _sizes(options.folder)
        used, free = sum(size for _, size in files), _free(options.folder)
        for number, (name, size) in enumerate(files):
            if used <= options.limit and free >= options.floor and len(files) - number <= MOST_FILES:
                break
            path = options.folder / name
            with contextlib.suppress(FileNotFoundError):
                if not in_use(path):
                    path.unlink()
                    used, free = used - size, free + size
                    _log.warning("an old spool file was removed to make room", bytes=size)
        trouble = ""
        if used > options.limit:
            trouble = (
                f"the spool is full: {used} bytes are in use, the limit is {options.limit}; raise it with --spool-limit"
            )
        elif free < options.floor:
            trouble = (
                f"the disk of the spool is full: {free} bytes are free, {options.floor} have to be; make room on it"
            )
        return SpoolStatus(used=used, free=free, trouble=trouble)

    def _probe(self) -> None:
        """Write a small file and remove it. Raises OSError."""
        path = self.options.folder / f".probe-{os.getpid()}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, bytes(4096))
            os.fdatasync(fd)
        finally:
            os.close(fd)
            path.unlink()


def _sizes(folder: Path) -> list[tuple[str, int]]:
    """Names of all spool files, the oldest first, and their sizes; once a second, so without the detour by `Path`."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIX):
                with contextlib.suppress(FileNotFoundError):  # its session has just ended
                    found.append((entry.name, entry.stat().st_size))
    return sorted(found)  # names begin with the time


def _free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
