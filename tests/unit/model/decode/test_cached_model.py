"""Generation sees what training sees: the same routes, the same logits, and no other sequence of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cached import cached_model, random_tokens, recorded_routes, tiny_config
from torch import Tensor

from biroute.model.decode import pages
from biroute.model.decode.attention import TokenAttention
from biroute.model.decode.cached_model import CachedModel

KINDS: dict[str, dict[str, Any]] = {
    "a route a token": {},
    "a route for 2 tokens": {"attention": {"query_block_size": 2, "descriptors_per_region": 2}},
    "a route for 4 tokens": {"attention": {"query_block_size": 4, "topk": 3}},
    "a route a region": {"attention": {"query_block_size": 8, "topk": 3}},
    "a descriptor a key": {"attention": {"descriptors_per_region": 8}},
    "several descriptors after RoPE": {"attention": {"descriptors_per_region": 4, "descriptor": "post_rope"}},
    "a sink, keys not smeared": {"attention": {"attention_sink": True}, "key_smear": False},
    "previous region not forced": {"attention": {"force_previous": False, "topk": 2}},
    "random": {"attention": {"router": "random"}},
    "regions of 2": {"attention": {"region_size": 2}},
    "sliding window": {"attention": {"kind": "sliding_window"}},
    "dense": {"attention": {"kind": "dense"}},
    "every kind of layer": {"num_layers": 3, "dense_layers": [0], "sliding_window_layers": [1]},
    "every region": {"attention": {"topk": 6}},
    "more slots than regions": {"attention": {"topk": 9}},
    "query and key norm, untied": {"qk_norm": True, "tied_embeddings": False},
    "one group": {"num_kv_heads": 1},
    "as many groups as heads": {"num_kv_heads": 4},
}


def whole_forward(model: CachedModel, tokens: list[int]) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """The slow reference, training's forward of all tokens: logits [S, V], and the routes of each layer."""
    with recorded_routes(model) as routes, torch.no_grad():
        return model.layers(torch.tensor([tokens]))[:, 0], routes


@pytest.mark.parametrize("prompt", [1, 21, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_tokens_after_it_give_what_training_gives(kind: str, prompt: int) -> None:
    config = tiny_config(KINDS[kind])
    model, tokens = cached_model(config), random_tokens(config.model.sequence_length)
    expected, routes = whole_forward(model, tokens)
    rows, found = decoded_after(model, tokens, prompt)
    torch.testing.assert_close(torch.stack(rows), expected[prompt - 1 :], rtol=1e-4, atol=2e-5)
    assert found.keys() == dict(routes).keys()
    for layer, route in routes:
        assert torch.equal(found[layer], route), f"layer {layer}"


def decoded_after(model: CachedModel, tokens: list[int], prompt: int) -> tuple[list[Tensor], dict[int, Tensor]]:
    """The logits after each token from the end of the prompt on, and the whole route of each layer."""
    with recorded_routes(model) as found:
        sequence, logits = model.prefill(tokens[:prompt])
        of_prompt = dict(found)
        found.clear()
        rows = [logits, *(model.step([sequence], [token])[0] for token in tokens[prompt:])]
    routes = {}
    for core in model.cores:
        if core.layer in of_prompt:
            begun = of_prompt[core.layer][:, :, : -(-prompt // core.query_block_size)]
            routes[core.layer] = torch.cat([begun, *[route for layer, route in found if layer == core.layer]], 2)
    return rows, routes


def repeated_text() -> list[int]:
    """A text that says the same again and again, so that regions are equally near and the last bit would decide."""
    return [*[7] * 19, *[5, 6, 7, 8] * 6, *[7] * 5]


@pytest.mark.parametrize(
    "kind", ["a route a token", "a route for 4 tokens", "a descriptor a key", "every kind of layer", "regions of 2"]
)
def test_it_is_the_same_to_the_bit_where_a_prompt_ends(kind: str) -> None:
    model = cached_model(tiny_config(KINDS[kind] | {"num_layers": 3}))
    for tokens in (repeated_text(), random_tokens(48)):
        rows, routes = decoded_after(model, tokens, 1)
        for prompt in (5, 8, 21, 32, 47):
            other_rows, other_routes = decoded_after(model, tokens, prompt)
            assert all(torch.equal(*pair) for pair in zip(other_rows, rows[prompt - 1 :], strict=True))
            assert all(torch.equal(other_routes[layer], route) for layer, route in routes.items())


@pytest.mark.parametrize("kind", ["a route a token", "a route for 4 tokens", "every kind of layer", "every region"])
def test_training_with_exact_sums_has_the_bits_of_decoding(kind: str) -> None:
    model = cached_model(tiny_config(KINDS[kind] | {"num_layers": 3}, exact_sums=True))
    for tokens in (repeated_text(), random_tokens(48)):
        expected, routes = whole_forward(model, tokens)
        rows, found = decoded_after(model, tokens, 11)
        assert torch.equal(torch.stack(rows), expected[10:])
        assert all(torch.equal(found[layer], route) for layer, route in routes)


def test_without_sums_in_fp64_the_end_of_the_prompt_would_be_seen() -> None:
    """Or the test before this one would be about nothing."""
    begun = cached_model(tiny_config({"num_layers": 3}))
    model = CachedModel(begun.layers, begun.model, exact=False)
    rows, _ = decoded_after(model, repeated_text(), 1)
    other_rows, _ = decoded_after(model, repeated_text(), 21)
    assert not all(torch.equal(*pair) for pair in zip(other_rows, rows[20:], strict=True))


def test_every_logit_of_a_text_is_that_of_its_tokens_one_by_one() -> None:
    model, tokens = cached_model(tiny_config()), random_tokens(21)
    rows, _ = decoded_after(model, tokens, 1)
    assert torch.equal(model.every_logit(tokens), torch.stack(rows))


def test_a_prefix_by_itself_is_the_beginning_of_the_whole() -> None:
    """Training's forward of each prefix, padded to whole regions, and what was decoded up to there."""
    model, tokens = cached_model(tiny_config()), random_tokens(48)
    sequence, _ = model.prefill(tokens[:3])
    for end in range(4, 48):
        decoded = model.step([sequence], [tokens[end - 1]])[0]
        expected, _ = whole_forward(model, tokens[:end] + [0] * (-end % 8))
        torch.testing.assert_close(decoded, expected[end - 1], rtol=1e-4, atol=2e-5)


def test_routes_of_the_test_differ_from_a_window() -> None:
    """Or the comparison above would be about nothing."""
    model = cached_model(tiny_config())
    _, routes = whole_forward(model, random_tokens(48))
    last = torch.stack([route[0, :, -8:] for _, route in routes])  # their window would be regions 2 ... 5
    assert len(last.flatten(0, 2).unique(dim=0)) >= 5


@pytest.mark.parametrize("kind", ["a route a token", "a route for 4 tokens", "every kind of layer", "dense"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_sequence_alone_has_the_bits_that_it_has_in_a_batch(kind: str, exact: bool) -> None:
    begun = cached_model(tiny_config(KINDS[kind]))
    model = CachedModel(begun.layers, begun.model, exact=exact)
    prompts = [random_tokens(length, seed=length) for length in (1, 30, 8, 17, 5, 29, 2)]
    answers = [random_tokens(12, seed=100 + length) for length in range(len(prompts))]

    def decoded(numbers: list[int]) -> dict[int, Tensor]:
        begun = [model.prefill(prompts[number]) for number in numbers]
        steps = [torch.stack([logits for _, logits in begun])]
        for turn in range(12):
            steps.append(
                model.step([sequence for sequence, _ in begun], [answers[number][turn] for number in numbers])
            )
        return dict(zip(numbers, torch.stack(steps, 1), strict=True))

    alone = {number: decoded([number])[number] for number in range(len(prompts))}
    for together in (list(range(7)), [6, 5, 4, 3, 2, 1, 0], [3, 1, 5]):
        for number, logits in decoded(together).items():
            assert torch.equal(logits, alone[number]), f"sequence {number} among {together}"


@pytest.mark.parametrize("kind", ["a route a token", "query and key norm, untied", "every kind of layer"])
def test_fast_steps_have_the_bits_of_the_layers_themselves(kind: str) -> None:
    """The layers straight from their weights, against Megatron-core's modules in the same shapes."""
    begun = cached_model(tiny_config(KINDS[kind]))
    model, tokens = CachedModel(begun.layers, begun.model, exact=False), random_tokens(30)
    ours, theirs = (model.prefill(tokens[:20])[0] for _ in range(2))
    for token in tokens[20:]:
        logits = model.step([ours], [token])
        with model._attending(lambda layer: TokenAttention([theirs.layers[layer]], False)), torch.no_grad():
            assert torch.equal(logits, model.layers(torch.tensor([[token]]))[0])


@pytest.mark.parametrize("kind", ["a route for 2 tokens", "a descriptor a key", "random"])
def test_descriptors_as_the_gpus_router_takes_them_choose_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router itself is another one there: tests/unit/model/attention/block_sparse/test_router.py."""
    model, tokens = cached_model(tiny_config(KINDS[kind])), random_tokens(48)
    rows, routes = decoded_after(model, tokens, 13)
    monkeypatch.setattr(pages, "KERNEL_DEVICES", ("cpu",))
    other_rows, other_routes = decoded_after(model, tokens, 13)
    assert all(torch.equal(*pair) for pair in zip(other_rows, rows, strict=True))
    assert all(torch.equal(other_routes[layer], route) for layer, route in routes.items())


def test_what_does_not_fit_is_refused() -> None:
    model = cached_model(tiny_config())
    for tokens in ([], random_tokens(49)):
        with pytest.raises(ValueError, match=r"a prompt has 1 \.\.\. 48"):
            model.prefill(tokens)
    sequence, _ = model.prefill(random_tokens(48))
    with pytest.raises(ValueError, match="has 48 tokens, as many as the model takes"):
        model.step([sequence], [0])
    with pytest.raises(ValueError, match="a cache needs a causal model"):
        cached_model(tiny_config({"objective": "mlm"}))


def test_the_layers_attend_as_before_after_a_call() -> None:
    model, tokens = cached_model(tiny_config()), random_tokens(48)
    before, _ = whole_forward(model, tokens)
    sequence, _ = model.prefill(tokens[:40])
    model.step([sequence], [tokens[40]])
    after, _ = whole_forward(model, tokens)
    assert torch.equal(before, after)


def test_bf16_is_that_of_training() -> None:
    begun = cached_model(tiny_config())
    model, tokens = CachedModel(begun.layers.bfloat16(), begun.model), random_tokens(48)
    assert not model.exact
    expected, _ = whole_forward(model, tokens)
    rows, _ = decoded_after(model, tokens, 20)
    assert rows[0].dtype == torch.float32
    torch.testing.assert_close(torch.stack(rows), expected[19:].float(), rtol=0.05, atol=0.05)


def test_storage_is_made_anew_only_when_it_is_full() -> None:
    model = cached_model(tiny_config())
    sequence, _ = model.prefill([0])
    places = set()
    for token in random_tokens(47):
        model.step([sequence], [token])
        places.add(sequence.layers[0].pages.everything()[0].data_ptr())
    assert len(places) <= 4  # 8, 16, 32 and 48 tokens


def test_a_cache_grows_with_its_tokens_and_not_with_the_models_length() -> None:
    model = cached_model(tiny_config())
    sequence, _ = model.prefill(random_tokens(8))
    sizes = []
    for token in random_tokens(16):
        model.step([sequence], [token])
        sizes.append(sequence.size_bytes())
    keys_and_values = 2 * 2 * 2 * 16 * 4  # layers, both, groups, head size, bytes: of one token
    descriptors = 2 * 2 * 16 * 4  # layers, groups, head size, bytes: of one region
    assert sizes[0] == 9 * keys_and_values + descriptors
    assert sizes[-1] == 24 * keys_and_values + 3 * descriptors
