"""Frozen image <-> latent codecs behind one contract."""
