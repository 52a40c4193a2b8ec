"""What a function is given it reads: an option that nothing acts on is not taken."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("kempnerforge_torch", "kempnerforge_jax", "shared_config")
TOLD = "what all of its kind are told, of which this one needs less"
CALLED = "what torch, JAX, Pydantic or Python gives whatever it calls"
UNREAD = {
    f"{file}: {function}": reason
    for reason, functions in {
        TOLD: {
            "contract/layers.py": ("_moma_layer", "decoder_layer_parameters", "decoder_parameters"),
            "contract/vision.py": ("_attentional_pool", "_projection"),
            "data/batches.py": ("TextData.in_steps_of",),
            "data/conversations.py": ("ConversationData.in_steps_of",),
            "data/images.py": ("ImageTextData.in_steps_of",),
            "data/tokenizer.py": ("Tokenizer.encode_with_images",),
            "distributed/context_parallel.py": ("OtherParts.update",),
            "distributed/health.py": ("Bench.products", "Bench.send"),
            "distributed/vocabulary.py": ("split_cross_entropy",),
            "model/architecture.py": tuple(
                f"Architecture.{name}"
                for name in ("after_block", "block_inputs", "breaks_after", "final_norm", "precompute_image_kv")
            ),
            "model/fused.py": ("has_kernel",),
            "model/layout.py": ("Layout.positions",),
            "model/moma.py": ("MoMaArchitecture.block_inputs", "MoMaBlock.forward"),
            "model/norm.py": ("LayerNorm.__init__", "RMSNorm.__init__"),
            "model/position.py": ("RotaryTables.__init__",),
            "model/slots.py": ("LinearSlots.fits",),
            "model/strategy.py": ("CrossAttentionStrategy.num_image_tokens", "CrossAttentionStrategy.prepare"),
            "model/vision.py": ("RandomVisionEncoder.__init__",),
            "parity/checks.py": ("no_jobs",),
            "parity/full_checks.py": ("_nothing",),
            "parity/recording.py": ("delta_and_parts",),
            "schema/architecture.py": tuple(
                f"VLMConfig.{name}"
                for name in ("choosing_experts", "layer_period", "own_heads", "resolved_with", "shrunk")
            ),
            "schema/vlm.py": (
                "CrossAttentionConfig.layer_period", "CrossAttentionConfig.shrunk", "MoMaConfig.shrunk",
                "MoTConfig.shrunk",
            ),
        },
        CALLED: {
            "commands/prepare.py": ("Bar.__exit__",),
            "distributed/collectives.py": ("_", "_Summed.backward", "_Summed.forward"),
            "distributed/expert_parallel.py": ("_scattered",),
            "interchange/parts.py": ("Parts.__array__",),
            "model/dispatch.py": (
                "_DispatchTokens.forward", "_DispatchTokens.setup_context", "_Permute.forward",
                "_Permute.setup_context", "_ScaleGradient.forward", "_ScaleGradient.setup_context",
                "_dispatch_tokens", "_permute", "_scale_gradient",
            ),
            "model/fp8.py": ("_Linear.setup_context",),
            "model/grouped.py": ("_", "_save_matmul", "_save_outer"),
            "model/linear.py": ("_LookUp.setup_context",),
            "observed.py": ("Widening.__torch_function__", "_Passing.forward", "_Rounding.__torch_function__"),
            "program.py": ("passing",),
            "schema/architecture.py": (
                "_AnyArchitecture.__get_pydantic_core_schema__", "_AnyArchitecture.__get_pydantic_json_schema__",
            ),
            "training/blocks.py": ("_keeps_products",),
            "training/head.py": ("_sum_backward",),
            "training/lion.py": ("Lion.step",),
            "training/muon.py": ("Muon.step",),
            "training/optimizer.py": ("_Together.step",),
            "training/profiling.py": ("Profiler.__exit__",),
            "training/progress.py": ("Display.__exit__",),
            "training/schedule_free.py": ("ScheduleFreeAdamW.step",),
            "training/signals.py": ("Interrupts._handle", "StopRequest.__exit__", "StopRequest._note"),
        },
        "the type that it tells": {"data/image_sources.py": ("_is_usable",)},
    }.items()
    for file, names in functions.items()
    for function in names
}  # fmt: skip
"""``file: function``, in whichever packages have it, of what reads less than it takes, with the reason."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def unread(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(qualified name, parameter) of each that the body never reads, of functions and methods; of those within others
    or without a body of their own none, and none called _ or _name.
    """
    for owner in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        for node in owner.body:
            if isinstance(node, Function) and not is_abstract(node):
                qualified = f"{owner.name}.{node.name}" if isinstance(owner, ast.ClassDef) else node.name
                read = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
                yield from ((qualified, name) for name in parameters(node) if name not in read)


def parameters(node: Function) -> Iterator[str]:
    """Names of what a function takes, but for the first of a method."""
    given = node.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    names = [each.arg for each in every if each is not None]
    yield from (name for name in names if name not in ("self", "cls") and not name.startswith("_"))


def is_abstract(node: Function) -> bool:
    """Whether it is nothing but text, or raises an error."""
    rest = [each for each in node.body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
    return not rest or isinstance(rest[0], (ast.Raise, ast.Pass))


def test_what_a_function_takes_it_reads() -> None:
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for function, name in unread(ast.parse(file.read_text(encoding="utf-8"))):
                found.setdefault(f"{file.relative_to(ROOT / package)}: {function}", []).append(name)
    assert {place: names for place, names in found.items() if place not in UNREAD} == {}
    assert not UNREAD.keys() - found.keys()


SOURCE = """
def used(a, *rest, b=2, **options):
    return a + b + sum(rest) + len(options)

def left(a, b=1, *, c=2, _d=3, **more):
    return a * c

class Layer:
    def __init__(self, width):
        self.width = 3

    def inner(self, x):
        def each(y):
            return 1
        return each(x)

    def missing(self, x):
        \"\"\"Text.\"\"\"
        raise NotImplementedError
"""


def test_parameters_that_nothing_reads_are_found() -> None:
    assert list(unread(ast.parse(SOURCE))) == [("left", "b"), ("left", "more"), ("Layer.__init__", "width")]
