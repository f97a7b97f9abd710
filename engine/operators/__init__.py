"""Linear operators: Fourier, coil sensitivity, sampling, non-uniform Fourier, wavelet."""

from __future__ import annotations

from .cartesian import CartesianSense, CoilSensitivity, Fourier, Sampling
from .linear import Identity, LinearOperator, Zero, adjoint_mismatch
from .nonuniform import NonCartesianSense, NonUniformFourier
from .wavelet import Wavelet

__all__ = [
    "CartesianSense",
    "CoilSensitivity",
    "Fourier",
    "Identity",
    "LinearOperator",
    "NonCartesianSense",
    "NonUniformFourier",
    "Sampling",
    "Wavelet",
    "Zero",
    "adjoint_mismatch",
]
