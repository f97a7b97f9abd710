"""Attributes: any names and values come back, ismrmrd reads what we write, hostile XML is refused."""

from __future__ import annotations

import ismrmrd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scanside.adapters.mrd_meta import meta_from_xml, meta_to_xml
from scanside.engine.errors import LimitExceeded, PeerError

# Characters of XML 1.0; its parser must hand back all of them, carriage returns too.
characters = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff") | st.sampled_from(
    "\t\n\r"
)
words = st.text(characters, max_size=20)


@given(meta=st.dictionaries(st.text(characters, min_size=1, max_size=20), st.lists(words, max_size=4), max_size=5))
def test_round_trip(meta: dict[str, list[str]]) -> None:
    assert meta_from_xml(meta_to_xml(meta)) == meta


def test_ismrmrd_reads_and_writes_the_same() -> None:
    meta = {"DataRole": ["Image"], "ImageRowDir": ["1", "0", "0"], "ImageComments": ["a < b & 'c' > \"d\" ü"]}
    theirs = ismrmrd.Meta.deserialize(meta_to_xml(meta).decode())
    assert theirs == {"DataRole": "Image", "ImageRowDir": ["1", "0", "0"], "ImageComments": meta["ImageComments"][0]}
    assert meta_from_xml(theirs.serialize().encode()) == meta


@pytest.mark.parametrize("empty", [b"", b"\0", b" \n\0", b"<ismrmrdMeta/>", b"<?xml version='1.0'?>\n<ismrmrdMeta/>\0"])
def test_no_attributes(empty: bytes) -> None:
    assert meta_from_xml(empty) == {}
    assert meta_to_xml({}) == b""


def test_repeated_names_and_namespaces() -> None:
    xml = b"<m:ismrmrdMeta xmlns:m='urn:x'><m:meta><m:name>a</m:name><m:value>1</m:value></m:meta>"
    xml += b"<meta><name>a</name><value>2</value><value/></meta></m:ismrmrdMeta>\0garbage"
    assert meta_from_xml(xml) == {"a": ["1", "2", ""]}


@pytest.mark.parametrize(
    ("xml", "words"),
    [
        (b"<other/>", "starts? with <other>"),
        (b"<ismrmrdMeta><meta><value>1</value></meta></ismrmrdMeta>", "no <name>"),
        (b"<ismrmrdMeta>", "not well-formed"),
        (b"<ismrmrdMeta>\xff</ismrmrdMeta>", "not UTF-8"),
        (b"<!DOCTYPE x [<!ENTITY a 'b'>]><ismrmrdMeta>&a;</ismrmrdMeta>", "document type or entities"),
        ("<ismrmrdMeta/>".encode("utf-16"), "not UTF-8"),
    ],
)
def test_refused(xml: bytes, words: str) -> None:
    with pytest.raises(PeerError, match=words) as caught:
        meta_from_xml(xml, offset=12)
    assert caught.value.offset == 12


@pytest.mark.parametrize("xml", [b"<a>" * 40, b"<ismrmrdMeta>" + b"<meta/>" * 200_001])
def test_documents_beyond_any_honest_size(xml: bytes) -> None:
    with pytest.raises(LimitExceeded, match="200000 elements or 32 levels"):
        meta_from_xml(xml)


@pytest.mark.parametrize("value", ["\0", "\x1b[0m", "\ud800", "\uffff"])
def test_characters_that_xml_cannot_hold(value: str) -> None:
    with pytest.raises(ValueError, match="XML cannot hold"):
        meta_to_xml({"name": [value]})
    with pytest.raises(ValueError, match="XML cannot hold"):
        meta_to_xml({value: ["value"]})
