"""The state of a run as items of a checkpoint, and back."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from diffit_jax.runtime.checkpoint import Checkpoints
from diffit_jax.training.state import TrainState, all_finite


def save_state(checkpoints: Checkpoints, state: TrainState, batch_size: int) -> None:
    """Starts writing a checkpoint of the state; what samples are drawn with is in items of its own,
    for those who only sample."""
    step, updates = int(state.step), int(state.step) - int(state.skipped)
    soundness = {
        "updates": updates,
        "skipped_in_row": int(state.skipped_in_row),
        "finite": bool(all_finite(state)),
    }
    checkpoints.save(
        step, items_of(state), {"step": step, "images_seen": step * batch_size} | soundness
    )


def restore_state(
    checkpoints: Checkpoints, abstract: TrainState, allow_nonfinite: bool = False
) -> TrainState | None:
    """The state of the newest usable checkpoint, laid out as `abstract` says; None if there is no
    checkpoint."""
    restored = checkpoints.restore(items_of(abstract), allow_nonfinite=allow_nonfinite)
    if restored is None:
        return None
    _, items = restored
    power_emas = tuple(items["power_emas"][name] for name, _ in named(abstract.power_emas))
    apart = {
        "ema": items["ema"],
        "power_emas": power_emas,
        "constants": items.get("constants", abstract.constants),
        "objective": items.get("objective", {}),
    }
    return TrainState(**items["state"] | apart)


def items_of(state: TrainState) -> dict[str, Any]:
    kept = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    kept |= {"ema": None, "power_emas": (), "constants": None}
    del kept["objective"]  # as checkpoints have it since there is such
    items: dict[str, Any] = {"state": kept, "ema": state.ema}
    if state.constants:
        items["constants"] = state.constants
    if state.power_emas:
        items["power_emas"] = dict(named(state.power_emas))
    if state.objective:
        items["objective"] = state.objective
    return items


def named(trees: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """("0", tree), ("1", tree) …: how several averages are named in a checkpoint."""
    return ((str(index), tree) for index, tree in enumerate(trees))
