"""One training step of a TopK dictionary, timed against SAELens and sparsify on the same machine.

    python benchmarks/sae_step.py --peers PATH/TO/python [--device cuda] [--quick]

Every contender is a process of its own, started once per size; they take turns, a few steps each, because a machine is never quite
alone, and what is compared are medians. A step is what the library's own trainer does with a batch: forward, backward, clipping,
constraints, optimiser, bookkeeping. Writes benchmarks/measured/<device>.json, from which `benchmarks/page.py` makes a page of the book.
"""
import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SIZES = ((256, 2560, 32), (768, 7680, 64), (768, 24576, 32))  # (d, F, k)
BATCH = 2048
HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------- the contenders: each returns a function that does one step

def ours(d, f, k, batch, device, kind="topk"):
    from neurocodec.sae.activations import write_store
    from neurocodec.sae.dictionary import DictionaryConfig
    from neurocodec.sae.train import TrainConfig, Trainer
    store = write_store(tempfile.mkdtemp(), rows(d, 4 * batch), dtype="float32")
    trainer = Trainer(store, DictionaryConfig(kind, d, f, k), TrainConfig(n_tokens=10_000 * batch, batch=batch, device=device))
    batches = rows(d, 4 * batch).to(trainer.device).split(batch)
    return lambda i: trainer.advance(batches[i % 4])


def matmul(d, f, k, batch, device):
    "The encoder's product alone, into memory that is there already: no exact top-k can do with less."
    x_BD, W_FD, b_F, out_BF = rows(d, batch).to(device), rows(d, f).to(device), torch.zeros(f, device=device), torch.empty(batch, f, device=device)
    return lambda i: torch.addmm(b_F, x_BD, W_FD.T, out=out_BF)


def dense(d, f, k, batch, device):
    "The formula as one would write it: scatter into (B, F), a dense decoder, autograd; fused Adam, so that only the mathematics differs."
    step = dense_step(d, f, k, device)
    batches = rows(d, 4 * batch).to(device).split(batch)
    return lambda i: step(batches[i % 4])


def saelens(d, f, k, batch, device, sparse=False):
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=f, k=k, device=device, dtype="float32", use_sparse_activations=sparse))
    config = SAETrainerConfig(total_training_samples=10_000 * batch, train_batch_size_samples=batch, lr_end=3e-4, device=device)
    batches = rows(d, 4 * batch).to(device).split(batch)
    trainer = SAETrainer(config, sae, data_provider=iter(()))

    def step(i):
        trainer.step(batches[i % 4])
        trainer.n_training_steps += 1
    return step


def saelens_sparse(*size): return saelens(*size, sparse=True)


def sparsify(d, f, k, batch, device):
    from sparsify import SparseCoder, SparseCoderConfig
    torch.manual_seed(0)
    sae = SparseCoder(d, SparseCoderConfig(num_latents=f, k=k), device=device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4 / (f / 2**14) ** .5, fused=True)  # their trainer's is not fused; this favours them
    since = torch.zeros(f, dtype=torch.long, device=device)
    batches = rows(d, 4 * batch).to(device).split(batch)

    def step(i):
        sae.set_decoder_norm_to_unit_norm()
        out = sae(batches[i % 4], dead_mask=since > 10_000_000)
        fired = torch.zeros(f, dtype=torch.bool, device=device)
        fired[out.latent_indices.flatten()] = True
        (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step(); optimizer.zero_grad()
        since.add_(batch); since[fired] = 0
        return float(out.fvu.detach())
    return step


CONTENDERS = {"ours": (ours, False), "matmul": (matmul, False), "dense": (dense, False),  # True: in the peers' environment
              "SAELens": (saelens, True), "SAELens, sparse": (saelens_sparse, True), "sparsify": (sparsify, True)}


def rows(d, n):
    "The same rows for everybody: sums of a few of many directions, with noise."
    g = torch.Generator().manual_seed(0)
    W_FD = torch.nn.functional.normalize(torch.randn(4 * d, d, generator=g), dim=1)
    which = torch.randint(0, 4 * d, (n, 20), generator=g)
    return torch.nn.functional.embedding_bag(which, W_FD, per_sample_weights=.5 + torch.rand(n, 20, generator=g), mode="sum") + .1 * torch.randn(n, d, generator=g)


def dense_step(d, f, k, device="cpu", start=None, lr=None):
    "A step on a batch by the dense formula, from the given parameters; returns the loss."
    g = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(f, d, generator=g), dim=1)
    p = {"W_enc": W_dec.clone(), "b_enc": torch.zeros(f), "b_dec": torch.zeros(d), "W_dec": W_dec} if start is None else start
    p = {n: torch.nn.Parameter(t.clone().to(device)) for n, t in p.items()}
    optimizer = torch.optim.Adam(p.values(), lr=lr or 2e-4 / (f / 2**14) ** .5, eps=1e-10, fused=True)

    def step(x):
        pre = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
        top = pre.topk(k, sorted=False)
        loss = (torch.zeros_like(pre).scatter(1, top.indices, top.values.relu()) @ p["W_dec"] + p["b_dec"] - x).square().mean()
        loss.backward()
        with torch.no_grad():
            W, G = p["W_dec"], p["W_dec"].grad
            G -= (G * W).sum(1, keepdim=True) * W
            torch.nn.utils.clip_grad_norm_(p.values(), 1.)
            optimizer.step(); optimizer.zero_grad()
            W /= W.norm(dim=1, keepdim=True)
        return loss.item()
    return step


# ---------------------------------------------------------------- a contender at work

def sync(device):
    if device == "cuda": torch.cuda.synchronize()


def keep_memory():
    "Freed memory is kept, for everybody: what the operating system has to zero again is nobody's merit or fault."
    libc = __import__("ctypes").CDLL(None)
    if hasattr(libc, "mallopt"): libc.mallopt(-3, 1 << 25), libc.mallopt(-1, 1 << 30)


def work(name, d, f, k, batch, device):
    "Read numbers of steps from stdin, write their times."
    keep_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step, done = CONTENDERS[name][0](d, f, k, batch, device), 0
    for line in sys.stdin:
        times = []
        step(done)  # a turn's first step fetches back what the machine took away while the others had theirs
        for _ in range(int(line)):
            sync(device); start = time.perf_counter()
            step(done); done += 1
            sync(device); times.append(1e3 * (time.perf_counter() - start))
        peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(json.dumps({"ms": times, "mb": peak}), flush=True)


class Worker:
    def __init__(self, name, python, size, batch, device, threads):
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "NEUROCODEC_QUIET": "1"}
        argv = [python, str(HERE / "sae_step.py"), "--worker", name, *map(str, size), str(batch), device]
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True)

    def steps(self, n):
        try: self.process.stdin.write(f"{n}\n"); self.process.stdin.flush()
        except BrokenPipeError: return None
        while (line := self.process.stdout.readline()) and not line.startswith('{"ms"'): pass
        return json.loads(line) if line else None

    def close(self):
        self.process.kill(); self.process.wait()
        self.errors.seek(0)
        return (self.errors.read().strip().splitlines() or ["no message"])[-1]


def race(size, batch, device, threads, peers, rounds, names=CONTENDERS):
    "Milliseconds a step and peak memory of every contender that starts."
    pythons = {n: (peers if CONTENDERS[n][1] else sys.executable) for n in names}
    workers = {n: Worker(n, p, size, batch, device, threads) for n, p in pythons.items() if p}
    times, out = {n: [] for n in workers}, {}
    for n, w in list(workers.items()):
        if w.steps(2) is None: print(f"  {n} does not run here: {workers.pop(n).close()}")
    for _ in range(rounds):
        for n, w in workers.items(): times[n] += (last := w.steps(2 if n.startswith("SAELens") or n == "dense" else 4))["ms"]; out[n] = last["mb"]
    for w in workers.values(): w.close()
    return {n: {"ms": statistics.median(times[n]), "low": min(times[n]), "high": max(times[n]), "n": len(times[n]), "mb": out[n]} for n in workers}


# ---------------------------------------------------------------- our own step, looked at closely

WITHIN = {"encoder's product": ("preactivations", "_rough"), "sorting by feature": ("by_feature",)}  # counted wherever they are called
PARTS = {"selection": ("largest",), "decoding and gradients, sparse": ("bag", "dots"), "Adam": ("step",),
         "unit decoder rows, parallel gradient": ("normalize_decoder", "remove_parallel_gradient")}  # with what they call


def breakdown(size, batch, steps=15):
    "Milliseconds a step in each part, medians; the last part is the rest."
    from neurocodec.sae import dictionary, sparse
    rest = "losses, statistics and the rest"
    spent, at, since = {p: 0. for p in [*WITHIN, *PARTS, rest]}, [rest], [0.]

    def switch():
        now = time.perf_counter()
        spent[at[-1]] += 1e3 * (now - since[0])
        since[0] = now

    def timed(part, function):
        def inner(*args, **more):
            if part in PARTS and at[-1] != rest: return function(*args, **more)
            switch(); at.append(part)
            try: return function(*args, **more)
            finally: switch(); at.pop()
        return inner

    places = (sparse, dictionary, dictionary.Dictionary, torch.optim.Adam)
    for part, names in (WITHIN | PARTS).items():
        for place in places:
            for name in names:
                if name in vars(place) and (name != "step" or place is torch.optim.Adam): setattr(place, name, timed(part, vars(place)[name]))
    sparse.Support.by_feature.func = timed("sorting by feature", sparse.Support.by_feature.func)
    step = ours(*size, batch, "cpu")
    for i in range(3): step(i)
    each = []
    for i in range(steps):
        spent.update(dict.fromkeys(spent, 0.)); since[0] = time.perf_counter()
        step(i); switch()
        each.append(dict(spent))
    return {p: statistics.median(s[p] for s in each) for p in spent}


def scaling(device, threads, quick):
    "Milliseconds of our step against tokens in the batch, features and k, and the slope of each on log-log axes."
    base, out = {"batch": 1024, "f": 8192, "k": 32}, {}
    grid = {"batch": (256, 512, 1024, 2048, 4096), "f": (2048, 4096, 8192, 16384, 32768), "k": (8, 16, 32, 64, 128)}
    for name, values in grid.items():
        points = []
        for v in values[1:4] if quick else values:
            at = base | {name: v}
            points.append((v, race((512, at["f"], at["k"]), at["batch"], device, threads, None, 3, ("ours",))["ours"]["ms"]))
        x, y = torch.tensor(points).double().log().T
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
        out[name] = {"points": points, "slope": slope}
        print(f"  against {name}: slope {slope:.2f}   " + "  ".join(f"{v}: {ms:.1f} ms" for v, ms in points))
    return out


def loss_curves(steps=500, d=128, f=1024, k=16, batch=256):
    "The largest relative difference between our loss and the dense formula's over a whole training, from one start."
    from neurocodec.sae.dictionary import DictionaryConfig, create_dictionary
    data = rows(d, 16 * batch)
    data /= data.square().mean().sqrt()
    start = create_dictionary(DictionaryConfig("topk", d, f, k, aux=0.), data, 0)
    step = dense_step(d, f, k, start={n: p.detach() for n, p in start.named_parameters()}, lr=1e-3)
    optimizer, gap = torch.optim.Adam(start.parameters(), lr=1e-3, eps=1e-10, fused=True), 0.
    for i in range(steps):
        x = data[i % 16 * batch:][:batch]
        out = start.loss(x)
        out.loss.backward()
        start.step(optimizer, 1.)
        gap = max(gap, abs(out.loss.item() / step(x) - 1))
    return {"steps": steps, "largest_relative_difference": gap}


# ----------------------------------------------------------------

def hardware(device):
    if device == "cuda": return torch.cuda.get_device_name(0)
    try: model = next(line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo", encoding="utf8") if line.startswith("model name"))
    except (OSError, StopIteration): model = platform.processor()
    return model or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="a Python that has sae-lens and eai-sparsify; without it only our own step is timed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="fewer rounds and points")
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker: return work(a.worker[0], *map(int, a.worker[1:5]), a.worker[5])
    if a.device == "cuda" and not torch.cuda.is_available(): sys.exit("no CUDA device here; --device cpu measures this machine")
    found = {"device": a.device, "hardware": hardware(a.device), "threads": a.threads, "torch": torch.__version__, "batch": BATCH, "sizes": [], "made": time.strftime("%Y-%m-%d")}
    print(f"{found['hardware']}, {a.threads} threads, torch {torch.__version__}, batch {BATCH}")
    for size in SIZES:
        print("d = {}, F = {}, k = {}".format(*size))
        result = race(size, BATCH, a.device, a.threads, a.peers, 3 if a.quick else 7)
        for n, r in result.items(): print(f"  {n:16} {r['ms']:9.1f} ms  [{r['low']:.1f}, {r['high']:.1f}]  {r['ms'] / result['ours']['ms']:6.2f} x ours  {r['mb']:8.0f} MB")
        found["sizes"].append({"size": size, "contenders": result})
    if a.device == "cpu":
        torch.set_num_threads(a.threads)
        keep_memory()
        found["parts"] = breakdown(SIZES[1], BATCH)
        found["loss_curve"] = loss_curves()
        print("loss against the dense formula over {steps} steps: largest relative difference {largest_relative_difference:.1e}".format(**found["loss_curve"]))
    found["scaling"] = scaling(a.device, a.threads, a.quick)
    (HERE / "measured").mkdir(exist_ok=True)
    (HERE / "measured" / f"{a.device}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main()
