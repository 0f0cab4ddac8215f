"""Clip shards in, training batches out: deterministic, resumable, and not stopped by one bad clip.

    ArrayRecord shards → mixture → a batch of examples per step → threads or workers → batches

The stream is one long list of rows. Row i of step n is a pure function of (seed, n · batch size +
i), whatever the number of threads, worker processes or hosts: its folder, its clip, frames,
masks and warps. A clip that cannot be used is replaced by another draw, never dropped, so rows
never shift; it is counted and named on stderr. All rows of a step share the size of their views.
Which arrays a batch holds is told in `data.examples`, here with a leading axis [B].

The position of an iterator is the number of the next step: a small JSON value that any number of
workers or hosts can continue from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import cv2
import grain
import numpy as np
from absl import flags

from see3d_jax.data.examples import Arrays, ExampleSpec, Preprocess, empty_batch, fill_example
from see3d_jax.data.held_out import NOTHING, HeldOut
from see3d_jax.data.mixture import Mixture, Skip, SkippedClips
from see3d_jax.errors import InputError

Batch = dict[str, np.ndarray]
_STEPS = 2**48  # more than any run takes
_SKIPS = "skips"  # travels with a batch from the worker that made it, see `BatchIterator`


@dataclasses.dataclass(frozen=True)
class BatchMaker:
    """Makes the batch of a step, or some rows of it. Travels to worker processes.

    Attributes:
      mixture: where clips come from.
      spec: what examples look like.
      batch_size: rows of the global batch, B.
      seed: of the run.
      held_out: sources that are kept for evaluation.
      rows: those to make, out of 0 … B − 1; None: all.
      preprocess: makes `clip_pixels`, if wanted.
    """

    mixture: Mixture
    spec: ExampleSpec
    batch_size: int
    seed: int
    held_out: HeldOut = NOTHING
    rows: tuple[int, ...] | None = None
    preprocess: Preprocess | None = None

    def __call__(self, step: int) -> dict[str, Any]:
        """The batch, and under "skips" the clips that had to be replaced."""
        size = self.spec.sizes[0]
        if len(self.spec.sizes) > 1:
            draw = np.random.default_rng((self.seed, step, 1)).integers(len(self.spec.sizes))
            size = self.spec.sizes[draw]
        rows = range(self.batch_size) if self.rows is None else self.rows
        batch = empty_batch(self.spec, len(rows), size, self.mixture.warped)
        skips: list[Skip] = []
        pixels = []
        for place, number in enumerate(rows):
            row = {key: value[place] for key, value in batch.items()}
            skips += self._fill(row, step * self.batch_size + number)
            pixels.append(row.get("clip_pixels"))
        if self.preprocess is not None:
            batch["clip_pixels"] = np.stack(pixels)
        return batch | {_SKIPS: tuple(skips)}

    def _fill(self, row: Arrays, position: int) -> list[Skip]:
        """Writes the row at `position` of the stream; returns the clips that could not be used."""
        rng = np.random.default_rng((self.seed, position))
        folder, indices = self.mixture.candidates(position, rng)
        skips: list[Skip] = []
        for index in indices:
            record = None
            try:
                record = folder[index]
                if record.source in self.held_out:
                    continue
                fill_example(row, record, rng, self.spec, folder.kind, self.preprocess)
                return skips
            except Exception as error:  # one bad clip among millions must not end a run
                skips.append(folder.skip(index, record, error))
        reasons = sorted({skip.reason for skip in skips}) or ["all are held out for evaluation"]
        raise InputError(
            f"config.data: {folder.path}: tried {len(skips)} clips for one example and none can be "
            f"used with config.data.views={self.spec.views} ({'; '.join(reasons[:3])}); take bad "
            "clips out of the data, or ask for fewer views"
        )


class BatchIterator(Iterator[Batch]):
    """An endless iterator of batches that can be placed at any step; close it when done.

    Clips that had to be replaced come with the batch they are missing from, also from worker
    processes, so `skipped` holds those of the batches handed out so far and no others.
    """

    def __init__(
        self, maker: BatchMaker, threads: int, workers: int, skipped: SkippedClips
    ) -> None:
        self.skipped = skipped
        self._maker, self._threads, self._workers = maker, threads, workers
        self._next_step, self._source = 0, None

    def __next__(self) -> Batch:
        if self._source is None:
            self._source = iter(self._dataset())
        batch = next(self._source)
        for skip in batch.pop(_SKIPS):
            self.skipped.add(skip)
        self._next_step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Where the stream stands, as plain JSON."""
        return {"next_step": self._next_step}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from a state of `get_state`."""
        self.close()
        self._next_step = state["next_step"]

    def close(self) -> None:
        """Ends threads and worker processes; the iterator can still be used afterwards."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def _dataset(self) -> grain.IterDataset:
        steps = grain.MapDataset.range(self._next_step, _STEPS).map(self._maker)
        threads = 1 if self._workers else self._threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
        dataset = steps.to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # Grain asks for flags of its own; defaults will do
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=1),
                worker_init_fn=_one_thread,
            )
        return dataset


def training_batches(
    mixture: Mixture,
    spec: ExampleSpec,
    batch_size: int,
    seed: int,
    held_out: HeldOut = NOTHING,
    *,
    threads: int = 2,
    workers: int = 0,
    rows: tuple[int, ...] | None = None,
    preprocess: Preprocess | None = None,
    skipped: SkippedClips | None = None,
) -> BatchIterator:
    """An endless iterator of batches without the clips whose source is in `held_out`.

    Args:
      mixture: the data.
      spec: what examples look like.
      batch_size: B, of the global batch.
      seed: of the run.
      held_out: sources left out.
      threads: that read and decode, each a batch at a time.
      workers: if > 0, processes to use instead of threads.
      rows: of the global batch that this process wants, in this order; None: all.
      preprocess: makes `clip_pixels` of the first reference; must be picklable for workers.
      skipped: where clips that cannot be used are counted.

    `next` raises InputError when MAX_TRIES clips in a row cannot be used.
    """
    _one_thread()
    maker = BatchMaker(mixture, spec, batch_size, seed, held_out, rows, preprocess)
    return BatchIterator(maker, threads, workers, SkippedClips() if skipped is None else skipped)


def _one_thread(*_: int) -> None:
    """Keeps OpenCV from starting threads of its own: batches are what runs in parallel."""
    cv2.setNumThreads(1)
