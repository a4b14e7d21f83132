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
from dflash_kernels.tree_build import Chain

# What follows the step's width is no constant of the machine code, or every width would be compiled.
STRIDES = ("stride_lp_b", "stride_lp_l", "stride_id_b", "stride_id_l")


@triton.jit
def gain_of(logprob, bonus):
    raw = logprob + bonus
    raw = tl.where(raw != raw, float("-inf"), raw)
    return tl.minimum(raw, 0.0)


@triton.jit
def key_of(score, depth, parent, rank):
    """Larger is better; -1 for probability zero. Scores are <= 0, so their magnitude bits order them."""
    bits = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tie = (depth << 16) | (parent << 8) | rank
    key = ((0x7F800000 - bits).to(tl.int64) << 24) | (0xFFFFFF - tie).to(tl.int64)
    return tl.where(bits >= 0x7F800000, -1, key)


@triton.jit
def write_tree(
    b, new_id, token, parent, depth, first_child, next_sibling,
    tokens_ptr, parents_ptr, depth_ptr, first_child_ptr, next_sibling_ptr, ancestors_ptr,
    N, NP: tl.constexpr, WORDS: tl.constexpr, HOPS: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Stores node i as node new_id[i]; IN_PLACE says that these are the same."""
    node = tl.arange(0, NP)
    up = tl.maximum(parent, 0)
    store = node < N
    row = b * N + new_id
    tl.store(tokens_ptr + row, token, mask=store)
    tl.store(depth_ptr + row, depth, mask=store)
    if IN_PLACE:
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


@triton.jit
def spine_first(spine_nodes, depth, count, NP: tl.constexpr):
    """New ids: nodes of the spine have their depth, the others follow in their order."""
    node = tl.arange(0, NP)
    total = tl.sum(spine_nodes, axis=0)
    new_id = tl.where(spine_nodes == 1, depth, node + total - tl.cumsum(spine_nodes, axis=0))
    return tl.where(node < count, new_id, node)


@triton.jit(do_not_specialize=[*STRIDES, "N", "L"])
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
    N,
    L,
    NP: tl.constexpr,
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
        for d in range(L):
            bonus = tl.load(bonus_ptr + d) if HAS_BONUS else 0.0
            g = gain_of(tl.load(lp + d * stride_lp_l), bonus)
            if K > 1:
                g_next = gain_of(tl.load(lp + d * stride_lp_l + 1), bonus)
                key = key_of(run + tl.minimum(g, g_next), d + 1, d, 1)
                sibling_key = tl.where(node == d + 1, key, sibling_key)
            run = run + g
            score = tl.where(node == d + 1, run, score)
        on_spine = node <= L
        parent = tl.where(on_spine, node - 1, parent)
        depth = tl.where(on_spine, node, depth)
        first_child = tl.where(node < L, node + 1, first_child)
        count = L + 1
    else:
        bonus = tl.load(bonus_ptr, mask=L > 0, other=0.0) if HAS_BONUS else 0.0
        gain = gain_of(tl.load(lp, mask=L > 0, other=float("-inf")), bonus)
        child_key = tl.where(node == 0, key_of(gain, 1, 0, 0), child_key)

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
        s_across = tl.minimum(parent_score + gain_of(lp_across, bonus_across), w_score)
        s_down = w_score + gain_of(lp_down, bonus_down)
        new_sibling = tl.where(across, key_of(s_across, w_depth, w_parent, w_rank + 1), -1)
        new_child = tl.where(down, key_of(s_down, w_depth + 1, i, 0), -1)

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
        new_id = spine_first(spine_nodes, depth, count, NP)

    candidate = (depth - 1) * stride_id_l + rank
    token = tl.load(ids_ptr + b * stride_id_b + candidate, mask=used & (node > 0), other=0)
    token = tl.where(used & (node > 0), token, tl.load(anchor_ptr + b))
    write_tree(
        b, new_id, token, parent, depth, first_child, next_sibling,
        tokens_ptr, parents_ptr, depth_ptr, first_child_ptr, next_sibling_ptr, ancestors_ptr,
        N, NP, WORDS, HOPS, FORCE_SPINE,
    )  # fmt: skip


def hops(depth: int) -> int:
    """Doublings of a step that reach a root this far up: one of two numbers, each compiled once."""
    return 4 if depth < 16 else 7


def build_tree_triton(
    anchor: torch.Tensor,
    topk_logprobs: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    num_nodes: int,
    depth_bonus: torch.Tensor | None = None,
    keep_spine: bool = False,
    edges: torch.Tensor | None = None,
    chain: Chain | None = None,
    out: DraftTree | None = None,
) -> DraftTree:
    """Same contract as `dflash_kernels.build_tree`."""
    bs, L, K = topk_logprobs.shape
    logprobs = _rows(topk_logprobs.float())
    ids = _rows(topk_ids.long())
    bonus = None if depth_bonus is None else depth_bonus.float().contiguous()
    tree = DraftTree.empty(bs, num_nodes, anchor.device) if out is None else out
    fields = (
        tree.tokens,
        tree.parents,
        tree.depth,
        tree.first_child,
        tree.next_sibling,
        tree.ancestors,
    )
    strides = (logprobs.stride(0), logprobs.stride(1), ids.stride(0), ids.stride(1))
    constants = {
        "NP": max(triton.next_power_of_2(num_nodes), 32),
        "K": K,
        "WORDS": tree.ancestors.shape[2],
        "HAS_BONUS": bonus is not None,
        "FORCE_SPINE": keep_spine and num_nodes >= L + 1,
        "num_warps": 1,
    }
    bonus = logprobs if bonus is None else bonus
    if edges is None and chain is None:
        build_tree_kernel[(bs,)](
            anchor.long(), logprobs, ids, bonus, *fields, *strides, num_nodes, L, HOPS=hops(L), **constants
        )
        return tree
    from dflash_kernels.tree_build.lattice_kernel import build_lattice_kernel

    rows = logprobs if edges is None else _rows(edges.float())
    chain_ids = ids if chain is None else _rows(chain.ids.long())
    chain_logprobs = logprobs if chain is None else _rows(chain.logprobs.float())
    D = 0 if chain is None else min(chain_ids.shape[1], num_nodes - 1)
    build_lattice_kernel[(bs,)](
        anchor.long(),
        logprobs,
        ids,
        bonus,
        rows,
        chain_ids,
        chain_logprobs,
        *fields,
        *strides,
        rows.stride(0),
        rows.stride(1),
        rows.stride(2),
        chain_ids.stride(0),
        chain_logprobs.stride(0),
        num_nodes,
        L,
        D,
        KP=max(triton.next_power_of_2(K), 32),
        HOPS=hops(max(L, D)),
        HAS_EDGES=edges is not None,
        HAS_CHAIN=chain is not None,
        **constants,
    )
    return tree


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
