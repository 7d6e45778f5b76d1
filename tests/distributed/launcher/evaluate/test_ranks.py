"""Ranks that evaluate together find what one of them alone finds, to the bit, and each does its share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.pool import WorkerPool


def measured_job() -> Any:
    """What two ranks find together, what this rank finds alone, and how many passes each of these took here."""
    from types import SimpleNamespace

    import numpy as np
    import torch.distributed as dist
    from helpers.cached import cached_model, random_tokens, tiny_config
    from helpers.served import ByteTokenizer
    from lm_eval.api.instance import Instance

    from biroute.configs.errors import UsageError
    from biroute.launcher.evaluate import forward
    from biroute.launcher.evaluate.harness.model import HarnessModel
    from biroute.launcher.evaluate.ranks import EvaluationRanks

    forward._BATCH_TOKENS = 96  # several batches of a few rows
    config = tiny_config()
    model = cached_model(config)
    trained: Any = SimpleNamespace(model=model, tokenizer=ByteTokenizer(), config=config)
    rows = [np.array(random_tokens(length, length)) for length in (49, 7, 30, 2, 25, 48, 11)]
    tokens = [random_tokens(n % 3 + 1, n) for n in range(len(rows))]
    passes = [0]
    for layers in (model.layers, model._plain_layers):  # those of losses, and those of the cached decode

        def counted(inputs: Any, hidden_states: Any = layers.hidden_states) -> Any:
            passes[0] += 1
            return hidden_states(inputs)

        layers.hidden_states = counted  # type: ignore[method-assign]

    def ask(kind: Any, *arguments: Any) -> list[Any]:
        return [
            Instance(request_type=kind, doc={}, arguments=one, idx=0, metadata=("some", n, 1))
            for n, one in enumerate(arguments)
        ]

    def found(ranks: EvaluationRanks) -> Any:
        passes[0] = 0
        ours, theirs = forward.ForwardModel(model.layers, config, ranks), HarnessModel(trained, ranks, lambda _: None)
        results = [
            [one.tolist() for one in ours.losses(rows)],
            [one.tolist() for one in ours.next_log_probabilities([row[:40] for row in rows], tokens)],
            theirs.loglikelihood(ask("loglikelihood", ("To be", " or"), ("", "not"), ("a", ""), ("Which", "!"))),
            theirs.loglikelihood_rolling(ask("loglikelihood_rolling", ("no text is long" * 7,), ("short",))),
            theirs.generate_until(ask("generate_until", *[(text, {"max_gen_toks": 4}) for text in ("a", "床", "c")])),
        ]
        return results, passes[0]

    ranks = EvaluationRanks(dist.get_rank(), dist.get_world_size())

    def fail_on_one() -> None:
        if ranks.rank == 1:
            raise UsageError("no such file")

    with pytest.raises(UsageError, match=r"^no such file$"):
        ranks.all_or_none(fail_on_one)
    assert ranks.from_first(ranks.rank) == 0
    return found(ranks), found(EvaluationRanks())


def test_two_ranks_find_what_one_finds(ranks: Callable[[int], WorkerPool]) -> None:
    (together, alone), (other, _) = ranks(2).run(measured_job)
    assert together[0] == alone[0] == other[0]
    # Each pass is made by one of them, but for the steps of texts that they generate at the same time.
    assert together[1] + other[1] < 1.3 * alone[1] and min(together[1], other[1]) > alone[1] // 3
