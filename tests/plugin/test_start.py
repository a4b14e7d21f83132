"""Bad arguments stop ``python -m sglang.launch_server`` in the parent, with one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_dflash.drafter import DrafterConfig
from sglang_dflash.plugin import budget, start
from tests import tiny

SPEC = tiny.TargetSpec()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A target, its drafter, and a drafter made for another hidden size."""
    folder = tmp_path_factory.mktemp("start")
    other = tiny.TargetSpec(hidden_size=128)
    return (
        tiny.build_target(folder / "target", SPEC),
        tiny.build_drafter(folder / "drafter", SPEC),
        tiny.build_drafter(folder / "other", other),
    )


def launch(target: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(target)]
    return subprocess.run(
        [*command, "--speculative-algorithm", "DFLASH", *args],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | env,
    )


@pytest.mark.parametrize(
    ("drafter", "more", "env", "words"),
    [
        ("other", [], {}, "made for hidden size 128"),
        ("drafter", ["--speculative-num-draft-tokens", "0"], {}, "choose 2 to 128"),
        ("nowhere", [], {}, "no drafter at"),
        (None, [], {}, "DFLASH needs a drafter"),
        ("drafter", [], {"SGLANG_DFLASH_TOPK": "3"}, "did you mean SGLANG_DFLASH_TOP_K?"),
    ],
)
def test_one_line_and_no_server(
    pair: tuple[Path, Path, Path], drafter: str | None, more: list[str], env: dict[str, str], words: str
) -> None:
    named = ["--speculative-draft-model-path", str(pair[0].parent / drafter)] if drafter else []
    done = launch(pair[0], *named, *more, **env)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("sglang-dflash: ")
    assert words in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("mode", ["tree", "chain"])
def test_the_pinned_drafter_is_opened_and_no_other(
    pair: tuple[Path, Path, Path], tmp_path: Path, mode: str
) -> None:
    """``main`` of the hub's cache is damaged, the pinned commit fits: a wrong width stops the start."""
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("{")
    tiny.cached_snapshot(tmp_path, "org/drafter", "a" * 40, pair[1])
    tiny.cached_snapshot(tmp_path, "org/drafter", "b" * 40, damaged, ref="main")
    stop, words = {
        "tree": ("--speculative-num-draft-tokens=999", "choose 2 to 128"),
        "chain": ("--speculative-dflash-block-size=0", "block-size to be positive"),
    }[mode]
    done = launch(
        pair[0],
        *("--speculative-draft-model-path", "org/drafter", "--speculative-draft-model-revision", "a" * 40),
        stop,
        HF_HUB_CACHE=str(tmp_path),
        HF_HUB_OFFLINE="1",
        SGLANG_DFLASH_MODE=mode,
    )
    assert done.returncode != 0
    assert words in done.stderr.strip().splitlines()[-1]


def arguments(**changes: object) -> SimpleNamespace:
    plain = dict.fromkeys(
        (
            "attention_backend",
            "decode_attention_backend",
            "prefill_attention_backend",
            "enable_deterministic_inference",
            "enable_unified_memory",
            "enable_dp_attention",
            "dcp_size",
            "speculative_draft_window_size",
            "enable_lora",
            "lora_paths",
            "enable_hisparse",
        )
    )
    return SimpleNamespace(**(plain | {"device": "cpu"} | changes))


def refused(cfg: SimpleNamespace, target: SimpleNamespace, **dflash: object) -> list[str]:
    drafter = DrafterConfig.model_validate(
        {"hidden_size": 64, "num_hidden_layers": 2, "dflash_config": dflash}
    )
    return [refusal.what for refusal in start.REFUSALS if refusal.applies(cfg, target, drafter)]


DENSE = SimpleNamespace(layer_types=["full_attention", "sliding_attention"])


def test_a_plain_server_is_served() -> None:
    assert refused(arguments(), DENSE) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_backend": "flashinfer"}, "without our tree kernel"),
        ({"attention_backend": "fa3", "device": "cuda"}, "without our tree kernel"),
        ({"enable_deterministic_inference": True}, "deterministic"),
        ({"enable_unified_memory": True}, "unified memory"),
        ({"enable_dp_attention": True}, "data-parallel"),
        ({"dcp_size": 2}, "context parallelism"),
        ({"speculative_draft_window_size": 512}, "window"),
        ({"lora_paths": ["x"]}, "LoRA"),
        ({"enable_hisparse": True}, "sparse"),
    ],
)
def test_what_trees_do_not_serve_is_refused(changes: dict[str, object], words: str) -> None:
    (what,) = refused(arguments(**changes), DENSE)
    assert words in what


def test_hybrids_and_other_drafter_families_are_refused() -> None:
    hybrid = SimpleNamespace(layer_types=["linear_attention", "full_attention"])
    assert "Mamba" in refused(arguments(), hybrid)[0]
    assert "Domino" in refused(arguments(), DENSE, projector_type="domino")[0]
    assert "selector" in refused(arguments(), DENSE, selector_rank=256)[0]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
@pytest.mark.parametrize("block", [4, 8, 16])
def test_the_default_budget_follows_the_table(dtype: str, block: int) -> None:
    table = budget.CPU_TABLES["float32" if dtype == "float32" else "bfloat16"]
    assert budget.default_nodes(device="cpu", dtype=dtype, block=block, pinned=True) == budget.best_nodes(
        table
    )
    best = budget.best_nodes(table)
    rates = {rows: budget.ACCEPT[rows] / ms for rows, ms in zip(table.rows, table.ms, strict=True)}
    assert rates[best] == max(rates.values())
