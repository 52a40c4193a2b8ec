"""The model, module by module."""

from kempnerforge_torch.model.transformer import Transformer, TransformerBlock

__all__ = ["Transformer", "TransformerBlock"]
