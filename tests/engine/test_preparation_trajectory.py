"""Trajectories: geometry of the standard ones, and the unit and meaning of what scanners send."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.errors import StreamError
from scanside.engine.messages import EncodingSpace
from scanside.engine.preparation.trajectory import normalize_trajectory, radial_trajectory, spiral_trajectory


def space(nz: int = 1, dimensions: int | None = None) -> EncodingSpace:
    matrix, fov = (64, 48, nz), (320.0, 240.0, 5.0 * nz)
    return EncodingSpace(
        encoded_matrix=matrix,
        encoded_fov_mm=fov,
        recon_matrix=matrix,
        recon_fov_mm=fov,
        trajectory="radial",
        trajectory_dimensions=dimensions,
    )


@pytest.mark.parametrize(("angles", "degrees"), [("uniform", 18.0), ("golden", 111.2461), ("tiny_golden", 23.6281)])
def test_spokes_turn_by_the_angle(angles, degrees):
    points = radial_trajectory(10, 32, angles=angles)
    edge = points[:, 0]
    turned = torch.atan2(edge[1, 1], edge[1, 0]) - torch.atan2(edge[0, 1], edge[0, 0])
    difference = (math.degrees(turned) - degrees) % 360
    assert min(difference, 360 - difference) < 1e-3


@settings(deadline=None)
@given(samples=st.integers(2, 64), spokes=st.integers(1, 9), oversampling=st.sampled_from([1, 2]))
def test_spokes_pass_the_center_and_stay_inside(samples, spokes, oversampling):
    points = radial_trajectory(spokes, samples * oversampling, matrix=samples)
    radius = points.norm(dim=-1)
    assert radius[:, (samples * oversampling) // 2].abs().max() == 0
    assert radius.max() <= samples / 2 + 1e-12
    torch.testing.assert_close(radius[:, 1:].diff().abs(), torch.full_like(radius[:, 2:], 1 / oversampling))


def test_a_stream_of_spokes_goes_on():
    torch.testing.assert_close(radial_trajectory(4, 16, first=3), radial_trajectory(7, 16)[3:])


def test_spiral_arms_are_nyquist_apart():
    points = spiral_trajectory(4, 4000, 64)
    radius = points.norm(dim=-1)
    angle = torch.atan2(points[0, :, 1], points[0, :, 0])
    crossings = radius[0, 1:][(angle[:-1] < 0) & (angle[1:] >= 0)]
    assert crossings.diff().numpy() == pytest.approx(4.0, abs=0.2)
    assert radius.max() < 32


@pytest.mark.parametrize("nz", [1, 40])
@pytest.mark.parametrize("units", ["unit", "cycles", "per_meter"])
def test_unit_is_recognized(units, nz):
    cycles = torch.stack(
        torch.meshgrid([torch.linspace(-n / 2, n / 2, 9) for n in (64, 48, nz)[: 2 + (nz > 1)]], indexing="ij"), -1
    )
    scale = {"unit": [1 / 64, 1 / 48, 1 / nz], "cycles": [1.0] * 3, "per_meter": [1 / 0.32, 1 / 0.24, 1 / (0.005 * nz)]}
    found = normalize_trajectory(cycles * torch.tensor(scale[units])[: cycles.shape[-1]], space(nz))
    assert found.units == units
    assert found.density is None
    torch.testing.assert_close(found.points, cycles)


def test_a_declared_unit_is_believed():
    small = torch.full((1, 4, 2), 0.25)
    assert normalize_trajectory(small, space(), units="cycles").points.max() == 0.25


def test_third_dimension_of_a_flat_scan_is_density():
    points = torch.rand(3, 16, 3) * 0.5
    found = normalize_trajectory(points, space())
    assert found.points.shape == (3, 16, 2)
    torch.testing.assert_close(found.density, points[..., 2])


def test_third_dimension_is_a_position_where_the_header_or_the_setting_says_so():
    points = torch.rand(3, 16, 3) * 0.5
    for found in (
        normalize_trajectory(points, space(dimensions=3)),
        normalize_trajectory(points, space(40)),
        normalize_trajectory(points, space(), density=False),
    ):
        assert found.points.shape == (3, 16, 3)
        assert found.density is None
    assert normalize_trajectory(points, space(40), density=True).density is not None


def test_third_dimension_of_zeros_is_left_out():
    points = torch.rand(3, 16, 3) * 0.5
    points[..., 2] = 0
    found = normalize_trajectory(points, space(dimensions=3))
    assert found.points.shape == (3, 16, 2)
    assert found.density is None


@pytest.mark.parametrize(
    ("received", "message"),
    [
        (torch.full((1, 4, 2), float("nan")), "NaN"),
        (torch.ones(1, 4, 1), "1 dimensions"),
        (torch.full((1, 4, 2), 1000.0), "reaches 1000"),
        (torch.tensor([[[0.1, 0.2, -1.0]]]), "negative"),
    ],
)
def test_what_cannot_be_understood_is_refused(received, message):
    with pytest.raises(StreamError, match=message):
        normalize_trajectory(received, space())
