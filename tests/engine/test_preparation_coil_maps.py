"""Coil maps: against analytic profiles, against the exact eigenvectors, and against BART."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from scanside.engine.preparation import coil_maps
from scanside.engine.preparation.coil_maps import espirit, espirit_with_eigenvalues, hybrid_to_kspace, walsh

CASES = {"even": (1, 64, 64, 6), "odd": (1, 61, 75, 5), "volume": (16, 20, 24, 4)}


def centered_fft(images: np.ndarray) -> np.ndarray:
    axes = (-3, -2, -1)
    return np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(images, axes), axes=axes, norm="ortho"), axes)


def scan(nz: int, ny: int, nx: int, coils: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth analytic profiles (coil, z, y, x) of unit norm and an object (z, y, x)."""
    z, y, x = np.meshgrid(*((np.arange(n) - n // 2) * 2 / n for n in (nz, ny, nx)), indexing="ij")
    angle = 2 * np.pi * np.arange(coils)[:, None, None, None] / coils
    distance = (y - 1.4 * np.sin(angle)) ** 2 + (x - 1.4 * np.cos(angle)) ** 2 + (z - 0.5 * np.cos(2 * angle)) ** 2
    profiles = np.exp(-distance / 1.5 + 1j * (np.cos(angle) * x + np.sin(2 * angle) * y + angle))
    inside = (x / 0.75) ** 2 + (y / 0.6) ** 2 + (z / 0.8) ** 2 < 1
    return profiles / np.linalg.norm(profiles, axis=0), inside * (1 + 0.4 * np.cos(9 * x) * np.sin(7 * y))


def middle(kspace: np.ndarray, size: int) -> np.ndarray:
    for axis, n in enumerate(kspace.shape[1:], start=1):
        first = max(n // 2 - size // 2, 0)
        kspace = np.take(kspace, range(first, min(first + size, n)), axis=axis)
    return kspace


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_espirit_spans_the_analytic_profiles(case, dtype):
    profiles, image = scan(*CASES[case])
    calibration = torch.from_numpy(middle(centered_fft(profiles * image), 20)).to(dtype)
    maps = espirit(calibration, image.shape, threshold=0.01)
    assert maps.dtype == dtype
    correlation = np.abs((maps.numpy().conj() * profiles).sum(0))[image > 0]
    assert correlation.min() > 0.99
    assert np.median(correlation) > 0.99995
    residual = profiles * image - maps.numpy() * (maps.numpy().conj() * profiles * image).sum(0)
    assert np.linalg.norm(residual) / np.linalg.norm(image) < 0.01


def test_maps_have_unit_norm_or_are_zero():
    profiles, image = scan(1, 64, 64, 6)
    result = espirit_with_eigenvalues(
        torch.from_numpy(middle(centered_fft(profiles * image), 24)), image.shape, crop=0.9
    )
    norm = torch.linalg.vector_norm(result.maps, dim=0)
    defined = result.eigenvalues >= 0.9
    assert 0 < defined.sum() < defined.numel()
    torch.testing.assert_close(norm, defined.to(norm.dtype))
    assert result.eigenvalues.max() < 1 + 1e-6
    assert result.eigenvalues.min() > -1e-6


def test_first_virtual_coil_is_real():
    profiles, image = scan(1, 64, 64, 6)
    calibration = torch.from_numpy(middle(centered_fft(profiles * image), 24))
    maps = espirit(calibration, image.shape)
    columns = calibration.flatten(1)
    first = torch.linalg.eigh(columns @ columns.mH)[1][:, -1]
    virtual = torch.einsum("c,czyx->zyx", first.conj() * first[-1] / first[-1].abs(), maps)
    assert virtual.imag.abs().max() < 1e-9
    assert virtual.real.min() >= 0


def test_power_iteration_reaches_the_exact_eigenvectors():
    profiles, image = scan(1, 64, 64, 6)
    calibration = torch.from_numpy(middle(centered_fft(profiles * image), 24))
    result = espirit_with_eigenvalues(calibration, image.shape)
    size = (1, 6, 6)
    projector = coil_maps._signal_projector(calibration, size, 0.02).reshape(6, 36, 6, 36)
    ky, kx = (index.flatten() for index in np.meshgrid(range(6), range(6), indexing="ij"))
    for y, x in [(32, 32), (20, 40), (45, 30)]:
        wave = torch.from_numpy(np.exp(2j * np.pi * (ky * (y - 32) + kx * (x - 32)) / 64))
        matrix = torch.einsum("m,cmdn,n->cd", wave, projector, wave.conj()) / 36
        values, vectors = torch.linalg.eigh(matrix)
        assert result.eigenvalues[0, y, x].item() == pytest.approx(values[-1].item(), abs=1e-6)
        assert (vectors[:, -1].conj() @ result.maps[:, 0, y, x]).abs().item() == pytest.approx(1.0, abs=1e-6)


def test_hybrid_data_give_the_same_maps():
    profiles, image = scan(1, 64, 64, 6)
    kspace = torch.from_numpy(centered_fft(profiles * image))[:, :, 20:44]
    hybrid = torch.fft.fftshift(torch.fft.ifft(torch.fft.ifftshift(kspace, dim=-1), norm="ortho"), dim=-1)
    torch.testing.assert_close(hybrid_to_kspace(hybrid), kspace)
    torch.testing.assert_close(espirit(hybrid, image.shape, hybrid=True), espirit(kspace, image.shape))


def test_few_calibration_lines_are_enough():
    profiles, image = scan(1, 64, 64, 6)
    calibration = torch.from_numpy(centered_fft(profiles * image)[:, :, 28:36, 20:44])
    maps = espirit(calibration, image.shape, crop=0.5).numpy()
    correlation = np.abs((maps.conj() * profiles).sum(0))[image > 0]
    assert np.median(correlation) > 0.999


@pytest.mark.parametrize(
    "calibration",
    [torch.zeros(2, 1, 8, 8, dtype=torch.complex64), torch.full((2, 1, 8, 8), float("nan"), dtype=torch.complex64)],
)
def test_useless_calibration_is_refused(calibration):
    with pytest.raises(ValueError, match="energy"):
        espirit(calibration, (1, 16, 16))


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="expected complex"):
        espirit(torch.ones(2, 8, 8), (1, 16, 16))


@pytest.mark.parametrize("case", CASES)
def test_walsh_follows_the_profiles(case):
    profiles, image = scan(*CASES[case])
    maps = walsh(torch.from_numpy(profiles * image), block=2).numpy()
    correlation = np.abs((maps.conj() * profiles).sum(0))[image > 0]
    assert np.quantile(correlation, 0.01) > 0.98
    assert np.median(correlation) > 0.995
    np.testing.assert_allclose(np.linalg.norm(maps, axis=0)[image > 0], 1, rtol=1e-9)


def test_walsh_maps_of_low_resolution_images_fill_a_larger_grid():
    profiles, image = scan(1, 128, 128, 6)
    kspace = centered_fft(profiles * image)[:, :, 48:80, 48:80]
    low = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, (-2, -1)), norm="ortho"), (-2, -1))
    maps = walsh(torch.from_numpy(low), (1, 128, 128), block=1).numpy()
    correlation = np.abs((maps.conj() * profiles).sum(0))[image > 0]
    assert np.median(correlation) > 0.995


def write_cfl(path: Path, array: np.ndarray) -> None:
    """BART's format: a text header and complex64, first axis fastest."""
    dimensions = [*array.shape[::-1], *[1] * (16 - array.ndim)]
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, dimensions)) + "\n")
    array.astype(np.complex64).tofile(path.with_suffix(".cfl"))


def read_cfl(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    return np.fromfile(path.with_suffix(".cfl"), np.complex64).reshape(shape)


@pytest.mark.peer
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_bart(case, tmp_path, rng):
    if shutil.which("bart") is None:
        pytest.skip("bart is not installed")
    kernel = 4 if case == "volume" else 6
    profiles, image = scan(*CASES[case])
    kspace = centered_fft(profiles * image)
    kspace += 1e-3 * np.abs(kspace).std() * (rng.standard_normal((*kspace.shape, 2)) @ [1, 1j])
    write_cfl(tmp_path / "kspace", kspace)
    command = ["bart", "ecalib", "-m1", f"-k{kernel}", "-r16", "-t0.001", "-c0.8", "kspace", "maps", "values"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    theirs = read_cfl(tmp_path / "maps", kspace.shape)
    ours = espirit(
        torch.from_numpy(kspace.astype(np.complex64)),
        image.shape,
        kernel=kernel,
        threshold=0.001**0.5,
        calibration_size=16,
    ).numpy()
    both = (np.abs(ours).sum(0) > 0) & (np.abs(theirs).sum(0) > 0)
    either = (np.abs(ours).sum(0) > 0) | (np.abs(theirs).sum(0) > 0)
    assert both.sum() > 0.98 * either.sum()
    correlation = (ours.conj() * theirs).sum(0)[both & (image > 0)]
    assert correlation.real.min() > 0.999


@pytest.mark.real_data
def test_maps_of_a_brain_explain_its_coil_images(real_data):
    import ismrmrd
    from scanside.engine.preparation.filters import to_image

    kspace = torch.zeros(16, 1, 128, 128, dtype=torch.complex64)
    with ismrmrd.Dataset(str(real_data("mri/raw/invivo_brain_3T_16ch.h5")), create_if_needed=False) as dataset:
        for i in range(dataset.number_of_acquisitions()):
            line = dataset.read_acquisition(i)
            kspace[:, 0, line.idx.kspace_encode_step_1] = torch.from_numpy(line.data)
    images = to_image(kspace)
    strength = torch.linalg.vector_norm(images, dim=0)
    head = strength > 0.1 * strength.max()
    for maps in (espirit(kspace[:, :, 52:76], (1, 128, 128)), walsh(images)):
        rest = (images - maps * (maps.conj() * images).sum(0))[:, head]
        assert rest.norm() / images[:, head].norm() < 0.11
