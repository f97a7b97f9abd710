"""`scanside serve`: broker, gateway and metrics in one process, the engine's workers in processes of their own.

Workers get the thread settings that their speed rests on through their environment, since those are read when a process
starts. One that dies is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import msgspec
import structlog
from scanside.engine.config import ConfigStore
from scanside.engine.errors import ConfigError, DeviceLost

from .arena import Arena
from .bus import AsyncPort, Broker, BrokerTimes, check_bind
from .envelope import Envelope
from .files.noise import NOISE_FOLDER
from .gadgetron import ConnectionOptions, Gateway
from .metrics import Metrics, MetricsServer
from .photoacoustic_metrics import StreamWatch
from .process import ENVIRONMENT, tune_process
from .queries import answer_query
from .sockets import Outbox
from .spooling import Spool, SpoolOptions, default_folder

__all__ = ["ServeOptions", "Server"]

T = TypeVar("T")
_log = structlog.get_logger("server")

START_SECONDS = 120.0
RESTART_SECONDS = 1.0
"""Between the end of a worker that had hardly started and its successor, so that a defect does not keep a core busy."""
YOUNG_SECONDS = 30.0
HUNG_SECONDS = 1.0
"""Between two looks for workers that do not answer any more."""
HEARTBEAT_SECONDS = 0.5
OWN_END, CUT_OFF = 0.6, 0.15
"""Shares of the drain time: for sessions to end by themselves, and for the images of those that are cut off."""
CLOSE_SECONDS = 10.0


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a server; times in s."""

    host: str = "127.0.0.1"
    port: int = 9002
    """For scanners; 0 takes any free one."""
    default_config: str | None = None
    """Configuration for names that are not installed; without it they are refused."""
    dialect: Literal["auto", "gadgetron", "fire"] = "auto"
    failure: Literal["close", "abort"] = "close"
    config_folders: tuple[Path, ...] = ()
    workers: int = 1
    threads: int = 0
    """Processor threads of each worker; 0: as many as there are cores."""
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = 9091
    """For Prometheus and health checks; 0 takes any free one, None switches them off."""
    bus: str | None = None
    """ZeroMQ endpoint for producers outside this process, such as tcp://127.0.0.1:9003."""
    record: Path | None = None
    """Folder into which photoacoustic streams are recorded."""
    spool: Path | None = None
    """Folder in which scans are kept until their images are out; None switches it off."""
    spool_bytes: int = 20_000_000_000
    """All spool files together."""
    keep_raw: bool = False
    """Keep the spool files of scans that ended well too, the newest as far as `spool_bytes` goes."""
    insecure: bool = False
    """Allow binds that other hosts can reach."""
    handshake_seconds: float = 10.0
    worker_seconds: float = 20.0
    """A worker that does not answer for so long is killed and replaced."""
    idle_seconds: float = 0.0
    drain_seconds: float = 5.0


class Server:
    """A running server; `with Server(options) as server:` starts and stops it.

    Raises `ConfigError` for settings that cannot work, among them ports that are taken and binds that are not allowed.
    """

    def __init__(self, options: ServeOptions | None = None) -> None:
        self.options = options or ServeOptions()
        self.store = ConfigStore(self.options.config_folders)
        if self.options.default_config is not None:
            self.store.get(self.options.default_config)
        if not 1 <= self.options.workers <= 64:
            raise ConfigError(f"workers is {self.options.workers}; 1 to 64 are possible")
        self.metrics = Metrics()
        self.port = self.options.port
        self.metrics_port = self.options.metrics_port
        self._arena: Arena | None = None
        self._broker: Broker | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._gateway: Gateway | None = None
        self._port: AsyncPort | None = None
        self._http: MetricsServer | None = None
        self._thread: threading.Thread | None = None
        self._crew: _Crew | None = None
        self._spool: Spool | None = None
        self._beat = time.monotonic()
        self._draining = False
        self._counted: dict[str, int] = {}

    def start(self) -> None:
        """Listen and start the workers; returns when a scan can be taken."""
        options = self.options
        check_bind(f"tcp://{options.host}:{options.port}", insecure=options.insecure)
        tune_process()
        try:
            self._start_spool()
            self._start_broker()
            self._start_gateway()
            self._start_metrics()
            noise = None if self._spool is None else self._spool.options.folder / NOISE_FOLDER
            self._crew = _Crew(self._require(self._broker), self._require(self._arena), options, noise)
            self._crew.start()
            self._crew.wait_ready(START_SECONDS)
        except BaseException:
            self.stop()
            raise
        _log.info(
            "ready",
            host=options.host,
            port=self.port,
            metrics_port=self.metrics_port,
            workers=options.workers,
            bus=self.bus,
        )

    def stop(self) -> None:
        """Stop listening, let sessions end, end the workers, give everything back; takes `drain_seconds` at most.

        Sessions still open after most of that time are cut off: their peers get the images of what had arrived, and are told.
        """
        self._draining = True
        if self._crew is not None:
            self._crew.expect_end()
        with contextlib.ExitStack() as ending:  # the last one first, and each whatever became of the others
            if self._arena is not None:
                ending.callback(self._arena.close)
            for part in (self._broker, self._crew, self._spool, self._http):
                if part is not None:
                    ending.callback(part.stop)
            ending.callback(self._stop_gateway)
            self._broker = self._crew = self._http = self._arena = self._spool = None

    def _stop_gateway(self) -> None:
        if self._loop is None or self._thread is None or not self._thread.is_alive():
            return
        try:
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(
                self.options.drain_seconds + CLOSE_SECONDS
            )
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Serve until SIGINT or SIGTERM."""
        ours, theirs = socket.socketpair()  # the interpreter writes to it, whatever it is doing when a signal comes
        with ours, theirs:
            theirs.settimeout(0)
            before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda _number, _frame: None)
            ours.recv(1)
            signal.set_wakeup_fd(before)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def bus(self) -> str | None:
        """Endpoint at which producers outside this process find the bus, with the port that it got; None without one."""
        bound = () if self._broker is None else self._broker.bound
        return bound[0] if bound else None

    def ready(self) -> tuple[bool, dict[str, bool]]:
        """Whether a scan can be taken, with the single checks."""
        broker, crew = self._broker, self._crew
        checks = {
            "worker": broker is not None and bool(broker.status().workers),
            "gateway": self._gateway is not None and self.live(),
            "accepting": not self._draining and crew is not None,
        }
        if self._spool is not None:
            spool = self._spool.status()
            checks["spool"] = not spool.trouble and not spool.behind
        return all(checks.values()), checks

    def live(self) -> bool:
        """Whether the loop that reads the sockets still turns."""
        return time.monotonic() - self._beat < 2.0

    @staticmethod
    def _require(part: T | None) -> T:
        if part is None:
            raise ConfigError("the server has not been started")
        return part

    def _start_spool(self) -> None:
        options = self.options
        if options.spool is None:
            return
        spool = Spool(
            SpoolOptions(folder=options.spool, limit=options.spool_bytes, keep_raw=options.keep_raw),
            self.metrics.spool_lost,
        )
        asked = options.spool != default_folder()
        try:
            spool.start()
        except ConfigError as error:
            if asked:
                raise
            _log.warning("no spool", error=str(error))
            return
        trouble = spool.status().trouble
        if trouble and not asked:  # nobody who has never heard of a spool should lose scans to it
            _log.warning("no spool", error=trouble)
            spool.stop()
            return
        self._spool = spool
        self.metrics.watch_spool(lambda: spool.status().used, lambda: spool.status().free)
        self.metrics.watch_queue("spool", lambda: len(spool))

    def _start_broker(self) -> None:
        binds = (self.options.bus,) if self.options.bus else ()
        times = BrokerTimes(expiry=self.options.worker_seconds, first_worker=START_SECONDS)
        limits = self.store.get("default").limits
        broker = Broker(binds=binds, insecure=self.options.insecure, limits=limits, times=times)
        broker.observe(StreamWatch(self.metrics))
        broker.start()
        self._broker, self._arena = broker, Arena()
        self.metrics.watch_queue("bus", lambda: broker.status().waiting)

    def _start_gateway(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._turn, name="gateway", daemon=True)
        self._thread.start()
        try:
            self.port = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {self.options.host}:{self.options.port}: {error.strerror}; is another server running?"
            ) from None

    def _turn(self) -> None:
        loop = self._loop
        if loop is not None:
            asyncio.set_event_loop(loop)
            loop.run_forever()
            loop.close()

    async def _open(self) -> int:
        options = self.options
        connections = ConnectionOptions(
            dialect=options.dialect,
            default_config=options.default_config,
            failure=options.failure,
            handshake_seconds=options.handshake_seconds,
            idle_seconds=options.idle_seconds,
            drain_seconds=options.drain_seconds,
        )
        limits = self.store.get("default").limits
        broker = self._require(self._broker)
        self._port = AsyncPort(broker.context, self._from_bus, limits=limits, arena=self._arena, identity=broker.lender)
        self._gateway = Gateway(
            self.store, self._port, self.metrics, self._answer, options=connections, limits=limits, spool=self._spool
        )
        self._heartbeat()
        return await self._gateway.start(options.host, options.port)

    def _from_bus(self, envelope: Envelope, payload: list[memoryview]) -> None:
        if self._gateway is not None:
            self._gateway.deliver(envelope, payload)

    def _heartbeat(self) -> None:
        self._beat = time.monotonic()
        self._count_malformed()
        if self._loop is not None:
            self._loop.call_later(HEARTBEAT_SECONDS, self._heartbeat)

    def _count_malformed(self) -> None:
        """Carry what the bus refused over to the metrics."""
        if self._broker is None:
            return
        counts = self._broker.status().counts
        for name, count in counts.items():
            kind, _, reason = name.partition(".")
            for _ in range(count - self._counted.get(name, 0) if kind == "malformed" else 0):
                self.metrics.message_rejected(reason)
        self._counted = counts

    async def _close(self) -> None:
        if self._gateway is not None:
            await self._gateway.stop(self.options.drain_seconds * OWN_END, self.options.drain_seconds * CUT_OFF)
        if self._port is not None:
            self._port.close()

    def _start_metrics(self) -> None:
        options = self.options
        if options.metrics_port is None:
            return
        self._http = MetricsServer(
            self.metrics,
            options.metrics_host,
            options.metrics_port,
            self.ready,
            self.live,
            insecure=options.insecure,
        )
        self._http.start()
        self.metrics_port = self._http.port

    def _answer(self, question: str) -> str:
        status = self._require(self._broker).status()
        return answer_query(question, self.store, ready=self.ready()[0], sessions=status.sessions)


class _Process(NamedTuple):
    """A worker's process, when it was started, and a descriptor that becomes readable when it ends."""

    process: subprocess.Popen[bytes]
    since: float
    fd: int


class _Crew:
    """The worker processes of a server: started, watched, replaced when they die or hang, ended with it."""

    def __init__(self, broker: Broker, arena: Arena, options: ServeOptions, noise: Path | None) -> None:
        self._broker, self._arena, self._options, self._noise = broker, arena, options, noise
        self._joined: set[bytes] = set()
        self._processes: dict[bytes, _Process] = {}
        self._ending = threading.Event()
        self._wake: Outbox[None] = Outbox()
        self._watcher = threading.Thread(target=self._watch, name="workers", daemon=True)

    def start(self) -> None:
        """Start all workers and the thread that watches them."""
        for _ in range(self._options.workers):
            self._hire()
        self._watcher.start()

    def wait_ready(self, seconds: float) -> None:
        """Wait until a worker has joined the bus. Raises `DeviceLost` when none does."""
        deadline = time.monotonic() + seconds
        while not self._broker.status().workers:
            if time.monotonic() > deadline:
                raise DeviceLost(f"no worker was ready within {seconds:g} s; `scanside doctor` shows what is missing")
            time.sleep(0.02)

    def expect_end(self) -> None:
        """From now on a worker that ends is not replaced."""
        self._ending.set()
        self._wake.wake()

    def stop(self) -> None:
        """End all workers: politely first."""
        self.expect_end()
        if self._watcher.is_alive():
            self._watcher.join()
        for process, _, _ in self._processes.values():
            process.terminate()
        for process, _, fd in self._processes.values():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(fd)
        self._processes.clear()
        self._wake.close()

    def _hire(self) -> None:
        identity = b"worker-" + uuid.uuid4().hex.encode()
        command = [sys.executable, "-m", "scanside.adapters.worker", "--connect", self._broker.endpoint]
        command += [
            "--identity",
            identity.decode(),
            "--threads",
            str(self._options.threads),
            "--parent",
            str(os.getpid()),
            "--arena",
            str(self._arena.fd),
        ]
        if self._options.record is not None:
            command += ["--record", str(self._options.record)]
        if self._noise is not None:
            command += ["--noise", str(self._noise)]
        for folder in self._options.config_folders:
            command += ["--configs", str(folder)]
        environment = {**ENVIRONMENT, **os.environ}
        process = subprocess.Popen(command, env=environment, pass_fds=(self._arena.fd,))  # noqa: S603 - our own interpreter
        self._processes[identity] = _Process(process, time.monotonic(), os.pidfd_open(process.pid))

    def _watch(self) -> None:
        while not self._ending.is_set():
            self._pause()
            self._end_hung()
            for identity, (process, since, fd) in list(self._processes.items()):
                if process.poll() is None:
                    continue
                del self._processes[identity]
                os.close(fd)
                _log.error("worker ended", code=process.returncode)
                self._broker.worker_lost(identity)
                young = time.monotonic() - since < YOUNG_SECONDS
                if not self._ending.wait(RESTART_SECONDS if young else 0):
                    self._hire()

    def _pause(self) -> None:
        """Until a worker ends or the server does, or for as long as one that hangs may have."""
        poller = select.poll()
        for fd in (self._wake.fd, *(process.fd for process in self._processes.values())):
            poller.register(fd, select.POLLIN)
        poller.poll(1e3 * HUNG_SECONDS)

    def _end_hung(self) -> None:
        """Kill the workers that the broker has given up because they did not answer; they are replaced like those that died."""
        answering = {worker.identity for worker in self._broker.status().workers}
        for identity in self._joined - answering:
            known = self._processes.get(identity)
            process = None if known is None else known.process
            if process is not None and process.poll() is None:
                _log.error("worker hangs", pid=process.pid, seconds=self._options.worker_seconds)
                process.kill()
        self._joined = answering
