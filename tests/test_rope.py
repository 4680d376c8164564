"""rope.py against posts 9403, 8265, 8397, oracles written out here in float64, and a naive second run of its main."""

import gzip
import json
import lzma
import math
import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import rope
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

EXPERIMENTS = Path(__file__).parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import rope_codes as codes  # noqa: E402
import rope_extrapolation as longer  # noqa: E402
import rope_figures as figures  # noqa: E402

SEEDS = st.integers(0, 2**31)
SIZES = st.integers(2, 9)
PLACES = st.integers(-1000, 1000)
THETAS = st.lists(st.floats(0, math.pi), min_size=1, max_size=6).map(
    lambda x: torch.tensor(x, dtype=torch.float64))
TINY = ("--data a.txt --width 16 --layers 2 --heads 2 --context 16 --batch-size 4 --eval-bytes 128 "
        "--length 6 --samples 2 --warmup 3 --lr 1e-2 --clip-grad 0.5").split()


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(d, seed=0, det=None):
    Q = torch.linalg.qr(draws(d, d, seed=seed)).Q
    if det is not None and torch.linalg.det(Q) * det < 0:
        Q[:, 0] *= -1
    return Q


def series(A):
    """exp A by its power series at A / 2^k, squared k times: 9403 (2) read literally."""
    k = max(0, math.ceil(math.log2(float(A.detach().abs().sum()) + 1e-300)) + 4)
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


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_9403_8_skew_is_told_relative_to_the_size_of_B(size):
    B, S = rope.skew(draws(6, 6)), draws(6, 6, seed=1)
    P, theta = rope.canonical(size * (B + 1e-12 * (S + S.T)))
    assert far(P @ lam(theta) @ P.T, size * B) < 1e-10 * size
    with pytest.raises(ValueError, match="skew"):
        rope.canonical(size * (B + 1e-6 * (S + S.T)))


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
        rope.rotate(draws(5, d), cos, sin, "quarter")


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
    got = figures.decay(n_(distance), rope.thetas(2 * half))
    assert float(got) == pytest.approx(sum(sums) / half, rel=1e-9, abs=1e-9)


def test_8265_16_the_curve_of_the_post():
    got = figures.decay(torch.tensor([0, 1, 8, 32, 128, 256, 1024, 4096]).double(), rope.thetas(128))
    assert got.tolist() == pytest.approx([32.5, 31.5, 19.8, 13.4, 9.3, 6.5, 4.0, 4.9], abs=0.05)


# ---- precision ----

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("default", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_table_is_right_in_every_dtype_at_every_position(dtype, default):
    """Against float64 angles in numpy; and naive float32 ones are not good enough."""
    torch.set_default_dtype(default)
    try:
        net = rope.LanguageModel("rope", 16, 2, 2, 8).to(dtype)
        for k in range(8):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                cos, sin = net.tables(5, torch.arange(10**k, 10**k + 5))[1]
            angle = np.arange(10**k, 10**k + 5)[:, None] * 10000.0 ** (-np.arange(0, 8, 2) / 8)
            assert cos.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            tol = 1e-8 if dtype == torch.float64 else 1e-7
            assert cos.shape == (2, 5, 4) and np.abs(cos.double().numpy() - np.cos(angle)).max() < tol
            assert np.abs(sin.double().numpy() - np.sin(angle)).max() < tol
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("table", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_x_by_any_table(dtype, table, layout, compiling, monkeypatch):
    """In the dtype of x, no worse than the coarser of the two."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x, n = draws(2, 3, 8).to(dtype), torch.tensor([0, 5, 900])
    cos, sin = rope.rotary_table(n, rope.thetas(8), torch.float64)
    y = rope.rotate(x, cos.to(table), sin.to(table), layout)
    order = rope.half_order(8) if layout == "half" else torch.arange(8)
    R = torch.stack([turned(rope.thetas(8), int(k))[order][:, order] for k in n])
    assert y.dtype == dtype
    eps = max(torch.finfo(t).eps for t in (dtype, table))
    assert far(y.double(), torch.einsum("lij,blj->bli", R, x.double())) < 4 * eps * float(x.abs().max())


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_a_table_of_other_positions_or_another_width_is_refused(layout):
    x = draws(2, 3, 8)
    for length, d in ((1, 8), (2, 8), (4, 8), (3, 6), (3, 2)):
        with pytest.raises(ValueError, match="x .2, 3, 8."):
            rope.rotate(x, *rope.rotary_table(torch.arange(length), rope.thetas(d)), layout)
    cos, sin = rope.rotary_table(torch.arange(3), rope.thetas(8))
    with pytest.raises(ValueError, match="sin"):
        rope.rotate(x, cos, sin[:1], layout)
    rows = rope.rotary_table(torch.tensor([[0, 1, 2], [7, 8, 9]]), rope.thetas(8), torch.float64)  # a row of its own each
    want = torch.stack([torch.stack([turned(rope.thetas(8), n + 7 * b) @ x[b, n] for n in range(3)]) for b in (0, 1)])
    order = rope.half_order(8) if layout == "half" else torch.arange(8)
    assert far(rope.rotate(x[..., order], *rows, layout), want[..., order]) < 1e-13


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
    t = figures.precision(rope.thetas(64))
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


@given(st.integers(2, 3), SEEDS, st.booleans())
def test_8397_21_relative_and_one_P_for_all_if_and_only_if_generators_commute(pairs, seed, commute):
    d, P = 2 * pairs, orthogonal(2 * pairs, seed)
    B1 = P @ lam(torch.arange(1, pairs + 1).double()) @ P.T
    P2 = P if commute else orthogonal(d, seed + 1)
    B2 = P2 @ lam(draws(pairs, seed=seed + 2)) @ P2.T
    B1, B2, a, b = (B1 - B1.T) / 2, (B2 - B2.T) / 2, draws(2, seed=seed + 3), draws(2, seed=seed + 4)

    def R(x):  # 8397 (19)
        return rope.exp_rotation(n_(1), x[0] * B1 + x[1] * B2)
    assert (far(B1 @ B2, B2 @ B1) < 1e-12) == commute
    assert (far(R(a).T @ R(b), R(b - a)) < 1e-12) == commute
    own, _ = rope.canonical(B1)  # of the first alone
    blocks = own.T @ B2 @ own
    omega = torch.stack([rope.canonical(B1)[1], blocks[1::2, ::2].diagonal()], 1)
    x, q = draws(3, 2, seed=seed + 5), draws(3, d, seed=seed + 6)
    got = rope.rotate(q @ own, *rope.rotary_table_nd(x, omega, torch.float64))
    assert (far(got, torch.stack([R(p) @ v for p, v in zip(x, q)]) @ own) < 1e-11) == commute


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


# ---- the model ----

def model(position, seed=0, dtype=torch.float64, **how):
    """A small model whose every weight counts, biases included."""
    torch.manual_seed(seed)
    net = rope.LanguageModel(**dict(position=position, width=16, layers=2, heads=2, context=16) | how)
    for p in net.parameters():
        if p.ndim < 4:
            nn.init.normal_(p, std=0.4)
    return net.to(dtype)


def rival(code, seed=0):
    torch.manual_seed(seed)
    net = codes.Rival(code, 16, 2, 2, 16)
    for p in net.parameters():
        nn.init.normal_(p, std=0.4)
    return net


TOKENS = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(5))
BOTH = pytest.mark.parametrize("position", ["rope", "general"])


def softmax(scores):
    p = np.exp(np.array(scores) - max(scores))
    return p / p.sum()


def attention_by_loops(net, x, layer, bias=lambda h, m, n: 0.0):
    """A layer's attention on x (L, width), one score after another."""
    attention, L, d = net.layers[layer].attention, len(x), 8
    qkv = (x @ attention.qkv.weight.T + attention.qkv.bias).view(L, 3, 2, d)
    y = torch.zeros(L, 2, d, dtype=torch.float64)
    for h in range(2):
        if net.config["position"] == "general":
            A = net.A[layer, h].double() / math.sqrt(net.config["context"])
            R = [series(-k * (A - A.T)) for k in range(L)]
        else:
            R = [turned(net.theta[layer, h], -k) for k in range(L)]
        for m in range(L):
            score = [float(qkv[m, 0, h] @ R[m - n] @ qkv[n, 1, h]) / math.sqrt(d) + bias(h, m, n) for n in range(m + 1)]
            for n, p in enumerate(softmax(score)):
                y[m, h] += p * qkv[n, 2, h]
    return y.flatten(1) @ attention.out.weight.T + attention.out.bias


@torch.no_grad()
@BOTH
def test_model_is_its_formula(position):
    """Every layer with angles of its own, x plus attention, plus the MLP, and the logits."""
    net = model(position)
    if position == "rope":
        net.theta.copy_(draws(2, 2, 4, seed=3))
    x = net.embed.weight[TOKENS[2]]

    def norm(x, layer):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * layer.weight
    for i, layer in enumerate(net.layers):
        x = x + attention_by_loops(net, norm(x, layer.norm1), i)
        wide = norm(x, layer.norm2) @ layer.mlp[0].weight.T + layer.mlp[0].bias
        x = x + wide * (1 + torch.erf(wide / math.sqrt(2))) / 2 @ layer.mlp[2].weight.T + layer.mlp[2].bias
    assert far(net(TOKENS)[2], norm(x, net.norm) @ net.last.weight.T + net.last.bias) < 1e-9


@BOTH
def test_first_weights(position):
    torch.manual_seed(3)
    net = rope.LanguageModel(position, 64, 2, 4, 32)
    for name, p in net.named_parameters():
        if name.endswith("bias") or "out.weight" in name or "mlp.2.weight" in name:
            assert not p.any(), name  # the branches begin at zero
        elif p.ndim == 2 and "embed" not in name:
            assert float(p.detach().std()) == pytest.approx(p.shape[1] ** -0.5, rel=0.1), name
    if position == "rope":
        assert all(torch.equal(theta, rope.thetas(16)) for theta in net.theta.flatten(0, 1))
    assert net.config == dict(position=position, width=64, layers=2, heads=4, context=32)


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("shift", [1, 7, 10**6])
def test_8265_12_logits_do_not_change_when_all_positions_move(position, shift):
    net = model(position)
    assert far(net(TOKENS, torch.arange(12) + shift), net(TOKENS)) < 1e-8


@torch.no_grad()
@pytest.mark.parametrize("position", ["rope", "general", *codes.CODES[2:]])
def test_order_counts_and_the_future_does_not(position):
    net = model(position) if position in rope.POSITIONS else rival(position)
    base = net(TOKENS[:1])
    for j in range(12):
        other = TOKENS[:1].clone()
        other[0, j] = (other[0, j] + 1) % 256
        changed = (net(other) - base).abs().amax((0, 2)) > 1e-6
        assert not changed[:j].any() and changed[j:].all()
    swapped = TOKENS[:1, [1, 0, *range(2, 12)]]
    assert far(net(swapped)[:, -1], base[:, -1]) > 1e-6


@pytest.mark.parametrize("position", ["rope", "general", "alibi", "learned"])
@settings(max_examples=8)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 4))
@example([1] * 12, 0)
@torch.no_grad()
def test_what_is_kept_in_any_chunks_with_any_room_is_one_pass(position, chunks, spare):
    net = model(position) if position in rope.POSITIONS else rival(position)
    want, kept, n, got, done = net(TOKENS), net.room(3, 12 + spare), torch.arange(12), [], 0
    assert kept.shape == (2, 2, 3, 2, 12 + spare, 8)
    for size in [*chunks, 12]:
        if done < 12:
            got.append(net(TOKENS[:, done:done + size], n[done:done + size], kept))
            done += size
    assert far(torch.cat(got, 1), want) < (1e-10 if position in rope.POSITIONS else 1e-5)
    assert not kept[..., 12:, :].any() and kept[..., :12, :].all()


def first_clock(p, g):
    """One of each row of p (B, 1, 256), by exponential waiting times: as likely as p says."""
    return (p.float() / torch.empty(p.shape).exponential_(generator=g)).argmax(-1)


@torch.no_grad()
@BOTH
def test_sampling_is_from_the_model_without_what_is_kept(position):
    net = model(position, dtype=torch.float32)
    got = rope.sample(net, TOKENS[:, :3], 9, torch.Generator().manual_seed(1), 0.9)
    g, want = torch.Generator().manual_seed(1), TOKENS[:, :3]
    for _ in range(9):
        want = torch.cat([want, first_clock(torch.softmax(net(want)[:, -1:].double() / 0.9, -1), g)], 1)
    assert torch.equal(got, want)


def test_bytes_are_drawn_as_often_as_the_softmax_says():
    class Fixed(nn.Module):
        def room(self, rows, length):
            return None

        def forward(self, tokens, n, kept):
            return torch.full((*tokens.shape, 256), -math.inf).index_fill_(-1, torch.tensor([7]), 1.0).index_fill_(
                -1, torch.tensor([9]), 0.0)
    got = rope.sample(Fixed(), torch.zeros(4000, 1, dtype=torch.long), 1, torch.Generator().manual_seed(0), 2.0)[:, 1]
    share = float((got == 7).double().mean())
    assert set(got.tolist()) == {7, 9} and share == pytest.approx(1 / (1 + math.exp(-0.5)), abs=4 * 0.5 / 4000**0.5)


@torch.no_grad()
def test_sampling_under_autocast_keeps_what_the_network_computes_in():
    net = model("rope", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert net.room(1, 4).dtype == torch.bfloat16
        kept, n = net.room(3, 12), torch.arange(12)
        parts = [net(TOKENS[:, k:k + 1], n[k:k + 1], kept) for k in range(12)]
        assert far(torch.cat(parts, 1), net(TOKENS)) < 0.05 * float(net(TOKENS).abs().max())
        rope.sample(net, TOKENS, 3, torch.Generator())
    assert net.room(1, 4).dtype == torch.float32 and net.double().room(1, 4).dtype == torch.float64


@BOTH
def test_low_precision_keeps_the_angles_and_is_near(position):
    """.half(), .bfloat16() and .to() leave theta float64 and A float32, as a checkpoint does."""
    net = model(position, dtype=torch.float32)
    name, want = net.angles, net(TOKENS)
    exact = getattr(net, name).detach().clone()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for low in (net.to(torch.bfloat16), net.half(), net.to("cpu", torch.bfloat16)):
        assert torch.equal(getattr(low, name), exact) and getattr(low, name).dtype == exact.dtype
        assert low.embed.weight.dtype != torch.float32 and low(TOKENS).dtype == torch.float32
        assert 1e-6 < far(low(TOKENS), want) < 0.1 * float(want.detach().abs().max())
    assert dict(net.named_parameters()).keys() == dict(model(position).named_parameters()).keys()
    net.float().load_state_dict(state)
    assert torch.equal(net(TOKENS), want)
    if position == "general":
        with torch.autocast("cpu", torch.bfloat16):  # R_n itself stays float32
            R = net.tables(12, None)[0]
            A = net.A[0, 1].double() / 4
            assert R.dtype == torch.float32 and far(R[1, 11], series(11 * (A - A.T))) < 1e-5
            x = torch.randn(2, 12, 8)
            assert far(rope.turn(x, R).norm(dim=-1), x.norm(dim=-1)) < 1e-5


@BOTH
def test_weights_averaged_through_state_dict_are_a_model(position):
    """Also the thetas: of equal ones the mean is the same bits."""
    a, b = model(position, 1, torch.float32), model(position, 2, torch.float32)
    if position == "general":
        b.A.data.copy_(a.A)
    mean = model(position, 3, torch.float32)
    mean.load_state_dict({k: (v + b.state_dict()[k]) / 2 for k, v in a.state_dict().items()})
    assert torch.equal(getattr(mean, mean.angles), getattr(a, a.angles))
    assert far(mean.last.weight, (a.last.weight + b.last.weight) / 2) < 1e-7
    average = torch.optim.swa_utils.AveragedModel(a, use_buffers=True)
    average.update_parameters(a), average.update_parameters(b)
    assert torch.equal(getattr(average.module, a.angles), getattr(a, a.angles))


def test_tables_are_made_once_for_all_layers(monkeypatch):
    calls = []
    real = rope.rotary_table
    monkeypatch.setattr(rope, "rotary_table", lambda *a: calls.append(a) or real(*a))
    model("rope", dtype=torch.float32, layers=3)(TOKENS)
    assert len(calls) == 1


def test_model_refuses_odd_heads():
    for width, heads in ((15, 3), (16, 3), (6, 3 * 2)):
        with pytest.raises(ValueError, match="heads"):
            rope.LanguageModel("rope", width, 1, heads)


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
    assert got.angles == "theta" and "A" not in got.state_dict() and rope.fold(got) is got
    assert got.config == net.config | dict(position="rope")
    assert far(net(TOKENS), got(TOKENS)) < 1e-11
    n = torch.arange(1000, 1012)
    assert far(net(TOKENS, n), got(TOKENS, n)) < 1e-9
    with torch.no_grad():
        got.layers[1].attention.qkv.bias.copy_(net.layers[1].attention.qkv.bias)
    assert far(net(TOKENS), got(TOKENS)) > 1e-6  # the bias forgotten


def test_9403_8_general_starts_as_rope_in_another_basis_and_learns_B():
    net = model("general", width=16)
    for B in net.B().detach().flatten(0, 1):
        assert (B.abs() > 1e-4).sum() > 40  # dense, not blocks
        assert torch.linalg.eigvals(B).imag.sort(descending=True).values[:4].tolist() == pytest.approx(
            [1, 0.1, 0.01, 0.001], abs=1e-5)
    rope.loss(net.float(), TOKENS).mean().backward()
    assert (net.A.grad.flatten(1).norm(dim=1) > 1e-5).all()
    before = net.B().detach()
    rope.optimiser(net, 1e-3).step()
    assert far(net.B(), before) == pytest.approx(2e-3 / math.sqrt(net.config["context"]), rel=0.05)  # not 2e-3


def test_general_never_calls_canonical(monkeypatch):
    monkeypatch.setattr(rope, "canonical", lambda B: pytest.fail("the theorem would be trivial"))
    rope.loss(model("general"), TOKENS).mean().backward()


@torch.no_grad()
def test_completeness_compares_whole_models_and_the_first_layers_scores():
    net = model("general", dtype=torch.float32)
    folded, found = rope.completeness(net, TOKENS)
    double = model("general")
    want = double(TOKENS)
    assert found["logits"] == far(want, folded(TOKENS)) < 1e-10 and folded.embed.weight.dtype == torch.float64
    assert found["largest_logit"] == pytest.approx(float(want.abs().max()), rel=1e-9)
    x = double.embed.weight[TOKENS[0]]
    x = x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * double.layers[0].norm1.weight
    qkv = (x @ double.layers[0].attention.qkv.weight.T + double.layers[0].attention.qkv.bias).view(12, 3, 2, 8)
    limits = rope.limits(qkv[:, 0].transpose(0, 1), qkv[:, 1].transpose(0, 1), double.B()[0])
    assert list(found.values())[2:] == pytest.approx(list(limits.values()), rel=1e-6, abs=1e-12)
    assert net.embed.weight.dtype == torch.float32  # as it was


# ---- evaluation ----

def bits_by_loops(net, data, length):
    """Bits of each byte of whole windows of data but the first byte, from those before it in its window: (N, length)."""
    rows = []
    for k in range(0, len(data) - length, length):
        p = torch.log_softmax(net(data[None, k:k + length].long())[0].detach().double(), -1)
        rows.append([-float(p[j, int(data[k + j + 1])]) / math.log(2) for j in range(length)])
    return np.array(rows)


@torch.no_grad()
def test_bits_by_position_by_loops():
    net = model("rope")
    data = torch.randint(256, (23,), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    for size in (23, 22, 21, 20, 6):
        got = rope.bits_by_position(net, data[:size], 5, 10)
        want = bits_by_loops(net, data[:size], 5)
        assert got.shape == want.shape == ((size - 1) // 5, 5) and np.abs(got.numpy() - want).max() < 1e-9
    sizes = []
    hook = net.register_forward_hook(lambda m, i, o: sizes.append(i[0].numel()))
    rope.bits_by_position(net, data, 5, 10), rope.bits_by_position(net, data, 5, 3)
    hook.remove()
    assert sizes == [10, 10, 5, 5, 5, 5]


def test_baselines():
    even = torch.arange(256, dtype=torch.uint8).repeat(40)
    got = rope.baselines(even, even)
    assert got["unigram"] == pytest.approx(8) and got["gzip"] < 1 and got["xz"] < 1
    rare = rope.baselines(torch.full((1000,), 7, dtype=torch.uint8), torch.tensor([7, 9], dtype=torch.uint8))
    assert rare["unigram"] == pytest.approx((math.log2(1256 / 1001) + math.log2(1256)) / 2)


def read_svg(path):
    """{name: points} of an SVG's lines, in the scale of its own labels, and its title and labels."""
    root = ElementTree.parse(path).getroot()
    texts = [e for e in root if e.tag.endswith("text")]
    lines = [e for e in root if e.tag.endswith("path") and e.get("stroke-width") == "2"]
    names = [e.text or "" for e in texts if e.get("x") == "550"]

    def scale(labels, axis):  # from where two labels stand and what they say
        (a, b), (u, v) = [[f(e) for e in labels] for f in (lambda e: float(e.get(axis)), lambda e: float(e.text))]
        return lambda p: u + (p - a) * (v - u) / (b - a)
    ups = [e for e in texts if e.get("x") == "52"]
    across = [e for e in texts if e.get("y") == "308"]
    y = scale([ups[0], ups[-1]], "y")
    place = [float(e.get("x")) for e in across], [float(e.text) for e in across]
    curves = {}
    for name, line in zip(names, lines, strict=True):
        points = [tuple(map(float, p.split(","))) for p in line.get("d").replace("M", "L").split("L")[1:]]
        curves[name] = [(a, y(b)) for a, b in points]
    return curves, [e.text for e in texts], place


def test_curves_are_an_svg():
    curves = {"one & <two>": ([1, 2, 4], [0.5, 1, 2]), "gap": ([1, 2, 4, 8], [3, math.nan, 0, 1])}
    rope.draw_curves(Path("a.svg"), "title", "x", curves, log2=True)
    got, texts, place = read_svg("a.svg")
    assert {"title", "x", *curves} <= set(texts) and place[1] == pytest.approx([1, 2 ** 0.5, 2, 2 ** 1.5, 4, 2 ** 2.5, 8], rel=1e-3)
    for name, (xs, ys) in curves.items():
        want = [(60 + 160 * math.log2(x), y) for x, y in zip(xs, ys) if math.isfinite(y)]
        assert np.allclose(got[name], want, atol=0.06)
    assert Path("a.svg").read_text().count("M") == 2 * 2 - 1 + 7  # a line in one piece, one in two, 7 grid lines
    rope.draw_curves(Path("b.svg"), "linear", "x", {"": ([10, 20, 50], [-3, 5, 4])})
    got, texts, place = read_svg("b.svg")
    assert np.allclose(got[""], [(60, -3), (180, 5), (540, 4)], atol=0.06) and place[1] == [10, 20, 30, 40, 50]
    for k, xy in enumerate((([], []), ([3], [0.0]), ([1, 2], [5, 5]), ([1, 2], [math.inf, math.nan]))):
        rope.draw_curves(Path(f"{k}.svg"), "t", "x", {"": xy})
        ElementTree.parse(f"{k}.svg")


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
@example(0.0, 0.0)
@example(3.0, 1e-9)
def test_ticks_are_few_and_enclose(low, span):
    got = rope.ticks(low, low + span)
    slack = 1e-9 * max(abs(got[0]), abs(got[-1]))
    assert got[0] <= low + slack and got[-1] >= low + span - slack and 2 <= len(got) <= 9


# ---- wiring ----

@pytest.fixture
def text():
    """4,000 bytes whose three parts differ: letters to train on, validate on, test on."""
    parts = [bytes(np.random.default_rng(k).choice(list(letters), size=size).tolist()) for k, (letters, size) in
             enumerate(((b"abcab ", 3600), (b"bcd", 200), (b"cda ", 200)))]
    Path("a.txt").write_bytes(b"".join(parts))
    return TINY


def parts_of(path="a.txt"):
    whole = torch.tensor(list(Path(path).read_bytes()), dtype=torch.uint8)
    return whole[:3600], whole[3600:3800], whole[3800:]


def naive_generator(*key):
    mixed = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))


def load(folder="out/rope", position=None, width=16, layers=2, heads=2, context=16):
    state = torch.load(f"{folder}/ckpt.pt", weights_only=True)
    net = rope.LanguageModel(position or state["config"]["position"], width, layers, heads, context)
    net.load_state_dict(state["model"])
    return net, state


def run(*argv):
    assert rope.main([str(word) for word in argv]) == 0


@BOTH
def test_a_naive_second_run_reaches_the_same_weights(text, position):
    """Five steps: windows, loss, mean, clipping, warm-up and cosine, Adam, all written out."""
    run(*text, "--steps", 5, "--position", position, "--seed", 3)
    train, _, _ = parts_of()
    torch.manual_seed(3)
    net = rope.LanguageModel(position, 16, 2, 2, 16)
    first = [torch.zeros_like(p) for p in net.parameters()]
    second, norms = [torch.zeros_like(p) for p in net.parameters()], []
    for step in range(5):
        starts = torch.randint(3600 - 16, (4, 1), generator=naive_generator(3, step))
        rows = torch.stack([train[k:k + 17] for k in starts[:, 0].tolist()]).long()
        p = torch.softmax(net(rows[:, :-1]), -1)
        value = -sum(torch.log2(p[b, k, rows[b, k + 1]]) for b in range(4) for k in range(16)) / 64
        grads = torch.autograd.grad(value, list(net.parameters()))
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in grads)))
        lr = 1e-2 * min(1, (step + 1) / 3) * (1 + math.cos(math.pi * step / 5)) / 2
        with torch.no_grad():
            for p, g, m, v in zip(net.parameters(), grads, first, second):
                g = g * min(1, 0.5 / norms[-1])
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.98 * v + 0.02 * g * g)
                p -= lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.98 ** (step + 1))).sqrt() + 1e-8)
    assert max(norms) > 0.6  # or clipping would not be seen
    got, state = load()
    for (name, p), q in zip(net.named_parameters(), got.parameters()):
        assert far(p, q) < 2e-4, name  # Adam's first steps magnify rounding where a gradient is near 0
    assert sum(float((p - q).detach().square().sum()) for p, q in zip(net.parameters(), got.parameters())) < 1e-6
    assert state["step"] == 5 and state["config"]["lr"] == 1e-2 and state["script"] == "rope"
    rows = [line.split(",") for line in Path("out/rope/log.csv").read_text().splitlines()]
    assert rows[0] == ["step", "items", "rate", "elapsed", "bits", "lr"] and rows[1][:2] == ["1", "64"]
    assert float(rows[-1][5]) == pytest.approx(np.mean([1e-2 * min(1, (k + 1) / 3) * (1 + math.cos(math.pi * k / 5)) / 2
                                                        for k in range(1, 5)]))


@BOTH
def test_the_report_computed_again_from_the_checkpoint(text, position, capsys):
    """Every number and file, by naive code, on the test part and its first --eval-bytes, a whole number of windows."""
    run(*text, "--steps", 12, "--position", position, "--sample-seed", 5, "--prompt", "\u00e9b", "--temperature", 0.7)
    out, (train, _, test) = Path("out/rope"), parts_of()
    said, net = capsys.readouterr().out, load()[0]
    m = json.loads((out / "metrics.json").read_text())
    bits = bits_by_loops(net.double(), test[:129], 16)
    assert bits.shape == (8, 16) and m["test_bytes"] == 128
    assert m["test_bits_per_byte"] == pytest.approx(bits.mean(), abs=1e-4) and f"{bits.mean():.3f} bits" in said
    assert m["test_standard_error"] == pytest.approx(bits.mean(1).std(ddof=1) / math.sqrt(8), rel=1e-3)
    assert abs(bits.mean() - bits_by_loops(net, train[:129], 16).mean()) > 0.05  # another part would be seen
    raw = bytes(test[1:129].tolist())
    count = np.bincount(train.numpy(), minlength=256) + 1
    assert m["baselines"] == pytest.approx({
        "unigram": -np.mean([math.log2(count[k] / count.sum()) for k in raw]),
        "gzip": 8 * len(gzip.compress(raw, 9)) / 128, "xz": 8 * len(lzma.compress(raw, preset=9)) / 128})
    octaves = {n: bits[:, n // 2:n].mean() for n in (1, 2, 4, 8, 16)}
    assert {int(n): value for n, value in m["bits_by_position"].items()} == pytest.approx(octaves, abs=1e-4)
    drawn, texts, place = read_svg(out / "bits.svg")
    assert np.allclose([y for _, y in drawn[""]], list(octaves.values()), atol=0.01)
    assert [x for x, _ in drawn[""]] == pytest.approx([60, 180, 300, 420, 540])
    assert m["step"] == 12 and m["seed"] == 0 and 0 < m["train_seconds"] < 60 and \
        m["bytes_per_second"] == pytest.approx(12 * 64 / m["train_seconds"])
    files = {"ckpt.pt", "log.csv", "metrics.json", "samples.txt", "bits.svg"}
    if position == "general":
        folded, state = load(out / "folded")
        assert state["config"]["position"] == "rope" and state["step"] == 12 and len(state["opt"]["state"]) == 0
        theta = [rope.canonical(B)[1] for B in net.B().detach()[1]]
        assert far(folded.theta[1], torch.stack(theta)) < 1e-12 and not torch.equal(*folded.theta[0])
        assert far(net(TOKENS), folded(TOKENS)) < 1e-4
        _, found = rope.completeness(load()[0], test[None, :16].long())
        assert m["completeness"].keys() == found.keys()
        assert list(m["completeness"].values()) == pytest.approx(list(found.values()), rel=1e-3, abs=1e-9)
        assert said.count("nothing is lost") == 2 and said.count("P cannot be folded") == 3
        assert f"{m['completeness']['logits']:.1e}" in said and f"{m['completeness']['largest_logit']:.1f}" in said
        drawn, texts, place = read_svg(out / "theta.svg")
        want = {"RoPE": rope.thetas(8)} | {f"layer {i}": folded.theta[i].min(0).values for i in (0, 1)}  # of 2: the lower
        assert drawn.keys() == want.keys()
        for name, row in want.items():
            assert np.allclose([y for _, y in drawn[name]], row.log10(), atol=0.02), name
        net, files = folded, files | {"folded", "theta.svg"}
    assert {p.name for p in out.iterdir()} == files
    net, g = net.float(), naive_generator(5)
    tokens = torch.tensor([list("\u00e9b".encode())] * 2)
    for _ in range(6):
        tokens = torch.cat([tokens, first_clock((net(tokens)[:, -1:] / 0.7).softmax(-1), g)], 1)
    want = [bytes(row).decode("utf-8", "replace") for row in tokens.tolist()]
    assert (out / "samples.txt").read_bytes().decode() == f"\n{'-' * 80}\n".join(want) + "\n" and want[0] != want[1]


@BOTH
def test_a_look_on_the_way(text, position, capsys, monkeypatch):
    """At --save-every: bits of the validation part and texts, by the weights of that step."""
    then, save = [], rope.save_checkpoint

    def keep(args, step, parts, **more):
        if step == 2:
            then.append({k: v.clone() for k, v in parts["model"].state_dict().items()})
        save(args, step, parts, **more)
    monkeypatch.setattr(rope, "save_checkpoint", keep)
    run(*text, "--steps", 3, "--position", position, "--save-every", 2, "--length", 40)
    net = load()[0]
    net.load_state_dict(then[0])
    bits = bits_by_loops(net.double(), parts_of()[1][:129], 16).mean()
    assert f"validation {bits:.3f}" in capsys.readouterr().out
    net = net.float()
    got = Path("out/rope/samples_000002.txt").read_bytes().decode()
    assert got.startswith("def ") and got != Path("out/rope/samples.txt").read_text()
    tokens = rope.sample(net, torch.tensor([list(b"def ")] * 2), 40, naive_generator(0), 0.8)
    assert got == f"\n{'-' * 80}\n".join(bytes(row).decode("utf-8", "replace") for row in tokens.tolist()) + "\n"


def test_sample_only_from_a_dense_B_a_folded_and_a_plain_one(text, capsys):
    run(*text, "--steps", 2)
    argv = "--prompt abc --length 9 --temperature 0.5 --sample-seed 7 --sample-only 3".split()
    run(*argv)
    want = Path("out/rope/samples_only.txt").read_bytes().decode()
    run(*argv, "--out", "out/rope/folded")
    assert Path("out/rope/folded/samples_only.txt").read_bytes().decode() == want
    tokens = rope.sample(rope.fold(load()[0]), torch.tensor([list(b"abc")] * 3), 9, naive_generator(7), 0.5)
    assert want == f"\n{'-' * 80}\n".join(bytes(row).decode("utf-8", "replace") for row in tokens.tolist()) + "\n"
    shown = "".join("\ufffd" if c not in "\n\t" and (ord(c) < 32 or 127 <= ord(c) < 160) else c for c in want)
    assert shown != want  # a terminal would obey
    assert shown in capsys.readouterr().out


def test_a_folded_run_goes_on_as_plain_rope(text):
    run(*text, "--steps", 2)
    run("--resume", "--out", "out/rope/folded", "--steps", 4, "--eval-bytes", 127, "--length", 6)
    state = torch.load("out/rope/folded/ckpt.pt", weights_only=True)
    before = torch.load("out/rope/ckpt.pt", weights_only=True)
    assert state["step"] == 4 and state["config"]["position"] == "rope" and "theta" in state["model"]
    assert not torch.equal(state["model"]["last.bias"], before["model"]["last.bias"])
    m = json.loads(Path("out/rope/folded/metrics.json").read_text())
    assert "completeness" not in m and m["test_bytes"] == 112  # whole windows of 127 bytes
    assert m["bytes_per_second"] * m["train_seconds"] == pytest.approx(2 * 64)  # of the steps of this run


MATTERS = dict(  # flag: what a run with another value has otherwise: the weights, the texts, the report; + what it must keep
    data=("b.txt", "weights"), steps=(4, "weights"), batch_size=(2, "weights"), seed=(1, "weights"),
    position=("rope", "weights"), context=(8, "weights"), width=(24, "weights"), layers=(1, "weights"), heads=(1, "weights"),
    lr=(1e-3, "weights"), warmup=(1, "weights"), clip_grad=(1e-3, "weights"), save_every=(1, "looks"),
    eval_bytes=(100, "report"), samples=(3, "texts"), length=(9, "texts"), prompt=("x", "texts"),
    temperature=(3.0, "texts"), sample_seed=(1, "texts"))


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """A folder with a.txt and out, that the runs with one flag changed are compared with."""
    folder = tmp_path_factory.mktemp("plain")
    rng = np.random.default_rng(0)
    (folder / "a.txt").write_bytes(bytes(rng.choice(list(b"abcd "), size=4000).tolist()))
    (folder / "b.txt").write_bytes(bytes(rng.choice(list(b"abc "), size=4000).tolist()))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(*TINY, "--steps", 3, "--out", "plain")
    return folder


@pytest.mark.parametrize("flag", MATTERS)
def test_every_flag_matters_and_only_where_it_should(plain_run, flag, monkeypatch):
    monkeypatch.chdir(plain_run)
    value, what = MATTERS[flag]
    run(*TINY, "--steps", 3, f"--{flag.replace('_', '-')}", value, "--out", flag)
    a, b = ({"weights": torch.load(f"{out}/ckpt.pt", weights_only=True)["model"],
             "texts": Path(out, "samples.txt").read_text(), "looks": sorted(p.name for p in Path(out).glob("*_0*")),
             "report": json.loads(Path(out, "metrics.json").read_text())["test_bits_per_byte"]} for out in ("plain", flag))
    for state in (a, b):
        state["weights"] = {k: v.tolist() for k, v in state["weights"].items()}
    other = {key for key in a if a[key] != b[key]}
    assert what in other and (what == "weights" or other == {what})


def test_every_flag_of_the_tables_is_tried():
    args = rope.parse_args([])
    common = "gpu out resume cache fp32 compile given config script own sample_only".split()
    assert set(vars(args)) - set(common) == set(MATTERS)


def test_defaults():
    args = rope.parse_args([])
    assert args.position == "general" and args.data == "python" and not args.given
    gpu = rope.parse_args(["--gpu"])
    assert gpu.position == "rope" and gpu.width == 512 and rope.parse_args(["--gpu", "--width", "64"]).width == 64


@pytest.mark.parametrize("argv, word", [
    ("--position up", "--position"), ("--width 18 --heads 4", "--heads 4"), ("--context 7", "--context"),
    ("--prompt=", "--prompt"), ("--eval-bytes 31", "--eval-bytes 31: 2 times --context at least, for a standard error, 32"), ("--temperature 0", "--temperature"),
    ("--layers x", "--layers"), ("--context 100 --eval-bytes 200", "--context 100")])
def test_wrong_flags_are_refused(text, capsys, argv, word):
    try:
        code = rope.main([*text, *argv.split()])
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code == 2 and "Traceback" not in err and word in err.splitlines()[-1], err
    assert not Path("out").exists()


def test_a_prompt_of_any_bytes(text):
    run(*text, "--steps", 1, "--prompt", "\udcff\u4f60")  # as Python reads the byte ff of a command line
    assert Path("out/rope/samples.txt").read_text().startswith("\ufffd\u4f60")


@pytest.mark.parametrize("step", [0, 1, 2, 3, 9, 19])
def test_learning_rate(step):
    args = rope.parse_args("--lr 2 --steps 20 --warmup 4".split())
    want = [0.5, 1, 1.5, 2][min(step, 3)] * (0.5 + 0.5 * math.cos(math.pi * step / 20))
    assert rope.learning_rate(step, args) == pytest.approx(want)


def test_every_window_is_drawn(text, monkeypatch):
    seen = []

    def loss(net, tokens):
        seen.append(tokens)
        return next(net.parameters()).sum() * 0 + torch.zeros(tokens.shape[0], tokens.shape[1] - 1)
    Path("a.txt").write_bytes(bytes(range(200)) + bytes(200))
    monkeypatch.setattr(rope, "as_utf8", lambda raw, what: raw)  # which it is not
    monkeypatch.setattr(rope, "loss", loss)
    run(*text, *"--context 8 --batch-size 64 --steps 120 --position rope --eval-bytes 16".split())
    tokens = torch.cat(seen[:120])
    assert all(len(part) == 64 and part.shape[1] == 9 for part in seen[:120])
    inside = tokens[tokens[:, -1] > 8]
    assert torch.equal(inside[:, 1:], inside[:, :-1] + 1)  # windows of the text itself
    starts = torch.bincount(inside[:, 0], minlength=192)
    want = 120 * 64 / 352  # of 360 training bytes the last start is 351; those of 0, ..., 190 are told apart
    assert not starts[192:].any() and ((starts[1:191] - want) ** 2 / want).sum() < 190 + 5 * math.sqrt(2 * 190)
    last = bytes(199 - k for k in range(200)) + bytes(200)
    Path("a.txt").write_bytes(last[::-1])  # so that the last window of the training part is told apart
    seen.clear()
    run(*text, *"--context 8 --batch-size 512 --steps 9 --position rope --eval-bytes 16 --out b".split())
    tokens = torch.cat(seen[:9])
    assert int(tokens.max()) == 359 - 200


@BOTH
def test_learns(position):
    """A sentence over and over: almost no bits are left (2.9 by frequencies)."""
    Path("a.txt").write_bytes((b"the cat sat on the mat. " * 125)[:3000])
    run(*TINY, *"--steps 120 --layers 1 --clip-grad 1 --batch-size 8 --position".split(), position)
    m = json.loads(Path("out/rope/metrics.json").read_text())
    assert m["test_bits_per_byte"] < 0.7 and m["baselines"]["unigram"] > 2.5


@BOTH
def test_compile_reaches_training_evaluation_and_sampling(text, position, monkeypatch):
    """Every network that is asked for a loss or for texts is a compiled one."""
    compiled, asked = [], []
    monkeypatch.setattr(nn.Module, "compile", lambda net: compiled.append(net))
    for name in ("loss", "sample"):
        real = getattr(rope, name)
        monkeypatch.setattr(rope, name, lambda net, *a, real=real: asked.append(net) or real(net, *a))
    run(*text, "--steps", 2, "--position", position)
    assert asked and not compiled
    asked.clear()
    run(*text, "--steps", 2, "--position", position, "--compile", "--out", "b")
    run("--sample-only", 1, "--length", 2, "--compile", "--out", "b")
    assert len(asked) > 5 and all(any(net is other for other in compiled) for net in asked)


@torch.no_grad()
def test_compiled_sampling_makes_no_graph_for_each_byte():
    graphs = []

    def backend(graph, inputs):
        graphs.append(len(inputs))
        return graph.forward
    torch._dynamo.reset()
    net = model("rope", dtype=torch.float32, layers=1)
    want = rope.sample(net, TOKENS[:, :3], 20, torch.Generator().manual_seed(1))
    nn.Module.compile(net, backend=backend)
    assert torch.equal(rope.sample(net, TOKENS[:, :3], 20, torch.Generator().manual_seed(1)), want)
    assert 1 <= len(graphs) <= 3
    torch._dynamo.reset()


# ---- the experiments ----

@given(st.integers(1, 12), SEEDS)
def test_9708_rerope_by_loops(w, seed):
    L, d = 9, 6
    q, k = draws(2, L, d, seed=seed), draws(2, L, d, seed=seed + 1)
    theta = rope.thetas(d)
    near = rope.rotary_table(torch.arange(L), theta, torch.float64)
    got = longer.rerope_scores(q, k, near, rope.rotary_table(torch.full((L,), w), theta, torch.float64), w)
    for m in range(L):
        for n in range(m + 1):
            R = turned(theta, max(n - m, -w))
            assert float(got[1, m, n]) == pytest.approx(float(q[1, m] @ R @ k[1, n]), abs=1e-11)
    if w >= L:
        assert torch.equal(got, rope.rotate(q, *near) @ rope.rotate(k, *near).mT)  # plain RoPE, bit for bit


@given(st.integers(2, 64), st.floats(1, 64))
def test_9675_ntk_is_another_base_and_1_changes_nothing(half, s):
    theta = rope.thetas(2 * half)
    assert torch.equal(longer.ntk_thetas(theta, 1.0), theta)
    d = 2 * half
    assert far(longer.ntk_thetas(theta, s), rope.thetas(d, 10000 * s ** (d / (d - 2)))) < 1e-12


@torch.no_grad()
def test_ways_to_longer_texts_in_the_model():
    net = model("rope")
    plain, interpolated, ntk, clipped = longer.ways(net).values()
    assert plain is net
    assert far(interpolated.theta, net.theta / 8) == 0 and far(ntk.theta[1, 0], longer.ntk_thetas(rope.thetas(8), 8.0)) < 1e-15
    base = net(TOKENS)
    assert far(longer.with_rerope(net, 12)(TOKENS), base) < 1e-12 < 1e-6 < far(longer.with_rerope(net, 4)(TOKENS), base)
    assert far(interpolated(TOKENS, 8 * torch.arange(12)), base) < 1e-11  # positions / 8
    assert torch.equal(net(TOKENS), base) and clipped.layers[0].attention.w == 8


@torch.no_grad()
@pytest.mark.parametrize("code", codes.CODES[2:])
def test_rivals_are_their_formulas(code):
    net = rival(code).double()
    if code == "alibi":  # 2108.12409: slopes 2^{-8/H}, 2^{-16/H}, ...
        seen = []
        hooks = [net.layers[0].norm1.register_forward_hook(lambda m, i, o: seen.append(o)),
                 net.layers[0].attention.register_forward_hook(lambda m, i, o: seen.append(o))]
        net(TOKENS)
        for hook in hooks:
            hook.remove()
        net.theta.zero_()  # the loops turn nothing
        want = attention_by_loops(net, seen[0][2], 0, lambda h, m, n: -2.0 ** (-4 * (h + 1)) * (m - n))
        assert far(seen[1][2], want) < 1e-10
        return
    for layer in net.layers:  # what is added to the bytes is all there is
        for p in (*layer.attention.out.parameters(), *layer.mlp[2].parameters()):
            nn.init.zeros_(p)
    table = torch.tensor([[f(n / 10000 ** (2 * i / 16)) for f in (math.cos, math.sin) for i in range(8)] for n in range(12)])
    added = dict(nope=0, learned=net.place.weight[:12] if code == "learned" else 0, sinusoidal=table)[code]
    assert far(net(TOKENS), net.last(net.norm(net.embed(TOKENS) + added)).float()) < 1e-5


def test_experiments_run_for_two_steps(text, capsys):
    """Their tables have the rows and numbers that they say; the figure is an SVG."""
    short = [*text, *"--steps 2 --layers 1 --eval-bytes 256".split()]
    Path("a.txt").write_bytes(Path("a.txt").read_bytes() * 2)
    rows = longer.main([*short, "--figure", "f.svg"])
    assert len(rows) == 4 and read_svg("f.svg")[0].keys() == rows.keys()
    net = rope.fold(load(layers=1)[0])
    bits = bits_by_loops(net, torch.tensor(list(Path("a.txt").read_bytes()), dtype=torch.uint8)[7600:][:129], 128)
    want = [bits[:, a:b].mean() for a, b in ((0, 16), (0, 32), (0, 64), (0, 128), (16, 32), (32, 64), (64, 128))]
    assert rows["rope"] == pytest.approx(want, abs=1e-4)
    again = longer.main(["--resume", "--out", "out/rope", "--eval-bytes", "256", "--length", "6"])
    assert {name: pytest.approx(row) for name, row in rows.items()} == again
    table = codes.main([*short, "--codes", "general", "learned", "alibi", "--seeds", "0", "1"])
    assert [len(rows) for rows in table.values()] == [2] * 6 and list(table)[4:] == ["learned", "alibi"]
    assert table["general"][0][1:] == pytest.approx(rows["rope"][:4]) and "| alibi | " in capsys.readouterr().out
    figures.main(["--out", "figures"])
    got, _, _ = read_svg("figures/decay.svg")
    assert got["base 10000"][0][1] == pytest.approx(31.5, abs=0.2) and len(got) == 2


@pytest.mark.parametrize("name", ["rope_extrapolation", "rope_codes", "rope_figures"])
def test_experiments_run_from_anywhere(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXPERIMENTS / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0 and f"tests/experiments/{name}.py" in capsys.readouterr().out
