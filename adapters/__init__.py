"""Everything that touches the outside world: protocols, sockets, files, metrics, the command line."""
