"""From shards and cached features to training batches; every draw is a function of (seed, step)."""

from __future__ import annotations

import logging
from bisect import bisect_left, insort
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from sglang_dflash.errors import UserError
from sglang_dflash.train import corpus
from sglang_dflash.train.features import FeatureWriter
from sglang_dflash.train.masks import Layout
from sglang_dflash.train.prompts import family, prompt_hash

#: Tokens of the shortest answer that a block fits into: an anchor, and a token to draft.
SHORTEST = 2
logger = logging.getLogger("sglang_dflash.train")


@dataclass
class Document:
    """One answered prompt with its planes [tokens, planes, hidden] (features, then last hidden state).

    Several packed into one (:func:`pack`) have their beginnings in ``starts``.
    """

    tokens: torch.Tensor
    prompt_len: int
    kind: str
    temperature: float
    planes: torch.Tensor
    starts: tuple[int, ...] = (0,)

    @property
    def family(self) -> str:
        return family(self.kind)

    def anchors(self) -> range:
        """Positions a block can start at: a response token with at least one token after it."""
        return range(self.prompt_len, len(self.tokens) - 1)

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every token: the number of its document in the pack, and where that document begins."""
        starts = torch.tensor(self.starts)
        number = torch.searchsorted(starts, torch.arange(len(self.tokens)), right=True) - 1
        return number, starts[number]


def pack(documents: list[Document]) -> Document:
    """One document of several: blocks of one see nothing of another. ``prompt_len`` is the first's."""
    if len(documents) == 1:
        return documents[0]
    lengths = [len(document.tokens) for document in documents]
    return replace(
        documents[0],
        tokens=torch.cat([document.tokens for document in documents]),
        planes=torch.cat([document.planes for document in documents]),
        starts=tuple(accumulate(lengths[:-1], initial=0)),
    )


def load_documents(
    folders: list[Path],
    split: str,
    writer: FeatureWriter,
    limit: int | None = None,
    exclude: set[int] | None = None,
    greedy_only: bool = False,
) -> list[Document]:
    """Documents of one split, features computed where the cache lacks them.

    Answers of fewer than 2 tokens, where there is nothing to draft, are left out and counted in the log.
    """
    out: list[Document] = []
    short = 0
    for shard in corpus.load_split(folders, split):
        planes = None
        for i in range(len(shard)):
            if (exclude and int(shard.hash[i]) in exclude) or (greedy_only and shard.temperature[i] > 0):
                continue
            a, b = int(shard.offsets[i]), int(shard.offsets[i + 1])
            if b - a - int(shard.prompt_len[i]) < SHORTEST:
                short += 1
                continue
            if planes is None:
                planes = writer.open(shard)
            tokens = torch.from_numpy(shard.tokens[a:b].astype(np.int64))
            out.append(
                Document(
                    tokens,
                    int(shard.prompt_len[i]),
                    corpus.KINDS[shard.kind[i]],
                    float(shard.temperature[i]),
                    planes[a:b],
                )
            )
            if limit is not None and len(out) >= limit:
                return out
    left_out = f"{short} {split} answers of fewer than {SHORTEST} tokens left out" if short else ""
    if not out:
        why = f" ({left_out})" if short else ""
        raise UserError(f"no usable {split} documents in {', '.join(map(str, folders))}{why}")
    if short:
        logger.info(left_out)
    return out


def excluded_hashes(paths: list[Path]) -> set[int]:
    """Hashes of prompts that must not be trained on (benchmark prompts)."""
    from sglang_dflash.train.given import read_prompts

    return {prompt_hash(text) for path in paths if path.is_file() for _, text in read_prompts(path)}


@dataclass
class Batch:
    """R rows of one document or pack each, A blocks of B slots a row; L = B - 1.

    inputs: [R, A, B] token ids of the slots (anchor, then mask or revealed tokens)
    labels: [R, A, L] ids, -1 past the document's end or where revealed
    last: [R, A, L] row index of the token before each label (its last hidden state predicts it)
    weight: [R, A, L] fp32, position decay times validity
    planes: [R, T, planes, hidden]
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    last: torch.Tensor
    weight: torch.Tensor
    planes: torch.Tensor
    layout: Layout

    def to(self, device: str) -> Batch:
        """The same batch on ``device``."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return Batch(**moved)

    @property
    def blocks(self) -> int:
        return self.inputs.shape[0] * self.inputs.shape[1]


def build_batch(
    documents: list[Document],
    anchors: list[torch.Tensor],
    block: int,
    mask_token: int,
    gamma: float,
    reveal: torch.Tensor | None = None,
    how: str = "split",
) -> Batch:
    """One batch of ``documents`` with the given ``anchors`` (one [<= A] tensor a row).

    ``reveal`` [R, A, L] bool shows those tokens instead of the mask and trains only the others.
    """
    R, A = len(documents), max(len(a) for a in anchors)
    T = max(int(a.max()) if len(a) else 0 for a in anchors) + 1
    tokens = torch.full((R, T + block), -1, dtype=torch.long)
    owner = torch.full((R, T + block), -1, dtype=torch.long)
    at = torch.zeros(R, A, dtype=torch.long)
    real = torch.zeros(R, A, dtype=torch.bool)
    position = torch.arange(T).repeat(R, 1)
    planes = documents[0].planes.new_zeros(R, T, *documents[0].planes.shape[1:])
    L = block - 1
    for r, (doc, places) in enumerate(zip(documents, anchors, strict=True)):
        n = min(len(doc.tokens), T + block)
        tokens[r, :n] = doc.tokens[:n]
        number, start = doc.places()
        owner[r, :n] = number[:n]
        m = min(len(doc.tokens), T)
        position[r, :m] -= start[:m]
        planes[r, :m] = doc.planes[:m]
        at[r, : len(places)] = places
        at[r, len(places) :] = places[0] if len(places) else 0
        real[r, : len(places)] = True
    slots = at[..., None] + torch.arange(block)
    inside = torch.arange(R)[:, None, None]
    # What comes after a document's end is another's, or nothing.
    wanted = torch.where(owner[inside, slots] == owner.gather(1, at)[..., None], tokens[inside, slots], -1)
    labels = wanted[..., 1:].clone()
    labels[~real] = -1
    inputs = torch.full_like(wanted, mask_token)
    inputs[..., 0] = wanted[..., 0].clamp_min(0)
    if reveal is not None:
        shown = reveal & (labels >= 0)
        inputs[..., 1:] = torch.where(shown, wanted[..., 1:], inputs[..., 1:])
        labels[shown] = -1
    decay = torch.exp(-torch.arange(L, dtype=torch.float32) / gamma)
    weight = decay.expand(R, A, L) * (labels >= 0)
    lasts = slots[..., :-1]
    layout = Layout(at, owner[:, :T], position, block, how)
    return Batch(inputs, labels, lasts, weight, planes, layout)


def last_hidden(batch: Batch, documents: list[Document]) -> torch.Tensor:
    """[R, A, L, hidden] target states that predict each label (zeros where there is none)."""
    out = batch.planes.new_zeros(*batch.last.shape, batch.planes.shape[-1])
    for r, doc in enumerate(documents):
        out[r] = doc.planes[:, -1][batch.last[r].clamp_max(len(doc.tokens) - 1)]
    return out


class Sampler:
    """Documents of each step (a new order every epoch) and their random anchors.

    Args:
        rows, anchors: rows of a step, and anchors of a document.
        pack_to: tokens that a row may hold; documents that fit together share one, always the same ones.
            0: one document a row.
    """

    def __init__(
        self, documents: list[Document], rows: int, anchors: int, seed: int, pack_to: int = 0
    ) -> None:
        self.documents, self.anchors, self.seed = documents, anchors, seed
        self.units = _fill([len(document.tokens) for document in documents], pack_to)
        self.rows = min(rows, len(self.units))
        self.per_epoch = max(1, len(self.units) // self.rows)
        self._order: tuple[int, list[np.ndarray]] | None = None

    def _length(self, unit: int) -> int:
        return sum(len(self.documents[i].tokens) for i in self.units[unit])

    def _batches(self, epoch: int) -> list[np.ndarray]:
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            order = rng.permutation(len(self.units))[: self.per_epoch * self.rows]
            # Sorting inside windows keeps rows of a batch of like length, order still random.
            window = self.rows * 16
            parts = []
            for at in range(0, len(order), window):
                part = order[at : at + window]
                part = part[np.argsort([self._length(i) for i in part], kind="stable")]
                parts += [part[i : i + self.rows] for i in range(0, len(part), self.rows)]
            rng.shuffle(parts)
            self._order = (epoch, parts)
        return self._order[1]

    def draw(self, step: int) -> tuple[list[Document], list[torch.Tensor], torch.Generator]:
        """Documents, anchors and the generator for further draws of ``step``."""
        epoch, index = divmod(step, self.per_epoch)
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        rows, anchors = [], []
        for unit in self._batches(epoch)[index]:
            documents = [self.documents[i] for i in self.units[unit]]
            row, picked = pack(documents), []
            for document, start in zip(documents, row.starts, strict=True):
                places = document.anchors()
                chosen = torch.randperm(len(places), generator=rng)[: self.anchors] + places.start
                picked.append(chosen.sort().values + start)
            rows.append(row)
            anchors.append(torch.cat(picked))
        return rows, anchors, rng


def _fill(lengths: list[int], pack_to: int) -> list[list[int]]:
    """Document numbers row by row: the longest first, each into the fullest row it fits (best fit)."""
    if not pack_to:
        return [[i] for i in range(len(lengths))]
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is free, row), ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(room, (lengths[i], -1))
        if at == len(room):
            rows.append([i])
            insort(room, (max(pack_to - lengths[i], 0), len(rows) - 1))
        else:
            free, row = room.pop(at)
            rows[row].append(i)
            insort(room, (free - lengths[i], row))
    return rows
