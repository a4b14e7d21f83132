"""Offline judgement: recall by position and accept length of the chain and of trees.

The target's greedy answer is fixed whatever the drafter proposes, so one pass over every
anchor of an answer gives everything a served run would draft there; the walk then visits
the anchors that such a run visits. Numbers agree with a server up to bf16 ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from dflash_kernels import build_tree
from torch.nn import functional as F

from sglang_dflash.step.selector import Selector, edges_of
from sglang_dflash.train.batches import Document, build_batch
from sglang_dflash.train.model import CandidateSelector, Drafter
from sglang_dflash.train.target import DenseTarget

TOP = 16


@dataclass
class Table:
    """Drafts from every anchor of one answer (P anchors, L = B - 1 drafted positions).

    anchor: [P] token ids; labels: [P, L] right tokens (-1 past the end)
    ids, logprobs: [P, L, TOP] best candidates, descending; rank: [P, L] rank of the right token
    family, temperature: of the document
    edges: [P, L, TOP, TOP] a selector's word on each candidate (last) behind each of the position before
    hidden: [P, L, H] the drafter's states, where they were asked for
    """

    anchor: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    logprobs: torch.Tensor
    rank: torch.Tensor
    family: str
    temperature: float
    edges: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    def cut(self, top_k: int) -> Table:
        """The same of the ``top_k`` best candidates alone."""
        edges = None if self.edges is None else self.edges[..., :top_k, :top_k]
        return replace(self, ids=self.ids[..., :top_k], logprobs=self.logprobs[..., :top_k], edges=edges)


@torch.inference_mode()
def draft_table(
    drafter: Drafter,
    target: DenseTarget,
    document: Document,
    block: int | None = None,
    rows: int = 448,
    keep_hidden: bool = False,
) -> Table:
    """Draft from every anchor of ``document`` with the target's full head."""
    c = drafter.config
    B = block or c.block
    places = torch.tensor(list(document.anchors()))
    batch = build_batch([document], [places], B, c.mask_token, 1.0)
    batch = batch.to(target.device)
    features = batch.planes[:, :, :-1].to(target.dtype)
    hidden = drafter(F.embedding(batch.inputs, target.embed), features, batch.layout)[0, :, 1:]
    P, L, H = hidden.shape
    flat, labels = hidden.reshape(P * L, H), batch.labels[0].reshape(P * L)
    ids, logprobs, rank = [], [], []
    for at in range(0, P * L, rows):
        z = F.linear(flat[at : at + rows], target.head).float()
        values, best = z.topk(TOP, dim=-1)
        mine = z.gather(1, labels[at : at + rows].clamp_min(0)[:, None])
        rank.append((z > mine).sum(-1))
        ids.append(best)
        logprobs.append(values - z.logsumexp(-1, keepdim=True))
    table = Table(
        batch.inputs[0, :, 0],
        batch.labels[0],
        torch.cat(ids).view(P, L, TOP),
        torch.cat(logprobs).view(P, L, TOP),
        torch.cat(rank).view(P, L),
        document.family,
        document.temperature,
        hidden=hidden,
    )
    if drafter.candidate_selector is not None:
        table = with_edges(table, drafter.candidate_selector)
    return table if keep_hidden else replace(table, hidden=None)


def with_edges(table: Table, module: CandidateSelector) -> Table:
    """``table``, which has its hidden states, as a selector orders it."""
    table = table.cut(module.top_k)
    pairs = Selector(module).pairs(table.anchor, table.ids, table.hidden)
    return replace(table, edges=edges_of(table.logprobs, pairs))


def chain_accepts(table: Table) -> torch.Tensor:
    """[P] drafted tokens accepted from each anchor by the top-1 chain (a selector's: by its walk)."""
    walk = table.ids[..., 0]
    if table.edges is not None:
        # A wrong candidate ends the run, so each may be judged behind the right predecessor.
        before = (table.ids[:, :-1] == table.labels[:, :-1, None]).long().argmax(-1)
        row = torch.cat([torch.zeros_like(before[:, :1]), before], 1)[..., None, None]
        edges = table.edges.gather(2, row.expand(-1, -1, 1, table.edges.shape[-1]))[:, :, 0]
        walk = table.ids.gather(2, edges.argmax(-1, keepdim=True))[..., 0]
    right = (walk == table.labels) & (table.labels >= 0)
    return right.long().cumprod(1).sum(1)


def tree_accepts(table: Table, nodes: int, depth_bonus: torch.Tensor | None = None) -> torch.Tensor:
    """[P] drafted tokens accepted from each anchor by a tree of ``nodes`` (root included)."""
    P, L = table.labels.shape
    device = table.labels.device
    bonus = None if depth_bonus is None else depth_bonus.to(device)
    tree = build_tree(
        table.anchor, table.logprobs, table.ids, num_nodes=nodes, depth_bonus=bonus, edges=table.edges
    )
    at = torch.zeros(P, dtype=torch.long, device=device)
    alive = torch.ones(P, dtype=torch.bool, device=device)
    accepted = torch.zeros(P, dtype=torch.long, device=device)
    # Padding nodes copy the root as their parent; only linked nodes have a later-than-parent id.
    linked = torch.zeros_like(tree.parents, dtype=torch.bool)
    linked[:, 1:] = True
    for d in range(L):
        match = (tree.parents.long() == at[:, None]) & (tree.tokens == table.labels[:, d, None]) & linked
        match &= tree.depth == d + 1
        alive &= match.any(1)
        at = torch.where(alive, match.float().argmax(1), at)
        accepted += alive
    return accepted


@dataclass
class Walk:
    """Passes and tokens of simulated runs; ``length`` is tokens per target pass, bonus included."""

    passes: int = 0
    tokens: int = 0

    def add(self, accepts: torch.Tensor) -> None:
        """Walk one answer whose anchor i accepts ``accepts[i]`` drafted tokens."""
        steps, i, left = accepts.tolist(), 0, len(accepts)
        while i < left:
            # Anchor i is followed by left - i further tokens.
            step = min(steps[i] + 1, left - i)
            self.passes += 1
            self.tokens += step
            i += step

    @property
    def length(self) -> float:
        return self.tokens / max(self.passes, 1)


@dataclass
class Judgement:
    """Accept lengths and conditional recall of one group of documents."""

    walks: dict[str, Walk] = field(default_factory=dict)
    recall: dict[int, list[float]] = field(default_factory=dict)
    documents: int = 0

    def as_dict(self) -> dict:
        return {
            "documents": self.documents,
            "accept_length": {name: round(walk.length, 4) for name, walk in self.walks.items()},
            "tokens": {name: walk.tokens for name, walk in self.walks.items()},
            "recall": {f"@{k}": [round(x, 4) for x in row] for k, row in self.recall.items()},
        }


def _recall(tables: list[Table], k: int) -> list[float]:
    """Share of positions whose right token is among the k best, given that all before are top-1 right."""
    L = tables[0].labels.shape[1]
    hit, seen = torch.zeros(L), torch.zeros(L)
    for t in tables:
        valid = t.labels >= 0
        first = (t.rank == 0) & valid
        before = torch.cat([first.new_ones(len(first), 1), first[:, :-1]], 1).long().cumprod(1).bool() & valid
        hit += ((t.rank < k) & before).sum(0).cpu()
        seen += before.sum(0).cpu()
    return (hit / seen.clamp_min(1)).tolist()


def group_indices(kinds: list[tuple[str, float]]) -> dict[str, list[int]]:
    """Indices of ``(family, temperature)`` rows by family (``chat``, ``code``, ``all``).

    Several temperatures add one group each, and one for each of them and family.
    """
    groups: dict[str, list[int]] = {"all": list(range(len(kinds)))}
    several = len({temperature for _, temperature in kinds}) > 1
    for i, (name, temperature) in enumerate(kinds):
        groups.setdefault(name, []).append(i)
        if several:
            groups.setdefault(f"T={temperature:g}", []).append(i)
            groups.setdefault(f"{name} T={temperature:g}", []).append(i)
    return groups


def judge_tables(
    tables: list[Table], budgets: Iterable[int] = (16, 32, 64), depth_bonus: torch.Tensor | None = None
) -> dict[str, Judgement]:
    """Judgements of the chain and of trees by the groups of :func:`group_indices`."""
    policies: dict[str, Callable[[Table], torch.Tensor]] = {"chain": chain_accepts}
    for nodes in budgets:
        policies[f"tree-{nodes}"] = partial(tree_accepts, nodes=nodes, depth_bonus=depth_bonus)
    accepts = {policy: [count(t) for t in tables] for policy, count in policies.items()}
    out = {}
    for name, members in group_indices([(t.family, t.temperature) for t in tables]).items():
        j = Judgement(documents=len(members))
        for policy, rows in accepts.items():
            walk = j.walks.setdefault(policy, Walk())
            for i in members:
                walk.add(rows[i])
        j.recall = {k: _recall([tables[i] for i in members], k) for k in (1, 4, 16)}
        out[name] = j
    return out


def judge(
    drafter: Drafter,
    target: DenseTarget,
    documents: list[Document],
    budgets: Iterable[int] = (16, 32, 64),
    depth_bonus: torch.Tensor | None = None,
) -> dict[str, Judgement]:
    """Draft from every anchor of ``documents`` and judge."""
    training = drafter.training
    drafter.eval()
    tables = [draft_table(drafter, target, doc) for doc in documents]
    drafter.train(training)
    return judge_tables(tables, budgets, depth_bonus)
