"""Plain reconstructions, without any learned prior."""
