"Planted data keep their promises at the edges, cost what fires and not what could, and are the same bytes for the same seed."
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse as sp

from neurocodec.codec.concepts import CODE, MIX, ConceptConfig, World, activations, draw_inputs, firings, hits, plant, recovery, shifted
from neurocodec.core.run import UserError

FEW = dict(mix={k: 4 for k in MIX}, joint=1.)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, .95), st.integers(0, 300)), max_size=8), st.integers(0, 99))
def test_hits_are_places_of_their_column_once_each(columns, seed):
    p, size = np.array([c[0] for c in columns]), np.array([c[1] for c in columns], int)
    column, place = hits(np.random.default_rng(seed), p, size)
    assert len(set(zip(column, place))) == len(column)
    assert (place >= 0).all() and (place < size[column]).all() and (p[column] > 0).all()


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 400), doc=st.integers(1, 70), clusters=st.integers(1, 6), high=st.floats(.02, .9), nested=st.floats(0, .9), seed=st.integers(0, 9))
def test_firings_fit_any_world(n, doc, clusters, high, nested, seed):
    "Rows that end in the middle of a document, one cluster, one row, nearly everything nested."
    w = World(ConceptConfig(20, 8, .01, high, clusters, cluster_rate=.5, lift=2, nested=nested, doc_len=doc), seed)
    f = firings(w, n)
    assert f.shape == (n, 20) and f.has_canonical_format and (f.data >= .5).all() and (f.data < 1.5).all()
    on = f.toarray() > 0
    for child in np.flatnonzero(w.parent_C >= 0): assert not (on[:, child] & ~on[:, w.parent_C[child]]).any()


def test_rates_hold_over_many_documents():
    "Lift and nesting move firings about; the rate of every concept stays its own."
    w = World(ConceptConfig(60, 8, .01, .3, clusters=4, lift=4, nested=.4), 1)
    n = 200_000
    count = np.bincount(firings(w, n).indices, minlength=60)
    assert (np.abs(count - n * w.rate_C) < 5 * np.sqrt(n * w.rate_C)).all()


def test_a_wide_world_costs_what_fires():
    "A dense table of these rows and concepts would take 2 GB in bytes alone."
    w = World(ConceptConfig(4000, 4, 1e-5, 1e-3, clusters=50, nested=.1, doc_len=100))
    tracemalloc.start()
    f = firings(w, 500_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f.nnz > 100_000 and peak < 80 * f.nnz + 20e6, (f.nnz, peak)


def test_blocks_do_not_depend_on_each_other_and_threads_do_not_matter():
    w = World(ConceptConfig(50, 16))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        a = activations(w, 500, block=7)[0]
        torch.set_num_threads(2)
        activations(w, 100, block=6)
        assert torch.equal(a, activations(w, 500, block=7)[0])
    finally: torch.set_num_threads(threads)
    assert not torch.equal(a, activations(w, 500, block=8)[0])


def test_a_dictionary_of_the_same_seed_does_not_start_at_the_truth():
    "Both draw from a generator seeded with the same number; once that made the untrained control score 0.9."
    from neurocodec.sae.dictionary import DictionaryConfig, create_dictionary
    w = World(ConceptConfig(25, 64), 0)
    cos = w.W_CD @ create_dictionary(DictionaryConfig("topk", 64, 256, 8), seed=0).W_dec.detach().T
    assert cos.max() < .75


def test_recovery_with_fewer_features_than_concepts_and_with_silence():
    w = World(ConceptConfig(30, 16, .05, .2, clusters=3))
    f = firings(w, 2000)
    some = recovery(w.W_CD[:10] * 7, f[:, :10], w, f)
    assert (some.feature_C >= 0).sum() == 10 and abs(some.mcc - 1 / 3) < 1e-5 and abs(some.f1 - 1 / 3) < 1e-5
    none = recovery(w.W_CD, sp.csr_matrix(f.shape), w, f)
    assert none.mcc > .999 and none.f1 == none.precision == none.recall == 0
    assert np.isnan(recovery(w.W_CD, f[:0], w, f[:0]).f1)


def test_shifting_keeps_bursts_and_loses_company():
    w = World(CODE)
    f = firings(w, 40_000)
    g = shifted(f, np.random.default_rng(0)).tocsc()
    for c in range(0, 512, 37):  # gaps around the circle are the same
        gaps = [np.sort(np.diff(np.append(r, r[0] + 40_000))) for r in (np.sort(m.indices[m.indptr[c]:m.indptr[c + 1]]) for m in (f.tocsc(), g)) if len(r)]
        assert not gaps or np.array_equal(*gaps)
    assert (g.tocsr() != shifted(f, np.random.default_rng(1))).nnz


def test_planted_inputs_are_what_their_kind_says():
    code = plant(300_000, seed=3, joint=2.)
    world, on = World(CODE, 3), (code.features_NF > 0).astype(np.float64).tocsc()
    count = np.asarray(on.sum(0)).ravel()
    for kind, inputs in zip(code.kind_M, code.inputs_M3):
        used = inputs[inputs >= 0]
        assert len(set(used)) == len(used) == {"single": 1, "or3": 3, "noise": 0}.get(kind, 2)
        if kind in ("or", "or3", "and", "linear"):
            assert len(set(world.cluster_C[used])) > 1 and all(count[i] * count[j] >= 2 * 300_000 for i in used for j in used if i != j)
    split = code.inputs_M3[code.kind_M == "split"][:, :2]
    cos = (code.W_dec_FD[split[:, 0]] * code.W_dec_FD[split[:, 1]]).sum(1)
    together = np.array([on[:, i].multiply(on[:, j]).nnz for i, j in split])
    halves = cos > .85
    assert halves.sum() == 8 and (together[halves.numpy()] == 0).all() and (together[~halves.numpy()] > 0).all()
    rank = (code.weights_MF.argsort(1, descending=True).argsort(1)).numpy()
    for m, inputs in enumerate(code.inputs_M3): assert all(rank[m, i] < 20 for i in inputs if i >= 0)


def test_planted_code_is_the_same_bytes():
    a, b, c = (plant(20_000, seed=s, **FEW) for s in (5, 5, 6))
    assert (a.units_NM != b.units_NM).nnz == 0 and torch.equal(a.weights_MF, b.weights_MF) and np.array_equal(a.inputs_M3, b.inputs_M3)
    assert (a.features_NF != c.features_NF).nnz > 0


@pytest.mark.parametrize("call, message", [
    (lambda: ConceptConfig(clusters=0), "clusters = 0: expected 1 to n_concepts"),
    (lambda: ConceptConfig(low=.2, high=.1), "high = 0.1"),
    (lambda: plant(5000, mix={"split": 600}), "mix: 600 split units need more than"),
    (lambda: draw_inputs(np.random.default_rng(0), 3, 2, np.zeros((9, 9), bool)), "joint: too few features meet so often"),
])
def test_mistakes_are_one_line(call, message):
    with pytest.raises(UserError, match=message) as e: call()
    assert "\n" not in str(e.value)
