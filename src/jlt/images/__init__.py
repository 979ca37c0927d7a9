"""Collections of images: sources of numbered, labelled images, the crop, decoding, contact sheets."""
