"The monitor: prompts, pooled reading whatever the batch, rates against scikit-learn, watches that keep what they must not see, other architectures."
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse as sp
from sklearn.metrics import roc_auc_score

from neurocodec.codec.monitor import (
    alarms, alive, auroc, column_moments, frequency_matched, known, new_quiet, new_watched, openings, probe_weights, read_windows, separation, theme_weights, thresholds)
from neurocodec.core.lm import tiny
from neurocodec.core.text import Packed, pack, pad
from neurocodec.sae.dictionary import DictionaryConfig, create_dictionary

TOKENIZER = type("Tokenizer", (), {"bos_token_id": 1, "eos_token_id": 2})


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 25), min_size=1, max_size=12), st.integers(2, 12), st.integers(1, 9), st.booleans())
def test_prompts_are_how_documents_begin(lengths, context, n, opened):
    "Whatever the context a document falls into, and with or without an opening token."
    ids = [[10 * (i + 1) + j % 7 for j in range(k)] for i, k in enumerate(lengths)]
    bos = 1 if opened else None
    p = openings(Packed(*pack(ids, context, bos), pd.DataFrame({"domain": ["a"] * len(ids)})), n, bos)
    assert p.tokens_BT.tolist() == [x[:n] for x in ids if len(x) >= n]
    assert p.doc_B.tolist() == [i for i, x in enumerate(ids) if len(x) >= n]


def test_prompts_of_padded_contexts():
    ids = [[5, 6, 7], [8], [9, 9]]
    p = openings(Packed(*pad(ids, 4, 0), pd.DataFrame({"domain": list("abc")})), 2, None)
    assert p.tokens_BT.tolist() == [[5, 6], [9, 9]] and p.domain_B.tolist() == ["a", "c"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_reading_does_not_depend_on_the_batch(architecture):
    lm = tiny(architecture)
    lm.tokenizer = TOKENIZER
    d = create_dictionary(DictionaryConfig(d_model=lm.d_model, n_features=40, k=4))
    tokens = torch.randint(3, 90, (7, 10), generator=torch.Generator().manual_seed(0))
    a, b = (read_windows(lm, tokens, {"f": (1, d), "x": (0, None)}, 5, batch=n) for n in (2, 64))
    assert set(a) == {("f", "mean"), ("f", "max"), ("x", "mean")} and a["f", "max"].shape == (14, 40)
    for k in a: np.testing.assert_allclose(*(v[k].toarray() if sp.issparse(v[k]) else v[k] for v in (a, b)), atol=1e-4)
    assert (a["f", "max"].toarray() >= a["f", "mean"].toarray() - 1e-6).all()


def test_carriers_are_no_features():
    lm = tiny("llama")
    lm.tokenizer = TOKENIZER
    d = create_dictionary(DictionaryConfig(d_model=lm.d_model, n_features=40, k=4))
    d.n_carriers = 3
    assert read_windows(lm, torch.full((2, 4), 5), {"f": (1, d)}, 4)["f", "mean"].shape == (2, 37)


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 60), st.integers(1, 8), st.integers(0, 999))
def test_auroc_counts_documents_as_often_as_drawn(n, levels, seed):
    rng = np.random.default_rng(seed)
    s, y = rng.integers(0, levels, n).astype(float), np.arange(n) % 3 == 0
    K = np.stack([np.ones(n), rng.integers(0, 3, n)])
    for row, got in zip(K, auroc(s, y, K)):
        many = np.repeat(np.arange(n), row.astype(int))
        if 0 < y[many].sum() < len(many): np.testing.assert_allclose(got, roc_auc_score(y[many], s[many]), atol=1e-9)
        else: assert np.isnan(got)


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 80), st.integers(1, 20), st.floats(0, .5), st.integers(0, 999))
def test_no_more_false_alarms_than_allowed_and_none_to_spare(n, levels, share, seed):
    "On the prompts it was set on; the next lower score would be too low a threshold."
    rng = np.random.default_rng(seed)
    s, y = rng.integers(0, levels, n).astype(float), np.arange(n) % 3 == 0
    K = np.stack([np.ones(n), rng.integers(0, 3, n)])
    t = thresholds(s, y, share, K)
    got = alarms(s, ~y, t, K)
    assert np.nanmax(got, initial=0) <= share + 1e-6
    below = [np.max(s[~y][s[~y] < x], initial=-1) for x in t]
    if below[0] >= 0: assert alarms(s, ~y, np.array(below), K)[0] > share


def test_nobody_to_detect_is_no_number():
    assert np.isnan(alarms(np.zeros(3), np.zeros(3, bool), np.zeros(1), np.ones((1, 3)))[0])


def test_a_watch_never_sees_what_it_must_not():
    domains = list("abcdef")
    for w in known(domains): assert not w.watched & w.quiet and w.judged == w.watched
    for w in new_quiet(domains): assert not (w.watched | w.quiet) & w.against and len(w.against) == 3
    for w in new_watched(domains, [["a", "b", "c"], ["d", "zz"], ["e", "ood"]], ["ood"]):
        assert not w.judged & (w.watched | w.quiet) and w.watched
    assert [w.name for w in new_watched(domains, [["a", "b"], ["d", "zz"], ["e", "ood"]], ["ood"])] == ["a", "b", "ood"]
    assert new_quiet(["a", "b", "c"])[0].quiet and all(w.quiet for w in new_quiet(["a", "b", "c"]))


def test_columns_are_treated_alike_dense_or_sparse():
    rng = np.random.default_rng(0)
    x = sp.random(200, 30, .2, "csr", random_state=rng)
    y = rng.random(200) < .4
    for a, b in zip(column_moments(x), column_moments(x.toarray())): np.testing.assert_allclose(a, b, atol=1e-9)
    np.testing.assert_allclose(separation(x, y), separation(x.toarray(), y))
    still = sp.csr_matrix(np.pad(x.toarray(), ((0, 0), (0, 1))))
    assert separation(still, y)[30] == -np.inf and theme_weights(column_moments(still)[1], [30, 2])[30] == 0
    w = probe_weights(100 * x.toarray(), y, .1)                     # units do not matter
    np.testing.assert_allclose(100 * w, probe_weights(x.toarray(), y, .1), rtol=1e-3, atol=1e-6)


def test_matched_features_are_others_and_as_frequent():
    rng = np.random.default_rng(0)
    share = np.geomspace(.01, .9, 300)
    x = sp.csr_matrix((rng.random((2000, 300)) < share) * 1.)
    of = np.array([20, 150, 280, 281])
    got = np.concatenate([frequency_matched(x, of, np.random.default_rng(s)) for s in range(20)]).reshape(20, 4)
    assert not np.isin(got, of).any() and all(len(set(r)) == 4 for r in got)
    assert (np.abs(np.log(share[got] / share[of])) < .4).all()
    assert len(frequency_matched(sp.csr_matrix(np.ones((3, 2))), np.array([0, 1]), rng)) == 0


def test_a_text_ends_once():
    t = torch.tensor([[2, 1, 1, 1], [1, 1, 1, 2], [1, 1, 2, 1]])
    assert alive(t, 2, [2]).tolist() == [[False, False], [True, False], [True, False]]
