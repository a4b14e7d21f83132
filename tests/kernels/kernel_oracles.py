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


CHAIN = -1  # a step of a path that takes the chain's token instead of a candidate's


def heap_tree(
    anchor, logprobs, ids, num_nodes, depth_bonus=None, keep_spine=False, edges=None, chain=None
) -> OracleTree:
    """Best-first search with a heap.

    Args:
        logprobs: float32 [L, K]; ids: [L, K]; edges: float32 [L, K, K] or None.
        chain: (ids, float32 logprobs) of one path from the root, or None.
    """
    L, K = logprobs.shape
    recalled = []  # (token, gain), as far as the chain goes
    if chain is not None:
        for token, value in zip(*chain, strict=True):
            if math.isnan(value) or value == -math.inf:
                break
            recalled.append((int(token), min(np.float32(value), np.float32(0.0))))

    def gain(value, d):
        if depth_bonus is not None:
            value = np.float32(value + np.float32(depth_bonus[d]))
        return np.float32(-np.inf) if math.isnan(value) else min(np.float32(value), np.float32(0.0))

    def candidate(path):
        """Index of the path's last token among its position's candidates, None where it is not one."""
        d = len(path) - 1
        if path[-1] != CHAIN:
            return path[-1]
        return next((k for k in range(K) if ids[d, k] == recalled[d][0]), None) if d < L else None

    def drafted(path):
        """(candidate, gain) of the drafter's children, best first."""
        d = len(path)
        if d >= L:
            return []
        if edges is None:
            lowest = np.float32(0.0)
            ranked = []
            for k in range(K):
                lowest = min(lowest, gain(logprobs[d, k], d))
                ranked.append((k, lowest))
            return ranked
        parent = candidate(path) if path else 0
        row = logprobs[d] if parent is None else edges[d, parent]
        row = [-math.inf if math.isnan(x) else float(x) for x in row]
        return [(k, gain(np.float32(row[k]), d)) for k in sorted(range(K), key=lambda k: (-row[k], k))]

    # A node is its tuple of steps. Popped order within a depth is the tie rule's "place of the parent".
    place: dict[tuple, int] = {(): 0}
    popped_at_depth: dict[int, int] = {}
    score = {(): np.float32(0.0)}

    def children(path):
        """The children, best first; each one's score is noted."""
        d = len(path)
        found = []
        token = None
        if all(step == CHAIN for step in path) and d < len(recalled):
            token, value = recalled[d]
            score[(*path, CHAIN)] = np.float32(score[path] + value)
            found.append((*path, CHAIN))
        for k, value in drafted(path):
            if token is None or ids[d, k] != token:
                score[(*path, k)] = np.float32(score[path] + value)
                found.append((*path, k))
        return sorted(found, key=lambda child: -score[child])  # stable: the chain, then the ranks

    selected: list[tuple[int, ...]] = []
    heap: list = []

    def push(path):
        for at, child in enumerate(children(path)):
            heapq.heappush(heap, (-float(score[child]), len(child), place[path], at, child))

    forced: list[tuple[int, ...]] = []
    if keep_spine and num_nodes >= L + 1:
        for _ in range(L):
            forced.append(children(forced[-1] if forced else ())[0])
            place[forced[-1]] = -1
    push(())
    for path in forced:
        push(path)
    room = num_nodes - 1 - len(forced)
    while heap and room > 0:
        cost, d, _, _, path = heapq.heappop(heap)
        if math.isinf(cost):
            break
        if path in forced:
            continue
        place[path] = popped_at_depth.get(d, 0)
        popped_at_depth[d] = place[path] + 1
        selected.append(path)
        room -= 1
        push(path)

    spine = forced
    if not forced:
        while (best := next(iter(children(spine[-1] if spine else ())), None)) in selected:
            spine.append(best)
    rest = [p for p in selected if p not in spine]  # in the order they were popped
    order = [(), *spine, *rest]
    number = {p: i for i, p in enumerate(order)}
    tree = OracleTree(
        tokens=[anchor]
        + [int(recalled[len(p) - 1][0] if p[-1] == CHAIN else ids[len(p) - 1, p[-1]]) for p in order[1:]],
        parents=[-1] + [number[p[:-1]] for p in order[1:]],
        depth=[len(p) for p in order],
        children=[[number[q] for q in children(p) if q in number] for p in order],
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


def recalled(text: list[int], count: int, min_match: int, max_match: int) -> tuple[int, list[int]]:
    """(length of the match, continuation) by searching strings."""
    string = "".join(map(chr, text))
    for m in range(min(max_match, len(text) - 1), min_match - 1, -1):
        start = string[:-1].rfind(string[-m:])
        if start >= 0:
            grown = list(text)
            for j in range(count):
                grown.append(grown[start + m + j])
            return m, grown[len(text) :]
    return 0, [0] * count


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
