"""A dense target model as plain tensors: batched prefill and decode with captured features.

The trainer needs three things of a target that a general framework gives slowly on a CPU:
many sequences decoded at once from one static KV cache, the hidden states of a few layers
kept on the way, and the last hidden state for self-distillation. This module runs the
Llama-shaped family (llama, mistral, qwen2, qwen3: RMSNorm, rotary, GQA, SwiGLU) from its
safetensors files; it imports neither SGLang nor a Transformers model class.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn import functional as F

from sglang_dflash.errors import UserError
from sglang_dflash.platform.capability import multiplies_bf16

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")


@dataclass
class Layer:
    """Weights of one decoder layer; fused rows are [q | k | v] and [gate | up]."""

    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


@dataclass
class KVCache:
    """Static cache of S slots: ``k``, ``v`` are [layers, S, kv_heads, T_max, head_dim]."""

    k: torch.Tensor
    v: torch.Tensor

    @property
    def slots(self) -> int:
        return self.k.shape[1]


def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32.

    A CPU without such instructions emulates bfloat16 matrix products at a third of float32's speed.
    """
    if not device.startswith("cpu") or multiplies_bf16():
        return torch.bfloat16
    return torch.float32


def _read_weights(path: Path, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"no *.safetensors in {path}: give a downloaded target model (sglang-dflash fetch)")
    out = {}
    for file in files:
        try:
            with safe_open(file, framework="pt", device=device) as handle:
                for name in handle.keys():  # noqa: SIM118 (safe_open is no dict)
                    out[name] = handle.get_tensor(name).to(dtype)
        except Exception as error:
            raise UserError(f"cannot read {file}: {error}; download the model again") from None
    return out


@dataclass(frozen=True)
class TargetName:
    """A target that something else runs: what its corpus has to know of it."""

    path: Path
    vocab: int

    @classmethod
    def of(cls, path: Path) -> TargetName:
        """Raises UserError when there is no target in ``path``."""
        return cls(path, int(_read_config(path)["vocab_size"]))


def _read_config(path: Path) -> dict:
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"no target model at {path}: config.json is missing (sglang-dflash fetch)")
    return json.loads(file.read_text())


class DenseTarget:
    """The frozen target: ``[tokens] -> features, last hidden state``, prefilled or decoded.

    A feature of layer ``i`` is the residual stream *after* layer ``i`` (Hugging Face
    ``hidden_states[i + 1]``; the convention of DFlash ``target_layer_ids``). The last
    hidden state is after the final norm, so ``last @ head.T`` are the logits. ``dtype`` None: the fast one.
    """

    def __init__(self, path: Path | str, dtype: torch.dtype | None = None, device: str = "cpu") -> None:
        self.path = Path(path)
        dtype = dtype or fast_dtype(device)
        self.config = config = _read_config(self.path)
        if config.get("model_type") not in SUPPORTED:
            raise UserError(
                f"target type {config.get('model_type')!r} is not supported for training; "
                f"known: {', '.join(SUPPORTED)}"
            )
        self.hidden = int(config["hidden_size"])
        self.num_layers = int(config["num_hidden_layers"])
        self.heads = int(config["num_attention_heads"])
        self.kv_heads = int(config.get("num_key_value_heads") or self.heads)
        self.head_dim = int(config.get("head_dim") or self.hidden // self.heads)
        self.vocab = int(config["vocab_size"])
        self.eps = float(config.get("rms_norm_eps", 1e-6))
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise UserError(
                f"rotary type {rope.get('rope_type')!r} is not supported for training; use 'default'"
            )
        self.rope_theta = float(rope.get("rope_theta") or config.get("rope_theta", 10000.0))
        self.max_positions = int(config.get("max_position_embeddings", 8192))
        self.dtype, self.device = dtype, device
        self._load(_read_weights(self.path, dtype, device))

    def _load(self, weights: dict[str, torch.Tensor]) -> None:
        def take(name: str) -> torch.Tensor:
            if name not in weights:
                raise UserError(f"target {self.path} has no weight {name}: not a complete {SUPPORTED} model")
            return weights[name]

        self.embed = take("model.embed_tokens.weight")
        if "lm_head.weight" in weights:
            self.head = weights["lm_head.weight"]
        elif self.config.get("tie_word_embeddings"):
            self.head = self.embed
        else:
            raise UserError(f"target {self.path} has no head: lm_head.weight is missing and not tied")
        self.norm = take("model.norm.weight")
        self.layers = []
        for i in range(self.num_layers):
            p = f"model.layers.{i}."
            a = p + "self_attn."
            bias = None
            if a + "q_proj.bias" in weights:
                bias = torch.cat([weights[a + f"{n}_proj.bias"] for n in "qkv"])
            self.layers.append(
                Layer(
                    qkv=torch.cat([take(a + f"{n}_proj.weight") for n in "qkv"]),
                    qkv_bias=bias,
                    out=take(a + "o_proj.weight"),
                    gate_up=torch.cat([take(p + "mlp.gate_proj.weight"), take(p + "mlp.up_proj.weight")]),
                    down=take(p + "mlp.down_proj.weight"),
                    input_norm=take(p + "input_layernorm.weight"),
                    post_norm=take(p + "post_attention_layernorm.weight"),
                    q_norm=weights.get(a + "q_norm.weight"),
                    k_norm=weights.get(a + "k_norm.weight"),
                )
            )
        inverse = 1.0 / self.rope_theta ** (torch.arange(0, self.head_dim, 2).double() / self.head_dim)
        angle = torch.arange(self.max_positions).double()[:, None] * inverse[None]
        angle = torch.cat([angle, angle], dim=-1)
        self.cos = angle.cos().to(self.dtype).to(self.device)
        self.sin = angle.sin().to(self.dtype).to(self.device)

    def new_cache(self, slots: int, length: int) -> KVCache:
        """An empty cache of ``slots`` sequences of at most ``length`` tokens."""
        shape = (self.num_layers, slots, self.kv_heads, length, self.head_dim)
        return KVCache(*(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2)))

    def _rope(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate ``x`` [..., heads, head_dim] at ``positions`` [...]."""
        cos, sin = self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)
        half = x.shape[-1] // 2
        rotated = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * cos + rotated * sin

    def _qkv(self, layer: Layer, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``x`` [..., hidden] to rotated q [..., heads, D] and k, plain v [..., kv_heads, D]."""
        h = F.rms_norm(x, (self.hidden,), layer.input_norm, self.eps)
        qkv = F.linear(h, layer.qkv, layer.qkv_bias)
        qkv = qkv.view(*x.shape[:-1], self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        if layer.q_norm is not None:
            q = F.rms_norm(q, (self.head_dim,), layer.q_norm, self.eps)
            k = F.rms_norm(k, (self.head_dim,), layer.k_norm, self.eps)
        return self._rope(q, positions), self._rope(k, positions), v

    def _finish(self, layer: Layer, x: torch.Tensor, attn: torch.Tensor) -> torch.Tensor:
        x = x + F.linear(attn, layer.out)
        h = F.linear(F.rms_norm(x, (self.hidden,), layer.post_norm, self.eps), layer.gate_up)
        gate, up = h.chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, layer.down)

    @torch.inference_mode()
    def prefill(
        self,
        tokens: torch.Tensor,
        features: tuple[int, ...] = (),
        cache: KVCache | None = None,
        slot: int = 0,
    ) -> torch.Tensor:
        """Run whole sequences (right padding is harmless: causal) -> [n, T, planes, hidden].

        ``tokens`` [n, T] int64. Planes are the feature layers in order, then the last hidden
        state. With ``cache`` the keys and values go to slots ``slot .. slot + n``.
        """
        n, T = tokens.shape
        positions = torch.arange(T, device=self.device).expand(n, T)
        out = torch.empty(n, T, len(features) + 1, self.hidden, dtype=self.dtype, device=self.device)
        x = F.embedding(tokens, self.embed)
        for i, layer in enumerate(self.layers):
            q, k, v = (t.transpose(1, 2) for t in self._qkv(layer, x, positions))
            if cache is not None:
                cache.k[i, slot : slot + n, :, :T] = k
                cache.v[i, slot : slot + n, :, :T] = v
            group = self.heads // self.kv_heads
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            attn = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = self._finish(layer, x, attn.transpose(1, 2).reshape(n, T, -1))
            if i in features:
                out[:, :, features.index(i)] = x
        out[:, :, -1] = F.rms_norm(x, (self.hidden,), self.norm, self.eps)
        return out

    @torch.inference_mode()
    def decode(
        self,
        tokens: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        groups: list[tuple[int, int, int]],
        features: tuple[int, ...] = (),
    ) -> torch.Tensor:
        """One token of every active slot -> [n, planes, hidden] (as in :meth:`prefill`).

        ``tokens``, ``slots``, ``positions`` [n] int64; ``groups`` lists (first slot, past slot,
        keys) of slot ranges of like length: attention runs per range, so short ranges stay cheap.
        """
        n = tokens.shape[0]
        out = torch.empty(n, len(features) + 1, self.hidden, dtype=self.dtype, device=self.device)
        x = F.embedding(tokens, self.embed)
        group = self.heads // self.kv_heads
        q_all = torch.zeros(
            cache.slots, self.kv_heads, group, self.head_dim, dtype=self.dtype, device=self.device
        )
        attn = torch.zeros_like(q_all)
        lengths = torch.zeros(cache.slots, dtype=torch.long, device=self.device)
        lengths[slots] = positions
        masks = []
        for first, past, keys in groups:
            visible = torch.arange(keys, device=self.device)[None] <= lengths[first:past, None]
            mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
            masks.append(mask.masked_fill_(~visible, float("-inf"))[:, None, None])
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, x, positions)
            cache.k[i, slots, :, positions] = k
            cache.v[i, slots, :, positions] = v
            q_all[slots] = q.view(n, self.kv_heads, group, self.head_dim)
            for (first, past, keys), mask in zip(groups, masks, strict=True):
                # The heads of one KV group are rows of one query: four times as fast on a CPU
                # as grouped attention over single-row queries.
                attn[first:past] = F.scaled_dot_product_attention(
                    q_all[first:past],
                    cache.k[i, first:past, :, :keys],
                    cache.v[i, first:past, :, :keys],
                    mask,
                )
            x = self._finish(layer, x, attn[slots].reshape(n, -1))
            if i in features:
                out[:, features.index(i)] = x
        out[:, -1] = F.rms_norm(x, (self.hidden,), self.norm, self.eps)
        return out
