"""Tree build in one launch: one warp per request runs the best-first search in registers.

The frontier never exceeds two entries per selected node (its first child and its next sibling, which can
only follow it), so it lives in two register vectors with one slot per node, and a pop is one max-reduction
over 64-bit keys. A key holds everything about its candidate: the score's bits, then depth, parent and rank
for the ties, so nothing has to be looked up after the reduction but the parent's score. Keys are unique.

Why not the level-wise sorts of the torch twin: L sorts of W ln W keys cost more than N pops for every
L >= 7 (docs/kernels.md), and the pops need no shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dflash_kernels.tree import DraftTree


@triton.jit
def _gain(logprob, bonus):
    raw = logprob + bonus
    raw = tl.where(raw != raw, float("-inf"), raw)
    return tl.minimum(raw, 0.0)


@triton.jit
def _key(score, depth, parent, rank):
    """Larger is better; -1 for probability zero. Scores are <= 0, so their magnitude bits order them."""
    bits = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tie = (depth << 16) | (parent << 8) | rank
    key = ((0x7F800000 - bits).to(tl.int64) << 24) | (0xFFFFFF - tie).to(tl.int64)
    return tl.where(bits >= 0x7F800000, -1, key)


@triton.jit
def build_tree_kernel(
    anchor_ptr,
    logprobs_ptr,
    ids_ptr,
    bonus_ptr,
    tokens_ptr,
    parents_ptr,
    depth_ptr,
    first_child_ptr,
    next_sibling_ptr,
    ancestors_ptr,
    stride_lp_b,
    stride_lp_l,
    stride_id_b,
    stride_id_l,
    N: tl.constexpr,
    NP: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
    WORDS: tl.constexpr,
    HOPS: tl.constexpr,
    HAS_BONUS: tl.constexpr,
    FORCE_SPINE: tl.constexpr,
):
    b = tl.program_id(0)
    lp = logprobs_ptr + b * stride_lp_b
    node = tl.arange(0, NP)
    zero = tl.zeros([NP], dtype=tl.int32)
    score = tl.zeros([NP], dtype=tl.float32)
    parent = zero
    depth = zero + 1
    rank = zero
    first_child = zero - 1
    next_sibling = zero - 1
    # Slot i holds the first child / the next sibling of node i; -1 is empty, as is a dead candidate.
    child_key = zero.to(tl.int64) - 1
    sibling_key = zero.to(tl.int64) - 1

    count = 1  # nodes so far
    spine_nodes = (node == 0).to(tl.int32)
    if FORCE_SPINE:
        run = tl.sum(tl.where(node == 0, score, 0.0))  # 0.0 as a tensor
        for d in tl.static_range(L):
            bonus = tl.load(bonus_ptr + d) if HAS_BONUS else 0.0
            g = _gain(tl.load(lp + d * stride_lp_l), bonus)
            if K > 1:
                g_next = _gain(tl.load(lp + d * stride_lp_l + 1), bonus)
                key = _key(run + tl.minimum(g, g_next), d + 1, d, 1)
                sibling_key = tl.where(node == d + 1, key, sibling_key)
            run = run + g
            score = tl.where(node == d + 1, run, score)
        on_spine = node <= L
        parent = tl.where(on_spine, node - 1, parent)
        depth = tl.where(on_spine, node, depth)
        first_child = tl.where(node < L, node + 1, first_child)
        count = L + 1
    elif N > 1:
        bonus = tl.load(bonus_ptr) if HAS_BONUS else 0.0
        child_key = tl.where(node == 0, _key(_gain(tl.load(lp), bonus), 1, 0, 0), child_key)

    for i in range(count, N):
        win = tl.max(tl.maximum(child_key, sibling_key), axis=0)
        live = win >= 0
        tie = 0xFFFFFF - (win & 0xFFFFFF).to(tl.int32)
        w_depth = tie >> 16
        w_parent = (tie >> 8) & 0xFF
        w_rank = tie & 0xFF
        w_score = -(0x7F800000 - (win >> 24).to(tl.int32)).to(tl.float32, bitcast=True)

        # What this pop makes reachable: its own first child and its next sibling.
        down = live & (w_depth < L)
        across = live & (w_rank + 1 < K)
        lp_down = tl.load(lp + w_depth * stride_lp_l, mask=down, other=float("-inf"))
        lp_across = tl.load(lp + (w_depth - 1) * stride_lp_l + w_rank + 1, mask=across, other=float("-inf"))
        if HAS_BONUS:
            bonus_down = tl.load(bonus_ptr + w_depth, mask=down, other=0.0)
            bonus_across = tl.load(bonus_ptr + w_depth - 1, mask=live, other=0.0)
        else:
            bonus_down = 0.0
            bonus_across = 0.0
        parent_score = tl.sum(tl.where(node == w_parent, score, 0.0), axis=0)
        # min(own score) is the running minimum over ranks: a sibling never outranks the one before it.
        s_across = tl.minimum(parent_score + _gain(lp_across, bonus_across), w_score)
        s_down = w_score + _gain(lp_down, bonus_down)
        new_sibling = tl.where(across, _key(s_across, w_depth, w_parent, w_rank + 1), -1)
        new_child = tl.where(down, _key(s_down, w_depth + 1, i, 0), -1)

        here = (node == i) & live
        next_sibling = tl.where((sibling_key == win) & live, i, next_sibling)
        first_child = tl.where((node == w_parent) & (w_rank == 0) & live, i, first_child)
        child_key = tl.where(child_key == win, -1, child_key)
        sibling_key = tl.where(sibling_key == win, -1, sibling_key)
        child_key = tl.where(here, new_child, child_key)
        sibling_key = tl.where(here, new_sibling, sibling_key)
        score = tl.where(here, w_score, score)
        parent = tl.where(here, w_parent, parent)
        depth = tl.where(here, w_depth, depth)
        rank = tl.where(here, w_rank, rank)
        if not FORCE_SPINE:
            above = tl.sum(tl.where(node == w_parent, spine_nodes, 0), axis=0)
            spine_nodes = tl.where(here & (w_rank == 0), above, spine_nodes)
        count += live.to(tl.int32)

    parent = tl.where(node == 0, -1, parent)
    depth = tl.where(node == 0, 0, depth)
    used = node < count

    # Pop order becomes node order, save that without a forced spine its nodes move to the front.
    new_id = node
    if not FORCE_SPINE:
        total = tl.sum(spine_nodes, axis=0)
        new_id = tl.where(spine_nodes == 1, depth, node + total - tl.cumsum(spine_nodes, axis=0))
        new_id = tl.where(used, new_id, node)

    up = tl.maximum(parent, 0)
    candidate = (depth - 1) * stride_id_l + rank
    token = tl.load(ids_ptr + b * stride_id_b + candidate, mask=used & (node > 0), other=0)
    token = tl.where(used & (node > 0), token, tl.load(anchor_ptr + b))
    store = node < N
    row = b * N + new_id
    tl.store(tokens_ptr + row, token, mask=store)
    tl.store(depth_ptr + row, depth, mask=store)
    if FORCE_SPINE:
        tl.store(parents_ptr + row, parent, mask=store)
        tl.store(first_child_ptr + row, first_child, mask=store)
        tl.store(next_sibling_ptr + row, next_sibling, mask=store)
    else:
        mapped = tl.gather(new_id, up, 0)
        tl.store(parents_ptr + row, tl.where(parent < 0, -1, mapped), mask=store)
        mapped = tl.gather(new_id, tl.maximum(first_child, 0), 0)
        tl.store(first_child_ptr + row, tl.where(first_child < 0, -1, mapped), mask=store)
        mapped = tl.gather(new_id, tl.maximum(next_sibling, 0), 0)
        tl.store(next_sibling_ptr + row, tl.where(next_sibling < 0, -1, mapped), mask=store)

    for w in tl.static_range(WORDS):
        word = tl.where((new_id >> 5) == w, 1 << (new_id & 31), 0)
        jump = up
        for _ in tl.static_range(HOPS):  # pointer doubling: 1, 2, 4, ... steps up
            word = word | tl.gather(word, jump, 0)
            jump = tl.gather(jump, jump, 0)
        tl.store(ancestors_ptr + row * WORDS + w, word, mask=store)


def build_tree_triton(
    anchor: torch.Tensor,
    topk_logprobs: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    num_nodes: int,
    depth_bonus: torch.Tensor | None = None,
    keep_spine: bool = False,
    out: DraftTree | None = None,
) -> DraftTree:
    """Same contract as `dflash_kernels.build_tree`; L and K at most 255."""
    bs, L, K = topk_logprobs.shape
    logprobs = topk_logprobs.float()
    logprobs = logprobs if logprobs.stride(2) == 1 else logprobs.contiguous()
    ids = topk_ids.long()
    ids = ids if ids.stride(2) == 1 else ids.contiguous()
    bonus = None if depth_bonus is None else depth_bonus.float().contiguous()
    tree = DraftTree.empty(bs, num_nodes, anchor.device) if out is None else out
    build_tree_kernel[(bs,)](
        anchor.long(),
        logprobs,
        ids,
        bonus if bonus is not None else logprobs,
        tree.tokens,
        tree.parents,
        tree.depth,
        tree.first_child,
        tree.next_sibling,
        tree.ancestors,
        logprobs.stride(0),
        logprobs.stride(1),
        ids.stride(0),
        ids.stride(1),
        N=num_nodes,
        NP=max(triton.next_power_of_2(num_nodes), 32),
        L=L,
        K=K,
        WORDS=tree.ancestors.shape[2],
        HOPS=max(L, 1).bit_length(),
        HAS_BONUS=bonus is not None,
        FORCE_SPINE=keep_spine and num_nodes >= L + 1,
        num_warps=1,
    )
    return tree
