"""Params and packed tokens in, vectors, scores and losses out; model folders in and out.

Nothing in here knows of lists, steps or workdirs.
"""
