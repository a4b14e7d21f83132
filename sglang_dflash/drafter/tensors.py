"""What a drafter's safetensors headers say."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from pydantic import BaseModel

from sglang_dflash.errors import UserError


class TensorEntry(BaseModel):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Names, dtypes and shapes from the safetensors headers; every file's length is checked.

    Raises UserError for a missing, truncated or foreign file.
    Source of the format: https://github.com/huggingface/safetensors#format
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"the drafter {folder} has no safetensors file; other weight formats are not read")
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        size = file.stat().st_size
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                if length > min(size, 100 << 20):
                    raise ValueError("header longer than the file")
                header = json.loads(stream.read(length))
        except (ValueError, struct.error) as error:
            raise UserError(f"{file} is not a whole safetensors file ({error}); fetch it again") from None
        header.pop("__metadata__", None)
        entries = {name: TensorEntry.model_validate(entry) for name, entry in header.items()}
        end = 8 + length + max((entry.data_offsets[1] for entry in entries.values()), default=0)
        if end != size:
            raise UserError(
                f"{file} holds {size} bytes but its header promises {end}: it is truncated or damaged; "
                "fetch it again"
            )
        tensors.update(entries)
    return tensors
