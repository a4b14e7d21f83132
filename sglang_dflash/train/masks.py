"""Attention of many draft blocks over packed documents: who may see what, three ways to run it.

A row of a batch holds one or more packed documents (T tokens) and A draft blocks of B slots.
A block sees the features of its own document strictly before its anchor, and its own slots in
both directions; never another block, another document, or its own future. (At draft time the
target has not yet seen the anchor's token, so the anchor has an embedding but no feature.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional as F


@dataclass
class Layout:
    """Geometry of one batch.

    anchor: [R, A] int64, row index of each block's anchor token
    document: [R, T] int64, document number of each context token (-1: padding)
    position: [R, T] int64, position of each token inside its document
    block: B, slots per block
    how: "split" (default), "dense" or "flex"
    """

    anchor: torch.Tensor
    document: torch.Tensor
    position: torch.Tensor
    block: int
    how: str = "split"

    def to(self, device: str) -> Layout:
        """The same geometry on ``device``."""
        anchor, document, position = (t.to(device) for t in (self.anchor, self.document, self.position))
        return Layout(anchor, document, position, self.block, self.how)

    @property
    def context_positions(self) -> torch.Tensor:
        return self.position

    @cached_property
    def block_positions(self) -> torch.Tensor:
        """[R, A, B] position of each slot inside its document."""
        start = self.position.gather(1, self.anchor)
        return start[..., None] + torch.arange(self.block, device=start.device)

    @cached_property
    def context_visible(self) -> torch.Tensor:
        """[R, A, T] bool: which context tokens the blocks of each anchor see."""
        tokens = torch.arange(self.document.shape[1], device=self.anchor.device)
        before = tokens[None, None] < self.anchor[..., None]
        own = self.document[:, None] == self.document.gather(1, self.anchor)[..., None]
        return before & own

    @cached_property
    def flex_mask(self):
        """FlexAttention block mask over queries [A * B] and keys [T + A * B]."""
        from torch.nn.attention.flex_attention import create_block_mask

        (R, A), T, B = self.anchor.shape, self.document.shape[1], self.block
        anchor, document = self.anchor, self.document
        anchor_document = document.gather(1, anchor)

        def allowed(row, _head, query, key):
            block = query // B
            token = key.clamp(max=T - 1)
            context = (key < anchor[row, block]) & (document[row, token] == anchor_document[row, block])
            own = (key - T) // B == block
            return torch.where(key < T, context, own)

        return create_block_mask(allowed, R, None, A * B, T + A * B, device=str(anchor.device))


def _grouped(q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[R, A, B, heads, D] -> [R, kv_heads, group, A * B, D]."""
    R, A, B, heads, D = q.shape
    return q.reshape(R, A * B, kv_heads, heads // kv_heads, D).permute(0, 2, 3, 1, 4)


def _split(q, past_k, past_v, block_k, block_v, layout: Layout) -> torch.Tensor:
    """Two score matrices (context, own block), one softmax: no work for other blocks' keys."""
    R, A, B, heads, D = q.shape
    kv, T = past_k.shape[2], past_k.shape[1]
    group = heads // kv
    scale = D**-0.5
    # [R, kv, group * A * B, D] x [R, kv, D, T]
    rows = _grouped(q, kv).reshape(R, kv, group * A * B, D)
    context = torch.matmul(rows, past_k.permute(0, 2, 3, 1)).view(R, kv, group, A, B, T)
    # Own block: [R, A, kv, group * B, D] x [R, A, kv, D, B]
    local = q.reshape(R, A, B, kv, group, D).permute(0, 1, 3, 4, 2, 5).reshape(R, A, kv, group * B, D)
    own = torch.matmul(local, block_k.permute(0, 1, 3, 4, 2)).view(R, A, kv, group, B, B)
    own = own.permute(0, 2, 3, 1, 4, 5)
    hidden = ~layout.context_visible[:, None, None, :, None, :]
    scores = torch.cat([context.masked_fill(hidden, float("-inf")), own], dim=-1).float() * scale
    weights = scores.softmax(-1).to(q.dtype)
    w_context = weights[..., :T].reshape(R, kv, group * A * B, T)
    out = torch.matmul(w_context, past_v.transpose(1, 2)).view(R, kv, group, A, B, D)
    w_own = weights[..., T:].permute(0, 3, 1, 2, 4, 5).reshape(R, A, kv, group * B, B)
    mine = torch.matmul(w_own, block_v.transpose(2, 3)).view(R, A, kv, group, B, D)
    out = out + mine.permute(0, 2, 3, 1, 4, 5)
    return out.permute(0, 3, 4, 1, 2, 5).reshape(R, A, B, heads, D)


def dense_mask(layout: Layout) -> torch.Tensor:
    """[R, A * B, T + A * B] bool, the mask written out (the reference of the other two ways)."""
    R, A = layout.anchor.shape
    B, T = layout.block, layout.document.shape[1]
    context = layout.context_visible[:, :, None].expand(R, A, B, T).reshape(R, A * B, T)
    block = torch.arange(A * B, device=layout.anchor.device) // B
    own = (block[:, None] == block[None]).expand(R, A * B, A * B)
    return torch.cat([context, own], dim=-1)


def block_attention(q, past_k, past_v, block_k, block_v, layout: Layout) -> torch.Tensor:
    """Attention output [R, A, B, heads, D].

    q: [R, A, B, heads, D]; past_k, past_v: [R, T, kv_heads, D]; block_k, block_v: [R, A, B, kv_heads, D]
    """
    if layout.how == "split":
        return _split(q, past_k, past_v, block_k, block_v, layout)
    R, A, B, heads, D = q.shape
    group = heads // past_k.shape[2]
    queries = q.reshape(R, A * B, heads, D).transpose(1, 2)
    k, v = (
        torch.cat([past, block.flatten(1, 2)], dim=1).transpose(1, 2).repeat_interleave(group, 1)
        for past, block in ((past_k, block_k), (past_v, block_v))
    )
    if layout.how == "dense":
        out = F.scaled_dot_product_attention(queries, k, v, attn_mask=dense_mask(layout)[:, None])
    else:
        from torch.nn.attention.flex_attention import flex_attention

        run = torch.compile(flex_attention) if queries.is_cuda else flex_attention
        out = run(queries, k, v, block_mask=layout.flex_mask)
    return out.transpose(1, 2).reshape(R, A, B, heads, D)
