"""The model, module by module: names, arguments and weights are those of the `kempnerforge.model` package.

Where the two differ, they do so on purpose:

- Every norm has ``norm_eps``: those of queries and keys, of cross-attention and of each modality too.
- A balancing bias chooses experts and weighs none: combine weights are made of the unbiased scores.
- Capacity counts the assignments of all slots together, every first choice before any second one.
- ``gradient_scale`` scales the gradients of experts and leaves the forward as it is.
- Documents and modality ids are honoured in MoT: no document sees another, and modalities come in any order.
- Getters of losses and counts see every router, those of MoT too.
- A row without a visible key gives 0 in attention; a row without an image skips the cross-attention blocks.
- ``shared_experts`` = n is one expert n times as wide, which every token passes.
"""

from kempnerforge_torch.model.block import TransformerBlock
from kempnerforge_torch.model.transformer import Transformer

__all__ = ["Transformer", "TransformerBlock"]
