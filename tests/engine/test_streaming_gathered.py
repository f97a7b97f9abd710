"""Radial, spiral and other free trajectories through a session: quality against the true image, and all that may differ."""

from __future__ import annotations

import functools
import itertools

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.baselines.radial import density_compensation, gridding
from scanside.engine.config import ConfigStore, with_overrides
from scanside.engine.evaluation import nrmse
from scanside.engine.headers import ACQUISITION_HEADER, AcquisitionFlag
from scanside.engine.messages import (
    AcquisitionBatch,
    EncodingLimit,
    EncodingSpace,
    EndOfScan,
    FrameStats,
    Image,
    Note,
    ScanHeader,
)
from scanside.engine.operators.nonuniform import NonUniformFourier
from scanside.engine.preparation.density import turned_density
from scanside.engine.preparation.trajectory import radial_trajectory, spiral_trajectory
from scanside.engine.simulation.scan import simulate_scan
from scanside.engine.streaming.session import Session

MATRIX = 64


@pytest.fixture(autouse=True)
def one_thread():
    """Small transforms on several threads wait for each other where processors are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Seen:
    """What a session gave: images as arrays (z, y, x), statistics, notes."""

    def __init__(self, events):
        self.images = [e for e in events if isinstance(e, Image)]
        self.pixels = [np.abs(e.pixels[0]) for e in self.images]
        self.stats = [e for e in events if isinstance(e, FrameStats)]
        self.notes = [e for e in events if isinstance(e, Note)]

    def method(self, index=0):
        return self.images[index].meta["scanside_method"][0]


def run(header, batches, size=None, **overrides):
    """Feed a scan to a session of the radial system; keys of overrides have __ for a dot."""
    config = with_overrides(
        ConfigStore().get("radial"), {k.replace("__", "."): v for k, v in overrides.items()}, source="test"
    )
    session, events = Session(config), []
    for message in (header, *itertools.chain.from_iterable(split(b, size) for b in batches), EndOfScan()):
        events += session.feed(message)
    return Seen(events)


def split(batch, size):
    for start in range(0, len(batch), size or len(batch)):
        part = slice(start, start + (size or len(batch)))
        trajectory = None if batch.trajectory is None else batch.trajectory[part]
        yield AcquisitionBatch(headers=batch.headers[part], samples=batch.samples[part], trajectory=trajectory)


@functools.cache
def scan_of(trajectory="radial", acceleration=1, **settings):
    settings = {"noise": 0.003, "noise_readouts": 0} | settings
    return simulate_scan(MATRIX, 6, acceleration, 16, trajectory=trajectory, **settings)


def changed(scan, batch=0, **space):
    """The scan's header with a changed encoding space, and writable copies of one batch's arrays."""
    header = msgspec.structs.replace(
        scan.header, encodings=(msgspec.structs.replace(scan.header.encodings[0], **space),)
    )
    source = scan.batches[batch]
    return header, source.headers.copy(), source.samples.copy(), source.trajectory.copy()


def batch_of(headers, samples, trajectory=None):
    headers["trajectory_dimensions"] = 0 if trajectory is None else trajectory.shape[-1]
    headers["number_of_samples"] = samples.shape[-1]
    return AcquisitionBatch(headers=headers, samples=samples, trajectory=trajectory)


def within_disc(image):
    """The image without the corners of k-space, which neither spokes nor spirals reach; float64."""
    n = image.shape[-1]
    axis = np.arange(n) - n // 2
    spectrum = np.fft.fftshift(np.fft.fft2(image.astype(np.complex128)))
    return np.abs(np.fft.ifft2(np.fft.ifftshift(spectrum * (np.hypot(axis[:, None], axis) <= n / 2))))


def error(scan, image, repetition=0):
    return nrmse(within_disc(scan.reference[repetition, 0]), image[0].astype(np.float64), fit_scale=True)


# --- quality -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trajectory", "acceleration", "gridded", "sense"),
    [("radial", 1, 0.05, 0.09), ("radial", 3, 0.3, 0.08), ("spiral", 1, 0.35, 0.085), ("spiral", 2, 0.5, 0.08)],
)
def test_sense_comes_close_to_the_truth_and_beats_gridding(trajectory, acceleration, gridded, sense):
    scan = scan_of(trajectory, acceleration, repetitions=2 if acceleration == 3 else 1)
    plain = run(scan.header, scan.batches[:1], reconstruction__method="gridding")
    solved = run(scan.header, scan.batches[:1], reconstruction__method="cg_sense")
    assert (plain.method(), solved.method()) == ("gridding", "cg_sense")
    errors = error(scan, plain.pixels[0]), error(scan, solved.pixels[0])
    assert errors[0] < gridded
    assert errors[1] < sense
    # spokes that meet the sampling theorem need no coil maps, which cut away the ringing around the head
    assert errors[1] < errors[0] or (trajectory, acceleration) == ("radial", 1)
    assert solved.stats[0].outcome == "complete"


def test_the_method_follows_from_the_sampling():
    full, less = scan_of("radial", 1), scan_of("radial", 3, repetitions=2)
    dense, sparse = (run(s.header, s.batches[:1]) for s in (full, less))
    assert (dense.method(), sparse.method()) == ("gridding", "cg_sense")
    assert dense.stats[0].acceleration < 1.1 < 1.5 < sparse.stats[0].acceleration < 3


def test_coil_maps_of_the_first_frame_serve_the_next():
    scan = scan_of("radial", 3, repetitions=2)
    seen = run(scan.header, scan.batches, size=5)
    assert [("coil_maps" in s.stages) for s in seen.stats] == [True, False]
    assert all(error(scan, pixels, r) < 0.08 for r, pixels in enumerate(seen.pixels))
    fresh = run(scan.header, scan.batches, size=5, coil_maps__refresh="frame")
    assert all("coil_maps" in s.stages for s in fresh.stats)


def test_too_little_of_the_center_gives_a_gridded_image_that_says_so():
    scan = scan_of("radial", 16)
    seen = run(scan.header, scan.batches)
    assert seen.method() == "gridding"
    assert (seen.stats[0].outcome, seen.stats[0].reason) == ("degraded", "no_calibration")


# --- density weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "limit"),
    [
        (radial_trajectory(34, 128, matrix=64), 0.12),
        (radial_trajectory(101, 128, matrix=64), 0.18),
        (radial_trajectory(40, 128, matrix=64, angles="uniform"), 0.12),
        (spiral_trajectory(8, 900, 64), 0.15),
    ],
)
def test_closed_form_weights_are_near_those_of_thirty_iterations(points, limit):
    found = turned_density(points)
    assert found is not None
    iterated = density_compensation(points, (1, 64, 64), iterations=30)
    assert float((found - iterated).norm() / iterated.norm()) < limit


def test_closed_form_weights_grid_as_well_as_iterated_ones():
    scan = scan_of("radial", 1)
    points = MATRIX * torch.from_numpy(scan.batches[0].trajectory)
    data = torch.from_numpy(scan.batches[0].samples).transpose(0, 1)[:, None]
    iterated = density_compensation(points, (1, MATRIX, MATRIX), iterations=30)
    errors = [
        error(scan, gridding(data, points, (1, MATRIX, MATRIX), weights=w).numpy())
        for w in (turned_density(points), iterated)
    ]
    assert errors[0] < errors[1] + 0.005


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 6.28), min_size=1, max_size=12), st.sampled_from(["spoke", "out", "spiral"]))
def test_closed_form_weights_share_the_disc_at_any_angles(angles, kind):
    across = torch.linspace(-1, 1, 65, dtype=torch.float64) if kind == "spoke" else torch.linspace(0, 1, 65).double()
    angle = torch.tensor(angles, dtype=torch.float64)[:, None] + (6 * across if kind == "spiral" else 0 * across)
    points = 0.1 * across[:, None] * torch.stack((angle.cos(), angle.sin()), dim=-1)
    weights = turned_density(points)
    assert weights is not None
    # so small a disc is dense for any angles: the weights are areas and fill it, but for the half step at the edge
    assert float(weights.sum()) == pytest.approx(np.pi * 0.1**2, rel=0.04)
    assert float(weights.min()) >= 0


def test_repeated_readouts_share_their_weight():
    points = radial_trajectory(10, 32)
    once, twice = turned_density(points), turned_density(torch.cat((points, points)))
    torch.testing.assert_close(twice[:10] + twice[10:], once, rtol=1e-3, atol=1e-5)


def test_there_is_no_closed_form_for_other_trajectories():
    grid = torch.stack(torch.meshgrid(*[torch.arange(-8.0, 8)] * 2, indexing="ij"), dim=-1)
    assert turned_density(grid) is None
    assert turned_density(radial_trajectory(5, 32) * torch.tensor([1.0, 0.5])) is None
    assert turned_density(torch.nn.functional.pad(radial_trajectory(5, 32), (0, 1))) is None  # all in one plane


# --- no trajectory, reversed readouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_golden_spokes_without_a_trajectory_go_on_over_the_repetitions(reverse):
    scan = scan_of("radial", 3, repetitions=2)
    sent = run(scan.header, scan.batches[:2])
    drawn = []
    for index in range(2):
        header, headers, samples, _ = changed(scan, index, trajectory="goldenangle")
        if reverse:
            headers["flags"][1::2] |= np.uint64(AcquisitionFlag.IS_REVERSE.bit)
            samples[1::2] = samples[1::2, :, ::-1]
        order = np.argsort(np.arange(len(headers)) % 3, kind="stable")
        drawn.append(batch_of(headers[order], samples[order]))
    seen = run(header, drawn, trigger__flags=False)
    assert len(seen.images) == 2
    for pixels, expected in zip(seen.pixels, sent.pixels, strict=True):
        np.testing.assert_allclose(pixels, expected, atol=0.02 * expected.max())


def test_uniform_spokes_are_drawn_where_the_counters_say_even_if_some_are_lost():
    spokes, samples = 60, 64
    points = radial_trajectory(spokes, samples, angles="uniform")
    image = torch.from_numpy(within_disc(np.add.outer(np.hanning(32), np.hanning(32)) > 1.2)).to(torch.complex64)
    data = NonUniformFourier(points / 2, (1, 1, 32, 32))(image[None, None])[0, 0][:, None].numpy()
    header = header_of((64, 64, 1), (32, 32, 1), (480.0, 480.0, 5.0), (240.0, 240.0, 5.0), "radial", spokes)
    headers = headers_of(spokes, samples, 1)
    headers["center_sample"] = 32
    kept = np.delete(np.arange(spokes), [7, 8, 31])
    seen = run(header, [batch_of(headers[kept], data[kept])], reconstruction__method="gridding")
    assert (seen.stats[0].missing, seen.stats[0].outcome) == (3, "incomplete")
    assert nrmse(image.real.numpy()[None], seen.pixels[0], fit_scale=True) < 0.12


def test_a_spiral_without_a_trajectory_is_refused_with_a_note():
    header, headers, samples, _ = changed(scan_of("spiral", 2))
    seen = run(header, [batch_of(headers, samples)])
    assert not seen.images
    assert seen.stats[0].outcome == "failed"
    assert any("without a trajectory" in note.text for note in seen.notes)


# --- units, fields of view, matrices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 37.5])
def test_a_third_dimension_may_be_a_density_of_any_scale(scale):
    scan = scan_of("radial", 1)
    plain = run(scan.header, scan.batches)
    header, headers, samples, trajectory = changed(scan, trajectory_dimensions=None)
    density = scale * turned_density(torch.from_numpy(MATRIX * trajectory)).numpy()[..., None]
    seen = run(header, [batch_of(headers, samples, np.concatenate((trajectory, density), axis=-1))])
    np.testing.assert_allclose(seen.pixels[0], plain.pixels[0], atol=0.01 * plain.pixels[0].max())


@pytest.mark.parametrize("sent", [True, False])
def test_oversampled_readouts_of_a_wider_field_of_view(sent):
    scan = scan_of("radial", 2)
    plain = run(scan.header, scan.batches)
    header, headers, samples, trajectory = changed(
        scan, encoded_matrix=(128, 128, 1), encoded_fov_mm=(480.0, 480.0, 5.0), trajectory="goldenangle"
    )
    seen = run(header, [batch_of(headers, samples, trajectory if sent else None)])
    np.testing.assert_allclose(seen.pixels[0], plain.pixels[0], atol=0.02 * plain.pixels[0].max())


@pytest.mark.parametrize("matrix", [48, 96])
def test_reconstructed_on_another_matrix_than_encoded(matrix):
    scan = scan_of("radial", 2)
    header, headers, samples, trajectory = changed(scan, recon_matrix=(matrix, matrix, 1))
    seen = run(header, [batch_of(headers, samples, trajectory)])
    assert seen.pixels[0].shape == (1, matrix, matrix)
    spectrum = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(scan.reference[0, 0])))
    axis, less = np.arange(64) - 32, (64 - matrix) // 2
    spectrum = spectrum * (np.hypot(axis[:, None], axis) <= 32)
    spectrum = spectrum[less:-less, less:-less] if less > 0 else np.pad(spectrum, -less)
    truth = np.abs(np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(spectrum))))
    assert nrmse(truth, seen.pixels[0][0], fit_scale=True) < 0.09


def test_discarded_samples_do_not_count():
    scan = scan_of("radial", 2)
    header, headers, samples, trajectory = changed(scan)
    plain = run(header, [batch_of(headers.copy(), samples.copy(), trajectory)])
    headers["discard_pre"], headers["discard_post"] = 3, 2
    samples[..., :3] = samples[..., -2:] = 100.0
    seen = run(header, [batch_of(headers, samples, trajectory)])
    assert nrmse(plain.pixels[0], seen.pixels[0]) < 0.09  # the edge of k-space is gone


# --- what goes wrong ---------------------------------------------------------------------------------------------------------


def test_lost_spokes_are_counted_and_cost_little():
    scan = scan_of("radial", 2)
    header, headers, samples, trajectory = changed(scan)
    kept = np.delete(np.arange(len(headers)), [3, 10, 11])
    seen = run(header, [batch_of(headers[kept], samples[kept], trajectory[kept])])
    assert (seen.stats[0].missing, seen.stats[0].outcome) == (3, "incomplete")
    assert error(scan, seen.pixels[0]) < 0.09


@pytest.mark.parametrize("where", ["samples", "trajectory"])
def test_readouts_that_are_not_finite_are_left_out(where):
    scan = scan_of("radial", 2)
    header, headers, samples, trajectory = changed(scan)
    (samples if where == "samples" else trajectory)[5, 1, 1] = np.nan
    samples[9, 0, 3] = np.inf
    seen = run(header, [batch_of(headers, samples, trajectory)])
    assert np.isfinite(seen.pixels[0]).all()
    assert (seen.stats[0].outcome, seen.stats[0].reason, seen.stats[0].missing) == ("degraded", "not_finite", 2)
    assert error(scan, seen.pixels[0]) < 0.09


@pytest.mark.parametrize("fault", ["nan", "range"])
def test_without_a_usable_readout_there_is_no_image(fault):
    header, headers, samples, trajectory = changed(scan_of("radial", 2))
    trajectory[...] = np.nan if fault == "nan" else 1e9
    seen = run(header, [batch_of(headers, samples, trajectory)])
    assert not seen.images
    assert [s.outcome for s in seen.stats] == ["failed"]


# --- averages, triggers ------------------------------------------------------------------------------------------------------


def test_averages_are_one_image_with_less_noise(rng):
    scan = scan_of("radial", 1)
    limits = scan.header.encodings[0].limits | {"average": EncodingLimit(0, 1, 0)}
    header, headers, samples, trajectory = changed(scan, limits=limits)
    headers["flags"] = 0
    batches = []
    for average in range(2):
        headers["idx"]["average"] = average
        noise = 0.1 * rng.standard_normal((*samples.shape, 2)).astype(np.float32).view(np.complex64)[..., 0]
        batches.append(batch_of(headers.copy(), samples + noise, trajectory))
    one, two = run(scan.header, batches[:1]), run(header, batches)
    assert len(two.images) == 1
    assert (two.stats[0].missing, two.stats[0].duplicates) == (0, 0)
    assert error(scan, two.pixels[0]) < 0.85 * error(scan, one.pixels[0])


def test_readouts_that_come_again_are_counted():
    scan = scan_of("radial", 2)
    header, headers, samples, trajectory = changed(scan)
    twice = np.sort(np.append(np.arange(len(headers) - 3), [4, 5]))
    seen = run(header, [batch_of(headers[twice], samples[twice], trajectory[twice])])
    assert (seen.stats[0].missing, seen.stats[0].duplicates) == (3, 2)


@pytest.mark.parametrize(
    ("switches", "reasons"),
    [
        ({}, ["coverage", "coverage"]),
        ({"coverage": False}, ["flag", "flag"]),
        ({"coverage": False, "flags": False}, ["change", "close"]),
        ({"coverage": False, "flags": False, "change": False}, ["close", "close"]),
    ],
)
def test_frames_end_by_each_trigger(switches, reasons):
    scan = scan_of("radial", 3, repetitions=2)
    overrides = {f"trigger__{name}": value for name, value in switches.items()}
    seen = run(scan.header, scan.batches[:2], size=7, reconstruction__method="gridding", **overrides)
    assert [s.trigger for s in seen.stats] == reasons
    assert [s.readouts for s in seen.stats] == [len(batch) for batch in scan.batches[:2]]


def test_groups_of_readouts_by_count():
    scan = scan_of("radial", 1)
    seen = run(scan.header, scan.batches, size=10, trigger__acquisitions=34)
    assert [s.readouts for s in seen.stats] == [34, 34, len(scan) - 68]
    assert [s.trigger for s in seen.stats[:2]] == ["count", "count"]
    assert all(s.missing == 0 for s in seen.stats)
    assert all(error(scan, pixels) < 0.1 for pixels in seen.pixels[:2])


def test_a_cartesian_scan_with_trajectories_stays_cartesian():
    scan = simulate_scan(32, 4, 1, trajectory="cartesian", noise=0.0, noise_readouts=0)
    batch = scan.batches[0]
    trajectory = np.zeros((len(batch), batch.samples.shape[-1], 2), np.float32)
    seen = run(scan.header, [batch_of(batch.headers.copy(), batch.samples, trajectory)])
    assert seen.method() == "root_sum_of_squares"
    assert nrmse(np.abs(scan.reference[0, 0]), seen.pixels[0][0], fit_scale=True) < 0.03


# --- three dimensions --------------------------------------------------------------------------------------------------------


def header_of(encoded, recon, encoded_fov, recon_fov, trajectory, spokes, partitions=1, dimensions=None):
    limits = {
        "kspace_encode_step_1": EncodingLimit(0, spokes - 1, spokes // 2),
        "kspace_encode_step_2": EncodingLimit(0, partitions - 1, partitions // 2),
    }
    space = EncodingSpace(
        encoded_matrix=encoded,
        encoded_fov_mm=encoded_fov,
        recon_matrix=recon,
        recon_fov_mm=recon_fov,
        trajectory=trajectory,
        limits=limits,
        trajectory_dimensions=dimensions,
    )
    return ScanHeader(encodings=(space,))


def headers_of(spokes, samples, coils):
    headers = np.zeros(spokes, ACQUISITION_HEADER)
    headers["version"], headers["number_of_samples"], headers["active_channels"] = 1, samples, coils
    headers["idx"]["kspace_encode_step_1"] = np.arange(spokes)
    return headers


def volume(size):
    """A smooth body and the images that four coils see of it, complex64, (z, y, x) and (coil, z, y, x)."""
    z, y, x = torch.meshgrid(*[torch.linspace(-0.5, 0.5, n + 1, dtype=torch.float64)[:n] for n in size], indexing="ij")
    body = torch.sigmoid(60 * (0.36 - torch.sqrt(x**2 + 1.3 * y**2 + z**2))) * (1 + torch.cos(9 * x + 5 * z) / 2)
    sees = torch.stack(
        [torch.exp(1j * a * (x + y) + b * z - (x - a / 3) ** 2) for a, b in ((1, 1), (-1, 1), (1, -1), (-1, -1))]
    )
    sees = sees / sees.abs().square().sum(dim=0).sqrt()
    return body.numpy(), (sees * body).to(torch.complex64)


def test_spokes_in_all_directions_of_a_volume():
    size, samples, spokes = 20, 40, 500
    height = np.linspace(-1, 1, 2 * spokes)[::2] * 0.999
    turn = np.pi * (3 - np.sqrt(5)) * np.arange(spokes)
    ray = np.stack([np.sqrt(1 - height**2) * np.cos(turn), np.sqrt(1 - height**2) * np.sin(turn), height], axis=-1)
    points = (ray[:, None] * ((np.arange(samples) - samples // 2) / samples * size)[:, None]).astype(np.float32)
    body, images = volume((size, size, size))
    data = NonUniformFourier(torch.from_numpy(points), images.shape)(images)[:, 0].transpose(0, 1).contiguous().numpy()
    header = header_of((size,) * 3, (size,) * 3, (200.0,) * 3, (200.0,) * 3, "radial", spokes, dimensions=3)
    assert turned_density(torch.from_numpy(points)) is not None
    for method, limit in (("gridding", 0.12), ("cg_sense", 0.08)):
        batch = batch_of(headers_of(spokes, samples, 4), data, points / np.float32(size))
        seen = run(header, [batch], reconstruction__method=method)
        assert seen.method() == method
        assert nrmse(body, seen.pixels[0], fit_scale=True) < limit


def test_a_stack_of_stars():
    depth, size, spokes = 8, 32, 24
    body, images = volume((depth, size, size))
    flat = radial_trajectory(spokes, 64, matrix=size).float()
    kz = torch.arange(depth) - depth // 2
    full = torch.cat([torch.cat((flat, torch.full_like(flat[..., :1], float(k))), dim=-1) for k in kz])
    data = NonUniformFourier(full, images.shape)(images)[:, 0].transpose(0, 1).contiguous().numpy()
    headers = headers_of(depth * spokes, 64, 4)
    headers["idx"]["kspace_encode_step_1"] = np.tile(np.arange(spokes), depth)
    headers["idx"]["kspace_encode_step_2"] = np.repeat(np.arange(depth), spokes)
    matrix, fov = (size, size, depth), (200.0, 200.0, 50.0)
    header = header_of(matrix, matrix, fov, fov, "radial", spokes, partitions=depth)
    batch = batch_of(headers, data, np.tile(flat.numpy(), (depth, 1, 1)) / np.float32(size))
    seen = run(header, [batch], reconstruction__method="cg_sense")
    assert seen.pixels[0].shape == (depth, size, size)
    assert nrmse(body, seen.pixels[0], fit_scale=True) < 0.1
