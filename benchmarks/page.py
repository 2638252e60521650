"""Make the book's page on speed from what the benchmarks measured: `python benchmarks/page.py` writes book/speed.md and its figures."""
import json
from pathlib import Path

import matplotlib.pyplot as plt

from neurocodec.core.run import COLOURS, GREY, figure_style

HERE = Path(__file__).resolve().parent
BOOK = HERE.parent / "book"
TARGETS = {"SAELens": 6., "sparsify": 2.5}  # at 768 x 7680, CPU
PRODUCT = 1.5                                # ours over the encoder's product


def read(name):
    path = HERE / "measured" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(found):
    "Milliseconds and ratios of every contender at every size."
    lines = ["| d × F, k | contender | ms a step, median | fastest to slowest | times ours | memory, MB |", "|---|---|---|---|---|---|"]
    for s in found["sizes"]:
        own = s["contenders"]["ours"]["ms"]
        for name, r in s["contenders"].items():
            label = {"matmul": "encoder product alone, float32", "dense": "dense formula, fused Adam"}.get(name, name)
            lines.append(f"| {s['size'][0]} × {s['size'][1]:,}, {s['size'][2]} | {label} | {r['ms']:.1f} | {r['low']:.1f} to {r['high']:.1f} | {r['ms'] / own:.2f} | {r['mb']:,.0f} |")
    return "\n".join(lines)


def verdicts(found):
    "Target, measured and verdict at 768 x 7680."
    at = next(s["contenders"] for s in found["sizes"] if s["size"][:2] == [768, 7680])
    rows = [(f"{name}'s step takes at least {want:g} times ours", at[name]["ms"] / at["ours"]["ms"], want, True) for name, want in TARGETS.items() if name in at]
    rows.append((f"ours takes at most {PRODUCT:g} times the encoder's product in float32", at["ours"]["ms"] / at["matmul"]["ms"], PRODUCT, False))
    lines = ["| target at 768 × 7,680, k = 64, batch 2,048, and there only | measured | verdict |", "|---|---|---|"]
    return "\n".join(lines + [f"| {what} | {value:.2f} | {'met' if value == want or (value > want) == more else 'missed'} |" for what, value, want, more in rows]
                     + ["", *([reason(found)] if any(value != want and (value > want) != more for _, value, want, more in rows) else [])])


def reason(found):
    "Why a target is missed, from the parts of a step."
    parts = found["parts"]
    total, product = sum(parts.values()), parts["encoder's product"]
    return (f"What is missed is missed because the encoder's product takes {product / total:.0%} of our step, and it is the same product for everybody: "
            f"if all the rest cost nothing, the step would take {product:.0f} ms instead of {total:.0f}.")


def draw(found, path):
    "Cost against tokens, features and k, each on log-log axes."
    figure_style()
    fig, axes = plt.subplots(1, 3, figsize=(9, 3), sharey=True)
    for ax, (name, label) in zip(axes, (("batch", "tokens in the batch"), ("f", "features F"), ("k", "active features k"))):
        x, y = zip(*found["scaling"][name]["points"])
        ax.plot(x, [v * y[0] / x[0] for v in x], color=GREY, ls="--", lw=1, label="proportional")
        ax.plot(x, y, "o-", color=COLOURS[0], label="ours")
        ax.set(xscale="log", yscale="log", xlabel=label, xticks=x, title=f"slope {found['scaling'][name]['slope']:.2f}")
        ax.set_xticks(x, [f"{v:,}" for v in x], fontsize=8)
        ax.minorticks_off()
    axes[0].set_ylabel("ms a step")
    axes[0].legend()
    fig.savefig(path)
    plt.close(fig)


def parts(found):
    "Where the milliseconds of a step go."
    total = sum(found["parts"].values())
    step = next(s["contenders"]["ours"]["ms"] for s in found["sizes"] if s["size"][:2] == [768, 7680])
    if not .8 < total / step < 1.25: raise SystemExit(f"benchmarks/measured/cpu.json: the parts of a step add up to {total:.0f} ms, the step takes {step:.0f}; measure again on a quiet machine")
    return "\n".join(["| part of a step at 768 × 7,680 | ms | share |", "|---|---|---|"] + [f"| {k} | {v:.1f} | {v / total:.0%} |" for k, v in found["parts"].items()])


def kernels(found):
    "Our Triton kernels beside torch's operators."
    lines = [f"{found['hardware']}, torch {found['torch']}, {found['made']}: the two sparse operations as Triton's kernels and as torch's operators.", "",
             "| d × F, k, batch | operation | torch, ms | Triton, ms | ratio |", "|---|---|---|---|---|"]
    for s in found["sizes"]:
        d, f, k, batch = s["size"]
        lines += [f"| {d} × {f:,}, {k}, {batch:,} | {name} | {ms['torch']:.3f} | {ms['triton']:.3f} | {ms['torch'] / ms['triton']:.2f} |" for name, ms in s["ms"].items()]
    return "\n".join(["", *lines])


def main():
    cpu, cuda, quality, triton = read("cpu"), read("cuda"), read("quality"), read("kernels")
    if not cpu: raise SystemExit("benchmarks/measured/cpu.json: missing; `make bench` makes it")
    (BOOK / "_static").mkdir(exist_ok=True)
    draw(cpu, BOOK / "_static" / "speed.svg")
    text = ["# Speed", "What one training step of a TopK dictionary costs, beside two widely used trainers on the same machine. `make bench` measures it again on yours; "
            "contenders take turns within one run, so the ratios are worth more than the milliseconds.", "",
            f"{cpu['hardware']}, {cpu['threads']} threads, torch {cpu['torch']}, {cpu['made']}. SAELens 6.54.12 steps through its own `SAETrainer.step`; "
            "sparsify 1.3.3 through its model with the steps of its trainer, and with a fused Adam that its trainer does not use."
            + ("" if "SAELens, sparse" in cpu["sizes"][1]["contenders"] else " SAELens with sparse activations does not run here, because its sparse product has no backward pass on a CPU."), "", verdicts(cpu), "", table(cpu), "",
            "## Where the time goes", "", parts(cpu), "",
            "Which features are largest cannot be known without looking at all of them. Where the processor multiplies bfloat16 in hardware the look is taken in bfloat16, "
            "with a bound on its error, and the few features that may be among the largest are computed again in float32; *selection* holds that too. "
            "The product alone, against which the whole step is judged, is the one in float32. See [10 · sparse](../nbs/10_sparse.ipynb).", "",
            "## How it grows", "", "![Milliseconds a step against tokens, features and k](_static/speed.svg)", "",
            "At d = 512, from 1,024 tokens, 8,192 features and k = 32, one of them varied. Dashed: proportional growth.", "",
            "## The same mathematics", "", "Over {steps} steps of a whole training our loss and that of the dense formula differ by at most {largest_relative_difference:.1e}, relatively. Both start equal to rounding; where two features are almost tied, rounding decides, and from there the two trainings part.".format(**cpu["loss_curve"]), ""]
    if quality:
        text += [f"Over {len(quality['seeds'])} seeds and {quality['steps']:,} steps on `{quality['run']}`, layer {quality['layer']}, with the same order of the data and the same learning rate:", "",
                 "| seed | EV, ours | EV, SAELens | loss recovered, ours | SAELens | dead, ours | SAELens | seconds, ours | SAELens |", "|---|---|---|---|---|---|---|---|---|"]
        text += [f"| {r['seed']} | " + " | ".join(f"{r[k][w]:.4f}" for k in ("ev", "ce_recovered", "dead") for w in ("ours", "SAELens")) + f" | {r['seconds']['ours']:.0f} | {r['seconds']['SAELens']:.0f} |" for r in quality["seeds"]]
        text += ["", "EV is the explained variance of held-out rows, *loss recovered* the share of the model's loss that splicing the reconstruction in recovers against zeros, *dead* the share of features that did not fire on the held-out rows; "
                 "each trains by its own rules for dead features.", "", "Mean difference: " + ", ".join(f"{k} {g:+.2%}" for k, g in quality["gaps"].items()) + "; the target is one per cent.", ""]
    text += ["## On a GPU", ""]
    text += [f"{cuda['hardware']}, torch {cuda['torch']}, {cuda['made']}.", "", table(cuda)] if cuda else ["Not measured: no GPU was at hand. `make bench DEVICE=cuda` does it, against sparsify's Triton kernels."]
    if triton: text += [kernels(triton)]
    (BOOK / "speed.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__": main()
