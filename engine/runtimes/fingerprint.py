"""What a compiled network depends on: the function that the module computes, and the machine it was compiled for."""

from __future__ import annotations

import hashlib
import inspect
import platform
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import msgspec
import torch
from torch import nn

__all__ = ["function_digest", "gpu_identity", "package_version", "processor_identity"]

_PLAIN = (bool, int, float, str, tuple, type(None), msgspec.Struct)
_UNSET = ("training", "call_super_init", "dump_patches")


def function_digest(model: nn.Module) -> str:
    """SHA-256 of all that decides what a module computes: structure, settings, weights, and the code of modules not torch's."""
    digest = hashlib.sha256()
    for line in _structure(model):
        digest.update(line.encode() + b"\n")
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _structure(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        kind = type(module)
        settings = {k: v for k, v in sorted(vars(module).items()) if _is_setting(k, v)}
        yield f"{name} {kind.__module__}.{kind.__qualname__} {module.extra_repr()} {settings!r}"
        if not kind.__module__.startswith("torch."):
            yield _source(kind)


def _is_setting(name: str, value: object) -> bool:
    return not name.startswith("_") and name not in _UNSET and isinstance(value, _PLAIN)


def _source(kind: type[nn.Module]) -> str:
    try:
        return inspect.getsource(inspect.getmodule(kind) or kind)
    except (OSError, TypeError):  # typed in, or compiled: nothing to read
        return ""


@cache
def processor_identity() -> str:
    """Name and instruction sets of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = hashlib.sha256(" ".join(sorted(found.get("flags", "").split())).encode()).hexdigest()[:16]
    return f"{found.get('model name', platform.machine())} {found.get('cpu family')}.{found.get('model')} {flags}"


def gpu_identity() -> str:
    """Name, compute capability and driver of the current CUDA device; plans of TensorRT run on no other."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{properties.name} sm_{properties.major}{properties.minor} driver {_driver()}"


def _driver() -> str:
    """Version of the NVIDIA kernel driver, as /proc has it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    return next((word for word in text.split() if word[:1].isdigit() and "." in word), "unknown")


def package_version(name: str) -> str:
    """Version of an installed package; empty when it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
