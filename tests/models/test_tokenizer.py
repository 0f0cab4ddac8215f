"""Token ids: the official ones for every prompt, and a plain restatement on a small vocabulary."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from see3d_jax.errors import InputError
from see3d_jax.models.tokenizer import EMPTY_PROMPT_IDS, END, START, load_tokenizer

MERGES = ["t h", "th e</w>", "c a", "ca t</w>", "o o", "oo o", "Ã ©</w>", "i n", "in g</w>"]


def _byte_names():
    """One printable character per byte, as byte-level vocabularies are written."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    stand_ins = {byte: chr(256 + number) for number, byte in enumerate(others)}
    return {byte: stand_ins.get(byte, chr(byte)) for byte in range(256)}


BYTES = _byte_names()
SYMBOLS = [*BYTES.values()]
VOCAB = [*SYMBOLS, *(s + "</w>" for s in SYMBOLS), *(m.replace(" ", "") for m in MERGES)]
VOCAB = {token: number for number, token in enumerate([*VOCAB, START, END])}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps(VOCAB), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    options = {"pad_token": {"content": "!"}, "model_max_length": 12}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return folder


def _restated(prompt):
    """ASCII words and symbols only: one word at a time, the best-ranked merge first."""
    ids = []
    for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", prompt.lower()):
        parts = [BYTES[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while True:
            ranks = [
                (MERGES.index(f"{a} {b}"), i)
                for i, (a, b) in enumerate(itertools.pairwise(parts))
                if f"{a} {b}" in MERGES
            ]
            if not ranks:
                break
            at = min(ranks)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [VOCAB[part] for part in parts]
    return ids


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="thecaoing THE  019.?-", max_size=14))
def test_ids_are_those_of_the_restatement(small, prompt):
    tokenizer = _load(small)
    ids = [VOCAB[START], *_restated(prompt)[:10], VOCAB[END]]
    wanted = ids + [VOCAB["!"]] * (12 - len(ids))
    assert tokenizer(prompt).tolist() == [wanted]


_loaded = {}


def _load(folder):
    if folder not in _loaded:
        _loaded[folder] = load_tokenizer(folder)
    return _loaded[folder]


def test_accents_are_composed_and_case_is_ignored(small):
    rows = _load(small)(["É", "é", "e\u0301"])
    assert (rows == rows[0]).all() and rows[0, 1] == VOCAB["Ã©</w>"]


def test_long_prompts_are_cut_before_the_end_marker(small):
    ids = _load(small)(["cat " * 50])[0]
    assert ids.tolist() == [VOCAB[START], *[VOCAB["cat</w>"]] * 10, VOCAB[END]]


def test_a_broken_folder_is_named(small, tmp_path):
    with pytest.raises(InputError, match=r"vocab\.json: not found"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(InputError, match="do not fit"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(InputError, match="lacks the special token"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="cleaning: expected one of"):
        load_tokenizer(small, cleaning="wash")


def test_official_ids(shared):
    folder = shared / "goldens/release_tiny/tokenizer"
    prompts = json.loads((shared / "goldens/clip/tokenizer.json").read_text())["prompts"]
    io = load_file(shared / "goldens/clip/tokenizer.safetensors")
    tokenizer = load_tokenizer(folder)
    np.testing.assert_array_equal(tokenizer(prompts), io["ids_sd21"])
    np.testing.assert_array_equal(tokenizer(""), [EMPTY_PROMPT_IDS])
    np.testing.assert_array_equal(
        dataclasses.replace(tokenizer, pad=tokenizer.end)(prompts), io["ids_sd1"]
    )
    for cleaning, name in (("basic", "ids_sd21_no_ftfy"), ("none", "ids_fast")):
        got = load_tokenizer(folder, cleaning=cleaning)(prompts)
        np.testing.assert_array_equal(got, io[name], err_msg=cleaning)
    # OpenAI's own pads with zeros too, but reads "!" as text.
    openai = dataclasses.replace(load_tokenizer(folder, pad_token=END), pad=0)
    np.testing.assert_array_equal(openai(prompts), io["ids_openai"])
