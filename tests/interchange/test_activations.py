"""Files of activations: a process that is killed leaves the old file or none under the final name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shared_config.errors import UserError
from shared_config.interchange.activations import ActivationWriter, read_activations, token_batches

CHILD = """
import sys, time
import numpy as np
from shared_config.interchange import activations

def wait(*_):
    print("waiting", flush=True)
    time.sleep(60)

path, where = sys.argv[1:]
if where == "before the last rename":
    activations.commit = wait
with activations.ActivationWriter(path) as writer:
    for _ in range(3):
        writer.append({"norm": np.ones((100, 16), np.float32)})
    if where == "between two pieces":
        wait()
"""


@pytest.mark.parametrize("where", ["between two pieces", "before the last rename"])
def test_a_killed_process_leaves_no_part_under_the_final_name(where: str, tmp_path: Path) -> None:
    path = tmp_path / "long.npz"
    with ActivationWriter(path) as writer:
        writer.append({"norm": np.zeros((2, 3))})
    for target, kept in ((path, True), (tmp_path / "new.npz", False)):
        command = [sys.executable, "-c", CHILD, str(target), where]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "waiting\n"
            os.kill(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert target.exists() == kept
    assert read_activations(path)["norm"].tolist() == [[0, 0, 0]] * 2
    left = [file for file in tmp_path.iterdir() if file != path]
    assert left, "something had been written"
    assert all(file.name.startswith(".") and ".npz." in file.name for file in left), "hidden, by the name of the file"


@pytest.mark.parametrize("other", [np.zeros((1, 4)), np.zeros((1, 3), np.float32), np.zeros(()), np.zeros((1, 3, 1))])
def test_pieces_of_another_shape_or_dtype_do_not_go_on(other: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "pieces.npz"
    with ActivationWriter(path) as writer:
        writer.append({"norm": np.zeros((2, 3))})
        with pytest.raises(UserError, match=r"norm: .* does not continue float64"):
            writer.append({"norm": other})
        writer.append({"norm": np.ones((1, 3))})
    assert read_activations(path)["norm"].tolist() == [[0] * 3, [0] * 3, [1] * 3]


def test_batches_of_samples_hold_large_ids() -> None:
    samples = [np.array([1, 70_000]), {"input_ids": [3, 4], "attention_mask": [1, 0]}, [5, 6]]
    (tokens, real), (last, nothing) = token_batches(samples, 2, None, 100_000)
    assert tokens.dtype == last.dtype == np.int32
    assert tokens.tolist() == [[1, 70_000], [3, 4]]
    assert real is not None
    assert real.tolist() == [[True, True], [True, False]]
    assert (last.tolist(), nothing) == ([[5, 6]], None)
