"""Natural images as training data, for asking whether a prior must know the organ: pictures that come with scikit-image.

    python benchmarks/natural_images.py natural                 # folder with one npz file
    scanside train mri/online --data natural -o natural/prior --name natural --held-out 0 -P training.steps=4000
    python benchmarks/mri_quality.py --systems --natural natural/prior/natural.safetensors

Each color picture gives its red, green and blue part; each is shrunk to half its size, which makes edges as sharp as in MRI.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from skimage import data, transform

PICTURES = (
    "astronaut",
    "brick",
    "camera",
    "cat",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "moon",
    "rocket",
    "text",
    "page",
)
LEAST = 128
"""Pixels per side of a picture that is used."""


def pictures() -> Iterator[np.ndarray]:
    """Real pictures (y, x) of greatest value 1; those that scikit-image would have to download are left out."""
    for name in PICTURES:
        try:
            picture = np.atleast_3d(getattr(data, name)()).astype(np.float32)
        except OSError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        for channel in np.moveaxis(picture, -1, 0):
            small = transform.rescale(channel, 0.5, anti_aliasing=True)
            if min(small.shape) >= LEAST:
                yield small / small.max()


def main() -> None:
    """Command line."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    found = {f"picture_{number:02d}": picture for number, picture in enumerate(pictures())}
    np.savez(folder / "natural.npz", **found)
    print(f"{len(found)} pictures in {folder / 'natural.npz'}")


if __name__ == "__main__":
    main()
