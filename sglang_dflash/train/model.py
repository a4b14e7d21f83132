"""The stock DFlash drafter, trainable: Qwen3-style layers over injected target features.

Numerics and file layout are those of ``dflash==0.1.0`` ``DFlashDraftModel`` and SGLang's
``models/dflash.py`` (arXiv 2602.06036, section 3); parameter names are the checkpoint's.
One forward drafts many blocks of many documents at once, which neither of those does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from sglang_dflash.train.masks import Layout, block_attention


@dataclass
class DrafterConfig:
    """Shape of a drafter; ``target_layers`` are feature layers, at most ``target_depth - 2``."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    target_depth: int
    target_layers: tuple[int, ...]
    mask_token: int
    block: int = 8
    eps: float = 1e-6
    rope_theta: float = 10000.0
    max_positions: int = 8192
    selector_rank: int = 0  # 0: none
    selector_top_k: int = 0


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Queries from the block only; keys and values from context features and the block."""

    def __init__(self, c: DrafterConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.eps)
        self.k_norm = RMSNorm(c.head_dim, c.eps)

    def _split(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.unflatten(-1, (heads, self.head_dim))

    def keys_values(
        self, x: torch.Tensor, rope: Rope, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``x`` [..., hidden] -> normed, rotated k and plain v, [..., kv_heads, head_dim]."""
        k = self.k_norm(self._split(self.k_proj(x), self.kv_heads))
        return rope(k, positions), self._split(self.v_proj(x), self.kv_heads)

    def forward(self, x: torch.Tensor, context: torch.Tensor, layout: Layout, rope: Rope) -> torch.Tensor:
        q = rope(self.q_norm(self._split(self.q_proj(x), self.heads)), layout.block_positions)
        block_k, block_v = self.keys_values(x, rope, layout.block_positions)
        past_k, past_v = self.keys_values(context, rope, layout.context_positions)
        out = block_attention(q, past_k, past_v, block_k, block_v, layout)
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    def __init__(self, c: DrafterConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.up_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.down_proj = nn.Linear(c.intermediate, c.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, c: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden, c.eps)
        self.post_attention_layernorm = RMSNorm(c.hidden, c.eps)
        self.dropout = 0.0  # of both residual branches, in training only

    def forward(self, x: torch.Tensor, context: torch.Tensor, layout: Layout, rope: Rope) -> torch.Tensor:
        attn = self.self_attn(self.input_layernorm(x), context, layout, rope)
        x = x + F.dropout(attn, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class Rope:
    """Rotary table (half-split pairs, as Qwen3); grows with the positions it is asked for."""

    def __init__(self, c: DrafterConfig) -> None:
        self.inverse = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2).double() / c.head_dim)
        self.size = 0
        self.cos = self.sin = torch.empty(0)

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate ``x`` [..., heads, head_dim] at ``positions`` [...]."""
        need = int(positions.max()) + 1 if positions.numel() else 0
        if need > self.size or self.cos.dtype != x.dtype or self.cos.device != x.device:
            self.size = max(need, self.size, 512)
            angle = torch.arange(self.size).double()[:, None] * self.inverse[None]
            angle = torch.cat([angle, angle], dim=-1)
            self.cos = angle.cos().to(x.device, x.dtype)
            self.sin = angle.sin().to(x.device, x.dtype)
        cos, sin = self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin


class CandidateSelector(nn.Module):
    """DFlash 2's selector: tables that score each candidate behind each of the position before it.

    Names and shapes are SGLang's (``models/dflash.py: CandidateSelector``). Without values it says nothing.
    """

    def __init__(self, vocab: int, hidden: int, rank: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.predecessor_codebook = nn.Parameter(torch.zeros(vocab, rank))
        self.successor_codebook = nn.Parameter(torch.zeros(vocab, rank))
        self.hidden_projection = nn.Linear(hidden, rank, bias=False)
        nn.init.zeros_(self.hidden_projection.weight)


class Drafter(nn.Module):
    """``(block embeddings, target features) -> hidden states`` for the target's frozen head."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = c = config
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.eps)
        self.fc = nn.Linear(len(c.target_layers) * c.hidden, c.hidden, bias=False)
        self.hidden_norm = RMSNorm(c.hidden, c.eps)
        self.rope = Rope(c)
        self.reset()
        self.candidate_selector: CandidateSelector | None = None
        if c.selector_rank:
            self.add_selector(c.selector_rank, c.selector_top_k)

    def add_selector(self, rank: int, top_k: int) -> None:
        """Make room for a selector of ``top_k`` candidates; it says nothing yet."""
        self.config = replace(self.config, selector_rank=rank, selector_top_k=top_k)
        module = CandidateSelector(self.config.vocab, self.config.hidden, rank, top_k)
        self.candidate_selector = module.to(self.fc.weight.device, self.fc.weight.dtype)

    def drop_selector(self) -> None:
        """The drafter alone again."""
        self.config = replace(self.config, selector_rank=0, selector_top_k=0)
        self.candidate_selector = None

    def reset(self) -> None:
        """Random start: normal(0.02), the layers' outputs scaled down by depth."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * self.config.layers) if deep else 1.0))

    def forward(self, embeddings: torch.Tensor, features: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Hidden states of every block slot, after the final norm.

        embeddings: [R, A, B, hidden], slot 0 the anchor's token, the rest the mask token
        features: [R, T, len(target_layers), hidden] of the rows' context tokens
        layout: which context each block may see (strictly before its anchor)
        returns: [R, A, B, hidden]
        """
        context = self.hidden_norm(self.fc(features.flatten(-2)))
        x = embeddings
        for layer in self.layers:
            x = layer(x, context, layout, self.rope)
        return self.norm(x)
