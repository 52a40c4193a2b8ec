"""Vision encoders: images to features, one per token.

Shapes: B images, h, w pixels, p patch side, P = 3 p p numbers of a patch, N tokens, F feature dim, H heads.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from kempnerforge_torch.model.attention import attend
from kempnerforge_torch.model.init import init_from_table
from kempnerforge_torch.model.mask import FULL
from kempnerforge_torch.model.mlp import ACTIVATIONS, Activation
from kempnerforge_torch.model.noise import image_noise
from kempnerforge_torch.model.norm import LayerNorm
from kempnerforge_torch.model.state import set_state
from kempnerforge_torch.registry import registry
from shared_config.contract.specs import ParameterSpec
from shared_config.contract.vision import TowerConfig, encoder_table, tower_table
from shared_config.interchange.vision import load_tower_weights, resolve_tower
from shared_config.schema.vision import VisionEncoderConfig

CHANNELS = 3


def quick_gelu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """x sigmoid(1.702 x), in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


TOWER_ACTIVATIONS: dict[str, Activation] = {
    **ACTIVATIONS,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


class VisionEncoder(nn.Module):
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

    def init_weights(self, seed: int | None = None) -> None:
        """Set every parameter that ``table`` knows, e.g. after `to_empty`."""
        if self.table:
            init_from_table(self, dict(self.table), seed, stream="vision_encoder.")

    def forward(self, pixel_values: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B N F"]:
        """(B, 3, h, w) -> (B, N, F)."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")


class RandomVisionEncoder(VisionEncoder):
    """Noise that depends on the image: see `shared_config.contract.noise`. No parameters, no gradient.

    Args:
        seed: an image has different noise under different seeds.
    """

    def __init__(self, num_tokens: int = 16, feature_dim: int = 768, seed: int = 0, *, image_size: int = 0):
        super().__init__()
        self.num_tokens = num_tokens
        self.feature_dim = feature_dim
        self.seed = seed
        self.image_size = image_size

    def forward(self, pixel_values: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B N F"]:
        """(B, 3, h, w) -> (B, N, F), in the dtype of the pixels."""
        check_pixels(pixel_values, self.image_size)
        return image_noise(pixel_values, self.num_tokens, self.feature_dim, self.seed)


class VisionAttention(nn.Module):
    """Every patch attends to every patch; all projections have a bias."""

    def __init__(self, dim: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.head_dim = dim // n_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B N F"]) -> Float[Tensor, "B N F"]:
        """(B, N, F) -> (B, N, F)."""
        q_BHNh, k_BHNh, v_BHNh = (
            torch.unflatten(project(x), -1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(attend(q_BHNh, k_BHNh, v_BHNh, FULL).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """down(activation(up(x))), with biases."""

    def __init__(self, dim: int, hidden_dim: int, activation: str):
        super().__init__()
        if activation not in TOWER_ACTIVATIONS:
            raise ValueError(f"activation = {activation!r}: must be one of {', '.join(sorted(TOWER_ACTIVATIONS))}")
        self.activation = activation
        self.up_proj = nn.Linear(dim, hidden_dim)
        self.down_proj = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "B N F"]) -> Float[Tensor, "B N F"]:
        """(B, N, F) -> (B, N, F)."""
        return self.down_proj(TOWER_ACTIVATIONS[self.activation](self.up_proj(x)))


class VisionBlock(nn.Module):
    """x + attention(attention_norm(x)), then x + mlp(mlp_norm(x))."""

    def __init__(self, tower: TowerConfig):
        super().__init__()
        self.attention_norm = LayerNorm(tower.dim, tower.norm_eps)
        self.attention = VisionAttention(tower.dim, tower.n_heads)
        self.mlp_norm = LayerNorm(tower.dim, tower.norm_eps)
        self.mlp = VisionMLP(tower.dim, tower.ffn_hidden_dim, tower.activation)

    def forward(self, x: Float[Tensor, "B N F"]) -> Float[Tensor, "B N F"]:
        """(B, N, F) -> (B, N, F)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class VisionTower(VisionEncoder):
    """A pre-norm vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929), as SigLIP and CLIP have it.

    The blocks' outputs are the activations "layers.{i}".
    """

    def __init__(self, tower: TowerConfig, folder: str = ""):
        """``folder``: where `init_weights` finds the weights; without one they are drawn."""
        super().__init__()
        self.tower = tower
        self.folder = folder
        self.feature_dim = tower.dim
        self.num_tokens = tower.num_tokens
        self.image_size = tower.image_size
        self.patch_embedding = nn.Linear(CHANNELS * tower.patch_size**2, tower.dim, bias=tower.patch_bias)
        self.class_embedding = nn.Parameter(torch.empty(tower.dim)) if tower.class_token else None
        self.position_embedding = nn.Embedding(tower.num_patches + tower.class_token, tower.dim)
        self.pre_norm = LayerNorm(tower.dim, tower.norm_eps) if tower.pre_norm else None
        self.layers = nn.ModuleList(VisionBlock(tower) for _ in range(tower.n_layers))
        self.norm = LayerNorm(tower.dim, tower.norm_eps) if tower.final_norm else None
        self.init_weights()

    def init_weights(self, seed: int | None = None) -> None:
        """Set every parameter: those of the folder, else drawn (see `shared_config.contract.vision.tower_table`)."""
        if self.position_embedding.weight.is_meta:
            return
        if self.folder:
            set_state(self, load_tower_weights(self.folder, self.tower))
        else:
            init_from_table(self, tower_table(self.tower), seed, stream="vision_encoder.")

    def forward(self, pixel_values: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B N F"]:
        """(B, 3, h, w) -> (B, N, F): the patches after the last block, in reading order. The class token is dropped,
        or stands before them where the tower keeps it.
        """
        check_pixels(pixel_values, self.image_size)
        weight = self.patch_embedding.weight
        x_BNF = self.patch_embedding(patches(pixel_values.to(weight.dtype), self.tower.patch_size))
        if self.class_embedding is not None:
            x_BNF = torch.cat([self.class_embedding.expand(len(x_BNF), 1, -1), x_BNF], dim=1)
        x_BNF = x_BNF + self.position_embedding.weight
        if self.pre_norm is not None:
            x_BNF = self.pre_norm(x_BNF)
        for block in self.layers:
            x_BNF = block(x_BNF)
        if self.norm is not None:
            x_BNF = self.norm(x_BNF)
        drops_first = self.class_embedding is not None and not self.tower.keep_class_token
        return x_BNF[:, 1:] if drops_first else x_BNF


def build_tower(config: VisionEncoderConfig) -> VisionTower:
    """The tower of a config, with the weights of its folder if it has one."""
    tower = resolve_tower(config)
    assert tower is not None
    return VisionTower(tower, config.path if config.type != "vit" else "")


registry.register("vision_encoder", "random")(
    lambda config: RandomVisionEncoder(config.num_tokens, config.feature_dim, image_size=config.image_size)
)
for _kind in ("siglip2", "clip", "vit"):
    registry.register("vision_encoder", _kind)(build_tower)


def build_vision_encoder(config: VisionEncoderConfig) -> VisionEncoder:
    """The encoder registered as ``config.type``; its builder is called with the config.

    Raises:
        KeyError: "Unknown vision_encoder: ..." with the names that exist.
        UserError: a folder that can't be read, or holds another model.
    """
    encoder = registry.get("vision_encoder", config.type)(config)
    if table := encoder_table(config):
        encoder.table = tuple(table.items())
        encoder.init_weights()
    return encoder


def patches(pixels: Float[Tensor, "B 3 h w"], side: int) -> Float[Tensor, "B N P"]:
    """(B, 3, h, w) -> (B, N, 3 p p): squares in reading order, each as (channel, row, column); remainders at the right
    and lower edge are cut off.
    """
    rows, columns = pixels.shape[2] // side, pixels.shape[3] // side
    whole = pixels[:, :, : rows * side, : columns * side]
    squares = torch.unflatten(torch.unflatten(whole, 3, (columns, side)), 2, (rows, side))
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def check_pixels(pixels: Shaped[Tensor, "..."], image_size: int) -> None:
    """Refuse anything but a batch of RGB images of the encoder's size."""
    size = f"{image_size}, {image_size}" if image_size else "height, width"
    fits = pixels.ndim == 4 and pixels.shape[1] == CHANNELS
    if not fits or (image_size and pixels.shape[2:] != (image_size, image_size)):
        raise ValueError(f"pixel_values.shape = {tuple(pixels.shape)}: must be (batch, {CHANNELS}, {size})")
    if not pixels.is_floating_point():
        raise ValueError(f"pixel_values.dtype = {pixels.dtype}: must be floating point, normalised")
