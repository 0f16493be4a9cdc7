"""The base's answers to general prompts, which later runs read."""

import hashlib
import json
import os
from contextlib import contextmanager

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adamerge_jax.evaluation.generate import Writer
from adamerge_jax.pipeline import base_answers
from adamerge_jax.pipeline.base_answers import BaseWriter, _read
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.read import load_backbone
from adamerge_jax.recipes.loading import parse_recipe
from tests.language_references import TASKS, byte_tokenizer, give_data, save_models
from tests.learning.test_language_learning import SIZES, chats

PROMPTS = [[7, 8], [9, 10, 11], [12], [13, 14, 15], [9, 10, 11]]
STOPS = [2, 5]


class Base:
    """A base with its cache, and the number of times that it has written."""

    def __init__(self, fields, root):
        self._fields = fields
        self._root = root
        self.shown = []

    def answers(self, prompts=PROMPTS, stops=STOPS, new_tokens=6):
        @contextmanager
        def show(words, total):
            self.shown.append(total)
            yield lambda done: None

        models = open_models(parse_recipe(self._fields), self._root)
        writer = BaseWriter(
            Writer(models.family, models.config, 2),
            models,
            None,
            lambda: load_backbone(models, models.base, None),
            show,
        )
        return writer.answers(prompts, stops, new_tokens)


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    fields = save_models(root, model, byte_tokenizer())
    return give_data(fields, root, {task: chats(seed) for seed, task in enumerate(TASKS)})


@pytest.fixture
def base(fields, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Base(fields, tmp_path)


def cached(tmp_path):
    (file,) = (tmp_path / "adamerge_jax/answers").iterdir()
    return file


def test_answers_are_written_once(base):
    first = base.answers()
    assert first[1] == first[4]
    assert base.answers(PROMPTS[::-1]) == first[::-1]
    assert base.shown == [4]


@pytest.mark.parametrize(
    "other", [{"prompts": PROMPTS[:3]}, {"stops": [2]}, {"new_tokens": 5}], ids=str
)
def test_other_questions_are_asked(base, other):
    base.answers()
    base.answers(**other)
    assert len(base.shown) == 2


def digest(answers):
    return hashlib.sha256(json.dumps(answers).encode()).hexdigest()


def with_answers(change):
    """Returns a change of a file's answers, with their digest."""

    def changed(saved):
        answers = json.loads(saved)["answers"]
        change(answers)
        return json.dumps(json.loads(saved) | {"answers": answers, "digest": digest(answers)})

    return changed


def other_token(saved):
    fields = json.loads(saved)
    fields["answers"][0][0] += 1
    return json.dumps(fields)


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved[:40],
        lambda saved: "",
        lambda saved: "[]",
        lambda saved: saved.replace('"batch_size": 2', '"batch_size": 3'),
        other_token,
        with_answers(lambda answers: answers.pop()),
        with_answers(lambda answers: answers[0].insert(0, 10**9)),
        with_answers(lambda answers: answers[0].clear()),
        with_answers(lambda answers: answers[0].insert(0, 2)),
        with_answers(lambda answers: answers[0].__setitem__(slice(None), [7])),
        with_answers(lambda answers: answers[0].append("7")),
        with_answers(lambda answers: answers[0].append(-1)),
    ],
)
def test_a_file_that_cannot_be_is_written_anew(base, tmp_path, damage):
    answers = base.answers()
    file = cached(tmp_path)
    saved = file.read_text()
    file.write_text(damage(saved))
    assert base.answers() == answers
    assert len(base.shown) == 2
    assert cached(tmp_path).read_text() == saved


def test_another_base_is_asked(fields, tmp_path, monkeypatch):
    """Its fingerprint, of a sample of its weights, is the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weights = os.path.join(fields["base"], "model.safetensors")
    base = Base(fields, tmp_path)
    base.answers()
    before = os.stat(weights)
    tensors = load_file(weights)
    name = next(name for name, array in tensors.items() if array.shape[0] > 2)
    tensors[name][1] += np.float32(1)
    save_file(tensors, weights, metadata={"format": "pt"})
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    base.answers()
    assert len(base.shown) == 2


def test_answers_that_cannot_be_kept_are_answers(base, tmp_path, caplog):
    answers = base.answers()
    cached(tmp_path).parent.rename(tmp_path / "moved")
    (tmp_path / "adamerge_jax/answers").touch()
    assert base.answers() == answers
    assert "cannot keep the base's answers" in caplog.text


def test_the_oldest_answers_make_room(base, tmp_path, monkeypatch):
    base.answers()
    first = cached(tmp_path)
    os.utime(first, (0, 0))
    monkeypatch.setattr(base_answers, "MOST_BYTES", first.stat().st_size)
    base.answers(new_tokens=5)
    assert cached(tmp_path) != first


def test_a_cache_folder_that_cannot_be_read_has_no_answers(tmp_path, caplog):
    assert _read(tmp_path / ("x" * 300) / "answers.json", {}) is None
    assert "the base writes its answers anew" in caplog.text
