"""Folded pixels solved exactly, against elimination in double precision: compiled, by torch, and the CUDA source emulated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scanside.kernels import folded as kernel


def problem(ry, rz, z, y, x, batch, seed=0):
    """Hermitian matrices (group, R, R) in double precision, their eigenvectors and values as the kernel takes them, images."""
    generator = torch.Generator().manual_seed(seed)
    groups, size = z * y * x, ry * rz
    half = torch.randn(groups, size, size + 2, dtype=torch.complex128, generator=generator)
    matrices = half @ half.mH / size
    values, vectors = torch.linalg.eigh(matrices)
    right = torch.randn(*batch, z * rz, y * ry, x, dtype=torch.complex64, generator=generator)
    return matrices, vectors.movedim(0, -1).to(torch.complex64).contiguous(), values.T.float().contiguous(), right


def expected(matrices, right, ridge, ry, rz):
    z, y, x = right.shape[-3] // rz, right.shape[-2] // ry, right.shape[-1]
    groups = right.reshape(-1, rz, z, ry, y, x).permute(0, 2, 4, 5, 1, 3).reshape(-1, z * y * x, rz * ry, 1)
    solved = torch.linalg.solve(matrices + ridge * torch.eye(rz * ry), groups.to(torch.complex128))
    return solved.reshape(-1, z, y, x, rz, ry).permute(0, 4, 1, 5, 2, 3).reshape(right.shape)


def error(a, b):
    return float((a - b).abs().max() / b.abs().max())


@given(
    acceleration=st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (3, 2), (4, 4)]),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 20)),
    batch=st.lists(st.integers(1, 2), max_size=2),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_solves(path, acceleration, sizes, batch, seed):
    matrices, vectors, values, right = problem(*acceleration, *sizes, batch, seed)
    result = kernel.solve(vectors, values, right, 0.1, acceleration)
    assert error(result, expected(matrices, right, 0.1, *acceleration)) <= 1e-5  # the matrices' condition is below 100


def test_more_lines_than_the_kernel_has(path):
    matrices, vectors, values, right = problem(17, 1, 1, 2, 3, ())
    assert error(kernel.solve(vectors, values, right, 0.5, (17, 1)), expected(matrices, right, 0.5, 17, 1)) <= 1e-5


@pytest.mark.parametrize("acceleration", [(4, 1), (2, 2)])
def test_the_cuda_source(emulate, acceleration):
    matrices, vectors, values, right = problem(*acceleration, 2, 3, 30, (2,))
    result = torch.zeros_like(right)
    assert not emulate(*kernel.launches(vectors, values, right, result, 0.1, acceleration))
    assert error(result, expected(matrices, right, 0.1, *acceleration)) <= 1e-5


def test_what_does_not_fit_is_named(path):
    _, vectors, values, right = problem(4, 1, 1, 2, 3, ())
    with pytest.raises(ValueError, match=r"needed for acceleration \(3, 1\)"):
        kernel.solve(vectors, values, right, 0.1, (3, 1))
    with pytest.raises(ValueError, match=r"values torch\.float64"):
        kernel.solve(vectors, values.double(), right, 0.1, (4, 1))
