"""The run engine end to end, on a model this project never saw: three lines of YAML, kills at random, failures, bad input."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

NEUROCODEC = str(Path(sys.executable).parent / "neurocodec")
UNTIL = "quality"
# what a small machine can do in seconds; the chapters' own defaults are nearly that small already
TINY = {"12_activations": {"n_tokens": 20_000}, "13_train": {"n_tokens": 20_000}}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A folder with a small GPT-2 and a corpus of two domains, both made here."""
    top = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(1)
    tok = PreTrainedTokenizerFast.from_pretrained(ROOT / "neurocodec" / "data" / "nano")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_positions=256, n_embd=48, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(top / "model")
    tok.save_pretrained(top / "model")
    words = "array tensor axis shape value returns index the of and with from each matrix vector sum mean norm sparse dense".split()
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(20, 90))), "domain": "sympy" if i % 10 == 0 else "made"}) for i in range(3600)]
    (top / "texts.jsonl").write_text("\n".join(lines))
    return top


def yaml_of(foreign, path, **more):
    path.write_text(f"model: {foreign / 'model'}\nlayers: [1]\ncorpus: file:{foreign / 'texts.jsonl'}\n" + (f"chapters: {json.dumps(more['chapters'])}\n" if more else ""))
    return path


def run(*argv, results, **env):
    return subprocess.run([NEUROCODEC, "run", *map(str, argv)], cwd=results.parent, capture_output=True, text=True,
                          env=os.environ | {"NEUROCODEC_RESULTS": str(results)} | env, timeout=1500)


def outputs(results):
    """Digests of every artefact of a run, as its manifests list them."""
    return {p.parent.name + (p.parent.parent.name if p.parent.parent.name.startswith("L") else ""): json.loads(p.read_text())["outputs"]
            for p in results.glob("*/**/manifest.json") if ".part" not in str(p) and ".old" not in str(p)}


@pytest.fixture(scope="module")
def whole(foreign, tmp_path_factory):
    """The results folder of a whole run of three lines of YAML; tests that change it copy it."""
    top = tmp_path_factory.mktemp("whole")
    done = run(yaml_of(foreign, top / "mine.yaml"), results=top / "r")
    assert done.returncode == 0, done.stdout + done.stderr
    return top / "r"


def test_three_lines_of_yaml(foreign, whole, tmp_path):
    params = yaml_of(foreign, tmp_path / "mine.yaml")
    metrics = json.loads((whole / "mine" / "L1" / "14_quality" / "metrics.json").read_text())
    assert metrics["l0"] > 0 and -1 < metrics["ev"] <= 1
    again = run(params, results=whole)
    assert again.returncode == 0 and "▸" not in again.stdout, "nothing changed, nothing runs"
    shutil.copytree(whole, tmp_path / "r")
    changed = run(params, "-p", "k=16", "--until", "train", results=tmp_path / "r")
    assert "▸ L1/13_train" in changed.stdout and "▸ 12_activations" not in changed.stdout, changed.stdout


def test_killed_five_times_ends_the_same(foreign, whole, tmp_path):
    params = yaml_of(foreign, tmp_path / "mine.yaml")
    results, rng = tmp_path / "killed", random.Random(7)
    top = results / "mine"
    # by what has begun and not by the clock, so that a fast machine is killed as often as a slow one
    for begun in (results, top / ".02_text.part", top / ".12_activations.part", top / "L1" / ".13_train.part", top / "L1" / ".14_quality.part"):
        child = subprocess.Popen([NEUROCODEC, "run", params, "--until", UNTIL], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                 env=os.environ | {"NEUROCODEC_RESULTS": str(results)}, start_new_session=True)
        while not begun.exists() and child.poll() is None: time.sleep(.01)
        time.sleep(rng.random())
        assert child.poll() is None, f"ended before it could be killed in {begun.name}"
        if rng.random() < .5: os.killpg(child.pid, signal.SIGKILL)  # everything at once, as a machine that goes down
        else: child.kill()  # only the command; what it started must not live on
        child.wait()
    last = run(params, "--until", UNTIL, results=results)
    assert last.returncode == 0, last.stdout + last.stderr
    straight, made = outputs(whole), outputs(results)
    assert made.keys() == {"02_text", "12_activations", "13_trainL1", "14_qualityL1"} and made == {k: straight[k] for k in made}


def test_a_failing_node_leaves_its_notebook_and_the_others_alone(foreign, tmp_path):
    params = yaml_of(foreign, tmp_path / "mine.yaml", chapters={"02_text": {"text_column": "body"}})
    params.write_text(params.read_text() + "skip: [11_dictionary, 30_concepts]\n")  # they need nothing from it either
    done = run(params, results=tmp_path / "r")
    assert done.returncode == 2
    assert "no text under key 'body'" in done.stdout and "Traceback" not in done.stdout + done.stderr
    failed = tmp_path / "r" / "mine" / "02_text.failed.ipynb"
    assert "UserError" in failed.read_text()
    assert (tmp_path / "r" / "mine" / "10_sparse" / "manifest.json").exists(), "a node that needs nothing from it went on"
    assert not (tmp_path / "r" / "mine" / "02_text").exists(), "nothing half-written"


def spoil(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("text, says", [
    ("modle: x", "unknown key 'modle'; valid keys are run, model"),
    ("layers: [0]\nmodel: ./nowhere", "no folder"),
    ("layers: [0]\nmodel: nano\nchapters: {13_train: {kk: 3}}", "unknown key 'kk'; valid keys are"),
    ("layers: [0]\nmodel: nano\nchapters: {13_train: {k: many}}", "expected int"),
    ("layers: [9]\nmodel: nano", "9 is out of range; nano has blocks 0 to 5"),
    ("run: ..\nlayers: [1]", "letters, digits"),
    ("layers: [1, 1]", "every block once"),
    ("layers: [1]\nseed: -1", "greater than or equal to 0"),
    ("layers: [1]\nskip: [14_qualty]", "no chapter '14_qualty'"),
])
def test_bad_parameters_are_one_line(text, says, tmp_path):
    (tmp_path / "p.yaml").write_text(text)
    done = run("p.yaml", results=tmp_path / "r")
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "r" / "p").exists()


@pytest.mark.parametrize("options", [("02_text", "-p", "foo"), ("02_text", "-p", "nope=1"), ("13_train", "--params", "params/nano.yaml")])
def test_bad_options_of_a_node_are_one_line(options):
    done = subprocess.run([sys.executable, "-m", "neurocodec.core.engine", *options], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_corpus_of_few_documents_is_one_line(foreign, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join((foreign / "texts.jsonl").read_text().splitlines()[:20]))
    (tmp_path / "p.yaml").write_text(f"model: {foreign / 'model'}\nlayers: [1]\ncorpus: file:{few}\n")
    done = run("p.yaml", "--until", "text", results=tmp_path / "r")
    assert done.returncode == 2 and "documents are too few" in done.stdout and not (tmp_path / "r" / "p" / "02_text").exists(), done.stdout


def test_a_corrupted_model_is_one_line(foreign, tmp_path):
    shutil.copytree(foreign / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "p.yaml").write_text(f"model: {tmp_path / 'model'}\nlayers: [1]\ncorpus: file:{foreign / 'texts.jsonl'}\n")
    done = run("p.yaml", "--until", "activations", results=tmp_path / "r")
    assert done.returncode == 2 and "safetensors file is damaged or cut short" in done.stdout and "Traceback" not in done.stdout + done.stderr, done.stdout


def test_an_empty_corpus_is_one_line(foreign, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "p.yaml").write_text(f"model: {foreign / 'model'}\nlayers: [1]\ncorpus: file:{tmp_path / 'empty.txt'}\n")
    done = run("p.yaml", "--until", "activations", results=tmp_path / "r")
    assert done.returncode == 2 and "no documents found" in done.stdout
    assert not (tmp_path / "r" / "p" / "02_text").exists()


def test_truncated_activations_are_found(foreign, whole, tmp_path):
    params = yaml_of(foreign, tmp_path / "mine.yaml")
    shutil.copytree(whole, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "mine" / "L1" / "13_train")
    store = tmp_path / "r" / "mine" / "12_activations" / "L1.bin"
    with open(store, "r+b") as f:
        f.truncate(store.stat().st_size // 2)
    done = run(params, "--until", "train", results=tmp_path / "r")
    assert done.returncode == 2 and "L1.bin" in done.stdout and "makes it again" in done.stdout, done.stdout
    assert not (tmp_path / "r" / "mine" / "L1" / "13_train").exists()
    again = run(params, "--until", "train", results=tmp_path / "r")  # and so it does
    assert again.returncode == 0 and "▸ 12_activations" in again.stdout and "▸ 02_text" not in again.stdout, again.stdout


def test_a_results_folder_that_cannot_be_written(foreign, tmp_path):
    (tmp_path / "r").write_text("a file where a folder should be")
    done = run(yaml_of(foreign, tmp_path / "mine.yaml"), results=tmp_path / "r")
    assert done.returncode == 2 and "cannot be written" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_full_disk_loses_nothing(foreign, whole, tmp_path):
    """On a file system of three megabytes the store does not fit; what was there stays, and room makes it go on."""
    place = tmp_path / "small"
    place.mkdir()
    def may(by): return shutil.which([*by, "mount"][0]) and subprocess.run([*by, "mount", "-t", "tmpfs", "-o", "size=3m,mode=1777", "tmpfs", place], capture_output=True).returncode == 0
    by = next((by for by in ([], ["sudo", "-n"]) if may(by)), None)
    if by is None: pytest.fail("needs the right to mount a tmpfs (run as root, with sudo, or in a user namespace: unshare -rm)")
    try:
        params = yaml_of(foreign, tmp_path / "mine.yaml", chapters={"12_activations": {"n_tokens": 60_000}})
        for part in ("02_text", ".done"): shutil.copytree(whole / "mine" / part, place / "r" / "mine" / part)
        done = run(params, "--until", "activations", results=place / "r")
        assert done.returncode == 2 and "no space" in (done.stdout + done.stderr).lower(), done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert not (place / "r" / "mine" / "12_activations").exists()
    finally:
        subprocess.run([*by, "umount", "-l", place])  # at once, whoever is still in it


def test_public_dictionaries_take_the_place_of_training(foreign, tmp_path):
    """One in sparsify's format, one in OpenAI's with its norm per vector: measured and compared as our own are."""
    W_FD = torch.nn.functional.normalize(torch.randn(96, 48, generator=torch.Generator().manual_seed(0)), dim=1)
    (folder := tmp_path / "layers.0").mkdir()
    save_file({"encoder.weight": W_FD, "encoder.bias": torch.zeros(96), "W_dec": W_FD.clone(), "b_dec": torch.zeros(48)}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"activation": "topk", "k": 8, "d_in": 48, "num_latents": 96, "expansion_factor": 2, "normalize_decoder": True,
                                                 "multi_topk": False, "skip_connection": False, "transcode": False}))
    torch.save({"pre_bias": torch.zeros(48), "latent_bias": torch.zeros(96), "encoder.weight": W_FD, "decoder.weight": W_FD.T.contiguous(),
                "activation": "TopK", "activation_state_dict": {"k": 8, "postact_fn": "ReLU"}}, tmp_path / "openai.pt")
    params = yaml_of(foreign, tmp_path / "mine.yaml", chapters=TINY | {"13_train": {"n_tokens": 4096, "pretrained": f"0={folder} 1={tmp_path / 'openai.pt'}"}})
    params.write_text(params.read_text().replace("layers: [1]", "layers: [0, 1]"))
    done = run(params, "--until", "layers", results=tmp_path / "r")
    assert done.returncode == 0, done.stdout + done.stderr
    top = tmp_path / "r" / "mine"
    for layer, l0, at_most in ((0, 8, 8), (1, 8, 10)):  # the norm and the mean of a vector travel as features of their own
        metrics = json.loads((top / f"L{layer}" / "14_quality" / "metrics.json").read_text())
        assert l0 - 2 < metrics["l0"] <= at_most and metrics["n_features"] in (96, 99), metrics
        assert json.loads((top / f"L{layer}" / "13_train" / "metrics.json").read_text())["pretrained"] is True
