"""Drawings as HTML: PNG images inside the page, so that nothing is fetched and pixels keep their edges."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from jlt.demo.studio import Drawing, Studio, System
from jlt.report.palette import INK, LINE, MUTED, NAMES, PANEL, PAPER, PREDICTION, SHORT_NAMES

PIXEL_ART = 128
"""Images of a smaller side are enlarged without smoothing."""
STRIP = 8
"""Images of a strip of z."""


def heading(studio: Studio) -> str:
    """Return the title of the page."""
    names = [f"{html.escape(system.name)}: {NAMES[system.prediction]}" for system in studio.systems]
    shape, first = studio.systems[0].model.shape, studio.systems[0].model
    facts = [
        f"{len(studio.classes):,} classes",
        f"{first.resolution} x {first.resolution} pixels",
        f"latents {shape.channels} x {shape.height} x {shape.width}",
        f"step {' and '.join(sorted({f'{system.model.checkpoint.step:,}' for system in studio.systems}))}",
        "drawn on this machine",
    ]
    kinds = "predictions" if len({system.prediction for system in studio.systems}) > 1 else "systems"
    title = f"Two {kinds}, one noise" if len(names) > 1 else "From noise to image"
    return f'<h1>{title}</h1><p class="lead">{" · ".join(names)}</p><p class="facts">{" · ".join(facts)}</p>'


def pictures(studio: Studio, drawings: Sequence[Drawing], t: float) -> str:
    """Return a card for each system: the clean predictions at time t, and z below them."""
    cards = []
    for system, drawing in zip(studio.systems, drawings, strict=True):
        config = drawing.sampler.config
        time, clean, z = drawing.at(t)
        every = config.labels == "equal"
        columns = config.num // len(studio.classes) if every else max(2, min(config.num, 4))
        order = _by_class(config.num, len(studio.classes)) if every else list(range(config.num))
        captions = [drawing.captions[index] for index in order]
        same = len(set(captions)) == 1
        last = time == 1
        what = "Images" if last else f"Clean prediction x̂ at t = {time:.2f}"
        about = f"{system.name}, {what}"
        grid = _grid(clean[order], columns, captions, about, [] if same or every else captions, "rows" if every else "")
        noisy = "Noisy latent z: at t = 1 it is the image" if last else f"Noisy latent z at t = {time:.2f}, decoded"
        strip = _grid(z[order[:STRIP]], STRIP, captions[:STRIP], f"{system.name}, z at t = {time:.2f}", kind="z")
        per_image = drawing.seconds / config.num
        speed = f"{per_image * 1000:.0f} ms" if per_image < 1 else f"{per_image:.1f} s"
        subject = f", class {html.escape(captions[0])}" if same else ""
        cards.append(
            f'<section class="card"><header>{_mark(system)}<span class="speed">{speed} per image</span></header>'
            f'<p class="what">{what}{subject}</p>{grid}<p class="what">{noisy}</p>{strip}</section>'
        )
    return f'<div class="cards cards-{len(cards)}">{"".join(cards)}</div>'


def interpolations(
    studio: Studio, rows: Sequence[UInt8[Tensor, "n hh ww 3"]], seeds: tuple[int, int], name: str
) -> str:
    """Return a row for each system from the noise of one seed to that of another."""
    cards = []
    for system, row in zip(studio.systems, rows, strict=True):
        texts = [f"seed {seeds[0]}", *[""] * (len(row) - 2), f"seed {seeds[1]}"]
        about = f"{system.name}, from seed {seeds[0]} to seed {seeds[1]}"
        grid = _grid(row, len(row), [f"{name}, {index + 1} of {len(row)}" for index in range(len(row))], about, texts)
        cards.append(f'<section class="card"><header>{_mark(system)}</header>{grid}</section>')
    return f'<div class="cards">{"".join(cards)}</div>'


def note(text: str, problem: bool = False) -> str:
    """Return the line of the page that says what happened."""
    role = "alert" if problem else "status"
    return f'<p class="note {"problem" if problem else ""}" role="{role}">{html.escape(text)}</p>'


def waiting(text: str, seconds: float) -> str:
    """Return the note of a drawing in progress, with a bar that is full after about these seconds."""
    return f'<p class="note waiting" role="status" style="--seconds:{seconds:.1f}s">{html.escape(text)}</p>'


def _mark(system: System) -> str:
    target = f'<span class="target">{SHORT_NAMES[system.prediction]}</span>'
    return f'<span class="dot {system.prediction}"></span><strong>{html.escape(system.name)}</strong>{target}'


def _by_class(num: int, classes: int) -> list[int]:
    """Return the order that puts the images of each class next to one another: image i is of class i mod classes."""
    return [index for label in range(classes) for index in range(label, num, classes)]


def _grid(
    images: UInt8[Tensor, "n hh ww 3"],
    columns: int,
    names: Sequence[str],
    about: str,
    texts: Sequence[str] = (),
    kind: str = "",
) -> str:
    """Return images in columns, each with its name for a screen reader, and with a text below where there are any."""
    pixelated = "pixelated" if images.shape[1] < PIXEL_ART else ""
    figures = []
    for index, (image, name) in enumerate(zip(images, names, strict=True)):
        label = f'<span class="row">{html.escape(name)}</span>' if kind == "rows" and index % columns == 0 else ""
        text = f"<figcaption>{html.escape(texts[index]) or '&nbsp;'}</figcaption>" if texts else ""
        alt = html.escape(f"{about}: {name}, image {index + 1}", quote=True)
        figures.append(f'{label}<figure><img src="{_data(image)}" alt="{alt}">{text}</figure>')
    return f'<div class="grid {pixelated} {kind}" style="--columns:{columns}">{"".join(figures)}</div>'


def _data(image: UInt8[Tensor, "hh ww 3"]) -> str:
    file = io.BytesIO()
    Image.fromarray(image.numpy()).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def colours() -> str:
    """Return the colours of the reports as CSS variables, in light and dark mode."""
    roles = {**PREDICTION, "ink": INK, "muted": MUTED, "line": LINE, "paper": PAPER, "panel": PANEL}
    light = "".join(f"--{name}:{colour.light};" for name, colour in roles.items())
    dark = "".join(f"--{name}:{colour.dark};" for name, colour in roles.items())
    return f":root{{{light}}}.dark{{{dark}}}"
