"""ddpm.py against post 9119, Ho et al. 2020, and oracles written out here in float64; then its wiring.

What it shares with the other scripts is in test_habits.py (running) and test_blocks.py (pictures, judge, order).
"""

import copy
import json
import math
import sys
from pathlib import Path

import ddpm
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_blocks import plain_judge, read_png

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import ddpm_bits  # noqa: E402
import ddpm_network  # noqa: E402
import ddpm_samplers  # noqa: E402

LAWS = st.lists(st.floats(0.05, 0.999), min_size=1, max_size=200)  # any alpha_1 ... alpha_T
SEEDS = st.integers(0, 2**31)


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
    mu = ddpm.step_back(xt, t, net, torch.zeros_like(x), torch.zeros_like(s["beta"]), s)  # (8)
    weight = (s["beta"][T] / s["alpha"][T]) ** 2
    torch.testing.assert_close((x - mu).square().sum(), weight * (eps - guess).square().sum())  # (9)


@given(LAWS, SEEDS)
def test_9119_10_one_step_back_and_one_step_on(alphas, seed):
    """diffuse to t - 1, then diffuse_once: three coefficients, each read off by itself, are those of (10)."""
    T = len(alphas)
    s, bar = chain(alphas), math.prod(alphas[:-1])
    x0, bar_eps, eps_t = draws(3, 1, 1, 1, 4, seed=seed).unbind()

    def two_steps(x0, bar_eps, eps_t):
        return ddpm.diffuse_once(ddpm.diffuse(x0, steps(T - 1), bar_eps, s), steps(T), eps_t, s)
    zero = torch.zeros_like(x0)
    a, b = alphas[-1], math.sqrt(1 - alphas[-1] ** 2)
    for part, want in (((x0, zero, zero), a * bar * x0), ((zero, bar_eps, zero), a * math.sqrt(1 - bar**2) * bar_eps),
                       ((zero, zero, eps_t), b * eps_t)):
        torch.testing.assert_close(two_steps(*part), want, rtol=1e-9, atol=1e-9)
    merged = two_steps(zero, bar_eps, eps_t) / math.sqrt(1 - (a * bar) ** 2)  # one noise for the two
    ten, six = two_steps(x0, bar_eps, eps_t), ddpm.diffuse(x0, steps(T), merged, s)
    torch.testing.assert_close(ten, six, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("t", [2, 15, 30])
def test_9119_12_what_the_merged_noise_tells_of_the_last(t):
    """By least squares over 10^6 chains: beta_t / bar_beta_t of eps, and of the rest, omega's share, nothing."""
    s, n = ddpm.make_schedule(30), 1_000_000
    bar_eps, eps_t = torch.randn(2, n, 1, 1, 1, generator=torch.Generator().manual_seed(t)).unbind()
    xt = ddpm.diffuse_once(ddpm.diffuse(torch.zeros(n, 1, 1, 1), steps(t - 1, n), bar_eps, s), steps(t, n), eps_t, s)
    eps = xt / ddpm.diffuse(torch.zeros(1, 1, 1, 1), steps(t), torch.ones(1, 1, 1, 1), s)
    slope = ((eps * eps_t).mean() / eps.square().mean()).item()
    omega = slope * eps - eps_t
    beta2 = 20 / 30 * t / 30
    bar = math.prod(math.sqrt(1 - 20 / 30 * k / 30) for k in range(1, t))  # bar_alpha_{t-1}
    bar_beta = math.sqrt(1 - bar**2 * (1 - beta2))
    assert eps.square().mean().item() == pytest.approx(1, abs=0.008)  # 5 / sqrt(10^6 / 2)
    assert slope == pytest.approx(math.sqrt(beta2) / bar_beta, abs=0.005)
    assert omega.std().item() == pytest.approx(math.sqrt((1 - beta2) * (1 - bar**2)) / bar_beta, rel=0.005)
    assert (omega * eps).mean().abs().item() < 1e-3


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
    got = ddpm.step_back(xt, steps(T), e, zero + 1, torch.zeros_like(s["beta"]), s)  # (16)
    torch.testing.assert_close(got, mean, rtol=1e-8, atol=1e-8)
    sigma = ddpm.sigmas("posterior", s)
    assert sigma[T].item() == pytest.approx((precision**-0.5).item(), rel=1e-9)
    noisy = ddpm.step_back(xt, steps(T), e, torch.ones_like(xt), sigma, s)  # (17)
    torch.testing.assert_close(noisy - got, zero + sigma[T], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["beta", "posterior", "zero"])
def test_9119_17_no_noise_on_the_finished_picture(kind):
    s = ddpm.make_schedule(100)
    row = ddpm.sigmas(kind, s)
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
    """Mean and deviation of (17) with the exact net: in closed form, and on 40,000 draws."""
    s = ddpm.make_schedule(1000)
    s64 = {name: row.double() for name, row in s.items()}
    row, mean, var = ddpm.sigmas(sigma, s64), 0.0, 1.0
    for t in range(1000, 0, -1):
        a, b, bb, ba = (s64[k][t].item() for k in ("alpha", "beta", "bar_beta", "bar_alpha"))
        slope = (1 - b * b / (ba**2 * std**2 + bb**2)) / a  # x -> slope x + shift: (17) is affine here
        mean = slope * mean + b * b * ba * 0.4 / (ba**2 * std**2 + bb**2) / a
        var = slope**2 * var + row[t].item() ** 2
    assert var**0.5 == pytest.approx(want, abs=1.5e-4)
    g = torch.Generator().manual_seed(1)
    xT = torch.randn(40_000, 1, 1, 1, generator=g)
    for x in ddpm.sample(Exact(s, std, 0.4), xT, g, ddpm.sigmas(sigma, s), False, s):
        pass
    assert x.std().item() == pytest.approx(var**0.5, rel=0.018)  # 5 / sqrt(2 * 40,000)
    assert x.mean().item() == pytest.approx(mean, abs=5 * var**0.5 / 40_000**0.5)


@given(SEEDS, st.floats(-1, 1))
def test_9152_one_training_point_is_returned_exactly(seed, point):
    """With the posterior's sigma the last steps forget everything but the point."""
    s = ddpm.make_schedule(40)
    g = torch.Generator().manual_seed(seed)
    xT = torch.randn(3, 1, 2, 2, generator=g)
    for x in ddpm.sample(Exact(s, 0.0, point), xT, g, ddpm.sigmas("posterior", s), False, s):
        pass
    torch.testing.assert_close(x, torch.full_like(x, point), atol=1e-5, rtol=0)


@given(SEEDS, st.booleans())
def test_ddim_with_eta_1_and_all_steps_is_ancestral(seed, clip):
    s = {name: row.double() for name, row in ddpm.make_schedule(60).items()}
    net, xT = Exact(s, 0.5, 0.1), draws(3, 1, 2, 2, seed=seed)
    g, h = (torch.Generator().manual_seed(seed) for _ in range(2))
    way = list(ddpm.sample(net, xT, g, ddpm.sigmas("posterior", s), clip, s))
    jumps = list(ddpm.sample_ddim(net, xT, h, 60, 1.0, clip, s))
    torch.testing.assert_close(torch.stack(way), torch.stack(jumps), rtol=1e-6, atol=1e-6)


@given(SEEDS, st.integers(1, 60))
def test_ddim_with_eta_0_needs_no_luck(seed, count):
    s = ddpm.make_schedule(60)
    net, xT = Exact(s, 0.5), torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    ways = [list(ddpm.sample_ddim(net, xT, torch.Generator().manual_seed(k), count, 0.0, True, s))
            for k in (1, 2)]
    assert len(ways[0]) == count + 1 and torch.equal(ways[0][-1], ways[1][-1])


def test_ddim_steps_out_of_range_are_refused():
    s = ddpm.make_schedule(60)
    for count in (0, 61):
        with pytest.raises(ValueError, match="60"):
            next(ddpm.sample_ddim(Exact(s, 1.0), torch.zeros(1, 1, 1, 1), torch.Generator(), count, 0.0, True, s))


@given(SEEDS, st.integers(1, 60))
def test_clip_moves_the_foreseen_picture_only_where_it_is_outside(seed, t):
    s = {name: row.double() for name, row in ddpm.make_schedule(60).items()}
    e, xt = draws(2, 4, 1, 2, 2, seed=seed).unbind()
    new = ddpm.clip_eps(xt, steps(t, 4), e, s)
    a, b = s["bar_alpha"][t], s["bar_beta"][t]
    before, after = (xt - b * e) / a, (xt - b * new) / a
    torch.testing.assert_close(after, before.clamp(-1, 1), atol=1e-9, rtol=0)


# ---- the bound ----

@given(st.floats(-1.5, 1.5), st.floats(0.002, 3))
@example(0.0, 0.0045)
def test_decoder_bins_sum_to_one(mu, sigma):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_p = ddpm_bits.log_bin(x, torch.full_like(x, mu), torch.tensor(sigma, dtype=torch.float64))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_decoder_bin_by_quadrature():
    """One bin as an integral of the density, on a grid; and the two open ends."""
    mu, sigma, x = 0.03, 0.02, torch.tensor([5 / 127.5, -1.0, 1.0], dtype=torch.float64)
    got = ddpm_bits.log_bin(x, torch.full_like(x, mu), torch.tensor(sigma, dtype=torch.float64)).exp()
    z = np.linspace(5 / 127.5 - 1 / 255, 5 / 127.5 + 1 / 255, 20_001)
    density = np.exp(-((z - mu) / sigma) ** 2 / 2) / sigma / math.sqrt(2 * math.pi)
    assert got[0].item() == pytest.approx(np.trapezoid(density, z), rel=1e-6)
    ends = ddpm_bits.log_bin(x, torch.tensor([0.0, -1.0, 1.0]).double(), torch.tensor(0.5).double()).exp()
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
        bits = ddpm_bits.bits_per_dim(Exact(s, std), x, torch.Generator().manual_seed(1), "beta", False, s)
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

    got = ddpm_bits.bits_per_dim(Zero(), x0, torch.Generator().manual_seed(3), "beta", False, s).item()
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


@pytest.mark.parametrize("patch", [1, 2, 3])
@given(st.integers(8, 21), st.integers(8, 21))
def test_unet_with_patches_keeps_any_size(patch, h, w):
    net = scrambled(tiny(channels=3, patch=patch, scale_shift=True))
    x = torch.randn(2, 3, h, w)
    out = net(x, torch.tensor([1, 7]))
    assert out.shape == (2, 3, h, w)
    whole = torch.zeros(2, 3, h + -h % patch, w + -w % patch)
    whole[..., :h, :w] = x
    torch.testing.assert_close(net(whole, torch.tensor([1, 7]))[..., :h, :w], out)  # filled up with zeros


def test_unet_takes_a_patch_for_a_pixel():
    """Under the first and last layers: the same net on four channels of half the size."""
    net = scrambled(tiny(patch=2))
    plain = tiny(channels=4)
    plain.load_state_dict(net.state_dict())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 9])
    corners = torch.stack([x[:, 0, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)
    out, want = net(x, t), plain(corners, t)
    for k, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        torch.testing.assert_close(out[:, 0, i::2, j::2], want[:, k], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("attend", [False, True])
def test_unet_block_by_hand(scale_shift, attend):
    layer = scrambled(ddpm.Block(8, 12, 5, 0.0, attend, scale_shift)).double()
    x, time = draws(2, 8, 4, 4), draws(2, 5, seed=1)
    F = torch.nn.functional
    with torch.no_grad():
        got = layer(x, time)
        h = F.group_norm(x, 2, layer.norm1.weight, layer.norm1.bias, 1e-6)
        h = F.conv2d(h * h.sigmoid(), layer.conv1.weight, layer.conv1.bias, padding=1)
        code = (time @ layer.time.weight.T + layer.time.bias)[..., None, None]
        if scale_shift:
            h = F.group_norm(h, 1, layer.norm2.weight, layer.norm2.bias, 1e-6) * (1 + code[:, :12]) + code[:, 12:]
        else:
            h = F.group_norm(h + code, 1, layer.norm2.weight, layer.norm2.bias, 1e-6)
        h = F.conv2d(h * h.sigmoid(), layer.conv2.weight, layer.conv2.bias, padding=1)
        want = F.conv2d(x, layer.skip.weight, layer.skip.bias) + h
        want = layer.attention(want) if attend else want
    torch.testing.assert_close(got, want)
    assert isinstance(layer.attention, ddpm.Attention) == attend
    assert isinstance(ddpm.Block(8, 8, 5, 0.1, False, False).skip, torch.nn.Identity)


def test_unet_starts_as_the_paper_says():
    """Weights uniform with variance 2 / (fan-in + fan-out), biases 0, residual branches and the output 0."""
    net, zero = ddpm.UNet(3, 32, (1, 2), 1, (1,), 0.1), set()
    for name, p in net.named_parameters():
        layer, _, kind = name.rpartition(".")
        if "norm" in layer or kind == "bias":
            assert (p == (kind == "weight")).all(), name
        elif not p.any():
            zero.add(layer.rpartition(".")[2])
            assert layer.endswith(("conv2", "out", "last")), name
        else:
            fans = sum(p.shape[:2]) * p[0, 0].numel()
            edge = math.sqrt(6 / fans)
            assert 0.9 * edge < p.max() <= edge and -edge <= p.min() < -0.9 * edge, name
            assert not layer.endswith(("conv2", "out")) and abs(p.std().item() / edge * 3**0.5 - 1) < 0.1, name
    assert zero == {"conv2", "out", "last"}


@given(SEEDS, st.integers(1, 60))
def test_foresight_is_9119_6_solved_for_eps(seed, t):
    """A net that foresees x_0 rightly has eps rightly, where bar_beta_t is 0.2 and above; else its share of it."""
    s = ddpm.make_schedule(60)
    x0, eps = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(seed)).unbind()

    class Oracle(torch.nn.Module):
        def forward(self, x, when):
            assert when is tt
            return x0
    tt = torch.full((3,), t)
    got = ddpm.Foresight(Oracle(), s)(ddpm.diffuse(x0, tt, eps, s), tt)
    share = min(1, s["bar_beta"][t].item() / 0.2)
    torch.testing.assert_close(got, share * eps, rtol=1e-3, atol=1e-3)
    assert list(ddpm.Foresight(tiny(), s).state_dict()) == [f"net.{name}" for name in tiny().state_dict()]


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
    count = ddpm.norm(width).num_groups
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
    net, ema = scrambled(torch.nn.Linear(3, 2), seed), torch.nn.Linear(3, 2)
    before = [p.clone() for p in ema.parameters()]
    live = [p.clone() for p in net.parameters()]
    averages, params = list(ema.parameters()), list(net.parameters())
    ddpm.update_ema(averages, params, step, decay)
    d = min(decay, (1 + step) / (10 + step))
    for old, p, new, kept in zip(before, net.parameters(), ema.parameters(), live):
        torch.testing.assert_close(new, d * old + (1 - d) * p, rtol=1e-5, atol=1e-6)
        assert new.data_ptr() != p.data_ptr() and torch.equal(p, kept)
        assert new.grad_fn is None  # else every step would be remembered
    same = copy.deepcopy(net).requires_grad_(False)
    ddpm.update_ema(list(same.parameters()), params, step, decay)
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
    for x in ddpm.sample(net, torch.randn(1000, 2, 1, 1, generator=g), g, ddpm.sigmas("beta", s), False, s):
        pass

    def mmd(p, q):
        def kernel(u, v):
            return (-torch.cdist(u, v).square() / 0.1).exp().mean()
        p, q = p.flatten(1), q.flatten(1)
        return (kernel(p, p) + kernel(q, q) - 2 * kernel(p, q)).item()

    assert mmd(x, data(1000)) < 0.02 < 0.1 < mmd(torch.randn(1000, 2, 1, 1), data(1000))


# ---- pictures ----

@given(SEEDS)
def test_bytes_to_floats_and_back_is_the_identity(seed):
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(ddpm.to_uint8(ddpm.to_float(x)), x)
    assert ddpm.to_float(x).min() == -1 and ddpm.to_float(x).max() == 1
    assert ddpm.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_nearest_finds_the_picture_itself():
    """Also among thousands, which are looked through in pieces."""
    x = torch.randint(0, 256, (9000, 3, 2, 2), dtype=torch.uint8)
    noisy = (x[[7, 4095, 4096, 8999]].int() + torch.randint(-3, 4, (4, 3, 2, 2))).clamp(0, 255).to(torch.uint8)
    assert torch.equal(ddpm.nearest(noisy, x), x[[7, 4095, 4096, 8999]])


# ---- wiring: a run beside a naive one ----

NET = "--width 8 --mults 1,2 --attention 1 --blocks 1 --T 30 --patch 1"
TINY = f"{NET} --batch-size 7 --samples 4 --judge 0 --sample-steps 2 --test-images 2 --save-every 99"


@pytest.fixture
def pictures():
    """60 pictures of 9 x 9: odd, so that sizes round on the way down. The last six are held out."""
    torch.set_num_threads(1)
    a = np.random.default_rng(0).integers(0, 256, (60, 9, 9, 3), dtype=np.uint8)
    np.save("a.npy", a)
    return torch.tensor(a).permute(0, 3, 1, 2)


def main(flags, out="out/ddpm"):
    """A run on a.npy, its checkpoint and its metrics."""
    assert ddpm.main(["--data", "a.npy", *TINY.split(), *flags.split(), "--out", str(out)]) == 0
    return torch.load(f"{out}/ckpt.pt", weights_only=True), json.loads(Path(f"{out}/metrics.json").read_text())


def network(flags, weights):
    """The net and schedule of these flags, with these weights, in eval mode."""
    args = ddpm.parse_args([*TINY.split(), *flags.split()])
    net, s = ddpm.build(args, 3, torch.device("cpu"))
    net.load_state_dict(weights)
    return net.eval(), s


@pytest.mark.parametrize("flags", [
    "--warmup 3 --lr 0.01 --clip-grad 0.5 --ema 0.4 --flip --dropout 0.3",
    "--warmup 2 --lr 0.01 --clip-grad 9 --ema 0.05 --no-decay --no-flip --schedule paper --seed 5 --no-foresight"])
def test_five_steps_are_those_of_a_naive_loop(pictures, flags):
    """Order, noise, t, mirrors, dropout, loss, clipping, warm-up, cosine, Adam and average, all by plain code."""
    flags += " --batch-size 12"  # the fifth batch reaches into the second epoch
    state, _ = main(f"{flags} --steps 5")
    args = ddpm.parse_args([*TINY.split(), *flags.split()])
    x = pictures[:54].float() / 127.5 - 1
    net, _ = ddpm.build(args, 3, torch.device("cpu"))
    params = dict(net.train().named_parameters())
    ema = {name: p.detach().clone() for name, p in params.items()}
    m, v = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
    order = torch.cat([torch.randperm(54, generator=ddpm.generator("cpu", args.seed, epoch, 9)) for epoch in (0, 1)])
    bar = [1.0]
    for k in range(1, 31):
        beta2 = 20 / 30 * k / 30 if args.schedule == "post" else 1000 / 30 * (1e-4 + (0.02 - 1e-4) * (k - 1) / 29)
        bar.append(bar[-1] * math.sqrt(1 - beta2))
    clipped = []
    for step in range(5):
        g = ddpm.generator("cpu", args.seed, step)
        t = torch.randint(1, 31, (12,), generator=g)
        eps = torch.randn(12, 3, 9, 9, generator=g)
        mirror = torch.rand(12, 1, 1, 1, generator=g).flatten() < 0.5
        if args.dropout:
            torch.manual_seed(ddpm.generator("cpu", args.seed, step, 0, 5).initial_seed())
        batch, xt = x[order[12 * step:12 * step + 12]], torch.empty(12, 3, 9, 9)
        for i in range(12):
            picture = batch[i].flip(2) if mirror[i] and args.flip else batch[i]
            xt[i] = bar[t[i]] * picture + math.sqrt(1 - bar[t[i]] ** 2) * eps[i]
        ((eps - net(xt, t)) ** 2).mean().backward()
        length = math.sqrt(sum(p.grad.double().square().sum().item() for p in params.values()))
        clipped.append(length > args.clip_grad)
        fall = 0.5 + 0.5 * math.cos(math.pi * step / 5) if args.decay else 1
        lr = args.lr * min(1, (step + 1) / args.warmup) * fall
        decay = min(args.ema, (1 + step) / (10 + step))
        for name, p in params.items():
            grad = p.grad * min(1, args.clip_grad / length)
            m[name] = 0.9 * m[name] + 0.1 * grad
            v[name] = 0.999 * v[name] + 0.001 * grad**2
            way = m[name] / (1 - 0.9 ** (step + 1)) / ((v[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            p.data -= lr * way
            p.grad = None
            ema[name] = decay * ema[name] + (1 - decay) * p.data
    for name, p in params.items():
        torch.testing.assert_close(state["model"][name], p.data, rtol=1e-3, atol=1e-4, msg=name)
        torch.testing.assert_close(state["ema"][name], ema[name], rtol=1e-3, atol=1e-4, msg=name)
    assert any(clipped) == (args.clip_grad < 1) and state["step"] == 5


def drawn(net, flags, s, first, count):
    """Pictures `first`, ..., by plain loops over (17) or DDIM's formula (12); and all states of the first of them."""
    args = ddpm.parse_args([*TINY.split(), *flags.split()])
    a, b, A, B = ([v.item() for v in s[name].double()] for name in ("alpha", "beta", "bar_alpha", "bar_beta"))
    g = ddpm.generator("cpu", args.sample_seed, first, 2)
    x = torch.randn(count, 3, 9, 9, generator=g)
    states = [x[0]]
    steps = args.sample_steps or 30
    stops = [round(30 * (steps - k) / steps) for k in range(steps + 1)]
    for t, r in zip(stops, stops[1:]):
        with torch.no_grad():
            e = net(x, torch.full((count,), t))
        if args.clip:
            e = (x - A[t] * ((x - B[t] * e) / A[t]).clamp(-1, 1)) / B[t]
        if args.sample_steps:
            z = torch.randn(x.shape, generator=g) if args.eta else 0
            sigma = args.eta * B[r] / B[t] * math.sqrt(1 - (A[t] / A[r]) ** 2)
            x = A[r] * (x - B[t] * e) / A[t] + math.sqrt(B[r] ** 2 - sigma**2) * e + sigma * z
        else:
            sigma = {"beta": b[t], "posterior": B[t - 1] * b[t] / B[t], "zero": 0}[args.sigma] * (t > 1)
            x = (x - b[t] ** 2 / B[t] * e) / a[t] + sigma * torch.randn(x.shape, generator=g)
        states.append(x[0])
    return ((x + 1) * 127.5).round().clamp(0, 255), ((torch.stack(states) + 1) * 127.5).round().clamp(0, 255)


def tiles(path, size=9):
    """The pictures in a grid, (rows, columns, C, size, size), and that all else is white."""
    sheet = read_png(Path(path))[:, ::96 // size, ::96 // size]
    sheet = torch.nn.functional.pad(sheet, (0, 1, 0, 1), value=255)
    sheet = sheet.unfold(1, size + 1, size + 1).unfold(2, size + 1, size + 1)
    assert (sheet[..., size, :] == 255).all() and (sheet[..., size] == 255).all()
    return sheet[..., :size, :size].permute(1, 2, 0, 3, 4).float()


def near(a, b):
    """The same pictures, but for a byte that falls to the other side now and then."""
    return a.shape == b.shape and (a - b).abs().max() <= 1 and (a != b).float().mean() < 0.01


REPORTS = ["--sample-steps 0 --sigma posterior --dropout 0.5", "--sample-steps 5 --eta 0.7 --no-clip --seed 3",
           "--sample-steps 0 --sigma zero --no-foresight --no-scale-shift --no-clip", "--sample-steps 7 --patch 2"]


@pytest.mark.parametrize("flags", REPORTS)
def test_the_report_again_from_the_checkpoint(pictures, flags):
    """Every number and picture: from the average, in eval mode, on the pictures that it should come from."""
    flags += " --lr 0.05 --warmup 1 --ema 0.9 --test-images 1 --judge 14"
    state, metrics = main(f"{flags} --steps 12 --save-every 10")
    args, out = ddpm.parse_args([*TINY.split(), *flags.split()]), Path("out/ddpm")
    train, held_out = pictures[:54], pictures[54:]
    ema, s = network(flags, state["ema"])
    raw, _ = network(flags, state["model"])

    grids = [drawn(ema, flags, s, first, count) for first, count in ((0, 4), (4, 4), (8, 4), (12, 2))]
    samples = torch.cat([pictures for pictures, _ in grids])  # --samples at a time
    assert near(tiles(out / "samples.png").flatten(0, 1), samples[:4])
    assert not near(samples[:4], samples[4:8])
    preview = tiles(out / "samples_000010.png").flatten(0, 1)
    assert preview.shape == samples[:4].shape and not near(preview, samples[:4])

    top, below = tiles(out / "nearest.png")
    assert near(top, samples[:12])
    distance = (samples[:12, None] - train.float()[None]).flatten(2).norm(dim=2)
    assert torch.equal(below, train[distance.argmin(1)].float())

    up, down = grids[0][1], [held_out[0].float() / 127.5 - 1]
    noise = torch.randn(30, 3, 9, 9, generator=ddpm.generator("cpu", args.seed, 0, 3))
    for t in range(1, 31):
        down.append(s["alpha"][t] * down[-1] + s["beta"][t] * noise[t - 1])
    down = ((torch.stack(down) + 1) * 127.5).round().clamp(0, 255)
    def early(last):
        return [min(last, max(k, math.floor((k / 11) ** 2 * last + 1e-4))) for k in range(12)]
    above, below = tiles(out / "building.png")
    assert near(above, down[early(30)])
    assert near(below, up.flip(0)[early(len(up) - 1)].flip(0))
    assert near(below[11], samples[0]) and near(above[0], held_out[0].float())

    for name, net in ("ema", ema), ("raw", raw):
        x, g = held_out[:1].repeat(10, 1, 1, 1), ddpm.generator("cpu", args.seed, 0, 1)  # ten bins of t
        eps = torch.randn(10, 3, 9, 9, generator=g)
        bins = []
        for k in range(10):
            t = 3 * k + 1
            xt = s["bar_alpha"][t] * (x[:1] / 127.5 - 1) + s["bar_beta"][t] * eps[k]
            with torch.no_grad():
                bins.append((eps[k] - net(xt, torch.tensor([t]))).square().mean().item())
        assert metrics[f"held_out_loss_{name}_by_t"] == pytest.approx(bins, rel=1e-4)
        assert metrics[f"held_out_loss_{name}"] == pytest.approx(np.mean(bins), rel=1e-4)
    assert metrics["held_out_loss_ema"] != pytest.approx(metrics["held_out_loss_raw"], rel=1e-3)

    want = plain_judge(samples.to(torch.uint8), train, held_out, args.seed)
    for name in ("frechet", "precision", "recall", "sharpness", "frechet_floor", "recall_floor", "sharpness_floor"):
        assert metrics[name] == pytest.approx(want[name], rel=0.02), name
    assert (metrics["step"], metrics["images_seen"], metrics["seed"], metrics["samples"]) == (12, 84, args.seed, 14)
    seconds = metrics["train_seconds"]
    assert 0 < metrics["sample_seconds"] < 60 and 0 < seconds < 60
    assert metrics["images_per_second"] == pytest.approx(84 / seconds)


def test_a_preview_takes_at_most_50_steps(pictures, monkeypatch):
    jumps, steps = ddpm.sample_ddim, []
    monkeypatch.setattr(ddpm, "sample_ddim", lambda *a: steps.append(a[3]) or jumps(*a))
    for T, sample_steps in ((60, 0), (30, 0), (60, 7)):
        main(f"--steps 2 --save-every 1 --T {T} --sample-steps {sample_steps}", f"{T}.{sample_steps}")
    assert steps == [50, 30, 7, 7]  # the report of the first two takes all T of (17)


def test_fewer_T_than_the_default_sample_steps_is_no_error(pictures):
    argv = "--data a.npy --gpu --T 30 --mults 1,2 --width 8 --batch-size 4 --attention 1 --judge 0 --samples 1".split()
    ddpm.check_flags(ddpm.parse_args(argv))  # 50 by default
    ddpm.check_flags(args := ddpm.parse_args([*argv, "--eta", "0"]))
    net, s = ddpm.build(args, 3, torch.device("cpu"))
    assert len(ddpm.draw(net.eval(), (3, 9, 9), 1, args.sample_steps, args, s)[1]) == 31


def test_many_held_out_pictures_are_spread_over_t(pictures):
    """By a net that gives t away: evenly, in an order that the pictures' own does not tell, in batches of any size."""
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x, t):
            seen.append(torch.stack([t.float(), x.mean((1, 2, 3))], 1))
            return t.view(-1, 1, 1, 1).float().expand_as(x)
    s = {name: row * 0 + (name == "bar_alpha") for name, row in ddpm.make_schedule(30).items()}  # x_t = x_0
    x = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(60, 1, 2, 2)
    bins = ddpm.held_out_loss(Net(), x, 0, 7, s)
    t, level = torch.cat(seen).T
    assert torch.bincount(t.int(), minlength=31).tolist() == [0] + [2] * 30
    assert [len(part) for part in seen] == [7] * 8 + [4]
    assert sorted(((level + 1) * 127.5).round().tolist()) == list(range(60))
    assert abs(np.corrcoef(t, level)[0, 1]) < 0.3
    for k, value in enumerate(bins):
        want = np.mean([n * n for n in range(3 * k + 1, 3 * k + 4)])
        assert value == pytest.approx(want + 1, rel=0.35)  # eps has variance 1 and meets t by chance


SAME = ("weights", "pictures", "loss")


@pytest.mark.parametrize("base, flag, changed", [
    ("", "--sample-steps 3", ["pictures"]), ("", "--sample-steps 0", ["pictures"]), ("", "--eta 1", ["pictures"]),
    ("", "--sample-seed 1", ["pictures"]), ("--sample-steps 0 --no-foresight", "--no-clip", ["pictures"]),
    ("--no-foresight", "--no-clip", ["pictures"]),
    ("--sample-steps 0", "--sigma posterior", ["pictures"]), ("--sample-steps 0", "--sigma zero", ["pictures"]),
    ("", "--test-images 1", ["loss"]), ("", "--save-every 1", []),
    ("", "--fp32", []),
    ("", "--ema 0.05", ["pictures", "loss"]),
    *[("", flag, SAME) for flag in (
        "--seed 1", "--batch-size 8", "--T 31", "--schedule paper", "--width 12", "--mults 1,1", "--blocks 2",
        "--attention 0", "--patch 2", "--no-scale-shift", "--no-foresight", "--dropout 0.5", "--flip", "--lr 0.02",
        "--warmup 5", "--no-decay", "--clip-grad 0.01", "--steps 4")]])
def test_every_flag_matters_where_it_should(pictures, base, flag, changed):
    """Beside the same run without it; `weights` are those that train."""
    both = []
    for k, more in enumerate([base, f"{base} {flag}"]):
        state, metrics = main(f"--steps 3 --lr 0.05 --warmup 1 {more}", k)
        both.append(dict(weights=[v.tolist() for v in state["model"].values()],
                         loss=metrics["held_out_loss_ema"], pictures=Path(f"{k}/samples.png").read_bytes()))
    assert {name for name in SAME if both[0][name] != both[1][name]} == set(changed)


@pytest.mark.parametrize("foresight", ["--foresight", "--no-foresight"])
def test_a_net_in_bfloat16_goes_with_the_float32_schedule(foresight):
    net, s = ddpm.build(ddpm.parse_args([*TINY.split(), foresight]), 3, torch.device("cpu"))
    scrambled(net)
    x0, eps, t = draws(2, 3, 8, 8).float(), draws(2, 3, 8, 8, seed=1).float(), torch.tensor([3, 17])
    want = ddpm.loss(net, x0, t, eps, s)
    got = ddpm.loss(net.bfloat16(), x0, t, eps, s)
    assert got.dtype == torch.float32 and torch.allclose(got, want, rtol=0.1) and not torch.equal(got, want)


def test_clip_grad_tiny_and_a_rate_of_zero_learn_nothing(pictures):
    before, _ = ddpm.build(ddpm.parse_args(TINY.split()), 3, torch.device("cpu"))
    still, _ = main("--steps 3 --lr 0", "still")
    for name, p in before.state_dict().items():
        assert torch.equal(still["model"][name], p) and torch.allclose(still["ema"][name], p)
    slow, _ = main("--steps 3 --clip-grad 1e-20", "slow")  # Adam's 1e-8 is far above
    assert all(torch.allclose(slow["model"][name], p, atol=1e-9) for name, p in before.state_dict().items())


@pytest.mark.parametrize("argv, word", [
    ("--ema 1", "--ema"), ("--dropout 1", "--dropout"), ("--mults=", "--mults"), ("--attention 0,3", "--attention"),
    ("--sample-steps 251", "251: T is 250"), ("--sample-steps 0 --eta 1", "--eta"), ("--sigma beta", "--sigma"),
    ("--eta 1.1", "--eta")])
def test_flags_that_do_not_go_together_are_refused(capsys, argv, word):
    assert ddpm.main(argv.split()) == 2
    assert word in capsys.readouterr().err and not Path("out").exists()


@pytest.mark.parametrize("argv", ["--sample-steps 250", "--mults 1 --attention=", "--ema 0.999999 --attention 2"])
def test_flags_at_their_limits_go(argv):
    ddpm.check_flags(ddpm.parse_args(argv.split()))


def test_learning_rate_written_out():
    args = ddpm.parse_args("--lr 3 --warmup 4 --steps 8".split())
    want = [3 * min(1, (k + 1) / 4) * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert [ddpm.learning_rate(k, args) for k in range(8)] == pytest.approx(want)
    args = ddpm.parse_args("--lr 3 --warmup 4 --steps 8 --no-decay".split())
    assert [ddpm.learning_rate(k, args) for k in range(8)] == pytest.approx([0.75, 1.5, 2.25, 3, 3, 3, 3, 3])


def test_t_is_drawn_from_1_to_T_alike(pictures, monkeypatch):
    """chi^2 of what the loop hands to the loss: no step left out, none doubled."""
    ts = []

    def loss(net, x0, t, eps, s):
        ts.append(t)
        return next(net.parameters()).sum() * 0 + torch.zeros(len(t))
    monkeypatch.setattr(ddpm, "loss", loss)
    main("--steps 150 --batch-size 63")
    counts = torch.bincount(torch.cat(ts[:150]), minlength=31).double()
    want = 150 * 63 / 30
    assert counts[0] == 0 and len(counts) == 31
    assert ((counts[1:] - want) ** 2 / want).sum() < 29 + 5 * math.sqrt(58)


def test_paper_is_the_papers():
    """Ho et al. 2020, appendix B, and the network without what is not theirs."""
    args = ddpm.parse_args(["--paper", "--gpu"])
    want = dict(data="cifar10", T=1000, schedule="paper", width=128, mults=(1, 2, 2, 2), blocks=2, attention=(1,),
                dropout=0.1, lr=2e-4, warmup=5000, decay=False, clip_grad=1.0, batch_size=128, flip=True, ema=0.9999,
                steps=800_000, patch=1, scale_shift=False, foresight=False, sample_steps=0, sigma="beta", clip=True)
    assert {name: getattr(args, name) for name in want} == want
    with torch.device("meta"):
        net, _ = ddpm.build(args, 3, torch.device("meta"))
    assert type(net) is ddpm.UNet and sum(p.numel() for p in net.parameters()) == 35_746_307


def test_sample_only_is_of_the_average_and_of_its_flags(pictures):
    state, _ = main("--steps 6 --lr 0.02 --warmup 1 --ema 0.8 --dropout 0.5")
    for more in ("--sample-steps 4", "--sample-steps 0 --sigma zero --no-clip"):
        argv = ["--sample-only", "5", "--samples", "3", "--out", "out/ddpm", *more.split()]
        assert ddpm.main(argv) == 0
        net, s = network("--dropout 0.5", state["ema"])
        want = torch.cat([drawn(net, more, s, first, count)[0] for first, count in ((0, 3), (3, 2))])
        sheet = tiles("out/ddpm/samples_only.png")
        assert sheet.shape[:2] == (2, 3) and near(sheet.flatten(0, 1)[:5], want)


def test_learns():
    """A tiny seeded run on flat pictures: the loss falls far below 1."""
    torch.set_num_threads(1)
    levels = np.random.default_rng(0).integers(0, 256, (64, 1, 1), dtype=np.uint8)
    np.save("a.npy", np.broadcast_to(levels, (64, 8, 8)))
    _, metrics = main("--batch-size 32 --steps 150 --lr 5e-3 --warmup 2")
    assert metrics["held_out_loss_ema"] < 0.25


# ---- the experiments ----

def test_experiments_run_for_two_steps(pictures, capsys):
    short = ["--data", "a.npy", *TINY.split(), "--steps", "2", "--judge", "8"]
    table = ddpm_network.main([*short, "--without", "nothing", "foresight", "--seeds", "3", "4"])
    assert list(table) == ["nothing", "foresight"] and table["nothing"]["frechet"] != table["foresight"]["frechet"]
    runs = [main(f"--steps 2 --judge 8 --seed {seed}", seed)[1] for seed in (3, 4)]
    for name in ("held_out_loss_ema", "frechet"):
        assert table["nothing"][name] == pytest.approx((runs[0][name] + runs[1][name]) / 2)
    assert "| foresight | " in capsys.readouterr().out
    flags = ["--out", "3", "--judge", "8", "--samples", "4", "--arms", "ddim/2/0", "17/zero", "ddim/3/1"]
    for arm in ("ddim/999/0", "ddim/0/0", "17/none", "ddim/4/2", "x"):
        with pytest.raises(SystemExit):
            ddpm_samplers.main([*flags, "--arms", arm])
    table = ddpm_samplers.main(flags)
    assert table["ddim/2/0"] == {name: runs[0][name] for name in table["ddim/2/0"]}
    assert len({numbers["frechet"] for numbers in table.values()}) == 3
    assert "| held-out pictures | " in capsys.readouterr().out
    found = ddpm_bits.main(["--out", "3", "--images", "3"])
    args, state = ddpm.parse_args(TINY.split()), torch.load("3/ckpt.pt", weights_only=True)
    net, s = ddpm.build(args, 3, torch.device("cpu"))
    net.load_state_dict(state["ema"])
    x0 = torch.from_numpy(np.load("a.npy")[-6:][:3]).permute(0, 3, 1, 2) / 127.5 - 1  # the last tenth, held out
    g = ddpm.generator("cpu", 3, 0, 4)
    bits = ddpm_bits.bits_per_dim(net.eval(), x0, g, args.sigma, args.clip, s)
    assert found["bits"] == pytest.approx(bits.mean().item(), rel=1e-5) and found["images"] == 3
    assert found["error"] == pytest.approx(bits.std().item() / 3 ** 0.5, rel=1e-5)
