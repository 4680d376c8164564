"""What do the guides and their halved gradients bring? 6214 (2), (3), (4) beside each other, an autoencoder of the same nets,
then what else the post claims.

    python tests/experiments/bigan_qp_arms.py [--seeds 0 1] [--arms (4) (3) (2) ...] [flags of bigan_qp.py]

Prints for each arm, mean over the seeds: Frechet distance and recall of samples (bigan_qp.py's judge), sharpness of samples
and of held-out reconstructions over that of pictures, the reconstructions' PSNR, the squared error of E(G(z)), what a linear
map reads off E's codes and off the reconstructions (mean over the attributes; or the accuracy), the seconds of training.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bigan_qp  # noqa: E402

ARMS = {"(4)": "", "(3)": "--no-ng", "(2)": "--beta1 0 --beta2 0", "autoencoder": "", "lambda 1": "--lam 1", "lambda 100": "--lam 100",
        "two critic steps": "--critic-steps 2 --critic-lr 2e-3", "two, and lr 1e-3": "--critic-steps 2 --critic-lr 1e-3 --lr 1e-3"}
COLUMNS = ("frechet", "recall", "sharpness", "sharpness_reconstructions", "psnr", "code_mse", "probe_E",
           "read_off_reconstructions", "train_seconds")


def autoencoder(T: nn.Module, G: nn.Module, E: nn.Module, x: Tensor, z: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    """In bigan_loss' place: |x - G(E(x))|^2 trains G and E, and nothing else does."""
    picture = (x - G(E(x))).square().mean((1, 2, 3))
    return picture, 0 * picture, picture


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Prints the table; returns the means by arm."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0], usage=__doc__, allow_abbrev=False)
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    opt, rest = p.parse_known_args(argv)
    print(f"| arm | {' | '.join(COLUMNS)} |\n| --- " + "| --- " * len(COLUMNS) + "|")
    table, lines = {}, []
    for arm in opt.arms:
        runs = []
        for seed in opt.seeds:
            with tempfile.TemporaryDirectory() as folder:
                out, loss = f"{folder}/run", autoencoder if arm == "autoencoder" else bigan_qp.bigan_loss
                with mock.patch.object(bigan_qp, "bigan_loss", loss):
                    if code := bigan_qp.main([*rest, *ARMS[arm].split(), "--seed", str(seed), "--out", out]):
                        sys.exit(code)
                runs.append(json.loads(Path(out, "metrics.json").read_text()))
        table[arm] = {}
        for name in COLUMNS:
            known = [run[name] for run in runs if run.get(name) is not None]
            known = [statistics.mean(value) if isinstance(value, list) else value for value in known]
            table[arm][name] = statistics.mean(known) if known else None
        numbers = ["-" if n is None else f"{n:.3g}" for n in table[arm].values()]
        lines.append(f"| {arm} | " + " | ".join(numbers) + " |")
    print("\n".join(lines))
    return table


if __name__ == "__main__":
    main()
