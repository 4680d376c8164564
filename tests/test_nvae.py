"""nvae.py against post 7574, Vahdat & Kautz 2020, and oracles written out here in float64; then its wiring.

What it shares with the other scripts is in test_habits.py (running) and test_blocks.py (pictures, judge, order).
"""

import copy
import json
import math
import sys
from pathlib import Path

import numpy as np
import nvae
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_blocks import plain_judge, read_png
from torch.distributions import Normal, kl_divergence

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import nvae_arms  # noqa: E402
import nvae_batchnorm  # noqa: E402

F = torch.nn.functional
SEEDS = st.integers(0, 2**31)


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny(channels=3, size=16, width=8, scales=2, groups=2, min_groups=2, latent=2, cells=1, expand=2, stem=0, stem_cells=1,
         patch=4, factor=0.5, bits=5, mixtures=2, forget=False, flows=0, seed=0):
    """A small network, on which nothing is zero by its start: BatchNorm too has seen something."""
    torch.manual_seed(seed)
    net = nvae.NVAE(channels, size, width, scales, groups, min_groups, latent, cells, expand, stem, stem_cells, patch,
                    factor, bits, mixtures, forget, flows)
    net.floor.fill_(-4)
    for m in net.modules():
        if isinstance(m, nvae.BatchNorm):
            for x in (m.weight, m.bias, m.running_mean):
                x.data += 0.3 * torch.randn_like(x)
            m.running_var *= torch.rand_like(m.running_var) + 0.5
    return net


def y_of(net, count, seed=0):
    channels, size = net.stem[0].in_channels, net.inside.stop - net.inside.start
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**net.bits, (count, channels, size, size), generator=g, dtype=torch.uint8)


def noise(net, count, seed=0):
    return [draws(count, *shape, seed=seed + 7 * l).float() for l, shape in enumerate(net.shapes)]


# ---- 7574, the equations in their order ----

@given(SEEDS, st.floats(0.01, 20))
def test_7574_4_5_the_kl_of_the_relative_posterior_is_that_of_the_two_gaussians(seed, scale):
    mu, d_mu, a, b = draws(4, 50, seed=seed) * scale
    sigma, d_sigma = (a / 5).exp(), (b / 5).exp()
    mean, deviation = nvae.relative(mu, sigma, d_mu, d_sigma)
    want = kl_divergence(Normal(mean, deviation), Normal(mu, sigma))
    got = nvae.kl_relative(d_mu, d_sigma, sigma)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert (got > 0).all()
    assert (nvae.kl_relative(0 * d_mu, torch.ones_like(sigma), sigma) == 0).all()


@given(st.floats(-3, 3), st.floats(0.1, 3), st.floats(-2, 2), st.floats(0.2, 3))
def test_7574_5_by_quadrature(mu, sigma, d_mu, d_sigma):
    z = torch.linspace(-60, 60, 400_001, dtype=torch.float64)
    p, q = Normal(mu + d_mu, sigma * d_sigma), Normal(mu, sigma)
    density = p.log_prob(z).exp()
    want = torch.trapezoid(density * (p.log_prob(z) - q.log_prob(z)), z).item()
    got = nvae.kl_relative(*(torch.tensor(v, dtype=torch.float64) for v in (d_mu, d_sigma, sigma))).item()
    assert got == pytest.approx(want, rel=1e-6, abs=1e-6)


class Linear(torch.nn.Module):
    """A group of one number: q(z_l|z_<l) = N(a s, sigma^2), p = N(a s + b (x - s), (sigma d)^2); s is the sum of all z."""

    def __init__(self, a, b, sigma, d):
        super().__init__()
        self.a, self.b, self.sigma, self.d, self.flow = a, b, sigma, d, torch.nn.Identity()

    def q(self, s):
        return s, self.a * s, torch.full_like(s, self.sigma)

    def p(self, s, x):
        return self.b * (x - s), torch.full_like(s, self.d)

    def take(self, s, z):
        return s + z


def test_7574_2_3_the_chain_of_kls_is_the_kl_of_the_joint():
    """Two Gaussian groups: the joint's KL in closed form, from its mean and covariance, against the mean of (3)'s terms."""
    groups = [Linear(0.0, 0.7, 1.0, 0.5), Linear(0.4, 0.6, 0.8, 0.3)]
    n, x = 200_000, torch.full((1, 1, 1, 1), 1.5, dtype=torch.float64)
    eps = list(draws(2, n, 1, 1, 1))
    s, zs, moments = nvae.top_down(groups, torch.zeros_like(x), [x, x], eps)
    torch.testing.assert_close(s, zs[0] + zs[1])
    terms = nvae.kl_terms(moments)
    assert terms.shape == (2, n) and terms[0].std() < 1e-12  # z_1 has no z before it
    # p: z1 ~ N(1.05, .5^2), z2 = .4 z1 + .6 (1.5 - z1) + .24 e; q: z1 ~ N(0, 1), z2 = .4 z1 + .8 e
    p_mean = torch.tensor([1.05, -0.2 * 1.05 + 0.9], dtype=torch.float64)
    p_cov = torch.tensor([[0.25, -0.05], [-0.05, 0.04 * 0.25 + 0.24**2]], dtype=torch.float64)
    q_cov = torch.tensor([[1, 0.4], [0.4, 0.16 + 0.64]], dtype=torch.float64)
    inverse = q_cov.inverse()
    want = ((inverse @ p_cov).trace() + p_mean @ inverse @ p_mean - 2 + q_cov.logdet() - p_cov.logdet()).item() / 2
    total = terms.sum(0)
    assert abs(total.mean().item() - want) < 5 * total.std().item() / n**0.5 < 0.02
    pair = torch.stack(zs).flatten(1)
    torch.testing.assert_close(pair.mean(1), p_mean, atol=0.01, rtol=0)
    torch.testing.assert_close(pair.cov(), p_cov, atol=0.01, rtol=0)
    prior = torch.stack(nvae.top_down(groups, torch.zeros_like(x), None, eps)[1]).flatten(1)
    torch.testing.assert_close(prior.cov(), q_cov, atol=0.01, rtol=0)


def test_7574_1_the_loss_is_the_joint_kl_of_a_model_that_is_solved():
    """x = z + e with z ~ N(0, 1): with the true posterior (1) is -log q(x) for every x, z and e; with another, more."""
    x = draws(500, 1, 1, 1)
    log_q = Normal(0.0, 2**0.5).log_prob(x).flatten()
    for d, exact in ((0.5**0.5, True), (0.4, False)):
        group = Linear(0.0, 0.5, 1.0, d)  # the posterior is N(x/2, 1/2)
        group.p = lambda s, f, d=d: (f / 2, torch.full_like(f, d))
        e = draws(2000, 500, 1, 1, 1, seed=1)
        losses = []
        for eps in e:
            s, _, moments = nvae.top_down([group], torch.zeros(1, 1, 1, 1).double(), [x], [eps])
            losses.append(nvae.loss(Normal(s, 1.0).log_prob(x).flatten(), nvae.kl_terms(moments), torch.ones(1).double()))
        gap = torch.stack(losses).mean(0) + log_q
        assert gap.mean().abs() < 0.01 if exact else gap.mean() > 0.05


@given(st.integers(1, 5), SEEDS)
def test_7574_1_weights_are_one_a_group(groups, seed):
    log_q, kls, weights = draws(3, seed=seed), draws(groups, 3, seed=seed + 1), draws(groups, seed=seed + 2)
    got = nvae.loss(log_q, kls, weights)
    for i in range(3):
        assert got[i].item() == pytest.approx(-log_q[i].item() + sum((weights[l] * kls[l, i]).item() for l in range(groups)))


def test_7574_6_ffhq_has_six_million_latent_numbers():
    counts = nvae.group_counts(5, 16, 4)
    assert counts == [16, 8, 4, 4, 4] and sum(counts) == 36
    assert nvae.latent_numbers(counts, 128, 20) == 6_005_760
    assert (4 * 8**2 + 4 * 16**2 + 4 * 32**2 + 8 * 64**2 + 16 * 128**2) * 20 == 6_005_760
    assert [nvae.group_counts(*row) for row in ((2, 10, 1), (3, 20, 1), (1, 30, 1), (2, 2, 2), (2, 3, 2))] == [
        [10, 5], [20, 10, 5], [30], [2, 2], [3, 2]]


@given(SEEDS, st.integers(1, 3), st.integers(1, 4))
def test_7574_6_counts_what_the_network_draws(seed, scales, groups):
    net = tiny(scales=scales, groups=groups, min_groups=1, latent=3, seed=seed % 100)
    counts = nvae.group_counts(scales, groups, 1)
    drawn = sum(eps[0].numel() for eps in net.noise(1, torch.Generator()))
    assert drawn == nvae.latent_numbers(counts, net.shapes[-1][1], 3)
    assert len(net.shapes) == sum(counts) == len(net.groups) == len(net.tower)


# ---- the chain in the network ----

NETS = [dict(), dict(patch=1, stem=1, stem_cells=2), dict(scales=3, groups=1, min_groups=1, patch=2, size=18), dict(channels=1),
        dict(scales=1, groups=3, size=12), dict(flows=1)]


@pytest.mark.parametrize("how", NETS)
def test_encoder_and_generator_share_one_path(how):
    """Draw z by the encoder; then hand the generator the noise that makes the same z by q: the same picture."""
    net = tiny(**how).eval()
    y, eps = y_of(net, 3), noise(net, 3)
    with torch.no_grad():
        s, zs, moments = nvae.top_down(net.groups, net.h, net.encode(y), eps)
        same = [(z - mu) / sigma for z, (mu, sigma, _, _) in zip(zs, moments)]
        law, again = net.law(s), net.generate(same, 1.0)
    torch.testing.assert_close(law.mean(), again.mean(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(law.log_prob(y), again.log_prob(y), rtol=1e-4, atol=1e-2)
    assert law.mean().shape == y.shape


@pytest.mark.parametrize("how", NETS)
def test_no_way_from_x_to_the_picture_but_z(how):
    """With all z fixed the gradient to x is exactly zero; with eps fixed it is not, through each group's z alone."""
    net = tiny(**how).eval()
    features = [f.detach().requires_grad_() for f in net.encode(y_of(net, 2))]
    s, zs, moments = nvae.top_down(net.groups, net.h, features, noise(net, 2))
    fixed = [((z - mu) / sigma).detach() for z, (mu, sigma, _, _) in zip(zs, moments)]
    grads = torch.autograd.grad(net.generate(fixed, 1.0).mean().sum(), features, allow_unused=True)
    assert all(grad is None for grad in grads)
    for grad in torch.autograd.grad(net.law(s).mean().square().sum(), features):
        assert grad.abs().sum() > 0


def test_a_group_sees_the_groups_above_and_none_below():
    net = tiny(groups=2, scales=2).eval()
    eps = [e.requires_grad_() for e in noise(net, 1)]
    for features in (None, net.encode(y_of(net, 1))):
        _, zs, _ = nvae.top_down(net.groups, net.h, features, eps)
        for l, z in enumerate(zs):
            grads = torch.autograd.grad(z.square().sum(), eps, allow_unused=True, retain_graph=True)
            assert [grad is not None and grad.abs().sum().item() > 0 for grad in grads] == [k <= l for k in range(len(zs))]


def test_the_first_group_is_a_standard_normal_and_h_is_learnt():
    net = tiny().eval()
    _, mu, sigma = net.groups[0].q(net.h)
    assert (mu == 0).all() and (sigma == 1).all()
    law, kls = net(y_of(net, 2), noise(net, 2))
    value = nvae.loss(law.log_prob(y_of(net, 2)), kls, torch.ones(4)).mean()
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert "h" in dict(net.named_parameters())


@given(SEEDS, st.sampled_from([1.0, 30.0, 1e4]))
def test_with_any_input_the_moments_stay_in_bounds(seed, scale):
    torch.manual_seed(seed % 1000)
    group = nvae.Group([], 8, 3, first=False)
    s, f = draws(2, 2, 8, 4, 4, seed=seed).float().mul(scale).unbind()
    s = s.requires_grad_()
    same, mu, sigma = group.q(s)
    d_mu, d_sigma = group.p(s, f)
    assert torch.equal(same, s)
    assert mu.abs().max() <= 5 and d_mu.abs().max() <= 5
    assert (sigma >= math.exp(-5) + 0.0099).all() and (sigma <= math.exp(5) + 0.0101).all()
    assert (d_sigma >= math.exp(-5.001)).all() and (d_sigma <= math.exp(5.001)).all()
    kl = nvae.kl_relative(d_mu, d_sigma, sigma)
    assert kl.isfinite().all() and (kl > -1e-6).all()  # float32
    assert torch.autograd.grad(kl.sum(), s)[0].isfinite().all()


@given(SEEDS, st.floats(0.1, 1.5))
def test_temperature_scales_every_deviation(seed, t):
    """z - mu is t sigma eps in each group, mu and sigma by the z that were drawn; at 0 no noise is left."""
    net = tiny(seed=seed % 50).eval()
    eps = noise(net, 2, seed)
    with torch.no_grad():
        _, zs, _ = nvae.top_down(net.groups, net.h, None, eps, t)
        s = net.h.expand(2, -1, -1, -1)
        for group, z, e in zip(net.groups, zs, eps):
            s, mu, sigma = group.q(s)
            torch.testing.assert_close(z - mu, t * sigma * e)
            s = group.take(s, z)
        a, b = (net.generate(noise(net, 2, k), 0.0).mean() for k in (seed, seed + 1))
    assert torch.equal(a, b)


# ---- the laws of pictures ----

def mixture(params, bits, n=1, floor=-9.0):
    """The law of one pixel, n times: params (10, M)."""
    return nvae.DiscretizedLogisticMixture(params.reshape(1, -1, 1, 1).expand(n, -1, 1, 1), bits, floor)


def mass(params, bits, *colours, floor=-9.0):
    return mixture(params, bits, len(colours), floor).log_prob(torch.tensor(colours).view(-1, 3, 1, 1)).exp()


@pytest.mark.parametrize("bits", [5, 8])
@given(SEEDS, st.floats(-9, 1))
@example(0, -4.0)
def test_mixture_the_levels_of_a_channel_sum_to_one(bits, seed, log_s):
    """Independent channels: the sums over red, over green and over blue multiply to p^2 times the three totals. This fails
    by the rule x > 0.99, which takes both 254 and 255 for the open end."""
    params = draws(10, 1, seed=seed)
    params[1:4], params[4:7], params[7:] = 2 * params[1:4].tanh(), log_s, 0
    n = range(2**bits)
    mu = params[1:4, 0]
    r, g, b = (((mu.clamp(-1, 1) + 1) / 2 * (2**bits - 1)).round().long()).tolist()  # likely ones, so that nothing is 0
    sums = [mass(params, bits, *line).sum() for line in ([(k, g, b) for k in n], [(r, k, b) for k in n], [(r, g, k) for k in n])]
    total = sums[0] * sums[1] * sums[2] / mass(params, bits, (r, g, b)) ** 2
    assert total.item() == pytest.approx(1, abs=1e-11)


@given(SEEDS, st.floats(-6, 1), st.integers(1, 3))
def test_mixture_all_colours_of_three_bits_sum_to_one(seed, log_s, M):
    params = draws(10, M, seed=seed)
    params[4:7] += log_s
    colours = torch.cartesian_prod(*[torch.arange(8)] * 3).tolist()
    assert mass(params, 3, *colours).sum().item() == pytest.approx(1, abs=1e-11)


@given(SEEDS, st.sampled_from([5, 8]), st.integers(1, 4))
def test_mixture_by_plain_sigmoids(seed, bits, M):
    """Components, shifts by the true channels before, open ends, the floor: written out with numbers."""
    params, top = draws(10, M, seed=seed), 2**bits - 1
    floor = -1.0
    pi, c = params[0].softmax(0), params[7:].tanh()
    for colour in torch.randint(0, top + 1, (4, 3), generator=torch.Generator().manual_seed(seed)).tolist() + [[0, top, 0]]:
        x = [2 * level / top - 1 for level in colour]
        want = 0.0
        for m in range(M):
            means = [params[1, m], params[2, m] + c[0, m] * x[0], params[3, m] + c[1, m] * x[0] + c[2, m] * x[1]]
            product = pi[m].item()
            for k in range(3):
                s = math.exp(max(params[4 + k, m].item(), floor))
                ends = [1 / (1 + math.exp(-(x[k] + side / top - means[k].item()) / s)) for side in (-1, 1)]
                product *= (1 if colour[k] == top else ends[1]) - (0 if colour[k] == 0 else ends[0])
            want += product
        assert mass(params, bits, colour, floor=floor).item() == pytest.approx(want, rel=1e-9)


def test_mixture_far_tails_are_finite_and_have_a_gradient():
    params = torch.zeros(10, 1, requires_grad=True)
    for colour, mu, log_s in (((0, 0, 0), 50.0, -7.0), ((16, 16, 16), 50.0, -7.0), ((31, 31, 31), -50.0, -7.0), ((9, 9, 9), 2e3, 3e3)):
        law = mixture(torch.cat([params[:1], params[1:4] + mu, params[4:7] + log_s, params[7:]]), 5)
        value = law.log_prob(torch.tensor(colour).view(1, 3, 1, 1)).sum()
        assert value.isfinite() and torch.autograd.grad(value, params)[0].isfinite().all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mixture_draws_follow_their_probabilities(seed):
    """All 64 colours of two bits, 40,000 draws of one pixel: within five standard deviations each."""
    params, n = draws(10, 2, seed=seed), 40_000
    params[4:7] -= 1
    p = mass(params, 2, *torch.cartesian_prod(*[torch.arange(4)] * 3).tolist())
    x = mixture(params, 2, n).sample(torch.Generator().manual_seed(seed)).flatten(1)
    level = ((x + 1) * 1.5).round().long()
    torch.testing.assert_close(level / 1.5 - 1, x, check_dtype=False)
    counts = torch.bincount(level @ torch.tensor([16, 4, 1]), minlength=64) / n
    assert ((counts - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-4).all()


@given(SEEDS)
def test_mixture_mean_is_the_mean_of_its_components(seed):
    """Before clipping: pi-weighted, green and blue shifted by the component's own red and green."""
    params = draws(10, 3, seed=seed)
    pi, mu, c = params[0].softmax(0), params[1:4], params[7:].tanh()
    g = mu[1] + c[0] * mu[0]
    want = torch.stack([(pi * mu[0]).sum(), (pi * g).sum(), (pi * (mu[2] + c[1] * mu[0] + c[2] * g)).sum()]).clamp(-1, 1)
    torch.testing.assert_close(mixture(params, 5).mean().flatten(), want)


@given(SEEDS)
def test_bernoulli_counts_every_pixel_and_no_padding(seed):
    net = tiny(channels=1, size=14).eval()
    y = y_of(net, 2, seed)
    law, _ = net(y, noise(net, 2))
    assert law.logits.shape == y.shape == (2, 1, 14, 14)
    p = law.logits.detach().sigmoid()
    want = [sum(math.log(p[i, 0, a, b] if y[i, 0, a, b] else 1 - p[i, 0, a, b]) for a in range(14) for b in range(14))
            for i in range(2)]
    assert law.log_prob(y).tolist() == pytest.approx(want, rel=1e-4)
    torch.testing.assert_close(law.mean(), 2 * p - 1)
    draw = law.sample(torch.Generator().manual_seed(seed))
    assert set(draw.unique().tolist()) <= {-1.0, 1.0} and (draw > 0).double().mean() == pytest.approx(p.mean().item(), abs=0.15)


def test_digits_have_784_pixels_and_a_border_of_black():
    net = tiny(channels=1, size=28)
    assert net.border == (2, 2, 2, 2) and net.shapes[0][1:] == (4, 4)
    y = torch.ones(1, 1, 28, 28, dtype=torch.uint8)
    seen = []
    net.stem[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    net.post.register_forward_hook(lambda _, x, out: seen.append(out))
    law, _ = net(y, noise(net, 1))
    assert torch.equal(law.logits, seen[1][:, :, 2:30, 2:30])  # where the picture was put
    assert (seen[0][0, 0, 2:30, 2:30] == 1).all() and seen[0].sum() == 784 - (1024 - 784) and law.logits.numel() == 784


def test_bits_per_dim_and_back():
    assert nvae.bits_per_dim(3072 * math.log(2) * 2.91, 3072) == pytest.approx(2.91)
    assert nvae.bits_per_dim(math.log(256) * 12, 12) == pytest.approx(8)  # flat over 256 levels


def test_levels_of_bytes():
    """Five bits have 32 levels; one bit is drawn anew at each look, white as often as the grey value says."""
    g, x = torch.Generator().manual_seed(0), torch.arange(256, dtype=torch.uint8)
    five = nvae.levels(x, 5, g)
    assert five.unique().tolist() == list(range(32)) and torch.equal(five, x // 8) and torch.equal(nvae.levels(x, 8, g), x)
    looks = torch.stack([nvae.levels(x, 1, g) for _ in range(4000)]).double().mean(0)
    assert looks[0] == 0 and looks[255] == 1
    assert (looks - x / 255).abs().max() < 5 * 0.5 / 4000**0.5


# ---- the importance bound ----

class Toy(torch.nn.Module):
    """x = z_1 + z_2 + e, all N(0, 1) and one number; p(z|x) exact, or worse by `error`. log q(x) = log N(x; 0, 3)."""

    def __init__(self, error):
        super().__init__()
        one, two = Linear(0.0, 1 / 3, 1.0, (2 / 3) ** 0.5), Linear(0.0, 1 / 2, 1.0, 0.5**0.5)
        two.p = lambda s, x: ((x - s) / 2 + error, torch.full_like(s, 0.5**0.5))
        self.groups, self.h = [one, two], torch.zeros(1, 1, 1, 1).double()

    def encode(self, y):
        return [y, y]

    def noise(self, count, g):
        return [torch.randn(count, 1, 1, 1, generator=g, dtype=torch.float64) for _ in range(2)]

    def law(self, s):
        class Law:
            def log_prob(self, y):
                return Normal(s, 1.0).log_prob(y).flatten()
        return Law()


@pytest.mark.parametrize("K", [1, 5])
def test_importance_bound_is_exact_where_the_posterior_is(K):
    x = draws(50, 1, 1, 1) * 2
    got = nvae.importance_bound(Toy(0.0), x, K, torch.Generator().manual_seed(0))
    torch.testing.assert_close(got, -Normal(0.0, 3**0.5).log_prob(x).flatten())


def test_importance_bound_falls_towards_the_truth_with_K():
    x, g = torch.ones(4000, 1, 1, 1).double(), torch.Generator().manual_seed(0)
    truth, toy = -Normal(0.0, 3**0.5).log_prob(torch.tensor(1.0)).item(), Toy(0.8)
    bounds = [nvae.importance_bound(toy, x, K, g).mean().item() for K in (1, 3, 10, 100)]
    assert bounds[0] > bounds[1] + 0.05 > bounds[2] + 0.1 and bounds[2] > bounds[3] > truth
    assert bounds[3] < truth + 0.03
    s, _, moments = nvae.top_down(toy.groups, toy.h, toy.encode(x), toy.noise(4000, g))
    elbo = nvae.loss(toy.law(s).log_prob(x), nvae.kl_terms(moments), torch.ones(2).double()).mean().item()
    assert bounds[0] == pytest.approx(elbo, abs=0.06)  # K = 1 is (1), its KL by the draw


@pytest.mark.parametrize("flows", [0, 1])
def test_importance_bound_of_the_network_by_hand(flows):
    """K = 3: log-weights from torch's own Normal, of p where z was before the flow; all groups' z anew for each k."""
    net = tiny(flows=flows).eval()
    y, g = y_of(net, 2), torch.Generator().manual_seed(3)
    got = nvae.importance_bound(net, y, 3, torch.Generator().manual_seed(3))
    log_w = []
    with torch.no_grad():
        for _ in range(3):
            eps = net.noise(2, g)
            s, zs, moments = nvae.top_down(net.groups, net.h, net.encode(y), eps)
            w = net.law(s).log_prob(y)
            for z, e, (mu, sigma, d_mu, d_sigma) in zip(zs, eps, moments):
                p = Normal(mu + d_mu, sigma * d_sigma)
                w = w + (Normal(mu, sigma).log_prob(z) - p.log_prob(p.mean + p.stddev * e)).sum((1, 2, 3))
            log_w.append(w)
    most = torch.stack(log_w).double().max(0).values
    want = -(most + sum((w - most).exp() for w in log_w).div(3).log())
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-2)


# ---- the weights of the KL ----

@given(st.integers(1, 1000), st.floats(0.0, 1.0))
def test_kl_weight_rises_from_1e_4_to_1(steps, warmup):
    beta = [nvae.kl_weight(k, steps, warmup) for k in range(steps + 1)]
    assert beta == sorted(beta) and 1e-4 <= beta[0] and max(beta) <= 1
    want = [min(1, max(1e-4, (k - 1e-4 * steps) / (warmup * steps))) if warmup > 1e-6 else 1 for k in range(1, steps + 1)]
    assert beta[1:] == pytest.approx(want)


@given(SEEDS, st.integers(1, 6))
def test_balance_has_mean_one_and_no_gradient(seed, groups):
    kls = draws(groups, seed=seed).abs().requires_grad_()
    areas = draws(groups, seed=seed + 1).abs() + 1
    got = nvae.balance(kls, areas)
    want = [(kls[l].item() + 0.01) / areas[l].item() for l in range(groups)]
    assert got.tolist() == pytest.approx([w * groups / sum(want) for w in want])
    assert not got.requires_grad


def test_areas_are_pixels_over_groups_of_that_scale():
    net = tiny(scales=3, groups=8, min_groups=1, patch=1, stem=0, size=16)
    want = [h * h / n for h, n in ((4, 2), (8, 4), (16, 8)) for _ in range(n)]
    assert net.areas.tolist() == pytest.approx(want)


# ---- spectral norms and gammas ----

@given(SEEDS)
def test_spectral_norms_close_in_on_the_largest_singular_values(seed):
    torch.manual_seed(seed % 10_000)
    convs = [nvae.Conv(6, 5, 3), nvae.Conv(6, 5, 3), nvae.Conv(4, 8, normed=False), nvae.Conv(8, 8, 5, groups=8, normed=False)]
    exact = [torch.linalg.svdvals(conv.kernel().flatten(1).double())[0].item() for conv in convs]
    order = [0, 1, 2, 3]
    before = [0.0] * 4
    for iterations in (1, 3, 200):
        with torch.no_grad():
            got = nvae.spectral_norms(convs, iterations).tolist()
        for k in order:
            assert before[k] - 1e-5 <= got[k] <= exact[k] * (1 + 1e-5)
        before = got
    assert got == pytest.approx(exact, rel=2e-3)  # equal singular values take long


@given(SEEDS, st.floats(0.1, 10))
def test_spectral_gradient_is_u_v_and_the_norm_is_as_large_as_the_kernel(seed, scale):
    torch.manual_seed(seed % 10_000)
    conv = nvae.Conv(3, 4, 3, normed=False)
    value = nvae.spectral_norms([conv], 300)
    grad, = torch.autograd.grad(value.sum(), conv.weight)
    u, s, vh = torch.linalg.svd(conv.weight.detach().flatten(1))
    if s[0] > 1.05 * s[1]:
        torch.testing.assert_close(grad.flatten(1), torch.outer(u[:, 0], vh[0]), atol=1e-3, rtol=1e-3)
    conv.weight.data *= scale
    assert nvae.spectral_norms([conv], 1).item() == pytest.approx(scale * value.item(), rel=1e-4)


def test_spectral_iteration_goes_on_where_it_was():
    """One and one are two; u is in the state, and moves."""
    torch.manual_seed(0)
    a = nvae.Conv(6, 5, 3)
    b = copy.deepcopy(a)
    before = a.u.clone()
    nvae.spectral_norms([a], 2)
    nvae.spectral_norms([b], 1)
    nvae.spectral_norms([b], 1)
    torch.testing.assert_close(a.u, b.u)
    assert (a.u - before).abs().max() > 1e-3 and "u" in a.state_dict() and not a.u.requires_grad


def test_penalty_is_of_every_convolution_and_every_gamma():
    net = tiny(patch=1, stem=1, flows=1)
    kernels = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(isinstance(m, nvae.Conv) for m in kernels)
    gammas = [m.weight for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        gammas[0][:1] = -9
    want = sum(torch.linalg.svdvals(m.kernel().flatten(1))[0] for m in kernels) + sum(w.abs().max() for w in gammas)
    got = nvae.penalty(kernels, gammas, 400)
    assert got.item() == pytest.approx(want.item(), rel=1e-3) and len(kernels) > 30 and len(gammas) > 20
    got.backward()
    assert all(m.weight.grad.abs().sum() > 0 or m.log_norm is not None for m in kernels)
    assert all(m.log_norm.grad.abs().sum() > 0 for m in kernels if m.log_norm is not None)


def test_normed_convolution_by_hand():
    conv = nvae.Conv(3, 4, 3, 2).double()
    x, before = draws(2, 3, 6, 6), conv.weight.detach().clone()
    torch.testing.assert_close(conv(x), F.conv2d(x, before, conv.bias, 2, 1))  # as nn.Conv2d starts it
    conv.log_norm.data += math.log(3)
    conv.weight.data *= 7  # its length does not count
    torch.testing.assert_close(conv(x), F.conv2d(x, 3 * before, conv.bias, 2, 1))
    plain = nvae.Conv(4, 4, 5, groups=4, normed=False)
    assert plain.bias is None and plain.log_norm is None and torch.equal(plain.kernel(), plain.weight)
    assert nvae.Conv(3, 4, 4, 4)(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 2, 2)


# ---- BatchNorm's statistics ----

def test_reestimate_changes_statistics_of_the_generator_alone():
    net = tiny().eval()
    before = copy.deepcopy(net.state_dict())
    nvae.reestimate(net, [noise(net, 4, k) for k in range(3)], 0.7)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    norms = {name for name, m in net.named_modules() if isinstance(m, nvae.BatchNorm)}
    theirs = {f"{name}.running_{kind}" for name in norms if name.startswith(("groups", "post")) for kind in ("mean", "var")}
    assert changed == theirs and len(theirs) > 20
    after = copy.deepcopy(net.state_dict())
    nvae.reestimate(net, [noise(net, 4, k) for k in range(3)], 0.7)  # idempotent
    assert all(torch.equal(value, after[name]) for name, value in net.state_dict().items())
    nvae.reestimate(net, [], 0.7)
    assert all(torch.equal(value, after[name]) for name, value in net.state_dict().items())
    assert not net.training and not any(m._forward_pre_hooks for m in net.modules())


def test_reestimate_from_one_batch_is_the_training_mode_of_that_batch():
    net = tiny().eval()
    eps = noise(net, 5)
    nvae.reestimate(net, [eps], 0.7)
    with torch.no_grad():
        got = net.generate(eps, 0.7).mean()
        torch.testing.assert_close(got, copy.deepcopy(net).train().generate(eps, 0.7).mean())
        assert not torch.allclose(got, tiny().eval().generate(eps, 0.7).mean(), atol=1e-3)


def test_reestimate_averages_over_batches():
    net = tiny().eval()
    layer = net.post[0].branch[0]
    seen = []
    train = copy.deepcopy(net).train()
    train.post[0].branch[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    batches = [noise(net, 3, 50 * k) for k in range(4)]
    with torch.no_grad():
        for eps in batches:
            train.generate(eps, 0.9)
    nvae.reestimate(net, batches, 0.9)
    torch.testing.assert_close(layer.running_mean, sum(x.mean((0, 2, 3)) for x in seen) / 4, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var, sum(x.var((0, 2, 3), correction=0) for x in seen) / 4, rtol=1e-5, atol=1e-5)


def test_reestimate_from_single_pictures_is_finite():
    """One picture a batch, and a top of one pixel, whose variance is that of one number."""
    net = tiny(size=8, patch=4, scales=2).eval()
    assert net.shapes[0][1:] == (1, 1)
    nvae.reestimate(net, [noise(net, 1, k) for k in range(5)], 0.6)
    assert all(value.isfinite().all() for value in net.state_dict().values())
    assert net.generate(noise(net, 2), 0.6).mean().isfinite().all()


# ---- cells ----

def by_hand(cell, x, layers):
    """skip + factor * gate * branch; layers: what stands in the branch, as functions."""
    h = x
    for f in layers:
        h = f(h)
    gate = cell.branch[-1].gate
    means = h.mean((2, 3))
    weight = torch.relu(means @ gate[0].weight.T + gate[0].bias) @ gate[2].weight.T + gate[2].bias
    return cell.skip(x) + 0.5 * h * weight.sigmoid()[..., None, None]


def bn(layer):
    return lambda x: F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0, 1e-5)


def swish(x):
    return x * x.sigmoid()


@pytest.mark.parametrize("inputs, outputs", [(8, 8), (8, 16)])
def test_encoder_cell_by_hand(inputs, outputs):
    torch.manual_seed(0)
    cell = nvae.encoder_cell(inputs, outputs, 0.5, False).double().eval()
    b, x = cell.branch, draws(2, inputs, 6, 6)
    stride = 1 if inputs == outputs else 2
    with torch.no_grad():
        got = cell(x)
        want = by_hand(cell, x, [bn(b[0]), swish, lambda h: F.conv2d(h, b[2].weight, b[2].bias, stride, 1),
                                 bn(b[3]), swish, lambda h: F.conv2d(h, b[5].weight, b[5].bias, 1, 1)])
    torch.testing.assert_close(got, want)
    assert got.shape == (2, outputs, 6 // stride, 6 // stride)
    assert all(m.momentum == 0.05 and m.eps == 1e-5 for m in (b[0], b[3])) and cell.branch[-1].gate[0].out_features == 4


@pytest.mark.parametrize("inputs, outputs, expand", [(8, 8, 6), (16, 8, 3)])
def test_decoder_cell_by_hand(inputs, outputs, expand):
    torch.manual_seed(0)
    cell = nvae.decoder_cell(inputs, outputs, expand, 0.5, False).double().eval()
    x, up = draws(2, inputs, 4, 4), inputs != outputs
    b, wide = cell.branch[1:] if up else cell.branch, expand * inputs
    assert b[1].weight.shape == (wide, inputs, 1, 1) and b[4].weight.shape == (wide, 1, 5, 5)
    assert all(b[k].bias is None and b[k].log_norm is None for k in (1, 4, 7))
    with torch.no_grad():
        got = cell(x)
        want = by_hand(cell, x, [lambda h: h.repeat_interleave(2, 2).repeat_interleave(2, 3) if up else h, bn(b[0]),
                                 lambda h: F.conv2d(h, b[1].weight), bn(b[2]), swish,
                                 lambda h: F.conv2d(h, b[4].weight, padding=2, groups=wide), bn(b[5]), swish,
                                 lambda h: F.conv2d(h, b[7].weight), bn(b[8])])
        if up:
            skip = F.conv2d(F.interpolate(x, scale_factor=2, mode="bilinear"), cell.skip[1].weight, cell.skip[1].bias)
            torch.testing.assert_close(cell.skip(x), skip)
    torch.testing.assert_close(got, want)
    assert got.shape == (2, outputs, 8, 8) if up else x.shape


def test_halving_sees_all_four_phases():
    skip = nvae.Halve(3, 8).double()
    x = draws(2, 3, 6, 6).requires_grad_()
    out = skip(x)
    assert out.shape == (2, 8, 3, 3)
    assert (torch.autograd.grad(out.square().sum(), x)[0] != 0).all()
    for k, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        conv = skip.phases[k]
        want = F.conv2d(swish(x[:, :, i::2, j::2]), conv.weight, conv.bias)
        torch.testing.assert_close(out[:, 2 * k:2 * k + 2], want)


@pytest.mark.parametrize("how", NETS)
def test_cells_computed_twice_are_the_same(how):
    """--forget: loss, gradients and BatchNorm's averages as without it."""
    nets = [tiny(forget=forget, **how).train() for forget in (False, True)]
    y, eps = y_of(nets[0], 3), noise(nets[0], 3)
    for net in nets:
        law, kls = net(y, eps)
        nvae.loss(law.log_prob(y), kls, torch.ones(len(eps))).mean().backward()
    for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, p), q in zip(nets[0].named_buffers(), nets[1].buffers()):
        if "num_batches" not in name:
            torch.testing.assert_close(p, q, msg=name)
    kept = sum(m.momentum == 0.05 for m in nets[1].modules() if isinstance(m, nvae.BatchNorm))
    assert kept == sum(isinstance(m, nvae.BatchNorm) for m in nets[1].modules())


# ---- the flow inside a group ----

def in_turn(z):
    """(B, Z, n, n) as (B, n n Z): pixels in rows, a pixel's channels in turn."""
    return z.permute(0, 2, 3, 1).flatten(1)


def back(v, latent, n):
    return v.view(-1, n, n, latent).permute(0, 3, 1, 2)


@pytest.mark.parametrize("n", [1, 4])
def test_flow_by_hand(n):
    """Kernels masked entry by entry: what comes before in rows; at the middle the channels before, then those up to one's own."""
    torch.manual_seed(0)
    flow, z = nvae.Flow(3).double(), draws(2, 3, n, n)
    kernels = []
    for conv, strict in zip(list(flow.shift)[::2], (True, False, False)):
        conv.log_norm.data += 0.5  # the norm is of what the mask leaves
        w, mid = conv.weight.detach().clone(), conv.kernel_size[0] // 2
        for o, i, a, b in np.ndindex(*w.shape):
            if conv.groups > 1:
                know, of = 0, 0  # its own channel
            else:
                know, of = (o // 6, i) if strict else (o, i // 6)
            if (a, b) > (mid, mid) or (a, b) == (mid, mid) and (of >= know if strict else of > know):
                w[o, i, a, b] = 0
        kernels.append(w * (conv.log_norm.exp().flatten() / w.flatten(1).norm(dim=1)).view(-1, 1, 1, 1).detach())
        torch.testing.assert_close(conv.kernel(), kernels[-1])
    one, two, three = list(flow.shift)[::2]
    h = F.elu(F.conv2d(z, kernels[0], one.bias, padding=1))
    h = F.elu(F.conv2d(h, kernels[1], two.bias, padding=2, groups=18))
    want = z - F.conv2d(h, kernels[2], three.bias)
    torch.testing.assert_close(flow(z), torch.rot90(want.flip(1), 2, (2, 3)))


@given(SEEDS, st.integers(1, 4), st.integers(1, 3))
def test_flow_has_a_triangular_jacobian_with_ones_on_its_diagonal(seed, n, latent):
    torch.manual_seed(seed % 10_000)
    flow = nvae.Flow(latent).double()
    for conv in list(flow.shift)[::2]:
        conv.log_norm.data += 1
    v = in_turn(3 * draws(1, latent, n, n, seed=seed))
    jacobian = torch.autograd.functional.jacobian(lambda v: in_turn(flow(back(v, latent, n)).flip(1, 2, 3))[0], v)[:, 0]
    assert torch.equal(jacobian, jacobian.tril()) and (jacobian.diagonal() == 1).all()
    if n < 3:  # all is in reach: what a number may depend on it does
        assert (jacobian[torch.ones_like(jacobian).tril(-1).bool()] != 0).all()


def inverse(flow, z):
    """What Flow by Flow, number by number, was there before."""
    for half in reversed(flow):
        turned, z = z.flip(1, 2, 3), torch.zeros_like(z)
        for _ in range(z[0].numel()):  # the k-th number is right after k rounds
            z = turned + half.shift(z)
    return z


@given(SEEDS, st.integers(1, 3), st.integers(1, 2))
def test_flows_keep_volumes_and_can_be_undone(seed, n, flows):
    torch.manual_seed(seed % 10_000)
    flow, z = nvae.Group([], 4, 2, True, flows).flow.double(), draws(1, 2, n, n, seed=seed)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v.view_as(z)).flatten(), z.flatten())
    sign, log_det = torch.linalg.slogdet(jacobian)
    assert sign == 1 and abs(log_det) < 1e-10 and len(flow) == 2 * flows
    assert n == 1 or (jacobian.triu(1).any() and jacobian.tril(-1).any())  # the second half looks the other way
    with torch.no_grad():
        torch.testing.assert_close(inverse(flow, flow(z)), z)


def test_kl_by_a_draw_is_that_of_the_densities_there():
    """log p(z) from the noise that a naive inverse finds and autograd's log det; log q(z) from torch's Normal."""
    net = tiny(flows=1).eval()
    for group in net.groups:
        group.flow.double()
    y, eps = y_of(net, 2), [draws(2, *shape, seed=k) for k, shape in enumerate(net.shapes)]
    with torch.no_grad():
        s, zs, moments = nvae.top_down(net.groups, net.h, net.encode(y), eps)
        law, kls = net(y, eps)
    torch.testing.assert_close(law.mean(), net.law(s).mean())
    for group, z, e, (mu, sigma, d_mu, d_sigma), got in zip(net.groups, zs, eps, moments, kls):
        for i in range(2):
            with torch.no_grad():
                z_0 = inverse(group.flow, z[i:i + 1])
            torch.testing.assert_close(z_0[0], (mu + d_mu + sigma * d_sigma * e)[i], rtol=1e-5, atol=1e-5)
            assert (z_0 - z[i]).abs().max() > 0.01
            log_det = torch.linalg.slogdet(torch.autograd.functional.jacobian(
                lambda v: group.flow(v.view_as(z_0)).flatten(), z_0.flatten()))[1]
            log_p = Normal(mu + d_mu, sigma * d_sigma).log_prob(z_0)[i].sum() - log_det
            assert got[i].item() == pytest.approx((log_p - Normal(mu, sigma).log_prob(z)[i].sum()).item(), rel=1e-4)


def test_kl_by_draws_is_7574_3_on_average():
    groups = [Linear(0.0, 0.7, 1.0, 0.5), Linear(0.4, 0.6, 0.8, 0.3)]
    n, x = 200_000, torch.full((1, 1, 1, 1), 1.5, dtype=torch.float64)
    eps = list(draws(2, n, 1, 1, 1))
    _, zs, moments = nvae.top_down(groups, torch.zeros_like(x), [x, x], eps)
    gap = nvae.kl_draws(zs, eps, moments) - nvae.kl_terms(moments)
    assert gap.shape == (2, n) and (gap.std(1) > 0.1).all()
    assert (gap.mean(1).abs() < 5 * gap.std(1) / n**0.5).all()


def test_the_generator_has_no_flow():
    """Whatever the flows do, q(z) and the picture are as before; p's z is not."""
    net = tiny(flows=1).eval()
    eps, y = noise(net, 2), y_of(net, 2)
    with torch.no_grad():
        before = [net.generate(eps, 1.0).mean(), net(y, eps)[0].mean()]
        for group in net.groups:
            group.flow[0].shift[0].weight.zero_().add_(1)
        after = [net.generate(eps, 1.0).mean(), net(y, eps)[0].mean()]
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1], atol=1e-3)


# ---- the paper's sizes ----

@pytest.mark.parametrize("flags, channels, size, groups, millions", [
    ("", 3, 32, [30], 130.9), ("--flows 0", 3, 32, [30], 129.2),  # CIFAR-10
    ("--flows 0 --width 32 --scales 2 --groups 10 --stem 2 --stem-cells 3", 1, 28, [5, 10], 33.4),  # MNIST
    ("--width 64 --scales 3 --groups 20", 3, 64, [5, 10, 20], 153.3),  # CelebA 64
    ("--flows 2 --width 30 --scales 5 --groups 16 --min-groups 4", 3, 256, [4, 4, 4, 8, 16], 330.8)])  # FFHQ
def test_the_papers_rows(flags, channels, size, groups, millions):
    """Parameters as counted from the paper's table, flows included (33, 131, 153, 331 million), without allocating them."""
    args = nvae.parse_args(["--paper", *flags.split()])
    with torch.device("meta"):
        net = nvae.build(args, channels, size, torch.device("meta"))
    sides = [side for _, side, _ in net.shapes]
    assert [sides.count(side) for side in sorted(set(sides))] == groups
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert args.lr == 0.01 and args.factor == 0.1 and args.bits == 8 and args.mixtures == 10 and args.ema == 0
    if size == 256:
        assert sum(math.prod(shape) for shape in net.shapes) == 6_005_760


# ---- wiring: a run beside a naive one ----

NET = "--width 8 --groups 2 --min-groups 1 --latent 2 --expand 2"
TINY = (f"{NET} --batch-size 7 --samples 4 --judge 0 --test-images 2 --importance 2 --bn-batches 3 --save-every 99 "
        "--penalty-every 2")


@pytest.fixture
def pictures():
    """60 pictures of 9 x 9, which are padded to 16. The last six are held out."""
    torch.set_num_threads(1)
    a = np.random.default_rng(0).integers(0, 256, (60, 9, 9, 3), dtype=np.uint8)
    np.save("a.npy", a)
    np.save("grey.npy", a[..., 0])
    return torch.tensor(a).permute(0, 3, 1, 2)


def main(flags, out="out/nvae"):
    """A run on a.npy, its checkpoint and its metrics."""
    assert nvae.main(["--data", "a.npy", *TINY.split(), *flags.split(), "--out", str(out)]) == 0
    return torch.load(f"{out}/ckpt.pt", weights_only=True), json.loads(Path(f"{out}/metrics.json").read_text())


def network(flags, weights, channels=3):
    """The net of these flags, with these weights, in eval mode."""
    args = nvae.parse_args([*TINY.split(), *flags.split()])
    net = nvae.build(args, channels, 9, torch.device("cpu"))
    net.load_state_dict(weights)
    return net.eval(), args


@pytest.mark.parametrize("flags", [
    "--lr 0.01 --warmup 0.5 --ema 0.4 --flip --kl-warmup 0.6 --penalty 0.5",
    "--lr 0.02 --warmup 0 --ema 0 --kl-warmup 0 --seed 5 --bits 8 --penalty 0 --floor -3 --first-floor 0",
    "--lr 0.01 --data grey.npy --penalty 0.1 --scales 1 --penalty-every 3",
    "--lr 0.01 --kl-warmup 0.6 --penalty 0.1 --flows 1"])
def test_five_steps_are_those_of_a_naive_loop(pictures, flags):
    """Order, levels, noise, mirrors, (1), the KL's weights, floor, penalty, warm-up, cosine, Adamax and average, by plain
    code; the network alone is the script's."""
    flags += " --batch-size 12"  # the fifth batch reaches into the second epoch
    state, _ = main(f"{flags} --steps 5")
    args = nvae.parse_args([*TINY.split(), *flags.split()])
    grey = "grey" in flags
    x = pictures[:54, :1] if grey else pictures[:54]
    net = nvae.build(args, 1 if grey else 3, 9, torch.device("cpu"))
    params = dict(net.train().named_parameters())
    convs = [m for m in net.modules() if isinstance(m, nvae.Conv)]
    us = [conv.u.clone() for conv in convs]
    kept = {**params, **{name: b for name, b in net.named_buffers() if b.is_floating_point() and name != "areas"
                         and not name.endswith(".u")}}
    ema = {name: p.detach().clone() for name, p in kept.items()}
    m, v = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
    order = torch.cat([torch.randperm(54, generator=nvae.generator("cpu", args.seed, epoch, 9)) for epoch in (0, 1)])
    sides = [h for _, h, _ in net.shapes]
    areas = [h * h / sides.count(h) for h in sides]
    for step in range(5):
        g = nvae.generator("cpu", args.seed, step)
        eps = [torch.randn(12, *shape, generator=g) for shape in net.shapes]
        mirror = torch.rand(12, 1, 1, 1, generator=g).flatten() < 0.5
        batch = x[order[12 * step:12 * step + 12]]
        if grey:
            y = (torch.rand(batch.shape, generator=g) * 255 < batch).to(torch.uint8)
        else:
            y = batch // 2 ** (8 - args.bits)
        y = torch.stack([y[i].flip(2) if mirror[i] and args.flip else y[i] for i in range(12)])
        fall = min(1, step / 3)
        net.floor.fill_(args.first_floor * (1 - fall) + args.floor * fall)
        s, zs, moments = nvae.top_down(net.groups, net.h, net.encode(y), eps)
        law = net.law(s)
        if args.flows:
            p = [Normal(mu + d_mu, sigma * d_sigma) for mu, sigma, d_mu, d_sigma in moments]
            kls = [(a.log_prob(a.mean + a.stddev * e) - Normal(mu, sigma).log_prob(z)).sum() / 12
                   for a, e, z, (mu, sigma, _, _) in zip(p, eps, zs, moments)]
        else:
            kls = [(0.5 * (d_mu**2 / sigma**2 + d_sigma**2 - (d_sigma**2).log() - 1)).sum() / 12
                   for _, sigma, d_mu, d_sigma in moments]
        ramp = 1.0 if args.kl_warmup == 0 else (step - 5e-4) / (args.kl_warmup * 5)
        beta = min(1.0, max(1e-4, ramp)) if step or args.kl_warmup else 1e-4
        share = [(abs(kl.item()) + 0.01) / area for kl, area in zip(kls, areas)]
        weights = [beta * s * len(share) / sum(share) if beta < 1 else 1.0 for s in share]
        value = -law.log_prob(y).mean() + sum(w * kl for w, kl in zip(weights, kls))
        if args.penalty and step % args.penalty_every == 0:
            for k, conv in enumerate(convs):
                w = conv.kernel().flatten(1)
                for _ in range(40 if step == 0 else 4):
                    right = w.detach().T @ us[k] / (w.detach().T @ us[k]).norm()
                    us[k] = w.detach() @ right / (w.detach() @ right).norm()
                value = value + args.penalty * args.penalty_every * us[k] @ w @ right
            for layer in net.modules():
                if isinstance(layer, nvae.BatchNorm):
                    value = value + args.penalty * args.penalty_every * layer.weight.abs().max()
        value.backward()
        start = args.warmup * 5
        lr = args.lr * (step + 1) / (start + 1) if step < start else \
            1e-4 + (args.lr - 1e-4) * (0.5 + 0.5 * math.cos(math.pi * (step - start) / (5 - start)))
        decay = min(args.ema, (1 + step) / (10 + step))
        for name, p in params.items():
            grad = p.grad + 3e-4 * p.data
            m[name] = 0.9 * m[name] + 0.1 * grad
            v[name] = torch.maximum(0.999 * v[name], grad.abs() + 1e-3)
            p.data -= lr / (1 - 0.9 ** (step + 1)) * m[name] / v[name]
            p.grad = None
        for name, p in kept.items():
            ema[name] = decay * ema[name] + (1 - decay) * p.data
    for name, p in kept.items():
        torch.testing.assert_close(state["model"][name], p.data, rtol=2e-3, atol=2e-4, msg=name)
        torch.testing.assert_close(state["ema"][name], ema[name], rtol=2e-3, atol=2e-4, msg=name)
    for (name, _), u in zip([(n, c) for n, c in net.named_modules() if isinstance(c, nvae.Conv)], us):
        torch.testing.assert_close(state["model"][f"{name}.u"], u, rtol=1e-2, atol=1e-3, msg=name)
    assert state["step"] == 5 and set(ema) <= set(state["ema"]) and "floor" in ema


def tiles(path, size=9):
    """The pictures in a grid, (rows, columns, C, size, size), and that all else is white."""
    sheet = read_png(Path(path))[:, ::96 // size, ::96 // size]
    sheet = F.pad(sheet, (0, 1, 0, 1), value=255)
    sheet = sheet.unfold(1, size + 1, size + 1).unfold(2, size + 1, size + 1)
    assert (sheet[..., size, :] == 255).all() and (sheet[..., size] == 255).all()
    return sheet[..., :size, :size].permute(1, 2, 0, 3, 4).float()


def near(a, b):
    """The same pictures, but for a byte that falls to the other side now and then."""
    return a.shape == b.shape and (a - b).abs().max() <= 1 and (a != b).float().mean() < 0.01


def anew(net, args, t):
    """The net with BatchNorm's averages from --bn-batches batches, taken off a copy in training mode."""
    net, train, seen = copy.deepcopy(net), copy.deepcopy(net).train(), {}
    for name, layer in train.named_modules():
        if isinstance(layer, nvae.BatchNorm) and name.startswith(("groups", "post")):
            layer.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0]))
    g = nvae.generator("cpu", args.seed, 0, 3)
    with torch.no_grad():
        for _ in range(args.bn_batches):
            picture(train, [torch.randn(args.batch_size, *shape, generator=g) for shape in net.shapes], t)
    for name, inputs in seen.items():
        layer = net.get_submodule(name)
        layer.running_mean.copy_(sum(x.mean((0, 2, 3)) for x in inputs) / len(inputs))
        layer.running_var.copy_(sum(x.var((0, 2, 3), correction=0) for x in inputs) / len(inputs))
    return net


def picture(net, eps, t):
    """Bytes as floats, of the mean of q(x|z): each z from mu + t sigma eps."""
    with torch.no_grad():
        s = net.h.expand(len(eps[0]), -1, -1, -1)
        for group, e in zip(net.groups, eps):
            s, mu, sigma = group.q(s)
            s = group.take(s, mu + t * sigma * e)
        return ((net.law(s).mean() + 1) * 127.5).round().clamp(0, 255)


def drawn(net, args, t, first, count):
    g = nvae.generator("cpu", args.sample_seed, first, 2)
    return picture(net, [torch.randn(count, *shape, generator=g) for shape in net.shapes], t)


@pytest.mark.parametrize("flags", ["--temperature 0.7 --ema 0.9 --groups 3", "--data grey.npy --seed 3 --bn-batches 0 --ema 0.5",
                                   "--bits 8 --patch 1 --stem 1 --stem-cells 2 --bn-batches 2 --ema 0.9 --sample-seed 4",
                                   "--ema 0.9 --flows 1"])
def test_the_report_again_from_the_checkpoint(pictures, flags):
    """Every number and picture: from the average, in eval mode, on the pictures that it should come from."""
    flags += " --lr 0.02 --warmup 0.1 --test-images 5 --judge 14"
    state, metrics = main(f"{flags} --steps 12 --save-every 10")
    grey = "grey" in flags
    net, args = network(flags, state["ema"], 1 if grey else 3)
    x, out, t = pictures[:, :1] if grey else pictures, Path("out/nvae"), args.temperature
    train, held_out = x[:54], x[54:]
    again = anew(net, args, t)

    samples = torch.cat([drawn(again, args, t, first, count) for first, count in ((0, 4), (4, 4), (8, 4), (12, 2))])
    assert near(tiles(out / "samples.png").flatten(0, 1), samples[:4])
    assert tiles(out / "samples_000010.png").flatten(0, 1).shape == samples[:4].shape
    assert near(tiles(out / "temperatures.png"), torch.stack(
        [drawn(anew(net, args, k / 10), args, k / 10, 0, 4) for k in (6, 7, 8, 9, 10)]))
    top, below = tiles(out / "nearest.png")
    assert near(top, samples[:12])
    distance = (samples[:12, None] - train.float()[None]).flatten(2).norm(dim=2)
    assert torch.equal(below, train[distance.argmin(1)].float())
    g, levels = nvae.generator("cpu", args.seed, 0, 4), tiles(out / "coarse_to_fine.png")
    fresh = [torch.randn(8, *shape, generator=g) for shape in net.shapes]
    assert levels.shape[:2] == (len(net.shapes), 8)
    for l, row in enumerate(levels):
        eps = [torch.stack([e[0]] * 8) if k < l else e for k, e in enumerate(fresh)]
        assert near(row, picture(again, eps, t)) and near(row[0], levels[0, 0])

    order = torch.randperm(6, generator=nvae.generator("cpu", args.seed, 0, 5))[:5]
    g, nats, kls, bound, seen, made = nvae.generator("cpu", args.seed, 0, 1), [], [], [], [], []
    for part in held_out[order].split(4):  # --samples at a time
        y = (torch.rand(part.shape, generator=g) * 255 < part).byte() if grey else part // 2 ** (8 - args.bits)
        n, log_w = len(y), []
        with torch.no_grad():
            for k in range(3):  # once for (1), twice for the bound
                eps = [torch.randn(n, *shape, generator=g) for shape in net.shapes]
                s, zs, moments = nvae.top_down(net.groups, net.h, net.encode(y), eps)
                law = net.law(s)
                p = [Normal(mu + d_mu, sigma * d_sigma) for mu, sigma, d_mu, d_sigma in moments]
                q = [Normal(mu, sigma) for mu, sigma, _, _ in moments]
                ratios = [(a.log_prob(a.mean + a.stddev * e) - b.log_prob(z)).sum((1, 2, 3)) for a, b, e, z in zip(p, q, eps, zs)]
                if k == 0:
                    nats.append(-law.log_prob(y))
                    kls.append(torch.stack(ratios if args.flows else [kl_divergence(a, b).sum((1, 2, 3)) for a, b in zip(p, q)]))
                    seen.append((y * (255 / (2**net.bits - 1))).round())
                    made.append(((law.mean() + 1) * 127.5).round().clamp(0, 255))
                else:
                    log_w.append(law.log_prob(y) - sum(ratios))
        bound.append(-(torch.stack(log_w).double().logsumexp(0) - math.log(2)))
    nats, kls, bound, seen, made = (torch.cat(parts, -1 if parts is kls else 0) for parts in (nats, kls, bound, seen, made))
    want = dict(reconstruction_nats=nats.mean(), elbo_nats=(nats + kls.sum(0)).mean(), importance_nats=bound.mean(),
                reconstruction_rmse=(seen - made).square().mean().sqrt())
    for name, value in want.items():
        assert metrics[name] == pytest.approx(value.item(), rel=2e-3), name
    assert metrics["kl_by_group"] == pytest.approx(kls.mean(1).tolist(), rel=2e-3)
    for name in ("elbo", "importance"):
        assert metrics[f"{name}_bits_per_dim"] == pytest.approx(metrics[f"{name}_nats"] / x[0].numel() / math.log(2))
    assert near(torch.cat([*tiles(out / "reconstructions.png")]), torch.cat([seen, made]))
    judged = plain_judge(samples.to(torch.uint8), train, held_out, args.seed)
    for name in ("frechet", "precision", "recall", "sharpness", "frechet_floor", "recall_floor", "sharpness_floor"):
        assert metrics[name] == pytest.approx(judged[name], rel=0.02), name
    known = dict(step=12, images_seen=84, seed=args.seed, samples=14, temperature=t, importance_samples=2, test_images=5)
    assert {name: metrics[name] for name in known} == known
    assert metrics["images_per_second"] == pytest.approx(84 / metrics["train_seconds"])


def test_channels_are_last_on_a_cpu_and_first_on_a_gpu():
    for flags, last in ([], True), (["--gpu"], False):
        net = nvae.build(nvae.parse_args(["--width=8", "--groups=1", "--min-groups=1", *flags]), 3, 8, torch.device("cpu"))
        spatial = [p for p in net.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
        assert spatial and all(p.is_contiguous(memory_format=torch.channels_last) == last for p in spatial)


SAME = ("weights", "pictures", "numbers")
BASES = {}  # each made once


@pytest.mark.parametrize("base, flag, changed", [
    ("", "--temperature 0.5", ["pictures"]), ("", "--sample-seed 1", ["pictures"]), ("", "--bn-batches 0", ["pictures"]), ("", "--draw-pixels", ["pictures"]),
    ("", "--test-images 1", ["numbers"]), ("", "--importance 9", ["numbers"]), ("", "--save-every 1", []), ("", "--fp32", []),
    ("", "--forget", []), ("", "--ema 0.05", ["pictures", "numbers"]),
    *[("", flag, SAME) for flag in (
        "--seed 1", "--batch-size 8", "--bits 4", "--mixtures 3", "--width 12", "--scales 1", "--groups 3",
        "--latent 3", "--cells 2", "--expand 3", "--patch 2", "--stem-cells 2", "--factor 0.3", "--floor -1", "--first-floor 0",
        "--kl-warmup 0.9", "--penalty 0.3", "--penalty-every 1", "--flip", "--flows 1", "--lr 0.02", "--warmup 0.9", "--steps 4")],
    ("--patch 1", "--stem 1", SAME), ("--scales 3", "--min-groups 2", SAME)])
def test_every_flag_matters_where_it_should(pictures, base, flag, changed):
    """Beside the same run without it; `weights` are those that train."""
    def results(more):
        state, metrics = main(f"--steps 3 --lr 0.05 --warmup 0.1 {more}", "run")
        weights = [v.tolist() for name, v in state["model"].items() if "num_batches" not in name]
        return dict(weights=weights, numbers=metrics["importance_nats"], pictures=Path("run/samples.png").read_bytes())

    other = results(f"{base} {flag}")
    if base not in BASES:
        Path("run").rename("other")
        BASES[base] = results(base)
    assert {name for name in SAME if BASES[base][name] != other[name]} == set(changed)


def test_compile_reaches_training_and_drawing(pictures, monkeypatch):
    """The same weights, averages and pictures, though cells are computed twice; by a backend that needs no C++."""
    real, called = torch.compile, []

    def spy(f, **how):
        compiled = real(f, backend="aot_eager", **how)

        def call(*args, **more):
            called.append(f.__name__)
            return compiled(*args, **more)
        return call
    monkeypatch.setattr(torch, "compile", spy)
    flags = "--steps 2 --scales 1 --groups 1 --forget --flows 1"
    plain, _ = main(flags, "plain")
    assert not called
    compiled, _ = main(f"{flags} --compile", "compiled")
    assert set(called) == {"_call_impl", "generate"}
    for name, value in plain["model"].items():
        if "num_batches" not in name:
            torch.testing.assert_close(compiled["model"][name], value, rtol=1e-3, atol=1e-4, msg=name)
    for name in ("samples", "coarse_to_fine", "temperatures"):
        assert near(tiles(f"plain/{name}.png"), tiles(f"compiled/{name}.png")), name
    called.clear()
    assert nvae.main(["--sample-only", "4", "--samples", "4", "--out", "plain", "--compile", "--bn-batches", "3"]) == 0
    assert set(called) == {"generate"} and near(tiles("plain/samples_only.png"), tiles("plain/samples.png"))


def test_layers_are_listed_once(pictures, monkeypatch):
    """The network is not walked at each step."""
    walks, real = [], nvae.NVAE.modules
    monkeypatch.setattr(nvae.NVAE, "modules", lambda net: walks.append(1) or real(net))
    main("--steps 2", "few")
    few = len(walks)
    main("--steps 6", "more")
    assert len(walks) == 2 * few > 0


def test_a_rate_of_zero_learns_nothing(pictures):
    before = nvae.build(nvae.parse_args(TINY.split()), 3, 9, torch.device("cpu"))
    still, _ = main("--steps 3 --lr 0", "still")
    for name, p in before.named_parameters():
        assert torch.equal(still["model"][name], p) and torch.allclose(still["ema"][name], p)
    assert not torch.equal(still["model"]["post.0.branch.0.running_mean"], before.post[0].branch[0].running_mean)


@pytest.mark.parametrize("argv, word", [
    ("--ema 1", "--ema"), ("--warmup 1.5", "--warmup"), ("--kl-warmup 2", "--kl-warmup"), ("--bits 9", "--bits"),
    ("--width 30", "--width"), ("--patch 4 --stem 1", "--stem"), ("--size 8 --batch-size 1", "two numbers of a channel")])
def test_flags_that_do_not_go_together_are_refused(capsys, argv, word):
    assert nvae.main(argv.split()) == 2
    assert word in capsys.readouterr().err and not Path("out").exists()


def test_pictures_that_are_no_squares_are_refused(capsys):
    np.save("a.npy", np.zeros((9, 8, 10, 3), np.uint8))
    assert nvae.main(["--data", "a.npy"]) == 2 and "squares" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--bits", "--mixtures", "--floor", "--first-floor"])
def test_flags_of_colours_are_refused_beside_grey_pictures(capsys, flag):
    np.save("grey.npy", np.zeros((40, 8, 8), np.uint8))
    assert nvae.main(["--data", "grey.npy", flag, "3"]) == 2 and f"{flag}: of colours" in capsys.readouterr().err


def test_learning_rate_and_floor_written_out():
    args = nvae.parse_args("--lr 3 --warmup 0.5 --steps 8 --floor -5 --first-floor -1".split())
    want = [3 * (k + 1) / 5 for k in range(4)] + [1e-4 + 2.9999 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert [nvae.learning_rate(k, args) for k in range(8)] == pytest.approx(want)
    assert [nvae.lowest_scale(k, args) for k in range(8)] == pytest.approx([-1 - 4 * min(1, k / 4.8) for k in range(8)])
    assert nvae.learning_rate(3, nvae.parse_args(["--lr", "0"])) == 0


def test_paper_is_the_papers():
    """Vahdat & Kautz 2020, the CIFAR-10 column, with its flow."""
    args = nvae.parse_args(["--paper", "--gpu"])
    want = dict(data="cifar10", bits=8, mixtures=10, width=128, scales=1, groups=30, latent=20, cells=2, expand=6, stem=1,
                stem_cells=2, patch=1, factor=0.1, floor=-7.0, first_floor=-7.0, kl_warmup=0.3, penalty=0.01, penalty_every=1,
                lr=0.01, batch_size=256, flip=True, ema=0.0, flows=1, steps=400 * 50_000 // 256, warmup=5 / 400, importance=1000)
    assert {name: getattr(args, name) for name in want} == want


def test_sample_only_is_of_the_average_and_of_its_flags(pictures):
    state, _ = main("--steps 6 --lr 0.02 --ema 0.8")
    for more in ("--temperature 0.6 --bn-batches 2", "--bn-batches 0"):
        argv = ["--sample-only", "5", "--samples", "3", "--out", "out/nvae", *more.split()]
        assert nvae.main(argv) == 0
        net, args = network(more, state["ema"])
        net = anew(net, args, args.temperature)
        want = torch.cat([drawn(net, args, args.temperature, first, count) for first, count in ((0, 3), (3, 2))])
        sheet = tiles("out/nvae/samples_only.png")
        assert sheet.shape[:2] == (2, 3) and near(sheet.flatten(0, 1)[:5], want)


def test_vectors_of_the_power_iteration_and_averages_are_in_the_checkpoint(pictures):
    """Resume is bit-exact by test_habits; here, that what is not a weight is what it goes on from."""
    main("--steps 3", "a")
    state, _ = main("--steps 3", "b")
    for name in [name for name in state["model"] if name.endswith((".u", "running_mean", "floor"))]:
        state["model"][name] = state["model"][name] + 0.5
    torch.save(state, "b/ckpt.pt")
    for out in "ab":
        assert nvae.main(["--resume", "--out", out, "--steps", "5", "--save-every", "99", "--judge", "0", "--samples", "4",
                          "--test-images", "2", "--importance", "2"]) == 0
    a, b = (torch.load(f"{out}/ckpt.pt", weights_only=True)["model"] for out in "ab")
    assert not torch.equal(a["stem.0.u"], b["stem.0.u"]) and torch.equal(a["floor"], b["floor"])
    assert not torch.equal(a["post.0.branch.0.running_mean"], b["post.0.branch.0.running_mean"])


def test_the_law_is_float32_under_bfloat16():
    net = tiny()
    y = y_of(net, 2)
    with torch.autocast("cpu", torch.bfloat16):
        law, kls = net(y, noise(net, 2))
        _, _, moments = nvae.top_down(net.groups, net.h, net.encode(y), noise(net, 2))
        value = nvae.loss(law.log_prob(y), kls, torch.ones(4))
    assert law.mu.dtype == torch.float32 == value.dtype and all(m.dtype == torch.float32 for row in moments for m in row)
    assert value.isfinite().all() and nvae.spectral_norms([net.stem[0]], 1).dtype == torch.float32


def test_learns():
    """A tiny seeded run on flat pictures: their one number is found, and the loss falls far below the start."""
    torch.set_num_threads(1)
    levels = np.random.default_rng(0).integers(0, 256, (64, 1, 1, 1), dtype=np.uint8)
    np.save("a.npy", np.broadcast_to(levels, (64, 8, 8, 3)))
    _, metrics = main("--batch-size 16 --steps 120 --lr 2e-2 --ema 0.9")
    assert metrics["elbo_bits_per_dim"] < 2.5 and metrics["reconstruction_rmse"] < 30 and metrics["kl_by_group"][0] > 0.5


# ---- the experiments ----

def test_experiments_run_for_two_steps(pictures, capsys):
    short = ["--data", "a.npy", *TINY.split(), "--steps", "2", "--judge", "8"]
    others = [arm for arm in nvae_arms.ARMS if arm != "nvae"]
    table = nvae_arms.main([*short, "--arms", "nvae", "--seeds", "3", "4"])
    table |= nvae_arms.main([*short, "--arms", *others, "--keep", "kept", "--seeds", "3"])
    assert len({row["importance_nats"] for row in table.values()}) == 6 and Path("kept/one_level.3/samples.png").exists()
    runs = [main(f"--steps 2 --judge 8 --seed {seed}", seed)[1] for seed in (3, 4)]
    for name in ("importance_nats", "frechet"):
        assert table["nvae"][name] == pytest.approx((runs[0][name] + runs[1][name]) / 2)
    assert nvae.NVAE is not nvae_arms.Plain and nvae.Group is not nvae_arms.Absolute
    assert "| one level | " in capsys.readouterr().out and len(table["plain"]) == 10
    assert table["absolute"]["parameters"] == table["nvae"]["parameters"] != table["plain"]["parameters"]
    table = nvae_batchnorm.main(["--out", "3", "--judge", "8", "--samples", "4", "--temperatures", "0.5", "1", "--bn-batches", "3", "--to", "bn.png"])
    assert list(table) == [(0.5, 0), (0.5, 3), (1.0, 0), (1.0, 3)]
    assert table[1.0, 3]["frechet"] == runs[0]["frechet"] and len({row["frechet"] for row in table.values()}) == 4
    assert tiles("bn.png").shape[:2] == (4, 8)


def test_the_absolute_posterior_is_what_its_head_says():
    group = nvae_arms.Absolute([], 8, 3, first=False)
    s, f = draws(2, 2, 8, 4, 4).float().unbind()
    _, mu, sigma = group.q(s)
    mean, deviation = nvae.relative(mu, sigma, *group.p(s, f))
    d_mu, d_sigma = nvae.Group.p(group, s, f)
    torch.testing.assert_close(mean, d_mu)
    torch.testing.assert_close(deviation, d_sigma + 0.01)
