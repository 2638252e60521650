"What the five dictionaries promise beyond a chapter's examples: exact resume, the same bytes on any number of threads, faults named."
import copy
import json

import pytest
import torch
from torch import nn

from neurocodec.core.run import UserError
from neurocodec.sae.dictionary import KINDS, DictionaryConfig, create_dictionary, load_dictionary, save_dictionary

ALL = list(KINDS)
FEATURES = nn.functional.normalize(torch.randn(60, 24, generator=torch.Generator().manual_seed(9)), dim=1)

@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "Matrices this small are faster without a second thread, and on a busy machine much faster."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

def vectors(n, seed=0):
    "Sums of about three of 60 directions, at unit mean square."
    gen = torch.Generator().manual_seed(seed)
    amount = torch.rand(n, 60, generator=gen) * 20
    x = (torch.where(amount < 1, .5 + amount, 0.)[:, :, None] * FEATURES).sum(1)     # not a matrix product: its bits depend on the threads
    return (x + .02 * torch.randn(n, 24, generator=gen)) / .36

def fresh(kind, seed=0, **more):
    config = DictionaryConfig(kind, **{"d_model": 24, "n_features": 96, "k": 3, "dead_after": 1000, **more})
    return create_dictionary(config, vectors(1000, 50), seed)

def train(d, steps, start=0, optimizer=None, batch=128, lr=5e-3):
    optimizer = optimizer or torch.optim.Adam(d.parameters(), lr=lr, fused=True)
    losses = []
    for t in range(start, start + steps):
        out = d.loss(vectors(batch, 1000 + t), warmup=min(1, t / 20))
        out.loss.backward()
        d.step(optimizer)
        d.observe(out)
        losses.append(out.loss.item())
    return optimizer, losses

def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


# --- configuration ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong,names", [(dict(kind="tok"), "expected topk or batchtopk or relu"), (dict(k=0), "k = 0: expected 1 to n_features"),
                                         (dict(k=97), "n_features = 96"), (dict(d_model=0), "d_model"), (dict(bandwidth=0.), "bandwidth"),
                                         (dict(threshold_decay=1.), "threshold_decay"), (dict(reduction="avg"), "mean or sum"),
                                         (dict(center="mode"), "mean, median or zero"), (dict(k_aux=97), "k_aux")])
def test_an_impossible_configuration_is_one_line(wrong, names):
    with pytest.raises(UserError, match=names) as e: DictionaryConfig(**{"kind": "topk", "d_model": 24, "n_features": 96, "k": 3, **wrong})
    assert "\n" not in str(e.value)

CHANGES = {"kind": "relu", "d_model": 20, "n_features": 80, "k": 5, "sparsity": 2., "aux": 0., "k_aux": 2, "dead_after": 10, "threshold_decay": .5,
           "bandwidth": .6, "reduction": "sum", "center": "zero", "scaled_start": False}

@pytest.mark.parametrize("field", list(CHANGES))
def test_every_field_is_read(field):
    assert set(CHANGES) == set(DictionaryConfig.__dataclass_fields__), "a new field needs a line here"
    kind = {"sparsity": "relu", "bandwidth": "jumprelu", "threshold_decay": "batchtopk"}.get(field, "topk")
    def outcome(**more):
        config = DictionaryConfig(**{"kind": kind, "d_model": 24, "n_features": 96, "k": 3, "dead_after": 1000, "k_aux": 1, **more})
        x = vectors(256)[:, :config.d_model] + 3
        d = create_dictionary(config, x)
        d.tokens_since_fired_F[::2] = 500
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(d.parameters(), lr=1e-2)
        for _ in range(3):
            out = d.loss(x)
            out.loss.backward(); d.step(optimizer); d.observe(out)
            if field in ("aux", "k_aux"): d.tokens_since_fired_F += 1000
            if field == "dead_after": d.tokens_since_fired_F[5:] = 500
        return [type(d), *d.state_dict().values(), out.loss.detach()]
    a, b = outcome(), outcome(**{field: CHANGES[field]})
    assert any(type(x) is not type(y) or (x.shape != y.shape or not torch.equal(x, y) if isinstance(x, torch.Tensor) else x is not y) for x, y in zip(a, b))


# --- the loss --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [k for k in ALL if k != "jumprelu"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck_of_the_loss(kind, reduction):
    gen = torch.Generator().manual_seed(4)
    d = KINDS[kind](DictionaryConfig(kind, d_model=4, n_features=12, k=2, aux=0., reduction=reduction)).double()
    params = {n: torch.randn(p.shape, generator=gen, dtype=torch.float64).requires_grad_() for n, p in d.named_parameters()}
    if kind in ("relu", "gated"): params["b_enc"].data -= 3          # few fire: the sparse path
    x = torch.randn(6, 4, generator=gen, dtype=torch.float64)
    buffers = dict(d.named_buffers())
    class Shell(nn.Module):
        def __init__(self): super().__init__(); self.d = d
        def forward(self, x): return self.d.loss(x, .7).loss
    def f(*values): return torch.func.functional_call(Shell(), {**{f"d.{n}": v for n, v in zip(params, values)}, **{f"d.{n}": b for n, b in buffers.items()}}, (x,))
    if kind in ("relu", "gated"):
        for n, v in params.items(): d.get_parameter(n).data = v.data.clone()
        assert d.loss(x).support is not None
        if kind == "gated": return gated_against_published(d, x)     # its gate is cut from two gradients on purpose
    assert torch.autograd.gradcheck(f, tuple(params.values()))

def gated_against_published(d, x):
    "The two-matrix formula with explicit detaching, differentiated densely."
    pre = (x - d.b_dec) @ d.W_enc.T + d.b_enc
    mag = (x - d.b_dec) @ (d.W_enc * d.r_mag_F.exp()[:, None]).T + d.b_mag_F
    scale = d.d_model if d.config.reduction == "sum" else 1
    fit = (((pre > 0) * mag.relu()) @ d.W_dec + d.b_dec - x).square().mean()
    alone = (pre.relu() @ d.W_dec.detach() + d.b_dec.detach() - x).square().mean()
    l1 = pre.relu().sum() / (len(x) * d.d_model) * d.config.typical
    truth = torch.autograd.grad(scale * (fit + alone + .7 * d.config.sparsity * l1), list(d.parameters()))
    ours = torch.autograd.grad(d.loss(x, .7).loss, list(d.parameters()))
    for a, b in zip(ours, truth): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

def test_the_loss_curve_is_that_of_the_dense_formula():
    d, e = fresh("topk", aux=0.), fresh("topk", aux=0.)
    _, ours = train(d, 100)
    optimizer, dense = torch.optim.Adam(e.parameters(), lr=5e-3), []
    for t in range(100):
        x = vectors(128, 1000 + t)
        pre = (x - e.b_dec) @ e.W_enc.T + e.b_enc
        best = pre.topk(3)
        loss = (torch.zeros_like(pre).scatter(1, best.indices, best.values.relu()) @ e.W_dec + e.b_dec - x).square().mean()
        loss.backward()
        e.step(optimizer)
        dense.append(loss.item())
    worst = max(abs(a - b) / b for a, b in zip(ours, dense))
    assert worst < 5e-3 and ours[-1] < .5 * ours[0]

@pytest.mark.parametrize("kind", ALL)
def test_an_empty_batch_is_a_batch(kind):
    d = fresh(kind)
    out = d.loss(torch.zeros(0, 24))
    out.loss.backward()
    assert out.loss.isfinite() and out.l0 == 0 and not out.fired_F.any()
    d.observe(out)
    assert d.encode(torch.zeros(0, 24)).values_Bk.shape[0] == 0 and d(torch.zeros(0, 24)).shape == (0, 24)

@pytest.mark.parametrize("kind", ALL)
def test_selected_but_silent_is_not_fired(kind):
    d = fresh(kind)
    d.b_enc.data.fill_(-100)                                        # every pre-activation is negative
    out = d.loss(vectors(64))
    assert out.l0 == 0 and not out.fired_F.any() and out.threshold.isinf()
    d.observe(out)
    assert (d.tokens_since_fired_F == 64).all()
    if kind == "batchtopk": assert d.threshold < 0                  # nothing was learnt about it

@pytest.mark.parametrize("kind", ALL)
def test_what_the_loss_reports(kind):
    d = fresh(kind)
    x = vectors(200)
    out, before = d.loss(x), copy.deepcopy(d.state_dict())
    x_hat = d.decode(out.codes)
    torch.testing.assert_close(out.reconstruction, (x_hat - x).square().mean().detach())
    torch.testing.assert_close(out.l0, (out.codes.values_Bk > 0).sum(1).float().mean())
    assert torch.equal(out.fired_F, (out.codes.dense(96) > 0).any(0)) and out.rows == 200
    assert all(torch.equal(v, before[k]) for k, v in d.state_dict().items()), "the loss changes nothing"

@pytest.mark.parametrize("kind", ALL)
def test_forward_is_differentiable_in_its_input(kind):
    d = fresh(kind)
    d.observe(d.loss(vectors(200)))
    x = vectors(20).requires_grad_()
    g, = torch.autograd.grad(d(x).square().sum(), x)
    pre = (x - d.b_dec) @ d.W_enc.T + d.b_enc
    on = d.encode(x.detach()).dense(96) > 0
    acts = on * (pre if kind != "gated" else d.r_mag_F.exp() * (pre - d.b_enc) + d.b_mag_F)
    truth, = torch.autograd.grad((acts @ d.W_dec + d.b_dec).square().sum(), x)
    torch.testing.assert_close(g, truth, rtol=1e-4, atol=1e-4)

def test_blocks_of_rows_do_not_show():
    d = create_dictionary(DictionaryConfig("relu", d_model=4, n_features=1 << 16, k=3), torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))
    d.b_enc.data -= 2 * d.W_enc.detach().norm(dim=1)
    x = torch.randn(1100, 4, generator=torch.Generator().manual_seed(1))          # 512 rows to a block
    codes = d.encode(x)
    for i in (0, 511, 512, 1099):
        alone = d.encode(x[i:i + 1])
        n = int((alone.values_Bk > 0).sum())
        assert torch.equal(codes.indices_Bk[i, :n].sort().values, alone.indices_Bk[0, :n].sort().values) and not codes.values_Bk[i, n:].any()


# --- training --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ALL)
def test_resume_is_exact(kind):
    whole = fresh(kind, dead_after=300)
    train(whole, 16)
    half = fresh(kind, dead_after=300)
    optimizer, _ = train(half, 8)
    weights, moments = copy.deepcopy(half.state_dict()), copy.deepcopy(optimizer.state_dict())
    again = fresh(kind, seed=5, dead_after=300)
    again.load_state_dict(weights)
    optimizer = torch.optim.Adam(again.parameters(), lr=5e-3, fused=True)
    optimizer.load_state_dict(moments)
    train(again, 8, start=8, optimizer=optimizer)
    assert same(whole, again)

@pytest.mark.parametrize("kind", ["topk", "batchtopk"])  # the sparse kinds promise it; the dense ones go through matrix products
def test_the_same_bytes_on_any_number_of_threads(kind):
    threads, made = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            d = fresh(kind, n_features=4096, k=8, dead_after=1)       # two-level selection, AuxK busy
            _, losses = train(d, 4, batch=600)
            made.append((d, losses))
    finally: torch.set_num_threads(threads)
    for d, losses in made[1:]: assert same(d, made[0][0]) and losses == made[0][1]

def test_halves_of_a_batch_average_to_the_whole():
    d, x = fresh("topk", aux=0.), vectors(128)
    def gradient(x):
        d.zero_grad(); d.loss(x).loss.backward()
        return [p.grad.clone() for p in d.parameters()]
    for a, b, whole in zip(gradient(x[:64]), gradient(x[64:]), gradient(x)): torch.testing.assert_close((a + b) / 2, whole, rtol=1e-4, atol=1e-6)
    out, other = d.loss(x[:64]), d.loss(x[64:])
    both = out._replace(fired_F=out.fired_F | other.fired_F, threshold=torch.minimum(out.threshold, other.threshold))
    d.observe(both, n_tokens=128)
    assert torch.equal(d.tokens_since_fired_F == 0, d.loss(x).fired_F) and set(d.tokens_since_fired_F.tolist()) <= {0, 128}


def test_batchtopk_fires_as_often_alone_as_in_company():
    d = fresh("batchtopk")
    train(d, 100)
    x = vectors(2000, 7)
    alone = (d.encode(x).values_Bk > 0).sum().item() / 2000
    assert abs(alone - 3) < .45

def test_batchtopk_inference_does_not_look_at_neighbours():
    d = fresh("batchtopk")
    train(d, 30)
    x = vectors(50, 7)
    together = d.encode(x).dense(96)
    for i in range(0, 50, 7): torch.testing.assert_close(d.encode(x[i:i + 1]).dense(96)[0], together[i])


@pytest.mark.parametrize("kind", ALL)
def test_resampling_is_seeded_and_leaves_the_living_alone(kind):
    x = vectors(256)
    def once(seed):
        d = fresh(kind)
        d.tokens_since_fired_F[10:20] = 10_000
        return d, d.resample_dead(x, torch.Generator().manual_seed(seed))
    (a, n), (b, _), (c, _) = once(0), once(0), once(1)
    untouched = torch.ones(96, dtype=torch.bool); untouched[10:20] = False
    assert n == 10 and same(a, b) and not same(a, c)
    assert torch.equal(a.W_dec[untouched], fresh(kind).W_dec[untouched])
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(96))

def test_resampling_with_nothing_alive_or_more_dead_than_vectors():
    d = fresh("relu")
    d.tokens_since_fired_F.fill_(10_000)
    assert d.resample_dead(vectors(20), torch.Generator().manual_seed(0)) == 96
    assert d.W_dec.isfinite().all() and d.W_enc.isfinite().all()


# --- start and disk --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ALL)
def test_a_start_without_a_sample_or_with_a_flat_one(kind):
    config = DictionaryConfig(kind, d_model=24, n_features=96, k=3)
    for sample in (None, torch.ones(10, 24), torch.zeros(0, 24)):
        d = create_dictionary(config, sample)
        out = d.loss(vectors(64))
        assert out.loss.isfinite() and all(v.isfinite().all() for v in d.state_dict().values())

def test_where_the_centre_starts():
    x = torch.cat([vectors(500) + 2, torch.full((5, 24), 1e4)])
    made = {c: create_dictionary(DictionaryConfig("topk", 24, 96, 3, center=c), x).b_dec.detach() for c in ("mean", "median", "zero")}
    torch.testing.assert_close(made["mean"], x.mean(0))
    assert not made["zero"].any() and (made["median"] - 2).abs().max() < .5

@pytest.mark.parametrize("kind", ALL)
def test_disk_round_trip_after_folding(kind, tmp_path):
    d = fresh(kind)
    train(d, 5)
    x = vectors(50)
    want = d(x).detach()
    save_dictionary(tmp_path, d.fold_scale(11.5), {"scale": 11.5, "layer": 3})
    e = load_dictionary(tmp_path)
    assert same(d, e) and e.config == d.config and e.meta == {"scale": 11.5, "layer": 3}
    torch.testing.assert_close(e(11.5 * x).detach(), 11.5 * want, rtol=1e-4, atol=1e-4)
    first = (tmp_path / "dictionary.safetensors").read_bytes()
    save_dictionary(tmp_path, e)
    assert (tmp_path / "dictionary.safetensors").read_bytes() == first and load_dictionary(tmp_path).meta["layer"] == 3

def edit(path, change):
    about = json.loads((path / "dictionary.json").read_text())
    change(about)
    (path / "dictionary.json").write_text(json.dumps(about))

FAULTS = {
    "no folder": (lambda p: (p / "dictionary.json").unlink(), "no such file"),
    "no tensors": (lambda p: (p / "dictionary.safetensors").unlink(), "no such file"),
    "cut short": (lambda p: (p / "dictionary.safetensors").write_bytes((p / "dictionary.safetensors").read_bytes()[:-100]), "not a whole safetensors"),
    "one bit": (lambda p: (p / "dictionary.safetensors").write_bytes((b := bytearray((p / "dictionary.safetensors").read_bytes()))[:-1] + bytes([b[-1] ^ 1])), "digest differs"),
    "not json": (lambda p: (p / "dictionary.json").write_text("{"), "unreadable"),
    "a list": (lambda p: (p / "dictionary.json").write_text("[]"), "no `config`"),
    "another shape": (lambda p: edit(p, lambda a: a["config"].update(n_features=100)), r"W_dec: found \(96, 24\), expected \(100, 24\)|W_enc: found|b_enc: found \(96,\), expected \(100,\)"),
    "another kind": (lambda p: edit(p, lambda a: a["config"].update(kind="jumprelu")), "threshold_F: found nothing"),
    "no such kind": (lambda p: edit(p, lambda a: a["config"].update(kind="magic")), "expected topk"),
    "unknown key": (lambda p: edit(p, lambda a: a["config"].update(colour="red")), "unknown config keys colour"),
    "wrong type": (lambda p: edit(p, lambda a: a["config"].update(k="many")), "dictionary.json"),
}

@pytest.mark.parametrize("fault", list(FAULTS))
def test_faults_on_disk_are_one_line(fault, tmp_path):
    save_dictionary(tmp_path, fresh("topk"))
    damage, says = FAULTS[fault]
    damage(tmp_path)
    with pytest.raises(UserError, match=says) as e: load_dictionary(tmp_path)
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)

def test_auxk_revives_what_stays_dead_without_it():
    "Every second feature starts below what any input overcomes."
    def dead_at_the_end(aux):
        d = fresh("topk", aux=aux, dead_after=5000)  # 39 batches: rare is not dead
        with torch.no_grad(): d.b_enc[::2] = -6
        train(d, 400)
        return d.dead_F.float().mean().item()
    assert dead_at_the_end(0.) >= .5 and dead_at_the_end(1 / 32) < .1

def test_jumprelu_ends_near_its_target_and_nearer_with_more_weight_on_it():
    "The target is a pull against the reconstruction's, not a constraint."
    def l0(target, sparsity):
        d = fresh("jumprelu", k=target, sparsity=sparsity)
        train(d, 400)
        return (d.encode(vectors(2000, 7)).values_Bk > 0).sum(1).float().mean().item()
    for target in (2, 4, 8):
        assert abs(l0(target, 10.) / target - 1) < .1 and abs(l0(target, 1.) / target - 1) < .25
