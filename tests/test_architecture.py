"""docs/architecture.md names every module of the package, once."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "jlt"
ROW = re.compile(r"^\| `([\w/]+\.py)` \| (.+) \|$", re.MULTILINE)


def test_every_module_is_named_once_with_one_line():
    rows = ROW.findall((ROOT / "docs" / "architecture.md").read_text())
    named = [module for module, _ in rows]
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert sorted(files - set(named)) == [], "modules that docs/architecture.md does not name"
    assert sorted(set(named) - files) == [], "modules that docs/architecture.md names and that do not exist"
    assert len(named) == len(set(named)), "a module is named twice"


def test_a_line_of_a_module_is_short():
    rows = ROW.findall((ROOT / "docs" / "architecture.md").read_text())
    assert [module for module, content in rows if len(content.split()) > 20] == []
