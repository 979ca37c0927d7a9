"""A table as text, for a terminal."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence

TEXT_WIDTH = 100


def text_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Collection[int] = (0,),
    widths: Mapping[int, int] | None = None,
) -> str:
    """Return a table as text: columns of words (`left`) to the left, numbers to the right.

    `widths` are the least widths of columns, for tables whose columns have to stand under each other.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, title in enumerate(header):
        width = (widths or {}).get(index)
        table.add_column(title, justify="left" if index in left else "right", no_wrap=True, min_width=width)
    for row in rows:
        table.add_row(*row)
    stream = io.StringIO()
    Console(file=stream, width=120).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")
