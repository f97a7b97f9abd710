"""Golden tensors: what torch makes of some inputs in float32, and whether a runtime makes the same of them.

Runtimes fail in silence: an enqueue that did nothing leaves the last output in its buffer, a plan of another GPU gives zeros.
So inputs differ from call to call, the output is overwritten with NaN between calls where it can be, and the error is taken
relative to what the denoiser changes, not to the image that it passes through.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from ..errors import RuntimeFailed
from .base import LoadedDenoiser, Precision, Shape

__all__ = ["TOLERANCES", "Golden", "golden_tensors", "verify"]

TOLERANCES: dict[Precision, float] = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}
"""Greatest error by precision, relative to |D(x) - x| of the float32 reference."""
_SIGMAS = (0.6, 0.02, 0.15)
_FLOOR = 1e-3
"""Of |x|: an untrained network that changes nothing is no reason to divide by zero."""


class Golden(msgspec.Struct, frozen=True, eq=False):
    """Input and output of the reference, float32, on the processor."""

    x: Tensor
    sigma: Tensor
    out: Tensor


def golden_tensors(reference: LoadedDenoiser, shape: Shape) -> list[Golden]:
    """Smooth images with noise of high, low and middle level, and what the reference makes of them."""
    generator = torch.Generator().manual_seed(20261125)
    made = []
    for level in _SIGMAS:
        sigma = level * (1 + torch.rand(shape.batch, generator=generator))
        x = _images(shape, generator) + sigma.reshape(-1, 1, 1, 1) * torch.randn(shape.sizes, generator=generator)
        made.append(Golden(x, sigma, reference(x, sigma).float().cpu().clone()))
    return made


def _images(shape: Shape, generator: torch.Generator) -> Tensor:
    """Smooth random images (N, C, H, W) with values of about 1."""
    coarse = torch.randn((shape.batch, shape.channels, 8, 8), generator=generator)
    return torch.nn.functional.interpolate(coarse, (shape.height, shape.width), mode="bicubic", align_corners=True) / 2


def verify(denoise: LoadedDenoiser, golden: Sequence[Golden], tolerance: float) -> float:
    """Greatest relative error of a runtime over the golden tensors.

    Raises `RuntimeFailed` that names tolerance and finding for a wrong shape, NaN, a stale output or too great an error.
    """
    return max(_verify_one(denoise, case, tolerance) for case in golden)


def _verify_one(denoise: LoadedDenoiser, case: Golden, tolerance: float) -> float:
    raw = denoise(case.x.clone(), case.sigma.clone())
    if tuple(raw.shape) != tuple(case.out.shape):
        raise RuntimeFailed(f"the output has shape {tuple(raw.shape)}, expected {tuple(case.out.shape)}")
    out = raw.float().cpu().clone()
    _poison(raw)
    if not bool(torch.isfinite(out).all()):
        raise RuntimeFailed("the output has values that are not finite, or was not written at all")
    change = torch.linalg.vector_norm(case.out - case.x)
    scale = torch.maximum(change, _FLOOR * torch.linalg.vector_norm(case.x))
    error = float(torch.linalg.vector_norm(out - case.out) / scale)
    if not error <= tolerance:
        raise RuntimeFailed(f"the output differs from torch in float32 by {error:.2g}, allowed is {tolerance:g}")
    return error


def _poison(out: Tensor) -> None:
    """Make a buffer that is not written by the next call show it."""
    with torch.inference_mode():
        out.fill_(torch.nan)
