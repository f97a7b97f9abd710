"""Numerics on arrays; knows nothing of scans."""
