"""Files of any kind that strangers may have written: read strictly and within limits."""
