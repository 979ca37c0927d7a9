"""The examples run, and do what they show."""

import contextlib
import io
import json
import re
import runpy
from pathlib import Path

import numpy as np
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = json.loads((EXAMPLES / "digits.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


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


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """Its cells run in order in an empty folder, with figures instead of windows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    monkeypatch.chdir(tmp_path)
    pyplot.close("all")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        names = {}
        for number, cell in enumerate(CODE):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    try:
        figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
        assert len(figures) == 5
        for figure in figures:
            figure.canvas.draw()
            assert np.asarray(figure.canvas.buffer_rgba()).std() > 10
    finally:
        pyplot.close("all")
    # What its text claims.
    assert "expected to win: x" in printed.getvalue()
    x, v = (float(line.split(": ")[1]) for line in printed.getvalue().splitlines() if line.startswith("predicts"))
    assert x < 0.8 * v


def test_the_notebook_is_clean_and_uses_what_is_public():
    assert CODE
    for cell in CODE:
        assert not cell["outputs"]
        assert cell["execution_count"] is None
        source = "".join(cell["source"])
        assert not re.search(r"\b_\w|\._", source)
        assert max(map(len, source.splitlines())) <= 120
