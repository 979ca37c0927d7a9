"""What a newcomer meets in the first hour: names in place of numbers, plain sentences, nothing silent."""

from pathlib import Path

import pytest
from test_cli import done, jlt

from jlt.images.registry import open_source

SMALL = ["--steps", 4, "--batch-size", 8, "--log-every", 2, "--checkpoint-every", 2]


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> Path:
    """A folder with images of two named classes, their latents and a run of a few steps; tests must not change it."""
    folder = tmp_path_factory.mktemp("named")
    source = open_source("digits")
    for index in range(40):
        image, label = source[index]
        path = folder / "images" / ("cat" if label < 5 else "dog") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    encoding = ["--autoencoder", "tiny", "--resolution", 32, "--no-flips", "--dtype", "float32"]
    done("encode", "--images", folder / "images", *encoding, "--out", folder / "latents")
    done("train", "digits", "--latents", folder / "latents", "--out", folder / "run", *SMALL)
    return folder


# ---- sentences that name the cause and the next step ----


def test_a_folder_of_images_is_no_latent_store(named, tmp_path):
    images = named / "images"
    for arguments in (["train", "digits"], ["plan", "digits"], ["analyze"]):
        out = [] if arguments[0] == "plan" else ["--out", tmp_path / "out"]
        outcome = jlt(*arguments, "--latents", images, *out)
        assert (
            outcome.err == f"jlt: {images} is not a latent store: make a latent store of your images with jlt encode.\n"
        )


@pytest.mark.parametrize("option", ["--checkpoint", "--reference"])
def test_a_path_is_not_spell_checked_against_folders(named, tmp_path, monkeypatch, option):
    (tmp_path / "somewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = {"--checkpoint": named / "run", "--reference": "digits", option: "nowhere"}
    outcome = jlt("evaluate", *[part for pair in arguments.items() for part in pair], "--num", 20, "--steps", 1)
    assert "nowhere does not exist" in outcome.err
    assert "somewhere" not in outcome.err


# ---- names of classes ----


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--num", 4, "--steps", 1],
        ["sweep", "--num", 20, "--coarse-num", 20, "--steps", 1, "--cfg-scale", 1, "--refine", 0],
        ["price", "--num", 20, "--steps", 5, "--solver", "euler"],
    ],
    ids=lambda command: command[0],
)
def test_labels_are_named_wherever_numbers_are_accepted(named, tmp_path, monkeypatch, command):
    monkeypatch.setattr("jlt.experiments.price.PUBLISHED", ("heun", 2, 1.0))
    measured = [] if command[0] == "sample" else ["--reference", named / "images", "--features", "digits"]
    drawn = done(*command, *measured, "--checkpoint", named / "run", "--labels", "dog,cat", "--out", tmp_path / "names")
    if command[0] == "sample":
        assert drawn["protocol"]["labels"] == "1,0"
    else:
        # The settings of the measured points are numbers.
        assert "--labels 1,0" in drawn["reproduce"]
    outcome = jlt(*command, *measured, "--checkpoint", named / "run", "--labels", "cow", "--out", tmp_path / "other")
    assert outcome.code == 2
    assert "There is no class named 'cow'" in outcome.err
