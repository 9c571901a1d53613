"""A tiny encoder with random weights, texts and pictures for the tests of `clean`."""

import numpy as np
import pandas as pd
import torch
from PIL import Image

TEXT = "what who where when is the of a in city river king queen year number 1 2 3"
WORDS = TEXT.split()


def make_encoder(folder, positions=12, seed=0, words=WORDS):
    """A BertModel of two layers and width 8 with a WordPiece vocabulary, as `save_pretrained` leaves it."""
    import transformers

    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizerFast(
        vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=positions
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=positions,
    )  # fmt: skip
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def questions(rows=60, seed=0):
    """Questions of two classes, told apart by their second word; with a number beside them."""
    rng = np.random.default_rng(seed)
    y = np.arange(rows) % 2
    nouns = np.array([["king", "queen"], ["city", "river"]])
    text = [
        f"{'who' if c == 0 else 'where'} is the {rng.choice(nouns[c])} of {rng.choice(WORDS)} {i}"
        for i, c in enumerate(y)
    ]
    return pd.DataFrame(
        {"question": text, "length": rng.normal(size=rows), "kind": np.array(["person", "place"])[y]}
    )


def drawings(folder, rows=40, seed=0, size=(7, 5), mode="L"):
    """Pictures of two classes, light on the left or on the right, and their table."""
    rng = np.random.default_rng(seed)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    names = []
    for i in range(rows):
        pixels = rng.integers(0, 60, size=(size[1], size[0])).astype("uint8")
        half = slice(0, 3) if i % 2 else slice(4, None)
        pixels[:, half] += 150
        names.append(f"pictures/{i}.png")
        Image.fromarray(pixels).convert(mode).save(folder / names[-1])
    return pd.DataFrame({"file": names, "side": np.array(["right", "left"])[np.arange(rows) % 2]})
