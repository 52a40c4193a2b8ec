"""Bugs to plant, one at a time, to prove that the tests see them.

A mutant is a change of source text: `planted` imports the backend anew with one module changed. Every place it names
must occur exactly once, so a mutant that no longer fits the source is an error, not a silent survivor.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import linecache
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import pytest
from hypothesis import settings

BACKENDS = ("torch", "jax")
KILLED, SURVIVED = "killed", "survived"
Check = Callable[[str], object]
Bug = TypeVar("Bug")
Result = TypeVar("Result")


class StaleMutantError(Exception):
    """A mutant's text does not occur exactly once in the source that it changes."""


@dataclass(frozen=True)
class Mutant:
    """One bug, as it reads in each backend.

    Attributes:
        component: module below the backend, "model.norm".
        name: what is wrong.
        torch, jax: (text, replacement); None where one backend has no such thing.
    """

    component: str
    name: str
    torch: tuple[str, str] | None
    jax: tuple[str, str] | None

    def __str__(self) -> str:
        return f"{self.component}: {self.name}"


def both(component: str, name: str, text: str, replacement: str) -> Mutant:
    """A bug that reads the same in both backends."""
    return Mutant(component, name, (text, replacement), (text, replacement))


MUTANTS = (
    Mutant(
        "model.norm", "RMSNorm without eps",
        ("wide.square().mean(dim=-1, keepdim=True) + self.eps", "wide.square().mean(dim=-1, keepdim=True)"),
        ("jnp.square(wide).mean(axis=-1, keepdims=True) + self.eps", "jnp.square(wide).mean(axis=-1, keepdims=True)"),
    ),
    Mutant(
        "model.norm", "RMSNorm weight ignored",
        ("(wide * scale * self.factor(dtype)).to", "(wide * scale).to"),
        ("(wide * scale * self.factor(dtype)).astype", "(wide * scale).astype"),
    ),
    Mutant(
        "model.norm", "LayerNorm not centred",
        ("centred = wide - wide.mean(dim=-1, keepdim=True)", "centred = wide"),
        ("centred = wide - wide.mean(axis=-1, keepdims=True)", "centred = wide"),
    ),
    Mutant(
        "model.norm", "LayerNorm bias ignored",
        (" + self.bias.to(dtype)).to", ").to"),
        ("weight + bias).astype", "weight).astype"),
    ),
    Mutant(
        "model.norm", "hidden bfloat16 cast",
        ("(wide * scale * self.factor", "(wide * scale.bfloat16() * self.factor"),
        ("(wide * scale * self.factor", "(wide * scale.astype(jnp.bfloat16) * self.factor"),
    ),
    both("model.position", "rotation the other way", "x1 * cos - x2 * sin, x2 * cos + x1 * sin",
         "x1 * cos + x2 * sin, x2 * cos - x1 * sin"),
    both("model.position", "halves in the wrong order", "x1 * cos - x2 * sin, x2 * cos + x1 * sin",
         "x2 * cos + x1 * sin, x1 * cos - x2 * sin"),
    Mutant(
        "model.position", "pairs interleaved",
        ("x1, x2 = x.to(dtype).chunk(2, dim=-1)", "x1, x2 = x.to(dtype)[..., ::2], x.to(dtype)[..., 1::2]"),
        ("x1, x2 = jnp.split(x.astype(dtype), 2, axis=-1)",
         "x1, x2 = x.astype(dtype)[..., ::2], x.astype(dtype)[..., 1::2]"),
    ),
    both("model.norm", "1 left out", "return 1 + super().factor(dtype)", "return super().factor(dtype)"),
    both("model.softcap", "cap not given back", "(cap * ", "("),
    both("model.softcap", "cap ignored", "if cap is None:", "if True:"),
    Mutant(
        "model.attention", "scores not capped",
        ("else scale), softcap)", "else scale), None)"),
        ("soft_capped(scores_BHSM, softcap)", "scores_BHSM"),
    ),
    both("model.embedding", "logits not capped", "return soft_capped(divided(self.proj",
         "return (lambda x, _: x)(divided(self.proj"),
    Mutant(
        "model.mlp", "exact gelu of gates",
        ('"geglu_tanh": functools.partial(F.gelu, approximate="tanh")', '"geglu_tanh": F.gelu'),
        ('"geglu_tanh": _widened(functools.partial(jax.nn.gelu, approximate=True))',
         '"geglu_tanh": _widened(functools.partial(jax.nn.gelu, approximate=False))'),
    ),
    both("model.attention", "all layers are rotated", "if self.rotary:", "if True:"),
    both("model.transformer", "all layers have the window", "sliding_window=window,",
         "sliding_window=self.config.sliding_window,"),
    both("model.transformer", "theta of layers with a window ignored",
         "self.rope if window is None or self.window_rope is None else self.window_rope", "self.rope"),
    both("model.position", "theta ignored", "rope_tables(head_dim, max_seq_len, theta, scaling)",
         "rope_tables(head_dim, max_seq_len, 10000.0, scaling)"),
    both("model.position", "scaling ignored", "rope_tables(head_dim, max_seq_len, theta, scaling)",
         "rope_tables(head_dim, max_seq_len, theta)"),
    Mutant(
        "model.position", "positions off by one",
        ("self.cos[positions].to(dtype)", "self.cos[positions - 1].to(dtype)"),
        ("table.at[positions]", "table.at[positions - 1]"),
    ),
    Mutant(
        "model.embedding", "id range not checked",
        ('check_ids("tokens", tokens, self.embedding.num_embeddings)\n            raise',
         "return self.embedding(tokens.clamp(0, self.embedding.num_embeddings - 1))"),
        ('check_ids("tokens", tokens, self.embedding.num_embeddings)', "pass"),
    ),
    Mutant(
        "model.checks", "masks of any type",
        ("if mask.dtype != torch.bool:", "if False:"),
        ("if mask.dtype != jnp.bool_:", "if False:"),
    ),
    both("model.checks", "negative ids pass", "is_outside = (values < 0) | (values >= size)",
         "is_outside = values >= size"),
    Mutant(
        "model.checks", "narrow integers wrap what they are compared with",
        ("return ids.long()", "return ids"),
        ("return ids.astype(jnp.promote_types(ids.dtype, jnp.int32))", "return ids"),
    ),
    both("model.checks", "no NaN where ids can't be seen", "((ids < 0) | (ids >= size)).reshape(",
         "((ids < -size) | (ids < -size)).reshape("),
    Mutant(
        "model.embedding", "weights not tied",
        ("self.proj.weight = tied", "pass"),
        ("linear(x, tied_weight)", "linear(x, 0.5 * tied_weight)"),
    ),
    Mutant(
        "model.mlp", "gate and up swapped",
        ("F.silu(self.gate_proj(x)) * self.up_proj(x)", "F.silu(self.up_proj(x)) * self.gate_proj(x)"),
        ('ACTIVATIONS["silu"](self.gate_proj(x)) * self.up_proj(x)',
         'ACTIVATIONS["silu"](self.up_proj(x)) * self.gate_proj(x)'),
    ),
    Mutant(
        "model.mlp", "gelu by tanh",
        ('"gelu")(F.gelu)', '"gelu")(functools.partial(F.gelu, approximate="tanh"))'),
        ("approximate=False", "approximate=True"),
    ),
    Mutant(
        "model.mlp", "silu for gelu",
        ('"gelu")(F.gelu)', '"gelu")(F.silu)'),
        ('"gelu")(_widened(functools.partial(jax.nn.gelu, approximate=False)))', '"gelu")(_widened(jax.nn.silu))'),
    ),
    both("model.mask", "causal mask off by one", "key.position <= query.position", "key.position < query.position"),
    both("model.mask", "future visible", "key.position <= query.position", "key.position <= query.position + 1"),
    both("model.mask", "window one too wide", "(key.position > query", "(key.position >= query"),
    both("model.mask", "window one too narrow", "query.position - window)", "query.position - window + 1)"),
    both("model.mask", "window ignored", "terms.append(key.position > query.position - window)", "pass"),
    both("model.mask", "a prefix one too long",
         "(query.position < query.prefix) &", "(query.position <= query.prefix) &"),
    both("model.mask", "what follows a prefix sees and is seen both ways",
         "query.prefix) & (key.position", "query.prefix) | (key.position"),
    Mutant(
        "model.mask", "the prefix of another row",
        ("mask.prefix_lengths.reshape(", "mask.prefix_lengths.flip(0).reshape("),
        ("mask.prefix_lengths.reshape(", "mask.prefix_lengths[::-1].reshape("),
    ),
    both("model.mask", "a prefix sees within the window alone", "terms) | both_in_prefix]",
         "terms) | both_in_prefix & terms[-1]]"),
    both("model.mask", "documents ignored", "    if query.doc_id is not None:", "    if False:"),
    both("model.mask", "documents of keys shifted", "== key.doc_id)",
         "== key.doc_id[..., [-1, *range(key.doc_id.shape[-1] - 1)]])"),
    both("model.mask", "padding ignored", "[key.valid] if key.valid is not None else []", "[]"),
    Mutant(
        "model.mask", "queries not behind the cached keys",
        ("torch.arange(keys - queries, keys, device", "torch.arange(queries, device"),
        ("jnp.arange(keys - queries, keys, dtype", "jnp.arange(queries, dtype"),
    ),
    both("model.mask", "positions of queries ignored", "query_positions, key_positions = mask.query_positions,",
         "query_positions, key_positions = None,"),
    both("model.mask", "positions of keys ignored", "= mask.query_positions, mask.key_positions",
         "= mask.query_positions, None"),
    Mutant(
        "model.attention", "scale forgotten",
        ("            scale=scale,\n            enable_gqa", "            scale=1.0,\n            enable_gqa"),
        ("(channels**-0.5 if scale is None else scale)", "1.0"),
    ),
    Mutant(
        "model.attention", "heads tiled instead of grouped",
        ("            k,\n            v,\n            attn_mask",
         "            *(t.repeat(1, q.shape[1] // t.shape[1], 1, 1) for t in (k, v)),\n            attn_mask"),
        ("q_BKGSh = q.reshape(batch, k.shape[1], -1, length, channels)",
         "q_BKGSh = q.reshape(batch, -1, k.shape[1], length, channels).swapaxes(1, 2)"),
    ),
    both("model.attention", "key norm for queries", "self._heads(self.q_proj(x), self.q_norm)",
         "self._heads(self.q_proj(x), self.k_norm)"),
    both("model.attention", "scale of the config ignored", "head_dim**-0.5 if scale is None else scale\n        self",
         "head_dim**-0.5\n        self"),
    both("model.embedding", "embeddings not scaled", "scaled(x_BSD, self.scale)", "x_BSD"),
    Mutant("model.factors", "logits not divided", ("x / divisor", "x"), ("_wide(x) / divisor", "_wide(x)")),
    both("model.block", "what is added not scaled", "scaled(out, self.residual_scale)", "out"),
    both("model.block", "norm of attention taken of the sum", "self._added(x, _normed(self.attention_post_norm, out))",
         "_normed(self.attention_post_norm, self._added(x, out))"),
    both("model.block", "norm after the feed-forward layer taken of the sum",
         "self._added(x, _normed(self.mlp_post_norm, out))", "_normed(self.mlp_post_norm, self._added(x, out))"),
    Mutant(
        "model.attention", "row without keys not zeroed",
        ("return out_BHSh if empty is None else out_BHSh.masked_fill(empty, 0)", "return out_BHSh"),
        ("jnp.where(mask.dense.empty, 0, out_BHSh)", "out_BHSh + jnp.where(mask.dense.empty, v.mean(), 0)"),
    ),
    both("model.attention", "keys not rotated",
         "apply_rope(k_BKMh, rope_cos, rope_sin)", "k_BKMh"),
    Mutant(
        "model.decode_state", "cached positions start again",
        ("return steps_S + self._max_length if self._rows_equal else self.lengths.long()[:, None] + steps_S",
         "return steps_S"),
        ("return self.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)",
         "return 0 * self.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)"),
    ),
    both("model.block", "residual around attention dropped", "self._added(x, _normed(self.attention_post_norm, out))",
         "_normed(self.attention_post_norm, out)"),
    Mutant(
        "model.block", "residual around the feed-forward layer dropped",
        ("self.mlp(normed_BSD), None\n", "self.mlp(normed_BSD) - x, None\n"),
        ("self.mlp(normed_BSD), None\n", "self.mlp(normed_BSD) - x, None\n"),
    ),
    Mutant(
        "model.block", "norm before attention dropped",
        ("            _normed(self.attention_norm, x),\n", "            x,\n"),
        ("            _normed(self.attention_norm, x),\n", "            x,\n"),
    ),
    both("model.architecture", "eps of the final norm", "self.config.norm_eps", "self.config.norm_eps * 2"),
    both("model.architecture", "final norm dropped", "return x if norm is None else norm(x)", "return x"),
    both("model.block", "eps of the config ignored", "norm_eps=config.norm_eps", "norm_eps=1e-5"),
    Mutant(
        "model.modality", "prefix after the text",
        ("torch.cat([prefix_BPD, text], dim=1)", "torch.cat([text, prefix_BPD], dim=1)"),
        ("jnp.concatenate([prefix_BPD, text], axis=1)", "jnp.concatenate([text, prefix_BPD], axis=1)"),
    ),
    both("model.modality", "output slice ignored", "else stream[:, modality.output_slice]", "else stream"),
    both("model.modality", "two sources allowed", "len(sources) > 1", "len(sources) > 2"),
    both("model.modality", "mask without features allowed", "if self.image_mask is not None and not self.reads_image",
         "if False"),
    Mutant(
        "model.init", "seed ignored",
        ("initial_value(name, spec, seed)", "initial_value(name, spec, 0)"),
        ("initial_value(name, spec, seed)", "initial_value(name, spec, 0)"),
    ),
    Mutant(
        "model.init", "constants of 0",
        ("tensor.fill_(spec.initializer.value)", "tensor.fill_(0.0)"),
        ("spec.initializer.value", "0.0"),
    ),
    Mutant(
        "training.loss", "ignored labels count",
        ("count = (labels_N != IGNORED).sum()", "count = (labels_N != IGNORED).sum() * 0 + len(labels_N)"),
        ("jnp.sum(labels_BS != IGNORED, dtype=jnp.int32)", "jnp.asarray(labels_BS.size, jnp.int32)"),
    ),
    Mutant(
        "training.loss", "labels shifted",
        ("labels_BS.flatten().long()", "labels_BS.roll(1, -1).flatten().long()"),
        ("return _summed(logits, labels_BS, ", "return _summed(logits, jnp.roll(labels_BS, 1, -1), "),
    ),
    Mutant(
        "training.optimizer", "everything decays",
        ('group["weight_decay"] = rates.decay if group[_DECAYS] else 0.0', 'group["weight_decay"] = rates.decay'),
        ("rates if specs[name].decay else rates._replace(decay=0.0)", "rates"),
    ),
    Mutant(
        "training.optimizer", "eps forgotten",
        ("eps=config.eps,", "eps=0.0,"),
        ("eps=config.eps, eps_root", "eps=0.0, eps_root"),
    ),
    Mutant(
        "training.optimizer", "a skipped step still moves the moments",
        ('if finite is None or (finite.device.type == "cpu" and finite):', "if True:"),
        ("(dict(parameters), dict(state)))", "(dict(parameters), dict(new_state)))"),
    ),
    Mutant(
        "training.optimizer", "counts of updates are those of the run",
        ('assign(tensor_state["step"], values[f"t.{name}"])', 'tensor_state["step"].fill_(step)'),
        ("own.get(UPDATES, {}))} | dict(moments)",
         "own.get(UPDATES, {}))} | {name: one for name, one in moments.items() if not name.startswith(UPDATES)}"),
    ),
    Mutant(
        "training.optimizer", "clipping scales up small gradients",
        ("max_norm / norm.clamp(min=max_norm)", "max_norm / norm"),
        ("max_norm / jnp.maximum(norm, max_norm)", "max_norm / norm"),
    ),
    Mutant(
        "model.router", "bias in the combine weights",
        ("self._weigh(scores_TE.gather(", "self._weigh(self._preference(scores_TE).gather("),
        ("self._weigh(jnp.take_along_axis(scores_TE,", "self._weigh(jnp.take_along_axis(self._preference(scores_TE),"),
    ),
    Mutant(
        "model.router", "balancing bias ignored",
        ("return scores_TE + self.expert_bias.to(scores_TE.dtype)", "return scores_TE"),
        ("return scores_TE + self.expert_bias.get_value().astype(scores_TE.dtype)", "return scores_TE"),
    ),
    both("model.router", "renormalisation dropped", "if self.norm_topk_prob:", "if not self.norm_topk_prob:"),
    both("model.router", "routed scaling dropped", "return chosen_Tk * self.routed_scaling", "return chosen_Tk"),
    both("model.moe", "shared expert dropped", "if self.shared_expert is not None:", "if False:"),
    Mutant(
        "model.dispatch", "tokens before choices under capacity",
        ("expert_R = indices_Tk.t().flatten()", "expert_R = indices_Tk.flatten()"),
        ("expert_R = indices_Tk.T.ravel()", "expert_R = indices_Tk.ravel()"),
    ),
    Mutant(
        "model.dispatch", "gradient not scaled",
        ("return dy * factors, None", "return dy, None"),
        ("return dy * factors, jnp.zeros_like(factors)", "return dy, jnp.zeros_like(factors)"),
    ),
    Mutant(
        "model.sampling", "temperature inverted",
        ("/ max(temperature, torch.finfo(dtype).tiny)", "* temperature"),
        ("/ jnp.maximum(temperature, jnp.finfo(dtype).tiny)", "* temperature"),
    ),
    Mutant(
        "model.sampling", "crossing token dropped",
        ("kept_V = torch.where(before_V < top_p,", "kept_V = torch.where(before_V + probabilities_V <= top_p,"),
        ("kept_V = jnp.where(before_V < top_p,", "kept_V = jnp.where(before_V + probabilities_V <= top_p,"),
    ),
    both("model.sampling", "one token more than top_k", ">= top_k", "> top_k"),
    Mutant(
        "model.sampling", "ties to the last index",
        ("logits.to(dtype).sort(dim=-1, descending=True, stable=True)",
         "((t := logits.to(dtype).flip(-1).sort(dim=-1, descending=True, stable=True)).values, "
         "logits.shape[-1] - 1 - t.indices)"),
        ("jnp.argsort(logits, axis=-1, descending=True, stable=True)",
         "(logits.shape[-1] - 1 - jnp.argsort(logits[..., ::-1], axis=-1, descending=True, stable=True))"),
    ),
    Mutant(
        "model.decode", "row goes on after its end",
        ("else tokens_B.masked_fill(done_B, request.sampling.pad_token_id)", "else tokens_B"),
        ("output_B = jnp.where(state.done, options.pad_token_id, drawn_B)", "output_B = drawn_B"),
    ),
    both("model.decode", "cached position off by one", "prompts.lengths - 1 + request", "prompts.lengths + request"),
    both("model.decode", "padding of ragged prompts seen", "prompts.lengths - 1 + request",
         "prompts.lengths * 0 + prompts.lengths.max() - 1 + request"),
)  # fmt: skip


@contextlib.contextmanager
def planted(mutant: Mutant | None, backend: str) -> Iterator[None]:
    """While open, the backend's modules are fresh ones, one of them mutated; None plants nothing.

    Raises:
        StaleMutantError: when the module is imported, if the text does not occur exactly once.
    """
    package = f"kempnerforge_{backend}"
    real = _removed(package)
    finder = _MutatingFinder(f"{package}.{mutant.component}", *getattr(mutant, backend)) if mutant else None
    if finder is not None:
        sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        if finder is not None:
            sys.meta_path.remove(finder)
            linecache.clearcache()
        _removed(package)
        sys.modules.update(real)
        for name, module in real.items():
            parent, _, leaf = name.rpartition(".")
            if parent in real:
                setattr(real[parent], leaf, module)


def verdict(mutant: Mutant, backend: str, checks: Iterable[Check]) -> str:
    """KILLED if one of the checks fails by its assertion; SURVIVED if all pass; else the error of the first that died,
    which proves nothing of the property.
    """
    accident = SURVIVED
    with planted(mutant, backend):
        for check in checks:
            try:
                check(backend)
            except StaleMutantError:
                raise
            except (AssertionError, pytest.fail.Exception):
                return KILLED
            except Exception as error:
                if accident == SURVIVED:
                    accident = f"{getattr(check, '__name__', check)}: {type(error).__name__}: {error}"
    return accident


def mutants_in(mutants: Iterable[Mutant], backend: str) -> list[Mutant]:
    """Those that a backend has."""
    return [mutant for mutant in mutants if getattr(mutant, backend) is not None]


def of_this_run(bugs: Sequence[Bug], backend: str, every: int) -> Sequence[Bug]:
    """Every eighth that is planted in PyTorch. Of JAX, which compiles anew for each of them, fewer. All under
    HYPOTHESIS_PROFILE=nightly.
    """
    is_nightly = settings.get_current_profile_name() == "nightly"
    return bugs if is_nightly else bugs[:: 8 if backend == "torch" else every]


def not_killed(mutants: Iterable[Mutant], backend: str, checks: Mapping[str, Sequence[Check]]) -> dict[str, str]:
    """The verdicts on those that no check of their component kills; see `in_a_process`."""
    found = {str(mutant): verdict(mutant, backend, checks[mutant.component]) for mutant in mutants_in(mutants, backend)}
    return {mutant: said for mutant, said in found.items() if said != KILLED}


def in_a_process(function: Callable[..., Result], *arguments: object) -> Result:
    """What a function returns in a fresh process: operators that a mutated module registers replace the real ones."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class _MutatingFinder(importlib.abc.MetaPathFinder):
    """Finds one module, and loads it with its source changed."""

    def __init__(self, module: str, text: str, replacement: str) -> None:
        self.module, self.text, self.replacement = module, text, replacement

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)  # type: ignore[arg-type]
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _MutatedLoader(name, spec.origin, self.text, self.replacement)
        return spec


class _MutatedLoader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, text: str, replacement: str) -> None:
        super().__init__(name, path)
        self.text, self.replacement = text, replacement

    def get_code(self, fullname: str) -> object:  # type: ignore[override]
        source = mutated_source(Path(self.path).read_text(encoding="utf-8"), self.text, self.replacement, fullname)
        linecache.cache[self.path] = len(source), None, source.splitlines(keepends=True), self.path  # for Triton
        return compile(source, self.path, "exec")


def mutated_source(source: str, text: str, replacement: str, where: str) -> str:
    """The source with the one occurrence of ``text`` replaced.

    Raises:
        StaleMutantError: if there is none, or more than one.
    """
    found = source.count(text)
    if found != 1:
        raise StaleMutantError(f"{where}: {text!r} occurs {found} times, must occur once")
    return source.replace(text, replacement)


def _removed(package: str) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == package or name.startswith(package + ".")]
    return {name: sys.modules.pop(name) for name in names}
