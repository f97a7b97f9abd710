"""iThera MSOT scans: a `.msot` file in XML and beside it a `.bin` file of raw samples.

The samples are uint16, little-endian, [frames, wavelengths, projections, samples]; the last frame may lack wavelengths and is
left out then. Positions of the elements are in m. What is read is what PATATO's reader documents (patato/io/ithera).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
from scanside.adapters.mrd_xml import parse_xml
from scanside.adapters.photoacoustic import header_from_message, header_message
from scanside.engine.errors import ConfigError, PeerError, TruncatedMessage
from scanside.engine.limits import DEFAULT_LIMITS, Limits
from scanside.engine.messages import PhotoacousticFrame, PhotoacousticHeader

from .photoacoustic import Recording, new_stream

__all__ = ["read_msot"]

_REST = 32768.0
"""Reading of an element at rest, where the file says nothing: the middle of the range of its converter."""
_TICKS = 1e7
"""Time stamps count 100 ns."""
_CELSIUS = 273.15
_AXES = 3


def read_msot(path: Path, limits: Limits = DEFAULT_LIMITS) -> Recording:
    """Open a scan by its `.msot` file or its folder; samples are read when they are asked for.

    Raises ConfigError when there is no scan, PeerError naming the element of the XML that is missing or wrong, LimitExceeded,
    and TruncatedMessage when the samples are fewer than the XML says.
    """
    description, samples = _files(path)
    root = parse_xml(description.read_bytes(), f"{description.name}")
    header = header_from_message(header_message(_header(root, description)), limits)
    wavelengths = len(header.wavelengths_m)
    scans = [frame for group in root.iter("ScanFrames") for frame in group.iter("Frame")]
    rounds = len(scans) // wavelengths
    if not rounds:
        raise PeerError(
            f"{description}: {len(scans)} ScanFrames/Frame for {wavelengths} wavelengths; there is no whole round"
        )
    shape = (rounds, wavelengths, header.elements, header.samples)
    if samples.stat().st_size < 2 * math.prod(shape):
        there, due = samples.stat().st_size, 2 * math.prod(shape)
        raise TruncatedMessage(f"{samples} has {there} bytes; {rounds} frames of this scan are {due}")
    data = np.memmap(samples, "<u2", "r", shape=shape)
    started = _stamp(scans[0])

    def frame(index: int) -> PhotoacousticFrame:
        number, wavelength = divmod(index, wavelengths)
        scan = scans[index]
        return PhotoacousticFrame(
            seq=index,
            shot=index,
            samples=np.array(data[number, wavelength]),
            wavelength=wavelength,
            timestamp_s=max(0.0, (_stamp(scan) - started) / _TICKS),
            pulse_energy_joule=_energy(scan),
            temperature_kelvin=_plus(_optional(scan, "TEMPERATURE"), _CELSIUS),
        )

    return Recording(description, header, range(rounds * wavelengths), frame)


def _files(path: Path) -> tuple[Path, Path]:
    folder, descriptions = (path, sorted(path.glob("*.msot"))) if path.is_dir() else (path.parent, [path])
    if len(descriptions) != 1:
        raise ConfigError(f"{folder}: {len(descriptions)} .msot files; name the one that is meant")
    samples = descriptions[0].with_suffix(".bin")
    if not samples.exists():
        raise ConfigError(f"{samples} is missing; it holds the samples of {descriptions[0].name}")
    return descriptions[0], samples


def _header(root: Element, path: Path) -> PhotoacousticHeader:
    wavelengths = [
        _number(item, "WAVELENGTH") * 1e-9 for group in root.iter("WAVELENGTHS") for item in group.iter("WAVELENGTH")
    ]
    if not wavelengths:
        raise PeerError(f"{path}: WAVELENGTHS/WAVELENGTH is missing")
    positions = _positions(root, path)
    return PhotoacousticHeader(
        stream=new_stream(str(path.resolve())),
        elements=len(positions),
        samples=int(_number(_find(root, "RECORDED-LENGTH", path), "RECORDED-LENGTH")),
        data_type="uint16",
        positions_m=positions,
        sampling_rate_hz=1e6 * _number(_find(root, "SAMPLING-FREQUENCY", path), "SAMPLING-FREQUENCY"),
        wavelengths_m=tuple(wavelengths),
        adc_offset=_REST,
        details={
            "acquisition": {"scanning_method": "MSOT"},
            "device": {"general": {"unique_identifier": "iThera MSOT"}},
        },
    )


def _positions(root: Element, path: Path) -> np.ndarray:
    description = _find(root, "FRAME-DESC", path)
    rows = [[_number(value, "VALUE") for value in item.iter("VALUE")] for item in description.iter("PROJECTION")]
    if not rows or any(len(row) != _AXES for row in rows):
        raise PeerError(f"{path}: FRAME-DESC/PROJECTION must have {_AXES} VALUE each: x, y and z in m")
    return np.array(rows)


def _find(root: Element, name: str, path: Path) -> Element:
    found = next(root.iter(name), None)
    if found is None:
        raise PeerError(f"{path}: {name} is missing")
    return found


def _number(element: Element, name: str) -> float:
    text = (element.text or "").strip()
    try:
        return float(text)
    except ValueError:
        raise PeerError(f"{name} is {text[:40]!r}, which is no number") from None


def _optional(frame: Element, name: str) -> float | None:
    found = next(frame.iter(name), None)
    value = math.nan if found is None or not (found.text or "").strip() else _number(found, name)
    return value if math.isfinite(value) else None


def _energy(frame: Element) -> float | None:
    """Energy of the pulse, taken as mJ; where it is missing the laser's correction factor, for only ratios matter."""
    readers: list[Callable[[], float | None]] = [
        lambda: _optional(frame, "LASER-ENERGY"),
        lambda: _optional(frame, "POWER"),
        lambda: _optional(frame, "OverallCorrectionFactor"),
    ]
    for read in readers:
        value = read()
        if value is not None and value > 0:
            return value * 1e-3
    return None


def _plus(value: float | None, amount: float) -> float | None:
    return None if value is None else value + amount


def _stamp(frame: Element) -> int:
    text = frame.get("timestamp", "0")
    return int(text) if text.isdigit() else 0
