import pytest

from adamerge_jax.drafting import columns
from adamerge_jax.drafting.samples import Sample

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        ({"messages": [CHAT]}, {}),
        ({"conversation": [CHAT], "source": ["web"]}, {"messages": "conversation"}),
        ({"prompt": ["a"], "response": ["b"]}, {}),
        (
            {"instruction": ["a"], "output": ["b"], "text": ["a b"]},
            {"prompt": "instruction", "response": "output"},
        ),
        ({"text": ["a"], "id": ["7"]}, {}),
        ({"id": ["7"], "passage": ["a long one"]}, {"text": "passage"}),
        ({"id": ["7"], "lyrics": ["a long one"]}, {"text": "lyrics"}),
    ],
)
def test_of_language_models(rows, fields):
    assert columns.of_language(Sample(rows)) == (fields, None)


def test_an_encoder_decoder_reads_prompts_with_responses_only():
    pair = Sample({"messages": [CHAT], "question": ["a"], "answer": ["b"]})
    found = columns.of_language(pair, pairs_only=True)
    assert found == ({"prompt": "question", "response": "answer"}, None)
    assert "prompts" in columns.of_language(Sample({"text": ["a"]}), pairs_only=True).lacks


@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        ({"text": ["a"], "label": [1]}, {"label": "label"}),
        ({"Sentence": ["a b"], "Label": ["pos"]}, {"text": "Sentence", "label": "Label"}),
        (
            {"idx": [3], "premise": ["a"], "hypothesis": ["b"], "label": [0]},
            {"text": ["premise", "hypothesis"], "label": "label"},
        ),
        ({"text": ["a"], "label": [0], "label_text": ["no"]}, {"label": "label"}),
    ],
)
def test_of_classifiers_of_texts(rows, fields):
    sample = Sample(rows)
    assert columns.with_label(columns.of_texts(sample), sample) == (fields, None)


def test_what_is_lacking_is_said():
    sample = Sample({"text": ["a"], "score": [0.5]})
    assert columns.with_label(columns.of_texts(sample), sample).lacks == "has no column of labels"
    assert "among number" in columns.of_texts(Sample({"number": [1]})).lacks
    share = Sample({"conversations": [[{"from": "human", "value": "hi"}]]})
    assert columns.of_language(share).lacks.startswith("has turns of from, value; a conversation")
    assert "pixel_values" in columns.of_images(Sample({"input_ids": []}, arrays=True)).lacks


def test_of_images():
    sample = Sample({"img": [], "fine_label": [3]}, images=frozenset({"img"}))
    found = columns.with_label(columns.of_images(sample), sample)
    assert found == ({"image": "img", "label": "fine_label"}, None)
    arrays = Sample({"pixel_values": [], "labels": []}, arrays=True)
    assert columns.with_label(columns.of_images(arrays), arrays) == ({"label": "labels"}, None)


def test_of_sentence_embedders():
    scored = Sample({"first": ["a"], "second": ["b"], "score": [0.5]})
    found = columns.with_score(columns.of_embedder(scored), scored)
    assert found == ({"text": ["first", "second"], "label": "score"}, None)
    pairs = Sample({"anchor": ["a"], "positive": ["b"]})
    assert columns.with_score(columns.of_embedder(pairs), pairs).fields == {
        "text": ["anchor", "positive"]
    }
    texts = Sample({"question": ["a"]})
    assert columns.of_embedder(texts) == ({"text": "question"}, None)
    assert columns.with_score(columns.of_embedder(texts), texts).lacks == "has no pairs of texts"


@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        ({"id": ["1"], "tokens": [["a"]], "ner_tags": [[0]]}, {"label": "ner_tags"}),
        ({"words": [["a"]], "tags": [["O"]]}, {"text": "words", "label": "tags"}),
        (
            {"text": ["a"], "tokens": [["a"]], "labels": [[0]]},
            {"text": "tokens", "label": "labels"},
        ),
    ],
)
def test_of_words(rows, fields):
    sample = Sample(rows)
    assert columns.with_tags(columns.of_words(sample), sample) == (fields, None)


def test_of_any_number_of_labels_and_of_numbers():
    labels = Sample({"text": ["a", "b"], "labels": [[0, 2], []]})
    found = columns.with_labels(columns.of_texts(labels), labels)
    assert found == ({"label": "labels"}, None)
    number = Sample({"text": ["a"], "grade": [0.5]})
    found = columns.with_numbers(columns.of_texts(number), number)
    assert found == ({"label": "grade"}, None)
    arrays = Sample({"input_ids": [], "label": []}, arrays=True)
    assert columns.with_numbers(columns.of_texts(arrays), arrays).fields == {"label": "label"}
    words = columns.of_words(Sample({"text": ["a"]}))
    assert words.lacks == "has no column of lists of words among text"
    assert columns.with_tags(columns.of_words(labels), labels).lacks.startswith("has no column")
