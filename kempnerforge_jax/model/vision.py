"""Vision encoders: images to features, one per token.

Shapes: B images, h, w pixels, p patch side, P = 3 p p numbers of a patch, N tokens, F feature dim, H heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Shaped

from kempnerforge_jax.model.attention import attend
from kempnerforge_jax.model.init import init_from_table
from kempnerforge_jax.model.linear import Embedding, Linear, broadcast
from kempnerforge_jax.model.mask import FULL
from kempnerforge_jax.model.mlp import ACTIVATIONS, Activation
from kempnerforge_jax.model.module import Module, Numbered
from kempnerforge_jax.model.noise import image_noise
from kempnerforge_jax.model.norm import LayerNorm
from kempnerforge_jax.model.state import set_state
from kempnerforge_jax.registry import registry
from shared_config.contract.specs import ParameterSpec
from shared_config.contract.vision import TowerConfig, encoder_table, tower_table
from shared_config.interchange.vision import load_tower_weights, resolve_tower
from shared_config.schema.vision import VisionEncoderConfig

CHANNELS = 3


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x sigmoid(1.702 x), in at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The tanh approximation of gelu, in at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jax.nn.gelu(wide, approximate=True).astype(x.dtype)


TOWER_ACTIVATIONS: dict[str, Activation] = {
    **ACTIVATIONS,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
}


class VisionEncoder(Module):
    """Base of all encoders: (B, 3, h, w) -> (B, N, F).

    Attributes:
        feature_dim: F.
        num_tokens: N.
        image_size: h and w, or 0 if any size will do.
    """

    feature_dim: int
    num_tokens: int
    image_size: int = 0
    table: tuple[tuple[str, ParameterSpec], ...] = ()

    def init_weights(self, seed: int | None = None, *, rngs: nnx.Rngs | None = None) -> None:
        """Set every parameter that ``table`` knows."""
        if self.table:
            init_from_table(self, dict(self.table), seed, stream="vision_encoder.", rngs=rngs)

    def forward(self, pixel_values: Float[Array, "B 3 h w"]) -> Float[Array, "B N F"]:
        """(B, 3, h, w) -> (B, N, F)."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")


class RandomVisionEncoder(VisionEncoder):
    """Noise that depends on the image: see `shared_config.contract.noise`. No parameters, no gradient.

    Args:
        seed: an image has different noise under different seeds.
    """

    def __init__(
        self, num_tokens: int = 16, feature_dim: int = 768, seed: int = 0, *, image_size: int = 0, rngs: nnx.Rngs | None
    ):
        self.num_tokens = num_tokens
        self.feature_dim = feature_dim
        self.seed = seed
        self.image_size = image_size

    def forward(self, pixel_values: Float[Array, "B 3 h w"]) -> Float[Array, "B N F"]:
        """(B, 3, h, w) -> (B, N, F), in the dtype of the pixels."""
        check_pixels(pixel_values, self.image_size)
        return image_noise(pixel_values, self.num_tokens, self.feature_dim, self.seed)


class VisionAttention(Module):
    """Every patch attends to every patch; all projections have a bias."""

    def __init__(self, dim: int, n_heads: int, *, rngs: nnx.Rngs | None):
        self.n_heads = n_heads
        self.head_dim = dim // n_heads
        self.q_proj = Linear(dim, dim, True, rngs=rngs)
        self.k_proj = Linear(dim, dim, True, rngs=rngs)
        self.v_proj = Linear(dim, dim, True, rngs=rngs)
        self.o_proj = Linear(dim, dim, True, rngs=rngs)

    def forward(self, x: Float[Array, "B N F"]) -> Float[Array, "B N F"]:
        """(B, N, F) -> (B, N, F)."""
        q_BHNh, k_BHNh, v_BHNh = (
            project(x).reshape(*x.shape[:2], -1, self.head_dim).swapaxes(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(attend(q_BHNh, k_BHNh, v_BHNh, FULL).swapaxes(1, 2).reshape(x.shape))


class VisionMLP(Module):
    """down(activation(up(x))), with biases."""

    def __init__(self, dim: int, hidden_dim: int, activation: str, *, rngs: nnx.Rngs | None):
        if activation not in TOWER_ACTIVATIONS:
            raise ValueError(f"activation = {activation!r}: must be one of {', '.join(sorted(TOWER_ACTIVATIONS))}")
        self.activation = activation
        self.up_proj = Linear(dim, hidden_dim, True, rngs=rngs)
        self.down_proj = Linear(hidden_dim, dim, True, rngs=rngs)

    def forward(self, x: Float[Array, "B N F"]) -> Float[Array, "B N F"]:
        """(B, N, F) -> (B, N, F)."""
        return self.down_proj(TOWER_ACTIVATIONS[self.activation](self.up_proj(x)))


class VisionBlock(Module):
    """x + attention(attention_norm(x)), then x + mlp(mlp_norm(x))."""

    def __init__(self, tower: TowerConfig, *, rngs: nnx.Rngs | None):
        self.attention_norm = LayerNorm(tower.dim, tower.norm_eps, rngs=rngs)
        self.attention = VisionAttention(tower.dim, tower.n_heads, rngs=rngs)
        self.mlp_norm = LayerNorm(tower.dim, tower.norm_eps, rngs=rngs)
        self.mlp = VisionMLP(tower.dim, tower.ffn_hidden_dim, tower.activation, rngs=rngs)

    def forward(self, x: Float[Array, "B N F"]) -> Float[Array, "B N F"]:
        """(B, N, F) -> (B, N, F)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class VisionTower(VisionEncoder):
    """A pre-norm vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929), as SigLIP and CLIP have it.

    The blocks' outputs are the activations "layers.{i}".
    """

    def __init__(self, tower: TowerConfig, folder: str = "", *, rngs: nnx.Rngs | None):
        """``folder``: where `init_weights` finds the weights; without one they are drawn."""
        self.tower = tower
        self.folder = folder
        self.feature_dim = tower.dim
        self.num_tokens = tower.num_tokens
        self.image_size = tower.image_size
        self.patch_embedding = Linear(CHANNELS * tower.patch_size**2, tower.dim, tower.patch_bias, rngs=rngs)
        self.class_embedding = nnx.Param(jnp.zeros(tower.dim, jnp.float32)) if tower.class_token else None
        self.position_embedding = Embedding(tower.num_patches + tower.class_token, tower.dim, rngs=rngs)
        self.pre_norm = LayerNorm(tower.dim, tower.norm_eps, rngs=rngs) if tower.pre_norm else None
        self.layers = Numbered({str(i): VisionBlock(tower, rngs=rngs) for i in range(tower.n_layers)})
        self.norm = LayerNorm(tower.dim, tower.norm_eps, rngs=rngs) if tower.final_norm else None
        is_abstract = isinstance(self.position_embedding.weight.get_value(), Tracer)
        if rngs is not None or (folder and not is_abstract):
            self.init_weights(rngs=rngs)

    def init_weights(self, seed: int | None = None, *, rngs: nnx.Rngs | None = None) -> None:
        """Set every parameter: those of the folder, else drawn (see `shared_config.contract.vision.tower_table`)."""
        if self.folder:
            set_state(self, load_tower_weights(self.folder, self.tower))
        else:
            init_from_table(self, tower_table(self.tower), seed, stream="vision_encoder.", rngs=rngs)

    def forward(self, pixel_values: Float[Array, "B 3 h w"]) -> Float[Array, "B N F"]:
        """(B, 3, h, w) -> (B, N, F): the patches after the last block, in reading order. The class token is dropped,
        or stands before them where the tower keeps it.
        """
        check_pixels(pixel_values, self.image_size)
        positions_NF = self.position_embedding.weight.get_value()
        x_BNF = self.patch_embedding(patches(pixel_values.astype(positions_NF.dtype), self.tower.patch_size))
        if self.class_embedding is not None:
            class_B1F = broadcast(self.class_embedding.get_value(), (len(x_BNF), 1, self.feature_dim))
            x_BNF = jnp.concatenate([class_B1F, x_BNF], axis=1)
        x_BNF = x_BNF + broadcast(positions_NF, x_BNF.shape)
        if self.pre_norm is not None:
            x_BNF = self.pre_norm(x_BNF)
        for block in self.layers.values():
            x_BNF = block(x_BNF)
        if self.norm is not None:
            x_BNF = self.norm(x_BNF)
        drops_first = self.class_embedding is not None and not self.tower.keep_class_token
        return x_BNF[:, 1:] if drops_first else x_BNF


def build_tower(config: VisionEncoderConfig, *, rngs: nnx.Rngs | None) -> VisionTower:
    """The tower of a config, with the weights of its folder if it has one."""
    tower = resolve_tower(config)
    assert tower is not None
    return VisionTower(tower, config.path if config.type != "vit" else "", rngs=rngs)


registry.register("vision_encoder", "random")(
    lambda config, *, rngs: RandomVisionEncoder(
        config.num_tokens, config.feature_dim, image_size=config.image_size, rngs=rngs
    )
)
for _kind in ("siglip2", "clip", "vit"):
    registry.register("vision_encoder", _kind)(build_tower)


def build_vision_encoder(config: VisionEncoderConfig, *, rngs: nnx.Rngs | None) -> VisionEncoder:
    """The encoder registered as ``config.type``; its builder is called with the config and ``rngs``.

    Raises:
        KeyError: "Unknown vision_encoder: ..." with the names that exist.
        UserError: a folder that can't be read, or holds another model.
    """
    encoder = registry.get("vision_encoder", config.type)(config, rngs=rngs)
    if table := encoder_table(config):
        encoder.table = tuple(table.items())
        if rngs is not None:
            encoder.init_weights(rngs=rngs)
    return encoder


def patches(pixels: Float[Array, "B 3 h w"], side: int) -> Float[Array, "B N P"]:
    """(B, 3, h, w) -> (B, N, 3 p p): squares in reading order, each as (channel, row, column); remainders at the right
    and lower edge are cut off.
    """
    batch, channels, height, width = pixels.shape
    rows, columns = height // side, width // side
    whole = pixels[:, :, : rows * side, : columns * side]
    squares = whole.reshape(batch, channels, rows, side, columns, side)
    return squares.transpose(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


def check_pixels(pixels: Shaped[Array, "..."], image_size: int) -> None:
    """Refuse anything but a batch of RGB images of the encoder's size."""
    size = f"{image_size}, {image_size}" if image_size else "height, width"
    fits = pixels.ndim == 4 and pixels.shape[1] == CHANNELS
    if not fits or (image_size and pixels.shape[2:] != (image_size, image_size)):
        raise ValueError(f"pixel_values.shape = {tuple(pixels.shape)}: must be (batch, {CHANNELS}, {size})")
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise ValueError(f"pixel_values.dtype = {pixels.dtype}: must be floating point, normalised")
