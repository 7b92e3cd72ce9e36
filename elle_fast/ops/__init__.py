"""The two ops, one folder each, and the random numbers that both the ops and the tests count on."""
