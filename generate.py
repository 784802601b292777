"""Activity that a trained model makes up: rollouts of a prompt as npz, as a picture, and how real they look.

python generate.py --checkpoint outputs/quickstart --out outputs/samples       # goes on from what the run held out
python generate.py --checkpoint outputs/quickstart --prompt mine.npz --bins 100 --samples 16 --out outputs/mine
python generate.py --checkpoint outputs/quickstart --neurons 15 --bins 32 --temperature 0.8 --out outputs/from_nothing
torchrun --nproc_per_node 4 generate.py --checkpoint ...                                 # a model that one GPU does not hold

Exit status: 0 done, 2 something is to be mended in what was asked, 1 any other failure.
"""

import importlib
import json
import sys
import time
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from torchtitan_bio import command_line, data, distributed, exits
from torchtitan_bio.config import ConfigError
from torchtitan_bio.data import sources
from torchtitan_bio.data.selection import number_of
from torchtitan_bio.science import rasters, realism, sampling, trained

SECONDS_BETWEEN_LINES = 5


def read_flags(argv: list[str]):
    parser = command_line.Parser(prog="generate.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run folder, a step folder, or a folder of Hugging Face's")
    parser.add_argument("--out", required=True, help="a new folder for samples.npz, raster.png, realism.png, generated.json")
    prompt = parser.add_argument_group("the prompt: a recording's row (default), a file, or nothing")
    prompt.add_argument("--row", type=int, help="which recording of the data (default: 0)")
    prompt.add_argument("--data", help="as data.source in a config (default: what the run holds out)")
    prompt.add_argument("--split", help="of the data (default: the run's, else test)")
    prompt.add_argument("--prompt", help="an npz with spike_counts (neurons, bins), or another file: its first recording")
    prompt.add_argument("--neurons", type=int, help="no prompt: a population of so many neurons from its first bin on")
    prompt.add_argument("--start-bin", type=int, default=0, help="where in the recording the prompt begins (default: 0)")
    prompt.add_argument(
        "--prompts", type=int, default=1, help="so many prompts, from --start-bin to the recording's end (default: 1)"
    )
    prompt.add_argument(
        "--context-bins", type=int, help="length of the prompt (default: half of what the model was trained on; all of an npz)"
    )
    drawn = parser.add_argument_group("what is drawn")
    drawn.add_argument("--bins", type=int, help="to generate (default: as many as complete a training sequence)")
    drawn.add_argument("--samples", type=int, default=8, help="rollouts of each prompt (default: 8)")
    drawn.add_argument(
        "--window-bins",
        type=int,
        help="that the model sees at most; past them it goes on from the last half (default: a training sequence)",
    )
    drawn.add_argument("--temperature", type=float, default=1.0, help="below 1 likely counts become likelier (default: 1)")
    drawn.add_argument("--top-k", type=int, help="draw from so many likeliest counts only")
    drawn.add_argument("--seed", type=int, default=0, help="a rollout is a function of it and of its own number (default: 0)")
    drawn.add_argument("--at-once", type=int, default=16, help="rollouts a process computes together (default: 16)")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Prompts:
    counts: np.ndarray
    """(prompts, neurons, bins), of no bins where there is none."""
    truth: np.ndarray
    """What followed, (prompts, neurons, bins), at most as many bins as are generated."""
    recording: np.ndarray | None
    """All of the recording, (neurons, bins): what samples are compared with."""
    bins: int
    """To generate."""
    window_bins: int | None
    """That the model sees at most, where that is less than all."""
    words: str


def main(flags):
    with exits.blaming_the_input():
        check(flags)
        found = trained.find(flags.checkpoint)
        prompts = read_prompts(flags, found)
        world = distributed.start()
        if world.rank == 0:
            sources.make_folder(flags.out)
        say = print if world.rank == 0 else lambda line: None
        dtype = torch.float32 if world.device.type == "cpu" else torch.bfloat16
        model, loaded = trained.load(found, world=world, param_dtype=dtype)
        say(loaded)
        kernel = sampling.choose_kernel(world.device, dtype, found.architecture.head_dim)
        sampler = sampling.Sampler(
            model=model,
            kernel=kernel,
            dtype=dtype,
            device=world.device,
            seed=flags.seed,
            temperature=flags.temperature,
            top_k=flags.top_k,
        )
    say(f"attention: {kernel.name} ({kernel.why})")
    say(f"{prompts.words}; {number_of(flags.samples, 'sample')} of {number_of(prompts.bins, 'bin')}")
    for line in notes(prompts, found):
        say(line)
    samples, speed = generate(sampler, prompts, flags, world, say)
    if world.rank == 0:
        write(Path(flags.out), prompts, samples, flags, {"loaded": loaded, **speed})
    distributed.stop()


def check(flags):
    """What is known to be wrong before anything is loaded, all of it."""
    least = {"row": 0, "start_bin": 0} | dict.fromkeys(
        ("neurons", "prompts", "context_bins", "bins", "samples", "window_bins", "at_once"), 1
    )
    problems = [
        f"--{name.replace('_', '-')}={value} must be at least {low}"
        for name, low in least.items()
        if (value := getattr(flags, name)) is not None and value < low
    ]
    of_a_row = [name for name in ("row", "data", "split") if getattr(flags, name) is not None]
    given = [*([f"--{of_a_row[0]}"] if of_a_row else []), *(["--prompt"] if flags.prompt else [])]
    if flags.neurons is not None:
        given += ["--neurons"]
        if flags.context_bins is not None or flags.start_bin or flags.prompts > 1:
            problems.append("--neurons is no prompt at all: it goes without --context-bins, --start-bin and --prompts")
    if len(given) > 1:
        problems.append(f"{' and '.join(given)} are two prompts; take one of them")
    with exits.collecting(problems):
        sampling.check_settings(flags.temperature, flags.top_k)
    out = Path(flags.out)
    if out.exists() and not out.is_dir():
        problems.append(f"--out={out} is a file; name a folder")
    elif out.is_dir() and any(out.iterdir()):
        problems.append(f"--out={out} holds something; name a new folder")
    if problems:
        raise ConfigError(*problems)


def read_prompts(flags, found) -> Prompts:
    """The prompts, and what is known around them; lengths that are not given are those that fill a training sequence."""
    window = flags.window_bins
    if flags.neurons is not None:
        nothing = np.empty((1, flags.neurons, 0), np.uint8)
        bins = flags.bins or fill(found, flags.neurons, "--bins")
        words = f"no prompt: {number_of(flags.neurons, 'neuron')} from the first bin on"
        return Prompts(nothing, nothing, None, bins, window or window_of(found, flags.neurons), words)
    dataset, row = open_data(flags, found)
    recording, start, name = dataset.counts(row), flags.start_bin, dataset.index.id[row]
    n, num_bins = recording.shape
    context = flags.context_bins
    if context is None:
        context = max(1, num_bins - start) if flags.prompt else max(1, fill(found, n, "--context-bins") // 2)
    bins = flags.bins or max(1, fill(found, n, "--bins") - context)
    last = num_bins - context - (bins if flags.prompts > 1 else 0)  # of many, each is to have its truth
    if start > last or flags.prompts > last - start + 1:
        raise ConfigError(
            f"{name} has {number_of(num_bins, 'bin')}; from --start-bin={start} on they do not hold {context:,} of context"
            + (f" and {bins:,} to compare with for {flags.prompts} prompts" if flags.prompts > 1 else "")
        )
    starts = [start + number * (last - start) // max(1, flags.prompts - 1) for number in range(flags.prompts)]
    width_s = dataset.about["bin_width_s"]
    a_bin = f"; a bin is {width_s:g} s" if isinstance(width_s, int | float) else ""
    where = f"from bin {start:,}" if flags.prompts == 1 else f"from {flags.prompts} bins between {start:,} and {last:,} on"
    return Prompts(
        counts=np.stack([recording[:, at : at + context] for at in starts]),
        truth=np.stack([recording[:, at + context : at + context + bins] for at in starts]),
        recording=recording,
        bins=bins,
        window_bins=window or window_of(found, n),
        words=f"prompt: {number_of(context, 'bin')} of {number_of(n, 'neuron')} of {name} {where}{a_bin}",
    )


def window_of(found, num_neurons: int) -> int | None:
    """Bins of a training sequence, where its length is known and holds two."""
    return None if found.seq_len is None or found.seq_len < 2 * (num_neurons + 1) else found.seq_len // (num_neurons + 1)


def fill(found, num_neurons: int, flag: str) -> int:
    """Bins of a training sequence."""
    if found.seq_len is None:
        raise ConfigError(f"nothing says how long the sequences were that {found.path} was trained on: give {flag}")
    return max(1, found.seq_len // (num_neurons + 1))


def open_data(flags, found):
    """(a data set, which of its rows)."""
    row, config = flags.row or 0, found.config
    if flags.prompt:
        settings = {"source": flags.prompt, "split": "train"}
    elif config is None and not flags.data:
        raise ConfigError(f"nothing says what {found.path} was trained on: give --data, --prompt or --neurons")
    else:
        own = config and (config["validation"]["source"] or config["data"]["source"])
        settings = {"source": flags.data or own, "split": flags.split or (config["validation"]["split"] if config else "test")}
        if settings["source"] == own:
            names = ("split_by", "max_malformed_rows", "index_folder")
            names += ("include_sources", "exclude_sources") if own == config["data"]["source"] else ()
            settings |= {name: config["data"][name] for name in names}
    build = importlib.import_module(data.FAMILIES[found.family]).build
    dataset = build(**settings, mode="stream", seq_len=found.seq_len or 1)
    if row >= len(dataset.index):
        raise ConfigError(f"--row={row}, but {settings['source']} has rows 0 to {len(dataset.index) - 1} in its split")
    return dataset, row


def notes(prompts: Prompts, found) -> list[str]:
    """What a person should know of lengths beyond those of training."""
    n, context = prompts.counts.shape[1:]
    window, lines = prompts.window_bins, []
    tokens = (n + 1) * min(context + prompts.bins, window or context + prompts.bins)
    if found.seq_len is not None and tokens > found.seq_len:
        lines.append(
            f"warning: {tokens:,} tokens are seen at once, and the model was trained on sequences of {found.seq_len:,}: it has "
            "never met the positions beyond"
        )
    if window and context + prompts.bins > window:
        lines.append(
            f"warning: {context:,} + {prompts.bins:,} bins are more than the {window:,} that the model sees at once: each time "
            f"they are full it goes on from the last {window // 2:,}, and knows nothing of what was before"
        )
    return lines


def generate(sampler, prompts: Prompts, flags, world, say) -> tuple[np.ndarray, dict]:
    """(samples (prompts, rollouts, neurons, bins), how fast). Ranks share rollouts out, and go through the model in step."""
    num_prompts, n, _ = prompts.counts.shape
    numbers, window = range(num_prompts * flags.samples), prompts.window_bins
    groups = [list(numbers[first : first + flags.at_once]) for first in range(0, len(numbers), flags.at_once)]
    samples = np.zeros((len(numbers), n, prompts.bins), np.uint8)
    seen = sampling.visible(prompts.counts, window)
    tell = Progress(len(numbers) * prompts.bins * (n + 1), world.size, say)
    shared = sampler.read(sampling.encode(seen), n) if num_prompts == 1 else None
    for first in range(0, len(groups), world.size):
        # A rank that has no group left repeats the last one: sharded blocks are gathered by all ranks together.
        group = groups[min(first + world.rank, len(groups) - 1)]
        counts = seen[np.array(group) // flags.samples]
        prompt = shared or sampler.read(sampling.encode(counts), n)
        drawn = sampler.go_on(counts, prompt, bins=prompts.bins, rollouts=group, window_bins=window, tell=tell)
        if first + world.rank < len(groups):
            samples[group] = drawn
    samples = world.sum_array(samples).astype(np.uint8)
    return samples.reshape(num_prompts, flags.samples, n, prompts.bins), tell.end()


class Progress:
    """Tells how far all ranks are, from what this one has done, every few seconds."""

    def __init__(self, num_tokens: int, num_ranks: int, say):
        self.num_tokens, self.num_ranks, self.say, self.done = num_tokens, num_ranks, say, 0
        self.started = self.told = time.perf_counter()

    def __call__(self, num_tokens: int):
        self.done, now = min(self.num_tokens, self.done + num_tokens * self.num_ranks), time.perf_counter()
        if now - self.told > SECONDS_BETWEEN_LINES:
            self.told = now
            self.say(f"{self.done:,} of {self.num_tokens:,} tokens, {self.done / (now - self.started):,.0f} tokens/s")

    def end(self) -> dict:
        seconds = time.perf_counter() - self.started
        self.say(
            f"{self.num_tokens:,} tokens in {seconds:.1f} s: {self.num_tokens / seconds:,.0f} tokens/s, with reading prompts"
        )
        return {"tokens": self.num_tokens, "seconds": seconds, "tokens_per_s": self.num_tokens / seconds}


def write(folder: Path, prompts: Prompts, samples: np.ndarray, flags, facts: dict):
    """The npz, the pictures of the first prompt and of all, the scores."""
    arrays = {"prompt": prompts.counts, "samples": samples} | ({"truth": prompts.truth} if prompts.truth.shape[2] else {})
    if flags.prompts == 1:
        arrays = {name: array[0] for name, array in arrays.items()}
    np.savez_compressed(folder / "samples.npz", **arrays)
    rasters.draw(prompts.counts[0], samples[0], prompts.truth[0], prompts.words).save(folder / "raster.png")
    windows = [] if prompts.recording is None else realism.windows_of(prompts.recording, prompts.bins)
    compared = None
    if len(windows):
        together = samples.reshape(-1, *samples.shape[2:])
        compared = realism.compare(together, windows)
        print(*realism.table(compared), sep="\n")
        if flags.prompts == 1:
            print("  (of one prompt: what differs may be its moment and not the model; --prompts 16 takes many)")
        source = "one prompt" if flags.prompts == 1 else f"{flags.prompts} prompts"
        ours, theirs = number_of(len(together), "sample"), number_of(len(windows), "window")
        title = f"{ours} of {source} against {theirs} of the whole recording"
        realism.draw(together, windows, title).save(folder / "realism.png")
    else:
        print("realism: there is no recording as long as a sample to compare with")
    record = {"asked": vars(flags), "prompt": prompts.words, "bins": prompts.bins, **facts, "realism": compared}
    (folder / "generated.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {folder}")


if __name__ == "__main__":
    FLAGS = read_flags(sys.argv[1:])
    sys.exit(exits.run(lambda: main(FLAGS), "this command"))
