"""Noise covariance of the receive coils, and the prewhitening that follows from it.

Convention: after prewhitening the noise of every channel has **variance 1 in the real and 1 in the imaginary part**
(variance 2 per complex sample) and is uncorrelated between channels. That is what the factor 2 of Gadgetron's
`NoiseAdjustGadget` gives, so images in SNR units agree between the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..errors import StreamError

__all__ = ["NoiseModel"]

DEAD_COIL = 1e-10
"""A coil with less than this fraction of the median noise variance is taken as not connected."""
RELIABLE_SAMPLES = 4
"""Noise samples per coil from which on correlations between coils are taken as measured."""
SMALLEST_LOADING = 1e-8


@dataclass(frozen=True, eq=False)
class NoiseModel:
    """Noise of the coils as measured without signal.

    covariance: complex128, shape (coil, coil), E[n n^H] per complex sample, Hermitian.
    dwell_time_us: sampling interval of the noise readouts in microseconds; 0 where the scanner did not state it.
    samples: complex samples per coil that went into the covariance.
    """

    covariance: torch.Tensor
    dwell_time_us: float
    samples: int

    @classmethod
    def from_readouts(cls, readouts: np.ndarray | torch.Tensor, dwell_time_us: float) -> NoiseModel:
        """Covariance of noise readouts.

        readouts: complex, shape (n, coil, samples) or (coil, samples). dwell_time_us: their sampling interval.
        Raises StreamError on NaN or infinity, on a wrong shape and on no samples.
        The mean is taken as zero and the sum divided by samples - 1 (NoiseAdjustGadget).
        """
        data = _as_columns(readouts)
        samples = data.shape[1]
        return cls((data @ data.mH) / max(samples - 1, 1), float(dwell_time_us), samples)

    @property
    def channels(self) -> int:
        """Number of coils."""
        return int(self.covariance.shape[0])

    @property
    def sigma(self) -> torch.Tensor:
        """Standard deviation per coil and complex sample, float64, shape (coil,)."""
        return self.covariance.diagonal().real.clamp(min=0).sqrt()

    @property
    def dead_coils(self) -> tuple[int, ...]:
        """Coils without noise: not connected or switched off. They are weighted with zero, and the scan goes on."""
        variance = self.covariance.diagonal().real
        return tuple(torch.nonzero(variance <= DEAD_COIL * _live_median(variance)).flatten().tolist())

    @property
    def loading(self) -> float:
        """Fraction by which correlations between coils are reduced before the covariance is inverted, 1e-8 to 1.

        Below 4 samples per coil the estimate is unreliable, at one sample per coil it is singular; in between the
        fraction grows linearly until nothing but the variances is left.
        """
        missing = RELIABLE_SAMPLES * self.channels - self.samples
        return min(max(missing / ((RELIABLE_SAMPLES - 1) * self.channels), SMALLEST_LOADING), 1.0)

    def accumulate(self, readouts: np.ndarray | torch.Tensor, dwell_time_us: float | None = None) -> NoiseModel:
        """This model with more noise readouts added; the readouts themselves are not kept.

        readouts: as in `from_readouts`. dwell_time_us: refused when it differs from what is there.
        Raises StreamError on NaN, another number of coils or another dwell time.
        """
        data = _as_columns(readouts)
        self._check_same(data.shape[0], dwell_time_us)
        samples = self.samples + data.shape[1]
        scatter = self.covariance * max(self.samples - 1, 1) + data @ data.mH
        return replace(self, covariance=scatter / max(samples - 1, 1), samples=samples)

    def whitening(
        self,
        sample_time_us: float,
        receiver_bandwidth_ratio: float = 1.0,
        *,
        dtype: torch.dtype = torch.complex64,
    ) -> torch.Tensor:
        """Matrix W, shape (coil, coil), lower triangular: whitened samples are W @ samples.

        sample_time_us: sampling interval of the data. receiver_bandwidth_ratio: `relativeReceiverNoiseBandwidth` of the
        header. W = sqrt(2 t_data / t_noise * ratio) L^-1, covariance = L L^H (Kellman and McVeigh, MRM 54:1439, 2005);
        times and ratio are left out where a time is unknown (not above 0). Rows and columns of dead coils are zero.
        """
        inverse = torch.zeros_like(self.covariance)
        dead = set(self.dead_coils)
        live = torch.tensor([c for c in range(self.channels) if c not in dead], dtype=torch.long)
        if len(live):
            inverse[live[:, None], live] = _inverse_factor(self.covariance[live[:, None], live], self.loading)
        else:  # synthetic data without any noise: nothing to equalize
            inverse = torch.eye(self.channels, dtype=inverse.dtype)
        return (inverse * self._scale(sample_time_us, receiver_bandwidth_ratio)).to(dtype)

    def dependency_answer(self) -> dict[str, list[str]]:
        """Attributes of the answer to a noise-dependency query: status, channels, range of sigma, dwell time."""
        sigma = self.sigma
        values = {
            "min_sigma": float(sigma.min()),
            "max_sigma": float(sigma.max()),
            "mean_sigma": float(sigma.mean()),
            "noise_dwell_time_us": self.dwell_time_us,
        }
        numbers = {name: [f"{value:.9g}"] for name, value in values.items()}
        return {"status": ["success"], "channels": [str(self.channels)], **numbers}

    def _scale(self, sample_time_us: float, ratio: float) -> float:
        if sample_time_us > 0 and self.dwell_time_us > 0:
            return math.sqrt(2 * sample_time_us / self.dwell_time_us * ratio)
        return math.sqrt(2.0)

    def _check_same(self, channels: int, dwell_time_us: float | None) -> None:
        if channels != self.channels:
            raise StreamError(
                f"noise readout has {channels} coils, earlier ones had {self.channels}; start a new noise model"
            )
        if dwell_time_us is not None and not math.isclose(dwell_time_us, self.dwell_time_us, rel_tol=1e-3):
            raise StreamError(
                f"noise readout has a dwell time of {dwell_time_us} us, earlier ones had {self.dwell_time_us} us; "
                "start a new noise model"
            )


def _as_columns(readouts: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Readouts (n, coil, samples) as complex128 (coil, n * samples), checked."""
    values = readouts.detach().cpu().numpy() if isinstance(readouts, torch.Tensor) else readouts
    data = torch.from_numpy(np.array(values, dtype=np.complex128))
    if data.ndim not in (2, 3) or data.numel() == 0:
        raise StreamError(f"noise readouts have shape {tuple(data.shape)}, expected (n, coil, samples), none of them 0")
    columns = data.movedim(-2, 0).flatten(1)
    bad = torch.nonzero(~torch.isfinite(columns).all(dim=1)).flatten().tolist()
    if bad:
        raise StreamError(f"noise readouts of coils {bad} hold NaN or infinity; leave these coils or this readout out")
    return columns


def _live_median(variance: torch.Tensor) -> torch.Tensor:
    live = variance[variance > 0]
    return live.median() if len(live) else variance.new_zeros(())


def _inverse_factor(covariance: torch.Tensor, loading: float) -> torch.Tensor:
    """L^-1 of the covariance with reduced correlations, by way of unit variances: coils may differ by decades."""
    sigma = covariance.diagonal().real.sqrt()
    correlation = covariance / (sigma[:, None] * sigma)
    correlation = (correlation + correlation.mH) / 2 * (1 - loading)
    correlation.diagonal().fill_(1.0)
    identity = torch.eye(len(sigma), dtype=covariance.dtype)
    factor = torch.linalg.cholesky(correlation)
    return torch.div(torch.linalg.solve_triangular(factor, identity, upper=False), sigma)
