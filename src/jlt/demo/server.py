"""The page on a port of this machine, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import webbrowser
from importlib.resources import files
from pathlib import Path

from jlt.errors import JLTError
from jlt.runtime.progress import inform
from jlt.runtime.signals import stop_on_signal

FIRST_PORT, PORTS = 7860, 100
POLL_SECONDS = 0.05
LOCAL = "localhost,127.0.0.1,::1"


def serve(sources: list[Path], host: str, port: int | None, open_browser: bool, autoencoder_path: str | None) -> str:
    """Serve the demo of one or two checkpoints until SIGTERM or Ctrl-C, and return its address.

    Nothing is sent to another machine, and only this one can open the page unless `host` says otherwise. JLTError
    where Gradio is missing, where a port is in use, and as for `Studio.open`.
    """
    port = free_port(host, port)
    # Set before Gradio is imported, which reads it.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Gradio asks its own address whether it answers: not through a proxy.
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), LOCAL, host)))
    try:
        import gradio as gr
    except ImportError as reason:
        raise JLTError(
            f"The demo needs gradio, which cannot be imported ({reason}): pip install -e '.[demo]'."
        ) from None
    from jlt.demo.page import build_page
    from jlt.demo.pictures import colours
    from jlt.demo.studio import Studio
    from jlt.runtime.environment import default_device

    with stop_on_signal() as stop:
        studio = Studio.open(sources, default_device(), autoencoder_path)
        page = build_page(studio)
        # No font of Google's: their names would be requested from its servers.
        theme = gr.themes.Base(
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
            primary_hue=gr.themes.colors.blue,
            neutral_hue=gr.themes.colors.gray,
            radius_size=gr.themes.sizes.radius_md,
        )
        style = colours() + files("jlt.demo").joinpath("page.css").read_text(encoding="utf-8")
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
            theme=theme,
            css=style,
        )
        inform(f"Open {address} (Ctrl-C ends it)")
        if open_browser:
            webbrowser.open(address)
        while not stop:
            time.sleep(POLL_SECONDS)
        studio.stop(forever=True)
        # Without waiting for pages that are open, and without the tracebacks of what that cancels.
        page.server.force_exit = True
        logging.disable()
        with Path(os.devnull).open("w") as nothing, contextlib.redirect_stderr(nothing):
            page.close(verbose=False)
    return address


def free_port(host: str, port: int | None) -> int:
    """Return `port`, or the first free one from FIRST_PORT; JLTError if it is in use or the host is not this one."""
    for candidate in [port] if port is not None else range(FIRST_PORT, FIRST_PORT + PORTS):
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
        except socket.gaierror:
            raise JLTError(f"{host} is no address of this machine: leave out --host, or use 0.0.0.0.") from None
        except OSError as reason:
            if port is not None:
                raise JLTError(
                    f"Port {port} of {host} cannot be used ({reason.strerror}): choose another --port."
                ) from None
        else:
            return candidate
    raise JLTError(
        f"The ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1} are all in use: choose another one with --port."
    )
