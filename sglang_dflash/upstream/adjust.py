"""What requests ask of the logits: grammar, custom processors, penalties, bias, log-probabilities, and the
history of committed tokens that penalties count."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from dflash_kernels import Accepted, DraftTree, race_argmax
from sglang.srt.layers.logprob_processor import compute_spec_logprobs
from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask

from sglang_dflash.step.history import TokenHistory
from sglang_dflash.step.penalties import apply_penalties, row_penalties
from sglang_dflash.step.width import Step
from sglang_dflash.upstream.processors import Processors, shown, stop_at_root, texts_of
from sglang_dflash.upstream.requests import needs_penalties, penalties_of


class Adjustments:
    """The requests' wishes, at every node of a tree and in the prefill before it.

    Args:
        target: SGLang's target ``ModelRunner``.
    """

    def __init__(self, target: Any) -> None:
        self.target = target
        self.whole_texts = False  # the history holds prompts too, from which text is recalled
        self._history: TokenHistory | None = None
        self._processors = Processors()

    def warm(self) -> None:
        """Compile SGLang's repetition penalty and prefill's race now, not in the first request that has one.

        Not on CPU, where both are eager (``platform/fused_ops.py``).
        """
        if torch.device(self.target.device).type == "cpu":
            return
        from sglang.srt.sampling.penaltylib.repetition_penalty import apply_scaling_penalties

        vocab = int(self.target.model_config.vocab_size)
        for rows in (1, 2):  # one row is compiled apart from several
            logits = torch.zeros((rows, vocab), device=self.target.device)
            apply_scaling_penalties(logits, torch.ones_like(logits))
            noise = torch.zeros(rows, dtype=torch.int64, device=self.target.device)
            race_argmax(torch.ones_like(logits), noise, noise)

    def start_grammar(self, batch: Any, tree: DraftTree) -> GrammarTree | None:
        """Start copying the tree to the host, before the target pass is launched."""
        if not batch.has_grammar:
            return None
        return GrammarTree.from_device(tree.first_child.long(), tree.next_sibling.long(), tree.tokens)

    def logits(
        self,
        batch: Any,
        logits: torch.Tensor,
        step: Step,
        tree: DraftTree,
        grammar: GrammarTree | None,
        barrier: Any,
    ) -> DraftTree:
        """What a request asks of the logits, at every node, in place and in plain decoding's order:
        custom processor, penalties, grammar, logit bias.

        Returns:
            the tree to walk: without the nodes whose rows a custom processor could not be shown.
        """
        info = batch.sampling_info
        mask = None
        if grammar is not None:
            mask = build_grammar_vocab_mask(
                reqs=batch.reqs, tree=grammar, sampling_info=info, device=logits.device, barrier=barrier
            )
        stay: list[int] = []
        if info is not None and info.has_custom_logit_processor:
            stay = self._processors(batch, logits, step.prefix_lens, tree, self.history())
        if info is not None and needs_penalties(info):
            self._penalise(batch, logits, step, tree)
        if mask is not None:
            mask.apply(logits)
        if info is not None and info.logit_bias is not None:
            bs, nodes = tree.tokens.shape
            logits.view(bs, nodes, -1).add_(info.logit_bias[:, None, :].to(logits.dtype))
        return stop_at_root(tree, stay)

    def _penalise(self, batch: Any, logits: torch.Tensor, step: Step, tree: DraftTree) -> None:
        penalties = penalties_of(batch, logits.device)
        bound, _ = step.host_bound(1)
        committed = self.history().counts(
            batch.req_pool_indices,
            penalties.prompt_lens,
            step.prefix_lens,
            min(int(bound.max()), self.history().tokens.shape[1]),
            logits.shape[-1],
        )
        apply_penalties(logits, tree, committed, step.prefix_lens, penalties, depth=step.deepest)

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

    def texts_shown(self, batch: Any) -> Any:
        """``with`` it, custom processors see what the running requests of a mixed batch have said; under
        overlap the host's own text lags by the step in flight."""
        info = batch.sampling_info
        if not batch.forward_mode.is_mixed() or info is None or not info.has_custom_logit_processor:
            return nullcontext()
        return shown(batch.reqs, texts_of(batch, batch.seq_lens - 1, self.history()))

    def note_texts(self, batch: Any) -> bool:
        """Write down what the batch's requests have said; whether any has said something."""
        history, rows, any_text = self.history(), batch.req_pool_indices, False
        for row, req in enumerate(batch.reqs):
            any_text |= len(req.output_ids) > 0
            text, start = list(req.output_ids), len(req.origin_input_ids)
            if self.whole_texts:
                text, start = [*req.origin_input_ids, *text], 0
            if text:
                said = torch.tensor([text]).to(rows.device, non_blocking=True)
                history.write(rows[row : row + 1], torch.full_like(rows[:1], start), said)
        return any_text

    def remember_prefill(self, batch: Any, result: Any) -> None:
        """Note each request's next token."""
        if result.next_token_ids is not None:
            self.history().write(batch.req_pool_indices, batch.seq_lens, result.next_token_ids.view(-1, 1))

    def remember(self, batch: Any, step: Step, accepted: Accepted) -> None:
        """Note the step's tokens; they stand behind the anchor, which is already there."""
        self.history().write(batch.req_pool_indices, step.prefix_lens + 1, accepted.out_tokens)

    def logprobs(self, batch: Any, output: Any, accepted: Accepted, chosen: torch.Tensor) -> None:
        """Log-probabilities of the committed tokens, where a request asks for them."""
        if not batch.return_logprob:
            return
        bs, nodes = chosen.shape
        rows = torch.arange(bs, device=chosen.device)[:, None] * nodes + accepted.path.clamp(min=0)
        compute_spec_logprobs(batch, output, chosen.reshape(-1), accept_index=rows)
