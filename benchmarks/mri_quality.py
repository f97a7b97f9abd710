"""Image quality of MRI systems on real, fully sampled data with published masks, beside the plain reconstructions.

    python benchmarks/mri_quality.py                                  # everything that has not been run yet
    python benchmarks/mri_quality.py --systems plain --no-bart        # zero-filled, SENSE, wavelets, TV, SAKE
    python benchmarks/mri_quality.py --systems mri/online mri/hggdp --masks hggdp_radial_015 --images 2
    python benchmarks/mri_quality.py --write                          # update docs/benchmarks.md from what was run

One coil: 12 complex brain images of `siat_dev.npz`, subjects of which nothing was trained on. Four coils: `4h_GE`, a T1 brain
of another scanner and contrast; coil maps are estimated from the undersampled data. Images are compared on the scale of the
full scan, as they are: no image is divided by its own maximum, as published tables do. Where a method has a parameter (a
threshold, a rank) three values are run and the one of the best mean PSNR is shown, which flatters it. Every iteration stops by
its count, none by the reference. Each row is kept as JSON in the results folder; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from bart import Bart
from mri_cases import MASKS, Method, plain_methods, scans, zero_filled_method
from mri_pictures import save_panel
from mri_published import published
from report import Table, machine, update_document
from rich.progress import Progress
from scanside.engine.evaluation import evaluate

FIGURES = ("psnr", "ssim", "hfen", "nrmse")


def main() -> None:
    """Command line."""
    options = _options()
    torch.set_num_threads(options.threads)
    options.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        bart = Bart(Path(folder), options.threads) if options.bart else None
        work = [
            (kind, mask, method)
            for kind in options.kinds
            for mask in MASKS[kind]
            if not options.masks or mask in options.masks
            for method in _methods(kind, options, bart)
        ]
        _run(work, options)
    rows = _rows(options.results)
    if options.pictures:
        _draw(work, rows, options)
    for kind in options.kinds:
        print(_table(rows, kind), "\n")
    if options.write:
        document = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
        for kind, title in (("single", "MRI systems, one coil"), ("multi", "MRI systems, four coils")):
            update_document(document, title, _section(rows, kind, _written(document, title)), machine())


def _options() -> argparse.Namespace:
    root = Path(__file__).resolve().parent.parent
    data = Path(os.environ.get("SCANSIDE_DATA", root.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="*", default=["plain", "all"], help="plain, all, or names of configurations")
    parser.add_argument("--kinds", nargs="*", choices=sorted(MASKS), default=["single", "multi"])
    parser.add_argument("--masks", nargs="*", help="some of the masks only")
    parser.add_argument("--images", type=int, default=12, help="how many of the images of one coil")
    parser.add_argument("--full", action="store_true", help="published numbers of evaluations too")
    parser.add_argument("--natural", metavar="WEIGHTS", help="a prior of natural images too; see natural_images.py")
    parser.add_argument("--no-bart", dest="bart", action="store_false", help="leave BART out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=data, help="folder of scanner data")
    parser.add_argument("--results", type=Path, default=root / "build" / "mri_quality", help="folder of finished rows")
    parser.add_argument("--pictures", type=Path, help="folder for pictures of the first image")
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    return parser.parse_args()


def _methods(kind: str, options: argparse.Namespace, bart: Bart | None) -> Iterator[Method]:
    from mri_systems import foreign_method, system_methods

    systems: list[str] = options.systems
    yield zero_filled_method()  # which all others are counted against
    if "plain" in systems:
        yield from plain_methods(kind, bart)
    yield from system_methods(kind, [name for name in systems if name != "plain"], full=options.full)
    if options.natural:
        yield foreign_method(options.natural)


def _run(work: list[tuple[str, str, Method]], options: argparse.Namespace) -> None:
    with Progress() as progress:
        task = progress.add_task("reconstructions", total=len(work))
        for kind, mask, method in work:
            progress.update(task, description=f"{mask} {method.name}")
            path = options.results / f"{kind}_{mask}_{_slug(method.name)}.json"
            if not path.exists() or len(json.loads(path.read_text())["psnr"]) < (
                options.images if kind == "single" else 1
            ):
                row = _row(kind, mask, method, options)
                path.write_text(json.dumps(row, indent=1))
            progress.advance(task)


def _draw(work: list[tuple[str, str, Method]], rows: list[dict], options: argparse.Namespace) -> None:
    """The first image of each mask by the best method of each group that was asked for, with error maps."""
    for kind, mask in dict.fromkeys((kind, mask) for kind, mask, _ in work):
        best = {row["method"] for row in _best(rows, kind, mask)}
        case = next(scans(kind, options.data, mask, 1))
        chosen = [method for *where, method in work if where == [kind, mask] and method.name in best]
        images = {method.name: method(case)[0] for method in chosen}
        save_panel(options.pictures / f"{kind}_{mask}.png", case.reference, images)


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)


def _row(kind: str, mask: str, method: Method, options: argparse.Namespace) -> dict[str, object]:
    """One method on all images of a kind with one mask."""
    row: dict[str, object] = {"kind": kind, "mask": mask, "method": method.name, "group": method.group, "seconds": []}
    scores: dict[str, list[float]] = {figure: [] for figure in FIGURES}
    seconds = []
    for case in scans(kind, options.data, mask, options.images):
        image, evaluations, taken = method(case)
        found = evaluate(case.reference, image)
        for figure in FIGURES:
            scores[figure].append(getattr(found, figure))
        seconds.append(taken)
        row |= {"net": case.net, "evaluations": evaluations}
    return row | scores | {"seconds": seconds, "load": os.getloadavg()[0]}


def _rows(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def _best(rows: list[dict], kind: str, mask: str) -> list[dict]:
    """The row of the best mean PSNR of each group; plain methods first, then by PSNR."""
    groups: dict[str, dict] = {}
    for row in rows:
        if (row["kind"], row["mask"]) == (kind, mask):
            known = groups.get(row["group"])
            if known is None or fmean(row["psnr"]) > fmean(known["psnr"]):
                groups[row["group"]] = row
    return sorted(groups.values(), key=lambda row: (row["evaluations"] > 0, fmean(row["psnr"])))


COLUMNS = (
    "mask",
    "net R",
    "method",
    "PSNR dB",
    "least",
    "better",
    "SSIM",
    "HFEN",
    "NRMSE",
    "NFE",
    "CPU s",
    "published dB",
)


def _written(document: Path, title: str) -> list[dict[str, str]]:
    """Rows of the table that the document has now, by column."""
    text = document.read_text(encoding="utf-8")
    lines = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def _group_of(method: str) -> str:
    """Of a method as the table names it: without the parameter of plain ones."""
    return method if method.startswith("mri/") else re.sub(r"( 6 x 6, rank| r)? [0-9.]+$", "", method)


def _cells(row: dict, kind: str, mask: str, start: list[float]) -> list[str]:
    """A row of the table. start: PSNR of the zero-filled images."""
    better = sum(a > b for a, b in zip(row["psnr"], start, strict=False))
    means = [f"{fmean(row[figure]):.{digits}f}" for figure, digits in (("ssim", 3), ("hfen", 2), ("nrmse", 3))]
    return [
        mask,
        f"{row['net']:.2f}",
        row["method"],
        f"{fmean(row['psnr']):.2f}",
        f"{np.min(row['psnr']):.2f}",
        f"{better}/{len(row['psnr'])}",
        *means,
        str(row["evaluations"]),
        f"{fmean(row['seconds']):.2f}",
        published(row["group"], kind, mask),
    ]


def _table(rows: list[dict], kind: str, before: Sequence[dict[str, str]] = ()) -> Table:
    """The rows, and those of `before`, an older table, whose methods were not run."""
    table = Table(*COLUMNS)
    for mask in MASKS[kind]:
        best = _best(rows, kind, mask)
        groups = {row["group"] for row in best}
        kept = [row for row in before if row["mask"] == mask and _group_of(row["method"]) not in groups]
        start = next((row["psnr"] for row in best if row["group"] == "zero-filled"), [])
        lines = [[row.get(column, "") for column in COLUMNS] for row in kept]
        lines += [_cells(row, kind, mask, start) for row in best]
        for line in sorted(lines, key=lambda line: (int(line[9]) > 0, float(line[3]))):
            table.add(*line)
    return table


def _section(rows: list[dict], kind: str, before: Sequence[dict[str, str]]) -> str:
    explained = " ".join((__doc__ or "").split("\n\n", 2)[2].split())
    return (
        f"{_table(rows, kind, before)}\n\n`benchmarks/mri_quality.py`. {explained} `least`: PSNR of the worst image; `better`: "
        "images that are nearer to the truth than zero-filled. Rows of methods that were not run again stay as they were. NFE: "
        "network evaluations of each plane. CPU s: processor seconds of one image on one thread, with other work on the machine. "
        "Published figures are for the mask of that name but for other images, which were in the training set of that system, "
        "and for the iteration that was nearest to the reference; those for four coils divide each image by its own maximum.\n"
    )


if __name__ == "__main__":
    main()
