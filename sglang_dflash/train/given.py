"""Prompts that somebody gives: rows of a file or of a dataset, and why some of them were left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sglang_dflash.client.jsonl import read_rows
from sglang_dflash.errors import UserError

NEEDED = "'prompt', 'instruction', or 'messages' (or 'conversations') with a user turn"


def summary(left_out: Counter[str]) -> str:
    """``2 without text, 1 no object``, the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())


def _text(content: Any) -> str | None:
    """A turn's text: a string, or the texts of a list of parts."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else None


def _user_turn(turns: Any) -> Any:
    """What the first user turn of a conversation holds; a turn without a role opens it as the user's."""
    for turn in turns if isinstance(turns, list) else [turns]:
        if isinstance(turn, str):
            return turn
        if isinstance(turn, dict) and (turn.get("role") or turn.get("from")) in ("user", "human"):
            return turn.get("content") or turn.get("value")
    return None


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(turn, dict) and "role" in turn for turn in value)


def turn_of(row: Any) -> tuple[str, str] | str:
    """(kind, text) of a row's prompt or first user turn; else why there is none, as a reason to count."""
    if not isinstance(row, dict):
        return "no object"
    found = row.get("prompt") or row.get("instruction")
    if found is None or _is_conversation(found):
        found = _user_turn(found or row.get("messages") or row.get("conversations"))
    if found is None:
        return "without a user turn"
    text = _text(found)
    if text is None or not text.strip():
        return "without text"
    return ("code" if row.get("kind") == "code" else "chat"), text.strip()


def _turns(rows: Iterable[Any], left_out: Counter[str]) -> Iterator[tuple[str, str]]:
    for row in rows:
        turn = turn_of(row)
        if isinstance(turn, str):
            left_out[turn] += 1
        else:
            yield turn


def read_prompts(path: Path, left_out: Counter[str] | None = None) -> Iterator[tuple[str, str]]:
    """(kind, text) of a JSON-lines file or a JSON array; rows without a prompt are counted in ``left_out``.

    Raises UserError where no row has one, or a line cannot be read.
    """
    counts: Counter[str] = Counter()
    usable = 0
    for usable, turn in enumerate(_turns((row for _, row in read_rows(path)), counts), 1):  # noqa: B007
        yield turn
    if not usable:
        raise UserError(f"{path} has no usable turn ({summary(counts) or 'no rows'}): needed is {NEEDED}")
    if left_out is not None:
        left_out.update(counts)


def read_dataset(name: str, split: str, left_out: Counter[str] | None = None) -> Iterator[tuple[str, str]]:
    """(kind, text) of a Hugging Face dataset: a name on the hub, or a folder of ``save_to_disk``."""
    try:
        import datasets
    except ImportError:
        raise UserError("--dataset needs the datasets package: pip install sglang-dflash[train]") from None
    try:
        if (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)
            rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        else:
            rows = datasets.load_dataset(name, split=split)
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot load dataset {name}, split {split}: {why}") from None
    counts: Counter[str] = Counter()
    usable = 0
    for usable, turn in enumerate(_turns(rows, counts), 1):  # noqa: B007
        yield turn
    if not usable:
        raise UserError(
            f"dataset {name} has no usable turn ({summary(counts) or 'no rows'}): its columns are "
            f"{', '.join(rows.column_names)}, needed is {NEEDED}"
        )
    if left_out is not None:
        left_out.update(counts)
