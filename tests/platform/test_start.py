"""When the platform is active, what it sets at start, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sglang_dflash.errors import UserError
from sglang_dflash.platform import ATTENTION_BACKEND, entry, server_defaults, threads
from sglang_dflash.platform.contracts import Contract, check
from tests.tiny import build_target

needs_cpu_only = pytest.mark.skipif(entry.has_accelerator(), reason="this machine has an accelerator")


class TestActivation:
    def test_active_without_an_accelerator(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
        monkeypatch.setattr(entry, "has_accelerator", lambda: False)
        module, _, name = (entry.activate() or "").partition(":")
        assert (module, name) == ("sglang_dflash.platform.cpu", "DFlashCpuPlatform")

    def test_inactive_beside_an_accelerator(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
        monkeypatch.setattr(entry, "has_accelerator", lambda: True)
        assert entry.activate() is None

    def test_inactive_when_sglangs_cpu_engine_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
        assert entry.activate() is None

    def test_its_own_failure_stops_the_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken() -> bool:
            raise RuntimeError("driver mismatch")

        monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
        monkeypatch.setattr(entry, "has_accelerator", broken)
        with pytest.raises(SystemExit, match="driver mismatch"):
            entry.activate()


def arguments(raw: dict[str, object], **resolved: object) -> SimpleNamespace:
    known = {"attention_backend": None, "chunked_prefill_size": None, "page_size": None}
    return SimpleNamespace(**known | resolved, _raw_input=raw)


class TestDefaults:
    @pytest.mark.parametrize(
        ("raw", "resolved", "page", "chunk"),
        [
            (None, None, None, 256),
            (None, 8192, 1, 256),
            (None, 4096, 48, 240),
            (None, 4096, 512, 512),
            (None, -1, 16, -1),
            (None, 128, 1, 128),
            (8192, 8192, 1, 8192),
        ],
    )
    def test_a_prefill_chunk_takes_seconds(
        self, raw: int | None, resolved: int | None, page: int | None, chunk: int
    ) -> None:
        args = arguments({"chunked_prefill_size": raw}, chunked_prefill_size=resolved, page_size=page)
        server_defaults.apply(args)
        assert args.chunked_prefill_size == chunk

    def test_sglangs_choice_is_replaced(self) -> None:
        args = arguments({"attention_backend": None}, attention_backend="intel_amx")
        server_defaults.apply(args)
        assert args.attention_backend == ATTENTION_BACKEND

    def test_a_usable_choice_of_the_user_stays(self) -> None:
        raw = {"attention_backend": "torch_native"}
        args = arguments(raw, attention_backend="torch_native")
        server_defaults.apply(args)
        assert args.attention_backend == "torch_native"

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("attention_backend", "triton"),
            ("decode_attention_backend", "fa3"),
            ("kv_cache_dtype", "fp8_e4m3"),
        ],
    )
    def test_what_cannot_run_is_refused_in_one_line(self, field: str, value: str) -> None:
        args = arguments({field: value})
        with pytest.raises(SystemExit, match=value) as refusal:
            server_defaults.apply(args)
        assert "\n" not in str(refusal.value)


class TestThreads:
    @pytest.mark.parametrize(
        ("cores", "busy", "expected"),
        [(2, 0.0, 2), (2, 0.2, 2), (2, 1.0, 1), (2, 5.0, 1), (8, 3.9, 4), (1, 0.0, 1)],
    )
    def test_only_free_cores_count(self, cores: int, busy: float, expected: int) -> None:
        assert threads.free_threads(cores, busy) == expected

    def test_omp_num_threads_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        monkeypatch.setattr(threads, "busy_cores", lambda cpus: pytest.fail("sampled although it was given"))
        assert threads.pin_omp_threads() == 3

    def test_the_choice_reaches_child_processes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = torch.get_num_threads()
        monkeypatch.setenv("OMP_NUM_THREADS", "")
        monkeypatch.setattr(threads, "busy_cores", lambda cpus: 0.0)
        monkeypatch.setattr(threads, "usable_cores", lambda cpus: 2)
        try:
            assert threads.pin_omp_threads() == 2
            assert os.environ["OMP_NUM_THREADS"] == "2"
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)


class TestContracts:
    def test_the_installed_sglang_fits(self) -> None:
        from sglang_dflash.platform import mends

        replaced = (
            *(mends.ASSIGN_REQ_TO_TOKEN, mends.GET_LAST_LOC, mends.MURMUR_HASH),
            mends.SCALING_PENALTIES,
        )
        for contract in (*replaced, *mends.RELIED_ON, *mends.WEIGHT_UPDATES, mends.FORWARD_KWARGS):
            check(contract)

    @pytest.mark.parametrize(
        "contract",
        [
            Contract("json", "dumps", ("obj",)),
            Contract("json", "no_such_function"),
            Contract("no_such_module", "anything"),
        ],
    )
    def test_another_sglang_is_refused_in_one_line(self, contract: Contract) -> None:
        with pytest.raises(
            UserError, match=r"does not fit the installed SGLang .*Install sglang=="
        ) as refusal:
            check(contract)
        assert contract.path in str(refusal.value)
        assert "\n" not in str(refusal.value)


PROBE = """
    import json, os, sys
    from sglang.srt.plugins import load_plugins
    load_plugins()
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import prepare_server_args
    args = prepare_server_args(["--model-path", sys.argv[1]])
    args.resolve_once()
    view = resolving_view(args)
    import sglang.srt.model_executor.model_runner
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.mem_cache import allocation
    from sglang.srt.speculative import spec_utils
    from sglang.srt.platforms import current_platform
    import torch
    torch.zeros(1).record_stream(None)
    print("PROBE" + json.dumps({
        "platform": type(current_platform).__name__,
        "device": view.device,
        "backend": view.attention_backend,
        "overlap": not view.disable_overlap_schedule,
        "registered": "dflash_cpu" in ATTENTION_BACKENDS,
        "assign": {allocation.assign_req_to_token_pool_func.__module__,
                   spec_utils.assign_req_to_token_pool_func.__module__} == {"sglang_dflash.platform.slots"},
        "last_loc": allocation.get_last_loc.__name__,
        "pool": current_platform.get_kv_pool_cls(kind="mha").__name__,
        "cuda_initialised": torch.cuda.is_initialized(),
    }))
"""


@needs_cpu_only
def test_a_process_without_flags_is_on_the_platform_with_every_mend(tmp_path: Path) -> None:
    """With the tree plugin left out: the platform has to bring its mends itself."""
    environ = {**os.environ, "SGLANG_PLUGINS": "dflash_cpu", "OMP_NUM_THREADS": "1"}
    environ.pop("SGLANG_USE_CPU_ENGINE", None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROBE), str(build_target(tmp_path / "target"))],
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("PROBE")), None)
    assert line, done.stderr[-2000:]
    assert json.loads(line.removeprefix("PROBE")) == {
        "platform": "DFlashCpuPlatform",
        "device": "cpu",
        "backend": ATTENTION_BACKEND,
        "overlap": True,
        "registered": True,
        "assign": True,
        "last_loc": "get_last_loc_torch",
        "pool": "CpuMHATokenToKVPool",
        "cuda_initialised": False,
    }
