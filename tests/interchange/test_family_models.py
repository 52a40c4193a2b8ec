"""Models of every family, drawn and saved by transformers, are the same function here: logits, the residual stream,
gradients, greedy decoding; and go back there bit by bit.

By day two draws each, in PyTorch; ``HYPOTHESIS_PROFILE=nightly`` draws 25 and runs JAX as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kempnerforge_torch.model.generate import generate
from kempnerforge_torch.model.state import get_state, set_state
from kempnerforge_torch.model.transformer import Transformer
from shared_config.interchange.huggingface import load_huggingface, save_huggingface, to_huggingface
from shared_config.interchange.huggingface_families import FAMILIES
from shared_config.interchange.weights import load_weights
from shared_config.parity.validation import validation_tokens
from shared_config.schema.model import ModelConfig
from tests.interchange.theirs import VOCABULARY, build, drawn_configs, gradients, saved

NIGHTLY = settings.get_current_profile_name() == "nightly"
EXAMPLES = 25 if NIGHTLY else 2
ALLOWED = 2e-5
"""Of the largest number: transformers' softmax and rotary tables are float32 whatever the model is."""
TOLD = 3e-4
"""The same of gradients, through several layers."""
PROMPTS, NEW_TOKENS = (3, 9, 6), 7

Named = Mapping[str, np.ndarray]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=EXAMPLES, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_a_model_of_theirs_is_the_same_function_here(family: str, data: st.DataObject) -> None:
    model = build(data.draw(drawn_configs(family)), seed=1)
    with tempfile.TemporaryDirectory() as folder:
        check(model, Path(folder))


def check(model: Any, folder: Path) -> None:
    files = load_weights(saved(model, folder / "theirs"))
    config, state = load_huggingface(folder / "theirs")
    assert config.family == model.config.model_type
    tokens = validation_tokens(VOCABULARY, 2, 11, seed=1)
    scales = np.random.default_rng(2).standard_normal((2, 11, VOCABULARY))
    assert_back(model, config, state, files, folder / "back", tokens)
    decoded = their_continuations(model)
    stream, logits = their_forward(model, tokens)
    (model(torch.from_numpy(tokens).long(), use_cache=False).logits * torch.from_numpy(scales)).sum().backward()
    wanted = gradients(model, folder / "gradients")

    ours = Transformer(config).double()
    set_state(ours, state)
    found = forward(ours, tokens)
    assert_close({"logits": found.pop("logits")}, {"logits": logits}, ALLOWED)
    assert_close(found, stream, ALLOWED)
    (ours(torch.from_numpy(tokens)) * torch.from_numpy(scales)).sum().backward()
    assert_close(to_huggingface(own_gradients(ours), config), wanted, TOLD)
    assert continuations(ours).tolist() == decoded.tolist()
    if NIGHTLY:
        check_jax(config, state, tokens, scales, logits, wanted, decoded)


def assert_back(model: Any, config: ModelConfig, state: Named, files: Named, folder: Path, tokens: np.ndarray) -> None:
    """Written here: the same files, to the bit, and in transformers the same model."""
    save_huggingface(folder, state, config)
    written = load_weights(folder)
    assert written.keys() == files.keys()
    assert all(np.array_equal(written[name], values) for name, values in files.items())
    assert load_huggingface(folder)[0] == config
    again = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    if config.is_moe:
        again.set_experts_implementation("eager")
    assert type(again) is type(model)
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        there, here = (each(ids, use_cache=False).logits for each in (model, again))
    torch.testing.assert_close(here, there, rtol=1e-11, atol=1e-13)  # sums depend on where in memory weights begin


def their_forward(model: Any, tokens: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    with torch.no_grad():
        out = model(torch.from_numpy(tokens).long(), use_cache=False, output_hidden_states=True)
    names = ["token_embedding", *(f"layers.{layer}" for layer in range(len(out.hidden_states) - 2)), "norm"]
    return {name: each.numpy() for name, each in zip(names, out.hidden_states, strict=True)}, out.logits.numpy()


def forward(model: Transformer, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Logits, and the stream where transformers shows it: after the embedding, each layer but the last, the norm."""
    found: dict[str, np.ndarray] = {}
    watched = {"token_embedding": model.token_embedding, "norm": model.norm}
    watched |= {f"layers.{name}": block for name, block in list(model.layers.items())[:-1]}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            found[name] = (output if isinstance(output, torch.Tensor) else output.x).detach().numpy()

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in watched.items() if module is not None]
    with torch.no_grad():
        found["logits"] = model(torch.from_numpy(tokens)).numpy()
    for hook in hooks:
        hook.remove()
    return found


def own_gradients(model: Transformer) -> dict[str, np.ndarray]:
    parameters = dict(model.named_parameters())
    zero = {name: np.zeros(tensor.shape) for name, tensor in get_state(model).items()}
    return zero | {name: each.grad.numpy() for name, each in parameters.items() if each.grad is not None}


def prompts() -> list[np.ndarray]:
    return [validation_tokens(VOCABULARY, 1, length, seed=length)[0] for length in PROMPTS]


def their_continuations(model: Any) -> np.ndarray:
    """Greedy, of prompts padded on the left. (Their plain attention takes the least float64 for a mask, which is
    infinite in the float32 of its softmax.)
    """
    if model.config.model_type == "gemma2" or getattr(model.config, "attn_logit_softcapping", None):
        return alone(model)
    longest = max(PROMPTS)
    ids = np.stack([np.pad(row, (longest - len(row), 0)) for row in prompts()])
    seen = np.stack([np.arange(longest) >= longest - len(row) for row in prompts()])
    model.set_attn_implementation("sdpa")
    out = model.generate(
        torch.from_numpy(ids).long(),
        attention_mask=torch.from_numpy(seen).long(),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    model.set_attn_implementation("eager")
    return out[:, longest:].numpy()


def alone(model: Any) -> np.ndarray:
    """The same one by one, by plain attention: their fused one leaves out soft caps."""
    rows = []
    for prompt in prompts():
        ids = torch.from_numpy(prompt)[None].long()
        out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        rows.append(out[0, len(prompt) :].numpy())
    return np.stack(rows)


def continuations(model: Transformer) -> np.ndarray:
    """Greedy, of ragged prompts, which are read in chunks and go past the windows."""
    whole = generate(model, prompts(), NEW_TOKENS, temperature=0.0, prefill_chunk=4).numpy()
    return np.stack([row[length : length + NEW_TOKENS] for row, length in zip(whole, PROMPTS, strict=True)])


def check_jax(
    config: ModelConfig,
    state: Named,
    tokens: np.ndarray,
    scales: np.ndarray,
    logits: np.ndarray,
    wanted: Named,
    decoded: np.ndarray,
) -> None:
    """The same of the JAX model, its layers one by one and scanned."""
    import jax
    import jax.numpy as jnp

    from kempnerforge_jax.model import generate as jax_generate
    from kempnerforge_jax.model import state as jax_state
    from kempnerforge_jax.model.transformer import Transformer as JaxTransformer

    with jax.enable_x64(True):
        model = JaxTransformer(config, rngs=None)
        jax_state.set_state(model, state)
        graph, params, buffers = jax_state.split(model)

        def loss(params: Any, scan_layers: bool) -> tuple[Any, Any]:
            found = jax_state.merge(graph, params, buffers).run(jnp.asarray(tokens), scan_layers=scan_layers).logits
            return (found * scales).sum(), found

        for scan_layers in (False, True):
            derivative = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
            found_gradients, found = derivative(params, scan_layers)
            assert_close({"logits": np.asarray(found)}, {"logits": logits}, ALLOWED)
            named = {name: np.zeros(value.shape) for name, value in state.items()}
            named |= {name: np.asarray(value) for name, value in found_gradients.items()}
            assert_close(to_huggingface(named, config), wanted, TOLD)
        whole = np.asarray(jax_generate.generate(model, prompts(), NEW_TOKENS, temperature=0.0, prefill_chunk=4))
        rows = [row[length : length + NEW_TOKENS] for row, length in zip(whole, PROMPTS, strict=True)]
        assert np.array_equal(np.stack(rows), decoded)


def assert_close(found: Named, expected: Named, allowed: float) -> None:
    assert found.keys() == expected.keys()
    scale = max(np.abs(values).max() for values in expected.values())
    for name, values in expected.items():
        error = np.abs(np.asarray(found[name]) - values).max()
        largest = max(np.abs(values).max(), 1e-3 * scale)
        assert error <= allowed * largest, f"{name}: {error:.1e}, of {largest:.1e}"
