"""Reads the pages, README.md and docs/: their links into the code, commands, tables and examples.

    python tests/pages.py            # sets what moves with the code: lines of links, counts of code lines
    python tests/pages.py --check    # only names the pages that are behind the code; exit code 1 then

tests/test_pages.py holds the pages to the code with these functions.
"""

import argparse
import ast
import functools
import io
import os
import re
import shlex
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
ALL = "ddpm nvae o_gan bigan_qp rope hier_pos_bert transformer_vq w2v_svd".split()
SCRIPTS = [name for name in ALL if (ROOT / f"{name}.py").exists()]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^# === shared: (\w+) ===\n(.*?)^# === end shared ===\n", re.M | re.S)
# a link into the code: [`name`](../script.py#L12), or [test](../tests/test_script.py#L34 "name")
INTO_CODE = re.compile(r'\[(?:`(?P<name>[\w.]+)`|test)\]\((?P<path>[^)#\s]+\.py)#L(?P<line>\d+)(?: "(?P<test>\w+)")?\)')
COUNTS = re.compile(r"(\d+) code lines, (\d+) without the shared blocks")
COMMAND = re.compile(r"(?:python|uv run|torchrun(?: --\w+=\d+)*) ((?:tests/)?(?:experiments/)?\w+\.py)\b([^\n`#&|]*)")
PASTE = re.compile(r"(?:Copy the imports and|复制其 import 与) ((?:`\w+`[,、 and和]*)+)(?: from|，取自) `(\w+)\.py`[^\n]*\n+```python\n(.*?)```", re.S)


def definitions(path: Path) -> dict[str, int]:
    """Line of every function and class of a script, of methods as Class.method, of constants."""
    return definitions_in(path.read_text("utf-8"))


@functools.cache
def definitions_in(text: str) -> dict[str, int]:
    lines = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines[node.name] = node.lineno
            for part in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(part, ast.FunctionDef):
                    lines[f"{node.name}.{part.name}"] = part.lineno
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            lines[node.targets[0].id] = node.lineno
    return lines


def code_lines(text: str) -> int:
    """Lines with code on them: no blanks, comments or docstrings."""
    docs = {line for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant) for line in range(node.lineno, node.end_lineno + 1)}
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = {line for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in skip
             for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - docs)


def counts(script: str) -> tuple[int, int]:
    """Code lines of a script, and those outside its shared blocks."""
    text = (ROOT / f"{script}.py").read_text("utf-8")
    return code_lines(text), code_lines(text) - sum(code_lines(body) for _, body in BLOCK.findall(text))


def links_into_code(page: Path) -> list[tuple[str, Path, int]]:
    """Name, file and line of every link to a definition."""
    return [(found["name"] or found["test"], Path(os.path.normpath(page.parent / found["path"])), int(found["line"]))
            for found in INTO_CODE.finditer(page.read_text("utf-8"))]


def right(page: Path) -> str:
    """The page's text with today's lines and counts; a name that is gone keeps its line."""
    def line(found: re.Match) -> str:
        path, old = page.parent / found["path"], found["line"]
        now = definitions(path).get(found["name"] or found["test"], old) if path.exists() else old
        return found[0].replace(f"#L{old}", f"#L{now}")

    def count(found: re.Match) -> str:
        return "{} code lines, {} without the shared blocks".format(*counts(page.stem))

    text = INTO_CODE.sub(line, page.read_text("utf-8"))
    return COUNTS.sub(count, text) if page.stem in SCRIPTS else text


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Every `python X.py ...`, `uv run X.py ...` and `torchrun ... X.py ...`: X.py and its arguments."""
    return [(program, shlex.split(rest)) for program, rest in COMMAND.findall(text)]


def tables(text: str) -> list[list[list[str]]]:
    """Every table: its rows, the line of dashes left out; cells are stripped."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
                rows.append(cells)
        elif rows:
            found.append(rows)
            rows = []
    return found


def script_map(script: str) -> list[tuple[str, list[str]]]:
    """Rows of the Map in a script's docstring: "9119 (17)", "T2, T3" or "", and its functions (or "test")."""
    path = ROOT / f"{script}.py"
    lines = re.search(r"^Map(.*?)^Symbols", ast.get_docstring(ast.parse(path.read_text("utf-8"))), re.M | re.S)[1]
    known, rows = {"test", *definitions(path)}, []
    for line in lines.splitlines():
        names = re.search(r"[\w.]+(?:, [\w.]+)*$", line)
        if names and known.issuperset(names[0].split(", ")):
            number = re.match(r"\s*(\d{4} \(\d+\))", line)
            facts = re.findall(r"\bT\d+\b", line)
            rows.append((number[1] if number else ", ".join(facts), names[0].split(", ")))
    return rows


def section(text: str, title: str) -> str:
    """What stands under `## title`, up to the next."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--check", action="store_true", help="write nothing; 1 if a page is behind")
    args = p.parse_args(argv)
    behind = [page for page in PAGES if right(page) != page.read_text("utf-8")]
    for page in behind:
        print(("behind: " if args.check else "set: ") + str(page.relative_to(ROOT)))
        if not args.check:
            page.write_text(right(page), "utf-8")
    return int(args.check and bool(behind))


if __name__ == "__main__":
    sys.exit(main())
