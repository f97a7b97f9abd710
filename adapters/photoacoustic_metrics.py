"""What metrics see of photoacoustic streams, whose producers are other programs than the server's own gateway."""

from __future__ import annotations

from .envelope import Data, Envelope, Failed, Open, Opened, Result, Stats
from .metrics import Metrics

__all__ = ["StreamWatch"]

_ADAPTER, _SINK = "photoacoustic", "bus"


class StreamWatch:
    """Watches the bus, as `Broker.observe` wants it: counts the bytes, frames, images and sessions of photoacoustic streams."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._handed: dict[str, float] = {}
        self._failed: set[str] = set()

    def __call__(self, request: Open, envelope: Envelope | None) -> None:
        """Take an envelope of a session, or None when it is over."""
        if request.adapter != "pat":
            return
        key = request.session
        if envelope is None:
            self._close(key)
        elif isinstance(envelope, Opened):
            self._handed[key] = 0.0
            self._metrics.session_opened()
        elif isinstance(envelope, Data):
            self._metrics.received(_ADAPTER, envelope.bytes, envelope.messages)
        elif isinstance(envelope, Result):
            self._handed[key] = envelope.handed / 1e9
            self._metrics.delivered(_SINK)
        elif isinstance(envelope, Stats):
            self._metrics.record_frame(envelope.stats, self._handed.get(key, 0.0))
        elif isinstance(envelope, Failed):
            self._failed.add(key)
            self._metrics.message_rejected(envelope.reason)

    def _close(self, key: str) -> None:
        if self._handed.pop(key, None) is not None:
            self._metrics.session_closed("failed" if key in self._failed else "complete")
        self._failed.discard(key)
