"""The CUDA kernels on a GPU: each is checked against float64 first, then timed beside torch recorded as a CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from report import Table
from scanside.kernels import coil_matrix, device, fft, folded, sense_device
from scanside.kernels.kspace_step import KspaceStep

__all__ = ["kernel_rows", "kernel_text"]

MATRIX = 256
LIMIT = 2e-6
"""Relative error beyond which a kernel is wrong."""
Timer = Callable[[Callable[[], object]], tuple[float, float]]
Case = tuple[str, float | None, Callable[[], torch.Tensor], Callable[[], torch.Tensor], Callable[[], torch.Tensor]]
"""What, target in us, ours, torch's, and the same in double precision."""


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex64, device="cuda", generator=torch.Generator("cuda").manual_seed(0))


def chain(maps: torch.Tensor, weights: torch.Tensor, x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """maps^H F^H weights F maps x by torch.fft."""
    kspace = torch.fft.fftn(maps * x, dim=axes) * weights
    return (maps.conj() * torch.fft.ifftn(kspace, dim=axes, norm="forward")).sum(0)


def grams() -> Iterator[Case]:
    """A^H A for masks of planes and of lines."""
    x = random(1, MATRIX, MATRIX)
    for coils, for_planes, for_lines in ((8, 15, 6), (16, 20, 9), (32, 35, 15)):
        maps = random(coils, 1, MATRIX, MATRIX) / MATRIX
        plane, lines = torch.rand(1, MATRIX, MATRIX, device="cuda"), torch.rand(MATRIX, device="cuda")
        planes_form, lines_form = sense_device.DevicePlanes(maps), sense_device.DeviceLines(maps, -2)
        for name, target, form, weights, axes in (
            ("2-D mask", for_planes, planes_form, plane, (-2, -1)),
            ("line mask", for_lines, lines_form, lines, (-2,)),
        ):
            shaped = weights if name == "2-D mask" else weights[:, None]
            yield (
                f"A^H A, {coils} coils, {name}",
                target,
                lambda form=form, weights=weights: form.gram(weights, x),
                lambda maps=maps, shaped=shaped, axes=axes: chain(maps, shaped, x, axes),
                lambda maps=maps, shaped=shaped, axes=axes: chain(maps.to(torch.complex128), shaped, x, axes),
            )


def steps() -> Iterator[Case]:
    """The data put in their place in the k-space of every coil."""
    x = random(8, 1, MATRIX, MATRIX)
    for name, sizes, axes in (("2-D mask", (MATRIX, MATRIX), (-2, -1)), ("line mask", (MATRIX, 1), (-2,))):
        mask = torch.rand(sizes, device="cuda") < 0.25
        data = x.flip(-1) * mask / MATRIX
        step = KspaceStep(data, mask, axes)

        def by_torch(
            x: torch.Tensor, mask: torch.Tensor = mask, data: torch.Tensor = data, axes: tuple[int, ...] = axes
        ):
            kspace = torch.where(mask, data.to(x.dtype), torch.fft.fftn(x, dim=axes, norm="forward"))
            return torch.fft.ifftn(kspace, dim=axes, norm="forward")

        yield (
            f"k-space step, 8 coils, {name}",
            None,
            lambda step=step: step(x),
            lambda by_torch=by_torch: by_torch(x),
            lambda by_torch=by_torch: by_torch(x.to(torch.complex128)),
        )


def others() -> Iterator[Case]:
    """Transforms, the coil matrix, folded pixels."""
    x = random(8, MATRIX, MATRIX)
    for axis in (1, 2):
        yield (
            f"FFT along axis {axis}, 8 x 256 x 256",
            None,
            lambda axis=axis: fft.apply(x, axis),
            lambda axis=axis: torch.fft.fft(x, dim=axis),
            lambda axis=axis: torch.fft.fft(x.to(torch.complex128), dim=axis),
        )
    rows, columns = (index.cuda() for index in coil_matrix.triangle(8))
    matrices = random(len(rows), MATRIX, MATRIX)
    matrices[rows == columns] = matrices[rows == columns].real.to(matrices.dtype)
    full = x.new_zeros(8, 8, MATRIX, MATRIX)
    full[columns, rows], full[rows, columns] = matrices.conj(), matrices

    def applied(full: torch.Tensor) -> torch.Tensor:
        return torch.einsum("cdyx,dyx->cyx", full, x.to(full.dtype))

    wide = full.to(torch.complex128)
    yield (
        "coil matrix, 8 coils",
        None,
        lambda: coil_matrix.apply(matrices, x),
        lambda: applied(full),
        lambda: applied(wide),
    )
    half = random(MATRIX * MATRIX // 4, 4, 4)
    values, vectors = torch.linalg.eigh((half @ half.mH).to(torch.complex128))
    turns, sizes = vectors.movedim(0, -1).to(torch.complex64).contiguous(), values.T.float().contiguous()

    def by_torch(turns: torch.Tensor) -> torch.Tensor:
        return folded._torch(turns, sizes, x[:1].to(turns.dtype), 0.1, 4, 1)

    yield (
        "folded pixels, every 4th line",
        None,
        lambda: folded.solve(turns, sizes, x[:1], 0.1, (4, 1)),
        lambda: by_torch(turns),
        lambda: by_torch(turns.to(torch.complex128)),
    )


def recorded(work: Callable[[], object]) -> Callable[[], None]:
    """The work as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def kernel_rows(seconds: Timer) -> list[dict]:
    """One row per kernel: error, times; `wrong` where it does not compile or is not accurate."""
    if not device.installed():
        return [{"what": "all", "wrong": "NVRTC is not installed: pip install 'scanside[cuda]'"}]
    rows = []
    for cases in (grams, steps, others):
        for what, target, ours, torchs, exact in cases():
            row: dict = {"what": what, "target": target}
            rows.append(row)
            try:
                expected = exact()
                row["error"] = float((ours() - expected).abs().max() / expected.abs().max())
            except RuntimeError as error:
                row["wrong"] = str(error)
                continue
            if not row["error"] <= LIMIT:
                row["wrong"] = f"relative error {row['error']:.1e}, at most {LIMIT:.0e} is allowed"
                continue
            row["seconds"], row["p95"] = seconds(recorded(ours))
            row["torch"] = seconds(recorded(torchs))[0]
    return rows


def kernel_text(rows: list[dict]) -> str:
    """The section of the document."""
    table = Table("what", "µs", "p95", "target, µs", "torch, µs", "error", "what was wrong")
    for row in rows:
        times = [f"{1e6 * row.get(key, math.nan):.1f}" for key in ("seconds", "p95", "torch")]
        error = f"{row['error']:.1e}" if "error" in row else ""
        table.add(row["what"], *times[:2], row.get("target") or "", times[2], error, row.get("wrong", ""))
    return (
        f"{table}\n\n256 x 256, complex64; both sides replayed as CUDA graphs. Errors are relative, against float64.\n"
    )
