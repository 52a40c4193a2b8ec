"""The backends are twins: the same files, in each the same public names in the same order, with the same members and
arguments. What differs on purpose stands here with its reason, and nothing stands here that does not differ.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
BACKENDS = ("torch", "jax")
IMPLIED = {"self", "cls", "rngs"}
"""Arguments that are not compared: JAX constructors are also given ``rngs``."""

FILES = {
    "functions.py": "jax: modules of several libraries, taken apart; torch has one kind",
    "huggingface.py": "torch: the models of transformers are torch's",
    "model/cuda_graph.py": "torch: XLA compiles and launches its own programs",
    "model/kept_steps.py": "torch: recorded steps; jit keeps its programs itself",
    "model/module.py": "jax: torch's modules have named walks, hooks and casts built in",
    "model/mosaic.py": "jax: torch has its kernel for products over groups behind one public function",
    "model/scan.py": "jax: stacks of layers bound compile time; torch compiles block by block",
    "model/stack.py": "jax: stacks of layers",
    "programs.py": "torch: its compiler limits how many programs a function has",
    "training/adamw_kernel.py": "torch: XLA makes kernels itself",
    "training/recorded.py": "torch: a compiled step of JAX is one program",
    "training/fused_adamw.py": "torch: XLA fuses what a step does to a parameter",
    "observed.py": "torch: hooks show what is inside",
    "copies.py": "torch: modules change as they run",
    "program.py": "jax: names inside of programs show what is inside",
    "taps.py": "jax: names inside of programs show what is inside",
    "training/groups.py": "torch: an optimiser holds its parameters, by groups",
    "training/whole.py": "jax: what optax has no type for",
    "model/within_map.py": "jax: layers within a map over devices; torch puts other methods in their place",
}
"""Files that one backend has alone."""

ENGINES = {
    "distributed/ahead_of_time.py": "jax: XLA compiles for devices that are elsewhere",
    "distributed/collectives.py": "torch: sums and exchanges with gradients; in JAX operations of lax",
    "distributed/context_parallel.py": "both: torch puts methods in the place of others; JAX within a map over devices",
    "distributed/devices.py": "jax: type checkers know nothing of its devices",
    "distributed/expert_parallel.py": "both: torch has operators with gradients, or sends rows to where they belong",
    "distributed/failures.py": "torch: the service that joins JAX's processes ends the others itself",
    "distributed/flops.py": "jax: programs that can be read",
    "distributed/fsdp.py": "both: FSDP2 gathers by hooks; JAX within a map over the data ranks",
    "distributed/health.py": "both: a process of torch has one device, those of JAX have all that they see",
    "distributed/hlo.py": "jax: programs that can be read",
    "distributed/mesh.py": "both: torch's has groups of processes; JAX's has devices",
    "distributed/parallelize.py": "torch: a layout changes the modules; in JAX it places arrays",
    "distributed/pipeline.py": "torch: stages are processes, which its engine lets send and receive",
    "distributed/processes.py": "both: a process of torch has one device, those of JAX have all that they see",
    "distributed/ranks.py": "both: torch sums over processes; in JAX that is part of the compiled step",
    "distributed/sequence_parallel.py": "torch: modules see a part of the positions; XLA divides operations itself",
    "distributed/sharding.py": "jax: arrays lie where they are put, and XLA computes there",
    "distributed/spawn.py": "torch: layouts on one machine, a process for each device; JAX has several in one",
    "distributed/states.py": "both: what a process holds of a tensor each framework says in its own way",
    "distributed/tensor_parallel.py": "torch: modules compute with parts; XLA divides operations itself",
    "distributed/vocabulary.py": "torch: the loss over parts of the vocabulary; XLA divides operations itself",
}
"""Files on each framework's own engine, which are not compared name by name: tests/distributed holds both backends to
one device.
"""

DIFFERENCES = {
    "bench.py": {
        "Foreign": "torch: transformers has its models there",
        "NO_KERNELS": "jax: its profiler names no kernels on a CPU",
        "kernels_of": "jax: its profiler writes a file; torch's gives the events",
        "kept_by_graphs": "torch: its allocator does not count what a CUDA graph holds between replays",
    },
    "device.py": {"to_device": "torch: memory has to be pinned for it; JAX copies by itself"},
    "model/architecture.py": {"Architecture.breaks_after": "jax: where a scan over layers must end"},
    "model/attention.py": {
        "SCORES": "jax: what a scan over layers does not keep",
        "SDPA_BACKENDS": "torch: its attention has kernels to choose from",
        "attend(sdpa_backend)": "torch: its attention has kernels to choose from",
        "prepare_mask(device)": "torch: arrays are made on a device",
    },
    "model/cross_attention.py": {"CrossAttentionArchitecture.breaks_after": "jax: where a scan over layers must end"},
    "model/decode_state.py": {
        "DecodeState.static": "torch: eager shapes may follow the fill; in JAX all shapes are static",
        "new_state(static)": "torch: eager shapes may follow the fill; in JAX all shapes are static",
    },
    "model/embedding.py": {
        "OutputHead.factors(tied_weight)": "jax: no array belongs to two modules",
        "OutputHead.forward(tied_weight)": "jax: no array belongs to two modules",
    },
    "model/expert_choice.py": {"MAX_SEED": "torch: draws a seed of its own where none is given"},
    "model/dispatch.py": {
        "Routes.block": "jax: its kernels pay for rows of no group, of which a loop leaves most out",
        "Routes.complete": "torch: its kernel leaves rows of no group undefined, which costs a pass",
    },
    "model/experts.py": {
        "apply_blockwise": "jax: its kernels pay for rows of no group, of which a loop leaves most out",
    },
    "model/decode.py": {
        "STEPS_TOGETHER": "jax: torch's loop runs on the host",
        "decode_all(compile)": "torch: JAX always compiles",
        "steps(compile)": "torch: JAX always compiles",
    },
    "model/generate.py": {
        "generate(compile)": "torch: JAX always compiles",
        "stream(compile)": "torch: JAX always compiles",
    },
    "model/grouped.py": {
        "GROUPED_MATMUL": "torch: an operator of its own, by the name that dispatchers see",
        "grouped_matmul(complete)": "torch: its kernel leaves rows of no group undefined, which costs a pass",
        "looped_matmul(complete)": "torch: its kernel leaves rows of no group undefined, which costs a pass",
        "looped_matmul(loop_rows)": "jax: blocks of static shape",
        "looped_outer(loop_rows)": "jax: blocks of static shape",
        "ragged_matmul": "jax: XLA's own operation",
        "ragged_outer": "jax: XLA's own operation",
        "skips_rows": "torch: JAX computes rows in blocks, whatever its kernels do",
    },
    "model/fp8.py": {"has_units": "torch: XLA knows what a device can do"},
    "model/fused.py": {
        **dict.fromkeys(("SEGMENTS", "of_segments", "segments_of"), "jax: shapes are static"),
        "fused_attention(softcap)": "torch: the kernel of JAX has no soft caps",
        "fused_attention(otherwise)": "jax: what its kernel can't do is known as the program runs",
        "has_kernel(device)": "torch: JAX has a default device",
        "with_fused(device)": "torch: arrays are made on a device",
    },
    "model/mask.py": {
        "Mask.plain": "torch: whether SDPA's own causal form says all",
        "Segments": "jax: what its kernel takes; torch's has a type of its own",
        "Spans": "jax: of segments",
        "dense_mask(device)": "torch: arrays are made on a device",
        "with_positions(device)": "torch: arrays are made on a device",
        "with_dense(device)": "torch: arrays are made on a device",
    },
    "model/kv_cache.py": {
        "KVCache(static)": "torch: eager shapes may follow the fill; in JAX all shapes are static",
        "KVCache.static": "torch: eager shapes may follow the fill; in JAX all shapes are static",
        "SharedCaches": "jax: a buffer is given to a program once",
        "new_caches(static)": "torch: eager shapes may follow the fill; in JAX all shapes are static",
    },
    "model/linear.py": {
        "broadcast": "jax: sums its gradient in float32; torch's sums do",
        "silence": "jax: torch has nn.init.zeros_",
        "look_up": "torch: ranks look up in their parts of a table",
    },
    "model/modality.py": {
        "ARRAYS": "jax: the leaves of a context, which is a pytree",
        "ModalityContext.tree_flatten_with_keys": "jax: pytree",
        "ModalityContext.tree_unflatten": "jax: pytree",
    },
    "model/moma.py": {
        "MoMaFFN.layer_idx": "torch: what the tensor is set to",
        "MoMaFFN.reset": "torch: sets the tensor",
        "MoMaFFN.set_layer": "jax: sets the array",
    },
    "model/mot.py": {
        "MoTAttention.kv_heads": "torch: kept for the views of each modality",
    },
    "model/request.py": {"inference": "torch: modules have a mode, and calls record gradients"},
    "model/sampling.py": {
        "sample(generator)": "torch: the state of its random numbers",
        "sample(key)": "jax: the state of its random numbers",
    },
    "model/state.py": {
        "assign": "torch: tensors are written to, sharded ones too",
        "held_dtype": "jax: has 64 bits only where it is told so",
        "like": "jax: an array is made as another lies, torch's are written to",
        "on_device": "jax: a cast there is a program of its own for each shape",
        "merge": "jax: flat dicts cross jit, modules don't",
        "own_tensors": "torch: tensors, which are their own variables",
        "own_variables": "jax: variables, which hold arrays",
        "split": "jax: flat dicts cross jit, modules don't",
    },
    "model/transformer.py": {
        "Transformer.forward(factored_logits)": "torch: hooks and compilers see forward alone, so run goes through it",
        "Transformer.forward(return_stats)": "torch: hooks and compilers see forward alone, so run goes through it",
        "Transformer.run(remat)": "jax: a transformation of the trace; torch wraps the blocks",
        "Transformer.run(scan_layers)": "jax: a transformation of the trace",
    },
    "model/vision.py": {
        "gelu_tanh": "jax: has no such function under a name that computes in float32",
    },
    "model/wrappers.py": {
        "is_observed": "torch: modules have hooks; JAX's own module knows who observes",
        "uncompiled": "torch: a compiled module runs no hooks that came later; jit has no modules",
    },
    "model/vlm.py": {
        "VLMWrapper.forward(factored_logits)": "torch: hooks and compilers see forward alone, so run goes through it",
        "VLMWrapper.forward(kv_caches)": "torch: hooks and compilers see forward alone, so run goes through it",
        "VLMWrapper.forward(return_stats)": "torch: hooks and compilers see forward alone, so run goes through it",
        "VLMWrapper.run(remat)": "jax: a transformation of the trace; torch wraps the blocks",
        "VLMWrapper.run(scan_layers)": "jax: a transformation of the trace",
    },
    "optimizer_states.py": {
        "optimizer_state(optimizer)": "torch: the optimiser holds its state",
        "optimizer_state(state)": "jax: the state is a value",
    },
    "parity.py": {
        "OptimizerOf.init": "jax: optimisers are told by their methods, and optax is not needed",
        "OptimizerOf.update": "jax: optimisers are told by their methods, and optax is not needed",
        "Parameters": "jax: what optimisers take; torch's hold theirs",
    },
    "statistics.py": {
        **dict.fromkeys(("Description", "PutOut", "described", "kept", "put_out"), "jax: a program puts out moments"),
        **dict.fromkeys(("Keeper", "Kept", "Key", "Pending", "fetched"), "torch: tensors come one after another"),
        "AddedToError": "torch: gradients come in parts",
        "compiling": "jax: programs are compiled when they are first called",
        **dict.fromkeys(("moments(array)", "reduced(array)"), "jax: what its tensors are called"),
        **dict.fromkeys(("moments(tensor)", "reduced(tensor)"), "torch: what its arrays are called"),
    },
    "trace.py": {"Recorder(device)": "torch: models live on a device"},
    "training/averaging.py": {
        "evaluated_weights(optimizer)": "torch: the optimiser holds its state",
        "evaluated_weights(state)": "jax: the state is a value",
    },
    "training/freeze.py": {
        "FROZEN": "jax: the metadata of a frozen variable; torch has requires_grad",
    },
    "training/loss.py": {
        "CHUNK_ELEMENTS": "torch: rows that are widened at a time; XLA fuses the widening",
        "cross_entropy(fused)": "torch: eager or compiled; JAX always compiles",
    },
    "training/optimizer.py": {
        "AdamW": "torch: of shards; in JAX a function of values",
        "Step": "torch: what a fused step is, too; XLA fuses it",
        "clip_factor": "torch: what a fused step scales by as it reads",
        "FOUND_INF": "torch: how its AdamW is told to leave a step out; JAX selects values",
        "adamw(groups)": "torch: an optimiser holds its parameters",
        "Averaged": "jax: the state is a value, of named tuples",
        "Optimizer": "jax: functions of values; torch's is a class of its own",
        "OptimizerState": "jax: name of a type",
        "clip_by_global_norm(stages)": "torch: ranks of a pipeline have gradients of their own stage",
        "get_optimizer_state(optimizer)": "torch: the optimiser holds its state, by tensor",
        "get_optimizer_state(parameters)": "torch: the optimiser holds its state, by tensor",
        "get_optimizer_state(state)": "jax: the state is a value",
        "arrays_by_kind": "jax: stacks of layers",
        "states_of": "jax: the state is a value, of which frozen parameters need none",
        "with_states": "jax: the state is a value, of which frozen parameters need none",
        "set_rates": "torch: the optimiser holds its rates",
        "set_optimizer_state(moments)": "jax: state is what optax calls its own",
        "set_optimizer_state(optimizer)": "torch: the optimiser holds its state, by tensor",
        "set_optimizer_state(parameters)": "torch: the optimiser holds its state, by tensor",
        "update(gradients)": "jax: a step is a function of values; torch's tensors hold theirs",
        "update(state)": "jax: a step is a function of values; torch's optimiser holds it",
        "update(parameters)": "jax: a step is a function of values; torch's optimiser holds them",
        "stays_finite(gradients)": "torch: tensors hold their gradients",
        "stays_finite(parameters)": "torch: the optimiser holds its parameters",
        "stays_finite(state)": "jax: the state is a value",
    },
    "training/blocks.py": {
        "REMATERIALISATION": "jax: policies of checkpointing",
        "blocks": "torch: what is wrapped, compiled and sharded one by one",
        "checkpoint_activations": "torch: wraps the blocks",
        "compile_blocks": "torch: compiles block by block",
    },
    "training/mixed_precision.py": {
        "Copies": "torch: leaves of the graph; in JAX made within the compiled step",
    },
    "training/objective.py": {
        "Objective": "torch: a module, so that the head and the loss are compiled as one",
        "Recipe": "jax: what is static in a compiled step",
        "compute_copy": "jax: arrays are cast within the compiled step",
        "gradients_of": "jax: micro-batches are scanned within the compiled step",
        "summed_loss": "jax: mapped over the data ranks within the compiled evaluation",
    },
    "training/lion.py": {
        "Lion": "torch: an optimiser is a class",
        "lion": "jax: an optimiser is a transformation",
    },
    "training/muon.py": {
        "Muon": "torch: an optimiser is a class",
        "MuonState": "jax: the state is a value",
        "muon": "jax: an optimiser is a transformation",
    },
    "training/sampling.py": {
        "Writer.model": "torch: the masters lie in the model",
        "Writer.optimizer": "torch: holds its state",
        "Writer.buffers": "jax: arrays live beside the graph",
        "Writer.optimizer_state": "jax: a value",
        "Writer.recipe": "jax: what is static in a compiled step",
    },
    "training/schedule_free.py": {
        "ScheduleFreeAdamW": "torch: an optimiser is a class",
        "ScheduleFreeState": "jax: the state is a value",
        "schedule_free_adamw": "jax: an optimiser is a transformation",
    },
    "moments_kernel.py": {
        "quietly": "jax: Triton is to leave it",
        "run_moments(first)": "torch: what kernels read is kept for all tensors; in JAX it is part of the program",
        "run_moments(interpret)": "jax: torch's kernel is interpreted where the environment says so",
        "run_moments(signs)": "torch: as first",
        "run_moments(times)": "torch: as first",
    },
    "training/terms.py": {
        "summed": "torch: sums on the host; in JAX part of the compiled step",
    },
    "training/train.py": {
        "Trainer.masters": "torch: what is cast to the compute dtype, frozen ones included; a model holds them in JAX",
        "Trainer.copies": "torch: in JAX made within the compiled step",
        "Trainer.buffers": "jax: arrays live beside the graph",
        "Trainer.compute_dtype": "torch: in JAX part of the recipe",
        "Trainer.optimizer": "torch: holds its state",
        "Trainer.optimizer_state": "jax: a value",
        "Trainer.recipe": "jax: what is static in a compiled step",
        "compiled_evaluation": "jax: the whole evaluation is one program",
        "compiled_step": "jax: the whole step is one program",
    },
}
"""By file, what one backend has alone: a name, ``Class.member``, or an argument ``function(argument)``."""

VALUES = {
    "parity.py": {"Function": "modules of each framework"},
    "model/architecture.py": {"Modules": "JAX's containers of modules are no modules of this package"},
    "model/grouped.py": {"TILE_ROWS": "torch's tiles are for GPUs and CPUs, JAX's for XLA's loops"},
}
"""Constants and defaults that both backends have, with other values."""


def test_both_backends_have_the_same_files() -> None:
    torch_files, jax_files = (files_of(backend) for backend in BACKENDS)
    assert torch_files ^ jax_files == set(FILES)
    torch_engines, jax_engines = (files_of(backend, engines=True) for backend in BACKENDS)
    whose = {file: reason.partition(": ")[0] for file, reason in ENGINES.items()}
    assert {file for file, whose in whose.items() if whose != "jax"} == torch_engines
    assert {file for file, whose in whose.items() if whose != "torch"} == jax_engines


def test_the_comparison_sees_a_difference(tmp_path: Path) -> None:
    source = "A = 1\nclass B:\n  def __init__(self, x):\n    self.y = x\n  def f(self, z): ...\ndef g(a, *, b): ...\n"
    (tmp_path / "one.py").write_text(source)
    names = described(tmp_path / "one.py")
    assert names == ["A", "B", "B(x)", "B.y", "B.f", "B.f(z)", "g", "g(a)", "g(b)"]
    assert without_parts({"B", "B(x)", "B.f", "B.f(z)", "g(a)", "C.f", "C.f(z)"}) == {"B", "g(a)", "C.f"}


def test_twins_have_the_same_names_members_and_arguments() -> None:
    unexplained, stale = [], []
    for file in common_files():
        torch_names, jax_names = (set(described(path_of(backend, file))) for backend in BACKENDS)
        found, listed = without_parts(torch_names ^ jax_names), set(DIFFERENCES.get(file, {}))
        unexplained += [f"{file}: {name}" for name in sorted(found - listed)]
        stale += [f"{file}: {name}" for name in sorted(listed - found)]
    assert not unexplained, f"only one backend has {unexplained}"
    assert not stale, f"listed as different, but in both backends or in none: {stale}"


def test_twins_define_and_take_arguments_in_the_same_order() -> None:
    for file in common_files():
        torch_names, jax_names = (described(path_of(backend, file)) for backend in BACKENDS)
        ordered = {name for name in set(torch_names) & set(jax_names) if "." not in name or "(" in name}
        assert [n for n in torch_names if n in ordered] == [n for n in jax_names if n in ordered], file


def test_twins_have_the_same_constants_and_defaults() -> None:
    compared = 0
    for file in common_files():
        torch_values, jax_values = (values(path_of(backend, file)) for backend in BACKENDS)
        common = set(torch_values) & set(jax_values)
        differ = {name for name in common if torch_values[name] != jax_values[name]}
        assert differ == set(VALUES.get(file, {})), f"{file}: values differ, or are listed and do not"
        compared += len(common)
    assert compared > 200


def test_the_comparison_sees_a_value(tmp_path: Path) -> None:
    methods = "  def __init__(self, x=2): ...\n  def f(self, *, z=None): ...\n"
    source = f"A = 1\nB = torch.float32\nclass C:\n  y: int = 3\n{methods}def g(a, b=-1): ...\n"
    (tmp_path / "one.py").write_text(source)
    assert values(tmp_path / "one.py") == {"A": "1", "C(x)": "2", "C.y": "3", "C.f(z)": "None", "g(b)": "-1"}


def test_every_reason_says_whose_it_is() -> None:
    assert all(len(reason.partition(": ")[2]) > 4 for reason in ENGINES.values())
    reasons = [*FILES.values(), *(reason for named in DIFFERENCES.values() for reason in named.values())]
    assert all(reason.partition(": ")[0] in BACKENDS and len(reason.partition(": ")[2]) > 4 for reason in reasons)


def test_the_same_builders_are_registered() -> None:
    categories = ("model", "architecture", "norm", "mlp", "router", "adapter", "vision_encoder", "optimizer")
    registered = {backend: registered_in(backend, categories) for backend in BACKENDS}
    assert registered["torch"] == registered["jax"]
    assert all(registered["torch"].values())


def files_of(backend: str, *, engines: bool = False) -> set[str]:
    """Files of a backend, or those of its engine."""
    package = ROOT / f"kempnerforge_{backend}"
    files = (path.relative_to(package) for path in package.rglob("*.py"))
    found = {str(file) for file in files if (file.parts[0] == "distributed") == engines}
    return found - {"distributed/__init__.py"}


def path_of(backend: str, file: str) -> Path:
    return ROOT / f"kempnerforge_{backend}" / file


def common_files() -> list[str]:
    """Files that both backends have."""
    return sorted(files_of("torch") & files_of("jax"))


def described(path: Path) -> list[str]:
    """Every public name, ``Class.member``, ``function(argument)``, ``Class.method(argument)`` of a file, in order."""
    found: list[str] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for name in _public(_names(node)):
            found.append(name)
            if isinstance(node, ast.FunctionDef):
                found += _arguments(name, node)
            elif isinstance(node, ast.ClassDef):
                found += _members(name, node)
    return found


def values(path: Path) -> dict[str, str]:
    """Constants, defaults of fields and of arguments of a file as source text, but for those that name a framework."""
    found: dict[str, str] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found |= _defaults(node.name, node)
        elif isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    found |= _defaults(node.name if part.name == "__init__" else f"{node.name}.{part.name}", part)
                found |= {f"{node.name}.{name}": text for name, text in _assigned(part).items()}
        found |= _assigned(node)
    frameworks = ("torch", "jax", "jnp", "Tensor")
    return {name: text for name, text in found.items() if not any(framework in text for framework in frameworks)}


def without_parts(names: set[str]) -> set[str]:
    """The names but for members and arguments of what is among the names itself."""
    owners = {name: {name.partition(".")[0], name.partition("(")[0]} - {name} for name in names}
    return {name for name in names if not owners[name] & names}


def registered_in(backend: str, categories: tuple[str, ...]) -> dict[str, set[str]]:
    """Names of the builders of the package itself, all its modules loaded; tests call theirs test_..."""
    for file in files_of(backend):
        importlib.import_module(f"kempnerforge_{backend}.{file.removesuffix('.py').replace('/', '.')}")
    registry = importlib.import_module(f"kempnerforge_{backend}.registry").registry
    return {
        category: {name for name in registry.names(category) if not name.startswith("test_")} for category in categories
    }


def _members(name: str, node: ast.ClassDef) -> Iterator[str]:
    """Methods with their arguments, class attributes, and attributes that ``__init__`` sets."""
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            yield from _arguments(name, statement)
            yield from (f"{name}.{attribute}" for attribute in _public(_set_in(statement)))
        for member in _public(_names(statement)):
            yield f"{name}.{member}"
            if isinstance(statement, ast.FunctionDef):
                yield from _arguments(f"{name}.{member}", statement)


def _names(node: ast.stmt) -> list[str]:
    """What a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _arguments(name: str, node: ast.FunctionDef) -> list[str]:
    listed = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [f"{name}({argument.arg})" for argument in listed if argument.arg not in IMPLIED]


def _defaults(name: str, node: ast.FunctionDef) -> dict[str, str]:
    positional = [*node.args.posonlyargs, *node.args.args]
    given = node.args.defaults
    pairs = [*zip(positional[len(positional) - len(given) :], given, strict=True)]
    pairs += [
        (argument, value) for argument, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if value
    ]
    return {f"{name}({argument.arg})": ast.unparse(value) for argument, value in pairs}


def _assigned(node: ast.stmt) -> dict[str, str]:
    if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
        return {name: ast.unparse(node.value) for name in _names(node)}
    return {}


def _set_in(node: ast.FunctionDef) -> Iterator[str]:
    """Attributes that a method sets."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            yield inner.attr


def _public(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith("_")]
