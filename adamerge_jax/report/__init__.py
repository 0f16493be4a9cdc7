"""Everything that people look at: tables of results, maps of coefficients, reports, model cards."""
