"""Attributes of images and of dependency answers: `ismrmrdMeta` XML to and from a dict of value lists."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from scanside.engine.errors import PeerError

from .mrd_xml import parse_xml

__all__ = ["meta_from_xml", "meta_to_xml"]

BLANK = b"\0 \t\r\n"
FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What is no character of XML 1.0 (section 2.2)."""


def meta_from_xml(xml: bytes | memoryview, *, offset: int | None = None) -> dict[str, list[str]]:
    """Values by name; a name that occurs twice has the values of both. Empty input has none.

    Raises PeerError when the text is not an `ismrmrdMeta` document or a `meta` has no name, LimitExceeded when it is
    too complex.
    """
    raw = bytes(xml)
    if not raw.strip(BLANK):
        return {}
    root = parse_xml(raw, "ismrmrdMeta text", offset=offset)
    if root.tag != "ismrmrdMeta":
        raise PeerError(f"attributes start with <{root.tag[:64]}>; expected <ismrmrdMeta>", offset=offset)
    meta: dict[str, list[str]] = {}
    for item in root.iterfind("meta"):
        name = item.findtext("name")
        if not name:
            raise PeerError("a <meta> of the attributes has no <name>", offset=offset)
        meta.setdefault(name, []).extend(value.text or "" for value in item.iterfind("value"))
    return meta


def meta_to_xml(meta: Mapping[str, Sequence[str]]) -> bytes:
    """The `ismrmrdMeta` document of `meta`, UTF-8, without NUL; empty for no attributes.

    Raises ValueError for a name or value with characters that XML cannot hold.
    """
    if not meta:
        return b""
    items = "".join(
        f"<meta><name>{_text(name)}</name>{''.join(f'<value>{_text(value)}</value>' for value in values)}</meta>"
        for name, values in meta.items()
    )
    return f'<?xml version="1.0" encoding="utf-8"?>\n<ismrmrdMeta>{items}</ismrmrdMeta>\n'.encode()


def _text(value: str) -> str:
    if FORBIDDEN.search(value):
        raise ValueError(f"attribute {value[:40]!r} has a character that XML cannot hold; encode it first")
    return escape(value, {"\r": "&#13;"})
