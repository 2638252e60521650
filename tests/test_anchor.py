"""dictionary_learning's recipe (params/pythia-70m.yaml) at a size for every day: nano, layer 3, unpacked text, against stored values.

The values in anchor.json were measured once with this file (`python tests/test_anchor.py` prints them); they hold to half a per cent,
the tolerance of the test whose recipe this is.
"""
import json
import tempfile
from pathlib import Path

from neurocodec.core.lm import LM, load_tokenizer
from neurocodec.core.text import load_corpus, pack_splits
from neurocodec.sae.activations import collect
from neurocodec.sae.dictionary import DictionaryConfig
from neurocodec.sae.quality import evaluate, quality, some_contexts
from neurocodec.sae.train import TrainConfig, train, with_recipe

TOLERANCE, LAYER, ROWS, TOKENS, BATCH = .005, 3, 100_000, 245_760, 2048
STORED = Path(__file__).with_name("anchor.json")


def measure(folder):
    lm = LM.load("nano")
    splits = pack_splits(load_corpus("docs", "numpy,scipy,networkx,matplotlib"), load_tokenizer("nano"), 128, ood=["matplotlib"], packing=False)
    store = collect(lm, splits["train"], [LAYER], folder / "store", "float32", ROWS, skip_bos=False)[LAYER]
    width = 8 * store.d
    what, how = with_recipe("dictionary_learning", DictionaryConfig("topk", store.d, width, 40), TrainConfig(n_tokens=TOKENS, batch=BATCH, lr=2e-4 / (width / 2**14) ** .5))
    d = train(store, what, how, folder / "sae")
    confirm = some_contexts(lm, splits["confirm"], 8000, skip_bos=False)
    q = quality(evaluate(lm, confirm, LAYER, {"sae": d, "zero": lambda x: 0 * x}, skip_bos=False), 0)
    return {"fve": q["ev.fve"].value, "cosine": q["cosine"].value, "l0": q["l0"].value, "ce_clean": q["ce_clean"].value, "ce_spliced": q["ce_spliced"].value,
            "ce_recovered": q["ce_recovered"].value, "alive": 1 - q["dead"].value}


def test_anchor(tmp_path):
    got, want = measure(tmp_path), json.loads(STORED.read_text())
    assert set(got) == set(want)
    wrong = {k: (got[k], want[k]) for k in want if abs(got[k] / want[k] - 1) > TOLERANCE}
    assert not wrong, wrong


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as t: print(json.dumps(measure(Path(t)), indent=1))
