"""Section data of a configuration: sources of documents, the tokenizer, and how a dataset is built and read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from biroute.configs.section import IDENTITY, Fraction, Section

LEAST_VOCABULARY = 300  # 256 byte pieces, the special ones, and white space
_SMALLEST_SHARE = 2.0**-50  # of a source; the mix has steps of 2**-52


class SourceConfig(Section):
    """One source of documents."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="name in the manifest and in metrics")
    paths: tuple[str, ...] = Field(
        min_length=1, description="files or globs: .txt (one document per file) or .jsonl; each also .gz or .zst"
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="relative weight in training; empty: in proportion to its number of tokens",
        json_schema_extra=IDENTITY,
    )
    text_field: str = Field("text", description="field of a .jsonl line that contains the document")


class TokenizerConfig(Section):
    """The SentencePiece model, either trained on the sources or given."""

    model_path: Path | None = Field(None, description="an existing SentencePiece model; empty: train one")
    kind: Literal["bpe", "unigram"] = Field("bpe", description="algorithm; unigram trains about 25 times as long")
    vocab_size: int = Field(
        8192, ge=LEAST_VOCABULARY, description="pieces, including the 256 byte pieces and the special ones"
    )
    character_coverage: float = Field(
        0.985,
        ge=0.98,  # SentencePiece rejects smaller values
        le=1.0,
        description="fraction of the characters that get a piece of their own; the rest is encoded as bytes",
    )
    training_bytes: PositiveInt = Field(20_000_000, description="bytes of text to train on, sampled from all sources")


class DataConfig(Section):
    """The dataset: its sources, how it is built, and the training order."""

    dir: Path = Field(Path("data/dataset"), description="folder of the built dataset")
    sources: tuple[SourceConfig, ...] = Field((), description="where the documents come from")
    tokenizer: TokenizerConfig = Field(TokenizerConfig(), description="the tokenizer")
    heldout_fraction: Fraction | None = Field(
        None,
        description="fraction of the documents held out from training; left out: 0.01, or 0.1 if the files of the "
        "sources have less than 10 MB",
    )
    min_document_bytes: PositiveInt = Field(1, description="documents with fewer bytes are skipped and counted")
    max_document_bytes: int = Field(1_000_000, ge=16, description="documents with more bytes are cut into parts")
    max_malformed_fraction: Fraction = Field(
        0.01,
        description="lines of .jsonl files without a document are skipped and named; more than these are an error",
    )
    max_invalid_utf8_fraction: Fraction = Field(
        0.05, description="bytes that are not UTF-8 become U+FFFD; more documents with such bytes are an error"
    )
    tokens_per_sample: PositiveInt = Field(65_536, description="tokens per WebDataset sample")
    samples_per_shard: PositiveInt = Field(64, description="WebDataset samples per shard")
    workers: int = Field(0, ge=0, description="tokenizing processes; 0: one per core")
    seed: int = Field(
        0,
        description="seed of the training order; the held-out split does not depend on it",
        json_schema_extra=IDENTITY,
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"sources named twice: {', '.join(twice)}; give each source a unique name")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("some sources have a weight and some do not; give one to all or to none")
        weights = [source.weight for source in self.sources if source.weight is not None]
        if weights and min(weights) < sum(weights) * _SMALLEST_SHARE:
            raise ValueError(
                f"weight {min(weights)} is too small beside a sum of {sum(weights)}; leave the source out"
            )
        return self
