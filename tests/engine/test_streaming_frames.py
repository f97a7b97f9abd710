"""A frame while it fills: sums, counts, work ahead, reuse; against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.headers import ACQUISITION_HEADER
from scanside.engine.limits import Limits
from scanside.engine.messages import EncodingLimit, EncodingSpace
from scanside.engine.streaming.frames import CartesianFrame, GatheredFrame
from scanside.engine.streaming.layout import CartesianLayout

COILS, WIDTH = 2, 4


def layout(height: int = 8, depth: int = 1, averages: int = 1) -> CartesianLayout:
    space = EncodingSpace(
        encoded_matrix=(WIDTH, height, depth),
        encoded_fov_mm=(100.0, 100.0, 10.0),
        recon_matrix=(WIDTH, height, depth),
        recon_fov_mm=(100.0, 100.0, 10.0),
        limits={"average": EncodingLimit(0, averages - 1, 0)},
    )
    first = np.zeros((), ACQUISITION_HEADER)
    first["number_of_samples"], first["center_sample"], first["active_channels"] = WIDTH, WIDTH // 2, COILS
    return CartesianLayout.of(space, first, Limits(), crop=True)


def records(rows: list[int], parts: list[int] | None = None) -> np.ndarray:
    headers = np.zeros(len(rows), ACQUISITION_HEADER)
    headers["idx"]["kspace_encode_step_1"] = rows
    headers["idx"]["kspace_encode_step_2"] = 0 if parts is None else parts
    headers["scan_counter"] = np.arange(len(rows))
    return headers


def values(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, COILS, WIDTH, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def put(frame: CartesianFrame, lines: torch.Tensor, headers: np.ndarray, received: float) -> None:
    frame.add(lines, headers, frame.layout.places(headers), received)


def by_hand(lines: torch.Tensor, flat: np.ndarray, height: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Averages and counts, double precision."""
    total = np.zeros((COILS, depth * height, WIDTH), np.complex128)
    counts = np.zeros(depth * height, int)
    for line, place in zip(lines.numpy().astype(np.complex128), flat, strict=True):
        total[:, place] += line
        counts[place] += 1
    shape = (COILS, depth, height, WIDTH)
    return (total / np.maximum(counts, 1)[:, None]).reshape(shape), counts.reshape(depth, height)


placed = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 4)), min_size=1, max_size=40)


@given(placed, st.data())
@settings(max_examples=100, deadline=None)
def test_any_order_any_pieces_repeats_and_lines_outside(places: list[tuple[int, int]], data: st.DataObject) -> None:
    height, depth = 8, 3
    rows, parts = np.array([p[0] for p in places]), np.array([p[1] for p in places])
    frame, lines, headers = CartesianFrame(layout(height, depth), COILS), values(len(places)), records(rows, parts)
    start = 0
    while start < len(places):
        stop = data.draw(st.integers(start + 1, len(places)))
        put(frame, lines[start:stop], headers[start:stop], float(stop))
        start = stop
    inside = (rows < height) & (parts < depth)
    expected, counts = by_hand(lines[torch.from_numpy(inside)], (parts * height + rows)[inside], height, depth)
    np.testing.assert_allclose(frame.averaged(), expected, atol=1e-6)
    np.testing.assert_array_equal(frame.counts, counts)
    np.testing.assert_array_equal(frame.mask, counts > 0)
    assert frame.duplicates == np.maximum(counts - 1, 0).sum()
    assert (frame.outside, frame.readouts, frame.received) == ((~inside).sum(), len(places), len(places))
    assert (frame.header is None) is not bool(inside.any())


def test_header_nearest_the_center_is_kept() -> None:
    frame = CartesianFrame(layout(8, 3), COILS)
    for rows, parts, kept in (
        ([0, 7], [0, 0], 1),
        ([6, 3], [1, 1], 1),
        ([4], [0], None),
        ([4, 4], [1, 1], 0),
        ([4], [1], None),
    ):
        before, headers = frame.header, records(rows, parts)
        headers["user_int"][:, 0] = np.arange(len(rows)) + 10 * rows[0]
        put(frame, values(len(rows)), headers, 0.0)
        assert frame.header is not None
        assert frame.header == (before if kept is None else headers[kept])
    headers[0]["user_int"] = 99
    assert frame.header["user_int"][0] != 99


def test_averages_of_the_header_or_of_the_counters_are_no_duplicates() -> None:
    frame = CartesianFrame(layout(averages=2), COILS)
    put(frame, values(3), records([1, 1, 1]), 0.0)
    assert frame.duplicates == 1
    later = records([1])
    later["idx"]["average"] = 2
    put(frame, values(1), later, 0.0)
    assert (frame.averages, frame.duplicates) == (3, 1)
    frame.clear()
    assert frame.averages == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, complex(0, np.nan)])
def test_lines_that_are_not_finite_are_taken_out(bad: complex) -> None:
    frame, lines = CartesianFrame(layout(), COILS), values(5)
    lines[1, 0, 2] = bad
    lines[4, 1, 0] = bad
    put(frame, lines, records([0, 1, 2, 3, 5]), 0.0)
    assert frame.drop_non_finite() == 2
    assert np.flatnonzero(frame.mask[0]).tolist() == [0, 2, 3]
    assert torch.isfinite(torch.view_as_real(frame.averaged())).all()
    assert frame.drop_non_finite() == 0


def test_data_that_is_not_finite_ends_with_its_frame() -> None:
    frame = CartesianFrame(layout(), COILS)
    put(frame, torch.full((1, COILS, WIDTH), complex(np.nan, np.inf), dtype=torch.complex64), records([3]), 0.0)
    frame.clear()
    put(frame, values(1), records([3]), 0.0)
    assert torch.isfinite(torch.view_as_real(frame.averaged())).all()


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=10), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_a_cleared_frame_is_as_good_as_new(batches: list[list[int]]) -> None:
    used = CartesianFrame(layout(), COILS)
    put(used, values(8, seed=5) * 1e6, records(list(range(8))), 3.0)
    put(used, values(2, seed=6), records([40, 2]), 3.0)
    address = used.lines.data_ptr()
    used.clear()
    new = CartesianFrame(layout(), COILS)
    for seed, rows in enumerate(batches):
        for frame in (used, new):
            put(frame, values(len(rows), seed), records(rows), float(seed))
    assert used.lines.data_ptr() == address
    assert torch.equal(used.averaged(), new.averaged())
    np.testing.assert_array_equal(used.counts, new.counts)
    for name in ("readouts", "outside", "received", "averages", "duplicates", "header"):
        assert getattr(used, name) == getattr(new, name), name


@given(st.lists(st.integers(0, 9), min_size=1, max_size=10), st.booleans())
@settings(max_examples=50, deadline=None)
def test_room_is_where_each_line_is_the_first(rows: list[int], filled: bool) -> None:
    frame, headers = CartesianFrame(layout(), COILS), records(rows)
    put(frame, values(8, seed=5), records(list(range(8))), 1.0)
    frame.clear()
    if filled:
        put(frame, values(1), records([2]), 1.0)
    places = frame.layout.places(headers)
    free = len(set(rows)) == len(rows) and max(rows) < 8 and not (filled and 2 in rows)
    assert frame.room(places) is free
    if free:
        other, lines = CartesianFrame(layout(), COILS), values(len(rows), seed=1)
        put(other, values(1), records([2]), 1.0) if filled else None
        frame.lines[:, torch.from_numpy(places)] = lines.transpose(0, 1)
        frame.note(headers, places, 2.0)
        put(other, lines, headers, 2.0)
        assert torch.equal(frame.averaged(), other.averaged())
        np.testing.assert_array_equal(frame.counts, other.counts)
        assert (frame.readouts, frame.header) == (other.readouts, other.header)


def test_virtual_coils_have_nothing_of_an_earlier_frame() -> None:
    frame = CartesianFrame(layout(), COILS)
    put(frame, values(8), records(list(range(8))), 0.0)
    frame.clear()
    put(frame, values(1), records([3]), 0.0)
    frame.compress(torch.ones(1, COILS, dtype=torch.complex64))
    assert frame.averaged().shape == (1, 1, 8, WIDTH)
    assert np.flatnonzero(frame.averaged().abs().sum((0, 1, 3))).tolist() == [3]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=8), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_gathered_readouts_keep_their_order_however_many_come(sizes: list[int], announced: int) -> None:
    frame, total = GatheredFrame(COILS, announced, WIDTH, 2), sum(sizes)
    lines = values(total)
    headers = records(list(range(total)))
    trajectory = np.random.default_rng(0).random((total, WIDTH, 2), np.float32)
    for clear in (True, False):
        start = 0
        for size in sizes:
            part = slice(start, start + size)
            frame.add(lines[part], trajectory[part], headers[part], float(start))
            start += size
        assert frame.readouts == total
        assert torch.equal(frame.samples[:, :total], lines.transpose(0, 1))
        np.testing.assert_array_equal(frame.trajectory[:total], trajectory)
        np.testing.assert_array_equal(frame.headers[:total], headers)
        assert frame.header == headers[0]
        if clear:
            frame.clear()
