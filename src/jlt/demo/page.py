"""The page of the demo: fields, pictures and what happens between them. Gradio is imported by nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import gradio as gr

from jlt.config import SampleConfig
from jlt.demo.pictures import heading, interpolations, note, pictures
from jlt.demo.studio import DEFAULTS, LAST_SEED, MOST_IMAGES, Studio, whole
from jlt.errors import JLTError
from jlt.runtime.progress import format_seconds
from jlt.sampling.solvers import SOLVERS

QUICK_SECONDS = 10.0
"""A drawing that takes less begins with the change of a field; a longer one waits for the button."""
FIELDS = ("label", "num", "seed", "cfg_scale", "low", "high", "steps", "solver", "ema")
RANDOM_SEED = "() => Math.floor(Math.random() * 10000)"


def build_page(studio: Studio) -> gr.Blocks:
    """Return the page; every drawing waits for the one before it."""
    handlers = Handlers(studio)
    with gr.Blocks(title="JLT demo", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(heading(studio), elem_id="heading")
        drawn = gr.State(None)
        with gr.Row(elem_id="main"):
            with gr.Column(elem_id="controls", scale=0, min_width=300):
                inputs = _fields(studio)
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=90)
                    stop = gr.Button("Stop", elem_id="stop", min_width=90)
            with gr.Column(elem_id="results", min_width=320):
                status = gr.HTML(note("Drawing the first images ..."), elem_id="note")
                with gr.Group(elem_id="path"):
                    t = gr.Slider(
                        0,
                        1,
                        value=1,
                        step=0.02,
                        label="Time t: move it back to see how the images come about",
                        elem_id="t",
                        buttons=[],
                    )
                shown = gr.HTML(elem_id="pictures")
                with gr.Accordion("Between two seeds", open=False, elem_id="between"):
                    with gr.Row():
                        other = gr.Number(DEFAULTS.seed + 1, label="Second seed", elem_id="other", min_width=120)
                        walk = gr.Button("Draw the way", elem_id="walk", min_width=120)
                    way = gr.HTML(note("Eight images from the noise of the seed to that of the second seed."))
                with gr.Accordion("The same images from the command line", open=False, elem_id="commands"):
                    commands = [
                        gr.Textbox(label=system.name, buttons=["copy"], lines=2, interactive=False)
                        for system in studio.systems
                    ]
        values, one = [inputs[name] for name in FIELDS], {"concurrency_id": "draw", "concurrency_limit": 1}
        quiet: dict[str, Any] = {**one, "show_progress": "hidden", "trigger_mode": "always_last"}
        outputs = [shown, status, drawn, *commands]
        # The button draws however long it takes; a change of a field, only what is quick.
        gr.on(
            [draw.click, inputs["seed"].submit], handlers.draw, [*values, t, drawn], outputs, api_name="draw", **quiet
        )
        changes: list[Any] = [inputs[name].input for name in ("label", "solver", "ema")]
        changes += [inputs[name].release for name in ("num", "cfg_scale")]
        changes += [inputs[name].submit for name in ("low", "high", "steps")]
        gr.on(
            [page.load, *changes],
            handlers.draw_if_quick,
            [*values, t, drawn],
            outputs,
            api_visibility="private",
            **quiet,
        )
        inputs["new"].click(None, None, inputs["seed"], js=RANDOM_SEED, api_visibility="private").then(
            handlers.draw, [*values, t, drawn], outputs, api_visibility="private", **quiet
        )
        t.input(handlers.move, [drawn, t], shown, api_visibility="private", **quiet)
        gr.on([walk.click, other.submit], handlers.walk, [*values, other], way, api_name="interpolate", **quiet)
        stop.click(studio.stop, queue=False, api_visibility="private", show_progress="hidden")
    return page.queue(max_size=32)


def _fields(studio: Studio) -> dict[str, Any]:
    """Return the fields by name. They accept anything: what is wrong is explained in the page."""
    fields: dict[str, Any] = {}
    label = studio.classes[min(3, len(studio.classes) - 1)]
    fields["label"] = gr.Dropdown(
        studio.class_choices, value=label, label="Class", allow_custom_value=True, elem_id="label"
    )
    fields["num"] = gr.Slider(1, MOST_IMAGES, value=DEFAULTS.num, step=1, label="Images", elem_id="num", buttons=[])
    with gr.Row(elem_id="seeds"):
        fields["seed"] = gr.Number(DEFAULTS.seed, label="Seed", elem_id="seed", min_width=120)
        fields["new"] = gr.Button("New seed", elem_id="new", min_width=90)
    fields["cfg_scale"] = gr.Slider(
        0, 10, value=DEFAULTS.cfg_scale, step=0.1, label="Guidance scale", elem_id="scale", buttons=[]
    )
    with gr.Row():
        fields["low"] = gr.Number(
            DEFAULTS.cfg_interval[0], label="Guided after t", step=0.05, elem_id="low", min_width=90
        )
        fields["high"] = gr.Number(DEFAULTS.cfg_interval[1], label="until t", step=0.05, elem_id="high", min_width=90)
    with gr.Row():
        fields["steps"] = gr.Number(DEFAULTS.steps, label="Steps", elem_id="steps", min_width=90)
        fields["solver"] = gr.Dropdown(
            list(SOLVERS), value=DEFAULTS.solver, label="Solver", elem_id="solver", min_width=90
        )
    fields["ema"] = gr.Dropdown(
        studio.averages, value=studio.averages[0], label="Weights (EMA)", allow_custom_value=True, elem_id="ema"
    )
    return fields


class Handlers:
    """What the events of the page call; an error becomes a note in the page, and the pictures stay."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        # Gradio draws one at a time already; this holds for what calls the functions in another way, too.
        self._lock = threading.Lock()

    def draw(self, *arguments: Any) -> list[Any]:
        """Draw by the fields, however long it takes; returns pictures, note, what was drawn, and the commands."""
        return self._draw(arguments, float("inf"))

    def draw_if_quick(self, *arguments: Any) -> list[Any]:
        """Draw by the fields, or say how long it would take."""
        return self._draw(arguments, QUICK_SECONDS)

    def _draw(self, arguments: tuple[Any, ...], most: float) -> list[Any]:
        *values, t, drawn = arguments
        unchanged = [gr.skip() for _ in self._studio.systems]

        def draw() -> list[Any]:
            config = self._studio.config_of(dict(zip(FIELDS, values, strict=True)))
            if (seconds := self._studio.expected_seconds(config)) > most:
                text = f"Press Draw: it takes about {format_seconds(seconds)}."
                return [gr.skip(), note(text), drawn, *unchanged]
            drawings = self._studio.draw(config)
            shown = pictures(self._studio, drawings, _time(t))
            return [shown, note(self._summary(config)), config, *self._studio.commands(config)]

        return self._guarded(draw, lambda text: [gr.skip(), note(text, problem=True), drawn, *unchanged])

    def move(self, drawn: SampleConfig | None, t: object) -> Any:
        """Show the drawn images at another time."""
        if drawn is None:
            return gr.skip()
        return self._guarded(
            lambda: pictures(self._studio, self._studio.draw(drawn), _time(t)), lambda text: note(text, problem=True)
        )

    def walk(self, *arguments: Any) -> str:
        """Draw the way from the seed to another one."""
        *values, other = arguments

        def draw() -> str:
            # Eight images of one class, however many were chosen.
            config = self._studio.config_of(dict(zip(FIELDS, values, strict=True)))
            second = whole("Second seed", other, 0, LAST_SEED)
            name = "one class" if config.labels in ("equal", "random") else self._studio.classes[int(config.labels)]
            return interpolations(self._studio, self._studio.interpolate(config, second), (config.seed, second), name)

        return self._guarded(draw, lambda text: note(text, problem=True))

    def _guarded(self, work: Callable[[], Any], explain: Callable[[str], Any]) -> Any:
        try:
            with self._lock:
                return work()
        except JLTError as error:
            return explain(str(error))

    def _summary(self, config: SampleConfig) -> str:
        count = f"{config.num} image{'s' if config.num > 1 else ''}"
        guidance = f"guidance {config.cfg_scale:g}" if config.cfg_scale != 1 else "no guidance"
        return f"{count} of seed {config.seed}: {config.steps} steps of {config.solver}, {guidance}."


def _time(t: object) -> float:
    return min(max(float(t), 0.0), 1.0) if isinstance(t, (int, float)) else 1.0
