"""Learned priors: networks, views of a denoiser, training, and the weights that ship with the package."""
