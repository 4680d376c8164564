"""What the cache is for, and what the truncated gradient costs: the bare run's recall task by what trains it.

    python tests/experiments/transformer_vq_recall.py               # 160 steps an arm: what the page shows
    python tests/experiments/transformer_vq_recall.py --steps 2     # a look

An arm a line: the share of values that each attention of its weights says right, of keys last seen more than 16 tokens
ago, two windows (chance 0.125). Far only: keys come in a cycle, so that each comes again after 32 tokens, never sooner;
the post's gradient, which U does not pass, beside (2) with every key's own.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import transformer_vq as tvq  # noqa: E402


def far_texts(rows: int, g: torch.Generator) -> torch.Tensor:
    """Texts "k v k v ..." (rows, 128): 16 keys in a cycle, in each text its own, and its own map to 8 values."""
    value = torch.randint(8, (rows, 16), generator=g)
    key = torch.rand(rows, 16, generator=g).argsort(1).repeat(1, 4)
    return torch.stack([key, 128 + value.gather(1, key)], -1).flatten(1)


ARMS = (("trained with vq", "vq", tvq.recall_text), ("trained with the window alone", "window", tvq.recall_text),
        ("far only, the post's gradient", "vq", far_texts), ("far only, full straight-through", "quadratic", far_texts))


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--steps", type=int, default=160, help="of each arm (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    opt = p.parse_args(argv)
    for name, attention, texts in ARMS:
        right = tvq.recall(attention, opt.steps, opt.seed, torch.device("cpu"), texts)
        print(f"{name:34}" + "  ".join(f"{way} {share:.3f}" for way, share in right.items()), flush=True)


if __name__ == "__main__":
    main()
