"""Noise measurements of earlier scans, kept for later ones: in memory, and in a folder that all workers share."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import msgspec
import numpy as np
import structlog
import torch
from scanside.engine.preparation.noise import NoiseModel
from scanside.kernels.files import write_whole

__all__ = ["NOISE_FOLDER", "NoiseFiles"]

NOISE_FOLDER = "noise"
"""Within the folder of the spool."""

_log = structlog.get_logger("noise")

_SUFFIX = ".noise"
_LARGEST = 64 << 20
"""Bytes of a file that is read: more than 2000 channels take."""


class _Stored(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds, as msgpack. covariance: complex128, little-endian, rows one after another."""

    measurement: str
    channels: int
    samples: int
    dwell_time_us: float
    covariance: bytes


class NoiseFiles(MutableMapping[str, NoiseModel]):
    """Noise models by measurement id; the newest `most` are kept. None for the folder: in memory only.

    A file that cannot be written is reported in the log and costs the other workers this measurement; one that is damaged is
    reported, and taken for one that is not there. Iteration and length are of what this process has in memory.
    """

    def __init__(self, folder: Path | None = None, most: int = 256) -> None:
        self._folder, self._most = folder, most
        self._known: dict[str, NoiseModel] = {}
        self._lock = threading.Lock()

    def __getitem__(self, measurement: str) -> NoiseModel:
        stored = self._read(measurement)  # another process may have measured anew under the same name
        if stored is not None:
            self._remember(measurement, stored)
        return self._known[measurement]

    def __setitem__(self, measurement: str, model: NoiseModel) -> None:
        self._remember(measurement, model)
        if self._folder is not None:
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_whole(self._path(self._folder, measurement), _encoded(measurement, model))
                self._make_room(self._folder)
            except OSError as error:
                _log.warning("a noise measurement is kept in memory only", error=str(error))

    def __delitem__(self, measurement: str) -> None:
        del self._known[measurement]
        if self._folder is not None:
            with contextlib.suppress(OSError):  # where it cannot be removed it could not be written
                self._path(self._folder, measurement).unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._known))

    def __len__(self) -> int:
        return len(self._known)

    def _remember(self, measurement: str, model: NoiseModel) -> None:
        with self._lock:  # sessions are threads
            self._known.pop(measurement, None)  # so that it is the newest
            self._known[measurement] = model
            while len(self._known) > self._most:
                self._known.pop(next(iter(self._known)))

    @staticmethod
    def _path(folder: Path, measurement: str) -> Path:
        """Named by a digest: what a scanner calls a measurement need not be a file name."""
        return folder / (hashlib.sha256(measurement.encode()).hexdigest()[:32] + _SUFFIX)

    def _read(self, measurement: str) -> NoiseModel | None:
        if self._folder is None:
            return None
        path = self._path(self._folder, measurement)
        try:
            if path.stat().st_size > _LARGEST:
                raise ValueError(f"{path.stat().st_size} bytes, more than {_LARGEST}")
            return _decoded(path.read_bytes(), measurement)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            _log.warning("a noise measurement cannot be read", file=str(path), error=str(error))
            return None

    def _make_room(self, folder: Path) -> None:
        aged = sorted((path.stat().st_mtime_ns, path) for path in folder.glob(f"*{_SUFFIX}"))
        for _, path in aged[: max(0, len(aged) - self._most)]:
            with contextlib.suppress(FileNotFoundError):  # another worker was faster
                path.unlink()


def _encoded(measurement: str, model: NoiseModel) -> bytes:
    return msgspec.msgpack.encode(
        _Stored(
            measurement=measurement,
            channels=model.channels,
            samples=model.samples,
            dwell_time_us=model.dwell_time_us,
            covariance=model.covariance.numpy().astype("<c16").tobytes(),
        )
    )


def _decoded(data: bytes, measurement: str) -> NoiseModel:
    stored = msgspec.msgpack.decode(data, type=_Stored)
    channels = stored.channels
    if stored.measurement != measurement or channels < 1 or len(stored.covariance) != 16 * channels**2:
        raise ValueError(f"not the noise of {channels} channels of measurement {measurement[:100]!r}")
    covariance = np.frombuffer(stored.covariance, "<c16").reshape(channels, channels)
    if not np.isfinite(covariance).all():
        raise ValueError("the covariance is not finite")
    return NoiseModel(torch.from_numpy(covariance.astype(np.complex128)), stored.dwell_time_us, stored.samples)
