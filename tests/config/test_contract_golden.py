"""Every tensor, count, layout and refusal of small models of each kind, and the numbers that both backends draw."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from shared_config.contract.capacity import capacity_share, choice_capacity, choice_share, token_capacities
from shared_config.contract.counts import (
    count_active_parameters,
    count_parameters,
    flops_per_token,
    kv_cache_bytes,
    mean_visible_keys,
    training_memory,
)
from shared_config.contract.decoding import (
    SamplingConfig,
    bucket,
    cache_length,
    check_architecture,
    check_integer,
    check_request,
    check_uniforms,
    draw_uniforms,
    prefill_chunks,
    read_prompts,
    read_stops,
)
from shared_config.contract.freeze import (
    canonical_freeze_meta,
    effective_freeze,
    frozen_names,
    moments_under,
    never_trained,
)
from shared_config.contract.function import differences, function_of
from shared_config.contract.image_places import check_images
from shared_config.contract.initialise import initial_value, state_hash, stream
from shared_config.contract.mixing import splitmix
from shared_config.contract.noise import fold as fold_hash
from shared_config.contract.noise import (
    gumbel_noise,
    image_digests,
    image_noise,
    mix,
    pixel_levels,
    routing_bits,
    uniforms,
)
from shared_config.contract.parameters import aliases, layer_groups, parameter_groups, parameter_table
from shared_config.contract.rope import attention_factor, inverse_frequencies, rope_tables
from shared_config.contract.schedule import KINDS, learning_rate, scheduled_learning_rate
from shared_config.contract.sharding import Layout, elements_held, placement, refusals, stage_layers
from shared_config.contract.specs import Constant, ParameterSpec, check_names, fold
from shared_config.contract.vision import TowerConfig, adapter_table, job_table, tower_table
from shared_config.contract.warm_start import text_source, warm_start_state, without_warm_start
from shared_config.interchange.vision import tower_of
from shared_config.loader import load_config
from shared_config.schema import AdapterConfig, RopeScaling
from shared_config.schema.freeze import FreezeSpec, FreezeStage
from shared_config.schema.job import JobConfig
from tests.config.test_validation_golden import CONFIGS, SMALL, flags, refused
from tests.golden import check_golden

WIDE = "model.n_layers=3 model.head_dim=10 model.qk_norm=true model.activation=relu"
TIED = "model.tie_embeddings=true model.norm_type=layernorm model.activation=gelu"
PACKED = "model.n_layers=7 model.moe_frequency=3 model.moe_packed_experts=true"
SHARED = "model.n_layers=4 model.moe_frequency=2 model.moe_shared_experts=2 model.moe_router=sigmoid_topk"
CROSSED = "model.n_layers=4 vlm.cross_attention_every_n_layers=2"
MIXED = "model.num_experts=4 model.moe_top_k=2 model.qk_norm=true model.n_layers=2 model.moe_frequency=2"
MORE: dict[str, JobConfig] = {
    name: load_config(preset, SMALL + flags(text))
    for name, preset, text in (
        ("wide", "debug", WIDE),
        ("tied", "debug", TIED),
        ("packed", "debug_moe", PACKED),
        ("shared", "debug_moe", f"{SHARED} model.attention_bias=true"),
        ("crossed", "debug_vlm_cross_attention", CROSSED),
        ("mot moe", "debug_vlm_mot", MIXED),
    )
}
EVERY = {**CONFIGS, **MORE}


def digest(array: Any) -> str:
    array = np.ascontiguousarray(array)
    return f"{array.dtype}{list(np.shape(array))}:{hashlib.sha256(array.tobytes()).hexdigest()[:10]}"


def written(name: str, lines: Sequence[str]) -> None:
    check_golden(name, "\n".join(lines) + "\n")


def spec_said(spec: ParameterSpec) -> str:
    marks = [name for name in ("is_buffer", "full_precision", "decay", "residual") if getattr(spec, name)]
    init = spec.initializer
    value = f"={init.value:.6g}" if isinstance(init, Constant) else f"~{init.std:.6g}"
    return f"{spec.shape} {value} {' '.join(map(str, spec.axes))} {' '.join(marks)}"


def test_tensors() -> None:
    lines = []
    for name, config in EVERY.items():
        lines.append(f"{name} {len(parameter_table(config.model, config.vlm))} {aliases(config.model)}")
        lines += [
            f"  {group.name} x{group.copies} {spec_said(group.spec)}"
            for group in parameter_groups(config.model, config.vlm)
        ]
        lines.append(f"  {list(parameter_table(config.model, config.vlm))[:: max(1, config.model.n_layers)]}")
        lines += [f"  layer {layer[0].name} {len(layer)}" for layer in layer_groups(config.model, config.vlm)]
        if config.vlm is not None:
            table = job_table(config, tower_of(config))
            outside = [key for key in table if not key.startswith("transformer.")]
            lines += [f"  {key} {spec_said(table[key])}" for key in outside if "layers.0.mlp" not in key]
    clip = TowerConfig(
        28, 7, 6, 1, 2, 10, "quick_gelu", 1e-5, class_token=True, patch_bias=False, pre_norm=True, final_norm=False
    )
    lines += [f"{name} {spec_said(spec)}" for name, spec in tower_table(clip).items()]
    for kind in ("mlp_2layer", "linear", "avgpool", "attentional_pool"):
        for hidden in (0, 9):
            table = adapter_table(AdapterConfig(type=kind, hidden_dim=hidden), 6, 8)
            lines += [f"{kind} {hidden} {name} {spec_said(spec)}" for name, spec in table.items()]
    lines += [fold(numbers) for numbers in (range(1), range(5, 6), range(2), range(3), range(1, 9, 3), range(2, 9, 4))]
    written("tensors.txt", lines)


def test_counts() -> None:
    lines = []
    for name, config in EVERY.items():
        model, vlm = config.model, config.vlm
        lines.append(f"{name} {count_parameters(model, vlm)} {count_active_parameters(model, vlm)}")
        lines += [str(flops_per_token(model, length, vlm)) for length in (1, 7, 128)]
        flops = flops_per_token(model, 7, vlm)
        lines.append(f"  {flops.forward} {flops.training}")
        lines.append(
            f"  {[kv_cache_bytes(model, 2, length, vlm=vlm, spare=3) for length in (1, 42, 43, 44, 99)]} "
            f"{kv_cache_bytes(model, 3, 5, 4, vlm)}"
        )
        for precision, layout in itertools.product(
            ("fp32", "bf16"), ("dp_shard=1", "dp_shard=2", "dp_shard=2 tp=2", "cp=2", "pp=2")
        ):
            if layout == "pp=2" and (vlm is not None or model.n_layers < 2 or model.tie_embeddings):
                continue
            sizes = {word.split("=")[0]: int(word.split("=")[1]) for word in layout.split()}
            changed = config.replace(
                train=config.train.replace(mixed_precision=precision),
                distributed=config.distributed.replace(**sizes),
            )
            devices = int(np.prod(list(sizes.values())))
            memory = training_memory(changed, devices)
            lines.append(f"  {precision} {layout} {dataclasses.astuple(memory)} {memory.total}")
    lines += [
        f"{length} {window} {mean_visible_keys(length, window):.10g}"
        for length in (1, 2, 9)
        for window in (None, 1, 2, 8, 9, 10)
    ]
    written("counts.txt", lines)


def test_layouts() -> None:
    lines = []
    layouts = [Layout(), Layout(tp=2), Layout(dp_shard=2), Layout(dp_shard=3, ep=2), Layout(2, 2, 2, 2, 2, 2)]
    for name in ("packed", "text", "experts"):
        config = EVERY[name]
        specs = [(group.spec, group.copies) for group in parameter_groups(config.model, config.vlm)]
        for layout in layouts:
            held = [elements_held(specs, layout, gathered=gathered) for gathered in (False, True)]
            lines.append(f"{name} {layout} {layout.devices} {layout.data_ranks} {held}")
            for group in list(parameter_groups(config.model, config.vlm))[:40]:
                whole, part = placement(group.spec, layout), placement(group.spec, layout, gathered=True)
                if any(whole.splits):
                    lines.append(
                        f"  {group.name} {whole.splits} {part.splits} {whole.largest_part(group.spec.shape, layout)}"
                    )
    lines += [f"{layers} {stages} {stage_layers(layers, stages)}" for layers in (1, 4, 7, 9) for stages in (1, 2, 3, 4)]
    for name, config in EVERY.items():
        for layout in ("tp=2", "tp=3", "pp=2", "dp_shard=4 ep=2", "pp=2 tp=2", "cp=2", "cp=3"):
            sizes = {word.split("=")[0]: int(word.split("=")[1]) for word in layout.split()}
            spread = config.replace(distributed=config.distributed.replace(**sizes))
            lines += [f"{name} {layout}: {line}" for line in refusals(spread)]
    written("layouts.txt", lines)


def test_drawn_numbers() -> None:
    lines = []
    values = np.array([0, 1, 2**31, 2**32 - 1, 12345], np.uint64)
    lines += [
        str(splitmix(values).tolist()),
        str(mix(values.astype(np.uint32)).tolist()),
        str(fold_hash(values, 7).tolist()),
    ]
    pixels = np.array(
        [[-1.0, 1.0, 0.5, np.nan], [300.0, -300.0, np.inf, 0.00001], [0.004, -0.004, 257.0, -257.1]], np.float32
    )
    lines += [
        str(pixel_levels(pixels).astype(np.int32).tolist()),
        str([part.tolist() for part in image_digests(pixels)]),
    ]
    for dtype in (np.float32, np.float64, np.float16):
        noise = image_noise(pixels.astype(dtype), 2, 3, seed=2**32 + 5)
        lines.append(f"{noise.dtype} {noise.tolist()} {digest(image_noise(pixels[2:].astype(dtype), 40, 9))}")
    lines += [str(routing_bits(2**33 + 1, 2, 1, 3, 2).tolist()), str(np.round(gumbel_noise(1, 2, 0, 3, 4), 9).tolist())]
    lines.append(str(uniforms(np.array([0, 511, 512, 2**32 - 1], np.uint32)).tolist()))
    spec = ParameterSpec(
        (3, 2),
        MORE["wide"].model and parameter_table(MORE["wide"].model)["layers.0.mlp.up_proj.weight"].initializer,
        (None, None),
    )
    lines += [str(initial_value("a", spec, seed).tolist()) for seed in (0, 1)] + [
        str(stream(3, "x").integers(0, 99, 5).tolist())
    ]
    lines.append(str(initial_value("a", ParameterSpec((2,), Constant(0.5), (None,)), 0).tolist()))
    state = {"b": np.ones((2, 3), np.float32), "a": np.zeros(0), "c": np.arange(4).reshape(2, 2).T}
    lines += [
        state_hash(state),
        state_hash(dict(reversed(state.items()))),
        state_hash({"b": np.ones((3, 2), np.float32)}),
    ]
    written("drawn.txt", lines)


SCALINGS = {
    "none": RopeScaling(),
    "linear": RopeScaling(type="linear", factor=4.0),
    "llama3": RopeScaling(
        type="llama3", factor=8.0, original_max_seq_len=64, low_freq_factor=1.0, high_freq_factor=4.0
    ),
    "yarn": RopeScaling(type="yarn", factor=4.0, original_max_seq_len=64, beta_fast=4.0, beta_slow=1.0),
    "yarn wide": RopeScaling(type="yarn", factor=2.0, original_max_seq_len=4096),
    "yarn own": RopeScaling(type="yarn", factor=4.0, original_max_seq_len=8, attention_factor=1.25),
}


def test_rotations_and_rates() -> None:
    lines = []
    for name, scaling in SCALINGS.items():
        for dim, theta in ((8, 10000.0), (2, 500.0), (12, 100.0)):
            cos, sin = rope_tables(dim, 5, theta, scaling)
            lines.append(
                f"{name} {dim} {[f'{x:.9g}' for x in inverse_frequencies(dim, theta, scaling)]} {cos.shape} "
                f"{attention_factor(scaling):.9g} {cos[3].sum():.9g} {sin[4].sum():.9g} {sin.dtype}"
            )
    lines += [refused(lambda size=size: rope_tables(size, 4)) for size in (0, 1, 3, -2)]
    assert rope_tables(2, 4)[0].shape == (4, 1)
    for kind in KINDS:
        for warmup, decay, ratio in ((0, 4, 0.0), (3, 7, 0.25), (4, 4, 0.5), (5, 2, 0.1)):
            rates = [
                learning_rate(step, peak=2.0, warmup_steps=warmup, decay_steps=decay, min_ratio=ratio, kind=kind)
                for step in range(9)
            ]
            lines.append(f"{kind} {warmup} {decay} {ratio} {[f'{rate:.9g}' for rate in rates]}")
    lines.append(refused(lambda: learning_rate(0, peak=1.0, decay_steps=3, kind="step")))
    lines.append(refused(lambda: learning_rate(-1, peak=1.0, decay_steps=3)))
    for name, changes in (("text", {}), ("text", {"decay_steps": 100, "min_lr_ratio": 0.5, "name": "linear"})):
        config = EVERY[name].replace(scheduler=EVERY[name].scheduler.replace(**changes))
        lines.append(str([f"{scheduled_learning_rate(config, step):.9g}" for step in (0, 59, 60, 99, 299, 300)]))
    for experts, factor in ((4, 0.0), (4, 0.25), (3, 1 / 3), (5, 1.0), (5, 1e-9), (7, 0.07), (7, 0.123456)):
        share = choice_share(experts, factor)
        lines.append(
            f"{experts} {factor} {share} {[choice_capacity(tokens, share) for tokens in (0, 1, 7, 99, 10**6)]}"
        )
    lines += [refused(lambda factor=factor: choice_share(4, factor)) for factor in (-0.1, 1.1)]
    for most, k, experts, factor in ((9, 2, 4, 1.0), (9, 1, 8, 1.25), (5, 2, 3, 0.1), (0, 1, 2, 1.0), (6, 4, 4, 2.0)):
        share = capacity_share(factor)
        assert share is not None
        capacities = token_capacities(most, k, experts, share)
        lines.append(f"{most} {k} {experts} {factor} {capacities.dtype} {capacities.tolist()}")
    written("rotations_and_rates.txt", lines)


def test_requests_to_generate() -> None:
    prompts = read_prompts([[1, 2, 3], [4]], None, 9)
    lines = [f"{prompts.tokens.dtype} {prompts.tokens.tolist()} {prompts.lengths.dtype} {prompts.lengths.tolist()}"]
    lines.append(str(read_prompts(np.arange(6).reshape(2, 3), [2, 3], 9).tokens.tolist()))
    new = np.array([[5, 6, 7], [8, 5, 6]])
    lines += [str(prompts.followed_by(new, 7, stops).tolist()) for stops in ((), (5,), (6, 8), (1,))]
    read: list[tuple[Any, Any]] = [
        ([], None),
        ([1, 2], None),
        ([[1], []], None),
        ([[1.5]], None),
        ([[9]], None),
        ([[0, -1]], None),
        ([[1, 2]], [3]),
        ([[1, 2]], [-1]),
        ([[1, 2]], [0]),
        ([[1, 2]], [1, 1]),
        ([[1, 2]], [1.0]),
    ]
    lines += [refused(lambda rows=rows, lengths=lengths: read_prompts(rows, lengths, 9)) for rows, lengths in read]
    assert read_prompts([[0, 8]], 2, 9).tokens.tolist() == [[0, 8]]
    asked: list[dict[str, Any]] = [
        {"max_new_tokens": -1},
        {"max_new_tokens": True},
        {"max_new_tokens": 2.0},
        {"prefill_chunk": 0},
        {"max_seq_len": 2},
        {"max_new_tokens": 7},
        {"image_tokens": 3, "max_new_tokens": 4},
        {"image_tokens": 7},
        {"eos_token_ids": (1, 9)},
        {"eos_token_ids": (-1,)},
    ]
    plain: dict[str, Any] = {"max_new_tokens": 1, "max_seq_len": 8, "vocab_size": 9}
    lines += [refused(lambda given=given: check_request(prompts, **{**plain, **given})) for given in asked]
    check_request(prompts, **{**plain, "max_new_tokens": 6, "eos_token_ids": (0, 8), "prefill_chunk": 1})
    check_request(prompts, **{**plain, "max_new_tokens": 3, "image_tokens": 3})
    check_request(prompts, **{**plain, "max_seq_len": 3, "max_new_tokens": 0})
    sampled: list[dict[str, Any]] = [
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"pad_token_id": 2**31},
        {"pad_token_id": -(2**31) - 1},
        {"eos_token_id": 1.5},
        {"eos_token_id": [[1]]},
    ]
    lines += [refused(lambda given=given: SamplingConfig(**given)) for given in sampled]
    edges = SamplingConfig(temperature=0, top_k=0, top_p=1, pad_token_id=2**31 - 1, eos_token_id=np.array([3, 3, 1]))
    assert edges.eos_token_ids == (3, 1)
    assert SamplingConfig(pad_token_id=-(2**31)).eos_token_ids == read_stops([]) == read_stops(None) == ()
    assert read_stops(4) == read_stops(np.int64(4)) == (4,)
    lines += [refused(lambda value=value: check_integer("x", value, 2, 5, "or y")) for value in (1, 5, 2.0, True, None)]
    check_integer("x", np.int64(2), 2, 5)
    check_integer("x", 4, 2, 5)
    check_integer("x", 10**9, 2)
    lines.append(str([bucket(length, 100) for length in (1, 15, 16, 17, 32, 33, 64, 65, 200)]))
    lines.append(str([cache_length(prompts, new, 90, image) for new in (1, 14, 15, 40) for image in (0, 1)]))
    lines += [
        f"{length} {chunk} {limit} {prefill_chunks(length, chunk, limit)}"
        for length, chunk, limit in (
            (1, 32, 64),
            (31, 32, 64),
            (32, 32, 64),
            (33, 32, 64),
            (33, 32, 40),
            (64, 32, 64),
            (90, 32, 95),
            (5, 2, 9),
        )
    ]
    lines += [str(np.round(draw_uniforms(seed, 2, 3), 12).tolist()) for seed in (0, 5)]
    assert not np.array_equal(draw_uniforms(None, 1, 2), draw_uniforms(None, 1, 2))
    for wrong in ([[0.0, 1.0]], [[-0.1, 0.5]], [0.5, 0.5], [[0.5]]):
        lines.append(refused(lambda wrong=wrong: check_uniforms(np.array(wrong), 1, 2)))
    assert check_uniforms([[0, 0.5]], 1, 2).dtype == np.float64  # type: ignore[arg-type]
    for shape in ((2, 3, 4), (1, 3, 4, 4), (2, 3, 4, 4, 4, 4)):
        lines.append(refused(lambda shape=shape: check_images(shape, 2)))
    check_images((2, 3, 4, 4), 2)
    check_images((2, 1, 3, 4, 4), 2)
    check_architecture(None)
    check_architecture(CONFIGS["mot"].vlm)
    lines.append(refused(lambda: check_architecture(CONFIGS["moma"].vlm)))
    written("generate_requests.txt", lines)


def test_freezing_and_warm_starts() -> None:
    lines = []
    base, stage = (
        [FreezeSpec("adapter", True)],
        [FreezeStage(2, (FreezeSpec("transformer", True),)), FreezeStage(5, ())],
    )
    lines += [f"{step} {effective_freeze(step, base, stage)}" for step in (0, 1, 2, 4, 5, 9)]
    lines.append(refused(lambda: effective_freeze(0, [FreezeSpec("x", True)], stage, ["b", "a", "transformer"])))
    lines.append(refused(lambda: effective_freeze(0, base, stage, ["adapter"])))
    patterns = {"adapter": "adapter.*", "transformer": ("transformer.a*", "transformer.b*")}
    names = ["adapter.x", "transformer.a", "transformer.b.c", "transformer.c", "vision_encoder.y"]
    thawed = FreezeSpec("transformer.b*", False)
    for specs in (
        base,
        [*base, FreezeSpec("transformer", True)],
        [FreezeSpec("transformer", True), thawed],
        [thawed],
        [],
    ):
        lines.append(f"{sorted(frozen_names(names, specs, patterns))} {canonical_freeze_meta(specs)}")
        lines += [f"  {sorted(never_trained(names, specs, stages, patterns))}" for stages in ((), stage)]
    lines.append(str(sorted(never_trained(names, [], [FreezeStage(0, tuple(base))], patterns))))
    lines.append(refused(lambda: frozen_names(names, [FreezeSpec("x", True)], patterns)))
    joint = CONFIGS["moma"]
    assert joint.vlm is not None
    frozen = joint.vlm.replace(freeze=[{"module": "vision_encoder", "frozen": True}])
    table = job_table(joint, tower_of(joint))
    key = next(name for name in table if name.startswith("adapter"))
    tower = next(name for name in table if name.startswith("vision_encoder"))
    moments = {f"{moment}.{name}": np.ones(table[name].shape) for moment in "mvt" for name in (key, tower)}
    found = moments_under(frozen, table, moments)
    lines.append(f"{len(found)} {f'm.{tower}' in found} {found[f'm.{key}'].sum()}")
    lines.append(str(sorted({digest(value)[:8] for value in found.values()})))
    lines.append(f"{moments_under(None, table, moments).keys() == moments.keys()} {moments_under(frozen, table, {})}")
    for name in (
        "mot_norms.image.weight",
        "layers.1.attn_norm.text.weight",
        "layers.0.attn.q_proj.image.weight",
        "norm.weight",
        "layers.0.attn.q_norm.text.weight",
        "layers.2.mlp.text.experts.0.up_proj.weight",
        "layers.0.mlp_norm.image.bias",
        "token_embedding.embedding.weight",
        "layers.0.mlp.other.up_proj.weight",
    ):
        lines.append(f"{name} {text_source(name, ('image', 'text'))}")
    mot = CONFIGS["mot"]
    assert mot.vlm is not None
    text = {
        name: np.full(spec.shape, 1.0 * place) for place, (name, spec) in enumerate(parameter_table(mot.model).items())
    }
    started = warm_start_state(mot.model, mot.vlm, text)
    lines += [f"{name} {started[name].flat[0]}" for name in list(started)[:30]]
    wrapped = {f"transformer.{name}": array for name, array in text.items()} | {"vision_encoder.x": np.ones(1)}
    assert all(np.array_equal(warm_start_state(mot.model, mot.vlm, wrapped)[name], started[name]) for name in started)
    damaged = {**text, "extra": np.ones(1), "norm.weight": np.ones(3)}
    del damaged["layers.0.mlp.up_proj.weight"]
    lines.append(refused(lambda: warm_start_state(mot.model, mot.vlm, damaged)))  # type: ignore[arg-type]
    assert without_warm_start(CONFIGS["text"]) is CONFIGS["text"]
    lines.append(refused(lambda: check_names({"a": (1,), "b": (2,), "c": (3,)}, {"b": (2,), "c": (4,), "d": (1,)})))
    check_names({"a": (1,)}, {"a": (1,)})
    written("freezing.txt", lines)


def test_what_changes_the_function() -> None:
    lines = []
    for name, config in EVERY.items():
        lines.append(f"{name} {function_of(config)}")
    for one, other in itertools.pairwise(EVERY.values()):
        lines.append(str([f"{each.field}: {each.here!r} {each.there!r}" for each in differences(one, other)][:12]))
    (first, *_) = differences(CONFIGS["text"], CONFIGS["window"])
    lines.append(first.overriding("/w"))
    written("functions.txt", lines)
