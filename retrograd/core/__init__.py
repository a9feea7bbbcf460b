"""The kernel: differentiable training steps, their pullbacks and the sweep. Torch only."""
