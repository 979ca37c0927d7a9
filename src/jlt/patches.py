"""Latents as tokens: non-overlapping patches, row by row; a patch's values run over channel, row, column."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from jlt.errors import JLTError


def require_divisor(patch_size: int, height: int, width: int) -> None:
    """Raise JLTError unless a grid of positions can be cut into patches of a size."""
    if patch_size < 1 or height % patch_size or width % patch_size:
        patch, grid = f"{patch_size} x {patch_size}", f"{height} x {width}"
        raise JLTError(f"Latents of {grid} positions cannot be cut into patches of {patch}: choose a divisor.")


def patches(latents: Float[Tensor, "n c h w"], patch_size: int) -> Float[Tensor, "n rows columns c p p"]:
    """View latents as non-overlapping patches; JLTError where the grid is no multiple of the patch size."""
    n, c, h, w = latents.shape
    p = patch_size
    require_divisor(p, h, w)
    return latents.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)


def patchify(latents: Float[Tensor, "n c h w"], patch_size: int) -> Float[Tensor, "n tokens d"]:
    """Cut each latent into (h/p) (w/p) tokens of d = c p p values; JLTError as `patches`."""
    return patches(latents, patch_size).flatten(3).flatten(1, 2)


def patch_tokens(latents: Float[Tensor, "n c h w"], patch_size: int) -> Float[Tensor, "tokens d"]:
    """Return the tokens of all latents as one matrix; JLTError as `patches`."""
    return patchify(latents, patch_size).flatten(0, 1)


def unpatchify(
    tokens: Float[Tensor, "*tokens d"], patch_size: int, height: int, width: int
) -> Float[Tensor, "n c height width"]:
    """Invert `patchify` or `patch_tokens` for latents of a height and width."""
    p = patch_size
    grid = tokens.reshape(-1, height // p, width // p, tokens.shape[-1] // p**2, p, p)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(grid), -1, height, width)
