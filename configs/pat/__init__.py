"""Shipped configurations of photoacoustic systems."""
