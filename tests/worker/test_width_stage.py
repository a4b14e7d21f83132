"""One width per round: memory check, allocation and step read the same value."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_dflash.step.width import PLAIN, Width
from sglang_dflash.worker.width import WidthStage, make_policy, serve, serving
from sglang_dflash.worker.width.control import ControlledWidth
from sglang_dflash.worker.width.cost import CostTable
from sglang_dflash.worker.width.gain import Gains
from sglang_dflash.worker.width.policy import WidthPolicy

WIDEST = Width(8, 6)


class Script:
    def __init__(self, *widths: Width) -> None:
        self.widths: Iterator[Width] = iter(widths)
        self.loads: list[tuple[int, float, float]] = []

    def choose(self, requests: int, length: float, sampled_share: float) -> Width:
        self.loads.append((requests, length, sampled_share))
        return next(self.widths)

    def why(self) -> dict[str, object]:
        return {}

    def state(self) -> list[float]:
        return []

    def load(self, state: object) -> None:
        return


def test_the_reserve_holds_the_step_in_flight_and_this_one() -> None:
    stage = WidthStage(Script(Width(8, 6), Width(2, 6), PLAIN, Width(16, 4)), WIDEST)
    reserves = []
    for _ in range(4):
        stage.begin(3, 0.0)
        reserves.append(stage.reserve())
        stage.launch(1)
    # What the step before can commit, a path through all its nodes, and the slots of this one, max(N, B).
    assert reserves == [8 + 8, 8 + 6, 2 + 1, 1 + 16]


def test_a_round_that_launches_nothing_leaves_the_step_in_flight() -> None:
    stage = WidthStage(Script(Width(8, 6), PLAIN, Width(2, 2)), WIDEST)
    stage.begin(1, 0.0)
    stage.launch(1)
    stage.begin(1, 0.0)
    stage.begin(1, 0.0)
    assert stage.reserve() == 8 + 2


def test_short_memory_narrows_to_a_plain_step_once() -> None:
    stage = WidthStage(Script(Width(8, 6)), WIDEST)
    stage.begin(1, 0.0)
    assert stage.narrow()
    assert stage.launch(1) == PLAIN
    assert not stage.narrow()


def test_the_choice_knows_the_load() -> None:
    policy = Script(PLAIN, PLAIN)
    stage = WidthStage(policy, WIDEST)
    stage.begin(2, 0.5)
    stage.launch(1)
    stage.note_length(120.5)
    stage.begin(4, 0.0)
    assert policy.loads == [(2, 0.0, 0.5), (4, 120.5, 0.0)]


def test_random_widths_repeat_by_seed_and_cover_all() -> None:
    drawn = [make_policy("random:3", Width(4, 3)) for _ in range(2)]
    one, two = ([policy.choose(1, 0.0, 0.0) for _ in range(200)] for policy in drawn)
    assert one == two
    assert set(one) == {PLAIN} | {Width(n, b) for n in (2, 3, 4) for b in (2, 3)}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    before = serving()
    yield
    serve(before)


def test_memory_hooks_read_the_serving_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from sglang_dflash.plugin import hooks

    spec = SimpleNamespace(speculative_num_draft_tokens=8, speculative_dflash_block_size=6)
    monkeypatch.setattr(hooks, "_tree_spec", lambda: spec)
    serve(None)
    assert hooks.decode_reserve_per_request(lambda: 99) == 16  # before there is a worker: the greatest
    stage = WidthStage(Script(PLAIN, Width(8, 6)), WIDEST)
    serve(stage)
    batch = SimpleNamespace(reqs=[None, None], sampling_info=None)
    fits: list[int] = []

    def original(self: object, selected: object = None) -> bool:
        fits.append(stage.reserve())
        return stage.reserve() < 10

    assert hooks.check_decode_mem(original, batch)
    stage.launch(1)
    assert hooks.check_decode_mem(original, batch)
    assert fits == [8 + 1, 1 + 8]
    stage.launch(1)
    stage.policy = Script(Width(8, 6))
    assert hooks.check_decode_mem(original, batch), "narrowed before anyone is retracted"
    assert fits[2:] == [8 + 8, 8 + 1]
    assert stage.now == PLAIN
    assert hooks.check_decode_mem(original, batch, [0]), "SGLang's second question chooses nothing anew"


def test_a_file_sets_the_width_while_serving(tmp_path: Path) -> None:
    auto = WidthPolicy(WIDEST, CostTable(), Gains(WIDEST.block))
    file = tmp_path / "width"
    controlled = ControlledWidth(file, auto, lambda text: make_policy(text, WIDEST))
    stage = WidthStage(controlled, WIDEST)
    assert stage.learner is auto
    for tick, (text, want) in enumerate(
        (("4x4", Width(4, 4)), ("1x1", PLAIN), ("nonsense", PLAIN), ("8x6", WIDEST)), 10
    ):
        file.write_text(text + "\n")
        os.utime(file, ns=(0, tick))
        stage.begin(1, 0.0)
        assert stage.now == want, text
        # Another setting's steps teach auto nothing, and nothing is computed for it meanwhile.
        assert stage.pinned
        assert stage.learner is None
    file.write_text("auto")
    os.utime(file, ns=(0, 1))
    stage.begin(1, 0.0)
    assert controlled.learning
    assert stage.learner is auto
    assert not stage.pinned
