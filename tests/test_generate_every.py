"""Rasters drawn while a model trains: by the model as it is then, on all ranks together, and with no trace in the training."""

import signal
import time

import numpy as np
import pytest
import torch
from ranks import on_ranks
from whole_runs import exit_json, lines, losses, saved_steps, train_main

from torchtitan_bio import distributed, watchdog
from torchtitan_bio.config import ConfigError, Validation
from torchtitan_bio.data import spikes
from torchtitan_bio.science import ladder, rasters, report, sampling, trained, training_samples

STEPS = ["--training.steps", "4", "--validation.freq", "4", "--validation.max_windows", "2", "--checkpoint.interval", "2"]
EVERY_2 = [*STEPS, "--validation.generate_every", "2"]
PAUSE_S = 1.5
BINS = 8  # made up in each raster; its tokens are slow on many ranks of one machine


def pictures(folder):
    return sorted(path.name for path in (folder / "samples").iterdir())


def short(patch, rank):
    patch.setattr(training_samples, "DRAWN_TOKENS", 16 * BINS)


def drawn_in_a_run(rank, folder, arguments):
    """What was drawn by this rank."""
    kept, original = [], rasters.draw

    def bend(patch, rank):
        short(patch, rank)
        patch.setattr(rasters, "draw", lambda *parts: kept.append(parts) or original(*parts))

    train_main(rank, folder, arguments, bend)
    return kept


def drawn_from_a_checkpoint(rank, step_folder, prompt):
    found, world = trained.find(step_folder), distributed.start()
    model, _ = trained.load(found, world=world, param_dtype=torch.float32)
    kernel = sampling.choose_kernel(world.device, torch.float32, found.architecture.head_dim)
    sampler = sampling.Sampler(model=model, kernel=kernel, dtype=torch.float32, device=world.device)
    read = sampler.read(sampling.encode(prompt[None]), len(prompt))
    return sampler.go_on(np.stack([prompt] * 4), read, bins=BINS, rollouts=[0, 1, 2, 3], window_bins=8)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_pictures_show_what_the_saved_models_make_of_a_prompt_and_change_no_bit_of_the_training(tmp_path, ranks):
    on_ranks(ranks, train_main, tmp_path / "without", STEPS)
    settings = [*EVERY_2, "--metrics.enable_tensorboard", "true"]
    drawn, *by_others = on_ranks(ranks, drawn_in_a_run, tmp_path / "with", settings)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    scores = [lines(tmp_path / name, "validation")[-1] for name in ("with", "without")]
    assert scores[0] | {"seconds": 0} == scores[1] | {"seconds": 0}
    assert pictures(tmp_path / "with") == ["step-00000002.png", "step-00000004.png"]
    assert not (tmp_path / "without" / "samples").exists()

    recording = spikes.build(source="embedded:a2929", seq_len=128, split="test").counts(0)
    assert len(drawn) == 2 and not any(by_others)
    for step, (prompt, samples, truth, title) in zip((2, 4), drawn, strict=True):
        assert np.array_equal(np.concatenate((prompt, truth), axis=1), recording[:, : 4 + BINS]) and f"step {step}," in title
        folder = tmp_path / "with" / "checkpoint" / f"step-{step:08}"
        assert np.array_equal(samples, on_ranks(1, drawn_from_a_checkpoint, folder, prompt)[0])
    assert not np.array_equal(drawn[0][1], drawn[1][1])  # two steps later it makes something else of the same

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "with" / "tb" / "samples"))
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [2, 4]


def phases_of_a_run(rank, folder, arguments):
    """The phases that the watchdog was told, and "taken" for a picture that takes long and meets a file STOP."""
    phases = []

    def bend(patch, rank):
        short(patch, rank)
        original_enter, original_take = watchdog.Watch.enter, training_samples.TrainingSamples.take

        def enter(self, phase, step=None, *, patient=False):
            phases.append((phase, patient))
            return original_enter(self, phase, step, patient=patient)

        def take(self, step):
            original_take(self, step)
            time.sleep(PAUSE_S)
            (folder / "STOP").touch()
            phases.append("taken")

        patch.setattr(watchdog.Watch, "enter", enter)
        patch.setattr(training_samples.TrainingSamples, "take", take)

    train_main(rank, folder, arguments, bend)
    return phases


@pytest.mark.slow
def test_a_picture_is_a_patient_phase_in_no_step_time_and_a_stop_is_heard_right_after_it(tmp_path):
    steps = [word if word != "4" else "40" for word in STEPS]
    phases = on_ranks(2, phases_of_a_run, tmp_path / "run", [*steps, "--validation.generate_every", "3"])
    for of_rank in phases:
        assert of_rank.count("taken") == 1 and of_rank[of_rank.index("taken") - 1] == ("sampling", True)
        assert of_rank[of_rank.index("taken") + 1] == ("save", True)
    assert exit_json(tmp_path / "run") | {"started": ""} == {
        **{"reason": "preempted", "step": 3, "attempt": 1, "started": "", "steps_here": 3, "why": "STOP"},
    }
    assert saved_steps(tmp_path / "run") == [2, 3] and pictures(tmp_path / "run") == ["step-00000003.png"]
    assert not (tmp_path / "run" / "report.html").exists()  # told to stop, it has no time for a page
    on_ranks(2, train_main, tmp_path / "run", [*steps[:1], "5", *steps[2:], "--validation.generate_every", "3"], short)
    assert pictures(tmp_path / "run") == ["step-00000003.png", "step-00000005.png"]
    assert max(entry["step_s"] for entry in lines(tmp_path / "run", "train")) < PAUSE_S


def run_that_fails_to_look_back(rank, folder):
    def bend(patch, rank):
        def fit(*parts):
            seen.append((exit_json(folder)["reason"], signal.getsignal(signal.SIGTERM)))
            raise MemoryError("too many neurons")

        def page(*parts):
            raise RuntimeError("no page today")

        patch.setattr(ladder, "show", fit)
        patch.setattr(report, "page", page)

    seen = []
    return train_main(rank, folder, [*STEPS, "--validation.baselines=true"], bend), seen


def test_a_finished_run_leaves_a_page_about_itself_or_a_warning_and_nothing_after_it_undoes_that(tmp_path):
    (printed,) = on_ranks(1, train_main, tmp_path / "run", EVERY_2, short)
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"report: {tmp_path / 'run' / 'report.html'}" in printed
    last = lines(tmp_path / "run", "validation")[-1]
    assert f"{last['bits_per_spike']:.3f} bits/spike after step 4" in page and "finished, step 4" in page
    assert page.count("data:image/png;base64") == 2
    ((printed, seen),) = on_ranks(1, run_that_fails_to_look_back, tmp_path / "other")
    assert seen == [("finished", signal.SIG_DFL)]  # fitting takes its time, and a signal may end it
    assert "warning: no ladder of this run: MemoryError: too many neurons" in printed
    assert "warning: no report of this run: RuntimeError: no page today" in printed
    assert exit_json(tmp_path / "other")["reason"] == "finished" and not (tmp_path / "other" / "report.html").exists()


class Model:
    """As much of one as is asked before it is used."""

    class architecture:
        vocab_size, head_dim = 256, 16


def samples_of(folder, shapes, seq_len, said):
    """Of recordings of these shapes (neurons, bins)."""
    (folder / "test").mkdir()
    for number, shape in enumerate(shapes):
        counts = np.random.default_rng(number).integers(0, 4, shape).astype(np.uint8)
        np.savez(folder / "test" / f"{number}.npz", spike_counts=counts, source_dataset="a", session_id=str(number))
    held_out = spikes.build(source=str(folder), seq_len=seq_len, split="test", mode="aligned", overlap=True)
    settings = dict(dtype=torch.float32, device=torch.device("cpu"), is_writer=True, tensorboard=False)
    return held_out, training_samples.TrainingSamples(folder, held_out, Model(), **settings, say=said.append)


@pytest.mark.parametrize(
    ("shapes", "seq_len", "context", "bins", "window"),
    [
        ([(9, 500), (3, 500), (5, 500)], 80, 10, 256, 20),  # 20 bins of 4 tokens: half a window; 1,024 tokens
        ([(3, 500)], 2**17, 250, 250, 500),  # half the recording: all of it is prompt and truth
        ([(127, 2000)], 2**17, 32, 8, 64),  # 4,096 tokens
        ([(2000, 9), (3000, 9)], 2**17, 2, 1, 4),  # one bin, however many neurons it has
        ([(3, 2)], 8, 1, 1, 2),
        ([(2, 1), (3, 7)], 8, 1, 6, 2),  # one bin is none to go on from
    ],
)
def test_the_prompt_is_the_beginning_of_the_recording_with_fewest_neurons_and_bounded(
    tmp_path, shapes, seq_len, context, bins, window
):
    held_out, samples = samples_of(tmp_path, shapes, seq_len, [])
    fewest = min(n for n, t in shapes if t > 1)
    (row,) = np.flatnonzero((held_out.index.n == fewest) & (held_out.index.t > 1))
    recording = held_out.counts(int(row))
    assert (samples.bins, samples.window_bins) == (bins, window)
    assert np.array_equal(samples.prompt, recording[:, :context])
    assert np.array_equal(samples.truth, recording[:, context : context + bins]) and samples.truth.shape[1] == bins


def test_held_out_recordings_that_cannot_be_a_prompt_are_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="two fit into training.seq_len=8; there is none"):
        samples_of(tmp_path, [(4, 50), (2, 1)], 8, [])


def test_a_picture_that_cannot_be_written_is_a_warning(tmp_path):
    class Full:
        def save(self, path):
            path.write_text("half a pic")
            raise OSError(28, "No space left on device")

    said = []
    _, samples = samples_of(tmp_path, [(3, 50)], 80, said)
    samples._write(7, Full())
    assert len(said) == 1 and "step 7: no picture" in said[0] and "No space left" in said[0]
    assert pictures(tmp_path) == []


def test_no_steps_between_pictures_is_refused():
    with pytest.raises(ConfigError, match='validation.generate_every=0 must be at least 1, or "never"'):
        Validation(generate_every=0)
