"""SGLang's flags for a target with its drafter, in one of the three decoding modes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from sglang_dflash.client import fast_start
from sglang_dflash.errors import UserError
from sglang_dflash.models.registry import EmbeddedModel

Mode = Literal["plain", "chain", "tree"]
MODES: tuple[Mode, ...] = get_args(Mode)
MODE_VARIABLE = "SGLANG_DFLASH_MODE"

# SGLang takes 70 % of the memory for its cache by default, which on a laptop is everybody's memory:
# 12 GB here. 64k tokens are eight full contexts of the embedded target, 1.5 GB. An idle scheduler
# spins on a core unless it is told to sleep.
_EMBEDDED_DEFAULTS = ("--max-total-tokens", "65536", "--sleep-on-idle")


def mode_environment(mode: Mode) -> dict[str, str | None]:
    """Environment changes that choose the worker: None removes a variable that would contradict.

    Whoever names a mode gets it or an error; only without a name does the server choose.
    """
    return {MODE_VARIABLE: None if mode == "plain" else mode}


def drafter_flags(mode: Mode, drafter: str | Path) -> list[str]:
    """``plain`` decodes without a drafter; ``chain`` and ``tree`` take the same flags."""
    if mode == "plain":
        return []
    return ["--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", str(drafter)]


def require_drafter(path: Path) -> Path:
    """The folder when it looks like a drafter, else :class:`UserError`; the plugin checks the rest."""
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        raise UserError(
            f"no drafter at {path}: config.json and *.safetensors expected; "
            "pass --speculative-draft-model-path or train one with `sglang-dflash train`"
        )
    return path


def quick_start() -> dict[str, str | None]:
    """Environment that leaves out the model families the embedded pair does not need."""
    return {fast_start.VARIABLE: fast_start.disabled_models(fast_start.EMBEDDED)}


def pair_flags(model: EmbeddedModel, mode: Mode, drafter: Path | None = None) -> list[str]:
    """Flags that serve the embedded target, with its shipped drafter unless ``drafter`` is given."""
    flags = ["--model-path", str(model.target_dir), "--served-model-name", model.folder, *_EMBEDDED_DEFAULTS]
    if mode == "plain":
        return flags
    return flags + drafter_flags(mode, require_drafter(drafter or model.drafter_dir))


def mode_of(words: Sequence[str]) -> tuple[Mode | None, list[str]]:
    """Take ``--mode X`` (ours) out of a command line that otherwise belongs to SGLang."""
    rest: list[str] = []
    mode: str | None = None
    pending = False
    for word in words:
        if pending:
            mode, pending = word, False
        elif word == "--mode":
            pending = True
        elif word.startswith("--mode="):
            mode = word.removeprefix("--mode=")
        else:
            rest.append(word)
    if pending or (mode is not None and mode not in MODES):
        raise UserError(f"--mode takes one of: {', '.join(MODES)}")
    return next((known for known in MODES if known == mode), None), rest
