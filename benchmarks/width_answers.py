"""What every width would accept from every anchor of the benchmark's answers; feeds width_simulation.py.

    python benchmarks/width_answers.py --out out/width_answers.pt --limit 40

The embedded target answers the prompts (greedy, and sampled at temperature 0.8), its shipped drafter drafts
from every anchor with each block, and every tier's tree is walked. Minutes on one core.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from dflash_kernels import build_tree

from sglang_dflash.models.registry import SMOLLM2
from sglang_dflash.train.answers import answer_prompts
from sglang_dflash.train.checkpoint import load_drafter
from sglang_dflash.train.judge import Table, draft_table, tree_accepts
from sglang_dflash.train.target import DenseTarget
from sglang_dflash.worker.width.tiers import TIERS

PROMPTS = Path(__file__).parent / "prompts.jsonl"
logger = logging.getLogger("width_answers")


@dataclass
class Answer:
    """One answer of P anchors, T tiers (2 and wider) and blocks ``b``.

    accepts[b]: int16 [P, T], drafted tokens accepted (bonus not included)
    mass[b]: float32 [P, T, b - 1], the drafter's probability that the accepted path reaches a depth
    """

    family: str
    temperature: float
    prompt: int
    accepts: dict[int, torch.Tensor]
    mass: dict[int, torch.Tensor]


def masses(table: Table, tiers: tuple[int, ...]) -> torch.Tensor:
    """[P, T, L]: probability by depth of all nodes in each tier's best-first tree.

    A node's probability is the product along its path; with a kept order the first n nodes are not always
    tier n's tree, so each tier is built.
    """
    P, L, _ = table.ids.shape
    out = torch.zeros(P, len(tiers), L)
    for t, nodes in enumerate(tiers):
        tree = build_tree(table.anchor, table.logprobs, table.ids, num_nodes=nodes)
        # log-probability of each node: the candidate's at its depth, plus the parent's.
        score = torch.zeros(P, nodes)
        rows = torch.arange(P)
        for node in range(1, nodes):
            depth = tree.depth[:, node].long() - 1
            match = table.ids[rows, depth] == tree.tokens[:, node, None]
            own = torch.where(match, table.logprobs[rows, depth], float("-inf")).amax(1)
            score[:, node] = score.gather(1, tree.parents[:, node, None].long())[:, 0] + own
        # Padding stands in no list of children; its token may be a candidate's by chance.
        linked = torch.zeros(P, nodes + 1, dtype=torch.bool)
        for links in (tree.first_child, tree.next_sibling):
            linked.scatter_(
                1, torch.where(links > 0, links.long(), nodes), torch.ones_like(links, dtype=torch.bool)
            )
        probability = score[:, 1:].exp() * linked[:, 1:nodes]
        out[:, t].scatter_add_(1, tree.depth[:, 1:].long() - 1, probability)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/width_answers.pt"))
    parser.add_argument(
        "--limit", type=int, default=40, help="answers of each temperature, half of them code"
    )
    parser.add_argument("--max-new", type=int, default=200)
    parser.add_argument("--blocks", default="2,3,4,5,6")
    parser.add_argument("--temperatures", default="0,0.8")
    o = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    tiers = tuple(n for n in TIERS if 2 <= n <= 64)
    blocks = [int(x) for x in o.blocks.split(",")]
    target = DenseTarget(SMOLLM2.target_dir)
    drafter = load_drafter(SMOLLM2.drafter_dir).to(target.dtype).eval()
    answers = []
    for temperature in map(float, o.temperatures.split(",")):
        documents = answer_prompts(
            target, SMOLLM2.target_dir, PROMPTS, drafter.config.target_layers, o.max_new, temperature, o.limit
        )
        logger.info("%d answers at temperature %g", len(documents), temperature)
        for i, document in enumerate(documents):
            accepts, mass = {}, {}
            for b in blocks:
                table = draft_table(drafter, target, document, b)
                accepts[b] = torch.stack([tree_accepts(table, n) for n in tiers], 1).short()
                mass[b] = masses(table, tiers)
            answers.append(Answer(document.family, temperature, document.prompt_len, accepts, mass))
            logger.info("drafted %d of %d", i + 1, len(documents))
    o.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"tiers": tiers, "blocks": blocks, "answers": [vars(a) for a in answers]}, o.out)


if __name__ == "__main__":
    main()
