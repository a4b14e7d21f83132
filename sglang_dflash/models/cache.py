"""The user's cache folder: where it is, whether there is room, one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from sglang_dflash.errors import UserError

CACHE_VARIABLE = "SGLANG_DFLASH_CACHE"


def cache_root() -> Path:
    """``$SGLANG_DFLASH_CACHE``, else ``$XDG_CACHE_HOME/sglang-dflash``, else ``~/.cache/sglang-dflash``."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME")
    # The XDG base directory specification says that a relative path is to be ignored.
    base = Path(xdg) if xdg and Path(xdg).is_absolute() else Path.home() / ".cache"
    return base / "sglang-dflash"


def models_dir() -> Path:
    return cache_root() / "models"


def make_dir(path: Path, mend: str = "name another folder") -> Path:
    """Create ``path``; a folder that cannot be made is a :class:`UserError` that says ``mend``."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {path}: {error.strerror}; {mend}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write to {path}; {mend}")
    return path


def free_bytes(path: Path) -> int:
    """Free bytes on the file system that holds ``path`` or will hold it."""
    while not os.path.exists(path):  # not Path.exists, which raises where a parent may not be read
        path = path.parent
    return shutil.disk_usage(path).free


def need_space(path: Path, needed: int, what: str) -> None:
    """Raise :class:`UserError` unless ``needed`` bytes are free where ``path`` is or will be."""
    free = free_bytes(path)
    if free < needed:
        raise UserError(
            f"no room for {what}: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free at {path}; "
            f"free some space or set {CACHE_VARIABLE} to a folder on another disk"
        )


def sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256 of a file; ``on_bytes(n)`` is called after every ``n`` bytes read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return digest.hexdigest()


@contextlib.contextmanager
def writer_lock(folder: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold ``folder/.lock``: a second writer waits for the first and then finds its work done.

    The kernel frees the lock when its holder dies, so there is no stale lock to remove by hand.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def publish(made: Path, final: Path) -> None:
    """Move the finished folder ``made`` to ``final`` (same file system), replacing what is there.

    Readers of the old folder keep their open files. Call with :func:`writer_lock` held.
    """
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    made.rename(final)
    shutil.rmtree(old, ignore_errors=True)
