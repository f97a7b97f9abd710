"""Joseph's projector against the matrix of its definition in float64: compiled, by torch, and the CUDA source emulated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scanside.kernels import native
from scanside.kernels import tomography as kernel

SINGLE, ADJOINT = 2e-5, 1e-6
SIZES = (0.7, 1.3)
quiet = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
scans = {
    "shape": st.tuples(st.integers(1, 20), st.integers(1, 20)),
    "count": st.integers(1, 6),
    "bins": st.integers(1, 40),
    "fan": st.booleans(),
    "seed": st.integers(0, 2**31),
}


def rays(shape, count, bins, fan, seed):
    """Views at random angles, the center of the image somewhere on the detector, as a table (view, 8)."""
    rng = np.random.default_rng(seed)
    size, angles = max(shape) * 1.5 + 2, rng.uniform(0, 2 * np.pi, count)
    axis, ahead = np.stack([np.sin(angles), np.cos(angles)], 1), np.stack([np.cos(angles), -np.sin(angles)], 1)
    center, pitch = (np.array(shape) - 1) / 2, rng.uniform(0.3, 2)
    first, none = axis * pitch * (rng.uniform(-0.3, 0.3) - (bins - 1) / 2), np.zeros_like(axis)
    if fan:
        table = np.hstack([center - ahead * size, none, ahead * (2 * size) + first, axis * pitch])
    else:
        table = np.hstack([center + first, axis * pitch, ahead, none])
    return torch.from_numpy(table)


def matrix(shape, views, bins, sizes=SIZES):
    """The definition, ray by ray: rows are rays, columns pixels."""
    result = np.zeros((len(views), bins, *shape))
    for v, (p0, p1, q0, q1, v0, v1, w0, w1) in enumerate(views.numpy()):
        for u in range(bins):
            start, way = np.array([p0 + u * q0, p1 + u * q1]), np.array([v0 + u * w0, v1 + u * w1])
            axis = 0 if abs(way[0]) >= abs(way[1]) else 1
            steps = np.arange(shape[axis])
            across = start[1 - axis] + (steps - start[axis]) * way[1 - axis] / way[axis]
            length = np.hypot(*(way * sizes)) / abs(way[axis])
            hat = np.maximum(1 - np.abs(across[:, None] - np.arange(shape[1 - axis])), 0) * length
            result[v, u] = hat if axis == 0 else hat.T
    return torch.from_numpy(result.reshape(len(views) * bins, -1))


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=SINGLE):
    assert a.shape == b.shape
    assert float((a.double() - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1.0)


@given(**scans, batch=st.lists(st.integers(1, 3), max_size=2), threads=st.integers(1, 2))
@quiet
def test_both_directions_are_the_matrix(path, shape, count, bins, fan, seed, batch, threads):
    views = rays(shape, count, bins, fan, seed)
    dense = matrix(shape, views, bins)
    image, sinogram = random(*batch, *shape, seed=seed), random(*batch, count, bins, seed=seed + 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    projected, collected = kernel.project(image, views, bins, *SIZES), kernel.adjoint(sinogram, views, *shape, *SIZES)
    torch.set_num_threads(before)
    close(projected, (image.double().flatten(-2) @ dense.T).reshape(sinogram.shape))
    close(collected, (sinogram.double().flatten(-2) @ dense).reshape(image.shape))


@given(**scans)
@quiet
def test_one_is_the_adjoint_of_the_other(path, shape, count, bins, fan, seed):
    views = rays(shape, count, bins, fan, seed)
    image, sinogram = random(*shape, seed=seed), random(count, bins, seed=seed + 1)
    projected = kernel.project(image, views, bins, *SIZES).double()
    collected = kernel.adjoint(sinogram, views, *shape, *SIZES).double()
    difference = abs(float((projected * sinogram).sum() - (image * collected).sum()))
    # Either side may be small because its sums cancel, which says nothing about rounding.
    size = max(float(collected.norm() * image.double().norm()), float(projected.norm() * sinogram.double().norm()))
    assert difference <= ADJOINT * size + 1e-12


@pytest.mark.parametrize("fan", [True, False])
def test_an_image_of_many_pixels(path, fan):
    """More lines than a thread takes at a time, more bins than a bundle, wide fans whose rays step along both axes."""
    views = rays((150, 170), 7, 300, fan, 5)
    image, sinogram = random(150, 170), random(7, 300, seed=1)
    projected, collected = kernel.project(image, views, 300), kernel.adjoint(sinogram, views, 150, 170)
    close(projected, kernel.project(image.double(), views, 300), 1e-4)
    close(collected, kernel.adjoint(sinogram.double(), views, 150, 170), 1e-4)
    difference = abs(float((projected.double() * sinogram).sum() - (image * collected.double()).sum()))
    assert difference <= ADJOINT * float(projected.double().norm() * sinogram.double().norm())


def pixel_driven(sinogram, views, shape):
    """Pixel by pixel from the geometry: where the ray through the pixel meets the detector, found by solving for it."""
    image = torch.zeros(*shape, dtype=torch.float64)
    center = (np.array(shape) - 1) / 2
    for v, (p0, p1, q0, q1, v0, v1, w0, w1) in enumerate(views.numpy()):
        p, q, way, turn = np.array([p0, p1]), np.array([q0, q1]), np.array([v0, v1]), np.array([w0, w1])
        for i in range(shape[0]):
            for j in range(shape[1]):
                r = np.array([i, j])
                if turn.any():  # s (way + u turn) = r - p
                    s, su = np.linalg.solve(np.stack([way, turn], 1), r - p)
                    u, far = su / s, s / np.linalg.solve(np.stack([way, turn], 1), center - p)[0]
                else:  # s way + u q = r - p
                    u, far = np.linalg.solve(np.stack([way, q], 1), r - p)[1], 1.0
                hat = np.maximum(1 - np.abs(u - np.arange(sinogram.shape[-1])), 0)
                image[i, j] += float(sinogram[v].double() @ torch.from_numpy(hat)) / far**2
    return image


@given(**{**scans, "shape": st.tuples(st.integers(1, 9), st.integers(1, 12))})
@settings(quiet, max_examples=15)
def test_pixels_read_their_shadow(path, shape, count, bins, fan, seed):
    views, sinogram = rays(shape, count, bins, fan, seed), random(2, count, bins, seed=seed)
    found = kernel.pixel_driven(sinogram, views, *shape)
    for i in range(2):
        close(found[i], pixel_driven(sinogram[i], views, shape), 1e-4)


def test_double_precision_empty_batches_and_strides(path):
    views = rays((5, 7), 3, 11, True, 3)
    dense, image = matrix((5, 7), views, 11), random(2, 7, 5, dtype=torch.float64).mT
    expected = (image.flatten(1) @ dense.T).reshape(2, 3, 11)
    close(kernel.project(image, views, 11, *SIZES), expected, 1e-12)
    close(kernel.project(image.float(), views, 11, *SIZES), expected)
    assert kernel.project(image[:0].float(), views, 11).shape == (0, 3, 11)
    assert kernel.adjoint(torch.zeros(0, 3, 11), views, 5, 7).shape == (0, 5, 7)
    assert kernel.pixel_driven(torch.zeros(0, 3, 11), views, 5, 7).shape == (0, 5, 7)


@pytest.mark.parametrize("level", native.LEVELS)
def test_every_instruction_set(level, monkeypatch):
    monkeypatch.setenv(native.VARIABLE, level)
    native.library.cache_clear()
    try:
        native.available()
    except (ImportError, OSError) as reason:
        pytest.skip(f"{level}: {reason}")
    shape, views = (13, 18), rays((13, 18), 5, 21, True, 7)
    image, sinogram, dense = random(*shape), random(5, 21), matrix((13, 18), views, 21)
    close(kernel.project(image, views, 21, *SIZES), (dense @ image.double().flatten()).reshape(5, 21))
    close(kernel.adjoint(sinogram, views, *shape, *SIZES), (sinogram.double().flatten() @ dense).reshape(shape))
    close(kernel.pixel_driven(sinogram, views, *shape), pixel_driven(sinogram, views, shape), 1e-4)
    monkeypatch.undo()
    native.library.cache_clear()


@pytest.mark.parametrize("fan", [True, False])
def test_the_cuda_sources(emulate, fan):
    shape, views = (6, 17), rays((6, 17), 5, 23, fan, 7)
    image, sinogram, dense = random(2, *shape), random(2, 5, 23), matrix((6, 17), views, 23)
    projected, collected, seen = torch.zeros_like(sinogram), torch.zeros_like(image), torch.zeros_like(image)
    assert not emulate(*kernel.project_launches(image, views, projected, *SIZES))
    assert not emulate(*kernel.adjoint_launches(sinogram, views, collected, *SIZES))
    rows, tables = torch.nn.functional.pad(sinogram, (1, 2)), kernel.shadows(views, *shape).float()
    assert not emulate(*kernel.pixel_driven_launches(rows, tables, seen))
    close(projected, (image.double().flatten(1) @ dense.T).reshape(sinogram.shape))
    close(collected, (sinogram.double().flatten(1) @ dense).reshape(image.shape))
    close(seen[1], pixel_driven(sinogram[1], views, shape), 1e-4)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_torch_can_use_it(path, batch):
    views = rays((4, 5), 3, 7, True, 3)
    image, sinogram = random(*batch, 4, 5).requires_grad_(), random(*batch, 3, 7).requires_grad_()
    torch.library.opcheck(kernel.ct_project, (image, views, 7, *SIZES))
    torch.library.opcheck(kernel.ct_adjoint, (sinogram, views, 4, 5, *SIZES))
    image, sinogram = (x.detach().double().requires_grad_() for x in (image, sinogram))
    assert torch.autograd.gradcheck(lambda x: kernel.ct_project(x, views, 7, *SIZES), image)
    assert torch.autograd.gradcheck(lambda y: kernel.ct_adjoint(y, views, 4, 5, *SIZES), sinogram)


def test_what_does_not_fit_is_named(path):
    views = rays((4, 5), 3, 7, True, 3)
    with pytest.raises(ValueError, match=r"views has shape \(3, 7\), needed is \(view, 8\)"):
        kernel.project(random(4, 5), views[:, :7], 7)
    with pytest.raises(ValueError, match=r"sinogram has shape \(2, 7\), its last axes must be \(3, bins\)"):
        kernel.adjoint(random(2, 7), views, 4, 5)
    with pytest.raises(ValueError, match=r"sinogram has shape \(2, 7\), its last axes must be \(3, bins\)"):
        kernel.pixel_driven(random(2, 7), views, 4, 5)
    with pytest.raises(ValueError, match=r"image has shape \(5,\); two axes"):
        kernel.project(random(5), views, 7)
    with pytest.raises(ValueError, match="at least one point"):
        kernel.project(random(4, 5), views, 0)
    with pytest.raises(ValueError, match="float32 or float64 is needed"):
        kernel.project(torch.zeros(4, 5, dtype=torch.int32), views, 7)
    with pytest.raises(ValueError, match="both the start and the direction change"):
        kernel.pixel_driven(random(3, 7), torch.ones(3, 8, dtype=torch.float64), 4, 5)
