"""Computed tomography: rays and images against what is known of discs, against a published sinogram, and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.baselines.tomography import filtered_back_projection, sirt
from scanside.engine.operators.linear import adjoint_mismatch
from scanside.engine.operators.tomography import BeamGeometry, RayTransform, even_angles

FAN = {"pitch": 1.0, "source": 80.0, "detector": 70.0}
BEAMS = {"fan": FAN, "parallel": {"pitch": 0.6}}


def geometry(beam, *, views=90, bins=151, shape=(64, 64), **changes):
    return BeamGeometry(shape, 0.8, even_angles(views), bins, **{**BEAMS[beam], **changes})


def disc(shape, pixel, center, radius):
    """A disc, each pixel the part of its area that is inside, by 8 x 8 points."""
    axes = [(torch.arange(8 * n, dtype=torch.float64) + 0.5) / 8 - n / 2 for n in shape]
    y, x = torch.meshgrid(*axes, indexing="ij")
    inside = ((y * pixel - center[1]) ** 2 + (x * pixel - center[0]) ** 2 < radius**2).double()
    return torch.nn.functional.avg_pool2d(inside[None], 8)[0]


def chords(scan, center, radius):
    """Line integrals of a disc, from the angle and the place of each ray."""
    u = (np.arange(scan.bins) - (scan.bins - 1) / 2) * scan.pitch + scan.offset
    result = []
    for angle in scan.angles.numpy():
        axis, ahead = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        if scan.parallel:
            start, way = u[:, None] * axis, np.broadcast_to(ahead, (len(u), 2))
        else:
            start = np.broadcast_to(-scan.source * ahead, (len(u), 2))
            way = (scan.source + scan.detector) * ahead + u[:, None] * axis
            way = way / np.linalg.norm(way, axis=1, keepdims=True)
        apart = np.array(center) - start
        distance = apart[:, 0] * way[:, 1] - apart[:, 1] * way[:, 0]
        result.append(2 * np.sqrt(np.maximum(radius**2 - distance**2, 0)))
    return torch.from_numpy(np.array(result))


@pytest.mark.parametrize("beam", BEAMS)
@pytest.mark.parametrize("offset", [0.0, 1.7])
def test_chords_of_a_disc(beam, offset):
    scan = geometry(beam, offset=offset)
    projected = RayTransform(scan)(disc((64, 64), 0.8, (5.0, -8.0), 9.0))
    expected = chords(scan, (5.0, -8.0), 9.0)
    assert float((projected - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("beam", BEAMS)
def test_back_projection_of_chords_is_the_disc(beam):
    scan = geometry(beam, views=180)
    image = filtered_back_projection(chords(scan, (5.0, -8.0), 9.0), scan)
    truth = disc((64, 64), 0.8, (5.0, -8.0), 9.0)
    core = torch.nn.functional.avg_pool2d(truth[None], 5, 1, 2)[0]
    assert abs(float(image[core > 0.999].mean()) - 1) < 0.01
    assert abs(float(image[core < 0.001].mean())) < 0.01
    assert float((image - truth).norm() / truth.norm()) < 0.15
    soft = filtered_back_projection(chords(scan, (5.0, -8.0), 9.0), scan, window="hann")
    assert abs(float(soft[core > 0.999].mean()) - 1) < 0.01
    assert float(soft[core < 0.001].std()) < float(image[core < 0.001].std())


@pytest.mark.parametrize("beam", BEAMS)
def test_sirt_fits_the_data(beam):
    scan = geometry(beam, views=40)
    truth = disc((64, 64), 0.8, (5.0, -8.0), 9.0).float()
    data = RayTransform(scan)(truth)
    found = sirt(data, scan, iterations=60)
    assert float((RayTransform(scan)(found) - data).norm() / data.norm()) < 0.02
    assert float(found.min()) >= 0
    assert float((found - truth).norm() / truth.norm()) < 0.25


@given(
    beam=st.sampled_from(sorted(BEAMS)),
    views=st.integers(3, 12),
    bins=st.integers(10, 50),
    shape=st.tuples(st.integers(10, 40), st.integers(10, 40)),
    offset=st.floats(-3, 3),
)
@settings(max_examples=25)
def test_the_adjoint_is_exact(beam, views, bins, shape, offset):
    operator = RayTransform(geometry(beam, views=views, bins=bins, shape=shape, offset=offset))
    assert adjoint_mismatch(operator, dtype=torch.float32) <= 1e-6
    assert adjoint_mismatch(operator, dtype=torch.float64, batch=(2,)) <= 1e-14


def test_a_part_of_the_views():
    scan = geometry("fan")
    image = torch.rand(64, 64)
    assert torch.equal(RayTransform(scan.part(slice(None, None, 6)))(image), RayTransform(scan)(image)[::6])


def test_bad_geometry_is_named():
    with pytest.raises(ValueError, match="source is 30"):
        geometry("fan", source=30.0)
    with pytest.raises(ValueError, match="pitch is 0"):
        geometry("fan", pitch=0.0)
    with pytest.raises(ValueError, match="detector nan"):
        geometry("fan", detector=math.nan)
    with pytest.raises(ValueError, match=r"angles has shape \(0,\)"):
        geometry("fan", views=90).part(slice(0, 0))
    with pytest.raises(ValueError, match="bins is 0"):
        geometry("fan", bins=0)
    with pytest.raises(ValueError, match=r"sinogram has shape \(90, 150\), its last axes must be \(90, 151\)"):
        filtered_back_projection(torch.zeros(90, 150), geometry("fan"))
    with pytest.raises(ValueError, match="window is 'cosine'"):
        filtered_back_projection(torch.zeros(90, 151), geometry("fan"), window="cosine")
    with pytest.raises(ValueError, match="iterations is 0"):
        sirt(torch.zeros(90, 151), geometry("fan"), iterations=0)


@pytest.mark.real_data
def test_a_published_sinogram(real_data):
    """Its images are (x, y), so that they are turned here."""
    sinogram = torch.from_numpy(np.load(real_data("ct/osdm_ideal_sinogram.npz"))["data"])
    truth = torch.from_numpy(np.load(real_data("ct/slices_dev.npz"))["AAPM_0462"]).mT
    scan = BeamGeometry((512, 512), 0.5, even_angles(720), 720, 1.0, 500.0, 500.0)
    projected = RayTransform(scan)(truth.contiguous()).double()
    assert float((projected - sinogram).norm() / sinogram.double().norm()) <= 1e-5
    image = filtered_back_projection(sinogram, scan)
    assert -10 * math.log10(float(((image - truth) ** 2).mean())) >= 44.6
