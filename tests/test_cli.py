"""The command line: its words, its manners towards files and streams, and the whole chain from images to a report."""

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

from jlt.cli.main import COMMANDS, main
from jlt.images.contact_sheet import SheetText, draw_sheet
from jlt.images.registry import open_source
from jlt.storage.files import read_sealed_json

NAMES = [
    "quickstart",
    "encode",
    "verify",
    "analyze",
    "plan",
    "train",
    "sample",
    "evaluate",
    "reference",
    "fetch",
    "sweep",
    "ablate",
    "report",
    "benchmark",
]
SAMPLES = ["--num", 23, "--steps", 3, "--cfg-scale", 1.5]


@dataclass(frozen=True)
class Answer:
    """What a command gave back."""

    code: int
    out: str
    err: str

    @property
    def data(self):
        """The one JSON object on stdout; anything beside it, or a NaN in it, is an error."""
        value = json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert isinstance(value, dict)
        assert self.out.count("\n") == 1
        return value


def jlt(*words) -> Answer:
    """Run a command in this process."""
    # With an encoding, as a terminal has one: the help draws its boxes by it.
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Answer(code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode())


def jlt_process(*words) -> Answer:
    """Run a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "jlt.cli.main", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def done(*words) -> dict:
    """Run a command that has to succeed and return its JSON."""
    answer = jlt(*words, "--json")
    assert answer.code == 0, answer.err
    return answer.data


# ---- help ----


def listed_verbs() -> dict[str, str]:
    """Return the verbs of `jlt --help` with their one-line descriptions."""
    answer = jlt("--help")
    assert answer.code == 0
    words = " ".join(line.strip("│ ") for line in answer.out.splitlines())
    entries = words.partition("(required)")[2].split("•")[1:]
    pairs = [entry.strip("╰─╯ ").split(maxsplit=1) for entry in entries]
    return {name: " ".join(summary.split()) for name, summary in pairs}


def test_the_verbs_listed_are_those_that_exist():
    assert list(listed_verbs()) == NAMES == [verb.__name__.lower() for verb in COMMANDS]


def test_help_of_the_program_is_short():
    answer = jlt("--help")
    assert len(answer.out.splitlines()) < 60
    assert answer.err == ""


@pytest.mark.parametrize("verb", NAMES)
def test_help_of_a_verb_is_short_and_has_an_example(verb):
    answer = jlt(verb, "--help")
    assert answer.code == 0
    assert answer.err == ""
    # What draws images has the sampler's settings besides its own.
    assert len(answer.out.splitlines()) < 90
    example = re.search(r"For example:\s+(jlt .*)", answer.out)
    assert example, answer.out
    assert example[1].split()[1] == verb


@pytest.mark.parametrize("verb", NAMES)
def test_the_line_for_a_verb_is_its_first_clause_whole(verb):
    clause = listed_verbs()[verb].removesuffix(".")
    described = " ".join(jlt(verb, "--help").out.split())
    _, found, rest = described.partition(clause)
    assert found, f"{verb} describes itself otherwise than {clause!r}"
    assert re.match(r"[.;:]( |$)", rest), f"{clause!r} breaks off before {rest[:20]!r}"


@pytest.mark.parametrize("verb", NAMES)
def test_the_example_of_a_verb_can_be_parsed(verb):
    from jlt.cli.main import parse

    example = re.search(r"For example:\s+jlt (.*)", jlt(verb, "--help").out)[1]
    parsed = parse(example.split())
    assert type(parsed).__name__.lower() in (verb, f"train{verb}")


@pytest.mark.parametrize("what", ["train", "data", "encode"])
def test_every_benchmark_explains_itself(what):
    from jlt.cli.main import parse

    answer = jlt("benchmark", what, "--help")
    assert (answer.code, answer.err) == (0, "")
    example = re.search(r"For example:\s+jlt (.*)", answer.out)[1]
    assert type(parse(example.split())).__name__.lower() == f"{what}benchmark"


def test_adoption_explains_itself():
    answer = jlt("encode", "--adopt", "somewhere", "--help")
    assert (answer.code, answer.err) == (0, "")
    assert "beside them" in answer.out


# ---- wrong words ----


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        ("trian digits", "train"),
        ("train digts", "digits"),
        ("train imagenet256-jltb1", "imagenet256-jlt-b1"),
        ("train digits --network.dpeth 2 --print-config", "--network.depth"),
        ("train digits --netwrok.depth 2 --print-config", "--network.depth"),
        ("train digits --optimizer.learning-rat 2 --print-config", "--optimizer.learning-rate"),
        ("train digits --latnets there --print-config", "--latents"),
        ("train digits --prediction velocity --print-config", "'v'"),
        ("train digits --loss.space u --print-config", "'eps'"),
        ("encode --images digits --autoencoder tinny --out OUT", "tiny"),
        ("encode --images digit --autoencoder tiny --out OUT", "digits"),
        ("encode --images digits --autoencoder tiny --out OUT --resolutoin 32", "--resolution"),
        ("sample --checkpoint OUT --out OUT --solver huen", "heun"),
        ("sample --checkpoint OUT --out OUT --format pgn", "png"),
        ("sample --checkpoint OUT --out OUT --slover heun", "--solver"),
        ("evaluate --samples OUT --features digit", "digits"),
        ("evaluate --samples OUT --featurs digits", "--features"),
        ("plan digits --gpu H2000", "H200"),
        ("plan digits --gpsu 8", "--gpus"),
        ("plan digits --netwrok.depth 2", "--network.depth"),
        ("benchmark train --preset JLT-B1", "JLT-B/1"),
        ("benchmark train --preset DiT-XL/2", "DiT-L/2"),
        ("benchmark trian", "train"),
    ],
)
def test_wrong_words_are_2_and_get_the_nearest(words, nearest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = jlt(*words.split())
    assert answer.code == 2
    assert answer.out == ""
    # Boxes may break a line within a sentence.
    assert nearest in " ".join(answer.err.split())
    assert "Traceback" not in answer.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", ["", "train", "encode --images digits", "train digits", "evaluate", "sample --num many"]
)
def test_words_that_do_not_suffice_are_2(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = jlt(*words.split())
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.strip()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("verify nowhere", "nowhere"),
        ("report nowhere", "nowhere"),
        ("analyze --latents nowhere --out OUT", "nowhere"),
        ("train digits --latents nowhere --out OUT", "nowhere"),
        ("sample --checkpoint nowhere --out OUT", "nowhere does not exist"),
        ("evaluate --checkpoint nowhere", "nowhere does not exist"),
        ("evaluate --samples nowhere", "nowhere does not exist"),
        ("plan digits --gpus 7", "batch_size 63 or 70"),
        ("plan digits --latents nowhere", "nowhere"),
        ("train digits --steps 0 --print-config", "steps must be positive"),
        ("train digits --network.patch-size 3 --print-config", "patch_size 3 does not divide"),
    ],
)
def test_a_failure_is_1_and_one_sentence(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = jlt(*words.split(), "--json")
    assert answer.code == 1
    # `verify` found a problem, and that is its result; the others have none.
    assert said in (json.dumps(answer.data) if words.startswith("verify") else answer.err)
    if not words.startswith("verify"):
        assert answer.out == ""
        assert len(answer.err.strip().splitlines()) == 1
    assert "Traceback" not in answer.err
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


def test_a_reader_that_leaves_early_gets_no_traceback():
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
    words = ["--steps", 40, "--batch-size", 16, "--checkpoint-every", 20, "--log-every", 10]
    trained = done("train", "digits", "--latents", latents, "--out", run, *words)
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
    kept = [json.loads(path.read_text()) for path in (run / "evaluations").iterdir()]
    kept = [{key: value for key, value in result.items() if key != "sha256"} for result in kept]
    assert sorted(kept, key=lambda result: result["protocol"]["seed"]) == [from_checkpoint, other_seed]

    page = Path(done("report", run)["report"]).read_text(encoding="utf-8")
    assert "JLT-XS/1" in page


def test_the_same_words_again_change_nothing(chain):
    before = file_bytes(chain)
    words = ["--steps", 40, "--batch-size", 16, "--checkpoint-every", 20, "--log-every", 10]
    done("train", "digits", "--latents", chain / "latents", "--out", chain / "run", *words)
    assert file_bytes(chain) == before


def test_a_person_reads_text_and_a_program_reads_json(chain):
    text, data = jlt("verify", chain / "latents"), jlt_process("verify", chain / "latents", "--json")
    assert text.out == f"{chain / 'latents'} is sound.\n"
    assert data.data == {"folder": str(chain / "latents"), "problems": []}
    assert (text.code, data.code) == (0, 0)


def test_overrides_reach_the_run(chain):
    words = ["--prediction", "v", "--network.depth", 2, "--loss.weighting", "published", "--timesteps.P-mean", 0]
    config = done("train", "digits", "--latents", chain / "latents", "--print-config", *words)
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
    answer = jlt("sample", "--checkpoint", chain / "run", "--out", tmp_path / "out", "--ema", "0.999")
    assert answer.code == 2
    assert "did you mean 0.99" in answer.err
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


@pytest.mark.parametrize("content", ["thesis.tex", "a file that looks like the verb's own", "report.html"])
@pytest.mark.parametrize("verb", WRITERS)
def test_a_foreign_folder_is_left_as_it_is(chain, tmp_path, verb, content):
    out = tmp_path / "out"
    path = out / (LOOKALIKES[verb] if " " in content else content)
    path.parent.mkdir(parents=True)
    path.write_text('{"precious": 1}')
    words = [str(word).replace("CHAIN", str(chain)).replace("OUT", str(out)) for word in WRITERS[verb]]
    answer = jlt(*words)
    assert file_bytes(out) == {path.relative_to(out).as_posix(): b'{"precious": 1}'}
    assert answer.code == 1
    assert str(out) in answer.err
    assert "Error:" not in answer.err


@pytest.mark.parametrize("verb", WRITERS)
def test_a_file_in_place_of_the_folder_is_left_and_named(chain, tmp_path, verb):
    out = tmp_path / "out"
    out.write_text("precious")
    words = [str(word).replace("CHAIN", str(chain)).replace("OUT", str(out)) for word in WRITERS[verb]]
    answer = jlt(*words)
    assert out.read_text() == "precious"
    assert answer.code == 1
    assert str(out) in answer.err
    # A sentence that says what to do, and not the operating system's.
    assert "Errno" not in answer.err
