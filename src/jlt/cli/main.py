"""The command line: parse the arguments, run the command, and turn errors into exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import json
import os
import re
import resource
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from jlt import __version__
from jlt.cli.benchmark import BENCHMARKS, Benchmark
from jlt.cli.command import PARSING, Command, option_names, require_known
from jlt.cli.demo import Demo
from jlt.cli.evaluation import Evaluate, Fetch, Price, Reference, Sample, Sweep
from jlt.cli.experiments import Ablate, Explain, Quickstart, Report
from jlt.cli.interop import Export, Import
from jlt.cli.latents import Adopt, Analyze, Encode, Verify
from jlt.cli.launch import PRINTED, launch
from jlt.cli.training import Plan, RecipeCommand, Train, print_settings
from jlt.config import SAMPLERS
from jlt.errors import JLTError, UsageError, unknown_name, without_credentials
from jlt.ranges import RangeError
from jlt.runtime import processes
from jlt.runtime.device import choose_device, prepare_apple_gpu
from jlt.runtime.progress import silence
from jlt.runtime.signals import Stopped
from jlt.runtime.streams import deliver, harmless, prepare_streams, printing, say

RESUME = "Run the same command again to resume."

# In the order in which the work is done, which is that of `jlt --help`.
COMMANDS: tuple[type[Command], ...] = (
    *(Quickstart, Explain, Encode, Verify, Analyze, Plan, Train, Sample, Demo),
    *(Fetch, Reference, Evaluate, Sweep, Price, Ablate, Report, Import, Export, Benchmark),
)
DESCRIPTION = """Latent diffusion transformers that predict x, eps or v: train, sample, evaluate and explain them.

Options of every command:
  --device auto|cuda|mps|cpu  where to compute; auto takes a GPU if there is one
  --processes N               run the command in N processes of this machine
  --version                   print the version"""


def parse(arguments: Sequence[str]) -> Command:
    """Return the command that the arguments name; wrong ones raise SystemExit with code 2 or a UsageError."""
    if arguments[:1] == ["benchmark"]:
        return _parse(list(arguments[1:]), BENCHMARKS, "jlt benchmark", inspect.getdoc(Benchmark) or "")
    commands: dict[str, type[Command]] = {command.__name__.lower(): command for command in COMMANDS}
    if any(argument.partition("=")[0] == "--adopt" for argument in arguments):
        commands["encode"] = Adopt
    return _parse(list(arguments), commands, "jlt", DESCRIPTION)


def _parse(arguments: list[str], commands: Mapping[str, type[Command]], prog: str, description: str) -> Command:
    name = arguments[0] if arguments else "-"
    if not name.startswith("-") and name not in commands:
        raise unknown_name("command" if prog == "jlt" else "benchmark", name, commands)
    # The list of commands shows the first line of each; the help of a command shows its whole docstring.
    summaries = {key: (inspect.getdoc(command) or "").partition("\n")[0] for key, command in commands.items()}
    branches = [
        Annotated[command, tyro.conf.subcommand(key, description=None if key == name else summaries[key])]
        for key, command in commands.items()
    ]
    union: Any = Union[tuple(branches)]  # noqa: UP007
    refuse_two_samplers(arguments)
    options: dict[str, Any] = {"prog": prog, "description": description, **PARSING}
    try:
        command, rest = tyro.cli(union, args=arguments, return_unknown_args=True, **options)
    except SystemExit as leave:
        recipe = arguments[1] if len(arguments) > 1 and not arguments[1].startswith("-") else None
        overrides = issubclass(commands.get(name, Command), RecipeCommand)
        if overrides and not leave.code and (recipe or name == "train"):
            print_settings(name, recipe)
        raise
    if isinstance(command, RecipeCommand):
        return dataclasses.replace(command, overrides=tuple(rest))
    require_known(rest, option_names(type(command)))
    # tyro explains other unknown arguments only where it does not return them.
    return tyro.cli(union, args=arguments, **options) if rest else command


def refuse_two_samplers(arguments: Sequence[str]) -> None:
    """Raise a UsageError for a named sampler next to a setting that it names: one of them would have no effect."""
    options = [argument.partition("=")[0] for argument in arguments]
    for named in options:
        prefix, _, name = named.rpartition("sampler")
        if name == "" and prefix.endswith(("--", ".")):
            for key in SAMPLERS["published"]:
                if f"{prefix}{key}" in options:
                    raise UsageError(f"{named} sets {key}, too: leave out {prefix}{key}, or {named}.")


def refuse_credentials(arguments: Sequence[str]) -> None:
    """Raise a UsageError for an argument with a password or a token, which the files of a run would keep."""
    for argument in arguments:
        if (shown := without_credentials(argument)) != argument:
            raise UsageError(f"{shown} has credentials, and jlt reads no URLs: download it, and name the local copy.")


def take_globals(arguments: Sequence[str]) -> tuple[list[str], int]:
    """Return the arguments without the options of every command, and the number of processes; set the device."""
    rest, values = list(arguments), {"--processes": "1", "--device": ""}
    for option in values:
        for place, argument in enumerate(rest):
            name, joined, value = argument.partition("=")
            if name == option:
                values[option] = value if joined else "".join(rest[place + 1 : place + 2])
                del rest[place : place + (1 if joined else 2)]
                break
    if values["--device"]:
        choose_device(values["--device"])
    if not values["--processes"].isdecimal() or not int(values["--processes"]):
        raise UsageError(f"--processes takes a number of 1 or more, not {values['--processes']!r}.")
    return rest, int(values["--processes"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 when done, 1 on failure, 2 for wrong arguments, 75 when stopped on request."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    prepare_streams()
    processes.prepare_process()
    prepare_apple_gpu()
    try:
        return _run(arguments)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            say(traceback.format_exc())
        return _leave(_print_error(_named(error, arguments)))
    finally:
        # What a library printed before an error may be lost too.
        with contextlib.suppress(JLTError, ValueError):
            deliver()


def _run(arguments: list[str]) -> int:
    """Run the command and print its result; return the exit code."""
    if "--version" in arguments:
        deliver(f"jlt {__version__}")
        return 0
    processes.require_launcher()
    first = processes.rank() == 0
    if not first:
        # Process 0 prints progress and results for all; each process prints its own error.
        silence()
    try:
        refuse_credentials(arguments)
        arguments, count = take_globals(arguments)
        with printing():
            command = parse(arguments)
        if count > 1:
            return launch(count, arguments)
        result = command.run()
    except SystemExit as leave:
        if not leave.code:
            deliver()
        return int(leave.code or 0)
    if first:
        deliver(json.dumps(result.data) if command.json else harmless(result.text))
    return 0 if result.ok else 1


def _named(error: BaseException, arguments: Sequence[str]) -> BaseException:
    """Return an error with a setting's name as the arguments have it, such as --network.depth for depth."""
    if isinstance(error, RangeError):
        for option in (argument.partition("=")[0] for argument in arguments):
            if option.startswith("--") and re.split(r"--|\.", option)[-1].replace("-", "_") == error.name:
                return RangeError(option, error.values, error.found)
    return error


def _leave(code: int) -> int:
    """Return the exit code; among several processes with GPUs, end with it at once."""
    torch = sys.modules.get("torch")
    if _among_several() and torch is not None and torch.cuda.is_initialized():
        # Closing a GPU's connections would wait for a process that may have ended.
        with contextlib.suppress(JLTError):
            deliver()
        os._exit(code)
    return code


def _among_several() -> bool:
    # Variables of a launcher that are wrong are the error itself.
    with contextlib.suppress(UsageError):
        return processes.world_size() > 1 and processes.rank() >= 0
    return False


def _print_error(error: BaseException) -> int:
    """Print the error as one sentence on stderr, and return the exit code."""
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        sentence = f"{str(error) or 'Interrupted.'} {RESUME}"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        sentence = f"jlt: The disk is full. Saved files stay valid: free some space. {RESUME}"
    elif isinstance(error, OSError) and error.errno == errno.EMFILE:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        sentence = f"jlt: This process may open {most} files at a time, too few: raise the limit with ulimit -n."
    elif isinstance(error, OSError) and error.strerror:
        sentence = f"jlt: {error.strerror}: {error.filename}" if error.filename else f"jlt: {error.strerror}"
    elif isinstance(error, JLTError):
        sentence = f"jlt: {error}"
    elif _lacks_memory(error):
        sentence = f"jlt: Memory ran out: choose smaller batches, or fewer images ({_first_line(error)})."
    else:
        sentence = f"jlt: {type(error).__name__}: {_first_line(error)} (--debug prints the traceback)"
    if isinstance(error, processes.LostProcessError) and processes.LAUNCHED in os.environ:
        return processes.LOST
    process = f"[process {processes.rank()}] " if _among_several() else ""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
    say(f"{process}{sentence}{notes}")
    if processes.LAUNCHED in os.environ and processes.rank() == 0:
        (Path(os.environ[processes.LAUNCHED]) / PRINTED).touch()
    if isinstance(error, Stopped):
        # A job scheduler runs it again.
        return os.EX_TEMPFAIL
    return 2 if isinstance(error, UsageError) else 1


def _lacks_memory(error: BaseException) -> bool:
    # PyTorch raises a plain RuntimeError on a CPU, so only its text tells.
    return isinstance(error, MemoryError) or any(part in str(error) for part in ("llocate memory", "out of memory"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
