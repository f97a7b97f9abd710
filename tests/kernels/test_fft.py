"""Batched Fourier transforms against torch.fft in double precision: every length, every instruction set, CUDA emulated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scanside.kernels import fft as kernel
from scanside.kernels import native

LENGTHS = [n for n in range(1, kernel.LONGEST + 1) if kernel.transformable(n)]
LIMIT = 3e-7


def random(*shape, seed=0, dtype=torch.complex64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def exact(x, axis, sign):
    x = x.to(torch.complex128)
    return torch.fft.fft(x, dim=axis) if sign < 0 else torch.fft.ifft(x, dim=axis, norm="forward")


def error(result, x, axis, sign):
    expected = exact(x, axis, sign)
    return float(torch.linalg.vector_norm(result - expected) / torch.linalg.vector_norm(expected))


def test_the_lengths_are_those_of_small_primes():
    assert len(LENGTHS) == 87
    assert not any(kernel.transformable(n) for n in (7, 22, 1025, 1080))


@pytest.mark.parametrize("level", native.LEVELS)
def test_every_length(level, monkeypatch):
    monkeypatch.setenv(native.VARIABLE, level)
    native.library.cache_clear()
    try:
        native.available()
    except (ImportError, OSError) as reason:
        pytest.skip(f"{level}: {reason}")
    errors = {}
    for n in LENGTHS:
        for shape, axis in (((2, n, 19), 1), ((21, n), 1)):
            for sign in (-1, 1):
                x = random(*shape, seed=n)
                errors[n, axis, sign, shape] = error(kernel.apply(x, axis, sign), x, axis, sign)
    assert {case: e for case, e in errors.items() if e > LIMIT} == {}
    monkeypatch.undo()
    native.library.cache_clear()


@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    axis=st.integers(-4, 3),
    sign=st.sampled_from([-1, 1]),
    seed=st.integers(0, 2**31),
    threads=st.integers(1, 2),
    conjugate=st.booleans(),
)
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_axis_of_any_shape(path, shape, axis, sign, seed, threads, conjugate):
    axis %= len(shape)
    x = random(*shape, seed=seed)
    x = x.conj() if conjugate else x.transpose(0, -1)
    torch.set_num_threads(threads)
    result = kernel.apply(x, axis, sign, 0.5)
    torch.set_num_threads(1)
    assert result.shape == x.shape
    expected = 0.5 * exact(x, axis, sign)
    assert float((result - expected).abs().max()) <= 1e-6 * (1e-3 + float(expected.abs().max()))


@pytest.mark.parametrize("n", [2, 16, 240, 243, 256, 1000, 1024])
def test_there_and_back_and_the_adjoint(path, n):
    x, y = random(3, n), random(3, n, seed=1)
    back = kernel.apply(kernel.apply(x, 1), 1, 1, 1 / n)
    assert float((back - x).abs().max()) <= 2e-6
    inner = (
        torch.vdot(y.flatten(), kernel.apply(x, 1).flatten()),
        torch.vdot(kernel.apply(y, 1, 1).flatten(), x.flatten()),
    )
    size = torch.linalg.vector_norm(kernel.apply(x, 1)) * torch.linalg.vector_norm(y)
    assert float((inner[0] - inner[1]).abs() / size) <= 1e-6


def test_other_dtypes_and_lengths_are_left_to_torch(path):
    for x in (random(3, 7), random(3, 8, dtype=torch.complex128)):
        result = kernel.apply(x, -1)
        assert result.dtype == x.dtype
        torch.testing.assert_close(result, torch.fft.fft(x))
    assert kernel.apply(random(0, 8), -1).shape == (0, 8)


@pytest.mark.parametrize(
    ("shape", "axis", "sign"), [((2, 16, 5), 1, -1), ((9, 12), 1, 1), ((1, 60, 3), 1, 1), ((3, 1), 1, -1)]
)
def test_the_cuda_source(emulate, shape, axis, sign):
    x = random(*shape)
    result = torch.zeros_like(x)
    assert not emulate(*kernel.launches(x, result, kernel.roots(shape[axis]), axis, sign))
    assert error(result, x, axis, sign) <= LIMIT


@pytest.mark.parametrize("sign", [-1, 1])
def test_torch_can_use_it(path, sign):
    torch.library.opcheck(kernel.fft, (random(3, 8, 2).requires_grad_(), 1, sign, 0.5))
    assert torch.autograd.gradcheck(
        lambda x: kernel.fft(x, 1, sign, 0.5), random(2, 5, dtype=torch.complex128).requires_grad_()
    )


def test_what_cannot_be_is_named(path):
    for call, message in (
        (lambda: kernel.apply(torch.ones(3), 0), "float32, needed is a complex"),
        (lambda: kernel.apply(random(3), 0, 2), "sign is 2"),
        (lambda: kernel.apply(random(3), 1), "axis is 1, x has 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
