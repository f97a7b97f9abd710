"""GRAPPA: fills a phantom, keeps what was measured, and is the same in k-space, hybrid space and image space."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.baselines.grappa import Grappa
from scanside.engine.preparation.coil_maps import espirit
from scanside.engine.preparation.filters import to_image, to_kspace

PLANE = (1, 96, 80)
VOLUME = (32, 36, 24)


def scan(shape: tuple[int, int, int], coils: int = 8) -> torch.Tensor:
    """Fully sampled k-space (coil, z, y, x), complex128, of an object seen by smooth coils."""
    z, y, x = np.meshgrid(*((np.arange(n) - n // 2) * 2 / n for n in shape), indexing="ij")
    angle = 2 * np.pi * np.arange(coils)[:, None, None, None] / coils
    distance = (y - 1.2 * np.sin(angle)) ** 2 + (x - 1.2 * np.cos(angle)) ** 2 + (z - 0.9 * np.cos(2 * angle)) ** 2
    profiles = np.exp(-distance + 1j * (np.cos(angle) * x + np.sin(2 * angle) * y + angle))
    inside = (x / 0.75) ** 2 + (y / 0.8) ** 2 + (z / 0.8) ** 2 < 1
    image = inside * (1 + 0.4 * np.cos(9 * x) * np.sin(7 * y) + 0.3 * (np.abs(x - y) < 0.2))
    return to_kspace(torch.from_numpy(profiles * image), (-3, -2, -1))


def lines(shape: tuple[int, int, int], first: tuple[int, int], step: tuple[int, int]) -> torch.Tensor:
    """Mask (z, y) of a lattice with first line (z, y) and steps (z, y)."""
    mask = torch.zeros(shape[:2], dtype=torch.bool)
    mask[first[0] :: step[0], first[1] :: step[1]] = True
    return mask


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(found - truth) / torch.linalg.vector_norm(truth)).item()


@pytest.mark.parametrize(("acceleration", "bound"), [(2, 0.0005), (3, 0.002), (4, 0.01)])
def test_fills_a_phantom(acceleration, bound):
    kspace = scan(PLANE)
    mask = lines(PLANE, (0, 1), (1, acceleration))
    mask[:, 36:60] = True
    grappa = Grappa.calibrate(kspace[:, :, 36:60], (acceleration, 1), regularization=1e-6)
    measured = kspace * mask[:, :, None]
    filled = grappa.apply(measured, mask)
    assert error(filled, kspace) < bound < error(measured, kspace) / 10
    assert torch.equal(filled[:, mask], kspace[:, mask])


def test_fills_a_volume_along_both_axes():
    kspace = scan(VOLUME)
    mask = lines(VOLUME, (1, 0), (2, 2))
    grappa = Grappa.calibrate(kspace[:, 6:26, 8:28], (2, 2), kernel=(5, 4, 2), regularization=1e-6)
    filled = grappa.apply(kspace * mask[:, :, None], mask)
    assert error(filled, kspace) < 0.02 < error(kspace * mask[:, :, None], kspace) / 4
    assert torch.equal(filled[:, mask], kspace[:, mask])


def test_acceleration_along_z_alone():
    kspace = scan(VOLUME)
    mask = lines(VOLUME, (0, 0), (2, 1))
    grappa = Grappa.calibrate(kspace[:, 6:26, 8:28], (1, 2), regularization=1e-6)
    assert error(grappa.apply(kspace * mask[:, :, None], mask), kspace) < 0.02


@settings(deadline=None, max_examples=12)
@given(first=st.integers(0, 3), acceleration=st.integers(2, 4), region=st.booleans())
def test_any_offset_of_the_lattice_is_found(first, acceleration, region):
    kspace = scan((1, 48, 32), coils=6)
    first %= acceleration
    lattice = lines((1, 48, 32), (0, first), (1, acceleration))
    mask = lattice.clone()
    mask[:, 16:32] |= region
    grappa = Grappa.calibrate(kspace[:, :, 12:36], (acceleration, 1))
    assert torch.equal(grappa.lattice(mask), lattice)
    whole = grappa.apply(kspace * mask[:, :, None], mask)
    assert torch.equal(whole[:, mask], kspace[:, mask])
    assert (whole[:, ~mask].abs().amax(dim=(0, 2)) > 0).all()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_kspace_hybrid_and_image_space_are_the_same(dtype):
    kspace = scan(PLANE).to(dtype)
    mask = lines(PLANE, (0, 2), (1, 3))
    measured = kspace * mask[:, :, None]
    hybrid = to_image(kspace, (-1,))
    from_hybrid = Grappa.calibrate(hybrid[:, :, 36:60], (3, 1), hybrid=True)
    grappa = Grappa.calibrate(kspace[:, :, 36:60], (3, 1))
    tolerance = 1e-10 if dtype == torch.complex128 else 1e-4
    assert error(from_hybrid.weights, grappa.weights) < 10 * tolerance
    filled = grappa.apply(measured, mask)
    assert filled.dtype == dtype
    in_hybrid = grappa.apply(to_image(measured, (-1,)), mask[0], hybrid=True)
    assert error(to_kspace(in_hybrid, (-1,)), filled) < tolerance
    maps = espirit(kspace[:, :, 36:60], PLANE)
    combined = (maps.conj() * to_image(filled)).sum(0)
    assert error((grappa.unmixing(maps) * to_image(measured)).sum(0), combined) < tolerance


def test_weights_are_those_of_a_direct_convolution():
    """One missing line by the definition: a sum over taps and coils, circular along the readout."""
    kspace = scan((1, 24, 16), coils=4)
    mask = lines((1, 24, 16), (0, 0), (1, 2))
    grappa = Grappa.calibrate(kspace[:, :, 4:20], (2, 1), kernel=(3, 2))
    assert grappa.weights.shape == (1, 4, 4, 1, 2, 3)
    expected = torch.zeros(4, 16, dtype=torch.complex128)
    for tap, (q, r) in enumerate((q, r) for q in range(2) for r in range(3)):
        source = torch.roll(kspace[:, 0, 10 + 2 * q], 1 - r, dims=-1)
        expected += grappa.weights[0, :, :, 0, tap // 3, r] @ source
    filled = grappa.apply(kspace * mask[:, :, None], mask)
    torch.testing.assert_close(filled[:, 0, 11], expected)


def test_lines_outside_of_what_was_measured_stay_zero():
    kspace = scan(PLANE)
    mask = lines(PLANE, (0, 0), (1, 3))
    mask[:, 70:] = False
    filled = Grappa.calibrate(kspace[:, :, 36:60], (3, 1)).apply(kspace * mask[:, :, None], mask)
    assert filled[:, :, 69 + 3 :].abs().max() == 0
    assert filled[:, :, 68].abs().min() > 0


def test_thin_calibration_gets_a_smaller_kernel_or_is_refused():
    kspace = scan(PLANE)
    assert Grappa.calibrate(kspace[:, :, 44:52], (3, 1)).weights.shape[4] == 3
    with pytest.raises(ValueError, match="needs 4"):
        Grappa.calibrate(kspace[:, :, 46:49], (3, 1))
    with pytest.raises(ValueError, match="nothing is missing"):
        Grappa.calibrate(kspace, (1, 1))


@pytest.mark.real_data
def test_scanner_data_undersampled_afterwards(real_data):
    import ismrmrd

    kspace = torch.zeros(16, 1, 128, 128, dtype=torch.complex64)
    with ismrmrd.Dataset(str(real_data("mri/raw/invivo_brain_3T_16ch.h5")), create_if_needed=False) as dataset:
        for i in range(dataset.number_of_acquisitions()):
            line = dataset.read_acquisition(i)
            kspace[:, 0, line.idx.kspace_encode_step_1] = torch.from_numpy(line.data)
    mask = lines((1, 128, 128), (0, 1), (1, 2))
    mask[:, 52:76] = True
    measured = kspace * mask[:, :, None]
    filled = Grappa.calibrate(kspace[:, :, 52:76], (2, 1)).apply(measured, mask)
    images = [to_image(data).abs().square().sum(0).sqrt() for data in (filled, measured, kspace)]
    assert error(images[0], images[2]) < 0.04
    assert error(images[1], images[2]) > 0.09


@pytest.mark.real_data
def test_scanner_data_undersampled_by_the_scanner(real_data):
    """Three-fold undersampled bottles: leaving out measured lines of the calibration region, they are predicted."""
    import ismrmrd

    kspace, mask = torch.zeros(14, 1, 144, 384, dtype=torch.complex64), torch.zeros(1, 144, dtype=torch.bool)
    with ismrmrd.Dataset(str(real_data("mri/raw/skyra_bottles_14ch_R3.h5")), create_if_needed=False) as dataset:
        for i in range(dataset.number_of_acquisitions()):
            line = dataset.read_acquisition(i)
            if not line.is_flag_set(ismrmrd.ACQ_IS_NOISE_MEASUREMENT):
                row = line.idx.kspace_encode_step_1 + 72 - 54
                kspace[:, 0, row], mask[0, row] = torch.from_numpy(line.data), True
    region = slice(18 + 30, 18 + 79)
    grappa = Grappa.calibrate(kspace[:, :, region], (3, 1))
    lattice = grappa.lattice(mask)
    assert torch.nonzero(lattice[0]).flatten().tolist() == list(range(18, 124, 3))
    filled = grappa.apply(kspace * lattice[:, :, None], lattice)
    assert error(filled[:, :, region], kspace[:, :, region]) < 0.1
    assert filled[:, :, :16].abs().max() == 0
