"""Pages of the site that are other files of the repository: the README, the changelog and the example."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
EXAMPLE = "examples/train_minimal.py"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages; MkDocs calls this before it reads any page."""
    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def pages() -> dict[str, str]:
    """Return the Markdown of each generated page."""
    return {
        "index.md": page_of_readme((ROOT / "README.md").read_text()),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        "minimal.md": page_of_example((ROOT / EXAMPLE).read_text()),
    }


def page_of_readme(text: str) -> str:
    """Return the README with its links as they are inside docs/."""
    text = re.sub(r"\]\(docs/", "](", text)
    text = text.replace("](CHANGELOG.md)", "](changelog.md)").replace(f"]({EXAMPLE})", "](minimal.md)")
    return f"---\nhide: [navigation]\n---\n\n{text}"


def page_of_example(code: str) -> str:
    """Return a page that shows the example."""
    return f"# A minimal training\n\n`{EXAMPLE}`: run it from the root of the repository.\n\n```python\n{code}```\n"
