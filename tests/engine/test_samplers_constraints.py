"""Constraints on an estimate, against explicit float64 mathematics."""

from __future__ import annotations

import pytest
import torch
from scanside.engine.config_priors import ConstraintConfig
from scanside.engine.errors import ConfigError
from scanside.engine.operators import Fourier, Hankel
from scanside.engine.operators.hankel import image_low_rank
from scanside.engine.samplers.constraints import clip, frozen_low_rank, low_rank, make_constraint
from scanside.engine.simulation.coils import coil_maps
from scanside.engine.simulation.phantom import shepp_logan

SIZE, COILS = 40, 4


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def images():
    """Coil images (coil, 1, y, x) of a phantom."""
    maps = torch.from_numpy(coil_maps(COILS).image((SIZE, SIZE)))
    return (maps * torch.from_numpy(shepp_logan().image((SIZE, SIZE))))[:, None]


def test_every_slice_and_every_member_of_a_batch_on_its_own(images):
    noisy = torch.stack([images, images.flip(-1)]) + 0.02 * random(2, COILS, 3, SIZE, SIZE)
    together = low_rank(noisy, 4, 20)
    assert together.shape == noisy.shape
    for batch in range(2):
        for z in range(3):
            assert torch.allclose(together[batch, :, z], image_low_rank(noisy[batch, :, z], 4, 20))


def test_a_frozen_subspace_is_the_explicit_projection(images):
    """Rows of the Hankel matrix times V V^H with V from the singular value decomposition of the calibration region."""
    window, rank = 5, 30
    k = Fourier(images.shape, dtype=images.dtype)(images)[:, 0]
    middle = slice(SIZE // 2 - 10, SIZE // 2 + 10)
    calibration = k[:, middle, middle]
    V = torch.linalg.svd(Hankel(calibration.shape, window)(calibration))[2].mH[:, :rank]
    H = Hankel(k.shape, window)
    explicit = H.average(H(k) @ V @ V.mH)[:, window:-window, window:-window]
    after = frozen_low_rank(calibration, (SIZE, SIZE), window=window, rank=rank)(images)
    found = Fourier(images.shape, dtype=images.dtype)(after)[:, 0, window:-window, window:-window]
    assert float((found - explicit).norm() / explicit.norm()) < 1e-6


def test_a_frozen_subspace_takes_away_noise_for_batches_and_slices(images):
    k = Fourier(images.shape, dtype=images.dtype)(images)[:, 0]
    project = frozen_low_rank(k[:, 10:-10, 10:-10], (SIZE, SIZE), window=5, rank=40)
    noise = 0.05 * random(2, COILS, 3, SIZE, SIZE)
    after = project(images + noise)
    assert float((after - images).norm()) < 0.8 * float(noise.norm())
    assert torch.allclose(after[1, :, 2], project((images + noise)[1])[:, 2])


def test_limits_hold_for_both_parts():
    assert torch.equal(clip(torch.tensor([2 - 3j, 0.5 + 0.1j]), 1.0), torch.tensor([1 - 1j, 0.5 + 0.1j]))


def test_the_configuration_says_which(images):
    none, limited = make_constraint(ConstraintConfig()), make_constraint(ConstraintConfig(kind="clip", limit=0.1))
    assert none(images) is images
    assert float(torch.view_as_real(limited(images)).abs().max()) == 0.1
    ranked = make_constraint(ConstraintConfig(kind="low_rank", window=4, rank=9))
    assert torch.equal(ranked(images), low_rank(images, 4, 9))


def test_a_rank_of_all_columns_asks_nothing(images):
    assert low_rank(images, 4, 16 * COILS) is images
    assert not torch.equal(low_rank(images, 4, 16 * COILS - 1), images)


def test_frames_stand_where_coils_do(images):
    """The low rank of frames (frame, coil, z, y, x) is for each coil that of its frames."""
    frames = torch.stack([images, 0.5 * images + 0.1 * random(*images.shape)])
    found = make_constraint(ConstraintConfig(kind="low_rank", window=4, rank=20, over="frames"))(frames)
    for coil in range(COILS):
        assert torch.allclose(found[:, coil, 0], image_low_rank(frames[:, coil, 0], 4, 20))
    with pytest.raises(ConfigError, match=r"reconstruction\.frames"):
        make_constraint(ConstraintConfig(kind="low_rank", over="frames"))(images)


def test_a_share_bounds_the_rank_where_there_are_few_coils(images):
    """115 of 8 x 8 windows asks four coils for 115 of 256 columns, and one, of 64, for 28: that there is air round the object."""
    config = ConstraintConfig(kind="low_rank", window=8, rank=115, share=0.45)
    assert torch.equal(make_constraint(config)(images), low_rank(images, 8, 115))
    alone = images[:1]
    assert torch.equal(make_constraint(config)(alone), low_rank(alone, 8, 28))
    assert low_rank(alone, 8, 115) is alone
    frames = torch.stack([alone, alone])
    over = ConstraintConfig(kind="low_rank", window=8, rank=115, share=0.45, over="frames")
    assert torch.equal(make_constraint(over)(frames), low_rank(frames.transpose(0, 1), 8, 57).transpose(0, 1))
    noisy = alone + 0.05 * random(*alone.shape)
    after = make_constraint(config)(noisy)
    assert float((after - alone).norm()) < 0.9 * float((noisy - alone).norm())


def test_the_rank_is_what_the_energy_of_the_matrix_needs(images):
    """By the singular values of the explicit matrix, of windows that wrap round k-space; never above the rank asked for."""
    alone = images[:1] + 0.01 * random(*images[:1].shape)
    k = Fourier(alone.shape, dtype=alone.dtype)(alone)[:, 0]
    wrapped = torch.cat([torch.cat([k, k[..., :4]], -1), torch.cat([k[:, :4], k[:, :4, :4]], -1)], -2)
    energies = torch.linalg.svdvals(Hankel(wrapped.shape, 5)(wrapped)).square()
    needed = 1 + int((energies.cumsum(0) < 0.99 * energies.sum()).sum())
    assert 1 < needed < 25
    found = make_constraint(ConstraintConfig(kind="low_rank", window=5, rank=25, energy=0.99))(alone)
    assert torch.allclose(found, low_rank(alone, 5, needed))
    bounded = make_constraint(ConstraintConfig(kind="low_rank", window=5, rank=needed - 1, energy=0.99))(alone)
    assert torch.allclose(bounded, low_rank(alone, 5, needed - 1))
