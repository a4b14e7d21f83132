"""Frequency, presence and repetition penalties and min_new_tokens, exact at every tree node.

A node is penalised for every token generated before it: the request's committed output and the
node's own path. SGLang's chain ignores all four (``speculative/dflash_utils.py``,
``apply_dflash_verify_logits_adjustments`` reads a field that is never set). Formulas and order are
those of ``sampling/penaltylib``: additive ones first, then the repetition scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from dflash_kernels import DraftTree


@dataclass
class Penalties:
    """Per-request parameters, float32 or int [bs] on the device.

    Attributes:
        frequency: subtracted once per earlier occurrence; 0 is off.
        presence: subtracted once if the token occurred; 0 is off.
        repetition: divides positive and multiplies negative logits of tokens that occurred; 1 is off.
        min_new_tokens: stop tokens are forbidden while fewer tokens were generated; 0 is off.
        stop_ids: int64 [bs, S], padded with -1.
        prompt_lens: int64 [bs], positions before these are not output.
    """

    frequency: torch.Tensor
    presence: torch.Tensor
    repetition: torch.Tensor
    min_new_tokens: torch.Tensor
    stop_ids: torch.Tensor
    prompt_lens: torch.Tensor


def path_counts(tree: DraftTree, depth: int, vocab: int) -> torch.Tensor:
    """How often each token stands on the path from below the root to each node, float32 [bs, N, V]."""
    bs, nodes = tree.tokens.shape
    counts = torch.zeros((bs, nodes, vocab), device=tree.tokens.device)
    parents = tree.parents.long()
    node = torch.arange(nodes, device=tree.tokens.device).expand(bs, nodes)
    for _ in range(depth):
        parent = parents.gather(1, node)
        counts.scatter_add_(2, tree.tokens.gather(1, node)[:, :, None], (parent >= 0).float()[:, :, None])
        node = torch.where(parent >= 0, parent, node)
    return counts


def apply_penalties(
    logits: torch.Tensor,
    tree: DraftTree,
    committed: torch.Tensor,
    prefix_lens: torch.Tensor,
    penalties: Penalties,
    *,
    depth: int,
) -> None:
    """Penalise every node's row in place.

    Args:
        logits: [bs * N, V].
        tree: the step's tree.
        committed: float32 [bs, V], occurrences in the committed output, the root's token included.
        prefix_lens: int64 [bs], position of the root's token.
        depth: L, the tree's greatest depth.
    """
    bs, nodes = tree.tokens.shape
    rows = logits.view(bs, nodes, -1)
    vocab = rows.shape[-1]
    seen = path_counts(tree, depth, vocab) + committed[:, None, :vocab]

    def per_request(values: torch.Tensor) -> torch.Tensor:
        return values.float()[:, None, None]

    rows -= (per_request(penalties.frequency) * seen).to(rows.dtype)
    occurred = seen > 0
    rows -= (per_request(penalties.presence) * occurred).to(rows.dtype)

    generated = (prefix_lens - penalties.prompt_lens + 1)[:, None] + tree.depth
    early = generated < penalties.min_new_tokens[:, None]
    stop = penalties.stop_ids.clamp(min=0)[:, None, :].expand(-1, nodes, -1)
    forbid = early[:, :, None] & (penalties.stop_ids >= 0)[:, None, :]
    rows.scatter_add_(2, stop, torch.where(forbid, float("-inf"), 0.0).to(rows.dtype))

    scale = torch.where(occurred, per_request(penalties.repetition), 1.0).to(rows.dtype)
    rows.copy_(torch.where(rows < 0, rows * scale, rows / scale))


def row_penalties(
    seen: torch.Tensor, generated: torch.Tensor, penalties: Penalties
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row's penalties per request, in the form SGLang's sampler takes them in.

    Args:
        seen: float32 [bs, V], occurrences in the output so far.
        generated: int64 [bs], tokens of the output so far.
        penalties: of the batch.

    Returns:
        what is added to the logits and what then scales them, both float32 [bs, V].
    """
    occurred = seen > 0
    added = -penalties.frequency[:, None] * seen - penalties.presence[:, None] * occurred
    forbid = (generated < penalties.min_new_tokens)[:, None] & (penalties.stop_ids >= 0)
    added.scatter_add_(1, penalties.stop_ids.clamp(min=0), torch.where(forbid, float("-inf"), 0.0))
    return added, torch.where(occurred, penalties.repetition[:, None], 1.0)
