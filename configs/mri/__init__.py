"""Shipped configurations of MRI systems."""
