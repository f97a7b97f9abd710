"""A network as a prior: denoiser, score and energy are three views of the same function.

For y = x + sigma n, the denoiser of least mean square error D(y; sigma) = E[x | y] and the score of the density of y are one
(Miyasawa 1961, Robbins 1956): sigma^2 grad log p(y; sigma) = D(y; sigma) - y. So a network that was trained to remove noise,
one trained by denoising score matching, and the mean-shift term of a denoising autoencoder differ in scale only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config_priors import NetworkConfig, Precondition
from .networks import UNet

__all__ = ["DenoiseFunction", "Denoiser", "energy", "energy_gradient", "score"]

DenoiseFunction = Callable[[Tensor, Tensor], Tensor]
"""(images (N, C, H, W) float32, noise levels (N,)) -> denoised images: what samplers need of a prior, runtimes give it, too."""


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x, plane(sigma)) round a network F.

    `edm`: the coefficients of Karras et al. 2022, table 1, for data of standard deviation `sigma_data`; the plane holds
    ln(sigma) / 4. `homogeneous`: c_skip = c_out = c_in = 1 and the plane holds sigma, so that with a homogeneous network
    D(a x; a sigma) = a D(x; sigma): the scale of an image needs not be known, only its noise level.
    Where the network has conditions, they follow the planes of the image in x and are not part of what comes out.
    """

    def __init__(
        self, network: nn.Module, *, precondition: Precondition = "homogeneous", sigma_data: float = 0.15
    ) -> None:
        super().__init__()
        self.network, self.precondition, self.sigma_data = network, precondition, sigma_data
        config = getattr(network, "config", None)
        self.multiple = config.multiple if isinstance(config, NetworkConfig) else 1
        self.conditions = config.conditions if isinstance(config, NetworkConfig) else 0

    @classmethod
    def of_size(
        cls, config: NetworkConfig, *, precondition: Precondition = "homogeneous", sigma_data: float = 0.15
    ) -> Denoiser:
        """A new house network in its preconditioning."""
        return cls(UNet(config), precondition=precondition, sigma_data=sigma_data)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Images (N, C, H, W) with noise of standard deviation sigma (N,) per plane -> their denoised mean, same shape.

        With K conditions: (N, C + K, H, W) -> (N, C, H, W).
        """
        height, width = x.shape[-2:]
        sigma = sigma.reshape(-1, 1, 1, 1)
        padded = _padded(x, self.multiple)
        out = self._homogeneous(padded, sigma) if self.precondition == "homogeneous" else self._edm(padded, sigma)
        return out[..., :height, :width]

    def _homogeneous(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self._image(x) + cast(Tensor, self.network(_with_plane(x, sigma)))

    def _image(self, x: Tensor) -> Tensor:
        return x[:, : x.shape[1] - self.conditions]

    def _edm(self, x: Tensor, sigma: Tensor) -> Tensor:
        total = (sigma**2 + self.sigma_data**2).sqrt()
        inner: Tensor = self.network(_with_plane(x / total, sigma.log() / 4))
        return (self.sigma_data / total) ** 2 * self._image(x) + sigma * self.sigma_data / total * inner


def _padded(x: Tensor, multiple: int) -> Tensor:
    below, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    return functional.pad(x, (0, right, 0, below), mode="reflect") if below or right else x


def _with_plane(x: Tensor, value: Tensor) -> Tensor:
    return torch.cat([x, value.expand(x.shape[0], 1, *x.shape[-2:])], 1)


def score(denoise: DenoiseFunction, x: Tensor, sigma: Tensor) -> Tensor:
    """grad log p(x; sigma) = (D(x; sigma) - x) / sigma^2, shape of x. Shapes as `Denoiser.forward`."""
    return (denoise(x, sigma) - x) / sigma.reshape(-1, 1, 1, 1) ** 2


def energy(denoise: DenoiseFunction, x: Tensor, sigma: Tensor) -> Tensor:
    """E(x; sigma) = |x - D(x; sigma)|^2 / (2 sigma^2), shape (N,): the prior of a denoising autoencoder (Bigdeli 2017)."""
    return (x - denoise(x, sigma)).square().flatten(1).sum(1) / (2 * sigma**2)


def energy_gradient(denoise: DenoiseFunction, x: Tensor, sigma: Tensor) -> Tensor:
    """Gradient of `energy`, shape of x: (1 - J)^T (x - D) / sigma^2, with the Jacobian J of D by one backward pass."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(denoise, x, sigma).sum(), x)
    return gradient
