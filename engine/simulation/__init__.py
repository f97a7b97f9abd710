"""Simulated scans with a known answer."""
