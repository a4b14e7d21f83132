"""SGLang's command line as a list of words: read the few flags we need, leave the rest alone."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_dflash.errors import UserError

MODEL = ("--model-path", "--model")
DRAFTER = ("--speculative-draft-model-path", "--speculative-draft-model")
ALGORITHM = ("--speculative-algorithm", "--speculative-algo")
HOST = ("--host",)
PORT = ("--port",)
SERVED_NAME = ("--served-model-name",)
CONFIG = ("--config",)

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 30000


def flag_value(argv: Sequence[str], names: Sequence[str]) -> str | None:
    """Value of the last of ``names`` in ``argv`` (``--flag value`` or ``--flag=value``), else None.

    Raises :class:`UserError` when the flag stands last, without a value.
    """
    found = None
    for index, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name not in names:
            continue
        if equals:
            found = value
        elif index + 1 < len(argv) and not argv[index + 1].startswith("--"):
            found = argv[index + 1]
        else:
            raise UserError(f"{name} needs a value")
    return found


def port_of(argv: Sequence[str]) -> int:
    text = flag_value(argv, PORT)
    if text is None:
        return DEFAULT_PORT
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"--port {text!r} is not a number") from error


def has_any(argv: Sequence[str], prefix: str) -> bool:
    return any(word.startswith(prefix) for word in argv)
