"""The format of spool files: what is written is read, and whatever happens to a file, what is read is what was written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st
from scanside.adapters.files.spool import (
    MAGIC,
    PREAMBLE,
    RECORD,
    SpoolClosing,
    SpoolEncoder,
    SpoolFacts,
    SpoolReader,
    open_spool,
)

FACTS = SpoolFacts(session="0" * 32, started=10**18, monotonic=5, config="mri/sense", parameters={"a.b": 2, "c": "x"})
CLOSING = SpoolClosing(outcome="failed", images=3, text="the worker went away")
PAYLOADS = [b"\xf0\x03" + bytes(range(60)), b"x", bytes(200), b"last one"]


def written(payloads: list[bytes], closing: SpoolClosing | None = CLOSING) -> tuple[bytes, list[int]]:
    """A file, and where its records begin."""
    encoder = SpoolEncoder()
    data, starts = encoder.begin(FACTS), []
    for number, payload in enumerate(payloads):
        starts.append(len(data))
        data += encoder.head(payload, number, 1000 + number) + payload
    if closing is not None:
        starts.append(len(data))
        data += encoder.close(closing)
    return data, starts


FILE, STARTS = written(PAYLOADS)
EDGES = [*STARTS, len(FILE)]


def payloads(reader: SpoolReader) -> list[bytes]:
    return [bytes(record.view) for record in reader.records()]


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=8), st.none() | st.just(CLOSING))
def test_what_is_written_is_read(content: list[bytes], closing: SpoolClosing | None) -> None:
    data, _ = written(content, closing)
    reader = SpoolReader(data)
    records = list(reader.records())
    assert reader.facts == FACTS
    assert [bytes(record.view) for record in records] == content
    assert [(record.messages, record.received) for record in records] == [(n, 1000 + n) for n in range(len(content))]
    assert (reader.fault, reader.closing, reader.end) == (None, closing, len(data))


@given(st.integers(0, len(FILE) - 1))
def test_a_file_that_is_cut_off_anywhere_gives_what_was_whole(size: int) -> None:
    reader = SpoolReader(FILE[:size])
    found = payloads(reader)
    whole = sum(edge <= size for edge in EDGES[1:])
    assert found == PAYLOADS[:whole]
    assert reader.closing is None
    if size in EDGES:
        assert reader.fault is None
    else:
        assert reader.fault is not None
        assert reader.fault.offset == max(edge for edge in (0, PREAMBLE.size, *EDGES) if edge <= size)


@given(st.integers(0, 8 * len(FILE) - 1))
def test_a_flipped_bit_anywhere_is_noticed_before_what_follows_is_used(bit: int) -> None:
    data = bytearray(FILE)
    data[bit // 8] ^= 1 << bit % 8
    reader = SpoolReader(data)
    found = payloads(reader)
    before = [edge for edge in EDGES if edge <= bit // 8]
    assert found == PAYLOADS[: max(0, len(before) - 1)]
    assert reader.fault is not None
    assert reader.fault.offset <= bit // 8
    assert reader.fault.offset >= (before[-1] if before else 0)


@given(st.integers(0, len(FILE)), st.integers(0, len(FILE)), st.binary(max_size=40))
def test_a_file_in_which_anything_is_replaced_gives_a_beginning_of_what_was_written(
    first: int, last: int, middle: bytes
) -> None:
    reader = SpoolReader(FILE[:first] + middle + FILE[last:])
    found = payloads(reader)
    assert found == PAYLOADS[: len(found)]


@given(st.binary(max_size=400))
def test_random_bytes_are_no_file(data: bytes) -> None:
    reader = SpoolReader(data)
    assert (reader.facts, payloads(reader)) == (None, [])
    assert reader.fault is not None


def test_a_record_that_is_missing_or_moved_is_noticed() -> None:
    one, two = FILE[STARTS[1] : STARTS[2]], FILE[STARTS[2] : STARTS[3]]
    for middle in (two, two + one, one + one + two):
        reader = SpoolReader(FILE[: STARTS[1]] + middle + FILE[STARTS[3] :])
        assert len(payloads(reader)) <= 2
        assert reader.fault is not None
        assert "checksum" in reader.fault.text


def test_zeros_after_a_power_cut_are_no_records() -> None:
    reader = SpoolReader(FILE[: STARTS[2]] + bytes(4096))
    assert payloads(reader) == PAYLOADS[:2]
    assert reader.fault is not None
    assert reader.fault.offset == STARTS[2]


def test_another_version_and_another_file_are_named() -> None:
    other = SpoolEncoder()
    data = bytearray(other.begin(FACTS))
    reader = SpoolReader(b"\x89HDF\r\n\x1a\n" + bytes(100))
    assert "no spool file" in reader.fault.text

    data[8:12] = (2).to_bytes(4, "little")
    data[12:16] = crc32c(bytes(data[:12])).to_bytes(4, "little")
    reader = SpoolReader(bytes(data))
    assert (reader.facts, reader.fault.offset) == (None, 8)
    assert "version 2" in reader.fault.text


def test_records_can_be_counted_without_reading_what_is_in_them() -> None:
    data = bytearray(FILE)
    data[STARTS[1] + RECORD.size] ^= 1
    reader = SpoolReader(data)
    assert len(list(reader.records(check=False))) == len(PAYLOADS)
    assert reader.closing == CLOSING
    assert len(payloads(reader)) == 1


@pytest.mark.parametrize("size", [0, len(FILE)])
def test_files_are_read_where_they_lie(tmp_path: Path, size: int) -> None:
    path = tmp_path / "one.scanspool"
    path.write_bytes(FILE[:size])
    reader = open_spool(path)
    assert payloads(reader) == (PAYLOADS if size else [])
    assert (reader.fault is None) == bool(size)


def test_the_document_has_the_numbers_of_the_code() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "spool.md").read_text()
    example = bytes.fromhex("".join(re.search(r"```hex\n(.*?)```", text, re.DOTALL)[1].split()))
    reader = SpoolReader(example)
    (record,) = reader.records()
    assert example.startswith(MAGIC)
    assert (reader.fault, bytes(record.view)) == (None, b"\x04\x00")
    assert reader.closing is not None
