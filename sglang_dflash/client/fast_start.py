"""Start SGLang without importing model families that this server cannot need.

SGLang imports every module of ``sglang.srt.models`` in each process it starts, which is most of the
start-up of a small model on CPU. ``SGLANG_DISABLED_MODEL_ARCHS`` is its own setting to leave some out.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from importlib.util import find_spec

VARIABLE = "SGLANG_DISABLED_MODEL_ARCHS"

# The embedded target's family and the drafter's, by module name in sglang.srt.models.
EMBEDDED = ("llama", "dflash")


def disabled_models(keep: Iterable[str]) -> str:
    """Value of :data:`VARIABLE` that leaves only the modules ``keep`` (and what they import)."""
    kept = set(keep)
    # The top package is found without being imported; importing it costs seconds.
    spec = find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return ""
    folders = [f"{path}/srt/models" for path in spec.submodule_search_locations]
    names = sorted(module.name for module in pkgutil.iter_modules(folders) if not module.ispkg)
    return ",".join(name for name in names if name not in kept)
