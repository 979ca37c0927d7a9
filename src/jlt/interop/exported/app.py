"""The demo of this pipeline: run `python app.py`, or upload the folder as a Space of the Hugging Face Hub."""

import os
import random
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import torch
from diffusers import DiffusionPipeline

FOLDER = Path(__file__).resolve().parent
SOLVERS = ["heun", "euler", "midpoint", "dpmpp_2m", "ancestral"]
MOST_IMAGES, MOST_STEPS, LAST_SEED = 16, 100, 2**53 - 1
CSS = ".pixels img { image-rendering: pixelated }"
PIXEL_ART = 128
"""Images of a smaller side are enlarged without smoothing."""


def load() -> tuple[Any, dict[int, str], int]:
    """Return the pipeline of this folder, on a GPU if there is one, its class names by number, and the images' side."""
    # The code of the pipeline is that of this folder.
    pipe = DiffusionPipeline.from_pretrained(str(FOLDER), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    numbers = range(pipe.transformer.config.num_classes)
    names = pipe.config.get("id2label") or {number: str(number) for number in numbers}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = pipe.transformer.config.height * pipe.config.autoencoder["downsampling"]
    return pipe.to(device), {int(number): name for number, name in names.items()}, side


def build(pipe: Any, names: dict[int, str], side: int) -> Any:
    """Return the page of a pipeline whose classes have these names, for images of `side` pixels."""

    def draw(label: Any, count: Any, seed: Any, scale: Any, low: Any, high: Any, steps: Any, solver: Any) -> list[Any]:
        numbers = [
            int(value) if isinstance(value, (int, float)) and value == value // 1 else -1 for value in (seed, steps)
        ]
        if not 0 <= numbers[0] <= LAST_SEED:
            raise gr.Error(f"The seed must be a whole number from 0 to {LAST_SEED:,}.")
        if not 1 <= numbers[1] <= MOST_STEPS:
            raise gr.Error(f"The steps must be a whole number from 1 to {MOST_STEPS}.")
        if low is None or high is None or not 0 <= low < high <= 1:
            raise gr.Error("Guidance acts from a time to a later one, both from 0 to 1.")
        if label is None:
            raise gr.Error("Choose a class.")
        try:
            drawn = pipe(
                [int(label)] * int(count),
                num_inference_steps=numbers[1],
                guidance_scale=float(scale),
                guidance_interval=(float(low), float(high)),
                solver=solver,
                seed=numbers[0],
            )
        except ValueError as error:
            raise gr.Error(str(error)) from None
        return list(drawn.images)

    with gr.Blocks(title=FOLDER.name, analytics_enabled=False) as page:
        gr.Markdown(f"# {FOLDER.name}\nImages of a class-conditional diffusion transformer, trained with JLT.")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                label = gr.Dropdown([(name, number) for number, name in names.items()], value=min(names), label="Class")
                count = gr.Slider(1, MOST_IMAGES, value=4, step=1, label="Images")
                seed = gr.Number(0, label="Seed")
                scale = gr.Slider(0, 10, value=1, step=0.1, label="Guidance scale")
                with gr.Row():
                    low, high = gr.Number(0, label="Guided from t", step=0.05), gr.Number(1, label="to t", step=0.05)
                steps = gr.Number(20, label="Steps")
                solver = gr.Dropdown(SOLVERS, value="heun", label="Solver")
                button, again = gr.Button("Draw", variant="primary"), gr.Button("New seed")
            with gr.Column(scale=3, min_width=280):
                style = "pixels" if side < PIXEL_ART else None
                gallery = gr.Gallery(label="Images", columns=4, object_fit="contain", format="png", elem_classes=style)
        inputs = [label, count, seed, scale, low, high, steps, solver]
        gr.on([button.click, page.load, label.input], draw, inputs, gallery, api_name="draw", concurrency_limit=1)
        again.click(lambda: random.randrange(10000), None, seed).then(draw, inputs, gallery, concurrency_limit=1)
    return page.queue(max_size=32)


if __name__ == "__main__":
    # No font of another server is requested.
    build(*load()).launch(theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]), css=CSS)
