"""What is differentiated: the loss of a micro-batch, with the terms of the routers."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from kempnerforge_torch.training.loss import router_losses, router_stats
from kempnerforge_torch.training.terms import Terms, expert_counts, model_inputs
from shared_config.contract.labels import loss_terms
from shared_config.schema.job import JobConfig


class Objective(nn.Module):
    """Loss and its backward pass in one module, so that the weights that `functional_call` puts in are there when
    checkpointed blocks run again.
    """

    def __init__(
        self,
        model: nn.Module,
        config: JobConfig,
        cross_entropy: Callable[..., tuple[Float[Tensor, ""], Int[Tensor, ""]]],
    ):
        super().__init__()
        self.model = model
        self.cross_entropy = cross_entropy
        self.aux_weight = config.model.moe_aux_loss_weight
        self.loss_terms = loss_terms(config.train)
        self.z_weight = config.model.moe_router_z_loss_weight

    def forward(
        self, inputs: dict[str, Shaped[Tensor, "..."]], count: int | Shaped[Tensor, ""], micro_batches: int
    ) -> Terms:
        """The terms of a micro-batch; gradients go to the leaves of the graph.

        Args:
            count: labels of the step that count, a number or a scalar array.
            micro_batches: of the step.
        """
        output = self.model(**model_inputs(inputs), factored_logits=True, return_stats=True)
        loss = self.cross_entropy(output.factors or output.logits, inputs["labels"], **self.loss_terms)[0] / count
        terms = (term if isinstance(term, Tensor) else loss.new_full((), term) for term in router_losses(output.stats))
        aux_loss, z_loss = (term / micro_batches for term in terms)
        (loss + self.aux_weight * aux_loss + self.z_weight * z_loss).backward()
        entropies = [router.entropy / micro_batches for router in router_stats(output.stats)]
        entropy = sum(entropies) / max(len(entropies), 1)
        return Terms(loss.detach(), aux_loss.detach(), z_loss.detach(), entropy, expert_counts(output.stats))
