"Foreign files: published shapes go through, wrong files end in one line, nothing in them is run, and what is written is what the formats ask for."
import json

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from neurocodec.core.run import UserError
from neurocodec.sae import formats
from neurocodec.sae.dictionary import DictionaryConfig, create_dictionary, save_dictionary
from neurocodec.sae.formats import FORMATS, Foreign, convert, fold, own_formula, read_dictionary, write_saelens, write_sparsify


def uniform(*shape, seed=0, low=-1.0, high=1.0):
    return torch.empty(*shape).uniform_(low, high, generator=torch.Generator().manual_seed(seed))


def made(kind, d=6, f=20, k=4, seed=0, batchtopk_threshold=.3):
    "A dictionary with no zeros anywhere, as after training."
    out = create_dictionary(DictionaryConfig(kind, d, f, k), seed=seed)
    with torch.no_grad():
        out.b_enc.copy_(uniform(f, seed=seed + 1) * .2)
        if kind == "jumprelu": out.threshold_F.copy_(uniform(f, seed=seed + 2).abs())
        if kind == "batchtopk": out.threshold.fill_(batchtopk_threshold)
        if kind == "gated": out.r_mag_F.copy_(uniform(f, seed=seed + 3) * .3), out.b_mag_F.copy_(uniform(f, seed=seed + 4) * .2)
    return out


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if name.endswith(".json"): (folder / name).write_text(json.dumps(content))
        elif name.endswith(".npz"): np.savez(folder / name, **{k: v.numpy() for k, v in content.items()})
        elif name.endswith(".pt"): torch.save(content, folder / name)
        else: save_file({k: v.contiguous() for k, v in content.items()}, folder / name)
    return folder


def test_gemma_scope_2b_shapes(tmp_path):
    "2304 × 16384 as published: one npz, its sparsity in the path."
    d, f = 2304, 16384
    t = {"W_enc": uniform(d, f, seed=1) / d**.5, "W_dec": uniform(f, d, seed=2), "b_enc": uniform(f, seed=3) * .1, "b_dec": uniform(d, seed=4), "threshold": uniform(f, seed=5, low=1.2, high=1.6)}
    at = write(tmp_path / "layer_20" / "width_16k" / "average_l0_71", {"params.npz": t})
    got = read_dictionary(at)
    x = uniform(12, d, seed=6, low=-3, high=3)
    pre = x @ t["W_enc"] + t["b_enc"]
    acts = pre * (pre > t["threshold"])
    want = acts @ t["W_dec"] + t["b_dec"]
    worst = (got(x).detach() - want).abs().max(1).values / want.square().mean().sqrt()
    assert 0 < (acts > 0).sum(1).float().mean() < f / 4 and worst.median() < 1e-5, worst
    assert got.meta["layer"] == 20 and got.config.k == 71 and got.W_enc.shape == (f, d) and got.W_enc.is_contiguous()


def test_gpt2_small_res_jb_shapes(tmp_path):
    "768 × 24576 in SAELens' older dialect, its gain all ones."
    d, f = 768, 24576
    t = {"W_enc": uniform(d, f, seed=1) / d**.5, "W_dec": uniform(f, d, seed=2), "b_enc": uniform(f, seed=3) - 1.5, "b_dec": uniform(d, seed=4), "scaling_factor": torch.ones(f)}
    cfg = {"model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8, "hook_point_head_index": None, "d_in": d, "d_sae": f, "dtype": "torch.float32",
           "device": "mps", "normalize_activations": "none", "dataset_path": "Skylion007/openwebtext", "context_size": 128, "prepend_bos": True}
    got = read_dictionary(write(tmp_path / "blocks.8.hook_resid_pre", {"cfg.json": cfg, "sae_weights.safetensors": t}))
    x = uniform(12, d, seed=6, low=-3, high=3)
    acts = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    want = acts @ t["W_dec"] + t["b_dec"]
    assert 0 < (acts > 0).float().mean() < .25
    assert float((got(x).detach() - want).abs().max() / want.square().mean().sqrt()) < 1e-5
    assert (got.meta["model"], got.meta["layer"], got.config.kind) == ("gpt2-small", 8, "relu")


V6 = {"architecture": "standard", "apply_b_dec_to_input": True, "normalize_activations": "none", "metadata": {"sae_lens_version": "6.5.0"}}
TENSORS = {"W_enc": uniform(6, 20), "W_dec": uniform(20, 6, seed=1), "b_enc": uniform(20, seed=2), "b_dec": uniform(6, seed=3)}


def without(key): return {k: v for k, v in TENSORS.items() if k != key}


@pytest.mark.parametrize("files, says", [
    ({}, "found nothing; expected one of sae_weights.safetensors"),
    ({"cfg.json": V6}, "found cfg.json; expected one of"),
    ({"sae_weights.safetensors": TENSORS}, "cfg.json: no such file"),
    ({"cfg.json": V6, "sae_weights.safetensors": without("W_dec")}, "no tensor for W_dec; found W_enc 6×20, b_dec 6, b_enc 20; expected for relu: W_enc"),
    ({"cfg.json": V6 | {"architecture": "jumprelu"}, "sae_weights.safetensors": TENSORS}, "no tensor for threshold"),
    ({"cfg.json": V6 | {"architecture": "jumprelu"}, "sae_weights.safetensors": TENSORS | {"threshold": torch.ones(6)}}, "threshold does not have the right length"),
    ({"cfg.json": V6, "sae_weights.safetensors": TENSORS | {"W_dec": uniform(20, 7)}}, "W_dec is neither 20×6 nor 6×20"),
    ({"cfg.json": V6, "sae_weights.safetensors": TENSORS | {"b_dec": uniform(6, 6)}}, "biases are not vectors"),
    ({"cfg.json": V6, "sae_weights.safetensors": TENSORS | {"W_enc": TENSORS["W_enc"] / 0}}, "W_enc has values that are not finite"),
    ({"cfg.json": V6, "sae_weights.safetensors": TENSORS | {"finetuning_scaling_factor": torch.full((20,), 2.)}}, "does not say `finetuning_scaling_factor`"),
    ({"cfg.json": V6 | {"architecture": "jumprelu_transcoder"}, "sae_weights.safetensors": TENSORS}, "architecture 'jumprelu_transcoder': a transcoder"),
    ({"cfg.json": V6 | {"architecture": "topk", "k": 21}, "sae_weights.safetensors": TENSORS}, "k = 21, but there are 20 features"),
    ({"cfg.json": V6 | {"normalize_activations": "expected_average_only_in"}, "sae_weights.safetensors": TENSORS}, "give it as scale"),
    ({"cfg.json": {"k": 3, "activation": "groupmax"}, "sae.safetensors": TENSORS}, "activation = 'groupmax' has no counterpart"),
    ({"cfg.json": {"k": 3}, "sae.safetensors": TENSORS | {"W_skip": uniform(6, 6)}}, "what W_skip should do is not known"),
    ({"params.npz": TENSORS}, "no tensor for threshold"),
    ({"params.safetensors": TENSORS, "config.json": {"architecture": "relu"}}, "architecture 'relu', expected 'jump_relu'"),
    ({"ae.pt": [1, 2]}, "found a list, expected a state dict"),
    ({"ae.pt": TENSORS}, "config.json, which says whether"),
    ({"8.pt": {"pre_bias": TENSORS["b_dec"], "activation": "JumpReLU"}}, "activation JumpReLU"),
], ids=lambda v: None if isinstance(v, dict) else v[:30])
def test_wrong_file_is_one_line(tmp_path, files, says):
    at = write(tmp_path / "given", files)
    with pytest.raises(UserError) as e: read_dictionary(at)
    message = str(e.value)
    assert says in message and "\n" not in message and "given" in message, message


def test_damaged_files_are_one_line(tmp_path):
    whole = write(tmp_path / "a", {"cfg.json": V6, "sae_weights.safetensors": TENSORS, "params.npz": TENSORS, "ae.pt": TENSORS})
    for name in ("sae_weights.safetensors", "params.npz", "ae.pt", "cfg.json"):
        at = write(tmp_path / f"cut-{name}", {"cfg.json": V6} if name.startswith("sae") else {})
        (at / name).write_bytes((whole / name).read_bytes()[:-40])
        if name == "cfg.json": (at / "sae_weights.safetensors").write_bytes((whole / "sae_weights.safetensors").read_bytes())
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as e: read_dictionary(at)
        assert "\n" not in str(e.value)


class Trap:
    ran = False

    def __reduce__(self): return spring, ()


def spring(): Trap.ran = True


def test_code_in_files_is_not_run(tmp_path):
    at = write(tmp_path, {"ae.pt": {"W_enc": Trap()}})
    np.savez(at / "params.npz", W_enc=np.array([Trap()], dtype=object))
    for name in ("ae.pt", "params.npz"):
        with pytest.raises(UserError, match="plain"): read_dictionary(at / name)
    assert not Trap.ran
    go, args = Trap().__reduce__()
    go(*args)
    assert Trap.ran  # what an unguarded reader would have called


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(["topk", "batchtopk", "relu", "jumprelu", "gated"]), d=st.integers(2, 9), f=st.integers(1, 24), how=st.sampled_from(["", "", "layer_norm", "constant_norm"]),
       centred=st.booleans(), norms=st.booleans(), seed=st.integers(0, 2**30), data=st.data())
def test_any_shape_survives_folding_writing_and_reading(tmp_path_factory, kind, d, f, how, centred, norms, seed, data):
    "F below, at and above D, k up to F: the folded dictionary is the formula, and SAELens' files keep it to the bit."
    k = data.draw(st.integers(1, f))
    t = {"W_enc": uniform(f, d, seed=seed), "W_dec": uniform(f, d, seed=seed + 1) + .05, "b_enc": uniform(f, seed=seed + 2) * .3, "b_dec": uniform(d, seed=seed + 3)}
    t |= {"jumprelu": {"threshold": uniform(f, seed=seed + 4)}, "batchtopk": {"threshold": torch.tensor(.2)}, "gated": {"r_mag": uniform(f, seed=seed + 5), "b_mag": uniform(f, seed=seed + 6)}}.get(kind, {})
    foreign = Foreign(kind, **t, k=k, centred=centred, norms=norms, per_token=how)
    out, x = fold(foreign), uniform(40, d, seed=seed + 7, low=-2, high=3)
    got, want = out(x).detach().double(), own_formula(foreign, x.double())[1]
    assert ((got - want).abs().max(1).values / want.abs().max()).quantile(.9) < 1e-5
    at = tmp_path_factory.mktemp("out")
    write_saelens(at, out)
    again = read_dictionary(at)
    assert torch.equal(again(x), out(x))
    if d == f and kind == "topk" and not how:
        write_sparsify(at / "layers.0", out)
        assert torch.equal(read_dictionary(at / "layers.0")(x), out(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path, dtype):
    t = {k: v.to(dtype) for k, v in TENSORS.items()}
    got = read_dictionary(write(tmp_path, {"cfg.json": V6, "sae_weights.safetensors": t}))
    assert {p.dtype for p in got.parameters()} == {torch.float32}
    assert torch.equal(got.W_enc, t["W_enc"].T.float())


def test_per_token_normalisation_in_use(tmp_path):
    "Codes alone decode; gradients are those of the formula; a zero vector and an empty batch are harmless."
    foreign = Foreign("topk", TENSORS["W_enc"].T, TENSORS["W_dec"], TENSORS["b_enc"], TENSORS["b_dec"], k=4, per_token="layer_norm")
    d, x = fold(foreign), uniform(50, 6, low=-4, high=2).requires_grad_()
    codes = d.encode(x)
    assert codes.values_Bk.min() >= 0 and (codes.values_Bk.diff(dim=1) <= 0).all()
    torch.testing.assert_close(d.decode(codes), d(x))
    assert ((codes.values_Bk > 0) & (codes.indices_Bk >= 20)).sum(1).eq(2).all()  # two of the three carriers, always
    (ours,) = torch.autograd.grad(d(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(own_formula(foreign, x)[1].square().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert d(torch.zeros(2, 6)).isfinite().all() and d.encode(x[:0]).values_Bk.shape[0] == 0
    with pytest.raises(UserError, match="write_saelens"): save_dictionary(tmp_path, d)
    with pytest.raises(UserError, match="a per-token normalised topk"): write_sparsify(tmp_path, d)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, architecture, more", [
    ("relu", "standard", set()), ("topk", "topk", set()), ("jumprelu", "jumprelu", {"threshold"}), ("batchtopk", "jumprelu", {"threshold"}), ("gated", "gated", {"b_gate", "r_mag", "b_mag"})])
def test_saelens_layout(tmp_path, kind, architecture, more):
    "Names, shapes and keys that SAELens 6 reads."
    d = made(kind)
    d.meta = {"model": "gpt2", "hook": "blocks.3.hook_resid_post", "scale": 2.}
    write_saelens(tmp_path, d, {"context_size": 256}, torch.linspace(0, 1, 20))
    t, cfg = load_file(tmp_path / "sae_weights.safetensors"), json.loads((tmp_path / "cfg.json").read_text())
    assert set(t) == {"W_enc", "W_dec", "b_dec"} | ({"b_enc"} if kind != "gated" else set()) | more
    assert t["W_enc"].shape == (6, 20) and t["W_dec"].shape == (20, 6) and {v.dtype for v in t.values()} == {torch.float32}
    assert torch.equal(t["W_enc"], d.W_enc.detach().T)
    wanted = {"architecture": architecture, "d_in": 6, "d_sae": 20, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    assert {k: cfg[k] for k in wanted} == wanted and ("k" in cfg) == (kind == "topk")
    assert cfg["metadata"]["sae_lens_version"] >= "6.0.0" and cfg["metadata"]["hook_name"] == d.meta["hook"] and cfg["metadata"]["context_size"] == 256
    s = load_file(tmp_path / "sparsity.safetensors")["sparsity"]
    assert s.shape == (20,) and abs(s[0] + 10) < 1e-5 and abs(s[-1]) < 1e-6
    write_saelens(tmp_path, d)
    assert not (tmp_path / "sparsity.safetensors").exists()  # frequencies of another dictionary do not stay behind


def test_sparsify_layout(tmp_path):
    d = made("topk")
    write_sparsify(tmp_path, d)
    t, cfg = load_file(tmp_path / "sae.safetensors"), json.loads((tmp_path / "cfg.json").read_text())
    assert {k: tuple(v.shape) for k, v in t.items()} == {"encoder.weight": (20, 6), "encoder.bias": (20,), "W_dec": (20, 6), "b_dec": (6,)}
    assert cfg == {"activation": "topk", "expansion_factor": 3, "normalize_decoder": True, "num_latents": 20, "k": 4, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": 6}


def test_convert_leaves_what_was_there_when_the_disk_is_full(tmp_path, monkeypatch):
    save_dictionary(tmp_path / "ours", made("topk"))
    convert(str(tmp_path / "ours"), tmp_path / "theirs", "saelens")
    before = {p.name: p.read_bytes() for p in (tmp_path / "theirs").iterdir()}

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(formats, "save_file", full)
    with pytest.raises(UserError, match="no space left on device.*nothing was changed"): convert(str(tmp_path / "ours"), tmp_path / "theirs", "saelens")
    assert {p.name: p.read_bytes() for p in (tmp_path / "theirs").iterdir()} == before


def test_convert_notices_a_wrong_writer(tmp_path, monkeypatch):
    save_dictionary(tmp_path / "ours", made("topk"))

    def careless(folder, d):
        write_saelens(folder, d)
        t = load_file(folder / "sae_weights.safetensors")
        save_file(t | {"b_dec": -t["b_dec"] - 1}, folder / "sae_weights.safetensors")
    monkeypatch.setitem(formats.WRITERS, "saelens", careless)
    with pytest.raises(UserError, match="what was written differs by"): convert(str(tmp_path / "ours"), tmp_path / "theirs", "saelens")


def test_reading_notices_a_wrong_fold(tmp_path, monkeypatch):
    at = write(tmp_path, {"cfg.json": V6 | {"apply_b_dec_to_input": False}, "sae_weights.safetensors": TENSORS})
    read_dictionary(at)
    monkeypatch.setattr(formats, "fold", lambda f: fold(Foreign(f.kind, f.W_enc, f.W_dec, f.b_enc, f.b_dec)))
    with pytest.raises(UserError, match="differs from that format's own formula by"): read_dictionary(at)


def test_hub_offline_is_one_line(monkeypatch):
    "The hub's own client, told that there is no network."
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"hf:nobody/has-this/layer_3: could not be fetched .*local folder") as e: read_dictionary("hf:nobody/has-this/layer_3")
    assert "\n" not in str(e.value)


def test_every_format_is_named_in_the_message(tmp_path):
    with pytest.raises(UserError) as e: read_dictionary(tmp_path)
    assert len(FORMATS) == 6 and all(name in str(e.value) for name in FORMATS)
