"""Which cases of the longest tests run by day: of some a half or a quarter, of others none. All of them run under
HYPOTHESIS_PROFILE=nightly, and when tests are asked for by name.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Sequence

HALF = (
    "tests/cli/test_bench.py::test_all_works_are_measured",
    "tests/cli/test_layouts.py::test_what_differs_is_named",
    "tests/cli/test_processes.py::test_processes_that_a_library_joined_train_once",
    "tests/cli/test_trace.py::test_backends_are_within_rounding_in_other_dtypes",
    "tests/cli/test_trace.py::test_layers_that_are_given_recorded_inputs_compute_the_same",
    "tests/cli/test_validate.py::test_a_device_that_is_not_there_is_no_difference",
    "tests/cli/test_weights.py::test_a_folder_stands_for_its_config_and_its_weights",
    "tests/cli/test_weights.py::test_show_and_validate_take_a_folder",
    "tests/cli/test_weights.py::test_vision_language_models_and_runs_are_traced",
    "tests/config/test_jsonl.py::test_ids_are_those_of_transformers_and_only_the_assistant_is_learned",
    "tests/config/test_parts.py::test_a_part_is_held_to_its_own_limit",
    "tests/interchange/test_family.py::test_a_config_of_a_family_goes_there_and_back",
    "tests/interchange/test_family_models.py::test_a_model_of_theirs_is_the_same_function_here",
    "tests/interchange/test_huggingface.py::test_settings_are_read_as_transformers_reads_them",
    "tests/jax/test_casts.py::test_masters_are_cast_once_for_all_micro_batches",
    "tests/jax/test_generate.py::test_steps_taken_together_draw_the_same",
    "tests/jax/test_scan.py::test_layers_of_one_structure_share_a_program",
    "tests/jax/test_training.py::TestStep::test_steps_are_those_of_the_specification",
    "tests/jax/test_vlm.py::test_bfloat16_models_keep_their_routers_wide",
    "tests/parity/test_capacity.py::test_generation_rewrites_no_module",
    "tests/parity/test_capacity.py::test_the_sequence_wise_loss_does_not_depend_on_how_a_batch_is_cut",
    "tests/parity/test_capacity.py::test_the_unit_of_counts_is_the_micro_batch",
    "tests/parity/test_capacity.py::test_what_is_recorded_of_decoding_has_the_delta_of_its_forward",
    "tests/parity/test_counts.py::test_bytes_of_caches_are_those_that_generation_makes",
    "tests/parity/test_counts.py::test_flops_are_those_of_the_operators_that_run_in_torch",
    "tests/parity/test_counts.py::test_memory_is_that_of_a_trainer_in_torch",
    "tests/parity/test_decode.py::test_a_row_does_not_depend_on_its_neighbours",
    "tests/parity/test_documented_calls.py::test_a_block_gives_a_tensor_and_run_its_stats_too",
    "tests/parity/test_documented_calls.py::test_experts_of_a_modality_see_its_tokens_alone",
    "tests/parity/test_extending.py::test_models_with_an_addition_agree",
    "tests/parity/test_fact_mutants.py::test_a_wrong_fact_is_seen",
    "tests/parity/test_false_alarms.py::test_a_bug_in_a_part_of_a_tensor_is_found",
    "tests/parity/test_fp8.py::test_fp8_is_as_the_contract_says",
    "tests/parity/test_generate.py::test_a_single_token_may_follow_an_image_and_be_streamed",
    "tests/parity/test_generate.py::test_caches_give_the_full_forward_whatever_is_appended_and_forgotten",
    "tests/parity/test_held_states.py::test_before_any_call_counts_and_losses_are_of_the_types_they_will_have",
    "tests/parity/test_held_states.py::test_dead_experts_are_counted_over_routers_and_micro_batches",
    "tests/parity/test_kernels.py::test_other_choices_are_found",
    "tests/parity/test_length_mutants.py::test_every_mutant_is_killed",
    "tests/parity/test_lengths.py::test_600_positions_of_text",
    "tests/parity/test_lengths.py::test_600_positions_of_text_and_image",
    "tests/parity/test_lengths.py::test_positions_and_vocabularies",
    "tests/parity/test_loading.py::test_weights_that_are_given_are_not_drawn_first",
    "tests/parity/test_model.py::test_any_input_gives_the_same_in_float64",
    "tests/parity/test_moe.py::test_bias_after_twenty_steps",
    "tests/parity/test_moe.py::test_layers_are_the_same_function_in_float64",
    "tests/parity/test_moe.py::test_rounding_of_models_with_replayed_routes",
    "tests/parity/test_moe.py::test_rounding_stays_within_what_the_weights_rounding_does",
    "tests/parity/test_names.py::test_the_type_of_integers_makes_no_difference",
    "tests/parity/test_names.py::test_what_names_nothing_is_nan_where_values_cannot_be_seen",
    "tests/parity/test_no_pairs.py::test_jax_programs_have_none",
    "tests/parity/test_nonfinite.py::test_a_skipped_update_changes_nothing_but_the_step",
    "tests/parity/test_nonfinite.py::test_an_update_to_weights_that_are_not_finite_is_skipped",
    "tests/parity/test_nonfinite.py::test_skipped_updates_are_counted_and_limited_through_a_resume",
    "tests/parity/test_precision.py::test_decoding_is_as_exact",
    "tests/parity/test_precision.py::test_narrow_operations_are_those_that_may_be",
    "tests/parity/test_precision.py::test_what_is_planted_is_found",
    "tests/parity/test_registration.py::test_a_router_balances_its_own_buffer",
    "tests/parity/test_results.py::test_every_level_gives_one_type",
    "tests/parity/test_semantics.py::test_the_dtype_of_the_weights_is_that_of_logits_and_gradients",
    "tests/parity/test_stages.py::test_two_stages_are_the_whole_model",
    "tests/parity/test_standalone.py::test_a_cache_is_told_of_documents_and_padding_of_modalities",
    "tests/parity/test_statistics.py::test_moments_by_the_kernel_of_jax",
    "tests/parity/test_training.py::test_float64_steps_are_the_same",
    "tests/parity/test_vlm_modules.py::test_adapters",
    "tests/parity/test_vlm_modules.py::test_cross_attention",
    "tests/parity/test_vlm_modules.py::test_towers",
    "tests/parity/test_vlm_properties.py::test_absent_frames_change_nothing_beyond_the_ends_of_what_positions_count",
    "tests/parity/test_vlm_training.py::test_a_state_goes_on_in_the_other_backend",
    "tests/parity/test_vlm_training.py::test_micro_batches_have_noise_of_their_own",
    "tests/torch/test_model.py::test_compiles_without_graph_breaks",
    "tests/torch/test_moe.py::test_compiled_model_is_the_same_function",
    "tests/torch/test_moe.py::test_models_that_differ_in_every_number_compile_after_each_other",
    "tests/torch/test_moe.py::test_one_graph_without_breaks",
    "tests/torch/test_training.py::TestLoss::test_the_fused_kernel_is_the_same_sum",
    "tests/torch/test_vlm.py::test_compiles_block_by_block",
)
QUARTER = (
    "tests/cli/test_full.py::test_bugs_of_a_layout_are_named",
    "tests/cli/test_full.py::test_each_row_names_the_bugs_that_reach_it",
    "tests/cli/test_signals.py::test_an_interrupt_at_any_time_is_no_traceback",
    "tests/cli/test_signals.py::test_an_interrupt_of_any_import_is_no_traceback",
    "tests/distributed/test_torch_operations.py::test_moments_of_one_rank_that_would_overflow_let_none_take_the_update",
    "tests/jax/test_export.py::test_forward_and_gradient_export_for_every_platform",
    "tests/jax/test_moe.py::test_scan_and_remat_change_nothing",
    "tests/jax/test_scan.py::test_presets_that_ask_for_scans_get_them",
    "tests/jax/test_vlm.py::test_abstract_models_are_initialised_throughout",
    "tests/jax/test_vlm.py::test_one_jit_serves_every_layout",
    "tests/jax/test_vlm.py::test_scan_and_remat_are_the_same_function",
    "tests/jax/test_wrappers.py::test_wrapped_models_do_what_plain_ones_do",
    "tests/parity/test_capacity.py::test_a_correct_model_decodes_as_its_forward_whatever_its_capacity",
    "tests/parity/test_capacity.py::test_a_modality_does_not_depend_on_how_many_tokens_the_other_has",
    "tests/parity/test_decode.py::test_any_chunking_is_the_full_forward_and_the_oracle",
    "tests/parity/test_decode.py::test_rows_of_unequal_prompts_decode_as_each_alone",
    "tests/parity/test_depth.py::test_deep_architectures",
    "tests/parity/test_differences.py::test_differences_are_what_they_are_said_to_be",
    "tests/parity/test_documented_calls.py::test_strategies_prepare_pixels_for_the_transformer",
    "tests/parity/test_foreign_weights.py::test_weights_load_by_name_and_mean_the_same",
    "tests/parity/test_frames.py::test_absent_frames_are_masked_where_they_stand",
    "tests/parity/test_generate.py::test_a_row_does_not_depend_on_its_neighbours",
    "tests/parity/test_generate.py::test_images_are_seen_as_in_the_full_forward",
    "tests/parity/test_int8.py::test_int8_is_as_the_contract_says",
    "tests/parity/test_layer_bugs.py::test_a_wrong_layer_is_named_first_and_alone",
    "tests/parity/test_lengths.py::test_sizes_around_the_edges_of_tiles",
    "tests/parity/test_model.py::test_rounding_stays_within_what_the_weights_rounding_does",
    "tests/parity/test_mutants.py::test_unchanged_backends_pass",
    "tests/parity/test_names.py::test_what_names_nothing_is_refused_wherever_it_is_given",
    "tests/parity/test_padding.py::test_a_row_does_not_depend_on_the_padding_of_its_neighbours",
    "tests/parity/test_padding.py::test_representations_do_not_depend_on_padding",
    "tests/parity/test_padding.py::test_the_content_of_padding_never_matters",
    "tests/parity/test_registration.py::test_a_training_step_is_the_same_step",
    "tests/parity/test_registration.py::test_functions_and_gradients_agree",
    "tests/parity/test_results.py::test_run_keeps_nothing_and_a_documented_call_what_getters_show",
    "tests/parity/test_states.py::test_forward_and_gradients",
    "tests/parity/test_trainer_states.py::test_both_trainers_do_the_same",
    "tests/parity/test_vlm.py::test_drawn_clips",
    "tests/parity/test_vlm.py::test_models",
    "tests/parity/test_vlm.py::test_streams_of_any_order",
    "tests/parity/test_vlm_properties.py::test_any_accepted_config_runs_and_depends_on_its_image",
    "tests/parity/test_vlm_properties.py::test_cached_text_after_an_image_equals_the_full_forward",
    "tests/parity/test_vlm_training.py::test_both_trainers_take_the_same_steps",
    "tests/torch/test_function_fields.py::test_fields_that_count_as_another_function_change_it",
    "tests/torch/test_function_fields.py::test_fields_that_count_as_the_same_function_keep_it",
    "tests/torch/test_vlm.py::test_compiles_without_graph_breaks",
)
NIGHT = (
    "tests/cli/test_planted.py::test_gradients_of_jax_and_the_forward_of_torch",
    "tests/cli/test_planted.py::test_groups_that_nothing_else_depends_on",
    "tests/cli/test_train_images.py::test_validate",
    "tests/distributed/test_health.py::test_processes_of_torch_name_the_device_that_fails",
    "tests/jax/test_model.py::test_any_chunking_through_a_cache_is_the_full_forward",
    "tests/jax/test_model.py::test_ragged_prompts_decode_as_each_row_alone",
    "tests/jax/test_training.py::TestRun::test_killed_runs_end_in_the_same_bits",
    "tests/jax/test_training.py::TestStep::test_scanned_and_recomputed_layers_change_nothing",
    "tests/mutation/test_mutation.py::test_a_failed_assertion_and_a_crash_kill_and_are_told_apart",
    "tests/parity/test_precision.py::test_rows_are_a_few_roundings_from_float64",
    "tests/parity/test_vlm_training.py::test_bfloat16_and_less_memory",
    "tests/parity/test_vlm_training.py::test_both_trainers_agree_on_clips_and_experts",
    "tests/parity/test_vlm_training.py::test_captions_are_learned_from_images",
    "tests/test_array_types.py::test_calls_take_and_give_what_signatures_say",
    "tests/torch/test_function_fields.py::test_capacity_and_noise_of_training_keep_the_function_that_decoding_computes",
    "tests/torch/test_function_fields.py::test_fields_that_count_as_another_function_change_it_somewhere",
    "tests/torch/test_generate.py::test_a_process_may_decode_for_any_number_of_rows",
)
"""Without parameters, so that they would run as a whole."""

SHARES = dict.fromkeys(HALF, 2) | dict.fromkeys(QUARTER, 4) | dict.fromkeys(NIGHT, math.inf)


def stale(names: Sequence[str]) -> list[str]:
    """Tests that are listed here and are not among those that there are."""
    return sorted(set(SHARES) - {test_of(name) for name in names})


def by_day(names: Sequence[str]) -> set[str]:
    """Of each test the cases that come first by a hash of their names, which tells neighbours apart."""
    cases = defaultdict(list)
    for name in names:
        cases[test_of(name)].append(name)
    return {name for test, own in cases.items() for name in _first(own, SHARES.get(test, 1))}


def test_of(name: str) -> str:
    """A case's test."""
    return name.partition("[")[0]


def _first(cases: Sequence[str], share: float) -> Sequence[str]:
    return sorted(cases, key=lambda name: zlib.crc32(name.encode()))[: math.ceil(len(cases) / share)]
