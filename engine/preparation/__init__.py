"""What happens to raw data before reconstruction: noise, coils, partial Fourier, trajectories."""
