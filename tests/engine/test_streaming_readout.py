"""Readouts become lines: against the transform written out as a sum in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.errors import LimitExceeded, PeerError
from scanside.engine.headers import ACQUISITION_HEADER, AcquisitionFlag
from scanside.engine.limits import Limits
from scanside.engine.messages import EncodingLimit, EncodingSpace
from scanside.engine.streaming.layout import CartesianLayout
from scanside.engine.streaming.readout import ReadoutTransform
from scanside.kernels import streaming

REVERSE = AcquisitionFlag.IS_REVERSE.bit


def space(encoded: int, kept: int, height: int = 4, **more: object) -> EncodingSpace:
    return EncodingSpace(
        encoded_matrix=(encoded, height, 1),
        encoded_fov_mm=(10.0 * encoded, 200.0, 5.0),
        recon_matrix=(kept, height, 1),
        recon_fov_mm=(10.0 * kept, 200.0, 5.0),
        **more,
    )


def headers(count: int, samples: int, center: int, channels: int = 1) -> np.ndarray:
    records = np.zeros(count, ACQUISITION_HEADER)
    records["number_of_samples"], records["center_sample"] = samples, center
    records["active_channels"] = channels
    return records


def explicit(readout: np.ndarray, center: int, size: int, width: int) -> np.ndarray:
    """Centered inverse DFT of unit norm as a sum, for positions -width//2 ... of `size`."""
    positions = np.arange(-(width // 2), width - width // 2)
    frequencies = np.arange(len(readout)) - center
    return np.exp(2j * np.pi * np.outer(positions, frequencies) / size) @ readout.astype(np.complex128) / np.sqrt(size)


def on_the_wire(records: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same readouts as views on one byte string: id, header and data of one message after the other."""
    message = np.dtype([("id", "<u2"), ("header", ACQUISITION_HEADER), ("data", "<c8", samples.shape[1:])])
    messages = np.zeros(len(records), message)
    messages["id"], messages["header"], messages["data"] = 1008, records, samples
    view = np.frombuffer(b"\x00" + messages.tobytes(), np.uint8)[1:].view(message)
    return view["header"], view["data"]


@st.composite
def readouts(draw: st.DrawFn) -> tuple[int, int, int, int, int, int, int]:
    size = draw(st.integers(2, 40))
    kept = draw(st.integers(1, size))
    samples = draw(st.integers(1, size))
    center = draw(st.integers(0, samples - 1))
    return size, kept, samples, center, draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(0, 99))


@given(readouts(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_lines_are_the_centered_transform_cropped(given_sizes: tuple[int, ...], crop: bool) -> None:
    size, kept, samples, center, channels, count, seed = given_sizes
    rng = np.random.default_rng(seed)
    data = rng.standard_normal((count, channels, samples, 2)).astype(np.float32).view(np.complex64)[..., 0]
    records = headers(count, samples, center, channels)
    records["flags"][rng.random(count) < 0.4] = REVERSE
    layout = CartesianLayout.of(space(size, kept), records[0], Limits(), crop=crop)
    wire_headers, wire_data = on_the_wire(records, data)
    assert not wire_data.flags.aligned
    ((part, lines),) = ReadoutTransform(layout, channels).lines(wire_data, wire_headers)
    assert part == slice(0, count)
    for index in range(count):
        for channel in range(channels):
            backwards = bool(records["flags"][index])
            row = data[index, channel, ::-1] if backwards else data[index, channel]
            middle = samples - 1 - layout.center_sample if backwards else layout.center_sample
            expected = explicit(row, middle, layout.readout, layout.width)
            np.testing.assert_allclose(lines[index, channel], expected, atol=2e-6 * np.abs(row).sum() + 1e-7)


@given(readouts(), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_lines_are_the_same_when_they_are_put_in_place_at_once(
    given_sizes: tuple[int, ...], turned: bool, mixed: bool
) -> None:
    size, kept, samples, center, channels, count, seed = given_sizes
    rng = np.random.default_rng(seed)
    data = rng.standard_normal((count, channels, samples, 2)).astype(np.float32).view(np.complex64)[..., 0]
    records = headers(count, samples, center, channels)
    records["center_sample"][rng.random(count) < 0.4] = 0
    records["flags"][-1] = REVERSE if turned else 0
    layout = CartesianLayout.of(space(size, kept), records[0], Limits(), crop=True)
    transform = ReadoutTransform(layout, channels, torch.eye(channels, dtype=torch.complex64) if mixed else None)
    wire_headers, wire_data = on_the_wire(records, data)
    places, kspace = rng.permutation(9)[:count], torch.zeros(channels, 9, layout.width, dtype=torch.complex64)
    done = transform.place(wire_data, wire_headers, places, kspace)
    assert done is (streaming.takes(layout.readout) and not turned and not mixed)
    ((_, lines),) = transform.lines(wire_data, wire_headers)
    expected = torch.zeros_like(kspace)
    if done:
        expected[:, torch.from_numpy(places)] = lines.transpose(0, 1)
    assert torch.equal(kspace, expected)


def test_each_readout_has_its_own_center(rng: np.random.Generator) -> None:
    data = rng.standard_normal((3, 1, 12, 2)).astype(np.float32).view(np.complex64)[..., 0]
    records = headers(3, 12, 6)
    records["center_sample"] = 6, 3, 200
    layout = CartesianLayout.of(space(16, 16), records[0], Limits(), crop=True)
    ((_, lines),) = ReadoutTransform(layout, 1).lines(data, records)
    for index, center in enumerate((6, 3, 6)):
        np.testing.assert_allclose(lines[index, 0], explicit(data[index, 0], center, 16, 16), atol=1e-5)


def test_discarded_samples_count_as_zero_in_the_order_of_time(rng: np.random.Generator) -> None:
    data = rng.standard_normal((3, 2, 16, 2)).astype(np.float32).view(np.complex64)[..., 0]
    data[:, :, :3] = np.nan
    records = headers(3, 16, 8, 2)
    records["discard_pre"], records["discard_post"][1:] = 3, 2
    records["flags"][2] = REVERSE
    clean = data.copy()
    clean[:, :, :3] = 0
    clean[1:, :, 14:] = 0
    layout = CartesianLayout.of(space(16, 16), records[0], Limits(), crop=True)
    ((_, lines),) = ReadoutTransform(layout, 2).lines(data, records)
    np.testing.assert_allclose(lines[0, 1], explicit(clean[0, 1], 8, 16, 16), atol=1e-5)
    np.testing.assert_allclose(lines[1, 0], explicit(clean[1, 0], 8, 16, 16), atol=1e-5)
    np.testing.assert_allclose(lines[2, 0], explicit(clean[2, 0, ::-1], 7, 16, 16), atol=1e-5)


@pytest.mark.parametrize("center", [16, 17, 32, 400])
def test_center_beyond_the_readout_after_oversampling_was_removed(center: int, rng: np.random.Generator) -> None:
    data = rng.standard_normal((1, 1, 16, 2)).astype(np.float32).view(np.complex64)[..., 0]
    records = headers(1, 16, center)
    layout = CartesianLayout.of(space(32, 16), records[0], Limits(), crop=True)
    assert (layout.readout, layout.width, layout.center_sample) == (16, 16, 8)
    assert layout.width_fov_mm == pytest.approx(160)
    ((_, lines),) = ReadoutTransform(layout, 1).lines(data, records)
    np.testing.assert_allclose(lines[0, 0], explicit(data[0, 0], 8, 16, 16), atol=1e-5)


def test_whitening_mixes_the_coils_of_every_line(rng: np.random.Generator) -> None:
    data = rng.standard_normal((4, 3, 16, 2)).astype(np.float32).view(np.complex64)[..., 0]
    matrix = rng.standard_normal((2, 3)) + 1j * rng.standard_normal((2, 3))
    records = headers(4, 16, 8, 3)
    layout = CartesianLayout.of(space(16, 8), records[0], Limits(), crop=True)
    transform = ReadoutTransform(layout, 3, torch.from_numpy(matrix).to(torch.complex64))
    ((_, lines),) = transform.lines(data, records)
    assert lines.shape == (4, 2, 8)
    plain = np.stack([[explicit(coil, 8, 16, 8) for coil in readout] for readout in data])
    np.testing.assert_allclose(lines, np.einsum("oc,ncx->nox", matrix, plain), atol=2e-5)


def test_long_runs_come_in_pieces_and_leave_nothing_behind(rng: np.random.Generator) -> None:
    channels, samples = 64, 512
    records = headers(40, samples, samples // 2, channels)
    layout = CartesianLayout.of(space(samples, 8), records[0], Limits(), crop=True)
    transform = ReadoutTransform(layout, channels)
    assert 1 <= transform.chunk < 40
    data = np.zeros((40, channels, samples), np.complex64)
    data[:, :, rng.integers(samples)] = np.arange(40)[:, None]
    seen = 0
    for part, lines in transform.lines(data, records):
        assert part.start == seen
        expected = np.broadcast_to(np.arange(seen, part.stop)[:, None, None] / np.sqrt(samples), lines.shape)
        np.testing.assert_allclose(lines.abs(), expected, rtol=1e-4)
        seen = part.stop
    assert seen == 40


def test_views_with_any_strides(rng: np.random.Generator) -> None:
    wide = rng.standard_normal((2, 3, 32, 2)).astype(np.float32).view(np.complex64)[..., 0]
    records = headers(2, 16, 8, 3)
    layout = CartesianLayout.of(space(16, 16), records[0], Limits(), crop=True)
    ((_, strided),) = ReadoutTransform(layout, 3).lines(wide[..., ::2], records)
    ((_, plain),) = ReadoutTransform(layout, 3).lines(wide[..., ::2].copy(), records)
    assert torch.equal(strided, plain)


def test_readout_longer_than_the_matrix_is_refused() -> None:
    with pytest.raises(PeerError, match=r"number_of_samples is 40, encodedSpace\.matrixSize\.x only 32"):
        CartesianLayout.of(space(32, 32), headers(1, 40, 3)[0], Limits(), crop=True)


def test_frame_above_the_limit_is_refused_with_the_remedy() -> None:
    with pytest.raises(LimitExceeded, match=r"k-space of one frame is 2048.*raise limits\.frame_bytes"):
        CartesianLayout.of(space(64, 64), headers(1, 64, 32)[0], Limits(frame_bytes=2047), crop=True)


def test_limits_place_rows_and_what_lies_outside_is_not_announced() -> None:
    limits = {"kspace_encode_step_1": EncodingLimit(0, 9, 4), "average": EncodingLimit(3, 1, 0)}
    layout = CartesianLayout.of(space(16, 16, height=16, limits=limits), headers(1, 16, 8)[0], Limits(), crop=True)
    assert layout.row(np.array([0, 4, 20])).tolist() == [4, 8, 24]
    assert np.flatnonzero(layout.announced()[0]).tolist() == list(range(4, 14))
    assert layout.averages == 1
    limits = {"kspace_encode_step_1": EncodingLimit(0, 3, 40)}
    layout = CartesianLayout.of(space(16, 16, height=16, limits=limits), headers(1, 16, 8)[0], Limits(), crop=True)
    assert not layout.announced().any()


def test_an_asymmetric_echo_is_recognized() -> None:
    for samples, center, asymmetric in ((32, 16, False), (31, 15, True), (24, 8, True), (24, 16, True), (32, 15, True)):
        layout = CartesianLayout.of(space(32, 32), headers(1, samples, center)[0], Limits(), crop=True)
        assert layout.asymmetric is asymmetric, (samples, center)
