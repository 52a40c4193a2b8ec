"""The decoder-only transformer: single-device math, which knows nothing of parallelism.

Shapes: B batch, T text tokens, S positions of the residual stream, S_out of them with logits, D model dim, V
vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer

from kempnerforge_jax.model.architecture import Architecture, Modules
from kempnerforge_jax.model.attention import KVCache, prepare_mask, self_attention_mask
from kempnerforge_jax.model.balancing import balance
from kempnerforge_jax.model.block import TransformerBlock as TransformerBlock
from kempnerforge_jax.model.checks import check_axes
from kempnerforge_jax.model.embedding import FactoredLogits, OutputHead, TokenEmbedding
from kempnerforge_jax.model.init import init_weights
from kempnerforge_jax.model.modality import ModalityContext, with_logits, with_prefix
from kempnerforge_jax.model.module import Module, Numbered, is_observed
from kempnerforge_jax.model.position import RotaryTables
from kempnerforge_jax.model.scan import periods, prepares, run_blocks, stacked
from kempnerforge_jax.model.stack import Stack
from kempnerforge_jax.model.stats import LayerCounts, LayerStats, ModelGetters, TransformerOutput
from kempnerforge_jax.model.stream import check_inputs, check_stream, with_whole_prefix
from kempnerforge_jax.model.within_map import read_besides
from kempnerforge_jax.model.wrappers import plain_modules
from kempnerforge_jax.registry import registry
from shared_config.contract.routing import by_router
from shared_config.registry import declared_names, import_declared
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import VLMConfig

import_declared("architecture", "kempnerforge_jax.model")


@registry.register("model", "transformer")
class Transformer(ModelGetters):
    """Token embedding, blocks, final norm, output head.

    A pipeline stage is a transformer of which ``token_embedding``, ``norm`` or ``output_head`` were set to None and
    some ``layers`` deleted. Without an embedding, ``tokens`` is the residual stream (B, S, D) of the stage before.
    """

    norm: Module | None

    def __init__(
        self,
        config: ModelConfig,
        *,
        vlm_config: VLMConfig | None = None,
        num_image_tokens: int = 0,
        rngs: nnx.Rngs | None,
    ):
        self.config = config
        self.vlm_config = vlm_config
        self.num_image_tokens = num_image_tokens
        self._windows = config.layer_windows
        self.architecture = build_architecture(config, vlm_config)
        self.token_embedding: TokenEmbedding | None = TokenEmbedding(
            config.vocab_size, config.dim, config.embedding_scale, rngs=None
        )
        places, own_rope = (config.head_size, config.max_seq_len), config.has_window_rope
        self.rope = RotaryTables(*places, config.rope_theta, config.rope_scaling, rngs=None)
        self.window_rope = RotaryTables(*places, *config.window_rope, rngs=None) if own_rope else None
        blocks = {str(i): self.architecture.build_block(i, rngs=None) for i in range(config.n_layers)}
        self.layers: Numbered = Numbered(blocks)
        self.cross_attention_layers: nnx.Dict[Module] = nnx.Dict()
        self.mot_norms: nnx.Dict[Module] = nnx.Dict()
        extra = self.architecture.extra_modules(rngs=None)
        for name, module in extra.items():
            setattr(self, name, module)
        self._extra = tuple(extra)
        self.output_head: OutputHead | None = OutputHead(
            config.dim, config.vocab_size, config.logit_divisor, config.logit_softcap, rngs=None
        )
        if config.tie_embeddings:
            self.output_head.tie_weights(self.token_embedding)
        if rngs is not None:
            init_weights(self, config, rngs=rngs)

    def init_weights_and_freqs(self, seed: int | None = None, *, rngs: nnx.Rngs | None = None) -> None:
        """Set every parameter, buffer and rotary table, e.g. of a model from `nnx.eval_shape`; see `init_weights`."""
        self.init_freqs()
        init_weights(self, self.config, seed, rngs=rngs)

    def init_freqs(self) -> None:
        """Set what no state holds, rotary tables and numbers of layers, e.g. after `nnx.eval_shape`."""
        for rope in (self.rope, self.window_rope):
            if rope is not None:
                rope.reset()
        for path, module in self._having("set_layer"):
            module.set_layer(int(path.split(".")[1]))

    def forward(
        self,
        tokens: Integer[Array, "B T"] | Float[Array, "B T D"] | None = None,
        *,
        modality: ModalityContext | None = None,
        kv_caches: Sequence[KVCache] | None = None,
        doc_ids: Integer[Array, "B S"] | None = None,
        allow_image_inputs: bool = False,
        limit_capacity: bool | None = None,
    ) -> Float[Array, "B S_out V"] | tuple[Float[Array, "B S_out V"], list[KVCache]]:
        """Logits (B, S_out, V); given caches, (logits, caches). Arguments as for `run`.

        Outside jit, the router stats are kept for the getters.
        """
        output = self.run(
            tokens,
            modality=modality,
            kv_caches=kv_caches,
            doc_ids=doc_ids,
            allow_image_inputs=allow_image_inputs,
            limit_capacity=limit_capacity,
        )
        self.keep_stats(output.stats)
        return output.logits if output.kv_caches is None else (output.logits, output.kv_caches)

    def run(
        self,
        tokens: Integer[Array, "B T"] | Float[Array, "B T D"] | None = None,
        *,
        modality: ModalityContext | None = None,
        kv_caches: Sequence[KVCache] | None = None,
        doc_ids: Integer[Array, "B S"] | None = None,
        allow_image_inputs: bool = False,
        limit_capacity: bool | None = None,
        factored_logits: bool = False,
        scan_layers: bool = False,
        remat: bool | Callable[..., bool] = False,
    ) -> TransformerOutput:
        """The forward as a pure function: logits, router stats and caches are returned, the model keeps nothing.

        Args:
            tokens: int (B, S); or else ``modality.inputs_embeds``.
            kv_caches: one per layer; positions continue from their fill.
            doc_ids: int (B, S) over the residual stream; attention stays within a document.
            allow_image_inputs: let image inputs go together with caches, as the prefill of `generate` does.
            limit_capacity: whether experts have a capacity in this call; None: unless there are caches. A token's
                result must not depend on how its sequence is split into calls.
            factored_logits: leave the product with the head's weight to the caller, who gets ``factors``; not where
                something observes the head, as `capture` does.
            scan_layers: stack layers of one structure here and scan them. A model from ``split(scan_layers=True)``
                holds them stacked and needs no copy.
            remat: recompute the activations of each layer in the backward pass: True, or a `jax.checkpoint` policy.

        Raises:
            ValueError: inputs that exclude each other, masks and ids of another shape or dtype, or more
                positions than ``max_seq_len`` where lengths can be
                seen. Inside jit, cached tokens past the end give NaN.
        """
        if scan_layers and not is_observed():
            return stacked(self).run(
                tokens,
                modality=modality,
                kv_caches=kv_caches,
                doc_ids=doc_ids,
                allow_image_inputs=allow_image_inputs,
                limit_capacity=limit_capacity,
                factored_logits=factored_logits,
                remat=remat,
            )
        modality = modality or ModalityContext()
        check_inputs(tokens, modality, None if allow_image_inputs else kv_caches)
        self.architecture.check(modality)
        x_BSD = self._embed(tokens, modality)
        check_stream(x_BSD, modality, doc_ids)
        x_BSD = with_whole_prefix(x_BSD, modality, kv_caches, doc_ids)
        inputs = self._block_inputs(x_BSD, modality, kv_caches, doc_ids, limit_capacity)
        if kv_caches is None:
            x_BSD, stats = self._run_layers(x_BSD, inputs, modality, remat)
            updated = None
        else:
            x_BSD, stats, updated = self._run_cached_layers(x_BSD, inputs, modality, kv_caches)
        x_BSD = self.architecture.final_norm(self._extra_modules(), x_BSD, modality)
        logits, factors = self._head(with_logits(x_BSD, modality), factored_logits)
        return TransformerOutput(logits, stats, updated, factors)

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
                documented calls outside jit since the last update, on this process, but for those after `eval`.
        """
        balance(self, self.kept("pending", {}) if counts is None else by_router(counts))
        self.keep(pending={})

    def _embed(self, tokens: jax.Array | None, modality: ModalityContext) -> jax.Array:
        """The residual stream (B, S, D) that enters the first block."""
        if tokens is None:
            assert modality.inputs_embeds is not None
            return modality.inputs_embeds
        check_axes("tokens", tokens, ("batch", "length", "dim")[: 3 if self.token_embedding is None else 2])
        if self.token_embedding is None:
            if not jnp.issubdtype(tokens.dtype, jnp.floating):
                raise ValueError(f"tokens.dtype = {tokens.dtype}: a stage without embedding takes the stream before it")
            return tokens
        return with_prefix(self.token_embedding(tokens), modality)

    def _block_inputs(
        self,
        x: jax.Array,
        modality: ModalityContext,
        kv_caches: Sequence[KVCache] | None,
        doc_ids: jax.Array | None,
        limit_capacity: bool | None,
    ) -> dict[int | None, dict[str, object]]:
        """What blocks share: rotary tables and the mask, built once for those of each window."""
        length, softcap, others, found = x.shape[1], self.config.attention_softcap, read_besides(), {}
        if kv_caches is not None:
            self._check_caches(kv_caches, length)
        elif (whole := length if others is None else others.keys(length)) > self.config.max_seq_len:
            raise ValueError(f"sequence length = {whole}: must be at most max_seq_len = {self.config.max_seq_len}")
        for index, window in enumerate(self._windows_of_layers()):
            if window in found:
                continue
            cache = others if kv_caches is None else kv_caches[index]
            rope = self.rope if window is None or self.window_rope is None else self.window_rope
            positions = jnp.arange(length, dtype=jnp.int32) if cache is None else cache.positions(length)
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
                "mask": prepare_mask(mask, length, keys, self.config.head_size, x.dtype, softcap),
                "doc_ids": doc_ids,
                "key_padding_mask": modality.key_padding_mask,
                "limit_capacity": kv_caches is None if limit_capacity is None else limit_capacity,
            }
            found[window] = self.architecture.block_inputs(inputs, x, modality, kv_caches, rope)
        return found

    def _windows_of_layers(self) -> list[int | None]:
        """The window of each layer, or stack of layers, that is here."""
        return [self._windows[Stack.named(name).layers[0]] for name in self.layers]

    def _check_caches(self, kv_caches: Sequence[KVCache], length: int) -> None:
        """Check the first cache: all have the same fill."""
        if any(Stack.named(name).is_stacked for name in self.layers):
            raise ValueError("kv_caches are given: stacked layers can't use them; build the model with separate layers")
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
        x: jax.Array,
        inputs: Mapping[int | None, dict[str, object]],
        modality: ModalityContext,
        remat: bool | Callable[..., bool],
    ) -> tuple[jax.Array, dict[int, LayerStats]]:
        stats: dict[int, LayerStats] = {}
        for stacks, blocks in periods(self.layers):
            scan, of_blocks = stacks[0].is_stacked, [inputs[self._windows[stack.layers[0]]] for stack in stacks]
            if is_observed() and scan:
                raise ValueError("the layers are stacked: activations can be captured in a model with separate layers")
            if scan or prepares() or (remat and not is_observed()):
                x, stats_of_blocks = run_blocks(blocks, x, of_blocks, remat, scan)
            else:
                output = blocks[0](x, return_stats=True, **of_blocks[0])
                x, stats_of_blocks = output.x, [output.stats]
            for stack, own in zip(stacks, stats_of_blocks, strict=True):
                stats |= {} if own is None else stack.take(own)
            x = self.architecture.after_block(self._extra_modules(), stacks[-1].layers[-1], x, modality)
        return x, dict(sorted(stats.items()))

    def _run_cached_layers(
        self,
        x: jax.Array,
        inputs: Mapping[int | None, dict[str, object]],
        modality: ModalityContext,
        kv_caches: Sequence[KVCache],
    ) -> tuple[jax.Array, dict[int, LayerStats], list[KVCache]]:
        stats: dict[int, LayerStats] = {}
        updated = []
        for (name, block), cache in zip(self.layers.items(), kv_caches, strict=True):
            output = block(x, kv_cache=cache, return_stats=True, **inputs[self._windows[int(name)]])
            updated.append(output.kv_cache)
            stats |= {} if output.stats is None else {int(name): output.stats}
            x = self.architecture.after_block(self._extra_modules(), int(name), output.x, modality)
        return x, stats, updated

    def _head(self, x: jax.Array, factored: bool) -> tuple[jax.Array, FactoredLogits | None]:
        """The logits, or their factors beside the stream; the stream alone in a stage without head."""
        head = self.output_head
        if head is None:
            return x, None
        weight = self._tied_weight()
        return (x, head.factors(x, weight)) if factored and not is_observed() else (head(x, weight), None)

    def _tied_weight(self) -> jax.Array | None:
        if not self.config.tie_embeddings:
            return None
        assert self.token_embedding is not None, "a tied head needs the embedding in the same stage"
        return self.token_embedding.embedding.weight.get_value()

    def _extra_modules(self) -> Modules:
        """Those that the architecture added, as they are now."""
        return {name: getattr(self, name) for name in self._extra}

    def _having(self, method: str) -> Iterator[tuple[str, Any]]:
        return ((path, module) for path, module in plain_modules(self).items() if hasattr(module, method))


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
