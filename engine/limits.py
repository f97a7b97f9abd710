"""All size limits of a session, as one immutable object that is consulted before anything is allocated."""

from __future__ import annotations

from typing import Annotated

import msgspec

from .errors import LimitExceeded

__all__ = ["DEFAULT_LIMITS", "Limits"]

MIB = 1 << 20
Positive = Annotated[int, msgspec.Meta(ge=1)]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Largest sizes accepted from the outside; every figure is inclusive."""

    config_bytes: Positive = 1 * MIB
    """Configuration text."""
    header_bytes: Positive = 64 * MIB
    """XML header of a scan."""
    text_bytes: Positive = 16 * MIB
    """Text message or query."""
    attribute_bytes: Positive = 16 * MIB
    """Meta attributes of one image."""
    message_bytes: Positive = 1024 * MIB
    """Any other single message."""
    channels: Positive = 1024
    """Receive channels of an acquisition."""
    samples: Positive = 65535
    """Samples of one readout."""
    trajectory_dimensions: Positive = 4
    """Numbers per trajectory point."""
    acquisition_bytes: Positive = 64 * MIB
    """One acquisition with header and trajectory."""
    matrix: Positive = 4096
    """Points of an encoded or reconstructed matrix along one axis."""
    encodings: Positive = 16
    """Encoding spaces of one header."""
    frame_bytes: Positive = 4096 * MIB
    """K-space of one frame."""
    session_bytes: Positive = 8192 * MIB
    """All buffers of one session together."""
    frames_open: Positive = 4096
    """Frames of one session that are being filled at the same time."""
    sessions: Positive = 64
    """Sessions at the same time; more are answered "busy"."""
    envelope_bytes: Positive = 64 * 1024
    """Envelope of a bus message."""
    photoacoustic_header_bytes: Positive = 4 * MIB
    """Header of a photoacoustic stream."""
    bus_frame_bytes: Positive = 64 * MIB
    """One frame of a bus message."""

    def check(self, field: str, value: int, *, what: str, offset: int | None = None) -> None:
        """Raise `LimitExceeded` when `value` is above the limit called `field`; `what` names the value in the error."""
        limit: int = getattr(self, field)
        if value > limit:
            raise LimitExceeded(
                f"{what} is {value}, the limit is {limit}; raise limits.{field} in the configuration if this is intended",
                offset=offset,
            )


DEFAULT_LIMITS = Limits()
