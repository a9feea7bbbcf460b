"""Attacks without a training step, one file each: the weights or the prompt change, by rising strengths."""
