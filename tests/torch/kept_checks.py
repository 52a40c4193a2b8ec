"""CUDA graphs played on the CPU: what is recorded runs again with the model as it was, its weights where they were; and
what may happen to a model between two generations.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from shared_config.schema.model import ModelConfig

CONFIG = ModelConfig(dim=16, n_layers=2, n_heads=2, vocab_size=19, ffn_hidden_dim=24, max_seq_len=64)
PROMPTS = [[1, 2, 3], [4]]


class Recorder:
    """Plays CUDA graphs without a GPU, and counts what is recorded and replayed."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.recorded, self.replayed, self.prompts, self.read_again = 0, 0, 0, 0
        decode, cuda_graph = module("model.decode"), module("model.cuda_graph")
        weight_of = decode.weight_of

        def on_gpu(model: Any) -> Any:
            weight = weight_of(model)
            return SimpleNamespace(is_cuda=True, device=weight.device, dtype=weight.dtype)

        patch.setattr(decode, "weight_of", on_gpu)
        patch.setattr(decode, "compiled", lambda function, vectors: function)
        patch.setattr(cuda_graph.CudaGraphStep, "_record", lambda step, *inputs: self.record(step, *inputs))
        patch.setattr(cuda_graph.CudaGraphCall, "_record", lambda call, *about: self.record_prompts(call, *about))

    def record_prompts(self, call: Any, function: Any, inputs: Any) -> None:
        self.prompts += 1
        call.inputs = [each.clone() for each in inputs]
        read, (model, request) = function.func, function.args
        held, call.result = as_it_is(model), function(*call.inputs)
        spoil_tensors(call.result)

        def replay() -> None:
            self.read_again += 1
            for place, new in zip(tensors(call.result), tensors(read(held, request, *call.inputs)), strict=True):
                place.copy_(new)

        call.graph = SimpleNamespace(replay=replay)

    def record(self, step: Any, tokens: torch.Tensor, uniforms: torch.Tensor | None) -> None:
        self.recorded += 1
        step.tokens, step.drawn = tokens.clone(), tokens.clone()
        step.uniforms = tokens.new_zeros(()) if uniforms is None else uniforms.clone()
        read, (model, *given) = step.step.func, step.step.args
        held = as_it_is(model)

        def replay() -> None:
            self.replayed += 1
            step.drawn.copy_(read(held, *given, step.tokens, None if uniforms is None else step.uniforms))

        step.graph = SimpleNamespace(replay=replay)


def as_it_is(model: Any) -> Any:
    """What a graph knows of a model: its settings and hooks of now, and its weights where they are now."""
    weights = {id(each): nn.Parameter(each.detach(), requires_grad=False) for each in model.parameters()}
    return copy.deepcopy(model, {**weights, **{id(each): each.detach() for each in model.buffers()}})


def new_model(config: ModelConfig = CONFIG) -> Any:
    torch.manual_seed(5)
    return drawn_anew(module("model.transformer").Transformer(config).double())


def drawn_anew(model: Any) -> Any:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def same_tokens(model: Any, prompts: Any = PROMPTS, new: int = 6, **options: Any) -> None:
    options, generate = {"seed": 1, "temperature": 0.9, **options}, module("model.generate").generate
    assert torch.equal(generate(model, prompts, new, compile=True, **options), generate(model, prompts, new, **options))


def tensors(filled: Any) -> list[torch.Tensor]:
    """Of caches that hold prompts, and their last tokens."""
    caches, tokens_B = filled
    return [*module("model.kept_steps")._tensors(caches, None), tokens_B]


def spoil_tensors(filled: Any) -> None:
    """Fill them with what no later call may see."""
    for each in tensors(filled):
        each.fill_(torch.nan if each.is_floating_point() else 1)


def spoil(model: Any) -> None:
    """Fill all kept caches with what no later call may see."""
    kept = module("model.kept_steps")._kept[model]
    for each in kept.steps.values():
        spoil_tensors((each.caches, each.caches[0].lengths))
    for each in kept.prompts.values():
        if hasattr(each, "result"):
            spoil_tensors(each.result)


def other_memory(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3


def optimizer_step(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def hook(model: Any) -> None:
    """One that changes what is drawn."""
    model.norm.register_forward_hook(lambda module, inputs, output: -output)


HAPPENINGS: dict[str, Callable[[Any], object]] = {
    "nothing": lambda model: None,
    "values of NaN in kept caches": spoil,
    "a step of an optimiser": optimizer_step,
    "load_state_dict": lambda model: model.load_state_dict(drawn_anew(copy.deepcopy(model)).state_dict()),
    "other memory": other_memory,
    "another dtype": lambda model: model.to(torch.float32 if weight_dtype(model) == torch.float64 else torch.float64),
    "another layer": lambda model: model.layers.update({"1": drawn_anew(copy.deepcopy(model.layers["0"]))}),
    "another setting": lambda model: setattr(model.norm, "eps", 99.0 + model.norm.eps),
    "a hook": hook,
}


def weight_dtype(model: Any) -> torch.dtype:
    return next(model.parameters()).dtype


WINDOWS: dict[str, dict[str, Any]] = {
    "none": {},
    "all layers": {"sliding_window": 5},
    "one layer": {"sliding_window": 5, "attention_pattern": ("window", "full")},
}


def check_after(happenings: list[tuple[str, int, int, float]], windows: str = "none") -> None:
    """Generate with a new model, and again after each of several happenings, given with rows, new tokens and
    temperature.
    """
    model = new_model(CONFIG.replace(**WINDOWS[windows]))
    same_tokens(model, PROMPTS, 3)
    for happening, rows, new, temperature in happenings:
        HAPPENINGS[happening](model)
        same_tokens(model, PROMPTS[:rows], new, temperature=temperature)


def module(path: str) -> Any:
    return importlib.import_module(f"kempnerforge_torch.{path}")
