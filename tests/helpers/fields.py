"""Which test shows that a setting reaches what it configures: one entry for each field, and `make mutate` tries them.

`python tests/mutation/forget.py` makes each field in turn always read as its default: the named test must fail.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator

from biroute.configs.cluster_profile import ClusterProfile
from biroute.configs.schema import RunConfig
from biroute.configs.section import Section

MODEL = "distributed/model/test_fields.py::"
ENGINE = "distributed/parallel/engine/test_settings.py::"
RUN = "system/test_settings.py::test_settings_of_a_run"
RENDEZVOUS = "distributed/launcher/ranks/test_rendezvous.py::"
ERRORS = "system/test_cli_errors.py::test_bad_value"
SOURCE_FILES = "unit/data_pipeline/prepare/test_source_files.py::"
SOURCES = "unit/data_pipeline/prepare/test_sources.py::"
BUILD = "unit/data_pipeline/prepare/test_build.py::"
BUILD_AGAIN = "unit/data_pipeline/prepare/test_build_again.py::"
TOKENIZER = "unit/data_pipeline/prepare/test_tokenizer.py::"
LOADER = "unit/data_pipeline/read/test_loader.py::"
SUBMIT = "unit/slurm/test_submit.py::test_a_request_is_what_the_configuration_says"
JOURNAL = "unit/launcher/attempts/test_journal.py::test_what_the_batch_script_calls"
ROUTE = "unit/model/attention/test_core.py::"
EXCHANGE = "distributed/launcher/bench/test_exchange.py::"
MOVES = "system/test_tracking_moves.py::test_what_people_see_of_a_run"
SCRIPT = "unit/slurm/test_script.py::"

# Field -> the test, below tests/.
SHOWN_BY: dict[str, str] = {
    **{
        f"model.{name}": f"{MODEL}test_a_size_is_that_of_the_weights[{name}]"
        for name in (
            "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_size", "ffn_hidden_size",
            "vocab_multiple", "qk_norm", "tied_embeddings", "key_smear",
        )
    },
    **{
        f"model.{name}": f"{MODEL}test_a_rule_changes_the_logits[{name}]"
        for name in (
            "objective", "rope_base", "norm_epsilon", "dense_layers", "sliding_window_layers", "attention.kind",
            "attention.region_size", "attention.query_block_size", "attention.topk", "attention.descriptor",
            "attention.descriptors_per_region", "attention.force_previous", "attention.attention_sink",
            "attention.router",
        )
    },
    "model.attention.force_own": f"{ROUTE}test_every_field_reaches_the_route[force_own-mlm]",
    "model.init_std": f"{MODEL}test_weights_are_drawn_with_the_given_deviation",
    "model.sequence_length": f"{LOADER}test_causal_batches",
    "model.mask_fraction": f"{LOADER}test_masked_batches_hide_a_fixed_number_of_tokens",
    **{
        f"parallel.{name}": f"{ENGINE}test_a_layout_is_what_was_asked_for"
        for name in ("tensor", "pipeline", "region", "sequence_parallel", "zero_stage")
    },
    "parallel.data": ERRORS,
    "parallel.overlap_grad_reduce": f"{ENGINE}test_gradients_that_are_summed_beside_backward_are_the_same",
    "parallel.region_exchange": f"{EXCHANGE}test_measured_bytes_are_those_of_the_plan",
    "data.dir": LOADER.removesuffix("::"),
    "data.sources.name": f"{LOADER}test_weights_mix_the_sources",
    "data.sources.paths": f"{SOURCE_FILES}test_globs_are_sorted_and_files_come_once",
    "data.sources.weight": f"{BUILD}test_weights_share_out_the_tokenizers_sample",
    "data.sources.text_field": f"{SOURCES}test_reads_txt_and_jsonl_in_every_compression",
    "data.tokenizer.model_path": f"{BUILD_AGAIN}test_with_a_given_tokenizer_only_the_changed_source_is_redone",
    "data.tokenizer.kind": f"{TOKENIZER}test_training_is_reproducible",
    "data.tokenizer.vocab_size": f"{TOKENIZER}test_training_is_reproducible",
    "data.tokenizer.character_coverage": f"{TOKENIZER}test_character_coverage_decides_which_characters_have_a_piece",
    "data.tokenizer.training_bytes": f"{BUILD}test_weights_share_out_the_tokenizers_sample",
    "data.heldout_fraction": f"{SOURCES}test_split_depends_on_the_text_alone_and_grows_with_the_fraction",
    "data.min_document_bytes": f"{SOURCES}test_dirt_is_counted_and_never_a_crash",
    "data.max_document_bytes": f"{SOURCES}test_long_documents_are_cut_after_a_newline",
    "data.max_malformed_fraction": f"{SOURCES}test_too_many_malformed_lines_are_an_error",
    "data.max_invalid_utf8_fraction": f"{SOURCES}test_another_encoding_is_noticed_before_all_is_read",
    "data.tokens_per_sample": f"{BUILD_AGAIN}test_another_layout_keeps_the_tokenizer_and_leaves_no_stale_shard",
    "data.samples_per_shard": f"{BUILD}test_shards_are_plain_tars_without_clock_or_dots",
    "data.workers": f"{BUILD_AGAIN}test_killed_worker_is_one_clear_line",
    "data.seed": f"{LOADER}test_heldout_batches_are_the_same_whatever_the_ranks_and_seeds",
    **{
        f"optim.{name}": RUN
        for name in ("learning_rate", "min_learning_rate", "schedule", "warmup_steps", "decay_steps")
    },
    **{
        f"optim.{name}": f"{ENGINE}test_a_setting_of_adamw_arrives"
        for name in ("weight_decay", "beta1", "beta2", "epsilon", "gradient_clip")
    },
    **{
        f"optim.{name}": "distributed/parallel/engine/test_skipped.py::test_a_spike_changes_nothing"
        for name in ("spike_deviations", "spike_window")
    },
    "optim.max_skipped_steps": "system/test_divergence.py::test_a_run_without_finite_gradients_ends",
    **{
        f"train.{name}": RUN
        for name in ("run_dir", "steps", "global_batch_size", "log_every", "evaluate_every")
    },
    "train.microbatch_size": f"{ENGINE}test_blocks_are_recomputed_and_microbatches_have_their_size",
    "train.activation_checkpointing": f"{ENGINE}test_blocks_are_recomputed_and_microbatches_have_their_size",
    "train.exact_sums": (
        "unit/model/decode/test_cached_model.py::test_training_with_exact_sums_has_the_bits_of_decoding"
    ),
    "train.precision": "distributed/parallel/engine/test_precision.py::test_bf16_gradients_are_near_those_of_fp32",
    "train.seed": f"{ENGINE}test_the_seed_draws_the_weights",
    "train.device": f"{RENDEZVOUS}test_a_rank_has_the_threads_and_the_device_of_its_settings",
    "train.threads_per_rank": f"{RENDEZVOUS}test_a_rank_has_the_threads_and_the_device_of_its_settings",
    "train.accept_changes": "distributed/launcher/train/test_resuming.py::test_another_run_is_refused_or_accepted",
    "train.evaluate_sequences": f"{LOADER}test_heldout_batches_are_the_same_whatever_the_ranks_and_seeds",
    "train.hardware": "distributed/launcher/train/test_goodput.py::test_mfu_and_goodput_over_two_attempts",
    "train.route_metrics_every": "distributed/launcher/train/test_routing_health.py::test_the_field_says_when",
    "train.hang_seconds": "system/test_settings.py::test_a_start_that_takes_too_long_is_a_hang",
    "train.startup_seconds": "system/test_settings.py::test_a_start_that_takes_too_long_is_a_hang",
    "checkpoint.every_steps": RUN,
    "checkpoint.keep": RUN,
    "checkpoint.keep_every": "distributed/launcher/train/test_saving.py::test_a_save_is_tried_again",
    "tracking.enabled": "system/test_tracking_sqlite.py::test_switched_off_tracking_writes_only_into_the_run_folder",
    "tracking.uri": RUN,
    "tracking.experiment": RUN,
    "tracking.run_name": RUN,
    "tracking.tags": MOVES, "tracking.group": MOVES, "tracking.parent": MOVES,
    "tracking.timeout_seconds": "system/test_tracking_server.py::test_server_frozen",
    "tracking.flush_seconds": "system/test_tracking_server.py::test_server_frozen",
    **{
        f"slurm.{name}": SUBMIT
        for name in ("profile", "nodes", "ranks_per_node", "time_limit", "signal_seconds", "requeue")
    },
    "slurm.max_restarts": JOURNAL,
    "slurm.max_crashes_at_same_step": JOURNAL,
    "slurm.max_restarts_without_progress": JOURNAL,
    "slurm.preflight_timeout_seconds": "system/test_preflight.py::test_a_node_that_does_not_answer",
    **{
        f"profile.{name}": f"{SCRIPT}test_what_a_request_asks_for"
        for name in (
            "account", "partition", "qos", "constraint", "reservation", "gpus_per_node", "gpu_type", "cpus_per_rank",
            "memory_per_node", "exclusive", "sbatch_options", "srun_options", "setup", "venv", "environment",
            "network_interface",
        )
    },
    "profile.time_limit": f"{SCRIPT}test_yaml_reads_a_time_as_text_and_numbers_as_minutes",
    "profile.container": SUBMIT,
    "profile.python": SUBMIT,
    "profile.hardware": "unit/slurm/test_forecast.py::test_a_run_that_cannot_fit_is_refused",
}  # fmt: skip


def sections(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, type[Section], str]]:
    """(path, its section, its name) of every field below a section."""
    for name, field in section.model_fields.items():
        types = (field.annotation, *typing.get_args(field.annotation))
        inner = next((t for t in types if isinstance(t, type) and issubclass(t, Section)), None)
        if inner is None:
            yield prefix + name, section, name
        else:
            yield from sections(inner, f"{prefix}{name}.")


def all_fields() -> list[tuple[str, type[Section], str]]:
    """The fields of a run's configuration and of a cluster's profile."""
    return [*sections(), *sections(ClusterProfile, "profile.")]
