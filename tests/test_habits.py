"""What every script does alike, written once and run for each: it stops, goes on, refuses and reports in the house's way.

A new script needs a row in SHORT and in ALONE, and one in DRAWS if it has --sample-only; nothing else here names a script.
"""

import importlib
import itertools
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import ROOT, SCRIPTS
from processes import LIMIT

SHORT = {  # a run of half a second on what `folder` writes
    "bigan_qp": "--data pictures.npy --width 4 --n-z 2 --features 4 --hidden 4 --batch-size 4 --samples 4 --test-images 2 "
                "--judge 6",
    "ddpm": "--data pictures.npy --width 8 --mults 1,2 --attention 1 --blocks 1 --T 21 --batch-size 4 --samples 4 "
            "--sample-steps 2 --test-images 2 --judge 6 --warmup 2",
    "nvae": "--data pictures.npy --lr 2e-3 --width 8 --groups 1 --min-groups 1 --latent 2 --expand 1 --batch-size 4 --samples 4 "
            "--bn-batches 1 --test-images 2 --importance 1 --judge 6",
    "o_gan": "--data pictures.npy --width 4 --n-z 4 --batch-size 4 --samples 4 --judge 6",
    "rope": "--data text.txt --width 16 --layers 1 --heads 2 --context 16 --batch-size 4 --eval-bytes 256 --length 6 "
            "--samples 2 --warmup 2",
    "hier_pos_bert": "--data text.txt --n 8 --width 16 --layers 1 --heads 2 --batch-size 4 --times 2 --tune-steps 1 --eval-tokens 200 "
                     "--span 2 --warmup 2 --arms hierarchical",
    "transformer_vq": "--data text.txt --width 16 --layers 2 --d-k 8 --d-v 16 --codes 4 --window 4 --block 4 --update-len 8 "
                      "--segments 2 --batch-size 4 --eval-bytes 128 --length 12 --samples 2 --warmup 2 --recall-steps 0",
    "w2v_svd": "--data text.txt --model skipgram --min-count 1 --dim 4 --window 2 --batch-size 64 --shared-negatives 8",
}
ALONE = {  # with its own data: what keeps a run of two steps short
    "bigan_qp": "--size 8 --width 4 --samples 4 --test-images 10 --judge 6",
    "ddpm": "--size 8 --width 8 --samples 4 --sample-steps 2 --test-images 10 --judge 6",
    "nvae": "--size 8 --width 8 --samples 4 --bn-batches 2 --test-images 10 --judge 6",
    "o_gan": "--size 8 --width 4 --samples 4 --judge 6",
    "rope": "--eval-bytes 4096 --length 20 --width 16 --layers 1",
    "hier_pos_bert": "--n 16 --width 16 --layers 1 --eval-tokens 4096 --tune-steps 1",
    "transformer_vq": "--width 16 --layers 1 --d-k 8 --d-v 16 --eval-bytes 512 --length 20 --recall-steps 0",
    "w2v_svd": "--model skipgram --dim 4 --vocabulary 500",
}
DRAWS = {  # what a run draws, and the same drawn again from its checkpoint
    "bigan_qp": ("--sample-only 4", "samples.png", "samples_only.png"),
    "ddpm": ("--sample-only 4", "samples.png", "samples_only.png"),
    "nvae": ("--sample-only 4", "samples.png", "samples_only.png"),
    "o_gan": ("--sample-only 4", "samples.png", "samples_only.png"),
    "rope": ("--sample-only 2", "samples.txt", "samples_only.txt"),
    "transformer_vq": ("--sample-only 2", "samples.txt", "samples_only.txt"),
}
SAYS = {  # lines that a run prints of metrics.json, m
    "bigan_qp": lambda m: [f"come back at {m['psnr']:.1f} dB; the mean picture has {m['psnr_mean']:.1f}, 2 principal components "
                           f"{m['psnr_pca']:.1f}"],
    "ddpm": lambda m: [f"held-out loss {m['held_out_loss_ema']:.4f}; Frechet distance {m['frechet']:.3g}, of held-out pictures "
                       f"{m['frechet_floor']:.3g}\n"],
    "nvae": lambda m: [f"held out: {m['importance_nats']:.2f} nats or {m['importance_bits_per_dim']:.3f} bits per dimension",
                       f"Frechet distance {m['frechet']:.3g}, of held-out pictures {m['frechet_floor']:.3g}\n"],
    "o_gan": lambda m: [f"rho {m['rho']:.3f}; held-out reconstructions {m['psnr']:.1f} dB, the mean picture {m['psnr_mean']:.1f}\n"],
    "rope": lambda m: [f"test: {m['test_bits_per_byte']:.3f} bits per byte, standard error {m['test_standard_error']:.3f}, at "
                       f"length 16 ({m['test_bytes']:,} bytes; on the same ones  "
                       + "  ".join(f"{k} {v:.3f}" for k, v in m["baselines"].items()) + ")"],
    "hier_pos_bert": lambda m: [f"accuracy on {m['asked']:,} masked tokens (the commonest token everywhere: {100 * m['unigram']:.1f} %)",
                                f"{'at 8':44}{100 * m['at_n']:5.1f} %", f"{'at 8, as many steps':44}{100 * m['control']:5.1f} %",
                                *(f"{f'at 16, not tuned, {k}':44}{100 * v:5.1f} %" for k, v in m["before"].items()),
                                *(f"{f'at 16, 1 steps, {k}':44}{100 * v:5.1f} %" for k, v in m["after"].items())],
    "transformer_vq": lambda m: [f"  {way:12} {near:.4f} to 16    " + "".join(f"{x:8.3f}" for x in m["by_position"][way]) + "\n"
                                 for way, near in m["bits_per_byte"].items()],
    "w2v_svd": lambda m: [f"{word:>12}  " + "  ".join(f"{other} {x:.2f}" for other, x in row) + "\n"
                          for word, row in m["neighbours"].items()],
}
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


class Script:
    """One script: its module, its short flags, its main, run here or as a process."""

    def __init__(self, name, capsys, python):
        self.name, self.path, self.out = name, ROOT / f"{name}.py", Path(f"out/{name}")
        self.module, self.short = importlib.import_module(name), SHORT[name].split()
        kept = self.module.parse_args([]).config  # by the checkpoint; the rest is said again with --resume
        self.again = [word for flag, value in zip(self.short, self.short[1:]) if flag.startswith("--")
                      and flag[2:].replace("-", "_") not in kept for word in (flag, value)]
        self.capsys, self.python = capsys, python

    def argv(self, flags, own):
        words = [str(word) for flag in flags for word in (flag.split() if isinstance(flag, str) else [flag])]
        return [*(self.short if own else ()), *words]

    def __call__(self, *flags, own=True):
        """main(flags) in this process: (exit code, stdout, stderr). own: with the short flags before."""
        self.capsys.readouterr()
        try:
            code = self.module.main(self.argv(flags, own))
        except SystemExit as stop:
            code = stop.code
        said = self.capsys.readouterr()
        return code, said.out, said.err

    def start(self, *flags, own=True, **how):
        return self.python.start(self.path, *self.argv(flags, own), **how)

    def ranks(self, *flags, own=True, **env):
        return self.python.ranks(self.path, *self.argv(flags, own), **env)

    def ended(self, result, code, *words):
        """That it ended with this code and one line on stderr, which has the words; argparse puts a line of usage before."""
        got, _, err = result
        lines = [line for line in err.splitlines() if not line.startswith("usage: ")]
        assert got == code and len(lines) == 1 and lines[0].startswith(f"{self.name}.py: "), (got, err)
        assert all(word in lines[0] for word in words), lines[0]

    def refuses(self, words, *flags, own=True):
        self.ended(self(*flags, own=own), 2, *words)


@pytest.fixture(params=SCRIPTS)
def script(request, capsys, python):
    """In a folder with data. What would run for ever fails after LIMIT seconds."""
    def late(*_):
        raise AssertionError(f"not done after {LIMIT} s")

    def unheard(kind, _):
        raise AssertionError(f"{signal.Signals(kind).name}: nobody acts on it")  # and it does not end pytest
    torch.set_num_threads(1)
    folder()
    acts = {signal.SIGALRM: late, signal.SIGTERM: unheard, signal.SIGHUP: unheard}
    before = {kind: signal.signal(kind, act) for kind, act in acts.items()}
    signal.alarm(LIMIT)
    yield Script(request.param, capsys, python)
    signal.alarm(0)
    for kind, act in before.items():
        signal.signal(kind, act)


def folder():
    """24 pictures of 9 x 9 pixels; 4,800 bytes of words."""
    np.save("pictures.npy", np.random.default_rng(0).integers(0, 256, (24, 9, 9, 3), dtype=np.uint8))
    words = random.Random(0)
    Path("text.txt").write_text("\n".join(" ".join(words.choices(["a b c", "d e f", "g h i"], k=8)) for _ in range(100)))


@pytest.fixture
def every_step(monkeypatch):
    """A clock by which every step is due to be shown and logged."""
    monkeypatch.setattr(time, "perf_counter", itertools.count(0, 20).__next__)


CLOCK = {"CLOCK": "20"}  # the same for a process


def at(monkeypatch, script, what, act):
    """Calls act(count, *args) before the script's own function `what`, at each of its calls."""
    real, count = getattr(script.module, what), itertools.count(1)

    def both(*args, **how):
        act(next(count), *args)
        return real(*args, **how)
    monkeypatch.setattr(script.module, what, both)


def at_step(monkeypatch, script, step, act):
    """Calls act() once, when that step has been made, before it is shown."""
    real, done = script.module.Progress.add, []

    def add(self, now, **values):
        if now == step and not done:
            done.append(now)
            act()
        real(self, now, **values)
    monkeypatch.setattr(script.module.Progress, "add", add)


def state(out):
    return torch.load(Path(out) / "ckpt.pt", weights_only=True)


def same(a, b, exact=True):
    """Equal in keys, order, shapes and numbers: to the bit, or to 1 % of a step of Adam."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], exact) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(p, q, exact) for p, q in zip(a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    return a == b


def log(out):
    """log.csv without the two columns that are times: {step: the rest}. Whole rows only, no step twice, in order."""
    head, *rows = [line.split(",") for line in (Path(out) / "log.csv").read_text().splitlines()]
    assert head[:4] == ["step", "items", "rate", "elapsed"] and all(len(row) == len(head) for row in rows)
    steps = [int(row[0]) for row in rows]
    assert steps == sorted(set(steps))
    return {step: [float(x) for x in row[1:2] + row[4:]] for step, row in zip(steps, rows)}


def metrics(out):
    """metrics.json without what is a time."""
    def bad(word):
        raise AssertionError(f"{word} in metrics.json")
    found = json.loads((Path(out) / "metrics.json").read_text(), parse_constant=bad)
    return {k: v for k, v in found.items() if "second" not in k}


def results(out):
    """All other files of a run, by name."""
    names = {p.relative_to(out) for p in Path(out).rglob("*") if p.is_file()}
    return {str(p): (Path(out) / p).read_bytes() for p in names if p.name not in ("log.csv", "metrics.json", "ckpt.pt")}


def equal_runs(a, b, previews=True):
    """The same weights, optimiser, log, metrics and pictures, to the bit. previews: those of the way too."""
    assert same(state(a), state(b))
    assert log(a) == log(b) and metrics(a) == metrics(b)
    one, two = ({name: body for name, body in results(out).items() if previews or not re.search(r"_\d{6}\.", name)}
                for out in (a, b))
    assert one.keys() == two.keys() and not [name for name in one if one[name] != two[name]]
    return True


def test_every_script_has_its_rows():
    assert set(SHORT) >= set(SCRIPTS) <= set(ALONE)
    assert set(SAYS) == set(SCRIPTS)
    for name in SCRIPTS:
        assert (name in DRAWS) == ("sample_only" in vars(importlib.import_module(name).parse_args([])))


# ---- a whole run ----

def test_alone_in_an_empty_folder(script):
    """The file by itself, as a user has it, with its own data, and nothing else than torch and numpy to import."""
    Path("alone").mkdir()
    shutil.copy(script.path, "alone")
    os.chdir("alone")
    code, said, err = script.python(script.path.name, "--steps", 2, *ALONE[script.name].split())
    assert (code, err) == (0, ""), err
    out = Path("out") / script.name
    assert {p.name for p in Path().iterdir()} == {"out", script.path.name, "run.out", "run.err"}
    assert {"ckpt.pt", "log.csv", "metrics.json"} <= {p.name for p in out.iterdir()} and results(out)
    assert list(log(out)) == [1, 2] and metrics(out)["step"] == 2 == state(out)["step"]
    assert said.strip().splitlines()[-1].endswith(f"out/{script.name}/") and "step 2/2  " in said


def test_what_is_said_is_what_is_written(script):
    code, said, _ = script("--steps 3")
    found = metrics(script.out)
    lines = SAYS[script.name](found)
    assert code == 0 and lines and not [line for line in lines if line not in said], said


def test_straight_is_cut_and_resumed(script, monkeypatch, every_step):
    """To the bit: weights, optimiser, log.csv, metrics, pictures; the flags of the first half are not said again."""
    run = "--save-every 2 --seed 3 --steps"
    assert script(run, 7, "--out a")[0] == 0
    at_step(monkeypatch, script, 3, lambda: signal.raise_signal(signal.SIGINT))
    assert script(run, 7, "--out b")[0] == 130
    assert state("b")["step"] == 3 and not Path("b/metrics.json").exists()
    code, _, err = script("--resume --out b --save-every 2", *script.again, own=False)
    assert code == 0, err
    assert equal_runs("a", "b") and list(log("b")) == [1, 2, 3, 4, 5, 6, 7]


def test_more_steps_after_the_end(script, every_step):
    """Not the same bits where the rate falls to zero at the end, but it goes on, and says so in log and metrics."""
    assert script("--steps 2")[0] == 0 == script("--steps 4 --resume")[0]
    assert state(script.out)["step"] == 4 == metrics(script.out)["step"] and list(log(script.out)) == [1, 2, 3, 4]


def test_previews_and_saves_change_nothing(script):
    assert script("--steps 4 --save-every 1 --out a")[0] == 0 == script("--steps 4 --save-every 9 --out b")[0]
    a, b = state("a"), state("b")
    assert same(a, b) and metrics("a") == metrics("b")


def test_seed_matters_and_nothing_else_does(script):
    for out, seed in ("a", 1), ("b", 1), ("c", 2):
        torch.manual_seed(len(out + str(seed)) + ord(out))  # whatever was drawn before
        assert script("--steps 2 --out", out, "--seed", seed)[0] == 0
    assert equal_runs("a", "b") and not same(state("a")["model"], state("c")["model"])


def test_no_bound_on_the_gradient_is_any(script):
    """--clip-grad 0; a bound of 0 would learn nothing."""
    if "clip_grad" not in script.module.parse_args([]).config:
        pytest.skip("it has no --clip-grad")
    for bound, out in ((0, "a"), (1e18, "b")):
        assert script("--steps 3 --clip-grad", bound, "--out", out)[0] == 0
    a, b = (torch.load(f"{out}/ckpt.pt", weights_only=True)["model"] for out in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_sample_only_is_what_the_run_drew(script):
    if script.name not in DRAWS:
        pytest.skip("it draws nothing")
    flag, drawn, again = DRAWS[script.name]
    assert script("--steps 3")[0] == 0
    before = results(script.out)
    code, said, err = script(flag)
    assert (code, err) == (0, "") and again in said
    after = results(script.out)
    assert after.pop(again) == before[drawn] and after == before
    assert script(flag, "--sample-seed 1")[0] == 0 and results(script.out)[again] != before[drawn]
    (script.out / again).unlink()
    for run in script.ranks(flag):  # two draw what one does
        assert (run.wait(), run.err()) == (0, "")
    assert results(script.out)[again] == before[drawn]
    other = script("--steps 3 --seed 9 --out other")[0], script("--out other", flag)[0]
    assert other == (0, 0) and results("other")[again] != before[drawn]  # other weights draw other things


# ---- two processes ----

def test_two_ranks_are_one(script):
    for run in script.ranks("--steps 3 --out two", WHOLE="1"):  # to Python's own end, where a thread left over aborts
        assert (run.wait(), run.err()) == (0, "")
    said = Path("rank0.out").read_text()
    assert said.count("step 3/3") == 1 and Path("rank1.out").read_text() == ""
    assert script("--steps 3 --out one")[0] == 0
    one, two = state("one"), state("two")
    assert one.keys() == two.keys() and same(one["model"], two["model"], exact=False)
    assert metrics("two")["step"] == 3 and set(results("one")) == set(results("two"))


def test_a_batch_that_ranks_cannot_share_is_refused(script, monkeypatch):
    monkeypatch.setattr(script.module, "RANKS", 7)
    script.refuses(["--batch-size"], "--steps 2")


@pytest.mark.parametrize("told", [(0, 1), (1,)])
def test_ranks_that_are_told_end_at_one_step(script, told):
    """torchrun tells one after the other, or a user one alone: all save and end alike, and it goes on."""
    ranks = script.ranks("--steps 1000000 --save-every 1000000")
    ranks[0].until("step 1/")
    for rank in told:
        ranks[rank].send(signal.SIGTERM)
        time.sleep(0.003 * rank)
    assert [run.wait() for run in ranks] == [130, 130]
    assert re.fullmatch(rf"{script.name}\.py: interrupted; saved, .*--resume[^\n]*\n", ranks[0].err()), ranks[0].err()
    assert ranks[1].err() == ranks[1].out() == ""
    step = state(script.out)["step"]
    assert step >= 1
    for run in script.ranks("--resume --steps", step + 2):
        assert (run.wait(), run.err()) == (0, "")
    assert state(script.out)["step"] == step + 2


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_dies_ends_the_others(script, lost):
    ranks = script.ranks("--steps 1000000")
    ranks[0].until("step 1/")
    ranks[lost].send(signal.SIGKILL)
    assert ranks[lost].wait() == -signal.SIGKILL
    assert ranks[1 - lost].wait() == 1
    assert ranks[1 - lost].err().count("\n") == lost  # one line of rank 0, no traceback of any


def test_the_group_is_taken_down_after_the_line(script, monkeypatch):
    """With NCCL that may wait for the others, and a user should know by then."""
    said = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: said.append(script.capsys.readouterr().err))
    assert script("--data nowhere --steps 1")[0] == 2
    assert len(said) == 1 and said[0].startswith(f"{script.name}.py: ")


def test_ranks_print_one_line_for_what_is_wrong_everywhere(script):
    ranks = script.ranks("--resume --steps 3")
    assert [run.wait() for run in ranks] == [2, 2]
    assert [run.err().count("\n") for run in ranks] == [1, 0] and "no such file" in ranks[0].err()


@pytest.mark.parametrize("name", SCRIPTS[:1])
def test_torchrun_passes_ctrl_c_on(name, capsys, python):
    """The real launcher, which hands one Ctrl-C on a second time: saved at one step, and one line of ours."""
    folder()
    script = Script(name, capsys, python)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script.path]
    with open("said", "w") as said, open("erred", "w") as erred:
        run = subprocess.Popen([*launch, *script.short, "--steps", "1000000"], stdout=said, stderr=erred,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    try:
        begin = time.monotonic()
        while "step 1/" not in Path("said").read_text():
            assert run.poll() is None and time.monotonic() - begin < 60, Path("erred").read_text()
            time.sleep(0.02)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        run.wait(60)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert Path("erred").read_text().count(f"{name}.py: interrupted; saved") == 1
    assert script("--resume --steps", state(script.out)["step"] + 1)[0] == 0


# ---- signals ----

@pytest.mark.parametrize("place, kind", [("data", signal.SIGHUP), *(("training", kind) for kind in SIGNALS),
                                         ("last save", signal.SIGINT), ("report", signal.SIGTERM)])
def test_a_signal_ends_in_one_line_and_130(script, monkeypatch, place, kind):
    """Anywhere: what was trained is on disk, and --resume makes of it what a run left alone would have made."""
    def act(*_):
        signal.raise_signal(kind)
    with monkeypatch.context() as patch:
        if place == "data":
            at(patch, script, "load_data", act)
        elif place == "training":
            at_step(patch, script, 2, act)
        elif place == "last save":
            at(patch, script, "save_checkpoint", act)
        else:
            at(patch, script, "report", act)
        before = [signal.getsignal(k) for k in SIGNALS]
        script.ended(script("--steps 4"), 130, "interrupted", *["--resume"] * (place != "data"))
        assert before == [signal.getsignal(k) for k in SIGNALS]
    if place == "data":
        assert not script.out.exists()
        return
    assert state(script.out)["step"] == (2 if place == "training" else 4)
    assert not (script.out / "metrics.json").exists()
    assert script("--resume")[0] == 0 == script("--steps 4 --out b")[0]
    assert same(state(script.out), state("b")) and metrics(script.out) == metrics("b")
    assert results(script.out) == results("b")


def test_resume_of_a_finished_run_makes_the_report_again(script):
    assert script("--steps 3")[0] == 0
    kept, weights, made = metrics(script.out), state(script.out), results(script.out)
    for name in (*made, "metrics.json"):
        (script.out / name).unlink()
    assert script("--resume")[0] == 0
    assert metrics(script.out) == kept and same(state(script.out), weights) and results(script.out) == made


def test_nohup_keeps_a_run_going(script, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, script, 2, lambda: signal.raise_signal(signal.SIGHUP))
        assert script("--steps 4")[0] == 0 and state(script.out)["step"] == 4
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("pause", [0.1, 5])
def test_a_second_ctrl_c_ends_at_once(script, monkeypatch, pause):
    """Within a second it may be torchrun's echo of the first: then the step is finished and saved."""
    clock, steps = itertools.count(0, pause), []
    monkeypatch.setattr(time, "monotonic", clock.__next__)

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        steps.append("went on")
    at_step(monkeypatch, script, 3, twice)
    result = script("--steps 9 --save-every 2 --out", script.out)
    script.ended(result, 130, "interrupted", "--resume goes on; say --")
    again = re.findall("--[a-z-]+", result[2].partition("; say ")[2])
    assert "--save-every" in again and not {"--steps", "--batch-size", "--out", "--resume"} & {*again}
    assert (state(script.out)["step"], steps) == ((3, ["went on"]) if pause < 1 else (2, []))


def test_interrupted_before_anything_is_saved_promises_nothing(script, monkeypatch):
    at(monkeypatch, script, "Progress", lambda *_: signal.raise_signal(signal.SIGINT))
    result = script("--steps 4 --save-every 2")
    script.ended(result, 130, "interrupted")
    assert "--" not in result[2] and not (script.out / "ckpt.pt").exists()


def test_killed_at_any_moment_it_goes_on_to_the_same_bits(script):
    """SIGKILL: no handler runs. Every moment of a run may be the one; log.csv has no row twice and none torn."""
    flags, luck, killed = "--steps 20 --save-every 3 --out", random.Random(script.name), 0
    assert script.start(flags, "straight", **CLOCK).wait() == 0
    for k in range(2):
        for _ in range(2):
            more = "--resume" if Path(f"cut{k}/ckpt.pt").exists() else ""
            if not more:
                shutil.rmtree(f"cut{k}", ignore_errors=True)
            begun = state(f"cut{k}")["step"] if more else 0
            words = f"step {min(begun + luck.randint(1, 9), 20)}/" if begun < 20 else "all goes to"
            run = script.start(flags, f"cut{k}", more, **CLOCK).until(words)
            time.sleep(luck.uniform(0, 0.03))
            run.send(signal.SIGKILL)
            killed += run.wait() == -signal.SIGKILL
        more = "--resume" if Path(f"cut{k}/ckpt.pt").exists() else ""
        if not more:
            shutil.rmtree(f"cut{k}", ignore_errors=True)
        run = script.start(flags, f"cut{k}", more, **CLOCK)
        assert run.wait() == 0, run.err()
        assert equal_runs("straight", f"cut{k}", previews=False) and len(log(f"cut{k}")) == 20
    assert killed


def test_a_torn_log_is_mended(script, every_step):
    """What a kill may leave: a row after the checkpoint and half a one, half the last row, half a head."""
    assert script("--steps 3 --out a")[0] == 0
    path = Path("a/log.csv")
    whole = path.read_text()
    rows = whole.splitlines(True)
    for k, torn in enumerate((whole + "4,16,1,2,3,4\n5,", whole[:-9], rows[0][:7])):
        shutil.copytree("a", f"b{k}")
        Path(f"b{k}/log.csv").write_text(torn)
        assert script("--resume --steps 5 --out", f"b{k}")[0] == 0
        assert list(log(f"b{k}"))[-2:] == [4, 5] and Path(f"b{k}/log.csv").read_text().startswith(rows[0])
        assert len(log(f"b{k}")) == (5, 4, 2)[k]


# ---- what breaks on the way ----

def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(script):
    """/dev/full takes nothing: first the checkpoint does not fit, then the log."""
    assert script("--steps 2")[0] == 0
    good, rows = (script.out / "ckpt.pt").read_bytes(), (script.out / "log.csv").read_bytes()
    (script.out / "ckpt.tmp").symlink_to("/dev/full")
    script.ended(script("--steps 4 --resume"), 1, "No space left")
    assert (script.out / "ckpt.pt").read_bytes() == good
    assert not list(script.out.glob("*.tmp"))
    assert (script.out / "log.csv").read_bytes().startswith(rows)
    os.symlink("/dev/full", script.out / "metrics.tmp")
    script.ended(script("--steps 4 --resume"), 1, "No space left")  # the log has room, metrics.json has none
    assert state(script.out)["step"] == 4
    assert script("--steps 4 --resume")[0] == 0 and metrics(script.out)["step"] == 4


def test_a_log_that_cannot_be_written_stops_the_run_saved(script, every_step):
    assert script("--steps 2")[0] == 0
    (script.out / "log.csv").unlink()
    (script.out / "log.csv").mkdir()
    result = script("--steps 9 --resume")
    assert result[0] == 1 and result[2].count("\n") == 1 and "log.csv" in result[2]
    shutil.rmtree(script.out / "log.csv")
    assert script("--steps 5 --resume")[0] == 0


def test_out_deleted_in_mid_run_is_one_line_and_saved(script, monkeypatch, every_step):
    at_step(monkeypatch, script, 3, lambda: shutil.rmtree(script.out))
    script.ended(script("--steps 50"), 1, str(script.out))
    assert state(script.out)["step"] in (3, 4)
    assert script("--resume --steps 6")[0] == 0


@pytest.mark.parametrize("seen", ["by the log", "by the save"])
def test_not_finite_is_one_line_and_1_and_the_checkpoint_is_from_before(script, monkeypatch, request, seen):
    """In step 3 the weights become infinite, as by a step too long: nobody hands the loss a NaN."""
    if seen == "by the log":
        request.getfixturevalue("every_step")
    net, good = [], []

    def poison():
        good.append((script.out / "ckpt.pt").read_bytes())
        for p in net[0].parameters():
            p.data.fill_(torch.inf)
    at(monkeypatch, script, "save_checkpoint", lambda count, args, step, parts: net.append(parts["model"]))
    at_step(monkeypatch, script, 3, poison)
    script.ended(script("--steps 8 --save-every 2"), 1, "from before")
    assert (script.out / "ckpt.pt").read_bytes() == good[0] and state(script.out)["step"] == 2
    assert all(v.isfinite().all() for v in state(script.out)["model"].values())
    assert script("--steps 4 --resume")[0] == 0


def test_out_of_memory_is_one_line(script, monkeypatch):
    """Torch says how much was asked for, Python nothing: then it is the data, in reading or soon after."""
    def too_much(*_):
        torch.empty(2**50)

    def nothing(*_):
        raise MemoryError
    with monkeypatch.context() as patch:
        at(patch, script, "build", too_much)
        script.ended(script("--steps 2"), 1, "memory", str(4 * 2**50))
    at(monkeypatch, script, "load_data", nothing)
    script.ended(script("--steps 2"), 1, "MemoryError", "--data")


@pytest.mark.parametrize("size", [2**40, 2**61])
def test_sizes_that_no_machine_has_are_one_line(script, size):
    script.ended(script("--steps 2 --batch-size", size), 1, "allocate" if size < 2**60 else "overflow")


# ---- the checkpoint ----

def test_one_flipped_bit_is_refused_or_harmless(script):
    """Anywhere in the file: refused; only where nothing of the state lies may it be read, and then to the same state."""
    assert script("--steps 2")[0] == 0
    path, refused, luck = script.out / "ckpt.pt", 0, random.Random(1)
    body = path.read_bytes()
    want, data = state(script.out), []
    for item in zipfile.ZipFile(path).infolist():
        begin = item.header_offset + 30 + sum(body[item.header_offset + 26 + k] << 8 * (k % 2) for k in range(4))
        data += range(begin, begin + item.file_size)
    args = script.module.parse_args(["--resume"])
    places = [luck.choice(data) for _ in range(60)] + [luck.randrange(len(body)) for _ in range(30)]
    for k, place in enumerate(places):
        broken = bytearray(body)
        broken[place] ^= 1 << luck.randrange(8)
        path.write_bytes(broken)
        try:
            got = script.module.resume_run(args)
        except script.module.UserError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert k >= 60 and same(got, want), f"byte {place}"
    assert refused >= 60
    path.write_bytes(broken[:-1])
    script.refuses(["ckpt.pt", "damaged"], "--resume")


def refused_checkpoint(script, *words, flags="--resume --steps 5"):
    """Refused by --resume and by --sample-only, and left as it is."""
    path = script.out / "ckpt.pt"
    before = path.read_bytes()
    script.refuses(["ckpt.pt", *words], flags)
    if script.name in DRAWS:
        script.refuses(["ckpt.pt", *words], DRAWS[script.name][0])
    assert path.read_bytes() == before


def test_foreign_and_cut_files_are_refused(script):
    script.refuses(["ckpt.pt", "no such file"], "--resume")
    assert script("--steps 2")[0] == 0
    script.refuses(["a run's folder, no file in it"], "--resume --out", script.out / "ckpt.pt")
    path = script.out / "ckpt.pt"
    whole = path.read_bytes()

    class Evil:
        def __reduce__(self):
            return os.mkdir, ("executed",)
    torch.save(dict(state(script.out), model=Evil()), "evil.pt")
    torch.save(dict(state(script.out), script="another"), "other.pt")
    torch.save([1, 2], "list.pt")
    files = [Path(name).read_bytes() for name in ("evil.pt", "other.pt", "list.pt", "pictures.npy")]
    for body in (*files, b"", b"text", whole[:len(whole) // 2], whole[:-1], whole[1:]):
        path.write_bytes(body)
        refused_checkpoint(script, "not a checkpoint")
    assert not Path("executed").exists()


def test_checkpoints_that_lack_something_are_refused(script):
    """A key missing, a value of another type, a tensor of another shape: a line, and 2; never a traceback."""
    assert script("--steps 2")[0] == 0
    good, path = state(script.out), script.out / "ckpt.pt"
    config, model = good["config"], good["model"]
    name, keys = next(iter(model)), [key for key in ("script", "step", "config", "model", "opt") if key in good]
    wrong = [{k: v for k, v in good.items() if k != key} for key in keys]
    wrong += [good | {key: value} for key in keys for value in (None, 7.5, [1])]
    wrong += [good | dict(config={k: v for k, v in config.items() if k != "seed"}),
              good | dict(config=config | dict(seed="0")), good | dict(config=config | dict(data=3)),
              good | dict(model={k: v for k, v in model.items() if k != name}),
              good | dict(model=model | {"more": torch.zeros(1)}), good | dict(model=model | {name: torch.zeros(1, 2, 3)}),
              good | dict(model=model | {name: 3})]
    if "opt" in good:  # w2v_svd.py keeps its sums of squares in the model
        moments = {k: dict(v, exp_avg=v["exp_avg"].flatten()[:-1]) for k, v in good["opt"]["state"].items()}
        wrong += [good | dict(opt=opt) for opt in ({"state": {}}, model, dict(good["opt"], state=moments))]
    before = metrics(script.out)
    for k, bad in enumerate(wrong):
        torch.save(bad, path)
        script.refuses(["ckpt.pt"], "--resume --steps 5")
        if script.name in DRAWS and (missing := {"script", "step", "config"} - bad.keys()):
            assert missing and script(DRAWS[script.name][0])[0] == 2
    assert metrics(script.out) == before
    for key in good.keys() - set(keys):  # what the script adds of its own
        torch.save({k: v for k, v in good.items() if k != key}, path)
        script.refuses([], "--resume --steps 5")
        if script.name in DRAWS:
            assert script(DRAWS[script.name][0])[0] in (0, 2)  # it may do without


def test_flags_that_contradict_the_checkpoint_are_refused(script):
    assert script("--steps 3 --seed 4")[0] == 0
    script.refuses(["--steps 2", "3"], "--resume --seed 4 --steps 2")
    script.refuses(["--seed 5", "4"], "--resume --seed 5")
    args = script.module.parse_args(script.short)
    batch = args.batch_size * 2
    script.refuses([f"--batch-size {batch}", str(args.batch_size)], "--resume --batch-size", batch)
    assert script("--resume --seed 4", "--batch-size", args.batch_size)[0] == 0  # said again, it is no contradiction


def test_data_may_lie_elsewhere(script):
    assert script("--steps 2")[0] == 0
    data = Path(script.module.parse_args(script.short).data)
    Path("moved").mkdir()
    shutil.move(data, "moved")
    assert script("--resume --steps 4 --data", f"moved/{data}", *script.again, own=False)[0] == 0
    assert script("--resume --steps 5", *script.again, own=False)[0] == 0


# ---- where it is written ----

def test_a_run_never_touches_another_runs_folder(script):
    for k in range(3):
        assert script("--steps 1 --seed", k)[0] == 0
    outs = [Path(f"out/{script.name}{tail}") for tail in ("", ".1", ".2")]
    assert [metrics(out)["seed"] for out in outs] == [0, 1, 2]
    Path("mine").mkdir()
    Path("mine/letter").write_text("dear")
    code, said, _ = script("--steps 1 --out mine")
    assert code == 0 and [p.name for p in Path("mine").iterdir()] == ["letter"] and metrics("mine.1")
    assert said.strip().splitlines()[-1].endswith(" mine.1/") and "mine.1/" in said.partition("step 1/1")[0]
    assert not script.refuses(["nowhere"], "--data nowhere --steps 1") and not Path(f"out/{script.name}.3").exists()


def test_resume_takes_the_newest_and_out_names_one(script):
    for k in range(3):
        assert script("--steps 1 --seed", k)[0] == 0
        stamp = time.time() - 60 + k
        os.utime(Path(f"out/{script.name}{['', '.1', '.2'][k]}/ckpt.pt"), (stamp, stamp))
    assert script("--resume --steps 2")[0] == 0 and state(f"out/{script.name}.2")["step"] == 2
    assert script("--resume --steps 2 --out", f"out/{script.name}.1")[0] == 0
    assert script("--resume --steps 3")[0] == 0  # the one gone on with last
    assert [state(f"out/{script.name}{tail}")["step"] for tail in ("", ".1", ".2")] == [1, 3, 2]
    assert script("--resume --steps 2 --out", script.out)[0] == 0 and state(script.out)["step"] == 2


def test_two_runs_at_once_keep_both(script):
    runs = [script.start("--steps 2 --out both --seed", k, name=f"r{k}") for k in range(2)]
    assert [run.wait() for run in runs] == [0, 0], [run.err() for run in runs]
    assert sorted(metrics(out)["seed"] for out in ("both", "both.1")) == [0, 1]
    for out in ("both", "both.1"):
        assert state(out)["config"]["seed"] == metrics(out)["seed"] and len(log(out)) == 2


def test_places_that_cannot_be_written_are_refused(script):
    Path("file").write_text("x")
    script.refuses(["file"], "--steps 1 --out file/x")
    if os.geteuid():
        Path("shut").mkdir(0o500)
        script.refuses(["shut"], "--steps 1 --out shut/x")
    elif Path("/sys/kernel").exists():
        script.refuses(["/sys/kernel"], "--steps 1 --out /sys/kernel/x")  # where root itself may not
    for here in (".", "..", "/", ""):
        script.refuses(["--out"], "--steps 1", *["--out"], *([here] if here else [""]))
    assert Path("file").read_text() == "x" and not Path("out").exists()


# ---- flags and words ----

WRONG = ["--steps -1", "--steps ten", "--steps 1.5", f"--seed {2**64}", "--seed 1e20", "--seed ²", f"--seed {10**30}",
         "--seed -1", "--seed", "--batch-size 0", "--save-every 0", "--lr nan", "--lr inf", "--lr -1", "--stps 3",
         "--step 3", "--batch 4", "word", "--gpu yes"]


@pytest.mark.parametrize("argv", WRONG)
def test_wrong_flags_are_refused(script, argv):
    flag = re.match(r"--\S+", argv)
    script.refuses([flag[0]] if flag and flag[0] != "--gpu" else [], argv)
    assert not Path("out").exists()


def test_gpu_without_cuda_is_refused(script, monkeypatch):
    """Also where there is one: never a silent fall to the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script.refuses(["--gpu", "CUDA"], "--gpu --steps 1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    script.refuses(["--gpu", "1 of 2", "CUDA"], "--gpu --steps 1")


def test_autocast_forgets_no_gradient_and_keeps_no_weight(script, monkeypatch):
    """In bfloat16, as on a GPU: the weights that autocast casts once and remembers are never older than a step, nor cast
    without gradients. So a run that remembers none is the same."""
    more = {"transformer_vq": "--recall-steps 2"}.get(script.name, "")
    for out, cache in ("a", True), ("b", False):
        monkeypatch.setattr(script.module, "autocast", lambda args: torch.autocast("cpu", torch.bfloat16, cache_enabled=cache))
        code, _, err = script(f"--steps 3 --out {out} {more}")
        assert (code, err) == (0, "")
    if script.name in ("bigan_qp", "o_gan"):  # a weight used twice in a step: its gradients add up in bfloat16, or outside it
        one, two = (torch.cat([x.flatten().double() for x in state(out)["model"].values()]) for out in ("a", "b"))
        assert (one - two).abs().mean() < 1e-5  # of steps of 1e-3
    else:
        equal_runs("a", "b")


@pytest.mark.gpu
@pytest.mark.parametrize("flags, floats", [("--gpu", "bfloat16"), ("--gpu --fp32", "float32"), ("--gpu --compile", "bfloat16")])
def test_gpu_trains_goes_on_and_draws(script, flags, floats):
    """On a real one: what the CPU's short run does; loss and report are numbers."""
    if "--compile" in flags and script.name == "nvae":
        pytest.skip("its many convolutions take minutes to compile")
    code, said, err = script(f"--steps 2 {flags}")
    assert code == 0, err
    assert torch.cuda.get_device_name() in said and floats in said
    code, said, err = script(f"--steps 4 --resume {flags}")
    assert code == 0, err
    if script.name in DRAWS:
        code, said, err = script(f"{DRAWS[script.name][0]} {flags}")
        assert code == 0, err
    assert "NaN" not in (script.out / "metrics.json").read_text()


@pytest.mark.parametrize("data", ["nowhere", "", ".", "empty", "folder", "nowhere/x.npy", "short"])
def test_wrong_data_is_refused(script, data):
    Path("empty").write_bytes(b"")
    Path("short").write_bytes(b"x")
    Path("folder").mkdir()
    script.refuses(["--data"], "--steps 1 --data", *([data] if data else [""]))
    assert not Path("out").exists()


def test_help_shows_every_flag_and_its_defaults(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    code, said, err = script("--help", own=False)
    said = re.sub(r"\n {20,}", " ", said)
    assert (code, err) == (0, "")
    values, on_gpu = (vars(script.module.parse_args(argv)) for argv in ([], ["--gpu"]))
    for name, value in values.items():
        if name in ("given", "config", "script", "own"):
            continue
        row = re.search(rf"^  --{name.replace('_', '-')}\b( [^\n]*|,[^\n]*)\n", said, re.M)
        assert row, name
        text = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
        gpu = on_gpu[name]
        gpu = ",".join(map(str, gpu)) if isinstance(gpu, (tuple, list)) else str(gpu)
        default = re.search(r"\(default: (.*)\)$", row[1])[1].split("; ")
        assert default[0] == text, (name, default)
        assert name == "gpu" or gpu == text or f"--gpu {gpu}" in default, (name, default)


# ---- who listens ----

def test_nobody_listens(script):
    """stdout closed, or a pipe that closes early (| head -1): no reason to lose the run."""
    run = script.start("--steps 3 --out closed", stdout="closed")
    assert (run.wait(), run.err()) == (0, "")
    reader, writer = os.pipe()
    run = script.start("--steps 3 --out head", stdout=writer)
    os.close(writer)
    os.close(reader)
    assert (run.wait(), run.err()) == (0, "")
    run = script.start("--steps 3 --out silent", stdout="closed", stderr="closed")
    assert run.wait() == 0
    with open("/dev/full", "w") as full:
        run = script.start("--steps 3 --out full", stdout=full.fileno())
        assert (run.wait(), run.err()) == (0, "")
    for out in ("closed", "head", "silent", "full"):
        assert state(out)["step"] == 3 == metrics(out)["step"]
    reader, writer = os.pipe()
    run = script.start("--resume --steps 1 --out head", stdout=writer, stderr=writer)  # not even for what went wrong
    os.close(writer)
    os.close(reader)
    assert run.wait() == 2


def test_a_terminal_that_spells_ascii_only(script):
    """What it cannot spell is replaced: never a traceback, least of all after the training."""
    shutil.copytree(".", "données", ignore=lambda *_: ["données"])
    data = script.module.parse_args(script.short).data
    run = script.start("--steps 2 --out", "où", "--data", f"données/{data}", PYTHONIOENCODING="ascii")
    assert (run.wait(), run.err()) == (0, "") and metrics("où")["step"] == 2
    assert "all goes to o?/" in run.out()


def terminal(script, *flags, **env):
    """Runs it on a terminal: the process, and what it wrote there."""
    ours, theirs = pty.openpty()
    run = script.start(*flags, stdout=theirs, stderr=theirs, **env)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:  # it has gone
        pass
    os.close(ours)
    return run.wait(), said.decode().replace("\r\n", "\n")


def test_progress_in_a_log_and_on_a_terminal(script):
    """A log has plain lines; a terminal rewrites one line in place, ends it, and shows a bar."""
    line = r"step {0}/4  (?:\w+ \S+  )+\d+ \S+/s  elapsed \d+:\d\d:\d\d  eta \d+:\d\d:\d\d"
    run = script.start("--steps 4 --out log", **CLOCK)
    assert (run.wait(), run.err()) == (0, "")
    told = re.search(rf"\A.*?{line.format(4)}\n", run.out(), re.S)[0]  # then come samples, whatever bytes they have
    assert "\r" not in told and "\033" not in told
    for step in range(1, 5):
        assert re.search(rf"^{line.format(step)}$", told, re.M), told
    code, said = terminal(script, "--steps 4 --out tty", **CLOCK)
    assert code == 0
    live = [part for part in said.split("\r\033[K") if "/4  " in part and "step " in part]
    assert len(live) == 4 and [part.count("\n") > 0 for part in live] == [False, False, False, True], live
    for step, part in enumerate(live, 1):
        assert re.match(rf"\[#{{{5 * step}}} *\] {line.format(step)}", part) and part[21] == "]", part
    assert log("log") == log("tty") and metrics("log") == metrics("tty")


def test_a_terminal_that_closes_saves(script):
    """The window goes: SIGHUP comes, and nothing can be written to the terminal any more."""
    ours, theirs = pty.openpty()
    run = script.start("--steps 1000000", stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    while b"step 1/" not in said:
        said += os.read(ours, 65536)
    os.close(ours)
    time.sleep(0.1)
    run.send(signal.SIGHUP)
    assert run.wait() == 130 and state(script.out)["step"] >= 1
