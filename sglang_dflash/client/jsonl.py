"""Files of JSON rows as other people's tools write them: an object a line, or one array."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang_dflash.errors import UserError


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, value) of every row, counted from 1: the line's, or the element's of an array.

    Lines end in ``\\n`` alone: U+2028 and its like may stand in a JSON string as they are. A byte-order
    mark is skipped. Raises :class:`UserError` with the number of the line that is not UTF-8 or not JSON.
    """
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if content.lstrip().startswith(b"[") and not _is_json(content.lstrip().partition(b"\n")[0]):
        yield from enumerate(_parse(path, 1, content), 1)
        return
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    if len(lines) == 1 and isinstance(rows := _parse(path, *lines[0]), list):
        yield from enumerate(rows, 1)
        return
    for number, line in lines:
        yield number, _parse(path, number, line)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(path: Path, number: int, text: bytes) -> Any:
    """The value that begins in line ``number``."""
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        number += text.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{number} is not UTF-8; save the file in that encoding") from None
    except json.JSONDecodeError as error:
        number += error.lineno - 1
        raise UserError(
            f"{path}:{number} is not JSON: one object per line, or one array, is needed"
        ) from None
    except RecursionError:
        raise UserError(f"{path}:{number} is nested too deeply to be a prompt") from None
