"""What several tests of the engine share: small denoisers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scanside.engine.priors.denoiser import Denoiser, Precondition
from scanside.engine.priors.networks import NetworkConfig


@pytest.fixture(scope="session")
def small_denoiser() -> Callable[..., Denoiser]:
    """Makes a house network with two levels and random weights: (seed, channels, precondition) -> Denoiser."""

    def make(seed: int = 0, channels: int = 2, precondition: Precondition = "homogeneous") -> Denoiser:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = NetworkConfig(channels=channels, widths=(8, 16), blocks=1, shuffle=2)
            made = Denoiser.of_size(config, precondition=precondition)
            for weight in made.parameters():  # a new network gives zeros, which would prove nothing
                torch.nn.init.normal_(weight, std=0.2)
        return made.eval()

    return make
