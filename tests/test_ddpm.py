"""ddpm.py against post 9119, Ho et al. 2020, and oracles written out here in float64."""

import copy
import gzip
import http.client
import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import ddpm
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

LAWS = st.lists(st.floats(0.05, 0.999), min_size=1, max_size=200)  # any alpha_1 ... alpha_T
SEEDS = st.integers(0, 2**31)
TINY = ("--width 8 --mults 1,2 --attention 1 --blocks 1 --T 30 --batch-size 4 --samples 4 "
        "--eval-images 2 --warmup 2 --save-every 2").split()


def chain(alphas):
    """alpha, beta, bar_alpha, bar_beta of 9119 (3), (6) with row 0, by plain loops, in float64."""
    alpha = [1.0, *alphas]
    bar = [1.0]
    for a in alphas:
        bar.append(bar[-1] * a)
    rows = dict(alpha=alpha, beta=[math.sqrt(1 - a * a) for a in alpha], bar_alpha=bar,
                bar_beta=[math.sqrt(1 - b * b) for b in bar])
    return {name: torch.tensor(row, dtype=torch.float64) for name, row in rows.items()}


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steps(t, n=1):
    return torch.full((n,), t)


# ---- 9119, the equations in their order ----

@given(LAWS, SEEDS)
def test_9119_2_3_4_6_the_chain_step_by_step_is_the_jump(alphas, seed):
    """x_T of (3) iterated = (4) with its own noises; (6) has the same signal and the same variance."""
    s, T = chain(alphas), len(alphas)
    x0, noise = draws(1, 2, 2, seed=seed), draws(T, 1, 2, 2, seed=seed + 1)
    way = ddpm.tear_down(x0, noise, s)
    assert way.shape == (T + 1, 1, 2, 2) and torch.equal(way[0], x0)
    want, left = torch.zeros_like(x0), 1.0  # 9119 (4), from the last noise to the first
    for t in range(T, 0, -1):
        want = want + left * s["beta"][t] * noise[t - 1]
        left = left * alphas[t - 1]
    want = want + left * x0
    torch.testing.assert_close(way[T], want, rtol=1e-11, atol=1e-12)
    signal_part = ddpm.diffuse(x0[None], steps(T), torch.zeros_like(x0)[None], s)[0]
    torch.testing.assert_close(signal_part, left * x0, rtol=1e-11, atol=1e-12)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    std = ddpm.diffuse(0 * one, steps(T), one, s).item()
    variance = 0.0
    for a in alphas:  # of (3), iterated
        variance = a * a * variance + 1 - a * a
    assert std**2 == pytest.approx(variance, abs=1e-12)


@given(LAWS)
def test_9119_5_squared_coefficients_add_up_to_one(alphas):
    """Read off diffuse_once itself: feed in unit vectors, square what comes out, add up."""
    s, T = chain(alphas), len(alphas)
    unit = torch.eye(T + 1, dtype=torch.float64)
    way = ddpm.tear_down(unit[0].view(1, 1, -1), unit[1:].view(T, 1, 1, -1), s)
    assert way[T].square().sum().item() == pytest.approx(1, abs=1e-12)


@given(LAWS, SEEDS)
def test_9119_7_8_9_the_error_of_a_step_is_the_weighted_error_of_the_noise(alphas, seed):
    s, T = chain(alphas), len(alphas)
    x, eps, guess = draws(3, 1, 1, 4, seed=seed)[..., None].unbind()
    t = steps(T)
    xt = ddpm.diffuse_once(x, t, eps, s)
    net = guess * s["bar_beta"][T] / s["beta"][T]  # step_back takes the paper's eps
    mu = ddpm.step_back(xt, t, net, torch.zeros_like(s["beta"]), torch.zeros_like(x), s)  # (8)
    weight = (s["beta"][T] / s["alpha"][T]) ** 2
    torch.testing.assert_close((x - mu).square().sum(), weight * (eps - guess).square().sum())  # (9)


@given(LAWS, SEEDS)
def test_9119_10_12_two_noises_turned_into_one(alphas, seed):
    """(10) = (6) with the eps of section 5; (eps, omega) is a rotation of the two; (12) undoes it."""
    s, T = chain(alphas), len(alphas)
    a, b, last = s["alpha"][T], s["beta"][T], s["bar_beta"][T - 1]
    bb = s["bar_beta"][T]
    assert b**2 + a**2 * last**2 == pytest.approx((bb**2).item(), abs=1e-12)
    turn = torch.tensor([[a * last, b], [b, -a * last]], dtype=torch.float64) / bb
    torch.testing.assert_close(turn @ turn.mT, torch.eye(2, dtype=torch.float64), atol=1e-9, rtol=0)
    x0, bar_eps, eps_t = draws(3, 1, 1, 1, 4, seed=seed).unbind()
    eps, omega = (a * last * bar_eps + b * eps_t) / bb, (b * bar_eps - a * last * eps_t) / bb
    ten = ddpm.diffuse_once(ddpm.diffuse(x0, steps(T - 1), bar_eps, s), steps(T), eps_t, s)  # (10)
    torch.testing.assert_close(ten, ddpm.diffuse(x0, steps(T), eps, s), rtol=1e-9, atol=1e-9)
    back = (b * eps - a * last * omega) / bb  # (12)
    torch.testing.assert_close(back, eps_t, rtol=1e-8, atol=1e-8)


def test_9119_11_13_14_15_one_noise_integrated_out():
    """Same expectation up to d (1 - beta^2/bar_beta^2), and a smaller variance: by Monte Carlo, any f."""
    s, t, n = chain([0.9] * 8), 8, 400_000
    a, b, bb, last = s["alpha"][t], s["beta"][t], s["bar_beta"][t], s["bar_beta"][t - 1]
    x0, bar_eps, eps_t = draws(3, n, 1, 1, 2).unbind()

    def f(x):  # any function; the post's eps_theta
        return torch.tanh(x) * 0.7 - 0.2 * x

    class Net(torch.nn.Module):  # the paper's
        def forward(self, x, t):
            return bb / b * f(x)

    x = s["bar_alpha"][t] * x0 + a * last * bar_eps + b * eps_t
    eleven = (eps_t - f(x)).square().sum((1, 2, 3))
    fifteen = ddpm.loss(Net(), x0, steps(t, n), (a * last * bar_eps + b * eps_t) / bb, s) * 2  # sum
    fourteen = b**2 / bb**2 * fifteen + 2 * (1 - b**2 / bb**2)
    gap = eleven.mean() - fourteen.mean()
    sigma = (eleven - fourteen).std() / n**0.5
    assert abs(gap) < 5 * sigma < 0.05
    assert fourteen.var() < eleven.var()


@given(LAWS, SEEDS)
def test_9119_15_post_form_and_paper_form_are_one_loss(alphas, seed):
    """|| eps - (bar_beta/beta) eps_theta ||^2 with eps_theta = (beta/bar_beta) net: value, gradient."""
    s, T = chain(alphas), len(alphas)
    net = torch.nn.Conv2d(1, 1, 1).double()
    x0, eps = draws(2, 3, 1, 2, 2, seed=seed).unbind()

    class Net(torch.nn.Module):
        def forward(self, x, t):
            return net(x)

    got = ddpm.loss(Net(), x0, steps(T, 3), eps, s)
    assert got.shape == (3,)
    grad = torch.autograd.grad(got.sum(), net.weight)[0]
    xt = s["bar_alpha"][T] * x0 + s["bar_beta"][T] * eps
    eps_theta = s["beta"][T] / s["bar_beta"][T] * net(xt)
    want = (eps - s["bar_beta"][T] / s["beta"][T] * eps_theta).square().sum((1, 2, 3)) / 4
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), net.weight)[0])


@given(st.lists(st.floats(0.3, 0.999), min_size=2, max_size=50), SEEDS)
def test_9119_16_17_mean_and_sigma_are_those_of_bayes(alphas, seed):
    """q(x_{t-1} | x_t, x_0) as the product of two Gaussians, weighted by their precisions."""
    s, T = chain(alphas), len(alphas)
    x0, xt = draws(2, 1, 1, 1, 4, seed=seed).unbind()
    a, b, before = s["alpha"][T], s["beta"][T], s["bar_beta"][T - 1]
    precision = 1 / before**2 + a**2 / b**2  # prior N(bar_alpha_{t-1} x0, before^2); N(xt; a x, b^2)
    mean = (s["bar_alpha"][T - 1] * x0 / before**2 + a * xt / b**2) / precision
    e = (xt - s["bar_alpha"][T] * x0) / s["bar_beta"][T]  # 9119 (6), solved for eps
    zero = torch.zeros_like(xt)
    got = ddpm.step_back(xt, steps(T), e, torch.zeros_like(s["beta"]), zero, s)  # (16)
    torch.testing.assert_close(got, mean, rtol=1e-8, atol=1e-8)
    sigma = ddpm.sigmas(s, "posterior")
    assert sigma[T].item() == pytest.approx((precision**-0.5).item(), rel=1e-9)
    noisy = ddpm.step_back(xt, steps(T), e, sigma, torch.ones_like(xt), s)  # (17)
    torch.testing.assert_close(noisy - got, zero + sigma[T], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["beta", "posterior", "zero"])
def test_9119_17_no_noise_on_the_finished_picture(kind):
    s = ddpm.make_schedule(100)
    row = ddpm.sigmas(s, kind)
    assert row[1] == 0 and row.shape == (101,)
    want = {"beta": s["beta"][50], "zero": 0, "posterior":
            s["bar_beta"][49] * s["beta"][50] / s["bar_beta"][50]}[kind]
    assert row[50] == want


@given(st.integers(21, 2000), st.sampled_from(["post", "paper"]))
@example(1000, "post")
@example(1000, "paper")
def test_9119_18_19_schedules(T, kind):
    """(18) written out; the products by a plain loop; bar_alpha_T near 0 for every T; (19)."""
    s = ddpm.make_schedule(T, kind)
    bar = 1.0
    for t in range(1, T + 1):
        if kind == "post":
            alpha = math.sqrt(1 - 20 / T * t / T)
        else:  # Ho et al.: 1e-4 to 0.02 at T = 1000
            alpha = math.sqrt(1 - 1000 / T * (1e-4 + (0.02 - 1e-4) * (t - 1) / (T - 1)))
        bar *= alpha
        assert s["alpha"][t].item() == pytest.approx(alpha, rel=1e-6)
        assert s["beta"][t].item() == pytest.approx(math.sqrt(1 - alpha**2), rel=1e-6)
        assert s["bar_alpha"][t].item() == pytest.approx(bar, rel=1e-5)
        assert s["bar_beta"][t].item() == pytest.approx(math.sqrt(1 - bar**2), rel=1e-5)
    assert all(row.dtype == torch.float32 and row.shape == (T + 1,) for row in s.values())
    assert s["bar_beta"][0] == 0 and s["bar_alpha"][0] == 1 and bar < 0.0072
    if kind == "post" and T == 1000:
        assert math.log(bar) < -0.005 * 1001  # 9119 (19)
        assert math.log(bar) == pytest.approx(-5.039, abs=1e-3)


@pytest.mark.parametrize("T, kind", [(20, "post"), (0, "post"), (1000, "cosine")])
def test_9119_18_wrong_schedules_are_refused(T, kind):
    with pytest.raises(ValueError, match=kind):
        ddpm.make_schedule(T, kind)


# ---- the sampler against laws that are known exactly ----

class Exact(torch.nn.Module):
    """The best eps for data N(m, std^2): bar_beta (x - bar_alpha m) / (bar_alpha^2 std^2 + bar_beta^2)."""

    def __init__(self, s, std, m=0.0):
        super().__init__()
        self.s, self.std, self.m = s, std, m

    def forward(self, x, t):
        a, b = (self.s[name][t].view(-1, 1, 1, 1) for name in ("bar_alpha", "bar_beta"))
        return b * (x - a * self.m) / (a**2 * self.std**2 + b**2)


@pytest.mark.parametrize("sigma, std, want", [
    ("beta", 1.0, 1.0000), ("posterior", 1.0, 0.9956), ("beta", 0.3, 0.3011), ("posterior", 0.3, 0.2964)])
def test_9119_1_17_sampler_brings_back_a_gaussian(sigma, std, want):
    """Mean and deviation of (17) with the exact net: in closed form, as on the card, and on 10^5 draws."""
    s = ddpm.make_schedule(1000)
    s64 = {name: row.double() for name, row in s.items()}
    row, mean, var = ddpm.sigmas(s64, sigma), 0.0, 1.0
    for t in range(1000, 0, -1):
        a, b, bb, ba = (s64[k][t].item() for k in ("alpha", "beta", "bar_beta", "bar_alpha"))
        slope = (1 - b * b / (ba**2 * std**2 + bb**2)) / a  # x -> slope x + shift: (17) is affine here
        mean = slope * mean + b * b * ba * 0.4 / (ba**2 * std**2 + bb**2) / a
        var = slope**2 * var + row[t].item() ** 2
    assert var**0.5 == pytest.approx(want, abs=1.5e-4)
    g = torch.Generator().manual_seed(1)
    xT = torch.randn(100_000, 1, 1, 1, generator=g)
    for x in ddpm.sample(Exact(s, std, 0.4), xT, s, g, sigma, clip=False):
        pass
    assert x.std().item() == pytest.approx(var**0.5, rel=0.012)  # 5 / sqrt(2 * 10^5)
    assert x.mean().item() == pytest.approx(mean, abs=5 * var**0.5 / 100_000**0.5)


@given(SEEDS, st.floats(-1, 1))
def test_9152_one_training_point_is_returned_exactly(seed, point):
    """With the posterior's sigma the last steps forget everything but the point."""
    s = ddpm.make_schedule(40)
    g = torch.Generator().manual_seed(seed)
    xT = torch.randn(3, 1, 2, 2, generator=g)
    for x in ddpm.sample(Exact(s, 0.0, point), xT, s, g, "posterior", clip=False):
        pass
    torch.testing.assert_close(x, torch.full_like(x, point), atol=1e-5, rtol=0)


@given(SEEDS)
def test_ddim_with_eta_1_and_all_steps_is_ancestral(seed):
    s = {name: row.double() for name, row in ddpm.make_schedule(60).items()}
    net, xT = Exact(s, 0.5, 0.1), draws(3, 1, 2, 2, seed=seed)
    ways = [torch.stack(list(ddpm.sample(net, xT, s, torch.Generator().manual_seed(seed), "posterior",
                                         steps=steps))) for steps in (None, 60)]
    torch.testing.assert_close(*ways, rtol=1e-6, atol=1e-6)


@given(SEEDS, st.integers(1, 60))
def test_ddim_with_eta_0_needs_no_luck(seed, count):
    s = ddpm.make_schedule(60)
    net, xT = Exact(s, 0.5), torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    ways = [list(ddpm.sample(net, xT, s, torch.Generator().manual_seed(k), steps=count, eta=0.0))
            for k in (1, 2)]
    assert len(ways[0]) == count + 1 and torch.equal(ways[0][-1], ways[1][-1])


def test_ddim_steps_out_of_range_are_refused():
    s = ddpm.make_schedule(60)
    for count in (0, 61):
        with pytest.raises(ValueError, match="60"):
            next(ddpm.sample(Exact(s, 1.0), torch.zeros(1, 1, 1, 1), s, torch.Generator(), steps=count))


@given(SEEDS, st.integers(1, 60))
def test_clip_moves_the_foreseen_picture_only_where_it_is_outside(seed, t):
    s = {name: row.double() for name, row in ddpm.make_schedule(60).items()}
    e, xt = draws(2, 4, 1, 2, 2, seed=seed).unbind()
    new = ddpm.clip_eps(e, xt, steps(t, 4), s)
    a, b = s["bar_alpha"][t], s["bar_beta"][t]
    before, after = (xt - b * e) / a, (xt - b * new) / a
    torch.testing.assert_close(after, before.clamp(-1, 1), atol=1e-9, rtol=0)


# ---- the bound ----

@given(st.floats(-1.5, 1.5), st.floats(0.002, 3))
@example(0.0, 0.0045)
def test_decoder_bins_sum_to_one(mu, sigma):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_p = ddpm.log_bin(x, torch.full_like(x, mu), torch.tensor(sigma, dtype=torch.float64))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_decoder_bin_by_quadrature():
    """One bin as an integral of the density, on a grid; and the two open ends."""
    mu, sigma, x = 0.03, 0.02, torch.tensor([5 / 127.5, -1.0, 1.0], dtype=torch.float64)
    got = ddpm.log_bin(x, torch.full_like(x, mu), torch.tensor(sigma, dtype=torch.float64)).exp()
    z = np.linspace(5 / 127.5 - 1 / 255, 5 / 127.5 + 1 / 255, 20_001)
    density = np.exp(-((z - mu) / sigma) ** 2 / 2) / sigma / math.sqrt(2 * math.pi)
    assert got[0].item() == pytest.approx(np.trapezoid(density, z), rel=1e-6)
    ends = ddpm.log_bin(x, torch.tensor([0.0, -1.0, 1.0]).double(), torch.tensor(0.5).double()).exp()
    half = 0.5 + 0.5 * math.erf(1 / 255 / 0.5 / math.sqrt(2))
    assert ends[1].item() == pytest.approx(half) and ends[2].item() == pytest.approx(half)


def test_bound_lies_above_the_truth_and_closes_in():
    """Pixels from N(0, 0.2^2), rounded to bytes: the truth is known; larger T, smaller gap."""
    g, std = torch.Generator().manual_seed(0), 0.2
    level = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    x = torch.randn(1500, 1, 4, 4, generator=g, dtype=torch.float64) * std
    index = (x[..., None] - level).abs().argmin(-1)
    x = level.float()[index]
    edge = torch.special.ndtr((level[:-1] + level[1:]) / 2 / std)
    p = torch.cat([edge, edge.new_ones(1)]) - torch.cat([edge.new_zeros(1), edge])
    truth = -p[index].log2().mean().item()
    gaps = []
    for T in (30, 100, 1000):
        s = ddpm.make_schedule(T)
        bits = ddpm.bits_per_dim(Exact(s, std), x, s, torch.Generator().manual_seed(1), clip=False)
        assert bits.shape == (1500,) and bits.dtype == torch.float64
        gaps.append(bits.mean().item() - truth)
    assert gaps[0] > gaps[1] + 0.05 > gaps[2] + 0.1  # 0.28, 0.16, 0.01 with much data
    assert -0.02 < gaps[2] < 0.04  # the standard error is about 0.005


def test_bound_by_a_second_road():
    """Four steps, a net that says 0, one pixel: every term written out with plain numbers."""
    s, T = chain([0.99, 0.95, 0.9, 0.8]), 4  # not down to bar_alpha = 0: the prior's term counts
    x0 = torch.full((1, 1, 1, 1), 25 / 127.5 - 1, dtype=torch.float64)

    class Zero(torch.nn.Module):
        def forward(self, x, t):
            return torch.zeros_like(x)

    got = ddpm.bits_per_dim(Zero(), x0, s, torch.Generator().manual_seed(3), clip=False).item()
    a, b, ba, bb = ([v.item() for v in s[k].double()] for k in ("alpha", "beta", "bar_alpha", "bar_beta"))
    g, x = torch.Generator().manual_seed(3), x0.item()
    nats = 0.5 * (ba[T] ** 2 * x * x + bb[T] ** 2 - 1 - math.log(bb[T] ** 2))
    for t in range(T, 0, -1):
        eps = torch.randn(1, 1, 1, 1, generator=g).item()
        xt = ba[t] * x + bb[t] * eps
        mu = xt / a[t]
        if t == 1:
            sd = bb[1] * b[2] / bb[2]
            cdf = [0.5 * (1 + math.erf((x - mu + d) / sd / math.sqrt(2))) for d in (1 / 255, -1 / 255)]
            nats -= math.log(cdf[0] - cdf[1])
        else:
            want = (a[t] * bb[t - 1] ** 2 * xt + ba[t - 1] * b[t] ** 2 * x) / bb[t] ** 2
            q, p = bb[t - 1] * b[t] / bb[t], b[t]
            nats += math.log(p / q) + (q * q + (want - mu) ** 2) / (2 * p * p) - 0.5
    assert got == pytest.approx(nats / math.log(2), rel=1e-4)


# ---- the network ----

def tiny(**kw):
    return ddpm.UNet(**(dict(channels=1, width=8, mults=(1, 2), blocks=1, attention=(1,), dropout=0.0) | kw))


def scrambled(net, seed=0):
    """The same net with its zero-initialised layers filled, so that everything shows."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return net


@given(st.integers(8, 33), st.integers(8, 33), st.sampled_from([1, 3]), st.integers(1, 3), st.integers(4, 9))
def test_unet_keeps_any_size_and_starts_at_zero(h, w, c, levels, width):
    net = tiny(channels=c, mults=(1, 2, 2)[:levels], attention=(0,), width=width)
    out = net(torch.randn(2, c, h, w), torch.tensor([1, 7]))
    assert out.shape == (2, c, h, w) and out.dtype == torch.float32
    assert torch.equal(out, torch.zeros_like(out))


def test_unet_first_loss_is_one():
    s = ddpm.make_schedule(1000)
    eps = torch.randn(64, 1, 16, 16)
    value = ddpm.loss(tiny(), torch.rand(64, 1, 16, 16) * 2 - 1, torch.randint(1, 1001, (64,)), eps, s)
    assert value.mean().item() == pytest.approx(1, abs=0.05)


def test_unet_paper_has_the_papers_size():
    """35,746,307: what google/ddpm-cifar10-32 has; Ho et al. say 35.7M."""
    with torch.device("meta"):
        assert sum(p.numel() for p in ddpm.UNet().parameters()) == 35_746_307


def test_unet_sees_t_and_no_other_picture():
    net = scrambled(tiny())
    x, t = torch.randn(4, 1, 16, 16), torch.tensor([3, 3, 900, 901])
    out = net(x, t)
    assert not torch.allclose(out[2], net(x, torch.tensor([3, 3, 3, 901]))[2], atol=1e-3)
    other = x.clone()
    other[1:] = 0
    torch.testing.assert_close(net(other, t)[0], out[0], atol=1e-5, rtol=1e-4)


@given(st.integers(1, 7), st.integers(1, 7), SEEDS)
def test_unet_grow_is_doubling_and_then_the_convolution(h, w, seed):
    torch.manual_seed(seed)
    grow = ddpm.Grow(3, 2, 3, padding=1).double()
    x = torch.randn(2, 3, h, w, dtype=torch.float64)
    big = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    padded = torch.nn.functional.pad(big, (1, 1, 1, 1))
    want = grow.bias.view(1, 2, 1, 1).expand(2, 2, 2 * h, 2 * w).clone()
    for dy in range(3):
        for dx in range(3):
            want += torch.einsum("nihw,oi->nohw", padded[..., dy:dy + 2 * h, dx:dx + 2 * w], grow.weight[..., dy, dx])
    torch.testing.assert_close(grow(x), want)


def test_unet_attention_by_a_plain_softmax():
    layer = scrambled(ddpm.Attention(8)).double()
    x = draws(2, 8, 3, 5)
    with torch.no_grad():
        got = layer(x)
        h = torch.nn.functional.group_norm(x, 2, layer.norm.weight, layer.norm.bias, 1e-6)
        q, k, v = torch.einsum("oc,bchw->bohw", layer.qkv.weight[..., 0, 0], h).add(
            layer.qkv.bias[:, None, None]).flatten(2).split(8, dim=1)  # (B, C, HW)
        weight = (torch.einsum("bci,bcj->bij", q, k) / math.sqrt(8)).exp()
        h = torch.einsum("bij,bcj->bci", weight / weight.sum(-1, keepdim=True), v)
        want = x + (torch.einsum("oc,bci->boi", layer.out.weight[..., 0, 0], h)
                    + layer.out.bias[:, None]).view_as(x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("width", [4, 16, 32, 48, 128, 256])
def test_unet_normalises_groups_and_not_single_channels(width):
    """One channel a group would subtract the picture's own colour, which the last layer must give back."""
    count = ddpm.groups(width)
    assert width % count == 0 and width // count >= 4 and count == {128: 32, 256: 32}.get(width, count)


def test_unet_time_code_by_plain_sines():
    got = ddpm.time_code(torch.tensor([1, 500, 1000]), 8)
    for row, t in zip(got, (1, 500, 1000)):
        angles = [t * 10_000 ** (-k / 3) for k in range(4)]
        want = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        np.testing.assert_allclose(row.numpy(), want, atol=2e-4)  # float32 at an angle of 1000


def test_unet_under_bfloat16_gives_float32_and_finite_values():
    net, s = scrambled(tiny()), ddpm.make_schedule(1000)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.zeros(2, 1, 8, 8), torch.tensor([1, 9])).dtype == torch.float32
        value = ddpm.loss(net, torch.zeros(2, 1, 8, 8), torch.tensor([1, 1000]), torch.randn(2, 1, 8, 8), s)
    assert value.dtype == torch.float32 and value.isfinite().all()


# ---- moving average ----

@given(st.integers(0, 10_000), st.floats(0.0, 0.9999), SEEDS)
def test_ema_is_the_naive_average(step, decay, seed):
    net, ema = scrambled(torch.nn.Linear(3, 2), seed), torch.nn.Linear(3, 2).requires_grad_(False)
    before = [p.clone() for p in ema.parameters()]
    live = [p.clone() for p in net.parameters()]
    ddpm.update_ema(ema, net, step, decay)
    d = min(decay, (1 + step) / (10 + step))
    for old, p, new, kept in zip(before, net.parameters(), ema.parameters(), live):
        torch.testing.assert_close(new, d * old + (1 - d) * p, rtol=1e-5, atol=1e-6)
        assert new.data_ptr() != p.data_ptr() and torch.equal(p, kept)
        assert not new.requires_grad and new.grad_fn is None  # else every step would be remembered
    same = copy.deepcopy(net).requires_grad_(False)
    ddpm.update_ema(same, net, step, decay)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), net.parameters()))


# ---- learning ----

class Dot(torch.nn.Module):
    """eps for points of the plane: a small dense net on (x, bar_alpha_t, log bar_beta_t)."""

    def __init__(self, s):
        super().__init__()
        self.code = torch.stack([s["bar_alpha"], s["bar_beta"].clamp(min=1e-3).log()], 1)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64),
                                       torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(),
                                       torch.nn.Linear(64, 2))

    def forward(self, x, t):
        return self.net(torch.cat([x.flatten(1), self.code[t]], 1)).view_as(x)


def test_end_to_end_a_mixture_is_learnt():
    """Loss stays above the exact denoiser's; samples are close to the data by MMD, noise is not."""
    torch.manual_seed(0)
    s = ddpm.make_schedule(100)
    net = Dot(s)
    centres = torch.tensor([[0.6, 0.6], [-0.6, 0.6], [0.0, -0.7]])

    def data(n):
        return (centres[torch.randint(3, (n,))] + 0.15 * torch.randn(n, 2)).view(n, 2, 1, 1)

    adam = torch.optim.Adam(net.parameters(), lr=1e-2)
    for k in range(1000):
        adam.param_groups[0]["lr"] = 1e-2 * (1 - k / 1000)
        x0, t = data(256), torch.randint(1, 101, (256,))
        ddpm.loss(net, x0, t, torch.randn_like(x0), s).mean().backward()
        adam.step()
        adam.zero_grad()

    class Best(torch.nn.Module):  # posterior over the three centres, then the mean of eps
        def forward(self, x, t):
            a, b = s["bar_alpha"][t][:, None, None], s["bar_beta"][t][:, None, None]
            v = a**2 * 0.15**2 + b**2
            d = x.flatten(1)[:, None] - a * centres
            w = (-(d**2).sum(-1, keepdim=True) / 2 / v).softmax(1)
            return (w * b * d / v).sum(1).view_as(x)

    x0, t = data(20_000), torch.arange(20_000) % 100 + 1
    eps = torch.randn_like(x0)
    with torch.no_grad():
        mine, best = (ddpm.loss(f, x0, t, eps, s).mean().item() for f in (net, Best()))
    assert best < mine < best + 0.02, (best, mine)
    g = torch.Generator().manual_seed(2)
    for x in ddpm.sample(net, torch.randn(1000, 2, 1, 1, generator=g), s, g, clip=False):
        pass

    def mmd(p, q):
        def kernel(u, v):
            return (-torch.cdist(u, v).square() / 0.1).exp().mean()
        p, q = p.flatten(1), q.flatten(1)
        return (kernel(p, p) + kernel(q, q) - 2 * kernel(p, q)).item()

    assert mmd(x, data(1000)) < 0.02 < 0.1 < mmd(torch.randn(1000, 2, 1, 1), data(1000))


# ---- steps, order, noise ----

@given(st.integers(1, 40), st.integers(1, 50), SEEDS)
def test_every_picture_once_an_epoch(count, batch, seed):
    epochs = 3
    total = -(-epochs * count // batch)
    rows = torch.cat([ddpm.batch_rows(count, k, batch, seed, torch.device("cpu")) for k in range(total)])
    for k in range(epochs):
        assert sorted(rows[k * count:(k + 1) * count].tolist()) == list(range(count))


@given(st.integers(0, 2**63), st.integers(0, 2**63))
def test_generators_differ_by_every_part_of_their_key(a, b):
    draw = [torch.rand(4, generator=ddpm.generator("cpu", *key)) for key in ((a, b), (a, b), (a, b + 1), (a + 1, b))]
    assert torch.equal(draw[0], draw[1])
    for p, q in ((0, 2), (0, 3), (2, 3)):
        assert not torch.equal(draw[p], draw[q])


# ---- pictures in, pictures out ----

@given(SEEDS)
def test_bytes_to_floats_and_back_is_the_identity(seed):
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(ddpm.to_uint8(ddpm.to_float(x)), x)
    assert ddpm.to_float(x).min() == -1 and ddpm.to_float(x).max() == 1
    assert ddpm.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_nearest_finds_the_picture_itself():
    x = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    noisy = (x[[7, 31]].int() + torch.randint(-3, 4, (2, 3, 4, 4))).clamp(0, 255).to(torch.uint8)
    assert torch.equal(ddpm.nearest(noisy, x), x[[7, 31]])


def read_png(path):
    """(C, H, W) uint8 of an 8-bit PNG whose lines have no filter."""
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    at, body = 8, b""
    while at < len(raw):
        size, kind = struct.unpack(">I4s", raw[at:at + 8])
        part = raw[at + 8:at + 8 + size]
        assert struct.unpack(">I", raw[at + 8 + size:at + 12 + size])[0] == zlib.crc32(kind + part)
        if kind == b"IHDR":
            w, h, depth, colour = struct.unpack(">2I2B", part[:10])
        body += part if kind == b"IDAT" else b""
        at += 12 + size
    c = {0: 1, 2: 3}[colour]
    lines = np.frombuffer(zlib.decompress(body), np.uint8).reshape(h, 1 + w * c)
    assert depth == 8 and not lines[:, 0].any()
    return torch.tensor(lines[:, 1:].reshape(h, w, c).transpose(2, 0, 1))


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3]), SEEDS)
def test_png_holds_the_very_pixels(h, w, c, seed):
    image = torch.randint(0, 256, (c, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    ddpm.write_png(Path("a.png"), image)
    assert torch.equal(read_png(Path("a.png")), image)


def test_png_by_pillow_and_refusal():
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    ddpm.write_png(Path("a.png"), image)
    Image = pytest.importorskip("PIL.Image")
    assert np.array_equal(np.asarray(Image.open("a.png")), image.permute(1, 2, 0).numpy())
    with pytest.raises(ValueError, match="2 channels"):
        ddpm.write_png(Path("b.png"), image[:2])


def test_grid_puts_pictures_in_rows():
    x = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 60, 60)
    sheet = ddpm.grid(x, 3)
    assert sheet.shape == (1, 121, 182)
    assert [sheet[0, 30, 30], sheet[0, 30, 91], sheet[0, 91, 30]] == [0, 1, 3]
    assert sheet[0, 30, 60] == 255 and sheet[0, 91, 152] == 255  # the line between; an empty place
    assert ddpm.grid(x[:1, :, :8, :8], 1).shape == (1, 96, 96)  # small ones enlarged


def test_faces_are_alike_for_every_seed_and_show_their_attributes():
    x, y, = ddpm.draw_faces(600, 32)
    torch.manual_seed(99)
    again, _ = ddpm.draw_faces(600, 32)
    assert torch.equal(x, again) and x.shape == (600, 32, 32, 3) and x.dtype == torch.uint8
    assert y.shape == (600, 6) and y.min() >= 0 and y.max() <= 1
    cheek = x[:, 19, 16].float().mean(1)  # between nose and mouth: skin goes from light to dark
    assert np.corrcoef(cheek, y[:, 0])[0, 1] < -0.9
    top = x[:, 5, 16].float().mean(1)  # hair
    assert np.corrcoef(top, y[:, 1])[0, 1] < -0.9
    big, _ = ddpm.draw_faces(600, 64)
    small = torch.nn.functional.avg_pool2d(big.permute(0, 3, 1, 2).float(), 2).permute(0, 2, 3, 1)
    assert (small - x.float()).abs().mean() < 6  # the same faces at any size


# ---- loaders, on small files of each real format ----

def write_idx(folder, gz, n=(6, 3)):
    folder.mkdir()
    kept = []
    for part, count in zip(("train", "t10k"), n):
        x = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        y = np.arange(count, dtype=np.uint8)
        kept += [x, y]
        for kind, a in (("images-idx3", x), ("labels-idx1", y)):
            raw = struct.pack(f">HBB{a.ndim}I", 0, 8, a.ndim, *a.shape) + a.tobytes()
            name = f"{part}-{kind}-ubyte" + (".gz" if gz else "")
            (folder / name).write_bytes(gzip.compress(raw) if gz else raw)
    return kept


def load(data, size=32):
    return ddpm.load_images(str(data), size, "cache", torch.device("cpu"))


@pytest.mark.parametrize("gz", [False, True])
def test_idx_folder(gz):
    x, y, x_test, y_test = write_idx(Path("d"), gz)
    got = load("d")
    for tensor, want in zip(got, (x[:, None], x_test[:, None], y, y_test)):
        assert tensor.dtype == torch.uint8 and np.array_equal(tensor.numpy(), want)


def write_cifar10(path, n=2):
    rng = np.random.default_rng(0)
    rows = {name: rng.integers(0, 256, (n, 3073), dtype=np.uint8)
            for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]}
    with tarfile.open(path, "w:gz") as tar:
        for name, a in reversed(rows.items()):  # order in the archive must not matter
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = a.nbytes
            tar.addfile(info, io.BytesIO(a.tobytes()))
    return rows


def test_cifar10_archive():
    rows = write_cifar10("c.tar.gz")
    x, x_test, y, y_test = load("c.tar.gz")
    assert x.shape == (10, 3, 32, 32) and x_test.shape == (2, 3, 32, 32)
    assert y.tolist() == [a[i, 0] for k in range(1, 6) for a in [rows[f"data_batch_{k}"]] for i in range(2)]
    assert x[2, 1, 3, 4] == rows["data_batch_2"][0, 1 + 1024 + 3 * 32 + 4]
    assert np.array_equal(x_test.flatten(1).numpy(), rows["test_batch"][:, 1:])
    assert not Path("cifar-10-batches-bin").exists()


@pytest.mark.parametrize("shape", [(20, 8, 9), (20, 8, 9, 1), (20, 8, 9, 3)])
def test_npy(shape):
    a = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save("a.npy", a)
    x, x_test, y, y_test = load("a.npy")
    assert y is None and y_test is None and len(x) == 18 and len(x_test) == 2  # the last tenth held out
    want = a[:, None] if a.ndim == 3 else a.transpose(0, 3, 1, 2)
    assert np.array_equal(torch.cat([x, x_test]).numpy(), want)


def test_picture_folder(capfd):
    Image = pytest.importorskip("PIL.Image")
    Path("p/sub").mkdir(parents=True)
    for k in range(12):
        a = np.zeros((20, 30, 3), np.uint8)
        a[:, 5:25] = 20 * k  # the middle square; the rest is cut away
        Image.fromarray(a).save(f"p/{'sub/' if k % 2 else ''}{k:02}.png")
    Path("p/bad.jpg").write_bytes(b"no picture")
    x, x_test, *_ = load("p", 16)
    assert x.shape == (11, 1, 16, 16) and x_test.shape == (1, 1, 16, 16)  # grey, since all are
    assert torch.cat([x, x_test])[:, 0, 8, 8].tolist() == [20 * k for k in (*range(0, 12, 2), *range(1, 12, 2))]
    assert "1 of 13" in capfd.readouterr().err


@pytest.mark.skipif(not os.environ.get("FASHION_MNIST"), reason="FASHION_MNIST names no folder of real idx files")
def test_real_fashion_mnist():
    x, x_test, y, y_test = load(os.environ["FASHION_MNIST"])
    assert x.shape == (60_000, 1, 28, 28) and x_test.shape == (10_000, 1, 28, 28)
    assert torch.bincount(y.long()).tolist() == [6000] * 10
    assert x.float().mean().item() / 255 == pytest.approx(0.2860, abs=1e-4)  # as published
    assert ddpm.main(["--data", os.environ["FASHION_MNIST"], "--steps", "2", *TINY]) == 0
    assert read_png(Path("out/ddpm/samples.png")).shape[0] == 1


def served(monkeypatch, files):
    """Instead of the network: urls end in a file's name; anything else is offline."""
    asked = []

    class Answer(io.BytesIO):
        def info(self):
            return http.client.HTTPMessage()

    def get(request):
        asked.append(request.full_url)
        body = files.get(request.full_url.rpartition("/")[2])
        if body is None:
            raise OSError("no network")
        return Answer(body)
    monkeypatch.setattr(torch.hub, "urlopen", get)
    return asked


def test_download_once_and_only_whole(monkeypatch):
    import hashlib
    body = b"data" * 99
    sha = hashlib.sha256(body).hexdigest()
    asked = served(monkeypatch, {"good.bin": body, "cut.bin": body[:-1]})
    path = ddpm.download("d/x.bin", ["http://a/cut.bin", "http://b/good.bin"], sha[:32], "cache")
    assert path == Path("cache/d/x.bin") and path.read_bytes() == body
    assert asked == ["http://a/cut.bin", "http://b/good.bin"]  # the cut one is not taken
    assert ddpm.download("d/x.bin", ["http://a/cut.bin"], sha, "cache") == path and len(asked) == 2
    assert [p.name for p in Path("cache/d").iterdir()] == ["x.bin"]
    path.write_bytes(b"broken")
    with pytest.raises(ddpm.UserError, match="delete it"):
        ddpm.download("d/x.bin", ["http://b/good.bin"], sha[:32], "cache")
    with pytest.raises(ddpm.UserError, match="put the file from http://a/cut.bin at cache/y.bin"):
        ddpm.download("y.bin", ["http://a/cut.bin"], sha, "cache")
    assert not list(Path("cache").glob("*.*"))


def test_full_disk_during_a_download_stops_with_1(monkeypatch, capsys):
    asked = []

    def full(request):
        asked.append(request)
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch.hub, "urlopen", full)
    refused(capsys, ["--data", "mnist", "--cache", "here", "--steps", "1"], "No space left", code=1)
    assert len(asked) == 1 and not [p for p in Path("here").rglob("*") if p.is_file()]


def test_named_sets_offline_say_which_file_to_put_where(monkeypatch, capsys):
    served(monkeypatch, {})
    for name in ("mnist", "fashion-mnist", "cifar10"):
        assert ddpm.main(["--data", name, "--cache", "here", "--steps", "1", "--out", name]) == 2
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert "put the file from http" in err and "here" in err
    assert not [p for p in Path("here").rglob("*") if p.is_file()]


def test_mnist_by_name_from_the_cache(monkeypatch):
    write_idx(Path("d"), True)
    folder = Path("cache/mnist")
    folder.mkdir(parents=True)
    import hashlib
    sums = []
    for name in ddpm.IDX:
        raw = Path(f"d/{name}.gz").read_bytes()
        (folder / f"{name}.gz").write_bytes(raw)
        sums.append(hashlib.sha256(raw).hexdigest())
    asked = served(monkeypatch, {})
    monkeypatch.setitem(ddpm.NAMED, "mnist", (ddpm.NAMED["mnist"][0], sums))
    assert load("mnist")[0].shape == (6, 1, 28, 28) and not asked


# ---- wrong input: one line, exit code 2 ----

def refused(capsys, argv, *words, code=2):
    """main refuses argv with one line that has `words`, and no traceback."""
    try:
        got = ddpm.main(argv)
    except SystemExit as stop:  # argparse
        got = stop.code
    err = capsys.readouterr().err.strip().splitlines()
    assert got == code, err
    assert all(word in err[-1] for word in words), err
    assert not any("Traceback" in line for line in err)
    return err


def broken_files():
    write_idx(Path("ok"), True)
    Path("empty").mkdir()
    write_idx(Path("cut"), True)
    cut = Path("cut/train-images-idx3-ubyte.gz")
    cut.write_bytes(cut.read_bytes()[:-9])
    write_idx(Path("foreign"), False)
    Path("foreign/t10k-images-idx3-ubyte").write_bytes(b"not an idx file at all")
    Path("bad.tar.gz").write_bytes(b"no archive")
    write_cifar10("some.tar.gz")
    with tarfile.open("part.tar.gz", "w:gz") as tar:
        tar.add("ok/train-labels-idx1-ubyte.gz", "cifar-10-batches-bin/data_batch_1.bin")
    np.save("float.npy", np.zeros((5, 8, 8), np.float32))
    np.save("flat.npy", np.zeros((5, 64), np.uint8))
    np.save("one.npy", np.zeros((1, 8, 8), np.uint8))
    np.save("four.npy", np.zeros((5, 8, 8, 4), np.uint8))
    np.save("two.npy", np.zeros((5, 8, 8, 2), np.uint8))
    np.save("none.npy", np.zeros((0, 8, 8), np.uint8))
    np.save("five.npy", np.zeros((5, 8, 8, 3, 1), np.uint8))
    np.save("scalar.npy", np.uint8(5))
    np.save("words.npy", np.array(["a", "b"]))
    np.savez("zip.npz", a=np.zeros((5, 8, 8), np.uint8))
    Path("zip.npz").rename("zip.npy")
    write_idx(Path("untested"), True, n=(6, 0))
    np.save("objects.npy", np.array([{}, {}], object), allow_pickle=True)
    Path("cut.npy").write_bytes(Path("float.npy").read_bytes()[:70])


@pytest.mark.parametrize("data", ["nowhere", "nowhere.npy", "nowhere.tar.gz", "empty", "cut", "foreign", "bad.tar.gz",
                                  "part.tar.gz", "float.npy", "flat.npy", "one.npy", "four.npy", "objects.npy",
                                  "cut.npy", "two.npy", "none.npy", "five.npy", "scalar.npy", "words.npy",
                                  "zip.npy", "untested"])
def test_wrong_data_is_refused(capsys, data):
    broken_files()
    refused(capsys, ["--data", data, "--steps", "1", *TINY], data)


@pytest.mark.parametrize("argv, word", [
    ("--steps 0", "--steps"), ("--steps ten", "--steps"), ("--T 20", "--T"), ("--lr nan", "--lr"),
    ("--schedule cosine", "--schedule"), ("--attention 3", "--attention"), ("--mults 1,x", "--mults"),
    ("--sample-steps 2000", "--sample-steps"), ("--batch", "--batch"), ("--step 3", "--step"),
    ("--eta 0.5", "--eta"), ("--sample-steps 5 --sigma zero", "--sigma"), ("--eval-images 1", "--eval-images"),
    ("--mults 0,1", "--mults"), ("--mults=", "--mults"), ("--ema 1.5", "--ema"), ("--dropout 1", "--dropout")])
def test_wrong_flags_are_refused(capsys, argv, word):
    refused(capsys, argv.split(), word)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_gpu_without_cuda_is_refused(capsys):
    refused(capsys, ["--gpu"], "CUDA", "--gpu")


# ---- runs ----

@pytest.fixture
def pictures():
    """24 pictures of 9 x 9: odd, so that sizes round on the way down."""
    a = np.random.default_rng(0).integers(0, 256, (24, 9, 9, 3), dtype=np.uint8)
    np.save("a.npy", a)
    return ["--data", "a.npy", *TINY]


def states(*folders):
    return [torch.load(f"{f}/ckpt.pt", weights_only=True) for f in folders]


def same(a, b, exact=True):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], exact) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(p, q, exact) for p, q in zip(a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-4, atol=1e-5)  # 1 % of a step of Adam
    return a == b


def test_run_writes_what_it_says(pictures, capsys):
    assert ddpm.main([*pictures, "--steps", "5"]) == 0
    out = Path("out/ddpm")
    assert {p.name for p in out.iterdir()} == {
        "ckpt.pt", "log.csv", "metrics.json", "samples.png", "building.png", "nearest.png",
        "samples_000002.png", "samples_000004.png"}
    m = json.loads((out / "metrics.json").read_text())
    assert m["step"] == 5 and m["images_seen"] == 20 and m["bits_images"] == 2 and m["bits_schedule"] == "post"
    assert len(m["held_out_loss_ema_by_t"]) == 10 == len(m["held_out_loss_raw_by_t"])
    assert 0 < m["held_out_loss_ema"] < 2 and m["bits_standard_error"] > 0 and m["images_per_second"] > 0
    rows = (out / "log.csv").read_text().splitlines()
    assert rows[0] == "step,items,rate,elapsed,loss,lr" and rows[-1].startswith("5,20,")
    said = capsys.readouterr().out
    assert "step 5/5  loss" in said and "float32" in said and "parameters" in said


def test_the_bound_is_that_of_the_sampler_in_use(pictures):
    bits = {}
    for how in (["beta"], ["posterior"], ["posterior", "--no-clip"], ["zero"]):
        assert ddpm.main([*pictures, "--steps", "2", "--out", "b", "--sigma", *how]) == 0
        m = json.loads(Path("b/metrics.json").read_text())
        bits[tuple(how)] = m["bits_per_dim"]
        assert m["bits_sigma"] == ("beta" if how == ["zero"] else how[0])  # zero has no density
    assert len(set(bits.values())) == 3 and bits["beta",] == bits["zero",]


def test_resume_is_the_straight_run_bit_for_bit(pictures):
    argv = [*pictures, "--steps", "7", "--dropout", "0.3", "--flip"]
    assert ddpm.main([*argv, "--out", "a"]) == 0
    stop_after(3)
    assert ddpm.main([*argv, "--out", "b"]) == 130
    assert states("b")[0]["step"] == 3
    assert ddpm.main(["--resume", "--out", "b", "--samples", "4"]) == 0
    assert same(*states("a", "b"))
    assert Path("a/samples.png").read_bytes() == Path("b/samples.png").read_bytes()


def stop_after(step, kind=signal.SIGINT):
    """From now on, ddpm.loss sends this process a signal at that call; then it is itself again."""
    loss, calls = ddpm.loss, [0]

    def counting(*args):
        calls[0] += 1
        if calls[0] == step:
            ddpm.loss = loss
            signal.raise_signal(kind)
        return loss(*args)
    ddpm.loss = counting


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_exit_130(pictures, kind, capsys):
    stop_after(2, kind)
    assert ddpm.main([*pictures, "--steps", "50"]) == 130
    assert states("out/ddpm")[0]["step"] == 2
    assert "--resume" in capsys.readouterr().out
    assert signal.getsignal(kind) in (signal.SIG_DFL, signal.default_int_handler)


def test_more_steps_after_the_end_and_contradictions(pictures, capsys):
    assert ddpm.main([*pictures, "--steps", "2"]) == 0
    assert ddpm.main(["--resume", "--steps", "3"]) == 0 and states("out/ddpm")[0]["step"] == 3
    refused(capsys, ["--resume", "--width", "16"], "--width 16", "8")
    np.save("b.npy", np.zeros((20, 12, 12, 3), np.uint8))
    Path("a.npy").unlink()
    Path("b.npy").rename("a.npy")
    refused(capsys, ["--resume"], "a.npy", "9, 9")


def test_older_runs_and_other_folders_are_kept(pictures, capsys):
    for k in range(3):
        assert ddpm.main([*pictures, "--steps", "1", "--seed", str(k)]) == 0
    assert "is now in" in capsys.readouterr().out
    seeds = [json.loads(Path(f"out/{f}/metrics.json").read_text())["seed"] for f in ("ddpm.1", "ddpm.2", "ddpm")]
    assert seeds == [0, 1, 2]
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    refused(capsys, [*pictures, "--out", "mine"], "mine")
    Path("file").write_text("x")
    refused(capsys, [*pictures, "--out", "file"], "file")


def test_wrong_data_leaves_the_older_run_where_it_is(pictures, capsys):
    assert ddpm.main([*pictures, "--steps", "1"]) == 0
    refused(capsys, ["--data", "nowhere", "--steps", "1"], "nowhere")
    assert states("out/ddpm")[0]["step"] == 1 and not Path("out/ddpm.1").exists()


def test_foreign_and_cut_checkpoints_are_refused(pictures, capsys):
    refused(capsys, ["--resume"], "no such checkpoint")
    assert ddpm.main([*pictures, "--steps", "1"]) == 0
    path = Path("out/ddpm/ckpt.pt")
    whole = path.read_bytes()
    torch.save({"script": "nvae", "config": {}}, "other.pt")
    for body in (b"", b"text", whole[:len(whole) // 2], Path("other.pt").read_bytes(), zlib.compress(whole)):
        path.write_bytes(body)
        refused(capsys, ["--resume"], "not a checkpoint of ddpm.py")
        refused(capsys, ["--sample-only", "1"], "not a checkpoint of ddpm.py")


@pytest.mark.parametrize("when", ["loss", "weight"])
def test_what_is_not_finite_stops_with_1_and_keeps_the_last_good_checkpoint(pictures, capsys, monkeypatch, when):
    assert ddpm.main([*pictures, "--steps", "2"]) == 0
    good = Path("out/ddpm/ckpt.pt").read_bytes()
    if when == "loss":
        loss = ddpm.loss
        monkeypatch.setattr(ddpm, "loss", lambda *a: loss(*a) * math.nan)
    else:
        monkeypatch.setattr(ddpm, "update_ema", lambda ema, net, *a: next(net.parameters()).data.fill_(math.inf))
    argv = ["--resume", "--steps", "8" if when == "loss" else "3"]  # one step: only the save can see it
    refused(capsys, argv, "finite", code=1)
    assert Path("out/ddpm/ckpt.pt").read_bytes() == good


def test_full_disk_stops_with_1_and_keeps_the_last_good_checkpoint(pictures, capsys, monkeypatch):
    assert ddpm.main([*pictures, "--steps", "2"]) == 0
    good = Path("out/ddpm/ckpt.pt").read_bytes()
    write = Path.write_bytes

    def full(path, body):
        write(path, bytes(body)[:100])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    refused(capsys, ["--resume", "--steps", "4"], "No space left", code=1)
    assert Path("out/ddpm/ckpt.pt").read_bytes() == good and not list(Path("out/ddpm").glob("*.tmp"))


def test_training_weights_are_untouched_by_sampling(pictures):
    """With previews every step and with none, the same weights come out."""
    assert ddpm.main([*pictures, "--steps", "4", "--save-every", "1", "--out", "a"]) == 0
    assert ddpm.main([*pictures, "--steps", "4", "--save-every", "9", "--out", "b"]) == 0
    a, b = states("a", "b")
    assert same(a["model"], b["model"]) and same(a["ema"], b["ema"])
    assert not same(a["model"], a["ema"])


def test_every_t_is_drawn_alike_and_pictures_are_those_of_the_data(pictures, monkeypatch):
    """chi^2 over t = 1..T of what the loop hands to the loss: no step left out, none doubled."""
    ts, means = [], []

    def loss(net, x0, t, eps, s):
        ts.append(t)
        means.append(ddpm.to_uint8(x0).flatten(1).float().mean(1))
        return next(net.parameters()).sum() * 0 + torch.zeros(len(t))
    monkeypatch.setattr(ddpm, "loss", loss)
    argv = [*pictures, "--steps", "150", "--batch-size", "63", "--eval-images", "0", "--save-every", "999",
            "--sample-steps", "1", "--flip"]
    assert ddpm.main(argv) == 0
    t = torch.cat(ts[:150])
    counts = torch.bincount(t, minlength=31).double()
    want = 150 * 63 / 30
    assert counts[0] == 0 and len(counts) == 31
    assert ((counts[1:] - want) ** 2 / want).sum() < 29 + 5 * math.sqrt(58)
    known = torch.tensor(np.load("a.npy")).flatten(1).float().mean(1)[:22]
    seen = torch.cat(means[:150])[:22 * 9]
    found = (seen[:, None] - known).abs().argmin(1)
    assert torch.bincount(found, minlength=22).tolist() == [9] * 22  # each once an epoch, flipped or not


def test_sample_only_from_a_checkpoint(pictures, capsys):
    assert ddpm.main([*pictures, "--steps", "2"]) == 0
    assert ddpm.main(["--sample-only", "3", "--sample-steps", "4"]) == 0
    assert capsys.readouterr().out.strip().endswith("samples_only.png")
    assert read_png(Path("out/ddpm/samples_only.png")).shape[0] == 3
    first = Path("out/ddpm/samples_only.png").read_bytes()
    assert ddpm.main(["--sample-only", "3", "--sample-steps", "4"]) == 0
    assert Path("out/ddpm/samples_only.png").read_bytes() == first  # from fixed noise
    refused(capsys, ["--sample-only", "3", "--sample-steps", "31"], "31", "30")


def test_learns(tmp_path):
    """A tiny seeded run on flat pictures: the loss falls far below 1."""
    levels = np.random.default_rng(0).integers(0, 256, (64, 1, 1), dtype=np.uint8)
    np.save("flat.npy", np.broadcast_to(levels, (64, 8, 8)))
    argv = ["--data", "flat.npy", *TINY, "--batch-size", "32", "--steps", "150", "--lr", "5e-3", "--save-every", "999"]
    assert ddpm.main(argv) == 0
    assert json.loads(Path("out/ddpm/metrics.json").read_text())["held_out_loss_ema"] < 0.25


def torchrun(argv, **kw):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ddpm.__file__,
                           *argv], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, **kw)


def test_two_ranks_are_one(pictures):
    argv = [*pictures, "--steps", "3", "--save-every", "99", "--eval-images", "0"]
    done = torchrun([*argv, "--out", "two"])
    assert done.returncode == 0, done.stderr
    assert ddpm.main([*argv, "--out", "one"]) == 0
    one, two = states("one", "two")
    assert same(one["model"], two["model"], exact=False) and same(one["ema"], two["ema"], exact=False)
    assert done.stdout.count("step 3/3") == 1


def test_alone_in_an_empty_folder():
    """The file by itself, as a user has it, with the built-in faces."""
    Path("ddpm.py").write_bytes(Path(ddpm.__file__).read_bytes())
    argv = "--steps 2 --sample-steps 2 --samples 4 --eval-images 0"
    done = subprocess.run([sys.executable, "ddpm.py", *argv.split()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert read_png(Path("out/ddpm/samples.png")).shape[0] == 3
