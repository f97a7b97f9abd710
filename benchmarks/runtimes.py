"""The default network (about 6.5 GFLOP at 256 x 256) through every runtime that is here, and what process settings do to it.

    python benchmarks/runtimes.py [--prepare] [--compiled] [--json FILE] [--write]

Each group of settings gets a process of its own, since most of them are read when a process starts. Runtimes take turns, run
by run, so that a passing disturbance meets all alike. Errors are relative to what the network changes, against float64.
`--prepare` compiles beforehand, so that the timed run is short.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SETTINGS = {
    "as a process starts": {"tuned": False, "sleeping": False, "busy": 0},
    "memory kept": {"tuned": True, "sleeping": False, "busy": 0},
    "memory kept, idle threads sleep": {"tuned": True, "sleeping": True, "busy": 0},
    "as a process starts, one core taken": {"tuned": False, "sleeping": False, "busy": 1},
    "memory kept, idle threads sleep, one core taken": {"tuned": True, "sleeping": True, "busy": 1},
}
SERVED = "memory kept, idle threads sleep"
WARM, BUSY_RUNS = 3, 12
ROOT = Path(__file__).resolve().parent.parent


def network(seed: int = 0):  # -> Denoiser
    """The default network with random weights of the usual size."""
    import torch
    from scanside.engine.config_priors import NetworkConfig
    from scanside.engine.priors.denoiser import Denoiser

    torch.manual_seed(seed)
    made = Denoiser.of_size(NetworkConfig())
    torch.nn.init.kaiming_normal_(made.network.tail.weight, nonlinearity="linear")
    return made.eval()


def gigaflop(matrix: int) -> float:
    """Of one evaluation, multiplications and additions counted as two."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network()(torch.zeros(1, 2, matrix, matrix), torch.ones(1))
    return counter.get_total_flops() / 1e9


def loaded(
    matrix: int, threads: int, cache: Path, *, compiled: bool
) -> Iterator[tuple[str, str, Callable | None, str]]:
    """(runtime, precision, denoise or None, why not) of all that could run on this processor."""
    import torch
    from scanside.engine.errors import RuntimeFailed
    from scanside.engine.runtimes import RUNTIMES, ArtefactCache, LoadOptions, Shape

    model, shape = network(), Shape(1, 2, matrix, matrix)
    options = LoadOptions(threads=threads, cache=ArtefactCache(cache))
    torch.set_num_threads(threads)

    def plain(x, sigma):
        with torch.inference_mode():
            return model(x, sigma)

    yield "torch as it comes", "float32", plain, ""
    for runtime in (each for each in RUNTIMES if compiled or each.name != "torch-compile"):
        for precision in runtime.precisions("cpu"):
            found = runtime.available("cpu", precision)
            if not found.ok:
                yield runtime.name, precision, None, found.reason
                continue
            try:
                yield runtime.name, precision, runtime.load(model, shape, precision, options), ""
            except RuntimeFailed as error:
                yield runtime.name, precision, None, str(error)


def child(arguments: argparse.Namespace) -> dict:
    """Time everything in this process; called in one that has its settings."""
    import copy

    import torch
    from scanside.adapters.process import settle_collector, tune_process

    settings = SETTINGS[arguments.child]
    if settings["busy"]:  # shares the cores by turns, also where the benchmark was started with a real-time priority
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    if settings["tuned"]:
        tune_process()
    generator = torch.Generator().manual_seed(1)
    sigma = torch.tensor([0.1])
    x = torch.randn(1, 2, arguments.matrix, arguments.matrix, generator=generator)
    with torch.no_grad():
        wanted = copy.deepcopy(network()).double()(x.double(), sigma.double())
    cases = list(loaded(arguments.matrix, arguments.threads, arguments.cache, compiled=arguments.compiled))
    settle_collector()
    runs = BUSY_RUNS if settings["busy"] else arguments.runs
    works = [(name, precision, denoise) for name, precision, denoise, _ in cases if denoise is not None]
    times, faults = [[] for _ in works], [[] for _ in works]
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(settings["busy"])]
    try:
        for turn in range(0 if arguments.prepare else WARM + runs):
            for (_, _, denoise), taken, faulted in zip(works, times, faults, strict=True):
                before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
                denoise(x, sigma)
                if turn >= WARM:
                    taken.append(time.perf_counter() - begun)
                    faulted.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    rows = []
    for (name, precision, denoise), taken, faulted in zip(works, times, faults, strict=True):
        out = denoise(x, sigma).double()
        row = {"runtime": name, "precision": precision, "error": float((out - wanted).norm() / (wanted - x).norm())}
        if taken:
            row |= {"ms": 1e3 * statistics.median(taken), "p95": 1e3 * sorted(taken)[int(0.95 * (len(taken) - 1))]}
            row |= {"faults": statistics.median(faulted), "runs": len(taken)}
        rows.append(row)
    absent = [{"runtime": n, "precision": p, "why": why} for n, p, denoise, why in cases if denoise is None]
    return {"rows": rows, "absent": absent, "multiply": multiply_rate()}


def multiply_rate() -> float:
    """GFLOP/s of torch's float32 matrix product."""
    import torch

    a, b = torch.randn(2, 1536, 1536)
    taken = []
    for _ in range(6):
        begun = time.perf_counter()
        a @ b
        taken.append(time.perf_counter() - begun)
    return 2 * 1536**3 / min(taken) / 1e9


def start(name: str, arguments: argparse.Namespace) -> dict:
    """Run one group of settings in a process of its own."""
    from scanside.adapters.process import ENVIRONMENT

    environment = {key: value for key, value in os.environ.items() if key not in ENVIRONMENT}
    environment |= {"OMP_NUM_THREADS": str(arguments.threads)} | (ENVIRONMENT if SETTINGS[name]["sleeping"] else {})
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(arguments.cache / "inductor")
    words = [sys.executable, __file__, "--child", name, "--cache", str(arguments.cache), "--runs", str(arguments.runs)]
    words += ["--threads", str(arguments.threads), "--matrix", str(arguments.matrix)]
    words += ["--prepare"] * arguments.prepare + ["--compiled"] * (arguments.compiled and name == SERVED)
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(results: dict) -> str:
    """The results as a Markdown section."""
    from report import Table

    groups, served = results["groups"], results["groups"][SERVED]
    table = Table("runtime", "precision", "ms", "p95", "x torch as it comes", "GFLOP/s", "error to float64")
    plain = served["rows"][0]["ms"]
    for row in served["rows"]:
        table.add(
            row["runtime"],
            row["precision"],
            f"{row['ms']:.1f}",
            f"{row['p95']:.1f}",
            f"{plain / row['ms']:.2f}",
            f"{results['gigaflop'] / row['ms'] * 1e3:.0f}",
            f"{row['error']:.1e}",
        )
    for row in served["absent"]:
        table.add(row["runtime"], row["precision"], "-", "", "", "", row["why"])
    names = list(groups)
    settings = Table("runtime", "precision", *(f"{name}: ms (page faults)" for name in names))
    for index, row in enumerate(served["rows"]):
        found = [groups[name]["rows"][index] for name in names if index < len(groups[name]["rows"])]
        if len(found) < len(names):  # compiled by torch, which takes a minute per process: once is enough
            continue
        settings.add(row["runtime"], row["precision"], *(f"{r['ms']:.1f} ({r['faults']:.0f})" for r in found))
    rate = max(group["multiply"] for group in groups.values())
    floor = results["gigaflop"] / rate * 1e3
    loads = ", ".join(f"{group['load']:.1f}" for group in groups.values())
    best = min(served["rows"], key=lambda row: row["ms"])
    return (
        f"{table}\n\nThe default network, {results['gigaflop']:.2f} GFLOP at {results['matrix']} x {results['matrix']}, "
        f"random weights, batch 1, {results['threads']} threads; medians of {served['rows'][0]['runs']} runs (with a core taken "
        f"{BUSY_RUNS}), with the settings that `scanside serve` gives its engine. Errors are relative to what the network "
        f"changes. torch's float32 matrix product reaches {rate:.0f} GFLOP/s here at best and would take {floor:.1f} ms "
        f"for as many operations; the best runtime ({best['runtime']}, {best['precision']}) takes {best['ms']:.1f} ms. "
        f"{results['bfloat16']}\n\n{settings}\n\nThe same with other settings of the process; in parentheses, page faults per "
        "evaluation. One core taken: another process computes without end, which leaves the two threads one core and a half. "
        f"Load before each group: {loads}. {results['priority']}\n"
    )


def bfloat16_note() -> str:
    """Whether the figures for bfloat16 mean anything here."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        return "The processor computes in bfloat16."
    return (
        "The target of 9 ms in bfloat16 was set on a processor with AVX-512 and bfloat16 instructions and is missed here: this "
        "one has AVX2 only, and the target lies below its float32 floor."
    )


def priority_note() -> str:
    """How the benchmark was scheduled."""
    if os.sched_getscheduler(0) == os.SCHED_OTHER:
        return ""
    return "Run with a real-time priority (`chrt -f 10`), but for the last two groups, since the machine was shared."


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--matrix", type=int, default=256)
    parser.add_argument("--runs", type=int, default=24)
    parser.add_argument("--cache", type=Path, help="keep what is compiled here")
    parser.add_argument("--prepare", action="store_true", help="compile only")
    parser.add_argument("--child", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write results here, after each group of settings")
    parser.add_argument("--resume", type=Path, metavar="JSON", help="take groups that this file has from it")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile, which takes a minute to load")
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.cache = arguments.cache or Path(folder) / "cache"
        if arguments.prepare:
            start(SERVED, arguments)
            return
        groups = json.loads(arguments.resume.read_text())["groups"] if arguments.resume else {}
        for name in (each for each in SETTINGS if each not in groups):
            groups[name] = {"load": os.getloadavg()[0]} | start(name, arguments)
            print(f"{name}: done", file=sys.stderr, flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps({"groups": groups}, indent=1))
    from report import machine, update_document

    results = {
        "machine": machine(),
        "groups": groups,
        "gigaflop": gigaflop(arguments.matrix),
        "bfloat16": bfloat16_note(),
        "priority": priority_note(),
        "matrix": arguments.matrix,
        "threads": arguments.threads,
    }
    section = report(results)
    print(section)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    if arguments.write:
        update_document(ROOT / "docs" / "benchmarks.md", "Network runtimes", section, results["machine"])


if __name__ == "__main__":
    main()
