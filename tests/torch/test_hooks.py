"""Recording activations: stores, extraction in constant memory, files."""

from __future__ import annotations

import copy
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kempnerforge_torch.model.hooks import (
    ActivationStore,
    capture,
    extract_representations,
    replacing,
    save_activations,
)
from kempnerforge_torch.model.state import to_numpy
from kempnerforge_torch.model.transformer import Transformer
from shared_config.errors import UserError
from shared_config.interchange.activations import read_activations
from shared_config.schema.model import ModelConfig

CONFIG = ModelConfig(dim=16, n_layers=2, n_heads=2, vocab_size=19, ffn_hidden_dim=24, max_seq_len=16)
NAMES = ["layers.1.attention", "layers.0", "norm"]
TOKENS = torch.arange(12).reshape(2, 6)


class ByModality(nn.Module):
    """Puts out a dict, as layers of several modalities do; and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.dicts, self.tuples = Doubled(as_dict=True), Doubled(as_dict=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dicts(x)["image"] + self.tuples(x)[0]


class Doubled(nn.Module):
    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.as_dict = as_dict

    def forward(self, x: torch.Tensor) -> Any:
        return {"image": 2 * x, "text": 3 * x} if self.as_dict else (4 * x, "rest")


def test_a_store_records_while_it_is_enabled() -> None:
    model = Transformer(CONFIG)
    store = ActivationStore(model, NAMES)
    assert store.layer_names == NAMES
    model(TOKENS)
    assert not store.enabled
    assert store.activations == {}
    store.enable()
    store.enable()
    with capture(model, NAMES) as expected:
        model(TOKENS)
    assert store.enabled
    assert list(store.activations) == ["layers.0", "layers.1.attention", "norm"], "in the order of calls"
    for name in NAMES:
        assert torch.equal(store.get(name), expected[name])
        assert not store.get(name).requires_grad
    store.disable()
    model(TOKENS[:1])
    assert store.get("norm").shape == (2, 6, 16)
    store.clear()
    assert store.get("norm") is None


def test_an_output_can_be_replaced_for_what_follows() -> None:
    model = Transformer(CONFIG).double()
    with capture(model) as expected:
        model(TOKENS)
    given = torch.randn(2, 6, 16)
    with capture(model) as found, replacing(model, {"layers.0": given, "norm": expected["norm"]}):
        logits = model(TOKENS)
    assert torch.equal(found["layers.0"], expected["layers.0"]), "what it put out itself"
    wanted = model.get_submodule("layers.1.attention_norm")(given.double())
    assert torch.equal(found["layers.1.attention_norm"], wanted)
    assert not torch.equal(found["norm"], expected["norm"])
    assert torch.equal(logits, expected["output_head"])
    logits.sum().backward()
    assert model.get_parameter("layers.1.mlp.up_proj.weight").grad is None, "no gradient flows through"
    assert torch.equal(model(TOKENS), expected["output_head"]), "nothing stays"
    with pytest.raises(ValueError, match=r"did you mean 'layers\.0'"), replacing(model, {"layer.0": given}):
        pass
    message = r"layers\.0: puts out \(2, 6, 16\); its replacement is \(2, 5, 16\)"
    with pytest.raises(ValueError, match=message), replacing(model, {"layers.0": given[:, :5]}):
        model(TOKENS)


def test_what_is_recorded_is_a_copy() -> None:
    module = ByModality()
    store = ActivationStore(module)
    store.enable()
    x = torch.ones(2)
    module(x)
    kept = store.get("dicts")
    assert {name: value.tolist() for name, value in kept.items()} == {"image": [2, 2], "text": [3, 3]}
    assert store.get("tuples").tolist() == [4, 4]
    copied = copy.deepcopy(module)
    assert copied(x).tolist() == [6, 6]


def test_unknown_names_are_refused_with_what_exists() -> None:
    model = Transformer(CONFIG)
    message = "name = 'layer.0': no such module; did you mean 'layers.0'"
    with pytest.raises(ValueError, match=message):
        ActivationStore(model, ["layer.0"])
    with pytest.raises(ValueError, match=message):
        extract_representations(model, [TOKENS[0]], ["layer.0"])
    with pytest.raises(ValueError, match=r"Modules: layers\.0"):
        ActivationStore(model, ["layers.0"]).get("norm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extraction_gives_the_outputs_of_every_sample(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Transformer(CONFIG).to(dtype).train()
    samples = [{"input_ids": row} for row in np.random.default_rng(0).integers(0, 19, (7, 6))]
    names = [*NAMES, "output_head"]
    found = extract_representations(model, samples, names, "cpu", batch_size=3, max_samples=5)
    assert found is not None
    assert model.training
    with capture(model, names) as expected:
        model(torch.from_numpy(np.stack([sample["input_ids"] for sample in samples[:5]])))
    assert extract_representations(
        model, iter(samples), names, batch_size=3, max_samples=5, path=tmp_path / "all.npz"
    ) is None  # fmt: skip
    read = read_activations(tmp_path / "all.npz")
    assert set(found) == set(read) == set(names)
    for name in names:
        assert (found[name].dtype, found[name].device.type) == (dtype, "cpu")
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0.05 if dtype == torch.bfloat16 else 1e-5)
        np.testing.assert_array_equal(read[name], to_numpy(found[name]))
        assert read[name].dtype == to_numpy(found[name]).dtype


def test_samples_go_where_the_model_is() -> None:
    model, seen = Transformer(CONFIG).to("meta"), []
    assert model.token_embedding is not None
    model.token_embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].device.type))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):  # has no values to give
        extract_representations(model, [TOKENS[0]], ["layers.0"])
    assert seen == ["meta"]


def test_an_interrupted_extraction_leaves_nothing(tmp_path: Path) -> None:
    def samples() -> Iterator[list[int]]:
        yield from ([1, 2, 3], [4, 5, 6])
        assert any(tmp_path.iterdir()), "parts are on the disk"
        raise KeyboardInterrupt

    (tmp_path / "kept.npz").write_bytes(b"older")
    for name in ("new.npz", "kept.npz"):
        with pytest.raises(KeyboardInterrupt):
            extract_representations(Transformer(CONFIG), samples(), NAMES, batch_size=1, path=tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["kept.npz"]
    assert (tmp_path / "kept.npz").read_bytes() == b"older"


def test_a_long_extraction_does_not_grow(tmp_path: Path) -> None:
    """What 300 batches put out is many times what the process may grow by."""
    model = Transformer(CONFIG.replace(dim=128, n_layers=1, max_seq_len=64))
    tokens = [place % 19 for place in range(64)]

    def extract(count: int) -> int:
        path = tmp_path / "long.npz"
        extract_representations(model, (tokens for _ in range(count)), ["norm"], batch_size=8, path=path)
        return path.stat().st_size

    extract(64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    written = extract(2400)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert written > 70e6
    assert grown < 20e6


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([], {}, "dataset is empty"),
        ([[1, 2], [1]], {}, "dataset has samples of 2 and of 1 tokens: all must be as long"),
        ([{"text": "a"}], {}, r"dataset\[0\] has \['text'\]: must have one of tokens, input_ids"),
        ([[[1]]], {}, r"dataset\[0\] is int64\[1, 1\]: must be token ids of one sequence"),
        ([[1]], {"batch_size": 0}, "batch_size = 0: must be at least 1"),
        ([[1]], {"max_samples": 0}, "max_samples = 0: must be at least 1"),
    ],
)
def test_datasets_without_meaning_are_refused(samples: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract_representations(Transformer(CONFIG), samples, NAMES, **options)


def test_saved_activations_are_read_back(tmp_path: Path) -> None:
    activations = {
        "a": torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True),
        "mlp": {"image": torch.arange(3), "text": torch.tensor(2.5)},
        "empty": torch.zeros(0, 4),
    }
    save_activations(activations, tmp_path / "new" / "saved")
    read = read_activations(tmp_path / "new" / "saved.npz")
    assert {name: (array.dtype.name, array.shape) for name, array in read.items()} == {
        "a": ("bfloat16", (2, 3)),
        "mlp/image": ("int64", (3,)),
        "mlp/text": ("float32", ()),
        "empty": ("float32", (0, 4)),
    }
    assert read["mlp/text"] == 2.5
    assert (read["a"] == 1).all()
    with np.load(tmp_path / "new" / "saved.npz") as archive:
        assert archive["a"].dtype == np.uint16, "readable without ml_dtypes"
    assert os.listdir(tmp_path / "new") == ["saved.npz"]


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 torn"])
def test_files_that_cannot_be_read_are_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "broken.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.npz: can't be read"):
        read_activations(path)
