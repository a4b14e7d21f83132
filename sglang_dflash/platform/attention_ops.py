"""Attention over a slot-addressed KV cache in plain torch. No SGLang in here.

Every request brings ``width`` query rows that follow ``prefix_lens`` cached tokens; their
own keys are in the cache already. The keys of all requests are gathered into one padded
batch, so that the number of operator calls per layer does not grow with the batch. The
query heads that share a KV head become rows of one matrix, so grouped-query attention
repeats no key.

The arithmetic of a row does not depend on the rows beside it. Speculative decoding is
exact only if a token verified among 32 others gets the logits it would get alone, and the
fused CPU attention of torch does not do that: its blocking follows the shape. Three rules
make plain matrix products row-invariant here (measured over widths 1..64 and lengths up to
2000: no bit differs):

* at least ``MIN_ROWS`` rows, because fewer take a matrix-vector kernel;
* a sum over keys is cut into tiles of ``KEY_TILE``, because a longer sum is split by its
  length; within a tile it runs in key order, so hidden keys (weight 0) change no bit and an
  off-spine node of a tree sums like the chain it becomes, unless its keys cross a tile;
* the softmax denominator is summed in float64, where the order of float32 terms is lost
  in rounding.

It is also faster than the fused operator at these sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

#: Fewer query rows per KV head than this are padded.
MIN_ROWS = 4
#: Keys per partial sum of the product with V.
KEY_TILE = 128
#: Shortest gathered row; a softmax narrower than a vector register sums in another order.
MIN_KEYS = 16
#: Query rows per KV head and product in a long prefill; bounds the memory of the scores.
MAX_ROWS = 192


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


@dataclass(frozen=True)
class Mask:
    """Additive mask of the key columns from ``start`` on; earlier columns are all visible.

    ``values``: 0 / -inf float32, broadcastable to ``[requests, kv_heads, groups * width, columns]``.
    """

    start: int
    values: torch.Tensor


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
    _masks: dict[tuple[bool, int | None, int], Mask | None] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        return self.slots.shape[0]

    @property
    def kv_len(self) -> int:
        return self.slots.shape[1]

    def gather(self, cache: torch.Tensor) -> torch.Tensor:
        """``[slots, heads, dim]`` in any dtype -> float32 ``[requests * heads, kv_len, dim]``."""
        if self.first_slot is not None:
            return cache.narrow(0, self.first_slot, self.kv_len).float().transpose(0, 1)
        picked = cache.index_select(0, self.slots.view(-1))
        if self.requests == 1:
            return picked.float().transpose(0, 1)
        picked = picked.view(self.requests, self.kv_len, *cache.shape[1:]).transpose(1, 2)
        picked = picked.to(torch.float32, memory_format=torch.contiguous_format)
        return picked.contiguous().view(-1, self.kv_len, cache.shape[-1])

    def mask(self, head: HeadSpec) -> Mask | None:
        """The additive mask for a layer; None when nothing is hidden."""
        key = (head.bidirectional, head.window, head.groups)
        if key not in self._masks:
            self._masks[key] = self._build_mask(head)
        return self._masks[key]

    def _build_mask(self, head: HeadSpec) -> Mask | None:
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
        start = 0 if head.window is not None else int(self.prefix_lens.min())
        values = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))[:, :, start:]
        return Mask(start, values.repeat(1, head.groups, 1).unsqueeze(1))


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
        window: hide keys more than ``window`` positions before the query row and, of a bidirectional
            layer, after it, as SGLang's Triton kernel does.
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
        if bidirectional:
            visible = visible & (key <= query + window)
    return visible


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    segment: Segment,
    head: HeadSpec,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one segment, computed in float32.

    Args:
        q: ``[requests * width, q_heads * qk_dim]``. k_cache, v_cache: ``[slots, kv_heads, dim]``.
        sinks: float ``[q_heads]``, a logit per head that takes part in the softmax only.

    Returns:
        ``[requests * width, q_heads * v_dim]`` in q's dtype.
    """
    k, v = segment.gather(k_cache), segment.gather(v_cache)
    step = max(1, MAX_ROWS // head.groups)
    if segment.width <= step or segment.tree is not None or segment.requests > 1:
        return _attend_rows(q, k, v, segment.requests, segment.mask(head), head, sinks)
    # A long prefill of one request, in blocks of rows: a block needs no keys after it.
    prefix = int(segment.prefix_lens)
    out = q.new_empty(q.shape[0], head.q_heads * head.v_dim)
    for begin in range(0, segment.width, step):
        end = min(begin + step, segment.width)
        keys = prefix + (segment.width if head.bidirectional else end)
        # A bidirectional layer sees the rows after the block too.
        first, rows = (0, segment.width) if head.bidirectional else (begin, end - begin)
        mask = None
        if not head.bidirectional or head.window is not None:
            visible = visible_keys(
                torch.tensor([prefix + first]),
                rows,
                max(keys, MIN_KEYS),
                bidirectional=head.bidirectional,
                window=head.window,
            )[:, begin - first : end - first]
            start = 0 if head.window is not None else prefix + begin
            values = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))[:, :, start:]
            mask = Mask(start, values.repeat(1, head.groups, 1).unsqueeze(1))
        keys = max(keys, MIN_KEYS)
        out[begin:end] = _attend_rows(q[begin:end], k[:, :keys], v[:, :keys], 1, mask, head, sinks)
    return out


def _attend_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    requests: int,
    mask: Mask | None,
    head: HeadSpec,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """``attend`` on gathered keys: k, v float32 ``[requests * kv_heads, kv_len, dim]``."""
    g = head.groups
    w = q.shape[0] // requests
    rows = g * w
    queries = q.reshape(requests, w, head.kv_heads, g, head.qk_dim)
    if w > 1:
        queries = queries.permute(0, 2, 3, 1, 4)
    queries = queries.reshape(requests * head.kv_heads, rows, head.qk_dim).float() * head.scale
    if rows < MIN_ROWS:
        queries = torch.constant_pad_nd(queries, (0, 0, 0, MIN_ROWS - rows))
    scores = torch.bmm(queries, k.transpose(1, 2))
    if head.logit_cap > 0:
        scores = scores.div_(head.logit_cap).tanh_().mul_(head.logit_cap)
    if mask is not None:
        shaped = scores.view(requests, head.kv_heads, scores.shape[1], -1)
        shaped[:, :, :rows, mask.start :].add_(mask.values)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True, dtype=torch.float64)
    if sinks is not None:
        total = total + _sink_weights(sinks, top, requests, head, w)
    out = _weighted_sum(weights, v).div_(total)
    if rows < MIN_ROWS:
        out = out[:, :rows]
    out = out.to(q.dtype).reshape(requests, head.kv_heads, g, w, head.v_dim)
    if w > 1:
        out = out.permute(0, 3, 1, 2, 4)
    return out.reshape(requests * w, head.q_heads * head.v_dim)


def _weighted_sum(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``weights @ v``, summed over fixed tiles of keys."""
    keys = v.shape[1]
    if keys <= KEY_TILE:
        return torch.bmm(weights, v)
    out = torch.bmm(weights[:, :, :KEY_TILE], v[:, :KEY_TILE])
    for start in range(KEY_TILE, keys, KEY_TILE):
        out.baddbmm_(weights[:, :, start : start + KEY_TILE], v[:, start : start + KEY_TILE])
    return out


def _sink_weights(
    sinks: torch.Tensor, top: torch.Tensor, requests: int, head: HeadSpec, width: int
) -> torch.Tensor:
    """Softmax weight of each row's sink relative to its largest logit ``top`` ``[.., rows, 1]``."""
    logit = sinks.float().view(head.kv_heads, head.groups, 1).repeat(requests, 1, width).flatten(1)
    if logit.shape[1] < top.shape[1]:
        logit = torch.constant_pad_nd(logit, (0, top.shape[1] - logit.shape[1]))
    return (logit.unsqueeze(-1) - top).double().exp()


def unpack_ancestors(words: torch.Tensor) -> torch.Tensor:
    """Bit-packed ancestor words int32 ``[requests, N, W]`` -> bool ``[requests, N, N]``."""
    nodes = words.shape[1]
    bits = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
    return bits.flatten(2)[:, :, :nodes].bool()
