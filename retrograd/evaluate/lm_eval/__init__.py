"""lm-evaluation-harness as a way of asking."""
