"Explanations: hostile text stays text, texts without features are refused, rankings and curves keep their properties on other architectures, and few lessons do no harm."

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurocodec.book.cli import main
from neurocodec.core.lm import tiny
from neurocodec.core.run import UserError, write_json
from neurocodec.core.text import Packed, pack
from neurocodec.decoder.explain import (Case, Confidence, Explanation, agreement, calibrate, confirmed, cut_cases, ece, explain, faith, feature_names, matched, mean_values, narrate,
                                        ordered, over_cases, study, tell, to_html, to_terminal, train_narrator)
from neurocodec.decoder.importance import ablate, model_output
from neurocodec.decoder.decoder import Pool, borrow_readout, read_pool
from neurocodec.decoder.policy import Gate
from neurocodec.sae.dictionary import DictionaryConfig, create_dictionary


class Numbers:
    "A tokenizer by which every token reads as its number."
    bos_token_id, eos_token_id = 1, 2
    def __call__(self, text, **_): return {"input_ids": [7]}
    def decode(self, ids, **_): return "".join(f"<t{i}>" for i in ids)


def parts(kind):
    lm = tiny(kind)
    lm.tokenizer = Numbers()
    ids = [torch.randint(3, 90, (14 + i,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(4)]
    d = create_dictionary(DictionaryConfig(d_model=32, n_features=40, k=5))
    return lm, d, model_output(lm, d, 1), read_pool(lm, d, Packed(*pack(ids, 16, 1), pd.DataFrame(index=range(4))), 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_case_agrees_with_ablation_of_the_whole_context(kind):
    lm, d, output, pool = parts(kind)
    cut = cut_cases(pool)[0]
    case = study(output, cut)
    only_last = cut._replace(score_BT=torch.zeros_like(cut.score_BT).index_fill_(1, torch.tensor([cut.keep_BT.shape[1] - 1]), True))
    at = torch.tensor([[0, cut.keep_BT.shape[1] - 1, j] for j in range(5)])
    assert np.allclose(case.effect_k, ablate(output, only_last, at).margin_R, atol=1e-4)
    order = ordered(case.effect_k, case.values_k > 0)
    a, b = faith(output, case, [order, order[::-1]], mean_values(pool, 40)[case.features_k])
    assert all(0 <= x.deletion <= 1 and 0 <= x.insertion <= 1 for x in (a, b))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 90))
def test_matched_orders_keep_sizes(seed, k):
    rng = np.random.default_rng(seed)
    size = rng.random(k)
    order = ordered(rng.normal(size=k), np.ones(k, bool))
    other = matched(order, size, rng)
    assert sorted(other) == list(range(k))
    rank = np.argsort(np.argsort(-size, kind="stable"))
    assert (rank[order] // 8 == rank[other] // 8).all()


def shown(lm, d, output, text):
    lm.encode = lambda texts: (torch.tensor([[1, *map(ord, texts[0])]]) % 96, None)
    return explain(lm, d, output, 1, text, [f"<img src=x {f}>" for f in range(40)], Confidence(1., [], [], []), Gate(40))


def test_everything_foreign_is_escaped():
    lm, d, output, _ = parts("llama")
    e = shown(lm, d, output, "<script>'&\"</script>\u202e")
    html = to_html(e)
    for bad in ("<script", "<img", "<t"): assert bad not in html.replace("<table", "").replace("<tbody", "").replace("<thead", "").replace("<tr>", "").replace("<th>", "").replace("<td", "")
    from rich.console import Console
    console = Console(record=True, width=200, file=open("/dev/null", "w"))
    console.print(to_terminal(Explanation("[bold]x[/bold]", [("[red]", .5)], 0., 1., [(1, "[blink]", 1., .5)], 0., "[/]")))
    assert "[bold]x[/bold]" in (said := console.export_text()) and "[blink]" in said and "[red]" in said  # no markup of rich's either


def test_texts_without_features_are_refused():
    lm, d, output, _ = parts("llama")
    with pytest.raises(UserError, match="empty text"): shown(lm, d, output, "")
    with pytest.raises(UserError, match="begins a text"): shown(lm, d, output, "abc" + chr(1))


def test_trace_and_rest_are_whole():
    lm, d, output, _ = parts("llama")
    e = shown(lm, d, output, "some words")
    assert len(e.trace) == 5 and e.rest == 0 and sum(p for _, p in e.choices) <= 1 + 1e-6 and (e.low, e.high) == (0, 1)
    assert [abs(x[3]) for x in e.trace] == sorted((abs(x[3]) for x in e.trace), reverse=True)


def test_an_output_without_a_narrator_is_told_by_its_ablations():
    lm, d, output, pool = parts("llama")
    case, names = study(output, cut_cases(pool)[0]), [f"name {f}" for f in range(40)]
    said = tell(lm, output, case, "", names, Confidence(1., [], [], []), None).words
    effect = dict(zip(case.features_k.tolist(), case.effect_k))
    assert said == f"'<t{case.token}>'; what mattered: " + "; ".join(names[f] + " (against)" * bool(effect[f] < 0) for f in confirmed(case))


def test_only_what_a_run_explained_is_explained(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NEUROCODEC_RESULTS", str(tmp_path))
    for chapter in ("24_explain", "13_train"): write_json(tmp_path / "mine/L3" / chapter / "manifest.json", {"params": {"decoder_name": "attention"}, "outputs": {}})
    for which in ("tokens", "linear", "untrained"):
        assert main(["explain", "hello", "--run", "mine", "--of", which]) == 2
        assert f"--of {which}: this run explained model and attention" in capsys.readouterr().err


@pytest.mark.parametrize("url, says", [("http://127.0.0.1:abc/v1", "expected http://HOST/v1"), ("http://[::1", "expected http://HOST/v1"), ("http://127.0.0.1:1/v1", "2 times")])
def test_words_that_cannot_be_had_are_one_line(url, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NEUROCODEC_RESULTS", str(tmp_path))
    (tmp_path / "mine/L3/24_explain").mkdir(parents=True)
    monkeypatch.setattr("neurocodec.decoder.explain.explain_text", lambda *_: Explanation("x", [("a", .5)], 0., 1., [(1, "n", 1., .5)], 0., "w"))
    assert main(["explain", "hello", "--run", "mine", "--words", "server:m", "--base-url", url]) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said and len(said.splitlines()) == 1


@given(st.floats(.3, 3), st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_a_temperature_is_kept_only_where_it_helps_on_what_it_was_not_fitted_to(scale, seed):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(600, 5, generator=g)
    y = z.softmax(-1).multinomial(1, generator=g)[:, 0]
    t = calibrate(z * scale, y, torch.arange(600)).temperature
    assert t == 1 or ece(z[400:] * scale, y[400:], t) < ece(z[400:] * scale, y[400:])


def test_few_lessons_do_no_harm():
    def lesson(seed):  # effects are sizes: what the gate starts from
        g = np.random.default_rng(seed)
        v = g.random(8).astype("float32") + .1
        p = Pool(*(torch.as_tensor(x)[None, None] for x in (v, g.permutation(60)[:8])), *[torch.ones(1, 1).bool()] * 2, torch.zeros(1, 1).long(), torch.zeros(1, 1, 1), torch.full((1, 1), seed), torch.zeros(1, 1, 1))
        return Case(p, 0, v, v, seed)
    new = [lesson(s) for s in range(100, 140)]
    def score(gate): return np.mean([agreement(narrate(gate, c.values_k, c.features_k, 3), c, n=3) for c in new])
    assert score(train_narrator([lesson(s) for s in range(10)], 60)) > .85
    assert score(train_narrator([lesson(0)], 60, steps=1)) > .5  # none can be held out
    assert confirmed(new[0], 2) == new[0].features_k[np.argsort(-new[0].values_k)[:2]].tolist()


def test_names_fall_back_to_tokens():
    lm, d, _, _ = parts("gpt2")
    assert all(n.startswith("→") for n in feature_names(d, borrow_readout(lm), str, {"features": [{"feature": 0, "label": None, "confident": True}]}))


def test_a_confidence_is_judged_by_the_nearest_and_by_documents():
    sure = np.linspace(.05, .95, 4000)
    hits = (np.random.default_rng(0).random(4000) < sure).astype(int)
    def of(p, docs): return Confidence(1., sure.tolist(), hits.tolist(), docs.tolist()).of(torch.tensor([p, 1 - p]).log())
    for p in (.52, .59, .7):   # the interval goes with the confidence, as a fixed bin would not
        said, low, high = of(p, np.arange(4000))
        assert abs(said - p) < 1e-6 and low - .02 < p < high + .02 and high < low + .13
        assert np.diff(of(p, np.arange(4000) // 100)[1:]) < .25
    alike = np.tile([0, 1], 2000)   # two documents, each wholly right or wrong: hundreds of tokens are two cases
    assert Confidence(1., sure.tolist(), alike.tolist(), alike.tolist()).of(torch.zeros(2))[1:] == (0, 1)
    assert Confidence(1., sure.tolist(), hits.tolist(), [3] * 4000).of(torch.zeros(2))[1:] == (0, 1)   # one document has no interval


def test_intervals_are_those_of_documents():
    from neurocodec.core.text import document_bootstrap
    g = np.random.default_rng(0)
    docs, v = g.integers(0, 40, 200), g.normal(size=200)
    ours, theirs = over_cases(v, docs, 4000), document_bootstrap(np.bincount(docs, v, 40), np.bincount(docs, minlength=40), 4000)
    assert np.allclose(ours, theirs, atol=.01) and np.isnan(over_cases(v, 0 * docs).low)
