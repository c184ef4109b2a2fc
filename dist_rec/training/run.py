"""`dist-rec train`: one run folder, from a new run or an earlier one's last good checkpoint to its evaluation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from ..config import Config, save_config
from ..errors import UserError
from ..files import lock, write_text
from ..strict import to_dict
from . import checkpoint
from .checkpoint import Saved
from .evaluation import write_evaluation
from .finetuning import how_it_starts, start_of
from .looking_back import LookingBack, add_old_tests
from .prepare import prepare
from .process import choose_device, process_group, quieten
from .resume import changes, check_vectors, differences, find_earlier
from .setup import agree_on_index
from .start.origin import write_origin, write_schema
from .tracking import NoTracker, Tracker
from .trainer import Trainer


def train(config: Config, look_back: bool = True) -> Path:
    """Train a config under torchrun, or alone, from its last good checkpoint if it has one.

    Args:
        look_back: of a run that starts from another, evaluate the test rows of those before it before and after.

    Returns:
        The run folder.

    Raises:
        UserError: config or data are at fault; before any process group where that can be known.
        Stopped: a rank was told to stop; the same config goes on.
    """
    quieten()
    folder = config.run_folder
    find_earlier(config)
    prepared = prepare(config)
    device = choose_device(config)
    with process_group(config, device) as process:
        has_earlier = [False]
        if process.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            held = lock(folder)  # noqa: F841  for as long as this function runs
            has_earlier = [find_earlier(config) is not None]
        torch.distributed.broadcast_object_list(has_earlier)
        skipped = add_old_tests(prepared) if look_back else ["it was not asked for."]
        for split in prepared.indexes:
            agree_on_index(prepared, split)
        earlier = checkpoint.last_good(folder / "checkpoints") if has_earlier[0] else None
        check_vectors(earlier, prepared.store)
        if config.data.from_watermark and not earlier:
            raise UserError(
                f"data.from_watermark trains on what was appended since a checkpoint, and {folder} has none: train it "
                "without that key first."
            )
        start = None if earlier else start_of(prepared)
        trainer = Trainer(prepared, process, earlier, start)
        tracker = NoTracker()
        if process.is_main:
            save_config(config, folder / "config.yaml")
            write_schema(folder, prepared.schema)
            if start:
                write_origin(folder, prepared.origin)
                print(how_it_starts(prepared, start, trainer.converted), file=sys.stderr)
            write_text(folder / "plan.json", json.dumps(trainer.plan, indent=1))
            tracker = Tracker(folder, trainer.step)
            if earlier:
                print(_how_it_goes_on(earlier, trainer), file=sys.stderr)
            of_rows = prepared.indexes["train"].statistics
            if aside := prepared.kind.not_trained_on(prepared.schema, config, prepared.features, of_rows):
                print(f"dist-rec: {aside}", file=sys.stderr)
            if config.tables.wire != "fp32" and process.world_size == 1:
                print(
                    f"dist-rec: tables.wire {config.tables.wire} does nothing: one rank sends no vectors.",
                    file=sys.stderr,
                )
        back = LookingBack(folder, trainer, skipped) if prepared.origin else None
        try:
            if back and start:
                back.before()
            rates = trainer.train(tracker)
            split, result = _last_evaluation(trainer)
            if split is not None:
                tracker.evaluation(trainer.evaluated_step, split, result)
            if back:
                back.after()
        finally:
            tracker.close()
        summary = trainer.account.gather(trainer.passes)
        if process.is_main:
            rates |= result["rates"]
            news = trainer.stopping.news()
            told = {"steps": trainer.step, **to_dict(summary), **({"early_stopping": news} if news else {})}
            write_text(folder / "summary.json", json.dumps(told, indent=1))
            entry = {"split": split, "step": trainer.evaluated_step, **result, "rates": rates}
            write_evaluation(folder, entry, of_training=True)
    return folder


def _last_evaluation(trainer: Trainer) -> tuple[str | None, dict[str, Any]]:
    """The split that a run ends with and what is measured of it, or None and why nothing is. Collective."""
    prepared = trainer.prepared
    if why := prepared.kind.not_evaluated(prepared.config):
        return None, {"not_evaluated": why, "rates": {}, "overall": {}, "domains": {}}
    split = next(s for s in ("test", "valid", "train") if s in prepared.indexes)
    return split, trainer.evaluate(split, keep=True)


def _how_it_goes_on(earlier: Saved, trainer: Trainer) -> str:
    manifest = earlier.manifest
    changed = changes(manifest.config, to_dict(trainer.config))
    said = differences(manifest.environment, checkpoint.environment(), changed, trainer.config.dense.schedule)
    if manifest.plan != trainer.plan:
        said.append("the sharding plan")
    said += trainer.converted
    exact = "bit for bit as without the interruption" if not said else "not bit for bit, for these differ:"
    passed = [f"dist-rec: passed over: {fault}" for fault in earlier.passed_over]
    return "\n".join(
        [
            *passed,
            f"dist-rec: going on from {earlier.folder.name} {exact}",
            *(f"  - {difference}" for difference in said),
        ]
    )
