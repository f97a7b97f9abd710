"""The NHLBI compression of acquisitions: floats as integers of 1 to 32 bits with one common scale.

A block is u64 number of floats, f32 scale, u8 bits per float, then the integers in two's complement, packed without
gaps, least significant bit first; a float is its integer over the scale (Gadgetron `NHLBICompression.h`; layout
checked against its client).
"""

from __future__ import annotations

import struct

import numpy as np
from scanside.engine.errors import PeerError

__all__ = ["BLOCK", "decode", "encode"]

BLOCK = struct.Struct("<QfB")
"""Number of floats, scale, bits per float."""
MAX_BITS = 32


def decode(block: bytes | memoryview, floats: int, *, offset: int | None = None) -> np.ndarray:
    """The `floats` float32 values of a block, shape (floats,).

    Raises PeerError when the block does not hold exactly that many, or has no usable scale or width.
    """
    if len(block) < BLOCK.size:
        raise PeerError(f"compressed block has {len(block)} bytes; its header alone has {BLOCK.size}", offset=offset)
    count, scale, bits = BLOCK.unpack_from(block)
    if count != floats:
        raise PeerError(f"compressed block declares {count} floats; the acquisition has {floats}", offset=offset)
    if not 1 <= bits <= MAX_BITS:
        raise PeerError(f"compressed block has {bits} bits per float; allowed are 1 to {MAX_BITS}", offset=offset)
    size = BLOCK.size + (bits * floats + 7) // 8
    if len(block) != size:
        raise PeerError(
            f"compressed block has {len(block)} bytes; {floats} floats of {bits} bits need {size}", offset=offset
        )
    integers = _unpack(np.frombuffer(block, np.uint8, offset=BLOCK.size), floats, bits)
    if not (np.isfinite(scale) and scale > 0):
        if integers.any():
            raise PeerError(f"compressed block has scale {scale}; it must be finite and above 0", offset=offset)
        return np.zeros(floats, np.float32)  # what a division by the maximum of an all-zero readout leaves
    with np.errstate(over="ignore"):  # infinity, as in uncompressed data: whoever reads the samples masks it
        return (integers / np.float64(scale)).astype(np.float32)


def encode(values: np.ndarray, bits: int) -> bytes:
    """A block with `values` (float32 or complex64, any shape, C order) in `bits` bits per float.

    The largest magnitude gets the largest integer, so the error is at most half a step, max|values| / (2^bits - 2),
    for 2 bits and more; one bit can only tell a negative number (-1) from another (0). Values must be finite:
    ValueError otherwise.
    """
    kind = np.complex64 if np.iscomplexobj(values) else np.float32
    flat = np.ascontiguousarray(values, kind).reshape(-1).view(np.float32)
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits}; allowed are 1 to {MAX_BITS}")
    if not np.isfinite(flat).all():
        raise ValueError("values hold NaN or infinity, which have no integer; mask them before they are compressed")
    peak = float(np.abs(flat).max(initial=0.0))
    scale = _scale(peak, bits)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    integers = np.clip(np.rint(flat * np.float64(scale)), low, high).astype(np.int64).astype("<u4", casting="unsafe")
    rows = np.unpackbits(integers.view(np.uint8).reshape(-1, 4), axis=1, count=bits, bitorder="little")
    return BLOCK.pack(flat.size, scale, bits) + np.packbits(rows, bitorder="little").tobytes()


def _scale(peak: float, bits: int) -> np.float32:
    """Integer steps per unit, as float32: the decoder sees no more of it."""
    if not peak:
        return np.float32(1.0)
    with np.errstate(over="ignore"):
        scale = np.float32(max((1 << (bits - 1)) - 1, 1) / peak)
    return min(scale, np.finfo(np.float32).max)  # values below the smallest step become zero


def _unpack(data: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Signed integers of `bits` bits each, int64, shape (count,).

    Eight integers take exactly `bits` bytes, so the integers of equal place in their group of eight form one strided
    array of 64-bit words that begin at the byte of their first bit.
    """
    groups = -(-count // 8)
    padded = np.zeros(groups * bits + 8, np.uint8)
    padded[: len(data)] = data
    out = np.empty((groups, 8), np.int64)
    for place in range(8):
        byte, bit = divmod(place * bits, 8)
        words = np.ndarray((groups,), "<i8", padded.data, byte, (bits,))
        # Up to the top, so that the way back down repeats the sign.
        out[:, place] = (words << (64 - bits - bit)) >> (64 - bits)
    return out.reshape(-1)[:count]
