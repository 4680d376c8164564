# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy"]
# ///
"""Transformer-VQ: quantise the keys, and softmax attention takes linear time.

Post    VQ一下Key，Transformer的复杂度就变成线性了   https://kexue.fm/archives/9844 (read 2026-11)
        Paper: Lingle 2023, arXiv 2309.16354; its code: transformer-vq/transformer_vq (JAX).

Map     9844 (1)   softmax(Q K^T) V                               vq_attention_quadratic
        9844 (2)   softmax(Q K_hat^T) V, K_hat = VQ(K, C)       quantize, vq_attention_quadratic
        9844 (3)   exp(Q K^T) V / (exp(Q K^T) 1)                          vq_attention_encoder
        9844 (4)   exp(Q K_hat^T) V = exp(Q C^T) (Delta^T V)              vq_attention_encoder
        9844 (5)   O_i = exp(Q_i C^T) sum_{j<=i} Delta_j^T V_j            blocks_at_once
        9844 (6)   O_i = exp(Q_i C^T) U_i, U_i = U_{i-1} + Delta_i^T V_i  vq_step, accumulate
        9844 (7)   exp(Q_[i] K_hat_[i]^T + M) V_[i] + older blocks by C   Blocks
        9844 (8)   (7) with U_{i-1} for the sum                           Blocks
        9844 (9)   blocks i, i - 1 by their keys with B, the rest by C    band
        9844 (10)  (9) with U_{i-2}; U_i = U_{i-1} + Delta_[i]^T V_[i]  block_attention, Blocks
        9844       K-means on the keys of a model gives its first C       kmeans
Symbols c codes, C (c, d_k) their vectors, M + 1 numbers of B for the distances 0, ..., M: M is the
        window, which the post sets to the block length l. The post's M in (7), a mask, is in B.
        ids is Delta, as numbers. Everywhere O is divided by its denominator, (3), and q comes
        scaled. U is a sum as in the post; (10) is computed with its mean and the count, see there.
Shapes  B batch (alone, B is the post's bias), n tokens, L = l tokens of a block, w so far in the
        window, at most M, D width of the model.

Run     python transformer_vq.py                                # CPU: bytes, about 2 minutes
        python transformer_vq.py --attention exact              # or window: the same without VQ
        python transformer_vq.py --gpu --data enwik8            # one GPU
        torchrun --nproc_per_node=8 transformer_vq.py --gpu     # the same global batch on eight
        torchrun --nproc_per_node=8 transformer_vq.py --gpu --paper  # enwik8, 8 cards of 80 GB
        python transformer_vq.py --sample-only 3                # from out/transformer_vq/ckpt.pt
Needs   torch, numpy
"""

import argparse
import bz2
import codecs
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
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ---- the post: 9844 ----

def vq_attention_quadratic(q: Tensor, k_hat: Tensor, v: Tensor, bias: Tensor | None = None
                           ) -> Tensor:
    """9844 (2), read literally, or (1) if k_hat are raw keys: O (B, n, d_v), in quadratic time.

    q, k_hat (B, n, d_k), v (B, n, d_v). bias (M+1,) makes it causal, with B of `band`; without a
    bias every token sees all. Every key gets its gradient: the post's exact straight-through.
    """
    scores = q @ k_hat.mT  # (B, n, n)
    if bias is not None:
        scores = scores + band(bias, q.shape[1], 0)
    return scores.softmax(-1) @ v  # 9844 (1), (2)


def quantize(k: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """9844 (2): ids (...) of the codes nearest to k (..., d_k), the first of equals, and K_hat.

    K_hat is the code going forward, bit for bit; its gradient is k's (straight-through), none is
    the codebook's (c, d_k). Searches in float32, 4096 keys at once: memory does not grow as n c.
    """
    with torch.no_grad(), torch.autocast(k.device.type, enabled=False):
        C = codebook.to(torch.promote_types(codebook.dtype, torch.float32))
        half = C.square().sum(-1) / 2  # |k - C_s|^2 / 2 = |k|^2 / 2 - (k C_s - half_s)
        rows = k.reshape(-1, k.shape[-1]).split(4096)
        ids = torch.cat([(x.to(C.dtype) @ C.T - half).argmax(-1) for x in rows]).view(k.shape[:-1])
    return ids, codebook.detach()[ids].to(k.dtype) + (k - k.detach())


def vq_attention_encoder(q: Tensor, ids: Tensor, v: Tensor, codebook: Tensor) -> Tensor:
    """9844 (4), every token sees all, in linear time: O (B, n, d_v) for ids (B, n), q, v as in (2).

    Delta^T V is a sum of values by code, and in the denominator (3), V = 1, Delta^T 1 a count.
    """
    U, count = accumulate(*no_sums(v, len(codebook)), ids, v)  # Delta^T V and Delta^T 1
    scores = (q @ codebook.T).masked_fill(count[:, None] == 0, -math.inf)  # of codes in use
    weights = (scores - scores.amax(-1, keepdim=True)).exp()  # exp(Q C^T); the maximum cancels
    return weights @ U / (weights @ count[..., None])  # 9844 (4) over (4) with V = 1: (3)


def no_sums(v: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """U_{-1} = 0 (B, c, d_v) and its count (B, c): float32 at least, as bfloat16 stops at 256."""
    U = v.new_zeros(len(v), codes, v.shape[-1], dtype=torch.promote_types(v.dtype, torch.float32))
    return U, U.new_zeros(U.shape[:2])


def accumulate(U: Tensor, count: Tensor, ids: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """9844 (6), (10): U (B, c, d_v) += Delta^T V, and the count, by ids (B, L), v (B, L, d_v)."""
    U.scatter_add_(1, ids[..., None].expand_as(v), v.to(U.dtype))  # Delta itself is never made
    return U, count.scatter_add_(1, ids, torch.ones_like(ids, dtype=count.dtype))


class Memory(NamedTuple):
    """What the tokens so far leave behind: of the last M the keys, codes and values, (B, w, ...),
    of all older ones the sums U (B, c, d_v) and how many there were, count (B, c)."""

    k_hat: Tensor
    ids: Tensor
    v: Tensor
    U: Tensor
    count: Tensor


def first_state(k_hat: Tensor, ids: Tensor, v: Tensor, codebook: Tensor) -> Memory:
    """Before any token: an empty window, and U_{-1} = 0. Of the tensors only shapes are used."""
    return Memory(k_hat[:, :0], ids[:, :0], v[:, :0], *no_sums(v, len(codebook)))


def band(bias: Tensor, rows: int, past: int, outside: float = 0.0) -> Tensor:
    """B of 9844 (9) for the last `rows` of past + rows tokens: (..., rows, past + rows).

    B_{i,j} is bias[i - j] for 0 <= i - j <= M, -inf for j > i (the mask of (7)) and `outside`
    beyond the window. bias: (M+1,), so that B is Toeplitz, or (..., rows, M+1), for each query.
    """
    # The text before (9) has B_{i,j} = 0 where i < j or i - j <= l; its figure and (9) mean this.
    distance = (past + torch.arange(rows, device=bias.device)[:, None]
                - torch.arange(past + rows, device=bias.device))  # i - j
    later, far = distance < 0, distance > bias.shape[-1] - 1
    near, bias = distance.masked_fill(later | far, 0), bias.expand(*bias.shape[:-2], rows, -1)
    B = bias.gather(-1, near.expand(*bias.shape[:-1], -1))  # bias[near] adds up gradients slowly
    B = B.masked_fill(far, outside)  # 9844 (9)
    return B.masked_fill(later, -math.inf)  # the M of 9844 (7)


def block_attention(q: Tensor, k_hat: Tensor, v: Tensor, B: Tensor, codebook: Tensor, U: Tensor,
                    count: Tensor) -> Tensor:
    """9844 (10) for one block, divided by its denominator: O_[i] (..., L, d_v) of q (..., L, d_k).

    k_hat (..., w+L, d_k), v (..., w+L, d_v): of the window and the block, B (..., L, w+L) theirs.
    U (..., c, d_v), count (..., c): of all tokens before; a code of none of them gets weight 0.
    """
    # The third term is exp(q C_s) U_s = exp(q C_s + log count_s) mean_s: so one softmax over codes
    # and keys, with one maximum, does all three, and no sum over 10^5 tokens meets bfloat16.
    mean = (U / count.clamp(min=1)[..., None]).to(v.dtype)
    far = count.log()[..., None, :].expand(*q.shape[:-1], -1)  # -inf for an unused code
    keys = torch.cat([codebook.to(k_hat.dtype).expand(*k_hat.shape[:-2], -1, -1), k_hat], -2)
    scores = q @ keys.mT + torch.cat([far, B.expand(*q.shape[:-1], -1)], -1)  # (..., L, c+w+L)
    return scores.softmax(-1).to(v.dtype) @ torch.cat([mean, v], -2)  # 9844 (10)


def vq_attention(q: Tensor, k_hat: Tensor, ids: Tensor, v: Tensor, codebook: Tensor, bias: Tensor,
                 block: int, state: Memory | None = None, through: bool = False,
                 at_once: bool = False) -> tuple[Tensor, Memory]:
    """9844 (10): (2) with B, causal, in time and memory linear in n: O (B, n, d_v) and the state.

    q, k_hat (B, n, d_k), ids (B, n), v (B, n, d_v), bias (M+1,) or (B, n, M+1). M is the window,
    `block` only how many tokens are computed at once. 9844 (7), (8): no window, bias (1,) = 0.
    Keys in reach of a block get their gradient, U passes none; with `through` it does to values.
    at_once: by `blocks_at_once`, as with `through`; the same numbers, more memory.
    """
    # The post defines U_i with sum_{j<i} before (8), but (8) and (10) need j <= i, as their
    # recursion has it. Of (10) it stops the gradient of U_{i-2}, there called U_{i-1}.
    state = state or first_state(k_hat, ids, v, codebook)
    k, z, x = (torch.cat([old, new], 1) if old.shape[1] else new  # (B, w + n, ...)
               for old, new in zip(state, (k_hat, ids, v)))
    if bias.ndim == 3:
        bias = F.pad(bias, (0, 0, 0, -q.shape[1] % block)).unflatten(1, (-1, block))
    M = bias.shape[-1] - 1
    B = band(bias, block, M)
    B = B if bias.ndim == 4 else B[None, None]  # alike for all blocks
    parts = q, k, z, x, B, codebook, *state[3:]
    out, U, count = (blocks_at_once(*parts, through) if through or at_once else
                     Blocks.apply(*parts))
    return out, Memory(*(part[:, max(0, k.shape[1] - M):] for part in (k, z, x)), U, count)


class Blocks(torch.autograd.Function):
    """9844 (10), `block_attention` of all blocks in turn, faster: each where the one before was in
    memory, and the gradient by hand, for which a block's weights are made again, not kept."""

    @staticmethod
    def each(q: Tensor, k_hat: Tensor, ids: Tensor, v: Tensor, B: Tensor, codebook: Tensor,
             U: Tensor, count: Tensor) -> Iterator[tuple]:
        """For each block: its place in q; with its window, in k_hat; its part of B (1 or B, 1 or
        m, L, M+L); count_s exp(q C_s) (B, L, c) and exp(q k_hat + B) (B, L, w+L), over their
        denominator; each code's mean value (B, c, d_v). Then U and count take in, in place, what
        leaves the window. All have U's dtype."""
        past, L, C = k_hat.shape[1] - q.shape[1], B.shape[-2], codebook.T.expand(len(q), -1, -1)
        M = B.shape[-1] - L
        room = q.new_empty(len(q), L, len(codebook) + M + L)  # stays in the processor's cache
        for i, q_i in enumerate(q.split(L, 1)):
            start = past + i * L
            first, end = max(0, start - M), start + q_i.shape[1]
            c = len(codebook) if first or past >= M else 0  # until then U is 0
            part = (slice(None), min(i, B.shape[1] - 1), slice(end - start),
                    slice(M - start + first, M - start + end))
            scores = room[:, :end - start, :c + end - first]
            far, near = scores[..., :c], scores[..., c:]
            torch.baddbmm(count[:, None, :c].log(), q_i, C[..., :c], out=far)
            torch.baddbmm(B[part], q_i, k_hat[:, first:end].mT, out=near)
            torch.softmax(scores, -1, out=scores)
            mean = U[:, :c] / count[:, :c, None].clamp(min=1)
            yield slice(start - past, end - past), slice(first, end), part, far, near, mean
            old = slice(first, max(first, end - M))
            accumulate(U, count, ids[:, old], v[:, old])  # 9844 (8), (10)

    @staticmethod
    def forward(ctx, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """O (B, n, d_v), and the U and count after it, from what `each` takes."""
        q, k_hat, ids, v, B, C, U, count = inputs
        U, count, out = U.clone(), count.clone(), v.new_empty(*q.shape[:2], v.shape[-1])
        q, k_hat, B, C = (part.to(U.dtype) for part in (q, k_hat, B, C))
        for here, window, _, *parts in Blocks.each(q, k_hat, ids, v, B, C, U, count):
            far, near, mean = (part.to(v.dtype) for part in parts)
            torch.bmm(far, mean, out=out[:, here]).baddbmm_(near, v[:, window])  # 9844 (7), (10)
        ctx.save_for_backward(*inputs, out)
        ctx.mark_non_differentiable(U, count)
        return out, U, count

    @staticmethod
    def backward(ctx, grad: Tensor, *_) -> tuple:
        """Of q, k_hat, v and B. A weight p and its score s: ds = p (dp - sum of p dp), and the sum
        is dO O, as O is the sum of p v."""
        q, k_hat, ids, v, B, C, U, count, out = ctx.saved_tensors
        q, k_hat, v, B, C, out, g = (x.to(U.dtype) for x in (q, k_hat, v, B, C, out, grad))
        dq, dk, dv, dB = (torch.zeros_like(part) for part in (q, k_hat, v, B))
        U, count, dO_O = U.clone(), count.clone(), (g * out).sum(-1, keepdim=True)
        room = q.new_empty(len(q), B.shape[-2] * max(len(C), B.shape[-1]))
        for here, window, part, far, near, mean in Blocks.each(q, k_hat, ids, v, B, C, U, count):
            q_i, g_i, dO_O_i, dq_i = (x[:, here] for x in (q, g, dO_O, dq))
            ds = room[:, :far[0].numel()].view(far.shape)
            torch.baddbmm(dO_O_i, g_i, mean.mT, beta=-1, out=ds).mul_(far)
            torch.bmm(ds, C[:far.shape[-1]].expand(len(q), -1, -1), out=dq_i)
            ds = room[:, :near[0].numel()].view(near.shape)
            torch.baddbmm(dO_O_i, g_i, v[:, window].mT, beta=-1, out=ds).mul_(near)
            dq_i.baddbmm_(ds, k_hat[:, window])
            dk[:, window].baddbmm_(ds.mT, q_i)
            dv[:, window].baddbmm_(near.mT, g_i)
            dB[part].add_(ds.sum_to_size(dB[part].shape))
        return dq, dk, None, dv, dB, None, None, None


def blocks_at_once(q: Tensor, k_hat: Tensor, ids: Tensor, v: Tensor, B: Tensor, codebook: Tensor,
                   U: Tensor, count: Tensor, through: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `Blocks` gives, by `block_attention` of all blocks at once, with autograd's gradient:
    the U_i by a cumulative sum, the post's way for (5).

    Holds n / L sums (c, d_v), and all weights until the backward pass, and takes as many kernels
    whatever n is.
    """
    n, L, c = q.shape[1], B.shape[-2], len(codebook)
    m, M = -(-n // L), B.shape[-1] - L
    front, back = M + n - k_hat.shape[1], m * L - n  # empty places: all windows, blocks full
    k, x = (F.pad(part, (0, 0, front, back)) for part in (k_hat, v))  # (B, M + m L, ...)
    near_k, near_x = (part.unfold(1, M + L, L).mT for part in (k, x))  # (B, m, M+L, ...)
    place = torch.arange(M + m * L, device=q.device).unfold(0, M + L, L)[:, None]
    B = B.expand(-1, m, -1, -1).masked_fill(place < front, -math.inf)
    # What leaves the window, summed in each block; what is not there, or stays, has a code c.
    z = F.pad(F.pad(ids, (front, 0), value=c)[:, :n], (0, back), value=c)
    old = (x if through else x.detach())[:, :m * L].reshape(-1, L, v.shape[-1])
    sums = accumulate(*no_sums(old, c + 1), z.reshape(-1, L), old)
    # 9844 (5), of blocks: (B, m+1, c, d_v)
    U, count = (torch.cat([before[:, None], each[:, :c].unflatten(0, (-1, m))], 1).cumsum(1)
                for before, each in zip((U, count), sums))
    q = F.pad(q, (0, 0, 0, back)).unflatten(1, (m, L))
    out = block_attention(q, near_k, near_x, B, codebook, U[:, :-1], count[:, :-1])
    return out.flatten(1, 2)[:, :n], U[:, -1], count[:, -1]


def vq_step(q: Tensor, k_hat: Tensor, ids: Tensor, v: Tensor, codebook: Tensor, bias: Tensor,
            state: Memory) -> tuple[Tensor, Memory]:
    """9844 (6) with the window of (10): the next token, in time and memory that n does not enter.

    q, k_hat (B, d_k), ids (B,), v (B, d_v), bias (M+1,) or (B, 1, M+1). It is a block of one.
    """
    token = (part[:, None] for part in (q, k_hat, ids, v))
    out, state = vq_attention(*token, codebook, bias, 1, state)  # 9844 (6)
    return out[:, 0], state


def kmeans(keys: Tensor, codebook: Tensor, rounds: int = 10) -> tuple[Tensor, Tensor]:
    """9844, 发散思考: codes (c, d_k) of a model's keys (N, d_k) by K-means, beginning with `codebook`.

    Also how many keys each is the mean of, (c,). One without keys stays where it is.
    """
    for _ in range(rounds):
        sums, count = code_sums(keys, quantize(keys, codebook)[0], len(codebook))
        codebook = torch.where(count[:, None] > 0, sums / count.clamp(min=1)[:, None], codebook)
    return codebook, count


# ---- beyond the post ----

def exact_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, block: int,
                    past: tuple[Tensor, Tensor] | None = None, window: bool = False
                    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """9844 (1) with B, causal, by torch's own attention; shapes as in vq_attention; a rival.

    past: all keys and values before, (B, w, ...), returned with these after them. With `window`
    nothing beyond the M last tokens is seen or kept: (10) without its third term.
    """
    k, v = (torch.cat(pair, 1) for pair in zip(past, (k, v))) if past else (k, v)
    w, M, out = k.shape[1] - q.shape[1], bias.shape[-1] - 1, []
    for i, q_i in zip(range(w, k.shape[1], block), q.split(block, 1)):
        near, end = min(i, M), i + q_i.shape[1]
        first = i - near if window else 0
        bias_i = bias if bias.ndim == 1 else bias[:, i - w:end - w]
        B = band(bias_i, end - i, near, -math.inf if window else 0.0)
        B = F.pad(B, (i - near - first, 0)).to(q.dtype)  # 0 before the window
        out.append(F.scaled_dot_product_attention(q_i, k[:, first:end], v[:, first:end], B,
                                                  scale=1.0))
    first = max(0, k.shape[1] - M) if window else 0
    return torch.cat(out, 1), (k[:, first:], v[:, first:])


# ---- model ----

def all_sum(x: Tensor) -> Tensor:
    """x summed over all ranks, in place."""
    if RANKS > 1:
        torch.distributed.all_reduce(x)
    return x


def all_rows(x: Tensor) -> Tensor:
    """x (rows, ...) of all ranks, one after another: what `mine` takes its slice of."""
    whole = x.new_zeros(RANKS * len(x), *x.shape[1:])
    mine(whole).copy_(x)
    return all_sum(whole)


def code_sums(keys: Tensor, ids: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Delta^T K (codes, d_k) and Delta^T 1 (codes,) of all ranks' keys (N, d_k), ids (N,)."""
    sums, count = accumulate(*no_sums(keys[None], codes), ids[None], keys[None])
    return all_sum(sums[0]), all_sum(count[0])


def pick(keys: Tensor, count: int, g: torch.Generator) -> Tensor:
    """`count` of all ranks' keys (N, d_k), drawn without replacement, the same on every rank."""
    keys = all_rows(keys)
    return keys[torch.randperm(len(keys), generator=g, device=keys.device)[:count]]


class Codebook(nn.Module):
    """9844's C (c, d_k): averages of the keys that chose each code, over the last updates. float32.

    Moves only by `begin`, `update` and `restart`, which training calls; no gradient comes here.
    """

    def __init__(self, codes: int, d_k: int):
        super().__init__()
        self.register_buffer("sums", torch.randn(codes, d_k) * d_k ** -0.25)  # as long as a key
        self.register_buffer("count", torch.ones(codes))

    def vectors(self) -> Tensor:
        """C (c, d_k)."""
        return self.sums / self.count.clamp(min=0.01)[:, None]

    def begin(self, keys: Tensor, g: torch.Generator) -> None:
        """C from the keys (N, d_k) of a first batch, by K-means from some of them."""
        codes, count = kmeans(keys, pick(keys, len(self.count), g))
        self.count[:] = count.clamp(min=count.mean() / 10)  # or one without keys would be 0 / 0
        self.sums[:] = codes * self.count[:, None]

    def update(self, keys: Tensor, ids: Tensor, decay: float) -> None:
        """Moving averages of the sums and the counts of an update's keys (N, d_k), ids (N,)."""
        sums, count = code_sums(keys, ids, len(self.count))
        self.sums.lerp_(sums, 1 - decay)
        self.count.lerp_(count, 1 - decay)

    def dead(self) -> Tensor:
        """Which codes, (c,) bool, get less than a twentieth of an even share of the keys."""
        return self.count < self.count.mean() / 20

    def restart(self, keys: Tensor, g: torch.Generator) -> None:
        """Dead codes become keys, with a count that keeps them alive for a while and a sum to it.

        Only where no Memory is carried on: its counts would stand at another vector than its keys.
        """
        dead, count = self.dead(), self.count.mean() / 10
        new = pick(keys, len(dead), g) * count
        self.sums[:] = torch.where(dead[:, None], new, self.sums)
        self.count[:] = torch.where(dead, count, self.count)

    def usage(self) -> dict[str, Tensor]:
        """perplexity, how many codes are in use: e to the entropy of their shares, 1 to c; and the
        share of dead ones."""
        entropy = torch.special.entr(self.count / self.count.sum()).sum()
        return dict(perplexity=entropy.exp(), dead=self.dead().float().mean())


ATTENTIONS = ("vq", "exact", "window", "quadratic")


class GAU(nn.Module):
    """Gated attention unit (9844, 实验结果): x + W_o(g * attention(q, k, v)), one head, no MLP.

    kind: vq is (10); quadratic the same by (2), with every key's gradient; exact has raw keys;
    window nothing beyond M tokens. For x (B, n, D), its parts and sizes as the paper's code.
    """

    def __init__(self, kind: str, width: int, d_k: int, d_v: int, codes: int, window: int,
                 block: int, bias: str, through: bool, prefix: str, dropout: float,
                 drop_sinusoid: float, first: int, out_std: float):
        super().__init__()
        self.d_k, self.d_v, self.block = d_k, d_v, block
        self.through, self.at_once = through, prefix == "cumsum"
        self.norm, self.shift = nn.RMSNorm(width, eps=1e-6), nn.Parameter(torch.zeros(width))
        self.project = nn.Linear(width, 2 * d_k + 2 * d_v, bias=False)
        self.out = nn.Linear(d_v, width, bias=False)
        nn.init.normal_(self.project.weight, std=width ** -0.5)
        nn.init.normal_(self.out.weight, std=out_std)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.drop_sinusoid = nn.Dropout(drop_sinusoid) if drop_sinusoid else nn.Identity()
        self.book = Codebook(codes, d_k) if kind in ("vq", "quadratic") else None
        if bias == "xl":  # Transformer-XL's, as in the paper: B_{i,j} = (q_i + b) r_{i-j}
            self.r = nn.Linear(width, d_k, bias=False)
            nn.init.normal_(self.r.weight, std=width ** -0.5)
            self.a, self.b = nn.Parameter(torch.zeros(d_k)), nn.Parameter(torch.zeros(d_k))
        else:  # the post's B, a number for each distance; it begins high near the distance `first`
            self.bias = nn.Parameter(12 - 3.4 * (torch.arange(window + 1) - first).abs().log1p())

    def forward(self, x: Tensor, state: tuple | None, kind: str, sinusoids: Tensor | None) -> tuple:
        """What is added to x (B, n, D); the state; mean |k - k_hat|^2; k (B, n, d_k) and ids."""
        h = self.norm(x) + self.shift
        q, k, v, g = self.project(h).split([self.d_k, self.d_k, self.d_v, self.d_v], -1)
        scale = self.d_k ** -0.25  # |q| = |k| = d_k^{1/4}: q k is a cosine times sqrt(d_k)
        q, k = (F.rms_norm(y.float() if y.dtype == torch.bfloat16 else y, (self.d_k,), eps=1e-6)
                * scale for y in (q, k))
        v, g = F.silu(v), F.silu(g)  # (B, n, d_v)
        if sinusoids is None:
            bias = self.bias
        else:
            r = self.r(self.drop_sinusoid(sinusoids))  # (M+1, d_k)
            bias = (q + self.b * scale) @ r.mT * scale  # (B, n, M+1)
            q = q + self.a * scale
        ids, k_hat, commit = None, k, x.new_zeros(())
        if self.book:
            codebook = self.book.vectors()
            ids, k_hat = quantize(k, codebook)
            commit = (k - k_hat.detach()).square().sum(-1).mean()
        if kind == "vq":
            size = -(-x.shape[1] // self.block) * len(x) * self.d_v * len(codebook)
            at_once = self.at_once and x.shape[1] > 1 and size <= 2**28  # all U_i: at most 1 GiB
            o, state = vq_attention(q, k_hat, ids, v, codebook, bias, self.block, state,
                                    self.through, at_once)
        else:
            keys = k if kind == "exact" else k_hat
            o, state = exact_attention(q, keys, v, bias, self.block, state, kind == "window")
        return self.dropout(self.out(o * g)), state, commit, (k.detach(), ids)


def sinusoids(count: int, width: int) -> Tensor:
    """(count, width): sines, then cosines, of the distances 0, 1, ...; wave lengths to 6e5."""
    speed = 1e5 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(count)[:, None] * speed
    return torch.cat([angle.sin(), angle.cos()], 1)


class TransformerVQ(nn.Module):
    """The post's GAU-VQ: `layers` GAUs on bytes (B, n) -> logits (B, n, 256); no final norm.

    attention, one of ATTENTIONS, is what it is trained with; prefix, loop or cumsum, how (10) is
    computed; drop_layer leaves whole layers out, for each row of the batch its own.
    """

    def __init__(self, attention: str = "vq", width: int = 128, layers: int = 3, d_k: int = 64,
                 d_v: int = 256, codes: int = 64, window: int = 32, block: int = 32,
                 bias: str = "toeplitz", through: bool = False, prefix: str = "loop",
                 dropout: float = 0.0, drop_sinusoid: float = 0.0, drop_layer: float = 0.0):
        super().__init__()
        self.attention, self.drop_layer = attention, drop_layer
        self.embed = nn.Embedding(256, width)
        reach = max(1, int(math.log2(max(window, 1))))  # layer i's B begins high near 2^i
        out_std = (12 / layers / d_v) ** 0.5  # departs: the paper has d_v ** -0.5 at any depth
        self.layers = nn.ModuleList(
            GAU(attention, width, d_k, d_v, codes, window, block, bias, through, prefix, dropout,
                drop_sinusoid, 2 ** (i % reach), out_std) for i in range(layers))
        self.last = nn.Linear(width, 256)
        nn.init.normal_(self.last.weight, std=width ** -0.5)
        nn.init.zeros_(self.last.bias)
        table = sinusoids(window + 1, width) if bias == "xl" else None
        self.register_buffer("sinusoids", table, persistent=False)

    def forward(self, tokens: Tensor, states: list | None = None, attention: str | None = None
                ) -> tuple[Tensor, tuple, Tensor, tuple]:
        """Logits (B, n, 256) float32, states to carry on with, the commitment loss of each layer
        (layers,), and each layer's (k, ids), for its codebook.

        attention: another of `ways`, with the same weights; a state belongs to one of them.
        """
        x, others = self.embed(tokens), []
        for layer, state in zip(self.layers, states or [None] * len(self.layers)):
            added, *other = layer(x, state, attention or self.attention, self.sinusoids)
            if self.training and self.drop_layer:
                keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_layer
                added = added * keep / (1 - self.drop_layer)
            x = x + added
            others.append(other)
        states, commits, seen = zip(*others)
        return self.last(x).float(), states, torch.stack(commits), seen

    def ways(self) -> dict[str, str]:
        """The attentions that these weights can be read with, by what they are called."""
        if self.layers[0].book:
            return {"vq": "vq", "cache off": "window", "exact keys": "exact"}
        return {self.attention: self.attention}


def loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Bits per byte, (B, n), of tokens (B, n) under logits (B, n, 256)."""
    return F.cross_entropy(logits.mT, tokens, reduction="none") / math.log(2)


@torch.no_grad()
def sample(net: TransformerVQ, tokens: Tensor, count: int, g: torch.Generator,
           temperature: float = 1.0, nucleus: float = 0.92) -> Tensor:
    """tokens (B, n), then `count` bytes more, one by one: by (6), in memory that does not grow.

    Each is drawn among the likeliest bytes that together reach the probability `nucleus`.
    """
    logits, states, *_ = net(tokens)
    for _ in range(count):
        share, order = (logits[:, -1] / temperature).softmax(-1).sort(descending=True)
        edges = share.masked_fill(share.cumsum(-1) - share >= nucleus, 0).cumsum(-1)
        u = torch.rand(len(share), 1, generator=g, device=share.device) * edges[:, -1:]
        new = order.gather(1, (edges < u).sum(-1, keepdim=True))
        tokens = torch.cat([tokens, new], 1)
        logits, states, *_ = net(new, states)
    return tokens


# ---- evaluation ----

@torch.no_grad()
def read_along(net: TransformerVQ, data: Tensor, length: int, kind: str, args: argparse.Namespace
               ) -> Tensor:
    """loss (N, length) of data (T,), cut into N texts of `length`, or into one if it is shorter.

    Reads as many texts at once as have 32,768 bytes, or one (`exact` keeps all its keys and
    values), --update-len bytes of each at a time, with the state carried on.
    """
    length = min(length, len(data) - 1)
    texts = data.unfold(0, length + 1, length).long()  # the last byte of each begins the next
    parts, bits = texts.split(max(1, 2**15 // length)), []
    for part in watch(parts, len(parts), f"reading, {kind}: texts"):
        states, row = None, []
        for i in range(0, length, args.update_len):
            tokens = part[:, i:i + args.update_len + 1]
            logits, states, *_ = net(tokens[:, :-1], states, kind)
            row.append(loss(logits, tokens[:, 1:]))
        bits.append(torch.cat(row, 1))
    return torch.cat(bits)


@torch.no_grad()
def code_use(net: TransformerVQ, data: Tensor, length: int) -> list[dict[str, float]]:
    """Says, for each layer, and returns: codes in use (perplexity), dead ones' share, and
    |k - k_hat|^2 / |k|^2."""
    *_, commits, seen = net(data[None, :length].long())
    use = []
    for i, (layer, commit, (k, _)) in enumerate(zip(net.layers, commits, seen)):
        if book := layer.book:
            used, dead = (value.item() for value in book.usage().values())
            error = (commit / k.square().sum(-1).mean()).item()
            use.append(dict(perplexity=used, dead=dead, relative_error=error))
            say(f"  layer {i}: {used:.1f} of {len(book.count)} codes in use, {dead:.1%} dead, "
                f"relative error {error:.3f}")
    return use


def report(net: TransformerVQ, test: Tensor, args: argparse.Namespace) -> dict:
    """Prints and draws what the page shows; returns the numbers for metrics.json."""
    trained = args.update_len * args.segments
    some = test[:args.eval_bytes + 1]
    length = min(4 * trained, len(some) - 1)
    edges = [0] + [2**k for k in range(5, 31) if 2**k < length] + [length]
    near, places = {}, {}
    say(f"{'bits per byte at the places':28}" + "".join(f"{f'< {b}':>8}" for b in edges[1:]))
    for name, way in net.ways().items():
        bits = read_along(net, some, length, way, args)
        near[name] = bits[:, :trained].mean().item()
        places[name] = [bits[:, a:b].mean().item() for a, b in zip(edges, edges[1:])]
        shown = "".join(f"{mean:8.3f}" for mean in places[name])
        say(f"  {name:12} {near[name]:.4f} to {min(trained, length):<6}{shown}")
    draw_curves(Path(args.out) / "bits.svg", f"bits per byte, trained to {trained}", "position",
                {name: (edges[1:], means) for name, means in places.items()}, log2=True)
    metrics = dict(trained_length=trained, edges=edges, bits_per_byte=near, by_position=places,
                   test_bytes=bits.numel(), codes=code_use(net, test, args.update_len))
    if args.recall_steps and RANKS == 1:  # its codebooks would wait for the other ranks
        metrics["recall"] = {}
        for name, attention, texts in (("near and far", args.attention, recall_text),
                                       ("far only", args.attention, far_text),
                                       ("far only, gradient of (2)", "quadratic", far_text)):
            with torch.autocast(test.device.type, enabled=False):  # it would keep the first weights
                right = recall(attention, args.recall_steps, args.seed, test.device, texts)
            metrics["recall"][name] = right
            say(f"  recall, {name:28}" + "  ".join(f"{k} {x:.3f}" for k, x in right.items()))
    return metrics


def draw_texts(net: TransformerVQ, path: Path, count: int, args: argparse.Namespace) -> str:
    """Draws `count` texts, always from the same random numbers, into `path`; returns them all."""
    device = net.embed.weight.device
    prompt = torch.tensor(list(os.fsencode(args.prompt)), device=device).expand(count, -1)
    g = generator(device, args.sample_seed, 4)
    texts = sample(net, prompt, args.length, g, args.temperature, args.nucleus)
    said = f"\n{'-' * 80}\n".join(bytes(text).decode("utf-8", "replace") for text in texts.tolist())
    path.write_text(said + "\n", "utf-8")
    return said


# ---- recall: what the cache is for ----

def recall_text(rows: int, g: torch.Generator) -> Tensor:
    """Texts "k v k v ..." (rows, 128): 8 keys at random, each text has its own map to 8 values."""
    value = torch.randint(8, (rows, 8), generator=g, device=g.device)
    key = torch.randint(8, (rows, 64), generator=g, device=g.device)
    return torch.stack([key, 128 + value.gather(1, key)], -1).flatten(1)


def far_text(rows: int, g: torch.Generator) -> Tensor:
    """The same, of 16 keys in a cycle: each comes again after 32 tokens, never sooner."""
    value = torch.randint(8, (rows, 16), generator=g, device=g.device)
    key = torch.rand(rows, 16, generator=g, device=g.device).argsort(1).repeat(1, 4)
    return torch.stack([key, 128 + value.gather(1, key)], -1).flatten(1)


def from_afar(key: Tensor) -> Tensor:
    """Which keys (rows, pairs) of such texts were seen before, but not in the last 16 tokens."""
    i = torch.arange(key.shape[1], device=key.device)
    ago = torch.where(key[:, :, None] == key[:, None, :], 2 * (i[:, None] - i), 0)  # <= 0: later
    return (ago > 16).any(-1) & ~((ago > 0) & (ago <= 16)).any(-1)


def recall(attention: str, steps: int, seed: int, device: torch.device,
           texts: Callable = recall_text) -> dict[str, float]:
    """Trains two small layers on `texts` for `steps`: the share of values that each attention of
    these weights then says right, of keys last seen more than 16 tokens, two windows, ago."""
    torch.manual_seed(seed)
    net = TransformerVQ(attention, 64, 2, 32, 128, codes=32, window=8, block=8).to(device)
    with torch.no_grad():  # the first layer begins with the byte before, the second anywhere
        net.layers[0].bias.copy_(8 * (torch.arange(9) == 1))
        net.layers[1].bias.zero_()
    opt = adam(net, 0.95)
    for step in range(steps):
        tokens = texts(16, generator(device, seed, step, 6))
        if step == 0:
            begin_codes(net, tokens, generator(device, seed, 7))
        logits, _, commits, seen = net(tokens[:, :-1])
        value = loss(logits[:, ::2], tokens[:, 1::2]).mean() * math.log(2)
        lr = 1e-2 * min(1, (step + 1) / 20) * (1 - step / steps)
        adam_step(net, opt, value + 1e-3 * commits.sum(), lr, 1.0)
        renew_codes(net, seen, 0.95, step % 16 == 15, generator(device, seed, step, 7))
    tokens = texts(256, generator(device, seed, 8))
    far, right = from_afar(tokens[:, ::2]), {}
    for name, way in net.ways().items():
        said = net(tokens[:, :-1], None, way)[0][:, ::2].argmax(-1)
        right[name] = (said == tokens[:, 1::2])[far].float().mean().item()
    return right


# ---- training ----
# Random streams: torch.manual_seed(seed) the first weights; generator's keys are (seed, k, 1) where
# the k-th texts begin, (seed, step, RANK, 5) dropout, (seed, 3) the keys that K-means begins with,
# (seed, step, 3) those that replace dead codes, (sample_seed, 4) the texts drawn; of the recall
# task (seed, step, 6) and (seed, 8) its texts, (seed, 7) and (seed, step, 7) its codes.

def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that each are right, but not together."""
    books, keys = args.attention in ("vq", "quadratic"), args.batch_size * args.update_len
    shares = args.ema, args.beta2, args.dropout, args.drop_sinusoid, args.drop_layer
    for wrong, why in (
            ("drop_sinusoid" in args.given and args.bias != "xl", "--drop-sinusoid: of --bias xl"),
            (books and keys < args.codes,
             f"--codes {args.codes}: an update has {keys} keys to choose from"),
            (args.bias == "xl" and args.width % 2, "--width: even, with --bias xl"),
            (max(shares) >= 1, "--ema, --beta2 and the dropouts: below 1"),
            (not args.prompt, "--prompt: at least one byte")):
        if wrong:
            raise UserError(why)


def load_data(args: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Train, validation and test bytes on the device. Raises UserError if a part is too short."""
    parts = split_text(load_text(args.data, args.cache), device)
    if len(parts[0]) <= args.update_len * args.segments or len(parts[2]) <= 64:
        raise UserError(f"--data {args.data}: {len(parts[0])} bytes to train on, {len(parts[2])} "
                        "to test; more than --update-len times --segments are needed, and 64")
    return parts


def build(args: argparse.Namespace, device: torch.device) -> TransformerVQ:
    """The model that the flags describe."""
    torch.manual_seed(args.seed)
    return TransformerVQ(args.attention, args.width, args.layers, args.d_k, args.d_v, args.codes,
                         args.window, args.block, args.bias, args.through, args.prefix,
                         args.dropout, args.drop_sinusoid, args.drop_layer).to(device)


def adam(net: TransformerVQ, beta2: float) -> torch.optim.Optimizer:
    """Adam; the tables of B have five times the rate of the rest, see `adam_step`."""
    rest = dict(net.named_parameters())
    tables = [rest.pop(name) for name in list(rest) if re.fullmatch(r"layers\.\d+\.bias", name)]
    groups = [dict(params=list(rest.values()), times=1), dict(params=tables, times=5)]
    return torch.optim.Adam(groups, betas=(0.9, beta2), eps=1e-9, fused=True)


def adam_step(net: TransformerVQ, opt: torch.optim.Optimizer, value: Tensor, lr: float,
            longest: float) -> None:
    """A step of `opt` down the gradient of `value`, which is cut to the norm `longest`."""
    for group in opt.param_groups:
        group["lr"] = lr * group["times"]
    value.backward()
    nn.utils.clip_grad_norm_(net.parameters(), longest)
    opt.step()
    opt.zero_grad()


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine to args.final of the rate."""
    done = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
    fall = args.final + (1 - args.final) * (1 + math.cos(math.pi * done)) / 2
    return args.lr * min(1, (step + 1) / args.warmup) * fall


@torch.no_grad()
def begin_codes(net: TransformerVQ, tokens: Tensor, g: torch.Generator) -> None:
    """The first codebooks, from the raw keys of a first batch (B, n), if the model has any."""
    if net.layers[0].book:
        for layer, (k, _) in zip(net.layers, net(tokens, None, "exact")[3]):
            layer.book.begin(k.flatten(0, 1).float(), g)


@torch.no_grad()
def renew_codes(net: TransformerVQ, seen: list, decay: float, restart: bool, g: torch.Generator
                ) -> None:
    """After an update: the codebooks follow the keys that it saw; with `restart`, dead ones too."""
    for layer, (k, ids) in zip(net.layers, seen):
        if layer.book:
            k = k.flatten(0, 1).float()
            layer.book.update(k, ids.flatten(), decay)
            if restart:  # departs: neither the post nor the official code revives dead codes
                layer.book.restart(k, g)


def train(args: argparse.Namespace, device: torch.device, state: dict | None) -> None:
    """The whole run: data, loop, checkpoints, report, metrics.json."""
    text, valid, test = load_data(args, device)
    net = build(args, device)
    opt = adam(net, args.beta2)
    parts = dict(model=net, opt=opt)
    first = restore(state, parts)
    # what an update hands to the next, to which no gradient goes: for each layer this rank's rows
    states = state and state["states"]
    states = states and [[mine(x).to(device) for x in layer] for layer in states]
    make_room(args)
    decayed = [p.data for p in net.parameters() if p.ndim > 1]
    if args.compile:
        net.compile()
    wrapped = nn.parallel.DistributedDataParallel(net) if RANKS > 1 else net
    progress = Progress(args, first, sum(p.numel() for p in net.parameters()),
                        args.batch_size * args.update_len, "byte")
    window = torch.arange(args.update_len + 1, device=device)

    def save(step: int, end: bool) -> None:
        # of the states the rows of all ranks, unless new texts begin
        whole = [[all_rows(x) for x in layer] for layer in states] if step % args.segments else None
        save_checkpoint(args, step, parts, states=whole)
        if not end and not RANK:
            net.eval()
            some = valid[:args.eval_bytes // 4 + 1]
            with autocast(args):
                bits = read_along(net, some, args.update_len * args.segments, args.attention, args)
                say(f"validation {bits.mean():.4f} bits per byte")
                code_use(net, valid, args.update_len)
                draw_texts(net, Path(args.out) / f"samples_{step:06}.txt", args.samples, args)

    for step in training(args, first, save):
        net.train()
        lap, segment = divmod(step, args.segments)
        g = generator(device, args.seed, lap, 1)
        starts = torch.randint(len(text) - args.segments * args.update_len, (args.batch_size, 1),
                               generator=g, device=device)
        tokens = text[mine(starts) + segment * args.update_len + window].long()  # (B, n + 1)
        lr = learning_rate(step, args)
        if step == 0:  # departs: codes begin by K-means, the official ones as noise
            with autocast(args):
                begin_codes(net, tokens[:, :-1], generator(device, args.seed, 3))
        with autocast(args):  # anew: it remembers what it cast without gradients
            torch.manual_seed(generator("cpu", args.seed, step, RANK, 5).initial_seed())  # dropout
            logits, states, commits, seen = wrapped(tokens[:, :-1], states if segment else None)
            bits = loss(logits, tokens[:, 1:]).mean()
        states = [[x.detach() for x in layer] for layer in states]
        adam_step(net, opt, bits * math.log(2) + args.commit * commits.sum(), lr,
                  args.clip_grad or math.inf)
        torch._foreach_mul_(decayed, 1 - args.weight_decay)  # not times the rate, as the paper
        renew_codes(net, seen, args.ema, args.restart and segment == args.segments - 1,
                    generator(device, args.seed, step, 3))
        for i, layer in enumerate(net.layers):  # columns of log.csv that no line on screen has
            for name, value in layer.book.usage().items() if layer.book else ():
                progress.sums[f"{name}_{i}"] = progress.sums.get(f"{name}_{i}", 0) + value
        progress.add(step + 1, bits=bits.detach(), commit=commits.detach().sum(), lr=lr)
    if RANK:
        return
    seconds = time.perf_counter() - progress.begin
    net.eval()
    with autocast(args):
        metrics = report(net, test, args)
        begin = time.perf_counter()
        say(draw_texts(net, Path(args.out) / "samples.txt", args.samples, args))
    trained = (args.steps - first) * args.batch_size * args.update_len
    write_metrics(args, metrics | dict(
        step=args.steps, seed=args.seed, attention=args.attention, train_seconds=seconds,
        bytes_per_second=trained / seconds, sample_seconds=time.perf_counter() - begin))


def sample_only(args: argparse.Namespace, device: torch.device, state: dict) -> None:
    """Draws --sample-only texts from the weights in ckpt.pt, whatever device made them."""
    net = build(args, device).eval()
    restore(state, dict(model=net))
    if args.compile:
        net.compile()
    path = Path(args.out) / "samples_only.txt"
    with autocast(args):
        say(draw_texts(net, path, args.sample_only, args))
    say(str(path))


# ---- command line ----

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, a row each."""
    experiment = dict(  # --paper: enwik8, as the paper's scripts/lm_enwik8.sh
        # flag       CPU        --gpu      --paper   least  meaning
        data=       ("python",  "python",  "enwik8",  None, "python (the standard library's "
                     "sources), shakespeare, enwik8, text8, or a file, also .gz .bz2 .xz .zip"),
        steps=      (2000,      600,       125_000,   1, "in all, resumed ones included"),
        batch_size= (4,         16,        128,       1, "global, over all processes"),
        seed=       (0,                               0, "of weights, noise and order"),
        attention=  ("vq",      ATTENTIONS, "vq: 9844 (10); exact: raw keys; window: no "
                     "cache; quadratic: (2), every key with its gradient"),
        update_len= (128,       2048,                 1, "bytes of a row in an update"),
        segments=   (16,        8,         4,         1, "updates on a text, the state carried on"),
        width=      (128,       512,       768,       1, "channels"),
        layers=     (3,         12,        48,        1, "gated attention units"),
        d_k=        (64,        128,                  1, "width of a key, 9844 (1)"),
        d_v=        (256,       1024,      1536,      1, "width of a value, 9844 (1)"),
        codes=      (64,        512,                  1, "c, vectors in a codebook, 9844 (2)"),
        window=     (32,        512,                  0, "M, distances that have a B, 9844 (9)"),
        block=      (32,        512,                  1, "l, tokens computed at once, 9844 (10)"),
        bias=       ("toeplitz", "toeplitz", "xl",    ("toeplitz", "xl"), "B: post's or paper's"),
        through=    (False,                           None, "gradients reach values through U"),
        prefix=     ("loop",                          ("loop", "cumsum"), "how 9844 (10) sums U_i"),
        ema=        (0.95,      0.99,                 0, "decay of the codebook's averages"),
        commit=     (1e-3,      1e-3,      1e-4,      0, "weight of the commitment loss"),
        restart=    (True,      True,      False,     None, "dead codes, where a new text begins"),
        dropout=    (0.0,       0.0,       0.5,       0, "of what a layer adds"),
        drop_sinusoid=(0.0,     0.0,       0.2,       0, "of the paper's B"),
        drop_layer= (0.0,       0.0,       0.3,       0, "of whole layers"),
        lr=         (6e-3,      2e-3,      4e-4,      0, "Adam's learning rate at its height"),
        warmup=     (50,        100,       10_000,    1, "steps of linear warm-up"),
        final=      (0.05,      0.05,      0.1,       0, "share of the rate at the end"),
        beta2=      (0.95,      0.95,      0.98,      0, "Adam's second decay"),
        weight_decay=(0.0,      0.0,       2e-4,      0, "each step, of all matrices"),
        clip_grad=  (1.0,       1.0,       0.1,       0, "largest gradient norm, 0: any"),
    )
    others = dict(
        paper=      (False,                           None, "the paper's enwik8 model, whole"),
        save_every= (1000,      1000,                 1, "steps between checkpoints"),
        eval_bytes= (65_536,    1_048_576,            64, "of the test text that are used"),
        recall_steps=(160,                            0, "of the recall task; not on many ranks"),
        samples=    (3,                               1, "texts drawn"),
        length=     (400,       1000,                 1, "bytes of such a text"),
        prompt=     ("def ",                          None, "how they begin"),
        temperature=(1.0,                             0.01, "of drawing a byte"),
        nucleus=    (0.92,      0.92,      0.9,       0.01, "probability of the bytes drawn from"),
        sample_seed=(0,                               0, "of the texts drawn"),
        sample_only=(0,                               0, "only draw as many texts, from ckpt.pt"),
    )
    return read_flags("transformer_vq", __doc__.partition("\n")[0], argv, experiment, others)


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


# ---- main ----

def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse_args(argv)
    return run(sample_only if args.sample_only else train, args, check_flags)


if __name__ == "__main__":
    sys.exit(main())
