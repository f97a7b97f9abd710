"""Shared receive memory: lent once at a time, found again by workers, out of reach for everyone else on the bus."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.adapters.arena import Arena, ArenaView
from scanside.adapters.bus import AsyncPort, Broker, Producer, WorkerPort
from scanside.adapters.envelope import Data, End, Envelope, Failed, Open, Opened
from scanside.adapters.server import ServeOptions, Server
from scanside.engine.errors import PeerError

SLAB = 1 << 16


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Four slabs."""
    made = Arena(4 * SLAB, SLAB)
    yield made
    made.close()


def test_slabs_go_back_when_the_last_view_is_gone(arena: Arena) -> None:
    first, second = arena.lend(SLAB), arena.lend(1)
    part = first[10:20].toreadonly()
    assert arena.span(first) != arena.span(second)
    assert arena.lent == 2
    del first, second
    assert arena.lent == 1
    assert part.obj is not None
    del part
    assert arena.lent == 0


@settings(max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=40))
def test_no_slab_is_lent_twice(steps: list[tuple[bool, int]]) -> None:
    arena, held = Arena(4 * SLAB, SLAB), {}
    for serial, (take, which) in enumerate(steps):
        if take:
            held[serial] = arena.lend(SLAB)
            held[serial][:] = bytes([serial]) * SLAB
        elif held:
            del held[sorted(held)[which % len(held)]]
        assert all(view[0] == view[-1] == key for key, view in held.items())
        assert arena.lent == min(sum(arena.span(view) is not None for view in held.values()), 4)
    held.clear()
    arena.close()


def test_what_does_not_fit_gets_memory_of_its_own(arena: Arena) -> None:
    held = [arena.lend(SLAB) for _ in range(5)]
    assert [arena.span(view) is None for view in held] == [False] * 4 + [True]
    assert len(arena.lend(3 * SLAB)) >= 3 * SLAB
    assert arena.spans([held[0], held[4]]) is None


def test_neighboring_parts_become_one(arena: Arena) -> None:
    slab = arena.lend(SLAB)
    start, length = arena.span(slab) or (0, 0)
    assert length == SLAB
    assert arena.spans([slab[:5], slab[5:9], slab[20:30]]) == [(start, 9), (start + 20, 10)]


def test_a_worker_reads_what_was_received_and_cannot_write(arena: Arena) -> None:
    slab = arena.lend(SLAB)
    slab[7:12] = b"hello"
    view = ArenaView(os.dup(arena.fd))
    found = view.view(arena.span(slab[7:12]) or (0, 1))
    assert bytes(found) == b"hello"
    assert found.readonly
    with pytest.raises(PeerError, match="beyond the arena"):
        view.view((4 * SLAB - 1, 2))


def test_payload_in_the_arena_is_lent_until_its_credit_comes_back(arena: Arena) -> None:
    """A gateway sends by reference, the worker reads the same bytes, and the slab is free only afterwards."""

    async def gateway(broker: Broker) -> tuple[int, int]:
        told: asyncio.Queue[Envelope] = asyncio.Queue()
        port = AsyncPort(
            broker.context, lambda envelope, _: told.put_nowait(envelope), arena=arena, identity=broker.lender
        )
        session = port.open("default")
        while not isinstance(await asyncio.wait_for(told.get(), 10), Opened):
            pass
        slab = port.buffer(SLAB)
        slab[:4] = b"data"
        port.send(session, [slab[:2], slab[2:4]], messages=1, received=1)
        del slab
        under_way = arena.lent
        read.set()
        await asyncio.wait_for(told.get(), 10)
        left = arena.lent
        port.close()
        return under_way, left

    read, seen = threading.Event(), []

    def work() -> None:
        view = ArenaView(os.dup(arena.fd))
        while not seen:
            for envelope, payload in worker.poll(0.1):
                if isinstance(envelope, Open):
                    worker.accept(envelope.session, credit=1 << 20, shared=True)
                elif isinstance(envelope, Data):
                    assert not payload
                    read.wait(10)
                    seen.extend(bytes(view.view(span)) for span in envelope.shared)
                    worker.grant_credit(envelope)
        worker.poll(0.2)

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with Broker() as broker:
        worker = WorkerPort(broker.endpoint, name="w", device="cpu", capacity=1, context=context)
        thread = threading.Thread(target=work)
        thread.start()
        try:
            assert asyncio.run(gateway(broker)) == (1, 0)
        finally:
            thread.join()
            worker.close()
            context.term()
    assert seen == [b"data"]


def test_only_the_gateway_may_refer_to_the_arena() -> None:
    """Another program on the bus would read the scans of others that way."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with Broker() as broker:
        worker = WorkerPort(broker.endpoint, name="w", device="cpu", capacity=1, context=context)
        arrived: list[type[Envelope]] = []

        def work() -> None:
            while End not in arrived and Failed not in arrived:
                for envelope, _ in worker.poll(0.1):
                    arrived.append(type(envelope))
                    if isinstance(envelope, Open):
                        worker.accept(envelope.session, credit=1 << 20, shared=True)

        thread = threading.Thread(target=work)
        thread.start()
        producer = Producer(broker.endpoint, context=context)
        try:
            producer.open("default", timeout=10)
            data = Data(session=producer.session, bytes=9, messages=1, received=0, shared=((0, 9),))
            producer._station.post(data)
            with pytest.raises(PeerError, match="arena is for the gateway"):
                list(producer.results(10))
        finally:
            producer.close()
            thread.join()
            worker.close()
            context.term()
    assert Data not in arrived


def test_a_worker_that_hangs_is_killed_and_replaced(
    scan_bytes: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    """A real process that is stopped: its scan is told, the next one gets its image from the successor."""
    scan = scan_bytes()
    with Server(ServeOptions(port=0, metrics_port=None, threads=1, worker_seconds=1.0)) as server:
        crew = server._crew
        assert crew is not None
        ((process, *_),) = crew._processes.values()
        first = connect(server.port).send(scan.session("default")[:-2])
        first.until(lambda: bool(first.images))
        os.kill(process.pid, signal.SIGSTOP)
        first.finish(30)
        assert "worker went away" in " ".join(first.texts)
        deadline = time.monotonic() + 60
        while (process.poll() is None or not server.ready()[0]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.returncode == -signal.SIGKILL
        second = connect(server.port).send(scan.session("default")).finish(30)
        np.testing.assert_allclose(second.images[0].pixels, first.images[0].pixels, rtol=1e-5)
    del server, crew
    gc.collect()
