"""Tables of a report for a terminal, Markdown, LaTeX and HTML."""

import html
import re
from typing import NamedTuple

from utils.tables import text_table


class Entry(NamedTuple):
    """A cell as text; `mark` is "best" of its column, "close" to the best, or nothing."""

    text: str
    mark: str = ""
    indent: int = 0


Rows = list[list[Entry]]


def terminal_table(head: list[str], rows: Rows, colour: bool = False) -> str:
    """Marks as `*` and `~`, the best in bold where the terminal can (`colour`)."""
    bold = "\033[1m{}*\033[0m" if colour else "{}*"
    marks = {"best": bold, "close": "{}~", "": "{}"}
    # A blank stands where no mark does, so that digits stay aligned in a column that has marks.
    marked = [any(row[place].mark for row in rows) for place in range(len(head))]

    def cell(entry: Entry, column_is_marked: bool) -> str:
        text = "  " * entry.indent + entry.text.replace(" ± ", "±")
        return marks[entry.mark].format(text) + " " * (column_is_marked and not entry.mark)

    return text_table(
        [name + " " * mark for name, mark in zip(head, marked, strict=True)],
        [[cell(*pair) for pair in zip(row, marked, strict=True)] for row in rows],
    )


def markdown_text(text: str) -> str:
    """Nothing in it is markup."""
    return re.sub(r"([\\`*_{}\[\]<>|~#])", r"\\\1", text)


def markdown_table(head: list[str], rows: Rows) -> str:
    marks = {"best": "**{}**", "close": "{} ≈", "": "{}"}

    def cell(entry: Entry) -> str:
        return "↳ " * entry.indent + marks[entry.mark].format(markdown_text(entry.text))

    head = [markdown_text(name) for name in head]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *([cell(e) for e in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


LATEX = {char: "\\" + char for char in "{}$&#_%"}
LATEX |= {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
LATEX |= {"±": r"$\pm$", "≈": r"$\approx$", "←": r"$\leftarrow$", "→": r"$\to$"}
LATEX |= {"–": "--", "†": r"\dag{}"}


def latex_text(text: str) -> str:
    return "".join(LATEX.get(char, char) for char in text)


def latex_table(head: list[str], rows: Rows) -> str:
    """A tabular for the booktabs package; a rule before every row that is not indented."""
    marks = {"best": r"\textbf{{{}}}", "close": r"{}$^\approx$", "": "{}"}

    def cell(entry: Entry) -> str:
        return r"\quad " * entry.indent + marks[entry.mark].format(latex_text(entry.text))

    body = [" & ".join(map(cell, row)) + r" \\" for row in rows]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            " & ".join(map(latex_text, head)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def html_table(head: list[str], rows: Rows, kind: str = "") -> str:
    """A table in a box of its own of class `kind`, which scrolls where the page is narrow."""
    marks = {"best": "<strong>{}</strong>", "close": "{}<sup>≈</sup>", "": "{}"}

    def cell(entry: Entry, tag: str) -> str:
        indent = f' style="padding-left:{0.6 + 1.4 * entry.indent}em"' if entry.indent else ""
        return f"<{tag}{indent}>{marks[entry.mark].format(html.escape(entry.text))}</{tag}>"

    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in head)]
    lines += [cell(row[0], "th") + "".join(cell(e, "td") for e in row[1:]) for row in rows]
    table_head, *body = [f"<tr>{line}</tr>" for line in lines]
    content = "\n".join(body)
    return (
        f'<div class="scroll {kind}"><table>\n'
        f"<thead>{table_head}</thead>\n<tbody>\n{content}\n</tbody></table></div>"
    )
