"""The page of the demo: fields, pictures and what happens between them. Gradio is imported where the page is built."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jlt.config import SampleConfig
from jlt.demo.pictures import heading, interpolations, note, pictures, waiting
from jlt.demo.studio import LAST_SEED, MOST_IMAGES, QUICK_SECONDS, Studio, whole
from jlt.errors import JLTError
from jlt.runtime.progress import format_seconds
from jlt.sampling.labels import RULES
from jlt.sampling.save import COLUMNS
from jlt.sampling.solvers import SOLVERS

FIELDS = ("label", "num", "seed", "cfg_scale", "low", "high", "steps", "solver", "ema")
PATH = "Time t: from noise (0) to image (1)"
NOTICED = 0.5
"""Seconds of a drawing from which the page says that it is being made."""
MOST_WAITING = 32
"""Requests that wait for the one before them; a later one is refused."""
RANDOM_SEED = "() => Math.floor(Math.random() * 10000)"


def build_page(studio: Studio) -> Any:
    """Return the page, a `gradio.Blocks`; every drawing waits for the one before it."""
    import gradio as gr

    handlers = Handlers(studio)
    with gr.Blocks(title="JLT demo", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(heading(studio), elem_id="heading")
        drawn = gr.State(None)
        with gr.Row(elem_id="main"):
            with gr.Column(elem_id="settings", scale=0, min_width=290):
                fields = _settings(studio)
            with gr.Column(elem_id="results", min_width=320):
                with gr.Row(elem_id="bar"):
                    fields |= _bar(studio)
                status = gr.HTML(note("Drawing the first images ..."), elem_id="note")
                t = gr.Slider(0, 1, value=1, step=0.02, label=PATH, elem_id="t", buttons=[])
                _accept_anything(t)
                shown = gr.HTML(elem_id="pictures")
                with gr.Accordion("Between two seeds", open=False, elem_id="between"):
                    with gr.Row(elem_id="way"):
                        other = gr.Number(1, label="Second seed", elem_id="other", min_width=120)
                        walk = gr.Button("Interpolate", elem_id="walk", min_width=120)
                    way = gr.HTML(
                        note(f"{COLUMNS} images on the way from the noise of the seed to that of the second seed."),
                        elem_id="walked",
                    )
                with gr.Accordion("The command for these images", open=False, elem_id="commands"):
                    boxes = [_command_box(system.name) for system in studio.systems]
        values = [fields[name] for name in FIELDS]
        quiet: dict[str, Any] = {"concurrency_id": "draw", "concurrency_limit": 1, "show_progress": "hidden"}
        private: dict[str, Any] = {**quiet, "api_visibility": "private"}
        inputs, outputs = [*values, t, drawn], [shown, status, drawn, *boxes]
        # The button draws however long it takes; a change of a field, only what is quick.
        fields["draw"].click(handlers.draw, inputs, outputs, api_name="draw", **quiet)
        fields["new"].click(None, None, fields["seed"], js=RANDOM_SEED, api_visibility="private").then(
            handlers.draw_if_quick, inputs, outputs, **private
        )
        changes: list[Any] = [fields[name].input for name in ("label", "solver", "ema")]
        changes += [fields[name].release for name in ("num", "cfg_scale")]
        for name in ("seed", "low", "high", "steps"):
            changes += [fields[name].submit, fields[name].blur]
        gr.on([page.load, *changes], handlers.draw_if_quick, inputs, outputs, trigger_mode="always_last", **private)
        t.input(handlers.move, [drawn, t], shown, trigger_mode="always_last", **private)
        gr.on([walk.click, other.submit], handlers.walk, [*values, other], way, api_name="interpolate", **quiet)
        fields["stop"].click(studio.stop, queue=False, api_visibility="private", show_progress="hidden")
    return page.queue(max_size=MOST_WAITING)


def _bar(studio: Studio) -> dict[str, Any]:
    """Return the fields and buttons above the pictures. Fields accept anything: what is wrong is explained."""
    import gradio as gr

    value = studio.initial
    return {
        "label": gr.Dropdown(
            studio.class_choices,
            value=value["label"],
            label="Class",
            allow_custom_value=True,
            elem_id="label",
            min_width=150,
        ),
        "seed": gr.Number(value["seed"], label="Seed", elem_id="seed", min_width=100),
        "new": gr.Button("New seed", elem_id="new", min_width=90),
        "draw": gr.Button("Draw", variant="primary", elem_id="draw", min_width=80),
        "stop": gr.Button("Stop", elem_id="stop", min_width=70),
    }


def _settings(studio: Studio) -> dict[str, Any]:
    """Return the other fields, which most readers leave as they are."""
    import gradio as gr

    value = studio.initial
    fields = {
        "num": gr.Slider(1, MOST_IMAGES, value=value["num"], step=1, label="Images", elem_id="num", buttons=[]),
        "cfg_scale": gr.Slider(
            0, 10, value=value["cfg_scale"], step=0.1, label="Guidance scale", elem_id="scale", buttons=[]
        ),
    }
    with gr.Row():
        fields["low"] = gr.Number(value["low"], label="Guided after t", step=0.05, elem_id="low", min_width=90)
        fields["high"] = gr.Number(value["high"], label="until t", step=0.05, elem_id="high", min_width=90)
    with gr.Row():
        fields["steps"] = gr.Number(value["steps"], label="Steps", elem_id="steps", min_width=90)
        fields["solver"] = gr.Dropdown(
            list(SOLVERS),
            value=value["solver"],
            label="Solver",
            allow_custom_value=True,
            elem_id="solver",
            min_width=90,
        )
    fields["ema"] = gr.Dropdown(
        studio.averages, value=value["ema"], label="Weights (EMA)", allow_custom_value=True, elem_id="ema"
    )
    for slider in (fields["num"], fields["cfg_scale"]):
        _accept_anything(slider)
    return fields


def _accept_anything(slider: Any) -> None:
    """Hand on what a program sends outside the range of a slider: Gradio would print a traceback."""
    slider.preprocess = lambda payload: payload


def _command_box(name: str) -> Any:
    import gradio as gr

    return gr.Textbox(label=name, buttons=["copy"], lines=2, max_lines=8, interactive=False)


class Handlers:
    """What the events of the page call; an error becomes a note in the page, and the pictures stay."""

    def __init__(self, studio: Studio) -> None:
        import gradio as gr

        self._studio, self._skip = studio, gr.skip
        # Gradio draws one at a time already; this holds for what calls the functions in another way, too.
        self._lock = threading.Lock()

    def draw(self, *arguments: Any) -> Iterator[list[Any]]:
        """Draw by the fields, however long it takes; yields pictures, note, what was drawn, and the commands.

        A drawing of more than NOTICED seconds first yields a note with the expected time.
        """
        yield from self._draw(arguments, float("inf"))

    def draw_if_quick(self, *arguments: Any) -> Iterator[list[Any]]:
        """Draw by the fields, or say how long it would take."""
        yield from self._draw(arguments, QUICK_SECONDS)

    def _draw(self, arguments: tuple[Any, ...], most: float) -> Iterator[list[Any]]:
        *values, t, drawn = arguments
        unchanged = [self._skip() for _ in self._studio.systems]

        def say(line: str) -> list[Any]:
            return [self._skip(), line, drawn, *unchanged]

        try:
            config = self._studio.config_of(dict(zip(FIELDS, values, strict=True)))
            seconds = self._studio.expected_seconds(config)
            if seconds > most:
                yield say(note(f"Press Draw: it takes about {format_seconds(seconds)}."))
                return
            if seconds > NOTICED:
                yield say(waiting(f"Drawing {_images(config.num)}: about {format_seconds(seconds)}.", seconds))
            with self._lock:
                shown = pictures(self._studio, self._studio.draw(config), _time(t))
            yield [shown, note(_summary(config)), config, *self._studio.commands(config)]
        except JLTError as error:
            yield say(note(str(error), problem=True))

    def move(self, drawn: SampleConfig | None, t: object) -> Any:
        """Show the drawn images at another time."""
        if drawn is None:
            return self._skip()
        try:
            with self._lock:
                return pictures(self._studio, self._studio.draw(drawn), _time(t))
        except JLTError as error:
            return note(str(error), problem=True)

    def walk(self, *arguments: Any) -> Iterator[str]:
        """Draw the way from the seed to another one."""
        *values, other = arguments
        studio = self._studio
        try:
            # As many images of one class as a row holds, however many were chosen.
            config = studio.config_of(dict(zip(FIELDS, values, strict=True)))
            second = whole("Second seed", other, 0, LAST_SEED)
            seconds = studio.expected_seconds(replace(config, num=COLUMNS))
            yield waiting(f"Drawing {COLUMNS} images: about {format_seconds(seconds)}.", seconds)
            name = "one class" if config.labels in RULES else studio.classes[int(config.labels)]
            with self._lock:
                shown = interpolations(studio, studio.interpolate(config, second), (config.seed, second), name)
            yield shown
        except JLTError as error:
            yield note(str(error), problem=True)


def _images(num: int) -> str:
    return f"{num} image{'s' if num > 1 else ''}"


def _summary(config: SampleConfig) -> str:
    guidance = f"guidance {config.cfg_scale:g}" if config.cfg_scale != 1 else "no guidance"
    return f"{_images(config.num)} of seed {config.seed}: {config.steps} steps of {config.solver}, {guidance}."


def _time(t: object) -> float:
    return min(max(float(t), 0.0), 1.0) if isinstance(t, (int, float)) else 1.0
