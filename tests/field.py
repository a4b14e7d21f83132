"""Tiny checkpoints in the layouts of the field: targets of each kind, and published drafters scaled down."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests import tiny

ENTRIES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "drafter" / "checkpoints.json").read_text()
)
WIDTH, VOCAB = 64, 512

_SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 99,
}
_DELTA_NET = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "num_experts": 0,
    "mlp_only_layers": [],
}
#: Target kind -> what its config has beside the shape.
TARGETS: dict[str, dict[str, Any]] = {
    "full": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "gated delta net": {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", **_DELTA_NET},
    "Mamba2": {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "M*-M",
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
    },
    "latent": {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", **_LATENT},
    "sliding pool": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "sliding_window": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "sliding, one pool": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "sliding_window": 64,
        "query_pre_attn_scalar": 16,
    },
    "quantised head": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    },
    "quantised, plain head": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    },
}


def build_target(folder: Path, kind: str, layers: int = 4) -> Path:
    """A target's config and the headers that are read before its weights load."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**_SHAPE, **TARGETS[kind], "num_hidden_layers": layers}
    if kind == "Mamba2":
        config["hybrid_override_pattern"] = ("M*-M" * layers)[:layers]
    (folder / "config.json").write_text(json.dumps(config))
    head = torch.zeros(VOCAB, WIDTH).to(torch.float8_e4m3fn if kind == "quantised head" else torch.bfloat16)
    save_file({"lm_head.weight": head}, folder / "model.safetensors")
    return folder


def build_entry(folder: Path, entry: dict[str, Any], **changes: Any) -> tuple[Path, Path]:
    """The target and the drafter of a published entry, scaled down, layer numbers as published."""
    layers = entry["target"].get("num_hidden_layers", 36)
    linear = "linear" in entry["target"]["attention"]
    sliding = "sliding" in entry["target"]["attention"]
    kind = "gated delta net" if linear else "sliding pool" if sliding else "full"
    target = build_target(folder / "target", kind, layers)
    return target, build_drafter(folder / "drafter", entry["config"], layers, **changes)


def build_drafter(folder: Path, published: dict[str, Any], target_layers: int, **changes: Any) -> Path:
    """A random drafter with the keys of a published config.json and the tensors its class takes.

    Args:
        changes: keys of ``config.json``, over the published ones.
    """
    count = int(published.get("num_hidden_layers", 2))
    inner = published.get("dflash_config") or {}
    ids = inner.get("target_layer_ids") or published.get("target_layer_ids")
    ids = ids or [1 + i * (target_layers - 4) // max(count - 1, 1) for i in range(count)]
    spec = tiny.TargetSpec(num_layers=target_layers)
    tiny.build_drafter(
        folder, spec, replace(tiny.DrafterSpec(), num_layers=count, target_layer_ids=tuple(ids))
    )
    own = set(_SHAPE) - {"max_position_embeddings", "tie_word_embeddings"}
    config = {key: value for key, value in published.items() if key not in own}
    config |= {key: _SHAPE[key] for key in own if key in published or "hidden_size" in published}
    config.setdefault("num_hidden_layers", count)
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"):
        config.setdefault(key, _SHAPE[key])
    section = dict(inner)
    if "mask_token_id" in section:
        section["mask_token_id"] = tiny.MASK_ID
    if "mask_token_id" in config:
        config["mask_token_id"] = tiny.MASK_ID
    if section.get("selector_rank"):
        section |= {"selector_rank": 4, "selector_top_k": 4}
    if section.get("projector_type") == "domino":
        section |= {"gru_hidden_dim": 8}
    if section:
        config["dflash_config"] = section
    for nested in ("transformer_layer_config",):
        if nested in config:
            config[nested] = {**config[nested], **{key: _SHAPE[key] for key in own}}
    config |= changes
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    weights = load_file(file)
    _add_tensors(weights, config, len(ids))
    save_file(weights, file)
    return folder


def _add_tensors(weights: dict[str, torch.Tensor], config: dict[str, Any], features: int) -> None:
    """What the classes beside ``DFlashDraftModel`` keep."""
    section, names = config.get("dflash_config", {}), config.get("architectures", [])
    layers = range(config["num_hidden_layers"])
    if "DFlashLagunaForCausalLM" in names:
        weights |= {f"aux_hidden_norms.{i}.weight": torch.ones(WIDTH) for i in range(features)}
        weights |= {f"layers.{i}.self_attn.g_proj.weight": torch.zeros(4, WIDTH) for i in layers}
    if "MuseGlimmerAssistantModel" in names:
        weights["encoder.fc.weight"] = weights.pop("fc.weight")
        weights["encoder.output_norm_enc.weight"] = weights.pop("hidden_norm.weight")
    if section.get("selector_rank"):
        rank = section["selector_rank"]
        for name in ("predecessor", "successor"):
            weights[f"candidate_selector.{name}_codebook"] = torch.zeros(VOCAB, rank)
        weights["candidate_selector.hidden_projection.weight"] = torch.zeros(rank, WIDTH)
    if section.get("conv_kernel_size"):
        taps, groups = section["conv_kernel_size"], WIDTH // section["conv_group_size"]
        for i in layers:
            for name in ("attention_conv", "mlp_conv"):
                weights[f"layers.{i}.{name}.base_kernel"] = torch.zeros(2, taps, WIDTH)
                weights[f"layers.{i}.{name}.kernel_projection.weight"] = torch.zeros(2 * taps * groups, WIDTH)
    if section.get("projector_type") == "domino":
        gru, emb = section["gru_hidden_dim"], config.get("emb_dim") or section.get("emb_dim") or 8
        weights["prefix_gru.weight_ih_l0"] = torch.zeros(3 * gru, WIDTH)
        weights["prefix_gru.weight_hh_l0"] = torch.zeros(3 * gru, gru)
        weights["embed_proj.0.weight"] = torch.zeros(emb, WIDTH + gru)
        weights["embed_proj.2.weight"] = torch.zeros(VOCAB, emb)
