"""Wrong facts to plant in `shared_config`, which both backends would follow alike."""

from __future__ import annotations

from typing import NamedTuple

from shared_config.contract.sharding import Layout


class FactMutant(NamedTuple):
    """One wrong fact, and the test that has to see it.

    Attributes:
        module: below `shared_config`.
        text, replacement: of its source, where ``text`` occurs once.
        test: of `tests`, "oracle.test_facts.test_name".
        arguments: of the test.
    """

    module: str
    text: str
    replacement: str
    test: str
    arguments: tuple[object, ...] = ()


PRESET = "oracle.test_facts.test_every_tensor_of_a_preset_is_as_stated"
TOWER = "oracle.test_facts.test_every_tensor_of_a_tower_is_as_stated"
ADAPTER = "oracle.test_facts.test_every_tensor_of_an_adapter_is_as_stated"
CLIP: dict[str, object] = {"class_token": True, "patch_bias": False, "pre_norm": True, "final_norm": False}
STREAM = "oracle.test_streams"
COUNTS = "parity.test_counts"
SHARDED = "contract.sharding"
FLOPS = f"{COUNTS}.test_flops_are_those_of_the_operators_that_run_in_torch"
IMAGES = "contract.flops"
IMAGE_FLOPS = "parity.test_image_flops.test_flops_are_those_of_the_operators_that_run_in_torch"
SEEN_KEYS = "parity.test_image_flops.test_what_a_mask_lets_through_is_counted"
CROSSING = ("debug_vlm_cross_attention",)
LAYOUT = f"{COUNTS}.test_memory_of_a_layout_is_that_of_its_parts"
FAMILIES = "interchange.test_families"
ABSENT = f"{FAMILIES}.test_a_family_s_keys_left_out_mean_what_they_mean_there"
ONE_BY_ONE = f"{FAMILIES}.test_a_family_s_keys_are_read_one_by_one"
FROM_FIRST = "interchange.test_huggingface_settings.test_layers_from_the_first_with_a_window_on_have_it"
THEIRS = "interchange.test_family_models.test_a_model_of_theirs_is_the_same_function_here"
PICTURES = f"{FAMILIES}.test_pictures_without_settings_have_those_of_transformers_processors"
LAYERS, VISION, NOISE, COUNTED = "contract.layers", "contract.vision", "contract.noise", "contract.counts"
FOREIGN, FAMILY = "interchange.huggingface_config", "interchange.huggingface_families"
LAYERED = "interchange.huggingface_layers"
DESCRIBED = "interchange.huggingface_description"
PIXELS = "interchange.preprocessor"
RATES, SCHEDULED = "contract.schedule", "config.test_schedule.test"
SHORT, STABLE = f"{SCHEDULED}_values_of_a_short_run", f"{SCHEDULED}_what_follows_the_stable_part"
LINEAR = [0.5, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1, 0.1]
REX = [0.5, 1.0, 1.0, 0.1 + 0.9 * 6 / 7, 0.1 + 0.9 * 2 / 3, 0.1 + 0.9 * 2 / 5, 0.1, 0.1]
DECAY = f"{SCHEDULED}_the_weight_decay_goes_from_one_value_to_another"
SHARE = f"{SCHEDULED}_the_share_of_an_average_is_that_of_squared_rates"
FALLING, BY_ROOTS = [1, 1, 0.75, 0.5, 0.25], [1, 1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5]
AVERAGES = "config.test_averaging.test_the_average_is_that_of_the_papers"
SCHEDULES = "config.test_bias_schedule.test_schedules_of_the_bias"
CAPACITY = "config.test_capacity.test_the_capacity_of_a_layer_is_exact"
ON_PAPER = "config.test_scale.test"
SENT, SCALE, KEPT = "contract.traffic", "contract.scale", "contract.activations"
GATHERS = "config.test_scale.test_tokens_are_gathered_where_few_bytes_more_are_sent"
TOKENS = "config.test_scale.test_the_tokens_of_experts_by_hand"
HELD_GRADIENTS = "cli.test_show.test_gradients_are_said_in_the_dtypes_in_which_they_are_held"
LAYER_KEEPS = "torch.test_activations.test_a_layer_keeps_what_the_model_of_costs_says"
LLAVAS = "interchange.test_llava"
IMAGE_TOKEN = "config.test_image_token"
LLAVA, LLAVA_KEYS, TOWERS = "interchange.with_images", "interchange.llava_config", "interchange.vision"
PALIGEMMA = "interchange.test_paligemma.test_a_paligemma_of_theirs_is_the_same_function_here"
SEEN = f"{LLAVAS}.test_a_llava_of_theirs_is_the_same_function_here"
FEATURES = f"{LLAVAS}.test_a_feature_layer_counts_what_goes_into_the_first_block"
FAILING = "distributed.test_health.test_those_and_only_those_that_fail_are_named"
SPEED = "config.test_speed"
LORA, BITS = "contract.lora", "parity.test_lora.test_merged_weights_have_these_bits"
MIXTURE, MIXED = "data.mixture", "config.test_mixture"
NEAR = f"{ON_PAPER}_the_link_that_a_collective_needs"

FP8, INT8 = "contract.fp8", "contract.int8"
FORMATS = "parity.test_fp8.test_formats_are_those_of_the_paper"
IN_FP8 = "parity.test_fp8.test_the_first_and_the_last_layer_stay_in_bfloat16"
NEAREST = "parity.test_int8.test_codes_are_the_nearest_multiples_of_a_127th"
HELD = "parity.test_int8.test_products_of_layers_are_held"

FACT_MUTANTS = (
    # Parameters
    FactMutant(
        LAYERS,
        'gate = matrix(config, (experts, config.dim), ("routes", "embed"))',
        'gate = replace(matrix(config, (experts, config.dim), ("routes", "embed")), initializer=Normal(1.0))',
        PRESET,
        ("debug_moe",),
    ),
    FactMutant(
        LAYERS,
        'yield name, _unit(config.qk_norm_type, (config.head_size,), ("head_dim",))',
        'yield name, _zeros((config.head_size,), ("head_dim",))',
        PRESET,
        ("qwen3_0_6b",),
    ),
    FactMutant(LAYERS, "math.sqrt(2 * config.n_layers)", "math.sqrt(config.n_layers)", PRESET, ("llama_125m",)),
    FactMutant(
        LAYERS,
        "return ParameterSpec(shape, Normal(config.init_std), axes, decay=True)",
        "return ParameterSpec(shape, Normal(config.init_std), axes)",
        PRESET,
        ("llama3_8b",),
    ),
    FactMutant(
        LAYERS, "replace(gate, full_precision=True)", "replace(gate, full_precision=False)", PRESET, ("moe_small",)
    ),
    FactMutant(LAYERS, '("expert_ema", 1.0 / experts)', '("expert_ema", 0.0)', PRESET, ("debug_moe",)),
    FactMutant(LAYERS, "ffn if config.is_moe_layer(layer) else _silent(ffn)", "ffn", PRESET, ("debug_vlm_mot",)),
    FactMutant(
        LAYERS,
        "_silent(_mlp(config.replace(mlp_bias=False), config.computed_ffn_hidden_dim))",
        "_mlp(config.replace(mlp_bias=False), config.computed_ffn_hidden_dim)",
        PRESET,
        ("debug_vlm_cross_attention",),
    ),
    FactMutant(
        LAYERS,
        'matrix(config, (hidden_dim, config.dim), ("mlp", "embed"))',
        'matrix(config, (hidden_dim, config.dim), ("embed", "mlp"))',
        PRESET,
        ("debug",),
    ),
    # Towers and adapters
    FactMutant(VISION, "POSITION_STD = 0.02", "POSITION_STD = 0.2", TOWER, ({},)),
    FactMutant(
        VISION,
        "ParameterSpec(shape, Normal(1 / math.sqrt(shape[1])), axes, decay=True)",
        "ParameterSpec(shape, Normal(1 / math.sqrt(shape[1])), axes)",
        TOWER,
        ({},),
    ),
    FactMutant(
        VISION,
        "ParameterSpec(shape[:1], Constant(0.0), axes[:1])",
        "ParameterSpec(shape[:1], Constant(0.0), axes[:1], decay=True)",
        ADAPTER,
        ("mlp_2layer", 0),
    ),
    FactMutant(VISION, "1 / math.sqrt(shape[1])", "1 / math.sqrt(shape[0])", ADAPTER, ("linear", 0)),
    FactMutant(VISION, "tower.num_patches + tower.class_token", "tower.num_patches", TOWER, (CLIP,)),
    # Streams
    FactMutant(
        "contract.initialise",
        'digest[:16], "little"',
        'digest[16:], "little"',
        f"{STREAM}.test_initial_weights_are_these_numbers",
    ),
    FactMutant(
        "contract.initialise",
        'f"{seed}:{name}"',
        'f"{name}"',
        f"{STREAM}.test_initial_weights_are_these_numbers",
    ),
    FactMutant(
        "contract.initialise",
        "dtype=np.float32)\n    return values *",
        "dtype=np.float32)\n    return -values *",
        f"{STREAM}.test_initial_weights_are_these_numbers",
    ),
    FactMutant(
        "contract.decoding",
        'f"sampling {row}"',
        '"sampling"',
        f"{STREAM}.test_sampling_draws_other_numbers_for_each_row_seed_and_step",
    ),
    FactMutant(NOISE, "0x735A2D97", "0x735A2D99", f"{STREAM}.test_noise_is_these_numbers"),
    FactMutant(
        NOISE,
        "SALTS = (0x3C6EF372, 0x1F83D9AB)",
        "SALTS = (0x3C6EF372, 0x5BE0CD19)",
        f"{STREAM}.test_noise_is_these_numbers",
    ),
    FactMutant(
        NOISE,
        "fold(fold(mix(seed & MASK), layer), group)",
        "fold(fold(mix(seed & MASK), group), layer)",
        f"{STREAM}.test_noise_is_these_numbers",
    ),
    FactMutant(
        "data.batches", "ROUNDS = 8", "ROUNDS = 6", f"{STREAM}.test_rows_of_text_come_in_the_order_of_seed_and_epoch"
    ),
    FactMutant(
        "data.batches",
        'f"train {self.seed} {epoch}"',
        'f"train {self.seed}"',
        f"{STREAM}.test_rows_of_text_come_in_the_order_of_seed_and_epoch",
    ),
    FactMutant(
        "parity.validation", "BIAS_RANGE = 0.2", "BIAS_RANGE = 0.0", f"{STREAM}.test_validation_weights_hide_nothing"
    ),
    # What is printed
    FactMutant(
        COUNTED,
        "Fraction(config.moe_top_k, config.num_experts)",
        "Fraction(config.moe_top_k + 1, config.num_experts)",
        FLOPS,
        ("debug_moe",),
    ),
    FactMutant(COUNTED, "4 * layers * config.n_heads", "4 * layers * config.kv_heads", FLOPS, ("debug",)),
    FactMutant(COUNTED, "groups = [group for group in groups if group.name != EMBEDDING]", "pass", FLOPS, ("debug",)),
    FactMutant(COUNTED, "return 3 * self.forward", "return 2 * self.forward", FLOPS, ("debug",)),
    FactMutant(
        COUNTED, "(full * (full + 1) / 2 + (seq_len - full) * full) / seq_len", "float(full)", FLOPS, ("window",)
    ),
    FactMutant(COUNTED, "if not any(part in group.name for part in others)", "", FLOPS, ("debug_vlm_moma",)),
    FactMutant(IMAGES, "half * (q + k + (q or k) + v)", "half * 4", IMAGE_FLOPS, (*CROSSING, "all but adapter")),
    FactMutant(IMAGES, "self.image_tokens if reads_image else", "", IMAGE_FLOPS, (*CROSSING, "tower")),
    FactMutant(IMAGES, "self._ahead(self.image_tokens + prompt, window)", "self._ahead(prompt, window)", SEEN_KEYS),
    FactMutant(IMAGES, "(prefix - mean_visible_keys(prefix, window))", "(prefix - 1) / 2", SEEN_KEYS),
    FactMutant(IMAGES, "job.frames_per_row if frames", "1 if frames", IMAGE_FLOPS, ("several", "nothing")),
    FactMutant(IMAGES, "every = vlm.layer_period(config)", "every = 1", IMAGE_FLOPS, (*CROSSING, "all but adapter")),
    FactMutant(IMAGES, "(1 + tensor.is_trained + reaches)", "3", IMAGE_FLOPS, ("debug_vlm_joint_decoder", "tower")),
    FactMutant(
        IMAGES, "return choice_capacity(own, choice_share(*choosing))", "return own", IMAGE_FLOPS, ("projected", "keys")
    ),
    FactMutant(
        IMAGES, 'given if "k_proj" in name or "v_proj" in name else made', "made", IMAGE_FLOPS, ("pooled", "nothing")
    ),
    FactMutant(SHARDED, '"mlp": "tp", "experts": "ep"', '"mlp": "ep", "experts": "ep"', LAYOUT, ("debug", {"tp": 2})),
    FactMutant(
        SHARDED,
        '("dp_shard", "cp") if "experts" in spec.axes',
        '("dp_shard", "ep", "cp") if "experts" in spec.axes',
        LAYOUT,
        ("debug_moe", {"dp_shard": 4, "ep": 2}),
    ),
    FactMutant(
        SHARDED,
        "return 0 if name.endswith(EMBEDDING) else pp - 1",
        "return pp - 1",
        LAYOUT,
        ("debug", {"pp": 2, "dp_shard": 1}),
    ),
    FactMutant(
        SHARDED,
        "shard // config.ep, config.ep",
        "world_size // config.ep, config.ep",
        LAYOUT,
        ("debug", {"dp_replicate": 2, "dp_shard": 1}),
    ),
    # Hugging Face
    FactMutant(
        FAMILY, '1e-5,\n            "rope_theta": 1e6', '1e-5,\n            "rope_theta": 1e4', ABSENT, ("mixtral",)
    ),
    FactMutant(FAMILY, '"rope_theta": 2e6', '"rope_theta": 1e4', ABSENT, ("smollm3",)),
    FactMutant(FAMILY, '"window_rope_theta": 5e5', '"window_rope_theta": 1e4', ABSENT, ("olmo3",)),
    FactMutant(FAMILY, '"window_rope_theta": 1e4', '"window_rope_theta": 1e6', ABSENT, ("gemma3_text",)),
    FactMutant(FAMILY, '"query_pre_attn_scalar": 256', '"query_pre_attn_scalar": 144', ABSENT, ("gemma2",)),
    FactMutant(FAMILY, '"attn_logit_softcapping": 50.0', '"attn_logit_softcapping": 30.0', ABSENT, ("gemma2",)),
    FactMutant(FAMILY, "full_every=6", "full_every=4", ABSENT, ("gemma3_text",)),
    FactMutant(FAMILY, '"norm_type": "rmsnorm_1p",\n', '"norm_type": "rmsnorm",\n', THEIRS, ("gemma2",)),
    FactMutant(FAMILY, '{"norm_type": "rmsnorm_1p", "a', '{"norm_type": "rmsnorm", "a', THEIRS, ("gemma",)),
    FactMutant(FAMILY, '"activation": "geglu_tanh"}', '"activation": "silu"}', THEIRS, ("gemma",)),
    FactMutant(FAMILY, '"num_key_value_heads": 16,\n', '"num_key_value_heads": None,\n', ABSENT, ("gemma",)),
    FactMutant(LAYERED, "[(layer + 1) % every", "[layer % every", ABSENT, ("smollm3",)),
    FactMutant(LAYERED, "SLIDING if (layer + 1) % every", "SLIDING if layer % every", ABSENT, ("olmo3",)),
    FactMutant(LAYERED, "layer >= first", "layer > first", FROM_FIRST, (2, 1, ["full", "window"])),
    FactMutant(FAMILY, '"head_dim": 128', '"head_dim": None', ABSENT, ("qwen3",)),
    FactMutant(DESCRIBED, '"rms_norm_eps": 1e-6', '"rms_norm_eps": 1e-5', ABSENT, ("llama",)),
    FactMutant(
        FAMILY,
        'defaults={"num_key_value_heads": 8, "max',
        'defaults={"num_key_value_heads": None, "max',
        ABSENT,
        ("mistral",),
    ),
    FactMutant(FAMILY, '"attention_multiplier": 1.0', '"attention_multiplier": None', ABSENT, ("granite",)),
    FactMutant(
        FAMILY, '"logits_scaling": "logit_divisor"', '"logits_scaling": "embedding_scale"', ONE_BY_ONE, ("granite",)
    ),
    FactMutant(
        FAMILY,
        '"post_attention_layernorm.",\n    "mlp.": "mlp.",\n    "mlp_post_norm.": "post_feedforward_layernorm."',
        '"post_feedforward_layernorm.",\n    "mlp.": "mlp.",\n    "mlp_post_norm.": "post_attention_layernorm."',
        THEIRS,
        ("olmo2",),
    ),
    FactMutant(FAMILY, '"rms_norm_eps": 1e-5, "sliding_window": None}', '"sliding_window": None}', ABSENT, ("phi3",)),
    FactMutant(
        "interchange.huggingface",
        "np.concatenate([host_array(name, state[name]) for name in names])",
        "np.concatenate([host_array(name, state[name]) for name in reversed(names)])",
        THEIRS,
        ("phi3",),
    ),
    FactMutant(FAMILY, '"qkv_bias": True, "num', '"qkv_bias": False, "num', ABSENT, ("qwen2_moe",)),
    FactMutant(
        FOREIGN,
        "int(number(content, experts.shared) / number(content, experts.width))",
        'int(number(content, experts.shared) / number(content, "intermediate_size"))',
        ABSENT,
        ("qwen2_moe",),
    ),
    FactMutant(DESCRIBED, '"norm_topk_prob": False', '"norm_topk_prob": True', ABSENT, ("qwen3_moe",)),
    FactMutant(DESCRIBED, '"router_aux_loss_coef": 0.001', '"router_aux_loss_coef": 0.01', ABSENT, ("mixtral",)),
    FactMutant(
        "interchange.huggingface_rope",
        'names = ("low_freq_factor", "high_freq_factor")\n        return',
        'names = ("low_freq_factor",)\n        return',
        f"{FAMILIES}.test_scalings_turn_as_they_do_there",
        ("llama", "llama3", "rope_scaling", 70.0),
    ),
    FactMutant(
        PIXELS, "((0.48145466, 0.4578275, 0.40821073)", "((0.40821073, 0.4578275, 0.48145466)", PICTURES, ("clip",)
    ),
    FactMutant(
        PIXELS,
        "PLAIN_PIXELS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))",
        "PLAIN_PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))",
        PICTURES,
        ("siglip2",),
    ),
    FactMutant(PIXELS, "BICUBIC = 3", "BICUBIC = 2", PICTURES, ("siglip2",)),
    # Rates and averages of an optimiser
    FactMutant(RATES, "peak * ((step + 1) / warmup_steps)", "peak * (step / warmup_steps)", SHORT, ("linear", LINEAR)),
    FactMutant(RATES, "if step < start:", "if step <= start + 1:", STABLE, ("linear", FALLING)),
    FactMutant(RATES, "min(warmup_steps + stable,", "min(stable,", STABLE, ("linear", FALLING)),
    FactMutant(RATES, "1.0 - math.sqrt(t)", "math.sqrt(1.0 - t)", STABLE, ("sqrt", BY_ROOTS)),
    FactMutant(RATES, "rex_alpha + rex_alpha * (1.0 - done)", "rex_alpha * (1.0 - done)", SHORT, ("rex", REX)),
    FactMutant(RATES, "share_done(step, 0, decay_steps)", "share_done(step + 1, 0, decay_steps)", DECAY),
    FactMutant(RATES, "(squares + step + 1 - warm)", "(squares + step - warm + 2)", SHARE),
    FactMutant("contract.averaging", '"d", -(1 - b1) / b1', '"d", (1 - b1) / b1', AVERAGES),
    FactMutant("contract.averaging", "Average(AVERAGE, 1.0)", "Average(AVERAGE, -1.0)", AVERAGES),
    # Rates and capacities of experts
    FactMutant("contract.bias_schedule", "(1.0 + xp.cos(", "(1.0 - xp.cos(", SCHEDULES),
    FactMutant("contract.bias_schedule", "WARMUP_SHARE = 0.1", "WARMUP_SHARE = 0.2", SCHEDULES),
    FactMutant("contract.bias_schedule", "if max_steps > 0 else 1.0", "if max_steps > 0 else 0.0", SCHEDULES),
    FactMutant(
        "contract.capacity", "max(1, -(-tokens * top_k * numerator", "max(1, (tokens * top_k * numerator", CAPACITY
    ),
    FactMutant(
        "contract.capacity", "        return None\n", "        return max(1, tokens // num_experts)\n", CAPACITY
    ),
    # Costs of layouts
    FactMutant(
        SENT,
        "ranks * (2 * blocks + rest)",
        "ranks * (blocks + rest)",
        f"{ON_PAPER}_fsdp_moves_three_times_the_parameters",
    ),
    FactMutant(
        SENT,
        "(blocks + rest) * FLOAT32",
        "(2 * blocks + rest) * FLOAT32",
        f"{ON_PAPER}_fsdp_moves_three_times_the_parameters",
    ),
    FactMutant(
        SENT,
        'ways = 2 if self.kind == "all-reduce" else 1',
        "ways = 1",
        f"{ON_PAPER}_the_bytes_of_tensor_parallelism_by_hand",
    ),
    FactMutant(
        SENT,
        'in ("heads", "kv_heads", "mlp"))',
        'in ("heads", "mlp"))',
        f"{ON_PAPER}_the_bytes_of_tensor_parallelism_by_hand",
    ),
    FactMutant(
        SENT,
        "2 * self.layers * (2 + self.again) + 2",
        "2 * self.layers * (2 + self.again)",
        f"{ON_PAPER}_the_bytes_of_sequence_parallelism_by_hand",
    ),
    FactMutant(SENT, "rows, times = tokens * model.moe_top_k", "rows, times = tokens", TOKENS),
    FactMutant(SENT, "(forward + 1) + routes * forward", "forward + routes * forward", TOKENS),
    FactMutant(SENT, "(self.summed + wide) + model.moe_top_k", "(self.summed + wide)", TOKENS),
    FactMutant(
        SENT, '("pp",), sides, sides * size)', '("pp",), 1, size)', f"{ON_PAPER}_a_pipeline_idles_as_its_paper_says"
    ),
    FactMutant(
        SCALE,
        "bubble=(layout.pp - 1) / micro_batches",
        "bubble=(layout.pp - 1) / (micro_batches + layout.pp - 1)",
        f"{ON_PAPER}_a_pipeline_idles_as_its_paper_says",
    ),
    FactMutant(
        SCALE,
        "min(layout.pp, job.train.grad_accum_steps)",
        "job.train.grad_accum_steps",
        f"{ON_PAPER}_a_pipeline_idles_as_its_paper_says",
    ),
    FactMutant(SCALE, "times = 4 if", "times = 3 if", f"{ON_PAPER}_what_recomputation_saves_and_costs", ("llama3_8b",)),
    FactMutant(
        SCALE,
        "<= hardware.node",
        "<= 8 * hardware.node",
        NEAR,
        (Layout(tp=16), ("tp",), "all-gather", 15e9 / 50e9 + 5e-6 + 14 * 2e-6),
    ),
    FactMutant(
        SCALE,
        "hardware.node // stride",
        "hardware.node",
        NEAR,
        (Layout(dp_shard=16, tp=8), ("dp_shard",), "reduce-scatter", 15e9 / 50e9 + 15 * 5e-6),
    ),
    FactMutant(
        KEPT,
        "3 * queries + 2 * keys * layout.cp",
        "2 * queries + 2 * keys * layout.cp",
        LAYER_KEEPS,
        ("grouped heads", "fp32"),
    ),
    FactMutant(KEPT, "2 if job.model.is_gated else 1", "2", LAYER_KEEPS, ("not gated", "fp32")),
    FactMutant(KEPT, "own = tokens * model.moe_top_k", "own = tokens", LAYER_KEEPS, ("experts", "bf16")),
    FactMutant(
        KEPT,
        "in products if keeps_all or outputs <= inputs",
        "in products if keeps_all or outputs < inputs",
        LAYER_KEEPS,
        ("grouped heads", "fp32"),
    ),
    FactMutant(KEPT, "own * layout.ep, model", "own, model", "config.test_scale.test_room_for_rows_of_experts_by_hand"),
    FactMutant(KEPT, "<= GATHERED_MORE", "<= 2 * GATHERED_MORE", GATHERS, (16, 1024, 2, False)),
    FactMutant(KEPT, "4 * job.model.moe_top_k * number", "4 * number", GATHERS, (8, 4096, 8, True)),
    FactMutant(
        COUNTED,
        "job.train.grad_accum_steps == 1 and",
        "True and",
        HELD_GRADIENTS,
        (("--train.mixed_precision=bf16", "--train.grad_accum_steps=2"), 1, "bfloat16 and their float32 sums"),
    ),
    FactMutant(
        COUNTED, "layout.devices > 1 or not", "not", HELD_GRADIENTS, (("--train.mixed_precision=bf16",), 2, "float32")
    ),
    FactMutant(KEPT, "own_input = int(number != FLOAT32)", "own_input = 0", LAYER_KEEPS, ("experts", "bf16")),
    FactMutant("contract.peaks", "989,", "1979,", f"{SPEED}.test_peaks_are_those_of_data_sheets"),
    FactMutant("contract.peaks", r'r"\bMIG\b"', r'r"^MIG\b"', f"{SPEED}.test_peaks_are_those_of_data_sheets"),
    FactMutant(
        "training.speed",
        "(devices.count * peak)",
        "peak",
        f"{SPEED}.test_a_share_is_told_where_the_peak_is_known",
    ),
    FactMutant(
        "training.speed",
        "peak_flops(devices.kind) if given is None else given * TERA",
        "peak_flops(devices.kind) or (given or 0) * TERA",
        f"{SPEED}.test_a_share_is_told_where_the_peak_is_known",
    ),
    FactMutant(
        "training.speed",
        "if start < step",
        "if start <= step",
        f"{SPEED}.test_a_share_of_a_model_with_images_is_of_what_is_trained_at_the_step",
    ),
    FactMutant("training.health", "set.intersection(", "set.union(", FAILING),
    FactMutant(
        KEPT,
        "neighbours = min(layout.pp - 1, 2)",
        "neighbours = 1",
        f"{ON_PAPER}_what_stages_hold_beside_their_work",
    ),
    FactMutant(
        KEPT,
        "{min(layout.pp, job.eval.steps), job.eval.steps % layout.pp}",
        "{min(layout.pp, job.eval.steps)}",
        f"{ON_PAPER}_what_stages_hold_beside_their_work",
    ),
    # Narrow numbers
    FactMutant(FP8, "448.0", "240.0", FORMATS),
    FactMutant(FP8, "57344.0, 2.0**-3", "57344.0, 2.0**-4", FORMATS),
    FactMutant(FP8, "FLOOR = 2.0**-90", "FLOOR = 2.0**-100", FORMATS),
    FactMutant(FP8, "0 < int(found[1])", "0 <= int(found[1])", IN_FP8, ("layers.{}.attention.q_proj", True)),
    FactMutant(FP8, r"mlp\.\w+\.(?:gate", r"mlp\.[\w.]+\.(?:gate", IN_FP8, ("layers.{}.mlp.experts.0.up_proj", False)),
    FactMutant(FP8, r"(?:transformer\.)?", r"(?:\w+\.)?", IN_FP8, ("vision_encoder.layers.{}.attention.q_proj", False)),
    FactMutant(FP8, "FP8_MULTIPLE == 0", "8 == 0", "parity.test_fp8.test_sizes_that_fit_are_multiples_of_16"),
    FactMutant(
        "parity.dtypes",
        "FORWARD.unit_roundoff if",
        "2.0**-3 if",
        "parity.test_fp8.test_weights_are_moved_as_far_as_they_are_rounded",
    ),
    FactMutant(INT8, "max(axis=1, keepdims=True)", "max(axis=-1, keepdims=True)", NEAREST),
    FactMutant(INT8, "np.rint(", "np.floor(", NEAREST),
    FactMutant(INT8, "LARGEST = 127", "LARGEST = 63", NEAREST),
    FactMutant(INT8, "(?:cross_attention_)?", "", HELD, ("cross_attention_layers.0.attn.o_proj.weight", True)),
    FactMutant(
        INT8, r"(?:transformer\.)?", r"(?:\w+\.)?", HELD, ("vision_encoder.layers.0.attention.q_proj.weight", False)
    ),
    FactMutant(
        MIXTURE,
        "return whole - floor_sum(count, CIRCLE, STRIDE, self.offset - end)",
        "return whole - floor_sum(count, CIRCLE, STRIDE, -end)",
        f"{MIXED}.test_the_order_is_written_in_stone",
    ),
    FactMutant(
        MIXTURE,
        "modulus - offset - 1 + factor, -sign",
        "modulus - offset + factor, -sign",
        f"{MIXED}.test_a_sum_of_floors_is_that",
    ),
    FactMutant(
        MIXTURE, "** (1 / temperature)", "** temperature", f"{MIXED}.test_sources_have_their_shares_of_any_stretch"
    ),
    FactMutant(
        MIXTURE,
        "STRIDE = 0x9E3779B97F4A7C15",
        "STRIDE = 0x9E3779B97F4A7C13",
        f"{MIXED}.test_the_order_is_written_in_stone",
    ),
    FactMutant(
        MIXTURE,
        "counts = [a + b for a, b in",
        "counts = [b for a, b in",
        f"{MIXED}.test_a_source_goes_on_where_the_phase_before_left_it",
    ),
    FactMutant(
        MIXTURE,
        "phase.from_step * self.rows_per_step",
        "phase.from_step",
        f"{MIXED}.test_phases_begin_with_their_steps",
    ),
    FactMutant(
        MIXTURE,
        "(index * self.world_size + self.rank) * self.batch_size",
        "index * self.batch_size",
        f"{MIXED}.test_ranks_together_read_what_one_reads",
    ),
    FactMutant(MIXTURE, "if point < end)", "if point <= end)", f"{MIXED}.test_a_source_of_no_weight_gives_nothing"),
    FactMutant(
        "data.stops", "default=1) - 1)", "default=1) - 2)", "config.test_stops.test_a_text_ends_before_its_first_stop"
    ),
    FactMutant(
        "data.stops", "max(complete)", "min(complete)", "config.test_stops.test_a_text_ends_before_its_first_stop"
    ),
    FactMutant(
        LLAVA,
        "{_linear_name(name, linears): array for",
        "{_linear_name(name, linears): array.T if name.startswith('linear_2') else array for",
        SEEN,
        ("clip", False),
    ),
    FactMutant(LLAVA, 'STRATEGY: "default" if', 'STRATEGY: "full" if', SEEN, ("clip", False)),
    FactMutant(LLAVA, '{**vlm, "prefix_lm": True} if', "vlm if", PALIGEMMA, ("gemma",)),
    FactMutant(
        TOWERS,
        "_tower_from(file, paligemma_tower(fields), kind)",
        "dataclasses.replace(_tower_from(file, paligemma_tower(fields), kind), final_norm=False)",
        PALIGEMMA,
        ("gemma",),
    ),
    FactMutant(LLAVA_KEYS, "n_layers + 1 + index", "n_layers + index", FEATURES, (-2,)),
    FactMutant(LLAVA_KEYS, "index if index >= 0", "index + 1 if index >= 0", FEATURES, (2,)),
    FactMutant(TOWERS, '== "full"', '== "default"', SEEN, ("clip", False)),
    FactMutant(TOWERS, "final_norm=False, keep", "final_norm=tower.final_norm, keep", SEEN, ("siglip2", False)),
    FactMutant(
        "parity.validation",
        "ids + (ids >= image_token)",
        "ids + (ids > image_token)",
        f"{IMAGE_TOKEN}.test_drawn_text_is_uniform_over_what_text_may_hold",
    ),
    FactMutant(
        "contract.image_token",
        "[place - index for index, place in enumerate(found)]",
        "[place - index + 1 for index, place in enumerate(found)]",
        f"{IMAGE_TOKEN}.test_ids_say_where_images_are",
    ),
    FactMutant(LORA, "+ lora.scale * sum_OI", "+ sum_OI", BITS),
    FactMutant(LORA, "+ lora.scale * sum_OI", "+ 2 * lora.scale * sum_OI", BITS),
    FactMutant(LORA, "np.zeros(weight_OI.shape, np.float64)", "np.zeros(weight_OI.shape, np.float32)", BITS),
    FactMutant(LORA, "if not is_adapter(name)}", "}", BITS),
    FactMutant(LORA, "lora is None or is_adapter(name)", "True", "parity.test_lora.test_adapters_alone_are_trained"),
    FactMutant(
        LORA,
        "if not is_adapter(name)) if any",
        "if is_adapter(name)) if any",
        "parity.test_lora_images.test_all_that_is_beside_adapters_is_frozen",
    ),
    FactMutant(
        LORA, "1 / math.sqrt(inputs)", "1 / math.sqrt(rank)", "parity.test_lora.test_targets_name_maps_of_layers"
    ),
)
