"""The worker's way to SGLang: every call a decode step makes into its internals is here.

Mirrors what ``DFlashWorkerV2.forward_batch_generation`` does for a chain (SGLang 0.5.23,
``speculative/dflash_worker_v2.py``), with a window of max(N, B) slots instead of B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from dflash_kernels import Accepted, DraftTree, Race, ancestor_mask, draft_topk, merge_topk
from sglang.srt.layers.logprob_processor import compute_spec_logprobs
from sglang.srt.layers.sampler import apply_custom_logit_processor
from sglang.srt.lora.layers import unwrap_lora_layer
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
    enable_num_token_non_padded,
)
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.dflash_utils import is_dense_head_weight
from sglang.srt.speculative.dflash_worker_v2 import _resolve_dflash_embedding_module
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite
from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask, draft_tp_context

from sglang_dflash.errors import UserError
from sglang_dflash.platform.linear import head_logits
from sglang_dflash.upstream.requests import needs_penalties, penalties_of
from sglang_dflash.upstream.sampler import params_of
from sglang_dflash.worker.accept.penalties import apply_penalties, row_penalties
from sglang_dflash.worker.accept.sample import SamplingParams
from sglang_dflash.worker.history import TokenHistory
from sglang_dflash.worker.noise import StepNoise
from sglang_dflash.worker.step import Step, Width

if TYPE_CHECKING:
    from sglang_dflash.upstream.triton_seam import TreeBuffers


@dataclass
class TreeVerifyInput(DFlashVerifyInput):
    """SGLang's verify input plus the tree the attention backend needs.

    Attributes:
        tree_mask: bool [bs, N, N], row may see column (ancestor or self), for the CPU backend.
        tree_ancestors: int32 [bs, N, ceil(N / 32)], the same bit-packed, for the Triton kernel.
    """

    tree_mask: torch.Tensor | None = None
    tree_ancestors: torch.Tensor | None = None


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
        _keep_drafter_dtype(self.drafter)
        self.tree_buffers: TreeBuffers | None = None
        self._history: TokenHistory | None = None

    # -- set-up -----------------------------------------------------------------

    def backend_name(self) -> str:
        return type(self.target.attn_backend).__name__

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

    def warm_penalties(self) -> None:
        """Compile SGLang's repetition penalty now, not in the first request that has one.

        Not on CPU, where the platform's own is eager (``platform/fused_ops.py``).
        """
        if torch.device(self.device).type == "cpu":
            return
        from sglang.srt.sampling.penaltylib.repetition_penalty import apply_scaling_penalties

        vocab = int(self.target.model_config.vocab_size)
        for rows in (1, 2):  # one row is compiled apart from several
            logits = torch.zeros((rows, vocab), device=self.device)
            apply_scaling_penalties(logits, torch.ones_like(logits))

    def install_tree_attention(self, width: Width) -> None:
        """Make sure that the target's attention sees trees; there is no silent causal fallback.

        Raises UserError when it would not.
        """
        from sglang_dflash.platform.attention_backend import CpuAttentionBackend

        if isinstance(self.target.attn_backend, CpuAttentionBackend):
            return  # reads tree_mask from the verify input
        from sglang_dflash.upstream.triton_seam import install

        self.tree_buffers = install(self.target, self.drafter, width)

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

    # -- one step ---------------------------------------------------------------

    def open_step(self, batch: Any, width: Width) -> Step:
        """Gather the step's slots from ``req_to_token`` and plan its KV writes.

        The scheduler has reserved the slots (``hooks.decode_reserve``).
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
        sampling = self.sampling_params(batch)
        return Step(
            width=width,
            anchor=draft_input.bonus_tokens.view(-1),
            prefix_lens=prefix_lens,
            slots=slots,
            plan=plan,
            host_lens=host_lens,
            sampling=sampling,
            noise=StepNoise.of(sampling, prefix_lens, width.block),
        )

    def _host_bound(self, batch: Any, step: Step, rows: int) -> tuple[torch.Tensor, int]:
        """Host-side upper bound of each request's length with ``rows`` rows of this step."""
        bound = step.host_lens + rows if batch.seq_lens_cpu is not None else step.host_lens
        return bound, int(bound.sum())

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

    def run_drafter(self, batch: Any, step: Step, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One drafter pass over the block; hidden states [bs, B, H] after its last norm."""
        bs, block = ids.shape
        embeds = self.embed(ids)
        host_lens, host_sum = self._host_bound(batch, step, block)
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
            spec_info=self.worker._draft_block_spec_info,
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
        with torch.inference_mode(), draft_tp_context(self.worker.draft_parallel_layout):
            hidden = self.drafter.forward(forward).logits_output.hidden_states
        if hidden is None:
            raise RuntimeError("SGLang's drafter returned no hidden states for the draft block")
        return hidden.view(bs, block, -1)

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
            tree_mask=ancestor_mask(tree.ancestors, nodes) if self.tree_buffers is None else None,
            tree_ancestors=tree.ancestors,
        )
        if self.tree_buffers is not None:
            self.tree_buffers.write(tree)
        batch.out_cache_loc = step.slots[:, :nodes].reshape(-1)
        lens, total = batch.seq_lens_cpu, batch.seq_lens_sum
        batch.seq_lens_cpu, batch.seq_lens_sum = self._host_bound(batch, step, nodes)
        forward, _ = verify.prepare_for_verify(batch, self.worker.target_worker)
        batch.seq_lens_cpu, batch.seq_lens_sum = lens, total
        return self.worker.target_worker.forward_batch_generation(
            batch=None, forward_batch=forward, is_verify=True, skip_attn_backend_init=True
        )

    # -- request features ---------------------------------------------------------

    def start_grammar(self, batch: Any, tree: DraftTree) -> GrammarTree | None:
        """Start copying the tree to the host, before the target pass is launched."""
        if not batch.has_grammar:
            return None
        return GrammarTree.from_device(tree.first_child.long(), tree.next_sibling.long(), tree.tokens)

    def adjust_logits(
        self,
        batch: Any,
        logits: torch.Tensor,
        step: Step,
        tree: DraftTree,
        grammar: GrammarTree | None,
        barrier: Any,
    ) -> None:
        """What a request asks of the logits, at every node, in place and in plain decoding's order:
        custom processor, penalties, grammar, logit bias."""
        info = batch.sampling_info
        mask = None
        if grammar is not None:
            mask = build_grammar_vocab_mask(
                reqs=batch.reqs, tree=grammar, sampling_info=info, device=logits.device, barrier=barrier
            )
        if info is not None and info.has_custom_logit_processor:
            apply_custom_logit_processor(logits, info, num_tokens_in_batch=step.width.nodes)
        if info is not None and needs_penalties(info):
            self._penalise(batch, logits, step, tree)
        if mask is not None:
            mask.apply(logits)
        if info is not None and info.logit_bias is not None:
            bs, nodes = tree.tokens.shape
            logits.view(bs, nodes, -1).add_(info.logit_bias[:, None, :].to(logits.dtype))

    def _penalise(self, batch: Any, logits: torch.Tensor, step: Step, tree: DraftTree) -> None:
        penalties = penalties_of(batch, logits.device)
        bound, _ = self._host_bound(batch, step, 1)
        committed = self.history().counts(
            batch.req_pool_indices,
            penalties.prompt_lens,
            step.prefix_lens,
            min(int(bound.max()), self.history().tokens.shape[1]),
            logits.shape[-1],
        )
        apply_penalties(logits, tree, committed, step.prefix_lens, penalties, depth=step.width.depth)

    def history(self) -> TokenHistory:
        if self._history is None:
            table = self.target.req_to_token_pool.req_to_token
            self._history = TokenHistory(table.shape[0], table.shape[1], table.device)
        return self._history

    def prepare_prefill(self, batch: Any, grammar_barrier: Any) -> None:
        """Note what requests with a text behind them have said, and hold it against them.

        Those are retracted requests, and in a mixed batch the running ones. SGLang counts penalties only
        in plain decoding's steps, so their next token would come out as if nothing had been said; and
        under overlap it fills a mixed batch's grammar masks before the last step's tokens have advanced
        the grammars, which ends such a request with a 500.
        """
        if batch.forward_mode.is_mixed() and batch.has_grammar and grammar_barrier is not None:
            grammar_barrier()
        mixed = self.note_texts(batch) or batch.forward_mode.is_mixed()
        history, rows = self.history(), batch.req_pool_indices
        info = batch.sampling_info
        if not mixed or info is None or not needs_penalties(info):
            return
        penalties = penalties_of(batch, rows.device)
        seen = history.counts(
            rows, penalties.prompt_lens, batch.seq_lens - 1, history.tokens.shape[1], info.vocab_size
        )
        added, scales = row_penalties(seen, batch.seq_lens - penalties.prompt_lens, penalties)
        info.acc_additive_penalties = added
        if info.acc_scaling_penalties is not None:
            info.acc_scaling_penalties = scales

    def note_texts(self, batch: Any) -> bool:
        """Write down what the batch's requests have said; whether any has said something."""
        history, rows, any_text = self.history(), batch.req_pool_indices, False
        for row, req in enumerate(batch.reqs):
            if len(req.output_ids):
                said = torch.tensor([list(req.output_ids)], device=rows.device)
                start = torch.tensor([len(req.origin_input_ids)], device=rows.device)
                history.write(rows[row : row + 1], start, said)
                any_text = True
        return any_text

    def remember_prefill(self, batch: Any, result: Any) -> None:
        """Note each request's next token."""
        if result.next_token_ids is not None:
            self.history().write(batch.req_pool_indices, batch.seq_lens, result.next_token_ids.view(-1, 1))

    def remember(self, batch: Any, step: Step, accepted: Accepted) -> None:
        """Note the step's tokens; they stand behind the anchor, which is already there."""
        self.history().write(batch.req_pool_indices, step.prefix_lens + 1, accepted.out_tokens)

    def agree(self, chosen: torch.Tensor, sampled: bool) -> None:
        """Make every tensor-parallel rank use rank 0's tokens, in place, as upstream's chain does."""
        site = SpecTpSyncSite.DFLASH_ACCEPT_SAMPLE if sampled else SpecTpSyncSite.DFLASH_ACCEPT_GREEDY
        self.worker._tp_sync.sync(site, chosen)

    def sampling_params(self, batch: Any) -> SamplingParams | None:
        return None if batch.sampling_info is None else params_of(batch.sampling_info)

    def logprobs(self, batch: Any, output: Any, accepted: Accepted, chosen: torch.Tensor) -> None:
        """Log-probabilities of the committed tokens, where a request asks for them."""
        if not batch.return_logprob:
            return
        bs, nodes = chosen.shape
        rows = torch.arange(bs, device=chosen.device)[:, None] * nodes + accepted.path.clamp(min=0)
        compute_spec_logprobs(batch, output, chosen.reshape(-1), accept_index=rows)

    def append_drafter_kv(
        self, step: Step, hidden: torch.Tensor, positions: torch.Tensor, accept_lens: torch.Tensor
    ) -> None:
        """Write the drafter's K and V for the accepted path's features.

        Args:
            hidden: [bs, B, k * H], rows of the path (rows beyond accept_lens are not written).
            positions: int64 [bs, B].
            accept_lens: int32 [bs].
        """
        bs, block = positions.shape
        cache_loc = self.worker._draft_write_ids(step.plan).view(bs, -1)[:, :block].contiguous()
        self.worker._append_target_hidden_to_draft_kv_by_loc(
            target_hidden=hidden.reshape(bs * block, -1),
            cache_loc=cache_loc.view(-1),
            cache_loc_2d=cache_loc,
            positions=positions.reshape(-1),
            commit_lens=accept_lens,
        )


def _keep_drafter_dtype(runner: Any) -> None:
    """Undo the bfloat16 cast of ``input_embeds`` on the drafter's runner.

    ``ModelRunner._extend_forward_kwargs`` casts them whatever the model's dtype, which breaks
    float32 and float16 drafters in eager mode.
    """
    original = runner._extend_forward_kwargs

    def keep(forward_batch: Any, pp_proxy_tensors: Any) -> dict:
        kwargs = original(forward_batch, pp_proxy_tensors)
        if forward_batch.input_embeds is not None and "input_embeds" in kwargs:
            kwargs["input_embeds"] = forward_batch.input_embeds.to(runner.dtype)
        return kwargs

    runner._extend_forward_kwargs = keep
