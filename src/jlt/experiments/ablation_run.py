"""One run of an ablation, as it is sent to a worker process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jlt.config import LossSpace, SampleConfig, TrainConfig


@dataclass(frozen=True)
class AblationRun:
    """One run of an ablation: what is trained, where, and how it is measured. Sent to worker processes."""

    config: TrainConfig
    run: Path
    latents: Path
    reference: Path
    extractor: str
    sample: SampleConfig
    device: str
    features_path: str = ""
    anisotropy: float | None = None
    width: int | None = None
    """The point on either axis, where it is one."""

    @property
    def variant(self) -> str:
        """Words for the point on the axes that the network's name does not tell; empty where there are none."""
        parts = {"anisotropy": self.anisotropy, "width": self.width}
        return ", ".join(f"{axis} {value:g}" for axis, value in parts.items() if value is not None)

    @property
    def setting(self) -> tuple[str, int, LossSpace]:
        """Variant, patch size and loss space: systems that share them share what is expected of their predictions."""
        return self.variant, self.config.network.patch_size, self.config.loss.space

    @property
    def evaluated_steps(self) -> list[int]:
        """Steps at which the run is measured: its checkpoints."""
        return [
            *range(self.config.checkpoint_every, self.config.steps, self.config.checkpoint_every),
            self.config.steps,
        ]
