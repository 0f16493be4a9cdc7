"""Coefficients that are chosen by scores alone: the commands `search` and `front`."""
