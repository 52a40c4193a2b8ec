"""The proof for models that this package does not define: recording, names and layouts, comparison, causes, tests.

`shared_config.parity` is its public face.
"""
