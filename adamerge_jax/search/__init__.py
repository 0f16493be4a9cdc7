"""Coefficients that are chosen by their scores alone: no gradient, no model, no file."""
