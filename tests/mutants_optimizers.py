"""Bugs to plant in optimisers and their rates."""

from __future__ import annotations

from tests.mutants import Mutant, both

LOSS_MUTANTS = (
    Mutant("training.loss", "no smoothing", ("label_smoothing=smoothing)", "label_smoothing=0.0)"),
           ("    if smoothing:\n        loss_BS", "    if False:\n        loss_BS")),
    Mutant("training.loss", "smoothing all but the label",
           ("label_smoothing=smoothing)", "label_smoothing=smoothing * wide_NV.shape[-1] / (wide_NV.shape[-1] - 1))"),
           ("smoothing * (chosen_BS - wide_BSV.mean(axis=-1))",
            "smoothing * (chosen_BS - wide_BSV.mean(axis=-1)) * wide_BSV.shape[-1] / (wide_BSV.shape[-1] - 1)")),
    Mutant("training.loss", "ignored labels have a z-loss",
           ("torch.where(labels_N != IGNORED, wide_NV.logsumexp(dim=-1).square(), 0).sum()",
            "wide_NV.logsumexp(dim=-1).square().sum()"),
           ("return jnp.where(labels_BS != IGNORED, loss_BS, 0).sum()",
            "return jnp.where(labels_BS != IGNORED, loss_BS, z_weight * jnp.square(normalizer_BS)).sum()")),
    Mutant("training.loss", "z-loss with the wrong sign", ("total + z_weight *", "total - z_weight *"),
           ("loss_BS += z_weight", "loss_BS -= z_weight")),
)  # fmt: skip

OPTIMIZER_MUTANTS = (
    *LOSS_MUTANTS,
    Mutant("training.lion", "the sign of the new moment",
           ("moved = m.lerp(g, 1 - b1).sign_()", "moved = m.lerp(g, 1 - b2).sign_()"),
           ("scale_by_lion(*config.betas,", "scale_by_lion(config.betas[1], config.betas[1],")),
    Mutant("training.lion", "the rates swapped", ('b1, b2 = group["betas"]', 'b2, b1 = group["betas"]'),
           ("(*config.betas, mu", "(*config.betas[::-1], mu")),
    Mutant("training.lion", "steps up", ("sign_()", "sign_().neg_()"),
           ("return optax.scale_by_lion(*config.betas, mu_dtype=None)",
            "own = optax.scale_by_lion(*config.betas, mu_dtype=None)\n"
            "    return own._replace(update=lambda g, state, p=None: own.update(-g, state))")),
    Mutant("training.muon", "always Nesterov's momentum",
           ('gradient.lerp(m, group["momentum"]) if group["nesterov"] else m', 'gradient.lerp(m, group["momentum"])'),
           ("b * m + (1 - b) * updates if config.nesterov else m", "b * m + (1 - b) * updates")),
    Mutant("training.muon", "never Nesterov's momentum", ('if group["nesterov"] else m', "if False else m"),
           ("if config.nesterov else m", "if False else m")),
    both("training.muon", "stacks scaled as one matrix", "max(matrix.shape[-2:])", "max(matrix.shape)"),
    both("training.muon", "one step too few", "range(steps)", "range(steps - 1)"),
    Mutant("training.muon", "a stack divided by its norm",
           ("torch.linalg.matrix_norm(x_RC, keepdim=True)", "torch.linalg.vector_norm(x_RC)"),
           ("x_RC / (jnp.linalg.norm(x_RC, axis=(-2, -1), keepdims=True)", "x_RC / (jnp.linalg.norm(x_RC)")),
    both("training.muon", "the cubic forgotten", "(B * gram_RR + C", "(0 * gram_RR + C"),
    Mutant("training.schedule_free", "bias correction off by one",
           (".double())", ".double().add(1))"), ("** count))", "** (count + 1)))")),
    Mutant("training.schedule_free", "decay at the newest weights",
           ('u.add_(y, alpha=group["weight_decay"])', 'u.add_(y + d, alpha=group["weight_decay"])'),
           ("rates.decay * y", "rates.decay * (y + d)")),
    Mutant("training.schedule_free", "the average not weighted",
           ('group["lr"], group["average"]', 'group["lr"], 1 / (1 + int(group["average"] < 1))'),
           ("rates.lr, rates.average", "rates.lr, 1 / (1 + (rates.average < 1))")),
    Mutant("training.schedule_free", "the difference keeps the whole step",
           ("d.sub_(u, alpha=b1 * lr)", "d.sub_(u, alpha=lr)"), ("(d - b1 * lr * u)", "(d - lr * u)")),
    Mutant("training.optimizer", "the average off by one",
           ("average.add_(value)\n    optimizer.step()\n    for average, value in zip(averages, values, strict=True):\n"
            "        average.sub_(value).mul_(decay_rate)",
            "average.add_(value)\n    before = [value.clone() for value in values]\n    optimizer.step()\n"
            "    for average, value, old in zip(averages, values, before, strict=True):\n"
            "        average.mul_(decay_rate).add_(old, alpha=1 - decay_rate).sub_(value)"),
           ("decay_rate * (state.ema + parameter - moved)",
            "decay_rate * (state.ema + parameter) + (1 - decay_rate) * parameter - moved")),
    Mutant("training.optimizer", "all by the optimiser of matrices",
           ("if optimizer_of(config, name, table[name]) == kind}",
            "if (kind == config.name) == (len(tensor.shape) > 1 or len(optimizers_of(config)) < 2)}"),
           ("whole[optimizer_of(config, in_first_layer(name), spec)]",
            "whole[config.name if len(spec.shape) > 1 else optimizer_of(config, in_first_layer(name), spec)]")),
    Mutant("training.optimizer", "decay coupled to the gradient",
           ("    optimizer.step()\n    for average, value",
            "    for group in optimizer.param_groups:\n        for tensor in group['params']:\n"
            "            if tensor.grad is not None:\n"
            "                tensor.grad.add_(tensor, alpha=group['weight_decay'])\n"
            "        group['weight_decay'] = 0.0\n    optimizer.step()\n    for average, value"),
           ("direction, new_state = own.update(gradient, state, parameter)",
            "direction, new_state = own.update(gradient + rates.decay * parameter, state, parameter)\n"
            "        rates = rates._replace(decay=0.0)")),
)  # fmt: skip
