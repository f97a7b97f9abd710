"""How a gateway ends connections that take too long or are too many, and in which dialect; no worker is needed for that."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.adapters import mrd
from scanside.adapters.bus import AsyncPort, Broker
from scanside.adapters.connection import Phase
from scanside.adapters.envelope import Result
from scanside.adapters.gadgetron import ConnectionOptions, Gateway
from scanside.adapters.metrics import Metrics
from scanside.adapters.mrd_framing import Framer
from scanside.engine.config import ConfigStore
from scanside.engine.limits import Limits

Scene = Callable[[Gateway, int], Awaitable[None]]
STORE = ConfigStore()
NULL = mrd.encode_config_file("null") + mrd.encode_header("<ismrmrdHeader/>")
CLOSE = mrd.encode_close()


def play(scene: Scene, options: ConnectionOptions, limits: Limits | None = None) -> Metrics:
    """Run a scene with a gateway on a bus without workers; returns the gateway's metrics."""
    metrics = Metrics()

    async def run(broker: Broker) -> None:
        def deliver(*message: object) -> None:
            gateway.deliver(*message)

        port = AsyncPort(broker.context, deliver)
        gateway = Gateway(STORE, port, metrics, str, options=options, limits=limits or Limits())
        number = await gateway.start("127.0.0.1", 0)
        try:
            await asyncio.wait_for(scene(gateway, number), 30)
        finally:
            await gateway.stop()
            port.close()

    with Broker() as broker:
        asyncio.run(run(broker))
    return metrics


async def answer(port: int, data: bytes) -> tuple[list[str], list[int], float]:
    """Texts and ids that come back for `data`, and after how many seconds the stream ended; our side stays open."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    begun = time.monotonic()
    writer.write(data)
    frames = Framer().feed(await reader.read())
    writer.close()
    return [mrd.text(f) for f in frames if f.id == 5], [f.id for f in frames], time.monotonic() - begun


def rejected(metrics: Metrics, reason: str) -> float:
    """How many messages or connections were refused for a reason."""
    return metrics.registry.get_sample_value("scanside_messages_rejected_total", {"reason": reason}) or 0.0


@pytest.mark.parametrize(
    ("options", "data", "says"),
    [
        (ConnectionOptions(handshake_seconds=0.3), mrd.encode_config_file("null"), "header"),
        (ConnectionOptions(message_seconds=0.3), NULL + struct.pack("<H", 1008) + bytes(20), "message"),
        (ConnectionOptions(idle_seconds=0.3), NULL, "nothing arrived"),
    ],
)
def test_what_takes_too_long_is_ended_at_its_limit(options: ConnectionOptions, data: bytes, says: str) -> None:
    async def scene(_: Gateway, port: int) -> None:
        texts, ids, seconds = await answer(port, data)
        assert says in texts[0]
        assert ids == [5, 4]
        assert 0.25 < seconds < 2

    assert rejected(play(scene, options), "timeout") == 1


def test_one_connection_too_many_is_told_so() -> None:
    async def scene(gateway: Gateway, port: int) -> None:
        room = 65
        waiting = [await asyncio.open_connection("127.0.0.1", port) for _ in range(room)]
        while len(gateway.connections) < room:
            await asyncio.sleep(0.01)
        texts, ids, _ = await answer(port, b"")
        assert "busy" in texts[0]
        assert ids == [5, 4]
        for _, writer in waiting:
            writer.close()

    assert rejected(play(scene, ConnectionOptions(), Limits(sessions=1)), "busy") == 1


def test_a_peer_that_reads_nothing_at_all_is_given_up() -> None:
    async def scene(gateway: Gateway, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        reader._transport.pause_reading()
        question = mrd.encode_query(mrd.Query(1, "x" * 100_000))
        writer.write(mrd.encode_config_file("null") + question * 400)
        while not gateway.connections:
            await asyncio.sleep(0.01)
        while gateway.connections:
            await asyncio.sleep(0.05)
        writer.transport.abort()

    play(scene, ConnectionOptions(stall_seconds=0.5, handshake_seconds=60, drain_seconds=0.2))


def test_failure_by_abort_ends_the_stream_without_close_and_keeps_taking() -> None:
    async def scene(gateway: Gateway, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(mrd.encode_config_file("nonsense"))
        (frame,) = Framer().feed(await reader.read())
        assert mrd.text(frame).startswith("ERR unknown configuration")
        (connection,) = gateway.connections
        assert connection.phase is Phase.DRAINING
        for _ in range(50):
            writer.write(bytes(np.zeros(100_000, np.uint8)))
            await writer.drain()
        writer.write(CLOSE)
        writer.close()

    assert rejected(play(scene, ConnectionOptions(failure="abort", dialect="fire")), "config") == 1


def test_a_noise_session_ends_with_close_even_where_failures_abort() -> None:
    async def scene(_: Gateway, port: int) -> None:
        chain = "<g><gadget><classname>NoiseSummaryGadget</classname></gadget></g>"
        texts, ids, _ = await answer(port, mrd.encode_config_text(chain) + struct.pack("<H", 999))
        assert (texts, ids) == ([], [4])

    play(scene, ConnectionOptions(failure="abort", drain_seconds=0.2))


def test_a_default_configuration_takes_any_name() -> None:
    async def scene(_: Gateway, port: int) -> None:
        assert (await answer(port, mrd.encode_config_file("whatever") + CLOSE))[1] == [4]

    metrics = play(scene, ConnectionOptions(default_config="null"))
    assert metrics.registry.get_sample_value("scanside_sessions_total", {"outcome": "complete"}) == 1


PIECES = (
    mrd.encode_config_file("null"),
    mrd.encode_config_file("nonsense"),
    mrd.encode_config_text("<configuration><property name='scanside.config' value='null'/></configuration>"),
    mrd.encode_header("<ismrmrdHeader/>"),
    mrd.encode_text("hello"),
    mrd.encode_text("{}"),
    mrd.encode_query(mrd.Query(1, "gadgetron::info")),
    mrd.encode_error("wrong"),
    struct.pack("<H", 1008) + bytes(340),
    struct.pack("<H", 999),
    b"\x01",
    CLOSE,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8))
def test_whatever_comes_every_session_ends_with_one_close(pieces: list[bytes]) -> None:
    async def scene(_: Gateway, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"".join(pieces))
        writer.write_eof()
        framer = Framer()
        frames = [single for frame in framer.feed(await reader.read()) for single in frame.split()]
        ids = [frame.id for frame in frames]
        assert ids.count(4) == 1
        assert ids[-1] == 4
        assert set(ids) <= {4, 5, 7, 8}
        assert not framer.pending
        writer.close()

    metrics = play(scene, ConnectionOptions(drain_seconds=0.5))
    assert metrics.registry.get_sample_value("scanside_sessions_active") == 0


def test_images_that_nobody_is_there_for_are_counted() -> None:
    async def scene(gateway: Gateway, _: int) -> None:
        gateway.deliver(
            Result(session="1" * 32, bytes=1, messages=1, final=True, series=1, image=1), [memoryview(b"x")]
        )

    metrics = play(scene, ConnectionOptions())
    labels = {"sink": "mrd", "reason": "gone"}
    assert metrics.registry.get_sample_value("scanside_images_dropped_total", labels) == 1


def test_stopping_tells_who_is_still_there() -> None:
    async def scene(gateway: Gateway, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(NULL)
        while not any(connection.busy for connection in gateway.connections):
            await asyncio.sleep(0.01)
        await gateway.stop(0.1, 0.5)
        frames = Framer().feed(await reader.read())
        assert [frame.id for frame in frames] == [5, 4]
        assert "shutting down" in mrd.text(frames[0])
        writer.close()

    assert rejected(play(scene, ConnectionOptions()), "shutdown") == 1
