"""What `show` prints is what is measured: operators that ran for FLOPs, tensors that exist for bytes.

Models are the presets', shrunk. FLOPs of attention are measured token by token, each of which sees no more keys than it
may, as counters take masked keys for work.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch.utils.flop_counter import FlopCounterMode

from kempnerforge_jax.model.transformer import Transformer as JaxTransformer
from kempnerforge_jax.training import optimizer as jax_optimizer
from kempnerforge_jax.training import train as jax_training
from kempnerforge_jax.training.objective import compute_copy, gradients_of
from kempnerforge_torch.model import experts
from kempnerforge_torch.model.kv_cache import KVCache
from kempnerforge_torch.model.state import set_state
from kempnerforge_torch.model.transformer import Transformer
from kempnerforge_torch.training.train import Trainer
from shared_config.contract.counts import (
    BFLOAT16,
    TrainingMemory,
    count_active_parameters,
    count_parameters,
    flops_per_token,
    kv_cache_bytes,
    training_memory,
)
from shared_config.contract.decoding import PREFILL_CHUNK
from shared_config.contract.freeze import trained_parameters
from shared_config.contract.parameters import parameter_table
from shared_config.contract.sharding import refusals
from shared_config.data import open_data
from shared_config.loader import load_config, preset_names
from shared_config.parity.shrink import shrink
from shared_config.parity.validation import validation_weights
from shared_config.schema.job import JobConfig
from shared_config.schema.vlm import MoMaConfig
from tests.parity.backends import on_both

LENGTH = 12  # of fewer than 16 keys, attention is plain products on the CPU, which counters see
PRODUCTS, ATTENTION = ("aten.mm", "aten.addmm"), ("aten.bmm", "aten.baddbmm")


def small(preset: str, *overrides: str) -> JobConfig:
    config = shrink(load_config(preset, ["--train.compile_model=false", *overrides]))
    return config.replace(train=config.train.replace(batch_size=2, seq_len=min(24, config.train.seq_len)))


VARIANTS = {name: (name, ()) for name in preset_names()} | {
    "window": ("debug", ("--model.sliding_window=5",)),
    "mixed": ("debug", ("--model.sliding_window=5", '--model.attention_pattern=["full", "window_nope"]')),
    "tied": ("debug", ("--model.tie_embeddings=true", "--model.attention_bias=true")),
    "plain": ("debug", ("--model.activation=gelu", "--model.norm_type=layernorm")),
    "shared": ("debug_moe", ("--model.moe_shared_experts=2", "--model.moe_top_k=3", "--model.num_experts=5")),
    "unpacked": ("debug_moe", ("--model.moe_packed_experts=false", "--model.n_layers=3", "--model.moe_frequency=3")),
    "half": ("debug_vlm_moma", ("--vlm.moma_capacity_factor=0.5",)),
    "narrow": ("debug_vlm_mot", ("--vlm.mot_image_n_kv_heads=1",)),
}
"""The presets, and settings that no preset has."""


def products(x_RD: torch.Tensor, w_EDF: Iterable[torch.Tensor], ends_E: torch.Tensor, *_: bool) -> torch.Tensor:
    """The definition of `grouped_matmul`."""
    ends = ends_E.tolist()
    assert ends[-1] == len(x_RD)
    groups = zip([0, *ends[:-1]], ends, w_EDF, strict=True)
    return torch.cat([x_RD[start:end] @ w_DF for start, end, w_DF in groups])


def experts_as_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts on the CPU are opaque operators, into which counters don't see."""
    monkeypatch.setattr(experts, "grouped_matmul", products)


_experts_as_products = pytest.fixture(autouse=True)(experts_as_products)


# FLOPs


def counted(run: Any) -> tuple[int, int]:
    """FLOPs of linear maps and of attention in what ran."""
    with FlopCounterMode(display=False) as counter:
        run()
    flops = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    assert flops.keys() <= {*PRODUCTS, *ATTENTION}, flops
    return sum(flops.get(name, 0) for name in PRODUCTS), sum(flops.get(name, 0) for name in ATTENTION)


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_those_of_the_operators_that_run_in_torch(variant: str) -> None:
    preset, overrides = VARIANTS[variant]
    config = small(preset, *overrides)
    model = Transformer(config.model, vlm_config=config.vlm)
    model.init_weights_and_freqs(seed=1)
    stated = flops_per_token(config.model, LENGTH, config.vlm)
    tokens = torch.arange(LENGTH)[None] % config.model.vocab_size
    linear, _ = counted(lambda: model(tokens))
    assert linear == LENGTH * stated.matmul
    forward_and_backward, _ = counted(lambda: model(tokens).sum().backward())
    assert forward_and_backward + 3 * LENGTH * stated.attention == LENGTH * stated.training
    if isinstance(config.vlm, MoMaConfig):
        return  # its experts choose among all tokens, so it has no caches
    heads = config.model.kv_heads if config.vlm is None else config.vlm.cached_kv_heads(config.model)
    size = (1, 64, heads, config.model.head_size)
    caches = [KVCache(*size, sliding_window=window) for window in config.model.layer_windows]
    with torch.no_grad():
        _, attention = counted(lambda: [model(tokens[:, t : t + 1], kv_caches=caches) for t in range(LENGTH)])
    assert attention == pytest.approx(LENGTH * stated.attention, abs=LENGTH)


FEW = ("debug", "debug_moe", "qwen3_0_6b", "debug_vlm_cross_attention", "tied")


@pytest.mark.parametrize("variant", FEW)
def test_flops_are_those_that_xla_counts(variant: str) -> None:
    """The program before it is optimised; what is no product adds at most a few percent. XLA counts masked keys, and
    the loop over experts' rows as one turn.
    """
    preset, overrides = VARIANTS[variant]
    model = small(preset, *overrides).model.replace(num_experts=0)
    stated = flops_per_token(model, LENGTH)
    everything = 4 * model.n_layers * model.n_heads * model.head_size * LENGTH**2
    expected = LENGTH * stated.matmul + everything
    module = nnx.eval_shape(lambda: JaxTransformer(model, rngs=None))
    graphdef, state = nnx.split(module)
    tokens = jax.ShapeDtypeStruct((1, LENGTH), np.int32)
    lowered = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens)).lower(state, tokens)
    analysis: Any = lowered.cost_analysis()
    assert expected <= analysis["flops"] <= 1.06 * expected


# Bytes


def batch_of(config: JobConfig) -> dict[str, np.ndarray]:
    if config.vlm is not None:
        return open_data(config).batch(0)
    tokens = np.arange(2 * 24, dtype=np.int32).reshape(2, 24) % config.model.vocab_size
    return {"tokens": tokens, "labels": tokens}


def sum_of_bytes(arrays: Mapping[str, Any], prefix: str = "") -> int:
    return sum(array.nbytes for name, array in arrays.items() if name.startswith(prefix))


def measured_in_torch(config: JobConfig, monkeypatch: pytest.MonkeyPatch) -> TrainingMemory:
    """What a trainer holds through a step."""
    trainer = Trainer(config)
    gradients, copies = {}, {}
    take, add_up = trainer._take_gradients, trainer.copies.add_up

    def note_gradients() -> None:
        """The most, by kind and name, of what is held when a micro-batch has been differentiated."""
        gradients.update({f"master {name}": p.grad for name, p in trainer.masters.items() if p.grad is not None})
        gradients.update({f"copy {n}": c.grad for n, c in trainer.copies._copies.items() if c.grad is not None})
        gradients.update({f"sum {name}": total for name, total in trainer.copies._sums.items()})

    def noting_gradients() -> dict[str, torch.Tensor]:
        note_gradients()
        return take()

    def adding_up() -> None:
        note_gradients()
        add_up()

    monkeypatch.setattr(trainer, "_take_gradients", noting_gradients)
    monkeypatch.setattr(trainer.copies, "add_up", adding_up)
    call = torch.func.functional_call

    def noting(module: Any, weights: Any, **options: Any) -> Any:
        copies.update({name: weight for name, weight in weights.items() if weight.dtype == torch.bfloat16})
        return call(module, weights, **options)

    monkeypatch.setattr(torch.func, "functional_call", noting)
    batch, stages = batch_of(config), 1 if config.vlm is None else 1 + len(config.vlm.freeze_schedule)
    for _ in range(stages):
        trainer.step([batch] * config.train.grad_accum_steps)
    moments = trainer.state().optimizer
    optimizer = sum_of_bytes(moments, "m.") + sum_of_bytes(moments, "v.")
    return TrainingMemory(sum_of_bytes(trainer.masters), sum_of_bytes(gradients), optimizer, sum_of_bytes(copies))


RANDOM = {"type": "random", "num_tokens": 16, "patch_size": 0, "n_layers": 0, "n_heads": 0}
MEMORY = {name: (name, ()) for name in preset_names()} | {
    "adapter alone": ("debug_vlm_joint_decoder", ('--vlm.freeze=[{module="vision_encoder"},{module="transformer"}]',)),
    "thawed later": (
        "debug_vlm_mot",
        ('--vlm.freeze=[{module="adapter"}]', "--vlm.freeze_schedule=[{start_step=1, specs=[]}]"),
    ),
    "random": (
        "debug_vlm_mot",
        tuple(f"--vision_encoder.{name}={value}" for name, value in RANDOM.items()),
    ),
}


@pytest.mark.parametrize("variant", MEMORY)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_memory_is_that_of_a_trainer_in_torch(
    variant: str, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset, overrides = MEMORY[variant]
    config = small(preset, *overrides, f"--train.grad_accum_steps={micro_batches}")
    assert measured_in_torch(config, monkeypatch) == training_memory(config)


@pytest.mark.parametrize(
    ("variant", "precision"),
    [("debug", "fp32"), ("debug_moe", "bf16"), ("adapter alone", "bf16"), ("thawed later", "fp32")],
)
def test_memory_is_that_of_a_trainer_in_jax(variant: str, precision: str) -> None:
    preset, overrides = MEMORY[variant]
    config = small(preset, *overrides, f"--train.mixed_precision={precision}")
    trainer = jax_training.Trainer(config)
    vlm, names = config.vlm, list(trainer.parameters)
    trained = set(trained_parameters(trainer.parameters, vlm))
    moments = jax_optimizer.get_optimizer_state(trainer.optimizer_state)
    frozen = frozenset(names) - trained
    recipe = dataclasses.replace(trainer.recipe, frozen=frozen)
    batches = {name: np.asarray(value)[None] for name, value in batch_of(config).items()}
    gradients = functools.partial(gradients_of, recipe)
    shapes = jax.eval_shape(gradients, trainer.parameters, trainer.buffers, batches, np.float32(1))[0]
    copies = jax.eval_shape(functools.partial(compute_copy, recipe), trainer.parameters)
    stated = training_memory(config)
    assert stated.parameters == sum_of_bytes(trainer.parameters)
    widths = {name: copies[name].dtype.itemsize for name in shapes}  # XLA widens a gradient as the update reads it
    assert stated.gradients == sum(widths[name] * gradient.size for name, gradient in shapes.items())
    assert stated.optimizer == sum_of_bytes(moments, "m.") + sum_of_bytes(moments, "v.")
    assert stated.compute_copy == sum(2 * copy.size for copy in copies.values() if copy.dtype == "bfloat16")


LAYOUTS: tuple[dict[str, int], ...] = (
    {"dp_shard": 4},
    {"tp": 2},
    {"dp_replicate": 2},
    {"tp": 2, "dp_shard": 2, "dp_replicate": 3},
    {"pp": 2, "dp_shard": 1},
    {"pp": 2, "tp": 4, "dp_shard": 2},
    {"dp_shard": 4, "ep": 2},
    {"cp": 2, "dp_shard": 2},
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("preset", ["debug", "debug_moe", "llama3_8b", "debug_vlm_mot"])
def test_memory_of_a_layout_is_that_of_its_parts(preset: str, layout: dict[str, int]) -> None:
    """A model's tensors, cut up: layers into stages, matrices by tensor parallelism, experts and what is left into
    shards; the fullest device counts.
    """
    config = small(preset)
    if config.vlm is not None and layout.get("pp", 1) > 1:
        assert refusals(config.replace(distributed=config.distributed.replace(**layout)))
        return
    distributed = config.distributed.replace(**layout)
    shard, ep, tp, pp = (max(1, getattr(distributed, name)) for name in ("dp_shard", "ep", "tp", "pp"))
    shard *= distributed.cp
    config = config.replace(distributed=distributed)
    state = {name: tensor.detach().cpu().numpy() for name, tensor in Trainer(config.replace(
        distributed=distributed.replace(**dict.fromkeys(layout, 1)))).masters.items()}  # fmt: skip
    stated = training_memory(config, distributed.dp_replicate * shard * tp * pp)
    stages = [dict[str, np.ndarray]() for _ in range(pp)]
    for name, array in state.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        first = "token_embedding" in name or pp == 1
        stages[int(layer[1]) * pp // config.model.n_layers if layer else 0 if first else -1][name] = array
    held = max(sum(part_of(name, array, tp, ep, shard) for name, array in stage.items()) for stage in stages)
    assert stated.parameters == held
    assert (stated.gradients, stated.optimizer) == (stated.parameters, 2 * stated.parameters)
    if config.train.mixed_precision == "bf16":
        at_work = [
            sum(
                part_of(name, array, tp, ep, 1) // 2
                for name, array in stage.items()
                if "router" not in name and (shard == 1 or f"layers.{layer}." in name)
            )
            for stage in stages
            for layer in range(config.model.n_layers if shard > 1 else 1)
        ]
        assert stated.compute_copy == max(at_work)


def part_of(name: str, array: np.ndarray, tp: int, ep: int, shard: int) -> int:
    """Bytes of a tensor on the device that holds most of it; sizes are such that FSDP divides an axis of each, but for
    biases that tensor parallelism cuts; routers are whole.
    """
    expert = name.endswith("_w")
    part = array[: array.shape[0] // ep] if expert else array
    axis = next((axis for pattern, axis in TP_AXES.items() if re.search(pattern, name)), None)
    if axis is not None:
        part = np.array_split(part, tp, axis=axis)[0]
    if "router" in name or (axis is not None and tp > 1 and array.ndim == 1):
        return part.nbytes
    return part.nbytes // (1 if shard == 1 else shard // ep if expert else shard)


TP_AXES = {
    r"(gate|up)_w$": 2,
    r"down_w$": 1,
    r"([qkv]_proj(\.\w+)?|gate_proj|up_proj)\.(weight|bias)$": 0,
    r"(o_proj(\.\w+)?|down_proj)\.weight$": 1,
    r"(token_embedding\.embedding|output_head\.proj)\.weight$": 0,
    r"proj1\.(weight|bias)$": 0,
    r"proj2\.weight$": 1,
}
"""The axis of a tensor that tensor parallelism cuts, by its name."""


@on_both
@pytest.mark.parametrize("variant", ["debug", "window", "mixed", "narrow"])
def test_bytes_of_caches_are_those_that_generation_makes(
    backend: Any, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset, overrides = VARIANTS[variant]
    config = small(preset, *overrides)
    model = config.model.replace(max_seq_len=1024)
    decode, made = backend.module("model.decode"), []
    new_caches = decode.new_caches

    def noted(*args: Any, **options: Any) -> Any:
        caches = new_caches(*args, **options)
        made.extend(cache.k.nbytes + cache.v.nbytes for cache in caches)
        return caches

    monkeypatch.setattr(decode, "new_caches", noted)
    if backend.name == "jax":
        decode._empty_caches.clear_cache()
    weights = validation_weights(parameter_table(model, config.vlm), 1)
    built = backend.model(model, weights, "bfloat16", vlm_config=config.vlm)
    backend.module("model.generate").generate(built, [[1] * 1000], 1, temperature=0.0)
    assert len(made) == model.n_layers
    assert sum(made) == kv_cache_bytes(model, 1, 1024, BFLOAT16, config.vlm, spare=PREFILL_CHUNK - 1)


@pytest.mark.parametrize("variant", ["debug_moe", "shared", "unpacked", "debug_vlm_mot"])
def test_active_parameters_are_those_that_a_token_s_gradient_reaches(variant: str) -> None:
    """One token alone: of other experts and modalities the gradient is 0. Its scores have none, as there is one key."""
    preset, overrides = VARIANTS[variant]
    config = small(preset, *overrides)
    model = Transformer(config.model, vlm_config=config.vlm)
    set_state(model, validation_weights(parameter_table(config.model, config.vlm), 1))
    model(torch.tensor([[3]])).square().sum().backward()
    reached = 0
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scores = any(part in name for part in ("q_proj", "k_proj")) and ".image." not in name
        if name.endswith("_w"):
            reached += sum(expert.numel() for expert in gradient if expert.any())
        elif gradient.any() or scores or name.startswith("token_embedding"):
            reached += gradient.numel()
    assert reached == count_active_parameters(config.model, config.vlm)
    assert count_parameters(config.model, config.vlm) == sum(p.numel() for p in model.parameters())
