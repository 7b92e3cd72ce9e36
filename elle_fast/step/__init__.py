"""The training step: one eager step, and the same as CUDA graphs."""
