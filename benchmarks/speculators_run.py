"""Run the stock DFlash trainer of ``speculators`` 0.9.0 on a CPU; executed by that package's own Python.

    python speculators_run.py DATA SAVE [flags of speculators.train]

DATA holds ``rows.json`` and ``hidden_states/`` as benchmarks/train_side_by_side.py wrote them. The
trainer moves everything to a CUDA device by number and synchronises an accelerator; on a machine
without one those two calls are the only things replaced. Model, loss, optimiser, schedule, packing
and checkpoint are the package's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


def main() -> None:
    data, save, *flags = sys.argv[1:]
    from datasets import Dataset
    from speculators.train import cli, trainer
    from speculators.train.config import TrainConfig

    if not torch.accelerator.is_available():
        trainer.get_local_rank = lambda: "cpu"
        torch.accelerator.synchronize = lambda *_, **__: None
    rows = json.loads((Path(data) / "rows.json").read_text())
    table = Dataset.from_list(rows)
    table.set_format("torch", columns=["input_ids", "loss_mask", "seq_len"])
    table.save_to_disk(data)
    sys.argv = ["speculators.train", "--data-path", data, "--save-path", save, *flags]
    cli.main(TrainConfig.resolve())


if __name__ == "__main__":
    main()
