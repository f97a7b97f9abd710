"""Sums over evenly spaced points, whose times of flight are interpolated where elements are not close, in double precision."""

from __future__ import annotations

import ctypes
import math
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scanside.kernels import photoacoustic as kernel

pytestmark = pytest.mark.usefixtures("level")
ARRIVAL = 1.3e-4
"""Samples: what interpolation may take, and rounding of an image of up to some hundred samples."""
WEIGHT = 1.2e-4
"""As a part of the largest weight of an element."""
SINGLE = 2e-6
ADJOINT = 1e-6
WEIGHTED = (kernel.PLANE, kernel.SPACE)
quiet = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
geometries = {
    "shape": st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(1, 70)),
    "step": st.tuples(st.floats(-4, 4), st.floats(0.05, 6)),
    "away": st.floats(0, 40) | st.floats(40, 400),
    "seed": st.integers(0, 2**31),
}


def geometry(shape, step, away, seed, elements=1):
    """Elements in all directions of an even grid which is not at the origin; away: of its middle, in steps."""
    generator = torch.Generator().manual_seed(seed)
    normals = torch.nn.functional.normalize(torch.randn(elements, 3, generator=generator, dtype=torch.float64))
    normals[: elements // 2, 2] *= 0.1
    normals = torch.nn.functional.normalize(normals)
    middle = torch.rand(3, generator=generator, dtype=torch.float64) * 20 - 10
    turned = torch.nn.functional.normalize(normals + 0.4 * torch.randn(elements, 3, generator=generator))
    weights = torch.rand(elements, 1, generator=generator, dtype=torch.float64) + 0.5
    steps = {"z": 1.0, "y": step[1], "x": step[0] if abs(step[0]) > 0.05 else 1.0}
    axes = [
        (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * steps[name] + middle["xyz".index(name)]
        for n, name in zip(shape, "zyx", strict=True)
    ]
    away *= max(map(abs, steps.values()))
    table = torch.cat([middle - away * normals, turned, weights], 1)
    return table, axes[2], axes[1], axes[0]


def distances(element, x, y, z):
    return (
        (x - element[0]).square() + ((y - element[1]).square()[:, None]) + (z - element[2]).square()[:, None, None]
    ).sqrt()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(**geometries, delay=st.floats(-30, 60))
@quiet
def test_a_ramp_tells_the_times_of_arrival(level, shape, step, away, seed, delay):
    table, x, y, z = geometry(shape, step, away, seed)
    table[:, 6] = 1
    expected = distances(table[0], x, y, z) - delay
    samples, middle = max(int(expected.max()), 0) + 40, round(float(expected.mean()))
    ramp = (torch.arange(samples, dtype=torch.float32) - middle)[None]
    found = kernel.gather(ramp, table, x, y, z, delay)
    inside = (expected >= 1e-3) & (expected <= samples - 1)  # before the first sample lies a zero, not the ramp
    # Point by point, what lies before a sample by less than a distance is rounded by counts as lying at it.
    allowed = ARRIVAL + 1e-6 * (expected - middle).abs() + 1.2e-7 * distances(table[0], x, y, z)
    assert bool(((found - (expected - middle)).abs() <= allowed)[inside].all())


@given(**geometries, weighting=st.sampled_from(WEIGHTED))
@quiet
def test_rows_of_ones_tell_the_weights(level, shape, step, away, seed, weighting):
    table, x, y, z = geometry(shape, step, away, seed)
    distance = distances(table[0], x, y, z)
    samples = int(distance.max()) + 40
    offset, normal = table[0, :3], table[0, 3:6]
    towards = (x - offset[0]) * normal[0] + ((y - offset[1]) * normal[1])[:, None]
    towards = towards + ((z - offset[2]) * normal[2])[:, None, None]
    power = distance ** (1 if weighting == kernel.PLANE else 2)
    expected = table[0, 6] * towards.clamp_min(0) / distance / power
    found = kernel.gather(torch.ones(1, samples), table, x, y, z, 0.0, weighting)
    inside = distance >= 0.01
    assert bool(((found - expected).abs() <= (WEIGHT * table[0, 6] / power))[inside].all())


@given(
    **geometries,
    elements=st.integers(1, 6),
    weighting=st.sampled_from((kernel.PLAIN, *WEIGHTED)),
    samples=st.integers(1, 300),
    early=st.floats(-1.2, 1.2),
)
@quiet
def test_where_rows_begin_and_end(level, shape, step, away, seed, elements, weighting, samples, early):
    """Recording starts and ends while sound arrives from within the image."""
    table, x, y, z = geometry(shape, step, away, seed, elements)
    delay = float(distances(table[0], x, y, z).mean()) + (early - 0.5) * samples
    signals, image = random(elements, samples, seed=seed), random(*shape, seed=seed + 1)
    gathered = kernel.gather(signals, table, x, y, z, delay, weighting)
    scattered = kernel.scatter(image, table, x, y, z, samples, delay, weighting)
    expected = kernel.gather(signals.double(), table, x, y, z, delay, weighting)
    back = kernel.scatter(image.double(), table, x, y, z, samples, delay, weighting)
    nearest = min(float(distances(e, x, y, z).min()) for e in table)
    assume(weighting == kernel.PLAIN or nearest > 0.01)  # closer, weights have no meaning
    tolerance = 2 * ARRIVAL + WEIGHT + SINGLE + 2.4e-7 * max(float(distances(e, x, y, z).max()) for e in table)
    largest = 1.0 if weighting == kernel.PLAIN else nearest ** (-1.0 if weighting == kernel.PLANE else -2.0)
    scale = float(table[:, 6].sum()) * float(signals.abs().max()) * largest
    assert float((gathered - expected).abs().max()) <= tolerance * scale
    scale = 1.5 * float(image.abs().sum()) * largest
    assert float((scattered - back).abs().max()) <= tolerance * scale
    gathered, scattered = gathered.double(), scattered.double()
    apart = abs(float((gathered * image).sum() - (scattered * signals).sum()))
    size = max(float(gathered.norm() * image.double().norm()), float(scattered.norm() * signals.double().norm()))
    assert apart <= ADJOINT * size + 1e-12


def between_guards(floats, *, at_end):
    """Memory that begins or ends where the process may not read, and what has to outlive it."""
    page = mmap.PAGESIZE
    whole = -(-4 * floats // page) * page
    pages = mmap.mmap(-1, whole + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for guard in (address, address + page + whole):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), page, 0) == 0
    offset = page + (whole - 4 * floats if at_end else 0)
    return torch.frombuffer(pages, dtype=torch.float32, count=floats, offset=offset), pages


def read_rows_between_guards():
    """Rows of many lengths, which sound reaches from their first to their last sample; in a process that this may end."""
    generator = torch.Generator().manual_seed(1)
    for seed in range(300):
        numbers = torch.rand(4, generator=generator).tolist()
        step, shape = 0.3 + 4 * numbers[0], (1, 40, 1 + seed % 70)
        table, x, y, z = geometry(shape, (step, step), 100 + 300 * numbers[1], seed)
        expected = distances(table[0], x, y, z)
        samples = int(expected.max() - expected.min()) + 1 + int(60 * numbers[2])
        delay = float(expected.min()) + 3 - 40 * numbers[3]
        for at_end in (False, True):
            rows, _pages = between_guards(samples + 3, at_end=at_end)
            rows.zero_()
            compact, image = kernel.Table.of(table, x, y, z), torch.zeros(shape)
            kernel.gather_into(rows[None], compact, image, delay=delay, weighting=seed % 3)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for pages that may not be read")
def test_nothing_is_read_beyond_the_rows(level):
    code = "import test_photoacoustic_tiles as tests; tests.read_rows_between_guards()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, timeout=120)


@pytest.mark.parametrize("angle", [0.0, 0.5, 1.2, 1.57, 2.5, 4.7])
def test_uneven_points_are_found_one_by_one(level, angle):
    """A grid that is even but for a point of each axis: interpolation would be wrong by as much as that is off."""
    axis = (torch.arange(40, dtype=torch.float64) - 20) * 2.5
    axis[17] += 0.4
    table = torch.tensor([[900 * math.cos(angle), 900 * math.sin(angle), 20, 0, 0, 0, 1]], dtype=torch.float64)
    expected = distances(table[0], axis, axis, axis[:1])
    ramp = (torch.arange(1200, dtype=torch.float32) - 900)[None]
    found = kernel.gather(ramp, table, axis, axis, axis[:1])
    assert float((found - (expected - 900)).abs().max()) <= 3e-5


def test_a_large_image_of_a_ring(level):
    """Elements in all directions of more tiles than one, each with arrivals of its own order."""
    angles = torch.arange(48, dtype=torch.float64) * 2 * math.pi / 48
    table = torch.zeros(48, kernel.COLUMNS, dtype=torch.float64)
    table[:, 0], table[:, 1] = 1080 * angles.cos(), 1080 * angles.sin()
    table[:, 3:5], table[:, 6] = -table[:, :2] / 1080, 1
    axis, plane = (torch.arange(150, dtype=torch.float64) - 74.5) * 2.6, torch.zeros(1, dtype=torch.float64)
    signals, image = random(48, 1500), random(1, 150, 150, seed=1)
    for weighting in (kernel.PLAIN, *WEIGHTED):
        gathered = kernel.gather(signals, table, axis, axis, plane, 3.25, weighting).double()
        expected = kernel.gather(signals.double(), table, axis, axis, plane, 3.25, weighting)
        assert float((gathered - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
        scattered = kernel.scatter(image, table, axis, axis, plane, 1500, 3.25, weighting).double()
        apart = abs(float((gathered * image).sum() - (scattered * signals).sum()))
        assert apart <= ADJOINT * float(gathered.norm() * image.double().norm())
