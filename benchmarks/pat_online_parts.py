"""One shot through the online system of photoacoustics, by part: preparation, sums over the ring, networks.

    python benchmarks/pat_online_parts.py [--elements 256] [--pixels 256] [--shots 20] [--runtimes auto torch] [--write]

Simulated vessels, a full ring, no server and no deadline: the loop that `scanside serve` runs for a shot of `pat/online`, and
what runs its network, chosen as there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from report import Table, machine, update_document
from scanside.adapters.process import settle_collector, tune_process
from scanside.engine.config import ConfigStore
from scanside.engine.priors.storage import load_weights
from scanside.engine.runtimes import ArtefactCache, GuardedDenoiser, Shape, select
from scanside.engine.simulation.photoacoustic import LiveScan
from scanside.engine.streaming.photoacoustic_prior import PriorBeamformer

SYSTEM, WARM = "pat/online", 3
PARTS = ("preparation", "images of rows", "rows of images", "networks")
"""As `Clock` counts them: band-pass and change of rate; delay-and-sum; its adjoint and the ramp; evaluations of the prior."""


class Clock:
    """Adds up what calls take, by name."""

    def __init__(self) -> None:
        self.taken: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def timed(self, name: str, call: Callable) -> Callable:
        """The same call, counted."""

        def counted(*arguments: object) -> object:
            begun = time.perf_counter()
            result = call(*arguments)
            self.taken[name] += time.perf_counter() - begun
            self.calls[name] += 1
            return result

        return counted


def denoiser(runtime: str, pixels: int) -> GuardedDenoiser:
    """What runs the weights of the system."""
    system = ConfigStore().get(SYSTEM)
    name = system.stages[0].prior.weights
    options = msgspec.structs.replace(system.runtime, runtime=runtime)
    return select(load_weights(name)[0], Shape(1, 1, pixels, pixels), options, cache=ArtefactCache()).denoiser


def beamformer(scan: LiveScan, pixels: int, clock: Clock, network: GuardedDenoiser) -> PriorBeamformer:
    """Made for the scan, its parts watched by the clock."""
    header = scan.header
    made = PriorBeamformer(
        ConfigStore().get(SYSTEM),
        header.positions_m,
        header.sampling_rate_hz,
        pixels=(pixels, pixels),
        field_of_view_m=header.field_of_view_m,
        speed_of_sound=header.speed_of_sound,
        denoisers=lambda _: clock.timed("networks", network),
    )
    made.prepared(scan.frame(0).samples)
    full, part = made.operators()
    full.back = clock.timed("images of rows", full.back)
    part._forward = clock.timed("rows of images", part._forward)
    made.prepared = clock.timed("preparation", made.prepared)
    return made


def measured(scan: LiveScan, arguments: argparse.Namespace, runtime: str) -> dict[str, object]:
    """Medians over the shots, in ms, and calls in a shot."""
    clock, network = Clock(), denoiser(runtime, arguments.pixels)
    made = beamformer(scan, arguments.pixels, clock, network)
    frames = [scan.frame(number).samples for number in range(WARM + arguments.shots)]
    settle_collector()
    shots: dict[str, list[float]] = defaultdict(list)
    for number, frame in enumerate(frames):
        clock.taken.clear()
        clock.calls.clear()
        begun = time.perf_counter()
        made.solve(frame)
        whole = time.perf_counter() - begun
        if number >= WARM:
            for name in PARTS:
                shots[name].append(1e3 * clock.taken[name])
            shots["rest"].append(1e3 * (whole - sum(clock.taken.values())))
            shots["whole"].append(1e3 * whole)
    ran = " ".join(network.status.attributes()["scanside_runtime"][:2])
    return {"runtime": ran, "calls": dict(clock.calls), "ms": {name: statistics.median(v) for name, v in shots.items()}}


def text_of(rows: list[dict], arguments: argparse.Namespace) -> str:
    """The section of the document."""
    calls = rows[0]["calls"]
    heads = [f"{name} ({calls[name]})" for name in PARTS]
    table = Table("runtime", *heads, "rest", "whole, ms")
    for row in rows:
        table.add(row["runtime"], *(f"{row['ms'][name]:.1f}" for name in (*PARTS, "rest", "whole")))
    size = f"{arguments.elements} elements, {arguments.pixels} x {arguments.pixels} pixels"
    return (
        f"{table}\n\n`benchmarks/pat_online_parts.py`. {size}, medians of {arguments.shots} shots in ms, {arguments.threads} "
        f"threads, load {os.getloadavg()[0]:.1f} after; in brackets the number of calls in a shot. Without server and wire."
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=256)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--shots", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runtimes", nargs="+", default=["auto", "torch"], help="of the network")
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    arguments = parser.parse_args()
    tune_process()
    torch.set_num_threads(arguments.threads)
    scan = LiveScan(elements=arguments.elements)
    text = text_of([measured(scan, arguments, runtime) for runtime in arguments.runtimes], arguments)
    print(f"{machine()}\n\n{text}")
    if arguments.write:
        root = Path(__file__).resolve().parent.parent
        update_document(root / "docs" / "benchmarks.md", "Photoacoustics, a shot of the online system", text, machine())


if __name__ == "__main__":
    main()
