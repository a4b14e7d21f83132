"""SGLang attention backend of the CPU platform: prefill, decode and both verify passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_dflash.errors import UserError
from sglang_dflash.platform.attention_ops import MIN_KEYS, HeadSpec, Segment, attend, unpack_ancestors

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

#: Padded keys, over all requests of a batch, that are not worth a second set of operators.
PADDING_ALLOWED = 4096
KV_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CpuAttentionBackend(AttentionBackend):
    """Attention over gathered, padded keys (see ``attention_ops``).

    The gather indices and masks are made once per forward pass and shared by all layers.
    Lengths are read from the tensors of the batch, which cost nothing to read here; the
    scheduler's host-side lengths are upper bounds under overlap scheduling.
    """

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__()
        _refuse_unsupported(model_runner)
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.segments: list[Segment] = []
        self._heads: dict[int, HeadSpec] = {}

    def support_triton(self) -> bool:
        return False

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        mode = forward_batch.forward_mode
        if mode.is_idle() or forward_batch.batch_size == 0:
            self.segments = []
        elif mode.is_decode():
            self.segments = self._uniform(forward_batch, forward_batch.seq_lens.long() - 1, width=1)
        elif mode.is_target_verify():
            width = forward_batch.input_ids.shape[0] // forward_batch.batch_size
            self.segments = self._uniform(
                forward_batch,
                forward_batch.seq_lens.long(),
                width,
                tree=_tree_of(forward_batch.spec_info),
                positions=forward_batch.positions,
            )
        else:
            self.segments = self._ragged(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        self.init_forward_metadata(forward_batch)

    def _uniform(
        self,
        forward_batch: ForwardBatch,
        prefix_lens: torch.Tensor,
        width: int,
        tree: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> list[Segment]:
        """One padded segment for a batch in which every request has ``width`` query rows.

        Batches of very different lengths are split, so that padding at most doubles them.
        """
        order = forward_batch.req_pool_indices.long()
        lens = prefix_lens + width
        padded = int(lens.max()) * lens.shape[0]
        if padded > 2 * int(lens.sum()) + PADDING_ALLOWED:
            parts = [slice(i, i + 1) for i in range(lens.shape[0])]
        else:
            parts = [slice(0, lens.shape[0])]
        if tree is not None and positions is not None:
            positions = positions.view(-1, width).long()
        segments = []
        for part in parts:
            longest = max(int(lens[part].max()), MIN_KEYS)
            slots = self.req_to_token_pool.req_to_token[:, :longest].index_select(0, order[part]).long()
            slots.masked_fill_(torch.arange(longest) >= lens[part].unsqueeze(1), 0)
            segments.append(
                Segment(
                    rows=slice(part.start * width, part.stop * width),
                    width=width,
                    slots=slots,
                    prefix_lens=prefix_lens[part],
                    tree=None if tree is None else tree[part],
                    positions=None if tree is None or positions is None else positions[part],
                    first_slot=_first_of_run(slots),
                )
            )
        return segments

    def _ragged(self, forward_batch: ForwardBatch) -> list[Segment]:
        """One segment per request: prefill widths differ, and its matrices are large anyway."""
        table = self.req_to_token_pool.req_to_token
        segments, start = [], 0
        prefixes = forward_batch.extend_prefix_lens.tolist()
        widths = forward_batch.extend_seq_lens.tolist()
        for row, prefix, width in zip(forward_batch.req_pool_indices.tolist(), prefixes, widths, strict=True):
            if width == 0:
                continue
            slots = table[row, : max(prefix + width, MIN_KEYS)].long().unsqueeze(0)
            slots[:, prefix + width :] = 0
            segments.append(
                Segment(
                    rows=slice(start, start + width),
                    width=width,
                    slots=slots,
                    prefix_lens=torch.tensor([prefix]),
                    first_slot=_first_of_run(slots),
                )
            )
            start += width
        return segments

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of one layer. q: ``[rows, q_heads * dim]`` -> ``[rows, q_heads * v_dim]``."""
        if kwargs:
            raise NotImplementedError(f"The CPU attention backend does not take {sorted(kwargs)}.")
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        head = self._heads.get(id(layer)) or self._head_of(layer)
        k_cache, v_cache = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        if len(self.segments) == 1 and self.segments[0].rows.stop == q.shape[0]:
            return attend(q, k_cache, v_cache, self.segments[0], head, sinks)
        out = q.new_zeros(q.shape[0], head.q_heads * head.v_dim)
        for segment in self.segments:
            out[segment.rows] = attend(q[segment.rows], k_cache, v_cache, segment, head, sinks)
        return out

    # Prefill, verify and the drafter's block differ only in their segments.
    forward_extend = forward_decode

    def _head_of(self, layer: RadixAttention) -> HeadSpec:
        if layer.is_cross_attention:
            raise NotImplementedError("The CPU attention backend does not serve cross-attention.")
        bidirectional = layer.attn_type == AttentionType.ENCODER_ONLY
        window = layer.sliding_window_size
        head = HeadSpec(
            q_heads=layer.tp_q_head_num,
            kv_heads=layer.tp_k_head_num,
            qk_dim=layer.qk_head_dim,
            v_dim=layer.v_head_dim,
            scale=layer.scaling,
            window=window if window is not None and window > -1 else None,
            logit_cap=layer.logit_cap or 0.0,
            bidirectional=bidirectional,
        )
        self._heads[id(layer)] = head
        return head


def _first_of_run(slots: torch.Tensor) -> int | None:
    """The first slot when a single request's slots are consecutive, else None."""
    if slots.shape[0] != 1:
        return None
    first, last = int(slots[0, 0]), int(slots[0, -1])
    if last - first != slots.shape[1] - 1 or not bool((slots[0, 1:] - slots[0, :-1] == 1).all()):
        return None
    return first


def _tree_of(spec_info: Any) -> torch.Tensor | None:
    """The ancestor mask bool ``[requests, N, N]`` of a tree verify, or None for a chain."""
    mask = getattr(spec_info, "tree_mask", None)
    if mask is not None:
        return mask
    words = getattr(spec_info, "tree_ancestors", None)
    if words is not None:
        return unpack_ancestors(words)
    if getattr(spec_info, "custom_mask", None) is not None:
        raise NotImplementedError(
            "The CPU attention backend reads tree_mask or tree_ancestors, not custom_mask."
        )
    return None


def _refuse_unsupported(runner: ModelRunner) -> None:
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    if runner.use_mla_backend:
        raise UserError("The CPU platform does not serve models with latent attention (MLA).")
    if isinstance(runner.token_to_kv_pool, SWAKVPool):
        raise UserError(
            "The CPU platform has no separate sliding-window KV pool: start with --disable-hybrid-swa-memory."
        )
    if runner.kv_cache_dtype not in KV_DTYPES:
        raise UserError(
            f"The CPU platform keeps the KV cache in float32, bfloat16 or float16, "
            f"not {runner.kv_cache_dtype}: drop --kv-cache-dtype."
        )
