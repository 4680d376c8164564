# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy"]
# ///
"""BERT past its 512 positions: a position read as a number of two digits in base n.

Post    层次分解位置编码，让BERT可以处理超长文本   https://kexue.fm/archives/7947 (read 2026-11)
Author's code: bojone/bert4keras, PositionEmbedding(hierarchical=...)

Map     7947 (1)   q_{(i-1)n+j} = alpha u_i + (1 - alpha) u_j, alpha != 1/2         compose
        7947 (2)   u_i = (p_i - alpha p_1) / (1 - alpha): so q_1..q_n = p_1..p_n    base
        7947       q = p_j + beta (p_i - p_1), beta = alpha / (1 - alpha)    hierarchical_positions
Symbols p_1, ..., p_n are the trained positions, q the n^2 new ones; (i, j) are the digits of one.
        The post counts from 1. Position ids in the code count from 0, as BERT's do: p_1 is p[0].
        At position 1 stands [CLS], whose code may be unlike the rest: `first_row` looks.
Shapes  B texts, L tokens each, T tokens of a text, V words, W width, n positions trained,
        K masked tokens.

Run     python hier_pos_bert.py                  # CPU: trains a BERT of bytes at 64, stretches it
        python hier_pos_bert.py --arms hierarchical anchor tile --tune-steps 500
        python hier_pos_bert.py --bert FOLDER --data FILE --steps 0 --times 3 --tune-steps 3000
                                # the post's run: a BERT with its head, at 1536 positions
        python hier_pos_bert.py --bert FOLDER --classify FILE --steps 0 --times 2
                                # long documents, 512 positions against 1024
        python hier_pos_bert.py --bert FOLDER --stretch-only --times 4   # a BERT of 2048, untuned
        python hier_pos_bert.py --gpu            # one GPU: a larger BERT of bytes
        torchrun --nproc_per_node=8 hier_pos_bert.py --gpu   # the same global batch on eight
Needs   torch, numpy
"""

import argparse
import bz2
import codecs
import copy
import errno
import gc
import gzip
import hashlib
import html
import http.client
import io
import itertools
import json
import lzma
import math
import os
import re
import signal
import sys
import sysconfig
import time
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ---- the post: 7947 ----

def digits(positions: Tensor, n: int, rows: int) -> tuple[Tensor, Tensor]:
    """The two digits in base n of positions counted from 0: the post's i - 1 and j - 1.

    Raises ValueError for a position that is not in [0, rows n): there are no more codes. On a GPU,
    where this would wait, and compiled, which it would cut, looking the rows up fails instead.
    """
    if positions.numel() and not (positions.is_cuda or torch.compiler.is_compiling()):
        low, high = int(positions.min()), int(positions.max())
        if not 0 <= low <= high < rows * n:
            raise ValueError(f"positions {low} to {high}: {n} codes make {rows * n}, no more")
    return positions // n, positions % n


def check_alpha(alpha: float) -> float:
    """alpha itself; ValueError unless it is in (0, 1) and not 1/2, where (i, j) is (j, i)."""
    if not 0 < alpha < 1 or alpha == 0.5:
        raise ValueError(f"alpha {alpha}: within (0, 1), but not 0.5, 7947 (1)")
    return alpha


def base(p: Tensor, alpha: float) -> Tensor:
    """7947 (2): the u (n, W) of which (1) makes p (n, W) again, as its first n codes."""
    return (p - check_alpha(alpha) * p[0]) / (1 - alpha)  # 7947 (2)


def compose(u: Tensor, alpha: float, positions: Tensor) -> Tensor:
    """7947 (1): codes (..., W) of `positions` (...), each from two rows of u (n, W)."""
    i, j = digits(positions, len(u), len(u))
    return check_alpha(alpha) * F.embedding(i, u) + (1 - alpha) * u[j]  # 7947 (1)


def hierarchical_positions(p: Tensor, alpha: float, positions: Tensor, anchor: int = 0) -> Tensor:
    """7947 (1) with the u of (2): q = p_j + beta (p_i - p_1), codes (..., W) of `positions` (...).

    p (n, W) stays the parameter; below n the codes are p to the bit, which (2) and (1) in turn are
    not. anchor 1 is not the post's: p_j + beta (p_{i+1} - p_2) leaves p_1, that of [CLS], out.
    """
    beta = check_alpha(alpha) / (1 - alpha)
    i, j = digits(positions, len(p), len(p) - anchor)
    first = p[anchor:]  # F.embedding(i, first) is first[i] that refuses i < 0, of a position < 0
    # p_j + beta (p_i - p_1), turned round: minus +0 leaves even -0 as it is
    return F.embedding(j, p) - beta * (first[0] - F.embedding(i, first))


@torch.no_grad()
def materialize(p: Tensor, alpha: float, length: int, anchor: int = 0) -> Tensor:
    """The first `length` codes (length, W) as a plain table, for inference: p is left behind."""
    return hierarchical_positions(p, alpha, torch.arange(length, device=p.device), anchor)


# ---- beyond the post: other ways to more positions ----

WAYS = ("hierarchical", "tile", "random", "anchor", "interpolate", "last")


def other_positions(p: Tensor, way: str, length: int, g: torch.Generator) -> Tensor:
    """A table (length, W) from p (n, W): its copies in a row, as Longformer starts (tile); p drawn
    out (interpolate); p_n again and again (last); new rows, as p spreads (random)."""
    k = torch.arange(length, device=p.device)
    if way == "tile":
        return p[k % len(p)]
    if way == "interpolate":
        return F.interpolate(p.T[None], length, mode="linear", align_corners=True)[0].T.contiguous()
    if way == "last":
        return p[k.clamp(max=len(p) - 1)]
    new = torch.randn(length - len(p), p.shape[1], generator=g, dtype=p.dtype, device=p.device)
    return torch.cat([p, p.mean(0) + p.std(0) * new])


# ---- model ----

class Embeddings(nn.Module):
    """Word, position and segment, added and normalised; alpha None: p as in a plain BERT."""

    def __init__(self, c: dict):
        super().__init__()
        self.word_embeddings = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.position_embeddings = nn.Embedding(c["max_position_embeddings"], c["hidden_size"])
        self.token_type_embeddings = nn.Embedding(c["type_vocab_size"], c["hidden_size"])
        self.LayerNorm = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])
        self.alpha, self.anchor = None, 0

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        p = self.position_embeddings.weight  # the gradient of all n^2 codes goes into p
        codes = p[positions] if self.alpha is None else \
            hierarchical_positions(p, self.alpha, positions, self.anchor)
        return self.LayerNorm(self.word_embeddings(tokens) + codes
                              + self.token_type_embeddings.weight[0])


class Residual(nn.Module):
    """Post-norm: LayerNorm(x + dense(y)). departs: no dropout, here or elsewhere."""

    def __init__(self, inner: int, c: dict):
        super().__init__()
        self.dense = nn.Linear(inner, c["hidden_size"])
        self.LayerNorm = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(x + self.dense(y))


class EncoderLayer(nn.Module):
    """Self-attention, then two dense layers, on x (B, L, W); names as in Hugging Face's files."""

    def __init__(self, c: dict):
        super().__init__()
        width, self.heads = c["hidden_size"], c["num_attention_heads"]
        qkv = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict(dict(self=nn.ModuleDict(qkv), output=Residual(width, c)))
        self.intermediate = nn.ModuleDict(dict(dense=nn.Linear(width, c["intermediate_size"])))
        self.output = Residual(c["intermediate_size"], c)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in self.attention["self"].values())  # (B, H, L, d) each
        y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = self.attention["output"](y, x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class Head(nn.Module):
    """From x (..., W) to a vector to be compared with the words' (..., W), and their bias (V,)."""

    def __init__(self, c: dict):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(c["vocab_size"]))
        self.transform = nn.ModuleDict(dict(
            dense=nn.Linear(c["hidden_size"], c["hidden_size"]),
            LayerNorm=nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])))

    def forward(self, x: Tensor) -> Tensor:
        return self.transform["LayerNorm"](F.gelu(self.transform["dense"](x)))


class Bert(nn.Module):
    """BertForMaskedLM: the same function, and the same names of the weights, the decoder tied.

    c: the config.json of a Hugging Face folder. New weights are N(0, 1/inputs), and positions begin
    as small sinusoids; departs: with BERT's N(0, .02) minutes do not get past the frequent bytes.
    """

    def __init__(self, c: dict):
        super().__init__()
        self.config = dict(c)
        layers = nn.ModuleList(EncoderLayer(c) for _ in range(c["num_hidden_layers"]))
        self.bert = nn.ModuleDict(dict(embeddings=Embeddings(c),
                                       encoder=nn.ModuleDict(dict(layer=layers))))
        self.cls = nn.ModuleDict(dict(predictions=Head(c)))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        n, width = self.positions.shape
        angle = torch.arange(n)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
        waves = torch.cat([angle.sin(), angle.cos()], 1)[:, :width]
        self.positions.data.copy_(0.1 * waves)

    @property
    def positions(self) -> Tensor:
        """p (n, W), the parameter; a table of more rows after `stretch` by another way."""
        return self.bert["embeddings"].position_embeddings.weight

    def body(self, tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
             ) -> Tensor:
        """The hidden states (B, L, W) of tokens (B, L); mask (B, L): which are none of the padding;
        positions (L,) or (B, L): 0, 1, ..., unless given."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.bert["embeddings"](tokens, positions)
        for layer in self.bert["encoder"]["layer"]:
            x = layer(x, None if mask is None else mask[:, None, None])
        return x

    def forward(self, tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None,
                at: Tensor | None = None) -> Tensor:
        """Logits (B, L, V); or (K, V), of the tokens numbered `at` (K,) in tokens.flatten()."""
        x = self.body(tokens, mask, positions)
        x = x if at is None else x.flatten(0, 1)[at]
        head, words = self.cls["predictions"], self.bert["embeddings"].word_embeddings.weight
        return F.linear(head(x), words, head.bias)


class Classifier(nn.Module):
    """A linear layer on the last state of [CLS], zero at first; net, less its head, learns too."""

    def __init__(self, net: Bert, classes: int, pad: int):
        super().__init__()
        del net.cls  # without a gradient the ranks would wait for it
        self.net, self.pad = net, pad
        self.last = nn.Linear(net.config["hidden_size"], classes)
        for p in self.last.parameters():
            nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, classes) of tokens (B, L), padded; what is padding in all of them is cut."""
        mask = tokens != self.pad
        longest = int(mask.sum(1).max())
        return self.last(self.net.body(tokens[:, :longest], mask[:, :longest])[:, 0])


def stretch(net: Bert, way: str, length: int, alpha: float, g: torch.Generator) -> Bert:
    """A copy of net for `length` positions, by one of WAYS: p stays the parameter of hierarchical
    and anchor, the others have a table of `length` rows, each a parameter from now on."""
    net, n = copy.deepcopy(net), len(net.positions)
    embeddings = net.bert["embeddings"]
    if way in ("hierarchical", "anchor"):
        embeddings.alpha, embeddings.anchor = check_alpha(alpha), int(way == "anchor")
    elif length > n:
        table = other_positions(net.positions.detach(), way, length, g)
        embeddings.position_embeddings = nn.Embedding.from_pretrained(table, freeze=False)
    return net


def corrupt(text: Tensor, mask_id: int, words: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """BERT's task on text (B, T): inputs (B, T), and the places (B, K/B) to be guessed.

    Of each row 15 % are chosen; of these 80 % become [MASK], 10 % any word, 10 % stay.
    """
    count = max(1, round(0.15 * text.shape[1]))
    where = torch.rand(text.shape, generator=g, device=g.device).topk(count).indices
    fate = torch.rand(where.shape, generator=g, device=g.device)
    word = torch.randint(words, where.shape, generator=g, device=g.device)
    new = torch.where(fate < 0.8, mask_id, torch.where(fate < 0.9, word, text.gather(1, where)))
    return text.scatter(1, where, new), where


# ---- a Hugging Face folder: words, configuration, weights ----

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BYTES = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]  # the words of a model of bytes
CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2CEAF), (0xF900, 0xFAFF),
       (0x2F800, 0x2FA1F))


class Cleaned(dict):
    """For str.translate: control characters go, white space is a blank, an ideograph is a word."""

    def __missing__(self, code: int) -> str:
        char, kind = chr(code), unicodedata.category(chr(code))
        blank = char in "\t\n\r" or kind == "Zs"
        gone = kind in ("Cc", "Cf", "Co") or code == 0xFFFD
        ideograph = any(first <= code <= last for first, last in CJK)
        self[code] = " " if blank else "" if gone else f" {char} " if ideograph else char
        return self[code]


class Cut(dict):
    """For str.translate: each punctuation mark is a word, as BERT counts them; accents go."""

    def __missing__(self, code: int) -> str:
        char, kind = chr(code), unicodedata.category(chr(code))
        mark = kind[0] == "P" or code < 128 and not char.isalnum() and not char.isspace()
        self[code] = f" {char} " if mark else "" if kind == "Mn" else char
        return self[code]


def word_pieces(text: str, ids: dict[str, int], lower: bool = True) -> list[int]:
    """BERT's WordPiece: ids (word: number) of the longest pieces that each word begins with, "##"
    before all but its first; [UNK] for one of no such pieces, or of more than 100 characters.

    lower: an uncased vocabulary, without accents. "[MASK]" and its like are read as they stand.
    """
    cleaned, cut, known, out = Cleaned(), Cut(), {}, []
    for part in re.split(rf"({'|'.join(map(re.escape, SPECIAL))})", text):
        if part in SPECIAL:
            out.append(ids[part])
            continue
        part = part.translate(cleaned)
        if lower:
            part = unicodedata.normalize("NFD", part.lower())
        else:  # accents stay
            cut.update((ord(c), c) for c in set(part) if unicodedata.category(c) == "Mn")
        for word in part.translate(cut).split():
            if word not in known:
                known[word] = pieces_of(word, ids)
            out += known[word]
    return out


def pieces_of(word: str, ids: dict[str, int]) -> list[int]:
    """The greedy part of `word_pieces`, for one word."""
    found, start = [], 0
    while start < len(word) <= 100:
        head = "##" if start else ""
        ends = range(len(word), start, -1)
        end = next((end for end in ends if head + word[start:end] in ids), None)
        if end is None:
            break
        found.append(ids[head + word[start:end]])
        start = end
    return found if start == len(word) else [ids["[UNK]"]]


WANTED = "config.json, vocab.txt and model.safetensors or pytorch_model.bin, whole, are wanted"


def read_vocabulary(folder: str) -> dict:
    """The words of FOLDER/vocab.txt, their numbers, whether they are in lower case, and the number
    of each special one; without a folder the bytes. Raises UserError."""
    words, lower, path = BYTES, False, Path(folder).expanduser() / "vocab.txt"
    if folder:
        settings = path.with_name("tokenizer_config.json")
        try:
            words = path.read_text("utf-8-sig").removesuffix("\n").split("\n")
            said = json.loads(settings.read_bytes()) if settings.exists() else {}
            lower, kind = said.get("do_lower_case", True), said.get("tokenizer_class")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"--bert {folder}: {error}; {WANTED}") from None
        if kind not in (None, "BertTokenizer", "BertTokenizerFast"):
            raise UserError(f"--bert {folder}: its words are {kind}'s, not written here")
    if lost := set(SPECIAL) - set(words):
        raise UserError(f"{path}: has no {', '.join(sorted(lost))}")
    ids = {word: k for k, word in enumerate(words)}
    return dict(words=words, ids=ids, lower=lower) | {mark: ids[mark] for mark in SPECIAL}


def encode(text: bytes, vocab: dict) -> Tensor:
    """The tokens (T,) of a text: its bytes, or its word pieces."""
    if vocab["words"] == BYTES:
        return torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int32)) + len(SPECIAL)
    pieces = word_pieces(text.decode("utf-8", "replace"), vocab["ids"], vocab["lower"])
    return torch.tensor(pieces, dtype=torch.int32)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, as they are stored."""
    kinds = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
                 I64=torch.int64, I32=torch.int32)
    body = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(body[:8], "little")
    if not 8 < begin <= len(body):
        raise ValueError(f"{path.name} is cut, or a pointer to it (git lfs pull)")
    state = json.loads(body[8:begin])
    state.pop("__metadata__", None)
    for name, item in state.items():
        first, end = (begin + offset for offset in item["data_offsets"])
        if end > len(body):
            raise ValueError("cut")
        flat = torch.frombuffer(body, dtype=kinds[item["dtype"]], offset=first,
                                count=math.prod(item["shape"]))
        state[name] = flat.view(item["shape"]).clone()
    return state


def read_bert(folder: str) -> tuple[dict, dict[str, Tensor]]:
    """config.json and the weights of FOLDER, by the names that `Bert` has; without "cls." if the
    model has no head. Raises UserError for what is missing, unknown or not a BERT."""
    root, found = Path(folder).expanduser(), {}
    try:
        c = dict(type_vocab_size=2, layer_norm_eps=1e-12) | json.loads(
            (root / "config.json").read_bytes())
        with torch.device("meta"):
            net = Bert(c)
            net(torch.zeros(1, 1, dtype=torch.long))  # its heads, too, go with the rest
            want = {name: value.shape for name, value in net.state_dict().items()}
        if (root / "model.safetensors").exists():
            state = read_safetensors(root / "model.safetensors")
        else:
            state = torch.load(root / "pytorch_model.bin", map_location="cpu", weights_only=True)
        for name, value in state.items():
            name = re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", name))
            name = name if name.startswith(("bert.", "cls.")) else f"bert.{name}"
            if not re.search(r"position_ids$|^bert\.pooler\.|^cls\.seq_relationship\.", name):
                found[name] = value.float()
    except OSError as error:
        raise UserError(f"--bert {folder}: {error}; {WANTED}") from None
    except Exception as error:  # torch raises a dozen kinds
        raise UserError(f"--bert {folder}: damaged, or not a BERT's: {error!r:.100}") from None
    must = dict(position_embedding_type="absolute", hidden_act="gelu", model_type="bert")
    if wrong := [f"{k} {c[k]}" for k, v in must.items() if c.get(k, v) != v]:
        raise UserError(f"--bert {folder}: {', '.join(wrong)}: not the BERT that is written here")
    head = "cls.predictions."
    for copied, name in ((f"{head}decoder.weight", "bert.embeddings.word_embeddings.weight"),
                         (f"{head}decoder.bias", f"{head}bias")):
        other = found.pop(copied, None)
        if other is not None and not torch.equal(other, found.setdefault(name, other)):
            raise UserError(f"--bert {folder}: {copied} is not tied to {name}")
    if not any(name.startswith("cls.") for name in found):
        want = {name: shape for name, shape in want.items() if not name.startswith("cls.")}
    wrong = {name for name in found.keys() & want if found[name].shape != want[name]}
    for what, names in {"missing": want.keys() - found.keys(), "unknown": found.keys() - want,
                        "of a wrong shape": wrong}.items():
        if names:
            raise UserError(f"--bert {folder}: {what}, {len(names)} in all: "
                            f"{', '.join(sorted(names)[:3])}")
    return c, found


def write_bert(folder: Path, net: Bert, vocab: dict, head: bool = True) -> None:
    """Writes a plain net as a Hugging Face folder: BertForMaskedLM, or its body, BertModel."""
    state = {name: value.detach().float().cpu().contiguous() for name, value in
             net.state_dict().items() if head or name.startswith("bert.")}
    c = net.config | dict(model_type="bert", hidden_act="gelu", dtype="float32",
                          architectures=["BertForMaskedLM" if head else "BertModel"],
                          max_position_embeddings=len(net.positions))
    items, end = dict(__metadata__=dict(format="pt")), 0
    for name, value in state.items():
        begin, end = end, end + 4 * value.numel()
        items[name] = dict(dtype="F32", shape=list(value.shape), data_offsets=[begin, end])
    top = json.dumps(items).encode()
    top += b" " * (-len(top) % 8)
    body = b"".join(value.numpy().tobytes() for value in state.values())
    put(folder / "model.safetensors", len(top).to_bytes(8, "little") + top + body)
    put(folder / "config.json", (json.dumps(c, indent=1) + "\n").encode())
    put(folder / "vocab.txt", ("\n".join(vocab["words"]) + "\n").encode())
    put(folder / "tokenizer_config.json", json.dumps(dict(do_lower_case=vocab["lower"])).encode())


# ---- evaluation ----

def frame(text: Tensor, vocab: dict) -> Tensor:
    """[CLS], the text (..., T), [SEP]: (..., T + 2)."""
    return F.pad(F.pad(text, (1, 0), value=vocab["[CLS]"]), (0, 1), value=vocab["[SEP]"])


def make_exam(text: Tensor, vocab: dict) -> tuple[Tensor, Tensor, Tensor]:
    """text (T,), the same corrupted, and which tokens are asked for: one fixed draw for all models
    and all lengths of window."""
    g = generator(text.device, 1)
    inputs, where = corrupt(text[None], vocab["[MASK]"], len(vocab["words"]), g)
    asked = torch.zeros_like(text, dtype=torch.bool).index_fill(0, where[0], True)
    return text, inputs[0], asked


@torch.no_grad()
def by_position(net: Bert, exam: tuple, length: int, what: str, vocab: dict,
                args: argparse.Namespace) -> Tensor:
    """How many tokens of `exam` net guesses right, and how many it is asked for, at each position:
    (2, length); says the share. Windows are of `length`, [CLS] and [SEP] counted in."""
    text, inputs, asked = (part.unfold(0, length - 2, length - 2) for part in exam)
    total, k = torch.zeros(2, length, device=text.device), args.batch_size
    parts = zip(text.split(k), inputs.split(k), asked.split(k))
    for truth, seen, ask in watch(parts, math.ceil(len(text) / k), "evaluating, batch"):
        at = F.pad(ask, (1, 1)).flatten().nonzero()[:, 0]
        with autocast(args):
            guess = net(frame(seen, vocab), at=at).argmax(-1)
        right = at[guess == frame(truth, vocab).flatten()[at]]
        total += torch.stack([(of % length).bincount(minlength=length) for of in (right, at)])
    say(f"{what:44}{100 * accuracy(total):5.1f} %")
    return total.cpu()


def accuracy(total: Tensor) -> float:
    """Right guesses over what was asked for, of `by_position`'s counts; nan if that is nothing."""
    return (total[0].sum() / total[1].sum()).item()


@torch.no_grad()
def far_mentions(net: Bert, text: Tensor, length: int, reach: int, span: int, vocab: dict) -> dict:
    """Whether net looks further than `reach` tokens away: windows of text (T,) in which `span`
    tokens stand just twice, so far apart. The later ones are masked; accuracy on them with the
    other mention seen, and with that hidden too."""
    right: dict[str, list[float]] = {"seen": [], "hidden": []}
    for window in text.unfold(0, length - 2, length - 2):
        grams = window.unfold(0, span, 1)  # (T - span + 1, span)
        same = (grams[:, None] == grams).all(-1)
        far = (same.sum(1) == 2) & (same.tril(-reach - 1).sum(1) == 1)
        for later in far.nonzero()[:1, 0].tolist():
            first = int(same[later].nonzero()[0])
            seen, hidden = window.clone(), window.clone()
            seen[later:later + span] = hidden[later:later + span] = vocab["[MASK]"]
            hidden[first:first + span] = vocab["[MASK]"]
            at = torch.arange(later + 1, later + 1 + span, device=text.device)  # after [CLS]
            for name, tokens in (("seen", seen), ("hidden", hidden)):
                guess = net(frame(tokens[None], vocab), at=at).argmax(-1)
                right[name].append((guess == grams[later]).float().mean().item())
    shares = {name: sum(values) / max(1, len(values)) for name, values in right.items()}
    return dict(mentions=len(right["seen"])) | shares


def first_row(p: Tensor) -> dict[str, float]:
    """The norm of p_1 and the median of the others; says so if p_1 is an outlier."""
    norms = p.detach().norm(dim=1)
    found = {"p_1": norms[0].item(), "others": norms[1:].median().item()}
    if found["p_1"] > 2 * found["others"]:  # every code past n holds -beta p_1
        say(f"p_1, of [CLS], has norm {found['p_1']:.2f}, the others {found['others']:.2f}: it is "
            "in every code past n and harms it; --arms anchor leaves it out")
    return found


def exactness(p: Tensor, alpha: float) -> dict[str, float]:
    """How far the first n codes are from p: in the closed form, and through (2) and (1)."""
    p, positions = p.detach(), torch.arange(len(p), device=p.device)
    codes = {"closed form": hierarchical_positions(p, alpha, positions),
             "(2) in (1)": compose(base(p, alpha), alpha, positions)}
    return {name: (q - p).abs().max().item() for name, q in codes.items()}


def report(net: Bert, text: Tensor, test: Tensor, vocab: dict, args: argparse.Namespace) -> dict:
    """The post's experiment: net at n, then at --times n in every way, as it is; after --tune-steps
    in --arms, beside net tuned as long at n. Says the numbers and returns them; draws them by
    position; writes the first arm as a folder."""
    n, out = len(net.positions), Path(args.out)
    span = args.span or (6 if vocab["words"] == BYTES else 1)
    length, exam = args.times * n, make_exam(test[:args.eval_tokens].long(), vocab)
    rows = max(1, args.batch_size // (args.times * RANKS)) * RANKS  # so many tokens as in training

    def measure(net: Bert, length: int, what: str) -> Tensor:
        return by_position(net, exam, length, what, vocab, args)

    common = torch.bincount(text).argmax()
    metrics = dict(n=n, length=length, asked=int(exam[2].sum()), first_row=first_row(net.positions),
                   unigram=(exam[0][exam[2]] == common).double().mean().item(),
                   exactness=exactness(net.positions, args.alpha))
    say(f"accuracy on {metrics['asked']:,} masked tokens (the commonest token everywhere: "
        f"{100 * metrics['unigram']:.1f} %)")
    metrics["at_n"] = accuracy(measure(net, n, f"at {n}"))
    before = {way: measure(stretched(net, way, args), length, f"at {length}, not tuned, {way}")
              for way in WAYS}
    after, metrics["far_mentions"] = {}, {}
    for way in args.arms if args.tune_steps else ():
        arm = tune(stretched(net, way, args), masked_loss, text, length, rows, vocab, args)
        after[way] = measure(arm, length, f"at {length}, {args.tune_steps} steps, {way}")
        with autocast(args):
            metrics["far_mentions"][way] = far_mentions(arm, exam[0], length, n, span, vocab)
        if way == args.arms[0] and not RANK:
            write_bert(out / f"bert-{length}", plain(arm, length), vocab)
    if args.tune_steps:
        control = tune(copy.deepcopy(net), masked_loss, text, n, args.batch_size, vocab, args)
        metrics["control"] = accuracy(measure(control, n, f"at {n}, as many steps"))
    for name, arms in dict(before=before, after=after).items():
        metrics[name] = {way: accuracy(total) for way, total in arms.items()}
        metrics[f"{name}_by_position"] = draw_accuracy(out / f"{name}.svg", n // 4, arms)
    return metrics


def classify(net: Bert, documents: Tensor, vocab: dict, args: argparse.Namespace) -> dict:
    """The post's other experiment: labels told after --tune-steps from up to n tokens, then from up
    to --times n in each of --arms. Says and returns the shares that are right of the first tenth of
    the documents, which is held out, and of those longer than n in it."""
    n, k, labels = len(net.positions), len(documents) // 10, documents[:, 0].long()
    longer = (documents[:k, 1:] != vocab["[PAD]"]).sum(1) > n
    metrics = dict(n=n, length=args.times * n, first_row=first_row(net.positions), held_out=k,
                   longer=int(longer.sum()), right={})

    def note(what: str, told: Tensor) -> None:
        right = told == labels[:k]
        shares = [part.double().mean().item() for part in (right, right[longer])]
        metrics["right"][what] = dict(zip(("all", "longer"), shares))
        say(f"{what:44}{100 * shares[0]:5.1f} %, if longer than {n} {100 * shares[1]:5.1f} %")

    note("the commonest label", labels[k:].mode().values)
    # up to n the codes of the post's way are those of the BERT as it was
    for length, way in ((n, "hierarchical"), *((args.times * n, way) for way in args.arms)):
        arm = Classifier(stretched(net, way, args), 1 + int(labels.max()), vocab["[PAD]"])
        tune(arm.to(labels.device), label_loss, documents[k:], length, args.batch_size, vocab, args)
        with torch.no_grad(), autocast(args):
            parts = documents[:k, 1:length + 1].split(args.batch_size)
            note(f"at {length}, {way}", torch.cat([arm(part).argmax(1) for part in parts]))
    return metrics


def draw_accuracy(path: Path, width: int, arms: dict[str, Tensor]) -> dict[str, list[float]]:
    """Draws the counts of `by_position` of each arm as shares in buckets of `width` positions, and
    returns these."""
    rows = {way: [accuracy(part) for part in total.split(width, 1)] for way, total in arms.items()}
    if rows and not RANK:
        draw_curves(path, f"accuracy on masked tokens, %, {path.stem} tuning", "position", {
            way: ([width * (k + 0.5) for k in range(len(row))], [100 * y for y in row])
            for way, row in rows.items()})
    return rows


# ---- training ----
# Random streams: torch.manual_seed(seed) the first weights; generator(seed, step) the windows and
# masks of step `step`; generator(seed, step, 2) those of a step of tuning, alike for all arms;
# generator(seed, 0, 3) new rows, random; in every run generator(1) the masks of the test text, and
# generator(4) which documents are held out.

def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that each are right, but not together."""
    its = [f"--{name}" for name in ("n", "width", "layers", "heads") if name in args.given]
    if args.bert and its and not args.resume:
        raise UserError(f"{', '.join(its)}: --bert {args.bert} has its own")
    if args.width % args.heads:
        raise UserError(f"--width {args.width}: --heads {args.heads} cannot share it evenly")
    if wrong := set(args.arms) - set(WAYS):
        raise UserError(f"--arms {' '.join(sorted(wrong))}: not one of {', '.join(WAYS)}")
    if args.classify and not args.tune_steps:
        raise UserError("--classify: labels are learnt in --tune-steps, which are 0")
    if args.classify and args.stretch_only:
        raise UserError("--stretch-only: trains nothing, so --classify learns nothing")
    if args.classify and not args.steps and "data" in args.given:
        raise UserError(f"--data {args.data}: with --classify and --steps 0 no text is read")
    if args.stretch_only and not (args.bert or args.resume):
        raise UserError("--stretch-only: needs --bert or --resume")
    if not 0 < args.alpha < 1 or args.alpha == 0.5:
        raise UserError(f"--alpha {args.alpha}: within (0, 1), but not 0.5, 7947 (1)")


def load_data(args: argparse.Namespace, device: torch.device, vocab: dict, n: int
              ) -> tuple[Tensor, Tensor, Tensor]:
    """Train, validation and test tokens on the device, documents joined. Raises UserError if a part
    is too short."""
    parts = split_text(load_text(args.data, args.cache), torch.device("cpu"))
    parts = tuple(encode(part.numpy().tobytes(), vocab).to(device) for part in parts)
    if min(map(len, parts)) < args.times * n:
        raise UserError(f"--data {args.data}: {min(map(len, parts))} tokens to test on, too few "
                        f"for windows of {args.times * n}")
    unknown = (parts[0] == vocab["[UNK]"]).double().mean().item()
    if unknown > 0.05:
        say(f"warning: {unknown:.0%} of the tokens are [UNK], no words of {args.bert}: is it a "
            "BERT for such a text?")
    return parts


def load_labelled(args: argparse.Namespace, device: torch.device, vocab: dict, n: int) -> Tensor:
    """The documents of --classify in a mixed order, always the same, (N, 1 + L): the number of the
    label, [CLS], the tokens, [SEP], of these the first --times n, then [PAD]. Raises UserError."""
    rows, numbers, k, what = [], {}, 0, f"--classify {args.classify}"
    try:
        text = b"\n".join(load_text(args.classify, args.cache)).decode("utf-8", "replace")
        for k, line in enumerate(text.rstrip("\n").split("\n"), 1):
            row = json.loads(line) if line[:1] == "{" else \
                dict(zip(("label", "sentence"), line.split("\t", 1)))
            tokens = frame(encode(row["sentence"].encode(), vocab), vocab)[:args.times * n]
            label = numbers.setdefault(str(row["label"]), len(numbers))
            rows.append(F.pad(tokens, (1, 0), value=label))
    except UserError as error:
        line = str(error).partition(", nor one of")[0]  # python, enwik8, ... have no labels
        raise UserError(line.replace("--data", "--classify")) from None
    except (ValueError, LookupError, AttributeError):
        raise UserError(f"{what}, line {k}: not label, tab, text, nor CLUE's JSON") from None
    if len(rows) < 10 or not 2 <= len(numbers) <= len(rows) / 2:
        raise UserError(f"{what}: {len(rows)} lines, labels {len(numbers)}; it takes 10 lines, and "
                        "2 labels to half as many as lines")
    say(f"{args.classify}: {len(rows):,} documents with {len(numbers)} labels, a tenth held out")
    order = torch.randperm(len(rows), generator=generator("cpu", 4))
    return nn.utils.rnn.pad_sequence(rows, True, vocab["[PAD]"])[order].to(device)


def read_start(args: argparse.Namespace) -> tuple[dict, dict[str, Tensor], dict]:
    """The configuration, the weights there are, and the vocabulary: of --bert, or new ones."""
    vocab = read_vocabulary(args.bert)
    c, weights = read_bert(args.bert) if args.bert else (dict(
        vocab_size=len(vocab["words"]), hidden_size=args.width, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, intermediate_size=4 * args.width, type_vocab_size=2,
        max_position_embeddings=args.n, layer_norm_eps=1e-12), {})
    n = c["max_position_embeddings"]
    if c["vocab_size"] < len(vocab["words"]):
        raise UserError(f"--bert {args.bert}: {len(vocab['words'])} words for {c['vocab_size']}")
    if args.times >= n:
        raise UserError(f"--times {args.times}: {n - 1} at most, where the anchor's codes end")
    if not (args.stretch_only or args.classify) and (
            args.eval_tokens < args.times * n or args.span > args.times * n - 2):
        raise UserError(f"--eval-tokens {args.eval_tokens}, --span {args.span}: a window has "
                        f"{args.times * n} tokens, two of them [CLS] and [SEP]")
    return c, weights, vocab


def build(args: argparse.Namespace, device: torch.device, c: dict, weights: dict) -> Bert:
    """The model of configuration c with `weights`; new ones for what these lack."""
    torch.manual_seed(args.seed)
    net = Bert(c)
    net.load_state_dict(weights, strict=False)  # read_bert has looked at the names
    return net.to(device)


def stretched(net: Bert, way: str, args: argparse.Namespace) -> Bert:
    """A copy of net for --times as many positions."""
    g = generator(net.positions.device, args.seed, 0, 3)
    return stretch(net, way, args.times * len(net.positions), args.alpha, g)


def plain(net: Bert, length: int) -> Bert:
    """A copy with the codes of `length` positions as a plain table: `materialize`."""
    net = copy.deepcopy(net)
    e = net.bert["embeddings"]
    if e.alpha is not None:
        table = materialize(net.positions, e.alpha, length, e.anchor)
        e.position_embeddings, e.alpha = nn.Embedding.from_pretrained(table), None
    return net


def heights(args: argparse.Namespace) -> tuple[float, float]:
    """--lr and --tune-lr; for those that are 0, what suits the model: half as much in tuning."""
    lr = args.lr or (1e-4 if args.bert else 1e-3 if args.gpu else 2e-3)
    return lr, args.tune_lr or lr / 2


def learning_rate(step: int, steps: int, height: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to zero; departs: BERT's rate falls by a line."""
    return height * min(1, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2


def berts_adam(net: nn.Module) -> torch.optim.Optimizer:
    """Adam, with BERT's eps: the gradient of a key's bias is rounding, and should move nothing.

    departs: beta_2 is .98 for .999, and there is no weight decay.
    """
    return torch.optim.Adam(net.parameters(), betas=(0.9, 0.98), eps=1e-6, fused=True)


def masked_loss(net: nn.Module, text: Tensor, length: int, rows: int, g: torch.Generator,
                vocab: dict, args: argparse.Namespace) -> Tensor:
    """BERT's loss on `rows` windows of `length`, drawn from text (T,) and corrupted by g."""
    starts = torch.randint(len(text) - length + 3, (rows, 1), generator=g, device=text.device)
    truth = text[starts + torch.arange(length - 2, device=text.device)].long()  # (rows, L - 2)
    inputs, where = corrupt(truth, vocab["[MASK]"], len(vocab["words"]), g)
    truth, inputs, where = mine(truth), mine(inputs), mine(where)
    first = length * torch.arange(len(where), device=text.device)[:, None] + 1  # after [CLS]
    with autocast(args):
        logits = net(frame(inputs, vocab), at=(first + where).flatten())
    return F.cross_entropy(logits.float(), truth.gather(1, where).flatten())


def label_loss(net: nn.Module, documents: Tensor, length: int, rows: int, g: torch.Generator,
               vocab: dict, args: argparse.Namespace) -> Tensor:
    """A Classifier's loss on `rows` of the documents, drawn by g, up to `length` tokens of each."""
    chosen = documents[mine(torch.randint(len(documents), (rows,), generator=g, device=g.device))]
    with autocast(args):
        logits = net(chosen[:, 1:length + 1])
    return F.cross_entropy(logits.float(), chosen[:, 0].long())


def learn(net: nn.Module, opt: torch.optim.Optimizer, value: Tensor, clip: float) -> Tensor:
    """A step down the gradient of the loss `value`, cut to a norm of `clip`; returns the value."""
    value.backward()
    nn.utils.clip_grad_norm_(net.parameters(), clip)
    opt.step()
    opt.zero_grad()
    return value.detach()


def for_training(net: nn.Module, args: argparse.Namespace) -> nn.Module:
    """net, compiled with --compile, its gradients shared by the ranks; an exam's windows differ in
    what they ask for, which would compile it again and again."""
    run = torch.compile(net) if args.compile else net
    return nn.parallel.DistributedDataParallel(run) if RANKS > 1 else run


def tune(net: nn.Module, loss: Callable, text: Tensor, length: int, rows: int, vocab: dict,
         args: argparse.Namespace) -> nn.Module:
    """net itself, after --tune-steps of `loss` on `rows` of `length` each; its own Adam."""
    opt, wrapped, (_, height) = berts_adam(net), for_training(net, args), heights(args)
    for step in watch(range(args.tune_steps), args.tune_steps, f"tuning at {length}, step"):
        opt.param_groups[0]["lr"] = learning_rate(step, args.tune_steps, height, args.warmup)
        g = generator(text.device, args.seed, step, 2)
        value = loss(wrapped, text, length, rows, g, vocab, args)
        learn(wrapped, opt, value, args.clip_grad or math.inf)
        if step + 1 == args.tune_steps and not value.isfinite():
            raise FloatingPointError(f"tuning at {length}: loss {value}; a smaller --tune-lr?")
    return net


def train(args: argparse.Namespace, device: torch.device, state: dict | None) -> None:
    """The whole run: data, masked-language modelling at n, checkpoints, the post's experiment."""
    c, weights, vocab = read_start(args)
    n = c["max_position_embeddings"]
    text, valid, test = [None] * 3 if args.classify and not args.steps else \
        load_data(args, device, vocab, n)
    documents = load_labelled(args, device, vocab, n) if args.classify else None
    net = build(args, device, c, weights)
    opt = berts_adam(net)
    parts = dict(model=net, opt=opt)
    first = restore(state, parts)
    make_room(args)
    if args.bert and not (args.classify or any(name.startswith("cls.") for name in weights)):
        say(f"{args.bert} has no head for masked tokens: a new one learns in the --steps at {n}")
    wrapped, (height, _) = for_training(net, args), heights(args)
    progress = Progress(args, first, sum(p.numel() for p in net.parameters()),
                        args.batch_size * n, "token")

    def save(step: int, end: bool) -> None:
        save_checkpoint(args, step, parts)
        if not end and not RANK:
            exam = make_exam(valid[:args.eval_tokens].long(), vocab)
            by_position(net, exam, n, f"validation at {n}", vocab, args)

    for step in training(args, first, save):
        lr = opt.param_groups[0]["lr"] = learning_rate(step, args.steps, height, args.warmup)
        g = generator(device, args.seed, step)
        value = masked_loss(wrapped, text, n, args.batch_size, g, vocab, args)
        progress.add(step + 1, loss=learn(wrapped, opt, value, args.clip_grad or math.inf), lr=lr)
    seconds = time.perf_counter() - progress.begin
    metrics = report(net, text, test, vocab, args) if documents is None else \
        classify(net, documents, vocab, args)
    if not RANK:
        write_metrics(args, metrics | dict(
            step=args.steps, seed=args.seed, alpha=args.alpha, tune_steps=args.tune_steps,
            train_seconds=seconds,
            tokens_per_second=(args.steps - first) * progress.items / seconds))


def sample_only(args: argparse.Namespace, device: torch.device, state: dict | None) -> None:
    """--stretch-only: --bert or ckpt.pt for --times as many positions, as a folder; no training."""
    c, weights, vocab = read_start(args)
    net = build(args, device, c, weights)
    restore(state, dict(model=net))
    make_room(args)
    first_row(net.positions)
    length = args.times * len(net.positions)
    path = Path(args.out) / f"bert-{length}"
    head = bool(state) or any(name.startswith("cls.") for name in weights)
    if not RANK:
        write_bert(path, plain(stretched(net, args.arms[0], args), length), vocab, head)
    say(f"{length} positions, {args.arms[0]}: {path}")


# ---- command line ----

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, a row each; there is no --paper: the post's run is three flags, see Run."""
    experiment = dict(
        # flag       CPU        --gpu      least  meaning
        data=       ("python",             None, "python (the standard library's sources), "
                     "shakespeare, enwik8, text8, or a file, also .gz .bz2 .xz .zip"),
        steps=      (2600,      1800,      0, "in all, resumed ones included"),
        batch_size= (16,        128,       1, "global, over all processes"),
        seed=       (0,                    0, "of weights, noise and order"),
        bert=       ("",                   None, "a Hugging Face folder to start from, and its "
                     "words; without, a small BERT of bytes"),
        n=          (64,        128,       8, "positions trained, [CLS] and [SEP] too; not --bert"),
        width=      (128,       256,       2, "channels"),
        layers=     (2,         6,         1, "attention and two dense layers each"),
        heads=      (4,                    1, "of attention; an even share of the width each"),
        lr=         (0.0,                  0, "Adam's learning rate at its height; 0: 2e-3, with "
                     "--gpu 1e-3, with --bert 1e-4"),
        warmup=     (50,        200,       1, "steps of linear warm-up, in tuning too"),
        clip_grad=  (1.0,                  0, "largest gradient norm, 0: any"),
    )
    others = dict(
        save_every= (1000,                 1, "steps between checkpoints, with a validation"),
        alpha=      (0.4,                  0, "of 7947 (1), in (0, 1) but not 0.5"),
        times=      (4,                    2, "how many times as many positions"),
        arms=       (["hierarchical", "tile", "random"], None,
                     f"what is tuned, of {' '.join(WAYS)}; the first is written as a folder"),
        tune_steps= (400,                  0, "at the new length for each arm, and the control"),
        tune_lr=    (0.0,                  0, "the learning rate of these; 0: half of the other"),
        eval_tokens=(65_536,    1_048_576, 1, "of the test text that are used"),
        span=       (0,                    0, "tokens of a far mention; 0: 6 bytes, 1 word piece"),
        classify=   ("",                   None, "a file of documents whose labels are learnt in "
                     "the end: lines of label, tab, text, or CLUE's JSON; with --tune-steps"),
        stretch_only=(False,               None, "no training: write --bert or ckpt.pt stretched"),
    )
    return read_flags("hier_pos_bert", __doc__.partition("\n")[0], argv, experiment, others)


# ---- plumbing: the same text in every script that needs it ----

# === shared: setup ===
RANK, LOCAL_RANK, RANKS = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # by torchrun
STOP: list[BaseException] = []  # why training has to save and end: a signal, a log that is gone


class UserError(Exception):
    """Wrong input, alike on all ranks: one line that says what to do; exit code 2."""


def setup(args: argparse.Namespace) -> torch.device:
    """The device that --gpu asks for, and the process group of torchrun. Raises UserError."""
    if args.batch_size % RANKS:
        raise UserError(f"--batch-size {args.batch_size}: {RANKS} processes cannot share it evenly")
    torch.set_flush_denormal(True)  # numbers below 1e-38 are 0: they slow a CPU down to a third
    if args.gpu:
        wanted, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if there < wanted:
            raise UserError(f"--gpu: {there} of {wanted} CUDA devices found; leave --gpu out to "
                            "run on the CPU")
        torch.cuda.set_device(LOCAL_RANK)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = not args.fp32
        torch.set_float32_matmul_precision("highest" if args.fp32 else "high")
    if RANKS > 1:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if args.gpu else "gloo")
    return torch.device(f"cuda:{LOCAL_RANK}" if args.gpu else "cpu")


def autocast(args: argparse.Namespace) -> torch.autocast:
    """Inside, networks on a GPU compute in bfloat16, unless --fp32."""
    return torch.autocast("cuda" if args.gpu else "cpu", torch.bfloat16,
                          enabled=args.gpu and not args.fp32)


def mine(rows: Tensor) -> Tensor:
    """This rank's slice of a tensor for the whole global batch."""
    return rows.chunk(RANKS)[RANK]


def generator(device: torch.device | str, *key: int) -> torch.Generator:
    """Random numbers that depend on `key` alone, say (seed, step), not on what was drawn before."""
    mixed = np.random.SeedSequence((len(key), *key))  # or (0,) and (0, 0) would be one stream
    return torch.Generator(device).manual_seed(int(mixed.generate_state(1, np.uint64)[0]))


def tell(stream: str, text: str, end: str = "\n") -> None:
    """Prints on sys.stdout or sys.stderr; if nobody listens any more, no run is lost for it."""
    try:
        print(text, end=end, file=getattr(sys, stream), flush=True)
    except OSError:
        setattr(sys, stream, open(os.devnull, "w"))


def say(text: str, live: bool = False) -> None:
    """Prints a line, on rank 0; on a terminal the next one takes the place of a `live` one."""
    terminal = sys.stdout.isatty()
    text = re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)  # it would obey
    if not RANK:
        tell("stdout", "\r\033[K" * terminal + text, "" if live and terminal else "\n")


@contextmanager
def on_signals(act: Callable) -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP do `act`; one that is ignored, as by nohup, stays so."""
    kinds = [getattr(signal, k) for k in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, k)]
    before = {k: signal.getsignal(k) for k in kinds if signal.getsignal(k) != signal.SIG_IGN}
    try:
        for kind in before:
            signal.signal(kind, act)
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def run(body: Callable, args: argparse.Namespace, check: Callable) -> int:
    """The exit code of body(args, device, state), once `check` has passed the flags: what stops it
    becomes one line, and 2 for wrong input, 1 for a failure, 130 if interrupted."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")  # a terminal may not spell every sample
    try:
        with on_signals(signal.default_int_handler):
            device = setup(args)
            state = resume_run(args) if args.resume else None
            check(args)
            body(args, device, state)
        return 0
    except (KeyboardInterrupt, UserError, OSError, FloatingPointError, MemoryError,
            RuntimeError) as error:
        line = str(error).partition("\n")[0] or f"{type(error).__name__}, --data {args.data}"
        lost = RANKS > 1 and re.search("gloo|NCCL|onnection", line)  # its own rank says why
        scarce = re.search("allocate|memory|overflow", line)
        if isinstance(error, RuntimeError) and not (lost or scarce):
            raise
        if isinstance(error, KeyboardInterrupt):
            saved = args.own and (Path(args.out) / "ckpt.pt").exists()
            free = sorted(args.given - {*args.config, "out", "resume"})  # no checkpoint has them
            again = f"; say --{', --'.join(free).replace('_', '-')} again" * bool(free)
            line = "interrupted" + f"; saved, --out {args.out} --resume goes on{again}" * saved
        alike = KeyboardInterrupt, UserError, FloatingPointError  # on all ranks
        if not (RANK and (lost or isinstance(error, alike))):
            tell("stderr", "\n" * sys.stdout.isatty() + f"{args.script}.py: {line}")
        wrong = UserError, PermissionError, NotADirectoryError
        return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, wrong) else 1
    finally:
        if torch.distributed.is_initialized():
            gc.collect()  # the cycles of DDP keep the group alive: its threads would abort exit
            torch.distributed.destroy_process_group()
# === end shared ===


# === shared: download ===
def download(name: str, urls: list[str], digest: str, cache: str) -> Path:
    """The file `name` in `cache`, fetched once, by rank 0, from the first of `urls` that answers.

    digest: how its SHA-256 begins. Torch gives the file its name only when that agrees: half a
    download never passes for a whole one. Raises UserError; OSError for a disk full or shut.
    """
    path = Path(cache).expanduser() / name
    if RANK:
        torch.distributed.barrier()
    path.parent.mkdir(parents=True, exist_ok=True)
    for url in urls:
        try:
            if not path.exists():
                torch.hub.download_url_to_file(url, str(path), hash_prefix=digest)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
                raise
            print(f"{url}: {error}", file=sys.stderr)
    if RANKS > 1 and not RANK:
        torch.distributed.barrier()
    if not path.exists():
        raise UserError(f"cannot download {name}: put the file from {urls[0]} at {path}")
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
        raise UserError(f"{path}: damaged, its SHA-256 does not begin with {digest}; delete it")
    return path
# === end shared ===


# === shared: flags ===
def whole_numbers(text: str) -> tuple[int, ...]:
    """Reads 1,2,2 as (1, 2, 2)."""
    return tuple(int(part) for part in text.split(",") if part)


def shown(value) -> str:
    """A flag's value as one types it."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def read_flags(script: str, title: str, argv: list[str] | None, experiment: dict,
               others: dict) -> argparse.Namespace:
    """The flags of two tables, and those that all scripts share; a wrong one ends in a line, 2.

    A row: the defaults on the CPU, with --gpu, with --paper (the last one stands for the rest),
    the least number or the words allowed, the meaning. A flag reads what its default is. --resume
    takes `experiment`, args.config, from the checkpoint; args.given are those given by hand.
    """
    others = others | dict(
        gpu=(False, None, "use CUDA, or stop if there is none; has its own defaults"),
        out=(f"out/{script}", None, "where all is written; if it is taken, OUT.1, OUT.2, ..."),
        resume=(False, None, "go on from ckpt.pt in OUT; without --out in the newest of them"),
        cache=("~/.cache/kexue", None, "where downloads are kept"),
        fp32=(False, None, "with --gpu: neither bfloat16 nor TF32"),
        compile=(False, None, "torch.compile the network"))
    rows = experiment | others
    p = argparse.ArgumentParser(f"{script}.py", "%(prog)s [--flag VALUE ...]", title,
                                allow_abbrev=False)
    kept = p.add_argument_group("the experiment, which --resume takes from the checkpoint")
    free = p.add_argument_group("this run")
    reads = {tuple: (whole_numbers, "N,N"), int: (int, "N"), float: (float, "X")}
    for name, (*defaults, allowed, meaning) in rows.items():
        said = [f"{where}{shown(v)}" for where, v in zip(("", "--gpu ", "--paper "), defaults)]
        kind = type(defaults[0])
        reader, metavar = reads.get(kind, (str, "TEXT"))
        how = dict(action=argparse.BooleanOptionalAction if any(defaults) else "store_true") \
            if kind is bool else dict(choices=allowed) if isinstance(allowed, tuple) else \
            dict(type=reader, metavar=metavar, nargs="+" if kind is list else None)
        (kept if name in experiment else free).add_argument(
            f"--{name.replace('_', '-')}", default=argparse.SUPPRESS,
            help=f"{meaning} (default: {'; '.join(said)})", **how)
    args = p.parse_args(argv)
    args.given, args.config = set(vars(args)), list(experiment)
    args.script, args.own = script, False
    column = 2 if "paper" in args.given else 1 if "gpu" in args.given else 0
    for name, (*defaults, allowed, _) in rows.items():
        value = vars(args).setdefault(name, defaults[min(column, len(defaults) - 1)])
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(allowed, (int, float)) and not allowed <= number < 2**62:
                p.error(f"--{name.replace('_', '-')} {shown(value)}: from {allowed} to 2**62")
    args.resume |= bool(vars(args).get("sample_only"))  # which needs the checkpoint
    return args
# === end shared ===


# === shared: checkpoint ===
def put(path: Path, body: bytes) -> None:
    """Writes a whole file beside `path`, then renames it: an interrupted save harms nothing."""
    part = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
        part.write_bytes(body)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def make_room(args: argparse.Namespace) -> None:
    """A folder of this run's own: OUT, or OUT.1, OUT.2, ... if taken; goes into args.out."""
    out, k = Path(args.out), itertools.count(1)
    if not out.name.strip("."):
        raise UserError(f"--out {args.out}: name a folder of the run's own")
    while not (RANK or args.own):
        try:
            Path(args.out).mkdir(parents=True)
            args.own = True
        except FileExistsError:
            args.out = f"{out}.{next(k)}"


def save_checkpoint(args: argparse.Namespace, step: int, parts: dict, **more) -> None:
    """Writes OUT/ckpt.pt: the flags, the step, the state of each of `parts`, and `more`.

    Raises FloatingPointError if a weight is no longer finite: the older file stays.
    """
    path, nets = Path(args.out) / "ckpt.pt", [v for v in parts.values() if isinstance(v, nn.Module)]
    if not torch.stack([p.isfinite().all() for net in nets for p in net.parameters()]).all():
        raise FloatingPointError(f"a weight is no longer finite; {path}, if there, is from before")
    if not RANK:
        config, buffer = {name: getattr(args, name) for name in args.config}, io.BytesIO()
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save(dict(script=args.script, step=step, config=config, **more) | states, buffer)
        put(path, buffer.getbuffer())


def newest(args: argparse.Namespace, name: str) -> Path:
    """The file `name` in OUT; without --out, the newest in OUT, OUT.1, ... Raises UserError."""
    out = Path(args.out)
    places = [out] if "out" in args.given else [out, *out.parent.glob(f"{out.name}.[0-9]*")]
    files = [place / name for place in places if (place / name).is_file()]
    if not files:
        raise UserError(f"{out / name}: no such file; --out names a run's folder, no file in it")
    return max(files, key=lambda file: file.stat().st_mtime)


class State(dict):
    """What is in a checkpoint; to ask for what is not raises UserError."""

    def __missing__(self, name: str):
        raise UserError(f"ckpt.pt: has no {name}; it is damaged, or of another version")


def resume_run(args: argparse.Namespace) -> dict:
    """The checkpoint to go on from, on the CPU; its flags go into args, and its folder.

    Raises UserError for any file but a whole one of this script, and if a flag given by hand
    contradicts it; only --steps may be more, and --data or --bert lie elsewhere.
    """
    path = newest(args, "ckpt.pt")
    args.out, args.own = str(path.parent), True
    try:
        file = zipfile.ZipFile(path)  # torch looks neither at checksums nor at attributes, and a
        if file.testzip() or any(item.external_attr for item in file.infolist()):  # "folder" is
            raise ValueError  # memory as it happens to be
        state = torch.load(path, map_location="cpu", weights_only=True)
        config = {name: state["config"][name] for name in args.config}
        kinds = [(state["script"], args.script), (state["step"], args.steps)]
        kinds += [(value, getattr(args, name)) for name, value in config.items()]
        if state["script"] != args.script or any(type(a) is not type(b) for a, b in kinds):
            raise ValueError
    except Exception:  # torch raises a dozen kinds
        raise UserError(f"{path}: not a checkpoint of this {args.script}.py, or damaged") from None
    for name, old in config.items():
        new = vars(args)[name] if name in args.given else old
        if new != old and name not in ("steps", "data", "bert"):
            raise UserError(f"--{name.replace('_', '-')} {shown(new)}: the checkpoint has "
                            f"{shown(old)}; leave the flag out, or begin anew")
        setattr(args, name, new)
    if state["step"] > args.steps:
        raise UserError(f"--steps {args.steps}: the checkpoint has {state['step']} already")
    return State(state)


def restore(state: dict | None, parts: dict) -> int:
    """Puts the checkpoint's state into `parts`, name by name; the step to go on from, or 0."""
    for name, part in parts.items() if state else ():
        try:
            part.load_state_dict(state[name])
            for p, moments in getattr(part, "state", {}).items():  # an optimiser does not look
                if any(m.shape not in ((), p.shape) for m in moments.values()):
                    raise ValueError
        except Exception:  # torch raises half a dozen kinds
            raise UserError(f"ckpt.pt: its {name} is damaged, or does not fit the flags") from None
    return state["step"] if state else 0


def write_metrics(args: argparse.Namespace, metrics: dict) -> None:
    """Writes OUT/metrics.json, where what is not finite is null, and says where all is."""
    finite = json.loads(json.dumps(metrics), parse_constant=lambda _: None)
    put(Path(args.out) / "metrics.json", (json.dumps(finite, indent=1) + "\n").encode())
    say(f"all of it is in {args.out}/")
# === end shared ===


# === shared: progress ===
def training(args: argparse.Namespace, first: int, save: Callable) -> Iterator[int]:
    """The steps first, ..., args.steps - 1. Calls save(step, end) every args.save_every of them and
    at the end. A signal ends them early, on all ranks alike, and is raised once that is saved; a
    second one at once."""
    told = []

    def note(*_) -> None:
        told.append(time.monotonic())
        STOP.append(KeyboardInterrupt())
        if told[-1] > told[0] + 1:  # torchrun hands one Ctrl-C on a second time
            raise KeyboardInterrupt

    STOP.clear()
    with on_signals(note):
        for step in itertools.count(first):
            stop = torch.tensor(float(bool(STOP)))  # a copy: a signal may come at any moment
            if RANKS > 1:
                torch.distributed.all_reduce(stop)
            end = step >= args.steps or bool(stop)
            if end or step > first and step % args.save_every == 0:
                save(step, end)
            if end:
                break
            yield step
    if stop or STOP:
        raise STOP[0] if STOP else KeyboardInterrupt


def watch(items: Iterable, total: int, what: str) -> Iterator:
    """The items, and every few seconds a line on how many of `total` are done."""
    begin = then = time.perf_counter()
    for k, item in enumerate(items):
        now = time.perf_counter()
        if k and now - then > (0.5 if sys.stdout.isatty() else 10):
            eta = timedelta(seconds=int((total - k) * (now - begin) / k))
            say(f"{what} {k}/{total}  eta {eta}", live=True)
            then = now
        yield item


class Progress:
    """A line every few seconds, rewritten in place on a terminal, and a row in OUT/log.csv."""

    def __init__(self, args: argparse.Namespace, step: int, parameters: int, items: int, unit: str):
        """items: of `unit`, seen in a step. Begins with what runs, where and how."""
        self.log, self.steps = Path(args.out) / "log.csv", args.steps
        self.items, self.unit = items, unit
        self.first, self.shown, self.sums = step, step, {}
        self.begin = self.then = time.perf_counter()
        where = torch.cuda.get_device_name() if args.gpu else \
            f"CPU, {torch.get_num_threads()} threads"
        how = "bfloat16 and TF32" if args.gpu and not args.fp32 else "float32"
        say(f"{' '.join(sys.argv)}\n{where} x {RANKS}, torch {torch.__version__}, {how}"
            f"{', compiled' * args.compile}, {parameters:,} parameters, all goes to {args.out}/")
        if not RANK and self.log.exists():  # rows after the checkpoint will be made again
            rows = [row for row in self.log.read_text().splitlines(True) if row[-1] == "\n"]
            rows[1:] = [row for row in rows[1:] if float(row.partition(",")[0]) <= step]
            put(self.log, "".join(rows).encode())

    def add(self, step: int, **values: Tensor | float) -> None:
        """Takes a step's values; shows their means at first, at last, and every few seconds.

        Raises FloatingPointError if one is not finite. A log that cannot be written stops the run.
        """
        for name, value in values.items():  # no item(): that would wait for the GPU
            self.sums[name] = self.sums.get(name, 0) + value
        now, wait = time.perf_counter(), 0.5 if sys.stdout.isatty() else 10
        if RANK or now - self.then < wait and step not in (self.first + 1, self.steps):
            return
        count, elapsed = step - self.shown, now - self.begin
        row = dict(step=step, items=step * self.items, rate=count * self.items / (now - self.then),
                   elapsed=elapsed, **{k: float(v) / count for k, v in self.sums.items()})
        self.shown, self.then, self.sums = step, now, {}
        eta = (self.steps - step) * elapsed / (step - self.first)
        said = "".join(f"{name} {row[name]:.4g}  " for name in values)
        bar = f"[{'#' * (20 * step // self.steps):20}] " * sys.stdout.isatty()
        say(f"{bar}step {step}/{self.steps}  {said}{row['rate']:.0f} {self.unit}/s  elapsed "
            f"{timedelta(seconds=int(elapsed))}  eta {timedelta(seconds=int(eta))}",
            live=step < self.steps)
        if not all(map(math.isfinite, row.values())):
            raise FloatingPointError(f"step {step}: {said} ckpt.pt, if there, is from before")
        try:
            with open(self.log, "a") as file:
                if not file.tell():
                    print(*row, sep=",", file=file)
                print(*row.values(), sep=",", file=file)
        except OSError as error:
            STOP.append(error)  # so that the loop saves first
# === end shared ===


# === shared: text ===
TEXTS = {  # where to get it, and its SHA-256
    "shakespeare": ("shakespeare.txt", ["https://raw.githubusercontent.com/karpathy/char-rnn/"
                                        "master/data/tinyshakespeare/input.txt"],
                    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "enwik8": ("enwik8.zip", ["http://mattmahoney.net/dc/enwik8.zip"],
               "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"),
    "text8": ("text8.zip", ["http://mattmahoney.net/dc/text8.zip"],
              "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232")}


def load_text(data: str, cache: str) -> list[bytes]:
    """The documents of `data`: python (the standard library's sources, mixed, always in one order),
    shakespeare, enwik8, text8, or a file, also .gz .bz2 .xz; of a .zip all but hidden members.

    Raises UserError for anything else, or where there is nothing to read.
    """
    path = download(*TEXTS[data], cache) if data in TEXTS else Path(data).expanduser()
    try:
        if data == "python":
            root = Path(sysconfig.get_path("stdlib"))
            names = [p.relative_to(root) for p in root.rglob("*.py")]
            names = [p for p in names if not {"test", "tests", "idle_test", "site-packages",
                                              "dist-packages"} & set(p.parts)]
            names.sort(key=lambda p: hashlib.md5(p.as_posix().encode()).digest())
            documents = [(root / p).read_bytes() for p in names]
        elif path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                documents = [as_utf8(archive.read(name), f"--data {data}, {name}")
                             for name in sorted(archive.namelist()) if Path(name).name[:1] != "."]
        else:
            unpack = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
            with unpack.get(path.suffix.lower(), open)(path, "rb") as file:
                documents = [as_utf8(file.read(), f"--data {data}")]
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--data {data}: no such file (a folder: as .zip), nor one of python, "
                        f"{', '.join(TEXTS)}") from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the unpackers raise a dozen kinds
        raise UserError(f"--data {data}: damaged, or not what it seems to be: "
                        f"{str(error) or type(error).__name__}") from None
    if not any(documents):
        raise UserError(f"--data {data}: nothing in it")
    return [document for document in documents if document]


def as_utf8(raw: bytes, what: str) -> bytes:
    """raw, if it is UTF-8, without a byte-order mark; UTF-16 that has one is converted.

    A character cut at the end may be. Raises UserError for other encodings, and what is no text.
    """
    if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raw = raw.decode("utf-16").encode()
    raw = raw.removeprefix(codecs.BOM_UTF8)
    with suppress(UnicodeDecodeError):
        codecs.utf_8_decode(raw, "strict", False)
        if b"\0" not in raw:
            return raw
    high, pairs = (len(b"".join(re.findall(rb"[\x80-\xff]" + n, raw))) for n in (b"", b"{2,}"))
    if b"\0" in raw:
        guess = "UTF-16, UTF-32 or no text: it has NUL bytes"
    elif 10 * raw.decode("utf-8", "replace").count("\N{REPLACEMENT CHARACTER}") < high:
        guess = "UTF-8, but for damage that iconv -c leaves out"
    elif 2 * pairs > high:  # letters of two bytes, not accents
        guess = "GB18030, else BIG5, SHIFT_JIS or CP1251"
    else:
        guess = "CP1252"
    raise UserError(f"{what}: not UTF-8, perhaps {guess}: iconv -f {guess.partition(',')[0]} "
                    "-t UTF-8 OLD > NEW converts it")


def split_text(documents: list[bytes], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Train, validation and test bytes, uint8 (T,) on the device: 90 %, then 5 % and 5 %."""
    whole = torch.frombuffer(bytearray(b"\n".join(documents)), dtype=torch.uint8).to(device)
    return whole.split([len(whole) - 2 * (len(whole) // 20), len(whole) // 20, len(whole) // 20])
# === end shared ===


# === shared: curves ===
def ticks(low: float, high: float) -> list[float]:
    """Round numbers, 2 to 8 of them: the first is at most `low`, the last at least `high`."""
    span = high - low or abs(low) or 1
    power = 10 ** math.floor(math.log10(span / 6))
    step = next(k * power for k in (1, 2, 5, 10) if 6 * k * power >= span)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [k * step for k in range(first, max(last, first + 1) + 1)]


def draw_curves(path: Path, title: str, x_label: str, curves: dict[str, tuple[list, list]],
                log2: bool = False) -> None:
    """Writes an SVG: for each name a line through its points (x, y), with a gap where y is not
    finite; log2: x > 0 by powers of 2."""
    place = math.log2 if log2 else float
    lines = {name: [(place(x), float(y)) for x, y in zip(*xy)] for name, xy in curves.items()}
    seen = [p for points in lines.values() for p in points if math.isfinite(p[1])] or [(0, 0)]
    across, up = (ticks(min(values), max(values)) for values in zip(*seen))

    def at(x: float, y: float) -> str:
        return (f"{60 + 480 * (x - across[0]) / (across[-1] - across[0]):.1f},"
                f"{290 - 240 * (y - up[0]) / (up[-1] - up[0]):.1f}")

    svg = ['<svg xmlns="http://www.w3.org/2000/svg" width="740" height="340" font-size="12" '
           'font-family="sans-serif"><rect width="740" height="340" fill="#fff"/>',
           f'<text x="60" y="30" font-size="15">{html.escape(title)}</text>',
           f'<text x="540" y="328" text-anchor="end">{html.escape(x_label)}</text>']
    for y in up:
        svg += [f'<path d="M{at(across[0], y)}H540" stroke="#ddd"/>',
                f'<text x="52" y="{at(0, y).partition(",")[2]}" dy="4" text-anchor="end">{y:.4g}'
                '</text>']
    for x in across:
        svg.append(f'<text x="{at(x, 0).partition(",")[0]}" y="308" text-anchor="middle">'
                   f'{2 ** x if log2 else x:g}</text>')
    colours = itertools.cycle(["#0b62a4", "#d1495b", "#2e8b57", "#e0a100", "#7b52ab", "#555"])
    for row, ((name, points), colour) in enumerate(zip(lines.items(), colours)):
        line, pen = "", "M"
        for x, y in points:
            line += f"{pen}{at(x, y)}" if math.isfinite(y) else ""
            pen = "L" if math.isfinite(y) else "M"
        svg += [f'<path d="{line}" fill="none" stroke="{colour}" stroke-width="2"/>',
                f'<text x="550" y="{62 + 20 * row}" fill="{colour}">{html.escape(name)}</text>']
    path.write_text("\n".join(svg) + "\n</svg>\n", "utf-8")
# === end shared ===


# ---- main ----

def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse_args(argv)
    return run(sample_only if args.stretch_only else train, args, check_flags)


if __name__ == "__main__":
    sys.exit(main())
