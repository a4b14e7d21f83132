"""What we expect of SGLang's internals: names and parameters, checked at start and in CI.

Light modules are checked in every process by ``check``; heavy ones, whose import pulls model
code, by ``check_worker`` in the scheduler and by the contract test.
"""

from __future__ import annotations

import inspect
import pkgutil

from sglang_dflash.errors import UserError

# dotted name -> parameters that must exist (a superset is fine).
LIGHT: dict[str, tuple[str, ...]] = {
    "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker": ("self", "server_args"),
    "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.is_dflash": ("self",),
    "sglang.srt.arg_groups.speculative_hook._handle_dflash": ("server_args",),
    "sglang.srt.arg_groups.speculative_hook._resolve_speculative_algorithm_alias": (
        "speculative_algorithm",
        "speculative_draft_model_path",
    ),
    "sglang.srt.arg_groups.overrides.declare_resolution": ("server_args", "source"),
    "sglang.srt.arg_groups.overrides.resolving_view": ("server_args",),
    "sglang.srt.mem_cache.allocation_sizing.get_req_to_token_extra_context_len": (),
    "sglang.srt.mem_cache.allocation_sizing.get_alloc_page_size": (),
    "sglang.srt.mem_cache.allocation_sizing.get_alloc_reserve_per_decode": (),
    "sglang.srt.mem_cache.allocation_sizing.page_aligned_decode_alloc_lens": (
        "reqs",
        "reserve",
        "page_size",
    ),
    "sglang.srt.plugins.hook_registry.HookRegistry.register": ("target", "hook", "hook_type"),
    "sglang.srt.runtime_context.publish": ("server_args", "role"),
    "sglang.srt.utils.common.set_random_seed": ("seed",),
}

# The seeded sampler (upstream/sampler.py) and the check of prompts (upstream/prompts.py), checked where they
# are installed: scheduler and front end.
_BATCH_INFO = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"
SAMPLER: dict[str, tuple[str, ...]] = {
    f"{_BATCH_INFO}.adjusted_from_schedule_batch": ("self", "batch", "vocab_size"),
    f"{_BATCH_INFO}.adjusted_merge_batch": ("self", "other"),
    f"{_BATCH_INFO}.adjusted_filter_batch": ("self", "keep_indices", "keep_indices_device"),
    f"{_BATCH_INFO}.copy_for_forward": ("self",),
    "sglang.srt.layers.sampler.Sampler._sample_from_probs": (
        *("self", "probs", "sampling_info", "positions", "simple_sampling_case"),
    ),
    "sglang.srt.layers.sampler._SamplingMaskCapture": (
        *("weights", "token_ids", "selected_weight", "batch_rows"),
    ),
}
# What else is hooked in every scheduler that the plugin serves, plain ones included.
SCHEDULER: dict[str, tuple[str, ...]] = {
    "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_extend": ("self",),
    "sglang.srt.managers.scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor._handle_finish_state_updated_req": (
        *("self", "req", "batch", "result", "i", "logits_output"),
    ),
    "sglang.srt.session.streaming_session.StreamingSession.try_cache_finished_req": ("self", "req"),
    "sglang.srt.session.session_controller.Session.create_req": ("self", "req", "tokenizer", "vocab_size"),
}
FRONT_END: dict[str, tuple[str, ...]] = {
    "sglang.srt.managers.io_struct.GenerateReqInput.__getitem__": ("self", "i"),
    "sglang.srt.managers.io_struct.GenerateReqInput.regenerate_rid": ("self",),
    "sglang.srt.managers.io_struct.GenerateReqInput._validate_inputs": ("self",),
    "sglang.srt.managers.io_struct.GenerateReqInput.contains_mm_input": ("self",),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request": (
        *("self", "obj", "input_ids"),
    ),
}

# Requests prefilled by another server (upstream/handover.py), checked on decode servers.
HANDOVER: dict[str, tuple[str, ...]] = {
    "sglang.srt.disaggregation.decode_schedule_batch_mixin."
    "ScheduleBatchDisaggregationDecodeMixin.process_prebuilt": ("self", "future_map"),
    # Hands over the last token and the length; that is all a tree's first step starts from.
    "sglang.srt.speculative.dflash_disaggregation.build_dflash_disagg_draft_input": (
        *("batch", "last_tokens_tensor", "future_map"),
    ),
}

SERVER_INFO = (
    "sglang.srt.managers.scheduler_components.internal_state."
    "SchedulerInternalStateController._add_speculative"
)
# What the parent asks SGLang of models and drafters (plugin/obstacles.py, plugin/reading.py); checked in CI.
READING: dict[str, tuple[str, ...]] = {
    "sglang.srt.arg_groups.model_override_base.model_config_of": ("server_args",),
    "sglang.srt.configs.hybrid_arch.mambaish_config": ("model_config",),
    "sglang.srt.configs.model_config.is_minimax_sparse": ("config",),
    "sglang.srt.speculative.dflash_utils.parse_dflash_draft_config": ("draft_hf_config",),
    "sglang.srt.speculative.dflash_utils.get_dflash_layer_types": ("config",),
    "sglang.srt.speculative.dflash_utils.get_dflash_attention_sliding_window_size": ("config",),
    "sglang.srt.speculative.dflash_utils.build_target_layer_ids": ("num_target_layers", "num_draft_layers"),
    "sglang.srt.utils.hf_transformers_utils.get_config": (
        *("model", "trust_remote_code", "model_override_args"),
    ),
    "sglang.srt.utils.hf_transformers_utils.get_context_length": ("config",),
    "sglang.srt.utils.hf_transformers_utils.get_hf_text_config": ("config",),
}

WORKER: dict[str, tuple[str, ...]] = {
    # The round's check of memory, where its width is chosen (worker/width).
    "sglang.srt.managers.schedule_batch.ScheduleBatch.check_decode_mem": ("self", "selected_indices"),
    SERVER_INFO: ("self", "state"),
    "sglang.srt.managers.scheduler.get_exception_traceback": (),
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2.__init__": (
        "self",
        "server_args",
        "gpu_id",
        "nccl_port",
        "target_worker",
    ),
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2.forward_batch_generation": (
        "self",
        "batch",
        "on_publish",
        "grammar_barrier",
        "pp_proxy_tensors",
    ),
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2.alloc_memory_pool": (
        "self",
        "memory_pool_config",
        "req_to_token_pool",
        "token_to_kv_pool_allocator",
    ),
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2.init_attention_backends": ("self",),
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2.init_cuda_graphs": ("self",),
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2._maybe_build_draft_sampler": ("self",),
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2._validate_phase1_sampling_support": (
        "self",
        "batch",
    ),
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2._draft_write_ids": ("self", "plan"),
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2._make_next_draft_input_decode": (
        "self",
        "bonus_tokens",
        "new_seq_lens",
    ),
    "sglang.srt.models.dflash.DFlashAttention.kv_proj_only": ("self", "hidden_states"),
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2._append_target_hidden_to_draft_kv_by_loc": (
        "self",
        "target_hidden",
        "cache_loc",
        "positions",
        "cache_loc_2d",
        "commit_lens",
    ),
    "sglang.srt.speculative.dflash_worker_v2._resolve_dflash_embedding_module": (
        "draft_model",
        "target_model",
    ),
    "sglang.srt.speculative.draft_worker_common.make_draft_block_spec_info": ("draft_token_num", "device"),
    "sglang.srt.speculative.dflash_info.DFlashVerifyInput.__init__": (
        "self",
        "draft_token",
        "positions",
        "draft_token_num",
        "custom_mask",
        "capture_hidden_mode",
        "kv_loc_plan",
        "kv_loc_cols",
    ),
    "sglang.srt.speculative.dflash_info.DFlashVerifyInput.prepare_for_verify": (
        "self",
        "batch",
        "target_worker",
    ),
    "sglang.srt.mem_cache.kv_index_translator.KVIndexTranslator.plan": (
        "self",
        "req_pool_indices",
        "seq_lens",
        "seq_lens_cpu",
        "write_virtual",
        "read_extent",
    ),
    "sglang.srt.mem_cache.kv_loc_plan.KVLocPlan.bind": ("self", "batch", "reader", "cols"),
    "sglang.srt.layers.logprob_processor.compute_spec_logprobs": (
        "batch",
        "logits_output",
        "predict",
        "accept_index",
    ),
    "sglang.srt.sampling.custom_logit_processor.CustomLogitProcessor.__call__": (
        *("self", "logits", "custom_param_list"),
    ),
    "sglang.srt.speculative.spec_tp_sync.SpecTpSync.sync": ("self", "site"),
    "sglang.srt.speculative.spec_utils.GrammarTree.from_device": (
        "retrieve_next_token",
        "retrieve_next_sibling",
        "draft_token",
    ),
    "sglang.srt.speculative.spec_utils.build_grammar_vocab_mask": (
        "reqs",
        "tree",
        "sampling_info",
        "device",
        "barrier",
    ),
    # A step's report to the host (step/report.py).
    "sglang.srt.managers.auxiliary_output.append_auxiliary_output": ("current", "output"),
    "sglang.srt.managers.utils.GenerationBatchResult.copy_auxiliary_output_to_cpu": ("self",),
    "sglang.srt.managers.scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor.consume_auxiliary_output": ("batch", "output", "output_starts"),
    "sglang.srt.sampling.penaltylib.repetition_penalty.apply_scaling_penalties": (
        "logits",
        "scaling_penalties",
    ),
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2.weight_update_runners": ("self",),
    "sglang.srt.managers.tp_worker.TpModelWorker.weight_update_runners": ("self",),
    "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater."
    "update_weights_from_disk": ("self", "model_path", "load_format"),
    "sglang.srt.model_executor.model_runner.ModelRunner._extend_forward_kwargs": (
        "self",
        "forward_batch",
        "pp_proxy_tensors",
    ),
}

# A graph per width (upstream/tiers.py), checked where graphs are captured.
TIERS: dict[str, tuple[str, ...]] = {
    "sglang.srt.model_executor.model_runner.ModelRunner._get_attention_backend": (
        "self",
        "init_new_workspace",
    ),
    "sglang.srt.model_executor.model_runner.ModelRunner._decode_cuda_graph_runner_cls": ("self",),
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.__init__": (
        *("self", "model_runner", "attn_backend", "speculative_num_draft_tokens"),
    ),
    "sglang.srt.speculative.spec_utils.draft_pp_context": (),
}

# The seam of upstream/triton_seam.py, checked where the Triton backend serves.
_TRITON = "sglang.srt.layers.attention.triton_backend.TritonAttnBackend"
TRITON: dict[str, tuple[str, ...]] = {
    f"{_TRITON}.__init__": ("self", "model_runner"),
    f"{_TRITON}.forward_extend": ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache", "sinks"),
    # The function that ours takes the place of: same arguments in the same order.
    "sglang.kernels.ops.attention.verify_splitkv.verify_splitkv_fwd": (
        *("q_extend", "k_extend", "v_extend", "o_extend", "k_buffer", "v_buffer"),
        *("qo_indptr", "kv_indptr", "kv_indices", "custom_mask", "is_causal", "mask_indptr"),
        *("max_len_extend", "k_scale", "v_scale", "sm_scale", "logit_cap", "sliding_window_size", "sinks"),
        *("window_kv_offsets", "xai_temperature_len", "max_bs"),
    ),
    # Where another backend reads prompts (plugin/start.py): what sends the verify pass to this one.
    "sglang.srt.layers.attention.hybrid_attn_backend.HybridAttnBackend.__init__": (
        *("self", "model_runner", "prefill_backend", "decode_backend"),
    ),
    "sglang.srt.layers.attention.hybrid_attn_backend.HybridAttnBackend._select_backend": (
        *("self", "forward_mode"),
    ),
}


def broken(table: dict[str, tuple[str, ...]]) -> list[str]:
    """One line per name that is gone or has lost a parameter."""
    lines = []
    for name, wanted in table.items():
        try:
            function = pkgutil.resolve_name(name)
            parameters = inspect.signature(inspect.unwrap(function)).parameters
        except (ImportError, AttributeError, ValueError) as error:
            lines.append(f"{name} is gone ({error})")
            continue
        lost = [parameter for parameter in wanted if parameter not in parameters]
        if lost:
            lines.append(f"{name} has no parameter {', '.join(lost)}")
    return lines


def _raise_if_broken(table: dict[str, tuple[str, ...]]) -> None:
    lines = broken(table)
    if lines:
        from importlib.metadata import version

        raise UserError(
            f"sglang {version('sglang')} is not the release this plugin was made for (0.5.23): {lines[0]}; "
            "install a matching sglang or uninstall sglang-dflash"
        )


def check() -> None:
    """Check the light contract. Raises UserError naming the first broken name."""
    _raise_if_broken(LIGHT)


def check_worker() -> None:
    """Check the worker's contract (imports model code). Raises UserError."""
    _raise_if_broken(WORKER)


def check_scheduler() -> None:
    """Check what is hooked in every scheduler. Raises UserError."""
    _raise_if_broken(SAMPLER | SCHEDULER)


def check_front_end() -> None:
    """Check what is hooked where requests come in. Raises UserError."""
    _raise_if_broken(FRONT_END)


def check_handover() -> None:
    """Check what a decode server of prefill/decode disaggregation hooks. Raises UserError."""
    _raise_if_broken(HANDOVER)


def check_tiers() -> None:
    """Check what a graph per width is captured with. Raises UserError."""
    _raise_if_broken(TIERS)


def check_triton() -> None:
    """Check the Triton backend's contract. Raises UserError."""
    _raise_if_broken(TRITON)
