"""The CPU platform: SGLang's server on a machine without an accelerator.

SGLang 0.5.23 has a CPU engine of its own, which needs a separately built ``sgl_kernel``
and refuses DFLASH. This platform runs the ordinary server instead, with torch-native
allocators, our attention backend and no Triton at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import KVPoolKind, PlatformCapabilities, SRTPlatform

from sglang_dflash.platform import ATTENTION_BACKEND, DISPATCH_KEY, server_defaults
from sglang_dflash.platform.threads import pin_omp_threads

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

SUPPORTED_ALGORITHMS = frozenset({"DFLASH"})


class DFlashCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Out-of-tree platform on ``torch.device("cpu")``."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities(supports_triton=False)

    def __init__(self) -> None:
        super().__init__()
        pin_omp_threads()
        server_defaults.offer_attention_backend()

    # SGLang's device default is this value as a string: it calls `.split(":")` on it.
    def get_device(self, device_id: int = 0) -> str:
        return "cpu"

    def is_pin_memory_available(self, device: object = None) -> bool:
        return False

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        import torch

        return torch.profiler.ProfilerActivity.CPU

    def get_dispatch_key_name(self) -> str:
        return DISPATCH_KEY

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def get_default_speculative_draft_attention_backend(self, algorithm: str) -> str:
        return ATTENTION_BACKEND

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm in SUPPORTED_ALGORITHMS

    def supports_speculative_draft_attention_backend(self, algorithm: str, backend: str) -> bool:
        return backend == ATTENTION_BACKEND or server_defaults.is_interpreted(backend)

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        from sglang_dflash.platform.slots import extend_cache_locs

        return extend_cache_locs

    def get_kv_pool_cls(self, *, kind: KVPoolKind) -> type | None:
        if kind != "mha":
            return None
        from sglang_dflash.platform.kv_pool import CpuMHATokenToKVPool

        return CpuMHATokenToKVPool

    def apply_server_args_defaults(self, server_args: Any) -> None:
        server_defaults.apply(server_args)

    def init_backend(self) -> None:
        from sglang_dflash.platform.mends import apply_mends

        apply_mends()

    def post_load_model(self, model: torch.nn.Module) -> None:
        from sglang_dflash.platform.mends import mend_runner
        from sglang_dflash.platform.model_mends import mend_model

        mend_runner()
        mend_model(model)
