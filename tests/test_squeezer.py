"The squeezer: files and faults, codes and units, threads, other architectures, readers that cannot lie about the budget."
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy import sparse as sp

from conftest import model_and_text
from neurocodec.codec.concepts import shifted
from neurocodec.codec.squeezer import (
    MEASURES, Sample, Squeezer, SqueezerConfig, chosen_only, energy, keep_strongest, load_squeezer, mixture, read_through, recover, save_squeezer, spectrum, squeeze_loss, strongest,
    support_of, take_sample, through, train_squeezer)
from neurocodec.core.run import UserError
from neurocodec.sae.layers import csr
from neurocodec.sae.quality import square_norm
from neurocodec.sae.sparse import Codes


def codes(n=1500, f=40, seed=0): return (sp.random(n, f, .1, "csr", dtype=np.float32, random_state=np.random.default_rng(seed)) @ sp.diags(np.geomspace(.1, 10, f))).tocsr().astype(np.float32)


@pytest.fixture(scope="module")
def squeezer(): return train_squeezer(take_sample(codes()), SqueezerConfig(ratio=2, steps=30))


def test_files(tmp_path, squeezer):
    save_squeezer(tmp_path / "s.safetensors", squeezer)
    again = load_squeezer(tmp_path / "s.safetensors")
    parts = {k: torch.as_tensor(getattr(squeezer, k)).contiguous() for k in Squeezer.__dataclass_fields__}
    assert all(torch.equal(torch.as_tensor(getattr(again, k)), t) for k, t in parts.items()) and again.ratio == squeezer.ratio == 2
    for wrong, message in ((parts | {"b_enc_M": torch.zeros(3)}, "do not fit"), ({"W": torch.zeros(1)}, "expected a squeezer's")):
        save_file(wrong, tmp_path / "w.safetensors")
        with pytest.raises(UserError, match=message) as e: load_squeezer(tmp_path / "w.safetensors")
        assert "\n" not in str(e.value)
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "s.safetensors").read_bytes()[:500])
    with pytest.raises(UserError, match="not a whole safetensors file"): load_squeezer(tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="no such file"): load_squeezer(tmp_path / "none.safetensors")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.floats(0, 1), st.integers(0, 99))
def test_loss_bounds_the_squared_error(b, f, p, seed):
    g, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    z, U, c = torch.rand(b, 3, generator=g), torch.randn(f, 3, generator=g), torch.randn(f, generator=g)
    m = sp.csr_matrix((rng.random((b, f)) < p) * rng.random((b, f)).astype(np.float32), dtype=np.float32)
    x, pre = torch.from_numpy(m.toarray()), z @ U.T + c
    loss = squeeze_loss(z, *support_of(m), U, c)
    torch.testing.assert_close(loss, torch.where(x > 0, pre - x, pre.relu()).square().sum() / b, rtol=1e-4, atol=1e-5)
    assert loss >= (pre.relu() - x).square().sum() / b - 1e-4


def test_codes_in_any_order_and_with_strangers(squeezer):
    "A squeezer sees values, not the order of a rectangle, its padding, or features it does not cover."
    m = codes(5, 40, 3)
    rows = [(m[i].data, m[i].indices) for i in range(5)]
    width = max(len(v) for v, _ in rows) + 2
    values, indices = torch.zeros(5, width), torch.zeros(5, width, dtype=torch.int64)
    for i, (v, at) in enumerate(rows):
        order = np.random.default_rng(i).permutation(len(v))
        values[i, :len(v)], indices[i, :len(v)] = torch.from_numpy(v[order]), torch.from_numpy(at[order].astype(np.int64))
        values[i, -1], indices[i, -1] = 7., 10**6
    z = squeezer.encode(Codes(values, indices))
    torch.testing.assert_close(z, squeezer.neurons(*support_of(m[:, squeezer.features_F.numpy()])), rtol=1e-4, atol=1e-5)
    assert squeezer.encode(Codes(values[:0], indices[:0])).shape == (0, squeezer.M)
    back = squeezer.decode(z, 4, block=2)
    assert back.values_Bk.shape == (5, 4) and (back.values_Bk >= 0).all() and set(back.indices_Bk[back.values_Bk > 0].tolist()) <= set(squeezer.features_F.tolist())
    torch.testing.assert_close(back.dense(40), squeezer.decode(z, 4).dense(40))
    assert (back.values_Bk.diff(dim=1) <= 0).all() and squeezer.decode(z[:0], 4).values_Bk.shape == (0, 4)


def test_no_reader_gets_more_than_its_budget():
    hat = torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) - .3
    for k in (1, 5, 30, 99):
        kept, c = chosen_only(hat.relu(), k), strongest(hat.relu(), k)
        assert ((kept > 0).sum(1) <= k).all()
        torch.testing.assert_close(c.dense(30), kept)
    sample = take_sample(codes())
    own = spectrum(sample)
    for M in (1, 5, 20):
        assert (keep_strongest(sample, M)(codes()[:, sample.features_F]) > 0).any(0).sum() <= M
        assert own.pca(M).W_enc_FM.shape[1] == M and len(mixture(sample, M).A_MF) == M


def test_same_bytes_for_any_number_of_threads():
    was, out = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            out.append(train_squeezer(take_sample(codes()), SqueezerConfig(ratio=2, steps=8)))
    finally: torch.set_num_threads(was)
    assert all(torch.equal(getattr(out[0], k), getattr(out[1], k)) for k in Squeezer.__dataclass_fields__ if k != "k")


def test_seeds_and_starts_differ():
    s = take_sample(codes())
    a, b, c = (train_squeezer(s, SqueezerConfig(ratio=4, steps=3, **how)) for how in ({}, {"seed": 1}, {"start": "random"}))
    assert not torch.equal(a.W_enc_MF, b.W_enc_MF) and not torch.equal(a.W_enc_MF, c.W_enc_MF)


def test_topk_keeps_its_share_of_neurons(tmp_path):
    sample = take_sample(codes())
    s = train_squeezer(sample, SqueezerConfig(ratio=2, steps=30, keep=.25))
    values_n, at = support_of(codes()[:, s.features_F.numpy()])
    all_NM, kept_NM = replace(s, k=0).neurons(values_n, at), s.neurons(values_n, at)
    assert s.k == round(s.M / 4) and ((kept_NM > 0).sum(1) <= s.k).all() and ((kept_NM > 0).sum(1) == s.k).any() and ((all_NM > 0).sum(1) > s.k).any()
    np.testing.assert_array_equal(kept_NM.max(1).values, all_NM.max(1).values)
    assert (kept_NM[kept_NM > 0] == all_NM[kept_NM > 0]).all()
    save_squeezer(tmp_path / "s.safetensors", s)
    assert load_squeezer(tmp_path / "s.safetensors").k == s.k


def test_shifted_codes_leave_pca_nothing():
    "Where features do not fire together there is nothing but their own variances."
    x = codes(20_000, 30)
    x = sp.hstack([x, x], format="csr")                                            # every feature has a twin
    together, apart = (take_sample(m) for m in (x, shifted(x, np.random.default_rng(0))))
    for sample, low, high in ((together, .98, 1.01), (apart, .4, .65)):
        hat = spectrum(sample).pca(30)(x if sample is together else shifted(x, np.random.default_rng(0))).numpy() / sample.scale_F
        assert low < 1 - np.square(hat - sample.x_NF.toarray()).mean(0).sum() / energy(sample.x_NF).sum() < high


def test_recovery_fails_where_it_must():
    "With fewer numbers than active features no reader can know the code."
    A = torch.randn(12, 200, generator=torch.Generator().manual_seed(0)) / 12**.5
    x = chosen_only(torch.rand(50, 200, generator=torch.Generator().manual_seed(1)), 20)
    hat = recover(x @ A.T, A)
    assert torch.isfinite(hat).all() and (hat - x).square().sum() > .3 * x.square().sum()


def test_user_errors_are_one_line():
    for make, message in ((lambda: SqueezerConfig(ratio=.9), "ratio = 0.9: expected 1 or more"), (lambda: SqueezerConfig(steps=0), "steps = 0"), (lambda: SqueezerConfig(keep=0), "keep = 0: expected a share above 0"),
                          (lambda: SqueezerConfig(start="warm"), "start = 'warm': expected own or random"), (lambda: take_sample(sp.csr_matrix((50, 4))), "no feature fires 10 times"),
                          (lambda: train_squeezer(take_sample(codes()), SqueezerConfig(lr=1e30, steps=12)), "not finite")):
        with pytest.raises(UserError, match=message) as e: make()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_other_architectures(kind):
    "The identity changes nothing, whatever the batch; carriers and uncovered features are dealt with; silence costs what ablating the features costs."
    from neurocodec.core.text import next_token_mask
    from neurocodec.sae.activations import kept_tokens
    from neurocodec.sae.dictionary import DictionaryConfig, create_dictionary

    lm, text = model_and_text(kind, range(5, 60, 3))
    d = create_dictionary(DictionaryConfig(d_model=lm.d_model, n_features=40, k=4))
    keep = kept_tokens(text.tokens_NT, text.doc_NT, 1)
    m = csr(d.encode(lm.residual(text.tokens_NT, 1)[keep]), 40)
    readers = {"same": lambda m: torch.from_numpy(m.toarray()), "silent": lambda m: torch.zeros(m.shape)}
    sample = take_sample(m, min_firings=1)
    for size in (2**23, 2000):
        tally, got, doc_N = read_through(lm, text, 1, d, sample, readers, 4, max_logits=size)
        t = tally.totals(reduce={"x": square_norm})
        for q in ("r2", "loss_ratio", "error_ratio", "kl_ratio"): assert abs(MEASURES[q](t, "same")[0] - 1) < 1e-3, q
        assert got.shape == (int(keep.sum()), len(sample.features_F)) and torch.equal(doc_N, text.doc_NT[keep])
    h = lm.residual(text.tokens_NT, 1)
    h[keep] = d.b_dec.detach()                                                     # openings of documents inside a context are not replaced
    logits = lm.from_layer(h, 1)
    loss = -logits[:, :-1].log_softmax(-1).gather(-1, text.tokens_NT[:, 1:, None])[..., 0]
    assert abs(t["silent.ce"][0] / t["scored"][0] - float(loss[next_token_mask(text) & keep[:, :-1]].mean())) < 1e-3
    half = sample._replace(features_F=sample.features_F[::2], scale_F=sample.scale_F[::2], x_NF=sample.x_NF[:, ::2].tocsr())
    got = read_through(lm, text, 1, d, half, readers, 4)[0].totals()
    x, covered = lm.residual(text.tokens_NT, 1)[keep], torch.isin(torch.arange(40), torch.from_numpy(half.features_F))
    error = x - d.b_dec.detach() - torch.from_numpy(m.toarray()).float() * covered @ d.W_dec.detach()
    assert abs(got["same.error"][0] / float(error.square().sum()) - 1) < 1e-3       # what is not covered is lost, and counts
    d.n_carriers = 3                                                               # as if the last three rows carried norms: they stay
    own = take_sample(m[:, :37], min_firings=1)
    t = read_through(lm, text, 1, d, own, readers, 4)[0].totals(reduce={"x": square_norm})
    assert abs(MEASURES["error_ratio"](t, "same")[0] - 1) < 1e-3


def test_a_squeezer_reads_like_its_tensors(squeezer):
    m = codes(7)[:, squeezer.features_F.numpy()]
    z = (torch.from_numpy(m.toarray()) @ squeezer.W_enc_MF.T + squeezer.b_enc_M).relu()
    torch.testing.assert_close(through(squeezer)(m), (z @ squeezer.W_dec_FM.T + squeezer.b_dec_F).relu(), rtol=1e-4, atol=1e-4)
    assert isinstance(take_sample(codes()), Sample)
