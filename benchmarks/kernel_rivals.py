"""Tree attention problems on a paged cache, and every implementation that can answer them.

Each rival is a function `make(problem) -> call`: set-up (plans, masks, dense copies) happens in `make` and is
not timed, which favours the rivals. A rival that cannot run raises `UnavailableError` with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from dflash_kernels import DraftTree, TreeAttentionWorkspace, ancestor_mask, build_tree, tree_attention

Call = Callable[[], torch.Tensor]


class UnavailableError(Exception):
    """Why a rival has no number, in one line."""


@dataclass(frozen=True)
class Heads:
    """Attention shape of one layer of a model."""

    name: str
    q: int
    kv: int
    dim: int


LLAMA = Heads("Llama-3-8B, Qwen3-8B", 32, 8, 128)
QWEN_MOE = Heads("Qwen3-30B-A3B", 32, 4, 128)


def draft_tree(bs: int, nodes: int, device: str, positions: int = 15, candidates: int = 16) -> DraftTree:
    """A built tree over random candidates: the masks that serving sees, not random graphs."""
    logprobs = (2.0 * torch.randn(bs, positions, 512, device=device)).log_softmax(-1)
    top = logprobs.topk(candidates, dim=-1)
    return build_tree(
        torch.zeros(bs, dtype=torch.int64, device=device), top.values, top.indices, num_nodes=nodes
    )


class Problem:
    """`bs` requests of `ctx` cached tokens on scattered slots, and a tree of N nodes each."""

    def __init__(self, heads: Heads, bs: int, ctx: int, nodes: int, kv: str, device: str) -> None:
        dtype = torch.bfloat16
        self.heads, self.bs, self.ctx, self.nodes, self.device = heads, bs, ctx, nodes, device
        self.kv_dtype = torch.float8_e4m3fn if kv == "fp8" else dtype
        self.sm_scale = 1.0 / math.sqrt(heads.dim)
        total = bs * (ctx + nodes)
        slots = torch.randperm(total, device=device)
        self.new_slots = slots[bs * ctx :]
        self.kv_indices = slots[: bs * ctx].contiguous()
        self.kv_indptr = torch.arange(0, bs * ctx + 1, ctx, dtype=torch.int32, device=device)
        shape = (total, heads.kv, heads.dim)
        self.k_cache = torch.randn(shape, dtype=dtype, device=device).to(self.kv_dtype)
        self.v_cache = torch.randn(shape, dtype=dtype, device=device).to(self.kv_dtype)
        self.q = torch.randn(bs * nodes, heads.q, heads.dim, dtype=dtype, device=device)
        self.k_new = torch.randn(bs * nodes, heads.kv, heads.dim, dtype=dtype, device=device)
        self.v_new = torch.randn_like(self.k_new)
        self.k_cache[self.new_slots] = self.k_new.to(self.kv_dtype)
        self.v_cache[self.new_slots] = self.v_new.to(self.kv_dtype)
        self.tree = draft_tree(bs, nodes, device)

    @staticmethod
    def bytes_needed(heads: Heads, bs: int, ctx: int, nodes: int, kv: str) -> int:
        """Device memory of the tensors above, with room for one dense copy and a byte mask."""
        row = 2 * heads.kv * heads.dim * (1 if kv == "fp8" else 2)
        return 3 * bs * (ctx + nodes) * row + 2 * bs * nodes * (ctx + nodes)

    @property
    def kv_bytes(self) -> int:
        """Bytes of cached keys and values, each read once: the floor of the prefix pass."""
        return self.bs * self.ctx * self.heads.kv * self.heads.dim * 2 * self.kv_dtype.itemsize

    def full_mask(self) -> torch.Tensor:
        """bool [bs, N, ctx + N]: the prefix, then the tree."""
        block = ancestor_mask(self.tree.ancestors, self.nodes)
        prefix = torch.ones(self.bs, self.nodes, self.ctx, dtype=torch.bool, device=self.device)
        return torch.cat([prefix, block], 2)


def ours(p: Problem) -> Call:
    """This package, with the workspace that the server would hold."""
    out = torch.empty_like(p.q)
    workspace = None
    if p.device == "cuda":
        workspace = TreeAttentionWorkspace(p.bs, (p.nodes,), p.heads.q, p.heads.kv, p.heads.dim, p.device)
    return lambda: tree_attention(
        p.q, p.k_new, p.v_new, p.k_cache, p.v_cache, p.kv_indptr, p.kv_indices,
        ancestors=p.tree.ancestors, depth=p.tree.depth, sm_scale=p.sm_scale, out=out, workspace=workspace,
    )  # fmt: skip


def sglang(p: Problem) -> Call:
    """SGLang's Triton verify: `extend_attention_fwd` with its byte mask (prefix part not read)."""
    try:
        from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd
    except ImportError as error:
        raise UnavailableError(f"sglang: {error}") from None
    out = torch.empty_like(p.q)
    mask = p.full_mask().reshape(-1)
    per_request = p.nodes * (p.ctx + p.nodes)
    ints = {"dtype": torch.int64, "device": p.device}
    mask_indptr = torch.arange(0, p.bs + 1, **ints) * per_request
    qo_indptr = (torch.arange(0, p.bs + 1, **ints) * p.nodes).int()

    def call() -> torch.Tensor:
        extend_attention_fwd(
            p.q, p.k_new, p.v_new, out, p.k_cache, p.v_cache, qo_indptr, p.kv_indptr, p.kv_indices,
            mask, True, mask_indptr, p.nodes, 1.0, 1.0, p.sm_scale,
        )  # fmt: skip
        return out

    return call


def flashinfer(p: Problem) -> Call:
    """FlashInfer's paged prefill with a custom mask, page size 1, planned once."""
    try:
        import flashinfer as fi
    except ImportError:
        raise UnavailableError("flashinfer is not installed") from None
    if p.kv_dtype.itemsize == 1:
        raise UnavailableError("flashinfer: bf16 queries over fp8 keys need another kernel")
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(512 << 20, dtype=torch.uint8, device=p.device), "NHD"
    )
    length = p.ctx + p.nodes
    indices = torch.cat([p.kv_indices.view(p.bs, p.ctx), p.new_slots.view(p.bs, p.nodes)], 1)
    steps = torch.arange(0, p.bs + 1, dtype=torch.int32, device=p.device)
    wrapper.plan(
        steps * p.nodes, steps * length, indices.reshape(-1).int(),
        torch.ones(p.bs, dtype=torch.int32, device=p.device),
        p.heads.q, p.heads.kv, p.heads.dim, 1,
        custom_mask=p.full_mask().reshape(-1), sm_scale=p.sm_scale,
        q_data_type=p.q.dtype, kv_data_type=p.kv_dtype,
    )  # fmt: skip
    cache = (p.k_cache.unsqueeze(1), p.v_cache.unsqueeze(1))
    return lambda: wrapper.run(p.q, cache)


def _dense(p: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [bs, Hq, N, D] and contiguous keys and values [bs, Hkv, ctx + N, D]."""
    if p.kv_dtype.itemsize == 1:
        raise UnavailableError("dense copies of an fp8 cache are not the same problem")
    slots = torch.cat([p.kv_indices.view(p.bs, p.ctx), p.new_slots.view(p.bs, p.nodes)], 1)
    k, v = (c[slots].transpose(1, 2).contiguous() for c in (p.k_cache, p.v_cache))
    return p.q.view(p.bs, p.nodes, p.heads.q, p.heads.dim).transpose(1, 2), k, v


def flex(p: Problem) -> Call:
    """torch FlexAttention on contiguous keys (it is spared the paging), compiled for the shape."""
    if p.device != "cuda":
        raise UnavailableError("flex: CUDA only")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = _dense(p)
    block = ancestor_mask(p.tree.ancestors, p.nodes)
    ctx = p.ctx

    def visible(b, h, i, j):
        return (j < ctx) | block[b, i, torch.clamp(j - ctx, min=0)]

    mask = create_block_mask(visible, p.bs, None, p.nodes, p.ctx + p.nodes, device=p.device)
    run = torch.compile(flex_attention, dynamic=False)
    return lambda: run(q, k, v, block_mask=mask, scale=p.sm_scale, enable_gqa=True).transpose(1, 2)


def sdpa(p: Problem) -> Call:
    """torch's scaled_dot_product_attention on contiguous keys under a dense mask."""
    q, k, v = _dense(p)
    mask = p.full_mask()[:, None]
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=p.sm_scale, enable_gqa=True
    ).transpose(1, 2)


RIVALS: dict[str, Callable[[Problem], Call]] = {
    "ours": ours,
    "sglang": sglang,
    "flashinfer": flashinfer,
    "flex": flex,
    "sdpa": sdpa,
}
