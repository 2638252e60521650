"Decoders: killed anywhere they end with the same bytes, threads change nothing, other architectures work, nothing dense is made."
import hashlib
import json
import multiprocessing
import os
import random
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from neurocodec.core.lens import Lens
from neurocodec.core.lm import tiny
from neurocodec.core.run import Tracker, UserError
from neurocodec.core.text import Packed, pack
from neurocodec.decoder.decoder import (CHECKPOINT, KINDS, Decoder, DecoderConfig, Job, TrainDecoderConfig, autocast, climb, create_decoder, decoder_arm,
                                        load_decoder, read_codes, rungs, save_decoder, train_decoder, train_decoders)
from neurocodec.sae.dictionary import DictionaryConfig, create_dictionary

LAYER, FEATURES = 1, 64


def specimen(architecture="llama"):
    "A tiny model, a dictionary of its stream, random texts, and a lens that is none."
    lm = tiny(architecture)
    lm.tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2)
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 96, (int(n),), generator=g).tolist() for n in torch.randint(8, 60, (160,), generator=g)]
    text = Packed(*pack(ids, 32, 1), pd.DataFrame(index=range(len(ids))))
    dictionary = create_dictionary(DictionaryConfig(d_model=32, n_features=FEATURES, k=8), lm.residual(text.tokens_NT[:16], LAYER).flatten(0, 1))
    return lm, dictionary, text, Lens(torch.zeros(3, 32, 32), torch.zeros(3, 32))


def jobs(lm, dictionary, lens, **how):
    config = TrainDecoderConfig(**{"contexts": 120, "batch": 4, "lr": 3e-3} | how)
    shape = dict(n_features=FEATURES, d_vocab=96, width=32, heads=4, layer=LAYER)
    made = {kind: create_decoder(DecoderConfig(kind, **shape), lm, dictionary, 0, lens) for kind in KINDS}
    return {kind: Job(d, config) for kind, d in made.items()} | {"tokens": Job(create_decoder(DecoderConfig(start="fresh", **shape | {"n_features": 96}), seed=1), config, view="tokens")}


def digests(folder):  # a kill may leave the temporary file that was being written
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".") and "tensorboard" not in p.parts}


def work(folder, threads=1, contexts=120):
    os.environ["NEUROCODEC_QUIET"] = "1"
    torch.set_num_threads(threads)
    folder.mkdir(exist_ok=True)
    lm, dictionary, text, lens = specimen()
    train_decoders(lm, dictionary, text, LAYER, jobs(lm, dictionary, lens, contexts=contexts), folder, lambda start: Tracker(folder, start), save_every=0)


def training(*args):
    "A run in a process of its own; the server has done the slow imports already."
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["neurocodec.decoder.decoder", "torch.utils.tensorboard"])
    p = server.Process(target=work, args=args)
    p.start()
    return p


def step_of(path):
    if not path.exists(): return 0
    with safe_open(path, "pt") as f: return json.loads(f.metadata()["about"])["step"]


def test_sigkill_and_resume_gives_the_same_bytes(tmp_path):
    "Three decoders in one run, killed half a dozen times at random: weights, JSON, curves and log equal an undisturbed run's."
    whole, cut, rng, killed = tmp_path / "whole", tmp_path / "cut", random.Random(1), []
    training(whole).join()
    for _ in range(6):
        step, p = step_of(cut / CHECKPOINT), training(cut)
        for _ in range(2):  # the pause is as long as a step or two of this machine, so that a fast one does not end before it is killed
            began = time.monotonic()
            while (now := step_of(cut / CHECKPOINT)) == step and p.is_alive(): time.sleep(.001)
            step = now
        time.sleep(rng.random() * 2 * min(.1, time.monotonic() - began))
        if p.is_alive():
            p.kill()
            killed.append(step_of(cut / CHECKPOINT))
        p.join()
        if not p.exitcode: break
    training(cut).join()
    assert len(set(killed)) >= 3, killed
    assert digests(cut) == digests(whole)
    assert not (whole / CHECKPOINT).exists() and (whole / "attention" / "decoder.json").exists()


def test_threads_change_nothing(tmp_path):
    "The same bytes with one thread and with two."
    for n in (1, 2): training(tmp_path / str(n), n, 24).join()
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_other_architectures(architecture, tmp_path):
    "From codes to the ladder: what is borrowed fits, training lowers the divergence on other texts, and both kinds are read back."
    lm, dictionary, text, lens = specimen(architecture)
    train, held = (text._replace(tokens_NT=text.tokens_NT[s], doc_NT=text.doc_NT[s]) for s in (slice(0, 120), slice(120, None)))
    start = {k: j.decoder for k, j in jobs(lm, dictionary, lens).items() if k in KINDS}
    done = train_decoders(lm, dictionary, train, LAYER, {k: j for k, j in jobs(lm, dictionary, lens).items() if k in KINDS}, tmp_path)
    arms = {f"{k} {when}": decoder_arm(d) for when, group in (("before", start), ("after", done)) for k, d in group.items()}
    m = {k: v[0] for k, v in rungs(climb(lm, dictionary, held, LAYER, arms)).items() if v.ndim == 1}
    for k in KINDS: assert m[f"{k} after.kl"] < .9 * m[f"{k} before.kl"], m
    for k, d in done.items(): assert torch.equal(load_decoder(tmp_path, k).U_VW, d.U_VW)


def test_the_model_may_have_shared_keys():
    "Blocks with fewer key heads than heads are borrowed as what they compute."
    lm, dictionary, text, _ = specimen("llama")
    assert lm.model.config.num_key_value_heads < lm.n_heads
    create_decoder(DecoderConfig(n_features=FEATURES, d_vocab=96, width=32, heads=4, layer=0, start="model"), lm, dictionary)
    with pytest.raises(UserError, match="no block above"):
        create_decoder(DecoderConfig(n_features=FEATURES, d_vocab=96, width=32, heads=4, layer=2, start="model"), lm, dictionary)


def random_decoder(kind, seed, n_features=FEATURES):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        d = Decoder(DecoderConfig(kind, n_features, 20, 16, 2, start="fresh"))
        for w in d.parameters(): w.data.normal_(0, .4)
    return d.double()


codes = st.tuples(st.integers(0, 2**31), st.integers(1, 3), st.integers(2, 9), st.integers(1, 6), st.sampled_from(KINDS))


@settings(max_examples=40, deadline=None)
@given(codes)
def test_what_holds_for_any_codes(case):
    "Order within a position and zeros do not matter, later positions are not seen, open positions have no features."
    seed, B, T, k, kind = case
    d, g = random_decoder(kind, seed), torch.Generator().manual_seed(seed)
    values, indices = torch.rand(B, T, k, generator=g).double(), torch.randint(FEATURES, (B, T, k), generator=g)
    mask = torch.rand(B, T, generator=g) < .8
    z = d(values, indices, mask)
    order = torch.randperm(k, generator=g)
    assert torch.allclose(d(values[..., order], indices[..., order], mask), z)
    zeros = torch.cat([values, torch.zeros(B, T, 2).double()], -1), torch.cat([indices, torch.randint(FEATURES, (B, T, 2), generator=g)], -1)
    assert torch.allclose(d(*zeros, mask), z)
    cut = int(torch.randint(1, T, (), generator=g))
    later, other = values.clone(), indices.clone()
    later[:, cut:], other[:, cut:] = 5., 0
    assert torch.allclose(d(later, other, mask)[:, :cut], z[:, :cut])
    later = torch.where(mask[..., None], values, 7.)
    assert torch.allclose(d(later, indices, mask), z)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gates(kind):
    "The gradient with respect to values is that of finite differences."
    d, g = random_decoder(kind, 3), torch.Generator().manual_seed(0)
    values, indices = torch.rand(2, 4, 3, generator=g).double().requires_grad_(), torch.randint(FEATURES, (2, 4, 3), generator=g)
    assert torch.autograd.gradcheck(lambda v: d(v, indices), (values,))


class Largest(TorchDispatchMode):
    "Notes the largest tensor that any operation returns."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in (out if isinstance(out, (tuple, list)) else [out]):
            if isinstance(t, torch.Tensor): self.numel = max(getattr(self, "numel", 0), t.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_no_dense_codes(kind):
    "With 50,000 features and 16,000 positions, forward and backward make nothing of even a hundredth of positions x features."
    d = random_decoder(kind, 0, 50_000).float()
    values, indices = torch.rand(64, 250, 4), torch.randint(50_000, (64, 250, 4))
    with Largest() as seen: d.unembed(d.hidden(values, indices)[:, ::50]).sum().backward()
    assert d.E_FW.numel() <= seen.numel < 64 * 250 * 50_000 / 100


def test_mixed_precision_is_never_silent_on_a_cpu(tmp_path):
    "`auto` leaves a CPU in float32; asked for, bfloat16 trains to nearly the same place."
    cpu = torch.device("cpu")
    assert not autocast(TrainDecoderConfig(), cpu)._enabled and autocast(TrainDecoderConfig(precision="bfloat16"), cpu)._enabled
    lm, dictionary, text, lens = specimen()
    kl = {}
    for precision in ("float32", "bfloat16"):
        how = TrainDecoderConfig(contexts=80, batch=4, lr=3e-3, precision=precision)
        d = create_decoder(DecoderConfig(n_features=FEATURES, d_vocab=96, width=32, heads=4, layer=LAYER), lm, dictionary, 0, lens)
        train_decoder(lm, dictionary, text, LAYER, d, how, tmp_path / precision)
        kl[precision] = pd.read_parquet(tmp_path / precision / "decoder" / "curves.parquet").kl.tail(5).mean()
    assert kl["float32"] != kl["bfloat16"] and abs(kl["float32"] / kl["bfloat16"] - 1) < .05, kl


def test_damage_is_found(tmp_path):
    "A changed byte, another's tensors, a missing file: one line each."
    save_decoder(tmp_path, random_decoder("linear", 0).float())
    weights = tmp_path / "decoder.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="its digest differs"): load_decoder(tmp_path)
    save_decoder(tmp_path, random_decoder("attention", 0).float())
    (tmp_path / "decoder.json").write_text('{"config": {"kind": "attention", "colour": 3}}')
    with pytest.raises(UserError, match="unknown config keys colour"): load_decoder(tmp_path)


def test_other_data_do_not_continue_a_checkpoint(tmp_path):
    "A finished training is returned as it is; with another learning rate it is trained anew."
    lm, dictionary, text, lens = specimen()
    def run(lr): return train_decoders(lm, dictionary, text, LAYER, {"linear": jobs(lm, dictionary, lens, contexts=16, lr=lr)["linear"]}, tmp_path)["linear"]
    one = run(1e-3)
    stamp = (tmp_path / "linear" / "decoder.safetensors").stat().st_mtime_ns
    assert torch.equal(run(1e-3).E_FW, one.E_FW) and (tmp_path / "linear" / "decoder.safetensors").stat().st_mtime_ns == stamp
    assert not torch.equal(run(2e-3).E_FW, one.E_FW)


def test_codes_do_not_tell_the_token():
    "What a decoder is shown is a function of the stream after the layer alone: other tokens with the same stream give the same codes."
    lm, dictionary, text, _ = specimen()
    tokens = text.tokens_NT[:2]
    p = read_codes(lm, dictionary, tokens, LAYER, text.doc_NT[:2])
    h = lm.residual(tokens, LAYER)[p.keep_BT]
    assert torch.equal(dictionary.encode(h).indices_Bk, p.indices_BTk[p.keep_BT])
    assert not p.values_BTk[~p.keep_BT].any() and not p.indices_BTk[~p.keep_BT].any()
