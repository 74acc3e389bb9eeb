"""Where gradients and optimizer state live."""
