"""The result files: frozen data classes with their schema numbers, one reader and one writer. Numbers, no sentences."""

from jlt.results.files import ResultFile as ResultFile
from jlt.results.files import read_result as read_result
from jlt.results.files import write_result as write_result
from jlt.results.geometry import ErrorByDirection as ErrorByDirection
from jlt.results.geometry import Forecast as Forecast
from jlt.results.geometry import Geometry as Geometry
from jlt.results.geometry import TokenGeometry as TokenGeometry
