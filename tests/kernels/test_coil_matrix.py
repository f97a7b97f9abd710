"""The per-pixel coil matrix against einsum in double precision: compiled, by torch, and the CUDA source emulated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scanside.kernels import coil_matrix as kernel
from scanside.kernels import native

TOLERANCE = 1e-6


def random(*shape, seed=0, dtype=torch.complex64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def problem(coils, pixels, batch, seed, dtype=torch.complex64):
    entries = random(coils * (coils + 1) // 2, *pixels, seed=seed, dtype=dtype)
    return entries, random(*batch, coils, *pixels, seed=seed + 1, dtype=dtype)


def expected(entries, x):
    """The full matrices, in double precision."""
    coils = x.shape[-entries.ndim]
    rows, columns = torch.triu_indices(coils, coils)
    full = torch.zeros(coils, coils, *entries.shape[1:], dtype=torch.complex128)
    full[columns, rows] = entries.conj().to(torch.complex128)
    full[rows, columns] = entries.to(torch.complex128)
    full.diagonal().imag.zero_()
    flat = x.to(torch.complex128)[None].flatten(0, x.ndim - entries.ndim)
    return torch.einsum("cd...,bd...->bc...", full, flat).reshape(x.shape)


def error(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


@given(
    coils=st.integers(1, 9),
    pixels=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    batch=st.lists(st.integers(1, 3), max_size=2),
    seed=st.integers(0, 2**31),
    threads=st.integers(1, 2),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_multiplies(path, coils, pixels, batch, seed, threads):
    entries, x = problem(coils, pixels, batch, seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    result = kernel.apply(entries, x)
    torch.set_num_threads(before)
    assert result.shape == x.shape
    assert error(result, expected(entries, x)) <= TOLERANCE


@pytest.mark.parametrize("coils", [1, 8, 32, 128, 129])
def test_many_coils(path, coils):
    entries, x = problem(coils, (19,), (), 1)
    assert error(kernel.apply(entries, x), expected(entries, x)) <= 3 * TOLERANCE


def test_double_precision_and_empty_batches(path):
    entries, x = problem(3, (4, 5), (2,), 3, torch.complex128)
    assert error(kernel.apply(entries, x), expected(entries, x)) <= 1e-14
    assert kernel.apply(entries, x[:0]).shape == (0, 3, 4, 5)


@pytest.mark.parametrize("level", native.LEVELS)
def test_every_instruction_set(level, monkeypatch):
    monkeypatch.setenv(native.VARIABLE, level)
    native.library.cache_clear()
    try:
        native.available()
    except (ImportError, OSError) as reason:
        pytest.skip(f"{level}: {reason}")
    entries, x = problem(5, (7, 9), (2,), 5)
    assert error(kernel.apply(entries, x), expected(entries, x)) <= TOLERANCE
    monkeypatch.undo()
    native.library.cache_clear()


@pytest.mark.parametrize(("coils", "pixels", "batch"), [(1, (5,), (1,)), (4, (3, 50), (2,)), (8, (200,), (1,))])
def test_the_cuda_source(emulate, coils, pixels, batch):
    entries, x = problem(coils, pixels, batch, 9)
    result = torch.zeros_like(x)
    assert not emulate(*kernel.launches(entries, x, result))
    assert error(result, expected(entries, x)) <= TOLERANCE


@pytest.mark.parametrize("batch", [(), (2,)])
def test_torch_can_use_it(path, batch):
    entries, x = problem(3, (4, 5), batch, 11)
    entries.requires_grad_()
    x.requires_grad_()
    torch.library.opcheck(kernel.coil_matrix, (entries, x))
    double = [t.detach().to(torch.complex128).requires_grad_() for t in (entries, x)]
    assert torch.autograd.gradcheck(kernel.coil_matrix, double)


def test_what_does_not_fit_is_named(path):
    entries, x = problem(3, (4, 5), (), 1)
    with pytest.raises(ValueError, match=r"matrix has shape \(5, 4, 5\), x \(3, 4, 5\)"):
        kernel.apply(entries[:5], x)
    with pytest.raises(ValueError, match=r"x \(3, 4, 6\)"):
        kernel.apply(entries, random(3, 4, 6))
    with pytest.raises(ValueError, match="the same complex dtype"):
        kernel.apply(entries, x.to(torch.complex128))
