"""DDPM: tear the building down, then build it up again.

Post    生成扩散模型漫谈（一）：DDPM = 拆楼 + 建楼   https://kexue.fm/archives/9119 (read 2026-11)
        Where it stops, its sequel 9152 and Ho, Jain, Abbeel 2020 (arXiv 2006.11239) go on.

Map     9119 (1)   noise -> sample, as bricks -> tower                              sample
        9119 (2)   x = x_0 -> x_1 -> ... -> x_T = z                                 tear_down
        9119 (3)   x_t = alpha_t x_{t-1} + beta_t eps_t                             diffuse_once
        9119 (4)   x_t = (alpha_t...alpha_1) x_0 + sum of independent noises        test
        9119 (5)   the squared coefficients of (4) add up to 1                      test
        9119 (6)   x_t = bar_alpha_t x_0 + bar_beta_t eps                           diffuse
        9119 (7)   || x_{t-1} - mu(x_t) ||^2                                        test
        9119 (8)   mu(x_t) = (x_t - beta_t eps_theta(x_t, t)) / alpha_t             step_back
        9119 (9)   (7) = (beta_t/alpha_t)^2 || eps_t - eps_theta ||^2               test
        9119 (10)  x_t = bar_alpha_t x_0 + alpha_t bar_beta_{t-1} bar_eps + beta_t eps_t   test
        9119 (11)  || eps_t - eps_theta((10), t) ||^2                               test
        9119 (12)  eps_t = (beta_t eps - alpha_t bar_beta_{t-1} omega) / bar_beta_t test
        9119 (13)  (11) with (12) put in                                            test
        9119 (14)  (13) with omega integrated out                                   test
        9119 (15)  || eps - (bar_beta_t/beta_t) eps_theta((6), t) ||^2              loss
        9119 (16)  x_{t-1} = (x_t - beta_t eps_theta) / alpha_t                     step_back
        9119 (17)  (16) + sigma_t z                                                 step_back
        9119 (18)  alpha_t = sqrt(1 - 0.02 t / T)  (20/T for other T)               make_schedule
        9119 (19)  log bar_alpha_T < -0.005 (T + 1)                                 test
Symbols alpha_t^2 + beta_t^2 = 1 as in the post: the paper's alpha_t is alpha[t]**2, its beta_t is
        beta[t]**2, and sigma_t = beta_t is a standard deviation. `net` is the paper's eps_theta,
        which is (bar_beta_t / beta_t) times the post's: `net` in (15), beta_t^2/bar_beta_t in (16).
Shapes  B batch, C channels, H height, W width, T steps; t counts 1..T, row 0 of a schedule is
        "nothing torn down yet". Pictures are float32 in [-1, 1] here, uint8 in memory and on disk.

Run     python ddpm.py                                   # CPU: small drawn faces
        python ddpm.py --gpu                             # one GPU: the same faces at 64 px
        python ddpm.py --gpu --data cifar10 --paper      # Ho et al.'s set-up, whole
        torchrun --nproc_per_node=8 ddpm.py --gpu        # the same global batch on eight
        python ddpm.py --sample-only 64                  # from out/ddpm/ckpt.pt
Needs   torch, numpy (and Pillow for a folder of pictures)
"""

import argparse
import copy
import errno
import functools
import gc
import gzip
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import signal
import struct
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Schedule = dict[str, Tensor]


# ---- the post: 9119 ----

def make_schedule(T: int, kind: str = "post") -> Schedule:
    """9119 (18), (6): alpha, beta, bar_alpha, bar_beta, each (T+1,) in [0, 1]; row t is step t.

    kind "post" is (18), "paper" is Ho et al.'s linear one; both keep their end for any T.
    float64 inside, float32 out. Raises ValueError for another kind, or T <= 20.
    """
    if T <= 20 or kind not in ("post", "paper"):
        raise ValueError(f"no schedule {kind!r} with T = {T}: kinds are post, paper; T > 20")
    t = torch.arange(T + 1, dtype=torch.float64)
    if kind == "post":
        beta2 = 20 / T * t / T  # 9119 (18); departs: 20/T for 0.02, or bar_alpha_T >> 0 if T < 1000
    else:
        beta2 = (1e-4 + (0.02 - 1e-4) * (t - 1) / (T - 1)) * 1000 / T  # Ho et al. 2020, section 4
    beta2[0] = 0
    log_bar_alpha = torch.log1p(-beta2).cumsum(0) / 2
    s = dict(alpha=(1 - beta2).sqrt(), beta=beta2.sqrt(), bar_alpha=log_bar_alpha.exp(),
             bar_beta=(-torch.expm1(2 * log_bar_alpha)).sqrt())
    return {name: value.float() for name, value in s.items()}


def at(row: Tensor, t: Tensor) -> Tensor:
    """row[t] for t (B,), shaped (B, 1, 1, 1) to meet pictures."""
    return row[t].view(-1, 1, 1, 1)


def diffuse_once(x: Tensor, t: Tensor, eps: Tensor, s: Schedule) -> Tensor:
    """9119 (3): x_t (B, C, H, W) from x = x_{t-1}, noise eps of its shape, and t (B,) in 1..T."""
    return at(s["alpha"], t) * x + at(s["beta"], t) * eps  # 9119 (3)


def diffuse(x0: Tensor, t: Tensor, eps: Tensor, s: Schedule) -> Tensor:
    """9119 (6): x_t (B, C, H, W) from x_0 at once; eps of its shape, t (B,) in 0..T."""
    return at(s["bar_alpha"], t) * x0 + at(s["bar_beta"], t) * eps  # 9119 (6)


def tear_down(x0: Tensor, noise: Tensor, s: Schedule) -> Tensor:
    """9119 (2): all of x_0, ..., x_T, (T+1, C, H, W), from x0 (C, H, W) and noise (T, C, H, W)."""
    x = [x0[None]]
    for t, eps in enumerate(noise, start=1):  # 9119 (2)
        x.append(diffuse_once(x[-1], torch.tensor([t], device=x0.device), eps, s))
    return torch.cat(x)


def loss(net: nn.Module, x0: Tensor, t: Tensor, eps: Tensor, s: Schedule) -> Tensor:
    """9119 (15), (B,): x0 in [-1, 1], eps (B, C, H, W), t (B,) in 1..T; 1 for a net that says 0."""
    error = eps - net(diffuse(x0, t, eps, s), t)  # 9119 (15); net is bar_beta/beta times the post's
    return error.square().mean((1, 2, 3))  # departs: mean over pixels as in the paper; author: sum


def clip_eps(e: Tensor, xt: Tensor, t: Tensor, s: Schedule) -> Tensor:
    """The eps that stands for x_0 clipped to [-1, 1]; e, xt (B, C, H, W); as Ho et al.'s code."""
    x0 = (xt - at(s["bar_beta"], t) * e) / at(s["bar_alpha"], t)  # 9119 (6), solved for x_0
    return (xt - at(s["bar_alpha"], t) * x0.clamp(-1, 1)) / at(s["bar_beta"], t)


def step_back(xt: Tensor, t: Tensor, e: Tensor, sigma: Tensor, z: Tensor, s: Schedule) -> Tensor:
    """9119 (17): x_{t-1} (B, C, H, W) from x_t, e = net(x_t, t) and noise z; t (B,) in 1..T.

    sigma (T+1,) is a row of `sigmas`; zeros make it the greedy (16).
    """
    eps_theta = at(s["beta"], t) / at(s["bar_beta"], t) * e  # the post's, see Symbols
    mu = (xt - at(s["beta"], t) * eps_theta) / at(s["alpha"], t)  # 9119 (8), (16)
    return mu + at(sigma, t) * z  # 9119 (17)


def sigmas(s: Schedule, kind: str) -> Tensor:
    """sigma_t of 9119 (17), (T+1,): beta, posterior (bar_beta_{t-1} beta_t / bar_beta_t) or zero.

    departs: sigma_1 = 0, no noise on the finished picture, as in Ho et al.; the author adds it.
    """
    sigma = {"beta": s["beta"], "zero": torch.zeros_like(s["beta"]),
             "posterior": s["bar_beta"].roll(1) * s["beta"] / s["bar_beta"]}[kind].clone()
    sigma[:2] = 0
    return sigma


def jump_back(xt: Tensor, t: Tensor, r: Tensor, e: Tensor, eta: float, z: Tensor,
              s: Schedule) -> Tensor:
    """x_r from x_t for any r < t, both (B,): DDIM (Song et al. 2020, (12)); shapes as in step_back.

    eta 1 with r = t - 1 is (17) with the posterior's sigma; eta 0 uses no z.
    """
    a, b, a_t, b_t = (at(s[name], k) for k in (r, t) for name in ("bar_alpha", "bar_beta"))
    sigma = eta * b / b_t * (1 - (a_t / a).square()).clamp(min=0).sqrt()
    return (a * (xt - b_t * e) / a_t + (b.square() - sigma.square()).clamp(min=0).sqrt() * e
            + sigma * z)


@torch.no_grad()
def sample(net: nn.Module, xT: Tensor, s: Schedule, g: torch.Generator, sigma: str = "beta",
           clip: bool = True, steps: int | None = None, eta: float = 1.0) -> Iterator[Tensor]:
    """9119 (1): yields x_T, ..., x_0, (B, C, H, W), from xT ~ N(0, I); g draws the steps' noise.

    All T steps of (17), or with `steps` as many of DDIM's, with eta for sigma; clip keeps the x_0
    foreseen in [-1, 1]. Raises ValueError unless 1 <= steps <= T.
    """
    T = len(s["alpha"]) - 1
    if steps is not None and not 1 <= steps <= T:
        raise ValueError(f"{steps} sampling steps: 1 to T = {T} are possible")
    rows = torch.linspace(T, 0, (steps or T) + 1, device=xT.device).round().long()
    rows, row, x = rows[:, None].expand(-1, len(xT)), sigmas(s, sigma), xT
    yield x
    for t, r in zip(rows[:-1], rows[1:]):
        e = net(x, t)
        e = clip_eps(e, x, t, s) if clip else e
        z = torch.randn(x.shape, generator=g, device=x.device)
        x = jump_back(x, t, r, e, eta, z, s) if steps else step_back(x, t, e, row, z, s)
        yield x


@torch.no_grad()
def bits_per_dim(net: nn.Module, x0: Tensor, s: Schedule, g: torch.Generator, sigma: str = "beta",
                 clip: bool = True) -> Tensor:
    """The bound of Ho et al. 2020 (5) in bits per dimension, (B,) float64; x0 = uint8 / 127.5 - 1.

    All T terms, one draw each: KL(q(x_{t-1} | x_t, x_0) || p) for t >= 2, p's mean that of (17);
    the prior's KL(q(x_T | x_0) || N(0, I)); at t = 1 a Gaussian integrated over each of 256 bins.
    Raises ValueError for sigma "zero", which has no density.
    """
    if sigma == "zero":
        raise ValueError("sigma zero has no density")
    T, s64 = len(s["alpha"]) - 1, {name: row.double() for name, row in s.items()}
    post = sigmas(s64, "posterior")
    row = sigmas(s64, sigma)
    row[1] = post[1] = post[2]  # departs: no bin can be integrated with sigma_1 = 0; as Ho et al.
    mean2, var = s64["bar_alpha"][T].square() * x0.double().square(), s64["bar_beta"][T].square()
    nats = 0.5 * (mean2 + var - 1 - var.log()).sum((1, 2, 3))  # the prior's
    for k in range(T, 0, -1):
        t = torch.full((len(x0),), k, device=x0.device)
        eps = torch.randn(x0.shape, generator=g, device=x0.device)
        xt = diffuse(x0, t, eps, s)
        e = net(xt, t)
        e = clip_eps(e, xt, t, s) if clip else e
        mu = step_back(xt.double(), t, e.double(), row, torch.zeros_like(eps), s64)
        if k == 1:
            nats -= log_bin(x0.double(), mu, row[1]).sum((1, 2, 3))
        else:
            want = step_back(xt.double(), t, eps.double(), row, torch.zeros_like(eps), s64)
            ratio = (post[k] / row[k]).square()
            kl = 0.5 * (ratio - 1 - ratio.log() + ((want - mu) / row[k]).square())
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


# ---- model ----

class Block(nn.Module):
    """Residual block: GroupNorm, swish, conv twice, the time added in between. (B, C, H, W)"""

    def __init__(self, inputs: int, outputs: int, time: int, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups(inputs), inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.norm2 = nn.GroupNorm(groups(outputs), outputs, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


class Grow(nn.Conv2d):
    """Twice the size by nearest neighbours, then this 3x3 convolution: (B, C, 2H, 2W).

    Doubling is a transposed convolution with ones, so both are one with a 4x4 kernel, at 4/9 of
    the multiplications.
    """

    def forward(self, x: Tensor) -> Tensor:
        kernel = 4 * F.avg_pool2d(F.pad(self.weight.flip(2, 3), (1, 1, 1, 1)), 2, stride=1)
        return F.conv_transpose2d(x, kernel.transpose(0, 1), self.bias, stride=2, padding=1)


class Attention(nn.Module):
    """Residual self-attention of all pixels, one head. (B, C, H, W)"""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups(channels), channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT[:, None].chunk(3, dim=-1)  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h[:, 0].mT.reshape(x.shape))


def groups(channels: int) -> int:
    """32 as in the paper, if each then has at least 4 channels."""
    return math.gcd(32, channels, channels // 4)  # departs: single channels lose their own mean


class UNet(nn.Module):
    """The paper's eps_theta: (B, C, H, W), t (B,) in 1..T -> (B, C, H, W); Ho et al. 2020, app. B.

    width * mults[i] channels at level i, each level half the size of the last (odd sizes round up;
    the way up cuts to the skip's size). attention: levels whose blocks attend, 0 the full size.
    """

    def __init__(self, channels: int = 3, width: int = 128, mults: tuple[int, ...] = (1, 2, 2, 2),
                 blocks: int = 2, attention: tuple[int, ...] = (1,), dropout: float = 0.1):
        super().__init__()
        self.width, time = width, 4 * width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(),
                                  nn.Linear(time, time), nn.SiLU())
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()  # one list of layers per skip
        skips, last = [width], width
        for level, c in enumerate(width * m for m in mults):
            for _ in range(blocks):
                self.down.append(nn.ModuleList([Block(last, c, time, dropout)]))
                if level in attention:
                    self.down[-1].append(Attention(c))
                skips.append(last := c)
            if level < len(mults) - 1:
                self.down.append(nn.ModuleList([nn.Conv2d(c, c, 3, stride=2, padding=1)]))
                skips.append(c)
        self.middle = nn.ModuleList([Block(last, last, time, dropout), Attention(last),
                                     Block(last, last, time, dropout)])
        for level, c in reversed(list(enumerate(width * m for m in mults))):
            for k in range(blocks + 1):
                grow = k == 0 and level < len(mults) - 1
                self.up.append(nn.ModuleList([Grow(last, last, 3)] if grow else []))
                self.up[-1].append(Block(last + skips.pop(), c, time, dropout))
                if level in attention:
                    self.up[-1].append(Attention(c))
                last = c
        self.norm = nn.GroupNorm(groups(last), last, eps=1e-6)
        self.last = nn.Conv2d(last, channels, 3, padding=1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():  # every residual branch, and the output, begin at zero
            if isinstance(module, (Block, Attention, UNet)):
                end = {Block: "conv2", Attention: "out", UNet: "last"}[type(module)]
                nn.init.zeros_(getattr(module, end).weight)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(time_code(t, self.width).to(x.dtype))  # (B, 4 width)
        h = self.first(x.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for layers in self.down:
            for layer in layers:
                h = layer(h, time) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, time) if isinstance(layer, Block) else layer(h)
        for layers in self.up:
            skip = skips.pop()
            for layer in layers:
                if isinstance(layer, Block):
                    h = h[..., :skip.shape[2], :skip.shape[3]]
                    h = layer(torch.cat([h, skip], 1), time)
                else:
                    h = layer(h)
        return self.last(F.silu(self.norm(h))).to(x.dtype)


def time_code(t: Tensor, width: int) -> Tensor:
    """Sinusoids of t (B,) -> (B, width) float32: wave lengths from 2 pi to 2 pi 10^4."""
    speed = torch.logspace(0, -4, (width + 1) // 2, device=t.device)
    angle = t[:, None] * speed
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :width]


# ---- evaluation ----

def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> 0..255 uint8, the inverse of to_float; what lies outside is clipped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(x: Tensor) -> Tensor:
    """0..255 uint8 -> [-1, 1] float32."""
    return x.float() / 127.5 - 1


@torch.no_grad()
def held_out_loss(net: nn.Module, x: Tensor, s: Schedule, seed: int, batch: int) -> list[float]:
    """(15) on uint8 pictures x in ten bins of t: t spread evenly over 1..T, noise from `seed`."""
    T, x = len(s["alpha"]) - 1, x.repeat(-(-10 // len(x)), 1, 1, 1)  # no bin may stay empty
    n = len(x)
    g = generator(x.device, seed, 0, 1)
    t = torch.arange(n, device=x.device) * T // n + 1
    eps = torch.randn(x.shape, generator=g, device=x.device)
    x = x[torch.randperm(n, generator=g, device=x.device)]  # no order of theirs may meet that of t
    parts = zip(x.split(batch), t.split(batch), eps.split(batch))
    losses = torch.cat([loss(net, to_float(x0), k, e, s) for x0, k, e in parts])
    return [part.mean().item() for part in losses.tensor_split(10)]


def nearest(x: Tensor, train: Tensor) -> Tensor:
    """The picture of `train` (N, C, H, W) nearest to each of x, Euclidean distance; both uint8."""
    flat = x.flatten(1).float()
    return train[torch.cat([torch.cdist(flat, part.flatten(1).float())
                            for part in train.split(4096)], 1).argmin(1)]


def draw(net: nn.Module, shape: torch.Size, s: Schedule, count: int, args: argparse.Namespace,
         steps: int | None) -> tuple[Tensor, Tensor]:
    """`count` pictures, uint8, always from the same noise; and the first one's way, x_T to x_0."""
    device, pictures, way = s["alpha"].device, [], []
    for first in range(0, count, args.batch_size):
        g = generator(device, args.seed, first, 2)
        xT = torch.randn((min(args.batch_size, count - first), *shape), generator=g, device=device)
        for x in sample(net, xT, s, g, args.sigma, not args.no_clip, steps, args.eta):
            if not first:
                way.append(x[0])
        pictures.append(to_uint8(x))
    return torch.cat(pictures), to_uint8(torch.stack(way)).cpu()


def report(net: UNet, ema: UNet, x: Tensor, x_test: Tensor, s: Schedule, out: Path,
           args: argparse.Namespace) -> dict:
    """Writes samples.png, building.png and nearest.png; returns the numbers for metrics.json."""
    begin = time.perf_counter()
    pictures, way = draw(ema, x.shape[1:], s, args.samples, args, args.sample_steps)
    seconds = time.perf_counter() - begin
    noise = torch.randn((args.T, *x.shape[1:]), generator=generator(x.device, args.seed, 0, 3),
                        device=x.device)
    down = to_uint8(tear_down(to_float(x_test[0]), noise, s)).cpu()
    early = torch.linspace(0, 1, 12).square()  # where most of what can be seen happens
    rows = [down[(early * args.T).long()], way.flip(0)[(early * (len(way) - 1)).long()].flip(0)]
    write_png(out / "samples.png", grid(pictures, math.isqrt(args.samples)))
    write_png(out / "building.png", grid(torch.cat(rows), 12))  # down above, up below
    few = pictures[:12]
    write_png(out / "nearest.png", grid(torch.cat([few, nearest(few, x)]), len(few)))
    metrics = {"sample_seconds": seconds}
    for name, network in (("raw", net), ("ema", ema)):
        bins = held_out_loss(network, x_test[:args.test_images], s, args.seed, args.batch_size)
        metrics |= {f"held_out_loss_{name}": sum(bins) / 10, f"held_out_loss_{name}_by_t": bins}
    if args.eval_images:
        x0 = to_float(x_test[:args.eval_images])
        g = generator(x.device, args.seed, 0, 4)
        sigma = "beta" if args.sigma == "zero" else args.sigma  # zero has no density
        bits = torch.cat([bits_per_dim(ema, part, s, g, sigma, not args.no_clip)
                          for part in x0.split(args.batch_size)])
        metrics |= {"bits_per_dim": bits.mean().item(), "bits_images": len(bits),
                    "bits_standard_error": (bits.std() / len(bits) ** 0.5).item(),
                    "bits_schedule": args.schedule, "bits_sigma": sigma}
    return metrics


# ---- training ----

CONFIG = ("data size T schedule width mults blocks attention dropout flip lr warmup decay "
          "clip_grad ema batch_size seed steps shape").split()  # --resume takes these from ckpt.pt


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, step: int, decay: float) -> None:
    """ema <- d ema + (1 - d) net, d = decay after a warm-up, so that early samples are readable."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - d)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up; then constant as in the paper, or with --decay a cosine to zero."""
    fall = (1 + math.cos(math.pi * step / args.steps)) / 2 if args.decay else 1
    return args.lr * min(1, (step + 1) / args.warmup) * fall


def settle_run(args: argparse.Namespace) -> dict | None:
    """`resume_run`, and what can be checked only when the checkpoint's flags are known."""
    state = resume_run(args, CONFIG, "ddpm")
    if args.sample_steps and args.sample_steps > args.T:
        raise UserError(f"--sample-steps {args.sample_steps}: there are only {args.T}")
    return state


def train(args: argparse.Namespace) -> int:
    """The whole run: data, loop, checkpoints, pictures, metrics.json. Returns the exit code."""
    world = setup(args.gpu, args.fp32, args.batch_size)
    device, out = world.device, Path(args.out)
    state = settle_run(args)
    with main_first(world):
        x, x_test, _, _ = load_images(args.data, args.size, args.cache, device)
    if "size" in args.given and x.shape[-1] != args.size:
        raise UserError(f"--size {args.size}: these pictures have {x.shape[-1]} px, and only faces "
                        "and folders of pictures come in any size")
    if state and x.shape[1:] != args.shape:
        raise UserError(f"--data {args.data}: {tuple(x.shape[1:])} a picture, but the checkpoint "
                        f"was made on {tuple(args.shape)}")
    args.shape = tuple(x.shape[1:])
    if not state:
        make_room(out, world)
    s = {name: row.to(device) for name, row in make_schedule(args.T, args.schedule).items()}
    torch.manual_seed(args.seed)
    net = UNet(x.shape[1], args.width, args.mults, args.blocks, args.attention, args.dropout)
    net = net.to(device)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    opt = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)
    step = 0
    if state:
        for part, name in ((net, "model"), (ema, "ema"), (opt, "opt")):
            part.load_state_dict(state[name])
        step = state["step"]
    params = list(net.parameters())
    wrapped = torch.compile(net) if args.compile else net
    if world.size > 1:
        wrapped = nn.parallel.DistributedDataParallel(wrapped)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.gpu and not args.fp32)
    progress = Progress(out, step, args.steps, "img", world)
    progress.headline(args, sum(p.numel() for p in params))
    total, value, since = torch.zeros((), device=device), torch.zeros(()), step

    def save() -> None:
        progress.check(value, *params)
        if world.rank == 0:
            save_checkpoint(out / "ckpt.pt", dict(
                script="ddpm", step=step, config={name: getattr(args, name) for name in CONFIG},
                model=net.state_dict(), ema=ema.state_dict(), opt=opt.state_dict()))

    with stop_signals(world) as stopped:
        while step < args.steps and not stopped():
            g = generator(device, args.seed, step)
            t = torch.randint(1, args.T + 1, (args.batch_size,), generator=g, device=device)
            eps = torch.randn((args.batch_size, *x.shape[1:]), generator=g, device=device)
            flip = torch.rand(args.batch_size, 1, 1, 1, generator=g, device=device) < args.flip / 2
            rows = batch_rows(len(x), step, args.batch_size, args.seed, device)
            t, eps, flip, rows = (world.mine(v) for v in (t, eps, flip, rows))
            x0 = to_float(x[rows])
            x0 = torch.where(flip, x0.flip(3), x0)
            torch.manual_seed(generator("cpu", args.seed, step, world.rank, 5).initial_seed())
            opt.param_groups[0]["lr"] = learning_rate(step, args)
            with autocast:
                value = loss(wrapped, x0, t, eps, s).mean()
            value.backward()
            nn.utils.clip_grad_norm_(params, args.clip_grad)
            opt.step()
            opt.zero_grad()
            update_ema(ema, net, step, args.ema)
            total += value.detach()
            step += 1
            if progress.due(step):
                progress.show(step, step * args.batch_size, loss=total.item() / (step - since),
                              lr=learning_rate(step - 1, args))
                total, since = torch.zeros_like(total), step
            if step % args.save_every == 0 and step < args.steps:
                save()
                if world.rank == 0:
                    few = min(args.sample_steps or args.T, 50)
                    with autocast:
                        pictures, _ = draw(ema, args.shape, s, args.samples, args, few)
                    write_png(out / f"samples_{step:06}.png",
                              grid(pictures, math.isqrt(args.samples)))
        save()
    seconds = time.perf_counter() - progress.begin
    if step < args.steps:
        progress.note(f"stopped and saved at step {step}; go on with --resume")
        return 130
    if world.rank == 0:
        net.eval()
        progress.note(f"drawing {args.samples} pictures in {args.sample_steps or args.T} steps")
        with autocast:
            metrics = report(net, ema, x, x_test, s, out, args)
        metrics |= dict(step=step, images_seen=step * args.batch_size, seed=args.seed,
                        train_seconds=seconds,
                        images_per_second=(step - progress.start) * args.batch_size / seconds)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        progress.note(f"held-out loss {metrics['held_out_loss_ema']:.4f} (EMA), "
                      f"{metrics['held_out_loss_raw']:.4f} (raw); pictures and metrics in {out}/")
    return 0


def sample_only(args: argparse.Namespace) -> int:
    """Draws --sample-only pictures from the EMA weights in ckpt.pt, whatever device made it."""
    world = setup(args.gpu, args.fp32, 1)
    args.resume = True
    state = settle_run(args)
    s = {name: row.to(world.device) for name, row in make_schedule(args.T, args.schedule).items()}
    net = UNet(args.shape[0], args.width, args.mults, args.blocks, args.attention).to(world.device)
    net.load_state_dict(state["ema"])
    print(f"drawing {args.sample_only} pictures in {args.sample_steps or args.T} steps", flush=True)
    with torch.autocast(world.device.type, torch.bfloat16, enabled=args.gpu and not args.fp32):
        pictures, _ = draw(net.eval(), args.shape, s, args.sample_only, args, args.sample_steps)
    path = Path(args.out) / "samples_only.png"
    write_png(path, grid(pictures, math.ceil(args.sample_only ** 0.5)))
    print(path)
    return 0


# ---- command line ----

def whole_numbers(text: str) -> tuple[int, ...]:
    """Reads 1,2,2 as (1, 2, 2)."""
    return tuple(at_least(0)(part) for part in text.split(",") if part)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    # flag         CPU          --gpu            --paper: Ho et al. 2020, CIFAR-10, appendix B
    presets = dict(
        size=         (32,        64,              32),
        steps=        (750,       12_000,          800_000),
        batch_size=   (16,        128,             128),
        save_every=   (375,       2000,            10_000),
        T=            (250,       1000,            1000),
        schedule=     ("post",    "post",          "paper"),
        width=        (16,        64,              128),
        mults=        ((1, 2, 4), (1, 2, 4, 4),    (1, 2, 2, 2)),
        blocks=       (1,         2,               2),
        attention=    ((2,),      (2, 3),          (1,)),
        dropout=      (0.0,       0.0,             0.1),
        flip=         (False,     False,           True),
        lr=           (2e-3,      5e-4,            2e-4),
        warmup=       (50,        500,             5000),
        decay=        (True,      True,            False),
        clip_grad=    (1.0,       1.0,             1.0),
        ema=          (0.995,     0.999,           0.9999),
        samples=      (16,        64,              64),
        test_images=  (500,       2000,            10_000),
        eval_images=  (4,         16,              64),
        data=         ("faces",   "faces",         "cifar10"),
        seed=         (0,         0,               0),
    )
    p = common_flags(__doc__.partition("\n")[0], "ddpm", presets,
                     "faces (drawn), mnist, fashion-mnist, cifar10, or a path: a folder of idx "
                     "files or of pictures, CIFAR-10's binary .tar.gz, or an .npy file")
    flag = functools.partial(add_flag, p, presets)
    p.add_argument("--paper", action="store_true", help="Ho et al.'s set-up for CIFAR-10, whole")
    flag("--size", at_least(8), "pixels of faces and of folders of pictures; others keep their own")
    flag("--T", at_least(21), "diffusion steps, 9119 (2)")
    flag("--schedule", ("post", "paper"), "alpha_t: post is 9119 (18), paper is linear in its beta")
    flag("--width", at_least(4), "channels of the first level")
    flag("--mults", whole_numbers, "each level's channels in widths, such as 1,2,2,2")
    flag("--blocks", at_least(1), "residual blocks per level")
    flag("--attention", whole_numbers, "levels that attend, 0 the full size, such as 1 or 2,3")
    flag("--dropout", at_least(0.0, 1.0), "inside the residual blocks")
    flag("--flip", bool, "mirror half of the pictures")
    flag("--lr", at_least(0.0), "Adam's learning rate")
    flag("--warmup", at_least(1), "steps of linear warm-up")
    flag("--decay", bool, "let the learning rate fall to zero along a cosine")
    flag("--clip-grad", at_least(0.0), "largest norm of the gradient")
    flag("--ema", at_least(0.0, 1.0), "decay of the moving average of weights, which draws samples")
    flag("--save-every", at_least(1), "steps between checkpoints, each with a grid of samples")
    flag("--samples", at_least(1), "pictures in a grid")
    flag("--test-images", at_least(1), "held-out pictures for the loss (15), overall and by t")
    flag("--eval-images", at_least(0), "held-out pictures for the bound in bits per dimension")
    p.add_argument("--sigma", choices=["beta", "posterior", "zero"],
                   help="sigma_t of 9119 (17); zero is the greedy (16) (default: beta)")
    p.add_argument("--no-clip", action="store_true", help="do not clip the x_0 foreseen to [-1, 1]")
    p.add_argument("--sample-steps", type=at_least(1), metavar="N",
                   help="sample in N steps of DDIM (default: all T steps of 9119 (17))")
    p.add_argument("--eta", type=at_least(0.0), metavar="N",
                   help="noise of --sample-steps: 1 as in (17), 0 none (default: 1)")
    p.add_argument("--sample-only", type=at_least(1), metavar="N",
                   help="only draw N pictures from OUT/ckpt.pt")
    args = p.parse_args(argv)
    settle(args, presets, 2 if args.paper else 1 if args.gpu else 0)
    if not args.mults or 0 in args.mults:
        p.error("--mults: one whole number from 1 for each level")
    if max(args.attention, default=0) >= len(args.mults):
        p.error(f"--attention: levels are 0 to {len(args.mults) - 1}, one for each of --mults")
    if args.sample_steps and args.sigma or args.eta is not None and not args.sample_steps:
        p.error("--eta goes with --sample-steps, --sigma without")
    if args.eval_images == 1:
        p.error("--eval-images: 0, or at least 2 for a standard error")
    args.sigma, args.eta = args.sigma or "beta", 1.0 if args.eta is None else args.eta
    return args


# ---- plumbing: the same text in every script that needs it ----

# === shared: setup ===
class UserError(Exception):
    """Wrong input: one line that says what to do; exit code 2."""


@dataclass(frozen=True)
class World:
    """Where this process runs: its device, its rank, and how many there are."""

    device: torch.device
    rank: int
    size: int

    def mine(self, rows: Tensor) -> Tensor:
        """This rank's slice of a tensor for the whole global batch; the ranks must divide it."""
        return rows.chunk(self.size)[self.rank]


def setup(gpu: bool, fp32: bool, batch_size: int) -> World:
    """Device and process group from --gpu and torchrun's environment. Raises UserError."""
    rank, size, local = (int(os.environ.get(key, default)) for key, default in
                         (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if batch_size % size:
        raise UserError(f"--batch-size {batch_size}: {size} processes cannot share it evenly")
    if gpu and local >= torch.cuda.device_count():
        raise UserError(f"--gpu: CUDA device {local} not found; leave --gpu out to run on the CPU")
    if gpu:
        torch.cuda.set_device(local)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = not fp32
        torch.set_float32_matmul_precision("highest" if fp32 else "high")
    if size > 1:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    return World(torch.device("cuda", local) if gpu else torch.device("cpu"), rank, size)


def generator(device: torch.device | str, *key: int) -> torch.Generator:
    """Random numbers that depend on `key` alone, say (seed, step), not on what was drawn before."""
    mixed = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(mixed[0]))


@contextmanager
def stop_signals(world: World) -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C and SIGTERM set a flag; calling the function reads it, alike on all ranks."""
    flag = torch.zeros(1, dtype=torch.int32)
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda *_: flag.fill_(1)) for kind in kinds]

    def stopped() -> bool:
        if world.size > 1:
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    try:
        yield stopped
    finally:
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """Rank 0 does the body before the others do, so that only one downloads."""
    if world.rank:
        torch.distributed.barrier()
    yield
    if world.size > 1 and not world.rank:
        torch.distributed.barrier()


def run(body: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """The exit code of body(args), each with a line: 2 wrong input, 1 failure, 130 interrupted."""
    try:
        return body(args)
    except KeyboardInterrupt:
        code, line = 130, "interrupted"
    except (UserError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError,
            PermissionError) as error:
        code, line = 2, error
    except (OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        code, line = 1, str(error).partition("\n")[0]
    finally:
        if torch.distributed.is_initialized():
            gc.collect()  # the cycles of DDP keep the group alive: its threads would abort exit
            torch.distributed.destroy_process_group()
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    return code
# === end shared ===


# === shared: order ===
@functools.lru_cache(maxsize=2)
def epoch_order(total: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    """The permutation of (seed, epoch), int64 (total,)."""
    return torch.randperm(total, generator=generator("cpu", seed, epoch, 9)).to(device)


def batch_rows(total: int, step: int, batch: int, seed: int, device: torch.device) -> Tensor:
    """Rows of step `step` = 0, 1, ...: the permutations of (seed, epoch) one after another, cut."""
    first, last = step * batch, (step + 1) * batch
    return torch.cat([epoch_order(total, seed, epoch, device)[max(0, first - epoch * total):
                                                              last - epoch * total]
                      for epoch in range(first // total, (last - 1) // total + 1)])
# === end shared ===


# === shared: download ===
def download(name: str, urls: list[str], digest: str, cache: str) -> Path:
    """The file `name` in `cache`, fetched once from the first of `urls` that answers.

    digest: its SHA-256, or the beginning of it. Torch gives the file its name only when that
    agrees: half a download never passes for a whole one. Raises UserError, saying which file to
    put where; OSError for a full disk.
    """
    path = Path(cache).expanduser() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    for url in urls:
        if path.exists():
            break
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            print(f"{url}: {error}", file=sys.stderr)
    if not path.exists():
        raise UserError(f"cannot download {name}: put the file from {urls[0]} at {path}")
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
        raise UserError(f"{path}: damaged, its SHA-256 does not begin with {digest}; delete it")
    return path
# === end shared ===


# === shared: flags ===
def at_least(low: float, below: float = math.inf) -> Callable[[str], float]:
    """Reads a number from `low` up to, not with, `below`; a whole one if `low` is."""
    def read(text: str) -> float:
        number = type(low)(text)
        if not low <= number < below:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to below {below}")
        return number
    read.__name__ = "number"  # argparse says "invalid number value"
    return read


def add_flag(p: argparse.ArgumentParser, presets: dict[str, tuple], flag: str, kind,
             text: str) -> None:
    """Adds a flag whose default stands in `presets`: CPU, --gpu, --paper; the help shows them."""
    cpu, *rest = [",".join(map(str, value)) if isinstance(value, tuple) else
                  ("off", "on")[value] if isinstance(value, bool) else str(value)
                  for value in presets[flag[2:].replace("-", "_")]]
    said = [cpu] + [f"{name} {v}" for name, v in zip(("--gpu", "--paper"), rest) if v != cpu]
    how = dict(action=argparse.BooleanOptionalAction) if kind is bool else \
        dict(choices=kind) if isinstance(kind, tuple) else \
        dict(type=kind, metavar="NAME_OR_PATH" if kind is str else "N")
    p.add_argument(flag, help=f"{text} (default: {'; '.join(said)})", **how)


def common_flags(title: str, script: str, presets: dict[str, tuple],
                 data: str) -> argparse.ArgumentParser:
    """A parser with the flags that all scripts share, alike in name, meaning and help."""
    p = argparse.ArgumentParser(description=title, allow_abbrev=False)
    p.add_argument("--gpu", action="store_true",
                   help="use CUDA, or stop if there is none; also larger defaults, shown as --gpu")
    add_flag(p, presets, "--data", str, data)
    add_flag(p, presets, "--steps", at_least(1), "steps in all, resumed ones included")
    add_flag(p, presets, "--batch-size", at_least(1), "global, over all processes")
    add_flag(p, presets, "--seed", at_least(0), "of weights, noise and order")
    p.add_argument("--out", default=f"out/{script}", metavar="DIR",
                   help="where everything is written; an older run there is moved aside "
                        "(default: %(default)s)")
    p.add_argument("--resume", action="store_true",
                   help="go on from OUT/ckpt.pt, with the flags of that run")
    p.add_argument("--cache", default="~/.cache/kexue", metavar="DIR",
                   help="where downloads are kept (default: %(default)s)")
    p.add_argument("--fp32", action="store_true", help="with --gpu: neither bfloat16 nor TF32")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    return p


def settle(args: argparse.Namespace, presets: dict[str, tuple], column: int) -> None:
    """Gives flags left out their preset of that column; args.given names those given by hand."""
    args.given = {name for name in presets if getattr(args, name) is not None}
    for name in presets.keys() - args.given:
        setattr(args, name, presets[name][column])
# === end shared ===


# === shared: checkpoint ===
def save_checkpoint(path: Path, state: dict) -> None:
    """Writes the whole file beside `path`, then renames it: an interrupted save harms nothing."""
    buffer, part = io.BytesIO(), path.with_suffix(".tmp")
    torch.save(state, buffer)
    try:
        part.write_bytes(buffer.getbuffer())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def resume_run(args: argparse.Namespace, names: list[str], script: str) -> dict | None:
    """With --resume the checkpoint in --out, on the CPU, else None; the `names` of its config
    replace those of args.

    Raises UserError for any file but one of `script`'s, whole, and if a flag given by hand
    contradicts it; only --steps may change.
    """
    if not args.resume:
        return None
    path = Path(args.out) / "ckpt.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["script"] != script:
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception:  # torch raises a dozen kinds
        raise UserError(f"{path}: not a checkpoint of {script}.py, or damaged") from None
    for name in names:
        old, new = state["config"][name], getattr(args, name, None)
        if name not in args.given:
            setattr(args, name, old)
        elif new != old and name != "steps":
            raise UserError(f"--{name.replace('_', '-')} {new}: the checkpoint has {old}; leave "
                            "the flag out, or begin anew without --resume")
    return state


def make_room(out: Path, world: World) -> None:
    """A fresh folder `out`; an older run there moves to OUT.1, ...; UserError if it is no run."""
    if world.rank == 0:
        if out.is_dir() and any(out.iterdir()):
            if not (out / "log.csv").exists():
                raise UserError(f"--out {out}: holds other things; name a new or empty folder")
            aside = next(p for k in itertools.count(1) if not (p := Path(f"{out}.{k}")).exists())
            out.rename(aside)
            print(f"the older run in {out} is now in {aside}")
        out.mkdir(parents=True, exist_ok=True)
# === end shared ===


# === shared: progress ===
class Progress:
    """A line every few seconds, rewritten in place on a terminal, and a row in OUT/log.csv."""

    def __init__(self, out: Path, step: int, steps: int, unit: str, world: World):
        self.start, self.steps, self.unit, self.world = step, steps, unit, world
        self.out, self.begin, self.live = out, time.perf_counter(), sys.stdout.isatty()
        self.last = self.begin, step  # of the last line

    def note(self, text: str) -> None:
        """Prints a line of its own, on rank 0."""
        if self.world.rank == 0:
            print(("\r\033[K" if self.live else "") + text, flush=True)

    def headline(self, args: argparse.Namespace, parameters: int) -> None:
        """What runs, where and how: the log's first lines."""
        gpu = self.world.device.type == "cuda"
        where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
        how = "bfloat16 and TF32" if gpu and not args.fp32 else "float32"
        self.note(f"{' '.join(sys.argv)}\n{where} x {self.world.size}, torch {torch.__version__}, "
                  f"{how}, compile {'on' if args.compile else 'off'}, {parameters:,} parameters")

    def due(self, step: int) -> bool:
        """Whether a line is due: at first, at last, and every 0.5 s (in a log: 10 s) between."""
        wait = 0.5 if self.live else 10
        return step in (self.start + 1, self.steps) or time.perf_counter() - self.last[0] > wait

    def show(self, step: int, items: int, **values: float) -> None:
        """Prints and logs a line; `items` seen in all give the rate. Raises as `check` does."""
        self.check(*values.values())
        now, (before, since) = time.perf_counter(), self.last
        self.last = now, step
        if self.world.rank:
            return
        rate, elapsed = items / step * (step - since) / (now - before), int(now - self.begin)
        eta = int((self.steps - step) * elapsed / (step - self.start))
        said = "  ".join(f"{k} {v:.1e}" if k == "lr" else f"{k} {v:.4f}" for k, v in values.items())
        line = (f"step {step:0{len(str(self.steps))}}/{self.steps}  {said}  {rate:.0f} {self.unit}"
                f"/s  elapsed {timedelta(seconds=elapsed)}  eta {timedelta(seconds=eta)}")
        bar = f"\r\033[K[{'#' * (20 * step // self.steps):20}] " if self.live else ""
        print(bar + line, end="\n" if step == self.steps or not self.live else "", flush=True)
        row = dict(step=step, items=items, rate=rate, elapsed=now - self.begin, **values)
        with open(self.out / "log.csv", "a", newline="\r\n") as file:
            if not file.tell():
                print(*row, sep=",", file=file)
            print(*row.values(), sep=",", file=file)

    def check(self, *values: Tensor | float) -> None:
        """Raises FloatingPointError unless all are finite; asked before a checkpoint is saved."""
        if not all(torch.as_tensor(v).isfinite().all() for v in values):
            raise FloatingPointError("the loss or a weight is no longer finite; "
                                     f"{self.out}/ckpt.pt, if there, is from before")
# === end shared ===


# === shared: png ===
def grid(images: Tensor, columns: int) -> Tensor:
    """uint8 (N, C, H, W) -> (C, H', W'): rows of `columns`, white lines between, small enlarged."""
    scale = max(1, 96 // max(images.shape[2:]))
    sheet = F.pad(images, (0, 1, 0, 1, 0, 0, 0, -len(images) % columns), value=255)
    sheet = sheet.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)  # (C, rows, H, columns, W)
    sheet = sheet.flatten(3).flatten(1, 2)[:, :-1, :-1]
    return sheet.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def write_png(path: Path, image: Tensor) -> None:
    """Writes uint8 (C, H, W), C = 1 grey or 3 RGB. Raises ValueError for another C."""
    c, h, w = image.shape
    if c not in (1, 3):
        raise ValueError(f"{c} channels: a PNG here has 1 or 3")

    def chunk(kind: bytes, body: bytes) -> bytes:
        part = kind + body
        return struct.pack(">I", len(body)) + part + struct.pack(">I", zlib.crc32(part))

    lines = F.pad(image.cpu().permute(1, 2, 0).reshape(h, c * w), (1, 0))  # each begins: filter 0
    head = struct.pack(">2I5B", w, h, 8, 2 if c == 3 else 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
                     + chunk(b"IDAT", zlib.compress(lines.numpy().tobytes())) + chunk(b"IEND", b""))
# === end shared ===


# === shared: images ===
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte",
       "t10k-labels-idx1-ubyte")
NAMED = {  # where to get it, and how the SHA-256 of its four files begins
    "mnist": (["https://ossci-datasets.s3.amazonaws.com/mnist/",
               "https://storage.googleapis.com/cvdf-datasets/mnist/"],
              ["440fcabf73cc546fa21475e81ea37026", "3552534a0a558bbed6aed32b30c495cc",
               "8d422c7b0a1c1c79245a5bcf07fe86e3", "f7ae60f92e00ec6debd23a6088c31dbd"]),
    "fashion-mnist": (["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"],
                      ["3aede38d61863908ad78613f6a32ed27", "a04f17134ac03560a47e3764e11b92fc",
                       "346e55b948d973a97e58d2351dde16a4", "67da17c76eaffca5446c3361aaab5c3c"])}
CIFAR10 = ("cifar-10-binary.tar.gz", ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"],
           "c4a38c50a1bc5f3a1c5537f2155ab9d6")
Images = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def load_images(data: str, size: int, cache: str, device: torch.device) -> Images:
    """Training and held-out pictures, uint8 (N, C, H, W) on the device; the labels of each or None.

    data: faces, mnist, fashion-mnist, cifar10; a folder of idx files or of pictures, CIFAR-10's
    binary .tar.gz, or an .npy, uint8 (N, H, W) or (N, H, W, C). size: of faces and of pictures.
    Held out: a data set's own test part, or the last tenth. Raises UserError for anything else.
    """
    path = Path(data).expanduser()
    idx = [next((p for p in (path / f"{n}.gz", path / n) if p.exists()), None) for n in IDX]
    if data in NAMED:
        urls, digests = NAMED[data]
        idx = [download(f"{data}/{n}.gz", [f"{url}{n}.gz" for url in urls], digest, cache)
               for n, digest in zip(IDX, digests)]
    elif data == "cifar10":
        path = download(*CIFAR10, cache)
    try:
        if data == "faces":
            x, y, *test = draw_faces(50_000, size)
        elif path.name.endswith(".tar.gz"):
            x, y, *test = read_cifar10(path)
        elif all(idx):
            x, y, *test = map(read_idx, idx)
        elif path.is_dir():
            x, y, *test = read_pictures(path, size), None
        elif path.suffix == ".npy":
            x, y, *test = np.array(np.load(path, allow_pickle=False)), None
        else:
            raise UserError(f"--data {data}: no such folder, .tar.gz or .npy, nor one of the names "
                            f"faces, cifar10, {', '.join(NAMED)}")
        if not test:
            cut = len(x) - max(1, len(x) // 10)
            parts = slice(cut), slice(cut, None)
            x, y, *test = (v if v is None else v[part] for part in parts for v in (x, y))
        x, y, x_test, y_test = (v if v is None else torch.as_tensor(v, device=device)
                                for v in (x, y, *test))
    except (OSError, EOFError, LookupError, TypeError, ValueError, tarfile.TarError,
            zlib.error) as error:
        raise UserError(f"--data {data}: damaged, or not what it seems to be: {error}") from None
    good = x.dtype == torch.uint8 and (x.ndim == 3 or x.ndim == 4 and x.shape[3] in (1, 3))
    if not good or x.shape[1:] != x_test.shape[1:] or 0 in (*x.shape, *x_test.shape):
        raise UserError(f"--data {data}: {x.dtype} {tuple(x.shape)} and {tuple(x_test.shape)}, but "
                        "pictures to train and to test on are uint8 (N, H, W), (N, H, W, 1 or 3)")
    x, x_test = (v[:, None] if v.ndim == 3 else v.permute(0, 3, 1, 2) for v in (x, x_test))
    return x.contiguous(), x_test.contiguous(), y, y_test


def read_idx(path: Path) -> np.ndarray:
    """The bytes of an idx or idx.gz file, in its shape. Raises ValueError, or as gzip does."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        raw = bytearray(file.read())
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no idx file of bytes")
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + shape.nbytes).reshape(shape)


def read_cifar10(path: Path) -> list[np.ndarray]:
    """CIFAR-10's binary archive, member by member, nothing extracted: x, y, x_test, y_test."""
    with tarfile.open(path, "r:gz") as tar:
        rows = {Path(m.name).stem: np.frombuffer(bytearray(tar.extractfile(m).read()), np.uint8)
                .reshape(-1, 3073) for m in tar if m.isfile() and m.name.endswith(".bin")}
    train = np.concatenate([rows[f"data_batch_{k}"] for k in range(1, 6)])
    return [part for a in (train, rows["test_batch"]) for part in
            (a[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), a[:, 0])]


def read_pictures(folder: Path, size: int) -> np.ndarray:
    """JPEG and PNG below `folder`, by name, the middle square resized: uint8 (N, H, W) or RGB."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError("a folder of pictures is read by Pillow: pip install pillow") from None
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))

    def read(file: Path) -> np.ndarray | None:
        try:
            picture = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
            return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None

    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(read, files))
    bad = [str(file) for file, picture in zip(files, pictures) if picture is None]
    if len(bad) == len(files):
        raise UserError(f"{folder}: neither idx files, nor JPEG or PNG that can be read")
    if bad:
        print(f"{len(bad)} of {len(files)} pictures are damaged, left out:", *bad, file=sys.stderr)
    x = np.stack([picture for picture in pictures if picture is not None])
    return x[..., 0] if (x == x[..., :1]).all() else x


def draw_faces(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Drawn faces, uint8 (count, size, size, 3), and their attributes in [0, 1], (count, 6):
    skin, hair, tilt, gaze, smile, width; uniform, from a seed of their own, on the CPU."""
    attributes = torch.rand(count, 6, generator=generator("cpu", 0))
    pictures = torch.empty(count, 3, size, size, dtype=torch.uint8)
    light, dark, blond, black, sky, shirt, white, iris, red = torch.tensor([
        [.98, .83, .72], [.42, .26, .17], [.93, .80, .45], [.10, .07, .06], [.62, .74, .86],
        [.25, .35, .55], [1., 1., 1.], [.10, .15, .20], [.72, .22, .24]])[..., None, None]
    right = (torch.arange(size) + 0.5) * 2 / size - 1
    for rows, part in zip(pictures.split(256), attributes.split(256)):
        skin, hair, tilt, gaze, smile, width = part.T[..., None, None]  # (n, 1, 1) each
        face = torch.lerp(light, dark, skin[:, None])
        locks = torch.lerp(blond, black, hair[:, None])
        angle, wide = 0.6 * (tilt - 0.5), 0.46 + 0.16 * width
        u = right * angle.cos() + right[:, None] * angle.sin()  # the head's own axes
        v = right[:, None] * angle.cos() - right * angle.sin() - 0.08
        side = u.abs()
        picture = sky.repeat(len(part), 1, size, size)

        def paint(colour: Tensor, x: Tensor, y: Tensor, rx: Tensor | float, ry: float) -> None:
            """Blends in an ellipse about x = y = 0, each pixel by its share that is covered."""
            away = ((x / rx).square() + (y / ry).square()).sqrt_().sub_(1)
            pixels = torch.as_tensor(rx).clamp(max=ry) * size / 2
            picture.lerp_(colour, away.mul_(-pixels).add_(0.5).clamp_(0, 1)[:, None])

        paint(shirt, right.expand_as(u), right[:, None] - 1.15, 0.75, 0.42)
        paint(face * 0.88, u, v - 0.62, 0.20, 0.30)  # neck
        paint(locks, u, v + 0.16, wide + 0.16, 0.80)
        paint(face * 0.95, side - wide, v - 0.06, 0.10, 0.15)  # ears
        paint(face, u, v - 0.06, wide, 0.68)
        paint(locks, u, v + 0.66, wide + 0.05, 0.22)  # fringe
        paint(locks * 0.8, side - 0.24, v + 0.20, 0.15, 0.045)  # brows
        paint(white, side - 0.24, v + 0.03, 0.14, 0.11)
        paint(iris, u - 0.14 * (gaze - 0.5) - 0.24 * u.sign(), v + 0.03, 0.07, 0.09)
        paint(face * 0.78, u, v - 0.17, 0.07, 0.09)  # nose
        paint(red, u, v - 0.40 + (0.8 * smile - 0.3) * (2 * u.square() - 0.06), 0.27, 0.065)
        rows.copy_(picture.mul_(255).round_())
    return pictures.permute(0, 2, 3, 1), attributes
# === end shared ===


# ---- main ----

def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse_args(argv)
    return run(sample_only if args.sample_only else train, args)


if __name__ == "__main__":
    sys.exit(main())
