"""Our tree kernel inside SGLang's ``TritonAttnBackend``.

``forward_extend`` calls ``self.verify_splitkv_fwd`` in TARGET_VERIFY when ``use_verify_splitkv`` is
set (SGLang 0.5.23, ``layers/attention/triton_backend.py``; meant for a ROCm chain kernel). Setting
these attributes on the instance, after it is built and before graphs are captured, replaces the
verify attention. Our function always answers True: upstream's fallback would be silently causal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from dflash_kernels import DraftTree, num_words, tree_attention
from dflash_kernels.tree_attn.workspace import TreeAttentionWorkspace
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_dflash.errors import UserError
from sglang_dflash.step.width import Width
from sglang_dflash.upstream.contract import check_triton


class _Tier:
    """A tree of ``nodes`` nodes per request, at addresses that captured graphs read."""

    def __init__(self, max_bs: int, nodes: int, device: torch.device | str) -> None:
        self.ancestors = torch.empty((max_bs, nodes, num_words(nodes)), dtype=torch.int32, device=device)
        self.depth = torch.zeros((max_bs, nodes), dtype=torch.int32, device=device)
        self._alone = _self_words(nodes, device)
        self.ancestors.copy_(self._alone.expand_as(self.ancestors))

    def write(self, tree: DraftTree) -> None:
        bs = tree.tokens.shape[0]
        self.ancestors[:bs].copy_(tree.ancestors)
        self.ancestors[bs:].copy_(self._alone.expand_as(self.ancestors[bs:]))
        self.depth[:bs].copy_(tree.depth)


class TreeBuffers:
    """The current step's tree at addresses that captured graphs read, by its number of nodes.

    Args:
        max_bs: rows.

    Rows without a request see only themselves, so a padded graph never reads a stale tree.
    """

    def __init__(self, max_bs: int, device: torch.device | str) -> None:
        self._max_bs, self._device = max_bs, device
        self._tiers: dict[int, _Tier] = {}

    def of(self, nodes: int) -> _Tier:
        """The buffers of trees of ``nodes`` nodes; the same at every call."""
        tier = self._tiers.get(nodes)
        if tier is None:
            tier = self._tiers[nodes] = _Tier(self._max_bs, nodes, self._device)
        return tier

    def write(self, tree: DraftTree) -> None:
        """Take the step's tree; on the stream that launches the target pass, before it."""
        bs, nodes = tree.tokens.shape
        if bs > self._max_bs:
            raise ValueError(f"{bs} requests in a step, buffers hold {self._max_bs}")
        self.of(nodes).write(tree)


def _self_words(nodes: int, device: torch.device | str) -> torch.Tensor:
    """int32 [1, N, W]: each node sees itself only."""
    ids = torch.arange(nodes, device=device)
    words = torch.zeros((1, nodes, num_words(nodes)), dtype=torch.int64, device=device)
    words[0, ids, ids // 32] = 1 << (ids % 32)
    return words.to(torch.int32)


class VerifyAttention:
    """What ``forward_extend`` calls in TARGET_VERIFY, for every layer.

    Args:
        buffers: the tree of the step, or None for the drafter's block (all rows see each other
            where the layer is bidirectional, a chain where it is causal).
        workspace: shared by all layers of the model.

    How many rows a request has (N for the target, B for the drafter) follows the step's width.
    """

    def __init__(self, buffers: TreeBuffers | None, workspace: TreeAttentionWorkspace | None) -> None:
        self.buffers = buffers
        self.workspace = workspace

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        custom_mask: torch.Tensor | None,
        causal: bool,
        mask_indptr: torch.Tensor | None,
        max_extend_len: int,
        k_descale: float,
        v_descale: float,
        scaling: float,
        *,
        logit_cap: float = 0.0,
        sliding_window_size: int = -1,
        sinks: torch.Tensor | None = None,
        window_kv_offsets: torch.Tensor | None = None,
        xai_temperature_len: float = -1,
        max_bs: int = 0,
    ) -> bool:
        del custom_mask, mask_indptr, max_extend_len, window_kv_offsets, max_bs
        if xai_temperature_len > 0:
            raise UserError(
                "draft trees do not serve Grok's temperature scaling; set SGLANG_DFLASH_MODE=chain"
            )
        bs = qo_indptr.shape[0] - 1
        tree = self.buffers.of(q.shape[0] // bs) if causal and self.buffers is not None else None
        tree_attention(
            q,
            k,
            v,
            k_cache,
            v_cache,
            kv_indptr[: bs + 1],
            kv_indices,
            ancestors=None if tree is None else tree.ancestors[:bs],
            depth=None if tree is None else tree.depth[:bs],
            causal=causal and tree is None,
            sm_scale=scaling,
            logit_cap=logit_cap,
            sliding_window=sliding_window_size,
            sinks=sinks,
            k_scale=k_descale,
            v_scale=v_descale,
            out=o,
            workspace=self.workspace,
        )
        return True


def verifier(backend: Any) -> Any:
    """What of a composed attention backend runs TARGET_VERIFY on attention layers."""
    backend = getattr(backend, "full_attn_backend", backend)
    if isinstance(backend, HybridAttnBackend):
        backend = backend._select_backend(ForwardMode.TARGET_VERIFY)
    return backend


def _seam_of(backend: Any) -> Any:
    """The backend that has the seam, of a composed one what verifies. Raises UserError."""
    backend = verifier(backend)
    wanted = ("use_verify_splitkv", "use_verify_shared_kv", "verify_splitkv_fwd", "use_mla")
    missing = [name for name in wanted if not hasattr(backend, name)]
    if missing or backend.use_mla:
        raise UserError(
            f"draft trees have no kernel for SGLang's {type(backend).__name__}"
            f"{' with MLA' if not missing else ''}; use --attention-backend triton with an MHA or GQA "
            "target, or set SGLANG_DFLASH_MODE=chain"
        )
    return backend


def prepare(runner: Any) -> Callable[[Any], None]:
    """What puts the kernel that the runner's own backend has into another of its backends."""
    kernel = _seam_of(runner.attn_backend).verify_splitkv_fwd

    def put(backend: Any) -> None:
        seam = _seam_of(backend)
        seam.use_verify_shared_kv = False
        seam.use_verify_splitkv = True
        seam.verify_splitkv_fwd = kernel

    return put


def _put(runner: Any, buffers: TreeBuffers | None, rows: Sequence[int], max_bs: int) -> None:
    backend = _seam_of(runner.attn_backend)
    config = runner.model_config
    heads, kv_heads = backend.num_head, backend.num_kv_head
    workspace = (
        TreeAttentionWorkspace(
            max_bs, rows, heads, kv_heads, max(config.head_dim, config.v_head_dim), runner.device
        )
        if torch.device(runner.device).type == "cuda"
        else None
    )
    backend.use_verify_shared_kv = False
    backend.use_verify_splitkv = True
    backend.verify_splitkv_fwd = torch.compiler.disable(VerifyAttention(buffers, workspace))


def install(target: Any, drafter: Any, width: Width) -> TreeBuffers:
    """Put the kernel into the target's and the drafter's backends.

    Args:
        target, drafter: SGLang's model runners, after ``init_attention_backends``, before capture.
        width: the widest step.

    Returns:
        The buffers that the worker fills with each step's tree.

    Raises:
        UserError: a backend without the seam, or MLA.
    """
    check_triton()
    max_bs = int(target.req_to_token_pool.size)
    buffers = TreeBuffers(max_bs, target.device)
    _put(target, buffers, range(1, width.nodes + 1), max_bs)
    _put(drafter, None, range(1, width.block + 1), max_bs)
    return buffers
