"""What a mask says, against looking at every possibility."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scanside.engine.headers import ACQUISITION_HEADER
from scanside.engine.limits import Limits
from scanside.engine.messages import EncodingLimit, EncodingSpace
from scanside.engine.streaming.layout import CartesianLayout
from scanside.engine.streaming.sampling import Sampling, central_block, lattice

masks = st.tuples(st.integers(1, 6), st.integers(1, 24)).flatmap(lambda shape: arrays.arrays(bool, shape))
dense = st.tuples(st.integers(1, 6), st.integers(1, 24)).flatmap(
    lambda shape: arrays.arrays(bool, shape, elements=st.sampled_from([True] * 7 + [False]))
)


def layout(shape: tuple[int, int], acceleration: tuple[int, int] = (1, 1), **limits: EncodingLimit) -> CartesianLayout:
    depth, height = shape
    space = EncodingSpace(
        encoded_matrix=(8, height, depth),
        encoded_fov_mm=(80.0, 80.0, 10.0),
        recon_matrix=(8, height, depth),
        recon_fov_mm=(80.0, 80.0, 10.0),
        acceleration=acceleration,
        limits=limits,
    )
    first = np.zeros((), ACQUISITION_HEADER)
    first["number_of_samples"], first["center_sample"], first["active_channels"] = 8, 4, 1
    return CartesianLayout.of(space, first, Limits(), crop=True)


def box_of(mask: np.ndarray) -> tuple[slice, slice]:
    parts, rows = np.nonzero(mask)
    if not len(parts):
        return slice(0, 0), slice(0, 0)
    return slice(int(parts.min()), int(parts.max()) + 1), slice(int(rows.min()), int(rows.max()) + 1)


def on_lattice(mask: np.ndarray, found: tuple[tuple[int, int], tuple[int, int]]) -> np.ndarray:
    """Points of the box that belong to a lattice."""
    (rz, oz), (ry, oy) = found
    z, y = np.indices(mask.shape)
    inside = np.zeros_like(mask)
    inside[box_of(mask)] = True
    return inside & (z % rz == oz) & (y % ry == oy)


@given(masks)
@settings(max_examples=150, deadline=None)
def test_full_missing_and_extent(mask: np.ndarray) -> None:
    found = Sampling.of(mask, layout(mask.shape))
    assert found.extent == box_of(mask)
    assert found.full is bool(mask.all())
    assert found.missing == int((~mask).sum())
    assert found.acceleration == mask.size / max(1, mask.sum())


@given(masks, st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_missing_lines_of_an_accelerated_scan_with_the_best_offset(mask: np.ndarray, ry: int, rz: int) -> None:
    assume((ry, rz) != (1, 1))
    found = Sampling.of(mask, layout(mask.shape, (ry, rz)))
    gaps = []
    for oz, oy in itertools.product(range(rz), range(ry)):
        wanted = np.zeros_like(mask)
        wanted[oz::rz, oy::ry] = True
        if wanted.any():
            gaps.append(int((wanted & ~mask).sum()))
    assert found.missing == min(gaps)


def test_missing_lines_at_the_edge_of_an_accelerated_scan_count() -> None:
    limits = {"kspace_encode_step_1": EncodingLimit(0, 11, 4)}
    mask = np.zeros((1, 16), bool)
    mask[0, 4:16:2] = True
    assert Sampling.of(mask, layout((1, 16), (2, 1), **limits)).missing == 0
    mask[0, 14] = mask[0, 4] = False
    assert Sampling.of(mask, layout((1, 16), (2, 1), **limits)).missing == 2


@given(masks | dense, st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=300, deadline=None)
def test_a_lattice_is_found_where_there_is_one_and_only_there(mask: np.ndarray, ry: int, rz: int) -> None:
    found = lattice(mask, box_of(mask), (ry, rz))
    if found is not None:
        assert mask[on_lattice(mask, found)].all()
        assert on_lattice(mask, found).any()
    if ry > 1 and rz > 1:
        possible = [
            int(points.sum())
            for oz, oy in itertools.product(range(rz), range(ry))
            if (points := on_lattice(mask, ((rz, oz), (ry, oy)))).any() and mask[points].all()
        ]
        assert (found is not None) is bool(possible)
        if found is not None:
            assert found[0][0] == rz
            assert found[1][0] == ry
            assert int(on_lattice(mask, found).sum()) == max(possible)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_lattice_with_a_calibration_block_is_read_off_the_mask(data: st.DataObject) -> None:
    depth, height = data.draw(st.integers(1, 12)), data.draw(st.integers(24, 48))
    ry, rz = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3)) if depth > 6 else 1
    oy, oz = data.draw(st.integers(0, ry - 1)), data.draw(st.integers(0, rz - 1))
    declared = (ry, rz) if rz > 1 else data.draw(st.sampled_from([(ry, 1), (1, 1)]))
    mask = np.zeros((depth, height), bool)
    mask[oz::rz, oy::ry] = True
    size = data.draw(st.integers(0, 8))
    mask[max(0, depth // 2 - 2) : depth // 2 + 2, height // 2 - size // 2 : height // 2 + size // 2] = True
    found = lattice(mask, box_of(mask), declared)
    assert found == ((rz, oz), (ry, oy))


@pytest.mark.parametrize("lost", range(0, 32, 4))
def test_one_lost_line_breaks_the_lattice(lost: int) -> None:
    mask = np.zeros((1, 32), bool)
    mask[0, ::4] = True
    assert lattice(mask, box_of(mask), (4, 1)) == ((1, 0), (4, 0))
    mask[0, lost] = False
    found = lattice(mask, box_of(mask), (4, 1))
    assert found == (((1, 0), (4, 0)) if lost in (0, 28) else None)
    assert Sampling.of(mask, layout((1, 32), (4, 1))).missing == 1


@pytest.mark.parametrize("lost", [{10}, {1}, {62}, set(range(10, 15)), set(range(1, 6)), {7, 9, 40}])
def test_a_full_scan_that_lost_lines_has_no_lattice(lost: set[int]) -> None:
    """The distance across a gap is no plan: SENSE by it would throw most of the lines away."""
    mask = np.ones((1, 64), bool)
    mask[0, sorted(lost)] = False
    found = Sampling.of(mask, layout(mask.shape))
    assert (found.lattice, found.missing, found.full) == (None, len(lost), False)


@pytest.mark.parametrize(("every", "calibration"), [(2, 0), (2, 24), (3, 24), (4, 16)])
def test_a_lattice_that_no_header_declares_is_found(every: int, calibration: int) -> None:
    mask = np.zeros((1, 64), bool)
    mask[0, ::every] = True
    mask[0, 32 - calibration // 2 : 32 + calibration // 2] = True
    assert Sampling.of(mask, layout(mask.shape)).lattice == ((1, 0), (every, 0))


@pytest.mark.parametrize("acceleration", [(1, 1), (3, 1)])
def test_nothing_and_one_line(acceleration: tuple[int, int]) -> None:
    mask = np.zeros((1, 12), bool)
    nothing = Sampling.of(mask, layout((1, 12), acceleration))
    assert (nothing.full, nothing.lattice, nothing.partial) == (False, None, (False, False))
    assert nothing.acceleration == 12
    assert nothing.missing == 12 // acceleration[0]
    mask[0, 6] = True
    one = Sampling.of(mask, layout((1, 12), acceleration))
    assert one.extent == (slice(0, 1), slice(6, 7))
    assert one.missing == 12 // acceleration[0] - 1
    assert central_block(mask, 24) is None


@pytest.mark.parametrize(
    ("rows", "partial"),
    [((0, 64), False), ((24, 64), True), ((0, 40), True), ((8, 64), True), ((4, 64), False), ((16, 48), False)],
)
def test_partial_fourier_is_k_space_left_out_on_one_side(rows: tuple[int, int], partial: bool) -> None:
    mask = np.zeros((1, 64), bool)
    mask[0, slice(*rows)] = True
    assert Sampling.of(mask, layout((1, 64), (2, 1))).partial == (False, partial)
    assert Sampling.of(np.repeat(mask.T, 8, axis=1), layout((64, 8), (2, 1))).partial == (partial, False)


@given(masks | dense, st.integers(1, 24))
@settings(max_examples=300, deadline=None)
def test_the_central_block_is_full_central_and_as_large_as_can_be(mask: np.ndarray, largest: int) -> None:
    depth, height = mask.shape
    runs = [
        (start, stop)
        for start in range(height // 2 + 1)
        for stop in range(height // 2 + 1, height + 1)
        if stop - start <= largest and mask[depth // 2, start:stop].all()
    ]
    longest = max((stop - start for start, stop in runs), default=0)
    found = central_block(mask, largest)
    assert (found is not None) is (longest >= min(8, height))
    if found is None:
        return
    parts, rows = found
    assert mask[found].all()
    assert parts.start <= depth // 2 < parts.stop
    assert rows.stop - rows.start == longest

    def off(start: int, stop: int) -> int:
        return abs(start - (height // 2 - (stop - start) // 2))

    assert off(rows.start, rows.stop) == min(off(*run) for run in runs if run[1] - run[0] == longest)
    thicker = [
        stop - start
        for start in range(depth // 2 + 1)
        for stop in range(depth // 2 + 1, depth + 1)
        if stop - start <= largest and mask[start:stop, rows].all()
    ]
    assert parts.stop - parts.start == max(thicker)
