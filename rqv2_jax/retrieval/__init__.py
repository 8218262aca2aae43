"""From parameters to ranked passages: encode, search, re-rank."""
