"""What a user adds, as a user writes it: each example registers itself, runs in both backends, and is one function.

The same text in the files that `PLACES` names is an addition to the package itself: no other file changes.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from shared_config.contract.parameters import parameter_table
from shared_config.contract.schedule import Rates
from shared_config.contract.specs import Constant, ParameterSpec
from shared_config.contract.vision import adapter_table
from shared_config.parity.validation import validation_weights
from shared_config.registry import temporary
from shared_config.schema import AdapterConfig, ModelConfig, OptimizerConfig, VLMConfig
from tests.parity.backends import BACKENDS, Jax, Torch

ROOT = Path(__file__).parent.parent.parent
RATES = Rates(0.1, 0.5)
PLACES: dict[str, dict[str, str]] = {
    "architecture": {
        "config": "shared_config/schema/vlm.py",
        "parameters": "shared_config/contract/layers.py",
        "torch": "kempnerforge_torch/model/echo.py",
        "jax": "kempnerforge_jax/model/echo.py",
    },
    "norm": {"torch": "kempnerforge_torch/model/norm.py", "jax": "kempnerforge_jax/model/norm.py"},
    "router": {"torch": "kempnerforge_torch/model/router.py", "jax": "kempnerforge_jax/model/router.py"},
    "optimizer": {"torch": "kempnerforge_torch/training/optimizer.py", "jax": "kempnerforge_jax/training/optimizer.py"},
    "adapter": {
        "parameters": "shared_config/contract/vision.py",
        "torch": "kempnerforge_torch/model/adapter.py",
        "jax": "kempnerforge_jax/model/adapter.py",
    },
}
"""Kind -> part -> the one file of the package that it belongs in. A norm, router or adapter with the tensors of those
built in, or that initialises itself, declares none.
"""
MOST = {"architecture": 4, "norm": 2, "router": 2, "optimizer": 3, "adapter": 3}

EXAMPLES: dict[str, dict[str, str]] = {
    "architecture": {
        "config": """
from typing import Literal

from shared_config.schema.architecture import VLMConfig
from shared_config.schema.base import section


@section
class EchoConfig(VLMConfig, arch="echo"):
    arch: Literal["echo"] = "echo"
""",
        "parameters": """
from shared_config.contract.layers import decoder_parameters, matrix
from shared_config.registry import declare


def echo_parameters(config, vlm):
    return {**decoder_parameters(config, vlm), "echo.weight": matrix(config, (config.dim, config.dim), ("embed", None))}


declare("architecture", "echo", parameters=echo_parameters)
""",
        "torch": """
from torch import nn

from kempnerforge_torch.model.architecture import Architecture
from kempnerforge_torch.registry import registry


@registry.register("architecture", "echo")
class EchoArchitecture(Architecture):
    def extra_modules(self):
        return {**super().extra_modules(), "echo": nn.Linear(self.config.dim, self.config.dim, bias=False)}

    def after_block(self, modules, layer_idx, x, modality):
        return x + modules["echo"](x)
""",
        "jax": """
from kempnerforge_jax.model.architecture import Architecture
from kempnerforge_jax.model.linear import Linear
from kempnerforge_jax.registry import registry


@registry.register("architecture", "echo")
class EchoArchitecture(Architecture):
    def extra_modules(self, *, rngs):
        return {**super().extra_modules(rngs=rngs), "echo": Linear(self.config.dim, self.config.dim, rngs=rngs)}

    def breaks_after(self, layer_idx):
        return True  # no scan of layers across what follows

    def after_block(self, modules, layer_idx, x, modality):
        return x + modules["echo"](x)
""",
    },
    "norm": {
        "torch": """
import torch

from kempnerforge_torch.model.norm import RMSNorm
from kempnerforge_torch.registry import registry


@registry.register("norm", "bounded")
class BoundedNorm(RMSNorm):
    def forward(self, x):
        return torch.tanh(super().forward(x))
""",
        "jax": """
import jax.numpy as jnp

from kempnerforge_jax.model.norm import RMSNorm
from kempnerforge_jax.registry import registry


@registry.register("norm", "bounded")
class BoundedNorm(RMSNorm):
    def forward(self, x):
        return jnp.tanh(super().forward(x))
""",
    },
    "router": {
        backend: f"""
from kempnerforge_{backend}.model.router import SoftmaxTopKRouter
from kempnerforge_{backend}.registry import registry


@registry.register("router", "sharp_topk")
class SharpTopKRouter(SoftmaxTopKRouter):
    def _score(self, logits_TE):
        return super()._score(2 * logits_TE)
"""
        for backend in ("torch", "jax")
    },
    "optimizer": {
        "torch": """
import torch

from kempnerforge_torch.registry import registry


@registry.register("optimizer", "signum")
class Signum(torch.optim.Optimizer):
    \"\"\"Bernstein et al. 2018, arXiv:1802.04434.\"\"\"

    def __init__(self, groups, config):
        super().__init__(groups, {"lr": config.lr, "betas": config.betas})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    kept = self.state[p]
                    kept["exp_avg"].lerp_(p.grad, 1 - group["betas"][0])
                    p -= group["lr"] * (kept["exp_avg"].sign() + group["weight_decay"] * p)
                    kept["step"] += 1
""",
        "jax": """
import jax.numpy as jnp
import optax

from kempnerforge_jax.registry import registry


@registry.register("optimizer", "signum")
def signum(config):
    \"\"\"Bernstein et al. 2018, arXiv:1802.04434.\"\"\"
    b = config.betas[0]

    def init(p):
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), jnp.zeros_like(p), jnp.zeros_like(p))

    def update(g, state, p=None):
        moved = state._replace(count=state.count + 1, mu=b * state.mu + (1 - b) * g)
        return jnp.sign(moved.mu), moved

    return optax.GradientTransformation(init, update)
""",
    },
    "adapter": {
        "parameters": """
from shared_config.contract.specs import Normal, ParameterSpec
from shared_config.registry import declare


def thin_parameters(config, in_dim, out_dim):
    return {"proj.weight": ParameterSpec((out_dim, in_dim), Normal(0.02), ("embed", None), decay=True)}


declare("adapter", "thin", parameters=thin_parameters, output_num_tokens=lambda config, num_tokens: num_tokens // 2)
""",
        "torch": """
from torch import nn

from kempnerforge_torch.model.adapter import VisionAdapter
from kempnerforge_torch.registry import registry


@registry.register("adapter", "thin")
class ThinAdapter(VisionAdapter):
    def __init__(self, config, in_dim, out_dim):
        super().__init__()
        self.proj = nn.Linear(in_dim, out_dim, bias=False)

    def output_num_tokens(self, num_input_tokens):
        return num_input_tokens // 2

    def forward(self, x):
        return self.proj(x[:, 1::2])
""",
        "jax": """
from kempnerforge_jax.model.adapter import VisionAdapter
from kempnerforge_jax.model.linear import Linear
from kempnerforge_jax.registry import registry


@registry.register("adapter", "thin")
class ThinAdapter(VisionAdapter):
    def __init__(self, config, in_dim, out_dim, *, rngs):
        self.proj = Linear(in_dim, out_dim, rngs=rngs)

    def output_num_tokens(self, num_input_tokens):
        return num_input_tokens // 2

    def forward(self, x):
        return self.proj(x[:, 1::2])
""",
    },
}

for one in BACKENDS:
    one.module("training.train")  # what it registers must outlast a test

SIZES: dict[str, Any] = {"dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 19, "max_seq_len": 16}
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 5))
IMAGE = np.random.default_rng(1).standard_normal((2, 4, 16))


@pytest.fixture(autouse=True)
def _registered_for_one_test() -> Iterator[None]:
    with temporary(), jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


def add(kind: str) -> None:
    """Run the example as the modules of a user's package."""
    for part, source in EXAMPLES[kind].items():
        exec(compile(source, f"{kind} {part}", "exec", dont_inherit=True), {"__name__": f"example_{kind}_{part}"})


def logits(backend: Torch, config: ModelConfig, vlm: VLMConfig | None = None) -> np.ndarray:
    model = backend.model(config, validation_weights(parameter_table(config, vlm), 0), vlm_config=vlm)
    context = backend.module("model.modality").ModalityContext
    given = None if vlm is None else context(prefix_embeds=backend.array(IMAGE))
    return backend.numpy(model.run(backend.array(TOKENS), modality=given).logits)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("architecture", {}),
        ("norm", {"norm_type": "bounded"}),
        ("router", {"moe_router": "sharp_topk", "num_experts": 4, "moe_frequency": 2}),
    ],
)
def test_models_with_an_addition_agree(kind: str, fields: dict[str, Any]) -> None:
    add(kind)
    vlm = VLMConfig.for_arch("echo", max_text_len=8) if kind == "architecture" else None
    truth, found = (logits(backend, ModelConfig(**SIZES, **fields), vlm) for backend in BACKENDS)
    np.testing.assert_allclose(found, truth, rtol=1e-10, atol=1e-12)
    sizes: dict[str, Any] = {name: value for name, value in fields.items() if isinstance(value, int)}
    plain = ModelConfig(**SIZES, **sizes)
    other = VLMConfig.for_arch("joint_decoder", max_text_len=8) if vlm is not None else None
    assert np.abs(truth - logits(BACKENDS[0], plain, other)).max() > 1e-3


def test_an_architecture_joins_images_as_its_config_says() -> None:
    add("architecture")
    for backend in BACKENDS:
        strategies = backend.module("model.vlm")
        strategy = strategies.build_modality_strategy(VLMConfig.for_arch("echo"))
        assert isinstance(strategy, strategies.JointDecoderStrategy)


def test_adapters_agree() -> None:
    add("adapter")
    config = AdapterConfig(type="thin")
    assert config.output_num_tokens(4) == 2
    weights = validation_weights(adapter_table(config, 16, 8), 0)
    outs = []
    for backend in BACKENDS:
        adapter = backend.build(backend.module("model.adapter").build_adapter, config, 16, 8)
        backend.module("model.state").set_state(adapter, weights)
        outs.append(backend.numpy(adapter(backend.array(IMAGE))))
    np.testing.assert_allclose(outs[1], outs[0], rtol=1e-12)
    np.testing.assert_allclose(outs[0], IMAGE[:, 1::2] @ weights["proj.weight"].T.astype(float), rtol=1e-10)


def test_optimisers_agree() -> None:
    """Two steps of Signum: by the sign of an average of gradients, decayed where the table says."""
    add("optimizer")
    config = OptimizerConfig(name="signum", weight_decay=0.5)
    table = {
        "matrix": ParameterSpec((3, 4), Constant(0.0), (None, None), decay=True),
        "vector": ParameterSpec((4,), Constant(0.0), (None,)),
    }
    rng = np.random.default_rng(0)
    start, *gradients = ({name: rng.standard_normal(spec.shape) for name, spec in table.items()} for _ in range(3))
    truth, found = torch_steps(config, table, start, gradients), jax_steps(config, table, start, gradients)
    assert set(truth) == set(found)
    for name, value in truth.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)
    step = 0.1 * (np.sign(gradients[0]["vector"]))
    step += 0.1 * np.sign(0.9 * gradients[0]["vector"] + gradients[1]["vector"])
    np.testing.assert_allclose(truth["vector"], start["vector"] - step, rtol=1e-12)
    assert (np.abs(truth["matrix"] - found["matrix"]) < 1e-12).all()


def torch_steps(config: OptimizerConfig, table: Any, start: Any, gradients: Any) -> dict[str, np.ndarray]:
    backend = Torch()
    optimizers = backend.module("training.optimizer")
    parameters = {name: backend.array(value).requires_grad_() for name, value in start.items()}
    optimizer = optimizers.build_optimizer(parameters, table, config)
    for gradient in gradients:
        for name, parameter in parameters.items():
            parameter.grad = backend.array(gradient[name])
        assert bool(optimizers.stays_finite(optimizer, RATES))
        optimizers.update(optimizer, RATES, optimizers.stays_finite(optimizer, RATES))
    return backend.numpy(parameters | optimizers.get_optimizer_state(optimizer, parameters))


def jax_steps(config: OptimizerConfig, table: Any, start: Any, gradients: Any) -> dict[str, np.ndarray]:
    backend = Jax()
    optimizers = backend.module("training.optimizer")
    parameters = {name: backend.array(value) for name, value in start.items()}
    optimizer = optimizers.build_optimizer(parameters, table, config)
    state = optimizer.init(parameters)
    for gradient in gradients:
        arrays = {name: backend.array(value) for name, value in gradient.items()}
        parameters, state = optimizers.update(optimizer, arrays, state, parameters, RATES)
    return backend.numpy(parameters | optimizers.get_optimizer_state(state))


def test_a_step_that_an_added_optimiser_must_not_take_changes_nothing() -> None:
    add("optimizer")
    backend = Torch()
    optimizers = backend.module("training.optimizer")
    parameter = backend.array(np.ones(3)).requires_grad_()
    parameter.grad = backend.array(np.array([1.0, np.inf, 1.0]))
    table = {"vector": ParameterSpec((3,), Constant(0.0), (None,))}
    optimizer = optimizers.build_optimizer({"vector": parameter}, table, OptimizerConfig(name="signum"))
    finite = optimizers.stays_finite(optimizer, RATES)
    assert not finite
    optimizers.update(optimizer, RATES, finite)
    state = backend.numpy(optimizers.get_optimizer_state(optimizer, {"vector": parameter}))
    np.testing.assert_array_equal(backend.numpy(parameter), np.ones(3))
    assert all((value == 0).all() for value in state.values())


def test_an_addition_inside_the_package_is_in_these_files_alone(tmp_path: Path) -> None:
    """Its names are known to a config before any backend is asked for, and to both backends."""
    assert all(len(parts) <= MOST[kind] for kind, parts in PLACES.items())
    for package in ("shared_config", "kempnerforge_torch", "kempnerforge_jax"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for kind, parts in PLACES.items():
        for part, file in parts.items():
            assert (ROOT / file).exists() == (not file.endswith("echo.py"))
            with (tmp_path / file).open("a", encoding="utf-8") as target:
                target.write(EXAMPLES[kind][part])
    done = subprocess.run([sys.executable, "-c", WITHIN], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == {"torch": NAMES, "jax": NAMES}


NAMES = {"architecture": "echo", "norm": "bounded", "router": "sharp_topk", "optimizer": "signum", "adapter": "thin"}
WITHIN = """
import importlib, json, sys
sys.path.insert(0, ".")
from shared_config.loader import load_config
names = ["--vlm.arch=echo", "--model.norm_type=bounded", "--adapter.type=thin", "--optimizer.name=signum"]
config = load_config("debug_vlm_joint_decoder", [*names, "--model.moe_router=sharp_topk"])
said = {
    "architecture": config.vlm.arch,
    "norm": config.model.norm_type,
    "router": config.model.moe_router,
    "optimizer": config.optimizer.name,
    "adapter": config.adapter.type,
}
known = {}
for backend in ("torch", "jax"):
    importlib.import_module(f"kempnerforge_{backend}.training.train")
    registry = importlib.import_module(f"kempnerforge_{backend}.registry").registry
    known[backend] = {category: registry.check(category, name) for category, name in said.items()}
print(json.dumps(known))
"""


def test_the_page_shows_what_is_tested() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8").partition("### Extending")[2].partition("\n## ")[0]
    shown = [block.strip() for block in re.findall(r"```py\n(.*?)```", page, re.DOTALL)]
    kinds = {text.strip(): kind for kind, parts in EXAMPLES.items() for text in parts.values()}
    assert {kinds.get(block) for block in shown} == set(EXAMPLES)
    files = {file for parts in PLACES.values() for file in parts.values() if file.startswith("shared_config/")}
    assert files <= set(re.findall(r"`([\w/.]+)`", page))
    assert [int(number) for number in re.findall(r"\((\d) files\)", page)] == [
        len(PLACES[kind]) for kind in ("norm", "router", "optimizer", "architecture", "adapter")
    ]
