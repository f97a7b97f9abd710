"""What is asked of an estimate beyond prior and data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config_priors import ConstraintConfig
from ..operators.hankel import image_low_rank

__all__ = ["CONSTRAINTS", "Constraint", "make_constraint"]

Constraint = Callable[[Tensor], Tensor]
"""A function of the state (*batch, *domain)."""


def _none(config: ConstraintConfig) -> Constraint:  # noqa: ARG001
    return lambda state: state


def _low_rank(config: ConstraintConfig) -> Constraint:
    """Coil images (coil, 1, y, x) whose k-space has a Hankel matrix of low rank (SAKE)."""
    return lambda state: image_low_rank(state.squeeze(-3), config.window, config.rank).unsqueeze(-3)


def _clip(config: ConstraintConfig) -> Constraint:
    """Real and imaginary part to +- limit."""
    limit = config.limit
    return lambda state: torch.view_as_complex(torch.view_as_real(state).clamp(-limit, limit))


CONSTRAINTS: dict[str, Callable[[ConstraintConfig], Constraint]] = {"none": _none, "low_rank": _low_rank, "clip": _clip}
"""Constraints by the name that a configuration calls them."""


def make_constraint(config: ConstraintConfig) -> Constraint:
    """The constraint that the configuration says."""
    return CONSTRAINTS[config.kind](config)
