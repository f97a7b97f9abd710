"""A photoacoustic stream in memory: frames in, images out, and what is missing, doubled, dead or wrong on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scanside.engine.config import ConfigStore, SystemConfig, with_overrides
from scanside.engine.errors import ConfigError, LimitExceeded, PeerError
from scanside.engine.messages import (
    Adjustment,
    EndOfScan,
    EndOfStream,
    FrameStats,
    Image,
    MissingFrames,
    Note,
    PhotoacousticEvent,
    PhotoacousticFrame,
    PhotoacousticHeader,
)
from scanside.engine.simulation.photoacoustic import LiveScan, Spheres, ring, sphere_signals
from scanside.engine.streaming.photoacoustic import PhotoacousticSession
from scanside.engine.streaming.photoacoustic_reconstruction import enclosed_view
from scanside.engine.streaming.photoacoustic_shots import FLAG_CLIPPED, FLAG_LOST, FLAG_TRIGGER, FrameOrder

STORE = ConfigStore()
ELEMENTS, SAMPLES, RATE, RADIUS = 32, 400, 10e6, 20e-3
PLACE = (3e-3, -2e-3)
"""Center of the only sphere."""


def config(name: str = "pat/ubp", **overrides: Any) -> SystemConfig:
    values = {"photoacoustic.image_pixels": "40,40", "photoacoustic.field_of_view_m": "-0.01,0.01,-0.01,0.01"}
    paths = {f"photoacoustic.{name}": value for name, value in overrides.items()}
    return with_overrides(STORE.get(name), values | paths, source="test")


def header(**changes: Any) -> PhotoacousticHeader:
    values: dict[str, Any] = {
        "stream": "0" * 32,
        "elements": ELEMENTS,
        "samples": SAMPLES,
        "positions_m": ring(ELEMENTS, RADIUS),
        "sampling_rate_hz": RATE,
        "wavelengths_m": (800e-9,),
    }
    values |= changes
    return PhotoacousticHeader(**values, details={name: str(value) for name, value in values.items()})


SPHERE = Spheres(np.array([[*PLACE, 0.0]]), np.array([1e-3]), np.ones(1))
SIGNALS = sphere_signals(ring(ELEMENTS, RADIUS), SPHERE, SAMPLES, RATE)
SHOT = np.rint(SIGNALS / np.abs(SIGNALS).max() * 20000).astype(np.int16)


def frame(number: int, **changes: Any) -> PhotoacousticFrame:
    return PhotoacousticFrame(**({"seq": number, "shot": number, "samples": SHOT} | changes))


class Fed:
    """A session with its events so far, and those of the last message."""

    def __init__(self, settings: SystemConfig | None = None, first: PhotoacousticHeader | None = None) -> None:
        self.session = PhotoacousticSession(settings or config())
        self.events: list[PhotoacousticEvent] = []
        self.feed(first or header())

    def feed(self, *messages: Any) -> list[PhotoacousticEvent]:
        new = [event for message in messages for event in self.session.feed(message)]
        self.events += new
        return new

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def images(self) -> list[Image]:
        return self.of(Image)

    @property
    def texts(self) -> str:
        return "\n".join(note.text for note in self.of(Note))


def peak(image: Image) -> tuple[float, float]:
    """Where an image is brightest, in m."""
    row, column = np.unravel_index(np.argmax(image.pixels[0, 0]), image.pixels.shape[-2:])
    return float(-0.01 + (column + 0.5) * 0.02 / 40), float(-0.01 + (row + 0.5) * 0.02 / 40)


def meta(image: Image, name: str) -> str:
    return image.meta[f"scanside_{name}"][0]


# --- what comes out ----------------------------------------------------------------------------------------------------------


def test_a_shot_becomes_an_image_at_once_with_its_place_and_provenance() -> None:
    fed = Fed()
    fed.feed(frame(0, timestamp_s=1.5))
    (image,), (stats,) = fed.images, fed.of(FrameStats)
    assert peak(image) == pytest.approx(PLACE, abs=0.8e-3)
    assert image.header["field_of_view"].tolist() == pytest.approx([20.0, 20.0, 0.0])
    assert image.header["matrix_size"].tolist() == [40, 40, 1]
    assert int(image.header["acquisition_time_stamp"]) == 600
    assert (meta(image, "method"), meta(image, "outcome"), meta(image, "shot")) == ("ubp", "complete", "0")
    assert (meta(image, "speed_of_sound"), meta(image, "wavelength_nm")) == ("1500", "800")
    assert (stats.pipeline, stats.outcome, stats.trigger, stats.missing) == ("pat/ubp", "complete", "coverage", 0)
    assert stats.stages.keys() == {"wait", "beamform"}


def test_images_of_a_stream_are_numbered_and_keep_their_own_pixels() -> None:
    fed = Fed()
    fed.feed(frame(0), frame(1, samples=-SHOT))
    first, second = fed.images
    assert [int(image.header["image_index"]) for image in fed.images] == [1, 2]
    assert np.allclose(first.pixels, -second.pixels, rtol=1e-3, atol=1e-3 * np.abs(first.pixels).max())


def test_field_of_view_and_pixels_follow_the_wishes_of_the_stream() -> None:
    wish = header(pixels=(24, 16), field_of_view_m=(-0.006, 0.006, -0.004, 0.004))
    fed = Fed(first=wish)
    fed.feed(frame(0))
    assert fed.images[0].pixels.shape == (1, 1, 16, 24)
    assert fed.images[0].header["field_of_view"].tolist() == pytest.approx([12.0, 8.0, 0.0])
    ignored = Fed(config(follow_wishes=False), wish)
    ignored.feed(frame(0))
    assert ignored.images[0].pixels.shape == (1, 1, 40, 40)


@pytest.mark.parametrize("span", [90.0, 180.0, 360.0])
def test_the_field_of_view_is_found_around_the_center_of_the_array(span: float) -> None:
    positions = ring(64, 0.04, span) + np.array([0.01, -0.02, 0.0])
    assert enclosed_view(positions) == pytest.approx((-0.008, 0.028, -0.038, -0.002), abs=1e-9)


def test_an_array_on_a_line_needs_a_field_of_view() -> None:
    line = np.zeros((ELEMENTS, 3))
    line[:, 0] = np.linspace(-0.02, 0.02, ELEMENTS)
    with pytest.raises(ConfigError, match="field_of_view"):
        Fed(config(field_of_view_m="0,0,0,0"), header(positions_m=line))
    assert Fed(config(), header(positions_m=line)).feed(frame(0))


# --- order -------------------------------------------------------------------------------------------------------------------


def test_a_gap_is_counted_marked_and_asked_for() -> None:
    fed = Fed()
    fed.feed(frame(0), frame(4), frame(5))
    assert fed.of(MissingFrames) == [MissingFrames(1, 3)]
    assert [meta(image, "frames_missing") for image in fed.images] == ["0", "3", "0"]
    assert [stats.missing for stats in fed.of(FrameStats)] == [0, 3, 0]
    assert fed.session.counts["missing"] == 3
    assert "frames 1 to 3 are missing" in fed.texts


def test_duplicates_are_dropped_and_counted() -> None:
    fed = Fed()
    fed.feed(frame(0), frame(1), frame(0), frame(1), frame(2))
    assert [meta(image, "shot") for image in fed.images] == ["0", "1", "2"]
    assert fed.session.counts["duplicates"] == 2
    assert fed.of(FrameStats)[-1].duplicates == 2


def test_a_frame_that_comes_late_is_no_longer_missing_and_no_duplicate() -> None:
    fed = Fed()
    fed.feed(frame(0), frame(2), frame(1))
    assert (fed.session.counts["missing"], fed.session.counts["late"], fed.session.counts["duplicates"]) == (0, 1, 0)
    fed.feed(frame(1))
    assert fed.session.counts["duplicates"] == 1


def test_a_damaged_frame_is_missing_until_it_comes_again() -> None:
    fed = Fed()
    fed.feed(frame(0, intact=False))
    assert not fed.images
    assert fed.of(MissingFrames) == [MissingFrames(0, 0)]
    fed.feed(frame(0))
    assert fed.session.counts["missing"] == 0


def test_what_is_missing_at_the_end_is_known_from_the_sender() -> None:
    fed = Fed()
    fed.feed(frame(0), EndOfStream(last=3, frames=4), EndOfScan())
    assert fed.of(MissingFrames) == [MissingFrames(1, 3)]
    assert "3 missing" in fed.texts


def test_the_first_frame_sets_the_start() -> None:
    fed = Fed()
    fed.feed(frame(1000), frame(1001))
    assert fed.session.counts["missing"] == 0
    assert len(fed.images) == 2


@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), min_size=1, max_size=120))
def test_the_order_agrees_with_a_plain_set_of_numbers(arrivals: list[tuple[int, bool]]) -> None:
    order, start = FrameOrder(), arrivals[0][0]
    good: set[int] = set()
    highest = start - 1
    for number, intact in arrivals:
        verdict = order.take(frame(number, intact=intact))
        fresh = number >= start and number not in good
        assert verdict.usable == (fresh and intact)
        assert verdict.duplicate == (not fresh)
        highest = max(highest, number)
        good |= {number} if verdict.usable else set()
        assert order.missing == len(set(range(start, highest + 1)) - good)
        assert order.next == highest + 1


# --- shots in parts ----------------------------------------------------------------------------------------------------------


def parts(number: int, count: int, first_seq: int, **changes: Any) -> Iterator[PhotoacousticFrame]:
    size = ELEMENTS // count
    for index in range(count):
        rows = SHOT[index * size : (index + 1) * size]
        yield frame(first_seq + index, shot=number, samples=rows, first_element=index * size, **changes)


@given(st.sampled_from([2, 4, 8]), st.randoms(use_true_random=False))
def test_parts_in_any_order_make_the_image_of_the_whole(count: int, random: Any) -> None:
    whole = Fed()
    whole.feed(frame(0))
    views = list(parts(0, count, 0))
    order = list(views)
    random.shuffle(order)
    fed = Fed()
    for seq, part in enumerate(order):
        assert not fed.images
        fed.feed(msgspec.structs.replace(part, seq=seq))
    assert np.array_equal(fed.images[0].pixels, whole.images[0].pixels)
    assert fed.of(FrameStats)[0].readouts == count


def test_a_shot_without_some_parts_is_imaged_and_marked_and_never_completed_by_another() -> None:
    fed = Fed()
    first, second = list(parts(0, 4, 0)), list(parts(1, 4, 4))
    fed.feed(*first[:2], *second)
    incomplete, complete = fed.images
    assert (meta(incomplete, "outcome"), meta(incomplete, "reason")) == ("incomplete", "elements_missing")
    assert meta(incomplete, "elements_left_out") == str(ELEMENTS // 2)
    assert [(meta(image, "frames_missing")) for image in (incomplete, complete)] == ["2", "0"]
    assert meta(complete, "outcome") == "complete"
    dead = Fed(first=header(dead=tuple(range(ELEMENTS // 2, ELEMENTS))))
    dead.feed(frame(0))
    assert np.allclose(incomplete.pixels, dead.images[0].pixels, rtol=1e-4, atol=1e-3)


def test_a_missing_part_that_comes_in_time_completes_its_shot() -> None:
    fed = Fed()
    views = list(parts(0, 4, 0))
    fed.feed(views[0], views[2], views[3], views[1])
    assert meta(fed.images[0], "outcome") == "complete"
    assert fed.session.counts["late"] == 1


def test_the_end_of_the_scan_images_the_shot_that_is_open() -> None:
    fed = Fed()
    fed.feed(*list(parts(0, 4, 0))[:3], EndOfScan(complete=False))
    assert fed.of(FrameStats)[0].trigger == "close"
    assert "cut off" in fed.texts
    with pytest.raises(PeerError, match="after the end"):
        fed.feed(frame(9))


# --- averages ----------------------------------------------------------------------------------------------------------------


def test_averages_are_those_of_the_samples(rng: np.random.Generator) -> None:
    shots = [np.clip(SHOT + rng.normal(0, 2000, SHOT.shape), -32000, 32000).astype(np.int16) for _ in range(4)]
    fed = Fed(first=header(averages=4))
    fed.feed(*(frame(n, samples=shot) for n, shot in enumerate(shots)))
    mean = np.mean(np.array(shots, np.float64), axis=0)
    assert np.abs(mean - np.rint(mean)).max() > 0.1
    scaled = Fed()
    scaled.feed(frame(0, samples=np.rint(mean).astype(np.int16)))
    assert len(fed.images) == 1
    assert meta(fed.images[0], "averaged") == "4"
    assert fed.of(FrameStats)[0].trigger == "count"
    difference = np.abs(fed.images[0].pixels - scaled.images[0].pixels).max()
    assert difference < 1e-3 * np.abs(scaled.images[0].pixels).max()


def test_nothing_is_averaged_across_a_gap() -> None:
    fed = Fed(first=header(averages=3))
    fed.feed(frame(0), frame(1, samples=np.zeros_like(SHOT)), frame(3), frame(4), frame(5))
    assert [meta(image, "averaged") for image in fed.images] == ["2", "3"]
    assert [meta(image, "outcome") for image in fed.images] == ["incomplete", "complete"]
    alone = Fed()
    alone.feed(frame(0))
    assert np.allclose(fed.images[1].pixels, alone.images[0].pixels, rtol=1e-4, atol=1e-3)


def test_a_device_that_says_it_lost_data_breaks_the_average_too() -> None:
    fed = Fed(first=header(averages=2))
    fed.feed(frame(0), frame(1, flags=FLAG_LOST), frame(2))
    assert [meta(image, "averaged") for image in fed.images] == ["1", "2"]
    assert "lost data before frame 1" in fed.texts


# --- pulses, gains, wavelengths ----------------------------------------------------------------------------------------------


def test_pulse_energies_are_evened_out() -> None:
    fed = Fed()
    half = (SHOT // 2 * 2 // 2).astype(np.int16)
    fed.feed(frame(0, samples=SHOT // 2 * 2, pulse_energy_joule=0.02), frame(1, samples=half, pulse_energy_joule=0.01))
    first, second = fed.images
    assert np.allclose(first.pixels, second.pixels, rtol=1e-4, atol=1e-3)


def test_gains_of_elements_are_taken_out(rng: np.random.Generator) -> None:
    gains = rng.uniform(0.5, 1.5, ELEMENTS)
    rest = 100.0
    samples = np.rint(SHOT * gains[:, None] + rest).astype(np.int16)
    fed = Fed(first=header(element_gain=gains, adc_offset=rest))
    fed.feed(frame(0, samples=samples))
    plain = Fed()
    plain.feed(frame(0))
    difference = np.abs(fed.images[0].pixels - plain.images[0].pixels).max()
    assert difference < 2e-3 * np.abs(plain.images[0].pixels).max()


def test_an_unsigned_stream_with_its_offset_gives_the_same_image() -> None:
    fed = Fed(first=header(data_type="uint16", adc_offset=32768.0))
    fed.feed(frame(0, samples=(SHOT.astype(np.int32) + 32768).astype(np.uint16)))
    plain = Fed()
    plain.feed(frame(0))
    assert np.allclose(fed.images[0].pixels, plain.images[0].pixels, rtol=1e-4, atol=1e-2)


def test_wavelengths_are_imaged_apart_and_unmixed_together() -> None:
    scan = LiveScan(elements=64, samples=1600, wavelengths_m=(750e-9, 850e-9), noise=0.0, rate_hz=1e9)
    fed = Fed(config(image_pixels="64,64"), msgspec.structs.replace(scan.header, pixels=(128, 128)))
    fed.feed(scan.frame(0), scan.frame(1))
    what = [image.meta["ImageComment"][0] for image in fed.images]
    assert what == ["pressure", "pressure", "oxyhaemoglobin", "deoxyhaemoglobin", "saturation"]
    assert [int(image.header["contrast"]) for image in fed.images[:2]] == [0, 1]
    assert len({int(image.header["image_series_index"]) for image in fed.images}) == 4
    saturation = fed.images[-1].pixels[0, 0]
    for name, oxygen in (("arteries", 0.97), ("veins", 0.70)):
        where = scan.parts[name].picture((128, 128), (-12.5e-3, 12.5e-3, -12.5e-3, 12.5e-3)) > 0
        others = [part for other, part in scan.parts.items() if other != name]
        for part in others:
            where &= part.picture((128, 128), (-12.5e-3, 12.5e-3, -12.5e-3, 12.5e-3)) == 0
        bright = where & (fed.images[1].pixels[0, 0] > 0.3 * fed.images[1].pixels.max())
        assert np.nanmedian(saturation[bright]) == pytest.approx(oxygen, abs=0.05), name


def test_a_gap_keeps_wavelengths_of_different_rounds_apart() -> None:
    fed = Fed(first=header(wavelengths_m=(750e-9, 850e-9)))
    fed.feed(frame(0, wavelength=0), frame(2, wavelength=1))
    assert [image.meta["ImageComment"][0] for image in fed.images] == ["pressure"] * 2
    fed.feed(frame(3, wavelength=0))
    assert len(fed.images) == 2 + 1 + 3


def test_wavelengths_without_spectra_are_imaged_without_unmixing() -> None:
    fed = Fed(first=header(wavelengths_m=(532e-9, 1064e-9)))
    fed.feed(frame(0, wavelength=0), frame(1, wavelength=1))
    assert len(fed.images) == 2
    assert "no spectra of haemoglobin at 532 nm" in fed.texts


# --- elements without a signal, clipping, triggers ---------------------------------------------------------------------------


def test_dead_elements_of_the_header_do_not_change_the_picture_much() -> None:
    broken = SHOT.copy()
    broken[[3, 17]] = 25000
    fed = Fed(first=header(dead=(3, 17)))
    fed.feed(frame(0, samples=broken))
    plain = Fed()
    plain.feed(frame(0))
    assert peak(fed.images[0]) == pytest.approx(peak(plain.images[0]), abs=0.6e-3)
    assert meta(fed.images[0], "elements_left_out") == "2"


def test_elements_that_do_not_change_are_found_in_the_first_shot() -> None:
    flat = SHOT.copy()
    flat[[5, 6]] = 1234
    found = Fed()
    found.feed(frame(0, samples=flat))
    told = Fed(first=header(dead=(5, 6)))
    told.feed(frame(0, samples=flat))
    assert "2 elements do not change and are left out: 5, 6" in found.texts
    assert np.array_equal(found.images[0].pixels, told.images[0].pixels)


def test_when_all_elements_are_dead_shots_are_counted_as_failed() -> None:
    fed = Fed(first=header(dead=tuple(range(ELEMENTS))))
    fed.feed(frame(0), frame(1), EndOfScan())
    assert not fed.images
    assert [(stats.outcome, stats.reason) for stats in fed.of(FrameStats)] == [("failed", "dead_elements")] * 2
    assert "all elements are dead" in fed.texts


def test_a_shot_without_any_light_kills_no_element() -> None:
    fed = Fed()
    fed.feed(frame(0, samples=np.full_like(SHOT, 7)), frame(1))
    assert meta(fed.images[1], "elements_left_out") == "0"
    assert peak(fed.images[1]) == pytest.approx(PLACE, abs=0.8e-3)


@pytest.mark.parametrize(
    ("change", "flags", "reason"),
    [(32767, 0, "clipped"), (-32768, 0, "clipped"), (0, FLAG_CLIPPED, "clipped"), (0, FLAG_TRIGGER, "trigger_error")],
)
def test_clipping_and_trigger_errors_are_marked(change: int, flags: int, reason: str) -> None:
    samples = SHOT.copy()
    samples[0, 0] = change
    fed = Fed()
    fed.feed(frame(0, samples=samples, flags=flags))
    assert (meta(fed.images[0], "outcome"), meta(fed.images[0], "reason")) == ("degraded", reason)
    assert fed.of(FrameStats)[0].outcome == "degraded"


def test_notes_of_one_kind_do_not_flood_the_console() -> None:
    fed = Fed()
    fed.feed(*(frame(2 * n) for n in range(50)))
    told = Counter(note.text.split(" is ")[-1][:20] for note in fed.of(Note))
    assert sum(told.values()) == 8
    assert fed.session.counts["missing"] == 49


# --- what is wrong -----------------------------------------------------------------------------------------------------------


def test_another_number_of_elements_in_the_middle_needs_a_new_header() -> None:
    fed = Fed()
    fed.feed(frame(0))
    wide = np.zeros((ELEMENTS * 2, SAMPLES), np.int16)
    with pytest.raises(PeerError, match="send a new header first"):
        fed.feed(frame(1, samples=wide))
    fed.feed(header(elements=2 * ELEMENTS, positions_m=ring(2 * ELEMENTS, RADIUS)), frame(2, samples=wide + 1))
    assert len(fed.images) == 2
    assert "a new header" in fed.texts


def test_the_same_header_again_changes_nothing() -> None:
    fed = Fed(first=header(averages=2))
    fed.feed(frame(0), header(averages=2), frame(1))
    assert [meta(image, "averaged") for image in fed.images] == ["2"]


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (frame(0, samples=SHOT[:, :-1]), "399 samples"),
        (frame(0, samples=SHOT[:8], first_element=ELEMENTS - 4), "from element 28"),
        (frame(0, wavelength=3), "wavelength 3 of 1"),
    ],
    ids=["samples", "elements", "wavelength"],
)
def test_frames_that_do_not_fit_end_the_session(message: PhotoacousticFrame, says: str) -> None:
    fed = Fed()
    with pytest.raises(PeerError, match=says):
        fed.feed(message)


def test_a_frame_before_the_header_is_refused() -> None:
    with pytest.raises(PeerError, match="before the header"):
        list(PhotoacousticSession(config()).feed(frame(0)))


def test_memory_is_checked_before_it_is_taken() -> None:
    settings = with_overrides(config(), {"limits.session_bytes": 100_000}, source="test")
    with pytest.raises(LimitExceeded, match="session_bytes"):
        Fed(settings)
    with pytest.raises(LimitExceeded, match=r"limits\.matrix"):
        Fed(config(), header(pixels=(100_000, 100_000)))


def test_a_configuration_for_mri_is_refused() -> None:
    with pytest.raises(ConfigError, match="pat/das"):
        PhotoacousticSession(STORE.get("default"))


# --- while it runs -----------------------------------------------------------------------------------------------------------


def test_speed_of_sound_and_delay_change_while_the_stream_runs() -> None:
    fed = Fed()
    fed.feed(frame(0), Adjustment({"speed_of_sound": "1560", "delay_samples": 2.5}), frame(1))
    assert (meta(fed.images[0], "speed_of_sound"), meta(fed.images[0], "delay_samples")) == ("1500", "0")
    assert (meta(fed.images[1], "speed_of_sound"), meta(fed.images[1], "delay_samples")) == ("1560", "2.5")
    straight = Fed(config(speed_of_sound=1560.0, delay_samples=2.5))
    straight.feed(frame(0))
    assert np.allclose(fed.images[1].pixels, straight.images[0].pixels, rtol=1e-4, atol=1e-2)


def test_averages_change_while_the_stream_runs() -> None:
    fed = Fed()
    fed.feed(frame(0), Adjustment({"averages": 2}), frame(1), frame(2))
    assert [meta(image, "averaged") for image in fed.images] == ["1", "2"]


@pytest.mark.parametrize("start", [-20.0, -7.5, 12.0, 20.0])
def test_autofocus_finds_the_delay_again(start: float) -> None:
    fed = Fed(config(delay_samples=start))
    fed.feed(frame(0), Adjustment({"autofocus": "delay"}), frame(1))
    assert float(meta(fed.images[1], "delay_samples")) == pytest.approx(0, abs=1)
    assert "autofocus: delay" in fed.texts


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("start", [-20.0, 20.0])
def test_autofocus_finds_the_delay_of_noisy_spheres_again(seed: int, start: float) -> None:
    rng = np.random.default_rng(seed)
    places = np.hstack([rng.uniform(-6e-3, 6e-3, (6, 2)), np.zeros((6, 1))])
    spheres = Spheres(places, rng.uniform(0.3e-3, 1.5e-3, 6), rng.uniform(0.5, 1, 6))
    signals = sphere_signals(ring(64, RADIUS), spheres, 2 * SAMPLES, 2 * RATE)
    signals = signals / np.abs(signals).max() + 0.05 * rng.normal(size=signals.shape)
    first = header(elements=64, samples=2 * SAMPLES, sampling_rate_hz=2 * RATE, positions_m=ring(64, RADIUS))
    fed, shot = Fed(config(delay_samples=start), first), np.rint(signals * 20000).astype(np.int16)
    fed.feed(frame(0, samples=shot), Adjustment({"autofocus": "delay"}), frame(1, samples=shot))
    assert float(meta(fed.images[1], "delay_samples")) == pytest.approx(0, abs=1)


@pytest.mark.parametrize("speed", [1470.0, 1535.0])
def test_autofocus_finds_the_speed_of_sound_of_the_first_shot(speed: float) -> None:
    fed = Fed(config(autofocus="speed_of_sound"), header(speed_of_sound=speed))
    fed.feed(frame(0))
    assert float(meta(fed.images[0], "speed_of_sound")) == pytest.approx(1500, abs=6)


def refocused(
    signals: np.ndarray, degrees: float, radius: float, wrong: int, band: str, first_sample: float = 0
) -> float:
    """Delay that autofocus finds for a ring at 50 MHz with a wrong radius, in samples: one wrong by n is a delay of n."""
    angles = np.deg2rad(degrees) * np.arange(len(signals))
    positions = (radius + wrong) * 1500 / 50e6 * np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    elements, samples = signals.shape
    first = header(
        elements=elements, samples=samples, sampling_rate_hz=50e6, positions_m=positions, t0_samples=first_sample
    )
    view = {"image_pixels": "128,128", "field_of_view_m": "-0.016,0.016,-0.016,0.016"}
    fed = Fed(config("pat/das", band_hz=band, **view), first)
    shot = np.rint(signals / np.abs(signals).max() * 32000).astype(np.int16)
    fed.feed(frame(0, samples=shot), Adjustment({"autofocus": "delay"}), frame(1, samples=shot))
    return float(meta(fed.images[1], "delay_samples")) - first_sample


@pytest.mark.parametrize("wrong", [-22, -20, -18, -9, 13, 20, 22])
def test_autofocus_finds_a_wrong_radius_of_measured_spheres_again(real_data: Any, wrong: int) -> None:
    """The radius of 1460 samples was found by eye."""
    signals = np.load(real_data("pat/three_spheres_512x2000.npz"))["sinogram"]
    found, right = (refocused(signals, 360 / 512, 1460, by, "150e3,3.5e6") for by in (wrong, 0))
    assert found - right == pytest.approx(wrong, abs=1)
    assert abs(right) < 1
    assert abs(found - wrong) < 1


@pytest.mark.parametrize("wrong", [-20, -17, 20, 22])
@pytest.mark.parametrize("samples", [slice(None), slice(1200, 2450)])
def test_autofocus_finds_a_wrong_radius_of_a_measured_letter_again(real_data: Any, wrong: int, samples: slice) -> None:
    """A few bright spots, 31 samples off, are more concentrated than the letter, but have less energy."""
    signals = np.load(real_data("pat/t_phantom_175x3500.npz"))["sinogram"][:, samples]
    first = float(samples.start or 0)
    found, right = (refocused(signals, 2, 1660, by, "100e3,4e6", first) for by in (wrong, 0))
    assert found - right == pytest.approx(wrong, abs=1)
    assert abs(right) < 1
    assert abs(found - wrong) < 1


@pytest.mark.parametrize("wrong", [-20, 20])
@pytest.mark.parametrize(("every", "first"), [(2, 0), (2, 1), (4, 0)])
def test_autofocus_finds_a_wrong_radius_with_a_part_of_the_elements(
    real_data: Any, wrong: int, every: int, first: int
) -> None:
    """To a sample of what the same elements say from close by, and to three of what is best for all of them."""
    signals = np.load(real_data("pat/three_spheres_512x2000.npz"))["sinogram"][first::every]
    found, right = (refocused(signals, 360 / 512 * every, 1460, by, "150e3,3.5e6") for by in (wrong, 0))
    assert found - right == pytest.approx(wrong, abs=1)
    assert abs(right) < 3


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"speed_of_sound": 3e8}, "expected 300 to 10000 m/s"),
        ({"speed_of_sound": "fast"}, "expected 300"),
        ({"speed_of_sound": float("nan")}, "expected 300"),
        ({"averages": 0}, "expected 1 to 4096 shots"),
        ({"autofocus": "magic"}, "allowed: delay, speed_of_sound"),
        ({"autofocus": "delay"}, "no whole shot yet"),
        ({"limits.sessions": 1}, "cannot be adjusted"),
    ],
)
def test_wrong_adjustments_are_told_and_change_nothing(values: dict[str, Any], says: str) -> None:
    fed = Fed()
    (note,) = fed.feed(Adjustment(values))
    assert isinstance(note, Note)
    assert note.level == "error"
    assert says in note.text
    fed.feed(frame(0))
    assert meta(fed.images[0], "speed_of_sound") == "1500"


def test_adjusting_before_the_header_is_told() -> None:
    session = PhotoacousticSession(config())
    (note,) = session.feed(Adjustment({"speed_of_sound": 1500}))
    assert isinstance(note, Note)
    assert "before the header" in note.text


@given(st.lists(st.sampled_from(["frame", "part", "gap", "again", "header", "adjust"]), max_size=30))
def test_any_order_of_messages_leaves_the_counts_consistent(steps: Sequence[str]) -> None:
    fed, seq, shot = Fed(), 0, 0
    for step in steps:
        if step == "gap":
            seq += 2
        elif step == "again":
            fed.feed(frame(max(0, seq - 1), shot=max(0, shot - 1)))
            seq, shot = max(seq, 1), max(shot, 1)
        elif step == "header":
            fed.feed(header())
        elif step == "adjust":
            fed.feed(Adjustment({"averages": 2}))
        else:
            rows = SHOT if step == "frame" else SHOT[:8]
            fed.feed(frame(seq, shot=shot, samples=rows))
            seq, shot = seq + 1, shot + 1
    fed.feed(EndOfScan())
    counts = fed.session.counts
    assert counts["images"] == len(fed.images) == counts["complete"] + counts["incomplete"] + counts["degraded"]
    assert len(fed.of(FrameStats)) == counts["images"] + counts["failed"]
