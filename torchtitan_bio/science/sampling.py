"""Activity drawn from a model of spikes, count by count, many rollouts of one prompt at a time.

The grammar of the stream is not left to the model: position i of it is a separator if and only if i % (neurons + 1) == 0.
There it is forced; elsewhere it cannot be drawn. Chance is a function of (seed, rollout, place) alone, so that a rollout does
not depend on those beside it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from torchtitan_bio import attention, kernels
from torchtitan_bio.data import keyed
from torchtitan_bio.models.kv_cache import KVCache
from torchtitan_bio.science.scores import NUM_COUNTS, SEPARATOR

KERNELS = ("flash", "efficient", "math")  # cuDNN plans anew for each length, and lengths change with every token
ROLLOUTS = 201  # the name of a random stream, beside those of data
CHUNK_TOKENS = 4096


def encode(counts) -> torch.Tensor:
    """Counts (prompts, neurons, bins) as a model reads them, (prompts, tokens): a separator, then the neurons, bin by bin."""
    num_prompts, n, bins = counts.shape
    tokens = np.full((num_prompts, bins, n + 1), SEPARATOR, np.uint8)
    tokens[:, :, 1:] = counts.transpose(0, 2, 1)
    return torch.from_numpy(tokens.reshape(num_prompts, -1))


def check_prompt(tokens: torch.Tensor, num_neurons: int):
    """ValueError unless the tokens (prompts, tokens) are whole bins of so many neurons."""
    width, length = num_neurons + 1, tokens.shape[1]
    if length % width:
        raise ValueError(
            f"a prompt must end at a bin's edge: {length} tokens are {length // width} bins of a separator and {num_neurons} "
            f"neurons, and {length % width} tokens more"
        )
    is_separator = tokens.reshape(len(tokens), -1, width) == SEPARATOR
    if not is_separator[:, :, 0].all() or is_separator[:, :, 1:].any():
        raise ValueError(
            f"a prompt of {num_neurons} neurons has a separator, {SEPARATOR}, at every {width}th token and nowhere else"
        )


def visible(counts, window_bins: int | None):
    """Of counts (..., bins), the last ones that a model goes on from: all, or half a window where they fill one."""
    bins = counts.shape[-1]
    return counts if window_bins is None or bins < window_bins else counts[..., bins - window_bins // 2 :]


def no_one(num_tokens: int):
    """Whom progress is told by default."""


def check_settings(temperature: float, top_k: int | None):
    problems = []
    if not 0 < temperature < float("inf"):
        problems.append(f"temperature={temperature} is not positive and finite; top_k=1 takes the likeliest count")
    if top_k is not None and not 1 <= top_k <= NUM_COUNTS:
        problems.append(f"top_k={top_k} does not lie in 1 .. {NUM_COUNTS}, the number of counts there are")
    if problems:
        raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class Prompt:
    """What rollouts go on from: keys and values, and what the model says of the first neuron's next count."""

    num_neurons: int
    cache: KVCache
    logits: torch.Tensor

    def repeated(self, times: int) -> "Prompt":
        """Each of several prompts so many times in a row, for as many rollouts of its own."""
        if len(self.logits) == 1:  # the only one is shared, and read once for all of them
            return self
        cache = copy.copy(self.cache)
        cache.memory = cache.memory.repeat_interleave(times, dim=2)
        return Prompt(self.num_neurons, cache, self.logits.repeat_interleave(times, dim=0))


@dataclass(frozen=True, kw_only=True)
class Sampler:
    model: torch.nn.Module
    kernel: attention.Kernel
    dtype: torch.dtype
    """In which the model computes."""
    device: torch.device
    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    """Draw from so many likeliest counts."""
    chunk_tokens: int = CHUNK_TOKENS
    """Of a prompt, read at a time."""

    def __post_init__(self):
        check_settings(self.temperature, self.top_k)
        vocab_size = self.model.architecture.vocab_size
        if vocab_size <= SEPARATOR:
            raise ValueError(f"vocab_size={vocab_size} has no separator, {SEPARATOR}: this is no model of spikes")

    @torch.no_grad()
    def read(self, tokens: torch.Tensor, num_neurons: int) -> Prompt:
        """Prompts (prompts, tokens), chunk by chunk, and the separator that begins the next bin; no tokens at all are legal."""
        check_prompt(tokens, num_neurons)
        tokens = torch.nn.functional.pad(tokens, (0, 1), value=SEPARATOR).to(self.device)
        cache = self._cache(batch=len(tokens), capacity=tokens.shape[1])
        for chunk in tokens.split(self.chunk_tokens, dim=1):
            logits = cache.feed(self.model, chunk)[:, -1]
        return Prompt(num_neurons, cache, logits)

    def roll_out(
        self,
        prompt: Prompt,
        *,
        bins: int,
        rollouts: list[int],
        first_bin: int = 0,
        tell: Callable[[int], None] = no_one,
    ) -> np.ndarray:
        """Counts (rollouts, neurons, bins) that follow the prompt: the only one, or one for each of the rollouts.

        A rollout is known by its number. first_bin: how many of its bins are drawn already, where this is not its beginning.
        tell: called after each bin with the number of tokens drawn and forced since the last call.
        """
        return self._roll_out(prompt, bins, rollouts, first_bin, tell)

    def expected(self, prompt: Prompt, *, bins: int, rollouts: list[int]) -> np.ndarray:
        """The counts that the model expects, given what the rollout has drawn before each: float64, as those of roll_out.

        Their mean over rollouts is that of the counts, with less noise, and never zero.
        """
        means = torch.empty(bins * prompt.num_neurons, len(rollouts), dtype=torch.float64, device=self.device)
        self._roll_out(prompt, bins, rollouts, 0, no_one, means)
        return means.view(bins, prompt.num_neurons, -1).permute(2, 1, 0).cpu().numpy()

    @torch.no_grad()
    def _roll_out(self, prompt, bins, rollouts, first_bin, tell, means=None):
        n, batch = prompt.num_neurons, len(rollouts)
        num_counts, drawn_before = bins * n, first_bin * n
        chance = [keyed.uniform(num_counts, self.seed, ROLLOUTS, number, start=drawn_before) for number in rollouts]
        chance = torch.from_numpy(np.stack(chance, axis=1)).to(self.device)
        cache = self._cache(batch=batch, capacity=bins * (n + 1), before=prompt.cache)
        separators = torch.full((batch, 1), SEPARATOR, dtype=torch.uint8, device=self.device)
        drawn = torch.empty(num_counts, batch, dtype=torch.uint8, device=self.device)
        counts = torch.arange(NUM_COUNTS, dtype=torch.float64, device=self.device)
        logits = prompt.logits.expand(batch, -1)
        for place in range(num_counts):
            shares = self._shares(logits)
            drawn[place] = _pick(shares, chance[place])
            if means is not None:
                means[place] = shares @ counts
            tokens, ends_bin = drawn[place, :, None], (place + 1) % n == 0
            if place + 1 < num_counts:
                # A bin's last count and the separator after it need no draw between them: one step for both.
                logits = cache.feed(self.model, torch.cat((tokens, separators), dim=1) if ends_bin else tokens)[:, -1]
            if ends_bin:
                tell(batch * (n + 1))
        return drawn.view(bins, n, batch).permute(2, 1, 0).cpu().numpy()

    def go_on(
        self, counts, prompt: Prompt, *, bins: int, rollouts: list[int], window_bins: int | None = None, tell=no_one
    ) -> np.ndarray:
        """As roll_out, however far: a model that sees window_bins at most goes on from the last half of them, again and again.

        counts (rollouts, neurons, bins) is what `visible` leaves of the prompts, and `prompt` the same, read.
        """
        history, done = counts, 0
        while True:
            seen = visible(history, window_bins)
            leg = bins - done if window_bins is None else min(bins - done, window_bins - seen.shape[2])
            prompt = prompt if done == 0 else self.read(encode(seen), prompt.num_neurons)
            drawn = self.roll_out(prompt, bins=leg, rollouts=rollouts, first_bin=done, tell=tell)
            history, done = np.concatenate((history, drawn), axis=2), done + leg
            if done == bins:
                return history[:, :, counts.shape[2] :]

    def _draw(self, logits: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
        """A count for each row of logits (B, vocabulary), by chance in [0, 1)."""
        return _pick(self._shares(logits), chance)

    def _shares(self, logits: torch.Tensor) -> torch.Tensor:
        """The probabilities of counts that are drawn from, (B, NUM_COUNTS) in float64."""
        scores = logits[:, :NUM_COUNTS].double() / self.temperature  # without the separator, and without what is no count
        if self.top_k is not None:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[:, -1:], -torch.inf)
        return scores.softmax(-1)

    def _cache(self, *, batch: int, capacity: int, before: KVCache | None = None) -> KVCache:
        a = self.model.architecture
        return KVCache(
            self.kernel,
            num_layers=a.num_layers,
            num_kv_heads=a.num_kv_heads,
            head_dim=a.head_dim,
            batch=batch,
            capacity=capacity,
            dtype=self.dtype,
            device=self.device,
            before=before,
        )


def _pick(shares: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Of each row the first count whose cumulative probability passes chance."""
    cumulative = shares.cumsum(-1)
    return (cumulative <= chance[:, None] * cumulative[:, -1:]).sum(-1)


def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> attention.Kernel:
    """The first of KERNELS that this device runs."""
    by_name = {candidate.name: candidate for candidate in kernels.CANDIDATES}
    candidates = tuple(by_name[name] for name in KERNELS)
    return attention.choose("auto", device=device, dtype=dtype, head_dim=head_dim, with_halves=True, candidates=candidates)
