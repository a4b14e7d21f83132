"""AdamW, and Muon for the matrices, over bf16 parameters with fp32 master weights and states."""

from __future__ import annotations

import math

import torch
from torch import nn


class MasterAdamW:
    """Decoupled weight decay on matrices only; gradients are clipped by their global norm."""

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        clip: float = 1.0,
    ) -> None:
        self.params = list(model.parameters())
        self.betas, self.eps, self.clip = betas, eps, clip
        self.decay = [weight_decay if p.ndim >= 2 else 0.0 for p in self.params]
        self.master = [p.detach().float().clone() for p in self.params]
        self.m = [torch.zeros_like(x) for x in self.master]
        self.v = [torch.zeros_like(x) for x in self.master]
        self.count = 0

    @torch.no_grad()
    def step(self, rate: float) -> float:
        """One update at learning rate ``rate``; returns the gradient norm before clipping."""
        grads = [p.grad.float() for p in self.params]
        norm = float(torch.stack([g.norm() for g in grads]).norm())
        if not math.isfinite(norm):
            return norm
        torch._foreach_mul_(grads, min(1.0, self.clip / (norm + 1e-12)))
        self.count += 1
        b1, b2 = self.betas
        self._update(grads, rate, math.sqrt(1 - b2**self.count) / (1 - b1**self.count))
        for p, x in zip(self.params, self.master, strict=True):
            p.copy_(x)
            p.grad = None
        return norm

    def _update(self, grads: list[torch.Tensor], rate: float, unbias: float) -> None:
        """Move the float32 masters; ``unbias`` corrects the rate for the moments' start at zero."""
        b1, b2 = self.betas
        torch._foreach_lerp_(self.m, grads, 1 - b1)
        torch._foreach_mul_(self.v, b2)
        torch._foreach_addcmul_(self.v, grads, grads, 1 - b2)
        denominators = torch._foreach_sqrt(self.v)
        torch._foreach_add_(denominators, self.eps)
        torch._foreach_mul_(self.master, [1 - rate * d for d in self.decay])
        torch._foreach_addcdiv_(self.master, self.m, denominators, -rate * unbias)

    def state(self) -> dict:
        return {"master": self.master, "m": self.m, "v": self.v, "count": self.count}

    @torch.no_grad()
    def load(self, state: dict) -> None:
        for name in ("master", "m", "v"):
            for mine, theirs in zip(getattr(self, name), state[name], strict=True):
                mine.copy_(theirs)
        self.count = int(state["count"])
        for p, x in zip(self.params, self.master, strict=True):
            p.copy_(x)


# Quintic iterations towards the polar factor, tuned per step (Amsel et al., arXiv 2505.16932).
_POLAR = (
    (8.2873, -23.5959, 17.3004),
    (4.1071, -2.9478, 0.5448),
    (3.9486, -2.9089, 0.5518),
    (3.3184, -2.4885, 0.5100),
)


def orthogonalize(g: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Nearest (semi-)orthogonal matrix to ``g`` [m, n], up to a few per cent per singular value."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = (x / (x.norm() * 1.01 + 1e-7)).to(dtype)
    for a, b, c in _POLAR:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if g.shape[0] > g.shape[1] else x).float()


class MasterMuon(MasterAdamW):
    """Muon (momentum, orthogonalised updates) on matrices, AdamW on the rest.

    Updates are scaled to the RMS that AdamW's have (0.2 sqrt(max side)), so rates carry over.
    One update costs about as much as a 128-block pass; it pays where steps are few.
    """

    momentum = 0.95

    def _update(self, grads: list[torch.Tensor], rate: float, unbias: float) -> None:
        b1, b2 = self.betas
        for p, g, x, m, v, decay in zip(
            self.params, grads, self.master, self.m, self.v, self.decay, strict=True
        ):
            if p.ndim == 2:
                m.lerp_(g, 1 - self.momentum)
                update = orthogonalize(g.lerp(m, self.momentum), p.dtype)
                x.mul_(1 - rate * decay).add_(update, alpha=-rate * 0.2 * math.sqrt(max(p.shape)))
            else:
                m.lerp_(g, 1 - b1)
                v.mul_(b2).addcmul_(g, g, value=1 - b2)
                x.addcdiv_(m, v.sqrt().add_(self.eps), value=-rate * unbias)


def learning_rate(peak: float, progress: float, warmup: float = 0.04, floor: float = 0.0) -> float:
    """Linear warm-up over the first ``warmup`` of the run, then a cosine to ``floor * peak``."""
    if progress < warmup:
        return peak * max(progress, 1e-3) / warmup
    rest = min(1.0, (progress - warmup) / (1 - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * rest)))
