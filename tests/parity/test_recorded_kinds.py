"""What users record: modules of drawn parts, wrapped and narrow, are recorded as they run by themselves.

They stay as they were, also where they fail.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kempnerforge_jax.parity as of_jax
import kempnerforge_torch.parity as of_torch
from kempnerforge_torch.model.state import to_numpy
from shared_config.errors import UserError
from shared_config.parity import compare_functions, record
from shared_config.parity.summaries import Summary, summarize

NIGHTLY = settings.get_current_profile_name() == "nightly"
nightly = pytest.mark.skipif(not NIGHTLY, reason="compiles: HYPOTHESIS_PROFILE=nightly")
WIDTH = 5
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass
class Given:
    x: Any
    nothing: Any = None


class Contained(nn.Module):
    def forward(self, given: Given, *, scale: float) -> dict[str, Any]:
        return {"x": given.x * scale, "none": given.nothing, "rest": (given.x.argmax(-1), "word", [])}


class Generated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        for _ in range(2):
            x = self.part(x)
            yield x


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("in the middle")


class Composed(nn.Module):
    """Parts in the drawn order."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = parts
        self.linear, self.tied = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.linear.weight
        self.relu, self.contained, self.generated, self.failing = nn.ReLU(True), Contained(), Generated(), Failing()
        self.block = nn.Sequential(nn.Linear(WIDTH, 3), nn.Tanh(), nn.Linear(3, WIDTH))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor, *, none: Any = None) -> Any:
        x = self.linear(x)
        for part in self.parts:
            x = getattr(self, f"by_{part}")(x)
        return Given((x, 3), none)

    def by_linear(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def by_tied(self, x: Tensor) -> Tensor:
        return self.tied(x)

    def by_in_place(self, x: Tensor) -> Tensor:
        return self.relu(x.add_(1))

    def by_contained(self, x: Tensor) -> Tensor:
        found = self.contained(Given(x), scale=0.5)
        assert found["none"] is None
        return found["x"]

    def by_generated(self, x: Tensor) -> Tensor:
        first, second = self.generated(x)
        return first - second

    def by_checkpointed(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.block, x, use_reentrant=False)  # type: ignore[operator]

    def by_block(self, x: Tensor) -> Tensor:
        return x + self.block(x)

    def by_frozen(self, x: Tensor) -> Tensor:
        return self.frozen(x)

    def by_failing(self, x: Tensor) -> Tensor:
        return self.failing(x)


PARTS = tuple(name.removeprefix("by_") for name in vars(Composed) if name.startswith("by_") and name != "by_failing")
parts = st.lists(st.sampled_from(PARTS), max_size=5).map(tuple)


def built(names: tuple[str, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Composed, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Composed(names).to(dtype), torch.randn(3, WIDTH, dtype=dtype)


def run_alone(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, int]]:
    """(output, gradients, calls of each module) of a copy."""
    model, calls = copy.deepcopy(model), dict.fromkeys(dict(model.named_modules()), 0)

    def count(name: str) -> Callable[..., None]:
        def counted(*_: object) -> None:
            calls[name] += 1

        return counted

    hooks = [module.register_forward_hook(count(name)) for name, module in model.named_modules()]
    output = model(x).x[0]
    for hook in hooks:
        hook.remove()
    output.double().sum().backward()
    return output, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, calls


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()


@settings(max_examples=40)
@given(names=parts, dtype=st.sampled_from(DTYPES), above=st.sampled_from([None, 0]), seed=st.integers(0, 9))
def test_what_is_recorded_is_what_runs(names: Any, dtype: Any, above: int | None, seed: int) -> None:
    model, x = built(names, dtype, seed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    output, gradients, calls = run_alone(model, x)
    loss = lambda found: found.x[0].double().sum()  # noqa: E731
    trace = of_torch.record(model, {"x": x, "none": None}, deltas=False, above=above, loss=loss)
    assert_untouched(model, before)
    expected = {"forward/output": output, **{f"gradient/{name}": value for name, value in gradients.items()}}
    for name, value in expected.items():
        found = trace.tensors[name]
        array = to_numpy(value.detach())
        if isinstance(found, Summary):
            np.testing.assert_array_equal(found.sketch, summarize(array).sketch)
        else:
            np.testing.assert_array_equal(found, array)
    for name in ("linear", "tied", "relu", "contained.x", "generated.part", "block", "block.2", "frozen"):
        called = calls[name.removesuffix(".x")]
        recorded = [one for one in trace.tensors if one.startswith("forward/") and "@in" not in one]
        assert sum(one.split("/")[1].partition("@")[0] == name for one in recorded) == called, (
            name,
            list(trace.tensors),
        )


@settings(max_examples=15)
@given(names=parts, place=st.integers(0, 5), above=st.sampled_from([None, 0]), seed=st.integers(0, 9))
def test_a_module_that_fails_is_left_as_it_was(names: Any, place: int, above: int | None, seed: int) -> None:
    model, x = built((*names[:place], "failing", *names[place:]), seed=seed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="in the middle"):
        of_torch.record(model, (x,), above=above)
    assert_untouched(model, before)
    with pytest.raises(ValueError, match="in the loss"):
        of_torch.record(built(names)[0], (x,), loss=failing_loss)


def failing_loss(_: object) -> Tensor:
    raise ValueError("in the loss")


@settings(max_examples=4)
@given(names=parts, seed=st.integers(0, 9))
def test_checkpointed_parts_have_the_deltas_of_others(names: tuple[str, ...], seed: int) -> None:
    """What is computed again is moved as it was the first time."""
    with_block = (*("block" if name == "checkpointed" else name for name in names), "block")
    plain, x = built(with_block, seed=seed)
    other, _ = built(tuple("checkpointed" if name == "block" else name for name in with_block), seed=seed)
    a, b = (of_torch.record(model, (x,), deltas=2) for model in (plain, other))
    assert compare_functions(a, b).equal
    deltas = a.meta.deltas["float32"]
    assert deltas == pytest.approx(b.meta.deltas["float32"], rel=1e-6, abs=1e-20)


class Widened(nn.Module):
    """Casts to float32 within what is computed again in the backward pass, or not."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again, self.out = again, nn.Linear(WIDTH, 3)
        self.load_state_dict({name: torch.ones_like(own) / 3 for name, own in self.state_dict().items()})

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.wide, x, use_reentrant=False) if self.again else self.wide(x)

    def wide(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x.float()).to(x.dtype))


def test_casts_in_checkpointed_parts_are_to_float64_in_float64() -> None:
    x = torch.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)
    plain, again = (of_torch.record(Widened(again), (x,), dtype="bfloat16", deltas=2) for again in (False, True))
    assert compare_functions(plain, again).equal
    assert plain.meta.deltas == again.meta.deltas
    assert again.meta.extra["exact"]


class Looked(nn.Module):
    """Rows of a table, whose gradient may be a sparse tensor, times a weight."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(9, WIDTH, sparse=sparse), nn.Linear(WIDTH, 3)
        self.load_state_dict({name: torch.ones_like(own) / 3 for name, own in self.state_dict().items()})

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.table(ids))


@settings(max_examples=6)
@given(ids=st.lists(st.integers(0, 8), min_size=1, max_size=6), above=st.sampled_from([None, 0]))
def test_sparse_gradients_are_recorded_as_dense_ones(ids: list[int], above: int | None) -> None:
    sparse, dense = (
        of_torch.record(Looked(is_so), (torch.tensor(ids),), deltas=2, above=above) for is_so in (True, False)
    )
    assert list(sparse.tensors) == list(dense.tensors)
    assert compare_functions(sparse, dense).equal
    assert sparse.tensors["gradient/table.weight"].shape == (9, WIDTH)


@settings(max_examples=6)
@given(names=parts, factor=st.sampled_from([0.0, 0.5, -2.0]), above=st.sampled_from([None, 0]))
def test_hooks_of_the_users_on_weights_change_what_is_recorded(names: Any, factor: float, above: int | None) -> None:
    """A gradient that is masked or scaled is the one that an optimiser sees."""
    model, x = built(("linear", *names))
    before = of_torch.record(model, (x,), deltas=False, above=above).tensors["gradient/linear.bias"]
    model.linear.bias.register_hook(lambda gradient: gradient * factor)
    after = of_torch.record(model, (x,), deltas=False, above=above).tensors["gradient/linear.bias"]
    assert model.linear.bias.grad is None
    values = [one.sketch if isinstance(one, Summary) else one for one in (before, after)]
    np.testing.assert_array_equal(values[1], values[0] * factor)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(4)), r"0\.weight, 0\.bias: not initialised yet: call the module once"),
        (lambda: nn.Linear(4, 4, device="meta"), r"weight, bias: on the meta device, without values"),
        (lambda: nn.Sequential(torch.jit.script(nn.Tanh())), r"0 is a program of torch\.jit: give the module"),
    ],
)
def test_modules_that_can_not_be_watched_are_refused(made: Callable[[], nn.Module], message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, UserWarning))
        model = made()
    with pytest.raises(UserError, match=f"function: {message}"):
        of_torch.record(model, (torch.ones(2, 4),))


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [pytest.param(compiled, marks=nightly), nn.DataParallel])
def test_wrapped_modules_of_every_part_are_recorded_as_plain_ones(wrap: Any) -> None:
    model, x = built(("linear", "tied", "contained", "block"))
    plain, wrapped = (of_torch.record(one, (x,), deltas=False, above=0) for one in (model, wrap(model)))
    assert list(wrapped.tensors) == list(plain.tensors)


def test_what_a_generator_gives_is_the_output() -> None:
    def in_torch(x: Any) -> Any:
        yield torch.tanh(torch.as_tensor(x))
        yield torch.as_tensor(x) * 2

    def in_jax(x: Any) -> Any:
        yield jnp.tanh(x)
        yield x * 2

    def in_numpy(x: Any) -> Any:
        yield np.tanh(x)
        yield x * 2

    x = np.linspace(0, 1, 12, dtype=np.float32)
    traces = [of_torch.record(in_torch, (x,), deltas=2), of_jax.record(in_jax, (x,), deltas=False)]
    for other in (traces[1], record(in_numpy, (x,), deltas=False)):
        found = compare_functions(traces[0], other, common=True)
        assert found.equal
        assert [row.name for row in found.groups["forward"]] == ["forward/output.0", "forward/output.1"]


def test_a_function_of_jax_that_fails_leaves_its_switches() -> None:
    def failing(x: Any) -> Any:
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        of_jax.record(failing, (np.ones(3),), dtype="float64")
    assert not jax.config.jax_enable_x64  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="no output depends on a weight"):
        of_torch.record(lambda x: "word", (torch.ones(3),))
