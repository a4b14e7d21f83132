"""DFlash 2's selector as edges of the lattice, against SGLang's own scores and walk."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dflash_kernels import build_tree
from sglang.srt.models import dflash

from sglang_dflash.platform.model_mends import _COMPILED, _RADIX, _run_on_a_cpu
from sglang_dflash.step.noise import StepNoise
from sglang_dflash.step.sampling import SamplingParams
from sglang_dflash.step.selector import Selector, edges_of
from sglang_dflash.step.width import Width
from sglang_dflash.worker.draft import DraftStage

BS, BLOCK, TOP, HIDDEN, VOCAB, RANK = 3, 6, 5, 24, 90, 8
DEPTH = BLOCK - 1


@pytest.fixture(scope="module")
def module() -> Any:
    """SGLang's selector with random tables, strong enough to change the order of the candidates."""
    _run_on_a_cpu()
    made = dflash.CandidateSelector(hidden_size=HIDDEN, vocab_size=VOCAB, state_rank=RANK, top_k=TOP)
    generator = torch.Generator().manual_seed(5)
    for weight in made.parameters():
        weight.data.copy_(torch.randn(weight.shape, generator=generator))
    return made


class Bridge:
    """A drafter whose states are random and whose head is random."""

    def __init__(self, module: Any, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.module = module
        self.hidden = torch.randn(BS, BLOCK, HIDDEN, generator=generator)
        self.head = torch.randn(VOCAB, HIDDEN, generator=generator)

    def selector(self) -> Any:
        return self.module

    def vocab_size(self) -> int:
        return VOCAB

    def run_drafter(self, batch: object, step: Any, ids: torch.Tensor, positions: torch.Tensor) -> Any:
        return self.hidden

    def head_topk(self, hidden: torch.Tensor, k: int, race: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        from dflash_kernels import draft_topk

        return draft_topk(hidden, self.head, k, race=race)[:2]


def step(**more: Any) -> Any:
    known = {"noise": None, "sampling": None}
    return SimpleNamespace(
        batch_size=BS,
        width=Width(nodes=16, block=BLOCK),
        anchor=torch.tensor([3, 4, 77]),
        prefix_lens=torch.tensor([7, 20, 9]),
        **known | more,
    )


def test_sglang_still_has_what_a_cpu_does_without(module: Any) -> None:
    """Renamed, it would be compiled in the first request, or refused there, without a word at the start."""
    assert getattr(dflash, _RADIX) is None
    for name in _COMPILED:
        assert not hasattr(getattr(dflash, name), "_torchdynamo_orig_callable")


@pytest.mark.parametrize("seed", range(8))
def test_the_spine_is_sglangs_walk(module: Any, seed: int) -> None:
    bridge = Bridge(module, seed)
    stage = DraftStage(bridge, mask_token_id=0, top_k=16)  # type: ignore[arg-type]
    got = stage(step(), None)
    assert got.edges is not None
    assert got.ids.shape == (BS, DEPTH, TOP), "as many candidates as the selector orders"
    states = bridge.hidden[:, 1:]
    unary = (states @ bridge.head.T).gather(2, got.ids)
    scores = module.build_lattice(
        candidate_ids=got.ids, unary_logits=unary, hidden_states=states, anchor_token_ids=step().anchor
    )
    walk, _ = module.sample_path(
        candidate_ids=got.ids,
        scores=scores,
        uniforms=torch.rand(BS, DEPTH),
        temperatures=torch.ones(BS),
        greedy_mask=torch.ones(BS, dtype=torch.bool),
    )
    tree = build_tree(step().anchor, got.logprobs, got.ids, num_nodes=BLOCK, keep_spine=True, edges=got.edges)
    assert torch.equal(tree.tokens[:, 1:], walk)
    assert not torch.equal(walk, got.ids[:, :, 0]), "the selector changed nothing"
    # Given its parent a position's candidates hold what the drafter gives them together.
    torch.testing.assert_close(got.edges.logsumexp(-1)[:, :, 0], got.logprobs.logsumexp(-1))
    torch.testing.assert_close(got.edges.softmax(-1), scores.softmax(-1))


def sampling(top_k: list[int], temperature: list[float]) -> SamplingParams:
    return SamplingParams(
        temperature=torch.tensor(temperature),
        top_k=torch.tensor(top_k),
        top_p=torch.ones(BS),
        min_p=torch.zeros(BS),
        all_greedy=False,
        any_top_k=False,
        any_top_p=False,
        any_min_p=False,
    )


def test_sampled_requests_rank_by_their_noise_and_greedy_ones_do_not(module: Any) -> None:
    bridge = Bridge(module, 3)
    stage = DraftStage(bridge, mask_token_id=0, top_k=16)  # type: ignore[arg-type]
    params = sampling([1, 1 << 30, 1 << 30], [1.0, 0.8, 0.8])
    noise = StepNoise(torch.tensor([1, 2, 3]), torch.tensor([7, 20, 9]), BLOCK)
    mixed, greedy = stage(step(noise=noise, sampling=params), None), stage(step(), None)
    assert mixed.edges is not None
    assert greedy.edges is not None
    assert torch.equal(mixed.ids[0], greedy.ids[0])
    torch.testing.assert_close(mixed.edges[0], greedy.edges[0])
    assert not torch.isnan(mixed.edges).any()
    assert (mixed.edges.logsumexp(-1) < 1e-4).all(), "chances of a position add up to one at most"
    other = StepNoise(torch.tensor([1, 2, 99]), torch.tensor([7, 20, 9]), BLOCK)
    again = stage(step(noise=other, sampling=params), None)
    assert again.edges is not None
    torch.testing.assert_close(again.edges[1], mixed.edges[1])
    assert not torch.allclose(again.edges[2], mixed.edges[2])


def test_without_tables_the_edges_say_what_the_drafter_says() -> None:
    logprobs = torch.randn(2, 3, 40).log_softmax(-1).topk(TOP).values
    edges = edges_of(logprobs, torch.zeros(2, 3, TOP, TOP))
    torch.testing.assert_close(edges, logprobs[:, :, None].expand(-1, -1, TOP, -1))


def test_the_first_position_follows_the_anchor(module: Any) -> None:
    ids = torch.arange(DEPTH * TOP).view(1, DEPTH, TOP)
    pairs = Selector(module).pairs(torch.tensor([50]), ids, torch.randn(1, DEPTH, HIDDEN))
    assert torch.equal(pairs[:, 0], pairs[:, 0, :1].expand(-1, TOP, -1))
    assert not torch.allclose(pairs[:, 1, 0], pairs[:, 1, 1])
