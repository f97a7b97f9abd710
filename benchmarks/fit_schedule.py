"""Fit the noise level, relaxation and momentum of each step of an online system to images that its prior never saw.

    python benchmarks/fit_schedule.py --data data/mri/siat_train.npz                     # mri/online_undistilled
    python benchmarks/fit_schedule.py --data data/mri/siat_train.npz --system mri/online --weights WEIGHTS --iterations 70 \
        --sigma 0.15 0.02 --relaxation 1 --momentum 0.6 --rate 0.03

Three numbers a step, the network as it is: so this is a choice of step sizes by gradients, no training of a prior. The last
19 images of the training set, which were kept back from all training, are undersampled by random masks of the kinds that
`scanside train --through-loop` draws, net R 3 to 10, one channel but for each fifth image, which several simulated coils see.
What is minimized is the mean logarithm of the squared error of the last image. Prints the three lines of the configuration.
"""

from __future__ import annotations

import argparse
import cmath
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from scanside.engine.config import ConfigStore
from scanside.engine.config_priors import StageConfig
from scanside.engine.operators import Fourier
from scanside.engine.operators.cartesian import CartesianSense
from scanside.engine.priors.denoiser import Denoiser
from scanside.engine.priors.storage import load_weights
from scanside.engine.priors.through_loop import random_mask, simulated_maps
from scanside.engine.samplers.consistency import Measurement, make_consistency
from scanside.engine.streaming.generative import BRIGHT
from torch import Tensor

HELD_OUT = 19
KINDS = ("radial", "random", "cartesian", "random", "uniform")
"""Of the masks, in turn; the last, regular lines, is that with several coils."""


def main() -> None:
    """Command line."""
    options = _options()
    torch.set_num_threads(options.threads)
    stage = ConfigStore().get(options.system).stages[0]
    denoiser = load_weights(options.weights or stage.prior.weights)[0].eval().to(memory_format=torch.channels_last)
    denoiser.requires_grad_(requires_grad=False)
    steps = Steps(options.steps, options.sigma, options.relaxation, options.momentum)
    images = _images(options.data)
    optimizer = torch.optim.Adam(steps.parameters(), lr=options.rate, betas=(0.9, 0.95))
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, 2.5 * (1 - n / options.iterations)))
    generator, gains = torch.Generator().manual_seed(0), []
    for _ in track(range(options.iterations), "fitting"):
        optimizer.zero_grad()
        for kind in KINDS:
            truth = images[int(torch.randint(len(images), (1,), generator=generator))]
            loss = _loss(steps, denoiser, stage, *_scan(truth, kind, generator))
            loss.backward()
            gains.append(-10 / math.log(10) * loss.item())
        torch.nn.utils.clip_grad_norm_(steps.parameters(), 5.0)
        optimizer.step()
        falling.step()
        steps.clamp()
    print(f"# gain over the start in the last tenth: {np.mean(gains[-len(gains) // 10 :]):.2f} dB")
    for name, values in steps.named():
        print(f"{name} = {values}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="siat_train.npz, whose last images were kept back")
    parser.add_argument("--system", default="mri/online_undistilled", help="whose prior and data consistency are used")
    parser.add_argument("--weights", default="", help="in place of those of the system")
    parser.add_argument("--iterations", type=int, default=90)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--sigma", type=float, nargs=2, default=(0.3, 0.02), help="first and last noise level to begin with"
    )
    parser.add_argument("--relaxation", type=float, default=1.6, help="of each step, to begin with")
    parser.add_argument("--momentum", type=float, default=0.3, help="of each step, to begin with")
    parser.add_argument("--rate", type=float, default=0.06, help="learning rate")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


class Steps(torch.nn.Module):
    """Noise level, relaxation and momentum of each step, from a geometric schedule on."""

    def __init__(self, count: int, sigma: Sequence[float], relaxation: float, momentum: float) -> None:
        super().__init__()
        self.log_sigma = torch.nn.Parameter(torch.linspace(math.log(sigma[0]), math.log(sigma[1]), count))
        self.relaxation = torch.nn.Parameter(torch.full((count,), relaxation))
        self.momentum = torch.nn.Parameter(torch.full((count,), momentum))

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep each number where a configuration may have it."""
        self.relaxation.clamp_(0.2, 5.0)
        self.momentum.clamp_(-0.9, 0.9)

    def named(self) -> list[tuple[str, list[float]]]:
        """As the configuration calls them; the first step has no momentum."""
        kept = self.momentum.detach().clone()
        kept[0] = 0.0
        found = {"sigma": self.log_sigma.detach().exp(), "relaxation": self.relaxation.detach(), "momentum": kept}
        return [(f"{name}_steps", [round(float(v), 3) for v in values]) for name, values in found.items()]


def _images(path: Path) -> Tensor:
    """The images kept back, complex (N, y, x), on the scale of the prior: the maximum is 1."""
    parts = torch.from_numpy(np.load(path)["image"][-HELD_OUT:].astype(np.float32))
    images = torch.complex(parts[:, 0], parts[:, 1])
    return images / images.abs().amax((-2, -1), keepdim=True)


def _scan(truth: Tensor, kind: str, generator: torch.Generator) -> tuple[Measurement, Tensor, Tensor]:
    """What was measured, the start and the truth, (1, y, x) each, scaled by the start as `PriorSolver` does."""
    shape: Sequence[int] = truth.shape
    several = kind == "uniform"
    acceleration = 3 * (10 / 3) ** float(torch.rand(1, generator=generator))
    mask = random_mask(kind, (shape[0], shape[1]), acceleration, generator)[None]
    if several:
        maps = simulated_maps(int(torch.randint(4, 9, (1,), generator=generator)), (shape[0], shape[1]), generator)
        data = Fourier(maps.shape)(maps * truth) * mask
        start = CartesianSense(maps, mask).H(data)
    else:  # a mask with a batch axis of its own, so that gradients pass
        maps, mask, truth = None, mask[None], truth[None]
        data = Fourier((1, *shape))(truth[None]) * mask
        start = Fourier((1, *shape)).H(data)
    scale = BRIGHT / float(start.abs().flatten().quantile(0.99))
    return Measurement(data=data * scale, mask=mask, maps=maps), start * scale, truth * scale


def _loss(
    steps: Steps, denoiser: Denoiser, stage: StageConfig, measured: Measurement, start: Tensor, truth: Tensor
) -> Tensor:
    """Logarithm of the squared error of the last image over that of the start."""
    consistency = make_consistency(measured, stage.data)
    x, velocity = start, torch.zeros_like(start)
    moves = zip(steps.log_sigma, steps.relaxation, steps.momentum, strict=True)
    for number, (log_sigma, relaxation, momentum) in enumerate(moves):
        sigma, turn = log_sigma.exp(), cmath.rect(1.0, math.radians(stage.prior.turn * number))
        velocity = relaxation * (_denoised(denoiser, x * turn, sigma) * turn.conjugate() - x) + momentum * velocity
        x = consistency(x + velocity, sigma.item())
    return ((x - truth).abs().square().sum() / (start - truth).abs().square().sum()).log()


def _denoised(denoiser: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
    """One complex image of any leading axes through the network, in half precision."""
    plane = x.reshape(1, *x.shape[-2:])
    channels = torch.stack([plane.real, plane.imag], 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        found = denoiser(channels, sigma.reshape(1))
    return torch.complex(found[:, 0].float(), found[:, 1].float()).reshape(x.shape)


if __name__ == "__main__":
    main()
