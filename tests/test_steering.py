"Steering: what the methods promise on any vector, batches with padding, other architectures, damaged kits, and the app as a reader's browser sees it."

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import HOSTILE, needs_browser, open_app
from hypothesis import given, settings
from hypothesis import strategies as st

from neurocodec.book.cli import app_command, main
from neurocodec.codec import steering
from neurocodec.codec.steering import (
    BUCKETS, METHODS, Arm, Direction, Judge, Kit, crossing, learn_judge, moved, ngrams, openings, pick_themes, read_kit, separation, snr_by_size, steer, survey, theme_words, write_gguf, write_kit,
    write_lm_eval, write_texts)
from neurocodec.codec.themes import Theme
from neurocodec.core.lm import tiny
from neurocodec.core.run import Folder, UserError, open_node
from neurocodec.core.text import Packed, pack
from neurocodec.sae.dictionary import DictionaryConfig, create_dictionary, save_dictionary


def dictionary(d_model=32, n_features=64): return create_dictionary(DictionaryConfig(d_model=d_model, n_features=n_features, k=6))


def direction(seed, D=32, F=64, every=3):
    g = torch.Generator().manual_seed(seed)
    v = torch.nn.functional.normalize(torch.randn(D, generator=g), dim=0)
    return Direction(v, torch.tensor(0.1), torch.tensor(1.5), torch.where(torch.arange(F) % every == seed % every, 0.3, torch.inf))


def stacked(*directions): return Direction(*(torch.stack(x) for x in zip(*directions)))


# --- the five methods ---------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(-10, 10), st.floats(0.1, 100))
def test_what_every_push_promises(seed, s, length):
    h = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed)) * length
    d, s_N1 = stacked(*[direction(seed % 97)] * 5), torch.full((5, 1), s)
    got = {m: moved(m, h, d, s_N1, length) for m in ("additive", "norm-preserving", "rotation", "cap")}
    norm, v = h.norm(dim=1), d.v_D[0]
    torch.testing.assert_close(got["additive"] - h, (s / 10 * length * v).expand(5, -1), atol=1e-4 * length, rtol=1e-4)
    for m in ("norm-preserving", "rotation"):
        torch.testing.assert_close(got[m].norm(dim=1), norm, atol=1e-4 * length, rtol=1e-4)
        assert ((got[m] @ v - h @ v) * np.sign(s) >= -2e-4 * length * (1 + abs(s))).all()  # towards v, or away from it
    turned = torch.nn.functional.cosine_similarity(h, got["rotation"]).clamp(-1, 1).acos().rad2deg()
    assert (turned <= abs(s) * steering.DEGREES + 0.2).all()
    assert (got["cap"] @ v <= torch.maximum(h @ v, torch.tensor(0.0)) + 1e-3 * length).all()
    if s <= 0: torch.testing.assert_close(got["cap"], h)


def test_rotation_ends_on_the_vector_and_survives_zero():
    d = stacked(*[direction(1)] * 2)
    h = torch.stack([d.v_D[0] * 3, torch.zeros(32)])
    out = moved("rotation", h, d, torch.full((2, 1), 10.0), 1.0)
    torch.testing.assert_close(out[0], h[0], atol=1e-3, rtol=0)
    assert torch.isfinite(out).all() and torch.isfinite(moved("norm-preserving", h, d, torch.zeros(2, 1), 1.0)).all()


def test_clamp_leaves_a_silent_theme_alone():
    d = dictionary()
    h = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    fired = torch.unique(d.encode(h).indices_Bk)
    silent = next(i for i in range(64) if i not in fired)
    one = direction(0)._replace(limit_F=torch.where(torch.arange(64) == silent, 0.1, torch.inf))
    torch.testing.assert_close(moved("clamp", h, stacked(*[one] * 7), torch.full((7, 1), 10.0), 1.0, d), h)


# --- as interventions ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_batch_are_their_own(architecture, method):
    lm, d = tiny(architecture), dictionary()
    prompts = torch.randint(3, 96, (3, 5), generator=torch.Generator().manual_seed(2))
    pushes, s = [direction(i) for i in range(3)], [2.0, -4.0 if method in METHODS[:3] else 6.0, 9.0]
    how = dict(n_new=4, temperature=0.8, stop=False)
    with lm.intervene(steer(method, 1, pushes, s, 5.0, d)): together = lm.generate(prompts, seed=[1, 2, 3], **how)
    for r in range(3):
        with lm.intervene(steer(method, 1, pushes[r:r + 1], s[r:r + 1], 5.0, d)): alone = lm.generate(prompts[r:r + 1], seed=[r + 1], use_cache=False, **how)
        assert alone[0].tolist() == together[r].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_padding_is_for_one_direction(method):
    lm, d, t = tiny("gpt2"), dictionary(), torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    with lm.intervene(steer(method, 1, [direction(0)], [7.0], 5.0, d)):
        padded = lm.logits(t, mask)
        torch.testing.assert_close(padded[0, 3:], lm.logits(t[:1, 3:])[0], atol=1e-4, rtol=1e-3)
    if method != "additive":  # which finds its rows by itself
        with pytest.raises(UserError, match="equally long, without padding"), lm.intervene(steer(method, 1, [direction(0), direction(1)], [7.0, 7.0], 5.0, d)): lm.logits(t, mask)


def test_first_position_is_left_alone():
    lm, t = tiny("llama"), torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(2))
    clean = lm.residual(t, 1)
    with lm.intervene(steer("rotation", 1, [direction(0)], [9.0], 5.0)): h = lm.residual(t, 1)
    torch.testing.assert_close(h[:, 0], clean[:, 0])
    assert ((h[:, 1:] - clean[:, 1:]).norm(dim=-1) > 0.01).all()


def test_mistakes_are_one_line():
    lm = tiny("gpt2")
    for bad in (dict(method="sideways"), dict(strengths=[float("nan")]), dict(strengths=[1.0, 2.0]), dict(method="clamp"), dict(directions=[], strengths=[])):
        with pytest.raises(UserError) as e: steer(**(dict(method="cap", layer=1, directions=[direction(0)], strengths=[1.0], length=1.0) | bad))
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="from block 1 on|neurocodec\\[gguf\\]"): write_gguf("never.gguf", {0: torch.ones(3)}, "llama")
    with pytest.raises(UserError, match="no hook point"), lm.intervene(steer("cap", 9, [direction(0)], [1.0], 1.0)): pass


# --- judging ------------------------------------------------------------------------------------------------------

@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 49), max_size=12), min_size=1, max_size=6))
def test_ngrams_are_sets(texts):
    x = ngrams(texts, 50)
    for i, t in enumerate(texts):
        assert sorted(x[i].indices[x[i].indices < 50]) == sorted(set(t))
        assert (x[i].indices >= 50).sum() <= len({*zip(t, t[1:])})
    assert x.shape == (len(texts), 50 + BUCKETS) and (x.data == 1).all()


def test_judge_reads_each_text_by_itself():
    rng = np.random.default_rng(0)
    texts, on = [rng.integers(0, 30, 9).tolist() for _ in range(80)], rng.random((80, 2)) < 0.5
    judge = learn_judge(texts, on, 40)
    np.testing.assert_allclose(judge(texts[::-1])[::-1], judge(texts)); np.testing.assert_allclose(judge(texts[3:4])[0], judge(texts)[3])
    np.testing.assert_array_equal(learn_judge(texts, on, 40).coef_CG, judge.coef_CG)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.floats(0.1, 10), st.floats(-5, 5))
def test_separation_has_no_unit_and_no_order(seed, scale, shift):
    rng = np.random.default_rng(seed)
    x, on = rng.normal(size=(60, 4)), rng.random(60) < 0.4
    on[:2] = True, False
    order = rng.permutation(60)
    np.testing.assert_allclose(separation(scale * x[order] + shift, on[order]), separation(x, on), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(separation(x, ~on), -separation(x, on))


def test_signal_of_shuffled_labels_is_noise():
    rng = np.random.default_rng(0)
    on, doc = rng.random(3000) < 0.3, np.arange(3000) // 10
    x = rng.normal(size=(3000, 32)) + on[:, None]
    d, null = (snr_by_size(x, o, doc, [1, 32], rng)[0] for o in (on, rng.permutation(on)))
    assert d[1] > 4 and np.abs(null).max() < 0.15


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 2), min_size=1, max_size=5), st.floats(0.01, 1))
def test_crossing_is_within_what_was_tried(costs, limit):
    s = [2.0**i for i in range(len(costs))]
    at = crossing(s, costs, limit)
    assert 0.1 <= at <= s[-1] and (at == 0.1 or np.interp(at, [0, *s], [0, *costs]) <= limit + 1e-9 or at == s[-1])


def test_openings_and_words_of_a_small_corpus():
    ids = [list(range(3, 3 + n)) for n in (4, 9, 30)]
    packed = Packed(*pack(ids, 16, 1), pd.DataFrame({"domain": ["a", "a", "b"]}))
    tokens, docs = openings(packed, 9, 6, 1)
    assert sorted(docs) == [1, 2] and (tokens[:, 0] == 1).all() and tokens.shape == (2, 6)
    assert openings(packed, 9, 500, 1)[0].shape == (0, 500)
    assert theme_words(np.zeros(5), np.zeros(5), np.ones(5, bool), 3).tolist() == [0, 1, 2]


# --- a foreign architecture, from survey to text ------------------------------------------------------------------

class Say:
    "A tokenizer of one letter a token."
    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0
    def decode(self, ids, **_): return "".join(chr(32 + int(i)) for i in ids)


def test_gpt2_end_to_end():
    lm, d = tiny("gpt2"), dictionary()
    lm.tokenizer = Say()
    ids = [torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(20, 60, 4)]
    packed = Packed(*pack(ids, 32, 1), pd.DataFrame({"domain": ["a" if i % 2 else "b" for i in range(len(ids))]}))
    seen = survey(lm, packed, 1, d, batch=3)
    again = survey(lm, packed, 1, d, batch=50)
    np.testing.assert_allclose(seen.mean_SF, again.mean_SF, atol=1e-5)
    domain = packed.docs.domain.loc[seen.doc_S].to_numpy()
    themes = pick_themes([Theme(i, "", [2 * i, 2 * i + 1], [1.0, 0.5], 0.5, 0.1, None, None) for i in range(8)], seen, domain, 2, least=3)
    assert {t.domain for t in themes} == {"a", "b"}
    prompts, _ = openings(packed, 3, 6, 1)
    push = steering.direction(steering.theme_vector(d.W_dec, themes[0].features, themes[0].membership), seen, themes[0].features)
    judge = Judge(np.ones(96 + BUCKETS), np.zeros((96 + BUCKETS, 1)), np.zeros(1), 96)
    arms = [Arm("none"), *(Arm("theme", 0, m, 5.0, push) for m in METHODS)]
    tables = [write_texts(lm, 1, arms, prompts, 4, judge, 5.0, d, batch=b) for b in (2, 128)]
    pd.testing.assert_frame_equal(*(t.sort_values(["arm", "method", "prompt"]).reset_index(drop=True) for t in tables), rtol=1e-4)


# --- files --------------------------------------------------------------------------------------------------------

def toy_kit(D=192, F=40, vocab=4096):
    judge = Judge(np.ones(vocab + BUCKETS), np.zeros((vocab + BUCKETS, 2)), np.array([-1.0, 1.0]), vocab)
    return Kit(2, 93.0, "additive", {m: 3.0 for m in METHODS}, ["numpy", "<b>bold</b>"], ["array shape", "graph node"], [direction(i, D, F) for i in range(2)], judge)


@pytest.fixture
def toy_run(results):
    "A run with what the app reads: a dictionary and a kit."
    node = open_node("13_train", {"run": "toy", "layer": 2})
    save_dictionary(node, create_dictionary(DictionaryConfig(d_model=192, n_features=40, k=4)))
    node.finish()
    node = open_node("35_steering", {"run": "toy"})
    write_kit(node, toy_kit())
    node.metrics({"strength": 3.0})
    node.finish()
    return results / "toy"


def test_kit_comes_back(toy_run):
    kit, back = toy_kit(), read_kit(Folder(toy_run / "35_steering", "make it"))
    assert back[:6] == kit[:6]
    for a, b in zip(kit.directions, back.directions): torch.testing.assert_close(tuple(a), tuple(b))
    np.testing.assert_allclose(back.judge([[1, 2, 3]]), kit.judge([[1, 2, 3]]))
    with open(toy_run / "35_steering" / "steering.safetensors", "r+b") as f: f.truncate(1000)
    with pytest.raises(UserError, match="changed or damaged.*`make it` makes it again"): read_kit(Folder(toy_run / "35_steering", "make it"))


def test_lm_eval_file_names_the_block(tmp_path):
    for architecture, hook in (("llama", "layers.2"), ("gpt2", "h.2")):
        assert write_lm_eval(tmp_path / "x.pt", tiny(architecture), 2, torch.ones(32), 1.5) == hook
        entry = torch.load(tmp_path / "x.pt", weights_only=True)[hook]
        assert (entry["action"], entry["bias"], entry["head_index"], entry["steering_coefficient"]) == ("add", None, None, 1.5)


def test_gguf_comes_back(tmp_path):
    import gguf
    write_gguf(tmp_path / "v.gguf", {3: torch.arange(4.0), 1: torch.ones(4)}, "gpt2")
    back = gguf.GGUFReader(tmp_path / "v.gguf")
    assert {t.name: t.data.tolist() for t in back.tensors} == {"direction.1": [1] * 4, "direction.3": [0, 1, 2, 3]}
    assert back.fields["general.architecture"].contents() == "controlvector" and back.fields["controlvector.model_hint"].contents() == "gpt2"


# --- the app ------------------------------------------------------------------------------------------------------

def test_app_is_served_on_loopback_only(capsys):
    assert "--Voila.ip=127.0.0.1" in app_command("steering", 8866, True)
    assert main(["app", "knitting"]) == 2 and "steering" in capsys.readouterr().err


def test_app_of_a_run_without_weights_says_what_makes_it(toy_run, capsys):
    "As a run that was committed without them; no server is started."
    (toy_run / "35_steering" / "steering.safetensors").unlink()
    assert main(["app", "steering", "--run", "toy", "--no-browser"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "has no 35_steering/steering.safetensors" in said and "`neurocodec run params/toy.yaml` makes it" in said


@needs_browser
def test_app_in_a_browser(toy_run, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select
    with open_app("steering", "toy", tmp_path) as (driver, wait, foreign):
        def columns(): return [x.text for x in driver.find_elements(By.CSS_SELECTOR, ".nc-column pre")]
        wait(lambda: len(columns()) == 2, "no two columns")
        plain, steered = columns()
        assert plain.startswith("Returns the") and steered.startswith("Returns the") and plain != steered
        assert "<b>bold</b>" in driver.find_element(By.CSS_SELECTOR, ".nc-column").text      # a theme's name is text, not markup

        def tables(): return [x.text for x in driver.find_elements(By.CSS_SELECTOR, ".nc-column table")]
        def heads(): return [x.text for x in driver.find_elements(By.CSS_SELECTOR, ".nc-column > b")]
        def choose(which, text): Select(driver.find_elements(By.CSS_SELECTOR, ".widget-dropdown select")[which]).select_by_visible_text(text)
        assert "features firing" in tables()[0]
        choose(0, "<b>bold</b>: graph node")
        wait(lambda: heads()[1].startswith("<b>bold</b>, additive"), "the other theme is not named")
        wait(lambda: columns()[0] == plain and columns()[1] not in ("", steered), "the other theme writes the same")
        second, read = columns()[1], tables()
        choose(1, "clamp")
        wait(lambda: ", clamp," in heads()[1] and columns()[1] != second, "another method writes the same")
        choose(1, "additive")
        wait(lambda: ", additive," in heads()[1] and columns()[1] == second and tables() == read, "the same request writes another text")
        seed = driver.find_element(By.CSS_SELECTOR, ".widget-text input[type=number]")
        seed.clear(); seed.send_keys("7" + Keys.TAB)
        wait(lambda: len(c := columns()) == 2 and c[0] != plain and c[1] != second and tables() != read, "another seed writes the same, or reads the same")

        box = driver.find_element(By.CSS_SELECTOR, ".widget-textarea textarea")
        box.clear(); box.send_keys(HOSTILE + Keys.TAB)
        wait(lambda: all(c.startswith(HOSTILE) for c in columns()), "the new opening was not continued")
        assert driver.title != "hacked" and not driver.find_elements(By.CSS_SELECTOR, ".nc-column img")

        readout = driver.find_element(By.CSS_SELECTOR, ".widget-slider .widget-readout")
        driver.execute_script("arguments[0].textContent = '0'", readout)
        readout.send_keys(Keys.ENTER)
        wait(lambda: len(c := columns()) == 2 and c[0] == c[1], "at strength 0 the columns differ")
        assert not foreign()
