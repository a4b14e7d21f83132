"""What a running server says about itself."""

from __future__ import annotations

from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict

from sglang_dflash.client import access
from sglang_dflash.errors import UserError


class Marker(BaseModel):
    """What the plugin's hook puts into ``/server_info``: the worker really in use.

    ``reason`` and ``way_out`` say why it is not the tree worker and how to get that.
    """

    model_config = ConfigDict(extra="allow")

    plugin: str
    mode: str
    worker: str
    reason: str = ""
    way_out: str = ""


class ServerInfo(BaseModel):
    """The part of ``/server_info`` that this package reads."""

    model_config = ConfigDict(extra="allow")

    version: str
    model_path: str
    dtype: str = "auto"
    device: str | None = None
    speculative_algorithm: str | None = None
    speculative_num_draft_tokens: int | None = None
    attention_backend: str | None = None
    internal_states: list[dict[str, Any]] = []

    @property
    def marker(self) -> Marker | None:
        """None when the plugin's hook did not run in the scheduler, or the server is not DFLASH."""
        for state in self.internal_states:
            if "dflash" in state:
                return Marker.model_validate(state["dflash"])
        return None

    @property
    def accept_length(self) -> float | None:
        """Mean accept length since the server started (tokens per target pass, bonus included)."""
        values = [
            state["avg_spec_accept_length"]
            for state in self.internal_states
            if state.get("avg_spec_accept_length") is not None
        ]
        return sum(values) / len(values) if values else None


def normalize_url(url: str) -> str:
    """``host:port`` or a URL, with or without ``/v1``, to ``http://host:port``."""
    if "://" not in url:
        url = f"http://{url}"
    return url.rstrip("/").removesuffix("/v1")


class KeyRefusedError(UserError):
    """The server wants an API key, or another one."""


def refuse_key(base: str, api_key: str | None) -> KeyRefusedError:
    """What to say of an answer 401 from ``base``, to a request with this key."""
    if access.api_key(api_key):
        return KeyRefusedError(f"{base} does not take this API key; it was started with another --api-key")
    return KeyRefusedError(f"{base} wants an API key; pass --api-key or set {access.VARIABLE}")


def ask(url: str, path: str, timeout: float, api_key: str | None = None) -> httpx.Response:
    """GET ``path`` of a running server.

    Raises :class:`UserError` when nobody answers, :class:`KeyRefusedError` for an answer 401.
    """
    base = normalize_url(url)
    try:
        # Proxy settings are for the world outside; a server on this machine is not reached by them.
        reply = httpx.get(
            f"{base}{path}",
            headers=access.headers(api_key),
            timeout=timeout,
            trust_env=False,
            verify=access.trust(base),
        )
    except httpx.HTTPError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise UserError(
                f"the certificate of {base} is not trusted here; name it in SSL_CERT_FILE"
            ) from error
        raise UserError(f"no answer from {base} ({type(error).__name__}); is the server running?") from error
    except (httpx.InvalidURL, ValueError) as error:
        raise UserError(f"{url!r} is not a URL; write for example http://127.0.0.1:30000") from error
    if reply.status_code == 401:
        raise refuse_key(base, api_key)
    return reply


def read_server_info(url: str, timeout: float = 30.0, api_key: str | None = None) -> ServerInfo:
    """Ask a running server; raises :class:`UserError` when it does not answer as SGLang does."""
    reply = ask(url, "/server_info", timeout, api_key)
    if reply.status_code != 200:
        raise UserError(f"{reply.url} answered {reply.status_code}; is this an SGLang server?")
    try:
        return ServerInfo.model_validate(reply.json())
    except ValueError as error:
        raise UserError(f"{reply.url} is not SGLang's; is this an SGLang server?") from error
