"""The width policy on recorded drafts and measured pass costs, beside every fixed width.

    python benchmarks/width_answers.py --out out/width_answers.pt     # once, minutes
    python benchmarks/width_simulation.py --answers out/width_answers.pt

A simulated server decodes the benchmark's answers with so many in flight. A step's outcome is what
width_answers.py recorded at each request's anchor; its price is interpolated between the passes of
``TARGET``. The policy sees both two steps late, the price with noise, and starts from a table measured with
noise. Tokens per second are counted by the prices without noise, so that small differences can be seen.
"""

from __future__ import annotations

import argparse
import bisect
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from sglang_dflash.step.width import PLAIN, Width
from sglang_dflash.worker.width.cost import Cell, CostTable, plan
from sglang_dflash.worker.width.gain import Gains
from sglang_dflash.worker.width.measure import measure
from sglang_dflash.worker.width.policy import FixedWidth, Policy, WidthPolicy
from sglang_dflash.worker.width.tiers import TIERS

# ms of a target pass by (requests, cached tokens) and rows: SmolLM2-135M in bfloat16, one thread of an AMD
# EPYC with AVX2. 1 row is plain decoding.
TARGET: dict[int, dict[tuple[int, int], dict[int, float]]] = {
    256: {
        (1, 256): {1: 83, 2: 84, 4: 87, 8: 104, 16: 144, 32: 214},
        (4, 256): {1: 101, 2: 126, 4: 157, 8: 218, 16: 366, 32: 662},
        (16, 256): {1: 225, 2: 272, 4: 395, 8: 693, 16: 1211, 32: 2389},
    },
    96: {
        (1, 96): {1: 80, 2: 81, 4: 84, 8: 100, 16: 138, 32: 206},
        (4, 96): {1: 91, 2: 108, 3: 123, 4: 140, 6: 162, 8: 202, 16: 340, 32: 620},
        (16, 96): {1: 152, 2: 217, 3: 302, 4: 349, 6: 480, 8: 595, 16: 1050, 32: 2050},
    },
}  # fmt: skip
WIDEST = Width(32, 6)
LAG = 2


def line(points: Sequence[tuple[float, float]], x: float) -> float:
    """Linear between the points and beyond the last two."""
    xs = [p[0] for p in points]
    i = min(max(bisect.bisect_right(xs, x), 1), len(xs) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


class World:
    """True prices: of one cached length, plus what the table's measuring does not see."""

    def __init__(self, length: int, unseen_ms: float = 0.0, unseen_ms_per_request: float = 0.0) -> None:
        self.length = length
        self.columns = [(key[0], sorted(row.items())) for key, row in TARGET[length].items()]
        self.unseen = unseen_ms, unseen_ms_per_request
        self._known: dict[tuple[Width, int], float] = {}

    def target(self, n: int, requests: int) -> float:
        if n == 1:
            return line([(r, row[0][1]) for r, row in self.columns], requests)
        return line([(r, line(row[1:], n)) for r, row in self.columns], requests)

    def drafter(self, b: int, requests: int) -> float:
        return 8.0 + requests * (0.35 * b + 0.9 * (b - 1))

    def ms(self, width: Width, requests: int) -> float:
        key = (width, requests)
        if key not in self._known:
            total = self.target(width.nodes, requests)
            if not width.plain:
                total += self.drafter(width.block, requests) + self.unseen[0] + self.unseen[1] * requests
            self._known[key] = total
        return self._known[key]


@dataclass
class Recorded:
    """An answer: drafted tokens accepted by anchor, and the drafter's word on it, by block."""

    family: str
    sampled: bool
    anchors: int
    accepts: dict[int, list[list[int]]]
    mass: dict[int, np.ndarray]


def read_answers(path: Path) -> tuple[tuple[int, ...], list[Recorded]]:
    stored = torch.load(path)
    answers = []
    for a in stored["answers"]:
        mass = {
            b: np.pad(m.numpy(), ((0, 0), (1, 0), (0, 0))) for b, m in a["mass"].items()
        }  # the plain tier's row in front
        accepts = {b: x.tolist() for b, x in a["accepts"].items()}
        answers.append(Recorded(a["family"], a["temperature"] > 0, len(accepts[2]), accepts, mass))
    return stored["tiers"], answers


@dataclass
class Noise:
    """Of measured times: log-normal, with a slow swing and bursts in which the machine is slower."""

    sigma: float = 0.08
    swing: float = 0.1
    burst: float = 0.25
    hang: float = 0.001

    def factors(self, seed: int) -> Iterator[float]:
        rng = random.Random(seed)
        step, slow = 0, 0
        while True:
            step += 1
            if rng.random() < 0.004:
                slow = rng.randint(20, 150)
            slow = max(slow - 1, 0)
            level = 1 + self.swing * math.sin(step / 300) + (self.burst if slow else 0.0)
            if rng.random() < self.hang:
                level *= 40
            yield level * math.exp(rng.gauss(0, self.sigma))


@dataclass
class Phase:
    """A load: so many in flight, of these answers, until so many tokens have come."""

    name: str
    requests: int
    answers: list[Recorded]
    tokens: int


@dataclass
class Outcome:
    tokens: int = 0
    ms: float = 0.0
    widths: Counter[Width] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        return self.tokens / self.ms * 1e3


class Server:
    """Decodes phases one after the other with one policy."""

    def __init__(self, world: World, tiers: Sequence[int], policy: Policy, seed: int, noise: Noise) -> None:
        self.world, self.policy = world, policy
        self.tier = {n: i for i, n in enumerate(tiers)}
        self.noise = noise.factors(seed)
        self.results: deque[Callable[[], None]] = deque()
        self.seed = seed

    def run(self, phase: Phase) -> Outcome:
        order = list(range(len(phase.answers)))
        random.Random(f"{self.seed} {phase.name}").shuffle(order)
        queue = iter(order * 1000)
        live: list[list] = []
        out = Outcome()
        first = True
        while out.tokens < phase.tokens:
            while len(live) < phase.requests:
                answer = phase.answers[next(queue)]
                # The first ones begin anywhere, or all requests would end together.
                live.append([answer, (len(live) * 37) % answer.anchors if first else 0])
            first = False
            out.tokens += self._step(live, out)
            live = [r for r in live if r[1] < r[0].anchors]
        return out

    def _step(self, live: list[list], out: Outcome) -> int:
        while len(self.results) >= LAG:
            self.results.popleft()()
        requests = len(live)
        share = sum(r[0].sampled for r in live) / requests
        width = self.policy.choose(requests, float(self.world.length), share)
        ms = self.world.ms(width, requests)
        out.ms += ms
        out.widths[width] += 1
        accepted, sampled, mass = [], [], None
        auto = isinstance(self.policy, WidthPolicy)
        if auto and not width.plain:
            # As far as a device would compute it: the step's own tier and two more.
            tiers = min(self.tier[width.nodes] + 4, len(self.tier) + 1)
            mass = np.zeros((2, tiers, width.depth))
        for request in live:
            answer, at = request
            got = 1
            if not width.plain:
                got += answer.accepts[width.block][at][self.tier[width.nodes]]
                if mass is not None:
                    mass[int(answer.sampled)] += answer.mass[width.block][at, : mass.shape[1]]
            got = min(got, answer.anchors - at)
            request[1] += got
            accepted.append(got)
            sampled.append(answer.sampled)
        if auto:
            taken = ms * next(self.noise)

            def result() -> None:
                self.policy.cost.observe(width, requests, float(self.world.length), taken)
                self.policy.gains.observe(width, sampled, accepted, mass)

            self.results.append(result)
        return sum(accepted)


def measured_table(world: World, seed: int, noise: Noise, most_requests: int = 48) -> CostTable:
    """What ten seconds of measuring at the start give, in a process that had a good or a bad moment."""
    rng = random.Random(seed)
    speed = math.exp(rng.gauss(0, 0.1))
    table = CostTable()
    now = [0.0]

    def run(cell: Cell) -> dict[Cell, float]:
        if cell.what == "rest":
            true = 0.5
        elif cell.what == "target":
            true = world.target(cell.rows, cell.requests)
        else:
            true = world.drafter(cell.rows, cell.requests)
        ms = true * speed * math.exp(rng.gauss(0, noise.sigma))
        now[0] += ms / 1e3
        return {cell: ms}

    measure(table, plan(WIDEST, most_requests, 8192), run, 10.0, clock=lambda: now[0])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=Path, default=Path("out/width_answers.pt"))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, choices=sorted(TARGET), help="cached tokens")
    parser.add_argument(
        "--generic", action="store_true", help="start from the generic drafter, not evaluated"
    )
    parser.add_argument("--unseen", type=float, default=0.0, help="ms of a tree step that measuring misses")
    parser.add_argument("--noise", type=float, default=0.08, help="of a step's measured time")
    o = parser.parse_args()
    tiers, answers = read_answers(o.answers)
    run = Comparison(World(o.length, o.unseen, o.unseen / 8), tiers, o.seeds, Noise(o.noise))
    greedy = [a for a in answers if not a.sampled]
    run.accept = None if o.generic else evaluation(greedy, tiers)
    groups = {
        "all": greedy,
        "code": [a for a in greedy if a.family == "code"],
        "chat": [a for a in greedy if a.family == "chat"],
        "sampled": [a for a in answers if a.sampled],
    }
    columns = (
        "answers",
        "in flight",
        "best fixed",
        "its gain",
        "auto's gain",
        "of best",
        "least of the seeds",
    )
    print(f"| {' | '.join((*columns, 'probes', 'steps of auto'))} |\n" + "|---" * (len(columns) + 2) + "|")
    for name, members in groups.items():
        for requests in (1, 2, 4, 8, 16, 32) if name == "all" else (1, 4, 16):
            run.load(Phase(name, requests, members, 6000 + 600 * requests))
    print("\nA load that changes, each phase beside the width that is best for it:\n")
    for seed in range(o.seeds):
        run.changing(groups, seed)


class Comparison:
    """Auto beside every fixed width in one world, over several seeds of order, noise and measuring."""

    def __init__(self, world: World, tiers: Sequence[int], seeds: int, noise: Noise) -> None:
        self.world, self.tiers, self.seeds, self.noise = world, tiers, seeds, noise
        self.accept: dict[str, float] | None = None

    def fixed(self, phase: Phase, seed: int) -> dict[Width, float]:
        """Tokens per second of every fixed width."""
        widths = [PLAIN]
        for n in (n for n in TIERS if 2 <= n <= WIDEST.nodes):
            widths += [Width(n, b) for b in range(2, min(WIDEST.block, n + 1) + 1)]
        return {w: self._server(FixedWidth(w), seed).run(phase).rate for w in widths}

    def load(self, phase: Phase) -> None:
        """One row: so many in flight all the time."""
        gains, shares, steps, probes = [], [], Counter[Width](), 0
        for seed in range(self.seeds):
            rates = self.fixed(phase, seed)
            best = max(rates, key=rates.__getitem__)
            policy = self._auto(seed)
            found = self._server(policy, seed).run(phase)
            gains.append((rates[best] / rates[PLAIN], found.rate / rates[PLAIN]))
            shares.append(found.rate / rates[best])
            steps += found.widths
            probes += policy.why()["probes"]
        total = sum(steps.values())
        often = ", ".join(f"{w} {c / total:.0%}" for w, c in steps.most_common(4))
        of_fixed, of_auto = (sum(g[k] for g in gains) / len(gains) for k in (0, 1))
        cells = (phase.name, phase.requests, best, f"{of_fixed:.3f}x", f"{of_auto:.3f}x")
        cells = (
            *cells,
            f"{sum(shares) / len(shares):.3f}",
            f"{min(shares):.3f}",
            f"{probes / total:.1%}",
            often,
        )
        print(f"| {' | '.join(map(str, cells))} |", flush=True)

    def changing(self, groups: dict[str, list[Recorded]], seed: int) -> None:
        """One policy through phases of different loads and texts, beside an oracle that knows the phase."""
        phases = [
            Phase("code", 1, groups["code"], 3000),
            Phase("chat", 1, groups["chat"], 3000),
            Phase("all", 32, groups["all"], 20000),
            Phase("chat", 16, groups["chat"], 8000),
            Phase("code", 4, groups["code"], 5000),
            Phase("all", 1, groups["all"], 3000),
        ]
        server = self._server(self._auto(seed), seed)
        mine = oracle = 0.0
        single, parts = Counter[Width](), []
        for phase in phases:
            found, rates = server.run(phase), self.fixed(phase, seed)
            mine += found.ms
            oracle += found.tokens / max(rates.values()) * 1e3  # the same tokens at the other's rate
            for width, rate in rates.items():
                single[width] += found.tokens / rate * 1e3
            parts.append(f"{phase.name} {phase.requests}: {found.rate / max(rates.values()):.3f}")
        one = min(single, key=single.__getitem__)
        print(
            f"- seed {seed}: {oracle / mine:.3f} of the oracle ({', '.join(parts)}), "
            f"{single[PLAIN] / mine:.3f}x plain, {single[one] / mine:.3f}x the best fixed width, {one}",
            flush=True,
        )

    def _auto(self, seed: int) -> WidthPolicy:
        table = measured_table(self.world, seed, self.noise)
        return WidthPolicy(WIDEST, table, Gains(WIDEST.block, self.accept))

    def _server(self, policy: Policy, seed: int) -> Server:
        return Server(self.world, self.tiers, policy, seed, self.noise)


def evaluation(answers: list[Recorded], tiers: Sequence[int]) -> dict[str, float]:
    """What an evaluation of the drafter stores: tokens per pass by width, over all anchors walked."""
    out = {}
    for n in (2, 4, 8, 16, 32):
        for b in (2, 4, 6):
            tokens = passes = 0
            for a in answers:
                at = 0
                while at < a.anchors:
                    step = min(a.accepts[b][at][list(tiers).index(n)] + 1, a.anchors - at)
                    tokens, passes, at = tokens + step, passes + 1, at + step
            out[f"{n}x{b}"] = tokens / passes
    return out


if __name__ == "__main__":
    main()
