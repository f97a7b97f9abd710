"""From the image to the domain that a prior was trained in, and back: u = C_m T z, z = T^+ C_m^+ u.

T is an analysis: linear, from an image (y, x) to one or more complex planes. C_m stacks real and imaginary part of the planes
as channels and repeats them m times: each copy gets noise of its own, and the mean of the copies comes back. What T throws
away, `inverse` takes from the image before: the window that a model of high frequencies does not see, and the sample at
frequency 0, whose weight is 0.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config_priors import TransformConfig
from ..operators.cartesian import Fourier
from ..operators.hankel import Hankel
from ..operators.linear import LinearOperator

__all__ = [
    "ANALYSES",
    "Analysis",
    "Filtered",
    "HankelMatrix",
    "ImagePlanes",
    "Kspace",
    "KspaceHaar",
    "Transform",
    "UndecimatedHaar",
    "haar_merge",
    "haar_split",
    "kspace_weights",
    "window_mask",
]


class Analysis(LinearOperator):
    """T with a way back.

    Domain (y, x), range (planes, rows, columns), both complex. `inverse` is a left inverse, so inverse(T z, z) = z; it is
    not a multiple of the adjoint in general.
    """

    @property
    def gain(self) -> float | None:
        """a where |T x|^2 = a |x|^2 for all x (away from the border); None where there is no such a."""
        return 1.0

    @abc.abstractmethod
    def inverse(self, planes: Tensor, before: Tensor) -> Tensor:
        """The image of `planes`, (*batch, *range); what T does not see comes from `before`, (*batch, *domain)."""


class ImagePlanes(Analysis):
    """The image itself."""

    def __init__(self, shape: Sequence[int], config: TransformConfig | None = None) -> None:  # noqa: ARG002 as its sisters
        super().__init__(shape, (1, *shape))

    def inverse(self, planes: Tensor, before: Tensor) -> Tensor:  # noqa: ARG002
        """The one plane."""
        return planes.squeeze(-3)

    def _forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-3)

    def _backward(self, y: Tensor) -> Tensor:
        return y.squeeze(-3)


class UndecimatedHaar(Analysis):
    """One level of the undecimated Haar transform: four bands, one pixel larger than the image along both axes.

    Filters (1, 1)/sqrt(2) and (-1, 1)/sqrt(2) along y and x over the image continued by reflection, in the order low-low,
    low-high, high-low, high-high (y before x), as in UGM-PI and WDAEP. |T x|^2 = 4 |x|^2 away from the border.
    """

    def __init__(self, shape: Sequence[int], config: TransformConfig | None = None) -> None:  # noqa: ARG002
        height, width = shape
        super().__init__(shape, (4, height + 1, width + 1))

    @property
    def gain(self) -> float:
        """4."""
        return 4.0

    def inverse(self, planes: Tensor, before: Tensor) -> Tensor:  # noqa: ARG002
        """Mean of the four ways in which the bands hold each pixel."""
        low_low, low_high, high_low, high_high = planes.unbind(-3)
        return _haar_mean(_haar_mean(low_low, low_high, -1), _haar_mean(high_low, high_high, -1), -2)

    def _forward(self, x: Tensor) -> Tensor:
        rows = [_haar_pair(band, -1) for band in _haar_pair(x, -2)]
        return torch.stack([band for pair in rows for band in pair], -3)

    def _backward(self, y: Tensor) -> Tensor:
        low_low, low_high, high_low, high_high = y.unbind(-3)
        return _haar_adjoint(_haar_adjoint(low_low, low_high, -1), _haar_adjoint(high_low, high_high, -1), -2)


class Kspace(Analysis):
    """Weighted k-space without its center: W (1 - window) F z, F the centered transform without a factor 1/N.

    The weight (see `kspace_weights`) levels k-space, whose center is a thousand times its median. What has weight 0, the
    window and frequency 0, comes back from the image before.
    """

    def __init__(self, shape: Sequence[int], config: TransformConfig | None = None) -> None:
        super().__init__(shape, (1, *shape))
        config = config or TransformConfig(kind="kspace")
        seen = ~window_mask(self.domain, config.window, config.window_shape)
        self._weights = kspace_weights(self.domain, config.weight_scale, config.weight_power) * seen
        self._fourier: dict[tuple[torch.dtype, torch.device], Fourier] = {}

    @property
    def weights(self) -> Tensor:
        """Factor of each sample, float64, (y, x)."""
        return self._weights

    @property
    def gain(self) -> float | None:
        """The number of samples, where none is weighted or left out."""
        return float(self._weights.numel()) if bool((self._weights == 1).all()) else None

    def inverse(self, planes: Tensor, before: Tensor) -> Tensor:
        """Divide by the weights where they are not 0."""
        fourier, weights = self.parts(planes)
        kspace = torch.where(weights > 0, planes.squeeze(-3) / weights, fourier(before))
        return fourier.H(kspace)

    def _forward(self, x: Tensor) -> Tensor:
        fourier, weights = self.parts(x)
        return (fourier(x) * weights).unsqueeze(-3)

    def _backward(self, y: Tensor) -> Tensor:
        fourier, weights = self.parts(y)
        return fourier.H(y.squeeze(-3) * weights)

    def merged(self, planes: Tensor) -> Tensor:
        """Weighted k-space (*batch, y, x) of planes (*batch, *range)."""
        return planes.squeeze(-3)

    def split(self, kspace: Tensor) -> Tensor:
        """Planes of weighted k-space, the inverse of `merged`."""
        return kspace.unsqueeze(-3)

    def parts(self, like: Tensor) -> tuple[Fourier, Tensor]:
        """The orthonormal transform, and the weights of the plain one, for tensors of this kind."""
        dtype = like.dtype if like.is_complex() else torch.promote_types(like.dtype, torch.complex64)
        key = (dtype, like.device)
        if key not in self._fourier:
            self._fourier[key] = Fourier(self.domain, dtype=dtype, device=like.device)
        # sqrt(N) turns the orthonormal transform into the plain one, whose scale the published constants are for.
        scale = (self.domain[0] * self.domain[1]) ** 0.5
        return self._fourier[key], (self._weights * scale).to(like.device, like.real.dtype)


class KspaceHaar(Analysis):
    """Four Haar bands of weighted k-space, half as large along both axes (Sub-DM): an orthonormal step after `Kspace`.

    Odd sizes are filled up with a zero.
    """

    def __init__(self, shape: Sequence[int], config: TransformConfig | None = None) -> None:
        self._kspace = Kspace(shape, config)
        height, width = shape
        super().__init__(shape, (4, (height + 1) // 2, (width + 1) // 2))

    @property
    def gain(self) -> float | None:
        """That of `Kspace`."""
        return self._kspace.gain

    def inverse(self, planes: Tensor, before: Tensor) -> Tensor:
        """Merge the bands, then as `Kspace`."""
        return self._kspace.inverse(self.merged(planes).unsqueeze(-3), before)

    @property
    def weights(self) -> Tensor:
        """Those of `Kspace`."""
        return self._kspace.weights

    def parts(self, like: Tensor) -> tuple[Fourier, Tensor]:
        """Those of `Kspace`."""
        return self._kspace.parts(like)

    def merged(self, planes: Tensor) -> Tensor:
        """Weighted k-space (*batch, y, x) of the bands (*batch, *range)."""
        return haar_merge(planes, self.domain)

    def split(self, kspace: Tensor) -> Tensor:
        """Bands of weighted k-space, the inverse of `merged`."""
        return haar_split(kspace)

    def _forward(self, x: Tensor) -> Tensor:
        return self.split(self._kspace(x).squeeze(-3))

    def _backward(self, y: Tensor) -> Tensor:
        return self._kspace.H(haar_merge(y, self.domain).unsqueeze(-3))


class Filtered(Analysis):
    """The image that the weights and the window of `Kspace` filter: F^H W (1 - window) F z, F orthonormal.

    `Kspace` after an inverse transform and without its factor sqrt(N): white noise here is white noise there, and the filter
    is one of cycles per pixel, the same for images of any size.
    """

    def __init__(self, shape: Sequence[int], config: TransformConfig | None = None) -> None:
        self._kspace = Kspace(shape, config)
        super().__init__(shape, (1, *shape))

    @property
    def gain(self) -> float | None:
        """1 where nothing is filtered."""
        return None if self._kspace.gain is None else 1.0

    def inverse(self, planes: Tensor, before: Tensor) -> Tensor:
        """Divide k-space by the weights where they are not 0."""
        return self._kspace.inverse(self._transformed(planes), before)

    def _forward(self, x: Tensor) -> Tensor:
        fourier, weights = self._kspace.parts(x)
        return fourier.H(fourier(x) * weights).unsqueeze(-3) / self._root

    def _backward(self, y: Tensor) -> Tensor:
        return self._kspace.H(self._transformed(y)) / self._root**2

    def _transformed(self, planes: Tensor) -> Tensor:
        fourier, _ = self._kspace.parts(planes)
        return fourier(planes) * self._root

    @property
    def _root(self) -> float:
        return math.sqrt(self.domain[0] * self.domain[1])


class HankelMatrix(Analysis):
    """The matrix of the windows of weighted k-space: H W F z, a row for each position and a column for each point of a window.

    Rows of one line of k-space follow each other, `line` of them; lines lie `hankel_stride` apart, and the last one is there in
    any case, so that every sample is held. Inside, each is by about window^2 / stride entries: |H k|^2 is that times |k|^2. A
    window larger than k-space is cut to it, a stride above the window to the window.
    """

    def __init__(self, shape: Sequence[int], config: TransformConfig | None = None) -> None:
        config = config or TransformConfig(kind="hankel")
        size = min(config.hankel_window, *shape)
        self._kspace, self._windows = Kspace(shape, config), Hankel((1, *shape), size)
        self.line = shape[1] + 1 - size
        last, stride = shape[0] - size, min(config.hankel_stride, size)
        self._chosen = torch.tensor(sorted({*range(0, last, stride), last}))
        self._counts = self._added(torch.ones(len(self._chosen) * self.line, size**2))
        super().__init__(shape, (1, len(self._chosen) * self.line, size**2))

    @property
    def gain(self) -> float | None:
        """None: samples at the border stand in fewer windows."""
        return None

    def inverse(self, planes: Tensor, before: Tensor) -> Tensor:
        """Mean of the entries that stand for one sample, which is the pseudo-inverse of H; then as `Kspace`."""
        rows = planes.squeeze(-3)
        return self._kspace.inverse(self._added(rows) / self._counts.to(rows.device, rows.real.dtype), before)

    def _forward(self, x: Tensor) -> Tensor:
        windows = self._windows(self._kspace(x))
        lines: Tensor = windows.reshape(*windows.shape[:-2], -1, self.line, windows.shape[-1])
        return lines.index_select(-3, self._chosen.to(x.device)).flatten(-3, -2).unsqueeze(-3)

    def _backward(self, y: Tensor) -> Tensor:
        return self._kspace.H(self._added(y.squeeze(-3)))

    def _added(self, rows: Tensor) -> Tensor:
        """H^H of the lines that there are: k-space (*batch, 1, y, x) in which entries of one sample are added up."""
        lines = rows.reshape(*rows.shape[:-2], -1, self.line, rows.shape[-1])
        every = lines.new_zeros(*lines.shape[:-3], self._windows.range[0] // self.line, *lines.shape[-2:])
        return self._windows.H(every.index_copy_(-3, self._chosen.to(rows.device), lines).flatten(-3, -2))


ANALYSES: dict[str, Callable[[Sequence[int], TransformConfig | None], Analysis]] = {
    "image": ImagePlanes,
    "haar": UndecimatedHaar,
    "kspace": Kspace,
    "kspace_haar": KspaceHaar,
    "filtered": Filtered,
    "hankel": HankelMatrix,
}
"""Analyses by the name that a configuration calls them."""


class Transform:
    """An analysis with its embedding into real channels, for images (*batch, y, x): coils and slices are batch.

    config: which analysis, how many copies. shape: (y, x).
    """

    def __init__(self, config: TransformConfig, shape: Sequence[int]) -> None:
        self.config = config
        self.analysis: Analysis = ANALYSES[config.kind](shape, config)

    @property
    def channels(self) -> int:
        """Channels of the prior: copies times planes, times 2 where real and imaginary part are not split."""
        return self.analysis.range[0] * self.config.copies * (1 if self.config.split else 2)

    def forward(self, image: Tensor) -> Tensor:
        """Complex images (*batch, y, x) to real channels (count, channels, rows, columns).

        Count is the product of the batch axes, twice that where split: first all real, then all imaginary parts.
        """
        return self.channels_of(self.analysis(image.reshape(-1, *self.analysis.domain)))

    def inverse(self, channels: Tensor, before: Tensor) -> Tensor:
        """Mean over the copies, then back to images of the shape of `before`, which fills in what was not seen."""
        images = before.reshape(-1, *self.analysis.domain)
        return self.analysis.inverse(self.planes(channels), images).reshape(before.shape)

    def channels_of(self, planes: Tensor) -> Tensor:
        """The embedding C_m of complex planes (count, planes, rows, columns)."""
        parts = torch.cat([planes.real, planes.imag], dim=0 if self.config.split else 1)
        return parts.repeat(1, self.config.copies, 1, 1) if self.config.copies > 1 else parts

    def planes(self, channels: Tensor) -> Tensor:
        """Mean over the copies as complex planes, the left inverse of `channels_of`."""
        if self.config.copies > 1:
            channels = torch.stack(channels.chunk(self.config.copies, 1)).mean(0)
        real, imaginary = channels.chunk(2, dim=0 if self.config.split else 1)
        return torch.complex(real.contiguous(), imaginary.contiguous())


def kspace_weights(shape: Sequence[int], scale: float, power: float) -> Tensor:
    """(c^2 ((kx/Nx)^2 + (ky/Ny)^2))^p with c = scale, p = power and k counted from N//2; float64, shape (y, x).

    1 throughout for p = 0. With p = 1/2, c is nothing but a factor: networks that are homogeneous need only one c.
    """
    height, width = shape
    y = (torch.arange(height, dtype=torch.float64) - height // 2) / height
    x = (torch.arange(width, dtype=torch.float64) - width // 2) / width
    squares: Tensor = y[:, None] ** 2 + x[None, :] ** 2
    return (scale**2 * squares) ** power if power else torch.ones_like(squares)


def window_mask(shape: Sequence[int], size: int, form: str = "square") -> Tensor:
    """True in the central `size` x `size` points, or in the disc of that diameter; boolean, shape (y, x)."""
    height, width = shape
    y, x = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    if form == "disc":
        return 4 * (y[:, None] ** 2 + x[None, :] ** 2) < size**2
    first, last = -(size // 2), size - size // 2
    return ((y >= first) & (y < last))[:, None] & ((x >= first) & (x < last))[None, :]


def haar_split(plane: Tensor) -> Tensor:
    """One level of the orthonormal Haar transform: (*batch, y, x) to bands (*batch, 4, y/2, x/2), rounded up.

    Order low-low, low-high, high-low, high-high (y before x). A few sums on the device of the tensor; PyWavelets would
    take it to the processor and back at every evaluation of the network.
    """
    height, width = plane.shape[-2:]
    plane = torch.nn.functional.pad(plane, (0, width % 2, 0, height % 2))
    a, b, c, d = (plane[..., y::2, x::2] for y in (0, 1) for x in (0, 1))
    return torch.stack([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], -3) / 2


def haar_merge(bands: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse and adjoint of `haar_split`; shape: (y, x) of the plane."""
    p, q, r, s = bands.unbind(-3)
    plane = bands.new_empty(*bands.shape[:-3], 2 * bands.shape[-2], 2 * bands.shape[-1])
    plane[..., 0::2, 0::2], plane[..., 0::2, 1::2] = (p + q + r + s) / 2, (p - q + r - s) / 2
    plane[..., 1::2, 0::2], plane[..., 1::2, 1::2] = (p + q - r - s) / 2, (p - q - r + s) / 2
    return plane[..., : shape[0], : shape[1]]


def _haar_pair(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """(x[n-1] + x[n]) / sqrt(2) and (x[n-1] - x[n]) / sqrt(2) for n = 0 ... N, x reflected at both ends."""
    before = torch.cat([x.narrow(axis, 0, 1), x], axis)
    after = torch.cat([x, x.narrow(axis, -1, 1)], axis)
    return (before + after) * 0.5**0.5, (before - after) * 0.5**0.5


def _haar_mean(low: Tensor, high: Tensor, axis: int) -> Tensor:
    """The left inverse of `_haar_pair`: each x[n] is in the pairs n and n + 1."""
    size = low.shape[axis] - 1
    as_second, as_first = low - high, low + high
    return torch.add(as_second.narrow(axis, 0, size), as_first.narrow(axis, 1, size)).mul_(0.5 * 0.5**0.5)


def _haar_adjoint(low: Tensor, high: Tensor, axis: int) -> Tensor:
    """The adjoint of `_haar_pair`."""
    size = low.shape[axis] - 1
    as_first, as_second = (low + high) * 0.5**0.5, (low - high) * 0.5**0.5
    x = torch.add(as_second.narrow(axis, 0, size), as_first.narrow(axis, 1, size))
    x.narrow(axis, 0, 1).add_(as_first.narrow(axis, 0, 1))
    x.narrow(axis, -1, 1).add_(as_second.narrow(axis, -1, 1))
    return x
