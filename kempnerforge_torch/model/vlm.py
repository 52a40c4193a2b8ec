"""Vision-language models: an encoder, an adapter and a `Transformer`, joined as the architecture wants the image.

Shapes: B batch, F frames of a clip (1 for an image), h, w pixels, n tokens of a frame, N = F * n image tokens, T text
tokens, S positions of the stream, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from kempnerforge_torch.model.adapter import VisionAdapter, build_adapter
from kempnerforge_torch.model.checks import check_axes, check_ids, check_mask, check_shape
from kempnerforge_torch.model.kv_cache import KVCache
from kempnerforge_torch.model.modality import ModalityContext, with_positions, with_prompt, with_text
from kempnerforge_torch.model.mot import mot_warm_start_from_text_stack
from kempnerforge_torch.model.stats import TransformerOutput
from kempnerforge_torch.model.strategy import CrossAttentionStrategy as CrossAttentionStrategy
from kempnerforge_torch.model.strategy import JointDecoderStrategy as JointDecoderStrategy
from kempnerforge_torch.model.strategy import ModalityStrategy, build_modality_strategy
from kempnerforge_torch.model.strategy import MoMaStrategy as MoMaStrategy
from kempnerforge_torch.model.strategy import MoTStrategy as MoTStrategy
from kempnerforge_torch.model.transformer import Transformer
from kempnerforge_torch.model.vision import VisionEncoder, build_vision_encoder
from kempnerforge_torch.model.wrappers import unwrap
from kempnerforge_torch.registry import registry
from shared_config.errors import ConfigError
from shared_config.interchange.text_weights import load_text_weights
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.vision import VisionEncoderConfig
from shared_config.schema.vlm import VLMConfig


class VLMWrapper(nn.Module):
    """Pixels and text to logits of the text."""

    def __init__(
        self,
        vision_encoder: VisionEncoder,
        adapter: VisionAdapter,
        transformer: Transformer,
        strategy: ModalityStrategy,
        frames_per_clip: int = 1,
    ):
        super().__init__()
        self.vision_encoder = vision_encoder
        self.adapter = adapter
        self.transformer = transformer
        self.strategy = strategy
        self.frames_per_clip = frames_per_clip

    @property
    def tokens_per_frame(self) -> int:
        """n."""
        return self.adapter.output_num_tokens(self.vision_encoder.num_tokens)

    @property
    def num_image_tokens(self) -> int:
        """Positions of the residual stream that an image or a whole clip takes."""
        return self.strategy.num_image_tokens(self)

    def init_weights_and_freqs(self, seed: int | None = None) -> None:
        """Set every parameter, buffer and table, e.g. after `to_empty`. What comes from a folder is loaded again."""
        self.vision_encoder.init_weights(seed)
        self.adapter.init_weights(seed)
        self.transformer.init_weights_and_freqs(seed)
        self.warm_start()

    def init_freqs(self) -> None:
        """Set what no state holds. Encoders and adapters with tables of their own are initialised for these."""
        for part in (self.vision_encoder, self.adapter):
            if not part.state_dict().keys() >= dict(part.named_buffers()).keys():
                part.init_weights()
        self.transformer.init_freqs()

    def warm_start(self) -> None:
        """Load the weights of the text model that the config names, if any, unless they are on the meta device."""
        if next(self.transformer.parameters()).is_meta:
            return
        vlm = self.transformer.vlm_config
        if vlm is not None and vlm.warm_start_path:
            weights = load_text_weights(vlm.warm_start_path, self.transformer.config)
            mot_warm_start_from_text_stack(self.transformer, weights)

    def forward(
        self,
        pixel_values: Float[Tensor, "B ... 3 h w"] | None,
        input_ids: Integer[Tensor, "B T"],
        labels: Integer[Tensor, "B T"] | None = None,
        frame_mask: Bool[Tensor, "B F"] | None = None,
        *,
        text_mask: Bool[Tensor, "B T"] | None = None,
        noise_seed: Integer[Tensor, ""] | None = None,
        image_positions: Integer[Tensor, "B ..."] | None = None,
        prompt_lengths: Integer[Tensor, "B"] | None = None,
        kv_caches: Sequence[KVCache] | None = None,
        limit_capacity: bool | None = None,
        factored_logits: bool = False,
        return_stats: bool = False,
    ) -> tuple[Float[Tensor, "B T V"], Integer[Tensor, "B T"] | None] | TransformerOutput:
        """Logits (B, T, V), and the labels as they were given.

        Args:
            pixel_values: (B, 3, h, w), or (B, F, 3, h, w) with at most ``frames_per_clip`` frames, or with any number
                of images that have a place each or, with ``vlm.prefix_lm``, stand one after the other; None for text
                alone.
            input_ids: int (B, T).
            frame_mask: bool (B, F), False for frames that don't exist: nothing attends to them or routes them, and
                their content doesn't matter. They keep their places: other frames and the text have the positions that
                they have in a full clip. A row without any frame gives the logits of its text alone, up to rounding,
                since attention depends on differences of positions only and cross-attention skips the row. Two things
                still see its places: the capacity of experts, which counts all positions of the batch, and the noise
                of MoMa, which is drawn by position.
            text_mask: bool (B, T), False for padding, with an image or without. Padding after the text needs it only
                where experts route.
            noise_seed: int (), see `ModalityContext`.
            image_positions: int (B,), how many text tokens of each row stand before the image or the clip, in [0, T];
                or (B, F), before each of F images. None: none do. What follows an image is predicted from its last
                token that exists. In a row with fewer images the others don't exist, and stand behind all text (T).
            prompt_lengths: int (B,), with ``vlm.prefix_lm``: how many text tokens of each row, in [0, T], are its
                prompt, which sees the image and is seen by it in both directions; None: none are.
            kv_caches: one per layer; text continues from their fill. An image in the stream comes with the first call,
                one that cross-attention reads with every call.
            limit_capacity, factored_logits: as for `Transformer.forward`.
            return_stats: give a `TransformerOutput` instead, and leave the getters of the transformer alone.
        """
        modality = self.context(
            pixel_values,
            input_ids,
            frame_mask,
            text_mask=text_mask,
            noise_seed=noise_seed,
            image_positions=image_positions,
            prompt_lengths=prompt_lengths,
        )
        output = self.transformer(
            input_ids,
            modality=modality,
            kv_caches=kv_caches,
            allow_image_inputs=pixel_values is not None,
            limit_capacity=limit_capacity,
            factored_logits=factored_logits,
            return_stats=return_stats,
        )
        return output if return_stats else (output, labels)

    def run(
        self,
        pixel_values: Float[Tensor, "B ... 3 h w"] | None,
        input_ids: Integer[Tensor, "B T"],
        frame_mask: Bool[Tensor, "B F"] | None = None,
        *,
        text_mask: Bool[Tensor, "B T"] | None = None,
        noise_seed: Integer[Tensor, ""] | None = None,
        image_positions: Integer[Tensor, "B ..."] | None = None,
        prompt_lengths: Integer[Tensor, "B"] | None = None,
        kv_caches: Sequence[KVCache] | None = None,
        limit_capacity: bool | None = None,
        factored_logits: bool = False,
    ) -> TransformerOutput:
        """The forward as a pure function: logits, router stats and caches are returned, the model keeps nothing."""
        return self(
            pixel_values,
            input_ids,
            None,
            frame_mask,
            text_mask=text_mask,
            noise_seed=noise_seed,
            image_positions=image_positions,
            prompt_lengths=prompt_lengths,
            kv_caches=kv_caches,
            limit_capacity=limit_capacity,
            factored_logits=factored_logits,
            return_stats=True,
        )

    def context(
        self,
        pixel_values: Float[Tensor, "B ... 3 h w"] | None,
        input_ids: Integer[Tensor, "B T"],
        frame_mask: Bool[Tensor, "B F"] | None = None,
        *,
        text_mask: Bool[Tensor, "B T"] | None = None,
        noise_seed: Integer[Tensor, ""] | None = None,
        image_positions: Integer[Tensor, "B ..."] | None = None,
        prompt_lengths: Integer[Tensor, "B"] | None = None,
    ) -> ModalityContext | None:
        """The context of the transformer besides ``input_ids``; None if there is none.

        Raises:
            ValueError: text of another number of rows than the images; more frames than a clip has, or not a place
                for each; masks of another dtype or shape, a mask of frames without images; prompts or places of images
                that the architecture does not have.
        """
        check_axes("input_ids", input_ids, ("batch", "length"))
        if pixel_values is not None:
            check_shape("input_ids", input_ids, (len(pixel_values), input_ids.shape[1]))
        if text_mask is not None:
            check_mask("text_mask", text_mask, input_ids.shape)
        self._check_prompts(input_ids, image_positions, prompt_lengths)
        if pixel_values is None:
            if frame_mask is not None:
                raise ValueError("frame_mask is given, pixel_values = None: the mask needs the images that it masks")
            if image_positions is not None:
                raise ValueError("image_positions is given, pixel_values = None: there are no images to be placed")
            if text_mask is None and noise_seed is None and prompt_lengths is None:
                return None
            context = ModalityContext(key_padding_mask=text_mask, noise_seed=noise_seed)
            return context if prompt_lengths is None else with_prompt(context, prompt_lengths)
        self._check_frames(pixel_values, image_positions)
        context = with_text(self.strategy.prepare(self, pixel_values, input_ids, frame_mask), text_mask, noise_seed)
        if self._has_prefix:
            none_B = input_ids.new_zeros(len(input_ids))
            return with_prompt(context, none_B if prompt_lengths is None else prompt_lengths)
        if image_positions is None:
            return context
        if not self.strategy.places_image:
            name = type(self.strategy).__name__
            raise ValueError(f"image_positions is given: must be None with {name}, whose image has a place of its own")
        return with_positions(context, image_positions)

    def _check_frames(
        self, pixel_values: Float[Tensor, "B ... 3 h w"], image_positions: Integer[Tensor, "B ..."] | None
    ) -> None:
        """Check that there is room for the frames of a clip, or a place for each image; a prefix has any number."""
        frames = pixel_values.shape[1] if pixel_values.ndim == 5 else 1
        most = self.frames_per_clip
        if image_positions is not None and image_positions.ndim > 1:
            check_shape("image_positions", image_positions, (len(pixel_values), frames))
            most = frames
        elif self._has_prefix and most == 1:
            most = frames
        if not 1 <= frames <= most:
            raise ValueError(f"pixel_values has {frames} frames: must have from 1 to {most}")

    @property
    def _has_prefix(self) -> bool:
        vlm = self.transformer.vlm_config
        return vlm is not None and vlm.has_prefix

    def _check_prompts(
        self,
        input_ids: Integer[Tensor, "B T"],
        image_positions: Integer[Tensor, "B ..."] | None,
        prompt_lengths: Integer[Tensor, "B"] | None,
    ) -> None:
        if self._has_prefix and image_positions is not None:
            raise ValueError(
                "image_positions is given: must be None with vlm.prefix_lm = true, whose image comes first"
            )
        if prompt_lengths is None:
            return
        if not self._has_prefix:
            raise ValueError("prompt_lengths is given: must be None unless vlm.prefix_lm = true")
        batch, length = input_ids.shape
        check_shape("prompt_lengths", prompt_lengths, (batch,))
        check_ids("prompt_lengths", prompt_lengths, length + 1)

    def encode_images(
        self, pixel_values: Float[Tensor, "B ... 3 h w"], frame_mask: Bool[Tensor, "B F"] | None = None
    ) -> tuple[Float[Tensor, "B N D"], Bool[Tensor, "B N"] | None]:
        """Image tokens (B, N, D) in the order of the frames, and bool (B, N), False for absent frames; None: all exist.

        The tokens of an absent frame are 0, and keep their places.

        Raises:
            ValueError: shapes that don't fit.
        """
        frames_BF3hw = pixel_values if pixel_values.ndim == 5 else pixel_values.unsqueeze(1)
        batch, frames = frames_BF3hw.shape[:2]
        if frame_mask is not None:
            check_mask("frame_mask", frame_mask, (batch, frames))
            frames_BF3hw = frames_BF3hw.masked_fill(~frame_mask[:, :, None, None, None], 0)
        features = self.vision_encoder(frames_BF3hw.flatten(0, 1))
        assert self.transformer.token_embedding is not None
        embeds = self.adapter(features.to(self.transformer.token_embedding.embedding.weight.dtype))
        embeds_BFnD = torch.unflatten(embeds, 0, (batch, frames))
        if frame_mask is None:
            return embeds_BFnD.flatten(1, 2), None
        mask_BFn = frame_mask[:, :, None].expand(embeds_BFnD.shape[:3])
        embeds_BFnD = torch.where(mask_BFn[..., None], embeds_BFnD, 0)
        return embeds_BFnD.flatten(1, 2), mask_BFn.flatten(1)


def build_vlm_wrapper(
    model_config: ModelConfig,
    vision_config: VisionEncoderConfig,
    adapter_config: AdapterConfig | None,
    vlm_config: VLMConfig,
    frames_per_clip: int = 1,
) -> VLMWrapper:
    """The model of these configs; weights of the language model are drawn, or copied from the text model that
    ``vlm_config`` names.

    Raises:
        ConfigError: listing all that doesn't fit, the sequence budget included, now that the encoder is known.
        UserError: a folder that can't be read.
    """
    adapter_config = adapter_config or AdapterConfig()
    encoder = build_vision_encoder(vision_config)
    sizes = (encoder.num_tokens, encoder.feature_dim, frames_per_clip)
    problems = list(vlm_config.problems_with(model_config))
    problems += vlm_config.image_problems(model_config, adapter_config, *sizes)
    if problems:
        raise ConfigError(problems)
    adapter = build_adapter(adapter_config, encoder.feature_dim, model_config.dim)
    strategy = build_modality_strategy(vlm_config)
    tokens = frames_per_clip * adapter.output_num_tokens(encoder.num_tokens)
    transformer = registry.get("model", model_config.model_type)(
        model_config, vlm_config=vlm_config, num_image_tokens=vlm_config.residual_stream_image_tokens(tokens)
    )
    wrapper = VLMWrapper(encoder, adapter, transformer, strategy, frames_per_clip)
    wrapper.warm_start()
    return wrapper


def inner_transformer(model: nn.Module) -> Transformer:
    """The transformer inside a wrapper of ours, of `torch.compile` or of data parallelism; a transformer is returned as
    it is.
    """
    while not isinstance(model := unwrap(model), Transformer):
        inner = getattr(model, "transformer", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(f"model = {type(model).__name__}: holds no transformer")
        model = inner
    return model
