"""bigan_qp.py against posts 6214 and 6163: the QP divergence solved exactly on finite spaces, in float64; then its wiring.

What it shares with the other scripts is in test_habits.py (running) and test_blocks.py (pictures, judge, order).
"""

import itertools
import json
import math
import sys
from pathlib import Path

import bigan_qp as bq
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from test_blocks import plain_judge, read_png

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import bigan_qp_arms  # noqa: E402

SEEDS = st.integers(0, 2**31)


# ---- finite spaces: p and q have whole counts, so a batch of all pairs is the expectation itself ----

class World:
    """Points 0, ..., n-1 with distances d (n, n), 0 on the diagonal alone; p and q from counts."""

    def __init__(self, many, few, d, lam):
        self.p, self.q = (np.array(c) / sum(c) for c in (many, few))
        self.d, self.lam, self.n = np.array(d, dtype=float), lam, len(many)
        self.a = np.outer(self.p, self.q)  # (n, n): real i with fake j
        points = [[k for k, c in enumerate(counts) for _ in range(c)] for counts in (many, few)]
        self.real, self.fake = torch.tensor(list(itertools.product(*points))).T  # every pair, as often as it comes

    def value(self, T, scale=1.0):
        """Of 6163 (12) by the script, at scores T (n,) of single points or (n, n) of pairs."""
        return -bq.qp_critic_loss(*self.scores(T), self.lengths(), self.lam).mean().item() * scale

    def scores(self, T):
        T = torch.as_tensor(T)
        return (T[self.real], T[self.fake]) if T.ndim == 1 else (T[self.real, self.fake], T[self.fake, self.real])

    def lengths(self):
        return torch.tensor(self.d)[self.real, self.fake].clamp(min=1e-3)

    def best_pairs(self):
        """T (n, n) that maximises (12), by setting the gradient of the written-out sum to zero for each unordered pair."""
        T = np.zeros((self.n, self.n))
        for i, j in itertools.combinations(range(self.n), 2):
            slope, bend = self.a[i, j] - self.a[j, i], (self.a[i, j] + self.a[j, i]) / (self.lam * self.d[i, j])
            T[i, j] = slope / bend if bend else 0.0  # T[j, i] stays 0: only the difference counts
        return T

    def best_points(self):
        """T (n,) that maximises (12) with T(x_r) - T(x_f): (p - q) T - T L T / 2 with a Laplacian L."""
        L = np.zeros((self.n, self.n))
        for i, j in itertools.combinations(range(self.n), 2):
            w = (self.a[i, j] + self.a[j, i]) / (self.lam * self.d[i, j])
            L[[i, j], [i, j]] += w
            L[[i, j], [j, i]] -= w
        return np.linalg.pinv(L) @ (self.p - self.q), L


@st.composite
def worlds(draw, least=2):
    n = draw(st.integers(least, 5))
    counts = st.lists(st.integers(0, 4), min_size=n, max_size=n).filter(any)
    many, few = draw(counts), draw(counts)
    d = np.zeros((n, n))
    for i, j in itertools.combinations(range(n), 2):
        d[i, j] = d[j, i] = draw(st.floats(0.05, 4))
    return World(many, few, d, draw(st.floats(0.1, 20)))


@given(worlds())
def test_6163_12_18_the_divergence_of_pairs_in_closed_form(world):
    """The largest value is lambda/4 sum d (a_ij - a_ji)^2 / (a_ij + a_ji); G's loss there is twice that, which is (18)."""
    T, closed, eighteen = world.best_pairs(), 0.0, 0.0
    for i, j in itertools.product(range(world.n), repeat=2):
        a, b = world.a[i, j], world.a[j, i]
        if a + b:
            closed += world.lam / 4 * world.d[i, j] * (a - b) ** 2 / (a + b)
            eighteen += world.lam * a * (a - b) / (a + b) * world.d[i, j]
    assert world.value(T) == pytest.approx(closed, abs=1e-12, rel=1e-9)
    for seed in range(3):  # and no other T is above
        assert world.value(T + np.random.default_rng(seed).normal(size=T.shape)) <= closed + 1e-9
    real, fake = world.scores(T)
    assert (real - fake).mean().item() == pytest.approx(eighteen, abs=1e-12, rel=1e-9)
    assert eighteen == pytest.approx(2 * closed, abs=1e-12, rel=1e-9)


@given(worlds())
def test_6163_12_the_divergence_of_points_is_an_effective_resistance(world):
    """What is trained: at T = L^+ (p - q) the loss is minus half of (p - q) L^+ (p - q), its least."""
    T, L = world.best_points()
    b = world.p - world.q
    best = 0.5 * b @ np.linalg.pinv(L) @ b
    assert world.value(T) == pytest.approx(best, abs=1e-10, rel=1e-8)
    for seed in range(3):
        assert world.value(T + np.random.default_rng(seed).normal(size=T.shape)) <= best + 1e-9
    torch.testing.assert_close(slope_at(world, T), torch.zeros(world.n, dtype=torch.float64), atol=1e-8, rtol=0)


def slope_at(world, T):
    """The gradient of the script's loss in the scores."""
    T = torch.tensor(T, requires_grad=True)
    loss = bq.qp_critic_loss(*world.scores(T), world.lengths(), world.lam).mean()
    return torch.autograd.grad(loss, T)[0]


@given(worlds())
def test_6163_12_both_are_divergences(world):
    """Not below 0, 0 just for p = q, the same with p and q exchanged, linear in lambda and in d; V_1 <= V_2 <= lambda E d / 2."""
    def both(w):
        return w.value(w.best_points()[0]), w.value(w.best_pairs())

    def like(**changes):
        w = object.__new__(World)
        w.__dict__ = world.__dict__ | changes
        return w
    one, two = both(world)
    assert -1e-9 <= one <= two + 1e-9
    assert two <= world.lam / 2 * (world.a * world.d).sum() + 1e-9
    same = np.allclose(world.p, world.q)
    assert (one < 1e-9) == same and (two < 1e-9) == same
    exchanged = both(like(p=world.q, q=world.p, a=world.a.T, real=world.fake, fake=world.real))
    assert exchanged == pytest.approx((one, two), abs=1e-9, rel=1e-7)
    assert both(like(lam=3 * world.lam)) == pytest.approx((3 * one, 3 * two), abs=1e-9, rel=1e-7)
    assert both(like(d=3 * world.d)) == pytest.approx((3 * one, 3 * two), abs=1e-9, rel=1e-7)
    shared = (world.a * world.a.T > 0).sum() - (world.a.diagonal() > 0).sum()  # pairs of different atoms of both
    assert (abs(two - world.lam / 2 * (world.a * world.d).sum()) < 1e-9) == (shared == 0)


@given(st.floats(0.01, 10), st.floats(0.1, 20))
def test_6163_5_14_two_points(d, lam):
    """QP: lambda d / 2, however far apart. SGAN, (5): log 2, however far apart, so its slope in d is 0."""
    world = World([1, 0], [0, 1], [[0, d], [d, 0]], lam)
    assert world.value(world.best_points()[0]) == pytest.approx(lam * d / 2, rel=1e-9)
    assert world.value(world.best_pairs()) == pytest.approx(lam * d / 2, rel=1e-9)
    real, fake = torch.tensor(40.0, dtype=torch.float64), torch.tensor(-40.0, dtype=torch.float64)
    sgan = 0.5 * torch.nn.functional.logsigmoid(real) + 0.5 * torch.nn.functional.logsigmoid(-fake) + math.log(2)
    assert sgan.item() == pytest.approx(math.log(2), abs=1e-15)


@given(worlds())
def test_6163_16_17_the_best_critic_of_pairs(world):
    """The script's loss has its least at (16), and there |Delta T| <= lambda d."""
    ratio = np.zeros((world.n, world.n))
    for i, j in itertools.product(range(world.n), repeat=2):
        a, b = world.p[i] * world.q[j], world.p[j] * world.q[i]
        ratio[i, j] = (a - b) / (a + b) if a + b else 0
    T = ratio * world.lam * world.d / 2  # antisymmetric: T_ij - T_ji is (16)
    slope = slope_at(world, T)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-9, rtol=0)
    assert abs(ratio).max() <= 1


def test_6163_17_is_not_true_of_a_critic_of_points():
    """Stored, four points on a line: the best |Delta T| is 5.2 lambda d between two of them; E[Delta T^2 / (lambda d)] =
    E[Delta T] is what is left of (17)."""
    at = np.array([4.5, 0.5, 0.25, 1.5])
    world = World([3, 0, 1, 4], [4, 1, 0, 3], abs(at[:, None] - at), 10.0)
    T, _ = world.best_points()
    real, fake = world.scores(T)
    apart = world.real != world.fake
    ratio = (real - fake)[apart] / (world.lam * world.lengths()[apart])
    assert ratio.abs().max().item() == pytest.approx(5.238, abs=1e-3)
    delta = real - fake
    assert (delta.square() / (world.lam * world.lengths())).mean().item() == pytest.approx(delta.mean().item(), rel=1e-9)


@given(worlds(), SEEDS, st.floats(0.1, 9), st.floats(-5, 5))
def test_half_rule_and_bound(world, seed, scale, shift):
    """m = 2 pi at the best T; m^2 / (4 pi) is below V_1 for any T, the same for every multiple and shift of it."""
    assume(not np.allclose(world.p, world.q))
    best, _ = world.best_points()
    bound, ratio = bq.divergence_bound(*world.scores(best), world.lengths(), world.lam)
    assert ratio.item() == pytest.approx(1, rel=1e-6)
    assert bound.item() == pytest.approx(world.value(best), rel=1e-6)
    T = best + np.random.default_rng(seed).normal(size=world.n)
    below, ratio = bq.divergence_bound(*world.scores(T), world.lengths(), world.lam)
    assert below <= bound + 1e-9
    moved, other = bq.divergence_bound(*world.scores(scale * T + shift), world.lengths(), world.lam)
    assert moved.item() == pytest.approx(below.item(), rel=1e-6, abs=1e-9)
    assert other.item() * scale == pytest.approx(ratio.item(), rel=1e-6, abs=1e-9)  # m grows as c, pi as c^2
    assert world.value(ratio.item() * T) == pytest.approx(below.item(), rel=1e-6, abs=1e-9)  # the best multiple


@given(SEEDS, st.floats(-100, 100))
def test_6214_1_2_the_loss_per_sample(seed, shift):
    """By plain numbers; a shift of T changes nothing; exchanged, Delta T changes its sign; nothing of other samples enters."""
    g = torch.Generator().manual_seed(seed)
    real, fake = torch.randn(2, 5, generator=g, dtype=torch.float64) * 4
    d, lam = torch.rand(5, generator=g, dtype=torch.float64) + 0.1, 7.0
    got = bq.qp_critic_loss(real, fake, d, lam)
    want = [-(r - f) + (r - f) ** 2 / (2 * lam * e) for r, f, e in zip(real.tolist(), fake.tolist(), d.tolist())]
    assert got.tolist() == pytest.approx(want, rel=1e-9)
    torch.testing.assert_close(bq.qp_critic_loss(real + shift, fake + shift, d, lam), got, rtol=1e-9, atol=1e-9)
    exchanged = bq.qp_critic_loss(fake, real, d, lam)
    torch.testing.assert_close(exchanged - got, 2 * (real - fake))
    torch.testing.assert_close(exchanged + got, (real - fake) ** 2 / (lam * d))


def test_6214_2_distance_by_plain_loops():
    """Mean over pixels plus mean over coordinates, of each sample by itself: permuted fakes are other pairs."""
    g = torch.Generator().manual_seed(0)
    x, x_f = torch.rand(2, 3, 2, 4, 5, generator=g) * 2 - 1
    z_r, z = torch.randn(2, 3, 6, generator=g)
    d = bq.distance(x, z_r, x_f, z)
    for k in range(3):
        pixels = sum(abs(a - b) for a, b in zip(x[k].flatten().tolist(), x_f[k].flatten().tolist())) / 40
        code = sum(abs(a - b) for a, b in zip(z_r[k].tolist(), z[k].tolist())) / 6
        assert d[k].item() == pytest.approx(pixels + code, rel=1e-5)
    turn = [1, 2, 0]
    assert not torch.allclose(bq.distance(x, z_r, x_f[turn], z[turn]).sort()[0], d.sort()[0])
    torch.testing.assert_close(bq.distance(*(torch.cat([v, v]) for v in (x, z_r, x_f, z))), torch.cat([d, d]))


def test_6214_2_the_z_part_of_d_keeps_it_from_zero():
    """E|a - b| = 2 / sqrt(pi) for independent N(0, 1): the floor is far away while E(x) looks like z."""
    a, b = torch.randn(2, 100_000, 1, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(100_000, 1, 1, 1)
    assert bq.distance(zero, a, zero, b).mean().item() == pytest.approx(2 / math.sqrt(math.pi), abs=0.01)


@given(SEEDS)
def test_6214_2_floor(seed):
    """Pairs that are the same to the bit: finite loss and gradient. Distances above the floor stay as they are."""
    g = torch.Generator().manual_seed(seed)
    x, z = torch.rand(4, 1, 3, 3, generator=g), torch.randn(4, 2, generator=g)
    d = bq.distance(x, z, x, z)
    assert (d == 1e-3).all() and 1e-3 < 2 / 255 / 4
    score = torch.randn(4, generator=g, requires_grad=True)
    loss = bq.qp_critic_loss(score, score.detach() + 0.1, d, 10.0)
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), score)[0].isfinite().all()
    close = x + 0.002
    torch.testing.assert_close(bq.distance(close, z, x, z), (close - x).abs().mean((1, 2, 3)))


@given(st.integers(1, 4), SEEDS)
def test_6163_15_two_points_pull_the_generator_to_the_data(dim, seed):
    """A linear critic, at its best: G's gradient at its point is -lambda d (a - b) / |a - b|^2. SGAN's best gives none."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 1, dim, 1, 1, generator=g, dtype=torch.float64)
    gap = (a - b).flatten()
    assume(gap.norm() > 0.1)
    z, lam = torch.zeros(1, 1, dtype=torch.float64), 10.0
    d = bq.distance(a, z, b, z)
    w = torch.zeros(dim, dtype=torch.float64, requires_grad=True)
    for _ in range(3):  # Newton in the one direction that counts
        loss = bq.qp_critic_loss((w * a.flatten()).sum()[None], (w * b.flatten()).sum()[None], d, lam).sum()
        slope = torch.autograd.grad(loss, w)[0]
        w = (w - slope * lam * d / gap.square().sum()).detach().requires_grad_()
    torch.testing.assert_close(w.detach(), lam * d * gap / gap.square().sum())

    class G(torch.nn.Module):
        def forward(self, z):
            return point
    point = b.clone().requires_grad_()
    critic, encoder = (lambda x, z: (w.detach() * x.flatten(1)).sum(1)), (lambda x: z.expand(len(x), 1))
    loss, _, _ = bq.bigan_loss(critic, G(), encoder, a, z, 0.0, 0.0)
    pull = -torch.autograd.grad(loss.sum(), point)[0].flatten()
    torch.testing.assert_close(pull, w.detach())
    assert torch.dot(pull, gap) > 0 and pull.norm() * gap.norm() == pytest.approx(lam * d.item())
    sgan = torch.nn.functional.logsigmoid(-40 * (w.detach() / w.detach().norm() * (point - (a + b) / 2).flatten()).sum()
                                          / gap.norm() * 2)
    far = torch.autograd.grad(sgan, point)[0]
    assert far.norm() * gap.norm() < 1e-12


# ---- 6214 (3), (4): who is trained by what ----

class Nets(torch.nn.Module):
    """Small T, G, E in float64, with BatchNorm in none of them, so that every number can be followed."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.T = bq.PairCritic((1, 4, 4), 3, 2, 5, 7, 4).double()
        self.G = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Unflatten(1, (1, 4, 4))).double()
        self.E = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).double()
        self.x = torch.rand(6, 1, 4, 4, dtype=torch.float64) * 2 - 1
        self.z = torch.randn(6, 3, dtype=torch.float64)

    def loss(self, beta1, beta2, ng=True, T=None):
        return bq.bigan_loss(T or self.T, self.G, self.E, self.x, self.z, beta1, beta2, ng)

    def gradients(self, value):
        """Length of the gradient in T, G, E; None where the value does not depend on them."""
        lengths = {}
        for name in "TGE":
            grads = torch.autograd.grad(value.sum(), list(getattr(self, name).parameters()), retain_graph=True,
                                        allow_unused=True)
            known = [g.square().sum().item() for g in grads if g is not None]
            lengths[name] = sum(known) if known else None
        return lengths


def nothing(x, z):
    return torch.zeros(len(x), dtype=torch.float64)


def test_6214_4_each_guide_trains_one_net():
    """beta1: E alone, G exactly nothing; beta2: G alone; Delta T both."""
    nets = Nets()
    code, picture, both = (nets.gradients(nets.loss(*betas, T=T)[0]) for betas, T in (
        ((1.0, 0.0), nothing), ((0.0, 1.0), nothing), ((0.0, 0.0), None)))
    assert code["G"] in (None, 0) and code["E"] > 1e-6
    assert picture["E"] in (None, 0) and picture["G"] > 1e-6
    assert both["G"] > 1e-12 and both["E"] > 1e-12


def test_6214_3_each_guide_trains_both_nets():
    nets = Nets()
    for betas in ((1.0, 0.0), (0.0, 1.0)):
        grads = nets.gradients(nets.loss(*betas, ng=False, T=nothing)[0])
        assert grads["G"] > 1e-6 and grads["E"] > 1e-6


@given(SEEDS, st.floats(0, 9), st.floats(0, 9))
@example(0, 2.0, 3.0)
def test_6214_2_3_4_values_by_plain_sums(seed, beta1, beta2):
    """(3) and (4) have one value, written out here; without betas it is Delta T of (2); the gradients differ."""
    nets = Nets(seed)
    three, four = nets.loss(beta1, beta2, ng=False), nets.loss(beta1, beta2)
    with torch.no_grad():
        for k in range(6):
            x, z = nets.x[k:k + 1], nets.z[k:k + 1]
            fake, code = nets.G(z), nets.E(x)
            T = {name: nets.T(*pair)[0].item() for name, pair in (("real", (x, code)), ("fake", (fake, z)))}
            guide1 = sum((a - b) ** 2 for a, b in zip(z[0].tolist(), nets.E(fake)[0].tolist())) / 3
            guide2 = sum((a - b) ** 2 for a, b in zip(x.flatten().tolist(), nets.G(code).flatten().tolist())) / 16
            want = T["real"] - T["fake"] + beta1 * guide1 + beta2 * guide2
            for loss, first, second in (three, four):
                assert loss[k].item() == pytest.approx(want, rel=1e-8, abs=1e-9)
                assert first[k].item() == pytest.approx(guide1, rel=1e-9)
                assert second[k].item() == pytest.approx(guide2, rel=1e-9)
    if beta1 > 0.1:
        assert nets.gradients(three[0])["G"] != pytest.approx(nets.gradients(four[0])["G"], rel=1e-6)


@given(st.permutations(range(4)), st.permutations(range(4)))
@example([0, 1, 2, 3], [1, 2, 3, 0])
def test_6214_2_joints_agree_just_if_encoder_and_generator_are_inverse(G, E):
    """x and z uniform over four points, G and E tables: the divergence of (x, E(x)) and (G(z), z) is 0 iff E = G^-1."""
    points = list(itertools.product(range(4), repeat=2))
    real = [sum((x, E[x]) == point for x in range(4)) for point in points]
    fake = [sum((G[z], z) == point for z in range(4)) for point in points]
    d = [[float(a != c) + float(b != e) for c, e in points] for a, b in points]
    world = World(real, fake, d, 10.0)
    value = world.value(world.best_points()[0])
    assert (value < 1e-9) == all(E[G[z]] == z for z in range(4))


@pytest.mark.parametrize("betas", [(0.0, 0.0), (2.0, 3.0)])
def test_6214_2_4_linear_players_of_a_gaussian_become_inverse(betas):
    """x ~ N(0, S), G(z) = A z, E(x) = B x: the pairs have one law iff A A^T = S and B = A^-1. The game finds that, with the
    guides of (4) and, as there are not many maps to choose from, without: (2)."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    half = torch.tensor([[1.2, 0.0], [0.7, 0.5]])
    G = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Unflatten(1, (2, 1, 1)))
    E = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2, bias=False))

    class Critic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.LeakyReLU(0.2), torch.nn.Linear(64, 64),
                                           torch.nn.LeakyReLU(0.2), torch.nn.Linear(64, 1))

        def forward(self, x, z):
            return self.mlp(torch.cat([x.flatten(1), z], 1))[:, 0]
    T, A, B = Critic(), 0, 0
    players = list(T.parameters()), [*G.parameters(), *E.parameters()]
    opt_T, opt = (torch.optim.Adam(p, lr, betas=(0.5, 0.999)) for p, lr in zip(players, (4e-3, 2e-3)))
    for _ in range(1500):
        (x, z), (other_x, other_z) = ((torch.randn(64, 2).mm(half.T)[..., None, None], torch.randn(64, 2)) for _ in range(2))
        z_r, x_f = E(x).detach(), G(z).detach()
        bq.player_step(bq.qp_critic_loss(T(x, z_r), T(x_f, z), bq.distance(x, z_r, x_f, z), 10.0), opt_T, players[0])
        bq.player_step(bq.bigan_loss(T, G, E, other_x, other_z, *betas)[0], opt, players[1])
        A, B = (0.99 * mean + 0.01 * net.weight.detach() for mean, net in ((A, G[0]), (B, E[1])))
    torch.testing.assert_close(B @ A, torch.eye(2), atol=0.1, rtol=0)
    torch.testing.assert_close(A @ A.T, half @ half.T, atol=0.2, rtol=0)


def test_critic_by_hand():
    """Features of x beside z, two hidden layers, one score a pair; in float32 under autocast."""
    torch.manual_seed(1)
    net = bq.PairCritic((3, 8, 8), 4, 4, 6, 9, 4).eval()
    x, z = torch.randn(5, 3, 8, 8), torch.randn(5, 4)
    with torch.no_grad():
        h = torch.cat([net.look(x), z], 1)
        for k in (0, 2):
            h = h @ net.mlp[k].weight.T + net.mlp[k].bias
            h = torch.where(h > 0, h, 0.2 * h)
        want = h @ net.mlp[4].weight.T + net.mlp[4].bias
        torch.testing.assert_close(net(x, z), want[:, 0])
        with torch.autocast("cpu", torch.bfloat16):
            low = net(x, z)
    assert low.dtype == torch.float32 and low.shape == (5,) and not torch.equal(low, want[:, 0])
    assert net.look.head.out_features == 6 and net.mlp[0].out_features == net.mlp[2].out_features == 9


def test_paper_is_the_authors():
    """bigan_qp_128.py: five levels from 64 to 1,024 channels of 5 x 5, 128 numbers, 2 and 3, 10, two steps to one."""
    args = bq.parse_args(["--paper", "--gpu"])
    want = dict(size=128, n_z=128, batch_size=64, lam=10.0, beta1=2.0, beta2=3.0, ng=True, critic_steps=2, width=64, kernel=5,
                features=128, hidden=1024, lr=2e-4, critic_lr=2e-4, momentum=0.5, ema=0.0, steps=1_000_000)
    assert {name: getattr(args, name) for name in want} == want
    with torch.device("meta"):
        nets = bq.build(args, (3, 128, 128), torch.device("meta"))
    for body in (nets["E"].body, nets["T"].look.body):
        convs = [m for m in body if isinstance(m, torch.nn.Conv2d)]
        assert [m.out_channels for m in convs] == [64, 128, 256, 512, 1024] and {m.kernel_size for m in convs} == {(5, 5)}
    assert nets["G"].first == (1024, 4, 4) and nets["E"].head.out_features == 128
    edge = math.sqrt(6 / (256 + 1024))  # Glorot, as Keras starts its layers
    weight = bq.build(args, (3, 16, 16), torch.device("cpu"))["T"].mlp[0].weight
    assert 0.99 * edge < weight.abs().max() <= edge


# ---- wiring: a run beside a naive one ----

TINY = ("--width 4 --n-z 3 --features 5 --hidden 7 --batch-size 6 --samples 4 --judge 0 --test-images 5 --save-every 99")


@pytest.fixture
def pictures():
    """60 pictures of 11 x 11, the last six held out: odd, so that sizes round on the way down; two levels, so BatchNorm in all nets."""
    torch.set_num_threads(1)
    a = np.random.default_rng(0).integers(0, 256, (60, 11, 11, 3), dtype=np.uint8)
    np.save("a.npy", a)
    return torch.tensor(a).permute(0, 3, 1, 2)


def main(flags, out="out/bigan_qp", data="a.npy"):
    """A run, its checkpoint and its metrics."""
    assert bq.main(["--data", data, *TINY.split(), *flags.split(), "--out", str(out)]) == 0
    return torch.load(f"{out}/ckpt.pt", weights_only=True), json.loads(Path(f"{out}/metrics.json").read_text())


def built(flags, shape=(3, 11, 11)):
    args = bq.parse_args([*TINY.split(), *flags.split()])
    return args, bq.build(args, shape, torch.device("cpu"))


class PlainAdam:
    """Adam by the book, with a rate for each step."""

    def __init__(self, net, momentum):
        self.params, self.b, self.k = dict(net.named_parameters()), (momentum, 0.999), 0
        self.m, self.v = ({n: torch.zeros_like(p) for n, p in self.params.items()} for _ in range(2))

    def step(self, loss, lr):
        self.k += 1
        names = list(self.params)
        for name, grad in zip(names, torch.autograd.grad(loss, [self.params[n] for n in names])):
            self.m[name] = self.b[0] * self.m[name] + (1 - self.b[0]) * grad
            self.v[name] = self.b[1] * self.v[name] + (1 - self.b[1]) * grad ** 2
            m, v = self.m[name] / (1 - self.b[0] ** self.k), self.v[name] / (1 - self.b[1] ** self.k)
            self.params[name].data -= lr * m / (v.sqrt() + 1e-8)


@pytest.mark.parametrize("flags", [
    "--critic-steps 2 --ema 0.4 --flip --lam 5 --beta1 1.5 --beta2 4",
    "--critic-steps 1 --ema 0.05 --no-ng --seed 5 --momentum 0.9 --kernel 5"])
def test_five_steps_are_those_of_a_naive_loop(pictures, flags):
    """Order, codes, mirrors, both losses, who is trained, rates, Adam, BatchNorm's moments and the average, all by plain code."""
    state, _ = main(f"{flags} --steps 5 --lr 0.002 --critic-lr 0.003")
    args, nets = built(f"{flags} --lr 0.002 --critic-lr 0.003")
    T, G, E = (nets[name].train() for name in "TGE")
    both = torch.nn.ModuleDict(dict(G=G, E=E))
    ema = {name: v.clone() for name, v in both.state_dict().items()}
    adam_T, adam = PlainAdam(T, args.momentum), PlainAdam(both, args.momentum)
    order = torch.cat([torch.randperm(54, generator=bq.generator("cpu", args.seed, epoch, 9)) for epoch in range(3)])
    used = 0

    def fresh():
        nonlocal used
        g = bq.generator("cpu", args.seed, used)
        z = torch.randn(6, 3, generator=g)
        mirror = torch.rand(6, 1, 1, 1, generator=g).flatten() < 0.5
        rows = order[6 * used:6 * used + 6]
        used += 1
        batch = pictures[:54][rows].float() / 127.5 - 1
        return torch.stack([x.flip(2) if m and args.flip else x for x, m in zip(batch, mirror)]), z

    for step in range(5):
        for _ in range(args.critic_steps):
            x, z = fresh()
            code, fake = E(x).detach(), G(z).detach()
            d = (x - fake).abs().flatten(1).mean(1) + (code - z).abs().mean(1)
            gap = T(x, code) - T(fake, z)
            adam_T.step((gap ** 2 / (2 * args.lam * d) - gap).mean(), 0.003)
        x, z = fresh()
        code, fake = E(x), G(z)
        gap = T(x, code) - T(fake, z)
        guide1 = (z - E(fake.detach() if args.ng else fake)) ** 2
        guide2 = (x - G(code.detach() if args.ng else code)) ** 2
        adam.step(gap.mean() + args.beta1 * guide1.mean() + args.beta2 * guide2.mean(), 0.002)
        decay = min(args.ema, (1 + step) / (10 + step))
        for name, v in both.state_dict().items():
            if v.is_floating_point():
                ema[name] = decay * ema[name] + (1 - decay) * v
    for name, v in nets.state_dict().items():
        torch.testing.assert_close(state["model"][name], v, rtol=1e-3, atol=1e-4, msg=name)
    for name, v in ema.items():
        if v.is_floating_point():
            torch.testing.assert_close(state["ema"][name], v, rtol=1e-3, atol=1e-4, msg=name)
    assert state["step"] == 5 and used == 5 * (args.critic_steps + 1)


def test_a_step_of_one_player_leaves_the_other_alone(pictures):
    """Without a rate of its own T stays as it was while G and E move, and the other way round."""
    _, before = built("")
    for flags, still in (("--critic-lr 0", "T"), ("--lr 0", "GE")):
        state, _ = main(f"--steps 3 {flags}", flags)
        for name, p in before.named_parameters():
            if name.endswith("weight"):  # some biases are idle: Delta T is a difference, BatchNorm subtracts
                assert torch.equal(state["model"][name], p) == (name[0] in still), name


# ---- the report, again from the checkpoint ----

def tiles(path, size=11):
    """The pictures in a grid, (rows, columns, C, size, size), and that all else is white."""
    sheet = read_png(Path(path))[:, ::96 // size, ::96 // size]
    sheet = torch.nn.functional.pad(sheet, (0, 1, 0, 1), value=255)
    sheet = sheet.unfold(1, size + 1, size + 1).unfold(2, size + 1, size + 1)
    assert (sheet[..., size, :] == 255).all() and (sheet[..., size] == 255).all()
    return sheet[..., :size, :size].permute(1, 2, 0, 3, 4).float()


def near(a, b):
    """The same pictures, but for a byte that falls to the other side now and then."""
    return a.shape == b.shape and (a - b).abs().max() <= 1 and (a != b).float().mean() < 0.01


def to_bytes(x):
    return ((x + 1) * 127.5).round().clamp(0, 255)


def labelled(kind):
    """(name of the data, x, y, x_test, y_test): digits-like idx files with labels 0 to 2, or the faces, 300 of them."""
    if kind == "faces":
        x, y = bq.draw_faces(300, 11)
        x = x.permute(0, 3, 1, 2)
        return "faces", x[:270], y[:270], x[270:], y[270:]
    rng = np.random.default_rng(3)
    Path("idx").mkdir(exist_ok=True)
    parts = []
    for stem, count in (("train", 150), ("t10k", 40)):
        y = rng.integers(0, 3, count).astype(np.uint8)
        x = (rng.integers(0, 90, (count, 11, 11)) + 60 * y[:, None, None] * (np.arange(11) < 4)).astype(np.uint8)
        for word, a in (("images-idx3", x), ("labels-idx1", y)):
            head = bytes([0, 0, 8, a.ndim]) + np.array(a.shape, ">u4").tobytes()
            Path(f"idx/{stem}-{word}-ubyte").write_bytes(head + a.tobytes())
        parts += [torch.tensor(x)[:, None], torch.tensor(y)]
    return "idx", *parts


@pytest.mark.parametrize("kind, flags", [("faces", "--lr 0.01"), ("idx", "--seed 3 --sample-seed 4 --lr 0.02 --critic-steps 2"), ("npy", "")])
def test_the_report_again_from_the_checkpoint(pictures, monkeypatch, capsys, kind, flags):
    """Every number and picture: from the average, in eval mode, on the pictures that it should come from."""
    draw_faces = bq.draw_faces
    monkeypatch.setattr(bq, "draw_faces", lambda count, size: draw_faces(300, size))
    data, x, y, x_test, y_test = labelled(kind) if kind != "npy" else ("a.npy", pictures[:54], None, pictures[54:], None)
    monkeypatch.setattr(bq, "draw_faces", lambda count, size: draw_faces(300, size))
    flags += " --size 11" if kind == "faces" else ""
    flags += " --ema 0.9 --judge 14 --test-images 15"
    state, metrics = main(f"{flags} --steps 12 --save-every 10", data=data)
    said = capsys.readouterr().out
    args, nets = built(flags, x.shape[1:])
    fresh = bq.build(args, x.shape[1:], torch.device("cpu"))["E"].eval()
    nets.load_state_dict(state["model"])
    T, E, G = nets["T"].eval(), nets["E"].eval(), nets["G"].eval()
    for name in "GE":
        nets[name].load_state_dict({k[2:]: v for k, v in state["ema"].items() if k[0] == name})
    out = Path("out/bigan_qp")

    g = bq.generator("cpu", args.sample_seed, 0, 2)
    z = torch.randn(64, 3, generator=g)[:15]
    with torch.no_grad():
        samples = to_bytes(G(z))
        assert near(tiles(out / "samples.png").flatten(0, 1), samples[:4])
        preview = tiles(out / "samples_000010.png").flatten(0, 1)
        assert preview.shape == samples[:4].shape and not near(preview, samples[:4])
        back_z = E(samples / 127.5 - 1)
        assert metrics["code_mse"] == pytest.approx((back_z - z).square().mean().item(), rel=1e-2)

        stride = -(-len(x_test) // 15)
        few, few_y = x_test[::stride].float(), None if y is None else y_test[::stride]
        code = E(few / 127.5 - 1)
        again = to_bytes(G(code))
        pairs = tiles(out / "reconstructions.png").flatten(0, 1)
        assert near(pairs[0:2 * len(few):2][:32], few[:32]) and near(pairs[1:2 * len(few):2][:32], again[:32])
        assert metrics["code_std"] == pytest.approx(code.std(0, correction=0).tolist(), rel=1e-3)

        for k, row in enumerate(tiles(out / "interpolation.png")):
            a, b = 2 * k, 2 * k + 1
            assert near(row[0], few[a]) and near(row[9], few[b])
            for j in range(8):
                assert near(row[1 + j], to_bytes(G(((7 - j) * code[a] + j * code[b])[None] / 7))[0])
        known = E(x.float() / 127.5 - 1)
        sheet = tiles(out / "nearest.png")
        assert near(sheet[0], few[:12])
        distance = (code[:12, None] - known[None]).norm(dim=2)
        for j in range(1, len(sheet)):
            assert torch.equal(sheet[j], x[distance.argsort(1)[:, j - 1]].float())

        n = len(few)
        real, fake = T(few / 127.5 - 1, code), T(samples[:n] / 127.5 - 1, z[:n])
        d = (few - samples[:n]).abs().flatten(1).mean(1) / 127.5 + (code - z[:n]).abs().mean(1)
        m, pi = (real - fake).mean(), ((real - fake) ** 2 / (20 * d)).mean()
        assert metrics["divergence_bound"] == pytest.approx((m ** 2 / 4 / pi).item(), rel=2e-2)
        assert metrics["divergence_most"] == pytest.approx(5 * d.mean().item(), rel=1e-3)
        assert metrics["divergence_bound"] <= metrics["divergence_most"]
        assert metrics["critic_scale"] == pytest.approx((m / 2 / pi).item(), rel=2e-2)

    def decibels(other):
        return 10 * math.log10(255 ** 2 / (few - other).double().square().mean().item())
    assert metrics["psnr"] == pytest.approx(decibels(again), abs=0.02)
    flat = x.flatten(1).double()
    mean = flat.mean(0)
    axes = torch.linalg.svd(flat - mean, full_matrices=False)[2]
    assert metrics["psnr_mean"] == pytest.approx(decibels(mean.round().view(x.shape[1:])), abs=0.01)
    low = (few.flatten(1).double() - mean) @ axes[:3].T @ axes[:3] + mean
    assert metrics["psnr_pca"] == pytest.approx(decibels(low.round().clamp(0, 255).view(few.shape)), abs=0.02)

    def steep(v):
        return (v[:, :, 1:] - v[:, :, :-1]).abs().mean() + (v[..., 1:] - v[..., :-1]).abs().mean()
    assert metrics["sharpness_reconstructions"] == pytest.approx((steep(again) / steep(few)).item(), rel=1e-2)

    want = plain_judge(samples[:14].to(torch.uint8), x, x_test, args.seed)
    for name in ("frechet", "precision", "recall", "sharpness", "frechet_floor"):
        assert metrics[name] == pytest.approx(want[name], rel=0.02), name
    assert ("warning: recall" in said) == (metrics["recall"] < 0.1)

    if kind == "npy":
        assert not [name for name in metrics if name.startswith(("probe", "knn", "read"))]
    else:
        with torch.no_grad():
            start = fresh(x.float() / 127.5 - 1), fresh(few / 127.5 - 1)
        pca3, pca50 = ([(v.flatten(1).double() - mean) @ axes[:k].T for v in (x, few)] for k in (3, 50))
        again50 = (again.flatten(1).double() - mean) @ axes[:50].T
        parts = dict(probe_E=(known, code), probe_fresh_E=start, probe_pca=pca3, read_off_pictures=pca50,
                     read_off_reconstructions=(pca50[0], again50))
        for name, (a, b) in parts.items():
            if kind == "faces":
                assert metrics[name] == pytest.approx(plain_r2(a, y, b, few_y), abs=0.05), name
            else:
                assert metrics[name] == bq.linear_probe(a, y, b, few_y), name
    assert (metrics["step"], metrics["seed"], metrics["samples"]) == (12, args.seed, 15)
    assert metrics["images_seen"] == 12 * 6 * (args.critic_steps + 1)
    assert 0 < metrics["train_seconds"] < 60
    assert metrics["images_per_second"] == pytest.approx(metrics["images_seen"] / metrics["train_seconds"])


def plain_r2(a, y, b, y_test):
    """Least squares with a constant, by numpy."""
    a, b = (np.c_[v.double().numpy(), np.ones(len(v))] for v in (a, b))
    said = b @ np.linalg.lstsq(a, y.double().numpy(), rcond=None)[0]
    y_test = y_test.double().numpy()
    return (1 - ((said - y_test) ** 2).sum(0) / ((y_test - y_test.mean(0)) ** 2).sum(0)).tolist()


SAME = ("weights", "pictures", "numbers")


@pytest.mark.parametrize("flag, changed", [
    ("--save-every 1", []), ("--fp32", []), ("--test-images 2", ["numbers"]),
    ("--ema 0.05", ["pictures", "numbers"]), ("--sample-seed 1", ["pictures"]),
    *[(flag, SAME) for flag in (
        "--seed 1", "--batch-size 8", "--n-z 4", "--lam 1", "--beta1 1", "--beta2 1", "--no-ng", "--critic-steps 2",
        "--width 6", "--kernel 5", "--features 6", "--hidden 8", "--flip", "--lr 0.02", "--critic-lr 0.02",
        "--momentum 0.4", "--steps 4")]])
def test_every_flag_matters_where_it_should(pictures, flag, changed):
    """Beside the same run without it; `weights` are those that train."""
    both = []
    for k, more in enumerate(["", flag]):
        state, metrics = main(f"--steps 3 --lr 0.01 --critic-lr 0.01 {more}", k)
        both.append(dict(weights=[v.tolist() for v in state["model"].values()], numbers=metrics["psnr"],
                         pictures=Path(f"{k}/samples.png").read_bytes()))
    assert {name for name in SAME if both[0][name] != both[1][name]} == set(changed)


@pytest.mark.parametrize("argv, word", [("--ema 1", "--ema"), ("--momentum 1", "--momentum"), ("--lam 0", "--lam"),
                                        ("--kernel 6", "--kernel")])
def test_flags_that_do_not_go_together_are_refused(capsys, argv, word):
    assert bq.main(argv.split()) == 2
    assert word in capsys.readouterr().err and not Path("out").exists()


def test_one_held_out_picture_is_enough(pictures, recwarn):
    _, metrics = main("--steps 1 --test-images 1")
    assert metrics["code_std"] == [0, 0, 0] and not [w for w in recwarn if "std" in str(w.message)]


def test_sample_only_is_of_the_average_and_any_count_begins_alike(pictures):
    state, _ = main("--steps 6 --lr 0.01 --ema 0.8")
    assert bq.main(["--sample-only", "70", "--out", "out/bigan_qp"]) == 0
    _, nets = built("")
    nets["G"].load_state_dict({k[2:]: v for k, v in state["ema"].items() if k[0] == "G"})
    g = bq.generator("cpu", 0, 0, 2)
    z = torch.cat([torch.randn(64, 3, generator=g) for _ in range(2)])[:70]
    with torch.no_grad():
        want = to_bytes(nets["G"].eval()(z))
    sheet = tiles("out/bigan_qp/samples_only.png")
    assert sheet.shape[:2] == (8, 9) and near(sheet.flatten(0, 1)[:70], want)


def test_learns():
    """Flat grey pictures, one number each: after a tiny run a code tells its picture, and samples are flat and spread."""
    torch.set_num_threads(1)
    levels = np.random.default_rng(0).integers(40, 216, (400, 1, 1), dtype=np.uint8)
    np.save("a.npy", np.broadcast_to(levels, (400, 8, 8)))
    _, metrics = main("--n-z 1 --width 8 --features 16 --hidden 32 --batch-size 16 --steps 400 --lr 2e-3 --critic-lr 4e-3 "
                      "--test-images 40 --judge 40")
    assert metrics["psnr"] > metrics["psnr_mean"] + 6 and metrics["code_mse"] < 0.5


# ---- the experiments ----

def test_experiments_run_for_two_steps(pictures, capsys):
    short = ["--data", "a.npy", *TINY.split(), "--steps", "2", "--judge", "8"]
    table = bigan_qp_arms.main([*short, "--arms", "(4)", "(2)", "--seeds", "3", "4"])
    runs = [main(f"--steps 2 --judge 8 --seed {seed}", seed)[1] for seed in (3, 4)]
    for name in ("frechet", "psnr", "code_mse", "sharpness_reconstructions"):
        assert table["(4)"][name] == pytest.approx((runs[0][name] + runs[1][name]) / 2)
    assert list(table) == ["(4)", "(2)"] and table["(4)"]["psnr"] != table["(2)"]["psnr"] and table["(4)"]["probe_E"] is None
    assert "| (2) | " in capsys.readouterr().out
    alone = bigan_qp_arms.main([*short, "--arms", "autoencoder", "--lam", "3"])["autoencoder"]
    other = bigan_qp_arms.main([*short, "--arms", "autoencoder", "--beta1", "9"])["autoencoder"]
    assert alone["psnr"] == other["psnr"] != table["(4)"]["psnr"]  # no critic and no guide of codes has a say in it
    for flags in bigan_qp_arms.ARMS.values():
        bigan_qp_arms.bigan_qp.parse_args(flags.split())
