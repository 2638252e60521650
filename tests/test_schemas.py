"Levels of the tests over planes, invariances of what is read, clamps on foreign architectures, malformed input."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurocodec.core.lm import hook_count, tiny
from neurocodec.core.run import UserError
from neurocodec.resonance import planes as R
from neurocodec.resonance import schemas as S
from neurocodec.resonance.prompts import Clamp


class Letters:
    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2
    def __call__(self, text, add_special_tokens=True): return {"input_ids": [ord(c) % 90 + 3 for c in text]}
    def decode(self, ids, skip_special_tokens=True): return "".join(chr(i + 60) for i in ids)


PROMPTS = pd.DataFrame({"core_id": list("aabb"), "type": list("xyxy"), "level": 0, "paraphrase": 0, "prompt": ["open it", "open", "a gate", "gate"]})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_poking_reads_above_the_clamp_only(kind, tmp_path):
    "The unclamped state is the same beside any clamp, a clamp's direct part is one direction, no hook stays, and reading at or below the clamp is refused."
    lm = tiny(kind)
    lm.tokenizer, before = Letters(), hook_count(lm.model)
    clamps = {f"{j}": Clamp("blocks.0.mlp.hook_post", j, "add") for j in (1, 2)}
    x = S.poke(tmp_path / "a", lm, PROMPTS, clamps, (-3., 3.), "blocks.2.hook_resid_post")
    alone = S.poke(tmp_path / "b", lm, PROMPTS, {"2": clamps["2"]}, (3.,), "blocks.2.hook_resid_post")
    for k in (S.CLEAN, ("2", 3.)): np.testing.assert_allclose(x.vectors[k], alone.vectors[k], atol=1e-5)
    moved = x.behind["1", 3.] - x.behind[S.CLEAN]
    np.testing.assert_allclose(moved, np.broadcast_to(moved[0], moved.shape), atol=1e-5)
    np.testing.assert_allclose(x.behind["1", -3.] - x.behind[S.CLEAN], -moved, atol=1e-5)
    assert hook_count(lm.model) == before and lm.active == []
    for hook in ("blocks.0.mlp.hook_post", "blocks.0.hook_resid_post", "hook_embed"):
        with pytest.raises(UserError, match="shows what was put in"): S.poke(tmp_path / "c", lm, PROMPTS, clamps, (1.,), hook)
    with pytest.raises(UserError): S.poke(tmp_path / "d", lm, PROMPTS, clamps, (1.,), "blocks.9.hook_resid_post")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_bounds(p):
    fixed, p = S.holm(dict(enumerate(p))), np.array(p)
    h = np.array([fixed[i] for i in range(len(p))])
    assert (h >= p).all() and (h <= np.minimum(1, p * len(p)) + 1e-12).all() and h.min() == pytest.approx(min(1, p.min() * len(p)))
    assert (np.diff(h[np.argsort(p, kind="stable")]) >= 0).all()


def test_rayleigh_against_draws():
    for n in (5, 20):
        R_ = abs(np.exp(2j * np.pi * np.random.default_rng(n).random((20_000, n))).mean(1))
        for q in (.5, .9, .99): assert S.rayleigh(np.quantile(R_, q), n) == pytest.approx(1 - q, abs=.02)


def some_lenses(seed, signal, n=10, d=40):
    rng = np.random.default_rng(seed)
    way = rng.normal(size=d)
    x = signal * np.tile([1, -1], n)[:, None] * way + rng.normal(size=(2 * n, d))
    return S.lenses(x, np.tile(["x", "y"], n), np.repeat(np.arange(n), 2), ("x", "y")), way, rng


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.floats(.01, 50))
def test_agreement_does_not_know_lengths_or_rotations(seed, length):
    "Neither the vector's length nor a rotation of the whole space changes what planes say of it."
    p, way, rng = some_lenses(seed, 1.)
    v, turn = way + rng.normal(size=40), np.linalg.qr(rng.normal(size=(40, 40)))[0]
    c = p.basis.centre_D
    q = p._replace(basis=R.Basis(p.basis.vectors_MD @ turn, p.basis.names, "", c @ turn))
    a, b, t = S.agreement(c + v, p, 0), S.agreement(c + length * v, p, 0), S.agreement((c + v) @ turn, q, 0)
    for other in (b, t): assert (a.resultant, a.signs, a.flipped) == (pytest.approx(other.resultant), other.signs, other.flipped)
    assert S.effective_planes(p) == pytest.approx(S.effective_planes(q)) and 1 <= S.effective_planes(p) <= len(p.pair_P2)
    np.testing.assert_allclose(S.principal_angles(p)[0, 1:], S.principal_angles(q)[0, 1:], atol=1e-6)


def test_lenses_agree_on_what_they_share_and_on_nothing_else():
    yes, no = [], []
    for s in range(60):
        p, way, rng = some_lenses(s, 1.)
        yes.append(S.agreement(p.basis.centre_D + way, p, 0).sign_p)
        p, way, rng = some_lenses(s, 0.)
        no.append(S.agreement(p.basis.centre_D + rng.normal(size=40), p, 0).sign_p)
    assert np.mean(np.array(yes) <= .05) > .9 and np.mean(np.array(no) <= .05) < .15


def test_exchange_holds_its_level_where_the_sign_test_does_not():
    "Cores move together, planes share axes: the sign test finds agreement in noise, the exchange does not."
    p, found = R.planes(R.random_basis(6, 12, 1)), []
    for s in range(150):
        rng = np.random.default_rng(s)
        a, core = rng.normal(size=(32, 12)), np.repeat(np.arange(8), 4)
        t = S.conditions(a, a + rng.normal(size=(8, 12))[core], core, p)["along"]
        found.append((t.sign_p <= .05, t.exchange_p <= .05))
    sign, exchange = np.mean(found, 0)
    assert sign > .1 > exchange


def test_malformed_input():
    with pytest.raises(UserError, match="no group has both"): S.lenses(np.ones((2, 4)), ["x", "x"], [0, 0], ("x", "y"))
    with pytest.raises(UserError, match="no item in common|1 different|0 different"): S.shifts(S.Poked(PROMPTS.iloc[:0], {S.CLEAN: np.ones((0, 6)), ("a", 1.): np.ones((0, 6))}, {}), R.planes(R.one_hot([0, 1], 6)), ("a", 1.))
