import pytest

from adamerge_jax.coefficients.granularities import constant, groups
from adamerge_jax.coefficients.layer_groups import layer_group_patterns
from adamerge_jax.errors import InputError

BERT = [
    "embeddings.word.weight",
    *(f"encoder.layer.{layer}.output.weight" for layer in range(12)),
    "pooler.dense.weight",
]
T5 = [
    *(f"{part}.block.{layer}.weight" for part in ("decoder", "encoder") for layer in range(2)),
    "encoder.final_layer_norm.weight",
    "shared.weight",
]


def tensors_by_group(names: list[str], count: int) -> list[list[str]]:
    """The tensors of each group, as the granularity picks them."""
    shapes = dict.fromkeys(names, (2, 2))
    patterns = layer_group_patterns(names, count)
    granularity = groups(shapes, patterns)
    values = granularity.init(constant(shapes, 1, 0.0))
    assert sorted(values) == sorted(patterns)  # and no others
    marked = {group: value + at for at, (group, value) in enumerate(sorted(values.items()))}
    scales = granularity.scales(marked)
    return [[n for n in names if scales[n].item() == at] for at in range(count)]


def test_neighbouring_layers_share_a_group():
    first, second, third = tensors_by_group(BERT, 3)
    assert first == BERT[:5] and second == BERT[5:9] and third == BERT[9:]


def test_an_encoder_comes_before_a_decoder():
    encoder, decoder = tensors_by_group(T5, 2)
    assert set(encoder) == {"shared.weight", "encoder.block.0.weight", "encoder.block.1.weight"}
    assert set(decoder) == {n for n in T5 if "decoder" in n or "norm" in n}


def test_as_many_groups_as_layers():
    assert [len(names) for names in tensors_by_group(BERT, 12)] == [2, *[1] * 10, 2]


def test_a_model_without_blocks():
    assert tensors_by_group(["a.weight", "b.weight"], 2) == [["a.weight"], ["b.weight"]]


def test_too_many_groups():
    with pytest.raises(InputError, match=r"search.layer_groups: 13 groups of 12 layers"):
        layer_group_patterns(BERT, 13)
