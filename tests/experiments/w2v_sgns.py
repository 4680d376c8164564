"""What SGNS' descent owes to each of its parts: the script's own, then with one part changed at a time.

    python tests/experiments/w2v_sgns.py --data reviews.txt --eval men.txt questions-words.txt

An arm a line: its scores on each file of --eval, the CPU seconds of its training, all after one pass over the text
(--steps of 1,024 places, if any). Compare with gensim at epochs=1 on the same text.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
import w2v_svd as w  # noqa: E402

ARMS = {"as in the script": {}, "Adagrad's sums from 0, not S_0": dict(start=1e-10),
        "windows drawn, not in expectation": dict(drawn=True),
        "8 negatives for 32 places": dict(K=8), "256 negatives for a whole step": dict(groups=1, K=256),
        "SGD, word2vec's rate of .025": dict(rule="sgd", lr=0.025),
        "SGD, rate .1": dict(rule="sgd", lr=0.1), "SGD, rate .1, 128 places a step": dict(rule="sgd", lr=0.1, blocks=4),
        "dense Adam, rate .01": dict(rule="adam", lr=0.01), "8,192 places a step": dict(blocks=256)}


def updates(net: w.Word2Vec, rule: str) -> Callable[[float, list[tuple[Tensor, Tensor]]], None]:
    """A step of the rule down the gradient's rows: Adagrad by rows (the script's), plain SGD, or Adam of whole tables."""
    tables = net.U, net.out, net.out
    adam = torch.optim.Adam(net.parameters(), fused=True)

    def sgd(lr: float, gradient: list[tuple[Tensor, Tensor]]) -> None:
        for W, (at, rows) in zip(tables, gradient):
            W.index_add_(0, at.flatten(), rows.flatten(0, 1) * -lr)

    def dense_adam(lr: float, gradient: list[tuple[Tensor, Tensor]]) -> None:
        for W in net.parameters():
            W.grad = torch.zeros_like(W)
        for W, (at, rows) in zip(tables, gradient):
            W.grad.index_add_(0, at.flatten(), rows.flatten(0, 1) / 1024)  # as a mean: its eps is 1e-8
        adam.param_groups[0]["lr"] = lr
        adam.step()
    return dict(adagrad=net.learn, sgd=sgd, adam=dense_adam)[rule]


@torch.no_grad()
def train(tokens: Tensor, docs: Tensor, n: Tensor, opt: argparse.Namespace, drawn: bool = False, groups: int = 0,
          K: int = 32, rule: str = "adagrad", lr: float = 0.4, blocks: int = 32, start: float = w.S_0) -> Tensor:
    """The word vectors after one pass, or --steps: `descend`'s loop with skip-gram and negative sampling."""
    torch.manual_seed(opt.seed)
    net, law, L = w.Word2Vec(len(n), opt.dim), w.negatives_law(n, 0.75).cumsum(0), 5
    for sums in (net.U_sum, net.out_sum):
        sums.fill_(start)
    learn, total = updates(net, rule), -(-len(tokens) // w.SPAN)
    steps = opt.steps or -(-total // blocks)
    for step in range(steps):
        g = w.generator("cpu", opt.seed, step)
        draw = torch.rand(groups or blocks, K, generator=g).double()
        negatives = torch.searchsorted(law, draw).clamp(max=len(n) - 1)
        reach = torch.randint(1, L + 1, (blocks, w.SPAN), generator=g) if drawn else None
        starts = w.batch_rows(total, step, blocks, opt.seed, tokens.device) * w.SPAN
        learn(lr * (1 - step / steps), net(*w.windows(tokens, docs, starts, L, reach), negatives, 5)[2])
    return net.U.detach()


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", default="python", help="as in w2v_svd.py")
    p.add_argument("--eval", nargs="+", type=Path, required=True)
    for flag, default in (("--vocabulary", 5000), ("--min-count", 5), ("--dim", 100), ("--seed", 0), ("--steps", 0),
                          ("--sample", 1e-3)):
        p.add_argument(flag, type=type(default), default=default, help="as in w2v_svd.py")
    opt = p.parse_args(argv)
    args = w.parse_args(["--data", opt.data, *(f"--{name.replace('_', '-')}={getattr(opt, name)}" for name in
                                               ("vocabulary", "min_count", "sample", "seed"))])
    words, n, tokens, docs = w.load_data(args, torch.device("cpu"), None)
    for name, changed in ARMS.items():
        begin = time.process_time()
        W = train(tokens, docs, n, opt, **changed)
        seconds, said = time.process_time() - begin, []
        for path in opt.eval if W.isfinite().all() else ():
            scores = w.evaluate(path, words, W)
            said.append(f"{scores.get('spearman', scores.get('right')):.3f}")
        print(f"{name:42}{'  '.join(said) or 'not finite':24}{seconds:6.1f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except w.UserError as error:
        sys.exit(f"w2v_sgns.py: {error}")
