"The trainer: killed anywhere it ends with the same bytes, bad numbers stop it in one line, dead features come back."
import hashlib
import json
import multiprocessing
import os
import random
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open

from neurocodec.core.run import Tracker, UserError, read_tensors
from neurocodec.sae.activations import Order, Store, write_store
from neurocodec.sae.dictionary import DictionaryConfig, load_dictionary
from neurocodec.sae.train import CHECKPOINT, Job, TrainConfig, Trainer, train, train_many

D = 32
HOW = TrainConfig(n_tokens=25_600, batch=128, lr=8e-3, dead_after=0.1)
SMALL = DictionaryConfig("topk", d_model=D, n_features=128, k=6)
SHORT = replace(HOW, n_tokens=16_000)
LONG = replace(HOW, n_tokens=160_000)
JOBS = {
    "topk": Job(SMALL, SHORT),
    "batchtopk": Job(replace(SMALL, kind="batchtopk", n_features=160), replace(SHORT, lr=4e-3)),
    "relu": Job(replace(SMALL, kind="relu", sparsity=0.3), SHORT),
}


def planted(n, seed=0):
    "Sums of a few of 100 directions; the first ones are common, the last ones rare."
    g = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(100, D, generator=g), dim=1)
    on = torch.rand(n, 100, generator=g) < 1.2 / (torch.arange(100) + 4)
    return (on * (1 + torch.rand(n, 100, generator=g))) @ W + .02 * torch.randn(n, D, generator=g) + .3


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store"), planted(20_000), layer=3)


def digests(folder):  # a kill may leave the temporary file that was being written
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".") and "tensorboard" not in p.parts}


def work(source, folder):
    os.environ["NEUROCODEC_QUIET"] = "1"
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    jobs = {name: Job(j.dictionary, replace(j.config, n_tokens=LONG.n_tokens)) for name, j in JOBS.items()}
    train_many(Store.open(source), jobs, folder, lambda start: Tracker(folder, start), save_every=.01)


def training(source, folder):
    "A run in a process of its own; the server has done the slow imports already."
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["neurocodec.sae.train", "torch.utils.tensorboard"])
    p = server.Process(target=work, args=(source, folder))
    p.start()
    return p


def step_of(path):
    if not path.exists(): return 0
    with safe_open(path, "pt") as f: return json.loads(f.metadata()["about"])["step"]


def test_sigkill_and_resume_gives_the_same_bytes(store, tmp_path):
    "Three kinds in one run, killed twenty times at random: weights, buffers, JSON, curves and log equal an undisturbed run's."
    whole, cut, rng, killed = tmp_path / "whole", tmp_path / "cut", random.Random(1), []
    training(store.folder, whole).join()
    for _ in range(20):
        before, p = step_of(cut / CHECKPOINT), training(store.folder, cut)
        while step_of(cut / CHECKPOINT) == before and p.is_alive(): time.sleep(.005)
        time.sleep(rng.uniform(0, .05))
        p.kill()
        p.join()
        killed.append(step_of(cut / CHECKPOINT))
    assert 0 < killed[0] and all(a < b for a, b in zip(killed, killed[1:])) and killed[-1] < LONG.n_steps, killed
    training(store.folder, cut).join()
    assert digests(cut) == digests(whole)
    assert not (cut / CHECKPOINT).exists() and len(digests(cut)) == 3 * 3 + 1
    curves = {name: pd.read_parquet(whole / name / "curves.parquet") for name in JOBS}
    assert max(c.dead.max() for c in curves.values()) > 0  # revival had something to do


def test_nan_names_step_and_batch_and_keeps_the_last_good_state(store, tmp_path):
    "One value on the disk is not a number; the run stops at the step whose batch holds it."
    bad, row = write_store(tmp_path / "bad", store.rows(slice(None)), layer=3), 777
    np.memmap(bad.folder / "L3.bin", "<f2", "r+", shape=(bad.n, D))[row, 5] = np.nan
    at = int(np.flatnonzero(Order(bad.n, HOW.seed)(0, bad.n) == row)[0]) // HOW.batch
    with pytest.raises(UserError, match=rf"not finite at step {at}, batch {at} .*last good state.*lower lr") as e:
        train(bad, SMALL, HOW, tmp_path / "run", save_every=0)
    assert "\n" not in str(e.value)
    assert step_of(tmp_path / "run" / CHECKPOINT) == at > 0
    assert all(t.isfinite().all() for t in read_tensors(tmp_path / "run" / CHECKPOINT).values())
    assert not (tmp_path / "run" / "dictionary.safetensors").exists()


def test_finished_work_is_not_done_twice_and_other_work_is(store, tmp_path):
    how = replace(HOW, n_tokens=2560)
    a = train(store, SMALL, how, tmp_path)
    stamp = (tmp_path / "dictionary.safetensors").stat().st_mtime_ns
    b = train(store, SMALL, how, tmp_path)
    assert (tmp_path / "dictionary.safetensors").stat().st_mtime_ns == stamp and torch.equal(a.W_dec, b.W_dec) and a.meta == b.meta
    train(store, SMALL, replace(how, seed=1), tmp_path)
    assert (tmp_path / "dictionary.safetensors").stat().st_mtime_ns != stamp


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "relu", "jumprelu", "gated"])
def test_every_kind_learns_and_takes_raw_activations(store, tmp_path, kind):
    d = train(store, replace(SMALL, kind=kind, sparsity=.1), HOW, tmp_path)
    x, again = planted(4096, seed=0), load_dictionary(tmp_path)
    with torch.no_grad():
        assert torch.equal(d(x), again(x))
        ev = float(1 - (x - d(x)).square().sum() / (x - x.mean(0)).square().sum())
    assert ev > .7, ev
    torch.testing.assert_close(d.W_dec.norm(dim=1), torch.ones(128))
    assert d.meta["layer"] == 3 and d.meta["scale"] == store.scale


@pytest.mark.parametrize("kind, revive", [("topk", "auxk"), ("batchtopk", "auxk"), ("topk", "resample"), ("relu", "resample")])
def test_dead_features_come_back(store, kind, revive):
    "Half of the features are put to death at the start; they stay dead unless something revives them."
    alive = {}
    for how in ("none", revive):
        t, stream = Trainer(store, replace(SMALL, kind=kind, sparsity=.1), replace(HOW, revive=how)), store.batches(HOW.batch)
        with torch.no_grad(): t.dictionary.b_enc[:64] = -5
        while t.step < HOW.n_steps: t.advance(next(stream))
        alive[how] = 1 - t.dictionary.dead_F[:64].float().mean().item()
    assert alive["none"] < .1 and alive[revive] > .5, alive


def test_pressure_moves_sparsity(store, tmp_path):
    "ReLU: many features in the first phase, few at the end of the second."
    train(store, replace(SMALL, kind="relu", sparsity=.3), HOW, tmp_path)
    c = pd.read_parquet(tmp_path / "curves.parquet")
    share = c.tokens / HOW.n_tokens
    assert c.l0[(share > .1) & (share < .2)].mean() > 1.3 * c.l0[(share > .7) & (share < .8)].mean()


@pytest.mark.parametrize("change, says", [
    (dict(d_model=8), "d_model: 8, but the activations in .* have width 32"),
    (dict(k=129), "expected 1 to n_features = 128"),
])
def test_bad_dictionary_is_one_line(store, tmp_path, change, says):
    with pytest.raises(UserError, match=says): train(store, replace(SMALL, **change), HOW, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_jobs_must_share_batches(store, tmp_path):
    with pytest.raises(UserError, match=r"dictionary 'b': seed = 1, but .* need the same \(0\)"):
        train_many(store, {"a": JOBS["topk"], "b": Job(SMALL, replace(SHORT, seed=1))}, tmp_path)


@pytest.mark.parametrize("kind, revive", [("topk", "none"), ("relu", "resample"), ("topk", "auxk"), ("batchtopk", "auxk")])
def test_two_processes_train_as_one(store, tmp_path, kind, revive):
    "Half of every batch each, gradients averaged: the same curve; near it where AuxK's normaliser or BatchTopK's budget is each process's own."
    what, how = replace(SMALL, kind=kind, **({"sparsity": .3} if kind == "relu" else {})), replace(HOW, n_tokens=12_800, revive=revive)
    both = train(store, what, how, tmp_path / "two", partial(Tracker, tmp_path / "two"), processes=2)
    alone = train(store, what, how, tmp_path / "one")
    one, two = (pd.read_parquet(tmp_path / n / "curves.parquet") for n in ("one", "two"))
    gap = (two.loss / one.loss - 1).abs()
    if revive == "auxk": assert gap.mean() < .02 and gap.max() < .05, gap.max()
    else: assert gap.max() < 1e-4, gap.max()
    assert (two.l0 - one.l0).abs().max() < .2 and (tmp_path / "two" / "log.jsonl").exists()
    x = store.rows(slice(0, 2000))
    with torch.no_grad(): errors = [(x - d(x)).square().mean().item() for d in (alone, both)]
    assert abs(errors[1] / errors[0] - 1) < .02, errors


def test_a_failing_process_is_one_line(store, tmp_path):
    with pytest.raises(UserError, match="not finite at step") as e: train(store, SMALL, replace(HOW, lr=1e9), tmp_path / "bad", processes=2)
    assert "\n" not in str(e.value)
