"""Noise measurements in a folder: one process measures, another one uses it, and damage is no measurement."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scanside.adapters.files.noise import NoiseFiles
from scanside.engine.preparation.noise import NoiseModel


def model(channels: int = 3, seed: int = 0) -> NoiseModel:
    drawn = np.random.default_rng(seed).normal(size=(2, 1, channels, 50))
    return NoiseModel.from_readouts((drawn[0] + 1j * drawn[1]).astype(np.complex64), 5.0)


def same(a: NoiseModel, b: NoiseModel) -> bool:
    return torch.equal(a.covariance, b.covariance) and (a.dwell_time_us, a.samples) == (b.dwell_time_us, b.samples)


@given(
    measurement=st.text(min_size=1, max_size=300),
    channels=st.integers(1, 40),
    seed=st.integers(0, 1 << 32),
)
def test_what_one_process_measures_another_one_finds(measurement: str, channels: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        measured = model(channels, seed)
        NoiseFiles(Path(folder))[measurement] = measured
        found = NoiseFiles(Path(folder))
        assert same(found[measurement], measured)
        assert found.get(measurement + "x") is None


def test_the_newest_measurement_of_a_name_counts_for_all(tmp_path: Path) -> None:
    one, other = NoiseFiles(tmp_path), NoiseFiles(tmp_path)
    one["a"] = model(seed=1)
    assert same(other["a"], model(seed=1))
    one["a"] = model(4, seed=2)
    assert same(other["a"], model(4, seed=2))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    files = NoiseFiles(tmp_path, most=3)
    for number in range(5):
        before = set(tmp_path.iterdir())
        files[str(number)] = model(seed=number)
        (written,) = set(tmp_path.iterdir()) - before
        os.utime(written, (number, number))  # clocks of file systems are coarse
    assert list(files) == ["2", "3", "4"]
    assert [str(number) in NoiseFiles(tmp_path) for number in range(5)] == [False, False, True, True, True]


def test_without_a_folder_memory_serves() -> None:
    files = NoiseFiles(most=2)
    for name in "abc":
        files[name] = model()
    assert list(files) == ["b", "c"]
    del files["b"]
    assert "b" not in files
    assert len(files) == 1


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-5], lambda data: b"", lambda data: b"\xc0" + data, lambda data: data + b"0"]
)
def test_a_damaged_file_is_no_measurement(tmp_path: Path, damage: object) -> None:
    NoiseFiles(tmp_path)["a"] = model()
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert NoiseFiles(tmp_path).get("a") is None


def test_a_covariance_that_is_not_finite_is_no_measurement(tmp_path: Path) -> None:
    broken = model()
    broken.covariance[0, 0] = float("nan")
    NoiseFiles(tmp_path)["a"] = broken
    assert NoiseFiles(tmp_path).get("a") is None


def test_the_file_of_another_measurement_is_refused(tmp_path: Path) -> None:
    files = NoiseFiles(tmp_path)
    files["a"] = model()
    (first,) = tmp_path.iterdir()
    files["b"] = model()
    (second,) = set(tmp_path.iterdir()) - {first}
    first.replace(second)
    assert NoiseFiles(tmp_path).get("b") is None


def test_a_folder_that_takes_nothing_costs_the_file_alone(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    files = NoiseFiles(blocked)
    files["a"] = model()
    assert same(files["a"], model())
    del files["a"]
    assert len(files) == 0
