"""Oxy- and deoxyhaemoglobin from images at several wavelengths, by linear least squares per pixel."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

__all__ = ["CHROMOPHORES", "SPECTRA_NM", "Concentrations", "Unmixer", "absorption_per_metre"]

CHROMOPHORES = ("oxyhaemoglobin", "deoxyhaemoglobin")
_WAVELENGTHS, _OXY, _DEOXY = range(3)
_TEXT = """
650 368 3750.12    660 319.6 3226.56   670 294 2795.12     680 277.6 2407.92   690 276 2051.96     700 290 1794.28
710 314 1540.48    720 348 1325.88     730 390 1102.2      738 432.4 1100.48   740 446 1115.88     742 459.6 1161.64
744 473.2 1207.4   746 487.6 1266.04   748 502.8 1333.24   750 518 1405.24     752 533.2 1515.32   754 548.4 1541.76
756 562 1560.48    758 574 1560.48     760 586 1548.52     762 598 1508.44     770 650 1311.88     780 710 1075.44
790 756 890.8      796 786.4 802.96    798 807.2 782.36    800 816 761.72      802 828 743.84      810 864 717.08
820 916 693.76     830 974 693.04      840 1022 692.36     850 1058 691.32     860 1092 694.32     870 1128 705.84
880 1154 726.44    890 1178 743.6      900 1198 761.84     910 1214 774.56     920 1224 777.36     930 1222 763.84
940 1214 693.44    950 1204 602.24     960 1186 525.56     970 1162 429.32     980 1128 359.656    990 1080 283.22
1000 1024 206.784
"""
_TABLE: NDArray[np.float64] = np.array([float(number) for number in _TEXT.split()]).reshape(-1, 3)
"""Wavelength in nm, molar extinction coefficients of oxy- and deoxyhaemoglobin in 1/(cm mol/l), to the base 10.

Rows of S. Prahl, "Tabulated Molar Extinction Coefficient for Hemoglobin in Water", Oregon Medical Laser Center, 1999
(omlc.org/spectra/hemoglobin/summary.html), from measurements of W. B. Gratzer and N. Kollias. Between the rows here the
table, which has one every 2 nm, is within 2 % of a straight line.
"""
SPECTRA_NM = (float(_TABLE[0, _WAVELENGTHS]), float(_TABLE[-1, _WAVELENGTHS]))
"""Wavelengths that the spectra cover, in nm."""
_FAINT = 0.05
"""Pixels with less than this fraction of the most blood have no saturation."""
_LARGEST_CONDITION = 100.0
"""Of the spectra at the chosen wavelengths: noise grows by no more than this."""


def absorption_per_metre(wavelengths_m: Sequence[float]) -> NDArray[np.float64]:
    """Absorption coefficients in 1/m for 1 mol/l of each of `CHROMOPHORES`: (wavelengths, 2).

    mu_a = ln(10) epsilon c. Raises ConfigError for a wavelength that the spectra do not cover.
    """
    nm = np.asarray(wavelengths_m) * 1e9
    outside = nm[(nm < SPECTRA_NM[0] - 0.5) | (nm > SPECTRA_NM[1] + 0.5)]
    if outside.size:
        raise ConfigError(
            f"no spectra of haemoglobin at {outside[0]:.4g} nm, only from {SPECTRA_NM[0]:g} to {SPECTRA_NM[1]:g} nm; "
            "switch photoacoustic.unmix off"
        )
    columns = [np.interp(nm, _TABLE[:, _WAVELENGTHS], _TABLE[:, column]) for column in (_OXY, _DEOXY)]
    return np.asarray(np.log(10) * 100 * np.stack(columns, axis=1))


class Concentrations(msgspec.Struct, frozen=True, eq=False):
    """Images (y, x) in the units of the pressure images per absorption; saturation is 0 to 1, NaN where nothing absorbs."""

    oxy: NDArray[np.float32]
    deoxy: NDArray[np.float32]
    saturation: NDArray[np.float32]


class Unmixer:
    """Least squares for one set of wavelengths; light is taken to be the same at all of them.

    Raises ConfigError for fewer than two wavelengths, for ones without spectra, and for ones at which the two cannot be told
    apart.
    """

    def __init__(self, wavelengths_m: Sequence[float]) -> None:
        spectra = absorption_per_metre(wavelengths_m)
        if len(set(wavelengths_m)) < len(CHROMOPHORES):
            raise ConfigError(f"unmixing needs two different wavelengths, there are {sorted(set(wavelengths_m))} m")
        scaled = spectra / np.abs(spectra).max()
        condition = float(np.linalg.cond(scaled))
        if condition > _LARGEST_CONDITION:
            raise ConfigError(
                f"oxy- and deoxyhaemoglobin look alike at the wavelengths {[f'{w * 1e9:.4g} nm' for w in wavelengths_m]} "
                f"(condition {condition:.3g}); choose others or switch photoacoustic.unmix off"
            )
        self._inverse = np.linalg.pinv(spectra).astype(np.float32)

    def unmix(self, images: Sequence[NDArray[np.float32]]) -> Concentrations:
        """Concentrations from one image (y, x) per wavelength, in the order of the wavelengths."""
        stack = np.stack(images)
        oxy, deoxy = np.tensordot(self._inverse, stack, axes=1)
        positive_oxy, positive_deoxy = np.maximum(oxy, 0), np.maximum(deoxy, 0)
        total = positive_oxy + positive_deoxy
        blood = total > _FAINT * float(total.max(initial=0.0))
        saturation = np.full(total.shape, np.nan, dtype=np.float32)
        np.divide(positive_oxy, total, out=saturation, where=blood)
        return Concentrations(oxy, deoxy, saturation)
