"""The prompts that ship with this package: in the wheel beside the code, in a checkout in benchmarks/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sglang_dflash.client.chat import Prompt
from sglang_dflash.errors import UserError


def prompts_file() -> Path:
    package = Path(__file__).resolve().parent.parent
    candidates = [package / "prompts.jsonl", package.parent / "benchmarks" / "prompts.jsonl"]
    for path in candidates:
        if path.is_file():
            return path
    raise UserError("the prompt file prompts.jsonl is missing; install sglang-dflash again")


def pick(prompts: Sequence[Prompt], per_kind: int) -> list[Prompt]:
    """``per_kind`` prompts of each kind, evenly spaced over the file, so always the same ones."""
    chosen: list[Prompt] = []
    for kind in dict.fromkeys(prompt.kind for prompt in prompts):
        same = [prompt for prompt in prompts if prompt.kind == kind]
        count = min(per_kind, len(same))
        chosen.extend(same[index * len(same) // count] for index in range(count))
    return chosen
