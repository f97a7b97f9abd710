"""The XML header of a scan (ISMRMRD schema, any version) as a `ScanHeader`, checked before anything is allocated for
it.

Only what reconstruction needs is read, and only that is demanded: real files lack fields that the schema requires
(converters of some vendors leave out experimentalConditions). Nothing but the standard library's expat parser, behind
defusedxml, sees the document, so that the result does not depend on which other XML packages are installed.
"""

from __future__ import annotations

import math
import re
from typing import cast, get_args
from xml.etree.ElementTree import Element

from scanside.engine.errors import PeerError
from scanside.engine.limits import Limits
from scanside.engine.messages import CalibrationMode, EncodingLimit, EncodingSpace, ScanHeader, Trajectory

from .mrd_xml import parse_xml

__all__ = ["parse_header"]

AXES = ("x", "y", "z")
COUNTER_MAX = 65535
INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
NUMBER_CHARS = 64
COUNTERS = {
    "kspace_encoding_step_0": "kspace_encode_step_0",
    "kspace_encoding_step_1": "kspace_encode_step_1",
    "kspace_encoding_step_2": "kspace_encode_step_2",
    **{name: name for name in ("average", "slice", "contrast", "phase", "repetition", "set", "segment")},
    **{name: name for name in (f"user_{index}" for index in range(8))},
}
"""Name in the XML to name in the acquisition header."""
PARAMETER_KINDS = ("userParameterLong", "userParameterDouble", "userParameterString", "userParameterBase64")
DIMENSION_PARAMETERS = ("trajectory_dimensions", "dimensions")


def parse_header(xml: bytes, limits: Limits) -> ScanHeader:
    """The header in `xml`; `ScanHeader.xml` keeps the bytes as they are.

    Raises PeerError when it is no well-formed UTF-8 document of the schema, has a document type or entities, or has a
    value that no scan can have; LimitExceeded when it, a matrix or the number of encodings is above the limits.
    Errors name the path of the field, its value and what is allowed.
    """
    limits.check("header_bytes", len(xml), what="size of the header in bytes")
    root = parse_xml(xml, "header")
    if root.tag != "ismrmrdHeader":
        raise PeerError(f"header starts with <{root.tag[:64]}>; expected <ismrmrdHeader>")
    encodings = root.findall("encoding")
    if not encodings:
        raise PeerError("header has no encoding; at least one with encodedSpace and reconSpace is needed")
    limits.check("encodings", len(encodings), what="number of encodings in the header")
    system = "acquisitionSystemInformation"
    bandwidth = _number(root, f"{system}.relativeReceiverNoiseBandwidth")
    return ScanHeader(
        encodings=tuple(_encoding(item, f"encoding[{index}]", limits) for index, item in enumerate(encodings)),
        channels=_channels(root, f"{system}.receiverChannels", limits),
        # Converters write 0 for "unknown".
        relative_receiver_noise_bandwidth=bandwidth if bandwidth and bandwidth > 0 else 0.79,
        field_strength_tesla=_number(root, f"{system}.systemFieldStrength_T"),
        measurement_id=_text(root, "measurementInformation.measurementID"),
        dependencies=_pairs(root, "measurementInformation/measurementDependency", "dependencyType", "measurementID"),
        parameters=_parameters(root.find("userParameters")),
        xml=bytes(xml),
    )


def _encoding(item: Element, path: str, limits: Limits) -> EncodingSpace:
    encoded, recon = f"{path}.encodedSpace", f"{path}.reconSpace"
    trajectory = _text(item, "trajectory") or "cartesian"
    factor = "parallelImaging.accelerationFactor.kspace_encoding_step_"
    mode = _text(item, "parallelImaging.calibrationMode") or "none"
    return EncodingSpace(
        encoded_matrix=_matrix(item, encoded, limits),
        encoded_fov_mm=_fov(item, encoded),
        recon_matrix=_matrix(item, recon, limits),
        recon_fov_mm=_fov(item, recon),
        trajectory=cast(Trajectory, trajectory if trajectory in get_args(Trajectory) else "other"),
        limits=_limits(item.find("encodingLimits"), f"{path}.encodingLimits"),
        acceleration=(_acceleration(item, path, f"{factor}1"), _acceleration(item, path, f"{factor}2")),
        calibration=cast(CalibrationMode, mode if mode in get_args(CalibrationMode) else "other"),
        trajectory_dimensions=_dimensions(item.find("trajectoryDescription"), f"{path}.trajectoryDescription", limits),
    )


def _matrix(item: Element, path: str, limits: Limits) -> tuple[int, int, int]:
    name = path.rpartition(".")[2]
    sizes = []
    for axis in AXES:
        where = f"{path}.matrixSize.{axis}"
        size = _integer(_required(item, f"{name}.matrixSize.{axis}", where), where)
        if size < 1:
            raise PeerError(f"{where} is {size}, allowed are 1 to {limits.matrix}; correct the header")
        limits.check("matrix", size, what=where)
        sizes.append(size)
    return sizes[0], sizes[1], sizes[2]


def _fov(item: Element, path: str) -> tuple[float, float, float]:
    name = path.rpartition(".")[2]
    lengths = []
    for axis in AXES:
        where = f"{path}.fieldOfView_mm.{axis}"
        length = _float(_required(item, f"{name}.fieldOfView_mm.{axis}", where), where)
        if length <= 0:
            raise PeerError(f"{where} is {length} mm, it must be above 0; correct the header")
        lengths.append(length)
    return lengths[0], lengths[1], lengths[2]


def _limits(item: Element | None, path: str) -> dict[str, EncodingLimit]:
    if item is None:
        return {}
    found = ((ours, item.find(theirs), f"{path}.{theirs}") for theirs, ours in COUNTERS.items())
    return {ours: _limit(limit, where) for ours, limit, where in found if limit is not None}


def _limit(item: Element, path: str) -> EncodingLimit:
    """One range; numbers that are left out are 0, as in the schema."""
    values = {}
    for name in ("minimum", "maximum", "center"):
        where = f"{path}.{name}"
        value = _integer(_text(item, name) or "0", where)
        if not 0 <= value <= COUNTER_MAX:
            raise PeerError(f"{where} is {value}, allowed are 0 to {COUNTER_MAX}; correct the header")
        values[name] = value
    low, high = values["minimum"], values["maximum"]
    if low > high:
        raise PeerError(f"{path}.minimum is {low}, above its maximum {high}; correct the header")
    return EncodingLimit(**values)


def _acceleration(item: Element, path: str, name: str) -> int:
    text = _text(item, name)
    value = 1 if text is None else _integer(text, f"{path}.{name}")
    if not 0 <= value <= COUNTER_MAX:
        raise PeerError(f"{path}.{name} is {value}, allowed are 1 to {COUNTER_MAX}; correct the header")
    return max(value, 1)  # some converters write 0 for "none"


def _dimensions(item: Element | None, path: str, limits: Limits) -> int | None:
    if item is None:
        return None
    named = _pairs(item, "userParameterLong", "name", "value")
    text = next((named[name] for name in DIMENSION_PARAMETERS if name in named), None)
    if text is None:
        return None
    value = _integer(text, f"{path}.trajectory_dimensions")
    limits.check("trajectory_dimensions", value, what=f"{path}.trajectory_dimensions")
    return value if value > 0 else None


def _channels(root: Element, path: str, limits: Limits) -> int | None:
    text = _text(root, path)
    if text is None:
        return None
    value = _integer(text, path)
    limits.check("channels", value, what=path)
    return value if value > 0 else None


def _parameters(item: Element | None) -> dict[str, str]:
    if item is None:
        return {}
    return {name: value for kind in PARAMETER_KINDS for name, value in _pairs(item, kind, "name", "value").items()}


def _pairs(item: Element, path: str, name: str, value: str) -> dict[str, str]:
    """Text of child `value` by text of child `name`, for all elements at `path`."""
    found = ((each.findtext(name, "").strip(), each.findtext(value, "").strip()) for each in item.iterfind(path))
    return {key: content for key, content in found if key}


def _text(item: Element, path: str) -> str | None:
    """Stripped text of the element at a dotted path; None when it is absent or blank."""
    return (item.findtext(path.replace(".", "/")) or "").strip() or None


def _required(item: Element, path: str, where: str) -> str:
    text = _text(item, path)
    if text is None:
        raise PeerError(f"{where} is missing; add it to the header")
    return text


def _number(root: Element, path: str) -> float | None:
    text = _text(root, path)
    return None if text is None else _float(text, path)


def _integer(text: str, where: str) -> int:
    if not INTEGER.fullmatch(text):
        raise PeerError(f"{where} is {text[:40]!r}, expected an integer; correct the header")
    return int(text)


def _float(text: str, where: str) -> float:
    value = float(text) if len(text) <= NUMBER_CHARS and NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise PeerError(f"{where} is {text[:40]!r}, expected a finite number; correct the header")
    return value
