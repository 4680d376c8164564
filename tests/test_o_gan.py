"""o_gan.py: the equations of post 6409 against plain numpy in float64, the game's gradients, the wiring of a run."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import o_gan
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_blocks import plain_judge, read_png

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import o_gan_arms  # noqa: E402

SEEDS = st.integers(0, 2**31)
WIDE = st.integers(3, 20)


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_rho(z, h):
    return np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(z.detach().numpy(), h.detach().numpy())])


# ---- the post's equations ----

@given(WIDE, SEEDS, st.floats(-50, 50), st.floats(0.01, 50))
def test_6409_2_a_code_is_taken_apart_orthogonally(n, seed, shift, scale):
    h = draws(4, n, seed=seed) * scale + shift
    a, s, N = o_gan.avg(h), o_gan.std(h), o_gan.normalize(h)
    plain = h.numpy()
    np.testing.assert_allclose(a, plain.sum(1) / n, atol=1e-9)
    np.testing.assert_allclose(s, [math.sqrt(sum((v - r.mean()) ** 2 for v in r) / n) for r in plain], rtol=1e-9)
    torch.testing.assert_close(a[:, None] + s[:, None] * N, h)
    np.testing.assert_allclose(N.mean(1), 0, atol=1e-9)
    np.testing.assert_allclose((N**2).mean(1), 1, rtol=1e-9)
    np.testing.assert_allclose((h**2).sum(1), n * (a**2 + s**2), rtol=1e-9)  # Pythagoras
    torch.testing.assert_close(o_gan.normalize(N), N)


@given(WIDE, SEEDS, st.floats(-9, 9).filter(lambda a: abs(a) > 0.01), st.floats(-9, 9))
def test_6409_2_N_knows_neither_place_nor_length(n, seed, a, b):
    h = draws(4, n, seed=seed)
    torch.testing.assert_close(o_gan.normalize(a * h + b), math.copysign(1, a) * o_gan.normalize(h))


def test_6409_2_two_numbers_are_too_few():
    """The reason for n_z >= 3: with two, N(z) has two values only."""
    N = o_gan.normalize(draws(50, 2))
    assert {tuple(row) for row in N.round().int().tolist()} == {(1, -1), (-1, 1)}
    torch.testing.assert_close(N.abs(), torch.ones_like(N))


@given(WIDE, SEEDS, st.floats(-9, 9).filter(lambda a: abs(a) > 0.01), st.floats(-9, 9))
def test_6409_5_rho_is_pearsons(n, seed, a, b):
    z, h = draws(2, 5, n, seed=seed)
    got = o_gan.rho(z, h)
    np.testing.assert_allclose(got, plain_rho(z, h), atol=1e-12)
    assert got.abs().max() <= 1 + 1e-12
    torch.testing.assert_close(got, o_gan.rho(h, z))
    torch.testing.assert_close(o_gan.rho(z, a * z + b), torch.full_like(got, math.copysign(1, a)))
    torch.testing.assert_close(o_gan.rho(z, abs(a) * h + b), got)
    cos = torch.nn.functional.cosine_similarity(o_gan.normalize(z), o_gan.normalize(h))
    torch.testing.assert_close(got, cos)


def test_6409_5_is_over_a_codes_coordinates_and_not_over_the_batch():
    z, h = draws(2, 6, 4)
    for k in range(6):
        torch.testing.assert_close(o_gan.rho(z[k:k + 1], h[k:k + 1]), o_gan.rho(z, h)[k:k + 1])


@given(WIDE, SEEDS)
def test_6409_9_minus_rho_is_the_mse_of_what_N_leaves(n, seed):
    z, h = draws(2, 5, n, seed=seed)
    far = (o_gan.normalize(z) - o_gan.normalize(h)).square().sum(1)
    torch.testing.assert_close(far, 2 * n * (1 - o_gan.rho(z, h)))


@given(WIDE, SEEDS, st.floats(0.05, 9))
def test_6409_5_and_the_critic_pull_at_right_angles(n, seed, scale):
    """In code space: rho's gradient is orthogonal to 1, avg's direction, and to h; its length in closed form."""
    z, h = draws(2, 5, n, seed=seed)
    h = (h * scale + 1).requires_grad_()
    pull, = torch.autograd.grad(o_gan.rho(z, h).sum(), h)
    score, = torch.autograd.grad(o_gan.avg(h).sum(), h)
    torch.testing.assert_close(score, torch.full_like(h, 1 / n))
    for other in (score, h):
        np.testing.assert_allclose((pull * other).sum(1).detach(), 0, atol=1e-9)
    r, away = o_gan.rho(z, h), h - h.mean(1, keepdim=True)
    torch.testing.assert_close(pull.norm(dim=1), (1 - r**2).clamp(min=0).sqrt() / away.norm(dim=1), atol=1e-6, rtol=1e-6)
    want = (o_gan.normalize(z) - r[:, None] * o_gan.normalize(h)) / (n * o_gan.std(h)[:, None])
    torch.testing.assert_close(pull, want)


@given(st.floats(1e-3, 1e3), SEEDS)
@example(1e-3, 0)
def test_6409_2_the_floor_of_std_moves_nothing_above_it(scale, seed):
    z, h = draws(2, 3, 8, seed=seed)
    h = scale * o_gan.normalize(h)
    np.testing.assert_allclose(o_gan.std(h), scale, rtol=1e-12)
    np.testing.assert_allclose(o_gan.rho(z, h), plain_rho(z, h), atol=1e-12)


def test_6409_2_8_constant_codes_and_equal_pictures_do_no_harm():
    x = torch.zeros(2, 1, 3, 3)
    z, h = draws(2, 8, dtype=torch.float32), torch.full((2, 8), 3.0, requires_grad=True)
    value = o_gan.critic_loss(x, x, z, h, h + 1, 0.25, 0.5) + o_gan.generator_loss(z, h, 0.5)
    grad, = torch.autograd.grad(value.sum(), h)
    assert value.isfinite().all() and grad.isfinite().all()
    gap = o_gan.R(x, x, h, h + 1)
    torch.testing.assert_close(gap, torch.full_like(gap, 1e10))  # 1 over the floor


@given(st.sampled_from([8, 32, 128, 256]), SEEDS)
def test_6409_8_the_floor_is_under_one_grey_level(size, seed):
    """Two pictures from 8-bit data that differ at all are further apart, at each size of the nets."""
    x = torch.zeros(1, 3, size, size, dtype=torch.float64)
    y = x.clone()
    y[0, 0, 0, 0] = 2 / 255
    hx, hy = draws(2, 1, 5, seed=seed)
    want = (hx.mean() - hy.mean()) ** 2 / ((2 / 255) ** 2 / (3 * size**2))
    torch.testing.assert_close(o_gan.R(x, y, hx, hy)[0], want)


@given(SEEDS, st.floats(0.01, 2), st.floats(0, 2))
def test_6409_7_8_by_plain_numbers(seed, lambda_1, lambda_2):
    """Pair by pair: real i goes with fake i, distances are means over that pair's pixels."""
    x, y = draws(2, 3, 2, 4, 5, seed=seed)
    z, hx, hy = draws(3, 3, 6, seed=seed + 1)
    E_loss = o_gan.critic_loss(x, y, z, hx, hy, lambda_1, lambda_2)
    G_loss = o_gan.generator_loss(z, hy, lambda_2)
    r = plain_rho(z, hy)
    for i in range(3):
        a, b = hx[i].mean().item(), hy[i].mean().item()
        far = ((x[i] - y[i]) ** 2).mean().item()
        assert E_loss[i].item() == pytest.approx(a - b + lambda_1 * (a - b) ** 2 / far - lambda_2 * r[i])
        assert G_loss[i].item() == pytest.approx(b - lambda_2 * r[i])
    turned = o_gan.R(x, y.roll(1, 0), hx, hy.roll(1, 0))
    assert not torch.allclose(turned, o_gan.R(x, y, hx, hy))  # the pairing matters
    twice = o_gan.R(*(torch.cat([v, v]) for v in (x, y, hx, hy)))
    torch.testing.assert_close(twice[3:], o_gan.R(x, y, hx, hy))  # and the rest of the batch does not


def test_6409_7_8_the_best_gap_is_minus_twice_the_distance():
    """With lambda_1 = 1/4: min over u of u + u^2 / (4 MSE) is at u = -2 MSE, value -MSE (GAN-QP with lambda 2)."""
    x, y = draws(2, 1, 1, 4, 4)
    mse = (x - y).square().mean().item()
    u = torch.linspace(-6 * mse, 6 * mse, 100_001, dtype=torch.float64)
    h = torch.zeros(len(u), 3, dtype=torch.float64)
    pairs = x.expand(len(u), -1, -1, -1), y.expand(len(u), -1, -1, -1)
    value = o_gan.critic_loss(*pairs, draws(len(u), 3), h + u[:, None], h, 0.25, 0.0)
    assert u[value.argmin()].item() == pytest.approx(-2 * mse, abs=12e-5 * mse)
    assert value.min().item() == pytest.approx(-mse)


@given(SEEDS, st.floats(0, 2), st.floats(0, 2))
def test_6409_1_3_4_6_7_one_game_in_five_spellings(seed, lam, lambda_1):
    """(1) with D = T(E) (3) and rho (4), T = avg (6), and f, g, h and R of (7): all of them as a plain sum."""
    x, y = draws(2, 4, 1, 3, 3, seed=seed)
    z, hx, hy = draws(3, 4, 5, seed=seed + 1)

    def T(h):
        return [sum(row) / len(row) for row in h.tolist()]

    def f(a):
        return a

    def g(b):
        return -b
    h, r = f, plain_rho(z, hy)
    D_x, D_y = T(hx), T(hy)  # (3)
    plain_E = [f(a) + g(b) for a, b in zip(D_x, D_y)]  # (1)
    plain_G = [h(b) for b in D_y]
    four_E = [v - lam * k for v, k in zip(plain_E, r)]  # (4), and (6) since T is avg
    four_G = [v - lam * k for v, k in zip(plain_G, r)]
    np.testing.assert_allclose(o_gan.critic_loss(x, y, z, hx, hy, 0.0, lam), four_E, atol=1e-12)
    np.testing.assert_allclose(o_gan.generator_loss(z, hy, lam), four_G, atol=1e-12)
    np.testing.assert_allclose(o_gan.critic_loss(x, y, z, hx, hy, 0.0, 0.0), plain_E, atol=1e-12)  # lambda 0: a GAN
    full = o_gan.critic_loss(x, y, z, hx, hy, lambda_1, lam).numpy()  # (7)
    np.testing.assert_allclose(full - four_E, lambda_1 * o_gan.R(x, y, hx, hy).numpy(), atol=1e-9)


@given(SEEDS, st.floats(-5, 5), st.floats(0.1, 9))
def test_6409_7_shift_of_E_changes_nothing_and_scale_only_the_critic(seed, c, a):
    x, y = draws(2, 3, 1, 3, 3, seed=seed)
    z, hx, hy = draws(3, 3, 6, seed=seed + 1)
    torch.testing.assert_close(o_gan.critic_loss(x, y, z, hx + c, hy + c, 0.25, 0.5),
                               o_gan.critic_loss(x, y, z, hx, hy, 0.25, 0.5))
    torch.testing.assert_close(o_gan.rho(z, a * hy + c), o_gan.rho(z, hy))
    s = 1.7  # (lambda_1, lambda_2) -> (s lambda_1, lambda_2 / s) with E -> E / s is the same game, times 1 / s
    torch.testing.assert_close(o_gan.critic_loss(x, y, z, hx / s, hy / s, 0.25 * s, 0.5 / s),
                               o_gan.critic_loss(x, y, z, hx, hy, 0.25, 0.5) / s)
    torch.testing.assert_close(o_gan.generator_loss(z, hy / s, 0.5 / s), o_gan.generator_loss(z, hy, 0.5) / s)


@given(SEEDS)
def test_6409_9_mse_on_the_code_is_not_free_of_avg(seed):
    """What the post argues from: || z - h ||^2 asks for avg(h) = avg(z), and leaves the critic nothing."""
    z, h = draws(2, 4, 6, seed=seed)
    mse = (z - h).square().mean(1)
    rest = (o_gan.avg(z) - o_gan.avg(h)).square() + ((z - h) - (o_gan.avg(z) - o_gan.avg(h))[:, None]).square().mean(1)
    torch.testing.assert_close(mse, rest)
    assert ((z - h - 1).square().mean(1) - mse).abs().min() > 0


def test_6409_9_degrees_of_freedom_in_a_linear_world():
    """E, G linear: with mse at its best, avg(E(G(z))) is avg(z) whatever is to be scored; with rho any score is free."""
    A = draws(5, 5)
    z = draws(64, 5)
    mse = torch.linalg.inv(A)  # E(G(z)) = z
    h = z @ A @ mse
    torch.testing.assert_close(o_gan.avg(h), o_gan.avg(z))
    for score in (-3.0, 4.0):
        free = h + score  # a bias of E
        torch.testing.assert_close(o_gan.rho(z, free), torch.ones(64, dtype=torch.float64))
        torch.testing.assert_close(o_gan.avg(free), o_gan.avg(z) + score)


class Mean(torch.nn.Module):
    """A toy E: each coordinate is a weighted sum of the pixels."""

    def __init__(self, pixels, n):
        super().__init__()
        self.weight = torch.nn.Parameter(draws(pixels, n) / pixels)

    def forward(self, x):
        return x.flatten(1) @ self.weight


def test_6409_10_reconstruct_is_G_of_N_of_E():
    x = draws(3, 1, 2, 2)
    E, seen = Mean(4, 6), []

    def G(h):
        seen.append(h)
        return h @ torch.ones(6, 4, dtype=h.dtype)
    out = o_gan.reconstruct(E, G, x)
    N = E(x).detach().numpy()
    N = (N - N.mean(1, keepdims=True)) / N.std(1, keepdims=True)
    np.testing.assert_allclose(seen[0].detach(), N, atol=1e-12)
    np.testing.assert_allclose(out.detach(), np.repeat(N.sum(1, keepdims=True), 4, 1), atol=1e-12)
    o_gan.reconstruct(E, G, x, 0.9)
    np.testing.assert_allclose(seen[1].detach(), 0.9 * N, atol=1e-12)
    with torch.no_grad():
        E.weight.mul_(7)  # nor does E's scale matter
    o_gan.reconstruct(E, G, x)
    np.testing.assert_allclose(seen[2].detach(), N, atol=1e-12)


# ---- augmentation ----

@given(SEEDS, st.sampled_from([(8, 8), (16, 24), (9, 9)]))
def test_augment_by_plain_loops(seed, size):
    x = torch.rand(3, 2, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    u = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed + 1))
    got = o_gan.augment(x, u)
    for i in range(3):
        bright, contrast = u[i, 0].item() - 0.5, u[i, 1].item() - 0.5
        y = x[i] + bright
        y = y.mean() + (y - y.mean()) * (1 + contrast)
        right, down = (round((u[i, 2 + k].item() - 0.5) * n / 4) for k, n in ((0, size[1]), (1, size[0])))
        want = torch.zeros_like(y)
        for row in range(size[0]):
            for column in range(size[1]):
                if 0 <= row + down < size[0] and 0 <= column + right < size[1]:
                    want[:, row, column] = y[:, row + down, column + right]
        torch.testing.assert_close(got[i], want, atol=1e-5, rtol=1e-5)


def test_augment_with_half_changes_nothing():
    x = draws(2, 3, 8, 8, dtype=torch.float32)
    torch.testing.assert_close(o_gan.augment(x, torch.full((2, 4), 0.5)), x)


# ---- the game: whose gradient is what ----

def small(kernel=4, norms=True):
    """Both nets in float64, with or without BatchNorm, and a batch."""
    torch.manual_seed(0)
    nets = o_gan.OGan((3, 12, 12), 4, 4, kernel).double()
    with torch.no_grad():
        for p in nets.parameters():
            p.mul_(8)  # at 0.02 nearly everything is nearly zero
    if not norms:
        for net in (nets.E, nets.G):
            for name, layer in net.body.named_children():
                if isinstance(layer, torch.nn.BatchNorm2d):
                    net.body[int(name)] = torch.nn.Identity()
    return nets, draws(6, 3, 12, 12, seed=1), draws(6, 4, seed=2)


@pytest.mark.parametrize("norms", [False, True])
def test_6409_7_two_gradients_of_one_graph_are_the_single_loss_of_post_6387(norms):
    """Its stop-gradient loss: t1 + t2 - lambda_2 rho + lambda_1 R with G(z) held still in t1, R and half of t2."""
    nets, x, z = small(norms=norms)
    E, G = nets.E, nets.G
    y = G(z)
    hx, hy = E(x), E(y)
    E_params, G_params = list(E.parameters()), list(G.parameters())
    o_gan.critic_loss(x, y, z, hx, hy, 0.25, 0.5).mean().backward(inputs=E_params, retain_graph=True)
    o_gan.generator_loss(z, hy, 0.5).mean().backward(inputs=G_params)
    mine = [p.grad.clone() for p in E_params + G_params]

    y = G(z)
    still = y.detach()
    m_x, m_y, m_still = E(x).mean(1), E(y).mean(1), E(still).mean(1)
    t1, t2 = m_x - m_still, m_y - m_still
    assert t2.abs().max() == 0
    zc, hc = (v - v.mean(1, keepdim=True) for v in (z, E(y)))
    r = (zc * hc).sum(1) / (zc.norm(dim=1) * hc.norm(dim=1))
    single = (t1 + t2 - 0.5 * r + 0.25 * t1**2 / (x - still).square().mean((1, 2, 3))).mean()
    theirs = torch.autograd.grad(single, E_params + G_params, retain_graph=True)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    t1_G = torch.autograd.grad(t1.sum(), G_params, retain_graph=True, allow_unused=True)
    assert all(g is None for g in t1_G)  # G hears nothing of t1, nor of R
    t2_E = torch.autograd.grad(t2.sum(), E_params, retain_graph=True)
    assert max(g.abs().max() for g in t2_E) < 1e-12  # and E nothing of t2
    for params in (E_params, G_params):
        assert any(g.abs().max() > 1e-6 for g in torch.autograd.grad(r.sum(), params, retain_graph=True))


def test_real_and_fake_go_through_E_apart():
    """BatchNorm over [real; fake] in one batch would be another critic."""
    nets, x, z = small()
    y = nets.G(z)
    both = nets.E(torch.cat([x, y]))
    assert not torch.allclose(both[:6], nets.E(x)) and not torch.allclose(both[6:], nets.E(y))


def test_codes_do_not_hang_on_the_batch():
    nets, x, z = small()
    nets.E(x), nets.G(z)
    nets.eval()
    for f, v in ((nets.E, x), (nets.G, z), (lambda v: o_gan.reconstruct(nets.E, nets.G, v), x)):
        torch.testing.assert_close(f(v), torch.cat([f(row[None]) for row in v]))


def test_gradients_lie_as_weights_do_and_fused_adam_is_the_plain_one():
    """Fused Adam reads raw memory: in another layout a gradient would move other weights than its own."""
    states = []
    for fused in (True, False):
        args = o_gan.parse_args(["--size", "8", "--width", "4"])
        nets = o_gan.build(args, (3, 8, 8), torch.device("cpu"))
        adam = o_gan.optimizer(nets, args)
        adam = adam if fused else torch.optim.Adam(nets.parameters(), lr=args.lr, betas=(0.5, 0.999))
        E_params, G_params = list(nets.E.parameters()), list(nets.G.parameters())
        for step in range(3):
            x, z = draws(6, 3, 8, 8, seed=step, dtype=torch.float32), draws(6, 8, seed=step, dtype=torch.float32)
            y = nets.G(z)
            hx, hy = nets.E(x), nets.E(y)
            o_gan.critic_loss(x, y, z, hx, hy, 0.25, 0.5).mean().backward(inputs=E_params, retain_graph=True)
            o_gan.generator_loss(z, hy, 0.5).mean().backward(inputs=G_params)
            assert all(p.grad.stride() == p.stride() for p in nets.parameters())
            assert any(p.ndim == 4 and not p.is_contiguous() for p in nets.parameters())
            adam.step()
            adam.zero_grad()
        states.append(nets.state_dict())
    for name, p in states[0].items():
        torch.testing.assert_close(p, states[1][name], msg=name)


def test_losses_and_heads_are_float32_under_bfloat16():
    nets, x, z = small()
    nets, x, z = nets.float(), x.float(), z.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = nets.G(z)
        hx, hy = nets.E(x), nets.E(y)
        assert y.dtype == hx.dtype == hy.dtype == torch.float32
        assert nets.E.body(x).dtype == torch.bfloat16
    assert o_gan.critic_loss(x, y, z, hx, hy, 0.25, 0.5).dtype == torch.float32


# ---- wiring: a run beside a naive one ----

TINY = "--n-z 5 --width 4 --batch-size 6 --samples 4 --judge 0 --save-every 99"


@pytest.fixture
def pictures():
    """60 pictures of 12 x 12, two levels of each net; the last six are held out."""
    torch.set_num_threads(1)
    a = np.random.default_rng(0).integers(0, 256, (60, 12, 12, 3), dtype=np.uint8)
    np.save("a.npy", a)
    return torch.tensor(a).permute(0, 3, 1, 2)


def digits():
    """As idx files, 10 x 10, grey: 150 to train on, 40 held out; each of three labels is a bright corner."""
    rng, parts = np.random.default_rng(1), []
    Path("d").mkdir()
    for part, count in (("train", 150), ("t10k", 40)):
        y = rng.integers(0, 3, count).astype(np.uint8)
        x = rng.integers(0, 120, (count, 10, 10)).astype(np.uint8)
        for k, label in enumerate(y):
            x[k, 5 * (label // 2):5 * (label // 2) + 5, 5 * (label % 2):5 * (label % 2) + 5] += 100
        for kind, a in (("images-idx3", x), ("labels-idx1", y)):
            raw = bytes([0, 0, 8, a.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in a.shape) + a.tobytes()
            Path(f"d/{part}-{kind}-ubyte").write_bytes(raw)
        parts += [torch.tensor(x)[:, None], torch.tensor(y)]
    return parts[0], parts[2], parts[1], parts[3]


def main(flags, out="out/o_gan", data="a.npy"):
    """A run, its checkpoint and its metrics."""
    assert o_gan.main(["--data", data, *TINY.split(), *flags.split(), "--out", str(out)]) == 0
    return torch.load(f"{out}/ckpt.pt", weights_only=True), json.loads(Path(f"{out}/metrics.json").read_text())


def networks(flags, weights, shape=(3, 12, 12)):
    """E and G of these flags with these weights, in eval mode."""
    nets = o_gan.build(o_gan.parse_args([*TINY.split(), *flags.split()]), shape, torch.device("cpu"))
    nets.load_state_dict(weights)
    return nets.eval().E, nets.G


@pytest.mark.parametrize("flags", [
    "--lr 0.01 --ema 0.4 --lambda-1 0.4 --lambda-2 0.9", "--lr 0.01 --ema 0.05 --optimizer rmsprop --kernel 5 --seed 3",
    "--lr 0.02 --augment --lambda-2 0"])
def test_five_steps_are_those_of_a_naive_loop(pictures, flags):
    """Order, z, augmentation, losses, both players at once, optimiser, BatchNorm's buffers and average by plain code."""
    flags += " --batch-size 12"  # the fifth batch reaches into the second epoch
    state, _ = main(f"{flags} --steps 5")
    args = o_gan.parse_args([*TINY.split(), *flags.split()])
    x = pictures[:54].float() / 127.5 - 1
    nets = o_gan.build(args, (3, 12, 12), torch.device("cpu")).train()
    params = dict(nets.named_parameters())
    tracked = {k: v for k, v in nets.state_dict().items() if v.is_floating_point()}
    ema = {name: v.clone() for name, v in tracked.items()}
    m, v = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
    order = torch.cat([torch.randperm(54, generator=o_gan.generator("cpu", args.seed, epoch, 9)) for epoch in (0, 1)])
    for step in range(5):
        g = o_gan.generator("cpu", args.seed, step)
        z = torch.randn(12, 5, generator=g)
        real, fake = x[order[12 * step:12 * step + 12]], nets.G(z)
        if args.augment:
            u = torch.rand(2, 12, 4, generator=g)
            real, fake = o_gan.augment(real, u[0]), o_gan.augment(fake, u[1])
        hx, hy = nets.E(real), nets.E(fake)
        zc, hc = (w - w.mean(1, keepdim=True) for w in (z, hy))
        r = (zc * hc).sum(1) / zc.norm(dim=1) / hc.norm(dim=1)
        gap = hx.mean(1) - hy.mean(1)
        R = gap**2 / ((real - fake) ** 2).flatten(1).mean(1)
        for_E = (gap + args.lambda_1 * R - args.lambda_2 * r).mean()
        for_G = (hy.mean(1) - args.lambda_2 * r).mean()
        if not step:  # the log's first line
            want = [for_E.item(), gap.mean().item(), r.mean().item(), hx.std(1, correction=0).mean().item()]
            rows = [line.split(",") for line in Path("out/o_gan/log.csv").read_text().splitlines()[:2]]
            assert rows[0][4:] == ["loss_E", "gap", "rho", "std"]
            assert [float(v) for v in rows[1][4:]] == pytest.approx(want, rel=1e-3, abs=1e-5)
        grads = {}
        for value, player in ((for_E, "E."), (for_G, "G.")):
            names = [name for name in params if name.startswith(player)]
            grads |= dict(zip(names, torch.autograd.grad(value, [params[name] for name in names], retain_graph=True)))
        decay = min(args.ema, (1 + step) / (10 + step))
        for name, p in params.items():
            if args.optimizer == "adam":
                m[name] = 0.5 * m[name] + 0.5 * grads[name]
                v[name] = 0.999 * v[name] + 0.001 * grads[name] ** 2
                way = m[name] / (1 - 0.5 ** (step + 1)) / ((v[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            else:
                v[name] = 0.99 * v[name] + 0.01 * grads[name] ** 2
                way = grads[name] / (v[name].sqrt() + 1e-7)
            p.data -= args.lr * way
        for name in ema:
            ema[name] = decay * ema[name] + (1 - decay) * tracked[name]
    assert sum("running" in name for name in ema) == 6
    for name in ema:
        torch.testing.assert_close(state["model"][name], tracked[name].detach(), rtol=1e-3, atol=2e-5, msg=name)
        torch.testing.assert_close(state["ema"][name], ema[name].detach(), rtol=1e-3, atol=2e-5, msg=name)
    assert state["step"] == 5


def test_two_ranks_are_one_and_a_resumed_run_is_whole_with_batchnorm_in_both_players(pictures, python):
    """Moments of the whole batch on each rank, gradients averaged; buffers, both players, optimiser: to the bit after a resume."""
    flags = "--steps 4 --lr 0.01 --augment"
    ranks = python.ranks(o_gan.__file__, "--data", "a.npy", *TINY.split(), *flags.split(), "--out", "two")
    assert [run.wait() for run in ranks] == [0, 0], ranks[0].err()
    one, two = main(flags, "one")[0], torch.load("two/ckpt.pt", weights_only=True)
    assert {"E.body.4.running_var", "G.body.0.running_mean", "G.body.3.running_var"} <= set(one["model"])
    for part in ("model", "ema"):
        for name, p in one[part].items():
            torch.testing.assert_close(two[part][name], p, rtol=1e-3, atol=1e-5, msg=name)
    assert o_gan.main(["--data", "a.npy", *TINY.split(), "--lr", "0.01", "--augment", "--steps", "2", "--out", "cut"]) == 0
    assert o_gan.main(["--resume", "--out", "cut", "--steps", "4"]) == 0
    whole, cut = one, torch.load("cut/ckpt.pt", weights_only=True)
    for part in ("model", "ema"):
        assert all(torch.equal(p, cut[part][name]) for name, p in whole[part].items())
    for k, moments in whole["opt"]["state"].items():
        assert all(torch.equal(v, cut["opt"]["state"][k][name]) for name, v in moments.items())


@pytest.mark.parametrize("affine", [True, False])
def test_batchnorm_over_ranks_is_torchs_over_the_whole_batch(monkeypatch, affine):
    """Two ranks played one after the other: values, gradients and running moments, in training and after."""
    torch.manual_seed(0)
    x = torch.randn(6, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, 2, 4, dtype=torch.float64)
    whole = torch.nn.BatchNorm2d(3, affine=affine).double()
    want = whole(x)
    want_grad, = torch.autograd.grad((want * weight).sum(), x)
    parts = [x.detach()[:3].requires_grad_(), x.detach()[3:].requires_grad_()]
    monkeypatch.setattr(o_gan, "RANKS", 2)
    layers = [o_gan.BatchNorm(3, affine=affine).double() for _ in parts]

    class Both:
        """The sum over both ranks' tensors, as autograd sees it."""
        def __init__(self):
            self.seen = []

        def apply(self, value):
            self.seen.append(value)
            k = len(self.seen) - 1
            n = parts[0].numel() // 3
            h = torch.cat(parts)
            if k % 2 == 0:
                return h.sum((0, 2, 3))
            mean = h.sum((0, 2, 3)) / (2 * n)
            return (h - mean[:, None, None]).square().sum((0, 2, 3))
    both = Both()
    monkeypatch.setattr(o_gan, "Total", both)
    out = torch.cat([layer(part) for layer, part in zip(layers, parts)])
    torch.testing.assert_close(out, want)
    grads = torch.autograd.grad((out * weight).sum(), parts)
    torch.testing.assert_close(torch.cat(grads), want_grad)
    for k, part in enumerate(parts):  # what each rank gave to be summed is its own share
        torch.testing.assert_close(both.seen[2 * k], part.sum((0, 2, 3)))
    for layer in layers:
        torch.testing.assert_close(layer.running_mean, whole.running_mean)
        torch.testing.assert_close(layer.running_var, whole.running_var)
        assert layer.num_batches_tracked == 1
        torch.testing.assert_close(layer.eval()(x), whole.eval()(x))


def as_bytes(x):
    return ((x.detach().double() + 1) * 127.5).round().clamp(0, 255)


def tiles(path, size):
    """The pictures in a grid, (rows, columns, C, size, size), and that all else is white."""
    scale = max(1, 96 // size)
    sheet = torch.nn.functional.pad(read_png(Path(path))[:, ::scale, ::scale], (0, 1, 0, 1), value=255)
    sheet = sheet.unfold(1, size + 1, size + 1).unfold(2, size + 1, size + 1)
    assert (sheet[..., size, :] == 255).all() and (sheet[..., size] == 255).all()
    return sheet[..., :size, :size].permute(1, 2, 0, 3, 4).double()


def near(a, b):
    """The same pictures, but for a byte that falls to the other side now and then."""
    return a.shape == b.shape and (a - b).abs().max() <= 1 and (a != b).double().mean() < 0.02


def plain_pca(train, k):
    """Mean and the first k directions, (k, CHW), pixels in [-1, 1]."""
    rows = train.flatten(1).double().numpy() / 127.5 - 1
    return rows.mean(0), np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:k]


def decibel(x, y):
    return 10 * np.log10(255**2 / ((np.asarray(x, float) - np.asarray(y, float)) ** 2).mean())


@pytest.mark.parametrize("flags", ["", "--shrink 0.8 --n-z 7 --kernel 5 --seed 2 --sample-seed 4"])
@pytest.mark.parametrize("data", ["a.npy", "d"])
def test_the_report_again_from_the_checkpoint(pictures, flags, data):
    """Every number and picture: from the average, in eval mode, on the pictures that it should come from."""
    flags += " --lr 0.02 --ema 0.7 --judge 14"
    train, held_out, y, y_test = digits() if data == "d" else (pictures[:54], pictures[54:], None, None)
    state, metrics = main(f"{flags} --steps 12 --save-every 10", data=data)
    args, out, size, shape = o_gan.parse_args([*TINY.split(), *flags.split()]), Path("out/o_gan"), train.shape[-1], train.shape[1:]
    E, G = networks(flags, state["ema"], shape)
    z = torch.cat([torch.randn(count, args.n_z, generator=o_gan.generator("cpu", args.sample_seed, first, 2))
                   for first, count in ((0, 4), (4, 4), (8, 4), (12, 2))])
    with torch.no_grad():
        fake = G(z)
        samples = as_bytes(fake)
        assert near(tiles(out / "samples.png", size).flatten(0, 1), samples[:4])
        preview = tiles(out / "samples_000010.png", size).flatten(0, 1)
        assert preview.shape == samples[:4].shape and not near(preview, samples[:4])
        assert metrics["rho"] == pytest.approx(plain_rho(z, E(fake)).mean(), abs=1e-4)

        def code(x):
            h = E(x.float() / 127.5 - 1).double()
            h = h - h.mean(1, keepdim=True)
            return h / h.square().mean(1, keepdim=True).sqrt()
        c, c_test = code(train), code(held_out)
        again = as_bytes(G(args.shrink * c_test.float()))
        sheet = tiles(out / "reconstructions.png", size).flatten(0, 1)
        count = min(32, len(held_out))
        assert torch.equal(sheet[:2 * count:2], held_out[:count].double()) and near(sheet[1:2 * count:2], again[:count])
        assert metrics["psnr"] == pytest.approx(decibel(held_out, again), abs=0.02)
        assert metrics["rho_held_out"] == pytest.approx(plain_rho(c_test, code(again)).mean(), abs=2e-3)

        sheet = tiles(out / "interpolation.png", size)
        assert sheet.shape[:2] == (min(6, len(held_out) // 2), 10)
        for k, row in enumerate(sheet):
            a, b = c_test[2 * k:2 * k + 2]
            way = torch.stack([(1 - t) * a + t * b for t in np.linspace(0, 1, 8)])
            way = way / way.square().mean(1, keepdim=True).sqrt()
            assert near(row[1:9], as_bytes(G(args.shrink * way.float())))
            assert torch.equal(row[[0, 9]], held_out[2 * k:2 * k + 2].double())
        sheet = tiles(out / "nearest.png", size)
        assert torch.equal(sheet[0], held_out[:12].double())
        for k in range(len(sheet[0])):
            order = (c - c_test[k]).square().sum(1).argsort()[:3]
            assert torch.equal(sheet[1:, k], train[order].double())

    mean, axes = plain_pca(train, args.n_z)
    rows = held_out.flatten(1).double().numpy() / 127.5 - 1
    low = (rows - mean) @ axes.T
    for name, want in ("psnr_pca", low @ axes + mean), ("psnr_mean", np.broadcast_to(mean, rows.shape)):
        want = ((want + 1) * 127.5).round().clip(0, 255)
        assert metrics[name] == pytest.approx(decibel(held_out.flatten(1), want), abs=0.02), name
    want = plain_judge(samples.to(torch.uint8), train, held_out, args.seed)
    for name in ("frechet", "precision", "recall", "sharpness", "frechet_floor", "recall_floor", "sharpness_floor"):
        assert metrics[name] == pytest.approx(want[name], rel=0.05), name  # noise has no clear components
    assert (metrics["step"], metrics["images_seen"], metrics["seed"]) == (12, 72, args.seed)
    assert metrics["images_per_second"] == pytest.approx(72 / metrics["train_seconds"]) and metrics["train_seconds"] > 0

    labelled = {name for name in metrics if name.startswith(("probe", "knn", "read_off"))}
    if y is None:
        assert not labelled
        return
    E0, _ = networks(flags, o_gan.build(args, shape, torch.device("cpu")).state_dict(), shape)
    pixels = train.flatten(1).double().numpy() / 127.5 - 1
    encoders = {"E": [E(v.float() / 127.5 - 1).detach() for v in (train, held_out)],
                "start": [E0(v.float() / 127.5 - 1).detach() for v in (train, held_out)],
                "pca": [torch.tensor((v - mean) @ axes.T) for v in (pixels, rows)]}
    for name, (h, h_test) in encoders.items():
        near_labels = y[torch.cdist(h_test.double(), h.double()).argsort(1)[:, :5]].numpy()
        votes = [np.bincount(row, minlength=3).argmax() for row in near_labels]
        assert metrics[f"knn_{name}"] == pytest.approx((votes == y_test.numpy()).mean(), abs=0.04)
        assert metrics[f"probe_{name}"] == pytest.approx(o_gan.linear_probe(h, y, h_test, y_test), abs=0.04)
    mean, axes = plain_pca(train, 50)
    for name, seen in ("pictures", held_out), ("reconstructions", again):
        seen = seen.flatten(1).double().numpy() / 127.5 - 1
        parts = ((torch.tensor((v - mean) @ axes.T) for v in (pixels, seen)))
        x50, seen50 = parts
        assert metrics[f"read_off_{name}"] == pytest.approx(o_gan.linear_probe(x50, y, seen50, y_test), abs=0.04)
    assert len(labelled) == 8


def test_a_report_on_many_pictures_takes_some_evenly():
    x = torch.arange(25).view(25, 1)
    assert torch.equal(o_gan.evenly(x, 25), x)
    assert o_gan.evenly(x, 10).flatten().tolist() == list(range(0, 25, 3)) and o_gan.evenly(None, 3) is None
    assert o_gan.by_batches(lambda v, w: v + w, torch.arange(600), torch.ones(600)).tolist() == list(range(1, 601))


def test_attributes_of_drawn_faces_are_read(monkeypatch):
    """The default's labels: six numbers for each encoder, R^2 near 1 where pictures themselves are read."""
    torch.set_num_threads(1)
    faces = o_gan.draw_faces(400, 16)
    monkeypatch.setattr(o_gan, "draw_faces", lambda count, size: faces)
    _, metrics = main("--steps 2 --size 16", data="faces")
    for name in ("probe_E", "probe_start", "probe_pca", "read_off_pictures", "read_off_reconstructions"):
        assert len(metrics[name]) == 6
    assert min(metrics["read_off_pictures"][:4]) > 0.9 and not [name for name in metrics if name.startswith("knn")]


def test_recall_that_collapses_is_told(pictures, capsys, monkeypatch):
    """One picture for every z; and nothing is said where samples are the pictures themselves."""
    main("--steps 1 --judge 20")
    monkeypatch.setattr(o_gan, "sample", lambda G, count, args, device: [
        torch.zeros(count, args.n_z), pictures[:1].expand(count, -1, -1, -1).contiguous()])
    capsys.readouterr()
    _, metrics = main("--steps 1 --judge 20", "one")
    assert metrics["recall"] < 0.1 and "warning: recall 0.0" in capsys.readouterr().out
    monkeypatch.setattr(o_gan, "sample", lambda G, count, args, device: [torch.zeros(count, args.n_z), pictures[:count]])
    _, metrics = main("--steps 1 --judge 20", "all")
    assert metrics["recall"] > 0.1 and "warning" not in capsys.readouterr().out


SAME = ("weights", "samples", "reconstructions", "metrics")


@pytest.mark.parametrize("flag, changed", [
    ("--sample-seed 1", ["samples", "metrics"]), ("--shrink 0.5", ["reconstructions", "metrics"]), ("--judge 9", ["metrics"]), ("--save-every 1", []), ("--fp32", []),
    ("--ema 0.05", ["samples", "reconstructions", "metrics"]),
    *[(flag, SAME) for flag in (
        "--seed 1", "--batch-size 8", "--n-z 6", "--lambda-1 3", "--lambda-2 0", "--width 5", "--kernel 5", "--lr 0.03",
        "--optimizer rmsprop", "--augment", "--steps 4")]])
def test_every_flag_matters_where_it_should(pictures, flag, changed):
    """Beside the same run without it; `weights` are those that train."""
    both = []
    for k, more in enumerate(["", flag]):
        state, metrics = main(f"--steps 3 --lr 0.05 {more}", k)
        both.append(dict(weights=[v.tolist() for v in state["model"].values()],
                         metrics={name: v for name, v in metrics.items() if "second" not in name},
                         **{name: Path(f"{k}/{name}.png").read_bytes() for name in ("samples", "reconstructions")}))
    assert {name for name in SAME if both[0][name] != both[1][name]} == set(changed)


def test_a_rate_of_zero_learns_nothing(pictures):
    before = o_gan.build(o_gan.parse_args(TINY.split()), (3, 12, 12), torch.device("cpu"))
    still, _ = main("--steps 3 --lr 0")
    for name, p in before.named_parameters():
        assert torch.equal(still["model"][name], p) and torch.allclose(still["ema"][name], p)


@pytest.mark.parametrize("argv, word", [("--ema 1", "--ema"), ("--kernel 6", "--kernel: 4 or 5"), ("--n-z 2", "--n-z")])
def test_flags_that_do_not_go_together_are_refused(capsys, argv, word):
    try:
        assert o_gan.main(argv.split()) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert word in capsys.readouterr().err and not Path("out").exists()


def test_both_players_begin_as_dcgan_does():
    """Every weight N(0, .02), biases 0, as in the author's code."""
    nets = o_gan.build(o_gan.parse_args([]), (3, 32, 32), torch.device("cpu"))
    for net in (nets.E, nets.G):
        layers = [m for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear))]
        assert len(layers) == 4
        for layer in layers:
            n = layer.weight.numel()
            assert abs(layer.weight.std().item() / 0.02 - 1) < 4 / (2 * n) ** 0.5
            assert layer.bias is None or not layer.bias.any()


def test_pictures_too_small_to_halve_are_refused(capsys):
    np.save("a.npy", np.zeros((20, 3, 9), np.uint8))
    assert o_gan.main(["--data", "a.npy"]) == 2
    assert "4 px" in capsys.readouterr().err and not Path("out").exists()
    np.save("a.npy", np.random.default_rng(0).integers(0, 256, (20, 4, 9), dtype=np.uint8))
    main("--steps 1")


@pytest.mark.parametrize("n_z, components", [(5, 50), (60, 60)])
def test_pca_has_50_components_and_no_fewer_than_a_code(pictures, monkeypatch, n_z, components):
    asked, pca = [], o_gan.Pca
    monkeypatch.setattr(o_gan, "Pca", lambda x, k: asked.append(k) or pca(x, k))
    main(f"--steps 1 --n-z {n_z}")
    assert asked == [components]


def test_paper_is_the_authors_script():
    """o_gan_celeba.py: 128 px, 128 numbers, batches of 64, channels 64 to 1024, 5 x 5, RMSprop(1e-4, 0.99), lambdas."""
    args = o_gan.parse_args(["--paper", "--gpu"])
    want = dict(size=128, n_z=128, batch_size=64, width=64, kernel=5, optimizer="rmsprop", lr=1e-4, lambda_1=0.25,
                lambda_2=0.5, augment=False, ema=0.0)
    assert {name: getattr(args, name) for name in want} == want
    with torch.device("meta"):
        nets = o_gan.OGan((3, 128, 128), 128, 64, 5)
    opt = o_gan.optimizer(nets, args)
    assert (type(opt), opt.defaults["alpha"], opt.defaults["lr"]) == (torch.optim.RMSprop, 0.99, 1e-4)
    assert [layer.out_channels for layer in nets.E.body if isinstance(layer, torch.nn.Conv2d)] == [64, 128, 256, 512, 1024]


def test_sample_only_is_of_the_average(pictures):
    state, _ = main("--steps 6 --lr 0.02 --ema 0.8")
    assert o_gan.main(["--sample-only", "7", "--samples", "3", "--out", "out/o_gan"]) == 0
    z = torch.cat([torch.randn(count, 5, generator=o_gan.generator("cpu", 0, first, 2)) for first, count in ((0, 3), (3, 3), (6, 1))])
    sheet = tiles("out/o_gan/samples_only.png", 12)
    assert sheet.shape[:2] == (3, 3)
    with torch.no_grad():
        assert near(sheet.flatten(0, 1)[:7], as_bytes(networks("", state["ema"])[1](z)))


def test_learns(monkeypatch):
    """A tiny seeded run on small faces: codes come back, and samples are far nearer to the faces than at the start."""
    torch.set_num_threads(1)
    faces = o_gan.draw_faces(600, 8)
    monkeypatch.setattr(o_gan, "draw_faces", lambda count, size: faces)
    start, end = (main(f"--size 8 --n-z 6 --width 8 --batch-size 16 --judge 200 {more}", k, "faces")[1] for k, more in
                  enumerate(("--lr 0 --steps 1", "--lr 3e-3 --steps 500")))
    assert start["rho"] < 0.2 and end["rho"] > 0.95
    assert end["frechet"] < 0.6 * start["frechet"]


# ---- the experiments ----

def test_experiments_run_for_two_steps(pictures, capsys):
    short = ["--data", "a.npy", *TINY.split(), "--steps", "2", "--judge", "8", "--lr", "0.05"]
    table = o_gan_arms.main([*short, "--seeds", "3", "4"])
    assert list(table) == ["rho", "no rho", "rho 1", "mse", "hinge", "learned T", "augment", "autoencoder"]
    assert len({numbers["psnr"] for numbers in table.values()}) == 8
    runs = [main(f"--steps 2 --judge 8 --lr 0.05 --seed {seed}", seed)[1] for seed in (3, 4)]
    for name in ("frechet", "psnr"):
        assert table["rho"][name] == pytest.approx((runs[0][name] + runs[1][name]) / 2)
    assert "| learned T | " in capsys.readouterr().out
    few = o_gan_arms.main([*short, "--arms", "rho", "--seeds", "3", "--pictures", "20"])
    assert few["rho"]["psnr"] != pytest.approx(runs[0]["psnr"], abs=1e-6)
    assert all(getattr(o_gan, name) is function for name, function in o_gan_arms.REAL.items())
