"""Word2Vec = SVD?  Which loss equals which SVD, stated as functions, proved and measured.

Posts   SVD分解(三)：连Word2Vec都只不过是个SVD？     https://kexue.fm/archives/4233 (read 2026-11)
        SVD分解(一)：自编码器与人工智能              https://kexue.fm/archives/4208
        SVD分解(二)：为什么SVD意味着聚类？           https://kexue.fm/archives/4216
        词向量与Embedding究竟是怎么回事？            https://kexue.fm/archives/4122
        Their displays have no numbers: cited by section. 4233 leaves its question mark open.

Map     4122 似非而是        one_hot(ids) W = rows of W                              lookup
        4233 词向量=one hot  bag(ids) W = the sum of those rows                      lookup_sum
        4208 等价性          M = A B;  M = M C D;  A = M C, B = D                    autoencoder
        4208 衍生新词        new words: large cells of A B where M has 0             new_words
        4208 激活函数        max(x, 0) throws away what cannot be a count            new_words, pmi
        4208, 4216           M = A P Q, three factors                                three_factors
        4216 怎么聚类的      p(b|a) = sum p(b|d) p(d|c) p(c|a)                       through_classes
        4233 Word2Vec=SVD？  N -> n -> N: a sum of vectors, a dense layer, softmax   Word2Vec
             without softmax, word -> context (T2)                                   linear_skipgram
             without softmax, bag -> centre (T3); bag -> bag is the autoencoder      linear_cbow
             with softmax, at full rank (T4)                                         softmax_optimum
             with negative sampling, at full rank (T5, T6)                           sgns_optimum
             what SGNS weighs and SVD does not (T11)                                 sgns_weight
             weights r_w r_c, which an SVD can have (T11)                            solve
             the window in expectation (T7), subsampling (T8)                        count, keep
             U s^p, and w + c (T9, T10)                                              vectors
        T1 to T11 number what is exactly true, and each has its tests: see README.md.
Symbols V words, n dimensions; U (V, n) the input table, the post's word vectors, out (V, n) the
        output's; N[w, c] co-occurrences of word w and context c, n_w row sums of it; P[c] the law
        that negatives come from, k per pair (the shift is log k); L the window; M what is factored.
Shapes  matrices (rows, columns); the cells of a sparse one are i, j, x (C,), by rows; tokens and
        docs (T,) int32: the number of the word at each place, and of its document.

Run     python w2v_svd.py                              # CPU: the standard library's documentation
        python w2v_svd.py --data text8 --eval wordsim353.tsv questions-words.txt
        python w2v_svd.py --gpu --data text8 --model skipgram
        torchrun --nproc_per_node=8 w2v_svd.py --gpu --data text8 --model cbow
        python w2v_svd.py --query file string          # from out/w2v_svd/vectors.bin
        python w2v_svd.py --new-words dict.txt         # 4208's new words, from "word count" lines
Needs   torch, numpy
"""

import argparse
import bz2
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
import re
import signal
import struct
import sys
import sysconfig
import time
import warnings
import zipfile
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Factors = tuple[Tensor, Tensor, Tensor]  # left (m, n), s (n,) falling, right (m', n)
Cells = tuple[Tensor, Tensor, Tensor]  # i, j, x (C,): a sparse matrix, by rows, each cell once


# ---- the posts: 4122, 4208, 4216, 4233 ----

def lookup(ids: Tensor, W: Tensor) -> Tensor:
    """4122 似非而是: one_hot(ids) @ W without the product: (..., n) from ids (...), W (V, n)."""
    return F.embedding(ids, W)


def lookup_sum(ids: Tensor, W: Tensor) -> Tensor:
    """4233 词向量=one hot: bag(ids) @ W without the product: (B, n) from ids (B, T), W (V, n)."""
    return F.embedding_bag(ids, W, mode="sum")


def truncated(M: Tensor, k: int) -> Factors:
    """4208 等价性: M (m, n) = A B with least error, A = u s, B = v': u (m, k), s (k,), v (n, k).

    By LAPACK; signs as in `signed`. Raises ValueError unless 1 <= k <= min(m, n).
    """
    if not 1 <= k <= min(M.shape):
        raise ValueError(f"rank {k} of a matrix {' x '.join(map(str, M.shape))}")
    u, s, vh = torch.linalg.svd(M, full_matrices=False)
    return signed(u[:, :k], s[:k], vh[:k].mT)


def signed(u: Tensor, s: Tensor, v: Tensor) -> Factors:
    """The same factors, every column of u positive where it is largest in size: unique signs."""
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return u * sign, s, v * sign


def autoencoder(M: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """4208 等价性: C (n, k), D (k, n) of least |M - M C D|^2 = sum_{i>k} s_i^2, M (m, n): T1.

    C = v R, D = R^-1 v' for any invertible R; here R = 1.
    """
    v = truncated(M, k)[2]
    return v, v.mT  # 4208: A = M C and B = D are then the SVD's u s and v'


def three_factors(M: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """4208, 4216: M = A P Q: A (m, k) classes of rows, P (k, k) a match, Q (k, n) of columns."""
    u, s, v = truncated(M, k)
    return u, torch.diag(s), v.mT


def through_classes(c_a: Tensor, d_c: Tensor, b_d: Tensor) -> Tensor:
    """4216 怎么聚类的: p(b|a) (m, n) of p(c|a) (m, l), p(d|c) (l, k), p(b|d) (k, n); rows sum to 1."""
    return c_a @ d_c @ b_d


def new_words(M: Tensor, k: int, count: int) -> list[tuple[int, int, float]]:
    """4208 衍生新词: row, column, value of the `count` largest cells of A B that are 0 in counts M."""
    u, s, v = krylov_svd(M, M.mT, k)
    AB = ((u * s) @ v.mT).clamp(min=0) * (M == 0)  # 4208 激活函数: max(x, 0)
    value, at = AB.flatten().topk(min(count, int((AB > 0).sum())))
    return [(cell // M.shape[1], cell % M.shape[1], x)
            for cell, x in zip(at.tolist(), value.tolist())]


def linear_skipgram(N: Tensor, k: int) -> Factors:
    """4233 without the softmax, word -> context: T2. N (V, V) counts, k the rank.

    sum_wc N_wc |e_c - out'u_w|^2 is least where D_w^1/2 U out' = [D_w^-1/2 N]_k, the best of rank
    k: frequent words weigh more. Returns left, s, right with U out' = left s right'.
    """
    d = N.sum(1, keepdim=True).clamp(min=1e-30).sqrt()
    u, s, v = truncated(N / d, k)
    return u / d, s, v


def linear_cbow(XX: Tensor, XY: Tensor, k: int) -> Factors:
    """4233 without the softmax, bag -> centre: T3, reduced-rank regression of rank k.

    Bags X (T, V), one-hot centres Y: XX = X'X, XY = X'Y (V, V). |Y - X U out'|^2 is least where
    U out' = XX^-1/2 [XX^-1/2 XY]_k. XY = XX (so Y = X, the post's difference 1): the autoencoder.
    """
    e, q = torch.linalg.eigh(XX)
    there = e > e[-1] * len(e) * torch.finfo(e.dtype).eps  # words never in a bag have no direction
    half = (q * torch.where(there, e, 1).rsqrt() * there) @ q.mT  # XX^-1/2
    u, s, v = truncated(half @ XY, k)
    return half @ u, s, v


def softmax_optimum(N: Tensor) -> Tensor:
    """4233's difference 2 at full rank: softmax over contexts is least at log N_wc + const(w): T4.

    Rows here are log probabilities, -inf where there is no pair. N (V, V) counts.
    """
    return N.log() - N.sum(1, keepdim=True).log()


def sgns_optimum(n: Tensor, n_w: Tensor, P_c: Tensor, k: float, skip_hits: bool = False) -> Tensor:
    """u_w v_c of SGNS at full rank: log(n / (k n_w P_c)), T5, Levy and Goldberg 2014; any shapes.

    P_c = n_c/|D| makes it PMI - log k. skip_hits: word2vec.c throws away a negative that is the
    target, so only the n_w - n other draws count: log(n / (k (n_w - n) P_c)), T6.
    """
    return (n / (k * (n_w - n if skip_hits else n_w) * P_c)).log()


def sgns_weight(n: Tensor, n_w: Tensor, P_c: Tensor, k: float) -> Tensor:
    """The curvature of SGNS' loss at its optimum, T11: 1 / (1/n + 1/(k n_w P_c)).

    SGNS weighs a cell by the rarer of pair and negative, an SVD all cells alike; or by r_w r_c, if
    it is taken of r_w r_c M_wc and divided by r again: `solve`, r = n_w^weight.
    """
    return 1 / (1 / n + 1 / (k * n_w * P_c))


def negatives_law(n_c: Tensor, power: float) -> Tensor:
    """P (V,), float64: the law of negatives, counts n_c to a power (Mikolov et al. 2013: 0.75)."""
    P = n_c.double() ** power
    return P / P.sum()


def pmi(n: Tensor, n_w: Tensor, P_c: Tensor, k: float = 1.0, discount: float = 0.0) -> Tensor:
    """Shifted positive PMI of counts n: max(0, log(n / (n_w P_c)) - log k), natural logs.

    P_c of `negatives_law` at 0.75 smooths on the right side: a rare context counts for less;
    so does a rare pair by discount: times n / (n + discount), Pantel and Lin 2002; compare T11.
    """
    x = sgns_optimum(n, n_w, P_c, k).clamp(min=0)  # 4208 激活函数: truncation, again
    return x * (n / (n + discount)) if discount else x


def vectors(left: Tensor, s: Tensor, right: Tensor, p: float, plus: bool = False) -> Tensor:
    """Word vectors (V, n) = left s^p, plus right s^p for w + c, from M = left s right'.

    T9: M is (left R)(R^-1 s right') for any invertible R, so p is a choice; cosines survive
    orthogonal R only. T10: symmetric M = Q l Q' has right = Q sign(l): w + c doubles the
    directions with l > 0 and cancels the others.
    """
    return (left + right if plus else left) * s**p


def keep(f: Tensor, t: float, kind: str = "code") -> Tensor:
    """Subsampling, T8: how probably a word of frequency f (share of all words) is kept, in [0, 1].

    "paper": sqrt(t/f); "code" (word2vec.c, gensim): sqrt(t/f) + t/f, 1 up to f = 2.618 t; t = 0: 1.
    """
    return ((t / f).sqrt() + t / f * (kind == "code")).clamp(max=1) if t else torch.ones_like(f)


# ---- counting: the window of 4233, in expectation ----

def count(tokens: Tensor, docs: Tensor, V: int, L: int, chunk: int = 1 << 20,
          top: int = 2048) -> Cells:
    """L times the expected pairs N of word2vec's random windows, T7, int64, symmetric.

    A window drawn from 1..L reaches distance d with chance (L - d + 1)/L, so N sums L - d + 1:
    whole numbers, alike for any chunk. Windows end with documents. Pairs of the `top` words, most
    of all, add up in a dense square, the others are sorted. Raises ValueError if keys overflow.
    """
    bits, F, keys, sums = L.bit_length(), min(V, top), [], []
    if V * V >= 1 << (63 - bits):  # the weight rides below the key: a plain sort does
        raise ValueError(f"{V} words: their pairs overflow int64")
    square = torch.zeros(F * F, dtype=torch.int64, device=tokens.device)
    for s in range(0, len(tokens), chunk):
        rare = []
        for d in range(1, L + 1):
            e = max(min(s + chunk, len(tokens) - d), s)
            same = docs[s:e] == docs[s + d:e + d]
            x, y = (t[same].long() for t in (tokens[s:e], tokens[s + d:e + d]))
            x, y = torch.minimum(x, y), torch.maximum(x, y)
            cell = (x * F + y)[y < F]
            square.index_add_(0, cell, cell.new_full((1,), L - d + 1).expand(len(cell)))  # T7
            rare.append((x * V + y << bits)[y >= F] + (L - d + 1))
        key = sort(torch.cat(rare))
        for all_of, new in zip((keys, sums), add_up(key >> bits, key & (1 << bits) - 1)):
            all_of.append(new)
    cell = square.nonzero()[:, 0]
    keys, sums = torch.cat([cell // F * V + cell % F, *keys]), torch.cat([square[cell], *sums])
    keys, order = arrange(keys)
    keys, sums = add_up(keys, sums[order])
    i, j = keys // V, keys % V  # the upper triangle; the lower one is its mirror
    off = i != j
    keys, order = arrange(torch.cat([keys, j[off] * V + i[off]]))
    return keys // V, keys % V, torch.cat([torch.where(off, sums, 2 * sums), sums[off]])[order]


def sort(keys: Tensor) -> Tensor:
    """Sorted int64 keys; on the CPU by NumPy, whose vector sort is several times faster."""
    return keys.sort().values if keys.is_cuda else torch.from_numpy(np.sort(keys.numpy()))


def arrange(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted int64 keys >= 0, and their order; on the CPU both in one number, if it fits."""
    bits = len(keys).bit_length()
    if keys.is_cuda or (keys >> 63 - bits).any():
        return keys.sort()
    both = sort(keys << bits | torch.arange(len(keys)))
    return both >> bits, both & (1 << bits) - 1


def add_up(keys: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted keys, each once, and the sums of their int64 weights."""
    last = torch.ones_like(keys, dtype=torch.bool)
    last[:-1] = keys[1:] != keys[:-1]
    total = weights.cumsum(0)[last]
    return keys[last], total.diff(prepend=total.new_zeros(1))


def dense(i: Tensor, j: Tensor, x: Tensor, V: int) -> Tensor:
    """The (V, V) float64 matrix of cells; whole numbers stay exact up to 2^53."""
    return torch.zeros(V, V, dtype=torch.float64, device=i.device).index_put_(
        (i, j), x.double(), accumulate=True)


def sparse(i: Tensor, j: Tensor, x: Tensor, V: int) -> Tensor:
    """The (V, V) float32 CSR matrix of cells by rows, without those where x is 0."""
    there = x.nonzero()[:, 0]
    i, j, x = i[there], j[there], x[there]
    kind = torch.int32 if max(V, len(x)) < 2**31 else torch.int64  # int32: half the traffic
    rows = F.pad(torch.bincount(i, minlength=V).cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR a beta
        return torch.sparse_csr_tensor(rows.to(kind), j.to(kind), x.float(), (V, V),
                                       check_invariants=False)


def bag_gram(tokens: Tensor, docs: Tensor, V: int, L: int) -> Tensor:
    """L X'X (V, V) float64 of the bags around all places, windows in expectation: T3's XX."""
    C = torch.zeros(V * V, dtype=torch.float64, device=tokens.device)
    for a, b in itertools.combinations_with_replacement([d for d in range(-L, L + 1) if d], 2):
        lo, hi = min(a, 0), max(b, 0)  # both places and the centre, 0, are in one document
        size = max(len(tokens) - hi + lo, 0)
        same = docs[:size] == docs[hi - lo:][:size]
        x, y = (tokens[d - lo:][:size][same].long() for d in (a, b))
        both = torch.bincount(x * V + y, minlength=V * V)  # reached when the farther one is
        C.add_(both, alpha=(L + 1 - max(abs(a), abs(b))) * (0.5 if a == b else 1))
    return C.view(V, V) + C.view(V, V).T


def expected(cells: Cells, L: int, kept: Tensor) -> tuple[Cells, Tensor]:
    """Cells with float64 expected numbers of pairs, and their row sums n_w (V,).

    kept (V,): how probably a word survives subsampling; a dropped word leaves its gap (T8), so
    the count is kept_w kept_c N_wc / L.
    """
    i, j, n = cells
    n = n.double() / L * kept[i] * kept[j]
    return (i, j, n), torch.zeros_like(kept).index_add_(0, i, n)


# ---- factorising ----

def times(M: Tensor, X: Tensor) -> Tensor:
    """M X, X (n, width); on the CPU in strips of 32, so that a sparse M finds X in the cache."""
    return M @ X if M.is_cuda else torch.cat([M @ strip for strip in X.split(32, 1)], 1)


def krylov_svd(M: Tensor, Mt: Tensor, k: int, rounds: int = 30, seed: int = 0) -> Factors:
    """The best k of the SVD of M (m, n), dense or sparse, by a random block Krylov space; Mt is M'.

    Musco and Musco 2015: the span of all of MX, (MM')MX, ..., (MM')^(rounds-1) MX, 3k columns, of
    which subspace iteration keeps only the last. PMI's spectrum is flat: it needs many narrow
    blocks, not few wide ones. u (m, k), s (k,), v (n, k), signs as in `signed`; the same bits for a
    seed. Raises ValueError unless 1 <= k <= min(m, n).
    """
    m, n = M.shape
    if not 1 <= k <= min(m, n):
        raise ValueError(f"rank {k} of a matrix {m} x {n}")
    width = max(16, -(-3 * k // rounds))
    size = min(width * rounds, m, n)
    g = generator("cpu", seed)
    X, spare = (torch.randn(r, width, generator=g, dtype=M.dtype).to(M.device) for r in (n, m))
    Q, Z = (torch.empty(rows, size, dtype=M.dtype, device=M.device) for rows in (m, n))
    for a in range(0, size, width):
        Y = (times(M, X) + 1e-20 * spare)[:, :size - a]  # goes on at random where M X is 0
        for _ in range(3):  # QR blows up the rounding noise that one pass leaves
            Y = torch.linalg.qr(Y - Q[:, :a] @ (Q[:, :a].mT @ Y)).Q
        X = times(Mt, Y)
        Q[:, a:a + width], Z[:, a:a + width] = Y, X
    P, R = torch.linalg.qr(Z)  # Q'M = R'P'
    a, s, bh = torch.linalg.svd(R.mT, full_matrices=False)
    return signed(Q @ a[:, :k], s[:k], P @ bh[:k].mT)


# ---- model: 4233's net N -> n -> N, trained by gradient ----

SPAN = 32  # places in a block: their scores with each other are one matrix product


class Word2Vec(nn.Module):
    """4233 Word2Vec=SVD？: a table U (V, n), a sum where a bag goes in, a dense layer out (V, n).

    model "skipgram": word -> context; "cbow": bag -> centre; "autoencoder": bag -> bag.
    loss "negative" or "softmax". No bias and no activation in the middle, as in the post.
    """

    def __init__(self, V: int, n: int, model: str = "skipgram", loss: str = "negative"):
        super().__init__()
        self.model, self.loss = model, loss
        self.U = nn.Embedding.from_pretrained((torch.rand(V, n) - 0.5) / n, freeze=False)
        self.out = nn.Embedding.from_pretrained(torch.zeros(V, n), freeze=False)

    def forward(self, centre: Tensor, near: Tensor, weight: Tensor, negatives: Tensor,
                k: int) -> tuple[Tensor, Tensor]:
        """Summed loss and number of pairs of `windows`; negatives (K,) stand for k per pair."""
        if self.model == "skipgram":
            h = self.U(centre)  # (B, S, n), 4122
        else:
            h = weight @ self.U(near)  # (B, S, n), 4233 词向量=one hot: the sum over the bag
        if self.model == "cbow":  # 4233's difference 1: the target is the centre
            x = (h * self.out(centre)).sum(-1, keepdim=True)
            weight = (weight.sum(-1, keepdim=True) > 0).float()
        else:
            x = h @ self.out(near).mT  # (B, S, S + 2L): all pairs of a block at once
        mass = weight.sum(-1)  # (B, S)
        if self.loss == "softmax":  # 4233's difference 2
            y = (h @ self.out.weight.mT).float()  # (B, S, V)
            value = (mass * y.logsumexp(-1)).sum() - (weight * x.float()).sum()
        else:
            y = (h @ self.out(negatives).mT).float()  # (B, S, K), one draw for the whole batch
            value = -(weight * F.logsigmoid(x.float())).sum() \
                + k / len(negatives) * (mass * F.softplus(y).sum(-1)).sum()
        return value, mass.sum()


def windows(tokens: Tensor, docs: Tensor, starts: Tensor, L: int, reach: Tensor | None,
            kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of blocks at starts (B,): centre (B, S), near (B, S + 2L) words, weight (B, S, S + 2L).

    reach None: windows in expectation, weight (L-d+1)/L kept_w kept_c, the very counts that the
    SVD factorises (T7, T8). Else reach (B, S) in 1..L and a word in reach counts 1: a bag's loss is
    not linear in its weights. Documents end windows.
    """
    at = starts[:, None] + torch.arange(-L, SPAN + L, device=tokens.device)
    there = (at >= 0) & (at < len(tokens))
    at = at.clamp(0, len(tokens) - 1)
    near, doc = tokens[at].long(), docs[at].masked_fill(~there, -1)
    centre, own = near[:, L:-L], doc[:, L:-L, None]
    places = torch.arange(SPAN + 2 * L, device=tokens.device)
    d = (places - places[L:-L, None]).abs()  # (S, S + 2L)
    same = (own == doc[:, None]) & (own >= 0) & (d > 0)
    if reach is not None:
        return centre, near, (same & (d <= reach[..., None])).float()
    weight = (L + 1 - d).clamp(min=0) / L * same * kept[centre][..., None] * kept[near][:, None]
    return centre, near, weight.float()


# ---- evaluation ----

def ranks(x: Tensor) -> Tensor:
    """Ranks 1..N of x (N,), float64; ties share the mean of theirs."""
    _, which, times = x.unique(return_inverse=True, return_counts=True)
    return (times.cumsum(0) - (times - 1) / 2).double()[which]


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of x and y (N,), ties as in `ranks`; nan if one is constant."""
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item()


@torch.no_grad()
def analogies(W: Tensor, questions: Tensor, mul: bool = False) -> Tensor:
    """The answers (Q,) to a : b = c : ?, questions (Q, 3), among all rows of W but a, b and c.

    3CosAdd b - a + c, or with mul 3CosMul (Levy and Goldberg 2014), cosines moved to [0, 1].
    """
    W, answers = F.normalize(W.float(), dim=1), []
    for q in questions.split(512):
        a, b, c = W[q.T]  # (512, n) each
        if mul:
            a, b, c = ((v @ W.mT + 1) / 2 for v in (a, b, c))
            score = b * c / (a + 1e-3)
        else:
            score = (b - a + c) @ W.mT  # (512, V)
        answers.append(score.scatter_(1, q, -math.inf).argmax(1))
    return torch.cat(answers)


def read_lines(path: Path) -> list[str]:
    """The lines of a text that are not blank. Raises UserError for any other file."""
    try:
        return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text in UTF-8") from None


def evaluate(path: Path, words: list[str], W: Tensor) -> dict[str, float]:
    """Scores of W (V, n) on a file: lines "word word score", or analogies "a b c d" in ": parts".

    Lines with a word that is not in `words` are left out, and counted: `asked` of `of`. Raises
    UserError for any other file, and where no line is left.
    """
    number, part, pairs, questions = {w: i for i, w in enumerate(words)}, "", [], {}
    rows = [re.split(r"[\t,; ]+", line.strip().lower())
            for line in read_lines(path) if line[0] != "#"]
    for k, row in enumerate(rows):
        if row[0].startswith(":"):
            part = " ".join(row)[1:].strip()
        elif len(row) == 4 and part:
            questions.setdefault(part, []).append([number.get(w, -1) for w in row])
        elif len(row) >= 3 and re.fullmatch(r"-?\d+(\.\d+)?", row[2]):
            pairs.append([number.get(row[0], -1), number.get(row[1], -1), float(row[2])])
        elif k:  # the first may be a headline
            raise UserError(f"--eval {path}: neither a pair with a score, nor a question: "
                            f"{' '.join(row)[:60]}")
    asked = {part: [row for row in of if min(row[:4]) >= 0]
             for part, of in (questions or {"": pairs}).items()}
    total = sum(map(len, asked.values()))
    if not total or pairs and questions:
        raise UserError(f"--eval {path}: no line of it can be asked of these {len(words):,} words")
    scores = dict(asked=total, of=sum(map(len, questions.values())) or len(pairs))
    if pairs:
        a, b, score = torch.tensor(asked[""], dtype=torch.float64, device=W.device).T
        a, b = (F.normalize(W[ids.long()].double(), dim=1) for ids in (a, b))
        return scores | {"spearman": spearman((a * b).sum(1), score)}
    q = torch.tensor(sum(asked.values(), []), device=W.device)
    for name, mul in (("add", False), ("mul", True)):
        right = (analogies(W, q[:, :3], mul) == q[:, 3]).float()
        scores[name] = right.mean().item()
        for part, those in zip(asked, right.split([len(v) for v in asked.values()])):
            scores[f"{name} {part}"] = those.mean().item() if len(those) else math.nan
    return scores


def neighbours(W: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosines and numbers (B, count) of rows of W (V, n) nearest to rows ids (B,), not these."""
    W = F.normalize(W.float(), dim=1)
    cosine = (W[ids] @ W.mT).scatter_(1, ids[:, None], -math.inf)
    return cosine.topk(min(count, len(W) - 1))


@torch.no_grad()
def sgns_objective(cells: Cells, n_w: Tensor, U: Tensor, out: Tensor, P: Tensor, k: int,
                   bias: float = 0.0) -> float:
    """SGNS' expected objective per pair at x = U out' + bias, over all V^2 cells, `expected` n.

    sum_wc n log s(x) + k n_w P_c log s(-x), divided by sum n.
    """
    i, j, n = cells
    total, ends = torch.zeros((), dtype=torch.float64, device=n.device), \
        F.pad(torch.bincount(i, minlength=len(P)).cumsum(0), (1, 0))
    for rows in torch.arange(len(P), device=n.device).split(max(1, (1 << 26) // len(P))):
        x = U[rows] @ out.mT + bias
        here = slice(ends[rows[0]], ends[rows[-1] + 1])
        total -= k * n_w[rows] @ (F.softplus(x).double() @ P)
        total += (n[here] * F.logsigmoid(x[i[here] - rows[0], j[here]])).sum()
    return (total / n.sum()).item()


GLYPHS = dict(zip("abcdefghijklmnopqrstuvwxyz", (  # rows of 3 dots, in octal
    "25755 65656 34443 65556 74647 74644 34553 55755 72227 11152 55655 44447 57755 65555 25552 "
    "65644 25573 65655 34216 72222 55557 55552 55775 55255 55222 71247").split()))
COLOURS = torch.tensor([[31, 119, 180], [214, 39, 40], [44, 160, 44], [148, 103, 189],
                        [255, 127, 14], [23, 150, 160], [140, 86, 75], [90, 90, 90]])


def pca_picture(W: Tensor, labels: list[str], group: Tensor, size: int = 900) -> Tensor:
    """The rows of W (N, n), cosines, in their two principal directions: uint8 (3, size, size).

    group (N,) gives the colours. Letters from a to z can be drawn, others become dots.
    """
    W = F.normalize(W.float().cpu(), dim=1)
    xy = truncated(W - W.mean(0), 2)[0]
    xy = (xy - xy.amin(0)) / (xy.amax(0) - xy.amin(0)).clamp(min=1e-9)  # each fills its side
    picture, taken = torch.full((size, size, 3), 255, dtype=torch.uint8), []
    for (x, y), label, g in zip((xy * (size - 130) + 20).long().tolist(), labels, group.tolist()):
        while any(abs(y - b) < 14 and x < a + w and a < x + 8 * len(label) for a, b, w in taken):
            y += 2  # below what is there
        taken.append((x, y, 8 * len(label)))
        rows = ["".join(f"{int(GLYPHS.get(c, '00200')[r]):03b}0" for c in label) for r in range(5)]
        dots = torch.tensor([[c == "1" for c in row] for row in rows])
        dots = dots.repeat_interleave(2, 0).repeat_interleave(2, 1)[:max(size - y, 0), :size - x]
        picture[y:y + dots.shape[0], x:x + dots.shape[1]][dots] = COLOURS[g % 8].to(torch.uint8)
    return picture.permute(2, 0, 1)


# ---- word vectors on disk ----

def write_vectors(path: Path, words: list[str], W: Tensor) -> None:
    """word2vec's own formats, V and n, then each word and its row: binary, or text for a .txt."""
    W = W.float().cpu().numpy()
    with open(path, "wb") as file:
        file.write(b"%d %d\n" % W.shape)
        for word, row in zip(words, W):
            body = b" ".join(b"%.6g" % x for x in row) if path.suffix == ".txt" else row.tobytes()
            file.write(word.encode() + b" " + body + b"\n")


def read_vectors(path: Path) -> tuple[list[str], Tensor]:
    """What `write_vectors` or word2vec wrote: words, and their rows (V, n). Raises UserError."""
    body, words = path.read_bytes(), []
    try:
        at = body.index(b"\n") + 1
        V, n = map(int, body[:at].split())
        W = np.empty((V, n), np.float32)
        for k in range(V):
            end = body.index(b" ", at)
            words.append(body[at:end].lstrip(b"\n").decode())
            at = end + 1
            if path.suffix == ".txt":
                end = body.index(b"\n", at)
                W[k] = np.array(body[at:end].split(), np.float32)
                at = end
            else:
                W[k] = np.frombuffer(body, np.float32, n, at)
                at += 4 * n
    except (ValueError, UnicodeDecodeError):
        raise UserError(f"{path}: not a whole file of word vectors in word2vec's formats, .txt for "
                        "text") from None
    return words, torch.from_numpy(W)


# ---- training ----

CLOSED = ("ppmi", "linear-skipgram", "linear-cbow", "linear-autoencoder")
MODELS = (*CLOSED, "skipgram", "cbow", "autoencoder")
CONFIG = ("data model loss dim window min_count vocabulary sample shift smoothing discount weight "
          "p plus negative shared_negatives lr epochs batch_size seed steps").split()


def load_data(data: str, cache: str, min_count: int, vocabulary: int,
              device: torch.device) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """Words by falling count, their counts (V,), tokens and docs (T,) int32, no rare words.

    A word is a run of letters, in lower case. A line is a document; of `python` a file's
    docstrings and comments are. Words of one count stand as they first come. Raises UserError.
    """
    number, ids = defaultdict(), array("i")
    number.default_factory = number.__len__
    number["\n"], number[""]  # are 0, a document's end, and 1, between two blanks
    for document in load_text(data, cache):
        if data == "python":
            document = b" ".join(map(b"".join, PROSE.findall(document))).replace(b"\n", b" ")
        for line in document.split(b"\n"):
            text = line.translate(ASCII).decode("utf-8", "replace").lower()
            text = text if text.isascii() else OTHER.sub(" ", text)
            ids.extend(map(number.__getitem__, text.split(" ")))
            ids.append(0)
    ids = torch.frombuffer(ids, dtype=torch.int32)
    n = torch.bincount(ids)
    n[:2] = 0
    order = n.argsort(descending=True, stable=True)[:int((n >= min_count).sum())][:vocabulary]
    if len(order) < 2:
        raise UserError(f"--data {data}: fewer than two words come {min_count} times or more")
    new = torch.full((len(n),), -1, dtype=torch.int32)
    new[order] = torch.arange(len(order), dtype=torch.int32)
    names, tokens, docs = list(number), new[ids], (ids == 0).cumsum(0, dtype=torch.int32)
    return ([names[k] for k in order], n[order].to(device),
            *(v[tokens >= 0].to(device) for v in (tokens, docs)))


ASCII = bytes(c if c > 127 or chr(c).isalpha() else 32 for c in range(256))  # no letter: a blank
OTHER = re.compile(r"[^\x00-\x7f\w]|\d")  # what is no letter beyond ASCII
PROSE = re.compile(rb'"""(.*?)"""|#([^\n]*\n)', re.S)


def solve(tokens: Tensor, docs: Tensor, kept: Tensor, args: argparse.Namespace,
          progress: "Progress") -> tuple[Factors, dict[str, float]]:
    """left, s, right of a closed form, and the seconds of its parts."""
    V, L, times = len(kept), args.window, [time.perf_counter()]
    cells, n_w = expected(count(tokens, docs, V, L), L, kept)
    times.append(time.perf_counter())
    if args.model == "ppmi":
        (i, j, n), P = cells, negatives_law(n_w, args.smoothing)
        r = n_w.clamp(min=1) ** args.weight  # T11: a cell's error counts (r_i r_j)^2 times
        M, Mt = (sparse(i, j, pmi(n, n_w[a], P[b], args.shift, args.discount) * r[i] * r[j], V)
                 for a, b in ((i, j), (j, i)))  # N is its own mirror: so M' has the same cells
        times.append(time.perf_counter())
        u, s, v = krylov_svd(M, Mt, min(args.dim, V), args.steps, args.seed)
        factors = u / r[:, None].float(), s, v / r[:, None].float()
    else:
        N = dense(*cells, V)
        XX = N if args.model == "linear-skipgram" else bag_gram(tokens, docs, V, L) / L
        times.append(time.perf_counter())
        factors = linear_skipgram(N, min(args.dim, V)) if args.model == "linear-skipgram" else \
            linear_cbow(XX, N if args.model == "linear-cbow" else XX, min(args.dim, V))
    progress.show(args.steps, args.steps)
    times.append(time.perf_counter())
    return factors, dict(zip(("count", "weigh", "factorise"), np.diff(times).tolist()))


def descend(tokens: Tensor, docs: Tensor, n: Tensor, kept: Tensor, state: dict | None,
            args: argparse.Namespace, world: "World", progress: "Progress") -> Word2Vec | None:
    """Trains the net by Adam until args.steps: the net, or None if a signal stopped it, saved."""
    device, out, V, L = world.device, Path(args.out), len(n), args.window
    torch.manual_seed(args.seed)
    net = Word2Vec(V, args.dim, args.model, args.loss).to(device)
    opt = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)
    step = 0
    if state:
        net.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        step = state["step"]
    wrapped = torch.compile(net) if args.compile else net
    if world.size > 1:
        wrapped = nn.parallel.DistributedDataParallel(wrapped)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.gpu and not args.fp32)
    progress.headline(args, sum(p.numel() for p in net.parameters()))
    law = negatives_law(n, args.smoothing).cumsum(0)
    batch, blocks = args.batch_size // SPAN, -(-len(tokens) // SPAN)
    total, value = torch.zeros(2, device=device), torch.zeros(())

    def save() -> None:
        progress.check(value, *net.parameters())
        if world.rank == 0:
            save_checkpoint(out / "ckpt.pt", dict(
                script="w2v_svd", step=step, config={name: getattr(args, name) for name in CONFIG},
                model=net.state_dict(), opt=opt.state_dict()))

    with stop_signals(world) as stopped:
        while step < args.steps and not stopped():
            g = generator(device, args.seed, step)
            draw = torch.rand(args.shared_negatives, generator=g, device=device).double()
            negatives = torch.searchsorted(law, draw * law[-1]).clamp(max=V - 1)
            reach = torch.randint(1, L + 1, (batch, SPAN), generator=g, device=device)
            starts = batch_rows(blocks, step, batch, args.seed, device) * SPAN
            reach, starts = world.mine(reach), world.mine(starts)
            reach = None if args.model == "skipgram" else reach
            lr = opt.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
            with autocast:
                value, mass = wrapped(*windows(tokens, docs, starts, L, reach, kept), negatives,
                                      args.negative)
            (value * (world.size / args.batch_size)).backward()
            opt.step()
            opt.zero_grad()
            total += torch.stack([value.detach(), mass])
            step += 1
            if progress.due(step):
                progress.show(step, step * args.batch_size, loss=(total[0] / total[1]).item(),
                              lr=lr)
                total.zero_()
            if step % args.save_every == 0 and step < args.steps:
                save()
        save()
    return net if step == args.steps else None


def train(args: argparse.Namespace) -> int:
    """The whole run: text, vectors, report, metrics.json. Returns the exit code."""
    begin = time.perf_counter()
    world = setup(args.gpu, args.fp32, args.batch_size)
    device, out, state = world.device, Path(args.out), resume_run(args, CONFIG, "w2v_svd")
    closed = args.model in CLOSED
    if closed and world.size > 1:
        raise UserError(f"--model {args.model}: is solved at once, in one process")
    for path in args.eval or ():
        read_lines(path)  # or stop now, not after the run
    if args.sample and args.model not in ("ppmi", "skipgram"):
        raise UserError("--sample: only ppmi and skipgram can be weighed by it, not bags")
    if not closed and args.batch_size % (SPAN * world.size):
        raise UserError(f"--batch-size {args.batch_size}: must be a multiple of "
                        f"{SPAN * world.size}, blocks of {SPAN} words on {world.size} processes")
    with main_first(world):
        words, n, tokens, docs = load_data(args.data, args.cache, args.min_count, args.vocabulary,
                                           device)
    if state and state["model"]["U.weight"].shape != (len(words), args.dim):
        raise UserError(f"--data {args.data}: {len(words):,} words now, another number in ckpt.pt")
    if not closed and "steps" not in args.given and not state:
        args.steps = math.ceil(args.epochs * len(tokens) / args.batch_size)
    chosen = choose(args.words, words).to(device)
    if not state:
        make_room(out, world)
    kept = keep(n.double() / n.sum(), args.sample)
    step = state["step"] if state else 0
    progress = Progress(out, step, args.steps, "round" if closed else "word", world)
    progress.note(f"{len(tokens):,} words, {len(words):,} of them different, "
                  f"{docs[-1] - docs[0] + 1:,} documents at most")
    metrics = dict(seconds=dict(read=time.perf_counter() - begin))
    if closed:
        progress.headline(args, 2 * len(words) * args.dim)
        (left, s, right), parts = solve(tokens, docs, kept, args, progress)
        U, other = left * s**0.5, right * s**0.5
        W = vectors(left, s, right, args.p, args.plus)
        metrics["seconds"] |= parts
    else:
        net = descend(tokens, docs, n, kept, state, args, world, progress)
        if net is None:
            progress.note("stopped and saved; go on with --resume")
            return 130
        U, other = net.U.weight.detach(), net.out.weight.detach()
        W = U + other if args.plus else U
        metrics["seconds"]["descend"] = time.perf_counter() - begin - metrics["seconds"]["read"]
    metrics["seconds"]["in_all"] = time.perf_counter() - begin
    progress.check(W)
    if world.rank:
        return 0
    said = ", ".join(f"{name} {x:.1f} s" for name, x in metrics["seconds"].items())
    progress.note(said)
    metrics |= dict(words=len(tokens), vocabulary=len(words), seed=args.seed, model=args.model)
    if args.objective:
        cells, n_w = expected(count(tokens, docs, len(words), args.window),
                              args.window, kept)
        bias = math.log(args.shift / args.negative) if closed else 0.0
        metrics["objective"] = sgns_objective(cells, n_w, U.float(), other.float(), negatives_law(
            n_w, args.smoothing), args.negative, bias)
        progress.note(f"SGNS objective per pair, k = {args.negative}: {metrics['objective']:.4f}")
    write_vectors(out / "vectors.bin", words, W)
    if args.text:
        write_vectors(out / "vectors.txt", words, W)
    metrics["scores"] = report(words, W, chosen, args)
    near = torch.cat([chosen[:8, None], neighbours(W, chosen[:8], 5)[1]], 1)  # 8 groups of 6
    drawn, group = near.flatten().tolist(), torch.arange(near.numel()) // near.shape[1]
    write_png(out / "pca.png", pca_picture(W[drawn], [words[k] for k in drawn], group))
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    progress.note(f"vectors.bin, pca.png, metrics.json in {out}/")
    return 0


def choose(asked: list[str] | None, words: list[str]) -> Tensor:
    """The numbers of the words asked for; if none, of some common ones. Raises UserError."""
    number = {w: k for k, w in enumerate(words)}
    lost = [w for w in asked or () if w.lower() not in number and w not in number]
    if lost:
        raise UserError(f"unknown: {', '.join(lost)}; not among the {len(words):,} words")
    if not asked:
        asked = [w for w in SHOWN if w in number] or words[len(words) // 50:][:8]
    return torch.tensor([number.get(w, number.get(w.lower())) for w in asked])


SHOWN = "file string error integer thread server function month film actor good queen".split()


def report(words: list[str], W: Tensor, chosen: Tensor, args: argparse.Namespace) -> dict:
    """Prints the neighbours of the chosen words and the scores on --eval's files; returns those."""
    cosine, near = neighbours(W, chosen.to(W.device), 8)
    for k, row, values in zip(chosen.tolist(), near.tolist(), cosine.tolist()):
        print(f"{words[k]:>12}  " + "  ".join(f"{words[r]} {x:.2f}" for r, x in zip(row, values)))
    scores = {}
    for path in args.eval or ():
        scores[path.name] = score = evaluate(path, words, W)
        print(f"{path.name}: {score['asked']} of {score['of']} asked;  " + ";  ".join(
            f"{name or 'all'} {x:.3f}" for name, x in score.items() if name not in ("asked", "of")))
    return scores


def inspect(args: argparse.Namespace) -> int:
    """--query, and --eval of saved vectors; --new-words. Trains nothing."""
    if args.new_words:
        return show_new_words(args.new_words, args.rank)
    words, W = read_vectors(args.vectors or Path(args.out) / "vectors.bin")
    report(words, W, choose(args.query, words), args)
    return 0


def show_new_words(path: Path, k: int) -> int:
    """4208 衍生新词: the 40 likeliest words of two letters that the list lacks, at rank k."""
    rows = [line.split() for line in read_lines(path)]
    if bad := [row for row in rows if len(row) < 2 or not row[1].isdigit()]:
        raise UserError(f"--new-words {path}: not a word and its count: {' '.join(bad[0])[:60]}")
    pairs = [(row[0], int(row[1])) for row in rows if len(row[0]) == 2 and int(row[1]) >= 100]
    first, second = (sorted({word[at] for word, _ in pairs}) for at in (0, 1))
    if min(len(first), len(second)) <= k:
        raise UserError(f"--new-words {path}: too few words of two letters and count 100 or more")
    M, row, column = torch.zeros(len(first), len(second)), *({c: k for k, c in enumerate(letters)}
                                                             for letters in (first, second))
    for word, n in pairs:
        M[row[word[0]], column[word[1]]] = n
    print("  ".join(f"{first[r]}{second[c]} {x:.1f}" for r, c, x in new_words(M, k, 40)))
    return 0


# ---- command line ----

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    # flag               CPU         --gpu
    presets = dict(
        data=             ("python",  "text8"),
        model=            ("ppmi",    "ppmi"),
        loss=             ("negative", "negative"),
        steps=            (30,        30),
        batch_size=       (1024,      8192),
        dim=              (100,       300),
        window=           (5,         5),
        min_count=        (5,         5),
        vocabulary=       (100_000,   100_000),
        sample=           (0.0,       0.0),
        shift=            (1.0,       1.0),
        smoothing=        (0.75,      0.75),
        discount=         (1.0,       1.0),
        weight=           (0.0,       0.0),
        p=                (0.5,       0.5),
        plus=             (False,     False),
        negative=         (5,         5),
        shared_negatives= (256,       1024),
        lr=               (1e-2,      1e-2),
        epochs=           (5.0,       5.0),
        save_every=       (500,       2000),
        seed=             (0,         0),
    )
    p = common_flags(__doc__.partition("\n")[0], "w2v_svd", presets,
                     "python (docstrings and comments of the standard library), text8, enwik8, "
                     "shakespeare, or a file: text, .gz .bz2 .xz .zip; every line is a document")
    flag = functools.partial(add_flag, p, presets)
    flag("--model", MODELS, "ppmi and linear-* are solved by an SVD, whose rounds are --steps; the "
         "others descend by gradient")
    flag("--loss", ("negative", "softmax"), "of the models that descend")
    flag("--dim", at_least(1), "n, numbers per word")
    flag("--window", at_least(1), "L, the farthest neighbour; a distance d weighs (L - d + 1) / L")
    flag("--min-count", at_least(1), "drop words that come less often")
    flag("--vocabulary", at_least(2), "keep at most as many words, the most frequent")
    flag("--sample", at_least(0.0), "subsampling's t; 0: none")
    flag("--shift", at_least(1e-3), "k of the shift log k of ppmi")
    flag("--smoothing", at_least(0.0), "power of the counts in the law of negatives")
    flag("--discount", at_least(0.0), "weigh a pair seen n times by n / (n + discount), of ppmi")
    flag("--weight", at_least(0.0), "a cell's error counts (n_w n_c)^(2 weight) times, of ppmi: 0 "
         "is the plain SVD, 0.5 near to SGNS")
    flag("--p", at_least(0.0), "vectors are U s^p")
    flag("--plus", bool, "add the vectors of context words, w + c")
    flag("--negative", at_least(1), "k, negatives per pair")
    flag("--shared-negatives", at_least(1), "drawn once a step, to stand for all pairs' k")
    flag("--lr", at_least(0.0), "Adam's learning rate at the start; it falls to zero")
    flag("--epochs", at_least(0.0), "passes over the text of models that descend, if not --steps")
    flag("--save-every", at_least(1), "steps between checkpoints")
    p.add_argument("--eval", type=Path, nargs="+", metavar="FILE",
                   help="score: lines \"word word score\", or analogies as in questions-words.txt")
    p.add_argument("--objective", action="store_true",
                   help="work out SGNS' objective over all pairs of words at the solution")
    p.add_argument("--text", action="store_true", help="also write vectors.txt")
    p.add_argument("--words", nargs="+", metavar="WORD", help="whose neighbours to show and draw")
    p.add_argument("--query", nargs="+", metavar="WORD",
                   help="train nothing: show neighbours in OUT/vectors.bin")
    p.add_argument("--vectors", type=Path, metavar="FILE",
                   help="train nothing: --query and --eval this .bin or .txt of any word2vec")
    p.add_argument("--new-words", type=Path, metavar="FILE",
                   help="train nothing: new words from lines \"word count\", 4208")
    p.add_argument("--rank", type=at_least(1), default=10, metavar="N",
                   help="classes of letters for --new-words (default: %(default)s)")
    args = p.parse_args(argv)
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


# ---- main ----

def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse_args(argv)
    return run(inspect if args.query or args.vectors or args.new_words else train, args)


if __name__ == "__main__":
    sys.exit(main())
