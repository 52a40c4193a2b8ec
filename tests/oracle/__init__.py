"""The executable specification: every component in plain NumPy, from its formula, independent of both backends.

Read a component's forward function as its definition. Weights are flat dicts named as the module's own state dict
(`q_proj.weight`, (out, in)); whether a bias or a norm exists is whether its weight is there. Arithmetic follows the
dtype of the weights: float64 for values, complex128 for the complex-step derivatives of `gradient.py`, so every branch
looks at real parts only. `x_backward(gradient of the output, ...)` returns the gradient of the input and of each
weight, derived by hand.
"""
