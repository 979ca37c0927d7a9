"""The command line: one data class per verb, parsed by tyro. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, Union

import tyro

from jlt.cli.benchmark import BENCHMARKS, Benchmark
from jlt.cli.command import Command
from jlt.cli.experiments import Ablate, Quickstart, Report
from jlt.cli.latents import Adopt, Analyze, Encode, Verify
from jlt.cli.recipe import PARSING, RecipeCommand
from jlt.cli.sampling import Evaluate, Fetch, Reference, Sample
from jlt.cli.sweep import Sweep
from jlt.cli.training import Plan, Train
from jlt.errors import JLTError, UsageError, unknown_name
from jlt.runtime import processes
from jlt.runtime.progress import silence

STOPPED = os.EX_TEMPFAIL
"""Exit code of work that was asked to stop and is saved: the code by which a job asks to be run again."""


COMMANDS: tuple[type[Command], ...] = (
    Quickstart,
    Encode,
    Verify,
    Analyze,
    Plan,
    Train,
    Sample,
    Evaluate,
    Reference,
    Fetch,
    Sweep,
    Ablate,
    Report,
    Benchmark,
)
DESCRIPTION = "Latent diffusion transformers that predict x, eps or v: train, sample, evaluate and explain them."


def parse(arguments: Sequence[str]) -> Command:
    """Return the verb that the words make; wrong ones are a SystemExit of 2 or an UsageError."""
    if arguments[:1] == ["benchmark"]:
        return _parse(list(arguments[1:]), BENCHMARKS, "jlt benchmark", inspect.getdoc(Benchmark) or "")
    named: dict[str, type[Command]] = {verb.__name__.lower(): verb for verb in COMMANDS}
    if any(word.partition("=")[0] == "--adopt" for word in arguments):
        named["encode"] = Adopt
    return _parse(list(arguments), named, "jlt", DESCRIPTION)


def _parse(arguments: list[str], named: dict[str, type[Command]], prog: str, description: str) -> Command:
    # The list of verbs shows one line for each; the help of a verb shows its example too.
    chosen = arguments[0] if arguments else None
    if chosen and not chosen.startswith("-") and chosen not in named:
        raise unknown_name("verb" if prog == "jlt" else "benchmark", chosen, named)
    kinds = [
        Annotated[verb, tyro.conf.subcommand(name, description=None if name == chosen else _summary(verb))]
        for name, verb in named.items()
    ]
    union: Any = Union[tuple(kinds)]  # noqa: UP007
    options: dict[str, Any] = {"prog": prog, "description": description, "config": PARSING}
    verb, rest = tyro.cli(union, args=arguments, return_unknown_args=True, **options)
    if isinstance(verb, RecipeCommand):
        return dataclasses.replace(verb, overrides=tuple(rest))
    # Parsing once more without leave for unknown words explains them.
    return tyro.cli(union, args=arguments, **options) if rest else verb


def _summary(verb: type[Command]) -> str:
    return re.split(r"[.;:](?=\s|$)", verb.__doc__ or "", maxsplit=1)[0].replace("\n    ", " ") + "."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 when done, 1 on failure, 2 when the words were wrong, 75 when asked to stop."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if processes.rank() > 0:
        # The first process speaks for all; an error is said by whom it befell.
        silence()
    try:
        verb = parse(words)
        result = verb.run()
    except SystemExit as leave:
        return int(leave.code or 0)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in words:
            traceback.print_exc()
        return _leave(_explain(error))
    if processes.rank() > 0:
        return 0 if result.sound else 1
    try:
        print(json.dumps(result.data) if verb.json else result.text, flush=True)
    except BrokenPipeError:
        # The reader, `head` say, has seen enough; the interpreter must not complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0 if result.sound else 1


def _leave(code: int) -> int:
    """Return the exit code; among several processes with GPUs, end with it at once."""
    torch = sys.modules.get("torch")
    if processes.world_size() > 1 and torch is not None and torch.cuda.is_initialized():
        # Taking a GPU's connections down would wait for a process that may be gone.
        sys.stdout.flush()
        os._exit(code)
    return code


def _explain(error: BaseException) -> int:
    """Say in one sentence on stderr what went wrong, and return the exit code."""
    from jlt.runtime.signals import Stopped

    if isinstance(error, (Stopped, KeyboardInterrupt)):
        sentence = f"{str(error) or 'Interrupted.'} The same words continue it."
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        sentence = "jlt: The disk is full. What was saved stays good; make room, and the same words continue it."
    elif isinstance(error, OSError) and error.strerror:
        sentence = f"jlt: {error.strerror}: {error.filename}" if error.filename else f"jlt: {error.strerror}"
    elif isinstance(error, JLTError):
        sentence = f"jlt: {error}"
    else:
        sentence = f"jlt: {type(error).__name__}: {error} (--debug shows where)"
    process = f"[process {processes.rank()}] " if processes.world_size() > 1 else ""
    where = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
    print(f"{process}{sentence}{where}", file=sys.stderr, flush=True)
    if isinstance(error, Stopped):
        return STOPPED
    return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
