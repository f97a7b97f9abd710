"""The loop and its sampler rules, on cases whose answer is known: Gaussian priors, and a mixture of Gaussians."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scanside.engine.config_priors import ConstraintConfig, DataConfig, PriorConfig, SamplerConfig, StageConfig
from scanside.engine.errors import ConfigError
from scanside.engine.priors.denoiser import DenoiseFunction, energy_gradient, score
from scanside.engine.samplers.consistency import Measurement
from scanside.engine.samplers.loop import Program, generate, make_program, run_to_end
from scanside.engine.samplers.rules import RULES
from scanside.engine.samplers.schedules import along, noise_levels
from torch import Tensor

SHAPE = (1, 16, 16)
ZERO = torch.zeros(1, *SHAPE, dtype=torch.complex64)
MEAN, SPREAD = 0.3, 0.2
"""Of the prior: each real and imaginary part is Gaussian, independent of the others."""


def gaussian(u: Tensor, sigma: Tensor) -> Tensor:
    """E[x | x + sigma n = u] of that prior, in closed form; real and imaginary part have the same mean."""
    s = sigma.reshape(-1, 1, 1, 1)
    return (SPREAD**2 * u + s**2 * MEAN) / (SPREAD**2 + s**2)


def mixture(u: Tensor, sigma: Tensor) -> Tensor:
    """The same for the prior (N(-1, 0.1^2) + N(1, 0.1^2)) / 2 of each number."""
    s = sigma.reshape(-1, 1, 1, 1)
    total = 0.1**2 + s**2
    weight = torch.sigmoid(2 * u / total)
    return sum(w * (0.01 * u + s**2 * m) / total for w, m in ((weight, 1.0), (1 - weight, -1.0)))


def measured(mask: Tensor, data: Tensor | None = None, **more: object) -> Measurement:
    data = torch.zeros(1, *SHAPE, dtype=torch.complex64) if data is None else data
    return Measurement(data=data, mask=mask, **more)


def program(sampler: SamplerConfig, found: Measurement, prior: DenoiseFunction = gaussian, **data: object) -> Program:
    stage = StageConfig(data=DataConfig(**data))
    return make_program([stage], sampler, {"": prior}, found)


# --- one function, three views -----------------------------------------------------------------------------------------------


def log_density(u: Tensor, sigma: float) -> Tensor:
    total = 0.01 + sigma**2
    return torch.logsumexp(torch.stack([-((u - m) ** 2) / (2 * total) for m in (-1.0, 1.0)]), 0).sum()


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0])
def test_the_score_of_a_denoiser_is_the_gradient_of_the_known_density(sigma: float) -> None:
    u = torch.linspace(-2, 2, 64, dtype=torch.float64).reshape(1, 1, 8, 8).requires_grad_()
    (expected,) = torch.autograd.grad(log_density(u, sigma), u)
    torch.testing.assert_close(score(mixture, u.detach(), torch.full((1,), sigma, dtype=torch.float64)), expected)


def test_the_energy_gradient_is_that_of_the_squared_error() -> None:
    u = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.tensor([0.2, 0.7], dtype=torch.float64)
    total = (
        SPREAD**2 + sigma.reshape(-1, 1, 1, 1) ** 2
    )  # u - D = s^2 (u - m) / total, so E = s^2 (u - m)^2 / (2 total^2)
    expected = sigma.reshape(-1, 1, 1, 1) ** 2 * (u - MEAN) / total**2
    torch.testing.assert_close(energy_gradient(gaussian, u, sigma), expected)


# --- unconditional: samples have the moments of the prior --------------------------------------------------------------------

SAMPLERS = {
    "annealed_langevin": SamplerConfig(
        rule="annealed_langevin", levels=12, steps=20, relaxation=0.1, sigma=(1.0, 0.02), start="noise"
    ),
    "predictor_corrector": SamplerConfig(
        rule="predictor_corrector", levels=200, steps=1, snr=0.1, sigma=(2.0, 0.005), start="noise"
    ),
    "ddim": SamplerConfig(rule="ddim", levels=200, sigma=(5.0, 0.005), eta=0.0, start="noise"),
    "ddim_stochastic": SamplerConfig(rule="ddim", levels=300, sigma=(5.0, 0.005), eta=0.85, start="noise"),
    "heun": SamplerConfig(rule="heun", levels=25, sigma=(5.0, 0.005), spacing="edm", start="noise"),
    "mean_reverting": SamplerConfig(rule="mean_reverting", levels=200, sigma=(0.5, 0.05), start="given"),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_without_data_have_the_moments_of_the_prior(name: str) -> None:
    stage = StageConfig(data=DataConfig(kind="none"))
    found = measured(torch.zeros(SHAPE, dtype=torch.bool))
    start = torch.full((64, 1, *SHAPE), MEAN * (1 + 1j), dtype=torch.complex64)
    image = run_to_end(make_program([stage], SAMPLERS[name], {"": gaussian}, found), start, seed=1).image
    numbers = torch.view_as_real(image)
    assert abs(float(numbers.mean()) - MEAN) < 0.03
    assert abs(float(numbers.std()) / SPREAD - 1) < 0.12


def test_an_image_is_generated_from_noise() -> None:
    sampler = msgspec.structs.replace(SAMPLERS["annealed_langevin"], start="given")
    made = generate(mixture, sampler, (8, *SHAPE[-2:]), seed=3)
    assert made.evaluations == made.steps == 240
    numbers = torch.view_as_real(made.image)
    assert abs(float((numbers.abs() - 1).abs().mean())) < 0.15  # near -1 or 1
    assert 0.4 < float((numbers > 0).float().mean()) < 0.6


# --- conditional: a Gaussian posterior, in closed form -----------------------------------------------------------------------

MASK = torch.rand(SHAPE, generator=torch.Generator().manual_seed(5)) < 0.5
NOISE = 0.05


def posterior_mean(data: Tensor, mask: Tensor, noise: float) -> Tensor:
    """E[x | F x + noise n = data on the mask] for the Gaussian prior; float64."""
    flat = torch.full(SHAPE, MEAN * (1 + 1j), dtype=torch.complex128)
    prior = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(flat, dim=(-2, -1)), norm="ortho"), dim=(-2, -1))
    weight = mask * SPREAD**2 / (SPREAD**2 + noise**2)
    kspace = prior + weight * (data[0].to(torch.complex128) - prior)
    return torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(kspace, dim=(-2, -1)), norm="ortho"), dim=(-2, -1))


@pytest.fixture(scope="module")
def data() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return 3 * torch.randn(1, *SHAPE, generator=generator, dtype=torch.complex64)


def test_proximal_steps_end_at_the_posterior_mean(data: Tensor) -> None:
    """With noise of the data as the only noise level, prior and data are weighed as Bayes has it."""
    sampler = SamplerConfig(rule="proximal", levels=2000, sigma=(NOISE, NOISE), relaxation=1.0)
    # fixed point of x = prox(D(x)), in k-space: M (y - x) / noise^2 = (x - D(x)) / sigma^2
    found = measured(MASK, data, noise=NOISE)
    image = run_to_end(program(sampler, found, kind="proximal", floor=0.0), ZERO).image
    # and x - D(x) = sigma^2 (x - m) / (SPREAD^2 + sigma^2): the posterior mean of a prior that is wider by sigma
    wide = math.sqrt(SPREAD**2 + NOISE**2)
    expected = posterior_mean(data, MASK, NOISE * SPREAD / wide)
    assert float((image - expected).abs().max()) < 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["annealed_langevin", "predictor_corrector", "ddim_stochastic"])
def test_samples_given_data_have_the_moments_of_the_posterior(name: str, data: Tensor) -> None:
    """Exact data: what was measured is kept, the rest is drawn from the prior, for the samples of k-space are independent."""
    start = torch.zeros(64, 1, *SHAPE, dtype=torch.complex64)
    found = measured(MASK, data)
    made = run_to_end(program(SAMPLERS[name], found, kind="hard"), start, seed=2).image
    mean, expected = made.mean((0, 1)), posterior_mean(data, MASK, 0.0)
    assert float((mean - expected).abs().mean()) < 0.05
    spread = torch.view_as_real(made).std(0).square().mean().sqrt()
    share = 1 - float(MASK.float().mean())  # of the variance that is left, evenly over the pixels
    assert abs(float(spread) / (SPREAD * math.sqrt(share)) - 1) < 0.12


# --- the loop ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_seed_fixes_the_outcome_to_the_bit(rule: str, data: Tensor) -> None:
    sampler = SamplerConfig(rule=rule, levels=4, steps=2, sigma=(0.5, 0.05), eta=0.5, input_noise=1.0)
    start = ZERO

    def once(seed: int) -> Tensor:
        return run_to_end(program(sampler, measured(MASK, data), kind="hard"), start, seed=seed).image

    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1), once(2))


def test_new_data_between_two_steps_is_used_by_the_next(data: Tensor) -> None:
    sampler = SamplerConfig(levels=4, sigma=(0.5, 0.05))
    running = program(sampler, measured(torch.zeros_like(MASK)), kind="hard")
    run = running.run(ZERO)
    early = next(run).image
    running.update(data, MASK)
    late = next(run)
    fourier = running.stages[0].consistency.fourier
    assert not torch.allclose(fourier(early)[:, MASK], data[:, MASK], atol=0.1)
    torch.testing.assert_close(fourier(late.image)[:, MASK], data[:, MASK], atol=1e-4, rtol=1e-4)
    assert (late.step, late.steps, late.evaluations) == (2, 4, 2)


def test_a_branch_starts_where_the_stage_before_started_and_is_merged(data: Tensor) -> None:
    up = StageConfig(data=DataConfig(kind="none"))
    down = StageConfig(data=DataConfig(kind="none"), branch=True, merge=0.25)
    down = msgspec.structs.replace(down, prior=msgspec.structs.replace(down.prior, weights="down"))
    priors = {"": lambda u, sigma: u + 1.0, "down": lambda u, sigma: u - 1.0}
    sampler = SamplerConfig(levels=3)
    made = run_to_end(make_program([up, down], sampler, priors, measured(MASK, data)), ZERO)
    torch.testing.assert_close(made.image, torch.full_like(ZERO, 1.5 + 1.5j))  # each step 0.75 up, 0.25 down
    assert made.evaluations == 6


def test_stages_in_series_follow_each_other(data: Tensor) -> None:
    priors = {"": lambda u, sigma: 2 * u + 1.0}
    stage = StageConfig(data=DataConfig(kind="none"))
    made = run_to_end(
        make_program([stage, stage], SamplerConfig(levels=1), priors, measured(MASK, data)),
        ZERO,
    )
    torch.testing.assert_close(made.image, torch.full_like(ZERO, 3.0 + 3.0j))


def test_momentum_keeps_a_share_of_the_last_move(data: Tensor) -> None:
    priors = {"": lambda u, sigma: u + 1.0}
    stage = StageConfig(data=DataConfig(kind="none"))
    sampler = SamplerConfig(levels=3, momentum=0.5, relaxation=2.0)
    images = [
        e.image.real.mean().item() for e in make_program([stage], sampler, priors, measured(MASK, data)).run(ZERO)
    ]
    assert images == pytest.approx([2.0, 2.0 + 3.0, 5.0 + 3.5])


def test_each_step_has_its_own_level_relaxation_and_momentum(data: Tensor) -> None:
    """On the Gaussian prior the distance to its mean shrinks by 1 - r share(sigma), share = sigma^2 / (spread^2 + sigma^2)."""
    levels, sizes, kept = (0.4, 0.1, 0.2), (1.5, 3.0, 0.7), (0.9, -0.4, 0.6)
    sampler = SamplerConfig(levels=3, sigma_steps=levels, relaxation_steps=sizes, momentum_steps=kept, momentum=0.3)
    stage = StageConfig(data=DataConfig(kind="none"))
    start = torch.full_like(ZERO, 2.0 - 1.0j)
    images = [e.image for e in make_program([stage], sampler, {"": gaussian}, measured(MASK, data)).run(start)]
    distance, velocity = start - MEAN * (1 + 1j), torch.zeros_like(start)
    for sigma, size, share, image in zip(levels, sizes, kept, images, strict=True):
        velocity = share * velocity - size * sigma**2 / (SPREAD**2 + sigma**2) * distance
        distance = distance + velocity
        torch.testing.assert_close(image, MEAN * (1 + 1j) + distance)


def test_the_network_sees_the_phase_turned_further_at_each_move(data: Tensor) -> None:
    seen: list[Tensor] = []

    def rising(u: Tensor, sigma: Tensor) -> Tensor:
        seen.append(torch.complex(u[:, 0], u[:, 1]))
        return u + 1.0  # 1 + 1j to what it sees

    stage = StageConfig(prior=PriorConfig(turn=90.0), data=DataConfig(kind="none"))
    made = make_program([stage], SamplerConfig(levels=3), {"": rising}, measured(MASK, data))
    for _ in range(2):  # a run begins anew
        seen.clear()
        images = [e.image for e in made.run(data[0])]
        torch.testing.assert_close(seen[2], 1j**2 * images[1])
        rises = [after - before for before, after in zip([data[0], *images], images, strict=False)]
        for number, rise in enumerate(rises):
            torch.testing.assert_close(rise, torch.full_like(rise, (1 + 1j) * (-1j) ** number))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "mean_reverting"])
@given(turn=st.floats(0, 359.9))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_prior_without_a_special_phase_does_not_notice_the_turn(rule: str, turn: float, data: Tensor) -> None:
    def shrinking(u: Tensor, sigma: Tensor) -> Tensor:
        return u * (SPREAD**2 / (SPREAD**2 + sigma**2)).reshape(-1, 1, 1, 1)

    sampler = SamplerConfig(rule=rule, levels=3, steps=2, sigma=(0.3, 0.05), momentum=0.4, inject=False)
    plain, turned = (
        run_to_end(
            make_program([StageConfig(prior=PriorConfig(turn=angle))], sampler, {"": shrinking}, measured(MASK, data)),
            ZERO,
        ).image
        for angle in (0.0, turn)
    )
    torch.testing.assert_close(turned, plain, atol=1e-5, rtol=1e-4)


def test_the_jacobian_makes_the_step_the_gradient_of_the_error(data: Tensor) -> None:
    stage = StageConfig(data=DataConfig(kind="none"))
    start = torch.randn(ZERO.shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    sampler = SamplerConfig(rule="gradient", levels=1, sigma=(0.3, 0.3), jacobian=True)
    made = run_to_end(make_program([stage], sampler, {"": gaussian}, measured(MASK, data)), start).image
    share = 0.09 / (0.09 + SPREAD**2)  # u - D = share (u - m), with Jacobian share
    expected = start - share**2 * (start - MEAN * (1 + 1j))
    torch.testing.assert_close(made, expected)


def test_a_constraint_is_kept(data: Tensor) -> None:
    stage = StageConfig(data=DataConfig(kind="none"), constraint=ConstraintConfig(kind="clip", limit=0.1))
    made = run_to_end(
        make_program([stage], SamplerConfig(levels=2), {"": gaussian}, measured(MASK, data)),
        torch.full_like(ZERO, 3.0 - 3.0j),
    )
    assert float(torch.view_as_real(made.image).abs().max()) <= 0.1 + 1e-6


def test_levels_fall_from_the_first_to_the_last() -> None:
    for spacing in ("geometric", "edm", "cosine"):
        steps = RULES["proximal"](
            SamplerConfig(levels=5, sigma=(0.4, 0.1), spacing=spacing), torch.Generator()
        ).schedule()
        sigmas = [step.sigma for step in steps]
        assert sigmas[0] == pytest.approx(0.4)
        assert sigmas[-1] == pytest.approx(0.1)
        assert all(a > b for a, b in itertools.pairwise(sigmas))


def test_levels_one_by_one_are_knots_where_their_number_differs() -> None:
    sampler = SamplerConfig(levels=3, sigma=(7.0, 5.0), sigma_steps=(0.4, 0.1, 0.2))
    assert noise_levels(sampler) == pytest.approx([0.4, 0.1, 0.2])
    assert sampler.ends == (0.4, 0.2)
    assert SamplerConfig(sigma=(7.0, 5.0)).ends == (7.0, 5.0)
    more = msgspec.structs.replace(sampler, levels=5)
    assert noise_levels(more) == pytest.approx([0.4, 0.2, 0.1, math.sqrt(0.02), 0.2])
    assert noise_levels(msgspec.structs.replace(sampler, levels=1)) == pytest.approx([0.4])
    assert along([1.0, 2.0, 4.0], 2) == [1.0, 4.0]
    assert along([3.0], 4) == [3.0] * 4
    with pytest.raises(ValueError, match="no knots"):
        along([], 2)


@pytest.mark.parametrize(
    ("stages", "rule", "message"),
    [
        ([], "proximal", "stages is empty"),
        ([StageConfig(branch=True)], "proximal", r"stages\[0\]\.branch"),
        ([StageConfig(), StageConfig()], "ddim", "works on one stage"),
    ],
)
def test_programs_that_cannot_be(stages: list[StageConfig], rule: str, message: str, data: Tensor) -> None:
    with pytest.raises(ConfigError, match=message):
        make_program(stages, SamplerConfig(rule=rule), {"": gaussian}, measured(MASK, data))


def test_the_mean_reverting_equation_is_not_turned(data: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"prior\.turn"):
        make_program(
            [StageConfig(prior=PriorConfig(turn=45.0))],
            SamplerConfig(rule="mean_reverting"),
            {"": gaussian},
            measured(MASK, data),
        )


def test_the_mean_reverting_equation_has_no_levels_one_by_one(data: Tensor) -> None:
    sampler = SamplerConfig(rule="mean_reverting", sigma_steps=(0.2, 0.1))
    with pytest.raises(ConfigError, match="sigma_steps"):
        make_program([StageConfig()], sampler, {"": gaussian}, measured(MASK, data))
