"""The DFLASH worker that verifies draft trees; everything but the decode step is SGLang's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from dflash_kernels import Accepted, DraftTree
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.runtime_context import get_spec
from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2

from sglang_dflash.drafter import DrafterConfig, block_size_of, read_config, resolve_folder
from sglang_dflash.settings import get_settings
from sglang_dflash.step.report import StepReport, StepResult, outcome
from sglang_dflash.step.sampling import unfiltered
from sglang_dflash.step.timing import Laps
from sglang_dflash.step.trace import Chances, StepTrace
from sglang_dflash.step.width import Step, Width
from sglang_dflash.upstream.adjust import Adjustments
from sglang_dflash.upstream.bridge import Bridge, refuse_unserved
from sglang_dflash.upstream.contract import check_worker
from sglang_dflash.upstream.drafter_cache import clean_drafter_cache
from sglang_dflash.upstream.handover import receive
from sglang_dflash.upstream.rehearsal import rehearsal
from sglang_dflash.upstream.requests import sampled_rows, traced_rows
from sglang_dflash.upstream.results import attach, free_room, metric_labels
from sglang_dflash.upstream.weights import route_weight_updates
from sglang_dflash.worker.accept import AcceptStage
from sglang_dflash.worker.banner import announce_tree
from sglang_dflash.worker.commit import CommitStage
from sglang_dflash.worker.draft import DraftStage
from sglang_dflash.worker.health import DrafterHealth
from sglang_dflash.worker.metrics import Metrics
from sglang_dflash.worker.recall import Recalled, RecallStage
from sglang_dflash.worker.tree import TreeStage
from sglang_dflash.worker.tree.reach import chances as chances_of
from sglang_dflash.worker.tree.stage import load_rewrite
from sglang_dflash.worker.verify import VerifyStage
from sglang_dflash.worker.width import WidthStage, serve
from sglang_dflash.worker.width.cost import CostFile
from sglang_dflash.worker.width.policy import FixedWidth
from sglang_dflash.worker.width.start import start_width, tiers_asked

logger = logging.getLogger("sglang_dflash")


@dataclass(frozen=True)
class _Drafted:
    """A step's tree, what is recalled in it, and what is expected of it where somebody asks."""

    tree: DraftTree
    recalled: Recalled | None = None
    reach: torch.Tensor | None = None
    held: torch.Tensor | None = None
    chances: Chances | None = None


class TreeWorker(DFlashWorkerV2):
    """SGLang's DFLASH worker with a decode step of our own.

    Prefill, idle batches, memory pools, weight updates and scheduling stay upstream's. The drafter
    is built B rows wide, the target N: upstream knows one width, so the drafter's set-up runs with
    the published width overridden to B.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_worker()
        spec = get_spec()
        self.max_width = Width(nodes=int(spec.speculative_num_draft_tokens), block=block_size_of(spec))
        refuse_unserved(kwargs.get("target_worker", args[-1] if args else None))
        with self._drafter_width():
            super().__init__(*args, **kwargs)
        self.speculative_num_draft_tokens = self.max_width.nodes

        settings = get_settings()
        self.bridge = Bridge(self)
        self.adjust = Adjustments(self.bridge.target)
        self.drafter_config = config = read_config(
            resolve_folder(spec.speculative_draft_model_path, spec.speculative_draft_model_revision)
        )
        self.draft = DraftStage(
            self.bridge,
            mask_token_id=int(self._mask_token_id),
            top_k=settings.top_k,
            anchor_first=config.anchor_first,
        )
        self.tree = TreeStage(
            depth_bonus=config.dflash_config.tree_depth_bonus if settings.calibrate else None,
            rewrite=load_rewrite(settings.candidates),
            device=self.device,
            tiers=tiers_asked(settings.width),
        )
        self.recall = None
        if settings.recall:
            self.recall = RecallStage(self.device, self.bridge.vocab_size(), self.max_width.nodes - 1)
        self.adjust.whole_texts = settings.recall
        self.verify = VerifyStage(self.bridge)
        self.accept = AcceptStage(self.bridge)
        self.commit = CommitStage(self.bridge)
        route_weight_updates(self)
        receive(self.adjust)

        self.width = WidthStage(FixedWidth(self.max_width), self.max_width)
        self.steps = 0
        self.health = DrafterHealth()
        labels = metric_labels()
        self.metrics = None if labels is None else Metrics(labels)

    # -- set-up, B wide ---------------------------------------------------------

    def _drafter_width(self) -> Any:
        return get_spec().override(
            speculative_num_draft_tokens=self.max_width.block, speculative_eagle_topk=1
        )

    def alloc_memory_pool(self, *args: Any, **kwargs: Any) -> Any:
        with self._drafter_width():
            return super().alloc_memory_pool(*args, **kwargs)

    def init_attention_backends(self) -> Any:
        with self._drafter_width():
            result = super().init_attention_backends()
        self.bridge.install_tree_attention(self.max_width)
        self.bridge.check_served()
        announce_tree(
            num_nodes=self.max_width.nodes,
            block=self.max_width.block,
            dtype=self.model_runner.dtype,
            backend=self.bridge.backend_name(),
        )
        return result

    def init_cuda_graphs(self) -> Any:
        self.adjust.warm()
        with self._drafter_width():
            result = super().init_cuda_graphs()
        self.width = start_width(get_settings().width, self)
        self.steps = 0  # rehearsed ones do not count
        serve(self.width)
        return result

    def _maybe_build_draft_sampler(self) -> None:
        """Upstream folds an argmax into the drafter's graph; a tree needs the top K instead."""
        return None

    def _validate_phase1_sampling_support(self, batch: Any) -> None:
        """Sampling on trees needs no kernel upstream would have to provide."""

    def prewarm_sampling(self) -> Any:
        return self.model_runner.prewarm_sampling()

    def describe(self) -> dict[str, Any]:
        """The facts ``/server_info`` shows."""
        return {
            "num_nodes": self.max_width.nodes,
            "block_size": self.max_width.block,
            "width": self.width.policy.why(),
            **({"cost_table": str(CostFile.path(self.bridge.fingerprint()))} if self.width.learner else {}),
            "attention": self.bridge.backend_name(),
            "settings": get_settings().model_dump(),
            "drafter_fallbacks": self.health.fallbacks,
            "free": free_room(self.model_runner),
        }

    def drafter_replaced(self, config: DrafterConfig) -> None:
        """Follow a drafter update at run time: what was derived from the old weights."""
        self.drafter_config = config
        bonus = config.dflash_config.tree_depth_bonus if get_settings().calibrate else None
        self.tree.set_depth_bonus(bonus, self.device)
        if self._use_fused_kv_materialize:
            self._init_fused_kv_helper()

    # -- the step ---------------------------------------------------------------

    def forward_batch_generation(
        self,
        batch: Any,
        on_publish: Any = None,
        grammar_barrier: Any = None,
        pp_proxy_tensors: Any = None,
    ) -> GenerationBatchResult:
        if (
            batch.forward_mode.is_extend()
            or batch.is_extend_in_batch
            or batch.forward_mode.is_idle()
            or batch.spec_info is None
        ):
            self.width.interrupt()
            self.commit.settle()
            idle = batch.forward_mode.is_idle()
            if not idle:
                self.adjust.prepare_prefill(batch, grammar_barrier)
            with self.adjust.texts_shown(batch):
                result = super().forward_batch_generation(
                    batch,
                    on_publish=on_publish,
                    grammar_barrier=grammar_barrier,
                    pp_proxy_tensors=pp_proxy_tensors,
                )
            if not idle:
                self.adjust.remember_prefill(batch, result)
            return result
        if self.health.must_clean(self.steps):
            self.commit.settle()
            clean_drafter_cache(self.draft_model_runner)
        traced = traced_rows(batch)
        laps = Laps(self.device, enabled=self.metrics is not None or traced is not None)
        width = self.width.launch(len(batch.seq_lens))
        step = self.bridge.open_step(batch, width, self._deepest(width))
        self.width.note_length(step.mean_length())
        return self._decode(step, batch, laps, on_publish, grammar_barrier, traced)

    def rehearse(
        self, width: Width, requests: int, length: int, *, sampled: bool = False
    ) -> tuple[float, float, float]:
        """Seconds of the drafter, the target and the rest of one step over requests that nobody sent.

        Only before the first request. ``length`` is in cached tokens; ``sampled`` requests draw theirs.
        """
        laps = Laps(self.device, enabled=True)
        with rehearsal(self, requests, length, self.max_width.slots) as batch:
            step = self.bridge.open_step(batch, width, self._deepest(width))
            if sampled:
                step.sample(unfiltered(requests, self.bridge.vocab_size(), step.anchor.device))
            self._decode(step, batch, laps, None, None)
        return laps.parts()

    def _deepest(self, width: Width) -> int:
        """A recalled path may use the whole tree, a drafted one ends with the block."""
        return width.depth if self.recall is None else max(width.nodes - 1, width.depth)

    def _decode(
        self,
        step: Step,
        batch: Any,
        laps: Laps,
        on_publish: Any,
        grammar_barrier: Any,
        traced: list[bool] | None = None,
    ) -> GenerationBatchResult:
        self.commit.begin(step, batch.reqs)
        laps.mark()
        drafted = self._draft(step, batch, laps, traced is not None)
        tree, recalled = drafted.tree, drafted.recalled
        grammar = self.adjust.start_grammar(batch, tree)
        laps.mark()
        verified = self.verify(tree, step, batch)
        laps.mark()
        walk = self.adjust.logits(batch, verified.logits, step, tree, grammar, grammar_barrier)
        accepted, chosen = self.accept(verified, walk, step, batch)
        self.adjust.logprobs(batch, verified.raw.logits_output, accepted, chosen)
        laps.mark()
        if on_publish is not None:
            on_publish(accepted.new_lens)
        self.commit(accepted, verified, step, batch.reqs)
        laps.mark()
        self.adjust.remember(batch, step, accepted)
        if recalled is not None and self.recall is not None:
            self.recall.learn(recalled, accepted)

        rows, sampled = outcome(tree, accepted), sampled_rows(batch)
        lens, output = accepted.accept_lens, verified.raw.logits_output
        told = (drafted.reach, drafted.held)
        attach(output, StepReport(self.steps, step.width, rows, lens, sampled, *told, laps, self))
        if traced is not None and drafted.chances is not None:
            chances = drafted.chances
            attach(output, StepTrace(self.steps, step.width, traced, tree, chances, accepted, laps))
        self.steps += 1
        laps.mark()
        return self._result(verified.raw, accepted, step)

    def _draft(self, step: Step, batch: Any, laps: Laps, traced: bool) -> _Drafted:
        if step.width.plain:
            laps.mark()
            roots = Chances.of_roots(step.batch_size, step.anchor.device) if traced else None
            return _Drafted(DraftTree.roots(step.anchor), chances=roots)
        candidates = self.draft(step, batch)
        laps.mark()
        candidates = self.tree.rewritten(candidates, step, batch)
        recalled = None
        if self.recall is not None:
            recalled = self.recall(self.adjust.history(), batch.req_pool_indices, step, candidates)
        chain = None if recalled is None else recalled.chain
        tree, reach = self.tree(candidates, step, chain, expect=not self.width.pinned)
        held = None if recalled is None or reach is None else recalled.held(step.sampled)
        told = chances_of(tree, candidates, chain) if traced else None
        return _Drafted(tree, recalled, reach, held, told)

    def observe(self, result: StepResult) -> None:
        """A step's outcome, once SGLang has it on the host; called by the scheduler, outside the step."""
        self.health.note(result.number, result.fallbacks)
        self.width.observe(result)
        if self.metrics is not None:
            self.metrics.observe(result)

    def _result(self, raw: Any, accepted: Accepted, step: Step) -> GenerationBatchResult:
        # The scheduler copies the output to the host; the features are large and already used.
        raw.logits_output.hidden_states = None
        return GenerationBatchResult(
            logits_output=raw.logits_output,
            next_token_ids=accepted.out_tokens.reshape(-1),
            accept_lens=accepted.accept_lens,
            new_seq_lens=accepted.new_lens,
            can_run_cuda_graph=raw.can_run_cuda_graph,
            next_draft_input=self._make_next_draft_input_decode(
                bonus_tokens=accepted.bonus, new_seq_lens=accepted.new_lens
            ),
            speculative_num_draft_tokens=step.width.nodes,
            speculative_output_stride=step.deepest + 1,
            routed_experts_output=raw.routed_experts_output,
            indexer_topk_output=raw.indexer_topk_output,
        )
