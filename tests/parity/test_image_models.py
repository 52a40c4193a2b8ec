"""Networks of images: inputs that one side holds with channels last, and modules that keep statistics as they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kempnerforge_jax.parity as of_jax
import kempnerforge_torch.parity as of_torch
from shared_config.cli import main
from shared_config.errors import UserError
from shared_config.parity import DifferentError, assert_same_function, compare_functions, make_map, nest, transfer
from shared_config.parity.foreign.options import Options, drawn_towards

nightly = pytest.mark.skipif(
    settings.get_current_profile_name() != "nightly", reason="takes seconds: HYPOTHESIS_PROFILE=nightly"
)
IMAGES = np.random.default_rng(1).standard_normal((3, 4, 6, 5)).astype(np.float32)
LAST = "permute 0 2 3 1"
WEIGHTS = {
    "conv.weight": np.random.default_rng(2).standard_normal((7, 4, 3, 3)).astype(np.float32) / 6,
    "norm.weight": np.linspace(0.5, 1.5, 7, dtype=np.float32),
    "norm.bias": np.linspace(-0.3, 0.3, 7, dtype=np.float32),
}
INPUTS = {"input.0": ("input.0", LAST)}
ACTIVATIONS = {name: (name, LAST) for name in ("conv", "norm", "output")}
OF_WEIGHTS = {"conv.weight": ("conv.kernel", "permute 2 3 1 0"), "norm.weight": "norm.scale"}


class TorchNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 7, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(7)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norm(self.conv(images)))


class NnxNet(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(4, 7, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(7, use_fast_variance=False, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return jax.numpy.tanh(self.norm(self.conv(images)))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        hidden = linen.Conv(7, (3, 3), use_bias=False, name="conv")(images)
        norm = linen.BatchNorm(use_running_average=False, use_fast_variance=False, name="norm")
        return jax.numpy.tanh(norm(hidden))


def recorded(kind: str, **options: Any) -> Any:
    """A recording of the same network: with channels last, but for PyTorch's."""
    if kind == "torch":
        return of_torch.record(torch_net(), (torch.from_numpy(IMAGES),), weights=WEIGHTS, **options)
    images, weights = np.moveaxis(IMAGES, 1, -1), transfer(WEIGHTS, make_map(OF_WEIGHTS))
    options = {"names": make_map(activations=ACTIVATIONS)} | options
    if kind == "nnx":
        return of_jax.record(NnxNet(), (images,), weights=weights, **options)
    variables = {"params": nest(weights), "batch_stats": {"norm": {"mean": np.zeros(7), "var": np.ones(7)}}}
    return of_jax.record(LinenNet(), (images,), weights=variables, **options)


def torch_net() -> TorchNet:
    torch.manual_seed(0)
    return TorchNet()


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_networks_with_channels_last_are_the_same(kind: str) -> None:
    a, b = recorded("torch", dtype="float32"), recorded(kind, dtype="float32", deltas=False)
    found = compare_functions(a, b, make_map(OF_WEIGHTS | INPUTS, ACTIVATIONS), common=True)
    assert found.equal, found.failures
    assert {row.name for row in found.rows} >= {"forward/norm", "cotangent/conv", "gradient/input.0"}
    assert {group: len(rows) for group, rows in found.groups.items()}["gradient"] == 4


def test_inputs_of_another_layout_need_a_rule_and_other_numbers_stay_refused() -> None:
    a, b = recorded("torch", deltas=False), recorded("nnx", deltas=False)
    with pytest.raises(UserError, match=r"the numbers are the same: \[\[weights\]\] of the map says how input.0"):
        compare_functions(a, b, make_map(OF_WEIGHTS, ACTIVATIONS), common=True)
    others = of_torch.record(torch_net(), (torch.from_numpy(IMAGES) + 1,), weights=WEIGHTS, deltas=False)
    with pytest.raises(UserError, match=r"called with different arrays$"):
        compare_functions(others, b, make_map(OF_WEIGHTS | INPUTS, ACTIVATIONS), common=True)


def test_a_recording_leaves_the_statistics_of_a_module_as_they_were() -> None:
    net, compiled, own = torch_net(), torch.compile(torch_net(), backend="eager"), NnxNet()
    images = torch.from_numpy(IMAGES)
    for module in (net, compiled):
        first, again = (of_torch.record(module, (images,), deltas=False) for _ in range(2))
        assert all(
            np.array_equal(np.asarray(own), np.asarray(again.tensors[name])) for name, own in first.tensors.items()
        )
        assert {name: buffer.flatten().tolist() for name, buffer in module.named_buffers()} == {
            name: buffer.flatten().tolist()
            for name, buffer in torch_net().named_buffers(prefix="_orig_mod" if module is compiled else "")
        }
    of_jax.record(own, (np.moveaxis(IMAGES, 1, -1),), deltas=False)
    assert np.array_equal(own.norm.mean[...], np.zeros(7))


@given(st.data(), st.integers(0, 9))
def test_outputs_of_another_layout_are_drawn_towards_the_same_numbers(data: st.DataObject, seed: int) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple))
    order = data.draw(st.permutations(range(len(shape))))
    names = make_map(activations={"output.logits": ("output.0", f"permute {' '.join(map(str, order))}", "flip axis=0")})
    keys, drawn = drawn_towards(Options(seed=seed), "output.logits", shape)
    moved, expected = names.apply({"output.logits": drawn}, "activations"), tuple(shape[axis] for axis in order)
    own_keys, own = drawn_towards(Options(seed=seed, names=names), "output.0", expected)
    assert own_keys == keys == [f"output.logits {shape}"]
    assert np.array_equal(own, np.asarray(moved["output.0"]))
    assert drawn_towards(Options(seed=seed, names=names), "output.1", expected)[0] == [f"output.1 {expected}"]


def test_gradients_of_losses_towards_other_numbers_are_told() -> None:
    a, b = recorded("torch"), recorded("nnx", names=None, deltas=False)
    found = compare_functions(a, b, make_map(OF_WEIGHTS | INPUTS, ACTIVATIONS), common=True)
    assert [
        note for note in found.notes if note.startswith("loss: a draws output (3, 7, 6, 5) towards random values, b")
    ]
    assert {row.group for row in found.failures} >= {"loss", "gradient"}


SIDES = """
from tests.parity.test_image_models import recorded
def torch(**options): return recorded("torch", **options)
def nnx(**options): return recorded("nnx", **{"names": None} | options)
"""


@nightly
@pytest.mark.parametrize("traced", ["", "a", "b"])
@pytest.mark.parametrize("sides", [("torch", "nnx"), ("nnx", "torch")])
def test_the_command_tells_models_the_layout_of_the_other_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sides: tuple[str, str], traced: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sides.py").write_text(SIDES, encoding="utf-8")
    names = make_map(OF_WEIGHTS | INPUTS, ACTIVATIONS)
    (names if sides[0] == "torch" else names.inverse()).write("names.toml")
    texts = {place: f"sides.py:{side}" for place, side in zip("ab", sides, strict=True)}
    if traced:
        assert main(["record", texts[traced], "--output", "trace.safetensors"]) == 0
        texts[traced] = "trace.safetensors"
    assert main(["compare", *texts.values(), "--map", "names.toml", "--common"]) == 0


def in_torch(images: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (images * scale[:, None, None]).square().sum((2, 3))


def in_jax(pixels: jax.Array, scale: jax.Array) -> jax.Array:
    return (pixels * scale).__pow__(2).sum((1, 2))


@settings(max_examples=5, deadline=None)
@given(st.permutations(range(4)), st.booleans(), st.booleans())
def test_one_call_serves_two_layouts_and_names(order: list[int], named: bool, wrong: bool) -> None:
    """The second is called with what the map makes of the inputs of the first."""
    layout, back = f"permute {' '.join(map(str, order))}", [order.index(axis) for axis in (0, 2, 3, 1)]

    def ours(pixels: jax.Array, scale: jax.Array) -> jax.Array:
        return in_jax(pixels.transpose(back), scale[::-1] if wrong else scale).T

    scale = WEIGHTS["norm.weight"][:4]
    places = ("images", "pixels") if named else ("0", "0")
    names = make_map({f"input.{places[0]}": (f"input.{places[1]}", layout)}, {"output": ("output", "transpose")})
    inputs: Any = {"images": IMAGES, "scale": scale} if named else (IMAGES, scale)
    try:
        assert_same_function(in_torch, ours, inputs, names=names, dtypes=("float32",))
    except DifferentError:
        assert wrong
    else:
        assert not wrong
