"""Published systems as configured: they run in a session's solver, repeat themselves, and improve on where they start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scanside.engine.config import ConfigStore, with_overrides
from scanside.engine.errors import ConfigError
from scanside.engine.evaluation import psnr
from scanside.engine.operators import Fourier
from scanside.engine.samplers.consistency import Measurement
from scanside.engine.simulation.coils import coil_maps
from scanside.engine.simulation.phantom import shepp_logan
from scanside.engine.streaming.generative import PriorSolver

IMAGE_SYSTEMS = ("mri/ebmrec", "mri/edaeprec", "mri/edmsprec", "mri/hggdp", "mri/ugm_pi", "mri/wdaeprec")
KSPACE_SYSTEMS = (
    *("mri/wkgm", "mri/svd_wkgm", "mri/hkgm", "mri/gm_sde", "mri/cm_dm", "mri/sub_dm"),
    *(f"mri/dp_mdm_{models}" for models in (1, 2, 3, 4)),
)
SYSTEMS = IMAGE_SYSTEMS + KSPACE_SYSTEMS


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
@pytest.mark.parametrize("name", IMAGE_SYSTEMS)
def test_a_system_improves_on_the_zero_filled_image(name, real_data):
    """A subject that nothing was trained on, the radial mask of HGGDP, by the last iteration."""
    truth = torch.from_numpy(np.load(real_data("mri/siat_dev.npz"))["image"][:1])[:, None]
    mask = torch.from_numpy(np.load(real_data("mri/masks.npz"))["hggdp_radial_015"])
    data = undersampled(truth, mask)
    reference = truth[0, 0].abs().numpy()
    image, _ = reconstructed(ConfigStore().get(name), data, mask)
    assert psnr(reference, image) > psnr(reference, Fourier(data.shape).H(data)[0, 0].abs().numpy()) + 1


def test_coil_maps_are_used_by_those_that_have_them(small):
    """KI-EBM and DDS work on the combined image."""
    data, mask = small
    maps = torch.from_numpy(coil_maps(2).image((48, 48)))[:, None].to(torch.complex64)
    maps = maps / maps.abs().square().sum(0).sqrt()
    measured = Measurement(data=data, mask=mask, maps=maps)
    for name in ("mri/ki_ebm", "mri/dds"):
        config = with_overrides(ConfigStore().get(name), {"sampler.levels": 3}, source="test")
        solver = PriorSolver(config, (1, 48, 48), 2)
        start = (maps.conj() * Fourier(data.shape).H(data)).sum(0)
        *_, last = solver.solve(measured, start)
        assert torch.isfinite(last.image.abs()).all()
        assert last.residual < 0.2


@pytest.fixture(scope="module")
def brain(real_data):
    """Four coils of a brain of another scanner, k-space and mask (Poisson disc, net R 6), and the magnitude of all of it."""
    images = torch.from_numpy(np.load(real_data("mri/4h_GE_4coil_images.npz"))["coil_images"])[:, None]
    reference = images.abs().square().sum(0).sqrt()[0]
    mask = torch.from_numpy(np.load(real_data("mri/masks.npz"))["poisson_6"])
    return undersampled(images / reference.max(), mask), mask, (reference / reference.max()).numpy()


def gain(name, brain):
    """dB over the zero-filled image."""
    data, mask, reference = brain
    zero_filled = Fourier(data.shape).H(data).abs().square().sum(0).sqrt()[0].numpy()
    return psnr(reference, reconstructed(ConfigStore().get(name), data, mask)[0]) - psnr(reference, zero_filled)


@pytest.mark.real_data
def test_low_rank_over_the_coils_adds_to_weighted_kspace(brain):
    """SVD-WKGM above WKGM, and both above the zero-filled image."""
    alone, ranked = gain("mri/wkgm", brain), gain("mri/svd_wkgm", brain)
    assert alone > 1.5
    assert ranked > alone + 1.5


@pytest.mark.real_data
def test_a_second_and_third_model_add_to_the_first(brain):
    assert gain("mri/dp_mdm_3", brain) > gain("mri/dp_mdm_1", brain) + 0.3


def test_frames_are_reconstructed_together():
    """DD-UGM: what one frame lacks others have, so a frame that stands still is nearer to the truth after more of them."""
    truth = torch.from_numpy(shepp_logan().image((64, 64)))[None, None].to(torch.complex64)
    config = ConfigStore().get("mri/dd_ugm")
    solver = PriorSolver(config, (1, 64, 64), 1)
    found = []
    for frame in range(6):
        mask = torch.rand(64, 64, generator=torch.Generator().manual_seed(frame)) < 0.25
        mask[26:38, 26:38] = True
        data = undersampled(truth, mask)
        *_, last = solver.solve(Measurement(data=data, mask=mask), Fourier(data.shape).H(data))
        found.append(psnr(truth[0, 0].abs().numpy(), last.image[0].abs().numpy()))
    assert found[-1] > found[0] + 1


def test_frames_together_need_images_of_coils():
    config = with_overrides(ConfigStore().get("mri/online"), {"reconstruction.frames": 4}, source="test")
    with pytest.raises(ConfigError, match=r"reconstruction\.frames = 4"):
        PriorSolver(config, (1, 32, 32), 2)
