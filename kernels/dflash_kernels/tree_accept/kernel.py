"""Accept walk in one launch: one warp per request holds the whole tree in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dflash_kernels.tree import DraftTree
from dflash_kernels.tree_accept import Accepted


@triton.jit(do_not_specialize=["stride_target_b", "N", "D"])
def accept_tree_kernel(
    tokens_ptr,
    parents_ptr,
    first_child_ptr,
    next_sibling_ptr,
    target_ptr,
    prefix_lens_ptr,
    accept_lens_ptr,
    path_ptr,
    out_tokens_ptr,
    bonus_ptr,
    new_lens_ptr,
    stride_target_b,
    N,
    D,
    NP: tl.constexpr,
    DP: tl.constexpr,
):
    b = tl.program_id(0)
    node = tl.arange(0, NP)
    inside = node < N
    target = target_ptr + b * stride_target_b
    token = tl.load(tokens_ptr + b * N + node, mask=inside, other=-1)
    parent = tl.load(parents_ptr + b * N + node, mask=inside, other=-1)
    sibling = tl.load(next_sibling_ptr + b * N + node, mask=inside, other=-1)
    has_child = tl.load(first_child_ptr + b * N) >= 0
    wanted = tl.load(target + tl.maximum(parent, 0), mask=inside, other=-2)

    # Padding nodes name the root as parent but nothing links to them; the root's children have ascending
    # ids, so its last child is the first one without a next sibling.
    of_root = inside & (parent == 0)
    last = tl.min(tl.where(of_root & (sibling < 0), node, NP), axis=0)
    linked = (parent > 0) | (of_root & has_child & (node <= last))
    enter = linked & (token == wanted)

    step = tl.arange(0, DP)
    path = tl.where(step == 0, 0, -1)
    cur = tl.min(node, axis=0)  # 0 as a tensor
    length = cur + 1
    for d in range(1, D):
        nxt = tl.min(tl.where(enter & (parent == cur), node, NP), axis=0)
        found = nxt < NP
        path = tl.where((step == d) & found, nxt, path)
        length += found.to(tl.int32)
        cur = tl.where(found, nxt, NP)  # no node has this parent: the walk stays stopped

    out = tl.load(target + tl.maximum(path, 0), mask=path >= 0, other=0)
    tl.store(path_ptr + b * D + step, path, mask=step < D)
    tl.store(out_tokens_ptr + b * D + step, out, mask=step < D)
    tl.store(accept_lens_ptr + b, length)
    tl.store(bonus_ptr + b, tl.sum(tl.where(step == length - 1, out, 0), axis=0))
    tl.store(new_lens_ptr + b, tl.load(prefix_lens_ptr + b) + length)


def accept_tree_triton(
    tree: DraftTree,
    target_tokens: torch.Tensor,
    prefix_lens: torch.Tensor,
    *,
    max_depth: int,
    out: Accepted | None = None,
) -> Accepted:
    """Same contract as `dflash_kernels.accept_tree`; relies on `DraftTree`'s ascending child ids."""
    bs, N = tree.tokens.shape
    if target_tokens.stride(1) != 1:
        target_tokens = target_tokens.contiguous()
    if out is None:
        out = Accepted.empty(bs, max_depth, target_tokens.device, prefix_lens.dtype)
    D = max_depth + 1
    accept_tree_kernel[(bs,)](
        tree.tokens,
        tree.parents,
        tree.first_child,
        tree.next_sibling,
        target_tokens,
        prefix_lens,
        out.accept_lens,
        out.path,
        out.out_tokens,
        out.bonus,
        out.new_lens,
        target_tokens.stride(0),
        N,
        D,
        NP=max(triton.next_power_of_2(N), 32),
        DP=triton.next_power_of_2(D),
        num_warps=1,
    )
    return out
