"""Images to train on, from any folder: npz arrays, ISMRMRD files (images, or scans that are reconstructed first), NIfTI.

Every image is scaled to a greatest magnitude of 1. Magnitude images get a phase of zero; training turns it at random.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from scanside.adapters.mrd_header import parse_header
from scanside.engine.config import ConfigStore, with_overrides
from scanside.engine.errors import ConfigError, ScansideError
from scanside.engine.messages import EndOfScan, Image
from scanside.engine.streaming.session import Session
from torch import Tensor

from .ismrmrd import ScanFile, open_scan

__all__ = ["READERS", "read_training_images"]

_SIDE = 32
"""Pictures with a side shorter than this are no images to train on."""


def read_training_images(folder: Path, told: Callable[[str], None] = lambda _: None) -> list[Tensor]:
    """All images of a folder or file as (2, y, x) float16, real and imaginary part, in the order of the file names.

    told: gets a line per file. Raises ConfigError where there are none, or where a file cannot be read.
    """
    paths = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else [folder]
    usable = [(path, reader) for path in paths if (reader := _reader(path)) is not None]
    if not usable:
        raise ConfigError(f"{folder}: no {', '.join(READERS)} files to train on")
    images: list[Tensor] = []
    for path, reader in usable:
        try:
            found = [_scaled(picture) for picture in reader(path)]
        except (OSError, ValueError, ScansideError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{path}: {error}") from None
        kept = [image for image in found if image is not None]
        images += kept
        told(
            f"{path.name}: {len(kept)} images"
            + (f", {len(found) - len(kept)} left out" if len(kept) < len(found) else "")
        )
    if not images:
        raise ConfigError(f"{folder}: no image of at least {_SIDE} x {_SIDE} pixels")
    return images


def _reader(path: Path) -> Callable[[Path], Iterator[np.ndarray]] | None:
    return next((reader for ending, reader in READERS.items() if path.name.lower().endswith(ending)), None)


def _scaled(picture: np.ndarray) -> Tensor | None:
    """One picture (y, x) with greatest magnitude 1, None if it is empty or too small."""
    top = float(np.abs(picture).max(initial=0.0))
    if min(picture.shape) < _SIDE or not np.isfinite(top) or top == 0.0:
        return None
    parts = np.stack([picture.real, picture.imag]) / top
    return torch.from_numpy(parts.astype(np.float16))


def _npz(path: Path) -> Iterator[np.ndarray]:
    """Arrays of an npz file: complex (..., y, x), or real (n, 2, y, x) with real and imaginary part, or real magnitudes."""
    with np.load(path, allow_pickle=False) as file:
        for name in file.files:
            array = file[name]
            if array.ndim < 2 or array.dtype.kind not in "fc":
                continue
            if array.dtype.kind == "f" and array.ndim == 4 and array.shape[1] == 2:
                for real, imaginary in array:
                    yield real.astype(np.float32) + 1j * imaginary.astype(np.float32)
            else:
                yield from array.reshape(-1, *array.shape[-2:])


def _ismrmrd(path: Path) -> Iterator[np.ndarray]:
    """Stored images; of a file with readouts, what the plain system makes of them, complex."""
    with open_scan(path) as scan:
        for image in scan.images():
            yield from image.pixels.reshape(-1, *image.pixels.shape[-2:])
        if len(scan):
            yield from _reconstructed(scan)


def _reconstructed(scan: ScanFile) -> Iterator[np.ndarray]:
    plain = with_overrides(ConfigStore().get("mri/sense"), {"output.image": "complex"}, source="training")
    session = Session(plain)
    events = list(session.feed(parse_header(scan.xml, plain.limits)))
    for batch in scan.batches():
        events += session.feed(batch)
    events += session.feed(EndOfScan())
    for event in events:
        if isinstance(event, Image):
            yield from event.pixels.reshape(-1, *event.pixels.shape[-2:])


def _nifti(path: Path) -> Iterator[np.ndarray]:
    """Slices along the third axis of a NIfTI volume."""
    try:
        import nibabel
    except ImportError:
        raise ConfigError("NIfTI files need nibabel: pip install nibabel") from None
    volume = nibabel.nifti1.Nifti1Image.from_filename(path).get_fdata(dtype=np.float32)
    yield from np.moveaxis(volume.reshape(*volume.shape[:2], -1), -1, 0)


READERS: dict[str, Callable[[Path], Iterator[np.ndarray]]] = {
    ".npz": _npz,
    ".h5": _ismrmrd,
    ".mrd": _ismrmrd,
    ".nii": _nifti,
    ".nii.gz": _nifti,
}
"""Readers by the ending of the file name."""
