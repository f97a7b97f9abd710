"""Data consistency against dense linear algebra in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.config_priors import DataConfig
from scanside.engine.operators.cartesian import CartesianSense
from scanside.engine.samplers.consistency import CONSISTENCIES, DataConsistency, Measurement, make_consistency
from torch import Tensor


def random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.complex64)


def maps_of(seed: int, coils: int, shape: tuple[int, int, int]) -> Tensor:
    maps = random(seed, coils, *shape)
    return maps / maps.abs().square().sum(0).sqrt()


def dense(maps: Tensor, mask: Tensor, axes: tuple[int, ...]) -> np.ndarray:
    """A as a matrix in complex128, from the definition: maps, centered DFT, mask."""
    shape = maps.shape[1:]
    columns = []
    for index in range(maps[0].numel()):
        x = np.zeros(shape, complex)
        x.flat[index] = 1
        k = np.fft.ifftshift(maps.numpy().astype(complex) * x, axes)
        k = np.fft.fftshift(np.fft.fftn(k, axes=axes, norm="ortho"), axes)
        columns.append((k * mask.expand(shape).numpy()).ravel())
    return np.stack(columns, 1)


def proximal_reference(A: np.ndarray, y: Tensor, z: Tensor, weight: float) -> np.ndarray:
    left = A.conj().T @ A + weight * np.eye(A.shape[1])
    return np.linalg.solve(left, A.conj().T @ y.numpy().ravel().astype(complex) + weight * z.numpy().ravel())


def consistency(kind: str, measured: Measurement, **more: object) -> DataConsistency:
    return make_consistency(measured, DataConfig(kind=kind, **more))


@settings(max_examples=20)
@given(
    steps=st.sampled_from([(2, 1), (4, 1), (2, 2), (3, 1)]),
    offset=st.integers(0, 1),
    seed=st.integers(0, 100),
    sigma=st.floats(0.01, 1.0),
)
def test_the_closed_form_of_every_rth_line_is_exact(
    steps: tuple[int, int], offset: int, seed: int, sigma: float
) -> None:
    shape, (ry, rz) = (2 if steps[1] == 2 else 1, 12, 3), steps
    maps, mask = maps_of(seed, 4, shape), torch.zeros(*shape[:2], 1, dtype=torch.bool)
    mask[::rz, offset::ry] = True
    axes = (-3, -2)
    y, z = random(seed + 1, 4, *shape) * mask, random(seed + 2, *shape)
    measured = Measurement(data=y, mask=mask, maps=maps, axes=axes, noise=0.02, lattice=(steps, (offset, 0)))
    prox = consistency("proximal", measured, weight=2.0)
    weight = 2.0 * (0.02 / sigma) ** 2
    expected = proximal_reference(dense(maps, mask, axes), y, z, weight)
    error = np.abs(prox(z, sigma).numpy().ravel() - expected).max()
    assert error < 2e-4 * max(1.0, float(np.abs(expected).max()))


@pytest.mark.parametrize("axes", [(-2,), (-2, -1)])
def test_conjugate_gradients_come_to_the_proximal_point(axes: tuple[int, ...]) -> None:
    shape = (1, 8, 6)
    maps, mask = maps_of(0, 3, shape), torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = mask[..., :1] if axes == (-2,) else mask
    y, z = random(1, 3, *shape) * mask, random(2, *shape)
    prox = consistency("proximal", Measurement(data=y, mask=mask, maps=maps, axes=axes, noise=0.1), iterations=60)
    expected = proximal_reference(dense(maps, mask, axes), y, z, 0.25)
    np.testing.assert_allclose(prox(z, 0.2).numpy().ravel(), expected, atol=1e-4)


def test_one_channel_needs_no_iterations() -> None:
    shape = (1, 8, 8)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    y, z = random(1, 1, *shape) * mask, random(2, 1, *shape)
    prox = consistency("proximal", Measurement(data=y, mask=mask, noise=0.1))
    expected = proximal_reference(dense(torch.ones(1, *shape, dtype=torch.complex64), mask, (-2, -1)), y, z, 0.25)
    np.testing.assert_allclose(prox(z, 0.2).numpy().ravel(), expected, atol=1e-5)


def test_the_noise_counts_as_at_least_the_floor() -> None:
    shape = (1, 4, 4)
    measured = Measurement(data=random(0, 1, *shape), mask=torch.ones(shape, dtype=torch.bool), noise=0.001)
    weights = [consistency("proximal", measured, floor=floor).weight(0.1) for floor in (0.0, 0.01)]
    assert weights == pytest.approx([1e-4, 1e-2])


def test_hard_replacement_holds_the_data_and_leaves_the_rest() -> None:
    shape = (1, 8, 8)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    y, z = random(1, 3, *shape) * mask, random(2, 3, *shape)
    hard = consistency("hard", Measurement(data=y, mask=mask))
    before, after = hard.fourier(z), hard.fourier(hard(z, 0.1))
    torch.testing.assert_close(after[:, mask], y[:, mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[:, ~mask], before[:, ~mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "step"), [("sense", 1.0), ("gradient", 0.3)])
def test_projection_and_gradient_step_along_the_adjoint_of_the_residual(kind: str, step: float) -> None:
    shape = (1, 6, 6)
    maps, mask = maps_of(0, 3, shape), torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    y, z = random(1, 3, *shape) * mask, random(2, *shape)
    A = dense(maps, mask, (-2, -1))
    expected = z.numpy().ravel() + step * A.conj().T @ (y.numpy().ravel() - A @ z.numpy().ravel())
    made = consistency(kind, Measurement(data=y, mask=mask, maps=maps), weight=step)(z, 0.1)
    np.testing.assert_allclose(made.numpy().ravel(), expected, atol=1e-5)


def test_rows_of_a_state_that_is_data_are_replaced() -> None:
    mask = torch.tensor([True, False, True, False]).reshape(1, 4, 1)
    y, z = random(0, 1, 1, 4, 5), random(1, 1, 1, 4, 5)
    made = consistency("replace", Measurement(data=y, mask=mask))(z, 0.1)
    assert torch.equal(made[..., [0, 2], :], y[..., [0, 2], :])
    assert torch.equal(made[..., [1, 3], :], z[..., [1, 3], :])


@pytest.mark.parametrize("kind", [kind for kind in CONSISTENCIES if kind != "none"])
def test_an_update_makes_it_as_new(kind: str) -> None:
    """After `update`, what comes out is what a new one for the new data would give."""
    shape = (1, 6, 6)
    maps = None if kind in ("hard", "replace") else maps_of(0, 3, shape)
    masks = [torch.rand(shape, generator=torch.Generator().manual_seed(s)) < 0.5 for s in (1, 2)]
    y = random(1, 3, *shape)
    z = random(2, *((3, *shape) if maps is None else shape))
    used = consistency(kind, Measurement(data=y, mask=masks[0], maps=maps))
    used(z, 0.1)
    used.update(2 * y, masks[1])
    fresh = consistency(kind, Measurement(data=2 * y, mask=masks[1], maps=maps))
    assert torch.equal(used(z, 0.1), fresh(z, 0.1))
    assert not torch.allclose(used(z, 0.1), z)


def test_states_in_a_batch_are_each_treated_as_alone() -> None:
    shape = (1, 8, 4)
    maps, mask = maps_of(0, 3, shape), torch.zeros(1, 8, 1, dtype=torch.bool)
    mask[:, ::2] = True
    y, z = random(1, 3, *shape) * mask, random(2, 5, *shape)
    for lattice in (None, ((2, 1), (0, 0))):
        prox = consistency(
            "proximal", Measurement(data=y, mask=mask, maps=maps, axes=(-2,), noise=0.1, lattice=lattice)
        )
        torch.testing.assert_close(prox(z, 0.3), torch.stack([prox(one, 0.3) for one in z]), atol=1e-5, rtol=1e-4)


def test_maps_are_needed_where_coils_are_combined() -> None:
    measured = Measurement(data=random(0, 1, 1, 4, 4), mask=torch.ones(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="coil sensitivity maps"):
        consistency("sense", measured)


def test_the_operator_is_that_of_the_baselines() -> None:
    shape = (1, 6, 6)
    maps, mask = maps_of(0, 3, shape), torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    used = consistency("sense", Measurement(data=random(1, 3, *shape), mask=mask, maps=maps))
    x = random(3, *shape)
    torch.testing.assert_close(used.operator(x), CartesianSense(maps, mask)(x))


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("axes", [(-2,), (-2, -1)])
def test_the_residual_is_that_of_dense_algebra(axes: tuple[int, ...], scale: float) -> None:
    """Near the data, to the rounding that its expanded form has; and after an update, of the new data."""
    shape = (1, 8, 6)
    maps, mask = maps_of(0, 3, shape), torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = mask[..., :1] if axes == (-2,) else mask
    matrix, truth = dense(maps, mask, axes), random(2, *shape)
    y = torch.from_numpy((matrix @ truth.numpy().ravel()).reshape(3, *shape)).to(torch.complex64)
    measured = Measurement(data=torch.zeros_like(y), mask=mask, maps=maps, axes=axes)
    data = consistency("proximal", measured)
    assert data.residual(torch.zeros(shape, dtype=torch.complex64)) == 0
    data.update(y, mask)
    state = truth + scale * random(3, *shape)
    error = np.linalg.norm(matrix @ state.numpy().ravel() - y.numpy().ravel()) / np.linalg.norm(y.numpy())
    assert data.residual(state) == pytest.approx(error, rel=0.01, abs=1e-3)


@pytest.mark.parametrize("share_of_prior", [0.0, 0.5])
def test_images_with_masks_of_their_own_are_each_brought_to_their_data(share_of_prior: float) -> None:
    """As one after the other, by the kernels, would be."""
    generator = torch.Generator().manual_seed(4)
    state, data = (torch.randn(3, 1, 16, 12, dtype=torch.complex64, generator=generator) for _ in range(2))
    mask = torch.rand(3, 1, 16, 12, generator=generator) < 0.4
    kind = DataConfig(kind="proximal", floor=share_of_prior) if share_of_prior else DataConfig(kind="hard")
    together = make_consistency(Measurement(data=data, mask=mask), kind)(state, 0.7)
    for image, one in enumerate(together):
        alone = make_consistency(Measurement(data=data[image][None], mask=mask[image]), kind)(state[image][None], 0.7)
        torch.testing.assert_close(one[None], alone, rtol=1e-5, atol=1e-5)
