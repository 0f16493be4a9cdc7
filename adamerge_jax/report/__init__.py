"""What people look at: tables of results, maps of coefficients, a run's report, the model card."""

from adamerge_jax.report.coefficients import draw_coefficients, print_coefficients
from adamerge_jax.report.model_card import model_card
from adamerge_jax.report.page import PAGE_FILE, write_page
from adamerge_jax.report.results import results_table, write_results

__all__ = [
    "PAGE_FILE",
    "draw_coefficients",
    "model_card",
    "print_coefficients",
    "results_table",
    "write_page",
    "write_results",
]
