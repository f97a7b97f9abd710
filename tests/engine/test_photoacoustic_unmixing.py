"""Spectra of haemoglobin and linear unmixing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scanside.engine.errors import ConfigError
from scanside.engine.streaming.photoacoustic_unmixing import Unmixer, absorption_per_metre

WHOLE_BLOOD = 150 / 64.5e3 * 1e3 / 1e3
"""mol/l of haemoglobin: 150 g/l of 64 500 g/mol."""


def test_the_spectra_cross_where_the_literature_has_the_isosbestic_point() -> None:
    """Near 797 nm both absorb alike (Horecker 1943; Prahl's table crosses between 796 and 798 nm)."""
    below, above = absorption_per_metre([790e-9, 804e-9])
    assert below[0] < below[1]
    assert above[0] > above[1]


def test_absorption_of_whole_blood_is_that_of_textbooks() -> None:
    """Jacques 2013 has about 4 to 5 per cm for oxygenated blood of 150 g/l at 800 nm: 2.303 * 816 * 150 / 64500 = 4.37."""
    assert absorption_per_metre([800e-9])[0, 0] * WHOLE_BLOOD == pytest.approx(437, rel=1e-2)


concentrations = st.floats(1e-4, 1e-2)


@given(concentrations, concentrations, st.lists(st.integers(660, 990), min_size=2, max_size=6, unique=True))
def test_what_was_mixed_is_found_again(oxy: float, deoxy: float, nanometres: list[int]) -> None:
    wavelengths = [nm * 1e-9 for nm in nanometres]
    spectra = absorption_per_metre(wavelengths)
    try:
        unmixer = Unmixer(wavelengths)
    except ConfigError as error:
        assert np.linalg.cond(spectra / spectra.max()) > 50, error
        return
    images = [np.full((2, 3), value, np.float32) for value in spectra @ [oxy, deoxy]]
    found = unmixer.unmix(images)
    assert np.allclose(found.oxy, oxy, rtol=2e-3, atol=2e-3 * max(oxy, deoxy))
    assert np.allclose(found.deoxy, deoxy, rtol=2e-3, atol=2e-3 * max(oxy, deoxy))
    assert np.allclose(found.saturation, oxy / (oxy + deoxy), atol=5e-3)


def test_saturation_is_unknown_where_there_is_no_blood_and_never_outside_its_range(rng: np.random.Generator) -> None:
    images = [rng.normal(0, 1, (8, 8)).astype(np.float32) for _ in range(2)]
    images[0][0, 0], images[1][0, 0] = 1e4, 1e4
    saturation = Unmixer([750e-9, 850e-9]).unmix(images).saturation
    assert np.isnan(saturation[1:]).all()
    assert 0 <= saturation[0, 0] <= 1


@pytest.mark.parametrize(
    ("wavelengths", "says"),
    [
        ([800e-9], "two different wavelengths"),
        ([800e-9, 800e-9], "two different wavelengths"),
        ([532e-9, 800e-9], "no spectra of haemoglobin at 532 nm"),
        ([870e-9, 872e-9], "look alike"),
    ],
)
def test_wavelengths_that_cannot_be_unmixed_are_refused(wavelengths: list[float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Unmixer(wavelengths)
