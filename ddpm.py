# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy"]
# ///
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
        which is (bar_beta_t / beta_t) times the post's: so (15) has `net` alone, and (16) has
        beta_t^2/bar_beta_t `net` where the post has beta_t eps_theta.
        e is what net says of x_t, an estimate of eps; z is the fresh noise of a step back.
Shapes  B batch, C channels, H height, W width, T steps; t (B,) counts 1..T; s, the schedule, has
        rows (T+1,), where 0 is "nothing torn down yet". x0, xt, eps, e, z: (B, C, H, W). Pictures
        are float32 in [-1, 1] here, uint8 in memory and on disk.

Run     python ddpm.py                                   # CPU: small drawn faces
        python ddpm.py --gpu                             # one GPU: the same faces at 64 px
        python ddpm.py --gpu --data cifar10 --paper      # Ho et al.'s set-up, whole
        torchrun --nproc_per_node=8 ddpm.py --gpu        # the same global batch on eight
        python ddpm.py --sample-only 64 --sample-steps 0 # from ckpt.pt, by all T steps of (17)
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
import re
import signal
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
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
    return {name: row.float() for name, row in s.items()}


def at(row: Tensor, t: Tensor) -> Tensor:
    """row[t], shaped (B, 1, 1, 1) to meet pictures."""
    return row[t].view(-1, 1, 1, 1)


def diffuse_once(x: Tensor, t: Tensor, eps: Tensor, s: Schedule) -> Tensor:
    """9119 (3): x_t from x = x_{t-1} and the step's noise eps."""
    return at(s["alpha"], t) * x + at(s["beta"], t) * eps  # 9119 (3)


def diffuse(x0: Tensor, t: Tensor, eps: Tensor, s: Schedule) -> Tensor:
    """9119 (6): x_t from x_0 at once; t may be 0."""
    return at(s["bar_alpha"], t) * x0 + at(s["bar_beta"], t) * eps  # 9119 (6)


def tear_down(x0: Tensor, noise: Tensor, s: Schedule) -> Tensor:
    """9119 (2): all of x_0, ..., x_T, (T+1, C, H, W), from x0 (C, H, W) and noise (T, C, H, W)."""
    way = [x0[None]]
    for t, eps in enumerate(noise, start=1):  # 9119 (2)
        way.append(diffuse_once(way[-1], torch.full((1,), t, device=x0.device), eps, s))
    return torch.cat(way)


def loss(net: nn.Module, x0: Tensor, t: Tensor, eps: Tensor, s: Schedule) -> Tensor:
    """9119 (15), (B,): x0 in [-1, 1], t in 1..T; 1 for a net that says 0."""
    error = eps - net(diffuse(x0, t, eps, s), t)  # 9119 (15); net is bar_beta/beta times the post's
    return error.square().mean((1, 2, 3))  # departs: mean over pixels as in the paper; author: sum


def step_back(xt: Tensor, t: Tensor, e: Tensor, z: Tensor, sigma: Tensor, s: Schedule) -> Tensor:
    """9119 (17): x_{t-1} from x_t, e = net(x_t, t) and noise z; t in 1..T.

    sigma (T+1,) is one of `sigmas`; zeros make it the greedy (16).
    """
    eps_theta = at(s["beta"], t) / at(s["bar_beta"], t) * e  # the post's, see Symbols
    mu = (xt - at(s["beta"], t) * eps_theta) / at(s["alpha"], t)  # 9119 (8), (16)
    return mu + at(sigma, t) * z  # 9119 (17)


def sigmas(kind: str, s: Schedule) -> Tensor:
    """sigma_t of 9119 (17), (T+1,): beta, posterior (bar_beta_{t-1} beta_t / bar_beta_t) or zero.

    departs: sigma_1 = 0, no noise on the finished picture, as in Ho et al.; the author adds it.
    """
    sigma = {"beta": s["beta"], "zero": torch.zeros_like(s["beta"]),
             "posterior": s["bar_beta"].roll(1) * s["beta"] / s["bar_beta"]}[kind].clone()
    sigma[:2] = 0
    return sigma


@torch.no_grad()
def sample(net: nn.Module, xT: Tensor, g: torch.Generator, sigma: Tensor, clip: bool,
           s: Schedule) -> Iterator[Tensor]:
    """9119 (1): yields x_T, ..., x_0 from xT ~ N(0, I), by all T steps of (17); g draws the noise.

    sigma as in step_back; clip: see clip_eps.
    """
    T, x = len(sigma) - 1, xT
    yield x
    for step in range(T, 0, -1):
        t = torch.full((len(x),), step, device=x.device)
        e = net(x, t)
        if clip:
            e = clip_eps(x, t, e, s)
        z = torch.randn(x.shape, generator=g, device=x.device)
        x = step_back(x, t, e, z, sigma, s)
        yield x


# ---- beyond the post: clipping (Ho et al. 2020), fewer steps (DDIM) ----

def clip_eps(xt: Tensor, t: Tensor, e: Tensor, s: Schedule) -> Tensor:
    """The e that stands for x_0 clipped to [-1, 1], as in Ho et al.'s code."""
    x0 = (xt - at(s["bar_beta"], t) * e) / at(s["bar_alpha"], t)  # 9119 (6), solved for x_0
    return (xt - at(s["bar_alpha"], t) * x0.clamp(-1, 1)) / at(s["bar_beta"], t)


def jump_back(xt: Tensor, t: Tensor, r: Tensor, e: Tensor, z: Tensor, eta: float,
              s: Schedule) -> Tensor:
    """x_r from x_t for any r < t, both (B,): DDIM (Song et al. 2020, arXiv 2010.02502, (12)).

    eta 1 with r = t - 1 is (17) with the posterior's sigma; eta 0 uses no z.
    """
    a_t, b_t = at(s["bar_alpha"], t), at(s["bar_beta"], t)
    a_r, b_r = at(s["bar_alpha"], r), at(s["bar_beta"], r)
    x0 = (xt - b_t * e) / a_t
    sigma = eta * b_r / b_t * (1 - (a_t / a_r).square()).clamp(min=0).sqrt()
    towards_xt = (b_r.square() - sigma.square()).clamp(min=0).sqrt()
    return a_r * x0 + towards_xt * e + sigma * z


@torch.no_grad()
def sample_ddim(net: nn.Module, xT: Tensor, g: torch.Generator, steps: int, eta: float, clip: bool,
                s: Schedule) -> Iterator[Tensor]:
    """As sample, in `steps` equal jumps over t: yields x at T, ..., 0.

    Raises ValueError unless 1 <= steps <= T.
    """
    T, x = len(s["alpha"]) - 1, xT
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} sampling steps: 1 to T = {T} are possible")
    stops = torch.linspace(T, 0, steps + 1).round().long().tolist()
    yield x
    for here, there in zip(stops, stops[1:]):
        t, r = (torch.full((len(x),), k, device=x.device) for k in (here, there))
        e = net(x, t)
        if clip:
            e = clip_eps(x, t, e, s)
        z = torch.randn(x.shape, generator=g, device=x.device) if eta else torch.zeros_like(x)
        x = jump_back(x, t, r, e, z, eta, s)
        yield x


# ---- model ----

def started(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> nn.Conv2d | nn.Linear:
    """The layer as the paper starts it: uniform by fan-average times gain, biases zero.

    gain 0 is for what ends a residual branch, and for the output: all of them begin at zero.
    """
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def norm(channels: int) -> nn.GroupNorm:
    """32 groups as in the paper, if each then has at least 4 channels."""
    groups = math.gcd(32, channels, channels // 4)  # departs: single channels lose their own mean
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Attention(nn.Module):
    """Residual self-attention of all pixels, one head. (B, C, H, W)"""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.qkv = started(nn.Conv2d(channels, 3 * channels, 1))
        self.out = started(nn.Conv2d(channels, channels, 1), gain=0)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).mT.contiguous()  # (B, HW, 3C), as fast kernels want
        q, k, v = qkv[:, None].chunk(3, dim=-1)  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h[:, 0].mT.reshape(x.shape))


class Block(nn.Module):
    """Residual block: GroupNorm, swish, conv twice, the time in between; then perhaps attention."""

    def __init__(self, inputs: int, outputs: int, code: int, dropout: float, attend: bool,
                 scale_shift: bool):
        super().__init__()
        self.norm1, self.norm2 = norm(inputs), norm(outputs)
        self.conv1 = started(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.conv2 = started(nn.Conv2d(outputs, outputs, 3, padding=1), gain=0)
        self.scale_shift = scale_shift
        self.time = started(nn.Linear(code, 2 * outputs if scale_shift else outputs))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()  # Dropout(0) draws as well
        self.skip = started(nn.Conv2d(inputs, outputs, 1)) if inputs != outputs else nn.Identity()
        self.attention = Attention(outputs) if attend else nn.Identity()

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        h, time = self.conv1(F.silu(self.norm1(x))), self.time(code)[:, :, None, None]
        if self.scale_shift:  # departs: the paper adds; Dhariwal and Nichol 2021 multiply as well
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention(self.skip(x) + h)


class Grow(nn.Conv2d):
    """Twice the size by nearest neighbours, then this 3x3 convolution: (B, C, 2H, 2W).

    Doubling is a transposed convolution with ones, so both are one with a 4x4 kernel, at 4/9 of
    the multiplications.
    """

    def forward(self, x: Tensor) -> Tensor:
        kernel = 4 * F.avg_pool2d(F.pad(self.weight.flip(2, 3), (1, 1, 1, 1)), 2, stride=1)
        return F.conv_transpose2d(x, kernel.transpose(0, 1), self.bias, stride=2, padding=1)


class UNet(nn.Module):
    """The paper's network: (B, C, H, W), t (B,) in 1..T -> (B, C, H, W); Ho et al. 2020, app. B.

    width * mults[i] channels at level i, each level half the size of the last (odd sizes round up;
    the way up cuts to the skip's size). attention: levels whose blocks attend, 0 the first.
    departs: patch p takes p x p pixels for one with p^2 C channels, scale_shift is in Block.
    """

    def __init__(self, channels: int = 3, width: int = 128, mults: tuple[int, ...] = (1, 2, 2, 2),
                 blocks: int = 2, attention: tuple[int, ...] = (1,), dropout: float = 0.1,
                 patch: int = 1, scale_shift: bool = False):
        super().__init__()
        self.width, self.patch, code = width, patch, 4 * width
        self.time = nn.Sequential(started(nn.Linear(width, code)), nn.SiLU(),
                                  started(nn.Linear(code, code)), nn.SiLU())
        self.first = started(nn.Conv2d(channels * patch ** 2, width, 3, padding=1))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, last, lowest = [width], width, len(mults) - 1
        for level, c in enumerate(width * m for m in mults):
            for _ in range(blocks):
                self.down.append(Block(last, c, code, dropout, level in attention, scale_shift))
                skips.append(last := c)
            if level < lowest:
                self.down.append(started(nn.Conv2d(c, c, 3, stride=2, padding=1)))
                skips.append(c)
        self.middle = nn.ModuleList([Block(last, last, code, dropout, attend, scale_shift)
                                     for attend in (True, False)])
        for level in range(lowest, -1, -1):
            for k in range(blocks + 1):
                grows, c = k == 0 and level < lowest, width * mults[level]
                grow = started(Grow(last, last, 3)) if grows else nn.Identity()
                block = Block(last + skips.pop(), c, code, dropout, level in attention, scale_shift)
                self.up.append(nn.ModuleList([grow, block]))
                last = c
        self.norm = norm(last)
        self.last = started(nn.Conv2d(last, channels * patch ** 2, 3, padding=1), gain=0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        height, width = x.shape[2:]
        kind = self.first.weight.dtype  # a net in bfloat16 takes float32 pictures
        code = self.time(time_code(t, self.width).to(kind))  # (B, 4 width)
        h = F.pad(x.to(kind), (0, -width % self.patch, 0, -height % self.patch))
        h = self.first(F.pixel_unshuffle(h, self.patch))  # (B, width, H/p, W/p)
        skips = [h]
        for layer in self.down:
            h = layer(h, code) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for block in self.middle:
            h = block(h, code)
        for grow, block in self.up:
            skip = skips.pop()
            h = grow(h)[..., :skip.shape[2], :skip.shape[3]]
            h = block(torch.cat([h, skip], 1), code)
        h = F.pixel_shuffle(self.last(F.silu(self.norm(h))), self.patch)
        return h[..., :height, :width].to(x.dtype)


def time_code(t: Tensor, width: int) -> Tensor:
    """Sinusoids of t (B,) -> (B, width) float32: wave lengths from 2 pi to 2 pi 10^4."""
    speed = torch.logspace(0, -4, (width + 1) // 2, device=t.device)
    angle = t[:, None] * speed
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :width]


class Foresight(nn.Module):
    """eps from a net that foresees x_0: 9119 (6), solved for eps; where x_t is noise, e is exact.

    departs: the paper's net says eps itself. bar_beta_t from `least` up: where hardly anything is
    torn down, a division by it would blow the net's error up.
    """

    def __init__(self, net: nn.Module, s: Schedule, least: float = 0.2):
        super().__init__()
        self.net = net
        self.register_buffer("bar_alpha", s["bar_alpha"], persistent=False)
        self.register_buffer("bar_beta", s["bar_beta"].clamp(min=least), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (x - at(self.bar_alpha, t) * self.net(x, t)) / at(self.bar_beta, t)


# ---- evaluation ----

@torch.no_grad()
def held_out_loss(net: nn.Module, x: Tensor, seed: int, batch: int, s: Schedule) -> list[float]:
    """(15) on uint8 pictures x in ten bins of t: t spread evenly over 1..T, noise from `seed`."""
    T, x = len(s["alpha"]) - 1, x.repeat(-(-10 // len(x)), 1, 1, 1)  # no bin may stay empty
    g = generator(x.device, seed, 0, 1)
    t = torch.arange(len(x), device=x.device) * T // len(x) + 1
    eps = torch.randn(x.shape, generator=g, device=x.device)
    x = x[torch.randperm(len(x), generator=g, device=x.device)]  # no order may meet that of t
    pieces = zip(x.split(batch), t.split(batch), eps.split(batch))
    losses = torch.cat([loss(net, to_float(x0), k, e, s) for x0, k, e in pieces])
    return torch.stack([part.mean() for part in losses.tensor_split(10)]).tolist()


def draw(net: nn.Module, shape: tuple[int, ...], count: int, steps: int, args: argparse.Namespace,
         s: Schedule) -> tuple[Tensor, Tensor]:
    """`count` pictures (C, H, W), uint8, from the noise of --sample-seed; the first one's way.

    steps: of DDIM, or 0 for all of (17). --samples at a time, so that any count begins alike.
    """
    device, pictures, way = s["alpha"].device, [], []
    for first in watch(range(0, count, args.samples), -(-count // args.samples), "sampling"):
        g = generator(device, args.sample_seed, first, 2)
        xT = torch.randn((min(args.samples, count - first), *shape), generator=g, device=device)
        states = sample_ddim(net, xT, g, min(steps, args.T), args.eta, args.clip, s) if steps else \
            sample(net, xT, g, sigmas(args.sigma, s), args.clip, s)
        for x in states:
            if first == 0:
                way.append(x[0].clone())  # a view would keep the whole batch alive
        pictures.append(to_uint8(x))
    return torch.cat(pictures), to_uint8(torch.stack(way)).cpu()


def report(net: nn.Module, ema: nn.Module, x: Tensor, x_test: Tensor, args: argparse.Namespace,
           s: Schedule) -> dict:
    """Writes samples.png, building.png and nearest.png; returns the numbers for metrics.json.

    The nets are in eval mode. Pictures come from the average `ema`; held out: x_test.
    """
    begin, out = time.perf_counter(), Path(args.out)
    count = max(args.samples, args.judge)
    with autocast(args):
        pictures, up = draw(ema, x.shape[1:], count, args.sample_steps, args, s)
    metrics = dict(samples=count, sample_seconds=time.perf_counter() - begin)
    write_png(out / "samples.png", grid(pictures[:args.samples], math.isqrt(args.samples)))
    few = pictures[:12]
    write_png(out / "nearest.png", grid(torch.cat([few, nearest(few, x)]), len(few)))
    g = generator(x.device, args.seed, 0, 3)
    noise = torch.randn((args.T, *x.shape[1:]), generator=g, device=x.device)
    down = to_uint8(tear_down(to_float(x_test[0]), noise, s)).cpu()
    early = torch.linspace(0, 1, 12).square()  # where most of what can be seen happens
    rows = []
    for way in (down, up.flip(0)):
        k = torch.maximum(early * (len(way) - 1), torch.arange(12))  # none twice, if there are 12
        rows.append(way[k.clamp(max=len(way) - 1).long()])
    write_png(out / "building.png", grid(torch.cat([rows[0], rows[1].flip(0)]), 12))
    with autocast(args):
        for name, network in (("raw", net), ("ema", ema)):
            bins = held_out_loss(network, x_test[:args.test_images], args.seed, args.samples, s)
            metrics |= {f"held_out_loss_{name}": sum(bins) / 10,
                        f"held_out_loss_{name}_by_t": bins}
    if args.judge:
        metrics |= judge(pictures[:args.judge], x, x_test, args.seed)
    return metrics


# ---- training ----
# Random streams, none used twice: torch.manual_seed(seed) the first weights; generator's keys are
# (seed, step) t, noise and mirrors of a step; (seed, step, rank, 5) dropout; (sample_seed, first,
# 2) the samples from `first` on; (seed, 0, 1) noise of the held-out loss, 3 of tearing down; and
# in the plumbing (seed, epoch, 9) the order, (seed, 0, 10) the judge, (0,) the faces.

def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that do not go together, once --resume has had its say."""
    for wrong, why in (
            (max(args.dropout, args.ema) >= 1, "--dropout, --ema: below 1"),
            (not args.mults, "--mults: a number for each level"),
            (max(args.attention, default=0) >= len(args.mults), "--attention: no such level"),
            ("sample_steps" in args.given and args.sample_steps > args.T,
             f"--sample-steps {args.sample_steps}: T is {args.T}"),
            ("eta" in args.given and not args.sample_steps, "--eta: not with --sample-steps 0"),
            (args.eta > 1, "--eta: 1 at most"),
            ("sigma" in args.given and args.sample_steps, "--sigma: with --sample-steps 0 only")):
        if wrong:
            raise UserError(why)


def load_data(args: argparse.Namespace, device: torch.device,
              state: dict | None) -> tuple[Tensor, Tensor]:
    """Pictures to train on and held-out ones, uint8 (N, C, H, W) on the device."""
    x, x_test, _, _ = load_images(args, state, device)
    return x, x_test


def build(args: argparse.Namespace, channels: int, device: torch.device
          ) -> tuple[nn.Module, Schedule]:
    """The network and the schedule that the flags describe, on the device."""
    torch.manual_seed(args.seed)
    s = make_schedule(args.T, args.schedule)
    net = UNet(channels, args.width, args.mults, args.blocks, args.attention, args.dropout,
               args.patch, args.scale_shift)
    net = Foresight(net, s) if args.foresight else net
    # convolutions on the CPU are fastest with channels last; GroupNorm on a GPU would copy
    layout = torch.contiguous_format if args.gpu else torch.channels_last
    return net.to(device, memory_format=layout), {name: row.to(device) for name, row in s.items()}


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up; then constant as in the paper, or with --decay a cosine to zero."""
    fall = (1 + math.cos(math.pi * step / args.steps)) / 2 if args.decay else 1
    return args.lr * min(1, (step + 1) / args.warmup) * fall


def train(args: argparse.Namespace, device: torch.device, state: dict | None) -> None:
    """The whole run: data, loop, checkpoints, pictures, metrics.json."""
    x, x_test = load_data(args, device, state)
    shape = x.shape[1:]
    net, s = build(args, shape[0], device)
    ema = copy.deepcopy(net).eval()  # keeps requires_grad: autocast remembers only such casts
    params, live, averages = list(net.parameters()), floats(net), floats(ema)
    opt = torch.optim.Adam(params, lr=args.lr, fused=True)
    parts = dict(model=net, ema=ema, opt=opt)
    first = restore(state, parts)
    if args.compile:
        net.compile()
        ema.compile()
    wrapped = nn.parallel.DistributedDataParallel(net) if RANKS > 1 else net
    make_room(args)
    progress = Progress(args, first, sum(p.numel() for p in params), args.batch_size, "img")

    def save(step: int, end: bool) -> None:
        save_checkpoint(args, step, parts, shape=tuple(x.shape))
        if not end and not RANK:
            with autocast(args):
                pictures, _ = draw(ema, shape, args.samples, args.sample_steps or 50, args, s)
            write_png(Path(args.out) / f"samples_{step:06}.png",
                      grid(pictures, math.isqrt(args.samples)))

    for step in training(args, first, save):
        g = generator(device, args.seed, step)
        t = torch.randint(1, args.T + 1, (args.batch_size,), generator=g, device=device)
        eps = torch.randn((args.batch_size, *shape), generator=g, device=device)
        mirror = torch.rand(args.batch_size, 1, 1, 1, generator=g, device=device) < args.flip / 2
        rows = batch_rows(len(x), step, args.batch_size, args.seed, device)
        t, eps, mirror, x0 = mine(t), mine(eps), mine(mirror), to_float(x[mine(rows)])
        x0 = torch.where(mirror, x0.flip(3), x0)
        if args.dropout:
            torch.manual_seed(generator("cpu", args.seed, step, RANK, 5).initial_seed())
        lr = opt.param_groups[0]["lr"] = learning_rate(step, args)
        with autocast(args):
            value = loss(wrapped, x0, t, eps, s).mean()
        value.backward()
        nn.utils.clip_grad_norm_(params, args.clip_grad or math.inf)
        opt.step()
        opt.zero_grad()
        update_ema(averages, live, step, args.ema)
        progress.add(step + 1, loss=value.detach(), lr=lr)
    if RANK:
        return
    seconds, images = time.perf_counter() - progress.begin, (args.steps - first) * args.batch_size
    metrics = report(net.eval(), ema, x, x_test, args, s)
    near = [metrics.get(name) for name in ("frechet", "frechet_floor")]
    known = f"; Frechet distance {near[0]:.3g}, of held-out pictures {near[1]:.3g}" \
        if None not in near else ""
    say(f"held-out loss {metrics['held_out_loss_ema']:.4f}{known}")
    write_metrics(args, metrics | dict(
        step=args.steps, images_seen=args.steps * args.batch_size, seed=args.seed,
        train_seconds=seconds, images_per_second=images / seconds))


def sample_only(args: argparse.Namespace, device: torch.device, state: dict) -> None:
    """Draws --sample-only pictures from the average in ckpt.pt, whatever device made it."""
    shape = state["shape"][1:]
    net, s = build(args, shape[0], device)
    restore(state, dict(ema=net.eval()))
    if args.compile:
        net.compile()
    with autocast(args):
        pictures, _ = draw(net, shape, args.sample_only, args.sample_steps, args, s)
    path = Path(args.out) / "samples_only.png"
    write_png(path, grid(pictures, math.ceil(args.sample_only ** 0.5)))
    say(str(path))


# ---- command line ----

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, a row each; --paper is Ho et al. 2020 on CIFAR-10, appendix B."""
    experiment = dict(
        # flag       CPU        --gpu         --paper     least  meaning
        data=       ("faces",   "faces",      "cifar10",    None, "faces (drawn), mnist, fashion-"
                     "mnist, cifar10, or a path: a folder of idx files or of pictures, CIFAR-10's "
                     "binary .tar.gz, or an .npy file"),
        size=       (32,        64,           32,           8, "pixels, if the data have any size"),
        steps=      (1800,      1200,         800_000,      1, "in all, resumed ones included"),
        batch_size= (32,        128,          128,          1, "global, over all processes"),
        seed=       (0,                                     0, "of weights, noise and order"),
        T=          (250,       1000,         1000,         21, "diffusion steps, 9119 (2)"),
        schedule=   ("post",    "post",       "paper",      ("post", "paper"), "alpha_t: post is "
                     "9119 (18), paper is linear in its beta"),
        width=      (16,        128,          128,          4, "channels of the first level"),
        mults=      ((1, 2, 4), (1, 2, 2, 2), (1, 2, 2, 2), 1, "channels of each level, in widths"),
        blocks=     (1,         2,                          1, "residual blocks per level"),
        attention=  ((2,),      (1,),                       0, "levels that attend, 0 the first"),
        patch=      (2,         2,            1,            1, "side of the squares of pixels that "
                     "the net takes for one"),
        scale_shift=(True,      True,         False,        None, "the time also multiplies"),
        foresight=  (True,      True,         False,        None, "the net foresees x_0, and 9119 "
                     "(6) gives eps"),
        dropout=    (0.0,       0.0,          0.1,          0, "inside the residual blocks"),
        flip=       (False,     False,        True,         None, "mirror half of the pictures"),
        lr=         (2e-3,      5e-4,         2e-4,         0, "Adam's learning rate"),
        warmup=     (50,        100,          5000,         1, "steps of linear warm-up"),
        decay=      (True,      True,         False,        None, "cosine of the rate to zero"),
        clip_grad=  (1.0,                                   0, "largest gradient norm, 0: any"),
        ema=        (0.99,      0.995,        0.9999,       0, "decay of the average that draws"),
    )
    others = dict(
        paper=      (False,                                 None, "Ho et al.'s CIFAR-10, whole"),
        save_every= (900,       2000,         10_000,       1, "steps between checkpoints"),
        samples=    (64,                                    1, "pictures in a grid"),
        test_images=(500,       2000,         10_000,       1, "held out, for the loss (15)"),
        judge=      (1000,                                  0, "samples for Frechet's distance, "
                     "precision, recall and sharpness"),
        sample_seed=(0,                                     0, "of the pictures drawn"),
        sample_steps=(16,       50,           0,            0, "of DDIM; 0: all T of 9119 (17)"),
        eta=        (0.0,                                   0, "of DDIM: 0 no noise, 1 as (17)"),
        sigma=      ("beta",    ("beta", "posterior", "zero"), "sigma_t of 9119 (17)"),
        clip=       (True,                                  None, "the x_0 foreseen to [-1, 1]"),
        sample_only=(0,                                     0, "only draw as many, from ckpt.pt"),
    )
    return read_flags("ddpm", __doc__.partition("\n")[0], argv, experiment, others)


# ---- plumbing: the same text in every script that needs it ----

# === shared: setup ===
RANK, LOCAL_RANK, RANKS = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # by torchrun
STOP: list[BaseException] = []  # why training has to save and end: a signal, a log that is gone


class UserError(Exception):
    """Wrong input, alike on all ranks: one line that says what to do; exit code 2."""


def setup(args: argparse.Namespace) -> torch.device:
    """The device that --gpu asks for, and the process group of torchrun. Raises UserError."""
    if args.batch_size % RANKS:
        raise UserError(f"--batch-size {args.batch_size}: {RANKS} processes cannot share it evenly")
    torch.set_flush_denormal(True)  # numbers below 1e-38 are 0: they slow a CPU down to a third
    if args.gpu:
        wanted, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if there < wanted:
            raise UserError(f"--gpu: {there} of {wanted} CUDA devices found; leave --gpu out to "
                            "run on the CPU")
        torch.cuda.set_device(LOCAL_RANK)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = not args.fp32
        torch.set_float32_matmul_precision("highest" if args.fp32 else "high")
    if RANKS > 1:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if args.gpu else "gloo")
    return torch.device(f"cuda:{LOCAL_RANK}" if args.gpu else "cpu")


def autocast(args: argparse.Namespace) -> torch.autocast:
    """Inside, networks on a GPU compute in bfloat16, unless --fp32."""
    return torch.autocast("cuda" if args.gpu else "cpu", torch.bfloat16,
                          enabled=args.gpu and not args.fp32)


def mine(rows: Tensor) -> Tensor:
    """This rank's slice of a tensor for the whole global batch."""
    return rows.chunk(RANKS)[RANK]


def generator(device: torch.device | str, *key: int) -> torch.Generator:
    """Random numbers that depend on `key` alone, say (seed, step), not on what was drawn before."""
    mixed = np.random.SeedSequence((len(key), *key))  # or (0,) and (0, 0) would be one stream
    return torch.Generator(device).manual_seed(int(mixed.generate_state(1, np.uint64)[0]))


def tell(stream: str, text: str, end: str = "\n") -> None:
    """Prints on sys.stdout or sys.stderr; if nobody listens any more, no run is lost for it."""
    try:
        print(text, end=end, file=getattr(sys, stream), flush=True)
    except OSError:
        setattr(sys, stream, open(os.devnull, "w"))


def say(text: str, live: bool = False) -> None:
    """Prints a line, on rank 0; on a terminal the next one takes the place of a `live` one."""
    terminal = sys.stdout.isatty()
    text = re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)  # it would obey
    if not RANK:
        tell("stdout", "\r\033[K" * terminal + text, "" if live and terminal else "\n")


@contextmanager
def on_signals(act: Callable) -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP do `act`; one that is ignored, as by nohup, stays so."""
    kinds = [getattr(signal, k) for k in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, k)]
    before = {k: signal.getsignal(k) for k in kinds if signal.getsignal(k) != signal.SIG_IGN}
    try:
        for kind in before:
            signal.signal(kind, act)
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def run(body: Callable, args: argparse.Namespace, check: Callable) -> int:
    """The exit code of body(args, device, state), once `check` has passed the flags: what stops it
    becomes one line, and 2 for wrong input, 1 for a failure, 130 if interrupted."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")  # a terminal may not spell every sample
    try:
        with on_signals(signal.default_int_handler):
            device = setup(args)
            state = resume_run(args) if args.resume else None
            check(args)
            body(args, device, state)
        return 0
    except (KeyboardInterrupt, UserError, OSError, FloatingPointError, MemoryError,
            RuntimeError) as error:
        line = str(error).partition("\n")[0] or f"{type(error).__name__}, --data {args.data}"
        lost = RANKS > 1 and re.search("gloo|NCCL|onnection", line)  # its own rank says why
        scarce = re.search("allocate|memory|overflow", line)
        if isinstance(error, RuntimeError) and not (lost or scarce):
            raise
        if isinstance(error, KeyboardInterrupt):
            saved = args.own and (Path(args.out) / "ckpt.pt").exists()
            free = sorted(args.given - {*args.config, "out", "resume"})  # no checkpoint has them
            again = f"; say --{', --'.join(free).replace('_', '-')} again" * bool(free)
            line = "interrupted" + f"; saved, --out {args.out} --resume goes on{again}" * saved
        alike = KeyboardInterrupt, UserError, FloatingPointError  # on all ranks
        if not (RANK and (lost or isinstance(error, alike))):
            tell("stderr", "\n" * sys.stdout.isatty() + f"{args.script}.py: {line}")
        wrong = UserError, PermissionError, NotADirectoryError
        return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, wrong) else 1
    finally:
        if torch.distributed.is_initialized():
            gc.collect()  # the cycles of DDP keep the group alive: its threads would abort exit
            torch.distributed.destroy_process_group()
# === end shared ===


# === shared: ema ===
def floats(net: nn.Module) -> list[Tensor]:
    """The parameters of `net`, and those of its buffers that are no counters."""
    return [*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())]


@torch.no_grad()
def update_ema(ema: list[Tensor], live: list[Tensor], step: int, decay: float) -> None:
    """ema <- d ema + (1 - d) live, d = decay after a warm-up, so early samples are readable."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(ema, live, 1 - d)
# === end shared ===


# === shared: order ===
@functools.lru_cache(maxsize=2)
def epoch_order(total: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    """The permutation of (seed, epoch), int64 (total,)."""
    return torch.randperm(total, generator=generator("cpu", seed, epoch, 9)).to(device)


def batch_rows(total: int, step: int, batch: int, seed: int, device: torch.device) -> Tensor:
    """Rows of step `step` = 0, 1, ...: the permutations of (seed, epoch) one after another, cut."""
    epoch, first = divmod(step * batch, total)
    epochs = range(epoch, epoch + (first + batch - 1) // total + 1)
    return torch.cat([epoch_order(total, seed, k, device) for k in epochs])[first:first + batch]
# === end shared ===


# === shared: download ===
def download(name: str, urls: list[str], digest: str, cache: str) -> Path:
    """The file `name` in `cache`, fetched once, by rank 0, from the first of `urls` that answers.

    digest: how its SHA-256 begins. Torch gives the file its name only when that agrees: half a
    download never passes for a whole one. Raises UserError; OSError for a disk full or shut.
    """
    path = Path(cache).expanduser() / name
    if RANK:
        torch.distributed.barrier()
    path.parent.mkdir(parents=True, exist_ok=True)
    for url in urls:
        try:
            if not path.exists():
                torch.hub.download_url_to_file(url, str(path), hash_prefix=digest)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
                raise
            print(f"{url}: {error}", file=sys.stderr)
    if RANKS > 1 and not RANK:
        torch.distributed.barrier()
    if not path.exists():
        raise UserError(f"cannot download {name}: put the file from {urls[0]} at {path}")
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
        raise UserError(f"{path}: damaged, its SHA-256 does not begin with {digest}; delete it")
    return path
# === end shared ===


# === shared: flags ===
def whole_numbers(text: str) -> tuple[int, ...]:
    """Reads 1,2,2 as (1, 2, 2)."""
    return tuple(int(part) for part in text.split(",") if part)


def shown(value) -> str:
    """A flag's value as one types it."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def read_flags(script: str, title: str, argv: list[str] | None, experiment: dict,
               others: dict) -> argparse.Namespace:
    """The flags of two tables, and those that all scripts share; a wrong one ends in a line, 2.

    A row: the defaults on the CPU, with --gpu, with --paper (the last one stands for the rest),
    the least number or the words allowed, the meaning. A flag reads what its default is. --resume
    takes `experiment`, args.config, from the checkpoint; args.given are those given by hand.
    """
    others = others | dict(
        gpu=(False, None, "use CUDA, or stop if there is none; has its own defaults"),
        out=(f"out/{script}", None, "where all is written; if it is taken, OUT.1, OUT.2, ..."),
        resume=(False, None, "go on from ckpt.pt in OUT; without --out in the newest of them"),
        cache=("~/.cache/kexue", None, "where downloads are kept"),
        fp32=(False, None, "with --gpu: neither bfloat16 nor TF32"),
        compile=(False, None, "torch.compile the network"))
    rows = experiment | others
    p = argparse.ArgumentParser(f"{script}.py", "%(prog)s [--flag VALUE ...]", title,
                                allow_abbrev=False)
    kept = p.add_argument_group("the experiment, which --resume takes from the checkpoint")
    free = p.add_argument_group("this run")
    reads = {tuple: (whole_numbers, "N,N"), int: (int, "N"), float: (float, "X")}
    for name, (*defaults, allowed, meaning) in rows.items():
        said = [f"{where}{shown(v)}" for where, v in zip(("", "--gpu ", "--paper "), defaults)]
        kind = type(defaults[0])
        reader, metavar = reads.get(kind, (str, "TEXT"))
        how = dict(action=argparse.BooleanOptionalAction if any(defaults) else "store_true") \
            if kind is bool else dict(choices=allowed) if isinstance(allowed, tuple) else \
            dict(type=reader, metavar=metavar, nargs="+" if kind is list else None)
        (kept if name in experiment else free).add_argument(
            f"--{name.replace('_', '-')}", default=argparse.SUPPRESS,
            help=f"{meaning} (default: {'; '.join(said)})", **how)
    args = p.parse_args(argv)
    args.given, args.config = set(vars(args)), list(experiment)
    args.script, args.own = script, False
    column = 2 if "paper" in args.given else 1 if "gpu" in args.given else 0
    for name, (*defaults, allowed, _) in rows.items():
        value = vars(args).setdefault(name, defaults[min(column, len(defaults) - 1)])
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(allowed, (int, float)) and not allowed <= number < 2**62:
                p.error(f"--{name.replace('_', '-')} {shown(value)}: from {allowed} to 2**62")
    args.resume |= bool(vars(args).get("sample_only"))  # which needs the checkpoint
    return args
# === end shared ===


# === shared: checkpoint ===
def put(path: Path, body: bytes) -> None:
    """Writes a whole file beside `path`, then renames it: an interrupted save harms nothing."""
    part = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
        part.write_bytes(body)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def make_room(args: argparse.Namespace) -> None:
    """A folder of this run's own: OUT, or OUT.1, OUT.2, ... if taken; goes into args.out."""
    out, k = Path(args.out), itertools.count(1)
    if not out.name.strip("."):
        raise UserError(f"--out {args.out}: name a folder of the run's own")
    while not (RANK or args.own):
        try:
            Path(args.out).mkdir(parents=True)
            args.own = True
        except FileExistsError:
            args.out = f"{out}.{next(k)}"


def save_checkpoint(args: argparse.Namespace, step: int, parts: dict, **more) -> None:
    """Writes OUT/ckpt.pt: the flags, the step, the state of each of `parts`, and `more`.

    Raises FloatingPointError if a weight is no longer finite: the older file stays.
    """
    path, nets = Path(args.out) / "ckpt.pt", [v for v in parts.values() if isinstance(v, nn.Module)]
    if not torch.stack([p.isfinite().all() for net in nets for p in net.parameters()]).all():
        raise FloatingPointError(f"a weight is no longer finite; {path}, if there, is from before")
    if not RANK:
        config, buffer = {name: getattr(args, name) for name in args.config}, io.BytesIO()
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save(dict(script=args.script, step=step, config=config, **more) | states, buffer)
        put(path, buffer.getbuffer())


def newest(args: argparse.Namespace, name: str) -> Path:
    """The file `name` in OUT; without --out, the newest in OUT, OUT.1, ... Raises UserError."""
    out = Path(args.out)
    places = [out] if "out" in args.given else [out, *out.parent.glob(f"{out.name}.[0-9]*")]
    files = [place / name for place in places if (place / name).is_file()]
    if not files:
        raise UserError(f"{out / name}: no such file; --out names a run's folder, no file in it")
    return max(files, key=lambda file: file.stat().st_mtime)


class State(dict):
    """What is in a checkpoint; to ask for what is not raises UserError."""

    def __missing__(self, name: str):
        raise UserError(f"ckpt.pt: has no {name}; it is damaged, or of another version")


def resume_run(args: argparse.Namespace) -> dict:
    """The checkpoint to go on from, on the CPU; its flags go into args, and its folder.

    Raises UserError for any file but a whole one of this script, and if a flag given by hand
    contradicts it; only --steps may be more, and --data or --bert lie elsewhere.
    """
    path = newest(args, "ckpt.pt")
    args.out, args.own = str(path.parent), True
    try:
        file = zipfile.ZipFile(path)  # torch looks neither at checksums nor at attributes, and a
        if file.testzip() or any(item.external_attr for item in file.infolist()):  # "folder" is
            raise ValueError  # memory as it happens to be
        state = torch.load(path, map_location="cpu", weights_only=True)
        config = {name: state["config"][name] for name in args.config}
        kinds = [(state["script"], args.script), (state["step"], args.steps)]
        kinds += [(value, getattr(args, name)) for name, value in config.items()]
        if state["script"] != args.script or any(type(a) is not type(b) for a, b in kinds):
            raise ValueError
    except Exception:  # torch raises a dozen kinds
        raise UserError(f"{path}: not a checkpoint of this {args.script}.py, or damaged") from None
    for name, old in config.items():
        new = vars(args)[name] if name in args.given else old
        if new != old and name not in ("steps", "data", "bert"):
            raise UserError(f"--{name.replace('_', '-')} {shown(new)}: the checkpoint has "
                            f"{shown(old)}; leave the flag out, or begin anew")
        setattr(args, name, new)
    if state["step"] > args.steps:
        raise UserError(f"--steps {args.steps}: the checkpoint has {state['step']} already")
    return State(state)


def restore(state: dict | None, parts: dict) -> int:
    """Puts the checkpoint's state into `parts`, name by name; the step to go on from, or 0."""
    for name, part in parts.items() if state else ():
        try:
            part.load_state_dict(state[name])
            for p, moments in getattr(part, "state", {}).items():  # an optimiser does not look
                if any(m.shape not in ((), p.shape) for m in moments.values()):
                    raise ValueError
        except Exception:  # torch raises half a dozen kinds
            raise UserError(f"ckpt.pt: its {name} is damaged, or does not fit the flags") from None
    return state["step"] if state else 0


def write_metrics(args: argparse.Namespace, metrics: dict) -> None:
    """Writes OUT/metrics.json, where what is not finite is null, and says where all is."""
    finite = json.loads(json.dumps(metrics), parse_constant=lambda _: None)
    put(Path(args.out) / "metrics.json", (json.dumps(finite, indent=1) + "\n").encode())
    say(f"all of it is in {args.out}/")
# === end shared ===


# === shared: progress ===
def training(args: argparse.Namespace, first: int, save: Callable) -> Iterator[int]:
    """The steps first, ..., args.steps - 1. Calls save(step, end) every args.save_every of them and
    at the end. A signal ends them early, on all ranks alike, and is raised once that is saved; a
    second one at once."""
    told = []

    def note(*_) -> None:
        told.append(time.monotonic())
        STOP.append(KeyboardInterrupt())
        if told[-1] > told[0] + 1:  # torchrun hands one Ctrl-C on a second time
            raise KeyboardInterrupt

    STOP.clear()
    with on_signals(note):
        for step in itertools.count(first):
            stop = torch.tensor(float(bool(STOP)))  # a copy: a signal may come at any moment
            if RANKS > 1:
                torch.distributed.all_reduce(stop)
            end = step >= args.steps or bool(stop)
            if end or step > first and step % args.save_every == 0:
                save(step, end)
            if end:
                break
            yield step
    if stop or STOP:
        raise STOP[0] if STOP else KeyboardInterrupt


def watch(items: Iterable, total: int, what: str) -> Iterator:
    """The items, and every few seconds a line on how many of `total` are done."""
    begin = then = time.perf_counter()
    for k, item in enumerate(items):
        now = time.perf_counter()
        if k and now - then > (0.5 if sys.stdout.isatty() else 10):
            eta = timedelta(seconds=int((total - k) * (now - begin) / k))
            say(f"{what} {k}/{total}  eta {eta}", live=True)
            then = now
        yield item


class Progress:
    """A line every few seconds, rewritten in place on a terminal, and a row in OUT/log.csv."""

    def __init__(self, args: argparse.Namespace, step: int, parameters: int, items: int, unit: str):
        """items: of `unit`, seen in a step. Begins with what runs, where and how."""
        self.log, self.steps = Path(args.out) / "log.csv", args.steps
        self.items, self.unit = items, unit
        self.first, self.shown, self.sums = step, step, {}
        self.begin = self.then = time.perf_counter()
        where = torch.cuda.get_device_name() if args.gpu else \
            f"CPU, {torch.get_num_threads()} threads"
        how = "bfloat16 and TF32" if args.gpu and not args.fp32 else "float32"
        say(f"{' '.join(sys.argv)}\n{where} x {RANKS}, torch {torch.__version__}, {how}"
            f"{', compiled' * args.compile}, {parameters:,} parameters, all goes to {args.out}/")
        if not RANK and self.log.exists():  # rows after the checkpoint will be made again
            rows = [row for row in self.log.read_text().splitlines(True) if row[-1] == "\n"]
            rows[1:] = [row for row in rows[1:] if float(row.partition(",")[0]) <= step]
            put(self.log, "".join(rows).encode())

    def add(self, step: int, **values: Tensor | float) -> None:
        """Takes a step's values; shows their means at first, at last, and every few seconds.

        Raises FloatingPointError if one is not finite. A log that cannot be written stops the run.
        """
        for name, value in values.items():  # no item(): that would wait for the GPU
            self.sums[name] = self.sums.get(name, 0) + value
        now, wait = time.perf_counter(), 0.5 if sys.stdout.isatty() else 10
        if RANK or now - self.then < wait and step not in (self.first + 1, self.steps):
            return
        count, elapsed = step - self.shown, now - self.begin
        row = dict(step=step, items=step * self.items, rate=count * self.items / (now - self.then),
                   elapsed=elapsed, **{k: float(v) / count for k, v in self.sums.items()})
        self.shown, self.then, self.sums = step, now, {}
        eta = (self.steps - step) * elapsed / (step - self.first)
        said = "".join(f"{name} {row[name]:.4g}  " for name in values)
        bar = f"[{'#' * (20 * step // self.steps):20}] " * sys.stdout.isatty()
        say(f"{bar}step {step}/{self.steps}  {said}{row['rate']:.0f} {self.unit}/s  elapsed "
            f"{timedelta(seconds=int(elapsed))}  eta {timedelta(seconds=int(eta))}",
            live=step < self.steps)
        if not all(map(math.isfinite, row.values())):
            raise FloatingPointError(f"step {step}: {said} ckpt.pt, if there, is from before")
        try:
            with open(self.log, "a") as file:
                if not file.tell():
                    print(*row, sep=",", file=file)
                print(*row.values(), sep=",", file=file)
        except OSError as error:
            STOP.append(error)  # so that the loop saves first
# === end shared ===


# === shared: pictures ===
def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> 0..255 uint8, the inverse of to_float; what lies outside is clipped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(x: Tensor) -> Tensor:
    """0..255 uint8 -> [-1, 1] float32."""
    return x.float() / 127.5 - 1


def nearest(x: Tensor, train: Tensor) -> Tensor:
    """The item of `train` (N, ...) nearest to each of x, Euclidean distance; say uint8 pictures."""
    exact, flat = "donot_use_mm_for_euclid_dist", x.flatten(1).float()  # TF32 would take others
    rows = max(1, 2**24 // flat[0].numel())  # so that memory stays small
    far = [torch.cdist(flat, piece.flatten(1).float(), compute_mode=exact)
           for piece in train.split(rows)]
    return train[torch.cat(far, 1).argmin(1)]
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
    head = struct.pack(">2I5B", w, h, 8, c - 1, 0, 0, 0)  # kind 0 is grey, 2 is RGB
    lines = F.pad(image.cpu().permute(1, 2, 0).reshape(h, c * w), (1, 0))  # each begins: filter 0
    png = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(lines.numpy())), (b"IEND", b"")):
        png += struct.pack(">I", len(body)) + kind + body
        png += struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(png)
# === end shared ===


# === shared: images ===
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte",
       "t10k-labels-idx1-ubyte")
NAMED = {  # where to get it, and how the SHA-256 of its four files begins, as torch.hub has it
    "mnist": (["https://ossci-datasets.s3.amazonaws.com/mnist/",
               "https://storage.googleapis.com/cvdf-datasets/mnist/"],
              "440fcabf 3552534a 8d422c7b f7ae60f9".split()),
    "fashion-mnist": (["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"],
                      "3aede38d a04f1713 346e55b9 67da17c7".split())}
CIFAR10 = ("cifar-10-binary.tar.gz", ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"],
           "c4a38c50")
PICTURES = ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"
Images = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def load_images(args: argparse.Namespace, state: dict | None, device: torch.device) -> Images:
    """Training and held-out pictures, uint8 (N, C, H, W) on the device; the labels of each or None.

    args.data: faces, mnist, fashion-mnist, cifar10, a folder of idx files or pictures, CIFAR-10's
    binary .tar.gz, or an .npy, uint8 (N, H, W) or (N, H, W, C). args.size: of faces, pictures.
    Held out: a data set's own test part, or the last tenth. Raises UserError for anything else, and
    for other pictures than those (N, C, H, W) that the checkpoint `state` was made on.
    """
    data = args.data
    path = download(*CIFAR10, args.cache) if data == "cifar10" else Path(data).expanduser()
    if data in NAMED:
        for name, digest in zip(IDX, NAMED[data][1]):
            urls = [f"{url}{name}.gz" for url in NAMED[data][0]]
            path = download(f"{data}/{name}.gz", urls, digest, args.cache).parent
    if not data or data not in ("faces", *NAMED) and not path.exists():
        raise UserError(f"--data {data}: no such file or folder, nor one of the names faces, "
                        f"cifar10, {', '.join(NAMED)}")
    try:
        idx = {p.name.removesuffix(".gz").replace(".idx", "-idx"): p for p in path.glob("*ubyte*")}
        if data == "faces":
            parts = draw_faces(50_000, args.size)
        elif path.name.lower().endswith((".tar.gz", ".tgz")):
            parts = read_cifar10(path)
        elif IDX[0] in idx:
            parts = [read_idx(idx[name]) if name in idx else None for name in IDX]
        elif path.suffix.lower() == ".npy":
            parts = [np.array(np.lib.format.open_memmap(path, mode="r"))]
        else:
            parts = [read_pictures(path, args.size)]
        x, y, x_test, y_test = *parts, *[None] * (4 - len(parts))
        x, x_test = (v if v is None else as_pictures(v) for v in (x, x_test))
        if x_test is None and len(x) < 2:
            raise ValueError("two pictures at least, the last tenth is held out")
        if x_test is None:
            cut = len(x) - max(1, len(x) // 10)
            x, x_test, y, y_test = x[:cut], x[cut:], *((y, y) if y is None else (y[:cut], y[cut:]))
        y, y_test = (v if v is None else torch.as_tensor(v) for v in (y, y_test))
        labels = [v if v is None else len(v) for v in (y, y_test)]
        if x.shape[1:] != x_test.shape[1:] or labels not in ([None] * 2, [len(x), len(x_test)]):
            raise ValueError("training and held-out pictures differ in size, or labels lack")
    except Exception as error:  # numpy, gzip, tarfile and Pillow raise two dozen kinds
        if isinstance(error, (UserError, MemoryError)) or "allocate" in str(error):
            raise
        raise UserError(f"--data {data}: damaged, or not what it seems to be: "
                        f"{str(error) or type(error).__name__}") from None
    if "size" in args.given and x.shape[-1] != args.size:
        raise UserError(f"--size {args.size}: these pictures have {x.shape[-1]} px, and only faces "
                        "and folders of pictures come in any size")
    if state and state["shape"] != tuple(x.shape):
        raise UserError(f"--data {data}: {tuple(x.shape)}, but the checkpoint was made on pictures "
                        f"{state['shape']}")
    say(f"{data}: {len(x):,} pictures {tuple(x.shape[1:])} to train on, {len(x_test):,} held out")
    x, x_test = x.to(device).contiguous(), x_test.to(device).contiguous()
    return x, x_test, *(y if y is None else y.to(device) for y in (y, y_test))


def as_pictures(a: np.ndarray | Tensor) -> Tensor:
    """uint8 (N, H, W) or (N, H, W, 1 or 3) -> (N, C, H, W). Raises ValueError for anything else."""
    shape = (*a.shape, 1) if a.ndim == 3 else a.shape
    one_picture = a.ndim == 3 and shape[2] in (1, 3)
    if not str(a.dtype).endswith("uint8") or len(shape) != 4 or shape[3] not in (1, 3) \
            or 0 in shape or one_picture:
        raise ValueError(f"{a.dtype} {tuple(a.shape)}; uint8 (N, H, W) or (N, H, W, 1 or 3) goes")
    return torch.as_tensor(a).reshape(shape).permute(0, 3, 1, 2)


def read_idx(path: Path) -> np.ndarray:
    """The bytes of an idx or idx.gz file, in its shape. Raises ValueError, or as gzip does."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        head = file.read(4)
        shape = np.frombuffer(file.read(4 * head[3]), ">u4").tolist()
        body = bytearray(file.read(math.prod(shape)))
        if head[:3] != b"\0\0\x08" or len(body) < math.prod(shape) or file.read(1) \
                or f"idx{len(shape)}" not in path.name:
            raise ValueError(f"{path} is no whole idx file of bytes")
    return np.frombuffer(body, np.uint8).reshape(shape)


def read_cifar10(path: Path) -> list[np.ndarray]:
    """CIFAR-10's binary archive, member by member, nothing extracted: x, y, x_test, y_test."""
    with tarfile.open(path, "r:gz") as tar:
        rows = {Path(m.name).name: np.frombuffer(bytearray(tar.extractfile(m).read()), np.uint8)
                .reshape(-1, 3073) for m in tar if m.isfile() and m.name.endswith(".bin")
                and m.size <= 10_000 * 3073}
    train = np.concatenate([rows[f"data_batch_{k}.bin"] for k in range(1, 6)])
    return [part for a in (train, rows["test_batch.bin"]) for part in
            (a[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), a[:, 0])]


def read_pictures(folder: Path, size: int) -> np.ndarray:
    """The pictures below `folder`, by name, the middle square resized: uint8 (N, H, W) or RGB.

    16 bits become 8, what is transparent white. A run's own folder, with its log.csv, is no data.
    """
    files, total, seen = [], 0, set()
    for here, inner, names in os.walk(folder, followlinks=True):
        if os.path.realpath(here) in seen or "log.csv" in names:
            inner.clear()
            continue
        seen.add(os.path.realpath(here))  # links may lead round in a circle
        total += len(names)
        files += [Path(here, name) for name in names if name.lower().endswith(PICTURES)]
    if not files:
        raise ValueError("neither .npy nor .tar.gz, nor a folder with train-images-idx3-ubyte or "
                         f"{' '.join(PICTURES)}")
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError("a folder of pictures is read by Pillow: pip install pillow") from None

    def read(file: Path) -> np.ndarray | None:
        try:
            picture = ImageOps.exif_transpose(Image.open(file))
            if picture.mode[0] in "IF":  # more than 8 bits a pixel
                grey = np.asarray(picture)
                if grey.dtype.kind not in "iu" or not 0 <= grey.min() <= grey.max() < 2**16:
                    raise ValueError("neither 8 nor 16 bits a pixel")
                picture = Image.fromarray((grey >> 8).astype(np.uint8))
            if picture.mode.endswith(("A", "a")) or "transparency" in picture.info:
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture.convert("RGBA"))
            picture = ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
            return np.asarray(picture)
        except Exception as error:  # one bad file, whatever Pillow says of it, costs no folder
            say(f"{file}: left out, damaged: {error}")

    with ThreadPoolExecutor() as pool:
        x = [picture for picture in pool.map(read, sorted(files)) if picture is not None]
    if not x:
        raise ValueError("none of its pictures can be read")
    if len(x) < total:
        say(f"{total - len(x)} of {total} files are damaged, or none of {' '.join(PICTURES)}")
    x = np.stack(x)
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


# === shared: judge ===
@torch.no_grad()
def judge(samples: Tensor, train: Tensor, held_out: Tensor, seed: int) -> dict[str, float | None]:
    """How near samples are to the data; `..._floor`: as many held-out pictures in their place.

    All uint8 (N, C, H, W). In the first 50 principal components of 10,000 training pictures, pixels
    in [-1, 1]: `frechet`, the distance of the two Gaussians (not FID, which needs a trained
    network); `precision`, samples that lie in a training picture's ball, and `recall`, the reverse
    (Kynkaanniemi et al. 2019: as many of each, balls to the third neighbour). `sharpness`: mean
    gradient over that of the training pictures. None where there are too few to tell.
    """
    g = generator("cpu", seed, 0, 10)
    real, floor = (x[torch.randperm(len(x), generator=g)[:most].to(x.device)]
                   for x, most in ((train, 10_000), (held_out, len(samples))))
    mean = sum(piece.sum(0) for piece in in_pieces(real)) / len(real)
    basis = torch.randn(len(mean), min(100, len(mean)), generator=g, dtype=mean.dtype).to(mean)
    for _ in range(8):  # subspace iteration: what lies beyond the 100th component fades away
        basis = torch.linalg.qr(sum((piece - mean).mT @ ((piece - mean) @ basis)
                                    for piece in in_pieces(real)))[0]

    def project(x: Tensor) -> Tensor:
        return torch.cat([(piece - mean) @ basis for piece in in_pieces(x)])

    var, turn = torch.linalg.eigh(torch.atleast_2d(project(real).mT.cov(correction=0)))
    basis, var = basis @ turn[:, -50:], var[-50:].clamp(min=0)
    near, steep, metrics = project(real[:len(samples)]), gradient(real), {}
    for x, name in ((samples, ""), (floor, "_floor")):
        y, enough = project(x), min(len(x), len(near)) > 3
        metrics |= {f"frechet{name}": frechet(y, var) if len(x) > 1 else None,
                    f"precision{name}": covered(y, near) if enough else None,
                    f"recall{name}": covered(near, y) if enough else None,
                    f"sharpness{name}": gradient(x) / steep if steep else None}
    return metrics


def in_pieces(x: Tensor) -> Iterator[Tensor]:
    """Pixels in [-1, 1], (n, CHW), float64, which TF32 leaves alone; so that memory stays small."""
    return (piece.flatten(1).double() / 127.5 - 1 for piece in x.split(256))


def frechet(y: Tensor, var: Tensor) -> float:
    """|m|^2 + tr(C + V - 2 (V^.5 C V^.5)^.5), from rows y with mean m, covariance C, to N(0, V)."""
    cov, root = torch.atleast_2d(y.mT.cov()), var.sqrt()
    cross = torch.linalg.eigvalsh(root[:, None] * cov * root).clamp(min=0).sqrt().sum()
    return (y.mean(0).square().sum() + cov.trace() + var.sum() - 2 * cross).item()


def covered(y: Tensor, by: Tensor) -> float:
    """The share of rows y in the ball of a row of `by` that reaches to its third neighbour."""
    radius = torch.cat([torch.cdist(piece, by).kthvalue(4).values for piece in by.split(256)])
    hits = [(torch.cdist(piece, by) <= radius).any(1) for piece in y.split(256)]
    return torch.cat(hits).double().mean().item()  # the fourth: each row is nearest to itself


def gradient(x: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels, down and across."""
    sums = [piece.float().diff(dim=d).abs().mean((1, 2, 3)).sum()
            for piece in x.split(256) for d in (2, 3)]
    return torch.stack(sums).sum().item() / len(x)
# === end shared ===


# ---- main ----

def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse_args(argv)
    return run(sample_only if args.sample_only else train, args, check_flags)


if __name__ == "__main__":
    sys.exit(main())
