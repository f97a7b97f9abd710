"""Schedules of noise levels, from the first to the last."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..config_priors import SamplerConfig

__all__ = ["along", "noise_levels"]

_EXPONENT = 7.0
"""rho of Karras et al. 2022."""


def noise_levels(config: SamplerConfig) -> list[float]:
    """`config.levels` noise levels that fall from the first to the last of `config.sigma`.

    `geometric`: equal ratios. `edm`: sigma^(1/7) falls in equal steps. `cosine`: what remains of the image, for the
    mean-reverting equation, rises as a squared cosine (Nichol, Dhariwal 2021); the levels then are its own business.
    Where `config.sigma_steps` has levels one by one, it is those.
    """
    if config.sigma_steps:
        return [math.exp(value) for value in along([math.log(sigma) for sigma in config.sigma_steps], config.levels)]
    first, last = config.sigma
    count = config.levels
    shares = [index / (count - 1) if count > 1 else 0.0 for index in range(count)]
    if config.spacing == "edm":
        a, b = first ** (1 / _EXPONENT), last ** (1 / _EXPONENT)
        return [(a + share * (b - a)) ** _EXPONENT for share in shares]
    if config.spacing == "cosine":
        return [last + (first - last) * math.cos(share * math.pi / 2) ** 2 for share in shares]
    return [first * (last / first) ** share for share in shares]


def along(knots: Sequence[float], count: int) -> list[float]:
    """`count` values evenly along a line through the knots, its ends included; the knots themselves if there are as many.

    One value alone is that of the first knot.
    """
    if not knots:
        raise ValueError("there are no knots to lay a line through")
    values = []
    for index in range(count):
        place = index / (count - 1) * (len(knots) - 1) if count > 1 else 0.0
        low = min(int(place), len(knots) - 1)
        high, share = min(low + 1, len(knots) - 1), place - low
        values.append(knots[low] + share * (knots[high] - knots[low]))
    return values
