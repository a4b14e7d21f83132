"""Per-depth calibration of a draft tree: a log-bonus for each position, fitted to accepted tokens.

A block drafter's distributions at later positions are made without knowing the earlier tokens,
so their confidence is off by depth. ``build_tree`` adds ``depth_bonus[d]`` to the candidates'
log-probabilities of position d; a positive bonus makes the tree deeper, a negative one wider.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sglang_dflash.train.corpus import write_atomically
from sglang_dflash.train.judge import Table, Walk, tree_accepts

STEPS = (0.4, 0.2, 0.1)


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


def store(drafter: Path, bonus: torch.Tensor) -> None:
    """Write the bonus to the drafter's ``config.json`` under ``dflash_config.tree_depth_bonus``."""
    file = drafter / "config.json"
    config = json.loads(file.read_text())
    config["dflash_config"]["tree_depth_bonus"] = [round(float(x), 3) for x in bonus]
    write_atomically(file, lambda p: p.write_text(json.dumps(config, indent=2) + "\n"))
