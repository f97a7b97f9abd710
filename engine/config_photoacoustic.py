"""The `[photoacoustic]` table of a configuration: how shots become images."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = ["PhotoacousticConfig"]

Pixels = Annotated[int, msgspec.Meta(ge=8, le=2048)]
Frequency = Annotated[float, msgspec.Meta(ge=0)]


class PhotoacousticConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Beamforming of a photoacoustic stream. Lengths in m, frequencies in Hz."""

    beamformer: Literal["das", "ubp"] = "das"
    """`das`: delay and sum; `ubp`: universal back-projection."""
    image_pixels: tuple[Pixels, Pixels] = (256, 256)
    """Along x1 and x2, where the stream wishes for nothing else."""
    field_of_view_m: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Start and end along x1, start and end along x2; all 0: what the stream wishes for, else the inside of the array."""
    follow_wishes: bool = True
    """Take pixels and field of view from the header of the stream where it has them."""
    band_hz: tuple[Frequency, Frequency] = (0.0, 0.0)
    """Pass band applied to the signals; all 0: none."""
    speed_of_sound: Annotated[float, msgspec.Meta(ge=0, le=10000)] = 0.0
    """In m/s; 0: that of the stream, 1500 where it has none."""
    delay_samples: Annotated[float, msgspec.Meta(ge=-65535, le=65535)] = 0.0
    """Added to the time of the first sample that the stream says."""
    averages: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    """Shots averaged for one image; 0: as many as the stream says."""
    autofocus: Literal["off", "delay", "speed_of_sound"] = "off"
    """Search the sharpest image of the first shot over the delay, or over the speed of sound."""
    transducer: tuple[Frequency, Frequency] = (0.0, 0.0)
    """Center in Hz and full width at half of the amplitude in percent, for systems that undo it; all 0: not known."""
    unmix: bool = True
    """Unmix oxy- and deoxyhaemoglobin when there are two wavelengths or more."""
    frame_deadline_s: Annotated[float, msgspec.Meta(gt=0)] = 0.04
    """From the last part of a shot to its image; images say whether they kept it."""
