"""What each source of knowledge brings to a draft tree: tokens per target pass, offline.

    python benchmarks/sources.py                             # the shipped drafter, with and without recall
    python benchmarks/sources.py --drafters FOLDER,FOLDER    # several, e.g. one with a selector

The target answers four groups of prompts by plain decoding: chat and code (benchmarks/prompts.jsonl), copy
and edit (benchmarks/copy_edit.jsonl), and chat and code again at temperature 1. Every answer is then walked
as a server would walk it: a tree of the budget at every anchor that the walk meets, from the drafter alone or
with what the request's own text recalls, whose chances are learned on the way (worker/recall). Where nothing
is recalled the numbers are those of `sglang-dflash eval`. Minutes on one core; rows go to out/sources.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from dflash_kernels import accept_tree, build_tree
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Printed

from sglang_dflash.cli.data import TARGET
from sglang_dflash.cli.evaluate import SHIPPED
from sglang_dflash.step.history import TokenHistory
from sglang_dflash.step.width import Step, Width
from sglang_dflash.train.answers import answer_prompts
from sglang_dflash.train.batches import Document
from sglang_dflash.train.checkpoint import load_drafter
from sglang_dflash.train.judge import Table, chain_accepts, draft_table
from sglang_dflash.train.target import DenseTarget
from sglang_dflash.worker.draft import Candidates
from sglang_dflash.worker.recall import RecallStage

HERE = Path(__file__).parent
BUDGETS = (8, 16, 32)


@dataclass
class Count:
    """Tokens of so many target passes."""

    passes: int = 0
    tokens: int = 0

    @property
    def length(self) -> float:
        return self.tokens / max(self.passes, 1)


def chain_walk(table: Table) -> Count:
    """The drafter's best path alone."""
    accepts = chain_accepts(table).tolist()
    count, i = Count(), 0
    while i < len(accepts):
        taken = min(accepts[i] + 1, len(accepts) - i)
        count.passes += 1
        count.tokens += taken
        i += taken
    return count


def tree_walk(document: Document, table: Table, nodes: int, recall: RecallStage | None) -> Count:
    """A tree at every anchor that the walk meets, with what is recalled in it where ``recall`` is given."""
    tokens, start = document.tokens, document.prompt_len
    history = TokenHistory(1, len(tokens) + nodes, "cpu")
    history.tokens[0, : len(tokens)] = tokens.int()
    # Behind the end stands a token that nobody drafts.
    ahead = torch.cat([tokens, tokens.new_full((nodes + 1,), -1)])
    rows, count, i = torch.zeros(1, dtype=torch.int64), Count(), 0
    block = table.labels.shape[1] + 1
    while i < len(table.anchor):
        here = torch.tensor([start + i])
        drafted = Candidates(
            table.logprobs[i : i + 1],
            table.ids[i : i + 1],
            None if table.edges is None else table.edges[i : i + 1],
        )
        step = Step(
            Width(nodes, block), table.anchor[i : i + 1], here, here, None, here,
            deepest=nodes - 1 if recall else block - 1,
        )  # fmt: skip
        recalled = recall(history, rows, step, drafted) if recall else None
        tree = build_tree(
            step.anchor, drafted.logprobs, drafted.ids, num_nodes=nodes, edges=drafted.edges,
            chain=recalled.chain if recalled else None,
        )  # fmt: skip
        said = ahead[start + i + 1 + tree.depth.long()]
        accepted = accept_tree(tree, said, here, max_depth=step.deepest)
        if recall and recalled:
            recall.learn(recalled, accepted)
        taken = min(int(accepted.accept_lens), len(table.anchor) - i)
        count.passes += 1
        count.tokens += taken
        i += taken
    return count


def lengths(documents: Sequence[Document], tables: Sequence[Table], vocab: int) -> dict[str, float]:
    """Accept lengths by policy; the chances of what is recalled are learned over all the documents."""
    found = {"chain": _sum([chain_walk(table) for table in tables])}
    for nodes in BUDGETS:
        for name, stage in ((f"{nodes}", None), (f"{nodes} + recall", RecallStage("cpu", vocab, nodes - 1))):
            walks = [tree_walk(d, t, nodes, stage) for d, t in zip(documents, tables, strict=True)]
            found[name] = _sum(walks)
    return {name: round(count.length, 3) for name, count in found.items()}


def _sum(counts: Sequence[Count]) -> Count:
    return Count(sum(c.passes for c in counts), sum(c.tokens for c in counts))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--drafters", default=str(SHIPPED), help="folders, separated by commas")
    parser.add_argument("--limit", type=int, default=24, help="answers of prompts.jsonl, half of them code")
    parser.add_argument("--max-new", type=int, default=128, help="tokens of an answer (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/sources.json"))
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    target = DenseTarget(TARGET)
    console, printed = Console(), Printed(box=SIMPLE_HEAD)
    for column in ("drafter", "answers", "chain", *(f"{n}{w}" for n in BUDGETS for w in ("", " + recall"))):
        printed.add_column(column, justify="left" if column in ("drafter", "answers") else "right")
    folders = [Path(folder) for folder in args.drafters.split(",")]
    drafters = [load_drafter(folder).to(target.device, target.dtype).eval() for folder in folders]
    features = drafters[0].config.target_layers
    prompts, edits = HERE / "prompts.jsonl", HERE / "copy_edit.jsonl"
    groups: dict[str, list[Document]] = {}
    for name, file, limit, temperature in (
        ("", prompts, args.limit, 0.0),
        ("copy and edit", edits, 0, 0.0),
        ("T = 1", prompts, args.limit, 1.0),
    ):
        for d in answer_prompts(target, TARGET, file, features, args.max_new, temperature, limit):
            groups.setdefault(name or d.family, []).append(d)
    rows = []
    for folder, drafter in zip(folders, drafters, strict=True):
        for group, documents in groups.items():
            tables = [draft_table(drafter, target, d) for d in documents]
            found = lengths(documents, tables, target.vocab)
            rows.append({"drafter": str(folder), "group": group, "answers": len(documents), **found})
            printed.add_row(folder.name, group, *(f"{value:.2f}" for value in found.values()))
            console.print(f"{folder.name} {group}: {found}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    console.print(printed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
