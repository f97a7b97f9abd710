"""Published figures for the masks of `mri_quality.py`, by system. They are quoted, not reproduced."""

from __future__ import annotations

__all__ = ["published"]

RADIAL, RANDOM, LINES, RADIAL_4 = "hggdp_radial_015", "hggdp_random_015", "hggdp_cart_085", "hggdp_radial_025"

PUBLISHED: dict[str, dict[tuple[str, str], float]] = {
    # mean PSNR of 31 SIAT images; EDAEPRec 2020, WDAEPRec 2021, HGGDP 2021
    "mri/edaeprec": {("single", RADIAL): 32.00, ("single", RANDOM): 30.68, ("single", LINES): 28.85},
    "mri/wdaeprec": {("single", RADIAL): 32.68, ("single", RANDOM): 31.24, ("single", LINES): 29.37},
    "mri/hggdp": {
        ("single", RADIAL): 32.79,
        ("single", RANDOM): 31.78,
        ("single", LINES): 29.05,
        ("single", RADIAL_4): 35.55,
    },
    # one image of their two; EDMSPRec 2020
    "mri/edmsprec": {("single", RADIAL): 31.15, ("single", RANDOM): 30.20, ("single", LINES): 28.47},
    # mean over three brains and phantoms of four coils; UGM-PI 2022
    "mri/ugm_pi": {
        ("multi", "random2D_4"): 40.13,
        ("multi", "random2D_6"): 37.25,
        ("multi", "poisson_6"): 38.05,
        ("multi", "poisson_10"): 34.20,
    },
    # one T1 brain of 8 coils (GE), each system as published; WKGM as GM-SDE quotes it
    "mri/wkgm": {("multi", "poisson_6"): 38.51, ("multi", "poisson_10"): 36.35},
    "mri/svd_wkgm": {("multi", "random2D_4"): 43.85},
    "mri/gm_sde": {("multi", "poisson_6"): 41.09, ("multi", "poisson_10"): 37.98},
    "mri/ki_ebm": {("multi", "random2D_4"): 40.56, ("multi", "random2D_6"): 38.51},
    "mri/cm_dm": {("multi", "poisson_10"): 40.58},
    "SAKE": {
        ("multi", "random2D_4"): 35.95,
        ("multi", "random2D_6"): 33.62,
        ("multi", "poisson_6"): 34.96,
        ("multi", "poisson_10"): 32.13,
    },
}


def published(group: str, kind: str, mask: str) -> str:
    """Published PSNR in dB of a system with a mask, or nothing."""
    value = PUBLISHED.get(group, {}).get((kind, mask))
    return "" if value is None else f"{value:.2f}"
