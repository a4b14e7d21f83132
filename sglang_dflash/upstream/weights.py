"""Weight updates from disk at run time go to the one model that they are for.

SGLang hands one checkpoint to the target and then to the drafter
(``managers/scheduler_components/weight_updater.py``, ``update_weights_from_disk``). A DFlash drafter's
layers have the names of a target's, so a new target overwrites the drafter's layers (outputs stay the
target's, but hardly a draft is accepted any more), and a drafter's folder breaks the target. The folder's
``config.json`` says whose weights it holds.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sglang_dflash.drafter import DrafterConfig, check_fits, read_config, resolve_folder
from sglang_dflash.errors import UserError

logger = logging.getLogger("sglang_dflash")

# What decides the shapes of a running drafter and what SGLang derived from them at start.
_FIXED = ("hidden_size", "num_hidden_layers", "block_size", "vocab_size", "intermediate_size")
_FIXED_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")


def _folder(path: str) -> Path:
    """SGLang reads an update of a hub name at the revision that the server was started with."""
    from sglang.srt.runtime_context import get_spec

    return resolve_folder(path, get_spec().speculative_draft_model_revision)


def drafter_config(path: str) -> DrafterConfig | None:
    """The config of the drafter in ``path``, None when it is another kind of model."""
    read_config.cache_clear()  # the same folder may hold new weights
    try:
        config = read_config(_folder(path))
    except UserError:
        return None
    return config if any("DFlash" in name for name in config.architectures) else None


def check_replaces(running: DrafterConfig, new: DrafterConfig) -> None:
    """Raises UserError when a server with the ``running`` drafter would have to start again for ``new``."""
    left, right = running.model_dump(), new.model_dump()
    for name in (*_FIXED, *_FIXED_HEADS):
        if left.get(name) != right.get(name):
            raise UserError(
                f"the new drafter's {name} is {right.get(name)}, the running one's {left.get(name)}; "
                "restart the server with the new drafter"
            )
    if (running.block, running.target_layers()) != (new.block, new.target_layers()):
        raise UserError(
            "the new drafter has another block size or reads other target layers; "
            "restart the server with the new drafter"
        )
    if running.anchor_first != new.anchor_first:
        raise UserError(
            "the new drafter's rows predict another position than the running one's; "
            "restart the server with the new drafter"
        )


class _Updater:
    """One runner's ``weight_updater``, asked only for the checkpoints that are its own."""

    def __init__(self, runner: Any, worker: Any, *, is_drafter: bool) -> None:
        self._runner, self._worker, self._is_drafter = runner, worker, is_drafter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner.weight_updater, name)

    def update_weights_from_disk(self, model_path: str, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        new = drafter_config(model_path)
        role = "drafter" if self._is_drafter else "target"
        if (new is not None) != self._is_drafter:
            return True, f"{model_path} is not for the {role}, which keeps its weights."
        update = self._runner.weight_updater.update_weights_from_disk
        if new is None:
            return update(model_path, *args, **kwargs)
        try:
            target = self._worker.model_runner.model_config.hf_config.get_text_config()
            check_fits(_folder(model_path), target=target, target_name="the target")
            check_replaces(self._worker.drafter_config, new)
        except UserError as error:
            return False, f"sglang-dflash: {error}"
        done, message = update(model_path, *args, **kwargs)
        if done:
            self._worker.drafter_replaced(new)
            logger.info("the drafter now has the weights of %s", model_path)
        return done, message


class _Runner:
    """A model runner with a routed ``weight_updater``."""

    def __init__(self, runner: Any, worker: Any, *, is_drafter: bool) -> None:
        self._runner = runner
        self.weight_updater = _Updater(runner, worker, is_drafter=is_drafter)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


def route_weight_updates(worker: Any) -> None:
    """Route updates of both workers' runners; ``worker`` is the TreeWorker."""
    for owner, is_drafter in ((worker.target_worker, False), (worker, True)):
        routed = [
            (role, _Runner(runner, worker, is_drafter=is_drafter))
            for role, runner in owner.weight_update_runners()
        ]
        owner.weight_update_runners = lambda routed=routed: routed
