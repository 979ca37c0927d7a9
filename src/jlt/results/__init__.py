"""The result files: frozen data classes with their schema numbers, one reader and one writer. Numbers, no sentences."""

# ruff: noqa: F401 (the names that other packages import)

from jlt.results.ablation import Ablation, Matched, SystemRun
from jlt.results.evaluation import Evaluation, Jackknife, Metrics
from jlt.results.files import ResultFile, read_result, result_json, write_result
from jlt.results.geometry import ErrorByDirection, Forecast, Geometry, SettingForecast, TokenGeometry, TrainingModel
from jlt.results.run import Log, LoggedStep, Run, read_log, read_run
from jlt.results.sweep import Setting, Sweep, SweepPoint, SweepStage
