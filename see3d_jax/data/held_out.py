"""Which source videos are kept for evaluation, and the fixed batch made of them.

Whole source videos are held out, not clips, because clips of one video show the same scene. Sources
are ranked by a hash of their name, and the lowest are held out. The rule needs no list of all
sources: a sample of the records says how low a hash must be, and every other record of the millions
is judged by its own source name. On a small data set the sample is everything, and exactly as many
sources are held out as asked for; on a large one it is their share of the sample. A data set that
grows moves that limit, and a source changes sides only if it lies in between.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from see3d_jax.data.examples import (
    Arrays,
    ExampleSpec,
    Preprocess,
    empty_batch,
    fill_example,
)
from see3d_jax.data.mixture import ClipFolder, Mixture, Skip, SkippedClips, even_order
from see3d_jax.errors import InputError

SAMPLE = 512  # records looked at before training


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Sources kept for evaluation; `name in held_out` tells them.

    Attributes:
      limit: names that hash to this or less are held out; −1: none.
      names: those of the evaluation clips.
    """

    limit: int = -1
    names: tuple[str, ...] = ()

    def __contains__(self, source: str) -> bool:
        return _hash(source) <= self.limit


NOTHING = HeldOut()


def held_out_batch(
    mixture: Mixture,
    spec: ExampleSpec,
    clips: int,
    seed: int,
    skipped: SkippedClips,
    preprocess: Preprocess | None = None,
) -> tuple[Arrays, HeldOut]:
    """A fixed batch from up to `clips` clips of different sources, and the rule that keeps them.

    Views have the first of `spec.sizes`. At least one usable source is always left to train on:
    with a single one nothing is held out and the batch comes from training clips. Clips that cannot
    be used are added to `skipped`. Raises InputError when no clip is usable.
    """
    usable: dict[str, Arrays] = {}  # source → its example, lowest hash first
    for source, places in sorted(_sources(mixture, skipped).items(), key=lambda s: _hash(s[0])):
        for folder, index in places:
            example = _example(folder, index, mixture.warped, spec, seed, skipped, preprocess)
            if example is not None:
                usable[source] = example
                break
        if len(usable) > clips:  # one more source than is held out: it stays for training
            break
    if not usable:
        raise InputError(
            f"{mixture.folders[0].path}: none of its {min(len(mixture), SAMPLE)} clips can be used "
            f"with config.data.views={spec.views}, e.g. "
            f"{next(iter(skipped.reasons.values()), 'no reason given')}; use fewer views or other "
            "clips"
        )
    names = tuple(usable)[: min(clips, len(usable) - 1)]
    chosen = [usable[name] for name in names or usable]
    batch = {key: np.concatenate([example[key] for example in chosen]) for key in chosen[0]}
    return batch, HeldOut(_hash(names[-1]) if names else -1, names)


def _hash(source: str) -> int:
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big")


def _sources(mixture: Mixture, skipped: SkippedClips) -> dict[str, list[tuple[ClipFolder, int]]]:
    """Sources of the sample, each with the places of its records; evenly through all folders."""
    places = list(_places(mixture))

    def read(place: tuple[ClipFolder, int]) -> str | Skip:
        folder, index = place
        try:
            return folder[index].source
        except Exception as error:  # bad checksum, foreign bytes, unknown version
            return folder.skip(index, None, error)

    found: dict[str, list[tuple[ClipFolder, int]]] = {}
    # Made before the readers start: what they import lazily replaces __import__ for all threads
    # meanwhile, and tqdm imports its lock when the first bar is drawn.
    tqdm.get_lock()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = pool.map(read, places)
        for place, source in zip(
            places, tqdm(results, "held-out sources", len(places), leave=False, delay=5)
        ):
            if isinstance(source, Skip):
                skipped.add(source)
            else:
                found.setdefault(source, []).append(place)
    return found


def _places(mixture: Mixture) -> Iterator[tuple[ClipFolder, int]]:
    """Up to SAMPLE records, from each folder in proportion to its number of clips."""
    share = min(1.0, SAMPLE / len(mixture))
    for folder in mixture.folders:
        wanted = max(1, round(share * len(folder)))
        for index, _ in zip(even_order(len(folder)), range(wanted)):
            yield folder, index


def _example(
    folder: ClipFolder,
    index: int,
    warped: bool,
    spec: ExampleSpec,
    seed: int,
    skipped: SkippedClips,
    preprocess: Preprocess | None,
) -> Arrays | None:
    """The example of one record as a batch of one, or None if it cannot be used."""
    record = None
    batch = empty_batch(spec, 1, spec.sizes[0], warped)
    row = {key: value[0] for key, value in batch.items()}
    try:
        record = folder[index]
        rng = np.random.default_rng((seed, index))
        fill_example(row, record, rng, spec, folder.kind, preprocess)
    except Exception as error:
        skipped.add(folder.skip(index, record, error))
        return None
    return {key: value[None] for key, value in row.items()}
