"""Who decodes, for each kind of target and drafter: SGLang resolves real arguments with the plugin loaded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_dflash.plugin import mode
from sglang_dflash.settings import get_settings
from tests import field, tiny

Resolve = Callable[..., dict[str, Any]]
DFLASH = ["--speculative-algorithm", "DFLASH", "--disable-radix-cache"]


class Resolver:
    """A process that resolves arguments, started once: it imports SGLang."""

    def __init__(self, plugins: str) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_DFLASH_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.plugin.resolve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**env, "SGLANG_PLUGINS": plugins, "HF_HUB_OFFLINE": "1"},
        )

    def __call__(self, target: Path, drafter: Path, *more: str, **case: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pair = ["--model-path", str(target), "--speculative-draft-model-path", str(drafter)]
        self.process.stdin.write(json.dumps({"args": [*pair, *DFLASH, *more], **case}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise AssertionError(f"the resolver ended with {self.process.wait()}")


@pytest.fixture(scope="module")
def resolver(request: pytest.FixtureRequest) -> Any:
    found = Resolver(request.param)
    yield found
    assert found.process.stdin is not None
    found.process.stdin.close()
    found.process.wait(timeout=60)


on_gpu = pytest.mark.parametrize("resolver", ["dflash_tree"], indirect=True)
on_cpu = pytest.mark.parametrize("resolver", ["dflash_tree,dflash_cpu"], indirect=True)
GPU = ("--device", "cuda")


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_drafter(tmp_path_factory.mktemp("mode") / "drafter", tiny.TargetSpec())


@pytest.fixture(scope="module")
def target_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("targets")
    return lambda kind: field.build_target(folder / kind.replace(" ", "-").replace(",", ""), kind)


#: Target kind -> who decodes on a GPU, and a word of the reason.
TARGET_ENDS = {
    "full": ("tree", ""),
    "gated delta net": ("chain", "linear-attention layers"),
    "Mamba2": ("chain", "Mamba"),
    "latent": ("chain", "latent attention"),
    "sliding pool": ("chain", "separate sliding-window KV pool"),
    "sliding, one pool": ("tree", ""),
    "quantised head": ("chain", "quantised head"),
    "quantised, plain head": ("tree", ""),
}


@on_gpu
@pytest.mark.parametrize("kind", field.TARGETS)
def test_targets(resolver: Resolve, target_of: Callable[[str], Path], drafter: Path, kind: str) -> None:
    got = resolver(target_of(kind), drafter, *GPU)
    assert "error" not in got, got
    assert got["mode"] == TARGET_ENDS[kind][0]
    assert TARGET_ENDS[kind][1] in got["reason"]
    if got["mode"] == "tree":
        assert got["backends"] == ["triton", "triton"]
        assert got["said"] == []
        return
    (line,) = got["said"]
    for part in (got["reason"], got["way_out"], "penalties and min_new_tokens"):
        assert part
        assert part in line
    # The chain's width is the drafter's block, SGLang's own default, and not a tree's.
    assert got["nodes"] == tiny.DrafterSpec().block_size
    assert json.loads(got["told"]) == {name: got[name] for name in ("mode", "reason", "way_out")}


@on_gpu
@pytest.mark.parametrize("kind", [kind for kind, (end, _) in TARGET_ENDS.items() if end == "chain"])
def test_tree_mode_refuses(
    resolver: Resolve, target_of: Callable[[str], Path], drafter: Path, kind: str
) -> None:
    got = resolver(target_of(kind), drafter, *GPU, env={"SGLANG_DFLASH_MODE": "tree"})
    assert got["kind"] == "SystemExit"
    assert got["error"].startswith("sglang-dflash: draft trees do not serve ")
    assert TARGET_ENDS[kind][1] in got["error"]
    assert got["error"].endswith("or set SGLANG_DFLASH_MODE=chain")


@on_gpu
@pytest.mark.parametrize("backend", ["fa3", "flashinfer", "triton"])
def test_a_backend_that_nobody_named_makes_way_for_the_tree_kernel(
    resolver: Resolve, target_of: Callable[[str], Path], drafter: Path, backend: str
) -> None:
    """SGLang fills in its own default long before the speculative arguments are looked at."""
    got = resolver(target_of("full"), drafter, *GPU, default_backend=backend)
    assert (got["mode"], got["backends"]) == ("tree", ["triton", "triton"])


#: What the operator names -> what reads prompts, and the page size that SGLang gives it.
NAMED = {
    "fa3": ("fa3", 1),
    "fa4": ("fa4", None),
    "flashinfer": ("flashinfer", 1),
    "trtllm_mha": ("trtllm_mha", 64),
    "torch_native": ("torch_native", 1),
    "triton": ("triton", 1),
}


@on_gpu
@pytest.mark.parametrize("named", NAMED)
def test_a_named_backend_reads_prompts_and_ours_verifies(
    resolver: Resolve, target_of: Callable[[str], Path], drafter: Path, named: str
) -> None:
    got = resolver(target_of("full"), drafter, *GPU, "--attention-backend", named)
    assert got.get("mode") == "tree", got
    reader, page = NAMED[named]
    passes = got["passes"]
    assert (passes["prompts"], passes["verify"], got["backends"][1]) == (reader, "triton", "triton")
    # In SGLang's other mode the verify pass would go to what reads prompts, which sees no tree.
    assert passes["mode"] == "decode" or reader == "triton"
    assert page is None or got["page_size"] == page


@on_gpu
@pytest.mark.parametrize(
    ("flags", "reader"),
    [
        (["--prefill-attention-backend", "flashinfer"], "flashinfer"),
        (["--decode-attention-backend", "fa3"], "fa3"),  # SGLang's default here reads
        (["--decode-attention-backend", "triton"], "fa3"),
        (["--attention-backend", "triton", "--speculative-draft-attention-backend", "fa3"], "triton"),
        (["--prefill-attention-backend", "triton", "--decode-attention-backend", "fa3"], "triton"),
    ],
)
def test_parts_of_the_attention_named_apart(
    resolver: Resolve, target_of: Callable[[str], Path], drafter: Path, flags: list[str], reader: str
) -> None:
    got = resolver(target_of("full"), drafter, *GPU, *flags)
    assert got.get("mode") == "tree", got
    passes = got["passes"]
    assert (passes["prompts"], passes["verify"], got["backends"][1]) == (reader, "triton", "triton")
    assert passes["mode"] == "decode" or reader == "triton"


@on_gpu
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--attention-backend", "wave"], "without our tree kernel"),
        (["--prefill-attention-backend", "fa3", "--decode-attention-backend", "flashmla"], "our tree kernel"),
        (["--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "all"], "LoRA"),
        (["--speculative-draft-window-size", "64"], "drafter window"),
        (["--enable-deterministic-inference", "--attention-backend", "triton"], "deterministic"),
    ],
)
def test_flags(
    resolver: Resolve, target_of: Callable[[str], Path], drafter: Path, flags: list[str], words: str
) -> None:
    got = resolver(target_of("full"), drafter, *GPU, *flags)
    assert got["mode"] == "chain", got
    assert words in got["reason"]


@on_gpu
def test_the_off_switch_is_quiet(resolver: Resolve, target_of: Callable[[str], Path], drafter: Path) -> None:
    got = resolver(target_of("full"), drafter, *GPU, env={"SGLANG_DFLASH_MODE": "chain"})
    assert (got["mode"], got["said"]) == ("chain", [])
    assert got["backends"] == ["fa3", "fa3"]


@on_gpu
def test_another_servers_decision_is_forgotten(
    resolver: Resolve, target_of: Callable[[str], Path], drafter: Path
) -> None:
    stale = json.dumps({"mode": "chain", "reason": "old", "way_out": "old"})
    got = resolver(target_of("full"), drafter, *GPU, env={"SGLANG_DFLASH_DECISION": stale})
    assert got["mode"] == "tree"


@on_cpu
def test_as_many_may_run_as_in_plain_decoding(
    resolver: Resolve, target_of: Callable[[str], Path], drafter: Path
) -> None:
    assert resolver(target_of("full"), drafter)["running"] is None
    assert resolver(target_of("full"), drafter, "--max-running-requests", "5")["running"] == 5
    chain = resolver(target_of("full"), drafter, env={"SGLANG_DFLASH_MODE": "chain"})
    assert chain["running"] == 48, "SGLang's chain keeps SGLang's cap"


@on_cpu
def test_never_the_chain_on_a_cpu(resolver: Resolve, target_of: Callable[[str], Path], drafter: Path) -> None:
    assert resolver(target_of("full"), drafter)["mode"] == "tree"
    window = ("--speculative-draft-window-size", "64")
    for kind, more, word in (
        ("full", window, "a drafter window"),
        ("gated delta net", (), "linear-attention layers"),
    ):
        got = resolver(target_of(kind), drafter, *more)
        assert (got["mode"], got["algorithm"], got["nodes"]) == ("plain", None, None), got
        assert word in got["reason"]
        (line,) = got["said"]
        assert "SGLang decodes without the drafter" in line
        refused = resolver(target_of(kind), drafter, *more, env={"SGLANG_DFLASH_MODE": "tree"})
        assert f"draft trees do not serve {got['reason']}" in refused["error"]


@on_gpu
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_position_embeddings": 128}, "context is 128 tokens .* the server's 512"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 64}, 'add "use_sliding_window": true'),
        (
            {"dflash_config": {"mask_token_id": 259}, "num_target_layers": None},
            "names no target_layer_ids and SGLang has no default",
        ),
        ({"layer_types": ["full_attention"]}, "1 layer|layer_types|layer types|num_hidden_layers"),
        ({"model_type": None}, "SGLang cannot read"),
        ({"dflash_config": {"target_layer_ids": [0, 2], "mask_token": 3}}, "mask_token must be a non-empty"),
    ],
)
def test_what_sglang_would_refuse_is_one_line(
    resolver: Resolve, target_of: Callable[[str], Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    folder = tiny.build_drafter(tmp_path / "drafter", tiny.TargetSpec())
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    got = resolver(target_of("full"), folder, *GPU)
    assert got["kind"] == "SystemExit", got
    assert re.search(words, got["error"]), got["error"]
    assert "\n" not in got["error"]


@on_gpu
def test_a_short_drafter_has_two_ways_out(
    resolver: Resolve, target_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny.build_drafter(tmp_path / "drafter", tiny.TargetSpec(max_position=128))
    target = target_of("full")
    assert resolver(target, folder, *GPU, "--context-length", "128")["mode"] == "tree"
    override = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    assert resolver(target, folder, *GPU, env=override)["mode"] == "tree"


@on_gpu
@pytest.mark.parametrize("name", ["query_zero_predicts_next", "sample_from_anchor"])
def test_the_chain_is_no_way_out_for_an_anchor_first_drafter(
    resolver: Resolve, target_of: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = tiny.build_drafter(tmp_path / "drafter", tiny.TargetSpec())
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: True}))
    assert resolver(target_of("full"), folder, *GPU)["mode"] == "tree"
    got = resolver(target_of("latent"), folder, *GPU)
    assert "one place later" in got["error"]


@on_cpu
def test_a_quantised_drafter_needs_a_gpu(
    resolver: Resolve, target_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny.build_drafter(tmp_path / "drafter", tiny.TargetSpec())
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    file.write_text(json.dumps(config))
    got = resolver(target_of("full"), folder)
    assert got["mode"] == "plain"
    assert "quantised drafters on a CPU" in got["reason"]


# -- the field ------------------------------------------------------------------

HYBRID = ("chain", "linear-attention layers")
#: Entry -> where it ends on a GPU, a word of the reason, and keys that its note leaves out.
FIELD_ENDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen3-4B-DFlash-b16": ("tree", "", {}),
    "Qwen3.6-35B-A3B-DFlash, to May 2026": (*HYBRID, {}),
    "Qwen3.6-35B-A3B-DFlash, from June 2026": (*HYBRID, {"use_sliding_window": True}),
    "Qwen3.6-27B-DFlash": (*HYBRID, {"use_sliding_window": True}),
    "Qwen3.8-27B-DFlash2": (*HYBRID, {}),
    "Qwen3.8-27B-DSpark": ("error", "--speculative-algorithm DSPARK", {}),
    "Laguna-S-2.1-DFlash": ("chain", "separate sliding-window KV pool", {}),
    "Muse-Glimmer-30B-assistant": (
        "chain",
        "separate sliding-window KV pool",
        {"model_type": "qwen3", "num_target_layers": 36},
    ),
    "a speculators DFlash checkpoint": ("error", "layout of the speculators library", {}),
    "a Domino drafter as exported": (
        "chain",
        "Domino",
        {
            "model_type": "qwen3",
            "num_target_layers": 36,
            "shift_label": True,
            "pure_draft_prefix_len": 1,
            "emb_dim": 8,
        },
    ),
}


def test_every_published_entry_has_its_end() -> None:
    assert [entry["name"] for entry in field.ENTRIES] == list(FIELD_ENDS)


@on_gpu
@pytest.mark.parametrize("entry", field.ENTRIES, ids=lambda entry: entry["name"].replace(" ", "-"))
def test_published_checkpoints_reach_their_end(
    resolver: Resolve, tmp_path: Path, entry: dict[str, Any]
) -> None:
    end, words, left_out = FIELD_ENDS[entry["name"]]
    target, folder = field.build_entry(tmp_path, entry, **left_out)
    got = resolver(target, folder, *GPU)
    if end == "error":
        assert got["kind"] == "SystemExit", got
        assert words in got["error"]
        return
    assert got.get("mode") == end, got
    assert words in got["reason"]
    if end == "chain":
        # SGLang's chain gets the width it would have chosen by itself.
        block = (entry["config"].get("dflash_config") or {}).get("block_size") or entry["config"].get(
            "block_size"
        )
        assert got["nodes"] == (block or 16)


@on_gpu
def test_laguna_and_muse_are_served_by_trees_from_one_pool(resolver: Resolve, tmp_path: Path) -> None:
    for entry in field.ENTRIES:
        if "sliding" in entry["target"]["attention"]:
            end = FIELD_ENDS[entry["name"]]
            target, folder = field.build_entry(tmp_path / entry["name"], entry, **end[2])
            got = resolver(target, folder, *GPU, "--disable-hybrid-swa-memory")
            assert got.get("mode") == "tree", got


# -- one decision for every process ---------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("SGLANG_DFLASH_MODE", raising=False)
    monkeypatch.setenv("SGLANG_DFLASH_DECISION", "")
    get_settings.cache_clear()
    return monkeypatch


def test_children_follow_the_parent_and_not_the_setting(environment: pytest.MonkeyPatch) -> None:
    from sglang_dflash.plugin import hooks

    assert mode.decided() == mode.Decision("tree")
    chain = mode.Decision("chain", "a reason", "a way out")
    environment.setenv("SGLANG_DFLASH_DECISION", json.dumps(vars(chain)))
    assert mode.decided() == chain
    assert mode.why() == {"reason": "a reason", "way_out": "a way out"}
    hooks.publish(None, None, role="scheduler")  # would install the seeded sampler for trees
    code = (
        "from sglang_dflash.plugin import mode; from sglang_dflash.settings import get_settings;"
        "get_settings(); print(mode.decided())"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == str(chain)


def test_the_setting_counts_where_nothing_was_decided(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SGLANG_DFLASH_MODE", "chain")
    get_settings.cache_clear()
    assert mode.decided() == mode.OFF_SWITCH
    get_settings.cache_clear()
