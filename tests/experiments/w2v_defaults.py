"""Which defaults of the SVD? A sweep: chosen on the files of --choose, reported on those of --report.

    python tests/experiments/w2v_defaults.py --data reviews.txt --dim 300 --choose men.txt --report wordsim.tsv

A setting a line: the mean score on the files to choose by, then each score. Half of the files choose, the others
say what the choice is worth; a setting that is better than those above on the first half is marked with *.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import w2v_svd as w  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", default="python", help="as in w2v_svd.py")
    p.add_argument("--choose", nargs="+", type=Path, required=True)
    p.add_argument("--report", nargs="+", type=Path, required=True)
    p.add_argument("--min-count", type=int, default=5)
    p.add_argument("--dim", type=int, default=100)
    p.add_argument("--sample", type=float, default=1e-3, help="as in w2v_svd.py")
    p.add_argument("--steps", type=int, default=30, help="rounds of the SVD")
    p.add_argument("--windows", nargs="+", type=int, default=[5, 2, 10])
    p.add_argument("--smoothings", nargs="+", type=float, default=[0.75, 1.0])
    p.add_argument("--discounts", nargs="+", type=float, default=[1.0, 0.0])
    opt = p.parse_args(argv)
    args = w.parse_args(["--data", opt.data, "--min-count", str(opt.min_count), "--sample", str(opt.sample)])
    words, _, tokens, docs = w.load_data(args, torch.device("cpu"), None)
    V, best = len(words), 0.0
    names = "  ".join(f"{path.stem[:10]:>10}" for path in opt.choose + opt.report)
    print(f"{'window smoothing discount plus':34}mean   {names}")
    for L in opt.windows:
        i, j, n = w.count(tokens, docs, V, L)
        n = n.double() / L
        n_w = torch.bincount(i, n, minlength=V)
        for smoothing, discount in itertools.product(opt.smoothings, opt.discounts):
            P = w.negatives_law(n_w, smoothing)
            M, Mt = (w.sparse(i, j, w.pmi(n, n_w[a], P[b], 1.0, discount), V) for a, b in ((i, j), (j, i)))
            factors = w.krylov_svd(M, Mt, min(opt.dim, V), opt.steps)
            for plus in (False, True):
                W, scores = w.vectors(*factors, 0.5, plus), []
                for path in opt.choose + opt.report:
                    score = w.evaluate(path, words, W)
                    scores.append(score.get("spearman", score.get("right")))
                mean = sum(scores[:len(opt.choose)]) / len(opt.choose)
                print(f"{L:6} {smoothing:9g} {discount:8g} {plus!s:5}  {'*' * (mean > best):2}{mean:.3f}   "
                      + "  ".join(f"{x:10.3f}" for x in scores), flush=True)
                best = max(best, mean)


if __name__ == "__main__":
    try:
        main()
    except w.UserError as error:
        sys.exit(f"w2v_defaults.py: {error}")
