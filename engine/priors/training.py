"""Training of a prior: denoising score matching with the weights of EDM, on random crops of complex images.

Every step draws its batch from a generator seeded by (seed, step), so a run that was stopped and taken up again sees the same
images, crops and noise as one that was not. The rate is constant after a short rise and falls to zero over the last part of the
run, so a run can be told to end earlier at any time; the weights that count are the exponential moving average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..config_priors import TrainingConfig
from ..errors import ConfigError
from ..operators.cartesian import Fourier
from ..simulation.phantom import random_phantom
from .denoiser import Denoiser
from .domains import random_phase

__all__ = ["Trainer", "augmented", "validation_errors"]


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _patch(image: Tensor, size: int, generator: torch.Generator, *, turn: bool) -> Tensor:
    """A random part of an image (C, H, W), flipped and turned."""
    height, width = (min(size, n) for n in image.shape[-2:])
    room = torch.tensor([image.shape[-2] - height + 1, image.shape[-1] - width + 1])
    corner = (torch.rand(2, generator=generator) * room).long()
    top, left = int(corner[0]), int(corner[1])
    patch = image[:, top : top + height, left : left + width].float()
    if turn:
        quarter, flip = (int(n) for n in torch.randint(0, 4, (2,), generator=generator))
        patch = torch.rot90(patch, quarter if height == width else 2 * (quarter % 2), (-2, -1))
        patch = patch.flip(-1) if flip % 2 else patch
    return patch


def _shape(size: int, generator: torch.Generator) -> Tensor:
    """A random phantom as a scan sees it, (2, size, size): from its k-space, with what an edge rings, greatest magnitude 1."""
    drawn = np.random.default_rng(int(torch.randint(0, 1 << 62, (1,), generator=generator)))
    k = np.arange(size) - size // 2
    kspace = torch.from_numpy(random_phantom(drawn).kspace(k[None, :], k[:, None]))
    image = Fourier((size, size), dtype=torch.complex128).H(kspace)
    return torch.view_as_real(image / image.abs().max()).movedim(-1, 0).float()


def augmented(
    images: Sequence[Tensor] | Tensor, config: TrainingConfig, generator: torch.Generator, *, slopes: bool = True
) -> Tensor:
    """A batch (batch, C, crop, crop) float32 drawn from images (C, H, W): cropped, turned, rescaled, with random phase.

    Some are random phantoms instead (`config.shapes`). slopes: whether the phase may rise along an axis.
    """
    chosen = torch.randint(0, len(images), (config.batch,), generator=generator)
    made = torch.rand(config.batch, generator=generator) < config.shapes if config.shapes else torch.zeros(config.batch)
    batch = torch.stack(
        [
            _shape(config.crop, generator) if shape else _patch(images[i], config.crop, generator, turn=config.turn)
            for i, shape in zip(chosen.tolist(), made.tolist(), strict=True)
        ]
    )
    if config.phase and batch.shape[1] == 2:
        batch = random_phase(batch, generator, slopes=slopes)
    low, high = (math.log(s) for s in config.scale)
    return batch * _uniform(config.batch, low, high, generator).exp().reshape(-1, 1, 1, 1)


class Trainer:
    """One network, its moving average and its optimizer, a step at a time.

    images: each (C, H, W), any float type, scaled to greatest magnitude 1, C = 2 for real and imaginary part, or planes of
    another domain (`domains.network_planes`), and then with slopes = False. Raises `ConfigError` where they do not fit
    the network.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        images: Sequence[Tensor] | Tensor,
        config: TrainingConfig,
        *,
        slopes: bool = True,
    ) -> None:
        self.denoiser, self.images, self.config, self.slopes = denoiser, images, config, slopes
        for parameter in denoiser.parameters():
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self._check()
        self.optimizer = torch.optim.Adam(denoiser.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
        self.average = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
        wanted = config.precision
        self._half = wanted == "bfloat16" or (wanted == "auto" and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        self.done = 0

    def _check(self) -> None:
        crop, multiple = self.config.crop, self.denoiser.multiple
        if not len(self.images):
            raise ConfigError("there are no images to train on")
        smallest = min(min(image.shape[-2:]) for image in self.images)
        if crop > smallest:
            raise ConfigError(f"training.crop = {crop}: the smallest image has {smallest} pixels per side; crop less")
        if crop % multiple:
            raise ConfigError(f"training.crop = {crop}: this network needs a multiple of {multiple}")
        found, wanted = int(self.images[0].shape[0]), self.denoiser.network.config.channels  # type: ignore[union-attr]
        if found != wanted:
            raise ConfigError(f"network.channels = {wanted}: images in this domain have {found} channels")
        low, high = self.config.sigma
        if self.config.shapes and found != 2:
            raise ConfigError(
                f"training.shapes = {self.config.shapes}: phantoms are complex images, not {found} channels"
            )
        if low >= high:
            raise ConfigError(f"training.sigma = [{low}, {high}]: the first must be less than the second")

    def rate(self) -> float:
        """Learning rate of the next step."""
        c = self.config
        falling = (c.steps - self.done) / max(1.0, c.decay * c.steps)
        return c.learning_rate * max(0.0, min(1.0, (self.done + 1) / c.rise, falling))

    def sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise levels of one batch, shape (count,)."""
        c = self.config
        if c.sigma_levels:
            chosen = torch.randint(0, len(c.sigma_levels), (count,), generator=generator)
            return torch.tensor(c.sigma_levels)[chosen]
        return _uniform(count, math.log(c.sigma[0]), math.log(c.sigma[1]), generator).exp()

    def step(self) -> float:
        """One batch; returns its loss, which is about 1 for a network that removes nothing."""
        generator = _generator(self.config.seed, self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad()
        loss = self.loss(generator)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        self.optimizer.step()
        self._follow()
        self.done += 1
        return loss.item()

    def loss(self, generator: torch.Generator) -> Tensor:
        """Of one batch: the denoiser's squared error, weighted as the configuration says."""
        clean = augmented(self.images, self.config, generator, slopes=self.slopes)
        sigma = self.sigmas(len(clean), generator)
        noise = torch.randn(clean.shape, generator=generator)
        s = sigma.reshape(-1, 1, 1, 1)
        noisy = (clean + s * noise).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._half):
            found = self.denoiser(noisy, sigma)
        error = (found.float() - clean).square().mean((1, 2, 3))
        if self.config.loss == "edm":
            error = error * (1 / sigma**2 + 1 / self.denoiser.sigma_data**2)
        mean: Tensor = error.mean()
        return mean

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(self.config.average, (1 + self.done) / (10 + self.done))
        for name, parameter in self.denoiser.named_parameters():
            self.average[name].lerp_(parameter, 1 - decay)

    def averaged(self) -> Denoiser:
        """A copy of the denoiser with the averaged weights, ready for use."""
        copy = Denoiser.of_size(
            self.denoiser.network.config,  # type: ignore[arg-type]
            precondition=self.denoiser.precondition,
            sigma_data=self.denoiser.sigma_data,
        )
        copy.load_state_dict(self.average)
        return copy.eval().requires_grad_(requires_grad=False)

    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs to go on as if nothing had happened, as flat tensors."""
        flat = {f"network.{n}": p.detach() for n, p in self.denoiser.named_parameters()}
        flat |= {f"average.{n}": p for n, p in self.average.items()}
        names = [n for n, _ in self.denoiser.named_parameters()]
        for index, values in self.optimizer.state_dict()["state"].items():
            flat |= {f"optimizer.{names[index]}.{key}": value for key, value in values.items()}
        return {name: value.contiguous() for name, value in flat.items()} | {"done": torch.tensor(self.done)}

    def restore(self, flat: dict[str, Tensor]) -> None:
        """Go on from what `state` gave. Raises `ConfigError` where it is of another network."""
        names = [n for n, _ in self.denoiser.named_parameters()]
        try:
            self.denoiser.load_state_dict({n: flat[f"network.{n}"] for n in names})
            self.average = {n: flat[f"average.{n}"].clone() for n in names}
            keys = ("step", "exp_avg", "exp_avg_sq")
            moments = {i: {k: flat[f"optimizer.{n}.{k}"].clone() for k in keys} for i, n in enumerate(names)}
            self.done = int(flat["done"])
        except (KeyError, RuntimeError) as error:
            raise ConfigError(f"the checkpoint is not of this network: {str(error)[:200]}") from None
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


@torch.no_grad()
def validation_errors(
    denoiser: Denoiser, images: Tensor, sigmas: tuple[float, ...], *, seed: int = 0
) -> dict[float, float]:
    """Root mean square error of the denoiser divided by the noise level, on whole images (N, C, H, W), by noise level."""
    errors = {}
    for index, sigma in enumerate(sigmas):
        noise = torch.randn(images.shape, generator=_generator(seed, index))
        level = torch.full((1,), sigma)
        squares = [
            (denoiser((clean + sigma * n)[None], level) - clean).square().mean()
            for clean, n in zip(images.float(), noise, strict=True)
        ]
        errors[sigma] = float(torch.stack(squares).mean().sqrt()) / sigma
    return errors
