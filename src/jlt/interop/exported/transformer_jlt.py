"""The transformer as a model of diffusers."""

from __future__ import annotations

from typing import ClassVar

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float, Int
from torch import Tensor

from jlt.config import NetworkConfig
from jlt.networks.transformer import Transformer


class JLTTransformer(ModelMixin, ConfigMixin):
    """`network` is the transformer; its settings are those of `NetworkConfig`."""

    _no_split_modules: ClassVar[list[str]] = ["Block"]

    @register_to_config
    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        num_classes: int,
        patch_size: int = 1,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        bottleneck_size: int = 0,
        fixed_positions: bool = False,
        context_tokens: int = 0,
        context_start: int = 0,
        learned_positions: bool = False,
    ) -> None:
        super().__init__()
        self.network = Transformer(
            NetworkConfig(
                channels=channels,
                height=height,
                width=width,
                num_classes=num_classes,
                patch_size=patch_size,
                hidden_size=hidden_size,
                depth=depth,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                bottleneck_size=bottleneck_size,
                fixed_positions=fixed_positions,
                context_tokens=context_tokens,
                context_start=context_start,
                learned_positions=learned_positions,
            )
        )

    def forward(
        self, z: Float[Tensor, "b c hh ww"], t: Float[Tensor, "b"], labels: Int[Tensor, "b"]
    ) -> Float[Tensor, "b c hh ww"]:
        """Return the output for noisy latents z at times t in [0, 1], in the precision of the weights."""
        return self.network(z.to(self.dtype), t, labels)
