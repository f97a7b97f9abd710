"""Noise covariance, prewhitening and the answer to a noise-dependency query."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.errors import StreamError
from scanside.engine.preparation.noise import NoiseModel


def correlated_noise(seed: int, coils: int, samples: int) -> np.ndarray:
    """Noise readouts (4, coil, samples) whose coils are mixed and differ by decades."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((coils, coils, 2)) @ [1, 1j] / coils + np.eye(coils)
    white = generator.standard_normal((4, coils, samples, 2)) @ [1, 1j]
    return (10.0 ** generator.uniform(-1.5, 1.5, coils))[:, None] * (mixing @ white)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), coils=st.integers(1, 12), samples=st.integers(64, 256))
def test_whitened_noise_is_identity(seed, coils, samples):
    model = NoiseModel.from_readouts(correlated_noise(seed, coils, samples), 5.0)
    matrix = model.whitening(5.0, dtype=torch.complex128)
    whitened = matrix @ model.covariance @ matrix.mH
    torch.testing.assert_close(whitened, 2 * torch.eye(coils, dtype=torch.complex128), atol=1e-4, rtol=0)
    assert torch.equal(matrix, matrix.tril())


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), coils=st.integers(1, 6), cut=st.integers(1, 3))
def test_running_sums_equal_all_at_once(seed, coils, cut):
    readouts = correlated_noise(seed, coils, 16)
    whole = NoiseModel.from_readouts(readouts, 5.0)
    parts = NoiseModel.from_readouts(readouts[:cut], 5.0).accumulate(torch.from_numpy(readouts[cut:]), 5.0)
    assert parts.samples == whole.samples == 64
    torch.testing.assert_close(parts.covariance, whole.covariance)


def test_unit_variance_of_real_and_imaginary_part(rng):
    """Data with half the dwell time have twice the noise variance; the scale takes that out."""
    noise = rng.standard_normal((8, 3, 4000, 2)) @ [1, 1j] * np.array([1.0, 5.0, 0.1])[:, None]
    model = NoiseModel.from_readouts(noise, 10.0)
    data = torch.from_numpy(
        np.sqrt(2) * (rng.standard_normal((3, 40000, 2)) @ [1, 1j]) * np.array([1.0, 5.0, 0.1])[:, None]
    )
    whitened = model.whitening(5.0, dtype=torch.complex128) @ data
    assert torch.view_as_real(whitened).var(dim=1).numpy() == pytest.approx(1.0, abs=0.03)


def test_scale_follows_noise_adjust():
    model = NoiseModel(torch.eye(2, dtype=torch.complex128), 8.0, 1000)
    assert model.whitening(2.0, 0.79)[0, 0].real.item() == pytest.approx(np.sqrt(2 * 2.0 / 8.0 * 0.79), rel=1e-5)
    assert model.whitening(0.0, 0.79)[0, 0].real.item() == pytest.approx(np.sqrt(2.0), rel=1e-5)


def test_dead_coil_is_reported_and_weighted_with_zero(rng):
    noise = rng.standard_normal((1, 4, 400, 2)) @ [1, 1j]
    noise[:, 2] = 0
    model = NoiseModel.from_readouts(noise.astype(np.complex64), 5.0)
    matrix = model.whitening(5.0, dtype=torch.complex128)
    assert model.dead_coils == (2,)
    assert not matrix[2].any()
    assert not matrix[:, 2].any()
    live = torch.diag(torch.tensor([2.0, 2, 0, 2], dtype=torch.complex128))
    torch.testing.assert_close(matrix @ model.covariance @ matrix.mH, live, atol=1e-4, rtol=0)


def test_fewer_samples_than_coils_still_whitens(rng):
    model = NoiseModel.from_readouts(rng.standard_normal((1, 16, 8, 2)) @ [1, 1j], 5.0)
    matrix = model.whitening(5.0, dtype=torch.complex128)
    assert model.loading == 1.0
    assert torch.isfinite(torch.view_as_real(matrix)).all()
    assert (matrix @ model.covariance @ matrix.mH).diagonal().real.numpy() == pytest.approx(2.0, rel=1e-6)


def test_two_coils_with_the_same_noise_do_not_fail(rng):
    noise = rng.standard_normal((1, 1, 400, 2)) @ [1, 1j]
    matrix = NoiseModel.from_readouts(np.concatenate([noise, 2 * noise], axis=1), 5.0).whitening(5.0)
    assert torch.isfinite(torch.view_as_real(matrix)).all()


def test_all_zero_noise_leaves_channels_as_they_are():
    matrix = NoiseModel.from_readouts(np.zeros((1, 3, 10), np.complex64), 5.0).whitening(5.0)
    torch.testing.assert_close(matrix, 2**0.5 * torch.eye(3, dtype=torch.complex64))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_a_number_is_refused_by_coil(bad):
    noise = np.ones((2, 3, 5), np.complex64)
    noise[1, 1, 2] = bad
    with pytest.raises(StreamError, match=r"coils \[1\]"):
        NoiseModel.from_readouts(noise, 5.0)


def test_mismatching_readouts_are_refused():
    model = NoiseModel.from_readouts(np.ones((1, 3, 5), np.complex64), 5.0)
    with pytest.raises(StreamError, match="2 coils"):
        model.accumulate(np.ones((1, 2, 5), np.complex64))
    with pytest.raises(StreamError, match="dwell time"):
        model.accumulate(np.ones((1, 3, 5), np.complex64), 2.5)
    with pytest.raises(StreamError, match="shape"):
        NoiseModel.from_readouts(np.ones((0, 3, 5), np.complex64), 5.0)


def test_dependency_answer_has_the_keys_that_clients_read():
    model = NoiseModel(torch.diag(torch.tensor([1.0, 4.0, 16.0], dtype=torch.complex128)), 7.5, 100)
    assert model.dependency_answer() == {
        "status": ["success"],
        "channels": ["3"],
        "min_sigma": ["1"],
        "max_sigma": ["4"],
        "mean_sigma": ["2.33333333"],
        "noise_dwell_time_us": ["7.5"],
    }


@pytest.mark.real_data
def test_noise_readout_of_a_scanner(real_data):
    import ismrmrd

    with ismrmrd.Dataset(str(real_data("mri/raw/skyra_bottles_14ch_R3.h5")), create_if_needed=False) as dataset:
        readouts = [dataset.read_acquisition(i) for i in range(dataset.number_of_acquisitions())]
    noise = [a for a in readouts if a.is_flag_set(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)]
    lines = [a for a in readouts if not a.is_flag_set(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)]
    model = NoiseModel.from_readouts(np.stack([a.data for a in noise]), noise[0].sample_time_us)
    assert model.channels == 14
    assert model.dead_coils == ()
    whitened = model.whitening(lines[0].sample_time_us, 0.793) @ torch.from_numpy(np.stack([a.data for a in lines]))
    profile = torch.fft.fftshift(torch.fft.ifft(torch.fft.ifftshift(whitened, dim=-1), norm="ortho"), dim=-1)
    beside_object = torch.view_as_real(profile[..., list(range(84, 104)) + list(range(288, 308))])
    assert beside_object.std().item() == pytest.approx(1.0, abs=0.06)
