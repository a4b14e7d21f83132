"""The loop: it can overfit, it resumes exactly after kill -9, it stops on NaN and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sglang_dflash.cli.main import main
from sglang_dflash.client.ports import free_port
from sglang_dflash.errors import UserError
from sglang_dflash.train import corpus
from sglang_dflash.train.checkpoint import load_drafter
from sglang_dflash.train.corpus import Record
from sglang_dflash.train.judge import chain_accepts, draft_table
from sglang_dflash.train.loss import LossSettings
from sglang_dflash.train.model import Drafter
from sglang_dflash.train.prompts import is_held_out
from sglang_dflash.train.trainer import Trainer, TrainSettings


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    """Random answers in both splits."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    corpus.write_meta(folder, {"target": "tiny", "vocab": 320, "max_new": 40})
    for held, n in ((False, 12), (True, 3)):
        hashes = [h for h in range(1, 3000) if is_held_out(h) == held][:n]
        rows = [Record(rng.integers(4, 320, 30).tolist(), 5, "code", 0.0, h) for h in hashes]
        corpus.write_shard(folder / f"{corpus.SPLITS[held]}-00000.npz", rows, 320)
    return folder


def options(corpus_dir, target_dir, out, **more) -> list[str]:
    given = {
        "target": target_dir, "corpus": corpus_dir, "out": out, "features-dir": out / "features", "layers": 1,
        "block": 4, "target-layers": "0,2,4", "rows": 2, "anchors": 4, "steps": 24, "eval-every": 8,
        "save-every": 5, "held-out": 2, "rate": 2e-3, "threads": 1,
    } | {k.replace("_", "-"): v for k, v in more.items()}  # fmt: skip
    args = []
    for key, value in given.items():
        if value is not None:
            args += [f"--{key}", str(value)]
    return args


def test_overfits_one_document(target, drafter_config, make_document, tmp_path):
    document = make_document(40)
    torch.manual_seed(0)
    drafter = Drafter(drafter_config)
    settings = TrainSettings(
        steps=180, rate=3e-3, rows=1, anchors=40, loss=LossSettings(kl=0.0), eval_every=1e9, save_every=1e9
    )
    Trainer(drafter, target, [document], [], settings, tmp_path).run()
    accepts = chain_accepts(draft_table(drafter.eval(), target, document))
    # Tokens per pass from every anchor with a whole block ahead of it.
    full = accepts[: len(accepts) - drafter_config.block + 1]
    assert float((full + 1).float().mean()) >= 0.9 * drafter_config.block


def losses(out) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in rows]


def test_kill_and_resume_give_the_same_curve(corpus_dir, target_dir, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    switches = {
        "negatives": 20,
        "complementary": 0.5,
        "schedule": "0:3,0.5:4",
        "tree": 0.5,
        "dropout": 0.1,
        "kl": 0.5,
    }
    assert main(["train", *options(corpus_dir, target_dir, whole, **switches)]) == 0
    args = options(corpus_dir, target_dir, broken, **switches)
    code = "import sys, time, sglang_dflash.train.trainer as t\n"
    code += "step = t.Trainer.train_step\n"
    code += "t.Trainer.train_step = lambda self: (time.sleep(0.3), step(self))[1]\n"
    code += "from sglang_dflash.cli.main import main\nsys.exit(main(['train', *sys.argv[1:]]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 240
    try:
        while not ((broken / "log.jsonl").is_file() and len(losses_or_none(broken)) >= 9):
            assert time.monotonic() < deadline, "the run did not get going"
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(losses_or_none(broken)) < 24
    assert main(["train", *args]) == 0
    assert losses(broken) == losses(whole)
    a, b = load_drafter(whole / "best"), load_drafter(broken / "best")
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)


def losses_or_none(out) -> list[str]:
    """Complete log lines (the writer may be in the middle of one)."""
    return [line for line in (out / "log.jsonl").read_text().split("\n")[:-1] if line]


@pytest.mark.slow
def test_two_processes_train_one_drafter(corpus_dir, target_dir, tmp_path):
    """``accelerate launch``, two processes over gloo: both take every step, one writes."""
    args = options(corpus_dir, target_dir, tmp_path, steps=6)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", "1", "--main_process_port", str(free_port())]
    command = [*launch, "-m", "sglang_dflash.cli.main", "train", *args]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-1000:]
    assert run.stdout.count("best held-out accept length") == 1
    assert [step for step, _ in losses(tmp_path)] == [*range(6), 6]
    assert load_drafter(tmp_path / "best").config.layers == 1


def test_resume_refuses_other_settings(corpus_dir, target_dir, tmp_path, capsys):
    assert main(["train", *options(corpus_dir, target_dir, tmp_path, steps=5)]) == 0
    assert main(["train", *options(corpus_dir, target_dir, tmp_path, steps=5, rate=1e-4)]) == 2
    assert "other settings (rate)" in capsys.readouterr().err


def test_nan_stops_and_keeps_the_last_good_state(corpus_dir, target_dir, tmp_path):
    assert main(["train", *options(corpus_dir, target_dir, tmp_path, steps=10)]) == 0
    before = (tmp_path / "best" / "model.safetensors").read_bytes()
    state = (tmp_path / "state.pt").read_bytes()
    drafter = load_drafter(tmp_path / "best")
    with torch.no_grad():
        drafter.fc.weight[0, 0] = float("nan")
    from sglang_dflash.train.batches import load_documents
    from sglang_dflash.train.features import FeatureWriter
    from sglang_dflash.train.target import DenseTarget

    target = DenseTarget(target_dir)
    writer = FeatureWriter(tmp_path / "features", target, (0, 2, 4))
    train = load_documents([corpus_dir], "train", writer)
    trainer = Trainer(drafter, target, train, train[:1], TrainSettings(steps=9, rows=2, anchors=4), tmp_path)
    with pytest.raises(UserError, match="lower --rate"):
        trainer.run()
    assert (tmp_path / "best" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "state.pt").read_bytes() == state


def test_run_leaves_a_served_drafter_a_log_and_a_picture(corpus_dir, target_dir, tmp_path, capsys):
    assert main(["train", *options(corpus_dir, target_dir, tmp_path, kl=1.0, optimizer="muon")]) == 0
    assert "best held-out accept length" in capsys.readouterr().out
    assert (tmp_path / "curve.png").stat().st_size > 5000
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(events.Scalars("train/loss")) == 25
    assert [e.step for e in events.Scalars("held_out/all/chain")] == [7, 15, 24]
    config = json.loads((tmp_path / "best" / "config.json").read_text())
    assert config["dflash_config"] == {"mask_token_id": 3, "target_layer_ids": [0, 2, 4]}
    held = [json.loads(line)["held_out"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(h is not None for h in held) == 3
    # Continue from the stock layout, and judge it.
    more = options(corpus_dir, target_dir, tmp_path / "more", init_from=tmp_path / "best", steps=2)
    assert main(["train", *more]) == 0
    judge = [
        "--target",
        str(target_dir),
        "--drafter",
        str(tmp_path / "best"),
        "--corpus",
        str(corpus_dir),
    ]
    judge += ["--features-dir", str(tmp_path / "features"), "--json-out", str(tmp_path / "numbers.json")]
    assert main(["eval", *judge]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())["offline"]["all"]
    assert numbers["documents"] == 3
    assert numbers["accept_length"]["tree-32"] >= numbers["accept_length"]["chain"] >= 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"target-layers": "0,5"}, "from 0 to 4"),
        ({"target": "/nowhere"}, "config.json is missing"),
        ({"corpus": "/nowhere"}, "corpus.json is missing"),
        ({"mask-token-id": 999}, "outside the vocabulary"),
        ({"init-from": "/nowhere"}, "no drafter at"),
        ({"minutes": 1}, "exactly one budget"),
        ({"rows": 0}, "--rows 0: input should be greater than or equal to 1"),
        ({"layers": "two"}, "--layers two: input should be a valid integer"),
        ({"schedule": "x"}, "progress:size"),
        ({"exclude": "/nowhere.jsonl"}, "no file /nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line(corpus_dir, target_dir, tmp_path, capsys, more, message):
    assert main(["train", *options(corpus_dir, target_dir, tmp_path, **more)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_full_disk_is_one_line_and_keeps_the_last_good_drafter(corpus_dir, target_dir, tmp_path):
    """The optimiser's state does not fit, the drafter before it did."""
    args = options(corpus_dir, target_dir, tmp_path, eval_every=4, save_every=5)
    code = "import resource, sys; from sglang_dflash.cli.main import main\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
    code += "sys.exit(main(['train', *sys.argv[1:]]))"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    # Features first: they are larger than the limit.
    assert main(["train", *options(corpus_dir, target_dir, tmp_path / "first", steps=1)]) == 0
    (tmp_path / "first" / "features").rename(tmp_path / "features")
    run = subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    last = run.stderr.splitlines()[-1]
    assert last.startswith(f"error: cannot write {tmp_path / 'state.pt'}")
    assert "Traceback" not in run.stderr
    assert load_drafter(tmp_path / "best").config.layers == 1
    assert not list(tmp_path.glob(".*.part"))


def test_a_corpus_that_does_not_fit_is_one_line(corpus_dir, target_dir, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(corpus_dir, other)
    corpus.write_meta(other, {"target": "big", "vocab": 640, "max_new": 40})
    assert main(["train", *options(other, target_dir, tmp_path / "a")]) == 2
    assert "vocabulary of 640, the target 320" in capsys.readouterr().err
    shutil.copytree(corpus_dir, tmp_path / "short")
    shard = tmp_path / "short" / "train-00000.npz"
    shard.write_bytes(shard.read_bytes()[:200])
    assert main(["train", *options(tmp_path / "short", target_dir, tmp_path / "b")]) == 2
    assert "train-00000.npz is damaged" in capsys.readouterr().err


def test_target_without_head(target_dir, tmp_path, capsys):
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(target_dir / name)
    config = json.loads((target_dir / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["train", "--target", str(tmp_path), "--steps", "1"]) == 2
    assert "has no head" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    assert main(["train", "--target", str(tmp_path), "--steps", "1"]) == 2
    assert "not supported" in capsys.readouterr().err
