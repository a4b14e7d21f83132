"""A home that cannot be written: a writable place is chosen, or one line names folder and variable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_dflash.cli import findings
from sglang_dflash.client import places
from sglang_dflash.errors import UserError
from sglang_dflash.models.registry import SMOLLM2

#: A user without an entry in passwd and without a superuser's rights over other people's files.
STRANGER = ["unshare", "-U", "--map-user=54321", "--map-group=54321"]


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that nobody writes to; the test runs as root at times, to whom no file is locked."""
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    plain = os.access
    monkeypatch.setattr(
        places.os, "access", lambda path, mode: plain(path, mode) and not Path(path).is_relative_to(home)
    )
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(tmp_path))
    return home


def test_a_home_that_can_be_written_changes_nothing(tmp_path: Path) -> None:
    assert places.find({"HOME": str(tmp_path)}) is None


def test_caches_of_a_locked_home_move_and_models_in_it_stay(locked: Path) -> None:
    environ = {"HOME": str(locked)}
    moved = places.settle(environ)
    assert moved is not None
    assert environ["HF_HOME"] == str(locked / ".cache" / "huggingface")
    assert "SGLANG_DFLASH_CACHE" not in environ  # nothing lies there, so it follows XDG_CACHE_HOME
    scratch = locked.parent / f"sglang-dflash-{os.getuid()}"
    for name in places._WRITTEN:
        assert Path(environ[name]).is_relative_to(scratch)
    assert scratch.stat().st_mode & 0o777 == 0o700
    assert f"{locked} cannot be written" in str(moved)
    assert "XDG_CACHE_HOME" in str(moved)
    assert places.settle(environ) is None


def test_the_users_own_choice_stands(locked: Path, tmp_path: Path) -> None:
    mine = {"HOME": str(locked), "XDG_CACHE_HOME": str(tmp_path / "mine"), "TRITON_HOME": str(tmp_path)}
    moved = places.find(mine)
    assert moved is not None
    assert not mine.keys() & moved.variables.keys()
    assert moved.variables["SGLANG_CACHE_DIR"] == str(tmp_path / "mine" / "sglang")


def test_no_home_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(places.Path, "home", unknown)
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(tmp_path))
    moved = places.find({})
    assert moved is not None
    assert moved.variables["HOME"] == str(moved.scratch)


def test_what_cannot_be_mended_is_one_line(
    locked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {"HOME": str(tmp_path), "SGLANG_CACHE_DIR": str(locked / "x")}
    with pytest.raises(UserError, match=f"{locked}/x cannot be written; set SGLANG_CACHE_DIR"):
        places.find(named)
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(tmp_path / "none"))
    with pytest.raises(UserError, match="set HOME or TMPDIR"):
        places.find({"HOME": str(locked)})


def test_doctor_says_so(locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*places._WRITTEN, *places._READ]:
        monkeypatch.setenv(name, "")  # so that what is set below is undone
    monkeypatch.setenv("HOME", str(locked))
    (finding,) = findings.caches()
    assert finding.ok
    assert f"{locked} cannot be written" in finding.text
    monkeypatch.setenv("SGLANG_DFLASH_CACHE", str(locked))
    disk = [f for f in findings.embedded_pair(replace(SMOLLM2, bytes_needed=0)) if f.what == "disk"]
    assert [f.text for f in disk] == [f"{locked}/models cannot be written"]
    monkeypatch.setenv("TRITON_HOME", str(locked))
    (finding,) = findings.caches()
    assert (finding.ok, finding.mend) == (False, "set TRITON_HOME to a folder that can")


def _can_be_a_stranger() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*STRANGER, "true"]).returncode == 0


@pytest.mark.skipif(not _can_be_a_stranger(), reason="no user namespaces here")
def test_sglang_is_imported_by_a_user_without_name_and_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_HOME")}
    done = subprocess.run(
        [*STRANGER, sys.executable, "-m", "sglang_dflash.cli.main", "doctor", "--port", "31999"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environ | {"HOME": str(home), "USER": "", "LOGNAME": ""},
    )
    assert f"ok   caches: {home} cannot be written" in done.stdout
    assert "ok   hooks: in force" in done.stdout
