"""Unlearning methods as objectives: (params, inputs, coefficients) → scalar, for the one training loop."""
