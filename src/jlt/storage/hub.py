"""The Hugging Face Hub: whether it is reachable, and single files of it."""

from __future__ import annotations

import socket
import textwrap
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from jlt.errors import JLTError

CONNECT_SECONDS = 10.0


def require_reachable(repository: str, files: Sequence[str], remedy: str) -> None:
    """Raise a JLTError at once if the Hub is not reachable; its library would retry for a minute first.

    There is no check if one of the files is in the Hub's cache; `remedy` ends the message with what to do.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    cached = any(isinstance(try_to_load_from_cache(repository, file), str) for file in files)
    if cached or constants.HF_HUB_OFFLINE or getproxies():
        return
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname or "", hub.port or 443), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise JLTError(
            f"{repository} is not a local folder, and the Hub at {hub.hostname} cannot be reached ({error}): {remedy}"
        ) from error


def hub_file(repository: str, name: str, remedy: str) -> Path:
    """Return the local path of a file of a Hub repository, downloaded if the cache does not have it.

    JLTError if it cannot be had; `remedy` ends the message with what to do.
    """
    from huggingface_hub import hf_hub_download

    require_reachable(repository, [name], remedy)
    try:
        return Path(hf_hub_download(repository, name))
    except (OSError, ValueError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise JLTError(f"{repository} on the Hub has no {name} that can be downloaded ({reason}): {remedy}") from error
