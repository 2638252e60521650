"Statistics of neurons: moments and sketches that merge in any order, one pass that depends on no batch, partners, σ units, other architectures."
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kurtosis, ttest_1samp

from neurocodec.core.lm import tiny
from neurocodec.core.run import UserError
from neurocodec.core.text import Packed, pack
from neurocodec.resonance.neurons import Moments, Sketch, correlation_with, left_one_out, legacy_csv, legacy_table, nearest_relative, neuron_table, unit_columns, watch_neurons

TOKENIZER = type("Tokenizer", (), {"bos_token_id": 1, "eos_token_id": 2})


def text(n=40, seed=0):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, 90, k).tolist() for k in rng.integers(2, 60, n)]
    return Packed(*pack(ids, 32, 1), pd.DataFrame({"domain": ["a"] * n}))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.floats(-1e6, 1e6), st.integers(0, 99))
def test_moments_merge_to_those_of_the_whole(sizes, shift, seed):
    x = torch.from_numpy(np.random.default_rng(seed).standard_t(3, (sum(sizes), 3)) + shift)
    parts = [Moments.of(p) for p in x.split(sizes)]
    for order in (parts, parts[::-1]):
        m = Moments.of(x[:0])
        for p in order: m = m.merge(p)
        whole = Moments.of(x)
        assert m.n == whole.n
        for a, b in zip(m[1:], whole[1:]): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    if len(x) > 3: np.testing.assert_allclose(m.kurtosis_M, kurtosis(x, fisher=False), rtol=1e-4)


def test_a_constant_column_has_no_kurtosis_and_no_spread():
    m = Moments.of(torch.full((10, 1), 3.))
    assert m.sd_M == 0 and m.kurtosis_M.isnan()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.sampled_from([.005, .02, .1]), st.floats(-4, 4), st.integers(0, 99))
def test_quantiles_keep_their_error(n, accuracy, log_scale, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_t(2, (n, 2)) * 10**(log_scale / 2)).astype(np.float32)
    s = Sketch(2, accuracy)
    for part in np.array_split(x, 3): s.add(torch.from_numpy(part))
    inside = np.abs(x).max() < 2**12
    for q in (0, .01, .3, .5, .99, 1) if inside else ():
        exact = np.quantile(x, q, axis=0, method="inverted_cdf")
        assert (np.abs(s.quantile(q).numpy() - exact) <= 1.001 * accuracy * np.abs(exact) + s.least).all()


def test_beyond_its_range_a_sketch_keeps_extremes():
    s = Sketch(1)
    s.add(torch.tensor([[1e9], [-1e9], [0.]]))
    assert s.quantile(1.)[0] <= s.high_M[0] == 1e9 and s.quantile(0.)[0] >= s.low_M[0] == -1e9 and s.quantile(.5)[0] == 0
    with pytest.raises(UserError, match="accuracy = 2"): Sketch(1, 2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_one_pass_whatever_the_batch(architecture):
    lm = tiny(architecture)
    lm.tokenizer = TOKENIZER
    tables = [neuron_table(watch_neurons(lm, text(), groups=4, pair_tokens=300, batch=b)) for b in (1, 64)]
    for c in ("mean", "sd", "rate", "kurtosis", "q50", "max"): np.testing.assert_allclose(tables[0][c], tables[1][c], rtol=2e-2 if c == "q50" else 1e-3, atol=1e-4)
    assert len(tables[0]) == lm.n_layers * lm.d_mlp and (tables[0].loneliness >= 0).all()


def test_left_out_positions_come_back_in_the_legacy_list():
    lm, packed = tiny("llama"), text()
    lm.tokenizer = TOKENIZER
    a, b = (legacy_table(watch_neurons(lm, packed, skip_bos=s, pair_tokens=100)) for s in (True, False))
    pd.testing.assert_frame_equal(a, b, rtol=1e-9)
    assert a.tokens_observed[0] == int(packed.mask_NT.sum())
    lines = legacy_csv(a).splitlines()
    assert lines[0] == "layer,neuron,mean,std_dev,tokens_observed" and len(lines) == 1 + len(a)


def test_empty_text_is_refused():
    lm = tiny("llama")
    lm.tokenizer = TOKENIZER
    p = text()
    with pytest.raises(UserError, match="no tokens to read"): watch_neurons(lm, p._replace(tokens_NT=p.tokens_NT[:0], doc_NT=p.doc_NT[:0]))


def test_partners_are_those_of_numpy_and_never_oneself():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 300, 25, generator=g)
    x[:, 3] = 7.                                                    # does not vary
    r = np.nan_to_num(np.corrcoef(np.delete(x.numpy(), 3, 1).T))
    np.fill_diagonal(r, 0)
    partner = nearest_relative(x, block=6)
    kept = np.delete(np.arange(25), 3)
    np.testing.assert_array_equal(partner[kept].numpy(), kept[np.abs(r).argmax(1)])
    assert (partner != torch.arange(25)).all() and (unit_columns(x)[:, 3] == 0).all()
    np.testing.assert_allclose(correlation_with(y, partner)[kept], [np.corrcoef(y[:, i], y[:, partner[i]])[0, 1] for i in kept], atol=1e-5)


@pytest.mark.parametrize("n", [2, 10, 20])
def test_jackknife_of_a_mean_is_its_t_interval(n):
    x = np.random.default_rng(0).normal(size=n)
    e = left_one_out(lambda g: np.delete(x, [] if g is None else g).mean(), n)
    np.testing.assert_allclose(e[:3], [x.mean(), *ttest_1samp(x, 0).confidence_interval()])
