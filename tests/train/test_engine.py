"""SGLang's offline engine as the generator of a corpus."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_dflash.client import fast_start
from sglang_dflash.errors import UserError
from sglang_dflash.train import corpus
from sglang_dflash.train.chat import Chat
from sglang_dflash.train.generate import Generator
from sglang_dflash.train.target import TargetName


def collect(out: Path, target_dir: Path, prompts: Path) -> dict[int, tuple[float, int, list[int]]]:
    """``data --engine sglang`` in its own process; per prompt hash temperature, prompt length, tokens."""
    command = [sys.executable, "-m", "sglang_dflash.cli.main", "data", "--engine", "sglang"]
    command += ["--target", str(target_dir), "--out", str(out), "--prompts", str(prompts)]
    command += ["--max-new", "16", "--batch", "8", "--sampled", "0.4", "--seed", "3"]
    quick = {fast_start.VARIABLE: fast_start.disabled_models(fast_start.EMBEDDED)}
    done = subprocess.run(command, env=os.environ | quick, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    records = {}
    for split in corpus.SPLITS:
        for shard in corpus.load_split([out], split):
            for i in range(len(shard)):
                tokens = shard.tokens[shard.offsets[i] : shard.offsets[i + 1]].tolist()
                records[int(shard.hash[i])] = (float(shard.temperature[i]), int(shard.prompt_len[i]), tokens)
    return records


@pytest.mark.server
@pytest.mark.slow
def test_the_engine_answers_as_the_target_does(tmp_path, target, target_dir):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"say the number {i} again"}) for i in range(24)))
    got = collect(tmp_path / "a", target_dir, prompts)
    greedy = [(length, tokens) for temperature, length, tokens in got.values() if temperature == 0]
    assert 0 < len(greedy) < len(got)
    for length, tokens in greedy:
        logits = target.prefill(torch.tensor([tokens]))[0, length - 1 : -1, -1] @ target.head.T
        chosen = logits.gather(1, torch.tensor(tokens[length:])[:, None])[:, 0]
        # SGLang serves a float32 model in 16 bits unless told otherwise: the best but for their rounding.
        assert float((logits.amax(-1) - chosen).max()) < 0.05
        ends = [i for i, token in enumerate(tokens[length:]) if token in Chat(target_dir).stop_ids()]
        assert ends in ([], [len(tokens) - length - 1])
        assert ends or len(tokens) - length == 16
    # A seed gives the same corpus again, the sampled answers too.
    assert collect(tmp_path / "b", target_dir, prompts) == got


def test_no_target_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        TargetName.of(tmp_path)


def test_sampling_draws_from_the_whole_vocabulary(target):
    """Hot enough, every id is as likely as any other: a cut at some top k would show."""
    generator = Generator(target, {2}, groups=1, width=1, max_len=8)
    last = torch.zeros(4000, target.hidden, dtype=target.dtype)
    drawn = generator._pick(last, torch.ones(4000))
    assert len(set(drawn)) > 0.95 * target.vocab
