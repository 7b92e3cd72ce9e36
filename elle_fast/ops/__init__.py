"""The two ops, one folder each, and their random numbers."""
