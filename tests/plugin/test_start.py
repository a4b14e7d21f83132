"""Bad arguments stop ``python -m sglang.launch_server`` in the parent, with one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.configs.model_config import AttentionArch
from transformers import LlamaConfig

from sglang_dflash.drafter import DrafterConfig
from sglang_dflash.plugin import budget
from sglang_dflash.plugin.obstacles import OBSTACLES, Facts
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


def facts(
    backends: tuple[str, ...] = (), dflash: dict[str, object] | None = None, **changes: object
) -> Facts:
    plain = dict.fromkeys(
        (
            "disable_hybrid_swa_memory",
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
    text = SimpleNamespace(attn_temperature_len=changes.pop("attn_temperature_len", None))
    model = SimpleNamespace(
        hf_config=LlamaConfig(architectures=["LlamaForCausalLM"]),
        linear_attn_registry_result=None,
        hf_text_config=text,
        attention_arch=AttentionArch.MHA,
        is_hybrid_swa=False,
        quantization=None,
    )
    drafter = DrafterConfig.model_validate(
        {"hidden_size": 64, "num_hidden_layers": 2, "dflash_config": dflash or {}}
    )
    cfg = SimpleNamespace(**(plain | {"device": "cpu", "kv_cache_dtype": "auto"} | changes))
    return Facts(cfg, model, drafter, frozenset(backends))


def obstacles(of: Facts) -> list[str]:
    return [obstacle.what for obstacle in OBSTACLES if obstacle.applies(of)]


def test_a_plain_server_is_served() -> None:
    assert obstacles(facts()) == []
    assert obstacles(facts(("triton",), device="cuda", kv_cache_dtype="fp8_e4m3")) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backends": ("flashmla",)}, "without our tree kernel"),
        ({"backends": ("wave",), "device": "cuda"}, "without our tree kernel"),
        ({"backends": ("dflash_cpu",), "device": "cuda"}, "without our tree kernel"),
        ({"device": "xpu"}, "kind of device"),
        ({"enable_deterministic_inference": True}, "deterministic"),
        ({"enable_unified_memory": True}, "unified memory"),
        ({"enable_dp_attention": True}, "data-parallel"),
        ({"dcp_size": 2}, "context parallelism"),
        ({"speculative_draft_window_size": 512}, "window"),
        ({"lora_paths": ["x"]}, "LoRA"),
        ({"enable_hisparse": True}, "sparse"),
        ({"kv_cache_dtype": "nvfp4"}, "scales beside it"),
        ({"kv_cache_dtype": "mxfp8"}, "scales beside it"),
        ({"attn_temperature_len": 1024}, "Grok"),
        ({"dflash": {"projector_type": "domino"}}, "Domino"),
        ({"dflash": {"selector_rank": 256, "output_multiplier": 2.0}}, "scales or caps"),
        ({"dflash": {"selector_rank": 256, "final_logit_softcapping": 30.0}}, "scales or caps"),
        ({"dflash": {"lilicorr": {}, "projector_type": "lilicorr"}}, "LiLiCorr"),
    ],
)
def test_what_trees_do_not_serve_is_an_obstacle(changes: dict[str, Any], words: str) -> None:
    (what,) = obstacles(facts(**changes))
    assert words in what


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
