"""Iterative solvers for linear and sparse least squares. They ask an operator for its gram and nothing else.

All run a fixed number of iterations and never wait for the device between them; scalars stay tensors. Each has a generator
form that gives the estimate after every iteration, for whoever must stop by the clock.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..operators.linear import LinearOperator

__all__ = ["conjugate_gradient_steps", "conjugate_gradients", "fista", "fista_steps", "largest_eigenvalue"]

Proximal = Callable[[Tensor, float | Tensor], Tensor]


def conjugate_gradients(
    gram: LinearOperator,
    right_side: Tensor,
    *,
    iterations: int,
    regularization: float = 0.0,
    initial: Tensor | None = None,
) -> Tensor:
    """Solve (gram + regularization I) x = right_side by conjugate gradients (Hestenes, Stiefel, J Res NBS 49, 1952).

    gram: Hermitian and not negative. right_side: shape (*batch, *gram.domain); each member of the batch, and what lies along
    the independent axes of the gram, has step sizes of its own. initial: the start, same shape; 0 if left out. A residual
    of 0 stays 0. Returns x.
    """
    _check_iterations(iterations)
    done = gram.solve(right_side, iterations=iterations, regularization=regularization, initial=initial)
    if done is not None:
        return done
    steps = conjugate_gradient_steps(
        gram, right_side, iterations=iterations, regularization=regularization, initial=initial
    )
    return _last(steps)


def conjugate_gradient_steps(
    gram: LinearOperator,
    right_side: Tensor,
    *,
    iterations: int,
    regularization: float = 0.0,
    initial: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the estimate after each iteration of `conjugate_gradients`.

    It is the working buffer, which the next iteration overwrites; `clone` what is to be kept.
    """
    _check_iterations(iterations)
    axes = tuple(axis for axis in range(-len(gram.domain), 0) if axis not in gram.independent)
    right_side = right_side.resolve_conj()
    if initial is None:
        x, residual = torch.zeros_like(right_side), right_side.clone()
    else:
        x = initial.expand_as(right_side).clone()
        residual = right_side - gram(x) - regularization * x
    direction, energy = residual.clone(), _inner(residual, residual, axes)
    for _ in range(iterations):
        image = gram(direction)
        if regularization:
            image = torch.add(image, direction, alpha=regularization)  # a gram may answer with its argument itself
        step = _ratio(energy, _inner(direction, image, axes))
        x.addcmul_(direction, step)
        residual.addcmul_(image, -step)
        before, energy = energy, _inner(residual, residual, axes)
        direction.mul_(_ratio(energy, before)).add_(residual)
        yield x


def largest_eigenvalue(gram: LinearOperator, like: Tensor, *, iterations: int = 30, seed: int = 0) -> Tensor:
    """Largest eigenvalue of a Hermitian operator that is not negative, by power iteration from a seeded random start.

    like: any tensor of the dtype and device to work in. Returns a real tensor without axes, at most the true value.
    """
    _check_iterations(iterations)
    generator = torch.Generator(like.device).manual_seed(seed)
    x = torch.randn(gram.domain, dtype=like.dtype, device=like.device, generator=generator)
    norm: Tensor = torch.linalg.vector_norm(x)
    for _ in range(iterations):
        x = gram(x / norm.clamp_min(torch.finfo(norm.dtype).tiny))
        norm = torch.linalg.vector_norm(x)
    return norm


def fista(
    gram: LinearOperator,
    right_side: Tensor,
    proximal: Proximal,
    *,
    iterations: int,
    step: float | Tensor | None = None,
    initial: Tensor | None = None,
) -> Tensor:
    """Minimize 1/2 |A x - y|^2 + g(x) by FISTA (Beck, Teboulle, SIAM J Imaging Sci 2, 2009).

    gram: A^H A. right_side: A^H y, shape (*batch, *gram.domain). proximal(v, t): argmin over x of |x - v|^2 / 2 + t g(x).
    step: at most 1 / (largest eigenvalue of gram); from a power iteration if left out. initial: the start. Returns x.
    """
    return _last(fista_steps(gram, right_side, proximal, iterations=iterations, step=step, initial=initial))


def fista_steps(
    gram: LinearOperator,
    right_side: Tensor,
    proximal: Proximal,
    *,
    iterations: int,
    step: float | Tensor | None = None,
    initial: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the estimate after each iteration of `fista`."""
    _check_iterations(iterations)
    if step is None:
        # Power iteration comes from below; the margin keeps the step on the safe side.
        step = 0.95 / largest_eigenvalue(gram, right_side).clamp_min(torch.finfo(right_side.real.dtype).tiny)
    x = torch.zeros_like(right_side) if initial is None else initial.expand_as(right_side)
    ahead, momentum = x, 1.0
    for _ in range(iterations):
        before, x = x, proximal(ahead - step * (gram(ahead) - right_side), step)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = torch.lerp(before, x, 1 + (momentum - 1) / following)
        momentum = following
        yield x


def _last(steps: Iterator[Tensor]) -> Tensor:
    return collections.deque(steps, maxlen=1)[0]


def _inner(x: Tensor, y: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Real part of <x, y> over `axes`, counted from the end, which are kept with length 1."""
    if not x.is_complex():
        return (x * y).sum(axes, keepdim=True) if axes else x * y
    product = torch.view_as_real(x) * torch.view_as_real(y)
    return product.sum((*(axis - 1 for axis in axes), -1), keepdim=True).squeeze(-1)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, 0 where below is 0: the residual is 0 then, and the iteration stands still."""
    return torch.where(below > 0, above / below, torch.zeros_like(above))


def _check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, at least 1 is needed")
