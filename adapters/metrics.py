"""Prometheus metrics, and the HTTP endpoints that tell of them and of the server's health.

The engine emits `FrameStats`; here they become counters and histograms. Every metric stands once in `FAMILIES`, from which the
registry is made and with which `docs/metrics.md` is compared. A label only ever holds a fixed word: no scan, patient or file.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import math
import re
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from email.message import Message
from functools import partial
from http import HTTPStatus
from importlib import metadata
from typing import Generic, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
from scanside.engine.errors import ConfigError, ScansideError
from scanside.engine.messages import FrameStats

from .sockets import check_bind

__all__ = [
    "FAMILIES",
    "OTHER",
    "WORDS_PER_LABEL",
    "Family",
    "Metrics",
    "MetricsServer",
    "buckets",
    "installed_versions",
]

OTHER = "other"
"""Label value in place of one that is not a fixed word, or of one too many."""
WORDS_PER_LABEL = 64
"""Different values that one label of one metric takes at most."""

_WORD = re.compile(r"[a-z0-9_/.-]{1,64}")
_REQUEST_BYTES = 8192
_CONNECTIONS = 16
_SECONDS_PER_REQUEST = 5.0
_log = structlog.get_logger("metrics")

M = TypeVar("M", Counter, Gauge, Histogram)


class Family(msgspec.Struct, frozen=True):
    """One metric: full name in the exposition, type, unit of its value, label names, and what it means."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    unit: str
    labels: tuple[str, ...]
    meaning: str


FAMILIES = (
    Family(
        "scanside_frame_latency_seconds",
        "histogram",
        "s",
        ("pipeline",),
        "From the last readout that a frame needed, read from the socket, to its image, handed to the socket",
    ),
    Family("scanside_stage_duration_seconds", "histogram", "s", ("stage",), "Time that one stage of a frame took"),
    Family(
        "scanside_frames_total", "counter", "frames", ("pipeline", "outcome"), "Frames that ended, by how they ended"
    ),
    Family(
        "scanside_messages_rejected_total",
        "counter",
        "messages",
        ("reason",),
        "Messages and connections refused, by reason",
    ),
    Family("scanside_bytes_received_total", "counter", "bytes", ("adapter",), "Bytes read from producers"),
    Family("scanside_acquisitions_received_total", "counter", "readouts", ("adapter",), "Readouts read from producers"),
    Family("scanside_images_delivered_total", "counter", "images", ("sink",), "Images handed to a receiver"),
    Family(
        "scanside_images_dropped_total", "counter", "images", ("sink", "reason"), "Images that no receiver was given"
    ),
    Family("scanside_sessions_active", "gauge", "sessions", (), "Sessions open now"),
    Family("scanside_sessions_total", "counter", "sessions", ("outcome",), "Sessions that ended, by how they ended"),
    Family("scanside_queue_depth", "gauge", "entries", ("queue",), "Entries that wait in a queue now"),
    Family(
        "scanside_sessions_replayed_total",
        "counter",
        "sessions",
        ("outcome",),
        "Sessions whose worker went away, by whether another one took them up",
    ),
    Family("scanside_spool_bytes", "gauge", "bytes", (), "Size of all spool files; 0 without a spool"),
    Family("scanside_spool_free_bytes", "gauge", "bytes", (), "Free space on the disk of the spool; 0 without a spool"),
    Family(
        "scanside_spool_lost_total",
        "counter",
        "sessions",
        ("reason",),
        "Sessions that went on without their spool file: raise an alarm",
    ),
    Family(
        "scanside_engine_last_frame_timestamp_seconds",
        "gauge",
        "s since 1970",
        (),
        "When the last frame ended, whatever its outcome; 0 before the first",
    ),
    Family(
        "scanside_build_info",
        "gauge",
        "1",
        ("version", "torch", "tensorrt", "cuda"),
        "Always 1; the labels are the installed versions, none where a package is absent",
    ),
)
"""Every metric there is."""
_BY_NAME = {family.name: family for family in FAMILIES}


def buckets(deadlines: Sequence[float]) -> list[float]:
    """Bucket edges in s: the 1-2-5 series from 100 µs to 10 s, and every promised deadline exactly.

    A promise that is not an edge could not be verified. Raises `ConfigError` for a deadline that is not above 0 and finite.
    """
    for deadline in deadlines:
        if not 0 < deadline < math.inf:
            raise ConfigError(f"deadline {deadline} s is not above 0 and finite; give deadlines in seconds, e.g. 0.04")
    series = [float(f"{digit}e{power}") for power in range(-4, 1) for digit in (1, 2, 5)]
    return sorted({*series, 10.0, *map(float, deadlines)})


def installed_versions() -> dict[str, str]:
    """Versions for `scanside_build_info`: scanside, torch, TensorRT and the CUDA runtime that came with torch.

    Read from the metadata of the installed packages, so that nothing heavy is imported; `none` where there is no such package.
    """
    packages = {
        "version": ("scanside",),
        "torch": ("torch",),
        "tensorrt": ("tensorrt", "tensorrt_cu13", "tensorrt_cu12"),
        "cuda": ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12"),
    }
    return {label: _version(names) for label, names in packages.items()}


def _version(names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "none"


class _Children(Generic[M]):
    """One metric with the children that its label values lead to, each looked up in prometheus_client once."""

    def __init__(self, metric: M, family: Family) -> None:
        self._metric: M = metric
        self._name = family.name
        self._known: dict[tuple[str, ...], M] = {}
        self._words: list[set[str]] = [set() for _ in family.labels]

    def at(self, *values: str) -> M:
        """The child of these label values."""
        child = self._known.get(values)
        return self._add(values) if child is None else child

    def _add(self, values: tuple[str, ...]) -> M:
        words = tuple(map(self._fixed, self._words, values))
        child: M = self._metric.labels(*words)
        self._known[words] = child
        return child

    def _fixed(self, known: set[str], value: str) -> str:
        """`value` if it is a word and not one too many, else `OTHER`: what arrives must not grow the memory."""
        if value in known:
            return value
        if not _WORD.fullmatch(value) or len(known) >= WORDS_PER_LABEL:
            if OTHER not in known:
                # Said once, and without the value, which may be anything.
                _log.warning("label value replaced", metric=self._name, by=OTHER, words=len(known))
            known.add(OTHER)
            return OTHER
        known.add(value)
        return value


class Metrics:
    """All metrics of one server, on a registry of its own, so that several servers may live in one process.

    `deadlines` are the promised ones in s: each is an edge of the latency histogram. `build` is what `scanside_build_info`
    says; by default the installed versions. All methods may be called from any thread and cost microseconds.
    """

    def __init__(self, *, deadlines: Sequence[float] = (0.04, 0.1), build: Mapping[str, str] | None = None) -> None:
        self.registry = CollectorRegistry()
        histogram = partial(Histogram, buckets=buckets(deadlines))
        self._latency = self._children(histogram, "scanside_frame_latency_seconds")
        self._stage = self._children(histogram, "scanside_stage_duration_seconds")
        self._frames = self._children(Counter, "scanside_frames_total")
        self._rejected = self._children(Counter, "scanside_messages_rejected_total")
        self._bytes = self._children(Counter, "scanside_bytes_received_total")
        self._acquisitions = self._children(Counter, "scanside_acquisitions_received_total")
        self._delivered = self._children(Counter, "scanside_images_delivered_total")
        self._dropped = self._children(Counter, "scanside_images_dropped_total")
        self._active = self._metric(Gauge, "scanside_sessions_active")
        self._sessions = self._children(Counter, "scanside_sessions_total")
        self._queue = self._children(Gauge, "scanside_queue_depth")
        self._replayed = self._children(Counter, "scanside_sessions_replayed_total")
        self._spool_bytes = self._metric(Gauge, "scanside_spool_bytes")
        self._spool_free = self._metric(Gauge, "scanside_spool_free_bytes")
        self._spool_lost = self._children(Counter, "scanside_spool_lost_total")
        self._last_frame = self._metric(Gauge, "scanside_engine_last_frame_timestamp_seconds")
        self._metric(Gauge, "scanside_build_info").labels(**(installed_versions() if build is None else build)).set(1)
        for reason in _reasons(ScansideError):
            self._rejected.at(reason)  # a counter that starts at 0 shows its first event in rate()
        for reason in ("behind", "disk"):
            self._spool_lost.at(reason)

    def _metric(self, kind: Callable[..., M], name: str) -> M:
        family = _BY_NAME[name]
        return kind(name, family.meaning, family.labels, registry=self.registry)

    def _children(self, kind: Callable[..., M], name: str) -> _Children[M]:
        return _Children(self._metric(kind, name), _BY_NAME[name])

    def record_frame(self, stats: FrameStats, handed: float) -> None:
        """Count a frame that ended, and the time it took.

        handed: monotonic time in s at which the last byte of its image was handed to the socket, 0 when there was none.
        The latency is `handed - stats.received`. It is left out, never clamped to a flattering 0, when either is unknown, when
        the frame failed, and when `handed` lies before `received`, which says that the image was another frame's.
        """
        self._frames.at(stats.pipeline, stats.outcome).inc()
        self._last_frame.set_to_current_time()
        if stats.outcome != "failed" and 0 < stats.received <= handed < math.inf:
            self._latency.at(stats.pipeline).observe(handed - stats.received)
        for stage, seconds in stats.stages.items():
            if 0 <= seconds < math.inf:  # a NaN would stay in the sum for good
                self._stage.at(stage).observe(seconds)

    def message_rejected(self, reason: str) -> None:
        """Count a message or connection that was refused; `reason` is the `reason` of the error."""
        self._rejected.at(reason).inc()

    def received(self, adapter: str, nbytes: int, acquisitions: int) -> None:
        """Count bytes and readouts that `adapter` (`mrd`, `photoacoustic`, ...) read."""
        self._bytes.at(adapter).inc(nbytes)
        self._acquisitions.at(adapter).inc(acquisitions)

    def delivered(self, sink: str) -> None:
        """Count an image that `sink` (`mrd`, `dicom`, `console`, ...) was handed."""
        self._delivered.at(sink).inc()

    def dropped(self, sink: str, reason: str) -> None:
        """Count an image that `sink` was not given."""
        self._dropped.at(sink, reason).inc()

    def session_opened(self) -> None:
        """Count a session that is open from now on."""
        self._active.inc()

    def session_closed(self, outcome: str) -> None:
        """Count a session that ended, by a fixed word for how."""
        self._active.dec()
        self._sessions.at(outcome).inc()

    def session_replayed(self, outcome: str) -> None:
        """Count a session whose worker went away: `resumed`, `failed` when it took a second one with it, `impossible`."""
        self._replayed.at(outcome).inc()

    def spool_lost(self, reason: str) -> None:
        """Count a session that goes on without its spool file, by a fixed word for why."""
        self._spool_lost.at(reason).inc()

    def watch_spool(self, used: Callable[[], float], free: Callable[[], float]) -> None:
        """Ask for the sizes, in bytes, at each scrape, from the scraping thread."""
        self._spool_bytes.set_function(used)
        self._spool_free.set_function(free)

    def watch_queue(self, queue: str, depth: Callable[[], float]) -> None:
        """Ask `depth` for the number of waiting entries at each scrape, from the scraping thread."""
        self._queue.at(queue).set_function(depth)


def _reasons(error: type[ScansideError]) -> set[str]:
    """Reasons of an error class and of all classes below it."""
    return {error.reason}.union(*map(_reasons, error.__subclasses__()))


class _Answer(msgspec.Struct, frozen=True):
    status: HTTPStatus
    body: bytes
    headers: list[tuple[str, str]]

    def encode(self, *, head_only: bool = False) -> bytes:
        lines = [
            f"HTTP/1.1 {self.status.value} {self.status.phrase}",
            *(f"{name}: {value}" for name, value in self.headers),
        ]
        lines += [f"Content-Length: {len(self.body)}", "Cache-Control: no-store", "Connection: close", "", ""]
        return "\r\n".join(lines).encode("latin-1") + (b"" if head_only else self.body)


def _say(status: HTTPStatus, *headers: tuple[str, str]) -> _Answer:
    text = f"{status.value} {status.phrase}\n".encode()
    return _Answer(status, text, [("Content-Type", "text/plain; charset=utf-8"), *headers])


def _say_json(values: Mapping[str, object], *, good: bool) -> _Answer:
    status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
    return _Answer(status, msgspec.json.encode(values) + b"\n", [("Content-Type", "application/json")])


class MetricsServer:
    """HTTP on one port: `/metrics` for Prometheus, `/livez` and `/readyz` for whoever starts and stops the server.

    ready: whether new sessions can be served, and the checks behind it by name. live: whether the main loop still turns.
    Both are called in the server's thread and must not block.
    Raises `ConfigError` for an address that other hosts can reach, unless `insecure`.

    One daemon thread serves everything. A request has 8 KiB and 5 s from connect to the last byte of the answer, 16 are served
    at a time, and each connection is for one request.
    """

    def __init__(
        self,
        metrics: Metrics,
        host: str,
        port: int,
        ready: Callable[[], tuple[bool, dict[str, bool]]],
        live: Callable[[], bool],
        *,
        insecure: bool = False,
    ) -> None:
        check_bind(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}", insecure=insecure)
        self._host, self._port = host, port
        self._ready, self._live = ready, live
        # Compression costs more than 30 kB on a hospital's network do.
        self._exposition = make_wsgi_app(metrics.registry, disable_compression=True)
        self._thread: threading.Thread | None = None
        self._stop: Callable[[], object] = lambda: None
        self._open = 0

    @property
    def port(self) -> int:
        """Port listened on; the one asked for until `start`, which finds a free one for 0."""
        return self._port

    def start(self) -> None:
        """Listen, and serve in a thread. Raises `ConfigError` when the address cannot be had."""
        if self._thread is not None:
            return
        listening = self._listen()
        self._port = listening.getsockname()[1]
        runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        loop, stop = runner.get_loop(), asyncio.Event()
        self._stop = lambda: loop.call_soon_threadsafe(stop.set)
        self._thread = threading.Thread(target=self._run, args=(runner, listening, stop), name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close the port and all connections, and wait until the thread has ended."""
        if self._thread is not None:
            self._stop()
            self._thread.join()
            self._thread = None

    def _listen(self) -> socket.socket:
        try:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            return socket.create_server((self._host, self._port), family=family)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"metrics cannot listen on {self._host}:{self._port}: {error}; choose another port"
            ) from None

    def _run(self, runner: asyncio.Runner, listening: socket.socket, stop: asyncio.Event) -> None:
        with runner:
            runner.run(self._serve(listening, stop))

    async def _serve(self, listening: socket.socket, stop: asyncio.Event) -> None:
        server = await asyncio.start_server(self._connection, sock=listening, limit=_REQUEST_BYTES)
        await stop.wait()
        server.close()  # open connections are canceled by the runner, not waited for

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            async with asyncio.timeout(_SECONDS_PER_REQUEST):
                writer.write(await self._exchange(reader))
                writer.close()
                await writer.wait_closed()
        except (OSError, asyncio.CancelledError):
            pass  # the server stops, the peer went away, or took more time than there is: nobody is there to be told
        finally:
            writer.transport.abort()
            self._open -= 1

    async def _exchange(self, reader: asyncio.StreamReader) -> bytes:
        """Bytes of the answer to the request that `reader` holds; none when the peer left before it was complete."""
        if self._open > _CONNECTIONS:
            return _say(HTTPStatus.SERVICE_UNAVAILABLE, ("Retry-After", "1")).encode()
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _say(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE).encode()
        except asyncio.IncompleteReadError:
            return b""
        return self._respond(head)

    def _respond(self, head: bytes) -> bytes:
        try:
            method, target, headers = _parse_request(head)
        except (ValueError, http.client.HTTPException):
            return _say(HTTPStatus.BAD_REQUEST).encode()
        if method not in ("GET", "HEAD"):
            return _say(HTTPStatus.METHOD_NOT_ALLOWED, ("Allow", "GET, HEAD")).encode()
        try:
            answer = self._answer(target, headers)
        except Exception:  # noqa: BLE001 - whatever a check raised, the prober hears of it, and so does the log
            _log.exception("endpoint failed")
            answer = _say(HTTPStatus.INTERNAL_SERVER_ERROR)
        return answer.encode(head_only=method == "HEAD")

    def _answer(self, target: str, headers: Message) -> _Answer:
        path, query = urlsplit(target)[2:4]
        if path == "/metrics":
            return self._expose(query, headers.get("Accept", ""))
        if path == "/livez":
            live = self._live()
            return _say_json({"live": live}, good=live)
        if path == "/readyz":
            ready, checks = self._ready()
            return _say_json({"ready": ready, "checks": checks}, good=ready)
        return _say(HTTPStatus.NOT_FOUND)

    def _expose(self, query: str, accept: str) -> _Answer:
        sent: list[tuple[str, str]] = []
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/metrics", "QUERY_STRING": query, "HTTP_ACCEPT": accept}
        body = self._exposition(environ, lambda _status, headers: sent.extend(headers))
        return _Answer(HTTPStatus.OK, b"".join(body), sent)


def _parse_request(head: bytes) -> tuple[str, str, Message]:
    """Method, target and headers of an HTTP/1 request. Raises `ValueError` or `HTTPException` for anything else."""
    line, _, rest = head.partition(b"\r\n")
    method, target, version = line.decode("ascii").split(" ")
    if version not in ("HTTP/1.0", "HTTP/1.1"):
        raise ValueError(version)
    urlsplit(target)  # raises ValueError where it cannot be split
    return method, target, http.client.parse_headers(io.BytesIO(rest))
