"""The average of the weights from what an optimiser keeps of it."""

from __future__ import annotations

import numpy as np

from shared_config.contract.averaging import average_of, averaged
from shared_config.schema.optimizer import OptimizerConfig


def test_the_average_is_that_of_the_papers() -> None:
    x, z, ema = np.random.default_rng(0).standard_normal((3, 4))
    b1 = 0.8
    y = (1 - b1) * z + b1 * x
    kept = {"d.a": z - y, "ema.a": ema - y, "v.a": y}
    free = average_of(OptimizerConfig(name="schedule_free_adamw", betas=(b1, 0.9)))
    plain = average_of(OptimizerConfig(ema_decay=0.9))
    assert free is not None
    assert plain is not None
    np.testing.assert_allclose(averaged(free, {"a": y}, kept)["a"], x)
    np.testing.assert_allclose(averaged(plain, {"a": y, "b": z}, kept)["a"], ema)
    np.testing.assert_array_equal(averaged(plain, {"a": y, "b": z}, kept)["b"], z)
    assert average_of(OptimizerConfig()) is None
