"The model wrapper under fire: architectures it was not written for, random interventions, hostile folders, exceptions anywhere."
import json
import shutil
import socket
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from neurocodec.core.lm import LM, OPS, Intervention, find_model, hook_count, tiny
from neurocodec.core.run import UserError

torch.set_num_threads(1)
KNOWN = ["gpt2", "llama", "gpt_neox", "gemma2", "qwen2"]
OTHERS = {  # blocks that return tuples, parallel blocks, norms in other places, no positions at all
    "gptj": dict(n_positions=64, rotary_dim=4, n_inner=48), "bloom": {}, "falcon": dict(new_decoder_architecture=False, parallel_attn=True),
    "phi": dict(partial_rotary_factor=.5), "olmo2": {}, "gpt_neo": dict(attention_types=[[["global", "local", "global"], 1]], window_size=5, num_layers=3, num_heads=4),
    "stablelm": dict(num_key_value_heads=2), "qwen3": dict(head_dim=12, num_key_value_heads=2), "phi3": dict(num_key_value_heads=2),
}
specimens = {}


def specimen(name):
    if name not in specimens: specimens[name] = tiny(name, **OTHERS.get(name, {}))
    return specimens[name]


def tokens(shape, seed=0): return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(lengths, seed=0):
    T = max(lengths)
    mask = torch.tensor([[0] * (T - n) + [1] * n for n in lengths])
    return tokens((len(lengths), T), seed) * mask, mask


@pytest.mark.parametrize("name", OTHERS)
def test_architectures_that_were_not_looked_at(name):
    lm, (x, mask) = specimen(name), left_padded((9, 4, 7))
    whole = lm.logits(x, mask)
    for l in range(lm.n_layers):
        h = lm.residual(x, l, mask)
        assert (lm.from_layer(h, l, mask) - whole)[mask.bool()].abs().max() < 1e-4
    assert (lm.unembed(lm.residual(x, lm.n_layers - 1, mask)) - whole)[mask.bool()].abs().max() < 1e-4
    got = lm.capture(x, list(lm.sites), mask)
    p = "blocks.1."
    assert {p + "hook_attn_out", p + "hook_mlp_out", p + "mlp.hook_post", p + "attn.hook_z"} <= set(got)
    made = got[p + "hook_resid_pre"] + got[p + "hook_attn_out"]
    if p + "hook_resid_mid" in got: assert torch.allclose(got[p + "hook_resid_mid"], made, atol=1e-4)
    assert torch.allclose(got[p + "hook_resid_post"], made + got[p + "hook_mlp_out"], atol=1e-4)
    push = [Intervention("blocks.1.hook_resid_post", "add", 2., [2, 10]), Intervention("blocks.0.mlp.hook_post", "scale", -1.)]
    with lm.intervene(push):
        a, b = (lm.generate(x, 5, .9, attention_mask=mask, seed=3, stop=False, use_cache=c) for c in (True, False))
    assert torch.equal(a, b) and not torch.equal(a, lm.generate(x, 5, .9, attention_mask=mask, seed=3, stop=False))
    assert hook_count(lm.model) == 0


positions = st.one_of(st.none(), st.integers(0, 12), st.lists(st.integers(0, 12), min_size=1, max_size=4, unique=True),
                      st.builds(slice, st.integers(0, 8), st.one_of(st.none(), st.integers(1, 14)), st.integers(1, 3)))
push = st.tuples(st.sampled_from(["blocks.0.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post", "blocks.2.hook_attn_out", "blocks.0.mlp.hook_post",
                                  "blocks.2.hook_mlp_out", "hook_embed", "blocks.1.attn.hook_z"]), st.sampled_from(OPS), positions, st.sampled_from(["number", "vector", "row"]))


def build(lm, hook, op, where, kind, B):
    "An intervention of this shape, with a value that is not small."
    shape = {"mlp": (lm.d_mlp,), "attn": (lm.n_heads, lm.d_model // lm.n_heads)}.get(hook.split(".")[-2] if "." in hook else "", (lm.d_model,))
    if op == "splice": return Intervention(hook, op, lambda rows: rows.flip(-1) * 1.5, where)
    g = torch.Generator().manual_seed(len(hook))
    value = 1.5 if kind == "number" else torch.randn(shape if kind == "vector" else (B, 1, *shape), generator=g) * 2
    return Intervention(hook, op, value, where)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(name=st.sampled_from(["gpt2", "llama", "gpt_neox", "qwen2"]), pushes=st.lists(push, min_size=1, max_size=3))
def test_any_interventions_mean_the_same_with_a_cache_without_and_by_hand(name, pushes):
    lm, (x, mask) = specimen(name), left_padded((6, 3), 1)
    todo = [build(lm, *p, 2) for p in pushes if p[0] in lm.sites]
    with lm.intervene(todo):
        cached = lm.generate(x, 8, .7, attention_mask=mask, seed=1, stop=False)
        assert torch.equal(cached, lm.generate(x, 8, .7, attention_mask=mask, seed=1, stop=False, use_cache=False))
        whole = lm.logits(x, mask)
        for l in range(3): assert torch.allclose(lm.from_layer(lm.residual(x, l, mask), l, mask)[mask.bool()], whole[mask.bool()], atol=1e-3, rtol=1e-3)
    assert hook_count(lm.model) == 0 and lm.active == []


@settings(max_examples=20, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), name=st.sampled_from(KNOWN))
def test_padding_changes_nothing(lengths, name):
    lm, (x, mask) = specimen(name), left_padded(lengths, 2)
    batch = lm.generate(x, 4, .8, attention_mask=mask, seed=7, stop=False)
    h = lm.residual(x, 1, mask)
    for r, n in enumerate(lengths):
        alone = x[r : r + 1, -n:]
        assert torch.allclose(h[r, -n:], lm.residual(alone, 1)[0], atol=1e-4)
        assert batch[r, -n - 4 :].tolist() == lm.generate(alone, 4, .8, seed=7 + r, stop=False)[0].tolist()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError, StopIteration])
@pytest.mark.parametrize("hook", ["hook_embed", "blocks.1.hook_resid_mid", "blocks.2.hook_mlp_out"])
def test_any_exception_anywhere_leaves_the_model_as_it_was(error, hook):
    lm, x = specimen("llama"), tokens((2, 6))
    clean = lm.logits(x)

    def fails(rows): raise error

    for action in (lambda: lm.logits(x), lambda: lm.capture(x, ["blocks.2.hook_resid_post"]), lambda: lm.generate(x, 3),
                   lambda: lm.from_layer(lm.residual(x, 0), 0) if hook != "hook_embed" else lm.logits(x)):
        with pytest.raises((error, RuntimeError)), lm.intervene([Intervention("blocks.0.hook_resid_post", "add", 1.), Intervention(hook, "splice", fails)]): action()
        assert hook_count(lm.model) == 0 and lm.active == [] and not any("forward" in b.__dict__ for b in lm.blocks)
    assert torch.equal(lm.logits(x), clean)


@pytest.mark.parametrize("hook", ["blocks.0.attn.hook_z", "blocks.1.hook_resid_mid", "blocks.1.mlp.hook_post", "blocks.0.hook_resid_pre"])
def test_gradients_reach_every_kind_of_point(hook):
    "The derivative that autograd reports is the one that finite differences see."
    lm, x = tiny("gpt2"), tokens((1, 5))
    lm.model.double()
    lm.dtype = torch.float64
    value = lm.capture(x, [hook])[hook].clone().requires_grad_()

    def score(v):
        with lm.intervene(Intervention(hook, "splice", lambda rows: v.reshape(rows.shape))): return lm.logits(x)[0, -1, 7]

    (g,) = torch.autograd.grad(score(value), value)
    d = torch.randn_like(value)
    with torch.no_grad(): slope = (score(value + 1e-5 * d) - score(value - 1e-5 * d)) / 2e-5
    assert abs((g * d).sum() - slope) < 1e-5 * max(1, abs(slope)) and slope.abs() > 1e-6


def test_a_trainable_splice_gets_gradients_and_the_model_none():
    lm, x = specimen("llama"), tokens((2, 6))
    layer = torch.nn.Linear(32, 32)
    with lm.intervene(Intervention("blocks.1.hook_resid_mid", "splice", layer)): lm.logits(x).logsumexp(-1).mean().backward()
    assert layer.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in lm.model.parameters()) and not lm.logits(x).requires_grad


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny("llama").model.save_pretrained(folder)
    return folder


def test_code_in_a_model_folder_is_never_run(saved, tmp_path):
    folder, mark = tmp_path / "hostile", tmp_path / "ran"
    shutil.copytree(saved, folder)
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n")
    config = json.loads((folder / "config.json").read_text())
    for kind in ("llama", "unheard_of"):
        (folder / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}))
        try: LM.load(str(folder))
        except UserError: pass
        assert not mark.exists()


@pytest.mark.parametrize("data", [b"", b"\x00" * 8, b"\xff" * 64, b"not weights at all, but long enough to have a header", None])
def test_weights_that_are_no_weights(saved, tmp_path, data):
    folder = tmp_path / "bad"
    shutil.copytree(saved, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if data is None else data)
    with pytest.raises(UserError) as e: LM.load(str(folder))
    assert "\n" not in str(e.value) and str(folder) in str(e.value)


def test_without_a_network_a_hub_id_is_one_quick_line(monkeypatch, tmp_path):
    for k in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    def unknown(*_, **__): raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)  # how long a name server is silent depends on the machine
    start = time.perf_counter()
    with pytest.raises(UserError, match="no-such-owner/no-such-model"): LM.load("no-such-owner/no-such-model")
    assert time.perf_counter() - start < 20
    assert find_model("random:gpt2").fresh


def test_spread_over_devices_by_accelerate(saved):
    "Accelerate replaces every module's forward by one that fetches weights; cutting must put exactly that back."
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    plain, x = LM.load(str(saved)), tokens((2, 6))
    model = LM.load(str(saved), device_map="auto").model
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    lm = LM(model, name="spread")
    for b in lm.blocks: add_hook_to_module(b, AlignDevicesHook(execution_device=torch.device("cpu"), io_same_device=True))
    before = [b.__dict__["forward"] for b in lm.blocks]
    push = Intervention("blocks.1.hook_resid_post", "add", 1., [3])
    with lm.intervene(push), plain.intervene(push):
        assert torch.equal(lm.logits(x), plain.logits(x))
        assert torch.equal(lm.from_layer(lm.residual(x, 0), 0), plain.logits(x))
    assert [b.__dict__["forward"] for b in lm.blocks] == before


def test_half_precision_reads_and_cuts(saved):
    lm, half, x = LM.load(str(saved)), LM.load(str(saved), dtype="bfloat16"), tokens((2, 6))
    assert half.residual(x, 1).dtype == torch.bfloat16 and {s.split(".", 2)[-1] for s in half.sites} == {s.split(".", 2)[-1] for s in lm.sites}
    assert torch.equal(half.from_layer(half.residual(x, 0), 0), half.logits(x))
    assert (half.logits(x).float() - lm.logits(x)).abs().max() < .1 * lm.logits(x).abs().max()


def test_encoders_are_read_and_nothing_else(tmp_path):
    bert = tiny("bert")
    x = tokens((2, 8))
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    assert torch.allclose(bert.residual(x, 1, mask)[1, :5], bert.residual(x[1:, :5], 1)[0], atol=1e-5)
    plain = AutoModel.from_config(bert.model.config, add_pooling_layer=False)
    plain.save_pretrained(tmp_path / "bert")  # without its pooling head, as masked language models are stored
    lm = LM.load(str(tmp_path / "bert"))
    assert torch.allclose(lm.residual(x, 2), plain.eval()(x).last_hidden_state, atol=1e-5)
    for action in (lambda: lm.logits(x), lambda: lm.from_layer(lm.residual(x, 0), 0), lambda: lm.generate(x), lambda: lm.unembed(torch.zeros(1, 32))):
        with pytest.raises(UserError, match="encoder"): action()


def test_text_begins_as_the_model_was_taught(saved):
    assert LM.load("nano").encode(["a"])[0][0, 0] == 0 and LM.load(str(saved)).opening is None
