"""The report: what it reads and refuses, its sentences for every outcome, and that one file is enough."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_results import (
    FINAL,
    GaussianStore,
    analyze,
    config,
    geometry,
    log_by_time,
    read_content,
    write_ablation,
    write_log,
    write_run,
    write_sealed,
    write_watched_run,
)
from PIL import Image

from jlt.errors import JLTError
from jlt.report import findings, sample_grids
from jlt.report.geometry_text import advice_sentences, spectrum_sentence
from jlt.report.page import command, matched_statements, page_facts, set_aside_table, settings, write_report
from jlt.report.result_rows import result_rows
from jlt.report.run_figures import run_figures, thinned
from jlt.report.study import Study, read_study
from jlt.report.terminal import metrics_table, results_table
from jlt.report.training_figures import training_figure
from jlt.report.wording import number
from jlt.results.evaluation import Metrics
from jlt.results.files import write_result
from jlt.results.run import log_line, read_log
from jlt.storage.files import work_of, write_marker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ablation of six systems, one seed; tests must not change it."""
    return write_ablation(tmp_path_factory.mktemp("ablation"))


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def study_of(folder: Path, seeds: tuple[int, ...] = (0,), **final: float) -> Study:
    """Return an ablation with chosen final distances, given as x1=20, v2=37."""
    chosen = {(name[:-1], int(name[-1])): value for name, value in final.items()}
    predictions = list(dict.fromkeys(prediction for prediction, _ in chosen))
    patch_sizes = sorted({patch_size for _, patch_size in chosen})
    return read_study(write_ablation(folder, predictions, patch_sizes, seeds, chosen))


# Sentences


def test_a_clear_order_is_named_with_its_numbers(folder: Path) -> None:
    study = read_study(folder)
    assert findings.verdict(study) == "Clean prediction (x) reaches the lowest Fréchet distance at patch 1 and patch 2."
    sentences = findings.details(study)
    assert sentences[0] == (
        "At patch 1, clean prediction (x) reaches a Fréchet distance of 20.1, velocity prediction (v) 37.2 and noise "
        "prediction (ε) 310. Relative to x, v is 1.9 times as high and ε is 15 times as high."
    )
    assert "single seed: the spread between seeds was not measured" in sentences[2]
    assert sentences[3].endswith("This measurement agrees at patch 1 and patch 2.")


def test_the_opposite_order_is_reported_as_plainly(tmp_path: Path) -> None:
    study = study_of(tmp_path, x1=37.2, v1=20.1)
    assert findings.verdict(study) == "Velocity prediction (v) reaches the lowest Fréchet distance at patch 1."
    assert any("shows the opposite at patch 1" in text for text in findings.details(study))


def test_a_near_tie_of_single_seeds_has_no_winner(tmp_path: Path) -> None:
    study = study_of(tmp_path, x1=20.0, v1=21.6, x2=20.0, v2=40.0)
    assert findings.verdict(study) == (
        "Clean prediction (x) reaches the lowest Fréchet distance at patch 2; at patch 1 it is too close to call."
    )
    sentences = findings.details(study)
    assert "Velocity prediction (v) is only 8% higher: one seed cannot settle that." in sentences[0]
    assert any("is undecided at patch 1 and agrees at patch 2" in text for text in sentences)


def test_ranges_over_seeds_decide_where_there_are_seeds(tmp_path: Path) -> None:
    apart = study_of(tmp_path / "apart", seeds=(0, 1, 2), x1=20.0, v1=22.5)  # 20 to 22 against 22.5 to 24.75
    assert findings.verdict(apart) == "Clean prediction (x) reaches the lowest Fréchet distance at patch 1."
    assert "21.0 (20.0 to 22.0)" in findings.details(apart)[0]
    assert "means over 3 seeds" in findings.details(apart)[1]
    overlapping = study_of(tmp_path / "overlapping", seeds=(0, 1, 2), x1=20.0, v1=21.9)
    assert findings.verdict(overlapping).startswith("No prediction stands out")
    assert "their ranges over seeds overlap" in findings.details(overlapping)[0]


def test_systems_that_draw_noise_are_not_ranked(tmp_path: Path) -> None:
    study = study_of(tmp_path, x1=9000.0, v1=6000.0)  # label agreement of 9% and 13% among ten classes
    assert findings.verdict(study) == "Too early to tell: no system draws recognisable samples yet."
    sentences = findings.details(study)
    assert sentences[0].startswith("At most 13.0% of any system's samples show the label")
    assert not any("paper claims" in text for text in sentences)


def test_winners_that_differ_by_patch_size_are_both_named(tmp_path: Path) -> None:
    assert findings.verdict(study_of(tmp_path, x1=30.0, v1=20.0, x2=20.0, v2=30.0)) == (
        "Velocity prediction (v) reaches the lowest Fréchet distance at patch 1; clean prediction (x) reaches the "
        "lowest Fréchet distance at patch 2."
    )


def test_a_system_that_is_still_training_is_not_ranked(tmp_path: Path) -> None:
    write_ablation(tmp_path, ["x", "v", "eps"], [1])
    (tmp_path / "runs/x-v-p1-s0/evaluations/step_0001500.json").unlink()
    study = read_study(tmp_path)
    assert findings.verdict(study) == "Velocity prediction (v) reaches the lowest Fréchet distance at patch 1."
    assert any(
        "Not yet evaluated at step 1,500: JLT-XS/1. The comparison is provisional." in t
        for t in findings.details(study)
    )
    last = result_rows(study)[-1]
    assert (last.system.name, last.cells[0].text) == ("JLT-XS/1", "—")
    assert last.note == "at step 1,500; not evaluated at 1,500"


def test_the_nine_cells_are_compared_within_each_loss_space(tmp_path: Path) -> None:
    final = {("x", 1): 20.0, ("v", 1): 30.0, ("eps", 1): 90.0}
    study = read_study(write_ablation(tmp_path, ("x", "v", "eps"), (1,), (0,), final, loss_spaces=("x", "eps", "v")))
    assert len(study.systems) == 9
    assert findings.verdict(study) == "Clean prediction (x) reaches the lowest Fréchet distance in all 3 comparisons."
    assert findings.details(study)[0].startswith("At patch 1 with an ε-space loss, clean prediction (x) reaches ")
    assert {row.kind for row in result_rows(study)} >= {
        "noise (ε), patch 1, x-space loss",
        "clean (x), patch 1, v-space loss",
    }
    assert "Losses in different spaces are not on one scale" in " ".join(findings.limits(study))
    figure = training_figure(study)
    assert figure is not None
    assert (len(figure.panels), len(figure.legend)) == (12, 3)
    write_report(tmp_path)


def test_a_perfect_score_divides_nothing_by_zero(tmp_path: Path) -> None:
    sentences = findings.details(study_of(tmp_path, x1=0.0, v1=30.0, eps1=0.0))
    assert sentences[0].startswith("At patch 1, clean prediction (x) reaches a Fréchet distance of 0")


def test_a_spectrum_has_a_sentence() -> None:
    entry = geometry().tokens[2]
    sentence = spectrum_sentence(replace(entry, eigenvalues=(1.9, 0.05, 0.05)))
    assert "2 directions vary less than a tenth as much as the noise" in sentence
    assert "5.0% of the variance of x but 42.0% of that of v" in sentence  # 0.1 / 2 and 2.1 / 5
    flat = spectrum_sentence(replace(entry, eigenvalues=(1.0, 1.0, 0.9)))
    assert "None of them varies less than a tenth as much as the noise" in flat


def test_limits_follow_from_what_was_done(tmp_path: Path) -> None:
    one = " ".join(findings.limits(study_of(tmp_path / "one", x1=20.0, v1=30.0)))
    assert "not Inception" in one
    assert "A single seed" in one
    three = " ".join(findings.limits(study_of(tmp_path / "three", seeds=(0, 1, 2), x1=20.0, v1=30.0)))
    assert "A single seed" not in three
    assert "3 seeds per system" in three


def test_a_distance_in_squeezenets_features_is_not_called_an_fid(tmp_path: Path) -> None:
    study = study_of(tmp_path, x1=20.0, v1=30.0)
    text = "SqueezeNet, not Inception's: none of them is an FID"
    assert text not in " ".join(findings.limits(study))
    for run in study.runs:
        for found in run.evaluations:
            found.protocol["extractor"]["name"] = "squeezenet"
    assert text in " ".join(findings.limits(study))


# Tables


def test_rows_are_ordered_and_the_best_of_each_column_marked(folder: Path) -> None:
    rows = result_rows(read_study(folder))
    assert [row.system.name for row in rows] == [
        "JLT-XS/1", "DiT-XS/1", "DiT-eps-XS/1", "JLT-XS/2", "DiT-XS/2", "DiT-eps-XS/2",
    ]  # fmt: skip
    assert [[cell.best for cell in row.cells] for row in rows] == [[False] * 3] * 3 + [[True] * 3] + [[False] * 3] * 2
    assert [row.cells[0].text for row in rows] == ["20.1", "37.2", "310", "18.3", "126", "820"]
    assert rows[0].seconds == "32 s"


def test_settings_that_differ_are_read_back_from_the_runs(folder: Path) -> None:
    shared, differing = settings(read_study(folder))
    assert differing.header == ["Run", "name", "prediction", "network.patch_size"]
    assert differing.rows[0] == ["x-v-p1-s0", "JLT-XS/1", "x", "1"]
    assert shared["loss.space"] == "v"


def test_shared_hashes_become_sentences(tmp_path: Path) -> None:
    study = study_of(tmp_path, seeds=(0, 1), x1=20.0, v1=30.0, x2=20.0, v2=30.0)
    texts = matched_statements(study)
    assert any(
        text.startswith("Same initial weights, bit for bit, at each seed: JLT-XS/1 and DiT-XS/1 (") for text in texts
    )
    assert any(
        "label drops, bit for bit, at each seed: JLT-XS/1, DiT-XS/1, JLT-XS/2 and DiT-XS/2 (" in t for t in texts
    )
    facts = read_content(tmp_path / "ablation.json")
    facts["matched"]["draws"]["x-v-p1-s0"] = "0" * 64
    write_sealed(tmp_path / "ablation.json", facts)
    assert any(
        text.startswith("No other system has the sample order") for text in matched_statements(read_study(tmp_path))
    )


def test_the_command_names_what_was_compared(folder: Path) -> None:
    expected = (
        "jlt ablate digits --latents LATENTS --out OUT --prediction x v eps --loss-space v --patch-size 1 2 --seed 0"
    )
    assert command(read_study(folder)) == expected


# Files


@pytest.mark.parametrize("change", [{"solver": "euler"}, {"reference": {"sha256": "9" * 64}}, {"extractor": None}])
def test_unlike_evaluations_are_refused_and_the_difference_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    write_ablation(tmp_path, ["x", "v"], [1])
    path = tmp_path / "runs/v-v-p1-s0/evaluations/step_0001500.json"
    evaluation = read_content(path)
    evaluation["protocol"].update(change)
    write_sealed(path, evaluation)
    with pytest.raises(JLTError, match=rf"evaluated differently .* {next(iter(change))}[.\w]* is ") as caught:
        write_report(tmp_path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_a_second_way_of_evaluating_a_step_is_set_aside_and_named(tmp_path: Path) -> None:
    write_ablation(tmp_path, ["x", "v"], [1])
    path = tmp_path / "runs/v-v-p1-s0/evaluations/step_0001500.json"
    evaluation = read_content(path)
    evaluation["protocol"]["cfg_scale"] = 2.9
    evaluation["metrics"]["frechet_distance"] = 1.0
    write_sealed(path.with_stem("step_0001500-guided"), evaluation)
    study = read_study(tmp_path)
    assert findings.verdict(study) == "Clean prediction (x) reaches the lowest Fréchet distance at patch 1."
    assert set_aside_table(study).rows == [("v-v-p1-s0", "1,500", "cfg_scale 2.9", "1.00")]
    assert "cfg_scale 2.9" in write_report(tmp_path).read_text(encoding="utf-8")


def test_an_analysis_of_latents_has_a_page(tmp_path: Path) -> None:
    geometry = analyze(GaussianStore(), [1, 2], [64])
    needed = geometry.tokens[1].forecast.needed_directions
    write_result(tmp_path / "geometry.json", geometry)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "7 directions vary less than a tenth as much as the noise." in page
    expected = f"it needs {number(needed['x'])} of 16 directions where velocity prediction (v) needs {needed['v']:.1f}."
    assert f"At patch 1 clean prediction (x) is expected to win: {expected}" in page
    assert all(text in page for text in advice_sentences(geometry))
    assert re.findall(r'<section id="(\w+)"', page) == ["geometry", "limits", "protocol", "reproduce"]


def test_a_log_that_is_being_written_is_read_up_to_its_torn_line(tmp_path: Path, capsys: Any) -> None:
    write_run(tmp_path, "x", 1, 0, 20.0)
    for path in tmp_path.glob("evaluations/*"):
        path.unlink()
    steps = [{"event": "step", "step": step, "loss": loss} for step, loss in ((10, 1.0), (20, 9.0), (20, 2.0))]
    log = write_log(tmp_path, *steps[:2], {"event": "start", "step": 10}, steps[2])
    log.write_text(log.read_text() + '{"event": "ste')
    run = read_study(tmp_path).runs[0]
    assert [(logged.step, logged.loss) for logged in run.log.steps] == [(10, 1.0), (20, 2.0)]
    assert run.log.seconds is None
    write_report(tmp_path)
    assert "last line of" in capsys.readouterr().err
    log.write_text("{broken\n" + log.read_text())
    with pytest.raises(JLTError, match=r"log.jsonl, line 1 is not readable JSON"):
        read_study(tmp_path)


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    write_marker(tmp_path / "config.json", config("x", 1, 0))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Nothing has been evaluated yet; training has reached step 0." in page


def test_an_ablation_whose_runs_have_not_begun_has_a_page(tmp_path: Path) -> None:
    write_ablation(tmp_path, ["x", "v"], [1])
    for run in ("x-v-p1-s0", "v-v-p1-s0"):
        (tmp_path / "runs" / run / "config.json").unlink()
    (tmp_path / "geometry.json").unlink()
    assert "Nothing has been evaluated yet" in write_report(tmp_path).read_text(encoding="utf-8")


def test_spectra_of_few_and_of_dead_directions_are_drawn(tmp_path: Path) -> None:
    dead = (
        torch.randn(50, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 0.5, 0.0])[:, None, None]
    )
    geometry = analyze(GaussianStore(dead), [1])
    assert geometry.tokens[1].anisotropy is None
    write_ablation(tmp_path, ["x", "v"], [1])
    write_result(tmp_path / "geometry.json", geometry)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "infinite" in page
    write_result(tmp_path / "geometry.json", analyze(GaussianStore(dead[:, :1]), [1]))
    write_report(tmp_path)


def test_other_folders_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JLTError, match="neither an ablation .* nor a training run"):
        write_report(tmp_path)
    write_run(tmp_path, "x", 1, 0, 20.0)
    damaged = config("x", 1, 0)
    del damaged["prediction"]
    write_marker(tmp_path / "config.json", damaged)
    with pytest.raises(JLTError, match=r"config.json .* prediction is missing"):
        write_report(tmp_path)


# The log of a run, at any moment


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under way that was continued once and skipped two updates; tests must not change it."""
    folder = tmp_path_factory.mktemp("watched")
    write_watched_run(folder, steps=3000, reached=2000, every=20)
    return folder


def test_what_a_continued_run_did_after_its_checkpoint_is_forgotten(tmp_path: Path) -> None:
    log = read_log(
        write_log(
            tmp_path,
            {"event": "start", "step": 0},
            {"event": "skipped", "step": 5},
            {"event": "step", "step": 10, "loss": 1.0},
            {"event": "sampled", "step": 20, "file": "samples/a.png"},
            {"event": "skipped", "step": 21},
            {"event": "step", "step": 30, "loss": 0.5},
            {"event": "stopped", "step": 30},
            {"event": "start", "step": 10, "processes": 4},
        )
    )
    assert [logged.step for logged in log.steps] == [10]
    assert (log.skipped, log.samples, log.restarts) == ((5,), (), (10,))
    assert (log.ended, log.stopped, log.session.processes) == (False, False, 4)


def test_numbers_that_are_missing_are_left_out(tmp_path: Path) -> None:
    path = write_log(
        tmp_path,
        {"event": "start", "step": 0},
        {"event": "step", "step": 1, "loss": None},
        {"event": "step", "step": 2, "loss": 1.0, "mfu": None, "ema_distance": {"0.99": 0.1}},
        {"event": "evaluated", "step": 2, "file": "evaluations/a.json", "metrics": {}},
        {"event": "something new", "step": 2},
    )
    (logged,) = read_log(path).steps
    assert (logged.step, logged.mfu, logged.ema_distance) == (2, None, {"0.99": 0.1})


def test_time_left_is_that_of_the_latest_session(tmp_path: Path) -> None:
    events = [{"event": "step", "step": step, "loss": 1.0, "seconds": step * 1.0} for step in (10, 20)]
    later = [{"event": "step", "step": step, "loss": 1.0, "seconds": 20 + (step - 20) * 0.1} for step in (30, 40)]
    log = read_log(write_log(tmp_path, {"event": "start", "step": 0}, *events, {"event": "start", "step": 20}, *later))
    assert log.seconds_left(140, batch_size=8) == pytest.approx(10.0)
    # An old log has no times, yet a speed; before the first step there is neither.
    log = read_log(write_log(tmp_path, {"event": "step", "step": 40, "loss": 1.0, "img_per_second": 16.0}))
    assert log.seconds_left(140, batch_size=8) == pytest.approx(50.0)
    assert read_log(tmp_path / "none.jsonl").seconds_left(140, batch_size=8) is None


def test_a_run_under_way_says_how_far_it_is(watched: Path, tmp_path: Path) -> None:
    facts = page_facts(read_study(watched))
    assert facts["Progress"] == "step 2,000 of 3,000 (66%)"
    assert facts["Time left"] == "14 min 10 s at its latest speed"
    assert facts["Processes"] == "2 (ddp) on cuda"
    assert facts["Skipped updates"] == "2"
    assert facts["Speed"].endswith("images/s, MFU 41%")
    assert "Trained" not in facts
    write_run(tmp_path, "x", 1, 0, 20.0)
    assert page_facts(read_study(tmp_path))["Trained"] == "1,500 steps"


def test_a_stopped_run_says_that_it_can_be_continued(watched: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((watched / "config.json").read_bytes())
    log = (watched / "log.jsonl").read_text()
    stopped = log_line({"event": "stopped", "step": 2000}, work_of(tmp_path))
    (tmp_path / "log.jsonl").write_text(log + stopped)
    assert page_facts(read_study(tmp_path))["State"] == "stopped and saved; run the same command again to resume"


def test_a_run_under_way_has_every_figure_of_its_log(watched: Path) -> None:
    figures = {figure.title: figure for figure in run_figures(read_study(watched))}
    assert [len(figure.panels) for figure in figures.values()] == [2, 3, 3]
    path, optimisation, speed = figures.values()
    assert path.legend[0].label == "t from 0 to 0.2"
    assert len(path.legend) == 5
    assert "Crosses mark 2 updates that were skipped" in optimisation.caption
    assert [entry.label for entry in optimisation.legend] == [
        "EMA 0.9999", "EMA 0.9996", "power EMA 0.05", "power EMA 0.1",
    ]  # fmt: skip
    assert all("resumed from a checkpoint" in figure.caption for figure in (optimisation, speed))
    page = write_report(watched).read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)"', page) == ["training", "series", "limits", "protocol", "reproduce"]


def test_a_log_without_the_newer_numbers_has_the_figures_it_can_have(tmp_path: Path) -> None:
    write_run(tmp_path, "x", 1, 0, 20.0)
    figures = run_figures(read_study(tmp_path))
    assert [(figure.title, len(figure.panels)) for figure in figures] == [("Gradients and averages", 2)]
    assert "skipped" not in figures[0].caption
    for path in tmp_path.glob("*.jsonl"):
        path.unlink()
    assert run_figures(read_study(tmp_path)) == []


@pytest.mark.parametrize(
    ("bins", "text"),
    [
        ([1.0, None, 0.5], "It is 1.00 at t 0.17 and 0.500 at t 0.83."),
        ([None] * 10, "No sample was drawn."),
        ([0.0] * 10, "It is 0 at t 0.05 and 0 at t 0.95."),
        ([1.0], "It is 1.00 at t 0.5 and 1.00 at t 0.5."),
    ],
)
def test_few_empty_and_zero_bins_of_time_are_drawn(tmp_path: Path, bins: list[float | None], text: str) -> None:
    write_marker(tmp_path / "config.json", config("x", 1, 0))
    write_log(tmp_path, *({"event": "step", "step": step, "loss": 1.0, "loss_by_time": bins} for step in (1, 2)))
    assert text in write_report(tmp_path).read_text(encoding="utf-8")


def test_an_ablation_shows_the_loss_against_time_and_nothing_else_of_its_logs(tmp_path: Path) -> None:
    write_ablation(tmp_path, ["x", "v"], [1], loss_spaces=("x", "v"))
    assert run_figures(read_study(tmp_path)) == []
    for run in (tmp_path / "runs").iterdir():
        log_by_time(run, level=1.0)
    (figure,) = run_figures(read_study(tmp_path))
    assert (len(figure.panels), len(figure.legend)) == (2, 2)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "The loss along the path" in page
    assert 'id="series"' not in page


def test_the_series_of_samples_has_the_first_and_the_last_and_few_between(watched: Path) -> None:
    series = sample_grids.sample_series(read_study(watched).runs[0])
    found = [step for step, _ in read_log(watched / "log.jsonl").samples]
    assert len(found) > sample_grids.MOST_GRIDS == len(series)
    assert (series[0].name, series[-1].name) == (f"Step {found[0]:,}", f"Step {found[-1]:,}")
    assert sample_grids.spaced([1, 2, 3], 6) == [1, 2, 3]


def test_sample_grids_that_are_gone_are_left_out_and_damaged_ones_named(tmp_path: Path) -> None:
    write_watched_run(tmp_path, steps=300, reached=200, every=10)
    run = read_study(tmp_path).runs[0]
    first, second = (tmp_path / file for _, file in run.log.samples[:2])
    first.unlink()
    assert sample_grids.sample_series(run)[0].name == f"Step {run.log.samples[1][0]:,}"
    second.write_bytes(b"\x89PNG" + bytes(sample_grids.LARGE_BYTES))
    with pytest.raises(JLTError, match="is of no image format"):
        sample_grids.sample_series(run)


def test_a_large_grid_is_embedded_smaller(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    noise = torch.randint(256, (1000, 500, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(path)
    kind, _, content = sample_grids.picture_uri(path).partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.size == (360, 720)


def test_a_long_curve_is_thinned_to_its_means() -> None:
    steps, values = thinned(range(10, 10_001, 10), [float(value) for value in range(1000)])
    assert (len(steps), steps[-1], values[:2]) == (334, 10_000, [1.0, 4.0])
    assert thinned([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])


# The page


class Checker(HTMLParser):
    """Collects addresses and pictures, and checks that every element is closed by its own end tag."""

    VOID = frozenset({"input", "meta", "link", "img", "source", "br", "line", "circle", "path", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.alts: list[str | None] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "srcset", "href"}]
        if tag == "img":
            self.alts.append(dict(attrs).get("alt"))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, self.getpos()


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert page.lower().startswith("<!doctype html>")
    assert all(address.startswith("data:") for address in checker.addresses)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", page)
    # One script, the slider's, and no other may run.
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html.unescape(page)
    assert checker.tags.count("script") == 1
    assert checker.tags.count("img") == checker.tags.count("source") + 6  # six sample grids have one rendering
    assert all(alt and len(alt) > 20 for alt in checker.alts)


def test_a_page_with_nothing_to_move_runs_no_script(tmp_path: Path) -> None:
    write_run(tmp_path, "x", 1, 0, 20.0)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "script-src" not in page


def test_sections_come_in_their_order(page: str) -> None:
    sections = re.findall(r'<section id="(\w+)"', page)
    assert sections == ["results", "training", "samples", "geometry", "matched", "limits", "protocol", "reproduce"]


def test_sample_grids_are_embedded_unchanged(folder: Path, page: str) -> None:
    for grid in folder.glob("runs/*/samples/grid.png"):
        assert base64.b64encode(grid.read_bytes()).decode() in page


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    write_ablation(tmp_path, ["x", "v"], [1])
    facts = read_content(tmp_path / "ablation.json")
    write_sealed(tmp_path / "ablation.json", {**facts, "title": "<script>alert(1)</script>"})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_six_systems_take_under_eight_seconds(folder: Path) -> None:
    start = time.process_time()
    write_report(folder)
    assert time.process_time() - start < 8


def test_reports_load_neither_torch_nor_matplotlib_before_they_draw() -> None:
    code = "import sys, jlt.report.page; print({'torch', 'matplotlib', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_fixture_follows_the_ablation_schema(folder: Path) -> None:
    facts = json.loads((folder / "ablation.json").read_text())
    assert {Path(system["run"]).name for system in facts["systems"]} == set(facts["matched"]["draws"])
    assert len(facts["systems"]) == len(FINAL)


# ---- as text ----


def test_a_table_of_metrics_has_errors_and_dashes_for_what_was_not_measured():
    metrics = Metrics(
        frechet_distance=2.5634,
        frechet_distance_error=0.0312,
        frechet_distance_bias=-0.00123,
        kernel_distance=0.000712,
        kernel_distance_std=0.000251,
        precision=0.625,
        count=50_000,
    )
    rows = [line for line in metrics_table(metrics).split("─\n")[1].splitlines() if line]
    assert [line.split() for line in rows] == [
        ["frechet", "distance", "2.563", "±", "0.031"],
        ["frechet", "distance", "bias", "-0.001230"],
        ["inception", "score", "—"],
        ["inception", "score", "whole", "—"],
        ["spatial", "frechet", "distance", "—"],
        ["kernel", "distance", "0.00071", "±", "0.00025"],
        ["precision", "62.5%"],
        *([name, "—"] for name in ("recall", "density", "coverage")),
        ["label", "agreement", "—"],
        ["count", "50,000"],
    ]
    # Values end in one column, and errors begin in one.
    assert len({line.index("±") for line in rows if "±" in line}) == 1
    ends = [re.search(r"(—|[\d,.]+%?)( *±.*)?$", line).end(1) for line in rows]
    assert len(set(ends)) == 1


def test_an_ablation_without_an_inception_score_has_a_dash_for_it(tmp_path):
    write_ablation(tmp_path)
    for path in tmp_path.rglob("evaluations/*.json"):
        content = read_content(path)
        content["metrics"] |= {"inception_score": None, "inception_score_std": None}
        write_sealed(path, content)
    assert all(row.cells[1].text == "—" and not row.cells[1].best for row in result_rows(read_study(tmp_path)))
    assert "—" in results_table(tmp_path)
    assert write_report(tmp_path).stat().st_size > 10_000
