"""Top-K log-probabilities of the draft head without keeping the logits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dflash_kernels._dispatch import use_triton
from dflash_kernels.gumbel import Race

MAX_K = 32


def draft_topk(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    k: int,
    *,
    logit_cap: float = 0.0,
    vocab_start: int = 0,
    num_valid: int | None = None,
    normalize: bool = True,
    project: Callable[[torch.Tensor], torch.Tensor] | None = None,
    race: Race | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The K most probable tokens of each row of softmax(hidden @ head_weight.T).

    Equal values are ordered by token id, lower first. A row with a NaN or infinite logit gives NaN
    log-probabilities and valid, not necessarily distinct ids; the other rows do not change.

    Args:
        hidden: [T, H] bf16, fp16 or fp32.
        head_weight: [V, H], hidden's dtype; under tensor parallelism this rank's rows.
        k: K, 1..32 and at most `num_valid`.
        logit_cap: > 0 applies cap * tanh(x / cap) to the logits.
        vocab_start: token id of the head's first row.
        num_valid: rows of the head that are real tokens (the rest is padding); None means all.
        project: on the torch path, another way to compute fresh hidden @ head_weight.T logits [T, >= V], such
            as over packed weights; the Triton path reads head_weight itself.
        race: rank by `scale * logit + strength * g` instead of the logits (see `Race`), before K are taken;
            the values returned are these sums and log_z is that of `scale * logit`, so that a normalised
            value is the tempered log-probability plus the row's share of g.
        normalize: subtract log_z; False returns raw logits, the input of `merge_topk`.

    Returns:
        logprobs float32 [T, K] descending, ids int64 [T, K], log_z float32 [T] (log-sum-exp over this
        head's valid rows).

    Raises:
        ValueError: K does not fit.
    """
    valid = head_weight.shape[0] if num_valid is None else num_valid
    if not 1 <= k <= min(MAX_K, valid):
        raise ValueError(f"k must be 1..{min(MAX_K, valid)}, not {k}")
    if use_triton(hidden):
        from dflash_kernels.head_topk.kernel import draft_topk_triton

        values, ids, log_z = draft_topk_triton(
            hidden, head_weight[:valid], k, logit_cap=logit_cap, race=race, vocab_start=vocab_start
        )
    else:
        from dflash_kernels.head_topk.reference import draft_topk_torch

        values, ids, log_z = draft_topk_torch(
            hidden,
            head_weight[:valid],
            k,
            logit_cap=logit_cap,
            project=project,
            race=race,
            vocab_start=vocab_start,
        )
    if vocab_start:
        ids = ids + vocab_start
    return (values - log_z[:, None] if normalize else values), ids, log_z


def merge_topk(
    values: torch.Tensor, ids: torch.Tensor, log_z: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Joins the shards' candidates of a tensor-parallel head; every rank gets the same bits.

    Args:
        values: float32 [R, T, K] raw logits, from `draft_topk(..., normalize=False)` of each rank.
        ids: int64 [R, T, K], global token ids.
        log_z: float32 [R, T].

    Returns:
        logprobs float32 [T, K] descending (equal values: lower id first), ids int64 [T, K],
        log_z float32 [T].
    """
    R, T, K = values.shape
    flat = values.permute(1, 0, 2).reshape(T, R * K)
    flat_ids, by_id = ids.permute(1, 0, 2).reshape(T, R * K).sort(dim=1)
    best, order = flat.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    total = log_z.logsumexp(0)
    return best[:, :K] - total[:, None], flat_ids.gather(1, order[:, :K]), total
