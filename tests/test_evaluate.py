"""Chapter 25's prompts and scores against lm-evaluation-harness, its files when they are not what they should be, and its subjects on other architectures."""
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from neurocodec.core.lm import tiny
from neurocodec.core.run import UserError
from neurocodec.decoder import evaluate as ev
from neurocodec.decoder.decoder import DecoderConfig, create_decoder
from neurocodec.sae.dictionary import DictionaryConfig, create_dictionary

GOLDEN = json.loads((ROOT / "tests" / "golden_tasks.json").read_text(encoding="utf8"))
SCORES = GOLDEN["scores"]


@pytest.fixture
def data(tmp_path):
    """The golden rows as files of the published schemas."""
    for name, rows in GOLDEN["rows"].items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf8")
    return tmp_path


@pytest.mark.parametrize("name", ev.BENCHMARKS)
def test_prompts_are_the_harness_own(name, data):
    questions, want = ev.read_benchmark(name, data), GOLDEN["prompts"][name]
    assert len(questions) == len(want)
    for q, w in zip(questions, want):
        assert q.prompt == w["requests"][0][0]
        if q.choices:
            assert [" " + c for c in q.choices] == [r[1] for r in w["requests"]]
            assert q.gold == w["target"]
        else: assert q.target.strip() == w["target"].strip()


def test_scores_are_the_harness_own(data):
    questions = {name: ev.read_benchmark(name, data) for name in ("gsm8k", "math", "squad", "squad_completion", "logiqa")}
    for text, i, want in SCORES["gsm8k"]: assert ev.gsm8k_score(text, questions["gsm8k"][i].gold) == want, text
    for text, i, want in SCORES["math"]: assert ev.math_score(text, questions["math"][i].gold)["exact"] == want, (text, i)
    for a, b, want in SCORES["math_equal"]: assert ev.math_equal(a, b) is want, (a, b)
    for text, i, want in SCORES["squad"]: assert ev.squad_score(text, questions["squad"][i].gold) == pytest.approx(want), text
    for *args, want in SCORES["squad_best"]: assert ev.best_score(*args) == pytest.approx(want)
    for text, i, want in SCORES["squad_completion"]: assert ev.contains(text, questions["squad_completion"][i].gold)["contains"] == want, text
    for i, log_q, want in SCORES["choice"]: assert ev.judge(log_q, questions["logiqa"][i].choices, questions["logiqa"][i].gold) == want


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="the a,.'$#=/\\{}frac0123 \nÄß"))
def test_normalisers_change_nothing_twice(text):
    once = ev.squad_normal(text)
    assert ev.squad_normal(once) == once
    assert ev.squad_score(text, [text])["exact"] == 1
    assert ev.math_equal(text, text)
    assert ev.gsm8k_normal(text) == ev.gsm8k_normal(ev.gsm8k_normal(text) + ".")


@pytest.mark.parametrize("name, line, says", [
    ("boolq", "{", "boolq.jsonl:2: not JSON"), ("boolq", "[1]", "boolq.jsonl:2: found list, expected an object with passage"),
    ("boolq", '{"passage": "x", "question": "y"}', "boolq.jsonl:2: no 'label' (found: passage, question)"),
    ("boolq", '{"passage": "x", "question": "y", "label": "yes"}', "boolq.jsonl:2: label is a str, expected int"),
    ("boolq", '{"passage": "x", "question": "y", "label": true}', "label is a bool, expected int"),
    ("boolq", '{"passage": "x", "question": "y", "label": 7}', "boolq.jsonl:2: not a row of aps/super_glue"),
    ("logiqa", '{"context": "x", "question": "y", "options": ["a", "b"], "label": "d"}', "logiqa.jsonl:2: not a row"),
    ("race", '{"article": "x", "problems": "__import__(\'os\').getcwd()"}', "race.jsonl:2: not a row"),
    ("race", '{"article": "x", "problems": "[]"}', "race.jsonl:2: not a row"),
    ("math", '{"problem": "x", "solution": "no box"}', "math.jsonl:2: not a row of EleutherAI/hendrycks_math (ValueError: the solution has no"),
    ("squad", '{"title": "x", "context": "y", "question": "z", "answers": {}}', "squad.jsonl:2: not a row"),
])
def test_malformed_rows_name_file_and_line(name, line, says, data):
    first = json.dumps(GOLDEN["rows"][name][0])
    (data / f"{name}.jsonl").write_text(f"{first}\n{line}\n", encoding="utf8")
    with pytest.raises(UserError) as e: ev.read_benchmark(name, data)
    assert says in str(e.value) and "\n" not in str(e.value)
    assert len(ev.read_benchmark(name, data, limit=1)) == 1  # what is not asked for is not read


def test_files(data, monkeypatch):
    import pandas as pd
    want = ev.read_benchmark("squad", data)
    pd.DataFrame(GOLDEN["rows"]["squad"]).to_parquet(data / "squad.parquet")
    (data / "squad.jsonl").unlink()
    assert ev.read_benchmark("squad", data) == want
    (data / "squad.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match="squad.parquet: not a whole parquet file"): ev.read_benchmark("squad", data)
    (data / "race.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="race.jsonl: not UTF-8"): ev.read_benchmark("race", data)
    (data / "boolq.jsonl").write_text("\n")
    with pytest.raises(UserError, match="boolq: no rows"): ev.read_benchmark("boolq", data)
    (data / "gsm8k.train.jsonl").write_text(json.dumps(GOLDEN["rows"]["gsm8k"][0]))
    with pytest.raises(UserError, match="gsm8k: 1 rows to draw 5 solved questions from"): ev.read_benchmark("gsm8k", data)
    monkeypatch.setattr(ev, "online", lambda: False)
    with pytest.raises(UserError, match="aps/super_glue cannot be had from the hub: there is no network"): ev.read_benchmark("boolq")


class Letters:
    """A tokenizer of characters, numbered from 3."""
    pad_token_id = 0
    def __init__(self, bos): self.bos_token_id, self.eos_token_id = bos, 2
    def __call__(self, text, add_special_tokens=True): return {"input_ids": [3 + (ord(c) - 10) % 93 for c in text]}
    def decode(self, ids): return "".join(chr(10 + i - 3) for i in ids if i > 2)


def make_panel(kind):
    """GPT-2 has no opening token of its own, Llama has one."""
    lm = tiny(kind)
    lm.tokenizer, lm.opening = Letters(1 if kind == "llama" else None), 1 if kind == "llama" else None
    g = torch.Generator().manual_seed(0)
    d = create_dictionary(DictionaryConfig(d_model=32, n_features=40, k=4), lm.residual(torch.randint(3, 95, (4, 12), generator=g), 1).flatten(0, 1))
    c = create_decoder(DecoderConfig(n_features=40, d_vocab=96, width=32, heads=4, layer=1, start="readout"), lm, d)
    return ev.Panel(lm, d, 1, ev.make_arms(lm, d, 1, {"decoder": (c, "codes")}))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def panel(request): return make_panel(request.param)


def test_likelihoods_add_up_and_know_no_neighbours(panel):
    texts = [("f(x) = ", "x + 1"), ("f(x) = ", "x"), ("", "f(x) = x"), ("g", "(y)"), ("a much longer text than the others,", " really")]
    pairs = [ev.encode_pair(panel.lm, *t) for t in texts]
    together = ev.likelihoods(panel, pairs)
    for i, (start, tail) in enumerate(pairs):
        z = panel.lm.logits(torch.tensor([start + tail]))[0, len(start) - 1:-1].double()
        want = -torch.nn.functional.cross_entropy(z, torch.tensor(tail), reduction="sum").item()
        assert together["model"][i] == pytest.approx([want, len(tail), int((z.argmax(-1) == torch.tensor(tail)).sum())], abs=1e-4)
        for arm in panel.arms: assert ev.likelihoods(panel, [pairs[i]])[arm][0] == pytest.approx(together[arm][i], abs=1e-4), arm
    small = ev.Panel(panel.lm, panel.dictionary, panel.layer, panel.arms, max_logits=1)  # a row at a time
    for arm, got in ev.likelihoods(small, pairs).items(): assert got == pytest.approx(together[arm], abs=1e-4)
    assert all((together[arm][:, 0] < 0).all() for arm in panel.arms)


def test_a_likelihood_is_the_sum_of_its_parts(panel):
    start, tail = ev.encode_pair(panel.lm, "def", " f(x)")
    parts = ev.likelihoods(panel, [(start + tail[:i], tail[i:i + 1]) for i in range(len(tail))])
    whole = ev.likelihoods(panel, [(start, tail)])
    for arm in panel.arms: assert parts[arm].sum(0) == pytest.approx(whole[arm][0], abs=1e-4)


def test_spliced_is_the_model_under_an_intervention(panel):
    from neurocodec.core.lm import Intervention
    start, tail = ev.encode_pair(panel.lm, "some text", " here")
    push = Intervention("blocks.1.hook_resid_post", "splice", panel.dictionary, slice(1, None))
    with panel.lm.intervene(push): z = panel.lm.logits(torch.tensor([start + tail]))[0, len(start) - 1:-1]
    want = -torch.nn.functional.cross_entropy(z.double(), torch.tensor(tail), reduction="sum").item()
    assert ev.likelihoods(panel, [(start, tail)])["spliced"][0, 0] == pytest.approx(want, abs=1e-3)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(8, 20), st.integers(0, 1))
def test_long_contexts_keep_their_end(n, n_after, limit, fixed):
    start = list(range(n))
    if n_after + fixed > limit:
        with pytest.raises(UserError, match="leaves no room"): ev.cut_left(start, n_after, limit, fixed)
        return
    left = ev.cut_left(start, n_after, limit, fixed)
    harness = (start + [-1] * n_after)[-(limit + 1):][:-1]  # what the harness feeds a causal model
    if not fixed: assert (left + [-1] * n_after)[:-1] == harness
    assert len(left) + n_after - 1 <= limit and left[-1] == start[-1] or len(left) == fixed
    assert left[:fixed] == start[:fixed]


def test_a_context_longer_than_the_model_is_read_from_its_end(panel):
    long, tail = "x" * 200 + "end of it", " now"
    got = ev.likelihoods(panel, [ev.encode_pair(panel.lm, long, tail)])
    other = ev.likelihoods(panel, [ev.encode_pair(panel.lm, "y" * 50 + long, tail)])
    for arm in panel.arms: assert got[arm] == pytest.approx(other[arm], abs=1e-5)


def test_writing(panel):
    prompts = ["def f(", "a" * 90]
    assert ev.write(panel, "model", prompts, 8) == ev.write(panel, "model", prompts, 8, cache=False)
    whole = ev.write(panel, "decoder", prompts[:1], 8)[0]
    assert ev.write(panel, "decoder", prompts[:1], 8, stop=[whole[2]])[0] == whole[:whole.index(whole[2])]
    step = ev.write(panel, "spliced", [prompts[0] + whole[:0]], 3)[0]
    assert ev.write(panel, "spliced", prompts, 3)[0] == step  # the same alone and in company


@pytest.mark.parametrize("panel, name", [*(("llama", name) for name in ev.BENCHMARKS), ("gpt2", "boolq"), ("gpt2", "squad")], indirect=["panel"])
def test_every_benchmark_runs(panel, name, data):
    b, said = ev.BENCHMARKS[name], []
    out = ev.run_benchmarks(panel, [name], data, n_boot=20, say=said.append)
    assert said[0].startswith(f"{name}: {len(GOLDEN['rows'][name])} questions")
    main = {"gsm8k": "flexible", "math": "exact", "squad": "f1", "squad_completion": "contains"}.get(name, "acc")
    for arm in panel.arms: assert 0 <= out[f"{name}.{main}.{arm}"].value <= 1
    if b.score: assert out[f"{name}.target.loss.model"].value > 0
    if name == "squad": assert said[0].splitlines()[0].endswith("who says nothing gets 0.333") and out["squad.NoAns.f1.model"].value <= 1 and 0 <= out["squad.best_f1.decoder"] <= 1
    if name in ("gsm8k", "math"): assert {"bleu", "chrf", "bleu.other", "chrf.other"} <= {k.split(".", 1)[1].removesuffix(".model") for k in out if k.startswith(name)}


def test_a_benchmark_that_cannot_be_had_is_one_line(panel, tmp_path):
    said = []
    assert ev.run_benchmarks(panel, ["boolq", "nothing"], tmp_path, say=said.append) == {}
    assert [s.split(": ")[1] for s in said] == ["not run. " + str(tmp_path), "not run. task 'nothing'"] and all("\n" not in s for s in said)
    said.clear()
    assert ev.run_benchmarks(panel, ["all", "boolq"], tmp_path, say=said.append) == {}
    assert [line.partition(":")[0] for line in said] == list(ev.BENCHMARKS), "`all` is every one, whatever else is named"


def test_benchmarks_of_which_none_ran_are_a_failure(tmp_path, monkeypatch):
    from neurocodec.book import cli
    monkeypatch.setattr(ev, "open_panel", lambda *_: None)
    assert cli._benchmarks(SimpleNamespace(tasks="all,boolq", data=str(tmp_path), limit=1, layer=[2]), SimpleNamespace(run="nano", model="nano", layers=[2], seed=0), "nano.yaml") == 2


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(8, 40))
def test_who_does_not_look_is_at_chance(seed, n):
    """Every task of our own making: constant preferences are right exactly once in n choices."""
    rng = random.Random(seed)
    pool = ["graph", "tensor", "matrix", "vector", "kernel", "stream", "module", "layer", "weight", "number", "letters", "values"]
    def document(i):
        w = rng.sample(pool, 12)
        return (f"{' '.join(w)} f(a long argument, [more of them, {w[0]}]) and `a quoted piece of code` or \"some quoted words\".\n\n"
                f"Parameters\n----------\n{w[1]} : int\n    A {w[2]} of some kind.\n{w[3]} : float\n    More than {w[1]}.\n{w[4]} : str\n    A name.")
    texts = [ev.Text(i, "one" if i % 4 < 2 else "two", document(i) + (" alpha" if i % 4 < 2 else " omega") * 20) for i in range(40)]
    made = ev.offline_items(texts, n, seed)
    assert set(made) == set(ev.OFFLINE)
    liked = {c: rng.random() for items in made.values() for i in items for c in i.choices}
    for name, items in made.items():
        assert len(items) <= n and all(len(set(i.choices)) == len(i.choices) for i in items)
        right = np.mean([max(i.choices, key=liked.get) == i.choices[i.answer] for i in items])
        assert right == pytest.approx(1 / len(items[0].choices)), name
    assert made == ev.offline_items(texts, n, seed)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_what_is_kept_more_is_paired(seed):
    """Differences to a control come from the same resamples, so a control that answers like the subject differs by exactly nothing."""
    g = np.random.default_rng(seed)
    t = {"x.n": np.full(200, 40.), "x.chance": np.full(200, 10.)} | {f"x.gain.{a}": g.integers(10, 40, 200).astype(float) for a in ("decoder", "tuned")} | {"x.gain.model": np.full(200, 35.)}
    t["x.gain.twin"] = t["x.gain.decoder"]
    own, control = (ev.overall(t, ["x"], a, 9, beside=("tuned", "twin")) for a in ("decoder", "tuned"))
    assert own["retention_gain.twin"][:3] == (0, 0, 0)
    assert own["retention_gain.tuned"].value == pytest.approx(own["retention"].value - control["retention"].value)
