"""Is a port free, and which one to take."""

from __future__ import annotations

import socket

from sglang_dflash.errors import UserError


def port_is_free(host: str, port: int) -> bool:
    """True when a server could listen on ``host:port`` now (a closed socket's wait does not count)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def require_free_port(host: str, port: int) -> None:
    """Raise :class:`UserError` when somebody listens on ``host:port`` already."""
    if not 0 < port < 65536:
        raise UserError(f"{port} is not a port; choose 1 to 65535")
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise UserError(f"{host!r} is not an address of this machine: {error.strerror}") from error
    if not port_is_free(host, port):
        raise UserError(
            f"port {port} on {host} is in use; stop what listens there or pass --port with another"
        )


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on right now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
