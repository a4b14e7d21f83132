"""``sglang-dflash eval``: recall by position and accept length of chain and trees, by prompt kind."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field

from sglang_dflash.cli.data import TARGET, features_place
from sglang_dflash.cli.options import Options, parse
from sglang_dflash.client.access import OPTION_HELP
from sglang_dflash.errors import UserError

SHIPPED = Path(__file__).parent.parent / "drafters" / "smollm2-135m-instruct"
logger = logging.getLogger("sglang_dflash.eval")


class EvalOptions(Options):
    """Judge a drafter offline (and, with --server, against a running server's accept length).

    Answers come from a corpus's held-out split, or are generated now for the prompts of a JSONL file.
    """

    drafter: Path = Field(SHIPPED, description="drafter folder")
    target: Path = Field(TARGET, description="target model folder")
    corpus: list[Path] = Field([], description="judge on the held-out split of these corpora")
    prompts: Path | None = Field(None, description="judge on these prompts (JSONL: kind, prompt)")
    limit: int = Field(0, ge=0, description="at most so many answers; 0: all")
    max_new: int = Field(200, ge=16, description="longest generated answer, tokens")
    temperature: list[Annotated[float, Field(ge=0)]] = Field(
        [0.0], description="temperatures of generated answers, e.g. 0 0.8"
    )
    budgets: list[Annotated[int, Field(ge=2)]] = Field(
        [16, 32, 64], description="tree node budgets, root included"
    )
    calibrate: bool = Field(False, description="fit tree_depth_bonus on training answers and judge with it")
    write: bool = Field(False, description="with --calibrate: store it in the drafter's config if it helps")
    widths: bool = Field(
        False,
        description="accept lengths of short blocks and small trees too, and store them in the drafter's "
        "config: where a server's choice of widths starts from",
    )
    server: str | None = Field(
        None, description="URL of a running server: the same prompts are sent to it, and both lengths shown"
    )
    api_key: str | None = Field(None, description=OPTION_HELP)
    json_out: Path | None = Field(None, description="write the numbers here")
    features_dir: Path | None = Field(
        None,
        description="feature cache, a folder in it per corpus if several; default <cache>/features/<corpus>",
    )
    seed: int = Field(0, description="of sampled answers")
    threads: int = Field(0, ge=0, description="CPU threads, 0: as set by OMP_NUM_THREADS")


def _documents(o: EvalOptions, target, layers: tuple[int, ...], split: str = "heldout", limit: int = 0):
    from sglang_dflash.train import batches
    from sglang_dflash.train.features import FeatureWriter

    documents = []
    for folder in o.corpus:
        writer = FeatureWriter(features_place(o.features_dir, o.corpus, folder), target, layers)
        documents += batches.load_documents(
            [folder], split, writer, limit or None, greedy_only=split == "train"
        )
    return documents


def main(argv: list[str]) -> int:
    o = parse(EvalOptions, "sglang-dflash eval", argv)
    import torch

    from sglang_dflash.client.info import read_server_info
    from sglang_dflash.train import answers, calibrate, served
    from sglang_dflash.train.checkpoint import load_drafter, read_config
    from sglang_dflash.train.judge import draft_table, judge_tables
    from sglang_dflash.train.target import DenseTarget

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if o.threads:
        torch.set_num_threads(o.threads)
    if not o.corpus and o.prompts is None:
        raise UserError("nothing to judge on: give --corpus (held-out split) or --prompts FILE.jsonl")
    dtype = None  # the fast one
    if o.server:
        info = read_server_info(o.server, api_key=o.api_key)
        served.policy_of(info)  # a server that cannot be judged is refused at once
        if info.dtype in ("float32", "float"):  # no near-ties: the two must say the same
            dtype = torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = DenseTarget(o.target, dtype, device)
    drafter = load_drafter(o.drafter).to(device, target.dtype).eval()
    layers = drafter.config.target_layers
    documents = _documents(o, target, layers, limit=o.limit)
    if o.prompts is not None:
        for temperature in o.temperature:
            documents += answers.answer_prompts(
                target, o.target, o.prompts, layers, o.max_new, temperature, o.limit, o.seed
            )
    tables = [draft_table(drafter, target, d) for d in documents]
    stored = read_config(o.drafter)[1].get("tree_depth_bonus")
    bonus = torch.tensor(stored) if stored else None
    result = {"drafter": str(o.drafter.name), "block": drafter.config.block, "max_new": o.max_new}
    found = judge_tables(tables, o.budgets, bonus)
    result["offline"] = {name: j.as_dict() for name, j in found.items()}
    print(render(found))
    if o.calibrate:
        fit_on = [draft_table(drafter, target, d) for d in _documents(o, target, layers, "train", 60)]
        fitted = calibrate.fit_depth_bonus(fit_on or tables, nodes=32)
        after = judge_tables(tables, o.budgets, fitted)
        print(f"fitted tree_depth_bonus {[round(x, 3) for x in fitted.tolist()]}\n{render(after)}")
        result["calibrated"] = {name: j.as_dict() for name, j in after.items()}
        gain = after["all"].walks["tree-32"].length - found["all"].walks["tree-32"].length
        if o.write and gain > 0.005:
            calibrate.store(o.drafter, fitted)
            print(f"stored in {o.drafter / 'config.json'} (tree-32 +{gain:.3f})")
        elif o.write:
            print(f"not stored: tree-32 changes by {gain:+.3f}")
    if o.widths:
        result["widths"] = _store_widths(o.drafter, drafter, target, documents)
    if o.server:
        live = served.run(o.server, documents, o.max_new, o.api_key)
        policy = live.policy
        if policy.block != drafter.config.block:
            tables = [draft_table(drafter, target, d, policy.block) for d in documents]
        tables = [t.cut(policy.top_k) for t in tables]
        again = judge_tables(tables, [policy.nodes] if policy.nodes else [], bonus)
        if live.same:
            alike = [t for t, equal in zip(tables, live.equal, strict=True) if equal]
            again[served.EQUAL] = judge_tables(alike, [policy.nodes] if policy.nodes else [], bonus)["all"]
        offline = {name: j.walks[policy.name].length for name, j in again.items()}
        print(render_served(live, offline))
        result["served"] = live.as_dict() | {"offline": {k: round(v, 4) for k, v in offline.items()}}
    if o.json_out:
        o.json_out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _store_widths(folder: Path, drafter, target, documents) -> dict[str, dict[str, float]]:
    from sglang_dflash.train import calibrate
    from sglang_dflash.train.judge import draft_table

    found: list[dict[str, float]] = []
    block = drafter.config.block
    for sampled in (False, True):
        mine = [d for d in documents if (d.temperature > 0) == sampled]
        blocks = sorted({2, min(4, block), block}) if mine else []
        tables = {b: [draft_table(drafter, target, d, b) for d in mine] for b in blocks}
        found.append(calibrate.accept_by_width(tables))
    calibrate.store_accept(folder, *found)
    for name, lengths in zip(("greedy", "sampled"), found, strict=True):
        if lengths:
            print(f"{name}: " + ", ".join(f"{width} {length:.3f}" for width, length in lengths.items()))
    print(f"stored in {folder / 'config.json'}")
    return {"greedy": found[0], "sampled": found[1]}


def render(found) -> str:
    """The tables a person reads: accept lengths, then recall by position."""
    policies = list(found["all"].walks)
    wide = max(8, *(len(name) for name in found))
    lines = [f"{'':{wide}} {'answers':>7} " + " ".join(f"{p:>8}" for p in policies)]
    for name, j in found.items():
        cells = " ".join(f"{j.walks[p].length:8.3f}" for p in policies)
        lines.append(f"{name:{wide}} {j.documents:7} {cells}")
    lines.append("right token among the best 1, 4, 16, %, by position, given that all before are the best")
    for name, j in found.items():
        for k, row in j.recall.items():
            lines.append(f"{name:{wide}} {f'@{k}':>7} " + " ".join(f"{100 * x:4.0f}" for x in row))
    return "\n".join(lines)


def render_served(live, offline: dict[str, float]) -> str:
    """Served beside offline, and how far apart they are."""
    wide = max(8, *(len(name) for name in offline))
    title = f"{live.policy.name}, block {live.policy.block}"
    lines = [f"{title}: {live.same} of {live.answers} served answers are the offline ones token for token"]
    lines.append(f"{'':{wide}} {'served':>8} {'offline':>8} {'apart':>8}")
    for name, walk in live.walks.items():
        apart = 100 * (walk.length / offline[name] - 1)
        lines.append(f"{name:{wide}} {walk.length:8.3f} {offline[name]:8.3f} {apart:+7.1f}%")
    return "\n".join(lines)
