"""SGNS' own objective: at T5's optimum, at SVDs of PPMI with and without weights, and where SGNS' descent ends.

    python tests/experiments/w2v_objective.py --data reviews.txt --vocabulary 5000 --dim 100 --epochs 1

Per pair, over all V^2 cells, k negatives each. An SVD of PMI without the shift log k is read as u v - log k.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
import w2v_arms  # noqa: E402
import w2v_svd as w  # noqa: E402


def sgns_weight(n: Tensor, n_w: Tensor, P_c: Tensor, k: float) -> Tensor:
    """The curvature of SGNS' loss at its optimum, T11: 1 / (1/n + 1/(k n_w P_c)).

    SGNS weighs a cell by the rarer of pair and negative, an SVD all cells alike; or by r_w r_c, if it is taken of
    r_w r_c M_wc and divided by r again: w2v_arms.weighted_svd.
    """
    return 1 / (1 / n + 1 / (k * n_w * P_c))


def sgns_objective(N: Tensor, x: Tensor, P: Tensor, k: int) -> Tensor:
    """sum_wc N log s(x) + k n_w P_c log s(-x), divided by sum N; counts N, scores x (V, V), P (V,) of one dtype."""
    return ((N * F.logsigmoid(x)).sum() + k * (N.sum(1) @ F.logsigmoid(-x) @ P)) / N.sum()


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", default="python", help="as in w2v_svd.py")
    for flag, default in (("--vocabulary", 2000), ("--min-count", 5), ("--dim", 100), ("--window", 5),
                          ("--negative", 5), ("--seed", 0), ("--sample", 1e-3), ("--steps", 0), ("--epochs", 1.0)):
        p.add_argument(flag, type=type(default), default=default, help="as in w2v_svd.py")
    opt = p.parse_args(argv)
    k, L, flags = opt.negative, opt.window, [f"--{name.replace('_', '-')}={x}" for name, x in vars(opt).items()]
    args = w.parse_args([*flags, "--model=skipgram"])
    words, n, tokens, docs = w.load_data(args, torch.device("cpu"), None)
    N, dim = w2v_arms.dense(*w.count(tokens, docs, len(words), L), len(words)) / L, min(opt.dim, len(words))
    P, n_w = w.negatives_law(N.sum(1), 0.75), N.sum(1, keepdim=True)
    best = w.sgns_optimum(N, n_w, P, k).clamp(min=-99)
    print(f"{'the most there is (T5)':48}{sgns_objective(N, best, P, k):.4f}", flush=True)
    M = w.pmi(N, n_w, P, 1).nan_to_num(0)
    for weight in (0.0, 0.125, 0.25, 0.5):
        left, s, right = w2v_arms.weighted_svd(M, N.sum(1), weight, dim, 30)
        value = sgns_objective(N, (left * s @ right.T).double() - math.log(k), P, k)
        print(f"{f'PPMI by SVD, weight {weight:g}':48}{value:.4f}", flush=True)
    with tempfile.TemporaryDirectory() as out:
        if w.main([*flags, "--model=skipgram", f"--out={out}/run"]):
            raise SystemExit("SGNS did not run")
        net = torch.load(f"{out}/run/ckpt.pt", weights_only=True)["model"]
    print(f"{'SGNS by gradient':48}{sgns_objective(N, (net['U'] @ net['out'].T).double(), P, k):.4f}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except w.UserError as error:
        sys.exit(f"w2v_objective.py: {error}")
