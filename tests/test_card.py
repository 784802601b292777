"""A card says what its inputs say, marks what nobody knows, and tells nobody where a model was made."""

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, RepoCard

from torchtitan_bio import resume
from torchtitan_bio.config import Config, Data, Training, Validation
from torchtitan_bio.data import spikes
from torchtitan_bio.models import llama3
from torchtitan_bio.science import card, disclosure
from torchtitan_bio.science.scores import SpikeScores

QUICKSTART = {"family": "llama3", "flavor": "quickstart", "architecture": asdict(llama3.FLAVORS["quickstart"])}
FILL = "to be filled in by the publisher"
RUNGS = [["Poisson null (oracle)", 0.0], ["own-history n-gram", 1.1774], ["pooled token 3-gram", -1.0754], ["GLM", 1.0933]]


@pytest.fixture(scope="module")
def run():
    """What a run of the embedded recording leaves behind, its scores those of a model that knows nothing."""
    train = spikes.build(source="embedded:a2929", seq_len=512)
    held_out = spikes.build(source="embedded:a2929", seq_len=512, split="test", mode="aligned", overlap=True)
    scorer, windows = SpikeScores(held_out), 12
    batch = held_out.collate([held_out.sample(i) for i in range(windows)])
    scorer.add(torch.zeros(*batch.inputs["labels"].shape, 256), batch)
    state = resume.train_state(
        1200,
        global_batch_size=4,
        seq_len=512,
        skipped_in_a_row=0,
        fingerprint=train.fingerprint,
        config=asdict(Config(training=Training(seq_len=512, steps=1500))),
    )
    held_out_sha256 = resume.sha256(held_out.fingerprint)
    return {
        "repo": "lab/mouse-spikes",
        "model_json": QUICKSTART,
        "num_parameters": 175_360,
        "dtype": "bfloat16",
        "step": 1200,
        "train_state": state,
        "data": {"train": train.summary(), "held_out": held_out.summary()},
        "validation": scorer.result()
        | {"kind": "validation", "step": 1200, "subset": f"{windows} of 748 windows, by hash", "held_out": held_out_sha256},
        "ladder": {
            **{"version": 1, "train": train.fingerprint, "held_out": held_out.fingerprint, "rungs": RUNGS},
            **{"left_out": {"no training data of their session": ["x"]}, "num_recordings": 3},
        },
        "versions": {"torch": "2.13.0", "torchtitan_bio": "0.1.0"},
        "formats": ["hf", "pth"],
    }


def cells(text):
    """{first cell: the other cells} of every table row."""
    rows = [[part.strip() for part in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip("`* "): row[1:] for row in rows}


def section(text, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


def test_the_hub_reads_the_metadata_and_it_claims_no_more_than_the_run(run):
    data = ModelCard(card.card(**run)).data
    assert (data.license, data.library_name, data.pipeline_tag, data.datasets) == ("unknown", "transformers", None, None)
    assert data.model_name == "mouse-spikes" and "spiking-neural-activity" in data.tags
    scores = {result.metric_type: result.metric_value for result in data.eval_results}
    assert scores == {key: pytest.approx(run["validation"][key], abs=5e-5) for key in ("bits_per_spike", "nll")}
    (result,) = [result for result in data.eval_results if result.metric_type == "nll"]
    assert (result.dataset_type, result.dataset_split) == ("a2929", "test")
    assert result.dataset_args == {"windows": "12 of 748 windows, by hash"}
    small = run | {"validation": run["validation"] | {"nll": 4.2e-3, "bits_per_spike": float("nan")}}
    assert [of.metric_value for of in ModelCard(card.card(**small)).data.eval_results] == [0.0042]
    pile = {"source": "eminorhan/neural-pile-primate"}
    named = run["data"] | {"train": run["data"]["train"] | pile}
    assert ModelCard(card.card(**run | {"data": named})).data.datasets == ["eminorhan/neural-pile-primate"]


def test_every_number_of_the_inputs_stands_in_the_card(run):
    text = card.card(**run)
    found = cells(text)
    for key, value in QUICKSTART["architecture"].items():
        assert found[key] == [str(value)]
    assert found["parameters"] == ["175,360"] and found["type of the weights"] == ["bfloat16"]
    assert found["bin width"] == ["0.02 s"] and found["context in training"] == ["512 tokens"]
    assert found["optimizer steps"] == ["1,200 of 1,500"] and found["tokens seen"][0].startswith(f"{1200 * 4 * 512:,} ")
    assert found["peak learning rate"] == ["0.0003"] and found["seed"] == ["42"] and found["torch"] == ["2.13.0"]
    assert f"| pynapple-A2929 | 2 | {16 * 48000:,} | {15 * 48000:,} | 15 | 1 | 1 | 0 |" in section(text, "Data")
    assert f"| pynapple-A2929 | 2 | {16 * 12000:,} | {15 * 12000:,} | 15 | 1 | 1 | 0 |" in section(text, "Data")
    for key in card.SCORES:
        assert float(found[key][0]) == pytest.approx(run["validation"][key], abs=5e-5)
    assert f"{run['validation']['spikes']:,} spikes" in text and "12 of 748 windows, by hash" in section(text, "Scores")
    assert json.loads(re.search(r"```json\n(.*?)```", text, re.S)[1]) == disclosure.public_config(run["train_state"]["config"])
    assert "mouse units" in found["species"][0] and found["licence of the data"][0].startswith("MIT")
    assert FILL in found["licence of the weights"][0]


def test_the_ladder_has_this_model_in_its_place(run):
    value = 1.1234567
    text = card.card(**run | {"validation": run["validation"] | {"bits_per_spike": value}})
    ladder = section(text, "Scores").split("| held-out bits/spike")[1]
    rungs = [(name, float(cell[0])) for name, cell in cells("|" + ladder).items() if re.fullmatch(r"-?\d+\.\d+", cell[0])]
    expected = sorted([*map(tuple, RUNGS), ("this model", value)], key=lambda rung: rung[1])
    assert [name for name, _ in rungs] == [name for name, _ in expected]
    assert [number for _, number in rungs] == pytest.approx([number for _, number in expected], abs=5e-5)
    assert "1 of 3 held-out recordings" in ladder and "scored on a part" in ladder


def test_scores_of_other_weights_and_baselines_of_other_data_are_not_shown(run):
    other = card.card(**run | {"step": 900, "train_state": run["train_state"] | {"step": 900}})
    assert "step 1,200 is not of these weights" in other and "bits/spike over" not in other
    assert ModelCard(other).data.eval_results is None
    for part in ("train", "held_out"):
        changed = run["ladder"] | {part: run["ladder"][part] | {"num_counts": 7}}
        text = card.card(**run | {"ladder": changed})
        assert "of other data" in text and "GLM" not in text and "bits/spike over" in text
    text = card.card(**run | {"ladder": None})
    assert f"{FILL}: baselines" in text


def test_the_snippets_run_and_make_the_tokens_of_the_dataset(run, tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 256}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    torch.save({"norm.weight": torch.ones(3)}, tmp_path / "consolidated.00.pth")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", card.card(**run | {"repo": None}), re.S):
        exec(block, names)
    assert names["weights"]["norm.weight"].tolist() == [1, 1, 1]

    with torch.no_grad():
        logits = names["model"](names["tokens"][None]).logits[0].double().numpy()
    tokens, nats = names["tokens"].numpy(), []
    for position in range(len(tokens) - 1):
        if tokens[position + 1] != 255:
            p = np.exp(logits[position])
            nats.append(-np.log(p[tokens[position + 1]] / p[:255].sum()))
    assert len(nats) == 15 * 8 and names["nats_per_count"].item() == pytest.approx(np.mean(nats), abs=1e-5)

    counts = np.random.default_rng(0).integers(0, 300, (7, 40))
    np.savez("x.npz", spike_counts=counts)
    for source in ("x.npz", "embedded:a2929"):
        dataset = spikes.build(source=source, seq_len=255, mode="legacy")
        recording = counts if source == "x.npz" else dataset.counts(0)
        assert (names["encode"](recording)[:256].numpy() == dataset.sample(0).tokens).all()


def test_what_nobody_knows_is_a_field_to_fill():
    unknown = dict.fromkeys(
        "num_parameters dtype step train_state data validation ladder versions".split(), None
    )  # as of a checkpoint of gpt-neuro-arch
    text = card.card(repo=None, model_json=QUICKSTART, formats=["pth"], **unknown)
    for title in ("Data", "Scores", "Training", "Versions", "Licence, species and consent", "Intended use and limits"):
        assert FILL in section(text, title), title
    found = cells(text)
    assert all(FILL in found[key][0] for key in ("parameters", "type of the weights", "bin width", "context in training"))
    assert "what this model is" in text and "the size of the vocabulary alone" in text
    metadata = RepoCard(text).data.to_dict()
    assert metadata == {"license": "unknown", "tags": ["llama", "torchtitan_bio"]}
    contract = card.token_contract(QUICKSTART, None, None)
    assert contract["bin_width_s"] == contract["context_length_tokens"] == disclosure.UNKNOWN
    assert "confirmed" in contract["known_from"] and (contract["separator"], contract["largest_count"]) == (255, 254)


def test_a_checkpoint_without_its_data_summary_says_what_its_configuration_asked_for(run):
    text = card.card(**run | {"data": None})
    assert "`embedded:a2929`, split `train`" in text and "`embedded:a2929`, split `test`" in text
    assert "2 recordings and 720,000 counts" in text and f"{FILL}: token counts" in text
    assert card.token_contract(QUICKSTART, run["train_state"], None) == card.token_contract(
        QUICKSTART, run["train_state"], run["data"]
    )
    config = run["train_state"]["config"]
    alone = config | {"validation": asdict(Validation(enable=False))}
    text = card.card(**run | {"data": None, "validation": None, "train_state": run["train_state"] | {"config": alone}})
    assert "Nothing was held out" in text and "held no data out" in text
    for split_by, said in {"time": "follow the training bins", "session": "No session is in both"}.items():
        changed = config | {"data": asdict(Data(split_by=split_by))}
        assert said in card.card(**run | {"data": None, "train_state": run["train_state"] | {"config": changed}})


def test_a_language_model_has_a_card_without_a_word_of_spikes():
    language = {"family": "llama3", "flavor": "8B", "architecture": asdict(llama3.FLAVORS["8B"]) | {"vocab_size": 128_256}}
    text = card.card(repo="lab/llama", model_json=language, num_parameters=8_030_261_248, dtype="bfloat16", formats=["hf"])
    assert not re.search("spik|neur|bits|mouse|separator|species|held-out", text.lower())
    assert ModelCard(text).data.library_name == "transformers" and "8,030,261,248" in text and FILL in text
    assert card.token_contract(language, None, None) == {}


def test_sources_of_benchmarks_and_of_people_are_named_where_they_were_trained_on(run):
    train = run["data"]["train"]
    row = train["sources"][0]

    def of(*names, source="eminorhan/neural-pile-primate"):
        sources = [row | {"source_dataset": name} for name in names]
        changed = train | {"source": source, "sources": sources, "bin_width_s": None}
        return card.card(**run | {"data": {"train": changed, "held_out": changed | {"split": "test"}}})

    text = of("xiao", "h1", "dmfc-rsg")
    assert "h1 (FALCON (dandiset 000954))" in text and "dmfc-rsg (NLB (dandiset 000130))" in text and "m1-a" not in text
    assert "intracranial recordings in h1;" in text and "willett" not in text
    assert "other pieces of the same sessions" in text and "| bin width | **to be filled in" in text
    for quiet in (of("xiao", "perich"), of("h1", source="h1.parquet"), card.card(**run)):
        assert "benchmark" not in quiet and "intracranial" not in quiet


PLANTED = [
    "/home/someone/secret",
    "/home/someone",
    "~/someone/x",
    "~someone",
    "C:\\Users\\someone\\x",
    "C:/Users/someone",
    "\\\\box\\someone\\x",
    "s3://someone:key@box/x",
    "someone@box.example.org:/x",
    "../home/someone/x",
    "hf_abcdefghijSOMEONEabcdefghij",
    "sk-ant-api03-SOMEONEabcdef",
    "gho_SOMEONEabcdef",
    "a b=/home/someone/x",
    "file:///home/someone/x",
]


def plant(value, seed, keep=()):
    """Every string of a document replaced, the names in free tables too."""
    if isinstance(value, dict):
        return {key: each if key in keep else plant(each, seed, keep) for key, each in value.items()}
    if isinstance(value, list):
        return [plant(each, seed, keep) for each in value]
    return seed if isinstance(value, str) else value


@pytest.mark.parametrize("seed", PLANTED)
def test_nothing_private_leaves_whatever_string_it_was_planted_in(run, seed):
    free = {name: {seed: seed} for name in ("overrides", "source_weights", "init_rename")}
    lists = {name: [seed] for name in ("freeze", "include_sources", "exclude_sources", "init_allow_missing")}
    config = {
        section: {key: (free | lists).get(key, plant(value, seed)) for key, value in values.items()}
        for section, values in run["train_state"]["config"].items()
    }
    assert config["job"]["dump_folder"] == config["data"]["source"] == config["checkpoint"]["init_from"] == seed
    state = run["train_state"] | {"config": config}
    planted = {
        "model_json": plant(QUICKSTART, seed) | {"architecture": QUICKSTART["architecture"] | {"kind": seed}},
        "dtype": seed,
        "train_state": state,
        "validation": plant(run["validation"], seed, keep=["held_out"]) | {"sources": {seed: run["validation"]}},
        "ladder": run["ladder"] | {"rungs": [[seed, 1.0]], "left_out": {seed: [seed]}},
        "versions": {seed: seed},
    }
    for data in (plant(run["data"], seed, keep=["codec", "num_neurons"]), None):
        texts = [
            card.card(**run | planted | {"data": data}),
            json.dumps(card.token_contract(planted["model_json"], state, data)),
            json.dumps(disclosure.public_config(config)),
        ]
        for text in texts:
            assert not re.search(r"someone|/home|hf_|Users|box", text, re.I), re.findall(".*(?:someone|hf_|box).*", text, re.I)
        ModelCard(texts[0])
        assert card.SCORES["nll"] in texts[0] and "this model" in texts[0]


def test_a_configuration_keeps_what_is_public():
    config = asdict(Config(data=Data(source="/scratch/someone/pile", include_sources=["lab*"], index_folder="/scratch/x")))
    config["checkpoint"]["init_from"] = "outputs/first/checkpoint/step-00000500"
    public = disclosure.public_config(config)
    assert public["data"]["source"] == "pile" and public["checkpoint"]["init_from"] == "step-00000500"
    assert "job" not in public and "index_folder" not in public["data"]
    assert disclosure.public_config({"validation": {"source": "/home/someone"}})["validation"]["source"] == disclosure.LEFT_OUT
    changed = {"job", "data", "checkpoint"}
    assert {key: public[key] for key in public.keys() - changed} == {key: config[key] for key in config.keys() - changed}
    assert public["data"] | {"source": "", "index_folder": ""} == config["data"] | {"source": "", "index_folder": ""}
    for innocent in (
        "16 of 2998 windows, by hash",
        "layers.*.wq",
        "Poisson GLM (past + same bin)",
        "2.13.0+cpu",
        "task-running",
    ):
        assert disclosure.public_text(innocent) == innocent
