"""Every error scanside raises on purpose, as one tree.

::

    ScansideError
    ├── ConfigError            a configuration file, key or value; names file, key path, value, remedy
    ├── StreamError            what arrived cannot be used; costs its own session only
    │   ├── PeerError          the peer broke the protocol (unknown id, wrong order, malformed field)
    │   ├── LimitExceeded      a declared size is above a limit; raised before anything is allocated
    │   └── TruncatedMessage   the peer went away inside a message
    ├── EngineError            our side failed
    │   ├── NoImage            a frame holds nothing that an image could be made of
    │   ├── DeadlineMissed     no image in time
    │   ├── RuntimeFailed      a runtime cannot run a network, or runs it wrongly
    │   └── DeviceLost         an accelerator or worker process went away
    └── DeliveryError          an image could not be handed to its receiver
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "DeadlineMissed",
    "DeliveryError",
    "DeviceLost",
    "EngineError",
    "LimitExceeded",
    "NoImage",
    "PeerError",
    "RuntimeFailed",
    "ScansideError",
    "StreamError",
    "TruncatedMessage",
]


class ScansideError(Exception):
    """Base of all errors raised on purpose."""

    reason = "error"
    """Short fixed word for metrics labels; never holds text from the wire."""


class ConfigError(ScansideError):
    """A configuration is wrong: unknown name, unknown key, value out of range."""

    reason = "config"


class StreamError(ScansideError):
    """Something that arrived cannot be used.

    `offset` is the byte offset in the stream of the first byte of the offending message, `None` where there is no stream.
    """

    reason = "stream"

    def __init__(self, message: str, *, offset: int | None = None) -> None:
        super().__init__(message if offset is None else f"{message} (at byte {offset} of the stream)")
        self.offset = offset


class PeerError(StreamError):
    """The peer broke the protocol."""

    reason = "protocol"


class LimitExceeded(StreamError):
    """A declared size is above a limit; nothing was allocated."""

    reason = "limit"


class TruncatedMessage(StreamError):
    """The peer went away inside a message."""

    reason = "truncated"


class EngineError(ScansideError):
    """Our side failed."""

    reason = "engine"


class NoImage(EngineError):
    """A frame holds nothing that an image could be made of."""

    reason = "not_finite"


class DeadlineMissed(EngineError):
    """No image could be made in time."""

    reason = "deadline"


class RuntimeFailed(EngineError):
    """A runtime cannot run a network here, or what it gives is wrong."""

    reason = "runtime"


class DeviceLost(EngineError):
    """An accelerator or a worker process went away."""

    reason = "device"


class DeliveryError(ScansideError):
    """An image could not be handed to its receiver."""

    reason = "delivery"
