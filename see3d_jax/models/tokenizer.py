"""Prompts to token ids, as CLIP's text tower was trained on them (byte-pair encoding).

See3D itself only ever asks for the empty prompt, whose ids are `EMPTY_PROMPT_IDS`; this is for
everything else. The merging is done by the `tokenizers` library from the `vocab.json` and
`merges.txt` of a released folder. What differs between implementations is how text is cleaned
before ("cleaning"), and gives different ids for unusual characters only:
- "ftfy" (default): repairs broken Unicode, unescapes HTML, straightens quotes, as the reference
  implementation does where ftfy is installed;
- "basic": the reference without ftfy: drops control characters, sets CJK characters apart;
- "none": only composes Unicode, as the fast implementation does.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from see3d_jax.errors import InputError

if TYPE_CHECKING:
    import tokenizers

CLEANINGS = ("ftfy", "basic", "none")
START, END = "<|startoftext|>", "<|endoftext|>"
# The ids of "" in the released tokenizer: start, end, then padding ("!", which is token 0).
EMPTY_PROMPT_IDS = (49406, 49407) + (0,) * 75
# What is merged within, never across: markers, contractions, words, single digits, other symbols.
_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Callable from prompts to ids; made by `load_tokenizer`.

    Attributes:
      bpe: the library's tokenizer, from cleaned text to ids without markers.
      start, end, pad: ids put before, after and behind the prompt.
      length: how many ids every prompt becomes.
      cleaning: see the module docstring.
    """

    bpe: tokenizers.Tokenizer
    start: int
    end: int
    pad: int
    length: int
    cleaning: str

    def __call__(self, prompts: str | Sequence[str]) -> np.ndarray:
        """[N, length] int32; a prompt that is too long is cut, the end marker is kept."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        ids = np.full((len(prompts), self.length), self.pad, np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            if self.cleaning == "ftfy":
                import ftfy

                prompt = ftfy.fix_text(prompt)
            words = self.bpe.encode(prompt, add_special_tokens=False).ids[: self.length - 2]
            row[: len(words) + 2] = [self.start, *words, self.end]
        return ids


def load_tokenizer(
    folder: str | os.PathLike[str], *, cleaning: str = "ftfy", pad_token: str | None = None
) -> Tokenizer:
    """The tokenizer of a folder in the Hugging Face layout.

    Args:
      folder: holds vocab.json, merges.txt and possibly tokenizer_config.json.
      cleaning: one of `CLEANINGS`.
      pad_token: instead of the folder's own. A special token: its text in a prompt becomes this
        one token, so that with "!" (Stable Diffusion 2) exclamation marks read as padding.

    Raises:
      InputError: a file is missing, unreadable, or lacks a special token.
      ValueError: an unknown cleaning.
    """
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

    if cleaning not in CLEANINGS:
        raise ValueError(f"cleaning: expected one of {CLEANINGS}, got {cleaning!r}")
    folder = Path(folder)
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: not found; a CLIP tokenizer folder holds it")
    settings = _read_settings(folder / "tokenizer_config.json")
    try:
        model = models.BPE.from_file(
            str(folder / "vocab.json"),
            str(folder / "merges.txt"),
            unk_token=END,
            end_of_word_suffix="</w>",
        )
    except Exception as error:  # the library raises bare Exception for anything it cannot parse
        raise InputError(f"{folder}: vocab.json and merges.txt do not fit: {error}") from error
    bpe = tokenizers.Tokenizer(model)
    if cleaning == "basic":
        clean = [normalizers.BertNormalizer(strip_accents=False, lowercase=False)]
    else:
        clean = []
    bpe.normalizer = normalizers.Sequence(
        [
            *clean,
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    pad_token = pad_token or _text(settings.get("pad_token")) or END
    ids = {token: bpe.token_to_id(token) for token in (START, END, pad_token)}
    for token, number in ids.items():
        if number is None:
            raise InputError(f"{folder / 'vocab.json'}: lacks the special token {token!r}")
    bpe.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in ids])
    return Tokenizer(
        bpe=bpe,
        start=ids[START],
        end=ids[END],
        pad=ids[pad_token],
        length=int(settings.get("model_max_length", 77)),
        cleaning=cleaning,
    )


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: expected a JSON object")
    return settings


def _text(token: str | dict[str, Any] | None) -> str | None:
    """Special tokens are stored as text or as an object that holds it."""
    return token.get("content") if isinstance(token, dict) else token
