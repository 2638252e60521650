"Lenses: the format others read, derivatives on every kind of architecture, memory that does not grow, and fitting that repeats to the byte."
import json
from dataclasses import replace

import pytest
import torch

from neurocodec.core.lens import Lens, LensConfig, blocks_of, identity, load_tuned_lens, mean_jacobian, read_lens, reading, regress, save_tuned_lens, states, tune
from neurocodec.core.lm import tiny
from neurocodec.core.run import UserError

torch.set_num_threads(1)


def texts(n, T=24, seed=0): return torch.randint(3, 96, (n, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def lm(): return tiny("gemma2")  # soft caps and an offset in the norm: what an imitated unembedding would forget


def test_the_tuned_lens_folder_is_what_that_package_defines(lm, tmp_path):
    """Its own loader: a ModuleList of n_layers Linear(d, d), strict; its forward: unembed(h + translator_i(h)) with h the
    i-th of Hugging Face's hidden states."""
    g = torch.Generator().manual_seed(0)
    lens = Lens(torch.randn(3, 32, 32, generator=g) * .1, torch.randn(3, 32, generator=g))
    folder = save_tuned_lens(lens, lm, tmp_path / "lens")
    config = json.loads((folder / "config.json").read_text())
    assert set(config) == {"base_model_name_or_path", "d_model", "num_hidden_layers", "bias", "base_model_revision", "unembed_hash", "lens_type"}
    assert config["lens_type"] == "linear_tuned_lens" and len(config["unembed_hash"]) == 64
    theirs = torch.nn.ModuleList(torch.nn.Linear(config["d_model"], config["d_model"]) for _ in range(config["num_hidden_layers"]))
    theirs.load_state_dict(torch.load(folder / "params.pt", weights_only=True), strict=True)
    x = texts(2)
    hidden = lm.model(input_ids=x, output_hidden_states=True).hidden_states
    ours = states(lm, x)
    for i in range(3): assert torch.allclose(lm.unembed(hidden[i] + theirs[i](hidden[i])), lens.logits(lm, ours[i], i - 1), atol=1e-5)


@pytest.mark.parametrize("wreck", ["config", "params", "missing layer", "pickle"])
def test_a_broken_folder_is_one_line(lm, tmp_path, wreck):
    folder = save_tuned_lens(identity(3, 32), lm, tmp_path / "lens")
    if wreck == "config": (folder / "config.json").write_text("{")
    if wreck == "params": (folder / "params.pt").write_bytes((folder / "params.pt").read_bytes()[:300])
    if wreck == "missing layer": torch.save({"0.weight": torch.zeros(32, 32)}, folder / "params.pt")
    if wreck == "pickle": (folder / "params.pt").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(UserError) as e: load_tuned_lens(folder, lm)
    assert "\n" not in str(e.value) and "lens" in str(e.value)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2", "gemma3_text", "mistral"])
def test_jacobians_on_every_architecture(name):
    "Against the derivative along a random direction, by finite differences; steps are wide because some norms compute in float32."
    lm, x = tiny(name), texts(1, 6, 1)
    lm.model.double()
    lm.dtype = torch.float64
    J = mean_jacobian(lm, x.expand(32, -1), "later", rounds=1, skip=1)[0, 1].double()
    h, d = lm.residual(x, 0), torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    total = torch.zeros(32, dtype=torch.float64)
    for t in range(1, 5):  # sources and targets: all but the first and the last position
        step = torch.zeros_like(h)
        step[0, t] = 3e-3 * d
        with torch.no_grad():
            ends = [_last_stream(lm, x, h + s * step)[0, 1:5].sum(0) for s in (1, -1)]
        total += (ends[0] - ends[1]) / 6e-3 / 4
    assert (J @ d - total).norm() < 2e-3 * total.norm()


def _last_stream(lm, x, h):
    from neurocodec.core.lm import Intervention
    with lm.intervene(Intervention("blocks.0.hook_resid_post", "set", h)): return lm.residual(x, lm.n_layers - 1)


def test_fitting_repeats_to_the_byte_and_in_little_memory(lm):
    "Blocks kept between the passes or computed twice: the same lens; another seed: another."
    x, how = texts(40), LensConfig(batch=64, block=8)
    a, b, c, d = tune(lm, x, how), tune(lm, x, how), tune(lm, x, replace(how, memory=0)), tune(lm, x, how, seed=1)
    for one, other in ((a, b), (a, c)): assert all(torch.equal(p, q) for p, q in zip(one.lens, other.lens))
    assert not torch.equal(a.lens.A_LDD, d.lens.A_LDD) and torch.equal(a.regression.A_LDD, d.regression.A_LDD)


def test_a_layer_that_knows_nothing_starts_from_the_constant_and_stays_near_it():
    "Streams of a model that reads other text tell nothing; regression on them must not be where training starts."
    lm, x = tiny("llama"), texts(60)
    other = tiny("llama", seed=9)
    blocks = [(h[:, torch.randperm(h.shape[1], generator=torch.Generator().manual_seed(0))], f) for h, f in blocks_of(lm, x, 16, other)]
    h, f = blocks[-1]
    p = lm.unembed(f).log_softmax(-1)
    def kl(lens, l): return reading(p, lens.logits(lm, h[l + 1], l).log_softmax(-1), torch.zeros(len(p)).long()).kl.mean()
    noise = regress(iter(blocks[:-1])).lens
    assert kl(noise, 0) < kl(identity(3, 32), 0)  # better than taking one model's stream for another's
    assert "constant" in tune(lm, x, LensConfig(batch=64), source=other).starts


def test_an_unknown_lens_says_which_there_are(tmp_path):
    class Fake:
        folder = tmp_path
        def tensors(self, name): return {"tuned.weight": torch.zeros(3, 2, 2), "tuned.bias": torch.zeros(3, 2)}

    assert read_lens(Fake(), "tuned").A_LDD.shape == (3, 2, 2)
    with pytest.raises(UserError, match="there are tuned"): read_lens(Fake(), "magic")
