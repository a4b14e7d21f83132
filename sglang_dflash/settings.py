"""Settings of the plugin: environment variables ``SGLANG_DFLASH_*``, read once per process.

SGLang's argument parser has no room for a plugin's flags, and an environment variable reaches
every process of a server, so the few things an operator may want to change live there.
"""

from __future__ import annotations

import difflib
import os
from functools import lru_cache
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from sglang_dflash.errors import UserError

PREFIX = "SGLANG_DFLASH_"

#: What the parent tells its processes about who decodes; no setting (``plugin/mode.py``).
DECISION = "SGLANG_DFLASH_DECISION"

# Names with our prefix that are no settings: SGLang's own switches, our command line's cache folder and the
# parent's word to its children.
FOREIGN = frozenset({"SGLANG_DFLASH_EAGER_DRAFT_SAMPLER", "SGLANG_DFLASH_CACHE", DECISION})

MAX_NODES = 128  # what the kernels take (dflash_kernels.tree_attention)
MAX_CANDIDATES = 32  # what the kernels take (dflash_kernels.draft_topk)


class Settings(BaseSettings):
    """What an operator can change without touching SGLang's own flags."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    mode: Literal["auto", "tree", "chain"] = Field(
        "auto",
        description="tree: this plugin's worker, or an error where it cannot serve; chain: SGLang's own "
        "worker, untouched; auto: trees where they can serve, else SGLang's chain, on a GPU",
    )
    top_k: int = Field(
        16, ge=1, le=MAX_CANDIDATES, description="candidate tokens per draft position the tree may use"
    )
    width: str = Field(
        "auto",
        description="auto: a step's width follows load and confidence; fixed: always the greatest; "
        "NODESxBLOCK such as 8x6: always that one; for tests random:SEED, another one every step, and "
        "control:FILE, what the file says",
    )
    recall: bool = Field(
        True,
        description="also draft what followed the longest match of the text's end earlier in the request "
        "(prompt and answer; exact as everything)",
    )
    calibrate: bool = Field(
        True, description="add the drafter's fitted per-depth log-bonus (dflash_config.tree_depth_bonus)"
    )
    candidates: str = Field(
        "",
        description="module:function that rewrites the drafter's candidates before the tree is built "
        "(tests, experiments); the output stays the target's whatever it returns",
    )

    def describe(self) -> str:
        return " ".join(f"{name}={value!r}" for name, value in self.model_dump().items())


def _reject_unknown(environ: dict[str, str]) -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields} | FOREIGN
    for name in environ:
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known - FOREIGN))}."
            raise UserError(f"unknown setting {name}; {hint}")


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The process's settings.

    Raises UserError naming the variable when one is unknown or out of range.
    """
    _reject_unknown(dict(os.environ))
    try:
        return Settings()  # type: ignore[call-arg]
    except ValidationError as error:
        first = error.errors()[0]
        name = PREFIX + str(first["loc"][0]).upper()
        raise UserError(
            f"{name}={os.environ.get(name, '')!r} is not usable: {first['msg'].lower()}; unset or change it"
        ) from None
