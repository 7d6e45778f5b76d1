"""A trained model from any checkpoint of any layout, in this process alone, with its tokenizer.

Nothing is converted: the parts that pipeline, tensor and ZeRO ranks wrote are joined as they are read. The settings
of the model are those of the checkpoint; where the run's configuration has been changed since, that is said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from biroute.configs.changes import settings_to_compare
from biroute.configs.errors import UsageError
from biroute.configs.load import load_config
from biroute.configs.schema import RunConfig
from biroute.data_pipeline.prepare.tokenizer import Tokenizer, load_tokenizer
from biroute.data_pipeline.read.manifest import TOKENIZER_NAME
from biroute.launcher.attempts.run_files import CHECKPOINTS, CONFIG, TOKENIZER
from biroute.launcher.generate.model_choice import ModelChoice
from biroute.launcher.train.identity import TOKENIZER_FINGERPRINT, model_identity
from biroute.model.decode.cached_model import CachedModel
from biroute.model.language_model import LayerSequence, plan_layers
from biroute.parallel.checkpoint.files import check_same_model
from biroute.parallel.checkpoint.meta import STEP_NAME, CheckpointMeta, read_meta
from biroute.parallel.checkpoint.survey import checkpoint_of, survey
from biroute.parallel.checkpoint.weights import load_weights, read_weights
from biroute.parallel.mesh.megatron import groups_of_one

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """A model that was trained, ready to continue texts."""

    config: RunConfig
    checkpoint: Path
    meta: CheckpointMeta
    tokenizer: Tokenizer
    model: CachedModel


def open_trained(choice: ModelChoice, say: Say = lambda _: None) -> Trained:
    """Load a checkpoint of a run.

    Args:
        choice: which one, and how its model computes.
        say: called with a line about each thing that is not as expected and is passed over.

    Raises:
        UsageError: there is no valid checkpoint, no tokenizer, no such device, or the model is bidirectional.
    """
    run_dir = run_folder(choice.run)
    place = choose_device(choice.device)
    for checkpoint in _candidates(run_dir / CHECKPOINTS, choice.step, say):
        try:
            meta = read_meta(checkpoint)
        except FileNotFoundError:  # a run that trains has removed it just now
            continue
        config = _config_of(run_dir, checkpoint, meta, say)
        if not config.model.causal:
            raise UsageError(
                f"{checkpoint}: model.objective={config.model.objective} predicts masked tokens and cannot continue "
                "a text; use a run with model.objective=causal"
            )
        found = find_tokenizer(run_dir, config, meta, choice.tokenizer)
        check_same_model(checkpoint, meta.model, model_identity(config, found.fingerprint))
        try:
            weights = dict(read_weights(checkpoint, verify=True))
        except UsageError as error:
            if choice.step is not None:
                raise
            say(f"{error}; trying the one before it")
            continue
        layers = LayerSequence(plan_layers(config, groups_of_one(place), draw_weights=False), place)
        load_weights(layers, weights)
        if choice.precision == "bf16":
            layers = layers.bfloat16()
        model = CachedModel(layers, config.model, exact=False if choice.fast else None)
        return Trained(config, checkpoint, meta, found, model)
    raise UsageError(f"{run_dir / CHECKPOINTS}: no checkpoint is valid; restore one, or train again")


def choose_device(wanted: str) -> torch.device:
    """Return the device of the model: auto (the GPU if there is one), cpu or cuda.

    Raises:
        UsageError: a GPU is wanted and torch sees none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device=cuda: torch sees no GPU here; use --device auto or cpu")
    return torch.device("cpu" if wanted == "cpu" or not torch.cuda.is_available() else "cuda")


def find_tokenizer(run_dir: Path, config: RunConfig, meta: CheckpointMeta, given: Path | None) -> Tokenizer:
    """Load the tokenizer that a checkpoint was trained with.

    Args:
        run_dir: the run's folder, which keeps the tokenizer.
        config: the run's; runs of older versions have their tokenizer in the dataset only.
        meta: of the checkpoint, which knows the tokenizer's fingerprint.
        given: the only file to look at, if given.

    Raises:
        UsageError: there is no tokenizer, or only another one.
    """
    places = [given] if given else [run_dir / TOKENIZER, config.data.dir / TOKENIZER_NAME]
    wanted = meta.model.get(TOKENIZER_FINGERPRINT)
    others = []
    for path in places:
        if not path.is_file():
            continue
        try:
            tokenizer = load_tokenizer(path)
        except UsageError as error:
            if given:
                raise
            others.append(str(error).partition(";")[0])
            continue
        if wanted in (None, tokenizer.fingerprint[:12]):
            return tokenizer
        others.append(f"{path} is another one ({tokenizer.fingerprint[:12]})")
    looked = "; ".join(others) or f"it is not in {' or '.join(str(path) for path in places)}"
    raise UsageError(
        f"the tokenizer of the checkpoint ({wanted}) is missing: {looked}; name its file with --tokenizer"
    )


def run_folder(run: Path) -> Path:
    if run.suffix in (".yaml", ".yml") and run.is_file():
        run = load_config(run).train.run_dir
    if not (run / CHECKPOINTS).is_dir():
        raise UsageError(f"{run} has no folder {CHECKPOINTS}; name a run folder, or its configuration")
    if not (run / CONFIG).is_file():
        raise UsageError(f"{run} has no {CONFIG}, so its model is not known; copy that of the run that trained it")
    return run


def _candidates(directory: Path, step: int | None, say: Say) -> Iterator[Path]:
    """Yield the checkpoint of a step, or the complete ones, newest first; one that is passed over is said.

    It looks anew for each: while one was read, a run that trains may have removed it and saved another.

    Raises:
        UsageError: there is none, or that of the step is not complete.
    """
    chosen, looked = checkpoint_of(directory, step), set[Path]()
    if step is not None:
        problem = next((one.problem for one in survey(directory, deep=False) if one.path == chosen), "")
        if problem:
            raise UsageError(f"{chosen}: {problem}; choose another with --checkpoint")
        yield chosen
        return
    while one := next((one for one in survey(directory, deep=False) if one.path not in looked), None):
        looked.add(one.path)
        if not one.problem:
            yield one.path
        elif STEP_NAME.fullmatch(one.path.name):  # what was never finished is no checkpoint yet
            say(f"{one.path}: {one.problem}; trying the one before it")


def _config_of(run_dir: Path, checkpoint: Path, meta: CheckpointMeta, say: Say) -> RunConfig:
    """Return the run's configuration with the model's settings as they were when the checkpoint was written."""
    config = load_config(run_dir / CONFIG)
    saved, ours = meta.about.get("settings", {}), settings_to_compare(config, "")
    changed = {
        name: saved[name] for name in ours if name.startswith("model.") and saved.get(name, ours[name]) != ours[name]
    }
    if changed:
        said = ", ".join(f"{name}: {value}, now {ours[name]}" for name, value in changed.items())
        say(f"{checkpoint}: the run's settings have changed since ({said}); those of the checkpoint are used")
    return load_config(run_dir / CONFIG, [f"{name}={_as_yaml(value)}" for name, value in changed.items()])


def _as_yaml(value: str) -> str:
    """Return a saved value, which is Python's text of it, as YAML: a tuple is a list."""
    return re.sub(r"^\((.*?),?\)$", r"[\1]", value)
