"""Offline accept lengths against a drafter simulated step by step."""

import json

import pytest
import torch

from sglang_dflash.client.info import ServerInfo
from sglang_dflash.drafter import read_config
from sglang_dflash.errors import UserError
from sglang_dflash.train import calibrate
from sglang_dflash.train.judge import (
    Table,
    Walk,
    chain_accepts,
    group_indices,
    judge_tables,
    tree_accepts,
)
from sglang_dflash.train.served import Policy, policy_of


def table(P=40, L=5, V=30, seed=0, skew=2.0) -> Table:
    rng = torch.Generator().manual_seed(seed)
    logprobs = (torch.randn(P, L, V, generator=rng) * skew).log_softmax(-1)
    labels = logprobs.exp().view(-1, V).multinomial(1, generator=rng).view(P, L)
    for i in range(L):
        labels[P - 1 - i, L - i :] = -1  # the answer ends
    values, ids = logprobs.topk(16, dim=-1)
    rank = (logprobs > logprobs.gather(-1, labels.clamp_min(0)[..., None])).sum(-1)
    return Table(torch.zeros(P, dtype=torch.long), labels, ids, values, rank, "code", 0.0)


def best_prefixes(t: Table, i: int, nodes: int) -> set[tuple[int, ...]]:
    """The ``nodes - 1`` most probable prefixes of anchor i, by brute force."""
    L = t.labels.shape[1]
    frontier: list = [((), 0.0)]
    kept: set = set()
    while len(kept) < nodes - 1:
        grown = []
        for prefix, score in frontier:
            d = len(prefix)
            if d < L:
                grown += [
                    ((*prefix, int(t.ids[i, d, k])), score + float(t.logprobs[i, d, k])) for k in range(16)
                ]
        frontier = [f for f in frontier if not f[0]] + [g for g in grown if g[0] in kept]
        candidates = [g for g in grown if g[0] not in kept and (len(g[0]) == 1 or g[0][:-1] in kept)]
        kept.add(max(candidates, key=lambda c: c[1])[0])
        known = {f[0] for f in frontier}
        frontier += [c for c in candidates if c[0] in kept and c[0] not in known]
    return kept


def test_tree_accepts_what_the_best_prefixes_hold():
    t = table(P=12, L=3)
    for nodes in (4, 9, 16):
        got = tree_accepts(t, nodes)
        for i in range(12):
            kept = best_prefixes(t, i, nodes)
            answer = [x for x in t.labels[i].tolist() if x >= 0]
            want = 0
            while want < len(answer) and tuple(answer[: want + 1]) in kept:
                want += 1
            assert int(got[i]) == want


def test_trees_hold_more_than_the_chain():
    t = table(seed=3)
    assert tree_accepts(t, 16).sum() > chain_accepts(t).sum()
    assert (tree_accepts(t, 64) >= tree_accepts(t, 16)).all()
    assert (tree_accepts(t, 64) > chain_accepts(t)).any()


def test_walk_counts_every_token_once():
    t = table(seed=5)
    accepts = chain_accepts(t)
    walk = Walk()
    walk.add(accepts)
    assert walk.tokens == len(accepts)
    assert walk.passes < walk.tokens
    oracle = Walk()
    oracle.add(torch.tensor([min(5, 40 - 1 - i) for i in range(40)]))
    assert oracle.passes == 7  # ceil(40 / 6)


def test_groups_and_recall():
    tables = [table(seed=1), table(seed=2)]
    tables[1].family = "chat"
    found = judge_tables(tables, (8,))
    assert set(found) == {"all", "code", "chat"}
    row = found["all"].recall
    assert all(a <= b for a, b in zip(row[1], row[4], strict=True))
    first = sum(int((t.rank[:, 0] == 0).sum()) for t in tables) / sum(
        int((t.labels[:, 0] >= 0).sum()) for t in tables
    )
    assert abs(row[1][0] - first) < 1e-6


def test_groups_by_kind_and_temperature():
    kinds = [("chat", 0.0), ("code", 0.0), ("code", 0.8)]
    assert group_indices(kinds[:2]) == {"all": [0, 1], "chat": [0], "code": [1]}
    assert group_indices(kinds) == {
        "all": [0, 1, 2], "chat": [0], "code": [1, 2], "T=0": [0, 1], "T=0.8": [2],
        "chat T=0": [0], "code T=0": [1], "code T=0.8": [2],
    }  # fmt: skip


def info(**more) -> ServerInfo:
    known = {"version": "0.5.23", "model_path": "m", "speculative_num_draft_tokens": 8}
    return ServerInfo(**known | {"speculative_algorithm": "DFLASH"} | more)


def test_policy_of_a_server():
    tree = {"plugin": "0.1.0", "mode": "tree", "worker": "w", "block_size": 6, "num_nodes": 16}
    state = {"dflash": tree | {"settings": {"top_k": 4}}}
    assert policy_of(info(internal_states=[state])) == Policy("tree", 6, 16, 4)
    assert policy_of(info()) == Policy("chain", 8)
    chain = {"plugin": "0.1.0", "mode": "chain", "worker": "w"}
    assert policy_of(info(internal_states=[{"dflash": chain}])).name == "chain"
    with pytest.raises(UserError, match="without a DFlash drafter"):
        policy_of(info(speculative_algorithm=None))


def test_accept_lengths_by_width_reach_the_drafters_config(tmp_path):
    long, short = table(seed=3), table(seed=3)
    short.labels, short.ids, short.logprobs = short.labels[:, :1], short.ids[:, :1], short.logprobs[:, :1]
    found = calibrate.accept_by_width({2: [short], 6: [long]}, nodes=(2, 16))
    assert set(found) == {"2x2", "16x2", "2x6", "16x6"}
    assert 1 < found["2x2"] < found["16x2"] < found["16x6"] < 6
    assert found["16x2"] <= 2
    section = {"mask_token_id": 3, "target_layer_ids": [0]}
    config = {"architectures": ["DFlashDraftModel"], "hidden_size": 8, "num_hidden_layers": 1}
    config["dflash_config"] = section
    (tmp_path / "config.json").write_text(json.dumps(config))
    calibrate.store_accept(tmp_path, found, {})
    read = read_config(tmp_path).dflash_config
    assert (read.tree_accept, read.tree_accept_sampled, read.mask_token_id) == (found, {}, 3)
