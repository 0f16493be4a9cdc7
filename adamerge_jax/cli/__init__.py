"""The `adamerge` command."""
