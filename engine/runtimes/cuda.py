"""The little of CUDA that runtimes need, in one place: streams, buffers, and work recorded once to be replayed.

Recording follows what TensorRT and torch ask for: one run outside of the recording first, on the same stream, which is not
the default one; only this thread's calls are forbidden meanwhile; buffers stay where they are for as long as the recording is
used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["CudaDevice"]


class CudaDevice:
    """One CUDA device with a stream of our own on it. Unmeasured: written without one at hand."""

    def __init__(self, index: int | None = None) -> None:
        self.index = torch.cuda.current_device() if index is None else index
        self._stream = torch.cuda.Stream(self.index)  # type: ignore[no-untyped-call]

    @property
    def stream_handle(self) -> int:
        """The stream, for C interfaces."""
        return int(self._stream.cuda_stream)

    def empty(self, sizes: tuple[int, ...]) -> Tensor:
        """A float32 buffer on the device."""
        return torch.empty(sizes, device=f"cuda:{self.index}")

    def made_current(self) -> torch.cuda.device:
        """A context in which libraries find this device as the current one."""
        return torch.cuda.device(self.index)

    def run(self, work: Callable[[], None]) -> None:
        """Run work on our stream, after all that the caller's stream has been given, and before what it is given next."""
        caller = torch.cuda.current_stream(self.index)
        self._stream.wait_stream(caller)
        with torch.cuda.device(self.index), torch.cuda.stream(self._stream):
            work()
        caller.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run work once, record it, and return what replays the recording."""
        self.run(work)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.index),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            work()
        return graph.replay
