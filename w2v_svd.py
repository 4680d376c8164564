# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy"]
# ///
"""Word2Vec = SVD?  Which loss equals which SVD, stated as functions, proved and measured.

Posts   SVD分解(三)：连Word2Vec都只不过是个SVD？     https://kexue.fm/archives/4233 (read 2026-11)
        SVD分解(一)：自编码器与人工智能              https://kexue.fm/archives/4208
        SVD分解(二)：为什么SVD意味着聚类？           https://kexue.fm/archives/4216
        词向量与Embedding究竟是怎么回事？            https://kexue.fm/archives/4122
        Their displays have no numbers: cited by section. 4233 leaves its question mark open.

Map     4122 似非而是        one_hot(ids) W = rows of W                              lookup
        4208 等价性          M = A B, with least error                               truncated
        4208 等价性          M = M C D;  A = M C, B = D: T1                          autoencoder
        4208 衍生新词        new words: large cells of A B where M has 0             new_words
        4208 激活函数        max(x, 0) throws away what cannot be a count            new_words, pmi
        4208, 4216           M = A P Q, three factors                                three_factors
        4216 怎么聚类的      p(b|a) = sum p(b|d) p(d|c) p(c|a)                       through_classes
        4233 词向量=one hot  bag(ids) W = the sum of those rows                      lookup_sum
        4233 Word2Vec=SVD？  N -> n -> N: a sum of vectors, a dense layer, softmax   Word2Vec
             its windows, and their counts in expectation: T7                        windows, count
             without softmax, word -> context: T2                                    linear_skipgram
             without softmax, bag -> centre: T3                                      linear_cbow
        beyond the posts: what the softmax makes of the matrix
             with softmax, at full rank: T4                                          softmax_optimum
             with negative sampling, at full rank: T5, T6                            sgns_optimum
             of which an SVD can have no negative infinity: PMI, cut at 0             pmi
             subsampling: T8                                                         keep
             U s^p, and w + c: T9, T10                                               vectors
        T1 to T10 number what is exactly true; each has its tests: see docs/w2v_svd.md.
Symbols V words, n dimensions; U (V, n) the input table, the post's word vectors, out (V, n) the
        output's; N[w, c] co-occurrences of word w and context c, n_w row sums of it; P[c] the law
        that negatives come from, k per pair (the shift is log k); L the window; M what is factored.
Shapes  matrices (rows, columns); the cells of a sparse one are i, j, x (C,), by rows; tokens and
        docs (T,) int32: the number of the word at each place, and of its document.

Run     python w2v_svd.py                              # CPU: the standard library's documentation
        python w2v_svd.py --data text8 --eval wordsim353.tsv questions-words.txt
        python w2v_svd.py --gpu --data text8 --model skipgram
        torchrun --nproc_per_node=8 w2v_svd.py --gpu --data text8 --model cbow
        python w2v_svd.py --query file string          # of the newest run's vectors.bin
        python w2v_svd.py --new-words dict.txt         # 4208's new words, from "word count" lines
Needs   torch, numpy
"""

import argparse
import bz2
import codecs
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
import sys
import sysconfig
import time
import unicodedata
import warnings
import zipfile
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Factors = tuple[Tensor, Tensor, Tensor]  # left (m, n), s (n,) falling, right (m', n)


# ---- the posts: 4122, 4208, 4216, 4233 ----

def lookup(ids: Tensor, W: Tensor) -> Tensor:
    """4122 似非而是: one_hot(ids) @ W without the product: (..., n) from ids (...), W (V, n)."""
    return F.embedding(ids, W)


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


def new_words(M: Tensor, k: int, count: int) -> list[tuple[int, int, float]]:
    """4208 衍生新词: row, column, value of the `count` largest cells of A B that are 0 in counts M."""
    u, s, v = krylov_svd(M, M.mT, k)
    AB = ((u * s) @ v.mT).clamp(min=0) * (M == 0)  # 4208 激活函数: max(x, 0)
    value, cell = AB.flatten().topk(min(count, int((AB > 0).sum())))
    row, column = cell // M.shape[1], cell % M.shape[1]
    return list(zip(row.tolist(), column.tolist(), value.tolist()))


def three_factors(M: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """4208, 4216: M = A P Q: A (m, k) classes of rows, P (k, k) a match, Q (k, n) of columns."""
    u, s, v = truncated(M, k)
    return u, torch.diag(s), v.mT


def through_classes(c_a: Tensor, d_c: Tensor, b_d: Tensor) -> Tensor:
    """4216 怎么聚类的: p(b|a) (m, n) of p(c|a) (m, l), p(d|c) (l, k), p(b|d) (k, n); rows sum to 1.

    The post writes the three in the other order; with rows that sum to 1 it is this one.
    """
    return c_a @ d_c @ b_d


def lookup_sum(ids: Tensor, W: Tensor) -> Tensor:
    """4233 词向量=one hot: bag(ids) @ W without the product: (B, n) from ids (B, T), W (V, n)."""
    return F.embedding_bag(ids, W, mode="sum")


def linear_skipgram(N: Tensor, k: int) -> Factors:
    """4233 without the softmax, word -> context: T2. N (V, V) counts, k the rank.

    sum_wc N_wc |e_c - out'u_w|^2 is least where D_w^1/2 U out' = [D_w^-1/2 N]_k, the best of rank
    k: frequent words weigh more. Returns left, s, right with U out' = left s right'.
    """
    n_w = N.sum(1, keepdim=True)
    d = torch.where(n_w > 0, n_w, 1).sqrt()  # a word without a pair has no vector: 0
    u, s, v = truncated(N / d, k)
    return u / d, s, v


def linear_cbow(XX: Tensor, XY: Tensor, k: int) -> Factors:
    """4233 without the softmax, bag -> centre: T3, reduced-rank regression of rank k.

    Bags X (T, V), one-hot centres Y: XX = X'X, XY = X'Y (V, V). |Y - X U out'|^2 is least where
    U out' = XX^-1/2 [XX^-1/2 XY]_k. With Y = X, without the post's difference 1, it is T1.
    """
    e, q = torch.linalg.eigh(XX)
    there = e > e[-1] * len(e) * torch.finfo(e.dtype).eps  # words never in a bag have no direction
    half = (q * torch.where(there, e, 1).rsqrt() * there) @ q.mT  # XX^-1/2
    u, s, v = truncated(half @ XY, k)
    return half @ u, s, v


# ---- beyond the posts: what the softmax makes of the matrix ----

def softmax_optimum(N: Tensor) -> Tensor:
    """4233's difference 2 at full rank: softmax over contexts is least at log N_wc + const(w): T4.

    Rows here are log probabilities, -inf where there is no pair, nan for a word without any.
    N (V, V) counts.
    """
    return N.log() - N.sum(1, keepdim=True).log()


def negatives_law(n_c: Tensor, power: float) -> Tensor:
    """P (V,), float64: the law of negatives, counts n_c to a power (Mikolov et al. 2013: 0.75)."""
    P = n_c.double() ** power
    return P / P.sum()


def sgns_optimum(n: Tensor, n_w: Tensor, P_c: Tensor, k: float, skip_hits: bool = False) -> Tensor:
    """u_w v_c of SGNS at full rank: log(n / (k n_w P_c)), T5, Levy and Goldberg 2014; any shapes.

    P_c = n_c/|D| makes it PMI - log k. skip_hits: word2vec.c throws away a negative that is the
    target, so only the n_w - n other draws count: log(n / (k (n_w - n) P_c)), T6.
    """
    return (n / (k * (n_w - n if skip_hits else n_w) * P_c)).log()


def pmi(n: Tensor, n_w: Tensor, P_c: Tensor, k: float = 1.0, discount: float = 0.0) -> Tensor:
    """Shifted positive PMI of counts n: max(0, log(n / (n_w P_c)) - log k), natural logs.

    P_c of `negatives_law` below power 1 smooths on the right side: a rare context counts for less;
    so does a rare pair by discount: times n / (n + discount), Pantel and Lin 2002.
    """
    x = sgns_optimum(n, n_w, P_c, k).nan_to_num(0)  # a word without any pair has 0 / 0
    x = x.clamp(min=0)  # 4208 激活函数: truncation, again
    return x * (n / (n + discount)) if discount else x


def vectors(left: Tensor, s: Tensor, right: Tensor, p: float, plus: bool = False) -> Tensor:
    """Word vectors (V, n) = left s^p, plus right s^p for w + c, from M = left s right'.

    T9: M is (left R)(R^-1 s right') for any invertible R, so p is a choice; cosines survive
    orthogonal R only. T10: symmetric M = Q l Q' has right = Q sign(l): w + c doubles the
    directions with l > 0 and cancels the others.
    """
    return (left + right if plus else left) * s**p


def keep(f: Tensor, t: float) -> Tensor:
    """Subsampling, T8: how probably a word of frequency f (share of all words) is kept, in [0, 1].

    word2vec.c's sqrt(t/f) + t/f, which is 1 up to f = 2.618 t; t = 0 keeps all.
    """
    return ((t / f).sqrt() + t / f).clamp(max=1) if t else torch.ones_like(f)


# ---- counting: 4233's windows, in expectation ----

def count(tokens: Tensor, docs: Tensor, V: int, L: int,
          size: int = 10 << 20) -> tuple[Tensor, Tensor, Tensor]:
    """The cells of L times the expected pairs N of word2vec's random windows, T7, int64, symmetric.

    A window drawn from 1..L reaches distance d with chance (L - d + 1)/L, so N sums L - d + 1,
    whole numbers; size, how many pairs are sorted at once, changes nothing. Windows end with
    documents.
    """
    word, bits, chunk, parts = V.bit_length(), L.bit_length(), size // (2 * L) + 1, []
    kind = torch.int32 if 2 * word + bits < 32 and 2 * L * size < 2**31 else torch.int64
    for s in range(0, len(tokens), chunk):
        keys = []
        for d in range(1, L + 1):
            y = tokens[s + d:s + d + chunk].to(kind)  # d places after x
            x = tokens[s:s + len(y)].to(kind)
            same = docs[s:s + len(y)] == docs[s + d:s + d + chunk]  # else 0 more in cell 0, 0
            weight = L - d + 1  # T7; departs: expected, word2vec draws each
            keys += [((a << word | b) << bits | weight) * same for a, b in ((x, y), (y, x))]
        key = sort(torch.cat(keys))  # a pair's weight rides below its number: a plain sort does
        parts.append(add_up(key >> bits, key & (1 << bits) - 1))
    keys, sums = (torch.cat(part).long() for part in zip(*parts))
    del parts  # of a large text a GiB
    if len(tokens) > chunk:
        order = keys.argsort() if keys.is_cuda else torch.from_numpy(keys.numpy().argsort())
        keys, sums = add_up(keys[order], sums[order])
    first = int((sums[:1] == 0).sum())  # cell 0, 0, if nothing but such pairs is in it
    return keys[first:] >> word, keys[first:] & (1 << word) - 1, sums[first:]


def sort(keys: Tensor) -> Tensor:
    """Sorted whole numbers; on the CPU by NumPy, which is several times faster."""
    return keys.sort().values if keys.is_cuda else torch.from_numpy(np.sort(keys.numpy()))


def add_up(keys: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted keys, each once, and the sums of their weights."""
    keys, times = torch.unique_consecutive(keys, return_counts=True)
    total = weights.cumsum(0, dtype=weights.dtype)[times.cumsum(0) - 1]
    return keys, total.diff(prepend=total.new_zeros(1))


# ---- factorising ----

def sparse(i: Tensor, j: Tensor, x: Tensor, V: int) -> Tensor:
    """The (V, V) float32 CSR matrix of cells by rows, without those where x is 0."""
    at = x.nonzero()[:, 0]
    i, j, x = i[at], j[at], x[at]
    kind = torch.int32 if max(V, len(x)) < 2**31 else torch.int64  # int32: half the traffic
    rows = torch.searchsorted(i, torch.arange(V + 1, device=i.device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR a beta
        return torch.sparse_csr_tensor(rows.to(kind), j.to(kind), x.float(), (V, V))


def product(M: Tensor, X: Tensor) -> Tensor:
    """M X, X (n, width); on the CPU in strips of 32, so that a sparse M finds X in the cache."""
    return M @ X if M.is_cuda else torch.cat([M @ strip for strip in X.split(32, 1)], 1)


def krylov_svd(M: Tensor, Mt: Tensor, k: int, rounds: int = 30, seed: int = 0) -> Factors:
    """The best k of the SVD of M (m, n), dense or sparse, by a random block Krylov space; Mt is M'.

    Musco and Musco 2015: the span of all of MX, (MM')MX, ..., (MM')^(rounds-1) MX, 3k columns (at
    least 16 a block), of which subspace iteration keeps only the last. PMI's spectrum is flat: it
    needs many narrow blocks, not few wide ones. u (m, k), s (k,), v (n, k), signs as in `signed`;
    the same bits for a seed. Raises ValueError unless 1 <= k <= min(m, n).
    """
    (m, n), width = M.shape, max(16, -(-3 * k // rounds))
    if not 1 <= k <= min(m, n):
        raise ValueError(f"rank {k} of a matrix {m} x {n}")
    size = min(width * rounds, m, n)
    g, eps = generator("cpu", seed), torch.finfo(M.dtype).eps
    X = torch.randn(n, width, generator=g, dtype=M.dtype).to(M.device)
    Q, Z = (torch.empty(rows, size, dtype=M.dtype, device=M.device) for rows in (m, n))
    for a in range(0, size, width):
        Y, past = product(M, X)[:, :size - a], Q[:, max(a - 2 * width, 0):a]
        Y = Y - past @ (past.mT @ Y)  # Lanczos: of earlier blocks it has rounding noise only
        for _ in range(9):
            Y = torch.linalg.qr(Y).Q  # blows the noise up: so once more, against all
            C = Q[:, :a].mT @ Y
            Y = Y - Q[:, :a] @ C
            if C.square().sum() < eps:  # Y is still orthonormal; else nothing but noise was there
                break
            Y += eps * torch.randn(Y.shape, generator=g, dtype=M.dtype).to(M.device)
        X = product(Mt, Y)
        Q[:, a:a + width], Z[:, a:a + width] = Y, X
    b = truncated(torch.linalg.qr(Z, mode="r").R, k)[2]  # QQ'M = QZ', of which
    v, s, c = truncated(Z @ b, k)  # the best k are Qb (Zb)'
    return signed(Q @ (b @ c), s, v)


# ---- model: 4233's net N -> n -> N, trained by gradient ----

SPAN = 32  # places in a block: their scores with each other are one matrix product
S_0 = 4.0  # where Adagrad's sums of squares begin: from 0, a rare word's steps would be too long


class Word2Vec(nn.Module):
    """4233 Word2Vec=SVD？: a table U (V, n), a sum where a bag goes in, a dense layer out (V, n).

    model "skipgram": word -> context; "cbow": bag -> centre; "autoencoder": bag -> bag.
    loss "negative" or "softmax". No bias and no activation in the middle, as in the post.
    """

    def __init__(self, V: int, n: int, model: str = "skipgram", loss: str = "negative"):
        super().__init__()
        self.model, self.loss = model, loss
        self.U = nn.Parameter((torch.rand(V, n) - 0.5) / n)
        self.out = nn.Parameter(torch.zeros(V, n))
        self.register_buffer("U_sum", torch.full((V,), S_0))  # of squares, for `learn`
        self.register_buffer("out_sum", torch.full((V,), S_0))

    def forward(self, centre: Tensor, near: Tensor, weight: Tensor, negatives: Tensor,
                k: int) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Summed loss and number of pairs of `windows`; and the loss's gradient, by hand: words
        and a row for each, of U, of out for the targets, of out for the negatives.

        negatives (G, K): each G-th of the batch shares K words, which stand for k per pair. With
        the softmax they are all words, (1, V).
        """
        bag = self.model != "skipgram"
        read = near if bag else centre
        h = v = lookup(read, self.U)  # 4122
        if bag:
            h = weight @ v  # (B, S, n), 4233 词向量=one hot: summed over the bag
        aim, w = near, weight
        if self.model == "cbow":  # 4233's difference 1: the target is the centre
            aim, w = centre, torch.diag_embed((weight.sum(-1) > 0).to(v.dtype))
        c, q, share = lookup(aim, self.out), lookup(negatives, self.out), (len(negatives), -1)
        H, mass = h.reshape(*share, h.shape[-1]), w.sum(-1).view(*share, 1)
        x, y = (h @ c.mT).to(v.dtype), (H @ q.mT).to(v.dtype)  # scores: a block's pairs at once
        if self.loss == "softmax":  # 4233's difference 2
            value = (mass * y.logsumexp(-1, True)).sum() - (w * x).sum()
            dx, dy = -w, mass * y.softmax(-1)
        else:  # departs: word2vec draws k for each pair, word2vec.c skips those that hit it (T6)
            mass_k = mass * (k / negatives.shape[1])
            value = -(w * F.logsigmoid(x)).sum() - (mass_k * F.logsigmoid(-y)).sum()
            dx, dy = -w * (-x).sigmoid(), mass_k * y.sigmoid()
        dh = dx @ c + (dy @ q).view_as(h)
        dv = weight.mT @ dh if bag else dh
        return value, mass.sum(), [(read, dv), (aim, dx.mT @ h), (negatives, dy.mT @ H)]

    def learn(self, lr: float, gradient: list[tuple[Tensor, Tensor]]) -> None:
        """A step down `forward`'s gradient, where a word may come many times.

        departs: word2vec has one rate for all rows; here a row's falls by what it has learnt, as
        Adagrad's (Duchi et al. 2011, one sum a row, from S_0), so it can be higher, a batch large.
        """
        torch.sparse.check_sparse_tensor_invariants.disable()  # the default; unsaid, torch warns
        U, out = (self.U, self.U_sum), (self.out, self.out_sum)
        for (W, total), (at, rows) in zip((U, out, out), gradient):
            rows = rows.flatten(0, 1).to(W.dtype)  # from bfloat16
            once = torch.sparse_coo_tensor(at.reshape(1, -1), rows, W.shape).coalesce()
            at, g = once.indices()[0], once.values()  # each word once, with the sum of its rows
            total.index_add_(0, at, g.square().mean(1))
            W.index_add_(0, at, g * (-lr * total[at].rsqrt())[:, None])


def windows(tokens: Tensor, docs: Tensor, starts: Tensor, L: int,
            reach: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of blocks at starts (B,): centre (B, S), near (B, S + 2L) words, weight (B, S, S + 2L).

    reach None: windows in expectation, weight (L - d + 1)/L, the very counts that the SVD
    factorises (T7). Else reach (B, S) in 1..L and a word in reach counts 1: a bag's loss is not
    linear in its weights. Documents end windows.
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
    return centre, near, (L + 1 - d).clamp(min=0) / L * same


# ---- evaluation ----

def caseless(text: str) -> str:
    """One spelling, for text, evaluation and lookup: lower case, composed as Unicode's NFC."""
    return unicodedata.normalize("NFC", text.lower())


def finder(words: list[str]) -> Callable[[str], int]:
    """The number of a word: as it is spelt, else the first of its caseless kind, else -1."""
    backwards = range(len(words))[::-1]  # of words that are alike the first is put last, and stays
    spelt = {words[k]: k for k in backwards}
    folded = {caseless(words[k]): k for k in backwards}
    return lambda word: spelt.get(word, folded.get(caseless(word), -1))


def neighbours(W: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosines and numbers (B, count) of rows of W (V, n) nearest to rows ids (B,), not these."""
    W = F.normalize(W.float(), dim=1)
    cosine = (W[ids] @ W.mT).scatter_(1, ids[:, None], -math.inf)
    return cosine.topk(min(count, len(W) - 1))


def ranks(x: Tensor) -> Tensor:
    """Ranks 1..N of x (N,), float64; ties share the mean of theirs."""
    _, which, ties = x.unique(return_inverse=True, return_counts=True)
    return (ties.cumsum(0) - (ties - 1) / 2).double()[which]


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of x and y (N,), ties as in `ranks`; nan if one is constant."""
    if len(x) < 2:
        return math.nan
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item()


def analogies(W: Tensor, questions: Tensor) -> Tensor:
    """The answers (Q,) to a : b = c : ?, questions (Q, 3): rows nearest to b - a + c (3CosAdd)."""
    W, answers = F.normalize(W.float(), dim=1), []
    for q in questions.split(max(1, (1 << 24) // len(W))):  # 64 MiB of scores at once
        a, b, c = W[q.T]  # (Q', n) each
        cosine = (b - a + c) @ W.mT  # (Q', V)
        answers.append(cosine.scatter_(1, q, -math.inf).argmax(1))  # but not a, b, c themselves
    return torch.cat(answers)


def read_lines(path: Path) -> list[str]:
    """The lines of a text that are not blank. Raises UserError for any other file."""
    try:
        text = as_utf8(path.read_bytes(), str(path)).decode("utf-8", "replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return [line for line in text.splitlines() if line.strip()]


def read_questions(path: Path, words: list[str]) -> tuple[Tensor, list[str | float]]:
    """Pairs of words (Q, 2) and their scores; or analogies (Q, 4) and the ": part" they stand in.

    Words are numbers, -1 for an unknown one. Columns stand apart by tabs, semicolons, commas or
    blanks. Raises UserError for other files, and where no line can be asked.
    """
    find, rows, part = finder(words), [], ""
    for k, line in enumerate(line for line in read_lines(path) if line[0] != "#"):
        apart = next((c for c in "\t;," if c in line), None)  # None: blanks
        said = [word.strip() for word in line.strip().split(apart)]
        if line[0] == ":":
            part = line
        elif part and len(said) == 4:
            rows.append((said, part))
        elif not part and len(said) > 2 and NUMBER.fullmatch(said[2]):
            rows.append((said[:2], float(said[2])))
        elif k:  # the first may be a headline
            raise UserError(f"--eval {path}: neither a scored pair nor an analogy: {line[:60]}")
    if len({len(said) for said, _ in rows}) != 1:
        raise UserError(f"--eval {path}: no pairs with scores, no analogies, or both")
    ids = torch.tensor([[find(word) for word in said] for said, _ in rows])
    if (ids.amin(1) < 0).all():
        raise UserError(f"--eval {path}: no line of it can be asked of these {len(words):,} words")
    return ids, [mark for _, mark in rows]


NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.A)


def evaluate(path: Path, words: list[str], W: Tensor) -> dict[str, float]:
    """Scores of W (V, n) on a file of `read_questions`: spearman, or the share of right answers.

    Lines with a word that is not in `words` are left out, and counted: `asked` of `of`.
    """
    ids, marks = read_questions(path, words)
    known = ids.amin(1) >= 0
    scores, ids = dict(asked=int(known.sum()), of=len(ids)), ids[known].to(W.device)
    if ids.shape[1] == 2:
        a, b = F.normalize(W[ids.T].double(), dim=2)
        return scores | {"spearman": spearman((a * b).sum(1).cpu(), torch.tensor(marks)[known])}
    right = (analogies(W, ids[:, :3]) == ids[:, 3]).double().cpu()
    scores["right"] = right.mean().item()
    for part in dict.fromkeys(marks):
        here = torch.tensor([mark == part for mark in marks])
        scores[part] = right[here[known]].mean().item()  # nan where none can be asked
    return scores


# ---- word vectors on disk ----

def write_vectors(path: Path, words: list[str], W: Tensor) -> None:
    """word2vec's binary format: V and n, then each word and its row, float32."""
    rows = W.float().cpu().numpy()
    lines = [word.encode() + b" " + row.tobytes() for word, row in zip(words, rows)]
    put(path, b"\n".join([b"%d %d" % rows.shape, *lines, b""]))


def read_vectors(path: Path) -> tuple[list[str], Tensor]:
    """Words and their rows (V, n), from either of word2vec's formats. Raises UserError."""
    try:
        head, _, body = path.read_bytes().partition(b"\n")
        V, n = map(int, head.split())
        if n < 1 or not 0 < 2 * V * n <= len(body):
            raise ValueError  # a headline that lies
        words, rows = zip(*itertools.islice(read_rows(body, n), V))
        W = np.stack(rows)  # ValueError where they differ in length
        if W.shape != (V, n) or not np.isfinite(W).all():
            raise ValueError
    except (OSError, OverflowError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not whole, or in none of word2vec's formats"
        raise UserError(f"{path}: {why}") from None
    return [word.decode("utf-8", "replace") for word in words], torch.from_numpy(W)


def read_rows(body: bytes, n: int) -> Iterator[tuple[bytes, np.ndarray]]:
    """A word and its numbers, one after another. Raises ValueError where there are none.

    A text has a row in each line; it is told by its first one, whatever the file is called: after
    the word nothing that cannot be printed. Else n float32 follow the word and a blank.
    """
    if re.match(rb"\S+[ \t][ -~\t]{%d,}\r?(\n|\Z)" % (2 * n - 1), body):
        for line in io.BytesIO(body):
            word, *numbers = line.split()
            yield word, np.array(numbers, np.float32)
        return
    at = 0
    while True:
        end = body.index(b" ", at) + 1
        yield body[at:end - 1].lstrip(b"\n"), np.frombuffer(body[end:end + 4 * n], "<f4")
        at = end + 4 * n


# ---- training ----
# Streams of random numbers: torch's own, seeded once with --seed, the net's first weights; key
# (seed,) the beginning of krylov_svd; (seed, step) negatives and windows of a step of descend;
# (seed, 0, 8) subsampling; (seed, epoch, 9) the order of the text's blocks, in batch_rows.

BY_SVD = ("ppmi", "linear-skipgram")
MODELS = (*BY_SVD, "skipgram", "cbow", "autoencoder")


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for what cannot be, before any work begins."""
    if args.resume is None:
        raise UserError(f"--resume: {args.out} has the vectors of an SVD, which has no steps to go "
                        "on with and leaves no ckpt.pt; begin anew without it")
    idle, kind = {"p"}, f"--model {args.model}"
    if args.model in BY_SVD:
        idle = {"loss", "negative", "shared_negatives", "lr", "epochs"}
    elif args.loss == "softmax":
        idle, kind = {"p", "negative", "shared_negatives"}, "--loss softmax"
    if args.new_words:
        idle, kind = idle | {"query", "vectors", "eval"}, "--new-words"
    elif "rank" in args.given:
        raise UserError("--rank: is for --new-words")
    if args.given & idle and not args.resume:
        raise UserError(f"--{min(args.given & idle).replace('_', '-')}: is not for {kind}")
    if args.model not in BY_SVD and args.batch_size % (SPAN * RANKS):
        raise UserError(f"--batch-size {args.batch_size}: not a multiple of {SPAN * RANKS}")
    if args.window > 1000:
        raise UserError(f"--window {args.window}: at most 1000")


def load_data(args: argparse.Namespace, device: torch.device,
              state: dict | None) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """Words by falling count, their counts n (V,), and the words' places, tokens and docs (T,).

    A line is a document; of `python` a file's docstrings and comments are. Words of one count
    stand as they first come. Rare words go, and of the frequent ones some, T8; the gaps close, as
    in word2vec.c. Raises UserError where there is nothing to learn.
    """
    names, ids = read_words(load_text(args.data, args.cache), args.data == "python")
    n = torch.bincount(ids, minlength=len(names))
    n[[k for k, name in enumerate(names) if not name[:1].isalpha()]] = 0
    han = torch.tensor([len(name) if "\u3040" <= name[:1] <= "\u9fff" else 0 for name in names])
    if 2 * n[han > 0].sum() > n.sum() and (n * han).sum() > 4 * n[han > 0].sum():
        say(f"warning: --data {args.data}: words of {(n * han).sum() / n[han > 0].sum():.0f} "
            "characters; a text without blanks between its words has to be cut into words first")
    order = n.argsort(descending=True, stable=True)
    order = order[:int((n >= args.min_count).sum())][:args.vocabulary]
    new = torch.full((len(n),), -1, dtype=torch.int32)
    new[order] = torch.arange(len(order), dtype=torch.int32)
    tokens, docs = new[ids], (ids == 0).cumsum(0, dtype=torch.int32)
    tokens, docs, n = tokens[tokens >= 0], docs[tokens >= 0], n[order]
    if state and state.get("counts") != n.tolist():
        raise UserError(f"--data {args.data}: is not the text that ckpt.pt was trained on")
    # departs: subsampled once; word2vec.c draws anew in each pass, which an SVD has not
    draw = torch.rand(len(tokens), generator=generator("cpu", args.seed, 0, 8))
    stays = draw < keep(n.double() / n.sum(), args.sample)[tokens.long()]
    tokens, docs = tokens[stays], docs[stays]
    if len(n) < 2 or not (docs[1:] == docs[:-1]).any():
        raise UserError(f"--data {args.data}: {len(n):,} words come {args.min_count} times or more "
                        "(--min-count), and of those that --sample leaves no line has two")
    return [names[k] for k in order], n.to(device), tokens.to(device), docs.to(device)


PROSE = re.compile(rb'"""(.*?)"""|#([^\n]*\n)', re.S)


def read_words(documents: list[bytes], prose: bool) -> tuple[list[str], Tensor]:
    """Words as they first come, and the number of each place's, int32; 0 is a line's end.

    A word is a run of letters, folded. prose: of docstrings and comments alone, a document's in
    one line.
    """
    number, ids, letters = defaultdict(lambda: len(number), {"\n": 0}), array("i"), Letters()
    for document in documents:
        if prose:
            document = b" ".join(map(b"".join, PROSE.findall(document))).replace(b"\n", b" ")
        for line in document.split(b"\n"):
            line = caseless(line.decode("utf-8", "replace")).translate(letters)
            ids.extend(map(number.__getitem__, line.split()))
            ids.append(0)
    return list(number), torch.frombuffer(ids, dtype=torch.int32)


class Letters(dict):
    """For str.translate: a letter and a mark on one stay, what cannot be seen goes, others are a
    blank."""

    def __missing__(self, c: int) -> int | None:
        kind = unicodedata.category(chr(c))
        unseen = kind == "Cf" or 0xFE00 <= c <= 0xFE0F
        self[c] = None if unseen else c if kind[0] == "L" or kind in ("Mn", "Mc") else 32
        return self[c]


def solve(args: argparse.Namespace, tokens: Tensor, docs: Tensor, V: int) -> Factors:
    """left, s, right of --model, as `krylov_svd` or `linear_skipgram` has it; N is symmetric."""
    i, j, n = count(tokens, docs, V, args.window)
    n = n.double() / args.window
    n_w = torch.bincount(i, n, minlength=V)
    if args.model == "ppmi":
        M = Mt = sparse(i, j, pmi(n, n_w[i], negatives_law(n_w, 1)[j], discount=1), V)
    else:
        d = torch.where(n_w > 0, n_w, 1).sqrt()  # linear_skipgram, T2: D_w^-1/2 N
        M, Mt = (sparse(i, j, n / d[word], V) for word in (i, j))
    torch.set_float32_matmul_precision("highest")  # a basis in TF32 is not orthonormal
    left, s, right = krylov_svd(M, Mt, min(args.dim, V), args.steps, args.seed)
    return left if args.model == "ppmi" else left / d[:, None].float(), s, right


def build(args: argparse.Namespace, V: int, device: torch.device) -> dict[str, Word2Vec]:
    """The net of V words that the flags describe, as the part that a checkpoint keeps."""
    torch.manual_seed(args.seed)
    net = Word2Vec(V, args.dim, args.model, args.loss).to(device)
    if args.compile:
        net.compile()
    return dict(model=net)


def descend(args: argparse.Namespace, tokens: Tensor, docs: Tensor, n: Tensor, state: dict | None,
            progress: "Progress") -> Factors:
    """U, ones, out of a net trained until args.steps; the rate falls to zero, as word2vec's."""
    device, V, L = tokens.device, len(n), args.window
    parts, law = build(args, V, device), negatives_law(n, 0.75).cumsum(0)
    first, net = restore(state, parts), parts["model"]
    batch, blocks, counts = args.batch_size // SPAN, -(-len(tokens) // SPAN), n.tolist()
    # departs: word2vec.c has twice the rate for bags; their words move together, so here half
    high = args.lr if args.model == "skipgram" else args.lr / 2

    def save(step: int, end: bool) -> None:
        save_checkpoint(args, step, parts, counts=counts)

    for step in training(args, first, save):
        g = generator(device, args.seed, step)
        reach = torch.randint(1, L + 1, (batch, SPAN), generator=g, device=device)
        reach = None if args.model == "skipgram" else mine(reach)
        draw = torch.rand(batch, args.shared_negatives, generator=g, device=device).double()
        negatives = torch.searchsorted(law, mine(draw)).clamp(max=V - 1)  # law may end below 1
        if args.loss == "softmax":
            negatives = torch.arange(V, device=device)[None]
        starts = mine(batch_rows(blocks, step, batch, args.seed, device)) * SPAN
        lr = high * (1 - step / args.steps)
        with torch.no_grad(), autocast(args):
            value, mass, gradient = net(*windows(tokens, docs, starts, L, reach), negatives,
                                        args.negative)
            net.learn(lr, [(gathered(at), gathered(rows)) for at, rows in gradient])
        progress.add(step + 1, loss=value / mass.clamp(min=1e-9), lr=lr)
    return net.U.detach(), net.U.new_ones(args.dim), net.out.detach()


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, one after another."""
    if RANKS == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(RANKS)]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def train(args: argparse.Namespace, device: torch.device, state: dict | None) -> None:
    """The whole run: text, vectors, report, metrics.json."""
    begin, by_svd = time.perf_counter(), args.model in BY_SVD
    words, n, tokens, docs = load_data(args, device, state)
    for path in args.eval:  # a file of no use is refused before the work
        read_questions(Path(path), words)
    make_room(args)
    steps = args.steps or (30 if by_svd else math.ceil(args.epochs * len(tokens) / args.batch_size))
    args = argparse.Namespace(**vars(args) | dict(steps=steps))  # now that the text is known
    if steps < 2 and not by_svd:
        say("warning: one step moves no word vector; it takes more --steps, or --epochs")
    if by_svd and args.dim > len(words):
        say(f"warning: --dim {args.dim}: {len(words)} words have no more than {len(words)} numbers")
    items, unit = (1, "round") if by_svd else (args.batch_size, "word")
    progress = Progress(args, state["step"] if state else 0, 2 * len(words) * args.dim, items, unit)
    say(f"{n.sum():,} words, {len(words):,} of them different; --sample leaves {len(tokens):,}")
    read = time.perf_counter()
    if by_svd:
        factors = solve(args, tokens, docs, len(words))
        progress.add(args.steps)
    else:
        factors = descend(args, tokens, docs, n, state, progress)
    W = vectors(*factors, args.p, args.plus)
    if not (W.isfinite().all() and W.any()):
        raise UserError(f"--p {args.p}: vectors of nothing, or too large for float32")
    metrics = dict(words=int(n.sum()), sampled=len(tokens), vocabulary=len(words),
                   model=args.model, seed=args.seed, step=args.steps,
                   read_seconds=read - begin, train_seconds=time.perf_counter() - read)
    if not RANK:
        write_vectors(Path(args.out) / "vectors.bin", words, W)
        write_metrics(args, metrics | report(args, words, W))


SHOWN = "file string error integer thread server function month film actor good queen".split()


def choose(asked: list[str], words: list[str]) -> Tensor:
    """The numbers of the words asked for; if none, of some common ones. Raises UserError."""
    find = finder(words)
    if lost := [w for w in asked if find(w) < 0]:
        raise UserError(f"unknown: {', '.join(lost)}; not among the {len(words):,} words")
    common = [w for w in SHOWN if find(w) >= 0] or words[len(words) // 50:][:8]
    return torch.tensor([find(w) for w in asked or common])


def report(args: argparse.Namespace, words: list[str], W: Tensor) -> dict:
    """The neighbours of words, by --query if there are any, and the scores on --eval's files; says
    them too."""
    near, scores, chosen = {}, {}, choose(args.query, words).to(W.device)
    for k, cosines, ids in zip(chosen.tolist(), *(v.tolist() for v in neighbours(W, chosen, 8))):
        near[words[k]] = [[words[c], x] for c, x in zip(ids, cosines)]
        say(f"{words[k]:>12}  " + "  ".join(f"{word} {x:.2f}" for word, x in near[words[k]]))
    for path in args.eval:
        scores[path] = evaluate(Path(path), words, W)
        say(f"{path}: " + ",  ".join(f"{k} {round(v, 3)}" for k, v in scores[path].items()))
    return dict(neighbours=near, scores=scores)


def sample_only(args: argparse.Namespace, device: torch.device, state: dict | None) -> None:
    """Trains nothing: --new-words; or --query and --eval of saved vectors."""
    if args.new_words:
        return show_new_words(Path(args.new_words), args.rank)
    words, W = read_vectors(Path(args.vectors or newest(args, "vectors.bin")))
    report(args, words, W.to(device))


def show_new_words(path: Path, k: int) -> None:
    """4208 衍生新词: the 40 likeliest words of two letters that the list lacks, at rank k."""
    rows = [re.match(r"(\S+)\s+(\d+)(\s|$)", line.lstrip()) for line in read_lines(path)]
    if None in rows:
        raise UserError(f"--new-words {path}: line {rows.index(None) + 1}: not a word, its count")
    n = {row[1]: float(row[2]) for row in rows if len(row[1]) == 2 and int(row[2]) >= 100}
    (first, i), (second, j) = (np.unique([w[at] for w in n], return_inverse=True) for at in (0, 1))
    if min(len(first), len(second)) <= k:
        raise UserError(f"--new-words {path}: too few words, two letters, 100 times; see --rank")
    M = torch.zeros(len(first), len(second))
    M[i, j] = torch.tensor([*n.values()])
    say("  ".join(f"{first[r]}{second[c]} {x:.1f}" for r, c, x in new_words(M, k, 40)))


# ---- command line ----

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, a row each."""
    experiment = dict(
        # flag            CPU        --gpu    least  meaning
        data=            ("python",  "text8", None,  "python (its docstrings and comments), text8, "
                          "enwik8, shakespeare, or a text, .gz .bz2 .xz .zip; a line, a document"),
        steps=           (0,                  0,     "in all, resumed ones included; 0: see "
                          "--model and --epochs"),
        batch_size=      (1024,      8192,    1,     "global, over all processes"),
        seed=            (0,                  0,     "of weights, noise and order"),
        model=           ("ppmi",             MODELS, "ppmi and linear-skipgram are solved by an "
                          "SVD, whose rounds are --steps (0: 30); the others descend by gradient"),
        loss=            ("negative",         ("negative", "softmax"), "of models that descend"),
        dim=             (100,       300,     2,     "n, numbers per word"),
        window=          (5,                  1,     "L; a distance d weighs (L - d + 1) / L"),
        min_count=       (5,                  1,     "drop words that come less often"),
        vocabulary=      (100_000,            2,     "keep at most as many, the most frequent"),
        sample=          (1e-3,               0,     "t of subsampling frequent words; 0: none"),
        p=               (0.5,                0,     "an SVD's vectors are U s^p"),
        plus=            (False,              None,  "add the vectors of context words, w + c"),
        negative=        (5,                  1,     "k, negatives per pair"),
        shared_negatives=(32,                 1,     "drawn for the pairs of 32 places"),
        lr=              (0.4,                0,     "Adagrad's first rate; half of it for bags"),
        epochs=          (5.0,                1e-9,  "of a descent where --steps is 0"))
    others = dict(
        save_every=      (500,       2000,    1,     "steps between checkpoints"),
        eval=            ([],  None, "score by files: \"word word score\" a line, or analogies"),
        query=           ([],  None, "train nothing: neighbours in the newest run's vectors.bin"),
        vectors=         ("",  None, "train nothing: --query, --eval these, of any program"),
        new_words=       ("",  None, "train nothing: 4208's new words, from lines \"word count\""),
        rank=            (10,  1,    "classes of letters for --new-words"))
    return read_flags("w2v_svd", __doc__.partition("\n")[0], argv, experiment, others)


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


# ---- main ----

def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse_args(argv)
    only, out = args.query or args.vectors or args.new_words, Path(args.out)
    left = args.resume and (out / "vectors.bin").exists()
    if left and not any(out.parent.glob(f"{out.name}*/ckpt.pt")):
        args = argparse.Namespace(**vars(args) | dict(resume=None))
    return run(sample_only if only else train, args, check_flags)


if __name__ == "__main__":
    sys.exit(main())
