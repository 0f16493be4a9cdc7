"""The names of a run folder's files, and how they are read."""

from adamerge_jax.coefficients.file import FILE_NAME

RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
"""The merges that a search or a front has scored."""
RECORD_FILE = "run.json"
RESULTS_FILE = "results.json"
PREDICTIONS_FILE = "predictions.json"
"""The classes that the merge takes for others, and examples on which merge and expert differ."""
WITHOUT_EXPERTS_FILE = "without_experts.json"
"""The merge's scores without each of its experts, where they were asked for."""
COEFFICIENTS_FILE = FILE_NAME
HEAT_MAP_FILE = "coefficients.png"
FRONT_FILE = "front.json"
FRONT_FOLDER = "front"
"""The folder of a front's coefficients files."""
FRONT_PICTURE_FILE = "front.png"
PAGE_FILE = "report.html"
LOCK_FILE = ".lock"
"""The file that the process which writes to the folder has locked."""
STATE_FOLDER = "state"
"""The folder that an unfinished run has, from its first file on; of a run that learns it keeps the
state to go on from."""
