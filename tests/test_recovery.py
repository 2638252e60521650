"Collapse and recovery: the file format against what other writers make of it, flags against a second implementation, counts against hand work, clamps on foreign architectures."
import csv
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from neurocodec.core.coherence import collapsed, legacy_collapsed
from neurocodec.core.engine import what_failed
from neurocodec.core.lm import tiny
from neurocodec.core.run import UserError
from neurocodec.resonance.recovery import (
    BASELINE, COLUMNS, NOTHING, ORIGINAL, OURS, PROMPT, curve, hold, hold_feature, improvement_report, judge, outcome, push, read_outputs, report, summary, text_metrics, write_outputs, write_texts, written_by)
from neurocodec.sae.dictionary import DictionaryConfig, create_dictionary

TEXT = st.text(alphabet=st.sampled_from(list("abK .?!'\"\t\n\r`’é|") + ["\u2028", "\x85", "\x1c"]), max_size=40)


def pandas_reads(path):
    "As the original reads a file, with its flags written out by hand."
    t = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_MINIMAL, lineterminator="\n", keep_default_na=False, na_values=[""], dtype={"sweep": str}).fillna({"output": ""})
    collapsed, keys = [legacy_collapsed(str(o)) for o in t.output], list(t[PROMPT].itertuples(index=False, name=None))
    bad = {k for k, s, c in zip(keys, t.sweep, collapsed) if s == BASELINE and c}
    return t, [collapsed, [s != BASELINE and k in bad and not c for k, s, c in zip(keys, t.sweep, collapsed)]]


def table(texts, sweeps=("-5", BASELINE, "10")):
    rows = [(f"core_{i // 2}", ("decl", "rhet")[i % 2], i, s, "A prompt.", texts[(i * len(sweeps) + j) % len(texts)]) for i in range(4) for j, s in enumerate(sweeps)]
    return pd.DataFrame(rows, columns=COLUMNS)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=12))
def test_files_come_back_as_they_were(tmp_path_factory, texts):
    "Tabs, quotes, line feeds, lone carriage returns and separators of other kinds are text; pandas, as the original calls it, reads the same."
    t, path = table(texts), tmp_path_factory.mktemp("t") / "x.tsv"
    write_outputs(path, t)
    assert read_outputs(path).values.tolist() == t.values.tolist()
    assert pandas_reads(path)[0].output.astype(str).tolist() == t.output.tolist()


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("order", [COLUMNS, COLUMNS[::-1], ["seed", *COLUMNS]])
def test_other_writers(tmp_path, ending, order):
    "Columns in another order, one more, ends of lines of another system, a byte-order mark, empty lines at the end."
    t = table(["It is 5\" long.\nAnd wide.", "", "plain", "’’’’’’’’"]).assign(seed=3)
    t.to_csv(tmp_path / "x.tsv", sep="\t", index=False, columns=order, lineterminator=ending, encoding="utf-8-sig")
    with open(tmp_path / "x.tsv", "ab") as f: f.write(ending.encode() * 2)
    assert read_outputs(tmp_path / "x.tsv").values.tolist() == t[COLUMNS].values.tolist()


def test_level_may_be_a_word(tmp_path):
    write_outputs(tmp_path / "x.tsv", table(["a"]).assign(level=["low"] * 6 + ["2"] * 6))
    assert set(read_outputs(tmp_path / "x.tsv").level) == {"low", "2"}


HEAD = "\t".join(COLUMNS) + "\n"
BASE = "a\tb\t1\tbaseline\tp\t’’’’’’’’’’\na\tb\t1\t25\tp\tA healthy text.\n"
@pytest.mark.parametrize("rows", [
    BASE + "a\tb\t1\t25\tp\tA healthy text.\n", BASE + "a\tb\t1\tbaseline\tp\tA healthy text.\n", "a\tb\t1\tbaseline\tp\tA healthy text.\n" + BASE, BASE * 2, BASE + "a\tb\t1\t25.0\tp\t\n",
    BASE + "a\tb\t01\t25\tp\tA text.\n", BASE + "a\tb\t01\t25\tp\tA text.\na\tb\thigh\t25\tp\tA text.\n", BASE + "a\tb\t1.0\t-5\tp\tA text.\n", BASE.replace("\t1\t", "\t 1\t", 1),
    BASE + 'a\tb\t1\t5\tA 5" nail\t"A text, and more"\n', BASE + 'a\tb\t1\t5\tp\t"Hi" he said, "and more\n', BASE + "   \n" + BASE, BASE + f"a\tb\t1\t5\tp\t{'ab c' * 50_000}\n",
    BASE.replace("a\tb\t1\t25", "A\tb\t1\t25"), BASE.replace("\t25\t", "\t 25\t")])
def test_flags_are_those_of_the_originals_reader(tmp_path, rows):
    "Repeated rows and baselines, levels of several kinds, marks and lengths that a stricter reader would not take."
    (tmp_path / "x.tsv").write_text(HEAD + rows)
    judged = judge(read_outputs(tmp_path / "x.tsv"))
    assert [judged.is_collapsed.tolist(), judged.intervention_improves_baseline.tolist()] == pandas_reads(tmp_path / "x.tsv")[1]
    again = len(judged) - len(judged.drop_duplicates([*PROMPT, "sweep"]))
    assert ([f"{again} rows repeat a prompt and value" in s for s in summary(judged)].count(True) == 1) == (again > 0)
    assert (curve(judged).prompts <= judged[PROMPT].drop_duplicates().shape[0]).all() and "**Collapsed baseline**" in improvement_report(judged, "x.tsv") or not judged.intervention_improves_baseline.any()


@given(st.text(alphabet='ab" \'5', min_size=1, max_size=12).filter(lambda t: not t.startswith('"')))
def test_marks_inside_an_unquoted_field_are_text(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("t") / "x.tsv"
    path.write_text(HEAD + f"a\tb\t1\tbaseline\tp\t{text}\nc\td\t02\t3\tp\to\n")
    assert read_outputs(path)[["level", "output"]].values.tolist() == [[1, text], [2, "o"]]


@pytest.mark.parametrize("text, says", [
    (b"", "x.tsv:1: no column core_id"), (b"\n\n", "x.tsv:1: no column"), (HEAD.encode(), "x.tsv:1: no rows"), (b"core_id\ttype\tlevel\tsweep\tprompt\n", "x.tsv:1: no column output"),
    ((HEAD + "a\tb\t1\t3\tp\n").encode(), "x.tsv:2: 5 fields, the first line names 6"), ((HEAD + "a\tb\t1\t3\tp\to\tmore\n").encode(), "x.tsv:2: 7 fields"),
    ((HEAD + 'a\tb\t1\t3\tp\t"1\n2\n3"\na\tb\t2\tx\tp\to\n').encode(), "x.tsv:5: sweep 'x': expected a number or exactly `baseline`"), ((HEAD + "a\tb\t1\tinf\tp\to\n").encode(), "x.tsv:2: sweep 'inf'"),
    ((HEAD + "a\tb\t1\tNone\tp\to\n").encode(), "exactly `baseline`, which marks the unclamped text"), ((HEAD + "a\tb\t1\t baseline\tp\to\n").encode(), "x.tsv:2: sweep ' baseline'"),
    ((HEAD + "a\t \t1\t3\tp\to\n").encode(), "x.tsv:2: type is empty"), ((HEAD.replace("prompt", "output") + "a\tb\t1\t3\tp\to\n").encode(), "x.tsv:1: no column prompt; expected"), ((HEAD.strip() + "\t output\n").encode(), "x.tsv:1: more than one column output"),
    ((HEAD + "a\tb\t1\t3\tp\to\na\tb\t1\t4\tp\t\"open\na\tb\t1\t5\tp\to\n").encode(), "x.tsv:3: a quotation mark without its partner"),
    ((HEAD + "a\tb\t1\t4\tp\t\"open").encode(), "x.tsv:2: a quotation mark without its partner"),
    (HEAD.encode() + b"a\tb\t1\t3\tp\tok\na\tb\t1\t4\tp\t\xff\n", "x.tsv:3: not UTF-8"), (("\ufeff" + HEAD).encode("utf-16"), "not UTF-8")])
def test_malformed_files_name_the_line(tmp_path, text, says):
    (tmp_path / "x.tsv").write_bytes(text)
    with pytest.raises(UserError) as e: read_outputs(tmp_path / "x.tsv")
    assert says in str(e.value) and "\n" not in str(e.value)


def test_folders_and_missing_files(tmp_path):
    for path in (tmp_path, tmp_path / "none.tsv"):
        with pytest.raises(UserError, match="cannot be read"): read_outputs(path)


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXT | st.sampled_from(["", NOTHING, "k" * 20, "sorrowful " * 9, "I am not sure.\n" * 5, "A healthy sentence, quite."]), min_size=1, max_size=12))
def test_flags_row_by_row(texts):
    "The flags by loops over rows, the way the description goes."
    t = table(texts)
    got = judge(t)
    base = {tuple(r[c] for c in PROMPT): r["output"] for _, r in t.iterrows() if r["sweep"] == BASELINE}
    for (_, row), (_, g) in zip(t.iterrows(), got.iterrows()):
        before, clamped = base[tuple(row[c] for c in PROMPT)], row["sweep"] != BASELINE
        shown = {x: "" if x == NOTHING else x for x in (before, row["output"])}
        assert g.is_collapsed == legacy_collapsed(row["output"]) and g.is_looping == collapsed(shown[row["output"]])
        assert g.intervention_improves_baseline == (clamped and legacy_collapsed(before) and not g.is_collapsed)
        assert g.harms_baseline == (clamped and not legacy_collapsed(before) and g.is_collapsed)
        assert g.ends_loop == (clamped and collapsed(shown[before]) and not g.is_looping) and g.begins_loop == (clamped and not collapsed(shown[before]) and g.is_looping)
        assert g.improves_without_loop == (g.intervention_improves_baseline and not g.is_looping) and g.same_as_baseline == (clamped and before == row["output"])
    cells = curve(got)
    for _, c in cells.iterrows():
        assert c.stayed + c.recovered + c.harmed + c.well == c.prompts == 4 and c.p <= c.p_holm <= 1
        assert c["recovery.low"] <= c.recovery <= c["recovery.high"] or c.stayed + c.recovered == 0
    assert cells[cells.rule == "original"].recovered.sum() == got.intervention_improves_baseline.sum()
    assert cells[cells.rule == "period-agnostic"].harmed.sum() == got.begins_loop.sum()
    assert (cells.recovered_without_loop <= cells.recovered).all() and cells[cells.rule == "original"].recovered_without_loop.sum() == got.improves_without_loop.sum()
    assert cells.sweep.tolist() == ["-5", "10"] * 2


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_metrics_against_counting(text):
    m = text_metrics(text)
    tokens = text.split()
    if not tokens or text == NOTHING: return None if math.isnan(m["total_tokens"]) and m["error"] else pytest.fail(text)
    p = np.array(list(Counter(tokens).values())) / len(tokens)
    assert (m["total_tokens"], m["unique_tokens"]) == (len(tokens), len(p)) and m["error"] is None
    assert m["token_entropy"] == pytest.approx(-(p * np.log2(p)).sum(), abs=1e-12)
    assert 1 <= m["num_sentences"] <= len(tokens) and m["avg_sentence_length"] == len(tokens) / m["num_sentences"]
    assert m["num_repeated_bigrams"] == sum(tokens[i:i + 2] not in [tokens[j:j + 2] for j in range(i)] and [tokens[j:j + 2] for j in range(len(tokens) - 1)].count(tokens[i:i + 2]) > 1 for i in range(len(tokens) - 1))


def test_files_of_a_report(tmp_path):
    t = table(["k" * 20, "A healthy sentence, quite. And one more!", "I am not sure. " * 6, "```\ncode\n```", "", "’" * 9])
    write_outputs(tmp_path / "run.tsv", t)
    judged, files = report(tmp_path / "run.tsv", tmp_path / "out")
    assert [f.name for f in files] == ["run_judged.csv", "run_judged.md", "run_judged_curve.csv"] and all(f.parent.name == "out" for f in files)
    back = pd.read_csv(files[0])
    assert back.columns.tolist() == ORIGINAL + OURS and back.is_collapsed.tolist() == judged.is_collapsed.tolist()
    assert back[COLUMNS[:4]].astype(str).values.tolist() == t[COLUMNS[:4]].astype(str).values.tolist()
    assert back.error.equals(back["error.1"])
    text = files[1].read_text()
    assert text == improvement_report(judged, "run.tsv") and text.count("**Sweep:") == judged.intervention_improves_baseline.sum()
    assert len(pd.read_csv(files[2])) == 4


def test_the_originals_own_files_are_left_alone(tmp_path):
    write_outputs(tmp_path / "run.tsv", table(["k" * 20]))
    theirs = [tmp_path / f"run{end}" for end in ("_metrics.csv", "_improvement_report.md", "_report.md")]
    for f in theirs: f.write_text("theirs")
    report(tmp_path / "run.tsv")
    assert [f.read_text() for f in theirs] == ["theirs"] * 3 and len(list(tmp_path.iterdir())) == 7


def test_a_report_that_cannot_be_written_is_one_line(tmp_path):
    write_outputs(tmp_path / "run.tsv", table(["k" * 20]))
    for folder in (tmp_path / "run.tsv", tmp_path / "run.tsv" / "below", tmp_path / ("x" * 300), "/proc/nope"):
        with pytest.raises(UserError) as e: report(tmp_path / "run.tsv", folder)
        assert Path(folder).name in str(e.value) and "cannot be written" in str(e.value) and "\n" not in str(e.value)


def test_prompts_without_a_baseline_are_said_and_left_out():
    t = table(["k" * 20, "A healthy sentence, quite."])
    t = t[~((t.sweep == BASELINE) & (t.level < 2))]
    got = judge(t)
    assert "2 of the 4 prompts have no baseline" in "\n".join(summary(got))
    assert not got[got.level < 2][["intervention_improves_baseline", "harms_baseline", "ends_loop", "begins_loop", "same_as_baseline"]].any(axis=None)
    assert set(curve(got).prompts) == {2}
    none = judge(t[t.sweep != BASELINE])
    assert set(curve(none).prompts) == {0} and "0 of 0 baselines" in "\n".join(summary(none))
    assert curve(judge(t[t.sweep == BASELINE])).empty


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_outcomes(pairs):
    before, after = (np.array([p[i] for p in pairs], bool) for i in (0, 1))
    o = outcome(before, after)
    assert (o.stayed, o.recovered, o.harmed, o.well) == tuple(sum((b, a) == x for b, a in pairs) for x in ((1, 1), (1, 0), (0, 1), (0, 0)))
    assert 0 <= o.p <= 1 and outcome(after, before).p == o.p
    twice = outcome(np.tile(before, 2), np.tile(after, 2), draws=2)
    assert (twice.recovery, twice.harm) == (o.recovery, o.harm) or math.isnan(o.recovery.value) or math.isnan(o.harm.value)
    assert math.isnan(twice.p)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_a_held_neuron_is_held(architecture):
    "Every row its own neuron and value; nothing else in the layer moves; writing in batches of any size is the same; no hook stays."
    lm, g = tiny(architecture), torch.Generator().manual_seed(0)
    t, at, v = torch.randint(3, 96, (4, 6), generator=g), torch.tensor([1, 7, 7, 0]), torch.tensor([3., -2., 0., 5.])
    hook = "blocks.1.mlp.hook_post"
    clean = lm.capture(t, [hook])[hook]
    with lm.intervene(hold(lm, 1, at, v)): got = lm.capture(t, [hook])[hook]
    want = clean.clone()
    want[torch.arange(4), :, at] = v[:, None]
    torch.testing.assert_close(got, want)
    out = "blocks.1.hook_mlp_out"
    with lm.intervene(hold(lm, 1, at, v)): moved = lm.capture(t, [out])[out]
    if architecture != "gemma2":  # there a norm follows the projection
        torch.testing.assert_close(moved - lm.capture(t, [out])[out], (v[:, None] - clean[torch.arange(4), :, at])[..., None] * written_by(lm, 1, at.tolist())[:, None], atol=1e-4, rtol=1e-3)

    class Names:
        pad_token_id = 0
        def __call__(self, text): return {"input_ids": [ord(c) % 90 + 3 for c in text]}
    lm.tokenizer = Names()
    texts, vectors = ["abc", "b", "abcde"], torch.randn(3, 32, generator=g) * 20
    all_at_once = write_texts(lm, texts, 6, lambda r: push(1, vectors[r]))
    assert write_texts(lm, texts, 6, lambda r: push(1, vectors[r]), batch=1) == all_at_once != write_texts(lm, texts, 6)
    d, f, v, length = create_dictionary(DictionaryConfig(d_model=32, n_features=64, k=8)), torch.tensor([3, 9, 3]), torch.tensor([9., -9., 4.]), torch.tensor([3, 1, 5])
    def features(r): return hold_feature(1, d, f[r], v[r], length[r])
    all_at_once = write_texts(lm, texts, 6, features)
    assert write_texts(lm, texts, 6, features, batch=1) == all_at_once != write_texts(lm, texts, 6)
    tokens, mask = lm.encode(texts)
    with lm.intervene(features(torch.arange(3))): assert torch.equal(*(lm.generate(tokens, 6, attention_mask=mask, use_cache=c) for c in (True, False)))
    assert lm.active == []


# What is known of the published sweep (GPT-2 small, layer 11, neuron 373, 140 prompts × 14 values): clamp value → collapsed texts, and collapsed of the 132 prompts that were well;
# prompt → the values under which it counts as improved
SWEEP = {"-100": (114, 106), "-50": (59, 54), "-25": (10, 5), "-10": (10, 4), "-5": (7, 1), "-3": (7, 0), "0": (8, 0), "3": (6, 0), "5": (6, 0), "10": (3, 0), "25": (6, 5), "50": (39, 36), "100": (119, 114)}
IMPROVED = {("glass_shatter_noise", "declarative", 2): "25", ("painting_conveys_sorrow", "declarative", 3): "-25 -10 -5 3 5 10 25 50 100", ("painting_conveys_sorrow", "observational", 5): "-50 -25 -10 -5 -3 10 25 50 100",
            ("painting_conveys_sorrow", "rhetorical", 1): "3 5 10 25", ("presence_by_door", "declarative", 2): "50", ("presence_by_door", "declarative", 5): "-25 10 25",
            ("red_light_warning", "declarative", 2): "-50 10 25 50", ("red_light_warning", "rhetorical", 4): "-50 25 50 100"}
FREE = {("painting_conveys_sorrow", "declarative", 3): "3 5 10", ("painting_conveys_sorrow", "observational", 5): "-25 50", ("painting_conveys_sorrow", "rhetorical", 1): "25",
        ("presence_by_door", "declarative", 5): "10 25", ("red_light_warning", "declarative", 2): "10 25 50"}  # where no loop of any period is left
LOOPING_BASELINES = 79


def published(judged):
    "Whether judged rows have the published sweep's numbers."
    base, clamped = judged[judged.sweep == BASELINE], judged[judged.sweep != BASELINE]
    assert (len(judged), judged.is_collapsed.sum(), len(base), base.is_collapsed.sum(), base.is_looping.sum()) == (1960, 402, 140, 8, LOOPING_BASELINES)
    better = judged[judged.intervention_improves_baseline]
    for t, known in ((better, IMPROVED), (better[better.improves_without_loop], FREE)): assert {k: set(x.sweep) for k, x in t.groupby(PROMPT)} == {k: set(v.split()) for k, v in known.items()}
    assert (len(better), better.is_looping.sum()) == (35, 24)
    assert {s: (t.is_collapsed.sum(), t.harms_baseline.sum()) for s, t in clamped.groupby("sweep")} == SWEEP
    c = curve(judged)
    c = c[c.rule == "original"].set_index("sweep")
    assert (c.prompts == 140).all() and c.recovery["25"] == 7 / 8 and (c["recovery.low"]["25"], c["recovery.high"]["25"]) == pytest.approx((.4735, .9968), abs=1e-4)
    assert "8 of 140 baselines; found improvements for 8 of 8 prompts, in 35 rows" in "\n".join(summary(judged))


def like_the_published():
    "A sweep with the published counts, in words of our own: floods, long loops and numbered sentences."
    cores = ["glass_shatter_noise", "painting_conveys_sorrow", "presence_by_door", "red_light_warning", "a", "b", "c"]
    prompts = [(c, t, n) for c in cores for t in ("observational", "declarative", "authoritative", "rhetorical") for n in range(1, 6)]
    well, rows = [p for p in prompts if p not in IMPROVED], []
    flood, loop = "’" * 24, "The lamp was lit, or so they said. " * 5
    def fine(i, s): return f"Door {i} at {s} was open. Nobody knew by whom; the {i + 3} neighbours had been away, all but one."
    for i, p in enumerate(prompts):
        for s in [*SWEEP, BASELINE]:
            if p in IMPROVED: text = flood if s == BASELINE or s not in IMPROVED[p].split() else fine(i, s) if s in FREE.get(p, "").split() else loop
            else:
                at = well.index(p)
                text = (loop if at < LOOPING_BASELINES - 8 else fine(i, s)) if s == BASELINE else flood if at < SWEEP[s][1] else fine(i, s)
            rows.append((*p, s, f"Prompt {i}.", text))
    return pd.DataFrame(rows, columns=COLUMNS)


def test_the_published_numbers(tmp_path):
    "On a file of the same counts, and on the published one where NEUROCODEC_PUBLISHED_TSV names it (INT-010 of 2Smol-Interpretability)."
    write_outputs(tmp_path / "like.tsv", like_the_published())
    for path in filter(None, (tmp_path / "like.tsv", os.environ.get("NEUROCODEC_PUBLISHED_TSV"))):
        published(judge(read_outputs(path)))
        assert [judge(read_outputs(path))[f].tolist() for f in ("is_collapsed", "intervention_improves_baseline")] == pandas_reads(path)[1]


GRAMMAR = """A small grid in the original's grammar.
>> CORE_ID: gate is open
>> PROPOSITION: The gate is open.
[LEVEL 1]
declarative: The gate may be open.
rhetorical: Could it be that the gate is open?
[LEVEL 2]
declarative: The gate is open.
rhetorical: Who would doubt that the gate is open?
"""


def test_the_published_setting_runs(tmp_path):
    "What params/gpt2-resonance.yaml asks of chapter 44, with tiny numbers: neuron and raw value are given, so nothing is chosen, no dictionary is made and every prompt of the one proposition is tested."
    (tmp_path / "grid.txt").write_text(GRAMMAR)
    asked = yaml.safe_load((ROOT / "params" / "gpt2-resonance.yaml").read_text())["chapters"]["44_recovery"]
    assert {"unit": "raw", "codec": False, "n_test": 0}.items() <= asked.items() and asked["at_value"] in asked["sweep"].split(",")
    knobs = asked | {"prompts": str(tmp_path / "grid.txt"), "neuron": 5, "sweep": "-25,25", "n_new": 6, "n_controls": 2, "eval_tokens": 500}
    given = [x for k, v in knobs.items() for x in ("-r" if isinstance(v, str) else "-p", k, str(v))]
    done = subprocess.run([sys.executable, "-m", "papermill", "-k", "python3", "--no-progress-bar", ROOT / "nbs" / "44_recovery.ipynb", tmp_path / "out.ipynb", *given],
                          cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=900)
    assert done.returncode == 0, what_failed(tmp_path / "out.ipynb") if (tmp_path / "out.ipynb").exists() else done.stderr[-2000:]
    said = "".join("".join(o.get("text", "")) for c in json.loads((tmp_path / "out.ipynb").read_text())["cells"] for o in c.get("outputs", []))
    assert "a beginning-of-text token stands before every prompt: yes" in said and "layer 3, for half 1: neuron 5 (" in said
    assert "4 test prompts" in said and "layer 3 half 1 neuron 25" in said and "12 rows: 4 prompts, 2 clamp values" in said
    assert "13_train" not in said
