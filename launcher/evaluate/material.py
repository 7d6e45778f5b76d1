"""What is evaluated on: the run's held-out sequences, or given texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from biroute.configs.errors import UsageError
from biroute.data_pipeline.dataset import open_dataset
from biroute.data_pipeline.read.loader import check_evaluate_sequences
from biroute.launcher.evaluate.texts import read_texts
from biroute.launcher.evaluate.windows import Window, document_windows, number_windows
from biroute.launcher.generate.trained import Trained

Say = Callable[[str], None]

HELDOUT = "heldout"  # name of the results of the held-out split
_TASK_SEQUENCES = 256  # held-out sequences that tasks are made of, if there are so many


@dataclass(frozen=True)
class Material:
    """Tokens to score.

    Attributes:
        name: of the results: heldout, or that of the text.
        about: what it is, one sentence.
        unit: what windows are numbered by: sequences or documents.
        windows: to be scored.
        pieces: int64 arrays of connected text, of which tasks are made; the same whatever the limit of windows.
    """

    name: str
    about: str
    unit: str
    windows: list[Window]
    pieces: list[np.ndarray]


def heldout_material(trained: Trained, *, limit: int | None, name: str | None, say: Say) -> Material:
    """Take the first held-out sequences, those and as many as training evaluates on unless `limit` says otherwise.

    Raises:
        UsageError: the dataset is missing, has another tokenizer than the model, or too few held-out sequences.
    """
    data_dir = trained.config.data.dir
    try:
        dataset = open_dataset(trained.config)
    except UsageError as error:
        raise UsageError(f"{error}; or evaluate on files with --text") from None
    if dataset.tokenizer.fingerprint != trained.tokenizer.fingerprint:
        raise UsageError(
            f"{data_dir} was built with another tokenizer than {trained.checkpoint} was trained with; restore the "
            "dataset, or evaluate on files with --text"
        )
    reader = dataset.reader("heldout")
    if limit is None:
        check_evaluate_sequences(reader, dataset.evaluate_sequences(1))
    wanted = dataset.evaluate_sequences(1) if limit is None else min(limit, reader.num_sequences)
    for_tasks = min(reader.num_sequences, max(_TASK_SEQUENCES, dataset.evaluate_sequences(1)))
    sequences = list(reader.sequences(np.arange(max(wanted, for_tasks))))
    if limit is not None and limit > wanted:
        say(f"--limit={limit}, but there are only {wanted} held-out sequences; all are used")
    length = trained.config.model.sequence_length
    about = f"the first {wanted} of {reader.num_sequences} held-out sequences of {length} tokens"
    windows = [Window(tokens, unit=number) for number, tokens in enumerate(sequences[:wanted])]
    return Material(name or HELDOUT, about, "sequences", windows, sequences[:for_tasks])


def text_material(
    trained: Trained, patterns: Sequence[str], *, stride: int | None, limit: int | None, name: str | None, say: Say
) -> Material:
    """Take the documents of files, each whole and by itself.

    Raises:
        UsageError: as in `read_texts` and `document_windows`, or they have the name of the held-out split.
    """
    chosen = name or _name_of(patterns)
    if chosen == HELDOUT:  # in MLflow its results would be taken for those of the held-out split
        raise UsageError(
            f"--text={patterns[0]} is named {HELDOUT}, as the results of the held-out split; give --name another name"
        )
    texts = read_texts(patterns, say)
    length, end = trained.config.model.sequence_length, trained.tokenizer.eos_id
    stride = max(1, length // 2) if stride is None else stride
    documents = trained.tokenizer.encode_batch(texts)
    used = documents[:limit]
    windows = number_windows([list(document_windows(one, end, length=length, stride=stride)) for one in used])
    tokens = sum(map(len, used)) + len(used)
    longer = sum(len(one) + 1 > length for one in used)
    about = f"{len(used)} of {len(texts)} documents, {tokens:,} tokens with the ends of documents"
    if longer:
        about += (
            f"; {longer} are longer than the model's {length} tokens: windows overlap, a new one each "
            f"{stride} tokens, so that every later token has at least {length - stride + 1} tokens of context"
        )
    pieces = [np.array([*one, end], dtype=np.int64) for one in documents]
    return Material(chosen, about, "documents", windows, pieces)


def _name_of(patterns: Sequence[str]) -> str:
    """Return the name of the only file, without its endings; "text" for several or a pattern."""
    if len(patterns) > 1 or not Path(patterns[0]).is_file():
        return "text"
    return Path(patterns[0]).name.split(".")[0] or "text"
