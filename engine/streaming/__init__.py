"""Sessions: readouts in, frames out, while the scan runs."""
