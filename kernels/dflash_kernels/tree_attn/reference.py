"""Torch twin of tree attention; the product path on CPU.

Prefixes are gathered once per layer into one padded block, and the softmax runs over prefix and draft block
together: on CPU one fused call beats two passes and a merge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dflash_kernels.tree import ancestor_mask


@dataclass
class TorchPlan:
    """What all layers of one step share.

    Attributes:
        index: int64 [bs * P], cache slots of the prefixes, padded to the longest (P tokens).
        mask: bool [bs, 1, N, P + N], visible keys.
    """

    index: torch.Tensor
    mask: torch.Tensor


def torch_plan(
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    num_nodes: int,
    *,
    ancestors: torch.Tensor | None,
    depth: torch.Tensor | None = None,
    causal: bool = False,
    sliding_window: int = -1,
) -> TorchPlan:
    """Gather index and visibility mask of one step; arguments as in `tree_attention`."""
    N, dev = num_nodes, kv_indptr.device
    start = kv_indptr[:-1].long()
    lens = kv_indptr[1:].long() - start
    bs = lens.shape[0]
    P = int(lens.max()) if bs else 0  # a host read: free on CPU, where this path runs
    pos = torch.arange(P, device=dev)
    # Padding repeats a live row, so that masked keys stay finite: 0 * NaN would spoil the sum.
    last = int(kv_indptr[-1]) - 1
    flat = torch.minimum(
        start[:, None] + torch.minimum(pos, (lens - 1).clamp(min=0)[:, None]), kv_indptr.new_tensor(last)
    )
    index = kv_indices[flat.view(-1)].long() if P else torch.zeros(0, dtype=torch.int64, device=dev)

    node = torch.arange(N, device=dev)
    if ancestors is not None:
        block = ancestor_mask(ancestors, N)
    elif causal:
        block = (node <= node[:, None]).expand(bs, N, N)
    else:
        block = torch.ones(bs, N, N, dtype=torch.bool, device=dev)
    prefix = (pos < lens[:, None])[:, None, :].expand(bs, N, P)
    if sliding_window >= 0:
        at = node.expand(bs, N) if depth is None else depth.long()
        prefix = prefix & ((lens[:, None] + at)[:, :, None] - pos <= sliding_window)
        gap = at[:, :, None] - at[:, None, :]
        if ancestors is None and not causal:
            gap = gap.abs()
        block = block & (gap <= sliding_window)
    return TorchPlan(index=index, mask=torch.cat([prefix, block], 2)[:, None])


def tree_attention_torch(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    *,
    ancestors: torch.Tensor | None,
    sm_scale: float,
    depth: torch.Tensor | None = None,
    causal: bool = False,
    logit_cap: float = 0.0,
    sliding_window: int = -1,
    sinks: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: torch.Tensor | None = None,
    plan: TorchPlan | None = None,
) -> torch.Tensor:
    """Same contract as `dflash_kernels.tree_attention`."""
    bs = kv_indptr.shape[0] - 1
    rows, Hq, Dk = q.shape
    N, Hkv, Dv = rows // bs, k_new.shape[1], v_new.shape[2]
    if plan is None:
        plan = torch_plan(
            kv_indptr,
            kv_indices,
            N,
            ancestors=ancestors,
            depth=depth,
            causal=causal,
            sliding_window=sliding_window,
        )
    k = _keys(k_cache, k_new, plan.index, bs, N, k_scale)
    v = _keys(v_cache, v_new, plan.index, bs, N, v_scale)
    qh = q.view(bs, N, Hq, Dk).transpose(1, 2)
    if logit_cap > 0 or sinks is not None:
        o = _softmax_with_extras(qh, k, v, plan.mask, sm_scale, logit_cap, sinks)
    else:
        o = torch.nn.functional.scaled_dot_product_attention(
            qh, k, v, attn_mask=plan.mask, scale=sm_scale, enable_gqa=Hq != Hkv
        )
    o = o.transpose(1, 2)
    if out is None:
        return o.reshape(rows, Hq, Dv)
    out.view(bs, N, Hq, Dv).copy_(o)
    return out


def _keys(
    cache: torch.Tensor, new: torch.Tensor, index: torch.Tensor, bs: int, N: int, scale: float
) -> torch.Tensor:
    """Prefix rows and draft rows as [bs, Hkv, P + N, D] in the draft rows' dtype."""
    tail = new.view(bs, N, *new.shape[1:])
    if index.numel() == 0:
        return tail.transpose(1, 2)
    if cache.element_size() == 1:
        rows = cache.view(torch.uint8).index_select(0, index).view(cache.dtype)
    else:
        rows = cache.index_select(0, index)
    if scale != 1.0:
        rows = rows.float() * scale
    head = rows.to(new.dtype).view(bs, -1, *new.shape[1:])
    return torch.cat([head, tail], 1).transpose(1, 2)


def _softmax_with_extras(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    sm_scale: float,
    logit_cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Soft-capped attention with sinks in float32, for what the fused call does not offer."""
    bs, Hq, N, _ = q.shape
    Hkv = k.shape[1]
    grouped = q.float().reshape(bs, Hkv, Hq // Hkv * N, -1)
    score = (grouped @ k.float().transpose(2, 3) * sm_scale).view(bs, Hq, N, -1)
    if logit_cap > 0:
        score = logit_cap * torch.tanh(score / logit_cap)
    score = score.masked_fill(~mask, float("-inf"))
    top = score.amax(3, keepdim=True)
    if sinks is not None:
        sink = sinks.float().view(1, Hq, 1, 1)
        top = torch.maximum(top, sink)
    weight = (score - top).exp()
    total = weight.sum(3, keepdim=True)
    if sinks is not None:
        total = total + (sink - top).exp()
    weight = (weight / total).view(bs, Hkv, Hq // Hkv * N, -1)
    return (weight @ v.float()).view(bs, Hq, N, -1).to(q.dtype)
