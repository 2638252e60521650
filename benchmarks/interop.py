"""Files across the border: what we write, read by SAELens and sparsify themselves; what they write, read by us.

    python benchmarks/interop.py --peers PATH/TO/python    # a Python that has sae-lens and eai-sparsify

Two processes, for the peers pin other versions than we do: this one, and the same file started by the peers' Python. Vectors and
reconstructions pass between them as safetensors. Prints a table; exit code 1 where a reconstruction differs by more than 1e-5.
"""
import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

D, F, K, ROWS, TOLERANCE = 64, 512, 16, 256, 1e-5


def far(got, want):
    "Largest difference within a vector over the root mean square, at the 99th percentile of vectors (rounding may decide who is among the k largest)."
    return float(((got - want).abs().max(1).values / want.square().mean().sqrt()).quantile(.99))


# ---------------------------------------------------------------- in the peers' environment

def shake(module, seed):
    "No parameter at its starting value, decoder rows of different lengths, thresholds positive."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            noise = torch.randn(p.shape, generator=g)
            if "threshold" in name: p.copy_(.5 + .3 * noise.abs())
            else: p.add_(noise * (.3 if p.ndim == 1 else .1))
        if getattr(module, "topk_threshold", None) is not None: module.topk_threshold.fill_(.7)


def as_peer(place):
    from importlib.metadata import version

    import sae_lens
    from sae_lens import saes
    from sparsify import SparseCoder, SparseCoderConfig
    x, out = load_file(place / "x.safetensors")["x"], {}
    with torch.no_grad():
        for at in sorted((place / "ours").iterdir()):
            if at.name.startswith("sparsify"): out[f"ours/{at.name}"] = SparseCoder.load_from_disk(at)(x).sae_out
            else: out[f"ours/{at.name}"] = sae_lens.SAE.load_from_disk(at)(x)
        common = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
        theirs = {
            "standard": (saes.StandardSAE, saes.StandardSAEConfig, {}),
            "standard, not centred": (saes.StandardSAE, saes.StandardSAEConfig, {"apply_b_dec_to_input": False}),
            "topk": (saes.TopKSAE, saes.TopKSAEConfig, {"k": K}),
            "topk, norms": (saes.TopKSAE, saes.TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
            "topk, layer norm": (saes.TopKSAE, saes.TopKSAEConfig, {"k": K, "normalize_activations": "layer_norm"}),
            "topk, constant norm": (saes.TopKSAE, saes.TopKSAEConfig, {"k": K, "normalize_activations": "constant_norm_rescale"}),
            "jumprelu": (saes.JumpReLUSAE, saes.JumpReLUSAEConfig, {"apply_b_dec_to_input": False}),
            "gated": (saes.GatedSAE, saes.GatedSAEConfig, {}),
        }
        for i, (name, (make, config, more)) in enumerate(theirs.items()):
            sae = make(config(**common, **more))
            shake(sae, i)
            sae.save_model(place / "theirs" / f"SAELens {name}")
            out[f"theirs/SAELens {name}"] = sae(x)
        for name, (make, config) in {"topk": (saes.TopKTrainingSAE, saes.TopKTrainingSAEConfig), "batchtopk": (saes.BatchTopKTrainingSAE, saes.BatchTopKTrainingSAEConfig)}.items():
            sae = make(config(**common, k=K))
            shake(sae, 20)
            sae.save_inference_model(at := place / "theirs" / f"SAELens {name}, as trained")
            out[f"theirs/{at.name}"] = sae_lens.SAE.load_from_disk(at)(x)
        coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K))
        shake(coder, 30)
        coder.save_to_disk(place / "theirs" / "sparsify topk")
        out["theirs/sparsify topk"] = coder(x).sae_out
    save_file({k: v.contiguous() for k, v in out.items()}, place / "peers.safetensors",
              metadata={"peers": f"sae-lens {version('sae-lens')}, eai-sparsify {version('eai-sparsify')}, torch {torch.__version__}"})


# ---------------------------------------------------------------- in ours

def write_ours(place):
    "One dictionary of every kind, and one of OpenAI's that normalises at run time; returns their reconstructions."
    from neurocodec.sae.dictionary import KINDS, DictionaryConfig, create_dictionary
    from neurocodec.sae.formats import Foreign, fold, write_saelens, write_sparsify
    g = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, D, generator=g) * 2 + .5
    made = {}
    for kind in KINDS:
        d = create_dictionary(DictionaryConfig(kind, D, F, K), x, seed=1)
        with torch.no_grad():
            d.b_enc.add_(.2 * torch.randn(F, generator=g))
            if kind == "batchtopk": d.threshold.fill_(1.)
            if kind == "gated": d.r_mag_F.add_(.2 * torch.randn(F, generator=g)), d.b_mag_F.add_(.2 * torch.randn(F, generator=g))
        made[f"SAELens {kind}"] = d
    plain = made["SAELens topk"]
    t = (plain.W_enc.detach(), plain.W_dec.detach(), plain.b_enc.detach(), plain.b_dec.detach())
    made |= {f"SAELens topk, {how.replace('_', ' ')}": fold(Foreign("topk", *t, k=K, per_token=how)) for how in ("layer_norm", "constant_norm")}
    for name, d in made.items(): write_saelens(place / "ours" / name, d, firing_F=torch.rand(F, generator=g))
    write_sparsify(place / "ours" / "sparsify topk", plain)
    save_file({"x": x}, place / "x.safetensors")
    with torch.no_grad(): return x, {name: d(x) for name, d in (made | {"sparsify topk": plain}).items()}


def main():
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("--peers", default=sys.executable, help="Python with sae-lens and eai-sparsify (default: this one)")
    top.add_argument("--as-peer", type=Path, help=argparse.SUPPRESS)
    a = top.parse_args()
    torch.set_num_threads(1)
    if a.as_peer: return as_peer(a.as_peer)
    from safetensors import safe_open

    from neurocodec.sae.formats import read_dictionary
    with tempfile.TemporaryDirectory() as tmp:
        place = Path(tmp)
        x, ours = write_ours(place)
        env = os.environ | {"SPARSIFY_DISABLE_TRITON": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([a.peers, __file__, "--as-peer", str(place)], capture_output=True, text=True, env=env)
        if done.returncode:
            print(f"the peers' side failed under {a.peers}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", file=sys.stderr)
            return 2
        peers = load_file(place / "peers.safetensors")
        with safe_open(place / "peers.safetensors", "pt") as f: print(f.metadata()["peers"])
        rows = [(name, "we write, they read", far(peers[f"ours/{name}"], want)) for name, want in ours.items()]
        for key in sorted(k for k in peers if k.startswith("theirs/")):
            with torch.no_grad(): rows.append((key.removeprefix("theirs/"), "they write, we read", far(read_dictionary(place / key)(x), peers[key])))
    print(f"\n{'format and kind':<32}{'way':<24}{'difference':>10}")
    for name, way, gap in rows: print(f"{name:<32}{way:<24}{gap:>10.1e}{'' if gap < TOLERANCE else '   more than ' + format(TOLERANCE, '.0e')}")
    bad = sum(not gap < TOLERANCE for *_, gap in rows)
    print(f"\n{len(rows) - bad} of {len(rows)} reconstruct the same {ROWS} vectors to {TOLERANCE:.0e}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
