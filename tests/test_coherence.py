"What a text is told from: the brief's rule against its wording, loops against brute force, surprise against batching and interventions."
import math
import time
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neurocodec.core.coherence import Coherence, coherence, collapsed, compression, describe, distinct, last_loop, legacy_collapsed, loop_share, nats, share, untouched
from neurocodec.core.lm import Intervention, tiny
from neurocodec.core.run import UserError

LETTERS = st.text(alphabet="ab '!?.\n1é’※", max_size=60)


def by_wording(text):
    "The rule of 2Smol-Interpretability in whole numbers, one clause after the other, as the description has it."
    if not isinstance(text, str): return True
    text = text.strip()
    n = len(text)
    if n < 6: return True
    if 10 * Counter(text).most_common(1)[0][1] >= 9 * n: return True
    for length in (2, 3, 4, 5, 6, 7):
        if 2 * length > n: continue
        seen = {}
        for i in range(n - length + 1): seen[text[i:i + length]] = seen.get(text[i:i + length], 0) + 1
        if any(m > 1 and 10 * m * length >= 7 * n for m in seen.values()): return True
    spoken, other = sum(c.isalnum() for c in text), sum(not c.isalnum() and not c.isspace() for c in text)
    return 10 * spoken < n and 10 * other > 8 * n


@settings(max_examples=400, deadline=None)
@given(st.one_of(LETTERS, st.text(max_size=40), st.builds(lambda a, b, k: a + b * k, LETTERS, st.text(min_size=1, max_size=9), st.integers(0, 12))))
@example("kkkkkkkkka")
@example("ab1ab2ab3ab4ab5ab6ab")
@example("!?#%&*+ <")
def test_legacy_rule_is_its_wording(text):
    assert legacy_collapsed(text) is by_wording(text)
    assert legacy_collapsed(f" \n{text}\t ") is by_wording(text)


@pytest.mark.parametrize("value", [None, math.nan, 7, [], b"bytes of text"])
def test_legacy_rule_takes_anything(value): assert legacy_collapsed(value) is True


@pytest.mark.parametrize("share_of_top, want", [(8, False), (9, True)])
def test_legacy_threshold_of_one_character_is_exact(share_of_top, want):
    "Nine of ten, of twenty, of thirty: equality counts, in floating point as well. The other characters differ, so no substring repeats beyond it."
    for n in (10, 20, 30, 70, 110):
        text = "".join("k" if i % 10 < share_of_top else chr(0x4E00 + i) for i in range(n))
        top = Counter(text).most_common(1)[0][1] / n
        assert (top >= .9) is want
        if want: assert legacy_collapsed(text)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab", max_size=26), st.integers(2, 4))
def test_loops_are_the_definition(s, least):
    fits = [m for p in range(1, len(s)) for m in range(least * p, len(s) + 1) if all(s[i] == s[i + p] for i in range(len(s) - m, len(s) - p))]
    loop = last_loop(s, least)
    assert loop.length == max(fits, default=0)
    if loop.length: assert loop.length >= least * loop.period and s[len(s) - loop.length:len(s) - loop.period] == s[len(s) - loop.length + loop.period:]


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=40), st.integers(2, 6), st.text(max_size=30))
def test_planted_loops_of_any_period_are_found(piece, times, before):
    text = before + piece * times
    assert loop_share(text) >= len(piece) * times / len(text)
    assert loop_share([ord(c) for c in text]) == loop_share(text) == loop_share(torch.tensor([ord(c) for c in text]))
    if len(before) <= len(piece) * times: assert collapsed(text)


def test_long_texts_take_no_time():
    "Linear: the worst cases of a quadratic search, a million characters together."
    start = time.process_time()
    for text in ("a" * 250_000, "ab" * 125_000, "a" * 249_999 + "b", ("a" * 499 + "b") * 500): last_loop(text)
    assert time.process_time() - start < 5


@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 4))
def test_distinct(tokens, n):
    got = distinct(tokens, n)
    assert math.isnan(got) if len(tokens) < n else 0 < got <= 1
    assert math.isnan(got) or distinct(torch.tensor(tokens), n) == got


def test_measures_without_a_text():
    c = describe("")
    assert (c.legacy, c.collapsed, c.loop_share, c.period, c.n_tokens) == (True, True, 0, 0, 0) and all(map(math.isnan, (c.distinct1, c.compression, c.nats)))
    assert compression("\ud800 lone surrogate") > 0
    assert share(0, 0).n == 0 and math.isnan(share(0, 0).value)
    with pytest.raises(UserError, match="at least 2"): last_loop("abab", 1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_surprise_does_not_depend_on_the_batch(architecture):
    "Alone, in a batch, padded on either side, in blocks of any size, under an intervention: the same number."
    lm, g = tiny(architecture), torch.Generator().manual_seed(1)
    rows, starts = [torch.randint(3, 96, (n,), generator=g).tolist() for n in (5, 9, 12)], [2, 4, 1]
    alone = torch.cat([nats(lm, [r], [s]) for r, s in zip(rows, starts)])
    for left in (False, True):
        pad = [[0] * (12 - len(r)) for r in rows]
        t, m = ([p + r if left else r + p for p, r in zip(pad, rows)], [[0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p) for p, r in zip(pad, rows)])
        at = [s + len(p) * left for s, p in zip(starts, pad)]
        for batch in (1, 2, 32):
            with lm.intervene(Intervention("blocks.0.hook_resid_post", "ablate")): got = nats(lm, t, at, m, batch)
            torch.testing.assert_close(got, alone, atol=1e-4, rtol=1e-4)
            assert lm.active == []


def test_interventions_come_back():
    lm = tiny("llama")
    with lm.intervene(Intervention("blocks.0.hook_resid_post", "ablate")):
        with pytest.raises(ZeroDivisionError), untouched(lm): raise ZeroDivisionError
        assert len(lm.active) == 1


def test_texts_need_a_tokenizer_and_a_prompt_each():
    lm = tiny("gpt2")
    with pytest.raises(UserError, match="without a tokenizer"): coherence(lm, [[5]], [[6]])
    class Names:
        def decode(self, ids, skip_special_tokens): return " ".join(map(str, ids))
    lm.tokenizer = Names()
    with pytest.raises(UserError, match="2 prompts and 1 texts"): coherence(lm, [[5], [6]], [[6]])
    assert coherence(lm, [], []) == []
    got = coherence(lm, [[], [5]], torch.tensor([[7, 8, 9], [7, 8, 2]]))
    assert [c.text for c in got] == ["7 8 9", "7 8"] and not math.isnan(got[0].nats) and isinstance(got[0], Coherence)
