"""The command that serves a page to click: demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jlt.cli.command import AutoencoderPath, Command, Positional, Result
from jlt.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Serve a page that draws images of one or two checkpoints.

    Two systems are shown side by side from the same noise. The page needs an extra: pip install -e '.[demo]'.
    Ctrl-C ends it.

    For example:
      jlt demo run-x run-v
    """

    checkpoints: Annotated[tuple[Path, ...], Positional, tyro.conf.arg(metavar="RUN [RUN]")]
    """One or two run folders (their newest checkpoints), checkpoint folders or exports."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines open the page."""
    port: int | None = None
    """Port. Default: the first free one from 7860."""
    open: bool = False
    """Open the page in a browser."""
    autoencoder_path: AutoencoderPath = None

    def run(self) -> Result:
        if not 1 <= len(self.checkpoints) <= 2:
            raise UsageError("Name one or two runs, such as: jlt demo run-x run-v")
        from jlt.demo.server import serve

        address = serve(list(self.checkpoints), self.host, self.port, self.open, self.autoencoder_path)
        return Result({"address": address}, "The demo has ended.")
