"""Custom logit processors on a tree: every row as plain decoding would show it to them.

A processor reads the text through ``__req__``, the request, which SGLang puts into its parameters. In plain
decoding that is the text before the row's token; on a tree it is the committed text and the node's own path.
SGLang 0.5.23 shows the host's text for all nodes (``layers/sampler.py:1060``), which under overlap also lags
by the step in flight.
"""

from __future__ import annotations

import copy
from abc import ABC
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import cache, partial
from types import CodeType, FunctionType
from typing import Any

import torch
from dflash_kernels import DraftTree
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from sglang_dflash.step.history import TokenHistory

REQUEST = "__req__"
#: What a class sets to True when it keeps no state: it may be called for every node of a tree at once.
DECLARATION = "follows_paths"


class Reading(Enum):
    """How a processor meets a tree."""

    NOTHING = "does not look at the request: all rows in one call"
    PATHS = "keeps no state: all rows in one call, each with the text of its node"
    ROOT = "unknown: the root's row alone, once a step"


@cache
def reading_of(kind: type) -> Reading:
    """What the class of a processor says about it.

    SGLang's own keep no state, nor do classes that only give them other constants. Of another class it
    cannot be known, unless it declares ``follows_paths = True``.
    """
    if not _mentions_request(kind):
        return Reading.NOTHING
    if getattr(kind, DECLARATION, None) is not None:
        return Reading.PATHS if getattr(kind, DECLARATION) else Reading.ROOT
    foreign = [k for k in kind.__mro__ if k not in (object, ABC) and not k.__module__.startswith("sglang.")]
    code = [v for k in foreign for v in vars(k).values() if callable(_bare(v))]
    return Reading.ROOT if code else Reading.PATHS


def _bare(value: Any) -> Any:
    """The function inside a method, property or partial."""
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    if isinstance(value, property):
        return value.fget
    return value.func if isinstance(value, partial) else value


def _mentions_request(kind: type) -> bool:
    """Whether a processor's code, or what it names in its own module, has the string ``__req__``."""
    todo: list[Any] = [v for k in kind.__mro__ if k not in (object, ABC) for v in vars(k).values()]
    seen: set[int] = set()
    while todo:
        value = _bare(todo.pop())
        if isinstance(value, str):
            if value == REQUEST:
                return True
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, FunctionType):
            todo.append(value.__code__)
            todo += [cell.cell_contents for cell in value.__closure__ or () if cell.cell_contents is not None]
            named = [value.__globals__.get(name) for name in value.__code__.co_names]
            todo += [
                v for v in named if isinstance(v, str) or getattr(v, "__module__", None) == kind.__module__
            ]
        elif isinstance(value, CodeType):
            todo += value.co_consts
        elif isinstance(value, (tuple, frozenset, list)):
            todo += value
        elif isinstance(value, type) and value.__module__ == kind.__module__:
            todo += vars(value).values()
    return False


class _Watched:
    """A request that tells when it is looked at, before it shows anything."""

    __slots__ = ("_looked", "_req")

    def __init__(self, req: Any, looked: Any) -> None:
        object.__setattr__(self, "_req", req)
        object.__setattr__(self, "_looked", looked)

    def __getattr__(self, name: str) -> Any:
        self._looked()
        return getattr(self._req, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._looked()
        setattr(self._req, name, value)


def texts_of(batch: Any, last: torch.Tensor, history: TokenHistory) -> list[array]:
    """Each request's output up to position ``last`` (int64 [bs], inclusive).

    The host's own text and what is behind it; reads the device twice.
    """
    behind = [
        max(0, end + 1 - len(req.origin_input_ids) - len(req.output_ids))
        for req, end in zip(batch.reqs, last.tolist(), strict=True)
    ]
    tails = history.tail(batch.req_pool_indices, last, max(behind)).tolist()
    return [
        req.output_ids + array(req.output_ids.typecode, tail[len(tail) - missing :])
        for req, missing, tail in zip(batch.reqs, behind, tails, strict=True)
    ]


@contextmanager
def shown(reqs: Sequence[Any], texts: Sequence[array]) -> Iterator[None]:
    """The requests have said ``texts``, for the length of the block."""
    own = [req.output_ids for req in reqs]
    for req, text in zip(reqs, texts, strict=True):
        req.output_ids = text
    try:
        yield
    finally:
        for req, text in zip(reqs, own, strict=True):
            req.output_ids = text


def node_paths(tree: DraftTree, rows: Sequence[int]) -> dict[int, list[tuple[int, list[int]]]]:
    """For each request of ``rows``: (node, the tokens from below the root to it) of all linked nodes."""
    at = torch.tensor(rows, device=tree.tokens.device)
    columns = (tree.tokens, tree.first_child, tree.next_sibling)
    table = torch.stack([column[at].long() for column in columns]).tolist()
    found: dict[int, list[tuple[int, list[int]]]] = {}
    for row, tokens, first_child, next_sibling in zip(rows, *table, strict=True):
        nodes: list[tuple[int, list[int]]] = [(0, [])]
        for node, path in nodes:  # grows
            child = first_child[node]
            while child >= 0:
                nodes.append((child, [*path, tokens[child]]))
                child = next_sibling[child]
        found[row] = nodes
    return found


class Processors:
    """Applies a batch's processors; remembers the classes that were seen to look at the request."""

    def __init__(self) -> None:
        self._caught: set[type] = set()

    def reading(self, processor: CustomLogitProcessor) -> Reading:
        kind = type(processor)
        return Reading.ROOT if kind in self._caught else reading_of(kind)  # type: ignore[arg-type]

    def __call__(
        self,
        batch: Any,
        logits: torch.Tensor,
        prefix_lens: torch.Tensor,
        tree: DraftTree,
        history: TokenHistory,
    ) -> list[int]:
        """Apply to logits [bs * N, V] in place.

        Returns:
            the requests of which only the root's row is right: they must not go further in this step.
        """
        info = batch.sampling_info
        stay: list[int] = []
        texts: list[array] = []

        def said(row: int) -> array:
            if not texts:
                texts.extend(texts_of(batch, prefix_lens, history))
            return texts[row]

        for entry in info.custom_logit_processor.values():
            params = [info.custom_params[row] for row in entry.rows]
            at = entry.indices[:, None] * tree.num_nodes
            reading = self.reading(entry.processor)
            if reading is Reading.PATHS:
                self._follow_paths(entry, params, batch, logits, tree, said)
            elif reading is Reading.ROOT:
                reqs = [batch.reqs[row] for row in entry.rows]
                with shown(reqs, [said(row) for row in entry.rows]):
                    _call(entry.processor, logits, at.flatten(), params)
                stay += entry.rows
            else:
                every = (at + torch.arange(tree.num_nodes, device=at.device)).flatten()
                if self._watch(entry, params, batch, logits, every, tree.num_nodes, said):
                    self._caught.add(type(entry.processor))
                    stay += entry.rows
        return stay

    @staticmethod
    def _follow_paths(
        entry: Any, params: list[Any], batch: Any, logits: torch.Tensor, tree: DraftTree, said: Any
    ) -> None:
        at, given = [], []
        nodes_of = node_paths(tree, entry.rows)
        for row, own in zip(entry.rows, params, strict=True):
            for node, path in nodes_of[row]:
                at.append(row * tree.num_nodes + node)
                if not _has_request(own):
                    given.append(own)
                    continue
                shadow = copy.copy(batch.reqs[row])
                text = said(row)
                shadow.output_ids = text + array(text.typecode, path)
                given.append(own | {REQUEST: shadow})
        _call(entry.processor, logits, torch.tensor(at, device=logits.device), given)

    @staticmethod
    def _watch(
        entry: Any,
        params: list[Any],
        batch: Any,
        logits: torch.Tensor,
        at: torch.Tensor,
        nodes: int,
        said: Any,
    ) -> bool:
        """Call for all rows at once; whether the request was looked at, against what the code said.

        The look shows the root's text, so that the root's row is right.
        """
        own: dict[int, array] = {}

        def looked(row: int) -> None:
            if row not in own:
                own[row] = batch.reqs[row].output_ids
                batch.reqs[row].output_ids = said(row)

        held = [(row, mine) for row, mine in zip(entry.rows, params, strict=True) if _has_request(mine)]
        real = [mine[REQUEST] for _, mine in held]
        for row, mine in held:
            mine[REQUEST] = _Watched(batch.reqs[row], partial(looked, row))
        try:
            _call(entry.processor, logits, at, [mine for mine in params for _ in range(nodes)])
        finally:
            for (_, mine), request in zip(held, real, strict=True):
                mine[REQUEST] = request
            for row, text in own.items():
                batch.reqs[row].output_ids = text
        return bool(own)


def _has_request(params: Any) -> bool:
    return isinstance(params, dict) and REQUEST in params


def _call(processor: Any, logits: torch.Tensor, at: torch.Tensor, params: list[Any]) -> None:
    result = processor(logits.index_select(0, at), params)
    logits.index_copy_(0, at, result.to(logits.dtype))


def stop_at_root(tree: DraftTree, rows: Sequence[int]) -> DraftTree:
    """The tree, for the walk alone: the requests of ``rows`` commit one token."""
    if not rows:
        return tree
    at = torch.tensor(rows, device=tree.tokens.device)
    # Both kinds of links: the root's later children hang on its first one.
    first_child, next_sibling = (
        links.index_fill(0, at, -1) for links in (tree.first_child, tree.next_sibling)
    )
    return DraftTree(tree.tokens, tree.parents, tree.depth, first_child, next_sibling, tree.ancestors)
