"""The post's question, arm by arm: SVDs with and without what the softmax brings, on one vocabulary.

    python tests/experiments/w2v_arms.py --data reviews.txt --eval wordsim353.tsv questions-words.txt

An arm a line, its scores on each file of --eval. The counts are those of w2v_svd.py; the linear models are exact
(LAPACK, on dense matrices: that is why the vocabulary is small), PPMI's SVD has --steps rounds.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
import w2v_svd as w  # noqa: E402


def dense(i: Tensor, j: Tensor, x: Tensor, V: int) -> Tensor:
    """The (V, V) float64 matrix of cells; whole numbers stay exact up to 2^53."""
    return torch.zeros(V, V, dtype=torch.float64).index_put_((i, j), x.double(), accumulate=True)


def bag_gram(tokens: Tensor, docs: Tensor, V: int, L: int) -> Tensor:
    """L X'X (V, V) float64 of the bags around all places, windows in expectation: T3's XX."""
    C = torch.zeros(V * V, dtype=torch.float64)
    for a, b in itertools.combinations_with_replacement([d for d in range(-L, L + 1) if d], 2):
        lo, hi = min(a, 0), max(b, 0)  # both places and the centre, 0, are in one document
        size = max(len(tokens) - hi + lo, 0)
        same = docs[:size] == docs[hi - lo:][:size]
        x, y = (tokens[d - lo:][:size][same].long() for d in (a, b))
        both = torch.bincount(x * V + y, minlength=V * V)  # reached when the farther one is
        C.add_(both, alpha=(L + 1 - max(abs(a), abs(b))) * (0.5 if a == b else 1))
    return C.view(V, V) + C.view(V, V).T


def weighted_svd(M: Tensor, n_w: Tensor, weight: float, k: int, rounds: int) -> w.Factors:
    """T11: of M's factorisations the one whose errors count (n_w n_c)^(2 weight) times."""
    r = n_w.clamp(min=1e-30) ** weight
    R = r[:, None] * M * r
    u, s, v = w.krylov_svd(R, R.mT.contiguous(), k, rounds)
    return u / r[:, None], s, v / r[:, None]


def arms(tokens: Tensor, docs: Tensor, V: int, L: int, k: int, rounds: int):
    """Names of arms, and left, s, right, p, plus of each."""
    i, j, n = w.count(tokens, docs, V, L)
    n = n.double() / L
    N, XX = dense(i, j, n, V), bag_gram(tokens, docs, V, L) / L
    n_w = N.sum(1)
    yield "raw counts, p = 0.5", *w.truncated(N, k), 0.5, False
    for name, factors in (("word -> context, no softmax (T2)", w.linear_skipgram(N, k)),
                          ("bag -> centre, no softmax (T3)", w.linear_cbow(XX, N, k)),
                          ("bag -> bag, no softmax (autoencoder)", w.linear_cbow(XX, XX, k))):
        for p in (0.0, 0.5, 1.0):
            yield f"{name}, p = {p:g}", *factors, p, False

    def ppmi(shift: float = 1, smoothing: float = 1, discount: float = 0, weight: float = 0) -> w.Factors:
        x = w.pmi(n, n_w[i], w.negatives_law(n_w, smoothing)[j], shift, discount)
        return weighted_svd(dense(i, j, x, V).float(), n_w.float(), weight, k, rounds)

    plain = ppmi()
    for p, plus in ((0.5, False), (0.0, False), (1.0, False), (0.5, True)):
        yield f"PPMI, p = {p:g}{', w + c' * plus}", *plain, p, plus
    for flags in (dict(shift=2), dict(shift=5), dict(smoothing=0.75), dict(discount=1), dict(discount=5),
                  dict(smoothing=0.75, weight=0.125), dict(smoothing=0.75, weight=0.25),
                  dict(smoothing=0.75, weight=0.5)):
        yield "PPMI, " + ", ".join(f"{name} {x:g}" for name, x in flags.items()), *ppmi(**flags), 0.5, False


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", default="python", help="as in w2v_svd.py")
    p.add_argument("--eval", nargs="+", type=Path, required=True, help="as in w2v_svd.py")
    p.add_argument("--vocabulary", type=int, default=5000)
    p.add_argument("--min-count", type=int, default=5)
    p.add_argument("--dim", type=int, default=100)
    p.add_argument("--window", type=int, default=5)
    p.add_argument("--sample", type=float, default=1e-3, help="as in w2v_svd.py")
    p.add_argument("--steps", type=int, default=30, help="rounds of PPMI's SVD")
    opt = p.parse_args(argv)
    args = w.parse_args(["--data", opt.data, "--vocabulary", str(opt.vocabulary), "--min-count", str(opt.min_count),
                         "--sample", str(opt.sample)])
    words, _, tokens, docs = w.load_data(args, torch.device("cpu"), None)
    if len(words) > 15_000:
        raise w.UserError(f"{len(words):,} words: too many for dense matrices of their pairs; --vocabulary 15000")
    k = min(opt.dim, len(words))
    for name, *factors in arms(tokens, docs, len(words), opt.window, k, opt.steps):
        W, said = w.vectors(*factors), []
        for path in opt.eval:
            scores = w.evaluate(path, words, W)
            said.append(f"{scores.get('spearman', scores.get('right')):.3f} ({scores['asked']})")
        print(f"{name:48}" + "  ".join(said), flush=True)


if __name__ == "__main__":
    try:
        main()
    except w.UserError as error:
        sys.exit(f"w2v_arms.py: {error}")
