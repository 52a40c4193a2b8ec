"""Bugs to plant in the port of Llama, one at a time: where each one sits, and what it is called if it is named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tests.examples import llama_in_jax


@dataclass(frozen=True)
class Bug:
    """A change of source text.

    Attributes:
        sites: modules it is in, without the numbers of layers, the first to be run first.
        causes: kinds of causes that are right; another one named is a wrong verdict, none is not.
    """

    name: str
    old: str
    new: str
    sites: tuple[str, ...]
    causes: tuple[str, ...] = ()

    def planted(self) -> ModuleType:
        """The port with the bug."""
        return with_change(llama_in_jax, self.old, self.new)

    def text(self) -> str:
        """That of the port with the bug."""
        return changed_text(llama_in_jax, self.old, self.new)


def with_change(port: ModuleType, old: str, new: str) -> ModuleType:
    """A module with another text in place of one that it has once."""
    module = ModuleType(f"{port.__name__} with {new!r}")
    exec(compile(changed_text(port, old, new), module.__name__, "exec"), module.__dict__)
    return module


def changed_text(port: ModuleType, old: str, new: str) -> str:
    """Of `with_change`."""
    source = Path(str(port.__file__)).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} must occur once"
    return source.replace(old, new)


ATTENTION, MLP, LAYER = ("layers.*.attention",), ("layers.*.mlp",), ("layers.*",)
SCALE = "* sizes.head_dim**-0.5"
MASK = "jnp.tril(jnp.ones((S, S), bool))"
NORMS = ("layers.*.attention_norm", "layers.*.mlp_norm", "norm")

BUGS = (
    Bug("scale of scores", SCALE, "* sizes.head_dim**-1.0", ATTENTION),
    Bug("scores not scaled", f" {SCALE}", "", ATTENTION),
    Bug("mask off by one", MASK, "jnp.tril(jnp.ones((S, S), bool), 1)", ATTENTION),
    Bug("mask leaves itself out", MASK, "jnp.tril(jnp.ones((S, S), bool), -1).at[0, 0].set(True)", ATTENTION),
    Bug("no mask", MASK, "jnp.ones((S, S), bool)", ATTENTION),
    Bug("sign of the rotation", "even * cosine - odd * sine", "even * cosine + odd * sine", ATTENTION),
    Bug(
        "halves for pairs", "even, odd = x[..., 0::2], x[..., 1::2]", "even, odd = jnp.split(x, 2, axis=-1)", ATTENTION
    ),
    Bug("positions doubled", "wide(jnp.arange(length)[:, None]", "wide(2 * jnp.arange(length)[:, None]", ATTENTION),
    Bug("theta", "np.float32(sizes.theta) **", "np.float32(sizes.theta / 100) **", ATTENTION),
    Bug("values not grouped", 'jnp.einsum("bkgst,btkh->bskgh"', 'jnp.einsum("bkgst,btkh->bsgkh"', ATTENTION, ("swap",)),
    Bug(
        "keys rotated back",
        "k_BSKh = rotated(k.reshape(B, S, sizes.kv_heads, -1), rotation)",
        "k_BSKh = rotated(k.reshape(B, S, sizes.kv_heads, -1), (rotation[0], -rotation[1]))",
        ATTENTION,
    ),
    Bug("softmax over queries", "wide(scores), axis=-1)", "wide(scores), axis=-2)", ATTENTION),
    Bug("gate and up exchanged", "gate, up = jnp.split", "up, gate = jnp.split", MLP),
    Bug("gelu for silu", "jax.nn.silu(gate)", "jax.nn.gelu(gate)", MLP),
    Bug("no activation", "jax.nn.silu(gate)", "gate", MLP),
    Bug(
        "norm weight left out",
        "return weight * y.astype(x.dtype)",
        "return y.astype(x.dtype)",
        NORMS,
    ),
    Bug("norm weight plus one", "return weight * y", "return (1 + weight) * y", NORMS),
    Bug("norm of the mean", "jnp.mean(y * y, axis=-1", "jnp.sum(y * y, axis=-1", NORMS, ("factor",)),
    Bug("eps", "keepdims=True) + eps)", "keepdims=True) + 0.1)", NORMS, ("eps",)),
    Bug("residual from the norm", "x = x + tap(f", "x = normed + tap(f", LAYER),
    Bug(
        "residual of the mlp left out",
        'x + tap(f"{name}.mlp", mlp(normed, layer, f"{name}.mlp"))',
        'tap(f"{name}.mlp", mlp(normed, layer, f"{name}.mlp"))',
        LAYER,
    ),
    Bug("embedding scaled", 'weights["embed"][tokens])', 'weights["embed"][tokens] * 5.2915)', ("embed",), ("factor",)),
    Bug(
        "tokens shifted",
        'weights["embed"][tokens])',
        'weights["embed"][jnp.roll(tokens, 1, 1)])',
        ("embed",),
        ("shift",),
    ),
    Bug("logits shifted", '@ weights["head"]', '@ jnp.roll(weights["head"], 1, 1)', ("output",), ("shift",)),
    Bug(
        "output transposed",
        'values.reshape(B, S, -1)) @ layer["wo"]',
        'values.reshape(B, S, -1)) @ layer["wo"].reshape(layer["wo"].shape[::-1]).T',
        ATTENTION,
    ),
)

STOP = "jax.lax.stop_gradient"
MIXED, PRODUCT, TOKENS = ("layers.*.attention.mixed",), ("layers.*.mlp.product",), 'weights["embed"][tokens]'
NORMED = 'tap("norm", rms_norm(x, weights["norm"], sizes.eps))'
PROBABILITIES, TURNED = "jax.nn.softmax(wide(scores), axis=-1)", "turned.reshape(x.shape)"


def differentiated_as(value: str, other: str) -> str:
    """Text of a value whose gradients are those of another one."""
    return f"({STOP}({value}) + ({other}) - {STOP}({other}))"


BACKWARD_BUGS = (
    Bug("norm of fixed size", "jnp.mean(y * y, axis=-1", f"jnp.mean({STOP}(y * y), axis=-1", NORMS),
    Bug("weight of a norm not trained", "return weight * y", f"return {STOP}(weight) * y", NORMS),
    Bug("probabilities stopped", PROBABILITIES, f"{STOP}({PROBABILITIES})", MIXED),
    Bug(
        "softmax without its sum",
        PROBABILITIES,
        differentiated_as(PROBABILITIES, f"{STOP}({PROBABILITIES}) * jnp.where(scores > -jnp.inf, wide(scores), 0)"),
        MIXED,
    ),
    Bug(
        "rotated once more",
        f"return {TURNED}",
        "back = jnp.stack([even * cosine + odd * sine, odd * cosine - even * sine], axis=-1).reshape(x.shape)\n"
        f"    return {differentiated_as(TURNED, 'back')}",
        MIXED,
    ),
    Bug(
        "keys of a group averaged",
        "k_BSKh = rotated(k.",
        f"k = {differentiated_as('k', 'k * sizes.kv_heads / sizes.heads')}\n    k_BSKh = rotated(k.",
        MIXED,
    ),
    Bug(
        "queries not trained",
        'x @ layer[f"w{part}"]',
        f'x @ ({STOP}(layer["wq"]) if part == "q" else layer[f"w{{part}}"])',
        ("layers.*.attention.q",),
    ),
    Bug("gate stopped", "jax.nn.silu(gate)", f"{STOP}(jax.nn.silu(gate))", PRODUCT),
    Bug(
        "sigmoid for the slope of silu",
        "jax.nn.silu(gate)",
        differentiated_as("jax.nn.silu(gate)", f"{STOP}(jax.nn.sigmoid(gate)) * gate"),
        PRODUCT,
    ),
    Bug(
        "residual of the mlp stopped",
        'x + tap(f"{name}.mlp", mlp',
        f'{STOP}(x) + tap(f"{{name}}.mlp", mlp',
        ("layers.*", "layers.*.middle"),
    ),
    Bug("embedding learns twice", TOKENS, differentiated_as(TOKENS, f"2 * {TOKENS}"), ("embed",)),
    Bug("head not trained", '@ weights["head"]', f'@ {STOP}(weights["head"])', ("output",)),
    Bug("nothing behind the head", f"{NORMED} @", f"{STOP}({NORMED}) @", ("output",)),
)
"""Of the backward pass alone: activations in whose making a gradient is wrong."""
