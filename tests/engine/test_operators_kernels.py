"""Operators and solvers with compiled kernels give what torch gives, and what double precision says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.baselines.sense import cg_sense
from scanside.engine.baselines.solvers import conjugate_gradients
from scanside.engine.operators import CartesianSense, Fourier
from scanside.kernels import kspace_step, native, sense

TOLERANCE = 1e-5
seeds = st.integers(0, 2**31)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= TOLERANCE * float(b.abs().max())


@pytest.fixture(autouse=True, scope="module")
def compiled():
    if not native.available():
        pytest.skip("no compiled kernels in this installation")


def masks(shape, seed):
    """Masks of every kind that imaging has: lines, planes, one per slice, and along x."""
    generator = torch.Generator().manual_seed(seed)
    z, y, x = shape
    return [
        torch.rand(sizes, generator=generator) < 0.5 for sizes in ((y, 1), (y, x), (z, y, x), (z, y, 1), (1, x), (1, 1))
    ]


@given(
    shape=st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([6, 8, 15, 14]), st.sampled_from([4, 9, 11, 20])),
    axes=st.sampled_from([(-2,), (-2, -1), (-3, -2), (-3, -2, -1), (-1,)]),
    seed=seeds,
)
@settings(max_examples=40, deadline=None)
def test_single_precision_follows_double(shape, axes, seed):
    """In double precision torch does all the work, in single precision the kernels do what they can."""
    maps, x, y = random(3, *shape, seed=seed), random(2, *shape, seed=seed + 1), random(2, 3, *shape, seed=seed + 2)
    wide = torch.complex128
    for mask in masks(shape, seed):
        single, double = CartesianSense(maps, mask, axes), CartesianSense(maps.to(wide), mask, axes)
        close(single(x), double(x.to(wide)))
        close(single.H(y), double.H(y.to(wide)))
        close(single.gram(x), double.gram(x.to(wide)))
        close(single.with_mask(~mask).gram(x), double.with_mask(~mask).gram(x.to(wide)))


@given(
    shape=st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([6, 8, 15, 14]), st.sampled_from([1, 9, 11, 20])),
    axes=st.sampled_from([(-2,), (-2, -1), (-3, -2), (-3, -2, -1), (-1,)]),
    share=st.sampled_from([1.0, 0.3]),
    seed=seeds,
)
@settings(max_examples=40, deadline=None)
def test_the_step_of_coil_images_is_that_of_its_definition(shape, axes, share, seed):
    """Centered transform, the data where the mask is, and back, in double precision."""
    wide, x = torch.complex128, random(2, 3, *shape, seed=seed)
    fourier, plain = Fourier(shape, axes, dtype=wide), Fourier(shape, axes)
    for mask in masks(shape, seed):
        data = torch.where(mask, random(3, *shape, seed=seed + 1), 0)
        kspace = fourier(x.to(wide))
        kspace = torch.where(mask, (1 - share) * kspace + share * data.to(wide), kspace)
        close(plain.step(data, mask)(x, share), fourier.H(kspace))


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_step_of_the_combined_image_is_that_of_its_operators(share):
    maps, x, wide = random(3, 2, 16, 12), random(2, 2, 16, 12, seed=1), torch.complex128
    for mask in masks((2, 16, 12), 4):
        single, double = CartesianSense(maps, mask), CartesianSense(maps.to(wide), mask)
        of_data = single.H(random(3, 2, 16, 12, seed=2))
        expected = x.to(wide) + share * (of_data.to(wide) - double.gram(x.to(wide)))
        close(single.descend(x, of_data, share), expected)
        close(double.descend(x.to(wide), of_data.to(wide), share), expected)


@pytest.mark.parametrize("axes", [(-2,), (-2, -1)])
@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("start", [True, False])
def test_solutions_are_those_of_torch(axes, lines, start):
    shape = (2, 32, 24)
    maps = random(6, *shape) / 6**0.5
    mask = masks(shape, 3)[0 if lines else 1]
    data, initial = random(2, 6, *shape, seed=1), random(*shape, seed=2) if start else None
    wide = torch.complex128
    single, double = CartesianSense(maps, mask, axes), CartesianSense(maps.to(wide), mask, axes)
    found = cg_sense(single, data, iterations=8, regularization=0.02, initial=initial)
    given_start = None if initial is None else initial.to(wide)
    close(found, cg_sense(double, data.to(wide), iterations=8, regularization=0.02, initial=given_start))


def test_independent_columns_have_step_sizes_of_their_own():
    """A column that is already solved neither moves nor holds up the others."""
    maps, mask = random(3, 1, 16, 4, seed=5), torch.ones(16, 1)
    mask[::2] = 0
    gram = CartesianSense(maps.to(torch.complex128), mask, (-2,)).gram
    assert gram.independent == (-3, -1)
    b = gram(random(1, 16, 4, seed=6).to(torch.complex128))
    alone = [torch.where(torch.arange(4) == column, b, 0) for column in range(4)]
    together = conjugate_gradients(gram, b, iterations=5)
    torch.testing.assert_close(together, sum(conjugate_gradients(gram, one, iterations=5) for one in alone))


def test_gradients_pass_through():
    maps, x = random(3, 1, 16, 12), random(1, 16, 12, seed=1).requires_grad_()
    for mask in masks((1, 16, 12), 2)[:2]:
        operator = CartesianSense(maps, mask, (-2, -1))
        for function, adjoint in ((operator.gram, operator.gram), (operator, operator.H)):
            result = function(x)
            up = random(*result.shape, seed=3)
            (gradient,) = torch.autograd.grad(result, x, up)
            close(gradient, adjoint(up))
        solved = conjugate_gradients(operator.gram, x, iterations=3, regularization=0.1)
        assert solved.requires_grad
    recorded = CartesianSense(maps.requires_grad_(), mask, (-2, -1)).gram(x.detach())
    assert recorded.requires_grad


def test_the_kernels_are_used(monkeypatch):
    """Lines of a mask along y, and planes: through the compiled form; nothing else claims to be."""
    maps, x = random(3, 1, 16, 12), random(1, 16, 12, seed=1)
    calls = []
    for form in (sense.Lines, sense.Planes):
        monkeypatch.setattr(form, "gram", lambda self, weights, x: calls.append(type(self)) or x)
        monkeypatch.setattr(form, "descend", lambda self, weights, x, y, share: calls.append(type(self)) or x)
    for mask in masks((1, 16, 12), 2)[:2]:
        CartesianSense(maps, mask).gram(x)
        CartesianSense(maps, mask).descend(x, x, 1.0)
    assert calls == [sense.Lines, sense.Lines, sense.Planes, sense.Planes]


def test_steps_of_coil_images_use_the_kernels(monkeypatch):
    """Lines along y, whether x is k-space or not, and planes."""
    calls = []
    for name in ("_native_lines", "_native_planes"):
        monkeypatch.setattr(kspace_step, name, lambda x, *_, name=name: calls.append(name) or x)
    for axes in ((-2,), (-2, -1)):
        for mask in masks((1, 16, 12), 2)[:2] if len(axes) == 2 else masks((1, 16, 12), 2)[:1]:
            Fourier((1, 16, 12), axes).step(random(3, 1, 16, 12), mask)(random(3, 1, 16, 12))
    assert calls == ["_native_lines", "_native_lines", "_native_planes"]
