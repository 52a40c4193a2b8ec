"""The decoder-only transformer: single-device math, which knows nothing of parallelism.

Shapes: B batch, T text tokens, S positions of the residual stream, S_out of them with logits, D model dim, V
vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from kempnerforge_torch.model.architecture import Architecture, Modules
from kempnerforge_torch.model.attention import KVCache, prepare_mask, self_attention_mask
from kempnerforge_torch.model.balancing import balance
from kempnerforge_torch.model.block import TransformerBlock as TransformerBlock
from kempnerforge_torch.model.checks import check_axes
from kempnerforge_torch.model.embedding import FactoredLogits, OutputHead, TokenEmbedding
from kempnerforge_torch.model.expert_choice import MAX_SEED
from kempnerforge_torch.model.init import init_weights
from kempnerforge_torch.model.modality import ModalityContext, with_logits, with_prefix
from kempnerforge_torch.model.position import RotaryTables
from kempnerforge_torch.model.stats import LayerCounts, LayerStats, ModelGetters, TransformerOutput
from kempnerforge_torch.model.stream import check_inputs, check_stream, with_whole_prefix
from kempnerforge_torch.model.wrappers import is_observed, plain_modules, unwrap
from kempnerforge_torch.registry import registry
from shared_config.contract.routing import by_router
from shared_config.registry import declared_names, import_declared
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import VLMConfig

import_declared("architecture", "kempnerforge_torch.model")


@registry.register("model", "transformer")
class Transformer(ModelGetters):
    """Token embedding, blocks, final norm, output head.

    A pipeline stage is a transformer of which ``token_embedding``, ``norm`` or ``output_head`` were set to None and
    some ``layers`` deleted. Without an embedding, ``tokens`` is the residual stream (B, S, D) of the stage before.
    """

    norm: nn.Module | None

    def __init__(self, config: ModelConfig, *, vlm_config: VLMConfig | None = None, num_image_tokens: int = 0):
        super().__init__()
        self.config = config
        self.vlm_config = vlm_config
        self.num_image_tokens = num_image_tokens
        self._windows = config.layer_windows
        self.architecture = build_architecture(config, vlm_config)
        self.token_embedding: TokenEmbedding | None = TokenEmbedding(
            config.vocab_size, config.dim, config.embedding_scale
        )
        places, own_rope = (config.head_size, config.max_seq_len), config.has_window_rope
        self.rope = RotaryTables(*places, config.rope_theta, config.rope_scaling)
        self.window_rope = RotaryTables(*places, *config.window_rope) if own_rope else None
        self.layers = nn.ModuleDict({str(i): self.architecture.build_block(i) for i in range(config.n_layers)})
        self.cross_attention_layers: nn.Module = nn.ModuleDict()
        self.mot_norms: nn.Module = nn.ModuleDict()
        extra = self.architecture.extra_modules()
        for name, module in extra.items():
            self.add_module(name, module)
        self._extra = tuple(extra)
        self.output_head: OutputHead | None = OutputHead(
            config.dim, config.vocab_size, config.logit_divisor, config.logit_softcap
        )
        self.init_weights_and_freqs()

    def init_weights_and_freqs(self, seed: int | None = None) -> None:
        """Set every parameter, buffer and rotary table, e.g. after `to_empty`; see `init_weights`."""
        self.init_freqs()
        init_weights(self, self.config, seed)

    def init_freqs(self) -> None:
        """Set what no state holds, e.g. after `to_empty`: the tie, and what modules ``reset``: rotary tables and the
        numbers of layers.
        """
        self._tie()
        for _, module in self._having("reset"):
            module.reset()

    def forward(
        self,
        tokens: Integer[Tensor, "B T"] | Float[Tensor, "B T D"] | None = None,
        *,
        modality: ModalityContext | None = None,
        kv_caches: Sequence[KVCache] | None = None,
        doc_ids: Integer[Tensor, "B S"] | None = None,
        allow_image_inputs: bool = False,
        limit_capacity: bool | None = None,
        factored_logits: bool = False,
        return_stats: bool = False,
    ) -> Float[Tensor, "B S_out V"] | TransformerOutput:
        """Logits (B, S_out, V).

        Args:
            tokens: int (B, S); or else ``modality.inputs_embeds``.
            kv_caches: one per layer; positions continue from their fill.
            doc_ids: int (B, S) over the residual stream; attention stays within a document.
            allow_image_inputs: let image inputs go together with caches, as the prefill of `generate` does.
            limit_capacity: whether experts have a capacity in this call; None: unless there are caches. A token's
                result must not depend on how its sequence is split into calls.
            factored_logits: leave the product with the head's weight to the caller, who gets ``factors``; not where
                something observes the head, as `capture` does.
            return_stats: give a `TransformerOutput`, and leave the getters alone.

        Raises:
            ValueError: inputs that exclude each other, masks and ids of another shape or dtype, or more
                positions than ``max_seq_len``.
        """
        modality = self._with_noise(modality or ModalityContext())
        check_inputs(tokens, modality, None if allow_image_inputs else kv_caches)
        self.architecture.check(modality)
        x_BSD = self._embed(tokens, modality)
        check_stream(x_BSD, modality, doc_ids)
        x_BSD = with_whole_prefix(x_BSD, modality, kv_caches, doc_ids)
        inputs = self._block_inputs(x_BSD, modality, kv_caches, doc_ids, limit_capacity)
        x_BSD, stats = self._run_layers(x_BSD, inputs, modality, kv_caches)
        x_BSD = self.architecture.final_norm(self._extra_modules(), x_BSD, modality)
        logits, factors = self._head(with_logits(x_BSD, modality), factored_logits)
        if return_stats:
            return TransformerOutput(logits, stats, None if kv_caches is None else list(kv_caches), factors)
        self.keep_stats(stats)
        return logits

    def run(
        self,
        tokens: Integer[Tensor, "B T"] | Float[Tensor, "B T D"] | None = None,
        *,
        modality: ModalityContext | None = None,
        kv_caches: Sequence[KVCache] | None = None,
        doc_ids: Integer[Tensor, "B S"] | None = None,
        allow_image_inputs: bool = False,
        limit_capacity: bool | None = None,
        factored_logits: bool = False,
    ) -> TransformerOutput:
        """The forward as a pure function: logits, router stats and caches are returned, the model keeps nothing."""
        return self(
            tokens,
            modality=modality,
            kv_caches=kv_caches,
            doc_ids=doc_ids,
            allow_image_inputs=allow_image_inputs,
            limit_capacity=limit_capacity,
            factored_logits=factored_logits,
            return_stats=True,
        )

    def precompute_image_kv(self, modality: ModalityContext) -> ModalityContext:
        """The context for decoding, in which nothing of the image is left to be computed at every step."""
        return self.architecture.precompute_image_kv(self._extra_modules(), modality)

    def set_moe_step(self, step: int, max_steps: int) -> None:
        """Tell the routers the progress of training, for their bias schedules."""
        for _, router in self._having("set_step"):
            router.set_step(step, max_steps)

    def update_moe_bias(self, counts: Mapping[int, LayerCounts] | None = None) -> None:
        """Move the balancing biases, once per optimiser step.

        Args:
            counts: as `get_expert_counts` gives them, summed over all micro-batches and ranks; None means those of the
                documented calls in training mode since the last update, on this rank.
        """
        balance(self, self._pending_counts if counts is None else by_router(counts))
        self._pending_counts = {}

    def _with_noise(self, modality: ModalityContext) -> ModalityContext:
        """The context; in training mode with a seed of the routing noise, drawn where none is given. (JAX has no
        training mode.)
        """
        noisy = self.vlm_config is not None and self.vlm_config.routing_noise
        if not self.training or modality.noise_seed is not None or not noisy:
            return modality
        return replace(modality, noise_seed=torch.randint(MAX_SEED, (), device=self.rope.cos.device))

    def _embed(self, tokens: Tensor | None, modality: ModalityContext) -> Tensor:
        """The residual stream (B, S, D) that enters the first block."""
        if tokens is None:
            assert modality.inputs_embeds is not None
            return modality.inputs_embeds
        check_axes("tokens", tokens, ("batch", "length", "dim")[: 3 if self.token_embedding is None else 2])
        if self.token_embedding is None:
            if not tokens.is_floating_point():
                raise ValueError(f"tokens.dtype = {tokens.dtype}: a stage without embedding takes the stream before it")
            return tokens
        return with_prefix(self.token_embedding(tokens), modality)

    def _block_inputs(
        self,
        x: Tensor,
        modality: ModalityContext,
        kv_caches: Sequence[KVCache] | None,
        doc_ids: Tensor | None,
        limit_capacity: bool | None,
    ) -> dict[int | None, dict[str, Any]]:
        """What blocks share: rotary tables and the mask, built once for those of each window."""
        length, softcap, found = x.shape[1], self.config.attention_softcap, {}
        if kv_caches is not None:
            self._check_caches(kv_caches, length)
        elif length > self.config.max_seq_len:
            raise ValueError(f"sequence length = {length}: must be at most max_seq_len = {self.config.max_seq_len}")
        for index, window in enumerate(self._windows_of_layers()):
            if window in found:
                continue
            cache = None if kv_caches is None else kv_caches[index]
            rope = self.rope if window is None or self.window_rope is None else self.window_rope
            positions = torch.arange(length, device=x.device) if cache is None else cache.positions(length)
            rope_cos, rope_sin = rope(positions, x.dtype)
            mask = self_attention_mask(
                length,
                kv_cache=cache,
                doc_ids=doc_ids,
                key_padding_mask=modality.key_padding_mask,
                sliding_window=window,
                prefix_lengths=modality.prefix_lengths,
            )
            keys = length if cache is None else cache.keys(length)
            inputs = {
                "rope_cos": rope_cos,
                "rope_sin": rope_sin,
                "mask": prepare_mask(mask, length, keys, self.config.head_size, x.dtype, x.device, softcap),
                "doc_ids": doc_ids,
                "key_padding_mask": modality.key_padding_mask,
                "limit_capacity": kv_caches is None if limit_capacity is None else limit_capacity,
            }
            found[window] = self.architecture.block_inputs(inputs, x, modality, kv_caches, rope)
        return found

    def _windows_of_layers(self) -> list[int | None]:
        """The window of each layer that is here."""
        return [self._windows[int(name)] for name in self.layers]

    def _check_caches(self, kv_caches: Sequence[KVCache], length: int) -> None:
        """Check the first cache: all have the same fill."""
        if len(kv_caches) != len(self.layers):
            raise ValueError(f"kv_caches = {len(kv_caches)} caches: must be one for each of {len(self.layers)} layers")
        cache = kv_caches[0]
        if cache.max_seq_len > self.config.max_seq_len:
            raise ValueError(
                f"kv_caches max_seq_len = {cache.max_seq_len}: must be at most the model's {self.config.max_seq_len}"
            )
        cache.reserve(length)

    def _run_layers(
        self,
        x: Tensor,
        inputs: Mapping[int | None, dict[str, Any]],
        modality: ModalityContext,
        kv_caches: Sequence[KVCache] | None,
    ) -> tuple[Tensor, dict[int, LayerStats]]:
        stats: dict[int, LayerStats] = {}
        for index, (name, block) in enumerate(self.layers.items()):
            cache = None if kv_caches is None else kv_caches[index]
            output = block(x, kv_cache=cache, return_stats=True, **inputs[self._windows[int(name)]])
            if output.stats is not None:
                stats[int(name)] = output.stats
            x = self.architecture.after_block(self._extra_modules(), int(name), output.x, modality)
        return x, stats

    def _head(self, x: Tensor, factored: bool) -> tuple[Tensor, FactoredLogits | None]:
        """The logits, or their factors beside the stream; the stream alone in a stage without head."""
        head = self.output_head
        if head is None:
            return x, None
        return (x, unwrap(head).factors(x)) if factored and not is_observed(head) else (head(x), None)

    def _extra_modules(self) -> Modules:
        """Those that the architecture added, as they are now."""
        return {name: getattr(self, name) for name in self._extra}

    def _having(self, method: str) -> Iterator[tuple[str, Any]]:
        return ((path, module) for path, module in plain_modules(self).items() if hasattr(module, method))

    def _tie(self) -> None:
        if self.config.tie_embeddings and self.token_embedding is not None and self.output_head is not None:
            unwrap(self.output_head).tie_weights(unwrap(self.token_embedding))

    def _apply(self, fn: Any, recurse: bool = True) -> Transformer:
        """Leaving the meta device creates new parameters, which would untie the head."""
        super()._apply(fn, recurse)
        self._tie()
        return self


def build_architecture(config: ModelConfig, vlm_config: VLMConfig | None) -> Architecture:
    """The architecture of ``vlm_config.arch``; the plain decoder if there is none, or if the architecture is a modality
    strategy alone.

    Raises:
        KeyError: "Unknown architecture: ..." with the names that exist, for one that this backend does not know.
    """
    if vlm_config is None:
        return Architecture(config)
    known_elsewhere = vlm_config.arch in declared_names("architecture")
    if not known_elsewhere and registry.has("modality_strategy", vlm_config.arch):
        return Architecture(config, vlm_config)
    return registry.get("architecture", vlm_config.arch)(config, vlm_config)
