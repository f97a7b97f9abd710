"""Envelopes of the bus: what a message is, apart from how it moves. The reference is docs/wire.md.

A bus message is `[envelope][payload]...`. The envelope is a small msgpack map; the payload frames are raw bytes that the bus
never looks into. An envelope that arrives is unpacked with every length bounded and without extension types, then converted
into one of the frozen structs below; unknown kinds and unknown fields are refused.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar

import msgpack
import msgspec
from scanside.engine.errors import PeerError
from scanside.engine.limits import DEFAULT_LIMITS, Limits
from scanside.engine.messages import FrameStats

__all__ = [
    "COST_FLOOR",
    "LINK",
    "MAX_FRAMES",
    "TEXT_LENGTH",
    "VERSION",
    "Adapter",
    "Adjust",
    "Adjusted",
    "Credit",
    "Data",
    "Direction",
    "End",
    "Envelope",
    "Failed",
    "Hello",
    "Level",
    "Nack",
    "Note",
    "Open",
    "Opened",
    "Ping",
    "Pong",
    "Reason",
    "Refused",
    "Result",
    "Stats",
    "check_payload",
    "cost",
    "decode",
    "encode",
    "new_session",
    "numbered",
    "pack_map",
    "shorten",
    "unpack_map",
]

VERSION: Final = 1
"""Schema version of the envelope; another one is refused."""
LINK = "0" * 32
"""Session id of messages about the connection itself: hello, ping, pong, and `failed` for what belongs to no session."""
MAX_FRAMES = 256
"""Payload frames of one message."""
COST_FLOOR = 4096
"""A message costs at least this many bytes of credit, so that credit bounds the number of messages too."""
TEXT_LENGTH = 4096
"""Characters of a text."""

Reason = Literal[
    "busy",
    "config",
    "deadline",
    "delivery",
    "device",
    "engine",
    "error",
    "limit",
    "protocol",
    "shutdown",
    "stream",
    "truncated",
]
"""Why a session was refused or failed: the `reason` words of `engine.errors`, and `busy` and `shutdown`."""
Adapter = Literal["mrd", "pat"]
Level = Literal["debug", "info", "warning", "error"]
SessionId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$", min_length=32, max_length=32)]
Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Word = Annotated[str, msgspec.Meta(pattern="^[a-z0-9_-]*$", max_length=32)]
Text = Annotated[str, msgspec.Meta(max_length=TEXT_LENGTH)]


class Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag=str.lower):
    """Fields of every envelope. `seq` and `sent` are filled in when the message is sent; see `numbered`."""

    v: Literal[1] = VERSION
    session: SessionId = LINK
    seq: Natural = -1
    """Counts the messages of one session in one direction from 0."""
    sent: Natural = -1
    """Monotonic clock of the sender in ns when the message was handed to its socket."""


class Hello(Envelope, frozen=True, kw_only=True):
    """Worker to broker: here I am."""

    name: Name
    device: Name
    capacity: Positive
    """Sessions that it takes at the same time."""
    configs: Annotated[tuple[Name, ...], msgspec.Meta(max_length=1024)] = ()
    """Names of the configurations that it has; empty for all."""


class Open(Envelope, frozen=True, kw_only=True):
    """Producer to worker: start a session."""

    config: Name
    adapter: Adapter
    dialect: Word = ""
    """How the peer speaks its protocol, e.g. "gadgetron", "fire", "openrecon"."""
    peer: Word = ""
    """What is at the other end, e.g. "console"; for logs."""
    received: Natural = 0
    """Monotonic time in ns at which the request was read; 0 when it is of another host's clock."""
    parameters: dict[Annotated[str, msgspec.Meta(max_length=256)], Text | int | float | bool] = {}
    """Overrides of configuration values by dotted path, or sliders of an OpenRecon card by name."""


class Opened(Envelope, frozen=True, kw_only=True):
    """Worker to producer: go ahead, with this many bytes of credit."""

    credit: Positive
    shared: bool = False
    """Whether the worker can read payload from the arena of its server."""


class Data(Envelope, frozen=True, kw_only=True):
    """Producer to worker: raw data. With adapter `mrd` the payload holds whole MRD messages, byte for byte."""

    bytes: Positive
    """Of the whole payload."""
    messages: Positive
    """MRD messages, or photoacoustic frames, in the payload."""
    received: Natural
    """Monotonic time in ns at which the last byte was read from the socket; 0 when it is of another host's clock."""
    shared: Annotated[tuple[tuple[Natural, Positive], ...], msgspec.Meta(max_length=256)] = ()
    """Offset and length of each part of the payload in the arena; there are no payload frames then."""


class Credit(Envelope, frozen=True, kw_only=True):
    """Worker to producer: this much was consumed and may be sent again."""

    bytes: Positive


class Result(Envelope, frozen=True, kw_only=True):
    """Worker to producer and to viewers: MRD messages for the peer."""

    bytes: Positive
    messages: Positive
    final: bool
    """False for a preview, that a later result of the same series and image number replaces."""
    series: Natural = 0
    image: Natural = 0
    """Number of the image in its series."""
    received: Natural = 0
    """`received` of the last readout that the image needed, in ns."""
    handed: Natural = 0
    """Monotonic time in ns at which the finished image was handed to the bus."""


class Stats(Envelope, frozen=True, kw_only=True):
    """Worker to producer and to viewers: what one frame cost."""

    stats: FrameStats


class Note(Envelope, frozen=True, kw_only=True):
    """Worker to producer and to viewers: a sentence for the operator's console."""

    level: Level
    text: Text


class End(Envelope, frozen=True, kw_only=True):
    """The sender is done with the session. When both sides have said so, it is over."""

    complete: bool
    """False when the sender's peer went away instead of closing."""


class Failed(Envelope, frozen=True, kw_only=True):
    """The session is over at once, in both directions."""

    reason: Reason
    text: Text


class Refused(Envelope, frozen=True, kw_only=True):
    """Broker or worker to producer, instead of `opened`."""

    reason: Reason
    text: Text


class Nack(Envelope, frozen=True, kw_only=True):
    """Worker to producer: photoacoustic frames that are missing and may be sent again."""

    first: Natural
    last: Natural


class Adjust(Envelope, frozen=True, kw_only=True):
    """Anyone to the worker of a session, or of all photoacoustic ones: reconstruct differently from now on. Not counted."""

    parameters: dict[Annotated[str, msgspec.Meta(max_length=256)], Text | int | float | bool]


class Adjusted(Envelope, frozen=True, kw_only=True):
    """Broker to the sender of `adjust`: to how many sessions it was passed on."""

    sessions: Natural


class Ping(Envelope, frozen=True, kw_only=True):
    """Broker to everyone that has a session or is a worker: are you there?"""


class Pong(Envelope, frozen=True, kw_only=True):
    """Answer to `ping`."""


_KINDS: dict[object, type[Envelope]] = {
    kind.__name__.lower(): kind
    for kind in (Hello, Open, Opened, Data, Credit, Result, Stats, Note, Nack, End, Failed, Refused)
} | {kind.__name__.lower(): kind for kind in (Adjust, Adjusted, Ping, Pong)}
_OF_THE_LINK = (Hello, Ping, Pong, Adjusted)
_OF_EITHER = (Failed, Adjust)
_WITH_PAYLOAD = (Data, Result)

EnvelopeT = TypeVar("EnvelopeT", bound=Envelope)


def new_session() -> str:
    """A new session id: 16 random bytes as 32 hexadecimal digits."""
    return uuid.uuid4().hex


def shorten(text: str) -> str:
    """Cut a text to what an envelope may carry."""
    return text if len(text) <= TEXT_LENGTH else text[: TEXT_LENGTH - 3] + "..."


def cost(size: int) -> int:
    """Credit in bytes that a message with `size` payload bytes uses up, and that its consumer gives back."""
    return max(size, COST_FLOOR)


def numbered(envelope: EnvelopeT, seq: int) -> EnvelopeT:
    """A copy with its place in the sequence and the time of sending."""
    return msgspec.structs.replace(envelope, seq=seq, sent=time.monotonic_ns())


def encode(envelope: Envelope) -> bytes:
    """The msgpack map of an envelope, `kind` first, then the fields in the order of the struct."""
    return pack_map(msgspec.to_builtins(envelope))


def pack_map(fields: dict[str, Any]) -> bytes:
    """A msgpack map."""
    packed: bytes = msgpack.packb(fields)  # type: ignore[no-untyped-call]
    return packed


def _no_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"extension type {code} ({len(data)} bytes) is not allowed")


def unpack_map(data: bytes | memoryview, *, what: str, bin_bytes: int = 0) -> dict[str, Any]:
    """Unpack a msgpack map with string keys, without extension types, with every length bounded by that of `data`.

    `what` names it in errors; `bin_bytes`: longest binary value. Raises PeerError for anything else.
    """
    size = len(data)
    try:
        fields = msgpack.unpackb(  # type: ignore[attr-defined, no-untyped-call]
            data,
            raw=False,
            strict_map_key=True,
            ext_hook=_no_extension,
            max_str_len=size,
            max_bin_len=bin_bytes,
            max_array_len=1024,
            max_map_len=1024,
            max_ext_len=0,
        )
    except ValueError as error:  # the base of all errors of msgpack; some of them have no text
        raise PeerError(f"{what} is not the msgpack that it should be: {str(error) or type(error).__name__}") from None
    if not isinstance(fields, dict):
        raise PeerError(f"{what} is a {type(fields).__name__}, not a map")
    return fields


def _unpack(data: bytes | memoryview, limits: Limits) -> dict[str, Any]:
    size = len(data)
    if size > limits.envelope_bytes:
        raise PeerError(f"envelope of {size} bytes, the limit is {limits.envelope_bytes} (limits.envelope_bytes)")
    return unpack_map(data, what="envelope")


def decode(data: bytes | memoryview, limits: Limits = DEFAULT_LIMITS) -> Envelope:
    """Parse and check an envelope. Raises `PeerError` for everything that docs/wire.md does not allow."""
    fields = _unpack(data, limits)
    version, name = fields.get("v"), fields.get("kind")
    if version != VERSION:
        shown = version if isinstance(version, int) else type(version).__name__
        raise PeerError(f"envelope of schema version {shown}; this side speaks {VERSION}, use the same release on both")
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        shown = name[:40] if isinstance(name, str) else type(name).__name__
        raise PeerError(f"envelope of unknown kind {shown}; known: {', '.join(map(str, _KINDS))}")
    try:
        envelope = msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise PeerError(f"envelope: {error}") from None
    if envelope.seq < 0 or envelope.sent < 0:
        raise PeerError("envelope: `seq` and `sent` are required")
    if isinstance(envelope, _OF_THE_LINK) != (envelope.session == LINK) and not isinstance(envelope, _OF_EITHER):
        raise PeerError(f"envelope: session {envelope.session} does not go with {type(envelope).__name__.lower()}")
    return envelope


def check_payload(envelope: Envelope, sizes: Sequence[int], limits: Limits = DEFAULT_LIMITS) -> None:
    """Compare the sizes of the payload frames, in bytes, with what the envelope announces.

    Raises `PeerError` where they differ or where the kind has no payload, `LimitExceeded` for too many or too large frames.
    """
    declared = envelope.bytes if isinstance(envelope, _WITH_PAYLOAD) else 0
    if len(sizes) > MAX_FRAMES:
        raise PeerError(f"message of {len(sizes)} payload frames, the limit is {MAX_FRAMES}; join small frames")
    for size in sizes:
        limits.check("bus_frame_bytes", size, what="payload frame")
    total = sum(sizes)
    if isinstance(envelope, Data) and envelope.shared:
        if sizes:
            raise PeerError(
                f"data with both {len(sizes)} payload frames and payload in the arena; one of them is allowed"
            )
        total = sum(length for _, length in envelope.shared)
    limits.check("message_bytes", total, what="payload of one bus message")
    if total != declared:
        raise PeerError(f"{type(envelope).__name__.lower()} announces {declared} payload bytes, {total} arrived")


class Direction:
    """One direction of one session: counts its messages and holds them to their order."""

    __slots__ = ("count", "ended")

    def __init__(self) -> None:
        self.count = 0
        self.ended = False

    def check(self, envelope: Envelope) -> None:
        """Take the next message that arrived. Raises `PeerError` for a gap, a repetition, and for anything after `end`."""
        if envelope.seq != self.count:
            what = "repeated" if envelope.seq < self.count else "lost"
            raise PeerError(f"message {envelope.seq} of the session where {self.count} was due: something was {what}")
        if self.ended and not isinstance(envelope, Failed):
            raise PeerError(f"{type(envelope).__name__.lower()} after the end of the session")
        self.count += 1
        self.ended |= isinstance(envelope, End)

    def take(self, envelope: EnvelopeT) -> EnvelopeT:
        """The envelope with the next number, ready to be sent."""
        ready = numbered(envelope, self.count)
        self.count += 1
        self.ended |= isinstance(envelope, End)
        return ready
