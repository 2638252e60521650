"The detector of gates: counts against brute force, verdicts that do not depend on names, scale or blocks, nulls at their level, other architectures."
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse as sp

from conftest import model_and_text
from neurocodec.codec.concepts import plant, shifted
from neurocodec.codec.gates import (
    GateConfig, Neurons, against_truth, cells, chance_cosine, cross, dimensionality, find_gates, fires, groups, near_pairs, precision_recall, proportion, read_neurons, saturation)
from neurocodec.core.run import UserError

QUICK = GateConfig(n_draws=100, n_shifts=5)
MIX = {"or": 12, "or3": 4, "and": 4, "linear": 12, "single": 4, "split": 6, "noise": 4}


def gates(code, config=QUICK, **changes):
    return find_gates(**(dict(features_NF=code.features_NF, units_NM=code.units_NM, weights_MF=code.weights_MF, doc_N=code.doc_N, W_dec_FD=code.W_dec_FD, config=config) | changes))


@pytest.fixture(scope="module")
def code(): return plant(300_000, 11, joint=10., mix=MIX)


@pytest.fixture(scope="module")
def table(code): return gates(code)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 5), st.floats(0, 1), st.integers(0, 99))
def test_cells_are_counts(n, m, f, p, seed):
    "Every token lies in one cell, whether a unit is quiet (sparse product) or busy (dense)."
    rng = np.random.default_rng(seed)
    u, a, x = (sp.csc_matrix(rng.random((n, k)) < p, dtype=np.float32) for k in (m, m, f))
    c, (U, A, B) = cells(u, a, x.tocsr()), (y.toarray() > 0 for y in (u, a, x))
    for got, left, right in zip(c[:4], (A, A, ~A, ~A), (B, ~B, B, ~B)): np.testing.assert_array_equal(got, left.T.astype(int) @ right.astype(int))
    for got, left, right in zip(c[4:], (A, A, ~A, ~A), (B, ~B, B, ~B)): np.testing.assert_array_equal(got, (left & U).T.astype(int) @ right.astype(int))
    np.testing.assert_allclose(cross(u, x.tocsr()), u.toarray().T @ x.toarray())


def test_criterion_on_fewer_tokens(code, table):
    "Not the acceptance test, which needs a million tokens; a detector that fails here would fail there."
    p, r = precision_recall(against_truth(table, code))
    assert p.value >= .9 and r.value >= .8, (p, r)


def test_each_trap_has_a_test_that_sees_it(code, table):
    planted = pd.Series(code.kind_M)
    assert (table.verdict[planted == "linear"].isin(["linear", "either", "split"])).all()
    assert (table.related[planted == "split"]).mean() > .8 and not table.verdict[planted == "split"].isin(["or", "or3"]).mean() > .2
    assert (table.verdict[planted == "noise"] == "none").all()


def test_shifted_code_and_random_units_give_no_or(code):
    assert not gates(code, features_NF=shifted(code.features_NF, np.random.default_rng(0))).verdict.isin(["or", "or3", "and", "split", "either", "linear"]).any()
    rng = np.random.default_rng(1)
    f, u = (sp.random(20_000, k, .01, "csc", dtype=np.float32, random_state=rng) for k in (40, 100))
    t = find_gates(f.tocsr(), u, rng.normal(size=(100, 40)), np.arange(20_000) // 50, config=QUICK)
    assert (t.verdict == "none").all()


def test_verdicts_depend_on_neither_names_nor_scale_nor_blocks(code, table):
    rng = np.random.default_rng(2)
    units, feats = rng.permutation(len(table)), rng.permutation(512)
    again = gates(code, units_NM=(code.units_NM[:, units] * 70.).tocsc(), features_NF=code.features_NF[:, feats], weights_MF=code.weights_MF[units][:, feats], W_dec_FD=code.W_dec_FD[feats] * 3)
    assert (again.verdict.to_numpy() == table.verdict.to_numpy()[units]).mean() > .95  # what is close to a limit may fall to either side of it by other draws
    np.testing.assert_array_equal(feats[again.a], table.a.to_numpy()[units])
    np.testing.assert_allclose(again.or_gain, table.or_gain.to_numpy()[units], atol=1e-6)
    parts = gates(code, block=7)
    assert list(parts.index) == list(table.index) and (parts.verdict == table.verdict).mean() > .95
    assert gates(code).equals(table)


def test_misses_do_not_turn_sums_into_ors():
    "With means over all tokens of a cell the index of a sum would fall with its misses."
    rng = np.random.default_rng(3)
    a, b = (sp.csc_matrix((rng.random((4000, 300)) < .03) * 1.) for _ in range(2))
    heard = rng.random((4000, 300)) < .7
    index, joint = saturation(sp.csc_matrix((a + b).multiply(heard)), a, b)
    assert abs(np.nanmean(index) - 1) < .02 and (index[joint >= 5] < .75).sum() == 0


def test_degenerate_input():
    "Silent units and features, one live feature, units that always fire, no directions."
    f = np.zeros((500, 6), np.float32)
    f[:40, 0] = 1
    u = np.zeros((500, 3), np.float32)
    u[:40, 1], u[:, 2] = 2, 1
    t = find_gates(sp.csr_matrix(f), torch.tensor(u), np.ones((3, 6)), np.arange(500) // 10, config=QUICK)
    assert list(t.verdict) == ["none", "none", "none"] and t.fired.tolist() == [0, 40, 500]   # with one live feature there is nothing to search among
    f[200:260, 1] = 1
    t = find_gates(sp.csr_matrix(f), sp.csr_matrix(u), np.ones((3, 6)), np.arange(500) // 10, config=QUICK)
    assert list(t.verdict) == ["none", "single", "none"] and t.a[1] == 0
    assert fires(-np.ones((4, 2))).nnz == 0 and fires(np.zeros((0, 2))).shape == (0, 2)


def test_user_errors_are_one_line():
    f = sp.csr_matrix(np.eye(4))
    for make, message in ((lambda: find_gates(f, np.ones((5, 2)), np.ones((2, 4)), np.arange(4)), "do not fit"), (lambda: GateConfig(candidates=1), "candidates = 1: expected 2 or more"),
                          (lambda: GateConfig(n_shifts=999), "n_shifts = 999"), (lambda: GateConfig(level=0), "level = 0")):
        with pytest.raises(UserError, match=message) as e: make()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_neurons_of_other_architectures(kind):
    "Codes and neurons are those of the very same tokens, whatever the MLP is called and however contexts are batched."
    from neurocodec.sae.activations import kept_tokens
    from neurocodec.sae.dictionary import DictionaryConfig, create_dictionary

    lm, text = model_and_text(kind, range(5, 60, 3))
    d = create_dictionary(DictionaryConfig(d_model=lm.d_model, n_features=40, k=4))
    got = read_neurons(lm, text, {0: d, 1: d}, batch=3)
    keep = kept_tokens(text.tokens_NT, text.doc_NT, 1)
    for i, n in got.items():
        assert isinstance(n, Neurons) and len(n.doc_N) == int(keep.sum())
        u = lm.capture(text.tokens_NT, [f"blocks.{i}.mlp.hook_post"])[f"blocks.{i}.mlp.hook_post"][keep]
        np.testing.assert_allclose(n.units_NM, u.numpy(), atol=1e-5)
        np.testing.assert_allclose(n.features_NF.toarray(), d.encode(lm.residual(text.tokens_NT, i)[keep]).dense(40).numpy(), atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(2, 8), st.floats(.1, 10), st.integers(0, 99))
def test_dimensionality_is_a_share(f, d, scale, seed):
    "It does not change under rotation or scale, lies between 0 and 1, and adds up to no more than the dimensions."
    g = torch.Generator().manual_seed(seed)
    W, Q = torch.randn(f, d, generator=g), torch.linalg.qr(torch.randn(d, d, generator=g))[0]
    D = dimensionality(W)
    assert (D > 0).all() and (D <= 1 + 1e-5).all() and D.sum() <= d + 1e-3
    torch.testing.assert_close(dimensionality(W @ Q * scale), D, rtol=1e-3, atol=1e-4)


def test_groups_and_their_null():
    "Random directions have no group above their own limit; blocks do not matter; zero rows belong nowhere."
    limit = max(chance_cosine(300, 64, s) for s in range(4))
    assert abs(chance_cosine(300, 64, 0) - chance_cosine(300, 64, 0, block=77)) < 1e-6
    W = torch.randn(300, 64, generator=torch.Generator().manual_seed(9))
    assert len(groups(W, limit + .1)) == 0
    W[7], W[9] = -2 * W[3], 0
    assert [g.members for g in groups(W, limit + .1)] == [[3, 7]] and groups(W, limit + .1)[0].lowest < -.99
    assert near_pairs(W, .9, block=11)[0].tolist() == [[3, 7]] and dimensionality(W)[9] == 0
    assert proportion(0, 0).n == 0 and np.isnan(proportion(0, 0).value)
