"""Where a readout belongs: the grid of a Cartesian frame, derived once from the header and the first readout."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from ..errors import PeerError
from ..limits import Limits
from ..messages import EncodingLimit, EncodingSpace, FrameKey, ScanHeader

__all__ = ["CartesianLayout", "encoding_of", "frame_key", "is_cartesian"]

_FULL = 0.999


class CartesianLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Grid of the frames of one encoding space.

    `readout` points are transformed and `width` of them kept around the center; a frame's k-space has the shape
    (coil, depth, height, width): encoding step 2, encoding step 1, position along the readout.
    """

    encoding: EncodingSpace
    samples: int
    """Samples of a readout on the wire."""
    center_sample: int
    """Sample at the center of k-space."""
    readout: int
    width: int
    height: int
    depth: int
    rows: EncodingLimit
    """Range of encoding step 1 and its center."""
    partitions: EncodingLimit
    """Range of encoding step 2 and its center."""
    averages: int

    @classmethod
    def of(cls, space: EncodingSpace, first: np.ndarray, limits: Limits, *, crop: bool) -> CartesianLayout:
        """Layout for an encoding space, given the header record of its first imaging readout.

        With `crop`, the readout is cut to the reconstructed field of view. Raises `PeerError` when the readout does not fit
        the encoded matrix, `LimitExceeded` when a frame would be too large.
        """
        samples, center = int(first["number_of_samples"]), int(first["center_sample"])
        encoded, height, depth = space.encoded_matrix
        if (
            center >= samples
        ):  # some converters keep the center of the oversampled readout after removing the oversampling
            center = samples // 2
        ratio = space.recon_fov_mm[0] / space.encoded_fov_mm[0]
        removed = samples < encoded and samples == round(encoded * ratio) and abs(center - samples // 2) <= 1
        readout = samples if removed else encoded
        if samples > readout and samples != center * 2:
            raise PeerError(f"number_of_samples is {samples}, encodedSpace.matrixSize.x only {encoded}")
        readout = max(readout, samples)
        width = readout if removed or not crop else min(readout, math.ceil(readout * ratio - 1e-6))
        layout = cls(
            encoding=space,
            samples=samples,
            center_sample=center,
            readout=readout,
            width=width,
            height=height,
            depth=depth,
            rows=space.limits.get("kspace_encode_step_1", EncodingLimit(0, height - 1, height // 2)),
            partitions=space.limits.get("kspace_encode_step_2", EncodingLimit(0, depth - 1, depth // 2)),
            averages=max(1, space.limits.get("average", EncodingLimit()).count),
        )
        limits.check(
            "frame_bytes", 8 * int(first["active_channels"]) * depth * height * width, what="k-space of one frame"
        )
        return layout

    @property
    def asymmetric(self) -> bool:
        """Whether the readout starts late or ends early (asymmetric echo)."""
        return min(self.center_sample, self.samples - self.center_sample) < 0.48 * self.readout

    @property
    def width_fov_mm(self) -> float:
        """Field of view of the kept part of the readout, in mm."""
        removed = self.readout < self.encoding.encoded_matrix[0]
        full = self.encoding.recon_fov_mm[0] if removed else self.encoding.encoded_fov_mm[0]
        return full * self.width / self.readout

    def row(self, step: np.ndarray) -> np.ndarray:
        """Row of encoding step 1; rows outside 0..height-1 do not exist."""
        return step.astype(np.int64) + (self.height // 2 - self.rows.center)

    def partition(self, step: np.ndarray) -> np.ndarray:
        """Plane of encoding step 2; planes outside 0..depth-1 do not exist."""
        return step.astype(np.int64) + (self.depth // 2 - self.partitions.center)

    def places(self, headers: np.ndarray) -> np.ndarray:
        """Number of each readout's line, int64 (n,), rows counting fastest; -1 outside the matrix."""
        idx = headers["idx"]
        rows, parts = self.row(idx["kspace_encode_step_1"]), self.partition(idx["kspace_encode_step_2"])
        inside = (rows >= 0) & (rows < self.height) & (parts >= 0) & (parts < self.depth)
        found: np.ndarray = np.where(inside, parts * self.height + rows, -1)
        return found

    def announced(self) -> np.ndarray:
        """Lines that the header announces, boolean (depth, height); with undersampling it announces none."""
        lines = np.zeros((self.depth, self.height), dtype=bool)
        if self.encoding.acceleration == (1, 1):
            lines[self.box] = True
        return lines

    @property
    def box(self) -> tuple[slice, slice]:
        """Partitions and rows within the ranges of the header, whether or not all of their lines are to come."""
        parts, rows = (
            slice(max(0, limit.minimum + shift), max(0, min(size, limit.maximum + shift + 1)))
            for limit, shift, size in (
                (self.partitions, self.depth // 2 - self.partitions.center, self.depth),
                (self.rows, self.height // 2 - self.rows.center, self.height),
            )
        )
        return parts, rows


def encoding_of(header: ScanHeader, record: np.ndarray) -> int:
    """Index of a readout's encoding space. Raises `PeerError` when the header has no such space."""
    index = int(record["encoding_space_ref"])
    if index >= len(header.encodings):
        raise PeerError(f"encoding_space_ref is {index}, the header has {len(header.encodings)} encodings")
    return index


def is_cartesian(space: EncodingSpace) -> bool:
    """Whether readouts of a space are lines of a grid."""
    return space.trajectory in ("cartesian", "epi")


def frame_key(record: np.ndarray) -> FrameKey:
    """Frame of a readout, by its counters."""
    idx = record["idx"]
    return FrameKey(
        encoding=int(record["encoding_space_ref"]),
        repetition=int(idx["repetition"]),
        slice=int(idx["slice"]),
        contrast=int(idx["contrast"]),
        phase=int(idx["phase"]),
        set=int(idx["set"]),
    )
