"""Answers to a file of prompts, with features, for judging a drafter."""

from __future__ import annotations

import logging
from pathlib import Path

from sglang_dflash.errors import UserError
from sglang_dflash.train.batches import SHORTEST, Document
from sglang_dflash.train.chat import Chat
from sglang_dflash.train.generate import Generator, Job
from sglang_dflash.train.given import read_prompts
from sglang_dflash.train.target import DenseTarget

logger = logging.getLogger("sglang_dflash.eval")


def answer_prompts(
    target: DenseTarget,
    tokenizer: Path,
    prompts: Path,
    features: tuple[int, ...],
    max_new: int = 200,
    temperature: float = 0.0,
    limit: int = 0,
    seed: int = 0,
) -> list[Document]:
    """Decode every prompt of a JSONL file by plain decoding; documents in file order."""
    import torch

    chat = Chat(tokenizer)
    rows = list(read_prompts(prompts))
    if limit:
        # Take as many of each kind: the file may list one kind first.
        kinds = sorted({kind for kind, _ in rows})
        each = -(-limit // len(kinds))
        rows = [r for kind in kinds for r in [r for r in rows if r[0] == kind][:each]][:limit]
    jobs = [
        Job(chat.prompt_ids(text), temperature, max_new, (i, kind)) for i, (kind, text) in enumerate(rows)
    ]
    longest = max(len(job.prompt) for job in jobs)
    width = min(32, -(-len(jobs) // 2))
    waiting = list(jobs)

    def source(n: int) -> list[Job]:
        taken, waiting[:] = waiting[:n], waiting[n:]
        return taken

    generator = Generator(
        target,
        chat.stop_ids(),
        groups=2,
        width=width,
        max_len=longest + max_new + 1,
        features=features,
        seed=seed,
    )
    out = {}
    for done in generator.run(source):
        assert isinstance(done.job.tag, tuple)
        index, kind = done.job.tag
        if len(done.tokens) - len(done.job.prompt) >= SHORTEST:
            tokens = torch.tensor(done.tokens)
            out[index] = Document(tokens, len(done.job.prompt), kind, temperature, done.planes)
    if left := len(jobs) - len(out):
        short = f"{prompts}: {left} of {len(jobs)} answers have fewer than {SHORTEST} tokens"
        if not out:
            raise UserError(f"{short}; nothing is left to judge on")
        logger.info("%s and are left out", short)
    return [out[i] for i in sorted(out)]
