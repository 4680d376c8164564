"""RoPE is complete: what rotating by a dense exp(nB) can do, the plain block-diagonal form can.

Post    Transformer升级之路：6、旋转位置编码的完备性分析   https://kexue.fm/archives/9403 (read 2026-11)
        8265 (part 2) derives the 1-D form, 8397 (part 4) asks for N dimensions, 9708 is ReRoPE.

Map     9403 (1)   R_m^T R_n = R_{n-m}                                         test
        9403 (2)   R_n = exp(nB)                                      exp_rotation, exp_powers
        9403 (3)   R_m^T R_n = exp(m B^T + n B + mn/2 [B^T, B] + ...)          test
        9403 (4)   so B^T = -B                                                 skew
        9403       O^n = (O_+ I_-)^n for det O = -1, corrected                 split_reflection
        9403 (5)   R_n = diag(R_{n theta_0}, ..., R_{n theta_{d/2-1}})         rotation
        9403 (6)   (5) = exp(n Lambda), Lambda = diag(J_theta_i)               generator_matrix
        9403 (7)   R_theta = [[cos, -sin], [sin, cos]], J_theta                blocks
        9403 (8)   B = P Lambda P^{-1}                                         canonical
        9403 (9)   exp(nB) = P exp(n Lambda) P^{-1}                            test
        9403 (10)  q^T exp((n-m)B) k = (P^T q)^T exp((n-m)Lambda) (P^{-1} k)   absorb, fold
        9403 (11)  phi(q), phi(k) in (10): P stays                             limits
        8265 (9)   f(q, m) = q e^{i m theta}, each pair a complex number       rotate
        8265 (11)  the d x d matrix, theta_i = 10000^{-2i/d}                   rotation, thetas
        8265 (13)  q * cos + (-q_1, q_0, -q_3, q_2, ...) * sin                 rotate
        8265 (15)  S_i = sum_{j<i} e^{i(m-n) theta_j}                          decay
        8265 (16)  the score is bounded by the |S_i|: their mean               decay
        8397 (1)   x turns half of the pairs, y the other half                 axial
        8397 (2)   relative, and (x, y) can be found from R_{x,y}              reversible
        8397 (19)  R_x = exp(sum_k x_k B_k)                                    rotary_table_nd
        8397 (21)  B_1 B_2 = B_2 B_1                                           test
        9708       R^{max(j-i, -w)}, ReRoPE                                    rerope_scores
Symbols P is orthogonal, so P^{-1} = P^T and one P serves q and k (the post only says invertible).
        "Interleaved": pair i is (q_2i, q_2i+1), as in the post; "half": (q_i, q_{i+d/2}).
Shapes  B batch, H heads, L new tokens, M keys, d width of a head, N dimensions of a position.

Run     python rope.py                                  # CPU: trains a dense B, folds it into RoPE
        python rope.py --position rope                  # plain RoPE; also alibi, nope, ...
        python rope.py --gpu --completeness             # one GPU: a larger model
        torchrun --nproc_per_node=8 rope.py --gpu       # the same global batch on eight
        python rope.py --sample-only 3 --out out/rope/folded --ntk 4 --length 1024
Needs   torch, numpy
"""

import argparse
import bz2
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
import lzma
import math
import os
import signal
import sys
import sysconfig
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Table = tuple[Tensor, Tensor] | Tensor | None  # cos and sin, or R_n itself, or no rotation


# ---- the post: 9403, all R_n with R_m^T R_n = R_{n-m} ----

def skew(A: Tensor) -> Tensor:
    """9403 (4): a B with B^T = -B from any A (..., d, d)."""
    return A - A.mT


def exp_rotation(n: Tensor, B: Tensor) -> Tensor:
    """9403 (2): R_n = exp(nB), (..., d, d), for real n (...) and skew B (..., d, d)."""
    return torch.matrix_exp(n[..., None, None] * B)  # 9403 (2)


def exp_powers(length: int, B: Tensor) -> Tensor:
    """9403 (2) at n = 0, ..., length - 1 by repeated doubling: B (..., d, d) -> (..., L, d, d)."""
    step = torch.matrix_exp(B)[..., None, :, :]
    R = torch.eye(B.shape[-1]).to(B).expand_as(step)
    while R.shape[-3] < length:
        R = torch.cat([R, R @ step], -3)  # exp((n + k)B) = exp(nB) exp(kB)
        step = step @ step
    return R[..., :length, :, :]


def blocks(c: Tensor, s: Tensor) -> Tensor:
    """9403 (7): (..., d/2) each -> (..., d, d), with [[c, -s], [s, c]] down the diagonal."""
    i = torch.arange(0, 2 * c.shape[-1], 2, device=c.device)
    R = c.new_zeros(*c.shape[:-1], 2 * c.shape[-1], 2 * c.shape[-1])
    R[..., i, i], R[..., i, i + 1] = c, -s
    R[..., i + 1, i], R[..., i + 1, i + 1] = s, c
    return R


def rotation(n: Tensor, theta: Tensor) -> Tensor:
    """9403 (5), 8265 (11): R_n as a matrix, (..., d, d), for n (...) and theta (d/2,)."""
    angle = n[..., None] * theta
    return blocks(angle.cos(), angle.sin())  # 9403 (5)


def generator_matrix(theta: Tensor) -> Tensor:
    """9403 (6): Lambda (..., d, d), rotation(n, theta) = exp(n Lambda), for theta (..., d/2)."""
    return blocks(torch.zeros_like(theta), theta)


def canonical(B: Tensor) -> tuple[Tensor, Tensor]:
    """9403 (8): orthogonal P (d, d) and theta (d // 2,) >= 0, falling, with B = P Lambda P^T.

    float64, whatever B (d, d) is. If d is odd, P's last column stays fixed. A theta below
    10 d eps max(theta) is rounding, and 0 is returned. Raises ValueError unless B is skew.
    """
    B, d = B.double(), len(B)
    if not (B + B.T).abs().max() <= 1e-9 * B.abs().max():
        raise ValueError("B is not skew, 9403 (4)")
    floor = 10 * d * torch.finfo(B.dtype).eps * torch.linalg.matrix_norm(B, 2)  # max(theta)
    P, theta, rest = B.new_zeros(d, 0), B.new_zeros(0), torch.eye(d).to(B)
    while rest.shape[1] > 1:
        small = rest.T @ B @ rest
        lam, u = torch.linalg.eigh(0.5j * (small - small.T))  # i B u = lam u, lam = +-theta
        # B a = theta b and B b = -theta a for u = (a + ib)/sqrt 2. Near lam = 0 u mixes with its
        # conjugate, and a, b need not be orthogonal: split off what is far from 0, then the rest.
        far = (lam > torch.maximum(lam[-1] / 100, floor)).nonzero().flip(0)[:, 0]
        if not len(far):
            break
        ab = torch.view_as_real(math.sqrt(2) * u[:, far]).flatten(1)
        P, theta = torch.cat([P, rest @ ab], 1), torch.cat([theta, lam[far]])
        rest = torch.linalg.qr(P, mode="complete").Q[:, P.shape[1]:]
    return torch.cat([P, rest], 1), F.pad(theta, (0, d // 2 - len(theta)))


def absorb(weight: Tensor, bias: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
    """9403 (10): P^T (W x + b) as a linear map; weight (d, width) and bias (d,) of one head."""
    return P.T @ weight, P.T @ bias  # 9403 (10), the same for q and k as P^{-1} = P^T


def split_reflection(O: Tensor) -> tuple[Tensor, Tensor]:
    """9403, det O = -1: O_+ in SO(d) and a reflection I_-, with O^n = O_+^n I_-^n = exp(nB) I_-^n.

    departs: the post reflects a coordinate axis, but then O_+ and I_- need not commute. Here I_-
    reflects an eigenvector of O to -1, which det O = -1 must have: so O^n adds a sign (-1)^n to
    exp(nB), no more. Raises ValueError for det O > 0.
    """
    if torch.linalg.det(O) > 0:
        raise ValueError("det O = +1: O is an exp(B) already")
    v = torch.linalg.eigh(O + O.T).eigenvectors[:, :1]  # the lowest: O v = -v
    I_minus = torch.eye(len(O)).to(O) - 2 * v @ v.T
    return O @ I_minus, I_minus


# ---- RoPE itself: 8265, in N dimensions 8397, longer texts 9675 and 9708 ----

def thetas(d: int, base: float = 10000.0) -> Tensor:
    """8265 (11): theta_i = base^{-2i/d}, float64 (d/2,), d a head's width; ValueError if odd."""
    if d % 2:
        raise ValueError(f"d = {d}: pairs need an even width")
    return base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)  # 8265 (11)


def rotary_table_nd(x: Tensor, omega: Tensor, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """8397 (19): cos and sin (..., L, d/2) of <omega_i, x> for x (..., L, N), omega (..., d/2, N).

    By (21) the B_k commute and share one P, so all there is, after (10), is a frequency vector
    omega_i for each pair: along the axes it is `axial`, anywhere "mixed", 0 for a pair not rotated.
    Angles are float64, the table float32 (float64 for that dtype), whatever the model has.
    """
    angle = x.double() @ omega.double().mT  # reduced mod 2 pi by the float64 cos: right at 10^6
    dtype = torch.promote_types(dtype, torch.float32)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotary_table(positions: Tensor, theta: Tensor, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """8265 (13): cos and sin (..., L, d/2) of n theta_i, positions (..., L), theta (..., d/2)."""
    return rotary_table_nd(positions[..., None], theta[..., None], dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str = "interleaved") -> Tensor:
    """8265 (13): R_n x_n for x (..., L, d), cos and sin (..., L, d/2); computed in their precision.

    layout: pairs are (q_2i, q_2i+1), "interleaved" as in the post, or (q_i, q_i+d/2), "half".
    """
    axis, shape = {"interleaved": (-1, (-1, 2)), "half": (-2, (2, -1))}[layout]
    pairs = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, shape)
    if layout == "interleaved" and not torch.compiler.is_compiling():  # one pass over memory
        *outer, inner = pairs.stride()
        if inner != 1 or pairs.storage_offset() % 2 or any(s % 2 for s in outer):  # no complex view
            pairs = pairs.clone(memory_format=torch.contiguous_format)
        z = torch.view_as_complex(pairs) * torch.complex(cos, sin)  # 8265 (9): q e^{i n theta}
        return torch.view_as_real(z).flatten(-2).to(x.dtype)
    q0, q1 = pairs.unbind(axis)
    return torch.stack([q0 * cos - q1 * sin, q1 * cos + q0 * sin], axis).flatten(-2).to(x.dtype)


def half_order(d: int) -> Tensor:
    """Pi (d,): x_half = x_interleaved[..., Pi]; rows of W_q, W_k likewise; argsort(Pi) is back."""
    return torch.arange(d).view(-1, 2).T.flatten()


def axial(theta: Tensor, N: int) -> Tensor:
    """8397 (1): omega (N k, N), each axis turns k pairs of its own by theta (k,)."""
    return torch.kron(torch.eye(N).to(theta), theta[:, None])


def reversible(omega: Tensor) -> bool:
    """8397 (2), the second demand: whether R_x, by omega (d/2, N), tells x from those near it."""
    return int(torch.linalg.matrix_rank(omega)) == omega.shape[-1]


def decay(distance: Tensor, theta: Tensor) -> Tensor:
    """8265 (16): mean over i of |S_i|, for distances m - n (...) and theta (d/2,)."""
    S = torch.exp(1j * distance[..., None] * theta).cumsum(-1)  # 8265 (15)
    return S.abs().mean(-1)


def ntk_thetas(theta: Tensor, factor: float) -> Tensor:
    """9675: thetas of base * factor^{d/(d-2)}: theta_0 stays, the last one falls by `factor`."""
    i = torch.arange(theta.shape[-1]).to(theta)
    return theta * factor ** (-i / max(theta.shape[-1] - 1, 1))


def turn(x: Tensor, table: Table) -> Tensor:
    """R_n x_n for x (..., L, d): by cos and sin, by R_n (..., L, d, d) itself, or None: x."""
    if table is None:
        return x
    if isinstance(table, tuple):
        return rotate(x, *table)
    with torch.autocast(x.device.type, enabled=False):
        return torch.einsum("...lij,...lj->...li", table, x.to(table.dtype)).to(x.dtype)


def rerope_scores(q: Tensor, k: Tensor, near: tuple[Table, Table], far: Table, m_n: Tensor,
                  w: int) -> Tensor:
    """9708: q_m^T R^{max(n - m, -w)} k_n, (..., L, M), for raw q (..., L, d) and k (..., M, d).

    near: tables of the positions m and n; far: of the position w; m_n: m - n, (..., L, M).
    """
    close = turn(q, near[0]) @ turn(k, near[1]).mT
    return torch.where(m_n < w, close, turn(q, far) @ k.mT)


# ---- model ----

class SelfAttention(nn.Module):
    """Causal softmax attention of H heads on x (B, L, width); past: keys and values so far."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, table: Table, mask: Tensor | None, past: tuple | None,
                rerope: tuple | None) -> tuple[Tensor, tuple]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        (q, k), v = turn(qkv[:2], None if rerope else table), qkv[2]  # (B, H, L, d) each
        if past is not None:  # rotated keys, or raw ones for ReRoPE
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)  # (B, H, M, d)
        if rerope:
            keys, far, m_n, w = rerope
            scores = rerope_scores(q, k, (table, keys), far, m_n, w) * q.shape[-1] ** -0.5
            y = scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
        else:
            causal = mask is None and x.shape[1] > 1
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2)), (k, v)


class Layer(nn.Module):
    """Pre-norm: attention, then an MLP, each added to x (B, L, width)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(width), SelfAttention(width, heads)
        self.norm2 = nn.RMSNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))

    def forward(self, x: Tensor, *how) -> tuple[Tensor, tuple]:
        y, past = self.attention(self.norm1(x), *how)
        x = x + y
        return x + self.mlp(self.norm2(x)), past


POSITIONS = ("rope", "general", "sinusoidal", "learned", "alibi", "nope")


class LanguageModel(nn.Module):
    """A decoder of bytes: tokens (B, L) -> logits (B, L, 256); position is one of POSITIONS.

    "general" learns a dense skew B for each head, and rotates by exp(nB); "rope" has a theta for
    each head, as folding (10) needs, all alike at first. Raises ValueError if `heads` don't fit.
    """

    def __init__(self, position: str = "rope", width: int = 128, layers: int = 3, heads: int = 4,
                 context: int = 256):
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width {width}: {heads} heads of even width do not divide it")
        self.config = dict(position=position, width=width, layers=layers, heads=heads,
                           context=context)
        self.position, d = position, width // heads
        self.embed = nn.Embedding(256, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.last = nn.RMSNorm(width), nn.Linear(width, 256)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features ** -0.5)
                nn.init.zeros_(module.bias)
        for layer in self.layers:  # residual branches begin at zero
            nn.init.zeros_(layer.attention.out.weight)
            nn.init.zeros_(layer.mlp[2].weight)
        if position == "rope":  # kept as bits, because .half() and .bfloat16() cast only floats
            theta = thetas(d).expand(layers, heads, -1).contiguous()
            self.register_buffer("theta_bits", theta.view(torch.int64))
        elif position == "general":  # RoPE's own B in a random basis of each head: dense
            Q = torch.linalg.qr(torch.randn(layers, heads, d, d, dtype=torch.float64)).Q
            B = Q @ generator_matrix(thetas(d)) @ Q.mT
            self.A = nn.Parameter((B / 2 * context**0.5).float())
        elif position == "learned":
            self.place = nn.Embedding(context, width)

    def B(self, layer: int) -> Tensor:
        """The skew B of each head of a "general" model, 9403 (4): float64 (H, d, d)."""
        scale = self.config["context"] ** -0.5  # departs: or a step of Adam turns nB by n lr
        return skew(self.A[layer].double()) * scale

    def positions(self, first: int | Tensor, length: int) -> Tensor:
        """first, first + 1, ..., (L,); or (B, L) if there is a `first` for each row, (B,)."""
        steps = torch.arange(length, device=self.embed.weight.device)
        return torch.as_tensor(first, device=steps.device)[..., None] + steps

    def table(self, layer: int, first: int | Tensor, length: int, pi: float, ntk: float) -> Table:
        """What turns q and k at positions first, first + 1, ...; (H, L, ...) or (B, H, L, ...)."""
        dtype = torch.promote_types(self.embed.weight.dtype, torch.float32)
        n = self.positions(first, length)
        n = n if n.ndim == 1 else n[:, None]  # (L,) or (B, 1, L)
        if self.position == "rope":
            theta = ntk_thetas(self.theta_bits[layer].view(torch.float64), ntk)
            return rotary_table(n.double() / pi, theta, dtype)
        if self.position == "general":
            B = self.B(layer)
            R = exp_powers(length, B)
            if not isinstance(first, int) or first:
                R = exp_rotation(n[..., 0].double(), B)[..., None, :, :] @ R
            return R.to(dtype)
        return None

    def mask(self, first: int | Tensor, length: int, past: int) -> tuple[Tensor, Tensor]:
        """Which keys a query sees, bool, and how far away they are, each (L, M) or (B, 1, L, M)."""
        m, n = self.positions(first, length), self.positions(first - past, past + length)
        m, n = (x if x.ndim == 1 else x[:, None] for x in (m, n))
        m_n = m[..., :, None] - n[..., None, :]
        return (m_n == 0) | (m_n > 0) & (n >= 0)[..., None, :], m_n

    def forward(self, tokens: Tensor, first: int | Tensor = 0, cache: list | None = None,
                pi: float = 1.0, ntk: float = 1.0, rerope: int | None = None) -> Tensor:
        """tokens (B, L), the first one at position `first`, an int or (B,); negative: padding.

        cache: [] before the first chunk, filled here. pi divides positions, ntk is the factor of
        `ntk_thetas`, rerope the window of `rerope_scores`; ValueError if the model has no theta.
        """
        length, past = tokens.shape[1], cache[0][0].shape[2] if cache else 0
        if (pi, ntk, rerope) != (1, 1, None) and self.position != "rope":
            raise ValueError(f"{self.position} has no theta: pi, ntk and rerope need rope")
        x = self.embed(tokens)
        if self.position == "learned":
            x = x + self.place(self.positions(first, length).clamp(min=0))
        elif self.position == "sinusoidal":
            theta = thetas(x.shape[-1]).to(x.device)
            code = rotary_table(self.positions(first, length), theta, x.dtype)
            x = x + torch.cat(code, -1).to(x.dtype)
        seen = None
        padded = not isinstance(first, int) or first < past
        if rerope or self.position == "alibi" or padded or past and length > 1:
            seen, m_n = self.mask(first, length, past)
        if self.position == "alibi":  # 2108.12409: slopes 2^{-8/H}, 2^{-16/H}, ...
            heads = self.config["heads"]
            slope = 2 ** (-8 * torch.arange(1, heads + 1, device=x.device) / heads)[:, None, None]
            seen = (-slope * m_n).masked_fill(~seen, -math.inf).to(x.dtype)
        for i, layer in enumerate(self.layers):
            how = None
            if rerope:
                keys = self.table(i, first - past, past + length, pi, ntk)
                how = keys, self.table(i, rerope, 1, pi, ntk), m_n, rerope
            table = self.table(i, first, length, pi, ntk)
            x, kv = layer(x, table, seen, cache[i] if past else None, how)
            if cache is not None:
                cache[i:i + 1] = [kv]
        logits = self.last(self.norm(x))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def loss(net: nn.Module, tokens: Tensor, **how) -> Tensor:
    """Bits per byte, (B, L), of each of tokens (B, L + 1) but the first, from those before it."""
    logits = net(tokens[:, :-1], **how)
    return F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none") / math.log(2)


@torch.no_grad()
def sample(net: LanguageModel, tokens: Tensor, count: int, g: torch.Generator,
           temperature: float = 0.8, **how) -> Tensor:
    """tokens (B, L), then `count` bytes more, drawn one by one through the cache."""
    new, cache = tokens, []
    for _ in range(count):
        logits = net(new, tokens.shape[1] - new.shape[1], cache, **how)[:, -1]
        new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=g)
        tokens = torch.cat([tokens, new], 1)
    return tokens


# ---- the theorem, executed: 9403 (8)-(11) ----

@torch.no_grad()
def fold(net: LanguageModel) -> LanguageModel:
    """9403 (10): the plain "rope" model that computes what a "general" one does; same dtype."""
    heads, state = net.config["heads"], net.state_dict()
    theta = []
    del state["A"]
    for i in range(net.config["layers"]):
        name = f"layers.{i}.attention.qkv."
        weight, bias = (state[name + part].clone().unflatten(0, (3, heads, -1))
                        for part in ("weight", "bias"))  # (3, H, d, width), (3, H, d)
        for h, B in enumerate(net.B(i)):
            P, theta_h = canonical(B)
            theta.append(theta_h)
            for part in (0, 1):  # q and k; v is not rotated
                folded = absorb(weight[part, h].double(), bias[part, h].double(), P)
                weight[part, h], bias[part, h] = folded
        state |= {name + "weight": weight.flatten(0, 2), name + "bias": bias.flatten()}
    theta = torch.stack(theta).unflatten(0, (-1, heads))  # (layers, H, d/2)
    rope = LanguageModel(**net.config | dict(position="rope")).to(net.embed.weight)
    rope.load_state_dict(state | dict(theta_bits=theta.view(torch.int64)))
    return rope


@torch.no_grad()
def completeness(net: LanguageModel, tokens: Tensor) -> tuple[LanguageModel, dict]:
    """fold(net) in float64, how far its logits on tokens (B, L) are from net's, and `limits`."""
    general = copy.deepcopy(net).double()
    rope = fold(general)
    want, got = general(tokens), rope(tokens)
    x = general.layers[0].norm1(general.embed(tokens[0]))
    qkv = general.layers[0].attention.qkv(x).unflatten(-1, (3, net.config["heads"], -1))
    q, k, _ = qkv.permute(1, 2, 0, 3)  # (H, L, d) each
    return rope, {"logits": (want - got).abs().max().item(),
                  "largest_logit": want.abs().max().item(), **limits(q, k, general.B(0))}


def limits(q: Tensor, k: Tensor, B: Tensor) -> dict[str, float]:
    """Largest change of a score by folding, over the largest score; q, k (H, L, d), B (H, d, d).

    Nothing between W and R, or a map that commutes with P: (10) holds. 9403 (11), an element-wise
    map phi, or one key for all heads with a B each: P cannot go into W. float64.
    """
    P, theta = map(torch.stack, zip(*map(canonical, B)))
    dense = exp_powers(q.shape[1], B)  # (H, L, d, d)
    plain = rotary_table(torch.arange(q.shape[1]).to(q), theta, q.dtype)
    gain = torch.linspace(0.5, 1.5, q.shape[-1]).to(q)

    def wrong(phi: Callable[[Tensor], Tensor], k: Tensor, P_k: Tensor) -> float:
        want = turn(phi(q), dense) @ turn(phi(k), dense).mT
        got = turn(phi(q @ P), plain) @ turn(phi(k @ P_k), plain).mT  # x^T P is (P^T x)^T
        return ((want - got).abs().max() / want.abs().max()).item()

    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:])

    return {"softmax attention, (10)": wrong(lambda x: x, k, P),
            "QK-norm without gain": wrong(norm, k, P),
            "linear attention, phi = relu, (11)": wrong(F.relu, k, P),
            "QK-norm with a gain": wrong(lambda x: norm(x) * gain, k, P),
            "one k for all heads, a B each": wrong(lambda x: x, k[:1].expand_as(k), P[:1])}


# ---- evaluation ----

@torch.no_grad()
def bits_by_position(net: LanguageModel, data: Tensor, length: int, batch: int, **how) -> Tensor:
    """loss (N, length) on all windows of `length` bytes in data (T,), `batch` bytes at once."""
    n = (len(data) - 1) // length
    rows = torch.stack([data[:n * length], data[1:n * length + 1]]).view(2, n, length).long()
    tokens = torch.cat([rows[0], rows[1, :, -1:]], 1)
    return torch.cat([loss(net, part, **how) for part in tokens.split(max(1, batch // length))])


def baselines(train: Tensor, test: Tensor) -> dict[str, float]:
    """Bits per byte of uint8 `test` by byte frequencies of `train`, and by gzip and xz (alone)."""
    count = torch.bincount(train.long(), minlength=256).double() + 1
    raw = test.cpu().numpy().tobytes()
    return {"unigram": -(count / count.sum()).log2()[test.long()].mean().item(),
            "gzip": 8 * len(gzip.compress(raw, 9)) / len(raw),
            "xz": 8 * len(lzma.compress(raw, preset=9)) / len(raw)}


def precision(theta: Tensor) -> dict[str, list[float]]:
    """Largest error of cos(n theta) for 100 n up to 10^2, ..., 10^7, by three ways to the angle."""
    ways = {"float32 angles": lambda n: (n.float()[:, None] * theta.float()).cos(),
            "bfloat16 positions": lambda n: (n.bfloat16().float()[:, None] * theta.float()).cos(),
            "rotary_table": lambda n: rotary_table(n, theta)[0]}
    n = [torch.arange(10**k - 99, 10**k + 1, device=theta.device) for k in range(2, 8)]
    return {name: [(way(m).double() - (m.double()[:, None] * theta).cos()).abs().max().item()
                   for m in n] for name, way in ways.items()}


def draw_curves(path: Path, title: str, x_label: str, curves: dict[str, tuple[list, list]]) -> None:
    """Writes an SVG: a line through each (x, y), x > 0 on a scale of powers of 2."""
    xs = [math.log2(x) for x, _ in curves.values() for x in x]
    ys = [y for _, y in curves.values() for y in y]
    step = 10 ** math.floor(math.log10(max(ys) - min(ys) + 1e-9))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if (max(ys) - min(ys)) / s <= 6)
    low, high = math.floor(min(ys) / step), math.ceil(max(ys) / step)
    x0, x1 = min(xs), max(xs)

    def at(x: float, y: float) -> str:
        x, y = (x - x0) / (x1 - x0), (y / step - low) / (high - low)
        return f"{60 + 480 * x:.1f},{290 - 240 * y:.1f}"

    svg = [f'<text x="60" y="30" font-size="15">{title}</text>',
           f'<text x="540" y="328" text-anchor="end">{x_label}</text>']
    for k in range(low, high + 1):
        (left, y), right = at(x0, k * step).split(","), at(x1, k * step).split(",")[0]
        svg += [f'<path d="M{left},{y}H{right}" stroke="#ddd"/>',
                f'<text x="52" y="{float(y) + 4}" text-anchor="end">{k * step:g}</text>']
    for k in range(math.ceil(x0), math.floor(x1) + 1):
        x = at(k, low).split(",")[0]
        svg.append(f'<text x="{x}" y="308" text-anchor="middle">{2**k}</text>')
    colours = itertools.cycle(["#0b62a4", "#d1495b", "#2e8b57", "#e0a100", "#7b52ab", "#555"])
    for row, ((name, (x, y)), colour) in enumerate(zip(curves.items(), colours)):
        points = " ".join(at(math.log2(x), y) for x, y in zip(x, y))
        svg += [f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>',
                f'<text x="550" y="{62 + 20 * row}" fill="{colour}">{name}</text>']
    path.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="680" height="340" '
                    'font-size="12" font-family="sans-serif">'
                    '<rect width="680" height="340" fill="#fff"/>'
                    + "\n".join(svg) + "</svg>\n")


def extrapolation(net: LanguageModel, data: Tensor, batch: int) -> dict[str, list[float]]:
    """Bits per byte at each position up to 8 times the context, by the ways to get there."""
    context = net.config["context"]
    ways = {net.position: {}}
    if net.position == "rope":
        ways |= {"interpolation x 8": dict(pi=8.0), "NTK x 8": dict(ntk=8.0),
                 f"ReRoPE, w = {context // 2}": dict(rerope=context // 2)}
    return {name: bits_by_position(net, data, 8 * context, batch, **how).mean(0).tolist()
            for name, how in ways.items()}


def report(net: LanguageModel, train: Tensor, test: Tensor, out: Path,
           args: argparse.Namespace) -> dict:
    """Prints and draws what the README shows; returns the numbers for metrics.json."""
    context, batch = args.context, args.batch_size * args.context
    some = test[:args.eval_bytes + 1]
    bits = bits_by_position(net, some, context, batch)
    metrics = {"test_bits_per_byte": bits.mean().item(), "test_bytes": bits.numel(),
               "test_standard_error": (bits.mean(1).std(correction=0) / len(bits) ** 0.5).item(),
               "baselines": baselines(train, some[1:bits.numel() + 1])}
    said = "  ".join(f"{name} {value:.3f}" for name, value in metrics["baselines"].items())
    print(f"test: {metrics['test_bits_per_byte']:.3f} bits per byte at length {context} "
          f"({bits.numel():,} bytes; on the same ones  {said})")
    lengths = [context, 2 * context, 4 * context, 8 * context]
    if net.position != "learned" and len(test) > 8 * context:
        curves = extrapolation(net, test[:args.eval_bytes // 2 + 1], batch)
        print(f"{'bits per byte at length':24}" + "".join(f"{n:8}" for n in lengths)
              + "   of bytes" + "".join(f"{f'> {n}':>8}" for n in lengths[:-1]))
        for name, curve in curves.items():
            buckets = [curve[n // 2:n] if n > context else curve[:n] for n in lengths]
            means = [sum(curve[:n]) / n for n in lengths]
            last = [sum(part) / len(part) for part in buckets]
            print(f"  {name:22}" + "".join(f"{value:8.3f}" for value in means) + " " * 11
                  + "".join(f"{value:8.3f}" for value in last[1:]))
            metrics.setdefault("extrapolation", {})[name] = dict(lengths=lengths, mean=means,
                                                                 bucket=last)
        edges = [round(2 ** (k / 2)) for k in range(8, 2 * int(math.log2(8 * context)) + 1)]
        bins = list(zip(edges, edges[1:]))
        draw_curves(out / "extrapolation.svg", f"bits per byte, trained at {context}", "position",
                    {name: (edges[1:], [sum(curve[a:b]) / (b - a) for a, b in bins])
                     for name, curve in curves.items()})
    distance = torch.logspace(0, 12, 200, 2, dtype=torch.float64)
    draw_curves(out / "decay.svg", "mean |S_i| of 8265 (16), d = 128", "distance m - n",
                {f"base {base}": (distance.tolist(), decay(distance, thetas(128, base)).tolist())
                 for base in (10_000, 500_000)})
    metrics["precision"] = precision(thetas(64).to(test.device))
    print(f"{'error of cos at position':24}" + "".join(f"    10^{k}" for k in range(2, 8)))
    for name, errors in metrics["precision"].items():
        print(f"  {name:22}" + "".join(f"{error:8.0e}" for error in errors))
    return metrics


def write_samples(net: LanguageModel, path: Path, count: int, args: argparse.Namespace) -> str:
    """Draws `count` texts, always from the same random numbers, into `path`; returns them all."""
    device = net.embed.weight.device
    prompt = torch.tensor(list(args.prompt.encode()), device=device).expand(count, -1)
    how = dict(pi=args.pi, ntk=args.ntk, rerope=args.rerope) if net.position == "rope" else {}
    g = generator(device, args.seed, 0, 2)
    texts = sample(net, prompt, args.length, g, args.temperature, **how)
    texts = [bytes(text).decode("utf-8", "replace") for text in texts.tolist()]
    said = f"\n{'-' * 80}\n".join(texts)
    path.write_text(said + "\n", "utf-8")
    return said


# ---- training ----

CONFIG = ("data position context width layers heads lr warmup clip_grad batch_size seed "
          "steps").split()


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine to zero."""
    fall = (1 + math.cos(math.pi * step / args.steps)) / 2
    return args.lr * min(1, (step + 1) / args.warmup) * fall


def load_data(args: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Train, validation and test bytes on the device. Raises UserError if a part is too short."""
    parts = split_text(load_text(args.data, args.cache), device)
    if min(map(len, parts)) <= args.context:
        raise UserError(f"--data {args.data}: {len(parts[2])} bytes to test on, too few for "
                        f"--context {args.context}")
    return parts


def checkpoint(net: LanguageModel, opt: torch.optim.Optimizer, step: int,
               args: argparse.Namespace) -> dict:
    """What ckpt.pt holds."""
    config = {name: getattr(args, name) for name in CONFIG} | dict(position=net.position)
    return dict(script="rope", step=step, config=config, model=net.state_dict(),
                opt=opt.state_dict())


def optimiser(net: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.98), fused=True)


def build(args: argparse.Namespace) -> LanguageModel:
    return LanguageModel(args.position, args.width, args.layers, args.heads, args.context)


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that each are right, but not together."""
    last = "rope" if args.position == "general" and not args.sample_only else args.position
    if args.width % (2 * args.heads):
        raise UserError(f"--width {args.width}: --heads {args.heads} need 2, 4, ... channels each")
    if (args.pi, args.ntk, args.rerope) != (1, 1, None) and last != "rope":
        raise UserError(f"--pi, --ntk, --rerope: --position {last} has no theta"
                        f"{'; its rope is in --out OUT/folded' * (last == 'general')}")
    if args.eval_bytes < 16 * args.context:
        raise UserError(f"--eval-bytes {args.eval_bytes}: 16 times --context at least, "
                        f"{16 * args.context}")
    if args.position == "learned" and len(args.prompt.encode()) + args.length > args.context + 1:
        raise UserError(f"--length {args.length}: with --prompt, learned positions end at "
                        f"{args.context}")


def train(args: argparse.Namespace) -> int:
    """The whole run: data, loop, checkpoints, the theorem, metrics.json. Returns the exit code."""
    world = setup(args.gpu, args.fp32, args.batch_size)
    device, out = world.device, Path(args.out)
    state = resume_run(args, CONFIG, "rope")
    check_flags(args)
    with main_first(world):
        text, valid, test = load_data(args, device)
    torch.manual_seed(args.seed)
    net = build(args).to(device)
    opt = optimiser(net, args.lr)
    step = 0
    if state:
        net.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        step = state["step"]
    else:
        make_room(out, world)
    params = list(net.parameters())
    wrapped = torch.compile(net) if args.compile else net
    if world.size > 1:
        wrapped = nn.parallel.DistributedDataParallel(wrapped)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.gpu and not args.fp32)
    progress = Progress(out, step, args.steps, "byte", world)
    progress.headline(args, sum(p.numel() for p in params))
    total, value, since = torch.zeros((), device=device), torch.zeros(()), step
    window = torch.arange(args.context + 1, device=device)

    def save() -> None:
        progress.check(value, *params)
        if world.rank == 0:
            save_checkpoint(out / "ckpt.pt", checkpoint(net, opt, step, args))

    with stop_signals(world) as stopped:
        while step < args.steps and not stopped():
            g = generator(device, args.seed, step)
            starts = torch.randint(len(text) - args.context, (args.batch_size, 1), generator=g,
                                   device=device)
            tokens = text[world.mine(starts) + window].long()  # (B, L + 1)
            opt.param_groups[0]["lr"] = learning_rate(step, args)
            with autocast:
                value = loss(wrapped, tokens).mean()
            value.backward()
            nn.utils.clip_grad_norm_(params, args.clip_grad)
            opt.step()
            opt.zero_grad()
            total += value.detach()
            step += 1
            if progress.due(step):
                progress.show(step, step * args.batch_size * args.context,
                              bits=total.item() / (step - since), lr=learning_rate(step - 1, args))
                total, since = torch.zeros_like(total), step
            if step % args.save_every == 0 and step < args.steps:
                save()
                if world.rank == 0:
                    with autocast:
                        bits = bits_by_position(net, valid[:args.eval_bytes // 4 + 1], args.context,
                                                args.batch_size * args.context).mean()
                        write_samples(net, out / f"samples_{step:06}.txt", args.samples, args)
                    progress.note(f"validation {bits:.4f} bits per byte")
        save()
    seconds = time.perf_counter() - progress.begin
    trained = (step - progress.start) * args.batch_size
    if step < args.steps:
        progress.note(f"stopped and saved at step {step}; go on with --resume")
        return 130
    if world.rank == 0:
        metrics = dict(step=step, seed=args.seed, train_seconds=seconds,
                       bytes_per_second=trained * args.context / seconds)
        if args.position == "general":
            net, metrics["completeness"] = completeness(net, test[None, :args.context].long())
            net = net.float()
            (out / "folded").mkdir(exist_ok=True)
            save_checkpoint(out / "folded" / "ckpt.pt",
                            checkpoint(net, optimiser(net, args.lr), step, args))
            show_completeness(metrics["completeness"], out)
        with autocast:
            metrics |= report(net, text, test, out, args)
            begin = time.perf_counter()
            print(write_samples(net, out / "samples.txt", args.samples, args))
        metrics["sample_seconds"] = time.perf_counter() - begin
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        print(f"texts, curves and metrics in {out}/")
    return 0


def show_completeness(figures: dict, out: Path) -> None:
    """Prints what `completeness` found."""
    print(f"9403 (10): a dense B per head, folded into plain RoPE ({out}/folded/ckpt.pt), changes\n"
          f"logits of up to {figures['largest_logit']:.1f} by {figures['logits']:.1e} at most, in "
          "float64. Change of scores, relative to the largest:")
    for name in list(figures)[2:]:
        said = "nothing is lost" if figures[name] < 1e-9 else "P cannot be folded"
        print(f"  {name:36}{figures[name]:10.1e}   {said}")


def sample_only(args: argparse.Namespace) -> int:
    """Draws --sample-only texts from the weights in ckpt.pt, whatever device made them."""
    world = setup(args.gpu, args.fp32, 1)
    args.resume = True
    state = resume_run(args, CONFIG, "rope")
    check_flags(args)
    net = build(args).to(world.device)
    net.load_state_dict(state["model"])
    path = Path(args.out) / "samples_only.txt"
    with torch.autocast(world.device.type, torch.bfloat16, enabled=args.gpu and not args.fp32):
        print(write_samples(net, path, args.sample_only, args))
    print(path)
    return 0


# ---- command line ----

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    # flag         CPU        --gpu
    presets = dict(
        data=         ("python",  "python"),
        steps=        (1000,      5000),
        batch_size=   (4,         64),
        save_every=   (1000,      1000),
        position=     ("general", "rope"),
        context=      (256,       512),
        width=        (128,       512),
        layers=       (3,         8),
        heads=        (8,         8),
        lr=           (4e-3,      1e-3),
        warmup=       (50,        200),
        clip_grad=    (1.0,       1.0),
        eval_bytes=   (65_536,    2_097_152),
        samples=      (3,         4),
        length=       (250,       500),
        seed=         (0,         0),
    )
    p = common_flags(__doc__.partition("\n")[0], "rope", presets,
                     "python (the standard library's sources), shakespeare, enwik8, text8, or a "
                     "file, also .gz .bz2 .xz .zip")
    flag = functools.partial(add_flag, p, presets)
    flag("--position", POSITIONS, "how the model knows positions; general is exp(nB), 9403 (2)")
    p.add_argument("--completeness", action="store_true",
                   help="train --position general, then fold it into plain RoPE, 9403 (10), and "
                        "print what that changes")
    flag("--context", at_least(8), "bytes seen at once in training")
    flag("--width", at_least(2), "channels")
    flag("--layers", at_least(1), "attention and MLP each")
    flag("--heads", at_least(1), "of attention; an even share of the width each")
    flag("--lr", at_least(0.0), "Adam's learning rate at its height")
    flag("--warmup", at_least(1), "steps of linear warm-up")
    flag("--clip-grad", at_least(0.0), "largest norm of the gradient")
    flag("--save-every", at_least(1), "steps between checkpoints, each with texts and validation")
    flag("--eval-bytes", at_least(1), "of the test text that are used, 16 contexts at least")
    flag("--samples", at_least(1), "texts drawn")
    flag("--length", at_least(1), "bytes of such a text")
    p.add_argument("--prompt", default="def ", help="how they begin (default: %(default)r)")
    p.add_argument("--temperature", type=at_least(0.01), default=0.8, metavar="N",
                   help="of drawing a byte (default: %(default)s)")
    p.add_argument("--pi", type=at_least(1.0), default=1.0, metavar="N",
                   help="longer texts: positions divided by N (default: 1)")
    p.add_argument("--ntk", type=at_least(1.0), default=1.0, metavar="N",
                   help="longer texts: a larger base of theta, for N contexts (default: 1)")
    p.add_argument("--rerope", type=at_least(1), metavar="W",
                   help="longer texts: no distance is above W, 9708 (default: none)")
    p.add_argument("--sample-only", type=at_least(1), metavar="N",
                   help="only draw N texts from OUT/ckpt.pt")
    args = p.parse_args(argv)
    if args.completeness and args.position not in (None, "general"):
        p.error(f"--completeness trains --position general, not {args.position}")
    if args.completeness:
        args.position = "general"
    if not args.prompt:
        p.error("--prompt: at least one byte")
    settle(args, presets, 1 if args.gpu else 0)
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


# === shared: text ===
TEXTS = {  # where to get it, and its SHA-256
    "shakespeare": ("shakespeare.txt", ["https://raw.githubusercontent.com/karpathy/char-rnn/"
                                        "master/data/tinyshakespeare/input.txt"],
                    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "enwik8": ("enwik8.zip", ["http://mattmahoney.net/dc/enwik8.zip"],
               "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"),
    "text8": ("text8.zip", ["http://mattmahoney.net/dc/text8.zip"],
              "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232")}


def load_text(data: str, cache: str) -> list[bytes]:
    """The documents of `data`: python (the standard library's sources, mixed, always in one order),
    shakespeare, enwik8, text8, or a file, also .gz .bz2 .xz; of a .zip every member is one.

    Raises UserError for anything else, or where there is nothing to read.
    """
    path = download(*TEXTS[data], cache) if data in TEXTS else Path(data).expanduser()
    try:
        if data == "python":
            root = Path(sysconfig.get_path("stdlib"))
            names = [p.relative_to(root) for p in root.rglob("*.py")]
            names = [p for p in names if not {"test", "tests", "idle_test", "site-packages",
                                              "dist-packages"} & set(p.parts)]
            names.sort(key=lambda p: hashlib.md5(p.as_posix().encode()).digest())
            documents = [(root / p).read_bytes() for p in names]
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                documents = [archive.read(name) for name in sorted(archive.namelist())]
        else:
            unpack = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
            with unpack(path, "rb") as file:
                documents = [file.read()]
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--data {data}: no such file, nor one of the names python, "
                        f"{', '.join(TEXTS)}") from None
    except (OSError, EOFError, RuntimeError, lzma.LZMAError, zipfile.BadZipFile,
            zlib.error) as error:
        raise UserError(f"--data {data}: damaged, or not what it seems to be: {error}") from None
    if not any(documents):
        raise UserError(f"--data {data}: nothing in it")
    return [document for document in documents if document]


def split_text(documents: list[bytes], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Train, validation and test bytes, uint8 (T,) on the device: 90 %, then 5 % and 5 %."""
    whole = torch.frombuffer(bytearray(b"\n".join(documents)), dtype=torch.uint8).to(device)
    return whole.split([len(whole) - 2 * (len(whole) // 20), len(whole) // 20, len(whole) // 20])
# === end shared ===


# ---- main ----

def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse_args(argv)
    return run(sample_only if args.sample_only else train, args)


if __name__ == "__main__":
    sys.exit(main())
