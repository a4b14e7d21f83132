"""``sglang-dflash train``: a drafter from a corpus, saved so that SGLang serves it unchanged."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from sglang_dflash.cli.data import CACHE, TARGET, barred, features_place
from sglang_dflash.cli.options import Options, parse
from sglang_dflash.errors import UserError

logger = logging.getLogger("sglang_dflash.train")
# Options that are settings of the loop under the same name.
SHARED = (
    *("minutes", "steps", "optimizer", "rate", "warmup", "rows", "anchors", "accumulate", "weight_decay"),
    *("clip", "complementary", "dropout", "feature_noise", "seed", "eval_every", "save_every"),
)
# With --selector: those of its loop, and those of the run.
FOR_SELECTOR = (
    *("minutes", "steps", "rate", "warmup", "weight_decay", "clip", "rows", "anchors", "gamma", "kl", "seed"),
    *("eval_every", "save_every"),
)
FOR_ALL = (
    *(
        "target",
        "corpus",
        "out",
        "init_from",
        "selector",
        "greedy_only",
        "held_out",
        "features_dir",
        "exclude",
    ),
    "threads",
)


class TrainOptions(Options):
    """Train a DFlash drafter (arXiv 2602.06036) for a frozen target on its own answers.

    The same command continues a killed run; --out/best is what ``sglang-dflash serve`` takes.
    """

    target: Path = Field(TARGET, description="target model folder")
    corpus: list[Path] = Field([CACHE / "corpus"], description="corpus folders made by sglang-dflash data")
    out: Path = Field(CACHE / "runs" / "default", description="run folder; best/ in it is the drafter")
    minutes: float | None = Field(None, gt=0, description="time budget; the run ends with a saved drafter")
    steps: int | None = Field(None, gt=0, description="step budget instead (repeatable runs)")

    layers: int = Field(3, ge=1, description="draft layers")
    block: int = Field(8, ge=2, le=32, description="block size B: the anchor and B - 1 drafted tokens")
    target_layers: list[int] = Field(
        [], description="feature layers, e.g. 1,8,15,22,28; default: spread over the depth"
    )
    mask_token_id: int | None = Field(None, description="default: a token that chat text never holds")
    init_from: Path | None = Field(None, description="continue from a stock DFlash checkpoint")
    selector: int | None = Field(
        None,
        ge=1,
        description="train only a selector (DFlash 2) of this rank, e.g. 64, over the drafter of --init-from",
    )
    warm_layers: str = Field(
        "",
        description="start from these target layers, e.g. 27,28,29; default: the last ones; 'none': random",
    )

    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: orthogonalised updates of matrices"
    )
    rate: float = Field(1e-3, gt=0, description="peak learning rate (cosine)")
    warmup: float = Field(0.04, ge=0, lt=1, description="share of the run that warms up")
    rows: int = Field(8, ge=1, description="documents (or packed rows) a micro-batch")
    pack: int | None = Field(
        None, ge=0, description="tokens a row, which short documents share; 0: never; default: 2048 on CUDA"
    )
    anchors: int = Field(32, ge=1, description="random anchors a document, drawn anew each visit")
    accumulate: int = Field(1, ge=1, description="micro-batches an update")
    clip: float = Field(1.0, gt=0, description="gradient norm limit")
    weight_decay: float = Field(0.01, ge=0, description="AdamW decay of matrices")
    gamma: float = Field(
        4.0, gt=0, description="position decay exp(-(k-1)/gamma); paper: 7/5/4 at block 16/10/8"
    )
    kl: float = Field(0.0, ge=0, le=1, description="share of the target's own distribution in the loss")
    tree: float = Field(0.0, ge=0, description="extra weight where a draft tree can still reach")
    confidence: float = Field(0.0, ge=0, description="extra weight that sharpens right top tokens")
    complementary: float = Field(0.0, ge=0, le=1, description="share of steps with twin half-revealed blocks")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the layers' outputs (small corpora)")
    feature_noise: float = Field(0.0, ge=0, description="relative noise on features (small corpora)")
    schedule: str = Field("", description="block sizes over the run, e.g. 0:4,0.3:8 (progress:size)")
    negatives: int | None = Field(
        None,
        ge=-1,
        description="the softmax's ids: the corpus's plus n random others; -1: the full head; "
        "default: 2048 on a CPU, else -1",
    )
    greedy_only: bool = Field(False, description="train on greedy answers alone")
    attention: str = Field("auto", description="split, dense or flex; auto: flex on CUDA, split elsewhere")

    held_out: int = Field(12, ge=0, description="held-out documents judged during training")
    eval_every: float = Field(300, gt=0, description="seconds (or steps) between judgements")
    save_every: float = Field(120, gt=0, description="seconds (or steps) between saved states")
    features_dir: Path | None = Field(
        None,
        description="feature cache, a folder in it per corpus if several; default <cache>/features/<corpus>",
    )
    exclude: list[Path] = Field(
        [], description="JSONL prompts never trained on; default: benchmarks/prompts.jsonl where it is"
    )
    seed: int = Field(0, description="of initial weights, anchors and the order of documents")
    threads: int = Field(0, ge=0, description="CPU threads, 0: as set by OMP_NUM_THREADS")


def _ints(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(x) for x in text.split(",") if x.strip())
    except ValueError:
        raise UserError(f"{text!r} is not a list of numbers: write e.g. 1,8,15") from None


def _schedule(text: str) -> tuple[tuple[float, int], ...]:
    try:
        pairs = [part.split(":") for part in text.split(",") if part.strip()]
        return tuple((float(a), int(b)) for a, b in pairs)
    except ValueError:
        raise UserError(f"--schedule {text!r}: write progress:size pairs, e.g. 0:4,0.3:8") from None


def ignored(o: TrainOptions, config) -> list[str]:
    """A line for each option that says of the drafter's shape what the one to continue from does not."""
    holds = {
        "layers": config.layers,
        "block": config.block,
        "target_layers": list(config.target_layers),
        "mask_token_id": config.mask_token,
    }
    return [
        f"--{name.replace('_', '-')} {getattr(o, name)} is not used: {o.init_from} has {value}, which holds"
        for name, value in holds.items()
        if name in o.model_fields_set and getattr(o, name) != value
    ]


def _drafter(o: TrainOptions, target):
    """A drafter as the options ask: continued, warm or random."""
    import torch

    from sglang_dflash.train import checkpoint
    from sglang_dflash.train.chat import Chat
    from sglang_dflash.train.judge import TOP
    from sglang_dflash.train.model import Drafter

    torch.manual_seed(o.seed)
    if o.init_from is not None:
        drafter = checkpoint.load_drafter(o.init_from)
        if drafter.config.selector_rank:
            logger.warning(
                "the selector of %s is left out: it stands on the drafter as it was%s", o.init_from,
                "" if o.selector else "; train one again afterwards with --selector",
            )  # fmt: skip
            drafter.drop_selector()
        if drafter.config.hidden != target.hidden or drafter.config.vocab != target.vocab:
            raise UserError(f"{o.init_from} does not fit the target: hidden size or vocabulary differ")
        for line in ignored(o, drafter.config):
            logger.warning(line)
        if o.selector:
            drafter.add_selector(o.selector, TOP)
        return drafter.to(target.device, target.dtype)
    mask, name = (o.mask_token_id, "") if o.mask_token_id is not None else Chat(o.target).mask_token()
    if not 0 <= mask < target.vocab:
        raise UserError(f"mask token {mask} is outside the vocabulary of {target.vocab}")
    logger.info("mask token %d %s", mask, name)
    layers = tuple(o.target_layers) or checkpoint.default_target_layers(target.num_layers)
    config = checkpoint.config_for(
        target, layers=o.layers, block=o.block, target_layers=layers, mask_token=mask
    )
    drafter = Drafter(config).to(target.device, target.dtype)
    with torch.no_grad():
        # The frozen head expects the target's scale; a fifth of it starts near a uniform guess.
        drafter.norm.weight.copy_(target.norm * 0.2)
    return drafter


def _start(o: TrainOptions, drafter, target, train) -> None:
    """Give a new drafter its start: the target's layers, or, where random was asked, a balanced fusion."""
    import torch

    from sglang_dflash.train import checkpoint

    if o.init_from is not None:
        return
    if o.warm_layers != "none":
        sample = train[0].tokens[None, :256].to(target.device)
        depth = target.num_layers
        sources = _ints(o.warm_layers) or tuple(range(depth - o.layers, depth))
        checkpoint.warm_start(drafter, target, sources, sample)
        return
    planes = torch.cat([d.planes[d.prompt_len : -1, :-1] for d in train[:32]])
    checkpoint.balance_fusion(drafter, planes.to(target.device))


def _documents(o: TrainOptions, target, drafter):
    """Answers to train on, and those that judge."""
    from sglang_dflash.train import batches
    from sglang_dflash.train.corpus import read_meta
    from sglang_dflash.train.features import FeatureWriter

    excluded = batches.excluded_hashes(barred(o.exclude))
    train: list[batches.Document] = []
    held: list[batches.Document] = []
    for folder in o.corpus:
        place = features_place(o.features_dir, o.corpus, folder)
        if (vocab := read_meta(folder).get("vocab")) != target.vocab:
            raise UserError(f"corpus {folder} has ids of a vocabulary of {vocab}, the target {target.vocab}")
        writer = FeatureWriter(place, target, drafter.config.target_layers)
        train += batches.load_documents([folder], "train", writer, None, excluded, o.greedy_only)
        if o.held_out > len(held):
            held += batches.load_documents([folder], "heldout", writer, o.held_out - len(held))
    return train, held


def _drafter_settings(o: TrainOptions, device: str):
    """Settings of a run that trains a whole drafter."""
    from sglang_dflash.train.loss import LossSettings
    from sglang_dflash.train.trainer import TrainSettings

    how = o.attention if o.attention != "auto" else ("flex" if device.startswith("cuda") else "split")
    return TrainSettings(
        loss=LossSettings(
            gamma=o.gamma,
            kl=o.kl,
            tree=o.tree,
            confidence=o.confidence,
            # Of few rows a GPU's launches take longer than the arithmetic.
            chunk_bytes=(2 << 30) if device.startswith("cuda") else LossSettings.chunk_bytes,
        ),
        schedule=_schedule(o.schedule),
        how=how,
        pack_to=o.pack if o.pack is not None else (2048 if device.startswith("cuda") else 0),
        negatives=o.negatives if o.negatives is not None else (2048 if device == "cpu" else -1),
        **{name: getattr(o, name) for name in SHARED},
    )


def _selector_settings(o: TrainOptions, rank: int):
    """Settings of a run that trains a selector alone: those given, where it has them."""
    from sglang_dflash.train.selector import SelectorSettings

    if o.init_from is None:
        raise UserError("--selector needs --init-from: the drafter that it is trained for")
    given = o.model_fields_set
    if unused := sorted(given - {*FOR_SELECTOR, *FOR_ALL}):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise UserError(f"{names}: not with --selector, which leaves the drafter as it is")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--selector trains in one process: start it without accelerate or torchrun")
    chosen = {name: getattr(o, name) for name in FOR_SELECTOR if name in given}
    return SelectorSettings(rank=rank, **chosen)


def main(argv: list[str]) -> int:
    o = parse(TrainOptions, "sglang-dflash train", argv)
    selector = _selector_settings(o, o.selector) if o.selector else None
    import torch

    from sglang_dflash.train import parallel, report
    from sglang_dflash.train.selector import SelectorTrainer
    from sglang_dflash.train.target import DenseTarget
    from sglang_dflash.train.trainer import Trainer

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    if o.threads:
        torch.set_num_threads(o.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    target = DenseTarget(o.target, device=device)
    drafter = _drafter(o, target)

    train, held = _documents(o, target, drafter)
    _start(o, drafter, target, train)
    responses = sum(len(d.tokens) - d.prompt_len for d in train)
    logger.info("%d training documents, %d response tokens; %d held out", len(train), responses, len(held))

    settings = selector or _drafter_settings(o, device)
    view = report.View(o.out, settings)
    kind = SelectorTrainer if selector else Trainer
    trainer = kind(drafter, target, train, held, settings, o.out, view.observe)
    if trainer.resume():
        logger.info("resumed at step %d, %.1f minutes in", trainer.step, trainer.elapsed / 60)
    options = json.loads(o.model_dump_json())
    (o.out / "options.json").write_text(json.dumps({"started": time.time(), **options}, indent=1) + "\n")
    try:
        with view:
            best = trainer.run()
        if parallel.is_main():
            report.plot(o.out)
    except OSError as error:
        raise UserError(f"cannot write to {o.out}: {error.strerror or error}; free some space") from None
    if not parallel.is_main():
        return 0
    if not (o.out / "best").is_dir():
        raise UserError(
            f"no selector did better than the drafter alone ({best:.3f}, {kind.score}, held out): "
            "nothing saved; give more answers or --kl 0"
        )
    print(f"best held-out accept length {best:.3f} ({kind.score}); drafter: {o.out / 'best'}")
    return 0
