"""Kinds of readouts and runs: all combinations of flags, and runs as a partition."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.config import TriggerConfig
from scanside.engine.headers import ACQUISITION_HEADER, AcquisitionFlag
from scanside.engine.messages import FrameKey
from scanside.engine.streaming.layout import frame_key
from scanside.engine.streaming.triggers import ReadoutKind, TriggerPolicy, kinds, runs

OTHER = {"IS_NAVIGATION_DATA", "IS_PHASECORR_DATA", "IS_HPFEEDBACK_DATA", "IS_DUMMYSCAN_DATA", "IS_RTFEEDBACK_DATA"}
OTHER |= {"IS_SURFACECOILCORRECTIONSCAN_DATA", "IS_PHASE_STABILIZATION_REFERENCE", "IS_PHASE_STABILIZATION"}
ENDS = {"LAST_IN_SLICE", "LAST_IN_REPETITION", "LAST_IN_MEASUREMENT"}

flag_sets = st.sets(st.sampled_from([flag.name for flag in AcquisitionFlag]))


def word(flags: set[str]) -> int:
    return sum(AcquisitionFlag[flag].bit for flag in flags)


def documented(flags: set[str]) -> ReadoutKind:
    if "IS_NOISE_MEASUREMENT" in flags:
        return ReadoutKind.NOISE
    if flags & OTHER:
        return ReadoutKind.OTHER
    if "IS_PARALLEL_CALIBRATION" in flags and "IS_PARALLEL_CALIBRATION_AND_IMAGING" not in flags:
        return ReadoutKind.CALIBRATION
    return ReadoutKind.IMAGING


@given(st.lists(flag_sets, max_size=6))
@settings(max_examples=300, deadline=None)
def test_kinds_of_all_combinations_of_flags(flags: list[set[str]]) -> None:
    words = np.array([word(one) for one in flags], np.uint64)
    assert kinds(words).tolist() == [documented(one) for one in flags]


def test_flags_of_users_and_of_compression_mean_nothing() -> None:
    words = np.uint64(1) << np.arange(52, 64, dtype=np.uint64)
    assert (kinds(words) == ReadoutKind.IMAGING).all()


readouts = st.tuples(flag_sets, st.integers(0, 1), st.integers(0, 1), st.integers(0, 1), st.integers(0, 9))


@given(st.lists(readouts, max_size=12))
@settings(max_examples=200, deadline=None)
def test_runs_are_a_partition_into_one_kind_and_one_frame(items: list[tuple[set[str], int, int, int, int]]) -> None:
    headers = np.zeros(len(items), ACQUISITION_HEADER)
    for header, (flags, repetition, contrast, encoding, row) in zip(headers, items, strict=True):
        header["flags"], header["encoding_space_ref"] = word(flags), encoding
        header["idx"]["repetition"], header["idx"]["contrast"] = repetition, contrast
        header["idx"]["kspace_encode_step_1"], header["idx"]["segment"] = row, row
    found = list(runs(headers))
    assert [i for part, _ in found for i in range(part.start, part.stop)] == list(range(len(items)))
    for part, kind in found:
        assert {documented(flags) for flags, *_ in items[part]} == {kind}
        assert len({frame_key(header) for header in headers[part]}) == 1
        assert not any(flags & ENDS for flags, *_ in items[part][:-1])
    for (before, kind), (after, next_kind) in itertools.pairwise(found):
        same = kind == next_kind and frame_key(headers[before][-1]) == frame_key(headers[after][0])
        assert not same or items[before][-1][0] & ENDS


def last(*flags: str, average: int = 0) -> np.ndarray:
    header = np.zeros((), ACQUISITION_HEADER)
    header["flags"], header["idx"]["average"] = word(set(flags)), average
    return header


OPENED = [FrameKey(repetition=r, slice=s) for r in (1, 0) for s in (1, 0)]


def test_flags_end_what_they_say() -> None:
    policy, key = TriggerPolicy(TriggerConfig(), 1), FrameKey(repetition=1, slice=0)
    assert policy.flagged(last(), key, OPENED) == []
    assert policy.flagged(last("LAST_IN_SLICE"), key, OPENED) == [key]
    assert policy.flagged(last("LAST_IN_SLICE"), FrameKey(slice=5), OPENED) == []
    assert policy.flagged(last("LAST_IN_REPETITION"), key, OPENED) == [key, FrameKey(repetition=1, slice=1)]
    assert policy.flagged(last("LAST_IN_MEASUREMENT"), key, OPENED) == sorted(OPENED)
    assert policy.flagged(last("LAST_IN_ENCODE_STEP1", "LAST_IN_AVERAGE", "LAST_IN_SEGMENT"), key, OPENED) == []


def test_flags_of_early_averages_end_nothing() -> None:
    policy, key = TriggerPolicy(TriggerConfig(), 2), FrameKey(repetition=1, slice=0)
    assert policy.flagged(last("LAST_IN_SLICE", "LAST_IN_REPETITION"), key, OPENED) == []
    assert policy.flagged(last("LAST_IN_SLICE", average=1), key, OPENED) == [key]
    assert policy.flagged(last("LAST_IN_MEASUREMENT"), key, OPENED) == sorted(OPENED)


def test_a_count_is_named_before_coverage() -> None:
    policy = TriggerPolicy(TriggerConfig(acquisitions=3), 1)
    assert policy.counted(2, covered=False) is None
    assert policy.counted(2, covered=True) == "coverage"
    assert policy.counted(3, covered=True) == "count"


@given(st.integers(0, 65535), st.integers(1, 32767))
@settings(deadline=None)
def test_a_repetition_is_over_when_a_later_one_begins(repetition: int, further: int) -> None:
    policy = TriggerPolicy(TriggerConfig(), 1)
    now, later = FrameKey(repetition=repetition), FrameKey(repetition=(repetition + further) % 65536)
    assert policy.changed(later, [now, later]) == [now]
    assert policy.changed(now, [now, later]) == []
    assert policy.changed(FrameKey(repetition=later.repetition, encoding=1), [now]) == []
