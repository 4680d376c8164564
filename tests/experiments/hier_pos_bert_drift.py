"""How far a stretched BERT's hidden states drift from its own, before any tuning: for a Hugging Face folder and a text.

    python tests/experiments/hier_pos_bert_drift.py FOLDER TEXT [--windows 16] [--alphas 0.2 0.4 ...] [--figure F.svg]

A window is [CLS] a b [SEP], a and b of n - 2 tokens each. The last hidden states of a, and of b, are compared with those that
the plain model has of [CLS] a [SEP], and of [CLS] b [SEP]: mean cosine. Then the norms of the codes past n over those of p (medians),
and with --figure the cosine by position in b.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import hier_pos_bert as hier  # noqa: E402


@torch.no_grad()
def cosines(net: hier.Bert, long: hier.Bert, windows: Tensor, vocab: dict) -> tuple[Tensor, Tensor]:
    """Mean cosine at each token of a and of b, (n - 2,) each; windows (N, 2 n - 4)."""
    total = torch.zeros(2, windows.shape[1] // 2)
    for window in windows:
        parts = window.view(2, -1)
        states = long.body(hier.frame(window[None], vocab))[0, 1:-1].unflatten(0, (2, -1))
        total += F.cosine_similarity(states, net.body(hier.frame(parts, vocab))[:, 1:-1], dim=-1)
    return tuple(total / len(windows))


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float, float]]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    p.add_argument("folder")
    p.add_argument("text")
    p.add_argument("--windows", type=int, default=16)
    p.add_argument("--alphas", nargs="+", type=float, default=[0.2, 1 / 3, 0.4, 0.6])
    p.add_argument("--figure")
    opt = p.parse_args(argv)
    c, weights = hier.read_bert(opt.folder)
    vocab = hier.read_vocabulary(opt.folder)
    net = hier.Bert(c)
    net.load_state_dict(weights, strict=False)
    n, g = len(net.positions), torch.Generator().manual_seed(0)
    with open(opt.text, "rb") as file:
        tokens = hier.encode(file.read(40 * n * opt.windows), vocab).long()
    windows = tokens.unfold(0, 2 * n - 4, 2 * n - 4)[:opt.windows]
    arms = [(f"alpha {a:.2f}", "hierarchical", a) for a in opt.alphas] + [(way, way, 0.4) for way in hier.WAYS[1:]]
    norms, rows, curves = hier.first_row(net.positions), {}, {}
    print(f"p_1 has norm {norms['p_1']:.2f}, the median of the others is {norms['others']:.2f}; {len(windows)} windows of {2 * n - 2} tokens\n"
          "| way | cosine, first block | second block | norm of a code past n |\n| --- | --- | --- | --- |")
    for name, way, alpha in arms:
        long = hier.stretch(net, way, 2 * n, alpha, g)
        a, b = cosines(net, long, windows, vocab)
        codes = hier.plain(long, 2 * n).positions[n:].norm(dim=1).median().item()
        rows[name], curves[name] = (a.mean().item(), b.mean().item(), codes / norms["others"]), b
        print(f"| {name} | {rows[name][0]:.2f} | {rows[name][1]:.2f} | {rows[name][2]:.2f} |", flush=True)
    if opt.figure:
        width = max(1, n // 16)
        hier.draw_curves(Path(opt.figure), "cosine to the plain model's hidden states, second block", "position past n", {
            name: ([width * (k + 0.5) for k in range(len(b) // width)], [part.mean().item() for part in b.split(width)][:len(b) // width])
            for name, b in curves.items()})
    return rows


if __name__ == "__main__":
    main()
