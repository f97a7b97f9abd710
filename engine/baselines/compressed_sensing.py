"""Compressed sensing by total variation. (For wavelets see `l1`: with one coil and a map of ones it is the same program.)"""

from __future__ import annotations

import collections
from collections.abc import Iterator

import torch
from torch import Tensor

from ..operators.linear import LinearOperator
from .l1 import gradient_step, intensity_scale
from .solvers import fista_steps

__all__ = ["TotalVariationProximal", "total_variation", "total_variation_norm", "total_variation_steps"]


class TotalVariationProximal:
    """argmin over x of |x - v|^2 / 2 + t TV(x) for images (*batch, y, x), by fast gradient projection on the dual.

    TV is the isotropic one of `total_variation_norm`. Each call starts from the dual solution of the one before, so that a
    few `iterations` suffice inside an outer iteration. (Beck, Teboulle, IEEE TIP 18, 2009.)
    """

    def __init__(self, iterations: int = 10) -> None:
        self._iterations = iterations
        self._dual: Tensor | None = None

    def __call__(self, v: Tensor, t: float | Tensor) -> Tensor:
        """The minimizer for v, real or complex; t: weight, at least 0."""
        t = torch.as_tensor(t, dtype=v.real.dtype, device=v.device).clamp_min(torch.finfo(v.real.dtype).tiny)
        dual = self._dual
        if dual is None or dual.shape[1:] != v.shape or dual.dtype != v.dtype:
            dual = v.new_zeros(2, *v.shape)
        ahead, momentum = dual, 1.0
        for _ in range(self._iterations):
            before = dual
            slope = _differences(torch.sub(v, _adjoint_differences(ahead).mul_(t)))
            dual = _unit_ball(torch.add(ahead, slope.div_(8 * t)))
            following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead = torch.lerp(before, dual, 1 + (momentum - 1) / following)
            momentum = following
        self._dual = dual
        return v - t * _adjoint_differences(dual)


def total_variation(
    operator: LinearOperator,
    data: Tensor,
    *,
    weight: float = 0.005,
    iterations: int = 100,
    inner_iterations: int = 10,
    scale: float | Tensor | None = None,
    step: float | Tensor | None = None,
) -> Tensor:
    """Minimize 1/2 |A x - data/s|^2 + weight TV(x) by FISTA; the image is s x. (Block et al., MRM 57, 2007.)

    operator: A, such as `CartesianSense`, with a map of ones for one coil. data: shape (*batch, *operator.range).
    weight: for an image whose bright parts are about 1, as in `bart pics -S -R T:3:0:weight`. inner_iterations: of
    `TotalVariationProximal`. scale, step: as in `l1_espirit`. Returns the image, shape (*batch, *operator.domain).
    """
    steps = total_variation_steps(
        operator, data, weight=weight, iterations=iterations, inner_iterations=inner_iterations, scale=scale, step=step
    )
    return collections.deque(steps, maxlen=1)[0].contiguous()


def total_variation_steps(
    operator: LinearOperator,
    data: Tensor,
    *,
    weight: float = 0.005,
    iterations: int = 100,
    inner_iterations: int = 10,
    scale: float | Tensor | None = None,
    step: float | Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the image after each iteration of `total_variation`."""
    scale = intensity_scale(operator, data) if scale is None else scale
    step = gradient_step(operator, data) if step is None else step
    inner = TotalVariationProximal(inner_iterations)

    def proximal(x: Tensor, length: float | Tensor) -> Tensor:
        return inner(x, weight * length)

    for x in fista_steps(operator.gram, operator.H(data) / scale, proximal, iterations=iterations, step=step):
        yield x * scale


def total_variation_norm(x: Tensor) -> Tensor:
    """Sum over pixels of the length of the gradient: sqrt(|x_y|^2 + |x_x|^2), differences wrapping round; (*batch, y, x).

    Real and imaginary part share one length. Returns a real tensor without axes.
    """
    return _lengths(_differences(x)).sum()


def _differences(x: Tensor) -> Tensor:
    p = torch.stack([x.roll(-1, -2), x.roll(-1, -1)])
    return p.sub_(x)


def _adjoint_differences(p: Tensor) -> Tensor:
    x = p[0].roll(1, -2)
    return x.sub_(p[0]).add_(p[1].roll(1, -1)).sub_(p[1])


def _parts(p: Tensor) -> Tensor:
    """Real and imaginary part as a last axis; several times as fast as complex numbers where both have one factor."""
    return torch.view_as_real(p.resolve_conj()) if p.is_complex() else p[..., None]


def _lengths(p: Tensor) -> Tensor:
    squares = _parts(p).square()
    both = squares[0].add_(squares[1])
    total = both[..., 0]
    for part in range(1, both.shape[-1]):
        total = total + both[..., part]
    return total.sqrt()


def _unit_ball(p: Tensor) -> Tensor:
    """Each gradient of p shortened to length 1 at most, in place."""
    _parts(p).mul_(_lengths(p).clamp_min_(1).reciprocal_()[..., None])
    return p
