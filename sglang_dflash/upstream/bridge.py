"""The worker's way to SGLang: every call a decode step makes into its internals is here.

Mirrors what ``DFlashWorkerV2.forward_batch_generation`` does for a chain (SGLang 0.5.23,
``speculative/dflash_worker_v2.py``), with a window of max(N, B) slots instead of B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from dflash_kernels import DraftTree, Race, ancestor_mask, draft_topk, merge_topk
from dflash_kernels._dispatch import use_triton
from sglang.srt.lora.layers import unwrap_lora_layer
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
    enable_num_token_non_padded,
)
from sglang.srt.runtime_context import get_disagg, get_memory, get_parallel, get_spec
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.dflash_utils import is_dense_head_weight
from sglang.srt.speculative.dflash_worker_v2 import _resolve_dflash_embedding_module
from sglang.srt.speculative.draft_worker_common import make_draft_block_spec_info
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite
from sglang.srt.speculative.spec_utils import draft_pp_context, draft_tp_context

from sglang_dflash import __version__
from sglang_dflash.errors import UserError
from sglang_dflash.platform.embeds import in_own_dtype
from sglang_dflash.platform.linear import head_logits
from sglang_dflash.platform.processor import processor_name
from sglang_dflash.step.noise import StepNoise
from sglang_dflash.step.width import Step, Width
from sglang_dflash.upstream.sampler import params_of
from sglang_dflash.upstream.tiers import GraphTiers, Tiers, no_tiers

if TYPE_CHECKING:
    from sglang_dflash.upstream.triton_seam import TreeBuffers


@dataclass
class TreeVerifyInput(DFlashVerifyInput):
    """SGLang's verify input plus the tree the attention backend needs.

    Attributes:
        tree_mask: bool [bs, N, N], row may see column (ancestor or self), for the CPU backend.
    """

    tree_mask: torch.Tensor | None = None


def refuse_unserved(target_worker: Any) -> None:
    """The last check before weights load: what the parent's config check cannot see.

    Raises UserError for targets whose state or cache cannot branch.
    """
    from sglang.srt.configs.hybrid_arch import mambaish_config

    model_config = target_worker.model_runner.model_config
    if mambaish_config(model_config) is not None:
        raise UserError(
            "draft trees do not serve targets with Mamba or linear-attention layers; "
            "set SGLANG_DFLASH_MODE=chain"
        )


class Bridge:
    """What the stages ask of SGLang.

    Args:
        worker: the TreeWorker, after upstream's ``__init__``.
    """

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.target = worker.target_worker.model_runner
        self.drafter = worker.draft_model_runner
        self.device = worker.device
        # The verify logits of a vocab-sharded head must arrive whole: every node's row is read.
        processor = getattr(worker, "_target_logits_processor", None)
        if processor is not None:
            processor.defer_verify_gather = False
        # The platform has done so on a CPU. Block embeddings are the target's, in the drafter's dtype.
        plain = type(self.drafter)._extend_forward_kwargs
        self.drafter._extend_forward_kwargs = MethodType(in_own_dtype(plain), self.drafter)
        self.tree_buffers: TreeBuffers | None = None
        self._block_infos: dict[int, DFlashVerifyInput] = {}
        self._block: int | None = None
        self._target_tiers: Tiers = no_tiers
        self._drafter_tiers: Tiers = no_tiers

    # -- set-up -----------------------------------------------------------------

    def backend_name(self) -> str:
        """The attention backend's class; of a composed one both, what reads prompts first."""
        whole = self.target.attn_backend
        parts = (getattr(whole, name, None) for name in ("prefill_backend", "decode_backend"))
        names = [type(part).__name__ for part in parts if part is not None]
        return ", ".join(names or [type(whole).__name__])

    def compiles(self) -> bool:
        """Whether a step's kernels are Triton's for a GPU, each compiled at its first launch."""
        table = self.target.req_to_token_pool.req_to_token
        return use_triton(table) and table.is_cuda

    def check_served(self) -> None:
        """Refuse at start what a step could only trip over. Raises UserError."""
        self.target_caches()
        self._head()
        self._check_drafter_weights()

    def _check_drafter_weights(self) -> None:
        """What headers cannot tell: a damaged file's bytes. Raises UserError."""
        for name, weight in self.worker.draft_model.named_parameters():
            if weight.is_floating_point() and weight.dtype.itemsize > 1 and not weight.isfinite().all():
                raise UserError(
                    f"the drafter's {name} holds NaN or infinity: its file is damaged; fetch it again"
                )

    def _head(self) -> Any:
        """The target's head with dense weights.

        Raises UserError when it is quantised.
        """
        head = unwrap_lora_layer(self.target.model.lm_head)
        weight = getattr(head, "weight", None)
        if weight is None or not is_dense_head_weight(weight):
            raise UserError(
                "draft trees need a target head with dense weights (bf16, fp16 or fp32); "
                "set SGLANG_DFLASH_MODE=chain"
            )
        return head

    def install_tree_attention(self, width: Width) -> None:
        """Make sure that the target's attention sees trees; there is no silent causal fallback.

        Raises UserError when it would not.
        """
        from sglang_dflash.platform.attention_backend import CpuAttentionBackend

        if isinstance(self.target.attn_backend, CpuAttentionBackend):
            return  # reads tree_mask from the verify input
        from sglang_dflash.upstream.triton_seam import install

        self.tree_buffers = install(self.target, self.drafter, width)

    def capture_tiers(self, nodes: Sequence[int], blocks: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """Capture the graphs of widths beside the widest, where SGLang has captured that one's.

        Returns:
            the target's, nodes -> batch sizes with a graph; empty where nothing is captured.
        """
        from sglang_dflash.upstream.contract import check_tiers
        from sglang_dflash.upstream.triton_seam import prepare

        if self.tree_buffers is None or self.target.decode_cuda_graph_runner is None:
            return {}
        check_tiers()
        width = self.worker.max_width
        target = GraphTiers(self.target, width.nodes, prepare(self.target))
        target.capture(nodes)
        self._target_tiers = target.of
        if self.drafter.decode_cuda_graph_runner is not None:
            drafter = GraphTiers(self.drafter, width.block, prepare(self.drafter))
            with draft_pp_context(), draft_tp_context(self.worker.draft_parallel_layout):
                drafter.capture(blocks, before=self._follow_block)
            self._drafter_tiers = drafter.of
        return target.captured

    def target_caches(self) -> list[torch.Tensor]:
        """Every layer's K and V cache, [slots, heads, dim] each.

        Raises UserError for pools that keep KV in another form.
        """
        pool = self.target.token_to_kv_pool
        keys, values = getattr(pool, "k_buffer", None), getattr(pool, "v_buffer", None)
        if not isinstance(keys, list) or not isinstance(values, list):
            raise UserError(
                f"draft trees cannot compact SGLang's {type(pool).__name__}; set SGLANG_DFLASH_MODE=chain"
            )
        return [*keys, *values]

    def fingerprint(self) -> dict[str, str]:
        """What the times of this server's steps depend on."""
        spec, cuda = get_spec(), torch.device(self.device).type == "cuda"
        return {
            "target": str(self.target.model_config.model_path),
            "drafter": str(spec.speculative_draft_model_path),
            "width": f"{spec.speculative_num_draft_tokens}, {spec.speculative_dflash_block_size}",
            "dtype": f"{self.target.dtype}, {self.target.kv_cache_dtype}",
            "device": torch.cuda.get_device_name() if cuda else processor_name(),
            "threads": str(torch.get_num_threads()),
            "ranks": str(self.ranks()),
            "backend": self.backend_name(),
            "versions": f"sglang {version('sglang')}, torch {torch.__version__}, plugin {__version__}",
        }

    def ranks(self) -> int:
        return int(get_parallel().tp_size)

    def share_or_none(self) -> Callable[[Any], Any] | None:
        """What gives every tensor-parallel rank rank 0's value, by way of the CPU; None for one rank."""
        if self.ranks() == 1:
            return None
        group = get_parallel().tp_group

        def share(value: Any) -> Any:
            box = [value]
            torch.distributed.broadcast_object_list(box, src=group.ranks[0], group=group.cpu_group)
            return box[0]

        return share

    # -- one step ---------------------------------------------------------------

    def open_step(self, batch: Any, width: Width, deepest: int) -> Step:
        """Gather the step's slots from ``req_to_token`` and plan its KV writes.

        ``deepest`` is the longest path that the step's tree may have.

        The scheduler has reserved the slots (``hooks.round_reserve``).
        """
        draft_input = batch.spec_info
        prefix_lens = batch.seq_lens
        if prefix_lens.is_cuda:
            # Produced on the scheduler's stream by the previous step.
            prefix_lens.record_stream(torch.cuda.current_stream())
        table = self.target.req_to_token_pool.req_to_token
        columns = prefix_lens[:, None] + torch.arange(width.slots, device=prefix_lens.device)
        slots = table[batch.req_pool_indices[:, None], columns].long()
        host_lens = batch.seq_lens_cpu if batch.seq_lens_cpu is not None else draft_input.nxt_kv_lens_cpu
        plan = self.target.kv_index_translator.plan(
            req_pool_indices=batch.req_pool_indices,
            seq_lens=prefix_lens,
            seq_lens_cpu=host_lens,
            write_virtual=slots.reshape(-1),
            read_extent=width.slots,
        )
        sampling = None if batch.sampling_info is None else params_of(batch.sampling_info)
        return Step(
            width=width,
            anchor=draft_input.bonus_tokens.view(-1),
            prefix_lens=prefix_lens,
            slots=slots,
            plan=plan,
            host_lens=host_lens,
            host_exact=batch.seq_lens_cpu is not None,
            sampling=sampling,
            noise=StepNoise.of(sampling, prefix_lens, deepest + 1),
            deepest=deepest,
        )

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """The target's input embedding of the block, scaled as the target scales it."""
        worker = self.worker
        if worker._full_embed_gpu is not None:
            rows = torch.nn.functional.embedding(ids, worker._full_embed_gpu)
        else:
            rows = unwrap_lora_layer(_resolve_dflash_embedding_module(worker.draft_model, self.target.model))(
                ids
            )
        return rows * worker._noise_embed_scale if worker._noise_embed_scale != 1.0 else rows

    def _block_info(self, block: int) -> DFlashVerifyInput:
        """What tells the attention backend that the drafter's requests have ``block`` rows each."""
        info = self._block_infos.get(block)
        if info is None:
            info = make_draft_block_spec_info(draft_token_num=block, device=self.device)
            self._block_infos[block] = info
        return info

    def run_drafter(self, batch: Any, step: Step, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One drafter pass over the block; hidden states [bs, B, H] after its last norm."""
        bs, block = ids.shape
        self._follow_block(block)
        embeds = self.embed(ids)
        host_lens, host_sum = step.host_bound(block)
        forward = ForwardBatch(
            forward_mode=ForwardMode.TARGET_VERIFY,
            batch_size=bs,
            input_ids=ids.flatten(),
            req_pool_indices=batch.req_pool_indices,
            seq_lens=step.prefix_lens,
            out_cache_loc=step.slots[:, :block].reshape(-1),
            seq_lens_sum=host_sum,
            seq_lens_cpu=host_lens,
            positions=positions.reshape(-1),
            input_embeds=embeds.view(bs * block, -1),
            spec_algorithm=SpeculativeAlgorithm.DFLASH,
            spec_info=self._block_info(block),
            capture_hidden_mode=CaptureHiddenMode.NULL,
            num_token_non_padded=(
                torch.full((), bs * block, dtype=torch.int32, device=ids.device)
                if enable_num_token_non_padded()
                else None
            ),
            global_num_token_non_padded_cpu=bs * block,
            can_run_decode_cuda_graph=batch.can_run_decode_cuda_graph,
        )
        step.plan.bind(forward, self.drafter.kv_index_translator, cols=slice(0, block))
        with (
            self._drafter_tiers(block),
            torch.inference_mode(),
            draft_tp_context(self.worker.draft_parallel_layout),
        ):
            hidden = self.drafter.forward(forward).logits_output.hidden_states
        if hidden is None:
            raise RuntimeError("SGLang's drafter returned no hidden states for the draft block")
        return hidden.view(bs, block, -1)

    def selector(self) -> Any | None:
        """SGLang's ``CandidateSelector`` of a DFlash 2 drafter; None of another."""
        return getattr(self.worker.draft_model, "candidate_selector", None)

    def _follow_block(self, block: int) -> None:
        """Tell a drafter's grouped convolutions how many rows a request has."""
        model = self.worker.draft_model
        if self._block != block and any(layer.attention_conv is not None for layer in model.layers):
            model.set_block_size(block)
        self._block = block

    def vocab_size(self) -> int:
        """V, rows of the whole head that are real tokens."""
        head = self._head()
        return int(getattr(head, "org_vocab_size", len(head.weight)))

    def head_topk(
        self, hidden: torch.Tensor, k: int, race: Race | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Top-K log-probabilities of the target's head over [T, H] drafter states.

        Args:
            race: rank by perturbed scores instead, see `dflash_kernels.draft_topk`.

        Returns:
            logprobs float32 [T, K] descending and token ids int64 [T, K], equal on all ranks.
        """
        head = self._head()
        weight = head.weight
        shard = getattr(head, "shard_indices", None)
        parallel = get_parallel()
        sharded = parallel.tp_size > 1 and shard is not None
        values, ids, log_z = draft_topk(
            hidden.to(weight.dtype),
            weight,
            k,
            vocab_start=int(shard.org_vocab_start_index) if sharded and shard else 0,
            num_valid=int(shard.num_org_elements) if sharded and shard else self.vocab_size(),
            normalize=not sharded,
            project=lambda rows: head_logits(head, rows),
            race=race,
        )
        if not sharded:
            return values, ids
        group, ranks = parallel.tp_group, parallel.tp_size

        def gather(mine: torch.Tensor) -> torch.Tensor:
            return group.all_gather(mine.contiguous(), dim=0).view(ranks, *mine.shape)

        values, ids, _ = merge_topk(gather(values), gather(ids), gather(log_z))
        return values, ids

    def _mask(self, tree: DraftTree) -> torch.Tensor | None:
        """For the CPU backend; a root alone is a causal row and needs none."""
        if self.tree_buffers is not None or tree.num_nodes == 1:
            return None
        return ancestor_mask(tree.ancestors, tree.num_nodes)

    def run_target(self, batch: Any, step: Step, tree: DraftTree, positions: torch.Tensor) -> Any:
        """One target pass over the tree's nodes; SGLang's forward output."""
        nodes = step.width.nodes
        verify = TreeVerifyInput(
            draft_token=tree.tokens.reshape(-1),
            positions=positions,
            draft_token_num=nodes,
            capture_hidden_mode=CaptureHiddenMode.FULL,
            kv_loc_plan=step.plan,
            kv_loc_cols=slice(0, nodes),
            tree_mask=self._mask(tree),
        )
        if self.tree_buffers is not None:
            self.tree_buffers.write(tree)
        batch.out_cache_loc = step.slots[:, :nodes].reshape(-1)
        lens, total = batch.seq_lens_cpu, batch.seq_lens_sum
        batch.seq_lens_cpu, batch.seq_lens_sum = step.host_bound(nodes)
        with self._target_tiers(nodes):
            forward, _ = verify.prepare_for_verify(batch, self.worker.target_worker)
            batch.seq_lens_cpu, batch.seq_lens_sum = lens, total
            return self.worker.target_worker.forward_batch_generation(
                batch=None, forward_batch=forward, is_verify=True, skip_attn_backend_init=True
            )

    def agree(self, chosen: torch.Tensor, sampled: bool) -> None:
        """Make every tensor-parallel rank use rank 0's tokens, in place, as upstream's chain does."""
        site = SpecTpSyncSite.DFLASH_ACCEPT_SAMPLE if sampled else SpecTpSyncSite.DFLASH_ACCEPT_GREEDY
        self.worker._tp_sync.sync(site, chosen)

    def may_write_later(self) -> bool:
        """Whether the drafter's K and V of a token may be written some steps after its target pass.

        Not where SGLang copies the cache elsewhere between steps, and not where a drafter starts its next
        block from the features of the last commit (Lilicorr).
        """
        return (
            getattr(self.worker, "lilicorr", None) is None
            and not get_memory().enable_hierarchical_cache
            and get_disagg().disaggregation_mode == "null"
        )

    def drafter_slots(self, step: Step, rows: int) -> torch.Tensor:
        """int64 [bs, rows]: the drafter's cache slots of the step's first ``rows`` positions."""
        return self.worker._draft_write_ids(step.plan).view(step.batch_size, -1)[:, :rows].contiguous()

    def append_drafter_kv(
        self,
        hidden: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        lens: torch.Tensor,
    ) -> None:
        """Write the drafter's K and V for the features of committed tokens.

        Args:
            hidden: [R, D, k * H], each row's committed path; what lies at and beyond ``lens`` is not written.
            slots: int64 [R, D], of `drafter_slots`.
            positions: int64 [R, D].
            lens: int32 [R].
        """
        self.worker._append_target_hidden_to_draft_kv_by_loc(
            target_hidden=hidden.reshape(positions.numel(), -1),
            cache_loc=slots.view(-1),
            cache_loc_2d=slots,
            positions=positions.reshape(-1),
            commit_lens=lens,
        )
