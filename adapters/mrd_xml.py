"""Reads XML from the outside: no document type, no entities, nothing external, bounded size and depth.

Element names come out without their namespace, since files in the field differ in it.
"""

from __future__ import annotations

from xml.etree.ElementTree import Element, ParseError, TreeBuilder

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import DefusedXMLParser
from scanside.engine.errors import LimitExceeded, PeerError

__all__ = ["MAX_DEPTH", "MAX_ELEMENTS", "decode_text", "parse_xml"]

MAX_ELEMENTS = 200_000
"""Elements of one document; a header with all user parameters has some hundred."""
MAX_DEPTH = 32
"""Nesting of one document; a header has six levels."""
CHUNK = 64 << 10


class _Builder(TreeBuilder):
    """Builds a tree of local names and stops when it grows beyond any honest document."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what
        self._elements = self._depth = 0

    def start(self, tag: str, attrs: dict[str, str]) -> Element:
        self._elements += 1
        self._depth += 1
        if self._elements > MAX_ELEMENTS or self._depth > MAX_DEPTH:
            raise LimitExceeded(
                f"{self._what} has more than {MAX_ELEMENTS} elements or {MAX_DEPTH} levels; "
                "remove what is not part of the schema"
            )
        return super().start(tag.rpartition("}")[2], attrs)

    def end(self, tag: str) -> Element:
        self._depth -= 1
        return super().end(tag.rpartition("}")[2])


def decode_text(data: bytes | memoryview, what: str, *, offset: int | None = None) -> str:
    """Text up to the first NUL (clients count one, or leave garbage behind it).

    Raises PeerError unless it is UTF-8.
    """
    raw = bytes(data)
    cut = raw.find(0)
    try:
        return (raw if cut < 0 else raw[:cut]).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PeerError(f"{what} is not UTF-8: {error.reason} at its byte {error.start}", offset=offset) from error


def parse_xml(data: bytes | memoryview, what: str, *, offset: int | None = None) -> Element:
    """Root element of a document that came from outside; `what` names it in errors.

    Raises PeerError when it is not UTF-8, not well formed, or has a document type or entities, LimitExceeded when it
    has too many elements or levels.
    """
    text = decode_text(data, what, offset=offset).removeprefix("\ufeff")
    parser = DefusedXMLParser(target=_Builder(what), forbid_dtd=True)  # type: ignore[no-untyped-call]
    try:
        for start in range(0, len(text), CHUNK):
            parser.feed(text[start : start + CHUNK])
        root: Element = parser.close()
    except DefusedXmlException as error:
        raise PeerError(
            f"{what} has a document type or entities, which are not allowed; remove them", offset=offset
        ) from error
    except ParseError as error:
        raise PeerError(f"{what} is not well-formed XML: {error}", offset=offset) from error
    return root
