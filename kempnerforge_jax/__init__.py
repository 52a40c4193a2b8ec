"""The JAX/Flax NNX backend."""
