"""The step in k-space, coil by coil and over maps, against double precision mathematics: compiled, torch, CUDA emulated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scanside.kernels import device, kspace_step, native, sense, sense_device
from scanside.kernels.kspace_step import KspaceStep

TOLERANCE = 1e-6
AXES = [(-2,), (-3,), (-2, -1), (-1,), (-3, -2), ()]
lengths = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 12, 15, 16, 20, 27, 32, 36, 48, 7])
shares = st.sampled_from([1.0, 0.8, 0.25, 0.0])
seeds = st.integers(0, 2**31)


def random(*shape, seed=0, dtype=torch.complex64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def mask_for(axes, shape, seed, own_slices=False):
    """A mask that varies along the axes, and from slice to slice where asked for and possible."""
    sizes = [n if axis in axes else 1 for axis, n in zip((-3, -2, -1), shape, strict=True)]
    if own_slices and -3 not in axes:
        sizes[0] = shape[0]
    return torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) < 0.5


def exact(x, mask, data, axes, share):
    """By definition, in double precision."""
    kspace = torch.where(mask, (1 - share) * spectrum(x, axes) + share * data.to(torch.complex128), spectrum(x, axes))
    return torch.fft.ifftn(kspace, dim=axes, norm="forward") if axes else kspace


def spectrum(x, axes):
    """F x / N in double precision."""
    x = x.to(torch.complex128)
    return torch.fft.fftn(x, dim=axes, norm="forward") if axes else x


def error(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


@given(
    axes=st.sampled_from(AXES),
    shape=st.tuples(lengths, lengths, lengths).filter(lambda s: s[0] * s[1] * s[2] <= 6000),
    coils=st.integers(1, 4),
    batch=st.lists(st.integers(1, 2), max_size=2),
    own_slices=st.booleans(),
    share=shares,
    threads=st.integers(1, 3),
    seed=seeds,
)
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_step_is_that_of_its_definition(path, axes, shape, coils, batch, own_slices, share, threads, seed):
    mask = mask_for(axes, shape, seed, own_slices)
    data = torch.where(mask, random(coils, *shape, seed=seed), 0)
    x = random(*batch, coils, *shape, seed=seed + 1)
    torch.set_num_threads(threads)
    step = KspaceStep(data, mask, axes)
    result, kept = step(x, share), x.clone()
    torch.set_num_threads(1)
    assert result.shape == x.shape
    assert error(result, exact(x, mask, data, axes, share)) <= TOLERANCE
    assert torch.equal(x, kept)


@given(axes=st.sampled_from(AXES), shape=st.tuples(lengths, lengths, lengths), share=shares, seed=seeds)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_linear_part_is_its_own_adjoint(path, axes, shape, share, seed):
    shape = tuple(min(n, 16) for n in shape)
    mask = mask_for(axes, shape, seed).float()
    x, y = random(2, 3, *shape, seed=seed), random(2, 3, *shape, seed=seed + 1)
    forward = kspace_step.apply(x, mask, None, axes, share)
    adjoint = kspace_step.apply(y, mask, None, axes, share)
    size = torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y)
    inner = torch.vdot(y.flatten(), forward.flatten()), torch.vdot(adjoint.flatten(), x.flatten())
    assert float((inner[0] - inner[1]).abs() / size) <= TOLERANCE


@given(axes=st.sampled_from([(-2,), (-3,), (-2, -1)]), shape=st.tuples(lengths, lengths, lengths), seed=seeds)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_hard_step_holds_the_data_exactly(path, axes, shape, seed):
    """Bit by bit: of the estimate nothing is left at a sampled frequency, whatever its size, and all of it elsewhere."""
    shape = tuple(min(n, 20) for n in shape)
    everywhere = mask_for(axes, shape, seed).fill_(value=True)
    data = random(2, *shape, seed=seed)
    step = KspaceStep(data, everywhere, axes)
    zero = torch.zeros(2, *shape, dtype=torch.complex64)
    assert torch.equal(step(random(2, *shape, seed=seed + 1) * 1e6), step(zero))
    mask = mask_for(axes, shape, seed)
    found = torch.fft.fftn(
        KspaceStep(data * mask, mask, axes)(random(2, *shape, seed=seed + 2)), dim=axes, norm="forward"
    )
    wanted = torch.where(mask, data, torch.fft.fftn(random(2, *shape, seed=seed + 2), dim=axes, norm="forward"))
    assert error(found, wanted) <= TOLERANCE


@pytest.mark.parametrize("axes", [(-2,), (-2, -1)])
@pytest.mark.parametrize("level", native.LEVELS)
def test_every_instruction_set(level, axes, monkeypatch):
    monkeypatch.setenv(native.VARIABLE, level)
    native.library.cache_clear()
    try:
        native.available()
    except (ImportError, OSError) as reason:
        pytest.skip(f"{level}: {reason}")
    mask = mask_for(axes, (2, 40, 36), 0)
    data, x = random(3, 2, 40, 36) * mask, random(3, 2, 40, 36, seed=1)
    assert error(KspaceStep(data, mask, axes)(x, 0.7), exact(x, mask, data, axes, 0.7)) <= TOLERANCE
    monkeypatch.undo()
    native.library.cache_clear()


@pytest.mark.parametrize("axes", [(-2,), (-2, -1), (-1,)])
def test_torch_can_use_it(path, axes):
    shape = (2, 2, 8, 6)
    mask = mask_for(axes, shape[1:], 0)
    step = KspaceStep(random(*shape) * mask, mask, axes)
    x = random(3, *shape, seed=1).requires_grad_()
    arguments = (step._sampled, step._data, list(axes), 0.7, step._layout)
    torch.library.opcheck(kspace_step.kspace_step, (x, *arguments))
    up = random(3, *shape, seed=2)
    (gradient,) = torch.autograd.grad(step(x, 0.7), x, up)
    assert error(gradient, exact(up, mask, torch.zeros(shape), axes, 0.7)) <= TOLERANCE
    wide = KspaceStep(random(*shape).to(torch.complex128) * mask, mask, axes)
    assert torch.autograd.gradcheck(lambda z: wide(z, 0.7), x.detach()[:1].to(torch.complex128).requires_grad_())


def test_single_precision_of_double_data_stays_double(path):
    mask = mask_for((-2, -1), (1, 8, 8), 0)
    data, x = (random(2, 1, 8, 8, seed=s, dtype=torch.complex128) for s in (0, 1))
    result = KspaceStep(data * mask, mask, (-2, -1))(x)
    assert error(result, exact(x, mask, data * mask, (-2, -1), 1.0)) <= 1e-14


def test_what_does_not_fit_is_named(path):
    data, mask = random(2, 1, 8, 8), mask_for((-2, -1), (1, 8, 8), 0)
    step = KspaceStep(data, mask, (-2, -1))
    for call, message in (
        (lambda: KspaceStep(data[0], mask, (-2, -1)), r"data is torch.complex64 of shape \(1, 8, 8\)"),
        (lambda: KspaceStep(data, mask[:, :4], (-2, -1)), r"sampled has shape \(1, 4, 8\), it must broadcast"),
        (lambda: KspaceStep(data, mask, (-4, -1)), r"axes is \[-4, -1\], needed: some of -3, -2, -1"),
        (lambda: step(data[..., :4]), r"x is torch.complex64 of shape \(2, 1, 8, 4\)"),
        (lambda: step(data.to(torch.complex128)), "x is torch.complex128"),
        (
            lambda: kspace_step.apply(data, mask.float(), data[:1], (-2, -1), 1.0),
            "and data .coil, z, y, x. of the same",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- over maps -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled():
    if not native.available():
        pytest.skip("no compiled kernels in this installation")


@given(
    axes=st.sampled_from([(-2,), (-3,), (-2, -1)]),
    shape=st.tuples(lengths, lengths, lengths).filter(lambda s: s[0] * s[1] * s[2] <= 6000 and 7 not in s),
    coils=st.integers(1, 4),
    batch=st.lists(st.integers(1, 2), max_size=2),
    share=shares,
    threads=st.integers(1, 3),
    seed=seeds,
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_step_of_the_combined_image_is_that_of_its_coils(compiled, axes, shape, coils, batch, share, threads, seed):
    """maps^H (step of maps x), coil by coil, where sum |maps|^2 is 1."""
    maps = random(coils, *shape, seed=seed)
    maps = maps / maps.abs().square().sum(0).sqrt()
    mask, x = mask_for(axes, shape, seed), random(*batch, *shape, seed=seed + 1)
    data = torch.where(mask, random(coils, *shape, seed=seed + 2), 0)
    points = 1.0
    for axis in axes:
        points *= shape[axis]
    of_data = (maps.conj() * torch.fft.ifftn(data, dim=axes, norm="forward")).sum(0)
    torch.set_num_threads(threads)
    kernel = sense.planes(maps / points**0.5) if axes == (-2, -1) else sense.lines(maps / points**0.5, axes[0])
    result = kernel.descend(kernel.real_weights(mask.squeeze(0) if axes != (-3,) else mask), x, of_data, share)
    torch.set_num_threads(1)
    wide = maps.to(torch.complex128)
    expected = (wide.conj() * exact(wide * x.unsqueeze(-4), mask, data, axes, share)).sum(-4)
    assert error(result, expected) <= TOLERANCE


def test_torch_can_differentiate_the_step_of_the_combined_image(compiled):
    maps, of_data = random(2, 1, 8, 6) / 8, random(1, 8, 6, seed=1)
    mask = mask_for((-2, -1), (1, 8, 6), 0)[0]
    kernel = sense.planes(maps)
    weights, x, up = kernel.real_weights(mask), random(1, 8, 6, seed=2).requires_grad_(), random(1, 8, 6, seed=3)
    (gradient,) = torch.autograd.grad(kernel.descend(weights, x, of_data, 0.7), x, up)
    assert error(gradient, up - 0.7 * kernel.gram(weights, up)) <= TOLERANCE


# --- CUDA sources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize(
    ("axes", "shape", "coils", "batch", "own_slices"),
    [
        ((-2,), (2, 12, 5), 2, 2, True),
        ((-3,), (10, 2, 3), 3, 1, False),
        ((-2, -1), (1, 16, 12), 2, 1, False),
        ((-2, -1), (2, 6, 10), 2, 2, True),
    ],
)
def test_the_step_in_cuda(emulate, axes, shape, coils, batch, own_slices, with_data):
    mask = mask_for(axes, shape, 0, own_slices)
    data, x = random(coils, *shape) * mask, random(batch, coils, *shape, seed=1)
    result = torch.zeros_like(x)
    given = data if with_data else None
    assert not emulate(*kspace_step.launches(x, mask.float(), given, result, axes, 0.7))
    assert error(result, exact(x, mask, data if with_data else 0 * data, axes, 0.7)) <= TOLERANCE


@pytest.mark.parametrize("form", ["lines", "planes"])
def test_the_step_of_the_combined_image_in_cuda(emulate, form, monkeypatch):
    monkeypatch.setattr(device, "launch", lambda *launches: emulate(*launches))
    shape = (2, 12, 10)
    maps, x, of_data = random(3, *shape) / 12, random(2, *shape, seed=1), random(*shape, seed=2)
    kernel = sense_device.DeviceLines(maps, -2) if form == "lines" else sense_device.DevicePlanes(maps)
    mask = mask_for((-2,) if form == "lines" else (-2, -1), shape, 0)[0]
    weights = kernel.real_weights(mask)
    expected = x + 0.7 * (of_data - kernel.gram(weights, x))
    assert error(kernel.descend(weights, x, of_data, 0.7), expected) <= TOLERANCE
