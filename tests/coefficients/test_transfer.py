import numpy as np

from adamerge_jax.coefficients.transfer import carry


def names(encoder: int, decoder: int = 0) -> list[str]:
    stacks = [f"encoder.layer.{i}.mlp.0.weight" for i in range(encoder)]
    stacks += [f"decoder.layer.{i}.mlp.0.weight" for i in range(decoder)]
    return ["embeddings.weight", *stacks, "pooler.weight"]


def layers_taken(here: int, there: int) -> list[int]:
    """Which layer each of `here` layers takes after, among `there`."""
    other = {name: np.array([i]) for i, name in enumerate(names(there))}
    found = carry(other, {"encoder.layer.*": there}, names(here))
    return [int(found[f"encoder.layer.{i}.mlp.0.weight"][0]) - 1 for i in range(here)]


def test_layers_are_matched_by_relative_depth():
    assert layers_taken(4, 4) == [0, 1, 2, 3]
    assert layers_taken(3, 5) == [0, 2, 4]
    assert layers_taken(5, 3) == [0, 1, 1, 2, 2]
    assert layers_taken(24, 12)[::23] == [0, 11]
    assert layers_taken(1, 4) == [0]
    assert layers_taken(3, 1) == [0, 0, 0]


def test_each_stack_and_what_is_outside_of_them():
    there = {name: np.array([i, -i]) for i, name in enumerate(names(2, 4))}
    del there["embeddings.weight"]
    depths = {"encoder.layer.*": 2, "decoder.layer.*": 4}
    found = carry(there, depths, [*names(3, 2), "head.weight", "vision.layer.0.weight"])
    assert found.keys() == {*names(3, 2)} - {"embeddings.weight"}
    assert found["pooler.weight"].tolist() == [7, -7]
    assert [found[f"decoder.layer.{i}.mlp.0.weight"][0] for i in range(2)] == [3, 6]


def test_a_layer_without_coefficients_of_its_own():
    there = {
        "block.0.bias": np.ones(1),
        "block.2.weight": np.ones(1),
        "block.0.weight": np.zeros(1),
    }
    here = [f"block.{i}.{kind}" for i in range(2) for kind in ("bias", "weight")]
    found = carry(there, {"block.*": 3}, here)
    assert {name: float(own[0]) for name, own in found.items()} == {
        "block.0.bias": 1,
        "block.0.weight": 0,
        "block.1.weight": 1,
    }
