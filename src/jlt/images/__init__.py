"""Collections of images: numbered, labelled sources, the crop, decoding, contact sheets."""
