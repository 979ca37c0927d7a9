"""The demo without a browser: its images are those of the command line, and whatever is typed gets an answer."""

import dataclasses
import gc
import importlib.util
import shlex
import socket
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_helpers import NAMES, train_pair
from PIL import Image

import jlt
from jlt.api.model import Model, load
from jlt.cli.main import main
from jlt.config import SampleConfig
from jlt.demo import page as demo_page
from jlt.demo.page import FIELDS, Handlers, build_page
from jlt.demo.pictures import heading, interpolations, pictures
from jlt.demo.server import free_port
from jlt.demo.studio import ANY, EVERY, MOST_EVALUATIONS, Stopped, Studio, System
from jlt.errors import JLTError

gradio = pytest.importorskip("gradio")
VALUES = {
    "label": "3",
    "num": 2,
    "seed": 5,
    "cfg_scale": 1,
    "low": 0,
    "high": 1,
    "steps": 4,
    "solver": "heun",
    "ema": "0.9",
}


@pytest.fixture(scope="module")
def runs(digit_latents, tmp_path_factory):
    return train_pair(digit_latents, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def studio(runs):
    return Studio.open(runs, "cpu")


def ask(studio, **changes):
    """Press the button with these fields: pictures, note, what was drawn, commands."""
    return last(Handlers(studio).draw(*{**VALUES, **changes}.values(), 1, None))


def last(answers):
    """The answer of a handler after those that say that it draws."""
    return list(answers)[-1]


@pytest.fixture
def building():
    """Gradio leaves event loops behind where it builds a page; they go with the page, inside the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


# ---- the images ----


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"label": EVERY, "num": 1, "seed": 0},
        {"label": ANY, "num": 5, "solver": "ancestral"},
        {"cfg_scale": 2.5, "low": 0.25, "high": 0.9, "ema": "none", "steps": 3, "solver": "dpmpp_2m"},
    ],
    ids=["a class", "every class", "random classes", "every option"],
)
def test_the_command_in_the_page_draws_the_images_of_the_page(studio, changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = studio.config_of({**VALUES, **changes})
    commands = studio.commands(config)
    assert len(commands) == 2
    for drawing, command in zip(studio.draw(config), commands, strict=True):
        program, *arguments = shlex.split(command)
        assert program == "jlt"
        assert main(arguments) == 0
        written = sorted(Path(arguments[arguments.index("--out") + 1]).glob("*.png"))
        assert len(written) == config.num
        assert np.array_equal(drawing.pixels.numpy(), np.stack([np.asarray(Image.open(path)) for path in written]))


def test_a_command_names_only_what_is_not_usual(studio):
    values = {**VALUES, "steps": 50, "seed": 0, "num": 3}
    command, _ = studio.commands(studio.config_of(values))
    assert command.split(" --out ")[1] == "samples-1 --num 3 --labels 3"


def test_a_command_names_the_autoencoder_that_the_demo_was_given(studio, runs, monkeypatch):
    monkeypatch.setattr(studio, "systems", [System(runs[0], studio.systems[0].model, "my weights")])
    (command,) = studio.commands(studio.config_of(VALUES))
    assert command.endswith("--autoencoder-path 'my weights'")


def test_the_first_images_are_drawn_before_the_page_opens(runs):
    studio = Studio.open(runs[:1], "cpu")
    config = studio.config_of(studio.initial)
    assert (config.num, config.labels, config.seed) == (8, "3", 0)
    assert studio.draw.cache_info().currsize == 1
    studio.draw(config)
    assert studio.draw.cache_info().hits == 1


def test_the_page_opens_with_fewer_images_where_eight_take_long(runs, monkeypatch):
    seconds = {8: 25.0, 4: 12.0, 2: 6.0, 1: 3.0}
    monkeypatch.setattr(Studio, "expected_seconds", lambda self, config: seconds[config.num])
    studio = Studio.open(runs[:1], "cpu")
    assert studio.initial["num"] == 2
    monkeypatch.setattr(Studio, "expected_seconds", lambda self, config: 60.0)
    studio = Studio.open(runs[:1], "cpu")
    assert (studio.initial["num"], studio.draw.cache_info().currsize) == (1, 0)


def test_two_systems_of_one_name_are_told_apart(runs):
    model = load(runs[0], device="cpu")
    html = heading(Studio([System(runs[0], model), System(runs[1], model)]))
    assert "Two systems, one noise" in html
    for run in runs:
        assert f"{NAMES['x']} ({run.name})" in html
    assert "Two predictions, one noise" in heading(Studio.open(runs, "cpu"))


def test_both_systems_begin_with_the_same_noise_and_the_path_is_that_of_the_api(studio, runs):
    x, v = studio.draw(studio.config_of(VALUES))
    assert torch.equal(x.trajectory[0].z, v.trajectory[0].z)
    assert not torch.equal(x.pixels, v.pixels)
    images = jlt.load(runs[0], device="cpu").sample(labels=[3], num=2, seed=5, steps=4)
    assert torch.equal(x.pixels, images.pixels)
    time, clean, z = x.at(0.45)
    assert time == 0.5
    state = images.trajectory[0.5]
    for decoded, latents in ((clean, state.clean), (z, state.z)):
        shown = [np.asarray(image) for image in jlt.load(runs[0], device="cpu").decode(latents)]
        assert np.array_equal(decoded.numpy(), np.stack(shown))
    assert torch.equal(x.at(1)[1], x.pixels)


@pytest.mark.parametrize("solver", ["heun", "ancestral"])
def test_an_interpolation_leads_from_one_seed_to_another(studio, solver):
    config = studio.config_of({**VALUES, "solver": solver, "num": 1})
    other = dataclasses.replace(config, seed=6)
    ways = studio.interpolate(config, 6)
    for way, first, last in zip(ways, studio.draw(config), studio.draw(other), strict=True):
        assert len(way) == 8
        assert difference(way[0], first.pixels[0]) <= 1
        # At the end the noise of a stochastic solver is still that of the first.
        assert solver == "ancestral" or difference(way[-1], last.pixels[0]) <= 1
        assert difference(way[4], first.pixels[0]) > 1
        assert difference(way[4], last.pixels[0]) > 1


def difference(a, b):
    return int((a.int() - b.int()).abs().max())


def test_a_picture_shows_a_class_a_row(studio):
    config = studio.config_of({**VALUES, "label": EVERY, "num": 2})
    assert config.num == 20
    drawings = studio.draw(config)
    html = pictures(studio, drawings, 1.0)
    assert html.count('class="row"') == 2 * 10
    assert html.index(">0</span>") < html.index(">1</span>") < html.index(">9</span>")
    # Image i is of class i mod 10, so the second image of the first row is image 10.
    alts = [part.split('"')[0] for part in html.split('alt="')[1:]]
    assert alts[:3] == [
        f"{NAMES['x']}, Images: {name}, image {number}" for name, number in (("0", 1), ("0", 2), ("1", 3))
    ]


def test_no_name_of_a_file_becomes_code_of_the_page(studio, monkeypatch):
    hostile = "<img src=x onerror=alert(1)>"
    monkeypatch.setattr(studio, "classes", [hostile] * 10)
    monkeypatch.setattr(System, "name", hostile)
    drawings = [dataclasses.replace(one, captions=[hostile] * 2) for one in studio.draw(studio.config_of(VALUES))]
    shown = pictures(studio, drawings, 0.5) + heading(studio)
    shown += interpolations(studio, [one.pixels for one in drawings], (0, 1), hostile)
    assert hostile not in shown
    assert "&lt;img src=x" in shown


# ---- whatever is typed ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": None}, "Seed must be a whole number from 0 to 9,007,199,254,740,991."),
        ({"seed": "abc"}, "not abc."),
        ({"seed": -1}, "not -1."),
        ({"seed": 1e99}, "not 1e+99."),
        ({"seed": 0.5}, "not 0.5."),
        ({"seed": float("nan")}, "not nan."),
        ({"seed": True}, "not True."),
        ({"num": 0}, "Images must be a whole number from 1 to 16, not 0."),
        ({"num": 17}, "not 17."),
        ({"steps": 0}, "Steps must be a whole number from 1 to 250, not 0."),
        ({"steps": 10**6}, "not 1000000."),
        ({"steps": []}, "not []."),
        ({"low": 0.8, "high": 0.2}, "0 <= low < high <= 1"),
        ({"low": None}, "Guidance after"),
        ({"high": 2}, "Guidance until"),
        ({"cfg_scale": float("inf")}, "Guidance scale must be a number from 0 to 100, not inf."),
        ({"label": None}, "Choose a class."),
        ({"label": ["3"]}, "Choose a class."),
        ({"label": "12"}, "There is no class 12"),
        ({"label": "tench"}, "no class named 'tench'"),
        ({"solver": "huen"}, "did you mean heun"),
        ({"solver": []}, "no solver named"),
        ({"ema": "0.8"}, "0.8"),
        ({"ema": "sigma_rel=0.1"}, "power-function"),
    ],
)
def test_wrong_input_gets_a_sentence_and_the_pictures_stay(studio, changes, message):
    shown, note, drawn, *commands = ask(studio, **changes)
    assert message in note.replace("&lt;", "<").replace("&#x27;", "'")
    assert 'role="alert"' in note
    assert drawn is None
    assert [shown, *commands] == [gradio.skip()] * 3
    assert "<img" in ask(studio)[0]


def test_the_second_seed_is_checked_too(studio):
    handlers = Handlers(studio)
    assert "Second seed must be" in last(handlers.walk(*VALUES.values(), -3))
    assert last(handlers.walk(*VALUES.values(), 6)).count("<img") == 16


def test_one_drawing_has_a_limit_of_work(studio):
    note = ask(studio, label=EVERY, num=16, steps=200)[1]
    assert "160 images would take 63,840 evaluations" in note
    assert f"{MOST_EVALUATIONS:,}" in note


def test_guidance_of_a_network_without_a_null_class_is_explained(runs):
    model = load(runs[0], device="cpu")
    without = dataclasses.replace(model.checkpoint.config, label_dropout=0.0)
    checkpoint = dataclasses.replace(model.checkpoint, config=without)
    alone = Studio([System(runs[0], Model(checkpoint, model._weights, "", "cpu"))])
    note = ask(alone, cfg_scale=2)[1]
    assert "trained without dropping labels" in note


def test_a_long_drawing_waits_for_the_button(studio, monkeypatch):
    monkeypatch.setattr(studio, "_seconds_per_row", 10.0)
    handlers, inputs = Handlers(studio), [*{**VALUES, "seed": 77}.values(), 1, None]
    ((shown, note, drawn, *_),) = handlers.draw_if_quick(*inputs)
    assert "Press Draw: it takes about 2 min" in note
    assert (shown, drawn) == (gradio.skip(), None)
    # The button first says how long it takes.
    (shown, note, *_), drawn = handlers.draw(*inputs)
    assert "Drawing 2 images: about 2 min" in note
    assert shown == gradio.skip()
    assert "<img" in drawn[0]
    # Now it is fast, as measured.
    assert "<img" in last(handlers.draw_if_quick(*inputs))[0]


def test_the_stop_button_ends_a_drawing(studio):
    config = SampleConfig(num=16, steps=250, labels="1", seed=123)
    threading.Timer(0.1, studio.stop).start()
    with pytest.raises(Stopped):
        studio.draw(config)
    assert "<img" in ask(studio, seed=124)[0]


def test_moving_in_time_shows_the_drawn_images_whatever_the_fields_say(studio):
    handlers = Handlers(studio)
    *_, drawn = ask(studio)[:3]
    assert handlers.move(None, 0.5) == gradio.skip()
    at = [handlers.move(drawn, t) for t in (0, 0.5, 1)]
    assert len(set(at)) == 3
    assert "at t = 0.50" in at[1]
    assert handlers.move(drawn, "soon") == at[2] == ask(studio)[0]


# ---- what can be shown together ----


def test_two_systems_of_different_noise_or_classes_are_refused(runs):
    model = load(runs[1], device="cpu")
    first = System(runs[0], load(runs[0], device="cpu"))

    def second(config=model.checkpoint.config, **latents):
        checkpoint = dataclasses.replace(
            model.checkpoint, config=config, latents={**model.checkpoint.latents, **latents}
        )
        return System(runs[1], Model(checkpoint, model._weights, "", "cpu"))

    with pytest.raises(JLTError, match="do not draw from the same noise: noise_scale 1.0 against 2.0"):
        Studio([first, second(dataclasses.replace(model.checkpoint.config, noise_scale=2.0))])
    with pytest.raises(JLTError, match="have different classes"):
        Studio([first, second(class_names=list("abcdefghij"))])


def test_the_page_has_every_field(studio, building):
    page = build_page(studio)
    labels = {block.elem_id for block in page.blocks.values()}
    assert {"label", "num", "seed", "scale", "low", "high", "steps", "solver", "ema", "t", "other"} <= labels
    assert len(FIELDS) == len(VALUES)
    assert {fn.api_name for fn in page.fns.values() if fn.api_visibility == "public"} == {"draw", "interpolate"}
    assert {fn.concurrency_limit for fn in page.fns.values() if fn.queue} <= {1, "default"}


# ---- the command ----


def test_a_port_in_use_is_named(capsys, runs):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", str(runs[0]), "--port", str(port)]) == 1
    assert capsys.readouterr().err.startswith(f"jlt: Port {port} of 127.0.0.1 cannot be used (Address already in use)")
    assert free_port("127.0.0.1", None) >= 7860


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a", "b", "c"], 2, "Name one or two runs"),
        (["a", "--port", "0"], 2, "--port must be from 1 to 65,535, not 0."),
        (["a", "--host", "nowhere.invalid"], 1, "nowhere.invalid is no address of this machine"),
        (["absent"], 1, "absent"),
    ],
)
def test_a_wrong_command_gets_one_sentence(arguments, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_gradio_the_command_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "run"]) == 1
    assert "pip install -e '.[demo]'" in capsys.readouterr().err


# ---- the page of an exported folder ----


class FakePipeline:
    def __init__(self):
        self.calls = []

    def __call__(self, class_labels, **settings):
        self.calls.append((class_labels, settings))
        if settings["guidance_scale"] == 9:
            raise ValueError("This network has no null class.")
        return type("Output", (), {"images": [Image.new("RGB", (8, 8))] * len(class_labels)})


def test_the_app_of_an_exported_folder_calls_the_pipeline(building):
    path = Path(demo_page.__file__).parents[1] / "interop" / "exported" / "app.py"
    assert "jlt" not in {
        line.split()[1].split(".")[0] for line in path.read_text().splitlines() if "import " in line[:7]
    }
    spec = importlib.util.spec_from_file_location("space_app", path)
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    pipe = FakePipeline()
    names = {0: "tench", 1: "goldfish"}
    page = app.build(pipe, names, 32)
    draw = next(fn.fn for fn in page.fns.values() if fn.api_name == "draw")
    assert len(draw(1, 3, 7, 1.5, 0.1, 1, 20, "heun")) == 3
    settings = {
        "num_inference_steps": 20,
        "guidance_scale": 1.5,
        "guidance_interval": (0.1, 1.0),
        "solver": "heun",
        "seed": 7,
    }
    assert pipe.calls == [([1, 1, 1], settings)]
    for wrong, message in (
        ((1, 3, None, 1, 0, 1, 20, "heun"), "seed"),
        ((1, 3, -1, 1, 0, 1, 20, "heun"), "seed"),
        ((1, 3, 1e99, 1, 0, 1, 20, "heun"), "seed"),
        ((1, 3, 0, 1, 0, 1, 0, "heun"), "steps"),
        ((1, 3, 0, 1, 0, 1, 10**6, "heun"), "steps"),
        ((1, 3, 0, 1, 0.9, 0.1, 20, "heun"), "Guidance"),
        ((1, 3, 0, 1, None, 1, 20, "heun"), "Guidance"),
        ((None, 3, 0, 1, 0, 1, 20, "heun"), "class"),
        ((1, 3, 0, 9, 0, 1, 20, "heun"), "null class"),
    ):
        with pytest.raises(gradio.Error, match=message):
            draw(*wrong)
    assert len(pipe.calls) == 2
    # Photographs are enlarged with smoothing, digits without.
    for side, classes in ((32, ["pixels"]), (256, [])):
        blocks = app.build(pipe, names, side).blocks.values()
        (gallery,) = [block for block in blocks if isinstance(block, gradio.Gallery)]
        assert gallery.elem_classes == classes
