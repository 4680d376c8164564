r"""The same pictures drawn by DDPM, NVAE, O-GAN and BiGAN-QP: equal machine, equal seconds of training, one judge.

    python tests/experiments/four_faces.py --to docs/four_faces.png                       # a table, and a picture
    python tests/experiments/four_faces.py --data mnist --seconds 3600 --seeds 0 --probe 60 \
        --set ddpm "--width 32 --batch-size 64 --ema 0.999" --set o_gan "--n-z 32 --batch-size 32" \
        --set nvae "--groups 4 --width 48 --batch-size 32 --lr 1.5e-2 --ema 0.999" --set bigan_qp "--n-z 32 --width 24 --batch-size 32"

A short run of each tells how many steps fit into --seconds; these are then its --steps, so that a schedule ends with them;
all else is the script's default. For each: the judge's numbers, means over --seeds (and where they lie, of two or more), the
seconds that training took, and milliseconds to draw a picture, of --judge drawn at once. Last, held-out pictures.
"""

import argparse
import importlib
import json
import shlex
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from strip import read_png  # noqa: E402

SCRIPTS = "ddpm nvae o_gan bigan_qp".split()
COLUMNS = "frechet precision recall sharpness".split()


def run(script: str, out: Path, *flags: str) -> dict:
    """metrics.json of main(flags) in the folder `out`, which must be new."""
    code = importlib.import_module(script).main([*flags, "--out", str(out)])
    if code:
        raise SystemExit(f"{script}.py {' '.join(flags)}: exit code {code}")
    return json.loads((out / "metrics.json").read_text())


def drawing(script: str, out: Path, count: int) -> float:
    """Milliseconds that one more picture takes, of `count` drawn from the checkpoint in `out`."""
    seconds = []
    for n in (1, count):
        begin = time.perf_counter()
        importlib.import_module(script).main(["--out", str(out), "--sample-only", str(n)])
        seconds.append(time.perf_counter() - begin)
    return 1e3 * (seconds[1] - seconds[0]) / max(1, count - 1)


def spread(values: list[float]) -> str:
    """The mean, and where the values lie."""
    mean = sum(values) / len(values)
    return f"{mean:.3g}" + (f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else "")


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    """Prints the table; returns the metrics of every run by script."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--seconds", type=float, default=110, help="of training (default: %(default)s)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(default: 0 1)")
    p.add_argument("--data", default="faces", help="as in the scripts (default: %(default)s)")
    p.add_argument("--judge", type=int, default=1000, help="samples to judge (default: %(default)s)")
    p.add_argument("--probe", type=int, default=100, help="steps of the short run (default: %(default)s)")
    p.add_argument("--set", nargs=2, action="append", default=[], metavar=("SCRIPT", "FLAGS"), help="more flags of a script")
    p.add_argument("--out", type=Path, default=Path("out/four_faces"), help="a new folder (default: %(default)s)")
    p.add_argument("--to", type=Path, help="writes eight samples of each there, a row each")
    opt = p.parse_args(argv)
    if opt.out.exists():
        p.error(f"--out {opt.out}: is there already")
    own, runs, table, rows = dict(opt.set), {}, [], []
    for script in SCRIPTS:
        flags = ["--data", opt.data, "--judge", str(opt.judge), *shlex.split(own.get(script, ""))]
        probe = run(script, opt.out / f"{script}.probe", *flags, "--steps", str(opt.probe))
        steps = max(2, round(opt.seconds * opt.probe / probe["train_seconds"]))
        outs = [opt.out / f"{script}.{seed}" for seed in opt.seeds]
        runs[script] = [run(script, out, *flags, "--steps", str(steps), "--seed", str(seed))
                        for out, seed in zip(outs, opt.seeds)]
        numbers = {name: [m[name] for m in runs[script]] for name in (*COLUMNS, "train_seconds")}
        table.append(f"| {script} | {steps} | " + " | ".join(spread(v) for v in numbers.values())
                     + f" | {drawing(script, outs[0], opt.judge):.2g} |")
        sheet = read_png(outs[0] / "samples.png")  # 8 x 8, white lines between
        rows.append(sheet.expand(3, -1, -1)[:, :-(-sheet.shape[1] // 8)])
    floor = [runs["ddpm"][0][f"{name}_floor"] for name in COLUMNS]
    known = ["-" if n is None else f"{n:.3g}" for n in floor]  # too few to tell
    print("| drawn by | steps | " + " | ".join(COLUMNS) + " | seconds of training | ms a picture |\n" + "| --- " * 8 + "|")
    print(*table, f"| held-out pictures | | {' | '.join(known)} | | |", sep="\n")
    if opt.to:
        importlib.import_module("ddpm").write_png(opt.to, torch.cat(rows, 1))
    return runs


if __name__ == "__main__":
    main()
