"""Tree build in one launch where a parent ranks its own children or a chain runs beside them.

The search is that of `kernel.py` with two differences. A node's next child is looked for when it is wanted,
by one reduction over the K candidates of its parent's row, so no row is ever sorted and at most one drafted
child of a node is waiting. And the chain's next node waits in a key of its own: it is one path, so there is
never a second.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dflash_kernels.tree_build.kernel import STRIDES, gain_of, key_of, spine_first, write_tree

_STRIDES = ("stride_ed_b", "stride_ed_l", "stride_ed_p", "stride_ci_b", "stride_cl_b")


@triton.jit
def _next_child(
    lp, edges, bonus_ptr, depth, row, after, skip, stride_lp_l, stride_ed_l, stride_ed_p,
    L, K: tl.constexpr, KP: tl.constexpr,
    HAS_BONUS: tl.constexpr, HAS_EDGES: tl.constexpr, HAS_CHAIN: tl.constexpr,
):  # fmt: skip
    """The drafted child of a node of `depth` that follows candidate `after` (-1: the first) without `skip`.

    Returns its gain and candidate; -inf and something from K on where there is none.
    """
    c = tl.arange(0, KP)
    inside = (c < K) & (depth < L)
    bonus = tl.load(bonus_ptr + depth, mask=depth < L, other=0.0) if HAS_BONUS else 0.0
    if HAS_EDGES:
        at = edges + depth * stride_ed_l + row * stride_ed_p + c
        if HAS_CHAIN:  # row K: the parent is no candidate
            raw = tl.load(at, mask=inside & (row < K), other=float("-inf"))
            own = tl.load(lp + depth * stride_lp_l + c, mask=inside & (row >= K), other=float("-inf"))
            raw = tl.where(row < K, raw, own)
        else:
            raw = tl.load(at, mask=inside, other=float("-inf"))
        raw = tl.where(raw != raw, float("-inf"), raw)
        # The order is value descending, then candidate ascending.
        last = tl.max(tl.where(c == after, raw, float("-inf")), axis=0)
        behind = (raw < last) | ((raw == last) & (c > after)) | (after < 0)
        left = inside & behind & (c != skip)
        best = tl.max(tl.where(left, raw, float("-inf")), axis=0)
        child = tl.min(tl.where(left & (raw == best), c, KP), axis=0)
        gain = gain_of(best, bonus)
    else:
        raw = tl.load(lp + depth * stride_lp_l + c, mask=inside, other=float("-inf"))
        child = after + 1
        if HAS_CHAIN:
            child += (child == skip).to(tl.int32)
        # A rank counts as at most as likely as the one before it.
        gain = tl.min(tl.where(c <= child, gain_of(raw, bonus), 0.0), axis=0)
    return tl.where((child < K) & (depth < L), gain, float("-inf")), child


@triton.jit
def _next_of_chain(
    chain_ids, chain_lp, ids, depth, stride_id_l,
    L, K: tl.constexpr, KP: tl.constexpr, D,
):  # fmt: skip
    """Below the chain's node of `depth`: the next one's gain, and the candidate with its token (K: none)."""
    gain = gain_of(tl.load(chain_lp + depth, mask=depth < D, other=float("-inf")), 0.0)
    token = tl.load(chain_ids + depth, mask=depth < D, other=-1)
    token = tl.where(gain > float("-inf"), token, -1)
    c = tl.arange(0, KP)
    inside = (c < K) & (depth < L)
    own = tl.load(ids + depth * stride_id_l + c, mask=inside, other=-2)
    same = tl.min(tl.where(own == token, c, K), axis=0)
    return gain, same


@triton.jit(do_not_specialize=[*STRIDES, *_STRIDES, "N", "L", "D"])
def build_lattice_kernel(
    anchor_ptr,
    logprobs_ptr,
    ids_ptr,
    bonus_ptr,
    edges_ptr,
    chain_ids_ptr,
    chain_logprobs_ptr,
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
    stride_ed_b,
    stride_ed_l,
    stride_ed_p,
    stride_ci_b,
    stride_cl_b,
    N,
    L,
    D,
    NP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    WORDS: tl.constexpr,
    HOPS: tl.constexpr,
    HAS_BONUS: tl.constexpr,
    HAS_EDGES: tl.constexpr,
    HAS_CHAIN: tl.constexpr,
    FORCE_SPINE: tl.constexpr,
):
    b = tl.program_id(0)
    lp = logprobs_ptr + b * stride_lp_b
    ids = ids_ptr + b * stride_id_b
    edges = edges_ptr + b * stride_ed_b
    chain_ids = chain_ids_ptr + b * stride_ci_b
    chain_lp = chain_logprobs_ptr + b * stride_cl_b
    node = tl.arange(0, NP)
    zero = tl.zeros([NP], dtype=tl.int32)
    score = tl.zeros([NP], dtype=tl.float32)
    parent = zero
    depth = zero + 1
    # The candidate a node is, K for none. `skip` is the one that stands in the chain's child below it.
    candidate = zero
    skip = zero + K
    recalled = zero
    first_child = zero - 1
    next_sibling = zero - 1
    last_child = zero - 1
    # Slot i holds the first drafted child / the next drafted sibling of node i; -1 is empty.
    child_key = zero.to(tl.int64) - 1
    sibling_key = zero.to(tl.int64) - 1

    # Of the node whose children are looked for, as tensors.
    row = tl.min(zero, axis=0)
    run = tl.min(score, axis=0)
    on_chain = row == 0
    # The chain's next node, if it waits, and the candidate with its token.
    chain_key = row.to(tl.int64) - 1
    chain_same = row + K

    # The kept spine from the root down, or the root alone.
    for d in range(L + 1 if FORCE_SPINE else 1):
        same = row * 0 + K
        goes_on = row < 0
        chain_run = run
        if HAS_CHAIN:
            chain_gain, found = _next_of_chain(chain_ids, chain_lp, ids, d, stride_id_l, L, K, KP, D)
            goes_on = on_chain & (chain_gain > float("-inf"))
            chain_run = run + chain_gain
            same = tl.where(goes_on, found, K)
            skip = tl.where(node == d, same, skip)
        gain, child = _next_child(
            lp, edges, bonus_ptr, d, row, -1, same, stride_lp_l, stride_ed_l, stride_ed_p,
            L, K, KP, HAS_BONUS, HAS_EDGES, HAS_CHAIN,
        )  # fmt: skip
        best = run + gain
        key = key_of(best, d + 1, d, child + 1)
        if FORCE_SPINE:
            inside = d < L
            take_chain = goes_on & (chain_run >= best) & inside
            take_child = (take_chain == 0) & inside
            gain, after = _next_child(
                lp, edges, bonus_ptr, d, row, child, same, stride_lp_l, stride_ed_l, stride_ed_p,
                L, K, KP, HAS_BONUS, HAS_EDGES, HAS_CHAIN,
            )  # fmt: skip
            across = tl.where(take_child, key_of(run + gain, d + 1, d, after + 1), -1)
            sibling_key = tl.where(node == d + 1, across, sibling_key)
            key = tl.where(take_child, -1, key)
            waits = goes_on & (take_chain == 0)
            on_chain = take_chain
        else:
            waits = goes_on
        child_key = tl.where(node == d, key, child_key)
        chain_key = tl.where(waits, key_of(chain_run, d + 1, d, 0), chain_key)
        chain_same = tl.where(waits, same, chain_same)
        if FORCE_SPINE:
            run = tl.where(take_chain, chain_run, best)
            row = tl.where(take_chain, same, child)
            below = (node == d + 1) & inside
            score = tl.where(below, run, score)
            candidate = tl.where(below, row, candidate)
            recalled = tl.where(below, take_chain.to(tl.int32), recalled)

    spine_nodes = (node == 0).to(tl.int32)
    count = 1
    if FORCE_SPINE:
        kept = node <= L
        parent = tl.where(kept, node - 1, parent)
        depth = tl.where(kept, node, depth)
        first_child = tl.where(node < L, node + 1, first_child)
        last_child = first_child
        count = L + 1

    for i in range(count, N):
        win = tl.max(tl.maximum(child_key, sibling_key), axis=0)
        of_chain = chain_key > win
        win = tl.maximum(win, chain_key)
        live = win >= 0
        tie = 0xFFFFFF - (win & 0xFFFFFF).to(tl.int32)
        w_depth = tie >> 16
        w_parent = (tie >> 8) & 0xFF
        w_candidate = tl.where(of_chain, chain_same, (tie & 0xFF) - 1)
        w_score = -(0x7F800000 - (win >> 24).to(tl.int32)).to(tl.float32, bitcast=True)
        is_parent = node == w_parent
        parent_score = tl.sum(tl.where(is_parent, score, 0.0), axis=0)
        packed = candidate | (skip << 8) | ((last_child + 1) << 16)
        packed = tl.sum(tl.where(is_parent, packed, 0), axis=0)
        w_before = (packed >> 16) - 1

        # What this pop makes reachable: the next drafted sibling, the chain's next node, the first child.
        at = tl.where(live & (of_chain == 0), w_depth - 1, L)
        gain, child = _next_child(
            lp, edges, bonus_ptr, at, packed & 0xFF, w_candidate, (packed >> 8) & 0xFF,
            stride_lp_l, stride_ed_l, stride_ed_p, L, K, KP, HAS_BONUS, HAS_EDGES, HAS_CHAIN,
        )  # fmt: skip
        new_sibling = key_of(parent_score + gain, w_depth, w_parent, child + 1)
        same = chain_same * 0 + K
        if HAS_CHAIN:
            at = tl.where(live & of_chain, w_depth, D)
            gain, same = _next_of_chain(chain_ids, chain_lp, ids, at, stride_id_l, L, K, KP, D)
            chain_key = tl.where(of_chain, key_of(w_score + gain, w_depth + 1, i, 0), chain_key)
            chain_same = tl.where(of_chain, same, chain_same)
        gain, child = _next_child(
            lp, edges, bonus_ptr, tl.where(live, w_depth, L), w_candidate, -1, same,
            stride_lp_l, stride_ed_l, stride_ed_p, L, K, KP, HAS_BONUS, HAS_EDGES, HAS_CHAIN,
        )  # fmt: skip
        new_child = key_of(w_score + gain, w_depth + 1, i, child + 1)

        here = (node == i) & live
        is_parent = is_parent & live
        next_sibling = tl.where((node == w_before) & live, i, next_sibling)
        first_child = tl.where(is_parent & (w_before < 0), i, first_child)
        last_child = tl.where(is_parent, i, last_child)
        child_key = tl.where(child_key == win, -1, child_key)
        sibling_key = tl.where(sibling_key == win, -1, sibling_key)
        child_key = tl.where(here, new_child, child_key)
        sibling_key = tl.where(here, new_sibling, sibling_key)
        score = tl.where(here, w_score, score)
        parent = tl.where(here, w_parent, parent)
        depth = tl.where(here, w_depth, depth)
        candidate = tl.where(here, w_candidate, candidate)
        skip = tl.where(here, same, skip)
        recalled = tl.where(here, of_chain.to(tl.int32), recalled)
        if not FORCE_SPINE:
            above = tl.sum(tl.where(is_parent, spine_nodes, 0), axis=0)
            spine_nodes = tl.where(here & (w_before < 0), above, spine_nodes)
        count += live.to(tl.int32)

    parent = tl.where(node == 0, -1, parent)
    depth = tl.where(node == 0, 0, depth)
    real = (node < count) & (node > 0)
    new_id = node
    if not FORCE_SPINE:
        new_id = spine_first(spine_nodes, depth, count, NP)
    token = tl.load(anchor_ptr + b) + zero.to(tl.int64)
    drafted = tl.load(ids + (depth - 1) * stride_id_l + candidate, mask=real & (recalled == 0), other=0)
    token = tl.where(real & (recalled == 0), drafted, token)
    if HAS_CHAIN:
        own = tl.load(chain_ids + depth - 1, mask=real & (recalled == 1), other=0)
        token = tl.where(real & (recalled == 1), own, token)
    write_tree(
        b, new_id, token, parent, depth, first_child, next_sibling,
        tokens_ptr, parents_ptr, depth_ptr, first_child_ptr, next_sibling_ptr, ancestors_ptr,
        N, NP, WORDS, HOPS, FORCE_SPINE,
    )  # fmt: skip
