"""A module for each file format; all give what `data.collection` describes."""
