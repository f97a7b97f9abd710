"""`scanside serve`: starts the server, says where it listens, and waits for the signal to stop."""

from __future__ import annotations

from rich.markup import escape
from scanside.adapters.server import ServeOptions, Server

from .output import console, table

__all__ = ["run_server"]


def run_server(options: ServeOptions) -> None:
    """Serve until SIGINT or SIGTERM. Raises ConfigError for what cannot work, DeviceLost when no worker starts."""
    server = Server(options)
    with server:
        _announce(server)
        server.wait()


def _announce(server: Server) -> None:
    """Where scanners and Prometheus find the server, and what they may ask for."""
    options, out = server.options, console()
    out.print(
        f"[bold]scanside[/] listens on [bold]{options.host}:{server.port}[/] for Gadgetron, FIRE and OpenRecon clients"
    )
    if server.metrics_port is not None:
        out.print(f"metrics  http://{options.metrics_host}:{server.metrics_port}/metrics")
        out.print(f"health   http://{options.metrics_host}:{server.metrics_port}/readyz")
    if server.bus:
        out.print(f"bus      {escape(server.bus)}")
    if options.record:
        out.print(f"records  {escape(str(options.record))}")
    rows = table("configuration", "what it does", "also called")
    for name in server.store.names():
        config = server.store.get(name)
        rows.add_row(name, config.description, ", ".join(config.aliases))
    out.print(rows)
    if options.default_config:
        out.print(f"any other name means {options.default_config}", markup=False)
    out.print("Ctrl-C stops the server", style="dim")
    out.file.flush()
