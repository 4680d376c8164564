# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy"]
# ///
"""RoPE is complete: what rotating by a dense exp(nB) can do, the plain block-diagonal form can.

Post    Transformer升级之路：6、旋转位置编码的完备性分析   https://kexue.fm/archives/9403 (read 2026-11)
        It completes 8265 (part 2), where RoPE comes from; 8397 (part 4) asks for N dimensions.

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
        8397 (1)   x turns half of the pairs, y the other half                 axial
        8397 (2)   R_m^T R_n = R_{n-m}, of R_{x,y} as well                     test
        8397       and (x, y) can be found from R_{x,y}                        reversible
        8397 (19)  R_x = exp(sum_k x_k B_k)                                    rotary_table_nd
        8397 (21)  B_1 B_2^T = B_2^T B_1                                       test
Symbols P is orthogonal, so P^{-1} = P^T and one P serves q and k (the post only says invertible).
        "Interleaved": pair i is (q_2i, q_2i+1), as in the post; "half": (q_i, q_{i+d/2}).
Shapes  B batch, H heads, L new tokens, M positions kept, d width of a head, N dimensions of a
        position; bits are bits per byte.

Run     python rope.py                                  # CPU: trains a dense B, folds it into RoPE
        python rope.py --position rope                  # plain RoPE from the start
        python rope.py --gpu                            # one GPU: plain RoPE, a larger model
        python rope.py --gpu --position general         # the same with a dense B, then folded
        torchrun --nproc_per_node=8 rope.py --gpu       # the same global batch on eight
        python rope.py --sample-only 3 --prompt "class "
Needs   torch, numpy
"""

import argparse
import bz2
import codecs
import copy
import errno
import gc
import gzip
import hashlib
import html
import http.client
import io
import itertools
import json
import lzma
import math
import os
import re
import signal
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Table = tuple[Tensor, Tensor] | Tensor  # cos and sin (..., L, d/2), or R_n itself (..., L, d, d)


# ---- the post: 9403 ----

def skew(A: Tensor) -> Tensor:
    """9403 (4): a B with B^T = -B from any A (..., d, d)."""
    return A - A.mT


def exp_rotation(n: Tensor, B: Tensor) -> Tensor:
    """9403 (2): R_n = exp(nB), (..., d, d), for real n (...) and skew B (..., d, d)."""
    return torch.matrix_exp(n[..., None, None] * B)  # 9403 (2)


def exp_powers(length: int, B: Tensor) -> Tensor:
    """9403 (2) at n = 0, ..., length - 1 by repeated doubling: B (..., d, d) -> (..., L, d, d)."""
    step = torch.matrix_exp(B)[..., None, :, :]
    R = torch.eye(B.shape[-1], dtype=B.dtype, device=B.device).expand_as(step)
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


def limits(q: Tensor, k: Tensor, B: Tensor) -> dict[str, float]:
    """Largest change of a score by folding, over the largest score; q, k (H, L, d), B (H, d, d).

    Nothing between W and R, or a map that commutes with P: (10) holds. 9403 (11), an element-wise
    map phi, or one key for all heads with a B each: P cannot go into W. float64.
    """
    P, theta = map(torch.stack, zip(*map(canonical, B)))
    dense = exp_powers(q.shape[1], B)  # (H, L, d, d)
    plain = rotary_table(torch.arange(q.shape[1]).to(q), theta, q.dtype)
    gain = torch.linspace(0.5, 1.5, q.shape[-1]).to(q)

    def change(phi: Callable[[Tensor], Tensor], k: Tensor, P_k: Tensor) -> float:
        want = turn(phi(q), dense) @ turn(phi(k), dense).mT
        got = turn(phi(q @ P), plain) @ turn(phi(k @ P_k), plain).mT  # x^T P is (P^T x)^T
        return ((want - got).abs().max() / want.abs().max()).item()

    def nothing(x: Tensor) -> Tensor:
        return x

    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:])

    def norm_and_gain(x: Tensor) -> Tensor:
        return norm(x) * gain

    return {"softmax attention, (10)": change(nothing, k, P),
            "QK-norm without gain": change(norm, k, P),
            "linear attention, phi = relu, (11)": change(F.relu, k, P),
            "QK-norm with a gain": change(norm_and_gain, k, P),
            "one k for all heads, a B each": change(nothing, k[:1].expand_as(k), P[:1])}


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


# ---- beyond the post: RoPE as one computes it, 8265; in N dimensions, 8397 ----

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
    """8265 (13): R_n x_n for x (..., L, d), cos and sin (..., L, d/2), in float32 at least.

    layout: pairs are (q_2i, q_2i+1), "interleaved" as in the post, or (q_i, q_i+d/2), "half".
    Raises ValueError for a table of other positions than x has: it would broadcast silently;
    KeyError for another layout.
    """
    if not cos.shape[-2:] == sin.shape[-2:] == (x.shape[-2], x.shape[-1] // 2):
        raise ValueError(f"x {tuple(x.shape)}: cos {tuple(cos.shape)}, sin {tuple(sin.shape)}")
    axis, shape = {"interleaved": (-1, (-1, 2)), "half": (-2, (2, -1))}[layout]
    dtype = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    pairs, cos, sin = x.to(dtype).unflatten(-1, shape), cos.to(dtype), sin.to(dtype)
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
    """8397, the second demand (可逆性): whether R_x, by omega (d/2, N), tells x from those near it."""
    return int(torch.linalg.matrix_rank(omega)) == omega.shape[-1]


# ---- model ----

def turn(x: Tensor, table: Table) -> Tensor:
    """R_n x_n for x (..., L, d), by cos and sin or by R_n (..., L, d, d) itself."""
    if isinstance(table, tuple):
        return rotate(x, *table)
    with torch.autocast(x.device.type, enabled=False):
        return torch.einsum("...lij,...lj->...li", table, x.to(table.dtype)).to(x.dtype)


class SelfAttention(nn.Module):
    """Causal softmax attention of H heads on x (B, L, width), q and k turned by `table`.

    kept (2, B, H, M, d): keys, already turned, and values of all positions; those of x are put in
    at n (L,). mask (L, M): which of them each query sees.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, table: Table, mask: Tensor | None = None,
                kept: Tensor | None = None, n: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        (q, k), v = turn(qkv[:2], table), qkv[2]  # (B, H, L, d) each
        if kept is not None:
            k, v = kept.index_copy_(3, n, torch.stack([k, v]))  # (B, H, M, d)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm: attention, then an MLP, each added to x (B, L, width)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(width), SelfAttention(width, heads)
        self.norm2 = nn.RMSNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))

    def forward(self, x: Tensor, table: Table, mask: Tensor | None = None,
                kept: Tensor | None = None, n: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), table, mask, kept, n)
        return x + self.mlp(self.norm2(x))


POSITIONS = ("rope", "general")


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
        d, self.angles = width // heads, "A" if position == "general" else "theta"
        if position == "general":  # RoPE's own B in a random basis of each head: dense
            Q = torch.linalg.qr(torch.randn(layers, heads, d, d, dtype=torch.float64)).Q
            B = Q @ generator_matrix(thetas(d)) @ Q.mT
            self.A = nn.Parameter((B / 2 * context**0.5).float())
        else:
            self.register_buffer("theta", thetas(d).repeat(layers, heads, 1))

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """What .to(), .half() and their like do: the angles move with the rest, never cast."""
        exact = getattr(self, self.angles).data
        super()._apply(fn, recurse)
        angles = getattr(self, self.angles)
        angles.data = exact.to(angles.device)
        return self

    def B(self) -> Tensor:
        """The skew B of each head of a "general" model, 9403 (4): float64 (layers, H, d, d)."""
        scale = self.config["context"] ** -0.5  # departs: or a step of Adam turns nB by n lr
        return skew(self.A.double()) * scale

    def tables(self, length: int, n: Tensor | None) -> list[Table]:
        """What turns q and k in each layer, at positions n (L,), or 0, ..., length - 1: cos and
        sin (H, L, d/2), or for "general" R_n (H, L, d, d). Made once, for all layers."""
        dtype = torch.promote_types(self.embed.weight.dtype, torch.float32)
        if self.config["position"] == "rope":
            n = torch.arange(length, device=self.theta.device) if n is None else n
            return list(zip(*rotary_table(n, self.theta, dtype)))
        B = self.B()
        R = exp_powers(length, B) if n is None else exp_rotation(n.double(), B[:, :, None])
        return list(R.to(dtype))

    def room(self, rows: int, length: int) -> Tensor:
        """What forward keeps of `rows` texts of up to `length` bytes: (layers, 2, B, H, M, d)."""
        weight, heads = self.embed.weight, self.config["heads"]
        low = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if low else weight.dtype
        return weight.new_zeros(len(self.layers), 2, rows, heads, length,
                                weight.shape[1] // heads, dtype=dtype)

    def forward(self, tokens: Tensor, n: Tensor | None = None, kept: Tensor | None = None
                ) -> Tensor:
        """tokens (B, L) at positions n (L,), 0, 1, ... if not given; kept: the `room` of the
        positions before, which these go into."""
        x, mask = self.embed(tokens), None
        if kept is not None:
            mask = torch.arange(kept.shape[-2], device=n.device) <= n[:, None]  # (L, M)
        for i, (layer, table) in enumerate(zip(self.layers, self.tables(tokens.shape[1], n))):
            x = layer(x, table, mask, None if kept is None else kept[i], n)
        logits = self.last(self.norm(x))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def loss(net: nn.Module, tokens: Tensor) -> Tensor:
    """Bits, (B, L), of each of tokens (B, L + 1) but the first, from those before it."""
    logits = net(tokens[:, :-1])
    return F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none") / math.log(2)


@torch.no_grad()
def sample(net: LanguageModel, tokens: Tensor, count: int, g: torch.Generator,
           temperature: float = 0.8) -> Tensor:
    """tokens (B, L), then `count` bytes more, drawn one by one; each passes the net once."""
    rows, length = tokens.shape
    n, kept = torch.arange(length + count, device=tokens.device), net.room(rows, length + count)
    new, at, text = tokens, n[:length], [tokens]
    for k in watch(range(count), count, "drawing texts, byte"):
        p = (net(new, at, kept)[:, -1:] / temperature).softmax(-1)  # (B, 1, 256)
        clocks = torch.empty_like(p).exponential_(generator=g)
        new = (p / clocks).argmax(-1)  # as torch.multinomial, which would wait for the GPU
        text.append(new)
        at = n[length + k:length + k + 1]
    return torch.cat(text, 1)


@torch.no_grad()
def fold(net: LanguageModel) -> LanguageModel:
    """9403 (10): the plain "rope" model that computes what a "general" one does; same dtype."""
    if net.config["position"] == "rope":
        return net
    heads, state, theta = net.config["heads"], net.state_dict(), []
    del state["A"]
    for i, B in enumerate(net.B()):  # (H, d, d)
        name = f"layers.{i}.attention.qkv."
        weight, bias = (state[name + part].clone().unflatten(0, (3, heads, -1))
                        for part in ("weight", "bias"))  # (3, H, d, width), (3, H, d)
        for h in range(heads):
            P, theta_h = canonical(B[h])
            theta.append(theta_h)
            for part in (0, 1):  # q and k; v is not rotated
                folded = absorb(weight[part, h].double(), bias[part, h].double(), P)
                weight[part, h], bias[part, h] = folded
        state |= {name + "weight": weight.flatten(0, 2), name + "bias": bias.flatten()}
    state["theta"] = torch.stack(theta).unflatten(0, (-1, heads))  # (layers, H, d/2)
    rope = LanguageModel(**net.config | dict(position="rope")).to(net.embed.weight)
    rope.load_state_dict(state)
    return rope


# ---- evaluation ----

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
                  "largest_logit": want.abs().max().item(), **limits(q, k, general.B()[0])}


@torch.no_grad()
def bits_by_position(net: nn.Module, data: Tensor, length: int, batch: int) -> Tensor:
    """loss (N, length) on all windows of `length` bytes in data (T,), `batch` bytes at once."""
    parts = data.unfold(0, length + 1, length).split(max(1, batch // length))
    parts = watch(parts, len(parts), "evaluating, batch")
    return torch.cat([loss(net, part.long()) for part in parts])


def baselines(train: Tensor, test: Tensor) -> dict[str, float]:
    """Bits of uint8 `test` by byte frequencies of `train`, and by gzip and xz (alone)."""
    count = torch.bincount(train.long(), minlength=256).double() + 1
    raw = test.cpu().numpy().tobytes()
    return {"unigram": -(count / count.sum()).log2()[test.long()].mean().item(),
            "gzip": 8 * len(gzip.compress(raw, 9)) / len(raw),
            "xz": 8 * len(lzma.compress(raw, preset=9)) / len(raw)}


def report(net: LanguageModel, train: Tensor, test: Tensor, args: argparse.Namespace) -> dict:
    """The numbers for metrics.json, said as well; bits.svg and samples.txt. A dense B is folded
    first: from then on it is the plain RoPE model that is measured."""
    out, metrics = Path(args.out), {}
    if args.position == "general":
        tokens = test[None, :args.context].long()
        net, metrics["completeness"] = show_completeness(net, tokens, args)
    test = test[:args.eval_bytes + 1]
    with autocast(args):
        bits = bits_by_position(net, test, args.context, args.batch_size * args.context)
        text = write_samples(net, out / "samples.txt", args.samples, args)
    metrics |= dict(test_bits_per_byte=bits.mean().item(), test_bytes=bits.numel(),
                    test_standard_error=bits.mean(1).std().item() / len(bits) ** 0.5,
                    baselines=baselines(train, test[1:bits.numel() + 1]),
                    bits_by_position=draw_bits(out / "bits.svg", bits.mean(0).cpu()))
    others = "  ".join(f"{name} {value:.3f}" for name, value in metrics["baselines"].items())
    say(f"{text}\ntest: {metrics['test_bits_per_byte']:.3f} bits per byte, standard error "
        f"{metrics['test_standard_error']:.3f}, at length {args.context} ({bits.numel():,} bytes; "
        f"on the same ones  {others})")
    return metrics


def show_completeness(net: LanguageModel, tokens: Tensor, args: argparse.Namespace
                      ) -> tuple[LanguageModel, dict]:
    """`completeness` in words; the folded model, saved in OUT/folded, and in theta.svg how far the
    learnt frequencies are from RoPE's."""
    rope, found = completeness(net, tokens)
    rope = rope.float()
    if args.compile:
        rope.compile()
    its = argparse.Namespace(**vars(args) | dict(out=f"{args.out}/folded", position="rope"))
    save_checkpoint(its, args.steps, dict(model=rope, opt=optimiser(rope, args.lr)))
    rows = {"RoPE": thetas(2 * rope.theta.shape[-1])} | {
        f"layer {i}": row for i, row in enumerate(rope.theta.median(1).values)}
    draw_curves(Path(args.out) / "theta.svg", "log10 theta_i, median of the heads", "i", {
        name: (range(len(row)), row.log10().tolist()) for name, row in rows.items()})
    say(f"9403 (10): a dense B per head, folded into plain RoPE ({its.out}/ckpt.pt), changes\n"
        f"logits of up to {found['largest_logit']:.1f} by {found['logits']:.1e} at most, in "
        "float64. Change of scores, relative to the largest:")
    for name in list(found)[2:]:
        verdict = "nothing is lost" if found[name] < 1e-9 else "P cannot be folded"
        say(f"  {name:36}{found[name]:10.1e}   {verdict}")
    return rope, found


def draw_bits(path: Path, bits: Tensor) -> dict[int, float]:
    """Draws bits (L,) by position, in octaves: {n: mean of the positions above n/2 up to n}."""
    ends = [2**k for k in range(len(bits).bit_length())]
    means = {n: bits[n // 2:n].mean().item() for n in ends}
    draw_curves(path, "bits per byte of the test text", "position in the window",
                {"": (ends, list(means.values()))}, log2=True)
    return means


def write_samples(net: LanguageModel, path: Path, count: int, args: argparse.Namespace) -> str:
    """Draws `count` texts into `path`, alike for alike weights; returns them."""
    device = net.embed.weight.device
    prompt = torch.tensor(list(os.fsencode(args.prompt))).to(device).expand(count, -1)
    g = generator(device, args.sample_seed)
    texts = sample(net, prompt, args.length, g, args.temperature).tolist()
    said = f"\n{'-' * 80}\n".join(bytes(text).decode("utf-8", "replace") for text in texts)
    path.write_text(said + "\n", "utf-8")
    return said


# ---- training ----
# Random streams: torch.manual_seed(seed) the first weights; generator(seed, step) which windows of
# the text step `step` sees; generator(sample_seed) the bytes of the texts drawn.

def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that each are right, but not together."""
    if args.width % (2 * args.heads):
        raise UserError(f"--width {args.width}: --heads {args.heads} need 2, 4, ... channels each")
    if args.eval_bytes < 2 * args.context:
        raise UserError(f"--eval-bytes {args.eval_bytes}: 2 times --context at least, for a "
                        f"standard error, {2 * args.context}")
    if not args.prompt:
        raise UserError("--prompt: at least one byte")


def load_data(args: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Train, validation and test bytes on the device. Raises UserError if a part is too short."""
    parts = split_text(load_text(args.data, args.cache), device)
    if min(map(len, parts)) <= 2 * args.context:
        raise UserError(f"--data {args.data}: {len(parts[2])} bytes to test on, too few for "
                        f"--context {args.context}")
    return parts


def optimiser(net: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Adam, with a shorter memory of the squares, as usual for such models."""
    return torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.98), fused=True)


def build(args: argparse.Namespace, device: torch.device) -> LanguageModel:
    """The model that the flags describe, with its first weights."""
    torch.manual_seed(args.seed)
    net = LanguageModel(args.position, args.width, args.layers, args.heads, args.context)
    if args.compile:
        net.compile()
    return net.to(device)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine to zero."""
    fall = (1 + math.cos(math.pi * step / args.steps)) / 2
    return args.lr * min(1, (step + 1) / args.warmup) * fall


def train(args: argparse.Namespace, device: torch.device, state: dict | None) -> None:
    """The whole run: data, loop, checkpoints, the theorem, metrics.json."""
    text, valid, test = load_data(args, device)
    net = build(args, device)
    opt = optimiser(net, args.lr)
    parts = dict(model=net, opt=opt)
    first = restore(state, parts)
    make_room(args)
    params = list(net.parameters())
    wrapped = nn.parallel.DistributedDataParallel(net) if RANKS > 1 else net
    progress = Progress(args, first, sum(p.numel() for p in params),
                        args.batch_size * args.context, "byte")
    window = torch.arange(args.context + 1, device=device)

    def save(step: int, end: bool) -> None:
        save_checkpoint(args, step, parts)
        if not end and not RANK:
            with autocast(args):
                bits = bits_by_position(net, valid[:args.eval_bytes + 1], args.context,
                                        args.batch_size * args.context).mean()
                write_samples(net, Path(args.out) / f"samples_{step:06}.txt", args.samples, args)
            say(f"validation {bits:.4f} bits per byte")

    for step in training(args, first, save):
        g = generator(device, args.seed, step)
        starts = torch.randint(len(text) - args.context, (args.batch_size, 1), generator=g,
                               device=device)
        tokens = text[mine(starts) + window].long()  # (B, L + 1)
        lr = opt.param_groups[0]["lr"] = learning_rate(step, args)
        with autocast(args):
            value = loss(wrapped, tokens).mean()
        value.backward()
        nn.utils.clip_grad_norm_(params, args.clip_grad or math.inf)
        opt.step()
        opt.zero_grad()
        progress.add(step + 1, bits=value.detach(), lr=lr)
    if RANK:
        return
    seconds = time.perf_counter() - progress.begin
    metrics = dict(step=args.steps, seed=args.seed, train_seconds=seconds,
                   bytes_per_second=(args.steps - first) * progress.items / seconds)
    write_metrics(args, metrics | report(net, text, test, args))


def sample_only(args: argparse.Namespace, device: torch.device, state: dict) -> None:
    """Draws --sample-only texts from the weights in ckpt.pt, whatever device made them."""
    net = build(args, device)
    restore(state, dict(model=net))
    net = fold(net)
    if args.compile:
        net.compile()
    path = Path(args.out) / "samples_only.txt"
    with autocast(args):
        say(write_samples(net, path, args.sample_only, args))
    say(str(path))


# ---- command line ----

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, a row each."""
    experiment = dict(
        # flag       CPU        --gpu      least  meaning
        data=       ("python",             None, "python (the standard library's sources), "
                     "shakespeare, enwik8, text8, or a file, also .gz .bz2 .xz .zip"),
        steps=      (1000,                 1, "in all, resumed ones included"),
        batch_size= (4,         64,        1, "global, over all processes"),
        seed=       (0,                    0, "of weights, noise and order"),
        position=   ("general", "rope",    POSITIONS, "what turns q and k: general is exp(nB), "
                     "9403 (2), with a dense B learnt and then folded"),
        context=    (256,       512,       8, "bytes seen at once in training"),
        width=      (128,       512,       2, "channels"),
        layers=     (3,         8,         1, "attention and MLP each"),
        heads=      (8,                    1, "of attention; an even share of the width each"),
        lr=         (4e-3,      1e-3,      0, "Adam's learning rate at its height"),
        warmup=     (50,        100,       1, "steps of linear warm-up"),
        clip_grad=  (1.0,                  0, "largest gradient norm, 0: any"),
    )
    others = dict(
        save_every= (1000,                 1, "steps between checkpoints, with texts and "
                     "validation"),
        eval_bytes= (65_536,    2_097_152, 1, "of the test text that are used, 2 contexts or more"),
        samples=    (3,         4,         1, "texts drawn"),
        length=     (250,       500,       1, "bytes of such a text after --prompt"),
        prompt=     ("def ",               None, "how they begin"),
        temperature=(0.8,                  0.01, "of drawing a byte"),
        sample_seed=(0,                    0, "of the texts drawn"),
        sample_only=(0,                    0, "only draw as many texts, from ckpt.pt"),
    )
    return read_flags("rope", __doc__.partition("\n")[0], argv, experiment, others)


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
    shakespeare, enwik8, text8, or a file, also .gz .bz2 .xz; of a .zip all but hidden members.

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
        elif path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                documents = [as_utf8(archive.read(name), f"--data {data}, {name}")
                             for name in sorted(archive.namelist()) if Path(name).name[:1] != "."]
        else:
            unpack = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
            with unpack.get(path.suffix.lower(), open)(path, "rb") as file:
                documents = [as_utf8(file.read(), f"--data {data}")]
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--data {data}: no such file (a folder: as .zip), nor one of python, "
                        f"{', '.join(TEXTS)}") from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the unpackers raise a dozen kinds
        raise UserError(f"--data {data}: damaged, or not what it seems to be: "
                        f"{str(error) or type(error).__name__}") from None
    if not any(documents):
        raise UserError(f"--data {data}: nothing in it")
    return [document for document in documents if document]


def as_utf8(raw: bytes, what: str) -> bytes:
    """raw, if it is UTF-8, without a byte-order mark; UTF-16 that has one is converted.

    A character cut at the end may be. Raises UserError for other encodings, and what is no text.
    """
    if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raw = raw.decode("utf-16").encode()
    raw = raw.removeprefix(codecs.BOM_UTF8)
    with suppress(UnicodeDecodeError):
        codecs.utf_8_decode(raw, "strict", False)
        if b"\0" not in raw:
            return raw
    high, pairs = (len(b"".join(re.findall(rb"[\x80-\xff]" + n, raw))) for n in (b"", b"{2,}"))
    if b"\0" in raw:
        guess = "UTF-16, UTF-32 or no text: it has NUL bytes"
    elif 10 * raw.decode("utf-8", "replace").count("\N{REPLACEMENT CHARACTER}") < high:
        guess = "UTF-8, but for damage that iconv -c leaves out"
    elif 2 * pairs > high:  # letters of two bytes, not accents
        guess = "GB18030, else BIG5, SHIFT_JIS or CP1251"
    else:
        guess = "CP1252"
    raise UserError(f"{what}: not UTF-8, perhaps {guess}: iconv -f {guess.partition(',')[0]} "
                    "-t UTF-8 OLD > NEW converts it")


def split_text(documents: list[bytes], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Train, validation and test bytes, uint8 (T,) on the device: 90 %, then 5 % and 5 %."""
    whole = torch.frombuffer(bytearray(b"\n".join(documents)), dtype=torch.uint8).to(device)
    return whole.split([len(whole) - 2 * (len(whole) // 20), len(whole) // 20, len(whole) // 20])
# === end shared ===


# === shared: curves ===
def ticks(low: float, high: float) -> list[float]:
    """Round numbers, 2 to 8 of them: the first is at most `low`, the last at least `high`."""
    span = high - low or abs(low) or 1
    power = 10 ** math.floor(math.log10(span / 6))
    step = next(k * power for k in (1, 2, 5, 10) if 6 * k * power >= span)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [k * step for k in range(first, max(last, first + 1) + 1)]


def draw_curves(path: Path, title: str, x_label: str, curves: dict[str, tuple[list, list]],
                log2: bool = False) -> None:
    """Writes an SVG: for each name a line through its points (x, y), with a gap where y is not
    finite; log2: x > 0 by powers of 2."""
    place = math.log2 if log2 else float
    lines = {name: [(place(x), float(y)) for x, y in zip(*xy)] for name, xy in curves.items()}
    seen = [p for points in lines.values() for p in points if math.isfinite(p[1])] or [(0, 0)]
    across, up = (ticks(min(values), max(values)) for values in zip(*seen))

    def at(x: float, y: float) -> str:
        return (f"{60 + 480 * (x - across[0]) / (across[-1] - across[0]):.1f},"
                f"{290 - 240 * (y - up[0]) / (up[-1] - up[0]):.1f}")

    svg = ['<svg xmlns="http://www.w3.org/2000/svg" width="740" height="340" font-size="12" '
           'font-family="sans-serif"><rect width="740" height="340" fill="#fff"/>',
           f'<text x="60" y="30" font-size="15">{html.escape(title)}</text>',
           f'<text x="540" y="328" text-anchor="end">{html.escape(x_label)}</text>']
    for y in up:
        svg += [f'<path d="M{at(across[0], y)}H540" stroke="#ddd"/>',
                f'<text x="52" y="{at(0, y).partition(",")[2]}" dy="4" text-anchor="end">{y:.4g}'
                '</text>']
    for x in across:
        svg.append(f'<text x="{at(x, 0).partition(",")[0]}" y="308" text-anchor="middle">'
                   f'{2 ** x if log2 else x:g}</text>')
    colours = itertools.cycle(["#0b62a4", "#d1495b", "#2e8b57", "#e0a100", "#7b52ab", "#555"])
    for row, ((name, points), colour) in enumerate(zip(lines.items(), colours)):
        line, pen = "", "M"
        for x, y in points:
            line += f"{pen}{at(x, y)}" if math.isfinite(y) else ""
            pen = "L" if math.isfinite(y) else "M"
        svg += [f'<path d="{line}" fill="none" stroke="{colour}" stroke-width="2"/>',
                f'<text x="550" y="{62 + 20 * row}" fill="{colour}">{html.escape(name)}</text>']
    path.write_text("\n".join(svg) + "\n</svg>\n", "utf-8")
# === end shared ===


# ---- main ----

def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse_args(argv)
    return run(sample_only if args.sample_only else train, args, check_flags)


if __name__ == "__main__":
    sys.exit(main())
