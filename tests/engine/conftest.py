"""What several tests of the engine share: small denoisers, and what lies in a file of the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scanside.engine.priors.denoiser import Denoiser, Precondition
from scanside.engine.priors.networks import NetworkConfig
from scanside.engine.runtimes import cache


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


@pytest.fixture(scope="session")
def content_of() -> Callable[[Path], bytes]:
    """What a file of the cache holds behind its digest, whose bytes may be any, and its key."""

    def read(path: Path) -> bytes:
        data, start = path.read_bytes(), len(cache._MAGIC) + cache._DIGEST
        length = int.from_bytes(data[start : start + cache._LENGTH], "little")
        return data[start + cache._LENGTH + length :]

    return read
