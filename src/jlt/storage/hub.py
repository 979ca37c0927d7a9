"""The Hugging Face Hub: whether it is reachable."""

from __future__ import annotations

import socket
from collections.abc import Sequence
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
