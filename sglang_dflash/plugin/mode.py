"""Who decodes: draft trees, SGLang's own chain, or SGLang without a drafter. Decided once, in the parent.

The parent's decision reaches every process of the server as an environment variable, which those processes
read in place of the setting: sampler hooks, reserves and the worker must not follow different modes.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from typing import Literal

from sglang_dflash.settings import DECISION, get_settings

logger = logging.getLogger("sglang_dflash")

Mode = Literal["tree", "chain", "plain"]


@dataclass(frozen=True)
class Decision:
    """Who decodes.

    Attributes:
        mode: tree, this plugin's worker; chain, SGLang's own; plain, SGLang's plain decoding.
        reason: what trees do not serve here, empty for trees.
        way_out: how to get trees.
    """

    mode: Mode
    reason: str = ""
    way_out: str = ""

    def line(self) -> str:
        """The one line that a server says about it."""
        if self.mode == "tree":
            return "draft trees"
        if self.mode == "chain":
            who = (
                "SGLang's own DFLASH chain decodes, which ignores frequency, presence and repetition "
                "penalties and min_new_tokens"
            )
        else:
            who = "SGLang decodes without the drafter"
        return f"draft trees do not serve {self.reason}: {who}; for trees {self.way_out}"


OFF_SWITCH = Decision("chain", "SGLANG_DFLASH_MODE=chain", "unset SGLANG_DFLASH_MODE")


def decide(decision: Decision) -> None:
    """Make ``decision`` this process's and that of every process it starts from here on."""
    os.environ[DECISION] = json.dumps(asdict(decision))
    if decision.mode != "tree" and decision is not OFF_SWITCH:
        logger.warning("sglang-dflash: %s", decision.line())


def forget() -> None:
    """A new server's arguments are read: what another decided in this environment is not its."""
    os.environ.pop(DECISION, None)


def decided() -> Decision:
    """The decision in force. Where none was made, as in a server without DFLASH, the setting's."""
    told = os.environ.get(DECISION)
    if told:
        return Decision(**json.loads(told))
    return OFF_SWITCH if get_settings().mode == "chain" else Decision("tree")


def why() -> dict[str, str]:
    """What ``/server_info`` says of a server that does not decode with trees."""
    decision = decided()
    return {"reason": decision.reason, "way_out": decision.way_out}
