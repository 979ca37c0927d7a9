"""The examples run, and do what they show."""

import runpy
from pathlib import Path

import numpy as np
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_minimal_training_lowers_its_loss_and_writes_images(tmp_path):
    main = runpy.run_path(str(EXAMPLES / "train_minimal.py"))["main"]
    losses = main(steps=40, out=tmp_path / "digits.png")
    assert len(losses) == 40
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) / 1.5
    with Image.open(tmp_path / "digits.png") as sheet:
        pixels = np.asarray(sheet)
    # Ten rows and columns of images of 48 pixels, each enlarged from 8x8.
    assert min(pixels.shape[:2]) > 480
    assert pixels.std() > 40
