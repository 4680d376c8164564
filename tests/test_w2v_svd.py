"""w2v_svd.py against posts 4122, 4208, 4216, 4233, its card's statements T1-T11, and plain oracles.

What all scripts do alike (resume, ranks, signals, a full disk, wrong input) is in test_habits.py.
"""

import importlib
import json
import math
import random
import runpy
import struct
import sys
import unicodedata
import warnings
import zipfile
from pathlib import Path

import ddpm
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import w2v_svd as w
from hypothesis import example, given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import w2v_arms  # noqa: E402
import w2v_counts  # noqa: E402
import w2v_map  # noqa: E402
import w2v_objective  # noqa: E402
import w2v_order  # noqa: E402

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
    net.out.data = draws(7, 4)
    starts = torch.tensor([0, 32])
    reach = torch.randint(1, 4, (2, w.SPAN))
    bags = model != "skipgram"
    c, near, weight = w.windows(tokens, docs, starts, 3, reach if bags else None)
    value, mass, _ = net(c, near, weight.double(), torch.arange(7)[None], 1)
    U, out, want, pairs = net.U, net.out, 0.0, 0.0
    for t in range(40):
        L = int(reach.flatten()[t]) if bags else 3
        around = [(s, 1.0 if bags else (4 - abs(s - t)) / 3) for s in range(40)
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


@pytest.mark.parametrize("loss", ["negative", "softmax"])
@pytest.mark.parametrize("model", ["skipgram", "cbow", "autoencoder"])
def test_the_gradient_by_hand_is_autograds(model, loss):
    """Of the value, in float64: the rows of words that come twice add up; two groups of negatives, or all words."""
    tokens, docs = text(4, 9, 120, 3)
    net = w.Word2Vec(9, 4, model, loss).double()
    net.U.data, net.out.data = draws(9, 4), draws(9, 4, seed=1)
    reach = torch.randint(1, 4, (4, w.SPAN)) if model != "skipgram" else None
    c, near, weight = w.windows(tokens, docs, torch.arange(4) * 32, 3, reach)
    negatives = torch.arange(9)[None] if loss == "softmax" else torch.tensor([[0, 3, 3], [8, 1, 0]])
    value, _, gradient = net(c, near, weight.double(), negatives, 5)
    want = torch.autograd.grad(value, [net.U, net.out])
    got = [torch.zeros(9, 4, dtype=f64) for _ in range(2)]
    for table, (at, rows) in zip((0, 1, 1), gradient):
        got[table].index_put_((at.flatten(),), rows.detach().flatten(0, 1), accumulate=True)
    torch.testing.assert_close(tuple(got), want)
    assert all(table.abs().min() > 0 for table in want)


@given(st.integers(2, 6), st.integers(1, 9), SEEDS)
def test_a_step_is_adagrads_with_one_sum_a_row(V, count, seed):
    """Word after word, float64: a sum of squares per row, at first 4, its rate lr / sqrt(sum); rows without a word stay."""
    net, g = w.Word2Vec(V, 3).double(), torch.Generator().manual_seed(seed)
    net.U.data, net.out.data, net.U_sum[0] = draws(V, 3), draws(V, 3, seed=1), 9.0
    tables = dict(U=net.U.detach().clone(), out=net.out.detach().clone())
    sums = dict(U=torch.tensor([9.0] + [4.0] * (V - 1), dtype=f64), out=torch.full((V,), 4.0, dtype=f64))
    parts = [(torch.randint(V, (1, count), generator=g), draws(1, count, 3, seed=seed + i)) for i in range(3)]
    for name, (at, rows) in zip(("U", "out", "out"), parts):
        for word in set(at[0].tolist()):
            row = rows[0, at[0] == word].sum(0)
            sums[name][word] += (row @ row) / 3
            tables[name][word] -= 0.1 * row / sums[name][word].sqrt()
    with torch.no_grad():
        net.learn(0.1, parts)
    for name in tables:
        torch.testing.assert_close(getattr(net, name).detach(), tables[name], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(getattr(net, f"{name}_sum"), sums[name])


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


@given(*TEXTS, st.integers(0, 200))
@example(0, 1, 1, 1, 5, 7)
def test_counts_are_the_brute_force_for_any_chunk(seed, V, length, docs, L, size):
    tokens, docs = text(seed, V, length, docs)
    want = brute(tokens.tolist(), docs.tolist(), V, L)
    i, j, n = w.count(tokens, docs, V, L, size)
    assert n.dtype == torch.int64 and (n > 0).all()
    key = i * V + j
    assert (key[1:] > key[:-1]).all()  # each cell once, by rows
    assert torch.equal(w2v_arms.dense(i, j, n, V), want.to(f64)) and torch.equal(want, want.T)
    runs = torch.bincount(docs).tolist()
    assert n.sum().item() == sum(2 * (r - d) * (L - d + 1) for r in runs for d in range(1, min(L, r - 1) + 1))


@pytest.mark.parametrize("V", [16383, 16384, 32767, 32768, 65536, 2**20])
def test_counts_of_the_last_words(V):
    """Where a pair's number and its weight just fill an int32, and where they need more."""
    tokens = torch.tensor([V - 1, V - 1, 0, V - 2], dtype=torch.int32)
    for L, far in ((1, []), (2, [(0, V - 1, 1), (V - 2, V - 1, 1)])):
        cells = [(0, V - 1, L), (0, V - 2, L), (V - 1, V - 1, 2 * L), *far]
        want = {}
        for a, b, n in cells:
            for at in {(a, b), (b, a)}:
                want[at] = want.get(at, 0) + n
        i, j, n = (part.tolist() for part in w.count(tokens, torch.zeros_like(tokens), V, L))
        assert dict(zip(zip(i, j), n)) == want and len(n) == len(want)


def test_a_cell_may_pass_int32():
    """One word, 2,500 times, 1,000 places wide: 2.1 billion."""
    tokens, L = torch.zeros(2500, dtype=torch.int32), 1000
    want = sum(2 * (2500 - d) * (L - d + 1) for d in range(1, L + 1))
    assert want > 2**31 and w.count(tokens, tokens, 1, L)[2].tolist() == [want]


@given(SEEDS, st.integers(1, 6))
def test_sparse_and_dense_are_one_matrix(seed, V):
    M = torch.randint(-1, 2, (V, V), generator=torch.Generator().manual_seed(seed)).float()
    i, j = torch.cartesian_prod(torch.arange(V), torch.arange(V)).T  # zeros among them
    S = w.sparse(i, j, M.flatten(), V)
    assert torch.equal(S.to_dense(), M) and len(S.values()) == (M != 0).sum()
    assert torch.equal(w2v_arms.dense(i, j, M.flatten(), V), M.double())


def test_pairs_are_counted_in_pieces_of_bounded_size(monkeypatch):
    """However wide the window is: at most `size` pairs and 2 L at once."""
    sizes, real = [], w.sort
    monkeypatch.setattr(w, "sort", lambda keys: sizes.append(len(keys)) or real(keys))
    tokens = torch.zeros(1000, dtype=torch.int32)
    for L in (1, 10):
        sizes.clear()
        i, j, n = w.count(tokens, tokens, 1, L, 2000)
        assert len(sizes) == {1: 1, 10: 10}[L] and max(sizes) <= 2000 + 2 * L


@pytest.mark.parametrize("by", ["side", "place"])
def test_counts_by_place_are_the_brute_force(by):
    V, L = 5, 3
    tokens, docs = text(2, V, 60, 3)
    where = 2 * L if by == "place" else 2
    want = torch.zeros(V, V * where, dtype=f64)
    for t in range(60):
        for s in range(60):
            if 0 < (d := abs(t - s)) <= L and docs[s] == docs[t]:
                at = (2 * (d - 1) if by == "place" else 0) + (s < t)
                want[tokens[t], tokens[s] * where + at] += L - d + 1
    i, j, n = w2v_order.count_by_place(tokens, docs, V, L, by)
    got = w2v_order.sparse(i.flip(0), j.flip(0), n.flip(0), (V, V * where)).to_dense()
    assert torch.equal(got.double(), want)
    together = want.view(V, V, where).sum(2)
    assert torch.equal(together, brute(tokens.tolist(), docs.tolist(), V, L).double())


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
    N = w2v_arms.dense(*w.count(tokens, docs, V, L), V) / L
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
    share = w2v_arms.dense(*w.count(far, torch.zeros_like(far), 3, 5), 3) / 5
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
    torch.testing.assert_close(w2v_arms.bag_gram(tokens, docs, V, L), want)


@given(SEEDS, st.integers(2, 6), st.integers(40, 100), st.integers(1, 4))
def test_windows_on_the_device_have_the_weights_that_the_svd_counts(seed, V, length, L):
    """All blocks of a text: T7's counts, cell by cell."""
    tokens, docs = text(seed, V, length, 3)
    starts = torch.arange(0, length, w.SPAN)
    centre, near, weight = w.windows(tokens, docs, starts, L, None)
    N = torch.zeros(V, V, dtype=f64)
    N.index_put_((centre[..., None].expand_as(weight), near[:, None].expand_as(weight)),
                 weight.double(), accumulate=True)
    torch.testing.assert_close(N, w2v_arms.dense(*w.count(tokens, docs, V, L), V) / L, rtol=1e-6, atol=1e-9)


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
    torch.testing.assert_close(second, w2v_objective.sgns_weight(N, n_w, P, k))
    if power == 1:
        p = N / N.sum()
        pmi = (p / (p.sum(1, keepdim=True) * p.sum(0))).log()
        torch.testing.assert_close(x.detach(), pmi - math.log(k))


def test_T5_the_net_trained_on_a_text_reaches_shifted_pmi():
    """Skip-Gram with negative sampling, n = V, all of the text and every word as a negative."""
    V, L, k = 4, 2, 3
    tokens, docs = text(5, V, 300, 1)
    N = w2v_arms.dense(*w.count(tokens, docs, V, L), V) / L
    net = w.Word2Vec(V, V).double()
    net.out.data = draws(V, V)
    starts = torch.arange(0, 300, w.SPAN)
    inputs = [x.double() if x.is_floating_point() else x
              for x in w.windows(tokens, docs, starts, L, None)]
    negatives = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3]])  # P = 3/8, 2/8, 1/8, 2/8 exactly
    minimise(net.parameters(), lambda: net(*inputs, negatives, k)[0], 3)
    P = torch.tensor([3, 2, 1, 2], dtype=f64) / 8
    want = w.sgns_optimum(N, N.sum(1, keepdim=True), P, k)
    torch.testing.assert_close((net.U @ net.out.T).detach(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5])
def test_T11_weighted_svd_has_the_least_error_that_its_weights_allow(weight):
    """PPMI of a text, factored with cells weighed by (n_w n_c)^(2 weight): no descent goes below it."""
    V, L, k = 9, 3, 2
    tokens, docs = text(7, 5, 500, 4)
    tokens = (tokens * draws(500, seed=1).abs().clamp(max=2)).int().clamp(max=V - 1)  # uneven counts
    N = brute(tokens.tolist(), docs.tolist(), V, L) / L
    n_w = N.sum(1)
    M = (N * n_w.sum() / (n_w[:, None] * n_w)).log().clamp(min=0)
    W = (n_w[:, None] * n_w) ** (2 * weight)
    left, s, right = w2v_arms.weighted_svd(M, n_w, weight, k, 30)
    error = (W * (M - left * s @ right.T) ** 2).sum().item()
    U, out = (draws(V, k, seed=i).requires_grad_() for i in (2, 3))
    least = minimise([U, out], lambda: (W / W.max() * (M - U @ out.T) ** 2).sum(), 5) * W.max().item()
    assert 0.999 * least < error < 1.0001 * least
    u, sigma, vh = torch.linalg.svd(M)
    plain = (W * (M - u[:, :k] * sigma[:k] @ vh[:k]) ** 2).sum().item()
    assert error < 0.98 * plain or not weight


@given(st.integers(2, 6), st.integers(1, 9), st.floats(-1, 1), SEEDS)
def test_sgns_objective_is_the_sum_over_all_cells_and_most_at_T5(V, k, bias, seed):
    N = counts(V, seed)
    P, n_w = w.negatives_law(N.sum(1), 0.75), N.sum(1)
    x = draws(V, 3, seed=seed) @ draws(3, V, seed=seed + 1) + bias
    want = sum(N[a, c] * math.log(1 / (1 + math.exp(-x[a, c])))
               + k * n_w[a] * P[c] * math.log(1 / (1 + math.exp(x[a, c]))) for a in range(V) for c in range(V))
    got = w2v_objective.sgns_objective(N, x, P, k).item()
    assert got == pytest.approx((want / N.sum()).item(), rel=1e-9)
    assert w2v_objective.sgns_objective(N, w.sgns_optimum(N, n_w[:, None], P, k), P, k) >= got


def test_a_word_without_a_pair_has_no_vector():
    """Its row of D_w^-1/2 N is 0: rounding noise must not be divided by nothing."""
    N = F.pad(counts(5), (0, 3, 0, 3)).float()
    left, s, _ = w.linear_skipgram(N, 7)
    assert left.abs().max() < 2 and (left * s)[5:].abs().max() < 1e-5
    names = [f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
    ids = torch.randint(64, (300, 8), generator=torch.Generator().manual_seed(0)).tolist()
    Path("t.txt").write_text("\n".join([" ".join(names[k] for k in line) for line in ids] + ["lone", "alone", "apart"] * 6))
    for k in (20, 67):
        assert w.main(f"--data t.txt --model linear-skipgram --sample 0 --dim {k} --out out/{k}".split()) == 0
        words, W = w.read_vectors(Path(f"out/{k}/vectors.bin"))
        size = dict(zip(words, W.norm(dim=1).tolist()))
        lone = [size.pop(word) for word in ("lone", "alone", "apart")]
        assert len(size) == 64 and max(lone) < 1e-3 and min(size.values()) > 0.01


def test_descent_on_counts_ends_where_the_softmax_can_go_no_lower():
    """T4: at full rank the least loss is the entropy of the contexts, given the word; Adam's net gets there."""
    N = counts(5)
    p = N / N.sum(1, keepdim=True)
    least = -sum(N[a, c] * math.log(p[a, c]) for a in range(5) for c in range(5)) / N.sum()
    assert w2v_counts.softmax_loss(N, w.softmax_optimum(N) + draws(5, 1)).item() == pytest.approx(least.item(), rel=1e-9)
    walk = w2v_counts.descent(lambda x: w2v_counts.softmax_loss(N, x), 5, 5, 0.03, 0)
    losses = [next(walk)[0] for _ in range(600)]
    assert losses[0] == pytest.approx(math.log(5), abs=1e-6) and least <= losses[-1] < least + 1e-4


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
    alone = F.pad(N, (0, 1, 0, 1))  # a word that has no pair at all
    got = w.pmi(alone, alone.sum(1, keepdim=True), w.negatives_law(alone.sum(0), 0.75), k)
    torch.testing.assert_close(got, F.pad(x, (0, 1, 0, 1)))


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


BARREN = dict(zeros=torch.zeros(50, 90), ones=torch.ones(40, 293), part=F.pad(torch.ones(80, 80), (0, 80, 0, 80)),
              whole=(draws(126, 3) @ draws(3, 294)).round(), blocks=torch.eye(5).repeat_interleave(40, 0),
              falls=torch.diag(10.0 ** -torch.arange(100)))


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("name", BARREN)
def test_krylov_svd_goes_on_where_a_matrix_has_no_more_directions(name, dtype):
    """A rank far below the space's columns, in numbers that may leave no rounding noise: all is orthonormal."""
    M = BARREN[name].to(dtype)
    k, small = min(M.shape), 200 * torch.finfo(dtype).eps
    u, s, v = w.krylov_svd(M, M.T, k)
    for basis in (u, v):
        torch.testing.assert_close(basis.T @ basis, torch.eye(k, dtype=dtype), rtol=0, atol=small)
    torch.testing.assert_close(u * s @ v.T, M, rtol=0, atol=small * max(1, s[0].item()))


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


def test_krylov_svd_projects_on_two_blocks_and_once_on_all(monkeypatch):
    """One QR a block is enough where the matrix has directions, and one at the end."""
    M, real, calls = planted((1 + torch.arange(600, dtype=f64)) ** -0.2)[0], torch.linalg.qr, []
    monkeypatch.setattr(torch.linalg, "qr", lambda *a, **k: calls.append(0) or real(*a, **k))
    w.krylov_svd(M, M.T, 60, rounds=18)
    assert len(calls) == 18 + 1


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


@given(st.lists(st.booleans(), min_size=3, max_size=6), st.sampled_from([0.0, 0.5, 1.0]), SEEDS)
def test_T10_w_plus_c_doubles_positive_directions_and_cancels_negative_ones(signs, p, seed):
    """W W' = 4 sum of l^2p q q' over the l > 0 alone, whatever LAPACK's signs; without plus over all l."""
    l = torch.tensor([(k + 1.0) * (1 if sign else -1) for k, sign in enumerate(signs)], dtype=f64)
    Q = torch.linalg.qr(draws(len(l), len(l), seed=seed)).Q
    left, s, right = w.truncated(Q * l @ Q.T, len(l))
    W = w.vectors(left, s, right, p, plus=True)
    want = 4 * (Q * l.clamp(min=0) ** (2 * p) * (l > 0)) @ Q.T
    torch.testing.assert_close(W @ W.T, want, rtol=0, atol=1e-8)
    W = w.vectors(left, s, right, p)
    torch.testing.assert_close(W @ W.T, Q * l.abs() ** (2 * p) @ Q.T, rtol=0, atol=1e-8)


# ---- 13: T8 ----

@given(st.floats(1e-6, 1e-2))
def test_T8_keep(t):
    f = torch.logspace(-7, 0, 200, dtype=f64)
    kept = w.keep(f, t)
    for x, a in zip(f.tolist(), kept.tolist()):
        assert a == pytest.approx(min(1, math.sqrt(t / x) + t / x))
    edge = t * (3 + math.sqrt(5)) / 2  # 2.618 t
    below, above = w.keep(torch.tensor([edge * 0.999, edge * 1.01], dtype=f64), t)
    assert below == 1 > above
    assert torch.equal(w.keep(f, 0.0), torch.ones_like(f))


def test_T8_a_word_stays_with_its_chance_and_gaps_close():
    """A text of three words, one of them rare: shares within 5 sigma; another seed drops others; 0 drops none."""
    rng = random.Random(0)
    lines = [[rng.choices("abc", [70, 29, 1])[0] for _ in range(50)] for _ in range(200)]
    Path("t.txt").write_text("\n".join(map(" ".join, lines)))
    whole = data("--data=t.txt", "--sample=0")
    assert whole[2].tolist() == ["abc".index(word) for line in lines for word in line]
    words, n, tokens, docs = data("--data=t.txt", "--sample=.05", "--seed=1")
    assert words == whole[0] and torch.equal(n, whole[1])  # counts are the whole text's
    for k in range(3):
        f = n[k].item() / 10_000
        share, p = (tokens == k).sum().item() / n[k].item(), min(1, math.sqrt(0.05 / f) + 0.05 / f)
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / n[k].item())
    stays = torch.rand(10_000, generator=w.generator("cpu", 1, 0, 8)) < w.keep(n / 10_000, 0.05)[whole[2].long()]
    assert torch.equal(tokens, whole[2][stays]) and torch.equal(docs, whole[3][stays])
    assert not torch.equal(tokens, data("--data=t.txt", "--sample=.05", "--seed=2")[2][:len(tokens)])


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


@given(st.integers(4, 12), SEEDS)
def test_analogies_by_loops_never_answer_with_a_question_word(V, seed):
    """By cosines: the rows are of very different lengths."""
    W = draws(V, 3, seed=seed) * draws(V, 1, seed=seed + 1).exp()
    q = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(seed + i))[:3] for i in range(5)])
    answers = w.analogies(W, q)
    U = (W / W.norm(dim=1, keepdim=True)).numpy()
    for (a, b, c), answer in zip(q.tolist(), answers.tolist()):
        def score(d):
            return float(U[d] @ U[b]) - float(U[d] @ U[a]) + float(U[d] @ U[c])
        best = max(score(d) for d in range(V) if d not in (a, b, c))
        assert answer not in (a, b, c) and score(answer) == pytest.approx(best, abs=1e-4)


def test_analogies_of_many_words_are_answered_in_pieces():
    """Of so many words that a piece has 8 questions: the same answers as one by one."""
    W, q = draws((1 << 24) // 8, 2).float(), torch.arange(30).view(10, 3)
    answers = w.analogies(W, q)
    assert [answers[k].item() for k in (7, 8)] == [w.analogies(W, q[k:k + 1]).item() for k in (7, 8)]


WORDS = "king queen man woman apple".split()
PLANE = torch.tensor([[1., 1, 0], [1, -1, 0], [0.2, 1, 0], [0.2, -1, 0], [0, 0, 1]])


def test_evaluate_reads_analogies_by_part_and_counts_what_it_cannot_ask():
    Path("q.txt").write_text("\ufeff: far off\nking man zebra x\n"
                             ": family\nMan king woman queen\nman king woman APPLE\n", "utf-8")
    score = w.evaluate(Path("q.txt"), WORDS, PLANE)
    assert (score["asked"], score["of"]) == (2, 3)
    assert score["right"] == score[": family"] == 0.5 and math.isnan(score[": far off"])


PAIRS = [("king", "queen", -1.5), ("king", "man", 9.5), ("man", "apple", 2e-1), ("king", "king", 10.0)]


@pytest.mark.parametrize("head", ["", "\ufeff", "# a comment\n", "Word 1{0}Word 2{0}Human (mean)\n"])
@pytest.mark.parametrize("apart", ["\t", " ", ",", "; "])
def test_evaluate_reads_pairs_and_counts_what_it_cannot_ask(head, apart):
    """However the columns stand apart, with a headline or a byte-order mark; negative scores count."""
    rows = [PAIRS[0], ("man", "zebra", 3.0), *PAIRS[1:]]
    body = "\n# within\n".join(apart.join(map(str, row)) for row in rows)
    Path("p.tsv").write_text(head.format(apart) + body, "utf-8")
    score = w.evaluate(Path("p.tsv"), WORDS, PLANE)
    assert (score["asked"], score["of"]) == (4, 5)
    order = [0.0, 1.2 / math.sqrt(2 * 1.04), 0.0, 1.0]  # the cosines
    ranks = [1.5, 3, 1.5, 4]
    assert sorted(order) == [0, 0, order[1], 1]
    assert score["spearman"] == pytest.approx(np.corrcoef(ranks, [1, 3, 2, 4])[0, 1])


def test_evaluate_takes_words_with_blanks_between_tabs_and_more_columns():
    Path("p.tsv").write_text("new york\tking\t1\tn\nking\tman\t9.5\tn\n")
    assert w.evaluate(Path("p.tsv"), [*WORDS, "new york"], torch.cat([PLANE, PLANE[:1]]))["asked"] == 2


@pytest.mark.parametrize("body, line", [
    ("a b 3\nnonsense here\n", "neither"), ("a b 3\nking man A 5\n", "neither"), ("a b 3\nking\tman\t3,5\n", "neither"),
    ("a b 3\nking man nan\n", "neither"), (": x\nking man woman queen\nking man 3\n", "neither"),
    ("zebra x 3\n", "no line"), ("", "no pairs"), ("king man 3\n: x\nking man woman queen\n", "or both")])
def test_evaluate_refuses_other_files(body, line):
    Path("bad.txt").write_text(body)
    with pytest.raises(w.UserError, match=line):
        w.evaluate(Path("bad.txt"), WORDS, PLANE)


def test_words_are_found_as_they_are_spelt_else_folded():
    """A capitalised vocabulary too; of those that fold alike the first, most frequent one."""
    find = w.finder(["the", "King", "\u00e9tude", "Paris", "KING", "paris"])
    asked = ["the", "THE", "King", "KING", "king", "E\u0301tude", "e\u0301tude", "Paris", "paris", "PARIS", "x", ""]
    assert [find(word) for word in asked] == [0, 0, 1, 4, 1, 2, 2, 3, 5, 3, -1, -1]


def test_unknown_words_raise():
    assert w.choose(["Queen", "apple"], WORDS).tolist() == [1, 4]
    with pytest.raises(w.UserError, match="unknown: zebra"):
        w.choose(["king", "zebra"], WORDS)


def test_words_to_show_are_the_common_ones_of_the_list_or_frequent_ones():
    assert w.choose([], [*WORDS, "film", "file"]).tolist() == [6, 5, 1]  # in SHOWN's order
    assert w.choose([], [f"w{k}" for k in range(100)]).tolist() == list(range(2, 10))


def test_neighbours_are_the_nearest_others():
    W = torch.tensor([[1., 0], [9, 1], [0, 1], [-1, -1]])
    cosine, near = w.neighbours(W, torch.tensor([0, 2]), 2)
    assert near.tolist() == [[1, 2], [1, 0]]
    assert cosine[0].tolist() == pytest.approx([9 / 82**0.5, 0]) and w.neighbours(W, near[0], 9)[1].shape == (2, 3)


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

def data(*argv):
    """load_data by the flags."""
    return w.load_data(w.parse_args(["--sample=0", *argv]), torch.device("cpu"), None)


def test_load_data_folds_drops_rare_words_and_keeps_a_stable_order():
    Path("t.txt").write_text("B a a\nb C, c'd e_e 7f\n\nÄ ä A\u0308 a b\n", "utf-8")
    words, n, tokens, docs = data("--data", "t.txt", "--min-count", "2")
    assert words == ["b", "a", "ä", "c", "e"] and n.tolist() == [3, 3, 3, 2, 2]
    assert tokens.tolist() == [0, 1, 1, 0, 3, 3, 4, 4, 2, 2, 2, 1, 0]
    assert docs.tolist() == [0] * 3 + [1] * 5 + [3] * 5
    assert data("--data", "t.txt", "--min-count", "2", "--vocabulary", "3")[0] == ["b", "a", "ä"]


@pytest.mark.parametrize("said, words", [
    ("हिन्दी में किताब", ["हिन्दी", "में", "किताब"]),  # vowel signs are marks
    ("ภาษาไทย ที่นี่", ["ภาษาไทย", "ที่นี่"]),
    ("de\u0301ja\u0300 vu", ["d\u00e9j\u00e0", "vu"]),  # composed
    ("İstanbul'da", ["i\u0307stanbul", "da"]),  # one word, though its capital has two code points in lower case
    ("\ufeffBOM soft\u00adhyphen zero\u200bwidth", ["bom", "softhyphen", "zerowidth"]),
    ("❤\ufe0fheart 1\ufe0f\u20e3 x²y", ["heart", "x", "y"]),
    ("\u0301 alone", ["alone"]), ("漢字、漢字", ["漢字", "漢字"]), ("a\x01b\rc", ["a", "b", "c"])])
def test_words_are_what_unicode_calls_letters_with_their_marks(said, words):
    Path("u.txt").write_text(said + " end end\n", "utf-8")
    got, _, tokens, _ = data("--data", "u.txt", "--min-count", "1")
    assert [got[k] for k in tokens.tolist()] == [*words, "end", "end"]
    find = w.finder(got)
    assert all(find(word.upper()) == got.index(word) for word in words if word.upper().lower() == word)


def test_members_of_a_zip_are_documents_of_their_own():
    with zipfile.ZipFile("t.zip", "w") as archive:
        for name in ("x.txt", "y.txt"):
            archive.writestr(name, "a b a b")  # no line end between them
    words, n, tokens, docs = data("--data", "t.zip", "--min-count", "1")
    assert words == ["a", "b"] and docs.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("body, flags, line", [
    ("a b\n", ["--min-count", "9"], "0 words come 9 times"), ("12 34 !\n", [], "0 words come 1 times"),
    ("a\nb\na\nb\n", [], "2 words .* no line has two"), ("a a a\n", [], "1 words come")])
def test_texts_without_pairs_are_refused_before_the_work(body, flags, line):
    Path("t.txt").write_text(body)
    with pytest.raises(w.UserError, match=line):
        data("--data", "t.txt", "--min-count", "1", *flags)


@pytest.mark.parametrize("said, told", [("我们去公园看花，他说今天天气很好。" * 20, True), ("我们 去 公园 看花 ， 他 说 今天 天气 很 好 。" * 20, False),
                                        ("a plain text with 很长的中文短语在里面 once or twice " * 9, False)])
def test_a_text_without_blanks_between_words_is_told(said, told, capsys):
    """Its clauses become words: vectors of them are good for nothing."""
    Path("zh.txt").write_text(said + "\n", "utf-8")
    data("--data", "zh.txt", "--min-count", "1")
    assert ("warning: --data zh.txt: words of 8 characters" in capsys.readouterr().out) == told


def test_prose_is_docstrings_and_comments():
    found = b" ".join(map(b"".join, w.PROSE.findall(b'x = 1  # one thing\n"""Two\nlines."""\ny = f(z)\n# end\n')))
    assert found.split() == [b"one", b"thing", b"Two", b"lines.", b"end"]


def test_a_files_prose_is_one_document(monkeypatch):
    files = [b'"""Two\nlines."""\nx = y\n# end\n', b'"""Two"""\n']
    monkeypatch.setattr(w, "load_text", lambda data, cache: files)
    words, n, tokens, docs = data("--min-count", "1")
    assert words == ["two", "lines", "end"] and tokens.tolist() == [0, 1, 2, 0]
    assert docs[0] == docs[1] == docs[2] < docs[3]


@given(st.lists(st.one_of(st.text(st.characters(exclude_characters="\0"), max_size=8), st.sampled_from(
    ["don\u2019t", "a\u00b2b", "\u0661\u0662", "\u0130x", "\u6f22\u5b57\u3001", "Z_9", "\x85", "\u2028", "\r", "\n"])),
    max_size=20))
def test_words_are_the_runs_of_letters_of_any_alphabet(parts):
    raw = "aa\nzz ".encode() + " ".join(parts).encode("utf-8", "replace") + b"\nlast last\xe6\xbc"  # cut within a letter
    Path("u.txt").write_bytes(raw)

    def plain(c):
        kind = unicodedata.category(c)
        return "" if kind == "Cf" or "\ufe00" <= c <= "\ufe0f" else c if kind in "Lu Ll Lt Lm Lo Mn Mc" else " "
    lines = [unicodedata.normalize("NFC", line.lower()) for line in raw.decode("utf-8", "replace").split("\n")]
    want = [[word for word in "".join(map(plain, line)).split() if word[0].isalpha()] for line in lines]
    words, n, tokens, docs = data("--data", "u.txt", "--min-count", "1")
    assert [[words[k] for k in tokens[docs == d].tolist()] for d in range(len(want))] == want
    assert n.sum() == sum(map(len, want))


def write_text_vectors(path, words, W, apart=" "):
    rows = [apart.join([word, *(f"{x:.6g}" for x in row)]) for word, row in zip(words, W.tolist())]
    path.write_text("\n".join([f"{len(W)} {W.shape[1]}", *rows]) + "\n", "utf-8")


@pytest.mark.parametrize("name", ["v.bin", "v.txt"])
def test_vectors_come_back_from_both_formats(name):
    words, W = ["a", "词", "\u00e9"], draws(3, 4).float()
    W[0] = torch.tensor(np.frombuffer(b"\n \n\n" * 4, np.float32).copy())  # blanks and line ends inside
    (w.write_vectors if name == "v.bin" else write_text_vectors)(Path(name), words, W)
    for other in (name, "v.vec", "v.TXT", "v"):  # what it is called does not matter
        Path(other).write_bytes(Path(name).read_bytes())
        got, back = w.read_vectors(Path(other))
        assert got == words
        torch.testing.assert_close(back, W, rtol=0 if name == "v.bin" else 1e-5, atol=0)
    Path("cut").write_bytes(Path(name).read_bytes()[:-1])  # no line end at the end
    torch.testing.assert_close(w.read_vectors(Path("cut"))[1], W, rtol=1e-5, atol=0)


def test_vectors_of_other_programs_are_read():
    """word2vec.c: no line ends between rows, or a broken word; fastText: a blank at a line's end."""
    body = b"".join(word + b" " + struct.pack("<2f", k, 1) for k, word in enumerate((b"a", b"\xffx", b"c")))
    Path("c.bin").write_bytes(b"3 2\n" + body)
    words, W = w.read_vectors(Path("c.bin"))
    assert words == ["a", "\ufffdx", "c"] and W.tolist() == [[0, 1], [1, 1], [2, 1]]
    Path("f.vec").write_bytes("2 3\nThe 1 2e-1 -3 \ncafé .5 4 5 \n".encode())
    words, W = w.read_vectors(Path("f.vec"))
    assert words == ["The", "café"] and W.tolist() == [[1, pytest.approx(0.2), -3], [0.5, 4, 5]]
    write_text_vectors(Path("t.tsv"), ["a", "b"], draws(2, 3), "\t")
    torch.testing.assert_close(w.read_vectors(Path("t.tsv"))[1], draws(2, 3).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("row, damaged", [
    ("a 1 2 3 4 5 6 7 8", "a 1 2 3 4 5 6 7"), ("a 1 2 3 4 5 6 7 8", "a 1,5 2,5 3,5 4 5 6 7 8"),
    ("a 1 2 3 4 5 6 7 8", "a nan 2 3 4 5 6 7 8")])
def test_a_text_whose_rows_are_damaged_is_not_taken_for_binary(row, damaged):
    """Long enough that eight float32 a word could be cut from its letters; the first row, or one in the middle."""
    for bad in (0, 7):
        lines = [damaged if k == bad else row for k in range(20)]
        Path("v.txt").write_text("\n".join(["20 8", *lines]) + "\n")
        with pytest.raises(w.UserError, match="word2vec's formats"):
            w.read_vectors(Path("v.txt"))


@pytest.mark.parametrize("body", [
    b"", b"2 3\na ", b"not a head\n", b"1 2\na 1 x\n", b"9 1\na 1\n", b"0 5\n", b"0 5\na 1 2 3 4 5\n", b"1 0\na\n",
    b"-1 -2\na 1 2\n", b"99999999999 300\na 1 2\n", b"1000000000 1000\na 1\n", b"2 3\na 1 2 3\nb 1\n",
    b"2 2\na 1 2 3\nb 1 2 3\n", b"3 2\na 1.000 2.000\nb 3.000 4.000\n", b"2 3\na 1 2 3\nb 1 2 3 4\n",
    b"2 2\na 1 2\nb 1 nan\n", b"2 2\na 1 2\n", b"a 1 2\nb 3 4\n",
    b"1 2\na " + struct.pack("<2f", 1, math.inf), b"2 2\na " + struct.pack("<2f", 1, 2) + b"b \0\0\0\0\0\0\0"])
def test_damaged_vectors_are_refused(body):
    for name in ("v.bin", "v.txt"):
        Path(name).write_bytes(body)
        with pytest.raises(w.UserError, match="word2vec's formats"):
            w.read_vectors(Path(name))


def test_no_damage_to_vectors_is_more_than_a_line():
    """Bytes changed, dropped, added at random: read, or refused, never anything else."""
    rng = random.Random(0)
    for name, write in (("v.bin", w.write_vectors), ("v.txt", write_text_vectors)):
        write(Path(name), ["ab", "词", "c"], draws(3, 4))
        whole, read = Path(name).read_bytes(), 0
        for _ in range(150):
            body = bytearray(whole)
            for _ in range(rng.randint(1, 3)):
                at = rng.randrange(len(body))
                body[at:at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
            Path(name).write_bytes(body)
            try:
                words, W = w.read_vectors(Path(name))
                assert len(words) == len(W) and W.isfinite().all()
                read += 1
            except w.UserError:
                pass
        assert 0 < read < 150


def test_pca_picture_puts_words_of_one_direction_side_by_side():
    W = torch.tensor([[5., 0, 0]] * 5 + [[0., 5, 0]])
    W = W + 0.1 * torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    picture = w2v_map.pca_picture(W, ["ab", "c", "d", "e", "f", "词"], torch.tensor([0] * 5 + [1]))
    assert picture.shape == (3, 900, 900) and picture.dtype == torch.uint8
    first, last = ((picture == w2v_map.COLOURS[g].to(torch.uint8)[:, None, None]).all(0).nonzero().double()[:, 1]
                   for g in (0, 1))  # along the principal direction
    assert len(first) and len(last) and (first.mean() - last.mean()).abs() > 500
    assert first.max() - first.min() < 200  # the five stay together, the sixth stands alone


# ---- whole runs, computed again naively ----

def write_text():
    """30 lines of phrases, 8 letters: a to g by falling counts, h rare."""
    rng = random.Random(0)
    phrases = ["a b c", "d e f", "g h", "a d", "b e a"]
    Path("t.txt").write_text("\n".join(" ".join(rng.choice(phrases) for _ in range(6)) for _ in range(30)))


def read_text(least=1, most=99):
    """Words by falling count, those of one count as they come; lines of their numbers, others left out."""
    lines = [line.split() for line in Path("t.txt").read_text().split("\n")]
    flat = [word for line in lines for word in line]
    words = sorted(dict.fromkeys(flat), key=lambda word: -flat.count(word))  # a stable sort
    words = [word for word in words if flat.count(word) >= least][:most]
    return words, [[words.index(word) for word in line if word in words] for line in lines]


def read_bin(path):
    """word2vec's binary format by struct alone."""
    head, body = Path(path).read_bytes().split(b"\n", 1)
    V, n = map(int, head.split())
    words, W, at = [], [], 0
    for _ in range(V):
        end = body.index(b" ", at)
        words.append(body[at:end].decode())
        W.append(struct.unpack(f"<{n}f", body[end + 1:end + 1 + 4 * n]))
        at = end + 1 + 4 * n + 1
    assert at == len(body)
    return words, np.array(W)


def counts_of(lines, V, L):
    """Expected counts, pair by pair: T7."""
    N = np.zeros((V, V))
    for line in lines:
        for a, x in enumerate(line):
            for b, y in enumerate(line):
                if 0 < abs(a - b) <= L:
                    N[x, y] += (L - abs(a - b) + 1) / L
    return N


def subsampled(lines, V, t, seed=1):
    """The lines without the words that T8's chances drop."""
    flat = sum(lines, [])
    f = np.bincount(flat, minlength=V) / len(flat)
    chance = np.minimum(1, np.sqrt(t / f) + t / f) if t else np.ones(V)
    draw = iter(torch.rand(len(flat), generator=w.generator("cpu", seed, 0, 8)).double().tolist())
    return [[word for word in line if next(draw) < chance[word]] for line in lines]


BASE = ["--data", "t.txt", "--min-count", "1", "--seed", "1", "--sample", "0"]
PPMI = dict(dim=4, window=5, min_count=1, vocabulary=99, sample=0.0, p=0.5, plus=False)


@pytest.mark.parametrize("changed", [
    {}, dict(dim=2), dict(dim=7), dict(window=2), dict(min_count=60), dict(vocabulary=5), dict(sample=0.05),
    dict(p=0.0), dict(p=1.0), dict(plus=True), dict(model="linear-skipgram"),
    dict(model="linear-skipgram", p=1.0, sample=0.05, window=3)], ids=str)
def test_the_closed_form_again_from_the_text(changed):
    """PPMI, or T2's matrix, pair by pair and by LAPACK: the vectors up to their signs, so all W W'."""
    write_text()
    o = PPMI | changed
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in changed.items() if name != "plus"]
    assert w.main([*BASE, "--dim=4", *flags, *["--plus"] * o["plus"]]) == 0
    words, lines = read_text(o["min_count"], o["vocabulary"])
    V = len(words)
    N = counts_of(subsampled(lines, V, o["sample"]), V, o["window"])
    n_w = N.sum(1)
    if "model" in o:
        M, back = N / np.sqrt(n_w)[:, None], np.sqrt(n_w)[:, None]
    else:
        back = 1
        with np.errstate(divide="ignore"):
            M = np.maximum(np.log(N * n_w.sum() / (n_w[:, None] * n_w)), 0) * N / (N + 1)
    u, s, vh = np.linalg.svd(M)
    k = min(o["dim"], V)
    want = (u[:, :k] / back + (vh[:k].T if o["plus"] else 0)) * s[:k] ** o["p"]
    got, W = read_bin("out/w2v_svd/vectors.bin")
    assert got == words and W.shape == (V, k)
    np.testing.assert_allclose(W @ W.T, want @ want.T, rtol=0, atol=5e-5 * (want @ want.T).max())
    log = [line.split(",") for line in Path("out/w2v_svd/log.csv").read_text().splitlines()]
    assert log[0] == "step items rate elapsed".split() and [row[:2] for row in log[1:]] == [["30", "30"]]


SGD = dict(model="skipgram", loss="negative", batch_size=64, shared_negatives=8, window=2, dim=4, negative=5,
           lr=0.1, sample=0.0, steps=5, seed=1, plus=False, min_count=1, vocabulary=99)


def naive_rows(o, U, out, lines, blocks, negatives, reach):
    """The summed loss of the centres in `blocks` of 32 places, word by word, in float64, and its gradient: a row for
    each place that is looked at from a block, for each negative of a block (with the softmax, for each word).
    """
    flat = [(word, line, at) for line in lines for at, word in enumerate(line)]
    first = [t - at for t, (_, _, at) in enumerate(flat)]  # where the line of a place begins
    value, bags, seen = 0.0, o["model"] != "skipgram", {}

    def row(kind, table, word, *key):
        return seen.setdefault((kind, word, *key), table[word].clone().requires_grad_())
    for b, block in enumerate(blocks):
        for place, (word, line, at) in enumerate(flat[32 * block:32 * block + 32]):
            L, start = int(reach[b, place]) if bags else o["window"], first[32 * block + place]
            around = [(line[c], start + c, 1.0 if bags else (L - abs(c - at) + 1) / L)
                      for c in range(len(line)) if 0 < abs(c - at) <= L]
            if not around:
                continue
            own = (word, start + at, 1.0)
            h = sum(row("U", U, x, b, t) for x, t, _ in (around if bags else [own]))
            drawn = list(enumerate(negatives[b]))
            for target, t, weight in [own] if o["model"] == "cbow" else around:
                score = row("aim", out, target, b, t) @ h
                if o["loss"] == "softmax":
                    every = torch.stack([row("negative", out, x) for x in range(len(out))])
                    value = value - weight * (score - (every @ h).logsumexp(0))
                else:
                    others = sum(F.logsigmoid(-row("negative", out, x, b, j) @ h) for j, x in drawn)
                    value = value - weight * (F.logsigmoid(score) + others * o["negative"] / len(drawn))
    grads = torch.autograd.grad(value, list(seen.values()))
    return value.item(), [(kind, word, grad) for (kind, word, *_), grad in zip(seen, grads)]


@pytest.mark.parametrize("changed", [
    {}, dict(model="cbow"), dict(model="autoencoder"), dict(loss="softmax"), dict(sample=0.05),
    dict(model="cbow", sample=0.02), dict(window=3, negative=2, shared_negatives=5),
    dict(lr=0.3, batch_size=96, dim=3), dict(plus=True), dict(seed=2), dict(vocabulary=6)], ids=str)
def test_descent_again_naively(changed):
    """Five steps: the same weights by plain loops over the text, Adagrad's rule row by row, a rate that falls to zero."""
    write_text()
    o = SGD | changed
    unused = {"plus"} | ({"negative", "shared_negatives"} if o["loss"] == "softmax" else set())
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in o.items() if name not in unused]
    assert w.main(["--data", "t.txt", *flags, *["--plus"] * o["plus"]]) == 0
    words, lines = read_text(1, o["vocabulary"])
    V, law = len(words), np.cumsum(np.bincount(sum(lines, [])) ** 0.75)
    lines = subsampled(lines, V, o["sample"], o["seed"])
    torch.manual_seed(o["seed"])
    U, out = ((torch.rand(V, o["dim"]) - 0.5) / o["dim"]).double(), torch.zeros(V, o["dim"], dtype=f64)
    sums, high = {"U": np.full(V, 4.0), "out": np.full(V, 4.0)}, o["lr"] if o["model"] == "skipgram" else o["lr"] / 2
    blocks, a_step, order = math.ceil(sum(map(len, lines)) / 32), o["batch_size"] // 32, []
    for epoch in range(9):
        order += torch.randperm(blocks, generator=w.generator("cpu", o["seed"], epoch, 9)).tolist()
    for step in range(o["steps"]):
        g = w.generator("cpu", o["seed"], step)
        reach = torch.randint(1, o["window"] + 1, (a_step, 32), generator=g)
        draw = torch.rand(a_step, o["shared_negatives"], generator=g).double().numpy()
        negatives = [[next(x for x in range(V) if d * law[-1] <= law[x]) for d in row] for row in draw]
        here = order[step * a_step:(step + 1) * a_step]
        _, rows = naive_rows(o, U, out, lines, here, negatives, reach)
        for kind, W in (("U", U), ("aim", out), ("negative", out)):
            part, total = [(word, row) for k, word, row in rows if k == kind], sums["U" if kind == "U" else "out"]
            for word in {word for word, _ in part}:
                row = sum(row for other, row in part if other == word)
                total[word] += row.square().mean().item()
                W[word] -= high * (1 - step / o["steps"]) * row / math.sqrt(total[word])
    state = torch.load("out/w2v_svd/ckpt.pt", weights_only=True)
    assert state["step"] == o["steps"]
    for name, table in (("U", U), ("out", out)):
        torch.testing.assert_close(state["model"][name].double(), table, rtol=2e-3, atol=2e-5)
        np.testing.assert_allclose(state["model"][f"{name}_sum"], sums[name], rtol=1e-4)
    got, W = read_bin("out/w2v_svd/vectors.bin")
    want = state["model"]["U"] + (state["model"]["out"] if o["plus"] else 0)
    assert got == words and np.array_equal(W, want.double().numpy())
    rows = [line.split(",") for line in Path("out/w2v_svd/log.csv").read_text().splitlines()]
    assert rows[0] == "step items rate elapsed loss lr".split() and [row[0] for row in rows[1:]] == ["1", "5"]
    assert float(rows[-1][1]) == 5 * o["batch_size"]


def test_the_loss_that_is_logged_is_a_mean_per_pair():
    """(k + 1) log 2 at first, when all scores are 0; log V with the softmax; and the rate at each line."""
    write_text()
    for loss, want in (("negative", 4 * math.log(2)), ("softmax", math.log(8))):
        for model in ("skipgram", "cbow", "autoencoder"):
            out = f"{model}_{loss}"
            assert w.main([*BASE, f"--model={model}", f"--loss={loss}", "--steps=1", "--lr=0.02", f"--out={out}",
                           *["--negative=3"] * (loss == "negative")]) == 0
            row = Path(out, "log.csv").read_text().splitlines()[1].split(",")
            assert float(row[4]) == pytest.approx(want, rel=1e-5)
            assert float(row[5]) == (0.02 if model == "skipgram" else 0.01)


def test_the_report_has_eight_neighbours_of_each_word():
    Path("t.txt").write_text("\n".join(f"{a}x {b}y" for a in "abcdefgh" for b in "abcdefgh" if (ord(a) * ord(b)) % 3))
    assert w.main(["--data=t.txt", "--min-count=1", "--dim=3", "--sample=0", "--window=1"]) == 0
    rows = json.loads(Path("out/w2v_svd/metrics.json").read_text())["neighbours"]
    assert rows and {len(row) for row in rows.values()} == {8}


def test_epochs_are_passes_over_the_text_where_steps_are_none():
    write_text()
    T = sum(map(len, read_text()[1]))
    for model, flags, steps in (("cbow", ["--epochs=2.5"], math.ceil(2.5 * T / 64)), ("skipgram", ["--epochs=0.1"], 1),
                                ("ppmi", [], 30), ("ppmi", ["--steps=2"], 2)):
        out = f"{model}{steps}"
        assert w.main([*BASE, f"--model={model}", "--batch-size=64", f"--out={out}", *flags]) == 0
        assert json.loads(Path(out, "metrics.json").read_text())["step"] == steps


def test_what_cannot_be_learnt_is_said(capsys):
    """One step leaves U where it was, and a matrix of eight words has eight numbers a word: a warning, else none."""
    write_text()
    for flags, warned in (("--model=skipgram --epochs=0.01", "one step moves no word vector"), ("--model=skipgram --steps=2", ""),
                          ("--dim=9", "--dim 9: 8 words have no more than 8"), ("--dim=8", ""), ("--dim=9 --steps=1", "--dim 9"),
                          ("--model=cbow --dim=9 --steps=2", "")):
        assert w.main([*BASE, *flags.split()]) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
        assert len(said) == bool(warned) and all(warned in line for line in said)


def test_the_bare_run_of_descent_goes_on_to_its_own_last_step():
    """The number of steps that --epochs gave is in the checkpoint: --resume of it makes the report again."""
    write_text()
    assert w.main([*BASE, "--model=skipgram", "--epochs=0.3", "--batch-size=64"]) == 0
    first = Path("out/w2v_svd/metrics.json").read_text()
    Path("out/w2v_svd/metrics.json").unlink()
    assert w.main(["--resume"]) == 0
    again, first = json.loads(Path("out/w2v_svd/metrics.json").read_text()), json.loads(first)
    assert all(again[k] == first[k] for k in first if "seconds" not in k) and again["step"] > 1


@pytest.mark.parametrize("model", ["ppmi", "cbow"])
def test_the_report_again_from_vectors_bin(model, capsys):
    """Neighbours and scores, by plain loops from the file; --query says the same of other words."""
    write_text()
    Path("s.txt").write_text("a b 9\nz a 3\nd e 8\nA d -1\nb g 2\n")
    Path("q.txt").write_text(": z\na b z c\n: x\na b d e\nb a e d\n: y\nz a b c\na b c d\n")
    flags = ["--dim=5", "--window=2", f"--model={model}", "--batch-size=64", "--steps=20"]  # cosines 3e-4 apart
    assert w.main([*BASE, *flags, "--eval", "s.txt", "q.txt"]) == 0
    out, said = Path("out/w2v_svd"), capsys.readouterr().out
    names = {"log.csv", "vectors.bin", "metrics.json"}
    assert {p.name for p in out.iterdir()} == names | ({"ckpt.pt"} if model == "cbow" else set())
    words, W = read_bin(out / "vectors.bin")
    unit = W / np.linalg.norm(W, axis=1, keepdims=True)
    cosine = unit @ unit.T
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["neighbours"]) == words  # none of SHOWN is there: the most frequent ones
    for word in words:
        k = words.index(word)
        others = sorted((j for j in range(len(words)) if j != k), key=lambda j: -cosine[k, j])
        got = metrics["neighbours"][word]
        assert [name for name, _ in got] == [words[j] for j in others]
        np.testing.assert_allclose([x for _, x in got], cosine[k, others], atol=1e-5)
        assert f"{word}  " + "  ".join(f"{words[j]} {x:.2f}" for j, (_, x) in zip(others, got)) in said

    def rank(x):
        return [sum(b < a for b in x) + (sum(b == a for b in x) - 1) / 2 for a in x]
    pairs = [(words.index(a), words.index(b), s)
             for a, b, s in (("a", "b", 9), ("d", "e", 8), ("a", "d", -1), ("b", "g", 2))]
    rho = np.corrcoef(rank([cosine[a, b] for a, b, _ in pairs]), rank([s for *_, s in pairs]))[0, 1]
    scores = metrics["scores"]["s.txt"]
    assert (scores["asked"], scores["of"]) == (4, 5) and scores["spearman"] == pytest.approx(rho)
    right = []
    for question in ("abde", "baed", "abcd"):
        a, b, c, d = (words.index(x) for x in question)
        score = cosine[b] - cosine[a] + cosine[c]
        score[[a, b, c]] = -9
        right.append(float(score.argmax() == d))
    scores = metrics["scores"]["q.txt"]
    assert scores == {"asked": 3, "of": 5, "right": pytest.approx(sum(right) / 3),
                      ": x": pytest.approx(sum(right[:2]) / 2), ": y": right[2], ": z": None}
    T = sum(map(len, read_text()[1]))
    facts = dict(words=T, sampled=T, vocabulary=8, model=model, seed=1, step=20)
    assert metrics | facts == metrics and 0 <= metrics["read_seconds"] < 60 and 0 <= metrics["train_seconds"] < 60
    assert f"{T} words, 8 of them different; --sample leaves {T}" in said
    assert f"s.txt: asked 4,  of 5,  spearman {round(rho, 3)}\n" in said
    assert f"q.txt: asked 3,  of 5,  right {round(sum(right) / 3, 3)},  : z nan,  : x " in said
    write_text_vectors(Path("v.txt"), words, W)
    for flags in ([], ["--vectors", "v.txt"], ["--out", str(out)]):
        assert w.main([*flags, "--query", "b", "H", "--eval", "s.txt", "q.txt"]) == 0
        again = capsys.readouterr().out
        assert again.splitlines() == [line for line in said.splitlines()
                                      if line.lstrip()[:2] in ("b ", "h ") or "asked" in line]


def test_query_reads_the_newest_run():
    write_text()
    assert w.main([*BASE, "--dim=3"]) == 0 and w.main([*BASE, "--dim=2"]) == 0
    assert read_bin("out/w2v_svd/vectors.bin")[1].shape[1] == 3
    assert read_bin("out/w2v_svd.1/vectors.bin")[1].shape[1] == 2
    opened, real = [], w.read_vectors
    w.read_vectors = lambda path: opened.append(path) or real(path)
    try:
        assert w.main(["--query", "a"]) == 0 and w.main(["--query", "a", "--out", "out/w2v_svd"]) == 0
    finally:
        w.read_vectors = real
    assert opened == [Path("out/w2v_svd.1/vectors.bin"), Path("out/w2v_svd/vectors.bin")]


def test_the_same_seed_gives_the_same_bits_and_another_one_or_another_round_others():
    """On a text where 2 rounds of the SVD are not all of it."""
    g = torch.Generator().manual_seed(0)
    lines = torch.randint(80, (300, 12), generator=g).tolist()
    Path("t.txt").write_text("\n".join(" ".join(chr(97 + k // 9) + chr(97 + k % 9) for k in line) for line in lines))
    bodies = []
    for out, seed, rounds in (("x", 1, 2), ("y", 1, 2), ("z", 2, 2), ("w", 1, 3)):
        flags = ["--sample=0", "--dim=5", f"--steps={rounds}", f"--seed={seed}"]
        assert w.main(["--data=t.txt", *flags, "--out", out]) == 0
        bodies.append(Path(out, "vectors.bin").read_bytes())
    assert bodies[0] == bodies[1] != bodies[2] and bodies[3] not in bodies[:3]


@pytest.mark.parametrize("loss", ["negative", "softmax"])
def test_descent_reaches_what_T4_and_T5_say(loss):
    """Skip-Gram on a text comes within 10 % of the least there is at full rank, and not below."""
    write_text()
    flags = ["--steps=300", "--lr=0.5", "--batch-size=512", "--dim=8", "--window=2"]
    flags += ["--shared-negatives=64"] * (loss == "negative")
    assert w.main([*BASE, "--model=skipgram", f"--loss={loss}", *flags]) == 0
    last = float(Path("out/w2v_svd/log.csv").read_text().splitlines()[-1].split(",")[4])  # a mean over some steps
    words, lines = read_text()
    N = torch.from_numpy(counts_of(lines, 8, 2))
    if loss == "softmax":
        least = -(N * w.softmax_optimum(N).clamp(min=-99)).sum() / N.sum()
    else:
        n = torch.tensor(np.bincount(sum(lines, [])) ** 0.75)
        x = w.sgns_optimum(N, N.sum(1, keepdim=True), n / n.sum(), 5).clamp(min=-99)
        least = -w2v_objective.sgns_objective(N, x, n / n.sum(), 5)
    assert 0.98 * least < last < 1.1 * least


@pytest.mark.parametrize("model", ["skipgram", "cbow"])
def test_descent_as_it_is_finds_topics(model):
    """Two topics of 20 words, 3,000 lines of 10 words of one of them: no flag need be tuned for that."""
    g = torch.Generator().manual_seed(0)
    topic = torch.randint(2, (3000, 1), generator=g) * 20
    lines = (topic + torch.randint(20, (3000, 10), generator=g)).tolist()
    Path("t.txt").write_text("\n".join(" ".join(chr(97 + k // 20) + chr(97 + k % 20) for k in line) for line in lines))
    assert w.main(["--data", "t.txt", "--model", model, "--dim", "20"]) == 0
    words, W = w.read_vectors(Path("out/w2v_svd/vectors.bin"))
    near = w.neighbours(W, torch.arange(40), 1)[1][:, 0].tolist()
    assert len(words) == 40 and sum(words[k][0] == word[0] for k, word in zip(near, words)) >= 38


def test_defaults_are_those_that_the_pages_numbers_were_measured_with():
    """A changed default moves every number on the page: change it here, and measure again."""
    args = vars(w.parse_args([]))
    assert {name: args[name] for name in args["config"]} == SGD | PPMI | dict(sample=1e-3,
        data="python", steps=0, batch_size=1024, shared_negatives=32, seed=0, model="ppmi", dim=100, min_count=5,
        vocabulary=100_000, epochs=5.0, window=5, lr=0.4)
    on_gpu = vars(w.parse_args(["--gpu"]))
    assert {name: on_gpu[name] for name in args["config"] if on_gpu[name] != args[name]} == dict(
        data="text8", batch_size=8192, dim=300)
    assert args["rank"] == 10 and args["save_every"] == 500 and on_gpu["save_every"] == 2000


# ---- what users bring ----

@pytest.mark.parametrize("argv", ["--window 1000", "--model skipgram --batch-size 32 --lr 0.1", "--resume --epochs 5"])
def test_flags_at_their_limits_go(argv):
    w.check_flags(w.parse_args(argv.split()))


@pytest.mark.parametrize("argv, line", [
    ([*BASE, "--min-count", "9999"], "0 words come 9999 times"),
    ([*BASE, "--sample", "1e-9"], "of those that --sample leaves no line has two"),
    ([*BASE, "--model", "skipgram", "--batch-size", "40"], "multiple of 32"),
    ([*BASE, "--window", "1001"], "at most 1000"),
    (["--lr", "0.1", "--model", "linear-skipgram"], "--lr: is not for --model linear-skipgram"),
    (["--loss", "softmax"], "--loss: is not for --model ppmi"),
    (["--p", "0", "--model", "cbow"], "--p: is not for --model cbow"),
    (["--loss", "softmax", "--model", "cbow", "--shared-negatives", "8"], "--shared-negatives: is not for --loss softmax"),
    (["--loss", "softmax", "--model", "skipgram", "--negative", "5"], "--negative: is not for --loss softmax"),
    (["--negative", "5"], "--negative: is not for --model ppmi"),
    ([*BASE, "--p", "1e9"], "too large for float32"),
    (["--query", "a"], "vectors.bin"),
    (["--vectors", "none.bin"], "none.bin: No such file"),
    (["--query", "zebra", "--vectors", "v.txt"], "unknown: zebra"),
    (["--new-words", "t.txt"], "t.txt: line 1: not a word, its count"),
    (["--new-words", "t.txt", "--query", "a"], "--query: is not for --new-words"),
    ([*BASE, "--rank", "3"], "--rank: is for --new-words"),
    (["--new-words", "few.txt"], "too few words"),
    (["--vectors", "t.txt"], "word2vec's formats"),
    ([*BASE, "--eval", "bytes.txt"], "bytes.txt: not UTF-8"),
    ([*BASE, "--eval", "none.txt"], "none.txt: No such file"),
    ([*BASE, "--eval", "t.txt"], "--eval t.txt: "),
    ([*BASE, "--eval", "strange.tsv"], "strange.tsv: no line of it can be asked"),
    (["--new-words", "bytes.txt"], "bytes.txt: not UTF-8"),
])
def test_wrong_input_is_one_line_before_the_work(argv, line, capsys):
    write_text()
    Path("bytes.txt").write_bytes(b"\x80\xff")
    Path("strange.tsv").write_text("zebra\tgnu\t3\n")
    Path("few.txt").write_text("ab 100\ncd 500\n")
    Path("v.txt").write_text("1 2\na 1 2\n")
    assert w.main(argv) == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1
    assert line.startswith("too large") or not Path("out").exists()


@pytest.mark.parametrize("argv", [["--dim", "1"], ["--vocabulary", "1"], ["--window", "0"],
                                  ["--negative", "0"], ["--loss", "x"]])
def test_flags_beyond_their_least_value_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        w.main(argv)
    assert stop.value.code == 2 and argv[0] in capsys.readouterr().err


def test_two_words_and_more_numbers_than_words_will_do():
    Path("t.txt").write_text("a b a\n")
    assert w.main(["--data=t.txt", "--min-count=1", "--sample=0"]) == 0
    assert read_bin("out/w2v_svd/vectors.bin")[1].shape == (2, 2)


def test_resume_refuses_another_text_and_goes_on_with_one_that_moved(capsys):
    write_text()
    assert w.main([*BASE, "--model=skipgram", "--steps=2"]) == 0
    Path("moved.txt").write_text(Path("t.txt").read_text())
    assert w.main(["--resume", "--steps=3", "--data=moved.txt"]) == 0
    for other in (Path("t.txt").read_text().replace("a", "x", 1), "one\n"):  # as many words; too few to learn from
        Path("t.txt").write_text(other)
        capsys.readouterr()
        assert w.main(["--resume", "--steps=4", "--data=t.txt"]) == 2
        assert "--data t.txt: is not the text" in capsys.readouterr().err


def test_resume_says_why_there_is_nothing_to_resume_after_an_svd(capsys):
    """Not where a run of steps left its checkpoint beside it."""
    write_text()
    assert w.main(BASE) == 0 and capsys.readouterr()
    for flags in (["--resume"], ["--resume", "--out=out/w2v_svd"], ["--resume", "--steps=40"]):
        assert w.main(flags) == 2
        err = capsys.readouterr().err
        assert "out/w2v_svd has the vectors of an SVD, which has no steps" in err and err.count("\n") == 1
    assert w.main([*BASE, "--model=skipgram", "--steps=2"]) == 0
    assert w.main(["--resume", "--steps=3"]) == 0 and w.main(["--query", "a"]) == 0


def test_batches_are_whole_blocks_on_every_rank(monkeypatch):
    """Of models that descend; the closed ones have none."""
    monkeypatch.setattr(w, "RANKS", 2)
    for model in w.MODELS:
        w.check_flags(w.parse_args(["--model", model, "--batch-size=64"]))
        if model not in ("ppmi", "linear-skipgram"):
            with pytest.raises(w.UserError, match="multiple of 64"):
                w.check_flags(w.parse_args(["--model", model, "--batch-size=96"]))


def test_a_text_without_a_pattern_is_refused(capsys):
    """Every pair as often as chance has it: all PMI is 0, and no vectors are left."""
    Path("t.txt").write_text("a a\nb b\na b\nb a\n")
    assert w.main(["--data=t.txt", "--min-count=1", "--sample=0", "--window=1"]) == 2
    assert "vectors of nothing" in capsys.readouterr().err


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_new_words_from_a_list(mark, capsys):
    Path("d.txt").write_text(mark + "".join(f"{a}{b} {100 + i}\n" for i, a in enumerate("神魔") for b in "兽界龙灵术"
                                            if a + b != "神术") + "神 5000\n罕见 3\n神见 99\n", "utf-8")
    assert w.main(["--new-words", "d.txt", "--rank", "1"]) == 0
    said = capsys.readouterr().out.split()
    M = np.array([[100.0, 100, 100, 100, 0], [101, 101, 101, 101, 101]])
    u, s, vh = np.linalg.svd(M)
    assert said[0] == "神术" and len(said) == 2 and float(said[1]) == pytest.approx(u[0, 0] * s[0] * vh[0, 4], abs=0.06)


@pytest.mark.parametrize("name, flags", [
    ("w2v_arms", ["--eval", "s.txt"]), ("w2v_objective", []), ("w2v_order", ["--eval", "s.txt"]),
    ("w2v_sgns", ["--eval", "s.txt"]), ("w2v_epochs", ["--choose", "s.txt", "--report", "t.tsv", "--most", "2"]),
    ("w2v_counts", ["--choose", "s.txt", "--report", "t.tsv", "--most", "16", "--gain", "-2"]),
    ("w2v_defaults", ["--choose", "s.txt", "--report", "t.tsv", "--windows", "2"])])
def test_experiments_run(name, flags, capsys):
    write_text()
    for name_of in ("s.txt", "t.tsv"):
        Path(name_of).write_text("a b 9\nd e 8\na d 1\nb g 2\n")
    importlib.import_module(name).main("--data t.txt --min-count 1 --dim 3 --steps 2 --sample 0".split() + flags)
    said = capsys.readouterr().out
    assert len(said.splitlines()) > 8
    if name == "w2v_objective":  # no factorisation is above T5's optimum
        values = [float(line.rpartition(" ")[2]) for line in said.splitlines()
                  if line.startswith(("the most", "PPMI", "SGNS by"))]
        assert len(values) == 6 and values[0] == max(values)
    if name == "w2v_counts":  # each loss falls, from the softmax's log V and the other's (k + 1) log 2
        values = [float(line.split()[2]) for line in said.splitlines() if line.startswith(("softmax,", "negative,"))]
        assert len(values) == 8 and values[:4] == sorted(values[:4])[::-1] and values[4:] == sorted(values[4:])[::-1]


def test_arms_of_too_many_words_are_refused_before_the_work():
    Path("t.txt").write_text("\n".join(f"{a}{b}{c} a" for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyz"
                                       for c in "abcdefghijklmnopqrstuvwxyz"))
    with pytest.raises(w.UserError, match="17,577 words: .* --vocabulary"):
        w2v_arms.main(["--data=t.txt", "--min-count=1", "--sample=0", "--vocabulary=99999", "--eval", "s.txt"])


@pytest.mark.parametrize("command", ["w2v_arms --data nowhere --eval s.txt", "w2v_objective --data nowhere", "w2v_map --vectors nowhere",
                                     "w2v_order --data nowhere --eval s.txt", "w2v_sgns --data nowhere --eval s.txt",
                                     "w2v_defaults --data nowhere --choose s.txt --report t.tsv",
                                     "w2v_counts --data nowhere --choose s.txt --report t.tsv"])
def test_experiments_say_what_is_wrong_in_a_line(command, monkeypatch):
    name, *flags = command.split()
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SystemExit, match=f"^{name}.py: .*nowhere: [Nn]o such file"):
        runpy.run_path(Path(__file__).parent / "experiments" / f"{name}.py", run_name="__main__")


def test_the_map_shows_eight_words_and_the_five_nearest_to_each():
    words = [f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    W = draws(100, 6).float()
    w.write_vectors(Path("v.bin"), words, W)
    w2v_map.main(["--vectors", "v.bin", "--to", "map.png"])
    U = F.normalize(W, dim=1)
    near = [[k, *sorted(set(range(100)) - {k}, key=lambda j: -float(U[j] @ U[k]))[:5]] for k in range(2, 10)]
    picture = w2v_map.pca_picture(W[sum(near, [])], [words[k] for k in sum(near, [])], torch.arange(48) // 6)
    ddpm.write_png(Path("again.png"), picture)
    assert Path("map.png").read_bytes() == Path("again.png").read_bytes()


def test_the_svd_is_not_solved_in_tf32():
    """Whatever a GPU's networks may do."""
    torch.set_float32_matmul_precision("high")
    tokens, docs = text(0, 30, 500, 5)
    w.solve(w.parse_args(["--dim=4", "--steps=3"]), tokens, docs, 30)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.gpu
def test_gpu_counts_and_factors_are_the_cpus():
    tokens, docs = text(0, 300, 20_000, 5)
    here, there = (w.count(tokens.to(d), docs.to(d), 300, 5, 5000) for d in ("cpu", "cuda"))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there))
    M = w2v_arms.dense(*here, 300).log1p().float()
    a, b = w.krylov_svd(M, M.T, 10, rounds=6), w.krylov_svd(M.cuda(), M.T.cuda(), 10, rounds=6)
    torch.testing.assert_close(a[1], b[1].cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_gpu_descends():
    write_text()
    assert w.main([*BASE, "--model=skipgram", "--gpu", "--steps=20"]) == 0
