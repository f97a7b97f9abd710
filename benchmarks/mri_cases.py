"""What `mri_quality.py` compares on: real data with published masks, and the plain reconstructions of it."""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from bart import Bart
from scanside.engine.baselines.combine import root_sum_of_squares, zero_filled
from scanside.engine.baselines.compressed_sensing import total_variation
from scanside.engine.baselines.l1 import l1_espirit
from scanside.engine.baselines.sake import sake
from scanside.engine.baselines.sense import cg_sense
from scanside.engine.operators import CartesianSense, Fourier
from scanside.engine.preparation.coil_maps import espirit
from torch import Tensor

__all__ = ["MASKS", "Case", "Method", "plain_methods", "scans", "zero_filled_method"]

MASKS = {
    "single": ("hggdp_radial_015", "hggdp_random_015", "hggdp_cart_085", "hggdp_radial_025", "poisson_10"),
    "multi": ("poisson_6", "poisson_10", "random2D_4", "random2D_6"),
}
CALIBRATION = 20
"""Points per axis of the fully sampled center that coil maps are estimated from; every mask for several coils has them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One undersampled scan.

    data: (coil, 1, y, x) centered k-space, 0 where not measured. maps: estimated from these data; ones for one coil.
    reference: magnitude of the full scan, root of the sum of squares, maximum 1.
    """

    kind: str
    mask_name: str
    data: Tensor
    mask: Tensor
    maps: Tensor
    reference: np.ndarray

    @property
    def net(self) -> float:
        """Samples of the full scan over those measured."""
        return self.mask.numel() / int(self.mask.sum())

    @property
    def operator(self) -> CartesianSense:
        """From the image to the data."""
        return CartesianSense(self.maps, self.mask)


@dataclasses.dataclass(frozen=True)
class Method:
    """A reconstruction: from a case to an image (1, y, x), with what it costs."""

    name: str
    group: str
    """Rows of one group differ by a parameter; the table shows the best."""
    run: Callable[[Case], tuple[Tensor, int]]
    """Image and network evaluations."""

    def __call__(self, case: Case) -> tuple[np.ndarray, int, float]:
        """Magnitude (y, x), network evaluations and seconds of processor time, those of child processes included."""
        start = _processor_seconds()
        image, evaluations = self.run(case)
        return image[0].abs().numpy(), evaluations, _processor_seconds() - start


def _processor_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def scans(kind: str, data: Path, mask_name: str, count: int) -> Iterator[Case]:
    """The cases of a kind, `single` (12 brains, one coil) or `multi` (one brain, 4 coils), for one mask."""
    mask = torch.from_numpy(np.load(data / "mri" / "masks.npz")[mask_name])
    if kind == "multi":
        yield _case(kind, mask_name, mask, np.load(data / "mri" / "4h_GE_4coil_images.npz")["coil_images"])
        return
    for image in np.load(data / "mri" / "siat_dev.npz")["image"][:count]:
        yield _case(kind, mask_name, mask, image[None])


def _case(kind: str, mask_name: str, mask: Tensor, images: np.ndarray) -> Case:
    coils = torch.from_numpy(images)[:, None]
    reference = root_sum_of_squares(coils)[0]
    coils = coils / reference.max()
    data = Fourier(coils.shape)(coils) * mask
    if kind == "multi":
        middle = slice(128 - CALIBRATION // 2, 128 + CALIBRATION // 2)
        maps = espirit(data[..., middle, middle].contiguous(), (1, 256, 256), crop=0.0, calibration_size=CALIBRATION)
    else:
        maps = torch.ones_like(data)
    return Case(kind, mask_name, data, mask, maps, (reference / reference.max()).numpy())


def zero_filled_method() -> Method:
    """Where all begin."""
    return Method("zero-filled", "zero-filled", _plain(lambda case: zero_filled(case.data)))


def plain_methods(kind: str, bart: Bart | None) -> list[Method]:
    """Reconstructions that do something without a learned prior, for one coil or several; BART's where it is there."""
    methods: list[Method] = []
    several = kind == "multi"
    sparse, weights = ("L1-ESPIRiT", (0.0003, 0.001, 0.003)) if several else ("L1-wavelet", (0.003, 0.01, 0.03))
    if several:
        methods += [_cg(r) for r in (0.003, 0.01, 0.03)]
        methods += [_sake(rank) for rank in (40, 54, 70)]
        methods += [_bart(bart, "CG-SENSE", f"-l2 -r{r} -i30", f"r {r}") for r in (0.003, 0.01, 0.03) if bart]
    methods += [_wavelet(sparse, weight) for weight in weights]
    methods += [_variation(weight) for weight in weights]
    if bart:
        methods += [_bart(bart, sparse, f"-R W:7:0:{w} -i100", f"{w}") for w in weights]
        methods += [_bart(bart, "TV", f"-m -u0.01 -i100 -R T:7:0:{w}", f"{w}") for w in weights]
    return methods


def _plain(run: Callable[[Case], Tensor]) -> Callable[[Case], tuple[Tensor, int]]:
    return lambda case: (run(case), 0)


def _cg(weight: float) -> Method:
    return Method(
        f"CG-SENSE r {weight}",
        "CG-SENSE",
        _plain(lambda case: cg_sense(case.operator, case.data, iterations=30, regularization=weight)),
    )


def _sake(rank: int) -> Method:
    return Method(
        f"SAKE 6 x 6, rank {rank}",
        "SAKE",
        _plain(lambda case: root_sum_of_squares(sake(case.data, case.mask, rank=rank, iterations=60))),
    )


def _wavelet(name: str, weight: float) -> Method:
    def run(case: Case) -> Tensor:
        return l1_espirit(case.operator, case.data, weight=weight, iterations=100, end_on_data=True)

    return Method(f"{name} {weight}", name, _plain(run))


def _variation(weight: float) -> Method:
    def run(case: Case) -> Tensor:
        return total_variation(case.operator, case.data, weight=weight, iterations=40, inner_iterations=8)

    return Method(f"TV {weight}", "TV", _plain(run))


def _bart(bart: Bart, name: str, options: str, parameter: str) -> Method:
    def run(case: Case) -> Tensor:
        bart.write("measured", case.data.numpy())
        bart.write("maps", case.maps.numpy())
        bart(f"pics -S {options} measured maps image")
        return torch.from_numpy(bart.read("image")[0].copy())

    return Method(f"BART {name} {parameter}", f"BART {name}", _plain(run))
