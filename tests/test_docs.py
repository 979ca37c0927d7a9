"""The documents keep their promises: short sentences, narrow lines, links that exist, commands that parse."""

import contextlib
import functools
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import tyro

import jlt
from jlt.cli.benchmark import BENCHMARKS
from jlt.cli.main import COMMANDS, parse, take_globals
from jlt.cli.training import RecipeCommand
from jlt.config import TrainConfig
from jlt.experiments.recipes import RECIPES, resolve_recipe

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

MAX_LINE = 110
MAX_WORDS = 30
README_LINES = 150

FENCE = re.compile(r"^\s*```")
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")
CODE_SPAN = re.compile(r"`[^`]+`")
LIST_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s+")
# A full stop that does not end a sentence.
ABBREVIATION = re.compile(r"\b(?:eq|Eq|fig|Fig|et al|e\.g|i\.e|vs|cf)\.")
SENTENCE_END = re.compile(r"(?<=[.!?])[)\"”*]*\s+")
LAUNCHER = re.compile(r"^(?:srun )?(?:torchrun|accelerate launch)\b.*? -m (?:-- )?")


def documents(test):
    return pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)(test)


def is_indented_code(line: str, previous: str, in_list: bool) -> bool:
    return line.startswith("    ") and not in_list and (not previous.strip() or previous.startswith("    "))


def split_lines(text: str) -> tuple[list[tuple[int, str]], list[str]]:
    """Return the numbered lines of prose, and the code blocks; an empty line of prose ends a paragraph."""
    prose: list[tuple[int, str]] = []
    code: list[str] = []
    fenced = in_list = False
    previous = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if FENCE.match(line):
            fenced = not fenced
            prose.append((number, ""))
        elif fenced:
            code.append(line)
        elif is_indented_code(line, previous, in_list):
            code.append(line)
            prose.append((number, ""))
        else:
            if line.strip():
                in_list = bool(LIST_ITEM.match(line)) or (in_list and line.startswith(" "))
            prose.append((number, line))
        previous = line
    return prose, code


def paragraphs(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the paragraphs and list items of a document with their first lines; no tables, headings or directives."""
    start, parts = 0, []
    for number, line in [*split_lines(path.read_text())[0], (0, "")]:
        outside = not line.strip() or line.lstrip().startswith(("|", "#", ":::", "<", "!["))
        if parts and (outside or LIST_ITEM.match(line)):
            yield start, " ".join(parts)
            parts = []
        if not outside:
            start = start if parts else number
            parts.append(LIST_ITEM.sub("", line).strip())


def sentences(paragraph: str) -> list[str]:
    """Return the sentences; a code span or the text of a link counts as it reads, with one word for a code span."""
    text = CODE_SPAN.sub("code", LINK.sub(r"\1", paragraph))
    return SENTENCE_END.split(ABBREVIATION.sub(lambda found: found[0].replace(".", ""), text))


def commands(text: str) -> Iterator[str]:
    """Yield the jlt command lines of the code blocks of a document, without their launchers."""
    joined = re.sub(r"\\\n\s*", "", "\n".join(split_lines(text)[1]))
    for line in joined.splitlines():
        line = LAUNCHER.sub("", line.strip())
        if line.startswith(("jlt ", ".venv/bin/jlt ")):
            yield line.removeprefix(".venv/bin/")


def is_synopsis(line: str) -> bool:
    return any(sign in line for sign in ("[", "|", "...", "RECIPE"))


@documents
def test_lines_are_narrow(path):
    wide = [
        f"{number}: {line}"
        for number, line in split_lines(path.read_text())[0]
        if len(LINK.sub(r"\1", line)) > MAX_LINE and not line.lstrip().startswith("|")
    ]
    assert not wide


@documents
def test_sentences_are_short(path):
    long = [
        f"line {number}, {len(sentence.split())} words: {sentence}"
        for number, paragraph in paragraphs(path)
        for sentence in sentences(paragraph)
        if len(sentence.split()) > MAX_WORDS
    ]
    assert not long, "\n".join(long)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < README_LINES


@documents
def test_links_and_images_exist(path):
    prose = "\n".join(line for _, line in split_lines(path.read_text())[0])
    targets = [target for _, target in LINK.findall(prose) if not target.startswith(("http://", "https://", "#"))]
    missing = [target for target in targets if not (path.parent / target.partition("#")[0]).exists()]
    assert not missing


@documents
def test_files_in_the_text_exist(path):
    """`training/step.py` is a module of the package, `tests/golden` a path of the repository."""
    prose = "\n".join(line for _, line in split_lines(path.read_text())[0])
    named = re.findall(r"`([\w.]+(?:/[\w.]+)*/[\w]+\.(?:py|md)|(?:docs|src|tests|scripts)/[\w/]+)`", prose)
    assert [name for name in named if not ((ROOT / name).exists() or (ROOT / "src/jlt" / name).exists())] == []


@documents
def test_modules_in_the_text_exist(path):
    """`jlt.path` is a module, `jlt.load` a name that the package offers."""
    prose = "\n".join(line for _, line in split_lines(path.read_text())[0])
    for name in set(re.findall(r"`(jlt(?:\.\w+)+)`", prose)) | set(re.findall(r"^::: (\S+)", prose, re.MULTILINE)):
        file = ROOT / "src" / name.replace(".", "/")
        assert file.is_dir() or file.with_suffix(".py").exists() or name.removeprefix("jlt.") in jlt.__all__, name


@documents
def test_commands_parse(path):
    for line in commands(path.read_text()):
        if is_synopsis(line):
            continue
        arguments = shlex.split(line, comments=True)[1:]
        try:
            command = parse(take_globals(arguments)[0])
            if isinstance(command, RecipeCommand) and command.recipe in RECIPES:
                command.resolve(None)
        except (SystemExit, Exception) as error:
            pytest.fail(f"{line}: {error}")


@functools.cache
def help_of(command: tuple[str, ...]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        parse([*command, "--help"])
    return printed.getvalue()


@documents
def test_options_in_the_text_exist(path):
    """A command in running text may be incomplete: its name and its options exist."""
    prose = "\n".join(line for _, line in split_lines(path.read_text())[0])
    for span in re.findall(r"`jlt (\w[^`]*)`", prose):
        words = span.replace("\n", " ").split()
        name = tuple(words[:2] if words[0] == "benchmark" and len(words) > 1 else words[:1])
        if name[0].isupper():
            continue  # a placeholder
        known = help_of(name)
        if issubclass(commands_by_name()[name[0]], RecipeCommand):
            known += help_of_settings()
        for option in re.findall(r"--[\w.-]+", span):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", known), f"jlt {span}: {option}"


@functools.cache
def help_of_settings() -> str:
    """Return the options that override settings of a recipe."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(TrainConfig, args=["--help"], default=resolve_recipe("digits"))
    return printed.getvalue()


def commands_by_name() -> dict[str, type]:
    return {command.__name__.lower(): command for command in COMMANDS}


def test_the_reference_of_commands_is_complete():
    text = (ROOT / "docs/cli.md").read_text()
    names = [*commands_by_name(), *(f"benchmark {name}" for name in BENCHMARKS)]
    missing = [name for name in names if not re.search(rf"jlt {name}\b", text)]
    assert not missing
