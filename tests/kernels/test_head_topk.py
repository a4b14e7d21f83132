"""Draft top-K against float64 logits, and its tensor-parallel merge."""

from __future__ import annotations

import pytest
import torch
from dflash_kernels import Race, draft_topk, merge_topk
from dflash_kernels._dispatch import interpreting
from dflash_kernels.gumbel.reference import race_noise_torch
from dflash_kernels.head_topk.reference import stable_topk

# The interpreter pays for every sorting stage in Python: one vocabulary tile and a bit is enough there.
VOCAB = 150 if interpreting() else 5000


def exact(hidden: torch.Tensor, head: torch.Tensor, k: int, cap: float = 0.0):
    logits = hidden.double() @ head.double().t()
    if cap > 0:
        logits = cap * torch.tanh(logits / cap)
    values, ids = logits.sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids[:, :k], logits.logsumexp(1)


@pytest.mark.parametrize(
    ("T", "H", "k", "dtype", "cap"),
    [
        (3, 40, 4, torch.float32, 0.0),
        (1, 64, 1, torch.float32, 2.0),
        (2, 64, 3, torch.bfloat16, 0.0),
        (2, 80, 2, torch.float16, 3.0),
    ],
)
def test_equals_float64(backend, T, H, k, dtype, cap):
    hidden = torch.randn(T, H).to(dtype)
    head = (torch.randn(VOCAB, H) / H**0.5).to(dtype)
    values, ids, log_z = (
        t.cpu()
        for t in backend.draft_topk(hidden.to(backend.device), head.to(backend.device), k, logit_cap=cap)
    )
    want, want_ids, want_z = exact(hidden, head, k, cap)
    # bf16 logits enter the CPU path's normaliser only, rounded; candidates are always float32.
    torch.testing.assert_close(values.double(), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_z.double(), want_z, atol=2e-3 if dtype == torch.bfloat16 else 5e-4, rtol=0)
    assert torch.equal(ids, want_ids)


def test_ties_take_the_lower_id(backend):
    """Integer logits from a small set: most candidates tie, within a tile and across tiles."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    head = torch.randint(-3, 4, (VOCAB, 2)).float()
    values, ids, _ = backend.draft_topk(hidden.to(backend.device), head.to(backend.device), 4)
    want, want_ids, _ = exact(hidden, head, 4)
    assert torch.equal(ids.cpu(), want_ids)
    assert torch.equal(values.cpu().double(), want)


def test_strided_rows(backend):
    """Hidden states and heads may be column slices of wider tensors."""
    hidden = torch.randn(2, 96, device=backend.device)[:, 16:48]
    head = torch.randn(VOCAB, 40, device=backend.device)[:, 8:]
    _, ids, _ = backend.draft_topk(hidden, head, 2)
    assert torch.equal(ids.cpu(), exact(hidden.cpu(), head.cpu(), 2)[1])


def test_shards_merge_to_the_whole():
    T, V, k = 3, VOCAB, 4
    hidden, head = torch.randn(T, 24), torch.randn(V, 24)
    cut = V // 3
    whole = draft_topk(hidden, head, k)
    bounds = [(0, cut), (cut, 2 * cut + 1), (2 * cut + 1, V)]
    # The last shard is padded with rows that would win if they counted.
    parts = []
    for start, end in bounds:
        shard = torch.cat([head[start:end], hidden[:1] * 100])
        parts.append(draft_topk(hidden, shard, k, vocab_start=start, num_valid=end - start, normalize=False))
    logprobs, ids, log_z = merge_topk(*(torch.stack(p) for p in zip(*parts, strict=True)))
    assert torch.equal(ids, whole[1])
    torch.testing.assert_close(logprobs, whole[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_z, whole[2], atol=1e-5, rtol=1e-5)


def race_of(rows: int, vocab: int, device: str = "cpu") -> Race:
    """Every other row perturbed, temperatures between 0.5 and 2."""
    seeds, positions = torch.randint(0, 1 << 62, (rows,)), torch.randint(0, 5000, (rows,))
    return Race(
        seeds=seeds.to(device),
        positions=positions.to(device),
        scale=torch.linspace(0.5, 2.0, rows).to(device),
        strength=(torch.arange(rows) % 2 == 0).float().to(device),
        noise=race_noise_torch(seeds, positions, vocab).to(device),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_race_ranks_the_whole_vocabulary(backend, dtype):
    T, H, k = 3, 48, 4
    hidden = torch.randn(T, H).to(dtype)
    head = (torch.randn(VOCAB, H) / H**0.5).to(dtype)
    race = race_of(T, VOCAB, backend.device)
    values, ids, log_z = (
        t.cpu() for t in backend.draft_topk(hidden.to(backend.device), head.to(backend.device), k, race=race)
    )
    scaled = (hidden.double() @ head.double().t()) * race.scale.cpu()[:, None]
    g = -race.noise.cpu().double().log()
    want, want_ids = (scaled + race.strength.cpu()[:, None] * g).sort(1, descending=True)
    torch.testing.assert_close(values.double(), want[:, :k], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_z.double(), scaled.logsumexp(1), atol=4e-3, rtol=0)
    assert torch.equal(ids, want_ids[:, :k])
    torch.testing.assert_close(race.gumbel(ids.to(backend.device)).cpu().double(), g.gather(1, ids))


def test_shards_of_a_race_merge_to_the_whole():
    """A shard's noise is that of its global token ids."""
    T, V, k = 4, VOCAB, 3
    hidden, head = torch.randn(T, 24), torch.randn(V, 24)
    race = race_of(T, V)
    whole = draft_topk(hidden, head, k, race=race)
    cut = V // 3
    parts = [
        draft_topk(hidden, head[start:end], k, vocab_start=start, normalize=False, race=race)
        for start, end in ((0, cut), (cut, V))
    ]
    values, ids, log_z = merge_topk(*(torch.stack(p) for p in zip(*parts, strict=True)))
    assert torch.equal(ids, whole[1])
    torch.testing.assert_close(values, whole[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(log_z, whole[2], atol=1e-5, rtol=1e-5)


def test_merge_takes_the_lower_id_in_ties():
    values = torch.tensor([[[2.0, 1.0]], [[2.0, 2.0]]])
    ids = torch.tensor([[[9, 1]], [[12, 4]]])
    logprobs, merged, log_z = merge_topk(values, ids, torch.tensor([[3.0], [3.0]]))
    assert merged.tolist() == [[4, 9]]
    assert logprobs.tolist() == (torch.full((1, 2), 2.0) - log_z).tolist()


@pytest.mark.skipif(interpreting(), reason="a helper of the torch path")
@pytest.mark.parametrize("V", [64, 1000, 4097, 9999])
def test_stable_topk_equals_a_stable_sort(V):
    values = torch.randint(-40, 40, (6, V)).float()
    values[0, : V // 2] = float("-inf")
    got, ids = stable_topk(values, 16)
    want, want_ids = values.sort(dim=1, descending=True, stable=True)
    assert torch.equal(got, want[:, :16])
    assert torch.equal(ids, want_ids[:, :16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_row_keeps_to_itself(backend, dtype):
    """Ids must stay ids: they are looked up in the embedding whatever the drafter said."""
    hidden, head = torch.randn(6, 32).to(dtype), torch.randn(VOCAB, 32).to(dtype)
    dev = backend.device
    whole = backend.draft_topk(hidden.to(dev), head.to(dev), 4)
    hidden[1:5, 5] = torch.tensor([float("nan"), -float("nan"), float("inf"), float("-inf")]).to(dtype)
    values, ids, log_z = backend.draft_topk(hidden.to(dev), head.to(dev), 4)
    assert int(ids.min()) >= 0
    assert int(ids.max()) < VOCAB
    assert bool((values - log_z[:, None])[1:5].isnan().all())
    for got, want in zip((values, ids, log_z), whole, strict=True):
        assert torch.equal(got[[0, 5]], want[[0, 5]])


@pytest.mark.parametrize("k", [0, 33, 6])
def test_rejects_k(k):
    with pytest.raises(ValueError, match="k must be"):
        draft_topk(torch.zeros(1, 4), torch.zeros(40 if k > 10 else 5, 4), k)
