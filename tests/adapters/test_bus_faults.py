"""Faults on the bus cost whoever caused them: hostile peers, lost workers and gateways, viewers that sleep."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import msgpack
import pytest
import zmq
from scanside.adapters import broker as broker_module
from scanside.adapters import bus, clients
from scanside.adapters import envelope as wire
from scanside.adapters.bus import Broker, BrokerTimes, Producer, Received, Subscriber, WorkerPort
from scanside.adapters.envelope import COST_FLOOR, Data, End, Envelope, Failed, Hello, Note, Open, Opened, Ping, Result
from scanside.adapters.sockets import terminate
from scanside.engine.errors import DeviceLost, EngineError, LimitExceeded, PeerError
from scanside.engine.limits import Limits

MIB = 1 << 20
CREDIT = 8 * MIB


class Raw:
    """A peer that says whatever the test wants, in the order and with the numbers that the test wants."""

    def __init__(self, context: zmq.Context, endpoint: str, **options: int):
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        for name, value in options.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        self.socket.connect(endpoint)

    def send(self, envelope: Envelope | bytes, *payload: bytes, seq: int = 0) -> None:
        first = envelope if isinstance(envelope, bytes) else wire.encode(wire.numbered(envelope, seq))
        self.socket.send_multipart([first, *payload])

    def receive(self, timeout: float = 5.0) -> Envelope | None:
        """The next envelope that is no ping, or `None`."""
        deadline = time.monotonic() + timeout
        while self.socket.poll(max(0, 1e3 * (deadline - time.monotonic()))):
            envelope = wire.decode(self.socket.recv_multipart()[0])
            if not isinstance(envelope, Ping):
                return envelope
        return None

    def open(self, port: WorkerPort) -> str:
        """A session between this peer and a worker."""
        request = Open(session=wire.new_session(), config="any", adapter="mrd")
        self.send(request)
        assert next_of(port, Open).session == request.session
        port.accept(request.session, credit=CREDIT)
        port.poll(0)
        assert isinstance(self.receive(), Opened)
        return request.session

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def broker() -> Iterator[Broker]:
    limits = Limits(bus_frame_bytes=MIB, message_bytes=2 * MIB)
    with Broker(limits=limits, times=BrokerTimes(ping=0.05, expiry=5.0), binds=["tcp://127.0.0.1:*"]) as broker:
        yield broker


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    terminate(context)


@pytest.fixture
def port(broker: Broker, context: zmq.Context) -> Iterator[WorkerPort]:
    port = WorkerPort(broker.endpoint, name="w", device="cpu", capacity=8, context=context)
    until(lambda: not port.poll(0.01) and bool(broker.status().workers))
    yield port
    port.close()


@pytest.fixture
def raw(broker: Broker, context: zmq.Context, port: WorkerPort) -> Iterator[Raw]:
    raw = Raw(context, broker.endpoint)
    yield raw
    raw.close()


@pytest.fixture
def healthy(broker: Broker, context: zmq.Context, port: WorkerPort) -> Iterator[Callable[[], None]]:
    """A session beside the fault; call it to see that it still works. The test fails when it does not at the end."""
    peer = Raw(context, broker.endpoint)
    session, count = peer.open(port), 0

    def check() -> None:
        nonlocal count
        count += 1
        peer.send(data(session, 3), b"abc", seq=count)
        assert next_of(port, Data, session).payload[0] == b"abc"

    check()
    yield check
    check()
    peer.close()


def until(holds: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


class Found(Received):
    @property
    def session(self) -> str:
        return self.envelope.session


def next_of(port: WorkerPort, kind: type[Envelope], session: str | None = None) -> Found:
    """The next message of a kind that a worker gets; anything else before it is a failure."""
    received: list[Received] = []
    until(lambda: bool(received.extend(port.poll(0.05)) or received))
    assert len(received) == 1
    assert isinstance(received[0].envelope, kind), received
    assert session in (None, received[0].envelope.session)
    return Found(*received[0])


def data(session: str, size: int) -> Data:
    return Data(session=session, bytes=size, messages=1, received=0)


HOSTILE = {
    "array32 of 4 G": [b"\xdd\xff\xff\xff\xff"],
    "extension": [msgpack.packb(msgpack.ExtType(5, b"cos\nsystem\n(S'true'\ntR."))],
    "deep": [b"\x91" * 60_000],
    "over the limit": [bytes(200_000)],
    "empty frame": [b""],
    "other version": [msgpack.packb({"v": 2})],
    "text": [b"GET / HTTP/1.1\r\n\r\n"],
    "a worker with sessions": [wire.encode(wire.numbered(Hello(name="x", device="x", capacity=1), 0))],
    "ping": [wire.encode(wire.numbered(Ping(), 0))],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_malformed_envelope_costs_its_senders_sessions(name, broker: Broker, raw: Raw, port: WorkerPort, healthy):
    sessions = {raw.open(port), raw.open(port)}
    raw.socket.send_multipart(HOSTILE[name])
    answers = [raw.receive() for _ in range(3)]
    assert [type(a) for a in answers] == [Failed] * 3
    assert {a.session for a in answers} == sessions | {wire.LINK}
    assert {a.reason for a in answers} == {"protocol"}
    assert {e.session for e, _ in _poll_for(port, 2, Failed)} == sessions
    assert broker.status().counts["malformed.protocol"] == 1
    healthy()


def _poll_for(port: WorkerPort, count: int, kind: type[Envelope]) -> list[Received]:
    received: list[Received] = []
    until(lambda: len(received) >= count or bool(received.extend(port.poll(0.05))))
    assert all(isinstance(envelope, kind) for envelope, _ in received)
    return received


WRONG = {
    "gap": lambda s: (data(s, 1), (b"x",), 2),
    "repetition": lambda s: (data(s, 1), (b"x",), 0),
    "too few bytes": lambda s: (data(s, 2), (b"x",), 1),
    "too many bytes": lambda s: (data(s, 2), (b"xyz",), 1),
    "no payload": lambda s: (data(s, 2), (), 1),
    "payload where there is none": lambda s: (End(session=s, complete=True), (b"x",), 1),
    "too many frames": lambda s: (data(s, 300), (b"x",) * 300, 1),
    "kind of the other side": lambda s: (Result(session=s, bytes=1, messages=1, final=True), (b"x",), 1),
    "opened twice": lambda s: (Open(session=s, config="any", adapter="mrd"), (), 1),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_message_costs_its_own_session_only(name: str, raw: Raw, port: WorkerPort, healthy):
    other, session = raw.open(port), raw.open(port)
    envelope, payload, seq = WRONG[name](session)
    raw.send(envelope, *payload, seq=seq)
    answer = raw.receive()
    assert isinstance(answer, Failed)
    assert (answer.session, answer.reason) == (session, "protocol")
    assert next_of(port, Failed).session == session
    raw.send(data(session, 1), b"x", seq=2)  # still on its way: ignored
    raw.send(data(other, 1), b"x", seq=1)
    assert next_of(port, Data).session == other
    healthy()


def test_data_without_credit_ends_the_session(raw: Raw, port: WorkerPort, healthy):
    session = raw.open(port)
    for n in range(CREDIT // MIB):
        raw.send(data(session, MIB), bytes(MIB), seq=n + 1)
    raw.send(data(session, 1), b"x", seq=CREDIT // MIB + 1)
    assert raw.receive().text.startswith("data without credit")
    assert len(_poll_for(port, CREDIT // MIB, (Data, Failed))) in (CREDIT // MIB, CREDIT // MIB + 1)
    until(lambda: not port.poll(0.05))
    healthy()


def test_small_messages_cost_credit_too(raw: Raw, port: WorkerPort):
    session = raw.open(port)
    for n in range(CREDIT // COST_FLOOR + 1):
        raw.send(data(session, 1), b"x", seq=n + 1)
    assert isinstance(raw.receive(), Failed)


def test_a_frame_over_the_limit_costs_the_connection_of_its_sender(broker: Broker, raw: Raw, port: WorkerPort, healthy):
    session = raw.open(port)
    raw.send(data(session, 2 * MIB), bytes(2 * MIB), seq=1)
    ended = next_of(port, End)
    assert (ended.session, ended.envelope.complete) == (session, False)
    assert broker.status().counts["lost.producer"] == 1
    healthy()


def test_a_frame_over_the_limit_within_the_process_is_refused_as_well(broker: Broker, port: WorkerPort, healthy):
    raw = Raw(broker.context, bus.INPROC)
    session = raw.open(port)
    raw.send(data(session, MIB + 1), bytes(MIB + 1), seq=1)
    answer = raw.receive()
    assert (answer.session, answer.reason) == (session, "limit")
    assert next_of(port, Failed).session == session
    raw.close()


def test_many_frames_over_the_message_limit_are_refused(raw: Raw, port: WorkerPort, healthy):
    session = raw.open(port)
    raw.send(data(session, 3 * MIB), *[bytes(MIB)] * 3, seq=1)
    assert raw.receive().reason == "limit"
    assert next_of(port, Failed).session == session


def test_another_connection_cannot_touch_a_session(broker: Broker, context: zmq.Context, raw: Raw, port: WorkerPort):
    session = raw.open(port)
    intruder = Raw(context, broker.endpoint)
    for envelope in (End(session=session, complete=True), Open(session=session, config="any", adapter="mrd")):
        intruder.send(envelope, seq=0)
        assert intruder.receive().reason == "protocol"
    raw.send(data(session, 1), b"x", seq=1)
    assert next_of(port, Data).session == session
    intruder.close()


def test_a_session_that_is_not_open_and_one_that_was_are_told_apart(raw: Raw, port: WorkerPort):
    raw.send(End(session=wire.new_session(), complete=True))
    assert "is not open" in raw.receive().text
    session = raw.open(port)
    port.fail(session, "engine", "no reason")
    assert raw.receive().reason == "engine"
    raw.send(data(session, 1), b"x", seq=1)
    assert raw.receive(0.1) is None
    raw.send(Open(session=session, config="any", adapter="mrd"))
    assert "used before" in raw.receive().text


def test_a_worker_that_is_reported_lost_fails_its_sessions(broker: Broker, raw: Raw, port: WorkerPort):
    session = raw.open(port)
    port.send_note(session, "info", "last words")
    port.poll(0)
    time.sleep(0.05)
    broker.worker_lost(port.identity)
    assert raw.receive().text == "last words"
    answer = raw.receive()
    assert (answer.session, answer.reason) == (session, "device")
    until(lambda: not broker.status().workers)
    broker.worker_lost(b"nobody")
    assert broker.alive


def test_a_worker_that_disconnects_fails_its_sessions(broker: Broker, context: zmq.Context, raw: Raw, port: WorkerPort):
    raw.open(port)
    port.close()
    assert raw.receive().reason == "device"
    assert broker.status().counts["lost.worker"] == 1


def test_a_worker_that_hangs_fails_its_sessions(context: zmq.Context):
    with (
        Broker(times=BrokerTimes(ping=0.05, expiry=0.3)) as broker,
        Producer(broker.endpoint, context=context) as producer,
    ):
        hung = Raw(context, broker.endpoint)
        hung.send(Hello(name="hung", device="cpu", capacity=1))
        with pytest.raises(DeviceLost, match="no answer"):
            producer.open("any")
        hung.close()


def test_a_worker_that_sends_nonsense_is_no_worker_any_more(broker: Broker, context: zmq.Context):
    bad = Raw(context, broker.endpoint)
    bad.send(Hello(name="bad", device="cpu", capacity=1))
    until(lambda: bool(broker.status().workers))
    with Producer(broker.endpoint, context=context) as producer:
        bad.socket.poll(5000)
        bad.send(b"\xc1")
        until(lambda: not broker.status().workers)
        assert bad.receive().session == wire.LINK
        bad.send(Hello(name="good", device="cpu", capacity=1))
        until(lambda: [w.name for w in broker.status().workers] == ["good"])
        assert producer.credit == 0
    bad.close()


def test_a_worker_that_says_hello_again_has_lost_its_sessions(broker: Broker, context: zmq.Context):
    worker, raw = Raw(context, broker.endpoint), Raw(context, broker.endpoint)
    worker.send(Hello(name="w", device="cpu", capacity=1))
    until(lambda: bool(broker.status().workers))
    raw.send(Open(session=wire.new_session(), config="any", adapter="mrd"))
    assert isinstance(worker.receive(), Open)
    worker.send(Hello(name="w", device="cpu", capacity=1))
    assert raw.receive().reason == "device"
    until(lambda: broker.status().workers[0].sessions == 0)
    worker.close()
    raw.close()


def test_a_worker_without_its_broker_gives_up_its_sessions_and_finds_the_next(
    broker: Broker, raw: Raw, port: WorkerPort, monkeypatch: pytest.MonkeyPatch
):
    session = raw.open(port)
    broker.stop()
    monkeypatch.setattr(bus, "SILENCE", 0.1)
    ended = next_of(port, End, session)
    assert ended.envelope.complete is False


def test_a_producer_that_goes_away_leaves_an_image_for_the_viewers(
    broker: Broker, context: zmq.Context, raw: Raw, port: WorkerPort
):
    viewer = Subscriber(broker.viewers, ["image."], context=context)
    session = raw.open(port)
    time.sleep(0.1)
    raw.close()
    ended = next_of(port, End, session)
    assert ended.envelope.complete is False
    port.send_result(session, [b"image"])
    port.end(session)
    port.poll(0)
    assert [bytes(p.payload[0]) for p in viewer.poll(5)] == [b"image"]
    until(lambda: broker.status().sessions == 0)
    viewer.close()


def test_a_producer_that_does_not_read_is_lost_and_nobody_waits_for_it(
    broker: Broker, port: WorkerPort, healthy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(broker_module, "BACKLOG_BYTES", MIB)
    lazy = Raw(broker.context, bus.INPROC, RCVHWM=1)
    session = lazy.open(port)
    block = bytes(1000)
    received: list[Received] = []
    for _ in range(4000):
        port.send_result(session, [block])
        received += port.poll(0)
    until(lambda: bool(received) or bool(received.extend(port.poll(0.05))))
    assert [(e.session, e.complete) for e, _ in received] == [(session, False)]
    healthy()
    lazy.close()


def test_a_viewer_that_sleeps_slows_nobody_and_wakes_to_the_newest(
    broker: Broker, context: zmq.Context, raw: Raw, port: WorkerPort
):
    asleep = Subscriber(broker.viewers, ["image."], context=context)
    session = raw.open(port)
    time.sleep(0.1)
    count, block = 300, bytes(100_000)
    for n in range(count):
        port.send_result(session, [n.to_bytes(4, "little"), block], image=n)
        port.poll(0)
        assert raw.receive().image == n
    found = asleep.poll(5)
    assert len(found) == 1
    while True:  # what was cut off by the full queue comes to light with the next image that fits
        more = asleep.poll(0.2)
        if not more:
            break
        found = more
    port.send_result(session, [count.to_bytes(4, "little")], image=count)
    port.poll(0)
    until(lambda: found[-1].envelope.image == count or bool(found.extend(asleep.poll(0.1))))
    assert asleep.missed >= count - 100
    asleep.close()


def test_results_that_nobody_reads_hold_the_producer(
    broker: Broker, context: zmq.Context, port: WorkerPort, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(clients, "UNREAD_RESULTS", 2)
    with Producer(broker.endpoint, context=context) as producer:
        session = _open(producer, port)
        for _ in range(2):
            port.send_result(session, [b"image"])
        port.poll(0)
        until(lambda: not producer.wait_credit(0))
        results = producer.results(5)
        next(results)
        assert producer.wait_credit(5)
        port.fail(session, "engine", "out of memory")
        port.poll(0)
        next(results)
        with pytest.raises(EngineError, match="out of memory"):
            next(results)
        with pytest.raises(EngineError, match="out of memory"):
            producer.send([b"x"])


def test_a_payload_that_cannot_be_sent_is_an_error_of_the_thread_that_sends_it(raw: Raw, port: WorkerPort):
    session, errors = raw.open(port), []

    def send(payload: list[memoryview], kind: type[Exception]) -> None:
        with pytest.raises(kind):
            port.send_result(session, payload)
        errors.append(kind)

    for payload, kind in (([memoryview(bytes(10))[::2]], TypeError), ([memoryview(bytes(65 * MIB))], LimitExceeded)):
        thread = threading.Thread(target=send, args=(payload, kind))
        thread.start()
        thread.join()
    assert errors == [TypeError, LimitExceeded]
    assert port.poll(0.05) == []


def test_results_from_many_threads_arrive_in_the_order_of_each(raw: Raw, port: WorkerPort):
    session, threads, count = raw.open(port), 4, 200

    def send(number: int) -> None:
        for n in range(count):
            port.send_result(session, [b"x"], series=number, image=n)

    senders = [threading.Thread(target=send, args=(number,)) for number in range(threads)]
    for sender in senders:
        sender.start()
    found: list[Envelope] = []
    while len(found) < threads * count:
        port.poll(0.01)
        while (result := raw.receive(0)) is not None:
            found.append(result)
    for sender in senders:
        sender.join()
    assert [r.seq for r in found] == list(range(1, threads * count + 1))
    for number in range(threads):
        assert [r.image for r in found if r.series == number] == list(range(count))


def _open(producer: Producer, port: WorkerPort) -> str:
    opening = threading.Thread(target=producer.open, args=("any",))
    opening.start()
    session = next_of(port, Open).session
    port.accept(session, credit=CREDIT)
    port.poll(0)
    opening.join()
    return session


def test_a_published_message_that_is_wrong_is_an_error_of_the_peer(context: zmq.Context):
    publisher = context.socket(zmq.PUB)
    publisher.bind("inproc://false-viewers")
    viewer = Subscriber("inproc://false-viewers", [""], context=context)
    time.sleep(0.1)
    for frames in (
        [b"note"],
        [b"note", bytes(8), b"\xc1"],
        [b"note", bytes(8), wire.encode(wire.numbered(Ping(), 0)), b"x"],
    ):
        publisher.send_multipart(frames)
        with pytest.raises(PeerError):
            viewer.poll(5)
    publisher.send_multipart([b"note", bytes(8), wire.encode(wire.numbered(Note(level="info", text="x"), 0))])
    with pytest.raises(PeerError):
        viewer.poll(5)
    viewer.close()
    publisher.close()
