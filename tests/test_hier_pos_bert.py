"""hier_pos_bert.py against post 7947, a BERT written out here in float64, and a naive second run of its main."""

import json
import math
import random
import runpy
import struct
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import hier_pos_bert as hier
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

EXPERIMENTS = Path(__file__).parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import hier_pos_bert_arms as arms_of  # noqa: E402
import hier_pos_bert_drift as drift  # noqa: E402
import hier_pos_bert_memory as memory  # noqa: E402
from test_blocks import damaged  # noqa: E402

SEEDS = st.integers(0, 2**31)
ALPHAS = st.floats(0.01, 0.99).filter(lambda a: abs(a - 0.5) > 1e-6)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TINY = ("--data a.txt --n 8 --width 16 --layers 2 --heads 2 --batch-size 8 --warmup 3 --lr 1e-2 --clip-grad 0.5 "
        "--eval-tokens 500 --times 3 --tune-steps 2 --span 2").split()


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def far(a, b):
    return (a.double() - b.double()).abs().max().item()


def by_the_post(p, alpha):
    """All n^2 codes, one by one, by (2) and (1), the post's indices from 1."""
    n = len(p)
    u = {i: (p[i - 1] - alpha * p[0]) / (1 - alpha) for i in range(1, n + 1)}
    q = {(i - 1) * n + j: alpha * u[i] + (1 - alpha) * u[j] for i in u for j in u}
    return torch.stack([q[k] for k in range(1, n * n + 1)])


# ---- the post ----

@given(st.integers(2, 9), st.integers(1, 5), ALPHAS, SEEDS)
def test_7947_1_2_closed_form_is_the_two_equations(n, W, alpha, seed):
    p, ids = draws(n, W, seed=seed), torch.arange(n * n)
    want = by_the_post(p, alpha)
    room = 1e-12 * want.abs().max() / (1 - alpha)
    assert far(hier.hierarchical_positions(p, alpha, ids), want) <= room
    assert far(hier.compose(hier.base(p, alpha), alpha, ids), want) <= room
    assert far(want[:n], p) <= room  # what (2) is for
    assert far(hier.base(p, alpha)[0], p[0]) <= room  # u_1 = p_1


def test_7947_1_of_seven_positions_has_all_49():
    p = draws(7, 3)
    codes = hier.hierarchical_positions(p, 0.4, torch.arange(49).view(7, 7))
    for i in range(7):
        for j in range(7):
            assert far(codes[i, j], p[j] + 2 / 3 * (p[i] - p[0])) < 1e-15


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(1, 9), ALPHAS, SEEDS)
def test_below_n_it_is_p_to_the_bit(dtype, n, alpha, seed):
    p = draws(n, 4, seed=seed).to(dtype)
    p[n // 2, 1], p[0, 0] = -0.0, -0.0
    for anchor in range(min(2, n)):
        q = hier.hierarchical_positions(p, alpha, torch.arange(n), anchor)
        assert q.dtype == dtype and q.view(torch.uint8).tolist() == p.view(torch.uint8).tolist()


def test_through_2_and_1_it_is_not():
    """Why the closed form is what the model uses."""
    p = draws(512, 64).float()
    found = hier.exactness(p, 0.4)
    assert found["closed form"] == 0 < found["(2) in (1)"] < 1e-6
    q = hier.compose(hier.base(p, 0.4), 0.4, torch.arange(512))
    assert far(q, p) == found["(2) in (1)"] and 0.2 < (q == p).double().mean() < 0.8


def test_7947_1_alpha_one_half_is_refused_for_a_reason():
    p, n = draws(6, 3), 6
    q = by_the_post(p, 0.5).view(n, n, 3)
    assert far(q, q.transpose(0, 1)) < 1e-14
    assert len({tuple(round(x, 9) for x in row) for row in q.flatten(0, 1).tolist()}) == n * (n + 1) // 2
    for alpha in (0.5, 0.0, 1.0, -0.1, 1.5, math.nan):
        for f in (lambda a: hier.hierarchical_positions(p, a, torch.arange(3)), lambda a: hier.base(p, a),
                  lambda a: hier.compose(p, a, torch.arange(3)), lambda a: hier.materialize(p, a, 3)):
            with pytest.raises(ValueError, match="alpha"):
                f(alpha)


@pytest.mark.parametrize("alpha", [0.2, 1 / 3, 0.4, 0.6])
def test_all_codes_of_512_positions_differ(alpha):
    """Sorted along one direction, no two of the 262144 are equal."""
    p = draws(512, 8)
    line = torch.cat([hier.hierarchical_positions(p, alpha, part) for part in torch.arange(512**2).split(2**15)]) @ draws(8, seed=1)
    assert line.sort().values.diff().min() > 0


@pytest.mark.parametrize("anchor, position", [(0, -1), (0, -6), (0, 36), (1, -1), (1, -6), (1, 30)])
def test_positions_without_a_code_fail_even_where_they_are_not_looked_at(anchor, position, monkeypatch):
    """Compiled, and on a GPU, digits does not look; no row from the table's end may stand in for -1."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(IndexError):
        hier.hierarchical_positions(draws(6, 3), 0.4, torch.tensor([0, position]), anchor)
    if not anchor:
        with pytest.raises(IndexError):
            hier.compose(draws(6, 3), 0.4, torch.tensor([0, position]))


@given(st.integers(3, 8), SEEDS)
def test_limits_and_distances(n, seed):
    """alpha -> 0 is tiling; the step of a block grows with alpha; a swap is |1 - beta|, a column beta times as far."""
    p = draws(n, 5, seed=seed)
    q = {a: hier.hierarchical_positions(p, a, torch.arange(n * n)).view(n, n, 5) for a in (1e-12, 0.2, 0.4, 0.6, 0.9)}
    assert far(q[1e-12], p.expand(n, n, 5)) < 1e-10
    steps = [(x[1] - x[0]).norm().item() for x in q.values()]
    assert steps == sorted(steps)
    for alpha, x in q.items():
        beta = alpha / (1 - alpha)
        for i, j in ((1, 2), (0, 2), (n - 1, 1)):
            assert float((x[i, j] - x[j, i]).norm()) == pytest.approx(abs(1 - beta) * float((p[i] - p[j]).norm()), rel=1e-6)
            assert float((x[i, 0] - x[j, 0]).norm()) == pytest.approx(beta * float((p[i] - p[j]).norm()), rel=1e-6)


def test_a_third_parts_swaps_and_columns_best_below_one_half():
    p = draws(9, 4)
    apart = {}
    for k in range(1, 60):
        q = hier.hierarchical_positions(p, k / 120, torch.arange(81)).view(9, 9, 4)
        pairs = [(i, j) for i in range(9) for j in range(i)]
        apart[k] = min(min(float((q[i, j] - q[j, i]).norm()), float((q[i, 0] - q[j, 0]).norm())) for i, j in pairs)
    assert max(apart, key=apart.get) == 40


@given(st.integers(2, 6), ALPHAS, st.integers(0, 1), SEEDS)
def test_gradient(n, alpha, anchor, seed):
    """Of q_(i, j): 1 into p_j, beta into p_i, -beta into p_1 (or, with an anchor, one row further)."""
    assume(n > anchor + 1)
    p = draws(n, 2, seed=seed).requires_grad_()
    beta = alpha / (1 - alpha)
    for i in range(n - anchor):
        for j in range(n):
            q = hier.hierarchical_positions(p, alpha, torch.tensor(i * n + j), anchor)
            want = torch.zeros(n, dtype=torch.float64)
            want[j] += 1
            want[i + anchor] += beta
            want[anchor] -= beta
            grad, = torch.autograd.grad(q[0], p)
            assert far(grad[:, 0], want) < 1e-12 and not grad[:, 1].any()
    weight = draws(n * n, 2, seed=seed + 1)
    grad, = torch.autograd.grad((hier.hierarchical_positions(p, alpha, torch.arange(n * n)) * weight).sum(), p)
    assert grad.any(1).all()
    grad, = torch.autograd.grad((hier.hierarchical_positions(p, alpha, torch.arange(n - 1)) * weight[:n - 1]).sum(), p)
    assert grad[:-1].any(1).all() and not grad[-1].any()
    assert not hier.materialize(p, alpha, n).requires_grad


def test_digits_of_a_position():
    i, j = hier.digits(torch.tensor([0, 511, 512, 513, 1024, 262143]), 512, 512)
    assert i.tolist() == [0, 0, 1, 1, 2, 511] and j.tolist() == [0, 511, 0, 1, 0, 511]
    p = draws(4, 2)
    for length in (4, 5, 16):
        assert far(hier.materialize(p, 0.4, length), by_the_post(p, 0.4)[:length]) < 1e-14
    for positions in ([16], [-1], [3, 16], [[0], [17]]):
        with pytest.raises(ValueError, match="16"):
            hier.hierarchical_positions(p, 0.4, torch.tensor(positions))
    with pytest.raises(ValueError, match="12"):
        hier.hierarchical_positions(p, 0.4, torch.tensor([12]), anchor=1)  # there is no p_{n+1}
    assert hier.hierarchical_positions(p, 0.4, torch.zeros(0, dtype=torch.long)).shape == (0, 2)
    assert hier.hierarchical_positions(p, 0.4, torch.tensor(7)).shape == (2,)


# ---- other ways ----

def test_other_ways_by_loops():
    p, n, L = draws(5, 3), 5, 13
    g = torch.Generator().manual_seed(3)
    for k in range(L):
        assert torch.equal(hier.other_positions(p, "tile", L, g)[k], p[k % n])
        assert torch.equal(hier.other_positions(p, "last", L, g)[k], p[min(k, n - 1)])
        x = k * (n - 1) / (L - 1)
        low = min(int(x), n - 2)
        assert far(hier.other_positions(p, "interpolate", L, g)[k], p[low] + (x - low) * (p[low + 1] - p[low])) < 1e-12
    p = 3 + 2 * draws(50, 4)
    q = hier.other_positions(p.float(), "random", 4000, g)
    assert torch.equal(q[:50], p.float()) and len(q.unique(dim=0)) == 4000
    assert far(q[50:].mean(0), p.mean(0)) < 0.2 and far(q[50:].std(0), p.std(0)) < 0.2


CONFIG = dict(vocab_size=21, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
              max_position_embeddings=6, type_vocab_size=2, layer_norm_eps=1e-12)
TOKENS = torch.randint(21, (3, 6), generator=torch.Generator().manual_seed(1))


def model(seed=0, dtype=torch.float64, **more):
    """A Bert whose every weight matters: biases and gains too are random."""
    net = hier.Bert(CONFIG | more)
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.4
    return net.to(dtype)


def parts_by_loops(w, c):
    def dense(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + c["layer_norm_eps"]).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x):
        return x * (1 + torch.erf(x / 2**0.5)) / 2
    return dense, norm, gelu


def states_by_loops(w, c, tokens, positions, mask=None):
    """Devlin et al. 2018 for one text, written out: post-norm, erf. The last states."""
    dense, norm, gelu = parts_by_loops(w, c)
    e = "bert.embeddings."
    x = torch.stack([w[e + "word_embeddings.weight"][t] + w[e + "position_embeddings.weight"][k]
                     + w[e + "token_type_embeddings.weight"][0] for t, k in zip(tokens, positions)])
    x = norm(e + "LayerNorm", x)
    H = c["num_attention_heads"]
    for i in range(c["num_hidden_layers"]):
        a = f"bert.encoder.layer.{i}."
        q, k, v = (dense(f"{a}attention.self.{name}", x) for name in ("query", "key", "value"))
        heads, d = [], q.shape[1] // H
        for h in range(H):
            part = slice(h * d, h * d + d)
            score = q[:, part] @ k[:, part].T / d**0.5
            if mask is not None:
                score = score.masked_fill(~mask, -math.inf)
            heads.append(score.softmax(-1) @ v[:, part])
        x = norm(a + "attention.output.LayerNorm", x + dense(a + "attention.output.dense", torch.cat(heads, 1)))
        x = norm(a + "output.LayerNorm", x + dense(a + "output.dense", gelu(dense(a + "intermediate.dense", x))))
    return x


def bert_by_loops(w, c, tokens, positions, mask=None):
    """The logits, the decoder tied."""
    dense, norm, gelu = parts_by_loops(w, c)
    x = states_by_loops(w, c, tokens, positions, mask)
    y = norm("cls.predictions.transform.LayerNorm", gelu(dense("cls.predictions.transform.dense", x)))
    return y @ w["bert.embeddings.word_embeddings.weight"].T + w["cls.predictions.bias"]


@torch.no_grad()
def test_the_model_by_loops():
    net = model()
    w = net.state_dict()
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:], mask[2, :1] = False, False
    logits, masked = net(TOKENS), net(TOKENS, mask)
    at = torch.tensor([1, 7, 16])
    assert far(net(TOKENS, mask, at=at), masked.flatten(0, 1)[at]) < 1e-12
    for b in range(3):
        assert far(logits[b], bert_by_loops(w, CONFIG, TOKENS[b], range(6))) < 1e-9
        assert far(masked[b], bert_by_loops(w, CONFIG, TOKENS[b], range(6), mask[b])) < 1e-9


@torch.no_grad()
def test_extra_padding_changes_nothing():
    net = hier.stretch(model(), "hierarchical", 20, 0.4, torch.Generator())
    longer = torch.cat([TOKENS, torch.zeros(3, 5, dtype=torch.long)], 1)
    mask = torch.arange(11).expand(3, 11) < 6
    assert far(net(longer, mask)[:, :6], net(TOKENS)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", [way for way in hier.WAYS if way != "interpolate"])
@torch.no_grad()
def test_a_stretched_model_is_the_old_one_to_the_bit_where_that_was(way, dtype):
    """With and without padding, and for positions given; not for interpolation, which moves them all."""
    net = model(dtype=dtype)
    new = hier.stretch(net, way, 24, 0.4, torch.Generator())
    mask = torch.arange(6).expand(3, 6) < 5
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 0, 0, 1, 2, 3]])
    for args in ((), (mask,), (mask, positions), (None, positions)):
        assert torch.equal(new(TOKENS, *args), net(TOKENS, *args))
    assert new is not net and new.positions is not net.positions


@torch.no_grad()
def test_late_positions_in_a_short_text():
    """What counts is the position id, not the length: left padding, or a text that begins late."""
    net = hier.stretch(model(), "hierarchical", 36, 0.3, torch.Generator())
    w = net.state_dict()
    codes = by_the_post(w["bert.embeddings.position_embeddings.weight"], 0.3)
    positions = torch.tensor([5, 6, 7, 20, 35, 0])
    w["bert.embeddings.position_embeddings.weight"] = codes
    assert far(net(TOKENS[:1], None, positions)[0], bert_by_loops(w, CONFIG, TOKENS[0], positions.tolist())) < 1e-9
    with pytest.raises(ValueError, match="36"):
        net(TOKENS, None, positions + 1)


@torch.no_grad()
@pytest.mark.parametrize("way, rows", [("hierarchical", 6), ("anchor", 6), ("tile", 15), ("interpolate", 15), ("last", 15), ("random", 15)])
def test_stretching(way, rows):
    """p stays the parameter of the post's form and of its anchored one; a table of all rows is that of the others."""
    net, g = model(), torch.Generator().manual_seed(0)
    long = hier.stretch(net, way, 15, 0.4, g)
    assert long.positions.shape == (rows, 12) and long.positions.requires_grad
    tokens = torch.randint(21, (2, 15))
    flat = hier.plain(long, 15)
    assert flat.positions.shape == (15, 12) and flat.bert["embeddings"].alpha is None and far(flat(tokens), long(tokens)) < 1e-10
    p = net.positions
    if way == "anchor":
        want = torch.stack([p[k % 6] + 2 / 3 * (p[k // 6 + 1] - p[1]) for k in range(15)])
    else:
        want = by_the_post(p, 0.4)[:15] if way == "hierarchical" else hier.other_positions(p, way, 15, g.manual_seed(0))
    assert far(flat.positions, want) < 1e-12


def test_first_weights():
    torch.manual_seed(0)
    c = CONFIG | dict(hidden_size=64, num_attention_heads=4, intermediate_size=256, vocab_size=500, max_position_embeddings=32)
    w = hier.Bert(c).state_dict()
    for name, p in w.items():
        if name.endswith("position_embeddings.weight"):
            for k in range(32):
                for i in range(32):
                    angle = k / 10000 ** (2 * i / 64)
                    assert float(p[k, i]) == pytest.approx(0.1 * math.sin(angle), abs=1e-5)
                    assert float(p[k, 32 + i]) == pytest.approx(0.1 * math.cos(angle), abs=1e-5)
        elif p.ndim == 2 and p.numel() > 1000:
            assert float(p.std()) == pytest.approx(p.shape[1] ** -0.5, rel=0.1) and abs(float(p.mean())) < 0.01, name
        elif p.ndim == 1:
            assert set(p.tolist()) == {1.0 if name.endswith("LayerNorm.weight") else 0.0}, name


# ---- masks ----

def test_masking_is_berts():
    text = torch.randint(5, 1000, (50, 2000))
    inputs, where = hier.corrupt(text, 4, 1000, torch.Generator().manual_seed(0))
    again, there = hier.corrupt(text, 4, 1000, torch.Generator().manual_seed(0))
    assert torch.equal(inputs, again) and torch.equal(where, there)
    assert where.shape == (50, 300) and all(len(row.unique()) == 300 for row in where)
    changed = (inputs != text)
    assert not changed.scatter(1, where, False).any()
    now, before = inputs.gather(1, where), text.gather(1, where)
    masked, same = (now == 4).double().mean(), (now == before).double().mean()
    assert abs(masked - 0.8) < 0.015 and abs(same - 0.1) < 0.01
    random = now[(now != 4) & (now != before)]
    assert len(random.unique()) > 700 and random.min() < 20 and random.max() > 980
    assert where.float().mean().item() == pytest.approx(1000, rel=0.02)  # anywhere
    assert hier.corrupt(torch.zeros(2, 3, dtype=torch.long), 4, 9, torch.Generator())[1].shape == (2, 1)


def test_frame_and_exam_leave_the_marks_alone():
    vocab = hier.read_vocabulary("")
    text = torch.randint(5, 261, (700,))
    assert hier.frame(text[None], vocab).tolist() == [[2, *text.tolist(), 3]]
    truth, inputs, asked = hier.make_exam(text, vocab)
    assert torch.equal(truth, text) and asked.sum() == 105 and torch.equal(inputs[~asked], text[~asked])
    assert torch.equal(hier.make_exam(text, vocab)[1], inputs)


# ---- words ----

PIECES = """una ##ffa ##ble hello , world ! naive cafe 日 本 語 text don ' t 3 . 14 ##e - 10 cd foo ##bar ##ba ##z [ mask ]
st ##raße em ##bed ##ding ##s ##x x ü 科 学""".split()
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES]
IDS = {word: k for k, word in enumerate(VOCAB)}
TABLE = {"unaffable": "una ##ffa ##ble", "Hello, World!": "hello , world !", "naïve café": "naive cafe",
         "日本語 text": "日 本 語 text", "don't": "don ' t", "3.14e-10": "3 . 14 ##e - 10", "c\u200bd": "cd",
         "foo\0bar\ufffdbaz": "foo ##bar ##ba ##z", "x" * 101: "[UNK]", "x" * 100: "x" + " ##x" * 99, "\U0001f600": "[UNK]",
         "[MASK] [mask]": "[MASK] [ mask ]", "Ⅷ straße": "[UNK] st ##raße", "embeddings": "em ##bed ##ding ##s",
         "科学text学，科": "科 学 text 学 [UNK] 科", "a\u3000日\tx\r\nx": "[UNK] 日 x x", "": "", " \n": "", "hello world": "hello world",
         "[CLS]x[SEP]": "[CLS] x [SEP]", "\ue000x\u00ad": "x", "x!!": "x ! !", "una一": "una [UNK]", "i\u0307x": "[UNK]"}


def pieces(text, lower=True):
    return [VOCAB[k] for k in hier.word_pieces(text, IDS, lower)]


@pytest.mark.parametrize("text", TABLE)
def test_word_pieces(text):
    assert pieces(text) == TABLE[text].split()
    assert hier.word_pieces(text, IDS) == hier.word_pieces(text, IDS, True)


def test_word_pieces_of_a_cased_vocabulary():
    assert pieces("Hello hello, ü", False) == ["[UNK]", "hello", ",", "ü"]
    assert pieces("u\u0308", False) == ["[UNK]"] and pieces("ü") == ["[UNK]"]  # the accent stays; or goes, and u is unknown


@given(st.lists(st.sampled_from([*TABLE, "İstanbul", "\u0301", "ﬁ", "한국", "a\u0345"]), max_size=8))
def test_a_long_text_is_its_words_one_after_another(texts):
    assert pieces(" ".join(texts)) == [piece for text in texts for piece in pieces(text)]


def test_bytes_are_words_too():
    vocab = hier.read_vocabulary("")
    tokens = hier.encode(bytes(range(256)), vocab)
    assert [vocab["words"][k] for k in tokens.tolist()] == [f"<0x{k:02X}>" for k in range(256)]
    assert [vocab[mark] for mark in hier.SPECIAL] == [0, 1, 2, 3, 4]


# ---- folders ----

def folder(path, state, words=VOCAB, kind="bin", **more):
    """A Hugging Face folder, written by hand."""
    path = Path(path)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | dict(vocab_size=len(words), hidden_act="gelu", model_type="bert") | more))
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    if kind == "bin":
        torch.save(state, path / "pytorch_model.bin")
        return str(path)
    head, body = {}, b""
    for name, value in state.items():
        raw = value.contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.float64: "F64"}
        head[name] = dict(dtype=dtype[value.dtype], shape=list(value.shape), data_offsets=[len(body), len(body) + len(raw)])
        body += raw
    head = json.dumps(head).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + body)
    return str(path)


def weights(dtype=torch.float32, seed=0):
    return {k: v.to(dtype) for k, v in model(seed, vocab_size=len(VOCAB)).state_dict().items()}


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("how", ["plain", "old names", "decoder", "bare body", "half", "brain"])
def test_folders_are_read(kind, how):
    want = weights()
    given = dict(want)
    if how == "old names":
        given = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in want.items()}
    if how == "decoder":
        given |= {"cls.predictions.decoder.weight": want["bert.embeddings.word_embeddings.weight"].clone(),
                  "cls.predictions.decoder.bias": given.pop("cls.predictions.bias"), "cls.seq_relationship.weight": torch.zeros(2, 12),
                  "bert.pooler.dense.weight": torch.zeros(12, 12)}
    if how == "bare body":
        want = {k: v for k, v in want.items() if k.startswith("bert.")}
        given = {k[5:]: v for k, v in want.items()} | {"embeddings.position_ids": torch.arange(6)[None], "pooler.dense.bias": torch.zeros(12)}
    if how in ("half", "brain"):
        given = {k: v.to(torch.float16 if how == "half" else torch.bfloat16) for k, v in want.items()}
        want = {k: v.float() for k, v in given.items()}
    c, got = hier.read_bert(folder("f", given, kind=kind))
    assert c["hidden_size"] == 12 and got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) and got[k].dtype == torch.float32 for k in want)
    hier.Bert(c).load_state_dict(got, strict=how != "bare body")


def test_a_folder_there_and_back():
    net, vocab = model(dtype=torch.float32, vocab_size=len(VOCAB)), dict(words=VOCAB, lower=False)
    hier.write_bert(Path("f"), net, vocab)
    c, state = hier.read_bert("f")
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items()) and state.keys() == net.state_dict().keys()
    assert c["architectures"] == ["BertForMaskedLM"] and {k: c[k] for k in CONFIG} == net.config
    assert hier.read_vocabulary("f") == dict(words=VOCAB, ids=IDS, lower=False) | {word: IDS[word] for word in hier.SPECIAL}
    raw = Path("f/model.safetensors").read_bytes()
    length, = struct.unpack("<Q", raw[:8])
    head = json.loads(raw[8:8 + length])
    assert head["__metadata__"] == {"format": "pt"} and (8 + length) % 8 == 0  # what transformers asks for
    assert max(item["data_offsets"][1] for name, item in head.items() if name[0] != "_") == len(raw) - 8 - length
    hier.write_bert(Path("g"), net, vocab, head=False)
    assert hier.read_bert("g")[1].keys() == {k for k in state if k.startswith("bert.")}
    assert json.loads(Path("g/config.json").read_text())["architectures"] == ["BertModel"]


@pytest.mark.parametrize("what, words", [
    ("missing", ["missing", "bert.encoder.layer.1.output.dense.bias"]), ("unknown", ["unknown", "bert.more"]),
    ("half a head", ["missing", "cls.predictions.bias"]), ("untied", ["decoder.weight", "tied"]), ("relative", ["relative_key"]),
    ("relu", ["relu"]), ("roberta", ["roberta"]), ("no config", ["config.json"]), ("no weights", ["pytorch_model.bin"]),
    ("no words", ["vocab.txt"]), ("no mask", ["[MASK]"]), ("cut", ["damaged"]), ("few words", ["words"]), ("shape", ["shape", "dense.weight"]),
    ("no width", ["hidden_size"]), ("a list", ["damaged"]), ("heads", ["damaged", "5"]), ("eps", ["damaged", "eps"]),
    ("sharded", ["model.safetensors", "whole"]), ("pointer", ["git lfs pull"]), ("Japanese", ["BertJapaneseTokenizer"]),
    ("settings", ["f: ", "wanted"]), ("many missing", ["missing, 32 in all"])])
def test_folders_that_are_refused(text, capsys, what, words):
    state, more, vocab = weights(), {}, list(VOCAB)
    if what == "missing":
        del state["bert.encoder.layer.1.output.dense.bias"]
    if what == "unknown":
        state["bert.more"] = torch.zeros(1)
    if what == "half a head":
        del state["cls.predictions.bias"]
    if what == "untied":
        state["cls.predictions.decoder.weight"] = torch.zeros(len(VOCAB), 12)
    if what == "shape":
        state["bert.encoder.layer.0.output.dense.weight"] = torch.zeros(3, 3)
    if what == "a list":
        state["bert.more"] = [1, 2]
    if what == "many missing":
        state = {name: value for name, value in state.items() if "layer" not in name and "cls" not in name}
    more = dict(relative=dict(position_embedding_type="relative_key"), relu=dict(hidden_act="relu"), roberta=dict(model_type="roberta"),
                heads=dict(num_attention_heads=5), eps=dict(layer_norm_eps=None)).get(what, {})
    path = folder("f", state, vocab if what != "no mask" else VOCAB[:4] + ["?"] + VOCAB[5:], kind="safetensors" if what == "cut" else "bin", **more)
    if what == "few words":
        (Path(path) / "vocab.txt").write_text("\n".join([*VOCAB, "one", "more"]) + "\n")
    for name, file in {"no config": "config.json", "no weights": "pytorch_model.bin", "no words": "vocab.txt"}.items():
        if what == name:
            (Path(path) / file).unlink()
    if what == "no width":
        (Path(path) / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"}))
    if what == "cut":
        file = Path(path) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-5])
    if what == "sharded":
        (Path(path) / "pytorch_model.bin").rename(Path(path) / "pytorch_model-00001-of-00002.bin")
    if what == "pointer":  # what git leaves there without its large files
        (Path(path) / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 440449768\n")
    if what in ("Japanese", "settings"):
        said = dict(tokenizer_class="BertJapaneseTokenizer") if what == "Japanese" else [1]
        (Path(path) / "tokenizer_config.json").write_text(json.dumps(said))
    assert hier.main(["--bert", path, "--data", "a.txt", "--steps", "1", "--times", "2"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and len(err) < 400 and all(word in err for word in words), err
    assert not Path("out").exists()


def test_a_folder_that_a_windows_editor_saved(monkeypatch):
    """Byte-order marks, CRLF; and a path from home."""
    path = Path(folder("f", weights()))
    for name in ("config.json", "vocab.txt"):
        (path / name).write_bytes(b"\xef\xbb\xbf" + (path / name).read_bytes().replace(b"\n", b"\r\n"))
    (path / "tokenizer_config.json").write_bytes(b'\xef\xbb\xbf{"do_lower_case": false, "tokenizer_class": "BertTokenizer"}')
    for name in ("f", "~/f"):  # home is this folder
        assert hier.read_bert(name)[0]["hidden_size"] == 12
        vocab = hier.read_vocabulary(name)
        assert vocab["words"] == VOCAB and vocab["lower"] is False


def test_damaged_folders_are_read_or_refused():
    """Whatever is in its files: a model that runs, or UserError."""
    kinds = dict(a="bin", b="safetensors")
    for name, kind in kinds.items():
        (Path(folder(name, weights(), kind=kind)) / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    g, ends = random.Random(0), Counter()
    for path in sorted(p for name in kinds for p in Path(name).iterdir()):
        whole = path.read_bytes()
        for _ in range(20 if path.suffix == ".bin" else 40):
            path.write_bytes(damaged(whole, g))
            try:
                args = hier.parse_args(["--bert", str(path.parent), "--times", "2"])
                c, state, vocab = hier.read_start(args)
                hier.build(args, torch.device("cpu"), c, state)(torch.tensor([hier.word_pieces("text, hello", IDS)[:5]]))
                ends["read"] += 1
            except hier.UserError as error:
                assert "\n" not in str(error)
                ends["refused"] += 1
        path.write_bytes(whole)
    assert min(ends.values()) > 20, ends


def test_a_text_that_the_vocabulary_does_not_know_is_told(text, capsys):
    """All of it [UNK]: a model guesses it rightly, and has learnt nothing."""
    Path("w.txt").write_text("слова другого языка " * 300)
    argv = f"--bert {folder('f', weights())} --batch-size 4 --times 2 --tune-steps 0 --eval-tokens 300 --span 1 --steps 0".split()
    run(*argv, "--data", "w.txt")
    assert "warning: 100% of the tokens are [UNK]" in capsys.readouterr().out
    words_text("v.txt")
    run(*argv, "--data", "v.txt")
    assert "warning" not in capsys.readouterr().out


def test_a_folder_may_move_before_a_resume(text):
    words_text("w.txt")
    flags = "--data w.txt --batch-size 4 --times 2 --tune-steps 0 --eval-tokens 300 --span 1".split()
    run(*flags, "--bert", folder("f", weights()), "--steps", 1)
    Path("f").rename("g")
    run("--resume", "--bert", "g", "--steps", 2, *flags[4:])
    assert state_of()["step"] == 2 and state_of()["config"]["bert"] == "g"


# ---- evaluation ----

def test_far_mentions_by_loops(monkeypatch):
    """Spans that stand just twice, further apart than reach: the later masked; then both."""
    vocab, reach, span, length = hier.read_vocabulary(""), 7, 2, 22
    rng = np.random.default_rng(6)
    text = torch.tensor(rng.integers(5, 13, 205))
    asked = []

    class Net:
        def __call__(self, tokens, at):
            asked.append((tokens[0].tolist(), at.tolist()))
            return torch.eye(261)[torch.where(torch.arange(len(at)) % 2 == 0, 7, 9)]
    got, want, right = hier.far_mentions(Net(), text, length, reach, span, vocab), [], []
    for start in range(0, 205 - 20 + 1, 20):
        window = text[start:start + 20].tolist()
        grams = [tuple(window[k:k + span]) for k in range(20 - span + 1)]
        later = [k for k, gram in enumerate(grams) if grams.count(gram) == 2 and k - grams.index(gram) > reach]
        if later:
            k, first = later[0], grams.index(grams[later[0]])
            for places in ((k,), (k, first)):
                tokens = [2, *window, 3]
                for place in places:
                    tokens[place + 1:place + 1 + span] = [4] * span
                want.append((tokens, [k + 1, k + 2]))
            right.append(((grams[k][0] == 7) + (grams[k][1] == 9)) / 2)
    assert asked == want and len(right) > 2 and 0 < np.mean(right) < 1
    assert got == dict(mentions=len(right), seen=pytest.approx(np.mean(right)), hidden=pytest.approx(np.mean(right)))
    nothing = hier.far_mentions(Net(), torch.arange(5, 205), length, reach, span, vocab)
    assert nothing == dict(mentions=0, seen=0, hidden=0)


def test_an_unlike_first_row_is_told(capsys):
    p = torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0], [0.0, 9.0]])
    assert hier.first_row(p) == {"p_1": 5.0, "others": 2.0}
    assert "anchor" in capsys.readouterr().out
    p[2, 0] = 2.6
    assert hier.first_row(p) == pytest.approx({"p_1": 5.0, "others": 2.6})
    assert capsys.readouterr().out == ""


# ---- the whole run ----

@pytest.fixture
def text():
    """a.txt: 4,000 bytes of words; and one thread, so that bits are bits."""
    torch.set_num_threads(1)
    write_text("a.txt", 0)


def write_text(path, seed):
    rng = np.random.default_rng(seed)
    Path(path).write_bytes(b" ".join(rng.choice([b"ab", b"cde", b"f", b"ghij"], 1300).tolist())[:4000])


def run(*argv):
    argv = [str(word) for word in argv]
    code = hier.main(argv)
    assert code == 0, argv


def state_of(out="out/hier_pos_bert"):
    return torch.load(f"{out}/ckpt.pt", weights_only=True)


def metrics_of(out="out/hier_pos_bert"):
    return json.loads(Path(out, "metrics.json").read_text())


def naive_generator(*key):
    seed = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


def naive_parts(path="a.txt", offset=5):
    tokens = torch.tensor(list(Path(path).read_bytes())) + offset
    part = len(tokens) // 20
    return tokens[:len(tokens) - 2 * part], tokens[len(tokens) - 2 * part:len(tokens) - part], tokens[len(tokens) - part:]


def naive_corrupt(text, g, words=261):
    """One number a token: the largest are chosen; then one for its fate, and a word."""
    inputs, count = text.clone(), max(1, round(0.15 * text.shape[1]))
    u = torch.rand(text.shape, generator=g)
    where = [sorted(range(text.shape[1]), key=lambda k: -row[k])[:count] for row in u.tolist()]
    fate, word = torch.rand(len(where), count, generator=g), torch.randint(words, (len(where), count), generator=g)
    for b, places in enumerate(where):
        for k, place in enumerate(places):
            if fate[b, k] < 0.9:
                inputs[b, place] = 4 if fate[b, k] < 0.8 else word[b, k]
    return inputs, where


POSITIONS = "bert.embeddings.position_embeddings.weight"


def naive_adam(w, loss, steps, lr, warmup, clip):
    """Adam on loss(w, step) with clipping, warm-up and cosine, in float64."""
    w = {k: v.double().clone().requires_grad_() for k, v in w.items()}
    first, second = ({k: torch.zeros_like(v) for k, v in w.items()} for _ in range(2))
    for step in range(steps):
        grads = torch.autograd.grad(loss(w, step), list(w.values()))
        norm = math.sqrt(sum(float(x.square().sum()) for x in grads))
        rate = lr * min(1, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for (k, p), x in zip(w.items(), grads):
            x = x * min(1, clip / (norm + 1e-6))
            first[k] = 0.9 * first[k] + 0.1 * x
            second[k] = 0.98 * second[k] + 0.02 * x**2
            m, v = first[k] / (1 - 0.9 ** (step + 1)), second[k] / (1 - 0.98 ** (step + 1))
            p.data = p.data - rate * m / (v.sqrt() + 1e-6)
    return {k: v.detach() for k, v in w.items()}


def naive_train(w, c, text, length, rows, steps, lr, warmup, clip, key, codes):
    """On windows of `length`; codes(p) is the table of positions."""
    def loss(w, step):
        g = naive_generator(*key(step))
        starts = torch.randint(len(text) - length + 3, (rows, 1), generator=g)
        truth = torch.stack([text[s:s + length - 2] for s in starts[:, 0].tolist()])
        inputs, where = naive_corrupt(truth, g)
        table, losses = w | {POSITIONS: codes(w[POSITIONS])}, []
        for b in range(rows):
            logits = bert_by_loops(table, c, [2, *inputs[b].tolist(), 3], range(length))
            losses += [-logits[k + 1].log_softmax(-1)[truth[b, k]] for k in where[b]]
        return sum(losses) / len(losses)
    return naive_adam(w, loss, steps, lr, warmup, clip)


SMALL = CONFIG | dict(vocab_size=261, hidden_size=16, num_attention_heads=2, intermediate_size=64, max_position_embeddings=8)


def start(seed=0, **more):
    torch.manual_seed(seed)
    return hier.Bert(SMALL | more).state_dict()


def test_a_naive_second_run_reaches_the_same_weights(text):
    run(*TINY, "--steps", 5, "--tune-steps", 0, "--seed", 3, "--warmup", 2)
    want = naive_train(start(3), SMALL, naive_parts()[0], 8, 8, 5, 1e-2, 2, 0.5, lambda step: (3, step), lambda p: p)
    got = state_of()["model"]
    assert got.keys() == want.keys() and max(far(got[k], want[k]) for k in want) < 2e-5
    assert max(far(got[k], start(3)[k]) for k in want) > 1e-2


@torch.no_grad()
def naive_told(table, c, length):
    """The exam of the test part at each position, window by window; (told, asked), each (length,)."""
    test = naive_parts()[2][:500]
    inputs, where = naive_corrupt(test[None], naive_generator(1))
    chosen, told, asked = set(where[0]), torch.zeros(length), torch.zeros(length)
    for start in range(0, len(test) - (length - 2) + 1, length - 2):
        logits = bert_by_loops(table, c, [2, *inputs[0, start:start + length - 2].tolist(), 3], range(length))
        for k in range(length - 2):
            if start + k in chosen:
                asked[k + 1] += 1
                told[k + 1] += int(logits[k + 1].argmax()) == int(test[start + k])
    return told, asked


def test_the_report_computed_again(text, monkeypatch, capsys):
    """Every number of metrics.json and every point drawn, from ckpt.pt and the test part, tuning included."""
    drawn = {}
    real = hier.draw_curves
    monkeypatch.setattr(hier, "draw_curves", lambda path, title, x, curves: drawn.update({path.name: curves}) or real(path, title, x, curves))
    arms = ["random", "hierarchical", "anchor"]
    run(*TINY, "--steps", 30, "--tune-steps", 3, "--tune-lr", 0.02, "--alpha", 0.3, "--arms", *arms, "--seed", 2)
    m, w, (train, _, test) = metrics_of(), state_of()["model"], naive_parts()
    w = {k: v.double() for k, v in w.items()}
    p, L, beta = w[POSITIONS], 24, 3 / 7
    g = naive_generator(2, 0, 3)
    tables = dict(hierarchical=by_the_post(p, 0.3)[:L], tile=torch.cat([p, p, p]), last=torch.cat([p, p[-1].expand(16, -1)]),
                  anchor=torch.stack([p[k % 8] + beta * (p[k // 8 + 1] - p[1]) for k in range(L)]),
                  interpolate=torch.stack([p[min(int(x), 6)] + (x - min(int(x), 6)) * (p[min(int(x), 6) + 1] - p[min(int(x), 6)])
                                           for x in (k * 7 / 23 for k in range(L))]),
                  random=torch.cat([p, p.mean(0) + p.std(0) * torch.randn(16, 16, generator=g)]))

    def share(table, length=L):
        told, asked = naive_told(table, SMALL, length)
        rows = [(told[k:k + 2].sum() / asked[k:k + 2].sum()).item() for k in range(0, length, 2)]
        return (told.sum() / asked.sum()).item(), rows

    def agree(name, way, table):
        total, rows = share(table)
        assert m[name][way] == pytest.approx(total, abs=1e-6), way
        mine = [math.nan if x is None else x for x in m[f"{name}_by_position"][way]]
        assert mine == pytest.approx(rows, abs=1e-6, nan_ok=True), way
        x, y = drawn[f"{name}.svg"][way]
        assert x == [1 + 2 * k for k in range(12)] and y == pytest.approx([100 * v for v in rows], abs=1e-4, nan_ok=True)
    assert list(m["before"]) == list(hier.WAYS) and list(m["after"]) == arms and set(drawn) == {"before.svg", "after.svg"}
    for way, table in tables.items():
        agree("before", way, w | {POSITIONS: table})
    codes = dict(hierarchical=lambda p: by_the_post(p, 0.3)[:L], random=lambda p: p,
                 anchor=lambda p: torch.stack([p[k % 8] + beta * (p[k // 8 + 1] - p[1]) for k in range(L)]))
    for way in arms:
        begin = w | ({POSITIONS: tables["random"]} if way == "random" else {})
        # 8 windows of 8 tokens a step in training: 2 of 24
        tuned = naive_train(begin, SMALL, train, L, 2, 3, 0.02, 3, 0.5, lambda step: (2, step, 2), codes[way])
        agree("after", way, tuned | {POSITIONS: codes[way](tuned[POSITIONS])})
        if way == "random":
            c, folder = hier.read_bert("out/hier_pos_bert/bert-24")
            assert c["max_position_embeddings"] == 24 and max(far(folder[k], tuned[k]) for k in tuned) < 1e-4
    control = naive_train(w, SMALL, train, 8, 8, 3, 0.02, 3, 0.5, lambda step: (2, step, 2), lambda p: p)
    assert m["control"] == pytest.approx(share(control, 8)[0], abs=1e-6)
    assert m["at_n"] == pytest.approx(share(w, 8)[0], abs=1e-6)
    common = Counter(train.tolist()).most_common(1)[0][0]
    _, where = naive_corrupt(test[None], naive_generator(1))
    assert m["asked"] == len(where[0]) == 30 and m["unigram"] == pytest.approx(np.mean([int(test[k]) == common for k in where[0]]))
    assert m["first_row"] == pytest.approx({"p_1": p[0].norm().item(), "others": p[1:].norm(dim=1).median().item()})
    assert m["exactness"]["closed form"] == 0 and m["exactness"]["(2) in (1)"] < 1e-6
    assert (m["n"], m["length"], m["step"], m["seed"]) == (8, 24, 30, 2) and set(m["far_mentions"]) == set(arms)
    assert m["tokens_per_second"] * m["train_seconds"] == pytest.approx(30 * 64)
    said = capsys.readouterr().out
    for name, value in ((f"at {L}, 3 steps, anchor", m["after"]["anchor"]), ("at 8, as many steps", m["control"]), ("at 8", m["at_n"])):
        assert f"{name:44}{100 * value:5.1f} %" in said
    assert {path.name for path in Path("out/hier_pos_bert").iterdir()} == {
        "ckpt.pt", "log.csv", "metrics.json", "before.svg", "after.svg", "bert-24"}
    for name in ("before.svg", "after.svg"):
        ElementTree.parse(f"out/hier_pos_bert/{name}")


def test_the_folder_of_the_first_arm_is_what_was_tuned(text):
    """Materialised: the same logits as the model with p as its parameter, read back by --bert too."""
    run(*TINY, "--steps", 4, "--arms", "hierarchical")
    vocab, args = hier.read_vocabulary(""), hier.parse_args([*TINY, "--arms", "hierarchical"])
    net = hier.Bert(SMALL)
    net.load_state_dict(state_of()["model"])
    text_part = naive_parts()[0]
    long = hier.tune(hier.stretched(net, "hierarchical", args), hier.masked_loss, text_part, 24, 2, vocab, args)
    c, state = hier.read_bert("out/hier_pos_bert/bert-24")
    flat = hier.Bert(c)
    flat.load_state_dict(state)
    tokens = text_part[None, :24]
    with torch.no_grad():
        assert far(flat(tokens), long(tokens)) < 1e-5 and torch.equal(flat.positions[:8], long.positions)
    assert long.positions.shape == (8, 16) and far(long.positions, net.positions) > 1e-4  # p itself has learnt
    assert metrics_of()["far_mentions"] == {"hierarchical": hier.far_mentions(long, naive_parts()[2], 24, 8, 2, vocab)}
    run("--bert", "out/hier_pos_bert/bert-24", "--data", "a.txt", "--steps", 0, "--times", 2, "--tune-steps", 0, "--eval-tokens", 500, "--out", "b")
    assert metrics_of("b")["at_n"] == metrics_of()["after"]["hierarchical"]


def words_text(path):
    rng = np.random.default_rng(1)
    Path(path).write_text(" ".join(rng.choice(["text", "hello", "unaffable", "日本", "foo!", "3.14"], 1500).tolist()))


def test_a_folder_without_a_head_is_trained_and_stretched(text):
    """--bert: word pieces, a new head, all weights trained at n; then the same experiment; what is written can be read."""
    words_text("w.txt")
    body = {k[5:]: v for k, v in weights().items() if k.startswith("bert.")}
    path = folder("f", body, kind="safetensors")
    argv = f"--bert {path} --data w.txt --batch-size 4 --times 3 --tune-steps 2 --eval-tokens 300 --span 1 --warmup 2 --lr 1e-3".split()
    run(*argv, "--steps", 3)
    m, got = metrics_of(), state_of()["model"]
    assert (m["n"], m["length"]) == (6, 18) and "control" in m and m["far_mentions"] and got.keys() == weights().keys()
    torch.manual_seed(0)
    fresh = hier.Bert(CONFIG | dict(vocab_size=len(VOCAB))).state_dict()
    pieces = hier.word_pieces(Path("w.txt").read_text(), IDS)
    part = len(Path("w.txt").read_bytes()) // 20
    cut = Path("w.txt").read_bytes()[:-2 * part]
    train = torch.tensor(hier.word_pieces(cut.decode("utf-8", "replace"), IDS))
    assert len(train) > 0.8 * len(pieces)
    begin = fresh | {f"bert.{k}": v for k, v in body.items()}

    def corrupt(text, g):
        return real(text, g, len(VOCAB))
    real = naive_corrupt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "naive_corrupt", corrupt)
        want = naive_train(begin, CONFIG, train, 6, 4, 3, 1e-3, 2, 1.0, lambda step: (0, step), lambda p: p)
    assert max(far(got[k], want[k]) for k in want) < 1e-4
    assert far(got["bert.embeddings.word_embeddings.weight"], body["embeddings.word_embeddings.weight"]) > 1e-4
    c, state = hier.read_bert("out/hier_pos_bert/bert-18")
    assert c["vocab_size"] == len(VOCAB) and hier.read_vocabulary("out/hier_pos_bert/bert-18")["words"] == VOCAB
    run("--resume", *argv[4:], "--steps", 4, "--alpha", 0.3)
    assert state_of()["step"] == 4 and metrics_of()["alpha"] == 0.3 and metrics_of()["tokens_per_second"] * metrics_of()["train_seconds"] == pytest.approx(4 * 6)  # of this run


def test_a_far_mention_is_six_bytes_or_one_word_piece(text, monkeypatch):
    spans = []
    monkeypatch.setattr(hier, "far_mentions", lambda net, text, length, reach, span, vocab: spans.append((length, reach, span)) or {})
    words_text("w.txt")
    run(*TINY, "--steps", 1, "--span", 0, "--arms", "tile", "--tune-steps", 1)
    run("--bert", folder("f", weights()), *"--data w.txt --steps 0 --batch-size 4 --times 3 --tune-steps 1 --eval-tokens 300 --arms tile --out b".split())
    assert spans == [(24, 8, 6), (18, 6, 1)] and metrics_of("b")["step"] == 0


def test_stretch_only(text, capsys):
    """No training: of a folder, with its head or without; and of a checkpoint, into its own folder."""
    path = folder("f", weights())
    run("--bert", path, "--stretch-only", "--times", 4, "--alpha", 0.3)
    c, state = hier.read_bert("out/hier_pos_bert/bert-24")
    want = weights()
    assert far(state.pop(POSITIONS), by_the_post(want.pop(POSITIONS).double(), 0.3)[:24]) < 1e-6
    assert c["max_position_embeddings"] == 24 and all(torch.equal(state[k], v) for k, v in want.items()) and state.keys() == want.keys()
    assert "bert-24" in capsys.readouterr().out and not Path("out/hier_pos_bert/ckpt.pt").exists()
    run("--bert", folder("g", {k: v for k, v in weights().items() if k.startswith("bert.")}), "--stretch-only", "--arms", "tile", "--out", "b")
    c, state = hier.read_bert("b/bert-24")
    assert torch.equal(state[POSITIONS], weights()[POSITIONS].repeat(4, 1)) and not any(k.startswith("cls") for k in state)
    run(*TINY, "--steps", 2, "--tune-steps", 0, "--out", "c")
    run("--resume", "--stretch-only", "--out", "c", "--times", 2)
    c, state = hier.read_bert("c/bert-16")
    assert torch.equal(state[POSITIONS][:8], state_of("c")["model"][POSITIONS]) and "cls.predictions.bias" in state
    run("--bert", path, *"--stretch-only --times 5 --eval-tokens 39 --span 39 --out d".split())  # no exam, so these are no matter
    assert hier.read_bert("d/bert-30")[0]["max_position_embeddings"] == 30


MATTERS = dict(  # flag: another value, and where it shows: in the weights (and so anywhere), in the report, in what is said
    data=("b.txt", "weights"), steps=(4, "weights"), batch_size=(4, "weights"), seed=(1, "weights"), n=(9, "weights"),
    width=(24, "weights"), layers=(1, "weights"), heads=(1, "weights"), lr=(1e-3, "weights"), warmup=(1, "weights"),
    clip_grad=(1e-3, "weights"), save_every=(1, "said"), alpha=(0.8, "report"), times=(2, "report"), arms=("tile", "report"),
    tune_steps=(9, "report"), tune_lr=(0.3, "report"), eval_tokens=(100, "report"), span=(12, "report"), classify=("c.tsv", "report"))


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed, name in enumerate(("a.txt", "b.txt")):
            write_text(name, seed)
        labelled_text("c.tsv")
        run(*TINY, "--steps", 3, "--out", "plain")
    return folder


@pytest.mark.parametrize("flag", MATTERS)
def test_every_flag_matters_and_only_where_it_should(plain_run, flag, monkeypatch, capsys):
    monkeypatch.chdir(plain_run)
    value, what = MATTERS[flag]
    run(*TINY, "--steps", 3, f"--{flag.replace('_', '-')}", value, "--out", flag)
    looks = capsys.readouterr().out.count("validation")
    a, b = ({"weights": {k: v.tolist() for k, v in state_of(out)["model"].items()},
             "report": {k: v for k, v in metrics_of(out).items() if "second" not in k},
             "said": said} for out, said in (("plain", 0), (flag, looks)))
    other = {key for key in a if a[key] != b[key]}
    assert what in other and (what == "weights" or other == {what})
    if flag == "save_every":
        assert looks == 2


def test_every_flag_of_the_tables_is_tried():
    common = "gpu out resume cache fp32 compile given config script own bert stretch_only".split()
    assert set(vars(hier.parse_args([]))) - set(common) == set(MATTERS)


def test_defaults():
    args = hier.parse_args([])
    assert (args.alpha, args.n, args.times, args.bert) == (0.4, 64, 4, "") and args.data == "python" and not args.given
    assert hier.heights(args) == (2e-3, 1e-3) and hier.heights(hier.parse_args(["--gpu"])) == (1e-3, 5e-4)
    assert hier.heights(hier.parse_args(["--bert", "f"])) == (1e-4, 5e-5) and hier.heights(hier.parse_args(["--lr", "3", "--tune-lr", "5"])) == (3, 5)
    gpu = hier.parse_args(["--gpu"])
    assert (gpu.steps, gpu.warmup, gpu.tune_steps, gpu.batch_size, gpu.width, gpu.layers) == (1800, 200, 400, 128, 256, 6)  # what the page's GPU row is of
    assert gpu.n == 128 and hier.parse_args(["--gpu", "--n", "64"]).n == 64


@pytest.mark.parametrize("argv, word", [
    ("--alpha 0.5", "--alpha 0.5"), ("--alpha 0", "--alpha 0"), ("--alpha 1", "--alpha 1"), ("--arms up", "up"), ("--heads 3", "--heads 3"),
    ("--times 1", "--times 1"), ("--times 8", "--times 8: 7 at most"), ("--n 7", "--n 7"), ("--stretch-only", "--stretch-only: needs"),
    ("--stretch-only --classify c.tsv", "--classify learns nothing"), ("--classify c.tsv --steps 0", "--data a.txt: with --classify"),
    ("--bert nowhere --n 8", "--n"), ("--bert nowhere", "--n"), ("--times 7 --n 40", "--data a.txt: 200 tokens"),
    ("--eval-tokens 23", "--eval-tokens 23"), ("--span 23", "--span 23")])
def test_wrong_flags_are_refused(text, capsys, argv, word):
    try:
        code = hier.main([*TINY, *argv.split()])
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code == 2 and "Traceback" not in err and word in err.splitlines()[-1], err
    assert not Path("out").exists()


def test_one_window_of_text_is_enough(text):
    run(*TINY, *"--n 40 --times 5 --steps 1 --tune-steps 1 --arms tile".split())  # 200 tokens to test on
    assert metrics_of()["length"] == 200 and metrics_of()["asked"] == 30


@pytest.mark.parametrize("step", [0, 1, 3, 9, 19])
def test_learning_rate(step):
    want = 2 * [0.25, 0.5, 0.75, 1][min(step, 3)] * (0.5 + 0.5 * math.cos(math.pi * step / 20))
    assert hier.learning_rate(step, 20, 2.0, 4) == pytest.approx(want)


def test_tuning_that_goes_astray_is_one_line(text, capsys):
    assert hier.main([*TINY, "--steps", "1", "--tune-lr", "1e18"]) == 1
    assert "--tune-lr" in capsys.readouterr().err and state_of()["step"] == 1 and not Path("out/hier_pos_bert/metrics.json").exists()


def test_every_window_is_drawn():
    """Of a text of 30 all 30 - 6 + 1 windows of 8, [CLS] and [SEP] among them; the loss is of the masked tokens alone."""
    args, vocab, seen = hier.parse_args(TINY), hier.read_vocabulary(""), []

    class Net(torch.nn.Linear):
        def forward(self, tokens, at):
            seen.append((tokens, at))
            return self.weight[:1].expand(len(at), -1)
    net, text = Net(261, 1), torch.arange(5, 35, dtype=torch.int32)
    for step in range(40):
        before = net.weight.detach().clone()
        value = hier.masked_loss(net, text, 8, 16, torch.Generator().manual_seed(step), vocab, args)
        assert hier.learn(net, hier.berts_adam(net), value, 1.0) == value and not torch.equal(net.weight, before)
        tokens, at = seen[-1]
        assert tokens.shape == (16, 8) and (tokens[:, 0] == 2).all() and (tokens[:, -1] == 3).all() and len(at) == 16
        assert (at // 8).tolist() == list(range(16)) and ((at % 8 > 0) & (at % 8 < 7)).all()
        first = [next(int(row[k]) - k + 1 for k in range(1, 7) if k != a) for row, a in zip(tokens, (at % 8).tolist())]
        truth = torch.tensor([f + a - 1 for f, a in zip(first, (at % 8).tolist())])
        want = torch.nn.functional.cross_entropy(before.expand(16, -1), truth)
        assert value.item() == pytest.approx(float(want), rel=1e-5)
        seen[-1] = set(first)
    assert set().union(*seen) == set(range(5, 30))


def test_tuning_reads_as_many_tokens_as_training(text, monkeypatch):
    """Of a model that is read, too, whose n is not --n; and a window at least."""
    seen, real = [], hier.masked_loss
    monkeypatch.setattr(hier, "masked_loss", lambda net, text, length, rows, *rest: seen.append((length, rows)) or real(net, text, length, rows, *rest))
    words_text("w.txt")
    run("--bert", folder("f", weights()), *"--data w.txt --steps 1 --batch-size 8 --times 4 --tune-steps 1 --eval-tokens 300 --arms tile".split())
    run(*TINY, "--steps", 1, "--tune-steps", 1, "--batch-size", 2, "--arms", "tile", "--out", "b")
    assert seen == [(6, 8), (24, 2), (6, 8), (8, 2), (24, 1), (8, 2)]


def test_learns(text):
    """Eight letters over and over: nearly all is told at n, little when stretched, and most again after a short tuning."""
    Path("a.txt").write_bytes((b"abcdefgh" * 800)[:6000])
    run(*TINY, *"--steps 500 --n 12 --width 32 --lr 5e-3 --clip-grad 1 --warmup 20 --batch-size 16 --tune-steps 300".split(),
        *"--tune-lr 5e-3 --arms hierarchical".split())
    m = metrics_of()
    assert m["at_n"] > 0.9 and m["unigram"] < 0.3 and m["after"]["hierarchical"] > 0.6 > m["before"]["hierarchical"]


def test_compile_reaches_every_training(text, monkeypatch):
    """What learns is compiled, the control and each arm too; a look or an exam, with windows of many shapes, is not."""
    compiled, learnt, real = [], [], hier.learn
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    monkeypatch.setattr(hier, "learn", lambda net, *rest: learnt.append(net) or real(net, *rest))
    run(*TINY, "--steps", 2)
    assert learnt and not compiled
    learnt.clear()
    run(*TINY, "--steps", 2, "--compile", "--out", "b")
    assert len(compiled) == 1 + 3 + 1 and len({id(net) for net in learnt}) == 5 and all(any(net is other for other in compiled) for net in learnt)


@torch.no_grad()
def test_compiled_it_computes_the_same():
    torch._dynamo.reset()
    net = hier.stretch(model(), "hierarchical", 24, 0.4, torch.Generator())
    tokens, at = torch.randint(21, (2, 20)), torch.tensor([3, 30])
    want = net(tokens, at=at)
    net.compile(backend="eager", fullgraph=True)
    assert far(net(tokens, at=at), want) < 1e-12
    torch._dynamo.reset()


# ---- labels ----

def labelled_text(path, count=90, seed=0):
    """Lines of label, tab, text: long ones and short, sorted by label, which is told by the last word alone."""
    rng = np.random.default_rng(seed)
    rows = [(f"kind {k % 3}", " ".join([*rng.choice(["ab", "cde", "f"], rng.integers(0, 9)), "xyz"[k % 3]])) for k in range(count)]
    Path(path).write_text("".join(f"{label}\t{text}\n" for label, text in sorted(rows)))
    return rows


def naive_documents(path, length):
    """In the run's order: the label's number and the tokens, [CLS] and [SEP] counted in, cut to length; the held-out tenth apart."""
    lines = [line.split("\t") for line in Path(path).read_text().splitlines()]
    names = list(dict.fromkeys(label for label, _ in lines))
    rows = [(names.index(label), [2, *(5 + byte for byte in text.encode()), 3][:length]) for label, text in lines]
    order = torch.randperm(len(rows), generator=naive_generator(4)).tolist()
    mixed = [rows[k] for k in order]
    return mixed[:len(rows) // 10], mixed[len(rows) // 10:]


def naive_label_logits(w, c, tokens):
    return states_by_loops(w, c, tokens, range(len(tokens)))[0] @ w["last.weight"].T + w["last.bias"]


def naive_classifier(w, train, length, steps, rows, lr, warmup, clip, key, codes):
    """The body and a new last layer, fine-tuned; codes(p) is the table of positions."""
    w = {k: v for k, v in w.items() if k.startswith("bert.")} | {"last.weight": torch.zeros(3, 16), "last.bias": torch.zeros(3)}

    def loss(w, step):
        table = w | {POSITIONS: codes(w[POSITIONS])}
        chosen = [train[k] for k in torch.randint(len(train), (rows,), generator=naive_generator(*key(step))).tolist()]
        return sum(-naive_label_logits(table, SMALL, tokens[:length]).log_softmax(0)[k] for k, tokens in chosen) / rows
    return naive_adam(w, loss, steps, lr, warmup, clip)


def kept(patch):
    """The nets that `tune` returns, in turn."""
    nets, real = [], hier.tune
    patch.setattr(hier, "tune", lambda net, *rest: nets.append(real(net, *rest)) or net)
    return nets


CLASSIFY = [*TINY, "--classify", "c.tsv", "--tune-steps", 4, "--tune-lr", 0.02, "--alpha", 0.3, "--seed", 2, "--batch-size", 4]


def test_labels_learnt_and_told_again_from_the_checkpoint(text, monkeypatch, capsys):
    """A naive second run from ckpt.pt reaches the weights of each classifier, and all that metrics.json says follows from these."""
    labelled_text("c.tsv", 300)
    arms = ["anchor", "random", "hierarchical"]
    nets, widths, real = kept(monkeypatch), {True: [], False: []}, hier.Classifier.forward
    monkeypatch.setattr(hier.Classifier, "forward", lambda net, tokens: widths[torch.is_grad_enabled()].append(tokens.shape[1]) or real(net, tokens))
    run(*CLASSIFY, "--steps", 3, "--arms", *arms)
    assert widths == {True: [8] * 4 + [24] * 12, False: [8] * 8 + [24] * 24}
    m, w, said = metrics_of(), {k: v.double() for k, v in state_of()["model"].items()}, capsys.readouterr().out
    held, train = naive_documents("c.tsv", 24)
    p, beta = w[POSITIONS], 3 / 7
    fresh = torch.cat([p, p.mean(0) + p.std(0) * torch.randn(16, 16, generator=naive_generator(2, 0, 3))])
    codes = dict(hierarchical=lambda p: by_the_post(p, 0.3)[:24], random=lambda p: p,
                 anchor=lambda p: torch.stack([p[k % 8] + beta * (p[k // 8 + 1] - p[1]) for k in range(24)]))
    longer = [len(tokens) > 8 for _, tokens in held]
    assert 0 < sum(longer) < len(held) == 30 == m["held_out"] and m["longer"] == sum(longer) and (m["n"], m["length"]) == (8, 24)
    common = Counter(k for k, _ in train).most_common(1)[0][0]
    assert common != 0  # which it would be of all three hundred
    want = {"the commonest label": [common == k for k, _ in held]}
    for net, (length, way) in zip(nets, [(8, "hierarchical"), *((24, way) for way in arms)], strict=True):
        cut = [(k, tokens[:length]) for k, tokens in train]
        begin = w | ({POSITIONS: fresh} if way == "random" else {})
        tuned = naive_classifier(begin, cut, length, 4, 4, 0.02, 3, 0.5, lambda step: (2, step, 2), codes[way])
        got = {k.removeprefix("net."): v for k, v in net.state_dict().items()}
        assert got.keys() == tuned.keys() and max(far(got[k], tuned[k]) for k in tuned) < 1e-4, way
        assert far(got["last.weight"], torch.zeros(3, 16)) > 1e-2 and far(got[POSITIONS], begin[POSITIONS]) > 1e-3
        table = tuned | {POSITIONS: codes[way](tuned[POSITIONS])}
        want[f"at {length}, {way}"] = [int(naive_label_logits(table, SMALL, tokens[:length]).argmax()) == k for k, tokens in held]
    assert list(m["right"]) == list(want)
    for what, right in want.items():
        shares = np.mean(right), np.mean([r for r, far_ in zip(right, longer) if far_])
        assert (m["right"][what]["all"], m["right"][what]["longer"]) == pytest.approx(shares)
        assert f"{what:44}{100 * shares[0]:5.1f} %, if longer than 8 {100 * shares[1]:5.1f} %" in said
    assert m["first_row"] == pytest.approx({"p_1": p[0].norm().item(), "others": p[1:].norm(dim=1).median().item()}) and m["step"] == 3
    assert {path.name for path in Path("out/hier_pos_bert").iterdir()} == {"ckpt.pt", "log.csv", "metrics.json"}


@given(st.integers(0, 4), SEEDS, st.sampled_from(hier.WAYS))
@torch.no_grad()
def test_documents_no_longer_than_n_are_told_alike_with_and_without_the_extension(longest, seed, way):
    """To the bit; alone, too, to rounding: what pads a document changes nothing."""
    assume(way != "interpolate")
    vocab, g = hier.read_vocabulary(""), torch.Generator().manual_seed(seed)
    net = model(seed, vocab_size=261)
    texts = [torch.randint(5, 261, (k,), generator=g) for k in (longest, 0, longest // 2)]  # n is 6
    rows = torch.nn.utils.rnn.pad_sequence([hier.frame(text, vocab) for text in texts], True)
    before, after = (hier.Classifier(hier.stretch(net, w, L, 0.4, g), 3, 0).double() for w, L in (("tile", 6), (way, 24)))
    for head in (before, after):
        head.last.weight.copy_(draws(3, 12, seed=seed))
    logits = after(torch.nn.functional.pad(rows, (0, 9)))  # padding of the whole batch is cut
    assert torch.equal(logits, before(rows)) and far(logits, torch.zeros(3, 3)) > 1e-3
    for text, row in zip(texts, logits):
        assert far(after(hier.frame(text, vocab)[None])[0], row) < 1e-10


@torch.no_grad()
def test_the_classifier_by_loops():
    net = model()
    w = net.state_dict()
    told = hier.Classifier(hier.stretch(net, "hierarchical", 24, 0.3, torch.Generator()), 3, 7).double()
    assert not any(k.startswith("net.cls") for k in told.state_dict()) and not any(p.any() for p in told.last.parameters())
    told.last.weight.copy_(draws(3, 12)), told.last.bias.copy_(draws(3, seed=1))
    w |= {"last.weight": draws(3, 12), "last.bias": draws(3, seed=1), POSITIONS: by_the_post(w[POSITIONS], 0.3)}
    tokens = [[2, 9, 11, 3], [2, 8, 8, 12, 13, 14, 15, 16, 17, 18, 19, 3]]
    rows = torch.tensor([tokens[0] + [7] * 8, tokens[1]])
    for row, want in zip(told(rows), tokens):
        assert far(row, naive_label_logits(w, CONFIG, want)) < 1e-9


def test_labelled_documents_are_read(text):
    """Lines, or CLUE's JSON, packed or not, of UTF-16 too: the same rows; what is too long is cut, and each line is there once."""
    rows = sorted(labelled_text("c.tsv"))
    labelled, vocab = Path("c.tsv").read_bytes(), hier.read_vocabulary("")

    def read(name):
        args = hier.parse_args([*TINY, "--classify", name])
        return hier.load_labelled(args, torch.device("cpu"), vocab, 8)
    got = read("c.tsv")
    held, train = naive_documents("c.tsv", 24)
    assert got.shape == (90, 25) and [row[0] for row in got.tolist()] == [k for k, _ in held + train]
    for row, (_, tokens) in zip(got.tolist(), held + train):
        assert row[1:] == tokens + [0] * (24 - len(tokens))
    Path("c.json").write_text("\n".join(json.dumps(dict(id=1, label=label, sentence=line)) for label, line in rows) + "\n\n")
    Path("c.tsv.gz").write_bytes(hier.gzip.compress(labelled))
    Path("u.tsv").write_bytes(labelled.decode().encode("utf-16"))
    assert all(torch.equal(read(name), got) for name in ("c.json", "c.tsv.gz", "u.tsv"))
    Path("t.tsv").write_text("".join(f"{k % 2}\ta\tb\n" for k in range(10)))
    assert read("t.tsv")[:, 1:].tolist() == [[2, 5 + 97, 5 + 9, 5 + 98, 3]] * 10  # further tabs are text


@pytest.mark.parametrize("body, words", [
    (None, ["no such file"]), ("folder", ["no such file"]), (b"", ["nothing in it"]), (b"\n\n", ["line 1"]), (b"a\tx\nno tab\nb\ty\n" * 9, ["line 2", "tab"]),
    (b"a\tx\n" * 12, ["12 lines", "labels 1"]), (b"".join(b"text %d\tlabel\n" % k for k in range(12)), ["labels 12", "half as many"]), (b"a\tx\nb\ty\n" * 4, ["8 lines", "10"]), (b"{\"label\": 1}\n", ["line 1"]), (b"a\tx\n{\"label\": 1, \"sent\n", ["line 2"]),
    (b"{\"label\": 1, \"sentence\": 3}\n", ["line 1", "JSON"]), ("a\té\n".encode("latin1") * 12, ["UTF-8", "iconv"]), (b"\x1f\x8bx", ["damaged"])])
def test_labelled_documents_that_are_refused(text, capsys, body, words):
    """One line, before anything is trained or written."""
    name = "c.tsv.gz" if body == b"\x1f\x8bx" else "c.tsv"
    if body == "folder":
        Path(name).mkdir()
    elif body is not None:
        Path(name).write_bytes(body)
    assert hier.main([*TINY, "--steps", "1", "--classify", name]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"--classify {name}" in err and "--data" not in err and "shakespeare" not in err and all(word in err for word in words), err
    assert not Path("out").exists()


def test_labels_take_tuning_and_their_number_is_said(text, capsys):
    Path("c.tsv").write_text("".join(f"{k % 3}\ttext {k}\n" for k in range(24)))
    assert hier.main([*TINY, "--steps", "1", "--classify", "c.tsv", "--tune-steps", "0"]) == 2
    assert "--tune-steps" in capsys.readouterr().err
    run(*TINY, "--steps", 1, "--classify", "c.tsv", "--tune-steps", 1, "--arms", "tile")
    assert "c.tsv: 24 documents with 3 labels, a tenth held out\n" in capsys.readouterr().out


def test_labels_alone_need_no_text(text, monkeypatch):
    """Without --steps there is nothing for --data to teach: it is not read, and refused."""
    labelled_text("c.tsv")
    load = hier.load_text
    monkeypatch.setattr(hier, "load_text", lambda name, cache: load(name, cache) if name == "c.tsv" else pytest.fail(name))
    run(*[word for word in CLASSIFY if word not in ("--data", "a.txt")], "--steps", 0, "--arms", "tile")


def test_labels_again_from_the_checkpoint(text, monkeypatch):
    """--resume goes on after a cut in the training, and after one in the tuning; --classify may come later, or with other --arms."""
    labelled_text("c.tsv")
    argv = [*CLASSIFY, "--steps", 4, "--arms", "hierarchical"]
    run(*argv, "--out", "a")
    for cut, out in ((2, "b"), (4 + 2, "c")):  # the calls of learn: 4 steps at n, then 4 of each classifier
        with pytest.MonkeyPatch.context() as patch:
            calls, real = [], hier.learn
            patch.setattr(hier, "learn", lambda *rest: calls.append(1) or (len(calls) == cut and hier.signal.raise_signal(hier.signal.SIGINT)) or real(*rest))
            assert hier.main([str(word) for word in [*argv, "--out", out]]) == 130
        assert state_of(out)["step"] == min(cut, 4) and not Path(out, "metrics.json").exists()
        run(*argv, "--out", out, "--resume")
    run(*TINY, "--seed", 2, "--batch-size", 4, "--steps", 4, "--tune-steps", 0, "--out", "d")
    run(*argv, "--out", "d", "--resume")
    results = [{k: v for k, v in metrics_of(out).items() if "second" not in k} for out in "abcd"]
    assert all(result == results[0] for result in results)
    for out in "bcd":
        assert all(torch.equal(v, state_of("a")["model"][k]) for k, v in state_of(out)["model"].items())


def test_a_rank_reads_its_own_documents(monkeypatch):
    args, seen, documents = hier.parse_args([]), [], torch.arange(90).view(30, 3)

    def net(tokens):
        seen.append(tokens[:, 0].tolist())
        return torch.zeros(len(tokens), 90)

    def once():
        hier.label_loss(net, documents, 2, 6, torch.Generator().manual_seed(0), {}, args)
    once()
    monkeypatch.setattr(hier, "RANKS", 2)
    for rank in range(2):
        monkeypatch.setattr(hier, "RANK", rank)
        once()
    assert seen[0] == seen[1] + seen[2] and len(seen[1]) == 3 and set(seen[0]) <= set(range(1, 90, 3))


def test_two_ranks_learn_the_labels_of_one(text, python):
    labelled_text("c.tsv", 200)
    argv = [str(word) for word in [*CLASSIFY, "--steps", 1, "--arms", "hierarchical", "tile", "--tune-steps", 30]]
    for process in python.ranks(Path(hier.__file__), *argv, "--out", "two"):
        assert (process.wait(), process.err()) == (0, "")
    run(*argv, "--out", "one")
    assert metrics_of("two")["right"] == metrics_of("one")["right"]
    assert len({json.dumps(share) for share in metrics_of("one")["right"].values()}) > 1


def test_labels_of_a_folders_words(text):
    """--bert, its word pieces, no training before: the same body is tuned; here what tells the label stands beyond n."""
    rng = np.random.default_rng(0)
    rows = [("good" if k % 2 else "bad", " ".join([*rng.choice(["text", "hello", "foo"], 6), "unaffable" if k % 2 else "naive"])) for k in range(400)]
    Path("c.tsv").write_text("".join(f"{label}\t{line}\n" for label, line in rows))
    words_text("w.txt")
    path = folder("f", weights())
    run("--bert", path, *"--classify c.tsv --steps 0 --times 2 --tune-steps 150 --tune-lr 5e-3 --eval-tokens 300 --arms hierarchical".split())
    right = metrics_of()["right"]
    assert metrics_of()["longer"] == metrics_of()["held_out"] == 40 and all(share["all"] == share["longer"] for share in right.values())
    assert right["at 12, hierarchical"]["all"] == 1 and right["at 6, hierarchical"]["all"] < 0.75 > right["the commonest label"]["all"]
    assert all(torch.equal(v, weights()[k]) for k, v in state_of()["model"].items())  # what was read


def test_compiled_the_classifier_tells_the_same():
    """In batches of other lengths too."""
    torch._dynamo.reset()
    told = hier.Classifier(hier.stretch(model(), "hierarchical", 24, 0.4, torch.Generator()), 3, 0).double()
    torch.nn.init.normal_(told.last.weight)
    batches = [torch.randint(1, 21, (2, length)) for length in (5, 9, 20)]
    want = [told(tokens) for tokens in batches]
    run = torch.compile(told, backend="eager")
    assert all(far(run(tokens), logits) < 1e-12 for tokens, logits in zip(batches, want))
    torch._dynamo.reset()


# ---- the experiments ----

def test_the_arms_run_for_two_steps(text, capsys):
    argv = [*TINY, "--steps", "2", "--alphas", "0.2", "0.6", "--seeds", "0", "1", "--figure", "f.svg"]
    table = arms_of.main(argv)
    assert list(table) == ["0.2", "0.6", "u = p", "anchor", "tied", "tile", "at 8"] and all(np.shape(rows) == (2, 2) for rows in table.values())
    assert "| u = p | " in capsys.readouterr().out and ElementTree.parse("f.svg")
    run(*TINY, "--steps", 2, "--alpha", 0.6, "--arms", "hierarchical", "tile", "anchor", "--out", "one")
    m = metrics_of("one")
    for name, way in (("0.6", "hierarchical"), ("tile", "tile"), ("anchor", "anchor")):
        if way != "anchor":
            assert table[name][0] == pytest.approx([100 * m["before"][way], 100 * m["after"][way]])
    assert table["at 8"][0] == pytest.approx([100 * m["at_n"], 100 * m["control"]])


@torch.no_grad()
def test_the_arms_codes():
    net, args = model(), hier.parse_args(["--times", "3"])
    p, tokens = net.positions, torch.randint(21, (1, 18))
    w = net.state_dict()
    for name, code in (("u = p", lambda i, j: 0.4 * p[i] + 0.6 * p[j]), ("tied", lambda i, j: p[j]), ("0.2", lambda i, j: p[j] + (p[i] - p[0]) / 4)):
        table = torch.stack([code(k // 6, k % 6) for k in range(18)])
        assert far(arms_of.arm(net, name, args)(tokens)[0], bert_by_loops(w | {POSITIONS: table}, CONFIG, tokens[0], range(18))) < 1e-9


def test_drift_by_loops(text, capsys):
    words_text("w.txt")
    path = folder("f", weights())
    rows = drift.main([path, "w.txt", "--windows", "3", "--alphas", "0.4", "--figure", "f.svg"])
    assert list(rows) == ["alpha 0.40", *hier.WAYS[1:]] and ElementTree.parse("f.svg")
    net = hier.Bert(CONFIG | dict(vocab_size=len(VOCAB))).double()
    net.load_state_dict(weights())
    tokens = hier.word_pieces(Path("w.txt").read_text(), IDS)
    p = net.positions
    table = {"tile": torch.cat([p, p]), "alpha 0.40": by_the_post(p, 0.4)[:12]}
    with torch.no_grad():
        for name in table:
            cosine = [[], []]
            for k in range(3):
                a, b = tokens[8 * k:8 * k + 4], tokens[8 * k + 4:8 * k + 8]
                long = hier.plain(hier.stretch(net, "tile", 12, 0.4, torch.Generator()), 12)
                long.positions.copy_(table[name])
                states = long.body(torch.tensor([[2, *a, *b, 3]]))[0]
                for part, (first, text_) in enumerate(((1, a), (5, b))):
                    own = net.body(torch.tensor([[2, *text_, 3]]))[0, 1:5]
                    cosine[part] += [float(x @ y / x.norm() / y.norm()) for x, y in zip(states[first:first + 4], own)]
            assert rows[name][:2] == pytest.approx([np.mean(cosine[0]), np.mean(cosine[1])], abs=1e-5)
            assert rows[name][2] == pytest.approx(float(table[name][6:].norm(dim=1).median() / p[1:].norm(dim=1).median()), abs=1e-5)


def test_memory_grows_with_the_length_and_not_with_its_square(capsys):
    """Of each layer some tens of widths a token are kept, weights left out; a table of attention would be 12 MB more at 1024."""
    small = memory.main("--lengths 512 1024 --n 64 --layers 3 --width 64 --words 300".split())
    a_token = small[512] / 512 / 64 / 4 / 3
    assert 16 < a_token < 40 and small[1024] / small[512] == pytest.approx(2, rel=0.02)
    said = capsys.readouterr().out.splitlines()
    weights = sum(p.numel() for p in hier.Bert(CONFIG | dict(vocab_size=300, hidden_size=64, num_hidden_layers=3, num_attention_heads=1,
                                                            intermediate_size=256, max_position_embeddings=64)).parameters())
    assert said[0].endswith(f" {16 * weights / 1e9:.2f} GB") and said[3:] == [
        f"| {length} | {size / 1e6:.0f} | {math.floor((24e9 - 16 * weights) / size)} |" for length, size in small.items()]


@pytest.mark.parametrize("name", ["hier_pos_bert_arms", "hier_pos_bert_drift", "hier_pos_bert_memory"])
def test_experiments_run_from_anywhere(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXPERIMENTS / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0 and f"tests/experiments/{name}.py" in capsys.readouterr().out
