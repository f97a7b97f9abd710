"""Writes the XML header of a scan, by the classes of the ISMRMRD schema, so that order and types are the schema's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ismrmrd import xsd
from scanside.adapters.mrd_xml import parse_xml
from scanside.engine.errors import PeerError
from scanside.engine.messages import EncodingLimit, EncodingSpace, ScanHeader

__all__ = ["header_xml"]

_PROTON_HZ_PER_TESLA = 42_577_478.518
_LONG = re.compile("0|-?[1-9][0-9]{0,17}")
_DOUBLE = re.compile(r"-?[0-9]+\.[0-9]+(e[+-][0-9]+)?")


def header_xml(header: ScanHeader) -> bytes:
    """The header as an ISMRMRD document, UTF-8, built anew from the fields (`header.xml` is not looked at).

    What the schema demands and `header` does not know is written as unknown: a proton frequency of 0, patient position
    HFS. A parameter goes out as long or double where that brings the same text back, else as string. Raises ValueError
    for text that XML cannot hold.
    """
    document = xsd.ismrmrdHeader(
        measurementInformation=_measurement(header),
        acquisitionSystemInformation=xsd.acquisitionSystemInformationType(
            systemFieldStrength_T=header.field_strength_tesla,
            relativeReceiverNoiseBandwidth=header.relative_receiver_noise_bandwidth,
            receiverChannels=header.channels,
        ),
        experimentalConditions=xsd.experimentalConditionsType(
            H1resonanceFrequency_Hz=round((header.field_strength_tesla or 0.0) * _PROTON_HZ_PER_TESLA)
        ),
        encoding=[_encoding(space) for space in header.encodings],
        userParameters=_parameters(header.parameters),
    )
    xml: bytes = xsd.ToXML(document, encoding="UTF-8").encode()  # type: ignore[attr-defined]
    try:
        parse_xml(xml, "header")
    except PeerError as error:
        raise ValueError(f"a name or value of the header cannot stand in XML; encode it first: {error}") from error
    return xml


def _measurement(header: ScanHeader) -> xsd.measurementInformationType | None:
    if header.measurement_id is None and not header.dependencies:
        return None
    return xsd.measurementInformationType(
        measurementID=header.measurement_id,
        patientPosition=xsd.patientPositionType.HFS,
        measurementDependency=[
            xsd.measurementDependencyType(dependencyType=kind, measurementID=other)
            for kind, other in header.dependencies.items()
        ],
    )


def _encoding(space: EncodingSpace) -> xsd.encodingType:
    return xsd.encodingType(
        encodedSpace=_space(space.encoded_matrix, space.encoded_fov_mm),
        reconSpace=_space(space.recon_matrix, space.recon_fov_mm),
        encodingLimits=_limits(space.limits),
        trajectory=xsd.trajectoryType(space.trajectory),
        trajectoryDescription=_description(space),
        parallelImaging=_parallel(space),
    )


def _space(matrix: tuple[int, int, int], fov: tuple[float, float, float]) -> xsd.encodingSpaceType:
    return xsd.encodingSpaceType(
        matrixSize=xsd.matrixSizeType(x=matrix[0], y=matrix[1], z=matrix[2]),
        fieldOfView_mm=xsd.fieldOfViewMm(x=fov[0], y=fov[1], z=fov[2]),
    )


def _limits(limits: Mapping[str, EncodingLimit]) -> xsd.encodingLimitsType:
    """The schema says "encoding" where the headers of readouts say "encode"."""
    return xsd.encodingLimitsType(
        **{
            name.replace("kspace_encode_", "kspace_encoding_"): xsd.limitType(
                minimum=limit.minimum, maximum=limit.maximum, center=limit.center
            )
            for name, limit in limits.items()
        }
    )


def _description(space: EncodingSpace) -> xsd.trajectoryDescriptionType | None:
    if space.trajectory_dimensions is None:
        return None
    dimensions = xsd.userParameterLongType(name="trajectory_dimensions", value=space.trajectory_dimensions)
    return xsd.trajectoryDescriptionType(identifier=space.trajectory, userParameterLong=[dimensions])


def _parallel(space: EncodingSpace) -> xsd.parallelImagingType | None:
    if space.acceleration == (1, 1) and space.calibration == "none":
        return None
    one, two = space.acceleration
    return xsd.parallelImagingType(
        accelerationFactor=xsd.accelerationFactorType(kspace_encoding_step_1=one, kspace_encoding_step_2=two),
        calibrationMode=None if space.calibration == "none" else xsd.calibrationModeType(space.calibration),
    )


def _parameters(parameters: Mapping[str, str]) -> xsd.userParametersType | None:
    if not parameters:
        return None
    document = xsd.userParametersType()
    for name, value in parameters.items():
        if _LONG.fullmatch(value):
            document.userParameterLong.append(xsd.userParameterLongType(name=name, value=int(value)))
        elif _DOUBLE.fullmatch(value) and repr(float(value)) == value:
            document.userParameterDouble.append(xsd.userParameterDoubleType(name=name, value=float(value)))
        else:
            document.userParameterString.append(xsd.userParameterStringType(name=name, value=value))
    return document
