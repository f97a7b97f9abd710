"""Multi-coil data consistency against explicit double precision mathematics: compiled, and the CUDA sources emulated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.kernels import device, native, sense, sense_device, sense_operators

TOLERANCE = 1e-6
lengths = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 12, 16, 20, 27, 32, 40, 48])
seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True, scope="module")
def compiled():
    if not native.available():
        pytest.skip("no compiled kernels in this installation")


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def positive(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def forward(maps, weights, x, axes):
    """weights F maps x in double precision."""
    wide = torch.complex128
    return torch.fft.fftn(maps.to(wide) * x.to(wide).unsqueeze(-4), dim=axes) * weights.to(wide)


def adjoint(maps, weights, y, axes):
    wide = torch.complex128
    images = torch.fft.ifftn(weights.to(wide).conj() * y.to(wide), dim=axes, norm="forward")
    return (maps.to(wide).conj() * images).sum(-4)


def gram(maps, weights, x, axes):
    return adjoint(maps, torch.ones(()), forward(maps, weights, x, axes), axes)


def error(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def prepared(maps, axes):
    return sense.planes(maps) if axes == (-2, -1) else sense.lines(maps, axes[0])


def weights_for(axes, shape, slices, seed, real):
    """Weights that vary as each form allows."""
    sizes = {(-2, -1): (slices, *shape[1:]), (-2,): (shape[1], 1), (-3,): (shape[0], 1, 1)}[axes]
    return positive(*sizes, seed=seed) if real else random(*sizes, seed=seed)


@given(
    axes=st.sampled_from([(-2,), (-3,), (-2, -1)]),
    shape=st.tuples(lengths, lengths, lengths).filter(lambda s: s[0] * s[1] * s[2] <= 6000),
    coils=st.integers(1, 5),
    batch=st.lists(st.integers(1, 2), max_size=2),
    own_slices=st.booleans(),
    threads=st.integers(1, 3),
    seed=seeds,
)
@settings(max_examples=60)
def test_operator_adjoint_and_gram(axes, shape, coils, batch, own_slices, threads, seed):
    maps, x = random(coils, *shape, seed=seed), random(*batch, *shape, seed=seed + 1)
    y = random(*batch, coils, *shape, seed=seed + 2)
    slices = shape[0] if own_slices else 1
    real, both = (weights_for(axes, shape, slices, seed, kind) for kind in (True, False))
    torch.set_num_threads(threads)
    kernel = prepared(maps, axes)
    results = (
        kernel.gram(kernel.real_weights(real), x),
        kernel.forward(kernel.complex_weights(both), x),
        kernel.adjoint(kernel.complex_weights(both), y),
    )
    torch.set_num_threads(1)
    expected = gram(maps, real, x, axes), forward(maps, both, x, axes), adjoint(maps, both, y, axes)
    for result, right in zip(results, expected, strict=True):
        assert result.shape == right.shape
        assert error(result, right) <= TOLERANCE
    inner = torch.vdot(y.flatten(), results[1].flatten()), torch.vdot(results[2].flatten(), x.flatten())
    size = torch.linalg.vector_norm(results[1]) * torch.linalg.vector_norm(y)
    assert float((inner[0] - inner[1]).abs() / size.clamp_min(1e-30)) <= TOLERANCE


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize("axes", [(-2,), (-2, -1)])
def test_every_instruction_set(level, axes, monkeypatch):
    monkeypatch.setenv(native.VARIABLE, level)
    native.library.cache_clear()
    try:
        native.available()
    except (ImportError, OSError) as reason:
        pytest.skip(f"{level}: {reason}")
    maps, x = random(3, 2, 24, 20), random(2, 24, 20, seed=1)
    weights = weights_for(axes, (2, 24, 20), 1, 2, real=True)
    kernel = prepared(maps, axes)
    assert error(kernel.gram(kernel.real_weights(weights), x), gram(maps, weights, x, axes)) <= TOLERANCE
    monkeypatch.undo()
    native.library.cache_clear()


def dense_solution(maps, weights, b, axes, ridge):
    """The solution by elimination in double precision."""
    unit = torch.eye(b.numel(), dtype=torch.complex128).reshape(-1, *b.shape)
    matrix = gram(maps, weights, unit, axes).reshape(b.numel(), -1).T + ridge * torch.eye(b.numel())
    return torch.linalg.solve(matrix, b.to(torch.complex128).flatten()).reshape(b.shape)


@pytest.mark.parametrize("axes", [(-2,), (-3,), (-2, -1)])
@pytest.mark.parametrize("start", [False, True])
def test_conjugate_gradients_find_the_solution(axes, start):
    shape = (3, 8, 6)
    maps, b = random(4, *shape) / 8, random(*shape, seed=1)
    weights = (weights_for(axes, shape, 1, 2, real=True) < 0.6).float()
    kernel = prepared(maps, axes)
    initial = random(*shape, seed=3) if start else None
    for threads in (1, 2):
        torch.set_num_threads(threads)
        x = kernel.solve(kernel.real_weights(weights), b, 80, 0.05, initial)
        torch.set_num_threads(1)
        assert error(x, dense_solution(maps, weights, b, axes, 0.05)) <= 2e-5


def test_nothing_is_divided_by_zero():
    """Columns without signal stay 0, and a solution that is reached stays."""
    maps = torch.zeros(2, 1, 8, 8, dtype=torch.complex64)
    maps[:, 0, :, 3] = 0.3
    for kernel, weights in ((sense.lines(maps, -2), torch.ones(8)), (sense.planes(maps), torch.ones(8, 8))):
        b = torch.zeros(1, 8, 8, dtype=torch.complex64)
        assert torch.equal(kernel.solve(kernel.real_weights(weights), b, 5, 0.0, None), b)
        b[0, :, 3] = 1
        found = kernel.solve(kernel.real_weights(weights), b, 50, 0.0, None)
        scale = 8 if isinstance(kernel, sense.Lines) else 64
        torch.testing.assert_close(found, b / (2 * 0.09 * scale), rtol=1e-5, atol=1e-7)


def test_what_the_kernels_do_not_have_is_left_to_torch():
    assert sense.lines(random(2, 1, 7, 8), -2) is None
    assert sense.lines(random(2, 1, 8, 8), -1) is None
    assert sense.planes(random(2, 1, 8, 22)) is None
    assert sense.planes(random(2, 1, 8, 8).to(torch.complex128)) is None
    assert sense.planes(random(2, 1, 8, 8).requires_grad_()) is None


def test_torch_can_use_and_differentiate_all_of_it():
    """Each operator has its adjoint as derivative, a gram itself."""
    maps, x, y = random(2, 1, 8, 6), random(3, 1, 8, 6, seed=1), random(3, 2, 1, 8, 6, seed=2)
    lines, planes = sense.lines(maps, -2), sense.planes(maps)
    for kernel, sizes in ((lines, (8, 1)), (planes, (8, 6))):
        real, both = kernel.real_weights(positive(*sizes)), kernel.complex_weights(random(*sizes, seed=3))
        for kind, weights, argument, adjoint in (
            ("gram", real, x, "gram"),
            ("forward", both, x, "adjoint"),
            ("adjoint", both, y, "forward"),
        ):
            asked = argument.clone().requires_grad_()
            operator = sense_operators.OPERATORS[f"{kernel.form}_{kind}"]
            torch.library.opcheck(operator, (kernel.packed, weights, asked, 2, kernel.sizes))
            result = getattr(kernel, kind)(weights, asked)
            assert torch.equal(result, getattr(kernel, kind)(weights, argument))
            up = random(*result.shape, seed=4)
            (gradient,) = torch.autograd.grad(result, asked, up)
            assert torch.equal(gradient, getattr(kernel, adjoint)(weights, up))


# --- CUDA sources --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "shape", "coils", "batch"), [(-2, (2, 16, 6), 2, 1), (-3, (12, 2, 3), 3, 2)])
def test_lines_in_cuda(emulate, axis, shape, coils, batch):
    maps, x = random(coils, *shape), random(batch, *shape, seed=1)
    weights = positive(shape[axis], seed=2)
    full = weights.reshape(-1, *(1,) * (-axis - 1))
    result = torch.zeros_like(x)
    assert not emulate(*sense_device.lines_gram(maps, weights, x, result, axis))
    assert error(result, gram(maps, full, x, (axis,))) <= TOLERANCE
    start = random(batch, *shape, seed=4)
    solved = start.clone()
    assert not emulate(*sense_device.lines_solve(maps / 8, weights, x, solved, axis, 0.05, 6))
    kernel = sense.lines(maps / 8, axis)
    assert error(solved, kernel.solve(kernel.real_weights(weights), x, 6, 0.05, start)) <= 1e-4


@pytest.fixture
def emulated(emulate, monkeypatch):
    """Launches of whoever computes on a device run emulated."""
    monkeypatch.setattr(device, "launch", lambda *launches: emulate(*launches))


def gradients(kernel, packed, x, y):
    """Of A it is A^H, of A^H it is A."""
    for function, adjoint, argument, up in (
        (kernel.forward, kernel.adjoint, x, y),
        (kernel.adjoint, kernel.forward, y, x),
    ):
        asked = argument.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(packed, asked), asked, up)
        assert torch.equal(gradient, adjoint(packed, up))


@pytest.mark.parametrize(("axis", "shape", "coils", "batch"), [(-2, (2, 12, 5), 2, 2), (-3, (10, 2, 3), 3, 1)])
def test_operator_and_adjoint_of_lines_in_cuda(emulated, axis, shape, coils, batch):
    maps, x, y = random(coils, *shape), random(batch, *shape, seed=1), random(batch, coils, *shape, seed=2)
    weights = weights_for((axis,), shape, 1, 3, real=False)
    kernel = sense_device.DeviceLines(maps, axis)
    packed = kernel.complex_weights(weights)
    assert error(kernel.forward(packed, x), forward(maps, weights, x, (axis,))) <= TOLERANCE
    assert error(kernel.adjoint(packed, y), adjoint(maps, weights, y, (axis,))) <= TOLERANCE
    gradients(kernel, packed, x, y)


@pytest.mark.parametrize(("shape", "coils", "batch", "slices"), [((1, 16, 12), 2, 1, 1), ((2, 6, 10), 1, 2, 2)])
def test_operator_and_adjoint_of_planes_in_cuda(emulated, shape, coils, batch, slices):
    maps, x, y = random(coils, *shape), random(batch, *shape, seed=1), random(batch, coils, *shape, seed=2)
    weights = weights_for((-2, -1), shape, slices, 3, real=False)
    kernel = sense_device.DevicePlanes(maps)
    packed = kernel.complex_weights(weights)
    assert error(kernel.forward(packed, x), forward(maps, weights, x, (-2, -1))) <= TOLERANCE
    assert error(kernel.adjoint(packed, y), adjoint(maps, weights, y, (-2, -1))) <= TOLERANCE
    gradients(kernel, packed, x, y)


def test_planes_are_solved_and_differentiated_in_cuda(emulated):
    maps, x = random(2, 2, 6, 10) / 8, random(2, 6, 10, seed=1)
    weights, kernel = positive(6, 10, seed=2), sense_device.DevicePlanes(maps)
    packed, own = kernel.real_weights(weights), sense.planes(maps)
    for initial in (None, random(2, 6, 10, seed=4)):
        expected = own.solve(own.real_weights(weights), x, 4, 0.05, initial)
        assert error(kernel.solve(packed, x, 4, 0.05, initial), expected) <= 1e-4
    asked = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kernel.gram(packed, asked), asked, random(2, 6, 10, seed=5))
    assert error(gradient, gram(maps, weights, random(2, 6, 10, seed=5), (-2, -1))) <= TOLERANCE


@pytest.mark.parametrize(("shape", "coils", "batch", "slices"), [((1, 16, 12), 2, 1, 1), ((2, 6, 10), 1, 2, 2)])
def test_planes_in_cuda(emulate, shape, coils, batch, slices):
    maps, x = random(coils, *shape), random(batch, *shape, seed=1)
    weights = positive(slices, *shape[1:], seed=2)
    kspace, result = random(batch * shape[0], coils, *shape[1:], seed=3), torch.zeros_like(x)
    assert not emulate(*sense_device.planes_gram(maps, weights, x, kspace, result))
    assert error(result, gram(maps, weights, x, (-2, -1))) <= TOLERANCE
