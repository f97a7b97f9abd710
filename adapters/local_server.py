"""A `scanside serve` of one's own, on free ports of this machine, for as long as a block runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from scanside.engine.errors import DeviceLost

from .logs import ENVIRONMENT

__all__ = ["LocalServer"]

_READY = "ready"
"""The event that the server logs when it takes scans."""
_LINES = 20
"""Last lines of its log that are kept for an error message."""
_STOP_SECONDS = 15.0


class LocalServer:
    """A context manager: the server starts in the background on entry and has ended after it.

    arguments: more words for `scanside serve`. on_line: called with every line of its log, in the thread that reads them.
    """

    def __init__(self, arguments: Sequence[str] = (), *, on_line: Callable[[str], None] | None = None) -> None:
        self._arguments, self._on_line = list(arguments), on_line
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._known = threading.Event()
        self._port: int | None = None
        self.bus = ""
        """Endpoint of the bus, known once it is ready, where the arguments ask for one."""
        self.metrics_port = 0
        """Port of the metrics, known once it is ready."""
        self._log: deque[str] = deque(maxlen=_LINES)

    @property
    def pid(self) -> int:
        """Process id of the server; its workers are children of it. 0 before it starts."""
        return 0 if self._process is None else self._process.pid

    def __enter__(self) -> Self:
        words = ["serve", "-p", "0", "--metrics-port", "0", *self._arguments]
        environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", "scanside.adapters.cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us; we end it
        )
        self._reader = threading.Thread(target=self._read, name="server-log", daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        process = self._process
        if process is None or self._reader is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._reader.join()
        if process.stderr is not None:
            process.stderr.close()

    def wait_ready(self, seconds: float = 120.0) -> int:
        """Wait until a scan can be sent; returns the port. Raises DeviceLost with the end of the log when it cannot."""
        self._known.wait(seconds)
        if self._port is None:
            said = "\n".join(self._log) or "it said nothing"
            raise DeviceLost(
                f"the server did not start within {seconds:g} s, run `scanside doctor`; its last words: {said}"
            )
        return self._port

    def _read(self) -> None:
        """Follow the log until the server ends; runs in a thread."""
        stream = self._process.stderr if self._process is not None else None
        for line in stream or ():
            self._log.append(line.rstrip())
            if self._on_line is not None:
                self._on_line(line)
            try:
                record = json.loads(line)
            except ValueError:  # something that a library wrote
                continue
            if isinstance(record, dict) and record.get("event") == _READY and "port" in record:
                self._port, self.bus = int(record["port"]), str(record.get("bus") or "")
                self.metrics_port = int(record.get("metrics_port") or 0)
                self._known.set()
        self._known.set()
