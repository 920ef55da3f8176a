"""A table, and its text for a terminal, Markdown, LaTeX and HTML."""

import html
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from utils.columns import text_table

# What a mark says, where a table has it.
MEANING = {
    "best": "best of its column among rows of equal logits.",
    "close": "its difference from the best is within the spread.",
    "chance": "a calibrated net of the same confidences has such an ECE on so few images (it lies "
    "within 95 % of draws); no best is named where the lowest is one of these, or may be.",
    "differs": "from 0, Holm-corrected for all rows of its column and logits, at 5 %.",
}


class TableCell(NamedTuple):
    """A cell as text; `mark` is a key of MEANING, or nothing."""

    text: str
    mark: str = ""
    indent: int = 0


@dataclass
class Table:
    """What is shown, in whatever format. The first head is the title of the whole."""

    head: list[str]
    rows: list[list[TableCell]]
    notes: list[str] = field(default_factory=list)
    kind: str = ""


class Format(NamedTuple):
    """`marks`: how a cell shows each. `blank`: a cell without one in a column that has some.

    `whole` takes title, slug (the title as a label), kind, table and notes.
    """

    escape: Callable[[str], str]
    marks: dict[str, str]
    indent: str
    lay_out: Callable[[list[str], list[list[str]]], str]
    note: str
    whole: str
    blank: str = "{}"


def render(table: Table, form: str) -> str:
    """As text of a form in FORMATS."""
    style = FORMATS[form]
    marks = {**style.marks, "differs": style.marks["best"]}
    head = [TableCell(text) for text in table.head]
    lines = [head, *table.rows]

    # In a column with marks the other cells leave their place empty, so that digits are aligned.
    unmarked = []
    for column in range(len(head)):
        has_marks = any(line[column].mark for line in lines)
        unmarked.append(style.blank if has_marks else "{}")

    texts = []
    for line in lines:
        line_texts = []
        for cell, plain in zip(line, unmarked, strict=True):
            text = marks.get(cell.mark, plain).format(style.escape(cell.text))
            line_texts.append(style.indent * cell.indent + text)
        texts.append(line_texts)

    used = {cell.mark for row in table.rows for cell in row}
    notes = [style.escape(note) for note in table.notes]
    for mark, meaning in MEANING.items():
        if mark in used:
            notes.append(f"{marks[mark].format(mark)}: {style.escape(meaning)}")
    return style.whole.format(
        title=style.escape(table.head[0]),
        slug=re.sub("[^a-z0-9]+", "-", table.head[0].lower()).strip("-"),
        kind=table.kind,
        table=style.lay_out(texts[0], texts[1:]),
        notes="".join(style.note.format(note) for note in notes),
    )


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


LATEX = {
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "←": r"$\leftarrow$",
    "→": r"$\to$",
    "–": "--",
    "†": r"\dag{}",
    "°": r"$^\circ$",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
}


def latex_text(text: str) -> str:
    """Escaped; the hyphens of a flag are kept apart, for two in a row become a dash there."""
    return "-{}-".join(part.translate(str.maketrans(LATEX)) for part in text.split("--"))


def latex_table(head: list[str], rows: list[list[str]]) -> str:
    first, *others = [" & ".join(line) + r" \\" for line in [head, *rows]]
    alignment = "l" + "r" * (len(head) - 1)
    lines = [
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        first,
        r"\midrule",
        *others,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines)


def html_table(head: list[str], rows: list[list[str]]) -> str:
    heads = "".join(f"<th>{name}</th>" for name in head)
    lines = [f"<tr><th>{row[0]}</th><td>{'</td><td>'.join(row[1:])}</td></tr>" for row in rows]
    body = "\n".join(lines)
    return f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


FORMATS = {
    "terminal": Format(
        escape=lambda text: text.replace(" ± ", "±"),
        marks={"best": "{}*", "close": "{}~", "chance": "{}°"},
        indent="  ",
        lay_out=text_table,
        note="{}\n",
        whole="{table}\n{notes}",
        blank="{} ",
    ),
    "markdown": Format(
        escape=lambda text: re.sub(r"([\\`*_{}\[\]<>|~#])", r"\\\1", text),
        marks={"best": "**{}**", "close": "{} ≈", "chance": "{} °"},
        indent="↳ ",
        lay_out=markdown_table,
        note="{}\n\n",
        whole="## {title}\n\n{table}\n\n{notes}",
    ),
    "latex": Format(  # for \\input where booktabs is loaded
        escape=latex_text,
        marks={"best": r"\textbf{{{}}}", "close": r"{}$^\approx$", "chance": r"{}$^\circ$"},
        indent=r"\quad ",
        lay_out=latex_table,
        note=" {}",
        whole="\\begin{{table}}\n\\centering\n\\caption{{{title}}}\n\\label{{tab:{slug}}}\n{table}\n"
        "\\par\\smallskip\\footnotesize{notes}\n\\end{{table}}\n",
    ),
    "html": Format(
        escape=html.escape,
        marks={"best": "<b>{}</b>", "close": "{}<sup>≈</sup>", "chance": "{}<sup>°</sup>"},
        indent="&emsp;",
        lay_out=html_table,
        note="<li>{}</li>",
        whole='<h2>{title}</h2>\n<div class="scroll {kind}">{table}</div>\n<ul>{notes}</ul>\n',
    ),
}
