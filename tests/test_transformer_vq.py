"""transformer_vq.py against post 9844 and oracles written out here, in float64: loops over tokens, one-hot matrices."""

import argparse
import csv
import functools
import json
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
import transformer_vq as tvq
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

FORMS = [tvq.vq_attention, functools.partial(tvq.vq_attention, at_once=True)]
both_forms = pytest.mark.parametrize("form", FORMS, ids=["loop", "at_once"])
SEEDS = st.integers(0, 2**31)
# n tokens, c codes, M the window, L the block, d_k, d_v
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 7), st.integers(0, 9), st.integers(1, 9), st.integers(1, 4),
                  st.integers(1, 4))
TINY = ("--data text.txt --width 16 --layers 2 --d-k 8 --d-v 16 --codes 8 --window 4 --block 4 --update-len 8 "
        "--segments 2 --batch-size 4 --eval-bytes 128 --length 12 --samples 2 --warmup 2 --recall-steps 0 "
        "--sample-seed 3").split()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def experiment(name):
    return runpy.run_path(str(Path(__file__).parent / f"experiments/transformer_vq_{name}.py"))


class Case:
    """Random q, k, v, codebook and bias, with the codes by brute force."""

    def __init__(self, sizes, seed, rows=2, each=False):
        self.n, self.c, self.M, self.L, d_k, d_v = sizes
        self.q, self.k = draws(2, rows, self.n, d_k, seed=seed)
        self.v, self.C = draws(rows, self.n, d_v, seed=seed + 1), draws(self.c, d_k, seed=seed + 2)
        self.bias = draws(*((rows, self.n) if each else ()), self.M + 1, seed=seed + 3)
        self.ids = (self.k[:, :, None] - self.C).square().sum(-1).argmin(-1)
        self.k_hat = self.C[self.ids]

    def at(self, *cut):
        """The arguments of a form for some of the tokens."""
        here = slice(*cut)
        bias = self.bias if self.bias.ndim == 1 else self.bias[:, here]
        return self.q[:, here], self.k_hat[:, here], self.ids[:, here], self.v[:, here], self.C, bias

    def B(self, b, i, j):
        row = self.bias if self.bias.ndim == 1 else self.bias[b, i]
        return row[i - j] if i - j <= self.M else 0

    def naive(self, b, i, keys=None):
        """Row i of softmax(Q K_hat^T + B) V, with nothing but sums over the tokens up to i."""
        keys = self.k_hat if keys is None else keys
        e = [torch.exp(self.q[b, i] @ keys[b, j] + self.B(b, i, j)) for j in range(i + 1)]
        return sum(x * self.v[b, j] for j, x in enumerate(e)) / sum(e)

    def all(self, **how):
        return torch.stack([torch.stack([self.naive(b, i, **how) for i in range(self.n)]) for b in range(len(self.q))])


def far(a, b):
    return float((a - b).detach().abs().max()) if a.numel() else 0.0


def same_state(a, b, tolerance=1e-12):
    assert [x.shape for x in a] == [x.shape for x in b]
    assert torch.equal(a.ids, b.ids) and all(far(x.double(), y.double()) < tolerance for x, y in zip(a, b))


# ---- 9844, the equations in their order ----

@given(SIZES, SEEDS)
def test_9844_1_2_quadratic_is_the_sum_over_tokens(sizes, seed):
    case = Case(sizes, seed)
    assert far(tvq.vq_attention_quadratic(case.q, case.k_hat, case.v, case.bias), case.all()) < 1e-12
    assert far(tvq.vq_attention_quadratic(case.q, case.k, case.v, case.bias), case.all(keys=case.k)) < 1e-12
    o, (k, v) = tvq.exact_attention(case.q, case.k, case.v, case.bias, case.L)
    assert far(o, case.all(keys=case.k)) < 1e-12 and torch.equal(k, case.k) and torch.equal(v, case.v)


@given(SIZES, SEEDS)
def test_9844_2_quantize_is_brute_force(sizes, seed):
    case = Case(sizes, seed)
    ids, k_hat = tvq.quantize(case.k, case.C)
    assert torch.equal(ids, case.ids) and torch.equal(k_hat, case.C[ids])


def test_9844_2_ties_go_to_the_lowest_and_long_inputs_are_cut():
    C = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    ids, _ = tvq.quantize(torch.tensor([[1.0, 0], [0, 1], [2, 2], [-1, -1]]), C)
    assert ids.tolist() == [0, 1, 0, 0]
    k, C = draws(2, 5000, 3, dtype=torch.float32), draws(9, 3, seed=1, dtype=torch.float32)
    ids, k_hat = tvq.quantize(k, C)
    assert ids.shape == (2, 5000) and torch.equal(ids, torch.cdist(k.double(), C.double()).argmin(-1))
    assert torch.equal(k_hat, C[ids])


def test_9844_2_bfloat16_keys_find_the_codes_of_float32():
    """#114: distances in bfloat16 would reach only some of the codes."""
    k, C = draws(500, 16, dtype=torch.bfloat16), draws(200, 16, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ids, k_hat = tvq.quantize(k, C)
    assert torch.equal(ids, torch.cdist(k.double(), C.double()).argmin(-1)) and k_hat.dtype == k.dtype


@given(SIZES, SEEDS)
@example((3, 7, 0, 1, 2, 2), 0)  # more codes than tokens
def test_9844_3_4_encoder_is_softmax_over_all_quantised_keys(sizes, seed):
    case = Case(sizes, seed)
    e = torch.exp(case.q @ case.k_hat.mT)
    want = e @ case.v / (e @ torch.ones(case.n, 1, dtype=e.dtype))  # (3)
    assert far(tvq.vq_attention_encoder(case.q, case.ids, case.v, case.C), want) < 1e-11
    Delta = nn.functional.one_hot(case.ids, case.c).double()
    assert far(torch.exp(case.q @ (Delta @ case.C).mT), torch.exp(case.q @ case.C.T) @ Delta.mT) < 1e-10  # (4)
    assert far(tvq.vq_attention_quadratic(case.q, case.k_hat, case.v), want) < 1e-12


@given(SIZES, SEEDS)
def test_9844_5_cumulative_sum_of_one_hot_rows(sizes, seed):
    case = Case(sizes, seed)
    Delta = nn.functional.one_hot(case.ids, case.c).double()
    U = torch.einsum("bnc,bnd->bncd", Delta, case.v).cumsum(1)
    e = torch.exp(case.q @ case.C.T)
    want = torch.einsum("bnc,bncd->bnd", e, U) / torch.einsum("bnc,bnc->bn", e, Delta.cumsum(1))[..., None]  # (5)
    o, state = FORMS[1](*case.at(None)[:-1], torch.zeros(1, dtype=e.dtype), 1)
    assert far(o, want) < 1e-11 and far(state.U, U[:, -1]) < 1e-12


@given(SIZES, SEEDS)
def test_9844_6_recurrence(sizes, seed):
    case = Case(sizes, seed)
    bias = torch.zeros(1, dtype=torch.float64)
    U, count = torch.zeros(2, case.c, case.v.shape[-1]).double(), torch.zeros(2, case.c).double()
    state = tvq.first_state(case.k_hat, case.ids, case.v, case.C)
    for i in range(case.n):
        Delta = nn.functional.one_hot(case.ids[:, i], case.c).double()
        U, count = U + Delta[:, :, None] * case.v[:, i, None], count + Delta
        e = torch.exp(case.q[:, i] @ case.C.T)
        o, state = tvq.vq_step(case.q[:, i], case.k_hat[:, i], case.ids[:, i], case.v[:, i], case.C, bias, state)
        assert far(o, torch.einsum("bc,bcd->bd", e, U) / (e * count).sum(-1, keepdim=True)) < 1e-11
        assert far(state.U, U) < 1e-12 and torch.equal(state.count, count)


@both_forms
@given(SIZES, SEEDS)
def test_9844_7_8_blocks_without_a_window(form, sizes, seed):
    """(7), (8) with M the mask: exact within the block, all older blocks by their codes, B = 0."""
    case = Case(sizes, seed)
    case.bias, case.M = torch.zeros(1, dtype=torch.float64), 0
    o, state = form(*case.at(None), case.L)
    assert far(o, case.all()) < 1e-11
    assert state.ids.shape[1] == 0 and float(state.count.sum()) == 2 * case.n


@both_forms
@given(SIZES, SEEDS, st.booleans())
@example((7, 2, 9, 3, 2, 2), 0, False)  # all inside the window
@example((40, 1, 3, 8, 2, 2), 0, True)
def test_9844_9_10_is_the_quadratic_form_with_B(form, sizes, seed, each):
    case = Case(sizes, seed, each=each)
    o, _ = form(*case.at(None), case.L)
    assert far(o, case.all()) < 1e-11


@both_forms
def test_9844_10_uses_U_two_blocks_back(form):
    """With M = L the keys of blocks i and i - 1 are attended as they are: other vectors there, other outputs.

    Not so in older blocks, which come by their codes. Token 0 sees itself alone, whatever its key.
    """
    case = Case((20, 3, 4, 4, 2, 2), 5)
    o, _ = form(*case.at(None), 4)
    for block in range(5):
        k_hat = case.k_hat.clone()
        k_hat[:, 4 * block:4 * block + 4] += draws(4, 2, seed=block)
        other, _ = form(case.q, k_hat, *case.at(None)[2:], 4)
        changed = (other - o).abs().amax((0, 2)) > 1e-9
        assert changed.nonzero()[:, 0].tolist() == list(range(max(1, 4 * block), min(20, 4 * block + 8)))


@both_forms
@given(SIZES, SEEDS, st.integers(1, 9))
def test_output_and_state_do_not_depend_on_the_block(form, sizes, seed, other):
    case = Case(sizes, seed)
    (a, s), (b, t) = form(*case.at(None), case.L), form(*case.at(None), other)
    assert far(a, b) < 1e-12
    same_state(s, t)


@given(SIZES, SEEDS, st.booleans())
def test_steps_are_the_block_form(sizes, seed, each):
    case = Case(sizes, seed, each=each)
    want, last = tvq.vq_attention(*case.at(None), case.L)
    state, out = tvq.first_state(case.k_hat, case.ids, case.v, case.C), []
    for i in range(case.n):
        q, k_hat, ids, v, C, bias = case.at(i, i + 1)
        o, state = tvq.vq_step(q[:, 0], k_hat[:, 0], ids[:, 0], v[:, 0], C, bias, state)
        out.append(o)
    assert far(torch.stack(out, 1), want) < 1e-12
    same_state(state, last)


@both_forms
@given(SIZES, SEEDS, st.integers(1, 39), st.booleans())
def test_two_passes_are_one_and_rows_are_independent(form, sizes, seed, cut, each):
    case = Case(sizes, seed, each=each)
    cut = min(cut, case.n - 1)
    want, last = form(*case.at(None), case.L)
    if cut:
        a, state = form(*case.at(0, cut), case.L)
        b, state = form(*case.at(cut, None), case.L, state)
        assert far(torch.cat([a, b], 1), want) < 1e-12
        same_state(state, last)
    q, k_hat, ids, v, C, bias = case.at(None)
    alone, _ = form(q[1:], k_hat[1:], ids[1:], v[1:], C, bias[1:] if each else bias, case.L)
    assert far(alone, want[1:]) < 1e-13


# ---- causality, counts, empty codes, range ----

@both_forms
@given(SIZES, SEEDS, st.integers(0, 39))
def test_nothing_comes_from_later_tokens(form, sizes, seed, t):
    """To the bit: whatever q, k, code and value of token t are, the outputs before it stay."""
    case = Case(sizes, seed)
    t = min(t, case.n - 1)
    want, _ = form(*case.at(None), case.L)
    case.q[:, t], case.v[:, t] = 7.0, -5.0
    case.ids[:, t] = (case.ids[:, t] + 1) % case.c
    case.k_hat = case.C[case.ids]
    got, _ = form(*case.at(None), case.L)
    assert torch.equal(got[:, :t], want[:, :t]) and far(got[:, t], want[:, t]) > 0


@both_forms
@given(SIZES, SEEDS, st.integers(0, 39))
def test_a_nan_does_not_reach_earlier_blocks(form, sizes, seed, t):
    """With blocks of one token it stays at >= t; in a block a weight of 0 times NaN is NaN, as in any softmax."""
    case = Case(sizes, seed)
    t = min(t, case.n - 1)
    for name in ("q", "k_hat", "v"):
        for L in (1, case.L):
            broken = Case(sizes, seed)
            getattr(broken, name)[0, t] = math.nan
            o, _ = form(*broken.at(None), L)
            assert o[0, :t // L * L].isfinite().all() and o[1].isfinite().all()
            assert o[0, t].isnan().all()


@both_forms
def test_jacobian_is_a_triangle(form):
    """d out_i / d v_j: the attention weights. Zero for j > i, positive for every j <= i, with every code in use."""
    case = Case((12, 3, 2, 4, 3, 1), 3, rows=1)
    def out(v):
        return form(case.q, case.k_hat, case.ids, v, case.C, case.bias, 4, None, True)[0].flatten()
    J = torch.autograd.functional.jacobian(out, case.v)[:, 0, :, 0]
    assert torch.equal(J.triu(1), torch.zeros_like(J)) and (J.tril() + torch.ones_like(J).triu(1) > 0).all()
    assert far(J.sum(1), torch.ones(12, dtype=J.dtype)) < 1e-12


@both_forms
@given(SIZES, SEEDS)
def test_identity_values_give_the_weights(form, sizes, seed):
    case = Case(sizes, seed)
    case.v = torch.eye(case.n, dtype=torch.float64).expand(2, -1, -1).contiguous()
    weights, _ = form(*case.at(None), case.L)
    scores = case.q @ case.k_hat.mT
    for i in range(case.n):
        for j in range(i + 1):
            scores[:, i, j] += case.B(0, i, j)
    assert far(weights, scores.masked_fill(torch.ones(case.n, case.n).triu(1) > 0, -math.inf).softmax(-1)) < 1e-12


@both_forms
@given(SIZES, SEEDS)
def test_counts_and_window_are_the_tokens_seen(form, sizes, seed):
    case = Case(sizes, seed)
    _, state = form(*case.at(None), case.L)
    w = min(case.M, case.n)
    old = nn.functional.one_hot(case.ids[:, :case.n - w], case.c).double()
    assert torch.equal(state.count, old.sum(1)) and far(state.U, old.mT @ case.v[:, :case.n - w]) < 1e-12
    assert torch.equal(state.ids, case.ids[:, case.n - w:]) and torch.equal(state.v, case.v[:, case.n - w:])


@pytest.mark.parametrize("codes", [1, 3])
def test_counts_are_right_after_70000_tokens_of_bfloat16(codes):
    """bfloat16 itself stops at 256. With one code, no bias and no window the output is the running mean of V."""
    n, g = 70_000, torch.Generator().manual_seed(0)
    ids = torch.randint(codes, (1, n), generator=g)
    C = torch.zeros(codes, 2)
    v = draws(1, n, 2, dtype=torch.bfloat16)
    q = k_hat = torch.zeros(1, n, 2, dtype=torch.bfloat16)
    for block in (1000, 3):
        o, state = None, None
        for i in range(0, n if block > 3 else 3000, 10_000):
            here = slice(i, i + (10_000 if block > 3 else 3000))
            o, state = tvq.vq_attention(q[:, here], k_hat[:, here], ids[:, here], v[:, here], C, torch.zeros(1), block,
                                        state)
        seen = n if block > 3 else 3000
        assert state.count.dtype == torch.float32 == state.U.dtype
        assert torch.equal(state.count[0].long(), torch.bincount(ids[0, :seen], minlength=codes))
        assert far(o[0, -1].double(), v[0, :seen].double().mean(0)) < 0.01


def test_sums_beyond_the_range_of_float16():
    """65,504 is its largest number; means fit."""
    o, state = torch.ones(1, 70_000, 2, dtype=torch.float16), None
    zeros, ids = torch.zeros_like(o), torch.zeros(1, 70_000, dtype=torch.long)
    for _ in range(2):
        o, state = tvq.vq_attention(zeros, zeros, ids, o, torch.zeros(1, 2), torch.zeros(1), 10_000, state)
    assert far(o.double(), 1) < 1e-3 and int(state.count) == 140_000


@both_forms
def test_one_code_is_the_running_mean(form):
    case = Case((30, 1, 3, 4, 2, 2), 1)
    case.C.zero_()
    case.k_hat.zero_()
    o, _ = form(*case.at(None), 4)
    for i in range(30):
        e = torch.tensor([math.exp(case.bias[i - j]) if i - j <= 3 else 1.0 for j in range(i + 1)], dtype=torch.float64)
        assert far(o[:, i], (e[:, None] * case.v[:, :i + 1]).sum(1) / e.sum()) < 1e-12


@both_forms
def test_unused_codes_weigh_nothing(form):
    """However near to the query; with one of 7 used, and none used (the first block): finite, gradients too."""
    case = Case((9, 7, 1, 2, 3, 2), 2)
    case.ids.fill_(4)
    case.C[0] = 500 * case.q[0, 8]
    case.k_hat = case.C[case.ids]
    q, v = case.q.clone().requires_grad_(), case.v.clone().requires_grad_()
    o, _ = form(q, case.k_hat, case.ids, v, case.C, case.bias, 2, None, True)
    assert far(o, case.all()) < 1e-12
    o.sum().backward()
    assert q.grad.isfinite().all() and v.grad.isfinite().all()
    first, _ = form(*case.at(0, 1), 2)
    assert far(first, case.v[:, :1]) < 1e-15
    e = tvq.vq_attention_encoder(case.q, case.ids, case.v, case.C)
    assert far(e, tvq.vq_attention_quadratic(case.q, case.k_hat, case.v)) < 1e-12


@both_forms
def test_large_scores_do_not_overflow(form):
    case = Case((40, 5, 3, 4, 3, 2), 4)
    case.q *= 1e3
    want = form(*case.at(None), 4)[0]
    assert far(want, case.all()) < 1e-9 or not case.all().isfinite().all()  # the naive sum itself overflows
    got, _ = form(*(x if x.dtype == torch.int64 else x.float() for x in case.at(None)), 4)
    encoder = tvq.vq_attention_encoder(case.q.float(), case.ids, case.v.float(), case.C.float())
    assert got.isfinite().all() and encoder.isfinite().all()
    assert far(got.double(), want) < 1e-2  # float32 of scores of some 10^3: 1e-4 each


# ---- gradients: 9844, 梯度回传 ----

def direct(case, i, j):
    """Whether query i's block attends key j as it is: the block begins at most M after j."""
    return j >= i // case.L * case.L - case.M


def gradients(o, case, *leaves):
    return torch.autograd.grad((o * draws(*o.shape, seed=9)).sum(), leaves)


@both_forms
@pytest.mark.parametrize("through", [False, True])
@given(SIZES, SEEDS, st.booleans())
@settings(max_examples=10)
def test_gradients_are_the_posts(form, through, sizes, seed, each):
    """Straight-through where keys are attended as they are, none through U; with `through` the values' are whole."""
    case = Case((min(sizes[0], 20), *sizes[1:]), seed, each=each)
    k, leaves = case.k.clone().requires_grad_(), []
    for name in ("q", "v", "bias", "C"):
        setattr(case, name, getattr(case, name).clone().requires_grad_())
        leaves.append(getattr(case, name))
    ids, k_hat = tvq.quantize(k, case.C)
    o, _ = form(case.q, k_hat, ids, case.v, case.C.detach(), case.bias, case.L, None, through)
    got = gradients(o, case, k, *leaves[:3])
    rows = []
    for b in range(2):
        for i in range(case.n):
            e = [torch.exp(case.q[b, i] @ (k_hat[b, j] if direct(case, i, j) else k_hat[b, j].detach())
                           + case.B(b, i, j)) for j in range(i + 1)]
            v = [case.v[b, j] if direct(case, i, j) or through else case.v[b, j].detach() for j in range(i + 1)]
            rows.append(sum(x * y for x, y in zip(e, v)) / sum(e))
    want = gradients(torch.stack(rows).view_as(o), case, k, *leaves[:3])
    assert all(far(a, b) < 1e-10 for a, b in zip(got, want))
    exact = tvq.vq_attention_quadratic(case.q, k_hat, case.v, case.bias) if not each else None
    if exact is not None:
        full = gradients(exact, case, case.q, case.v)
        assert far(got[1], full[0]) < 1e-10  # dQ is always the quadratic form's
        assert not through or far(got[2], full[1]) < 1e-10
    with pytest.raises(RuntimeError):  # the codebook has no gradient: not by quantize
        torch.autograd.grad(k_hat.sum(), case.C)


@given(SIZES, SEEDS, st.integers(0, 12), st.booleans())
@example((8, 3, 4, 4, 2, 2), 1, 4, False)  # a full window before which there was nothing
@settings(max_examples=40)
def test_the_gradient_by_hand_is_autograds_of_the_clear_form(sizes, seed, before, each):
    """`Blocks` beside a loop over `block_attention`: output, state and gradients, from a carried state too."""
    case = Case((sizes[0] + before, *sizes[1:]), seed, each=each)
    state = tvq.first_state(case.k_hat, case.ids, case.v, case.C)
    if before:
        _, state = tvq.vq_attention(*case.at(0, before), 3)
    q, k_hat, ids, v, C, bias = (x.detach().clone() for x in case.at(before, None))
    given_state = [x.clone() for x in state]
    leaves = [x.requires_grad_() for x in (q, k_hat, v, bias, *(state[i] for i in (0, 2) if state.ids.numel()))]
    k, z, x = (torch.cat(pair, 1) for pair in zip(state, (k_hat, ids, v)))
    U, count, past, out = state.U, state.count, state.ids.shape[1], []
    for i in range(0, sizes[0], case.L):
        end = past + min(i + case.L, sizes[0])
        a, b = max(0, past + i - case.M), max(0, end - case.M)
        B = tvq.band(bias[:, i:i + case.L] if each else bias, end - past - i, past + i - a)
        out.append(tvq.block_attention(q[:, i:i + case.L], k[:, a:end], x[:, a:end], B, C, U, count))
        Delta = nn.functional.one_hot(z[:, a:b], case.c).double()
        U, count = U + Delta.mT @ x[:, a:b].detach(), count + Delta.sum(1)
    o, last = tvq.vq_attention(q, k_hat, ids, v, C, bias, case.L, state)
    assert far(o, torch.cat(out, 1)) < 1e-12
    same_state(last, tvq.Memory(*(y[:, max(0, k.shape[1] - case.M):] for y in (k, z, x)), U, count))
    got, want = gradients(o, case, *leaves), gradients(torch.cat(out, 1), case, *leaves)
    assert all(far(a, b) < 1e-11 for a, b in zip(got, want))
    assert all(torch.equal(a, b) for a, b in zip(state, given_state))  # what was given stays


def test_bfloat16_values_have_the_gradients_of_float32():
    case = Case((40, 5, 6, 8, 8, 8), 3)
    def run(dtype, autocast):
        q, k_hat, ids, v, C, bias = (x if x.dtype == torch.int64 else x.float() for x in case.at(None))
        leaves = [x.requires_grad_() for x in (q, k_hat, v.to(dtype), bias)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            o, state = tvq.vq_attention(leaves[0], leaves[1], ids, leaves[2], C, leaves[3], 8)
            assert o.dtype == dtype and state.U.dtype == torch.float32
            return gradients(o.double(), case, *leaves)
    want = run(torch.float32, False)
    for got in run(torch.bfloat16, False), run(torch.bfloat16, True):
        assert [g.dtype for g in got] == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
        assert all(far(a, b) < 0.03 * float(b.abs().max()) for a, b in zip(got, want))


def test_near_keys_have_the_quadratic_gradient_at_k_hat_and_far_ones_none():
    case = Case((24, 4, 4, 4, 3, 2), 8)
    k = case.k.clone().requires_grad_()
    ids, k_hat = tvq.quantize(k, case.C)
    o, _ = tvq.vq_attention(case.q, k_hat, ids, case.v, case.C, case.bias, 4)
    got, = torch.autograd.grad(o[:, -4:].sum(), k)  # the last block: keys from 16 on are near
    assert torch.equal(got[:, :16], torch.zeros_like(got[:, :16])) and (got[:, 16:20].abs().amax(-1) > 0).all()
    step = 1e-6
    for t, d in (16, 0), (19, 2), (22, 1):  # finite differences of the quadratic form, in K_hat
        values = []
        for sign in (1, -1):
            moved = case.k_hat.clone()
            moved[0, t, d] += sign * step
            values.append(float(tvq.vq_attention_quadratic(case.q, moved, case.v, case.bias)[:, -4:].sum()))
        assert abs((values[0] - values[1]) / (2 * step) - float(got[0, t, d])) < 1e-6


def test_a_carried_state_passes_gradients_only_through_its_window():
    case = Case((24, 4, 4, 4, 3, 2), 8)
    v = case.v.clone().requires_grad_()
    def run(through):
        q, k_hat, ids, _, C, bias = case.at(None)
        _, state = tvq.vq_attention(q[:, :12], k_hat[:, :12], ids[:, :12], v[:, :12], C, bias, 4, None, through)
        o, _ = tvq.vq_attention(q[:, 12:], k_hat[:, 12:], ids[:, 12:], v[:, 12:], C, bias, 4, state, through)
        return torch.autograd.grad(o.sum(), v)[0].abs().amax((0, 2)) > 0
    assert not run(False)[:8].any() and run(False)[8:].all() and run(True).all()


# ---- exactness, codebook ----

@both_forms
def test_as_many_codes_as_keys_is_exact_attention(form):
    case = Case((15, 15, 2, 4, 3, 2), 6, rows=1)
    case.C = case.k[0].clone()
    ids, k_hat = tvq.quantize(case.k, case.C)
    assert torch.equal(ids[0], torch.arange(15))
    o, _ = form(case.q, k_hat, ids, case.v, case.C, case.bias, 4)
    assert far(o, case.all(keys=case.k)) < 1e-12


@both_forms
@given(SIZES, SEEDS)
def test_the_order_of_the_codes_is_nothing(form, sizes, seed):
    case = Case(sizes, seed)
    order = torch.randperm(case.c, generator=torch.Generator().manual_seed(seed))
    q, k_hat, ids, v, C, bias = case.at(None)
    ids2, k_hat2 = tvq.quantize(case.k, C[order])
    assert torch.equal(k_hat2, k_hat)
    assert far(form(q, k_hat2, ids2, v, C[order], bias, case.L)[0], form(*case.at(None), case.L)[0]) < 1e-12


@both_forms
def test_a_huge_window_without_bias_is_plain_softmax(form):
    case = Case((15, 3, 40, 4, 3, 2), 6)
    case.bias.zero_()
    scores = (case.q @ case.k_hat.mT).masked_fill(torch.ones(15, 15).triu(1) > 0, -math.inf)
    assert far(form(*case.at(None), 4)[0], scores.softmax(-1) @ case.v) < 1e-12


@both_forms
def test_no_tensor_of_n_n_or_n_c_numbers(form):
    """Forward and backward, by every tensor that torch makes: the largest is linear in n, and far below n c."""
    def largest(n):
        made = [0]

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, f, types, args=(), kwargs=None):
                out = f(*args, **(kwargs or {}))
                for x in out if isinstance(out, (tuple, list)) else [out]:
                    if isinstance(x, torch.Tensor) and x.is_contiguous():
                        made[0] = max(made[0], x.numel())
                return out
        q, k = draws(2, 1, n, 4, dtype=torch.float32)
        v, C = draws(1, n, 4, dtype=torch.float32), draws(2048, 4, dtype=torch.float32)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        with Watch():
            ids, k_hat = tvq.quantize(k, C)
            form(q, k_hat, ids, v, C, torch.zeros(65), 64)[0].sum().backward()
        return made[0]
    if form is tvq.vq_attention:
        assert largest(16384) == largest(32768) == 4096 * 2048  # quantize's, whatever n is
    else:  # its scores, a block's queries by c + M + L, are n c in all: kept only while they fit
        assert largest(8192) < 1.1 * 8192 * (2048 + 128)


@given(st.integers(1, 6), SEEDS)
def test_codebook_is_a_moving_average(updates, seed):
    book = tvq.Codebook(5, 3)
    sums, count, decay = book.sums.double(), book.count.double(), 0.9
    for t in range(updates):
        keys = draws(40, 3, seed=seed + t, dtype=torch.float32)
        ids, _ = tvq.quantize(keys, book.vectors())
        book.update(keys, ids, decay)
        Delta = nn.functional.one_hot(ids, 5).double()
        sums = decay * sums + (1 - decay) * Delta.T @ keys.double()
        count = decay * count + (1 - decay) * Delta.sum(0)
    assert far(book.sums.double(), sums) < 1e-5 and far(book.count.double(), count) < 1e-5
    assert far(book.vectors().double(), sums / count[:, None]) < 1e-4
    assert book.sums.dtype == torch.float32 and not list(book.parameters())


def test_an_unused_code_stays_until_its_count_is_a_hundredth():
    book = tvq.Codebook(2, 3)
    before = book.vectors()[1].clone()
    for t in range(458):
        book.update(torch.ones(4, 3), torch.zeros(4, dtype=torch.long), 0.99)
        assert far(book.vectors()[1], before) < 1e-4
    for _ in range(50):
        book.update(torch.ones(4, 3), torch.zeros(4, dtype=torch.long), 0.99)
    assert book.vectors()[1].norm() < 0.7 * before.norm()


def test_restart_moves_dead_codes_only_and_is_consistent():
    book = tvq.Codebook(6, 3)
    book.count[:] = torch.tensor([5.0, 0.001, 7.0, 0.0, 4.0, 6.0])
    book.sums[:] = draws(6, 3, dtype=torch.float32)
    keys, dead = draws(30, 3, seed=1, dtype=torch.float32), torch.tensor([False, True, False, True, False, False])
    assert torch.equal(book.dead(), dead)
    kept, other = {k: v.clone() for k, v in book.state_dict().items()}, tvq.Codebook(6, 3)
    other.load_state_dict(kept)
    ids = tvq.quantize(keys, book.vectors()[~dead])[0]
    book.restart(keys, torch.Generator().manual_seed(4))
    other.restart(keys, torch.Generator().manual_seed(4))
    assert torch.equal(book.sums, other.sums)  # by the seed
    assert torch.equal(book.sums[~dead], kept["sums"][~dead]) and torch.equal(book.count[~dead], kept["count"][~dead])
    for code in book.vectors()[dead]:  # one of the keys, and not two times the same
        assert ((keys - code).abs().amax(-1) < 1e-6).sum() == 1
    assert far(book.vectors()[1], book.vectors()[3]) > 0.1 and not book.dead().any()
    assert far(book.sums, book.vectors() * book.count[:, None]) < 1e-6
    assert far(book.count[dead], kept["count"].mean() / 10) < 1e-6  # twice what keeps a code alive
    assert torch.equal(ids, tvq.quantize(keys, book.vectors()[~dead])[0])


def test_usage_and_dead():
    book = tvq.Codebook(4, 2)
    assert abs(float(book.usage()["perplexity"]) - 4) < 1e-5 and book.usage()["dead"] == 0
    book.count[:] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert abs(float(book.usage()["perplexity"]) - 3) < 1e-5 and book.dead().tolist() == [False] * 3 + [True]
    assert book.usage()["dead"] == 0.25


@given(st.integers(1, 6), SEEDS)
def test_kmeans_is_lloyds(codes, seed):
    keys, C = draws(30, 2, seed=seed), draws(codes, 2, seed=seed + 1)
    codes_, count = tvq.kmeans(keys, C, 5)
    for _ in range(5):
        nearest = [min(range(codes), key=lambda s: float((k - C[s]).square().sum())) for k in keys]
        groups = [[k for k, s in zip(keys, nearest) if s == code] for code in range(codes)]
        C = torch.stack([sum(g) / len(g) if g else C[code] for code, g in enumerate(groups)])
    assert count.tolist() == [len(g) for g in groups]
    assert far(codes_, C) < 1e-12


# ---- the model ----

def small(attention="vq", **how):
    torch.manual_seed(0)
    sizes = dict(width=12, layers=2, d_k=4, d_v=6, codes=5, window=3, block=4) | how
    net = tvq.TransformerVQ(attention, **sizes).double()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 1:
                p.normal_()
    return net


def tokens(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


def naive_model(net, text, kind):
    """The model by loops over tokens: logits (n, 256) of text (n,)."""
    x = net.embed.weight[text]
    for layer in net.layers:
        d_k = layer.d_k
        h = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm.weight + layer.shift
        y = h @ layer.project.weight.T
        q, k, v, g = y[:, :d_k], y[:, d_k:2 * d_k], y[:, 2 * d_k:2 * d_k + layer.d_v], y[:, 2 * d_k + layer.d_v:]
        q, k = (z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() / d_k ** 0.25 for z in (q, k))
        v, g = v * v.sigmoid(), g * g.sigmoid()
        if kind in ("vq", "quadratic", "window") and layer.book:
            C = layer.book.sums / layer.book.count.clamp(min=0.01)[:, None]
            k = C[torch.stack([(key - C).square().sum(-1).argmin() for key in k])]
        rows, M = [], (len(layer.bias) if net.sinusoids is None else len(net.sinusoids)) - 1
        for i in range(len(text)):
            e = []
            for j in range(i + 1):
                if net.sinusoids is not None:
                    width = x.shape[1]
                    speed = 1e5 ** (-torch.arange(0, width, 2).double() / width)
                    r = torch.cat([((i - j) * speed).sin(), ((i - j) * speed).cos()]) @ layer.r.weight.T / d_k ** 0.25
                    score = (q[i] + layer.a / d_k ** 0.25) @ k[j]
                    score = score + ((q[i] + layer.b / d_k ** 0.25) @ r if i - j <= M else 0)
                else:
                    score = q[i] @ k[j] + (layer.bias[i - j] if i - j <= M else 0)
                e.append(score.exp() if kind != "window" or i - j <= M else 0 * score)
            rows.append(sum(a * v[j] for j, a in enumerate(e)) / sum(e))
        x = x + (torch.stack(rows) * g) @ layer.out.weight.T
    return x @ net.last.weight.T + net.last.bias


@pytest.mark.parametrize("bias", ["toeplitz", "xl"])
@pytest.mark.parametrize("kind", tvq.ATTENTIONS)
@torch.no_grad()
def test_model_is_its_equations(kind, bias):
    net = small(kind, bias=bias)
    text = tokens(2, 14)
    logits, *_ = net(text)
    want = torch.stack([naive_model(net, row, kind) for row in text])
    assert logits.dtype == torch.float32 and far(logits.double(), want) < 1e-4
    if kind in ("vq", "quadratic"):  # the same weights by the other ways
        for way in tvq.ATTENTIONS:
            other, *_ = net(text, None, way)
            assert far(other.double(), torch.stack([naive_model(net, row, way) for row in text])) < 1e-4


@pytest.mark.parametrize("prefix", ["loop", "cumsum"])
@pytest.mark.parametrize("kind", tvq.ATTENTIONS)
@torch.no_grad()
def test_model_in_pieces_and_token_by_token_is_the_whole(kind, prefix):
    net = small(kind, prefix=prefix)
    text = tokens(2, 19)
    want, *_ = net(text)
    states, got = None, []
    for part in text.split([5, 1, 1, 1, 1, 1, 9], 1):
        logits, states, *_ = net(part, states)
        got.append(logits)
    assert far(torch.cat(got, 1), want) < 1e-5


@torch.no_grad()
def test_cumsum_is_used_only_while_it_fits(monkeypatch):
    """Up to 2^28 numbers of all U_i, for more than one token, and if asked for."""
    used = []
    for engine, name in (("loop", "apply"), ("cumsum", "blocks_at_once")):
        def noted(q, k_hat, ids, v, *_, engine=engine):
            used.append(engine)
            return v, *tvq.no_sums(v, 512)  # of an output only the shape matters
        monkeypatch.setattr(tvq.Blocks if name == "apply" else tvq, name, noted)
    for rows, n, prefix, want in ((1, 8, "cumsum", "cumsum"), (1, 8, "loop", "loop"), (1, 1, "cumsum", "loop"),
                                  (8, 2**10, "cumsum", "cumsum"), (8, 2**10 + 1, "cumsum", "loop")):
        small(d_v=64, codes=512, block=1, layers=1, prefix=prefix)(tokens(rows, n))
        assert used.pop() == want and not used


def test_model_is_causal_in_training_and_evaluation_moves_no_code():
    net = small().train()
    text = tokens(2, 14)
    books = [b.clone() for b in net.buffers()]
    a, *_ = net(text)
    text[:, 9] = (text[:, 9] + 1) % 256
    b, *_ = net(text)
    assert torch.equal(a[:, :9], b[:, :9]) and far(a[:, 9], b[:, 9]) > 0
    assert all(torch.equal(x, y) for x, y in zip(books, net.buffers()))


def test_commitment_is_the_mean_squared_distance():
    net = small()
    _, _, commits, seen = net(tokens(2, 14))
    for layer, commit, (k, ids) in zip(net.layers, commits, seen):
        C = layer.book.vectors()
        assert torch.equal(ids, torch.cdist(k, C.expand(2, -1, -1)).argmin(-1)) and not k.requires_grad
        assert abs(float(commit.detach()) - float((k - C[ids]).square().sum(-1).mean())) < 1e-9
    commits.sum().backward()
    assert net.layers[0].project.weight.grad[4:8].abs().max() > 0  # it pulls keys,
    assert net.layers[-1].out.weight.grad is None  # and nothing after the last of them
    with torch.no_grad():  # K = C: 0
        k = seen[0][0].flatten(0, 1).float()
        net.layers[0].book = tvq.Codebook(len(k), 4)
        net.layers[0].book.sums[:] = k
        assert float(net(tokens(2, 14))[2][0]) < 1e-12


def test_paper_has_the_papers_size():
    """The official code's 187,675,136 numbers but for 256: an output bias that it makes twice and uses once."""
    args = tvq.parse_args(["--paper"])
    with torch.device("meta"):
        net = tvq.build(args, torch.device("meta"))
    parameters = sum(p.numel() for p in net.parameters())
    codes = sum(b.numel() for layer in net.layers for b in layer.book.buffers())
    assert (parameters + codes + 256, codes) == (187_675_136, 3_170_304)
    assert (args.data, args.steps, args.update_len, args.window, args.block) == ("enwik8", 125_000, 2048, 512, 512)


def test_dropouts_are_for_training_only():
    text = tokens(6, 14)
    for how in (dict(dropout=0.5), dict(drop_layer=0.5), dict(drop_sinusoid=0.5, bias="xl")):
        net = small(**how)
        plain = small(**({"bias": "xl"} if "bias" in how else {})).eval()
        assert torch.equal(net.eval()(text)[0], plain(text)[0])
        net.train()
        torch.manual_seed(1)
        assert far(net(text)[0], plain(text)[0]) > 1e-3
    net = small(drop_layer=0.5, layers=1)
    torch.manual_seed(1)
    x, y = net.train()(text)[0], small(layers=1).eval()
    bare = y.last(y.embed(text)).float()
    left = [(a - b).abs().max().item() < 1e-5 for a, b in zip(x, bare)]
    assert 0 < sum(left) < 6  # whole rows, some and not others
    kept = left.index(False)
    whole = y.last(y.embed(text) + 2 * y.layers[0](y.embed(text), None, "vq", None)[0])
    assert far(x[kept], whole.float()[kept]) < 1e-4


@torch.no_grad()
def test_sampling_follows_the_nucleus():
    net = small().float()
    text = tokens(3, 6)
    drawn = tvq.sample(net, text, 5, torch.Generator().manual_seed(1), 0.7, 0.3)
    assert torch.equal(drawn[:, :6], text) and drawn.shape == (3, 11)
    g = torch.Generator().manual_seed(1)
    for i in range(6, 11):  # naive: the whole text anew for each byte, and the nucleus by a loop
        p = (net(drawn[:, :i])[0][:, -1] / 0.7).softmax(-1)
        kept, orders = torch.zeros_like(p), []
        for row in range(3):
            total, order = 0.0, sorted(range(256), key=lambda s: -float(p[row, s]))
            orders.append(order)
            for rank, s in enumerate(order):
                if total < 0.3:
                    kept[row, rank] = p[row, s]
                total += float(p[row, s])
        assert (kept > 0).sum() < 600
        u = torch.rand(3, 1, generator=g)
        for row in range(3):  # the first rank at which the sum reaches a share u of it all
            level, rank = float(u[row]) * float(kept[row].sum()), 0
            while float(kept[row, :rank + 1].sum()) < level:
                rank += 1
            assert orders[row][rank] == int(drawn[row, i])


def test_memory_of_sampling_does_not_grow():
    net = small().float()
    sizes = set()
    with torch.no_grad():
        _, states, *_ = net(tokens(1, 9))
        for _ in range(20):
            _, states, *_ = net(tokens(1, 1), states)
            sizes.add(sum(x.numel() for state in states for x in state))
    assert len(sizes) == 1


# ---- the recall task ----

def naive_gaps(keys):
    """How many tokens ago each key of one "k v k v ..." was last seen, or 0."""
    seen, gaps = {}, []
    for i, k in enumerate(keys):
        gaps.append(2 * (i - seen[k]) if k in seen else 0)
        seen[k] = i
    return gaps


@pytest.mark.parametrize("far_only", [False, True])
def test_recall_text(far_only):
    texts = tvq.far_text if far_only else tvq.recall_text
    text = texts(50, torch.Generator().manual_seed(0))
    assert text.shape == (50, 128)
    keys, gaps = 16 if far_only else 8, set()
    for row in text.tolist():
        values = {}
        for k, v in zip(row[::2], row[1::2]):
            assert 0 <= k < keys and 128 <= v < 136 and values.setdefault(k, v) == v
        gaps |= set(naive_gaps(row[::2]))
        assert len(values) == keys and len(set(values.values())) > 2
    assert len({tuple(row) for row in text[:, 1::2].tolist()}) == 50
    assert gaps == {0, 32} if far_only else {0, 2, 16, 18, 40} < gaps


@given(st.integers(1, 40), st.integers(1, 12), SEEDS)
def test_from_afar_is_more_than_sixteen_tokens_ago(pairs, keys, seed):
    key = torch.randint(keys, (3, pairs), generator=torch.Generator().manual_seed(seed))
    assert tvq.from_afar(key).tolist() == [[gap > 16 for gap in naive_gaps(row)] for row in key.tolist()]


def test_recall_learns_with_the_cache_and_not_without():
    right = tvq.recall("vq", 100, 0, torch.device("cpu"))
    assert right["vq"] > 0.6 and right["exact keys"] > 0.6 and right["cache off"] < 0.2, right


def test_recall_is_a_naive_run(monkeypatch):
    """Three steps to the same weights; of these the shares, by loops over other texts; then, when codes restart."""
    nets, real, cpu = [], tvq.TransformerVQ, torch.device("cpu")
    monkeypatch.setattr(tvq, "TransformerVQ", lambda *a, **k: nets.append(real(*a, **k)) or nets[-1])
    right = tvq.recall("vq", 3, 5, cpu)
    torch.manual_seed(5)
    net, moments = real("vq", 64, 2, 32, 128, codes=32, window=8, block=8), {}
    for layer, b in zip(net.layers, (8, 0)):
        layer.bias.data[:] = torch.tensor([0, b, 0, 0, 0, 0, 0, 0, 0])
    for step in range(3):
        text = tvq.recall_text(16, tvq.generator("cpu", 5, step, 6))
        if step == 0:
            naive_begin(net, text, tvq.generator("cpu", 5, 7), 32)
        logits, _, commits, seen = net(text[:, :-1])
        nats = -logits.log_softmax(-1)[:, ::2].gather(-1, text[:, 1::2, None]).mean()
        (nats + 1e-3 * commits.sum()).backward()
        naive_adam(net, moments, step, 1e-2 * (step + 1) / 20 * (1 - step / 3), 0.95, 1.0)
        for layer, (k, ids) in zip(net.layers, seen):
            naive_average(layer.book, k.flatten(0, 1), ids.flatten(), 0.95)
    assert far_states(*(dict(x.named_parameters()) for x in (nets[0], net))) < 2e-5  # of steps of 5e-4
    assert far_states(*(x.layers[1].book.state_dict() for x in (nets[0], net))) < 2e-3  # of 100; 32 codes of 16 bytes
    text = tvq.recall_text(256, tvq.generator("cpu", 5, 8))
    for name, way in ("vq", "vq"), ("cache off", "window"), ("exact keys", "exact"):
        said, good, asked = nets[0](text, None, way)[0].argmax(-1), 0, 0
        for row, guess in zip(text.tolist(), said.tolist()):
            for i, gap in enumerate(naive_gaps(row[::2])):
                asked += gap > 16
                good += gap > 16 and guess[2 * i] == row[2 * i + 1]
        assert right[name] == pytest.approx(good / asked, abs=1e-6)
    restarts = []
    monkeypatch.setattr(tvq, "renew_codes", lambda net, seen, decay, restart, g: restarts.append(restart))
    tvq.recall("vq", 33, 0, cpu)
    assert [step for step, restart in enumerate(restarts) if restart] == [15, 31]


@pytest.mark.parametrize("attention, ways", [("vq", 3), ("window", 1)])
def test_the_report_has_recall_near_and_far(capsys, attention, ways):
    """Of --attention on both kinds of texts, then of (2) with its own gradient on the far ones; each arm is its own."""
    run(f"--steps 2 --attention {attention} --recall-steps 3 --seed 4")
    recall = json.loads(Path("out/transformer_vq/metrics.json").read_text())["recall"]
    said = capsys.readouterr().out
    arms = (("near and far", attention, tvq.recall_text), ("far only", attention, tvq.far_text),
            ("far only, gradient of (2)", "quadratic", tvq.far_text))
    assert list(recall) == [name for name, *_ in arms]
    for (name, way, texts), count in zip(arms, (ways, ways, 3)):
        assert recall[name] == tvq.recall(way, 3, 4, torch.device("cpu"), texts) and len(recall[name]) == count
        assert f"  recall, {name:28}" + "  ".join(f"{k} {x:.3f}" for k, x in recall[name].items()) + "\n" in said


# ---- wiring ----

def text_file():
    Path("text.txt").write_bytes(bytes((tokens(6000, seed=5) % 127 + 1).tolist()))


def run(*flags, out="out/transformer_vq"):
    text_file()
    assert tvq.main([*TINY, *" ".join(map(str, flags)).split()]) == 0
    return torch.load(f"{out}/ckpt.pt", weights_only=True)


def far_states(a, b):
    return max(far(a[k].double(), b[k].double()) for k in a)


def naive_begin(net, text, g, codes):
    """The first codebooks: ten rounds of K-means from some of the keys of a text."""
    with torch.no_grad():
        keys = [k.flatten(0, 1) for k, _ in net(text, None, "exact")[3]]
    for layer, k in zip(net.layers, keys):
        C = k[torch.randperm(len(k), generator=g)[:codes]]
        for _ in range(10):
            Delta = nn.functional.one_hot(torch.cdist(k, C).argmin(-1), codes).float()
            sums, count = Delta.T @ k, Delta.sum(0)
            C = torch.where(count[:, None] > 0, sums / count.clamp(min=1)[:, None], C)
        count = count.clamp(min=count.mean() / 10)
        layer.book.sums[:], layer.book.count[:] = C * count[:, None], count


@torch.no_grad()
def naive_average(book, k, ids, ema):
    Delta = nn.functional.one_hot(ids, len(book.count)).float()
    book.sums.mul_(ema).add_((1 - ema) * Delta.T @ k)
    book.count.mul_(ema).add_((1 - ema) * Delta.sum(0))


@torch.no_grad()
def naive_adam(net, moments, step, lr, beta2, clip_grad):
    """Adam on a gradient cut to a norm, with five times the rate for B."""
    norm = torch.stack([p.grad.square().sum() for p in net.parameters()]).sum().sqrt()
    for name, p in net.named_parameters():
        grad = p.grad * min(1, clip_grad / (float(norm) + 1e-6))
        m, s = moments.setdefault(name, [torch.zeros_like(p), torch.zeros_like(p)])
        m.mul_(0.9).add_(0.1 * grad)
        s.mul_(beta2).add_((1 - beta2) * grad**2)
        times = 5 if name.endswith(".bias") and name.startswith("layers") else 1
        p -= times * lr * m / (1 - 0.9 ** (step + 1)) / ((s / (1 - beta2 ** (step + 1))).sqrt() + 1e-9)
        p.grad = None


def naive_training(steps, args, kind="vq"):
    """The whole of training in a plain loop: Adam, rate, clipping, codes, states by hand."""
    data = Path("text.txt").read_bytes()
    text = torch.tensor(list(data[:len(data) - 2 * (len(data) // 20)]))
    torch.manual_seed(args.seed)
    net = tvq.TransformerVQ(kind, args.width, args.layers, args.d_k, args.d_v, args.codes, args.window, args.block)
    moments = {}
    states, n, S = None, args.update_len, args.segments
    for step in range(steps):
        if step % S == 0:
            g = tvq.generator("cpu", args.seed, step // S, 1)
            starts = torch.randint(len(text) - S * n, (args.batch_size, 1), generator=g)
            states = None
        rows = torch.stack([text[s + step % S * n:s + (step % S + 1) * n + 1] for s in starts[:, 0].tolist()])
        if step == 0 and kind in ("vq", "quadratic"):
            g = tvq.generator("cpu", args.seed, 3)
            naive_begin(net, rows[:, :-1], g, args.codes)
        logits, states, commits, seen = net(rows[:, :-1], states)
        nats = -logits.log_softmax(-1).gather(-1, rows[:, 1:, None]).mean()
        (nats + args.commit * commits.sum()).backward()
        done = max(0, step - args.warmup) / (args.steps - args.warmup)
        fall = args.final + (1 - args.final) * (1 + math.cos(math.pi * done)) / 2
        lr = args.lr * min(1, (step + 1) / args.warmup) * fall
        naive_adam(net, moments, step, lr, args.beta2, args.clip_grad)
        with torch.no_grad():
            for p in net.parameters():
                if p.ndim > 1:
                    p *= 1 - args.weight_decay
            g = tvq.generator("cpu", args.seed, step, 3)
            for layer, (k, ids) in zip(net.layers, seen):
                if layer.book:
                    k = k.flatten(0, 1)
                    naive_average(layer.book, k, ids.flatten(), args.ema)
                    if args.restart and step % S == S - 1:
                        least = layer.book.count.mean() / 20
                        new = k[torch.randperm(len(k), generator=g)[:args.codes]] * 2 * least
                        for code in (layer.book.count < least).nonzero()[:, 0]:
                            layer.book.sums[code], layer.book.count[code] = new[code], 2 * least
        states = [[x.detach() for x in state] for state in states]
    return net, states


@pytest.mark.parametrize("kind", ["vq", "window"])
def test_a_naive_second_run_reaches_the_same_weights(kind):
    flags = f"--steps 5 --seed 4 --attention {kind} --ema 0.5 --weight-decay 1e-3 --clip-grad 0.5 --codes 12".split()
    got = run(*flags)
    net, states = naive_training(5, tvq.parse_args(TINY + flags), kind)
    assert far_states(got["model"], net.state_dict()) < 2e-4  # of steps of 6e-3, 3e-2 for B
    if kind == "vq":
        carried = got["states"]
        assert len(carried) == 2 and all(far(a.double(), b.double()) < 2e-3 for s, t in zip(carried, states)
                                         for a, b in zip(s, t))


@pytest.mark.parametrize("kind", tvq.ATTENTIONS)
def test_the_report_computed_again(kind):
    """Bits per byte of the held-out end, every way, by the naive model on whole texts; the samples, byte for byte."""
    got = run("--steps", 3, "--attention", kind, "--eval-bytes", 70, "--dropout", 0.5)  # none in the report
    metrics = json.loads(Path("out/transformer_vq/metrics.json").read_text())
    args = tvq.parse_args(TINY)
    net = tvq.TransformerVQ(kind, args.width, args.layers, args.d_k, args.d_v, args.codes, args.window, args.block)
    net.load_state_dict(got["model"])
    data = Path("text.txt").read_bytes()
    test = torch.tensor(list(data[len(data) - len(data) // 20:]))
    ways = {"vq": "vq", "cache off": "window", "exact keys": "exact"} if kind in ("vq", "quadratic") else {kind: kind}
    assert metrics["bits_per_byte"].keys() == ways.keys() == metrics["by_position"].keys()
    assert (metrics["test_bytes"], metrics["trained_length"], metrics["edges"]) == (64, 16, [0, 32, 64])
    net = net.double()
    for name, way in ways.items():
        with torch.no_grad():
            bits = -naive_model(net, test[:64], way).log_softmax(-1).gather(1, test[1:65, None])[:, 0] / math.log(2)
        assert abs(metrics["bits_per_byte"][name] - float(bits[:16].mean())) < 1e-4
        want = [float(bits[:32].mean()), float(bits[32:].mean())]
        assert all(abs(a - b) < 1e-4 for a, b in zip(metrics["by_position"][name], want))
    for layer, use in zip(net.layers, metrics["codes"]):
        share = layer.book.count / layer.book.count.sum()
        assert abs(use["perplexity"] - math.exp(-sum(float(s) * math.log(float(s) + 1e-30) for s in share))) < 1e-3
        assert use["dead"] == float((layer.book.count < layer.book.count.mean() / 20).double().mean())
    assert len(metrics["codes"]) == (2 if kind in ("vq", "quadratic") else 0)
    if metrics["codes"]:
        k, ids = net(test[None, :8])[3][1]
        error = (k - net.layers[1].book.vectors()[ids]).square().sum() / k.square().sum()
        assert abs(metrics["codes"][1]["relative_error"] - float(error)) < 1e-4
    net, g = net.float(), tvq.generator("cpu", 3, 4)
    prompt = torch.tensor(list(b"def ")).expand(2, -1)
    drawn = tvq.sample(net, prompt, 12, g, 1.0, 0.92).tolist()
    said = f"\n{'-' * 80}\n".join(bytes(row).decode("utf-8", "replace") for row in drawn) + "\n"
    assert Path("out/transformer_vq/samples.txt").read_bytes().decode() == said
    assert "<svg" in Path("out/transformer_vq/bits.svg").read_text()


def test_sample_only_draws_as_many_without_dropout(monkeypatch):
    got = run("--steps 3 --dropout 0.5")
    drawn, path = Path("out/transformer_vq/samples.txt").read_bytes(), Path("out/transformer_vq/samples_only.txt")
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self)))
    assert tvq.main([*TINY, "--sample-only", "2"]) == 0 and path.read_bytes() == drawn and not compiled
    assert tvq.main([*TINY, "--sample-only", "2", "--compile"]) == 0 and path.read_bytes() == drawn
    assert compiled == [tvq.TransformerVQ]
    assert tvq.main([*TINY, "--sample-only", "3", "--sample-seed", "8"]) == 0
    net = tvq.build(tvq.parse_args(TINY), torch.device("cpu"))
    net.load_state_dict(got["model"])
    texts = tvq.sample(net, torch.tensor(list(b"def ")).expand(3, -1), 12, tvq.generator("cpu", 8, 4), 1.0, 0.92)
    said = f"\n{'-' * 80}\n".join(bytes(row).decode("utf-8", "replace") for row in texts.tolist()) + "\n"
    assert path.read_bytes().decode() == said


def test_a_save_shows_the_model_as_it_is_then(capsys):
    """Without dropout: bits per byte of the validation text, the codes, the texts of a run that ends there."""
    got = run("--steps 3 --final 1 --dropout 0.5")
    drawn = Path("out/transformer_vq/samples.txt").read_text()
    capsys.readouterr()
    run("--steps 4 --final 1 --dropout 0.5 --save-every 3 --out out/b", out="out/b")
    assert Path("out/b/samples_000003.txt").read_text() == drawn
    args = tvq.parse_args(TINY)
    net = tvq.TransformerVQ("vq", args.width, args.layers, args.d_k, args.d_v, args.codes, args.window, args.block)
    net.load_state_dict(got["model"])
    data = Path("text.txt").read_bytes()
    size = len(data) // 20
    valid, net = torch.tensor(list(data[len(data) - 2 * size:len(data) - size])), net.double()
    with torch.no_grad():
        nats = [-naive_model(net, valid[k:k + 16], "vq").log_softmax(-1).gather(1, valid[k + 1:k + 17, None])
                for k in (0, 16)]
    said = capsys.readouterr().out
    value, = re.findall(r"validation ([\d.]+) bits per byte", said)
    assert abs(float(value) - float(torch.cat(nats).mean()) / math.log(2)) < 2e-4
    k, ids = net(valid[None, :8])[3][0]
    error = (k - net.layers[0].book.vectors()[ids]).square().sum() / k.square().sum()
    assert f" of 8 codes in use, 0.0% dead, relative error {float(error):.3f}" in said.partition("validation")[2]


def test_evaluation_in_pieces_is_the_whole_and_of_its_own_text():
    net = small().float()
    data = tokens(70, seed=3)
    bits = tvq.read_along(net, data, 20, "vq", argparse.Namespace(update_len=7))
    assert bits.shape == (3, 20)
    for row in range(3):
        with torch.no_grad():
            logits = net(data[None, 20 * row:20 * row + 20])[0][0]
        want = -logits.log_softmax(-1).gather(1, data[20 * row + 1:20 * row + 21, None])[:, 0] / math.log(2)
        assert far(bits[row], want) < 1e-4


@pytest.mark.parametrize("length, rows", [(2**14, [2, 1]), (2**14 + 1, [1, 1]), (2**16, [1, 1])])
def test_evaluation_reads_few_bytes_at_once(length, rows):
    """2^15, or one text: raw keys and values of all layers stay, 30 GiB of them once with --gpu's 7 texts of 2^16."""
    seen = []

    def net(text, states, kind):
        seen.append(len(text))
        return torch.zeros(*text.shape, 256), None

    bits = tvq.read_along(net, tokens(sum(rows) * length + 1), length, "exact", argparse.Namespace(update_len=2**13))
    assert bits.shape == (sum(rows), length) and seen == [r for r in rows for _ in range(0, length, 2**13)]
    short = tvq.read_along(net, tokens(length), length, "exact", argparse.Namespace(update_len=2**13))
    assert short.shape == (1, length - 1)  # all that there is


@pytest.mark.parametrize("kind", ["vq", "window"])
def test_the_log_has_each_layers_use_of_its_codes(kind, capsys):
    """After an update, as its checkpoint has them, averaged since the row before; in log.csv alone."""
    flags = "--codes 12 --ema 0.5 --final 1 --attention", kind
    nets = [run("--steps", steps, *flags, "--out", f"out/{steps}", out=f"out/{steps}")["model"] for steps in (2, 3)]
    *_, row = csv.DictReader(Path("out/3/log.csv").open())
    assert row["step"] == "3" and [name for name in row if name[-1].isdigit()] == [
        f"{name}_{i}" for i in (0, 1) for name in ("perplexity", "dead") if kind == "vq"]
    for i in (0, 1) if kind == "vq" else ():
        counts = [net[f"layers.{i}.book.count"].double() for net in nets]
        used = [float(torch.special.entr(count / count.sum()).sum().exp()) for count in counts]
        dead = [float((count < count.mean() / 20).double().mean()) for count in counts]
        assert abs(used[0] - used[1]) > 1e-3 and abs(float(row[f"perplexity_{i}"]) - sum(used) / 2) < 1e-4
        assert float(row[f"dead_{i}"]) == pytest.approx(sum(dead) / 2)
    assert "perplexity" not in capsys.readouterr().out


CHANGES = [  # flags of the experiment: each changes the weights after three steps
    "--seed 1", "--batch-size 2", "--update-len 4", "--segments 3", "--d-k 4", "--d-v 8", "--codes 4", "--window 2",
    "--block 2", "--bias xl", "--ema 0.5", "--commit 1", "--dropout 0.5", "--bias xl --drop-sinusoid 0.5",
    "--drop-layer 0.5", "--lr 1e-3", "--warmup 3", "--final 0.5", "--beta2 0.5", "--weight-decay 1e-2",
    "--clip-grad 1e-2", "--attention exact", "--attention window", "--layers 1", "--width 8"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("plain"))
        return run("--steps 4")


@pytest.mark.parametrize("change", CHANGES)
def test_every_flag_matters(change, plain):
    other = run("--steps 4", change)
    a, b = plain["model"], other["model"]
    assert a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a) or far_states(a, b) > 1e-6


@pytest.mark.parametrize("size, update_len, goes", [(1300, 1169, True), (1300, 1170, False), (1280, 8, False)])
def test_the_shortest_texts(size, update_len, goes):
    """90 % to train on, of which one byte more than a text is wanted; 5 % to test, more than 64 bytes."""
    Path("few.txt").write_bytes(bytes(k % 90 + 33 for k in range(size)))
    args = tvq.parse_args(["--data", "few.txt", "--segments", "1", "--update-len", str(update_len)])
    if goes:
        assert [len(part) for part in tvq.load_data(args, torch.device("cpu"))] == [1170, 65, 65]
    else:
        with pytest.raises(tvq.UserError, match="bytes to train on"):
            tvq.load_data(args, torch.device("cpu"))


def test_the_speed_is_of_the_bytes_that_this_run_saw():
    run("--steps 2")
    assert tvq.main(["--resume", "--steps", "5", "--recall-steps", "0", "--eval-bytes", "128", "--length", "12"]) == 0
    found = json.loads(Path("out/transformer_vq/metrics.json").read_text())
    assert found["bytes_per_second"] * found["train_seconds"] == pytest.approx(3 * 4 * 8)


def test_flags_of_the_report_leave_the_weights_alone(plain):
    for k, change in enumerate(("--temperature 2", "--nucleus 0.5", "--sample-seed 9", "--prompt class", "--length 5",
                                "--samples 1", "--eval-bytes 96", "--recall-steps 1")):
        text_file()
        assert tvq.main([*TINY, "--steps", "4", "--out", f"out/{k}", *change.split()]) == 0
        other = torch.load(f"out/{k}/ckpt.pt", weights_only=True)
        assert far_states(plain["model"], other["model"]) == 0
    base = Path("out/base")
    assert tvq.main([*TINY, "--steps", "4", "--out", str(base)]) == 0
    texts = [Path(f"out/{k}/samples.txt").read_text() for k in range(6)]
    assert all(text != (base / "samples.txt").read_text() for text in texts) and len(set(texts)) == 6
    assert json.loads(Path("out/6/metrics.json").read_text())["test_bytes"] != json.loads(
        (base / "metrics.json").read_text())["test_bytes"]
    recall = json.loads(Path("out/7/metrics.json").read_text())["recall"]
    assert recall["near and far"] == tvq.recall("vq", 1, 0, torch.device("cpu"))
    assert "recall" not in json.loads((base / "metrics.json").read_text())


def test_through_and_prefix(plain):
    """`through` and quadratic change the gradient; how U is summed changes nothing but rounding."""
    assert far_states(plain["model"], run("--steps 4 --through --update-len 16 --segments 1")["model"]) > 0
    a = torch.load("out/transformer_vq/ckpt.pt", weights_only=True)["model"]
    assert tvq.main([*TINY, *"--steps 4 --update-len 16 --segments 1 --out out/b".split()]) == 0
    b = torch.load("out/b/ckpt.pt", weights_only=True)["model"]
    assert far_states(a, b) > 1e-6
    assert tvq.main([*TINY, *"--steps 4 --update-len 16 --segments 1 --attention quadratic --out out/d".split()]) == 0
    d = torch.load("out/d/ckpt.pt", weights_only=True)["model"]
    assert far_states(a, d) > 1e-6 and far_states(b, d) > 1e-6
    assert tvq.main([*TINY, *"--steps 4 --prefix cumsum --out out/c".split()]) == 0
    assert far_states(plain["model"], torch.load("out/c/ckpt.pt", weights_only=True)["model"]) < 1e-4


def test_no_restart_leaves_dead_codes(monkeypatch):
    calls = []
    monkeypatch.setattr(tvq.Codebook, "restart", lambda self, *_: calls.append(self))
    run("--steps 5")
    assert len(calls) == 2 * 2  # two layers, after steps 2 and 4, where a new text begins
    calls.clear()
    run("--steps 5 --no-restart --out out/n")
    assert not calls


def test_the_state_is_carried_within_a_text_and_saved(plain):
    """Its count grows over the updates of a text; a checkpoint between two texts holds none."""
    assert plain["states"] is None  # step 4 of --segments 2
    states = run("--steps 3")["states"]
    assert len(states) == 2 and all(float(state[4].sum()) == 4 * (8 - 4) for state in states)


def test_resume_within_a_text_equals_a_straight_run():
    text_file()
    for out, steps in ("a", 7), ("b", 3):
        assert tvq.main([*TINY, "--segments", "4", "--final", "1", "--steps", str(steps), "--out", out]) == 0
    assert tvq.main(["--resume", "--out", "b", "--steps", "7", *TINY[TINY.index("--eval-bytes"):]]) == 0
    a, b = (torch.load(f"{out}/ckpt.pt", weights_only=True) for out in "ab")
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def test_two_ranks_are_one(python):
    """Codes too, restarted ones among them, and the states, also where two ranks go on within a text; text without
    repeats, where no two codes are alike."""
    text_file()
    argv = [*TINY, "--codes", "16", "--final", "1"]
    for more in ["--steps", "3"], ["--steps", "5", "--resume"]:
        for rank in python.ranks(tvq.__file__, *argv, *more, "--out", "two"):
            assert (rank.wait(), rank.err()) == (0, "")
    assert tvq.main([*argv, "--steps", "5", "--out", "one"]) == 0
    one, two = (torch.load(f"{out}/ckpt.pt", weights_only=True) for out in ("one", "two"))
    assert far_states(one["model"], two["model"]) < 1e-4
    for a, b in zip(one["states"], two["states"], strict=True):
        assert all(far(x.double(), y.double()) < 1e-3 for x, y in zip(a, b, strict=True))


def test_wrong_flags_are_refused(capsys):
    text_file()
    for flags in ("--codes 99", "--ema 1", "--dropout 1", "--update-len 9999", "--drop-sinusoid 0.1"):
        assert tvq.main([*TINY, *flags.split()]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_model_without_codebooks_needs_no_keys_for_them_and_the_report_names_the_length_it_read(capsys):
    run("--attention exact --codes 9 --batch-size 1 --steps 1 --eval-bytes 64 --segments 9")
    assert " to 64 " in capsys.readouterr().out


def test_it_learns():
    """A text of period 3: below 0.2 bits of 1.6."""
    Path("text.txt").write_bytes(b"abc" * 2000)
    assert tvq.main([*TINY, "--steps", "120", "--lr", "2e-2"]) == 0
    bits = json.loads(Path("out/transformer_vq/metrics.json").read_text())["bits_per_byte"]
    assert bits["vq"] < 0.2, bits


# ---- the experiments ----

def test_arms_run_for_two_steps(capsys):
    text_file()
    arms = experiment("arms")
    arms["main"]([*TINY, "--steps", "2", "--tune", "2"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 * 5 + 3 and tvq.build.__name__ == "build"
    rows = {line[:54].strip(): float(line[54:62]) for line in said}
    assert rows["exact, then K-means, exact keys"] == rows["exact keys, exact"]  # its weights
    assert rows["exact, then K-means, vq"] != rows["exact, then K-means, exact keys"]
    assert rows["vq without B, vq"] != rows["vq, vq"] != rows["the window alone, window"]


def test_time_runs_and_computes_what_it_times(capsys):
    time = experiment("time")
    x = time["inputs"](300, 128, 128)
    want = tvq.vq_attention_quadratic(*(x[k].double() for k in ("q", "k_hat", "v", "bias")))
    for arm in ("SDPA", "SDPA unpadded", "c = M = L = 128"):
        assert far(time["attend"](arm, x).double(), want) < 1e-4
    assert abs(time["slope"]([1, 2, 4], [3, 12, 48]) - 2) < 1e-9
    time["main"](["--longest", "256", "--repeats", "1", "--figure", "time.svg"])
    assert capsys.readouterr().out.count("peak MiB") == 3 and "SDPA" in Path("time.svg").read_text()


def test_memory_counts_what_is_alive(capsys):
    memory = experiment("memory")
    with memory["FakeTensorMode"](), memory["Alive"]() as alive:
        a = torch.zeros(1000)
        b = a + 1
        view = a[:10]
        assert (alive.now, alive.peak) == (8000, 8000)
        del a, b
        assert (alive.now, alive.peak) == (4000, 8000)
        del view
        assert (alive.now, alive.peak) == (0, 8000)
    flags = [*TINY[2:], *"--d-v 64 --layers 1 --block 8 --segments".split()]
    short, long = (memory["main"]([*flags, segments]) for segments in "12")
    more = 32 * (4 * 8 + 2 * 64)  # bytes of 32 more tokens' keys, float32, and values, bfloat16
    assert more < (long["the report, exact keys"] - short["the report, exact keys"]) * 2**30 < 8 * more
    assert short["an update"] == long["an update"] and capsys.readouterr().out.count("GiB: an update") == 2
    assert nn.Module.to.__qualname__ == "Module.to"
