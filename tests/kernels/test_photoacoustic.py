"""Time of flight against the matrix of its definition in double precision: compiled, by torch, and the CUDA source emulated."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scanside.kernels import native
from scanside.kernels import photoacoustic as kernel

WEIGHTINGS = sorted(kernel.WEIGHTINGS.values())
SINGLE = 2e-6
"""Of the largest value: arrival times have more digits than float32, what is read at them has not."""
DEVICE = 2e-5
"""The same on a device, where times of up to about 200 samples are wrong by some 1e-6 samples."""
ADJOINT = 1e-6
quiet = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
geometries = {
    "elements": st.integers(1, 9),
    "samples": st.integers(1, 120),
    "shape": st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 21)),
    "delay": st.floats(-20, 40),
    "weighting": st.sampled_from(WEIGHTINGS),
    "seed": st.integers(0, 2**31),
}


def geometry(elements, shape, seed):
    """A table of elements, one of them dead if there are several, and axes; lengths in samples."""
    rng = np.random.default_rng(seed)
    table = np.zeros((elements, kernel.COLUMNS))
    table[:, :3] = rng.uniform(-60, 60, (elements, 3))
    normals = rng.normal(size=(elements, 3))
    table[:, 3:6] = normals / np.linalg.norm(normals, axis=1, keepdims=True)
    table[:, 6] = rng.uniform(0.5, 2, elements)
    if elements > 1:
        table[rng.integers(elements), 6] = 0
    z, y, x = (torch.from_numpy(np.sort(rng.uniform(-50, 50, n))) for n in shape)
    return torch.from_numpy(table), x, y, z


def matrix(table, x, y, z, samples, delay, weighting):
    """The definition: rows are samples of all elements, columns points, z slowest."""
    points = torch.cartesian_prod(z, y, x).reshape(-1, 3).flip(1).numpy()
    result = np.zeros((len(table), samples, len(points)))
    for i, element in enumerate(table.numpy()):
        apart = points - element[:3]
        distance = np.linalg.norm(apart, axis=1)
        weight = np.full(len(points), element[6])
        if weighting != kernel.PLAIN:
            weight *= np.maximum(apart @ element[3:6], 0) / distance ** (2 if weighting == kernel.PLANE else 3)
        hat = 1 - np.abs(distance - delay - np.arange(samples)[:, None])
        result[i] = np.maximum(hat, 0) * weight
    return torch.from_numpy(result.reshape(-1, len(points)))


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance):
    assert a.shape == b.shape
    assert float((a.double() - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1.0)


@given(**geometries, batch=st.lists(st.integers(1, 3), max_size=2), threads=st.integers(1, 2))
@quiet
def test_both_directions_are_the_matrix(path, elements, samples, shape, delay, weighting, seed, batch, threads):
    table, x, y, z = geometry(elements, shape, seed)
    dense = matrix(table, x, y, z, samples, delay, weighting)
    signals, image = random(*batch, elements, samples, seed=seed), random(*batch, *shape, seed=seed + 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    gathered = kernel.gather(signals, table, x, y, z, delay, weighting)
    scattered = kernel.scatter(image, table, x, y, z, samples, delay, weighting)
    torch.set_num_threads(before)
    close(gathered, (signals.double().flatten(-2) @ dense).reshape(*batch, *shape), SINGLE)
    close(scattered, (image.double().flatten(-3) @ dense.T).reshape(signals.shape), SINGLE)


@given(**geometries)
@quiet
def test_one_is_the_adjoint_of_the_other(path, elements, samples, shape, delay, weighting, seed):
    table, x, y, z = geometry(elements, shape, seed)
    signals, image = random(elements, samples, seed=seed), random(*shape, seed=seed + 1)
    gathered = kernel.gather(signals, table, x, y, z, delay, weighting).double()
    scattered = kernel.scatter(image, table, x, y, z, samples, delay, weighting).double()
    difference = abs(float((gathered * image).sum() - (scattered * signals).sum()))
    # Either side may be small because its sums cancel, which says nothing about rounding.
    size = max(float(gathered.norm() * image.double().norm()), float(scattered.norm() * signals.double().norm()))
    assert difference <= ADJOINT * size + 1e-12


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_whole_array(path, weighting):
    """256 elements, 2030 samples and more pixels than a tile: sums over many elements stay exact."""
    angles = np.arange(96) * 2 * np.pi / 96
    ring = np.stack([1080 * np.cos(angles), 1080 * np.sin(angles), 0 * angles], 1)
    table = torch.from_numpy(np.hstack([ring, -ring / 1080, np.ones((96, 1))]))
    axis, z = torch.linspace(-300, 300, 70, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    signals, image = random(96, 1500), random(1, 70, 70, seed=1)
    gathered = kernel.gather(signals, table, axis, axis, z, 3.25, weighting).double()
    scattered = kernel.scatter(image, table, axis, axis, z, 1500, 3.25, weighting).double()
    close(gathered, kernel.gather(signals.double(), table, axis, axis, z, 3.25, weighting), 1e-4)
    difference = abs(float((gathered * image).sum() - (scattered * signals).sum()))
    assert difference <= ADJOINT * float(gathered.norm() * image.double().norm())


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16])
def test_whole_numbers_are_read_as_they_are(path, dtype):
    table, x, y, z = geometry(4, (1, 5, 9), 3)
    low, high = (-3000, 3000) if dtype == torch.int16 else (30000, 65535)
    whole = torch.from_numpy(np.random.default_rng(1).integers(low, high, (4, 100))).to(dtype)
    result = kernel.gather(whole, table, x, y, z)
    assert result.dtype == torch.float32
    expected = kernel.gather(whole.to(torch.float64), table, x, y, z)
    close(result, expected, SINGLE)


def prepared(signals, table, **settings):
    out = kernel.prepared(signals.shape[:-1].numel(), signals.shape[-1])
    kernel.prepare(signals, table, out, **settings)
    return out


@pytest.mark.parametrize("samples", [1, 2, 3, 40])
@pytest.mark.parametrize("derivative", [False, True])
def test_rows_are_prepared(path, samples, derivative):
    elements, x, y, z = geometry(3, (1, 1, 1), 5)
    elements[1, 6] = 0
    table = kernel.Table.of(elements, x, y, z)
    signals = (random(2, 3, samples) * 1000).to(torch.int16)
    found = prepared(signals, table, offset=7.5, delay=11.0, derivative=derivative)
    values = (signals.double() - 7.5) * elements[:, 6:7]
    if derivative:
        rise = np.gradient(values.numpy(), axis=-1) if samples > 1 else np.zeros_like(values)
        values = 2 * values - 2 * (torch.arange(samples) + 11) * torch.from_numpy(rise)
    expected = torch.nn.functional.pad(values, (1, 2)).reshape(6, -1)
    close(found, expected, 1e-6)


@pytest.mark.parametrize(("samples", "length"), [(1, 2), (30, 36), (700, 800), (700, 799), (2030, 2304)])
@pytest.mark.parametrize(("elements", "derivative"), [(1, False), (37, True)])
def test_rows_are_band_passed(path, samples, length, elements, derivative):
    """Rows of whole numbers, one dead, against transforms in double precision; 799 is no length of the compiled transform."""
    rng = np.random.default_rng(samples)
    table = torch.zeros(elements, kernel.COLUMNS, dtype=torch.float64)
    table[:, 6] = torch.from_numpy(rng.uniform(0.5, 2, elements))
    table[elements // 2, 6] *= elements == 1
    signals = torch.from_numpy(rng.integers(-3000, 3000, (2, elements, samples)).astype(np.int16))
    response = torch.from_numpy(rng.uniform(0, 1, length // 2 + 1))
    ramp = torch.linspace(0, 1, length - samples + 2, dtype=torch.float64)[1:-1]
    values = (signals.double() - 11.5) * table[:, 6:7]
    longer = torch.cat([values, values[..., -1:] + (values[..., :1] - values[..., -1:]) * ramp], -1)
    values = torch.fft.irfft(torch.fft.rfft(longer) * response, n=length)[..., :samples]
    if derivative:
        rise = np.gradient(values.numpy(), axis=-1) if samples > 1 else np.zeros_like(values)
        values = 2 * values - 2 * (torch.arange(samples) + 5) * torch.from_numpy(rise)
    settings = {"offset": 11.5, "delay": 5.0, "derivative": derivative, "length": length}
    axis = torch.zeros(1)
    found = prepared(
        signals, kernel.Table.of(table, axis, axis, axis), response=(response / length).float(), **settings
    )
    close(found, torch.nn.functional.pad(values, (1, 2)).reshape(2 * elements, -1), 3e-6)


def test_rows_may_lie_apart_and_dead_elements_may_hold_anything(path):
    elements, x, y, z = geometry(3, (1, 1, 1), 5)
    elements[:, 6] = torch.tensor([1.0, 0.0, 2.0])
    signals = random(3, 50)
    signals[1] = math.nan
    found = prepared(signals[:, :40], kernel.Table.of(elements, x, y, z))
    close(found[:, 1:-2], signals[:, :40].nan_to_num(0).double() * elements[:, 6:7], 1e-6)
    assert bool((found[:, [0, -2, -1]] == 0).all())


def test_double_precision_empty_batches_and_strides(path):
    table, x, y, z = geometry(3, (2, 3, 4), 3)
    dense = matrix(table, x, y, z, 60, 1.5, kernel.SPACE)
    signals = random(5, 60, 3, dtype=torch.float64).transpose(1, 2)
    expected = (signals.flatten(1) @ dense).reshape(5, 2, 3, 4)
    close(kernel.gather(signals, table, x, y, z, 1.5, kernel.SPACE), expected, 1e-12)
    close(kernel.gather(signals.float(), table, x, y, z, 1.5, kernel.SPACE), expected, SINGLE)
    assert kernel.gather(signals[:0].float(), table, x, y, z).shape == (0, 2, 3, 4)
    assert kernel.scatter(torch.zeros(0, 2, 3, 4), table, x, y, z, 60).shape == (0, 3, 60)


@pytest.mark.parametrize("level", native.LEVELS)
def test_every_instruction_set(level, monkeypatch):
    monkeypatch.setenv(native.VARIABLE, level)
    native.library.cache_clear()
    try:
        native.available()
    except (ImportError, OSError) as reason:
        pytest.skip(f"{level}: {reason}")
    table, x, y, z = geometry(6, (2, 5, 19), 7)
    for weighting in WEIGHTINGS:
        dense = matrix(table, x, y, z, 110, 2.5, weighting)
        signals, image = random(6, 110), random(2, 5, 19)
        close(
            kernel.gather(signals, table, x, y, z, 2.5, weighting),
            (signals.double().flatten() @ dense).reshape(2, 5, 19),
            SINGLE,
        )
        found = kernel.scatter(image, table, x, y, z, 110, 2.5, weighting)
        close(found, (dense @ image.double().flatten()).reshape(6, 110), SINGLE)
    monkeypatch.undo()
    native.library.cache_clear()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_cuda_gather(emulate, weighting):
    table, x, y, z = geometry(11, (2, 3, 9), 9)
    signals, compact = random(2, 11, 110), kernel.Table.of(table, x, y, z)
    rows, image = prepared(signals, compact), torch.zeros(2, 2, 3, 9)
    assert not emulate(*kernel.gather_launches(rows, compact, image, delay=2.5, weighting=weighting))
    dense = matrix(table, x, y, z, 110, 2.5, weighting)
    close(image, (signals.double().flatten(1) @ dense).reshape(image.shape), DEVICE)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_cuda_scatter(emulate, monkeypatch, weighting, shared):
    if not shared:
        monkeypatch.setattr(kernel, "_MOST_SHARED", 0)
    table, x, y, z = geometry(3, (2, 5, 29), 9)
    image, rows = random(2, 2, 5, 29), torch.zeros(2, 3, 110)
    launches = kernel.scatter_launches(image, kernel.Table.of(table, x, y, z), rows, delay=2.5, weighting=weighting)
    assert not emulate(*launches)
    dense = matrix(table, x, y, z, 110, 2.5, weighting)
    close(rows, (image.double().flatten(1) @ dense.T).reshape(rows.shape), DEVICE)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_torch_can_use_it(path, batch):
    table, x, y, z = geometry(3, (2, 3, 4), 3)
    signals, image = random(*batch, 3, 30).requires_grad_(), random(*batch, 2, 3, 4).requires_grad_()
    torch.library.opcheck(kernel.pat_gather, (signals, table, x, y, z, 1.5, kernel.PLANE))
    torch.library.opcheck(kernel.pat_scatter, (image, table, x, y, z, 30, 1.5, kernel.PLANE))
    double = signals.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: kernel.pat_gather(s, table, x, y, z, 1.5, kernel.SPACE), double)
    double = image.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: kernel.pat_scatter(s, table, x, y, z, 30, 1.5, kernel.SPACE), double)


def test_what_does_not_fit_is_named(path):
    table, x, y, z = geometry(3, (2, 3, 4), 3)
    with pytest.raises(ValueError, match=r"signals has shape \(4, 30\), its last axes must be \(3, samples\)"):
        kernel.gather(random(4, 30), table, x, y, z)
    with pytest.raises(ValueError, match=r"image has shape \(3, 4\), its last axes must be \(2, 3, 4\)"):
        kernel.scatter(random(3, 4), table, x, y, z, 30)
    with pytest.raises(ValueError, match=r"elements has shape \(3, 6\), needed is \(element, 7\)"):
        kernel.gather(random(3, 30), table[:, :6], x, y, z)
    with pytest.raises(ValueError, match=r"x has shape \(0,\)"):
        kernel.gather(random(3, 30), table, x[:0], y, z)
    with pytest.raises(ValueError, match="weighting is 3"):
        kernel.gather(random(3, 30), table, x, y, z, 0.0, 3)
    with pytest.raises(ValueError, match="samples is 0"):
        kernel.scatter(random(2, 3, 4), table, x, y, z, 0)
    with pytest.raises(ValueError, match="complex64, real numbers are needed"):
        kernel.gather(random(3, 30, dtype=torch.complex64), table, x, y, z)
