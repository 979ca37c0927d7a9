"""Tables of texts, for a page or a terminal."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

TEXT_WIDTH = 100


@dataclass(frozen=True)
class Table:
    """A table of a page; columns of text (`left`) are aligned left, numbers right, and `marked` rows are bold."""

    label: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Collection[int] = (0,)
    marked: Collection[int] = ()


def text_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Collection[int] = (0,),
    widths: Mapping[int, int] | None = None,
) -> str:
    """Return a table as text; columns of text (`left`) are aligned left, numbers right.

    `widths` are the smallest widths of columns, for several tables in one column grid.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, title in enumerate(header):
        width = (widths or {}).get(index)
        table.add_column(title, justify="left" if index in left else "right", no_wrap=True, min_width=width)
    for row in rows:
        table.add_row(*row)
    stream = io.StringIO()
    Console(file=stream, width=120).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")
