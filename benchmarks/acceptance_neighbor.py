"""A healthy scanner in a process of its own, beside whatever else happens to the server."""

from __future__ import annotations

import multiprocessing
from multiprocessing.synchronize import Event

import numpy as np
import torch
from scanside.adapters.client import ScanClient
from scanside.adapters.files.ismrmrd import header_xml
from scanside.engine.messages import Image
from scanside.engine.simulation.scan import simulate_scan

__all__ = ["Neighbor"]


def neighbor(port: int, stop: Event, answers: multiprocessing.Queue[tuple[int, list[float], list[str]]]) -> None:
    """A healthy scanner in a process of its own: session after session, a readout a millisecond, until it is stopped."""
    torch.set_num_threads(1)
    frames = 6
    scan = simulate_scan(96, 8, 1, 0, repetitions=frames)
    sent, latencies, texts = 0, [], []
    while not stop.is_set():
        with ScanClient(port=port, timeout=30.0) as client:
            client.configure("mri/cartesian")
            client.header(header_xml(scan.header))
            for batch in scan.readouts(8):
                client.acquisitions(batch, 0.001)
            client.end_scan()
            for arrival in client.arrivals():
                if isinstance(arrival.item, Image):
                    latencies.append(float("nan") if arrival.latency is None else arrival.latency)
                else:
                    texts.append(str(arrival.item))
        sent += frames
    answers.put((sent, latencies, texts))


class Neighbor:
    """A context manager: a neighbor scans while the block runs; `sent`, `latencies` and `texts` are known after it."""

    def __init__(self, port: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._stop, self._answers = context.Event(), context.Queue()
        self._process = context.Process(target=neighbor, args=(port, self._stop, self._answers))
        self.sent, self.latencies, self.texts = 0, list[float](), list[str]()

    def __enter__(self) -> Neighbor:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.sent, self.latencies, self.texts = self._answers.get(timeout=60)
        self._process.join()

    def p99(self) -> float:
        """99th percentile of the latency, ms."""
        return 1e3 * float(np.nanquantile(self.latencies, 0.99))
