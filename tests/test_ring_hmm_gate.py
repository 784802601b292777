"""A model on data whose best possible score is known: near it, and never below it."""

from dataclasses import asdict
from pathlib import Path

import pytest

import preflight
import train
from torchtitan_bio import assembly, config_loader, distributed, optimizer
from torchtitan_bio.data import loader
from torchtitan_bio.science import ring_hmm_floor
from torchtitan_bio.science.scores import SpikeScores

TOML = Path(__file__).parent.parent / "train_configs" / "ring_hmm.toml"


@pytest.mark.slow
def test_a_thousand_steps_come_within_4_percent_of_the_floor_and_never_below_it():
    config = config_loader.load(["--job.config_file", str(TOML)]).config
    assert (config.training.steps, config.training.local_batch_size) == (1000, 4)
    architecture, global_batch_size = preflight.check(config, 1)
    world = distributed.start()
    silent = lambda line: None  # noqa: E731
    train_data, held_out = assembly.build_data(config, architecture, world, silent)
    model = assembly.build_model(config, architecture, None, world, silent).model
    adamw = optimizer.build(model, **asdict(config.optimizer))
    batches = loader.build(
        train_data,
        start_step=0,
        num_steps=config.training.steps,
        global_batch_size=global_batch_size,
        local_batch_size=config.training.local_batch_size,
        rank=0,
        world_size=1,
        num_workers=0,
    )
    for step, microbatches in enumerate(batches):
        factor = optimizer.lr_factor(step, steps=config.training.steps, **asdict(config.lr_scheduler))
        optimizer.set_lr(adamw, config.optimizer.lr * factor)
        train.train_step(model, adamw, microbatches, world, config.training.max_norm)
    scores = SpikeScores(held_out, keep_windows=True)
    result = train.validate(model, held_out, world, scores, local_batch_size=16)
    distributed.stop()
    gap = ring_hmm_floor.gap(scores.window_nll, ring_hmm_floor.window_nll(held_out))
    captured = gap.captured(result["hist_nll"])
    print(
        f"floor {gap.floor:.4f}, gap {gap.gap / gap.floor:.2%} +- {gap.standard_error / gap.floor:.2%}, captured {captured:.1%}"
    )
    assert gap.gap < 0.04 * gap.floor
    assert gap.gap > -3 * gap.standard_error
    assert captured > 0.85
