"""rope.py against posts 9403, 8265, 8397, 9708, and oracles written out here in float64."""

import json
import math
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import rope
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

SEEDS = st.integers(0, 2**31)
SIZES = st.integers(2, 9)
PLACES = st.integers(-1000, 1000)
THETAS = st.lists(st.floats(0, math.pi), min_size=1, max_size=6).map(
    lambda x: torch.tensor(x, dtype=torch.float64))
TINY = ("--data a.txt --width 16 --layers 1 --heads 2 --context 16 --batch-size 4 --eval-bytes 1024 "
        "--length 6 --samples 2 --warmup 2 --save-every 2").split()
ALL = "rope general sinusoidal learned alibi nope".split()


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(d, seed=0, det=None):
    Q = torch.linalg.qr(draws(d, d, seed=seed)).Q
    if det is not None and torch.linalg.det(Q) * det < 0:
        Q[:, 0] *= -1
    return Q


def series(A):
    """exp A by its power series at A / 2^k, squared k times: 9403 (2) read literally."""
    k = max(0, math.ceil(math.log2(float(A.abs().sum()) + 1e-300)) + 4)
    term = total = torch.eye(len(A), dtype=torch.float64)
    for j in range(1, 25):
        term = term @ A / (2**k * j)
        total = total + term
    for _ in range(k):
        total = total @ total
    return total


def turned(theta, n=1.0, d=None):
    """9403 (5) by hand: 2 x 2 blocks of cos and sin, and 1 for the last axis if d is odd."""
    d = d or 2 * len(theta)
    R = torch.eye(d, dtype=torch.float64)
    for i, t in enumerate(theta.tolist()):
        c, s = math.cos(n * t), math.sin(n * t)
        R[2 * i:2 * i + 2, 2 * i:2 * i + 2] = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return R


def lam(theta, d=None):
    """9403 (6) by hand."""
    d = d or 2 * len(theta)
    L = torch.zeros(d, d, dtype=torch.float64)
    for i, t in enumerate(theta.tolist()):
        L[2 * i, 2 * i + 1], L[2 * i + 1, 2 * i] = -t, t
    return L


def far(a, b):
    return float((a - b).detach().abs().max())


def n_(x):
    return torch.tensor(float(x), dtype=torch.float64)


# ---- 9403, the equations in their order ----

@given(THETAS, PLACES, PLACES)
def test_9403_1_5_8265_12_rotation_is_relative(theta, m, n):
    R = [rope.rotation(n_(k), theta) for k in (m, n, n - m)]
    assert far(R[0].T @ R[1], R[2]) < 1e-10  # angles up to 3e3 are off by 3e-13
    assert far(R[1], turned(theta, n)) < 1e-12


@given(SIZES, SEEDS, PLACES, PLACES)
def test_9403_1_2_4_any_skew_B_is_relative_and_in_SO_d(d, seed, m, n):
    B = rope.skew(draws(d, d, seed=seed))
    assert torch.equal(B, -B.T) and d and B.abs().max() > 0
    R = [rope.exp_rotation(n_(k), B) for k in (m, n, n - m)]
    assert far(R[0].T @ R[1], R[2]) < 1e-10
    assert far(R[1].T @ R[1], torch.eye(d)) < 1e-11
    assert abs(float(torch.linalg.det(R[1])) - 1) < 1e-10


@given(SIZES, SEEDS, st.floats(-4, 4))
def test_9403_2_exp_rotation_is_the_power_series(d, seed, n):
    B = rope.skew(draws(d, d, seed=seed))
    assert far(rope.exp_rotation(n_(n), B), series(n * B)) < 1e-11


@given(st.integers(1, 40), SIZES, SEEDS)
def test_9403_2_doubling_gives_every_power(length, d, seed):
    B = rope.skew(draws(2, d, d, seed=seed))
    R = rope.exp_powers(length, B)
    assert R.shape == (2, length, d, d) and torch.equal(R[:, 0], torch.eye(d).double().expand(2, d, d))
    for n in {0, length // 2, length - 1}:
        assert far(R[1, n], series(n * B[1])) < 1e-10
    assert R.shape == rope.exp_powers(length, B.float()).shape


@given(SIZES, SEEDS)
def test_9403_3_holds_to_the_second_order(d, seed):
    """For any B, skew or not: half the m and n, and what (3) leaves out falls by 8."""
    B = draws(d, d, seed=seed)
    B = B / torch.linalg.matrix_norm(B, 2)
    left = []
    for m, n in ((0.02, 0.03), (0.01, 0.015)):
        got = rope.exp_rotation(n_(m), B).T @ rope.exp_rotation(n_(n), B)
        left.append(far(got, series(m * B.T + n * B + m * n / 2 * (B.T @ B - B @ B.T))))
    assert left[0] < 1e-13 or 6 < left[0] / left[1] < 10.5


@given(SIZES, SEEDS, st.floats(0.1, 2))
def test_9403_4_only_skew_B_is_relative(d, seed, eps):
    """B + B^T of size eps: relativity is off by what the symmetric part does to R_1^T R_1 = R_0."""
    A, S = draws(d, d, seed=seed), draws(d, d, seed=seed + 1)
    S = S + S.T
    B = (A - A.T) / d + eps * S / torch.linalg.matrix_norm(S)
    R = rope.exp_rotation(n_(1), B)
    assert far(R.T @ R, rope.exp_rotation(n_(0), B)) > 0.01 * eps


@given(THETAS, st.floats(-50, 50))
def test_9403_6_7_exp_of_the_generator_is_the_rotation(theta, n):
    L = rope.generator_matrix(theta)
    assert torch.equal(L, lam(theta))
    assert far(series(n * L), rope.rotation(n_(n), theta)) < 1e-10


DEGENERATE = st.lists(st.sampled_from([0.0, 1e-15, 1e-13, 1e-12, 1e-9, 1e-4, 0.5, 1.0, 1.0, 2.0]), min_size=1, max_size=8)


@given(DEGENERATE, st.booleans(), SEEDS, st.sampled_from([1e-6, 1.0, 1e5]))
@example([1.0] * 8, False, 0, 1.0)
@example([0.0, 0.0], True, 0, 1.0)
@example([2.0, 1e-12, 1e-13, 1e-13, 1e-15, 0.0], True, 1, 1.0)
def test_9403_8_9_canonical_form_even_when_degenerate(values, odd, seed, scale):
    theta = scale * torch.tensor(values, dtype=torch.float64)
    d = 2 * len(theta) + odd
    Q = orthogonal(d, seed)
    B = Q @ lam(theta, d) @ Q.T
    B = (B - B.T) / 2
    P, got = rope.canonical(B)
    top = float(theta.max())
    assert P.shape == (d, d) and got.shape == (d // 2,) and P.dtype == torch.float64
    assert far(P.T @ P, torch.eye(d)) < 1e-12
    assert far(P @ lam(got, d) @ P.T, B) <= 1e-13 * d * top
    assert far(got, theta.sort(descending=True).values) <= 1e-14 * d * top
    assert got.min() >= 0 and torch.equal(got, got.sort(descending=True).values)
    assert all(t == 0 or t > 10 * d * 2.2e-16 * float(got.max()) for t in got.tolist())
    n = 3 / max(top, 1)
    assert far(P @ turned(got, n, d) @ P.T, series(n * B)) < 1e-11  # 9403 (9)


@given(st.integers(1, 70), SEEDS)
def test_9403_8_canonical_form_of_any_skew_matrix(d, seed):
    B = rope.skew(draws(d, d, seed=seed))
    P, theta = rope.canonical(B)
    assert far(P.T @ P, torch.eye(d)) < 1e-12 and far(P @ lam(theta, d) @ P.T, B) < 1e-12 * d
    spectrum = torch.linalg.eigvals(B).imag.sort(descending=True).values[:d // 2]
    assert far(theta, spectrum) < 1e-11 if d > 1 else len(theta) == 0


def test_9403_8_canonical_refuses_what_is_not_skew():
    for B in (torch.eye(3), draws(4, 4), torch.full((2, 2), math.nan)):
        with pytest.raises(ValueError, match="skew"):
            rope.canonical(B)


def scores(q, k, R):
    """q_m^T R_m^T R_n k_n by loops; R a function of the position."""
    R = [R(n) for n in range(len(q))]
    return torch.stack([torch.stack([(R[m] @ q[m]) @ (R[n] @ k[n]) for n in range(len(k))])
                        for m in range(len(q))])


@given(st.integers(2, 8), SEEDS)
def test_9403_10_P_goes_into_W_and_the_bias(d, seed):
    B = rope.skew(draws(d, d, seed=seed))
    x, W, b = draws(5, 7, seed=seed + 1), draws(2, d, 7, seed=seed + 2), draws(2, d, seed=seed + 3)
    P, theta = rope.canonical(B)
    folded = [rope.absorb(W[i], b[i], P) for i in (0, 1)]
    want = scores(x @ W[0].T + b[0], x @ W[1].T + b[1], lambda n: series(n * B))
    got = scores(*(x @ w.T + c for w, c in folded), lambda n: turned(theta, n, d))
    assert far(want, got) < 1e-11 * float(want.abs().max())
    assert far(want, scores(x @ folded[0][0].T + b[0], x @ folded[1][0].T + b[1],
                            lambda n: turned(theta, n, d))) > 1e-3  # the bias forgotten


@settings(max_examples=8)
@given(SEEDS)
def test_9403_10_11_what_commutes_with_P_folds_and_what_does_not_stays(seed):
    d = 8
    B = rope.skew(draws(3, d, d, seed=seed))
    q, k = draws(2, 3, 6, d, seed=seed + 1)
    got = rope.limits(q, k, B)
    forms = [rope.canonical(b) for b in B]

    def wrong(phi, keys, P_k):
        want, have = [], []
        for h, (P, theta) in enumerate(forms):
            want.append(scores(phi(q[h]), phi(keys[h]), lambda n: series(n * B[h])))
            have.append(scores(phi(q[h] @ P), phi(keys[h] @ P_k[h]), lambda n: turned(theta, n)))
        want, have = torch.stack(want), torch.stack(have)
        return far(want, have) / float(want.abs().max())

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()

    own, gain = [P for P, _ in forms], torch.tensor([0.5 + i / (d - 1) for i in range(d)])
    want = [wrong(lambda x: x, k, own), wrong(norm, k, own), wrong(lambda x: x.clamp(min=0), k, own),
            wrong(lambda x: norm(x) * gain, k, own), wrong(lambda x: x, [k[0]] * 3, [own[0]] * 3)]
    assert list(got.values()) == pytest.approx(want, rel=1e-4, abs=1e-10)
    assert max(want[:2]) < 1e-11 and min(want[2:]) > 0.01


@given(st.integers(2, 7), SEEDS, st.sampled_from([1, -1]), st.integers(0, 9), st.integers(0, 9))
def test_9403_powers_of_O_are_relative_and_det_minus_one_adds_a_parity(d, seed, det, m, n):
    O = orthogonal(d, seed, det)
    power = torch.linalg.matrix_power
    assert far(power(O, m).T @ power(O, n), power(O, n - m)) < 1e-11
    if det > 0:
        with pytest.raises(ValueError):
            rope.split_reflection(O)
        return
    O_plus, I_minus = rope.split_reflection(O)
    assert float(torch.linalg.det(O_plus)) == pytest.approx(1)
    assert far(I_minus @ I_minus, torch.eye(d)) < 1e-12 and abs(float(I_minus.trace()) - d + 2) < 1e-12
    assert far(power(O_plus, n) @ power(I_minus, n), power(O, n)) < 1e-10
    naive = torch.eye(d, dtype=torch.float64)
    naive[0, 0] = -1
    assert far(power(O @ naive, 2) @ naive @ naive, O @ O) > 1e-6  # the post's, at n = 2


@given(st.lists(st.sampled_from([-1.0, 1.0]), min_size=3, max_size=7).filter(lambda s: math.prod(s) < 0))
def test_9403_parity_with_repeated_eigenvalues(signs):
    Q = orthogonal(len(signs), len(signs))
    O = Q @ torch.diag(torch.tensor(signs, dtype=torch.float64)) @ Q.T
    O_plus, I_minus = rope.split_reflection(O)
    assert far(O_plus @ I_minus, I_minus @ O_plus) < 1e-12 and far(O_plus @ I_minus, O) < 1e-12


# ---- 8265: one dimension ----

def test_8265_11_thetas():
    assert rope.thetas(6).tolist() == pytest.approx([1, 10000 ** (-1 / 3), 10000 ** (-2 / 3)], rel=1e-15)
    assert rope.thetas(4, 100.0).tolist() == pytest.approx([1, 0.1])
    with pytest.raises(ValueError, match="even"):
        rope.thetas(5)


@given(THETAS, SEEDS, st.sampled_from(["interleaved", "half"]), st.booleans())
def test_8265_9_11_13_9403_6_complex_matrix_elementwise_and_exp_agree(theta, seed, layout, compiling):
    """Forward and gradient, by all roads, in both layouts."""
    d, L = 2 * len(theta), 4
    x = draws(2, 3, L, d, seed=seed).requires_grad_()
    g, at = draws(2, 3, L, d, seed=seed + 1), torch.arange(L) + seed % 1000
    order = rope.half_order(d) if layout == "half" else torch.arange(d)
    back = torch.argsort(order)
    R = torch.stack([series(float(n) * lam(theta))[order][:, order] for n in at])
    want = torch.einsum("lij,bhlj->bhli", R, x)
    grad = torch.autograd.grad(want, x, g)[0]
    cos, sin = rope.rotary_table(at, theta, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        y = rope.rotate(x, cos, sin, layout)
    assert y.shape == x.shape and far(y, want) < 1e-9
    assert far(torch.autograd.grad(y, x, g)[0], grad) < 1e-9
    z = torch.view_as_complex(x[..., back].unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * at[:, None] * theta)
    assert far(torch.view_as_real(z).flatten(-2)[..., order], want) < 1e-9  # 8265 (9)
    assert far(torch.stack([rope.rotation(n.double(), theta) for n in at])[:, order][:, :, order], R) < 1e-9


@given(st.integers(1, 8), SEEDS)
def test_8265_13_layouts_are_one_permutation_of_the_weight_rows(half, seed):
    d = 2 * half
    order = rope.half_order(d)
    assert order.tolist() == [*range(0, d, 2), *range(1, d, 2)]
    x, W = draws(5, 7, seed=seed), draws(2, d, 7, seed=seed + 1)
    cos, sin = rope.rotary_table(torch.arange(5), rope.thetas(d), torch.float64)
    q, k = (rope.rotate(x @ w.T, cos, sin) for w in W)
    qh, kh = (rope.rotate(x @ w[order].T, cos, sin, "half") for w in W)
    assert far(qh, q[:, order]) < 1e-12 and far(q @ k.T, qh @ kh.T) < 1e-11
    assert torch.equal(W[0][order][torch.argsort(order)], W[0])
    with pytest.raises(KeyError):
        rope.rotate(x, cos, sin, "quarter")


@given(SEEDS, st.sampled_from(["odd offset", "transposed", "every other", "odd rows", "expanded"]))
def test_8265_13_any_strides(seed, how):
    cos, sin = rope.rotary_table(torch.arange(4), rope.thetas(6), torch.float64)
    raw = draws(4, 4, 14, seed=seed)
    x = {"odd offset": raw[..., 1:7], "transposed": draws(1, 6, 4, seed=seed).mT, "every other": raw[..., :12:2],
         "odd rows": draws(1, 4, 7, seed=seed)[..., :6], "expanded": raw[0, :, :6].expand(3, 4, 6)}[how]
    want = torch.einsum("lij,blj->bli", torch.stack([turned(rope.thetas(6), n) for n in range(4)]), x)
    assert far(rope.rotate(x, cos, sin), want) < 1e-13


def test_8265_13_under_compile():
    """The compiled form is the eager one, forward and gradient, with the table made inside."""
    x = torch.randn(2, 5, 8, requires_grad=True)

    def f(x):
        return rope.rotate(x, *rope.rotary_table(torch.arange(5), rope.thetas(8)))
    g = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(g(x), f(x))
    torch.testing.assert_close(*(torch.autograd.grad(h(x).square().sum() + h(x)[0].sum(), x)[0] for h in (f, g)))


@given(THETAS, SEEDS, PLACES)
def test_8265_reversal_identity_and_norm(theta, seed, n):
    x = draws(2, 3, 2 * len(theta), seed=seed)
    there, back, zero = (rope.rotary_table(torch.tensor([k] * 3), theta, torch.float64) for k in (n, -n, 0))
    y = rope.rotate(x, *there)
    assert far(y.norm(dim=-1), x.norm(dim=-1)) < 1e-12 and far(rope.rotate(y, *back), x) < 1e-12
    assert torch.equal(rope.rotate(x, *zero), x)
    assert torch.equal(rope.rotation(n_(-n), theta), rope.rotation(n_(n), theta).T)
    assert torch.equal(rope.rotation(n_(0), theta), torch.eye(len(theta) * 2).double())


@given(st.integers(1, 64), st.floats(0, 5000))
def test_8265_15_16_decay_is_the_sum_of_partial_sums(half, distance):
    theta = [10000 ** (-i / half) for i in range(half)]
    sums = [abs(sum(complex(math.cos(distance * t), math.sin(distance * t)) for t in theta[:i]))
            for i in range(1, half + 1)]
    got = rope.decay(n_(distance), rope.thetas(2 * half))
    assert float(got) == pytest.approx(sum(sums) / half, rel=1e-9, abs=1e-9)


def test_8265_16_the_curve_of_the_post():
    got = rope.decay(torch.tensor([0, 1, 8, 32, 128, 256, 1024, 4096]).double(), rope.thetas(128))
    assert got.tolist() == pytest.approx([32.5, 31.5, 19.8, 13.4, 9.3, 6.5, 4.0, 4.9], abs=0.05)


# ---- precision ----

@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_table_is_right_in_every_dtype_at_every_position(dtype, default):
    """Against decimal-free float64 angles in numpy; and naive float32 ones are not good enough."""
    torch.set_default_dtype(default)
    try:
        net = rope.LanguageModel("rope", 16, 2, 2, 8).to(dtype)
        for k in range(8):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                cos, sin = net.table(1, 10**k, 5, 1.0, 1.0)
            angle = np.arange(10**k, 10**k + 5)[:, None] * 10000.0 ** (-np.arange(0, 8, 2) / 8)
            assert cos.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            tol = 1e-8 if dtype == torch.float64 else 1e-7
            assert cos.shape == (2, 5, 4) and np.abs(cos.double().numpy() - np.cos(angle)).max() < tol
            assert np.abs(sin.double().numpy() - np.sin(angle)).max() < tol
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotation_is_right_to_one_rounding(dtype):
    at = torch.tensor([1, 10**3, 10**6, 10**7])
    x = draws(200, 4, 64).to(dtype)
    y = rope.rotate(x, *rope.rotary_table(at, rope.thetas(64)))
    want = torch.einsum("lij,blj->bli", torch.stack([turned(rope.thetas(64), int(n)) for n in at]), x.double())
    assert y.dtype == dtype
    size = x.double().unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)  # of the pair
    room = torch.finfo(dtype).eps / 2 * want.abs() + 4e-7 * size + torch.finfo(dtype).smallest_normal
    assert ((y.double() - want).abs() <= room).all()


def test_precision_table_shows_what_naive_angles_do():
    """The card's own measurements of float32 angles: 3e-4 at 10^4, 2e-2 at 10^6, 0.3 at 10^7."""
    t = rope.precision(rope.thetas(64))
    assert {len(row) for row in t.values()} == {6}
    assert max(t["rotary_table"]) < 1e-7
    assert 1e-4 < t["float32 angles"][2] < 1e-3 and 1e-2 < t["float32 angles"][4] < 1e-1 < t["float32 angles"][5]
    assert t["bfloat16 positions"][0] < 1e-4 and t["bfloat16 positions"][1] > 1  # exact to 256 only


# ---- 8397: N dimensions ----

@given(st.integers(1, 3), st.integers(1, 4), SEEDS)
def test_8397_2_19_commuting_generators_are_relative_and_are_omega(N, pairs, seed):
    """exp(sum x_k B_k) with B_k = P Lambda_k P^T is the table of omega_i = (Lambda_1, ...)_i in P."""
    omega, P = draws(pairs, N, seed=seed), orthogonal(2 * pairs, seed + 1)
    B = [P @ lam(omega[:, k]) @ P.T for k in range(N)]
    x = 3 * draws(2, N, seed=seed + 2)

    def R(x):
        return series(sum(a * b for a, b in zip(x.tolist(), B)))
    assert far(R(x[0]).T @ R(x[1]), R(x[1] - x[0])) < 1e-11
    q = draws(2, 2 * pairs, seed=seed + 3)
    got = rope.rotate(q @ P, *rope.rotary_table_nd(x, omega, torch.float64))
    assert far(got, torch.stack([R(a) @ b for a, b in zip(x, q)]) @ P) < 1e-11
    assert rope.rotary_table_nd(x, omega, torch.bfloat16)[1].dtype == torch.float32


@given(st.integers(3, 6), SEEDS)
def test_8397_21_generators_that_do_not_commute_are_not_relative(d, seed):
    B1, B2 = (rope.skew(draws(d, d, seed=seed + i)) / d for i in (0, 1))
    assert far(B1 @ B2, B2 @ B1) > 1e-3
    assert far(series(B1).T @ series(B2), series(B2 - B1)) > 1e-4


@given(st.integers(1, 3), st.integers(1, 3), SEEDS)
def test_8397_1_axial_is_the_case_of_omega_along_the_axes(N, pairs, seed):
    theta = rope.thetas(2 * pairs)
    omega = rope.axial(theta, N)
    x = 5 * draws(4, N, seed=seed)
    cos, sin = rope.rotary_table_nd(x, omega, torch.float64)
    assert omega.shape == (N * pairs, N) and rope.reversible(omega)
    for k in range(N):
        one = rope.rotary_table(x[:, k], theta, torch.float64)
        assert torch.equal(cos[:, k * pairs:(k + 1) * pairs], one[0])
        assert torch.equal(sin[:, k * pairs:(k + 1) * pairs], one[1])


@given(SEEDS)
def test_8397_3_rank_one_is_relative_but_not_reversible(seed):
    """R((x + y) theta): other places on the line x + y = c give the very same R."""
    omega = torch.outer(rope.thetas(8), torch.ones(2).double())
    x = draws(1, 2, seed=seed)
    other = x + torch.tensor([[1.5, -1.5]])
    tables = [rope.rotary_table_nd(p, omega, torch.float64) for p in (x, other)]
    assert far(tables[0][0], tables[1][0]) < 1e-12 and not rope.reversible(omega)
    generic = draws(4, 2, seed=seed)
    assert rope.reversible(generic)
    assert far(*(rope.rotary_table_nd(p, generic)[0] for p in (x, other))) > 1e-3
    partial = torch.cat([generic, torch.zeros(2, 2)])  # omega = 0: not rotated
    y = draws(1, 12, seed=seed)
    assert torch.equal(rope.rotate(y, *rope.rotary_table_nd(x, partial, torch.float64))[:, 8:], y[:, 8:])


# ---- longer texts ----

@given(st.integers(1, 12), SEEDS)
def test_9708_rerope_by_loops(w, seed):
    L, M, d = 4, 9, 6
    q, k = draws(2, L, d, seed=seed), draws(2, M, d, seed=seed + 1)
    theta = rope.thetas(d)
    m, n = torch.arange(M - L, M), torch.arange(M)
    near = tuple(rope.rotary_table(p, theta, torch.float64) for p in (m, n))
    far_w = rope.rotary_table(torch.tensor([w]), theta, torch.float64)
    got = rope.rerope_scores(q, k, near, far_w, m[:, None] - n, w)
    for i in range(L):
        for j in range(M):
            if n[j] <= m[i]:
                R = turned(theta, max(int(n[j] - m[i]), -w))
                assert float(got[1, i, j]) == pytest.approx(float(q[1, i] @ R @ k[1, j]), abs=1e-11)
    if w >= M:
        assert torch.equal(got, rope.rotate(q, *near[0]) @ rope.rotate(k, *near[1]).mT)  # plain RoPE, bit for bit


@given(st.integers(2, 64), st.floats(1, 64))
def test_9675_ntk_is_another_base_and_1_changes_nothing(half, s):
    theta = rope.thetas(2 * half)
    assert torch.equal(rope.ntk_thetas(theta, 1.0), theta)
    d = 2 * half
    assert far(rope.ntk_thetas(theta, s), rope.thetas(d, 10000 * s ** (d / (d - 2)))) < 1e-12


def model(position, seed=0, dtype=torch.float64, **how):
    """A small model whose every weight counts, biases included."""
    torch.manual_seed(seed)
    net = rope.LanguageModel(**dict(position=position, width=16, layers=2, heads=2, context=16) | how)
    for p in net.parameters():
        if p.ndim < 4:
            nn.init.normal_(p, std=0.4)
    return net.to(dtype)


TOKENS = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_pi_ntk_and_rerope_in_the_model():
    net = model("rope")
    plain = net(TOKENS)
    assert torch.equal(net(TOKENS, pi=1.0, ntk=1.0), plain)
    assert far(net(TOKENS, rerope=12), plain) < 1e-12 < 1e-6 < far(net(TOKENS, rerope=4), plain)
    got, got_ntk = net(TOKENS, pi=4.0), net(TOKENS, ntk=3.0)
    theta = rope.thetas(8)
    net.theta_bits.copy_((theta / 4).expand(2, 2, -1).contiguous().view(torch.int64))  # n/4 theta = n theta/4
    assert far(net(TOKENS), got) < 1e-11
    net.theta_bits.copy_(rope.thetas(8, 10000 * 3 ** (8 / 6)).expand(2, 2, -1).contiguous().view(torch.int64))
    assert far(net(TOKENS), got_ntk) < 1e-11
    for position in ALL[1:]:
        with pytest.raises(ValueError, match="theta"):
            model(position)(TOKENS, ntk=2.0)


# ---- the model ----

def attention_by_loops(net, x, position):
    """Layer 0's attention on x (L, width), one score after another."""
    layer, H = net.layers[0].attention, 2
    L, d = len(x), 8
    qkv = (x @ layer.qkv.weight.T + layer.qkv.bias).view(L, 3, H, d)
    y = torch.zeros(L, H, d, dtype=torch.float64)
    for h in range(H):
        for m in range(L):
            score = []
            for n in range(m + 1):
                q, k = qkv[m, 0, h], qkv[n, 1, h]
                if position == "rope":
                    k = turned(rope.thetas(8), n - m) @ k
                elif position == "general":
                    A = net.A[0, h] / math.sqrt(net.config["context"])
                    k = series((n - m) * (A - A.T)) @ k
                score.append(float(q @ k) / math.sqrt(d) - (2 ** (-4 * (h + 1)) * (m - n) if position == "alibi" else 0))
            p = np.exp(np.array(score) - max(score))
            for n in range(m + 1):
                y[m, h] += p[n] / p.sum() * qkv[n, 2, h]
    return y.flatten(1) @ layer.out.weight.T + layer.out.bias


@torch.no_grad()
@pytest.mark.parametrize("position", ["rope", "general", "alibi", "nope"])
def test_attention_is_its_formula(position):
    net = model(position, layers=1)
    seen = []
    hooks = [net.layers[0].norm1.register_forward_hook(lambda m, i, o: seen.append(o)),
             net.layers[0].attention.register_forward_hook(lambda m, i, o: seen.append(o[0]))]
    net(TOKENS)
    for hook in hooks:
        hook.remove()
    assert far(seen[1][2], attention_by_loops(net, seen[0][2], position)) < 1e-10


@torch.no_grad()
def test_absolute_codes_are_added_to_the_bytes():
    net = model("learned", layers=1)
    nn.init.zeros_(net.layers[0].attention.out.weight), nn.init.zeros_(net.layers[0].attention.out.bias)
    nn.init.zeros_(net.layers[0].mlp[2].weight), nn.init.zeros_(net.layers[0].mlp[2].bias)
    assert far(net(TOKENS), net.last(net.norm(net.embed(TOKENS) + net.place.weight[:12]))) < 1e-12
    plain = model("sinusoidal", layers=1)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k != "place.weight"})
    code = torch.tensor([[f(n / 10000 ** (2 * i / 16)) for f in (math.cos, math.sin) for i in range(8)]
                         for n in range(12)], dtype=torch.float64)
    assert far(plain(TOKENS), net.last(net.norm(net.embed(TOKENS) + code))) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("position", ALL)
@pytest.mark.parametrize("shift", [1, 7, 10**6])
def test_8265_12_logits_of_relative_codes_do_not_change_when_all_move(position, shift):
    net = model(position)
    if position == "learned":
        net.place = nn.Embedding(32, 16, dtype=torch.float64)
        shift = min(shift, 8)
    moved = far(net(TOKENS, shift), net(TOKENS))
    assert moved < 1e-8 if position in ("rope", "general", "alibi", "nope") else moved > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("position", ALL)
def test_order_counts_and_the_future_does_not(position):
    net = model(position)
    base = net(TOKENS[:1])
    for j in range(12):
        other = TOKENS[:1].clone()
        other[0, j] = (other[0, j] + 1) % 256
        changed = (net(other) - base).abs().amax((0, 2)) > 1e-9
        assert not changed[:j].any() and changed[j:].all()
    swapped = TOKENS[:1, [1, 0, *range(2, 12)]]
    moved = far(net(swapped)[:, -1], base[:, -1])
    assert moved > 1e-6


@pytest.mark.parametrize("position", [*ALL, "rerope", "pi", "ntk"])
@settings(max_examples=8)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 4))
@example([1] * 12, 0)
@torch.no_grad()
def test_cache_in_any_chunks_at_any_offset_is_one_pass(position, chunks, first):
    how = {"rerope": dict(rerope=3), "pi": dict(pi=2.0), "ntk": dict(ntk=2.0)}.get(position, {})
    net = model("rope" if how else position)
    want, cache, got, done = net(TOKENS, first, **how), [], [], 0
    for size in [*chunks, 12]:
        if done < 12:
            got.append(net(TOKENS[:, done:done + size], first + done, cache, **how))
            done += size
    assert far(torch.cat(got, 1), want) < 1e-10
    assert len(cache) == 2 and cache[0][0].shape == (3, 2, 12, 8)


@pytest.mark.parametrize("position", [*ALL, "rerope"])
@settings(max_examples=8)
@given(st.lists(st.integers(0, 5), min_size=3, max_size=3), st.integers(1, 11))
@torch.no_grad()
def test_left_padding_is_no_position(position, pads, cut):
    """Each row as long as it is, or all in one batch, padded on the left, in two chunks: the same."""
    how = {"rerope": dict(rerope=3)}.get(position, {})
    net = model("rope" if how else position)
    pads = torch.tensor(pads)
    cache = []
    got = torch.cat([net(TOKENS[:, :cut], -pads, cache, **how), net(TOKENS[:, cut:], cut - pads, cache, **how)], 1)
    for row, pad in enumerate(pads.tolist()):
        assert far(got[row, pad:], net(TOKENS[row:row + 1, pad:], **how)[0]) < 1e-10


@torch.no_grad()
def test_cache_keeps_rotated_keys_and_raw_ones_for_rerope():
    net, kept, raw = model("rope"), [], []
    net(TOKENS, 3, kept), net(TOKENS, 3, raw, rerope=4)
    table = rope.rotary_table(torch.arange(3, 15), rope.thetas(8), torch.float64)
    assert far(kept[0][0], rope.rotate(raw[0][0], *table)) < 1e-12 and torch.equal(kept[0][1], raw[0][1])


@torch.no_grad()
def test_sampling_is_from_the_model_without_a_cache():
    net = model("rope", dtype=torch.float32)
    got = rope.sample(net, TOKENS[:, :3], 9, torch.Generator().manual_seed(1), 0.9)
    g, want = torch.Generator().manual_seed(1), TOKENS[:, :3]
    for _ in range(9):
        p = torch.softmax(net(want)[:, -1].double() / 0.9, -1).float()
        want = torch.cat([want, torch.multinomial(p, 1, generator=g)], 1)
    assert torch.equal(got, want)


def test_model_in_bfloat16_is_near_and_keeps_its_thetas():
    net = model("rope", dtype=torch.float32)
    want, theta = net(TOKENS), net.theta_bits.clone()
    for low in (net.to(torch.bfloat16), net.half()):
        assert torch.equal(low.theta_bits, theta) and low(TOKENS).dtype == torch.float32
        assert 1e-6 < far(low(TOKENS), want) < 0.1 * float(want.abs().max())
    net = model("general", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):  # R_n itself stays float32
        R = net.table(0, 0, 12, 1.0, 1.0)
        assert R.dtype == torch.float32 and far(R[1, 11], series(11 * rope.skew(net.A[0, 1].double() / 4))) < 1e-5
        x = torch.randn(2, 12, 8)
        assert far(rope.turn(x, R).norm(dim=-1), x.norm(dim=-1)) < 1e-5


def test_model_refuses_odd_heads():
    for width, heads in ((15, 3), (16, 3), (6, 3 * 2)):
        with pytest.raises(ValueError, match="heads"):
            rope.LanguageModel("rope", width, 1, heads)


@pytest.mark.parametrize("position", ["rope", "general"])
def test_whole_network_under_compile(position):
    net = model(position, dtype=torch.float32)
    run = torch.compile(net, backend="aot_eager")
    torch.testing.assert_close(run(TOKENS), net(TOKENS), rtol=1e-4, atol=1e-4)


# ---- the theorem ----

@settings(max_examples=12)
@given(st.integers(0, 50), st.integers(1, 3), st.sampled_from([2, 4, 6]))
def test_9403_10_a_whole_general_model_folds_into_rope(seed, heads, d):
    net = model("general", seed, width=heads * d, heads=heads)
    with torch.no_grad():  # far from RoPE's own frequencies, and one head with equal ones
        net.A.copy_(0.3 * math.sqrt(net.config["context"]) * draws(*net.A.shape, seed=seed))
        net.A[0, 0] = 0
        net.A[0, 0, ::2, 1::2] = torch.eye(d // 2) * 0.3 * math.sqrt(net.config["context"])
    got = rope.fold(net)
    assert got.position == "rope" and "A" not in got.state_dict()
    assert far(net(TOKENS), got(TOKENS)) < 1e-11
    assert far(net(TOKENS, 1000), got(TOKENS, 1000)) < 1e-9
    with torch.no_grad():
        got.layers[1].attention.qkv.bias.copy_(net.layers[1].attention.qkv.bias)
    assert far(net(TOKENS), got(TOKENS)) > 1e-6  # the bias forgotten


def test_9403_8_general_starts_as_rope_in_another_basis_and_learns_B():
    net = model("general", width=16)
    for B in torch.cat([net.B(0), net.B(1)]).detach():
        assert (B.abs() > 1e-4).sum() > 40  # dense, not blocks
        assert torch.linalg.eigvals(B).imag.sort(descending=True).values[:4].tolist() == pytest.approx(
            [1, 0.1, 0.01, 0.001], abs=1e-5)
    rope.loss(net.float(), TOKENS).mean().backward()
    assert (net.A.grad.flatten(1).norm(dim=1) > 1e-5).all()
    before = net.B(0).detach()
    rope.optimiser(net, 1e-3).step()
    assert far(net.B(0), before) == pytest.approx(2e-3 / math.sqrt(net.config["context"]), rel=0.05)  # not 2e-3


def test_general_never_calls_canonical(monkeypatch):
    monkeypatch.setattr(rope, "canonical", lambda B: pytest.fail("the theorem would be trivial"))
    net = model("general")
    rope.loss(net, TOKENS).mean().backward()


# ---- evaluation ----

@torch.no_grad()
def test_bits_by_position_by_loops():
    net = model("rope")
    data = torch.randint(256, (23,), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    got = rope.bits_by_position(net, data, 5, 10)
    assert got.shape == (4, 5)
    for i in range(4):
        for j in range(5):
            p = torch.softmax(net(data[None, 5 * i:5 * i + j + 1].long())[0, -1], 0)
            assert float(got[i, j]) == pytest.approx(-math.log2(float(p[int(data[5 * i + j + 1])])), rel=1e-9)
    assert rope.bits_by_position(net, data[:21], 5, 5).shape == (4, 5)


def test_baselines():
    even = torch.arange(256, dtype=torch.uint8).repeat(40)
    got = rope.baselines(even, even)
    assert got["unigram"] == pytest.approx(8) and got["gzip"] < 1 and got["xz"] < 1
    rare = rope.baselines(torch.full((1000,), 7, dtype=torch.uint8), torch.tensor([7, 9], dtype=torch.uint8))
    assert rare["unigram"] == pytest.approx((math.log2(1256 / 1001) + math.log2(1256)) / 2)


def test_curves_are_an_svg():
    import xml.etree.ElementTree as ET
    rope.draw_curves(Path("a.svg"), "title", "x", {"one": ([1, 2, 4], [0.5, 1, 2]), "two": ([1, 4], [3, 0])})
    root = ET.parse("a.svg").getroot()
    lines = [e for e in root if e.tag.endswith("polyline")]
    texts = [e.text for e in root if e.tag.endswith("text")]
    assert len(lines) == 2 and {"title", "x", "one", "two", "1", "2", "4", "0", "3"} <= set(texts)
    points = [tuple(map(float, p.split(","))) for p in lines[0].get("points").split()]
    assert points[0][0] < points[1][0] < points[2][0] and points[1][0] * 2 == pytest.approx(points[0][0] + points[2][0])
    assert points[0][1] > points[1][1] > points[2][1]


# ---- wrong input ----

def refused(capsys, argv, *words, code=2):
    capsys.readouterr()
    try:
        got = rope.main(argv)
    except SystemExit as end:
        got = end.code
    err = capsys.readouterr().err
    assert got == code and "Traceback" not in err
    assert all(word in err.strip().splitlines()[-1] for word in words), err


@pytest.fixture
def text():
    """3,000 bytes that can be learnt: one sentence, over and over."""
    Path("a.txt").write_bytes((b"the cat sat on the mat. " * 125)[:3000])
    return TINY


@pytest.mark.parametrize("argv, word", [
    (["--completeness", "--position", "rope"], "--position general"), (["--position", "up"], "invalid choice"),
    (["--width", "18", "--heads", "4"], "--heads 4"), (["--context", "1"], "--context"), (["--steps", "0"], "--steps"),
    (["--ntk", "0.5"], "--ntk"), (["--rerope", "0"], "--rerope"), (["--temperature", "0"], "--temperature"),
    (["--position", "alibi", "--ntk", "2"], "theta"), (["--position", "learned", "--length", "99"], "--length"),
    (["--prompt", ""], "--prompt"), (["--eval-bytes", "255"], "--eval-bytes 255"), (["--layers", "x"], "--layers")])
def test_wrong_flags_are_refused(text, capsys, argv, word):
    refused(capsys, [*TINY, *argv], word)
    assert not Path("out").exists()


def test_wrong_data_is_refused(capsys):
    refused(capsys, ["--data", "nowhere"], "nowhere", "shakespeare")
    Path("short.txt").write_bytes(b"ab" * 60)
    refused(capsys, ["--data", "short.txt"], "short.txt", "--context 256")
    Path("empty.txt").write_bytes(b"")
    refused(capsys, ["--data", "empty.txt"], "nothing")
    Path("bad.xz").write_bytes(b"not that")
    refused(capsys, ["--data", "bad.xz"], "bad.xz")


def test_gpu_without_cuda_is_refused(text, capsys):
    if not torch.cuda.is_available():
        refused(capsys, [*text, "--gpu"], "CUDA")


def test_defaults():
    args = rope.parse_args([])
    assert args.position == "general" and args.data == "python"
    assert rope.parse_args(["--gpu"]).position == "rope"
    assert rope.parse_args(["--gpu", "--completeness"]).position == "general"


# ---- runs ----

def states(*folders):
    return [torch.load(f"{f}/ckpt.pt", weights_only=True) for f in folders]


def same(a, b, exact=True):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], exact) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(p, q, exact) for p, q in zip(a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    return a == b


def stop_after(step, kind=signal.SIGINT):
    """From now on, rope.loss sends this process a signal at that call; then it is itself again."""
    loss, calls = rope.loss, [0]

    def counting(*args, **how):
        calls[0] += 1
        if calls[0] == step:
            rope.loss = loss
            signal.raise_signal(kind)
        return loss(*args, **how)
    rope.loss = counting


def test_completeness_run_writes_what_it_says(text, capsys):
    assert rope.main([*text, "--steps", "5", "--completeness"]) == 0
    out = Path("out/rope")
    assert {p.name for p in out.iterdir()} == {
        "ckpt.pt", "log.csv", "metrics.json", "folded", "samples.txt", "samples_000002.txt", "samples_000004.txt",
        "decay.svg", "extrapolation.svg"}
    m = json.loads((out / "metrics.json").read_text())
    figures = m["completeness"]
    assert figures["logits"] < 1e-9 < 0.1 < figures["largest_logit"]
    said = capsys.readouterr().out
    assert f"{figures['logits']:.1e}" in said and said.count("nothing is lost") == 2 and \
        said.count("P cannot be folded") == 3
    assert m["step"] == 5 and m["test_bytes"] == 144 and 0 < m["test_bits_per_byte"] < 9
    assert set(m["baselines"]) == {"unigram", "gzip", "xz"}
    assert len(m["extrapolation"]) == 4 and m["extrapolation"]["rope"]["lengths"] == [16, 32, 64, 128]
    for row in m["extrapolation"].values():
        assert row["mean"][1] == pytest.approx((row["bucket"][0] + row["bucket"][1]) / 2)
        assert row["mean"][3] == pytest.approx((row["mean"][2] + row["bucket"][3]) / 2)
    rows = (out / "log.csv").read_text().splitlines()
    assert rows[0] == "step,items,rate,elapsed,bits,lr" and rows[-1].startswith("5,320,")
    # the folded one is a plain rope model, with frequencies of its own for each head
    general, folded = states("out/rope", "out/rope/folded")
    assert general["config"]["position"] == "general" and folded["config"]["position"] == "rope"
    net = rope.LanguageModel("general", 16, 1, 2, 16)
    net.load_state_dict(general["model"])
    plain = rope.LanguageModel("rope", 16, 1, 2, 16)
    plain.load_state_dict(folded["model"])
    assert 0 < far(net(TOKENS), plain(TOKENS)) < 1e-5 and not torch.equal(*plain.theta_bits[0])
    assert rope.main(["--sample-only", "2", "--out", "out/rope/folded", "--ntk", "2", "--length", "40"]) == 0
    assert Path("out/rope/folded/samples_only.txt").exists()
    refused(capsys, ["--sample-only", "2", "--ntk", "2"], "folded")
    assert rope.main(["--resume", "--out", "out/rope/folded", "--steps", "6", "--position", "rope"]) == 0
    assert states("out/rope/folded")[0]["step"] == 6


@pytest.mark.parametrize("position", ALL)
def test_every_position_runs(text, position, capsys):
    assert rope.main([*text, "--steps", "2", "--position", position]) == 0
    m = json.loads(Path("out/rope/metrics.json").read_text())
    assert len(m.get("extrapolation", ())) == {"learned": 0, "rope": 4, "general": 4}.get(position, 1)
    assert ("completeness" in m) == (position == "general")
    assert len(Path("out/rope/samples.txt").read_text().split("-" * 80)) == 2


@pytest.mark.parametrize("position", ["rope", "general"])
def test_resume_is_the_straight_run_bit_for_bit(text, position):
    argv = [*text, "--steps", "7", "--position", position, "--save-every", "99"]
    assert rope.main([*argv, "--out", "a"]) == 0
    stop_after(3)
    assert rope.main([*argv, "--out", "b"]) == 130
    assert states("b")[0]["step"] == 3
    assert rope.main(["--resume", "--out", "b", *"--samples 2 --length 6 --eval-bytes 1024".split()]) == 0
    assert same(*states("a", "b"))
    assert Path("a/samples.txt").read_bytes() == Path("b/samples.txt").read_bytes()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_exit_130(text, kind, capsys):
    stop_after(1, kind)
    assert rope.main([*text, "--steps", "50"]) == 130
    assert states("out/rope")[0]["step"] == 1 and "--resume" in capsys.readouterr().out


def test_contradictions_and_foreign_checkpoints_are_refused(text, capsys):
    refused(capsys, ["--resume"], "no such checkpoint")
    assert rope.main([*text, "--steps", "1"]) == 0
    refused(capsys, ["--resume", "--width", "32"], "--width 32", "16")
    refused(capsys, ["--resume", "--position", "rope"], "--position rope", "general")
    path = Path("out/rope/ckpt.pt")
    whole = path.read_bytes()
    torch.save({"script": "ddpm", "config": {}}, "other.pt")
    for body in (b"", whole[:len(whole) // 2], Path("other.pt").read_bytes(), zlib.compress(whole)):
        path.write_bytes(body)
        refused(capsys, ["--resume"], "not a checkpoint of rope.py")
        refused(capsys, ["--sample-only", "1"], "not a checkpoint of rope.py")


@pytest.mark.parametrize("when", ["loss", "weight"])
def test_what_is_not_finite_stops_with_1_and_keeps_the_last_good_checkpoint(text, capsys, monkeypatch, when):
    assert rope.main([*text, "--steps", "2"]) == 0
    good = Path("out/rope/ckpt.pt").read_bytes()
    loss = rope.loss

    def broken(net, *a, **how):
        if when == "weight":
            net.last.bias.data.fill_(math.inf)
            return loss(net, *a, **how).nan_to_num(0, 0, 0)
        return loss(net, *a, **how) * math.nan
    monkeypatch.setattr(rope, "loss", broken)
    refused(capsys, ["--resume", "--steps", "8"], "finite", code=1)
    assert Path("out/rope/ckpt.pt").read_bytes() == good


def test_full_disk_stops_with_1_and_keeps_the_last_good_checkpoint(text, capsys, monkeypatch):
    assert rope.main([*text, "--steps", "2"]) == 0
    good = Path("out/rope/ckpt.pt").read_bytes()
    write = Path.write_bytes

    def full(path, body):
        write(path, bytes(body)[:100])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    refused(capsys, ["--resume", "--steps", "4"], "No space left", code=1)
    assert Path("out/rope/ckpt.pt").read_bytes() == good and not list(Path("out/rope").glob("*.tmp"))


def test_previews_change_nothing(text):
    argv = [*text, "--steps", "4", "--position", "rope"]
    assert rope.main([*argv, "--save-every", "1", "--out", "a"]) == 0
    assert rope.main([*argv, "--save-every", "9", "--out", "b"]) == 0
    assert same(*states("a", "b"))


def test_every_window_is_drawn(text, monkeypatch):
    seen = []

    def loss(net, tokens, **how):
        seen.append(tokens)
        return next(net.parameters()).sum() * 0 + torch.zeros(tokens.shape[0], tokens.shape[1] - 1)
    Path("a.txt").write_bytes(bytes(range(200)))
    monkeypatch.setattr(rope, "loss", loss)
    argv = [*text, "--context", "8", "--batch-size", "64", "--steps", "60", "--position", "rope", "--save-every", "99"]
    assert rope.main(argv) == 0
    tokens = torch.cat(seen[:60])
    assert torch.equal(tokens[:, 1:], tokens[:, :-1] + 1)  # windows of the text itself
    starts = torch.bincount(tokens[:, 0], minlength=180)
    want = 60 * 64 / 172  # of 180 training bytes, the last start is 171
    assert len(starts) == 180 and not starts[172:].any()
    assert ((starts[:172] - want) ** 2 / want).sum() < 171 + 5 * math.sqrt(2 * 171)


@pytest.mark.parametrize("position", ["rope", "general"])
def test_learns(text, position):
    """A sentence over and over: almost no bits are left (2.9 by frequencies), and the B has moved."""
    argv = [*text, "--steps", "150", "--lr", "1e-2", "--position", position, "--batch-size", "8", "--save-every", "999"]
    assert rope.main(argv) == 0
    m = json.loads(Path("out/rope/metrics.json").read_text())
    assert m["test_bits_per_byte"] < 0.5 and m["baselines"]["unigram"] > 2.5


def test_two_ranks_are_one(text):
    argv = [*text, "--steps", "3", "--save-every", "99"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           rope.__file__, *argv, "--out", "two"], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert rope.main([*argv, "--out", "one"]) == 0
    one, two = states("one", "two")
    assert same(one["model"], two["model"], exact=False) and done.stdout.count("step 3/3") == 1


def test_alone_in_an_empty_folder():
    """The file by itself, as a user has it, with the Python library's own text."""
    Path("rope.py").write_bytes(Path(rope.__file__).read_bytes())
    argv = "--steps 2 --eval-bytes 4096 --length 20"
    done = subprocess.run([sys.executable, "rope.py", *argv.split()], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "def " in done.stdout and json.loads(Path("out/rope/metrics.json").read_text())["completeness"]["logits"] < 1e-9
