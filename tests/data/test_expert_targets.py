import numpy as np
import pytest

from adamerge_jax.data.arrays import ArrayExamples
from adamerge_jax.data.examples import Examples
from adamerge_jax.data.expert_targets import MEMORY_BYTES, StoredTargets, ask_expert
from adamerge_jax.data.language import make_language_examples
from adamerge_jax.data.tables import Table
from adamerge_jax.data.texts import TextExamples
from adamerge_jax.objectives import NOT_PREDICTED, TargetSpec
from adamerge_jax.recipes.schema import DataSource
from tests.language_references import byte_tokenizer, split_sentences
from tests.references import bert_tokenizer, sentences

LAYERS = (-1, 0)
BOTH = TargetSpec(expert_logits=True, hidden_states=LAYERS)


def ask(inputs: dict[str, np.ndarray]):
    """An expert whose outputs say which example, layer and position they are of.

    What it says of padding is 7: nothing that may be kept.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    own = (ids * mask * np.arange(1, ids.shape[1] + 1)).sum(1)
    logits = np.stack([own, own + 1, own + 2], 1).astype(np.float32)
    state = np.stack([ids, np.broadcast_to(np.arange(ids.shape[1]), ids.shape)], -1)
    state = np.where(mask[..., None] == 1, state, 7).astype(np.float32)
    return logits, {layer: state + layer for layer in LAYERS}


@pytest.fixture
def examples(tmp_path) -> Examples:
    # From 2 to 29 words: padded to 16, 24 and 32 tokens.
    texts = [f"{a} {b}" for a, b in zip(sentences(23, 0), sentences(23, 1), strict=True)]
    texts[:3] = ["a", "b c", "d " * 29]
    own = TextExamples(texts, bert_tokenizer(tmp_path), 32, "texts")
    assert len(set(own.padded_lengths())) == 3
    own.labels = np.arange(23, dtype=np.int32) % 3
    return own


def require_right(stored: StoredTargets, examples: Examples, index: np.ndarray) -> None:
    length = examples.padded_length(index)
    for padded_to in (length, length + 8):
        inputs = examples.take(index, padded_to)
        logits, states = ask(inputs)
        targets = stored.take(index, padded_to)
        np.testing.assert_array_equal(targets.expert_logits, logits)
        np.testing.assert_array_equal(targets.labels, examples.labels[index])
        assert list(targets.expert_hidden_states) == list(LAYERS)
        shown = inputs["attention_mask"][..., None]
        for layer, state in targets.expert_hidden_states.items():
            assert state.dtype == np.float32
            np.testing.assert_array_equal(state, states[layer] * shown)


@pytest.mark.parametrize("batch_size", [1, 4, 23, 50])
@pytest.mark.parametrize("memory_bytes", [MEMORY_BYTES, 2000, 0])
def test_targets_are_those_of_the_chosen_examples(examples, batch_size, memory_bytes):
    stored = ask_expert(ask, examples, BOTH, batch_size=batch_size, memory_bytes=memory_bytes)
    for index in ([0], [22, 0, 2, 2], [1, 0], np.random.default_rng(0).permutation(23)):
        require_right(stored, examples, np.array(index))


def test_nothing_is_kept_that_nobody_needs(examples):
    stored = ask_expert(ask, examples, TargetSpec(expert_logits=True), batch_size=4)
    assert stored.take(np.array([1, 2]), 32).expert_hidden_states == {}
    stored = ask_expert(ask, examples, TargetSpec(hidden_states=LAYERS), batch_size=4)
    assert stored.expert_logits is None
    targets = stored.take(np.array([1, 2]), 32)
    assert targets.expert_logits is None
    assert list(targets.expert_hidden_states) == list(LAYERS)


@pytest.mark.parametrize("memory_bytes", [MEMORY_BYTES, 100])
def test_examples_of_one_shape_keep_it(memory_bytes):
    pixels = np.random.default_rng(0).normal(size=(7, 3, 4, 4)).astype(np.float32)

    def ask_image(inputs):
        states = inputs["pixel_values"].reshape(-1, 3, 16)
        return states.sum((1, 2))[:, None], {2: states}

    examples = ArrayExamples({"pixel_values": pixels})
    needs = TargetSpec(expert_logits=True, hidden_states=(2,))
    stored = ask_expert(ask_image, examples, needs, batch_size=3, memory_bytes=memory_bytes)
    targets = stored.take(np.array([5, 0]), 0)
    np.testing.assert_array_equal(targets.expert_hidden_states[2], pixels[[5, 0]].reshape(2, 3, 16))
    assert targets.labels is None


def test_the_first_examples_keep_the_spread_of_all():
    numbers = np.array([[1.0], [3.0], [8.0]], np.float32)
    examples = ArrayExamples({"number": numbers})
    needs = TargetSpec(expert_logits=True, expert_spread=True)
    stored = ask_expert(lambda inputs: (inputs["number"], {}), examples, needs, batch_size=3)
    first = stored.first(ArrayExamples({"number": numbers[:2]})).take(np.array([1]), 0)
    np.testing.assert_allclose(first.expert_spread, [[numbers.std()]], rtol=1e-6)


class OneShape(ArrayExamples):
    """Examples that need no padding to go together, whatever part of them is padding."""

    def padded_length(self, index: np.ndarray) -> int:
        return 0


@pytest.mark.parametrize("memory_bytes", [MEMORY_BYTES, 0])
@pytest.mark.parametrize("kind", [ArrayExamples, OneShape])
def test_token_arrays_with_padding_of_their_own(kind, memory_bytes):
    mask = (np.arange(6) < np.array([[2], [4], [3], [6]])).astype(np.int32)
    inputs = {"input_ids": np.arange(24).reshape(4, 6), "attention_mask": mask}
    examples = kind(inputs, labels=np.zeros(4, np.int32))
    stored = ask_expert(ask, examples, BOTH, batch_size=2, memory_bytes=memory_bytes)
    for index in ([0, 1], [2, 0], [3]):
        chosen = np.array(index)
        targets = stored.take(chosen, examples.padded_length(chosen))
        _, states = ask(examples.take(chosen, 0))
        for layer, state in targets.expert_hidden_states.items():
            np.testing.assert_array_equal(state, states[layer] * mask[chosen][..., None])


def test_labels_alone():
    examples = ArrayExamples({"pixel_values": np.zeros((3, 1))})
    examples.labels = np.array([2, 0, 1])
    targets = StoredTargets(examples).take(np.array([2, 2, 0]), 16)
    np.testing.assert_array_equal(targets.labels, [1, 1, 2])
    assert targets.expert_logits is None and targets.expert_hidden_states == {}


VOCABULARY = 11


def ask_language(inputs: dict[str, np.ndarray]):
    """A language model whose logits say which token and which position they are of."""
    ids = inputs.get("decoder_input_ids", inputs["input_ids"])
    mask = inputs.get("decoder_attention_mask", inputs["attention_mask"])
    logits = np.sin(
        ids[..., None] * np.arange(1, VOCABULARY + 1) + np.arange(ids.shape[1])[:, None]
    )
    states = np.stack([ids, ids * mask], -1).astype(np.float32)
    return np.where(mask[..., None] == 1, 3 * logits, 7).astype(np.float32), {1: states}


def language_examples(decoder_start: int | None) -> Examples:
    rows = [{"prompt": p, "response": r} for p, r in split_sentences(9, seed=0)]
    rows[0] = {"prompt": "the red cat ", "response": "runs " * 20}
    rows[1] = {"prompt": "the red cat " * 8, "response": "x"}
    table = Table.of_rows(rows, DataSource(path="data"), "data")
    return make_language_examples(
        table,
        byte_tokenizer(),
        max_length=40,
        decoder_start=decoder_start,
        predicts_end=lambda few: True,
    )


@pytest.mark.parametrize("memory_bytes", [MEMORY_BYTES, 2000, 0])
@pytest.mark.parametrize("decoder_start", [None, 0])
@pytest.mark.parametrize("top", [None, 3, 99])
def test_targets_of_language_models(top, decoder_start, memory_bytes):
    examples = language_examples(decoder_start)
    assert len(set(examples.padded_lengths())) > 1
    needs = TargetSpec(expert_logits=True, top_tokens=top, hidden_states=(1,))
    stored = ask_expert(ask_language, examples, needs, batch_size=4, memory_bytes=memory_bytes)
    assert stored.expert_logits is None
    for index in ([0], [8, 0, 3, 3], [1, 0], range(9)):
        index = np.array(index)
        for length in (examples.padded_length(index), 40):
            inputs = examples.take(index, length)
            logits, states = ask_language(inputs)
            mask = inputs.get("decoder_attention_mask", inputs["attention_mask"])
            targets = stored.take(index, length)
            shown = mask[..., None]
            assert list(targets.expert_hidden_states) == [1]
            np.testing.assert_array_equal(targets.expert_hidden_states[1], states[1] * shown)
            np.testing.assert_array_equal(targets.labels, examples.take_labels(index, length))
            assert (targets.labels[mask == 0] == NOT_PREDICTED).all()
            if top is None:
                assert targets.expert_top is None
                np.testing.assert_array_equal(targets.expert_logits, logits * shown)
                continue
            assert targets.expert_logits is None
            kept = min(top, VOCABULARY)
            tokens, values = targets.expert_top
            assert tokens.shape == values.shape == (*mask.shape, kept)
            assert tokens.dtype == np.int32 and values.dtype == np.float32
            # Zeros behind the text, where nothing counts.
            order = np.argsort(-logits, -1)[..., :kept] * shown
            np.testing.assert_array_equal(tokens, order)
            wide = logits.astype(np.float64)
            probabilities = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
            wanted = np.take_along_axis(probabilities, order, -1) * shown
            np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_bytes", [MEMORY_BYTES, 0])
def test_half_precision_of_an_expert_stays(memory_bytes):
    """A language model's logits are most of what is kept."""
    examples = language_examples(None)

    def ask_half(inputs):
        logits, states = ask_language(inputs)
        return logits.astype(np.float16), states

    stored = ask_expert(
        ask_half, examples, TargetSpec(expert_logits=True), batch_size=4, memory_bytes=memory_bytes
    )
    targets = stored.take(np.array([3, 1]), 40)
    assert targets.expert_logits.dtype == np.float16
    assert targets.expert_hidden_states == {} and targets.expert_top is None
