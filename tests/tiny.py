"""Tiny checkpoints for tests: a Llama target and a DFlash drafter, with random weights.

Both are written as real checkpoint folders (``config.json`` + ``model.safetensors``,
the target also with a byte-level tokenizer), so that SGLang and transformers load them
like any other model. Nothing here needs SGLang.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

#: One token per byte, then ``<pad>``, ``<bos>``, ``<eos>`` and ``<mask>``.
NUM_BYTES = 256
PAD_ID, BOS_ID, EOS_ID, MASK_ID = 256, 257, 258, 259


# The byte alphabet in its own order: bytes that print first, then the others.
_BYTES = sorted(range(NUM_BYTES), key=lambda b: (not (33 <= b <= 126 or 161 <= b != 173), b))


def tokens_of(text: bytes) -> list[int]:
    """The token ids of bytes in :func:`build_target`'s tokenizer."""
    return [_BYTES.index(byte) for byte in text]


_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class TargetSpec:
    """Shape of a tiny Llama target."""

    hidden_size: int = 64
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    intermediate_size: int = 128
    vocab_size: int = 512
    max_position: int = 512
    tie_word_embeddings: bool = True


@dataclass(frozen=True)
class DrafterSpec:
    """Shape of a tiny DFlash drafter (z-lab layout). The hidden size is the target's."""

    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    intermediate_size: int = 128
    block_size: int = 8
    #: Target layers whose outputs the drafter reads; at most ``num_layers - 2``.
    target_layer_ids: tuple[int, ...] = (0, 2)
    mask_token_id: int = MASK_ID


def build_target(
    folder: Path, spec: TargetSpec | None = None, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Path:
    """Write a random Llama checkpoint with a tokenizer to ``folder`` and return the folder.

    Rows of the embedding are spread (std 1) so that greedy decoding has a clear argmax.
    """
    spec = spec or TargetSpec()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "dtype": _dtype_name(dtype),
    }
    draw = _Draw(seed)
    weights = {"model.embed_tokens.weight": draw(spec.vocab_size, spec.hidden_size, std=1.0)}
    for i in range(spec.num_layers):
        weights |= _layer(draw, f"model.layers.{i}.", spec, spec.hidden_size, qk_norm=False)
    weights["model.norm.weight"] = draw.norm(spec.hidden_size)
    if not spec.tie_word_embeddings:
        weights["lm_head.weight"] = draw(spec.vocab_size, spec.hidden_size, std=1.0)
    _write(folder, config, weights, dtype)
    _write_tokenizer(folder, spec.max_position)
    return folder


def build_drafter(
    folder: Path,
    target: TargetSpec | None = None,
    spec: DrafterSpec | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 1,
) -> Path:
    """Write a random DFlash drafter for ``target`` to ``folder`` and return the folder.

    Layout of the published checkpoints (Qwen3 block, ``fc``, ``hidden_norm``, no
    embedding and no head of its own), as ``sglang/srt/models/dflash.py`` loads it.
    """
    target = target or TargetSpec()
    spec = spec or DrafterSpec()
    if max(spec.target_layer_ids) > target.num_layers - 2:
        raise ValueError(f"target_layer_ids must be <= {target.num_layers - 2}, got {spec.target_layer_ids}")
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "hidden_size": target.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": target.vocab_size,
        "max_position_embeddings": target.max_position,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "block_size": spec.block_size,
        "num_target_layers": target.num_layers,
        "dflash_config": {
            "mask_token_id": spec.mask_token_id,
            "target_layer_ids": list(spec.target_layer_ids),
        },
        "dtype": _dtype_name(dtype),
    }
    draw = _Draw(seed)
    weights = {
        "fc.weight": draw(target.hidden_size, target.hidden_size * len(spec.target_layer_ids)),
        "hidden_norm.weight": draw.norm(target.hidden_size),
        "norm.weight": draw.norm(target.hidden_size),
    }
    for i in range(spec.num_layers):
        weights |= _layer(draw, f"layers.{i}.", spec, target.hidden_size, qk_norm=True)
    _write(folder, config, weights, dtype)
    return folder


def target_spec_of(folder: Path) -> TargetSpec:
    """The :class:`TargetSpec` of any Llama checkpoint, to build a drafter for it."""
    c = json.loads((folder / "config.json").read_text())
    heads = c["num_attention_heads"]
    return TargetSpec(
        hidden_size=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=c.get("num_key_value_heads", heads),
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        intermediate_size=c["intermediate_size"],
        vocab_size=c["vocab_size"],
        max_position=c["max_position_embeddings"],
        tie_word_embeddings=c.get("tie_word_embeddings", False),
    )


def drafter_spec_for(target: TargetSpec, **changes: object) -> DrafterSpec:
    """A drafter with the target's head shape and two layers; ``changes`` override fields."""
    spec = DrafterSpec(
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        intermediate_size=target.intermediate_size,
        target_layer_ids=(0, target.num_layers - 2),
    )
    return replace(spec, **changes)  # type: ignore[arg-type]


class _Draw:
    """Reproducible random weights."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, std: float | None = None) -> torch.Tensor:
        scale = shape[-1] ** -0.5 if std is None else std
        return torch.randn(*shape, generator=self.generator) * scale

    def norm(self, size: int) -> torch.Tensor:
        return 1.0 + 0.1 * torch.randn(size, generator=self.generator)


def _layer(
    draw: _Draw, prefix: str, spec: TargetSpec | DrafterSpec, hidden: int, *, qk_norm: bool
) -> dict[str, torch.Tensor]:
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    weights = {
        "input_layernorm.weight": draw.norm(hidden),
        "post_attention_layernorm.weight": draw.norm(hidden),
        "self_attn.q_proj.weight": draw(q, hidden),
        "self_attn.k_proj.weight": draw(kv, hidden),
        "self_attn.v_proj.weight": draw(kv, hidden),
        "self_attn.o_proj.weight": draw(hidden, q),
        "mlp.gate_proj.weight": draw(spec.intermediate_size, hidden),
        "mlp.up_proj.weight": draw(spec.intermediate_size, hidden),
        "mlp.down_proj.weight": draw(hidden, spec.intermediate_size),
    }
    if qk_norm:
        weights["self_attn.q_norm.weight"] = draw.norm(spec.head_dim)
        weights["self_attn.k_norm.weight"] = draw.norm(spec.head_dim)
    return {prefix + name: w for name, w in weights.items()}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(folder: Path, config: dict, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(
        {k: w.to(dtype).contiguous() for k, w in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def _write_tokenizer(folder: Path, max_length: int) -> None:
    """A byte-level tokenizer: token id = position of the byte in the byte alphabet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == NUM_BYTES
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>", "<mask>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        mask_token="<mask>",
        model_max_length=max_length,
    )
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(folder)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(
        description="Write a tiny target and drafter, or a drafter for --target."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", type=Path, help="an existing Llama checkpoint to draft for")
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    shape = target_spec_of(options.target) if options.target else TargetSpec()
    if options.target is None:
        build_target(options.folder / "target", shape, dtype=dtype)
    drafter = drafter_spec_for(shape, block_size=options.block_size)
    build_drafter(options.folder / "drafter", shape, drafter, dtype=dtype)
    print(json.dumps({"target": asdict(shape), "drafter": asdict(drafter)}))


def cached_snapshot(cache: Path, repo: str, commit: str, source: Path, ref: str | None = None) -> Path:
    """Put ``source`` into a Hugging Face cache as ``commit`` of ``repo``; with ``ref`` that points to it."""
    place = cache / f"models--{repo.replace('/', '--')}"
    folder = shutil.copytree(source, place / "snapshots" / commit)
    if ref:
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / ref).write_text(commit)
    return folder
