"""Linear operators: Fourier, coil sensitivity, sampling, non-uniform Fourier, wavelet."""
