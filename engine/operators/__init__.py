"""Linear operators: Fourier, coil sensitivity, sampling, non-uniform Fourier, wavelet."""

from __future__ import annotations

from .cartesian import CartesianSense, CoilSensitivity, Fourier, Sampling
from .linear import Identity, LinearOperator, Zero, adjoint_mismatch

__all__ = [
    "CartesianSense",
    "CoilSensitivity",
    "Fourier",
    "Identity",
    "LinearOperator",
    "Sampling",
    "Zero",
    "adjoint_mismatch",
]
