"""Which alpha, and what each part of post 7947 is for: arms of one trained BERT, stretched and tuned alike.

    python tests/experiments/hier_pos_bert_arms.py [--alphas 0.2 0.4 ...] [--seeds 0 1 2] [--figure F.svg] [flags of hier_pos_bert.py]

Beside the alphas: "u = p", (1) with p itself as the base, which gives the first n codes up; the anchor p_2; tiling, and tiling
with a table of its own rows tied together, which is alpha = 0. Prints accuracy on masked tokens at --times n, in per cent,
before and after --tune-steps, mean and standard deviation over the seeds; --figure draws both over alpha.
"""

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import hier_pos_bert as hier  # noqa: E402


class PItself(hier.Embeddings):
    """(1) with u = p."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        codes = hier.compose(self.position_embeddings.weight, self.alpha, positions)
        return self.LayerNorm(self.word_embeddings(tokens) + codes + self.token_type_embeddings.weight[0])


class Tied(hier.Embeddings):
    """Tiling with n rows for all blocks: the codes of alpha = 0."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        codes = self.position_embeddings.weight[positions % len(self.position_embeddings.weight)]
        return self.LayerNorm(self.word_embeddings(tokens) + codes + self.token_type_embeddings.weight[0])


def trained(argv: list[str]) -> tuple:
    """What `python hier_pos_bert.py argv` trains, untuned, with all that is needed to go on; exits as that does."""
    args = hier.parse_args(argv)
    steps, args.tune_steps = args.tune_steps, 0
    if code := hier.run(hier.train, args, hier.check_flags):
        sys.exit(code)
    args.tune_steps = steps
    device = torch.device("cuda" if args.gpu else "cpu")
    c, weights, vocab = hier.read_start(args)
    net = hier.build(args, device, c, weights)
    net.load_state_dict(torch.load(Path(args.out) / "ckpt.pt", map_location=device, weights_only=True)["model"])
    text, _, test = hier.load_data(args, device, vocab, c["max_position_embeddings"])
    return net, text, test, vocab, args


def arm(net: hier.Bert, name: str, args: argparse.Namespace) -> hier.Bert:
    """net stretched as `name` says: an alpha, "u = p", "tied", or one of hier_pos_bert.py's WAYS."""
    if name in hier.WAYS:
        return hier.stretched(net, name, args)
    alpha = float(name) if name[0].isdigit() else args.alpha
    long = hier.stretched(net, "hierarchical", argparse.Namespace(**vars(args) | dict(alpha=alpha)))
    long.bert["embeddings"].__class__ = {"u = p": PItself, "tied": Tied}.get(name, hier.Embeddings)
    return long


def main(argv: list[str] | None = None) -> dict[str, list[list[float]]]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    p.add_argument("--alphas", nargs="+", default="0.2 0.33 0.4 0.6 0.8".split())
    p.add_argument("--others", nargs="*", default=["u = p", "anchor", "tied", "tile"])
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--figure")
    opt, argv = p.parse_known_args(argv)
    table: dict[str, list[list[float]]] = {}
    for seed in opt.seeds:
        net, text, test, vocab, args = trained([*(argv or []), "--seed", str(seed)])
        n, length = len(net.positions), args.times * len(net.positions)
        exam = hier.make_exam(test[:args.eval_tokens].long(), vocab)

        def measure(net: hier.Bert, what: str, length: int = length) -> float:
            return 100 * hier.accuracy(hier.by_position(net, exam, length, what, vocab, args))
        for name in [*opt.alphas, *opt.others]:
            long = arm(net, name, args)
            before = measure(long, f"{name}, not tuned")
            tuned = hier.tune(long, hier.masked_loss, text, length, max(1, args.batch_size // args.times), vocab, args)
            table.setdefault(name, []).append([before, measure(tuned, name)])
        control = hier.tune(copy.deepcopy(net), hier.masked_loss, text, n, args.batch_size, vocab, args)
        table.setdefault(f"at {n}", []).append([measure(net, f"at {n}", n), measure(control, f"at {n}, tuned", n)])
    print(f"\n| alpha | at {length}, not tuned | after {args.tune_steps} steps |\n| --- | --- | --- |")
    for name, rows in table.items():
        cells = [f"{np.mean(column):.1f}" + (f" ± {np.std(column, ddof=1):.1f}" if len(column) > 1 else "") for column in zip(*rows)]
        print(f"| {name} | {' | '.join(cells)} |")
    if opt.figure:
        x = sorted(map(float, opt.alphas))
        means = {float(name): np.mean(table[name], 0) for name in opt.alphas}
        hier.draw_curves(Path(opt.figure), f"accuracy on masked tokens at {length}, %", "alpha", {
            what: (x, [means[a][k] for a in x]) for k, what in enumerate(["not tuned", f"{args.tune_steps} steps"])})
    return table


if __name__ == "__main__":
    main()
