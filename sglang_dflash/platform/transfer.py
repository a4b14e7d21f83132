"""Prefill/decode disaggregation on a CPU, over Mooncake's TCP transport (``MC_FORCE_TCP=1``).

The K and V of our pools are ordinary memory, which Mooncake registers and reads as it does a GPU's. Two
places of SGLang 0.5.23's prefill side ask for a GPU all the same; both are optimisations with a way round.
"""

from __future__ import annotations

import os

from sglang_dflash.platform.contracts import Contract, check

#: Page indices in pinned memory with a CUDA event behind them (``disaggregation/prefill.py:1746``).
SENDER = Contract("sglang.srt.disaggregation.mooncake.conn", "MooncakeKVSender.send")
#: Cached pages sent ahead of the pass, with a CUDA event (``disaggregation/prefill.py:1496``).
EARLY_SEND = "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX"


def mend_transfers() -> None:
    """Send page indices and cached pages without CUDA events.

    Raises:
        UserError: when the installed SGLang is not the expected one.
    """
    from sglang.srt.runtime_context import get_context, get_disagg

    # A process that only imports SGLang's model code (a library's, a test's) has no flags at all.
    if not get_context().is_config_namespace_published("disagg"):
        return
    if get_disagg().disaggregation_mode != "prefill":
        return
    os.environ[EARLY_SEND] = "0"
    if get_disagg().disaggregation_transfer_backend == "mooncake":
        check(SENDER)
        from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

        MooncakeKVSender.supports_host_tensor_indices = False
