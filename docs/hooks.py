"""Pages of the site that are other files of the repository, and the page of `jlt explain` inside one of them."""

import json
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from jlt.report.explain_page import explanation

ROOT = Path(__file__).parent.parent
EXAMPLE = "examples/train_minimal.py"
NOTEBOOK = "examples/digits.ipynb"
PAGES = {"CHANGELOG.md": "changelog.md", EXAMPLE: "minimal.md", NOTEBOOK: "notebook.md"}
"""Files outside docs/, with their pages."""
EXPLANATION = "assets/explain.html"
PICTURE = re.compile(r"!\[([^\]]*)\]\(images/explain\.png\)")
"""Where the site shows the page itself, the repository shows a picture of it."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages; MkDocs calls this before it reads any page."""
    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    files.append(File.generated(config, EXPLANATION, content=explanation()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Return a page of docs/ with links to the pages of files outside it; MkDocs calls this for every page."""
    for file, name in PAGES.items():
        markdown = markdown.replace(f"](../{file})", f"]({name})")
    if PICTURE.search(markdown):
        page.meta["hide"] = ["navigation", "toc"]
    return PICTURE.sub(rf'<iframe class="explain" src="{EXPLANATION}" title="\1"></iframe>', markdown)


def pages() -> dict[str, str]:
    """Return the Markdown of each generated page."""
    return {
        "index.md": page_of_readme((ROOT / "README.md").read_text()),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        "minimal.md": page_of_example((ROOT / EXAMPLE).read_text()),
        "notebook.md": page_of_notebook((ROOT / NOTEBOOK).read_text()),
    }


def page_of_readme(text: str) -> str:
    """Return the README with its links as they are inside docs/."""
    text = re.sub(r"\]\(docs/", "](", text)
    for file, page in PAGES.items():
        text = text.replace(f"]({file})", f"]({page})")
    return f"---\nhide: [navigation]\n---\n\n{text}"


def page_of_example(code: str) -> str:
    """Return a page that shows the example."""
    return f"# A minimal training\n\n`{EXAMPLE}`: run it from the root of the repository.\n\n```python\n{code}```\n"


def page_of_notebook(text: str) -> str:
    """Return a page that shows the text and the code of the notebook."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    parts = [source if kind == "markdown" else f"```python\n{source}\n```" for kind, source in cells]
    return "\n\n".join(parts).replace("](../docs/", "](") + f"\n\n`{NOTEBOOK}` runs in Jupyter.\n"
