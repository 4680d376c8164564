"""BatchNorm's running averages, or statistics estimated anew? Samples of one checkpoint, judged.

    python tests/experiments/nvae_batchnorm.py [--temperatures 0.6 0.8 1] [--to FILE.png] [--out DIR] [flags of nvae.py]

Of the newest checkpoint of nvae.py, or the one in --out; the same noise for both. --to: a row of pictures for each line.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import nvae  # noqa: E402

COLUMNS = "frechet", "precision", "recall", "sharpness"


def main(argv: list[str] | None = None) -> dict[tuple[float, int], dict]:
    """Prints the table; returns its rows by temperature and number of batches."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0], usage=__doc__, allow_abbrev=False)
    p.add_argument("--temperatures", nargs="+", type=float, default=[0.6, 0.8, 1.0])
    p.add_argument("--to", metavar="FILE.png")
    opt, rest = p.parse_known_args(argv)
    args = nvae.parse_args([*rest, "--resume"])
    device = nvae.setup(args)
    state = nvae.resume_run(args)
    x, x_test = nvae.load_data(args, device, state)
    net = nvae.build(args, *x.shape[1:3], device)
    nvae.restore(state, dict(ema=net.eval()))
    table, rows, anew = {}, [], args.bn_batches
    print("| temperature | batches | " + " | ".join(COLUMNS) + " |\n| --- " + "| --- " * (1 + len(COLUMNS)) + "|")
    for t in opt.temperatures:
        for args.bn_batches in (0, anew):
            pictures = nvae.draw_pictures(net, args.judge, t, args)
            table[t, args.bn_batches] = found = nvae.judge(pictures, x, x_test, args.seed)
            print(f"| {t:g} | {args.bn_batches} | " + " | ".join(f"{found[name]:.3g}" for name in COLUMNS) + " |")
            rows.append(pictures[:12])
    if opt.to:
        nvae.write_png(Path(opt.to), nvae.grid(torch.cat(rows), len(rows[0])))
    return table


if __name__ == "__main__":
    main()
