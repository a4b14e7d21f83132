"""Start SGLang without importing model families that this server cannot need, nor compiling twice.

SGLang imports every module of ``sglang.srt.models`` in each process it starts, which is most of the
start-up of a small model on CPU. ``SGLANG_DISABLED_MODEL_ARCHS`` is its own setting to leave some out.
"""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Iterable, MutableMapping
from importlib.util import find_spec

VARIABLE = "SGLANG_DISABLED_MODEL_ARCHS"

# The embedded target's family and the drafter's, by module name in sglang.srt.models.
EMBEDDED = ("llama", "dflash")


def keep_compiled(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let Python keep the modules it compiles, in this process too where ``environ`` is its own.

    With ``PYTHONDONTWRITEBYTECODE``, common in containers, each process of each server compiles SGLang's
    and torch's thousands of modules anew: 33 s.
    """
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if environ is os.environ:
        sys.dont_write_bytecode = False


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
