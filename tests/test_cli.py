"""The command line: its help, arguments, streams, exit codes and files, and the whole chain from images to a report."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from data_helpers import file_bytes
from PIL import Image

import jlt as jlt_package
from jlt.cli.main import COMMANDS, main
from jlt.experiments.recipes import RECIPES
from jlt.images.contact_sheet import SheetText, draw_sheet
from jlt.images.registry import open_source
from jlt.storage.files import read_json, read_sealed_json, without_seal

NAMES = [
    "quickstart",
    "explain",
    "encode",
    "verify",
    "analyze",
    "plan",
    "train",
    "sample",
    "demo",
    "fetch",
    "reference",
    "evaluate",
    "sweep",
    "price",
    "ablate",
    "report",
    "import",
    "export",
    "benchmark",
]
MORE_HELP = [
    "encode --adopt DIR",
    "train digits",
    "benchmark train",
    "benchmark sample",
    "benchmark data",
    "benchmark encode",
    "benchmark geometry",
]
OLD_DIALECT = re.compile(
    r"\b(words?|told|said|ask(s|ed)?|heard|nobody|whoever|somebody|beside|lies?|at hand|anew|put out|sound|verbs?"
    r"|of one mind|DESIGN)\b"
)
SAMPLES = ["--num", 23, "--steps", 3, "--cfg-scale", 1.5]


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def data(self):
        """The one JSON object on stdout; further output, or a NaN in it, is an error."""
        value = json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert isinstance(value, dict)
        assert self.out.count("\n") == 1
        return value


def jlt(*arguments) -> Outcome:
    """Run a command in this process."""
    # The help draws boxes only where the stream has an encoding, as a terminal has.
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Outcome(code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode())


def jlt_process(*arguments) -> Outcome:
    """Run a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "jlt.cli.main", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def done(*arguments) -> dict:
    """Run a command that has to succeed and return its JSON."""
    outcome = jlt(*arguments, "--json")
    assert outcome.code == 0, outcome.err
    return outcome.data


# ---- help ----


def listed_commands() -> dict[str, str]:
    """Return the commands of `jlt --help` with their one-line descriptions."""
    outcome = jlt("--help")
    assert outcome.code == 0
    text = " ".join(line.strip("│ ") for line in outcome.out.splitlines())
    entries = text.partition("(required)")[2].split("•")[1:]
    pairs = [entry.strip("╰─╯ ").split(maxsplit=1) for entry in entries]
    return {name: " ".join(summary.split()) for name, summary in pairs}


def test_the_commands_listed_are_those_that_exist():
    assert list(listed_commands()) == NAMES == [command.__name__.lower() for command in COMMANDS]


def test_help_of_the_program_is_short():
    outcome = jlt("--help")
    assert len(outcome.out.splitlines()) < 60
    assert outcome.err == ""


@pytest.mark.parametrize("command", NAMES)
def test_help_of_a_command_is_short_and_has_an_example(command):
    outcome = jlt(command, "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    # Commands that generate images have the settings of the sampler too; that of train lists all settings of a run.
    assert len(outcome.out.splitlines()) < 100 or command == "train"
    example = re.search(r"For example:\s+(jlt .*)", outcome.out)
    assert example, outcome.out
    assert example[1].split()[1] == command


@pytest.mark.parametrize("command", NAMES)
def test_the_line_of_a_command_is_the_first_line_of_its_help(command):
    paragraphs = jlt(command, "--help").out.split("\n\n")
    assert listed_commands()[command] == paragraphs[1]


def option_helps(*arguments) -> dict[str, str]:
    """Return the options and positional arguments in a help output, each with all text that follows it."""
    entries: list[list[str]] = []
    for line in jlt(*arguments, "--help").out.splitlines():
        if re.match(r"│ (-|[A-Z]+ {2,})", line):
            entries.append([])
        if entries and line.startswith("│  " if entries[-1] else "│"):
            entries[-1] += line.strip("│ ").split()
    return {name: " ".join(text) for name, *text in entries if name != "-h,"}


@pytest.mark.parametrize("arguments", [name for name in NAMES if name != "benchmark"] + MORE_HELP)
def test_every_option_has_a_help_text(arguments):
    helps = option_helps(*arguments.split())
    assert len(helps) > 2
    # A sentence, then its default or whether it is required. An option without a text shows its type and default only.
    bare = [name for name, text in helps.items() if not re.search(r"\.( \((default: [^()]*|required)\))?$", text)]
    assert bare == []


def test_the_help_of_a_recipe_lists_its_settings():
    helps = option_helps("train", "digits")
    assert {"--out", "--steps", "--network.depth", "--loss.space", "--evaluation.sample.solver"} <= set(helps)
    assert helps["--steps"].endswith("(default: 1500)")
    # What is on by default is listed by the option that turns it off.
    assert set(option_helps("train")) >= {*helps, "RECIPE"} - {"--flips"}
    assert jlt("--help", "train").code == 0


def test_the_help_of_train_lists_all_recipes():
    text = jlt("train", "--help").out
    for name, recipe in RECIPES.items():
        assert re.search(rf"^  {re.escape(name)} +{re.escape(recipe.purpose)}$", text, re.MULTILINE), name


def test_the_version_is_printed():
    assert jlt("--version") == Outcome(0, f"jlt {jlt_package.__version__}\n", "")


def test_no_text_of_the_command_line_uses_the_old_dialect():
    package = Path(jlt_package.__file__).parent
    files = [*(package / "cli").glob("*.py"), package / "config.py", package / "errors.py"]
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in [*files, package / "latents" / "encode_config.py"]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if OLD_DIALECT.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("command", NAMES)
def test_the_example_of_a_command_can_be_parsed(command):
    from jlt.cli.main import parse

    example = re.search(r"For example:\s+jlt (.*)", jlt(command, "--help").out)[1]
    parsed = parse(example.split())
    assert type(parsed).__name__.lower() in (command, f"train{command}")


@pytest.mark.parametrize("what", ["train", "data", "encode"])
def test_every_benchmark_explains_itself(what):
    from jlt.cli.main import parse

    outcome = jlt("benchmark", what, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    example = re.search(r"For example:\s+jlt (.*)", outcome.out)[1]
    assert type(parse(example.split())).__name__.lower() == f"{what}benchmark"


def test_adoption_explains_itself():
    outcome = jlt("encode", "--adopt", "somewhere", "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert "Make a latent store of shards" in outcome.out


def test_a_setting_that_is_on_can_be_turned_off():
    for options, flips in (((), True), (("--no-flips",), False)):
        outcome = jlt("train", "imagenet256-jlt-b1", "--print-config", *options)
        assert json.loads(outcome.out)["flips"] is flips


# ---- wrong arguments ----


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        ("trian digits", "train"),
        ("train digts", "digits"),
        ("train imagenet256-jltb1", "imagenet256-jlt-b1"),
        ("train digits --network.dpeth 2 --print-config", "--network.depth"),
        ("train digits --netwrok.depth 2 --print-config", "--network.depth"),
        ("train digits --optimizer.learning-rat 2 --print-config", "--optimizer.learning-rate"),
        ("train digits --latnets there --print-config", "did you mean --latents?"),
        ("train digits --learning-rate 1 --print-config", "did you mean --optimizer.learning-rate?"),
        ("train digits --lr 1 --print-config", "did you mean --optimizer.learning-rate?"),
        ("ablate digits --latents OUT --out OUT --num 8", "did you mean --sample.num or --evaluation.sample.num?"),
        ("verify OUT --device gpu", "did you mean cpu?"),
        ("verify OUT --processes 0", "--processes takes a number of 1 or more"),
        ("train digits --prediction velocity --print-config", "x, eps, v, edm, skip=0.3, mix=0.5"),
        ("train digits --loss.space skpi=2 --print-config", "skip=0.3"),
        ("encode --images digits --autoencoder tinny --out OUT", "tiny"),
        ("encode --images digit --autoencoder tiny --out OUT", "digits"),
        ("encode --images digits --autoencoder tiny --out OUT --resolutoin 32", "--resolution"),
        ("sample --checkpoint OUT --out OUT --solver huen", "heun"),
        ("sample --checkpoint OUT --out OUT --format pgn", "png"),
        ("sample --checkpoint OUT --out OUT --slover heun", "--solver"),
        ("evaluate --samples OUT --reference digits --features digit", "digits"),
        ("evaluate --samples OUT --featurs digits", "--features"),
        ("plan digits --gpu H2000", "H200"),
        ("plan digits --gpsu 8", "--gpus"),
        ("plan digits --netwrok.depth 2", "--network.depth"),
        ("benchmark train --preset JLT-B1", "JLT-B/1"),
        ("benchmark train --preset DiT-XL/2", "DiT-L/2"),
        ("benchmark trian", "train"),
        ("plan digits --gpus 7", "batch_size 63 or 70"),
        ("train digits --steps 0 --print-config", "--steps must be from 1 to"),
        ("train digits --network.patch-size 3 --print-config", "patch_size 3 does not divide"),
    ],
)
def test_wrong_arguments_and_settings_give_2_and_the_remedy(arguments, nearest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = jlt(*arguments.split())
    assert outcome.code == 2
    assert outcome.out == ""
    # Boxes may break a line within a sentence.
    assert nearest in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", ["", "train", "encode --images digits", "train digits", "evaluate", "sample --num many"]
)
def test_missing_arguments_give_2(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = jlt(*arguments.split())
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.strip()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("verify nowhere", "nowhere"),
        ("report nowhere", "nowhere"),
        ("analyze --latents nowhere --out OUT", "nowhere"),
        ("train digits --latents nowhere --out OUT", "nowhere"),
        ("sample --checkpoint nowhere --out OUT", "nowhere does not exist"),
        ("evaluate --checkpoint nowhere", "nowhere does not exist"),
        ("evaluate --samples nowhere --reference digits", "nowhere does not exist"),
        ("plan digits --latents nowhere", "nowhere"),
    ],
)
def test_a_failure_gives_1_and_one_sentence(arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = jlt(*arguments.split(), "--json")
    assert outcome.code == 1
    # A problem is the result of `verify`; the other commands have none.
    assert expected in (json.dumps(outcome.data) if arguments.startswith("verify") else outcome.err)
    if not arguments.startswith("verify"):
        assert outcome.out == ""
        assert len(outcome.err.strip().splitlines()) == 1
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


# ---- the process ----


def test_exit_codes_and_tracebacks_of_the_process():
    assert jlt_process("--help").code == 0
    plain, debugged = jlt_process("report", "nowhere"), jlt_process("report", "nowhere", "--debug")
    assert plain.code == debugged.code == 1
    assert "Traceback" not in plain.err
    assert "Traceback" in debugged.err
    assert plain.err.strip().splitlines()[-1] == debugged.err.strip().splitlines()[-1]
    assert plain.out == debugged.out == ""
    assert jlt_process("trian").code == 2


def test_a_closed_pipe_gives_no_traceback():
    """As in `jlt train ... --print-config | head -1`."""
    script = f"{sys.executable} -m jlt.cli.main train digits --print-config --json | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


# ---- the whole chain ----


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """A folder with a store of the digits, a run of a few steps on it, and some images; tests must not change it."""
    folder = tmp_path_factory.mktemp("chain")
    source = open_source("digits")
    for index in range(60):
        image, label = source[index]
        (folder / "images" / str(label)).mkdir(parents=True, exist_ok=True)
        image.save(folder / "images" / str(label) / f"{index:04d}.png")
    latents, run = folder / "latents", folder / "run"
    encoding = ["--images", "digits", "--autoencoder", "tiny", "--resolution", 32, "--batch-size", 256]
    manifest = done("encode", *encoding, "--no-flips", "--dtype", "float32", "--out", latents)
    assert (manifest["count"], manifest["channels"], manifest["height"]) == (1797, 16, 4)
    arguments = ["--steps", 40, "--batch-size", 16, "--checkpoint-every", 20, "--log-every", 10]
    trained = done("train", "digits", "--latents", latents, "--out", run, *arguments)
    assert Path(trained["checkpoint"]) == run / "checkpoints" / "step_0000040"
    return folder


def test_from_images_to_a_report(chain, tmp_path):
    latents, reference = chain / "latents", chain / "images"
    assert done("verify", latents)["problems"] == []
    geometry = done("analyze", "--latents", latents, "--out", tmp_path / "geometry")
    assert set(geometry["tokens"]) == {"1", "2"}
    assert read_sealed_json(tmp_path / "geometry" / "geometry.json") == geometry
    assert (tmp_path / "geometry" / "report.html").stat().st_size > 10_000

    run = tmp_path / "run"
    shutil.copytree(chain / "run", run)
    assert done("verify", run)["problems"] == []
    written = {
        form: Path(done("sample", "--checkpoint", run, "--out", tmp_path / form, *SAMPLES, "--format", form)["written"])
        for form in ("png", "npz", "grid")
    }
    with np.load(written["npz"]) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert (images.shape, images.dtype) == ((23, 32, 32, 3), np.uint8)
    assert labels.tolist() == [index % 10 for index in range(23)]
    numbered = sorted(written["png"].glob("*.png"))
    assert [path.name for path in numbered] == [f"{index:06d}.png" for index in range(23)]
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in numbered]), images)
    with Image.open(written["grid"]) as grid:
        # Five columns of 23 images, enlarged three times, with the names of their classes.
        names = [str(index % 10) for index in range(23)]
        assert np.array_equal(np.asarray(grid), np.asarray(draw_sheet(images, 5, SheetText(captions=names), 96)))

    from_checkpoint = done("evaluate", "--checkpoint", run, "--reference", reference, *SAMPLES)
    from_array = done("evaluate", "--samples", written["npz"], "--reference", reference)
    from_folder = done("evaluate", "--samples", written["png"], "--reference", reference)
    assert from_checkpoint["metrics"] == from_array["metrics"] == from_folder["metrics"]
    assert from_checkpoint["metrics"]["label_agreement"] is not None
    assert from_folder["protocol"]["drawn"]["checkpoint"] == from_checkpoint["protocol"]["checkpoint"]
    assert from_checkpoint["metrics"]["count"] == 23
    assert from_checkpoint["metrics"]["frechet_distance"] > 0
    assert from_checkpoint["protocol"]["reference"] == from_array["protocol"]["reference"]

    other_seed = done("evaluate", "--checkpoint", run, "--reference", reference, *SAMPLES, "--seed", 1)
    assert other_seed["metrics"]["frechet_distance"] != from_array["metrics"]["frechet_distance"]
    kept = [without_seal(read_json(path)) for path in (run / "evaluations").iterdir()]
    assert sorted(kept, key=lambda result: result["protocol"]["seed"]) == [from_checkpoint, other_seed]

    page = Path(done("report", run)["report"]).read_text(encoding="utf-8")
    assert "JLT-XS/1" in page


def test_the_same_command_again_changes_nothing(chain):
    before = file_bytes(chain)
    arguments = ["--steps", 40, "--batch-size", 16, "--checkpoint-every", 20, "--log-every", 10]
    done("train", "digits", "--latents", chain / "latents", "--out", chain / "run", *arguments)
    assert file_bytes(chain) == before


def test_output_is_text_or_json(chain):
    text, data = jlt("verify", chain / "latents"), jlt_process("verify", chain / "latents", "--json")
    assert text.out == f"{chain / 'latents'} is valid.\n"
    assert data.data == {"folder": str(chain / "latents"), "problems": []}
    assert (text.code, data.code) == (0, 0)


def test_overrides_reach_the_run(chain):
    arguments = ["--prediction", "v", "--network.depth", 2, "--loss.weighting", "published", "--timesteps.P-mean", 0]
    config = done("train", "digits", "--latents", chain / "latents", "--print-config", *arguments)
    assert (config["prediction"], config["network"]["depth"]) == ("v", 2)
    assert (config["loss"]["weighting"], config["timesteps"]["P_mean"]) == ("published", 0.0)
    assert config["name"] == "DiT-64x2/1"
    assert config["network"]["channels"] == 16


def test_a_plan_takes_its_latents_from_the_store(chain):
    plan = done("plan", "digits", "--latents", chain / "latents", "--steps", 500, "--gpu", "L4")
    stored = sum(path.stat().st_size for path in (chain / "latents").glob("*.safetensors"))
    assert plan["disk"]["latent_store"]["value"] == stored
    assert plan["work"]["epochs"]["value"] == pytest.approx(500 * 64 / 1797)
    assert plan["fits"]


def test_an_unknown_ema_gets_the_nearest(chain, tmp_path):
    outcome = jlt("sample", "--checkpoint", chain / "run", "--out", tmp_path / "out", "--ema", "0.999")
    assert outcome.code == 2
    assert "did you mean 0.99" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damaged", ["latents/shard-00000.safetensors", "run/checkpoints/step_0000020/ema_0.99.safetensors"]
)
def test_verify_is_1_after_one_flipped_bit_and_names_the_file(chain, tmp_path, damaged):
    whole = damaged.partition("/")[0]
    shutil.copytree(chain / whole, tmp_path / whole)
    content = bytearray((tmp_path / damaged).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / damaged).write_bytes(content)
    text, data = jlt("verify", tmp_path / whole), jlt("verify", tmp_path / whole, "--json")
    assert text.code == data.code == 1
    assert damaged in text.out
    assert [damaged in problem for problem in data.data["problems"]] == [True]


# ---- folders of others ----

WRITERS = {
    "encode": ["encode", "--images", "CHAIN/images", "--autoencoder", "tiny", "--resolution", 32, "--out", "OUT"],
    "train": ["train", "digits", "--latents", "CHAIN/latents", "--out", "OUT", "--steps", 2, "--batch-size", 4],
    "sample": ["sample", "--checkpoint", "CHAIN/run", "--out", "OUT", "--num", 2, "--steps", 1],
    "ablate": ["ablate", "digits", "--latents", "CHAIN/latents", "--out", "OUT", "--steps", 2],
    "quickstart": ["quickstart", "--out", "OUT", "--steps", 2],
    "analyze": ["analyze", "--latents", "CHAIN/latents", "--out", "OUT"],
}
LOOKALIKES = {
    "encode": "manifest.json",
    "train": "config.json",
    "sample": "protocol.json",
    "ablate": "plan.json",
    "quickstart": "latents/manifest.json",
    "analyze": "geometry.json",
}


@pytest.mark.parametrize("content", ["thesis.tex", "a file that looks like the command's own", "report.html"])
@pytest.mark.parametrize("command", WRITERS)
def test_a_foreign_folder_is_left_as_it_is(chain, tmp_path, command, content):
    out = tmp_path / "out"
    path = out / (LOOKALIKES[command] if " " in content else content)
    path.parent.mkdir(parents=True)
    path.write_text('{"precious": 1}')
    arguments = [str(argument).replace("CHAIN", str(chain)).replace("OUT", str(out)) for argument in WRITERS[command]]
    outcome = jlt(*arguments)
    assert file_bytes(out) == {path.relative_to(out).as_posix(): b'{"precious": 1}'}
    assert outcome.code == 1
    assert str(out) in outcome.err
    assert "Error:" not in outcome.err


@pytest.mark.parametrize("command", WRITERS)
def test_a_file_in_place_of_the_folder_is_left_and_named(chain, tmp_path, command):
    out = tmp_path / "out"
    out.write_text("precious")
    arguments = [str(argument).replace("CHAIN", str(chain)).replace("OUT", str(out)) for argument in WRITERS[command]]
    outcome = jlt(*arguments)
    assert out.read_text() == "precious"
    assert outcome.code == 1
    assert str(out) in outcome.err
    # The sentence states the remedy; that of the operating system does not.
    assert "Errno" not in outcome.err
