"Prompt files that are wrong, clamps on foreign architectures, captures that are killed: what the chapter cannot show about itself."
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurocodec.core.lm import hook_count, tiny
from neurocodec.core.run import UserError
from neurocodec.resonance import prompts as P

WORD = st.text("abcdefgh_", min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(WORD, WORD, st.integers(-3, 9), st.text("ab c.:?’", min_size=1).filter(lambda t: t.strip())), min_size=1, max_size=12))
def test_grammar_comes_back(rows):
    "Whatever is written in the original grammar is read as it was written, names with underscores included."
    text = "".join(f">> CORE_ID: {c}\n>> PROPOSITION: {c} is so\n\n[LEVEL {n}]\n{t}: {p}\n" for c, t, n, p in rows)
    got = P._read_grammar(P.Path("x.txt"), text)
    assert got[["core_id", "type", "level", "prompt"]].values.tolist() == [[c, t, n, p.strip()] for c, t, n, p in rows]
    assert not got.duplicated(["core_id", "type", "level", "paraphrase"]).any()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(P.READERS)), st.one_of(st.binary(max_size=80), st.text("core_id,prompt:\n\t-[]{}\"'>#&*! LEVEL1abc", max_size=80).map(str.encode)))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path_factory, suffix, data):
    path = tmp_path_factory.mktemp("f") / f"set{suffix}"
    path.write_bytes(data)
    try: assert {"core_id", "type", "level", "paraphrase", "prompt"} <= set(P.read_prompts(path))
    except UserError as e: assert "\n" not in str(e) and f"set{suffix}:" in str(e)


@pytest.mark.parametrize("name, text, says", [
    ("a.txt", ">> CORE_ID: x\n[LEVEL 1]\ndeclarative:\n", "a.txt:3: prompt is empty"),
    ("a.txt", ">> CORE_ID: x\n[LEVEL one]\n", "a.txt:2: level 'one': expected a whole number"),
    ("a.txt", ">> CORE_ID: x\n[LEVEL 1\n", "a.txt:2: '[LEVEL 1': expected"),
    ("a.txt", ">> CORE_ID: x\ndeclarative: y\n", "a.txt:2: no prompts in it"),
    ("a.csv", "core_id,level,prompt\nx,1,a\nx,high,b\n", "a.csv:3: level 'high'"),
    ("a.csv", "core_id,core_id,prompt\n", "a.csv:1: header"),
    ("a.csv", "core_id,paraphrase,prompt\nx,0,a\nx,0,b\n", "a.csv:3: paraphrase 0 of"),
    ("a.tsv", "core_id\tprompt\nx\ta\tb\n", "a.tsv:2: 3 fields"),
    ("a.yaml", "factors: [type]\ncores: {a: x}\nframes:\n  sure:\n  - fine {core}.\n  - none here\n", "a.yaml:6: frame 'none here': expected {core}"),
    ("a.yaml", "factors: [type]\ncores:\n  a: x\n  a: y\nframes: {}\n", "a.yaml:4: cores: 'a' is no name, or stands there twice"),
    ("a.yaml", "factors: type\ncores: {}\nframes: {}\n", "a.yaml:1: factors: expected a list"),
    ("a.yaml", "x: [\n", "a.yaml:2: not YAML"),
    ("a.yaml", "", "a.yaml:1: no prompts in it"),
])
def test_mistakes_name_file_and_line(tmp_path, name, text, says):
    (tmp_path / name).write_text(text, encoding="utf8")
    with pytest.raises(UserError) as e: P.read_prompts(tmp_path / name)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_lines_before_a_level_are_kept_as_ignored():
    "As in the original, whose files may describe a proposition before its first level; the next proposition starts without one."
    t = P._read_grammar(P.Path("x.txt"), ">> CORE_ID: x\nDescription: of it\n[LEVEL 1]\nsure: a\n>> CORE_ID: y\nsure: lost\n[LEVEL 2]\nsure: b\n")
    assert t.prompt.tolist() == ["a", "b"] and t.attrs["ignored"] == [[2, "Description: of it"], [6, "sure: lost"]] and P.check_design(t).ignored == 2


def test_factors_of_any_name(tmp_path):
    (tmp_path / "tone.csv").write_text("core_id,tone,voice,prompt\n" + "".join(f"c{c},{t},{v},{t} {v} {c}\n" for c in range(3) for t in "xy" for v in "uvw"))
    t = P.read_prompts(tmp_path / "tone.csv")
    d = P.check_design(t)
    assert d.balanced and d.factors == {"tone": ["x", "y"], "voice": ["u", "v", "w"]} and d.cells == 18
    assert set(P.confounds(t, P.covariates(t), 19).factor) == {"tone", "voice"}


def test_curly_quotes_that_follow_a_factor_are_reported():
    t = P.epistemic()
    t.loc[t.type == "declarative", "prompt"] = t.prompt.str.replace("the ", "the ‘", n=1)
    c = P.confounds(t, P.covariates(t), 99).set_index(["factor", "covariate"])
    assert c.loc[("type", "curly quotes"), "eta2"] > .99 and c.loc[("type", "curly quotes"), "p"] == .01
    assert c.loc[("level", "curly quotes"), "eta2"] < .01 and c.loc[("type", "words"), "eta2"] == 0


def test_values_that_follow_frames_alone_are_no_evidence():
    "Two hundred columns that know only the frame, whatever its type: found as often as the level says, although all cores agree; a column that knows the type is found."
    t = P.docstrings()
    rng, frame = np.random.default_rng(0), P.frames(t)
    x = pd.DataFrame(rng.normal(size=(frame.max() + 1, 200))[frame] + .3 * rng.normal(size=(len(t), 200))).assign(type=t.type.map(dict(zip(t.type.unique(), range(4)))) + rng.normal(size=len(t)))
    c = P.confounds(t, x, 199)
    for f in ("type", "level"): assert .01 < (c[(c.factor == f) & (c.covariate != "type")].p <= .05).mean() < .11
    assert c[(c.factor == "type") & (c.covariate == "type")].p.item() == .005


def test_cores_without_shared_cells_are_permuted_prompt_by_prompt():
    t = pd.DataFrame({"core_id": [f"c{i}" for i in range(30)], "type": ["x", "y"] * 15, "level": 0, "paraphrase": range(30), "prompt": "p"})
    assert len(set(P.frames(t))) == 30
    c = P.confounds(t, pd.DataFrame({"type": (t.type == "x") * 1., "not": np.arange(30) // 2 % 2}), 199)
    assert c.p[0] == .005 and c.p[1] > .2


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 6), st.floats(.3, 1))
def test_drawn_prompts_are_as_many_of_every_core(seed, n, share):
    "Of a whole design and of one with holes."
    t = P.docstrings().sample(frac=share, random_state=seed)
    at = P.crossed(t, n, seed)
    assert len(set(at)) == len(at) and set(t.iloc[at].core_id.value_counts()) == {min(n, t.core_id.value_counts().min())}


def test_changed_built_in_set_is_refused(tmp_path, monkeypatch):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "epistemic.yaml").write_text("- {core_id: a, prompt: b}\n")
    monkeypatch.setattr(P, "data_folder", lambda: tmp_path / "nano")
    with pytest.raises(UserError, match="was changed"): P.epistemic()


@pytest.fixture(params=["gpt2", "llama", "gemma2", "gpt_neox"])
def lm(request): return tiny(request.param)


PADDED = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [0] + [1] * 6])
NATURAL = torch.randn(200, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize("mode", P.MODES)
@pytest.mark.parametrize("where", ["all", "sticky", "last", "generated"])
def test_cache_changes_nothing(lm, mode, where):
    clamp = P.Clamp("blocks.1.mlp.hook_post", 4, mode, where, "raw", NATURAL)
    how = dict(n_new=4, clamp=clamp, values=[None, 3., -2.], hooks=["blocks.1.mlp.hook_post"], seeds=[1, 1, 2], temperature=.8, stop=False)
    with_, without = (P.write(lm, PADDED, MASK, use_cache=c, **how) for c in (True, False))
    assert with_.tokens_BT.tolist() == without.tokens_BT.tolist()
    assert (with_.seen[clamp.hook] - without.seen[clamp.hook]).abs().max() < 5e-4
    assert hook_count(lm.model) == 0 and lm.active == []


def test_all_and_last_agree_at_the_last_layer_only(lm):
    def text(layer, where): return P.write(lm, PADDED, MASK, 6, P.Clamp(f"blocks.{layer}.mlp.hook_post", 4, where=where), [9.] * 3, ["blocks.2.hook_resid_post"], stop=False)
    assert (text(2, "all").seen["blocks.2.hook_resid_post"][:, 6:] - text(2, "last").seen["blocks.2.hook_resid_post"][:, 6:]).abs().max() < 5e-4
    assert (text(0, "all").seen["blocks.2.hook_resid_post"][:, 6] - text(0, "last").seen["blocks.2.hook_resid_post"][:, 6]).abs().max() > .01


def test_a_row_does_not_depend_on_its_batch(lm):
    clamp = P.Clamp("blocks.0.hook_attn_out", 2, "resample", natural_n=NATURAL)
    whole = P.write(lm, PADDED, MASK, 5, clamp, [1., None, 2.], seeds=[5, 6, 7], temperature=1., stop=False).tokens_BT
    for r, v in enumerate([1., None, 2.]):
        alone = P.write(lm, PADDED[r : r + 1, MASK[r] == 1], MASK[r : r + 1, MASK[r] == 1], 5, clamp, [v], seeds=[5 + r], temperature=1., stop=False)
        assert alone.tokens_BT[0, -5:].tolist() == whole[r, -5:].tolist()


def test_direction_is_added_and_ends_are_seen(lm):
    u = torch.nn.functional.normalize(torch.randn(32), dim=0)
    texts = P.Passed(PADDED, MASK.bool(), 7, {})
    plain, pushed = (P.read(lm, texts, P.Clamp("blocks.1.hook_resid_post", u, "add"), [v] * 3, ["blocks.1.hook_resid_post"]).seen["blocks.1.hook_resid_post"] for v in (None, 2.))
    assert ((pushed - plain)[MASK.bool()] - 2 * u).abs().max() < 1e-5
    greedy = P.write(lm, PADDED, MASK, 6, stop=False).tokens_BT
    lm.model.generation_config.eos_token_id = greedy[0, 9].item()
    ended = P.write(lm, PADDED, MASK, 6)
    first = greedy[0, 7:].tolist().index(greedy[0, 9].item())
    assert ended.real_BT[0, 7:].tolist() == [k <= first for k in range(6)]


def test_hooks_are_gone_after_an_exception(lm):
    def fails(x): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), lm.intervene(P.Intervention("blocks.2.hook_resid_post", "splice", fails)):
        P.write(lm, PADDED, MASK, 3, P.Clamp("blocks.0.mlp.hook_post", 1), [1.] * 3, ["blocks.1.hook_resid_post"])
    assert hook_count(lm.model) == 0 and lm.active == []


def test_threads_do_not_change_a_capture(tmp_path):
    class Words:
        pad_token_id, bos_token_id, eos_token_id = 0, 1, 2
        def __call__(self, text, add_special_tokens=True): return {"input_ids": [ord(c) % 90 + 3 for c in text]}
        def decode(self, ids, skip_special_tokens=True): return " ".join(map(str, ids))
    lm, threads = tiny("llama"), torch.get_num_threads()
    lm.tokenizer = Words()
    few, got = pd.DataFrame({"core_id": list("abc"), "prompt": ["one", "second", "a third"]}), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            got.append(P.capture(tmp_path / str(n), lm, few, P.CaptureConfig(("blocks.2.hook_resid_post",), n_new=4, temperature=1.), P.Clamp("blocks.0.mlp.hook_post", 1), (None, 5.)))
    finally: torch.set_num_threads(threads)
    assert got[0].items.text.tolist() == got[1].items.text.tolist() and got[0].about["key"] == got[1].about["key"]
    counted = P.capture(tmp_path / "numpy", lm, few, P.CaptureConfig(("blocks.2.hook_resid_post",), n_new=4, temperature=1.), P.Clamp("blocks.0.mlp.hook_post", np.int64(1)), (None, *np.arange(5, 6, dtype=np.float32)))
    assert counted.about == got[0].about  # NumPy's numbers are numbers
    with pytest.raises(UserError, match="no values"): P.capture(tmp_path / "none", lm, few, P.CaptureConfig(("blocks.2.hook_resid_post",)), values=())
    np.testing.assert_allclose(*(c.vectors("blocks.2.hook_resid_post", "generated") for c in got), atol=1e-4)


def test_damaged_capture_is_one_line(tmp_path):
    (tmp_path / "capture.json").write_text("{")
    with pytest.raises(UserError, match="no finished capture"): P.Capture(tmp_path)
