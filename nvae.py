# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy"]
# ///
"""NVAE: latents in groups, one after another, from coarse to fine; a VAE that need not blur.

Post    强大的NVAE：以后再也不能说VAE生成的图像模糊了   https://kexue.fm/archives/7574 (read 2026-11)
        It tells of Vahdat & Kautz 2020 (arXiv 2007.03898), "the paper" here; their code, whose
        licence forbids derived works, was not opened for this.

Map     7574 (1)   E_x [ E_{z~p(z|x)} [-log q(x|z)] + KL(p(z|x) || q(z)) ]          loss
        7574 (2)   q(z) = prod_l q(z_l|z_<l),  p(z|x) = prod_l p(z_l|z_<l, x)       top_down
        7574 (3)   KL(p(z|x) || q(z)) = KL_1 + sum_{l>1} E_{p(z_<l|x)} [KL_l]       kl_terms
        7574 (4)   q = N(mu, sigma^2),  p = N(mu + d_mu, (sigma d_sigma)^2)         relative
        7574 (5)   KL_l = 1/2 sum_i (d_mu^2/sigma^2 + d_sigma^2 - log d_sigma^2 - 1) kl_relative
        7574 (6)   (4 8^2 + 4 16^2 + 4 32^2 + 8 64^2 + 16 128^2) 20 = 6005760       latent_numbers
Symbols p is the encoder's side: p(z|x), the posterior. q is the generator's: q(z) the prior, q(x|z)
        the law of pictures. Most papers, and Vahdat & Kautz, have the letters the other way round.
        d_mu, d_sigma: what x changes in mu, sigma; z_<l: the groups before l, which s stands for;
        h: the learnt feature that s begins with, as in the post's figure.
Shapes  B batch, C channels, H height, W width; L groups, z_1 the coarsest; Z latent channels of a
        group of n x n pixels. x, y: (B, C, H, W), y whole numbers 0 .. 2^bits - 1, what q(x|z) is
        a law of. eps, z, mu, sigma, d_mu, d_sigma: for each group (B, Z, n, n).

Run     python nvae.py                                # CPU: small drawn faces
        python nvae.py --data mnist --groups 3 --batch-size 16 --lr 1.5e-2 --steps 6000  # digits
        python nvae.py --gpu                          # one GPU: the same faces at 64 px
        python nvae.py --gpu --data cifar10 --paper   # the paper's CIFAR-10 row, whole
        torchrun --nproc_per_node=8 nvae.py --gpu     # the same global batch on eight
        python nvae.py --sample-only 64 --temperature 1
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
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Moments = tuple[Tensor, Tensor, Tensor, Tensor]  # mu, sigma, d_mu, d_sigma of a group


# ---- the post: 7574 ----

def relative(mu: Tensor, sigma: Tensor, d_mu: Tensor, d_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """7574 (4): mean and deviation of p(z_l|z_<l, x), told by how it differs from q(z_l|z_<l)."""
    return mu + d_mu, sigma * d_sigma  # 7574 (4)


def kl_relative(d_mu: Tensor, d_sigma: Tensor, sigma: Tensor) -> Tensor:
    """7574 (5) before its sum: KL(p(z_l|z_<l, x) || q(z_l|z_<l)) of each coordinate, in nats."""
    var = d_sigma.square()
    return ((d_mu / sigma).square() + var - var.log() - 1) / 2  # 7574 (5)


def top_down(groups: Iterable[nn.Module], h: Tensor, features: list[Tensor] | None,
             eps: list[Tensor], temperature: float = 1.0
             ) -> tuple[Tensor, list[Tensor], list[Moments]]:
    """7574 (2): z_1, ..., z_L in turn from noise eps; one path for encoder and generator alike.

    With the encoder's features, one a group, by p(z|x); without by q(z), its deviations times
    temperature. Begins at the learnt h (1, C, n, n). Returns s, which knows of all z, the z, and
    the moments of each group if there are features.
    """
    s, zs, moments = h.expand(len(eps[0]), -1, -1, -1), [], []
    for l, group in enumerate(groups):  # 7574 (2)
        s, mu, sigma = group.q(s)  # q(z_l | z_<l)
        if features is None:
            z = mu + temperature * sigma * eps[l]
        else:
            d_mu, d_sigma = group.p(s, features[l])  # p(z_l | z_<l, x)
            mean, deviation = relative(mu, sigma, d_mu, d_sigma)
            z = group.flow(mean + deviation * eps[l])  # as it is, but for --flows
            moments.append((mu, sigma, d_mu, d_sigma))
        s = group.take(s, z)
        zs.append(z)
    return s, zs, moments


def kl_terms(moments: list[Moments]) -> Tensor:
    """The terms of 7574 (3), (L, B) in nats, where z_<l came from p(z_<l|x): one draw of its E."""
    return torch.stack([kl_relative(d_mu, d_sigma, sigma).sum((1, 2, 3))
                        for _, sigma, d_mu, d_sigma in moments])  # 7574 (3)


def loss(log_q: Tensor, kls: Tensor, weights: Tensor) -> Tensor:
    """7574 (1) without its constant, (B,) in nats: log_q (B,) is log q(x|z), kls the terms of (3).

    weights (L,): ones; less while the KL is warmed up, see kl_weight and balance.
    """
    return -log_q + weights @ kls  # 7574 (1)


def group_counts(scales: int, groups: int, least: int) -> list[int]:
    """How many groups each scale has, the finest first: half as many a scale on, `least` if more.

    The post's last section: FFHQ's 16, 8, 4, 4, 4 from 16 groups, least 4.
    """
    return [max(groups >> k, least) for k in range(scales)]


def latent_numbers(counts: list[int], side: int, latent: int) -> int:
    """7574 (6): how many numbers z has: groups of `latent` channels, the finest of side x side."""
    return sum(n * (side >> k) ** 2 for k, n in enumerate(counts)) * latent  # 7574 (6)


def spectral_norms(convs: list["Conv"], iterations: int) -> Tensor:
    """The largest singular value of each kernel as a matrix (outputs, rest): the post's 谱正则化.

    Power iteration in float32 goes on from where it was, conv.u; kernels of one shape at once. The
    gradient is u v^T.
    """
    alike, norms = {}, []
    for conv in convs:
        alike.setdefault(conv.weight.shape, []).append(conv)
    for same in alike.values():
        w = torch.stack([conv.kernel().flatten(1) for conv in same])  # (n, outputs, rest)
        with torch.no_grad():
            u = torch.stack([conv.u for conv in same])
            for _ in range(iterations):
                v = F.normalize(torch.einsum("nor,no->nr", w, u), dim=1)
                u = F.normalize(torch.einsum("nor,nr->no", w, v), dim=1)
            torch._foreach_copy_([conv.u for conv in same], list(u))
        norms.append(torch.einsum("no,nor,nr->n", u, w, v))
    return torch.cat(norms)


def penalty(convs: list["Conv"], gammas: list[Tensor], iterations: int) -> Tensor:
    """What keeps the KL from blowing up: all spectral norms, and the size of BatchNorm's gamma."""
    # departs: the largest |gamma| of a layer, as the paper; the post says its norm
    return spectral_norms(convs, iterations).sum() + sum(gamma.abs().max() for gamma in gammas)


@torch.no_grad()
def reestimate(net: "NVAE", batches: Iterable[list[Tensor]], temperature: float) -> None:
    """Sets BatchNorm's averages for the generator from batches of its own pictures, noise given.

    The post: those kept while training are poor. Each batch is normalised by its own moments; the
    average over batches stays. Without batches nothing changes; one picture a batch will do.
    """
    sums = {}  # of the moments that a layer has met; the encoder's layers meet none

    def look(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        var, mean = torch.var_mean(inputs[0].float(), (0, 2, 3), correction=0)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
        sums[layer] = sums.get(layer, 0) + torch.stack([mean, var])

    hooks = [m.register_forward_pre_hook(look) for m in net.modules() if isinstance(m, BatchNorm)]
    for count, eps in enumerate(batches, start=1):
        net.generate(eps, temperature)
    for layer, total in sums.items():
        layer.running_mean.copy_(total[0] / count)
        layer.running_var.copy_(total[1] / count)
    for hook in hooks:
        hook.remove()


# ---- beyond the post: how the KL is weighed, laws of pictures, the importance bound ----

def kl_weight(step: int, steps: int, warmup: float) -> float:
    """1e-4 at first, 1 once the share `warmup` of all steps is over: Vahdat & Kautz 2020."""
    return min(1.0, max(1e-4, (step / steps - 1e-4) / max(warmup, 1e-9)))


def balance(kls: Tensor, areas: Tensor) -> Tensor:
    """Coefficients (L,) of mean 1 for the KLs' means (L,): more for a group that says much already.

    areas (L,): pixels of a group's scale over groups of that scale. Used while kl_weight is below
    1, so that no group dies before the others let it speak; no gradient flows through it.
    """
    share = (kls.detach().abs() + 0.01) / areas
    return share / share.mean()


class Bernoulli:
    """q(x|z) of binarised pictures: out (B, 1, H, W) are logits."""

    def __init__(self, out: Tensor):
        self.logits = out

    def log_prob(self, y: Tensor) -> Tensor:
        """log q(y|z), (B,), of y in {0, 1}."""
        each = F.binary_cross_entropy_with_logits(self.logits, y.float(), reduction="none")
        return -each.sum((1, 2, 3))

    def mean(self) -> Tensor:
        """Pictures (B, 1, H, W) in [-1, 1]."""
        return 2 * self.logits.sigmoid() - 1

    def sample(self, g: torch.Generator) -> Tensor:
        """Pictures of -1 and 1."""
        u = torch.rand(self.logits.shape, generator=g, device=self.logits.device)
        return (u < self.logits.sigmoid()).float() * 2 - 1


class DiscretizedLogisticMixture:
    """q(x|z) of colour pictures of 2^bits levels, set evenly on [-1, 1]: Salimans et al. 2017.

    out (B, 10 M, H, W): M logits, then means, log-scales and coefficients, three channels each. A
    component's green and blue have their means shifted by the levels of the channels before.
    """

    def __init__(self, out: Tensor, bits: int, floor: Tensor | float):
        logits, rest = out.unflatten(1, (10, -1)).split([1, 9], dim=1)
        self.log_pi = logits[:, 0].log_softmax(1)  # (B, M, H, W)
        self.mu, self.log_s, c = rest.unflatten(1, (3, 3)).unbind(1)  # (B, 3, M, H, W) each
        self.log_s, self.c = self.log_s.clamp(max=5).clamp(min=floor), c.tanh()  # e^89 overflows
        self.top = 2 ** bits - 1  # the highest level

    def means(self, r: Tensor, g: Tensor) -> Tensor:
        """Of all three channels, given red and green in [-1, 1], with or without components."""
        (mr, mg, mb), (c0, c1, c2) = self.mu.unbind(1), self.c.unbind(1)
        return torch.stack([mr, mg + c0 * r, mb + c1 * r + c2 * g], 1)

    def log_prob(self, y: Tensor) -> Tensor:
        """log q(y|z), (B,): exact masses of the bins, the outer ones open, so that all sum to 1."""
        x = (2 * y.to(self.mu) / self.top - 1)[:, :, None]  # (B, 3, 1, H, W)
        s, half = self.log_s.exp(), 1 / self.top
        away = x - self.means(x[:, 0], x[:, 1])
        a, b = (away + half) / s, (away - half) / s  # the bin's ends
        low, high = F.logsigmoid(a), F.logsigmoid(-b)  # all below a; all above b
        inner = low + high + torch.log(-torch.expm1(-2 * half / s))
        y = y[:, :, None]
        mass = torch.where(y == 0, low, torch.where(y == self.top, high, inner))
        return (self.log_pi + mass.sum(1)).logsumexp(1).sum((1, 2))

    def mean(self) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1]: each pixel's mean, which has no noise of its own."""
        r = self.mu[:, 0]
        x = self.means(r, self.mu[:, 1] + self.c[:, 0] * r)
        return (self.log_pi.exp()[:, None] * x).sum(2).clamp(-1, 1)

    def sample(self, g: torch.Generator) -> Tensor:
        """Pictures (B, 3, H, W) of the 2^bits levels in [-1, 1]."""
        def uniform(like: Tensor) -> Tensor:
            return torch.rand(like.shape, generator=g, device=like.device).clamp(1e-6, 1 - 1e-6)

        k = (self.log_pi - (-uniform(self.log_pi).log()).log()).argmax(1, keepdim=True)
        x, u = torch.zeros_like(self.mu[:, :, 0]), uniform(self.mu[:, :, 0])  # (B, 3, H, W)
        for c in range(3):  # the mean of each needs those before
            mu = self.means(x[:, :1], x[:, 1:2])[:, c].gather(1, k)[:, 0]
            value = mu + self.log_s[:, c].exp().gather(1, k)[:, 0] * u[:, c].logit()
            level = ((value + 1) / 2 * self.top).round().clamp(0, self.top)
            x[:, c] = 2 * level / self.top - 1
        return x


Law = Bernoulli | DiscretizedLogisticMixture


def bits_per_dim(nats: float, dims: int) -> float:
    """Nats a picture as bits a number of it."""
    return nats / (dims * math.log(2))


def kl_draws(zs: list[Tensor], eps: list[Tensor], moments: list[Moments]) -> Tensor:
    """log p(z_l|z_<l, x) - log q(z_l|z_<l), (L, B): the terms of (3) by the draw z of eps alone.

    p's density is that of eps over the deviation sigma d_sigma, for a Flow leaves volumes alone.
    """
    terms = [((z - mu) / sigma).square() / 2 - e.square() / 2 - d_sigma.log()
             for z, e, (mu, sigma, _, d_sigma) in zip(zs, eps, moments)]
    return torch.stack([term.sum((1, 2, 3)) for term in terms])


@torch.no_grad()
def importance_bound(net: "NVAE", y: Tensor, K: int, g: torch.Generator) -> Tensor:
    """-log 1/K sum_k q(x|z_k) q(z_k) / p(z_k|x), (B,) in nats, an upper bound of -log q(x).

    Burda et al. 2015; every z_k is drawn anew from p(z|x), all its groups. K = 1: (1), by one draw.
    """
    features, log_w = net.encode(y), []
    for _ in range(K):
        eps = net.noise(len(y), g)
        s, zs, moments = top_down(net.groups, net.h, features, eps)
        log_w.append(net.law(s).log_prob(y) - kl_draws(zs, eps, moments).sum(0))
    return math.log(K) - torch.stack(log_w).logsumexp(0)


# ---- model ----

class Conv(nn.Conv2d):
    """A convolution; normed: of kernel exp(log_norm) w / |w| for each output, and with a bias.

    kernel = stride takes patches. u: the vector of the power iteration, kept in the checkpoint.
    mask: where w may differ from zero.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1,
                 normed: bool = True, mask: Tensor | None = None):
        super().__init__(inputs, outputs, kernel, stride, 0 if kernel == stride else kernel // 2,
                         groups=groups, bias=normed)
        self.register_buffer("mask", mask, persistent=False)
        self.log_norm = None
        if normed:
            norm = torch.linalg.vector_norm(self.kernel().detach(), dim=(1, 2, 3), keepdim=True)
            self.log_norm = nn.Parameter(norm.log())
        self.register_buffer("u", F.normalize(torch.randn(outputs), dim=0))

    def kernel(self) -> Tensor:
        w = self.weight if self.mask is None else self.weight * self.mask
        if self.log_norm is None:
            return w
        norm = torch.linalg.vector_norm(w, dim=(1, 2, 3), keepdim=True)
        return w * (self.log_norm.exp() / norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(), self.bias, self.stride, self.padding, groups=self.groups)


MOMENTUM = 0.05  # share of a batch in BatchNorm's running averages


def batch_norm(channels: int) -> nn.Module:
    return BatchNorm(channels, momentum=MOMENTUM)


class SE(nn.Module):
    """Squeeze and excite, (B, C, h, w): each channel times a gate in (0, 1) by all means."""

    def __init__(self, channels: int):
        super().__init__()
        few = max(channels // 16, 4)
        self.gate = nn.Sequential(nn.Linear(channels, few), nn.ReLU(), nn.Linear(few, channels),
                                  nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3)))[:, :, None, None]


class Halve(nn.Module):
    """The skip of a cell that halves: swish, then a 1x1 convolution for each of a pixel's four
    phases, side by side. (B, C, h, w) -> (B, outputs, h/2, w/2)"""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.phases = nn.ModuleList(Conv(inputs, outputs // 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(x)
        return torch.cat([conv(x[:, :, k // 2::2, k % 2::2])
                          for k, conv in enumerate(self.phases)], 1)


class Cell(nn.Module):
    """skip(x) + factor * SE(branch(x)), the residual cell of both towers; may forget what is within
    and compute it again for the gradient, which spares memory."""

    def __init__(self, branch: list[nn.Module], skip: nn.Module, outputs: int, factor: float,
                 forget: bool):
        super().__init__()
        self.branch, self.skip = nn.Sequential(*branch, SE(outputs)), skip
        self.factor, self.forget = factor, forget

    def inner(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.factor * self.branch(x)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.forget and self.training):
            return self.inner(x)
        # a compiled graph changes BatchNorm's averages once, however often it computes a cell
        how = {} if torch.compiler.is_compiling() else \
            dict(context_fn=lambda: (nullcontext(), self.again()))
        return checkpoint(self.inner, x, use_reentrant=False, preserve_rng_state=False, **how)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, BatchNorm's running averages, which have seen this batch, stay as they are."""
        layers = [m for m in self.modules() if isinstance(m, BatchNorm)]
        for layer in layers:
            layer.momentum = 0.0
        try:
            yield
        finally:  # torch leaves by an exception as soon as it has what it needs
            for layer in layers:
                layer.momentum = MOMENTUM


def encoder_cell(inputs: int, outputs: int, factor: float, forget: bool) -> Cell:
    """(BN, swish, 3x3 convolution) twice; with other outputs than inputs, half the size."""
    same = inputs == outputs
    branch = [batch_norm(inputs), nn.SiLU(), Conv(inputs, outputs, 3, 1 if same else 2),
              batch_norm(outputs), nn.SiLU(), Conv(outputs, outputs, 3)]
    return Cell(branch, nn.Identity() if same else Halve(inputs, outputs), outputs, factor, forget)


def decoder_cell(inputs: int, outputs: int, expand: int, factor: float, forget: bool) -> Cell:
    """BN, 1x1 to expand * inputs, BN, swish, 5x5 on each channel, BN, swish, 1x1, BN; with other
    outputs than inputs, twice the size, by nearest neighbours, the skip by bilinear ones."""
    same, wide = inputs == outputs, expand * inputs
    branch = [batch_norm(inputs), Conv(inputs, wide, normed=False), batch_norm(wide), nn.SiLU(),
              Conv(wide, wide, 5, groups=wide, normed=False), batch_norm(wide), nn.SiLU(),
              Conv(wide, outputs, normed=False), batch_norm(outputs)]
    skip = nn.Identity()
    if not same:
        branch = [nn.Upsample(scale_factor=2), *branch]
        skip = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), Conv(inputs, outputs))
    return Cell(branch, skip, outputs, factor, forget)


def soft_clamp(x: Tensor) -> Tensor:
    """Into (-5, 5), in float32."""
    return 5 * torch.tanh(x.float() / 5)


class Flow(nn.Module):
    """Half an autoregressive flow, (B, Z, n, n): z - shift(z), turned round for the other half.

    A number's shift depends on those before it alone, pixels in rows, a pixel's channels in turn:
    before the turn the Jacobian is triangular with ones on its diagonal, so log |det| = 0.
    """

    def __init__(self, latent: int):
        super().__init__()
        z = torch.arange(latent).view(-1, 1, 1, 1)
        h = z.repeat_interleave(6, dim=0)  # the channel of z that each hidden one is to shift
        near, far = (torch.arange(k * k).view(k, k) - k * k // 2 for k in (3, 5))  # < 0: before
        # departs: one ELU where the paper's code has two in a row
        self.shift = nn.Sequential(
            Conv(latent, len(h), 3, mask=latent * near + z.transpose(0, 1) < h), nn.ELU(),
            Conv(len(h), len(h), 5, groups=len(h), mask=far <= 0), nn.ELU(),
            Conv(len(h), latent, mask=h.transpose(0, 1) <= z))

    def forward(self, z: Tensor) -> Tensor:
        return (z - self.shift(z)).flip(1, 2, 3)


class Group(nn.Module):
    """z_l: its cells on the way from the group above, and what makes q(z_l|z_<l), p(z_l|z_<l, x).

    The first has neither cells nor a prior to learn: q(z_1) = N(0, 1).
    """

    def __init__(self, cells: list[nn.Module], channels: int, latent: int, first: bool,
                 flows: int = 0):
        super().__init__()
        self.cells, self.latent = nn.Sequential(*cells), latent
        self.prior = None if first else nn.Sequential(nn.ELU(), Conv(channels, 2 * latent))
        self.know = None if first else Conv(channels, channels)
        self.see = Conv(channels, 2 * latent, 3)
        self.merge = Conv(channels + latent, channels)
        self.flow = nn.Sequential(*(Flow(latent) for _ in range(2 * flows)))

    def q(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s on this group's side; mu and sigma of q(z_l|z_<l), each (B, Z, n, n)."""
        s = self.cells(s)
        if self.prior is None:
            mu = s.new_zeros(len(s), self.latent, *s.shape[2:], dtype=torch.float32)
            return s, mu, torch.ones_like(mu)
        mu, log_sigma = soft_clamp(self.prior(s)).chunk(2, dim=1)
        return s, mu, log_sigma.exp() + 0.01  # departs: never near 0, as the paper has it

    def p(self, s: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """d_mu and d_sigma of p(z_l|z_<l, x), from s, which knows z_<l, and the encoder's feature.

        departs: the paper clamps mu + d_mu and log(sigma d_sigma); each by itself keeps (5) exact.
        """
        known = feature if self.know is None else feature + self.know(s)
        d_mu, log_d_sigma = soft_clamp(self.see(known)).chunk(2, dim=1)
        return d_mu, log_d_sigma.exp()

    def take(self, s: Tensor, z: Tensor) -> Tensor:
        return self.merge(torch.cat([s, z.to(s.dtype)], 1))


class NVAE(nn.Module):
    """Encoder, groups and law of pictures (B, channels, size, size); x meets them by z alone.

    The stem: `stem` blocks of `stem_cells` cells, the last of which halves the size; or, departs:
    with patch > 1, patches of patch x patch pixels for one, far cheaper. width: channels after it,
    doubled by each halving. Pictures are padded in black to a size that halves evenly.
    """

    def __init__(self, channels: int, size: int, width: int, scales: int, groups: int,
                 min_groups: int, latent: int, cells: int, expand: int, stem: int, stem_cells: int,
                 patch: int, factor: float, bits: int, mixtures: int, forget: bool, flows: int):
        super().__init__()
        grey, counts = channels == 1, group_counts(scales, groups, min_groups)
        spare = -size % (patch << stem + scales - 1)
        self.border = (spare // 2, spare - spare // 2) * 2  # of black pixels
        self.inside = slice(spare // 2, spare // 2 + size)
        fine = (size + spare) // (patch << stem)
        scale = [k for k in range(scales) for _ in range(counts[k])][::-1]  # of z_1, ..., z_L
        self.shapes = [(latent, fine >> k, fine >> k) for k in scale]
        self.bits = 1 if grey else bits
        encode = functools.partial(encoder_cell, factor=factor, forget=forget)
        decode = functools.partial(decoder_cell, factor=factor, forget=forget)

        self.stem = nn.Sequential(Conv(channels, width, patch, patch) if patch > 1 else
                                  Conv(channels, width, 3))
        post, c = [], width  # c: the channels where we are
        for _ in range(stem):
            self.stem.extend([*(encode(c, c) for _ in range(stem_cells - 1)), encode(c, 2 * c)])
            post = [decode(2 * c, c, 3), *(decode(c, c, 3) for _ in range(stem_cells - 1)), *post]
            c *= 2
        post = post or [decode(c, c, 3) for _ in range(stem_cells)]

        widths = [c << k for k in scale]  # c: the finest scale's channels
        self.tower = nn.ModuleList()  # a part for each group, from the finest up to z_1
        for below, here in itertools.pairwise([c, *widths[::-1]]):
            halve = [encode(below, here)] if below < here else []
            self.tower.append(nn.Sequential(*halve, *(encode(here, here) for _ in range(cells))))
        top = widths[0]  # z_1's
        self.top = nn.Sequential(nn.ELU(), Conv(top, top), nn.ELU())
        self.h = nn.Parameter(torch.randn(1, top, *self.shapes[0][1:]))
        self.groups = nn.ModuleList([Group([], top, latent, True, flows)])  # from z_1 down
        for above, here in itertools.pairwise(widths):
            double = [decode(above, here, expand)] if above > here else []
            path = [*double, *(decode(here, here, expand) for _ in range(cells))]
            self.groups.append(Group(path, here, latent, False, flows))

        last = Conv(width, (1 if grey else 10 * mixtures) * patch ** 2, 3 if patch == 1 else 1)
        self.post = nn.Sequential(*post, nn.ELU(), last, nn.PixelShuffle(patch))
        self.register_buffer("floor", torch.tensor(0.0))  # of log-scales; train lets it fall
        areas = torch.tensor([(fine >> k) ** 2 / counts[k] for k in scale])
        self.register_buffer("areas", areas, persistent=False)
        if not grey:
            with torch.no_grad():  # departs: begins with narrow scales, and means that differ
                last.log_norm -= 1.2
                bias = last.bias.view(10, mixtures, -1)
                bias[1:4] = torch.linspace(-0.5, 0.5, mixtures + 2)[1:-1, None]
                bias[4:7] = -1.5

    def noise(self, count: int, g: torch.Generator) -> list[Tensor]:
        """eps of all groups, each (count, Z, n, n)."""
        return [torch.randn((count, *shape), generator=g, device=g.device)
                for shape in self.shapes]

    def encode(self, y: Tensor) -> list[Tensor]:
        """The features that p(z_1|x), p(z_2|z_1, x), ... see, the top's first."""
        x = F.pad(2 * y.float() / (2 ** self.bits - 1) - 1, self.border, value=-1.0)
        feature, features = self.stem(x), []
        for part in self.tower:
            feature = part(feature)
            features.append(feature)
        features[-1] = self.top(features[-1])
        return features[::-1]

    def law(self, s: Tensor) -> Law:
        """q(x|z) from what s knows of z, in float32."""
        out = self.post(s).float()[:, :, self.inside, self.inside]
        return Bernoulli(out) if self.bits == 1 else \
            DiscretizedLogisticMixture(out, self.bits, self.floor)

    def forward(self, y: Tensor, eps: list[Tensor]) -> tuple[Law, Tensor]:
        """q(x|z) at z drawn from p(z|x) by eps, and the terms of (3), by this draw if z flows."""
        s, zs, moments = top_down(self.groups, self.h, self.encode(y), eps)
        flows = len(self.groups[0].flow)
        return self.law(s), kl_draws(zs, eps, moments) if flows else kl_terms(moments)

    def generate(self, eps: list[Tensor], temperature: float) -> Law:
        """q(x|z) at z drawn from q(z) by eps."""
        return self.law(top_down(self.groups, self.h, None, eps, temperature)[0])


# ---- evaluation ----

def levels(x: Tensor, bits: int, g: torch.Generator) -> Tensor:
    """Bytes as what q(x|z) is a law of: their upper bits; one bit is drawn, white as the grey."""
    if bits == 1:
        return (torch.rand(x.shape, generator=g, device=x.device) * 255 < x).to(torch.uint8)
    return x >> (8 - bits)


@torch.no_grad()
def held_out(net: NVAE, x: Tensor, args: argparse.Namespace) -> tuple[dict, Tensor, Tensor]:
    """The numbers of held-out pictures x, by the net with its running averages; the first few of
    x as the net saw them, and made again from their z."""
    g, sums, again, seen = generator(x.device, args.seed, 0, 1), 0, [], []
    for part in watch(x.split(args.samples), -(-len(x) // args.samples), "held out"):
        y = levels(part, net.bits, g)
        law, kls = net(y, net.noise(len(y), g))
        terms = [-law.log_prob(y)[None], kls, importance_bound(net, y, args.importance, g)[None]]
        sums = sums + torch.cat(terms).double().sum(1)
        seen.append(to_uint8(2 * y.float() / (2 ** net.bits - 1) - 1))
        again.append(to_uint8(law.mean()))
    means, seen, again = (sums / len(x)).tolist(), torch.cat(seen), torch.cat(again)
    elbo, bound, dims = sum(means[:-1]), means[-1], x[0].numel()
    error = (seen.double() - again).square().mean().sqrt().item()
    return dict(
        elbo_nats=elbo, importance_nats=bound, importance_samples=args.importance,
        elbo_bits_per_dim=bits_per_dim(elbo, dims), reconstruction_nats=means[0],
        importance_bits_per_dim=bits_per_dim(bound, dims), kl_by_group=means[1:-1],
        reconstruction_rmse=error, test_images=len(x)), seen[:12], again[:12]


def sampler(net: NVAE, temperature: float, args: argparse.Namespace) -> NVAE:
    """A copy of the net whose BatchNorm statistics are estimated anew, at this temperature."""
    net, g = copy.deepcopy(net), generator(net.h.device, args.seed, 0, 3)
    reestimate(net, (net.noise(args.batch_size, g) for _ in range(args.bn_batches)), temperature)
    if args.compile:
        net.generate = torch.compile(net.generate)
    return net


@torch.no_grad()
def draw_pictures(net: NVAE, count: int, temperature: float, args: argparse.Namespace) -> Tensor:
    """`count` pictures (C, H, W), uint8, of --sample-seed's noise; --samples at a time."""
    net, pictures = sampler(net, temperature, args), []
    for first in range(0, count, args.samples):
        g = generator(net.h.device, args.sample_seed, first, 2)
        law = net.generate(net.noise(min(args.samples, count - first), g), temperature)
        pictures.append(to_uint8(law.sample(g) if args.draw_pixels else law.mean()))
    return torch.cat(pictures)


@torch.no_grad()
def coarse_to_fine(net: NVAE, temperature: float, args: argparse.Namespace) -> Tensor:
    """(L, 8, C, H, W): row l keeps z_<l of the first picture, and draws z_l and all below anew."""
    net, g = sampler(net, temperature, args), generator(net.h.device, args.seed, 0, 4)
    fresh, rows = net.noise(8, g), []
    for l in range(len(fresh)):
        kept = [eps[:1].expand_as(eps) for eps in fresh[:l]]
        rows.append(to_uint8(net.generate([*kept, *fresh[l:]], temperature).mean()))
    return torch.stack(rows)


def report(ema: NVAE, x: Tensor, x_test: Tensor, args: argparse.Namespace) -> dict:
    """Writes samples.png, temperatures.png (.6, .7, ... 1, a row each), reconstructions.png,
    coarse_to_fine.png, nearest.png; returns the numbers for metrics.json. ema in eval mode."""
    out, t = Path(args.out), args.temperature
    order = torch.randperm(len(x_test), generator=generator("cpu", args.seed, 0, 5))
    with autocast(args):
        metrics, seen, again = held_out(ema, x_test[order[:args.test_images].to(x.device)], args)
        begin = time.perf_counter()
        pictures = draw_pictures(ema, max(args.samples, args.judge), t, args)
        metrics |= dict(samples=len(pictures), temperature=t,
                        sample_seconds=time.perf_counter() - begin)
        rows = [draw_pictures(ema, args.samples, k / 10, args)[:12] for k in range(6, 11)]
        by_group = coarse_to_fine(ema, t, args)
    few = pictures[:12]
    write_png(out / "samples.png", grid(pictures[:args.samples], math.isqrt(args.samples)))
    write_png(out / "temperatures.png", grid(torch.cat(rows), len(rows[0])))
    write_png(out / "reconstructions.png", grid(torch.cat([seen, again]), len(seen)))
    write_png(out / "coarse_to_fine.png", grid(by_group.flatten(0, 1), 8))
    write_png(out / "nearest.png", grid(torch.cat([few, nearest(few, x)]), len(few)))
    if args.judge:
        metrics |= judge(pictures[:args.judge], x, x_test, args.seed)
    return metrics


# ---- training ----
# Random streams, none used twice: torch.manual_seed(seed) the first weights; generator's keys are
# (seed, step) noise, mirrors and levels of a step; (sample_seed, first, 2) the samples from `first`
# on; (seed, 0, 1) levels and noise of held-out pictures, 3 of BatchNorm's batches, 4 of
# coarse_to_fine, 5 which pictures are held out; and in the plumbing (seed, epoch, 9) the order,
# (seed, 0, 10) the judge, (0,) the faces.

def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that do not go together, once --resume has had its say."""
    for wrong, why in (
            (args.ema >= 1, "--ema: below 1"),
            (max(args.warmup, args.kl_warmup) > 1, "--warmup, --kl-warmup: shares of all steps"),
            (args.bits > 8, "--bits: 2 to 8"),
            (args.width % 4, "--width: a multiple of 4, for the four phases of a pixel"),
            (args.patch > 1 and args.stem, "--stem: --patch 1; one of them makes pictures small")):
        if wrong:
            raise UserError(why)


def load_data(args: argparse.Namespace, device: torch.device,
              state: dict | None) -> tuple[Tensor, Tensor]:
    """Pictures to train on and held-out ones, uint8 (N, C, H, W) on the device."""
    x, x_test, _, _ = load_images(args, state, device)
    if x.shape[2] != x.shape[3]:
        raise UserError(f"--data {args.data}: {tuple(x.shape[2:])}: squares are needed")
    idle = sorted({"bits", "mixtures", "floor", "first_floor"} & args.given)
    if x.shape[1] == 1 and idle:
        raise UserError(f"--{', --'.join(idle).replace('_', '-')}: of colours; --data {args.data} "
                        "is grey")
    return x, x_test


def build(args: argparse.Namespace, channels: int, size: int, device: torch.device) -> NVAE:
    """The network that the flags describe, on the device."""
    torch.manual_seed(args.seed)
    net = NVAE(channels, size, args.width, args.scales, args.groups, args.min_groups, args.latent,
               args.cells, args.expand, args.stem, args.stem_cells, args.patch, args.factor,
               args.bits, args.mixtures, args.forget, args.flows)
    # fastest on a CPU: channels last; on a GPU torch's own depthwise kernels take them first
    layout = torch.contiguous_format if args.gpu else torch.channels_last
    return net.to(device, memory_format=layout)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine to 1e-4. departs: by steps, the paper's falls by epochs."""
    begin, last = args.warmup * args.steps, min(1e-4, args.lr)
    if step < begin:
        return args.lr * (step + 1) / (begin + 1)
    way = (step - begin) / max(args.steps - begin, 1)
    return last + (args.lr - last) * (1 + math.cos(math.pi * way)) / 2


def lowest_scale(step: int, args: argparse.Namespace) -> float:
    """The floor of the mixture's log-scales. departs: falls from --first-floor, for 60 % of steps.

    Low from the start, the flat areas of drawn faces own the gradient, and eyes stay white.
    """
    way = min(1.0, step / (0.6 * args.steps))
    return args.first_floor + (args.floor - args.first_floor) * way


def train(args: argparse.Namespace, device: torch.device, state: dict | None) -> None:
    """The whole run: data, loop, checkpoints, pictures, metrics.json."""
    x, x_test = load_data(args, device, state)
    net = build(args, *x.shape[1:3], device)
    if args.batch_size * net.shapes[0][1] ** 2 < 2:
        raise UserError("--batch-size 1: BatchNorm needs two numbers of a channel at least, and "
                        "z_1 has one pixel: --batch-size 2, or fewer --scales")
    ema = copy.deepcopy(net).eval()
    params, live, averages = list(net.parameters()), floats(net), floats(ema)
    convs = [m for m in net.modules() if isinstance(m, Conv)]
    gammas = [m.weight for m in net.modules() if isinstance(m, BatchNorm)]
    opt = torch.optim.Adamax(params, lr=args.lr, eps=1e-3, weight_decay=3e-4)
    parts = dict(model=net, ema=ema, opt=opt)
    first = restore(state, parts)
    if args.compile:
        net.compile()
        ema.compile()
    make_room(args)
    progress = Progress(args, first, sum(p.numel() for p in params), args.batch_size, "img")
    counts = group_counts(args.scales, args.groups, args.min_groups)
    say(f"{counts} groups, the finest scale's first; of {x[0].numel():,} numbers of a picture "
        f"{latent_numbers(counts, net.shapes[-1][1], args.latent):,} are latent")

    def save(step: int, end: bool) -> None:
        save_checkpoint(args, step, parts, shape=tuple(x.shape))
        if not end and not RANK:
            with autocast(args):
                pictures = draw_pictures(ema, args.samples, args.temperature, args)
            write_png(Path(args.out) / f"samples_{step:06}.png",
                      grid(pictures, math.isqrt(args.samples)))

    for step in training(args, first, save):
        g = generator(device, args.seed, step)
        eps = [mine(e) for e in net.noise(args.batch_size, g)]
        mirror = torch.rand(args.batch_size, 1, 1, 1, generator=g, device=device) < args.flip / 2
        y = levels(x[batch_rows(len(x), step, args.batch_size, args.seed, device)], net.bits, g)
        y = mine(torch.where(mirror, y.flip(3), y))
        lr = opt.param_groups[0]["lr"] = learning_rate(step, args)
        net.floor.fill_(lowest_scale(step, args))
        with autocast(args):
            law, kls = net(y, eps)
        log_q = law.log_prob(y)
        beta, weights = kl_weight(step, args.steps, args.kl_warmup), torch.ones_like(kls[:, 0])
        if beta < 1:
            means = kls.detach().mean(1)
            average([means])
            weights = beta * balance(means, net.areas)
        value = loss(log_q, kls, weights).mean()
        if args.penalty and step % args.penalty_every == 0:  # departs: not at every step
            strength = args.penalty * args.penalty_every
            value = value + strength * penalty(convs, gammas, 4 if step else 40)
        value.backward()
        average([p.grad for p in params])
        opt.step()
        opt.zero_grad()
        update_ema(averages, live, step, args.ema)
        progress.add(step + 1, elbo=(kls.detach().sum(0) - log_q.detach()).mean(),
                     kl=kls.detach().sum(0).mean(), lr=lr)
    if RANK:
        return
    seconds, images = time.perf_counter() - progress.begin, (args.steps - first) * args.batch_size
    metrics = report(ema, x, x_test, args)
    far = [metrics.get(name) for name in ("frechet", "frechet_floor")]
    known = f"; Frechet distance {far[0]:.3g}, of held-out pictures {far[1]:.3g}" \
        if None not in far else ""
    say(f"held out: {metrics['importance_nats']:.2f} nats or "
        f"{metrics['importance_bits_per_dim']:.3f} bits per dimension by the importance bound, "
        f"K = {args.importance}{known}")
    write_metrics(args, metrics | dict(
        step=args.steps, images_seen=args.steps * args.batch_size, seed=args.seed,
        train_seconds=seconds, images_per_second=images / seconds))


def sample_only(args: argparse.Namespace, device: torch.device, state: dict) -> None:
    """Draws --sample-only pictures from the average in ckpt.pt, whatever device made it."""
    net = build(args, *state["shape"][1:3], device)
    restore(state, dict(ema=net.eval()))
    with autocast(args):
        pictures = draw_pictures(net, args.sample_only, args.temperature, args)
    path = Path(args.out) / "samples_only.png"
    write_png(path, grid(pictures, math.ceil(args.sample_only ** 0.5)))
    say(str(path))


# ---- command line ----

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, a row each; --paper is Vahdat & Kautz 2020 on CIFAR-10.

    departs: the CPU's column is a recipe for three minutes: patches for the stem, whole branches
    (factor 1), a low floor by and by, few and small cells, a moving average, a higher rate.
    """
    experiment = dict(
        # flag       CPU        --gpu         --paper     least  meaning
        data=       ("faces",   "faces",      "cifar10",    None, "faces (drawn), mnist, fashion-"
                     "mnist, cifar10, or a path: a folder of idx files or of pictures, CIFAR-10's "
                     "binary .tar.gz, or an .npy file; grey ones are binarised"),
        size=       (32,        64,           32,           8, "pixels, if the data have any size"),
        steps=      (3600,      3000,         78_125,       1, "in all, resumed ones included"),
        batch_size= (8,         64,           256,          1, "global, over all processes"),
        seed=       (0,                                     0, "of weights, noise and order"),
        bits=       (5,         5,            8,            2, "of a colour; grey has one"),
        mixtures=   (2,         5,            10,           1, "M, components of q(x|z)"),
        width=      (32,        32,           128,          4, "channels of the finest cells"),
        scales=     (2,         2,            1,            1, "of latents, halved one by one"),
        groups=     (2,         8,            30,           1, "of latents at the finest scale"),
        min_groups= (2,         4,            1,            1, "least of a scale, as they halve"),
        latent=     (8,         20,           20,           1, "channels of a group"),
        cells=      (1,         1,            2,            1, "residual cells of a group"),
        flows=      (0,         0,            1,            0, "pairs of a Flow; the post: none"),
        expand=     (3,         6,            6,            1, "times the channels, in decoders"),
        stem=       (0,         1,            1,            0, "halvings before the finest scale"),
        stem_cells= (1,         2,            2,            1, "cells each time"),
        patch=      (4,         1,            1,            1, "side of the squares taken for one"),
        factor=     (1.0,       0.1,          0.1,          0, "of a cell's branch"),
        floor=      (-5.5,      -5.5,         -7.0,         None, "of the mixture's log-scales"),
        first_floor=(-1.5,      -1.5,         -7.0,         None, "the same at the first step"),
        kl_warmup=  (0.3,                                   0, "share of the steps with less KL"),
        penalty=    (0.01,                                  0, "of spectral norms and gammas"),
        penalty_every=(4,       4,            1,            1, "every N-th step adds it, N times"),
        flip=       (False,     False,        True,         None, "mirror half of the pictures"),
        lr=         (0.02,      5e-3,         0.01,         0, "Adamax's learning rate"),
        warmup=     (0.03,      0.03,         0.0125,       0, "share of steps in which lr rises"),
        ema=        (0.995,     0.999,        0.0,          0, "decay of the average that draws"),
    )
    others = dict(
        paper=      (False,                                 None, "the paper's CIFAR-10, whole"),
        save_every= (1800,      2000,         5000,         1, "steps between checkpoints"),
        samples=    (64,                                    1, "pictures in a grid"),
        sample_seed=(0,                                     0, "of the pictures drawn"),
        temperature=(1.0,                                   0, "times the deviations of q(z)"),
        bn_batches= (50,        200,          500,          0, "that BatchNorm's averages are "
                     "estimated from anew, to draw; 0: leave them"),
        test_images=(200,       1000,         10_000,       1, "held out, for the bounds"),
        importance= (10,        50,           1000,         1, "K, draws of the importance bound"),
        judge=      (1000,                                  0, "samples for Frechet's distance, "
                     "precision, recall and sharpness"),
        draw_pixels=(False,                                 None, "draws of q(x|z), not its means"),
        forget=     (False,     False,        True,         None, "cells work twice, for memory"),
        sample_only=(0,                                     0, "only draw as many, from ckpt.pt"),
    )
    return read_flags("nvae", __doc__.partition("\n")[0], argv, experiment, others)


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


# === shared: ranks ===
class Total(torch.autograd.Function):
    """The sum of a tensor over all ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return Total.forward(ctx, grad)


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose moments are those of the whole global batch, on the CPU too."""

    def forward(self, x: Tensor) -> Tensor:
        if RANKS == 1 or not self.training:
            return super().forward(x)
        h, n = x.to(self.running_mean.dtype), RANKS * x.numel() // x.shape[1]
        mean = Total.apply(h.sum((0, 2, 3))) / n
        h = h - mean[:, None, None]
        var = Total.apply(h.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        h = h * (var + self.eps).rsqrt()[:, None, None]
        if self.affine:
            h = h * self.weight[:, None, None] + self.bias[:, None, None]
        return h.to(x.dtype)


def average(grads: list[Tensor]) -> None:
    """Over all ranks, in one all-reduce: autograd.grad goes past DistributedDataParallel."""
    if RANKS == 1:
        return
    flat = torch.cat([grad.flatten() for grad in grads]) / RANKS
    torch.distributed.all_reduce(flat)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(part.view(grad.shape))
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
