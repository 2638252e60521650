"Properties of the sparse kernels that a chapter's small examples cannot show."
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neurocodec.core.run import UserError
from neurocodec.sae import sparse
from neurocodec.sae.sparse import (HALF, Codes, Support, batch_topk, decode, decode_at, dots, encode, encode_at, from_codes, group_size,
                                   largest, preactivations, spread, steady_sum, support_where, to_codes, topk)

quick = settings(max_examples=60, deadline=None)

def matrix(b, f, seed, values=None, dtype=torch.float32):
    "Random (b, f); with `values` only that many different numbers, so that ties abound."
    gen = torch.Generator().manual_seed(seed)
    if values: return torch.randint(-values, values + 1, (b, f), generator=gen).to(dtype)
    return torch.randn(b, f, generator=gen, dtype=dtype)

def parameters(b, d, f, seed=0, dtype=torch.float64, grad=True):
    gen = torch.Generator().manual_seed(seed)
    shapes = ((b, d), (f, d), (f,), (d,), (f, d))   # x, W_enc, b_enc, b_dec, W_dec
    return [torch.randn(*s, generator=gen, dtype=dtype).requires_grad_(grad) for s in shapes]

def dense_autoencoder(x, W_enc, b_enc, b_dec, W_dec, k):
    pre = (x - b_dec) @ W_enc.T + b_enc
    best = pre.topk(k)
    return torch.zeros_like(pre).scatter(1, best.indices, best.values.relu()) @ W_dec + b_dec


# --- looking in half the precision ---------------------------------------------------------------------------------------

@quick
@given(st.integers(1, 150), st.integers(2, 40), st.integers(4, 12), st.integers(1, 8), st.booleans(), st.sampled_from([None, 2, 30]),
       st.sampled_from([1., 1e-3, 300.]), st.sampled_from([1., 5.]), st.integers(0, 99))
def test_what_is_chosen_after_a_rough_look_is_what_an_exact_product_chooses(b, d, columns, k, by_batch, values, scale, outlier, seed):
    f = 16 * columns
    k = min(k, f // 8)
    x, W, bias = scale * matrix(b, d, seed, values), matrix(f, d, seed + 1, values), matrix(1, f, seed + 2, values)[0]
    W[0] *= outlier                                          # one long row loosens the bound for all
    exact = (x.double() @ W.double().T + bias.double()).relu()
    s, value_n = largest(x, W, bias, None, k, by_batch, screen=True)
    best = exact.flatten().topk(k * b).values if by_batch else exact.topk(k).values.flatten().sort(descending=True).values
    found = value_n.relu().double().sort(descending=True).values
    assert torch.allclose(found, best[:len(found)], rtol=1e-5, atol=1e-5 * scale * d ** .5) and (best[len(found):] == 0).all()
    assert torch.allclose(value_n.double(), (x.double() @ W.double().T + bias.double()).flatten()[s.flat_n], rtol=1e-5, atol=1e-5 * scale * d ** .5)

@quick
@given(st.integers(1, 60), st.integers(1, 90), st.integers(1, 60), st.floats(1e-3, 1e3), st.floats(0, 10), st.integers(0, 99))
def test_the_bound_on_the_rough_look_holds(b, d, f, scale, bias, seed):
    x, W, b_enc = scale * matrix(b, d, seed), matrix(f, d, seed + 1), bias * matrix(1, f, seed + 2)[0]
    rough, slack = sparse._rough(x, W, b_enc)
    exact = x.double() @ W.double().T + b_enc.double()
    assert ((exact - rough.double()).abs() <= slack[:, None] + 2 * HALF * rough.double().abs()).all()

def test_a_rough_look_is_taken_and_changes_nothing_but_time(monkeypatch):
    x, W_enc, b_enc, b_dec, _ = [p.float() for p in parameters(300, 256, 1024, grad=False)]
    took = []
    monkeypatch.setattr(sparse, "HAS_BF16", True)
    monkeypatch.setattr(sparse, "_screened", lambda *a, real=sparse._screened: took.append(real(*a)) or took[-1])
    s, value_n = largest(x, W_enc, b_enc, b_dec, 16)
    assert took[0] is not None
    plain, plain_n = largest(x, W_enc, b_enc, b_dec, 16, screen=False)
    assert torch.equal(s.features_n, plain.features_n) and torch.allclose(value_n, plain_n, rtol=1e-5, atol=1e-4)

@pytest.mark.parametrize("broken", ["x", "W_enc", "b_enc"])
def test_a_number_that_is_none_is_not_looked_over(broken):
    p = dict(zip(("x", "W_enc", "b_enc"), (t.float() for t in parameters(300, 256, 1024, grad=False))))
    p[broken].flatten()[5] = float("nan")
    assert sparse._screened(*p.values(), 16, False) is None and sparse._screened(*p.values(), 16, True) is None


# --- selection -----------------------------------------------------------------------------------------------------------

@quick
@given(st.integers(0, 200), st.integers(1, 12), st.integers(0, 9), st.sampled_from([1, 2, 4, 8]), st.sampled_from([None, 1, 3]), st.integers(0, 99))
def test_topk_takes_the_largest_whatever_the_grouping(b, columns, k, group, values, seed):
    f = 8 * columns
    k = min(k, f // group)
    pre = matrix(b, f, seed, values)
    found = topk(pre, k, group=group)
    assert torch.equal(pre.gather(1, found).sort(1).values, pre.topk(k).values.sort(1).values)
    assert (found.diff(dim=1) > 0).all(), "features ascend and none is taken twice"

def test_topk_of_everything_and_by_size():
    pre = matrix(7, 8192, 0)
    assert torch.equal(topk(pre[:, :40], 40), torch.arange(40).expand(7, 40))
    assert group_size(8192, 32) > 1
    assert torch.equal(topk(pre, 32), pre.topk(32).indices.sort(1).values)
    for k in (-1, 8193):
        with pytest.raises(UserError, match="expected 0 to 8192"): topk(pre, k)

@pytest.mark.parametrize("f,k", [(4096, 4096), (4096, 1), (5000, 7), (4099, 64), (1, 1)])
def test_group_size_always_divides_and_leaves_enough_groups(f, k):
    g = group_size(f, k)
    assert f % g == 0 and f // g >= k

@quick
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 9), st.sampled_from([1, 2, 4, 8]), st.sampled_from([None, 1, 3]), st.integers(0, 99))
def test_batch_topk_is_the_flat_topk_of_the_positive_entries(b, columns, k, group, values, seed):
    f = 8 * columns
    k = min(k, f)
    pre = matrix(b, f, seed, values)
    s = batch_topk(pre, k, group=group)
    flat = pre.flatten()
    order = torch.sort(flat, descending=True, stable=True).indices[:k * b]        # between equals, the earlier entry
    assert s.flat_n.tolist() == sorted(i for i in order.tolist() if flat[i] > 0)
    assert s.offsets_B1[-1] == len(s.features_n) and len(s.offsets_B1) == b + 1

@pytest.mark.parametrize("b,f", [(0, 5), (4, 0), (0, 0)])
def test_nothing_to_select_from(b, f):
    pre = torch.zeros(b, f)
    assert topk(pre, 0).shape == (b, 0)
    for s in (batch_topk(pre, 0), support_where(pre > 0)):
        assert s.features_n.numel() == 0 and s.offsets_B1.tolist() == [0] * (b + 1) and s.by_feature.offsets_F1.tolist() == [0] * (f + 1)

def test_a_row_of_nan_harms_itself_only():
    pre = matrix(130, 64, 3)
    pre[5] = float("nan")
    found = topk(pre, 4)
    keep = torch.arange(130) != 5
    assert torch.equal(found[keep], pre[keep].topk(4).indices.sort(1).values)
    assert ((found[5] >= 0) & (found[5] < 64)).all()


# --- gradients -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", [1, 3, 6])
def test_gradcheck_of_the_whole(k):
    args = parameters(4, 3, 6, seed=k)
    assert torch.autograd.gradcheck(lambda *a: decode(encode(*a[:4], k), a[4], a[3]), args)
    for ours, dense in zip(torch.autograd.grad(decode(encode(*args[:4], k), args[4], args[3]).square().sum(), args),
                           torch.autograd.grad(dense_autoencoder(*args, k).square().sum(), args)):
        torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-10)

@quick
@given(st.integers(0, 6), st.integers(1, 5), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_any_support_against_the_dense_formula(b, d, f, density, seed):
    x, W_enc, b_enc, b_dec, W_dec = args = parameters(b, d, f, seed)
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(b, f, generator=gen) < density
    s, theta = support_where(mask), torch.randn(f, generator=gen, dtype=torch.float64, requires_grad=True)
    z = encode_at(x, W_enc, b_enc, b_dec, s) * spread(theta, s)
    ours = torch.autograd.grad((decode_at(z, s, W_dec, b_dec) ** 3).sum(), (*args, theta))
    dense = ((x - b_dec) @ W_enc.T + b_enc) * theta * mask
    truth = torch.autograd.grad(((dense @ W_dec + b_dec) ** 3).sum(), (*args, theta))
    for a, t in zip(ours, truth): torch.testing.assert_close(a, t, rtol=1e-9, atol=1e-9)

def test_a_feature_named_twice_in_a_row_counts_twice():
    x, W_enc, b_enc, b_dec, W_dec = args = parameters(2, 3, 5)
    s = Support.rectangle(torch.tensor([[1, 1], [4, 0]]), 5)
    assert torch.autograd.gradcheck(lambda x, We, be, bd, Wd: decode_at(encode_at(x, We, be, bd, s), s, Wd, bd), args)

def test_without_biases_to_subtract_or_add():
    x, W_enc, b_enc, _, W_dec = parameters(3, 4, 6)
    s = Support.rectangle(torch.tensor([[0, 1], [2, 3], [5, 4]]), 6)
    assert torch.autograd.gradcheck(lambda x, We, be, Wd: decode_at(encode_at(x, We, be, None, s), s, Wd), (x, W_enc, b_enc, W_dec))

def test_second_derivatives_are_refused_not_wrong():
    x, W_enc, b_enc, b_dec, W_dec = parameters(3, 4, 6)
    g, = torch.autograd.grad(decode(encode(x, W_enc, b_enc, b_dec, 2), W_dec).square().sum(), W_enc, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"): g.sum().backward()

@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_the_private_operator_and_its_stand_in_against_einsum(dtype, tolerance):
    assert sparse.SAMPLED is not None, "this torch has no such operator: the plain formula is in use, slower"
    g, W = matrix(50, 33, 0, dtype=dtype), matrix(80, 33, 1, dtype=dtype)
    s = support_where(matrix(50, 80, 2) > .5)
    truth = torch.einsum("bd,fd->bf", g, W).flatten()[s.flat_n]
    for op in (sparse.SAMPLED, None): torch.testing.assert_close(dots(g, W, s, op=op), truth, rtol=tolerance, atol=tolerance)
    none = support_where(torch.zeros(50, 80, dtype=torch.bool))
    for op in (sparse.SAMPLED, None): assert dots(g, W, none, op=op).shape == (0,)


# --- Triton's kernels, which benchmarks/kernels.py runs ------------------------------------------------------------------------

class OnGPU(torch.Tensor):
    "A tensor that says it is on a GPU."
    is_cuda = True

@pytest.mark.parametrize("installed,on_gpu,alike,op,ours", [(True, True, True, "theirs", True), (False, True, True, "theirs", False), (True, False, True, "theirs", False),
                                                            (True, True, False, "theirs", False), (True, True, True, None, False)])
def test_triton_is_taken_on_a_gpu_where_it_is_installed_and_nowhere_else(monkeypatch, installed, on_gpu, alike, op, ours):
    took = []
    monkeypatch.setattr(sparse, "TRITON", installed)
    monkeypatch.setattr(sparse, "bag_triton", lambda *a: took.append(("bag", a)))
    monkeypatch.setattr(sparse, "dots_triton", lambda *a: took.append(("dots", a)))
    monkeypatch.setattr(sparse, "embedding_bag", lambda *a, **more: "torch's bag")
    monkeypatch.setattr(sparse, "SAMPLED", lambda *a: torch.zeros(3))
    s, kind = Support(torch.tensor([4, 0, 4]), torch.tensor([0, 2, 3]), 5), OnGPU if on_gpu else torch.Tensor
    g, W, w = (t.as_subclass(kind) for t in (torch.ones(2, 3), torch.ones(5, 3), torch.ones(3)))
    if not alike: W = W.double().as_subclass(kind)
    bagged = sparse.bag(w, s.features_n, s.offsets_B1, W)
    assert (bagged == "torch's bag") == (not (installed and on_gpu and alike))
    if alike: sparse.dots(g, W, s, op=sparse.SAMPLED if op else None)
    assert [name for name, _ in took] == (["bag", "dots"] if ours else ["bag"] if installed and on_gpu and alike else [])
    for name, a in took: assert all(x is y for x, y in zip(a, (w, s.features_n, s.offsets_B1, W) if name == "bag" else (g, W, s)))

def test_triton_can_be_switched_off():
    code = "import importlib, os, sys, types; t, l = (types.ModuleType(n) for n in ('triton', 'triton.language'))\n" \
           "t.jit, t.language, l.constexpr = (lambda f: f), l, object; sys.modules |= {'triton': t, 'triton.language': l}\n" \
           "from neurocodec.sae import sparse; print(sparse.TRITON); os.environ['NEUROCODEC_TRITON'] = '0'; print(importlib.reload(sparse).TRITON)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"NEUROCODEC_TRITON": "1"}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]

def test_what_cannot_be_multiplied_does_not_reach_a_kernel():
    s = Support(torch.tensor([4, 0, 4]), torch.tensor([0, 2, 3]), 5)
    with pytest.raises(AssertionError, match="2 weights for 3 indices"): sparse.bag_triton(torch.ones(2), s.features_n, s.offsets_B1, torch.ones(5, 3))
    with pytest.raises(AssertionError, match="no inner product"): sparse.dots_triton(torch.ones(2, 4), torch.ones(5, 3), s)


# --- memory and order ----------------------------------------------------------------------------------------------------

class Sizes(TorchDispatchMode):
    "The numbers of elements of every tensor that an operator returned."
    def __init__(self):
        super().__init__()
        self.made = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made += [(t.untyped_storage().nbytes() // t.element_size(), str(func)) for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out

def test_no_tensor_of_batch_by_k_by_width_is_made_and_none_of_batch_by_features_is_kept():
    b, d, f, k = 96, 40, 3000, 20
    x, W_enc, b_enc, b_dec, W_dec = parameters(b, d, f, dtype=torch.float32)
    kept = []
    preactivations(x, W_enc, b_enc, b_dec)                                 # the workspace exists
    with Sizes() as sizes, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        decode(encode(x, W_enc, b_enc, b_dec, k), W_dec, b_dec).square().sum().backward()
    weights = f * d
    assert b * f > weights and max(kept) <= weights
    big = [(n, op) for n, op in sizes.made if n > weights]
    assert {op for _, op in big} <= {"aten.addmm.out", "aten.view.default", "aten.slice.Tensor", "aten.detach.default", "aten.alias.default",
                                     "aten._unsafe_view.default"}, big     # the workspace, seen from several sides
    assert all(n < b * k * d or n >= b * f for n, _ in big)

def test_the_workspace_is_shared_and_no_result_lives_in_it():
    x, W_enc, b_enc, b_dec, W_dec = parameters(8, 4, 50, grad=False)
    codes = encode(x, W_enc, b_enc, b_dec, 5)
    before = codes.values_Bk.clone(), codes.indices_Bk.clone()
    encode(x * -3, W_enc, b_enc, b_dec, 5)
    assert torch.equal(codes.values_Bk, before[0]) and torch.equal(codes.indices_Bk, before[1])

def one_step(batch_rule):
    x, W_enc, b_enc, b_dec, W_dec = parameters(700, 48, 4096, dtype=torch.float32)
    if batch_rule:
        with torch.no_grad(): s = batch_topk(preactivations(x, W_enc, b_enc, b_dec), 24)
        x_hat = decode_at(encode_at(x, W_enc, b_enc, b_dec, s).relu(), s, W_dec, b_dec)
    else: x_hat = decode(encode(x, W_enc, b_enc, b_dec, 24), W_dec, b_dec)
    loss = steady_sum((x_hat - x).square())
    return [loss.detach(), *torch.autograd.grad(loss, (x, W_enc, b_enc, b_dec, W_dec))]

@pytest.mark.parametrize("batch_rule", [False, True])
def test_bitwise_equal_for_any_number_of_threads_and_on_repetition(batch_rule):
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2, 3):
            torch.set_num_threads(n)
            results.append(one_step(batch_rule))
    finally: torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other): assert torch.equal(a, b)

@quick
@given(st.integers(0, 5000), st.integers(0, 99))
def test_steady_sum_is_the_sum(n, seed):
    x = matrix(1, n, seed, dtype=torch.float64)[0].requires_grad_()
    torch.testing.assert_close(steady_sum(x), x.sum(), rtol=1e-9, atol=1e-9)
    assert torch.equal(torch.autograd.grad(steady_sum(x), x)[0], torch.ones(n, dtype=torch.float64))


# --- codes ---------------------------------------------------------------------------------------------------------------

@quick
@given(st.integers(0, 6), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_codes_round_trip(b, f, density, seed):
    pre = matrix(b, f, seed).abs() * (matrix(b, f, seed + 100) < density)
    s = support_where(pre > 0)
    codes = to_codes(pre.flatten()[s.flat_n], s)
    assert torch.equal(codes.dense(f), pre)
    assert (codes.values_Bk.diff(dim=1) <= 0).all(), "strongest first, zeros last"
    again = to_codes(*from_codes(codes, f))
    assert torch.equal(again.values_Bk, codes.values_Bk) and torch.equal(again.indices_Bk, codes.indices_Bk)

def test_gradients_flow_through_codes():
    s = Support(torch.tensor([4, 0, 4]), torch.tensor([0, 2, 3]), 5)
    assert torch.autograd.gradcheck(lambda v: to_codes(v, s).values_Bk, torch.tensor([1., 2., 3.], dtype=torch.float64, requires_grad=True))

def test_alien_features_are_named():
    codes = Codes(torch.ones(1, 2), torch.tensor([[3, 12]]))
    with pytest.raises(UserError, match="feature 12; the dictionary has features 0 to 9"): decode(codes, torch.zeros(10, 4))
    with pytest.raises(UserError): decode(Codes(torch.ones(1, 1), torch.tensor([[-1]])), torch.zeros(10, 4))
