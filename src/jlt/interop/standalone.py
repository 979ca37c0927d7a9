"""One file out of several modules of this package: a module with the definitions that it uses, and without jlt.

The files of an exported folder are made like this, so that the network, the solvers and the random numbers exist once.
Definitions are copied as text, with their comments. Two things change: imports of this package are gone, and the shapes
of jaxtyping, `Float[Tensor, "b n d"]`, become `Annotated[Tensor, "b n d"]`, which needs no package.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

from jlt import __version__

PACKAGE = "jlt"
SHAPES = "jaxtyping"
BLOCKS = (ast.ClassDef, ast.FunctionDef)
APART = """\
# diffusers copies the code of all local folders to one place, and runs it in one module for each file name. Under its
# own name, and with its text, this code stays the same when the code of another folder is loaded.
SOURCE = Path(__file__).read_text(encoding="utf-8")
if __name__.startswith("diffusers_modules."):
    apart = f"{__name__}_{hashlib.sha256(SOURCE.encode()).hexdigest()[:8]}"
    sys.modules[apart] = sys.modules.pop(__name__)
    __name__ = apart
"""


@dataclass(frozen=True)
class _Definition:
    """A statement at the top level of a module: its text with the comments above it, and every name in it."""

    text: str
    used: frozenset[str]
    block: bool
    """Whether it is a class or a function."""


@dataclass(frozen=True)
class _Module:
    name: str
    docstring: str
    defined: dict[str, _Definition]
    """By name, in the order of the file; a statement that defines several names is there for each."""
    imported: dict[str, tuple[str, str | None]]
    """Name here -> module and the name there; None for the module itself."""


def standalone(name: str) -> str:
    """Return the source of a module and of all definitions of this package that it uses, as one file.

    ValueError where two of them define the same name in different ways.
    """
    entry = _read(name)
    needed: dict[str, set[str]] = {}
    for defined in entry.defined:
        _collect(entry, defined, needed)
    modules = [_read(module) for module in _in_order(entry, needed)]
    _require_distinct(modules, needed)
    made = f"Made by jlt {__version__} from its own modules, which the parts name. The last part uses all others."
    parts = [
        f'"""{entry.docstring}\n\n{made}\n"""',
        "from __future__ import annotations",
        _imports(modules, needed),
        APART.rstrip(),
    ]
    for module in modules:
        title = module.name if module is entry else f"{module.name}\n\n{module.docstring}"
        parts.append("\n" + "\n".join(f"# {line}".rstrip() for line in title.splitlines()))
        parts.append(_text(module, needed[module.name]))
    return "\n\n".join(parts) + "\n"


def _collect(module: _Module, name: str, needed: dict[str, set[str]]) -> None:
    """Add a definition, and all that it uses, to the needed names of each module."""
    if name in needed.setdefault(module.name, set()):
        return
    needed[module.name].add(name)
    for used in module.defined[name].used:
        if used in module.defined:
            _collect(module, used, needed)
        elif used in module.imported:
            origin, original = module.imported[used]
            if _is_ours(origin):
                if original != used:
                    raise ValueError(f"{module.name} imports {used} from {origin} under another name")
                _collect(_read(origin), used, needed)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE


def _in_order(entry: _Module, needed: dict[str, set[str]]) -> list[str]:
    """Return the needed modules, each after those that it imports."""
    order: list[str] = []

    def visit(module: _Module) -> None:
        for origin, _ in module.imported.values():
            if origin in needed and origin not in order:
                visit(_read(origin))
        order.append(module.name)

    visit(entry)
    return order


def _require_distinct(modules: list[_Module], needed: dict[str, set[str]]) -> None:
    seen: dict[str, str] = {}
    for module in modules:
        for name in needed[module.name]:
            if name in seen:
                raise ValueError(f"{seen[name]} and {module.name} both define {name}")
            seen[name] = module.name


def _imports(modules: list[_Module], needed: dict[str, set[str]]) -> str:
    """Return the imports of everything from outside that the needed definitions use."""
    whole, names = {"import hashlib", "import sys"}, {"pathlib": {"Path"}}
    for module in modules:
        used = {name for defined in needed[module.name] for name in module.defined[defined].used}
        for name in used & module.imported.keys():
            origin, original = module.imported[name]
            if original is None:
                whole.add(f"import {origin}" if origin == name else f"import {origin} as {name}")
            elif origin == SHAPES:
                names.setdefault("typing", set()).add("Annotated")
            elif not _is_ours(origin):
                names.setdefault(origin, set()).add(name if name == original else f"{original} as {name}")
    return "\n".join([*sorted(whole), *(f"from {key} import {', '.join(sorted(names[key]))}" for key in sorted(names))])


def _text(module: _Module, needed: set[str]) -> str:
    """Return the needed statements of a module: classes and functions apart, constants together."""
    definitions = dict.fromkeys(definition for name, definition in module.defined.items() if name in needed)
    text, after_block = "", True
    for definition in definitions:
        text += ("\n\n\n" if definition.block or after_block else "\n") * bool(text) + definition.text
        after_block = definition.block
    return text


@functools.cache
def _read(name: str) -> _Module:
    path = files(PACKAGE).joinpath(*name.split(".")[1:-1], f"{name.rpartition('.')[2]}.py")
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    imported = dict(_imported(tree))
    shapes = {here for here, (origin, _) in imported.items() if origin == SHAPES}
    lines = _without_shapes(source, tree, shapes).splitlines()
    defined: dict[str, _Definition] = {}
    for place, node in enumerate(tree.body):
        if names := _names_of(node):
            following = tree.body[place + 1] if place + 1 < len(tree.body) else None
            block = isinstance(node, BLOCKS)
            # A text after a constant describes it.
            end = following if following and _is_text(following) and not block else node
            text = "\n".join(lines[_first_line(node, lines) : end.end_lineno])
            used = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
            defined |= dict.fromkeys(names, _Definition(text, frozenset(used), block))
    return _Module(name, ast.get_docstring(tree) or "", defined, imported)


def _imported(tree: ast.Module) -> Iterator[tuple[str, tuple[str, str | None]]]:
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name, (alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, (node.module or "", alias.name)


def _names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, BLOCKS):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _first_line(node: ast.stmt, lines: list[str]) -> int:
    """Return the index of a statement's first line, its decorators and the comments directly above included."""
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
    while first and lines[first - 1].startswith("#"):
        first -= 1
    return first


def _without_shapes(source: str, tree: ast.Module, shapes: set[str]) -> str:
    """Return the source with every jaxtyping name replaced; the lines stay where they are."""
    lines = source.splitlines(keepends=True)
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in shapes]
    for node in sorted(found, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        # The offsets of the parser count bytes.
        line = lines[node.lineno - 1].encode()
        replaced = line[: node.col_offset] + b"Annotated" + line[node.end_col_offset :]
        lines[node.lineno - 1] = replaced.decode()
    return "".join(lines)
