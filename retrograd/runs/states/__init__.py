"""Kept states and gradients: slots, budgets, transfers and files."""
