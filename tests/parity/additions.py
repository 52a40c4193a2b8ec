"""One of each kind that can be registered, as a user would add it: the tensors once, a module in each backend."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import Tensor, nn

from kempnerforge_jax.model import adapter as jax_adapter
from kempnerforge_jax.model import architecture as jax_architecture
from kempnerforge_jax.model import norm as jax_norm
from kempnerforge_jax.model import router as jax_router
from kempnerforge_jax.model import transformer as jax_transformer
from kempnerforge_jax.model import vision as jax_vision
from kempnerforge_jax.model import vlm as jax_vlm
from kempnerforge_jax.model.linear import Linear as JaxLinear
from kempnerforge_jax.model.module import Buffer
from kempnerforge_jax.model.module import Module as JaxModule
from kempnerforge_jax.registry import registry as jax_registry
from kempnerforge_torch.model import adapter as torch_adapter
from kempnerforge_torch.model import architecture as torch_architecture
from kempnerforge_torch.model import norm as torch_norm
from kempnerforge_torch.model import router as torch_router
from kempnerforge_torch.model import transformer as torch_transformer
from kempnerforge_torch.model import vision as torch_vision
from kempnerforge_torch.model import vlm as torch_vlm
from kempnerforge_torch.registry import registry as torch_registry
from shared_config.contract.layers import decoder_layer_parameters, decoder_parameters, router_parameters
from shared_config.contract.specs import Constant, Normal, ParameterSpec, ParameterTable
from shared_config.registry import declare
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.base import section
from shared_config.schema.model import ModelConfig
from shared_config.schema.vision import VisionEncoderConfig
from shared_config.schema.vlm import VLMConfig

NAME = "test_addition"
TOKENS = 4
RATE = 0.01


def matrix(shape: tuple[int, int], std: float = 0.3) -> ParameterSpec:
    return ParameterSpec(shape, Normal(std), (None, None), decay=True)


def register_all() -> None:
    """Everything under `NAME`; to be called inside `temporary`."""
    for add in (norm, activation, mlp, router, adapter, vision_encoder, architecture):
        add()


def norm() -> None:
    declare("norm", NAME, parameters=norm_parameters)
    torch_registry.register("norm", NAME)(TorchNorm)
    jax_registry.register("norm", NAME)(JaxNorm)


def norm_parameters(config: ModelConfig) -> ParameterTable:
    return {
        "weight": ParameterSpec((config.dim,), Constant(0.5), ("embed",)),
        "strength": ParameterSpec((1,), Constant(1.5), (None,)),
    }


class TorchNorm(torch_norm.RMSNorm):
    def __init__(self, dim: int, eps: float):
        super().__init__(dim, eps)
        self.strength = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x) * self.strength)


class JaxNorm(jax_norm.RMSNorm):
    def __init__(self, dim: int, eps: float, *, rngs: nnx.Rngs):
        super().__init__(dim, eps, rngs=rngs)
        self.strength = nnx.Param(jnp.ones(1))

    def forward(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(super().forward(x) * self.strength.get_value())


def activation() -> None:
    torch_registry.register("activation", f"{NAME}_activation")(lambda x: torch.tanh(x) * x)
    jax_registry.register("activation", f"{NAME}_activation")(lambda x: jnp.tanh(x) * x)


def mlp() -> None:
    declare("mlp", NAME, parameters=mlp_parameters)
    torch_registry.register("mlp", NAME)(TorchMLP)
    jax_registry.register("mlp", NAME)(JaxMLP)


def mlp_parameters(config: ModelConfig, hidden_dim: int) -> ParameterTable:
    return {
        "left.weight": matrix((hidden_dim, config.dim)),
        "right.weight": matrix((hidden_dim, config.dim)),
        "right.bias": ParameterSpec((hidden_dim,), Constant(0.25), ("mlp",)),
        "out.weight": ParameterSpec((config.dim, hidden_dim), Normal(0.1), ("embed", "mlp"), decay=True, residual=True),
    }


class TorchMLP(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.left = nn.Linear(dim, hidden_dim, bias=False)
        self.right = nn.Linear(dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.left(x) * self.right(x))


class JaxMLP(JaxModule):
    def __init__(self, dim: int, hidden_dim: int, *, rngs: nnx.Rngs):
        self.left = JaxLinear(dim, hidden_dim, rngs=rngs)
        self.right = JaxLinear(dim, hidden_dim, bias=True, rngs=rngs)
        self.out = JaxLinear(hidden_dim, dim, rngs=rngs)

    def forward(self, x: jax.Array) -> jax.Array:
        return self.out(self.left(x) * self.right(x))


def router() -> None:
    declare("router", NAME, parameters=own_router_parameters)
    torch_registry.register("router", NAME)(TorchRouter)
    jax_registry.register("router", NAME)(JaxRouter)


def own_router_parameters(config: ModelConfig) -> ParameterTable:
    experts = (config.num_experts,)
    return {
        **router_parameters(config),
        "sharpness": ParameterSpec(experts, Constant(2.0), ("routes",), full_precision=True),
        "handicap": ParameterSpec(experts, Constant(0.125), ("routes",), is_buffer=True),
    }


class TorchRouter(torch_router.SoftmaxTopKRouter):
    handicap: Tensor

    def __init__(self, dim: int, num_experts: int, top_k: int):
        super().__init__(dim, num_experts, top_k)
        self.sharpness = nn.Parameter(torch.ones(num_experts))
        self.register_buffer("handicap", torch.zeros(num_experts))

    def _score(self, logits_TE: Tensor) -> Tensor:
        return super()._score(logits_TE * self.sharpness)

    def _preference(self, scores_TE: Tensor) -> Tensor:
        return scores_TE - self.handicap.to(scores_TE.dtype)

    def update_bias(self, counts_E: Tensor, progress: float | None = None) -> None:
        self.handicap += RATE * counts_E


class JaxRouter(jax_router.SoftmaxTopKRouter):
    def __init__(self, dim: int, num_experts: int, top_k: int, *, rngs: nnx.Rngs):
        super().__init__(dim, num_experts, top_k, rngs=rngs)
        self.sharpness = nnx.Param(jnp.ones(num_experts))
        self.handicap = Buffer(jnp.zeros(num_experts))

    def _score(self, logits_TE: jax.Array) -> jax.Array:
        return super()._score(logits_TE * self.sharpness.get_value())

    def _preference(self, scores_TE: jax.Array) -> jax.Array:
        return scores_TE - self.handicap.get_value().astype(scores_TE.dtype)

    def update_bias(self, counts_E: jax.Array, progress: Any = None) -> None:
        moved_E = self.handicap.get_value() + RATE * counts_E
        self.handicap.set_value(moved_E.astype(self.handicap.get_value().dtype))


def adapter() -> None:
    """Keeps every second token."""
    declare("adapter", NAME, parameters=adapter_parameters, output_num_tokens=lambda config, tokens: tokens // 2)
    torch_registry.register("adapter", NAME)(lambda config, in_dim, out_dim: TorchAdapter(in_dim, out_dim))
    jax_registry.register("adapter", NAME)(
        lambda config, in_dim, out_dim, *, rngs: JaxAdapter(in_dim, out_dim, rngs=rngs)
    )


def adapter_parameters(config: AdapterConfig, in_dim: int, out_dim: int) -> ParameterTable:
    return {"gain": ParameterSpec((in_dim,), Constant(0.75), (None,)), "proj.weight": matrix((out_dim, in_dim))}


class TorchAdapter(torch_adapter.VisionAdapter):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(in_dim))
        self.proj = nn.Linear(in_dim, out_dim, bias=False)

    def output_num_tokens(self, num_tokens: int) -> int:
        return num_tokens // 2

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x[:, 1::2] * self.gain)


class JaxAdapter(jax_adapter.VisionAdapter):
    def __init__(self, in_dim: int, out_dim: int, *, rngs: nnx.Rngs):
        self.gain = nnx.Param(jnp.ones(in_dim))
        self.proj = JaxLinear(in_dim, out_dim, rngs=rngs)

    def output_num_tokens(self, num_tokens: int) -> int:
        return num_tokens // 2

    def forward(self, x: jax.Array) -> jax.Array:
        return self.proj(x[:, 1::2] * self.gain.get_value())


def vision_encoder() -> None:
    declare("vision_encoder", NAME, parameters=encoder_parameters)
    torch_registry.register("vision_encoder", NAME)(TorchEncoder)
    jax_registry.register("vision_encoder", NAME)(JaxEncoder)


def encoder_parameters(config: VisionEncoderConfig) -> ParameterTable:
    return {
        "mix.weight": matrix((config.feature_dim, 3)),
        "place": ParameterSpec((TOKENS, config.feature_dim), Normal(0.1), (None, "embed")),
    }


class TorchEncoder(torch_vision.VisionEncoder):
    """The mean colour of each quarter of the height."""

    def __init__(self, config: VisionEncoderConfig):
        super().__init__()
        self.feature_dim, self.num_tokens, self.image_size = config.feature_dim, TOKENS, config.image_size
        self.mix = nn.Linear(3, config.feature_dim, bias=False)
        self.place = nn.Parameter(torch.zeros(TOKENS, config.feature_dim))

    def forward(self, pixels: Tensor) -> Tensor:
        colours = pixels.to(self.place.dtype).unflatten(2, (TOKENS, -1)).mean(dim=(3, 4))
        return self.mix(colours.transpose(1, 2)) + self.place


class JaxEncoder(jax_vision.VisionEncoder):
    """The mean colour of each quarter of the height."""

    def __init__(self, config: VisionEncoderConfig, *, rngs: nnx.Rngs):
        self.feature_dim, self.num_tokens, self.image_size = config.feature_dim, TOKENS, config.image_size
        self.mix = JaxLinear(3, config.feature_dim, rngs=rngs)
        self.place = nnx.Param(jnp.zeros((TOKENS, config.feature_dim)))

    def forward(self, pixels: jax.Array) -> jax.Array:
        batch, channels, height, width = pixels.shape
        bands = pixels.astype(self.place.get_value().dtype).reshape(batch, channels, TOKENS, height // TOKENS, width)
        return self.mix(bands.mean(axis=(3, 4)).swapaxes(1, 2)) + self.place.get_value()


def architecture() -> None:
    """Every second block has a gain on what it puts out, and an echo of the stream follows the first."""

    @section
    class OwnConfig(VLMConfig, arch=NAME):
        arch: Literal["test_addition"] = "test_addition"

    declare("architecture", NAME, parameters=architecture_parameters, layer_parameters=layer_parameters)
    torch_registry.register("architecture", NAME)(TorchArchitecture)
    torch_registry.register("modality_strategy", NAME)(torch_vlm.JointDecoderStrategy)
    jax_registry.register("architecture", NAME)(JaxArchitecture)
    jax_registry.register("modality_strategy", NAME)(jax_vlm.JointDecoderStrategy)


def architecture_parameters(config: ModelConfig, vlm: VLMConfig | None) -> ParameterTable:
    return {**decoder_parameters(config, vlm), "echo.weight": matrix((config.dim, config.dim), 0.1)}


def layer_parameters(config: ModelConfig, vlm: VLMConfig | None, layer: int) -> ParameterTable:
    own = {"gain": ParameterSpec((config.dim,), Constant(0.5), ("embed",))} if layer % 2 else {}
    return {**decoder_layer_parameters(config, vlm, layer), **own}


class TorchBlock(torch_transformer.TransformerBlock):
    def __init__(self, config: ModelConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.gain = nn.Parameter(torch.ones(config.dim))

    def forward(self, x: Tensor, *args: Any, return_stats: bool = False, **options: Any) -> Any:
        output: Any = super().forward(x, *args, return_stats=True, **options)
        return output._replace(x=output.x * self.gain) if return_stats else output.x * self.gain


class TorchArchitecture(torch_architecture.Architecture):
    def build_block(self, layer_idx: int) -> nn.Module:
        return TorchBlock(self.config, layer_idx) if layer_idx % 2 else super().build_block(layer_idx)

    def extra_modules(self) -> dict[str, nn.Module]:
        return {**super().extra_modules(), "echo": nn.Linear(self.config.dim, self.config.dim, bias=False)}

    def after_block(self, modules: Any, layer_idx: int, x: Tensor, modality: Any) -> Tensor:
        return x + modules["echo"](x) if layer_idx == 0 else x


class JaxBlock(jax_transformer.TransformerBlock):
    def __init__(self, config: ModelConfig, layer_idx: int, *, rngs: nnx.Rngs):
        super().__init__(config, layer_idx, rngs=rngs)
        self.gain = nnx.Param(jnp.ones(config.dim))

    def forward(self, x: jax.Array, *args: Any, return_stats: bool = False, **options: Any) -> Any:
        output: Any = super().forward(x, *args, return_stats=True, **options)
        out = output.x * self.gain.get_value()
        return output._replace(x=out) if return_stats else out


class JaxArchitecture(jax_architecture.Architecture):
    def build_block(self, layer_idx: int, *, rngs: nnx.Rngs) -> JaxModule:
        if layer_idx % 2:
            return JaxBlock(self.config, layer_idx, rngs=rngs)
        return super().build_block(layer_idx, rngs=rngs)

    def extra_modules(self, *, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        return {**super().extra_modules(rngs=rngs), "echo": JaxLinear(self.config.dim, self.config.dim, rngs=rngs)}

    def breaks_after(self, layer_idx: int) -> bool:
        return layer_idx == 0

    def after_block(self, modules: Any, layer_idx: int, x: jax.Array, modality: Any) -> jax.Array:
        return x + modules["echo"](x) if layer_idx == 0 else x
