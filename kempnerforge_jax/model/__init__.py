"""The model, module by module."""
