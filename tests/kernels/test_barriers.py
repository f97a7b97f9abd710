"""Every barrier of the CUDA sources is needed and enough: with any one taken out ThreadSanitizer sees a race, with all none."""

from __future__ import annotations

import re

import pytest
import torch
from scanside.kernels import device, fft, kspace_step, sense_device
from scanside.kernels import photoacoustic as sound

BARRIER = "__syncthreads();"


def fourier():
    x = torch.ones(3, 12, 2, dtype=torch.complex64)
    return fft.launches(x, torch.zeros_like(x), fft.roots(12), 1, -1)


def fourier_back():
    x = torch.ones(3, 12, 2, dtype=torch.complex64)
    return fft.launches(x, torch.zeros_like(x), fft.roots(12), 1, 1)


def lines():
    maps, x = torch.ones(2, 1, 12, 3, dtype=torch.complex64), torch.ones(1, 12, 3, dtype=torch.complex64)
    kspace, weights = torch.ones(1, 2, 1, 12, 3, dtype=torch.complex64), torch.ones(12, dtype=torch.complex64)
    return [
        *sense_device.lines_solve(maps, torch.ones(12), x, torch.zeros_like(x), -2, 0.1, 2),
        *sense_device.lines_forward(maps, weights, x[None], kspace, -2),
        *sense_device.lines_adjoint(maps, weights, kspace, x[None], -2),
        *kspace_step.launches(kspace, torch.ones(1, 12, 1), kspace[0], torch.zeros_like(kspace), (-2,), 0.5),
    ]


def planes():
    maps, x = torch.ones(2, 1, 12, 12, dtype=torch.complex64), torch.ones(1, 12, 12, dtype=torch.complex64)
    kspace = torch.zeros(1, 2, 12, 12, dtype=torch.complex64)
    weights, outside = torch.ones(1, 12, 12, dtype=torch.complex64), torch.ones(2, 1, 12, 12, dtype=torch.complex64)
    return [
        *sense_device.planes_gram(maps, torch.ones(1, 12, 12), x, kspace, torch.zeros_like(x)),
        *sense_device.planes_forward(maps, weights, x, kspace, outside),
        *sense_device.planes_adjoint(maps, weights, outside, kspace, x),
        kspace_step.launches(outside, torch.ones(1, 12, 12), outside, torch.zeros_like(outside), (-2, -1), 0.5)[1],
    ]


def photoacoustic():
    table, axis = torch.zeros(3, sound.COLUMNS, dtype=torch.float64), torch.arange(4, dtype=torch.float64)
    table[:, 2], table[:, 6] = torch.arange(-8, -5), 1
    compact = sound.Table.of(table, axis, axis, axis[:2])
    rows, image = sound.prepared(1, 20), torch.ones(1, 2, 4, 4)
    sound.prepare(torch.ones(1, 3, 20), compact, rows)
    gather = sound.gather_launches(rows, compact, image, delay=0.0, weighting=sound.PLAIN)
    return [*gather, *sound.scatter_launches(image, compact, torch.zeros(1, 3, 20), delay=0.0, weighting=sound.PLAIN)]


PROBLEMS = {
    "fft.h": fourier,
    "fft.cu": fourier_back,
    "sense_lines.cu": lines,
    "sense_planes.cu": planes,
    "photoacoustic.cu": photoacoustic,
}


def text(name: str) -> str:
    return (device.sources() / "cuda" / name).read_text("utf-8")


def barriers() -> list[tuple[str, int]]:
    names = sorted(path.name for path in (device.sources() / "cuda").iterdir())
    return [(name, at.start()) for name in names for at in re.finditer(re.escape(BARRIER), text(name))]


def test_every_source_with_barriers_has_a_problem() -> None:
    assert {name for name, _ in barriers()} == set(PROBLEMS)


@pytest.mark.parametrize("name", PROBLEMS)
def test_with_all_barriers_there_is_no_race(name: str, emulate) -> None:
    assert not emulate(*PROBLEMS[name](), sanitize=True)


@pytest.mark.parametrize(("name", "place"), barriers())
def test_without_one_barrier_there_is(name: str, place: int, emulate) -> None:
    whole = text(name)
    lacking = whole[:place] + whole[place + len(BARRIER) :]
    assert emulate(*PROBLEMS[name](), instead={name: lacking}, sanitize=True)
