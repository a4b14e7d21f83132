"""A request's own text as a source of drafts: what is recalled, and what its chances are learned from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dflash_kernels import Accepted, accept_tree

from sglang_dflash.step.history import TokenHistory
from sglang_dflash.step.width import Step, Width
from sglang_dflash.worker.draft import Candidates
from sglang_dflash.worker.recall import Recalled, RecallStage
from sglang_dflash.worker.tree import TreeStage
from sglang_dflash.worker.worker import TreeWorker

VOCAB = 1000
PHRASE = [41, 42, 43, 44, 45, 46, 47, 48]


def stage_and_step(texts: list[list[int]], width: Width) -> tuple[TokenHistory, Step]:
    history = TokenHistory(len(texts) + 1, 200, "cpu")
    for row, text in enumerate(texts):
        history.write(torch.tensor([row + 1]), torch.tensor([0]), torch.tensor([text]))
    lens = torch.tensor([len(text) - 1 for text in texts])
    anchor = torch.tensor([text[-1] for text in texts])
    slots = torch.zeros((len(texts), width.slots), dtype=torch.int64)
    return history, Step(width, anchor, lens, slots, None, lens, deepest=width.nodes - 1)


def drafted(bs: int, width: Width, first: int = 500) -> Candidates:
    """Candidates that no text holds, all alike."""
    ids = torch.arange(first, first + 4).expand(bs, width.depth, 4).contiguous()
    logprobs = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(bs, width.depth, 4).contiguous()
    return Candidates(logprobs, ids)


def rows(bs: int) -> torch.Tensor:
    return torch.arange(1, bs + 1)


def recalled_by(
    stage: RecallStage, history: TokenHistory, rows: torch.Tensor, step: Step, candidates: Candidates
) -> Recalled:
    found = stage(history, rows, step, candidates)
    assert found is not None
    return found


def accepted(step: Step, chain: list[list[int]]) -> Accepted:
    """The outcome where the target says ``chain`` and the tree followed all but the last token."""
    lens = torch.tensor([len(c) for c in chain], dtype=torch.int32)
    out = torch.zeros((len(chain), step.deepest + 1), dtype=torch.int64)
    for row, said in enumerate(chain):
        out[row, : len(said)] = torch.tensor(said)
    path = torch.zeros_like(out).int()
    return Accepted(lens, path, out, out[:, 0], step.prefix_lens + lens)


def test_a_repeated_phrase_goes_on_as_before_and_deeper_than_the_block() -> None:
    width = Width(8, 3)
    history, step = stage_and_step([[1, 2, *PHRASE, 3, 4, 41, 42, 43], [5, 6, 7, 8, 9]], width)
    stage = RecallStage("cpu", VOCAB, 15)
    found = recalled_by(stage, history, rows(2), step, drafted(2, width))
    assert found.found.tolist() == [True, False]
    assert found.chain.ids[0, :5].tolist() == PHRASE[3:]
    assert torch.isinf(found.chain.logprobs[1]).all()
    for _ in range(50):  # it has come true before
        stage.learn(found, accepted(step, [PHRASE[3:], [999]]))
    found = recalled_by(stage, history, rows(2), step, drafted(2, width))
    tree, _ = TreeStage(depth_bonus=None, rewrite=None, device="cpu")(drafted(2, width), step, found.chain)
    right = torch.zeros((2, 8), dtype=torch.int64)
    for node in range(8):  # the target goes on with the phrase
        depth = int(tree.depth[0, node])
        right[0, node] = [*PHRASE[3:], 3, 4, 41][depth]
    outcome = accept_tree(tree, right, step.prefix_lens, max_depth=step.deepest)
    assert int(outcome.accept_lens[0]) > width.block, "the path is no longer than the block"
    assert outcome.out_tokens[0, :3].tolist() == PHRASE[3:6]


def test_where_no_text_repeats_there_is_no_chain_to_build() -> None:
    width = Width(8, 3)
    history, step = stage_and_step([[1, 2, 3, 4, 5], [5, 6, 7, 8, 5, 6]], width)
    assert RecallStage("cpu", VOCAB, 15)(history, rows(2), step, drafted(2, width)) is None


def chances(stage: RecallStage, history: TokenHistory, step: Step, width: Width) -> torch.Tensor:
    return recalled_by(
        stage, history, rows(step.batch_size), step, drafted(step.batch_size, width)
    ).chain.logprobs.exp()


def test_what_comes_true_grows_and_what_does_not_shrinks() -> None:
    width = Width(8, 4)
    text = [*PHRASE, 3, 4, *PHRASE[:3]]
    history, step = stage_and_step([text], width)
    good, bad = RecallStage("cpu", VOCAB, 15), RecallStage("cpu", VOCAB, 15)
    before = chances(good, history, step, width)
    for _ in range(50):
        candidates = drafted(1, width)
        recalled = recalled_by(good, history, rows(1), step, candidates)
        good.learn(recalled, accepted(step, [PHRASE[3:8]]))
        bad.learn(recalled_by(bad, history, rows(1), step, candidates), accepted(step, [[999]]))
    grown, shrunk = chances(good, history, step, width), chances(bad, history, step, width)
    assert (grown[0, :5] > before[0, :5]).all()
    assert shrunk[0, 0] < 0.2 * before[0, 0]
    # Behind a wrong token nothing is known: no count was touched.
    assert torch.equal(shrunk[0, 4:], before[0, 4:])
    # A chain that does not pay takes no node.
    stale = recalled_by(bad, history, rows(1), step, drafted(1, width)).chain
    tree, _ = TreeStage(depth_bonus=None, rewrite=None, device="cpu")(drafted(1, width), step, stale)
    assert not set(tree.tokens[0, 1:].tolist()) & set(PHRASE)


def test_what_the_drafter_says_is_counted_apart() -> None:
    width = Width(8, 3)
    history, step = stage_and_step([[*PHRASE, 3, *PHRASE[:3]]], width)
    stage = RecallStage("cpu", VOCAB, 15)
    alone = recalled_by(stage, history, rows(1), step, drafted(1, width)).chain.logprobs
    best, among = drafted(1, width), drafted(1, width)
    best.ids[0, 0, 0] = among.ids[0, 0, 2] = PHRASE[3]
    values = [recalled_by(stage, history, rows(1), step, c).chain.logprobs[0, 0] for c in (best, among)]
    assert values[0] > values[1] > alone[0, 0]


def test_sampled_requests_are_counted_apart() -> None:
    width = Width(8, 4)
    text = [*PHRASE, 3, 4, *PHRASE[:3]]
    history, step = stage_and_step([text, text], width)
    sampling: Any = SimpleNamespace(top_k=torch.tensor([1, VOCAB]))
    step.sampling, step.noise = sampling, SimpleNamespace()  # type: ignore[assignment]
    stage = RecallStage("cpu", VOCAB, 15)
    for _ in range(50):
        recalled = recalled_by(stage, history, rows(2), step, drafted(2, width))
        stage.learn(recalled, accepted(step, [PHRASE[3:8], [999]]))
    greedy, drawn = chances(stage, history, step, width)
    assert greedy[0] > 0.8 > 0.1 > drawn[0]


def test_placeholders_end_a_chain() -> None:
    width = Width(8, 3)
    history, step = stage_and_step([[41, 42, 43, 44, VOCAB + 5, 46, 3, 41, 42, 43]], width)
    chain = RecallStage("cpu", VOCAB, 15)(history, rows(1), step, drafted(1, width)).chain
    assert chain.ids[0, 0] == 44
    assert torch.isfinite(chain.logprobs[0, 0])
    assert torch.isinf(chain.logprobs[0, 1:]).all()
    assert int(chain.ids.max()) < VOCAB


@pytest.mark.parametrize("token", [7, 0])
def test_a_text_of_one_token_recalls_itself(token: int) -> None:
    width = Width(8, 3)
    history, step = stage_and_step([[token] * 50], width)
    chain = RecallStage("cpu", VOCAB, 15)(history, rows(1), step, drafted(1, width)).chain
    assert chain.ids[0].tolist() == [token] * 15


def test_how_far_a_chain_is_expected_to_hold_is_told_by_class_and_beyond_the_steps_tree() -> None:
    width = Width(8, 4)
    text = [*PHRASE, 3, 4, *PHRASE[:3]]
    history, step = stage_and_step([text, text, [5, 6, 7]], width)
    found = recalled_by(RecallStage("cpu", VOCAB, 15), history, rows(3), step, drafted(3, width))
    one = found.chain.logprobs[0].cumsum(0).exp()
    assert found.held(None)[0].tolist() == pytest.approx((2 * one).tolist())
    assert (found.held(None)[1] == 0).all()
    by = found.held(torch.tensor([False, True, True]))
    assert by.shape == (2, 15)
    assert by[0].tolist() == by[1].tolist() == pytest.approx(one.tolist())


@pytest.mark.parametrize(
    ("recall", "width", "deepest"),
    [
        (object(), Width(4, 6), 5),
        (object(), Width(16, 6), 15),
        (None, Width(16, 6), 5),
        (None, Width(4, 6), 5),
        (object(), Width(1, 1), 0),
    ],
)
def test_a_step_has_noise_for_every_drafted_and_every_recalled_depth(
    recall: object, width: Width, deepest: int
) -> None:
    assert TreeWorker._deepest(SimpleNamespace(recall=recall), width) == deepest  # type: ignore[arg-type]
