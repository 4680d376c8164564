"""8265 (16), the decay that RoPE's thetas leave room for, as decay.svg; and a table: how wrong cos(n theta) can be.

    python tests/experiments/rope_figures.py [--out DIR]
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import rope  # noqa: E402


def decay(distance: Tensor, theta: Tensor) -> Tensor:
    """8265 (16): mean over i of |S_i|, for distances m - n (...) and theta (d/2,)."""
    S = torch.exp(1j * distance[..., None] * theta).cumsum(-1)  # 8265 (15)
    return S.abs().mean(-1)


def precision(theta: Tensor) -> dict[str, list[float]]:
    """Largest error of cos(n theta) for 100 n up to 10^2, ..., 10^7, by three ways to the angle."""
    ways = {"float32 angles": lambda n: (n.float()[:, None] * theta.float()).cos(),
            "bfloat16 positions": lambda n: (n.bfloat16().float()[:, None] * theta.float()).cos(),
            "rotary_table": lambda n: rope.rotary_table(n, theta)[0]}
    n = [torch.arange(10**k - 99, 10**k + 1) for k in range(2, 8)]
    return {name: [(way(m).double() - (m.double()[:, None] * theta).cos()).abs().max().item() for m in n]
            for name, way in ways.items()}


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    p.add_argument("--out", type=Path, default=Path("out/rope_figures"))
    opt = p.parse_args(argv)
    opt.out.mkdir(parents=True, exist_ok=True)
    distance = torch.logspace(0, 12, 200, 2, dtype=torch.float64)
    curves = {f"base {base}": (distance.tolist(), decay(distance, rope.thetas(128, base)).tolist())
              for base in (10_000, 500_000)}
    rope.draw_curves(opt.out / "decay.svg", "mean |S_i| of 8265 (16), d = 128", "distance m - n", curves, log2=True)
    print(f"{'error of cos at position':24}" + "".join(f"    10^{k}" for k in range(2, 8)))
    for name, errors in precision(rope.thetas(64)).items():
        print(f"  {name:22}" + "".join(f"{error:8.0e}" for error in errors))
    print(opt.out / "decay.svg")


if __name__ == "__main__":
    main()
