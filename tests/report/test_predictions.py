"""What a page shows of predictions."""

from adamerge_jax.report.predictions import prediction_views
from adamerge_jax.runs.predictions import Difference, Mistake, TaskPredictions


def predictions(classes: int, *mistakes: tuple[int, int, int]) -> TaskPredictions:
    return TaskPredictions(
        class_names=[f"class {number}" for number in range(classes)],
        counts=[Mistake(label=label, merge=merge, count=n) for label, merge, n in mistakes],
    )


def test_few_classes_are_a_table():
    (view,) = prediction_views({"pets": predictions(3, (0, 0, 8), (0, 2, 2), (2, -1, 1))})
    assert view.grid.columns == ["class 0", "class 1", "class 2", "no class"]
    # A class without examples has no line.
    assert {line.name: [cell.text for cell in line.cells] for line in view.grid.lines} == {
        "class 0": ["8", "", "2", ""],
        "class 2": ["", "", "", "1"],
    }
    assert view.kind == "heat confusion upright" and view.differing is None


def test_of_many_classes_the_commonest_mistakes_are_listed():
    mistakes = [(number, 0, number) for number in range(1, 20)]
    (view,) = prediction_views({"pets": predictions(20, (0, 0, 99), *mistakes)})
    assert [line.name for line in view.grid.lines] == [f"class {n}" for n in range(19, 9, -1)]
    assert [cell.text for cell in view.grid.lines[0].cells] == ["class 0", "19"]


def test_examples_on_which_they_differ():
    difference = Difference(index=4, label=0, expert=0, merge=1, image="iVBORw0=")
    of_task = predictions(2, (0, 0, 3), (0, 1, 2)).model_copy(
        update={"differing": 2, "expert_alone_right": 2, "differences": [difference]}
    )
    (view,) = prediction_views({"pets": of_task})
    assert view.differing == (
        "Merge and expert differ on 2 of 5 test examples: on 2 the expert alone is right, on 0 the "
        "merge alone."
    )
    (shown,) = view.shown
    assert (shown.label, shown.expert, shown.merge) == ("class 0", "class 0", "class 1")
    assert shown.image == "data:image/png;base64,iVBORw0="
