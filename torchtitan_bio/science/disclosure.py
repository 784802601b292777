"""What may be told of a run to the world, and what is known of its data and its tokens.

No local path, user name or token passes: public_config is where a configuration loses them, public_text where any text does.
Names of recordings, subjects and sessions do pass, since a report is a lab's own. What is pushed names none: a card has the
sums by source_dataset of data/summary.py, and neither a picture nor a report goes with it.
"""

import re

from torchtitan_bio.data import spikes, summary

UNKNOWN = "unknown: fill in"

# What names a place, a person or a secret: absolute and home paths, URLs, variables, addresses, tokens of the usual makers.
PRIVATE = re.compile(
    r"(^|[^\w.*)\]-])[/~]|\\|\b[A-Za-z]:/|(^|[^.])\.{1,2}/|(^|/)(home|Users)/|\$\w|@"
    r"|(?<![A-Za-z0-9])(hf|gh[opusr]|glpat|api|sk|sk-[a-z]+)[_-][A-Za-z0-9]{5}|hf_[A-Za-z0-9]{20}|github_pat_"
    r"|AKIA[A-Z0-9]{8}|eyJ[\w-]{8}"
)
LEFT_OUT = "(left out: it may name a place or a person)"
PRIVATE_KEYS = ("data.index_folder",)


def public_config(config: dict) -> dict:
    """A run's configuration without where it ran and by whom: paths become last names or are left out."""
    named = {}
    for section in config.keys() - {"job"}:  # the run's own folder and files, and what a person called it
        named[section] = {key: value for key, value in config[section].items() if f"{section}.{key}" not in PRIVATE_KEYS}
        for key in named[section].keys() & {"source", "init_from"}:
            whole = named[section][key]
            name = summary.public_name(whole) if key == "source" else summary.public_name(whole).rpartition("/")[2]
            named[section][key] = name or (LEFT_OUT if whole else "")
    return public({section: named[section] for section in config if section in named})


def public(document):
    """JSON of which every text, those that name its entries too, has passed public_text."""
    if isinstance(document, dict):
        return {public_text(key): public(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [public(value) for value in document]
    return public_text(document) if isinstance(document, str) else document


def public_text(text: str) -> str:
    """The text on one line of Markdown code or YAML, or LEFT_OUT instead of one that names a place, a person or a secret."""
    return LEFT_OUT if PRIVATE.search(text) else "".join(filter(str.isprintable, " ".join(text.split()).replace("`", "'")))


def fill_in(what: str) -> str:
    """What stands in a card for all that nothing is known of."""
    return f"**to be filled in by the publisher: {what}**"


def token_contract(model_json: dict, train_state: dict | None, data: dict | None) -> dict:
    """What a program needs to feed this model spikes, for spikes.json; empty for a model of something else."""
    known = holds_spikes(model_json, train_state, data)
    if known is False:
        return {}
    train = dataset(train_state, data, "train") or {}
    source = train.get("source") or ""
    bin_width_s = train.get("bin_width_s") or UNKNOWN
    return {
        "format": 1,
        "known_from": "the training run" if known else "the size of the vocabulary alone: to be confirmed by the publisher",
        "codec": spikes.CODEC,
        "separator": spikes.SEPARATOR,
        "smallest_count": 0,
        "largest_count": spikes.LARGEST_COUNT,
        "larger_counts": f"are read as {spikes.LARGEST_COUNT}",
        "order": "for each bin the separator, then the count of each neuron, in the same order in every bin",
        "tokens_per_bin": "neurons + 1",
        "tokens_of_a_recording": "(neurons + 1) * bins",
        "end_marker": None,
        "neuron_ids": None,
        "vocabulary": spikes.Spikes.vocab_size,
        "model_vocabulary": model_json["architecture"].get("vocab_size"),
        "bin_width_s": "synthetic: a bin has no duration" if source.startswith("ring-hmm") else bin_width_s,
        "context_length_tokens": (train_state or {}).get("fingerprint", {}).get("seq_len") or UNKNOWN,
    }


def holds_spikes(model_json: dict, train_state: dict | None, data: dict | None) -> bool | None:
    """Whether the tokens are spike counts; None where no run is known and the vocabulary is of the right size."""
    if train_state or data:
        codecs = ((train_state or {}).get("fingerprint", {}).get("codec"), ((data or {}).get("train") or {}).get("codec"))
        return spikes.CODEC in codecs
    return None if model_json["architecture"].get("vocab_size") == spikes.Spikes.vocab_size else False


def dataset(train_state: dict | None, data: dict | None, part: str) -> dict | None:
    """What is known of the "train" or "held_out" data: its summary, and what the configuration asked for; None for nothing."""
    config = (train_state or {}).get("config", {})
    found = (asked_for(config, part) if "data" in config else {}) | ((data or {}).get(part) or {})
    return public(found) if found else None


def asked_for(config: dict, part: str) -> dict:
    section, validation = config["data"], config["validation"]
    source, split = section["source"], section["split"]
    if part == "held_out":
        if not validation["enable"]:
            return {}
        source, split = validation["source"] or source, validation["split"]
    return {
        "source": summary.public_name(source),
        "elsewhere": source != section["source"],
        "split": split,
        "split_by": section["split_by"],
        "bin_width_s": summary.provenance(source).get("bin_width_s"),
    }
