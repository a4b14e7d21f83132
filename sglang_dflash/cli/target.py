"""Which target and drafter the demo and the benchmark run: the embedded pair, or the user's own."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

from sglang_dflash.cli.fetch import fetch_with_progress
from sglang_dflash.client import access
from sglang_dflash.client.flags import API_KEY, flag_value, with_config
from sglang_dflash.errors import UserError
from sglang_dflash.models.pair import MODES, Mode, drafter_flags, pair_flags, quick_start, require_drafter
from sglang_dflash.models.registry import SMOLLM2


@dataclass(frozen=True)
class Target:
    """A target with its drafter, ready to serve.

    ``flags`` are SGLang's, per decoding mode; ``env`` holds for every mode.
    """

    model: Path
    drafter: Path
    flags: dict[Mode, list[str]]
    env: dict[str, str | None]
    vocab_size: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", type=Path, help="another target (default: the embedded one)")
    parser.add_argument("--drafter", type=Path, help="another drafter (default: the one that ships)")
    parser.epilog = "flags after `--` go to every server, for example: -- --dtype float32"


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse ``argv``; what stands behind ``--`` becomes ``args.sglang``."""
    at = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:at])
    args.sglang = argv[at + 1 :]
    return args


def resolve(args: argparse.Namespace, *, side_by_side: int = 1) -> Target:
    """Check what was asked for and fetch what is missing; raises :class:`UserError`.

    Args:
        side_by_side: servers that start at once and share the cores: a thread more than there are free ones
            costs a tree server its start, in which it measures what steps cost.
    """
    key = flag_value(with_config(args.sglang), API_KEY)
    if key:
        # What asks the servers started here takes it from the environment.
        os.environ[access.VARIABLE] = key
    threads = {"OMP_NUM_THREADS": one_thread_count(side_by_side), "HF_HUB_OFFLINE": "1"}
    if args.model_path is None:
        drafter = require_drafter((args.drafter or SMOLLM2.drafter_dir).expanduser())
        model = fetch_with_progress(SMOLLM2)
        flags = {mode: pair_flags(SMOLLM2, mode, drafter) for mode in MODES}
        env: dict[str, str | None] = {**threads, **quick_start()}
    else:
        model = args.model_path.expanduser()
        if not (model / "config.json").is_file():
            raise UserError(f"no model at {model}: a folder with config.json expected")
        if args.drafter is None:
            raise UserError("--model-path needs --drafter: a DFlash drafter trained for that target")
        drafter = require_drafter(args.drafter.expanduser())
        flags = {mode: ["--model-path", str(model), *drafter_flags(mode, drafter)] for mode in MODES}
        env = {**threads}
    return Target(
        model=model,
        drafter=drafter,
        flags={mode: [*words, *args.sglang] for mode, words in flags.items()},
        env=env,
        vocab_size=_vocab_size(model),
    )


def _vocab_size(model: Path) -> int:
    try:
        config = json.loads((model / "config.json").read_text())
        return int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{model / 'config.json'} names no vocab_size; is this a text model?") from error


def one_thread_count(side_by_side: int = 1) -> str:
    """One thread count for all servers of a run: chosen anew, each would see the load of the last."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given:
        return given
    from sglang_dflash.platform.threads import allowed_cpus, busy_cores, free_threads, usable_cores

    cpus = allowed_cpus()
    return str(max(1, free_threads(usable_cores(len(cpus)), busy_cores(cpus)) // side_by_side))
