"""What the acceptance checks are made of: the list of results, a watched server, and clients that are not ours."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import ismrmrd
import numpy as np
from ismrmrd.serialization import ConfigFile, ConfigText, ProtocolDeserializer, ProtocolSerializer
from scanside.adapters import mrd
from scanside.adapters.local_server import LocalServer
from scanside.adapters.mrd_framing import Framer

__all__ = [
    "Answer", "Checks", "Exchange", "Scan", "WatchedServer", "chunks", "exchange", "probe", "read_scan", "reset",
]  # fmt: skip

SECONDS = 60.0
"""Longest wait for anything."""


@dataclasses.dataclass
class Checks:
    """Results so far; every one is printed as it comes."""

    rows: list[tuple[str, str, str, str]] = dataclasses.field(default_factory=list)
    """Part, check, PASS, FAIL, SKIP or NOTE, and the figure."""

    def add(self, group: str, name: str, passed: bool | None, figure: str) -> None:  # noqa: FBT001
        """Note a result; None for a check that could not be made."""
        self._add(group, name, "SKIP" if passed is None else "PASS" if passed else "FAIL", figure)

    def note(self, group: str, name: str, figure: str) -> None:
        """Note a figure that is not judged."""
        self._add(group, name, "NOTE", figure)

    def _add(self, group: str, name: str, word: str, figure: str) -> None:
        self.rows.append((group, name, word, figure))
        print(f"{word}  {group}: {name}: {figure}", flush=True)

    def count(self, word: str) -> int:
        """How many ended so."""
        return sum(row[2] == word for row in self.rows)


# --- the server ------------------------------------------------------------------------------------------------------------


class WatchedServer(LocalServer):
    """A server whose log, memory, processor time and counters can be asked for."""

    def __init__(self, *words: str) -> None:
        super().__init__(words, on_line=self._note)
        self._lines: list[tuple[float, str]] = []
        self.port = 0

    def _note(self, line: str) -> None:
        self._lines.append((time.monotonic(), line))

    def mark(self) -> int:
        """Where the log stands; for `complaints`."""
        return len(self._lines)

    def complaints(self, since: int) -> list[tuple[float, str]]:
        """Warnings and errors, and whatever is no log record, since `mark`, with their times."""
        found = []
        for at, line in self._lines[since:]:
            try:
                quiet = json.loads(line).get("level") in ("info", "debug")
            except ValueError:
                quiet = False
            if not quiet:
                found.append((at, line))
        return found

    def processes(self) -> list[int]:
        """The server and all its descendants."""
        parents: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # ended meanwhile
                continue
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
        found = [self.pid]
        for pid in found:
            found += parents.get(pid, [])
        return found

    def _status(self, field: str) -> int:
        """Sum of a field of /proc/PID/status over all processes, bytes."""
        total = 0
        for pid in self.processes():
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith(f"{field}:"):
                    total += 1024 * int(line.split()[1])
        return total

    def resident(self) -> int:
        """Resident memory of the server and its workers, bytes."""
        return self._status("VmRSS")

    def peak(self, *, restart: bool = False) -> int:
        """Sum of the peaks of resident memory, bytes; `restart` lets them begin at what is resident now."""
        if restart:
            for pid in self.processes():
                Path(f"/proc/{pid}/clear_refs").write_text("5")
        return self._status("VmHWM")

    def processor_seconds(self) -> float:
        """Processor time of all processes so far."""
        ticks = 0
        for pid in self.processes():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def mapped(self) -> set[str]:
        """Files that are mapped into any of the processes."""
        return {
            parts[-1]
            for pid in self.processes()
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
            if len(parts := line.split(maxsplit=5)) == 6 and parts[-1].startswith("/")
        }

    def metric(self, name: str) -> float:
        """Sum of the series of a metric whose name begins so."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def settle(self, sessions: int = 0) -> bool:
        """Wait until at most so many sessions are open."""
        deadline = time.monotonic() + 15
        while self.metric("scanside_sessions_active") > sessions:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


# --- PyPI ismrmrd as a client ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Scan:
    """A scan as the ismrmrd package reads it."""

    xml: bytes
    acquisitions: list[ismrmrd.Acquisition]

    def wire(self, config: str = "default") -> list[bytes]:
        """The messages of a session, as the ismrmrd package writes them."""
        sink = _Pieces()
        serializer = ProtocolSerializer(sink)
        items = [ConfigFile(config), ismrmrd.xsd.CreateFromDocument(self.xml), *self.acquisitions]
        messages = []
        for item in items:
            serializer.serialize(item)
            messages.append(sink.take())
        serializer.close()
        return [*messages, sink.take()]

    def header(self) -> ismrmrd.xsd.ismrmrdHeader:
        """The header as an object of its own."""
        return ismrmrd.xsd.CreateFromDocument(self.xml)

    def with_header(self, header: ismrmrd.xsd.ismrmrdHeader, acquisitions: Iterable[ismrmrd.Acquisition]) -> Scan:
        """Another scan of other readouts."""
        return Scan(ismrmrd.xsd.ToXML(header).encode(), list(acquisitions))


class _Pieces:
    """A stream that is written to memory."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        """Keep the bytes."""
        self._parts.append(bytes(data))
        return len(self._parts[-1])

    def flush(self) -> None:
        """Nothing waits."""

    def take(self) -> bytes:
        """All since the last call."""
        parts, self._parts = self._parts, []
        return b"".join(parts)


def read_scan(path: Path, most: int | None = None) -> Scan:
    """A file, by the ismrmrd package; `most`: of its readouts."""
    with ismrmrd.Dataset(str(path), "dataset", create_if_needed=False) as data:
        count = data.number_of_acquisitions()
        return Scan(
            bytes(data.read_xml_header()),
            [data.read_acquisition(number) for number in range(min(count, most or count))],
        )


@dataclasses.dataclass
class Exchange:
    """What a session gave, as the ismrmrd package understood it."""

    images: list[ismrmrd.Image]
    texts: list[str]
    seconds: float

    def pictures(self) -> list[np.ndarray]:
        """Magnitudes (y, x) of the images of the first series."""
        return [np.abs(np.asarray(i.data)[0, 0]).astype(np.float64) for i in self.images if i.image_series_index == 1]

    def meta(self, number: int = 0) -> ismrmrd.Meta:
        """Attributes of an image."""
        return ismrmrd.Meta.deserialize(self.images[number].attribute_string)


def exchange(port: int, config: str, scan: Scan) -> Exchange:
    """Send a scan with `ProtocolSerializer`, read what comes with `ProtocolDeserializer`."""
    images: list[ismrmrd.Image] = []
    texts: list[str] = []
    begun = time.monotonic()

    def receive() -> None:
        for item in ProtocolDeserializer(reader).deserialize():
            (images if isinstance(item, ismrmrd.Image) else texts).append(
                item if isinstance(item, ismrmrd.Image) else str(getattr(item, "text", item))
            )

    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as client:
        reader, writer = client.makefile("rb"), client.makefile("wb")
        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        serializer = ProtocolSerializer(writer)
        serializer.serialize(ConfigText(config) if config.startswith("<") else ConfigFile(config))
        serializer.serialize(scan.header())
        for acquisition in scan.acquisitions:
            serializer.serialize(acquisition)
        serializer.close()
        writer.flush()
        thread.join(SECONDS)
        if thread.is_alive():
            raise TimeoutError(f"no CLOSE within {SECONDS:g} s")
        reader.close()
        writer.close()
    return Exchange(images, texts, time.monotonic() - begun)


# --- bare sockets --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Answer:
    """What a server sent to a bare socket, until the end of the stream."""

    ids: list[int]
    texts: list[str]
    pixels: list[np.ndarray]
    metas: list[dict[str, list[str]]]
    seconds: float
    """From the last byte sent to the end of the stream."""

    @property
    def refused(self) -> bool:
        """Told in words and then CLOSE, and nothing else but images of what had come before."""
        return bool(self.texts) and self.ids[-2:] == [5, 4] and set(self.ids) <= {4, 5, 1022}


def probe(port: int, pieces: Iterable[bytes], *, half_close: bool = True, pause: float = 0.0) -> Answer:
    """Send pieces as they are, each in a segment of its own, and read to the end; what cannot be sent any more is left."""
    arrived = bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader = threading.Thread(target=_drain, args=(client, arrived), daemon=True)
        reader.start()
        try:
            for piece in pieces:
                client.sendall(piece)
                if pause:
                    time.sleep(pause)
            if half_close:
                client.shutdown(socket.SHUT_WR)
        except OSError:  # the server ended it; what it said is what counts
            pass
        begun = time.monotonic()
        reader.join(SECONDS)
        seconds = time.monotonic() - begun
    return _understood(bytes(arrived), seconds)


def _drain(client: socket.socket, arrived: bytearray) -> None:
    try:
        while data := client.recv(1 << 16):
            arrived.extend(data)
    except OSError:  # reset
        return


def _understood(data: bytes, seconds: float) -> Answer:
    frames = Framer().feed(data)
    images = [mrd.image(frame) for frame in frames if frame.id == 1022]
    return Answer(
        [frame.id for frame in frames],
        [mrd.text(frame) for frame in frames if frame.id == 5],
        [np.array(image.pixels) for image in images],
        [dict(image.meta) for image in images],
        seconds,
    )


def reset(port: int, pieces: Iterable[bytes]) -> None:
    """Send pieces, then vanish as a killed client does, by a reset."""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as client:
        for piece in pieces:
            client.sendall(piece)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    """The data in pieces of at most `size`."""
    return (data[start : start + size] for start in range(0, len(data), size))
