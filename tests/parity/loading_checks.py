"""What a model that gets its weights must not do: draw values first, take another dtype, or copy more than a stack of
experts at a time.
"""

from __future__ import annotations

import tempfile
import tracemalloc
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import ml_dtypes
import numpy as np

from shared_config.contract.decoding import DTYPES
from shared_config.contract.parameters import parameter_table
from shared_config.contract.vision import job_table
from shared_config.interchange.huggingface import save_huggingface
from shared_config.interchange.source import read_model
from shared_config.interchange.vision import tower_of
from shared_config.parity.request import make_request
from shared_config.parity.validation import validation_weights
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.training import TrainConfig
from tests.parity.fp8_checks import SIDES, small_job

EXPERTS, STACK_BYTES = 8, 8 * 64 * 256 * 2
MIXTURE = JobConfig(
    model=ModelConfig(
        dim=64, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=64, ffn_hidden_dim=256, max_seq_len=32,
        num_experts=EXPERTS, moe_top_k=2, moe_packed_experts=True, family="mixtral",
    ),
    train=TrainConfig(seq_len=16),
)  # fmt: skip


def nothing_drawn(backend: str) -> AbstractContextManager[object]:
    """No initial value may be made."""
    name = {"torch": "_initialise", "jax": "_initial"}[backend]
    return patch(f"kempnerforge_{backend}.model.init.{name}", side_effect=AssertionError("an initial value was drawn"))


def check_given(backend: str, kind: str = "dense") -> None:
    """Nothing is drawn, and in every dtype the bits are those of a model that drew values and was given the same."""
    side, job = SIDES[backend], small_job(kind, precision="fp32")
    weights = make_request(job, dtype="float64", seed=3).weights
    state, load = side.module("model.state"), side.module("model.build").load_model
    for dtype in DTYPES:
        with jax.enable_x64(dtype == "float64"):
            with nothing_drawn(backend):
                model = load(job, weights, "cpu", dtype=dtype)
            drawn = load(job, None, "cpu", dtype=dtype)
            state.set_state(drawn, weights)
            found, expected = (side.numpy(dict(state.get_state(one))) for one in (model, drawn))
        assert found.keys() == job_table(job, tower_of(job)).keys()
        for name, array in found.items():
            assert array.dtype in (dtype, np.result_type(array, np.float32)), name
            assert array.tobytes() == expected[name].tobytes() == weights[name].astype(array.dtype).tobytes(), name
        assert found[next(name for name in found if "embedding" in name)].dtype == dtype


def saved_mixture(folder: Path) -> Path:
    """A Hugging Face folder in bfloat16."""
    weights = validation_weights(parameter_table(MIXTURE.model), 1)
    save_huggingface(folder, {name: value.astype(ml_dtypes.bfloat16) for name, value in weights.items()}, MIXTURE.model)
    return folder


def check_stacks(backend: str) -> None:
    """What NumPy holds beside the model: a stack as it is in the files, and in the dtype of the model."""
    load: Any = SIDES[backend].module("model.build").load_model
    with tempfile.TemporaryDirectory() as folder:
        mixture = saved_mixture(Path(folder))
        load(MIXTURE, read_model(mixture, MIXTURE).weights, "cpu")  # what is made once a process
        tracemalloc.start()
        try:
            model = load(MIXTURE, read_model(mixture, MIXTURE).weights, "cpu", dtype="bfloat16")
            held, peak = tracemalloc.get_traced_memory()  # arrays of JAX may lie in what NumPy holds
        finally:
            tracemalloc.stop()
    assert model is not None
    assert peak - held < 3 * STACK_BYTES + 2**18, f"{peak - held:,} bytes at once, of stacks of {STACK_BYTES:,}"


LOADING_CHECKS = {"model.build": (check_given, check_stacks)}
