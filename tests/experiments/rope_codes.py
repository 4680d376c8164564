"""Six position codes in one model, trained alike: rope.py's rope and general beside four rivals.

    python tests/experiments/rope_codes.py [--codes rope alibi ...] [--seeds 0 1 2] [flags of rope.py]

The rivals: sinusoidal (RoPE's ancestor), learned (BERT's), alibi (arXiv 2108.12409), nope (none). Prints, for each code,
bits per byte of the test text, mean and standard deviation over the seeds: of --eval-bytes at the context trained,
then of half of them on windows of 8 contexts, up to 1, 2, 4 and 8 of them (`learned` ends at the first).
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import rope  # noqa: E402
import rope_extrapolation as longer  # noqa: E402

CODES = "rope general sinusoidal learned alibi nope".split()


class Rival(rope.LanguageModel):
    """rope.py's model with another code of positions in the place of the rotation."""

    def __init__(self, code: str, *sizes: int):
        super().__init__("rope", *sizes)
        self.code = code
        if code == "learned":
            self.place = nn.Embedding(self.config["context"], self.config["width"])

    def tables(self, length: int, n: Tensor | None) -> list[rope.Table]:
        zero = torch.zeros(length, self.theta.shape[-1], device=self.theta.device)
        return [(zero + 1, zero)] * len(self.layers)  # turns nothing

    def forward(self, tokens: Tensor, n: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
        n = torch.arange(tokens.shape[1], device=tokens.device) if n is None else n
        x, m = self.embed(tokens), n if kept is None else torch.arange(kept.shape[-2], device=n.device)
        if self.code == "learned":
            x = x + self.place(n)
        if self.code == "sinusoidal":
            x = x + torch.cat(rope.rotary_table(n, rope.thetas(x.shape[-1]).to(n.device), x.dtype), -1).to(x.dtype)
        distance = n[:, None] - m  # (L, M)
        slope = torch.zeros(1, 1, 1, device=n.device)
        if self.code == "alibi":  # slopes 2^{-8/H}, 2^{-16/H}, ...
            heads = self.config["heads"]
            slope = 2 ** (-8 * torch.arange(1, heads + 1, device=n.device) / heads)[:, None, None]
        mask = (-slope * distance).masked_fill(distance < 0, -math.inf).to(x.dtype)
        for i, (layer, table) in enumerate(zip(self.layers, self.tables(tokens.shape[1], n))):
            x = layer(x, table, mask, None if kept is None else kept[i], n)
        return self.last(self.norm(x)).float()


def rival(code: str):
    """rope.build for that code."""
    def build(args: argparse.Namespace, device: torch.device) -> Rival:
        torch.manual_seed(args.seed)
        return Rival(code, args.width, args.layers, args.heads, args.context).to(device)
    return build


def measure(code: str, seed: int, argv: list[str]) -> dict[str, list[float]]:
    """Trains one; {row of the table: bits at the context trained, then at 1, 2, 4, 8 contexts}."""
    own, rope.build = rope.build, rope.build if code in rope.POSITIONS else rival(code)
    try:
        position = "general" if code == "general" else "rope"
        net, test, args = longer.trained([*argv, "--seed", str(seed), "--position", position])
    finally:
        rope.build = own
    bits = json.loads((Path(args.out) / "metrics.json").read_text())["test_bits_per_byte"]
    with rope.autocast(args):
        arms = {} if code == "learned" else longer.ways(net, code) if code in rope.POSITIONS else {code: net}
        rows = longer.show({name: longer.curve(arm, test, args.context, args.batch_size * args.context)
                            for name, arm in arms.items()}, args.context)
    first, none = {code: [bits]}, [math.nan] * 4
    return {name: first.get(name, none[:1]) + rows.get(name, none)[:4] for name in first | rows}


def main(argv: list[str] | None = None) -> dict[str, list[list[float]]]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    p.add_argument("--codes", nargs="+", choices=CODES, default=CODES)
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    opt, argv = p.parse_known_args(argv)
    table: dict[str, list[list[float]]] = {}
    for code in opt.codes:
        for seed in opt.seeds:
            for name, row in measure(code, seed, argv).items():
                table.setdefault(name, []).append(row)
    context = rope.parse_args(argv).context
    print("\n| code | test part |" + "".join(f" {context * k} |" for k in (1, 2, 4, 8)) + "\n|" + " --- |" * 6)
    for name, rows in table.items():
        line = f"| {name} |"
        for column in zip(*rows):
            spread = f" ± {np.std(column, ddof=1):.3f}" if len(column) > 1 else ""
            line += " |" if math.isnan(column[0]) else f" {np.mean(column):.3f}{spread} |"
        print(line)
    return table


if __name__ == "__main__":
    main()
