"""Held-out bits per byte of a real run, against the bytes of the text itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from helpers.corpus import small_run
from helpers.job import points_of, run_job
from helpers.pool import WorkerPool
from helpers.training import small_config, start_engine, tokens_of_step

from biroute.configs.load import config_from_tree
from biroute.data_pipeline.dataset import open_dataset

Ranks = Callable[[int], WorkerPool]


def bytes_of_piece(piece: str) -> int:
    """UTF-8 bytes that a SentencePiece piece stands for."""
    if piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return 0 if piece in ("<s>", "</s>", "<pad>", "<unk>", "<mask>") else len(piece.replace("\u2581", " ").encode())


@pytest.mark.parametrize("data", [1, 2])
def test_bits_per_byte_are_those_of_the_text(ranks: Ranks, corpus: Path, tmp_path: Path, data: int) -> None:
    tree = small_run(corpus, tmp_path / "run", steps=2, parallel={"data": data})
    assert ranks(data).run(run_job, tree) == ["finished"] * data
    ((step, loss),) = points_of(tmp_path / "run", "heldout/loss")
    ((_, bits),) = points_of(tmp_path / "run", "heldout/bits_per_byte")
    ((_, perplexity),) = points_of(tmp_path / "run", "heldout/perplexity")
    config = config_from_tree(tree, "test")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(corpus / "dataset" / "tokenizer.model"))
    reader = open_dataset(config).reader("heldout")
    targets = [int(token) for n in range(config.train.evaluate_sequences) for token in reader.sequence(n)[1:]]
    text_bytes = sum(bytes_of_piece(pieces.id_to_piece(token)) for token in targets)
    text = pieces.decode([token for token in targets if token != pieces.eos_id()])
    assert text_bytes == pytest.approx(len(text.encode()), rel=0.02)  # decode joins documents and drops a first space
    assert step == 2
    assert bits == pytest.approx(loss / math.log(2) * len(targets) / text_bytes, rel=1e-9)
    assert perplexity == pytest.approx(math.exp(loss))
    assert json.dumps(bits)  # a plain number


def empty_targets_job() -> dict[str, float]:
    """Evaluate on targets that are 0 bytes long, as a held-out split of nothing but special tokens has."""
    from biroute.data_pipeline.read.loader import Batch
    from biroute.launcher.train.heldout import heldout_metrics

    config = small_config()
    inputs, labels = (tokens.numpy() for tokens in tokens_of_step(config, 1))
    return heldout_metrics(start_engine(config), [Batch(inputs[:2], labels[:2], None, 0)], lambda: None)


def test_targets_of_no_bytes_have_a_loss_and_no_bits_per_byte(ranks: Ranks) -> None:
    (found,) = ranks(1).run(empty_targets_job)
    assert 0 < found["heldout/loss"] < 20
    assert math.isnan(found["heldout/bits_per_byte"])
