"""The engine's process: takes sessions from the bus, runs each in a thread of its own, and sends back what they make.

Started by `scanside serve`; run by hand, `python -m scanside.adapters.worker --help` joins the bus of a running server.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast, get_args

import numpy as np
import structlog
import torch
import zmq
from scanside.engine.config import ConfigStore, Value, with_overrides
from scanside.engine.errors import EngineError, PeerError, ScansideError
from scanside.engine.messages import EndOfScan, Event, Message, PhotoacousticFrame, PhotoacousticHeader
from scanside.engine.simulation.scan import simulate_scan
from scanside.engine.streaming.photoacoustic import PhotoacousticSession
from scanside.engine.streaming.session import Session

from .arena import ArenaView
from .bus import WorkerPort
from .envelope import Adjust, Data, End, Envelope, Failed, Open, Reason
from .files.noise import NoiseFiles
from .logs import configure_logging
from .mrd_framing import Frame, Framer
from .mrd_lengths import MessageId
from .photoacoustic_scan import PhotoacousticScan
from .process import require_environment, settle_collector, tune_process
from .scan import Reply, Scan, scan_for

__all__ = ["Worker", "main", "warm_up"]

_log = structlog.get_logger("worker")

CREDIT = {"mrd": 16 << 20, "pat": 8 << 20}
"""Bytes that a session may have under way, by adapter: two full messages of the gateway; a device's frames would only get old."""
POLL_SECONDS = 1.0
"""How long a worker may take to notice that its parent is gone."""

_Item = tuple[Envelope, list[memoryview]]
_AnyScan = Scan | PhotoacousticScan


class _Runner(threading.Thread):
    """One session: decodes and reconstructs in the order of arrival, and returns credit for what it has used."""

    def __init__(self, worker: Worker, request: Open, scan: _AnyScan) -> None:
        super().__init__(name=f"session-{request.session[:8]}", daemon=True)
        self._worker, self._session, self._scan = worker, request.session, scan
        self._framer = Framer(worker.limits)
        self.inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self.stopped = False

    def run(self) -> None:
        """Work until the session ends. Whatever goes wrong costs this session only."""
        try:
            while self._step(*self.inbox.get()):
                pass
        except ScansideError as error:
            self._fail(error.reason, str(error))
        except Exception as error:  # noqa: BLE001 - a defect of ours must not take the other sessions with it
            _log.exception("session crashed")
            self._fail("engine", f"internal error: {type(error).__name__}: {error}")
        finally:
            if isinstance(self._scan, PhotoacousticScan):
                self._scan.close()
            self._worker.forget(self._session)
            del self._scan, self._framer
            gc.collect()  # a scan's buffers hang in a cycle, and the collector hardly ever runs by itself here

    def _step(self, envelope: Envelope, payload: list[memoryview]) -> bool:
        if isinstance(envelope, Data):
            received = envelope.received / 1e9 or time.monotonic()
            self._take(envelope, payload or self._worker.shared(envelope), received)
            if not self.stopped:
                self._worker.port.grant_credit(envelope)
            return not self.stopped
        if isinstance(envelope, Adjust):
            if isinstance(self._scan, PhotoacousticScan):
                self._send(self._scan.adjust(envelope.parameters), time.monotonic_ns())
            return not self.stopped
        if isinstance(envelope, End):
            self._framer.finish()
            self._send(self._scan.end(complete=envelope.complete), time.monotonic_ns())
            if not self.stopped:
                self._worker.port.end(self._session)
        return False

    def _take(self, data: Data, payload: list[memoryview], received: float) -> None:
        if isinstance(self._scan, PhotoacousticScan):
            self._send(self._scan.take(payload, received), data.received)
            return
        for part in payload:
            frames = [_kept(frame) if data.shared else frame for frame in self._framer.feed(part)]
            self._send(self._scan.take(frames, received), data.received)

    def _send(self, replies: Iterator[Reply], received: int) -> None:
        port = self._worker.port
        for reply in replies:
            if self.stopped:
                return
            if reply.failed:
                self._fail(reply.failed, reply.text)
            elif reply.stats is not None:
                port.send_stats(self._session, reply.stats)
            elif reply.note is not None:
                port.send_note(self._session, reply.note.level, reply.note.text)
            elif reply.missing is not None:
                port.ask_again(self._session, reply.missing.first, reply.missing.last)
            else:
                port.send_result(
                    self._session, reply.buffers, series=reply.series, image=reply.image, received=received
                )

    def _fail(self, reason: str, text: str) -> None:
        self.stopped = True
        known = cast("Reason", reason if reason in get_args(Reason) else "error")
        self._worker.port.fail(self._session, known, text)


class Worker:
    """Serves sessions of the bus at `endpoint` until `stop` or until its parent process is gone.

    `threads`: processor threads of iterative reconstructions; `record`: folder for recordings of photoacoustic streams; `arena`:
    where payload of the server's own gateway lies.
    """

    def __init__(
        self,
        endpoint: str,
        store: ConfigStore,
        *,
        name: str,
        identity: bytes | None = None,
        threads: int = 1,
        record: Path | None = None,
        noise: Path | None = None,
        arena: ArenaView | None = None,
    ) -> None:
        self.store = store
        self._record = record
        self.threads = threads
        self.limits = store.get("default").limits
        self.noise = NoiseFiles(noise)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._arena = arena
        self.port = WorkerPort(
            endpoint,
            name=name,
            device="cpu",
            capacity=self.limits.sessions,
            identity=identity,
            context=self._context,
            limits=self.limits,
        )
        self._runners: dict[str, _Runner] = {}
        self._lock = threading.Lock()
        self._stopping = False

    def run(self, parent: int | None = None) -> None:
        """Take sessions; with `parent`, end when that process is no longer ours."""
        while not self._stopping and (parent is None or os.getppid() == parent):
            for envelope, payload in self.port.poll(POLL_SECONDS):
                self._dispatch(envelope, payload)
        self.port.close()
        self._context.term()

    def shared(self, data: Data) -> list[memoryview]:
        """Payload that was left in the arena. Raises `PeerError` when it cannot be there."""
        if self._arena is None:
            raise PeerError("payload was left in an arena that this worker does not have")
        return [self._arena.view(span) for span in data.shared]

    def stop(self) -> None:
        """End `run` soon; a signal handler may call this."""
        self._stopping = True
        with contextlib.suppress(EngineError):  # its port is closed, so `run` is over
            self.port.wake()

    def forget(self, session: str) -> None:
        """Drop a session that is over."""
        with self._lock:
            self._runners.pop(session, None)

    def _dispatch(self, envelope: Envelope, payload: list[memoryview]) -> None:
        if isinstance(envelope, Open):
            self._open(envelope)
            return
        with self._lock:
            runner = self._runners.get(envelope.session)
        if runner is None:
            return
        if isinstance(envelope, Failed):
            runner.stopped = True
        runner.inbox.put((envelope, payload))

    def _open(self, request: Open) -> None:
        try:
            scan = self._scan(request)
        except (ScansideError, ValueError) as error:
            self.port.refuse(request.session, "config", str(error))
            return
        runner = _Runner(self, request, scan)
        with self._lock:
            self._runners[request.session] = runner
        self.port.accept(request.session, credit=CREDIT[request.adapter], shared=self._arena is not None)
        runner.start()

    def _scan(self, request: Open) -> _AnyScan:
        if request.adapter == "pat":
            values: dict[str, Value] = dict(request.parameters)
            config = with_overrides(self.store.get(request.config), values, source="parameters of the session")
            return PhotoacousticScan(config, threads=self.threads, record=self._record)
        return scan_for(
            self.store, request.config, request.parameters, request.dialect, self.noise, threads=self.threads
        )


def _kept(frame: Frame) -> Frame:
    """The frame on memory of its own if it may be passed on: that of the arena is used again once its credit is given back."""
    if frame.id == MessageId.ACQUISITION:
        return frame
    return Frame(frame.id, memoryview(bytes(frame.view)), frame.count, frame.offset)


def warm_up(store: ConfigStore) -> int:
    """Run small scans through the default configuration, so that the first real one finds everything loaded.

    Returns the number of events that they caused.
    """
    events: list[Event] = []
    for matrix, acceleration in ((256, 1), (64, 2)):
        session = Session(store.get("default"))
        scan = simulate_scan(matrix, 8, acceleration, repetitions=1)
        messages: list[Message] = [scan.header, *scan.readouts(1 if acceleration > 1 else 64), EndOfScan()]
        for message in messages:
            events += session.feed(message)
    return len(events) + _warm_up_photoacoustics(store)


def _warm_up_photoacoustics(store: ConfigStore) -> int:
    angles, shape = np.linspace(0, 2 * np.pi, 8, endpoint=False), (8, 64)
    header = PhotoacousticHeader(
        stream="0" * 32,
        elements=shape[0],
        samples=shape[1],
        positions_m=0.02 * np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1),
        sampling_rate_hz=4e7,
        wavelengths_m=(8e-7,),
    )
    session = PhotoacousticSession(store.get("pat/das"))
    frame = PhotoacousticFrame(seq=0, shot=0, samples=np.arange(512, dtype=np.int16).reshape(shape))
    return sum(len(list(session.feed(message))) for message in (header, frame, EndOfScan()))


def main() -> None:
    """Run a worker from the command line."""
    parser = argparse.ArgumentParser(prog="python -m scanside.adapters.worker", description=__doc__)
    parser.add_argument("--connect", required=True, metavar="ENDPOINT", help="bus of the server, as it prints it")
    parser.add_argument("--name", default="worker", help="name of this worker, for people")
    parser.add_argument("--identity", default="", help="identity on the bus, set by the server")
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="processor threads of iterative reconstructions; 0: as many as there are cores",
    )
    parser.add_argument(
        "--configs", action="append", default=[], type=Path, metavar="DIR", help="folder of configurations"
    )
    parser.add_argument("--record", type=Path, metavar="DIR", help="record photoacoustic streams into this folder")
    parser.add_argument("--noise", type=Path, metavar="DIR", help="share noise measurements through this folder")
    parser.add_argument("--parent", type=int, help="end when the process with this number is not our parent any more")
    parser.add_argument("--arena", type=int, help="inherited descriptor of the server's memory for payload")
    arguments = parser.parse_args()
    require_environment("scanside.adapters.worker", sys.argv[1:])  # `serve` has set it; a person rarely has
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the server decides when we stop
    torch.set_num_threads(1)  # a readout is too little work to share; iterative solvers get more
    tune_process()
    configure_logging()
    store = ConfigStore(arguments.configs)
    warm_up(store)
    settle_collector()  # hardly a pause while a scan runs
    worker = Worker(
        arguments.connect,
        store,
        name=arguments.name,
        identity=arguments.identity.encode() or None,
        record=arguments.record,
        noise=arguments.noise,
        threads=arguments.threads or max(1, len(os.sched_getaffinity(0))),
        arena=None if arguments.arena is None else ArenaView(arguments.arena),
    )
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    worker.run(arguments.parent)


if __name__ == "__main__":
    main()
