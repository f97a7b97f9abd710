"""The operator algebra and the Cartesian operators, against explicit float64 mathematics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.operators import (
    CartesianSense,
    CoilSensitivity,
    Fourier,
    Identity,
    LinearOperator,
    Sampling,
    Zero,
    adjoint_mismatch,
)

SINGLE, DOUBLE = 1e-5, 1e-12
AXES = [(-1,), (-2,), (-3, -2), (-2, -1), (-3, -2, -1)]
sizes = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True)
def one_thread():
    """Arrays this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Matrix(LinearOperator):
    """A dense matrix, as a user would write an operator."""

    def __init__(self, matrix):
        super().__init__((matrix.shape[1],), (matrix.shape[0],))
        self.matrix = matrix

    def _forward(self, x):
        return x @ self.matrix.T

    def _backward(self, y):
        return y @ self.matrix.conj()


def random(*shape, seed=0, dtype=torch.complex128):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_mask(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def dense(operator):
    """The operator as a float64 matrix."""
    unit = torch.eye(torch.Size(operator.domain).numel(), dtype=torch.complex128)
    return operator(unit.reshape(-1, *operator.domain)).reshape(len(unit), -1).T


def close(a, b, tolerance=1e-11):
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * (1 + float(b.abs().max()))


def centered_dft(shape, axes):
    """The matrix of the centered orthonormal transform, from its definition."""
    matrix = torch.ones(1, 1, dtype=torch.complex128)
    for place, size in enumerate(shape):
        index = torch.arange(size, dtype=torch.float64) - size // 2
        wave = torch.exp(-2j * torch.pi * torch.outer(index, index) / size) / size**0.5
        transformed = place - len(shape) in axes
        matrix = torch.kron(matrix, wave if transformed else torch.eye(size, dtype=torch.complex128))
    return matrix


@given(shape=sizes, axes=st.sampled_from(AXES))
@settings(max_examples=40, deadline=None)
def test_fourier_is_the_centered_orthonormal_transform(shape, axes):
    close(dense(Fourier(shape, axes, dtype=torch.complex128)), centered_dft(shape, axes))


@given(shape=sizes, coils=st.integers(1, 4), axes=st.sampled_from(AXES), seed=seeds, double=st.booleans())
@settings(max_examples=40, deadline=None)
def test_adjoints(shape, coils, axes, seed, double):
    dtype, tolerance = (torch.complex128, DOUBLE) if double else (torch.complex64, SINGLE)
    maps = random(coils, *shape, seed=seed, dtype=dtype)
    weights = random(*shape[1:], seed=seed + 1, dtype=dtype)
    operators = [
        Fourier(shape, axes, dtype=dtype),
        CoilSensitivity(maps),
        Sampling(weights, (coils, *shape)),
        CartesianSense(maps, random_mask(shape, seed), axes),
        CartesianSense(maps, weights, axes),
        CartesianSense(maps, weights, axes).gram,
    ]
    for operator in operators:
        assert adjoint_mismatch(operator, dtype=dtype, batch=(2,), seed=seed) <= tolerance


@given(shape=sizes, coils=st.integers(1, 4), axes=st.sampled_from(AXES), seed=seeds, lines=st.booleans())
@settings(max_examples=40, deadline=None)
def test_fused_sense_is_the_product_of_its_parts(shape, coils, axes, seed, lines):
    maps = random(coils, *shape, seed=seed)
    mask = random_mask((shape[1], 1) if lines else shape, seed)
    fused = CartesianSense(maps, mask, axes)
    parts = Sampling(mask, maps.shape) @ Fourier(maps.shape, axes, dtype=maps.dtype) @ CoilSensitivity(maps)
    x = random(2, *shape, seed=seed + 1)
    close(fused(x), parts(x))
    for operator in (fused, parts):
        close(operator.gram(x), operator.H(operator(x)))
    close(fused.with_mask(~mask).gram(x) + fused.gram(x), CoilSensitivity(maps).gram(x))


def test_gram_bound_is_at_least_the_largest_eigenvalue():
    operator = CartesianSense(random(3, 1, 6, 5), random_mask((6, 5), 3))
    largest = torch.linalg.eigvalsh(dense(operator.gram)).max()
    assert largest <= operator.gram_bound * (1 + 1e-12)


def test_unsampled_data_are_left_out():
    operator = CartesianSense(random(2, 1, 8, 8), random_mask((8, 8), 1))
    y = random(2, 1, 8, 8, seed=4)
    close(operator.H(y), operator.H(torch.where(operator.mask, y, 1e6)))


def test_algebra_is_that_of_matrices():
    a, b, c = random(4, 3), random(4, 3, seed=1), random(3, 5, seed=2)
    A, B, C = Matrix(a), Matrix(b), Matrix(c)
    close(dense(A @ C), a @ c)
    close(dense(A + B), a + b)
    close(dense(2j * A), 2j * a)
    close(dense(((A + B * 3) @ C).H), ((a + 3 * b) @ c).mH)
    close(dense((2j * A).gram), 4 * a.mH @ a)
    close(dense((A @ C).gram), c.mH @ a.mH @ a @ c)
    assert A.H.H is A


def test_neutral_elements_vanish():
    A = Matrix(random(4, 3))
    assert Identity((4,)) @ A is A
    assert A @ Identity((3,)) is A
    assert 1 * A is A
    assert A + Zero((3,), (4,)) is A
    assert isinstance(0 * A, Zero)
    assert isinstance(A @ Zero((2,), (3,)), Zero)
    assert 2 * (0.5 * A) is A
    assert isinstance(Fourier((4, 4)).gram, Identity)


def test_zero_and_identity():
    x = random(2, 3)
    assert torch.equal(Identity((3,))(x), x)
    assert torch.equal(Zero((3,), (4,))(x), torch.zeros(2, 4, dtype=x.dtype))
    assert torch.equal(Zero((3,), (4,)).H(random(4)), torch.zeros(3, dtype=x.dtype))


def test_wrong_shapes_are_named():
    A = Matrix(random(4, 3))
    with pytest.raises(ValueError, match=r"shape \(5,\).*domain \(3,\)"):
        A(random(5))
    with pytest.raises(ValueError, match=r"shape \(3,\).*range \(4,\)"):
        A.H(random(3))
    with pytest.raises(ValueError, match=r"takes \(3,\).*gives \(4,\)"):
        A @ A
    with pytest.raises(ValueError, match="equal"):
        A + A.H
    with pytest.raises(ValueError, match=r"last axes must be the domain \(1, 4, 4\)"):
        CartesianSense(random(2, 1, 4, 4), torch.ones(4, 4))(random(4, 4))


@pytest.mark.parametrize("axes", [(0,), (-4, -1), (-1, -1)])
def test_wrong_axes_are_refused(axes):
    with pytest.raises(ValueError, match="axes"):
        Fourier((4, 4), axes)


def test_wrong_masks_and_maps_are_refused():
    with pytest.raises(ValueError, match=r"mask has shape \(5, 4\)"):
        CartesianSense(random(2, 1, 4, 4), torch.ones(5, 4))
    with pytest.raises(ValueError, match=r"\(coil, z, y, x\)"):
        CartesianSense(random(4, 4), torch.ones(4, 4))
    with pytest.raises(ValueError, match="complex"):
        CartesianSense(torch.ones(2, 1, 4, 4), torch.ones(4, 4))


def test_a_wrong_adjoint_is_found():
    class Wrong(Matrix):
        def _backward(self, y):
            return y @ self.matrix

    assert adjoint_mismatch(Wrong(random(4, 3)), dtype=torch.complex128) > 1e-2

    class Short(Matrix):
        def _backward(self, y):
            return super()._backward(y)[..., :2]

    with pytest.raises(ValueError, match=r"A\^H y has shape \(2,\), promised is \(3,\)"):
        adjoint_mismatch(Short(random(4, 3)), dtype=torch.complex128)
