"""Answers of 0 to 2 tokens, alone and among others: trained on, judged, or one line, and never NaN."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from sglang_dflash.cli.main import main
from sglang_dflash.train import corpus
from sglang_dflash.train.corpus import Record
from sglang_dflash.train.prompts import is_held_out

PROMPT = 5


def write_corpus(folder: Path, train: list[int], held: list[int]) -> Path:
    """A corpus whose answers have these lengths."""
    rng = np.random.default_rng(0)
    corpus.write_meta(folder, {"target": "tiny", "vocab": 320, "max_new": 40})
    for is_held, lengths in ((False, train), (True, held)):
        hashes = [h for h in range(1, 3000) if is_held_out(h) == is_held]
        rows = [
            Record(rng.integers(4, 320, PROMPT + n).tolist(), PROMPT, "code", 0.0, h)
            for n, h in zip(lengths, hashes, strict=False)
        ]
        corpus.write_shard(folder / f"{corpus.SPLITS[is_held]}-00000.npz", rows, 320)
    return folder


def words(target_dir: Path, folder: Path, out: Path, *more: str) -> list[str]:
    given = ["--target", target_dir, "--corpus", folder, "--out", out, "--features-dir", out / "features"]
    shape = ["--layers", 1, "--block", 4, "--target-layers", "0,2,4", "--threads", 1, "--rows", 2]
    return ["train", *map(str, [*given, *shape]), "--steps", "3", "--eval-every", "1", *more]


@pytest.mark.parametrize(
    "more", [(), ("--warm-layers", "none"), ("--complementary", "1", "--kl", "0.5"), ("--pack", "64")]
)
@pytest.mark.parametrize("train", [[2], [2, 2], [0, 1, 2], [2, 20, 0, 1]])
def test_short_answers_train(train, more, target_dir, tmp_path, caplog):
    folder = write_corpus(tmp_path / "corpus", train, [2])
    with caplog.at_level("INFO", "sglang_dflash"):
        assert main(words(target_dir, folder, tmp_path / "run", *more)) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["norm"]) for row in rows)
    assert all(math.isfinite(x) for row in rows for x in (row["held_out"] or {}).values())
    short = sum(n < 2 for n in train)
    assert any(row["held_out"] for row in rows)
    assert (f"{short} train answers of fewer than 2 tokens left out" in caplog.text) == (short > 0)


@pytest.mark.parametrize(("train", "held"), [([0], [2]), ([1, 0], [2]), ([2], [0, 1]), ([], [2])])
def test_nothing_but_shorter_ones_is_one_line(train, held, target_dir, tmp_path, capsys):
    folder = tmp_path / "corpus"
    if train:
        write_corpus(folder, train, held)
    else:
        write_corpus(folder, [2], held)
        (folder / "train-00000.npz").unlink()
    assert main(words(target_dir, folder, tmp_path / "run")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: no ")
    assert ("train" if held == [2] else "heldout") in error


def test_eval_of_short_answers(target_dir, tmp_path, capsys):
    folder = write_corpus(tmp_path / "corpus", [8], [2, 0, 1])
    assert main(words(target_dir, folder, tmp_path / "run")) == 0
    judge = ["eval", "--target", target_dir, "--drafter", tmp_path / "run" / "best", "--corpus", folder]
    judge += ["--features-dir", tmp_path / "features", "--json-out", tmp_path / "numbers.json"]
    assert main([str(word) for word in judge]) == 0
    assert "NaN" not in (tmp_path / "numbers.json").read_text()
    assert json.loads((tmp_path / "numbers.json").read_text())["offline"]["all"]["documents"] == 1


def test_prompts_answered_in_a_token_or_less_are_one_line(target_dir, tmp_path, capsys, monkeypatch):
    """The target ends its turn at once: there is nothing to judge on."""
    from sglang_dflash.train.generate import Done, Generator

    def silent(self, source):
        while jobs := source(4):
            yield from (Done(job, [*job.prompt, 2], True, None) for job in jobs)

    monkeypatch.setattr(Generator, "run", silent)
    folder = write_corpus(tmp_path / "corpus", [8], [2])
    assert main(words(target_dir, folder, tmp_path / "run")) == 0
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "the cat"}\n{"prompt": "the mat"}\n')
    judge = ["eval", "--target", target_dir, "--drafter", tmp_path / "run" / "best", "--prompts", file]
    assert main([str(word) for word in judge]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: {file}: 2 of 2 answers have fewer than 2 tokens; nothing is left to judge on"


def test_another_mask_token_is_said_and_which_one_holds(target_dir, tmp_path, caplog, capsys):
    folder = write_corpus(tmp_path / "corpus", [8, 8], [8])
    assert main(words(target_dir, folder, tmp_path / "a", "--mask-token-id", "3")) == 0
    init = str(tmp_path / "a" / "best")
    caplog.clear()
    assert main(words(target_dir, folder, tmp_path / "b", "--init-from", init, "--mask-token-id", "7")) == 0
    assert f"--mask-token-id 7 is not used: {init} has 3, which holds" in caplog.text
    made = json.loads((tmp_path / "b" / "best" / "config.json").read_text())
    assert made["dflash_config"]["mask_token_id"] == 3
    caplog.clear()
    assert main(words(target_dir, folder, tmp_path / "c", "--init-from", init, "--mask-token-id", "3")) == 0
    assert "is not used" not in caplog.text
    # A run that goes on keeps its own, and does not start with another.
    assert main(words(target_dir, folder, tmp_path / "a", "--mask-token-id", "7")) == 2
    assert "(the drafter's mask_token 3, now 7): give another --out" in capsys.readouterr().err
