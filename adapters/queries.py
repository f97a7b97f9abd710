"""Answers to the questions that clients of Gadgetron may ask a server, and to some about scanside itself."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable

import torch
from scanside.engine.config import ConfigStore

__all__ = ["answer_query", "package_version"]

UNKNOWN = "Unknown query"


def package_version(name: str) -> str:
    """Version of an installed package, or `not installed`."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda(describe: Callable[[int], str]) -> str:
    return ";".join(describe(device) for device in range(torch.cuda.device_count()))


def _memory() -> str:
    return str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def answer_query(question: str, store: ConfigStore, *, ready: bool, sessions: int) -> str:
    """Answer a query by its key; lists are joined by semicolons. Unknown keys get Gadgetron's own answer to them."""
    answers: dict[str, Callable[[], str]] = {
        "gadgetron::info": lambda: f"scanside {package_version('scanside')} (speaks the Gadgetron protocol)",
        "gadgetron::version": lambda: f"scanside {package_version('scanside')}",
        "gadgetron::build": lambda: f"Python {platform.python_version()}, torch {torch.__version__}",
        "ismrmrd::version": lambda: package_version("ismrmrd"),
        "gadgetron::info::memory": _memory,
        "gadgetron::info::python": lambda: "YES",
        "gadgetron::info::matlab": lambda: "NO",
        "gadgetron::info::cuda": lambda: "YES" if torch.cuda.is_available() else "NO",
        "gadgetron::cuda::devices": lambda: str(torch.cuda.device_count()),
        "gadgetron::cuda::driver": lambda: str(torch.version.cuda or "NO"),
        "gadgetron::cuda::runtime": lambda: str(torch.version.cuda or "NO"),
        "gadgetron::cuda::memory": lambda: _cuda(lambda d: str(torch.cuda.get_device_properties(d).total_memory)),
        "gadgetron::cuda::capabilities": lambda: _cuda(lambda d: "{}.{}".format(*torch.cuda.get_device_capability(d))),
        "scanside::version": lambda: package_version("scanside"),
        "scanside::health": lambda: "ready" if ready else "not ready",
        "scanside::sessions": lambda: str(sessions),
        "scanside::configs": lambda: ";".join(store.names()),
    }
    found = answers.get(question)
    return UNKNOWN if found is None else found()
