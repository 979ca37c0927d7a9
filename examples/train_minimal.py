"""Train a transformer to predict clean digits, and generate new ones.

This is path, network, loss and solver, and nothing else. `python examples/train_minimal.py` writes
digits.png in less than a minute on an idle laptop's CPU. The equations are those of docs/notation.md.
`jlt train` does the same at scale, with checkpoints, averaged weights and several processes.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jlt.config import LossConfig, NetworkConfig, TimestepConfig
from jlt.images.contact_sheet import draw_sheet
from jlt.images.registry import open_source
from jlt.loss import denoising_loss
from jlt.networks.transformer import build_network
from jlt.path import interpolate
from jlt.prediction import velocity_from_output
from jlt.sampling.solvers import solve
from jlt.timesteps import times_from_uniform, uniform_grid


def main(steps: int = 1200, out: Path = Path("digits.png")) -> list[float]:
    """Train, draw ten images of each digit, and return the loss of every step."""
    torch.manual_seed(0)
    digits = open_source("digits")
    pixels, classes = zip(*(digits[index] for index in range(len(digits))), strict=True)
    images = torch.tensor(np.stack(pixels))[:, None] / 127.5 - 1  # 1,797 images of 1x8x8 values in [-1, 1]
    labels = torch.tensor(classes)

    # The network receives a noisy image z, its time t and its class, and predicts the clean image x.
    config = NetworkConfig(1, 8, 8, num_classes=10, patch_size=2, hidden_size=64, depth=3, num_heads=4)
    network = build_network(config, seed=0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        x, eps = images[batch], torch.randn(64, 1, 8, 8)
        t = times_from_uniform(torch.rand(64), TimestepConfig())  # eq. 6
        sample = interpolate(x, eps, t)  # eq. 1: z = t x + (1 - t) eps
        output = network(sample.z, t, labels[batch])
        loss = denoising_loss("x", output, sample, LossConfig(space="v")).mean()  # eq. 5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    new_labels = torch.arange(100) % 10

    def velocity(z: Tensor, t: float) -> Tensor:
        times = torch.full((100,), t)
        return velocity_from_output("x", network(z, times, new_labels), z, times)  # eq. 3: v = (x - z) / (1 - t)

    # The solver moves noise at t = 0 along dz/dt = v to images at t = 1 (eq. 8).
    with torch.inference_mode():
        generated = solve("heun", velocity, torch.randn(100, 1, 8, 8), uniform_grid(25).tolist())
    rgb = ((generated.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    draw_sheet(rgb.numpy(), columns=10, min_side=48).save(out)
    return losses


if __name__ == "__main__":
    main()
