"""The post's question without the noise of a descent from text: word -> context by softmax and by negative sampling,
each step down the loss of all pairs at once, by their counts, until it no longer gains.

    python tests/experiments/w2v_counts.py --data reviews.txt --choose men.txt verb143.txt --report wordsim353.tsv

Counts, words and numbers are the SVD's. Adam; looked at after 50, 100, 200, ... steps, until the mean score on --choose
grows by less than --gain, or --most. A bag's loss is not made of counts, so CBOW cannot be here. Loss per pair, in nats.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
import w2v_arms  # noqa: E402
import w2v_objective  # noqa: E402
import w2v_svd as w  # noqa: E402


def softmax_loss(N: Tensor, x: Tensor) -> Tensor:
    """-sum_wc N log softmax(x)_wc, divided by sum N; counts N and scores x (V, V)."""
    return -(N * x.log_softmax(1)).sum() / N.sum()


def descent(loss_of: Callable[[Tensor], Tensor], V: int, n: int, lr: float, seed: int) -> Iterator[tuple[float, Tensor]]:
    """The loss_of(x), x = U out' (V, V), and U (V, n) after the step down it, for ever."""
    torch.manual_seed(seed)
    net = w.Word2Vec(V, n)
    adam = torch.optim.Adam([net.U, net.out], lr)
    while True:
        loss = loss_of(net.U @ net.out.T)
        adam.zero_grad()
        loss.backward()
        adam.step()
        yield loss.item(), net.U.detach()


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", default="python", help="as in w2v_svd.py")
    p.add_argument("--choose", nargs="+", type=Path, required=True)
    p.add_argument("--report", nargs="+", type=Path, required=True)
    for flag, default in (("--vocabulary", 5000), ("--min-count", 5), ("--dim", 100), ("--window", 5), ("--negative", 5),
                          ("--seed", 0), ("--sample", 1e-3)):
        p.add_argument(flag, type=type(default), default=default, help="as in w2v_svd.py")
    p.add_argument("--losses", nargs="+", choices=["softmax", "negative"], default=["softmax", "negative"])
    p.add_argument("--lr", type=float, default=0.03)
    p.add_argument("--gain", type=float, default=0.005)
    p.add_argument("--steps", type=int, default=50, help="before the first look")
    p.add_argument("--most", type=int, default=3200, help="steps")
    opt = p.parse_args(argv)
    args = w.parse_args([f"--{name.replace('_', '-')}={getattr(opt, name)}" for name in
                         ("data", "vocabulary", "min_count", "sample", "seed")])
    words, n, tokens, docs = w.load_data(args, torch.device("cpu"), None)
    N = (w2v_arms.dense(*w.count(tokens, docs, len(words), opt.window), len(words)) / opt.window).float()
    P, dim = w.negatives_law(n, 0.75).float(), min(opt.dim, len(words))
    losses = dict(softmax=lambda x: softmax_loss(N, x),
                  negative=lambda x: -w2v_objective.sgns_objective(N, x, P, opt.negative))
    print(f"{'loss, step':24}{'a pair':>8}  chosen by  |  " + "  ".join(f.stem for f in opt.choose + opt.report))
    for name in opt.losses:
        look, best = opt.steps, -2.0
        for step, (loss, U) in enumerate(descent(losses[name], len(words), dim, opt.lr, opt.seed), 1):
            if step < look:
                continue
            found = [w.evaluate(path, words, U) for path in opt.choose + opt.report]
            values = [x.get("spearman", x.get("right")) for x in found]
            mean = sum(values[:len(opt.choose)]) / len(opt.choose)
            print(f"{f'{name}, {step}':24}{loss:8.4f}  {mean:.3f}  |  " + "  ".join(f"{x:.3f}" for x in values), flush=True)
            if mean < best + opt.gain or 2 * step > opt.most:
                break
            look, best = 2 * step, mean


if __name__ == "__main__":
    try:
        main()
    except w.UserError as error:
        sys.exit(f"w2v_counts.py: {error}")
