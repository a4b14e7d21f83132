"""What a drafter's files say, read without loading a weight.

Runs in the parent process, so that a wrong drafter is one line and not a child's traceback.
Layout: z-lab's Hugging Face checkpoints (``config.json`` with ``block_size`` and
``dflash_config``, safetensors), as SGLang's ``models/dflash.py`` loads them.
"""

from __future__ import annotations

import contextlib
import json
import struct
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sglang_dflash.errors import UserError


class DFlashSection(BaseModel):
    model_config = ConfigDict(extra="allow")

    block_size: int | None = None
    mask_token_id: int | None = None
    target_layer_ids: list[int] | None = None
    num_target_layers: int | None = None
    projector_type: str | None = None
    selector_rank: int = 0
    tree_depth_bonus: list[float] | None = None
    lilicorr: Any = None


class DrafterConfig(BaseModel):
    """The part of a drafter's ``config.json`` that decides whether it fits a target."""

    model_config = ConfigDict(extra="allow")

    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    block_size: int | None = None
    vocab_size: int | None = None
    num_target_layers: int | None = None
    architectures: list[str] = []
    dflash_config: DFlashSection = DFlashSection()

    @property
    def block(self) -> int:
        return self.dflash_config.block_size or self.block_size or 16

    def target_layers(self) -> list[int]:
        """Feature layers: given, or SGLang's default, uniform from layer 1 to L-3."""
        given = self.dflash_config.target_layer_ids
        if given is not None:
            return given
        from sglang.srt.speculative.dflash_utils import build_target_layer_ids

        layers = self.dflash_config.num_target_layers or self.num_target_layers or self.num_hidden_layers
        return list(build_target_layer_ids(layers, self.num_hidden_layers))


class TensorEntry(BaseModel):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@lru_cache(maxsize=8)
def resolve_folder(path: str, revision: str | None = None) -> Path:
    """The local folder of a drafter: a folder as it is, a hub name from the local cache or the hub.

    Remembered: the scheduler asks for the block size in every decode step.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        fetch = partial(
            snapshot_download, path, revision=revision, allow_patterns=["*.json", "*.safetensors"]
        )
        try:
            return Path(fetch())
        except Exception as error:
            # A commit's hash is never looked up in the cache by itself, only asked of the hub.
            with contextlib.suppress(Exception):
                return Path(fetch(local_files_only=True))
            pinned = f" of revision {revision}" if revision else ""
            raise UserError(
                f"the drafter {path!r}{pinned} is neither a folder nor reachable on the model hub "
                f"({type(error).__name__}); give a folder to --speculative-draft-model-path"
            ) from error
    raise UserError(f"no drafter at {path!r}; give an existing folder to --speculative-draft-model-path")


@lru_cache(maxsize=8)
def read_config(folder: Path) -> DrafterConfig:
    file = folder / "config.json"
    try:
        return DrafterConfig.model_validate_json(file.read_text())
    except OSError:
        raise UserError(f"the drafter has no readable {file}; point at a DFlash checkpoint folder") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{file}: {where}: {first['msg']}; not a DFlash checkpoint's config") from None


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


def check_fits(folder: Path, *, target: Any, target_name: str) -> DrafterConfig:
    """Check a drafter against its target's text config.

    Args:
        folder: the drafter's folder.
        target: the target's Hugging Face text config (hidden_size, vocab_size, num_hidden_layers).
        target_name: how messages name the target.

    Raises:
        UserError: one line naming what does not fit.
    """
    config = read_config(folder)
    tensors = read_tensors(folder)
    dflash = config.dflash_config
    if config.block < 2:
        raise UserError(f"the drafter's block_size is {config.block}; a draft block needs at least 2 rows")
    if config.hidden_size != target.hidden_size:
        raise UserError(
            f"the drafter was made for hidden size {config.hidden_size}, {target_name} has "
            f"{target.hidden_size}; use the drafter trained for this target"
        )
    if config.vocab_size is not None and config.vocab_size != target.vocab_size:
        raise UserError(
            f"the drafter was made for a vocabulary of {config.vocab_size}, {target_name} has "
            f"{target.vocab_size}; use the drafter trained for this target"
        )
    if dflash.mask_token_id is not None and not 0 <= dflash.mask_token_id < target.vocab_size:
        raise UserError(
            f"the drafter's mask_token_id {dflash.mask_token_id} is outside {target_name}'s vocabulary "
            f"of {target.vocab_size}"
        )
    made_for = dflash.num_target_layers or config.num_target_layers
    if made_for is not None and made_for != target.num_hidden_layers:
        raise UserError(
            f"the drafter was made for a target of {made_for} layers, {target_name} has "
            f"{target.num_hidden_layers}; use the drafter trained for this target"
        )
    layers = config.target_layers()
    limit = target.num_hidden_layers - 2
    wrong = [layer for layer in layers if not 0 <= layer <= limit]
    if wrong:
        raise UserError(
            f"the drafter reads target layer {wrong[0]}, but SGLang captures layers 0 to {limit} of "
            f"{target_name} ({target.num_hidden_layers} layers; the last is never captured)"
        )
    _check_shapes(folder, config, tensors, len(layers))
    return config


def _check_shapes(
    folder: Path, config: DrafterConfig, tensors: dict[str, TensorEntry], num_features: int
) -> None:
    names = {name.removeprefix("model."): entry for name, entry in tensors.items()}
    hidden = config.hidden_size
    expected = {
        "fc.weight": [hidden, num_features * hidden],
        "hidden_norm.weight": [hidden],
        "norm.weight": [hidden],
    }
    for name, shape in expected.items():
        if name not in names:
            raise UserError(f"the drafter {folder} has no tensor {name}; it is not a DFlash checkpoint")
        if names[name].shape != shape:
            raise UserError(
                f"the drafter's {name} is {names[name].shape}, its config ({num_features} feature layers of "
                f"{hidden}) needs {shape}; config and weights do not belong together"
            )
    for layer in range(config.num_hidden_layers):
        if not any(name.startswith(f"layers.{layer}.") for name in names):
            raise UserError(f"the drafter {folder} has no weights for its layer {layer}; fetch it again")


def block_size_of(spec: Any) -> int:
    """The draft block size B in force: the flag, else the drafter's config.

    Args:
        spec: anything with ``speculative_dflash_block_size`` and ``speculative_draft_model_path``
            (SGLang's published settings or its arguments under resolution).
    """
    if spec.speculative_dflash_block_size is not None:
        return int(spec.speculative_dflash_block_size)
    folder = resolve_folder(spec.speculative_draft_model_path, spec.speculative_draft_model_revision)
    return read_config(folder).block
