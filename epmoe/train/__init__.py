"""Training, evaluation, checkpoints and generation."""
