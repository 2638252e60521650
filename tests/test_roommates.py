"Roommates: matches that match, a test at its level, effects of planted size, interference by brute force, other architectures."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse as sp
from scipy.stats import binomtest

from conftest import model_and_text
from neurocodec.codec.concepts import ConceptConfig, World, firings, shifted
from neurocodec.codec.roommates import (
    KINDS, TAX, alike, area, at_random, contrast, count_pairs, dealt, differences, feature_variance, interference, judge, mantel_haenszel, moved_apart, partial_spearman, path_gain, room_limits, rooms, roommate_pairs, sharing, sign_flips)
from neurocodec.codec.squeezer import Sample, Squeezer, SqueezerConfig, keep_strongest, read_through, take_sample, through, train_squeezer
from neurocodec.core.run import UserError
from neurocodec.sae.activations import kept_tokens
from neurocodec.sae.dictionary import DictionaryConfig, create_dictionary
from neurocodec.sae.layers import csr, onehot

WORLD = World(ConceptConfig(240, 32, low=.01, high=.1, clusters=12, cluster_rate=.2, lift=4, nested=0, doc_len=100), 0)


def by_doc(f, doc): return onehot(doc, int(doc.max()) + 1).T @ (f > 0)


@pytest.fixture(scope="module")
def code():
    f, doc = firings(WORLD, 20_000), np.arange(20_000) // 100
    return f, doc, alike(f, by_doc(f, doc), doc)


def house(rng, n=60, size=5):
    m = np.zeros((n, 240), np.int8)
    for row in m: row[rng.choice(240, size, replace=False)] = rng.choice([1, -1], size)
    return m


def ask(code, rooms_MF, **how):
    f, doc, like = code
    return contrast(rooms_MF, f, doc, WORLD.W_CD, like, **how)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(1, 6), st.floats(0, 1), st.integers(0, 99))
def test_counts_and_ratios_by_brute_force(n, docs, p, seed):
    rng = np.random.default_rng(seed)
    x, doc = rng.random((n, 5)) < p, np.concatenate([np.arange(docs), rng.integers(0, docs, n)])[:n]
    doc = np.unique(doc, return_inverse=True)[1]
    pairs = rng.integers(0, 5, (7, 2))
    c = count_pairs(pairs, sp.csr_matrix(x, dtype=float), doc, block=3)
    A, B = (x[:, k] for k in pairs.T)
    def cells(m): return np.stack([m[doc == d].sum(0) for d in range(doc.max() + 1)]).astype(float)
    n11, n10, n01, n00 = (cells(m) for m in (A & B, A & ~B, ~A & B, ~A & ~B))
    np.testing.assert_array_equal(c.joint_DP.toarray(), n11)
    for got, want in zip(mantel_haenszel(c), (n11 * n00, n10 * n01)): np.testing.assert_allclose(got.toarray(), want / c.tokens_D[:, None], atol=1e-9)


def test_gains_do_not_depend_on_the_scale_of_neurons_or_features():
    g = torch.Generator().manual_seed(0)
    V, U = torch.randn(4, 9, generator=g), torch.randn(9, 4, generator=g)
    a, s = torch.rand(4, 1, generator=g) + .1, torch.rand(9, 1, generator=g) + .1
    one, two = (Squeezer(v, u, torch.zeros(4), torch.zeros(9), torch.arange(9)) for v, u in ((V, U), (a * V / s.T, s * U / a.T)))
    np.testing.assert_allclose(path_gain(one), path_gain(two), rtol=1e-4)
    assert (rooms(one, (.2, .3)) == rooms(two, (.2, .3))).all() and (rooms(one, (-9, -9)) != 0).sum() == (path_gain(one) > 0).sum()
    limits = room_limits(one, share=.9)
    assert (rooms(one, limits) > 0).sum() <= 4 and (rooms(one, limits) < 0).sum() <= 4   # a tenth of 36, rounded up


def test_random_rooms_are_called_significant_no_more_often_than_stated(code):
    "Twenty houses of random features: intervals at 95 % miss zero seldom, and what bias matching leaves is small beside them."
    found = [judge(ask(code, house(np.random.default_rng(s), 40), seed=s, n_controls=5), n_boot=0, n_flips=199)["all"] for s in range(20)]
    wrong = sum(not v.pooled.low <= 0 <= v.pooled.high for v in found)
    assert binomtest(wrong, 20, .05, alternative="greater").pvalue > .01, wrong
    assert abs(np.mean([v.pooled.value for v in found])) < np.mean([v.seen for v in found]) / 2.8


@pytest.mark.parametrize("share", [.25, .5])
def test_planted_effects_have_their_size_and_are_seen(code, share):
    c = ask(code, house(np.random.default_rng(1)))
    was, now = (judge(x, n_boot=20, n_flips=999)["all"] for x in (c, moved_apart(c, share)))
    assert np.log(1 - share) * 1.5 < now.pooled.value - was.pooled.value < np.log(1 - share) * .9
    assert now.p_pooled <= .002 and now.pooled.high < 0 and now.cliff < was.cliff


def test_signs_are_kept_apart(code):
    "Pairs that both excite, whose meetings are thinned, and the others, which are left alone."
    c = ask(code, house(np.random.default_rng(2)))
    thin, joint = moved_apart(c, .6).own.joint_DP.toarray(), c.own.joint_DP.toarray()
    mixed = c._replace(own=c.own._replace(joint_DP=sp.csr_matrix(np.where(c.kind_P > 0, thin, joint))))
    got = judge(mixed, n_boot=20, n_flips=199)
    assert got["both excite"].pooled.high < -.5 < min(got["opposed"].pooled.low, got["both hush"].pooled.low)
    assert sum(got[k].pairs for k in KINDS) == got["all"].pairs
    only = judge(ask(code, np.abs(house(np.random.default_rng(2)))), n_boot=0, n_flips=99)
    assert set(only) == {"all", "both excite"}


def test_shifted_codes_hold_nothing(code):
    f, doc, _ = code
    kin = np.zeros((48, 240), np.int8)
    for u, row in enumerate(kin): row[np.random.default_rng(u).choice(np.flatnonzero(WORLD.cluster_C == u % 12), 5, replace=False)] = 1
    assert judge(ask(code, kin), n_boot=20, n_flips=99)["all"].pooled.low > .5
    apart = shifted(f, np.random.default_rng(0))
    null = judge(ask((apart, doc, alike(apart, by_doc(apart, doc), doc)), kin), n_boot=20, n_flips=99)["all"]
    assert abs(null.pooled.value) < .15


def test_random_pairs_are_no_roommates_and_mislead(code):
    "Beside them frequent features that have nothing to do with each other seem to avoid each other, since a rare pair looks close."
    f, doc, like = code
    rare = shifted(f, np.random.default_rng(1)).tolil()
    rare[np.random.default_rng(2).random(len(doc)) < .97, 120:] = 0
    rare, m = rare.tocsr(), house(np.random.default_rng(3), 40)
    m[:, 120:] = 0
    c = contrast(m, rare, doc, WORLD.W_CD, alike(rare, by_doc(rare, doc), doc))
    r = at_random(c, m, rare, doc)
    i, j = r.controls.pairs_P2.T
    assert (i != j).all() and not sharing(m)[i, j].any() and len(i) == len(c.owner_C) and (at_random(c, m, rare, doc).controls.pairs_P2 == r.controls.pairs_P2).all()
    assert .2 < (np.maximum(i, j) >= 120).mean() < .95
    matched, random = (judge(x, n_boot=20, n_flips=99)["all"].pooled for x in (c, r))
    assert random.high < -.2 < matched.value - .1 and matched.low <= 0 <= matched.high


def test_dealing_keeps_houses_and_frequencies():
    rng = np.random.default_rng(0)
    m, fired = house(rng), rng.integers(1, 1000, 240)
    new = dealt(m, fired, 3)
    assert (np.abs(new).sum(1) == np.abs(m).sum(1)).all() and (new != m).any() and (dealt(m, fired, 3) == new).all()
    rank = np.argsort(np.argsort(fired, kind="stable"))
    for k in range(15):
        block = (rank // 16) == k
        np.testing.assert_array_equal(np.sort(np.abs(m)[:, block].sum(0)), np.sort(np.abs(new)[:, block].sum(0)))


def test_same_seed_same_pairs_and_errors_that_help(code):
    m = house(np.random.default_rng(5))
    a, b = (ask(code, m, seed=1) for _ in range(2))
    np.testing.assert_array_equal(a.controls.pairs_P2, b.controls.pairs_P2)
    assert (ask(code, m, seed=2).controls.pairs_P2.shape != a.controls.pairs_P2.shape) or (ask(code, m, seed=2).controls.pairs_P2 != a.controls.pairs_P2).any()
    with pytest.raises(UserError, match="none of 0 pairs of roommates"): ask(code, np.zeros((3, 240), np.int8))
    with pytest.raises(UserError, match="has 3 matched controls; take more tokens"): ask(code, np.ones((1, 240), np.int8))  # everybody shares: no one to compare with
    assert len(roommate_pairs(m, np.zeros(240, int), 100, np.random.default_rng(0))[0]) == 0


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=9))
def test_sign_flips_against_all_flips(x):
    x = np.array(x)
    every = np.array([[1 - 2 * (k >> j & 1) for j in range(len(x))] for k in range(2 ** len(x))]) @ x
    want = (np.abs(every) >= abs(x.sum()) - 1e-12).mean()
    assert abs(sign_flips(x, 1999) - want) < .06


def test_variance_of_pairs_that_share_features():
    "A feature's habit in all its pairs must show as variance; independent pairs have the plain one."
    rng, values, said = np.random.default_rng(0), [], []
    pairs = rng.integers(0, 60, (400, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    share = np.full(len(pairs), 1 / len(pairs))
    for _ in range(300):
        habit = rng.normal(size=60)
        x = habit[pairs].sum(1) + rng.normal(size=len(pairs))
        values.append(x.mean())
        said.append(feature_variance(x, share, pairs))
    assert .7 < np.mean(said) / np.var(values) < 1.3
    assert np.mean(said) > 5 * np.mean([feature_variance(rng.normal(size=len(pairs)), share, pairs) for _ in range(50)])


def test_interference_by_brute_force():
    "Every feature's error with the others silenced one token at a time; blocks and threads change nothing."
    rng, g = np.random.default_rng(0), torch.Generator().manual_seed(0)
    s = Squeezer(torch.randn(3, 7, generator=g), torch.randn(7, 3, generator=g), torch.randn(3, generator=g) * .1, torch.randn(7, generator=g) * .1, torch.arange(7))
    x, scale = sp.random(40, 7, .4, "csr", dtype=np.float32, random_state=rng), rng.uniform(.5, 2, 7).astype(np.float32)
    read = through(s)
    dense = x.toarray()
    natural = (read(x).numpy() - dense) ** 2 / scale**2
    alone = np.stack([(read(sp.csr_matrix(dense * (np.arange(7) == i)))[:, i].numpy() - dense[:, i]) ** 2 / scale[i] ** 2 for i in range(7)], 1)
    got = interference(s, x, scale, block=11)
    for name, m in (("natural", natural), ("alone", alone), ("square", (dense / scale) ** 2)):
        np.testing.assert_allclose(getattr(got, f"{name}_F"), m.sum(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(getattr(got, f"{name}_N"), m.sum(1), rtol=1e-3, atol=1e-4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        np.testing.assert_allclose(interference(s, x, scale).tax_F, got.tax_F, rtol=1e-3, atol=1e-5)
    finally: torch.set_num_threads(before)


def test_sharing_without_company_disturbs_and_own_neurons_do_not():
    "Independent features on half as many neurons interfere; with a neuron each nothing does."
    rng = np.random.default_rng(0)
    x = sp.csr_matrix((rng.random((4000, 40)) < .2) * rng.uniform(.5, 1.5, (4000, 40)), dtype=np.float32)
    sample = Sample(x, np.arange(40), np.ones(40, np.float32))
    def share(s): got = interference(s, x[:1000], sample.scale_F); return (got.natural_N - got.alone_N).sum() / got.square_N.sum()
    own = Squeezer(torch.eye(40), torch.eye(40), torch.zeros(40), torch.zeros(40), torch.arange(40))
    crowd = Squeezer(torch.eye(20).repeat(1, 2), torch.eye(20).repeat(1, 2).T.contiguous(), torch.zeros(20), torch.zeros(40), torch.arange(40))
    assert abs(share(own)) < 1e-6 < .2 < share(crowd)
    assert share(train_squeezer(sample, SqueezerConfig(ratio=2, steps=80))) < share(crowd)


def test_area_and_partial_ranks():
    tax = np.array([[1.], [2.], [4.]])
    np.testing.assert_allclose(area([2, 4, 8], tax), np.log(2) * (.5 + 1.5 + 3))
    np.testing.assert_allclose(area([8, 2, 4], tax[[2, 0, 1]]), area([2, 4, 8], tax))
    rng = np.random.default_rng(0)
    x, y, z = rng.random((3, 50))
    assert abs(partial_spearman(np.exp(x), y**3, z) - partial_spearman(x, y, z)) < 1e-12


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prices_through_other_architectures(kind):
    lm, text = model_and_text(kind, range(20, 60, 2))
    d = create_dictionary(DictionaryConfig(d_model=lm.d_model, n_features=48, k=6))
    x = lm.residual(text.tokens_NT, 1)[kept_tokens(text.tokens_NT, text.doc_NT, 1)].float()
    sample = take_sample(csr(d.encode(x), 48), min_firings=5)
    s = train_squeezer(sample, SqueezerConfig(ratio=3, steps=30))
    tally, seen, doc = read_through(lm, text, 1, d, sample, {"same": lambda m: torch.from_numpy(m.toarray()), "tied": through(s), "keep": keep_strongest(sample, s.M)}, 6)
    t = tally.totals()
    assert abs(TAX["kl"](t, "same")[0]) < .02 and TAX["error"](t, "keep")[0] > 1
    got = interference(s, seen, sample.scale_F)
    assert np.isfinite(got.natural_N).all() and len(got.natural_N) == len(doc)
    assert (differences(contrast(np.sign(rooms(s, (0, 0))) * (np.arange(sample.x_NF.shape[1]) % 7 < 3), seen, np.unique(doc, return_inverse=True)[1], d.W_dec.detach()[torch.from_numpy(sample.features_F)],
                                 np.ones((48,) * 2, bool)[: len(sample.features_F), : len(sample.features_F)], enough=1), np.ones((1, len(text.docs))))[0].shape[0]) == 1
