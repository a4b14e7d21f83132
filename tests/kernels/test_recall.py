"""Recall against a search in plain strings."""

from __future__ import annotations

import random

import pytest
import torch
from dflash_kernels import Recalled, recall
from dflash_kernels._dispatch import interpreting
from dflash_kernels.recall.reference import recall_torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_oracles import recalled
from kernel_seed import SEED
from torch.utils._python_dispatch import TorchDispatchMode


def find(backend, texts: list[list[int]], *, garbage: int = 0, room: int = 5, **numbers) -> Recalled:
    """Runs a backend over texts in shuffled rows; everything that is no text holds `garbage`."""
    rng = random.Random(SEED)
    rows = rng.sample(range(2 * len(texts)), len(texts))
    longest = max(map(len, texts))
    history = torch.full((2 * len(texts), longest + room), garbage, dtype=torch.int32)
    for row, text in zip(rows, texts, strict=True):
        history[row, : len(text)] = torch.tensor(text, dtype=torch.int32)
    dev = backend.device
    numbers = {"count": 6, "longest": longest, "min_match": 2, "max_match": 8, **numbers}
    found = backend.recall(
        history.to(dev),
        torch.tensor(rows, device=dev),
        torch.tensor([len(text) for text in texts], device=dev),
        **numbers,
    )
    return Recalled(*(t.cpu() for t in found))


def check(backend, texts: list[list[int]], **numbers) -> None:
    numbers = {"count": 6, "min_match": 2, "max_match": 8, **numbers}
    found = find(backend, texts, **numbers)
    assert found.matched.dtype == torch.int32
    assert found.ids.dtype == torch.int64
    plain = {name: numbers[name] for name in ("count", "min_match", "max_match")}
    for b, text in enumerate(texts):
        assert (int(found.matched[b]), found.ids[b].tolist()) == recalled(text, **plain), text


def random_text(rng: random.Random) -> list[int]:
    """Few different tokens, and often a piece of the text again at its end."""
    vocab = rng.choice([1, 2, 3, 10, 1000])
    text = [rng.randrange(vocab) for _ in range(rng.choice([0, 1, 2, 3, rng.randrange(150)]))]
    if text and rng.random() < 0.6:
        start = rng.randrange(len(text))
        text += text[start : start + rng.randrange(50)]
    return text


@given(
    seed=st.integers(0, 2**31),
    bs=st.integers(1, 4),
    count=st.integers(0, 40),
    shortest=st.integers(1, 5),
    more=st.integers(0, 40),
    slack=st.integers(0, 5),
    garbage=st.sampled_from([0, 1, 7]),
)
def test_equals_string_search(backend, seed, bs, count, shortest, more, slack, garbage):
    rng = random.Random(seed)
    texts = [random_text(rng) for _ in range(bs)]
    longest = max(map(len, texts)) + slack
    numbers = {"count": count, "min_match": shortest, "max_match": shortest + more, "longest": longest}
    check(backend, texts, garbage=garbage, **numbers)


def test_many_random_texts(backend):
    rng = random.Random(SEED)
    for _ in range(10 if interpreting() else 300):
        shortest = rng.randint(1, 3)
        texts = [random_text(rng) for _ in range(8)]
        check(backend, texts, min_match=shortest, max_match=shortest + rng.choice([0, 5, 30]))


@pytest.mark.slow
def test_ten_thousand_texts(backend):
    rng = random.Random(SEED + 1)
    for _ in range(25 if interpreting() else 250):
        texts = [random_text(rng) for _ in range(40)]
        check(backend, texts, min_match=rng.randint(1, 3), max_match=rng.randint(3, 40), count=9)


@pytest.mark.parametrize("length", [511, 512, 513, 2047, 2048, 2049, 5000])
def test_matches_across_the_scans_borders(backend, length):
    """The same piece ends at every place near a border of blocks and spans."""
    rng = random.Random(SEED)
    texts = []
    for border in (512, 2048):
        for shift in (-1, 0, 1):
            if border + shift + 10 < length:
                text = [10 + rng.randrange(5000) for _ in range(length)]
                text[border + shift - 4 : border + shift] = text[-4:]
                texts.append(text)
    check(backend, texts or [[1, 2, 1, 2]])


def test_the_longest_then_the_newest(backend):
    text = [1, 2, 3, 50, 9, 2, 3, 60, 1, 2, 3, 70, 9, 2, 3, 80, 1, 2, 3]
    found = find(backend, [text], count=1)
    assert found.matched.tolist() == [3]
    assert found.ids.tolist() == [[70]]
    # Counted up to two tokens all four are equal.
    found = find(backend, [text], count=1, max_match=2)
    assert found.matched.tolist() == [2]
    assert found.ids.tolist() == [[80]]


def test_what_follows_runs_into_itself(backend):
    found = find(backend, [[5, 1, 2, 3, 1, 2, 3, 1, 2]], count=8)
    assert found.matched.tolist() == [5]
    assert found.ids.tolist() == [[3, 1, 2, 3, 1, 2, 3, 1]]
    found = find(backend, [[4] * 30], count=5)
    assert found.matched.tolist() == [8]
    assert found.ids.tolist() == [[4] * 5]


def test_too_short_to_match(backend):
    found = find(backend, [[], [1], [1, 1], [1, 1, 1], [7, 8]], min_match=2, garbage=1)
    assert found.matched.tolist() == [0, 0, 0, 2, 0]
    assert found.ids.tolist() == [[0] * 6, [0] * 6, [0] * 6, [1] * 6, [0] * 6]
    assert find(backend, [[3], [4]]).matched.tolist() == [0, 0]


def test_every_text_finds_only_its_own(backend):
    """Another's text, and a former one's rest behind the end, would match."""
    found = find(backend, [[1, 2, 3, 4, 5, 6, 1, 2], [9, 8, 7, 1, 2]], garbage=1)
    assert found.matched.tolist() == [2, 0]
    assert found.ids[0].tolist() == [3, 4, 5, 6, 1, 2]


def test_a_strided_history(backend):
    wide = torch.tensor([[1, 2, 3, 1, 2, 0], [5, 6, 5, 6, 5, 6]], dtype=torch.int32, device=backend.device)
    lengths = torch.tensor([5, 6], device=backend.device)
    numbers = {"count": 2, "longest": 6, "min_match": 2, "max_match": 4}
    for history in (wide.t().contiguous().t(), torch.cat([wide, wide], 1)[:, :6]):
        found = backend.recall(history, torch.arange(2, device=backend.device), lengths, **numbers)
        assert found.matched.tolist() == [2, 4]
        assert found.ids.tolist() == [[3, 1], [5, 6]]


class Work(TorchDispatchMode):
    """Counts operations and the elements they write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.calls += 1
        self.elements += made.numel() if isinstance(made, torch.Tensor) else 0
        return made


def test_work_is_bounded_by_the_texts_length():
    """131,072 tokens that all match everywhere; half of them; and an end that stands nowhere else."""
    length, passes = 131_072, 32
    for text, matched in (
        ([4] * length, passes),
        ([4, 5] * (length // 2), passes),
        ([4] * (length - 1) + [5], 0),
        (list(range(length)), 0),
    ):
        history = torch.tensor([text], dtype=torch.int32)
        with Work() as work:
            found = recall_torch(
                history, torch.tensor([0]), torch.tensor([length]),
                count=32, longest=length, min_match=3, max_match=passes,
            )  # fmt: skip
        assert found.matched.tolist() == [matched]
        assert work.calls < 20 * passes
        assert work.elements < 10 * passes * length


@pytest.mark.skipif(interpreting(), reason="the interpreter takes minutes")
def test_a_long_text_of_one_token(backend):
    found = find(backend, [[4] * 131_072, [4] * 131_071 + [5]], count=40, max_match=32)
    assert found.matched.tolist() == [32, 0]
    assert found.ids.tolist() == [[4] * 40, [0] * 40]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(2).long()}, "both \\[bs\\]"),
        ({"min_match": 0}, "1 <= min_match"),
        ({"min_match": 5, "max_match": 4}, "not 5..4"),
        ({"max_match": 128}, "<= 127"),
        ({"longest": 11}, "longest must be 0..10"),
        ({"count": -1}, "must not be negative"),
    ],
)
def test_rejects_misfits(change, message):
    call = {
        "history": torch.zeros(1, 10, dtype=torch.int32),
        "rows": torch.zeros(1).long(),
        "lengths": torch.zeros(1).long(),
        "count": 4,
        "longest": 10,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        recall(call.pop("history"), call.pop("rows"), call.pop("lengths"), **call)


def test_the_defaults():
    text = torch.tensor([[1, 2, 3, 4, 1, 2, 3]], dtype=torch.int32)
    found = recall(text, torch.tensor([0]), torch.tensor([7]), count=3, longest=7)
    assert found.matched.tolist() == [3]
    assert found.ids.tolist() == [[4, 1, 2]]
