"""Shapes and types of every annotated function in the package are checked while the tests run."""

import os

from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
install_import_hook("jlt", "typechecker.checked")

import torch  # noqa: E402

# Networks this small are several times slower on two threads, the more so beside other work.
torch.set_num_threads(1)
