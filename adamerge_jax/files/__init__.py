"""Files of any kind: strangers' are read strictly, ours are written whole or not at all."""
