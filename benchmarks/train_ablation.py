"""Every switch of the training recipe alone against the plain recipe, on one budget, with seeds.

All runs start from the same drafter (the plain recipe for ``--start-steps`` steps), see the same
documents, take the same number of steps of the same number of blocks, and are judged on the same
held-out answers. Finished runs are kept in ``--json`` and skipped when the command is run again.

    python benchmarks/train_ablation.py --corpus examples/corpus/self-prompted-2 --features-dir features
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from sglang_dflash.cli.data import TARGET
from sglang_dflash.train import checkpoint
from sglang_dflash.train.batches import Document, load_documents
from sglang_dflash.train.chat import Chat
from sglang_dflash.train.corpus import write_atomically
from sglang_dflash.train.features import FeatureWriter
from sglang_dflash.train.judge import Walk, chain_accepts, draft_table, tree_accepts
from sglang_dflash.train.loss import LossSettings
from sglang_dflash.train.model import Drafter
from sglang_dflash.train.target import DenseTarget
from sglang_dflash.train.trainer import Trainer, TrainSettings

logger = logging.getLogger("ablation")
LAYERS = (1, 8, 15, 22, 28)
POLICIES = ("chain", "tree-32")


@dataclass(frozen=True)
class Variant:
    """One switch: what it sets in the loss and in the loop, and how many seeds it gets."""

    name: str
    loss: dict = field(default_factory=dict)
    loop: dict = field(default_factory=dict)
    seeds: int = 2


VARIANTS = (
    Variant("plain recipe", seeds=3),
    Variant("KL 0.5", {"kl": 0.5}),
    Variant("KL 0.7", {"kl": 0.7}, seeds=1),
    Variant("KL 1.0", {"kl": 1.0}),
    Variant("blocks 4, 6, 8 in turn", {}, {"schedule": ((0.0, 4), (0.4, 6), (0.8, 8))}),
    Variant("complementary masks, half of the steps", {}, {"complementary": 0.5}),
    Variant("confidence term 0.5", {"confidence": 0.5}),
    Variant("tree term 0.5", {"tree": 0.5}),
)


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--target", type=Path, default=TARGET)
    p.add_argument("--corpus", type=Path, nargs="+", required=True)
    p.add_argument("--judge-corpus", type=Path, nargs="*", help="held-out answers; default: of --corpus")
    p.add_argument("--features-dir", type=Path, required=True, help="one folder per corpus is made in it")
    p.add_argument("--out", type=Path, default=Path("out/ablation"), help="scratch folder")
    p.add_argument("--json", type=Path, default=Path("benchmarks/results/train_ablation.json"))
    p.add_argument("--start-steps", type=int, default=120)
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--rows", type=int, default=4)
    p.add_argument("--anchors", type=int, default=32)
    p.add_argument("--rate", type=float, default=1.0e-3)
    p.add_argument("--negatives", type=int, default=2048)
    p.add_argument("--answers", type=int, default=16, help="held-out answers, half of them code")
    p.add_argument("--only", nargs="*", help="names of variants")
    return p.parse_args()


def documents(o: argparse.Namespace, target: DenseTarget) -> tuple[list[Document], list[Document]]:
    def load(folders: list[Path], split: str) -> list[Document]:
        found = []
        for folder in folders:
            writer = FeatureWriter(o.features_dir / folder.name, target, LAYERS)
            found += load_documents([folder], split, writer)
        return found

    held = load(o.judge_corpus or o.corpus, "heldout")
    half = o.answers // 2
    code = [d for d in held if d.family == "code"][:half]
    chat = [d for d in held if d.family == "chat"][: o.answers - len(code)]
    return load(o.corpus, "train"), chat + code


def settings(o: argparse.Namespace, variant: Variant, seed: int, steps: int) -> TrainSettings:
    plain = TrainSettings(
        steps=steps, rate=o.rate, rows=o.rows, anchors=o.anchors, negatives=o.negatives, seed=seed,
        loss=LossSettings(gamma=4.0, **variant.loss), eval_every=math.inf, save_every=math.inf,
    )  # fmt: skip
    return replace(plain, **variant.loop)


def start(o: argparse.Namespace, target: DenseTarget, train: list[Document]) -> Path:
    """The common start: the plain recipe from the target's last layers, trained once and kept."""
    folder = o.out / "start"
    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(0)
    config = checkpoint.config_for(
        target, layers=3, block=8, target_layers=LAYERS, mask_token=Chat(o.target).mask_token()[0]
    )
    drafter = Drafter(config).to(target.dtype)
    depth = target.num_layers
    checkpoint.warm_start(drafter, target, (depth - 3, depth - 2, depth - 1), train[0].tokens[None, :256])
    run = settings(o, VARIANTS[0], 1000, o.start_steps)
    Trainer(drafter, target, train, [], run, o.out / "start-run", Progress("start")).run()
    checkpoint.save_drafter(folder, drafter)
    return folder


class Progress:
    def __init__(self, name: str) -> None:
        self.name, self.last = name, time.monotonic()

    def __call__(self, point) -> None:
        if time.monotonic() - self.last > 60:
            self.last = time.monotonic()
            logger.info("%s step %d loss %.3f accept %.2f", self.name, point.step, point.loss, point.accept)


def judged(drafter: Drafter, target: DenseTarget, held: list[Document]) -> dict:
    """Passes and tokens of every answer, for each policy, by the weights as they are saved (bf16)."""
    drafter = drafter.to(torch.bfloat16).to(target.dtype).eval()
    out: dict = {policy: [] for policy in POLICIES}
    hits, seen = torch.zeros(drafter.config.block - 1), 0
    for document in held:
        table = draft_table(drafter, target, document)
        for policy, accepts in zip(POLICIES, (chain_accepts(table), tree_accepts(table, 32)), strict=True):
            walk = Walk()
            walk.add(accepts)
            out[policy].append([walk.passes, walk.tokens])
        hits += ((table.rank == 0) & (table.labels >= 0)).sum(0)
        seen += len(table.labels)
    return out | {"right": [round(x, 4) for x in (hits / seen).tolist()]}


def length(run: dict, policy: str, picked: list[int] | None = None) -> float:
    rows = run[policy] if picked is None else [run[policy][i] for i in picked]
    return sum(r[1] for r in rows) / sum(r[0] for r in rows)


def table(result: dict) -> str:
    """Mean over seeds, spread, and the gain over the plain recipe with its standard error over answers."""
    runs: dict[str, list[dict]] = {}
    order = [variant.name for variant in VARIANTS]
    for run in sorted(result["runs"], key=lambda r: (order.index(r["variant"]), r["seed"])):
        runs.setdefault(run["variant"], []).append(run)
    base = runs.get(VARIANTS[0].name, [])
    lines = ["| recipe | seeds | chain | gain, % | tree-32 | gain, % |", "| --- " * 6 + "|"]
    for name, rows in runs.items():
        cells = [name, str(len(rows))]
        for policy in POLICIES:
            values = [length(r, policy) for r in rows]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
            cells.append("" if rows is base or not base else gain(rows, base, policy))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gain(rows: list[dict], base: list[dict], policy: str) -> str:
    """Relative gain of the seeds' mean, and the bootstrap error of resampling seeds and answers together."""
    rng = torch.Generator().manual_seed(0)
    answers = len(rows[0][policy])

    def draw(group: list[dict], picked: list[int] | None) -> float:
        index = (
            range(len(group))
            if picked is None
            else torch.randint(len(group), (len(group),), generator=rng).tolist()
        )
        return statistics.mean(length(group[i], policy, picked) for i in index)

    middle = 100 * (draw(rows, None) / draw(base, None) - 1)
    drawn = []
    for _ in range(400):
        picked = torch.randint(answers, (answers,), generator=rng).tolist()
        drawn.append(100 * (draw(rows, picked) / draw(base, picked) - 1))
    return f"{middle:+.1f} ± {statistics.stdev(drawn):.1f}"


def main() -> None:
    o = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    target = DenseTarget(o.target)
    train, held = documents(o, target)
    budget = {
        "steps": o.steps, "blocks_a_step": o.rows * o.anchors, "rate": o.rate, "start_steps": o.start_steps,
        "negatives": o.negatives, "answers": len(held),
        "answer_tokens": sum(len(d.tokens) - d.prompt_len for d in held),
        "train_tokens": sum(len(d.tokens) - d.prompt_len for d in train), "dtype": str(target.dtype),
    }  # fmt: skip
    result = json.loads(o.json.read_text()) if o.json.is_file() else {**budget, "runs": []}
    changed = [k for k, v in budget.items() if result[k] != v]
    if changed:
        raise SystemExit(f"error: {o.json} was made with another {changed[0]}; give another --json")
    begin = start(o, target, train)
    if "start" not in result:
        result["start"] = judged(checkpoint.load_drafter(begin), target, held)
    chosen = [v for v in VARIANTS if not o.only or v.name in o.only]
    # Seed by seed, so that an interrupted table has all its rows.
    for seed in range(max(v.seeds for v in chosen)):
        for variant in (v for v in chosen if seed < v.seeds):
            if any((r["variant"], r["seed"]) == (variant.name, seed) for r in result["runs"]):
                continue
            drafter = checkpoint.load_drafter(begin)
            place = o.out / "run"
            began = time.monotonic()
            name = f"{variant.name}, seed {seed}"
            trainer = Trainer(
                drafter, target, train, [], settings(o, variant, seed, o.steps), place, Progress(name)
            )
            trainer.run()
            seconds = time.monotonic() - began
            run = {"variant": variant.name, "seed": seed, "seconds": round(seconds, 1)}
            run |= judged(drafter, target, held)
            result["runs"].append(run)
            write_atomically(o.json, lambda p: p.write_text(json.dumps(result, indent=1) + "\n"))
            (place / "state.pt").unlink()
            logger.info("%s: chain %.3f, tree-32 %.3f", name, length(run, "chain"), length(run, "tree-32"))
    o.json.with_suffix(".md").write_text(table(result) + "\n")
    first = {policy: round(length(result["start"], policy), 3) for policy in POLICIES}
    print(f"common start: {first}")
    print(table(result))


if __name__ == "__main__":
    main()
