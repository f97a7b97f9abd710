"""What cannot be done without an NVIDIA GPU, done on one: builds, self-tests, recordings and times. One function per part.

    pip install '.[cuda,tensorrt]'
    python benchmarks/gpu.py [--parts networks kernels] [--json FILE] [--write]

A part that fails says so in its rows and does not stop the others; the exit code is 1 when something was wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from report import Table, machine, update_document

ROOT = Path(__file__).resolve().parent.parent
RUNS, WARM = 200, 20


def seconds(work: Callable[[], object], runs: int = RUNS) -> tuple[float, float]:
    """Median and 95th percentile of the time on the device, in s, by events."""
    for _ in range(WARM):
        work()
    taken = []
    for _ in range(runs):
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        work()
        ended.record()
        ended.synchronize()
        taken.append(begun.elapsed_time(ended) / 1e3)
    return statistics.median(taken), sorted(taken)[int(0.95 * (runs - 1))]


def networks() -> tuple[list[dict], str]:
    """The default network through TensorRT, torch as a CUDA graph and torch, in each precision, tested against torch float32."""
    from runtimes import gigaflop, network
    from scanside.engine.errors import RuntimeFailed
    from scanside.engine.runtimes import RUNTIMES, ArtefactCache, LoadOptions, Shape, select
    from scanside.engine.runtimes.self_test import TOLERANCES, golden_tensors, verify
    from scanside.engine.runtimes.torch_runtimes import TorchEager

    model, shape, rows = network(), Shape(1, 2, 256, 256), []
    with tempfile.TemporaryDirectory() as folder:
        options = LoadOptions(device="cuda", cache=ArtefactCache(Path(folder) / "cache"))
        golden = golden_tensors(TorchEager().load(model, shape, "float32", options), shape)
        x, sigma = golden[0].x.cuda(), golden[0].sigma.cuda()
        for runtime in RUNTIMES:
            for precision in runtime.precisions("cuda"):
                row = {"runtime": runtime.name, "precision": precision}
                rows.append(row)
                found = runtime.available("cuda", precision)
                if not found.ok:
                    row["wrong"] = f"{found.reason}; {found.remedy}"
                    continue
                row["version"] = found.version
                try:
                    denoise = runtime.load(model, shape, precision, options)
                    row["error"] = verify(denoise, golden, TOLERANCES[precision])
                    again = runtime.load(model, shape, precision, options)  # from the cache
                    verify(again, golden, TOLERANCES[precision])
                except RuntimeFailed as error:
                    row["wrong"] = str(error)
                    continue
                row["seconds"], row["p95"] = seconds(lambda denoise=denoise: denoise(x, sigma))
        chosen = select(model, shape, cache=options.cache).chosen
    table = Table("runtime", "precision", "version", "µs", "p95", "error", "what was wrong")
    for row in rows:
        times = (f"{1e6 * row[key]:.1f}" if key in row else "" for key in ("seconds", "p95"))
        error = f"{row['error']:.1e}" if "error" in row else ""
        table.add(row["runtime"], row["precision"], row.get("version", ""), *times, error, row.get("wrong", ""))
    text = (
        f"{table}\n\nThe default network, {gigaflop(256):.2f} GFLOP, random weights, 1 x 2 x 256 x 256; medians of {RUNS} runs "
        f"by CUDA events, copies of input included. Chosen: {chosen.runtime}, {chosen.precision}. Errors are relative to "
        "what the network changes, against torch in float32.\n"
    )
    return rows, text


def kernels() -> tuple[list[dict], str]:
    """The CUDA kernels of MRI, checked and timed beside torch."""
    from gpu_kernels import kernel_rows, kernel_text

    rows = kernel_rows(seconds)
    return rows, kernel_text(rows)


PARTS: dict[str, tuple[str, Callable[[], tuple[list[dict], str]]]] = {
    "networks": ("Network runtimes on a GPU", networks),
    "kernels": ("CUDA kernels", kernels),
}
"""Title of the section in docs/benchmarks.md, and what makes its rows and text. A row with `wrong` is a failure."""


def device() -> str:
    """The GPU in words."""
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, sm_{properties.major}{properties.minor}, CUDA {torch.version.cuda}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu.py: no CUDA device answers; this script has nothing to do without one")
    where, results = f"{device()}; {machine()}", {}
    for name in arguments.parts:
        title, part = PARTS[name]
        rows, text = part()
        results[name] = rows
        print(f"## {title}\n\n{where}\n\n{text}")
        if arguments.write:
            update_document(ROOT / "docs" / "benchmarks.md", title, text, where)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": where, **results}, indent=1))
    sys.exit(any("wrong" in row for rows in results.values() for row in rows))


if __name__ == "__main__":
    main()
