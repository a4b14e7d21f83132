"""A selector over a frozen drafter: it learns what follows what, is saved as SGLang reads it, and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_dflash.cli.main import main
from sglang_dflash.drafter import check_fits, read_config
from sglang_dflash.train import corpus
from sglang_dflash.train.checkpoint import load_drafter
from sglang_dflash.train.corpus import Record
from sglang_dflash.train.judge import TOP
from sglang_dflash.train.prompts import is_held_out

RANK = 8
#: Tokens that the answers hold: fewer than a drafter's candidates, so the right one is always among them.
TOKENS = np.arange(40, 52)


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers in which a token decides the next one, nine times out of ten."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    corpus.write_meta(folder, {"target": "tiny", "vocab": 320, "max_new": 48})
    after = rng.permutation(len(TOKENS))

    def answer() -> list[int]:
        at, found = int(rng.integers(len(TOKENS))), []
        for _ in range(48):
            found.append(int(TOKENS[at]))
            at = int(after[at]) if rng.random() < 0.9 else int(rng.integers(len(TOKENS)))
        return found

    for held, n in ((False, 40), (True, 6)):
        hashes = [h for h in range(1, 9000) if is_held_out(h) == held][:n]
        rows = [Record([5, 6, 7, *answer()], 3, "code", 0.0, h) for h in hashes]
        corpus.write_shard(folder / f"{corpus.SPLITS[held]}-00000.npz", rows, 320)
    return folder


def run(corpus_dir: Path, target_dir: Path, out: Path, *more: str) -> int:
    words = ["--target", target_dir, "--corpus", corpus_dir, "--out", out, "--threads", "1"]
    words += ["--features-dir", corpus_dir.parent / "features", "--held-out", "6"]
    return main(["train", *map(str, words), *more])


@pytest.fixture(scope="module")
def drafter_dir(corpus_dir: Path, target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter that knows which tokens there are, and little of their order."""
    out = tmp_path_factory.mktemp("drafter")
    shape = ["--layers", "1", "--block", "4", "--target-layers", "0,2,4", "--rows", "4", "--anchors", "8"]
    assert run(corpus_dir, target_dir, out, *shape, "--steps", "30", "--rate", "2e-3") == 0
    return out / "best"


def selector(drafter_dir: Path, *more: str) -> list[str]:
    fast = ["--rate", "1e-2", "--eval-every", "20", "--save-every", "10"]
    return ["--selector", str(RANK), "--init-from", str(drafter_dir), *fast, *more]


@pytest.fixture(scope="module")
def trained(
    corpus_dir: Path, target_dir: Path, drafter_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("selector")
    assert run(corpus_dir, target_dir, out, *selector(drafter_dir, "--steps", "80")) == 0
    return out


def test_it_learns_what_follows_what(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    judged = [row["held_out"]["all/tree-8"] for row in rows if row["held_out"]]
    assert rows[-2]["right"][1] > rows[0]["right"][1] + 0.3, "share of right first candidates"
    assert max(judged) > 2.4, "nine of ten tokens follow from the one before"


def test_the_drafter_itself_is_untouched(trained: Path, drafter_dir: Path) -> None:
    before, after = load_drafter(drafter_dir).state_dict(), load_drafter(trained / "best").state_dict()
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name
    tables = {name: weight for name, weight in after.items() if name not in before}
    assert {name: tuple(weight.shape) for name, weight in tables.items()} == {
        "candidate_selector.predecessor_codebook": (320, RANK),
        "candidate_selector.successor_codebook": (320, RANK),
        "candidate_selector.hidden_projection.weight": (RANK, 64),
    }
    assert all(weight.any() for weight in tables.values())


def test_sglang_reads_it_as_dflash_2(trained: Path, target_dir: Path) -> None:
    from sglang.srt.models.dflash import DFlash2DraftModel
    from sglang.srt.speculative.dflash_utils import parse_dflash_draft_config
    from sglang.srt.utils.hf_transformers_utils import get_config

    config = get_config(str(trained / "best"), trust_remote_code=False)
    parsed = parse_dflash_draft_config(draft_hf_config=config)
    assert config.architectures == [DFlash2DraftModel.__name__]
    assert (parsed.selector_rank, parsed.selector_top_k) == (RANK, TOP)
    check_fits(trained / "best", target=get_config(str(target_dir), trust_remote_code=False), target_name="t")
    assert read_config(trained / "best").dflash_config.selector_rank == RANK


def test_it_resumes_to_the_same_tables(
    corpus_dir: Path, target_dir: Path, drafter_dir: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = ["--steps", "20", "--warmup", "0"]
    assert run(corpus_dir, target_dir, whole, *selector(drafter_dir, *words)) == 0
    # Of a killed run remains the state last saved, and log lines beyond it.
    assert run(corpus_dir, target_dir, parts, *selector(drafter_dir, *words)) == 0
    state = torch.load(parts / "state.pt", weights_only=True)
    assert state["step"] == 20
    assert run(corpus_dir, target_dir, parts, *selector(drafter_dir, *words)) == 0
    first, second = (
        torch.load(folder / "state.pt", weights_only=True)["optimizer"]["master"] for folder in (whole, parts)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--selector", "8"], "needs --init-from"),
        (["--selector", "8", "--layers", "2", "--init-from", "DRAFTER"], "--layers: not with --selector"),
        (["--selector", "0", "--init-from", "DRAFTER"], "greater than or equal to 1"),
    ],
)
def test_bad_input_is_one_line(
    corpus_dir: Path,
    target_dir: Path,
    drafter_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    given = [str(drafter_dir) if word == "DRAFTER" else word for word in words]
    assert run(corpus_dir, target_dir, tmp_path, *given, "--steps", "2") == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]


@pytest.mark.parametrize("more", [[], ["--selector", "4"]])
def test_a_drafter_that_has_one_starts_without(
    corpus_dir: Path,
    target_dir: Path,
    trained: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    more: list[str],
) -> None:
    words = ["--init-from", str(trained / "best"), "--steps", "20", "--rate", "1e-2", *more]
    assert run(corpus_dir, target_dir, tmp_path, *words) == 0
    assert "is left out" in caplog.text
    config = load_drafter(tmp_path / "best").config
    assert config.selector_rank == (4 if more else 0)


def test_a_selector_that_does_not_help_is_not_saved(
    corpus_dir: Path, target_dir: Path, drafter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = selector(drafter_dir, "--steps", "1", "--warmup", "0.9", "--rate", "1e-9")
    assert run(corpus_dir, target_dir, tmp_path, *words) == 2
    assert "no selector did better" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "best").exists()
