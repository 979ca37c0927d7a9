"""Image sources, encoding, the latent store and the order of samples."""
