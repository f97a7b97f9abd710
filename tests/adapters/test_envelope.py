"""The envelopes of the bus: docs/wire.md holds for the code, and hostile envelopes are refused in bounded memory."""

from __future__ import annotations

import pickle
import re
import tracemalloc
from pathlib import Path

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scanside.adapters import envelope as wire
from scanside.engine.errors import LimitExceeded, PeerError, StreamError
from scanside.engine.limits import Limits
from scanside.engine.messages import FrameStats

PAGE = Path(__file__).parents[2].joinpath("docs", "wire.md").read_text("utf-8")
KINDS = {kind.__name__.lower(): kind for kind in wire.Envelope.__subclasses__()}
SESSION = "00112233445566778899aabbccddeeff"


def documented_examples() -> dict[str, bytes]:
    return {name: bytes.fromhex(dump) for name, dump in re.findall(r"`(\w+)`:\n\n```hex\n([0-9a-f\s]+)```", PAGE)}


def documented_fields(kind: str) -> list[str]:
    section = re.search(rf"\n### {kind}\n(.*?)(?=\n##)", PAGE, re.DOTALL)
    assert section is not None, f"docs/wire.md has no section on {kind}"
    return re.findall(r"^\| `(\w+)` \|", section[1], re.MULTILINE)


def ping(**changes: object) -> dict[str, object]:
    return {"kind": "ping", "v": 1, "session": wire.LINK, "seq": 0, "sent": 0} | changes


def test_every_kind_has_an_example():
    assert documented_examples().keys() == KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_documented_example_is_what_the_code_writes(kind: str):
    example = documented_examples()[kind]
    decoded = wire.decode(example)
    assert type(decoded) is KINDS[kind]
    assert wire.encode(decoded) == example


@pytest.mark.parametrize("kind", KINDS)
def test_documented_fields_are_those_of_the_struct(kind: str):
    common = wire.Envelope.__struct_fields__
    assert documented_fields(kind) == [name for name in KINDS[kind].__struct_fields__ if name not in common]


def test_documented_reasons_are_those_of_the_struct():
    line = next(line for line in PAGE.splitlines() if line.startswith("| `reason` | string | | busy"))
    assert set(re.findall(r"\w+", line.split("|")[4].replace(" or ", ","))) == set(wire.Reason.__args__)


integers = st.integers(0, 2**63 - 1)
values = st.text(max_size=50) | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans()


@given(
    st.text(min_size=1, max_size=256), integers, integers, st.dictionaries(st.text(max_size=50), values, max_size=20)
)
def test_open_survives_the_wire(config: str, received: int, seq: int, parameters: dict):
    sent = wire.Open(session=SESSION, config=config, adapter="pat", received=received, parameters=parameters)
    numbered = wire.numbered(sent, seq)
    assert wire.decode(memoryview(wire.encode(numbered))) == numbered


@given(st.floats(0, 1e9), st.integers(0, 10**9), st.dictionaries(st.text(max_size=20), st.floats(0, 1e3), max_size=8))
def test_stats_survive_the_wire(received: float, readouts: int, stages: dict):
    stats = FrameStats(
        pipeline="p", outcome="complete", trigger="flag", received=received, readouts=readouts, stages=stages
    )
    sent = wire.numbered(wire.Stats(session=SESSION, stats=stats), 3)
    assert wire.decode(wire.encode(sent)) == sent


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/scanside-bomb"),))  # noqa: S108 - must never exist


HOSTILE = {
    "empty": b"",
    "array32 of 4 G": b"\xdd\xff\xff\xff\xff",
    "map32 of 4 G": b"\xdf\xff\xff\xff\xff",
    "str32 of 4 G": b"\xdb\xff\xff\xff\xff",
    "bin32 of 4 G": b"\xc6\xff\xff\xff\xff",
    "ext32 of 4 G": b"\xc9\xff\xff\xff\xff\x01",
    "pickle in an extension": msgpack.packb(msgpack.ExtType(5, pickle.dumps(Bomb()))),
    "pickle in a field": msgpack.packb(ping(x=msgpack.ExtType(5, pickle.dumps(Bomb())))),
    "empty extension": b"\xc7\x00\x05",
    "timestamp": msgpack.packb(ping(sent=msgpack.Timestamp(1, 1))),
    "60000 arrays deep": b"\x91" * 60_000,
    "500 arrays deep in a field": msgpack.packb(ping())[:-1] + b"\x91" * 500 + b"\x00",
    "500 maps deep as version": b"\x81\xa1v" + b"\x81\xa1v" * 500 + b"\x01",
    "reserved byte": b"\xc1",
    "two values": msgpack.packb(ping()) * 2,
    "cut off": msgpack.packb(ping())[:-1],
    "not UTF-8": b"\x81\xa1v\xa2\xff\xff",
    "not a map": b"\x01",
    "integer keys": msgpack.packb({1: 2}),
    "over the limit": msgpack.packb(ping(x="y" * 65_536)),
    "unknown field": msgpack.packb(ping(x=1)),
    "unknown kind": msgpack.packb(ping(kind="pickle")),
    "kind is a list": msgpack.packb(ping(kind=["ping"])),
    "no kind": msgpack.packb({"v": 1}),
    "version 2": msgpack.packb(ping(v=2)),
    "version true": msgpack.packb(ping(v=True)),
    "no sequence number": msgpack.packb({k: v for k, v in ping().items() if k != "seq"}),
    "no time": msgpack.packb({k: v for k, v in ping().items() if k != "sent"}),
    "negative sequence number": msgpack.packb(ping(seq=-1)),
    "sequence number over 63 bits": msgpack.packb(ping(seq=2**64 - 1)),
    "sequence number is a float": msgpack.packb(ping(seq=1.0)),
    "session with a newline": msgpack.packb(ping(session="0" * 31 + "\n")),
    "ping in a session": msgpack.packb(ping(session=SESSION)),
    "end without a session": msgpack.packb(ping(kind="end", complete=True)),
    "unknown field in stats": msgpack.packb(
        ping(
            kind="stats",
            session=SESSION,
            stats={"pipeline": "p", "outcome": "complete", "trigger": "flag", "patient": "x"},
        )
    ),
    "no bytes": msgpack.packb(ping(kind="data", session=SESSION, bytes=0, messages=1, received=0)),
    "dialect is a path": msgpack.packb(ping(kind="open", session=SESSION, config="x", adapter="mrd", dialect="../x")),
    "nested parameters": msgpack.packb(
        ping(kind="open", session=SESSION, config="x", adapter="mrd", parameters={"a": [1]})
    ),
    "part of the arena without bytes": msgpack.packb(
        ping(kind="data", session=SESSION, bytes=1, messages=1, received=0, shared=[[0, 0]])
    ),
    "part of the arena before its begin": msgpack.packb(
        ping(kind="data", session=SESSION, bytes=1, messages=1, received=0, shared=[[-1, 1]])
    ),
    "257 parts of the arena": msgpack.packb(
        ping(kind="data", session=SESSION, bytes=257, messages=1, received=0, shared=[[0, 1]] * 257)
    ),
    "reason of its own": msgpack.packb(ping(kind="failed", session=SESSION, reason="because", text="")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_envelope_is_refused_in_bounded_memory(name: str):
    data = HOSTILE[name]
    tracemalloc.start()
    try:
        with pytest.raises(PeerError):
            wire.decode(data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert not Path("/tmp/scanside-bomb").exists()  # noqa: S108


@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_else(data: bytes):
    with pytest.raises(PeerError):
        wire.decode(data)


@given(st.sampled_from(sorted(KINDS)), st.data())
def test_damaged_envelopes_raise_nothing_else(kind: str, data: st.DataObject):
    example = bytearray(documented_examples()[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        example[data.draw(st.integers(0, len(example) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = wire.decode(bytes(example))
    except StreamError:
        return
    assert wire.decode(wire.encode(decoded)) == decoded or "nan" in repr(decoded)


def data_of(size: int) -> wire.Data:
    return wire.Data(session=SESSION, bytes=size, messages=1, received=0)


def test_payload_is_what_the_envelope_says():
    wire.check_payload(data_of(10), [4, 6])
    wire.check_payload(wire.Ping(), [])
    for envelope, sizes in ((data_of(10), [4, 5]), (data_of(10), []), (wire.Ping(), [0, 1])):
        with pytest.raises(PeerError, match="announces"):
            wire.check_payload(envelope, sizes)


def test_payload_in_the_arena_counts_and_excludes_frames():
    left = wire.Data(session=SESSION, bytes=9, messages=1, received=0, shared=((0, 4), (8, 5)))
    wire.check_payload(left, [])
    with pytest.raises(PeerError, match="one of them"):
        wire.check_payload(left, [9])
    with pytest.raises(PeerError, match="announces 8 payload bytes, 9 arrived"):
        wire.check_payload(msgspec.structs.replace(left, bytes=8), [])
    with pytest.raises(LimitExceeded, match="message_bytes"):
        wire.check_payload(left, [], Limits(message_bytes=8))


def test_payload_is_limited_by_frame_by_sum_and_by_count():
    limits = Limits(bus_frame_bytes=100, message_bytes=150)
    with pytest.raises(LimitExceeded, match="bus_frame_bytes"):
        wire.check_payload(data_of(101), [101], limits)
    with pytest.raises(LimitExceeded, match="message_bytes"):
        wire.check_payload(data_of(200), [100, 100], limits)
    with pytest.raises(PeerError, match="256"):
        wire.check_payload(data_of(257), [1] * 257)


def test_direction_refuses_gaps_repetitions_and_what_follows_the_end():
    direction = wire.Direction()
    first, second = (wire.numbered(wire.Credit(session=SESSION, bytes=1), n) for n in (0, 1))
    with pytest.raises(PeerError, match="lost"):
        direction.check(second)
    direction.check(first)
    with pytest.raises(PeerError, match="repeated"):
        direction.check(first)
    direction.check(wire.numbered(wire.End(session=SESSION, complete=True), 1))
    with pytest.raises(PeerError, match="after the end"):
        direction.check(wire.numbered(second, 2))


def test_long_texts_are_cut_to_what_is_allowed():
    failed = wire.numbered(wire.Failed(session=SESSION, reason="error", text=wire.shorten("é" * 10_000)), 0)
    assert wire.decode(wire.encode(failed)) == failed
    assert msgspec.structs.asdict(failed)["text"].endswith("...")
