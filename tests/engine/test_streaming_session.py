"""Whole scans through a session: when frames end, what they count, and that batches never matter."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable, Iterable, Iterator

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.config import ConfigStore, SystemConfig, with_overrides
from scanside.engine.errors import LimitExceeded, PeerError
from scanside.engine.headers import ACQUISITION_HEADER, AcquisitionFlag
from scanside.engine.messages import (
    AcquisitionBatch,
    EncodingLimit,
    EncodingSpace,
    EndOfScan,
    Event,
    FrameKey,
    FrameStats,
    Image,
    Note,
    ScanHeader,
)
from scanside.engine.simulation import SimulatedScan, simulate_scan
from scanside.engine.streaming.lanes import CartesianLane
from scanside.engine.streaming.session import Session

SIZE, COILS = 8, 2
ENDS = ("LAST_IN_SLICE", "LAST_IN_REPETITION", "LAST_IN_MEASUREMENT")
Readout = tuple[np.ndarray, np.ndarray]

PLAIN = SystemConfig(name="test")
ZERO_FILLED = with_overrides(PLAIN, {"reconstruction.method": "zero_filled"}, source="test")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small transforms are faster on one thread, and give the same bits however often they run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def header(acceleration: int = 1, depth: int = 1, encodings: int = 1, **limits: int) -> ScanHeader:
    space = EncodingSpace(
        encoded_matrix=(SIZE, SIZE, depth),
        encoded_fov_mm=(80.0, 80.0, 10.0),
        recon_matrix=(SIZE, SIZE, depth),
        recon_fov_mm=(80.0, 80.0, 10.0),
        acceleration=(acceleration, 1),
        limits={
            "kspace_encode_step_1": EncodingLimit(0, SIZE - 1, SIZE // 2),
            "kspace_encode_step_2": EncodingLimit(0, depth - 1, depth // 2),
            **{name: EncodingLimit(0, count - 1, 0) for name, count in limits.items()},
        },
    )
    return ScanHeader(encodings=(space,) * encodings)


def readout(
    row: int, *flags: str, channels: int = COILS, samples: int = SIZE, value: complex = 1, **counters: int
) -> Readout:
    record = np.zeros((), ACQUISITION_HEADER)
    record["version"], record["number_of_samples"], record["center_sample"] = 1, samples, samples // 2
    record["active_channels"] = record["available_channels"] = channels
    record["idx"]["kspace_encode_step_1"] = row
    for name, number in counters.items():
        (record if name in ACQUISITION_HEADER.names else record["idx"])[name] = number
    record["flags"] = sum(AcquisitionFlag[name].bit for name in flags)
    rng = np.random.default_rng(row + 100 * counters.get("repetition", 0) + 1000 * counters.get("slice", 0))
    data = rng.standard_normal((channels, samples)) + 1j * rng.standard_normal((channels, samples))
    return record, (value * data).astype(np.complex64)


def batch(readouts: Iterable[Readout]) -> AcquisitionBatch:
    records, data = zip(*readouts, strict=True)
    return AcquisitionBatch(headers=np.stack(records), samples=np.stack(data), received=1.0)


class Scan:
    """A session that is fed one readout at a time and says after each which frames have ended."""

    def __init__(self, head: ScanHeader, config: SystemConfig = PLAIN) -> None:
        self.session = Session(config)
        self.events: list[Event] = list(self.session.feed(head))

    def feed(self, *readouts: Readout) -> list[tuple[str, FrameKey]]:
        """Feed readouts in one batch."""
        return self._took(self.session.feed(batch(readouts)))

    def close(self) -> list[tuple[str, FrameKey]]:
        return self._took(self.session.feed(EndOfScan()))

    def _took(self, events: Iterable[Event]) -> list[tuple[str, FrameKey]]:
        new = list(events)
        self.events += new
        assert sum(isinstance(e, Image) for e in new) == sum(
            isinstance(e, FrameStats) and e.outcome != "failed" for e in new
        )
        return [(event.trigger, event.key) for event in new if isinstance(event, FrameStats)]

    @property
    def images(self) -> list[Image]:
        return [event for event in self.events if isinstance(event, Image)]

    @property
    def stats(self) -> list[FrameStats]:
        return [event for event in self.events if isinstance(event, FrameStats)]

    @property
    def notes(self) -> str:
        return "\n".join(event.text for event in self.events if isinstance(event, Note))


def frame(rows: Iterable[int] = range(SIZE), *last: str, **counters: int) -> list[Readout]:
    """Readouts of one frame, the flags `last` on the last of them."""
    rows = list(rows)
    return [readout(row, *(last if row is rows[-1] else ()), **counters) for row in rows]


def reference(rows: dict[int, np.ndarray]) -> np.ndarray:
    """Root sum of squares of the transform of the given lines, double precision."""
    kspace = np.zeros((COILS, SIZE, SIZE), np.complex128)
    for row, data in rows.items():
        kspace[:, row] = data
    axes = (1, 2)
    images = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, axes=axes), norm="ortho"), axes=axes)
    return np.sqrt((np.abs(images) ** 2).sum(axis=0))


# When frames end


def test_coverage_ends_a_frame_with_its_last_line_in_any_order(rng: np.random.Generator) -> None:
    scan, order = Scan(header()), rng.permutation(SIZE).tolist()
    for row in order[:-1]:
        assert scan.feed(readout(row)) == []
    assert scan.feed(readout(order[-1])) == [("coverage", FrameKey())]
    rows = {row: readout(row)[1] for row in range(SIZE)}
    np.testing.assert_allclose(scan.images[0].pixels[0, 0], reference(rows), rtol=1e-5)
    assert scan.close() == []


@pytest.mark.parametrize("flag", ENDS)
def test_a_flag_ends_a_frame_that_nothing_else_would(flag: str) -> None:
    scan = Scan(header(acceleration=2))
    assert scan.feed(*frame(range(0, SIZE, 2))) == []
    assert scan.feed(readout(5, flag)) == [("flag", FrameKey())]


def test_flag_and_coverage_at_once_give_one_image() -> None:
    scan = Scan(header())
    assert len(scan.feed(*frame(range(SIZE), *ENDS))) == 1
    assert scan.close() == []


def test_a_later_repetition_ends_the_earlier_one_of_its_slice_only() -> None:
    scan = Scan(header(acceleration=2))
    for where in (0, 1):
        scan.feed(*frame(range(0, SIZE, 2), slice=where, contrast=1))
    assert scan.feed(readout(0, slice=1, repetition=1)) == [("change", FrameKey(slice=1, contrast=1))]
    assert scan.close() == [
        ("close", FrameKey(slice=0, contrast=1)),
        ("close", FrameKey(slice=1, repetition=1)),
    ]


def test_a_late_line_of_an_earlier_repetition_ends_nothing() -> None:
    scan = Scan(header(acceleration=2))
    scan.feed(*frame([0, 2, 4], repetition=3))
    assert scan.feed(readout(0, repetition=4)) == [("change", FrameKey(repetition=3))]
    assert scan.feed(readout(6, repetition=3)) == []
    assert scan.feed(readout(2, repetition=4)) == [("change", FrameKey(repetition=3))]
    assert scan.stats[-1].readouts == 4
    assert scan.close() == [("close", FrameKey(repetition=4))]


def test_the_repetition_counter_may_start_again() -> None:
    scan = Scan(header(acceleration=2))
    scan.feed(readout(0, repetition=65535))
    assert scan.feed(readout(0, repetition=0)) == [("change", FrameKey(repetition=65535))]


def test_calibration_of_a_later_repetition_ends_the_earlier_one() -> None:
    scan = Scan(header(acceleration=2))
    scan.feed(*frame([0, 2, 4, 6]))
    assert scan.feed(readout(3, "IS_PARALLEL_CALIBRATION", repetition=1)) == [("change", FrameKey())]


def test_counted_readouts_end_a_frame() -> None:
    scan = Scan(header(acceleration=2), with_overrides(PLAIN, {"trigger.acquisitions": 3}, source="test"))
    ends = [bool(scan.feed(readout(row % SIZE))) for row in range(8)]
    assert ends == [False, False, True, False, False, True, False, False]
    assert scan.close() == [("close", FrameKey())]
    assert len(Scan(header(), scan.session.config).feed(*[readout(row % SIZE) for row in range(8)])) == 2


@pytest.mark.parametrize("switched_off", ["flags", "coverage", "change"])
def test_each_reason_can_be_switched_off(switched_off: str) -> None:
    config = with_overrides(PLAIN, {f"trigger.{switched_off}": False}, source="test")
    reasons = {
        "flags": Scan(header(acceleration=2), config).feed(readout(1, "LAST_IN_SLICE")),
        "coverage": Scan(header(), config).feed(*frame()),
        "change": Scan(header(acceleration=2), config).feed(readout(0), readout(0, repetition=1)),
    }
    assert [name for name, ended in reasons.items() if not ended] == [switched_off]


def test_last_in_slice_of_an_early_average_does_not_end_the_frame() -> None:
    scan = Scan(header(average=3))
    for average in (0, 1):
        assert scan.feed(*frame(range(SIZE), "LAST_IN_SLICE", average=average)) == []
    assert scan.feed(*frame(range(SIZE - 1), average=2)) == []
    assert scan.feed(readout(SIZE - 1, "LAST_IN_SLICE", average=2)) == [("coverage", FrameKey())]
    assert (scan.stats[0].readouts, scan.stats[0].duplicates, scan.stats[0].outcome) == (24, 0, "complete")


def test_without_any_flag_or_change_the_same_counters_begin_the_next_frame() -> None:
    scan = Scan(header())
    for repeat in range(3):
        assert scan.feed(*[readout(row, value=repeat + 1) for row in range(SIZE - 1)]) == []
        assert scan.feed(readout(SIZE - 1, value=repeat + 1)) == [("coverage", FrameKey())]
    first, _, third = scan.images
    np.testing.assert_allclose(third.pixels, 3 * first.pixels, rtol=1e-5)
    assert [int(image.header["image_index"]) for image in scan.images] == [1, 2, 3]


def test_lines_after_a_premature_flag_reopen_their_frame() -> None:
    scan = Scan(header(), ZERO_FILLED)
    assert scan.feed(*frame([0, 1, 2, 3], "LAST_IN_SLICE")) == [("flag", FrameKey())]
    assert scan.stats[0].outcome == "incomplete"
    assert scan.stats[0].missing == 4
    assert scan.feed(*frame([4, 5, 6])) == []
    assert scan.feed(readout(7)) == [("coverage", FrameKey())]
    assert (scan.stats[1].outcome, scan.stats[1].missing, scan.stats[1].readouts) == ("complete", 0, 8)
    rows = {row: readout(row)[1] for row in range(SIZE)}
    np.testing.assert_allclose(scan.images[1].pixels[0, 0], reference(rows), rtol=1e-5)


def test_flags_on_every_line_still_end_with_the_whole_image() -> None:
    scan = Scan(header())
    for row in range(SIZE):
        scan.feed(readout(row, "LAST_IN_SLICE", "LAST_IN_REPETITION"))
    assert scan.stats[-1].readouts == SIZE
    assert scan.stats[-1].outcome == "complete"
    assert scan.close() == []


ORDERS: dict[str, Callable[[], list[Readout]]] = {
    "slices in turn": lambda: [readout(row, slice=s) for s in range(3) for row in range(SIZE)],
    "slices interleaved": lambda: [readout(row, slice=s) for row in range(SIZE) for s in range(3)],
    "contrasts": lambda: [readout(row, contrast=c) for row in range(SIZE) for c in range(3)],
    "phases": lambda: [readout(row, phase=p) for row in range(SIZE) for p in range(3)],
    "sets": lambda: [readout(row, set=p) for p in range(3) for row in range(SIZE)],
    "segments": lambda: [readout(row, repetition=p, segment=row % 3) for p in range(3) for row in range(SIZE)],
}


@pytest.mark.parametrize("name", ORDERS)
def test_frames_are_told_apart_and_end_with_their_own_last_line(name: str) -> None:
    scan, readouts = Scan(header()), ORDERS[name]()
    last = {
        tuple(int(r["idx"][n]) for n in ("repetition", "slice", "contrast", "phase", "set")): i
        for i, (r, _) in enumerate(readouts)
    }
    for index, one in enumerate(readouts):
        ended = scan.feed(one)
        assert bool(ended) is (index in last.values())
    assert len({stats.key for stats in scan.stats}) == 3
    assert all(stats.outcome == "complete" and stats.trigger == "coverage" for stats in scan.stats)
    assert scan.close() == []


def test_a_volume_ends_with_its_last_partition() -> None:
    scan = Scan(header(depth=4))
    readouts = [readout(row, kspace_encode_step_2=part) for part in range(4) for row in range(SIZE)]
    assert scan.feed(*readouts[:-1]) == []
    assert scan.feed(readouts[-1]) == [("coverage", FrameKey())]
    kspace = np.zeros((COILS, 4, SIZE, SIZE), np.complex128)
    for record, data in readouts:
        kspace[:, record["idx"]["kspace_encode_step_2"], record["idx"]["kspace_encode_step_1"]] = data
    axes = (1, 2, 3)
    volume = np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(kspace, axes=axes), axes=axes, norm="ortho"), axes=axes)
    np.testing.assert_allclose(scan.images[0].pixels[0], np.sqrt((np.abs(volume) ** 2).sum(axis=0)), rtol=1e-4)


def test_encoding_spaces_are_kept_apart() -> None:
    scan = Scan(header(encodings=2))
    assert scan.feed(*frame(range(SIZE - 1)), *frame(encoding_space_ref=1)) == [("coverage", FrameKey(encoding=1))]
    assert scan.close() == [("close", FrameKey())]


# Batches


flag_lists = st.lists(
    st.sampled_from([*ENDS, "IS_PARALLEL_CALIBRATION", "IS_PARALLEL_CALIBRATION_AND_IMAGING"]), max_size=1
)
scans = st.lists(
    st.tuples(st.integers(0, SIZE + 1), flag_lists, st.integers(0, 1), st.integers(0, 1), st.integers(0, 1)),
    min_size=1,
    max_size=40,
)


def outcome(scan: Scan) -> list[tuple[object, ...]]:
    return [
        (s.key, s.trigger, s.outcome, s.readouts, s.missing, s.duplicates, s.acceleration, s.reason) for s in scan.stats
    ]


@given(scans, st.sets(st.integers(1, 39)), st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None)
def test_batches_never_change_what_comes_out(
    counters: list[tuple[int, list[str], int, int, int]], cuts: set[int], acceleration: int
) -> None:
    readouts = [readout(row, *flags, repetition=r, slice=s, average=a) for row, flags, r, s, a in counters]
    single, split = (Scan(header(acceleration), ZERO_FILLED) for _ in range(2))
    for one in readouts:
        single.feed(one)
    single.close()
    edges = [0, *sorted(cut for cut in cuts if cut < len(readouts)), len(readouts)]
    for start, stop in itertools.pairwise(edges):
        split.feed(*readouts[start:stop])
    split.close()
    assert outcome(single) == outcome(split)
    assert single.session.counts == split.session.counts
    for one, other in zip(single.images, split.images, strict=True):
        assert one.header == other.header
        assert one.pixels.tobytes() == other.pixels.tobytes()


def feed_all(scan: SimulatedScan, size: int, config: str = "cartesian") -> Scan:
    fed = Scan(scan.header, ConfigStore().get(config))
    for part in scan.readouts(size):
        fed._took(fed.session.feed(part))
    fed.close()
    return fed


@pytest.mark.parametrize("config", ["cartesian", "sense", "grappa"])
def test_an_accelerated_scan_gives_the_same_images_in_any_batches(config: str) -> None:
    scan = simulate_scan(48, 4, 2, 24, repetitions=2, slices=2, noise=1e-4)
    whole, again, single, odd = (feed_all(scan, size, config) for size in (1000, 1000, 1, 7))
    assert len(whole.images) == 4
    for one, other in zip(whole.images, again.images, strict=True):
        assert one.pixels.tobytes() == other.pixels.tobytes()
    for split in (single, odd):
        assert outcome(split) == outcome(whole)
        for one, other in zip(whole.images, split.images, strict=True):
            assert one.pixels.tobytes() == other.pixels.tobytes()


@pytest.mark.parametrize("order", ["linear", "calibration_first"])
def test_simulated_scans_come_out_right(order: str) -> None:
    for settings_ in ({"acceleration": 1}, {"acceleration": 2}, {"acceleration": 2, "oversampling": 1}):
        scan = simulate_scan(64, 6, calibration_lines=24, noise=1e-4, noise_readouts=0, order=order, **settings_)
        (image,) = feed_all(scan, 5).images
        truth = np.abs(scan.reference[0, 0])
        pixels = image.pixels[0, 0].astype(np.float64)
        scale = (pixels * truth).sum() / (pixels**2).sum()
        assert np.linalg.norm(scale * pixels - truth) < 0.06 * np.linalg.norm(truth), settings_


# Readouts that are no image


OTHERS = [
    "IS_NAVIGATION_DATA", "IS_PHASECORR_DATA", "IS_HPFEEDBACK_DATA", "IS_DUMMYSCAN_DATA", "IS_RTFEEDBACK_DATA",
    "IS_SURFACECOILCORRECTIONSCAN_DATA", "IS_PHASE_STABILIZATION_REFERENCE", "IS_PHASE_STABILIZATION",
]  # fmt: skip


@pytest.mark.parametrize("flag", OTHERS)
def test_other_readouts_are_counted_and_change_nothing(flag: str) -> None:
    plain, mixed = Scan(header()), Scan(header())
    plain.feed(*frame())
    for row in range(SIZE):
        mixed.feed(readout(row), readout(row, flag, value=1e6))
        mixed.feed(readout(row, flag, samples=5))
    assert mixed.session.counts["other"] == 2 * SIZE
    assert mixed.session.counts["imaging"] == SIZE
    np.testing.assert_allclose(plain.images[0].pixels, mixed.images[0].pixels, rtol=1e-5)


def test_noise_of_other_channels_is_not_used() -> None:
    scan = Scan(header())
    noise = [readout(0, "IS_NOISE_MEASUREMENT", channels=3, samples=64, sample_time_us=1) for _ in range(2)]
    scan.feed(*noise)
    scan.feed(*frame(sample_time_us=1))
    assert scan.session.counts["noise_mismatch"] == 1
    rows = {row: readout(row)[1] for row in range(SIZE)}
    np.testing.assert_allclose(scan.images[0].pixels[0, 0], reference(rows), rtol=1e-5)


def test_noise_makes_the_coils_white() -> None:
    mixing = np.eye(COILS) + 0.4 * np.ones((COILS, COILS))
    rng = np.random.default_rng(3)

    def noise(count: int, *flags: str) -> AcquisitionBatch:
        white = rng.standard_normal((count, COILS, SIZE, 2)).view(np.complex128)[..., 0] / np.sqrt(2)
        part = batch([readout(row % SIZE, *flags, sample_time_us=5) for row in range(count)])
        return msgspec.structs.replace(part, samples=(mixing @ white).astype(np.complex64))

    session = Session(PLAIN)
    list(session.feed(msgspec.structs.replace(header(), relative_receiver_noise_bandwidth=1.0)))
    list(session.feed(noise(500, "IS_NOISE_MEASUREMENT")))
    images = [e for _ in range(200) for e in session.feed(noise(SIZE)) if isinstance(e, Image)]
    power = np.mean([image.pixels.astype(np.float64) ** 2 for image in images])
    assert power == pytest.approx(2 * COILS, rel=0.05)  # variance 1 in each of real and imaginary part


def calibrations(scan: Scan) -> CartesianLane:
    lane = scan.session._lanes[0][0]
    assert isinstance(lane, CartesianLane)
    return lane


def test_calibration_lines_belong_to_their_contrast_and_the_latest_repetition() -> None:
    scan, only = Scan(header(acceleration=2)), "IS_PARALLEL_CALIBRATION"
    scan.feed(*[readout(row, only, contrast=1) for row in (3, 4)])
    lane = calibrations(scan)
    asked = FrameKey(contrast=0), FrameKey(contrast=1, repetition=5), FrameKey(slice=1)
    owners = [held and held[0] for held in map(lane.calibration_of, asked)]
    assert owners == [FrameKey(contrast=1), FrameKey(contrast=1), None]
    scan.feed(readout(5, only, contrast=1, repetition=2), readout(2, only, contrast=0))
    latest, own = lane.calibration_of(asked[1]), lane.calibration_of(asked[0])
    assert latest is not None
    assert (latest[0].repetition, np.flatnonzero(latest[1].mask[0]).tolist()) == (2, [5])
    assert own is not None
    assert np.flatnonzero(own[1].mask[0]).tolist() == [2]


def test_calibration_that_images_is_both_and_calibration_alone_is_not_in_the_frame() -> None:
    scan = Scan(header(acceleration=2), ZERO_FILLED)
    scan.feed(readout(2), readout(3, "IS_PARALLEL_CALIBRATION"), readout(4, "IS_PARALLEL_CALIBRATION_AND_IMAGING"))
    held = calibrations(scan).calibration_of(FrameKey())
    assert held is not None
    assert np.flatnonzero(held[1].mask[0]).tolist() == [3, 4]
    scan.feed(readout(6, "LAST_IN_SLICE"))
    rows = {row: readout(row)[1] for row in (2, 4, 6)}
    np.testing.assert_allclose(scan.images[0].pixels[0, 0], reference(rows), rtol=1e-4)


def test_a_separate_calibration_scan_before_serves_the_slice() -> None:
    scan = simulate_scan(48, 6, 2, 24, noise=1e-4, noise_readouts=0)
    (part,) = scan.batches
    separate = Session(ConfigStore().get("cartesian"))
    list(separate.feed(scan.header))
    lines = np.abs(part.headers["idx"]["kspace_encode_step_1"].astype(int) - 24) < 12
    before, after = part.headers[lines].copy(), part.headers[:].copy()
    before["flags"], before["idx"]["set"] = AcquisitionFlag.IS_PARALLEL_CALIBRATION.bit, 1
    grid = after["idx"]["kspace_encode_step_1"] % 2 == 0
    after["flags"] &= ~np.uint64(AcquisitionFlag.IS_PARALLEL_CALIBRATION_AND_IMAGING.bit)
    list(separate.feed(AcquisitionBatch(headers=before, samples=part.samples[lines])))
    events = list(separate.feed(AcquisitionBatch(headers=after[grid], samples=part.samples[grid])))
    events += list(separate.feed(EndOfScan()))
    (image,) = [event for event in events if isinstance(event, Image)]
    assert image.meta["scanside_method"] == ["sense"]
    pixels, truth = image.pixels[0, 0].astype(np.float64), np.abs(scan.reference[0, 0])
    scale = (pixels * truth).sum() / (pixels**2).sum()
    assert np.linalg.norm(scale * pixels - truth) < 0.06 * np.linalg.norm(truth)


# What goes wrong


def test_missing_and_repeated_lines_are_counted_and_said() -> None:
    scan = Scan(header(), ZERO_FILLED)
    scan.feed(*frame([0, 1, 3, 4, 4, 6]))
    assert scan.close() == [("close", FrameKey())]
    assert (scan.stats[0].outcome, scan.stats[0].missing, scan.stats[0].duplicates) == ("incomplete", 3, 1)
    meta = scan.images[0].meta
    assert meta["scanside_missing_lines"] == ["3"]
    assert meta["scanside_duplicate_lines"] == ["1"]
    assert meta["scanside_outcome"] == ["incomplete"]
    rows = {row: readout(row)[1] for row in (0, 1, 3, 4, 6)}
    np.testing.assert_allclose(scan.images[0].pixels[0, 0], reference(rows), rtol=1e-4)


@pytest.mark.parametrize("wrong", [{"channels": 3}, {"samples": 6}, {"encoding_space_ref": 9}])
@pytest.mark.parametrize("flag", [(), ("IS_PARALLEL_CALIBRATION",)])
def test_readouts_that_do_not_fit_are_left_out(wrong: dict[str, int], flag: tuple[str, ...]) -> None:
    scan = Scan(header())
    for row in range(SIZE - 1):
        scan.feed(readout(row))
        assert scan.feed(readout(row, *flag, **wrong)) == []
    scan.feed(readout(SIZE - 1))
    assert scan.session.counts["rejected"] == SIZE - 1
    rows = {row: readout(row)[1] for row in range(SIZE)}
    np.testing.assert_allclose(scan.images[0].pixels[0, 0], reference(rows), rtol=1e-5)
    scan.close()
    assert "7 readouts did not fit this scan and were left out" in scan.notes


def test_lines_beyond_the_matrix_are_left_out() -> None:
    scan = Scan(header())
    assert scan.feed(readout(SIZE), readout(60000), readout(3, kspace_encode_step_2=1)) == []
    assert scan.feed(*frame()) == [("coverage", FrameKey())]
    rows = {row: readout(row)[1] for row in range(SIZE)}
    np.testing.assert_allclose(scan.images[0].pixels[0, 0], reference(rows), rtol=1e-5)
    assert scan.feed(readout(SIZE)) == []
    assert scan.close() == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
@pytest.mark.parametrize("method", ["auto", "cg_sense", "grappa", "sake"])
def test_no_pixel_is_ever_without_a_value(bad: float, method: str) -> None:
    config = with_overrides(PLAIN, {"reconstruction.method": method}, source="test")
    scan = simulate_scan(32, 4, 1 if method == "auto" else 2, 16, noise=1e-3, repetitions=2, noise_readouts=0)
    fed = Scan(scan.header, config)
    for repetition, part in enumerate(scan.batches):
        samples = part.samples.copy()
        if repetition == 0:
            samples[3, 1, 5] = bad
            samples[7] = bad
        fed._took(fed.session.feed(msgspec.structs.replace(part, samples=samples)))
    fed.close()
    assert all(np.isfinite(image.pixels).all() for image in fed.images)
    assert len(fed.stats) == 2
    assert fed.stats[0].outcome in ("degraded", "failed")
    assert fed.stats[0].reason == "not_finite"
    assert (fed.stats[1].outcome, fed.stats[1].reason) == ("complete", "")


@pytest.mark.parametrize("value", [0.0, 1e-42])
@pytest.mark.parametrize("method", ["auto", "cg_sense", "l1_espirit", "total_variation", "grappa", "sake"])
def test_silence_gives_finite_images(value: float, method: str) -> None:
    config = with_overrides(PLAIN, {"reconstruction.method": method, "reconstruction.iterations": 3}, source="test")
    scan = simulate_scan(32, 4, 2, 16, noise=1e-3, noise_readouts=0)
    fed = Scan(scan.header, config)
    for part in scan.batches:
        samples = (part.samples * np.float32(value)).astype(np.complex64)
        fed._took(fed.session.feed(msgspec.structs.replace(part, samples=samples)))
    fed.close()
    (image,) = fed.images
    assert np.isfinite(image.pixels).all()
    assert image.pixels.max() < 1e-3


@pytest.mark.parametrize("method", ["auto", "cg_sense", "total_variation", "grappa"])
def test_a_dead_coil_leaves_the_image_to_the_others(method: str) -> None:
    config = with_overrides(PLAIN, {"reconstruction.method": method}, source="test")
    scan = simulate_scan(48, 6, 2, 24, noise=1e-4, noise_readouts=32)
    fed = Scan(scan.header, config)
    for part in scan.batches:
        samples = part.samples.copy()
        samples[:, 2] = 0
        fed._took(fed.session.feed(msgspec.structs.replace(part, samples=samples)))
    fed.close()
    (image,) = fed.images
    assert np.isfinite(image.pixels).all()
    pixels, truth = image.pixels[0, 0].astype(np.float64), np.abs(scan.reference[0, 0])
    assert np.corrcoef(pixels.ravel(), truth.ravel())[0, 1] > 0.9


def test_messages_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(PeerError, match="before the header"):
        list(Session(PLAIN).feed(batch([readout(0)])))
    scan = Scan(header())
    with pytest.raises(PeerError, match="second header"):
        list(scan.session.feed(header()))
    scan.close()
    with pytest.raises(PeerError, match="after the end"):
        scan.feed(readout(0))


# Limits and memory


def limited(**limits: int) -> SystemConfig:
    return with_overrides(PLAIN, {f"limits.{name}": value for name, value in limits.items()}, source="test")


def huge() -> ScanHeader:
    space = msgspec.structs.replace(header().encodings[0], encoded_matrix=(SIZE, 60000, 60000), limits={})
    return ScanHeader(encodings=(space,))


def test_sizes_above_a_limit_are_refused_before_anything_is_allocated() -> None:
    scan = Scan(huge())
    tracemalloc.start()
    with pytest.raises(LimitExceeded, match=r"k-space of one frame .* raise limits\.frame_bytes"):
        scan.feed(readout(0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert scan.close() == []


def test_too_many_frames_at_once_are_refused() -> None:
    scan = Scan(header(), limited(frames_open=3))
    scan.feed(*[readout(0, slice=s) for s in range(3)])
    with pytest.raises(
        LimitExceeded, match=r"frames being filled at once is 4, the limit is 3; raise limits\.frames_open"
    ):
        scan.feed(readout(0, slice=3))
    assert len(scan.close()) == 3


def test_the_frames_of_a_session_together_are_limited() -> None:
    size = 8 * COILS * SIZE * SIZE
    scan = Scan(header(), limited(session_bytes=2 * 3 * size))
    scan.feed(*[readout(0, slice=s) for s in range(3)])
    with pytest.raises(LimitExceeded, match=r"memory for the frames of this session .* raise limits\.session_bytes"):
        scan.feed(readout(0, slice=3))


def radial(**limits: int) -> Scan:
    space = msgspec.structs.replace(header().encodings[0], trajectory="radial", limits={})
    return Scan(ScanHeader(encodings=(space,)), limited(**limits))


def spoke() -> AcquisitionBatch:
    one = batch([readout(0, trajectory_dimensions=2)])
    return msgspec.structs.replace(one, trajectory=np.zeros((1, SIZE, 2), np.float32))


def test_a_frame_that_never_ends_does_not_grow_without_end() -> None:
    scan = radial(frame_bytes=64 * SIZE * (8 * COILS + 8))
    for _ in range(64):
        list(scan.session.feed(spoke()))
    with pytest.raises(LimitExceeded, match=r"raise limits\.frame_bytes"):
        list(scan.session.feed(spoke()))


def test_frames_come_and_go_in_the_same_memory() -> None:
    scan = simulate_scan(64, 4, 1, noise=1e-3, noise_readouts=0)
    (part,) = scan.batches
    session = Session(ConfigStore().get("cartesian"))
    list(session.feed(scan.header))
    places, sizes = set(), []
    tracemalloc.start()
    for repetition in range(200):
        headers = part.headers.copy()
        headers["idx"]["repetition"] = repetition
        images = [e for e in session.feed(msgspec.structs.replace(part, headers=headers)) if isinstance(e, Image)]
        assert len(images) == 1
        lane = session._lanes[0][0]
        assert isinstance(lane, CartesianLane)
        places |= {held.lines.data_ptr() for held in lane._last.values()}
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert len(places) <= 6
    assert max(sizes[50:]) - min(sizes[50:]) < 256 << 10


def run_session(scan_header: ScanHeader, batches: Iterable[AcquisitionBatch]) -> list[Event]:
    session = Session(ConfigStore().get("default"))
    return [event for message in (scan_header, *batches, EndOfScan()) for event in session.feed(message)]


def test_lines_outside_the_matrix_are_told_in_the_image_and_its_statistics() -> None:
    scan = simulate_scan(32, 4, 1, 0, noise_readouts=0)
    batch = scan.batches[-1]
    headers = batch.headers.copy()
    headers["idx"]["kspace_encode_step_1"][3] = 4000
    events = run_session(scan.header, [AcquisitionBatch(headers=headers, samples=batch.samples)])
    (stats,) = (event for event in events if isinstance(event, FrameStats))
    (image,) = (event for event in events if isinstance(event, Image))
    assert (stats.outside, stats.missing, stats.outcome) == (1, 1, "incomplete")
    assert image.meta["scanside_outside_lines"] == ["1"]


def test_a_frame_without_any_finite_value_fails_and_sends_nothing() -> None:
    scan = simulate_scan(32, 4, 1, 0, noise_readouts=0)
    batch = scan.batches[-1]
    events = run_session(scan.header, [AcquisitionBatch(headers=batch.headers, samples=batch.samples * np.nan)])
    assert not [event for event in events if isinstance(event, Image)]
    assert [(e.outcome, e.reason) for e in events if isinstance(e, FrameStats)] == [("failed", "not_finite")]


def test_the_end_flag_of_a_navigator_ends_the_undersampled_frame() -> None:
    scan = simulate_scan(32, 4, 2, 8, noise_readouts=0)
    batch = scan.batches[-1]
    headers = batch.headers.copy()
    headers["flags"] &= ~np.uint64(
        AcquisitionFlag.LAST_IN_SLICE.bit
        | AcquisitionFlag.LAST_IN_REPETITION.bit
        | AcquisitionFlag.LAST_IN_MEASUREMENT.bit
    )
    navigator = headers[-1:].copy()
    navigator["flags"] = AcquisitionFlag.IS_NAVIGATION_DATA.bit | AcquisitionFlag.LAST_IN_REPETITION.bit
    session = Session(ConfigStore().get("default"))
    events = []
    for message in (
        scan.header,
        AcquisitionBatch(headers=headers, samples=batch.samples),
        AcquisitionBatch(headers=navigator, samples=batch.samples[-1:]),
    ):
        events += session.feed(message)
    assert [e.trigger for e in events if isinstance(e, FrameStats)] == ["flag"]


def test_calibration_of_another_shape_does_not_keep_the_scan_from_being_reconstructed() -> None:
    scan = simulate_scan(32, 4, 1, 0, noise_readouts=0)
    batch = scan.batches[-1]
    odd = batch.headers[:2].copy()
    odd["flags"] = AcquisitionFlag.IS_PARALLEL_CALIBRATION.bit
    odd["number_of_samples"], odd["center_sample"] = 16, 8
    calibration = AcquisitionBatch(headers=odd, samples=np.ascontiguousarray(batch.samples[:2, :, :16]))
    events = run_session(scan.header, [calibration, batch])
    assert [e.outcome for e in events if isinstance(e, FrameStats)] == ["complete"]


@pytest.mark.parametrize("acceleration", [1, 2])
@pytest.mark.parametrize("size", [1, 64])
def test_compressed_coils_give_nearly_the_same_image(acceleration: int, size: int) -> None:
    scan = simulate_scan(64, 12, acceleration, 24 if acceleration > 1 else 0, repetitions=2, noise=0.001)
    images: dict[str, list[np.ndarray]] = {}
    for channels in ("0", "8"):
        config = with_overrides(
            ConfigStore().get("default"), {"preparation.compressed_channels": channels}, source="test"
        )
        session = Session(config)
        messages = (scan.header, *scan.readouts(size), EndOfScan())
        events = [event for message in messages for event in session.feed(message)]
        images[channels] = [event.pixels[0, 0] for event in events if isinstance(event, Image)]
        (lane, _), *_ = session._lanes.values()
        assert isinstance(lane, CartesianLane)
        assert lane.coils == (12 if channels == "0" else 8)
    for whole, fewer in zip(*images.values(), strict=True):
        assert np.linalg.norm(whole - fewer) < 0.05 * np.linalg.norm(whole)
