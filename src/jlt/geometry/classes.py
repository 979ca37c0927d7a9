"""The mean latent of each class, whose scatter is taken out for the covariance within classes."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from jlt.patches import patch_tokens


class ClassMeans:
    """Sums of the latents of every class, in float64: K C H W numbers, whatever the size of the store."""

    def __init__(
        self, classes: int, channels: int, height: int, width: int, device: torch.device | str = "cpu"
    ) -> None:
        shape = (classes, channels, height, width)
        self._sum: Float64[Tensor, "k c h w"] = torch.zeros(shape, dtype=torch.float64, device=device)
        self._count: Float64[Tensor, " k"] = torch.zeros(classes, dtype=torch.float64, device=device)

    def update(self, latents: Float[Tensor, "n c h w"], labels: Int64[Tensor, " n"]) -> None:
        """Add a batch of latents with their classes."""
        device = self._sum.device
        labels = labels.to(device)
        self._sum.index_add_(0, labels, latents.to(device).double())
        self._count += torch.bincount(labels, minlength=len(self._count))

    def merge(self, other: ClassMeans) -> None:
        """Add the sums of another accumulator of the same classes and shape."""
        self._sum += other._sum.to(self._sum.device)
        self._count += other._count.to(self._sum.device)

    @property
    def means(self) -> Float64[Tensor, "k c h w"]:
        """The mean latents of the classes that have any."""
        seen = self._count > 0
        return self._sum[seen] / self._count[seen, None, None, None]

    @property
    def counts(self) -> Float64[Tensor, " k"]:
        """The number of latents of each of these classes."""
        return self._count[self._count > 0]

    @property
    def freedom(self) -> int:
        """Latents less classes: the degrees of freedom within classes."""
        return int(self._count.sum()) - len(self.counts)

    @property
    def enough(self) -> bool:
        """Whether there are several classes, with enough latents for a covariance within them."""
        return 1 < len(self.counts) <= self.freedom

    def between(self, patch_size: int, centre: Float64[Tensor, " d"]) -> Float64[Tensor, "d d"]:
        """Return the scatter of the tokens of class means about a mean token, each weighted by its number of latents.

        The mean of a token is that of its class at its position.
        """
        total = torch.zeros(len(centre), len(centre), dtype=torch.float64, device=centre.device)
        for part, weight in zip(self.means.split(64), self.counts.split(64), strict=True):
            tokens = (patch_tokens(part, patch_size) - centre).view(len(part), -1, len(centre))
            tokens = (tokens * weight.sqrt()[:, None, None]).flatten(0, 1)
            total.addmm_(tokens.T, tokens)
        return total
