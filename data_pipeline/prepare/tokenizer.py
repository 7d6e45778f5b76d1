"""The tokenizer: a lossless SentencePiece model, trained on the sources or given.

`decode(encode(text)) == text` for every Unicode text, and the tokens of a text carry exactly its UTF-8 bytes, so bits
per byte are exact for any span of tokens. SentencePiece represents a space as U+2581 and so cannot distinguish the
two; the character U+2581 itself is therefore always encoded as its three byte pieces.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biroute.configs.data_section import LEAST_VOCABULARY, TokenizerConfig
from biroute.configs.errors import UsageError
from biroute.configs.files import open_regular

if TYPE_CHECKING:
    from biroute.data_pipeline.prepare.sources import Document

SPACE_MARK = "\u2581"  # SentencePiece's representation of a space
UNK, EOS, PAD, MASK = "<unk>", "</s>", "<pad>", "<mask>"
_MASK_SPELLINGS = (MASK, "[MASK]")
# Pieces of white space, each one token: indentation is frequent, and other pieces never span a line break.
_USER_PIECES = ("\n", "\n\n", "\r\n", "\t", *(SPACE_MARK * n for n in (2, 3, 4, 5, 6, 7, 8, 12, 16)))
# The trainer reserves tab and U+2585 and drops sentences that contain them (or NUL). It would learn none of these
# characters, so cutting the text there loses nothing.
_TRAINING_BREAKS = re.compile("[\n\r\t\0\u2581\u2585]+")
_MAX_SENTENCE_BYTES = 4192  # the trainer drops longer sentences with only a warning
# Fixed, since unigram training sums per thread in floating point and its result depends on the number of threads.
_TRAINING_THREADS = 4
_PROBES = (
    "two  spaces,   three \n\n new\tlines\r\n ",
    " leading and trailing ",
    "Ｆｕｌｌ　ｗｉｄｔｈ，。 汉字漢字 ﬁ ½ e\u0301 é \u0301 😀 \u2581 \0 \u00a0\u2028\ufeff",
    "<unk></s><pad><mask><s><0x41>",
)


class Tokenizer:
    """Converts text to token ids and back.

    Attributes:
        vocab_size: number of pieces, including the special ones.
        eos_id: end of a document; `encode` never returns it.
        unk_id, pad_id, mask_id: the other special ids; None if the model lacks one.
        fingerprint: SHA-256 of pieces, scores, kinds and normalization; equal for models that tokenize alike, even
            if their files differ.
    """

    def __init__(self, model: bytes, origin: str) -> None:
        """Load a model and check that it is lossless.

        Args:
            model: a serialized SentencePiece model.
            origin: how error messages name the model.

        Raises:
            UsageError: this is not a SentencePiece model, it lacks byte fallback or an end-of-sentence piece, or it
                changes texts.
        """
        try:
            self._load(model, origin)
        except (RuntimeError, ValueError, IndexError):  # pieces that are not UTF-8 among them
            raise UsageError(
                f"{origin}: not a SentencePiece model, or a damaged one; name a .model file of SentencePiece"
            ) from None

    def _load(self, model: bytes, origin: str) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.load_from_serialized_proto(model)
        settings = _model_settings(model)
        processor = self._processor
        self._origin = origin
        self.model_bytes = model
        self.vocab_size: int = processor.vocab_size()
        self.unk_id = _id_or_none(processor.unk_id())
        self.pad_id = _id_or_none(processor.pad_id())
        self.mask_id = self._find_mask()
        self._bytes_of_id = [self._piece_bytes(i) for i in range(self.vocab_size)]
        self.fingerprint = self._make_fingerprint(settings)
        eos_id = _id_or_none(processor.eos_id())
        if eos_id is None:
            raise UsageError(f"{origin}: the model has no end-of-sentence piece; BiRoute joins documents with it")
        self.eos_id: int = eos_id
        byte_ids = {processor.id_to_piece(i): i for i in range(self.vocab_size) if processor.is_byte(i)}
        if len(byte_ids) != 256:
            raise UsageError(
                f"{origin}: the model has {len(byte_ids)} byte pieces, not 256; train it with byte_fallback=true"
            )
        self._mark_ids = [byte_ids[f"<0x{byte:02X}>"] for byte in SPACE_MARK.encode("utf-8")]
        for probe in _PROBES:
            found = self.decode(self.encode(probe))
            if found != probe:
                place = next((n for n, (x, y) in enumerate(zip(found, probe, strict=False)) if x != y), len(probe))
                near = slice(max(0, place - 4), place + 8)
                raise UsageError(
                    f"{origin}: the model changes texts ({probe[near]!r} comes back as {found[near]!r}); train it "
                    "with normalization_rule_name=identity, add_dummy_prefix=false, remove_extra_whitespaces=false"
                )

    def encode(self, text: str) -> list[int]:
        """Encode a valid Unicode text as token ids, without special ids."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts, faster than one by one, in the calling thread."""
        if not any(SPACE_MARK in text for text in texts):
            return self._processor.encode(list(texts), out_type=int, num_threads=1)
        pieces = [text.split(SPACE_MARK) for text in texts]
        flat = iter(self._processor.encode([piece for split in pieces for piece in split], num_threads=1))
        encoded = []
        for split in pieces:
            ids = list(next(flat))
            for _ in split[1:]:  # in place: a text of marks alone would take the square of its length
                ids += [*self._mark_ids, *next(flat)]
            encoded.append(ids)
        return encoded

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 bytes of the tokens; special tokens have none."""
        return b"".join([self._bytes_of_id[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the tokens, with U+FFFD where the tokens begin or end inside a character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """Return the number of UTF-8 bytes of each token, [vocab_size] int64; 0 for special tokens."""
        return np.array([len(data) for data in self._bytes_of_id], dtype=np.int64)

    def _piece_bytes(self, index: int) -> bytes:
        processor = self._processor
        if processor.is_control(index) or processor.is_unknown(index):
            return b""
        piece: str = processor.id_to_piece(index)
        if processor.is_byte(index):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE_MARK, " ").encode("utf-8")

    def _find_mask(self) -> int | None:
        for spelling in _MASK_SPELLINGS:
            index = self._processor.piece_to_id(spelling)
            if self._processor.is_control(index):
                return index
        return None

    def _make_fingerprint(self, settings: bytes) -> str:
        processor = self._processor
        digest = hashlib.sha256(b"biroute tokenizer 1\0" + settings)
        for i in range(self.vocab_size):
            kinds = (processor.is_control(i), processor.is_unknown(i), processor.is_byte(i), processor.is_unused(i))
            score = float(processor.get_score(i)).hex()
            digest.update(f"\0{processor.id_to_piece(i)}\0{score}\0{kinds}".encode())
        return digest.hexdigest()


def load_tokenizer(path: Path, vocab_size: int | None = None) -> Tokenizer:
    """Load the tokenizer from a file.

    Args:
        path: the SentencePiece model.
        vocab_size: the vocabulary size that the model must have; None for any.

    Raises:
        UsageError: the file cannot be read, the model is not usable, or its vocabulary size is another.
    """
    try:
        with open_regular(path) as file:
            model = file.read()
    except OSError as error:
        raise UsageError(
            f"{path}: the tokenizer cannot be read ({error.strerror}); correct data.tokenizer.model_path"
        ) from None
    tokenizer = Tokenizer(model, str(path))
    if vocab_size is not None and tokenizer.vocab_size != vocab_size:
        raise UsageError(
            f"data.tokenizer.vocab_size={vocab_size}, but {path} has {tokenizer.vocab_size} pieces; "
            f"set data.tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Train a tokenizer on `texts`; the same texts in the same order give the same pieces on any machine.

    Raises:
        UsageError: as `train_model` does.
    """
    return Tokenizer(train_model(texts, config), "the trained tokenizer")


def train_model(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    """Train a tokenizer; returns the serialized SentencePiece model.

    While it trains, the process is deaf to signals.

    Raises:
        UsageError: there is too little text for the vocabulary, or the vocabulary is too small for the characters.
    """
    import sentencepiece

    options: dict[str, Any] = {
        "model_type": config.kind,
        "vocab_size": config.vocab_size,
        "character_coverage": config.character_coverage,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "required_chars": SPACE_MARK,  # text without a single space must not leave it out
        "user_defined_symbols": list(_USER_PIECES),
        "control_symbols": [MASK],
        "unk_id": 0,
        "eos_id": 1,
        "pad_id": 2,
        "bos_id": -1,
        "unk_piece": UNK,
        "eos_piece": EOS,
        "pad_piece": PAD,
        "max_sentence_length": _MAX_SENTENCE_BYTES,
        "shuffle_input_sentence": False,  # the only source of randomness
        "num_threads": _TRAINING_THREADS,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_sentences(texts), model_writer=model, **options
        )
    except RuntimeError as error:
        raise UsageError(_why_untrained(config, str(error))) from None
    return model.getvalue()


def training_sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yield the lines of `texts`, cutting those that are too long for the trainer, if possible at a space."""
    for text in texts:
        for line in _TRAINING_BREAKS.split(text):
            begin = 0
            while _is_too_long(line, begin):
                end = begin + _MAX_SENTENCE_BYTES // 4  # characters, of at most 4 bytes each
                space = line.rfind(" ", (begin + end) // 2, end)
                end = space if space > 0 else end
                yield line[begin:end]
                begin = end
            if begin < len(line):
                yield line[begin:]


def _is_too_long(line: str, begin: int) -> bool:
    characters = len(line) - begin
    if characters * 4 <= _MAX_SENTENCE_BYTES:
        return False
    return characters > _MAX_SENTENCE_BYTES or len(line[begin:].encode("utf-8")) > _MAX_SENTENCE_BYTES


class TrainingSample:
    """A sample of the training documents of about a given size: those with the lowest hashes.

    It depends only on the texts and not on the order in which they are read, and takes a single pass.
    """

    def __init__(self, size_bytes: int) -> None:
        self._budget = size_bytes
        self._heap: list[tuple[int, str, int]] = []  # the highest hash is at the top
        self.size_bytes = 0

    def add(self, document: Document) -> None:
        """Offer a document to the sample; held-out ones are ignored."""
        if document.heldout:
            return
        heapq.heappush(self._heap, (-document.sample_rank, document.text, document.size_bytes))
        self.size_bytes += document.size_bytes
        while self.size_bytes - self._heap[0][2] >= self._budget:
            self.size_bytes -= heapq.heappop(self._heap)[2]

    def texts(self) -> list[str]:
        """Return the sample in increasing order of the hashes."""
        return [text for _, text, _ in sorted(self._heap, reverse=True)]


def _why_untrained(config: TokenizerConfig, message: str) -> str:
    field = f"data.tokenizer.vocab_size={config.vocab_size}"
    most = re.search(r"Vocabulary size too high.*<= (\d+)", message)
    if most:
        fewer = "use at most that many or " if int(most[1]) >= LEAST_VOCABULARY else ""
        return f"{field}: the text yields only {most[1]} pieces; {fewer}give more text, of more different characters"
    least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if least:
        return (
            f"{field}: the characters of the text need {least[1]}; raise it to more than that, or lower "
            f"data.tokenizer.character_coverage={config.character_coverage}"
        )
    if "sentences_.empty()" in message:
        return "data.tokenizer: the sources hold no text to train on; give more, or set data.tokenizer.model_path"
    return f"data.tokenizer: SentencePiece could not train ({' '.join(message.split())})"


def _id_or_none(index: int) -> int | None:
    return index if index >= 0 else None


def _model_settings(model: bytes) -> bytes:
    """Serialize the settings that affect tokenization besides the pieces: kind, byte fallback, normalization.

    Raises:
        ValueError: this is not a SentencePiece model.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    except DecodeError as error:
        raise ValueError("not a SentencePiece model") from error
    kept = b""
    if proto.HasField("trainer_spec"):
        names = ("model_type", "treat_whitespace_as_suffix", "byte_fallback")
        kept += repr(
            [(number, value) for name, number, value in _fields(proto.trainer_spec) if name in names]
        ).encode()
    for number, spec in ((3, "normalizer_spec"), (5, "denormalizer_spec")):
        if proto.HasField(spec):
            # The name is left out: models with equal rules are equal even if the rules have different names.
            settings = [(place, value) for name, place, value in _fields(getattr(proto, spec)) if name != "name"]
            kept += repr((number, settings)).encode()
    return kept


def _fields(message: Any) -> Iterator[tuple[str, int, int | bytes]]:
    """Yield name, number and value of each scalar field that is set, text as bytes; no float or list matters here."""
    for field, value in message.ListFields():
        if isinstance(value, bool | int):
            yield field.name, field.number, int(value)
        elif isinstance(value, str | bytes):
            yield field.name, field.number, value.encode() if isinstance(value, str) else value
