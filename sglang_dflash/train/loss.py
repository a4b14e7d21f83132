"""The head's loss in chunks: no [tokens x vocab] tensor outlives its chunk.

The target's head is frozen, so the gradient stops at the drafter's hidden state and can be
made in the forward pass: for cross-entropy and for KL alike it is ``softmax(z) - wanted``
times the row's weight, projected back through the head.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F


@dataclass
class LossSettings:
    """gamma: decay of position k's weight, exp(-(k - 1) / gamma) (paper: 7 at B16, 5 at B10, 4 at B8).

    kl: share of the target's own distribution in what is wanted (0: the token alone)
    tree: extra weight on positions all of whose predecessors have the right token among
        the ``tree_k`` best, the only ones a draft tree can reach
    confidence: extra weight that pushes already right top tokens towards certainty
    """

    gamma: float = 4.0
    kl: float = 0.0
    tree: float = 0.0
    tree_k: int = 8
    confidence: float = 0.0
    chunk_bytes: int = 192 << 20


@dataclass
class Head:
    """The head's rows that training looks at.

    weight: [V', hidden]; ``index`` [vocab] maps ids to rows (-1: not among them), None: all.
    ``bonus`` [V'] fp32 is added to the logits: log of how many left-out rows a sampled one stands for.
    """

    weight: torch.Tensor
    index: torch.Tensor | None = None
    bonus: torch.Tensor | None = None

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return ids if self.index is None else self.index[ids]


@dataclass
class LossReport:
    loss: float = 0.0
    right: list[float] = field(default_factory=list)  # per position: share of top-1 right, given valid
    accept: float = 0.0  # mean over blocks of 1 + leading right tokens (random anchors)


def restricted_head(head: torch.Tensor, used: torch.Tensor, negatives: int, rng: torch.Generator) -> Head:
    """A head of the ``used`` ids plus ``negatives`` random others, each standing for its share.

    A full head costs more than a drafter layer per token; ids the corpus never holds only
    matter as competitors, and a sample of them, corrected by log(share), keeps them down.
    """
    vocab = head.shape[0]
    others = torch.ones(vocab, dtype=torch.bool)
    others[used] = False
    others = others.nonzero()[:, 0]
    picked = others[torch.randperm(len(others), generator=rng)[:negatives]]
    ids = torch.cat([used, picked])
    index = torch.full((vocab,), -1, dtype=torch.long)
    index[ids] = torch.arange(len(ids))
    bonus = torch.zeros(len(ids))
    if len(picked):
        bonus[len(used) :] = float(torch.tensor(len(others) / len(picked)).log())
    device = head.device
    return Head(head[ids.to(device)].contiguous(), index.to(device), bonus.to(device))


def block_loss(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    head: Head,
    settings: LossSettings,
    target_last: torch.Tensor | None = None,
) -> tuple[torch.Tensor, LossReport]:
    """Weighted mean loss over valid positions, differentiable in ``hidden``.

    hidden: [N, L, hidden] drafter states of L = B - 1 masked slots of N blocks
    labels: [N, L] int64, -1 where there is no such token
    weight: [N, L] fp32 base weights (0 where not trained)
    target_last: [N, L, hidden] the target's last hidden state *before* each label (for KL)
    """
    with torch.no_grad():
        grad, report = _gradient(hidden.detach(), labels, weight, head, settings, target_last)
    return _Given.apply(hidden, grad, report.loss), report


class _Given(torch.autograd.Function):
    """A scalar whose gradient was already made."""

    @staticmethod
    def forward(ctx, hidden, grad, loss):
        ctx.save_for_backward(grad)
        return hidden.new_tensor(loss, dtype=torch.float32)

    @staticmethod
    def backward(ctx, up):
        (grad,) = ctx.saved_tensors
        return grad * up.to(grad.dtype), None, None


def _gradient(hidden, labels, weight, head: Head, s: LossSettings, target_last):
    N, L, H = hidden.shape
    V = head.weight.shape[0]
    valid = labels >= 0
    total = weight.sum().clamp_min(1e-6)
    grad = torch.empty_like(hidden)
    # Chunks hold whole blocks: reachability looks along a block.
    step = max(1, s.chunk_bytes // (V * 4 * L))
    loss = torch.zeros((), dtype=torch.float64)
    right = torch.zeros(L, dtype=torch.float64)
    accepted = torch.zeros((), dtype=torch.float64)
    for at in range(0, N, step):
        part = slice(at, at + step)
        h, ok = hidden[part], valid[part]
        n = h.shape[0]
        z = F.linear(h.reshape(n * L, H), head.weight).float()
        if head.bonus is not None:
            z += head.bonus
        rows = head.rows(labels[part].clamp_min(0)).view(-1).clamp_min(0)  # absent labels weigh nothing
        label_z = z.gather(1, rows[:, None])
        top = (z.amax(-1) <= label_z[:, 0]).view(n, L) & ok
        w = weight[part].clone()
        if s.tree:
            within = ((z > label_z).sum(-1) < s.tree_k).view(n, L) & ok
            before = torch.cat([within.new_ones(n, 1), within[:, :-1]], 1).cumprod(1)
            w = w * (1 + s.tree * before)
        if s.confidence:
            w = w * (1 + s.confidence * top)
        w = w.view(-1)
        z.sub_(z.logsumexp(-1, keepdim=True))  # log-probabilities in place
        ce = -z.gather(1, rows[:, None])[:, 0]
        per_row = (1 - s.kl) * ce
        grad_z = z.exp()
        if s.kl and target_last is not None:
            t = F.linear(target_last[part].reshape(n * L, H), head.weight).float()
            if head.bonus is not None:
                t += head.bonus
            t.sub_(t.logsumexp(-1, keepdim=True))
            p = t.exp()
            per_row = per_row + s.kl * (p * t.sub_(z)).sum(-1)
            grad_z.sub_(p, alpha=s.kl)
        grad_z.scatter_add_(1, rows[:, None], grad_z.new_full((n * L, 1), -(1 - s.kl)))
        grad_z.mul_((w / total)[:, None])
        grad[part] = (grad_z.to(hidden.dtype) @ head.weight).view(n, L, H)
        loss += (per_row * w).sum().double().cpu() / float(total)
        right += top.sum(0).double().cpu()
        accepted += (1 + top.long().cumprod(1).sum(1)).sum().double().cpu()
    seen = valid.sum(0).double().cpu().clamp_min(1)
    return grad, LossReport(float(loss), (right / seen).tolist(), float(accepted) / max(N, 1))
