"""Open the dataset of a configuration, check that the two fit, and create readers and loaders."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from biroute.configs.errors import UsageError
from biroute.configs.schema import RunConfig
from biroute.data_pipeline.prepare.build import dataset_settings
from biroute.data_pipeline.prepare.tokenizer import Tokenizer, load_tokenizer
from biroute.data_pipeline.prepare.verify import check_dataset
from biroute.data_pipeline.read.loader import HeldoutBatches, MicrobatchLoader, Objective, SequenceReader, StepShape
from biroute.data_pipeline.read.manifest import TOKENIZER_NAME, Manifest, Split

# Fixes the order and masking of held-out sequences independently of a run's seeds, so that runs are comparable.
EVALUATE_SEQUENCES = 64  # of an evaluation, if there are so many
_HELDOUT_SEED = 0


@dataclass(frozen=True)
class Dataset:
    """A checked dataset together with the configuration of the run that reads it."""

    config: RunConfig
    manifest: Manifest
    tokenizer: Tokenizer
    token_bytes: np.ndarray  # [vocab] int64, UTF-8 bytes of each token

    def reader(self, split: Split) -> SequenceReader:
        """Open the sequences of a split. Only the training split is mixed by the sources' weights.

        Raises:
            UsageError: the split is too small for one sequence.
        """
        data = self.config.data
        weights = {source.name: source.weight for source in data.sources if source.weight is not None}
        return SequenceReader(
            data.dir,
            self.manifest,
            split,
            sequence_length=self.config.model.sequence_length,
            seed=data.seed if split == "train" else _HELDOUT_SEED,
            weights=(weights or None) if split == "train" else None,
        )

    def objective(self, split: Split) -> Objective:
        """Return the model's objective on a split."""
        seed = self.config.train.seed if split == "train" else _HELDOUT_SEED
        model = self.config.model
        mask_id = self.tokenizer.mask_id
        return Objective(model.objective, self.token_bytes, mask_id, model.masked_tokens, seed)

    def train_loader(self, *, data_rank: int, data_size: int, position: int = 0) -> MicrobatchLoader:
        """Create the training loader of one data rank, starting at global position `position`."""
        return MicrobatchLoader(
            self.reader("train"),
            objective=self.objective("train"),
            global_batch_size=self.config.train.global_batch_size,
            microbatch_size=self.config.train.microbatch_size,
            data_rank=data_rank,
            data_size=data_size,
            position=position,
        )

    def heldout_batches(self, *, data_rank: int, data_size: int) -> HeldoutBatches:
        """Return this data rank's part of the `train.evaluate_sequences` sequences that every evaluation uses.

        Raises:
            UsageError: the held-out split has fewer sequences.
        """
        microbatch_size = self.config.train.microbatch_size
        wanted = self.evaluate_sequences(microbatch_size * data_size)
        shape = StepShape(wanted, microbatch_size, data_rank, data_size)
        return HeldoutBatches(self.reader("heldout"), self.objective("heldout"), shape)

    @property
    def heldout_sequences(self) -> int:
        """Number of sequences in the held-out split."""
        return self.reader("heldout").num_sequences

    def evaluate_sequences(self, multiple_of: int) -> int:
        """Return `train.evaluate_sequences`; left out, the default or as many of that multiple as there are."""
        wanted = self.config.train.evaluate_sequences
        if wanted is not None:
            return wanted
        there = min(EVALUATE_SEQUENCES, self.heldout_sequences)
        return max(multiple_of, there - there % multiple_of)


def open_dataset(config: RunConfig, part: int = 0, parts: int = 1) -> Dataset:
    """Open the dataset of a configuration after a quick check.

    Args:
        config: of the run.
        part, parts: which of the shards are checked, where several processes share them.

    Raises:
        UsageError: the dataset is missing or damaged, or was built with other settings, or model.objective=mlm and
            its tokenizer has no mask piece.
    """
    data = config.data
    manifest, tokenizer = check_dataset(data.dir, part, parts)
    _check_settings(config, manifest)
    if tokenizer.vocab_size != data.tokenizer.vocab_size:
        raise UsageError(
            f"data.tokenizer.vocab_size={data.tokenizer.vocab_size}, but {data.dir / TOKENIZER_NAME} has "
            f"{tokenizer.vocab_size} pieces; set data.tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    if config.model.objective == "mlm" and tokenizer.mask_id is None:
        raise UsageError(
            f"model.objective=mlm, but the tokenizer in {data.dir} has no <mask> piece; "
            "use one that has, or leave data.tokenizer.model_path out to train one"
        )
    return Dataset(config, manifest, tokenizer, tokenizer.token_bytes())


def _check_settings(config: RunConfig, manifest: Manifest) -> None:
    data = config.data
    wanted = dataset_settings(data)
    if not data.sources:  # the configuration does not describe how to build the dataset, only what the model needs
        wanted = {"data.tokenizer.vocab_size": wanted["data.tokenizer.vocab_size"]}
    for field, value in wanted.items():
        if field in manifest.settings and manifest.settings[field] != value:
            raise UsageError(
                f"{field}={value}, but the dataset in {data.dir} was built with {manifest.settings[field]}; "
                "run `biroute data build` with this configuration, or set the field back"
            )
    path = data.tokenizer.model_path
    # The file may exist only on the machine where the dataset was built.
    if path is not None and path.exists():
        same_file = path.read_bytes() == (data.dir / TOKENIZER_NAME).read_bytes()
        given = None if same_file else load_tokenizer(path, data.tokenizer.vocab_size)
        if given is not None and given.fingerprint != manifest.tokenizer_fingerprint:
            raise UsageError(
                f"data.tokenizer.model_path={path}: fingerprint {given.fingerprint[:12]}, but the dataset in "
                f"{data.dir} was built with {manifest.tokenizer_fingerprint[:12]}; run `biroute data build`"
            )
