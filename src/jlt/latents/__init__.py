"""The latent store: encoding, adoption, shards, statistics, loader, sample order."""
