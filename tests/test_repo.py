"""The house: shared blocks, imports, flags and README hold together over all scripts."""

import argparse
import ast
import difflib
import importlib
import io
import re
import shlex
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALL = "nvae bigan_qp o_gan ddpm rope hier_pos_bert transformer_vq w2v_svd".split()
SCRIPTS = [path for name in ALL if (path := ROOT / f"{name}.py").exists()]
TEXTS = {path.stem: path.read_text("utf-8") for path in SCRIPTS}
README = (ROOT / "README.md").read_text("utf-8")
BLOCK = re.compile(r"^# === shared: (\w+) ===\n(.*?)^# === end shared ===\n", re.M | re.S)
MAY_DIFFER = {"parse_args", "main", "train", "sample", "evaluate", "load_data", "loss", "learning_rate",
              "report", "sample_only"}
each_script = pytest.mark.parametrize("name", TEXTS)


def functions(text):
    return {node.name: node for node in ast.walk(ast.parse(text))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_top_level_is_the_cards():
    names = {p for p in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                                       check=True).stdout.split()}
    top = {name.partition("/")[0] for name in names}
    assert top <= {f"{name}.py" for name in ALL} | {"tests", "assets", "README.md", "LICENSE", "requirements.txt",
                                                   ".gitignore", ".ci", ".github"}
    assert SCRIPTS


def test_shared_blocks_are_identical():
    first = {}
    for name, text in TEXTS.items():
        for block, body in BLOCK.findall(text):
            origin, want = first.setdefault(block, (name, body))
            diff = "".join(difflib.unified_diff(want.splitlines(True), body.splitlines(True), origin, name))
            assert body == want, f"shared block {block} drifts:\n{diff}"


def test_no_unmarked_copies():
    seen = {}
    for name, text in TEXTS.items():
        for node in ast.parse(BLOCK.sub("", text)).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in MAY_DIFFER:
                assert node.name not in seen, f"{node.name}: also in {seen[node.name]}; mark it shared or rename it"
                seen[node.name] = name


def test_shared_blocks_know_nothing_of_their_file():
    """What a block uses stands in that block, in another block, in its imports, or in Python."""
    import builtins
    for name, text in TEXTS.items():
        own = set(functions(BLOCK.sub("", text)))
        for block, body in BLOCK.findall(text):
            names = [node for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)]
            local = {node.id for node in names if isinstance(node.ctx, ast.Store)}
            foreign = {node.id for node in names} & own - local - set(functions(body))
            assert not foreign - set(dir(builtins)), (name, block, foreign)


@each_script
def test_blocks_are_used(name):
    """A script carries only blocks it needs: some name of each is used outside it."""
    for block, body in BLOCK.findall(TEXTS[name]):
        rest = TEXTS[name].replace(body, "")
        assert any(re.search(rf"\b{f}\b", rest) for f in functions(body)), block


@each_script
def test_imports(name):
    """torch, numpy, the standard library; Pillow only inside the reader of a folder of pictures."""
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy"}
    tree = ast.parse(TEXTS[name])
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name == "read_pictures"
              for node in ast.walk(f)}
    for node in ast.walk(tree):
        roots = [a.name for a in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        for root in roots:
            root = root.partition(".")[0]
            assert root in allowed or (root == "PIL" and id(node) in inside), f"line {node.lineno}: {root}"


@each_script
def test_no_import_is_idle(name):
    tree = ast.parse(TEXTS[name])
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | \
        set(re.findall(r"\"(\w+)\"", TEXTS[name]))  # annotations in quotes
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                assert (alias.asname or alias.name).partition(".")[0] in used, f"line {node.lineno}: {alias.name}"


@each_script
def test_importing_does_nothing(name, tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.dont_write_bytecode = True\n"
            f"import torch; state = torch.random.get_rng_state(); threads = torch.get_num_threads()\n"
            f"import {name}\n"
            f"assert torch.equal(state, torch.random.get_rng_state()) and threads == torch.get_num_threads()")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


def parser(name):
    """The script's ArgumentParser, caught as parse_args uses it."""
    caught = []
    real = argparse.ArgumentParser.parse_args

    def catch(self, argv=None, namespace=None):
        caught.append(self)
        return real(self, argv, namespace)
    argparse.ArgumentParser.parse_args = catch
    try:
        importlib.import_module(name).parse_args([])
    finally:
        argparse.ArgumentParser.parse_args = real
    return caught[0]


def test_common_flags_are_alike():
    """Same name, kind, metavar and help in all scripts, but for the data sets' names and the defaults."""
    common = "--gpu --data --steps --batch-size --seed --out --resume --cache --fp32 --compile".split()
    first = {}
    for name in TEXTS:
        actions = {a.option_strings[0]: a for a in parser(name)._actions if a.option_strings}
        for flag in common:
            a = actions[flag]
            text = re.sub(r" ?\(default: .*\)$", "", a.help or "")
            facts = (type(a), a.metavar, a.choices, None if flag == "--data" else text)
            origin, want = first.setdefault(flag, (name, facts))
            assert facts == want, f"{flag}: {name} differs from {origin}"


@each_script
def test_every_flag_is_explained(name):
    for a in parser(name)._actions:
        assert a.help, a.option_strings
        assert all(re.fullmatch(r"-h|--[a-z0-9]+(-[a-z0-9]+)*|--T", s) for s in a.option_strings), a.option_strings


def commands(text):
    """Every `python X.py ...` and `torchrun ... X.py ...` in a text: (script, arguments)."""
    return [(script, shlex.split(rest)) for script, rest in
            re.findall(r"(?:python|torchrun [^\n`]*?) ?\b(\w+)\.py\b([^\n`#&|]*)", text) if script in ALL]


def test_readme_commands_parse():
    found = commands(README)
    assert {script for script, _ in found} == set(TEXTS)
    for script, argv in found:
        importlib.import_module(script).parse_args(argv)


@each_script
def test_docstring_commands_parse(name):
    found = commands(ast.get_docstring(ast.parse(TEXTS[name])))
    assert found
    for script, argv in found:
        assert script == name
        importlib.import_module(name).parse_args(argv)


def test_readme_first_commands_are_one_line_each():
    assert "pip install -r requirements.txt && python ddpm.py\n" in README
    assert "pip install -r requirements.txt && python -m pytest\n" in README


def test_readme_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"src=\"([^\"]+)\"", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for path in (ROOT / "assets").iterdir():
        assert path.stat().st_size < 400_000 and path.name in README, path.name


def test_readme_names_only_scripts_that_exist():
    assert {s for s in re.findall(r"\b(\w+)\.py\b", README) if s in ALL} == set(TEXTS)


def code_lines(text):
    """Lines with code on them: no blanks, comments or docstrings."""
    docs = {line for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant) for line in range(node.lineno, node.end_lineno + 1)}
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = {line for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in skip
             for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - docs)


@each_script
def test_readme_counts_the_lines_right(name):
    own = code_lines(TEXTS[name]) - sum(code_lines(body) for _, body in BLOCK.findall(TEXTS[name]))
    row = re.search(rf"^\| \[{name}\.py\].*?\| (\d+) \((\d+)\) \|", README, re.M)
    assert [int(row[1]), int(row[2])] == [code_lines(TEXTS[name]), own]


@each_script
def test_every_equation_of_the_map_has_a_line_and_a_test(name):
    """Map rows `9119 (17) ... function`: cited inside that function, and in a test's name; `test`: there alone."""
    doc = ast.get_docstring(ast.parse(TEXTS[name]))
    rows = re.findall(r"^(?:Map)?\s+(\d{4}) \((\d+)\)\s.*?(\S+)$", doc, re.M)
    if not rows:
        pytest.skip("cites by section")
    tests = " ".join(functions((ROOT / f"tests/test_{name}.py").read_text("utf-8")))
    lines = TEXTS[name].splitlines()
    nodes = functions(TEXTS[name])
    for post, number, where in rows:
        assert re.search(rf"test_{post}_(?:\d+_)*{number}(?:_|\b)", tests), f"no test names {post} ({number})"
        if where != "test":
            node = nodes[where]
            body = "\n".join(lines[node.lineno - 1:node.end_lineno])
            assert re.search(rf"{post} [^\n]*\({number}\)", body), f"{where} does not cite {post} ({number})"


def test_requirements_are_the_cards():
    names = [re.match(r"[a-z]+", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert names == ["torch", "numpy", "pytest", "hypothesis"]


@each_script
def test_form(name):
    for k, line in enumerate(TEXTS[name].splitlines(), 1):
        assert len(line) <= 100 and line == line.rstrip() and "TODO" not in line, f"line {k}"


PASTE = re.compile(r"Copy ((?:`\w+`[, and]*)+) from `(\w+)\.py`[^\n]*\n+```python\n(.*?)```", re.S)


def test_every_script_has_a_paste_example():
    assert {script for _, script, _ in PASTE.findall(README)} == set(TEXTS)


@pytest.mark.parametrize("names, script, code", PASTE.findall(README), ids=lambda v: v[:9])
def test_readme_paste_example_runs(names, script, code):
    """The named definitions and the script's imports, nothing else, then the README's lines."""
    assert len(code.splitlines()) <= 15
    wanted, space = set(re.findall(r"`(\w+)`", names)), {}
    tree = ast.parse(TEXTS[script])
    for node in tree.body:
        own = {node.name} if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else \
            {t.id for t in node.targets if isinstance(t, ast.Name)} if isinstance(node, ast.Assign) else set()
        if isinstance(node, (ast.Import, ast.ImportFrom)) or own & wanted:
            exec(compile(ast.Module([node], []), script, "exec"), space)
            wanted -= own
    assert not wanted, f"{script}.py has no {wanted}"
    exec(code, space)
