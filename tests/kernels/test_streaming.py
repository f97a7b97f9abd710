"""Transforms on arrival and at the close of a frame against double precision: any size, stride, alignment and grouping."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.kernels import native, streaming

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels in this installation")
SIZES = st.sampled_from([1, 2, 3, 8, 15, 16, 20, 36, 64, 90, 128])


def received(rng: np.random.Generator, shape: tuple[int, int, int], offset: int, gap: int) -> np.ndarray:
    """Samples (readouts, channels, n) in a byte buffer, from `offset` on, with `gap` bytes between readouts."""
    readouts, channels, n = shape
    strides = (8 * channels * n + gap, 8 * n, 8)
    wire = bytearray(offset + readouts * strides[0])
    view = np.ndarray(shape, "<c8", wire, offset, strides)
    view[...] = rng.standard_normal((*shape, 2)).astype(np.float32).view(np.complex64)[..., 0]
    return view


@given(SIZES, st.data())
@settings(max_examples=60, deadline=None)
def test_readouts_become_lines(size: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(size)
    count, width = (data.draw(st.integers(1, size)) for _ in range(2))
    shape = (data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5)), count)
    samples = received(rng, shape, data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9)))
    factors = torch.from_numpy(np.exp(2j * rng.random(width)).astype(np.complex64))
    lines = torch.full((*shape[:2], width), torch.nan, dtype=torch.complex64)
    streaming.readout_lines(samples, factors, size, lines)
    positions = np.arange(-(width // 2), width - width // 2) % size
    expected = np.fft.ifft(samples.astype(np.complex128), size, norm="forward")[..., positions] * factors.numpy()
    np.testing.assert_allclose(lines, expected, atol=1e-6 * np.sqrt(size) * np.abs(samples).max())
    kspace = torch.full((shape[1], data.draw(st.integers(shape[0], 9)), width), torch.nan, dtype=torch.complex64)
    places = rng.permutation(kspace.shape[1])[: len(samples)]
    streaming.readout_lines(samples, factors, size, kspace, places)
    assert torch.equal(kspace[:, torch.from_numpy(places)], lines.transpose(0, 1))
    others = np.setdiff1d(np.arange(kspace.shape[1]), places)
    assert torch.isnan(torch.view_as_real(kspace[:, torch.from_numpy(others)])[..., 0]).all()
    alone = torch.empty_like(lines)
    for index in range(len(samples)):
        streaming.readout_lines(samples[index : index + 1], factors, size, alone[index : index + 1])
    assert torch.equal(alone, lines)


@given(SIZES, st.integers(1, 4), st.integers(1, 40), st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_frames_become_images(n: int, coils: int, inner: int, threads: int) -> None:
    rng = np.random.default_rng(n)
    kspace = rng.standard_normal((coils, n, inner, 2)).astype(np.float32).view(np.complex64)[..., 0]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    image = streaming.root_sum_of_squares(torch.from_numpy(kspace))
    torch.set_num_threads(before)
    images = np.fft.ifft(kspace.astype(np.complex128), axis=1, norm="ortho")
    expected = np.roll(np.sqrt((np.abs(images) ** 2).sum(0)), n // 2, axis=0)
    np.testing.assert_allclose(image, expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    samples = np.zeros((2, 3, 16), np.complex64)
    factors, lines = torch.ones(8, dtype=torch.complex64), torch.empty(2, 3, 8, dtype=torch.complex64)
    kspace = torch.empty(3, 5, 8, dtype=torch.complex64)
    for arguments in (
        (samples, factors, 15, lines),
        (samples, factors[:7], 16, lines),
        (samples, factors, 16, lines.transpose(0, 1)),
        (samples[..., ::2], factors, 16, lines),
        (samples.astype(np.complex128), factors, 16, lines),
        (samples, factors, 16, lines, np.arange(2)),
        (samples, factors, 16, kspace, np.array([0, 5])),
        (samples, factors, 16, kspace, np.array([-1, 0])),
        (samples, factors, 16, kspace, np.arange(3)),
        (samples, factors, 16, kspace, np.arange(2, dtype=np.int32)),
        (samples, factors, 16, kspace, np.arange(4)[::2]),
    ):
        with pytest.raises(ValueError, match="samples"):
            streaming.readout_lines(*arguments)
    assert streaming.root_sum_of_squares(torch.zeros(2, 7, 3, dtype=torch.complex64)) is None
    assert not streaming.takes(7)
