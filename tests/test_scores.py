"""Scores equal a plain float64 account of their formulas, on any division of the windows over ranks."""

import threading
from concurrent.futures import ThreadPoolExecutor
from math import exp, lgamma, log

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from torchtitan_bio.data import loader, spikes
from torchtitan_bio.data.batch import IGNORED
from torchtitan_bio.models.llama3 import Architecture, Model
from torchtitan_bio.science import scores, units

RECORDINGS = [  # source, session, neurons, bins
    ("a", "1", 3, 23),
    ("a", "1", 3, 9),
    ("a", "2", 2, 14),
    ("b", "1", 5, 11),
    ("b", "3", 1, 1),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Windows of several recordings of two sources, two of them of one session; one neuron is silent, one count is large."""
    random = np.random.default_rng(0)
    recordings = [random.poisson(0.8, (n, t)).astype(np.uint8) for _, _, n, t in RECORDINGS]
    recordings[2][0], recordings[3][1, 4] = 0, 200
    sources, sessions = ([recording[i] for recording in RECORDINGS] for i in (0, 1))
    path = tmp_path_factory.mktemp("rows") / "test.parquet"
    pq.write_table(
        pa.table(
            {
                "spike_counts": pa.array([counts.tolist() for counts in recordings], pa.list_(pa.list_(pa.uint8()))),
                "subject_id": ["s"] * len(recordings),
                "session_id": sessions,
                "segment_id": [str(row) for row in range(len(recordings))],
                "source_dataset": sources,
            }
        ),
        path,
    )
    return spikes.build(
        source=str(path.parent), split="test", mode="aligned", overlap=True, seq_len=24, index_folder=path.parent / "index"
    )


def fake_logits(batch, dtype=torch.float64):
    """A number for each (window, position, token) that does not depend on how windows are batched."""
    rows = []
    for row, offset in batch.origins:
        generator = torch.Generator().manual_seed(1000 * row + offset)
        rows.append(torch.randn(batch.inputs["labels"].shape[1], 256, generator=generator, dtype=torch.float64) * 2)
    filler = batch.inputs["labels"].shape[0] - len(rows)
    return torch.stack(rows + [torch.zeros(batch.inputs["labels"].shape[1], 256).double()] * filler).to(dtype)


def scored(dataset, rank=0, world_size=1, local_batch_size=3, dtype=torch.float64):
    model = scores.SpikeScores(dataset)
    for batch in loader.finite(dataset, local_batch_size=local_batch_size, rank=rank, world_size=world_size):
        model.add(fake_logits(batch, dtype), batch)
    return model


def plain_account(dataset, sources):
    """The formulas of the specification, token by token in Python floats."""
    events, separators = [], []  # (session, neuron, count, ln q, ln(1 - p(B)), mean), and -ln p(B)
    for i in range(len(dataset)):
        batch = dataset.collate([dataset.sample(i)])
        row, _ = batch.origins[0]
        if dataset.index.source_dataset[row] not in sources:
            continue
        n = int(dataset.index.n[row])
        for position, (label, logits) in enumerate(
            zip(batch.inputs["labels"][0].tolist(), fake_logits(batch)[0].tolist(), strict=True)
        ):
            if label == IGNORED:
                continue
            weights = [exp(value) for value in logits]
            if label == 255:
                separators.append(-log(weights[255] / sum(weights)))
                continue
            q = [value / sum(weights[:255]) for value in weights[:255]]
            mean = sum(k * value for k, value in enumerate(q))
            session = (dataset.index.source_dataset[row], dataset.index.session_id[row])
            events.append(
                (session, (position + 1) % (n + 1), label, log(q[label]), -log(1 - weights[255] / sum(weights)), mean)
            )
    poisson = histogram = rate = 0.0
    by_neuron = {}
    for session, neuron, count, *_, mean in events:
        by_neuron.setdefault((session, neuron), []).append(count)
        rate += mean - count * log(mean) + lgamma(count + 1)
    for counts in by_neuron.values():
        lam = sum(counts) / len(counts)
        poisson += sum(lam - (y * log(lam) if y else 0) + lgamma(y + 1) for y in counts)
        histogram -= sum(log(counts.count(y) / len(counts)) for y in counts)
    nll, leak = -sum(event[3] for event in events), sum(event[4] for event in events)
    num_spikes = sum(event[2] for event in events)
    return {
        "nll": nll / len(events),
        "nll_all": (nll + leak + sum(separators)) / (len(events) + len(separators)),
        "nll_bos": sum(separators) / len(separators) if separators else None,
        "leak": leak / len(events),
        "bits_per_count": nll / len(events) / log(2),
        "bits_per_spike": (poisson - nll) / num_spikes / log(2),
        "bits_per_spike_hist": (histogram - nll) / num_spikes / log(2),
        "bits_per_spike_rate": (poisson - rate) / num_spikes / log(2),
        "null_nll": poisson / len(events),
        "hist_nll": histogram / len(events),
        "spikes": num_spikes,
        "counts": len(events),
        "tokens": len(events) + len(separators),
    }


def test_every_score_equals_a_plain_account_of_the_formulas(dataset):
    result = scored(dataset).result()
    assert result["counts"] == sum(n * t for *_, n, t in RECORDINGS)
    for found, sources in ((result, "ab"), (result["sources"]["a"], "a"), (result["sources"]["b"], "b")):
        expected = plain_account(dataset, sources)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-10)
    a, b = result["sources"]["a"], result["sources"]["b"]
    assert result["macro"] == pytest.approx({name: (a[name] + b[name]) / 2 for name in result["macro"]}, rel=1e-12)
    assert result["windows"] == len(dataset) == a["windows"] + b["windows"]


def results_of_ranks(models):
    """Each model's result on a thread of its own, with sums over all of them."""
    barrier, brought = threading.Barrier(len(models)), [None] * len(models)

    def result(rank):
        def sum_array(array):
            brought[rank] = array
            barrier.wait(10)
            total = sum(brought)
            barrier.wait(10)
            return total

        return models[rank].result(sum_array)

    with ThreadPoolExecutor(len(models)) as pool:
        return list(pool.map(result, range(len(models))))


@pytest.mark.parametrize("world_size", [2, 4, 40])
def test_ranks_that_add_up_their_sums_get_the_scores_of_one_process(dataset, world_size):
    ranks = results_of_ranks([scored(dataset, rank, world_size, local_batch_size=1) for rank in range(world_size)])
    whole = flatten(scored(dataset).result())
    for rank in ranks:
        assert flatten(rank) == pytest.approx(whole, rel=1e-12)


def flatten(scores):
    return {
        f"{prefix}{name}": value
        for prefix, part in [("", scores), ("macro ", scores["macro"]), *scores["sources"].items()]
        for name, value in part.items()
        if not isinstance(value, dict)
    }


def test_fp32_and_chunks_change_nothing_that_matters(dataset, monkeypatch):
    monkeypatch.setattr(scores, "CHUNK_TOKENS", 7)
    assert flatten(scored(dataset, dtype=torch.float32).result()) == pytest.approx(flatten(scored(dataset).result()), rel=1e-6)


def test_a_leak_of_a_billionth_is_measured_and_not_rounded_to_zero():
    logits = torch.zeros(1, 256)
    logits[0, 255] = -15.0
    terms = scores.token_terms(logits, torch.tensor([0]), torch.tensor([3]))
    assert terms["leak"][0] == pytest.approx(exp(-15) / 255, rel=1e-5)
    assert terms["nll"][0] == pytest.approx(log(255), rel=1e-6)


def test_a_larger_vocabulary_wastes_on_its_other_tokens_what_it_gives_them_and_is_scored_as_it_divides_counts():
    logits = torch.randn(9, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([3, 0, 254, 9, 17, 30, 2, 1, 100])
    p = logits.softmax(1).numpy()
    of_counts = p[:, :255].sum(1)
    q = p[:, :255] / of_counts[:, None]
    terms = scores.token_terms(logits, torch.arange(9), labels)
    expected = {
        "nll": -np.log(q[range(9), labels]),
        "leak": -np.log(of_counts),
        "nll_bos": -np.log(p[:, 255]),
        "mean": q @ np.arange(255),
        "below": [row[:label].sum() for row, label in zip(q, labels, strict=True)],
    }
    for name, values in expected.items():
        assert terms[name] == pytest.approx(values, rel=1e-12)
    # Whatever the other tokens are given, counts that are divided alike score alike.
    alike = scores.token_terms(logits[:, :256], torch.arange(9), labels)
    assert all(alike[name] == pytest.approx(terms[name], rel=1e-12) for name in ("nll", "mean", "below"))


def test_a_model_that_knows_nothing_pays_ln_255_a_count(dataset):
    model = scores.SpikeScores(dataset)
    for batch in loader.finite(dataset, local_batch_size=4, rank=0, world_size=1):
        model.add(torch.zeros(*batch.inputs["labels"].shape, 256), batch)
    assert model.result()["nll"] == pytest.approx(log(255), rel=1e-6)


def test_window_sums_add_up_to_the_whole(dataset):
    model = scores.SpikeScores(dataset, keep_windows=True)
    for batch in loader.finite(dataset, local_batch_size=4, rank=0, world_size=1):
        model.add(fake_logits(batch), batch)
    result = model.result()
    assert sum(nll for _, nll, _ in model.window_nll) == pytest.approx(result["nll"] * result["counts"], rel=1e-12)
    assert [origin for origin, _, _ in model.window_nll] == [dataset.origin(i) for i in range(len(dataset))]


def test_nothing_scored_gives_none_and_zeros(dataset):
    result = scores.SpikeScores(dataset).result()
    assert result["bits_per_spike"] is None and result["nll"] is None and result["counts"] == 0


def test_windows_that_do_not_start_at_a_separator_are_refused():
    stream = spikes.build(source="embedded:a2929", split="test", mode="stream", seq_len=50)
    batch = stream.collate([stream.sample(1)])
    with pytest.raises(ValueError, match="does not start at a separator.*mode='aligned', overlap=True"):
        scores.SpikeScores(stream).add(torch.zeros(1, 50, 256), batch)


def test_the_embedded_recordings_null_is_that_of_both_halves_as_one_session():
    halves = spikes.build(source="embedded:a2929", split="test", mode="aligned", overlap=True, seq_len=512)
    model = scores.SpikeScores(halves)
    for batch in loader.finite(halves, local_batch_size=64, rank=0, world_size=1):
        model.add(torch.zeros(*batch.inputs["labels"].shape, 256), batch)
    result = model.result()
    assert (result["spikes"], result["counts"]) == (18592, 15 * 12000)
    # Pooled over both halves; a null for each half would be lower by 0.066 bits/spike.
    assert result["null_nll"] == pytest.approx(0.32579226798, rel=1e-9)


def test_bits_per_spike_is_the_formula_of_the_neural_latents_benchmark_on_numbers_by_hand(tmp_path):
    """(log-likelihood of the rates - log-likelihood of each neuron's own mean) / spikes / ln 2, and the first neuron's mean is
    (0 + 1 + 3 + 0) / 4 = 1, the second's (2 + 0 + 0 + 0) / 4 = 1/2. Predicted rates: 1/2 for the first, 2 for the second.

        rates  -4/2 - 4*2 + 4 ln(1/2) + 2 ln 2 - ln 3! - ln 2!  =  -10 - 2 ln 2 - ln 12
        means  -4*1 - 4/2 + 4 ln 1 + 2 ln(1/2) - ln 3! - ln 2!  =   -6 - 2 ln 2 - ln 12
        so bits/spike is (-10 + 6) / 6 / ln 2 = -2 / (3 ln 2)
    """
    np.savez(tmp_path / "test.npz", spike_counts=np.array([[0, 1, 3, 0], [2, 0, 0, 0]], np.uint8))
    data = spikes.build(source=str(tmp_path), split="test", mode="aligned", overlap=True, seq_len=6)
    model = scores.SpikeScores(data)
    for batch in loader.finite(data, local_batch_size=2, rank=0, world_size=1):
        model.add(of_rates(batch, {1: 0.5, 2: 2.0}), batch)
    result = model.result()
    assert result["bits_per_spike_rate"] == pytest.approx(-2 / (3 * log(2)), rel=1e-12)
    assert result["bits_per_spike"] == pytest.approx(-2 / (3 * log(2)), rel=1e-12)  # these q are Poisson to 1e-300
    assert result["null_nll"] == pytest.approx((6 + 2 * log(2) + log(12)) / 8, rel=1e-12)


def of_rates(batch, rates):
    """Logits (B, S, 256) of a model that predicts one Poisson rate for each neuron (1, 2, .. in its bin) all the time."""
    width = len(rates) + 1
    logits = torch.zeros(*batch.inputs["labels"].shape, 256, dtype=torch.float64)
    counts = torch.arange(255, dtype=torch.float64)
    for position in range(logits.shape[1]):
        place = (position + 1) % width
        if place:
            logits[:, position, :255] = counts * log(rates[place]) - torch.lgamma(counts + 1)
            logits[:, position, 255] = -40
    return logits


def test_a_model_of_constant_rates_scores_exactly_the_poisson_null():
    """And with standard errors that are zero to rounding: it is the null in every stretch."""
    rows = "ring-hmm:n=3,K=8,bins=400,test_rows=2"
    halves = spikes.build(source=rows, split="test", mode="aligned", overlap=True, seq_len=64)
    counts = np.concatenate([halves.counts(row) for row in range(2)], axis=1)
    rates = {neuron + 1: mean for neuron, mean in enumerate(counts.mean(1).tolist())}
    model = scores.SpikeScores(halves, units.by_recording(halves))
    for batch in loader.finite(halves, local_batch_size=64, rank=0, world_size=1):
        model.add(of_rates(batch, rates), batch)
    result = model.result()
    for name in ("bits_per_spike", "bits_per_spike_rate"):
        assert result[name] == pytest.approx(0, abs=1e-10)
        assert result["standard_errors"][name] == pytest.approx(0, abs=1e-10)
    assert result["nll"] == pytest.approx(result["null_nll"], rel=1e-10) and result["standard_errors"]["nll"] > 0.001
    assert result["standard_errors"]["over"].startswith("stretches") and result["standard_errors"]["number"] == 20


def test_scores_with_standard_errors_are_those_without_on_any_ranks(dataset):
    def with_errors(rank=0, world_size=1):
        model = scores.SpikeScores(dataset, units.by_recording(dataset))
        for batch in loader.finite(dataset, local_batch_size=1, rank=rank, world_size=world_size):
            model.add(fake_logits(batch), batch)
        return model

    whole = with_errors().result()
    parts = (whole, whole["macro"], *whole["sources"].values())
    errors = [part.pop("standard_errors") for part in parts]
    assert flatten(whole) == pytest.approx(flatten(scored(dataset).result()), rel=1e-12)
    for rank in results_of_ranks([with_errors(rank, 3) for rank in range(3)]):
        found = [part["standard_errors"] for part in (rank, rank["macro"], *rank["sources"].values())]
        for one, other in zip(found, errors, strict=True):
            assert one.pop("over", None) == other.get("over")
            assert one == pytest.approx({name: value for name, value in other.items() if name != "over"}, rel=1e-9)
    assert errors[1]["nll"] == pytest.approx(np.hypot(errors[2]["nll"], errors[3]["nll"]) / 2, rel=1e-12)


def test_a_standard_error_is_that_of_the_bootstrap_over_clusters():
    random = np.random.default_rng(0)
    clusters = np.repeat(np.arange(200), 3)
    weights = random.integers(1, 5, 600).astype(float)
    values = weights * (random.normal(size=200)[clusters] + 0.3 * random.normal(size=600))
    drawn = random.integers(0, 200, (4000, 200))
    of_cluster = np.stack([np.bincount(clusters, values), np.bincount(clusters, weights)])
    above, below = of_cluster[:, drawn].sum(2)
    assert units.standard_error(values, weights, clusters) == pytest.approx((above / below).std(), rel=0.05)
    assert units.standard_error(values, weights, np.arange(600)) < 0.7 * (above / below).std()
    assert units.standard_error(values[:3], weights[:3], clusters[:3]) is None


def test_cells_are_recordings_where_there_are_enough_and_stretches_of_equally_many_windows_elsewhere(tmp_path):
    lengths = {"many": [40] * 12, "few": [400, 100]}
    for source, bins in lengths.items():
        for number, t in enumerate(bins):
            (tmp_path / "test").mkdir(exist_ok=True)
            path = tmp_path / "test" / f"{source}{number}.npz"
            np.savez(
                path, spike_counts=np.ones((2, t), np.uint8), source_dataset=source, subject_id="s", session_id=str(number)
            )
    data = spikes.build(source=str(tmp_path), split="test", mode="aligned", overlap=True, seq_len=12)  # 4 bins, 2 apart
    found = units.by_recording(data)
    cells = [found.cell(data.origin(i)) for i in range(len(data))]
    assert cells == sorted(cells) and set(cells) == set(range(len(found.row)))
    for i, cell in enumerate(cells):
        row, _ = data.origin(i)
        assert found.row[cell] == row and found.groups[found.group[cell]] == data.index.source_dataset[row]
        assert found.populations[found.population[cell]] == (data.session[row], 2)
    few = np.flatnonzero(found.group == found.groups.index("few"))
    sizes = np.bincount(cells)[few]
    assert sizes.tolist() == [20] * 9 + [19] + [5] * 9 + [4]  # 199 and 49 windows, 10 stretches each
    assert found.clusters(few)[0].startswith("stretches") and len(found.row) == 12 + len(few)
    assert found.clusters(np.arange(len(found.row)))[0] == "recordings"


@pytest.mark.parametrize("lengths", [[400, 100], [9, 41, 43, 60], [200] * 9, [20] * 12, [23]])
def test_what_is_independent_among_all_counts_does_not_depend_on_how_they_are_grouped(tmp_path, lengths):
    (tmp_path / "test").mkdir()
    for number, t in enumerate(lengths):
        np.savez(
            tmp_path / "test" / f"{number:02}.npz",
            spike_counts=np.ones((2, t), np.uint8),
            source_dataset="ab"[number % 2],
            subject_id=str(number % 3),
            session_id=str(number),
        )
    data = spikes.build(source=str(tmp_path), split="test", mode="aligned", overlap=True, seq_len=12)  # 4 bins, 2 apart
    found = []
    for by in units.GROUPINGS:
        cells = units.by_recording(data, by)
        of_window = np.array([cells.cell(data.origin(i)) for i in range(len(data))])
        assert set(of_window) == set(range(len(cells.row)))
        for group in range(len(cells.groups)):  # cells are fine enough: of a group about 20 stretches, or all its windows
            own = np.flatnonzero(cells.group == group)
            windows = np.isin(of_window, own).sum()
            if cells.clusters(own)[0] != "recordings":
                assert len(own) == len(np.unique(cells.clusters(own)[1])) >= min(windows, 10)
        kind, clusters = cells.clusters(of_window)
        assert kind == ("recordings" if len(lengths) > 9 else "stretches of consecutive windows")
        found.append(np.unique(clusters, return_inverse=True)[1].tolist())
    assert found[1:] == found[:1] * 3 and max(found[0]) + 1 <= 27  # of 9 recordings 3 stretches each


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("source_dataset", ["a", "b"]),
        ("subject", ["a/s", "b/s"]),
        ("session", ["a/s/1", "a/s/2", "b/s/1", "b/s/3"]),
        ("recording", 5),
    ],
)
def test_groups_can_be_subjects_sessions_or_recordings_whose_counts_add_up_to_all(dataset, by, names):
    model = scores.SpikeScores(dataset, units.by_recording(dataset, by))
    for batch in loader.finite(dataset, local_batch_size=3, rank=0, world_size=1):
        model.add(fake_logits(batch), batch)
    result = model.result()
    assert list(result["sources"]) == names or len(result["sources"]) == names
    assert sum(each["counts"] for each in result["sources"].values()) == result["counts"]
    # The null stays that of the session, however finely it is told: nats add up.
    nats = sum(each["null_nll"] * each["counts"] for each in result["sources"].values())
    assert nats == pytest.approx(result["null_nll"] * result["counts"], rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("is_shuffled", [False, True])
def test_where_time_is_shuffled_a_trained_model_scores_about_the_histogram_and_not_above_it(tmp_path, is_shuffled):
    for split, rows in (("train", 200), ("test", 40)):
        data = spikes.build(source="ring-hmm:n=3,K=8,bins=160,rows=200,test_rows=40", split=split, seq_len=64)
        counts = np.concatenate([data.counts(row) for row in range(rows)], axis=1)
        if is_shuffled:
            counts = np.random.default_rng(0).permuted(counts, axis=1)  # each neuron by itself
        np.savez(tmp_path / f"{split}.npz", spike_counts=counts)
    train = spikes.build(source=str(tmp_path), mode="aligned", seq_len=64)
    test = spikes.build(source=str(tmp_path), split="test", mode="aligned", overlap=True, seq_len=64)
    model = Model(Architecture(dim=32, num_layers=1, num_heads=2, num_kv_heads=2, ffn_dim=64, vocab_size=256))
    model.init_weights(0)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(200):
        adamw.param_groups[0]["lr"] = 1e-2 * (1 - step / 200)
        batch = loader.read(train, range(16 * step, 16 * (step + 1)))
        adamw.zero_grad()
        (model(batch.inputs)["next_token"] / batch.counts["next_token"]).backward()
        adamw.step()
    found = scores.SpikeScores(test)
    with torch.no_grad():
        for batch in loader.finite(test, local_batch_size=100, rank=0, world_size=1):
            found.add(model.logits(batch.inputs), batch)
    above_histogram = found.result()["bits_per_spike_hist"]
    assert -0.06 < above_histogram < 0.0 if is_shuffled else above_histogram > 0.1
