"""Simulated scans with a known answer."""

from __future__ import annotations

from .phantom import Phantom, shepp_logan
from .scan import SimulatedScan, simulate_scan

__all__ = ["Phantom", "SimulatedScan", "shepp_logan", "simulate_scan"]
