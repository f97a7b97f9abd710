"""Physics, reconstruction and sessions. Opens no socket, no HTTP port and no file format."""
