"""What a training run writes down after each epoch, so that it can be continued, judged and watched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import records
from pipeline.errors import RunError, from_extra
from pipeline.train import run_folder, trained_model
from pipeline.train.loop import Loop
from pipeline.weights import TORN

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Row = dict[str, Any]


class Journal:
    """The history of a run and the best of it, in memory on every process and in files by the one that leads.

    Args:
        folder: The run.
        tensorboard: Write events for TensorBoard into `folder/tensorboard`.

    Attributes:
        history: One row per epoch.
        best: `epoch` with the highest val AUC (of equal ones, the lowest val loss) and its figures, `val`.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False) -> None:
        self.folder = folder
        self.history: list[Row] = []
        self.best: Row = {}
        self._writer = _summary_writer() if tensorboard else None

    def resume(self, loop: Loop) -> None:
        """Take up the last checkpoint, if there is one, and what was not written down after it.

        Raises:
            RunError: It is none of this run.
        """
        checkpoint = run_folder.load_checkpoint(self.folder, loop.feed.device)
        if checkpoint is None:
            return
        try:
            loop.load_state(checkpoint["loop"])
            self.history, self.best = json.loads(checkpoint["history"]), json.loads(checkpoint["best"])
        except (*TORN, RecursionError) as error:
            msg = (
                f"{str(self.folder / 'last.pt')!r} is no checkpoint of this run ({type(error).__name__}): "
                f"delete it and train again."
            )
            raise RunError(msg) from error
        if loop.team.leads:
            self._write_history()

    def patience_is_over(self, patience: int) -> bool:
        """Say whether the last `patience` epochs brought nothing better; never for 0."""
        return bool(patience and self.best and len(self.history) - self.best["epoch"] >= patience)

    def add(self, row: Row, figures: Mapping[str, Any], loop: Loop) -> None:
        """Write an epoch down: its weights if it is the best so far, then the checkpoint that names them.

        Args:
            row: Of the history; has `epoch`, `val_auc` and `val_loss`.
            figures: On val.
            loop: As it is after the epoch.
        """
        self.history.append(row)
        improved = not self.best or _rank(row) > _rank(self.history[self.best["epoch"] - 1])
        if improved:
            self.best = {"epoch": row["epoch"], "val": {"loss": row["val_loss"], **figures}}
        if not loop.team.leads:
            return
        if improved:
            trained_model.save_weights(self._best_file(), loop.best_guess.plain_state())
        history, best = json.dumps(self.history), json.dumps(self.best)
        run_folder.save_checkpoint(self.folder, {"loop": loop.state(), "history": history, "best": best})
        for file in self.folder.glob("best-*.safetensors"):
            if file != self._best_file():
                file.unlink()
        self._write_history()
        if self._writer is not None:  # a file per epoch, so that a continued run repeats none
            with self._writer(self.folder / "tensorboard", filename_suffix=f".{row['epoch']:04d}") as events:
                for key in row.keys() - {"epoch"}:
                    events.add_scalar(key, row[key], row["epoch"])

    def finish(self, description: trained_model.Description) -> None:
        """Leave the best weights under their final name, described; then drop what only continuing needed."""
        with records.replacing(self.folder / "model.safetensors") as file:
            file.write(self._best_file().read_bytes())
        trained_model.save_description(self.folder, description)
        run_folder.tidy(self.folder)

    def _write_history(self) -> None:
        records.write_json(self.folder / "history.json", self.history)
        records.write_csv(self.folder / "history.csv", self.history)

    def _best_file(self) -> Path:
        return self.folder / f"best-{self.best['epoch']:04d}.safetensors"


def _rank(row: Row) -> tuple[float, float]:
    return row["val_auc"], -row["val_loss"]


def _summary_writer() -> type[SummaryWriter]:
    with from_extra("Writing for TensorBoard", "tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter
