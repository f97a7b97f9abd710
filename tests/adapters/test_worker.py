"""The engine's process at the end of the bus: sessions in, images out, and what a bad session costs the others."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from scanside.adapters import mrd
from scanside.adapters.bus import Broker, Producer
from scanside.adapters.mrd_framing import Framer
from scanside.adapters.worker import Worker, warm_up
from scanside.engine.config import ConfigStore
from scanside.engine.errors import PeerError, ScansideError, TruncatedMessage
from scanside.engine.evaluation import nrmse

Scans = Callable[..., Any]
STORE = ConfigStore()


@pytest.fixture
def endpoint() -> Iterator[str]:
    """A bus with a worker on it, in a thread of this process."""
    with Broker() as broker:
        worker = Worker(broker.endpoint, STORE, name="test")
        thread = threading.Thread(target=worker.run)
        thread.start()
        yield broker.endpoint
        worker.stop()
        thread.join()


@pytest.fixture
def producer(endpoint: str) -> Iterator[Producer]:
    """A program with raw data."""
    made = Producer(endpoint)
    yield made
    made.close()


def images(producer: Producer) -> list[np.ndarray]:
    """Pictures of all results."""
    data = b"".join(bytes(part) for _, payload in producer.results(20) for part in payload)
    frames = [single for frame in Framer().feed(data) for single in frame.split()]
    return [mrd.image(frame).pixels[0, 0] for frame in frames if frame.id == mrd.MessageId.IMAGE]


def test_a_program_on_the_bus_gets_the_image_of_its_scan(producer: Producer, scan_bytes: Scans) -> None:
    scan = scan_bytes()
    for _ in range(2):
        producer.open("default")
        producer.send([mrd.encode_header(scan.xml), *scan.messages], messages=1 + len(scan.messages))
        producer.end()
        (image,) = images(producer)
        assert nrmse(scan.reference, image, fit_scale=True) < 0.05


@pytest.mark.parametrize(
    ("config", "parameters", "says"),
    [
        ("nonsense", {}, "unknown configuration"),
        ("default", {"reconstruction.iterations": -1}, "iterations"),
        ("default", {"no.such": 1}, "unknown key"),
        ("default", {"scanside.role": "sorcerer"}, "sorcerer"),
    ],
)
def test_sessions_that_cannot_work_are_refused(
    producer: Producer, config: str, parameters: dict[str, Any], says: str
) -> None:
    with pytest.raises(ScansideError, match=says):
        producer.open(config, parameters=parameters, timeout=20)


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (b"\xe7\x03" + bytes(8), PeerError),
        (mrd.encode_header("<x/>"), PeerError),
        (b"\x03\x00\xff\xff\x00\x00", TruncatedMessage),
    ],
    ids=["unknown id", "no header of a scan", "end inside a message"],
)
def test_a_bad_session_costs_only_itself(
    producer: Producer, endpoint: str, scan_bytes: Scans, payload: bytes, error: type[ScansideError]
) -> None:
    scan, neighbor = scan_bytes(), Producer(endpoint)
    try:
        neighbor.open("default")
        neighbor.send([mrd.encode_header(scan.xml), *scan.messages[:16]])
        producer.open("default")
        producer.send([payload])
        producer.end()
        with pytest.raises(error):
            list(producer.results(20))
        neighbor.send(list(scan.messages[16:]))
        neighbor.end()
        assert len(images(neighbor)) == 1
    finally:
        neighbor.close()


def test_a_worker_ends_when_its_parent_is_gone() -> None:
    with Broker() as broker:
        worker = Worker(broker.endpoint, STORE, name="orphan")
        thread = threading.Thread(target=worker.run, args=(os.getppid() + 1,))
        thread.start()
        thread.join(5)
        assert not thread.is_alive()


def test_warming_up_goes_all_the_way_to_images() -> None:
    assert warm_up(STORE) >= 4


def test_the_command_line_explains_itself() -> None:
    words = [sys.executable, "-m", "scanside.adapters.worker", "--help"]
    said = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout
    assert "--connect" in said
