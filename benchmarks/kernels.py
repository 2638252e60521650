"""Do Triton's kernels compute what torch's operators compute, and how long do they take?

    python benchmarks/kernels.py [--triton FOLDER]    # FOLDER: where pip put Triton, if this Python has none

Without a GPU: in Triton's interpreter, over random shapes and the corners, against sums in float64, beside torch's operators; then compiled
for two generations of GPUs, which needs none. With a GPU the compiled kernels are compared in the same way, and timed beside torch's operators; that
writes benchmarks/measured/kernels.json. Exit code 1 where anything differs by more than rounding can explain.

What rounding can explain: n terms added in floating point of unit roundoff u are off by at most n u / (1 - n u) times the sum of their sizes
(Higham 2002, section 4.2, one more rounding for the products), and storing the sum in a type of unit roundoff v by a further v times its size.
The interpreter cuts bfloat16 off where a GPU rounds it, so it is allowed 2 v there.
"""
import argparse
import importlib.util
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SIZES = ((768, 7680, 64, 2048), (768, 24576, 32, 2048))  # (d, F, k, batch)
TARGETS = ((80, "A100"), (90, "H100"))
DTYPES = ("float32", "float64", "bfloat16", "float16")


# ---------------------------------------------------------------- what is compared: a table, groups of its rows, and what they should give

def lengths(kind, groups, rng):
    "How many nonzeros each group has."
    if kind == "empty": return [0] * groups
    if kind == "long": return [rng.randint(0, 3) for _ in range(groups - 1)] + [2500]
    return [rng.choice((0, 0, 1, 2, 5, 17, 40)) for _ in range(groups)]


def cases(n, seed=0):
    "(rows, d, lengths of groups, type, layout): first the corners, then random shapes up to n."
    rng = random.Random(seed)
    corners = [(7, 1, [0, 3, 1], "float32", ""), (7, 256, [2, 0, 5], "float32", ""), (7, 257, [2, 0, 5], "float32", ""), (5, 255, [0, 0], "float32", ""),
               (5, 8, [], "float32", ""), (1, 3, [1], "float64", ""), (300, 40, lengths("long", 3, rng), "float32", ""), (300, 300, [2500], "bfloat16", ""),
               (300, 40, lengths("long", 3, rng), "float64", ""), (20, 33, [4, 4, 4], "float32", "columns first"), (20, 33, [4, 4, 4], "float64", "every other")]
    yield from corners
    for _ in range(n - len(corners)):
        kind, groups = rng.choice(("ragged",) * 9 + ("empty",)), rng.randint(1, 8)
        yield rng.randint(1, 400), rng.choice((1, 2, 31, 64, 100, 192, 256, 300, 513, 768)), lengths(kind, groups, rng), rng.choice(DTYPES), rng.choice(("", "", "columns first", "every other"))


def matrix(rows, d, dtype, layout, device, gen):
    "Random numbers, contiguous or not."
    import torch
    x = torch.randn(rows, d, generator=gen).to(device, getattr(torch, dtype))
    if layout == "columns first": return x.T.contiguous().T
    if layout == "every other": return torch.stack([x, -x], 2)[:, :, 0]
    return x


def beyond(got, truth, size, n, cut=False):
    "The largest difference in units of what rounding can explain: at most 1 if all is well, infinite where a number is missing."
    import torch
    v = torch.finfo(got.dtype).eps / (1 if cut else 2)
    u = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps / 2
    n = n.double() + 1                                        # products are rounded too
    sums = n * u / (1 - n * u) * size
    if got.dtype == torch.float64: sums = 2 * sums           # the truth is rounded as well
    bound = sums + v * (truth.abs() + sums) + torch.finfo(got.dtype).smallest_normal
    return float(((got.double() - truth).abs() / bound).nan_to_num(nan=float("inf")).max()) if got.numel() else 0.


class Answer(NamedTuple):
    "A kernel's result and what to hold it against."
    got: object       # Triton's
    by_torch: object  # called, gives torch's
    truth: object     # in float64
    size: object      # the same sum of the terms' sizes
    n: object         # terms added
    mistaken: object  # the truth of a slightly different question, which must not pass for an answer


def of_bag(sparse, weights_n, index_n, offsets, table):
    "Mistaken: without each group's last row."
    import torch
    lengths, n = offsets.diff(), len(index_n)
    group_n = torch.arange(len(lengths), device=table.device).repeat_interleave(lengths)
    pick_Gn = (group_n == torch.arange(len(lengths), device=table.device)[:, None]).double()
    terms_nD = weights_n.double()[:, None] * table[index_n].double()
    is_last_n = torch.isin(torch.arange(n, device=table.device), offsets[1:] - 1)
    def total(terms_nD): return torch.einsum("gn,nd->gd", pick_Gn, terms_nD)
    return Answer(sparse.bag_triton(weights_n, index_n, offsets, table), partial(torch_bag, sparse, weights_n, index_n, offsets, table),
                  total(terms_nD), total(terms_nD.abs()), lengths[:, None], total(terms_nD * ~is_last_n[:, None]))


def of_dots(sparse, g_GD, table, s):
    "Mistaken: the next feature's row."
    import torch
    def products(g_GD, table, features_n): return torch.einsum("nd,nd->n", g_GD[s.rows_n].double(), table[features_n].double())
    return Answer(sparse.dots_triton(g_GD, table, s), partial(torch_dots, sparse, g_GD, table, s), products(g_GD, table, s.features_n),
                  products(g_GD.abs(), table.abs(), s.features_n), s.offsets_B1.new_tensor(table.shape[1]), products(g_GD, table, (s.features_n + 1) % len(table)))


def check(device, n_cases):
    "Compare on one device; returns what went wrong and the figures to print."
    import torch

    from neurocodec.sae import sparse
    gen, wrong, worst, caught, of = torch.Generator().manual_seed(0), [], {"Triton": 0., "torch": 0.}, 0, 0
    for case, (rows, d, group_lengths, dtype, layout) in enumerate(cases(n_cases)):
        exact = dtype in ("float32", "float64")
        offsets = torch.tensor([0, *group_lengths], device=device).cumsum(0)
        index_n = torch.randint(0, rows, (sum(group_lengths),), generator=gen).to(device)
        weights_n, table = matrix(1, len(index_n), dtype, "", device, gen)[0], matrix(rows, d, dtype, layout, device, gen)
        g_GD, few = matrix(len(group_lengths), d, dtype, layout, device, gen), offsets.clamp(max=200) if device == "cpu" else offsets  # a program each: slow there
        s = sparse.Support(index_n[:few[-1]], few, rows)
        answers = {"bag": of_bag(sparse, weights_n, index_n, offsets, table), "dots": of_dots(sparse, g_GD, table, s)}
        for name, a in answers.items():
            what = f"{name}, case {case}: {rows} x {d} {dtype} {layout or 'contiguous'}, groups of {group_lengths}"
            gap = beyond(a.got, a.truth, a.size, a.n, cut=device == "cpu" and dtype == "bfloat16")
            worst["Triton"] = max(worst["Triton"], gap)
            if not gap <= 1: wrong.append(f"{what}: off by {gap:.3g} times what rounding can explain")
            if exact: worst["torch"] = max(worst["torch"], beyond(a.by_torch(), a.truth, a.size, a.n))  # its operators lack the other types, or round in between
            if exact and not torch.equal(a.mistaken, a.truth):
                of += 1
                caught += beyond(a.got, a.mistaken, a.size, a.n) > 1
        if device == "cpu" and exact and not torch.equal(answers["bag"].got, one_by_one(weights_n, index_n, offsets, table)): wrong.append(f"{what}: bag did not add up in the order given")
        if device == "cuda" and not all(torch.equal(a.got, b.got) for a, b in zip(answers.values(), (of_bag(sparse, weights_n, index_n, offsets, table), of_dots(sparse, g_GD, table, s)))):
            wrong.append(f"{what}: bag or dots not the same twice")
    if caught < of: wrong.append(f"{of - caught} of {of} wrong answers pass")
    if not strangers_are_seen(sparse, device): wrong.append("an index outside the table does not give not a number, or harms others")
    return wrong, {"cases": case + 1, "worst": worst, "caught": caught, "of": of}


def strangers_are_seen(sparse, device):
    "An index outside the table makes its own sum not a number, and no other."
    import torch
    table, offsets = torch.ones(4, 300, device=device), torch.tensor([0, 2, 4, 5], device=device)
    ok = True
    for alien in (-1, 4, 2**40):
        index_n = torch.tensor([0, 3, 1, alien, 2], device=device)
        ok &= sparse.bag_triton(torch.ones(5, device=device), index_n, offsets, table).isnan().all(1).tolist() == [False, True, False]
        ok &= sparse.dots_triton(table[:3], table, sparse.Support(index_n, offsets, 4)).isnan().tolist() == [False, False, False, True, False]
    return ok


def one_by_one(weights_n, index_n, offsets, table):
    "The sums as a loop would write them: what the interpreter must give to the last bit."
    import torch
    out = torch.zeros(len(offsets) - 1, table.shape[1], dtype=table.dtype)
    for group, (begin, end) in enumerate(zip(offsets.tolist(), offsets[1:].tolist())):
        for j in range(begin, end): out[group] += weights_n[j] * table[index_n[j]]
    return out


def torch_bag(sparse, *args):
    held, sparse.TRITON = sparse.TRITON, False
    try: return sparse.bag(*args)
    finally: sparse.TRITON = held


def torch_dots(sparse, *args):
    held, sparse.TRITON = sparse.TRITON, False
    try: return sparse.dots(*args)
    finally: sparse.TRITON = held


# ---------------------------------------------------------------- compiled: for GPUs that need not be there, and timed on one that is

def compile_all():
    "Compile both kernels for every type and target; returns what went wrong and how many were made."
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from neurocodec.sae import sparse
    wrong, made = [], 0
    for kernel, warps in ((sparse._bag_kernel, 2), (sparse._dots_kernel, 1)):
        for short, double in (("fp32", False), ("fp64", True), ("bf16", False), ("fp16", False)):
            for capability, chip in TARGETS:
                pointers = {"out_ptr", "weights_ptr", "table_ptr", "g_ptr", "W_ptr"}
                constants = {"BLOCK": sparse.BLOCK, "SUM": triton.language.float64 if double else triton.language.float32}
                signature = {a: "constexpr" if a in constants else f"*{short}" if a in pointers else "*i64" if a.endswith("_ptr") else "i32" for a in kernel.arg_names}
                try: code = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm
                except Exception as e:  # whatever the compiler says, it is the result
                    wrong.append(f"{kernel.__name__}, {short}, {chip}: does not compile: {(str(e).strip().splitlines() or [type(e).__name__])[-1]}")
                    continue
                made += len(code["cubin"]) > 0
                if atomics := sorted(set(re.findall(r"\b(?:atom|red)\.\S+", code["ptx"]))): wrong.append(f"{kernel.__name__}, {short}, {chip}: {atomics}")
    return wrong, {"made": made}


def milliseconds(function, rounds=30):
    "Median time of a call on the GPU."
    import torch
    times = []
    for i in range(rounds + 5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(); function(); end.record()
        torch.cuda.synchronize()
        if i >= 5: times.append(begin.elapsed_time(end))
    return statistics.median(times)


def race():
    "Both operations at the sizes of published dictionaries, torch's and ours, on the GPU."
    import torch

    from neurocodec.sae import sparse
    found = []
    for d, f, k, batch in SIZES:
        g = torch.Generator("cuda").manual_seed(0)
        x, W = (torch.randn(n, d, generator=g, device="cuda") for n in (batch, f))
        s = sparse.Support.rectangle(torch.rand(batch, f, generator=g, device="cuda").topk(k).indices.sort(1).values, f)
        values_n, t = torch.rand(batch * k, generator=g, device="cuda"), s.by_feature
        ordered_n, every_F = values_n[t.order_n], torch.arange(f, device="cuda")
        calls = {"decode": (torch_bag, sparse.bag_triton, (values_n, s.features_n, s.offsets_B1, W)),
                 "gradient of the dictionary": (torch_bag, sparse.bag_triton, (ordered_n, t.rows_n, t.offsets_F1, x)),
                 "gradient of the bias": (torch_bag, sparse.bag_triton, (torch.rand(f, generator=g, device="cuda"), every_F, every_F.new_tensor([0, f]), W)),
                 "gradient of the activations": (torch_dots, sparse.dots_triton, (x, W, s))}
        ms = {name: {"torch": milliseconds(partial(stock, sparse, *args)), "triton": milliseconds(partial(ours, *args))} for name, (stock, ours, args) in calls.items()}
        found.append({"size": (d, f, k, batch), "ms": ms})
    return found


# ----------------------------------------------------------------

def work(name, n_cases):
    "In a process of its own, for Triton reads its environment once: one part, its result as JSON."
    if name == "compile": wrong, figures = compile_all()
    else: wrong, figures = check("cuda" if name == "cuda" else "cpu", n_cases)
    if name == "cuda":
        import torch
        figures |= {"race": race(), "hardware": torch.cuda.get_device_name(0), "torch": torch.__version__}
    print(json.dumps({"wrong": wrong, **figures}))


def part(name, folder, n_cases):
    "Run a part; its result."
    path = [str(HERE.parent), *([str(folder)] if folder else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "TRITON_INTERPRET": "1" if name == "interpreter" else "0", "NEUROCODEC_TRITON": "1", "NEUROCODEC_QUIET": "1"}
    done = subprocess.run([sys.executable, __file__, "--worker", name, "--cases", str(n_cases)], env=env, capture_output=True, text=True)
    if done.returncode: return {"wrong": [f"{name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"]}
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", type=Path, help="a folder into which pip installed Triton (pip install --target)")
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--worker", choices=("interpreter", "compile", "cuda"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker: return work(a.worker, a.cases)
    folder = None if importlib.util.find_spec("triton") else a.triton
    if not (importlib.util.find_spec("triton") or folder and (folder / "triton").is_dir()):
        print("Triton's kernels: not compared, Triton is not installed here")
        return 0
    import torch
    results = {name: part(name, folder, a.cases) for name in ("interpreter", "compile", *(("cuda",) if torch.cuda.is_available() else ()))}
    wrong = [f"{name}: {w}" for name, r in results.items() for w in r["wrong"]]
    for w in wrong[:20]: print(w, file=sys.stderr)
    said = [f"{r['cases']} cases {'in the interpreter' if name == 'interpreter' else 'on ' + r['hardware']} (largest difference {r['worst']['Triton']:.2f} of what rounding "
            f"can explain, torch's {r['worst']['torch']:.2f}; {r['caught']} of {r['of']} wrong answers caught)" for name, r in results.items() if "cases" in r]
    if "made" in results["compile"]: said.append(f"{results['compile']['made']} compiled for {' and '.join(chip for _, chip in TARGETS)}, without atomics")
    print(f"Triton's kernels: {'; '.join(said)}: {'agree' if not wrong else f'{len(wrong)} DISAGREE'}")
    if "race" in (cuda := results.get("cuda", {})):
        for r in cuda["race"]:
            print("d = {}, F = {}, k = {}, batch = {}".format(*r["size"]))
            for name, ms in r["ms"].items(): print(f"  {name:28} torch {ms['torch']:8.3f} ms   Triton {ms['triton']:8.3f} ms   {ms['torch'] / ms['triton']:.2f} x")
        found = {"hardware": cuda["hardware"], "torch": cuda["torch"], "made": time.strftime("%Y-%m-%d"), "sizes": cuda["race"]}
        (HERE / "measured").mkdir(exist_ok=True)
        (HERE / "measured" / "kernels.json").write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
