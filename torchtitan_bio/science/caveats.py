"""What a person should know before using a model of neural data: whose it is, what it cannot do, what its scores do not say.

`train` and `held_out` are as disclosure.dataset gives them.
"""

from torchtitan_bio.data import spikes, summary
from torchtitan_bio.science.disclosure import fill_in

# source_dataset in the Neural Pile, by the tables of its builders.
BENCHMARKS = {
    "area2-bump": "NLB (dandiset 000127)",
    "dmfc-rsg": "NLB (dandiset 000130)",
    "m1-a": "FALCON (dandiset 000941)",
    "h2": "FALCON (dandiset 000950)",
    "m2": "FALCON (dandiset 000953)",
    "h1": "FALCON (dandiset 000954)",
    "m1-b": "FALCON (dandiset 001209)",
}
HUMAN = ("card", "h1", "h2", "willett")


def rights(about_spikes: bool | None, train: dict | None) -> list[list[str]]:
    """Rows of (subject, what is known of it or a field to fill)."""
    source = (train or {}).get("source", "")
    known = summary.provenance(source)
    rows = [["licence of the weights", fill_in("licence of the weights")]]
    if about_spikes and source.startswith("ring-hmm"):
        rows.append(["data", "synthetic, made by torchtitan_bio: no species, no participants, no licence of others"])
    elif about_spikes and known:
        rows += [
            ["data", known["source"]],
            ["licence of the data", f"{known['license']} in torchtitan_bio"],
            ["species", known["units"]],
        ]
        is_mouse = "mouse" in known["units"]
        rows.append(["consent", "no human participants" if is_mouse else fill_in("consent or approval")])
    else:
        fields = ["licence of the data", *([] if about_spikes is False else ["species", "consent"])]
        rows += [[field, fill_in(f"{field}, for each source")] for field in fields]
    if human := sources_among(HUMAN, train):
        consent = fill_in("consent to this use, and its conditions")
        rows.append(["human participants", f"intracranial recordings {human}; {consent}"])
    return rows


def sources_among(names, train: dict | None) -> str:
    """Which of these sources of the Neural Pile are in the training data, in words; "" for none, and for other data."""
    if not train or "neural-pile" not in train["source"]:
        return ""
    if "sources" in train:
        there = {row["source_dataset"] for row in train["sources"]}
        found = [name for name in names if name in there]
        return f"in {join(names, found)}" if found else ""
    return f"in {join(names, names)}, unless they were left out" if "primate" in train["source"] else ""


def join(names, found) -> str:
    return ", ".join(f"{name} ({names[name]})" if isinstance(names, dict) else name for name in found)


def limits(about_spikes: bool | None, train: dict | None, held_out: dict | None) -> list[str]:
    """One point a paragraph; where it is not known that this is a model of spikes, what holds if it is one."""
    points = [
        "For research on the activity of populations of neurons: scoring recordings, sampling, fine-tuning. Not for clinical "
        f"decisions. {fill_in('further uses, and uses that are excluded')}",
        "A count is predicted from all earlier bins and from the earlier neurons of its own bin. The sum over a bin is the "
        "joint likelihood of its counts; a single term is no forecast.",
        "A neuron has no identity: it is a place in the bin, and keeps it through the context. The model knows of it what the "
        "context shows, and no more.",
        f"Counts above {spikes.LARGEST_COUNT} are read as {spikes.LARGEST_COUNT}. Bins of another width than in training are "
        "another kind of input.",
    ]
    if about_spikes:
        points.append(what_is_shared(train, held_out))
    if benchmarks := sources_among(BENCHMARKS, train):
        points.append(f"Test data of public benchmarks was trained on: {benchmarks}. Scores there are contaminated.")
    return points


def what_is_shared(train: dict | None, held_out: dict | None) -> str:
    """By training and held-out data, and so what a held-out score does not say."""
    if not train:
        return fill_in("what was held out, and whether its sessions and subjects are also in the training data")
    if not held_out:
        return "This run held no data out."
    if held_out.get("elsewhere") or held_out["source"] != train["source"]:
        return f"Held-out data is of another source. {fill_in('whether it shares sessions or subjects with training data')}"
    if train["split_by"] == "session":
        return "No session is in both training and held-out data; a subject may be."
    if train["split_by"] == "time":
        return "Held-out bins follow the training bins of the same recordings: scores say nothing of new sessions or subjects."
    if known := summary.provenance(train["source"]):
        return f"Training and held-out data are of one session ({known['split']}): scores say nothing of other sessions."
    if train["source"].startswith("ring-hmm"):
        return "Held-out recordings are drawn independently of those for training, by the same generator."
    if "neural-pile" in train["source"]:
        return (
            "The Neural Pile's test rows were drawn at random from pieces of sessions, and other pieces of the same sessions "
            "are in the training data: such scores say little of new sessions."
        )
    return f"The files say what is held out. {fill_in('whether its sessions and subjects are also in the training data')}"
