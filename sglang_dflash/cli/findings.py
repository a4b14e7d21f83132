"""The checks behind ``sglang-dflash doctor``: each looks at one thing and says it in one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, requires, version
from types import SimpleNamespace

from packaging.requirements import Requirement

from sglang_dflash.client import memory, places
from sglang_dflash.client.info import KeyRefusedError, read_server_info
from sglang_dflash.client.ports import port_is_free
from sglang_dflash.errors import UserError
from sglang_dflash.models.cache import free_bytes, models_dir
from sglang_dflash.models.registry import EmbeddedModel, why_incomplete

DISTRIBUTION = "sglang-dflash"
PLUGIN_GROUP, PLUGIN = "sglang.srt.plugins", "dflash_tree"
PLATFORM_GROUP, PLATFORM = "sglang.srt.platforms", "dflash_cpu"


@dataclass(frozen=True)
class Finding:
    """What one check saw. ``mend`` is empty when ``ok``."""

    ok: bool
    what: str
    text: str
    mend: str = ""


def sglang_version() -> Iterator[Finding]:
    what = "SGLang"
    wanted = next(
        (Requirement(line) for line in requires(DISTRIBUTION) or [] if Requirement(line).name == "sglang"),
        None,
    )
    try:
        have = version("sglang")
    except PackageNotFoundError:
        yield Finding(False, what, "not installed", f"install sglang{wanted.specifier if wanted else ''}")
        return
    if wanted is not None and not wanted.specifier.contains(have, prereleases=True):
        yield Finding(
            False,
            what,
            f"{have} is installed, this release is made for {wanted.specifier}",
            f"install 'sglang{wanted.specifier}' or another release of {DISTRIBUTION}",
        )
        return
    yield Finding(True, what, have)


def _find(group: str, name: str) -> list[EntryPoint]:
    return [entry for entry in entry_points(group=group) if entry.name == name]


def entry_points_visible() -> Iterator[Finding]:
    for group, name in ((PLUGIN_GROUP, PLUGIN), (PLATFORM_GROUP, PLATFORM)):
        what = f"entry point {name}"
        found = _find(group, name)
        if not found:
            yield Finding(
                False,
                what,
                f"SGLang cannot see it in {group}",
                f"install {DISTRIBUTION} into this environment again (`uv pip install -e .` in a checkout)",
            )
            continue
        if len({entry.value for entry in found}) > 1:
            yield Finding(
                False, what, "two installations of it are visible", f"uninstall one copy of {DISTRIBUTION}"
            )
            continue
        try:
            found[0].load()
        except BaseException as error:
            yield Finding(
                False,
                what,
                f"cannot be loaded: {type(error).__name__}: {error}",
                f"install {DISTRIBUTION} again; SGLang would only log this and serve the built-in chain",
            )
            continue
        yield Finding(True, what, found[0].value)


def _names(variable: str) -> list[str]:
    return [part.strip() for part in os.environ.get(variable, "").split(",") if part.strip()]


def environment(accelerator: Callable[[], bool]) -> Iterator[Finding]:
    """The variables of SGLang that can switch this package off without a word."""
    allowed = _names("SGLANG_PLUGINS")
    if allowed and PLUGIN not in allowed:
        yield Finding(
            False,
            "SGLANG_PLUGINS",
            f"{','.join(allowed)!r} leaves out {PLUGIN}: the built-in chain serves, without a word",
            f"unset SGLANG_PLUGINS or add {PLUGIN} to it",
        )
    if allowed and PLATFORM not in allowed and not accelerator():
        yield Finding(
            False,
            "SGLANG_PLUGINS",
            f"{','.join(allowed)!r} leaves out {PLATFORM}: the list filters platforms too, and this machine "
            "has no accelerator",
            f"unset SGLANG_PLUGINS or add {PLATFORM} to it",
        )
    platform = os.environ.get("SGLANG_PLATFORM", "")
    if platform and platform != PLATFORM:
        yield Finding(
            False,
            "SGLANG_PLATFORM",
            f"{platform!r} is another platform, and SGLang then leaves out every plugin of a package that "
            f"has a platform of its own: {PLUGIN} is not loaded",
            "unset SGLANG_PLATFORM",
        )
    elif platform and accelerator():
        yield Finding(
            False,
            "SGLANG_PLATFORM",
            f"{platform!r} is the CPU platform, but this machine has an accelerator: SGLang will not start",
            "unset SGLANG_PLATFORM",
        )
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        yield Finding(
            False,
            "SGLANG_USE_CPU_ENGINE",
            "set: SGLang's own CPU engine is asked for, which needs its own build and refuses DFLASH",
            "unset SGLANG_USE_CPU_ENGINE",
        )


def settings() -> Iterator[Finding]:
    from sglang_dflash.settings import get_settings

    get_settings.cache_clear()
    try:
        current = get_settings()
    except UserError as error:
        yield Finding(False, "settings", str(error), "change or unset that variable")
        return
    if current.mode == "chain":
        yield Finding(
            False,
            "settings",
            "SGLANG_DFLASH_MODE=chain: the off-switch is on, SGLang's own worker serves",
            "unset SGLANG_DFLASH_MODE for draft trees",
        )
        return
    yield Finding(True, "settings", current.describe())


def caches() -> Iterator[Finding]:
    """Moves this process's caches too, for the checks below import SGLang."""
    what = "caches"
    try:
        moved = places.settle()
    except UserError as error:
        cause, _, mend = str(error).rpartition("; ")
        yield Finding(False, what, cause, mend)
        return
    yield Finding(True, what, str(moved) if moved else "can be written")


def hooks() -> Iterator[Finding]:
    """Load the plugins as SGLang does and look whether our functions are in force."""
    what = "hooks"
    try:
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from sglang_dflash.plugin.hooks import missing

        absent = missing()
    except SystemExit as error:
        yield Finding(
            False, what, str(error).removeprefix("sglang-dflash: "), "mend that and run doctor again"
        )
        return
    except PermissionError as error:
        yield Finding(
            False,
            what,
            f"{error.filename} cannot be written",
            "make it writable, or set the variable that moves it",
        )
        return
    except Exception as error:
        yield Finding(
            False, what, f"SGLang's plugin system failed: {type(error).__name__}: {error}", "reinstall sglang"
        )
        return
    if absent:
        yield Finding(
            False,
            what,
            f"not in force on {', '.join(name.rsplit('.', 1)[-1] for name in absent)}: the chain would serve",
            "look above for what keeps the plugin out; another plugin may have replaced the same function",
        )
        return
    yield Finding(True, what, "in force; DFLASH takes the tree worker")


def platform() -> Iterator[Finding]:
    what = "platform"
    try:
        from sglang.srt.platforms import current_platform

        name = type(current_platform).__name__
        # The singleton is a lazy proxy in some releases; its device name is the same either way.
        device = getattr(current_platform, "device_name", "unknown")
    except (Exception, SystemExit) as error:
        yield Finding(False, what, f"none can be chosen: {error}", "see the environment variables above")
        return
    yield Finding(True, what, f"{name} ({device})")


def free_memory(available: int | None) -> Iterator[Finding]:
    """``available`` bytes; servers that do not fit are ended by the system, without a word of their own."""
    what = "memory"
    if available is None:
        return
    needs = {"serve": memory.SERVE, "demo": memory.DEMO, "make test": memory.TESTS}
    said = ", ".join(f"{name} takes {size / 1e9:.0f} GB" for name, size in needs.items())
    text = f"{available / 1e9:.1f} GB free; {said}"
    if available >= memory.SERVE:
        yield Finding(True, what, text)
    else:
        yield Finding(False, what, text, "free some, or serve with a smaller --max-total-tokens")


def embedded_pair(model: EmbeddedModel) -> Iterator[Finding]:
    reason = why_incomplete(model)
    what = "target"
    if reason is None:
        yield Finding(True, what, f"{model.folder} in {model.target_dir.parent}")
    else:
        yield Finding(False, what, reason, f"run `sglang-dflash fetch {model.name}`")
        free = free_bytes(models_dir())
        if not places.writable(models_dir()):
            yield Finding(
                False,
                "disk",
                f"{models_dir()} cannot be written",
                "set SGLANG_DFLASH_CACHE to a folder that can",
            )
        elif free < model.bytes_needed:
            yield Finding(
                False,
                "disk",
                f"{free / 1e6:.0f} MB free at {models_dir()}, {model.bytes_needed / 1e6:.0f} MB needed",
                "free some space or set SGLANG_DFLASH_CACHE to a folder on another disk",
            )
    yield from drafter(model, reason is None)


def drafter(model: EmbeddedModel, target_there: bool) -> Iterator[Finding]:
    what = "drafter"
    folder = model.drafter_dir
    if not folder.is_dir():
        yield Finding(
            False, what, f"{folder} is missing", f"install {DISTRIBUTION} again: the drafter ships with it"
        )
        return
    from sglang_dflash.drafter import check_fits, read_config, read_tensors

    try:
        read_config(folder)
        read_tensors(folder)
        if target_there:
            config = json.loads((model.target_dir / "config.json").read_text())
            check_fits(folder, target=SimpleNamespace(**config), target_name=model.folder)
    except UserError as error:
        yield Finding(False, what, str(error), f"install {DISTRIBUTION} again: the drafter ships with it")
        return
    yield Finding(True, what, f"{folder.name}, fits" if target_there else folder.name)


def port(host: str, number: int) -> Iterator[Finding]:
    what = f"port {number}"
    if port_is_free(host, number):
        yield Finding(True, what, "free")
        return
    try:
        info = read_server_info(f"http://{host}:{number}", timeout=5.0)
    except KeyRefusedError as error:
        yield Finding(True, what, f"a server listens there: {error}")
        return
    except UserError:
        yield Finding(
            False, what, f"in use on {host}, not by SGLang", "stop what listens there or pass --port"
        )
        return
    yield Finding(True, what, f"an SGLang server ({info.model_path}) listens there")


def running_server(url: str, api_key: str | None = None) -> Iterator[Finding]:
    """What a running server says that it is doing."""
    info = read_server_info(url, api_key=api_key)
    yield Finding(True, "server", f"SGLang {info.version}, {info.model_path}, device {info.device}")
    marker = info.marker
    if marker is not None and marker.mode != "tree":
        reason = f", because trees do not serve {marker.reason}" if marker.reason else ""
        yield Finding(
            False,
            "decoding",
            f"{marker.mode}: {marker.worker}{reason}",
            f"for draft trees {marker.way_out or 'unset SGLANG_DFLASH_MODE'}",
        )
        return
    if info.speculative_algorithm is None:
        yield Finding(
            False,
            "decoding",
            "plain: no speculative decoding was asked for",
            "start it with --speculative-algorithm DFLASH --speculative-draft-model-path DRAFTER",
        )
        return
    if info.speculative_algorithm.upper() != "DFLASH":
        yield Finding(
            False,
            "decoding",
            f"{info.speculative_algorithm}, which is not ours",
            "use DFLASH for draft trees",
        )
        return
    if marker is None:
        yield Finding(
            False,
            "decoding",
            "DFLASH without this plugin: SGLang's built-in chain serves",
            "run `sglang-dflash doctor` without --url, in the server's own environment",
        )
        return
    extra = " ".join(f"{name}={value}" for name, value in (marker.model_extra or {}).items())
    yield Finding(True, "decoding", f"draft trees, plugin {marker.plugin} {extra}".rstrip())
    if info.accept_length is not None:
        yield Finding(
            True, "accept length", f"{info.accept_length:.2f} tokens per target pass since the start"
        )
