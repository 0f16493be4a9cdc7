"""Operations that the bridge replaces, against PyTorch's own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adamerge_jax.models.bridge.operations import solve_triangular
from adamerge_jax.models.bridge.torch_in_jax import (
    custom_functions_have_gradients,
    gradients_pass,
    torch_in_jax,
)
from tests.models.bridge.tiny import Square


def in_jax(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of PyTorch's tensors as one of JAX's arrays."""
    environment = torch_in_jax()

    def run(*arrays: Any) -> Any:
        with environment:
            return environment.t2j_iso(function(*environment.j2t_iso(arrays)))

    return run


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("unitriangular", [False, True])
def test_triangular_systems_and_their_gradients_are_pytorchs(upper, left, unitriangular):
    generator = np.random.default_rng(0)
    matrix = (0.3 * generator.normal(size=(3, 1, 6, 6)) + 2 * np.eye(6)).astype(np.float32)
    right = generator.normal(size=(2, 6, 4) if left else (2, 4, 6)).astype(np.float32)
    weights = generator.normal(size=(3, *right.shape)).astype(np.float32)
    options = {"upper": upper, "left": left, "unitriangular": unitriangular}

    leaves = [torch.tensor(array, requires_grad=True) for array in (matrix, right)]
    expected = torch.linalg.solve_triangular(*leaves, **options)
    (expected * torch.tensor(weights)).sum().backward()

    def total(matrix, right):
        solution = solve_triangular(matrix, right, **options)
        return (solution * weights).sum(), solution

    compute = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    gradients, solution = compute(jnp.asarray(matrix), jnp.asarray(right))
    np.testing.assert_allclose(solution, expected.detach(), atol=1e-5)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(gradient, leaf.grad, atol=1e-5)


def stopping_parts(x: torch.Tensor) -> torch.Tensor:
    """Takes every way in which a model stops gradients, each times x."""
    with torch.no_grad():
        squares, view = (x * x)[1:], x.view(-1)
    return (x.detach() * x).sum() + (squares * x[1:]).sum() + (view * x * x).sum()


def test_gradients_stop_where_pytorchs_do():
    values = np.arange(1, 5, dtype=np.float32)
    leaf = torch.tensor(values, requires_grad=True)
    stopping_parts(leaf).backward()
    environment = torch_in_jax()

    def total(x):
        with environment, torch.enable_grad():
            return environment.t2j_iso(stopping_parts(environment.j2t_iso(x)))

    np.testing.assert_allclose(jax.grad(total)(jnp.asarray(values)), leaf.grad, rtol=1e-6)
    with gradients_pass():  # x, 3 x^2 for all but the first, and 3 x^2
        gradient = jax.grad(total)(jnp.asarray(values))
    passing = values + 3 * values**2 * (np.arange(4) > 0) + 3 * values**2
    np.testing.assert_allclose(gradient, passing, rtol=1e-6)


def test_functions_with_a_backward_of_their_own_have_gradients():
    values = np.arange(1, 5, dtype=np.float32)

    def total(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            stopped = Square.apply(x)
        return (Square.apply(x) * x).sum() + (stopped * x).sum()

    leaf = torch.tensor(values, requires_grad=True)
    total(leaf).backward()
    environment = torch_in_jax()

    def total_in_jax(x):
        with custom_functions_have_gradients(), environment, torch.enable_grad():
            return environment.t2j_iso(total(environment.j2t_iso(x)))

    np.testing.assert_allclose(jax.grad(total_in_jax)(jnp.asarray(values)), leaf.grad, rtol=1e-6)


def test_plain_tensors_are_indexed_by_those_that_jax_computes():
    sizes = torch.tensor([[1, 4, 6], [1, 2, 8]])
    look_up = jax.jit(in_jax(lambda rows: sizes[rows, 1]))
    np.testing.assert_array_equal(look_up(jnp.array([1, 0, 1])), [2, 4, 2])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_pytorchs_and_takes_no_erfc(approximate):
    values = np.linspace(-6, 6, 41, dtype=np.float32)
    compute = in_jax(partial(torch.nn.functional.gelu, approximate=approximate))
    expected = torch.nn.functional.gelu(torch.tensor(values), approximate=approximate)
    np.testing.assert_allclose(compute(jnp.asarray(values)), expected, atol=1e-6)
    assert "erfc" not in str(jax.make_jaxpr(compute)(values))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("options", [{}, {"antialias": True}, {"align_corners": True}])
def test_resizing_is_pytorchs(mode, options):
    images = np.random.default_rng(0).normal(size=(2, 3, 6, 7)).astype(np.float32)
    sizes = [{"size": (9, 4)}, {"size": (1, 14)}, {"scale_factor": 2.0}, {"scale_factor": 0.7}]

    def resize(images):
        return [
            torch.nn.functional.interpolate(images, mode=mode, **size, **options) for size in sizes
        ]

    for ours, theirs in zip(
        jax.jit(in_jax(resize))(images), resize(torch.tensor(images)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_views_are_indexed_by_lists_and_ranges_have_names():
    values = np.arange(24, dtype=np.float32).reshape(4, 6)

    def look_up(values):
        columns = values[:, 1:]
        numbers = torch.arange(end=3, device=columns.device)
        return columns[[2, 0]], columns[:, numbers]

    rows, columns = jax.jit(in_jax(look_up))(values)
    np.testing.assert_array_equal(rows, values[[2, 0], 1:])
    np.testing.assert_array_equal(columns, values[:, 1:4])


def test_integers_that_are_known_stay_known():
    values = np.arange(12, dtype=np.float32).reshape(4, 3)

    def run(x):
        sizes = torch.tensor([[1, 2], [3, 2]], device=x.device)
        mask = (torch.cumsum(sizes[:, 0], 0) > 1).to(x.device).repeat(2)
        lengths = sizes[:, 1].to(device=x.device, dtype=torch.int32)
        rows, columns = sizes[1]
        numbers = torch.arange(0, rows, device=x.device) * columns
        return x[mask], torch.split(x, lengths.tolist()), x[:, numbers[:2]]

    ours, theirs = jax.jit(in_jax(run))(values), run(torch.tensor(values))
    for mine, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_sizes_that_are_counted_on_the_host_are_taken():
    images = np.random.default_rng(0).normal(size=(1, 3, 4, 4)).astype(np.float32)
    mask = torch.ones(2, 4, 4)
    mask[1, 3:], mask[1, :, 2:] = 0, 0

    def fit(images):
        heights, widths = mask.sum(1)[:, 0].long(), mask.sum(2)[:, 0].long()
        fitted = [
            torch.nn.functional.pad(
                torch.nn.functional.interpolate(images, size=(h, w), mode="bilinear"),
                (0, 4 - w, 0, 4 - h),
            )
            for h, w in zip(heights, widths, strict=True)
        ]
        kinds = torch.full_like(heights, 1, device=images.device) + torch.zeros_like(input=heights)
        drawn = torch.multinomial(torch.ones(4, device=images.device), heights.max())
        return torch.cat(fitted), images[0, kinds], drawn.sort().values

    for ours, theirs in zip(jax.jit(in_jax(fit))(images), fit(torch.tensor(images)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_computed_value_is_not_written_into_a_constant():
    def write(values):
        places = torch.zeros(3, dtype=torch.int64)
        places[0] = values[0]
        return values + places

    with pytest.raises(NotImplementedError, match="into a constant"):
        jax.jit(in_jax(write))(jnp.arange(3))


def writing_where_true(x: torch.Tensor) -> torch.Tensor:
    """Writes zeros into the rows with a positive sum."""
    rows = (x * 1).type_as(x[:1])
    rows[torch.where(x.sum(-1) > 0)] = 0.0
    return rows


def test_a_tensor_is_written_where_an_unknown_mask_is_true():
    environment = torch_in_jax()
    values = np.array([[1.0, 2.0], [-1.0, 0.5], [0.0, -3.0]], np.float32)

    write = in_jax(writing_where_true)
    leaf = torch.tensor(values, requires_grad=True)
    expected = writing_where_true(leaf)
    expected.square().sum().backward()
    np.testing.assert_array_equal(jax.jit(write)(values), expected.detach())
    gradient = jax.jit(jax.grad(lambda x: jnp.square(write(x)).sum()))(values)
    np.testing.assert_array_equal(gradient, leaf.grad)

    def count(x):
        with environment:
            return len(torch.where(environment.j2t_iso(x) > 0)[0])

    with pytest.raises(jax.errors.ConcretizationTypeError):
        jax.jit(count)(values)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_of_embeddings_are_pytorchs(mode):
    generator = np.random.default_rng(0)
    table = generator.normal(size=(7, 3)).astype(np.float32)
    indices = torch.tensor(generator.integers(0, 7, (4, 5)))
    weights = torch.tensor(generator.normal(size=(4, 5)).astype(np.float32))
    options = {"mode": mode, "per_sample_weights": weights if mode == "sum" else None}

    def look_up(table):
        return torch.nn.functional.embedding_bag(indices, table, **options)

    look_up_in_jax = in_jax(look_up)
    leaf = torch.tensor(table, requires_grad=True)
    expected = look_up(leaf)
    expected.square().sum().backward()
    np.testing.assert_allclose(look_up_in_jax(jnp.asarray(table)), expected.detach(), atol=1e-6)
    gradient = jax.grad(lambda x: jnp.square(look_up_in_jax(x)).sum())(jnp.asarray(table))
    np.testing.assert_allclose(gradient, leaf.grad, atol=1e-5)
