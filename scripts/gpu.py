"""Measure everything that needs a GPU: exactness in bfloat16, speed, memory, and x against v on photographs at 256 px.

    python scripts/gpu.py --out gpu --real ../shared/real

writes `gpu/gpu.json` and `gpu/gpu.md`. It is sized for 25 minutes on one H100 or H200, which is not measured yet. Run
the same command again to resume: parts in `gpu.json` are kept. `--only` selects parts, and `--small` tries all of them
in minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jlt.autoencoders.load import load_autoencoder
from jlt.config import FLUX2_IMAGENET256, LatentShape, Prediction, SampleConfig
from jlt.errors import JLTError
from jlt.geometry.covariance import TokenCovariance
from jlt.networks.sizes import sized_network
from jlt.networks.transformer import build_network
from jlt.runtime.environment import default_device, machine, versions
from jlt.runtime.random_numbers import normal_per_sample
from jlt.sampling.guidance import Denoiser
from jlt.sampling.sampler import LatentSampler
from jlt.storage.files import read_json, write_json


@dataclass(frozen=True)
class Scale:
    """Sizes of the measurement: for a GPU, or small ones that show that every part runs."""

    size: str
    latents: LatentShape
    presets: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    sample_batch: int
    resolution: int
    images: int
    steps: int
    samples: int
    precision: str
    split: str


WHOLE = Scale(
    "B", FLUX2_IMAGENET256, ("JLT-B/1", "JLT-L/1"), (64, 128, 256), 64, 256, 2048, 4000, 2000, "bfloat16", "train"
)
SMALL = Scale("XS", LatentShape(128, 4, 4, 10), ("JLT-XS/1",), (8,), 4, 64, 64, 20, 20, "float32", "validation")


def jlt(*arguments: object) -> dict[str, Any]:
    """Run a command of jlt and return its JSON; CalledProcessError if it fails."""
    command = [sys.executable, "-m", "jlt", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean squared difference over the root mean square of the expected values."""
    expected = expected.double()
    return ((found.cpu().double() - expected).norm() / expected.norm()).item()


def exactness(scale: Scale, real: Path) -> dict[str, Any]:
    """Compare the device with the CPU in float32: outputs, gradients, samples, covariances and the autoencoder."""
    device, shape = default_device(), scale.latents
    found: dict[str, Any] = {}
    latents = normal_per_sample(range(4), (shape.channels, shape.height, shape.width))
    labels, t = torch.arange(4) % shape.num_classes, torch.tensor([0.1, 0.4, 0.7, 0.95])
    network = build_network(sized_network(scale.size, 1, shape), seed=0)
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # A new network outputs zeros.
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=stream))

    def run(place: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        network.to(place).zero_grad()
        with torch.autocast(place, dtype, enabled=dtype != torch.float32):
            output = network(latents.to(place), t.to(place), labels.to(place))
        output.float().square().mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        return output.detach().float().cpu(), gradient.cpu()

    expected = run("cpu", torch.float32)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        output, gradient = run(device, dtype)
        found |= {f"output, {name}": apart(output, expected[0]), f"gradient, {name}": apart(gradient, expected[1])}

    def samples(place: str, prediction: Prediction, precision: Any) -> torch.Tensor:
        config = SampleConfig(num=4, steps=10, batch_size=4, cfg_scale=2.0, precision=precision)
        denoiser = Denoiser(network.to(place).eval(), prediction, shape.num_classes)
        return next(LatentSampler(denoiser, shape, config, place).batches()).latents.cpu()

    predictions: tuple[Prediction, ...] = ("x", "v")
    for prediction in predictions:
        exact = samples("cpu", prediction, "float32")
        for precision in ("float32", "bfloat16"):
            found[f"samples of {prediction}, {precision}"] = apart(samples(device, prediction, precision), exact)

    covariances = [TokenCovariance(shape.channels, 1, place) for place in ("cpu", device)]
    for covariance in covariances:
        covariance.update(latents.to(covariance.device))
    found["token covariance"] = apart(covariances[1].scatter, covariances[0].scatter)
    images = normal_per_sample(range(2), (3, scale.resolution, scale.resolution)).clamp(-1, 1)
    plain = load_autoencoder("taef2", str(real / "taef2"))
    encoded = plain.encode(images)
    decoded = plain.decode(encoded)
    moved = plain.to(device)
    found |= {
        "taef2, encoded": apart(moved.encode(images), encoded),
        "taef2, decoded": apart(moved.decode(encoded), decoded),
    }
    return found


def train_speed(scale: Scale, real: Path) -> dict[str, Any]:  # noqa: ARG001
    """Measure updates at several batch sizes, the loop around them, a profile, and compiling against not."""
    common = ("--precision", scale.precision, "--steps", 10, "--loop-steps", 40, "--profile", "--compare")
    return jlt("benchmark", "train", "--preset", *scale.presets, "--batch-size", *scale.batch_sizes, *common)


def sample_speed(scale: Scale, real: Path) -> dict[str, Any]:
    """Measure sampling with guidance, decoded by TAEF2."""
    return jlt(
        *("benchmark", "sample", "--preset", scale.presets[0], "--batch-size", scale.sample_batch),
        *("--precision", scale.precision, "--decoder", f"taef2:{real / 'taef2'}"),
    )


def encode_speed(scale: Scale, real: Path) -> dict[str, Any]:
    """Measure the encoding of photographs by TAEF2."""
    return jlt(
        *("benchmark", "encode", "--num", scale.images, "--images", real / "imagenette", "--split", scale.split),
        *("--autoencoder", "taef2", "--autoencoder-path", real / "taef2", "--resolution", scale.resolution),
        *("--precision", scale.precision),
    )


def geometry_speed(scale: Scale, real: Path) -> dict[str, Any]:  # noqa: ARG001
    """Measure the covariances of latents."""
    return jlt("benchmark", "geometry", "--count", scale.images)


def photographs(scale: Scale, real: Path, out: Path) -> dict[str, Any]:
    """Encode Imagenette, and train and measure x and v."""
    latents = out / "latents"
    jlt(
        *("encode", "--images", real / "imagenette", "--split", scale.split, "--autoencoder", "taef2"),
        *("--autoencoder-path", real / "taef2", "--resolution", scale.resolution, "--out", latents),
    )
    recipe = f"imagenette{scale.resolution}"
    result = jlt(
        *("ablate", recipe, "--latents", latents, "--out", out / "ablation", "--prediction", "x", "v"),
        *("--features", "squeezenet", "--features-path", real / "squeezenet", "--evaluations", 2),
        *("--sample.num", scale.samples, "--sample.precision", scale.precision, "--steps", scale.steps),
    )
    for system in result["systems"]:
        evaluations = sorted((out / "ablation" / system["run"] / "evaluations").glob("*.json"))
        system["metrics"] = read_json(evaluations[-1])["metrics"]
    return result


def table(results: dict[str, Any]) -> str:
    """Return the main figures as a Markdown table."""
    rows = [["part", "figure", "value"], ["---", "---", "---"]]
    rows += [["exactness", name, f"{value:.2g}"] for name, value in results.get("exactness", {}).items()]
    for entry in results.get("train", {}).get("measured", []):
        value = "does not fit"
        if not entry["out_of_memory"]:
            speed, share = entry["img_per_second"], entry["mfu"]
            value = f"{speed:.4g} img/s, MFU {share:.1%}, {entry['peak_memory_gib']:.3g} GiB"
        rows.append(["train", f"{entry['preset']}, batch {entry['batch_size']}", value])
    for name, loop in results.get("train", {}).get("loop", {}).items():
        rows.append(["train", f"{name}, loop against update", loop.get("error") or f"{loop['ratio']:.1%}"])
    speeds = {"sample": "img_per_second_decoded", "encode": "img_per_second", "geometry": "latents_per_second"}
    for part, key in speeds.items():
        if part in results:
            rows.append([part, key.replace("_", " "), f"{results[part][key]:.4g}"])
    for system in results.get("photographs", {}).get("systems", []):
        distance, agreement = (system["metrics"][name] for name in ("frechet_distance", "label_agreement"))
        value = f"SqueezeNet distance {distance:.4g}, label agreement {agreement:.1%}"
        rows.append(["photographs", system["name"], value])
    rows += [["seconds", part, f"{seconds:.0f}"] for part, seconds in results["seconds"].items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main() -> None:
    """Run the parts that are missing, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--real", type=Path, default=Path("../shared/real"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    scale = SMALL if arguments.small else WHOLE
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "exactness": lambda: exactness(scale, arguments.real),
        "train": lambda: train_speed(scale, arguments.real),
        "sample": lambda: sample_speed(scale, arguments.real),
        "encode": lambda: encode_speed(scale, arguments.real),
        "geometry": lambda: geometry_speed(scale, arguments.real),
        "photographs": lambda: photographs(scale, arguments.real, arguments.out),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "gpu.json"
    results: dict[str, Any] = (
        read_json(file) if file.exists() else {"machine": machine(default_device()), "versions": versions()}
    )
    seconds = results.setdefault("seconds", {})
    failed = []
    for name in arguments.only or parts:
        if name in results:
            continue
        start = time.monotonic()
        # One part that fails must not cost the others their time on the GPU.
        try:
            results[name] = parts[name]()
        except (subprocess.CalledProcessError, RuntimeError, JLTError) as error:
            failed.append(f"{name}: {error}")
        seconds[name] = time.monotonic() - start
        write_json(file, results)
        (arguments.out / "gpu.md").write_text(table(results), encoding="utf-8")
    print(table(results))
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
