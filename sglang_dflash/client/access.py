"""The key of a server that was started with ``--api-key``, and whose certificates are trusted."""

from __future__ import annotations

import os
import ssl

VARIABLE = "SGLANG_API_KEY"
OPTION_HELP = f"key of a server started with --api-key (default: ${VARIABLE})"


def api_key(given: str | None = None) -> str | None:
    """The key to send: the one given, else the environment's, else none."""
    return given or os.environ.get(VARIABLE) or None


def headers(given: str | None = None) -> dict[str, str]:
    key = api_key(given)
    return {"Authorization": f"Bearer {key}"} if key else {}


def trust(url: str) -> ssl.SSLContext | bool:
    """Whom to believe, for ``httpx``: the system, and what ``SSL_CERT_FILE`` names (made only for https)."""
    return ssl.create_default_context() if url.startswith("https:") else True
