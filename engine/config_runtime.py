"""Table of a configuration for what runs its networks."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = ["RuntimeConfig", "RuntimeName"]

RuntimeName = Literal["auto", "tensorrt", "torch-cuda-graph", "openvino", "onnxruntime", "torch", "torch-compile"]


class RuntimeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What runs networks; `auto` leaves it to the machine."""

    runtime: RuntimeName = "auto"
    """`auto`: on a GPU the first of TensorRT, torch as a CUDA graph and torch that works; on the processor the fastest."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the device has it, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    """Processor threads; 0: all cores that the process may use."""
