"""Where a server's libraries keep what they make, on machines whose home cannot be written.

In a container the user often has no entry in passwd, and a home that is missing or read-only. SGLang,
FlashInfer and others make folders below it as they are imported, and end in a traceback there.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from sglang_dflash.errors import UserError

# variable -> folder below the home that stands for it where it is not set
_WRITTEN = {
    "XDG_CACHE_HOME": ".cache",
    "SGLANG_CACHE_DIR": ".cache/sglang",
    "FLASHINFER_WORKSPACE_BASE": "",
    "TVM_FFI_CACHE_DIR": ".cache/tvm-ffi",
    "TRITON_HOME": "",
}
# Read as well as written: models that lie there already are worth more than a place to write.
_READ = {"HF_HOME": ".cache/huggingface", "SGLANG_DFLASH_CACHE": ".cache/sglang-dflash"}


@dataclass(frozen=True)
class Moved:
    """Variables to set; ``home`` could not be written, ``scratch`` can."""

    home: Path
    scratch: Path
    variables: dict[str, str]

    def __str__(self) -> str:
        return (
            f"{self.home} cannot be written, so what is cached there goes to {self.scratch}; "
            "set XDG_CACHE_HOME to another folder to keep it"
        )


def writable(place: Path) -> bool:
    """Whether files can be made in ``place``, which need not exist yet."""
    try:
        while not place.exists():
            place = place.parent
    except OSError:
        return False
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def _scratch(environ: Mapping[str, str]) -> Path:
    """A folder of this user's own; the one of an earlier start where there is one."""
    chosen = environ.get("XDG_CACHE_HOME")
    if chosen and writable(Path(chosen)):
        return Path(chosen)
    try:
        folder = Path(tempfile.gettempdir()) / f"sglang-dflash-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid() or not writable(folder):
            # The name can be guessed: somebody else may have made it.
            folder = Path(tempfile.mkdtemp(prefix="sglang-dflash-"))
    except OSError as error:
        raise UserError(
            f"no folder for caches: neither the home nor the temporary folder can be written ({error}); "
            "set HOME or TMPDIR to one that can"
        ) from None
    return folder


def find(environ: Mapping[str, str]) -> Moved | None:
    """What to set so that a server can write its caches; None where all is well.

    Raises :class:`UserError` for a folder that a variable names and that cannot be written, and where
    there is no writable folder at all.
    """
    for name in _WRITTEN:
        if (named := environ.get(name)) and not writable(Path(named).expanduser()):
            raise UserError(f"{named} cannot be written; set {name} to a folder that can")
    try:
        home: Path | None = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
    except RuntimeError:
        home = None
    wanted = {
        name: below
        for name, below in _WRITTEN.items()
        if not environ.get(name) and (home is None or not writable(home / below))
    }
    if not wanted:
        return None
    scratch = _scratch(environ)
    variables = {
        name: str(scratch / below.removeprefix(".cache").lstrip("/")) for name, below in wanted.items()
    }
    if home is None:
        return Moved(Path("~"), scratch, {"HOME": str(scratch)} | variables)
    kept = {
        name: str(home / below)
        for name, below in _READ.items()
        if not environ.get(name) and "XDG_CACHE_HOME" in wanted and (home / below).is_dir()
    }
    return Moved(home, scratch, variables | kept)


def settle(environ: MutableMapping[str, str] = os.environ) -> Moved | None:
    """:func:`find`, put into force."""
    moved = find(environ)
    if moved is not None:
        environ.update(moved.variables)
    return moved
