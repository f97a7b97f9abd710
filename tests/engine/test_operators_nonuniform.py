"""Non-uniform Fourier transform against the sum it stands for, and the wavelet transform."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.operators import Fourier, NonCartesianSense, NonUniformFourier, Wavelet, adjoint_mismatch

DOUBLE = torch.complex128


@pytest.fixture(autouse=True)
def one_thread():
    """Arrays this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_trajectory(pixels, seed, readouts=4, samples=7):
    points = torch.rand(
        readouts, samples, len(pixels), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return (points - 0.5) * torch.tensor(pixels[::-1])


def explicit(trajectory, pixels):
    """The matrix exp(-2 pi i k (n - c)/N) / sqrt(number of pixels), from its definition."""
    points = trajectory.reshape(-1, len(pixels)).flip(-1)
    matrix = torch.ones(len(points), 1, dtype=DOUBLE)
    for axis, size in enumerate(pixels):
        index = torch.arange(size, dtype=torch.float64) - size // 2
        wave = torch.exp(-2j * torch.pi * points[:, axis, None] * index / size)
        matrix = (matrix[:, :, None] * wave[:, None, :]).reshape(len(points), -1)
    return matrix / math.sqrt(math.prod(pixels))


def error(a, b):
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


pixel_sizes = st.lists(st.integers(4, 9), min_size=2, max_size=3).map(tuple)


@given(pixels=pixel_sizes, coils=st.integers(1, 3), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_transform_is_the_sum_it_stands_for(pixels, coils, seed):
    trajectory = random_trajectory(pixels, seed)
    shape = (coils, *((1,) if len(pixels) == 2 else ()), *pixels)
    x = random(*shape, seed=seed)
    reference = (x.reshape(coils, -1) @ explicit(trajectory, pixels).T).reshape(coils, 1, 4, 7)
    fine = NonUniformFourier(trajectory, shape, accuracy=1e-10)
    assert fine.range == (coils, 1, 4, 7)
    assert error(fine(x), reference) < 1e-8
    assert error(fine.gram(x), fine.H(fine(x))) < 1e-7
    coarse = NonUniformFourier(trajectory, shape)
    assert error(coarse(x.to(torch.complex64)), reference) < 1e-2


@given(pixels=pixel_sizes, seed=st.integers(0, 2**31), double=st.booleans())
@settings(max_examples=25, deadline=None)
def test_adjoints(pixels, seed, double):
    dtype, tolerance = (DOUBLE, 1e-12) if double else (torch.complex64, 1e-5)
    trajectory = random_trajectory(pixels, seed)
    shape = (3, *((1,) if len(pixels) == 2 else ()), *pixels)
    weights = torch.rand(4, 7, generator=torch.Generator().manual_seed(seed))
    maps = random(*shape, seed=seed, dtype=dtype)
    for operator in (
        NonUniformFourier(trajectory, shape),
        NonUniformFourier(trajectory, shape).gram,
        NonCartesianSense(maps, trajectory, weights=weights),
        NonCartesianSense(maps, trajectory, weights=weights).gram,
    ):
        assert adjoint_mismatch(operator, dtype=dtype, batch=(2,), seed=seed) <= tolerance


@pytest.mark.parametrize("pixels", [(8, 7), (6, 5, 8)])
def test_sense_gram_with_weights(pixels):
    maps = random(3, *((1,) if len(pixels) == 2 else ()), *pixels)
    weights = torch.rand(4, 7)
    operator = NonCartesianSense(maps, random_trajectory(pixels, 3), weights=weights, accuracy=1e-10)
    x, y = random(2, *operator.domain, seed=5), random(*operator.range, seed=6)
    assert error(operator.gram(x), operator.H(operator(x))) < 1e-7
    assert error(operator.weigh(operator.weigh(y)), weights * y) < 1e-6


def test_integer_frequencies_are_those_of_the_fourier_operator():
    size = 10
    ky, kx = torch.meshgrid(torch.arange(size) - size // 2, torch.arange(size) - size // 2, indexing="ij")
    trajectory = torch.stack([kx, ky], dim=-1).double()
    x = random(2, 1, size, size)
    assert error(NonUniformFourier(trajectory, x.shape, accuracy=1e-12)(x), Fourier(x.shape, dtype=DOUBLE)(x)) < 1e-10


def test_conjugate_views_are_taken():
    x = random(1, 32, 32)
    for operator in (NonUniformFourier(random_trajectory((32, 32), 1), x.shape), Wavelet(x.shape)):
        assert error(operator(x.conj()), operator(x.conj().resolve_conj())) == 0


def test_wrong_trajectories_are_refused():
    with pytest.raises(ValueError, match="readouts, samples"):
        NonUniformFourier(torch.zeros(7, 2), (1, 8, 8))
    with pytest.raises(ValueError, match=r"ky = 5 cycles .* 8 pixels hold 4"):
        NonUniformFourier(torch.tensor([[[0.0, 5.0]]]), (1, 8, 8))
    with pytest.raises(ValueError, match="nan"):
        NonUniformFourier(torch.full((1, 1, 2), math.nan), (1, 8, 8))


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(2, 40)),
    wavelet=st.sampled_from(["haar", "db2", "db4"]),
    levels=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_wavelet_keeps_norms_and_has_its_adjoint(shape, wavelet, levels, seed):
    plain = Wavelet(shape, wavelet=wavelet, levels=levels)
    operator = plain.shifted([seed % 7 for _ in plain.axes])
    x = random(2, *shape, seed=seed)
    assert adjoint_mismatch(operator, dtype=DOUBLE, batch=(2,)) < 1e-12
    assert error(operator.H(operator(x)), x) < 1e-12
    assert error(operator.gram(x), x) == 0
    assert adjoint_mismatch(operator, dtype=torch.complex64) < 1e-5


def test_wavelet_in_three_dimensions():
    operator = Wavelet((32, 20, 64), (-3, -2, -1), wavelet="db2", levels=2)
    x = random(32, 20, 64)
    assert operator.axes == (-3, -2, -1)
    assert error(operator.H(operator(x)), x) < 1e-12


def test_wavelet_compresses_a_smooth_image():
    axis = torch.linspace(-1, 1, 64)
    x = torch.exp(-4 * (axis[:, None] ** 2 + axis**2)).to(torch.complex128)[None]
    power = Wavelet(x.shape)(x).abs().square().flatten().sort(descending=True).values
    assert power[: len(power) // 20].sum() > 0.999 * power.sum()


def test_wavelet_shift_by_a_period_moves_nothing_else():
    plain = Wavelet((1, 64, 64), wavelet="db2", levels=2)
    x = random(1, 64, 64)
    moved = plain.shifted((plain.period, 0))
    assert math.isclose(float(plain(x).abs().sum()), float(moved(x).abs().sum()), rel_tol=1e-10)


def test_wrong_wavelets_are_refused():
    with pytest.raises(ValueError, match="orthogonal"):
        Wavelet((1, 32, 32), wavelet="bior4.4")
    with pytest.raises(ValueError, match="one number"):
        Wavelet((1, 32, 32), shift=(3,))
