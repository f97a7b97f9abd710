"""NHLBI compression: exact layout, error bound, and blocks that lie."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scanside.adapters import nhlbi
from scanside.engine.errors import PeerError


def reference_unpack(block: bytes) -> np.ndarray:
    """The layout read with Python integers, one bit field after the other."""
    count, scale, bits = struct.unpack_from("<QfB", block)
    stream = int.from_bytes(block[13:], "little")
    fields = ((stream >> (index * bits)) & ((1 << bits) - 1) for index in range(count))
    return np.array([(field - (field >> (bits - 1) << bits)) / scale for field in fields])


@given(
    bits=st.integers(1, 32),
    count=st.integers(1, 40),
    scale=st.floats(2.0**-20, 2.0**20, width=32),
    seed=st.integers(0, 2**32),
)
def test_decode_reads_the_layout(bits: int, count: int, scale: float, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, (bits * count + 7) // 8, dtype=np.uint8).tobytes()
    block = struct.pack("<QfB", count, scale, bits) + data
    assert np.array_equal(nhlbi.decode(block, count), reference_unpack(block).astype(np.float32))


@given(bits=st.integers(2, 32), count=st.integers(1, 67), seed=st.integers(0, 2**32))
def test_error_is_at_most_half_a_step(bits: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=count).astype(np.float32)
    block = nhlbi.encode(values, bits)
    assert len(block) == 13 + (bits * count + 7) // 8
    back = nhlbi.decode(block, count)
    half_step = np.abs(values).max() / (2**bits - 2)
    # The scale and the result are float32, which adds its rounding.
    rounding = 2.0**-22 * np.abs(values).max()
    assert np.abs(back.astype(np.float64) - values).max() <= half_step + rounding
    assert np.array_equal(back, reference_unpack(block).astype(np.float32))


def test_half_a_step_is_reached() -> None:
    values = np.linspace(-1, 1, 100_001, dtype=np.float32)
    for bits, published in ((16, 1.5e-5), (12, 2.4e-4), (10, 9.8e-4)):
        worst = np.abs(nhlbi.decode(nhlbi.encode(values, bits), values.size) - values).max()
        assert worst == pytest.approx(0.5 / (2 ** (bits - 1) - 1), rel=0.02)
        assert worst == pytest.approx(published, rel=0.03)


def test_sixteen_bits_halve_a_readout() -> None:
    samples = np.ones((8, 256), np.complex64)
    assert len(nhlbi.encode(samples, 16)) == 8205


def test_complex_samples_keep_their_order(rng: np.random.Generator) -> None:
    samples = (rng.normal(size=(3, 5)) + 1j * rng.normal(size=(3, 5))).astype(np.complex64)
    back = nhlbi.decode(nhlbi.encode(samples, 30), 30).view(np.complex64).reshape(3, 5)
    assert np.allclose(back, samples, atol=1e-6)


def test_one_bit_tells_the_sign() -> None:
    values = np.array([-2.0, 2.0, -2.0, 0.0], np.float32)
    assert nhlbi.decode(nhlbi.encode(values, 1), 4).tolist() == [-2.0, 0.0, -2.0, 0.0]


@pytest.mark.parametrize(
    "values", [np.zeros(9, np.float32), np.full(9, 1e-45, np.float32), np.full(3, 3e38, np.float32)]
)
def test_extreme_magnitudes(values: np.ndarray) -> None:
    back = nhlbi.decode(nhlbi.encode(values, 16), values.size)
    assert np.all(np.isfinite(back))
    assert np.allclose(back, values, rtol=1e-4, atol=1e-38)


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_scale_of_an_empty_readout(scale: float) -> None:
    assert nhlbi.decode(struct.pack("<QfB", 4, scale, 8) + b"\0" * 4, 4).tolist() == [0.0] * 4
    with pytest.raises(PeerError, match="scale"):
        nhlbi.decode(struct.pack("<QfB", 4, scale, 8) + b"\0\1\0\0", 4)


def test_values_beyond_float32_become_infinite() -> None:
    block = struct.pack("<QfB", 2, 1e-40, 8) + b"\x7f\x81"
    assert nhlbi.decode(block, 2).tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (b"\0" * 12, "has 12 bytes"),
        (struct.pack("<QfB", 2**63, 1.0, 8), "declares 9223372036854775808 floats"),
        (struct.pack("<QfB", 4, 1.0, 0), "0 bits per float"),
        (struct.pack("<QfB", 4, 1.0, 33), "33 bits per float"),
        (struct.pack("<QfB", 4, 1.0, 8) + b"\0" * 3, "need 17"),
        (struct.pack("<QfB", 4, 1.0, 8) + b"\0" * 5, "need 17"),
        (struct.pack("<QfB", 4, -1.0, 8) + b"\1" * 4, "scale -1"),
    ],
)
def test_blocks_that_lie(block: bytes, words: str) -> None:
    with pytest.raises(PeerError, match=words) as caught:
        nhlbi.decode(block, 4, offset=99)
    assert caught.value.offset == 99


@pytest.mark.parametrize("bits", [0, 33])
def test_widths_that_do_not_exist(bits: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        nhlbi.encode(np.ones(3, np.float32), bits)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_without_an_integer(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        nhlbi.encode(np.array([1.0, bad], np.float32), 16)
