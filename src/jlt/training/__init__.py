"""The training loop, the random draws it consumes, EMA and checkpoints."""
