"""Train the bundled digit classifier, whose features evaluate samples of the digits.

    python scripts/train_digit_classifier.py

writes `src/jlt/assets/digit_classifier.safetensors` in about a minute on one core. The training digits are augmented
by small rotations, scalings, shears and shifts. The accuracy in the file's metadata is that on held-out digits.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from jlt.evaluation.extractors import WEIGHTS_FILE, DigitClassifier, DigitNetwork, LabelledImages, digit_split
from jlt.evaluation.metrics import label_agreement
from jlt.runtime.progress import inform, track
from jlt.storage.weights import save_weights

BATCH_SIZE = 64
LEARNING_RATE = 4e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS_FILE, help="file to write")
    parser.add_argument("--steps", type=int, default=2000, help=f"updates, {BATCH_SIZE} images each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="one is as fast as two for networks this small")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    training, held_out = digit_split(DigitNetwork.input_size)
    network = DigitNetwork()
    start = time.monotonic()
    train(network, training, options.steps, options.seed)
    metadata = {
        "made_by": "scripts/train_digit_classifier.py",
        "seed": str(options.seed),
        "steps": str(options.steps),
        "training_images": f"{len(training.images)} of scikit-learn's digits at 32x32",
        "held_out_images": str(len(held_out.images)),
        "held_out_accuracy": "nan",
        "torch": torch.__version__,
    }
    save_weights(options.out, network.state_dict(), metadata)
    # Measured with the written, rounded weights, and then added to their metadata.
    logits = DigitClassifier.load(options.out)(held_out.images).logits
    assert logits is not None
    accuracy = label_agreement(logits, held_out.labels)
    save_weights(options.out, network.state_dict(), {**metadata, "held_out_accuracy": f"{accuracy:.4f}"})
    inform(f"{options.out}: {options.out.stat().st_size} bytes, trained in {time.monotonic() - start:.0f} s")
    inform(f"  held-out accuracy {accuracy:.4f} on {len(held_out.images)} digits")


def train(network: DigitNetwork, digits: LabelledImages, steps: int, seed: int) -> None:
    """Fit the classifier to augmented digits by AdamW under a one-cycle learning rate."""
    pixels = digits.images.permute(0, 3, 1, 2).float() / 127.5 - 1
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in track(range(steps), "Training the digit classifier"):
        chosen = torch.randint(len(pixels), (BATCH_SIZE,), generator=generator)
        _, logits = network(augment(pixels[chosen], generator))
        loss = functional.cross_entropy(logits, digits.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def augment(images: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """Rotate by up to 12 degrees, scale and shear by up to a tenth, shift by up to 2 pixels of 32."""
    count = len(images)

    def spread(limit: float) -> Float[Tensor, " b"]:
        return (2 * torch.rand(count, generator=generator) - 1) * limit

    angle, scale, shear = spread(0.21), 1 + spread(0.1), spread(0.1)
    across = torch.stack([scale * angle.cos(), shear - angle.sin(), spread(0.125)], dim=1)
    down = torch.stack([angle.sin(), scale * angle.cos(), spread(0.125)], dim=1)
    grid = functional.affine_grid(torch.stack([across, down], dim=1), list(images.shape), align_corners=False)
    # Outside the image is background, which is -1, while grid_sample fills with 0.
    return functional.grid_sample(images + 1, grid, align_corners=False) - 1


if __name__ == "__main__":
    main()
