"""Attention over the paged cache against a dense float64 reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from sglang_dflash.platform.attention_ops import (
    MIN_KEYS,
    HeadSpec,
    Segment,
    attend,
    unpack_ancestors,
    visible_keys,
)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def random_tree(nodes: int, generator: torch.Generator) -> torch.Tensor:
    """Ancestor-or-self mask bool ``[nodes, nodes]`` of a random tree, parents first."""
    mask = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        parent = int(torch.randint(0, node, (1,), generator=generator))
        mask[node] |= mask[parent]
    return mask


@dataclass
class Case:
    """Random requests in a cache whose slots are scattered page by page."""

    prefixes: list[int]
    width: int
    q_heads: int = 6
    kv_heads: int = 2
    dim: int = 32
    dtype: torch.dtype = torch.float32
    page: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        lens = [p + self.width for p in self.prefixes]
        pages = [-(-n // self.page) for n in lens]
        order = torch.randperm(sum(pages), generator=self.generator) + 1
        slots_total = (sum(pages) + 1) * self.page
        shape = (slots_total, self.kv_heads, self.dim)
        self.k, self.v = (torch.randn(shape, generator=self.generator).to(self.dtype) for _ in range(2))
        rows = len(lens) * self.width
        self.q = torch.randn(rows, self.q_heads * self.dim, generator=self.generator).to(self.dtype)
        self.slots = torch.zeros(len(lens), max(max(lens), MIN_KEYS), dtype=torch.int64)
        start = 0
        for i, n in enumerate(lens):
            base = order[start : start + pages[i], None] * self.page
            self.slots[i, :n] = (base + torch.arange(self.page)).reshape(-1)[:n]
            start += pages[i]

    def head(self, **changes: object) -> HeadSpec:
        scale = self.dim**-0.5
        return HeadSpec(self.q_heads, self.kv_heads, self.dim, self.dim, scale, **changes)  # type: ignore[arg-type]

    def segment(self, tree: torch.Tensor | None = None, positions: torch.Tensor | None = None) -> Segment:
        rows = slice(0, self.q.shape[0])
        return Segment(rows, self.width, self.slots, torch.tensor(self.prefixes), tree, positions)

    def reference(self, seen: list[torch.Tensor], head: HeadSpec, sinks: torch.Tensor | None = None):
        """``seen[i]`` bool ``[width, prefix_i + width]`` -> float64 ``[rows, q_heads * dim]``."""
        outputs = []
        for i, mask in enumerate(seen):
            n = mask.shape[1]
            k = self.k[self.slots[i, :n]].double().repeat_interleave(head.groups, 1)
            v = self.v[self.slots[i, :n]].double().repeat_interleave(head.groups, 1)
            q = self.q[i * self.width : (i + 1) * self.width].double().view(self.width, -1, self.dim)
            scores = torch.einsum("whd,khd->hwk", q, k) * head.scale
            if head.logit_cap:
                scores = head.logit_cap * torch.tanh(scores / head.logit_cap)
            scores = scores.masked_fill(~mask, float("-inf"))
            if sinks is not None:
                extra = sinks.double().view(-1, 1, 1).expand(-1, self.width, 1)
                probs = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
            else:
                probs = scores.softmax(-1)
            outputs.append(torch.einsum("hwk,khd->whd", probs, v).flatten(1))
        return torch.cat(outputs)

    def check(self, segment: Segment, seen: list[torch.Tensor], head: HeadSpec, sinks=None) -> torch.Tensor:
        got = attend(self.q, self.k, self.v, segment, head, sinks)
        assert got.dtype == self.dtype
        error = (got.double() - self.reference(seen, head, sinks)).abs().max().item()
        assert error < TOLERANCE[self.dtype], f"error {error}"
        return got


def causal(prefix: int, width: int) -> torch.Tensor:
    return torch.ones(width, prefix + width, dtype=torch.bool).tril(prefix)


def with_tree(prefix: int, tree: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.ones(tree.shape[0], prefix, dtype=torch.bool), tree], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page", [1, 16, 64])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)], ids=["mha", "gqa3", "gqa8"])
def test_decode_of_a_ragged_batch(dtype: torch.dtype, page: int, heads: tuple[int, int]) -> None:
    case = Case([0, 4, 130, 63], 1, *heads, dtype=dtype, page=page)
    case.check(case.segment(), [causal(p, 1) for p in case.prefixes], case.head())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)], ids=["mha", "gqa3", "gqa8"])
@pytest.mark.parametrize("prefixes", [[37], [0], [5, 0, 200, 128]])
def test_verify_of_random_trees(
    dtype: torch.dtype, page: int, heads: tuple[int, int], prefixes: list[int]
) -> None:
    case = Case(prefixes, 13, *heads, dtype=dtype, page=page)
    trees = torch.stack([random_tree(13, case.generator) for _ in prefixes])
    seen = [with_tree(p, t) for p, t in zip(prefixes, trees, strict=True)]
    case.check(case.segment(trees), seen, case.head())


@pytest.mark.parametrize("prefixes", [[90], [0, 7, 300]])
def test_verify_of_a_chain_is_causal(prefixes: list[int]) -> None:
    case = Case(prefixes, 8)
    case.check(case.segment(), [causal(p, 8) for p in prefixes], case.head())


@pytest.mark.parametrize("prefixes", [[90], [0, 7, 300]])
def test_drafters_block_is_bidirectional(prefixes: list[int]) -> None:
    case = Case(prefixes, 8)
    seen = [torch.ones(8, p + 8, dtype=torch.bool) for p in prefixes]
    case.check(case.segment(), seen, case.head(bidirectional=True))


@pytest.mark.parametrize("prefix", [0, 1, 150])
@pytest.mark.parametrize("width", [1, 70, 210])
def test_prefill_with_cached_prefix(prefix: int, width: int) -> None:
    """210 rows of 3 heads per KV head are more than one block of rows."""
    case = Case([prefix], width)
    case.check(case.segment(), [causal(prefix, width)], case.head())


def test_prefill_of_a_bidirectional_layer() -> None:
    case = Case([5], 150)
    case.check(case.segment(), [torch.ones(150, 155, dtype=torch.bool)], case.head(bidirectional=True))


@pytest.mark.parametrize("width", [1, 9, 150])
def test_sliding_window(width: int) -> None:
    case = Case([100], width)
    full = causal(100, width)
    seen = full & ~torch.ones_like(full).tril(100 - 21)
    case.check(case.segment(), [seen], case.head(window=20))


@pytest.mark.parametrize(("prefixes", "width"), [([90], 8), ([0, 7, 300], 8), ([5], 210)])
def test_a_bidirectional_window_hides_both_sides(prefixes: list[int], width: int) -> None:
    """210 rows of 3 heads per KV head are more than one block of rows."""
    case = Case(prefixes, width)
    seen = [
        (torch.arange(p, p + width)[:, None] - torch.arange(p + width)[None, :]).abs() <= 5 for p in prefixes
    ]
    case.check(case.segment(), seen, case.head(bidirectional=True, window=5))


def test_sliding_window_in_a_tree_counts_positions_not_columns() -> None:
    case = Case([30], 9)
    tree = random_tree(9, case.generator)
    depth = tree.sum(1) - 1
    positions = (30 + depth).view(1, -1)
    key_position = torch.cat([torch.arange(30), 30 + depth])
    seen = with_tree(30, tree) & (key_position >= positions.view(-1, 1) - 4)
    case.check(case.segment(tree[None], positions), [seen], case.head(window=4))


@pytest.mark.parametrize("prefixes", [[40], [3, 40]])
def test_soft_cap_and_sinks(prefixes: list[int]) -> None:
    for width in (1, 6):
        case = Case(prefixes, width)
        sinks = torch.randn(case.q_heads, generator=case.generator)
        case.check(case.segment(), [causal(p, width) for p in prefixes], case.head(logit_cap=5.0), sinks)


def test_consecutive_slots_are_a_view_with_the_same_result() -> None:
    case = Case([50], 8)
    case.slots = torch.arange(1, 59).view(1, -1)
    gathered, viewed = case.segment(), case.segment()
    viewed.first_slot = 1
    head = case.head()
    assert torch.equal(
        attend(case.q, case.k, case.v, gathered, head), attend(case.q, case.k, case.v, viewed, head)
    )


@pytest.mark.parametrize("nodes", [1, 31, 32, 33, 70])
def test_ancestor_words_unpack_to_the_mask(nodes: int) -> None:
    tree = random_tree(nodes, torch.Generator().manual_seed(nodes))
    words = torch.zeros(1, nodes, -(-nodes // 32), dtype=torch.int64)
    for j in range(nodes):
        words[0, :, j // 32] |= tree[:, j].long() << (j % 32)
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    assert torch.equal(unpack_ancestors(signed)[0], tree)


def test_visible_keys_hides_padding() -> None:
    seen = visible_keys(torch.tensor([2, 5]), 2, 12, bidirectional=True)
    assert seen.sum(-1).tolist() == [[4, 4], [7, 7]]


@pytest.mark.parametrize("prefix", [17, 100, 127, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_rows_beside_it(prefix: int, dtype: torch.dtype) -> None:
    """Greedy output of a verify pass can equal plain decoding's bit for bit only with this."""
    width = 24
    case = Case([prefix], width, 9, 3, 64, dtype=dtype)
    head = case.head()
    together = attend(case.q, case.k, case.v, case.segment(), head)
    for i in (0, 1, 7, width - 1):
        alone = Segment(slice(0, 1), 1, case.slots[:, : prefix + i + 1], torch.tensor([prefix + i]))
        row = attend(case.q[i : i + 1], case.k, case.v, alone, head)
        assert torch.equal(row[0], together[i]), f"row {i}"


@pytest.mark.parametrize("prefix", [17, 150, 300])
def test_an_off_spine_node_sums_like_the_chain_it_becomes(prefix: int) -> None:
    """Keys hidden between a node's ancestors change no bit (no tile boundary is crossed here)."""
    width = 24
    case = Case([prefix], width, 9, 3, 64)
    head = case.head()
    tree = random_tree(width, case.generator)
    together = attend(case.q, case.k, case.v, case.segment(tree[None]), head)
    for node in range(width):
        path = tree[node].nonzero().flatten()
        slots = torch.cat([case.slots[:, :prefix], case.slots[:, prefix + path]], 1)
        chain = Segment(slice(0, 1), 1, slots, torch.tensor([slots.shape[1] - 1]))
        row = attend(case.q[node : node + 1], case.k, case.v, chain, head)
        assert torch.equal(row[0], together[node]), f"node {node}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_request_does_not_depend_on_the_requests_beside_it(dtype: torch.dtype) -> None:
    case = Case([5, 300, 64, 0], 8, 9, 3, 64, dtype=dtype)
    head = case.head()
    together = attend(case.q, case.k, case.v, case.segment(), head)
    for i, prefix in enumerate(case.prefixes):
        slots = case.slots[i : i + 1, : max(prefix + 8, MIN_KEYS)]
        alone = Segment(slice(0, 8), 8, slots, torch.tensor([prefix]))
        rows = slice(i * 8, i * 8 + 8)
        assert torch.equal(attend(case.q[rows], case.k, case.v, alone, head), together[rows]), f"request {i}"
