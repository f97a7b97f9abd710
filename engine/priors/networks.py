"""The house network: a residual U-Net without biases or normalization, told the noise level by a constant plane.

Everything in it is linear or a ReLU, so that the whole is homogeneous, f(a x, a sigma) = a f(x, sigma) for a > 0: an image
twice as bright with twice the noise comes out twice as bright. Most parameters lie behind a PixelUnshuffle, where they are
cheap. Widths, blocks and shuffle set the size: from 1 M parameters and 6.5 GFLOP at 256 x 256 (the default) to those of
RefineNet or NCSN++.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from ..config_priors import NetworkConfig

__all__ = ["UNet", "count_parameters"]


class _Block(nn.Module):
    """x + W2 relu(W1 x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.second(torch.relu(self.first(x)))
        return x + inner


def _blocks(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(_Block(width) for _ in range(count)))


class UNet(nn.Module):
    """(N, C + K + 1, H, W) -> (N, C, H, W): the image, K conditions and a plane of the noise level, to what it was trained for.

    H and W are multiples of `config.multiple`. The last layer starts at zero, so that a new network gives zeros.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        widths, area = config.widths, config.shuffle**2
        self.head = nn.Conv2d((config.channels + config.conditions + 1) * area, widths[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList(_blocks(w, config.blocks) for w in widths[:-1])
        self.reduce = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2, bias=False) for a, b in pairwise(widths))
        self.body = _blocks(widths[-1], config.blocks)
        self.expand = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2, bias=False) for a, b in pairwise(widths))
        self.up = nn.ModuleList(_blocks(w, config.blocks) for w in widths[:-1])
        self.tail = nn.Conv2d(widths[0], config.channels * area, 3, padding=1, bias=False)
        self.unshuffle, self.shuffle = nn.PixelUnshuffle(config.shuffle), nn.PixelShuffle(config.shuffle)
        self._start()

    def _start(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if isinstance(module, _Block):
                nn.init.kaiming_normal_(module.first.weight)
        for module in self.modules():  # without normalization, the branches start small
            if isinstance(module, _Block):
                with torch.no_grad():
                    module.second.weight.mul_(0.3)
        nn.init.zeros_(self.tail.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as the class says."""
        x = self.head(self.unshuffle(x))
        kept = []
        for blocks, reduce in zip(self.down, self.reduce, strict=True):
            x = blocks(x)
            kept.append(x)
            x = reduce(x)
        x = self.body(x)
        for blocks, expand, skip in zip(reversed(self.up), reversed(self.expand), reversed(kept), strict=True):
            x = blocks(expand(x) + skip)
        out: Tensor = self.shuffle(self.tail(x))
        return out


def count_parameters(network: nn.Module) -> int:
    """Number of trained values."""
    return sum(p.numel() for p in network.parameters())
