"""Sessions whose worker went away get another one, one session at a time.

One at a time, because any of them may have been the reason: a scan that ends a worker whenever it is reconstructed must not
take the others with it a second time. Whoever has used up what it had been sent before is not to blame, and makes room.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

__all__ = ["Recovery", "Resumable"]


class Resumable(Protocol):
    """What can be taken up again."""

    def resume(self) -> None:
        """Ask for a new session and send again what the last one had been sent."""
        ...


class Recovery:
    """The queue of sessions that wait to be taken up again."""

    def __init__(self) -> None:
        self._waiting: deque[Resumable] = deque()
        self._current: Resumable | None = None

    def __len__(self) -> int:
        """Sessions that wait or are being taken up."""
        return len(self._waiting) + (self._current is not None)

    def is_suspect(self, session: Resumable) -> bool:
        """Whether the session is the one that is being taken up."""
        return self._current is session

    def enter(self, session: Resumable) -> None:
        """The worker of a session went away: resume it when its turn comes."""
        self._waiting.append(session)
        self._next()

    def leave(self, session: Resumable) -> None:
        """A session is all right again, or over."""
        if session in self._waiting:
            self._waiting.remove(session)
        if self._current is session:
            self._current = None
            self._next()

    def _next(self) -> None:
        if self._current is None and self._waiting:
            self._current = self._waiting.popleft()
            self._current.resume()
