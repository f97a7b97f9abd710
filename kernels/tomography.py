"""Rays through images by Joseph's method, their exact adjoint, and the pixel-driven back-projection of filtered sinograms.

Everything is counted in pixels; pixel [0, 0] of an image lies at (0, 0). A table of views (view, 8) says where rays are: ray u
passes through (p0, p1) + u (q0, q1) along (v0, v1) + u (w0, w1), in this order, u being the number of the bin. That is any
flat detector: a fan has q = 0 and starts at its source, parallel rays have w = 0. A sinogram is (..., view, bin).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import device, native

__all__ = [
    "COLUMNS",
    "adjoint",
    "adjoint_launches",
    "ct_adjoint",
    "ct_project",
    "pixel_driven",
    "pixel_driven_launches",
    "project",
    "project_launches",
    "shadows",
]

COLUMNS = 8
_AROUND = 3
"""Zeros around a padded line: one before, two after."""
_BLOCK = (32, 4, 1)

_ADDRESS, _LENGTH, _INTEGER, _FLOAT = native.ADDRESS, native.LENGTH, native.INTEGER, native.FLOAT
_SIZES = (_LENGTH, _LENGTH, _LENGTH, _ADDRESS, _LENGTH, _LENGTH)
_project = native.Function("scs_ct_project", _ADDRESS, *_SIZES, _FLOAT, _FLOAT, _ADDRESS, _INTEGER)
_adjoint = native.Function("scs_ct_adjoint", _ADDRESS, *_SIZES, _FLOAT, _FLOAT, _ADDRESS, _INTEGER)
_pixel_driven = native.Function("scs_ct_pixel_driven", _ADDRESS, *_SIZES, _ADDRESS, _INTEGER)


def project(image: Tensor, views: Tensor, bins: int, size0: float = 1.0, size1: float = 1.0) -> Tensor:
    """Line integrals (*batch, view, bin) of an image (*batch, n0, n1) that is linear between pixels (Joseph, TMI 1, 1982).

    views: (view, 8), see above. size0, size1: of a pixel along each axis, in the unit of length of the result. Outside the
    image is 0. float32 and float64. Raises ValueError for shapes that do not fit. Beneath the operator `ct_project`.
    """
    _check(image, "image", views, bins)
    if not (_native(image) or _cuda(image)) or not image.numel() * len(views):
        return _torch_project(image, views, bins, size0, size1)
    image, views = image.contiguous(), views.to(image.device, torch.float64).contiguous()
    sinogram = torch.empty(*image.shape[:-2], len(views), bins, device=image.device)
    if not _native(image):
        device.launch(*project_launches(image, views, sinogram, size0, size1))
        return sinogram
    _project(image.data_ptr(), *_sizes(image, views, bins), size0, size1, sinogram.data_ptr(), native.threads())
    return sinogram


def adjoint(sinogram: Tensor, views: Tensor, n0: int, n1: int, size0: float = 1.0, size1: float = 1.0) -> Tensor:
    """The exact adjoint of `project`: an image (*batch, n0, n1). Beneath the operator `ct_adjoint`."""
    _check(sinogram, "sinogram", views, n0 and n1)
    if sinogram.shape[-2] != len(views):
        raise ValueError(f"sinogram has shape {tuple(sinogram.shape)}, its last axes must be ({len(views)}, bins)")
    if not (_native(sinogram) or _cuda(sinogram)) or not sinogram.numel():
        return _torch_adjoint(sinogram, views, n0, n1, size0, size1)
    sinogram, views = sinogram.contiguous(), views.to(sinogram.device, torch.float64).contiguous()
    image = torch.empty(*sinogram.shape[:-2], n0, n1, device=sinogram.device)
    if not _native(sinogram):
        device.launch(*adjoint_launches(sinogram, views, image, size0, size1))
        return image
    sizes = _sizes(image, views, sinogram.shape[-1])
    _adjoint(sinogram.data_ptr(), *sizes, size0, size1, image.data_ptr(), native.threads())
    return image


def pixel_driven(sinogram: Tensor, views: Tensor, n0: int, n1: int) -> Tensor:
    """Sum over the views of what a pixel's shadow reads, linear between bins, over the square of its magnification.

    This is the back-projection of filtered back-projection, and not the adjoint of `project`. The magnification is the
    distance from the source over that of the image's center; 1 for parallel rays. sinogram: (*batch, view, bin), float32 or
    float64. Returns (*batch, n0, n1).
    """
    _check(sinogram, "sinogram", views, n0 and n1)
    if sinogram.shape[-2] != len(views):
        raise ValueError(f"sinogram has shape {tuple(sinogram.shape)}, its last axes must be ({len(views)}, bins)")
    tables = shadows(views, n0, n1)
    rows = torch.nn.functional.pad(sinogram, (1, 2))
    if not (_native(sinogram) or _cuda(sinogram)) or not sinogram.numel():
        return _torch_pixel_driven(rows, tables.to(sinogram), n0, n1)
    tables = tables.to(sinogram.device, torch.float32).contiguous()
    image = torch.empty(*sinogram.shape[:-2], n0, n1, device=sinogram.device)
    if not _native(sinogram):
        device.launch(*pixel_driven_launches(rows, tables, image))
        return image
    _pixel_driven(rows.data_ptr(), *_sizes(image, tables, sinogram.shape[-1]), image.data_ptr(), native.threads())
    return image


def shadows(views: Tensor, n0: int, n1: int) -> Tensor:
    """Where points meet the detector: (view, 6), a and b of u = (a0 + a1 r0 + a2 r1) / (b0 + b1 r0 + b2 r1), float64.

    r is counted in pixels from the image's center, where the denominator is 1. Raises ValueError where the bins move (q)
    and turn (w) both, since rays then cross.
    """
    p, q, v, w = (views.to(torch.float64)[:, 2 * i : 2 * i + 2] for i in range(4))
    if bool(((q != 0).any(1) & (w != 0).any(1)).any()):
        raise ValueError(
            "views holds rays of which both the start and the direction change; needed is a fan or parallel"
        )
    center = torch.tensor([(n0 - 1) / 2, (n1 - 1) / 2], dtype=torch.float64, device=views.device) - p
    fan = (w != 0).any(1, keepdim=True)
    # Point r lies on ray u where (r - p - u q) x (v + u w) = 0: with q = 0 or w = 0 one equation, linear in u.
    above = torch.cat([_cross(center, v), v[:, 1:], -v[:, :1]], 1) * torch.where(fan, -1, 1)
    below = torch.where(
        fan,
        torch.cat([_cross(center, w), w[:, 1:], -w[:, :1]], 1),
        torch.nn.functional.pad(_cross(q, v), (0, 2)),
    )
    return torch.cat([above, below], 1) / below[:, :1]


@torch.library.custom_op("scanside::ct_project", mutates_args=())
def ct_project(image: Tensor, views: Tensor, bins: int, size0: float, size1: float) -> Tensor:
    """As `project`, as an operator that torch differentiates by the image, and compiles."""
    return project(image, views, bins, size0, size1)


@torch.library.custom_op("scanside::ct_adjoint", mutates_args=())
def ct_adjoint(sinogram: Tensor, views: Tensor, n0: int, n1: int, size0: float, size1: float) -> Tensor:
    """As `adjoint`, as an operator that torch differentiates by the sinogram, and compiles."""
    return adjoint(sinogram, views, n0, n1, size0, size1)


@ct_project.register_fake
def _(image: Tensor, views: Tensor, bins: int, size0: float, size1: float) -> Tensor:  # noqa: ARG001
    return image.new_empty((*image.shape[:-2], len(views), bins))


@ct_adjoint.register_fake
def _(sinogram: Tensor, views: Tensor, n0: int, n1: int, size0: float, size1: float) -> Tensor:  # noqa: ARG001
    return sinogram.new_empty((*sinogram.shape[:-2], n0, n1))


def _keep_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401, ARG001 - as torch calls it
    image, views, _, *ctx.sizes = inputs
    ctx.shape = image.shape[-2:]
    ctx.save_for_backward(views)


def _keep_adjoint(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401, ARG001
    sinogram, views, _, _, *ctx.sizes = inputs
    ctx.bins = sinogram.shape[-1]
    ctx.save_for_backward(views)


def _project_gradient(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    return ct_adjoint(up, *ctx.saved_tensors, *ctx.shape, *ctx.sizes), None, None, None, None


def _adjoint_gradient(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    return ct_project(up, *ctx.saved_tensors, ctx.bins, *ctx.sizes), None, None, None, None, None


ct_project.register_autograd(_project_gradient, setup_context=_keep_project)
ct_adjoint.register_autograd(_adjoint_gradient, setup_context=_keep_adjoint)


def project_launches(image: Tensor, views: Tensor, sinogram: Tensor, size0: float, size1: float) -> list[device.Launch]:
    """What `project` runs on a CUDA device. The image goes along twice, so that neighbours are side by side either way."""
    plain, turned = (torch.nn.functional.pad(lines, (1, 2)).contiguous() for lines in (image, image.mT))
    (n0, n1), (count, bins) = image.shape[-2:], sinogram.shape[-2:]
    grid = (-(-bins // _BLOCK[0]), -(-count // _BLOCK[1]), sinogram.shape[:-2].numel())
    arguments = (plain, turned, views, sinogram, n0, n1, count, bins, size0, size1)
    return [device.Launch("tomography.cu", "scs_ct_project", grid, _BLOCK, arguments)]


def adjoint_launches(sinogram: Tensor, views: Tensor, image: Tensor, size0: float, size1: float) -> list[device.Launch]:
    """What `adjoint` runs on a CUDA device: each pixel collects from the rays that read it; nothing is added atomically."""
    (n0, n1), (count, bins) = image.shape[-2:], sinogram.shape[-2:]
    rays = torch.empty(count, bins, 4, device=image.device)
    tables = shadows(views, n0, n1).to(torch.float32).contiguous()
    over_bins = (-(-bins // _BLOCK[0]), -(-count // _BLOCK[1]), 1)
    over_pixels = (-(-n1 // _BLOCK[0]), -(-n0 // _BLOCK[1]), sinogram.shape[:-2].numel())
    return [
        device.Launch("tomography.cu", "scs_ct_rays", over_bins, _BLOCK, (views, rays, count, bins, size0, size1)),
        device.Launch(
            *("tomography.cu", "scs_ct_adjoint", over_pixels, _BLOCK),
            (sinogram, rays, tables, image, n0, n1, count, bins),
        ),
    ]


def pixel_driven_launches(rows: Tensor, tables: Tensor, image: Tensor) -> list[device.Launch]:
    """What `pixel_driven` runs on a CUDA device, for padded rows and `shadows` in float32."""
    (n0, n1), count, bins = image.shape[-2:], len(tables), rows.shape[-1] - _AROUND
    grid = (-(-n1 // _BLOCK[0]), -(-n0 // _BLOCK[1]), image.shape[:-2].numel())
    arguments = (rows, tables, image, n0, n1, count, bins)
    return [device.Launch("tomography.cu", "scs_ct_pixel_driven", grid, _BLOCK, arguments)]


def _torch_project(image: Tensor, views: Tensor, bins: int, size0: float, size1: float) -> Tensor:
    """The same without kernels, view by view."""
    sinogram = image.new_zeros(*image.shape[:-2], len(views), bins)
    for v, view in enumerate(views):
        for axis, turned in enumerate((image, image.mT)):
            lines = torch.nn.functional.pad(turned, (1, 2))
            k, part, lengths, mine = _torch_rays(view, bins, axis, lines, (size0, size1))
            flat = lines.flatten(-2)
            sums = (flat[..., k] * (1 - part) + flat[..., k + 1] * part).sum(-2)
            sinogram[..., v, mine] += sums * lengths
    return sinogram


def _torch_adjoint(sinogram: Tensor, views: Tensor, n0: int, n1: int, size0: float, size1: float) -> Tensor:
    batch = sinogram.shape[:-2]
    images = sinogram.new_zeros(*batch, n0, n1 + _AROUND), sinogram.new_zeros(*batch, n1, n0 + _AROUND)
    for v, view in enumerate(views):
        for axis, lines in enumerate(images):
            k, part, lengths, mine = _torch_rays(view, sinogram.shape[-1], axis, lines, (size0, size1))
            value, flat = (sinogram[..., v, mine] * lengths)[..., None, :], lines.flatten(-2)
            flat.index_add_(-1, k.flatten(), (value * (1 - part)).flatten(-2))
            flat.index_add_(-1, k.flatten() + 1, (value * part).flatten(-2))
    return images[0][..., 1:-2] + images[1][..., 1:-2].mT


def _torch_rays(
    view: Tensor, bins: int, axis: int, lines: Tensor, sizes: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the rays that step along `axis`: index into the padded lines (step, ray), part of the way to the next number,
    length of a step (ray,), and their bins."""
    u = torch.arange(bins, dtype=torch.float64, device=view.device)
    p0, p1, q0, q1, v0, v1, w0, w1 = view.to(torch.float64)
    start, way = torch.stack([p0 + u * q0, p1 + u * q1]), torch.stack([v0 + u * w0, v1 + u * w1])
    mine = (way[0].abs() >= way[1].abs()) == (axis == 0)
    start, way = start[:, mine], way[:, mine]
    slope = way[1 - axis] / way[axis]
    steps, width = lines.shape[-2:]
    step = torch.arange(steps, dtype=torch.float64, device=view.device)[:, None]
    at = (1 + start[1 - axis] - start[axis] * slope + step * slope).clamp(0, width - 2)
    lengths = (sizes[axis] ** 2 + (sizes[1 - axis] * slope) ** 2).sqrt()
    k = at.long()
    return k + (step * width).long(), (at - k).to(lines), lengths.to(lines), mine.nonzero()[:, 0]


def _torch_pixel_driven(rows: Tensor, tables: Tensor, n0: int, n1: int) -> Tensor:
    at0, at1 = (torch.arange(n, dtype=rows.dtype, device=rows.device) - (n - 1) / 2 for n in (n0, n1))
    image = rows.new_zeros(*rows.shape[:-2], n0, n1)
    for v, table in enumerate(tables):
        above, below = (part[0] + part[1] * at0[:, None] + part[2] * at1 for part in (table[:3], table[3:]))
        at = (above / below + 1).clamp(0, rows.shape[-1] - 2)
        k = at.long()
        row, part = rows[..., v, :], at - k
        image += (row[..., k] * (1 - part) + row[..., k + 1] * part) / below**2
    return image


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[:, :1] * b[:, 1:] - a[:, 1:] * b[:, :1]


def _sizes(image: Tensor, views: Tensor, bins: int) -> tuple[int, ...]:
    """Batch, image, views and bins as the C functions take them."""
    return image.shape[:-2].numel(), *image.shape[-2:], views.data_ptr(), len(views), bins


def _native(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and native.available()


def _cuda(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype == torch.float32 and device.installed()


def _check(tensor: Tensor, name: str, views: Tensor, points: int) -> None:
    if views.ndim != 2 or views.shape[1] != COLUMNS:
        raise ValueError(f"views has shape {tuple(views.shape)}, needed is (view, {COLUMNS})")
    if tensor.ndim < 2 or 0 in tensor.shape[-2:] or points < 1:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; two axes of at least one point are needed, on both sides"
        )
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}, float32 or float64 is needed")
