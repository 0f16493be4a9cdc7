"""A user's script against the public names, which type checkers are to accept as it is."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]  # optax says nothing of its types

import adamerge_jax as am

Parameters = dict[str, jax.Array]


def forward(parameters: Parameters, inputs: jax.Array) -> jax.Array:
    return inputs @ parameters["kernel"]


base: Parameters = {"kernel": jnp.ones((3, 2))}
experts = {name: {"kernel": base["kernel"].at[:, c].add(1.0)} for c, name in enumerate("ab")}
data: dict[str, np.ndarray] = {name: np.eye(3, dtype=np.float32).repeat(8, 0) for name in experts}

merged = am.merge(base, experts, forward, data, granularity="tensor", steps=4, seed=1)
kernel: jax.Array = merged.parameters["kernel"]
file: Path = merged.save("coefficients.safetensors")
coefficients = am.Coefficients.load(file)
again: Parameters = am.fold(base, list(experts.values()), coefficients.times({"a": 0.5}))
largest: float = max(float(values.max()) for values in coefficients.values.values())
print(merged, merged.report("report").name, again["kernel"].shape, largest)


def core_forward(
    parameters: Parameters, heads: tuple[()], inputs: Parameters
) -> list[am.objectives.TaskOutputs]:
    logits = forward(am.materialize(parameters), inputs["x"])
    return [am.objectives.TaskOutputs(part) for part in jnp.split(logits, 2)]


deltas = am.task_vectors(base, list(experts.values()))
shapes = am.granularities.shapes_of(base, deltas)
granularity = am.granularities.row(shapes)
examples = {name: am.ArrayExamples({"x": array}) for name, array in data.items()}
learner = am.make_learner(
    core_forward, granularity, am.CONSTRAINTS["clip"], am.objectives.entropy(), optax.adam(0.1)
)
learned = am.learn(
    learner,
    am.Frozen(base, deltas, heads=()),
    granularity.init(am.granularities.constant(shapes, experts=2, value=0.3)),
    am.calibrate(examples, batch_size=4, held_out=0.2, seed=0),
    steps=4,
    evaluate_every=2,
)
mixed = am.materialize(am.mix(base, deltas, granularity.scales(learned.values)))


@am.extension
def squared(margin: float = 1.0) -> am.objectives.Objective:
    def value(outputs: am.objectives.TaskOutputs, targets: am.objectives.Targets) -> jax.Array:
        return jnp.square(outputs.logits - margin).mean(-1)

    return am.objectives.Objective(value, am.objectives.TargetSpec())


try:
    recipe: am.Recipe = am.load_recipe("recipe.yaml", preset="adamerging")
    print(recipe.learning.steps, recipe.coefficients.granularity, squared(2.0), mixed)
    run: am.Run = am.run_recipe(recipe, "run", root=".", progress=False)
    print(run.folder / "report.html", run.table, am.coefficients_figure(run.coefficients))
    prepared: am.Prepared = am.prepare(am.load_recipe("recipe.yaml", changes={"seed": 1}))
    result: am.MergeResult = prepared.learn(on_step=lambda progress: print(progress.step))
    row: am.Row = prepared.evaluate(result.times({"a": 0.5}))
    layers, means = am.layer_means(result.coefficients)
    changes = am.compare(run.coefficients, result.coefficients).experts
    print(row.average, layers, means.shape, [change.correlation for change in changes])
    print(max(prepared.baselines().values(), key=lambda row: row.average).method)
    print({tensor: float(cosines.min()) for tensor, cosines in prepared.cosines().items()})
except am.InputError as error:
    print(error)
