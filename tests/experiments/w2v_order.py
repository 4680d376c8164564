"""Which matrix for strict similarity? PPMI of contexts with their side or place, of narrow windows, w + c, weights.

    python tests/experiments/w2v_order.py --data reviews.txt --vocabulary 20000 --dim 200 --eval simlex.txt simverb.txt

A matrix a line, its scores on each file of --eval. A context is a word and where it stands: anywhere in the window
(as in w2v_svd.py), on which side, or at which distance and side. Discount 1 and smoothing 1 but where said.
"""

import argparse
import functools
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
import w2v_svd as w  # noqa: E402

MATRICES = "as in the script", "w + c", "p = 0", "smoothing .75", "weight .125", "by side", "by place"


def count_by_place(tokens: Tensor, docs: Tensor, V: int, L: int, by: str) -> tuple[Tensor, Tensor, Tensor]:
    """Cells of word x (context, where): L - d + 1 for each pair d apart; where by "side": 2, by "place": 2 L of them."""
    cells, where = [], 2 * L if by == "place" else 2
    for d in range(1, L + 1):
        same = docs[:-d] == docs[d:]
        x, y = tokens[:-d][same].long(), tokens[d:][same].long()
        at = 2 * (d - 1) if by == "place" else 0
        for word, context, side in ((x, y, 0), (y, x, 1)):
            key = word * (V * where) + context * where + at + side
            keys = w.sort(key)
            cells.append(w.add_up(keys, torch.full_like(keys, L - d + 1)))
    keys, sums = (torch.cat(part) for part in zip(*cells))
    order = keys.argsort()
    keys, sums = w.add_up(keys[order], sums[order])
    return keys // (V * where), keys % (V * where), sums


def sparse(i: Tensor, j: Tensor, x: Tensor, shape: tuple[int, int]) -> Tensor:
    """The float32 CSR matrix of cells in any order; int32 inside, as w2v_svd.sparse."""
    order = (i * shape[1] + j).argsort()
    rows = torch.nn.functional.pad(torch.bincount(i, minlength=shape[0]).cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR a beta
        return torch.sparse_csr_tensor(rows.int(), j[order].int(), x[order].float(), shape)


def matrices(tokens: Tensor, docs: Tensor, V: int, opt: argparse.Namespace) -> Iterator[tuple[str, Tensor]]:
    """Names of matrices, and the vectors of each."""
    def solve(i: Tensor, j: Tensor, n: Tensor, L: int, smoothing: float = 1, weight: float = 0) -> w.Factors:
        n, columns = n.double() / L, int(j.max()) + 1
        n_w, n_c = torch.bincount(i, n, minlength=V), torch.bincount(j, n, minlength=columns)
        x = w.pmi(n, n_w[i], w.negatives_law(n_c, smoothing)[j], discount=1)
        r, r_c = (m.clamp(min=1) ** weight for m in (n_w, n_c))
        x = x * r[i] * r_c[j]
        M, Mt = sparse(i, j, x, (V, columns)), sparse(j, i, x, (columns, V))
        u, s, v = w.krylov_svd(M, Mt, opt.dim, opt.steps)
        return u / r[:, None].float(), s, v
    for L in opt.windows:
        cells = w.count(tokens, docs, V, L)
        plain = functools.cache(lambda: solve(*cells, L))
        arms = dict(zip(MATRICES, (
            lambda: w.vectors(*plain(), 0.5), lambda: w.vectors(*plain(), 0.5, True), lambda: w.vectors(*plain(), 0.0),
            lambda: w.vectors(*solve(*cells, L, smoothing=0.75), 0.5),
            lambda: w.vectors(*solve(*cells, L, weight=0.125), 0.5),
            lambda: w.vectors(*solve(*count_by_place(tokens, docs, V, L, "side"), L), 0.5),
            lambda: w.vectors(*solve(*count_by_place(tokens, docs, V, L, "place"), L), 0.5))))
        for name in opt.matrices:
            yield f"window {L}, {name}", arms[name]()


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", default="python", help="as in w2v_svd.py")
    p.add_argument("--eval", nargs="+", type=Path, required=True)
    p.add_argument("--vocabulary", type=int, default=20_000)
    p.add_argument("--min-count", type=int, default=5)
    p.add_argument("--dim", type=int, default=200)
    p.add_argument("--sample", type=float, default=1e-3, help="as in w2v_svd.py")
    p.add_argument("--steps", type=int, default=30, help="rounds of the SVD")
    p.add_argument("--windows", nargs="+", type=int, default=[5, 2, 1])
    p.add_argument("--matrices", nargs="+", choices=MATRICES, default=MATRICES, help="of each window")
    opt = p.parse_args(argv)
    args = w.parse_args(["--data", opt.data, "--vocabulary", str(opt.vocabulary), "--min-count", str(opt.min_count),
                         "--sample", str(opt.sample)])
    words, _, tokens, docs = w.load_data(args, torch.device("cpu"), None)
    for name, W in matrices(tokens, docs, len(words), opt):
        scores = (w.evaluate(path, words, W) for path in opt.eval)
        print(f"{name:28}" + "  ".join(f"{s.get('spearman', s.get('right')):.3f} ({s['asked']})" for s in scores),
              flush=True)


if __name__ == "__main__":
    try:
        main()
    except w.UserError as error:
        sys.exit(f"w2v_order.py: {error}")
