"""Token shards: what the target answered, as uint16 ids with assistant spans marked.

A corpus is a folder of ``train-00000.npz`` and ``heldout-00000.npz`` files and one
``corpus.json``. The split is a function of the prompt's hash; a reader of one split checks
every record, so a held-out prompt cannot be trained on by renaming a file.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from sglang_dflash.errors import UserError
from sglang_dflash.train.prompts import KINDS, is_held_out

SCHEMA = 1
SPLITS = ("train", "heldout")


@dataclass
class Record:
    """One answered prompt: ``tokens[:prompt_len]`` is the templated prompt, the rest the answer."""

    tokens: list[int]
    prompt_len: int
    kind: str
    temperature: float
    hash: int

    @property
    def split(self) -> str:
        return SPLITS[is_held_out(self.hash)]


@dataclass
class Shard:
    """Flat ``tokens`` [total]; document i is ``tokens[offsets[i]:offsets[i + 1]]``."""

    path: Path
    tokens: np.ndarray
    offsets: np.ndarray
    prompt_len: np.ndarray
    kind: np.ndarray
    temperature: np.ndarray
    hash: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt_len)

    @property
    def response_tokens(self) -> int:
        return int(self.offsets[-1]) - int(self.prompt_len.sum())


def write_atomically(path: Path, write) -> None:
    """Call ``write(temporary path)``, then rename: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    # torch.save says RuntimeError and safetensors its own error when the disk is full.
    except (OSError, RuntimeError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {why}; free some space and run again") from None


def write_shard(path: Path, records: list[Record], vocab: int) -> None:
    width = np.uint16 if vocab <= 1 << 16 else np.uint32
    offsets = np.cumsum([0] + [len(r.tokens) for r in records]).astype(np.int32)
    arrays = {
        "tokens": np.concatenate([np.asarray(r.tokens, dtype=width) for r in records]),
        "offsets": offsets,
        "prompt_len": np.asarray([r.prompt_len for r in records], dtype=np.int32),
        "kind": np.asarray([KINDS.index(r.kind) for r in records], dtype=np.uint8),
        "temperature": np.asarray([r.temperature for r in records], dtype=np.float16),
        "hash": np.asarray([r.hash for r in records], dtype=np.uint64),
    }

    def write(temporary: Path) -> None:
        with temporary.open("wb") as handle:
            np.savez_compressed(handle, **arrays)

    write_atomically(path, write)


def read_shard(path: Path) -> Shard:
    """One shard, checked: whole, consistent, and of the split that its name says."""
    try:
        with np.load(path) as data:
            shard = Shard(path, **{k: data[k] for k in Shard.__dataclass_fields__ if k != "path"})
        bad = len(shard.offsets) != len(shard) + 1 or int(shard.offsets[-1]) != len(shard.tokens)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"corpus shard {path} is damaged ({error}); delete it and run data again") from None
    if bad:
        raise UserError(f"corpus shard {path} is cut short; delete it and run data again")
    split = path.name.split("-")[0]
    if any(SPLITS[is_held_out(int(h))] != split for h in shard.hash):
        raise UserError(f"corpus shard {path} holds prompts of another split; delete it and run data again")
    return shard


def shard_paths(folder: Path, split: str) -> list[Path]:
    return sorted(folder.glob(f"{split}-[0-9]*.npz"))


def read_meta(folder: Path) -> dict:
    file = folder / "corpus.json"
    if not file.is_file():
        raise UserError(f"no corpus at {folder}: corpus.json is missing (sglang-dflash data --out {folder})")
    meta = json.loads(file.read_text())
    if meta.get("schema") != SCHEMA:
        raise UserError(f"corpus {folder} has schema {meta.get('schema')}, this version reads {SCHEMA}")
    return meta


def write_meta(folder: Path, meta: dict) -> None:
    text = json.dumps({"schema": SCHEMA, **meta}, indent=1) + "\n"
    write_atomically(folder / "corpus.json", lambda p: p.write_text(text))


def load_split(folders: Iterable[Path], split: str) -> list[Shard]:
    """All shards of one split; a prompt that occurs twice is the generator's matter, not ours."""
    shards = []
    for folder in folders:
        read_meta(folder)
        shards += [read_shard(path) for path in shard_paths(folder, split)]
    if not shards:
        raise UserError(f"no {split} shards in {', '.join(map(str, folders))}: run sglang-dflash data first")
    return shards
