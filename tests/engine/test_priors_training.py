"""Networks, denoisers, their weights on disk, and training, also through the loop."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.config_priors import (
    DataConfig,
    NetworkConfig,
    PriorConfig,
    SamplerConfig,
    StageConfig,
    TrainingConfig,
    TransformConfig,
)
from scanside.engine.errors import ConfigError
from scanside.engine.priors.denoiser import Denoiser
from scanside.engine.priors.domains import network_planes
from scanside.engine.priors.networks import UNet, count_parameters
from scanside.engine.priors.storage import ModelCard, load_weights, read_checkpoint, save_weights, shipped_weights
from scanside.engine.priors.through_loop import LoopTrainer, random_mask, simulated_maps
from scanside.engine.priors.training import Trainer, augmented, validation_errors
from scanside.engine.priors.transforms import kspace_weights, window_mask
from scanside.engine.samplers.consistency import Measurement, make_consistency
from torch import Tensor

SMALL = NetworkConfig(widths=(8, 16), blocks=1)
BASE = TrainingConfig(batch=4, crop=32, rise=5, steps=60, precision="float32", learning_rate=3e-3, average=0.9)


def with_weights(network: UNet) -> UNet:
    """The network with a last layer that is not zero."""
    with torch.no_grad():
        network.tail.weight.normal_(generator=torch.Generator().manual_seed(0))
    return network


def bells(count: int = 12) -> Tensor:
    """Smooth complex images (count, 2, 48, 48) of greatest magnitude 1."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 48), torch.linspace(-1, 1, 48), indexing="ij")
    generator = torch.Generator().manual_seed(1)
    images = []
    for _ in range(count):
        cx, cy, w, phase = (torch.rand(4, generator=generator) - 0.5).tolist()
        bell = torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (0.1 + 0.3 * abs(w)))
        wave = torch.polar(bell, 3 * phase * (x + y))
        images.append(torch.stack([wave.real, wave.imag]) / bell.max())
    return torch.stack(images)


# --- networks ----------------------------------------------------------------------------------------------------------------


def test_the_default_size_is_about_a_million_parameters() -> None:
    assert 1.0e6 < count_parameters(UNet(NetworkConfig())) < 1.1e6


@settings(max_examples=15)
@given(
    widths=st.lists(st.integers(4, 12), min_size=1, max_size=3),
    blocks=st.integers(1, 2),
    shuffle=st.sampled_from([1, 2, 4]),
    channels=st.integers(1, 6),
)
def test_any_size_gives_an_image_of_the_same_shape(widths: list[int], blocks: int, shuffle: int, channels: int) -> None:
    config = NetworkConfig(widths=tuple(widths), blocks=blocks, shuffle=shuffle, channels=channels)
    x = torch.randn(2, channels + 1, 2 * config.multiple, 3 * config.multiple)
    assert UNet(config)(x).shape == (2, channels, *x.shape[-2:])


def test_the_network_is_homogeneous() -> None:
    network = with_weights(UNet(SMALL)).double()
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(network(7.5 * x), 7.5 * network(x))


def test_a_homogeneous_denoiser_needs_no_scale() -> None:
    denoiser = Denoiser(with_weights(UNet(SMALL)), precondition="homogeneous")
    x, sigma = torch.randn(1, 2, 16, 16), torch.tensor([0.1])
    torch.testing.assert_close(denoiser(4 * x, 4 * sigma), 4 * denoiser(x, sigma), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precondition", ["edm", "homogeneous"])
def test_a_new_denoiser_is_the_best_linear_one_or_the_identity(precondition: str) -> None:
    denoiser = Denoiser.of_size(SMALL, precondition=precondition, sigma_data=0.3)
    x = torch.randn(1, 2, 16, 16)
    share = 0.09 / (0.09 + 0.04) if precondition == "edm" else 1.0  # of a Gaussian prior: Wiener
    torch.testing.assert_close(denoiser(x, torch.tensor([0.2])), share * x)


def test_sides_that_the_network_does_not_divide_are_filled_up() -> None:
    denoiser = Denoiser(with_weights(UNet(SMALL)), precondition="edm")
    x = torch.randn(2, 2, 21, 18)
    found = denoiser(x, torch.tensor([0.1, 0.2]))
    assert found.shape == x.shape
    padded = torch.nn.functional.pad(x, (0, 2, 0, 3), mode="reflect")
    torch.testing.assert_close(found, denoiser(padded, torch.tensor([0.1, 0.2]))[..., :21, :18])


# --- weights on disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "mine.safetensors"
    denoiser = Denoiser(with_weights(UNet(SMALL)), precondition="edm", sigma_data=0.2)
    save_weights(path, denoiser, ModelCard(name="mine", network=SMALL, precondition="edm", sigma_data=0.2))
    return path


def test_weights_come_back_to_half_precision(stored: Path) -> None:
    denoiser, card = load_weights(str(stored))
    assert card.parameters == count_parameters(denoiser)
    expected = Denoiser(with_weights(UNet(SMALL)))
    tail = denoiser.network.get_parameter("tail.weight")
    torch.testing.assert_close(tail, expected.network.get_parameter("tail.weight"), rtol=1e-3, atol=1e-3)
    assert not tail.requires_grad


def test_weights_that_do_not_match_their_card_are_refused(stored: Path) -> None:
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    with pytest.raises(ConfigError, match="SHA-256"):
        load_weights(str(stored))


def test_a_card_of_another_network_is_refused(stored: Path) -> None:
    card = msgspec.json.decode(stored.with_suffix(".json").read_bytes(), type=ModelCard)
    other = msgspec.structs.replace(card, network=NetworkConfig(widths=(8, 12), blocks=1))
    stored.with_suffix(".json").write_bytes(msgspec.json.encode(other))
    with pytest.raises(ConfigError, match="do not fit"):
        load_weights(str(stored))


@pytest.mark.parametrize("name", ["nothing", "missing.safetensors", "../config"])
def test_weights_that_are_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match="shipped are"):
        load_weights(name)


def test_shipped_weights_match_their_cards_and_are_small() -> None:
    assert "mri_online" in shipped_weights()
    for name in shipped_weights():
        denoiser, card = load_weights(name)
        assert 0 < 2 * count_parameters(denoiser) < 2.5e6
        assert card.data
        assert card.subjects
        assert card.name == name


# --- training ----------------------------------------------------------------------------------------------------------------


def trainer(config: TrainingConfig = BASE) -> Trainer:
    torch.manual_seed(0)
    return Trainer(Denoiser.of_size(SMALL, precondition="edm", sigma_data=0.3), bells(), config)


def test_training_teaches_more_than_the_best_linear_denoiser() -> None:
    training = trainer(msgspec.structs.replace(BASE, steps=200))
    fresh = trainer().averaged()
    for _ in range(200):
        training.step()
    before, after = (validation_errors(d, bells()[:2], (0.1, 0.3)) for d in (fresh, training.averaged()))
    assert all(after[sigma] < 0.85 * before[sigma] for sigma in before)


def test_a_run_that_was_taken_up_again_is_the_same_to_the_bit() -> None:
    whole, first = trainer(), trainer()
    for _ in range(6):
        whole.step()
    for _ in range(3):
        first.step()
    second = trainer()
    second.restore({name: value.clone() for name, value in first.state().items()})
    for _ in range(3):
        second.step()
    for (name, a), (other, b) in zip(whole.state().items(), second.state().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "c")
    with pytest.raises(ConfigError, match="not of this network"):
        trainer().restore({"done": torch.tensor(3)})


def test_the_rate_rises_stays_and_falls() -> None:
    training = trainer(msgspec.structs.replace(BASE, steps=100, rise=10, decay=0.2))
    rates = []
    for done in (0, 9, 50, 79, 90, 99, 100):
        training.done = done
        rates.append(training.rate() / BASE.learning_rate)
    assert rates == pytest.approx([0.1, 1, 1, 1, 0.5, 0.05, 0])


def test_augmentation_changes_phase_scale_and_place_but_not_what_it_is() -> None:
    config = msgspec.structs.replace(BASE, crop=48, scale=(0.5, 0.5), batch=6)
    batch = augmented(bells(1), config, torch.Generator().manual_seed(3))
    energy = bells(1).square().sum()
    torch.testing.assert_close(batch.square().sum((1, 2, 3)), torch.full((6,), float(energy) / 4), rtol=1e-3, atol=0)
    assert not torch.allclose(batch[0], batch[1])


def test_priors_of_other_domains_are_trained_in_them() -> None:
    """Whole images are taken to the domain, so a patch holds what the k-space of all of the image makes of it."""
    stage = StageConfig(transform=TransformConfig(kind="haar"))
    planes = network_planes(bells(), stage, msgspec.structs.replace(BASE, phase=False))
    assert [tuple(plane.shape) for plane in planes] == [(8, 49, 49)] * len(bells())
    network = msgspec.structs.replace(SMALL, channels=8)
    assert Trainer(Denoiser.of_size(network), planes, BASE, slopes=False).step() > 0
    with pytest.raises(ConfigError, match="have 8 channels"):
        Trainer(Denoiser.of_size(SMALL), planes, BASE)


def test_a_network_of_filtered_images_sees_weighted_kspace_of_whole_images() -> None:
    transform = TransformConfig(kind="kspace", copies=3, weight_scale=0.022, weight_power=0.5, window=6)
    stage = StageConfig(prior=PriorConfig(domain="filtered"), transform=transform)
    config = msgspec.structs.replace(BASE, phase=False, images=2)
    planes = network_planes(bells(), stage, config)
    assert len(planes) == 2
    image = torch.complex(*bells()[1].double())
    weights = kspace_weights((48, 48), 1.0, 0.5) * ~window_mask((48, 48), 6)
    k = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(image))) * weights
    expected = torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(k)))
    found = torch.complex(*planes[1].double())
    assert float((found - expected).norm() / expected.norm()) < 1e-3


def test_random_phases_are_applied_before_the_image_is_taken_to_kspace() -> None:
    stage = StageConfig(
        prior=PriorConfig(domain="filtered"), transform=TransformConfig(kind="kspace", weight_power=0.5)
    )
    planes = network_planes(bells(3), stage, BASE)
    assert len(planes) == 6
    assert not torch.allclose(planes[0].float().square().sum(0), planes[1].float().square().sum(0), rtol=0.05)


def test_hankel_patches_come_from_one_kspace() -> None:
    """Rows of the matrix are windows: each one's last points are the next one's first."""
    transform = TransformConfig(kind="kspace", weight_scale=0.062, weight_power=0.5)
    config = msgspec.structs.replace(BASE, images=1, hankel_window=4, hankel_coils=3, turn=False)
    (plane,) = network_planes(bells(), StageConfig(transform=transform), config)
    assert plane.shape == (2, 45 * 45, 3 * 16)
    windows = plane.reshape(2, 45, 45, 3, 4, 4)
    assert torch.equal(windows[:, :, :-1, :, :, 1:], windows[:, :, 1:, :, :, :-1])
    assert torch.equal(windows[:, :-1, :, :, 1:], windows[:, 1:, :, :, :-1])
    assert Trainer(Denoiser.of_size(SMALL), [plane], config, slopes=False).step() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": 64}, "smallest image"),
        ({"crop": 30}, "multiple of 4"),
        ({"sigma": (0.5, 0.1)}, "less than the second"),
    ],
)
def test_settings_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(msgspec.structs.replace(BASE, **change))


# --- through the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LoopTrainer.kinds)
def test_random_masks_have_their_center_and_about_their_acceleration(kind: str) -> None:
    for seed, acceleration in enumerate((2.5, 4.0, 8.0)):
        mask = random_mask(kind, (96, 96), acceleration, torch.Generator().manual_seed(seed))
        assert mask[48, 48]
        assert 0.6 * acceleration < mask.numel() / int(mask.sum()) < 1.6 * acceleration
        if kind in ("cartesian", "uniform"):
            assert bool((mask == mask[:, :1]).all())


def test_simulated_coils_see_everything_together() -> None:
    maps = simulated_maps(5, (32, 24), torch.Generator().manual_seed(0))
    torch.testing.assert_close(maps.abs().square().sum(0), torch.ones(1, 32, 24))


def loop_trainer(**change: object) -> LoopTrainer:
    torch.manual_seed(0)
    config = msgspec.structs.replace(
        BASE, **{"denoising_share": 0.0, "coil_share": 0.3, "loop_steps": (2, 3), **change}
    )
    denoiser = Denoiser.of_size(SMALL, precondition="edm", sigma_data=0.3)
    return LoopTrainer(denoiser, bells(), config, [StageConfig()], SamplerConfig(levels=3, sigma=(0.2, 0.02)))


def test_training_through_the_loop_brings_images_nearer_to_the_truth() -> None:
    training = loop_trainer(
        steps=150, learning_rate=2e-3, coil_share=0.0
    )  # coils leave little to gain in smooth images

    @torch.no_grad()
    def loss() -> float:
        """Of masks, noise and crops that are not trained on."""
        generators = (torch.Generator().manual_seed(10**6 + seed) for seed in range(8))
        return sum(float(training.loss(generator)) for generator in generators) / 8

    before = loss()
    for _ in range(150):
        training.step()
    assert loss() < before - 0.2  # nepers: the error is less by a fifth


def test_gradients_through_the_proximal_point_of_coils_are_right() -> None:
    """The implicit derivative against finite differences, in double precision where the solver is exact."""
    maps = simulated_maps(4, (6, 6), torch.Generator().manual_seed(0)).to(torch.complex128)
    mask = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    data = torch.randn(4, 1, 6, 6, dtype=torch.complex128) * mask
    measured = Measurement(data=data, mask=mask, maps=maps, noise=0.2)
    prox = make_consistency(measured, DataConfig(kind="proximal", iterations=60))
    state = torch.randn(1, 6, 6, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: prox(z, 0.3), (state,), atol=1e-5)


def test_few_iterations_give_the_gradient_of_what_was_not_measured() -> None:
    """With data of little noise the prior fills in only what is missing: iterations that start at nothing would not find it."""
    maps = simulated_maps(4, (24, 24), torch.Generator().manual_seed(0))
    mask = random_mask("random", (24, 24), 8.0, torch.Generator().manual_seed(1))
    gradients = []
    for iterations in (4, 60):
        measured = Measurement(data=torch.zeros(4, 1, 24, 24, dtype=torch.complex64), mask=mask, maps=maps, noise=0.004)
        prox = make_consistency(measured, DataConfig(kind="proximal", iterations=iterations))
        state = torch.ones(1, 24, 24, dtype=torch.complex64, requires_grad=True)
        wanted = torch.randn(1, 24, 24, dtype=torch.complex64, generator=torch.Generator().manual_seed(2))
        torch.view_as_real(prox(state, 0.2) * wanted).sum().backward()
        assert state.grad is not None
        gradients.append(state.grad)
    few, exact = gradients
    assert float(exact.norm() / wanted.norm()) > 0.2
    assert float((few - exact).norm() / exact.norm()) < 0.4  # begun at nothing it is 0.9


def test_random_phantoms_are_part_of_the_images() -> None:
    """Objects in air, each another one, with the greatest magnitude that images have."""
    config = msgspec.structs.replace(BASE, shapes=1.0, phase=False, scale=(0.999, 1.0), batch=6)
    batch = augmented([torch.zeros(2, 32, 32)], config, torch.Generator().manual_seed(3))
    assert batch.shape == (6, 2, BASE.crop, BASE.crop)
    magnitude = batch.square().sum(1).sqrt()
    torch.testing.assert_close(magnitude.amax((1, 2)), torch.ones(6), rtol=1e-3, atol=0)
    assert float(magnitude[:, :3, :3].max()) < 0.1  # a corner of the field of view
    assert float((magnitude[0] - magnitude[1]).abs().max()) > 0.2
    with pytest.raises(ConfigError, match=r"training.shapes = 0.5"):
        network = NetworkConfig(channels=4, widths=(4, 8), blocks=1)
        Trainer(Denoiser.of_size(network), [torch.zeros(4, 32, 32)], msgspec.structs.replace(BASE, shapes=0.5))


def test_plain_denoising_is_part_of_it() -> None:
    plain, through = loop_trainer(denoising_share=1.0), loop_trainer(coil_share=0.0)
    torch.manual_seed(0)
    assert plain.step() == pytest.approx(trainer().step(), rel=0.5)
    assert through.step() == pytest.approx(0.0, abs=0.5)  # a new network gains nothing


def test_emphasis_goes_from_all_steps_alike_to_the_last_alone() -> None:
    def loss(steps: int, emphasis: float) -> float:
        training = loop_trainer(coil_share=0.0, loop_steps=(steps, steps), loop_emphasis=emphasis)
        with_weights(training.denoiser.network)
        with torch.no_grad():
            return float(training.loss(torch.Generator().manual_seed(5)))

    first, last = loss(1, 2.0), loss(2, 100.0)
    assert first != pytest.approx(last, abs=1e-3)
    assert loss(2, 0.0) == pytest.approx((first + last) / 2, abs=1e-5)


def test_a_range_of_steps_that_is_none() -> None:
    with pytest.raises(ConfigError, match="loop_steps"):
        loop_trainer(loop_steps=(5, 3))


def test_half_precision_of_the_network_alone_keeps_the_gradient() -> None:
    """Of the loss through three steps, with a network that does something."""
    gradients = []
    for precision in ("float32", "bfloat16"):
        training = loop_trainer(precision=precision)
        with_weights(training.denoiser.network)
        training.loss(torch.Generator().manual_seed(5)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in training.denoiser.parameters()]))
    exact, half = gradients
    assert torch.nn.functional.cosine_similarity(exact, half, dim=0) > 0.99
    assert float(half.norm() / exact.norm()) == pytest.approx(1, abs=0.05)
