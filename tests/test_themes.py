"Themes: invariance, nulls at their level, planted groups, malformed files, degenerate input, other architectures, threads."
import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse as sp
from sklearn.metrics import adjusted_mutual_info_score, roc_auc_score
from threadpoolctl import threadpool_limits

from neurocodec.codec.themes import (
    METHODS, Theme, ThemeConfig, agreement, aurocs, by_document, company, dense, directions, examine, intruders, laplacian, lookalikes, matched_cloud, neural_atlas, overlap,
    passes, present, read_themes, recluster, single_out, spectral, theme_name, theme_tokens, unit, widest_gap)
from neurocodec.core.run import UserError, write_json


def moods(n=6000, groups=8, each=12, seed=0):
    "Features that fire together in groups, and the group of each."
    rng = np.random.default_rng(seed)
    on = np.repeat(rng.random((n, groups)) < .06, each, 1) & (rng.random((n, groups * each)) < .6) | (rng.random((n, groups * each)) < .02)
    return sp.csr_matrix(on * rng.uniform(.5, 2, on.shape)), np.repeat(np.arange(groups), each)


def points(groups=12, each=25, d=12, spread=.2, seed=0):
    rng = np.random.default_rng(seed)
    return unit(np.repeat(unit(rng.normal(size=(groups, d))), each, 0) + spread * rng.normal(size=(groups * each, d))), np.repeat(np.arange(groups), each)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_planted_company_is_found(method):
    codes, truth = moods()
    c = method(company(codes, ThemeConfig(dims=8)), ThemeConfig(groups=8))
    assert adjusted_mutual_info_score(truth, c.label_F) > .9 and c.n == 8
    assert ((c.member_F >= 0) & (c.member_F <= 1)).all()


def test_both_ways_to_the_eigenvectors_agree():
    "Few features go through a full decomposition, many through products; the points differ by a turn of the axes only."
    codes, _ = moods(groups=30, each=5)
    a, b = (company(codes, ThemeConfig(dims=k))[:, :28] for k in (28, 80))
    np.testing.assert_allclose(unit(a) @ unit(a).T, unit(b) @ unit(b).T, atol=.02)
    phi = np.corrcoef((codes.toarray() > 0).T)
    z = company(codes, ThemeConfig(dims=150))
    np.testing.assert_allclose(z @ z.T, phi, atol=1e-8)


def test_points_do_not_depend_on_order_scale_or_threads():
    rng = np.random.default_rng(1)
    codes, truth = moods(3000)
    order, W = rng.permutation(96), torch.randn(96, 20, generator=torch.Generator().manual_seed(0))
    a, b = company(codes, ThemeConfig(dims=8)), company(sp.csr_matrix(codes[:, order] @ sp.diags(rng.uniform(.1, 9, 96))), ThemeConfig(dims=8))
    np.testing.assert_allclose((a @ a.T)[np.ix_(order, order)], b @ b.T, atol=1e-3)
    d, e = directions(W), directions(W[order] * 7)
    np.testing.assert_allclose((d @ d.T)[np.ix_(order, order)], e @ e.T, atol=1e-6)
    x, _ = points()
    with threadpool_limits(1): one = [directions(W), company(codes, ThemeConfig(dims=8)), *(m(x, ThemeConfig(groups=12)).label_F for m in METHODS.values())]
    with threadpool_limits(2): two = [directions(W), company(codes, ThemeConfig(dims=8)), *(m(x, ThemeConfig(groups=12)).label_F for m in METHODS.values())]
    for p, q in zip(one, two): np.testing.assert_array_equal(p, q)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_cloud_without_groups_is_no_better_than_its_null(method):
    "The gain over the null is about zero where there is nothing to find, and large where there is."
    clouds = [unit(np.random.default_rng(s).normal(size=(300, 12)) * np.linspace(3, .3, 12)) for s in range(4)]
    *none, real = (examine(x, method, 3, seed=1, config=ThemeConfig(groups=12)) for x in (*clouds, points()[0]))
    assert np.mean([a.ami_R.mean() - a.null_ami_R.mean() for a in none]) < .15 < real.ami_R.mean() - real.null_ami_R.mean()
    assert len(real.jaccard_C) == real.clusters.n and real.jaccard_C.max() <= 1 and len(real.null_coverage_R) == 3


def test_null_clouds_have_the_covariance():
    x = unit(np.random.default_rng(3).normal(size=(4000, 6)) * [5, 3, 1, 1, .5, .2] + [1, 0, 0, 0, 0, 0])
    y = matched_cloud(x, np.random.default_rng(0))
    np.testing.assert_allclose(np.sort(np.linalg.eigvalsh(np.cov(y.T))), np.sort(np.linalg.eigvalsh(np.cov(x.T))), atol=.05)
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 4)), min_size=1, max_size=30))
def test_overlap_is_a_jaccard_index(pairs):
    a, b = np.array(pairs).T
    got = overlap(a, b)
    for g in range(a.max() + 1):
        own = a == g
        want = max((np.sum(own & (b == h)) / np.sum(own | (b == h)) for h in set(b[b >= 0])), default=0) if own.any() else np.nan
        np.testing.assert_allclose(got[g], want)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=20))
def test_benjamini_hochberg(p):
    p = np.array(p)
    said = passes(p)
    if said.any(): assert p[said].max() <= .05 * said.sum() / len(p) + 1e-12 and (p[~said] > p[said].max()).all()
    else: assert not len(p) or (np.sort(p) > .05 * np.arange(1, len(p) + 1) / len(p)).all()


def test_auroc_with_ties_is_sklearns():
    rng = np.random.default_rng(4)
    score, kind = rng.integers(0, 4, (80, 3)).astype(float), rng.choice(["a", "b", "c"], 80)
    got = aurocs(score, kind, np.array(["a", "b", "none"]))
    for t in range(3):
        for c, name in enumerate("ab"): assert got[t, c] == pytest.approx(roc_auc_score(kind == name, score[:, t]))
    assert np.isnan(got[:, 2]).all()


def test_random_groups_single_nothing_out():
    "p-values of groups that mean nothing are spread evenly, though a best domain was chosen for each."
    rng = np.random.default_rng(5)
    kind, x = rng.choice(["a", "b", "c"], 400), rng.random((400, 300))
    sides = [(sp.csr_matrix(x[i]), kind[i]) for i in (slice(0, 200), slice(200, 400))]
    got = single_out(*sides, [rng.choice(300, 8, False) for _ in range(60)], rng.integers(10, 500, 300), n_random=49)
    assert .3 < got.p_T.mean() < .7 and (got.p_T <= .1).mean() < .25 and passes(got.p_T).sum() <= 1
    assert abs(got.null_T.mean() - .5) < .06


def test_lookalikes_are_as_frequent():
    count = np.random.default_rng(6).lognormal(4, 1.5, 800).astype(int)
    group = np.argsort(count)[300:330]
    drawn = lookalikes(count, group, 200, np.random.default_rng(0))
    assert drawn.shape == (200, 30) and abs(np.log(count[drawn] + 1).mean() - np.log(count[group] + 1).mean()) < .1


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"themes": 3}', '{"themes": [3]}', '{"themes": [{"theme": 0}]}', "\u00ff"])
def test_a_file_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "L1.themes.json").write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match="run chapter 34_themes again") as e: read_themes(tmp_path / "L1.themes.json")
    assert "\n" not in str(e.value)


def test_themes_come_back_and_the_atlas_is_json(tmp_path):
    themes = [Theme(0, "<script>\u202e", [4, 1], [.9, .1], .8, .3, None, None), Theme(1, "b", [2], [1.], .5, .3, "scipy", .9)]
    write_json(tmp_path / "t.json", {"themes": [t._asdict() for t in themes]})
    assert read_themes(tmp_path / "t.json") == themes
    W = np.random.default_rng(0).normal(size=(3, 4))
    atlas = neural_atlas(themes, {1: "</script>"}, W, np.array([1, 2, 4, 7]))
    write_json(tmp_path / "a.json", atlas)
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(json.dumps(atlas))
    assert [f["feature"] for f in atlas["features"]] == [1, 2, 4, 7] and all(len(f["neurons"]) == 3 for f in atlas["features"])
    assert {f for m in atlas["neurons"] for f in m["features"]} == {1, 2, 4, 7} and sum(n for m in atlas["neurons"] for _, n in m["themes"]) == 9
    assert neural_atlas([])["features"] == []


def test_degenerate_input():
    few, config = unit(np.random.default_rng(7).normal(size=(4, 3))), ThemeConfig()
    assert [m(few).n for m in METHODS.values()] == [0, 0] and all(m(few[:0]).coverage == 0 for m in METHODS.values())
    assert spectral(unit(np.ones((40, 3)))).n >= 1 and dense(unit(np.ones((40, 3)))).n <= 1  # all points the same
    arm = examine(few, dense, 2)
    assert arm.jaccard_C.shape == (0,) and arm.clusters.n == 0
    assert examine(points()[0], spectral, 0, config=ThemeConfig(groups=3)).ami_R.shape == (0,)
    assert np.isnan(agreement(np.array([]), np.array([])).ami) and agreement(np.zeros(9, int), np.zeros(9, int), 3).p == 1
    assert single_out((sp.csr_matrix((5, 3)), np.full(5, "a")), (sp.csr_matrix((5, 3)), np.full(5, "a")), [np.array([0])], np.ones(3)) is None
    assert np.isnan(intruders(sp.csr_matrix((9, 4)), [np.arange(4)])).all()  # nobody left to intrude
    silent = intruders(sp.csr_matrix((50, 40)), [np.arange(6)])
    assert 0 <= silent[0] <= 1
    assert theme_tokens(sp.csr_matrix((4, 2)), np.arange(4), [np.array([0])]) == [[]] and theme_name([1], {}, []) == "no tokens"
    assert by_document(sp.csr_matrix((0, 3)), np.ones(3), np.array([], int)).shape[1] == 3
    assert config.groups == 50 and len(laplacian(few, 9)[0]) == 4


@pytest.mark.parametrize("change, says", [({"dims": 1}, "dims = 1"), ({"groups": 0}, "groups = 0"), ({"subsample": 1}, "subsample = 1"), ({"min_size": 1}, "min_size = 1")])
def test_a_wrong_configuration_is_one_line(change, says):
    with pytest.raises(UserError, match=says): ThemeConfig(**change)


def test_a_run_without_the_chapter_goes_without(tmp_path):
    node = type("N", (), {"home": lambda self, c, layer: tmp_path / c, "trying": False})()
    assert present(node, "23_labels", 1) is None and present(node, "99_none", 1) is None


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_other_architectures(kind):
    "From the stream of another model to groups and tokens."
    from neurocodec.core.lm import tiny
    from neurocodec.core.text import Packed, pack
    from neurocodec.sae.dictionary import DictionaryConfig, create_dictionary
    from neurocodec.sae.layers import encode_layers

    lm = tiny(kind)
    lm.tokenizer = type("Tokenizer", (), {"bos_token_id": 1, "eos_token_id": 2})
    ids = [torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(40)]
    text = Packed(*pack(ids, 32, 1), pd.DataFrame({"domain": ["odd" if i % 2 else "even" for i in range(len(ids))]}))
    d = create_dictionary(DictionaryConfig(d_model=lm.d_model, n_features=60, k=6))
    coded = encode_layers(lm, text, {"a": (1, d)})
    live = np.flatnonzero(np.diff(coded.codes["a"].tocsc().indptr) >= 5)
    x = company(coded.codes["a"][:, live], ThemeConfig(dims=10))
    c = spectral(x, ThemeConfig(groups=5))
    assert c.n == 5 and np.isfinite(x).all() and 2 <= widest_gap(x, 20) <= 20
    ami, jaccard = recluster(x, spectral, c, np.random.default_rng(0), ThemeConfig(groups=5))
    assert -.5 < ami <= 1 and len(jaccard) == 5
    assert all(set(t) <= set(range(3, 90)) for t in theme_tokens(coded.codes["a"][:, live], coded.labels["token"], [np.flatnonzero(c.label_F == g) for g in range(5)]))
