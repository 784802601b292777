"""The card of an exported model: what is known of it, in Markdown for the Hub, and a field to fill for all that is not.

Pure functions of what a checkpoint and its run hold. Every text that was not written here has passed disclosure.public_text.
"""

import json
import math
import re

from torchtitan_bio import resume
from torchtitan_bio.data import spikes
from torchtitan_bio.science import caveats
from torchtitan_bio.science.disclosure import (
    UNKNOWN,
    dataset,
    fill_in,
    holds_spikes,
    public,
    public_config,
    public_text,
    token_contract,
)

ROWS_SHOWN = 50  # of a table of sources
SPLIT_BY = {"given": "as the files give it", "session": "by session", "time": "by time"}


def card(
    *,
    repo: str | None,
    model_json: dict,
    num_parameters: int | None = None,
    dtype: str | None = None,
    step: int | None = None,
    train_state: dict | None = None,
    data: dict | None = None,
    validation: dict | None = None,
    ladder: dict | None = None,
    versions: dict | None = None,
    formats: list[str] | None = None,
) -> str:
    """The README.md of an export. None stands for what nothing is known of, and becomes a field to fill.

    repo: USER/NAME on the Hub. model_json, train_state, data, ladder: as the files of those names hold them; data is {"train":
    Spikes.summary(), "held_out": the same or None}. validation: the line of metrics.jsonl that scored these very weights.
    versions: by package. formats: of "hf" and "pth".
    """
    step = train_state["step"] if step is None and train_state else step
    model_json, validation, versions, dtype = public(model_json), public(validation), public(versions), public(dtype)
    formats = formats or []
    about_spikes = holds_spikes(model_json, train_state, data)
    train, held_out = dataset(train_state, data, "train"), dataset(train_state, data, "held_out")
    score = validation if validation and validation["step"] == step else None
    name = public_text(repo.rpartition("/")[2]) if repo else name_of(model_json)
    parts = [
        front_matter(name, about_spikes, train, held_out, score, formats),
        f"# {name}",
        opening(step, about_spikes),
        "## Model",
        architecture(model_json, num_parameters, dtype),
        "## Loading",
        loading(repo, formats),
    ]
    if about_spikes is not False:
        parts += ["## From spikes to tokens", encoding(token_contract(model_json, train_state, data), formats)]
        parts += ["## Data", of_data(train, held_out, train_state)]
        parts += ["## Scores", of_scores(score, validation, dtype, held_out, ladder, train_state)]
    parts += ["## Training", of_training(train_state)]
    parts += ["## Versions", of_versions(versions)]
    rights = "## Licence" if about_spikes is False else "## Licence, species and consent"
    parts += [rights, table(["", ""], caveats.rights(about_spikes, train))]
    parts += ["## Intended use and limits", of_limits(about_spikes, train, held_out)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def name_of(model_json: dict) -> str:
    return "-".join(model_json[key] for key in ("family", "flavor") if model_json.get(key)) or "model"


def table(header: list[str], rows: list[list]) -> str:
    """Markdown; columns of numbers stand to the right."""
    numeric = [bool(rows) and all(isinstance(row[place], int | float) for row in rows) for place in range(len(header))]
    lines = [header, ["---:" if right else "---" for right in numeric], *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value) -> str:
    """A text that cannot leave its cell; a whole number with its thousands apart."""
    if isinstance(value, str):
        return re.sub(r"([|<>])", r"\\\1", " ".join(value.split()))
    return f"{value:,}" if isinstance(value, int) else str(value)


def front_matter(name, about_spikes, train, held_out, score, formats) -> str:
    """YAML between two lines of dashes. Its values are JSON, which YAML takes as it stands."""
    metadata = {"license": "unknown"}
    if "hf" in formats:
        metadata["library_name"] = "transformers"
    # No pipeline_tag: none is about spikes, and an export has no tokenizer that a pipeline could use.
    metadata["tags"] = ["llama", "torchtitan_bio", *(["neuroscience", "spiking-neural-activity"] if about_spikes else [])]
    if about_spikes and train and "/" in train["source"]:
        metadata["datasets"] = [train["source"]]
    metrics = [
        {"type": kind, "name": title, "value": round(score[kind], 4)}
        for kind, title in (("bits_per_spike", "bits/spike over the oracle Poisson null"), ("nll", "nats per count"))
        if score and is_number(score.get(kind))
    ]
    if about_spikes and metrics and held_out and held_out["source"]:
        kind = re.sub(r"[^\w./-]+", "-", held_out["source"].removeprefix("embedded:"))
        title = f"{held_out['source']}, split {held_out['split']} {SPLIT_BY.get(held_out['split_by'], '')}"
        of = {"type": kind, "name": title, "split": held_out["split"], "args": {"windows": subset_of(score)}}
        result = {"task": {"type": "other", "name": "next spike count"}, "dataset": of, "metrics": metrics}
        metadata["model-index"] = [{"name": name, "results": [result]}]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in metadata.items()]
    lines[0] += "  # to be filled in by the publisher: the licence of these weights"
    return "\n".join(["---", *lines, "---"])


def is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def subset_of(score) -> str:
    return score.get("subset", UNKNOWN)


def opening(step, about_spikes) -> str:
    if about_spikes:
        what = "A causal language model of spiking neural activity: its tokens are the spike counts of time bins."
    elif about_spikes is None:
        what = (
            f"A causal language model of {spikes.Spikes.vocab_size} tokens, as many as a model of spike counts has. "
            f"Nothing says what it was trained on: {fill_in('what this model is')}."
        )
    else:
        what = f"A causal language model. {fill_in('what it was trained on, and for')}."
    at = f"{step:,} optimizer steps" if step is not None else fill_in("optimizer steps")
    return f"{what} Trained for {at}, exported by torchtitan_bio."


def architecture(model_json, num_parameters, dtype) -> str:
    rows = [
        ["family", model_json.get("family") or fill_in("family")],
        ["flavor", model_json.get("flavor") or "none"],
        ["parameters", fill_in("number of parameters") if num_parameters is None else f"{num_parameters:,}"],
        ["type of the weights", dtype or fill_in("type of the weights")],
    ]
    return table(["", "value"], rows + [[f"`{key}`", str(size)] for key, size in model_json["architecture"].items()])


def loading(repo, formats) -> str:
    place = repo or "."
    parts = []
    if "hf" in formats:
        where = "" if repo else "  # this folder"
        parts.append(
            "```python\nfrom transformers import LlamaForCausalLM\n\n"
            f'model = LlamaForCausalLM.from_pretrained("{place}").eval(){where}\n```\n'
        )
    if "pth" in formats:
        parts.append(
            "`consolidated.00.pth` holds the same weights under Meta's names, with rotary positions in interleaved pairs; "
            "`params.json` holds the sizes.\n\n```python\nimport torch\n\n"
            'weights = torch.load("consolidated.00.pth", weights_only=True, mmap=True)\n```\n'
        )
    return "\n".join(parts) if parts else f"{fill_in('the files and how they are loaded')}\n"


ENCODING = '''```python
import numpy as np
import torch

def encode(counts):
    """Tokens of spike counts, integers (neurons, bins)."""
    neurons, bins = counts.shape
    tokens = np.full((bins, neurons + 1), SEPARATOR, dtype=np.int64)
    tokens[:, 1:] = np.minimum(counts, LARGEST).T
    return torch.from_numpy(tokens.reshape(-1))

counts = np.random.default_rng(0).poisson(0.1, (15, 8))  # 15 neurons, 8 bins: put a recording here
tokens = encode(counts)
```
'''
PREDICTING = """
Logits at a position are of the next token. A count is predicted by the distribution over counts alone, with the separator left
out, since its place is known:

```python
with torch.no_grad():
    log_q = model(tokens[None]).logits[0, :-1, :SEPARATOR].float().log_softmax(-1)
is_count = tokens[1:] != SEPARATOR
nats_per_count = -log_q[is_count].gather(1, tokens[1:][is_count, None]).mean()
```
"""


def encoding(contract, formats) -> str:
    width, context = contract["bin_width_s"], contract["context_length_tokens"]
    seconds = f"{width} s" if is_number(width) else fill_in("seconds a bin") if width == UNKNOWN else width
    rows = [
        [f"token {contract['separator']}", "the separator: it opens each bin"],
        [f"tokens 0 to {contract['largest_count']}", f"spike counts; larger ones {contract['larger_counts']}"],
        ["order", contract["order"]],
        ["length", f"{contract['tokens_of_a_recording']} tokens, with neither neuron ids nor an end marker"],
        ["bin width", seconds],
        ["context in training", f"{context:,} tokens" if is_number(context) else fill_in("tokens of context")],
    ]
    size = contract["model_vocabulary"]
    if is_number(size) and size > contract["vocabulary"]:
        rows.append([f"tokens {contract['vocabulary']} to {size - 1}", "not used by spikes, and not trained on them"])
    note = "" if contract["known_from"] == "the training run" else f"This is known from {contract['known_from']}.\n\n"
    code = ENCODING + (PREDICTING if "hf" in formats else "")
    code = code.replace("SEPARATOR", str(contract["separator"])).replace("LARGEST", str(contract["largest_count"]))
    return f"{note}{table(['', 'meaning'], rows)}\n\n`spikes.json` holds the same for programs.\n\n{code}"


def of_data(train, held_out, train_state) -> str:
    if train is None:
        return fill_in("training data, its sources with token counts, and the split")
    parts = [of_dataset("Trained on", train)]
    if "tokens" not in train:
        known = train_state["fingerprint"]
        parts.append(
            f"It had {known['num_rows']:,} recordings and {known['num_counts']:,} counts. {fill_in('token counts by source')}"
        )
    return "\n\n".join([*parts, of_dataset("Held out", held_out) if held_out else "Nothing was held out."])


def of_dataset(title, of) -> str:
    source = f"`{of['source']}`" if of["source"] else fill_in("name of the data")
    line = f"{title}: {source}, split `{of['split']}` {SPLIT_BY.get(of['split_by'], '')}"
    if "tokens" not in of:
        return f"{line}."
    rows = [
        [
            row["source_dataset"] or "(no name)",
            *(row[key] for key in ("recordings", "tokens", "counts")),
            " to ".join(f"{number:,}" for number in dict.fromkeys(row["neurons"])),
            *(row[key] or "not named" for key in ("subjects", "sessions")),
            row["clipped"],
        ]
        for row in of["sources"][:ROWS_SHOWN]
    ]
    header = ["source_dataset", "recordings", "tokens", "counts", "neurons", "subjects", "sessions", "counts clipped"]
    notes = [
        f"{of['recordings']:,} recordings, {of['tokens']:,} tokens, {of['counts']:,} counts, windows cut as `{of['mode']}`."
    ]
    if of["num_neurons"] != "all":
        notes.append(f"At most {of['num_neurons']:,} neurons of a recording are used at a time, and counted here.")
    if of["malformed"] or of["files_left_out"]:
        notes.append(f"Malformed and left out: {of['malformed']:,} recordings; left out: {of['files_left_out']:,} files.")
    if of["too_wide"]:
        notes.append(f"Too wide for a window and not used: {of['too_wide']:,} recordings, which are counted here.")
    if len(of["sources"]) > ROWS_SHOWN:
        notes.append(f"The {ROWS_SHOWN} largest of {of['num_sources']:,} sources:")
    return f"{line}. {' '.join(notes)}\n\n{table(header, rows)}"


SCORES = {
    "bits_per_spike": "bits/spike over the oracle Poisson null",
    "bits_per_spike_hist": "bits/spike over the oracle histogram of each neuron's counts",
    "bits_per_spike_rate": "bits/spike of a Poisson with the model's expected count, over the oracle Poisson null",
    "bits_per_count": "bits to code a count",
    "nll": "nats to code a count",
    "null_nll": "nats to code a count, oracle Poisson null",
    "hist_nll": "nats to code a count, oracle histogram",
    "leak": "nats a count lost on the separator, where none can be",
    "nll_bos": "nats a separator",
}


HOW_SCORED = """\
A window starts at a separator and lies inside one recording. It scores the bins that no window before it scored, and where a
recording is long enough half a window of its past precedes them. The model's distribution over counts, q, leaves the separator
out. `bits_per_spike` = (sum of [lam - y ln lam + ln y!] + sum of ln q(y)) / (spikes x ln 2) for counts y, where lam is the
neuron's mean over the scored bins of its session: a null that knows what the model has to find out."""


def of_scores(score, validation, dtype, held_out, ladder, train_state) -> str:
    if score is None:
        missing = fill_in("held-out scores, of which data and how computed, beside baselines")
        return f"A validation of step {validation['step']:,} is not of these weights. {missing}" if validation else missing
    source = f"`{held_out['source']}`" if held_out and held_out["source"] else fill_in("name of the held-out data")
    scores = [[f"`{key}`", round(score[key], 4), meaning] for key, meaning in SCORES.items() if is_number(score.get(key))]
    sizes = ", ".join(f"{score[key]:,} {key}" for key in ("windows", "spikes", "counts", "tokens"))
    parts = [
        f"On held-out data of {source}, windows scored: {subset_of(score)} ({sizes}).",
        table(["score", "value", "meaning"], scores),
        HOW_SCORED,
    ]
    if dtype and dtype != "float32":
        parts.append(f"Scored were the float32 weights of training, before they became {dtype}.")
    by_source = [
        [name or "(no name)", round(of["bits_per_spike"], 4), of["spikes"], of["counts"]]
        for name, of in sorted(score.get("sources", {}).items(), key=lambda item: -item[1]["counts"])
        if is_number(of.get("bits_per_spike"))
    ]
    if by_source:
        parts.append(table(["source_dataset", "bits/spike", "spikes", "counts"], by_source[:ROWS_SHOWN]))
    return "\n\n".join([*parts, of_ladder(score, ladder, train_state)])


def of_ladder(score, ladder, train_state) -> str:
    """The baselines with this model among them, worst first; none that saw other data than the model or its score."""
    if not is_number(score.get("bits_per_spike")):
        return "Baselines are scored in bits/spike, and this score has none."
    if ladder is None:
        return f"No baselines beside the two nulls are known. {fill_in('baselines on the same data')}"
    seen = train_state["fingerprint"] if train_state else ladder["train"]
    if resume.sha256(ladder["held_out"]) != score.get("held_out") or ladder["train"] != seen:
        return f"The baselines that are known are of other data than this score. {fill_in('baselines on the same data')}"
    rungs = [*([public_text(name), value] for name, value in ladder["rungs"]), ["**this model**", score["bits_per_spike"]]]
    notes = ["Baselines are fitted on the training data of each session and scored on all of its held-out counts."]
    if subset_of(score) != "all":
        notes.append(f"This model was scored on a part of them: {subset_of(score)}.")
    notes += [
        f"Baselines leave out {len(names):,} of {ladder['num_recordings']:,} held-out recordings, the model's score does not: "
        f"{public_text(reason)}."
        for reason, names in ladder["left_out"].items()
    ]
    rows = [[name, round(value, 4)] for name, value in sorted(rungs, key=lambda rung: rung[1])]
    return f"{table(['held-out bits/spike', 'value'], rows)}\n\n{' '.join(notes)}"


def of_training(train_state) -> str:
    if not train_state:
        return fill_in("steps, tokens, batch, context length, learning rate, schedule, seed and precision")
    config = public_config(train_state["config"])
    training, adamw, schedule = config["training"], config["optimizer"], config["lr_scheduler"]
    precision = training["mixed_precision_param"]
    rows = [
        ["optimizer steps", f"{train_state['step']:,} of {training['steps']:,}"],
        ["tokens seen", f"{train_state['tokens']:,} (steps x sequences x seq_len)"],
        ["sequences a step", f"{train_state['global_batch_size']:,}"],
        ["seq_len", f"{training['seq_len']:,} tokens"],
        ["optimizer", "AdamW, " + ", ".join(f"{key} {value}" for key, value in adamw.items() if key != "lr")],
        ["peak learning rate", str(adamw["lr"])],
        ["schedule", ", ".join(f"{key} {value}" for key, value in schedule.items())],
        ["gradient norm at most", str(training["max_norm"])],
        ["seed", str(training["seed"])],
        ["compute", "bfloat16 on a GPU, float32 on a CPU" if precision == "auto" else precision],
        ["parameters and gradient sums", f"float32 and {training['mixed_precision_reduce']}"],
    ]
    if config["checkpoint"]["init_from"]:
        rows.append(["started from", f"the weights of {config['checkpoint']['init_from']}"])
    whole = json.dumps(config, indent=1, ensure_ascii=False)
    return (
        f"{table(['', 'value'], rows)}\n\n<details><summary>The whole configuration, without paths</summary>\n\n"
        f"```json\n{whole}\n```\n\n</details>"
    )


def of_versions(versions) -> str:
    if not versions:
        return fill_in("versions of torch and of what trained this model")
    return table(["package", "version"], [[name, str(value)] for name, value in versions.items()])


def of_limits(about_spikes, train, held_out) -> str:
    if about_spikes is False:
        return f"{fill_in('intended use and limits')} No tokenizer comes with the weights."
    if_it_is = "" if about_spikes else f"{fill_in('intended use and limits')} If this is a model of spike counts:\n\n"
    return if_it_is + "\n".join(f"- {point}" for point in caveats.limits(about_spikes, train, held_out))
