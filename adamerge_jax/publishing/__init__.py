"""Merges on the Hugging Face Hub: the files of a run that are uploaded, and the upload."""
