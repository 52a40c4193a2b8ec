"""Every planted bug is caught, in either backend, and the unchanged backends raise no alarm.

The checks are those of the other parity tests, on the smallest set of cases in which every line that a mutant changes
matters.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch

from shared_config.contract.initialise import initial_values
from shared_config.contract.parameters import parameter_table
from shared_config.contract.schedule import Rates
from shared_config.parity.validation import validation_weights
from shared_config.schema.model import ModelConfig, RopeScaling
from shared_config.schema.optimizer import OptimizerConfig
from tests.mutants import (
    BACKENDS,
    KILLED,
    MUTANTS,
    SURVIVED,
    Check,
    Mutant,
    StaleMutantError,
    in_a_process,
    mutants_in,
    mutated_source,
    not_killed,
    of_this_run,
    planted,
    verdict,
)
from tests.mutants_decoding import DECODING_MUTANTS
from tests.mutants_loading import LOADING_MUTANTS
from tests.mutants_lora import LORA_MUTANTS
from tests.mutants_moe import MOE_MUTANTS
from tests.mutants_optimizers import OPTIMIZER_MUTANTS
from tests.mutants_vlm import VLM_MUTANTS
from tests.oracle.generate import generate as oracle_generate
from tests.oracle.generate import sample as oracle_sample
from tests.oracle.optimizer import adamw_step, clip, initial_state
from tests.oracle.position import apply_rope
from tests.outcomes import accepted, refused
from tests.parity.decoding_checks import DECODING_CHECKS
from tests.parity.head_checks import check_head
from tests.parity.loading_checks import LOADING_CHECKS
from tests.parity.lora_checks import check_adapters, check_start
from tests.parity.mask_checks import MASK_CHECKS
from tests.parity.moe_checks import MOE_CHECKS
from tests.parity.optimizer_checks import check_optimizers
from tests.parity.padding_checks import PADDING_CHECKS
from tests.parity.runners import assert_same_runs, run_jax, run_oracle, run_torch
from tests.parity.vlm_checks import VLM_CHECKS
from tests.strategies import Inputs
from tests.tolerance import assert_all_same_function, assert_same_function

ALL_MUTANTS = (
    *MUTANTS, *DECODING_MUTANTS, *MOE_MUTANTS, *VLM_MUTANTS, *OPTIMIZER_MUTANTS, *LORA_MUTANTS, *LOADING_MUTANTS
)  # fmt: skip
FOLDER = Path(__file__).parents[1]
LISTS = [file.stem for file in sorted(FOLDER.glob("mutants*.py"))]
SEED, BATCH, LENGTH, PREFIX = 5, 2, 8, 3
RATES = Rates(0.1, 0.1)
GROUPED = ModelConfig(
    dim=20, head_dim=6, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=37, ffn_hidden_dim=24, max_seq_len=16,
    qk_norm=True, sliding_window=4, attention_bias=True, rope_theta=50.0, norm_eps=1e-2, attention_output_bias=False,
    attention_scale=0.3, norm_placement="both", residual_scale=0.7, embedding_scale=2.5, logit_divisor=3.0,
    norm_type="rmsnorm_1p", activation="geglu_tanh", attention_softcap=2.0, logit_softcap=1.5,
)  # fmt: skip
CENTRED = ModelConfig(
    dim=24, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=13, ffn_hidden_dim=50, max_seq_len=16,
    norm_type="layernorm",
    activation="gelu", tie_embeddings=True, qk_norm=True, qk_norm_over="width", norm_placement="after", mlp_bias=True,
    rope_scaling=RopeScaling(type="llama3", factor=8.0, original_max_seq_len=16), sliding_window=4,
    attention_pattern=("full", "window", "full_nope"), window_rope_theta=70.0, window_rope_scaled=False,
)  # fmt: skip
ROUTED = ModelConfig(
    dim=12, n_layers=1, n_heads=2, vocab_size=13, ffn_hidden_dim=20, max_seq_len=16, num_experts=5, moe_top_k=2,
    moe_router="sigmoid_topk", moe_shared_experts=1, moe_shared_expert_gate=True, moe_capacity_factor=0.7,
    moe_gradient_scale=True,    moe_routed_scaling=2.5, moe_sequence_aux_loss_weight=0.1, moe_router_z_loss_weight=0.01,
)  # fmt: skip


def check_models(backend: str) -> None:
    """Forward and gradients against the oracle: masks of every kind, prefix, slice, ties, experts."""
    rng = np.random.default_rng(SEED)
    tokens = lambda config: rng.integers(0, config.vocab_size, (BATCH, LENGTH), dtype=np.int32)  # noqa: E731
    documents = np.cumsum(rng.random((BATCH, LENGTH)) < 0.3, axis=1).astype(np.int32)
    padding = np.ones((BATCH, PREFIX + LENGTH), dtype=bool)
    padding[0, :4] = False  # rows that see no key
    padding[1, -2:] = False
    prefix = rng.standard_normal((BATCH, PREFIX, CENTRED.dim))
    labels = lambda config, n=LENGTH: rng.integers(-1, config.vocab_size, (BATCH, n)).astype(np.int32)  # noqa: E731
    cases = [
        (GROUPED, Inputs(tokens(GROUPED), ignored(labels(GROUPED)), doc_ids=documents)),
        (
            CENTRED,
            Inputs(
                tokens(CENTRED),
                ignored(labels(CENTRED, LENGTH - 1)),
                prefix_embeds=prefix,
                key_padding_mask=padding,
                output_slice=(PREFIX, PREFIX + LENGTH - 1),
            ),
        ),
        (ROUTED, Inputs(tokens(ROUTED), ignored(labels(ROUTED)))),
    ]
    for config, inputs in cases:
        weights = validation_weights(parameter_table(config), SEED)
        truth = run_oracle(config, weights, inputs)
        run = run_torch(config, weights, inputs) if backend == "torch" else run_jax(config, weights, inputs)
        assert_same_runs(run, truth, config)


def check_slice(backend: str) -> None:
    """Logits of an output slice are those of the whole, and no others."""
    tokens = np.random.default_rng(SEED).integers(0, CENTRED.vocab_size, (BATCH, LENGTH), dtype=np.int32)
    modules = load(backend)
    model = build(modules, CENTRED, validation_weights(parameter_table(CENTRED), SEED))
    given = torch.from_numpy(tokens) if backend == "torch" else jax.numpy.asarray(tokens)
    context = modules["modality"].ModalityContext(output_slice=slice(2, 5))
    part, whole = (modules["state"].to_numpy(model(given, **extra)) for extra in ({"modality": context}, {}))
    assert part.shape == (BATCH, 3, CENTRED.vocab_size)
    assert_same_function(part, whole[:, 2:5], "logits")


def check_table(backend: str) -> None:
    """A model holds the parameters and buffers of the table, under their names and in their shapes."""
    modules = load(backend)
    for config in (CENTRED, ROUTED, ROUTED.replace(moe_packed_experts=True)):
        with accepted("a model as its table says"):
            state = modules["state"].get_state(new_model(modules, config))
        table = parameter_table(config)
        assert {n: tuple(a.shape) for n, a in state.items()} == {n: s.shape for n, s in table.items()}


def ignored(labels: np.ndarray) -> np.ndarray:
    """A third of the labels is -100."""
    labels[:, ::3] = -100
    return np.where(labels < 0, -100, labels).astype(np.int32)


def check_rotation(backend: str) -> None:
    """The rotation of a head by itself, whose halves may not trade places."""
    rng = np.random.default_rng(SEED)
    x, cos, sin = rng.standard_normal((2, 5, 6)), rng.standard_normal((5, 3)), rng.standard_normal((5, 3))
    modules = load(backend)
    give = torch.from_numpy if backend == "torch" else jax.numpy.asarray
    turned = modules["position"].apply_rope(give(x), give(cos), give(sin))
    assert_same_function(modules["state"].to_numpy(turned), apply_rope(x, cos, sin), "rotated")


def check_positions(backend: str) -> None:
    """Chunks fed to a cache give the logits of the whole."""
    config = GROUPED.replace(sliding_window=None)
    tokens = np.random.default_rng(SEED).integers(0, config.vocab_size, (BATCH, LENGTH), dtype=np.int32)
    weights = validation_weights(parameter_table(config), SEED)
    truth = run_oracle(config, weights, Inputs(tokens, np.full_like(tokens, 1))).activations["logits"]
    modules = load(backend)
    model = build(modules, config, weights)
    shape = (BATCH, config.max_seq_len, config.kv_heads, config.head_size)
    dtype = torch.float64 if backend == "torch" else "float64"
    caches = [modules["attention"].KVCache(*shape, dtype) for _ in range(config.n_layers)]
    parts = []
    for chunk in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:]):
        given = torch.from_numpy(chunk.copy()) if backend == "torch" else jax.numpy.asarray(chunk)
        logits = model(given, kv_caches=caches)
        if backend == "jax":
            logits, caches = logits
        parts.append(modules["state"].to_numpy(logits))
    assert_same_function(np.concatenate(parts, axis=1), truth, "logits")


def check_initial_weights(backend: str) -> None:
    """Seeded weights are those of the contract, to the bit."""
    modules = load(backend)
    config = GROUPED
    model = new_model(modules, config)
    modules["init"].init_weights(model, config, seed=11)
    state = modules["state"].get_state(model)
    for name, value in initial_values(parameter_table(config), 11):
        np.testing.assert_array_equal(modules["state"].to_numpy(state[name]), value, err_msg=name)


def check_refusals(backend: str) -> None:
    """Inputs without meaning are errors."""
    modules = load(backend)
    array = torch.zeros(1, 2, 3) if backend == "torch" else jax.numpy.zeros((1, 2, 3))
    context = modules["modality"].ModalityContext
    for given in ({"inputs_embeds": array, "prefix_embeds": array}, {"image_mask": array}):
        with refused("given"):
            context(**given)
    model = new_model(modules, GROUPED)
    for bad in (-1, GROUPED.vocab_size):
        tokens = np.array([[0, bad]], dtype=np.int32)
        with refused(f"tokens = {bad}"):
            model(torch.from_numpy(tokens) if backend == "torch" else jax.numpy.asarray(tokens))


def check_names(backend: str) -> None:
    """Masks that are none, negative ids, labels in eight bits of more tokens than these can count, ids that are NaN
    because they can't be seen.
    """
    modules = load(backend)
    give = torch.from_numpy if backend == "torch" else jax.numpy.asarray
    checks = importlib.import_module(f"kempnerforge_{backend}.model.checks")
    loss = importlib.import_module(f"kempnerforge_{backend}.training.loss")
    model, tokens = new_model(modules, GROUPED), give(np.array([[0, 1]], np.int32))
    mask = modules["modality"].ModalityContext(key_padding_mask=give(np.ones((1, 2), np.float32)))
    with refused(r"key_padding_mask\.dtype"):
        model(tokens, modality=mask)
    logits, labels = np.zeros((1, 3, 300)), np.array([[1, 156, 60]])
    for dtype, bad in ((np.int8, -1), (np.uint8, None)):
        given = np.where(labels == 156, 156 if bad is None else bad, labels).astype(dtype)
        if bad is None:
            with accepted("labels of eight bits"):
                assert int(loss.cross_entropy(give(logits.copy()), give(given))[1]) == 3
        else:
            with refused("labels = -1"):
                loss.cross_entropy(give(logits.copy()), give(given))
    for bad in (-1, 2):
        unseen = checks.nan_outside(give(np.ones((2, 3))), give(np.array([0, bad])), 2)
        assert np.isnan(modules["state"].to_numpy(unseen)).any(axis=1).tolist() == [False, True]


def check_generation(backend: str) -> None:
    """Draws with ties, and ragged prompts of which one ends early, against the oracle."""
    modules = load(backend)
    logits = np.array([[1.0, 3.0, 2.0, 3.0, 0.5, 2.0]] * 4)
    uniforms = np.array([0.05, 0.4, 0.7, 0.95])
    give = torch.from_numpy if backend == "torch" else jax.numpy.asarray
    policies: list[dict[str, Any]] = [
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 3},
        {"top_p": 0.7, "temperature": 0.5},
    ]
    for options in policies:
        drawn = modules["generate"].sample(give(logits.copy()), uniforms=give(uniforms.copy()), **options)
        expected = [oracle_sample(row, uniform, **options) for row, uniform in zip(logits, uniforms, strict=True)]
        assert np.asarray(drawn).tolist() == expected, options
    config, prompts = GROUPED.replace(sliding_window=None), [[3, 1, 4, 1, 5, 9], [2, 6]]
    weights = validation_weights(parameter_table(config), SEED)
    free = oracle_generate(weights, config, prompts, 6)
    eos = [int(free[1, 3]), int(free[0, 1])]
    truth = oracle_generate(weights, config, prompts, 6, eos_token_id=eos, pad_token_id=-1)
    model = build(modules, config, weights)
    steps = modules["generate"].stream(model, prompts, 6, temperature=0.0, eos_token_id=eos, pad_token_id=-1)
    np.testing.assert_array_equal(np.stack(list(steps), axis=1), truth[:, (truth != -1).any(axis=0)])


def check_optimizer(backend: str) -> None:
    """Clipping and two steps of AdamW against the oracle; the gradients are both larger and smaller than the limit."""
    table = parameter_table(CENTRED)
    rng = np.random.default_rng(SEED)
    weights = {name: rng.standard_normal(spec.shape) for name, spec in table.items()}
    gradients = {name: rng.standard_normal(spec.shape) * 1e-6 for name, spec in table.items()}
    config = OptimizerConfig(eps=1e-4, weight_decay=0.3)
    decayed = {name for name, spec in table.items() if spec.decay}
    for limit in (1e-5, 1e6):
        step = torch_steps if backend == "torch" else jax_steps
        got = step(load(backend), weights, gradients, table, config, limit)
        clipped, expected, state = clip(gradients, limit), weights, initial_state(weights)
        for _ in range(2):
            expected, state = adamw_step(
                expected, clipped, state, lr=0.1, betas=config.betas, eps=config.eps,
                weight_decay=config.weight_decay, decayed=decayed,
            )  # fmt: skip
        assert_all_same_function(got, expected)


def check_skipped_step(backend: str) -> None:
    """Moments and counts come back as they were given, also through a step that is left out."""
    optimizers, table = load(backend)["optimizer"], parameter_table(CENTRED)
    rng = np.random.default_rng(SEED)
    weights = {name: rng.standard_normal(spec.shape) for name, spec in table.items()}
    given = {f"{kind}.{name}": rng.random(spec.shape) for kind in "mv" for name, spec in table.items()}
    given |= {f"t.{name}": np.asarray(count, np.int32) for count, name in enumerate(table, 3)}
    if backend == "torch":
        parameters = {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in weights.items()}
        optimizer = optimizers.build_optimizer(parameters, table, OptimizerConfig())
        optimizers.set_optimizer_state(optimizer, parameters, given, 99)
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimizers.update(optimizer, RATES, torch.tensor(False))
        kept = optimizers.get_optimizer_state(optimizer, parameters)
    else:
        values = {name: jax.numpy.asarray(value) for name, value in weights.items()}
        optimizer = optimizers.build_optimizer(values, table, OptimizerConfig())
        state = optimizers.set_optimizer_state(optimizer.init(values), given, 99)
        ones = jax.tree.map(jax.numpy.ones_like, values)
        no = jax.numpy.asarray(False)
        kept = optimizers.get_optimizer_state(optimizers.update(optimizer, ones, state, values, RATES, no)[1])
    for name, value in given.items():
        np.testing.assert_array_equal(np.asarray(kept[name]), value, err_msg=name)


def torch_steps(modules: Any, weights: Any, gradients: Any, table: Any, config: Any, limit: float) -> Any:
    parameters = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in weights.items()}
    optimizer = modules["optimizer"].build_optimizer(parameters, table, config)
    modules["optimizer"].set_rates(optimizer, Rates(0.1, config.weight_decay))
    given = {name: torch.from_numpy(value.copy()) for name, value in gradients.items()}
    clipped, _ = modules["optimizer"].clip_by_global_norm(given, limit)
    for _ in range(2):
        for name, parameter in parameters.items():
            parameter.grad = clipped[name]
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def jax_steps(modules: Any, weights: Any, gradients: Any, table: Any, config: Any, limit: float) -> Any:
    parameters = {name: jax.numpy.asarray(value) for name, value in weights.items()}
    optimizer = modules["optimizer"].build_optimizer(parameters, table, config)
    given = {name: jax.numpy.asarray(value) for name, value in gradients.items()}
    clipped, _ = modules["optimizer"].clip_by_global_norm(given, limit)
    state, rates = optimizer.init(parameters), Rates(0.1, config.weight_decay)
    for _ in range(2):
        parameters, state = modules["optimizer"].update(optimizer, clipped, state, parameters, rates)
    return {name: np.asarray(value) for name, value in parameters.items()}


CHECKS: dict[str, tuple[Callable[[str], None], ...]] = {
    "model.init": (check_initial_weights,),
    "model.modality": (check_refusals, check_slice),
    "model.position": (check_rotation,),
    "model.checks": (check_names,),
    "model.embedding": (check_refusals, check_table),
    "model.attention": (check_positions,),
    "model.kv_cache": (check_positions,),
    "model.decode_state": (check_positions,),
    "model.mask": (check_positions,),
    "model.decode": (check_generation,),
    "model.request": (check_generation,),
    "model.sampling": (check_generation,),
    "training.optimizer": (check_optimizer, check_skipped_step, check_optimizers),
    "training.loss": (check_head,),
    "training.lion": (check_optimizers,),
    "training.muon": (check_optimizers,),
    "training.schedule_free": (check_optimizers,),
    "model.transformer": (check_slice,),
    "model.linear": (check_adapters,),
    "model.lora": (check_start, check_adapters),
    "model.moe": (check_table,),
}
CHECK_LISTS = (CHECKS, MASK_CHECKS, MOE_CHECKS, VLM_CHECKS, DECODING_CHECKS, PADDING_CHECKS, LOADING_CHECKS)


def checks_of(component: str) -> tuple[Callable[[str], None], ...]:
    return (
        *(check for checks in CHECK_LISTS for check in checks.get(component, ())),
        check_models,
    )


ALL_CHECKS = tuple(
    dict.fromkeys(check for checks in CHECK_LISTS for component in checks for check in checks_of(component))
)


SLOW_IN_JAX = frozenset(
    f"check_{name}"
    for name in (
        "images", "stacks", "products", "moma", "no_tokens", "steps", "positions", "checkpointing", "rings", "wrappers",
        "optimizer", "models", "copies", "capacity", "mot_block", "caches", "prefixes", "mot_experts", "tiles",
        "layers",
    )
)  # fmt: skip
"""They run with all mutants, and what they check is checked by day too."""
BY_DAY = [
    (check, backend)
    for check in ALL_CHECKS
    for backend in BACKENDS
    if backend == "torch" or check.__name__ not in SLOW_IN_JAX
]


@pytest.mark.parametrize(("check", "backend"), BY_DAY, ids=lambda each: getattr(each, "__name__", each))
def test_unchanged_backends_pass(check: Check, backend: str) -> None:
    with jax.enable_x64(True):
        check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mutant_is_killed_and_the_unchanged_backend_raises_no_alarm(
    backend: str, record_property: Callable[[str, object], None]
) -> None:
    """Every fifth mutant, in JAX every 120th, and the checks that kill these; all under HYPOTHESIS_PROFILE=nightly."""
    known = mutants_in(ALL_MUTANTS, backend)
    mutants = of_this_run(known, backend, every=120)
    alarms, survivors, accidents = in_a_process(survey, backend, mutants, len(mutants) == len(known))
    count = len(mutants)
    killed = count - len(survivors) - len(accidents)
    record_property("figure", f"mutants of {backend}: {killed}/{count} killed by assertions")
    assert not alarms
    assert not survivors
    assert not accidents, "no check asserts what these break: they only crash"


class Survey(NamedTuple):
    """What the checks said: message of each check that failed without a mutant, mutants that none noticed, and what
    checks died of in mutants that made none fail.
    """

    alarms: dict[str, str]
    survivors: list[str]
    accidents: dict[str, str]


def survey(backend: str, mutants: Sequence[Mutant], all_checks: bool) -> Survey:
    """Run on each mutant the checks that concern it, those whose programs are compiled first, and then on the unchanged
    backend all of them, or those that killed; see `in_a_process`.
    """
    found, ran, killers = {}, {}, {}

    def noting(check: Check) -> Check:
        def noted(backend: str) -> None:
            ran[check] = True
            try:
                check(backend)
            except (AssertionError, pytest.fail.Exception):
                killers[check] = True
                raise

        return noted

    with jax.enable_x64(True):
        for mutant in mutants:
            checks = sorted(checks_of(mutant.component), key=lambda check: check not in ran)
            found |= not_killed([mutant], backend, {mutant.component: [noting(check) for check in checks]})
        alarms = {
            check.__name__: said for check in (ALL_CHECKS if all_checks else killers) if (said := alarm(check, backend))
        }
    survivors = [mutant for mutant, said in found.items() if said == SURVIVED]
    return Survey(alarms, survivors, {mutant: said for mutant, said in found.items() if said != SURVIVED})


def alarm(check: Check, backend: str) -> str:
    """What a check says of the unchanged backend; nothing if it passes."""
    with planted(None, backend):
        try:
            check(backend)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_only_an_assertion_kills() -> None:
    mutant = Mutant("model.norm", "", ("eps", "eps"), None)

    def crashes(_: str) -> None:
        raise IndexError("far")

    def asserts(_: str) -> None:
        raise AssertionError

    def passes(_: str) -> None:
        pass

    for checks, expected in (
        ((passes,), SURVIVED),
        ((crashes, passes), "crashes: IndexError: far"),
        ((crashes, asserts), KILLED),
    ):
        assert verdict(mutant, "torch", checks) == expected


def test_compilers_that_read_source_text_read_the_bug() -> None:
    change = ("wide - wide.mean(dim=-1, keepdim=True)", "wide")

    def text() -> str:
        return inspect.getsource(importlib.import_module("kempnerforge_torch.model.norm").LayerNorm.forward)

    right = text()
    with planted(Mutant("model.norm", "", change, None), "torch"):
        wrong = text()
    assert wrong == right.replace(*change) != right == text()


def test_neither_backend_has_fewer_mutants() -> None:
    assert len(mutants_in(ALL_MUTANTS, "torch")) == len(mutants_in(ALL_MUTANTS, "jax"))


def test_every_component_has_two_mutants() -> None:
    components = [mutant.component for name in LISTS for mutant in listed(name)]
    assert all(components.count(mutant.component) >= 2 for mutant in ALL_MUTANTS)


@pytest.mark.parametrize("name", LISTS)
def test_every_mutant_of_every_list_fits(name: str) -> None:
    for mutant in listed(name):
        for backend in BACKENDS:
            if (change := getattr(mutant, backend)) is not None:
                file = FOLDER.parent / f"kempnerforge_{backend}" / f"{mutant.component.replace('.', '/')}.py"
                text, replacement = change
                mutated_source(file.read_text(encoding="utf-8"), text, replacement, str(mutant))


def listed(name: str) -> list[Mutant]:
    """The mutants of all lists of a module."""
    lists = [value for value in vars(importlib.import_module(f"tests.{name}")).values() if isinstance(value, tuple)]
    found = [getattr(item, "mutant", item) for items in lists for item in items]
    return [item for item in found if isinstance(item, Mutant)]


def test_a_mutant_that_no_longer_fits_is_an_error() -> None:
    with pytest.raises(StaleMutantError, match="occurs 0 times"):
        mutated_source("a = 1", "b", "c", "module")
    with pytest.raises(StaleMutantError, match="occurs 2 times"):
        mutated_source("a = a", "a", "c", "module")


def load(backend: str) -> dict[str, Any]:
    """The backend's modules as they are importable now."""
    loaded = ("attention", "generate", "init", "modality", "position", "state", "transformer")
    names = {name: f"model.{name}" for name in loaded}
    names["optimizer"] = "training.optimizer"
    return {name: importlib.import_module(f"kempnerforge_{backend}.{path}") for name, path in names.items()}


def new_model(modules: dict[str, Any], config: ModelConfig) -> Any:
    if "torch" in modules["transformer"].__name__:
        return modules["transformer"].Transformer(config)
    return modules["transformer"].Transformer(config, rngs=None)


def build(modules: dict[str, Any], config: ModelConfig, weights: dict[str, np.ndarray]) -> Any:
    """A float64 model with these weights."""
    model = new_model(modules, config)
    if "torch" in modules["transformer"].__name__:
        model = model.double()
    else:
        graphdef, params, buffers = modules["state"].split(model)
        model = modules["state"].merge(graphdef, {n: p.astype("float64") for n, p in params.items()}, buffers)
    modules["state"].set_state(model, weights)
    return model
