"""Coil compression keeps the energy it says, keeps white noise white, and follows a varying coil subspace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.preparation.compression import coil_compression, geometric_compression


def low_rank_data(rng: np.random.Generator, coils: int, rank: int) -> torch.Tensor:
    mixing = rng.standard_normal((coils, rank, 2)) @ [1, 1j]
    return torch.from_numpy(np.einsum("cr,rzyx->czyx", mixing, rng.standard_normal((rank, 1, 12, 20, 2)) @ [1, 1j]))


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), coils=st.integers(2, 10), channels=st.integers(1, 12))
def test_rows_are_orthonormal_and_energy_is_reported(seed, coils, channels):
    data = torch.from_numpy(np.random.default_rng(seed).standard_normal((coils, 1, 4, 16, 2)) @ [1, 1j])
    result = coil_compression(data, channels)
    kept = min(coils, channels)
    assert result.channels == kept
    torch.testing.assert_close(result.matrix @ result.matrix.mH, torch.eye(kept, dtype=torch.complex128))
    energy = result.apply(data).abs().square().sum() / data.abs().square().sum()
    assert energy.item() == pytest.approx(result.energy_kept)


def test_low_rank_data_lose_nothing(rng):
    data = low_rank_data(rng, 8, 3)
    result = coil_compression(data, 3)
    assert result.energy_kept == pytest.approx(1.0)
    restored = torch.einsum("vc,vzyx->czyx", result.matrix.conj(), result.apply(data))
    torch.testing.assert_close(restored, data)


def test_coils_may_lie_along_any_axis(rng):
    data = low_rank_data(rng, 6, 4).to(torch.complex64)
    there = coil_compression(data, 4)
    moved = coil_compression(data.movedim(0, 2), 4, coil_dim=2)
    torch.testing.assert_close(there.matrix, moved.matrix)
    torch.testing.assert_close(moved.apply(data.movedim(0, 2), coil_dim=2), there.apply(data).movedim(0, 2))


def varying_data(rng: np.random.Generator) -> torch.Tensor:
    """Eight coils whose two-dimensional subspace turns along x."""
    angle = np.linspace(0, np.pi / 2, 32)
    first = np.concatenate([np.cos(angle)[None] * np.eye(8)[:, :1], np.sin(angle)[None] * np.eye(8)[:, 1:2]]).reshape(
        2, 8, 32
    )
    basis = np.stack([first.sum(0), np.tile(np.eye(8)[:, 2:3], 32)])
    return torch.from_numpy(np.einsum("rcx,ryx->cyx", basis, rng.standard_normal((2, 24, 32, 2)) @ [1, 1j])[:, None])


def test_geometric_compression_follows_the_subspace(rng):
    data = varying_data(rng)
    along = geometric_compression(data, 2, window=1)
    assert along.energy_kept == pytest.approx(1.0)
    assert coil_compression(data, 2).energy_kept < 0.95
    products = along.matrix @ along.matrix.mH
    torch.testing.assert_close(products, torch.eye(2, dtype=torch.complex128).expand_as(products))


def test_geometric_compression_is_smooth_along_x(rng):
    matrix = geometric_compression(varying_data(rng), 2, window=3).matrix
    step = (matrix[1:] - matrix[:-1]).abs().amax()
    assert step < 0.2


def test_geometric_compression_applies_per_position(rng):
    data = varying_data(rng)
    result = geometric_compression(data, 2)
    expected = torch.stack([result.matrix[x] @ data[:, 0, :, x] for x in range(32)], dim=-1)
    torch.testing.assert_close(result.apply(data)[:, 0], expected)


def test_no_channels_are_refused():
    with pytest.raises(ValueError, match="channels is 0"):
        coil_compression(torch.ones(2, 1, 1, 4, dtype=torch.complex64), 0)
