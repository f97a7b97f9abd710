"""Iterative photoacoustic reconstructions by the forward model: least squares, and total variation."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator

from torch import Tensor

from ..operators.linear import LinearOperator
from .compressed_sensing import total_variation_steps
from .solvers import conjugate_gradient_steps, largest_eigenvalue

__all__ = ["model_based", "model_based_steps", "total_variation_photoacoustic", "total_variation_photoacoustic_steps"]


def model_based(
    operator: LinearOperator, signals: Tensor, *, iterations: int = 20, regularization: float = 0.01
) -> Tensor:
    """The image after so many steps of `model_based_steps`."""
    return _last(model_based_steps(operator, signals, iterations=iterations, regularization=regularization))


def model_based_steps(
    operator: LinearOperator, signals: Tensor, *, iterations: int = 20, regularization: float = 0.01
) -> Iterator[Tensor]:
    """Minimize |A x - signals|^2 + regularization |A|^2 |x|^2 by conjugate gradients, which is what LSQR computes.

    operator: A, such as `PhotoacousticOperator`. signals: (*batch, element, samples). regularization: relative to the largest
    eigenvalue of A^T A. Yields the image after each iteration, a buffer that the next one overwrites.
    """
    right, gram = operator.H(signals), operator.gram
    weight = regularization * float(largest_eigenvalue(gram, right)) if regularization else 0.0
    yield from conjugate_gradient_steps(gram, right, iterations=iterations, regularization=weight)


def total_variation_photoacoustic(
    operator: LinearOperator, signals: Tensor, *, iterations: int = 100, weight: float = 0.002
) -> Tensor:
    """The image after so many steps of `total_variation_photoacoustic_steps`."""
    return _last(total_variation_photoacoustic_steps(operator, signals, iterations=iterations, weight=weight))


def total_variation_photoacoustic_steps(
    operator: LinearOperator, signals: Tensor, *, iterations: int = 100, weight: float = 0.002
) -> Iterator[Tensor]:
    """Minimize 1/2 |A x - signals|^2 + weight s TV(x) by FISTA, for images in the plane.

    A is divided by its norm, so that one `weight` serves arrays of any size; s is how bright A^T signals then is, so that it
    serves signals in any unit. Yields the image after each iteration.
    """
    norm = math.sqrt(float(largest_eigenvalue(operator.gram, operator.H(signals))))
    scaled = operator * (1 / norm)
    # The power iteration comes from below; the margin keeps the step on the safe side.
    yield from total_variation_steps(scaled, signals / norm, weight=weight, iterations=iterations, step=0.95)


def _last(steps: Iterator[Tensor]) -> Tensor:
    return collections.deque(steps, maxlen=1)[0].clone()
