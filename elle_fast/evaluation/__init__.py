"""The parts of an evaluation: attacks and their packages, soundness of points, finished chunks, the masking check."""
