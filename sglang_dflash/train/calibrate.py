"""What a drafter's evaluation stores in its config: a log-bonus per depth, and the accept length by width.

A block drafter's distributions at later positions are made without knowing the earlier tokens,
so their confidence is off by depth. ``build_tree`` adds ``depth_bonus[d]`` to the candidates'
log-probabilities of position d; a positive bonus makes the tree deeper, a negative one wider.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sglang_dflash.train.corpus import write_atomically
from sglang_dflash.train.judge import Table, Walk, tree_accepts

STEPS = (0.4, 0.2, 0.1)
TREES = (2, 4, 8, 16, 32, 64)


def _length(tables: list[Table], nodes: int, bonus: torch.Tensor) -> float:
    walk = Walk()
    for t in tables:
        walk.add(tree_accepts(t, nodes, bonus))
    return walk.length


def fit_depth_bonus(tables: list[Table], nodes: int = 32) -> torch.Tensor:
    """[L] fp32 bonus that maximises the walked accept length of ``tables`` (coordinate search)."""
    bonus = torch.zeros(tables[0].labels.shape[1])
    best = _length(tables, nodes, bonus)
    for step in STEPS:
        for d in range(len(bonus)):
            for sign in (1, -1):
                trial = bonus.clone()
                trial[d] += sign * step
                value = _length(tables, nodes, trial)
                if value > best + 1e-4:
                    best, bonus = value, trial
                    break
    return bonus


def accept_by_width(tables: dict[int, list[Table]], nodes: Iterable[int] = TREES) -> dict[str, float]:
    """Tokens per pass of trees of so many nodes by draft block, e.g. ``{"8x6": 2.25}``; bonus included.

    Args:
        tables: drafts of the same answers by block (:func:`sglang_dflash.train.judge.draft_table`).
        nodes: node budgets, root included.
    """
    out = {}
    for block, drafts in tables.items():
        for n in nodes:
            walk = Walk()
            for t in drafts:
                walk.add(tree_accepts(t, n))
            out[f"{n}x{block}"] = round(walk.length, 3)
    return out


def store(drafter: Path, bonus: torch.Tensor) -> None:
    """Write the bonus to the drafter's ``config.json`` under ``dflash_config.tree_depth_bonus``."""
    _write(drafter, {"tree_depth_bonus": [round(float(x), 3) for x in bonus]})


def store_accept(drafter: Path, greedy: dict[str, float], sampled: dict[str, float]) -> None:
    """Write accept lengths to ``dflash_config.tree_accept`` and ``tree_accept_sampled``, save empty ones.

    A server starts its choice of widths from them (``worker/width/gain.py``).
    """
    found = {"tree_accept": greedy, "tree_accept_sampled": sampled}
    _write(drafter, {key: value for key, value in found.items() if value})


def _write(drafter: Path, keys: dict[str, Any]) -> None:
    file = drafter / "config.json"
    config = json.loads(file.read_text())
    config["dflash_config"] |= keys
    write_atomically(file, lambda p: p.write_text(json.dumps(config, indent=2) + "\n"))
