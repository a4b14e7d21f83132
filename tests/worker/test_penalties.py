"""Penalties at every node equal plain Python over the text that leads to the node."""

from __future__ import annotations

import pytest
import torch
from dflash_kernels import build_tree

from sglang_dflash.step.history import TokenHistory
from sglang_dflash.step.penalties import Penalties, apply_penalties, row_penalties

VOCAB, DEPTH, NODES = 7, 4, 14


def make_tree(bs: int):
    drafted = torch.log_softmax(torch.randn(bs, DEPTH, VOCAB), -1).topk(3)
    return build_tree(torch.randint(VOCAB, (bs,)), drafted.values, drafted.indices, num_nodes=NODES)


def expected(row: torch.Tensor, text: list[int], p: dict) -> torch.Tensor:
    out = row.clone().double()
    for token in range(VOCAB):
        n = text.count(token)
        out[token] -= p["frequency"] * n + p["presence"] * (n > 0)
        if len(text) < p["min_new"] and token in p["stop"]:
            out[token] = float("-inf")
        if n:
            out[token] = out[token] * p["repetition"] if out[token] < 0 else out[token] / p["repetition"]
    return out


@pytest.mark.parametrize("seed", range(6))
def test_every_node_counts_its_own_path(seed: int) -> None:
    torch.manual_seed(seed)
    bs = 3
    tree = make_tree(bs)
    prompt = torch.tensor([0, 5, 2])
    output = [torch.randint(VOCAB, (n,)).tolist() for n in (1, 6, 3)]
    history = TokenHistory(8, 64, "cpu")
    history.tokens.fill_(3)  # leftovers of earlier requests
    rows = torch.tensor([4, 0, 6])
    for b, text in enumerate(output):
        text[-1] = int(tree.tokens[b, 0])
        history.write(rows[b : b + 1], prompt[b : b + 1], torch.tensor([text]))
    prefix = prompt + torch.tensor([len(text) - 1 for text in output])
    params = [
        {"frequency": 0.7, "presence": 0.0, "repetition": 1.3, "min_new": 0, "stop": []},
        {"frequency": 0.0, "presence": -0.4, "repetition": 1.0, "min_new": 8, "stop": [2, 5]},
        {"frequency": 0.0, "presence": 0.0, "repetition": 1.0, "min_new": 0, "stop": [1]},
    ]
    penalties = Penalties(
        *(torch.tensor([float(p[name]) for p in params]) for name in ("frequency", "presence", "repetition")),
        torch.tensor([p["min_new"] for p in params]),
        torch.tensor([[-1, -1], [2, 5], [1, -1]]),
        prompt,
    )
    logits = torch.randn(bs * NODES, VOCAB)
    before = logits.clone()
    committed = history.counts(rows, prompt, prefix, int(prefix.max()) + 1, VOCAB)
    apply_penalties(logits, tree, committed, prefix, penalties, depth=DEPTH)
    for b in range(bs):
        for n in range(NODES):
            path, node = [], n
            while int(tree.parents[b, node]) >= 0:
                path.append(int(tree.tokens[b, node]))
                node = int(tree.parents[b, node])
            want = expected(before[b * NODES + n], output[b] + path[::-1], params[b])
            torch.testing.assert_close(logits[b * NODES + n].double(), want, atol=1e-5, rtol=1e-5)


def test_a_prefill_row_counts_what_was_said_before() -> None:
    """The row after a retraction equals plain Python over the text, as a tree's root does."""
    torch.manual_seed(0)
    said = [[1, 1, 4], [2, 5, 5, 6], []]
    params = [
        {"frequency": 0.7, "presence": 0.2, "repetition": 1.3, "min_new": 0, "stop": []},
        {"frequency": 0.0, "presence": 0.0, "repetition": 1.0, "min_new": 5, "stop": [2, 6]},
        {"frequency": 0.5, "presence": 0.5, "repetition": 1.5, "min_new": 0, "stop": []},
    ]
    penalties = Penalties(
        *(torch.tensor([float(p[name]) for p in params]) for name in ("frequency", "presence", "repetition")),
        torch.tensor([p["min_new"] for p in params]),
        torch.tensor([[-1, -1], [2, 6], [-1, -1]]),
        torch.zeros(3, dtype=torch.int64),
    )
    seen = torch.stack([torch.bincount(torch.tensor(s, dtype=torch.int64), minlength=VOCAB) for s in said])
    added, scales = row_penalties(seen.float(), torch.tensor([len(s) for s in said]), penalties)
    logits = torch.randn(3, VOCAB)
    got = logits + added
    got = torch.where(got < 0, got * scales, got / scales)
    for b in range(3):
        torch.testing.assert_close(
            got[b].double(), expected(logits[b], said[b], params[b]), atol=1e-5, rtol=1e-5
        )
