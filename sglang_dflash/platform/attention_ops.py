"""Attention over a slot-addressed KV cache in plain torch. No SGLang in here.

Every request brings ``width`` query rows that follow ``prefix_lens`` cached tokens; their
own keys are in the cache already. The keys of all requests are gathered into one padded
batch, so that a layer costs one gather of K, one of V and one call of scaled-dot-product
attention, whatever the batch size. The query heads of one KV head become rows of the same
matrix, so grouped-query attention repeats no key.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class HeadSpec:
    """What one attention layer asks for.

    ``window`` counts the keys before the query's own position that stay visible, as in
    SGLang's ``RadixAttention.sliding_window_size``; None means all. ``logit_cap`` is the
    tanh soft-cap, 0 for none.
    """

    q_heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    scale: float
    window: int | None = None
    logit_cap: float = 0.0
    bidirectional: bool = False

    @property
    def groups(self) -> int:
        return self.q_heads // self.kv_heads


@dataclass
class Segment:
    """Requests with the same number of query rows, prepared once per forward pass.

    Attributes:
        rows: the segment's slice of the flattened query rows.
        width: query rows per request.
        slots: int64 ``[requests, kv_len]``, rows padded with slot 0.
        prefix_lens: int64 ``[requests]``, keys before the first query row.
        tree: bool ``[requests, width, width]``: row i sees the new key j. None: causal.
        positions: int64 ``[requests, width]``, needed only for sliding windows in a tree.
        first_slot: set when there is one request and its slots are consecutive, so that
            its keys are a view of the cache.
    """

    rows: slice
    width: int
    slots: torch.Tensor
    prefix_lens: torch.Tensor
    tree: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    first_slot: int | None = None
    _masks: dict[tuple, torch.Tensor | None] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        return self.slots.shape[0]

    @property
    def kv_len(self) -> int:
        return self.slots.shape[1]

    def gather(self, cache: torch.Tensor) -> torch.Tensor:
        """``[slots, heads, dim]`` -> ``[requests, heads, kv_len, dim]``."""
        if self.first_slot is not None:
            return cache.narrow(0, self.first_slot, self.kv_len).unsqueeze(0).transpose(1, 2)
        picked = cache.index_select(0, self.slots.view(-1))
        return picked.view(self.requests, self.kv_len, *cache.shape[1:]).transpose(1, 2)

    def additive_mask(self, head: HeadSpec, dtype: torch.dtype) -> torch.Tensor | None:
        """0 / -inf, ``[requests, 1, groups * width, kv_len]``; None when nothing is hidden."""
        key = (head.bidirectional, head.window, head.groups, dtype)
        if key not in self._masks:
            self._masks[key] = self._build_mask(head, dtype)
        return self._masks[key]

    def _build_mask(self, head: HeadSpec, dtype: torch.dtype) -> torch.Tensor | None:
        visible = visible_keys(
            self.prefix_lens,
            self.width,
            self.kv_len,
            tree=self.tree,
            positions=self.positions,
            bidirectional=head.bidirectional,
            window=head.window,
        )
        if bool(visible.all()):
            return None
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
        return mask.repeat(1, head.groups, 1).unsqueeze(1)


def visible_keys(
    prefix_lens: torch.Tensor,
    width: int,
    kv_len: int,
    *,
    tree: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    bidirectional: bool = False,
    window: int | None = None,
) -> torch.Tensor:
    """Which keys each query row sees: bool ``[requests, width, kv_len]``.

    Args:
        prefix_lens: int64 ``[requests]``. The new keys are columns ``prefix .. prefix+width-1``.
        tree: bool ``[requests, width, width]`` ancestor mask over the new keys, or None.
        positions: int64 ``[requests, width]`` of the query rows; default ``prefix + i``.
        bidirectional: every row sees all keys of its request (the drafter's block).
        window: hide keys more than ``window`` positions before the query row.
    """
    columns = torch.arange(kv_len)
    prefix = prefix_lens.view(-1, 1, 1)
    rows = torch.arange(width).view(1, -1, 1)
    if bidirectional:
        visible = (columns < prefix + width).expand(-1, width, -1)
    elif tree is None:
        visible = columns <= prefix + rows
    else:
        visible = (columns < prefix).expand(-1, width, -1).contiguous()
        visible.scatter_(2, (prefix + rows.view(1, 1, -1)).expand(-1, width, -1), tree)
    if window is not None:
        query = (prefix + rows) if positions is None else positions.unsqueeze(-1)
        key = columns.view(1, 1, -1).expand(prefix.shape[0], 1, -1)
        if positions is not None:
            key = key.clone().scatter_(2, prefix + rows.view(1, 1, -1), positions.unsqueeze(1))
        visible = visible & (key >= query - window)
    return visible


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    segment: Segment,
    head: HeadSpec,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one segment.

    Args:
        q: ``[requests * width, q_heads * qk_dim]``. k_cache, v_cache: ``[slots, kv_heads, dim]``.
        sinks: float ``[q_heads]``, a logit per head that takes part in the softmax only.

    Returns:
        ``[requests * width, q_heads * v_dim]`` in q's dtype.
    """
    n, w, g = segment.requests, segment.width, head.groups
    q = q.reshape(n, w, head.kv_heads, g, head.qk_dim)
    q = q.permute(0, 2, 3, 1, 4).reshape(n, head.kv_heads, g * w, head.qk_dim)
    k, v = segment.gather(k_cache), segment.gather(v_cache)
    if head.logit_cap > 0 or sinks is not None:
        out = _attend_explicit(q, k, v, segment, head, sinks)
    else:
        mask = segment.additive_mask(head, q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=head.scale)
    out = out.view(n, head.kv_heads, g, w, head.v_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(n * w, head.q_heads * head.v_dim)


def _attend_explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segment: Segment,
    head: HeadSpec,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Soft-capped logits and attention sinks, which the fused operator does not know."""
    scores = (q.float() @ k.float().transpose(-1, -2)) * head.scale
    if head.logit_cap > 0:
        scores = head.logit_cap * torch.tanh(scores / head.logit_cap)
    mask = segment.additive_mask(head, torch.float32)
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        logit = sinks.float().view(1, head.kv_heads, head.groups, 1, 1)
        logit = logit.expand(q.shape[0], -1, -1, segment.width, -1).reshape(*scores.shape[:-1], 1)
        probs = torch.cat([scores, logit], dim=-1).softmax(-1)[..., :-1]
    else:
        probs = scores.softmax(-1)
    return (probs @ v.float()).to(q.dtype)


def unpack_ancestors(words: torch.Tensor) -> torch.Tensor:
    """Bit-packed ancestor words int32 ``[requests, N, W]`` -> bool ``[requests, N, N]``."""
    nodes = words.shape[1]
    bits = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
    return bits.flatten(2)[:, :, :nodes].bool()
