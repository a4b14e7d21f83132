"""Command lines as people write them, and help that says what to write."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_dflash.cli.data import DataOptions
from sglang_dflash.cli.evaluate import EvalOptions
from sglang_dflash.cli.main import COMMANDS, main
from sglang_dflash.cli.options import Options, parse
from sglang_dflash.cli.train import TrainOptions
from sglang_dflash.errors import UserError

MODELS = {"train": TrainOptions, "data": DataOptions, "eval": EvalOptions}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_the_commands_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([name, "--help"])
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr().out
    assert code == 0
    assert shown.startswith(f"usage: sglang-dflash {name} ")
    assert shown.count(f"sglang-dflash {name}") == 1
    assert not re.search(r"null|list\[|\bPath\b|JSON list|``", shown)


@pytest.mark.parametrize("name", MODELS)
def test_every_option_is_described(name: str) -> None:
    assert [n for n, field in MODELS[name].model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    "words",
    [["--corpus", "a", "b"], ["--corpus", "a", "--corpus", "b"], ["--corpus=a", "--corpus=b"]],
)
@pytest.mark.parametrize("name", ["train", "eval"])
def test_lists_are_plain_words(name: str, words: list[str]) -> None:
    assert parse(MODELS[name], name, words).corpus == [Path("a"), Path("b")]
    assert parse(MODELS[name], name, ["--corpus", "a, b"]).corpus == [Path("a, b")]


@pytest.mark.parametrize("words", [["16", "32"], ["16,32"], ["16,", "32"]])
def test_numbers_are_parted_by_blanks_or_commas(words: list[str]) -> None:
    read = parse(EvalOptions, "eval", ["--budgets", *words, "--temperature", "0,0.8"])
    assert (read.budgets, read.temperature) == ([16, 32], [0.0, 0.8])
    assert parse(DataOptions, "data", ["--features", *words]).features == [16, 32]
    assert parse(TrainOptions, "train", ["--target-layers", *words, "--negatives", "-1"]).target_layers == [
        16,
        32,
    ]


def test_switches_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is not asked: OUT, SEED and their like mean something else there."""
    monkeypatch.setenv("SEED", "7")
    monkeypatch.setenv("CORPUS", "elsewhere")
    read = parse(TrainOptions, "train", ["--greedy-only"])
    assert (read.greedy_only, read.seed, read.minutes) == (True, 0, None)
    assert read.corpus == TrainOptions().corpus
    assert not parse(TrainOptions, "train", ["--no-greedy-only"]).greedy_only


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        (EvalOptions, ["--max-new", "8"], "--max-new 8: input should be greater than or equal to 16"),
        (EvalOptions, ["--budgets", "16", "x"], "--budgets x: input should be a valid integer"),
        (EvalOptions, ["--budgets", "1"], "--budgets 1: input should be greater than or equal to 2"),
        (DataOptions, ["--sampled", "2"], "--sampled 2: input should be less than or equal to 1"),
    ],
)
def test_a_wrong_value_is_one_line(model: type[Options], words: list[str], message: str) -> None:
    with pytest.raises(UserError) as stop:
        parse(model, "x", words)
    assert str(stop.value).startswith(message)
    assert "\n" not in str(stop.value)


def test_the_whole_command_ends_in_that_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sglang_dflash.cli.main", "eval", "--max-new", "8"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --max-new 8: input should be greater than or equal to 16\n"
