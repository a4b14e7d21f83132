"""Every row that a custom logit processor may decide is what it makes of plain decoding's text."""

from __future__ import annotations

import weakref
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dflash_kernels import accept_tree, build_tree

from sglang_dflash.step.history import TokenHistory
from sglang_dflash.upstream.processors import Processors, Reading, reading_of, shown, stop_at_root, texts_of
from tests.server import logit_processors as those

VOCAB, DEPTH = 64, 4


class Req:
    """What processors see of SGLang's request."""

    def __init__(self, prompt: list[int], output: list[int]) -> None:
        self.origin_input_ids, self.output_ids = array("q", prompt), array("q", output)


def entry(kind: type, rows: list[int]) -> SimpleNamespace:
    return SimpleNamespace(processor=kind(), rows=rows, indices=torch.tensor(rows))


class Rig:
    """A batch whose host knows all but the last ``lag`` tokens of each committed text."""

    def __init__(self, seed: int, nodes: int, lag: int, kinds: dict[type, list[int]], **params: Any) -> None:
        draw = torch.Generator().manual_seed(seed)

        def ids(count: int) -> list[int]:
            return torch.randint(12, (count,), generator=draw).tolist()

        prompts, self.texts = [ids(5), ids(1), ids(9)], [ids(lag + 1), ids(lag + 4), ids(lag + 7)]
        self.reqs = [
            Req(prompt, text[: len(text) - lag]) for prompt, text in zip(prompts, self.texts, strict=True)
        ]
        self.history = TokenHistory(8, 64, "cpu")
        self.rows = torch.tensor([4, 0, 6])
        for row, prompt, text in zip(self.rows, prompts, self.texts, strict=True):
            self.history.write(row[None], torch.tensor([len(prompt)]), torch.tensor([text]))
        lens = [len(prompt) + len(text) for prompt, text in zip(prompts, self.texts, strict=True)]
        self.prefix_lens = torch.tensor(lens) - 1
        drafted = torch.log_softmax(torch.randn(3, DEPTH, 12, generator=draw), -1).topk(3)
        anchor = torch.tensor([text[-1] for text in self.texts])
        self.tree = build_tree(anchor, drafted.values, drafted.indices, num_nodes=nodes)
        self.logits = torch.randn(3 * nodes, VOCAB, generator=draw)
        given = [params | {"__req__": weakref.proxy(req)} for req in self.reqs]
        info = SimpleNamespace(
            custom_params=given,
            custom_logit_processor={n: entry(k, rows) for n, (k, rows) in enumerate(kinds.items())},
        )
        self.batch = SimpleNamespace(reqs=self.reqs, req_pool_indices=self.rows, sampling_info=info)

    def path(self, row: int, node: int) -> list[int]:
        path: list[int] = []
        while node:
            path.insert(0, int(self.tree.tokens[row, node]))
            node = int(self.tree.parents[row, node])
        return path

    def linked(self, row: int) -> set[int]:
        found, todo = set(), [0]
        while todo:
            node = todo.pop()
            found.add(node)
            child = int(self.tree.first_child[row, node])
            while child >= 0:
                todo.append(child)
                child = int(self.tree.next_sibling[row, child])
        return found

    def plain(self, kind: type, row: int, node: int) -> torch.Tensor:
        """What the processor makes of the node's row where plain decoding has said the node's text."""
        req = Req(list(self.reqs[row].origin_input_ids), self.texts[row] + self.path(row, node))
        params = {**self.batch.sampling_info.custom_params[row], "__req__": req}
        at = row * self.tree.num_nodes + node
        return kind()(self.logits[at : at + 1].clone(), [params])[0]

    def apply(self, processors: Processors | None = None) -> tuple[torch.Tensor, list[int]]:
        logits = self.logits.clone()
        before = [req.output_ids for req in self.reqs]
        stay = (processors or Processors())(self.batch, logits, self.prefix_lens, self.tree, self.history)
        assert [req.output_ids for req in self.reqs] == before, "the requests are as they were"
        assert all(
            isinstance(params["__req__"], weakref.ProxyType)
            for params in self.batch.sampling_info.custom_params
        )
        return logits.view(3, -1, VOCAB), stay


CASES = [
    (those.WriteAt, Reading.ROOT),
    (those.WriteAtHidden, Reading.NOTHING),
    (those.WriteAtDeclared, Reading.PATHS),
    (those.Budget, Reading.PATHS),
    (those.NoRepeat, Reading.PATHS),
    (those.Forbid, Reading.NOTHING),
    (those.Nth, Reading.ROOT),
]


@pytest.mark.parametrize(("kind", "reading"), CASES)
def test_how_a_class_is_read(kind: type, reading: Reading) -> None:
    assert reading_of(kind) is reading


@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("nodes", [1, 2, 9, 24])
@pytest.mark.parametrize("kind", [kind for kind, _ in CASES if kind is not those.Nth])
def test_rows_are_plain_decodings(kind: type, nodes: int, lag: int) -> None:
    changed = 0
    for seed in range(8):
        rig = Rig(
            seed,
            nodes,
            lag,
            {kind: [0, 2]},
            at=lag + 2 + seed,
            thinking_budget=3,
            ngram_size=2,
            window_size=40,
        )
        rig.reqs[2].origin_input_ids[0] = those.Budget.THINKING_START_TOKEN_ID
        got, stay = rig.apply()
        assert torch.equal(got[1], rig.logits.view(3, -1, VOCAB)[1]), "a neighbour without a processor"
        assert stay in ([], [0, 2])
        for row in (0, 2):
            for node in [0] if stay else rig.linked(row):
                want = rig.plain(kind, row, node)
                assert torch.equal(got[row, node], want), (seed, row, node)
                changed += not torch.equal(want, rig.logits.view(3, -1, VOCAB)[row, node])
    assert changed, "nothing was written anywhere"


def test_a_class_that_keeps_state_is_called_once_a_step_and_keeps_it() -> None:
    processors = Processors()
    for step in range(3):
        rig = Rig(step, 9, 1, {those.Nth: [1]})
        rig.reqs[1].calls_of_test = step
        got, stay = rig.apply(processors)
        assert stay == [1]
        assert rig.reqs[1].calls_of_test == step + 1
        assert int(torch.isinf(got[1]).sum()) == step % 3


def test_a_class_caught_looking_meets_the_root_alone_from_then_on() -> None:
    processors = Processors()
    for reading in (Reading.NOTHING, Reading.ROOT):
        rig = Rig(3, 9, 2, {those.WriteAtHidden: [0]}, at=3)
        assert processors.reading(those.WriteAtHidden()) is reading
        got, stay = rig.apply(processors)
        assert stay == [0]
        assert torch.equal(got[0, 0], rig.plain(those.WriteAtHidden, 0, 0))
    assert torch.equal(got[0, 1:], rig.logits.view(3, -1, VOCAB)[0, 1:]), "the root's row alone"


def test_a_request_without_parameters_is_left_to_the_processor() -> None:
    rig = Rig(0, 9, 0, {those.Budget: [0]})
    rig.batch.sampling_info.custom_params[0] = None
    logits = rig.logits.clone()
    assert Processors()(rig.batch, logits, rig.prefix_lens, rig.tree, rig.history) == []
    assert torch.equal(logits, rig.logits)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_request_that_must_stay_commits_its_roots_token(rank: int) -> None:
    """Whichever of the root's children carries that token."""
    rig = Rig(5, 24, 0, {})
    first = rig.tree.first_child[:, :1].long()
    for _ in range(rank):
        first = rig.tree.next_sibling.gather(1, first).long()
    target = rig.tree.tokens.gather(1, first).expand(-1, rig.tree.num_nodes).contiguous()
    free = accept_tree(rig.tree, target, rig.prefix_lens, max_depth=DEPTH)
    held = accept_tree(stop_at_root(rig.tree, [1]), target, rig.prefix_lens, max_depth=DEPTH)
    assert free.accept_lens.min() > 1
    assert held.accept_lens.tolist() == [int(free.accept_lens[0]), 1, int(free.accept_lens[2])]
    assert held.bonus[1] == target[1, 0]
    assert rig.tree.first_child[1, 0] >= 0, "the tree itself is as it was"


def test_texts_of_a_lagging_host() -> None:
    rig = Rig(1, 2, 3, {})
    texts = texts_of(rig.batch, rig.prefix_lens, rig.history)
    assert [list(text) for text in texts] == rig.texts
    with shown(rig.reqs, texts):
        assert [list(req.output_ids) for req in rig.reqs] == rig.texts
    assert [len(req.output_ids) for req in rig.reqs] == [len(text) - 3 for text in rig.texts]
