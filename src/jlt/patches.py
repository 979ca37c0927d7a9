"""Latents as tokens: non-overlapping patches, channel first, as the network embeds them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from jlt.errors import JLTError


def patches(latents: Float[Tensor, "n c h w"], patch_size: int) -> Float[Tensor, "n rows columns c p p"]:
    """View latents as non-overlapping patches; JLTError where the grid is no multiple of the patch size."""
    n, c, h, w = latents.shape
    p = patch_size
    require_divisor(p, h, w)
    return latents.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)


def require_divisor(patch_size: int, height: int, width: int) -> None:
    """Raise JLTError unless a grid of positions can be cut into patches of a size."""
    if patch_size < 1 or height % patch_size or width % patch_size:
        patch, grid = f"{patch_size} x {patch_size}", f"{height} x {width}"
        raise JLTError(f"Latents of {grid} positions cannot be cut into patches of {patch}: choose a divisor.")


def patch_tokens(latents: Float[Tensor, "n c h w"], patch_size: int) -> Float[Tensor, "tokens d"]:
    """Cut latents into n (h/p) (w/p) tokens of d = c p p values, channel first; JLTError as `patches`."""
    return patches(latents, patch_size).reshape(-1, latents.shape[1] * patch_size**2)


def join_tokens(
    tokens: Float[Tensor, "tokens d"], patch_size: int, shape: tuple[int, int, int]
) -> Float[Tensor, "n c h w"]:
    """Put tokens together to latents of the shape (c, h, w): the reverse of `patch_tokens`."""
    c, h, w = shape
    p = patch_size
    return tokens.reshape(-1, h // p, w // p, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(-1, c, h, w)
