"""Linear operators: Fourier, coil sensitivity, sampling, non-uniform Fourier, wavelet, Hankel matrices of k-space."""

from __future__ import annotations

from .cartesian import CartesianSense, CoilSensitivity, Fourier, Sampling
from .hankel import Hankel
from .linear import Identity, LinearOperator, Zero, adjoint_mismatch
from .nonuniform import NonCartesianSense, NonUniformFourier
from .wavelet import Wavelet

__all__ = [
    "CartesianSense",
    "CoilSensitivity",
    "Fourier",
    "Hankel",
    "Identity",
    "LinearOperator",
    "NonCartesianSense",
    "NonUniformFourier",
    "Sampling",
    "Wavelet",
    "Zero",
    "adjoint_mismatch",
]
