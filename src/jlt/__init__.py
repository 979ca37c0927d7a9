"""JLT: train, sample, evaluate and explain latent diffusion transformers that predict x, eps or v."""

__version__ = "0.1.0"
