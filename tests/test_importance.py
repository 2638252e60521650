"Importance: estimates that must equal ablations where outputs are linear, nothing the size of the dictionary, other architectures, and statistics against others' code."
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from neurocodec.core.lm import Intervention, cost, tiny
from neurocodec.core.text import Packed, pack
from neurocodec.decoder.decoder import DecoderConfig, Pool, borrow_readout, create_decoder, read_pool
from neurocodec.decoder.importance import (ablate, attribute, choices, decoder_output, direct_logits, integrate, margin, model_output, over_features,
                                           overlap, same_sign, share_of, spearman, total_by_feature)
from neurocodec.sae.dictionary import DictionaryConfig, create_dictionary

F, V, W = 30, 20, 12


def pool(n=4, T=9, k=3, seed=0, features=F):
    g = torch.Generator().manual_seed(seed)
    keep = torch.ones(n, T).bool()
    keep[:, 0] = False
    score = keep.clone()
    score[:, -1] = False
    values = torch.rand(n, T, k, generator=g).add(.1) * keep[..., None]
    return Pool(values, torch.rand(n, T, features, generator=g).topk(k).indices, keep, score, torch.zeros(n, T).long(), torch.randn(n, T, W, generator=g), torch.arange(n)[:, None].expand(n, T), torch.randn(n, T, W, generator=g))


def decoder(kind="attention", norm="rms", features=F):
    d = create_decoder(DecoderConfig(kind, n_features=features, d_vocab=V, width=W, heads=2, layers=1, start="fresh", norm=norm), seed=1)
    d.b_W.data.add_(1)
    return d


def text(lm, n=6):
    lm.tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2)
    ids = [torch.randint(3, 90, (9 + i,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(n)]
    return Packed(*pack(ids, 16, 1), pd.DataFrame(index=range(n)))


def places(p, n=8, seed=0):
    at = (p.values_BTk > 0).nonzero()
    return at[torch.randperm(len(at), generator=torch.Generator().manual_seed(seed))[:n]]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6))
def test_a_linear_output_has_exact_attributions(seed):
    p, at = pool(seed=seed), None
    output, at = decoder_output(decoder("linear", "none")), places(p, seed=seed)
    want = attribute(output, p, draws=0).margin_BTk[tuple(at.T)]
    assert torch.allclose(ablate(output, p, at).margin_R, want, atol=1e-5)
    assert torch.allclose(integrate(output, p, 3)[tuple(at.T)], want, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_other_architectures(kind):
    lm = tiny(kind)
    packed = text(lm)
    d = create_dictionary(DictionaryConfig(d_model=32, n_features=40, k=4))
    p = read_pool(lm, d, packed, 1, batch=2)
    output, at = model_output(lm, d, 1), places(p, 5)
    assert torch.allclose(output(p, p.values_BTk), lm.logits(packed.tokens_NT), atol=1e-4)
    z, found = lm.logits(packed.tokens_NT), ablate(output, p, at, rows=2)
    for i, (c, t, j) in enumerate(at.tolist()):
        out = -p.values_BTk[c, t, j] * d.W_dec.detach()[p.indices_BTk[c, t, j]]
        with lm.intervene(Intervention("blocks.1.hook_resid_post", "add", out, t)): gone = lm.logits(packed.tokens_NT[c:c + 1])
        m = ((margin(z[c:c + 1], choices(z[c:c + 1])) - margin(gone, choices(z[c:c + 1]))) * p.score_BT[c]).sum()
        kl = (torch.nn.functional.kl_div(gone.log_softmax(-1), z[c:c + 1].softmax(-1), reduction="none").sum(-1) * p.score_BT[c]).sum()
        assert abs(found.margin_R[i] - m) < 1e-3 and abs(found.kl_R[i] - kl) < 1e-4
    near = ablate(output, p, at, .99 * p.values_BTk[tuple(at.T)]).margin_R * 100  # a step small enough to be straight
    assert torch.allclose(near, attribute(output, p, draws=0).margin_BTk[tuple(at.T)], atol=.05 * near.abs().max().item() + .01)
    assert direct_logits(lm, d, p, borrow_readout(lm)).shape == p.values_BTk.shape


def test_one_forward_pass_a_batch():
    p, calls, output = pool(n=7), [], decoder_output(decoder())
    def counted(some, values):
        calls.append(len(values))
        return output(some, values)
    whole = attribute(counted, p, batch=3)
    assert calls == [3, 3, 1]
    assert torch.allclose(whole.margin_BTk, attribute(output, p, batch=7).margin_BTk, atol=1e-5)  # batches do not matter


def test_memory_does_not_grow_with_features():
    def megabytes(features):
        lm = tiny("llama")
        packed = text(lm)
        d = create_dictionary(DictionaryConfig(d_model=32, n_features=features, k=4))
        p = read_pool(lm, d, packed, 1)
        dec = decoder(features=features)
        return [cost(lambda o=o: attribute(o, p), 1).megabytes for o in (model_output(lm, d, 1), decoder_output(dec))]
    few, many = megabytes(64), megabytes(64_000)
    assert all(b < a + 1.6 for a, b in zip(few, many)), (few, many)  # a (B, T, F) matrix would be 25 MB, offsets by feature are half of one


def test_threads_change_nothing_that_counts():
    p, output, before = pool(), decoder_output(decoder()), torch.get_num_threads()
    got = []
    for n in (1, 2):
        torch.set_num_threads(n)
        got.append(attribute(output, p, seed=3))
    torch.set_num_threads(before)
    for a, b in zip(*got): assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_nothing_to_remove_and_nothing_scored():
    p, output = pool(), decoder_output(decoder())
    assert [len(x) for x in ablate(output, p, torch.zeros(0, 3).long())] == [0, 0, 0]
    silent = p._replace(score_BT=torch.zeros_like(p.score_BT))
    assert attribute(output, silent).margin_BTk.abs().sum() == 0
    assert ablate(output, silent, places(p)).kl_R.abs().sum() == 0
    assert np.isnan(share_of(0 * p.values_BTk, p, np.array([1]), 20).value)


def test_ablation_leaves_the_pool_alone():
    p = pool()
    kept = p.values_BTk.clone()
    attribute(decoder_output(decoder()), p)
    ablate(decoder_output(decoder()), p, places(p))
    assert torch.equal(p.values_BTk, kept) and not p.values_BTk.requires_grad


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 30))
def test_weighted_ranks_are_those_of_repeated_entries(seed, n):
    rng = np.random.default_rng(seed)
    x, y, w = rng.normal(size=n), rng.normal(size=n), rng.integers(0, 4, n)
    w[:3] = 1
    want = spearmanr(np.repeat(x, w), np.repeat(y, w)).statistic
    assert abs(spearman(x[None], y[None], w[None].astype(float))[0] - want) < 1e-9
    assert abs(same_sign(x[None], y[None], w[None])[0] - np.repeat(np.sign(x) == np.sign(y), w).mean()) < 1e-9
    some = w > 0
    top = set(np.flatnonzero(some)[np.argsort(-x[some])[:5]]) & set(np.flatnonzero(some)[np.argsort(-y[some])[:5]])
    assert abs(overlap(x[None], y[None], w[None], 5)[0] - len(top) / min(5, some.sum())) < 1e-9


def test_intervals_are_over_documents():
    rng = np.random.default_rng(0)
    doc, feature = np.repeat(np.arange(12), 50), rng.integers(0, 25, 600)
    x = np.exp(rng.normal(size=25))[feature] * np.exp(rng.normal(size=600))
    y = x * np.exp(rng.normal(size=12))[doc]  # a document's own size is noise that more tokens of it do not average out
    by_doc, by_token = (over_features(d, feature, x, y, n_boot=300) for d in (doc, np.arange(600)))
    assert by_doc.n == 12 and by_doc.low < by_doc.value <= by_doc.high + 1e-9 and by_doc.value == by_token.value
    x, y = np.exp(feature / 4 + .3 * rng.normal(size=600)), np.exp(feature / 4 + .3 * rng.normal(size=600))
    near = over_features(doc, feature, x, y, n_boot=300)   # resamples rank with more noise, so most lie below a value near 1
    assert .9 < near.low < near.value <= near.high <= 1


def test_totals_and_shares_add_up():
    p = pool(n=6)
    x = attribute(decoder_output(decoder()), p).margin_BTk
    total = total_by_feature(x, p, F)
    halves = [share_of(x, p, part, 20).value for part in (np.arange(F // 2), np.arange(F // 2, F))]
    assert abs(sum(halves) - 1) < 1e-6 and abs(halves[0] - total[:F // 2].sum() / total.sum()) < 1e-6
