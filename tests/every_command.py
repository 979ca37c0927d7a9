"""Every command that writes, on inputs so small that each takes a second."""

from pathlib import Path

from PIL import Image
from safetensors.torch import save_file
from training_helpers import TINY, run_on_few_digits

from jlt.cli.main import main
from jlt.evaluation.squeezenet import SqueezeNet

FEW = ["--num", "10", "--batch-size", "5", "--steps", "1"]
SAMPLE = ["sample", "--checkpoint", "run", "--out", "out", *FEW]
MEASURED = ["--checkpoint", "run", "--reference", "reference.npz", "--num", "10", "--batch-size", "5"]
ONCE = ["--epochs", "0", "--batch-size", "8", *TINY]
WATCHED = ["--sample-every", "2", "--evaluate-every", "3", "--evaluation.sample.num", "10"]
WATCHED += ["--evaluation.sample.steps", "1", "--evaluation.reference", "reference.npz"]
SAVING = ["--checkpoint-every", "1", "--keep-last", "2", "--power-ema", "0.1", "--snapshot-every", "1"]
ABLATED = ["--prediction", "x", "--anisotropy", "0", "--steps", "2", "--evaluations", "1", "--workers", "1"]
ABLATED += ["--reference", "reference.npz", "--sample.num", "10", "--sample.steps", "1"]
FEATURES = ["--features", "squeezenet", "--features-path", "weights.safetensors"]
SHARDS = ["--shard-size", "8", "--batch-size", "4", "--workers", "0", "--preview"]
COMMANDS = {
    "train": ["train", "digits", "--latents", "latents", "--out", "out", "--steps", "3", *ONCE, *SAVING, *WATCHED],
    "sample": SAMPLE,
    "sample npz": [*SAMPLE, "--format", "npz"],
    "sample grid": [*SAMPLE, "--format", "grid"],
    "sample strip": [*SAMPLE, "--steps-strip"],
    "evaluate": ["evaluate", *MEASURED, "--steps", "1"],
    "analyze": ["analyze", "--latents", "latents", "--out", "out", "--checkpoint", "run", "--num", "8"],
    "sweep": ["sweep", *MEASURED, "--steps", "1", "--cfg-scale", "1", "2", "--coarse-num", "10", "--refine", "0"],
    "price": ["price", *MEASURED, "--solver", "euler", "--steps", "2"],
    "ablate": ["ablate", "digits", "--latents", "latents", "--out", "out", *ONCE, *ABLATED],
    "reference": ["reference", "--images", "images", "--resolution", "32", "--out", "out.npz", *FEATURES],
    "encode": ["encode", "--images", "images", "--autoencoder", "pixels", "--resolution", "8", "--out", "out", *SHARDS],
    "import": ["import", "exported", "--out", "out"],
    "export": ["export", "run", "--out", "out"],
    "export file": ["export", "run", "--out", "out.safetensors", "--format", "safetensors"],
    "report": ["report", "run"],
    "plan": ["plan", "digits"],
}
"""Arguments by name, for a folder of `make_inputs` as the current one."""


def make_inputs(folder: Path) -> Path:
    """Fill a folder with `latents`, `run`, `reference.npz`, `images` and `exported`, and return it."""
    run_on_few_digits(folder)
    for number in range(16):
        place = folder / "images" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((8, 8), 10 * number).convert("RGB").save(place)
    save_file(SqueezeNet().state_dict(), folder / "weights.safetensors")
    assert main(["export", str(folder / "run"), "--out", str(folder / "exported")]) == 0
    return folder
