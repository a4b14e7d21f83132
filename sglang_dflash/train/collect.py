"""``data``: self-prompted or given prompts in, shards of the target's own answers out."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sglang_dflash.train import corpus
from sglang_dflash.train.chat import Chat
from sglang_dflash.train.corpus import Record
from sglang_dflash.train.engine import EngineGenerator
from sglang_dflash.train.features import FeatureWriter
from sglang_dflash.train.generate import Done, Generator, Job
from sglang_dflash.train.given import read_dataset, read_prompts, summary
from sglang_dflash.train.prompts import Opener, clean_turn, is_held_out, openers, prompt_hash
from sglang_dflash.train.target import DenseTarget, TargetName
from sglang_dflash.train.templates import template_prompts

SHORTEST = 8  # tokens of an answer: below it there is too little to draft
logger = logging.getLogger("sglang_dflash.data")


@dataclass
class Settings:
    """What one run of ``data`` makes; see ``sglang-dflash data --help`` for the meanings."""

    out: Path
    response_tokens: int
    minutes: float | None = None  # no new sequences after so long; those begun are finished
    max_new: int = 200
    max_prompt: int = 120
    sampled_share: float = 0.25
    temperature: float = 0.8
    records_per_shard: int = 256
    groups: int = 4
    width: int = 32
    seed: int = 0
    prompts: Path | None = None
    dataset: str | None = None
    dataset_split: str = "train"
    templates: bool = False
    exclude: list[Path] = field(default_factory=list)
    features: tuple[int, ...] | None = None
    features_dir: Path | None = None


@dataclass
class Progress:
    tokens: int
    goal: int
    rate: float
    records: int


class Collector:
    """Drives one generator: openers become prompts, prompts become records, records shards.

    Given a target that is loaded, our batched generator decodes; given its name, SGLang's engine does.
    """

    def __init__(self, target: DenseTarget | TargetName, chat: Chat, settings: Settings) -> None:
        self.target, self.chat, self.settings = target, chat, settings
        self.ready: deque[tuple[str, str]] = deque()  # (kind, prompt) not yet answered
        self.pending: dict[str, list[Record]] = {split: [] for split in corpus.SPLITS}
        self.planes: dict[str, list[torch.Tensor]] = {split: [] for split in corpus.SPLITS}
        self.seen: set[int] = set()
        self.left_out: Counter[str] = Counter()  # given rows and answers that did not enter, by reason
        self.tokens = self.records = 0
        self.next_index: Counter[str] = Counter()
        self._resume()
        for path in settings.exclude:
            if path.is_file():
                self.seen |= {prompt_hash(text) for _, text in read_prompts(path)}
        self.openers: Iterator[Opener] = iter(())
        self.templates: Iterator[tuple[str, str]] = iter(())
        if settings.templates:
            first = settings.seed * 100003 + self.next_index["train"]
            # Finite: when every template is used up, the corpus is as large as templates make it.
            self.templates = self._fresh(itertools.islice(template_prompts(first), 200_000))
        elif settings.dataset is not None:
            self.ready.extend(
                self._fresh(read_dataset(settings.dataset, settings.dataset_split, self.left_out))
            )
        elif settings.prompts is not None:
            self.ready.extend(self._fresh(read_prompts(settings.prompts, self.left_out)))
        else:
            start = self.next_index["train"]
            self.openers = openers(settings.seed * 100003 + start)
        self.late: Callable[[], bool] = lambda: False
        self.rng = torch.Generator().manual_seed(settings.seed * 7919 + self.next_index["train"])

    def _resume(self) -> None:
        for split in corpus.SPLITS:
            for path in corpus.shard_paths(self.settings.out, split):
                shard = corpus.read_shard(path)
                self.seen |= {int(h) for h in shard.hash}
                self.tokens += shard.response_tokens if split == "train" else 0
                self.records += len(shard)
                self.next_index[split] = int(path.stem.split("-")[1]) + 1

    def _fresh(self, prompts) -> Iterator[tuple[str, str]]:
        for kind, text in prompts:
            value = prompt_hash(text)
            if value in self.seen:
                self.left_out["already answered, given twice or excluded"] += 1
                continue
            self.seen.add(value)
            yield kind, text

    def _source(self, n: int) -> list[Job]:
        """A group's worth of like jobs: answers when enough prompts wait, else new prompts."""
        s = self.settings
        if self.tokens >= s.response_tokens or self.late():
            return []
        if len(self.ready) < n:
            self.ready.extend(itertools.islice(self.templates, n - len(self.ready)))
            fresh = list(itertools.islice(self.openers, n))
            if fresh:
                return [Job(self.chat.opener_ids(o.text), 1.0, 40, o) for o in fresh]
        jobs: list[Job] = []
        while self.ready and len(jobs) < n:
            kind, text = self.ready.popleft()
            ids = self.chat.prompt_ids(text)
            if len(ids) > s.max_prompt:
                self.left_out[f"longer than {s.max_prompt} tokens"] += 1
                continue
            # Held-out answers are greedy: they are what accept lengths are judged on.
            draw = float(torch.rand((), generator=self.rng))
            sampled = draw < s.sampled_share and not is_held_out(prompt_hash(text))
            jobs.append(Job(ids, s.temperature if sampled else 0.0, s.max_new, (kind, text)))
        return jobs

    def _take(self, done: Done) -> None:
        if isinstance(done.job.tag, Opener):
            opener = done.job.tag
            new = done.tokens[len(done.job.prompt) :]
            tail = self.chat.tokenizer.decode(new[:-1] if done.stopped else new)
            turn = clean_turn(opener.text + tail, done.stopped)
            if turn is not None:
                self.ready.extend(self._fresh([(opener.kind, turn)]))
            return
        assert isinstance(done.job.tag, tuple)
        kind, text = done.job.tag
        length = len(done.tokens) - len(done.job.prompt)
        if length < SHORTEST:
            self.left_out[f"answered in fewer than {SHORTEST} tokens"] += 1
            return
        record = Record(done.tokens, len(done.job.prompt), kind, done.job.temperature, prompt_hash(text))
        self.records += 1
        self.tokens += length if record.split == "train" else 0
        self.pending[record.split].append(record)
        if done.planes is not None:
            self.planes[record.split].append(done.planes)
        limit = self.settings.records_per_shard // (8 if record.split == "heldout" else 1)
        if len(self.pending[record.split]) >= limit:
            self.flush(record.split)

    def flush(self, split: str) -> None:
        """Write what waits as the next shard (features first: a shard implies its features)."""
        if not self.pending[split]:
            return
        path = self.settings.out / f"{split}-{self.next_index[split]:05d}.npz"
        if self.planes[split] and self.settings.features_dir is not None:
            assert isinstance(self.target, DenseTarget)
            assert self.settings.features is not None
            writer = FeatureWriter(self.settings.features_dir, self.target, self.settings.features)
            writer.write(path.stem, torch.cat(self.planes[split]))
        corpus.write_shard(path, self.pending[split], self.target.vocab)
        self.next_index[split] += 1
        self.pending[split], self.planes[split] = [], []

    def _generator(self) -> Generator | EngineGenerator:
        s = self.settings
        stop, max_len = self.chat.stop_ids(), s.max_prompt + s.max_new + 8
        seed = s.seed * 31 + self.next_index["train"]
        if isinstance(self.target, TargetName):
            width = s.groups * s.width
            return EngineGenerator(self.target.path, stop, width=width, max_len=max_len, seed=seed)
        return Generator(
            self.target, stop, groups=s.groups, width=s.width, max_len=max_len, features=s.features, seed=seed
        )

    def run(self, report: Callable[[Progress], None], clock: Callable[[], float] = time.monotonic) -> None:
        s = self.settings
        corpus.write_meta(
            s.out, {"target": self.target.path.name, "vocab": self.target.vocab, "max_new": s.max_new}
        )
        generator = self._generator()
        began, before = clock(), self.tokens
        self.late = lambda: s.minutes is not None and clock() - began > 60 * s.minutes
        try:
            for done in generator.run(self._source):
                self._take(done)
                rate = (self.tokens - before) / max(clock() - began, 1e-6)
                report(Progress(self.tokens, s.response_tokens, rate, self.records))
        finally:  # also after Ctrl-C: what is answered is kept
            for split in corpus.SPLITS:
                self.flush(split)
            if self.left_out:
                logger.info("left out: %s", summary(self.left_out))


def describe(folder: Path) -> str:
    """What a corpus holds, one short table."""
    rows = []
    for split in corpus.SPLITS:
        paths = corpus.shard_paths(folder, split)
        shards = [corpus.read_shard(path) for path in paths]
        kinds: Counter = Counter()
        greedy = total = responses = size = 0
        for shard in shards:
            kinds.update(corpus.KINDS[k] for k in shard.kind)
            greedy += int((shard.temperature == 0).sum())
            total += len(shard)
            responses += shard.response_tokens
            size += shard.path.stat().st_size
        mix = ", ".join(f"{k} {100 * n // max(total, 1)}%" for k, n in kinds.most_common())
        rows.append(
            f"{split:8} {len(shards):3} shards {total:6} answers {responses:8} response tokens "
            f"({responses // max(total, 1)} each), {100 * greedy // max(total, 1)}% greedy, "
            f"{size / 1e6:.1f} MB; {mix}"
        )
    return "\n".join(rows)
