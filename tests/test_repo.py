"""The house: shared blocks, imports, flags, form and skeleton hold together over all scripts. test_pages.py reads the pages."""

import argparse
import ast
import builtins
import difflib
import importlib
import re
import subprocess
import sys

import pytest
from pages import ALL, BLOCK, ROOT, commands
from pages import SCRIPTS as NAMES

TEXTS = {name: (ROOT / f"{name}.py").read_text("utf-8") for name in NAMES}
SKELETON = "check_flags load_data build train report sample_only parse_args main".split()
BANNERS = ["model", "evaluation", "training", "command line", "plumbing", "main"]
MAY_DIFFER = {*SKELETON, "sample", "loss", "learning_rate"}
each_script = pytest.mark.parametrize("name", TEXTS)


def functions(text):
    return {node.name: node for node in ast.walk(ast.parse(text))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def own(name):
    """The script without its shared blocks, whose lines stay as blanks so that numbers of lines stay right."""
    return BLOCK.sub(lambda block: "\n" * block[0].count("\n"), TEXTS[name])


def test_top_level_is_the_cards():
    names = {p for p in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                                       check=True).stdout.split()}
    top = {name.partition("/")[0] for name in names}
    assert top <= {f"{name}.py" for name in ALL} | {"tests", "docs", "README.md", "LICENSE", "requirements.txt",
                                                   ".gitignore", ".ci", ".github"}
    assert NAMES


# ---- shared blocks ----

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
    for name, text in TEXTS.items():
        top = ast.parse(BLOCK.sub("", text)).body
        of_the_file = {node.name for node in top if isinstance(node, (ast.FunctionDef, ast.ClassDef))} | {
            target.id for node in top if isinstance(node, ast.Assign) for target in node.targets
            if isinstance(target, ast.Name)}
        for block, body in BLOCK.findall(text):
            nodes = list(ast.walk(ast.parse(body)))
            names = [node for node in nodes if isinstance(node, ast.Name)]
            local = {node.id for node in names if isinstance(node.ctx, ast.Store)} | {
                node.arg for node in nodes if isinstance(node, ast.arg)}
            foreign = {node.id for node in names} & of_the_file - local - set(functions(body))
            assert not foreign - set(dir(builtins)), (name, block, foreign)


@each_script
def test_blocks_are_used(name):
    """A script carries only blocks it needs: some name of each is used outside it."""
    for block, body in BLOCK.findall(TEXTS[name]):
        rest = TEXTS[name].replace(body, "")
        assert any(re.search(rf"\b{f}\b", rest) for f in functions(body)), block


# ---- imports ----

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


def test_importing_does_nothing(tmp_path):
    """All of them in one process: nothing said, written, drawn or set."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.dont_write_bytecode = True\n"
            f"import signal, torch\n"
            f"def now(): return (torch.random.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(),\n"
            f"    torch.is_grad_enabled(), [signal.getsignal(k) for k in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)])\n"
            f"before = now()\n"
            f"import {', '.join(NAMES)}\n"
            f"assert before == now() and not torch.distributed.is_initialized()")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


@each_script
def test_the_inline_dependencies_are_the_imports(name):
    """PEP 723, for `uv run`: the first lines, with what is imported at the top beside the standard library."""
    block = re.match(r"# /// script\n# requires-python = \">=(3\.\d+)\"\n# dependencies = \[(.*?)\]\n# ///\n\"\"\"",
                     TEXTS[name])
    assert block and block[1] == "3.10"
    imported = {(alias.name if isinstance(node, ast.Import) else node.module).partition(".")[0]
                for node in ast.parse(TEXTS[name]).body if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in node.names}
    assert set(re.findall(r"\"(\w+)\"", block[2])) == imported - set(sys.stdlib_module_names) == {"torch", "numpy"}


# ---- skeleton ----

@each_script
def test_banners_stand_in_the_house_order(name):
    """The post, beyond it, sections of the script's own, the model and so on; what a banner says after a colon is free."""
    found = [line.partition(":")[0] for line in re.findall(r"^# ---- (.*) ----$", TEXTS[name], re.M)]
    first = re.search(r"^# ---- (.*) ----$", TEXTS[name], re.M)[1]
    assert re.fullmatch(r"the posts?: \d{4}(, \d{4})*", first), "the post comes first"
    known = [banner for banner in found if banner in BANNERS]
    assert known == BANNERS, known
    if (beyond := [k for k, banner in enumerate(found) if banner.startswith("beyond the post")]):
        assert beyond == [1]
    assert found[found.index("training"):] == BANNERS[BANNERS.index("training"):], "sections of its own come before"


@each_script
def test_the_skeleton_is_the_same(name):
    """Same names, each in its section, in one order; the arguments that `run` and the loop rely on."""
    nodes = {node.name: node for node in ast.parse(own(name)).body if isinstance(node, ast.FunctionDef)}
    section = {word: TEXTS[name][:TEXTS[name].index(f"\ndef {word}(")].rpartition("\n# ---- ")[2].partition(" ----")[0]
               for word in SKELETON}
    assert {word: section[word] for word in ("parse_args", "main")} == {"parse_args": "command line", "main": "main"}
    assert section["report"] in ("training", "evaluation")
    assert {section[word] for word in SKELETON[:4] + ["sample_only"]} == {"training"}
    order = [word for word in nodes if word in SKELETON and word != "report"]
    assert order == [word for word in SKELETON if word != "report"]
    for word in ("train", "sample_only"):
        assert [a.arg for a in nodes[word].args.args] == ["args", "device", "state"], word
    assert [a.arg for a in nodes["check_flags"].args.args] == ["args"]
    assert [a.arg for a in nodes["load_data"].args.args][:2] == ["args", "device"]
    assert ast.unparse(nodes["report"].returns) == "dict" and ast.unparse(nodes["train"].returns) == "None"
    assert "save_checkpoint(args, step, parts" in own(name)
    loop, = (node for node in ast.walk(ast.parse(own(name))) if isinstance(node, ast.For)
             and ast.unparse(node.iter).startswith("training("))
    assert loop.end_lineno - loop.lineno < 50, "the loop fits a screen"


WRITERS = {"read_flags", "resume_run", "make_room"}


@each_script
def test_flags_are_written_in_one_place_only(name):
    """After read_flags, resume_run and make_room nobody sets an attribute of args, by whatever road."""
    tree = ast.parse(TEXTS[name])
    allowed = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in WRITERS
               for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in allowed:
            continue
        stored = isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, (ast.Store, ast.Del))
        assert not (stored and re.match(r"(args|vars\(args\)|args\.__dict__)\b", ast.unparse(node.value))), f"line {node.lineno}"
        if isinstance(node, ast.Call):
            call = ast.unparse(node)
            assert not re.match(r"(setattr|delattr)\(args\b|(vars\(args\)|args\.__dict__)\.(update|setdefault|pop)\(", call), call


@each_script
def test_no_two_streams_share_a_key(name):
    """Of the keys of one length each ends in a number of its own, or there is but one; the legend names these numbers."""
    legend = re.search(r"^# ---- training ----\n((?:#[^\n]*\n)+)", TEXTS[name], re.M)
    assert legend, "a legend of the streams opens the training section"
    keys = {}
    for node in ast.walk(ast.parse(TEXTS[name])):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "generator":
            assert not any(isinstance(a, ast.Starred) for a in node.args), f"line {node.lineno}: a key is spelled out"
            keys.setdefault(len(node.args) - 1, []).append(node.args[-1])
    assert keys
    for length, last in keys.items():
        numbers = [node.value for node in last if isinstance(node, ast.Constant)]
        assert len(last) == 1 or len(set(numbers)) == len(last), (length, [ast.unparse(node) for node in last])
        for number in numbers:
            assert re.search(rf"\b{number}\b", legend[1]), f"the legend does not name key {number}"


# ---- flags ----

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
    """Same name, kind, metavar and help in all scripts, but for the data sets' names, defaults and what 0 means."""
    common = "--gpu --data --steps --batch-size --seed --out --resume --cache --fp32 --compile".split()
    first = {}
    for name in TEXTS:
        actions = {a.option_strings[0]: a for a in parser(name)._actions if a.option_strings}
        for flag in common:
            a = actions[flag]
            text = re.sub(r"(; 0: [^;(]*)? ?\(default: .*\)$", "", a.help or "")
            facts = (type(a), a.metavar, a.choices, None if flag == "--data" else text)
            origin, want = first.setdefault(flag, (name, facts))
            assert facts == want, f"{flag}: {name} differs from {origin}"


@each_script
def test_every_flag_is_explained(name):
    for a in parser(name)._actions:
        assert a.help, a.option_strings
        assert all(re.fullmatch(r"-h|--[a-z0-9]+(-[a-z0-9]+)*|--T", s) for s in a.option_strings), a.option_strings


@each_script
def test_docstring_commands_parse(name):
    found = commands(ast.get_docstring(ast.parse(TEXTS[name])))
    assert found
    for script, argv in found:
        assert script == f"{name}.py"
        importlib.import_module(name).parse_args(argv)


# ---- form ----

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
