"""What the command line runs: models, data, training, evaluation and plots."""
