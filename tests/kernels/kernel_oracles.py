"""Slow, plain-Python oracles: no tensors, no vectorisation, one obvious step at a time."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np


@dataclass
class OracleTree:
    tokens: list[int]
    parents: list[int]
    depth: list[int]
    children: list[list[int]]

    def ancestors(self, i: int) -> set[int]:
        found = {i}
        while i > 0:
            i = self.parents[i]
            found.add(i)
        return found


def heap_tree(anchor, logprobs, ids, num_nodes, depth_bonus=None, keep_spine=False) -> OracleTree:
    """Best-first search with a heap. `logprobs` float32 [L, K], `ids` [L, K]."""
    L, K = logprobs.shape
    gain = np.zeros((L, K), dtype=np.float32)
    for d in range(L):
        lowest = np.float32(0.0)
        for k in range(K):
            g = np.float32(logprobs[d, k])
            if depth_bonus is not None:
                g = np.float32(g + np.float32(depth_bonus[d]))
            if math.isnan(g):
                g = np.float32(-np.inf)
            lowest = min(lowest, g)
            gain[d, k] = lowest

    # A node is its tuple of ranks. Popped order within a depth is the tie rule's "place of the parent".
    popped_at_depth: dict[int, int] = {}
    place = {(): 0}
    score = {(): np.float32(0.0)}
    selected: list[tuple[int, ...]] = []
    forced = {(0,) * d for d in range(1, L + 1)} if keep_spine and num_nodes >= L + 1 else set()
    heap: list = []

    def push_children(path):
        d = len(path)
        if d == L:
            return
        for k in range(K):
            child = (*path, k)
            score[child] = np.float32(score[path] + gain[d, k])
            heapq.heappush(heap, (-float(score[child]), d + 1, place[path], k, child))

    push_children(())
    room = num_nodes - 1 - len(forced)
    while heap and room > 0:
        cost, d, _, _, path = heapq.heappop(heap)
        if math.isinf(cost):
            break
        place[path] = popped_at_depth.get(d, 0)
        popped_at_depth[d] = place[path] + 1
        if path not in forced:
            selected.append(path)
            room -= 1
        push_children(path)
    selected += forced

    spine = sorted((p for p in selected if set(p) == {0}), key=len)
    rest = [p for p in selected if set(p) != {0}]  # in the order they were popped
    order = [(), *spine, *rest]
    number = {p: i for i, p in enumerate(order)}
    tree = OracleTree(
        tokens=[anchor] + [int(ids[len(p) - 1, p[-1]]) for p in order[1:]],
        parents=[-1] + [number[p[:-1]] for p in order[1:]],
        depth=[len(p) for p in order],
        children=[
            sorted(number[q] for q in order if len(q) == len(p) + 1 and q[: len(p)] == p) for p in order
        ],
    )
    while len(tree.tokens) < num_nodes:
        tree.tokens.append(anchor)
        tree.parents.append(0)
        tree.depth.append(1)
        tree.children.append([])
    return tree


def walk(tokens, first_child, next_sibling, target_tokens, max_depth) -> list[int]:
    """Node ids of the accepted path, following links one at a time."""
    path = [0]
    while len(path) <= max_depth:
        child = first_child[path[-1]]
        while child != -1 and tokens[child] != target_tokens[path[-1]]:
            child = next_sibling[child]
        if child == -1:
            break
        path.append(child)
    return path


def dense_attention(case, q, k_new, v_new, k_cache, v_cache, lens, slots, visible, depth) -> np.ndarray:
    """Float64 attention, one query row at a time.

    Args:
        case: namespace with sm_scale, logit_cap, window (< 0 none), both_ways, sinks (or None), k_scale,
            v_scale.
        lens: prefix length of each request; slots: list of slot lists.
        visible: bool [bs][N][N]; depth: int [bs][N].
        The rest: float64 arrays shaped as in `tree_attention`.
    """
    N = len(depth[0])
    Hq, Hkv = q.shape[1], k_new.shape[1]
    out = np.zeros((q.shape[0], Hq, v_new.shape[2]))
    for b, length in enumerate(lens):
        for i in range(N):
            at = length + depth[b][i]
            keys, values = [], []
            for pos in range(length):
                if case.window < 0 or at - pos <= case.window:
                    keys.append(k_cache[slots[b][pos]] * case.k_scale)
                    values.append(v_cache[slots[b][pos]] * case.v_scale)
            for j in range(N):
                gap = depth[b][i] - depth[b][j]
                near = case.window < 0 or (abs(gap) if case.both_ways else gap) <= case.window
                if visible[b][i][j] and near:
                    keys.append(k_new[b * N + j])
                    values.append(v_new[b * N + j])
            for h in range(Hq):
                kv = h // (Hq // Hkv)
                scores = [float(q[b * N + i, h] @ k[kv]) * case.sm_scale for k in keys]
                if case.logit_cap > 0:
                    scores = [case.logit_cap * math.tanh(s / case.logit_cap) for s in scores]
                top = max(scores)
                weights = [math.exp(s - top) for s in scores]
                total = sum(weights)
                if case.sinks is not None:
                    total += math.exp(case.sinks[h] - top)
                out[b * N + i, h] = sum(w * v[kv] for w, v in zip(weights, values, strict=True)) / total
    return out
