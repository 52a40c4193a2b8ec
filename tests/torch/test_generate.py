"""What is torch's own in generation: modes, gradients, compilation, dtypes."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from kempnerforge_torch.model import cuda_graph, decode, fused
from kempnerforge_torch.model.cuda_graph import CudaGraphStep
from kempnerforge_torch.model.generate import generate, stream
from kempnerforge_torch.model.kv_cache import KVCache, new_caches
from kempnerforge_torch.model.linear import Linear
from kempnerforge_torch.model.mlp import build_mlp
from kempnerforge_torch.model.moe import MoEMLP
from kempnerforge_torch.model.transformer import Transformer
from kempnerforge_torch.model.vlm import VLMWrapper, build_vlm_wrapper
from kempnerforge_torch.programs import PROGRAMS
from shared_config.contract.decoding import SamplingConfig
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.vision import VisionEncoderConfig
from shared_config.schema.vlm import CrossAttentionConfig, JointDecoderConfig, MoTConfig, VLMConfig

CONFIG = ModelConfig(
    dim=16, n_layers=2, n_heads=2, vocab_size=19, ffn_hidden_dim=24, max_seq_len=64, num_experts=3, moe_frequency=2,
    moe_capacity_factor=0.5,
)  # fmt: skip
PROMPTS = [[1, 2, 3], [4]]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])


def modes(model: Transformer) -> list[bool]:
    return [module.training for module in model.modules()]


def mixed_model() -> Transformer:
    """In training mode, but for one layer."""
    model = Transformer(CONFIG).train()
    model.layers["0"].eval()
    return model


def mixture_of(model: Transformer) -> MoEMLP:
    found = model.layers["1"].mlp
    assert isinstance(found, MoEMLP)
    return found


def test_generation_leaves_the_model_as_it_was() -> None:
    model = mixed_model()
    seen: list[bool] = []
    model.layers["1"].register_forward_hook(lambda module, *_: seen.append(module.training or torch.is_grad_enabled()))
    before = modes(model)
    tokens = stream(model, PROMPTS, 4)
    next(tokens)
    assert modes(model) == before, "between two tokens the model is the caller's"
    assert torch.is_grad_enabled()
    list(tokens)
    assert modes(model) == before
    assert mixture_of(model).capacity_factor == 0.5
    assert model.get_expert_counts() == {}, "nothing was counted for the balancing biases"
    assert seen
    assert not any(seen)


def test_the_modes_of_modules_are_changed_once_for_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[nn.Module] = []
    inference = decode.inference
    monkeypatch.setattr(decode, "inference", lambda model: (entered.append(model), inference(model))[1])
    model = Transformer(CONFIG)
    counts = []
    for tokens in (2, 9):
        entered.clear()
        generate(model, PROMPTS, tokens)
        counts.append(len(entered))
    assert counts[0] == counts[1]


def test_the_mode_is_restored_after_an_error() -> None:
    model = mixed_model()
    before = modes(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    model.layers["1"].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        generate(model, PROMPTS, 4)
    assert modes(model) == before
    assert mixture_of(model).capacity_factor == 0.5
    assert torch.is_grad_enabled()


def test_every_token_is_read_once() -> None:
    """Of one prompt: its tokens and the new ones but for the last, and the head runs once per new token."""
    model = Transformer(CONFIG)
    read: list[int] = []
    headed: list[int] = []
    assert model.token_embedding is not None
    assert model.output_head is not None
    model.token_embedding.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].shape[1]))
    model.output_head.register_forward_hook(lambda _, inputs, __: headed.append(inputs[0].shape[1]))
    generate(model, [[1] * 17], 3)
    assert read == [16, 1, 1, 1]
    assert headed == [0, 1, 1, 1]


@each_device
def test_one_compiled_step_serves_all_prompts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def counting(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled(function, backend=counting, **options))
    monkeypatch.setattr(decode, "compiled", functools.lru_cache(cuda_graph.compiled.__wrapped__))
    model = Transformer(CONFIG.replace(num_experts=0)).to(device)
    for prompts in (PROMPTS, [[1], [2]], [[3] * 9, [5] * 5]):
        options: dict[str, Any] = {"seed": 3, "temperature": 0.7}
        tokens = generate(model, prompts, 5, compile=True, **options)
        assert torch.equal(tokens, generate(model, prompts, 5, **options))
    assert len(graphs) == 1


def test_the_last_chunk_of_a_prompt_is_filled_up() -> None:
    """What fills it up, beyond all prompts, is sent to no expert."""
    torch.manual_seed(0)
    model, prompts = Transformer(CONFIG), [[*range(1, 19), 3, 4], [5]]
    whole = generate(model, prompts, 3, temperature=0.0)
    assert torch.equal(generate(model, prompts, 3, temperature=0.0, prefill_chunk=16), whole)


@pytest.mark.parametrize("window", [None, 3])
def test_a_step_changes_static_caches_where_they_are(window: int | None) -> None:
    """A recorded step knows addresses, not names."""
    cache = KVCache(2, 8, 1, 4, sliding_window=window, static=True)
    keys, real = torch.randn(2, 1, 1, 4), torch.tensor([[True], [False]])
    documents = torch.zeros((2, 1), dtype=torch.int64)
    cache.update(keys, keys, doc_ids=documents, key_padding_mask=real)
    names = ["k", "v", "lengths", "valid", "doc_ids"] + ["oldest"] * (window is not None)
    before = {name: getattr(cache, name) for name in names}
    cache.update(keys, keys, doc_ids=documents + 1, key_padding_mask=real)
    assert all(getattr(cache, name) is held for name, held in before.items())
    assert cache.lengths.tolist() == [2, 2]
    assert cache.doc_ids is not None
    assert cache.doc_ids[:, :2].tolist() == [[0, 1], [0, 1]]


def test_a_process_may_decode_for_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one function, torch compiles no more than eight programs by itself."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled(function, backend="eager", **options))
    monkeypatch.setattr(decode, "compiled", functools.lru_cache(cuda_graph.compiled.__wrapped__))
    model = Transformer(CONFIG.replace(num_experts=0, n_layers=1, moe_frequency=1))
    for rows in range(1, 11):
        assert len(generate(model, [[1, 2]] * rows, 2, compile=True)) == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_single_vector_is_multiplied_in_one_loop_where_there_is_a_compiler(dtype: torch.dtype) -> None:
    layer = Linear(300, 7, bias=True).to(dtype)
    seen: list[str] = []

    def keeping(graph: Any, _: Any) -> Any:
        seen.append(graph.code)
        return graph

    for shape, product in (((1, 1, 300), "sum"), ((2, 300), "linear")):
        x = torch.randn(shape, dtype=dtype)
        compiled = torch.compile(layer, backend=keeping, fullgraph=True)(x)
        torch.testing.assert_close(compiled, layer(x))
        assert compiled.dtype == dtype
        assert f"{product}(" in seen[-1]
        assert ("linear(" in seen[-1]) == (product == "linear")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_any_dtype(dtype: torch.dtype) -> None:
    tokens = generate(Transformer(CONFIG).to(dtype), PROMPTS, 4, seed=1)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (2, 7)


def test_pipeline_stages_are_refused() -> None:
    stage = Transformer(CONFIG)
    stage.output_head = None
    with pytest.raises(ValueError, match="pipeline stage"):
        generate(stage, PROMPTS, 2)


def test_a_compiled_step_writes_new_slots_alone() -> None:
    """It holds nothing else of the size of a cache, which is that of no other tensor."""
    config = CONFIG.replace(num_experts=0, n_layers=1, moe_frequency=1, n_kv_heads=1)
    model, tokens_B, caches = Transformer(config), torch.tensor([1, 2]), new_caches([None], 2, 61, 1, 8, static=True)
    with torch.inference_mode():
        _, (code, *_) = run_and_get_code(
            cuda_graph.compiled(decode.advance, vectors=False), model, tokens_B, caches, None
        )
    shapes = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", code)
    assert shapes
    assert caches[0].k.numel() not in [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]
    assert caches[0].lengths.tolist() == [1, 1]
    assert [int((cache_BKSh != 0).any(dim=(0, 1, 3)).sum()) for cache_BKSh in (caches[0].k, caches[0].v)] == [1, 1]


# The GPU


@pytest.mark.parametrize(("rows", "is_cuda"), [(1, True), (2, True), (1, False)])
def test_single_vectors_on_a_gpu_are_multiplied_in_loops_that_the_compiler_writes(
    rows: int, is_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tokens:
        def __init__(self) -> None:
            self.is_cuda = is_cuda

        def __len__(self) -> int:
            return rows

    asked: list[Any] = []

    def noting(function: Any, **options: Any) -> Any:
        asked.append(options["options"])
        return lambda *_: torch.eye(rows, 3)

    monkeypatch.setattr(torch, "compile", noting)
    monkeypatch.setattr(decode, "compiled", cuda_graph.compiled.__wrapped__)
    tokens: Any = Tokens()
    decode._step(Transformer(CONFIG), SamplingConfig(temperature=0.0), [], None, True, tokens, None)
    options = {"coordinate_descent_tuning": True, "combo_kernels": True}
    assert asked == [options if rows == 1 and is_cuda else None]


@pytest.mark.parametrize("program", [lambda f: cuda_graph.compiled.__wrapped__(f, True), fused._program.__wrapped__])
def test_a_process_may_compile_many_programs(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    limit = torch._dynamo.config.recompile_limit
    assert program(lambda: torch._dynamo.config.recompile_limit)() == PROGRAMS > limit
    assert torch._dynamo.config.recompile_limit == limit


@pytest.mark.parametrize("activation", ["silu", "geglu_tanh"])
@pytest.mark.parametrize(("rows", "trained", "held"), [(1, False, True), (1, True, False), (2, False, False)])
def test_gated_vectors_are_not_computed_anew_for_each_output(
    activation: str, rows: int, trained: bool, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler fuses what makes a vector into the loop that multiplies it, unless it is looked at by strides."""
    layer = build_mlp(8, 12, activation).to("meta").requires_grad_(trained)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with Operators() as operators:
        layer(torch.empty((rows, 1, 8), device="meta"))
    assert ("as_strided" in operators.names) == held


class Operators(TorchDispatchMode):
    """Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("drawn", [False, True])
def test_a_step_is_run_then_recorded_and_replayed_from_there_on(drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph reads the places that it was recorded with; what it gave is not overwritten by the next replay."""
    done: list[str] = []

    def body(tokens: torch.Tensor, uniforms: torch.Tensor | None) -> torch.Tensor:
        return 2 * tokens + (0 if uniforms is None else (10 * uniforms).long())

    def step(tokens: torch.Tensor, uniforms: torch.Tensor | None) -> torch.Tensor:
        done.append("record" if capturing else "run")
        return body(tokens, uniforms)

    class Graph:
        def replay(self) -> None:
            done.append("replay")
            recorded.drawn.copy_(body(recorded.tokens, recorded.uniforms if drawn else None))

    @contextlib.contextmanager
    def capture(graph: Graph, **_: Any) -> Iterator[None]:
        capturing.append(graph)
        yield
        capturing.clear()

    capturing: list[Graph] = []
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    recorded, given, found = CudaGraphStep(step), [], []
    for place in range(4):
        given.append((torch.tensor([place, 5]), torch.tensor([0.1 * place, 0.5]) if drawn else None))
        found.append(recorded(*given[-1]))
    assert done == ["run", "record", "replay", "replay", "replay"]
    for tokens, inputs in zip(found, given, strict=True):
        assert torch.equal(tokens, body(*inputs))


VISION = VisionEncoderConfig(type="vit", image_size=8, patch_size=4, feature_dim=12, n_heads=3, n_layers=1)
ARCHITECTURES: dict[str, VLMConfig] = {
    "joint_decoder": JointDecoderConfig(max_text_len=32),
    "cross_attention": CrossAttentionConfig(max_text_len=32, cross_attention_every_n_layers=1),
    "mot": MoTConfig(max_text_len=32),
}


def seeing(arch: str, **changes: Any) -> tuple[VLMWrapper, dict[str, Any]]:
    """A model, and two clips of which one lacks a frame."""
    config = CONFIG.replace(num_experts=0, dim=32, **changes)
    model = build_vlm_wrapper(config, VISION, AdapterConfig(type="linear"), ARCHITECTURES[arch], 2)
    pixels = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    return model, {"pixel_values": pixels, "frame_mask": torch.tensor([[True, False], [True, True]])}


@cuda
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("case", ["dense", "one row", "experts", "window", *ARCHITECTURES, "joint_decoder, window"])
def test_a_recorded_step_draws_what_the_cpu_draws(
    case: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA graphs: one call compiles, all others replay, those of a second generation too; caches of the whole context,
    and rings that wrap around.
    """
    arch, _, window = case.partition(", ")
    torch.manual_seed(5)
    changes = {"sliding_window": 5} if "window" in (arch, window) else {}
    model, images = (
        seeing(arch, **changes)
        if arch in ARCHITECTURES
        else (Transformer(CONFIG.replace(num_experts=3 if arch == "experts" else 0, **changes)), {})
    )
    model = model.double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    options: dict[str, Any] = {"temperature": temperature, "top_k": 7, "seed": 1, "prefill_chunk": 4}
    prompts = [[1, 2, 3, 4, 5, 6], [4]][: 1 if case == "one row" else 2]
    expected = generate(model, prompts, 12, **options, **images)
    replays: list[int] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph)))
    model, images = model.to("cuda"), {name: value.to("cuda") for name, value in images.items()}
    assert torch.equal(generate(model, prompts, 12, **options, **images).cpu(), expected)
    assert not replays
    assert torch.equal(generate(model, prompts, 12, compile=True, **options, **images).cpu(), expected)
    assert len(replays) == 11
    streamed = list(stream(model, prompts, 12, compile=True, **options, **images))
    assert [int(tokens[0]) for tokens in streamed] == expected[0, 6:].tolist()
    assert [int(tokens[-1]) for tokens in streamed] == expected[-1, len(prompts[-1]) :][:12].tolist()
    assert len(replays) == 23
