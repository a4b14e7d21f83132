"""Is a port free, and which one to take."""

from __future__ import annotations

import errno
import socket

from sglang_dflash.errors import UserError


def _why_not(host: str, port: int) -> OSError | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # A closed connection's waiting time does not count as "in use".
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def port_is_free(host: str, port: int) -> bool:
    """True when a server could listen on ``host:port`` now."""
    return _why_not(host, port) is None


def require_free_port(host: str, port: int) -> None:
    """Raise :class:`UserError` when somebody listens on ``host:port`` already."""
    if not 0 < port < 65536:
        raise UserError(f"{port} is not a port; choose 1 to 65535")
    error = _why_not(host, port)
    if error is None:
        return
    if error.errno == errno.EADDRINUSE:
        raise UserError(
            f"port {port} on {host} is in use; stop what listens there or pass --port with another"
        )
    if error.errno == errno.EACCES:
        raise UserError(f"port {port} needs more rights than you have; pass --port with one above 1023")
    raise UserError(f"cannot listen on {host}: {error.strerror}; pass --host with an address of this machine")


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on right now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
