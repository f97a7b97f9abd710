"""Spool files: the messages of one session as they came, appended while the scan runs. docs/spool.md has every byte.

No input or output happens here: `SpoolEncoder` makes bytes, `SpoolReader` reads them where they lie. Each record carries a
checksum over itself and everything before it, so that what follows a fault is never taken for part of the scan.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import msgspec
from crc32c import crc32c
from scanside.engine.config import Value

__all__ = [
    "MAGIC",
    "PREAMBLE",
    "RECORD",
    "RECORD_BYTES",
    "SUFFIX",
    "VERSION",
    "SpoolClosing",
    "SpoolEncoder",
    "SpoolFacts",
    "SpoolFault",
    "SpoolReader",
    "SpoolRecord",
    "open_spool",
]

SUFFIX = ".scanspool"
"""Of the names of spool files."""
MAGIC = b"\x93SCSPOOL"
VERSION = 1
PREAMBLE = struct.Struct("<8sII")
"""Magic, version, CRC-32C of both."""
RECORD = struct.Struct("<IIHHIQ")
"""Before each payload: checksum, bytes of payload, kind, 0, messages, time of reception in ns."""
_REST = struct.Struct("<IHHIQ")
RECORD_BYTES = 16 << 20
"""Longest payload; longer messages take several records."""
_SIZE_OF_SUM = RECORD.size - _REST.size
_FACTS, _DATA, _CLOSING = 1, 2, 3

Buffer = bytes | bytearray | memoryview | mmap.mmap
S = TypeVar("S", bound=msgspec.Struct)


class SpoolFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a session is, apart from its messages.

    session: id on the bus. started: ns since 1970; monotonic: the same moment on the clock that records are timed by.
    config, dialect, parameters: as in `open` on the bus.
    """

    session: str
    started: int
    monotonic: int
    config: str
    dialect: str = ""
    parameters: Mapping[str, Value] = {}


class SpoolClosing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a session ended. images: that were handed to the peer; text: what it was told when it failed."""

    outcome: Literal["complete", "incomplete", "failed"]
    images: int = 0
    text: str = ""


class SpoolFault(NamedTuple):
    """Where a file stops to be what was written. offset: byte in the file of the record, or preamble, at fault."""

    offset: int
    text: str


class SpoolRecord(NamedTuple):
    """Messages as they came. messages: complete ones in `view`, 0 for a part of a long one; received: monotonic, ns."""

    view: memoryview
    messages: int
    received: int


class SpoolEncoder:
    """Makes the bytes of one file, in order. Payload is not copied: write each head, and its payload after it."""

    def __init__(self) -> None:
        self._sum = 0

    def begin(self, facts: SpoolFacts) -> bytes:
        """The start of the file."""
        start = PREAMBLE.pack(MAGIC, VERSION, 0)[:-4]
        self._sum = crc32c(start)
        return start + self._sum.to_bytes(4, "little") + self._whole(_FACTS, facts)

    def head(self, payload: bytes | memoryview, messages: int, received: int) -> bytes:
        """What stands before a payload of 1 to `RECORD_BYTES` bytes."""
        return self._head(_DATA, payload, messages, received)

    def close(self, closing: SpoolClosing) -> bytes:
        """The end of the file."""
        return self._whole(_CLOSING, closing)

    def _whole(self, kind: int, content: msgspec.Struct) -> bytes:
        payload = msgspec.json.encode(content)
        return self._head(kind, payload, 0, 0) + payload

    def _head(self, kind: int, payload: bytes | memoryview, messages: int, received: int) -> bytes:
        rest = _REST.pack(len(payload), kind, 0, messages, received)
        self._sum = crc32c(payload, crc32c(rest, self._sum))
        return self._sum.to_bytes(4, "little") + rest


class SpoolReader:
    """A file's content, as far as it is sound. Raises nothing for what is in it.

    data: the whole file; the views of records lie in it. facts: None where not even they can be read. fault, closing: known
    once `records` has come to its end; without a fault and without a closing record the file was cut off between two records.
    """

    def __init__(self, data: Buffer) -> None:
        self._data = memoryview(data)
        self.fault: SpoolFault | None = None
        self.closing: SpoolClosing | None = None
        self.end = 0
        """Bytes of the file that were found sound so far."""
        self._sum = self._start = 0
        self.facts = self._begin()

    def records(self, *, check: bool = True) -> Iterator[SpoolRecord]:
        """The messages in order, up to the end or the first fault. Without `check` payload is not compared with its sum."""
        if self.facts is None:
            return
        at, total, self.fault, self.closing = self._start, self._sum, None, None
        while at < len(self._data) and self.fault is None:
            found = self._record(at, total, check=check)
            if found is None:
                return
            kind, total, record = found
            if kind == _DATA and self.closing is None:
                yield record
            elif kind == _CLOSING and self.closing is None:
                self.closing = self._struct(record, SpoolClosing, at)
            else:
                self.fault = SpoolFault(at, f"a record of kind {kind} has no place here")
                return
            at += RECORD.size + len(record.view)
            self.end = at

    def _begin(self) -> SpoolFacts | None:
        head = self._data[: PREAMBLE.size]
        if len(head) < PREAMBLE.size or head[: len(MAGIC)] != MAGIC:
            self.fault = SpoolFault(0, "this is no spool file: it does not begin with the signature of one")
            return None
        _, version, total = PREAMBLE.unpack(head)
        if total != crc32c(head[:-4]):
            self.fault = SpoolFault(0, "the checksum of the first 16 bytes is wrong")
        elif version != VERSION:
            self.fault = SpoolFault(8, f"version {version} of the format; this scanside reads version {VERSION}")
        found = None if self.fault is not None else self._record(PREAMBLE.size, total, check=True)
        if found is None:
            return None
        kind, self._sum, record = found
        if kind != _FACTS:
            self.fault = SpoolFault(PREAMBLE.size, f"the first record is of kind {kind}, expected {_FACTS}")
            return None
        self._start = self.end = PREAMBLE.size + RECORD.size + len(record.view)
        return self._struct(record, SpoolFacts, PREAMBLE.size)

    def _record(self, at: int, total: int, *, check: bool) -> tuple[int, int, SpoolRecord] | None:
        """Kind, sum and content of the record at `at`; None, and the fault is noted, when it is not sound."""
        left = len(self._data) - at - RECORD.size
        if left < 0:
            self.fault = SpoolFault(at, f"the file ends after {left + RECORD.size} bytes of a record's head")
            return None
        stated, length, kind, zero, messages, received = RECORD.unpack_from(self._data, at)
        if length > RECORD_BYTES or zero or kind not in (_FACTS, _DATA, _CLOSING):
            self.fault = SpoolFault(at, "what stands here is no record")
            return None
        start = at + RECORD.size
        if left < length:
            self.fault = SpoolFault(at, f"the file ends after {left} of {length} bytes of a record")
            return None
        view = self._data[start : start + length].toreadonly()
        if check:
            total = crc32c(view, crc32c(self._data[at + _SIZE_OF_SUM : start], total))
            if total != stated:
                self.fault = SpoolFault(at, "the checksum of a record is wrong")
                return None
        return kind, stated, SpoolRecord(view, messages, received)

    def _struct(self, record: SpoolRecord, kind: type[S], at: int) -> S | None:
        try:
            return msgspec.json.decode(record.view, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self.fault = SpoolFault(at, f"{kind.__name__} cannot be read: {error}")
            return None


def open_spool(path: Path) -> SpoolReader:
    """The file at `path`, mapped into memory as long as it is now. Raises OSError when it cannot be opened."""
    with path.open("rb") as file:
        empty = not file.seek(0, 2)
        return SpoolReader(b"" if empty else mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
