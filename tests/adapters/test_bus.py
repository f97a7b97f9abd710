"""The bus between real sockets, threads and processes: nothing is lost, reordered or sent without credit."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scanside.adapters.bus import (
    INPROC,
    AsyncPort,
    Broker,
    BrokerTimes,
    Policy,
    Producer,
    Subscriber,
    WorkerPort,
    check_bind,
)
from scanside.adapters.envelope import (
    COST_FLOOR,
    Data,
    End,
    Envelope,
    Failed,
    Note,
    Open,
    Refused,
    Result,
    Stats,
    encode,
    numbered,
)
from scanside.adapters.routing import Router
from scanside.adapters.sockets import Outbox, terminate
from scanside.engine.errors import ConfigError, DeadlineMissed, EngineError
from scanside.engine.limits import Limits
from scanside.engine.messages import FrameStats

STATS = FrameStats(pipeline="mri/cartesian", outcome="complete", trigger="flag")
PROCESS = """
import sys, zmq
from scanside.adapters.bus import WorkerPort
from scanside.adapters.envelope import Data, End, Open
import hashlib
context = zmq.Context()
port = WorkerPort(sys.argv[1], name="process", device="cpu", capacity=2, context=context)
digest, running = hashlib.sha256(), True
while running:
    for envelope, payload in port.poll(1.0):
        if isinstance(envelope, Open):
            port.accept(envelope.session, credit=4 << 20)
        elif isinstance(envelope, Data):
            for part in payload:
                digest.update(part)
            port.grant_credit(envelope)
        elif isinstance(envelope, End):
            port.send_result(envelope.session, [digest.digest()])
            port.end(envelope.session)
            running = False
while not port.poll(0.2):
    break
port.close()
context.term()
"""


class EchoWorker:
    """A worker in a thread that sends back what it gets."""

    def __init__(
        self, endpoint: str, *, name: str = "echo", credit: int = 1 << 20, capacity: int = 64, configs: tuple = ()
    ):
        self._make = lambda context: WorkerPort(
            endpoint, name=name, device="cpu", capacity=capacity, configs=configs, context=context
        )
        self._credit, self._stop = credit, threading.Event()
        self.opened: list[Open] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        context = zmq.Context()
        port = self._make(context)
        while not self._stop.is_set():
            for envelope, payload in port.poll(0.05):
                self._answer(port, envelope, payload)
        port.close()
        terminate(context)

    def _answer(self, port: WorkerPort, envelope: Envelope, payload: list[memoryview]) -> None:
        match envelope:
            case Open():
                self.opened.append(envelope)
                port.accept(envelope.session, credit=self._credit)
            case Data():
                port.send_result(envelope.session, payload, messages=envelope.messages, received=envelope.received)
                port.grant_credit(envelope)
            case End():
                port.send_stats(envelope.session, STATS)
                port.send_note(envelope.session, "info", "done")
                port.end(envelope.session, complete=envelope.complete)

    def __enter__(self) -> EchoWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def broker() -> Iterator[Broker]:
    with Broker(binds=["tcp://127.0.0.1:*"], times=BrokerTimes(ping=0.1)) as broker:
        yield broker


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    terminate(context)


def until(holds: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def run_through(producer: Producer, payloads: list[list[bytes]]) -> list[bytes]:
    """Send payloads while a thread reads the results; return the results."""
    producer.open("mri/cartesian", adapter="pat", dialect="ipasc", parameters={"a": 1})
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.extend(b"".join(part) for _, part in producer.results(20)))
    reader.start()
    for payload in payloads:
        producer.send(payload, timeout=20)
    producer.end()
    reader.join()
    return found


@pytest.mark.parametrize("transport", ["inproc", "ipc", "tcp"])
def test_payloads_come_back_byte_for_byte(broker: Broker, context: zmq.Context, transport: str):
    endpoint = {"inproc": INPROC, "ipc": broker.endpoint, "tcp": broker.bound[0]}[transport]
    payloads = [[bytes([n]) * (1 << n), b"tail"] for n in range(18)]
    own = broker.context if transport == "inproc" else context
    with EchoWorker(broker.endpoint) as worker, Producer(endpoint, context=own) as producer:
        assert run_through(producer, payloads) == [b"".join(p) for p in payloads]
        assert [note.text for note in producer.notes] == ["done"]
        assert run_through(producer, [[b"second"]]) == [b"second"]  # one session after the other
    assert [(o.adapter, o.dialect, o.parameters) for o in worker.opened] == [("pat", "ipasc", {"a": 1})] * 2
    assert broker.status().counts["opened"] == 2
    assert broker.status().sessions == 0


def test_a_worker_in_another_process(broker: Broker, context: zmq.Context):
    payload = bytes(range(256)) * 4096
    with (
        subprocess.Popen([sys.executable, "-c", PROCESS, broker.endpoint]) as process,
        Producer(broker.endpoint, context=context) as producer,
    ):
        assert run_through(producer, [[payload]] * 16) == [hashlib.sha256(payload * 16).digest()]
        assert process.wait(20) == 0


def test_a_worker_that_waits_can_be_woken(context: zmq.Context):
    with Broker(times=BrokerTimes(ping=1000.0)) as broker:
        port = WorkerPort(broker.endpoint, name="idle", device="cpu", capacity=1, context=context)
        until(lambda: bool(port.poll(0.0) or broker.status().workers))
        waker = threading.Timer(0.2, port.wake)
        waker.start()
        assert port.poll(1000.0) == []  # longer than a test may take
        waker.join()
        port.close()
        with pytest.raises(EngineError, match="closed"):
            port.wake()


def test_a_signal_may_wake_a_thread_that_is_just_waking_it():
    outbox: Outbox[int] = Outbox()
    before = signal.signal(signal.SIGUSR1, lambda _number, _frame: outbox.wake())
    try:
        with outbox._lock:
            signal.raise_signal(signal.SIGUSR1)
        assert os.eventfd_read(outbox.fd) == 1
    finally:
        signal.signal(signal.SIGUSR1, before)
        outbox.close()


@given(ping=st.floats(0.05, 100), first=st.floats(0.05, 100), waits=st.booleans())
def test_a_broker_sleeps_until_something_is_due(ping: float, first: float, waits: bool):
    begun = time.monotonic()
    router = Router(
        lambda _peer, _frames: None,
        lambda _topic, _count, _frames: None,
        Limits(),
        BrokerTimes(ping=ping, first_worker=first),
        lender=b"gateway",
    )
    if waits:
        router.receive(
            b"producer", [zmq.Frame(encode(numbered(Open(session="1" * 32, adapter="mrd", config="mri/sense"), 0)))]
        )
        assert router.status().waiting == 1
    longest, pause = min(ping, first) if waits else ping, router.pause()
    assert longest - (time.monotonic() - begun) <= pause <= longest


def test_a_producer_without_credit_stops_and_goes_on_when_it_gets_some(broker: Broker, context: zmq.Context):
    port = WorkerPort(broker.endpoint, name="slow", device="cpu", capacity=1, context=context)
    with Producer(broker.endpoint, context=context) as producer:
        opening = threading.Thread(target=producer.open, args=("any",))
        opening.start()
        opened = [e for e, _ in _poll_for(port, 1)]
        port.accept(opened[0].session, credit=2 * COST_FLOOR)
        port.poll(0)
        opening.join()
        for _ in range(2):
            producer.send([b"x"])
        assert not producer.wait_credit(0.05)
        with pytest.raises(DeadlineMissed, match="no credit"):
            producer.send([b"y"], policy=Policy.REFUSE)
        waiting = threading.Thread(target=producer.send, args=([b"z"],))
        waiting.start()
        data = _poll_for(port, 2)
        assert waiting.is_alive()
        assert port.poll(0.05) == []
        port.grant_credit(data[0].envelope)
        assert [bytes(part) for _, payload in _poll_for(port, 1) for part in payload] == [b"z"]
        waiting.join()
    port.close()


def _poll_for(port: WorkerPort, count: int) -> list:
    received: list = []
    until(lambda: len(received) >= count or bool(received.extend(port.poll(0.05))))
    return received


def test_nothing_is_lost_or_reordered_however_it_interleaves(broker: Broker, context: zmq.Context):
    part = st.integers(1, 100_000) | st.integers(1, 200)
    batches = st.lists(st.lists(part, min_size=1, max_size=4), min_size=1, max_size=20)

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(batches, st.sampled_from([1, 10_000, 1 << 20]), st.randoms(use_true_random=False))
    def check(sizes: list[list[int]], credit: int, random) -> None:
        payloads = [[random.randbytes(size) for size in batch] for batch in sizes]
        with EchoWorker(broker.endpoint, credit=credit):
            producers = [Producer(e, context=c) for e, c in ((broker.endpoint, context), (INPROC, broker.context))]
            found: dict[int, list[bytes]] = {}
            threads = [
                threading.Thread(target=lambda n=n, p=p: found.update({n: run_through(p, payloads)}))
                for n, p in enumerate(producers)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for producer in producers:
                producer.close()
        assert found == {n: [b"".join(p) for p in payloads] for n in (0, 1)}
        until(lambda: not broker.status().workers)

    check()


def test_many_sessions_share_the_socket_of_a_gateway(broker: Broker):
    sessions, messages, block = 8, 60, bytes(70_000)

    async def gateway() -> dict[str, list[int]]:
        got: dict[str, list[int]] = {}
        progress = asyncio.Event()

        def on_message(envelope: Envelope, payload: list[memoryview]) -> None:
            if isinstance(envelope, Result):
                got[envelope.session].append(int.from_bytes(payload[0], "little"))
            if isinstance(envelope, End):
                over.add(envelope.session)
            assert not isinstance(envelope, (Failed, Refused)), envelope
            progress.set()

        async def send(session: str) -> None:
            for n in range(messages):
                while port.credit(session) <= 0:
                    progress.clear()
                    await progress.wait()
                port.send(session, [n.to_bytes(4, "little"), block], messages=1, received=time.monotonic_ns())
            port.end(session)

        over: set[str] = set()
        port = AsyncPort(broker.context, on_message)
        for _ in range(sessions):
            got[port.open("any")] = []
        async with asyncio.timeout(30):
            await asyncio.gather(*(send(session) for session in got))
            while len(over) < sessions:
                progress.clear()
                await progress.wait()
        assert not any(port.credit(session) for session in got)
        port.close()
        return got

    with EchoWorker(broker.endpoint, credit=1 << 18):
        found = asyncio.run(gateway())
    assert list(found.values()) == [list(range(messages))] * sessions


def test_a_gateway_may_not_send_without_credit(broker: Broker):
    async def gateway() -> None:
        port = AsyncPort(broker.context, lambda envelope, payload: None)
        with pytest.raises(EngineError, match="credit"):
            port.send(port.open("any"), [b"x"], messages=1, received=0)
        port.send("0" * 31 + "1", [b"x"], messages=1, received=0)  # over, or never there: dropped
        port.close()
        port.close()

    asyncio.run(gateway())


def test_viewers_see_images_stats_and_notes(broker: Broker, context: zmq.Context):
    viewer = Subscriber(broker.viewers, ["image.", "stats", "note"], context=context)
    time.sleep(0.1)  # a subscription takes a moment, and what is published before is not for this viewer
    with EchoWorker(broker.endpoint), Producer(broker.endpoint, context=context) as producer:
        run_through(producer, [[bytes([n])] for n in range(5)])
        seen = []
        until(lambda: any(p.topic == "note" for p in seen) or bool(seen.extend(viewer.poll(0.05))))
    images = [p for p in seen if p.topic == f"image.{producer.session}"]
    assert bytes(images[-1].payload[0]) == b"\x04"
    assert len(images) + viewer.missed == 5
    assert [type(p.envelope) for p in seen if p.topic in ("stats", "note")] == [Stats, Note]
    assert next(p.envelope.stats for p in seen if p.topic == "stats") == STATS
    viewer.close()


def test_a_session_waits_for_the_first_worker(broker: Broker, context: zmq.Context):
    with Producer(broker.endpoint, context=context) as producer:
        opening = threading.Thread(target=producer.open, args=("any",))
        opening.start()
        until(lambda: broker.status().waiting == 1)
        with EchoWorker(broker.endpoint):
            opening.join(10)
            assert producer.credit > 0
            assert broker.status().waiting == 0


def test_without_a_worker_a_session_is_refused_in_time(context: zmq.Context):
    with Broker(times=BrokerTimes(first_worker=0.2)) as broker, Producer(broker.endpoint, context=context) as producer:
        with pytest.raises(EngineError, match="busy: no worker came up"):
            producer.open("any")
        assert broker.status().counts == {"refused.busy": 1}


def test_an_open_without_a_broker_ends_in_time(context: zmq.Context, tmp_path: Path):
    with Producer(f"ipc://{tmp_path}/none", context=context) as producer:
        with pytest.raises(DeadlineMissed, match="scanside serve"):
            producer.open("any", timeout=0.1)
        with pytest.raises(EngineError):
            producer.send([b"x"])


def test_sessions_go_to_free_workers_that_have_the_configuration(broker: Broker, context: zmq.Context):
    producers = [Producer(broker.endpoint, context=context) for _ in range(5)]
    with (
        EchoWorker(broker.endpoint, capacity=1, configs=("a",)) as small,
        EchoWorker(broker.endpoint, capacity=2, configs=("a", "b")) as large,
    ):
        until(lambda: len(broker.status().workers) == 2)
        producers[0].open("b")
        producers[1].open("a")
        assert (len(small.opened), len(large.opened)) == (1, 1)
        producers[2].open("a")
        assert [o.config for o in large.opened] == ["b", "a"]
        with pytest.raises(EngineError, match="busy: every worker is full"):
            producers[3].open("a")
        with pytest.raises(EngineError, match="config: no worker has the configuration 'c'"):
            producers[4].open("c")
        assert sorted((w.capacity, w.sessions) for w in broker.status().workers) == [(1, 1), (2, 2)]
        for producer in producers:
            producer.close()


def test_more_sessions_than_the_limit_are_refused(context: zmq.Context):
    with Broker(limits=Limits(sessions=1)) as broker, EchoWorker(broker.endpoint):
        first, second = (Producer(broker.endpoint, context=context) for _ in range(2))
        first.open("any")
        with pytest.raises(EngineError, match=r"limits\.sessions"):
            second.open("any")
        first.end()
        assert list(first.results(10)) == []
        second.open("any")
        first.close()
        second.close()


@pytest.mark.parametrize(
    "endpoint",
    [
        "inproc://x",
        "ipc:///run/x",
        "tcp://127.0.0.1:9100",
        "tcp://127.8.9.1:*",
        "tcp://[::1]:9100",
        "tcp://localhost:9100",
    ],
)
def test_local_binds_are_allowed(endpoint: str):
    assert check_bind(endpoint) is None


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://0.0.0.0:9100",
        "tcp://*:9100",
        "tcp://[::]:9100",
        "tcp://192.168.1.2:9100",
        "tcp://eth0:9100",
        "tcp://127.0.0.1.example.org:9100",
        "tcp://127.0.0.1:0;0.0.0.0:9100",
        "tcp://9100",
    ],
)
def test_other_binds_need_protection(endpoint: str):
    with pytest.raises(ConfigError, match="--insecure") as caught:
        Broker(binds=[endpoint])
    assert endpoint in str(caught.value)
    check_bind(endpoint, insecure=True)
    check_bind(endpoint, keys=object())


@pytest.mark.parametrize("endpoint", ["udp://127.0.0.1:1", "127.0.0.1:9100", "tcp://", ""])
def test_other_transports_are_refused_even_when_insecure(endpoint: str):
    with pytest.raises(ConfigError, match="cannot bind"):
        check_bind(endpoint, insecure=True)


def test_local_sockets_are_private_and_go_away():
    broker = Broker().start()
    folder = Path(broker.endpoint.removeprefix("ipc://")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    broker.stop()
    assert not folder.exists()


def test_a_broker_that_cannot_bind_or_never_starts_leaves_nothing():
    with Broker(binds=["tcp://127.0.0.1:*"]) as broker, pytest.raises(zmq.ZMQError, match="in use"):
        Broker(binds=broker.bound).start()
    Broker().stop()


def test_stopping_names_a_socket_that_was_not_closed():
    broker = Broker().start()
    forgotten = broker.context.socket(zmq.DEALER)
    with pytest.raises(EngineError, match="not closed"):
        broker.stop(timeout=0.2)
    forgotten.close()
    until(lambda: not any(t.name == "scanside-term" for t in threading.enumerate()))


def test_the_first_credit_is_what_the_worker_gives(broker: Broker, context: zmq.Context):
    with EchoWorker(broker.endpoint, credit=12_345), Producer(broker.endpoint, context=context) as producer:
        producer.open("any")
        assert producer.credit == 12_345
