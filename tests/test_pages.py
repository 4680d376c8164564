"""The pages, README.md and docs/, say what the code is: commands, links, maps, tables, examples, pictures."""

import argparse
import ast
import functools
import importlib
import json
import math
import re
import runpy
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from pages import (ALL, COUNTS, INTO_CODE, PAGES, PASTE, ROOT, SCRIPTS, commands, counts, definitions,
                   links_into_code, main, right, script_map, section, tables)

README, CHINESE = ROOT / "README.md", ROOT / "docs/README.zh-CN.md"
SECTIONS = ["The post's claim and our number", "The map", "Is my loss normal?", "What was changed, and why",
            "An example to copy", "Speed and memory", "Experiments", "What is not reached"]
TEXTS = {page: page.read_text("utf-8") for page in PAGES}
FRONTS = [README, CHINESE]
OWN = {script: ROOT / f"docs/{script}.md" for script in SCRIPTS}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
each_script = pytest.mark.parametrize("script", SCRIPTS)


class Parsed(Exception):
    """Thrown when a program has read its command line: what it would do next is not wanted here."""


def parse(program, argv):
    """Lets X.py read argv, and no more; returns the parser it asked. SystemExit if that refuses argv.

    What an experiment leaves over (parse_known_args), tests/experiments/SCRIPT_WHAT.py, is for SCRIPT.py.
    """
    caught, left = [], []
    whole, known = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args

    def all_of(self, args=None, namespace=None):
        if args is not None and list(args) != argv:  # another parser, asked for defaults
            return whole(self, args, namespace)
        caught.append(self)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", known)
        whole(self, args, namespace)
        raise Parsed

    def some_of(self, args=None, namespace=None):
        caught.append(self)
        left[:] = known(self, args, namespace)[1]
        raise Parsed

    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", all_of)
        if "/" in program:
            patch.setattr(argparse.ArgumentParser, "parse_known_args", some_of)
        patch.setattr(sys, "argv", [program, *argv])
        patch.setattr(sys, "path", list(sys.path))
        try:
            if "/" in program:
                assert re.search(r"parse_(known_)?args\(", (ROOT / program).read_text("utf-8")), f"{program}: no flags"
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                importlib.import_module(Path(program).stem).parse_args(argv)
        except Parsed:
            pass
        except SystemExit as end:
            if end.code and argv:  # with no argument: only the parser is wanted
                raise
    if left:
        parse(next(f"{script}.py" for script in SCRIPTS if Path(program).name.startswith(script)), left)
    return caught[0]


@functools.cache
def options(program):
    return {name for action in parse(program, [])._actions for name in action.option_strings}


# ---- form ----

def test_the_pages_are_there():
    assert set(PAGES) >= {README, CHINESE, *OWN.values()}
    assert {page.stem for page in PAGES} - {"README", "README.zh-CN"} <= set(ALL), "a page of no script"


def test_front_page_is_short_and_begins_with_the_other_language():
    for page in FRONTS:
        lines = TEXTS[page].splitlines()
        assert len(lines) <= 120, page.name
    assert "](docs/README.zh-CN.md)" in TEXTS[README].splitlines()[0]
    assert "](../README.md)" in TEXTS[CHINESE].splitlines()[0]


def test_first_commands_are_word_for_word():
    for page in FRONTS:
        for command in ("pip install -r requirements.txt && python ddpm.py\n",
                        "pip install -r requirements.txt && python -m pytest\n", "uv run ddpm.py"):
            assert command in TEXTS[page], (page.name, command)


@each_script
def test_sections_stand_in_the_house_order(script):
    assert re.findall(r"^## (.*)$", TEXTS[OWN[script]], re.M) == SECTIONS
    top = TEXTS[OWN[script]].partition("\n## ")[0]
    assert re.search(r"<img |!\[", top) and f"python {script}.py" in top, "a picture and the command come first"
    doc = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text("utf-8")))
    posts = set(re.findall(r"archives/(\d{4})", doc)) | set(re.findall(r"^(?:Map)? +(\d{4}) ", doc, re.M))
    assert posts and all(f"](https://kexue.fm/archives/{post})" in TEXTS[OWN[script]] for post in posts), posts


@each_page
def test_formulas_survive_markdown(page):
    """Inline math is $`...`$, which no rule of Markdown touches; no bare dollars; no pipe within a table."""
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.S)
    spans = re.findall(r"\$`([^`]+)`\$", text)
    for span in spans:
        assert "|" not in span and "\n" not in span, span
        assert span.count("{") - span.count(r"\{") == span.count("}") - span.count(r"\}"), span
        assert len(re.findall(r"\\left\b", span)) == len(re.findall(r"\\right\b", span)), span
    assert "$" not in re.sub(r"\$`[^`]+`\$", "", text), "a dollar outside $`...`$"
    assert spans or page not in OWN.values()


@each_page
def test_tables_are_whole(page):
    for rows in tables(TEXTS[page]):
        assert len(rows) > 1 and len({len(row) for row in rows}) == 1, rows[0]


# ---- commands and flags ----

@pytest.mark.parametrize("program, good, bad", [
    ("ddpm.py", ["--steps", "2"], ["--stepps", "2"]), ("tests/bench.py", ["ddpm", "--threads", "1"], ["ddpm", "--treads", "1"]),
    ("tests/experiments/rope_codes.py", ["--seeds", "0", "--steps", "2"], ["--seeds", "0", "--stepps", "2"]),
    ("tests/experiments/strip.py", ["--to", "x.png"], ["--two", "x.png"])])
def test_a_wrong_command_would_be_found(program, good, bad, capsys, tmp_path):
    assert parse(program, good) and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        parse(program, bad)


@each_page
def test_commands_parse(page):
    found = commands(TEXTS[page])
    assert found
    for program, argv in found:
        assert (ROOT / program).is_file(), program
        try:
            parse(program, argv)
        except SystemExit as error:
            raise AssertionError(f"{program} {' '.join(argv)}: refused") from error


@each_page
def test_flags_exist(page):
    """Each --flag named on a page is one of its script (on a front page: of some), or of a program run there."""
    known = {"--nproc_per_node"}.union(*(options(program) for program, _ in commands(TEXTS[page])),
                                       *(options(f"{script}.py") for script in SCRIPTS if page.stem == script))
    named = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", TEXTS[page]))
    assert named <= known, named - known


def test_common_flags_are_everybodys():
    rows = next(rows for rows in tables(TEXTS[README]) if rows[0][0] == "flag")[1:]
    named = {flag for row in rows for flag in re.findall(r"--[a-z0-9-]+", row[0])}
    assert named >= set("--gpu --data --steps --batch-size --seed --out --resume --cache --fp32 --compile".split())
    for script in SCRIPTS:
        assert named <= options(f"{script}.py"), (script, named - options(f"{script}.py"))


def test_pages_name_only_programs_that_exist():
    for page, text in TEXTS.items():
        for name in re.findall(r"\b([\w/]+\.py)\b(?!\))", re.sub(r"https?://\S+", "", text)):
            there = [ROOT / name, ROOT / "tests" / name, ROOT / "tests/experiments" / name]
            assert any(path.exists() for path in there), f"{page.name}: {name}"


def test_every_experiment_is_named_on_a_page():
    for path in (ROOT / "tests/experiments").glob("*.py"):
        assert any(f"tests/experiments/{path.name}" in text for text in TEXTS.values()), path.name


# ---- links, pictures ----

@each_page
def test_links_and_pictures_exist(page):
    text = re.sub(r"`[^`\n]*`", lambda found: "x" * len(found[0]), TEXTS[page])
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        if target.startswith("http"):
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_pictures_are_used_and_small():
    pictures = [path for path in (ROOT / "docs").iterdir() if path.suffix != ".md"]
    assert pictures
    for path in pictures:
        assert path.suffix in (".png", ".svg") and path.stat().st_size < 400_000, path.name
        assert any(re.search(rf"[\"(/]{re.escape(path.name)}[\")]", text) for text in TEXTS.values()), path.name
    assert not (ROOT / "assets").exists()


@each_page
def test_links_into_the_code_point_at_what_they_name(page):
    """`python tests/pages.py` sets them right."""
    found = links_into_code(page)
    assert found or page not in OWN.values()
    for name, path, line in found:
        assert definitions(path).get(name) == line, f"{page.name}: {name} is not in line {line} of {path.name}"
        assert re.search(rf"\b{name.rpartition('.')[2]}\b", path.read_text("utf-8").splitlines()[line - 1])
    assert not re.search(r"\.py#L", INTO_CODE.sub("", TEXTS[page])), "a link to a line that names nothing"


def test_the_tool_sets_lines_and_counts(tmp_path, monkeypatch, capsys):
    """A page with wrong lines and counts is named by --check and put right; a right one is left alone."""
    import pages
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "ddpm.py", tmp_path)
    page = tmp_path / "docs/ddpm.md"
    wrong = ("[`sample`](../ddpm.py#L1) [`UNet.forward`](../ddpm.py#L2) [`gone`](../ddpm.py#L3)\n"
             "1 code lines, 1 without the shared blocks\n")
    page.write_text(wrong)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "PAGES", [page])
    assert main(["--check"]) == 1 and page.read_text() == wrong
    assert main([]) == 0 and main(["--check"]) == 0
    lines = (ROOT / "ddpm.py").read_text("utf-8").splitlines()
    sample, forward, gone = (int(n) for n in re.findall(r"#L(\d+)", page.read_text()))
    assert lines[sample - 1].startswith("def sample(") and gone == 3
    assert lines[forward - 1].startswith("    def forward(")
    assert max(k for k, line in enumerate(lines[:forward], 1) if line.startswith("class ")) == \
        lines.index("class UNet(nn.Module):") + 1
    total, own = map(int, COUNTS.search(page.read_text()).groups())
    assert (total, own) == counts("ddpm") and 100 < own < total < len(lines)
    assert capsys.readouterr().out == "behind: docs/ddpm.md\nset: docs/ddpm.md\n"


# ---- the map ----

def page_map(script):
    """Rows of the page's map: label ("9119 (17)", "T2, T3" or ""), functions of the script, tests."""
    text = section(TEXTS[OWN[script]], "The map")
    post = re.search(r"archives/(\d{4})", TEXTS[OWN[script]])[1]
    for rows in tables(text):
        for cells in rows[1:]:
            found = re.match(r"(?:(\d{4}) )?\((\d+)\)", re.sub(r"\[(.*?)\]\(http.*?\)", r"\1", cells[0]))
            label = f"{found[1] or post} ({found[2]})" if found else ", ".join(re.findall(r"\bT\d+\b", cells[0]))
            links = [link.groupdict() for link in INTO_CODE.finditer(" ".join(cells))]
            yield (label, " ".join(cells[1:]), {link["name"] for link in links if link["path"] == f"../{script}.py"},
                   {link["test"] for link in links if link["path"] == f"../tests/test_{script}.py"})


@each_script
def test_the_pages_map_is_the_scripts(script):
    """Every numbered equation stands in both, with the same functions, or with its tests; so do unnumbered ones."""
    here, there, tested = defaultdict(set), defaultdict(set), defaultdict(set)
    for label, text, names, tests in page_map(script):
        here[label] |= names
        tested[label] |= tests
        assert names or tests, f"{label}: no link"
        if re.match(r"\d{4} ", label):
            assert "$`" in text, f"{label}: no formula"
    for label, names in script_map(script):
        there[label] |= set(names)
    for label, names in there.items():
        if re.match(r"\d{4} \(", label):
            assert here[label] == names - {"test"}, label
            number = re.findall(r"\d+", label)
            for name in tested[label]:
                assert number[0] in name and re.search(rf"_{number[1]}(_|$)", name), f"{name} is not of {label}"
            assert "test" not in names or tested[label], f"{label}: its tests"
    numbered = {label for label in there if re.match(r"\d{4} \(", label)}
    assert numbered == {label for label in here if re.match(r"\d{4} \(", label)}
    assert set().union(*there.values()) - {"test"} == set().union(*here.values())
    for fact in set(re.findall(r"\bT\d+\b", " ".join(there))):
        wanted, found = (set().union(*(rows[label] for label in rows if re.search(rf"\b{fact}\b", label)))
                         for rows in (there, here))
        assert wanted <= found, f"{fact}: {wanted - found}"


@each_script
def test_every_departure_is_told(script):
    """What the code marks with `departs:` is in a function or class that the page's list of changes names."""
    path, told = ROOT / f"{script}.py", section(TEXTS[OWN[script]], "What was changed, and why")
    lines = path.read_text("utf-8").splitlines()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef) or isinstance(node, ast.ClassDef) and "departs:" in (ast.get_docstring(node) or ""):
            if any("departs:" in line for line in lines[node.lineno - 1:node.end_lineno]):
                owner = next((c.name for c in ast.parse(path.read_text("utf-8")).body if isinstance(c, ast.ClassDef)
                              and c.lineno <= node.lineno <= c.end_lineno), node.name)
                assert re.search(rf"`{owner}`|`{owner}\.{node.name}`", told), owner


# ---- examples ----

def test_every_script_has_an_example_to_copy():
    for script, page in OWN.items():
        assert [name for _, name, _ in PASTE.findall(section(TEXTS[page], "An example to copy"))] == [script]
    assert all(len(PASTE.findall(TEXTS[page])) == 1 for page in FRONTS)


@pytest.mark.parametrize("page, names, script, code", [(page.name, *found) for page in PAGES
                                                       for found in PASTE.findall(TEXTS[page])],
                         ids=lambda text: text[:12])
def test_example_runs(page, names, script, code):
    """The named definitions and the script's imports, nothing else, then the page's lines."""
    assert len(code.splitlines()) <= 15
    wanted, space = set(re.findall(r"`(\w+)`", names)), {}
    for node in ast.parse((ROOT / f"{script}.py").read_text("utf-8")).body:
        own = {node.name} if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else \
            {t.id for t in node.targets if isinstance(t, ast.Name)} if isinstance(node, ast.Assign) else set()
        if isinstance(node, (ast.Import, ast.ImportFrom)) or own & wanted:
            exec(compile(ast.Module([node], []), script, "exec"), space)
            wanted -= own
    assert not wanted, f"{script}.py has no {wanted}"
    exec(code, space)


# ---- numbers ----

def numbers(text):
    """The numbers of a text, but for those within a name, as in Word2Vec."""
    return sorted(re.findall(r"(?<![A-Za-z\d.])(?:\d+(?:[.,:]\d+)*|\.\d+)(?:e-?\d+)?", text))


@each_script
def test_counts_of_code_lines(script):
    """`python tests/pages.py` sets them right."""
    found = COUNTS.search(TEXTS[OWN[script]])
    assert found and (int(found[1]), int(found[2])) == counts(script)


@pytest.mark.parametrize("page", FRONTS, ids=lambda page: page.name)
def test_table_of_scripts(page):
    """A row each; its post, its page, and the headline number, which stands on that page too."""
    rows = next(rows for rows in tables(TEXTS[page]) if ".py" in rows[1][0])
    assert [re.search(r"(\w+)\.py", row[0])[1] for row in rows[1:]] == SCRIPTS
    for script, row in zip(SCRIPTS, rows[1:]):
        assert "https://kexue.fm/archives/" in row[1] and f"{script}.md" in row[-1]
        head = numbers(row[-2])
        assert head and set(head) <= set(numbers(TEXTS[OWN[script]])), (script, head)


def test_chinese_front_page_says_the_same():
    """The same scripts, commands, links and, row by row, numbers as the English one."""
    here, there = TEXTS[CHINESE], TEXTS[README]
    assert commands(here) == commands(there)

    def links(page):
        return {str((page.parent / target).resolve()) if not target.startswith("http") else target
                for target in re.findall(r"\]\(([^)#\s]+)", TEXTS[page])} - {str(README), str(CHINESE)}
    assert links(CHINESE) == links(README)
    for rows, wanted in zip(tables(here), tables(there), strict=True):
        assert [numbers(" ".join(row)) for row in rows] == [numbers(" ".join(row)) for row in wanted]
    assert set(re.findall(r"`(--[a-z0-9-]+)", here)) == set(re.findall(r"`(--[a-z0-9-]+)", there))
    assert all(re.search("[\u4e00-\u9fff]", part) for part in re.split(r"\n## ", here))


@each_page
def test_ratios_are_those_of_their_rows(page):
    """A column "ratio" beside "this project" is the first peer's number over ours, to its last digit."""
    for rows in tables(TEXTS[page]):
        if "ratio" not in rows[0] or "this project" not in rows[0]:
            continue
        ours = rows[0].index("this project")
        for row in rows[1:]:
            mine, theirs = (re.findall(r"\d+\.\d+|\d+", row[k].partition("(")[0]) for k in (ours, ours + 1))
            said = re.findall(r"\d+\.\d+|\d+", row[rows[0].index("ratio")])
            for a, b, ratio in zip(mine, theirs, said, strict=True):
                slack = sum(half_digit(x) / float(x) for x in (a, b)) * float(ratio) + half_digit(ratio)
                assert math.isclose(float(b) / float(a), float(ratio), abs_tol=slack), (row[0], a, b, ratio)


def half_digit(number):
    return 0.5 * 10.0 ** -len(number.partition(".")[2]) * 1.0001


CHECKED = re.compile(r"([-\d.,]+(?:e[-+]?\d+)?)(?:`\$)?(?: [A-Za-z%]+)?<!-- = (.*?) -->")


@each_page
def test_numbers_that_code_can_tell(page):
    """`1,234<!-- = expression -->`: the expression, with the scripts and torch, rounds to the number."""
    import torch
    space = {"torch": torch, "math": math} | {script: importlib.import_module(script) for script in SCRIPTS}
    found = CHECKED.findall(TEXTS[page])
    assert len(found) == TEXTS[page].count("<!-- =")
    for said, expression in found:
        digits, _, power = said.replace(",", "").partition("e")
        half = half_digit(digits) * 10.0 ** int(power or 0)
        value = float(eval(expression, space))
        assert abs(value - float(said.replace(",", ""))) <= half, f"{expression} is {value}, not {said}"


# ---- the strip ----

def test_the_strip_shows_faces_blocks_codes_and_words(tmp_path):
    """Above the faces themselves. Below P makes the dense R_n block-diagonal; copies of p look alike; as many different rows
    of K_hat K_hat^T as codes are in use, a 1 in each row of Delta; words are in colour."""
    import ddpm
    import hier_pos_bert
    import rope
    import torch
    import transformer_vq
    import w2v_svd
    out, cpu = tmp_path / "out", torch.device("cpu")
    for name in ALL:
        (out / name).mkdir(parents=True)
    sheets = {}
    for name, what, columns in (("ddpm", "samples", 8), ("nvae", "samples", 8), ("o_gan", "reconstructions", 8),
                                ("bigan_qp", "interpolation", 10)):
        sheets[name] = torch.randint(256, (6 * columns, 3, 32, 32), dtype=torch.uint8)
        ddpm.write_png(out / name / f"{what}.png", ddpm.grid(sheets[name], columns))
    p = torch.randn(8, 6)
    torch.save(dict(model={"bert.embeddings.position_embeddings.weight": p}), out / "hier_pos_bert/ckpt.pt")
    nets = {}
    for script in (rope, transformer_vq):
        args = script.parse_args([])
        nets[script] = script.build(args, cpu)
        if script is rope:
            torch.nn.init.normal_(nets[rope].A)
        config = {name: getattr(args, name) for name in args.config}
        torch.save(dict(config=config, model=nets[script].state_dict()), out / script.__name__ / "ckpt.pt")
    text = bytes(range(32, 128))
    (out / "transformer_vq/samples.txt").write_bytes(text)
    w2v_svd.write_vectors(out / "w2v_svd/vectors.bin", list("abcdefghij"), torch.randn(10, 4))
    strip = runpy.run_path(str(ROOT / "tests/experiments/strip.py"))
    assert strip["main"](["--out", str(out), "--to", str(tmp_path / "strip.png")]) == 0
    picture, side = strip["read_png"](tmp_path / "strip.png").int(), strip["SIDE"]
    assert picture.shape == (3, 2 * side + 12, 4 * side + 36)
    above, squares = ([picture[:, row * (side + 12):][:, :side, k * (side + 12):k * (side + 12) + side] for k in range(4)]
                      for row in (0, 1))
    for (name, x), square in zip(sheets.items(), above):
        columns = (0, 3, 6, 9) if name == "bigan_qp" else range(4)
        x = x.unflatten(0, (6, -1))[:4, list(columns)].flatten(0, 1)
        assert torch.equal(square, ddpm.grid(x, 4).int()), name

    def tile(square, row, column, n):
        width = (side - 20) // 2
        places = ((torch.arange(n) + 0.5) * width / n).long()
        return square[:, row * (width + 8) + 4 + places][:, :, column * (width + 8) + 4 + places]

    d = nets[rope].B().shape[-1]
    for row in (0, 1):
        for column in (0, 1):
            R = tile(squares[0], row, column, d).amin(0) < 250  # not white
            off = R & ~torch.block_diag(*[torch.ones(2, 2)] * (d // 2)).bool()
            assert R.diagonal().any() and bool(off.any()) == (row == 0)
    u = torch.nn.functional.normalize(p - p.mean(0), dim=1)
    for row, column, n in (0, 0, 8), (0, 1, 16), (1, 0, 16), (1, 1, 16):
        R = tile(squares[1], row, column, n)
        assert torch.equal(R, R.mT) and R.diagonal(dim1=1, dim2=2).unique(dim=1).shape[1] == 1  # cosines, 1 with itself
        alike = torch.equal(R[:, :8, :8], R[:, -8:, :8]) if n > 8 else None
        assert alike is {(0, 1): False, (1, 0): True, (1, 1): False}.get((row, column))
    R = tile(squares[1], 0, 0, 8)
    assert bool((R[0] > R[2]).any()) and torch.equal(R[0] > R[2], (u @ u.T > 0.01) & (R[0] > R[2]))  # red is like
    ids = nets[transformer_vq](torch.tensor([list(text[:64])]))[3][1][1][0]
    codes = tile(squares[2], 0, 1, 64)
    assert len({tuple(row.flatten().tolist()) for row in codes.unbind(1)}) == len(ids.unique()) > 1
    assert torch.equal((tile(squares[2], 1, 0, 64).amin(0) < 100).int().argmax(1), ids)
    assert (squares[3].amin(0) < 255).any() and (squares[3].amax(0) - squares[3].amin(0) > 50).any()


def test_four_faces_runs_each_and_shows_what_it_found(tmp_path, monkeypatch, capsys):
    """Two short runs of each: the table has the means of what metrics.json says, the picture a row of samples of each."""
    import numpy as np
    import torch
    import test_habits
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    test_habits.folder()
    four = runpy.run_path(str(ROOT / "tests/experiments/four_faces.py"))
    own = [part for name in four["SCRIPTS"] for part in ("--set", name, f"{test_habits.SHORT[name]} --samples 64")]
    flags = "--data pictures.npy --judge 6 --probe 2 --seconds 1e-9 --seeds 3 4 --out four --to four.png".split()
    runs = four["main"]([*flags, *own])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|") for line in lines if line.startswith(tuple(f"| {name} |" for name in four["SCRIPTS"]))]
    assert [row[1].strip() for row in rows] == list(runs) == four["SCRIPTS"]
    for row in rows:
        name = row[1].strip()
        found = [json.loads(Path(f"four/{name}.{seed}/metrics.json").read_text()) for seed in (3, 4)]
        assert found == runs[name] and {m["seed"] for m in found} == {3, 4} and {m["step"] for m in found} == {int(row[2])} == {2}
        for cell, key in zip(row[3:8], (*four["COLUMNS"], "train_seconds")):
            mean, low, high = map(float, re.findall(r"[\d.e+-]+", cell))
            values = [m[key] for m in found]
            assert [mean, low, high] == pytest.approx([np.mean(values), min(values), max(values)], rel=0.01), key
    picture = runpy.run_path(str(ROOT / "tests/experiments/strip.py"))["read_png"](Path("four.png"))
    height = picture.shape[1] // 4
    for k, name in enumerate(four["SCRIPTS"]):
        sheet = runpy.run_path(str(ROOT / "tests/experiments/strip.py"))["read_png"](Path(f"four/{name}.3/samples.png"))
        assert torch.equal(picture[:, k * height:(k + 1) * height], sheet.expand(3, -1, -1)[:, :height])
    with pytest.raises(SystemExit):
        four["main"](flags)  # the folder is there
