"""w2v_svd.py against posts 4122, 4208, 4216, 4233, its card's statements T1-T11, and plain oracles."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import types
import warnings
import zipfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import w2v_svd as w
from hypothesis import example, given
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**31)
f64 = torch.float64


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def counts(V, seed=0, low=1):
    """Random whole symmetric counts (V, V)."""
    N = torch.randint(low, 20, (V, V), generator=torch.Generator().manual_seed(seed)).to(f64)
    return N + N.T


def text(seed, V, length, docs):
    """Random tokens and document numbers, int32."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (length,), generator=g, dtype=torch.int32)
    return tokens, torch.randint(0, docs, (length,), generator=g, dtype=torch.int32).sort().values


def minimise(parameters, value, rounds=30):
    """The least value() that L-BFGS finds."""
    opt = torch.optim.LBFGS(parameters, lr=1, max_iter=200, tolerance_grad=1e-12,
                            tolerance_change=1e-15, history_size=50, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        v = value()
        v.backward()
        return v
    for _ in range(rounds):
        last = opt.step(closure)
    return last.item()


# ---- 1: lookups; the posts' small statements ----

@given(st.integers(1, 9), st.integers(1, 6), st.lists(st.integers(0, 8), min_size=1, max_size=8), SEEDS)
def test_4122_4233_lookup_is_one_hot_times_matrix_and_a_sum_is_the_bag(V, n, ids, seed):
    """Forward and gradient; a word that stands twice counts twice."""
    ids = torch.tensor(ids) % V
    W, up = draws(V, n, seed=seed), draws(len(ids), n, seed=seed + 1)
    one_hot = torch.zeros(len(ids), V, dtype=f64)
    for row, k in enumerate(ids):
        one_hot[row, k] = 1
    a, b = (W.clone().requires_grad_() for _ in range(2))
    out = w.lookup(ids, a)
    torch.testing.assert_close(out, one_hot @ W, rtol=0, atol=0)
    (out * up).sum().backward()
    torch.testing.assert_close(a.grad, one_hot.T @ up)
    assert not a.grad[[k for k in range(V) if k not in ids.tolist()]].any()
    total = w.lookup_sum(ids[None], b)[0]
    bag = torch.tensor([float(ids.tolist().count(k)) for k in range(V)], dtype=f64)
    torch.testing.assert_close(total, bag @ W)
    total.sum().backward()
    torch.testing.assert_close(b.grad, bag[:, None].expand(V, n))


def test_4233_the_posts_six_words():
    """(1,1,1,1,0,0) W = the sum of the first four rows of a 6 x 3 matrix."""
    W = draws(6, 3)
    torch.testing.assert_close(w.lookup_sum(torch.tensor([[0, 1, 2, 3]]), W)[0],
                               torch.tensor([1., 1, 1, 1, 0, 0], dtype=f64) @ W)


@pytest.mark.parametrize("model", ["skipgram", "cbow", "autoencoder"])
def test_4233_the_net_is_its_matrices(model):
    """N -> n -> N: logits bag(ids) U out', softmax, against plain loops over pairs of a text."""
    tokens, docs = text(3, 7, 40, 3)
    net = w.Word2Vec(7, 4, model, "softmax").double()
    net.out.weight.data = draws(7, 4)
    starts, kept = torch.tensor([0, 32]), torch.full((7,), 0.5, dtype=f64)
    reach = torch.randint(1, 4, (2, w.SPAN))
    bags = model != "skipgram"
    c, near, weight = w.windows(tokens, docs, starts, 3, reach if bags else None, kept)
    value, mass = net(c, near, weight.double(), torch.tensor([0]), 1)
    U, out, want, pairs = net.U.weight, net.out.weight, 0.0, 0.0
    for t in range(40):
        L = int(reach.flatten()[t]) if bags else 3
        around = [(s, 1.0 if bags else (4 - abs(s - t)) / 3 * 0.25) for s in range(40)
                  if 0 < abs(s - t) <= L and docs[s] == docs[t]]
        if not around:
            continue
        one_hot = torch.zeros(7, dtype=f64)
        for s, _ in around if bags else [(t, 1)]:
            one_hot[tokens[s]] += 1
        log_p = (one_hot @ U @ out.T).log_softmax(0)
        for s, x in around if model != "cbow" else [(t, 1.0)]:
            want, pairs = want - x * log_p[tokens[s]], pairs + x
    assert value.item() == pytest.approx(want.item(), rel=1e-6)
    assert mass.item() == pytest.approx(pairs, rel=1e-6)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), SEEDS)
def test_4216_through_classes_is_the_sum_over_both_classes(m, l, k, n, seed):
    c_a, d_c, b_d = (draws(*s, seed=seed + i).softmax(1) for i, s in enumerate([(m, l), (l, k), (k, n)]))
    p = w.through_classes(c_a, d_c, b_d)
    want = [[sum(c_a[a, c] * d_c[c, d] * b_d[d, b] for c in range(l) for d in range(k))
             for b in range(n)] for a in range(m)]
    torch.testing.assert_close(p, torch.tensor(want, dtype=f64))
    torch.testing.assert_close(p.sum(1), torch.ones(m, dtype=f64))


@given(st.integers(2, 8), st.integers(2, 8), SEEDS)
def test_4216_three_factors_are_the_matrix_of_that_rank(m, n, seed):
    M, k = draws(m, n, seed=seed), min(m, n) - 1
    A, P, Q = w.three_factors(M, k)
    u, s, vh = np.linalg.svd(M.numpy())
    torch.testing.assert_close(A @ P @ Q, torch.from_numpy((u[:, :k] * s[:k]) @ vh[:k]))
    assert torch.equal(P, P.diagonal().diag())


# ---- 2, 3, 4: counting ----

def brute(tokens, docs, V, L):
    """L times the expected pairs, one place after another."""
    N = torch.zeros(V, V, dtype=torch.int64)
    for t in range(len(tokens)):
        for s in range(max(0, t - L), min(len(tokens), t + L + 1)):
            if s != t and docs[s] == docs[t]:
                N[tokens[t], tokens[s]] += L - abs(s - t) + 1
    return N


TEXTS = (SEEDS, st.integers(1, 6), st.integers(1, 30), st.integers(1, 4), st.integers(1, 6))


@given(*TEXTS, st.integers(1, 31), st.integers(0, 7))
@example(0, 1, 1, 1, 5, 7, 0)
def test_counts_are_the_brute_force_for_any_chunk_and_square(seed, V, length, docs, L, chunk, top):
    tokens, docs = text(seed, V, length, docs)
    want = brute(tokens.tolist(), docs.tolist(), V, L)
    i, j, n = w.count(tokens, docs, V, L, chunk, top)
    assert n.dtype == torch.int64 and (n > 0).all()
    key = i * V + j
    assert (key[1:] > key[:-1]).all()  # each cell once, by rows
    assert torch.equal(w.dense(i, j, n, V), want.to(f64)) and torch.equal(want, want.T)
    runs = torch.bincount(docs).tolist()
    assert n.sum().item() == sum(2 * (r - d) * (L - d + 1) for r in runs for d in range(1, min(L, r - 1) + 1))


@given(st.lists(st.integers(0, 2**62), max_size=40))
def test_arrange_sorts_keys_of_any_size_and_knows_where_they_were(some):
    keys = torch.tensor(some * 2, dtype=torch.int64)
    for by in (keys, keys >> 40):  # the first may not fit into one number with its place
        got, order = w.arrange(by)
        assert got.tolist() == sorted(by.tolist()) and torch.equal(by[order], got)
        assert sorted(order.tolist()) == list(range(len(by)))


@given(SEEDS, st.integers(1, 6))
def test_sparse_and_dense_are_one_matrix(seed, V):
    M = torch.randint(-1, 2, (V, V), generator=torch.Generator().manual_seed(seed)).float()
    i, j = torch.cartesian_prod(torch.arange(V), torch.arange(V)).T  # zeros among them
    S = w.sparse(i, j, M.flatten(), V)
    assert torch.equal(S.to_dense(), M) and len(S.values()) == (M != 0).sum()
    assert torch.equal(w.dense(i, j, M.flatten(), V), M.double())


def test_counts_refuse_keys_that_overflow():
    with pytest.raises(ValueError, match="overflow"):
        w.count(torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), 2**31, 5)


def test_counts_do_not_stop_at_half_precision():
    """A pair that comes 5,000 times: float16 would stop at 2,048."""
    tokens = torch.tensor([0, 1], dtype=torch.int32).repeat(5000)
    docs = torch.arange(5000, dtype=torch.int32).repeat_interleave(2)
    i, j, n = w.count(tokens, docs, 2, 1)
    assert n.tolist() == [5000, 5000] and i.tolist() == [0, 1] and j.tolist() == [1, 0]


def test_T7_expected_windows_are_the_mean_of_random_ones():
    """500 draws of all windows from 1..L, within 5 sigma of N / L; and the share by distance."""
    L, V, times, rng = 4, 5, 500, random.Random(0)
    tokens, docs = text(1, V, 25, 2)
    N = w.dense(*w.count(tokens, docs, V, L), V) / L
    sums, squares = np.zeros((V, V)), np.zeros((V, V))
    for _ in range(times):
        once = np.zeros((V, V))
        for t in range(len(tokens)):
            b = rng.randint(1, L)
            for s in range(max(0, t - b), min(len(tokens), t + b + 1)):
                if s != t and docs[s] == docs[t]:
                    once[tokens[t], tokens[s]] += 1
        sums, squares = sums + once, squares + once**2
    mean = sums / times
    sigma = np.sqrt(np.maximum(squares / times - mean**2, 0) / times)
    assert (np.abs(mean - N.numpy()) <= 5 * sigma + 1e-12).all()
    far = torch.tensor([0, 1, 1, 1, 2], dtype=torch.int32)
    share = w.dense(*w.count(far, torch.zeros_like(far), 3, 5), 3) / 5
    assert share[0, 2] == 0.4  # distance 4 of 5: (5 - 4 + 1)/5


@given(SEEDS, st.integers(1, 5), st.integers(1, 20), st.integers(1, 3), st.integers(1, 4))
def test_T3_bag_gram_is_the_expected_gram_of_all_bags(seed, V, length, docs, L):
    tokens, docs = text(seed, V, length, docs)
    want = torch.zeros(V, V, dtype=f64)
    for t in range(length):
        for reach in range(1, L + 1):
            bag = torch.zeros(V, dtype=f64)
            for s in range(max(0, t - reach), min(length, t + reach + 1)):
                if s != t and docs[s] == docs[t]:
                    bag[tokens[s]] += 1
            want += torch.outer(bag, bag)
    torch.testing.assert_close(w.bag_gram(tokens, docs, V, L), want)


@given(SEEDS, st.integers(2, 6), st.integers(40, 100), st.integers(1, 4))
def test_windows_on_the_device_have_the_weights_that_the_svd_counts(seed, V, length, L):
    """All blocks of a text: T7's and T8's counts, cell by cell."""
    tokens, docs = text(seed, V, length, 3)
    kept = torch.rand(V, generator=torch.Generator().manual_seed(seed), dtype=f64)
    starts = torch.arange(0, length, w.SPAN)
    centre, near, weight = w.windows(tokens, docs, starts, L, None, kept)
    N = torch.zeros(V, V, dtype=f64)
    N.index_put_((centre[..., None].expand_as(weight), near[:, None].expand_as(weight)),
                 weight.double(), accumulate=True)
    (i, j, n), n_w = w.expected(w.count(tokens, docs, V, L), L, kept)
    torch.testing.assert_close(N, w.dense(i, j, n, V), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(n_w, w.dense(i, j, n, V).sum(1))


# ---- 5: T1 ----

@given(st.integers(2, 7), st.integers(2, 7), SEEDS)
def test_T1_4208_the_linear_autoencoder_is_the_svd(m, n, seed):
    """Its error is sum_{i>k} s_i^2; R does not matter; no random candidate is better."""
    M, k = draws(m, n, seed=seed), min(m, n) - 1
    C, D = w.autoencoder(M, k)
    least = (np.linalg.svd(M.numpy(), compute_uv=False)[k:] ** 2).sum()
    error = (M - M @ C @ D).square().sum().item()
    assert error == pytest.approx(least, rel=1e-9)
    R = draws(k, k, seed=seed + 1)
    R = R + 3 * k * torch.eye(k, dtype=f64)
    assert (M - M @ C @ R @ R.inverse() @ D).square().sum().item() == pytest.approx(least, rel=1e-8)
    for trial in range(5):
        near = M - M @ (C + 0.1 * draws(n, k, seed=trial)) @ (D + 0.1 * draws(k, n, seed=trial + 50))
        assert near.square().sum().item() >= least


def test_T1_4208_gradient_descent_finds_the_same():
    M = draws(8, 6)
    C, D = draws(6, 2, seed=1).requires_grad_(), draws(2, 6, seed=2).requires_grad_()
    found = minimise([C, D], lambda: (M - M @ C @ D).square().sum())
    c, d = w.autoencoder(M, 2)
    assert found == pytest.approx((M - M @ c @ d).square().sum().item(), rel=1e-6)


# ---- 6: T2, T3 ----

def test_T2_linear_skipgram_is_the_svd_of_the_row_scaled_counts():
    """Not of N itself; by the objective, term by term, and by gradient from three beginnings."""
    N, k, V = counts(6), 2, 6

    def objective(X):
        eye = torch.eye(V, dtype=f64)
        return (N * (eye - X[:, None]).square().sum(-1)).sum()  # sum_wc N_wc |e_c - x_w|^2

    left, s, right = w.linear_skipgram(N, k)
    best = objective(left * s @ right.T).item()
    found = min(minimise([U := draws(V, k, seed=seed).requires_grad_(),
                          out := draws(k, V, seed=seed + 9).requires_grad_()],
                         lambda: objective(U @ out), 3) for seed in range(3))
    assert best == pytest.approx(found, rel=1e-8)
    u, t, vh = np.linalg.svd(N.numpy())
    plain = torch.from_numpy((u[:, :k] * t[:k]) @ vh[:k]) / N.sum(1, keepdim=True)
    assert objective(plain).item() > best * (1 + 1e-6)


@pytest.mark.parametrize("auto", [False, True])
def test_T3_linear_cbow_is_reduced_rank_regression(auto):
    g, k, V, T = torch.Generator().manual_seed(0), 2, 5, 60
    X = torch.randint(0, 3, (T, V), generator=g).to(f64)
    Y = X if auto else F.one_hot(torch.randint(0, V, (T,), generator=g), V).to(f64)
    left, s, right = w.linear_cbow(X.T @ X, X.T @ Y, k)
    best = (Y - X @ (left * s) @ right.T).square().sum().item()
    found = min(minimise([U := draws(V, k, seed=seed).requires_grad_(),
                          out := draws(k, V, seed=seed + 9).requires_grad_()],
                         lambda: (Y - X @ U @ out).square().sum(), 3) for seed in range(3))
    assert best == pytest.approx(found, rel=1e-8)
    if auto:  # the post's difference 1 undone: T1's autoencoder of X
        C, D = w.autoencoder(X, k)
        assert best == pytest.approx((X - X @ C @ D).square().sum().item(), rel=1e-9)


def test_T3_words_that_are_in_no_bag_do_no_harm():
    X = torch.tensor([[1., 0, 2], [0, 0, 1], [1, 0, 0]], dtype=f64)
    left, s, right = w.linear_cbow(X.T @ X, X.T @ X, 2)
    torch.testing.assert_close(X @ (left * s) @ right.T, X)


# ---- 7: T4, T5, T6, T11 ----

def test_T4_softmax_at_full_rank_is_log_counts():
    N = counts(4)
    x = torch.zeros(4, 4, dtype=f64, requires_grad=True)
    minimise([x], lambda: -(N * x.log_softmax(1)).sum(), 3)
    torch.testing.assert_close(x.detach().log_softmax(1), w.softmax_optimum(N), rtol=1e-5, atol=1e-5)
    a, b = w.softmax_optimum(N), N.log()
    assert (a - b).std(1).max() < 1e-12  # const(w)


@given(st.integers(1, 20), st.sampled_from([1.0, 0.75, 0.0]), SEEDS)
def test_T5_T6_sgns_at_full_rank_is_shifted_pmi(k, power, seed):
    """The derivative of sum n log s(x) + k n_w P log s(-x) vanishes there, and the curvature is T11's;
    T6 leaves out the draws that hit the target."""
    N = counts(4, seed)
    n_w, P = N.sum(1, keepdim=True), w.negatives_law(N.sum(0), power)
    want = N.sum(0) ** power / (N.sum(0) ** power).sum()
    torch.testing.assert_close(P, want)
    for skip in (False, True):
        mass = n_w - N if skip else n_w
        x = w.sgns_optimum(N, n_w, P, k, skip)
        slope = N * torch.sigmoid(-x) - k * mass * P * torch.sigmoid(x)
        assert slope.abs().max() < 1e-9 * N.sum()
    x = w.sgns_optimum(N, n_w, P, k).requires_grad_()
    value = -(N * F.logsigmoid(x) + k * n_w * P * F.logsigmoid(-x)).sum()
    first = torch.autograd.grad(value, x, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), x)[0]
    torch.testing.assert_close(second, w.sgns_weight(N, n_w, P, k))
    if power == 1:
        p = N / N.sum()
        pmi = (p / (p.sum(1, keepdim=True) * p.sum(0))).log()
        torch.testing.assert_close(x.detach(), pmi - math.log(k))


def test_T5_the_net_trained_on_a_text_reaches_shifted_pmi():
    """Skip-Gram with negative sampling, n = V, all of the text and every word as a negative."""
    V, L, k = 4, 2, 3
    tokens, docs = text(5, V, 300, 1)
    kept = torch.ones(V, dtype=f64)
    (i, j, n), n_w = w.expected(w.count(tokens, docs, V, L), L, kept)
    net = w.Word2Vec(V, V).double()
    net.out.weight.data = draws(V, V)
    starts = torch.arange(0, 300, w.SPAN)
    inputs = [x.double() if x.is_floating_point() else x
              for x in w.windows(tokens, docs, starts, L, None, kept)]
    negatives = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])  # P = 3/8, 2/8, 1/8, 2/8 exactly
    minimise(net.parameters(), lambda: net(*inputs, negatives, k)[0], 3)
    P = torch.tensor([3, 2, 1, 2], dtype=f64) / 8
    want = w.sgns_optimum(w.dense(i, j, n, V), n_w[:, None], P, k)
    torch.testing.assert_close((net.U.weight @ net.out.weight.T).detach(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5])
def test_T11_solve_has_the_least_error_that_its_weights_allow(weight):
    """PPMI of a text, factored with cells weighed by (n_w n_c)^(2 weight): no descent goes below it."""
    V, L, k = 9, 3, 2
    tokens, docs = text(7, 5, 500, 4)
    tokens = (tokens * draws(500, seed=1).abs().clamp(max=2)).int().clamp(max=V - 1)  # uneven counts
    N = brute(tokens.tolist(), docs.tolist(), V, L) / L
    n_w = N.sum(1)
    M = (N * n_w.sum() / (n_w[:, None] * n_w)).log().clamp(min=0)
    W = (n_w[:, None] * n_w) ** (2 * weight)
    args = w.parse_args(f"--dim {k} --window {L} --smoothing 1 --discount 0 --weight {weight}".split())
    progress = types.SimpleNamespace(show=lambda *_: None)
    (left, s, right), _ = w.solve(tokens, docs, torch.ones(V, dtype=f64), args, progress)
    error = (W * (M - left.double() * s @ right.double().T) ** 2).sum().item()
    U, out = (draws(V, k, seed=i).requires_grad_() for i in (2, 3))
    least = minimise([U, out], lambda: (W / W.max() * (M - U @ out.T) ** 2).sum()) * W.max().item()
    assert 0.999 * least < error < 1.0001 * least
    u, sigma, vh = torch.linalg.svd(M)
    plain = (W * (M - u[:, :k] * sigma[:k] @ vh[:k]) ** 2).sum().item()
    assert error < 0.98 * plain or not weight


# ---- 8: PMI ----

@given(st.integers(2, 6), st.floats(0.01, 100), st.floats(1, 9), SEEDS)
def test_pmi_facts(V, c, k, seed):
    """Independence gives 0; a factor on all counts nothing; smoothing 1 none; natural logs throughout."""
    row = draws(V, seed=seed).exp()
    N = torch.outer(row, row)
    P = w.negatives_law(N.sum(0), 1.0)
    torch.testing.assert_close(w.sgns_optimum(N, N.sum(1, keepdim=True), P, 1), torch.zeros_like(N),
                               rtol=0, atol=1e-12)
    N = counts(V, seed)
    n_w, P = N.sum(1, keepdim=True), w.negatives_law(N.sum(0), 0.75)
    x = w.pmi(N, n_w, P, k)
    torch.testing.assert_close(w.pmi(c * N, c * n_w, w.negatives_law(c * N.sum(0), 0.75), k), x)
    torch.testing.assert_close(w.negatives_law(N.sum(0), 1.0), N.sum(0) / N.sum())
    assert (x >= 0).all()
    unshifted = w.sgns_optimum(N, n_w, P, 1)
    torch.testing.assert_close(x, torch.clamp(unshifted - math.log(k), min=0))
    torch.testing.assert_close(w.pmi(N, n_w, P), torch.clamp(unshifted, min=0))
    torch.testing.assert_close(w.pmi(N, n_w, P, k, 2.0), x - 2 / (N + 2) * x)
    assert not w.pmi(N * torch.eye(V), n_w, P)[~torch.eye(V, dtype=torch.bool)].any()  # no pair: 0


def test_smoothing_lowers_rare_contexts_and_lifts_none_of_them():
    """The side that svd2vec has wrong: with power < 1 rare contexts are drawn more often."""
    n_c = torch.tensor([1000., 100, 10, 1])
    ratio = w.negatives_law(n_c, 0.75) / w.negatives_law(n_c, 1.0)
    assert (ratio.diff() > 0).all() and ratio[0] < 1 < ratio[-1]


# ---- 9, 10: the factorisation ----

SHAPES = st.tuples(st.integers(1, 150), st.integers(1, 150))


@given(SHAPES, st.integers(1, 60), st.integers(0, 150), st.booleans(), SEEDS)
@example((60, 40), 40, 60, False, 0)
@example((40, 60), 1, 0, True, 0)
@example((60, 60), 40, 60, False, 1)
@example((150, 130), 2, 130, False, 0)
@example((17, 17), 17, 0, False, 0)
def test_krylov_svd_is_lapacks(shape, k, rank, as_sparse, seed):
    """Wide, tall, rank 0 to full, k = 1 to min(m, n): values, residual, orthonormal columns, order."""
    m, n = shape
    k, rank = min(k, m, n), min(rank, m, n)
    M = draws(m, rank, seed=seed) @ draws(rank, n, seed=seed + 1)
    pair = M, M.T.contiguous()
    if as_sparse and rank:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its CSR a beta
            pair = tuple(x.to_sparse_csr() for x in pair)
    u, s, v = w.krylov_svd(*pair, k, rounds=5)
    want = torch.from_numpy(np.linalg.svd(M.numpy(), compute_uv=False))
    size = max(want[0].item(), 1e-300)
    exact = rank <= 16 or max(80, 3 * k) >= min(m, n)  # the space then holds all of M
    torch.testing.assert_close(s, want[:k], rtol=0, atol=(1e-10 if exact else 0.02) * size)
    least = want[k:].square().sum().sqrt().item()
    assert (M - u * s @ v.T).norm() <= least * (1 + 1e-9 if exact else 1.01) + 1e-9 * size
    eye = torch.eye(k, dtype=f64)
    torch.testing.assert_close(u.T @ u, eye, rtol=0, atol=1e-8)
    torch.testing.assert_close(v.T @ v, eye, rtol=0, atol=1e-8)
    assert (s[1:] <= s[:-1]).all() and (s >= 0).all()


def planted(s):
    """A (700, 600) matrix with singular values s, and its left singular vectors."""
    u, v = (torch.linalg.qr(draws(700, 600, seed=i)).Q for i in range(2))
    return u * s @ v.T, u


def test_krylov_svd_finds_the_directions_of_a_flat_spectrum_and_svd_lowrank_does_not():
    s = (1 + torch.arange(600, dtype=f64)) ** -0.2  # falls slowly, as PMI's does
    M, u = planted(s)
    best = s[:60].square().sum().item()
    left, mine, right = w.krylov_svd(M, M.T, 60, rounds=18)  # 16 columns a block, 288 in all
    assert 0.9999 * best < mine.square().sum() <= best * (1 + 1e-12)
    assert (M - left * mine @ right.T).square().sum() < s.square().sum() - 0.9999 * best
    assert (u[:, :60].T @ left).square().sum() > 0.995 * 60
    torch.manual_seed(0)
    theirs = torch.svd_lowrank(M, q=288, niter=1)  # as many columns, and twice the products
    wide = w.krylov_svd(M, M.T, 60, rounds=3)[0]  # a few wide blocks instead of many narrow ones
    for other in (theirs[0][:, :60], wide):
        assert (u[:, :60].T @ other).square().sum() < 0.95 * 60


def test_krylov_svd_finds_the_subspace_above_a_gap():
    s = 1 / (1 + torch.arange(600, dtype=f64) / 30)
    s[40:] *= 0.2
    M, u = planted(s)
    cosines = torch.linalg.svdvals(w.krylov_svd(M, M.T, 40, rounds=6)[0].T @ u[:, :40])
    assert cosines.min() > 1 - 1e-9


def test_factors_have_deterministic_signs_and_bits():
    M = draws(50, 30).float()
    first, again = w.krylov_svd(M, M.T, 5, seed=3), w.krylov_svd(M, M.T, 5, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    other = w.krylov_svd(M, M.T, 5, rounds=9, seed=4)
    exact = w.truncated(M, 5)
    for a, b in zip(other, exact):  # the same signs from another beginning, and from LAPACK
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    for u in (first[0], exact[0]):
        assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    assert (exact[1].diff() <= 0).all()


@pytest.mark.parametrize("k", [0, 4])
def test_ranks_that_are_none_raise(k):
    M = draws(3, 5)
    with pytest.raises(ValueError, match=f"rank {k}"):
        w.truncated(M, k)
    with pytest.raises(ValueError, match=f"rank {k}"):
        w.krylov_svd(M, M.T, k)


# ---- 11, 12: T9, T10 ----

def cosines(W):
    W = W / W.norm(dim=1, keepdim=True)
    return W @ W.T


@given(st.integers(3, 8), SEEDS)
def test_T9_cosines_survive_rotation_and_scale_only(V, seed):
    M = draws(V, V, seed=seed)
    left, s, right = w.truncated(M, 2)
    for p in (0.0, 0.5, 1.0):
        W = w.vectors(left, s, right, p)
        torch.testing.assert_close(W, left * s**p)
        R = torch.linalg.qr(draws(2, 2, seed=seed + 1)).Q
        torch.testing.assert_close(cosines(3 * W @ R), cosines(W))
        torch.testing.assert_close((W @ R) @ (R.T @ (right * s ** (1 - p)).T), left * s @ right.T)
    skew = torch.tensor([[1., 2], [0, 1]], dtype=f64)
    assert (cosines(W @ skew) - cosines(W)).abs().max() > 1e-3
    assert (cosines(left) - cosines(left * s)).abs().max() > 1e-6 or s[1] > 0.999 * s[0]


@given(st.lists(st.floats(-3, 3).filter(lambda x: abs(x) > 0.1), min_size=3, max_size=6, unique_by=abs), SEEDS)
def test_T10_w_plus_c_cancels_negative_directions(eigenvalues, seed):
    eigenvalues = sorted(eigenvalues, key=abs, reverse=True)
    if any(abs(a) - abs(b) < 1e-3 for a, b in pairwise(eigenvalues)):
        return
    Q = torch.linalg.qr(draws(len(eigenvalues), len(eigenvalues), seed=seed)).Q
    M = Q * torch.tensor(eigenvalues, dtype=f64) @ Q.T
    left, s, right = w.truncated((M + M.T) / 2, len(eigenvalues))
    both = w.vectors(left, s, right, 0.0, plus=True)
    for column, value in enumerate(eigenvalues):
        want = 2 * left[:, column] if value > 0 else torch.zeros(len(eigenvalues), dtype=f64)
        torch.testing.assert_close(both[:, column], want, rtol=0, atol=1e-8)


# ---- 13: T8 ----

@given(st.floats(1e-6, 1e-2))
def test_T8_keep(t):
    f = torch.logspace(-7, 0, 200, dtype=f64)
    code, paper = w.keep(f, t), w.keep(f, t, "paper")
    for x, a, b in zip(f.tolist(), code.tolist(), paper.tolist()):
        assert a == pytest.approx(min(1, math.sqrt(t / x) + t / x))
        assert b == pytest.approx(min(1, math.sqrt(t / x)))
    assert (code.diff() <= 0).all() and (paper.diff() <= 0).all()
    edge = t * (3 + math.sqrt(5)) / 2  # 2.618 t
    below, above = w.keep(torch.tensor([edge * 0.999, edge * 1.01], dtype=f64), t)
    assert below == 1 > above
    assert torch.equal(w.keep(f, 0.0), torch.ones_like(f))


def test_T8_expected_counts_are_the_mean_of_random_drops():
    """Dropped words leave gaps: kept_w kept_c N_wc for different words, within 5 sigma of 500 draws."""
    V, L, times = 4, 2, 500
    tokens, docs = text(2, V, 30, 1)
    kept = torch.tensor([0.3, 0.5, 0.8, 1.0], dtype=f64)
    (i, j, n), _ = w.expected(w.count(tokens, docs, V, L), L, kept)
    rng, total, square = np.random.default_rng(0), np.zeros((V, V)), np.zeros((V, V))
    for _ in range(times):
        stays = rng.random(30) < kept[tokens.long()].numpy()
        once = np.zeros((V, V))
        for t in range(30):
            for s in range(max(0, t - L), min(30, t + L + 1)):
                if s != t and stays[s] and stays[t]:
                    once[tokens[t], tokens[s]] += (L - abs(s - t) + 1) / L
        total, square = total + once, square + once**2
    mean = total / times
    sigma = np.sqrt(np.maximum(square / times - mean**2, 0) / times)
    assert (np.abs(mean - w.dense(i, j, n, V).numpy()) <= 5 * sigma + 1e-9).all()


# ---- 14: evaluation ----

@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=20))
def test_spearman_with_ties_is_pearson_of_mean_ranks(pairs):
    x, y = zip(*pairs)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(w.spearman(torch.tensor(x, dtype=f64), torch.tensor(y, dtype=f64)))
        return

    def mean_ranks(v):
        return [sum(b < a for b in v) + (sum(b == a for b in v) + 1) / 2 for a in v]
    want = np.corrcoef(mean_ranks(x), mean_ranks(y))[0, 1]
    assert w.spearman(torch.tensor(x, dtype=f64), torch.tensor(y, dtype=f64)) == pytest.approx(want)


@given(st.integers(4, 12), st.booleans(), SEEDS)
def test_analogies_by_loops_never_answer_with_a_question_word(V, mul, seed):
    W = draws(V, 3, seed=seed)
    q = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(seed + i))[:3] for i in range(5)])
    answers = w.analogies(W, q, mul)
    U = (W / W.norm(dim=1, keepdim=True)).numpy()
    for (a, b, c), answer in zip(q.tolist(), answers.tolist()):
        def score(d):
            ca, cb, cc = (float(U[d] @ U[x]) for x in (a, b, c))
            return (cb + 1) / 2 * (cc + 1) / 2 / ((ca + 1) / 2 + 1e-3) if mul else cb - ca + cc
        best = max(score(d) for d in range(V) if d not in (a, b, c))
        assert answer not in (a, b, c) and score(answer) == pytest.approx(best, abs=1e-4)


WORDS = "king queen man woman apple".split()
PLANE = torch.tensor([[1., 1, 0], [1, -1, 0], [0.2, 1, 0], [0.2, -1, 0], [0, 0, 1]])


def test_evaluate_reads_analogies_by_part_and_counts_what_it_cannot_ask():
    Path("q.txt").write_text(": family\nMan king woman queen\nman king woman APPLE\n: far\nking man zebra x\n")
    score = w.evaluate(Path("q.txt"), WORDS, PLANE)
    assert (score["asked"], score["of"]) == (2, 3)
    assert score["add"] == score["mul"] == score["add family"] == 0.5 and math.isnan(score["add far"])


def test_evaluate_reads_pairs_and_counts_what_it_cannot_ask():
    Path("p.tsv").write_text("# a comment\nWord 1,Word 2,Human (mean)\nking\tqueen\t1\nking,man,9.5\n"
                             "man apple 2\nman zebra 3\nking king 10\n")
    score = w.evaluate(Path("p.tsv"), WORDS, PLANE)
    assert (score["asked"], score["of"]) == (4, 5)
    cos = [0.0, 1.2 / math.sqrt(2 * 1.04), 0.0, 1.0]
    assert score["spearman"] == pytest.approx(w.spearman(torch.tensor(cos, dtype=f64),
                                                         torch.tensor([1, 9.5, 2, 10], dtype=f64)))


@pytest.mark.parametrize("body, line", [("a b 3\nnonsense here\n", "neither"), ("zebra x 3\n", "no line"),
                                        ("", "no line"), ("king man 3\n: x\nking man woman queen\n", "no line")])
def test_evaluate_refuses_other_files(body, line):
    Path("bad.txt").write_text(body)
    with pytest.raises(w.UserError, match=line):
        w.evaluate(Path("bad.txt"), WORDS, PLANE)


def test_unknown_words_raise():
    assert w.choose(["Queen", "apple"], WORDS).tolist() == [1, 4]
    with pytest.raises(w.UserError, match="unknown: zebra"):
        w.choose(["king", "zebra"], WORDS)


def test_nearest_leaves_the_word_itself_out():
    cosine, near = w.neighbours(PLANE, torch.tensor([0, 1]), 2)
    assert near.tolist() == [[2, 1], [3, 0]] or near[:, 0].tolist() == [2, 3]
    assert cosine[0, 0].item() == pytest.approx(1.2 / math.sqrt(2 * 1.04), rel=1e-6)


@given(st.integers(2, 6), st.integers(1, 9), st.floats(-1, 1), SEEDS)
def test_sgns_objective_is_the_sum_over_all_cells_and_most_at_T5(V, k, bias, seed):
    tokens, docs = text(seed, V, 200, 1)
    kept = torch.ones(V, dtype=f64)
    cells, n_w = w.expected(w.count(tokens, docs, V, 3), 3, kept)
    N, P = w.dense(*cells, V), w.negatives_law(n_w, 0.75)
    U, out = draws(V, 3, seed=seed), draws(V, 3, seed=seed + 1)
    x = U @ out.T + bias
    want = sum(N[a, c] * math.log(1 / (1 + math.exp(-x[a, c])))
               + k * n_w[a] * P[c] * math.log(1 / (1 + math.exp(x[a, c]))) for a in range(V) for c in range(V))
    got = w.sgns_objective(cells, n_w, U, out, P, k, bias)
    assert got == pytest.approx((want / N.sum()).item(), rel=1e-9)
    if (N > 0).all():
        best = w.sgns_optimum(N, n_w[:, None], P, k)
        assert w.sgns_objective(cells, n_w, best, torch.eye(V, dtype=f64), P, k) >= got


# ---- 15: new words ----

def test_4208_the_posts_table_ranks_the_missing_word_first():
    """Rows 神 魔, columns 兽 界 龙 灵 术: ones, but 神术 is 0."""
    M = torch.ones(2, 5, dtype=f64)
    M[0, 4] = 0
    found = w.new_words(M, 1, 9)
    assert [cell[:2] for cell in found] == [(0, 4)] and 0 < found[0][2] < 1


@given(st.integers(3, 7), st.integers(3, 7), st.integers(1, 2), SEEDS)
def test_4208_a_hole_in_a_low_rank_matrix_comes_first(m, n, k, seed):
    g = torch.Generator().manual_seed(seed)
    M = (torch.rand(m, k, generator=g, dtype=f64) + 0.5) @ (torch.rand(k, n, generator=g, dtype=f64) + 0.5)
    M = torch.block_diag(M, torch.zeros(1, 1, dtype=f64))  # zeros that are no holes
    M[m, n] = M.max()
    M[1, 2] = 0
    assert w.new_words(M, k, 9)[0][:2] == (1, 2)


# ---- text, files, pictures ----

def test_load_data_lower_cases_drops_rare_words_and_keeps_a_stable_order():
    Path("t.txt").write_text("B a a\nb C, c'd e_e 7f\n\nÄ ä Ä a b\n")
    words, n, tokens, docs = w.load_data("t.txt", "cache", 2, 99, torch.device("cpu"))
    assert words == ["b", "a", "ä", "c", "e"] and n.tolist() == [3, 3, 3, 2, 2]
    assert tokens.tolist() == [0, 1, 1, 0, 3, 3, 4, 4, 2, 2, 2, 1, 0]
    assert docs.tolist() == [0] * 3 + [1] * 5 + [3] * 5
    assert w.load_data("t.txt", "cache", 2, 3, torch.device("cpu"))[0] == ["b", "a", "ä"]


def test_members_of_a_zip_are_documents_of_their_own():
    with zipfile.ZipFile("t.zip", "w") as archive:
        for name in ("x.txt", "y.txt"):
            archive.writestr(name, "a b a b")  # no line end between them
    words, n, tokens, docs = w.load_data("t.zip", "cache", 1, 9, torch.device("cpu"))
    assert words == ["a", "b"] and docs.tolist() == [0] * 4 + [1] * 4


def test_prose_is_docstrings_and_comments():
    found = b" ".join(map(b"".join, w.PROSE.findall(b'x = 1  # one thing\n"""Two\nlines."""\ny = f(z)\n# end\n')))
    assert found.split() == [b"one", b"thing", b"Two", b"lines.", b"end"]


def test_a_files_prose_is_one_document(monkeypatch):
    files = [b'"""Two\nlines."""\nx = y\n# end\n', b'"""Two"""\n']
    monkeypatch.setattr(w, "load_text", lambda data, cache: files)
    words, n, tokens, docs = w.load_data("python", "cache", 1, 9, torch.device("cpu"))
    assert words == ["two", "lines", "end"] and tokens.tolist() == [0, 1, 2, 0]
    assert docs[0] == docs[1] == docs[2] < docs[3]


@given(st.lists(st.one_of(st.text(max_size=8), st.sampled_from(
    ["don\u2019t", "a\u00b2b", "\u0661\u0662", "\u0130x", "\u6f22\u5b57\u3001", "Z_9", "\x85", "\u2028", "\r", "\n"])),
    max_size=20), st.binary(max_size=4))
def test_words_are_the_runs_of_letters_of_any_alphabet(parts, foreign):
    raw = "aa\nzz ".encode() + " ".join(parts).encode("utf-8", "replace") + foreign + b"\nlast"
    Path("u.txt").write_bytes(raw)
    text = raw.decode("utf-8", "replace").lower()
    want = [" ".join("".join(c if c.isalnum() and not c.isdecimal() else " " for c in line).split())
            for line in text.split("\n")]
    words, n, tokens, docs = w.load_data("u.txt", "cache", 1, 999, torch.device("cpu"))
    lines = [" ".join(words[k] for k in tokens[docs == d].tolist()) for d in range(len(want))]
    assert lines == want and n.sum() == sum(len(line.split()) for line in want)


@pytest.mark.parametrize("name", ["v.bin", "v.txt"])
def test_vectors_come_back_from_both_formats(name):
    words, W = ["a", "词", "\u00e9"], draws(3, 4).float()
    W[0] = torch.tensor(np.frombuffer(b"\n \n\n" * 4, np.float32).copy())  # blanks and line ends inside
    w.write_vectors(Path(name), words, W)
    got, back = w.read_vectors(Path(name))
    assert got == words
    torch.testing.assert_close(back, W, rtol=0 if name == "v.bin" else 1e-5, atol=0)


@pytest.mark.parametrize("body", [b"", b"2 3\na ", b"not a head\n", b"1 2\na 1 x\n", b"9 1\na 1\n"])
@pytest.mark.parametrize("name", ["v.bin", "v.txt"])
def test_damaged_vectors_are_refused(body, name):
    Path(name).write_bytes(body)
    with pytest.raises(w.UserError, match="word2vec's formats"):
        w.read_vectors(Path(name))


def test_pca_picture_puts_words_of_one_direction_side_by_side():
    W = torch.tensor([[5., 0, 0]] * 5 + [[0., 5, 0]])
    W = W + 0.1 * torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    picture = w.pca_picture(W, ["ab", "c", "d", "e", "f", "词"], torch.tensor([0] * 5 + [1]))
    assert picture.shape == (3, 900, 900) and picture.dtype == torch.uint8
    first, last = ((picture == w.COLOURS[g].to(torch.uint8)[:, None, None]).all(0).nonzero().double()[:, 1]
                   for g in (0, 1))  # along the principal direction
    assert len(first) and len(last) and (first.mean() - last.mean()).abs() > 500
    assert first.max() - first.min() < 200  # the five stay together, the sixth stands alone


def test_neighbours_are_the_nearest_others():
    W = torch.tensor([[1., 0], [9, 1], [0, 1], [-1, -1]])
    cosine, near = w.neighbours(W, torch.tensor([0, 2]), 2)
    assert near.tolist() == [[1, 2], [1, 0]]
    assert cosine[0].tolist() == pytest.approx([9 / 82**0.5, 0]) and w.neighbours(W, near[0], 9)[1].shape == (2, 3)


# ---- whole runs ----

BASE = ["--data", "t.txt", "--min-count", "1", "--dim", "4", "--seed", "1"]
SGD = [*BASE, "--model", "skipgram", "--batch-size", "64", "--shared-negatives", "8", "--window", "2"]


def write_text():
    rng = random.Random(0)
    Path("t.txt").write_text("\n".join(" ".join(rng.choice(["a b c", "d e f", "g h"]) for _ in range(6))
                                       for _ in range(30)))


def weights(out):
    return torch.load(Path(out) / "ckpt.pt", weights_only=True)["model"]


@pytest.mark.parametrize("model", w.CLOSED)
def test_closed_models_write_everything(model, capsys):
    write_text()
    Path("s.txt").write_text("a b 9\nd e 8\na d 1\nb g 2\n")
    assert w.main([*BASE, "--model", model, "--text", "--objective", "--eval", "s.txt"]) == 0
    out = Path("out/w2v_svd")
    assert {p.name for p in out.iterdir()} == {"log.csv", "vectors.bin", "vectors.txt", "pca.png", "metrics.json"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["vocabulary"] == 8 and metrics["words"] == 30 * 6 * 3 - Path("t.txt").read_text().count("h")
    assert metrics["scores"]["s.txt"]["asked"] == 4 and metrics["objective"] < 0
    assert set(metrics["seconds"]) == {"read", "count", "weigh", "factorise", "in_all"}
    first = w.read_vectors(out / "vectors.bin")[1]
    assert w.main([*BASE, "--model", model, "--text"]) == 0  # the older run is moved aside
    assert torch.equal(first, w.read_vectors(out / "vectors.bin")[1]) and Path("out/w2v_svd.1").exists()
    capsys.readouterr()
    assert w.main(["--query", "a"]) == 0 and "a  " in capsys.readouterr().out
    assert w.main(["--vectors", "out/w2v_svd/vectors.txt", "--query", "b", "--eval", "s.txt"]) == 0
    assert "4 of 4 asked" in capsys.readouterr().out


def whole_counts():
    """N (V, V), expected, of t.txt as SGD below sees it."""
    words, n, tokens, docs = w.load_data("t.txt", "", 1, 99, torch.device("cpu"))
    cells, n_w = w.expected(w.count(tokens, docs, 8, 2), 2, torch.ones(8, dtype=f64))
    return w.dense(*cells, 8), n_w


@pytest.mark.parametrize("model, loss, most", [("skipgram", "negative", None), ("skipgram", "softmax", None),
                                               ("cbow", "softmax", 0.85), ("autoencoder", "negative", 2.8)])
def test_descent_learns(model, loss, most):
    """The last loss on a text of three phrases, which begins at 6 log 2 = 4.16 or log 8 = 2.08. Skip-Gram
    comes within 10 % of the least there is, T4's and T5's at full rank, and not below."""
    write_text()
    assert w.main([*SGD, "--model", model, "--loss", loss, "--steps", "300", "--lr", "0.05",
                   "--batch-size", "512", "--dim", "8", "--shared-negatives", "512"]) == 0
    last = float(Path("out/w2v_svd/log.csv").read_text().splitlines()[-1].split(",")[4])
    if most is None:
        N, n_w = whole_counts()
        if loss == "softmax":
            least = -(N * w.softmax_optimum(N).clamp(min=-99)).sum() / N.sum()
        else:
            n = torch.bincount(torch.tensor(["abcdefgh".index(c) for c in Path("t.txt").read_text()
                                             if c.isalpha()]), minlength=8).sort(descending=True).values
            P = n**0.75 / (n**0.75).sum()
            x = w.sgns_optimum(N, n_w[:, None], P, 5).clamp(min=-99)
            least = -(N * F.logsigmoid(x) + 5 * n_w[:, None] * P * F.logsigmoid(-x)).sum() / N.sum()
        assert 0.98 * least < last < 1.1 * least  # a mean over the last line's steps
    else:
        assert last < most


def test_descent_beats_the_svd_by_sgns_own_objective():
    """4233's difference 2 on equal terms: at rank 3, SPPMI's SVD < SGNS by gradient < T5's optimum."""
    write_text()
    value = {}
    for model in ("ppmi", "skipgram"):
        assert w.main([*SGD, "--model", model, "--objective", "--dim", "3", "--shift", "5", "--out", model,
                       *([] if model == "ppmi" else ["--steps", "200", "--lr", "0.05"])]) == 0
        value[model] = json.loads((Path(model) / "metrics.json").read_text())["objective"]
    N, n_w = whole_counts()
    P = w.negatives_law(n_w, 0.75)
    x = w.sgns_optimum(N, n_w[:, None], P, 5).clamp(min=-99)
    best = (N * F.logsigmoid(x) + 5 * n_w[:, None] * P * F.logsigmoid(-x)).sum() / N.sum()
    assert value["ppmi"] < value["skipgram"] < best


@pytest.mark.parametrize("model", ["skipgram", "cbow"])
def test_descent_as_it_is_finds_topics(model):
    """Two topics of 20 words, 6,000 lines of 10 words of one of them: no flag need be tuned for that."""
    g = torch.Generator().manual_seed(0)
    topic = torch.randint(2, (6000, 1), generator=g) * 20
    lines = (topic + torch.randint(20, (6000, 10), generator=g)).tolist()
    Path("t.txt").write_text("\n".join(" ".join(chr(97 + k // 20) + chr(97 + k % 20) for k in line) for line in lines))
    assert w.main(["--data", "t.txt", "--model", model, "--dim", "20"]) == 0
    words, W = w.read_vectors(Path("out/w2v_svd/vectors.bin"))
    near = w.neighbours(W, torch.arange(40), 1)[1][:, 0].tolist()
    assert len(words) == 40 and sum(words[k][0] == word[0] for k, word in zip(near, words)) >= 38


@pytest.mark.parametrize("model", ["skipgram", "cbow"])
def test_resume_is_the_straight_run_bit_for_bit(model):
    write_text()
    run = [*SGD, "--model", model, "--steps", "7", "--save-every", "3"]
    assert w.main([*run, "--out", "straight"]) == 0
    save, kept = w.save_checkpoint, []

    def stop_after_first(path, state):
        save(path, state)
        if state["step"] == 3:
            kept.append(path)
            os.kill(os.getpid(), signal.SIGTERM)
    w.save_checkpoint = stop_after_first
    try:
        assert w.main([*run, "--out", "broken"]) == 130 and kept
    finally:
        w.save_checkpoint = save
    assert torch.load("broken/ckpt.pt", weights_only=True)["step"] == 3
    assert w.main(["--resume", "--out", "broken"]) == 0
    a, b = weights("straight"), weights("broken")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert Path("straight/vectors.bin").read_bytes() == Path("broken/vectors.bin").read_bytes()


def test_two_ranks_are_one(tmp_path):
    write_text()
    run = [*SGD, "--steps", "4"]
    assert w.main([*run, "--out", "one"]) == 0
    env = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           w.__file__, *run, "--out", "two"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    a, b = weights("one"), weights("two")
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-5, atol=1e-6)


def test_blocks_of_an_epoch_are_all_blocks_once():
    device = torch.device("cpu")
    seen = torch.cat([w.batch_rows(7, step, 3, 5, device) for step in range(14)])
    for epoch in seen.split(7):
        assert sorted(epoch.tolist()) == list(range(7))
    assert Counter(seen[:7].tolist()) == Counter(range(7)) and not torch.equal(seen[:7], seen[7:14])
    assert torch.equal(w.batch_rows(2, 2, 9, 5, device).sort().values, torch.tensor([0] * 4 + [1] * 5)) or \
        sorted(w.batch_rows(2, 2, 9, 5, device).tolist()) in ([0] * 4 + [1] * 5, [0] * 5 + [1] * 4)


@pytest.mark.parametrize("argv, line", [
    (["--data", "none.txt"], "no such file"),
    ([*BASE, "--min-count", "9999"], "fewer than two words"),
    ([*BASE, "--words", "zebra"], "unknown: zebra"),
    ([*BASE, "--resume"], "no such checkpoint"),
    ([*BASE, "--model", "linear-cbow", "--sample", "1e-3"], "--sample"),
    ([*SGD, "--batch-size", "40"], "multiple of 32"),
    ([*SGD, "--resume"], "no such checkpoint"),
    (["--gpu"], "CUDA device"),
    (["--query", "a"], "vectors.bin"),
    (["--new-words", "t.txt"], "not a word and its count"),
    (["--vectors", "t.txt"], "word2vec's formats"),
    ([*BASE, "--eval", "none.txt"], "none.txt"),
    ([*BASE, "--eval", "bytes.txt"], "bytes.txt: not a text"),
    (["--new-words", "bytes.txt"], "bytes.txt: not a text"),
])
def test_wrong_input_is_one_line_and_code_2(argv, line, capsys):
    if "--gpu" in argv and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    write_text()
    Path("bytes.txt").write_bytes(b"\x80\xff")
    assert w.main(argv) == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1
    assert not Path("out").exists()  # nothing was written, nothing moved


def test_resume_refuses_another_vocabulary_and_other_flags(capsys):
    write_text()
    assert w.main([*SGD, "--steps", "2"]) == 0
    assert w.main(["--resume", "--dim", "5", "--steps", "3"]) == 2
    Path("t.txt").write_text("only two words two words")
    assert w.main(["--resume", "--steps", "3"]) == 2
    assert "the checkpoint has 4" in (err := capsys.readouterr().err) and "another number" in err


def test_new_words_from_a_list(capsys):
    Path("d.txt").write_text("".join(f"{a}{b} {100 + i}\n" for i, a in enumerate("神魔") for b in "兽界龙灵术"
                                     if a + b != "神术") + "神 5000\n罕见 3\n")
    assert w.main(["--new-words", "d.txt", "--rank", "1"]) == 0
    assert capsys.readouterr().out.startswith("神术 ")


def test_a_loss_that_is_not_finite_stops_with_code_1(capsys):
    write_text()
    assert w.main([*SGD, "--steps", "30", "--lr", "1e38", "--save-every", "1"]) == 1
    assert "no longer finite" in capsys.readouterr().err
    assert all(v.isfinite().all() for v in weights("out/w2v_svd").values()) \
        if Path("out/w2v_svd/ckpt.pt").exists() else True


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(capsys, monkeypatch):
    write_text()
    real = Path.write_bytes

    def full(self, body):
        if self.suffix == ".tmp" and Path("out/w2v_svd/ckpt.pt").exists():
            raise OSError(28, "No space left on device")
        return real(self, body)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert w.main([*SGD, "--steps", "4", "--save-every", "2"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert torch.load("out/w2v_svd/ckpt.pt", weights_only=True)["step"] == 2


def test_ctrl_c_saves_and_says_so():
    write_text()
    run = subprocess.Popen([sys.executable, w.__file__, *SGD, "--steps", "1000000"], stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    while not Path("out/w2v_svd/log.csv").exists():
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 130 and "go on with --resume" in said and "Traceback" not in said
    assert torch.load("out/w2v_svd/ckpt.pt", weights_only=True)["step"] >= 1


def test_closed_models_run_in_one_process_only(capsys, monkeypatch):
    write_text()
    monkeypatch.setattr(w, "setup", lambda *_: w.World(torch.device("cpu"), 0, 2))
    assert w.main(BASE) == 2 and "one process" in capsys.readouterr().err


@pytest.mark.gpu
def test_gpu_counts_and_factors_are_the_cpus():
    tokens, docs = text(0, 300, 20_000, 5)
    here, there = (w.count(tokens.to(d), docs.to(d), 300, 5, 5000, 50) for d in ("cpu", "cuda"))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there))
    M = w.dense(*here, 300).log1p().float()
    a, b = w.krylov_svd(M, M.T, 10, rounds=6), w.krylov_svd(M.cuda(), M.T.cuda(), 10, rounds=6)
    torch.testing.assert_close(a[1], b[1].cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_gpu_descends():
    write_text()
    assert w.main([*SGD, "--gpu", "--steps", "20"]) == 0
