"""A raster of one prompt, made again and again while a model learns: the same bins, the same chance, other weights."""

import os
from pathlib import Path

import numpy as np

from torchtitan_bio.data.selection import number_of
from torchtitan_bio.science import rasters, sampling

# At most. A token that is drawn costs a pass through the model, for which sharded weights are gathered once more.
PROMPT_TOKENS, DRAWN_TOKENS = 4096, 1024
ROLLOUTS = 4


class TrainingSamples:
    """take() makes one: samples/step-00000500.png in the run folder and, with `tensorboard`, an image in tb/samples there.

    The prompt is the beginning of the held-out recording with the fewest neurons, since its bins cost least; what the model
    makes of it is drawn beside what followed. Nothing of the training changes: no generator of torch is used.
    """

    def __init__(self, folder: Path, held_out, model, *, dtype, device, is_writer: bool, tensorboard: bool, say):
        self.folder, self.model, self.is_writer, self.tensorboard, self.say = folder, model, is_writer, tensorboard, say
        index = held_out.index
        rows = [row for row in range(len(index)) if 2 * held_out.width(row) <= held_out.seq_len and index.t[row] >= 2]
        if not rows:
            raise ValueError(
                "validation.generate_every needs a held-out recording of two bins or more, of which two fit into "
                f"training.seq_len={held_out.seq_len}; there is none"
            )
        row = min(rows, key=held_out.width)
        width, num_bins = held_out.width(row), int(index.t[row])
        window = held_out.seq_len // width
        context = max(1, min(window // 2, PROMPT_TOKENS // width, num_bins // 2))
        self.bins = max(1, min(DRAWN_TOKENS // width, num_bins - context))
        self.window_bins = 2 * context
        recording = held_out.counts(row)
        self.prompt, self.truth = recording[:, :context], recording[:, context : context + self.bins]
        self.words = f"from the first {number_of(context, 'bin')} of {index.id[row]}"
        kernel = sampling.choose_kernel(device, dtype, model.architecture.head_dim)
        self.sampler = sampling.Sampler(model=model, kernel=kernel, dtype=dtype, device=device)

    def take(self, step: int):
        """All ranks must call this together: they gather sharded weights from each other."""
        self.model.eval()
        prompt = self.sampler.read(sampling.encode(self.prompt[None]), len(self.prompt))
        samples = self.sampler.go_on(
            np.repeat(self.prompt[None], ROLLOUTS, axis=0),
            prompt,
            bins=self.bins,
            rollouts=list(range(ROLLOUTS)),
            window_bins=self.window_bins,
        )
        self.model.train()
        if self.is_writer:
            self._write(step, rasters.draw(self.prompt, samples, self.truth, f"step {step:,}, {self.words}"))

    def _write(self, step: int, figure):
        path = self.folder / "samples" / f"step-{step:08d}.png"
        new = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(exist_ok=True)
            try:
                figure.save(new)
                new.replace(path)
            finally:
                new.unlink(missing_ok=True)
            if self.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                # In a folder of its own: of several files in one folder TensorBoard follows only the newest.
                with SummaryWriter(str(self.folder / "tb" / "samples")) as board:
                    board.add_image("samples", figure.pixels(), step, dataformats="HWC")
        except OSError as error:  # a picture is not worth a run: the disk is full, say
            self.say(f"warning: step {step}: no picture: {error}")
