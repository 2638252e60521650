"The activation store: rows are where they say, memory stays flat, kills and damage leave no trace or one clear line."
import json
import multiprocessing
import os
import random
import resource
import signal
import time

import numpy as np
import pandas as pd
import pytest
import torch

from neurocodec.core.run import UserError
from neurocodec.core.text import Packed, pack
from neurocodec.sae.activations import CURSOR, LayerFile, Order, Store, collect, kept_tokens, write_store

BOS = 1


@pytest.fixture(scope="module")
def text():
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 96, (int(n),), generator=g).tolist() for n in torch.randint(5, 90, (60,), generator=g)]
    return Packed(*pack(ids, 32, BOS), pd.DataFrame(index=range(60)))


@pytest.fixture(scope="module")
def lm():
    from neurocodec.core.lm import tiny  # here, so that worker processes do not pay for importing transformers

    lm = tiny("llama")
    lm.tokenizer = type("Tokenizer", (), {"bos_token_id": BOS, "eos_token_id": 2})
    return lm


def read(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype, eps", [("float32", 0), ("float16", 1e-3)])
def test_rows_are_the_residual_stream(lm, text, tmp_path, dtype, eps):
    "Every row equals what the model gives for its context at its position, and no token is missing or doubled."
    stores = collect(lm, text, [0, 2], tmp_path, dtype, batch=5)
    keep = kept_tokens(text.tokens_NT, text.doc_NT, BOS)
    for i, s in stores.items():
        h = torch.cat([lm.residual(t, i) for t in text.tokens_NT.split(5)])
        w = s.where
        assert s.n == keep.sum() == len(w.doc_N)
        torch.testing.assert_close(s.rows(slice(None)), h[keep], rtol=eps, atol=eps)
        assert torch.equal(w.doc_N, text.doc_NT[keep])
        assert torch.equal(text.tokens_NT[w.context_N.long(), w.pos_N.long()], text.tokens_NT[keep])
        assert abs((s.rows(slice(None)).double() / s.scale).square().mean() - 1) < 1e-6


def test_encoders_do_not_see_padding(text, tmp_path):
    "A bidirectional model would let padding leak into every row of the last context."
    from neurocodec.core.lm import tiny

    bert = tiny("bert")
    store = collect(bert, text, [1], tmp_path, "float32", batch=4)[1]
    n, last = int((text.doc_NT[-1] >= 0).sum()), text.tokens_NT[-1:]
    assert 1 < n < 32
    alone = bert.residual(last[:, :n], 1)[0, 1:]
    torch.testing.assert_close(store.rows(slice(store.n - n + 1, None)), alone, rtol=1e-4, atol=1e-5)


def test_batches_are_one_global_permutation(tmp_path):
    store = write_store(tmp_path, torch.arange(5000.)[:, None] + 1, dtype="float32")
    stream = store.batches(128, seed=7)
    seen = torch.cat([next(stream) for _ in range(79)])[:10_000, 0].long() - 1
    assert torch.equal(seen[:5000].sort().values, torch.arange(5000)) and torch.equal(seen[5000:].sort().values, torch.arange(5000))
    assert not torch.equal(seen[:5000], seen[5000:])
    # global, not local: neighbours of the file end up anywhere
    assert abs(np.corrcoef(np.arange(5000), seen[:5000])[0, 1]) < .05
    for cursor in (0, 1, 4999, 5000, 5001, 12_345):
        assert torch.equal(next(store.batches(77, 7, cursor))[:, 0].long() - 1, torch.from_numpy(Order(5000, 7)(cursor, cursor + 77).astype(np.int64)))


class Toy:
    "Two blocks whose residual stream is a formula; `nap` seconds a pass."
    name, n_layers, causal, tokenizer = "toy", 2, True, None
    def __init__(self, d, nap): self.d_model, self.nap = d, nap
    def capture(self, tokens, names, mask):
        time.sleep(self.nap)
        base = torch.arange(self.d_model) * .01
        return {n: (tokens[..., None] * (1 + i) + base).sin() for i, n in enumerate(names)}


def work(folder, n, d, nap, dtype, save_every):
    os.environ["NEUROCODEC_QUIET"] = "1"
    torch.set_num_threads(1)
    tokens = torch.randint(0, 999, (n, 64), generator=torch.Generator().manual_seed(0))
    doc = torch.arange(n, dtype=torch.int32)[:, None].expand(n, 64).contiguous()
    collect(Toy(d, nap), Packed(tokens, doc, pd.DataFrame(index=range(n))), [0, 1], folder, dtype, batch=8, save_every=save_every)
    folder.with_suffix(".peak").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def collecting(folder, n, d=32, nap=0.0, dtype="float16", save_every=0.0):
    "A collection in a process of its own; the server has done the slow imports already."
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["neurocodec.sae.activations"])
    p = server.Process(target=work, args=(folder, n, d, nap, dtype, save_every))
    p.start()
    return p


def test_kill_and_resume_gives_the_same_bytes(tmp_path):
    "SIGKILL at random moments of a collection; the last start finishes it."
    whole = collecting(tmp_path / "whole", 400)
    rng, cursor = random.Random(0), tmp_path / "cut" / CURSOR
    def done(): return json.loads(cursor.read_text())["batches"] if cursor.exists() else 0
    for _ in range(2):
        before, p = done(), collecting(tmp_path / "cut", 400, nap=.03)
        while done() == before and p.is_alive(): time.sleep(.01)
        time.sleep(rng.uniform(0, .5))
        p.kill()
        p.join()
        assert before < done() < 50
        with pytest.raises(UserError, match="interrupted"): Store.open(tmp_path / "cut", 0)
    last = collecting(tmp_path / "cut", 400)
    for p in (whole, last):
        p.join()
        assert p.exitcode == 0
    assert read(tmp_path / "cut") == read(tmp_path / "whole")


def test_memory_is_flat_in_corpus_size(tmp_path):
    "Sixteen times the text, 200 MB of activations: the peak grows by little more than the text itself."
    for n in (50, 800): collecting(tmp_path / str(n), n, d=512, dtype="float32", save_every=1.0).join()
    peaks = [int((tmp_path / f"{n}.peak").read_text()) for n in (50, 800)]
    assert (tmp_path / "800" / "L0.bin").stat().st_size > 100e6
    assert peaks[1] - peaks[0] < 40_000, peaks


def test_another_plan_starts_over(lm, text, tmp_path):
    collect(lm, text, [0], tmp_path)
    first = read(tmp_path)
    collect(lm, text, [0], tmp_path)
    assert read(tmp_path) == first
    store = collect(lm, text, [1], tmp_path, n_tokens=100)[1]
    assert store.n == 100 and not (tmp_path / "L0.bin").exists()


def test_bad_input_is_one_line(lm, text, tmp_path):
    "Each mistake: one line that names what was found and expected, and nothing half-written."
    write_store(tmp_path / "s", torch.ones(10, 4), layer=3)
    os.truncate(tmp_path / "s" / "L3.bin", 11)
    for call, says in [
        (lambda: Store.open(tmp_path / "s", 3), r"L3\.bin: expected 80 bytes \(10 x 4 float16\), found 11; run chapter 12"),
        (lambda: Store.open(tmp_path / "s", 2), r"no activations of layer 2 \(found: 3\)"),
        (lambda: Store.open(tmp_path / "nowhere", 2), r"no activations of layer 2 \(found: none\)"),
        (lambda: collect(lm, text, [9], tmp_path / "a"), "blocks 0 to 2"),
        (lambda: collect(lm, text, [0], tmp_path / "c", "int8"), "none of float16, float32"),
        (lambda: write_store(tmp_path / "d", torch.full((2, 2), 1e6)), "not finite as float16; set dtype to float32"),
        (lambda: write_store(tmp_path / "e", torch.zeros(2, 2)), "all activations are zero"),
    ]:
        with pytest.raises(UserError, match=says) as e: call()
        assert "\n" not in str(e.value)
    for name in "abc": assert not list((tmp_path / name).glob("L*")), name


def limited(folder):
    "Try to reserve 20 kB where files may have 1 kB."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try: LayerFile(folder / "L0.bin", 1000, 10)
    except UserError as e: assert "cannot reserve" in str(e) and not (folder / "L0.bin").exists()
    else: raise AssertionError("no error")


def test_a_disk_too_small_is_found_out_at_once(tmp_path):
    "A limit on file size stands in for a full disk: the collection ends before it begins, and leaves no file."
    p = multiprocessing.get_context("forkserver").Process(target=limited, args=(tmp_path,))
    p.start()
    p.join()
    assert p.exitcode == 0
