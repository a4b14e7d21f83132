"""SGLang's command line as a list of words: read the few flags we need, leave the rest alone."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path

import yaml

from sglang_dflash.errors import UserError

MODEL = ("--model-path", "--model")
DRAFTER = ("--speculative-draft-model-path", "--speculative-draft-model")
ALGORITHM = ("--speculative-algorithm", "--speculative-algo")
HOST = ("--host",)
PORT = ("--port",)
SERVED_NAME = ("--served-model-name",)
CONFIG = ("--config",)
API_KEY = ("--api-key",)
CERTIFICATE = ("--ssl-certfile",)

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


def config_options(argv: Sequence[str]) -> dict[str, object]:
    """The options in the file of ``--config``, by flag name; empty without one.

    Raises :class:`UserError` for a file that SGLang would not take.
    """
    name = flag_value(argv, CONFIG)
    if name is None:
        return {}
    if sum(word.partition("=")[0] in CONFIG for word in argv) > 1:
        raise UserError("--config is given twice; SGLang takes one file")
    file = Path(name)
    if file.suffix.lower() not in (".yaml", ".yml"):
        raise UserError(f"--config {file}: SGLang takes a file named .yaml or .yml")
    try:
        options = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UserError(f"--config {file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"--config {file}{where} is not YAML; write lines such as `port: 8000`") from None
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise UserError(f"--config {file} is not a table; write lines such as `port: 8000`")
    for key in map(str, options):
        if "_" in key:
            raise UserError(f"--config {file}: write {key.replace('_', '-')}, as in the flag, not {key}")
    return {f"--{key}": value for key, value in options.items()}


def with_config(argv: Sequence[str]) -> list[str]:
    """``argv`` behind the options of its ``--config`` file, to read flags from: SGLang ranks them so.

    A switch that is off in the file is as good as absent.
    """
    words = [
        name if value is True else f"{name}={value}"
        for name, value in config_options(argv).items()
        if value is not None and value is not False
    ]
    return [*words, *argv]


def without(argv: Sequence[str], names: Container[str]) -> list[str]:
    """``argv`` less the flags ``names`` and their values."""
    kept: list[str] = []
    keep = True
    for word in argv:
        if word.startswith("--"):
            keep = word.partition("=")[0] not in names
        if keep:
            kept.append(word)
    return kept


def has_any(argv: Sequence[str], prefix: str) -> bool:
    return any(word.startswith(prefix) for word in argv)
