"""What a drafter's ``config.json`` says, and where its folder is."""

from __future__ import annotations

from functools import lru_cache
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
    # Tokens per pass by width, {"8x6": 2.25}: where a server starts from before it has served (worker/width).
    tree_accept: dict[str, float] = {}
    tree_accept_sampled: dict[str, float] = {}
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

        try:
            return Path(
                snapshot_download(path, revision=revision, allow_patterns=["*.json", "*.safetensors"])
            )
        except Exception as error:
            raise UserError(
                f"the drafter {path!r} is neither a folder nor reachable on the model hub "
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
