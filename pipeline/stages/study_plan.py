"""The configuration of a study: variants and a grid over one experiment, spelled out into a configuration per run."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline import clip, encoders
from pipeline.config.check import validate
from pipeline.config.file import parse_override, read_yaml, set_key
from pipeline.config.schema import STORED, Config, Section
from pipeline.errors import ConfigError
from pipeline.stages.inputs import check_encoder, checkpoint
from pipeline.study.runs import Planned

Overrides = dict[str, Any]  # dotted key of the experiment to its value
Score = Literal["auc", "ap", "acc", "balanced_acc", "f1", "kappa", "ece", "brier"]
Command = Literal["train", "probe"]
_SEED = "train.seed"
_EVERY = "all"  # in the column of shots: as many images of a class as there are
_COMMAND = "command"  # key of a variant: what makes its runs
_TAKEN = {"run": "the study names the folders of its runs", "resources": "no result rests on it (`set` takes it)"}


class FoldsConfig(Section):
    """A cross-validation: how many folds, how they are drawn, and the share of each fold's training part for val."""

    of: Annotated[int, Field(ge=2)]
    seed: int = 0
    val: Annotated[float, Field(gt=0, lt=1)] = 0.15


class StudyConfig(Section):
    """A study: `set` changes the experiment `base` for all runs, and each run takes a variant and a grid point.

    With `folds`, a number or a section, each of these is made once for every fold. A variant sets keys, and with
    `command: probe` has its runs made by the probe, whatever the model.
    """

    base: Path
    folder: Path
    baseline: str
    variants: Annotated[dict[str, Overrides], Field(min_length=1)]
    grid: Annotated[dict[str, list[Any] | dict[str, Overrides]], Field(default_factory=dict)]
    set_: Annotated[Overrides, Field(alias="set", default_factory=dict)]
    folds: Annotated[int, Field(ge=2)] | FoldsConfig | None = None
    scores: Annotated[tuple[Score, ...], Field(min_length=1)] = ("auc", "acc")
    keep_weights: bool = True


@dataclass(frozen=True)
class Study:
    """A study as it was configured.

    Attributes:
        name: Of its folder.
        folder: Where its tables go; the runs are below `runs`.
        baseline: The variant that the others are compared with.
        scores: What the tables hold, the most important first.
        keep_weights: Whether runs keep their weights once they are evaluated.
        runs: In the order in which they are made: all of the first seed, then all of the next; of a seed fold by fold.
        configs: The configuration of each run, by its name.
        commands: What makes each run, by its name.
    """

    name: str
    folder: Path
    baseline: str
    scores: tuple[str, ...]
    keep_weights: bool
    runs: tuple[Planned, ...]
    configs: Mapping[str, Config]
    commands: Mapping[str, Command]

    def reads_store(self, name: str) -> bool:
        """Whether a run reads features: a probe always does."""
        return self.commands[name] == "probe" or self.configs[name].reads_store


@dataclass(frozen=True)
class _Choice:
    """One value of an axis: what it is called in names and tables, and what it sets."""

    label: Any
    overrides: Overrides


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read the configuration of a study and check that of every run.

    Args:
        path: YAML, as for an experiment.
        overrides: `section.key=value` for all runs, after `set`.

    Raises:
        ConfigError: One line for each problem, which names the file, the variant or the axis, and the key.
    """
    written = read_yaml(path, "configs/studies/*.yaml", "and docs/studies.md says what one holds")
    plan = validate(StudyConfig, written, str(path))
    _check(path, plan)
    base, extra = _read_base(path, plan), [parse_override(text) for text in overrides]
    runs: list[Planned] = []
    configs: dict[str, Config] = {}
    commands: dict[str, Command] = {}
    for (variant, changes, point), fold in itertools.product(_points(plan), _folds(plan)):
        values = _changed(base, path, plan, extra, variant, point)
        labels = {_short(axis, plan.grid): choice.label for axis, choice in point.items()}
        if fold is not None:
            values["fold"], labels["fold"] = fold, fold["number"]
        where = f"{path}: variant {variant!r}" + "".join(f", {axis} {label!r}" for axis, label in labels.items())
        checked = validate(Config, values, where)
        check_encoder(checked, where)
        named = _run_name(variant, labels, checked)
        configs[named] = checked.model_copy(update={"run": plan.folder / "runs" / named})
        commands[named] = changes.get(_COMMAND, "train")
        at = {axis: choice.label for axis, choice in point.items() if set(choice.overrides) != {_SEED}}
        cell = _cell(variant, labels, checked)
        number = None if fold is None else fold["number"]
        runs.append(Planned(named, configs[named].run, cell, at, checked.train.seed, number))
    if all(run.cell["shots"] == _EVERY for run in runs):
        runs = [replace(run, cell={key: said for key, said in run.cell.items() if key != "shots"}) for run in runs]
    _check_names(path, runs)
    order = {seed: number for number, seed in enumerate(dict.fromkeys(run.seed for run in runs))}
    runs.sort(key=lambda run: (order[run.seed], run.fold or 0))  # stable: one that is cut short has whole seeds
    study = Study(
        plan.folder.name, plan.folder, plan.baseline, plan.scores, plan.keep_weights, tuple(runs), configs, commands
    )
    _check_stores(path, study)
    _check_weights(path, study)
    return study


def _read_base(path: Path, plan: StudyConfig) -> dict[str, Any]:
    """The experiment that a study changes.

    Raises:
        ConfigError: There is none.
    """
    try:
        return read_yaml(plan.base)
    except ConfigError as error:
        message = f"{path}: base: {error}"
        raise ConfigError(message) from None


def _changed(
    base: Mapping[str, Any],
    path: Path,
    plan: StudyConfig,
    extra: Sequence[tuple[str, Any, str]],
    variant: str,
    point: Mapping[str, _Choice],
) -> dict[str, Any]:
    """The experiment of a variant at a point of the grid, as plain values: what is set last counts."""
    values, changes = copy.deepcopy(dict(base)), plan.variants[variant]
    for key, value in plan.set_.items():
        set_key(values, key, value, f"{path}: set.{key}")
    for key, value, said in extra:
        set_key(values, key, value, said)
    for key, value in changes.items():
        if key != _COMMAND:
            set_key(values, key, value, f"{path}: variants.{variant}.{key}")
    for axis, choice in point.items():
        for key, value in choice.overrides.items():
            set_key(values, key, value, f"{path}: grid.{axis}.{key}")
    if changes.get(_COMMAND) == "probe":
        model = values.get("model")
        asked = {"clip": model["clip"]} if isinstance(model, dict) and "clip" in model else {}
        values["model"] = {"backbone": "none", **asked}  # the probe chooses what it reads
    return values


def _points(plan: StudyConfig) -> Iterator[tuple[str, Overrides, dict[str, _Choice]]]:
    """Every variant at every point of the grid."""
    axes = {axis: _choices(axis, values) for axis, values in plan.grid.items()}
    for chosen in itertools.product(*axes.values()):
        for variant, changes in plan.variants.items():
            yield variant, changes, dict(zip(axes, chosen, strict=True))


def _folds(plan: StudyConfig) -> list[Overrides | None]:
    """What `fold` is in each run of a grid point: once nothing without a cross-validation."""
    if plan.folds is None:
        return [None]
    rule = FoldsConfig(of=plan.folds) if isinstance(plan.folds, int) else plan.folds
    return [{"number": number, **rule.model_dump()} for number in range(rule.of)]


def _choices(axis: str, values: list[Any] | dict[str, Overrides]) -> list[_Choice]:
    """A list gives values of one key; a mapping gives names to sets of keys."""
    if isinstance(values, dict):
        return [_Choice(name, overrides) for name, overrides in values.items()]
    return [_Choice(value if isinstance(value, str | int | float) else _text(value), {axis: value}) for value in values]


def _check(path: Path, plan: StudyConfig) -> None:
    """Refuse what would make two runs one, or leave it open which of two values counts."""
    if plan.baseline not in plan.variants:
        message = f"{path}: baseline: got {plan.baseline!r}, expected one of {', '.join(plan.variants)}"
        raise ConfigError(message)
    set_by_grid: dict[str, str] = {}
    for axis, values in plan.grid.items():
        choices = _choices(axis, values)
        texts = [_text(choice.label) for choice in choices]
        if not choices or len(set(texts)) < len(texts):
            message = f"{path}: grid.{axis}: got {texts}; expected at least one value, each once"
            raise ConfigError(message)
        for key in {key for choice in choices for key in choice.overrides}:
            if key in set_by_grid:
                message = f"{path}: grid.{axis}: {key!r} is set by grid.{set_by_grid[key]} too; leave it to one of them"
                raise ConfigError(message)
            set_by_grid[key] = axis
    for variant, changes in plan.variants.items():
        if changes.get(_COMMAND, "train") not in ("train", "probe"):
            message = f"{path}: variants.{variant}.command: got {changes[_COMMAND]!r}, expected 'train' or 'probe'"
            raise ConfigError(message)
        for key in changes:
            if key in set_by_grid:
                message = (
                    f"{path}: variants.{variant}.{key}: grid.{set_by_grid[key]} sets it too; leave it to one of them"
                )
                raise ConfigError(message)
    if plan.folds is not None and "fold" in {axis.rsplit(".", 1)[-1] for axis in plan.grid}:
        message = f"{path}: grid: an axis that is called 'fold' stands beside `folds`; give its key another name"
        raise ConfigError(message)
    places = {"set": plan.set_, **{f"variants.{name}": changes for name, changes in plan.variants.items()}}
    for place, keys in {**places, "grid": set_by_grid}.items():
        for key in keys:
            if plan.folds is not None and key.split(".")[0] == "fold":
                message = f"{path}: {place}.{key}: `folds` sets it for every run; leave it to one of them"
                raise ConfigError(message)
            if key.split(".")[0] in _TAKEN and (key == "run" or place != "set"):
                message = f"{path}: {place}.{key}: cannot be chosen here, for {_TAKEN[key.split('.')[0]]}; leave it out"
                raise ConfigError(message)


def _check_names(path: Path, runs: Sequence[Planned]) -> None:
    """Refuse two points of the grid that are the same run."""
    names = Counter((run.name, run.seed, run.fold) for run in runs)
    cells = Counter((_text(run.cell), run.seed, run.fold) for run in runs)
    twice = [name for name, count in names.items() if count > 1] or [cell for cell, n in cells.items() if n > 1]
    if twice:
        message = f"{path}: two runs are {twice[0][0]}; change a variant or an axis of the grid so that each is its own"
        raise ConfigError(message)


def _check_stores(path: Path, study: Study) -> None:
    """Refuse two runs that mean different features by the same store."""
    makers: dict[Path, tuple[str, str]] = {}
    for name, config in study.configs.items():
        if study.reads_store(name):
            wanted = _own_taps_left_out(config).model_dump_json(include={"data", "encoder", "store"})
            first, known = makers.setdefault(config.store.path, (name, wanted))
            if known != wanted:
                message = (
                    f"{path}: runs {first!r} and {name!r} differ in data, encoder or store and both name "
                    f"store.path {str(config.store.path)!r}: give each its own"
                )
                raise ConfigError(message)


def _check_weights(path: Path, study: Study) -> None:
    """Refuse two runs for which `prepare` would make different weights in the same file."""
    makers: dict[Path, tuple[str, Hashable]] = {}
    for name, config in study.configs.items():
        for key, file, made_from in _weights_made(config, reads_store=study.reads_store(name)):
            first, known = makers.setdefault(file, (name, made_from))
            if known != made_from:
                message = (
                    f"{path}: runs {first!r} and {name!r} have `prepare` make different weights and both name "
                    f"{key} {str(file)!r}: give each its own"
                )
                raise ConfigError(message)


def _weights_made(config: Config, *, reads_store: bool) -> Iterator[tuple[str, Path, Hashable]]:
    """Weights that `pipeline.stages.prepare` makes for a run: key, file, and what they follow from."""
    encoder, of_clip = config.encoder, (clip.DEMO, config.model.clip.training.model_dump_json())
    if config.model.backbone == clip.DEMO and config.model.weights != "none":
        yield "model.weights", Path(config.model.weights), of_clip
    if not reads_store or encoder.name == STORED or encoders.family_of(encoder.name).reads == "mask":
        return
    if encoder.training.steps == 0:
        yield "encoder.checkpoint", checkpoint(config), (encoder.name, 0, encoder.training.seed)
    elif encoder.name == clip.DEMO:
        yield "encoder.checkpoint", encoder.checkpoint, of_clip
    elif encoder.name == "sam_demo":
        yield "encoder.checkpoint", encoder.checkpoint, (encoder.name, encoder.training.model_dump_json())


def _cell(variant: str, labels: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """What a row of the table is about: variant, backbone, how much is trained on, and other axes of the grid."""
    own = ("seed", "fraction", "shots", "backbone", "fold")
    rest = {axis: label for axis, label in labels.items() if axis not in own}
    backbone = labels.get("backbone", config.model.backbone)
    return {
        "variant": variant,
        "backbone": backbone,
        **rest,
        "fraction": config.train.fraction,
        "shots": config.train.shots or _EVERY,
    }


def _run_name(variant: str, labels: Mapping[str, Any], config: Config) -> str:
    """Name a run for people, and end in a digest of its settings: other settings are another run.

    The digest leaves out what no result rests on, and keys that have their default, so that a new key changes none.
    """
    same = _own_taps_left_out(config)
    settings = same.model_dump(mode="json", exclude={"run", "resources"}, exclude_defaults=True)
    digest = hashlib.sha256(_text(settings).encode()).hexdigest()[:6]
    parts = [variant, *(str(label) if _is_word(label) else f"{axis}{label}" for axis, label in labels.items())]
    return "-".join(re.sub(r"[^A-Za-z0-9._+]+", "_", part).strip("_") for part in [*parts, digest])


def _own_taps_left_out(config: Config) -> Config:
    """A configuration without the taps that are its encoder's own anyway: spelled out or not, it is the same."""
    encoder = config.encoder
    if encoder.name == STORED or encoder.taps != encoders.family_of(encoder.name).taps:
        return config
    return config.model_copy(update={"encoder": encoder.model_copy(update={"taps": None})})


def _is_word(label: object) -> bool:
    """Whether a label says by itself what it is of."""
    return isinstance(label, str) and label[:1].isalpha()


def _short(axis: str, grid: Mapping[str, Any]) -> str:
    """The last part of an axis' key, or the whole of it where two end alike or the tables have such a column."""
    last = axis.rsplit(".", 1)[-1]
    if axis == _SEED:
        return "seed"  # a column of its own, whatever else is called so
    alike = sum(other.rsplit(".", 1)[-1] == last for other in grid) > 1
    return axis if alike or last in {"variant", "run", "seconds", "seed"} else last


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)
