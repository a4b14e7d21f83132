"""Rows of plain steps that are written together leave the cache as if each had been written at once."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_dflash.worker.commit.saved import MOST_ROWS, MOST_STEPS, SavedRows


class Cache:
    """A drafter's cache of so many slots; a row is its features and position."""

    def __init__(self, slots: int) -> None:
        self.rows = torch.zeros(slots, 3)
        self.writes = 0

    def write(self, hidden: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        self.writes += 1
        assert len(slots.unique()) == len(slots), "one slot, two owners: which row stays is chance"
        self.rows[slots] = torch.cat([hidden, positions[:, None].float()], 1)


class Asked:
    """A request; like SGLang's it is compared as an object."""

    def __init__(self) -> None:
        self.slots: list[int] = []


@given(st.lists(st.sampled_from(["step", "step", "step", "end", "new", "draft"]), max_size=60), st.data())
def test_slots_that_change_hands_keep_their_last_owners_row(events: list[str], data: st.DataObject) -> None:
    free = list(range(400))
    saved_in, at_once = Cache(400), Cache(400)
    saved = SavedRows(saved_in.write)
    live: list[Asked] = []
    marks = iter(range(1, 100_000))
    for event in events:
        if event == "new" and len(free) > 50:
            saved.settle()  # a prefill
            live = [*live, Asked()]
        elif event == "end" and live:
            gone = data.draw(st.sampled_from(live))
            free = [*gone.slots, *free]  # taken again at once
            live = [asked for asked in live if asked is not gone]
        elif event == "draft":
            saved.settle()
            assert torch.equal(saved_in.rows, at_once.rows)
        elif event == "step" and live and len(free) >= len(live):
            if saved.of_others(live):
                saved.settle()
            taken, free = free[: len(live)], free[len(live) :]
            slots = torch.tensor(taken)
            hidden = torch.tensor([[float(next(marks)), 1.0] for _ in live])
            positions = torch.tensor([len(asked.slots) for asked in live])
            for asked, slot in zip(live, taken, strict=True):
                asked.slots.append(slot)
            saved.add(live, hidden, slots, positions)
            at_once.write(hidden, slots, positions)
    saved.settle()
    assert torch.equal(saved_in.rows, at_once.rows)


def test_so_many_steps_or_rows_are_written_together() -> None:
    cache = Cache(MOST_ROWS * 2)
    saved = SavedRows(cache.write)
    asked = [Asked()]
    for i in range(2 * MOST_STEPS):
        saved.add(asked, torch.ones(1, 2), torch.tensor([i]), torch.tensor([i]))
    assert cache.writes == 2
    many = [Asked() for _ in range(MOST_ROWS // 2)]
    for i in range(2):
        slots = torch.arange(len(many)) + i * len(many)
        saved.add(many, torch.ones(len(many), 2), slots, slots)
    assert cache.writes == 3
    saved.settle()
    assert cache.writes == 3


def test_a_list_that_is_changed_in_place_is_noticed() -> None:
    saved = SavedRows(Cache(8).write)
    batch = [Asked(), Asked()]
    saved.add(batch, torch.ones(2, 2), torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert not saved.of_others(batch)
    assert not saved.of_others(list(batch))
    batch.pop()
    assert saved.of_others(batch)
