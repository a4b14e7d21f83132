"""The serving benchmarks' arithmetic, what they measure and in which order, and what they refuse."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import changing_load  # noqa: E402
import command  # noqa: E402
import fleet  # noqa: E402
import never_pays  # noqa: E402
import serving  # noqa: E402
import serving_plot  # noqa: E402
import serving_rows  # noqa: E402

from sglang_dflash.client.chat import Prompt, read_prompts  # noqa: E402
from sglang_dflash.models.prompts import prompts_file  # noqa: E402


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=40), st.floats(0, 1))
def test_percentile_is_numpys(values: list[float], share: float) -> None:
    assert serving_rows.percentile(values, share) == pytest.approx(
        numpy.quantile(values, share), rel=1e-9, abs=1e-9
    )


def test_percentiles_are_in_milliseconds() -> None:
    found = serving_rows.percentiles([0.010, 0.020, 0.030])
    assert found is not None
    assert found.p50 == pytest.approx(20.0)
    assert serving_rows.percentiles([]) is None


def row(
    method: str = "plain",
    level: int = 1,
    rate: float = 10.0,
    *,
    number: int = 0,
    run: str = "r",
    setup: str = "a",
    **more: object,
) -> serving_rows.Row:
    return serving_rows.Row(
        setup=setup,
        run=run,
        round=number,
        method=method,
        concurrency=level,
        tokens_per_second=rate,
        **more,
    )


def test_rows_survive_a_crash_and_another_setup(tmp_path: Path) -> None:
    path = tmp_path / "out" / "serving.jsonl"
    serving_rows.append(path, row(level=1, tokens=7))
    serving_rows.append(path, row(level=2))
    serving_rows.append(path, row(setup="other", level=4))
    with path.open("a") as file:
        file.write('{"setup": "a", "method": "plain", "concu')
    rows = serving_rows.read_rows(path, serving_rows.Row, "a")
    assert [(r.method, r.concurrency) for r in rows] == [("plain", 1), ("plain", 2)]
    assert rows[0].tokens == 7
    assert [r.concurrency for r in serving_rows.read_rows(path, serving_rows.Row)] == [4]
    assert serving_rows.read_rows(tmp_path / "none.jsonl", serving_rows.Row) == []


# What is measured ------------------------------------------------------------------------------------------


def common(methods: list[str], rounds: int = 5) -> command.Common:
    return command.Common(
        pair=None,  # type: ignore[arg-type]
        methods=methods,
        nodes=16,
        rounds=rounds,
        deadline=0.0,
        out=Path("out"),
        setup="a",
        run="r",
        machine="m",
    )


def plan(rounds: int = 5) -> serving.Plan:
    prompts = serving.mixed(read_prompts(prompts_file()))
    return serving.Plan(common(list(fleet.METHODS), rounds), [1, 4, 32], prompts, 4, 32)


def test_a_round_gives_all_methods_the_same_prompts_in_an_order_of_its_own() -> None:
    found = list(serving.groups(plan()))
    assert found == list(serving.groups(plan())), "an interrupted run must find the same order again"
    assert [g.round for g in found] == sorted(g.round for g in found)
    for number in range(5):
        assert {g.level for g in found if g.round == number} == {1, 4, 32}
    assert all(Counter(g.methods) == Counter(fleet.METHODS) for g in found)
    assert len({tuple(g.methods) for g in found}) == len(found)
    for group in found:
        assert len(group.jobs) == max(4, 3 * group.level)
        assert all(16 <= job.max_tokens <= 48 for job in group.jobs)
        kinds = Counter(job.prompt.kind for job in group.jobs)
        assert kinds["chat"] == kinds["code"]
    for level in (1, 4):
        used = [job.prompt.id for g in found if g.level == level for job in g.jobs]
        assert len(set(used)) == len(used), "another round, other prompts"


def test_kinds_alternate_until_one_is_used_up() -> None:
    prompts = [
        Prompt(id=f"{k}{i}", kind=k, prompt="x") for k, n in (("chat", 3), ("code", 1)) for i in range(n)
    ]
    assert [p.kind for p in serving.mixed(prompts)] in (
        ["chat", "code", "chat", "chat"],
        ["code", "chat", "chat", "chat"],
    )
    assert {p.id for p in serving.mixed(prompts)} == {p.id for p in prompts}


def test_an_interrupted_round_is_measured_again_at_the_load_it_broke_off_at() -> None:
    wanted = plan(rounds=1)
    rows = [row(m, level) for level in (1, 4) for m in fleet.METHODS if (m, level) != ("auto", 4)]
    assert {g.level for g in serving.unfinished(wanted, rows)} == {4, 32}
    rows.append(row("auto", 4, run="later"))
    assert {g.level for g in serving.unfinished(wanted, rows)} == {4, 32}, "one hour's rows"
    rows += [row(m, 4, run="later") for m in fleet.METHODS]
    assert {g.level for g in serving.unfinished(wanted, rows)} == {32}


# What rows say ---------------------------------------------------------------------------------------------


def test_ratios_are_within_a_round_and_a_run() -> None:
    rates = {"plain": (10, 20, 10, 10), "auto": (15, 20, 12, 90)}
    rows = [row(m, 1, r, number=n) for m, all_of in rates.items() for n, r in enumerate(all_of)]
    rows[-1] = rows[-1].model_copy(update={"run": "later"})
    results = serving_rows.Results(rows)
    ratio = results.ratios(1, "auto", "plain")
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high, ratio.rounds) == (1.2, 1.0, 1.5, 3)
    assert results.ratios(1, "chain", "plain") is None


def test_auto_is_held_against_the_best_median_of_the_others() -> None:
    rates = {
        "plain": (10, 10, 10),
        "2x2": (30, 11, 11),  # the greatest single cell, not the best method
        "4x4": (12, 12, 12),
        "auto": (11.4, 12, 13.2),
    }
    rows = [row(m, 8, r, number=n) for m, all_of in rates.items() for n, r in enumerate(all_of)]
    rows += [row("plain", 16), row("auto", 16, 9.0)]
    first, second = serving_rows.Results(rows).verdicts()
    assert (first.concurrency, first.best) == (8, "4x4")
    assert first.ratio.median == pytest.approx(1.0)
    assert first.ratio.low == pytest.approx(0.95)
    assert (second.best, second.ratio.median) == ("plain", pytest.approx(0.9))


def test_a_cell_is_the_median_of_its_rounds_and_compares_outputs() -> None:
    plain = [row(number=n, outputs={"x": "1", "y": "2"}) for n in range(2)]
    auto = [
        row(
            "auto",
            rate=r,
            number=n,
            outputs={"x": "1", "y": y},
            accept_length=1.5,
            widths={"2x2": 0.5, "1x1": w},
        )
        for n, (r, y, w) in enumerate(((10, "3", 0.5), (30, "2", 0.0)))
    ]
    cell = serving_rows.Results([*plain, *auto]).cell(1, "auto")
    assert cell is not None
    assert (cell.tokens_per_second, cell.same, cell.accept_length) == (20, 0.75, 1.5)
    assert cell.widths == {"2x2": 0.5, "1x1": 0.25}
    assert serving_plot.widths_text(cell.widths) == "2x2 50 %, 1x1 25 %"
    alone = serving_rows.Results(auto).cell(1, "auto")
    assert alone is not None
    assert (alone.same, alone.vs_plain) == (None, None)


def test_methods_stand_from_plain_over_widths_to_auto() -> None:
    mixed = ["auto", "16x6", "2x2", "chain", "plain", "8x6"]
    assert sorted(mixed, key=serving_rows.method_order) == ["plain", "chain", "2x2", "8x6", "16x6", "auto"]


def test_a_picture_is_drawn_of_whatever_is_there(tmp_path: Path) -> None:
    rows = [row(m, level, 10.0 + level) for m in ("plain", "4x4", "auto") for level in (1, 32)]
    serving_plot.plot(serving_rows.Results(rows), "title", tmp_path / "a.png")
    serving_plot.plot(serving_rows.Results([row("auto", 2)]), "title", tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert (tmp_path / "b.png").stat().st_size > 10_000


# A load that changes ---------------------------------------------------------------------------------------


def test_tokens_count_in_the_second_they_arrive_in() -> None:
    arrivals = [changing_load.Arrival(at, n) for at, n in ((0.1, 2), (0.9, 1), (1.0, 5), (2.99, 1), (3.0, 9))]
    assert changing_load.by_second(arrivals, 3) == [3, 5, 1]


def load_row(method: str, number: int, *tokens: int, run: str = "r") -> changing_load.LoadRow:
    phases = [[n, 0] for n in tokens]
    return changing_load.LoadRow(setup="a", run=run, round=number, method=method, tokens=phases, machine="m")


def test_the_oracle_takes_the_best_other_method_of_each_phase() -> None:
    rows = []
    for number in range(3):
        rows += [
            load_row("plain", number, 100, 100, 800, 100),
            load_row("2x2", number, 120, 100, 400, 140),
            load_row("8x6", number, 200, 150, 100, 150),
            load_row("auto", number, 190, 150, 800, 150),
        ]
    rows.append(load_row("plain", 3, 1, 1, 1, 1))  # a round that was broken off
    results = changing_load.Results(rows)
    assert results.rounds == [0, 1, 2]
    assert results.best_fixed() == "2x2"
    *phases, whole = results.verdicts()
    assert [v.best for v in phases] == ["8x6", "8x6", "plain", "8x6"]
    assert [v.ratio.median for v in phases] == [0.95, 1.0, 1.0, 1.0]
    assert whole.ratio.median == pytest.approx((190 + 150 + 800 + 150) / (200 + 150 + 800 + 150))
    assert (
        "| code, 4 in flight | 50.0 | 60.0 | 100.0 | 95.0 | 8x6 | 0.95x (0.95-0.95) |"
        in changing_load.markdown(rows)
    )


def test_a_load_round_of_two_runs_is_no_round() -> None:
    rows = [load_row("plain", 0, 1, 1, 1, 1), load_row("auto", 0, 1, 1, 1, 1, run="later")]
    assert changing_load.Results(rows).rounds == []


def test_a_load_is_drawn(tmp_path: Path) -> None:
    rows = [load_row(m, 0, 100, 90, 80, 70) for m in ("plain", "4x4", "auto")]
    changing_load.plot(changing_load.Results(rows), "title", tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 10_000


# Off -------------------------------------------------------------------------------------------------------


def off_row(method: str, seconds: float, **more: object) -> never_pays.OffRow:
    return never_pays.OffRow(
        setup="a",
        run="r",
        round=0,
        method=method,
        kind="wrong",
        concurrency=16,
        tokens=1000,
        seconds=seconds,
        machine="m",
        **more,
    )


def test_the_loss_is_split_into_what_it_is_made_of() -> None:
    def parts(drafter: float, commit: float) -> dict[str, float]:
        return {
            "drafter_seconds": drafter,
            "verify_seconds": 9.0,
            "commit_seconds": commit,
            "decode_steps": 50,
        }

    rows = [
        off_row("plain", 10.0),
        off_row("1x1", 10.4, parts=parts(0.0, 0.3)),
        off_row("auto", 10.5, parts=parts(0.05, 0.3), probes=2, wide=0.04),
    ]
    (loss,) = never_pays.losses(rows)
    assert loss.ratio == pytest.approx(10 / 10.5)
    assert loss.ready == pytest.approx(10 / 10.4)
    assert loss.projection == pytest.approx(0.03)
    assert loss.host == pytest.approx(0.01)
    assert loss.probes == pytest.approx(0.01)
    assert loss.drafting == pytest.approx(0.005)
    assert 1 / loss.ratio == pytest.approx(1 + loss.projection + loss.host + loss.probes)
    assert (
        "| wrong | 16 | 100.0 | 0.962 | 0.95x (0.95-0.95) | +3.0 % | +1.0 % | +1.0 % | +0.5 % | 2 | 4.0 % |"
        in (never_pays.markdown(rows))
    )
    assert never_pays.losses(rows[:2]) == []


def test_every_method_of_a_round_gets_the_same_requests() -> None:
    wanted = never_pays.Plan(
        common(list(never_pays.METHODS)), read_prompts(prompts_file()), ["noise"], [16], 8
    )
    first = never_pays.bodies(wanted, "noise", 16, 0)
    assert first == never_pays.bodies(wanted, "noise", 16, 0)
    assert first != never_pays.bodies(wanted, "noise", 16, 1)
    assert len({body["text"] for body in first}) == 16, "a shared prefix would be served from the cache"
    assert len({body["sampling_params"]["sampling_seed"] for body in first}) == 16
    greedy = never_pays.bodies(wanted, "wrong", 16, 0)
    assert all(body["sampling_params"]["temperature"] == 0 for body in greedy)
    todo = never_pays.unfinished(replace(wanted, common=common(list(never_pays.METHODS), 2)), [])
    assert [(g.round, g.kind, g.level) for g in todo] == [(0, "noise", 16), (1, "noise", 16)]


def test_useless_drafts_are_other_tokens_with_the_same_words_of_confidence() -> None:
    import torch
    from useless_drafts import candidates

    from sglang_dflash.step.width import Step, Width
    from sglang_dflash.worker.draft import Candidates

    ids = torch.tensor([[[0, 5, 9]]])
    drafted = Candidates(logprobs=torch.tensor([[[-0.1, -3.0, -4.0]]]), ids=ids)
    nothing = torch.zeros(1, dtype=torch.int64)
    step = Step(Width(4, 2), nothing, nothing, nothing, None, nothing)
    found = candidates(drafted, step, None)
    assert (found.ids != ids).all()
    assert (found.ids >= 0).all()
    assert torch.equal(found.logprobs, drafted.logprobs)
    step.noise = object()  # type: ignore[assignment]
    assert candidates(drafted, step, None) is drafted


# The servers and the command line --------------------------------------------------------------------------


def test_auto_is_told_by_the_steps_since_it_was_last_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: dict[str, object] = {}

    class Marker:
        @property
        def model_extra(self) -> dict[str, object]:
            return {"width": said}

    class Info:
        marker = Marker()

    monkeypatch.setattr(fleet, "read_server_info", lambda url: Info())
    servers = object.__new__(fleet.Fleet)
    servers.folder, servers._auto = tmp_path, fleet.Steps({}, 0)
    servers.servers = {"tree": type("S", (), {"url": "x"})()}  # type: ignore[dict-item]
    said.update(policy="auto", width="2x2", steps={"2x2": 0.75, "1x1": 0.25}, rounds=100, probes=3)
    first = servers.steps("auto")
    assert first == fleet.Steps({"2x2": 75, "1x1": 25}, 3)
    said.update(steps={"2x2": 0.375, "1x1": 0.625}, rounds=200, probes=4)
    assert servers.steps("auto") == fleet.Steps({"1x1": 100}, 1)
    assert fleet.Steps({"1x1": 1, "2x2": 3}, 0).shares == {"1x1": 0.25, "2x2": 0.75}
    assert servers.steps("plain") is None
    with pytest.raises(fleet.UserError, match="was told 3x3 and says"):
        servers.steps("3x3")
    said.clear()
    said.update(policy="fixed", width="3x3")
    assert servers.steps("3x3") is None


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("serving", ["--methods", "eagle"], "no method 'eagle': plain, chain, or"),
        ("serving", ["--methods", "32x6"], "is wider than 16 nodes"),
        ("serving", ["--methods", "random:3"], "no width to compare"),
        ("serving", ["--concurrency", "0"], "must be above 0"),
        ("serving", ["--concurrency", "a"], "not a list of numbers"),
        ("serving", ["--minutes", "-1"], "must be above 0"),
        ("serving", ["--threads", "two"], "not a number of threads"),
        ("serving", ["--model-path", "/nowhere"], "no model at /nowhere"),
        ("changing_load", ["--seconds", "0"], "must be above 0"),
        ("never_pays", ["--drafts", "right"], "not a list of: wrong, noise"),
        ("never_pays", ["--methods", "plain"], "--methods is always plain,1x1,auto here"),
    ],
)
def test_wrong_options_are_one_line(
    script: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main = {"serving": serving.main, "changing_load": changing_load.main, "never_pays": never_pays.main}[
        script
    ]
    assert command.main_of(main, [*words, "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_a_script_ends_with_its_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "serving.py"), "--minutes", "0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr == "error: --rounds, --nodes and --minutes must be above 0\n"


def test_a_fleet_forgets_the_width_of_the_last_run(tmp_path: Path) -> None:
    """A server that finds itself pinned measures no cost table, and ``auto`` would start from a guess."""
    (tmp_path / "width").write_text("1x1\n")
    with fleet.Fleet(None, [], tmp_path) as none:  # type: ignore[arg-type]
        assert not none.control.exists()


@pytest.mark.parametrize(("anew", "fleets"), [(True, [False, True, False]), (False, [False])])
def test_servers_are_started_anew_in_each_round(
    anew: bool, fleets: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tree server now last, now first; only ``--same-servers`` keeps them."""
    started: list[bool] = []

    @contextmanager
    def fleet_of(*_: object, tree_first: bool, **__: object) -> Iterator[None]:
        started.append(tree_first)
        yield

    monkeypatch.setattr(serving, "Fleet", fleet_of)
    monkeypatch.setattr(serving, "warm_up", lambda *_: None)
    monkeypatch.setattr(serving, "measure", lambda _, __, g, method: row(method, g.level, number=g.round))
    wanted = replace(plan(rounds=3), anew=anew)
    wanted = replace(wanted, common=replace(wanted.common, out=tmp_path, deadline=math.inf))
    rows: list[serving.Row] = []
    with Progress(disable=True) as bars:
        assert serving.run(wanted, list(serving.groups(wanted)), rows, bars)
    assert started == fleets
    assert len(rows) == 3 * 3 * len(fleet.METHODS)


@pytest.mark.parametrize(
    ("tree_first", "order"), [(False, ["plain", "chain", "tree"]), (True, ["tree", "plain", "chain"])]
)
def test_a_tree_server_starts_alone(
    tree_first: bool, order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step costs is measured at its start, when no other may be starting."""
    starting: list[str] = []
    launched: list[str] = []

    class Quiet:
        def __init__(self, words: list[str], *, port: int, log: Path, **_: object) -> None:
            self.mode, self.port, self.url = log.stem, port, ""

        def launch(self) -> None:
            assert self.mode != "tree" or not starting
            assert "tree" not in starting
            starting.append(self.mode)
            launched.append(self.mode)

        def wait(self) -> None:
            starting.remove(self.mode)

        def stop(self) -> None: ...

    info = SimpleNamespace(marker=SimpleNamespace(mode="tree"))
    monkeypatch.setattr(fleet, "Server", Quiet)
    monkeypatch.setattr(fleet, "read_server_info", lambda url: info)
    flags: dict[fleet.Mode, list[str]] = {"plain": [], "chain": [], "tree": []}
    pair = fleet.Target(tmp_path, tmp_path, flags, {}, 10)
    with fleet.Fleet(pair, ["auto", "chain", "plain"], tmp_path, tree_first=tree_first):
        assert launched == order
        assert not starting
