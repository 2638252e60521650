"The policy: killed anywhere it ends with the same bytes, threads do not matter, and its rewards, baselines and ratios keep their properties."
import copy
import hashlib
import multiprocessing
import os
import random
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import model_and_text
from neurocodec.core.run import UserError
from neurocodec.decoder.decoder import DecoderConfig, Pool, create_decoder, read_pool
from neurocodec.decoder.policy import (ARMS, CHECKPOINT, CURVES, REWARDS, Gate, Policy, PolicyConfig, PolicyTrainer, Weights, act, concentration,
                                       every_feature, forward_kl, frozen_rows, holm, keep_top, leave_one_out, measure, own_gate, policy_tensors,
                                       ppo_loss, surrogate, top_rule, tost, train_policy)
from neurocodec.sae.dictionary import DictionaryConfig, create_dictionary

F, V, W = 30, 20, 12


class Frozen:
    "A frozen model whose last stream is its logits."
    def unembed(self, last): return last


def batch(n=6, T=10, k=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    keep = torch.ones(n, T).bool()
    keep[:, 0] = False
    keep[-1, -3:] = False
    score = keep.clone()
    score[:, -1] = False
    values = torch.rand(n, T, k, generator=g).add(.1) * keep[..., None]
    return Pool(values, torch.rand(n, T, F, generator=g).topk(k).indices, keep, score, torch.randint(V, (n, T), generator=g), torch.randn(n, T, V, generator=g), torch.arange(n)[:, None].expand(n, T))


def policy(kind="attention"):
    config = DecoderConfig(kind=kind, n_features=F, d_vocab=V, width=W, heads=2, layers=1, start="fresh")
    return Policy(Gate(F, context=3, start=.7), create_decoder(config, seed=1))


HOW = PolicyConfig(steps=12, contexts=3, samples=3, minibatches=2)


def digests(folder):  # a kill may leave the temporary file that was being written
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")}


def written(path): return path.stat().st_mtime_ns if path.exists() else None


def work(folder, steps, save_every, threads=1):
    os.environ["NEUROCODEC_QUIET"] = "1"
    torch.set_num_threads(threads)
    folder.mkdir(exist_ok=True)
    t = train_policy(policy(), Frozen(), batch(), replace(HOW, steps=steps), folder, save_every=save_every, phases=True)
    save_file({"curves": t.curves_SC, **policy_tensors(t.policy)}, folder / "end.safetensors")


def test_killed_at_random_it_ends_with_the_same_bytes(tmp_path):
    steps, context = 150, multiprocessing.get_context("fork")
    work(tmp_path / "whole", steps, 1e9)
    want, kills, rng = digests(tmp_path / "whole"), 0, random.Random(0)
    folder = tmp_path / "killed"
    for _ in range(40):
        before, p = written(folder / CHECKPOINT), context.Process(target=work, args=(folder, steps, 0.))
        p.start()
        if kills < 3:
            while written(folder / CHECKPOINT) == before and p.is_alive(): time.sleep(.001)  # it has got further, however fast it is
            time.sleep(rng.uniform(0, .05))
            p.kill()
        p.join()
        kills += p.exitcode == -9
        if p.exitcode == 0: break
    assert kills >= 2 and p.exitcode == 0
    assert digests(folder) == want


def test_threads_do_not_matter(tmp_path):
    before = torch.get_num_threads()
    try:
        for n in (1, 2): work(tmp_path / str(n), 6, 1e9, n)
    finally: torch.set_num_threads(before)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_another_start_does_not_take_up_a_checkpoint(tmp_path):
    class Stop(Exception): ...
    class Tracker:
        def __init__(self, first): pass
        def log(self, step, **_):
            if step == 5: raise Stop
        def close(self): pass
    with pytest.raises(Stop): train_policy(policy(), Frozen(), batch(), HOW, tmp_path, Tracker, save_every=0)
    assert (tmp_path / CHECKPOINT).exists()
    other = policy()
    other.gate.shared.data[0] += .5
    resumed = train_policy(copy.deepcopy(other), Frozen(), batch(), HOW, tmp_path)
    fresh = train_policy(copy.deepcopy(other), Frozen(), batch(), HOW, tmp_path / "..")
    assert torch.equal(resumed.curves_SC, fresh.curves_SC)


@pytest.mark.parametrize("kind", ["linear", "attention"])
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_moves_what_it_should(arm, kind):
    t, start = PolicyTrainer(policy(kind), Frozen(), batch(), replace(HOW, arm=arm)), policy(kind)
    assert t.advance()
    moved = {name: any(not torch.equal(a, b) for a, b in zip(m.parameters(), n.parameters())) for name, m, n in (("gate", t.policy.gate, start.gate), ("decoder", t.policy.decoder, start.decoder))}
    assert moved == {"gate": arm not in ("activation", "random"), "decoder": True}


@pytest.mark.parametrize("reward", REWARDS)
def test_only_a_constant_reward_leaves_everything_where_it_was(reward):
    t, start = PolicyTrainer(policy(), Frozen(), batch(), replace(HOW, reward=reward, kl_penalty=0., entropy=0.)), policy()
    for _ in range(2): assert t.advance()
    same = [torch.equal(a, b) for a, b in zip(t.policy.parameters(), start.parameters())]
    assert all(same) if reward == "constant" else not any(same[:2]) and not all(same)


def test_the_ratio_starts_at_one_through_attention_and_leaves_it():
    t = PolicyTrainer(policy(), Frozen(), batch(), replace(HOW, contexts=2, lr=.05))
    assert t.advance()
    curve = dict(zip(CURVES, t.curves_SC[0].tolist()))
    assert curve["furthest_start"] < 1e-3 < curve["furthest_end"]


def test_reach_gives_a_gate_what_later_positions_gained():
    "Through attention a gate changes later tokens: with reach 1 a gate whose own position is worth nothing has a gradient."
    p, b, c = policy(), batch().take([0]), PolicyConfig(steps=1, contexts=1, minibatches=1, kl_penalty=0., entropy=0., clip=0.)
    roll = act(p, Frozen(), b, 4, Weights(1., 0., 0.), torch.Generator().manual_seed(0))
    A = torch.zeros(4, 10)
    A[:, 8] = torch.tensor([1., -1., 2., .5])
    def gradient(reach):
        (g,) = torch.autograd.grad(ppo_loss(p, Frozen(), b, roll, A, replace(c, reach=reach)).loss, p.gate.own_FP)
        return set(g.abs().sum(1).nonzero().flatten().tolist())
    near, far = gradient(0.), gradient(1.)
    assert near == set(b.indices_BTk[0, 8].tolist())
    assert far == set(b.indices_BTk[0, 1:9].flatten().tolist())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_another_model_end_to_end(architecture, tmp_path):
    lm, text = model_and_text(architecture, range(5, 45, 2))
    d = create_dictionary(DictionaryConfig(d_model=lm.d_model, n_features=40, k=4))
    pool = read_pool(lm, d, text, 1)
    decoder = create_decoder(DecoderConfig(kind="attention", n_features=40, d_vocab=lm.d_vocab, width=lm.d_model, heads=2, layers=1, layer=1, start="readout"), lm, d)
    t = train_policy(Policy(Gate(40), decoder), lm, pool, replace(HOW, steps=3), tmp_path)
    seen = measure(t.policy, lm, pool, own_gate(t.policy), Weights(.4, .3, .3), decoder).sums
    assert int(seen["n"].sum()) == int(pool.score_BT.sum()) and all(torch.isfinite(v).all() for v in seen.values())
    exact = torch.stack([lm.logits(text.tokens_NT[i:i + 1])[0] for i in range(len(text.tokens_NT))])[pool.score_BT].float().log_softmax(-1)
    assert torch.allclose(frozen_rows(lm, pool, 1), exact, atol=1e-4)


def test_a_padded_position_changes_nothing():
    p, b = policy(), batch()
    other = b._replace(next_BT=torch.where(b.score_BT, b.next_BT, 0), last_BTD=torch.where(b.score_BT[..., None], b.last_BTD, 1e4))
    w = Weights(.4, .3, .3)
    a, c = (measure(p, Frozen(), x, every_feature, w).sums for x in (b, other))
    assert all(torch.equal(a[k], c[k]) for k in a)
    assert int(a["n"].sum()) == int(b.score_BT.sum())


def test_more_features_kept_is_never_more_than_all():
    p, b = policy(), batch()
    with torch.no_grad():
        kl = [float(forward_kl(frozen_rows(Frozen(), b, 1), p.log_q(b, top_rule(lambda b: b.values_BTk, m)(b)))) for m in (4, 99)]
        every = float(forward_kl(frozen_rows(Frozen(), b, 1), p.log_q(b, every_feature(b))))
    assert kl[0] == kl[1] == every


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10**6), st.floats(-100, 100))
def test_the_baseline_takes_out_what_all_samples_share(k, seed, shared):
    r = torch.randn(2, k, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a = leave_one_out(r)
    assert torch.allclose(a.sum(1), torch.zeros(2, 3, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(leave_one_out(r + shared), a, atol=1e-9)
    assert (leave_one_out(torch.full((1, k, 2), shared)) == 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(.01, .9))
def test_the_clip_only_takes_away(seed, clip):
    g = torch.Generator().manual_seed(seed)
    new, old, a = (torch.randn(50, generator=g) for _ in range(3))
    clipped, free = surrogate(new, old, a, clip), surrogate(new, old, a, 0.)
    assert (clipped.objective_n <= free.objective_n + 1e-5).all() and clipped.approx_kl >= 0 and 0 <= clipped.clipped <= 1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_concentration_is_an_entropy_over_its_largest_value(k, seed, unit):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 5, k, generator=g) * (torch.rand(3, 5, k, generator=g) < .7)
    h = concentration(x)
    assert (h >= 0).all() and (h <= 1 + 1e-5).all() and torch.allclose(concentration(unit * x), h, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 12), st.integers(0, 10**6))
def test_exactly_m_features_are_kept_where_there_are_so_many(k, m, seed):
    g = torch.Generator().manual_seed(seed)
    on = torch.rand(2, 4, k, generator=g) < .7
    score = torch.randint(3, (2, 4, k), generator=g).float()  # ties are frequent
    z = keep_top(score, on, m)
    assert (z.sum(-1) == on.sum(-1).clamp_max(m)).all() and not (z.bool() & ~on).any()


def test_statistics_say_what_their_textbooks_say():
    d = [.004, -.006, .009, .001, .002]
    e = tost(d, .02)
    from scipy import stats
    assert e.p == pytest.approx(max(stats.ttest_1samp(d, -.02, alternative="greater").pvalue, stats.ttest_1samp(d, .02, alternative="less").pvalue))
    low, high = stats.t.interval(.9, 4, loc=sum(d) / 5, scale=stats.sem(d))
    assert (e.low, e.high) == pytest.approx((low, high))
    assert holm({"a": .02, "b": .02, "c": .5}) == pytest.approx({"a": .06, "b": .06, "c": .5})


def test_mistakes_are_one_line(tmp_path):
    for how in ({"contexts": 99}, {"contexts": 99, "minibatches": 1}):
        with pytest.raises(UserError, match="contexts: 99 asked for, the pool has 6"): PolicyTrainer(policy(), Frozen(), batch(), replace(HOW, **how))
    with pytest.raises(UserError, match="not finite at step 0; lower lr"):
        train_policy(policy(), Frozen(), batch()._replace(last_BTD=torch.full((6, 10, V), float("nan"))), HOW, tmp_path)


def test_phases_are_kept(tmp_path):
    t = train_policy(policy(), Frozen(), batch(), HOW, tmp_path, phases=True)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["phase1.safetensors", "phase2.safetensors", "phase3.safetensors"]
    assert all(torch.equal(v, policy_tensors(t.policy)[k]) for k, v in load_file(tmp_path / "phase3.safetensors").items())
    assert not all(torch.equal(v, policy_tensors(t.policy)[k]) for k, v in load_file(tmp_path / "phase1.safetensors").items())
