"""Sums over groups of elements that see a square alike, against the same sums in double precision, element by element."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scanside.kernels import native
from scanside.kernels import photoacoustic as kernel
from scanside.kernels.photoacoustic_turned import SIDES, Turned

pytestmark = pytest.mark.usefixtures("level")
SINGLE = 2e-6
ADJOINT = 1e-6


def ring(elements, *, first=0.0, radius=150.0, spacing=None, seed=0):
    """A table of elements with weights of their own, one of them dead; angles in units of their spacing."""
    angles = (torch.arange(elements, dtype=torch.float64) + first) * (spacing or 2 * math.pi / elements)
    table = torch.zeros(elements, kernel.COLUMNS, dtype=torch.float64)
    table[:, 0], table[:, 1] = radius * angles.cos(), radius * angles.sin()
    table[:, 3:5] = -table[:, :2] / radius
    table[:, 6] = torch.rand(elements, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    table[elements // 3, 6] = 0
    return table


def axis(points, step=1.3):
    return (torch.arange(points, dtype=torch.float64) - (points - 1) / 2) * step


def plane(where=0.0):
    return torch.tensor([where], dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    assert a.shape == b.shape
    assert float((a.double() - b).abs().max()) <= SINGLE * max(float(b.abs().max()), 1.0)


@pytest.mark.parametrize("first", [0.0, 0.5])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    eighths=st.integers(1, 6),
    points=st.integers(1, 90),
    samples=st.integers(1, 200),
    delay=st.floats(-60, 260),
    height=st.floats(-20, 20),
    seed=st.integers(0, 2**31),
)
def test_both_directions_are_the_plain_sums(level, first, eighths, points, samples, delay, height, seed):
    elements, x, z = ring(SIDES * eighths, first=first, seed=seed), axis(points), plane(height)
    turned = Turned.of(elements, x, x, z)
    assert turned is not None
    signals, image = random(len(elements), samples, seed=seed), random(points, points, seed=seed + 1)
    gathered, scattered = turned.gather(signals, delay), turned.scatter(image, samples, delay)
    close(gathered, kernel.gather(signals.double(), elements, x, x, z, delay)[0])
    close(scattered, kernel.scatter(image[None].double(), elements, x, x, z, samples, delay))
    apart = abs(float((gathered.double() * image).sum() - (scattered.double() * signals).sum()))
    assert apart <= ADJOINT * float(gathered.double().norm() * image.double().norm()) + 1e-6


@pytest.mark.parametrize("kept", [slice(0, None, 2), slice(1, None, 2), slice(None, 70), slice(3, 90)])
def test_a_part_of_a_ring_has_empty_places(level, kept):
    elements, x, z = ring(96)[kept], axis(40), plane()
    turned = Turned.of(elements, x, x, z)
    assert turned is not None
    signals, image = random(len(elements), 180), random(40, 40, seed=1)
    close(turned.gather(signals, 60.25), kernel.gather(signals.double(), elements, x, x, z, 60.25)[0])
    scattered = kernel.scatter(image[None].double(), elements, x, x, z, 180, 60.25)
    close(turned.scatter(image, 180, 60.25), scattered)


def test_elements_that_gain_nothing_are_left_to_the_plain_sums(level):
    x, z = axis(16), plane()
    around = ring(64)
    assert Turned.of(around, x, x, z) is not None
    assert Turned.of(ring(64, first=0.3, spacing=0.09), x, x, z) is None, "no symmetry"
    assert Turned.of(around[:9], x, x, z) is None, "an arc of an eighth"
    assert Turned.of(around + torch.eye(7)[0], x, x, z) is None, "a ring beside the middle of the grid"
    assert Turned.of(around, x, axis(17), z) is None, "no square"
    assert Turned.of(around, x, axis(16, 1.4), z) is None, "pixels that are no squares"
    assert Turned.of(around, x + 1, x + 1, z) is None, "a grid beside the origin"
    assert Turned.of(around, x, x, torch.cat([z, z + 1])) is None, "a volume"
    bent = around.clone()
    bent[5, 2] = 0.01
    assert Turned.of(bent, x, x, z) is None, "an element out of the plane"


def test_a_ring_that_was_measured_with_small_errors_still_counts_as_one(level):
    """Up to what linear interpolation hides; an element further off is not taken for its neighbour's image."""
    x, z, moved = axis(16), plane(), ring(64)
    moved[7, 0] += 0.05
    turned = Turned.of(moved, x, x, z)
    assert turned is not None
    signals = random(64, 200)
    close(turned.gather(signals, 50.0), kernel.gather(signals.double(), moved, x, x, z, 50.0)[0])


def test_without_compiled_kernels_there_is_none(monkeypatch):
    monkeypatch.setenv(native.VARIABLE, "torch")
    native.library.cache_clear()
    assert Turned.of(ring(64), axis(16), axis(16), plane()) is None
