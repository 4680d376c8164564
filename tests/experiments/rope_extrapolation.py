"""Texts longer than a rope model was trained on: 9675 (NTK), 9708 (ReRoPE) and interpolation beside plain RoPE.

    python tests/experiments/rope_extrapolation.py [--figure curves.svg] [flags of rope.py]

Trains `python rope.py` with these flags (`--resume --out DIR` of a finished run trains nothing), takes the plain RoPE
model, folded if it was a dense B, and prints its bits per byte on windows of 8 times the context, by four ways.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import rope  # noqa: E402


def ntk_thetas(theta: Tensor, factor: float) -> Tensor:
    """9675: thetas of base * factor^{d/(d-2)}: theta_0 stays, the last one falls by `factor`."""
    i = torch.arange(theta.shape[-1]).to(theta)
    return theta * factor ** (-i / max(theta.shape[-1] - 1, 1))


def rerope_scores(q: Tensor, k: Tensor, near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor], w: int) -> Tensor:
    """9708: q_m^T R^{max(n - m, -w)} k_n, (..., L, L), for raw q and k (..., L, d).

    near: cos and sin of the positions 0, ..., L - 1; far: of w, L times.
    """
    n = torch.arange(q.shape[-2], device=q.device)
    close = rope.rotate(q, *near) @ rope.rotate(k, *near).mT
    return torch.where(n[:, None] - n < w, close, rope.rotate(q, *far) @ k.mT)


class ReRoPE(torch.nn.Module):
    """The attention of one layer by `rerope_scores`, in the place of rope.SelfAttention."""

    def __init__(self, old: rope.SelfAttention, theta: Tensor, w: int):
        super().__init__()
        self.old, self.theta, self.w = old, theta, w

    def forward(self, x: Tensor, table: rope.Table, *_) -> Tensor:
        qkv = self.old.qkv(x).unflatten(-1, (3, self.old.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # (B, H, L, d) each
        n = torch.full((x.shape[1],), self.w, device=x.device)
        far = rope.rotary_table(n, self.theta, table[0].dtype)
        scores = rerope_scores(q, k, table, far, self.w) * q.shape[-1] ** -0.5
        later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        y = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        return self.old.out(y.transpose(1, 2).flatten(2))


def with_rerope(net: rope.LanguageModel, w: int) -> rope.LanguageModel:
    """A copy of a "rope" model whose distances stop at w."""
    net = copy.deepcopy(net)
    for layer, theta in zip(net.layers, net.theta):
        layer.attention = ReRoPE(layer.attention, theta, w)
    return net


def with_thetas(net: rope.LanguageModel, change: Callable[[Tensor], Tensor]) -> rope.LanguageModel:
    """A copy of a "rope" model with other thetas."""
    net = copy.deepcopy(net)
    net.theta.copy_(change(net.theta))
    return net


def ways(net: rope.LanguageModel, name: str = "rope") -> dict[str, rope.LanguageModel]:
    """The model as it is, and by each way to longer texts; 8 contexts are what they are made for."""
    w = net.config["context"] // 2
    return {name: net, f"{name}, interpolation x 8": with_thetas(net, lambda theta: theta / 8),
            f"{name}, NTK x 8": with_thetas(net, lambda theta: ntk_thetas(theta, 8.0)),
            f"{name}, ReRoPE, w = {w}": with_rerope(net, w)}


def curve(net: torch.nn.Module, data: Tensor, context: int, batch: int) -> list[float]:
    """Bits per byte at each position of windows of 8 contexts."""
    return rope.bits_by_position(net, data, 8 * context, batch).mean(0).tolist()


def trained(argv: list[str]) -> tuple[rope.LanguageModel, Tensor, argparse.Namespace]:
    """What `python rope.py argv` trains, folded, with the test bytes and the flags; exits as that does."""
    args = rope.parse_args(argv)
    if not args.resume and args.eval_bytes < 16 * args.context:  # or the checkpoint has the context
        sys.exit(f"--eval-bytes {args.eval_bytes}: 16 times --context at least, {16 * args.context}")
    if code := rope.run(rope.train, args, rope.check_flags):
        sys.exit(code)
    device = torch.device("cuda" if args.gpu else "cpu")
    net = rope.build(args, device)
    net.load_state_dict(torch.load(Path(args.out) / "ckpt.pt", map_location=device, weights_only=True)["model"])
    return rope.fold(net), rope.load_data(args, device)[2][:args.eval_bytes // 2 + 1], args


def show(curves: dict[str, list[float]], context: int) -> dict[str, list[float]]:
    """Prints the mean over the first 1, 2, 4, 8 contexts, then over what each adds; returns both in a row."""
    ends = [context * k for k in (1, 2, 4, 8)]
    print(f"{'bits per byte at length':28}" + "".join(f"{n:8}" for n in ends) + "   of bytes"
          + "".join(f"{f'> {n}':>8}" for n in ends[:-1]))
    rows = {}
    for name, bits in curves.items():
        parts = [(0, n) for n in ends] + list(zip(ends, ends[1:]))
        rows[name] = [sum(bits[a:b]) / (b - a) for a, b in parts]
        print(f"  {name:26}" + "".join(f"{value:8.3f}" for value in rows[name][:4]) + " " * 11
              + "".join(f"{value:8.3f}" for value in rows[name][4:]))
    return rows


def draw(path: Path, curves: dict[str, list[float]], context: int) -> None:
    """The curves in half octaves of positions above 16."""
    edges = [round(2 ** (k / 2)) for k in range(8, 2 * int(math.log2(8 * context)) + 1)]
    means = {name: [sum(bits[a:b]) / (b - a) for a, b in zip(edges, edges[1:])] for name, bits in curves.items()}
    rope.draw_curves(path, f"bits per byte, trained at {context}", "position",
                     {name: (edges[1:], row) for name, row in means.items()}, log2=True)


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    p.add_argument("--figure", type=Path, help="an SVG of the curves")
    opt, argv = p.parse_known_args(argv)
    net, test, args = trained(argv)
    with rope.autocast(args):
        curves = {name: curve(way, test, args.context, args.batch_size * args.context)
                  for name, way in ways(net).items()}
    if opt.figure:
        draw(opt.figure, curves, args.context)
    return show(curves, args.context)


if __name__ == "__main__":
    main()
