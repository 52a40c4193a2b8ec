"""What a validation is made of, in every number and word: its plan, its inputs, its scenarios and its findings.

A backend of a few lines of NumPy stands for both. Arrays are told by dtype, shape and a hash: they are the same in
every process and on every machine, or traces could not be compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared_config.contract.vision import job_table
from shared_config.errors import UserError
from shared_config.interchange.checkpoint import Checkpoint
from shared_config.interchange.parts import StateParts
from shared_config.interchange.toml import config_to_dict
from shared_config.interchange.vision import tower_of
from shared_config.loader import load_config, preset_names
from shared_config.parity import full_checks
from shared_config.parity.checks import outcome
from shared_config.parity.plan import BACKENDS, Finding, Plan
from shared_config.parity.provenance import (
    check_run,
    check_trace,
    expected_meta,
    expected_names,
    initial_hash,
    missing_names,
)
from shared_config.parity.refeed import refeed_from, routes_from
from shared_config.parity.request import (
    cache_size,
    check_selection,
    decode_names,
    decode_reference,
    default_length,
    make_request,
    outputs,
    request_meta,
    routing_names,
)
from shared_config.parity.scenarios import applicable, resume_folder
from shared_config.parity.shrink import shrink
from shared_config.parity.traces import Trace
from shared_config.parity.validation import (
    chunkings,
    validation_labels,
    validation_moments,
    validation_pixels,
    validation_tokens,
    validation_weights,
)
from shared_config.schema.job import JobConfig
from tests.golden import check_golden


def flags(text: str) -> list[str]:
    """Overrides of fields, as in "model.dim=16"."""
    return [f"--{field}" for field in text.split()]


SMALL = flags("model.dim=16 model.n_heads=2 model.n_kv_heads=1 model.ffn_hidden_dim=24 model.n_layers=1")
IMAGES = SMALL + flags("vision_encoder.feature_dim=16 vision_encoder.n_heads=2 vision_encoder.n_layers=1")
DRAWN = flags("vision_encoder.type=random vision_encoder.patch_size=0 vision_encoder.n_heads=0")
DRAWN += flags("vision_encoder.n_layers=0 vision_encoder.num_tokens=16")
WINDOWED = SMALL + flags("model.sliding_window=40 model.norm_type=layernorm model.attention_bias=true")
MOVING = IMAGES + flags("video.max_frames=3 video.min_frames=1 video.frame_size=16 vision_encoder.image_size=16")
CONFIGS: dict[str, JobConfig] = {
    "text": load_config("debug", [*SMALL, "--model.vocab_size=300"]),
    "window": load_config("debug", WINDOWED),
    "experts": load_config("debug_moe", SMALL + flags("model.moe_capacity_factor=1.5 model.n_layers=2")),
    "moma": load_config("debug_vlm_moma", IMAGES),
    "joint": load_config("debug_vlm_joint_decoder", MOVING),
    "mot": load_config("debug_vlm_mot", IMAGES + flags("vlm.max_text_len=20 train.seq_len=20")),
}


def digest(array: Any) -> str:
    """Dtype, shape and a hash of the bytes."""
    array = np.ascontiguousarray(array)
    return f"{array.dtype}{list(np.shape(array))}:{hashlib.sha256(array.tobytes()).hexdigest()[:10]}"


def digests(arrays: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={digest(array)}" for name, array in arrays.items())


def together(arrays: Mapping[str, Any]) -> str:
    """One hash for many."""
    return f"{len(arrays)} {hashlib.sha256(digests(arrays).encode()).hexdigest()[:12]}"


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises((UserError, ValueError)) as caught:
        call()
    return f"{type(caught.value).__name__}: {caught.value}"


def test_inputs_of_a_validation() -> None:
    lines = []
    for name, config in CONFIGS.items():
        table = job_table(config, tower_of(config))
        for seed in (0, 5):
            weights = validation_weights(table, seed)
            lines.append(
                f"{name} {seed} weights {together(weights)} moments {together(validation_moments(table, seed))}"
            )
    lines += [digests({name: array for name, array in weights.items() if "layers.0." in name})]
    lines += [digests(validation_weights(job_table(CONFIGS["experts"], None), 1)),
              digests(validation_moments(job_table(CONFIGS["text"], None), 1))]  # fmt: skip
    tokens = validation_tokens(300, 5, 9, 3)
    lines += [str(tokens.tolist()), str(validation_labels(tokens).tolist()), digest(validation_labels(tokens))]
    pixels = validation_pixels((2, 3, 4, 4), 3)
    lines += [digest(pixels), f"{pixels.min()} {pixels.max()} {sorted(set(pixels.ravel()))[:3]}"]
    lines += [f"{length} {seed} {chunkings(length, seed)}" for length in range(1, 27) for seed in (0, 3)]
    check_golden("validation_inputs.txt", "\n".join(lines) + "\n")


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in fields.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def test_shrunk_configs() -> None:
    lines = []
    scaled = "model.rope_scaling.type=yarn model.rope_scaling.factor=4.0 model.rope_scaling.original_max_seq_len=4096"
    changed = {
        "debug": flags("model.head_dim=48"),
        "llama3_8b": flags(f"{scaled} model.sliding_window=13"),
        "debug_moe": flags("model.num_experts=9 model.moe_top_k=5 model.moe_frequency=3 model.n_layers=9"),
        "debug_vlm_joint_decoder": DRAWN + flags("adapter.type=attentional_pool adapter.pool_heads=1"),
        "debug_vlm_cross_attention": flags("model.n_layers=6 vlm.cross_attention_every_n_layers=3")
        + flags("adapter.hidden_dim=65"),
    }
    for name, overrides in [*((name, []) for name in preset_names()), *changed.items()]:
        config = load_config(name, overrides)
        before, after = (flat(config_to_dict(each)) for each in (config, shrink(config)))
        changed_to = {key: after.get(key) for key in {**before, **after} if before.get(key) != after.get(key)}
        lines.append(f"{name} {overrides} {changed_to}")
    check_golden("shrunk.txt", "\n".join(lines) + "\n")


SELECTIONS: list[dict[str, Any]] = [
    {}, {"layers": (0,)}, {"only": ("decode/*",)}, {"only": ("updated/*norm*",)}, {"only": ("gradient/*norm*",)},
    {"only": ("*output_head*",)}, {"layers": (), "only": ("x",)},
]  # fmt: skip


def test_requests() -> None:
    lines = []
    for name, config in CONFIGS.items():
        for place, selection in enumerate(SELECTIONS):
            request = make_request(
                config, dtype="float32", seed=place, weights="init" if place % 2 else "validation", **selection
            )
            modules = [
                "token_embedding",
                "layers.0.mlp",
                "layers.0.mlp.router",
                "norm",
                "transformer.layers.0.attention",
            ]
            trained = ["norm.weight", "layers.0.attention_norm.weight", "output_head.proj.weight"]
            meta = dataclasses.replace(request_meta(request), machine="", versions={}, config="")
            lines.append(f"{name} {selection} {request.selection} {request.origin} {together(request.weights)}")
            lines.append(f"  {digest(request.tokens)} {digest(request.labels)} "
                         f"{None if request.pixels is None else digest(request.pixels)} {meta}")  # fmt: skip
            lines.append(f"  {request.modules(modules)} {request.differentiated(trained)} {request.updates(trained)} "
                         f"{request.unlimited} {request.decodes} {cache_size(request, 5)}")  # fmt: skip
        lines.append(
            f"  {decode_names(request)} {decode_reference(config)} {default_length(config)} {outputs('m', config)}"
        )
    modules = ["layers.0", "layers.0.mlp.router", "transformer.layers.1.mlp.experts.image.router", "norm"]
    lines.append(str(list(routing_names(modules, ("aux_loss", "expert_counts")))))
    for window, longest in (
        (None, 10),
        (None, 24),
        (None, 25),
        (15, 99),
        (16, 99),
        (17, 99),
        (119, 500),
        (121, 500),
        (300, 90),
    ):
        model = CONFIGS["text"].model.replace(sliding_window=window, max_seq_len=longest)
        changed = CONFIGS["text"].replace(model=model, train=CONFIGS["text"].train.replace(seq_len=4))
        lines.append(f"{window} {longest} {default_length(changed)}")
    check_golden("requests.txt", "\n".join(lines) + "\n")


def test_refusals_of_requests() -> None:
    text, mot = CONFIGS["text"], CONFIGS["mot"]
    short = text.replace(model=text.model.replace(max_seq_len=4), train=text.train.replace(seq_len=4))

    def tokens(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int32)

    def ask(config: JobConfig = text, **given: Any) -> Callable[[], Any]:
        return lambda: make_request(config, **{"dtype": "float32", "seed": 0, **given})

    def select(**given: Any) -> Callable[[], Any]:
        request = make_request(text, dtype="float32", seed=0, **given)
        return lambda: check_selection(request, ["layers.0", "layers.0.mlp.router", "output_head"], ["z"])

    last, first = tokens(2, 3), tokens(2, 3)
    last[1, 2], first[0, 1], first[1, 1] = 300, -1, 301
    refusals = [ask(dtype="float16"), ask(weights="drawn"), ask(tokens=tokens(3)), ask(tokens=tokens(2, 0)),
                ask(tokens=np.zeros((1, 2))), ask(short, tokens=tokens(1, 5)), ask(mot, tokens=tokens(1, 21)),
                ask(tokens=last), ask(tokens=first), select(layers=(1,)), select(layers=(-1,)), select(only=("x/y",)),
                select(only=("layers.0.mlp.gate_prj.weight",)), select(only=("decode/singel",)),
                select(only=("routing/layers.0.zz",)), select(only=("zzzzzz",))]  # fmt: skip
    lines = [refused(call) for call in refusals]
    last[1, 2] = 299
    for config, given in ((short, tokens(1, 4)), (mot, tokens(1, 20)), (text, last), (text, last.astype(np.int64))):
        assert make_request(config, dtype="float32", seed=0, tokens=given).tokens.dtype == np.int32
    for pattern in ("routing/layers.0.z", "layers.0.mlp.router.indices", "decode/drawn", "updated/norm.weight", "loss"):
        select(only=(pattern,))()
    check_golden("refused_requests.txt", "\n".join(lines) + "\n")


def plans() -> dict[str, Plan]:
    folder = Path("/run")
    given: dict[str, Any] = {"weights": Path("/w"), "weights_hash": "ab", "overrides": ("--model.dim=16",)}
    data = "train.batch_size=40 train.seq_len=200 scheduler.warmup_steps=200"
    text = load_config("debug", SMALL + flags(data))
    long = text.replace(model=text.model.replace(max_seq_len=700))
    made = {name: Plan(config, folder, full=True) for name, config in CONFIGS.items()}
    made["default"] = Plan(text, folder)
    made["given"] = Plan(long, folder, ("float64", "bfloat16"), 3, 2, "cuda", full=True, **given)
    made["untrained"] = Plan(CONFIGS["moma"], folder, ("bfloat16", "float64"), steps=0, **given)
    return made


def test_plans() -> None:
    lines = []
    for name, plan in plans().items():
        lines.append(f"{name}: {[check.name for check in plan.checks]} {plan.stages} {applicable(plan.config)}")
        for check in plan.checks:
            for backend in BACKENDS:
                for job in check.jobs(plan, backend):
                    words = [word if len(word) < 200 else f"{len(word)}:{digest(list(word.encode()))}" for word in job]
                    lines.append(f"  {check.stage} {check.name}: {' '.join(words)}")
    lines.append(f"{full_checks.LONG_SEQUENCE} {sorted(plan.files())}")
    lines += [str(plan.jobs_file("jax", stage)) for stage in (0, 1)] + [str(plan.run_folder("jax"))]
    lines += [str(resume_folder(Path("/run"), "jax", 1)), str(list(map(str, plan.traces()[:3])))]
    check_golden("plans.txt", "\n".join(lines) + "\n")


def test_outcomes() -> None:
    named = {"y": {"ok": True}, "d": {"ok": False}, "t": {"ok": False, "backend": "torch"}}
    named["j"] = {"ok": False, "backend": "jax"}
    made = {letter: Finding("check", "subject", **fields) for letter, fields in named.items()}
    assert {text: outcome([made[letter] for letter in text]) for text in ("y", "yd", "yt", "dtjj", "jd", "tjyy")} == {
        "y": "the backends agree",
        "yd": "the backends DIFFER in 1 of 2 comparisons",
        "yt": "the backends agree; torch DISAGREES WITH ITSELF in 1 of 2 comparisons",
        "dtjj": "the backends DIFFER in 1 of 4 comparisons; torch DISAGREES WITH ITSELF in 1 of 4 comparisons; "
        "jax DISAGREES WITH ITSELF in 2 of 4 comparisons",
        "jd": "the backends DIFFER in 1 of 2 comparisons; jax DISAGREES WITH ITSELF in 1 of 2 comparisons",
        "tjyy": "the backends agree; torch DISAGREES WITH ITSELF in 1 of 4 comparisons; "
        "jax DISAGREES WITH ITSELF in 1 of 4 comparisons",
    }


# Provenance, and what is fed again


def test_what_a_trace_says_of_itself(tmp_path: Path) -> None:
    config = CONFIGS["experts"]
    expected = dataclasses.replace(expected_meta(config, 3), backend="jax", device="cpu", initial_hash="ab")
    given = expected_meta(config, 3, "abcd", only=["norm"], tokens=np.ones((1, 4), np.int32))
    lines = [f"{given.weights} {given.weights_hash} {given.selection} {given.tokens_hash[:12]} {given.dtype}"]
    tensors = {"loss": np.ones(())}
    changes: dict[str, Any] = {
        "backend": "torch", "dtype": "float32", "seed": 4, "weights": "init", "weights_hash": "cd",
        "tokens_hash": "cd", "selection": {"layers": [1]}, "refed": {"x": 1}, "initial_hash": "", "device": "cuda",
        "extra": {"scenario": "ring"},
        "config": expected.config.replace("dim = 16", "dim = 17"),
    }  # fmt: skip
    for field, value in changes.items():
        trace = Trace(tensors, dataclasses.replace(expected, **{field: value}))
        lines.append(f"{field}: {refused(lambda trace=trace: check_trace(trace, expected, Path('/x')))}")
    all_wrong = Trace(tensors, dataclasses.replace(expected, **changes))
    lines.append(refused(lambda: check_trace(all_wrong, expected, Path("/x"))))
    right = Trace(tensors, dataclasses.replace(expected, machine="other", versions={}))
    assert check_trace(right, expected, Path("/x")) is right
    scenario = dataclasses.replace(expected, extra={"scenario": "ring"})
    unsaid = Trace(tensors, dataclasses.replace(scenario, initial_hash=""))
    assert check_trace(unsaid, scenario, Path("/x")) is unsaid
    cards = Trace(tensors, dataclasses.replace(expected, device="H100"))
    assert check_trace(cards, dataclasses.replace(expected, device="cuda"), Path("/x")) is cards
    run = Checkpoint(Path("/c"), StateParts(1, {}, {}), 0, "", config_to_dict(config), "jax", {})
    assert check_run(run, "jax", config) is run
    lines.append(refused(lambda: check_run(run, "torch", config)))
    lines.append(refused(lambda: check_run(run, "jax", CONFIGS["text"])))
    for name, each in CONFIGS.items():
        names = expected_names(each)
        lines.append(f"{name} {len(names)} {names[:4]} {names[-6:]} {digest(list(' '.join(names).encode()))}")
    traces = [Trace({"forward/a": np.ones(1)}, expected), Trace({"routing/b": np.ones(1)}, expected)]
    lines.append(str(missing_names(traces, ["forward/a", "forward/b", "routing", "gradient", "routing/b"])))
    vit = CONFIGS["moma"]
    assert vit.vision_encoder is not None
    for each in (CONFIGS["text"], vit, load_config("debug_vlm_moma", SMALL + DRAWN)):
        lines += [f"{initial_hash(each, 1)} {initial_hash(each, 2)}"]
    check_golden("provenance.txt", "\n".join(lines) + "\n")
    warm = load_config(
        "debug_vlm_mot", [*SMALL, *DRAWN, "--vlm.mot_warm_start_from_text=true", "--vlm.mot_warm_start_path=weights"]
    )
    assert initial_hash(warm, 1) is None


MODULES = [
    "token_embedding",
    "layers.0",
    "layers.0.mlp",
    "norm",
    "output_head",
    "mot_norms.image",
    "layers.10",
    "normal",
]


@pytest.mark.parametrize(("name", "path"), [("experts", ""), ("moma", "transformer.")])
def test_what_layers_are_fed_again(name: str, path: str) -> None:
    config = CONFIGS[name]
    origin = dataclasses.replace(expected_meta(config, 3), backend="torch", device="cpu")
    tensors: dict[str, Any] = {f"forward/{path}{module}": np.full(2, 1.0 * i) for i, module in enumerate(MODULES)}
    tensors |= {f"forward/{module}": np.ones(3) for module in ("vision_encoder", "adapter", "xlayers.1")}
    losses = ("aux_loss", "z_loss", "expert_counts")
    tensors |= {f"routing/{path}layers.0.{loss}": np.ones(4) for loss in losses} | {"loss": np.ones(())}
    trace, without = Trace(tensors, origin), Trace({"forward/layers.0.mlp": np.ones(1)}, origin)
    fed, other = (dataclasses.replace(origin, **field) for field in ({"refed": {"x": 1}}, {"seed": 4}))
    found = refeed_from(trace, origin, config)
    lines = [f"{digests(found.outputs)} {digests(found.losses)} {found.meta}"]
    for given, expected in (
        (trace, other),
        (trace.summarized(0), origin),
        (without, origin),
        (Trace(tensors, fed), fed),
    ):
        with pytest.raises(UserError) as caught:
            refeed_from(given, expected, config)
        lines.append(str(caught.value))
    with pytest.raises(UserError) as caught:
        routes_from(trace, origin, config)
    check_golden(f"refed_{name}.txt", "\n".join([*lines, str(caught.value)]) + "\n")


def test_routes_that_are_taken_again() -> None:
    config = CONFIGS["moma"]
    assert config.vlm is not None
    origin = expected_meta(config, 3)
    routers = [f"transformer.layers.0.mlp.experts.{modality}.router" for modality in config.vlm.modalities]
    right: dict[str, Any] = {f"routing/{router}.indices": np.arange(4).reshape(2, 2) for router in routers}
    taken = routes_from(Trace(right, origin), origin, config)
    assert list(taken) == routers
    assert all(array is right[f"routing/{router}.indices"] for router, array in taken.items())
    assert routes_from(Trace({name: array[:0] for name, array in right.items()}, origin), origin, config)
    last = f"routing/{routers[-1]}.indices"
    other = dataclasses.replace(origin, seed=9)
    refusals: list[tuple[str, Any, Any]] = [
        ("routes: this run and the other trace are not of the same run:\n  seed: 9 and 3", other, right)
    ]
    for wrong, dtype in ((np.array([[0, -1]]), "int64"), (np.ones((2, 2)), "float64"), (np.array([[True]]), "bool")):
        refusals.append((f"routes: {last} is {dtype}: must be indices, 0 or more", origin, {**right, last: wrong}))
    lacking = Trace({**right, last: Trace(right, origin).summarized(0).tensors[last]}, origin).tensors
    refusals.append(
        (
            "routes: the other trace lacks what router 0.text chose, routing/....indices; one of a whole run is needed",
            origin,
            dict(lacking),
        )
    )
    for message, meta, tensors in refusals:
        with pytest.raises(UserError) as caught:
            routes_from(Trace(tensors, origin), meta, config)
        assert str(caught.value) == message
