"""Cached target features: bf16 planes beside a corpus, one file per shard, read by memory map.

A file holds [tokens, planes, hidden] in the shard's flat token order; the planes are the
feature layers, then the target's last hidden state (for self-distillation). Files are large
(6.9 KB per token for five layers of width 576), so they live in a cache, never in git.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch

from sglang_dflash.errors import UserError
from sglang_dflash.train.corpus import Shard, write_atomically
from sglang_dflash.train.target import DenseTarget


class FeatureWriter:
    """Writes plane files of one target and layer choice into ``folder``."""

    def __init__(self, folder: Path, target: DenseTarget, layers: tuple[int, ...]) -> None:
        self.folder, self.target, self.layers = folder, target, layers
        meta = {"target": target.path.name, "layers": list(layers), "hidden": target.hidden}
        file = folder / "features.json"
        if file.is_file():
            found = json.loads(file.read_text())
            if found != meta:
                raise UserError(
                    f"{folder} holds features of {found}, not of {meta}: give another --features-dir"
                )
        else:
            write_atomically(file, lambda p: p.write_text(json.dumps(meta)))

    def write(self, stem: str, planes: torch.Tensor) -> None:
        """``planes`` [tokens, planes, hidden] bf16 of shard ``stem``."""
        raw = planes.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy()
        write_atomically(self.folder / f"{stem}.bf16", raw.tofile)

    def ensure(self, shard: Shard, batch: int = 16) -> Path:
        """The plane file of ``shard``, computed by prefill if it is not there yet."""
        path = self.folder / f"{shard.path.stem}.bf16"
        size = len(shard.tokens) * (len(self.layers) + 1) * self.target.hidden * 2
        if path.is_file() and path.stat().st_size == size:
            return path
        planes = torch.empty(
            len(shard.tokens), len(self.layers) + 1, self.target.hidden, dtype=torch.bfloat16
        )
        lengths = np.diff(shard.offsets)
        order = np.argsort(lengths)
        for at in range(0, len(order), batch):
            rows = order[at : at + batch]
            tokens = torch.zeros(len(rows), int(lengths[rows].max()), dtype=torch.long)
            for i, row in enumerate(rows):
                a, b = int(shard.offsets[row]), int(shard.offsets[row + 1])
                tokens[i, : b - a] = torch.from_numpy(shard.tokens[a:b].astype(np.int64))
            out = self.target.prefill(tokens.to(self.target.device), self.layers)
            for i, row in enumerate(rows):
                a, b = int(shard.offsets[row]), int(shard.offsets[row + 1])
                planes[a:b] = out[i, : b - a].to("cpu", torch.bfloat16)
        self.write(shard.path.stem, planes)
        return path

    def open(self, shard: Shard) -> torch.Tensor:
        """Planes of ``shard`` as a read-only map, [tokens, planes, hidden] bf16."""
        path = self.ensure(shard)
        with path.open("rb") as handle:
            # Training visits documents at random: one sequential read now beats page faults later.
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        raw = np.memmap(path, dtype=np.int16, mode="c")
        planes = torch.from_numpy(raw).view(torch.bfloat16)
        return planes.view(len(shard.tokens), len(self.layers) + 1, self.target.hidden)
