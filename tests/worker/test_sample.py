"""Sampling a tree emits the target's distribution, token by token, off-spine paths included."""

from __future__ import annotations

import itertools

import pytest
import torch
from dflash_kernels import accept_tree, build_tree, draft_topk, race_noise

from sglang_dflash.step.noise import StepNoise
from sglang_dflash.step.sampling import (
    SamplingParams,
    filter_probs,
    filtered_probs,
    sample_rows,
)
from sglang_dflash.worker.accept.sample import sample_nodes
from sglang_dflash.worker.draft.couple import POOL, couple, race_for

VOCAB = 6


def params(
    rows: int, *, temperature: float = 1.0, top_k: int = 1 << 30, top_p: float = 1.0, min_p: float = 0.0
):
    return SamplingParams(
        torch.full((rows,), temperature),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        all_greedy=top_k == 1,
        any_top_k=top_k < VOCAB,
        any_top_p=top_p < 1.0,
        any_min_p=min_p > 0.0,
        seeds=torch.arange(rows),
    )


def reference(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    """One row, written as the words say it."""
    probs = torch.softmax(logits.double() / temperature, 0)
    order = sorted(range(VOCAB), key=lambda token: -float(probs[token]))
    out, before = torch.zeros(VOCAB, dtype=torch.float64), 0.0
    for rank, token in enumerate(order):
        kept = rank < top_k and before <= top_p and probs[token] >= probs[order[0]] * min_p
        if kept:
            out[token] = probs[token]
        before += float(probs[token])
    return out / out.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [2, 4, VOCAB])
@pytest.mark.parametrize("top_p", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.2])
def test_filters(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(5, VOCAB)
    got = filtered_probs(logits, params(5, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    got = got / got.sum(-1, keepdim=True)
    for row in range(5):
        want = reference(logits[row], temperature, top_k, top_p, min_p)
        torch.testing.assert_close(got[row].double(), want, atol=1e-6, rtol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Each row alone gives what it gives among rows with other filters, on both ways through a row."""
    vocab, rows = 3000, 8
    logits = torch.randn(rows, vocab) * 4
    logits[:, 100:140] = logits[:, 99:100]  # ties
    mixed = SamplingParams(
        temperature=torch.tensor([0.5, 0.7, 1.0, 1.0, 1.0, 1.5, 2.0, 1.0]),
        top_k=torch.tensor([1, 50, 1 << 30, 700, 1 << 30, 7, 1 << 30, 1 << 30]),
        top_p=torch.tensor([1.0, 0.9, 0.5, 0.999, 1.0, 1.0, 0.9999, 1.0]),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.05, 0.0, 0.0, 0.0]),
        all_greedy=False,
        any_top_k=True,
        any_top_p=True,
        any_min_p=True,
    )
    together = filtered_probs(logits, mixed)
    sizes = (together > 0).sum(1).tolist()
    assert max(sizes) == vocab, "no row without a filter"
    assert any(256 < size < vocab for size in sizes), "no row needed the full sort"
    for row in range(rows):
        at = slice(row, row + 1)
        alone = SamplingParams(
            mixed.temperature[at],
            mixed.top_k[at],
            mixed.top_p[at],
            mixed.min_p[at],
            all_greedy=False,
            any_top_k=bool(mixed.top_k[row] < vocab),
            any_top_p=bool(mixed.top_p[row] < 1),
            any_min_p=bool(mixed.min_p[row] > 0),
        )
        assert torch.equal(filtered_probs(logits[at], alone)[0], together[row])


def test_ties_at_the_edge_of_the_filter_keep_the_lower_ids() -> None:
    probs = torch.full((1, 8), 0.125)
    kept = filter_probs(probs, params(1, top_k=3)) > 0
    assert kept.tolist() == [[True] * 3 + [False] * 5]


def noise_for(rows: int, depths: int = 1, position: int = 0) -> StepNoise:
    return StepNoise(torch.arange(rows), torch.full((rows,), position), depths)


def test_greedy_rows_in_a_sampled_batch() -> None:
    logits = torch.randn(64, VOCAB)
    mixed = params(64)
    mixed.top_k[::2] = 1
    mixed.any_top_k = True
    got = sample_nodes(logits, mixed, noise_for(64), torch.zeros(64, 1, dtype=torch.int32))
    assert torch.equal(got[::2], logits.argmax(-1)[::2])
    assert not torch.equal(got[1::2], logits.argmax(-1)[1::2])


def test_a_node_takes_the_token_that_plain_decoding_takes() -> None:
    """A node at depth d of a request at prefix p samples index p + d + 1, whatever its row and batch."""
    bs, depths, vocab = 3, 4, 300
    depth = torch.tensor([[0, 1, 1, 2, 3], [0, 1, 2, 2, 2], [0, 1, 2, 3, 3]], dtype=torch.int32)
    nodes = depth.shape[1]
    prefix = torch.tensor([10, 500, 31])
    seeds = torch.tensor([7, 8, 7])
    logits = torch.randn(bs * nodes, vocab) * 2
    settings = params(bs, temperature=0.8, top_p=0.95)
    settings.seeds = seeds
    got = sample_nodes(logits, settings, StepNoise(seeds, prefix, depths), depth).view(bs, nodes)
    for b in range(bs):
        for n in range(nodes):
            one = params(1, temperature=0.8, top_p=0.95)
            one.seeds = seeds[b : b + 1]
            row = logits[b * nodes + n][None]
            position = prefix[b : b + 1] + depth[b, n] + 1
            probs = (row / 0.8).softmax(-1)
            assert int(sample_rows(probs, one, position)) == int(got[b, n])


def test_the_step_computes_a_row_once_and_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []

    def counted(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
        computed.extend(positions.tolist())
        return race_noise(seeds, positions, vocab)

    monkeypatch.setattr("sglang_dflash.step.noise.race_noise", counted)
    noise = StepNoise(torch.tensor([3, 4]), torch.tensor([10, 20]), 3)
    groups = noise.groups(torch.tensor([[0, 2, 2], [1, 1, 0]]))
    assert groups.tolist() == [0, 2, 2, 4, 4, 3]
    table = noise.table(50, groups)
    assert table is not None
    assert table.shape == (6, 50)
    assert sorted(computed) == [11, 13, 21, 22]
    want = race_noise(torch.tensor([3, 3, 3, 4, 4, 4]), torch.tensor([11, 12, 13, 21, 22, 23]), 60)
    assert torch.equal(table[groups], want[groups, :50])
    everything = noise.table(50, torch.arange(6).view(2, 3))
    assert everything is not None
    assert torch.equal(everything, want[:, :50])
    assert sorted(computed) == [11, 12, 13, 21, 22, 23]
    # A wider vocabulary has the same noise for the ids that both hold.
    wider = noise.table(60, groups)
    assert wider is not None
    assert torch.equal(wider[groups], want[groups])


def test_greedy_batches_have_no_noise() -> None:
    assert StepNoise.of(params(2, top_k=1), torch.tensor([1, 2]), 4) is None
    assert StepNoise.of(None, torch.tensor([1, 2]), 4) is None
    unseeded = params(2)
    unseeded.seeds = None
    with pytest.raises(RuntimeError, match="without seeds"):
        StepNoise.of(unseeded, torch.tensor([1, 2]), 4)


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def coupled_candidates(
    drafted: torch.Tensor, noise: StepNoise, settings: SamplingParams, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the draft stage makes of a head that gives logits ``drafted`` [L, V] to every request."""
    depth, vocab = drafted.shape
    bs = len(settings.top_k)
    race = race_for(noise, settings, depth, vocab)
    # A head of the identity: hidden states are the logits.
    hidden = drafted.repeat(bs, 1)
    values, ids, _ = draft_topk(hidden, torch.eye(vocab), min(vocab, POOL), race=race)
    found = couple(values, ids, race, settings.per_row(depth), top)
    return found.chances.view(bs, depth, top), found.ids.view(bs, depth, top)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.2}], ids=str)
def test_a_perfect_drafter_names_every_sample(filters: dict[str, float]) -> None:
    """q = p: the sample is the best candidate, filters included, save where the doubt in q decides."""
    runs, depth = 300, 4
    logits = torch.randn(depth + 1, 40) * 2
    settings = params(runs, temperature=1.3, **filters)
    settings.any_top_k = "top_k" in filters
    noise = noise_for(runs, depth + 1, position=9)
    _, ids = coupled_candidates(logits[:depth], noise, settings, 8)
    depths = torch.arange(depth).expand(runs, -1)
    chosen = sample_nodes(logits[:depth].repeat(runs, 1), settings, noise, depths).view(runs, depth)
    hit = ids == chosen[:, :, None]
    uncoupled = float((chosen == logits[:depth].argmax(-1)).float().mean())
    assert float(hit[:, :, 0].float().mean()) > uncoupled + 0.15
    assert float(hit[:, :, :3].any(2).float().mean()) > 0.98


def test_greedy_requests_keep_the_drafters_order() -> None:
    drafted = torch.randn(3, 40)
    settings = params(4)
    settings.top_k[1::2], settings.any_top_k = 1, True
    logprobs, ids = coupled_candidates(drafted, noise_for(4, 4), settings, 5)
    want = drafted.log_softmax(-1).topk(5)
    for row in (1, 3):
        assert torch.equal(ids[row], want.indices)
        torch.testing.assert_close(logprobs[row], want.values)
    assert not torch.equal(ids[0], want.indices)
    assert (logprobs.diff(dim=2) <= 0).all()
    assert (logprobs.exp().sum(2) <= 1 + 1e-5).all(), "chances of distinct tokens exceed one"


def test_candidates_outside_the_filter_have_no_chance() -> None:
    drafted = torch.randn(2, 40) * 2
    settings = params(50, top_k=3)
    settings.any_top_k = True
    logprobs, ids = coupled_candidates(drafted, noise_for(50, 3), settings, 6)
    best = drafted.topk(3).indices
    for row in range(50):
        for depth in range(2):
            alive = ids[row, depth][logprobs[row, depth] > float("-inf")]
            assert sorted(alive.tolist()) == sorted(best[depth].tolist())


@pytest.mark.parametrize("coupled", [False, True], ids=["uncoupled", "coupled"])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_emitted_tokens_follow_the_target_at_every_depth(top_p: float, coupled: bool) -> None:
    """An order-2 Markov target; every prefix of depth 1..4 must occur as often as the target says.

    The tree covers likely and unlikely branches, so most accepted paths leave the spine. Drafts that
    look at the noise must not bias what is emitted.
    """
    torch.manual_seed(7)
    runs, nodes, depth, top = 40_000, 12, 3, 2
    transition = torch.randn(VOCAB, VOCAB) * 1.2
    one = params(1, top_p=top_p)
    chance = torch.stack([filtered_probs(transition[i : i + 1], one)[0] for i in range(VOCAB)])
    chance = chance / chance.sum(-1, keepdim=True)

    drafted = torch.log_softmax(torch.randn(depth, VOCAB), -1)
    anchor = torch.zeros(runs, dtype=torch.int64)
    noise, settings = noise_for(runs, depth + 1, position=40), params(runs, top_p=top_p)
    if coupled:
        candidates = coupled_candidates(drafted, noise, settings, top)
    else:
        candidates = tuple(t.expand(runs, -1, -1).contiguous() for t in drafted.topk(top))
    tree = build_tree(anchor, *candidates, num_nodes=nodes)
    logits = transition[tree.tokens]
    chosen = sample_nodes(logits.view(-1, VOCAB), settings, noise, tree.depth)
    chosen = chosen.view(runs, nodes)
    accepted = accept_tree(tree, chosen, torch.zeros(runs, dtype=torch.int64), max_depth=depth)
    assert (accepted.path.clamp(min=0).max(1).values > depth).any(), "no path left the spine"

    # A run that accepted a tokens says nothing of depth a + 1: continue it from the target itself.
    tokens = accepted.out_tokens.clone()
    for d in range(depth + 1):
        previous = anchor if d == 0 else tokens[:, d - 1]
        fresh = torch.multinomial(chance[previous], 1)[:, 0]
        tokens[:, d] = torch.where(accepted.accept_lens > d, tokens[:, d], fresh)
    for d in range(1, depth + 2):
        prefixes = list(itertools.product(range(VOCAB), repeat=d))
        codes = sum(tokens[:, i] * VOCAB ** (d - 1 - i) for i in range(d))
        counts = torch.bincount(codes, minlength=len(prefixes)).double()
        probs = torch.ones(1, dtype=torch.float64)
        table = chance.double()
        probs = table[0].clone()
        for _ in range(d - 1):
            probs = (probs.view(-1, 1) * table[torch.arange(probs.numel()) % VOCAB]).reshape(-1)
        possible = probs > 0
        assert counts[~possible].sum() == 0, "a filtered token was emitted"
        # Bins with few expected counts are pooled, as the chi-square approximation asks.
        large = possible & (probs * runs >= 8)
        pooled_counts = torch.cat([counts[large], counts[possible & ~large].sum()[None]])
        pooled_probs = torch.cat([probs[large], probs[possible & ~large].sum()[None]])
        keep = pooled_probs * runs >= 8
        statistic = chi_square(pooled_counts[keep], pooled_probs[keep])
        freedom = int(keep.sum()) - 1
        # 5 sigma of the chi-square's normal approximation.
        assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 5, (d, statistic, freedom)
