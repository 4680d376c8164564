"""How should a trained net draw? One checkpoint, sampled by (17) and by DDIM's jumps, each judged alike.

    python tests/experiments/ddpm_samplers.py [--out DIR] [--judge N] [--arms 17/beta ddim/25/0 ...] [flags of ddpm.py]

An arm is 17/SIGMA, all steps of 9119 (17), or ddim/STEPS/ETA. Prints for each the Frechet distance in 50 principal
components, precision, recall, sharpness (ddpm.py's judge) of --judge samples, and the seconds; then held-out pictures.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ddpm  # noqa: E402

ARMS = "17/beta 17/posterior 17/zero ddim/10/0 ddim/25/0 ddim/50/0 ddim/100/0 ddim/50/1 ddim/100/1".split()
COLUMNS = "frechet", "precision", "recall", "sharpness"


def row(name: str, numbers: list, seconds: str = "") -> None:
    print(f"| {name} | " + " | ".join("-" if n is None else f"{n:.3g}" for n in numbers) + f" | {seconds} |", flush=True)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Prints the table; returns the judge's numbers by arm."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0], usage=__doc__, allow_abbrev=False)
    p.add_argument("--arms", nargs="+", default=ARMS)
    opt, rest = p.parse_known_args(argv)
    args = ddpm.parse_args([*rest, "--resume"])
    device = ddpm.setup(args)
    state = ddpm.resume_run(args)
    x, x_test = ddpm.load_data(args, device, state)
    net, s = ddpm.build(args, x.shape[1], device)
    ddpm.restore(state, dict(ema=net.eval()))
    for arm in opt.arms:
        if arm not in ("17/beta", "17/posterior", "17/zero") and not (
                (jumps := re.fullmatch(r"ddim/(\d+)/(0|1|0?\.\d+)", arm)) and 1 <= int(jumps[1]) <= args.T):
            p.error(f"--arms {arm}: 17/beta, 17/posterior, 17/zero, or ddim/STEPS/ETA, STEPS from 1 to T = {args.T}, ETA from 0 to 1")
    print("| drawn by | Frechet | precision | recall | sharpness | seconds |\n| --- " + "| --- " * 5 + "|")
    table = {}
    for arm in opt.arms:
        kind, *values = arm.split("/")
        args.sample_steps, args.eta, args.sigma = 0, 0.0, "beta"
        if kind == "17":
            args.sigma, = values
        else:
            args.sample_steps, args.eta = int(values[0]), float(values[1])
        begin = time.perf_counter()
        with ddpm.autocast(args), torch.no_grad():
            pictures, _ = ddpm.draw(net, x.shape[1:], args.judge, args.sample_steps, args, s)
        seconds = time.perf_counter() - begin
        table[arm] = ddpm.judge(pictures, x, x_test, args.seed)
        row(arm, [table[arm][name] for name in COLUMNS], f"{seconds:.0f}")
    row("held-out pictures", [table[arm][f"{name}_floor"] for name in COLUMNS])
    return table


if __name__ == "__main__":
    main()
