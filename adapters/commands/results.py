"""What `run`, `send` and `demo` have to show: images in files and latencies in figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import h5py
import msgspec
import numpy as np
from scanside.adapters.files.ismrmrd import write_images
from scanside.adapters.files.png import Window, robust_window, write_png
from scanside.engine.errors import ConfigError
from scanside.engine.messages import Image

from .output import milliseconds

__all__ = ["Latency", "Output", "describe_image"]

_RGB_CHANNELS = 3


class Latency(msgspec.Struct, frozen=True):
    """Figures of a set of latencies, in s."""

    count: int
    p50: float
    p95: float
    worst: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Latency | None:
        """The figures of `values`, None where there are none."""
        if not values:
            return None
        p50, p95 = np.percentile(values, (50, 95))
        return cls(len(values), float(p50), float(p95), max(values))

    def __str__(self) -> str:
        return f"p50 {milliseconds(self.p50)}, p95 {milliseconds(self.p95)}, max {milliseconds(self.worst)}"


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """Where images go: an ISMRMRD file with the group to make in it, a folder for PNGs, both or neither."""

    file: Path | None = None
    group: str = "dataset"
    png: Path | None = None

    def check(self) -> None:
        """Raise ConfigError where writing would fail after the scan, which is too late."""
        if self.file is not None and not self.file.parent.is_dir():
            raise ConfigError(f"{self.file}: the folder {self.file.parent} does not exist; make it first")
        if self.file is not None and self.file.is_dir():
            raise ConfigError(f"{self.file} is a folder; give the name of a file")
        if self.file is not None and self.group and self.file.exists():
            with h5py.File(self.file, "r", locking=False) as there:
                if self.group in there:
                    raise ConfigError(
                        f"{self.file} already has a group {self.group!r}; choose another or remove the file"
                    )
        if self.png is not None and self.png.exists() and not self.png.is_dir():
            raise ConfigError(f"{self.png} is no folder; give the name of one")

    def write(self, images: Sequence[Image], xml: bytes = b"") -> list[str]:
        """Write all images; returns a line per place for the user. Raises ConfigError, DeliveryError or OSError."""
        lines = []
        if self.file is not None and images:
            count = write_images(self.file, images, self.group, xml)
            lines.append(f"{count} images in {self.file}, group {self.group!r}")
        if self.png is not None and images:
            self.png.mkdir(parents=True, exist_ok=True)
            count = _write_pngs(self.png, images)
            lines.append(f"{count} pictures in {self.png}/")
        return lines


def _write_pngs(folder: Path, images: Iterable[Image]) -> int:
    """One PNG per channel and slice; the first image of a series sets the gray levels of all."""
    windows: dict[int, Window] = {}
    count = 0
    for number, image in enumerate(images):
        series = int(image.header["image_series_index"])
        window = windows.setdefault(series, robust_window(image.pixels))
        for suffix, picture in _pictures(image.pixels):
            write_png(folder / f"series{series}_{number:04d}{suffix}.png", picture, window)
            count += 1
    return count


def _pictures(pixels: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    channels, depth = pixels.shape[:2]
    for channel in range(channels):
        for z in range(depth):
            suffix = (f"_c{channel}" if channels > 1 else "") + (f"_z{z}" if depth > 1 else "")
            yield suffix, pixels[channel, z]


def describe_image(image: Image) -> str:
    """Size, type and kind of an image, e.g. "256 x 256 float32 magnitude"."""
    channels, depth, height, width = image.pixels.shape
    size = f"{width} x {height}" + (f" x {depth}" if depth > 1 else "")
    kind = image.kind.name.lower()
    many = f", {channels} channels" if channels > 1 and channels != _RGB_CHANNELS else ""
    return f"{size} {image.pixels.dtype.name} {kind}{many}"
