"""Our trainer beside the DFlash trainer of ``speculators`` 0.9.0: same data, same steps, one judge.

    python -m venv out/speculators && out/speculators/bin/pip install speculators==0.9.0
    python benchmarks/train_side_by_side.py --python out/speculators/bin/python \
        --corpus examples/corpus/self-prompted-2 --features-dir features

Both start from the drafter at --start (the ablation's), draw 128 random anchors a step from the same
documents and their cached features, and take the same number of steps with the full head; both
checkpoints are judged by ``sglang_dflash.train.judge`` on the same held-out answers. Runs that
--json holds already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import subprocess
import time
from pathlib import Path

from safetensors.torch import load_file, save_file
from train_ablation import documents, judged, length

from sglang_dflash.cli.data import TARGET
from sglang_dflash.train import checkpoint
from sglang_dflash.train.batches import Document
from sglang_dflash.train.corpus import write_atomically
from sglang_dflash.train.loss import LossSettings
from sglang_dflash.train.model import Drafter
from sglang_dflash.train.target import DenseTarget
from sglang_dflash.train.trainer import Trainer, TrainSettings

logger = logging.getLogger("side-by-side")


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--python", type=Path, required=True, help="interpreter that has speculators 0.9.0")
    p.add_argument("--target", type=Path, default=TARGET)
    p.add_argument("--corpus", type=Path, nargs="+", required=True)
    p.add_argument("--judge-corpus", type=Path, nargs="*")
    p.add_argument("--features-dir", type=Path, required=True)
    p.add_argument("--out", type=Path, default=Path("out/side-by-side"))
    p.add_argument("--json", type=Path, default=Path("benchmarks/results/train_side_by_side.json"))
    p.add_argument("--start", type=Path, default=Path("out/ablation/start"), help="where both begin")
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--rows", type=int, default=4, help="documents a step (ours); theirs pack as many tokens")
    p.add_argument("--anchors", type=int, default=32, help="anchors a document")
    p.add_argument("--answers", type=int, default=16)
    return p.parse_args()


def export(folder: Path, train: list[Document], target: DenseTarget) -> int:
    """The documents in the package's layout; returns their mean length in tokens.

    It normalises the target's last hidden state itself; ours is cached after that norm. Divided by
    the norm's weight it has RMS 1, so their norm gives ours back.
    """
    rows, place = [], folder / "hidden_states"
    place.mkdir(parents=True, exist_ok=True)
    for i, d in enumerate(train):
        planes = d.planes.float().clone()
        planes[:, -1] /= target.norm.float()
        tokens = d.tokens.clone()
        save_file(
            {"hidden_states": planes.bfloat16().contiguous(), "token_ids": tokens},
            place / f"hs_{i}.safetensors",
        )
        mask = [0] * d.prompt_len + [1] * (len(tokens) - d.prompt_len)
        rows.append({"input_ids": tokens.tolist(), "loss_mask": mask, "seq_len": len(tokens)})
    (folder / "rows.json").write_text(json.dumps(rows))
    return round(sum(len(d.tokens) for d in train) / len(train))


def theirs(o: argparse.Namespace, target: DenseTarget, train: list[Document], flags: list[str]) -> Drafter:
    """Train with the package from the common start; the weights carry z-lab's names on both sides."""
    data, seed, save = o.out / "data", o.out / "seed", o.out / "saved"
    shutil.rmtree(o.out, ignore_errors=True)
    mean = export(data, train, target)
    start = checkpoint.load_drafter(o.start)
    c = start.config
    run = [str(o.python), str(Path(__file__).parent / "speculators_run.py"), str(data)]
    common = ["--verifier-name-or-path", str(o.target), "--speculator-type", "dflash"]
    common += ["--block-size", str(c.block), "--mask-token-id", str(c.mask_token)]
    common += ["--total-seq-len", str(o.rows * mean), "--max-anchors", str(o.rows * o.anchors)]
    common += ["--draft-attn-impl", "eager", "--loss-implementation", "eager", "--num-workers", "0"]
    common += ["--hidden-states-dtype", "float32", "--on-missing", "raise", "--train-data-ratio", "0.98"]
    common += ["--epochs", "1", "--max-steps", str(o.steps), "--log-freq", "10"]
    shape = ["--num-layers", str(c.layers), "--full-attention-indices", *map(str, range(c.layers))]
    shape += ["--target-layer-ids", *map(str, c.target_layers), "--dry-run"]
    subprocess.run([*run, str(seed), *common, *shape], check=True)
    fresh = load_file(seed / "model.safetensors")
    ours = {k: v.to(fresh[k].dtype).contiguous() for k, v in start.state_dict().items()}
    save_file(fresh | ours, seed / "model.safetensors", metadata={"format": "pt"})
    subprocess.run([*run, str(save), *common, "--from-pretrained", str(seed), *flags], check=True)
    state = json.loads((save / "0" / "training_state.json").read_text())
    if state["global_step"] != o.steps:
        raise SystemExit(f"error: speculators took {state['global_step']} steps, not {o.steps}")
    weights = load_file(save / "0" / "model.safetensors")
    drafter = Drafter(c)
    drafter.load_state_dict({k: weights[k].float() for k in drafter.state_dict()})
    return drafter


def ours(o: argparse.Namespace, target: DenseTarget, train: list[Document], **more) -> Drafter:
    drafter = checkpoint.load_drafter(o.start).to(target.dtype)
    settings = TrainSettings(
        steps=o.steps,
        rows=o.rows,
        anchors=o.anchors,
        rate=1e-3,
        eval_every=math.inf,
        save_every=math.inf,
        **more,
    )
    shutil.rmtree(o.out, ignore_errors=True)
    Trainer(drafter, target, train, [], settings, o.out).run()
    return drafter


def table(result: dict) -> str:
    lines = ["| trainer | chain | tree-32 | s a step |", "| --- " * 4 + "|"]
    for run in result["runs"]:
        cells = [run["name"], *(f"{length(run, p):.3f}" for p in ("chain", "tree-32"))]
        lines.append("| " + " | ".join([*cells, f"{run['seconds'] / result['steps']:.2f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    o = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    target = DenseTarget(o.target)
    train, held = documents(o, target)
    train = train[: round(1.25 * o.steps * o.rows)]
    plain = ["--optimizer", "adamw", "--scheduler-type", "cosine", "--scheduler-warmup-ratio", "0.04"]
    plain += ["--per-position-loss-weight", "fixed-exp-decay", "--lr", "1e-3"]
    runs = {
        "speculators, plain recipe": lambda: theirs(o, target, train, plain),
        "ours, plain recipe": lambda: ours(o, target, train),
        "speculators, its D-PACE loss": lambda: theirs(o, target, train, [*plain[:6], "--lr", "1e-3"]),
        "ours, KL 0.5, corpus's ids and 2048 others": lambda: ours(
            o, target, train, negatives=2048, loss=LossSettings(kl=0.5)
        ),
    }
    budget = {
        "steps": o.steps,
        "blocks_a_step": o.rows * o.anchors,
        "documents": len(train),
        "answers": len(held),
    }
    result = json.loads(o.json.read_text()) if o.json.is_file() else {**budget, "runs": []}
    for name, make in runs.items():
        if any(run["name"] == name for run in result["runs"]):
            continue
        began = time.monotonic()
        drafter = make().to(target.dtype)
        run = {"name": name, "seconds": round(time.monotonic() - began, 1)} | judged(drafter, target, held)
        result["runs"].append(run)
        write_atomically(o.json, lambda p: p.write_text(json.dumps(result, indent=1) + "\n"))
        logger.info("%s: chain %.3f, tree-32 %.3f", name, length(run, "chain"), length(run, "tree-32"))
    o.json.with_suffix(".md").write_text(table(result) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
