"""Exported pipelines: the pixels of `jlt sample` where jlt cannot be imported, and every argument of the call."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from export_helpers import NAMES, run_alone, write_run
from safetensors.torch import load_file, save_file

from jlt.config import NetworkConfig, SampleConfig
from jlt.interop import standalone as standalone_module
from jlt.interop.export import export_folder
from jlt.interop.pipeline_settings import PIPELINE, TAEF2, TRANSFORMER, ExportConfig, PipelineSettings
from jlt.interop.standalone import standalone
from jlt.networks.transformer import build_network
from jlt.sampling.sampler import open_sampler

NO_CARD = ExportConfig(samples=0)
SYSTEMS = [("skip=0.3", 1), *((prediction, patch_size) for prediction in ("x", "eps", "v") for patch_size in (1, 2))]
SOLVERS = ("euler", "midpoint", "dpmpp_2m", "ancestral")
LABELS = [2, 0, 3]
GUIDED = {"num_inference_steps": 5, "guidance_scale": 2.5, "guidance_interval": (0.1, 0.9), "seed": 3}
PARTS = [PIPELINE, TRANSFORMER, TAEF2]


def expected(checkpoint, **changes):
    """The images of `jlt sample`."""
    settings = {"num": 3, "steps": 5, "cfg_scale": 2.5, "cfg_interval": (0.1, 0.9), "seed": 3, "labels": "2,0,3"}
    sampler = open_sampler(checkpoint, SampleConfig(**{**settings, **changes}))
    return next(sampler.batches()).images.numpy().astype(int)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    noisy = {"noise_scale": 1.3, "network": {"bottleneck_size": 4, "fixed_positions": True, "context_tokens": 3}}
    made = {system: write_run(root / "-".join(map(str, system)), *system) for system in SYSTEMS}
    return {**made, "parts": write_run(root / "parts", **noisy)}


@pytest.fixture(scope="module")
def folders(checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    return {
        key: export_folder(value, root / str(place), NO_CARD) for place, (key, value) in enumerate(checkpoints.items())
    }


@pytest.fixture(scope="module")
def drawn(folders, tmp_path_factory):
    """What the exported pipelines draw without jlt."""
    root = tmp_path_factory.mktemp("alone")
    changed = root / "changed"
    copy_with_a_changed_weight(folders["v", 1], changed)
    call = {"class_labels": LABELS, **GUIDED}
    jobs = [{"name": str(key), "folder": str(folder), "call": call} for key, folder in folders.items()]
    first = str(folders["v", 1])
    jobs += [{"name": solver, "folder": first, "call": {**call, "solver": solver}} for solver in SOLVERS]
    jobs += [
        {"name": "unguided", "folder": first, "call": {"class_labels": LABELS, "seed": 3}, "save": str(root / "saved")},
        {"name": "saved", "folder": str(root / "saved"), "call": call},
        {"name": "changed", "folder": str(changed), "call": call},
        {"name": "later", "folder": first, "call": {**call, "class_labels": [3], "first_number": 2}},
        {"name": "np", "folder": first, "call": {**call, "output_type": "np"}},
    ]
    return run_alone(jobs, root)


def copy_with_a_changed_weight(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    path = target / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["network.final.linear.weight"][3, 2] += 1.0
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize("system", [*SYSTEMS, "parts"], ids=str)
def test_the_images_are_those_of_jlt_sample(drawn, checkpoints, system):
    difference = abs(drawn[str(system)].astype(int) - expected(checkpoints[system]))
    assert difference.max() <= 1
    # Not a grey picture, of which everything is within a level.
    assert drawn[str(system)].std() > 10


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_draws_the_same_images(drawn, checkpoints, solver):
    assert abs(drawn[solver].astype(int) - expected(checkpoints["v", 1], solver=solver)).max() <= 1
    assert abs(drawn[solver].astype(int) - drawn[str(("v", 1))]).max() > 5


def test_the_defaults_are_those_of_jlt_sample(drawn, checkpoints):
    unguided = expected(checkpoints["v", 1], cfg_scale=1.0, cfg_interval=(0.0, 1.0), steps=50)
    assert abs(drawn["unguided"].astype(int) - unguided).max() <= 1


def test_a_changed_weight_changes_them(drawn):
    assert abs(drawn["changed"].astype(int) - drawn[str(("v", 1))]).max() > 5


def test_a_saved_pipeline_loads_again_with_its_code(drawn):
    assert (drawn["saved"] == drawn[str(("v", 1))]).all()


def test_an_image_depends_on_its_number_alone(drawn):
    assert abs(drawn["later"][0].astype(int) - drawn[str(("v", 1))][2]).max() <= 1


def test_arrays_are_in_0_to_1(drawn):
    levels = drawn[str(("v", 1))]
    assert drawn["np"].shape == levels.shape
    np.testing.assert_allclose(drawn["np"] * 255, levels, atol=0.51)


# The code in the folder


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part[0])
def test_the_code_defines_every_name_and_imports_no_jlt(part, tmp_path):
    source = standalone(f"jlt.interop.exported.{part[0]}")
    (tmp_path / f"{part[0]}.py").write_text(source)
    options = ["check", "--isolated", "--select", "F", "--no-cache", str(tmp_path)]
    done = subprocess.run([Path(sys.executable).with_name("ruff"), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "import jlt" not in source
    assert "from jlt" not in source
    assert "jaxtyping" not in source.replace("jlt.interop", "")


def test_the_network_in_the_code_gives_equal_bits(monkeypatch, tmp_path):
    (tmp_path / "transformer_jlt.py").write_text(standalone("jlt.interop.exported.transformer_jlt"))
    monkeypatch.syspath_prepend(tmp_path)
    alone = importlib.import_module("transformer_jlt")
    monkeypatch.delitem(sys.modules, "transformer_jlt")
    sizes = {"channels": 6, "height": 4, "width": 8, "num_classes": 5, "hidden_size": 24, "depth": 3, "num_heads": 2}
    config = NetworkConfig(**sizes, patch_size=2, bottleneck_size=5, fixed_positions=True, context_tokens=4)
    network = build_network(config, 0)
    generator = torch.Generator().manual_seed(1)
    weights = {key: torch.randn(value.shape, generator=generator) for key, value in network.state_dict().items()}
    network.load_state_dict(weights)
    model = alone.JLTTransformer(**vars(config))
    model.network.load_state_dict(weights)
    z, t = torch.randn(2, 6, 4, 8, generator=generator), torch.tensor([0.2, 0.9])
    labels = torch.tensor([1, 5])
    with torch.no_grad():
        assert torch.equal(model(z, t, labels), network(z, t, labels))


def test_the_settings_of_both_classes_are_those_of_jlt(folders, load):
    pipe = load(folders["v", 1])
    ours = {name: entry.default for name, entry in inspect.signature(type(pipe.transformer)).parameters.items()}
    fields = {
        entry.name: inspect.Parameter.empty if entry.default is dataclasses.MISSING else entry.default
        for entry in dataclasses.fields(NetworkConfig)
    }
    assert ours == fields
    settings = {entry.name for entry in dataclasses.fields(PipelineSettings)}
    assert {*inspect.signature(type(pipe)).parameters} == {"transformer", "vae", *settings}


def test_two_definitions_of_one_name_are_refused(monkeypatch):
    def module(name, imported, **defined):
        definitions = {key: standalone_module._Definition(key, frozenset(used), False) for key, used in defined.items()}
        return standalone_module._Module(
            name, "", definitions, {key: (origin, key) for key, origin in imported.items()}
        )

    modules = [
        module("jlt.entry", {"first": "jlt.a", "second": "jlt.b"}, both=["first", "second"]),
        module("jlt.a", {}, first=["SIZE"], SIZE=[]),
        module("jlt.b", {}, second=["SIZE"], SIZE=[]),
    ]
    monkeypatch.setattr(standalone_module, "_read", {entry.name: entry for entry in modules}.__getitem__)
    with pytest.raises(ValueError, match=r"jlt\.a and jlt\.b both define SIZE"):
        standalone("jlt.entry")


# The call


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load pipelines in this process, with a cache of their code that no other process uses."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def loaded(folder, **options):
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, low_cpu_mem_usage=False, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    yield loaded
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        del sys.modules[name]


@pytest.fixture
def pipe(folders, load):
    return load(folders["v", 1])


def levels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_a_folder_is_not_loaded_without_trust(folders, tmp_path):
    from diffusers import DiffusionPipeline

    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folders["v", 1])


def test_two_folders_in_one_process_keep_their_own_code(folders, load, tmp_path):
    """diffusers itself runs the code of both in one module, so the first would use the functions of the second."""
    other = tmp_path / "other"
    shutil.copytree(folders["x", 2], other)
    path = other / "pipeline.py"
    path.write_text(path.read_text().replace("levels = ((images + 1) * 127.5)", "levels = ((images + 1) * 0)"))
    first = load(folders["v", 1])
    before = levels(first([0], num_inference_steps=1).images)
    second = load(other)
    assert levels(second([0], num_inference_steps=1).images).max() == 0
    assert (levels(first([0], num_inference_steps=1).images) == before).all()
    first.save_pretrained(tmp_path / "saved")
    for name in ("pipeline.py", "transformer/transformer_jlt.py"):
        assert (tmp_path / "saved" / name).read_text() == (folders["v", 1] / name).read_text()
    assert (levels(load(tmp_path / "saved")([0], num_inference_steps=1).images) == before).all()


def test_labels_are_numbers_or_names(pipe):
    numbers = levels(pipe([0, 1, 0], num_inference_steps=2).images)
    assert (levels(pipe(["tench", "Goldfish", NAMES[0]], num_inference_steps=2).images) == numbers).all()
    assert (levels(pipe(["tinca tinca", "1", NAMES[0].upper()], num_inference_steps=2).images) == numbers).all()
    tensor = pipe(torch.tensor([0, 1, 0]), num_inference_steps=2).images
    assert (levels(tensor) == numbers).all()
    assert (levels(pipe("tench", num_inference_steps=2).images)[0] - numbers[0] <= 1).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([4], "no class 4: the network knows the classes 0 to 3"),
        (-1, "no class -1"),
        ([True], "no class True"),
        (["tensch"], "no class named 'tensch': did you mean tench"),
        (["crane"], r"Several classes are named 'crane': .*\[2, 3\]"),
        ([0.5], "a number or a name, not 0.5"),
        ([], "class_labels is empty"),
    ],
)
def test_labels_that_do_not_exist_are_refused(pipe, labels, message):
    with pytest.raises(ValueError, match=message):
        pipe(labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be 1 or more"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval must satisfy"),
        ({"solver": "rk4"}, "solver must be one of euler, heun.*'rk4'"),
        ({"output_type": "jpeg"}, "output_type must be one of pil, np, pt, latent"),
    ],
)
def test_wrong_arguments_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe([0], **arguments)


def test_a_network_without_a_null_class_has_no_guidance(tmp_path, load):
    pipe = load(export_folder(write_run(tmp_path / "run", label_dropout=0.0), tmp_path / "out", NO_CARD))
    with pytest.raises(ValueError, match="guidance needs its null class"):
        pipe([0], guidance_scale=2.0)
    assert len(pipe([0], num_inference_steps=1).images) == 1


def test_latents_and_tensors(pipe, checkpoints):
    sampler = open_sampler(checkpoints["v", 1], SampleConfig(num=3, steps=2, labels="2,0,3"))
    latents = pipe(LABELS, num_inference_steps=2, output_type="latent").images
    torch.testing.assert_close(latents, next(sampler.latent_sampler.batches()).latents)
    images = pipe(LABELS, num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(images, sampler.autoencoder.decode(latents) / 2 + 0.5)
    assert pipe(LABELS, num_inference_steps=2, return_dict=False)[0][0].size == (32, 32)


def test_generators_draw_the_noise(pipe, checkpoints):
    noise = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(5))
    seen = []
    options = {"num_inference_steps": 2, "output_type": "latent", "solver": "euler"}
    pipe(
        LABELS,
        generator=torch.Generator().manual_seed(5),
        callback_on_step_end=lambda _pipe, step, t, values: seen.append((step, t, values["latents"])),
        **options,
    )
    assert [(step, t) for step, t, _ in seen] == [(0, 0.0), (1, 0.5)]
    # One Euler step of half the time goes half of the velocity.
    with torch.no_grad():
        velocity = pipe.transformer(noise, torch.zeros(3), torch.tensor(LABELS))
    torch.testing.assert_close(seen[0][2], noise + velocity / 2, rtol=1e-4, atol=1e-3)
    each = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    pair = pipe([0, 0], generator=each, **options).images
    alone = pipe([0], generator=torch.Generator().manual_seed(2), **options).images
    torch.testing.assert_close(pair[1:], alone, rtol=1e-3, atol=1e-3)


def test_a_callback_may_change_the_state(pipe):
    def halve(_pipe, step, t, values):
        return {"latents": values["latents"] / 2} if step == 1 else None

    options = {"num_inference_steps": 2, "output_type": "latent"}
    changed = pipe(LABELS, callback_on_step_end=halve, **options).images
    torch.testing.assert_close(changed, pipe(LABELS, **options).images / 2)


def test_half_precision_is_close(pipe):
    whole = pipe(LABELS, num_inference_steps=3, output_type="latent").images
    half = pipe.to(torch.bfloat16)(LABELS, num_inference_steps=3, output_type="latent").images
    assert half.dtype == torch.float32
    assert (half - whole).norm() < 0.2 * whole.norm()
    assert len(pipe(LABELS, num_inference_steps=1).images) == 3
