"""Bits per dimension of held-out pictures, to set beside Ho et al. 2020 (3.75 on CIFAR-10): the bound of their (5).

    python tests/experiments/ddpm_bits.py [--images N] [--out DIR] [flags of ddpm.py, such as --sigma posterior]

Of the newest checkpoint of ddpm.py, or the one in --out: its average of weights, with the sampler of 9119 (17).
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ddpm  # noqa: E402


@torch.no_grad()
def bits_per_dim(net: nn.Module, x0: Tensor, g: torch.Generator, kind: str, clip: bool,
                 s: ddpm.Schedule) -> Tensor:
    """The bound of Ho et al. 2020 (5) in bits per dimension, (B,) float64; x0 = uint8 / 127.5 - 1.

    All T terms, one draw each: KL(q(x_{t-1} | x_t, x_0) || p) for t >= 2, where p has the mean and
    the sigma (`kind`) of (17); the prior's KL(q(x_T | x_0) || N(0, I)); at t = 1 a Gaussian
    integrated over each of 256 bins. Raises ValueError for sigma "zero", which has no density.
    """
    if kind == "zero":
        raise ValueError("sigma zero has no density")
    T, s64 = len(s["alpha"]) - 1, {name: row.double() for name, row in s.items()}
    q, p = ddpm.sigmas("posterior", s64), ddpm.sigmas(kind, s64)  # of the true step back and of the net's
    p[1] = q[1] = q[2]  # departs: no bin can be integrated with sigma_1 = 0; as Ho et al.
    no_z, exact = torch.zeros_like(x0), x0.double()
    mean, var = s64["bar_alpha"][T] * exact, s64["bar_beta"][T].square()
    nats = 0.5 * (mean.square() + var - 1 - var.log()).sum((1, 2, 3))  # the prior's
    for step in range(T, 0, -1):
        t = torch.full((len(x0),), step, device=x0.device)
        eps = torch.randn(x0.shape, generator=g, device=x0.device)
        xt = ddpm.diffuse(x0, t, eps, s)
        e = net(xt, t)
        if clip:
            e = ddpm.clip_eps(xt, t, e, s)
        mu = ddpm.step_back(xt.double(), t, e.double(), no_z, p, s64)
        if step == 1:
            nats -= log_bin(exact, mu, p[1]).sum((1, 2, 3))
        else:
            want = ddpm.step_back(xt.double(), t, eps.double(), no_z, p, s64)  # Bayes: (16) with eps
            ratio = (q[step] / p[step]).square()
            kl = 0.5 * (ratio - 1 - ratio.log() + ((want - mu) / p[step]).square())
            nats += kl.sum((1, 2, 3))
    return nats / (x0[0].numel() * math.log(2))


def log_bin(x: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """log probability of x's bin, 1/127.5 wide, under N(mu, sigma^2); the outer bins are open.

    x one of -1, -1 + 1/127.5, ..., 1; Ho et al. 2020 (13), with the exact normal integral.
    """
    above = torch.where(x > 0.999, math.inf, (x - mu + 1 / 255) / sigma)
    below = torch.where(x < -0.999, -math.inf, (x - mu - 1 / 255) / sigma)
    flip = (above + below).nan_to_num() > 0  # integrate in the tail where no digits cancel
    above, below = torch.where(flip, -below, above), torch.where(flip, -above, below)
    return (torch.special.ndtr(above) - torch.special.ndtr(below)).clamp(min=1e-300).log()


def main(argv: list[str] | None = None) -> dict:
    """Prints the mean, its standard error and what they are of; returns them."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0], usage=__doc__, allow_abbrev=False)
    p.add_argument("--images", type=int, default=16, help="held-out pictures")
    opt, rest = p.parse_known_args(argv)
    args = ddpm.parse_args([*rest, "--resume"])
    device = ddpm.setup(args)
    state = ddpm.resume_run(args)
    x, x_test = ddpm.load_data(args, device, state)
    net, s = ddpm.build(args, x.shape[1], device)
    ddpm.restore(state, dict(ema=net.eval()))
    x0 = ddpm.to_float(x_test[:opt.images])
    g = ddpm.generator(device, args.seed, 0, 4)
    with ddpm.autocast(args):
        bits = torch.cat([bits_per_dim(net, part, g, args.sigma, args.clip, s) for part in x0.split(args.samples)])
    error = bits.std().item() / len(bits) ** 0.5 if len(bits) > 1 else math.nan
    print(f"{bits.mean().item():.3f} +- {error:.3f} bits per dimension, {len(bits)} held-out pictures of {args.data}, "
          f"T = {args.T}, schedule {args.schedule}, sigma {args.sigma}")
    return dict(bits=bits.mean().item(), error=error, images=len(bits))


if __name__ == "__main__":
    main()
