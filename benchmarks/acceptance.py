"""What the server must do, against a real `scanside serve` on free ports and clients that are not ours.

    python benchmarks/acceptance.py [--data DIR] [--tools DIR] [--only images|hostile] [--json FILE] [--write]

Images: the scan of the demo, scanner data of the data folder, and scans of Debian's ismrmrd-tools, sent by the PyPI package
`ismrmrd` (its stock client script from --tools, and its serializer keeping the images) and by `gadgetron_ismrmrd_client`
where there is one. Hostile input: what a broken or malicious peer sends, while a healthy neighbor scans on.

One line per check with the measured figure; the exit status is 1 when any failed. What is not installed is skipped, and
said so. Examples:

    python benchmarks/acceptance.py --only hostile
    SCANSIDE_DATA=~/data python benchmarks/acceptance.py --write
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from acceptance_hostile import Hostile
from acceptance_images import Pictures, save_bottles
from acceptance_parts import Checks, WatchedServer
from report import Table, machine, update_document

IDLE_SECONDS = 8
"""After which the server of these checks ends silent sessions."""
HEAD = """# Acceptance

Written by `benchmarks/acceptance.py`, which says how.

![Skyra bottles](images/skyra_bottles.png)

One slice of the Skyra bottles, by SENSE.
"""


def run(arguments: argparse.Namespace, checks: Checks, root: Path) -> None:
    """All checks that were asked for, on one server."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Hostile.lay_bait(folder)
        with WatchedServer("--idle", str(IDLE_SECONDS)) as server:
            server.port = server.wait_ready()
            if arguments.only != "hostile":
                pictures = Pictures(checks, server, folder, arguments.data, arguments.tools)
                pictures.run()
                if arguments.write and pictures.picture is not None:
                    save_bottles(pictures.picture, root / "docs" / "images" / "skyra_bottles.png")
            if arguments.only != "images":
                Hostile(checks, server, folder, IDLE_SECONDS).run()


def report(checks: Checks, seconds: float) -> str:
    """The results as Markdown."""
    table = Table("part", "check", "result", "figure")
    for group, name, word, figure in checks.rows:
        table.add(group, name, word, figure.replace("|", "/").replace("\n", " "))
    return (
        f"{checks.count('PASS')} passed, {checks.count('FAIL')} failed, {checks.count('SKIP')} skipped, in {seconds:.0f} s, "
        f"load {os.getloadavg()[0]:.1f}.\n\n{table}\n"
    )


def merge(checks: Checks, seconds: float, arguments: argparse.Namespace) -> float:
    """Keep the results of this part, and take those of the other one; returns the seconds of both."""
    kept = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    kept[arguments.only or "all"] = {"seconds": seconds, "rows": checks.rows}
    arguments.json.write_text(json.dumps(kept, indent=1))
    parts = [kept[name] for name in ("images", "hostile") if arguments.only and name in kept]
    if parts:
        checks.rows = [tuple(row) for part in parts for row in part["rows"]]
        seconds = sum(part["seconds"] for part in parts)
    return seconds


def main() -> int:
    """Command line."""
    root = Path(__file__).resolve().parent.parent
    shared = root.parent / "shared"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("SCANSIDE_DATA", shared / "data"))
    parser.add_argument("--data", type=Path, default=data, help="folder of scanner data (SCANSIDE_DATA)")
    parser.add_argument("--tools", type=Path, default=shared / "tools", help="folder with pypi_ismrmrd_client.py")
    parser.add_argument("--only", choices=("images", "hostile"), help="one half of the checks")
    parser.add_argument(
        "--json", type=Path, help="file of results; with --only, those of the other half stay as they are there"
    )
    parser.add_argument("--write", action="store_true", help="update docs/acceptance.md and the picture beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checks, begun = Checks(), time.monotonic()
    run(arguments, checks, root)
    seconds = time.monotonic() - begun
    if arguments.json is not None:
        seconds = merge(checks, seconds, arguments)
    section = report(checks, seconds)
    print(section.partition("\n")[0])
    if arguments.write:
        path = root / "docs" / "acceptance.md"
        path.write_text(path.read_text(encoding="utf-8") if path.exists() else HEAD, encoding="utf-8")
        update_document(path, "Real scans and hostile input", section, machine())
    return 1 if checks.count("FAIL") else 0


if __name__ == "__main__":
    sys.exit(main())
