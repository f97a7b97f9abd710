"""Everything that touches the outside world: protocols, sockets, files, metrics, the command line.

`PhotoacousticSender`, for the process of a device, can be imported from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .photoacoustic_sender import PhotoacousticSender as PhotoacousticSender

__all__ = ()


def __getattr__(name: str) -> Any:  # noqa: ANN401 - as Python asks for it (PEP 562)
    """Import what is asked for when it is: the command line must not wait for sockets."""
    if name == "PhotoacousticSender":
        from .photoacoustic_sender import PhotoacousticSender

        return PhotoacousticSender
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
