"""Published systems as configured: they run in a session's solver, repeat themselves, and improve on where they start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scanside.engine.config import ConfigStore, with_overrides
from scanside.engine.evaluation import psnr
from scanside.engine.operators import Fourier
from scanside.engine.samplers.consistency import Measurement
from scanside.engine.simulation.coils import coil_maps
from scanside.engine.simulation.phantom import shepp_logan
from scanside.engine.streaming.generative import PriorSolver

SYSTEMS = ("mri/ebmrec", "mri/edaeprec", "mri/edmsprec", "mri/hggdp", "mri/ugm_pi", "mri/wdaeprec")


def reconstructed(config, data, mask):
    """Magnitude (y, x) and network evaluations, from k-space (coil, 1, y, x)."""
    solver = PriorSolver(config, (1, *mask.shape), len(data))
    start = Fourier(data.shape).H(data)
    *_, last = solver.solve(Measurement(data=data, mask=mask), start)
    return last.image[0].abs().numpy(), last.evaluations


def undersampled(images, mask):
    return Fourier(images.shape)(images) * mask


@pytest.fixture(scope="module")
def small():
    """Two coils of a phantom and a mask."""
    maps = torch.from_numpy(coil_maps(2).image((48, 48)))
    images = (maps * torch.from_numpy(shepp_logan().image((48, 48))))[:, None].to(torch.complex64)
    mask = torch.rand(48, 48, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[18:30, 18:30] = True
    return undersampled(images, mask), mask


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_keeps_the_data_and_repeats_itself(name, small):
    config = ConfigStore().get(name)
    config = with_overrides(config, {"sampler.levels": 2}, source="test")
    data, mask = small
    image, evaluations = reconstructed(config, data, mask)
    assert evaluations >= 2
    assert np.array_equal(image, reconstructed(config, data, mask)[0])
    brighter = reconstructed(config, 1e3 * data, mask)[0]
    assert np.allclose(brighter, 1e3 * image, rtol=1e-3, atol=1e-3 * brighter.max())


@pytest.mark.real_data
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_improves_on_the_zero_filled_image(name, real_data):
    """A subject that nothing was trained on, the radial mask of HGGDP, by the last iteration."""
    truth = torch.from_numpy(np.load(real_data("mri/siat_dev.npz"))["image"][:1])[:, None]
    mask = torch.from_numpy(np.load(real_data("mri/masks.npz"))["hggdp_radial_015"])
    data = undersampled(truth, mask)
    reference = truth[0, 0].abs().numpy()
    image, _ = reconstructed(ConfigStore().get(name), data, mask)
    assert psnr(reference, image) > psnr(reference, Fourier(data.shape).H(data)[0, 0].abs().numpy()) + 1
