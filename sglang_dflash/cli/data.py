"""``sglang-dflash data``: a corpus of the target's own answers to train a drafter on."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from sglang_dflash.cli.options import Options, parse
from sglang_dflash.errors import UserError
from sglang_dflash.models.cache import cache_root

CACHE = cache_root()
TARGET = CACHE / "models" / "SmolLM2-135M-Instruct"
logger = logging.getLogger("sglang_dflash.data")


class DataOptions(Options):
    """Make (or grow) a corpus: prompts from a JSONL file, or written by the target itself.

    Run it again to continue; the same folder grows until --tokens response tokens are there.
    """

    target: Path = Field(TARGET, description="target model folder")
    out: Path = Field(CACHE / "corpus", description="corpus folder (created, or continued)")
    tokens: int = Field(300_000, gt=0, description="response tokens the train split should hold")
    minutes: float | None = Field(
        None, gt=0, description="begin no new answers after so many minutes, whatever --tokens says"
    )
    prompts: Path | None = Field(
        None, description="JSON lines, or one array, with 'prompt' or 'messages'; default: self-prompting"
    )
    dataset: str | None = Field(
        None, description="Hugging Face dataset of prompts or conversations: a name, or a folder on disk"
    )
    dataset_split: str = Field("train", description="its split")
    templates: bool = Field(False, description="prompts from built-in templates instead of self-prompting")
    exclude: list[Path] = Field(
        [],
        description="JSONL files whose prompts must never enter the corpus; "
        "default: benchmarks/prompts.jsonl where it is",
    )
    max_new: int = Field(200, ge=16, description="longest response, tokens")
    sampled: float = Field(0.25, ge=0, le=1, description="share of sampled responses (the rest is greedy)")
    temperature: float = Field(0.8, gt=0, description="temperature of the sampled ones")
    batch: int = Field(128, ge=4, description="sequences decoded at once")
    seed: int = Field(0, description="opener and sampling seed")
    engine: Literal["auto", "own", "sglang"] = Field(
        "auto",
        description="what decodes: our batched generator, or SGLang's offline engine (any model SGLang "
        "serves, no --features); auto: sglang on CUDA without --features, else own",
    )
    features: list[int] = Field(
        [], description="also cache features of these target layers, e.g. 1,8,15,22,28"
    )
    features_dir: Path | None = Field(None, description="where; default: <cache>/features/<corpus name>")
    threads: int = Field(0, ge=0, description="CPU threads, 0: as set by OMP_NUM_THREADS")
    describe: bool = Field(False, description="only say what the corpus holds")


def barred(given: list[Path]) -> list[Path]:
    """Prompt files that stay out of training: those given, else the benchmark's where it is."""
    missing = [str(path) for path in given if not path.is_file()]
    if missing:
        raise UserError(f"--exclude: no file {', '.join(missing)}")
    benchmark = Path("benchmarks/prompts.jsonl")
    return given or ([benchmark] if benchmark.is_file() else [])


def features_place(given: Path | None, corpora: list[Path], folder: Path) -> Path:
    """Where the features of ``folder`` lie: shards of two corpora bear the same names."""
    if given is None:
        return CACHE / "features" / folder.name
    return given if len(corpora) == 1 else given / folder.name


def main(argv: list[str]) -> int:
    options = parse(DataOptions, "sglang-dflash data", argv)
    import torch

    from sglang_dflash.train.chat import Chat
    from sglang_dflash.train.collect import Collector, Progress, Settings, describe
    from sglang_dflash.train.target import DenseTarget, TargetName

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    if options.describe:
        print(describe(options.out))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.engine == "sglang" and options.features:
        raise UserError("SGLang's engine keeps no features; leave out --features (train computes them)")
    by_engine = options.engine == "sglang" or (
        options.engine == "auto" and device == "cuda" and not options.features
    )
    target = TargetName.of(options.target) if by_engine else DenseTarget(options.target, device=device)
    layers = tuple(options.features) or None
    settings = Settings(
        out=options.out,
        response_tokens=options.tokens,
        minutes=options.minutes,
        prompts=options.prompts,
        dataset=options.dataset,
        dataset_split=options.dataset_split,
        templates=options.templates,
        exclude=barred(options.exclude),
        max_new=options.max_new,
        sampled_share=options.sampled,
        temperature=options.temperature,
        width=max(options.batch // 4, 1),
        seed=options.seed,
        features=layers,
        features_dir=options.features_dir or CACHE / "features" / options.out.name,
    )
    collector = Collector(target, Chat(options.target), settings)
    bar = _Bar(options.tokens)

    def report(p: Progress) -> None:
        bar.update(p.tokens, p.rate, p.records)

    with bar:
        collector.run(report)
    print(describe(options.out))
    return 0


class _Bar:
    """A progress bar on a terminal, one line a half minute elsewhere."""

    def __init__(self, goal: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.goal, self.last = goal, 0.0
        self.live = sys.stderr.isatty()
        columns = (
            TextColumn("answers"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not self.live)
        self.task = self.bar.add_task("answers", total=goal, text="")

    def __enter__(self) -> _Bar:
        self.bar.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self.bar.__exit__(*exc)

    def update(self, tokens: int, rate: float, records: int) -> None:
        text = f"{tokens}/{self.goal} tokens, {rate:.0f}/s, {records} answers"
        self.bar.update(self.task, completed=tokens, text=text)
        now = time.monotonic()
        if not self.live and now - self.last > 30:
            self.last = now
            left = f"{(self.goal - tokens) / rate / 60:.0f} min left" if rate >= 1 else "first answers"
            logger.info("%s, %s", text, left)
