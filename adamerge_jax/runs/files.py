"""The names of a run folder's files, and how they are read."""

RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
RECORD_FILE = "run.json"
RESULTS_FILE = "results.json"
COEFFICIENTS_FILE = "coefficients.safetensors"
HEAT_MAP_FILE = "coefficients.png"
PAGE_FILE = "report.html"
LOCK_FILE = ".lock"
"""The file that the process which writes to the folder has locked."""
STATE_FOLDER = "state"
"""The folder that an unfinished run has, from its first file on; of a run that learns it keeps the
state to go on from."""
