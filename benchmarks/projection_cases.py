"""The projection kernels of photoacoustics and CT for `kernels.py`, beside PATATO and ASTRA where an environment has them.

Peers live in an environment of their own (pip install patato astra-toolbox): their processes are started once, get the same
data as a file, and make one image for each line that they are sent, so that they take turns with ours.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from scanside.engine.baselines.photoacoustic import LiveBeamformer
from scanside.engine.baselines.tomography import filtered_back_projection
from scanside.engine.operators.photoacoustic_geometry import DetectorArray, PixelGrid, TimeAxis, ring_positions
from scanside.engine.operators.tomography import BeamGeometry, even_angles
from scanside.kernels import photoacoustic as pat
from scanside.kernels import tomography

__all__ = ["PEERS", "Peer", "photoacoustic", "tomographic"]

PEERS = "SCANSIDE_PEERS"
"""Variable that holds the Python of the environment with the peers."""
ELEMENTS, SAMPLES, RATE, SPEED, RADIUS, VIEW = 256, 2030, 40e6, 1500.0, 0.0405, 0.025
PIXELS = (256, 256)
Case = tuple[str, dict[str, Callable[[], object]], float | None, str]
"""What, contenders (ours first), target in ms, floor or a note."""
LOOP = """
run()
print("ready", flush=True)
for _ in sys.stdin:
    result = run()
    print("done", flush=True)
np.save(sys.argv[2], np.asarray(result))
"""
PATATO = f"""
import sys
import numpy as np
from patato.recon.backprojection_reference import ReferenceBackprojection
sizes = ({PIXELS[1]}, {PIXELS[0]}, 1), ({VIEW}, {VIEW}, 0.0)
data, scan = np.load(sys.argv[1]), ReferenceBackprojection(*sizes)
frame = data["frame"].astype(np.float32)[None]
def run():
    return np.asarray(scan.reconstruct(frame, {RATE}, data["positions"], *sizes, {SPEED}))
{LOOP}"""
ASTRA = f"""
import sys
import numpy as np
import astra
data = np.load(sys.argv[1])
volume = astra.create_vol_geom(512, 512, -128, 128, -128, 128)
angles = np.arange(720) * 2 * np.pi / 720
scan = astra.create_proj_geom("fanflat", 1.0, 720, angles, 500.0, 500.0)
projector = astra.create_projector("line_fanflat", scan, volume)
operator = astra.OpTomo(projector)
def run():
    if sys.argv[3] == "forward":
        return operator.FP(data["image"])
    return operator.BP(data["sinogram"])
{LOOP}"""


class Peer:
    """Another program's process, called as a function that makes one image. None in its place where it is not installed."""

    def __init__(self, code: str, data: dict[str, np.ndarray], *words: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._result = Path(self._folder.name) / "result.npy"
        source = Path(self._folder.name) / "data.npz"
        np.savez(source, **data)
        command = [os.environ[PEERS], "-c", code, str(source), str(self._result), *words]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._until("ready")

    def __call__(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._until("done")

    def close(self) -> np.ndarray:
        """Ends the process; its last image."""
        self._process.communicate()
        result = np.load(self._result)
        self._folder.cleanup()
        return result

    def _until(self, word: str) -> None:
        for line in self._process.stdout:
            if line.strip() == word:
                return
        raise RuntimeError(f"the peer ended with status {self._process.wait()}")


def ring() -> np.ndarray:
    """Positions of 256 elements on 270 degrees."""
    return ring_positions(ELEMENTS, RADIUS, span=1.5 * np.pi, first=-0.25 * np.pi)


def shot() -> np.ndarray:
    """A frame of some points and noise, int16."""
    rng, positions = np.random.default_rng(0), ring()
    signals = rng.normal(size=(ELEMENTS, SAMPLES)) * 200
    for point in rng.uniform(-0.4, 0.4, (20, 2)) * VIEW:
        arrival = np.linalg.norm(positions - [*point, 0], axis=1)[:, None] * RATE / SPEED
        signals += 4000 * np.exp(-(((np.arange(SAMPLES) - arrival) / 4) ** 2))
    return signals.astype(np.int16)


def photoacoustic() -> Iterator[Case]:
    """256 elements x 2030 samples to 256 x 256 pixels: one frame to one image, and the adjoint."""
    frame, half = shot(), VIEW / 2 * PIXELS[0] / (PIXELS[0] - 1)  # PATATO has pixel centers at the ends of its view
    view = (-half, half, -half, half)
    settings = {"pixels": PIXELS, "field_of_view_m": view, "threads": torch.get_num_threads()}
    live = LiveBeamformer(ring(), None, RATE, **settings)
    table = DetectorArray.at(ring()).table(PixelGrid.over(PIXELS, view), TimeAxis(RATE, SAMPLES), dimensions=1)
    signals = torch.from_numpy(frame.astype(np.float32))
    contenders: dict[str, Callable[[], object]] = {
        "ours": lambda: live.image(frame),
        "torch": lambda: pat._torch_gather(signals, *table, 0.0, pat.PLAIN),
    }
    peer = Peer(PATATO, {"frame": frame, "positions": ring()}) if PEERS in os.environ else None
    if peer:
        contenders["PATATO"] = peer
    yield "DAS, int16 frame to image", contenders, 8, "0.20 GFLOP, 1.3 MB"
    if peer:
        theirs, ours = peer.close().squeeze(), live.image(frame)
        likeness = max(float(np.corrcoef(side.ravel(), ours.ravel())[0, 1]) for side in (theirs, theirs.T))
        print(f"PATATO's image correlates with ours to {likeness:.4f}")
    yield "the same, frame after frame, without turns", {"ours": lambda: live.image(frame)}, 8, "0.20 GFLOP, 1.3 MB"
    for method, band in (("ubp", None), ("das", (0.15e6, 8e6)), ("ubp", (0.15e6, 8e6))):
        other = LiveBeamformer(ring(), None, RATE, method=method, band_hz=band, **settings)
        name = f"{'Band-pass and ' if band else ''}{method.upper()}, int16 frame to image"
        yield name, {"ours": lambda other=other: other.image(frame)}, None, "0.27 GFLOP" if method == "ubp" else ""
    image = torch.randn(1, *PIXELS)
    yield "adjoint of DAS", {"ours": lambda: pat.scatter(image, *table, SAMPLES)}, None, "0.20 GFLOP"


def tomographic() -> Iterator[Case]:
    """512 x 512 pixels and 720 x 720 rays of a fan."""
    scan = BeamGeometry((512, 512), 0.5, even_angles(720), 720, 1.0, 500.0, 500.0)
    image, sinogram = torch.rand(512, 512), torch.rand(720, 720)
    forward: dict[str, Callable[[], object]] = {"ours": lambda: tomography.project(image, scan.views, 720, 0.5, 0.5)}
    back: dict[str, Callable[[], object]] = {
        "ours": lambda: tomography.adjoint(sinogram, scan.views, 512, 512, 0.5, 0.5)
    }
    if PEERS in os.environ:
        data = {"image": image.numpy(), "sinogram": sinogram.numpy()}
        forward["ASTRA (line, 1 thread)"] = Peer(ASTRA, data, "forward")
        back["ASTRA (line, 1 thread)"] = Peer(ASTRA, data, "back")
    yield "fan projector (Joseph)", forward, 150, "265 M samples, 3.2 GFLOP"
    yield "its exact adjoint", back, 150, "the same"
    yield "filtered back-projection", {"ours": lambda: filtered_back_projection(sinogram, scan)}, None, "189 M samples"
    for contenders in (forward, back):
        for peer in contenders.values():
            if isinstance(peer, Peer):
                peer.close()
