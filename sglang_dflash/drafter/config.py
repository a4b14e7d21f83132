"""What a drafter's ``config.json`` says, read as SGLang reads it, and where its folder is."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sglang_dflash.drafter.kinds import check_kind
from sglang_dflash.errors import UserError

#: Keys that SGLang looks for in ``dflash_config`` and, where they are not there, at the top level
#: (``speculative/dflash_utils.py: parse_dflash_draft_config``).
LIFTED = (
    "block_size",
    "mask_token",
    "mask_token_id",
    "num_target_layers",
    "projector_type",
    "target_layer_ids",
)
#: Two spellings of one layout, in use at either level: the anchor's row predicts the next token.
ANCHOR_FIRST = ("query_zero_predicts_next", "sample_from_anchor")


class DFlashSection(BaseModel):
    model_config = ConfigDict(extra="allow")

    block_size: int | None = None
    mask_token_id: int | None = None
    target_layer_ids: list[int] | None = None
    num_target_layers: int | None = None
    projector_type: str | None = None
    selector_rank: int = 0
    selector_top_k: int = 0
    output_multiplier: float = 1.0
    final_logit_softcapping: float | None = None
    conv_kernel_size: int = 0
    conv_group_size: int = 0
    attention_sink_bias: bool = False
    tree_depth_bonus: list[float] | None = None
    # Tokens per pass by width, {"8x6": 2.25}: where a server starts from before it has served (worker/width).
    tree_accept: dict[str, float] = {}
    tree_accept_sampled: dict[str, float] = {}
    lilicorr: Any = None
    query_zero_predicts_next: bool | None = None
    sample_from_anchor: bool | None = None

    @property
    def reshapes_logits(self) -> bool:
        """A selector adds to logits that are not the head's own."""
        return bool(self.selector_rank and (self.output_multiplier != 1.0 or self.final_logit_softcapping))


class DrafterConfig(BaseModel):
    """The part of a drafter's ``config.json`` that decides whether it fits a target.

    What SGLang takes from either level stands in ``dflash_config`` here.
    """

    model_config = ConfigDict(extra="allow")

    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    attention_bias: bool = False
    vocab_size: int | None = None
    draft_vocab_size: int | None = None
    architectures: list[str] = []
    quantization_config: dict[str, Any] | None = None
    dflash_config: DFlashSection = DFlashSection()

    @model_validator(mode="before")
    @classmethod
    def _lift(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        section = values.get("dflash_config")
        if section is not None and not isinstance(section, Mapping):
            return values
        section = dict(section or {})
        for name in (*LIFTED, *ANCHOR_FIRST):
            if name not in section and name in values:
                section[name] = values[name]
        return {**values, "dflash_config": section}

    @property
    def block(self) -> int:
        return self.dflash_config.block_size or 16

    @property
    def anchor_first(self) -> bool:
        """Row i of the draft block predicts position i + 1 (of z-lab's layout: position i).

        SGLang 0.5.23 reads neither of the keys and takes every drafter for the other layout.
        """
        section = self.dflash_config
        return bool(section.query_zero_predicts_next or section.sample_from_anchor)

    def target_layers(self, target_layers: int | None = None) -> list[int]:
        """Feature layers: given, or SGLang's default, uniform from layer 1 to L-3.

        Args:
            target_layers: L of the target that will run, which SGLang's default goes by; else what the
                config says.
        """
        given = self.dflash_config.target_layer_ids
        if given is not None:
            return given
        from sglang.srt.speculative.dflash_utils import build_target_layer_ids

        layers = target_layers or self.dflash_config.num_target_layers or self.num_hidden_layers
        try:
            return list(build_target_layer_ids(layers, self.num_hidden_layers))
        except ValueError as error:
            raise UserError(
                f"the drafter names no target_layer_ids and SGLang has no default: {error}"
            ) from None


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
            at = "" if revision in (None, "main") else f" at revision {revision!r}"
            raise UserError(
                f"the drafter {path!r} is neither a folder nor reachable on the model hub{at} "
                f"({type(error).__name__}); give a folder to --speculative-draft-model-path"
            ) from error
    raise UserError(f"no drafter at {path!r}; give an existing folder to --speculative-draft-model-path")


@lru_cache(maxsize=8)
def read_config(folder: Path) -> DrafterConfig:
    """The config of the drafter in ``folder``.

    Raises:
        UserError: unreadable, or another kind of model than a DFLASH drafter.
    """
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text())
    except OSError:
        raise UserError(f"the drafter has no readable {file}; point at a DFlash checkpoint folder") from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); not a DFlash checkpoint's config") from None
    if isinstance(raw, dict):
        check_kind(raw, folder, foreign_classes=bool(os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE")))
    try:
        return DrafterConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{file}: {where}: {first['msg']}; not a DFlash checkpoint's config") from None


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
