"Labels: a server that fails in every way loses nothing and is paid once, a kill costs what was under way, and contexts depend on nothing but the activations."
import hashlib
import json
import multiprocessing
import os
import re
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import papermill
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import ROOT, model_and_text
from neurocodec.book import cli
from neurocodec.core.engine import jobs, what_failed
from neurocodec.core.lm import load_tokenizer
from neurocodec.core.run import UserError, read_params, resolve, write_json
from neurocodec.core.text import Packed, pack
from neurocodec.decoder import labels as L
from neurocodec.sae.activations import kept_tokens
from neurocodec.sae.dictionary import DictionaryConfig, create_dictionary


class Handler(BaseHTTPRequestHandler):
    "Answers each prompt as its plan says; a plan is a list of behaviours, the last of which stays."
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass

    def do_POST(self):
        s, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with s.lock:
            s.seen[prompt] += 1
            s.headers.append(dict(self.headers))
            s.keys.setdefault(prompt, []).append(self.headers["Idempotency-Key"])
            plan = s.plan(prompt)
            what = plan[min(s.seen[prompt], len(plan)) - 1]
            s.times.append((time.monotonic(), what))
        if what in ("drop", "lost"):   # lost: the answer was worked out, and paid for, before the line broke
            if what == "lost":
                with s.lock: s.paid[prompt] += 1
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if what == "slow": time.sleep(s.delay)
        status = what if isinstance(what, int) else 200
        text = {"nonsense": "I'd rather not.", "empty": ""}.get(what, "\n".join(f"{f}: label of {f}" for f in re.findall(r"^Feature (\d+)$", prompt, re.M)))
        out = b"{]" if what == "garbage" else json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "length" if what == "cut" else "stop"}]}).encode()
        try:
            self.send_response(status)
            if status == 429: self.send_header("Retry-After", f"{s.pause}")
            self.send_header("Content-Length", str(len(out)))
            self.end_headers()
            self.wfile.write(out)
            if status == 200:
                with s.lock: s.paid[prompt] += 1
        except (BrokenPipeError, ConnectionResetError): pass


@pytest.fixture
def server(monkeypatch):
    for k in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(k, raising=False)
    s = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.daemon_threads, s.lock = True, threading.Lock()
    s.seen, s.paid, s.headers, s.keys, s.times, s.delay, s.pause, s.plan = Counter(), Counter(), [], {}, [], 1.5, .3, lambda p: ["good"]
    s.url = f"http://127.0.0.1:{s.server_port}/v1"
    threading.Thread(target=s.serve_forever, args=(.05,), daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


def some_contexts(F):
    return {"tokens_FCW": np.zeros((F, 3, 32), np.int32), "acts_FCW": np.ones((F, 3, 32), np.float16), "max_F": np.ones(F)}


def test_a_server_that_fails_in_every_way_loses_nothing_and_is_paid_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-this-test")
    plans = {0: ["good"], 10: ["nonsense"], 20: [500, 503, "good"], 30: [429, "good"], 40: ["drop", "good"], 50: ["slow", "good"],
             60: ["garbage"], 70: ["cut"], 80: [400], 90: [500]}
    server.plan = lambda p: plans[int(re.search(r"^Feature (\d+)$", p, re.M)[1])]
    chat = L.Server("m", server.url, tries=3, wait=.02, timeout=.7, workers=4)
    features = np.arange(100)
    got = L.chat_labels(chat, features, some_contexts(100), ["x"], 10, tmp_path)
    assert sorted(got) == list(range(100)), "every feature has an outcome"
    named = {f for f, (label, _) in got.items() if label}
    whole = {f for a in (0, 20, 30) for f in range(a, a + 10)} | set(range(70, 79))  # of a reply that was cut, the last line does not count
    assert named == whole and all(got[f] == (f"label of {f}", "") for f in whole)
    assert all(got[f][1] for f in set(range(100)) - whole), "every failure has a reason"
    assert "HTTP 400" in got[80][1] and "HTTP 500, 3 times" in got[90][1]
    assert "no answer within 0.7 s" in got[50][1] and tmp_path.name in got[10][1] and "connection lost" in got[40][1], "silence names the time, nonsense where it is kept"
    assert max(server.paid.values()) == 1, "nothing is asked for again while it may still be answered"
    time.sleep(server.delay)  # the late answer, which nobody waits for
    before = server.seen.copy()
    again = L.chat_labels(L.Server("m", server.url, tries=1, wait=.02, workers=4), features, some_contexts(100), ["x"], 10, tmp_path)
    new = server.seen - before
    assert sorted(int(re.search(r"^Feature (\d+)$", p, re.M)[1]) for p in new) == [40, 50, 80, 90], "only what was never answered is asked again"
    assert {f: x for f, x in again.items() if f < 40} == {f: x for f, x in got.items() if f < 40} and again[40] == ("label of 40", "") and again[50] == ("label of 50", "")
    assert all(len(set(keys)) == 1 for keys in server.keys.values()) and len({k for keys in server.keys.values() for k in keys}) == 10, "a prompt keeps its Idempotency-Key, over tries and runs"
    assert all(h["Authorization"] == "Bearer sk-secret-of-this-test" for h in server.headers)
    assert not any("secret" in p.read_text() for p in tmp_path.iterdir()), "the key is in no file"


def test_a_slow_server_is_asked_once_and_can_know_the_prompt_again(server, tmp_path):
    server.delay, server.plan = .8, lambda p: ["slow", "good"]
    chat = L.Server("m", server.url, tries=3, wait=.01, timeout=.2, workers=4)
    prompts = [f"Feature {i}" for i in range(4)]
    assert all(r.text is None and "per_prompt" in r.failure for r in L.ask(chat, prompts, tmp_path))
    assert set(server.seen.values()) == {1}
    L.ask(chat, prompts, tmp_path)
    assert all(len(keys) == 2 and len(set(keys)) == 1 for keys in server.keys.values()), "a server that keeps answers by key would charge once"


def test_what_was_lost_on_the_way_back_is_not_paid_twice(server, tmp_path):
    server.plan = lambda p: ["lost", "good"]
    chat = L.Server("m", server.url, tries=4, wait=.01, workers=1)
    assert "connection lost" in L.ask(chat, ["Feature 1"], tmp_path)[0].failure
    assert server.seen["Feature 1"] == server.paid["Feature 1"] == 1, "the question was out, so it is not asked again at once"
    assert L.ask(chat, ["Feature 1"], tmp_path)[0].text == "1: label of 1" and len(set(server.keys["Feature 1"])) == 1


@pytest.mark.parametrize("key", ["sk-SECRET123\n", "sk-SECRET123\r\n", "  sk-SECRET123"])
def test_white_space_around_a_key_is_no_part_of_it(server, key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert L.Server("m", server.url).send("Feature 1").text == "1: label of 1"
    assert server.headers[0]["Authorization"] == "Bearer sk-SECRET123"


@pytest.mark.parametrize("key", ["sk-SÉCRET", "sk-SEC\nRET", "sk-SEC RET"])
def test_what_is_no_key_is_one_line_without_it(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="characters that no key has") as e: L.Server("m", "http://127.0.0.1:9/v1")
    assert "SEC" not in str(e.value) and "\n" not in str(e.value)


def test_a_key_is_in_no_failure(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-SECRET123\n")
    for what in ("drop", 500, 400, "slow"):
        server.plan = lambda p, what=what: [what]
        assert "SECRET" not in L.Server("m", server.url, tries=2, wait=.01, timeout=.2).send(f"{what}").failure


def test_retry_after_holds_for_every_worker(server, tmp_path):
    server.pause, server.delay, server.plan = 2, .15, lambda p: [429, "slow"] if p.endswith("0") else ["slow"]
    chat = L.Server("m", server.url, tries=3, wait=.01, workers=2)
    replies = L.ask(chat, [f"prompt {i}" for i in range(12)], tmp_path)
    assert all(r.text is not None for r in replies)
    refused = next(t for t, what in server.times if what == 429)
    early = [t - refused for t, what in server.times if what != 429 and 0 < t - refused < 1.95]
    assert len(early) <= 3, early  # one request may have been under way, and a busy machine learns late that it was refused


def test_a_refused_key_stops_at_once(server, tmp_path):
    server.plan = lambda p: [401]
    with pytest.raises(UserError, match="HTTP 401; check"): L.ask(L.Server("m", server.url, workers=2), [str(i) for i in range(200)], tmp_path)
    assert sum(server.seen.values()) < 20


def work(url, folder):
    os.environ["NEUROCODEC_QUIET"] = "1"
    L.ask(L.Server("m", url, workers=2, wait=.01), [f"Feature {i}" for i in range(60)], folder)


def test_killed_and_started_again_only_what_was_under_way_is_asked_twice(server, tmp_path):
    server.delay, server.plan = .05, lambda p: ["slow"]
    p = multiprocessing.get_context("fork").Process(target=work, args=(server.url, tmp_path))
    p.start()
    while sum(server.paid.values()) < 15 and p.is_alive(): time.sleep(.01)
    p.kill()
    p.join()
    time.sleep(.2)
    kept = len(list(tmp_path.glob("*.json")))
    assert 10 <= kept < 60, kept
    replies = L.ask(L.Server("m", server.url, workers=2, wait=.01), [f"Feature {i}" for i in range(60)], tmp_path)
    assert [r.text for r in replies] == [f"{i}: label of {i}" for i in range(60)]
    assert sum(server.paid.values()) - 60 <= 3, "at most what was under way, and what was on its way to the disk"


def test_a_damaged_answer_on_the_disk_is_asked_for_again(server, tmp_path):
    chat = L.Server("m", server.url)
    L.ask(chat, ["Feature 1"], tmp_path)
    for content in ("", "{", "[]", '{"reply": 3, "cut": false}'):
        next(tmp_path.glob("*.json")).write_text(content)
        assert L.ask(chat, ["Feature 1"], tmp_path)[0].text == "1: label of 1"
    assert sum(server.paid.values()) == 5


def test_keys_do_not_travel_unencrypted(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with pytest.raises(UserError, match="unencrypted"): L.Server("m", "http://example.org/v1")
    assert L.Server("m", "https://example.org/v1") and L.Server("m", "http://127.0.0.1:9/v1")


def babbler(folder, room):
    "A folder with a local instruct model that talks nonsense."
    tokenizer = load_tokenizer("nano")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=room,
                                 bos_token_id=tokenizer.bos_token_id, eos_token_id=None)).save_pretrained(folder)
    return str(folder)


def test_the_chapter_takes_explanations_that_are_there_already(tmp_path):
    "They are judged by a model, and go out again in the same format."
    model = babbler(tmp_path / "instruct", 1024)
    L.write_explanations(tmp_path, "layers.3", {f: "in text about arrays" for f in range(0, 1900, 2)})
    knobs = {"labeller": f"delphi:{tmp_path}", "judge": f"local:{model}", "delphi": True, "judged": 3, "label_tokens": 4000, "score_tokens": 4000}
    out = tmp_path / "23_labels.ipynb"
    try: ran = papermill.execute_notebook(ROOT / "nbs" / out.name, out, knobs, kernel_name="python3", cwd=tmp_path, progress_bar=False, start_timeout=180)
    except papermill.PapermillExecutionError: pytest.fail(what_failed(out))
    said = "".join(o.get("text", "") for c in ran.cells for o in c.get("outputs", []))
    assert "to judge 3 of the labels" in said and " features, 950 explanations" in said


def test_a_local_model_whose_replies_are_nonsense_fails_and_is_counted(tmp_path):
    chat = L.Local(babbler(tmp_path / "instruct", 256), max_tokens=6)
    reply = chat.send("Feature 3\n- <<a>> b")
    assert isinstance(reply.text, str) and reply.cut
    assert "too long" in chat.send("word " * 400).failure
    got = L.chat_labels(chat, np.arange(2), some_contexts(2), ["x"], 1, tmp_path / "kept")
    assert sorted(got) == [0, 1] and all(label or why for label, why in got.values())


def firings_of(dense_NF):
    row, f = dense_NF.nonzero()
    return L.Firings(np.r_[0, np.bincount(row, minlength=len(dense_NF)).cumsum()], f.astype(np.int32), dense_NF[row, f].astype(np.float32), dense_NF.shape[1])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(8, 70))
def test_contexts_are_those_of_a_loop(seed, top, T):
    rng = np.random.default_rng(seed)
    text = Packed(*pack([rng.integers(2, 5, n).tolist() for n in rng.integers(1, 3 * T, 6)], T, 1), None)
    keep = kept_tokens(text.tokens_NT, text.doc_NT, 1)
    places = L.find_places(text, keep, 1)
    N = len(places.row_n)
    acts = np.where(rng.random((N, 3)) < .3, rng.integers(1, 6, (N, 3)) / 4, 0)
    fired = firings_of(acts)
    out = L.contexts(fired, places, top=top, intervals=2, each=2, sample=8, bins=5, block=int(rng.integers(1, 4)))
    for k, v in L.contexts(fired, places, top=top, intervals=2, each=2, sample=8, bins=5, block=100).items(): assert np.array_equal(out[k], v), k
    for f in range(3):
        assert out["count_F"][f] == (acts[:, f] > 0).sum() and out["hist_FH"][f].sum() == out["count_F"][f]
        peak = {}
        for n in np.flatnonzero(acts[:, f]):
            if acts[n, f] > peak.get(places.window_n[n], (0, 0))[0]: peak[places.window_n[n]] = (acts[n, f], n)
        distinct = {}
        for v, n in sorted(peak.values(), key=lambda x: (-x[0], x[1])): distinct.setdefault(tuple(places.around(np.array([n]))[0][0]), v)
        mine = out["kind_FC"][f] == 0
        got = np.take_along_axis(out["acts_FCW"][f], out["place_FC"][f][:, None].astype(int), 1)[mine, 0]
        assert got.tolist() == sorted(distinct.values(), reverse=True)[:top]
        for s in np.flatnonzero(out["kind_FC"][f] != 255):
            tokens, d = out["tokens_FCW"][f, s], out["doc_FC"][f, s]
            assert 1 not in tokens[tokens >= 0] and d >= 0 and tokens[out["place_FC"][f, s]] >= 0
            assert (out["acts_FCW"][f, s][tokens < 0] == 0).all() and out["acts_FCW"][f, s, out["place_FC"][f, s]] > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_pass_does_not_depend_on_the_batch(kind, tmp_path):
    lm, text = model_and_text(kind, (5, 40, 17, 33), 24)
    d = create_dictionary(DictionaryConfig(d_model=lm.d_model, n_features=32, k=4), lm.residual(text.tokens_NT, 1).flatten(0, 1))
    places = L.find_places(text, kept_tokens(text.tokens_NT, text.doc_NT, 1), 1)
    got = []
    for batch in (1, 3, 50):
        (tmp_path / str(batch)).mkdir()
        fired = L.read_firings(lm, {"sae": d}, text, 1, tmp_path / str(batch), batch=batch)["sae"]
        got.append(L.contexts(fired, places, top=3))
    for other in got[1:]:
        assert np.array_equal(got[0]["count_F"], other["count_F"]) and np.array_equal(got[0]["tokens_FCW"], other["tokens_FCW"])
        assert np.allclose(got[0]["acts_FCW"], other["acts_FCW"], atol=1e-2)


def test_nothing_to_label_is_no_crash(tmp_path):
    text = Packed(torch.tensor([[1, 5, 6]]), torch.zeros(1, 3, dtype=torch.int32), None)
    places = L.find_places(text, kept_tokens(text.tokens_NT, text.doc_NT, 1), 1)
    silent = firings_of(np.zeros((2, 4)))
    c = L.contexts(silent, places)
    assert (c["kind_FC"] == 255).all() and (c["tokens_FCW"] == -1).all() and c["seen"][0] == 2
    sample = L.make_sample(silent, places, L.aspects(places, ["x"] * 9, {}, []))
    rules = L.choose_rules(sample)
    s = L.score_rules(lambda g: rules.words(g, sample), sample)
    made = L.make_labels(lambda f: (rules.sentence(f, sample), "never active"), "symbolic", s, 4)
    assert all(x.label is None and not x.confident and x.failure for x in made)
    assert np.isnan(L.summary(s)["share"].value)


def test_a_deranged_label_is_never_ones_own():
    for n in range(1, 9):
        for row in L.swapped(np.arange(n)): assert (row != np.arange(n)).all()
    counts = np.random.default_rng(0).integers(0, 50, 500)
    groups = L.groups_of(counts)
    assert sorted(np.concatenate(groups)) == np.flatnonzero(counts).tolist()
    assert all(counts[a].max() <= counts[b].min() for a, b in zip(groups, groups[1:]))


def planted_sample(W, F, seed=0):
    g = np.random.default_rng(seed)
    places = L.Places(g.integers(3, 20, (W, 33)), np.arange(W)[:, None].repeat(33, 1), np.repeat(np.arange(W), 32), np.tile(np.arange(1, 33), W),
                      np.zeros(W * 32, int), np.full(W * 32, 33), np.repeat(np.arange(W), 32), np.tile(np.arange(32), W))
    return L.make_sample(firings_of((g.random((W * 32, F)) < .02).astype(float)), places, L.aspects(places, [chr(97 + i) for i in range(20)], {}, []))


def test_labels_of_noise_are_confident_as_rarely_as_deranged_ones():
    learnt, unseen = planted_sample(300, 288), planted_sample(300, 288, 1)
    rules = L.choose_rules(learnt)
    share = L.summary(L.score_rules(lambda g: rules.words(g, unseen), unseen))["share"]
    assert share.value < .1, share  # one in twenty, give or take


def test_rules_depend_neither_on_blocks_nor_on_threads():
    sample = planted_sample(60, 40)
    one = L.choose_rules(sample, block=40)
    threads = torch.get_num_threads()
    for block in (7, 13):
        torch.set_num_threads(1 if block == 7 else 2)
        for a, b in zip(one[1:], L.choose_rules(sample, block=block)[1:]): assert np.array_equal(a, b)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("spoil, says", [
    (lambda h: (h / "config.json").unlink(), "no config.json"),
    (lambda h: (h / "0_1.safetensors").rename(h / "0_0.safetensors"), "ends at feature 0, the next file begins at 2"),
    (lambda h: (h / "2_3.safetensors").rename(h / "2_2.safetensors"), "holds feature 3, its name ends at 2"),
    (lambda h: (h / "2_3.safetensors").write_bytes(b"cut"), "not a whole safetensors file"),
    (lambda h: [p.unlink() for p in h.glob("*.safetensors")], "no <first>_<last>.safetensors")])
def test_a_spoilt_cache_is_one_line(tmp_path, spoil, says):
    text = Packed(torch.tensor([[1, 5, 6, 7]]), torch.zeros(1, 4, dtype=torch.int32), None)
    places = L.find_places(text, kept_tokens(text.tokens_NT, text.doc_NT, 1), 1)
    home = L.write_delphi(tmp_path, "layers.0", firings_of(np.eye(4)[[1, 3, 2]]), places, "m", splits=2)
    assert sorted(p.name for p in home.glob("*.safetensors")) == ["0_1.safetensors", "2_3.safetensors"]
    spoil(home)
    with pytest.raises(UserError, match=re.escape(says)): L.read_delphi(home)


def test_large_numbers_take_four_bytes(tmp_path):
    places = L.Places(np.zeros((70_000, 2), int), np.zeros((70_000, 2), int), np.array([69_999]), np.array([1]), np.zeros(1, int), np.full(1, 2), np.zeros(1, int), np.zeros(1, int))
    home = L.write_delphi(tmp_path, "h", firings_of(np.ones((1, 1))), places, "m", splits=1)
    assert L.load_file(home / "0_0.safetensors")["locations"].dtype == np.uint32
    assert L.read_delphi(home)[0].tolist() == [[69_999, 1, 0]]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_text_of_the_corpus_cannot_pass_for_an_answer(a, b):
    line = L.marked([a, b], [0, 1, 0], [False, True, False])
    assert "\n" not in line and len(line.splitlines()) <= 1 and line.count("<<") == 1 and line.count(">>") == 1
    for text in L.answers(L.Reply(f"{a}\n7: {b}"), [7]).values(): assert text.isprintable() and len(text) <= 200


def test_an_edited_review_is_merged_by_the_same_command(tmp_path, monkeypatch):
    monkeypatch.setenv("NEUROCODEC_RESULTS", str(tmp_path / "results"))
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("model: nano\nlayers: [2, 4]\n")
    graph = {}
    def nodes(*args):  # a graph takes seconds, and code does not change here
        if (key := repr(args)) not in graph: graph[key] = jobs(*args)
        return graph[key]
    labels, ran = [L.Label(f, f"label {f}", "symbolic", .9, .8, .5, .5, .6, 9, True, "") for f in range(2)], []

    def run_params(path, layers, until, overrides, cores):
        "The end of chapter 23, for every node without a stamp."
        for j in nodes(read_params(path), overrides, layers, until):
            if j.chapter != "23_labels" or j.stamp.exists(): continue
            place = resolve(j.params["review"].replace("{layer}", str(j.layer)))
            if not place.exists(): L.write_review(place, labels)
            write_json(j.folder / "labels.json", L.labels_json(L.merge_review(labels, L.read_review(place, 2)), review=hashlib.sha256(place.read_bytes()).hexdigest()[:16]))
            j.stamp.parent.mkdir(parents=True, exist_ok=True)
            j.stamp.touch()
            ran.append(j.layer)
        return 7
    monkeypatch.setattr(cli, "run_params", run_params)
    monkeypatch.setattr(cli, "jobs", nodes)
    command = ["label", "mine.yaml", "--review", "L{layer}.csv"]
    for _ in range(2): assert cli.main(command) == 7
    assert ran == [2, 4], "nothing was edited, nothing is made again"
    L.write_review(tmp_path / "L4.csv", labels, {1: ("edit", "a reader's own")})
    for _ in range(2): assert cli.main(command) == 7
    merged = [L.read_labels(json.loads((tmp_path / f"results/mine/L{k}/23_labels/labels.json").read_text())) for k in (2, 4)]
    assert ran == [2, 4, 4] and merged[0] == labels and merged[1][1].label == "a reader's own" and merged[1][0] == labels[0]
    Path("L2.csv").unlink()
    assert cli.main(command) == 7 and ran[3:] == [2] and Path("L2.csv").exists(), "a file that is gone is made again"
    assert cli.main(["label", "mine.yaml", "--review", "one.csv"]) == 2 and cli.main(["label", "mine.yaml", "--review", "one.csv", "--layer", "4"]) == 7


def test_file_of_the_package_is_named_as_delphi_does(tmp_path):
    L.write_explanations(tmp_path, "layers.1.mlp", {12: "x"})
    assert json.loads((Path(tmp_path) / "explanations" / "layers.1.mlp_latent12.txt").read_text()) == "x"
