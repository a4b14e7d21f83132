"""A width that somebody else sets while the server runs: what benchmarks switch between rounds."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sglang_dflash.errors import UserError
from sglang_dflash.step.width import Width
from sglang_dflash.worker.width import policy
from sglang_dflash.worker.width.policy import Policy, WidthPolicy

CONTROL = "control:"


def check_setting(setting: str, widest: Width) -> None:
    """Refuse what is no setting of ``SGLANG_DFLASH_WIDTH``, before anything is loaded. Raises UserError."""
    if not setting.startswith(CONTROL):
        policy.check_setting(setting, widest)


class ControlledWidth:
    """Follows a file that holds a setting of ``SGLANG_DFLASH_WIDTH``, read when it changes.

    What ``auto`` has learned stays while another setting is in force. One rank only.

    Args:
        path: of the file; it may appear later, until then ``auto`` holds.
        auto: the policy of ``auto``.
        make: gives the policy of any other setting; where it raises UserError the setting is ignored.
    """

    def __init__(self, path: Path, auto: WidthPolicy, make: Callable[[str], Policy]) -> None:
        self.auto = auto
        self._path, self._make = path, make
        self._changed: int | None = None
        self._policies: dict[str, Policy] = {"auto": auto}
        self._now: Policy = auto

    def choose(self, requests: int, length: float, sampled_share: float) -> Width:
        self._look()
        return self._now.choose(requests, length, sampled_share)

    def _look(self) -> None:
        try:
            changed = os.stat(self._path).st_mtime_ns
            if changed == self._changed:
                return
            setting = self._path.read_text().strip()
        except OSError:
            return
        self._changed = changed
        try:
            if setting not in self._policies:
                self._policies[setting] = self._make(setting)
            self._now = self._policies[setting]
        except UserError:
            return

    @property
    def learning(self) -> bool:
        return self._now is self.auto

    def why(self) -> dict[str, Any]:
        return self._now.why()

    def state(self) -> list[float]:
        return self.auto.state()

    def load(self, state: Sequence[float]) -> None:
        self.auto.load(state)
