"""Mutation testing by machine: small bugs drawn at random, and the tests that should see them."""
