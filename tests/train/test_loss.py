"""The chunked loss against plain autograd."""

import pytest
import torch
from torch.nn import functional as F

from sglang_dflash.train.loss import Head, LossSettings, block_loss, restricted_head


def problem(seed=0, N=5, L=4, H=16, V=50):
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, L, H, generator=rng, requires_grad=True)
    last = torch.randn(N, L, H, generator=rng)
    weight = torch.randn(V, H, generator=rng)
    labels = torch.randint(0, V, (N, L), generator=rng)
    labels[1, 2:] = -1
    w = torch.exp(-torch.arange(L) / 3.0).expand(N, L) * (labels >= 0)
    return hidden, last, weight, labels, w


@pytest.mark.parametrize("kl", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_equals_autograd(kl, chunk):
    hidden, last, weight, labels, w = problem()
    loss, report = block_loss(hidden, labels, w, Head(weight), LossSettings(kl=kl, chunk_bytes=chunk), last)
    (got,) = torch.autograd.grad(loss, hidden)
    z = (hidden @ weight.T).log_softmax(-1)
    ce = -z.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    t = (last @ weight.T).log_softmax(-1)
    want = ((w * ((1 - kl) * ce + kl * (t.exp() * (t - z)).sum(-1))).sum()) / w.sum()
    (grad,) = torch.autograd.grad(want, hidden)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(got, grad)
    right = (z.argmax(-1) == labels) & (labels >= 0)
    assert report.accept == pytest.approx(float((1 + right.long().cumprod(1).sum(1)).float().mean()))


def test_restricted_head_with_every_id_is_the_full_head():
    hidden, _, weight, labels, w = problem()
    used = torch.arange(30)
    head = restricted_head(weight, used, 20, torch.Generator().manual_seed(0))
    full, _ = block_loss(hidden, labels, w, Head(weight), LossSettings())
    part, _ = block_loss(hidden, labels, w, head, LossSettings())
    torch.testing.assert_close(part, full)


def test_sampled_rows_stand_for_the_rest():
    """The partition function from corpus ids plus sampled others is unbiased-ish, not too small."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(4000, 8, generator=rng) * 0.3
    h = torch.randn(3, 8, generator=rng)
    head = restricted_head(weight, torch.arange(200), 1000, rng)
    want = F.linear(h, weight).logsumexp(-1)
    got = (F.linear(h, head.weight) + head.bonus).logsumexp(-1)
    torch.testing.assert_close(got, want, atol=0.1, rtol=0)


def test_tree_term_weighs_only_reachable_positions():
    hidden, _, weight, labels, w = problem(V=50)
    plain, _ = block_loss(hidden, labels, w, Head(weight), LossSettings(tree=0.0))
    base = torch.autograd.grad(plain, hidden)[0]
    extra, _ = block_loss(hidden, labels, w, Head(weight), LossSettings(tree=1.0, tree_k=3))
    ratio = torch.autograd.grad(extra, hidden)[0].norm(dim=-1) / base.norm(dim=-1).clamp_min(1e-9)
    z = hidden @ weight.T
    rank = (z > z.gather(-1, labels.clamp_min(0)[..., None])).sum(-1)
    within = (rank < 3) & (labels >= 0)
    reach = torch.cat([torch.ones(5, 1, dtype=torch.bool), within[:, :-1]], 1).long().cumprod(1).bool()
    expected = torch.where(reach, 2.0, 1.0)
    valid = labels >= 0
    torch.testing.assert_close(ratio[valid], expected[valid], atol=1e-3, rtol=1e-3)
