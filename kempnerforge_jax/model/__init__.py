"""The model, module by module."""

from kempnerforge_jax.model.transformer import Transformer, TransformerBlock

__all__ = ["Transformer", "TransformerBlock"]
