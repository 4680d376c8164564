"""Times the inner steps of a script, and of an installed peer in turn. Not collected by pytest.

    python tests/bench.py ddpm --peer diffusers --threads 2
    python tests/bench.py rope --peer rotary-embedding-torch --threads 1
    python tests/bench.py w2v_svd --peer gensim --threads 2
    python tests/bench.py hier_pos_bert --peer transformers --threads 1
    python tests/bench.py transformer_vq --peer vector-quantize-pytorch --threads 1
    python tests/bench.py o_gan --threads 1
    python tests/bench.py nvae --threads 1
    python tests/bench.py bigan_qp --threads 1
    python tests/bench.py ddpm --gpu --compile

A line of JSON for each thing timed: the median of seconds over --repeats, the smallest and the largest,
items per second, peak memory, and with a peer the ratio of the medians (above 1: this project is faster).
The arms take turns in random order, so that what else the machine does meets all alike. Peers are never installed here.
"""

import argparse
import functools
import json
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

# what is timed, how many items a call handles, and the arms: "ours" first, then the peer's
Case = tuple[str, int, dict[str, Callable[[], object]]]


def cases_ddpm(opt: argparse.Namespace) -> Iterator[Case]:
    """The --paper U-Net of 35.7M parameters: a training step with Adam and EMA, and a sampling step.

    Peer diffusers: UNet2DModel as google/ddpm-cifar10-32 configures it, in the same loop.
    """
    import copy

    import ddpm

    batch = opt.batch or (128 if opt.gpu else 16)
    device = torch.device("cuda" if opt.gpu else "cpu")
    s = {name: row.to(device) for name, row in ddpm.make_schedule(1000, "paper").items()}
    nets = {"ours": ddpm.UNet()}
    if opt.peer == "diffusers":
        from diffusers import UNet2DModel

        class Peer(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = UNet2DModel(
                    sample_size=32, in_channels=3, out_channels=3, layers_per_block=2,
                    block_out_channels=(128, 256, 256, 256), dropout=0.1,
                    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
                    attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False,
                    freq_shift=1, norm_eps=1e-6, norm_num_groups=32)

            def forward(self, x, t):
                return self.net(x, t).sample

        nets["diffusers"] = Peer()
    x0, eps = torch.randn(2, batch, 3, 32, 32, device=device)
    t = torch.randint(1, 1001, (batch,), device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=opt.gpu and not opt.fp32)

    def trainer(net: torch.nn.Module) -> Callable[[], object]:
        ema = list(copy.deepcopy(net).parameters())
        params = list(net.parameters())
        adam = torch.optim.Adam(params, lr=1e-4, fused=True)
        run = torch.compile(net) if opt.compile else net

        def step() -> None:
            net.train()
            with autocast:
                value = ddpm.loss(run, x0, t, eps, s).mean()
            value.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            adam.step()
            adam.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(ema, params, 1e-4)
        return step

    def sampler(net: torch.nn.Module) -> Callable[[], object]:
        run = torch.compile(net) if opt.compile else net
        sigma = ddpm.sigmas("beta", s)

        @torch.no_grad()
        def step() -> None:
            net.eval()
            with autocast:
                ddpm.step_back(x0, t, run(x0, t), eps, sigma, s)
        return step

    layout = torch.contiguous_format if opt.gpu else torch.channels_last  # as in ddpm.build; either may use it
    nets = {who: net.to(device, memory_format=layout) for who, net in nets.items()}
    print(json.dumps({who: sum(p.numel() for p in net.parameters()) for who, net in nets.items()}))
    yield "training step", batch, {who: trainer(net) for who, net in nets.items()}
    yield "sampling step", batch, {who: sampler(net) for who, net in nets.items()}


def cases_o_gan(opt: argparse.Namespace) -> Iterator[Case]:
    """A whole update of both players, the bare run's nets; beside it the same without rho, and DCGAN's on the same nets:
    binary cross-entropy, first E on real and fake, then G through E once more, each with its own Adam.
    """
    import copy

    import o_gan
    import torch.nn.functional as F

    args, device = o_gan.parse_args(["--gpu"] if opt.gpu else []), torch.device("cuda" if opt.gpu else "cpu")
    batch = opt.batch or args.batch_size
    first = o_gan.build(args, (3, args.size, args.size), device)
    x = torch.rand(batch, 3, args.size, args.size, device=device) * 2 - 1
    z = torch.randn(batch, args.n_z, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=opt.gpu and not opt.fp32)

    def players() -> tuple[o_gan.OGan, list, list]:
        nets = copy.deepcopy(first)
        if opt.compile:
            nets.E.compile()
            nets.G.compile()
        return nets, list(nets.E.parameters()), list(nets.G.parameters())

    def game(lambda_2: float) -> Callable[[], object]:
        nets, E_params, G_params = players()
        adam = o_gan.optimizer(nets, args)

        def step() -> None:
            with autocast:
                y = nets.G(z)
                hx, hy = nets.E(x), nets.E(y)
            if lambda_2:
                for_E = o_gan.critic_loss(x, y, z, hx, hy, args.lambda_1, lambda_2)
                for_G = o_gan.generator_loss(z, hy, lambda_2)
            else:
                for_G = o_gan.avg(hy)
                for_E = o_gan.avg(hx) - for_G + args.lambda_1 * o_gan.R(x, y, hx, hy)
            for_E.mean().backward(inputs=E_params, retain_graph=True)
            for_G.mean().backward(inputs=G_params)
            adam.step()
            adam.zero_grad()
        return step

    nets, E_params, G_params = players()
    adams = [torch.optim.Adam(params, lr=2e-4, betas=(0.5, 0.999), fused=True) for params in (E_params, G_params)]

    def dcgan() -> None:
        with autocast:
            y = nets.G(z)
            scores = [o_gan.avg(nets.E(v)) for v in (x, y.detach())]
        value = F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean()
        value.backward(inputs=E_params)
        adams[0].step()
        adams[0].zero_grad()
        with autocast:
            score = o_gan.avg(nets.E(y))
        F.softplus(-score).mean().backward(inputs=G_params)
        adams[1].step()
        adams[1].zero_grad()
    yield "update of both players", batch, {"ours": game(args.lambda_2), "without rho": game(0), "DCGAN": dcgan}


def cases_rope(opt: argparse.Namespace) -> Iterator[Case]:
    """The rotation of q and k, (1, 12, 4096, 64), tables ready; then training steps of the model.

    Peers rotary-embedding-torch and transformers (its Llama form, half-split). "complex multiply" is
    the bare product, which is what memory allows. First, lines with the largest error of a rotated
    vector of length 1 at positions up to 10^6, in float32 and bfloat16, against float64.
    """
    import rope

    device = torch.device("cuda" if opt.gpu else "cpu")
    theta, d = rope.thetas(64).to(device), 64
    x = torch.randn(2, 1, 12, 4096, d, device=device)
    tables = rope.rotary_table(torch.arange(4096, device=device), theta)
    polar = torch.complex(*tables)
    ours = torch.compile(rope.rotate) if opt.compile else rope.rotate

    def bare(q: torch.Tensor, k: torch.Tensor) -> tuple:
        return tuple(torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * polar).flatten(-2)
                     for x in (q, k))

    arms = {"ours": lambda q, k: (ours(q, *tables), ours(k, *tables)), "complex multiply": bare}
    at = {"ours": lambda x, n: rope.rotate(x, *rope.rotary_table(torch.tensor([n], device=device), theta))}
    if opt.peer == "rotary-embedding-torch":
        from rotary_embedding_torch import RotaryEmbedding

        peer = RotaryEmbedding(d).to(device)
        arms[opt.peer] = lambda q, k: (peer.rotate_queries_or_keys(q), peer.rotate_queries_or_keys(k))
        at[opt.peer] = lambda x, n: RotaryEmbedding(d).to(device).rotate_queries_or_keys(x, offset=n)
    if opt.peer == "transformers":
        from transformers.models.llama import modeling_llama as llama

        peer = llama.LlamaRotaryEmbedding(llama.LlamaConfig(hidden_size=12 * d, num_attention_heads=12))
        cos_sin = peer.to(device)(x[0], torch.arange(4096, device=device)[None])
        arms[opt.peer] = lambda q, k: llama.apply_rotary_pos_emb(q, k, *cos_sin)
        order = rope.half_order(d).to(device)

        def llama_at(x: torch.Tensor, n: int) -> torch.Tensor:
            y = llama.apply_rotary_pos_emb(x[..., order], x[..., order],
                                           *peer(x, torch.tensor([[n]], device=device)))[0]
            return y[..., order.argsort()]
        at[opt.peer] = llama_at
    v = torch.nn.functional.normalize(torch.randn(1, 12, 1, d, device=device), dim=-1)
    for dtype in (torch.float32, torch.bfloat16):
        for who, turn in at.items():
            error = {}
            for n in (10**2, 10**3, 10**4, 10**5, 10**6):
                exact = v.to(dtype).double() @ rope.rotation(torch.tensor(float(n)).to(theta), theta).T
                error[str(n)] = float(f"{(turn(v.to(dtype), n).double() - exact).norm(dim=-1).max():.2g}")
            print(json.dumps(dict(error_of=who, dtype=str(dtype), at=error)))
    for dtype in (torch.float32, torch.bfloat16):
        q, k = x.to(dtype)
        some = {who: arm for who, arm in arms.items() if dtype == torch.float32 or "complex" not in who}
        yield f"rotate q and k, {dtype}, forward", 4096, {
            who: functools.partial(torch.no_grad()(arm), q, k) for who, arm in some.items()}

        def both(arm: Callable, q: torch.Tensor, k: torch.Tensor) -> None:
            q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
            torch.autograd.grad(arm(q, k), (q, k), (k.detach(), q.detach()))
        yield f"rotate q and k, {dtype}, forward and backward", 4096, {
            who: functools.partial(both, arm, q, k) for who, arm in some.items()}
    if opt.peer:
        return
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=opt.gpu and not opt.fp32)
    args = rope.parse_args(["--gpu"] if opt.gpu else [])
    batch = opt.batch or args.batch_size
    tokens = torch.randint(256, (batch, args.context + 1), device=device)
    steps = {}
    for position in rope.POSITIONS:
        net = rope.LanguageModel(position, args.width, args.layers, args.heads, args.context).to(device)
        run, adam = torch.compile(net) if opt.compile else net, rope.optimiser(net, 1e-3)

        def step(run: torch.nn.Module = run, adam: torch.optim.Optimizer = adam) -> None:
            with autocast:
                value = rope.loss(run, tokens).mean()
            value.backward()
            adam.step()
            adam.zero_grad()
        steps["ours" if position == "rope" else position] = step
    yield "training step, by position code (ours: rope)", batch * args.context, steps


def cases_w2v_svd(opt: argparse.Namespace) -> Iterator[Case]:
    """From tokens to 100 numbers a word, the standard library's text, at the defaults of each: the SVD beside gensim's 5
    epochs of SGNS; then an epoch of SGNS by the script's loop (--batch places a step) beside one of gensim's.

    Peer gensim: sg=1, window 5, 5 negatives, subsampling at 1e-3 by itself, --threads workers.
    """
    import tempfile
    import types

    import w2v_svd as w

    device, folder = torch.device("cuda" if opt.gpu else "cpu"), tempfile.TemporaryDirectory()
    flags = ["--data=python", "--dim=100", f"--out={folder.name}/run", *["--compile"] * opt.compile, *["--fp32"] * opt.fp32]
    flags += [f"--batch-size={opt.batch}"] * bool(opt.batch) + ["--gpu"] * opt.gpu
    args = w.parse_args([*flags, "--steps=30"])
    words, n, tokens, docs = w.load_data(args, device, None)
    arms = {"ours": lambda: w.vectors(*w.solve(args, tokens, docs, len(words)), args.p)}
    sgns = w.parse_args([*flags, "--model=skipgram", f"--steps={-(-len(tokens) // args.batch_size)}"])
    silent = types.SimpleNamespace(add=lambda *_, **__: None)
    epoch = {"ours": lambda: w.descend(sgns, tokens, docs, n, None, silent)}
    if opt.peer == "gensim":
        from gensim.models import Word2Vec

        _, _, whole, lines = w.load_data(w.parse_args(["--data=python", "--sample=0"]), torch.device("cpu"), None)
        texts = [[words[k] for k in doc.tolist()] for doc in whole.split(torch.bincount(lines).tolist()) if len(doc)]
        texts = [doc[k:k + 10_000] for doc in texts for k in range(0, len(doc), 10_000)]  # its limit
        peer = functools.partial(Word2Vec, texts, vector_size=100, sg=1, min_count=5, seed=0, workers=torch.get_num_threads())
        arms["gensim"], epoch["gensim"] = peer, functools.partial(peer, epochs=1)
    yield "tokens to vectors, SVD; gensim: 5 epochs", int(n.sum()), arms
    yield "tokens to vectors, SGNS, one epoch", int(n.sum()), epoch


def cases_transformer_vq(opt: argparse.Namespace) -> Iterator[Case]:
    """vq_attention at 8,192 tokens, d_k 64, d_v 128, c = M = 512, beside torch's causal attention of d_v wide heads.

    Then a step of training by kind of attention (at --batch 4, the bare run's model), a token of decoding, and the
    quantiser with its moving average, 16,384 keys. Peer vector-quantize-pytorch: VectorQuantize in training mode.
    """
    import torch.nn.functional as F
    import transformer_vq as tvq

    device, n = torch.device("cuda" if opt.gpu else "cpu"), 8192
    q, k = torch.randn(2, 1, n, 64, device=device) / 64**0.25
    codebook, v = torch.randn(512, 64, device=device) / 64**0.25, torch.randn(1, n, 128, device=device)
    ids, k_hat = tvq.quantize(k, codebook)
    bias = torch.zeros(513, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=opt.gpu and not opt.fp32)

    def form(f: Callable, block: int) -> Callable:
        return lambda q, k, v: f(q, k, ids, v, codebook, bias, block)[0]

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = F.pad(q, (0, 64)), F.pad(k, (0, 64))
        return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=1.0)

    arms = {"ours": form(tvq.vq_attention, 128), "ours, cumsum": form(functools.partial(tvq.vq_attention, at_once=True), 128), "SDPA": sdpa}
    if opt.compile:
        arms = {who: torch.compile(arm) for who, arm in arms.items()}

    def forward(arm: Callable) -> None:
        with torch.no_grad(), autocast:
            arm(q, k_hat, v)

    def both(arm: Callable) -> None:
        leaves = [x.detach().requires_grad_() for x in (q, k_hat, v)]
        with autocast:
            value = arm(*leaves).sum()
        torch.autograd.grad(value, leaves)
    yield "attention, forward", n, {who: functools.partial(forward, arm) for who, arm in arms.items()}
    yield "attention, forward and backward", n, {who: functools.partial(both, arm) for who, arm in arms.items()}
    args = tvq.parse_args(["--gpu"] if opt.gpu else [])
    batch, steps = opt.batch or args.batch_size, {}
    tokens = torch.randint(256, (batch, args.update_len + 1), device=device)
    for kind in ("vq", "exact", "window"):
        args.attention = kind
        net = tvq.build(args, device)
        if opt.compile:
            net.compile()
        adam, states = tvq.adam(net, 0.95), net(tokens[:, :-1])[1]

        def step(net=net, adam=adam, states=[[x.detach() for x in s] for s in states]) -> None:
            with autocast:
                logits, _, commits, seen = net(tokens[:, :-1], states)
                value = tvq.loss(logits, tokens[:, 1:]).mean() + commits.sum()
            value.backward()
            adam.step()
            adam.zero_grad()
            tvq.renew_codes(net, seen, 0.95, False, torch.Generator(device))
        steps["ours" if kind == "vq" else kind] = step
    yield "training step, by attention (ours: vq)", batch * args.update_len, steps
    state = tvq.vq_attention(q, k_hat, ids, v, codebook, bias, 128)[1]
    yield "a token", 1, {"ours": torch.no_grad()(lambda: tvq.vq_step(q[:, 0], k_hat[:, 0], ids[:, 0], v[:, 0],
                                                                      codebook, bias, state))}
    keys, book = torch.randn(1, 16384, 64, device=device), tvq.Codebook(512, 64).to(device)

    def ours() -> None:
        ids, _ = tvq.quantize(keys, book.vectors())
        book.update(keys[0], ids[0], 0.99)
    arms = {"ours": ours}
    if opt.peer == "vector-quantize-pytorch":
        from vector_quantize_pytorch import VectorQuantize

        peer = VectorQuantize(dim=64, codebook_size=512, decay=0.99).to(device).train()
        arms[opt.peer] = torch.no_grad()(lambda: peer(keys))
    yield "quantiser and its average", keys.shape[1], {who: torch.no_grad()(arm) for who, arm in arms.items()}


def cases_hier_pos_bert(opt: argparse.Namespace) -> Iterator[Case]:
    """WordPiece on 2 MB of the standard library; then training steps of a BERT of 4 layers, width 256, 30,522 words, 15 %
    masked, at 128 and 512 tokens, plain and with the post's codes of four times as few positions.

    Peer transformers: its fast and its slow tokenizer, by lines, and BertForMaskedLM of the same size without dropout.
    """
    import collections
    import tempfile

    import hier_pos_bert as hier

    device = torch.device("cuda" if opt.gpu else "cpu")
    text = b"\n".join(hier.load_text("python", ""))[:2_000_000].decode("utf-8", "replace")
    common = [word for word, _ in collections.Counter(text.lower().split()).most_common(5000)]
    letters = sorted(set(text.lower()) - set("\n\r\t "))
    words = list(dict.fromkeys([*hier.SPECIAL, *letters, *(f"##{c}" for c in letters), *common]))
    ids = {word: k for k, word in enumerate(words)}
    arms = {"ours": lambda: hier.word_pieces(text, ids)}
    if opt.peer == "transformers":
        from tokenizers.implementations import BertWordPieceTokenizer
        from transformers import BertConfig, BertForMaskedLM
        from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

        peer = BertWordPieceTokenizer(vocab=ids)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
            file.write("\n".join(words))
            file.flush()
            slow = BertTokenizerLegacy(file.name)
        arms["tokenizers"] = lambda: peer.encode_batch(text.split("\n"), add_special_tokens=False)
        arms["transformers' slow one"] = lambda: [k for line in text.split("\n") for k in slow.convert_tokens_to_ids(slow.tokenize(line))]
        assert [k for row in arms["tokenizers"]() for k in row.ids] == arms["ours"]() == arms["transformers' slow one"]()
    yield "word pieces", len(arms["ours"]()), arms
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=opt.gpu and not opt.fp32)
    for length in (128, 512):
        c = dict(vocab_size=30522, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
                 max_position_embeddings=length, type_vocab_size=2, layer_norm_eps=1e-12)
        batch = opt.batch or (8192 if opt.gpu else 1024) // length
        tokens = torch.randint(1000, 30522, (batch, length), device=device)
        at = torch.rand(batch, length, device=device).topk(round(0.15 * length)).indices.sort().values
        labels = torch.full_like(tokens, -100).scatter(1, at, tokens.gather(1, at))
        at = (at + length * torch.arange(batch, device=device)[:, None]).flatten()
        short = hier.Bert(c | dict(max_position_embeddings=length // 4))
        nets = {"ours": hier.Bert(c), "ours, the post's codes": hier.stretch(short, "hierarchical", length, 0.4, torch.Generator())}
        if opt.peer == "transformers":
            nets[opt.peer] = BertForMaskedLM(BertConfig(**c, hidden_dropout_prob=0, attention_probs_dropout_prob=0)).train()

        def trainer(net: torch.nn.Module) -> Callable[[], object]:
            net.to(device)
            adam = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
            run = torch.compile(net) if opt.compile else net

            def step() -> None:
                with autocast:
                    if isinstance(net, hier.Bert):
                        value = torch.nn.functional.cross_entropy(run(tokens, at=at).float(), tokens.flatten()[at])
                    else:
                        value = run(tokens, labels=labels).loss
                value.backward()
                adam.step()
                adam.zero_grad()
            return step
        yield f"training step, {length} tokens", batch * length, {who: trainer(net) for who, net in nets.items()}


def cases_nvae(opt: argparse.Namespace) -> Iterator[Case]:
    """The bare run's net (with --gpu, that run's): a training step, also with cells computed twice (--forget), and drawing."""
    import nvae

    args = nvae.parse_args(["--gpu"] if opt.gpu else [])
    device, batch = torch.device("cuda" if opt.gpu else "cpu"), opt.batch or args.batch_size
    y = torch.randint(2 ** args.bits, (batch, 3, args.size, args.size), dtype=torch.uint8, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=opt.gpu and not opt.fp32)
    steps, g = {}, torch.Generator(device)
    for who in ("ours", "cells computed twice"):
        args.forget = who != "ours"
        net = nvae.build(args, 3, args.size, device)
        net.floor.fill_(args.floor)
        convs = [m for m in net.modules() if isinstance(m, nvae.Conv)]
        gammas = [m.weight for m in net.modules() if isinstance(m, nvae.BatchNorm)]
        if opt.compile:
            net.compile()
            net.generate = torch.compile(net.generate)
        adamax = torch.optim.Adamax(net.parameters(), lr=1e-3, eps=1e-3, weight_decay=3e-4)

        def step(net=net, adamax=adamax, convs=convs, gammas=gammas) -> None:
            with autocast:
                law, kls = net(y, net.noise(batch, g))
            value = nvae.loss(law.log_prob(y), kls, torch.ones_like(kls[:, 0])).mean()
            (value + args.penalty * nvae.penalty(convs, gammas, 4)).backward()
            adamax.step()
            adamax.zero_grad()
        steps[who] = step
    yield "training step, with the penalty", batch, steps
    net.eval()

    @torch.no_grad()
    def draw() -> None:
        with autocast:
            net.generate(net.noise(64, g), 1.0).mean()
    yield "drawing", 64, {"ours": draw}


def cases_bigan_qp(opt: argparse.Namespace) -> Iterator[Case]:
    """A whole update of the bare run's nets (with --gpu: of --paper's): T, then G and E, data ready.

    Beside it a DCGAN's update with the same G and an Encoder of one number for its critic: two nets instead of three, and
    nothing is encoded.
    """
    import bigan_qp as bq
    import torch.nn.functional as F

    args = bq.parse_args(["--gpu", "--paper"] if opt.gpu else [])
    batch, shape = opt.batch or args.batch_size, (3, args.size, args.size)
    device = torch.device("cuda" if opt.gpu else "cpu")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=opt.gpu and not opt.fp32)
    nets = bq.build(args, shape, device)
    T, G, E = nets["T"], nets["G"], nets["E"]
    plain = bq.build(args, shape, device)["G"]
    D = bq.Encoder(shape, args.width, 1, args.kernel).to(device, memory_format=torch.channels_last)
    if opt.compile:
        for net in (T, G, E, plain, D):
            net.compile()
    x, z = torch.rand(batch, *shape, device=device) * 2 - 1, torch.randn(batch, args.n_z, device=device)
    params = [list(T.parameters()), [*G.parameters(), *E.parameters()], list(D.parameters()), list(plain.parameters())]
    adams = [torch.optim.Adam(p, lr=2e-4, betas=(0.5, 0.999), fused=True) for p in params]

    def ours() -> None:
        for _ in range(args.critic_steps):
            with torch.no_grad(), autocast:
                z_r, x_f = E(x), G(z)
            with autocast:
                real, fake = T(x, z_r), T(x_f, z)
            d = bq.distance(x, z_r, x_f, z)
            bq.player_step(bq.qp_critic_loss(real, fake, d, args.lam), adams[0], params[0])
        with autocast:
            loss, _, _ = bq.bigan_loss(T, G, E, x, z, args.beta1, args.beta2)
        bq.player_step(loss, adams[1], params[1])

    def dcgan() -> None:
        for _ in range(args.critic_steps):
            with torch.no_grad(), autocast:
                fake = plain(z)
            with autocast:
                loss = F.softplus(-D(x)) + F.softplus(D(fake))
            bq.player_step(loss, adams[2], params[2])
        with autocast:
            loss = F.softplus(-D(plain(z)))
        bq.player_step(loss, adams[3], params[3])
    yield "a whole update", batch, {"ours": ours, "DCGAN": dcgan}


def measure(opt: argparse.Namespace, what: str, items: int, arms: dict[str, Callable[[], object]]) -> None:
    """Times the arms in turn and prints a line for each; one thread in its own seconds: others work, too."""
    clock = time.process_time if opt.threads == 1 and not opt.gpu else time.perf_counter

    def once(call: Callable[[], object]) -> float:
        if opt.gpu:
            torch.cuda.synchronize()
        begin = clock()
        call()
        if opt.gpu:
            torch.cuda.synchronize()
        return clock() - begin

    seconds, peak = {who: [] for who in arms}, {}
    for call in arms.values():  # warm-up: compilation, autotuning, allocation
        once(call)
        once(call)
    for _ in range(opt.repeats):
        for who in random.sample([*arms], len(arms)):  # in any order: the one before leaves the caches warm or cold
            call = arms[who]
            if opt.gpu:
                torch.cuda.reset_peak_memory_stats()
            seconds[who].append(once(call))
            peak[who] = torch.cuda.max_memory_allocated() >> 20 if opt.gpu else \
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # of the whole process
    median = {who: statistics.median(values) for who, values in seconds.items()}
    for who, values in seconds.items():
        line = dict(what=what, who=who, median_s=median[who], min_s=min(values), max_s=max(values),
                    per_second=items / median[who], peak_mib=peak[who])
        if who != "ours":
            line["ours_is_faster_by"] = median[who] / median["ours"]
        print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v
                          for k, v in line.items()}), flush=True)


def main() -> None:
    cases = {name[6:]: f for name, f in globals().items() if name.startswith("cases_")}
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("script", choices=cases)
    p.add_argument("--peer", metavar="NAME", help="also time this installed package")
    p.add_argument("--gpu", action="store_true", help="on CUDA, in bfloat16 and TF32")
    p.add_argument("--fp32", action="store_true", help="with --gpu: neither bfloat16 nor TF32")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    p.add_argument("--batch", type=int, help="items a call (default: the case's own)")
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's own)")
    opt = p.parse_args()
    if opt.threads:
        torch.set_num_threads(opt.threads)
    if opt.gpu and not opt.fp32:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if opt.gpu else f"CPU, {torch.get_num_threads()} threads"
    print(json.dumps(dict(command=" ".join(sys.argv), torch=str(torch.__version__), device=where)))
    for what, items, arms in cases[opt.script](opt):
        measure(opt, what, items, arms)


if __name__ == "__main__":
    main()
