"""Acceptance: what a broken or malicious peer may send, what it is told, and what it costs, while a neighbor scans on."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
from acceptance_faults import BAIT, CLOSE, CONFIG, Faults, acquisition
from acceptance_neighbor import Neighbor
from acceptance_parts import Answer, Checks, WatchedServer, chunks, probe
from scanside.adapters import mrd
from scanside.adapters.files.ismrmrd import header_xml
from scanside.adapters.grammar import parse_parameters
from scanside.adapters.mrd_framing import Framer
from scanside.adapters.mrd_header import parse_header
from scanside.engine.errors import ScansideError
from scanside.engine.evaluation import nrmse
from scanside.engine.limits import DEFAULT_LIMITS
from scanside.engine.simulation.scan import simulate_scan

__all__ = ["Hostile"]

MIB = 1 << 20
HANDSHAKE_SECONDS, MESSAGE_SECONDS = 10, 30
"""Limits of the server as it is served."""
CONNECTIONS = 10_000


class Hostile:
    """The rows of faults and bad inputs; `run` makes them all. idle: limit that the server was started with, s."""

    def __init__(self, checks: Checks, server: WatchedServer, folder: Path, idle: float) -> None:
        self.checks, self.server, self.folder, self.idle = checks, server, folder, idle
        self.faults = Faults()

    BAIT_MARK: ClassVar[str] = "imported"

    @staticmethod
    def lay_bait(folder: Path) -> None:
        """A module that the server could import by a name from the wire, and that would tell of it."""
        mark = folder / Hostile.BAIT_MARK
        (folder / f"{BAIT}.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))

    def run(self) -> None:
        """All rows. The slow ones wait beside the others."""
        self.warm()
        self.idle_processor()
        with Neighbor(self.server.port) as beside:
            slow = [threading.Thread(target=part) for part in (self.slow_greeting, self.slow_message, self.silent)]
            for thread in slow:
                thread.start()
            for part in self._rows():
                part()
            for thread in slow:
                thread.join()
        lost = beside.lost
        self.add("neighbor", "loses no frame and hears of nothing", lost == 0 and not beside.texts,
                 f"{lost} of {beside.sent} frames lost, {len(beside.texts)} texts")  # fmt: skip
        self.connections()
        self.add("after all", "no session is left over", self.server.settle(), "scanside_sessions_active is 0")

    def _rows(self) -> list[Callable[[], None]]:
        return [
            self.truncated, self.splits, self.grammar, self.lengths, self.sizes, self.headers, self.odd_lines,
            self.documents, self.names, self.parameters,
        ]  # fmt: skip

    def add(self, row: str, name: str, passed: bool | None, figure: str) -> None:  # noqa: FBT001
        """Note a result."""
        self.checks.add(row, name, passed, figure)

    def warm(self) -> None:
        """Let everything that is allocated once be allocated, so that growth means growth."""
        for _ in range(5):
            probe(self.server.port, self.faults.whole())
        for _ in range(300):
            probe(self.server.port, [CLOSE])
        self.server.settle()

    # --- 1, 2: peers that go away or dawdle ---

    def idle_processor(self) -> None:
        """What a connection costs that stands still inside a message."""
        with socket.create_connection(("127.0.0.1", self.server.port)) as client:
            client.sendall(b"".join([*self.faults.opening(), acquisition()[:100]]))
            time.sleep(0.5)
            before, begun = self.server.processor_seconds(), time.monotonic()
            time.sleep(2.0)
            share = (self.server.processor_seconds() - before) / (time.monotonic() - begun)
        self.server.settle()
        self.add(
            "1 truncated", "a connection that stands still costs at most 1 % of a core", share <= 0.01, f"{share:.2%}"
        )

    def truncated(self) -> None:
        """The peer closes inside an id, a header, the data."""
        for name, rest in self.faults.truncated().items():
            mark, rejected = (
                self.server.mark(),
                self.server.metric('scanside_messages_rejected_total{reason="truncated"}'),
            )
            begun = time.monotonic()
            answer = probe(self.server.port, [b"".join([*self.faults.opening(), rest])])
            lines = self._complaints(mark)
            seen = 1e3 * (lines[0][0] - begun) if lines else float("inf")
            counted = self.server.metric('scanside_messages_rejected_total{reason="truncated"}') - rejected
            good = seen <= 100 and len(lines) == 1 and "truncated" in lines[0][1] and counted == 1 and 4 in answer.ids
            self.add("1 truncated", f"closed after {name}: detected within 100 ms, one log line", good,
                     f"{seen:.0f} ms, {len(lines)} lines, ids back {answer.ids}")  # fmt: skip

    def slow_greeting(self) -> None:
        """A byte a second before there is a session."""
        self._slow("2 slow loris", "in the greeting", [], CONFIG, HANDSHAKE_SECONDS)

    def slow_message(self) -> None:
        """A byte a second within a message."""
        self._slow("2 slow loris", "in a message", self.faults.opening(), acquisition(), MESSAGE_SECONDS)

    def silent(self) -> None:
        """Nothing at all after the header."""
        self._slow("2 slow loris", "silence after the header", self.faults.opening(), b"", self.idle)

    def _slow(self, row: str, name: str, opening: list[bytes], data: bytes, limit: float) -> None:
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=1.0) as client:
            client.sendall(b"".join(opening))
            begun, place, arrived = time.monotonic(), 0, b""
            while time.monotonic() - begun < limit + 10:
                try:
                    client.sendall(data[place : place + 1])
                    place += 1
                    got = client.recv(1 << 16)
                except TimeoutError:  # a second has passed
                    continue
                except OSError:  # reset
                    break
                if not got:
                    break
                arrived += got
            seconds = time.monotonic() - begun
        ids = [frame.id for frame in Framer().feed(arrived)]
        good = abs(seconds - limit) <= 1.0 and ids[-2:] == [5, 4]
        self.add(row, f"{name}: told and ended at the limit of {limit:g} s", good, f"{seconds:.1f} s, ids back {ids}")

    # --- 3, 4: how the bytes are cut ---

    def splits(self) -> None:
        """Every position, byte by byte, pairs, and the edges of 64 KiB."""
        small = simulate_scan(46, 1, 1, 0, noise_readouts=0)
        lines = [mrd.encode_acquisitions(line) for line in small.readouts(1)]
        messages = [CONFIG, mrd.encode_header(header_xml(small.header)), *lines, CLOSE]
        data = b"".join(messages)
        whole = probe(self.server.port, [data])
        want = whole.pixels[0]
        framed = _framed([data])
        wrong = sum(_framed([data[:cut], data[cut:]]) != framed for cut in range(1, len(data)))
        self.add("3 splits", f"all {len(data) - 1} splits of a stream of {len(messages)} messages", wrong == 0,
                 f"{wrong} differ after framing")  # fmt: skip
        ends = np.cumsum([len(message) for message in messages])[:-1]
        cuts = sorted({int(end) + by for end in ends for by in (-1, 0, 1)} | set(range(1, len(data), len(data) // 60)))
        ways: dict[str, list[list[bytes]]] = {
            "byte by byte": [[data[at : at + 1] for at in range(len(data))]],
            f"{len(cuts)} splits in two": [[data[:cut], data[cut:]] for cut in cuts],
            "two messages a segment": [[b"".join(messages[at : at + 2]) for at in range(0, len(messages), 2)]],
        }
        for name, sessions in ways.items():
            got = [probe(self.server.port, pieces).pixels for pieces in sessions]
            same = sum(len(pixels) == 1 and np.array_equal(pixels[0], want) for pixels in got)
            self.add("3, 4 splits", f"{name}: image the same to the bit", same == len(got), f"{same} of {len(got)}")
        session = b"".join(self.faults.whole())
        want = probe(self.server.port, [session]).pixels[0]
        sizes = (65_535, 65_536, 65_537)
        same = sum(np.array_equal(probe(self.server.port, chunks(session, size)).pixels[0], want) for size in sizes)
        self.add(
            "3, 4 splits", "pieces of 64 KiB and a byte less or more", same == len(sizes), f"{same} of {len(sizes)}"
        )

    # --- 5, 6: the grammar ---

    def grammar(self) -> None:
        """Ids that are none, and messages in the wrong place."""
        for name, (pieces, words) in self.faults.grammar().items():
            self._told("5 grammar", name, pieces, words.split(" .*"))

    def connections(self) -> None:
        """Ten thousand that come for nothing."""
        kinds = self.faults.short()
        for name, pieces in kinds.items():
            mark = self.server.mark()
            answer = probe(self.server.port, pieces)
            clean = {"CLOSE": [4], "dependency query": [1019, 4], "HTTP GET": [5, 4]}.get(name, answer.ids)
            lines, most = len(self._complaints(mark)), int(name == "HTTP GET")
            self.add("6 short", f"{name}: clean end", answer.ids == clean and lines <= most,
                     f"ids back {answer.ids}, {lines} log lines")  # fmt: skip
        for _ in range(CONNECTIONS // 40):
            for pieces in kinds.values():
                probe(self.server.port, pieces)
        self.server.settle()
        before, begun = self.server.resident(), time.monotonic()
        for _ in range(CONNECTIONS // len(kinds)):
            for pieces in kinds.values():
                probe(self.server.port, pieces)
        self.server.settle()
        grown, seconds = self.server.resident() - before, time.monotonic() - begun
        self.add("6 short", f"{CONNECTIONS} of them: resident memory grows by less than 1 MB", grown < MIB,
                 f"{grown / MIB:+.2f} MiB, {1e3 * seconds / CONNECTIONS:.2f} ms each")  # fmt: skip

    # --- 7, 8, 9, 11: sizes and documents ---

    def lengths(self) -> None:
        """Lengths that nothing has."""
        for name, (pieces, word) in self.faults.lengths().items():
            self._refused("7 lengths", name, pieces, [word])

    def sizes(self) -> None:
        """Sizes that nothing has."""
        for name, (pieces, word) in self.faults.sizes().items():
            self._refused("8 sizes", name, pieces, [word])

    def headers(self) -> None:
        """Encoding spaces that nothing has."""
        for name, (document, word) in self.faults.headers().items():
            self._document("9 headers", name, document, word)

    def documents(self) -> None:
        """XML that is an attack, or no XML."""
        with socket.create_server(("127.0.0.1", 0)) as trap:
            trap.settimeout(0.0)
            url = f"http://127.0.0.1:{trap.getsockname()[1]}/"
            for name, (document, says) in self.faults.documents(url).items():
                self._document("11 XML", name, document, says)
            try:
                trap.accept()[0].close()
                touched = True
            except BlockingIOError:
                touched = False
        self._refused("11 XML", "100 MB", [CONFIG, struct.pack("<HI", 3, 100_000_000), b"<ismrmrdHeader>"], ["limit"])
        lxml = [name for name in self.server.mapped() if "/lxml/" in name]
        self.add("11 XML", "nothing is fetched, lxml plays no part", not touched and not lxml,
                 f"connections to the external entity: {int(touched)}; lxml in the processes: {len(lxml)} files")  # fmt: skip

    def _document(self, row: str, name: str, document: bytes, says: str) -> None:
        """A header that must be refused, by the parser in 10 ms and by the server."""
        begun = time.perf_counter()
        try:
            parse_header(document, DEFAULT_LIMITS)
            told = ""
        except ScansideError as error:
            told = str(error)
        spent = 1e3 * (time.perf_counter() - begun)
        pieces = [CONFIG, mrd.encode_header(document), CLOSE]
        self._refused(row, name, pieces, [says], spent=spent, also=says in told and spent <= 10, room=2 * MIB)

    # --- 10: readouts that do not fit ---

    def odd_lines(self) -> None:
        """Readouts of other sizes or places, missing and double ones, ends that come twice or never."""
        for name, (pieces, kind, lost) in self.faults.odd_lines().items():
            answer = probe(self.server.port, pieces)
            meta = answer.metas[0] if answer.metas else {}
            error = nrmse(self._masked(lost), answer.pixels[0][0, 0], fit_scale=True) if answer.pixels else np.inf
            count = max(len(lost), 1)
            found = int(meta.get(f"scanside_{kind}_lines", ["-1"])[0]) if kind else count
            outcome = meta.get("scanside_outcome", ["none"])[0]
            flagged = outcome == ("incomplete" if lost else "complete")
            good = bool(answer.pixels) and found == count and flagged and error < 1e-4 and answer.ids[-1:] == [4]
            counted = f"{found} {kind}; " if kind else ""
            said = f"; {answer.texts[0][:100]}" if answer.texts else ""
            self.add("10 odd lines", name, good,
                     f"{counted}{outcome}, NRMSE to the same mask {error:.0e}, {len(answer.pixels)} images{said}")  # fmt: skip

    def _masked(self, lost: set[int]) -> np.ndarray:
        """Root sum of squares with some lines at zero, by numpy."""
        samples = np.concatenate([line.samples for line in self.faults.lines]).transpose(1, 0, 2).copy()
        samples[:, sorted(lost)] = 0
        images = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(samples, axes=(1, 2))), axes=(1, 2))
        start = (images.shape[2] - images.shape[1]) // 2
        return np.sqrt((np.abs(images[:, :, start : start + images.shape[1]]) ** 2).sum(0))

    # --- 12, 13: names and parameters ---

    def names(self) -> None:
        """Names of configurations that are something else."""
        before = self.server.mapped()
        for name, pieces in self.faults.names().items():
            self._told("12 names", name, pieces, ["mri/cartesian"])
        mapped = len({name for name in self.server.mapped() - before if name.endswith(".so")})
        imported = (self.folder / self.BAIT_MARK).exists()
        self.add("12 names", f"nothing is imported: {BAIT}.py lies in the server's path", not imported and not mapped,
                 f"imported: {imported}; new libraries in the processes: {mapped}")  # fmt: skip

    def parameters(self) -> None:
        """JSON that is no set of parameters; the scan goes on."""
        for name, (text, path) in self.faults.parameters().items():
            begun = time.perf_counter()
            with contextlib.suppress(ScansideError):  # what the server says of it is checked below
                parse_parameters(text)
            spent = 1e3 * (time.perf_counter() - begun)
            pieces = self.faults.whole()
            answer = probe(self.server.port, [*pieces[:2], mrd.encode_text(text), *pieces[2:]])
            told = " ".join(answer.texts)
            good = path in told and len(answer.pixels) == 1 and answer.ids[-1:] == [4] and spent <= 10
            self.add("13 parameters", f"{name}: told with its path within 10 ms, scan goes on", good,
                     f"{spent:.1f} ms, {len(answer.pixels)} image; {told[:110]}")  # fmt: skip

    # --- helpers ---

    def _complaints(self, mark: int) -> list[tuple[float, str]]:
        """Log lines of a fault just made: those that come within a moment; only the slow peers beside it time out."""
        time.sleep(0.05)
        return [line for line in self.server.complaints(mark) if '"timeout"' not in line[1]]

    def _told(self, row: str, name: str, pieces: list[bytes], words: list[str]) -> Answer:
        """A session that must be refused in words, with one log line at most."""
        mark = self.server.mark()
        answer = probe(self.server.port, pieces)
        lines, told = len(self._complaints(mark)), " ".join(answer.texts)
        self.add(row, name, answer.refused and all(word in told for word in words) and lines <= 1,
                 f"{lines} log line, {1e3 * answer.seconds:.0f} ms; {told[:110]}")  # fmt: skip
        return answer

    def _refused(
        self, row: str, name: str, pieces: list[bytes], words: list[str], *,
        spent: float | None = None, also: bool = True, room: int = MIB,
    ) -> None:  # fmt: skip
        """As `_told`, and no memory is taken for it: of the process alone and within what the server may hold."""
        if spent is None:
            spent = _framing_milliseconds(pieces)
            also = also and spent <= 1.0
        mark = self.server.mark()
        before = self.server.peak(restart=True)
        answer = probe(self.server.port, pieces)
        grown = self.server.peak() - before
        lines, told = len(self._complaints(mark)), " ".join(answer.texts)
        good = answer.refused and all(word in told for word in words) and lines <= 1 and grown < room and also
        self.add(row, name, good, f"{spent:.2f} ms, peak memory {grown / MIB:+.2f} MiB, {lines} log line; {told[:110]}")


def _framed(pieces: list[bytes]) -> list[tuple[int, int, bytes]]:
    """Messages of a stream: id, offset, bytes; runs taken apart."""
    framer = Framer(slab_bytes=1 << 16)
    return [
        (part.id, part.offset, bytes(part.view)) for piece in pieces for f in framer.feed(piece) for part in f.split()
    ]


def _framing_milliseconds(pieces: list[bytes]) -> float:
    """Shortest time to frame the last message, or to refuse it."""
    spent = []
    for _ in range(5):
        framer = Framer()
        for piece in pieces:
            begun = time.perf_counter()
            try:
                framer.feed(piece)
            except ScansideError:
                spent.append(1e3 * (time.perf_counter() - begun))
                break
    return min(spent, default=0.0)
