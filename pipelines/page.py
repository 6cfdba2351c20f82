"""A page of text, tables and pictures, as one self-contained HTML file and as Markdown.

All text is plain: whatever is in it (names of people's own sites, files, errors) is escaped in both.
"""

import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
        columns: headings; those in `left` hold text, the others numbers.
        rows: as many cells each as there are columns.
        note: what to know when reading it.
        marked: rows that stand out, by number.
        left: numbers of the columns that hold text.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    marked: frozenset[int] = frozenset()
    left: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Picture:
    """A PNG.

    Attributes:
        name: of its file, beside the Markdown.
        data: its bytes.
        alt: what it shows, for who cannot see it.
        caption: what to know when looking at it.
    """

    name: str
    data: bytes
    alt: str
    caption: str = ""

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return f"data:image/png;base64,{b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Lines:
    """Text to be copied as it is: commands, a file."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A heading and what is under it."""

    title: str
    blocks: Sequence[Text | Lines | Table | Picture]


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title, subtitle: at the top.
        finding: what came out, in a sentence or a few.
        warnings: what to know before believing it.
        sections: the rest.
    """

    title: str
    subtitle: str
    finding: Sequence[str]
    warnings: Sequence[str]
    sections: Sequence[Section]

    @property
    def pictures(self) -> list[Picture]:
        """All pictures, in order."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Picture)]


def html(page: Page) -> str:
    """One file that needs no other and no network; light or dark as the reader's system is, and printable."""
    environment = Environment(
        loader=PackageLoader("pipelines"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["block"] = lambda block, kind: type(block).__name__ == kind
    return environment.get_template("page.html").render(page=page)


def markdown(page: Page) -> str:
    """The same with links to the pictures, which lie beside it."""
    parts = [f"# {_md(page.title)}", _md(page.subtitle), *(f"**{_md(text)}**" for text in page.finding)]
    if page.warnings:
        parts.append("\n".join(f"> - {_md(text)}" for text in page.warnings))
    for section in page.sections:
        parts.append(f"## {_md(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _block(block: Text | Lines | Table | Picture) -> str:
    if isinstance(block, Text):
        return _md(block.text)
    if isinstance(block, Picture):
        return f"![{_md(block.alt)}]({block.name})" + (f"\n\n{_md(block.caption)}" if block.caption else "")
    if isinstance(block, Lines):
        longest = max((len(run) for run in re.findall("`+", block.text)), default=0)
        fence = "`" * max(3, longest + 1)
        return f"{_md(block.title)}\n\n{fence}\n{block.text.rstrip()}\n{fence}"
    lines = [_row(block.columns), _row_of_rules(block)]
    for number, row in enumerate(block.rows):
        lines.append(_row(row, bold=number in block.marked))
    return "\n".join(lines) + (f"\n\n{_md(block.note)}" if block.note else "")


def _row(cells: Sequence[str], bold: bool = False) -> str:
    texts = [_md(cell) for cell in cells]
    return f"| {' | '.join(f'**{text}**' if bold and text else text for text in texts)} |"


def _row_of_rules(table: Table) -> str:
    return f"|{'|'.join('---' if number in table.left else '---:' for number in range(len(table.columns)))}|"


def _md(text: str) -> str:
    """Plain text as Markdown: in one line, and without anything that Markdown or HTML would act on."""
    return re.sub(r"[\\`*_<>#|&]|\](?=[(\[])|!(?=\[)", lambda found: f"\\{found[0]}", " ".join(text.split()))
