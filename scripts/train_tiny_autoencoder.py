"""Train the bundled `tiny` autoencoder: FLUX.2's class at a small size, on scikit-learn's digits at 32x32.

    python scripts/train_tiny_autoencoder.py

writes `src/jlt/assets/tiny/` in about five minutes on one core. The loss is the squared error of the reconstruction
with a little noise on the normalised latents. The noise makes the decoder robust to the small errors of a diffusion
model, and it fixes the scale of the latents, which is usually the task of a KL term. The latents are not whitened.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from jlt.autoencoders.contract import psnr
from jlt.autoencoders.load import load_autoencoder
from jlt.autoencoders.pretrained import WEIGHTS_FILE
from jlt.evaluation.extractors import digit_split
from jlt.runtime.progress import inform, track
from jlt.storage.weights import ASSETS, save_weights

BATCH_SIZE = 16
LEARNING_RATE = 8e-3
LATENT_NOISE = 0.1
PATCH_SIZE = 2

# 32x32 pixels -> 8x8 positions of 4 channels -> a 4x4 grid of 16. High resolutions take most of the time; with few
# channels and no residual blocks there, a core decodes well over a thousand images a second.
CONFIGURATION = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (32, 32, 32),
    "decoder_block_out_channels": (16, 16, 32),
    "layers_per_block": 0,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 32,
    "mid_block_add_attention": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "tiny", help="folder to write")
    parser.add_argument("--steps", type=int, default=5000, help=f"updates, {BATCH_SIZE} images each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="one is as fast as two for networks this small")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    training, held_out = digit_split(32)
    vae = AutoencoderKLFlux2(**CONFIGURATION).to(memory_format=torch.channels_last)
    start = time.monotonic()
    train(vae, to_float(training.images), options.steps, options.seed)
    round_to_float16(vae)
    estimate_normalisation(vae, to_float(training.images))

    metadata = {
        "made_by": "scripts/train_tiny_autoencoder.py",
        "seed": str(options.seed),
        "steps": str(options.steps),
        "training_images": f"{len(training.images)} of scikit-learn's digits at 32x32",
        "held_out_images": str(len(held_out.images)),
        "torch": torch.__version__,
    }
    vae.save_config(options.out)
    save_weights(options.out / WEIGHTS_FILE, vae.state_dict(), metadata)
    # Measured with the written weights, through the public loader, and then added to their metadata.
    measured = measure(options.out, to_float(held_out.images))
    save_weights(options.out / WEIGHTS_FILE, vae.state_dict(), {**metadata, **measured})
    size = (options.out / WEIGHTS_FILE).stat().st_size
    inform(f"{options.out}: {size} bytes, trained in {time.monotonic() - start:.0f} s")
    for name, value in measured.items():
        inform(f"  {name} {value} dB")


def train(vae: AutoencoderKLFlux2, images: Float[Tensor, "n 3 h w"], steps: int, seed: int) -> None:
    """Fit the autoencoder by AdamW under a one-cycle learning rate."""
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    for batch in track(augmented_batches(images, steps, generator), "Training the tiny autoencoder", steps):
        latents = functional.pixel_unshuffle(vae.encode(batch).latent_dist.mode(), PATCH_SIZE)
        variance, mean = torch.var_mean(latents, dim=(0, 2, 3), keepdim=True, correction=0)
        std = (variance + vae.bn.eps).sqrt()
        normalised = (latents - mean) / std
        normalised = normalised + LATENT_NOISE * torch.randn(normalised.shape, generator=generator)
        loss = functional.mse_loss(
            vae.decode(functional.pixel_shuffle(normalised * std + mean, PATCH_SIZE)).sample, batch
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def augmented_batches(
    images: Float[Tensor, "n 3 h w"], steps: int, generator: torch.Generator
) -> Iterator[Float[Tensor, "b 3 h w"]]:
    """Yield shuffled batches of the images in all eight orientations, shifted cyclically by up to 4 pixels."""
    quarters = [torch.rot90(images, turn, (2, 3)) for turn in range(4)]
    everything = torch.cat([*quarters, *(quarter.flip(3) for quarter in quarters)])
    per_epoch = len(everything) // BATCH_SIZE
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(everything), generator=generator)
        first = step % per_epoch * BATCH_SIZE
        down, right = torch.randint(-4, 5, (2,), generator=generator).tolist()
        batch = everything[order[first : first + BATCH_SIZE]].roll((down, right), (2, 3))
        yield batch.contiguous(memory_format=torch.channels_last)


def round_to_float16(vae: AutoencoderKLFlux2) -> None:
    """Round the weights as their file will, so that the following measurements use the stored values."""
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(parameter.half())


@torch.no_grad()
def estimate_normalisation(vae: AutoencoderKLFlux2, images: Float[Tensor, "n 3 h w"]) -> None:
    """Set the batch-norm statistics to the moments of the latents of all training images, without augmentation."""
    vae.eval()
    modes = [vae.encode(batch).latent_dist.mode() for batch in images.split(128)]
    latents = functional.pixel_unshuffle(torch.cat(modes), PATCH_SIZE).double()
    variance, mean = torch.var_mean(latents, dim=(0, 2, 3), correction=0)
    # The autoencoder adds eps to the variance; it is subtracted here, so that the latents' variance is 1.
    vae.bn.running_mean.copy_(mean)
    vae.bn.running_var.copy_(variance - vae.bn.eps)


def measure(folder: Path, images: Float[Tensor, "n 3 h w"]) -> dict[str, str]:
    """Return the PSNR on held-out images, clean and with Gaussian noise on the normalised latents, as metadata."""
    autoencoder = load_autoencoder("tiny", str(folder))
    latents = torch.cat([autoencoder.encode(batch) for batch in images.split(128)])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    measured = {}
    for name, std in (("held_out_psnr", 0.0), ("held_out_psnr_noise_0.05", 0.05), ("held_out_psnr_noise_0.1", 0.1)):
        noisy = latents + std * noise
        decoded = torch.cat([autoencoder.decode(batch) for batch in noisy.split(128)])
        measured[name] = f"{psnr(images, decoded):.2f}"
    return measured


def to_float(images: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n 3 h w"]:
    """Return images 0..255 in [-1, 1], channels first."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


if __name__ == "__main__":
    main()
