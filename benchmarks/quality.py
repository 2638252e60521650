"""Do fast steps end as well as slow ones? Our TopK and SAELens' TopK on the same activations, for the same steps, over seeds.

    python benchmarks/quality.py --peers PATH/TO/python [--run results/nano] [--layer 2]

Both read the rows of a finished run's activation store in the same order, at unit mean square, with the same learning rate, warm-up and
decay, and are judged by chapter 14's evaluator on the run's confirm split. Writes benchmarks/measured/quality.json; exit code 1 where
explained variance or recovered loss differ by more than one per cent on average over seeds.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
K, WIDTH, BATCH, EVAL = 64, 10, 512, 20_000


def factor(step, steps, warm=.05, decay=.4): return min(1, (step + 1) / max(1, warm * steps), (steps - step) / max(1, decay * steps))


def saelens(place):
    "In the peers' environment: train, and save as SAELens does."
    import numpy as np
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer
    c = json.loads((place / "config.json").read_text())
    torch.manual_seed(c["seed"])
    x_ND, order = np.load(place / "x.npy", mmap_mode="r"), np.load(place / "order.npy", mmap_mode="r")
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=c["d"], d_sae=c["f"], k=c["k"], device="cpu", dtype="float32"))
    trainer = SAETrainer(SAETrainerConfig(total_training_samples=c["steps"] * BATCH, train_batch_size_samples=BATCH, lr=c["lr"], lr_end=c["lr"], device="cpu"), sae, data_provider=iter(()))
    with torch.no_grad(): sae.b_dec.copy_(torch.from_numpy(x_ND[order[:1 << 14]].mean(0)))  # both begin at the mean
    for step in range(c["steps"]):
        for g in trainer.optimizer.param_groups: g["lr"] = c["lr"] * factor(step, c["steps"])
        trainer.step(torch.from_numpy(x_ND[order[step * BATCH:(step + 1) * BATCH]]))
        trainer.n_training_steps += 1
    sae.save_inference_model(str(place / "sae"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", required=True)
    parser.add_argument("--run", default=str(HERE.parent / "results" / "nano"))
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    a = parser.parse_args()
    os.environ.setdefault("NEUROCODEC_QUIET", "1")
    import numpy as np

    from neurocodec.core.lm import LM
    from neurocodec.core.run import Folder, keep_memory
    from neurocodec.core.text import read_packed
    from neurocodec.sae.activations import Order, Store
    from neurocodec.sae.dictionary import DictionaryConfig
    from neurocodec.sae.formats import read_dictionary
    from neurocodec.sae.quality import evaluate, quality, some_contexts
    from neurocodec.sae.train import TrainConfig, auto_lr, train
    keep_memory()
    again, run = "make run", Path(a.run)
    store, texts = Store.open(Folder(run / "12_activations", again), a.layer), Folder(run / "02_text", again)
    lm = LM.load("nano")
    f, lr = WIDTH * store.d, auto_lr(WIDTH * store.d, a.steps)
    contexts = some_contexts(lm, read_packed(texts, "confirm"), EVAL)
    results = []
    for seed in range(a.seeds):
        with tempfile.TemporaryDirectory() as t:
            place, start = Path(t), time.perf_counter()
            ours = train(store, DictionaryConfig("topk", store.d, f, K), TrainConfig(n_tokens=a.steps * BATCH, batch=BATCH, lr=lr, seed=seed), place / "ours")
            seconds = {"ours": time.perf_counter() - start}
            np.save(place / "x.npy", store.rows(slice(None)).numpy() / np.float32(store.scale))
            np.save(place / "order.npy", Order(store.n, seed)(0, a.steps * BATCH))
            (place / "config.json").write_text(json.dumps({"d": store.d, "f": f, "k": K, "lr": lr, "steps": a.steps, "seed": seed}))
            start = time.perf_counter()
            subprocess.run([a.peers, __file__, "--worker", str(place)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds["SAELens"] = time.perf_counter() - start
            theirs = read_dictionary(place / "sae").fold_scale(store.scale)
            q = quality(evaluate(lm, contexts, a.layer, {"sae": ours, "SAELens": theirs, "zero": torch.zeros_like}), 500, seed)
        row = {"seed": seed, "seconds": seconds, **{k: {"ours": q[k].value, "SAELens": q[f"{k}.SAELens"].value} for k in ("ev", "ce_recovered")}, "dead": {"ours": q["dead"].value, "SAELens": q["dead.SAELens"].value}}
        results.append(row)
        print(f"seed {seed}: " + "   ".join(f"{k} {row[k]['ours']:.4f} (SAELens {row[k]['SAELens']:.4f})" for k in ("ev", "ce_recovered", "dead")) + "   {ours:.0f} s ({SAELens:.0f} s)".format(**seconds))
    gaps = {k: float(np.mean([r[k]["ours"] / r[k]["SAELens"] - 1 for r in results])) for k in ("ev", "ce_recovered")}
    for k, g in gaps.items(): print(f"{k}: ours is {g:+.2%} of SAELens', mean of {a.seeds} seeds")
    (HERE / "measured").mkdir(exist_ok=True)
    (HERE / "measured" / "quality.json").write_text(json.dumps({"run": run.name, "layer": a.layer, "steps": a.steps, "batch": BATCH, "k": K, "features": f, "lr": lr, "seeds": results, "gaps": gaps}, indent=1) + "\n")
    sys.exit(any(abs(g) > .01 for g in gaps.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]: saelens(Path(sys.argv[2]))
    else: main()
