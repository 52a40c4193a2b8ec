"""How many deltas correct backends are off: what K of the tolerances is derived from.

    python -m tests.parity.derive_tolerances --pairs 300

draws configs and inputs, runs both backends in float32 and bfloat16 against the float64 oracle, and prints the largest
multiples of delta seen. A pair is one backend in one dtype on one drawn config, compared with the oracle.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import argparse
from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config.contract.parameters import parameter_table
from shared_config.parity.numerics import difference, unit_roundoff
from shared_config.parity.validation import validation_weights
from tests.parity.runners import (
    assert_run_within,
    cancellation_noise,
    numpy_dtype,
    oracle_deltas,
    run_jax,
    run_oracle,
    run_torch,
)
from tests.strategies import inputs, model_configs

BACKENDS = {"torch": run_torch, "jax": run_jax}
DTYPES = ("float32", "bfloat16")


def main() -> None:
    """Print the largest multiples, and how many pairs the tolerances in use would have refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=300)
    examples = -(-parser.parse_args().pairs // (len(BACKENDS) * len(DTYPES)))
    multiples: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    alarms: list[str] = []

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def collect(data: st.DataObject) -> None:
        config = data.draw(model_configs())
        batch = data.draw(inputs(config))
        weights = validation_weights(parameter_table(config), data.draw(st.integers(0, 10**6)))
        truth = run_oracle(config, weights, batch)
        for dtype in DTYPES:
            deltas = oracle_deltas(config, weights, batch, dtype)
            roundoff = unit_roundoff(numpy_dtype(dtype))
            for backend, run_backend in BACKENDS.items():
                run = run_backend(config, weights, batch, dtype)
                groups = (
                    ("forward", "", truth.activations, run.activations),
                    ("gradient", "gradient/", truth.gradients, run.gradients),
                )
                for group, prefix, truths, values in groups:
                    for name, value in truths.items():
                        floor = cancellation_noise(value, truth, roundoff) if prefix else 0.0
                        error, delta = difference(values[name], value).rms_error, deltas[prefix + name]
                        if delta > 0 and error > floor:
                            multiples[backend, dtype, group].append(error / delta)
                try:
                    assert_run_within(run, truth, deltas, dtype)
                except AssertionError as alarm:
                    alarms.append(f"{backend} {dtype}: {alarm}\n{config}\n{batch}")

    collect()
    for key, found in sorted(multiples.items()):
        found.sort()
        print(*key, f"tensors {len(found)}, median {found[len(found) // 2]:.2f}, largest {found[-1]:.2f}", flush=True)
    print(f"false alarms: {len(alarms)}", *alarms, sep="\n")


if __name__ == "__main__":
    main()
