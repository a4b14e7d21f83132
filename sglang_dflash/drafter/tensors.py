"""What a drafter's safetensors headers say."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from pydantic import BaseModel

from sglang_dflash.errors import UserError

INDEX = "model.safetensors.index.json"


class TensorEntry(BaseModel):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Names, dtypes and shapes from the safetensors headers; every file's length is checked.

    Where there is an index, its files are read and nothing else, as SGLang does, and each tensor has to be
    in the file that the index names.

    Raises UserError for a missing, truncated or foreign file.
    Source of the format: https://github.com/huggingface/safetensors#format
    """
    index = _read_index(folder)
    files = sorted(folder / name for name in set(index.values())) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"the drafter {folder} has no safetensors file; other weight formats are not read")
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        entries = read_header(file)
        lost = next((name for name, home in index.items() if home == file.name and name not in entries), None)
        if lost is not None:
            raise UserError(
                f"{file} has no tensor {lost}, which {INDEX} places there; fetch the drafter again"
            )
        tensors.update(entries)
    return tensors


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, empty without an index. Raises UserError when one of its files is missing."""
    file = folder / INDEX
    if not file.is_file():
        return {}
    try:
        index = {str(name): str(home) for name, home in json.loads(file.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is not an index of safetensors files; fetch the drafter again") from None
    for home in sorted(set(index.values())):
        if not (folder / home).is_file():
            raise UserError(f"the drafter's {folder / home} is missing, {INDEX} names it; fetch it again")
    return index


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file. Raises UserError for a truncated or foreign file."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, 100 << 20):
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = {name: TensorEntry.model_validate(entry) for name, entry in header.items()}
    except (ValueError, struct.error, AttributeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file} is not a whole safetensors file ({first}); fetch it again") from None
    end = 8 + length + max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if end != size:
        raise UserError(
            f"{file} holds {size} bytes but its header promises {end}: it is truncated or damaged; "
            "fetch it again"
        )
    return entries
