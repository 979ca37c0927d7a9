"""JLT: train, sample, evaluate and explain latent diffusion transformers that predict x, eps or v.

import jlt
model = jlt.load("runs/jlt-b1")
images = model.sample(labels=["tench", 217], seed=0, cfg_scale=2.9, cfg_interval=(0.1, 1.0))
images[0].save("tench.png")
"""

# Nothing is imported here, not even `__future__`: with `python -m jlt`, modules of the current folder would come
# first (`__main__`).
# Type checkers take this name for true.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from jlt.api.images import Images, State, Trajectory
    from jlt.api.latents import LatentDataset, open_latents
    from jlt.api.measures import FrechetDistance, analyze
    from jlt.api.model import Model, load

__version__ = "0.1.0"

_MODULES = {
    "FrechetDistance": "jlt.api.measures",
    "Images": "jlt.api.images",
    "LatentDataset": "jlt.api.latents",
    "Model": "jlt.api.model",
    "State": "jlt.api.images",
    "Trajectory": "jlt.api.images",
    "analyze": "jlt.api.measures",
    "load": "jlt.api.model",
    "open_latents": "jlt.api.latents",
}
"""Where each name is defined: it is imported at its first use, since the import of torch takes seconds."""

__all__ = [
    "FrechetDistance",
    "Images",
    "LatentDataset",
    "Model",
    "State",
    "Trajectory",
    "__version__",
    "analyze",
    "load",
    "open_latents",
]

if not TYPE_CHECKING:
    # A type checker that saw this function would accept any name.
    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value


def __dir__() -> list[str]:
    return __all__
