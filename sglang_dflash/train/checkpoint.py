"""Drafter checkpoints in z-lab's Hugging Face layout, and warm starts from a target's layers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sglang_dflash.errors import UserError
from sglang_dflash.train.corpus import write_atomically
from sglang_dflash.train.model import Drafter, DrafterConfig
from sglang_dflash.train.target import DenseTarget

#: Keys of drafters that draft otherwise than :class:`~sglang_dflash.train.model.Drafter` does.
FOREIGN = (
    *("conv_kernel_size", "projector_type", "attention_sink_bias", "query_zero_predicts_next"),
    *("sample_from_anchor", "draft_vocab_size", "output_multiplier", "final_logit_softcapping"),
)


def default_target_layers(depth: int, count: int = 5) -> tuple[int, ...]:
    """Feature layers spread from the second to the third-to-last layer (paper, section 3.2)."""
    if count == 1:
        return (depth // 2,)
    return tuple(round(1 + i * (depth - 4) / (count - 1)) for i in range(count))


def check_target_layers(layers: tuple[int, ...], depth: int) -> None:
    """SGLang captures a feature when the *next* layer starts, so the last layer never is one."""
    bad = [i for i in layers if not 0 <= i <= depth - 2]
    if bad or list(layers) != sorted(set(layers)):
        raise UserError(
            f"feature layers {list(layers)} do not fit a target of {depth} layers: "
            f"give rising numbers from 0 to {depth - 2} (SGLang never captures the last layer)"
        )


def config_for(
    target: DenseTarget, *, layers: int, block: int, target_layers: tuple[int, ...], mask_token: int
):
    """A drafter of the target's own width and head shape."""
    check_target_layers(target_layers, target.num_layers)
    return DrafterConfig(
        hidden=target.hidden,
        intermediate=int(target.config["intermediate_size"]),
        layers=layers,
        heads=target.heads,
        kv_heads=target.kv_heads,
        head_dim=target.head_dim,
        vocab=target.vocab,
        target_depth=target.num_layers,
        target_layers=target_layers,
        mask_token=mask_token,
        block=block,
        eps=target.eps,
        rope_theta=target.rope_theta,
        max_positions=target.max_positions,
    )


def config_json(c: DrafterConfig, extra: dict | None = None) -> dict:
    """``config.json`` as SGLang's ``parse_dflash_draft_config`` and ``dflash`` read it.

    ``extra`` goes under ``dflash_config`` (unknown keys there are ignored by both).
    """
    selector = {"selector_rank": c.selector_rank, "selector_top_k": c.selector_top_k}
    return {
        "architectures": ["DFlash2DraftModel" if c.selector_rank else "DFlashDraftModel"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": c.block,
        "dflash_config": {
            "mask_token_id": c.mask_token,
            "target_layer_ids": list(c.target_layers),
            **(selector if c.selector_rank else {}),
            **(extra or {}),
        },
        "dtype": "bfloat16",
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate,
        "layer_types": ["full_attention"] * c.layers,
        "max_position_embeddings": c.max_positions,
        "max_window_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "num_key_value_heads": c.kv_heads,
        "num_target_layers": c.target_depth,
        "rms_norm_eps": c.eps,
        "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"},
        "rope_theta": c.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": c.vocab,
    }


def save_drafter(folder: Path, drafter: Drafter, extra: dict | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` (bf16); each file appears whole or not at all."""
    weights = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in drafter.state_dict().items()}
    write_atomically(folder / "model.safetensors", lambda p: save_file(weights, p, metadata={"format": "pt"}))
    text = json.dumps(config_json(drafter.config, extra), indent=2) + "\n"
    write_atomically(folder / "config.json", lambda p: p.write_text(text))


def read_config(folder: Path) -> tuple[DrafterConfig, dict]:
    """Shape and ``dflash_config`` of a stock checkpoint; what we cannot train is refused by name."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"no drafter at {folder}: config.json is missing")
    try:
        j = json.loads(file.read_text())
        d = j.get("dflash_config") or {}
        for key in FOREIGN:
            if d.get(key) or j.get(key):
                raise UserError(f"{folder} is no stock DFlash drafter ({key} is set): not trainable here")
        rope = j.get("rope_parameters") or j.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default" or j.get("attention_bias"):
            raise UserError(f"{folder} uses scaled rotary or attention biases: not trainable here")
        if any(t != "full_attention" for t in j.get("layer_types") or []):
            raise UserError(f"{folder} has sliding-window layers: not trainable here")
        heads = int(j["num_attention_heads"])
        config = DrafterConfig(
            hidden=int(j["hidden_size"]),
            intermediate=int(j["intermediate_size"]),
            layers=int(j["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(j.get("num_key_value_heads", heads)),
            head_dim=int(j.get("head_dim") or int(j["hidden_size"]) // heads),
            vocab=int(j["vocab_size"]),
            target_depth=int(d.get("num_target_layers") or j["num_target_layers"]),
            target_layers=tuple(d.get("target_layer_ids") or j["target_layer_ids"]),
            mask_token=int(d.get("mask_token_id", j.get("mask_token_id"))),
            block=int(d.get("block_size") or j["block_size"]),
            eps=float(j.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or j.get("rope_theta", 10000.0)),
            max_positions=int(j.get("max_position_embeddings", 8192)),
            selector_rank=int(d.get("selector_rank") or 0),
            selector_top_k=int(d.get("selector_top_k") or 0),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not a DFlash drafter's config: {type(error).__name__} {error}") from None
    return config, d


def load_drafter(folder: Path | str) -> Drafter:
    """A stock checkpoint as a trainable model (bf16)."""
    folder = Path(folder)
    config, _ = read_config(folder)
    drafter = Drafter(config).to(torch.bfloat16)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            weights |= load_file(file)
        except Exception as error:
            raise UserError(f"cannot read {file}: {error}") from None
    weights = {k.removeprefix("model."): v.to(torch.bfloat16) for k, v in weights.items()}
    wanted = drafter.state_dict()
    missing = sorted(set(wanted) - set(weights))
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} weights, first {missing[0]}: not a DFlash drafter")
    wrong = [k for k in wanted if wanted[k].shape != weights[k].shape]
    if wrong:
        raise UserError(
            f"{folder}: {wrong[0]} has shape {tuple(weights[wrong[0]].shape)}, "
            f"config.json says {tuple(wanted[wrong[0]].shape)}"
        )
    drafter.load_state_dict({k: weights[k] for k in wanted})
    return drafter


@torch.no_grad()
def warm_start(drafter: Drafter, target: DenseTarget, sources: tuple[int, ...], tokens: torch.Tensor) -> None:
    """Copy the target's layers ``sources`` into the drafter's, so training starts near a decoder.

    Qwen3's per-head q/k norms have no counterpart in Llama: their weight is set to the RMS
    that the source layer's q and k show on ``tokens`` [n, T], which keeps attention's sharpness.
    The fusion starts as the deepest feature alone, normed as the first source layer norms its input
    on average, plus a little of the others.
    """
    c = drafter.config
    if bad := [i for i in sources if not 0 <= i < target.num_layers]:
        raise UserError(f"--warm-layers names layer {bad[0]}: the target's are 0 to {target.num_layers - 1}")
    if len(sources) != c.layers or c.hidden != target.hidden or c.head_dim != target.head_dim:
        raise UserError(
            f"--warm-layers names {len(sources)} layers for a drafter of {c.layers}, or widths differ"
        )
    stats = _qk_rms(target, tokens)
    for layer, source in zip(drafter.layers, sources, strict=True):
        t = target.layers[source]
        q, k, v = t.qkv.split([c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim])
        attn = layer.self_attn
        for p, w in ((attn.q_proj, q), (attn.k_proj, k), (attn.v_proj, v), (attn.o_proj, t.out)):
            p.weight.copy_(w)
        gate, up = t.gate_up.chunk(2)
        for p, w in ((layer.mlp.gate_proj, gate), (layer.mlp.up_proj, up), (layer.mlp.down_proj, t.down)):
            p.weight.copy_(w)
        layer.input_layernorm.weight.copy_(t.input_norm)
        layer.post_attention_layernorm.weight.copy_(t.post_norm)
        attn.q_norm.weight.copy_(
            t.q_norm if t.q_norm is not None else torch.full_like(attn.q_norm.weight, stats[source][0])
        )
        attn.k_norm.weight.copy_(
            t.k_norm if t.k_norm is not None else torch.full_like(attn.k_norm.weight, stats[source][1])
        )
    # Confident wrong guesses are slow to unlearn: start at half the target's logit scale.
    drafter.norm.weight.copy_(target.norm * 0.5)
    n = len(c.target_layers)
    fc = drafter.fc.weight.view(c.hidden, n, c.hidden)
    fc.normal_(std=0.002)
    fc[:, -1] += torch.eye(c.hidden)
    norms = torch.stack([target.layers[s].input_norm.float() for s in sources])
    drafter.hidden_norm.weight.copy_(norms.mean(0))


@torch.no_grad()
def balance_fusion(drafter: Drafter, features: torch.Tensor) -> None:
    """Scale the columns of a random ``fc`` by the spread of what they multiply.

    Residual streams grow with depth and hold a few huge channels; unscaled, the fused feature
    would start as those channels alone. ``features`` [n, planes, hidden] are a sample.
    """
    flat = features.float().flatten(1)
    spread = flat.std(0, correction=0)
    if not spread.median() > 0:
        # One token, or equal ones, have no spread: their size stands for it.
        spread = flat.square().mean(0).sqrt()
    drafter.fc.weight.mul_(0.5 / spread.clamp_min(spread.median() * 0.05))


def _qk_rms(target: DenseTarget, tokens: torch.Tensor) -> list[tuple[float, float]]:
    """Root mean square of q and k (before rotary, which keeps it) per target layer."""
    n, T = tokens.shape
    positions = torch.arange(T).expand(n, T)
    everything = tuple(range(target.num_layers))
    planes = target.prefill(tokens, everything)
    out = []
    for i, layer in enumerate(target.layers):
        x = torch.nn.functional.embedding(tokens, target.embed) if i == 0 else planes[:, :, i - 1]
        q, k, _ = target._qkv(layer, x, positions)
        out.append((float(q.float().square().mean().sqrt()), float(k.float().square().mean().sqrt())))
    return out
